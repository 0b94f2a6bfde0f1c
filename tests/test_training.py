"""The training scripts, each run whole on a few small images: what a run writes and prints, that a
stopped run goes on bit for bit, that nothing is random but for the seed, and that what cannot work
ends in one line and leaves nothing behind."""

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
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

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
NARROW = "--hidden-dim 16 --dim 8".split()


class SmallEncoder(nn.Sequential):
    """Stands in for a ResNet where a test is about the run: a hundred times as fast."""

    num_features = 16

    def __init__(self, arch="resnet18", stem="small"):
        layers = {"conv1": nn.Conv2d(3, 8, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(8)}
        layers |= {"relu": nn.ReLU(), "layer2": nn.Conv2d(8, 16, 3, 2, 1)}
        layers |= {"layer3": nn.BatchNorm2d(16), "pool": nn.AdaptiveAvgPool2d(1)}
        super().__init__(OrderedDict(layers | {"flatten": nn.Flatten()}))


def call(script, *argv):
    """Run a script, perhaps with flags, or a main, here: (exit status, stdout, stderr)."""
    out, err, given, main = io.StringIO(), io.StringIO(), [], script
    if isinstance(script, str):
        script, *given = script.split()
        main = importlib.import_module(script).main
    else:
        script = "new_method"
    words = [f"{script}.py", *map(str, argv), *given]
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
    """Run a script that should refuse what it gets, and return the line that says why."""
    status, _, err = call(script, *argv)
    assert status == 2 and err.endswith("\n") and err.count("\n") == 1, (status, err)
    assert ".py: error: " in err and "Traceback" not in err
    return err


def built(script, *argv):
    """(method, model, data, recipes, args): what a script hands to common.train."""
    (script, *given), handed = script.split(), []
    with (
        mock.patch.object(common, "train", lambda *values: handed.extend(values)),
        mock.patch.object(sys, "argv", [f"{script}.py", *map(str, argv), *given]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        importlib.import_module(script).main()
    return handed


def random_split(n, size=16, classes=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)
    return {"images": images, "labels": torch.arange(n) % classes}


def toy(n=68, size=16):
    """A packed dataset of noise: four classes, n training and 32 test images."""
    test = random_split(32, size, seed=1)
    return {"train": random_split(n, size), "test": test, "classes": ["a", "b", "c", "d"]}


def store(value, path):
    torch.save(value, path)
    return path


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def without_speed(log):
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in log]


def equal(a, b):
    """Whether nested dicts and lists hold the same values, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def finite(value):
    """Whether all numbers in a file of torch.save are finite."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def assert_same_run(out, whole):
    """Everything that two runs saved is equal, but for their speed and what came before it."""
    ours, theirs = load(Path(out, "checkpoint.pt")), load(Path(whole, "checkpoint.pt"))
    for key in "model", "optimizer", "scaler", "epoch", "step", "sums", "untrained":
        assert equal(ours[key], theirs[key]), key
    assert without_speed(ours["log"]) == without_speed(theirs["log"])
    assert without_speed(read_log(out)) == without_speed(read_log(whole))
    ours, theirs = load(Path(out, "encoder.pt")), load(Path(whole, "encoder.pt"))
    assert equal(ours["state_dict"], theirs["state_dict"]) and ours["epoch"] == theirs["epoch"]
    files = [{path.name for path in Path(folder).iterdir()} for folder in (out, whole)]
    assert files[0] ^ files[1] <= {"checkpoint.previous.pt"}


def listing(folder):
    """Every file and folder below, with size and time of the files."""
    paths = {path: path.stat() for path in sorted(Path(folder).rglob("*"))}
    return {p: (s.st_size, s.st_mtime_ns) if p.is_file() else None for p, s in paths.items()}


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


class Payload:
    """A pickle that makes a file when it is loaded, as one could delete the user's."""

    def __reduce__(self):
        return Path.touch, (Path("payload_ran"),)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def signals():
    """A script that a signal has stopped leaves its handlers, for the process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with toy.pt, removed afterwards: checkpoints are large."""
    monkeypatch.chdir(tmp_path)
    store(toy(), "toy.pt")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def small(folder, monkeypatch):
    """The same, and scripts that get SmallEncoder where they ask for a ResNet."""
    monkeypatch.setattr(common, "resnet", SmallEncoder)
    return folder


THREE_EPOCHS = ["--dataset", "toy.pt", *TINY, *NARROW, "--epochs", "3", "--knn-every", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: the folder of a run of three epochs of four steps that was not interrupted, by a
    script with flags and SmallEncoder. One run for all tests that ask for it."""
    base = tmp_path_factory.mktemp("whole")

    @functools.cache
    def make(script):
        before, where = os.getcwd(), base / script
        where.mkdir()
        os.chdir(where)
        store(toy(), "toy.pt")
        with mock.patch.object(common, "resnet", SmallEncoder):
            succeed(script, *THREE_EPOCHS, "--out", "run")
        os.chdir(before)
        return where / "run"

    yield make
    shutil.rmtree(base)


# --------------------------------------------------------------------------------------------------
# What a run writes and prints: two steps of each script, with a ResNet


@pytest.fixture(scope="module", params=METHODS, ids=METHODS.values())
def finished(request, tmp_path_factory):
    """A run of two steps and one epoch; its folder has a long name, which the console shortens."""
    base = tmp_path_factory.mktemp("finished")
    data, out = store(toy(34, 32), base / "toy.pt"), base / ("a_long_name_" * 8) / "run"
    argv = ["--dataset", data, *TINY, "--hidden-dim", "64", "--dim", "32", "--knn-every", "1"]
    stdout = succeed(request.param, *argv, "--out", out)
    name = METHODS[request.param]
    yield SimpleNamespace(script=request.param, name=name, argv=argv, out=out, stdout=stdout)
    shutil.rmtree(base)


first_method = pytest.mark.parametrize("finished", ["simclr"], indirect=True)


def test_files(finished):
    written = {"checkpoint.pt", "encoder.pt", "log.jsonl", "views.png", "config.json"}
    assert {path.name for path in finished.out.iterdir()} == written
    with Image.open(finished.out / "views.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * 32 and picture.height > 2 * 32
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 100
    config = json.loads((finished.out / "config.json").read_text())
    assert config["config"]["epochs"] == 1 and config["torch"] == torch.__version__
    script, *given = finished.script.split()
    words = [f"{script}.py", *map(str, finished.argv), "--out", str(finished.out), *given]
    assert config["command"] == shlex.join(["python", *words])


def test_log(finished):
    (entry,) = read_log(finished.out)
    assert (entry["epoch"], entry["step"]) == (1, 2)  # 34 images: the short third batch is left out
    assert entry.keys() >= {"loss", "lr", "images_per_second", "knn_top1"}
    collapse = {"feature_std", "effective_rank"}, {"h_std", "h_rank"}
    assert any(entry.keys() >= figures for figures in collapse)
    assert all(isinstance(v, int | float) and math.isfinite(v) for v in entry.values()), entry
    assert 0 <= entry["knn_top1"] <= 1
    if "supcon_tcl" in finished.script:
        supervised = finished.name in ("supcon", "tcl", "cross_entropy")
        assert entry["labels_used"] == supervised
        said = f"labels of the training images: {'USED' if supervised else 'not used'}"
        assert said in finished.stdout.splitlines()
    else:
        assert "labels_used" not in entry


def test_encoder_file(finished):
    saved = load(finished.out / "encoder.pt")
    known = {"arch": "resnet18", "stem": "imagenet", "image_size": 32, "dataset": "toy", "epoch": 1}
    known["method"] = finished.name
    assert {key: saved[key] for key in known} == known
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["config"]["epochs"] == 1

    about = {key: value for key, value in saved.items() if key != "state_dict"}
    assert json.loads(json.dumps(about)) == about  # plain values: no tuple, no Path
    assert {type(value) for value in saved["state_dict"].values()} == {torch.Tensor}
    network = torchvision.models.resnet18()
    del network.fc
    network.load_state_dict(saved["state_dict"])  # strict: every key and no other
    model = load(finished.out / "checkpoint.pt")["model"]
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    assert equal(saved["state_dict"], backbone)


def test_what_is_printed(finished):
    """A screen that can be read: a dozen lines, then one for each epoch, then what to do next."""
    lines = finished.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("epoch 1/1"))
    assert 0 < first <= 12 and max(map(len, lines[:first])) <= 120
    python, script, *argv = shlex.split(lines[-1])
    assert (python, script) == ("python", "linear_eval.py")
    flags = dict(zip(argv[::2], argv[1::2], strict=False))
    assert flags["--checkpoint"] == str(finished.out / "encoder.pt")
    assert flags["--dataset"] == str(finished.argv[1])


@first_method
def test_the_printed_evaluation_runs(finished):
    _, script, *argv = shlex.split(finished.stdout.splitlines()[-1])
    printed = succeed(script.removesuffix(".py"), *argv, *CPU, "--epochs", "1")
    figures = json.loads(printed.splitlines()[-1])
    assert 0 <= figures["top1"] <= 1 and 0 <= figures["knn_top1"] <= 1


def test_from_the_shell(folder):
    """As a user starts it, from another folder and without --out."""
    argv = [sys.executable, ROOT / "simclr.py", "--dataset", "toy.pt", *TINY, *NARROW]
    run = subprocess.run(argv, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    written = {"checkpoint.pt", "encoder.pt", "log.jsonl", "views.png", "config.json"}
    out = Path("runs/simclr_toy_resnet18")
    assert {path.name for path in out.iterdir()} == written


def test_encoders_are_kept_for_save_every(small, whole):
    argv = [*THREE_EPOCHS, "--out", "run", "--save-every", "2"]
    with arriving(at=9):  # stopped in the third epoch: that is no reason to keep one
        assert call("simclr", *argv)[0] == 128 + signal.SIGTERM
    assert [path.name for path in Path("run").glob("encoder_*")] == ["encoder_00002.pt"]
    assert load("run/encoder_00002.pt")["step"] == 8 and load("run/encoder.pt")["step"] == 9
    succeed("simclr", *argv, "--epochs", "3", "--resume", "--save-every", "1")
    kept = sorted(path.name for path in Path("run").glob("encoder_*"))
    assert kept == ["encoder_00002.pt", "encoder_00003.pt"]
    assert [load(Path("run", name))["epoch"] for name in kept] == [2, 3]
    last = load("run/encoder_00003.pt")["state_dict"]
    assert equal(last, load(whole("simclr") / "encoder.pt")["state_dict"])
    assert not equal(last, load("run/encoder_00002.pt")["state_dict"])


def test_progress_of_an_epoch(small):
    """Where a minute passes between two steps, a line for each; on a quick machine, none."""
    printed = succeed("simclr", *THREE_EPOCHS, "--out", "quick").splitlines()
    assert len([line for line in printed if line.startswith("epoch ")]) == 3
    with slow_clock():
        printed = succeed("simclr", *THREE_EPOCHS, "--out", "slow").splitlines()
    lines = [line for line in printed if line.startswith("epoch 2/3  step ")]
    assert [line.split()[3] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("img/s" in line and "min left" in line for line in lines)
    loss = float(lines[-1].split("loss ")[1].split(",")[0])  # the mean over the epoch so far
    assert read_log("slow")[1]["loss"] == pytest.approx(loss, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# What a method gets, and what is done with what it gives


class Minimal(nn.Module):
    """No more than the contract in common.train's docstring asks for."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.seen = backbone, []

    def forward(self, views, y):
        spread = sum(self.backbone(x).square().mean() for x in views)
        step = float(len(self.seen))
        self.seen.append((views, y, self.backbone.conv1.weight.detach().clone()))
        return spread, {"float": step, "tensor": torch.tensor(2.0 * step)}


class WithAfterStep(Minimal):
    def after_step(self, progress):
        self.progress = [*getattr(self, "progress", []), progress]
        self.moved = not torch.equal(self.backbone.conv1.weight, self.seen[-1][2])


def script_of(make, made=None):
    """A main, as a method file has it."""

    def main():
        preset = {"optimizer": "sgd", "lr": 0.1, "batch_size": 16, "weight_decay": 0.0}
        args = common.parse_args(common.base_parser("A method."), {"default": preset})
        data = common.prepare(args, "minimal")
        model = make(common.resnet(args.arch, args.stem))
        if made is not None:
            made.append(model)
        common.train("minimal", model, data, common.symmetric(args.views), args)

    return main


SHORT = ["--dataset", "toy.pt", *TINY, "--epochs", "2", "--out", "run"]


def test_the_contract_of_a_method(small):
    """Views and labels come in; terms, floats and tensors alike, are logged as their means."""
    data, made = toy(32), []
    data["unlabeled"] = {"images": random_split(32, seed=7)["images"]}
    store(data, "toy.pt")
    succeed(script_of(WithAfterStep, made), *SHORT, "--views", "3")
    (model,) = made
    assert len(model.seen) == 8 and model.moved
    for views, labels, _ in model.seen:
        assert [x.shape for x in views] == [(16, 3, 16, 16)] * 3
        assert labels.dtype == torch.int64 and labels.shape == (16,)
    labels = torch.cat([labels for _, labels, _ in model.seen[:4]])
    assert sorted(labels.tolist()) == [-1] * 32 + sorted(list(range(4)) * 8)  # each image once
    assert model.progress == [step / 8 for step in range(1, 9)]
    log = read_log("run")
    assert [entry["float"] for entry in log] == [1.5, 5.5]
    assert [entry["tensor"] for entry in log] == [3.0, 11.0]
    warmup, scaled = 0.2 * 4, 0.1 * 16 / 256  # a tenth of the epochs; lr is for 256 images
    last = [common.learning_rate(step, 8, warmup, scaled) for step in (3, 7)]
    assert [entry["lr"] for entry in log] == pytest.approx(last)
    assert "knn_top1" not in log[0]  # --knn-every 0


def test_float_terms_go_on_as_if_nothing_had_happened(small):
    """Without after_step, without tensors of its own: stopped in the middle of an epoch."""
    succeed(script_of(Minimal), *SHORT[:-1], "whole")
    with arriving(at=6):
        assert call(script_of(Minimal), *SHORT)[0] == 128 + signal.SIGTERM
    assert load("run/checkpoint.pt")["sums"]["float"] == 4 + 5
    # The method counts its calls, which is its own business: here it begins again at 0.
    succeed(script_of(Minimal), *SHORT, "--resume")
    assert read_log("run")[1]["float"] == (4 + 5 + 0 + 1) / 4
    for key in "model", "optimizer":
        assert equal(load("run/checkpoint.pt")[key], load("whole/checkpoint.pt")[key])


def test_views_together_or_apart_by_flag(small):
    message = fail(script_of(Minimal), *SHORT, "--concat-views")
    assert "--concat-views: this method" in message and not Path("run").exists()
    runs = {}
    for flag in "", "--concat-views", "--no-concat-views":
        succeed("byol", *THREE_EPOCHS, *([flag] if flag else []), "--out", "run")
        runs[flag] = load("run/encoder.pt")["state_dict"]
        shutil.rmtree("run")
    assert equal(runs[""], runs["--no-concat-views"])
    assert not equal(runs[""], runs["--concat-views"])


@every_method
def test_loss_decreases_on_one_batch(method, small):
    """The model as its script builds it, and the views that its script asks for."""
    name, model, data, recipes, args = built(method, *THREE_EPOCHS)
    assert name == METHODS[method]
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    views = augment(data.train.images[:32], common.generator(0, "views", 0))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    first_kernel = model.backbone.conv1.weight.detach().clone()
    for step in range(1, 61):
        loss, terms = model(views, data.train.labels[:32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step(step / 60)
        losses.append(loss.item())
    assert all(torch.as_tensor(value).ndim == 0 for value in terms.values())
    first = losses[10 if method == "corinfomax" else 0]  # its running covariance starts at I
    assert max(losses[-5:]) < first - 0.1 * abs(first), losses
    assert not torch.equal(model.backbone.conv1.weight, first_kernel)  # not the heads alone


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@every_method
def test_precision(method, precision, small):
    argv = [*THREE_EPOCHS, "--epochs", "1", "--lr", "1e-3", "--out", "run"]
    succeed(method, *argv, "--precision", precision)
    assert finite(load("run/encoder.pt")) and math.isfinite(read_log("run")[0]["loss"])


@every_method
def test_nothing_is_random_but_for_the_seed(method, small):
    weights, views = [], []
    for i, seed in enumerate([3, 3, 4]):
        torch.manual_seed(i)  # what was drawn before the run does not enter
        succeed(method, *THREE_EPOCHS, "--epochs", "1", "--seed", seed, "--out", f"run{i}")
        weights.append(load(f"run{i}/checkpoint.pt")["model"])
        views.append(Path(f"run{i}/views.png").read_bytes())
    assert equal(weights[0], weights[1]) and views[0] == views[1]
    assert not torch.equal(weights[0]["backbone.conv1.weight"], weights[2]["backbone.conv1.weight"])
    assert views[0] != views[2]


@pytest.mark.parametrize("sizes", [[32], [32, 40]], ids=["equal", "mixed"])
def test_image_folder(sizes, small):
    """Mixed sizes are decoded by workers, whose number changes nothing; nor does being stopped."""
    image_folder("pets", sizes)
    argv = ["--dataset", "pets", *TINY, *NARROW, "--batch-size", "2", "--image-size", "32"]
    argv += ["--knn-every", "1", "--epochs", "2"]
    succeed("simclr", *argv, "--out", "run")
    saved = load("run/encoder.pt")
    assert (saved["dataset"], saved["image_size"]) == ("pets", 32)
    with arriving(at=6):
        call("simclr", *argv, "--out", "again")
    succeed("simclr", *argv, "--workers", len(sizes), "--out", "again", "--resume")
    assert equal(saved["state_dict"], load("again/encoder.pt")["state_dict"])
    assert without_speed(read_log("run")) == without_speed(read_log("again"))


def test_supervised_training_leaves_unlabeled_images_out(small):
    data = toy(16)
    data["unlabeled"] = {"images": random_split(32, seed=7)["images"]}
    store(data, "toy.pt")
    for script, steps in ("supcon_tcl", 1), ("simclr", 3):  # of 16 images: one step
        succeed(script, *THREE_EPOCHS, "--epochs", "1", "--out", script)
        assert read_log(script)[-1]["step"] == steps
    message = fail("supcon_tcl", *THREE_EPOCHS, "--batch-size", "32")
    assert "32" in message and "16 labelled" in message


def test_cross_entropy_reports_its_own_head(small):
    """The share of test images that encoder and head classify rightly, in eval mode."""
    data = store(toy(), "toy.pt")
    printed = succeed("supcon_tcl --loss cross_entropy", *THREE_EPOCHS, "--out", "run")
    weights, encoder = load("run/checkpoint.pt")["model"], common.resnet().eval()
    encoder.load_state_dict(load("run/encoder.pt")["state_dict"])
    images, labels = load(data)["test"].values()
    loaded = common.load_dataset(str(data))
    views = common.evaluation_view(images, 16, loaded.mean, loaded.std)
    scores = encoder(views) @ weights["head.weight"].T + weights["head.bias"]
    right = (scores.argmax(1) == labels).double().mean()
    assert f"linear head, top-1 on the test images {right:.1%}" in printed.splitlines()


def test_recipe_of_s002(small):
    """S002 4: Adam at 3e-4, which stays; a folder of its own."""
    succeed("simclr --recipe s002", *THREE_EPOCHS, "--optimizer", "adam", "--lr", "3e-4")
    assert [entry["lr"] for entry in read_log("runs/simclr_s002_toy_resnet18")] == [3e-4] * 3


def test_self_supervised_settings_hold_on_every_dataset(small):
    """Labels, or their absence, decide on the views and the optimiser, not the dataset."""
    Path("data").mkdir()
    for name in "cifar10", "fashion_mnist", "cifar100":
        store(toy(), f"data/{name}.pt")
        argv = ["--dataset", name, "--batch-size", "16", *CPU]
        *_, args = built("supcon_tcl --loss tcl --self-supervised", *argv)
        found = args.optimizer, args.lr, args.k1, args.k2, args.augment, args.views
        assert found == ("adam", 1e-3, 1, 1.5, "simaugment", 3)


# --------------------------------------------------------------------------------------------------
# Stopped, and gone on with


@contextlib.contextmanager
def arriving(at, number=signal.SIGTERM):
    """A signal in the step that is the at-th of a run."""
    generator = common.generator

    def in_that_step(seed, purpose, step, *device):
        if (purpose, step) == ("augment", at - 1):
            os.kill(os.getpid(), number)
        return generator(seed, purpose, step, *device)

    with mock.patch.object(common, "generator", in_that_step):
        yield


@contextlib.contextmanager
def at_call(name, n, act):
    """`act` in the n-th call of a function of common.py, before it does anything."""
    function, calls = getattr(common, name), itertools.count(1)

    def wrapped(*given):
        if next(calls) == n:
            act()
        return function(*given)

    with mock.patch.object(common, name, wrapped):
        yield


@contextlib.contextmanager
def slow_clock():
    """More than a minute between two looks at the clock."""
    ticks = itertools.count(0, 61)
    clock = SimpleNamespace(time=lambda: next(ticks), monotonic=lambda: next(ticks))
    with mock.patch.object(common, "time", clock):
        yield


STOPS = [(method, [6]) for method in METHODS]
STOPS += [("simclr", [4]), ("byol", [8]), ("supcon_tcl", [12])]  # an epoch's last step, the run's
STOPS += [("simclr", [2, 3, 10]), ("byol", [1, 4, 5]), ("corinfomax", [5, 8])]
STOPS += [(f"{m} --increase-mi {k}", [6]) for m in ("simclr", "byol") for k in common.MI_WEIGHTS]
STOPS += [("simclr --precision fp16 --optimizer lars", [6]), ("byol --precision fp16", [6])]


@pytest.mark.parametrize("script, steps", STOPS)
def test_a_stopped_run_goes_on_bit_for_bit(script, steps, small, whole, capfd):
    """A signal ends it after its step, saved, with the line that goes on. Nothing is repeated or
    left out then, in the weights, the optimiser, the sums or the log."""
    argv, resume = [*THREE_EPOCHS, "--out", "run"], []
    for i, step in enumerate(steps):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        torch.manual_seed(5 + i)  # a new process would be in another state
        with arriving(step, number):
            status, out, _ = call(script, *argv, *resume)
        assert status == 128 + number and "stopping after the step" in capfd.readouterr().err
        name, *given = script.split()
        again = shlex.join(["python", f"{name}.py", *argv, *given, "--resume"])
        assert out.splitlines()[-1] == f"stopped; to go on: {again}"
        saved, resume = load("run/checkpoint.pt"), ["--resume"]
        assert saved["step"] == load("run/encoder.pt")["step"] == step
        assert saved["epoch"] == (step - 1) // 4  # its line is still to come
        assert "fp16" not in script or saved["scaler"] != torch.amp.GradScaler("cpu").state_dict()
    torch.manual_seed(9)
    printed = succeed(script, *argv, "--resume")
    assert f"resumed from step {step} (epoch {saved['epoch']})" in printed.splitlines()
    assert_same_run("run", whole(script))


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_signal_while_an_epoch_is_summed_up(epoch, small, whole):
    """Ends the run after that epoch; after the last epoch there is nothing left to stop."""
    argv = [*THREE_EPOCHS, "--out", "run"]
    with at_call("collapse_figures", epoch, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        status, out, _ = call("simclr", *argv)
    assert status == (128 + signal.SIGTERM if epoch == 2 else 0)
    assert load("run/checkpoint.pt")["epoch"] == len(read_log("run")) == epoch
    assert out.splitlines()[-1].startswith("stopped" if epoch == 2 else "python linear_eval.py")
    assert f"resumed from step {4 * epoch}" in succeed("simclr", *argv, "--resume")
    assert_same_run("run", whole("simclr"))


def test_a_second_ctrl_c_stops_at_once(small, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)  # to this thread: two from outside may come as one
        signal.raise_signal(signal.SIGINT)

    with at_call("learning_rate", 1, twice):  # within a second: as one, launchers repeat it
        status, _, _ = call("simclr", *THREE_EPOCHS, "--out", "once")
    assert status == 130 and load("once/checkpoint.pt")["step"] == 1
    monkeypatch.setattr(common.StopSignals, "pause", 0.0)
    with at_call("learning_rate", 1, twice):
        status, _, err = call("simclr", *THREE_EPOCHS, "--out", "run")
    assert status == 130 and "interrupted" in err and not Path("run/checkpoint.pt").exists()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("how, epoch", [("quick", 1), ("--save-every 2", 2), ("slow", 2)])
def test_what_is_saved_when(how, epoch, small, whole):
    """Ended without warning in the third epoch, a run goes on from the first, from what
    --save-every names, or from the last one that was a minute after another."""
    argv = [*THREE_EPOCHS, *(how.split() if "--" in how else []), "--out", "run"]
    clock = slow_clock if how == "slow" else contextlib.nullcontext
    with clock(), at_call("collapse_figures", 3, interrupt):
        status, _, err = call("simclr", *argv)
    assert status == 130 and "--resume" in err and err.count("\n") == 1
    assert load("run/checkpoint.pt")["epoch"] == epoch and not list(Path("run").glob("*.tmp"))
    assert len(read_log("run")) == 2
    with arriving(at=4 * epoch + 1):
        _, printed, _ = call("simclr", *argv, "--resume")
    assert f"resumed from step {4 * epoch} (epoch {epoch})" in printed.splitlines()
    assert len(read_log("run")) == epoch  # without what came after the checkpoint
    succeed("simclr", *argv, "--resume")
    for path in Path("run").glob("encoder_*"):
        path.unlink()
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("flag", [[], ["--resume"]])
def test_where_nothing_was_saved_a_run_begins(flag, small, whole):
    """No folder, or one of a run that was killed before it saved anything."""
    succeed("simclr", *THREE_EPOCHS, "--out", "run", *flag)
    assert_same_run("run", whole("simclr"))
    for path in Path("run").iterdir():
        if path.suffix == ".pt":
            path.rename(f"{path}.tmp")  # a half-written one stays behind
    printed = succeed("simclr", *THREE_EPOCHS, "--out", "run", *flag)
    assert "resumed" not in printed
    assert ("no checkpoint yet: from the beginning" in printed) == ("--resume" in flag)
    for path in Path("run").glob("*.tmp"):
        path.unlink()
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("damage", ["cut", "empty", "a byte", "gone", "no checkpoint"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, small, whole):
    argv = [*THREE_EPOCHS, "--out", "run"]
    succeed("simclr", *argv)
    path = Path("run/checkpoint.pt")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    if damage == "gone":  # killed between two renames
        path.unlink()
    elif damage == "no checkpoint":
        store({"model": 1}, path)
    else:
        path.write_bytes({"cut": content[:middle], "empty": b"", "a byte": content}[damage])
    status, out, err = call("simclr", *argv, "--resume")
    assert status == 0 and "resumed from step 4 (epoch 1)" in out
    assert err.startswith("run/checkpoint.pt") and err.count("\n") == 1
    assert "going on from run/checkpoint.previous.pt" in err
    assert_same_run("run", whole("simclr"))
    assert common.load_whole("run/checkpoint.previous.pt")["epoch"] == 1
    for name in "checkpoint.pt", "checkpoint.previous.pt":
        Path("run", name).write_bytes(b"no checkpoint")
    before = listing("run")
    assert "run/checkpoint.pt: " in fail("simclr", *argv, "--resume")
    assert listing("run") == before


def test_every_failing_write_leaves_a_whole_checkpoint(small, whole):
    """The n-th flush to disk of a run fails, for every n: what follows goes on from some
    checkpoint, or from the start. (Renames: slow/test_killed.py.)"""
    argv, flush = [*THREE_EPOCHS, "--out", "run"], os.fsync
    for n in itertools.count(1):
        calls = itertools.count(1)

        def fail_once(file, n=n, calls=calls):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return flush(file)

        with mock.patch.object(os, "fsync", fail_once):
            status, _, err = call("simclr", *argv)
        assert not list(Path("run").glob("*.tmp"))
        if status == 0:  # the run had fewer calls
            break
        assert status == 2 and "No space left on device" in err and err.count("\n") == 1
        resume = ["--resume"] if list(Path("run").glob("*.pt")) else []
        status, _, err = call("simclr", *argv, *resume)
        assert status == 0, err
        assert_same_run("run", whole("simclr"))
        shutil.rmtree("run")
    assert n > 8  # config, views, three epochs' logs, two saves of two files


# --------------------------------------------------------------------------------------------------
# What is refused: one line on stderr, exit status 2, nothing written


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of files as users have them."""
    base, before = tmp_path_factory.mktemp("inputs"), os.getcwd()
    os.chdir(base)
    good = Path(store(toy(), "toy.pt")).read_bytes()
    Path("cut.pt").write_bytes(good[: len(good) // 2])
    Path("file").touch()
    store(toy() | {"classes": Payload()}, "code.pt")
    image_folder("flat", [16], ["cat"])
    image_folder("broken", [16]).write_bytes(b"not an image")
    yield base
    os.chdir(before)
    shutil.rmtree(base)


REFUSED = [  # flags after those of a run that is all right, perhaps with a script; what is said
    ("--dataset nowhere", "dataset 'nowhere' is none of cifar10, "),
    ("--dataset nowhere.pt", "nowhere.pt: no such file"),
    ("--dataset cut.pt", "cut.pt: not a file that torch.load"),
    ("--dataset code.pt", "nothing was run"),
    ("--dataset flat", "flat: no folder train/"),
    ("--dataset broken", "3.png: not a readable image"),
    ("--dataset", "--dataset: expected one argument"),
    ("--batch-size 69", "--batch-size 69 exceeds the 68 training images"),
    ("--batch-size 1", "--batch-size: 1 is out of range"),
    ("--epochs 0", "--epochs: 0 is out of range"),
    ("--epochs many", "--epochs: invalid int value: 'many'"),
    ("--lr inf", "--lr: inf is out of range"),
    ("--crop-min 0", "--crop-min: 0 is out of range"),
    ("--warmup-epochs 1.5", "--warmup-epochs 1.5 exceeds --epochs 1"),
    ("--mi-weight 0.1", "--mi-weight needs --increase-mi"),
    ("--epoch 2", "unrecognized arguments: --epoch"),
    ("--arch resnet19", "invalid choice: 'resnet19'"),
    ("--device abacus", "--device abacus cannot be used here"),
    ("--out file/run", "file"),
    ("carl_carp --method carp --num-prototypes 10 --num-blocks 3", "10 is not a multiple of"),
    ("carl_carp --method carp --num-prototypes 9 --num-blocks 9", "of --num-blocks 9 (twice it"),
    ("supcon_tcl --loss cross_entropy --self-supervised", "cross_entropy needs labels"),
]


@pytest.mark.parametrize("typed, said", REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refused(typed, said, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    words = shlex.split(typed)
    script = "simclr" if typed.startswith("--") else words.pop(0)
    before = listing(inputs)
    message = fail(script, "--dataset", "toy.pt", *TINY, *words)
    assert message.startswith(f"{script}.py: error: ") and said in message
    assert listing(inputs) == before  # so no payload ran, either


RESUMED = [  # --out run, a run that is whole, or what is changed in its checkpoint; what is said
    ("", None, "run holds a run or other files: add --resume"),
    ("--resume --lr 0.5", None, "was made with --lr 0.1, not 0.5"),
    ("--resume --epochs 4", None, "was made with --epochs 3, not 4"),
    ("--resume --batch-size 17", None, "was made with --batch-size 16, not 17"),
    ("--resume", lambda saved: saved | {"method": "another"}, "checkpoint of another, not simclr"),
    ("--resume", lambda saved: saved | {"model": {"weight": torch.zeros(2)}}, "does not fit"),
    ("--resume", lambda saved: saved | {"images": 11}, "made with another number of images"),
    ("--resume", lambda saved: [1, 2], "does not fit"),
    ("--resume", lambda saved: {"state_dict": saved["model"]}, "does not fit"),  # an encoder.pt
    ("--resume", "notes.txt", "run/checkpoint.pt: no such file"),
    ("", "notes.txt", "run holds a run or other files"),
]


@pytest.mark.parametrize("typed, change, said", RESUMED)
def test_what_is_there_is_refused_and_kept(typed, change, said, small, whole):
    Path("run").mkdir()
    if change is None:
        shutil.copytree(whole("simclr"), "run", dirs_exist_ok=True)
    elif callable(change):
        store(change(load(whole("simclr") / "checkpoint.pt")), "run/checkpoint.pt")
    else:
        Path("run", change).write_text("of somebody")
    before = listing("run")
    assert said in fail("simclr", *THREE_EPOCHS, "--out", "run", *typed.split())
    assert listing("run") == before


def test_a_corrupt_image_found_by_a_worker(small):
    """Its traceback comes along, and is left out. In a process of its own, because torch takes
    seconds to be rid of workers that were left with an error."""
    path = image_folder("pets", [16, 20], ["train"])
    path.write_bytes(path.read_bytes()[:100])
    argv = ["--dataset", "pets", *TINY, "--image-size", "32", "--batch-size", "4", "--out", "run"]
    command = [sys.executable, ROOT / "simclr.py", *argv, "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("simclr.py: error: pets") and "3.png" in run.stderr
    assert not list(Path("run").glob("*.pt"))


@pytest.mark.parametrize("images", [52, 100])
def test_another_number_of_images_is_refused(images, small):
    """Its steps are others: the run could not go on where it was stopped, in the second epoch."""
    with arriving(at=6):
        call("simclr", *THREE_EPOCHS, "--out", "run")
    store(toy(images), "toy.pt")
    message = fail("simclr", *THREE_EPOCHS, "--out", "run", "--resume")
    assert "made with another number of images" in message


@pytest.mark.parametrize("optimizer", common.OPTIMIZERS)
def test_a_first_step_that_overflows_is_skipped(optimizer, monkeypatch):
    """As fp16's scale does at first. (torch's fused SGD then leaves its momentum unwritten, as the
    memory was: here, not a number.)"""
    knobs = {"momentum": 0.9, "weight_decay": 0.0, "precision": "fp16"}
    args = SimpleNamespace(optimizer=optimizer, scaled_lr=0.1, **knobs)
    layer, scaler = nn.Linear(4, 4), torch.amp.GradScaler("cpu")
    start, steps = layer.weight.detach().clone(), common.make_optimizer(layer, args)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    for scale in 1e36, 1e-3:
        scaler.scale(layer(torch.ones(2, 4)).sum() * scale).backward()
        scaler.step(steps)
        scaler.update()
        steps.zero_grad()
        assert torch.equal(layer.weight, start) == (scale == 1e36)
    assert finite(steps.state_dict()) and finite(layer.state_dict())


@pytest.mark.parametrize("clock, step", [(contextlib.nullcontext, 8), (slow_clock, 6)])
def test_a_loss_that_is_not_finite_ends_the_run(clock, step, small, whole, monkeypatch):
    """Poisoned in the sixth step: seen when the sums are read, at the latest at the epoch's end.
    The checkpoint of the first epoch stays, and one can go on from it."""
    import simclr

    loss_of, calls = simclr.nt_xent_loss, itertools.count(1)
    argv = [*THREE_EPOCHS, "--out", "run"]
    with monkeypatch.context() as patch, clock():
        worse = lambda *z: loss_of(*z) * (math.nan if next(calls) == 6 else 1)  # noqa: E731
        patch.setattr(simclr, "nt_xent_loss", worse)
        message = fail("simclr", *argv)
    rate = common.learning_rate(step - 1, 12, 1.2, 0.1 * 16 / 256)
    assert f"step {step}: the loss is not finite" in message and f"rate {rate:.3g}" in message
    assert "'loss': nan" in message and "'mi_bound': nan" in message
    assert load("run/checkpoint.pt")["epoch"] == 1
    for path in Path("run").glob("*.pt"):
        assert finite(load(path)), path
    assert all(map(finite, read_log("run")))
    succeed("simclr", *argv, "--resume")
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("poison", ["loss", "weights", "moments", "term"])
def test_what_is_not_finite_is_never_saved(poison, stopped, small):
    """In the second step, where a signal may ask for a checkpoint: the loss is not finite; or it
    is, but not what the step made of the weights, or of the optimiser's moments; or a term."""

    class Poisoned(Minimal):
        def forward(self, views, y):
            loss, terms = super().forward(views, y)
            if len(self.seen) == 2:
                by = {"weights": 1e38, "moments": 1e25}.get(poison, 1)
                loss = loss.detach() + by * (loss - loss.detach())
                loss = loss + math.nan if poison == "loss" else loss  # with a gradient
                terms["float"] = float("inf") if poison == "term" else 1.0
            return loss, terms

    how = ["--optimizer", "adamw" if poison == "moments" else "sgd", "--lr", "1e5"]
    how = how if poison == "weights" else [*how[:-1], "1e-3"]
    with arriving(at=2) if stopped else contextlib.nullcontext():
        status, _, err = call(script_of(Poisoned), *SHORT, *how)
    assert status == 2 and err.count("\n") == 1 and "not finite" in err, (status, err)
    assert not list(Path("run").glob("*.pt"))


# --------------------------------------------------------------------------------------------------
# The compiler, and GPUs


def test_one_graph_for_all_epochs(small, whole, monkeypatch):
    """torch.compile without its code generator: it captures graphs, and runs them as they are. One
    for the model, one for its views; none for AutoAugment, which goes image by image."""
    capture = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", capture)
    found = torch._dynamo.utils.counters
    for script, graphs in ("byol", 2), ("supcon_tcl", 1):
        torch._dynamo.reset()
        found.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            succeed(script, *THREE_EPOCHS, "--compile", "--out", script)
        assert found["stats"]["unique_graphs"] == graphs
        losses = [read_log(out)[0]["loss"] for out in (script, whole(script))]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)  # torch 2.6 rounds views differently
    torch._dynamo.reset()


def test_what_the_compiler_cannot_do_ends_in_one_line(small, monkeypatch):
    """A RuntimeError of torch's, which may quote code with "alloc" in it."""

    def refuse(graph, inputs):
        raise RuntimeError("buffer = allocate(1)")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    torch._dynamo.reset()
    message = fail("simclr", *THREE_EPOCHS, "--compile")
    assert "torch.compile failed" in message and "--no-compile" in message
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "device, steps, compiler, triton, processes, expected",
    [("cuda", 2000, "/gcc", True, 1, True), ("cuda", 1999, "/gcc", True, 1, False),
     ("cuda", 9999, None, True, 1, False), ("cuda", 9999, "/gcc", None, 1, False),
     ("cpu", 9999, "/gcc", True, 1, False), ("cuda", 9999, "/gcc", True, 2, False)],
)  # fmt: skip
def test_compile(monkeypatch, device, steps, compiler, triton, processes, expected):
    """By default where it pays; else as it is typed; never for several processes."""
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(common, "world_size", lambda: processes)
    for typed in None, False, True:
        args = SimpleNamespace(device=device, compile=typed)
        if typed and processes > 1:
            with pytest.raises(common.InputError, match="--compile is for one process"):
                common.resolve_compile(args, steps)
        else:
            common.resolve_compile(args, steps)
            assert args.compile is (expected if typed is None else typed)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["--no-compile", "--compile"])
def test_on_a_gpu(flags, folder):
    """Stopped and gone on with there; the same losses as on the CPU but for rounding, in fp32."""
    argv = ["--dataset", "toy.pt", *TINY, "--epochs", "3", "--lr", "1e-4"]
    succeed("byol", *argv, "--out", "cpu")
    argv += ["--device", "cuda", flags]
    succeed("byol", *argv, "--out", "whole")
    with arriving(at=2):
        assert call("byol", *argv, "--out", "run")[0] == 128 + signal.SIGTERM
    succeed("byol", *argv, "--out", "run", "--resume")
    losses = [[entry["loss"] for entry in read_log(out)] for out in ("cpu", "whole", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
