"""The training scripts, each run whole on a few small images: the files of a run and their content,
that an interrupted run goes on exactly, that nothing is random but for the seed, that bad input
ends in one line and leaves nothing behind, and that the drawn dataset is learned."""

import contextlib
import errno
import functools
import importlib
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
from PIL import Image

import common

METHODS = {  # what is typed, and the name of the run
    "simclr": "simclr",
    "byol": "byol",
    "barlow_twins": "barlow_twins",
    "vicreg": "vicreg",
    "supcon_tcl": "supcon",
    "supcon_tcl --loss tcl": "tcl",
    "supcon_tcl --loss tcl --self-supervised": "tcl_self_supervised",
    "supcon_tcl --loss cross_entropy": "cross_entropy",
    "carl_carp": "carl",
    "carl_carp --method carp": "carp",
    "corinfomax": "corinfomax",
}
every_method = pytest.mark.parametrize("method", METHODS, ids=METHODS.values())
ROOT = Path(__file__).resolve().parent.parent
CPU = "--device cpu --workers 0 --precision fp32".split()
TINY = [*CPU, *"--batch-size 16 --stem imagenet --lr 0.1 --knn-every 0 --epochs 1".split()]


def call(script, *argv):
    """Run a script, perhaps with flags, in this process: (exit status, stdout, stderr)."""
    script, *given = script.split()
    main, out, err = importlib.import_module(script).main, io.StringIO(), io.StringIO()
    words = [f"{script}.py", *given, *map(str, argv)]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", words),
    ):
        try:
            status = common.run(main) or 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(script, *argv):
    """Run a script that should not fail, and return what it printed."""
    status, out, err = call(script, *argv)
    assert (status, err) == (0, ""), err
    return out


def fail(script, *argv):
    """Run a script that should refuse its input, and return the line that says why."""
    status, _, err = call(script, *argv)
    assert status == 2 and err.endswith("\n") and err.count("\n") == 1, (status, err)
    assert err.startswith(f"{script.split()[0]}.py: error: ") and "Traceback" not in err
    return err


def random_split(n, size=16, classes=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)
    return {"images": images, "labels": torch.arange(n) % classes}


def toy(n=64, size=16):
    """A packed dataset of noise: four classes, n training and 32 test images."""
    test = random_split(32, size, seed=1)
    return {"train": random_split(n, size), "test": test, "classes": ["a", "b", "c", "d"]}


def store(value, path):
    torch.save(value, path)
    return path


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_speed(out):
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in read_log(out)]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def listing(folder):
    """Every file and folder below, with size and time of the files."""
    paths = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {p: (s.st_size, s.st_mtime_ns) if p.is_file() else None for p, s in paths.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, removed afterwards: the checkpoints in it are large."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module", params=METHODS, ids=METHODS.values())
def finished(request, tmp_path_factory):
    """A run of three epochs of four steps that was not interrupted, one for each method."""
    folder = tmp_path_factory.mktemp(METHODS[request.param])
    data, out = store(toy(), folder / "toy.pt"), folder / "run"
    argv = ["--dataset", data, *TINY, "--epochs", "3", "--knn-every", "2"]
    stdout = succeed(request.param, *argv, "--out", out)
    name = METHODS[request.param]
    yield SimpleNamespace(script=request.param, name=name, argv=argv, out=out, stdout=stdout)
    shutil.rmtree(folder)


# For what does not depend on the method.
first_method = pytest.mark.parametrize("finished", ["simclr"], indirect=True)


# --------------------------------------------------------------------------------------------------
# The benchmark


def test_benchmark_measures_every_arm(folder):
    store(toy(), "toy.pt")
    argv = [*CPU, "--dataset", "toy.pt", "--stem", "imagenet", "--batch-size", "16"]
    argv += ["--blocks", "2", "--steps", "1", "--epochs", "1", "--seeds", "1", "--json", "out.json"]
    table = succeed("benchmark", *argv, "--groups", "data,ladder,methods,accuracy")
    found = json.loads(Path("out.json").read_text())
    arms = {"cached", "real", "views", "pil 0", "pil 1", "usual", "plain"}
    assert arms <= found["data"].keys() and len(found["ladder"]) == 5
    assert len(found["methods"]) == 9 and found["accuracy"].keys() == {"ours", "torchvision"}
    for group, base in ("data", "cached"), ("ladder", "cached"), ("methods", "simclr"):
        assert found[group][base]["percent_over_base"] == 0
        for name, row in found[group].items():
            assert len(row["ms_blocks"]) == 2 and name in table
            assert row["seconds_per_epoch"] == pytest.approx(64 * row["ms"] / 16e3)
            ratios = zip(row["ms_blocks"], found[group][base]["ms_blocks"], strict=True)
            over = 100 * (sum(a / b for a, b in ratios) / 2 - 1)  # the median of two
            assert row["percent_over_base"] == pytest.approx(over, abs=1e-6)
    assert found["times_real"].keys() == {"pil 0", "usual", "plain"}
    blocks = zip(*(found["data"][x]["ms_blocks"] for x in ("plain", "real")), strict=True)
    assert found["times_real"]["plain"] == pytest.approx(sum(a / b for a, b in blocks) / 2)
    assert "expected some of data" in fail("benchmark", *argv, "--groups", "speed")
    assert "two views" in fail("benchmark", *argv, "--views", "3")


def test_benchmark_compares_what_it_says(folder):
    """Each thing that the ladder takes away is gone, and the rest is there; the rivals' views have
    our statistics."""
    import benchmark

    store(toy(512, 24), "toy.pt")
    argv = ["--dataset", "toy.pt", *CPU[:-2], "--precision", "bf16", "--stem", "imagenet"]
    argv += ["--blur", "0.5", "--optimizer", "adam", "--batch-size", "256", "--no-concat-views"]
    model, data, recipes, args = benchmark.build("simclr", argv)
    assert not model.concat_views and args.optimizer == "adam"
    weight = model.backbone.conv1.weight
    for taken in {}, *({name: False} for name in ("half", "channels_last", "fused")):
        step = benchmark.Step(model, args, **taken)
        copied = step.model.backbone.conv1.weight
        assert step.args.precision == ("fp32" if "half" in taken else "bf16")
        last = copied.is_contiguous(memory_format=torch.channels_last)
        assert last == ("channels_last" not in taken) and torch.equal(copied, weight)
        assert step.optimizer.param_groups[0]["fused"] == (None if "fused" in taken else True)
    assert benchmark.Step(model, args, one_pass=True).model.concat_views
    transform = benchmark.torchvision_transform(recipes[0], args.image_size, data)
    theirs = benchmark.PillowViews(data, transform)
    theirs = torch.stack([theirs[i][0] for i in range(512)])
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    ours = augment(data.pretrain.images, common.generator(0, "augment", 0))[0]
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=0.02)
    assert theirs.std().item() == pytest.approx(ours.std().item(), rel=0.03)
    resnet18 = common.resnet("resnet18", "small")
    counted = benchmark.flops(importlib.import_module("simclr").SimCLR(resnet18), 32)
    assert counted == pytest.approx(6.66e9, rel=0.01)  # counted by hand: 3.33 GFLOP for a view


# --------------------------------------------------------------------------------------------------
# The compiler


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without its code generator: it captures graphs, and runs them as they are."""
    capture = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", capture)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("finished", ["byol", "supcon_tcl"], indirect=True)
def test_compiled_once_for_all_epochs(finished, tmp_path, eager_backend):
    """One graph for the model, one for its views; none for AutoAugment, by groups of any size.
    (Each model by itself: tests/test_models.py.)"""
    eager_backend.clear()
    argv = [*finished.argv, "--compile", "default", "--out", tmp_path / "run"]
    succeed(finished.script, *argv)
    assert eager_backend["stats"]["unique_graphs"] == (1 if finished.name == "supcon" else 2)
    timed = ["compile_seconds" in entry for entry in read_log(tmp_path / "run")]
    assert timed == [True, False, False]  # four steps, three of them apart
    losses = [read_log(out)[0]["loss"] for out in (tmp_path / "run", finished.out)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # torch 2.6 rounds views differently
    shutil.rmtree(tmp_path / "run")


def test_compile_needs_a_compiler(folder, monkeypatch):
    store(toy(), "toy.pt")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    message = fail("simclr", "--dataset", "toy.pt", *TINY, "--compile", "default")
    assert "--compile default needs a compiler" in message and "--compile off" in message
    assert listing(folder).keys() == {folder / "toy.pt"}


@pytest.mark.parametrize(
    "device, capability, steps, compiler, mode",
    [("cuda", (9, 0), 2000, "/usr/bin/gcc", "default"), ("cuda", (9, 0), 1999, "/gcc", "off"),
     ("cuda", (6, 1), 9999, "/gcc", "off"), ("cuda", (9, 0), 9999, None, "off"),
     ("cpu", (9, 0), 9999, "/gcc", "off")],
)  # fmt: skip
def test_compile_by_default_where_it_pays(monkeypatch, device, capability, steps, compiler, mode):
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    args = SimpleNamespace(device=device, compile=None)
    common.resolve_compile(args, steps)
    assert args.compile == mode


def test_what_the_compiler_cannot_do_ends_in_one_line(folder, monkeypatch):
    """A RuntimeError of torch's, which may quote code with "alloc" in it."""

    def refuse(graph, inputs):
        raise RuntimeError("buffer = allocate(1)")

    store(toy(), "toy.pt")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    torch._dynamo.reset()
    message = fail("simclr", "--dataset", "toy.pt", *TINY, "--compile", "default")
    assert "torch.compile failed" in message and "--compile off" in message
    torch._dynamo.reset()


def test_warm_up_is_cut_to_a_tenth_unless_it_is_given(folder):
    """Ten epochs in the presets, one here, of four steps."""
    store(toy(), "toy.pt")
    configs = {}
    for given in "", "0.75", "1":
        flag = ["--warmup-epochs", given] if given else []
        succeed("simclr", "--dataset", "toy.pt", *TINY, *flag, "--out", f"run{given}")
        configs[given] = json.loads(Path(f"run{given}/config.json").read_text())["config"]
    epochs = {given: config["warmup_epochs"] for given, config in configs.items()}
    assert epochs == {"": 0.1, "0.75": 0.75, "1": 1.0}
    succeed("simclr", "--dataset", "toy.pt", *TINY, "--epochs", "20", "--warmup-epochs", "10")
    typed = json.loads(Path("runs/simclr_toy_resnet18/config.json").read_text())["config"]
    assert typed["warmup_epochs"] == 10  # which is the preset's, too
    assert read_log(Path("run1"))[0]["lr"] == configs["1"]["scaled_lr"]  # all four steps rise
    message = fail("simclr", "--dataset", "toy.pt", *TINY, "--warmup-epochs", "1.5", "--out", "no")
    assert "--warmup-epochs 1.5 exceeds --epochs 1" in message and not Path("no").exists()


def test_views_together_or_apart_by_flag(folder):
    store(toy(), "toy.pt")
    runs = {}
    for flag in "", "--concat-views", "--no-concat-views":
        succeed("byol", "--dataset", "toy.pt", *TINY, *([flag] if flag else []), "--out", "run")
        runs[flag] = load("run/encoder.pt")["state_dict"]
        shutil.rmtree("run")
    assert same_tensors(runs[""], runs["--no-concat-views"])
    assert not same_tensors(runs[""], runs["--concat-views"])


# --------------------------------------------------------------------------------------------------
# What a run writes


def test_log(finished):
    entries = read_log(finished.out)
    assert [(entry["epoch"], entry["step"]) for entry in entries] == [(1, 4), (2, 8), (3, 12)]
    always = {"loss", "lr", "images_per_second", "feature_std", "effective_rank"}
    for entry in entries:
        assert entry.keys() >= always
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in entry.values()), entry
    assert ["knn_top1" in entry for entry in entries] == [False, True, True]  # --knn-every 2, last
    assert 0 <= entries[-1]["knn_top1"] <= 1
    supervised = finished.name in ("supcon", "tcl", "cross_entropy")
    if "supcon_tcl" in finished.script:
        assert all(entry["labels_used"] == supervised for entry in entries)
        said = f"labels of the training images: {'USED' if supervised else 'not used'}"
        assert said in finished.stdout.splitlines()
    else:
        assert not any("labels_used" in entry for entry in entries)


def test_encoder_file(finished):
    saved = load(finished.out / "encoder.pt")
    known = {"arch": "resnet18", "stem": "imagenet", "image_size": 16, "dataset": "toy", "epoch": 3}
    known["method"] = finished.name
    assert {key: saved[key] for key in known} == known
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["config"]["epochs"] == 3

    def plain(value):
        if isinstance(value, dict | list):
            return all(map(plain, value.values() if isinstance(value, dict) else value))
        return type(value) in (str, int, float, bool, type(None))

    assert plain({key: value for key, value in saved.items() if key != "state_dict"})
    assert {type(value) for value in saved["state_dict"].values()} == {torch.Tensor}
    network = torchvision.models.resnet18()
    del network.fc
    network.load_state_dict(saved["state_dict"])  # strict: every key and no other
    model = load(finished.out / "checkpoint.pt")["model"]
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    assert same_tensors(saved["state_dict"], backbone)


def test_views_and_config(finished):
    with Image.open(finished.out / "views.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * 16 and picture.height > 2 * 16
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 100
    config = json.loads((finished.out / "config.json").read_text())
    assert config["config"]["epochs"] == 3
    script, *given = finished.script.split()
    typed = shlex.split(config["command"])[: 3 + len(given)]
    assert typed == ["python", f"{script}.py", *given, "--dataset"]


def test_last_line_is_the_evaluation_to_run_next(finished):
    python, script, *argv = shlex.split(finished.stdout.splitlines()[-1])
    assert (python, script) == ("python", "linear_eval.py")
    figures = json.loads(succeed("linear_eval", *argv).splitlines()[-1])
    assert (figures["method"], figures["epoch"]) == (finished.name, 3)


# --------------------------------------------------------------------------------------------------
# That it trains


@every_method
def test_loss_decreases_on_one_batch(method, folder, monkeypatch):
    """The model as its script builds it, and the views that its script asks for."""
    built = []
    monkeypatch.setattr(common, "train", lambda *values: built.extend(values))
    narrow = ["--dim", "8"] if method == "corinfomax" else []  # 16 images have a covariance there
    succeed(method, "--dataset", store(toy(16, 32), "toy.pt"), *TINY, *narrow)
    name, model, data, recipes, args = built
    assert name == METHODS[method]
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    views = augment(data.train.images, common.generator(0, "views", 0))
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    first_kernel = model.backbone.conv1.weight.detach().clone()
    for step in range(1, 31):
        loss, terms = model(views, data.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step(step / 30)
        losses.append(loss.item())
    assert all(value.ndim == 0 for value in terms.values())
    first = losses[3 if method == "corinfomax" else 0]  # its running covariance starts at I
    assert max(losses[-5:]) < first - 0.1 * abs(first), losses
    assert not torch.equal(model.backbone.conv1.weight, first_kernel)  # not the heads alone


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@every_method
def test_precision(method, precision, folder):
    # Not of 16 pixels: there layer4 has an input of 1x1, for which oneDNN leaves parts of a bf16
    # kernel's gradient unwritten (torch 2.15).
    store(toy(16, 32), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, "--out", "run", "--precision", precision]
    succeed(method, *argv, "--lr", "1e-3")
    (entry,) = read_log(folder / "run")
    assert math.isfinite(entry["loss"])
    weights = load("run/encoder.pt")["state_dict"].values()
    assert all(value.isfinite().all() for value in weights)


@every_method
def test_nothing_is_random_but_for_the_seed(method, folder):
    store(toy(32), "toy.pt")
    weights, views = [], []
    for i, seed in enumerate([3, 3, 4]):
        torch.manual_seed(i)  # what was drawn before the run does not enter
        argv = ["--dataset", "toy.pt", *TINY, "--seed", seed, "--out", f"run{i}"]
        succeed(method, *argv)
        weights.append(load(f"run{i}/checkpoint.pt")["model"])
        views.append(Path(f"run{i}/views.png").read_bytes())
    assert same_tensors(weights[0], weights[1]) and views[0] == views[1]
    assert not torch.equal(weights[0]["backbone.conv1.weight"], weights[2]["backbone.conv1.weight"])
    assert views[0] != views[2]


def image_folder(root, sizes, splits=("train", "test")):
    """Four images of each of two classes in each split; their sizes take turns."""
    rng = torch.Generator().manual_seed(0)
    for split, name, i in itertools.product(splits, ("cat", "dog"), range(4)):
        size = sizes[i % len(sizes)]
        pixels = torch.randint(256, (size, size, 3), generator=rng, dtype=torch.uint8)
        path = Path(root, split, name, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.mark.parametrize("sizes", [[32], [32, 40]], ids=["equal", "mixed"])
def test_image_folder(sizes, folder):
    """Mixed sizes are decoded by workers, whose number changes nothing."""
    image_folder("pets", sizes)
    argv = ["--dataset", "pets", *TINY, *"--batch-size 4 --image-size 32 --knn-every 1".split()]
    succeed("simclr", *argv, "--out", "run")
    assert 0 <= read_log(folder / "run")[0]["knn_top1"] <= 1
    weights = load("run/encoder.pt")
    assert (weights["dataset"], weights["image_size"]) == ("pets", 32)
    if len(sizes) > 1:
        succeed("simclr", *argv, "--workers", "2", "--out", "again")
        assert same_tensors(weights["state_dict"], load("again/encoder.pt")["state_dict"])


def test_from_the_shell(folder):
    """As a user starts it, from another folder and without --out."""
    store(toy(16), "toy.pt")
    argv = [sys.executable, ROOT / "simclr.py", "--dataset", "toy.pt", *TINY, "--dim", "32"]
    run = subprocess.run(argv, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    out = folder / "runs" / "simclr_toy_resnet18"
    written = {"checkpoint.pt", "encoder.pt", "log.jsonl", "views.png", "config.json"}
    assert {path.name for path in out.iterdir()} == written


# --------------------------------------------------------------------------------------------------
# Interrupted and resumed


def interrupt(function, n):
    """`function`, but for its n-th call, in which the user presses Ctrl-C."""
    calls = itertools.count(1)

    def wrapped(value, file=None):
        if next(calls) < n:
            return function(value, file) if file else function(value)
        if file:
            file.write(b"half a file")
        raise KeyboardInterrupt

    return wrapped


def interrupt_and_resume(finished, monkeypatch, where, name, n):
    """The run `finished`, again, interrupted in the n-th call of where.name, which is in its third
    epoch, and resumed. Both leave the same weights and the same log."""
    ticks = itertools.count(0, 100)  # more than a minute between two looks at the clock: save
    argv, out = [*finished.argv, "--out", "run"], Path("run")
    with monkeypatch.context() as patch:
        patch.setattr(common, "time", SimpleNamespace(time=lambda: next(ticks)))
        patch.setattr(where, name, interrupt(getattr(where, name), n))
        status, _, err = call(finished.script, *argv)
    assert status == 130 and "--resume" in err and err.count("\n") == 1
    assert not list(out.glob("*.tmp"))
    epoch = load(out / "checkpoint.pt")["epoch"]
    assert epoch == 2 or (epoch == 3 and name == "save")

    torch.manual_seed(5)  # a new process would be in another state
    printed = succeed(finished.script, *argv, "--resume")
    assert f"resumed from step {4 * epoch} (epoch {epoch})" in printed.splitlines()
    for file, key in ("checkpoint.pt", "model"), ("encoder.pt", "state_dict"):
        ours, theirs = load(out / file), load(finished.out / file)
        assert same_tensors(ours[key], theirs[key]) and ours["epoch"] == 3, file
    assert without_speed(out) == without_speed(finished.out)


def test_resumed_run_equals_uninterrupted(finished, folder, monkeypatch):
    """Interrupted before the third epoch's line in the log."""
    interrupt_and_resume(finished, monkeypatch, common, "collapse_figures", 3)


@first_method
@pytest.mark.parametrize("n", [5, 6])  # an epoch saves two files: in the first, or between them
def test_interrupted_while_saving(finished, folder, monkeypatch, n):
    interrupt_and_resume(finished, monkeypatch, torch, "save", n)


@pytest.mark.parametrize(
    "finished, at, number",
    [("simclr", 6, signal.SIGINT), ("simclr", 8, signal.SIGTERM), ("byol", 6, signal.SIGTERM),
     ("corinfomax", 6, signal.SIGINT), ("carl_carp", 6, signal.SIGTERM)],
    indirect=["finished"],
)  # fmt: skip
def test_a_signal_ends_the_run_after_its_step(finished, folder, monkeypatch, capfd, number, at):
    """Saved, with the line that goes on; nothing is repeated or left out on --resume."""
    derived_seed, before = common.derived_seed, signal.getsignal(number)

    def in_that_step(seed, purpose, step):
        if (purpose, step) == ("model", at - 1):
            os.kill(os.getpid(), number)
        return derived_seed(seed, purpose, step)

    argv = [*finished.argv, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "derived_seed", in_that_step)
        status, out, err = call(finished.script, *argv)
    assert status == 128 + number and "stopping after the step" in capfd.readouterr().err
    again = shlex.join(["python", f"{finished.script}.py", *map(str, argv), "--resume"])
    assert out.splitlines()[-1] == f"stopped; to go on: {again}"
    assert signal.getsignal(number) == before
    saved = load("run/checkpoint.pt")
    assert (saved["step"], saved["epoch"]) == (at, 1)
    printed = succeed(finished.script, *argv, "--resume")
    assert f"resumed from step {at} (epoch 1)" in printed
    theirs = load(finished.out / "checkpoint.pt")["model"]
    assert same_tensors(load("run/checkpoint.pt")["model"], theirs)
    assert without_speed(Path("run")) == without_speed(finished.out)


@first_method
def test_a_second_signal_stops_at_once(finished, folder, monkeypatch):
    learning_rate = common.learning_rate

    def twice(*given):
        signal.raise_signal(signal.SIGINT)  # to this thread: two from outside may arrive as one
        signal.raise_signal(signal.SIGINT)
        return learning_rate(*given)

    monkeypatch.setattr(common, "learning_rate", twice)
    with monkeypatch.context() as patch:
        patch.setattr(common.StopSignals, "pause", 0.0)
        status, _, err = call(finished.script, *finished.argv, "--out", "run")
    assert status == 130 and "interrupted" in err and not Path("run/checkpoint.pt").exists()
    status, _, _ = call(finished.script, *finished.argv, "--out", "run")  # within a second: once
    assert status == 130 and load("run/checkpoint.pt")["step"] == 1


@first_method
@pytest.mark.parametrize("damage", ["cut", "empty", "a byte", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, folder, damage):
    shutil.copytree(finished.out, "run")
    path = Path("run/checkpoint.pt")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    if damage == "gone":  # killed between two renames
        path.unlink()
    else:
        path.write_bytes({"cut": content[:middle], "empty": b"", "a byte": content}[damage])
    status, out, err = call(finished.script, *finished.argv, "--out", "run", "--resume")
    assert status == 0 and "resumed from step 4 (epoch 1)" in out
    assert "run/checkpoint.pt: " in err and "going on from run/checkpoint.previous.pt" in err
    theirs = load(finished.out / "encoder.pt")["state_dict"]
    assert same_tensors(load("run/encoder.pt")["state_dict"], theirs)
    assert without_speed(Path("run")) == without_speed(finished.out)
    assert common.load_whole("run/checkpoint.previous.pt")["epoch"] == 1
    for name in "checkpoint.pt", "checkpoint.previous.pt":
        Path("run", name).write_bytes(b"no checkpoint")
    before = listing(folder)
    status, out, err = call(finished.script, *finished.argv, "--out", "run", "--resume")
    assert status == 2 and "run/checkpoint.pt: damaged" in err and listing(folder) == before


def test_every_failing_write_leaves_a_whole_checkpoint(folder, monkeypatch):
    """The n-th rename or flush to disk of a run fails, for every n: what follows goes on from some
    checkpoint, or from the start, and ends with the same weights."""
    store(toy(16), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, "--epochs", "2"]
    succeed("simclr", *argv, "--out", "whole")
    theirs, argv = load("whole/encoder.pt")["state_dict"], [*argv, "--out", "run"]
    for name in "replace", "fsync":
        function, failed = getattr(os, name), 0
        for n in itertools.count(1):
            calls = itertools.count(1)

            def fail_once(*given, n=n, calls=calls, function=function):
                if next(calls) == n:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return function(*given)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail_once)
                status, _, err = call("simclr", *argv)
            assert not list(Path("run").glob("*.tmp"))
            if status:  # not where a folder could not be flushed: the file was, and is there
                failed += 1
                assert status == 2 and "No space left on device" in err and err.count("\n") == 1
                resume = ["--resume"] if list(Path("run").glob("checkpoint*.pt")) else []
                status, _, err = call("simclr", *argv, *resume)
                assert status == 0, err
            assert same_tensors(load("run/encoder.pt")["state_dict"], theirs)
            shutil.rmtree("run")
            if next(calls) <= n:  # the run had fewer calls
                break
        assert failed >= 8


@first_method
def test_milestones_are_kept(finished, folder):
    succeed(finished.script, *finished.argv, "--out", "run", "--save-every", "1", "--keep", "2")
    kept = sorted(path.name for path in Path("run").glob("checkpoint_*.pt"))
    assert kept == ["checkpoint_00002.pt", "checkpoint_00003.pt"]
    assert [load(Path("run", name))["epoch"] for name in kept] == [2, 3]
    last = load("run/checkpoint.pt")["model"]
    assert same_tensors(load("run/checkpoint_00003.pt")["model"], last)


@first_method
def test_a_loss_that_is_not_finite_stops_the_run(finished, folder, monkeypatch):
    """In the sixth step: named, with its terms and rate; the checkpoint of epoch 1 stays."""
    module = importlib.import_module(finished.script)
    loss_of, calls = module.nt_xent_loss, itertools.count(1)

    def poisoned(*given):
        return loss_of(*given) * (float("nan") if next(calls) == 6 else 1)

    argv = [*finished.argv, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "nt_xent_loss", poisoned)
        line = fail(finished.script, *argv)
    assert "step 6: the loss is not finite" in line and "'mi_bound': nan" in line
    rate = common.learning_rate(5, 12, 1.2, 0.1 * 16 / 256)
    assert f"learning rate {rate:.3g}" in line and "run/not_finite.pt" in line
    wrong = load("run/not_finite.pt")
    assert wrong["step"] == 6 and {"terms", "lr", "model", "optimizer"} <= wrong.keys()
    assert load("run/checkpoint.pt")["epoch"] == 1
    succeed(finished.script, *argv, "--resume")
    theirs = load(finished.out / "encoder.pt")["state_dict"]
    assert same_tensors(load("run/encoder.pt")["state_dict"], theirs)


@first_method
def test_a_run_is_not_overwritten(finished):
    before = listing(finished.out)
    assert "--resume" in fail(finished.script, *finished.argv, "--out", finished.out)
    assert listing(finished.out) == before


@first_method
def test_resume_with_another_setting_is_refused(finished):
    before = listing(finished.out)
    argv = [*finished.argv, "--out", finished.out, "--resume"]
    assert "--lr 0.1, not 0.5" in fail(finished.script, *argv, "--lr", "0.5")
    assert "--epochs 3, not 4" in fail(finished.script, *argv, "--epochs", "4")
    assert listing(finished.out) == before


FOREIGN = {
    "another method's": lambda saved: saved | {"method": "another"},
    "an encoder.pt": lambda saved: {k: saved[k] for k in saved if k not in ("model", "optimizer")},
    "another model's": lambda saved: saved | {"model": {"weight": torch.zeros(2)}},
    "a list": lambda saved: [1, 2],
    "missing": None,
}


@first_method
@pytest.mark.parametrize("kind", FOREIGN)
def test_resume_from_a_foreign_checkpoint_is_refused(finished, folder, kind):
    if kind != "missing":
        Path("run").mkdir()
        saved = load(finished.out / "checkpoint.pt")
        store(FOREIGN[kind](saved), "run/checkpoint.pt")
    before = listing(folder)
    line = fail(finished.script, *finished.argv, "--out", "run", "--resume")
    assert "run/checkpoint.pt" in line
    assert listing(folder) == before


# --------------------------------------------------------------------------------------------------
# Bad input


def flags(text):
    """The flags after those of a run that is all right."""
    return lambda: ["--dataset", store(toy(), "toy.pt"), *TINY, *shlex.split(text)]


def packed(change):
    """A packed file; `change` spoils it, or replaces it where it is no function."""

    def argv():
        value = change(toy()) if callable(change) else change
        return ["--dataset", store(value, "toy.pt"), *TINY]

    return argv


def spoil(split="train", **change):
    """Replace the images or labels of a split."""

    def spoilt(data):
        for key, function in change.items():
            data[split][key] = function(data[split][key])
        return data

    return packed(spoilt)


def cut_short():
    data = Path(store(toy(), "toy.pt")).read_bytes()
    Path("toy.pt").write_bytes(data[: len(data) // 2])
    return ["--dataset", "toy.pt", *TINY]


def empty_file():
    Path("toy.pt").touch()
    return ["--dataset", "toy.pt", *TINY]


class Payload:
    """A pickle that makes a file when it is loaded, as one could delete the user's."""

    def __reduce__(self):
        return Path.touch, (Path("payload_ran"),)


def tree(*files):
    """A folder with these files, which are no images."""

    def argv():
        for name in files:
            path = Path("pets", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("not an image")
        return ["--dataset", "pets", *TINY]

    return argv


def corrupt():
    """One image that is none among images of equal size, which are read before anything else."""
    image_folder("pets", [16]).write_bytes(b"not an image")
    return ["--dataset", "pets", *TINY, "--batch-size", "4"]


def below_a_file():
    Path("file").touch()
    return [*flags("")(), "--out", "file/run"]


BAD_INPUT = {
    "unknown dataset": (flags("--dataset nowhere"), "nowhere"),
    "missing packed file": (flags("--dataset nowhere.pt"), "nowhere.pt"),
    "folder without train": (tree("cat/1.png"), "pets: no folder train"),
    "folder without images": (tree("train/cat/notes.txt"), "no images"),
    "folder without classes": (tree("train/1.png"), "no images"),
    "corrupt image": (corrupt, "3.png"),
    "float images": (spoil(images=lambda x: x.float()), "uint8"),
    "images of three dimensions": (spoil(images=lambda x: x[:, 0]), "[N, C, H, W]"),
    "two channels": (spoil(images=lambda x: x[:, :2]), "[64, 2, 16, 16]"),
    "no images": (spoil(images=lambda x: x[:0], labels=lambda y: y[:0]), "[0, 3, 16, 16]"),
    "test images of another size": (spoil("test", images=lambda x: x[..., 1:]), "sizes"),
    "float labels": (spoil(labels=lambda y: y.float()), "int64"),
    "labels too high": (spoil(labels=lambda y: y + 1), "from 1 to 4"),
    "labels negative": (spoil("test", labels=lambda y: y - 1), "from -1 to 2"),
    "fewer labels than images": (spoil(labels=lambda y: y[:60]), "60 labels"),
    "no classes": (packed(lambda data: data | {"classes": []}), "classes"),
    "no train split": (packed(lambda data: {k: data[k] for k in ("test", "classes")}), "train"),
    "train is no dict": (packed(lambda data: data | {"train": torch.zeros(3)}), "train"),
    "packed list": (packed([1, 2, 3]), "dict"),
    "packed tensor": (packed(torch.zeros(3)), "dict"),
    "pickle with code": (packed(lambda data: data | {"classes": Payload()}), "toy.pt"),
    "empty file": (empty_file, "toy.pt"),
    "file cut short": (cut_short, "toy.pt"),
    "batch larger than the dataset": (flags("--batch-size 65"), "64 training images"),
    "batch of one": (flags("--batch-size 1"), "--batch-size"),
    "no epochs": (flags("--epochs 0"), "--epochs"),
    "negative epochs": (flags("--epochs -3"), "--epochs"),
    "epochs in words": (flags("--epochs many"), "many"),
    "negative lr": (flags("--lr -0.1"), "--lr"),
    "lr nan": (flags("--lr nan"), "--lr"),
    "lr infinite": (flags("--lr inf"), "--lr"),
    "crop of nothing": (flags("--crop-min 0"), "--crop-min"),
    "one view": (flags("--views 1"), "--views"),
    "temperature 0": (flags("--temperature 0"), "--temperature"),
    "abbreviated flag": (flags("--epoch 2"), "--epoch"),
    "unknown flag": (flags("--epocs 2"), "--epocs"),
    "flag without value": (flags("--dataset"), "--dataset"),
    "unknown arch": (flags("--arch resnet19"), "resnet19"),
    "unknown device": (flags("--device abacus"), "abacus"),
    "device without memory": (flags("--device meta"), "meta"),
    "output below a file": (below_a_file, "file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line(case, folder):
    make, word = BAD_INPUT[case]
    argv = make()
    before = listing(folder)
    assert word in fail("simclr", *argv)
    assert listing(folder) == before  # so no payload ran, either


# What is found only when training is under way may leave config.json and views.png, and does not
# stop the next try.


def test_corrupt_image_among_streamed_ones(folder):
    path = image_folder("pets", [16, 20], ["train"])
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    argv = ["--dataset", "pets", *TINY, "--image-size", "32", "--batch-size", "4", "--out", "run"]
    assert "3.png" in fail("simclr", *argv)
    assert {path.name for path in Path("run").iterdir()} <= {"config.json", "views.png"}

    # Where a worker finds it, its traceback comes along. In a process of its own, because torch
    # takes seconds to be rid of workers that were left with an error.
    command = [sys.executable, ROOT / "simclr.py", *argv, "--workers", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("simclr.py: error: pets") and "3.png" in run.stderr
    assert not list(Path("run").glob("*.pt"))

    path.write_bytes(good)
    succeed("simclr", *argv)


def test_a_loss_that_is_not_finite_ends_the_run(folder):
    argv = [*flags("--optimizer sgd --lr-scaling none --out run")(), "--lr"]
    assert "not finite" in fail("simclr", *argv, "1e38")
    assert {path.name for path in Path("run").iterdir()} <= common.OWN_FILES
    succeed("simclr", *argv, "0.1")


def test_download_without_network(folder, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    line = fail("simclr", "--dataset", "cifar10", *TINY)
    assert "no route to host" in line and "data/cifar10.pt" in line
    assert listing(folder) == {}


# --------------------------------------------------------------------------------------------------
# That it learns


@pytest.fixture(scope="module")
def drawn():
    """Draw the shapes once for the tests below."""
    with mock.patch.object(common, "shapes", functools.cache(common.shapes)):
        yield


SHORT = "--dataset shapes --knn-bank 2000 --device cpu --out run --epochs"


PRESET_CASES = [
    ("", "default", (1, 1, 0)),
    ("--dataset pets", "default + pets", (1, 4, 4)),
    ("--dataset pets --method b", "default + pets + b + pets b", (5, 2, 4)),
    (
        "--dataset folder/pets.pt --method=b --alone",
        "default + pets + b + alone + pets b",
        (5, 2, 3),
    ),
    ("--method b --alone --lr 9", "default + b + alone", (9, 2, 3)),
    ("--dataset folder/pets", "default", (1, 1, 0)),
]


# epochs, with a margin for other roundings; methods that are not here have three
EPOCHS = {"byol": "8", "barlow_twins": "7", "vicreg": "4", "corinfomax": "6"}
EPOCHS |= {"supcon_tcl --loss tcl": "5", "carl_carp": "7", "carl_carp --method carp": "6"}


@pytest.mark.parametrize("method", METHODS)
def test_shapes_are_learned(method, drawn, folder):
    """A few epochs of the preset, well above what an untrained encoder gives."""
    printed = succeed(method, *SHORT.split(), EPOCHS.get(method, "3"))
    untrained = load("run/checkpoint.pt")["untrained"]
    learned = read_log(folder / "run")[-1]["knn_top1"]
    assert learned > untrained + 0.25
    for ablation, collapsed in ABLATIONS.items():
        if ablation.split(" --ablate")[0] == method:
            assert not collapsed(read_log(folder / "run")[-1])
    assert f"kNN top-1 {learned:.1%} (untrained encoder {untrained:.1%}, chance 10.0%)" in printed


@pytest.mark.parametrize("argv, keys, values", PRESET_CASES)
def test_presets_are_laid_over_each_other(argv, keys, values, capsys):
    """The dataset's over the default, a variant's over it, and both together over all."""
    parser = common.Parser("A script.")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--method", default="a")
    parser.add_argument("--alone", action="store_true")
    for flag in "--lr", "--dim", "--k":
        parser.add_argument(flag, type=float, default=0.0)
    presets = {"default": {"lr": 1.0, "dim": 1.0}, "b": {"dim": 2.0}, "alone": {"k": 3.0}}
    presets |= {"pets": {"dim": 4.0, "k": 4.0}, "pets b": {"lr": 5.0}}
    args = common.parse_args(parser, presets, "method", "alone", argv=argv.split())
    assert (args.lr, args.dim, args.k) == values
    printed = capsys.readouterr().out
    assert printed.startswith(f"preset {keys}: ") and printed.count("\n") == 1
    assert ("'lr': 9.0" in printed.split("given:")[1]) == ("--lr 9" in argv)


def settings(*argv):
    """The arguments that a script ends up with, from what it prints and writes."""
    argv = [*argv, *"--epochs 1 --batch-size 16 --knn-every 0 --device cpu --out run".split()]
    succeed(*argv)
    return json.loads(Path("run/config.json").read_text())["config"]


def test_self_supervised_settings_hold_on_every_dataset(folder):
    """Labels, or their absence, decide on the views and the optimiser, not the dataset."""
    Path("data").mkdir()
    for name in "cifar10", "fashion_mnist", "cifar100":
        store(toy(16), f"data/{name}.pt")
        found = settings("supcon_tcl --loss tcl --self-supervised", "--dataset", name)
        kept = ("optimizer", "lr", "k1", "k2", "augment", "views", "temperature", "hidden_dim")
        assert [found[key] for key in kept] == ["adam", 1e-3, 1, 1.5, "simaugment", 3, 0.2, 2048]
        shutil.rmtree("run")


def test_supervised_training_leaves_unlabeled_images_out(folder):
    data = toy(16)
    data["unlabeled"] = {"images": random_split(32, seed=7)["images"]}
    store(data, "toy.pt")
    succeed("supcon_tcl", "--dataset", "toy.pt", *TINY, "--out", "run")
    assert read_log(folder / "run")[-1]["step"] == 1  # 16 images; with the others it would be 3
    succeed("simclr", "--dataset", "toy.pt", *TINY, "--out", "other")
    assert read_log(folder / "other")[-1]["step"] == 3
    line = fail("supcon_tcl", "--dataset", "toy.pt", *TINY, "--batch-size", "32")
    assert "32" in line and "16 labelled" in line


@pytest.mark.parametrize("kind", ["rc", "lbe", "ip", "mib"])
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_a_term_on_the_representation(method, kind, folder, monkeypatch):
    """Trained, interrupted, resumed as if nothing had happened, and evaluated from either file."""
    data, whole = store(toy(), "toy.pt"), Path("whole")
    argv = ["--dataset", data, *TINY, "--epochs", "3", "--lr", "1e-3", "--increase-mi", kind]
    succeed(method, *argv, "--out", whole)
    assert f"loss_{kind}" in read_log(whole)[-1]
    weight = json.loads((whole / "config.json").read_text())["config"]["mi_weight"]
    assert weight == (1 if kind in ("rc", "lbe") else 5e-4)
    run = SimpleNamespace(script=method, argv=argv, out=whole)
    interrupt_and_resume(run, monkeypatch, common, "collapse_figures", 3)
    figures = []
    for file in "encoder.pt", "checkpoint.pt":
        flags = ["--checkpoint", f"whole/{file}", "--dataset", "toy.pt", "--protocol", "knn"]
        printed = succeed("linear_eval", *flags, "--device", "cpu")
        figures.append(json.loads(printed.splitlines()[-1])["knn_top1"])
    assert figures[0] == figures[1]


def test_a_weight_without_its_term_is_refused(folder):
    argv = ["--dataset", store(toy(16), "toy.pt"), *TINY, "--mi-weight", "0.1"]
    assert "--increase-mi" in fail("simclr", *argv)


ABLATIONS = {  # what is taken out, and how the log shows that all projections are alike
    "byol --ablate predictor": lambda entry: entry["cosine"] > 0.95,
    "byol --ablate stop-gradient": lambda entry: entry["cosine"] > 0.95,
    "vicreg --ablate variance": lambda entry: entry["loss_var"] > 0.9,
    "carl_carp --ablate kl": lambda entry: entry["kl"] > 0.95 * math.log(100),
    "carl_carp --method carp --ablate kl": lambda entry: entry["kl"] > 0.6 * math.log(64),
    "corinfomax --ablate logdet": lambda entry: entry["eig_max"] < 1e-3,
}


def test_byol_does_not_collapse(drawn, folder):
    """Against its ablations below, after as many epochs: no agreement without content."""
    succeed("byol", *SHORT.split(), "2")
    entry = read_log(folder / "run")[-1]
    assert entry["cosine"] < 0.9 and entry["feature_std"] > 0.3
    assert not any(collapsed(entry) for name, collapsed in ABLATIONS.items() if "byol" in name)


@pytest.mark.parametrize("method", ABLATIONS)
def test_without_what_prevents_it_a_method_collapses(method, drawn, folder):
    succeed(method, *SHORT.split(), "2")
    untrained, entry = load("run/checkpoint.pt")["untrained"], read_log(folder / "run")[-1]
    assert ABLATIONS[method](entry), entry
    if "carp" not in method.split():  # whose changing partitions teach the encoder all the same
        assert entry["knn_top1"] < untrained + 0.1  # far less than the whole method gains above


def test_a_collapsed_encoder_scores_at_chance_on_shapes(drawn, folder):
    weights = {
        k: torch.zeros_like(v) for k, v in common.resnet(stem="imagenet").state_dict().items()
    }
    about = {"arch": "resnet18", "stem": "imagenet", "image_size": 32}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    store(about | {"state_dict": weights}, "encoder.pt")
    argv = "--checkpoint encoder.pt --dataset shapes --device cpu --cached --epochs 1"
    figures = json.loads(succeed("linear_eval", *argv.split()).splitlines()[-1])
    assert abs(figures["knn_top1"] - 0.1) < 0.03 and abs(figures["top1"] - 0.1) < 0.03


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compile", ["off", "default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["simclr", "byol", "barlow_twins", "vicreg", "tcl", "carp"])
def test_a_step_never_waits_for_the_gpu(folder, name, compile, precision):
    """From uint8 images to the moved weights nothing is read back. (CorInfoMax is left out: the
    eigenvalues that it logs wait. So is AutoAugment. fp16 may read back whether it overflowed.)"""
    from benchmark import Step, build

    store(toy(64, 32), "toy.pt")
    argv = ["--dataset", "toy.pt", "--device", "cuda", "--batch-size", "32"]
    argv += ["--precision", precision]
    model, data, recipes, args = build(name, [*argv, "--compile", compile])
    recipes = common.symmetric() if name == "tcl" else recipes
    step, images = Step(model, args), data.train.images[:32]
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, "cuda")
    augment.apply = common.compiled(augment.apply, args)
    before = [p.detach().clone() for p in step.model.parameters() if p.requires_grad]
    for number in range(6):  # compilation, and the recording of CUDA graphs, may wait
        strict = number > 3 and precision == "bf16"
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            common.begin_step(args)
            step(augment(images, common.generator(0, "augment", number, "cuda")))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after)
    assert any((p != q).any() for p, q in zip(after, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["default", "reduce-overhead"])
def test_compiled_training_learns_like_eager_training(folder, compile):
    """Three epochs of noise: the same losses but for rounding, in fp32."""
    store(toy(64, 32), "toy.pt")
    losses = {}
    for mode in "off", compile:
        argv = ["--dataset", "toy.pt", *TINY, "--device", "cuda", "--epochs", "3"]
        succeed("byol", *argv, "--lr", "1e-4", "--compile", mode, "--out", mode)
        losses[mode] = [entry["loss"] for entry in read_log(Path(mode))]
    assert losses[compile] == pytest.approx(losses["off"], rel=1e-2)
