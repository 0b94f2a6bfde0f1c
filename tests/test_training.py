"""The training scripts, each run whole on a few small images: what a run writes and prints, that a
stopped run goes on bit for bit, that only the seed is random, and that what cannot work is refused
in one line and leaves nothing behind."""

import contextlib
import errno
import functools
import importlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from benchmark import built
from conftest import CPU, SIGNALS, SmallEncoder, call, fail, load, noise, store, succeed
from PIL import Image
from test_common import tree
from test_data import Payload, save_pets
from torch import nn
from torch.utils._pytree import tree_flatten

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
TINY = [*CPU, *"--batch-size 16 --stem imagenet --lr 0.1 --knn-every 0 --epochs 1".split()]
NARROW = "--hidden-dim 16 --dim 8".split()


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def without_speed(log):
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in log]


def equal(a, b):
    """Whether nested dicts and lists hold the same values, tensors bit for bit."""
    (ours, kind), (theirs, other) = tree_flatten(a), tree_flatten(b)
    pairs = zip(ours, theirs, strict=False)
    same = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
    return kind == other and all(same)


def finite(value):
    """Whether all numbers in a file of torch.save are finite."""
    numbers = (x for x in tree_flatten(value)[0] if isinstance(x, float | torch.Tensor))
    return all(torch.as_tensor(x).isfinite().all() for x in numbers)


def assert_same_run(out, whole):
    """Everything that two runs saved is equal, but for their speed and what came before it."""
    ours, theirs = load(Path(out, "checkpoint.pt")), load(Path(whole, "checkpoint.pt"))
    for key in "model", "optimizer", "scaler", "epoch", "step", "sums", "baselines":
        assert equal(ours[key], theirs[key]), key
    assert without_speed(ours["log"]) == without_speed(theirs["log"])
    assert without_speed(read_log(out)) == without_speed(read_log(whole))
    ours, theirs = load(Path(out, "encoder.pt")), load(Path(whole, "encoder.pt"))
    assert equal(ours["state_dict"], theirs["state_dict"]) and ours["epoch"] == theirs["epoch"]
    files = [{path.name for path in Path(folder).iterdir()} for folder in (out, whole)]
    assert files[0] ^ files[1] <= {"checkpoint.previous.pt", "encoder_00002.pt"}


THREE_EPOCHS = ["--dataset", "toy.pt", *TINY, *NARROW, "--epochs", "3", "--knn-every", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: the folder of a run of three epochs of four steps that was not interrupted, by a
    script with flags and SmallEncoder. One run for all tests that ask for it."""
    base = tmp_path_factory.mktemp("whole")

    @functools.cache
    def make(script):
        where = base / script
        where.mkdir()
        store(noise(68), where / "toy.pt")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(where)
            patch.setattr(common, "resnet", SmallEncoder)
            succeed(script, *THREE_EPOCHS, "--out", "run")
        return where / "run"

    yield make
    shutil.rmtree(base)


# --------------------------------------------------------------------------------------------------
# What a run writes and prints: two steps of each script, with a ResNet


@pytest.fixture(scope="module", params=METHODS, ids=METHODS.values())
def finished(request, tmp_path_factory):
    """A run of two steps and one epoch; its folder has a long name, which the console shortens."""
    base = tmp_path_factory.mktemp("finished")
    data, out = store(noise(34, 32), base / "toy.pt"), base / ("a_long_name_" * 8) / "run"
    argv = ["--dataset", data, *TINY, "--hidden-dim", "64", "--dim", "32", "--knn-every", "1"]
    stdout = succeed(request.param, *argv, "--out", out)
    name = METHODS[request.param]
    yield SimpleNamespace(script=request.param, name=name, argv=argv, out=out, stdout=stdout)
    shutil.rmtree(base)


def test_files(finished):
    written = {"checkpoint.pt", "encoder.pt", "log.jsonl", "views.png", "config.json", ".lock"}
    assert {path.name for path in finished.out.iterdir()} == written
    with Image.open(finished.out / "views.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * 32 and picture.height > 2 * 32
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 100
    config = json.loads((finished.out / "config.json").read_text())
    assert config["config"].keys() >= {"epochs", "seed", "scaled_lr", "stem"}
    assert config["config"]["epochs"] == 1 and config["torch"] == torch.__version__
    script, *given = finished.script.split()
    words = [f"{script}.py", *map(str, finished.argv), "--out", str(finished.out), *given]
    assert config["command"] == shlex.join(["python", *words])


def test_log(finished):
    (entry,) = read_log(finished.out)
    assert (entry["epoch"], entry["step"]) == (1, 2)  # 34 images: the short third batch is left out
    assert entry.keys() >= {"loss", "lr", "images_per_second", "knn_top1"}
    figures = {"h_std", "h_rank"} if finished.name == "cross_entropy" else {"z_std", "z_rank"}
    assert entry.keys() >= figures
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
    assert saved.items() >= (known | {"method": finished.name}).items()
    assert len(saved["mean"]) == len(saved["std"]) == 3 and saved["config"]["epochs"] == 1
    about = {key: value for key, value in saved.items() if key != "state_dict"}
    assert json.loads(json.dumps(about)) == about  # plain values: no tuple, no Path
    assert {type(value) for value in saved["state_dict"].values()} == {torch.Tensor}
    model = load(finished.out / "checkpoint.pt")["model"]
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
    assert equal(saved["state_dict"], backbone)
    assert backbone.keys() == common.resnet().state_dict().keys()  # torchvision's


def test_what_is_printed(finished):
    """A screen that can be read: a dozen lines, then one for each epoch, then what to do next."""
    lines = finished.stdout.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("epoch 1/1")]
    assert 0 < first <= 12 and max(map(len, lines[:first])) <= 120
    python, script, *argv = shlex.split(lines[-1])
    assert (python, script) == ("python", "linear_eval.py")
    found = ["--checkpoint", str(finished.out / "encoder.pt"), "--dataset", str(finished.argv[1])]
    assert argv[:4] == found
    if finished.name == "simclr":  # and it runs
        printed = succeed("linear_eval", *argv, *CPU, "--epochs", "1")
        assert 0 <= json.loads(printed.splitlines()[-1])["top1"] <= 1


# --------------------------------------------------------------------------------------------------
# What a method gets, and what is done with what it gives


class Noting(nn.Module):
    """The contract in common.train's docstring; it notes what it gets."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.seen, self.progress = backbone, [], []

    def forward(self, views, y):
        spread = sum(self.backbone(x).square().mean() for x in views)
        step = float(len(self.seen))
        self.seen.append((views, y, self.backbone.conv1.weight.detach().clone()))
        return spread, {"float": step, "tensor": torch.tensor(2.0 * step)}

    def after_step(self, progress):
        self.progress.append(progress)
        self.moved = not torch.equal(self.backbone.conv1.weight, self.seen[-1][2])


def script_of(make):
    """A main, as a method file has it."""

    def main():
        preset = {"optimizer": "sgd", "lr": 0.1, "batch_size": 16, "weight_decay": 0.0}
        args = common.parse_args(common.base_parser("A method."), {"default": preset})
        data, model = common.prepare(args, "minimal"), make(common.resnet(args.arch, args.stem))
        common.train("minimal", model, data, common.symmetric(args.views), args)

    return main


UNLABELED = {"unlabeled": {"images": noise(32)["train"]["images"]}}
SHORT = ["--dataset", "toy.pt", *TINY, "--epochs", "2", "--out", "run"]


def test_the_contract_of_a_method(small):
    """Views and labels come in; terms, floats and tensors alike, are logged as their means."""
    model = Noting(SmallEncoder())
    store(noise(32) | UNLABELED, "toy.pt")
    succeed(script_of(lambda backbone: model), *SHORT, "--views", "3")
    assert len(model.seen) == 8 and model.moved
    for views, labels, _ in model.seen:
        assert [x.shape for x in views] == [(16, 3, 16, 16)] * 3
        assert labels.dtype == torch.int64 and labels.shape == (16,)
    labels = torch.cat([labels for _, labels, _ in model.seen[:4]])
    assert sorted(labels.tolist()) == [-1] * 32 + sorted(list(range(4)) * 8)  # each image once
    assert model.progress == [step / 8 for step in range(1, 9)]
    warmup, scaled = 0.2 * 4, 0.1 * 16 / 256  # a tenth of the epochs; lr is for 256 images
    for entry, step, mean in zip(read_log("run"), (3, 7), (1.5, 5.5), strict=True):
        assert (entry["float"], entry["tensor"]) == (mean, 2 * mean) and "knn_top1" not in entry
        assert entry["lr"] == pytest.approx(common.learning_rate(step, 8, warmup, scaled))


def test_views_together_or_apart_by_flag(small):
    message = fail(script_of(Noting), *SHORT, "--concat-views")
    assert "--concat-views: this method" in message and not Path("run").exists()
    runs = []
    for flag in [], ["--no-concat-views"], ["--concat-views"]:
        succeed("byol", *THREE_EPOCHS, *flag, "--out", f"run{flag}")
        runs.append(load(f"run{flag}/encoder.pt")["state_dict"])
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


@every_method
def test_loss_decreases_on_one_batch(method, small):
    """The model as its script builds it, and the views that its script asks for."""
    _, model, data, recipes, args = built(method, *THREE_EPOCHS)
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    views = augment(data.train.images[:32], common.generator(0, "views", 0))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(1, 61):
        loss, _ = model(views, data.train.labels[:32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        getattr(model, "after_step", lambda progress: None)(step / 60)
        losses.append(loss.item())
    first = losses[10 if method == "corinfomax" else 0]  # its running covariance starts at I
    assert max(losses[-5:]) < first - 0.1 * abs(first), losses


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@every_method
def test_nothing_is_random_but_for_the_seed(method, precision, small):
    argv = [*THREE_EPOCHS, "--epochs", "1", "--lr", "1e-3", "--precision", precision]
    weights, views = [], []
    for i, seed in enumerate([3, 3, 4]):
        torch.manual_seed(i)  # what was drawn before the run does not enter
        succeed(method, *argv, "--seed", seed, "--out", f"run{i}")
        weights.append(load(f"run{i}/checkpoint.pt")["model"])
        views.append(Path(f"run{i}/views.png").read_bytes())
    assert finite(weights) and math.isfinite(read_log("run0")[0]["loss"])
    assert equal(weights[0], weights[1]) and views[0] == views[1] != views[2]
    assert not torch.equal(weights[0]["backbone.conv1.weight"], weights[2]["backbone.conv1.weight"])


def test_images_of_several_sizes(small):
    """They are decoded by workers, whose number changes nothing; nor does being stopped."""
    save_pets("pets", [(32, 32), (40, 40)] * 2)
    argv = ["--dataset", "pets", *TINY, *NARROW, "--batch-size", "2", "--image-size", "32"]
    argv += ["--knn-every", "1", "--epochs", "2"]
    succeed("simclr", *argv, "--out", "run")
    saved = load("run/encoder.pt")
    assert (saved["dataset"], saved["image_size"]) == ("pets", 32)
    with arriving(at=6):
        call("simclr", *argv, "--out", "again")
    succeed("simclr", *argv, "--workers", "2", "--out", "again", "--resume")
    assert equal(saved["state_dict"], load("again/encoder.pt")["state_dict"])
    assert without_speed(read_log("run")) == without_speed(read_log("again"))


def test_tiny_images_of_one_class(small):
    """They are enlarged to 8 pixels, and no evaluation is proposed, as there is nothing to tell."""
    packed = noise(size=6) | {"classes": ["a"]}
    packed["train"]["labels"].zero_()
    store(packed | {"test": None}, "toy.pt")
    printed = succeed("simclr", *SHORT)
    assert printed.splitlines()[-1] == "python linear_eval.py --curves run"
    assert load("run/encoder.pt")["image_size"] == 8


def test_supervised_training_leaves_unlabeled_images_out(small):
    store(noise(16) | UNLABELED, "toy.pt")
    for script, steps in ("supcon_tcl", 1), ("simclr", 3):  # of 16 images: one step
        succeed(script, *THREE_EPOCHS, "--epochs", "1", "--out", script)
        assert read_log(script)[-1]["step"] == steps
    message = fail("supcon_tcl", *THREE_EPOCHS, "--batch-size", "32")
    assert "32" in message and "16 labelled" in message


def test_cross_entropy_reports_its_own_head(small):
    """The share of test images that encoder and head classify rightly, in eval mode."""
    printed = succeed("supcon_tcl --loss cross_entropy", *THREE_EPOCHS, "--out", "run")
    weights, encoder = load("run/checkpoint.pt")["model"], common.resnet().eval()
    encoder.load_state_dict(load("run/encoder.pt")["state_dict"])
    images, labels = load("toy.pt")["test"].values()
    loaded = common.load_dataset("toy.pt")
    views = common.evaluation_view(images, 16, loaded.mean, loaded.std)
    scores = encoder(views) @ weights["head.weight"].T + weights["head.bias"]
    right = (scores.argmax(1) == labels).double().mean()
    assert f"linear head, top-1 on the test images {right:.1%}" in printed.splitlines()


def test_recipe_of_s002(small):
    """S002 4: Adam at 3e-4, which stays; a folder of its own."""
    succeed("simclr --recipe s002", *THREE_EPOCHS, "--optimizer", "adam", "--lr", "3e-4")
    assert [entry["lr"] for entry in read_log("runs/simclr_s002_toy_resnet18")] == [3e-4] * 3


# --------------------------------------------------------------------------------------------------
# Stopped, and gone on with


def arriving(at, number=signal.SIGTERM):
    """A signal in the step that is the at-th of a run."""
    generator = common.generator

    def in_that_step(seed, purpose, step, *device):
        if (purpose, step) == ("augment", at - 1):
            os.kill(os.getpid(), number)
        return generator(seed, purpose, step, *device)

    return mock.patch.object(common, "generator", in_that_step)


def at_call(name, n, act):
    """`act` in the n-th call of a function of common.py, before it does anything."""
    function, calls = getattr(common, name), itertools.count(1)

    def wrapped(*given):
        if next(calls) == n:
            act()
        return function(*given)

    return mock.patch.object(common, name, wrapped)


def slow_clock():
    """More than a minute between two looks at the clock."""
    tick = itertools.count(0, 61).__next__
    return mock.patch.object(common, "time", SimpleNamespace(time=tick, monotonic=tick))


STOPS = [(method, [6]) for method in METHODS]
STOPS += [("simclr", [4]), ("byol", [8]), ("supcon_tcl", [12])]  # an epoch's last step, the run's
STOPS += [("simclr", [2, 3, 7, 10]), ("byol", [1, 4, 5]), ("corinfomax", [5, 8])]
STOPS += [(f"{m} --increase-mi {k}", [6]) for m in ("simclr", "byol") for k in common.MI_WEIGHTS]
STOPS += [("simclr --precision fp16 --optimizer lars", [6]), ("byol --precision fp16", [6])]


@pytest.mark.parametrize("script, steps", STOPS)
def test_a_stopped_run_goes_on_bit_for_bit(script, steps, small, whole, capfd):
    """A signal ends it after its step, saved, with the line that goes on. Nothing is repeated or
    left out then, in the weights, the optimiser, the sums or the log."""
    argv, resume = [*THREE_EPOCHS, "--out", "run"], []
    for i, step in enumerate(steps):
        number = SIGNALS[i]
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


def test_the_folder_is_enough_to_go_on(small, whole):
    with arriving(at=6):
        call("simclr", *THREE_EPOCHS, "--out", "first")
    Path("first").rename("run")
    Path("toy.pt").rename("moved.pt")
    argv = ["--resume", "--dataset", "moved.pt", "--device", "cpu"]
    assert "resumed from step 6 (epoch 1)" in succeed("simclr", *argv, "--out", "run")
    assert_same_run("run", whole("simclr"))
    assert "a run to begin needs --dataset" in fail("simclr", "--resume", "--out", "first")


@pytest.mark.parametrize("given, small_maps", [([], True), (["--precision", "fp32"], False)])
def test_fp32_that_is_asked_for_is_torchs_own(given, small_maps, small, monkeypatch):
    """A run that goes on computes as it began, with what was found for it written out."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    argv = "--dataset toy.pt --device cpu --batch-size 16 --epochs 1 --out run".split()
    with arriving(at=2):
        call("simclr", *argv, *given)
    for more in [], ["--precision", "fp32"]:
        *_, args = built("simclr", "--resume", "--out", "run", *more)
        assert (args.precision, args.small_maps) == ("fp32", small_maps)
    assert "resumed from step 2" in succeed("simclr", *argv, "--precision", "fp32", "--resume")


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_being_saved(small):
    """Six lines go well: of five steps, as the clock is slow, and of the first epoch."""
    lines = mock.Mock(side_effect=[None] * 6 + [OSError(errno.EIO, "gone")])
    with arriving(at=6, number=signal.SIGHUP), slow_clock():
        with mock.patch.object(common.Progress, "show", lines):
            assert call("simclr", *THREE_EPOCHS, "--out", "run")[0] == 128 + signal.SIGHUP
    assert load("run/checkpoint.pt")["step"] == lines.call_count == 6


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_signal_while_an_epoch_is_summed_up(epoch, small, whole):
    """Ends the run after that epoch; after the last epoch there is nothing left to stop."""
    argv = [*THREE_EPOCHS, "--out", "run"]
    with at_call("projections", epoch, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        status, out, _ = call("simclr", *argv)
    assert status == (128 + signal.SIGTERM if epoch == 2 else 0)
    assert load("run/checkpoint.pt")["epoch"] == len(read_log("run")) == epoch
    assert out.splitlines()[-1].startswith("stopped" if epoch == 2 else "python linear_eval.py")
    assert f"resumed from step {4 * epoch}" in succeed("simclr", *argv, "--resume")
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("how, epoch", [("", 1), ("--save-every 2", 2), ("slow", 2)])
def test_what_is_saved_when(how, epoch, small, whole):
    """Ended without warning in the third epoch, a run goes on from the first, from what
    --save-every names, or from the last one that was a minute after another."""
    argv = [*THREE_EPOCHS, "--out", "run", *(how.split() if "--" in how else [])]
    clock = slow_clock() if how == "slow" else contextlib.nullcontext()
    with clock, at_call("projections", 3, mock.Mock(side_effect=KeyboardInterrupt)):
        status, out, err = call("simclr", *argv)
    assert (status, err) == (130, "interrupted\n")
    assert load("run/checkpoint.pt")["epoch"] == epoch and len(read_log("run")) == 2
    if how == "slow":  # a line for each step of an epoch, with the mean loss so far
        lines = [line for line in out.splitlines() if line.startswith("epoch 2/3  step ")]
        assert [line.split()[3] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
        assert all("img/s" in line and "min left" in line for line in lines)
        loss = float(lines[-1].split("loss ")[1].split(",")[0])
        assert read_log("run")[1]["loss"] == pytest.approx(loss, abs=1e-4)
    with arriving(at=4 * epoch + 1):  # in the middle of an epoch: no reason to keep an encoder
        _, printed, _ = call("simclr", *argv, "--resume")
    assert f"resumed from step {4 * epoch} (epoch {epoch})" in printed.splitlines()
    assert len(read_log("run")) == epoch  # without what came after the checkpoint
    kept = {path.name: load(path)["step"] for path in Path("run").glob("encoder_*")}
    assert kept == ({"encoder_00002.pt": 8} if "--" in how else {})
    succeed("simclr", *argv, "--resume")
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("damage", ["cut", "empty", "a byte", "gone", "no checkpoint"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, small, whole):
    shutil.copytree(whole("simclr"), "run")
    argv = [*THREE_EPOCHS, "--out", "run", "--resume"]
    path, previous = Path("run/checkpoint.pt"), Path("run/checkpoint.previous.pt")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    if damage == "gone":  # killed between two renames
        path.unlink()
    elif damage == "no checkpoint":
        store({"model": 1}, path)
    else:
        path.write_bytes({"cut": content[:middle], "empty": b"", "a byte": content}[damage])
    status, out, err = call("simclr", *argv)
    assert status == 0 and "resumed from step 4 (epoch 1)" in out
    assert err.startswith("run/checkpoint.pt") and err.count("\n") == 1
    assert "going on from run/checkpoint.previous.pt" in err
    assert_same_run("run", whole("simclr"))
    assert common.load_whole(previous)["epoch"] == 1
    for file in path, previous:
        file.write_bytes(b"no checkpoint")
    before = tree("run")
    assert "run/checkpoint.pt: " in fail("simclr", *argv) and tree("run") == before


def test_every_failing_write_leaves_a_whole_checkpoint(small, whole):
    """The n-th flush to disk of a run fails, for every n: what follows goes on from some
    checkpoint, or from the start."""
    argv = [*THREE_EPOCHS, "--out", "run"]
    full = OSError(errno.ENOSPC, "No space left on device")
    for n in itertools.count(1):
        with mock.patch.object(os, "fsync", mock.Mock(side_effect=[None] * (n - 1) + [full])):
            status, _, err = call("simclr", *argv)
        assert not list(Path("run").glob("*.tmp"))
        if status == 0:  # the run had fewer calls
            break
        assert status == 2 and "No space left on device" in err and err.count("\n") == 1
        saved = bool(list(Path("run").glob("*.pt")))
        printed = succeed("simclr", *argv, *["--resume"] * (saved or n % 2))
        assert ("no checkpoint yet: from the beginning" in printed) == (not saved and n % 2)
        assert_same_run("run", whole("simclr"))
        shutil.rmtree("run")
    assert n > 8  # config, views, three epochs' logs, two saves of two files


@pytest.mark.slow
@pytest.mark.parametrize("script", ["simclr", "byol", "corinfomax"])
def test_killed_at_every_rename(script, small):
    """With the target network, or the running covariance, that a method carries along. SIGKILL
    leaves no time to clean up: it leaves the folder as it is then, with temporary files, and a
    rename that has happened or has not. A run that is resumed ends as one that was left alone."""
    argv = ["--dataset", "toy.pt", *TINY, *NARROW, "--save-every", "1", "--epochs", "2", "--out"]
    killed, replace = [], os.replace

    def noted(*names):
        killed.append(shutil.copytree("whole", f"killed{len(killed)}"))
        return replace(*names)

    with mock.patch.object(os, "replace", noted):
        succeed(script, *argv, "whole")
    # config, views; after each epoch checkpoint, encoder, milestone, log; once the one before
    assert len(killed) == 2 + 2 * 4 + 1
    left = {path.name for path in Path().glob("killed*/*.tmp")}
    names = "config.json", "views.png", "checkpoint.pt", "encoder.pt", "log.jsonl"
    assert left >= {f"{name}.tmp" for name in names}
    for out in killed:
        assert call(script, *argv, out, "--resume")[0] == 0
        assert_same_run(out, "whole")


# --------------------------------------------------------------------------------------------------
# What is refused: one line on stderr, exit status 2, nothing written or lost


REFUSED = [  # flags after those of a run that is all right, perhaps with a script; what is said
    ("--dataset code.pt", "nothing was run"),
    ("--batch-size 69", "--batch-size 69 exceeds the 68 training images"),
    ("--batch-size 1", "--batch-size: 1 is out of range"),
    ("--epochs many", "--epochs: invalid int value: 'many'"),
    ("--lr nan", "--lr: nan is out of range, expected a number of at least 1e-09"),
    ("--momentum 1.1", "--momentum: 1.1 is out of range, expected a number from 0 to 1"),
    ("--warmup-epochs 4", "--warmup-epochs 4 exceeds --epochs 3"),
    ("--mi-weight 0.1", "--mi-weight is for --increase-mi alone"),
    ("--optimizer adam --momentum 0.5", "--momentum is for --optimizer sgd or lars alone"),
    ("carl_carp --num-prototypes 1", "--num-prototypes 1 teaches nothing"),
    ("carl_carp --num-blocks 2", "--num-blocks is for --method carp alone"),
    ("supcon_tcl --k2 2", "--k2 is for --loss tcl alone"),
    ("supcon_tcl --loss cross_entropy --temperature 1", "is for --loss supcon or tcl alone"),
    ("supcon_tcl --crop-min 0.5", "--crop-min is for --augment simaugment alone"),
    ("--epoch 2", "unrecognized arguments: --epoch"),  # which could come to mean another flag
    ("--arch resnet19", "invalid choice: 'resnet19'"),
    ("--device abacus", "--device abacus cannot be used here"),
    ("--out file/run", "file"),
    ("carl_carp --method carp --num-prototypes 10 --num-blocks 3", "10 is not a multiple of"),
    ("carl_carp --method carp --num-prototypes 9 --num-blocks 9", "of --num-blocks 9 (twice it"),
    ("supcon_tcl --loss cross_entropy --self-supervised", "cross_entropy needs labels"),
    ("--out run", "run holds a run or other files: add --resume"),
    ("--out run --resume --lr 0.5", "was made with --lr 0.1, not 0.5"),
    ("--out run --resume --epochs 4", "was made with --epochs 3, not 4"),
    ("byol --out begun --resume", "config.json is not of byol.py, but of: python simclr.py"),
    ("--out method --resume", "was made with method byol, not simclr"),
    ("--out fewer --resume", "was made with images 11, not 68"),
    ("--out other --resume", "was made with content 0, not "),
    ("--out weights --resume", "does not fit"),
    ("--out list --resume", "does not fit"),
    ("--out counted --resume", "does not fit"),
    ("--out foreign --resume", "foreign/checkpoint.pt: no such file"),
    ("--out foreign", "foreign holds a run or other files"),
]
STRANGE = {  # folders with another checkpoint
    "method": lambda saved: saved | {"identity": saved["identity"] | {"method": "byol"}},
    "fewer": lambda saved: saved | {"identity": saved["identity"] | {"images": 11}},
    "other": lambda saved: saved | {"identity": saved["identity"] | {"content": 0}},
    "counted": lambda saved: saved | {"step": {"a": 1}},
    "weights": lambda saved: saved | {"model": {"weight": torch.zeros(2)}},
    "list": lambda saved: [1, 2],
}


@pytest.mark.parametrize("typed, said", REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refused(typed, said, small, whole):
    Path("file").touch()
    store(noise(68) | {"classes": Payload()}, "code.pt")
    shutil.copytree(whole("simclr"), "run")
    for name in "foreign", "begun", *STRANGE:
        Path(name).mkdir()
    Path("foreign/notes.txt").write_text("of somebody")
    shutil.copy("run/config.json", "begun")  # killed before anything was saved
    for name, change in STRANGE.items():
        store(change(load("run/checkpoint.pt")), f"{name}/checkpoint.pt")
    words, before = shlex.split(typed), tree(small)
    script = "simclr" if typed.startswith("--") else words.pop(0)
    message = fail(script, *THREE_EPOCHS, *words)
    assert message.startswith(f"{script}.py: error: ") and said in message
    assert tree(small) == before  # so no payload ran, either


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
def test_a_loss_that_is_not_finite_ends_the_run(clock, step, small, whole):
    """Poisoned in the sixth step: seen when the sums are read, at the latest at the epoch's end.
    One can go on from the checkpoint of the first epoch."""
    import simclr

    loss_of, argv = simclr.nt_xent_loss, [*THREE_EPOCHS, "--out", "run"]
    factors = iter([1] * 5 + [math.nan] + [1] * 6)
    worse = mock.Mock(side_effect=lambda *z: loss_of(*z) * next(factors))
    with mock.patch.object(simclr, "nt_xent_loss", worse), clock():
        message = fail("simclr", *argv)
    rate = common.learning_rate(step - 1, 12, 1.2, 0.1 * 16 / 256)
    assert f"step {step}: the loss is not finite" in message and f"rate {rate:.3g}" in message
    assert "'loss': nan" in message and "'mi_bound': nan" in message
    assert "resumed from step 4 (epoch 1)" in succeed("simclr", *argv, "--resume")
    assert_same_run("run", whole("simclr"))


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("poison", ["loss", "weights", "moments", "term"])
def test_what_is_not_finite_is_never_saved(poison, stopped, small):
    """In the second step, where a signal may ask for a checkpoint: the loss is not finite; or it
    is, but not what the step made of the weights, or of the optimiser's moments; or a term."""

    class Poisoned(Noting):
        def forward(self, views, y):
            loss, terms = super().forward(views, y)
            if len(self.seen) == 2:
                by = {"weights": 1e38, "moments": 1e25, "loss": math.nan}.get(poison, 1)
                gradient = loss - loss.detach()
                loss = loss.detach() + by * gradient
                terms["float"] = math.inf if poison == "term" else 1.0
            return loss, terms

    how = ["--optimizer", "adamw" if poison == "moments" else "sgd"]
    how += ["--lr", "1e5" if poison == "weights" else "1e-3"]
    with arriving(at=2) if stopped else contextlib.nullcontext():
        message = fail(script_of(Poisoned), *SHORT, *how)
    assert "not finite" in message and not list(Path("run").glob("*.pt"))


# --------------------------------------------------------------------------------------------------
# The compiler, and GPUs


def test_one_graph_for_all_epochs(small, whole, monkeypatch):
    """torch.compile without its code generator: it captures graphs, and runs them as they are. One
    for the model, whose KL weight and partition may change from step to step (CARP's do), one for
    its views; none for AutoAugment, which goes image by image."""
    capture = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", capture)
    found = torch._dynamo.utils.counters
    for script, graphs in ("byol", 2), ("supcon_tcl", 1), ("carl_carp --method carp", 2):
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
    "lacks", ["", "a GPU", "2000 steps", "a C compiler", "Triton", "one process"]
)
def test_compile(lacks, monkeypatch):
    """By default where it pays; else as it is typed; never for several processes."""
    monkeypatch.setattr(shutil, "which", lambda name: lacks != "a C compiler" or None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: lacks != "Triton" or None)
    monkeypatch.setattr(common, "world_size", lambda: 1 + (lacks == "one process"))
    device, steps = "cpu" if lacks == "a GPU" else "cuda", 1999 + (lacks != "2000 steps")
    for typed, expected in (None, not lacks), (False, False), (True, True):
        args = SimpleNamespace(device=device, compile=typed)
        if typed and lacks == "one process":
            with pytest.raises(common.InputError, match="--compile is for one process"):
                common.resolve_compile(args, steps)
        else:
            common.resolve_compile(args, steps)
            assert args.compile is expected


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
