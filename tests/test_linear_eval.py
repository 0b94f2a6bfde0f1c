"""linear_eval.py: what it prints, writes and draws, that the encoder comes out as it went in, that
nothing is chosen on the test images, which files it takes for an encoder, what it refuses."""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import re
import sys
import types
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

import common
import linear_eval
import simclr
from barlow_twins import BarlowTwins
from byol import BYOL
from carl_carp import CARLCARP
from corinfomax import CorInfoMax
from simclr import SimCLR
from supcon_tcl import SupConTCL
from vicreg import VICReg

CPU = "--device cpu --workers 0 --precision fp32".split()
PROTOCOLS = {
    "linear": ["--protocol", "linear", "--epochs", "2"],
    "cached": ["--protocol", "linear", "--epochs", "2", "--cached"],
    "knn": ["--protocol", "knn"],
    "finetune": ["--protocol", "finetune", "--epochs", "2"],
}
PICTURES = "neighbors", "map", "spectrum", "confusion"
SAME_ANYWHERE = [139, 281, 324, 356, 422]  # of torch's generator, which is the same on all CPUs


def call(main, *argv):
    """(exit status, stdout, stderr) of a script, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    words = mock.patch.object(sys, "argv", ["linear_eval.py", *map(str, argv)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), words:
        try:
            status = common.run(main) or 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def evaluate(*argv):
    """The table and the figures that are printed."""
    status, out, err = call(linear_eval.main, *argv)
    assert (status, err) == (0, ""), err
    *table, last = out.splitlines()
    return table, json.loads(last)


def refused(*argv):
    """The one line with which it refuses its input."""
    status, _, err = call(linear_eval.main, *argv)
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, (status, err)
    return err


def toy(n=64, size=16):
    """A packed dataset of noise: four classes, n training and 32 test images."""
    rng, packed = torch.Generator().manual_seed(0), {"classes": ["a", "b", "c", "d"]}
    for split, count in ("train", n), ("test", 32):
        images = torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
        packed[split] = {"images": images, "labels": torch.arange(count) % 4}
    return packed


def separable():
    """Four classes of plain images, each with a brightness of its own."""
    data = toy()
    for split in "train", "test":
        level = 20 + 70 * data[split]["labels"] + torch.arange(len(data[split]["labels"])) % 7
        data[split]["images"] = level.byte()[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return data


def encoder_dict(**change):
    """What a training script saves, of an encoder whose batch-norm statistics are not trivial."""
    torch.manual_seed(0)
    encoder = common.resnet("resnet18", "imagenet")
    encoder(torch.rand(8, 3, 16, 16) - 0.5)
    about = {"arch": "resnet18", "stem": "imagenet", "image_size": 16, "method": "m", "epoch": 7}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3, "dataset": "toy", "config": {}}
    return {"state_dict": encoder.state_dict()} | about | change


def our_checkpoint(model):
    about = {key: value for key, value in encoder_dict().items() if key != "state_dict"}
    return {"model": model.state_dict()} | about


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder with toy.pt, other.pt, what one epoch of SimCLR saves, and, by protocol, what an
    evaluation of it printed, wrote and left of the encoder. Only to be read."""
    folder, found = tmp_path_factory.mktemp("run"), {}
    with contextlib.chdir(folder):
        torch.save(toy(), "toy.pt")
        torch.save(encoder_dict(), "other.pt")
        flags = ["--dataset", "toy.pt", *CPU, *"--stem imagenet --epochs 1 --out run".split()]
        assert call(simclr.main, *flags, "--batch-size", "32")[0] == 0
        original = Path("run/encoder.pt").read_bytes()
        flags = ["--checkpoint", "run/encoder.pt", "--dataset", "toy.pt", *CPU]
        for protocol, words in PROTOCOLS.items():
            before, loaded = listing(folder), []
            drawn = ["--pictures", "--compare", "other.pt"] * (protocol in ("cached", "finetune"))
            with mock.patch.object(linear_eval, "load_encoder", remember(loaded)):
                table, figures = evaluate(*flags, *words, *drawn)
            new = [path for path in listing(folder) if path not in before]
            found[protocol] = types.SimpleNamespace(
                table=table, figures=figures, encoder=loaded[0], new=sorted(new)
            )
        assert Path("run/encoder.pt").read_bytes() == original
    return types.SimpleNamespace(folder=folder, **found)


def remember(loaded):
    """load_encoder, noting the encoders that it returns of an encoder.pt."""
    original = linear_eval.load_encoder

    def load(path, **overrides):
        encoder, info = original(path, **overrides)
        if str(path).endswith("encoder.pt"):
            loaded.append(encoder)
        return encoder, info

    return load


@pytest.fixture
def argv(run, tmp_path, monkeypatch):
    """Flags for an encoder and a dataset that are all right, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in "encoder.pt", "checkpoint.pt":
        Path(name).symlink_to(run.folder / "run" / name)
    torch.save(toy(), "toy.pt")
    return ["--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU, "--no-untrained"]


# --------------------------------------------------------------------------------------------------
# What it prints and writes, and that the encoder comes out as it went in


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_output(protocol, run):
    shown = getattr(run, protocol)
    name, figures = protocol.replace("cached", "linear"), shown.figures
    assert (figures["protocol"], figures["dataset"], figures["split"]) == (name, "toy", "test")
    assert (figures["method"], figures["epoch"], figures["images"]) == ("simclr", 1, 32)
    measured = {"knn_top1"} if protocol == "knn" else {"knn_top1", "top1", "top5"}
    assert measured <= figures.keys() and all(0 <= figures[key] <= 1 for key in measured)
    rows = {re.split(r"  |,", line)[0]: line.split()[-2:] for line in shown.table if "%" in line}
    assert rows["chance"] == ["25.00%", "100.00%"]
    assert rows["kNN"][0] == f"{figures['knn_top1']:.2%}"
    row = {"finetune": "finetuned"}.get(name, name)
    assert name == "knn" or rows[row] == [f"{figures[k]:.2%}" for k in ("top1", "top5")]
    assert rows["untrained: kNN"][0] == f"{figures['untrained_knn_top1']:.2%}"
    assert name != "linear" or rows["untrained: linear"][0] == f"{figures['untrained_top1']:.2%}"
    written = run.folder / f"run/{name}_{'cached_' * (protocol == 'cached')}toy.json"
    assert json.loads(written.read_text()) == figures
    pictures = [run.folder / f"run/{name}.png" for name in PICTURES] * (protocol == "cached")
    assert shown.new == sorted([written, *pictures])  # finetune has written them anew
    assert "published" not in figures


@pytest.mark.parametrize("protocol", ["linear", "cached", "knn"])
def test_the_encoder_is_not_changed(protocol, run):
    encoder = getattr(run, protocol).encoder
    expected = torch.load(run.folder / "run/encoder.pt", weights_only=True)["state_dict"]
    assert encoder.state_dict().keys() == expected.keys()
    for key, value in encoder.state_dict().items():  # parameters and batch-norm statistics
        assert torch.equal(value, expected[key]), key
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    tuned = run.finetune.encoder.state_dict()
    assert not torch.equal(tuned["conv1.weight"], expected["conv1.weight"])


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_an_encoder_left_in_training_mode_is_noticed(protocol, argv, tmp_path, monkeypatch):
    def in_training_mode(*args, **kwargs):
        encoder, info = original(*args, **kwargs)
        encoder.train()
        encoder.train = lambda mode=True: encoder  # and eval() calls train(False)
        return encoder, info

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", in_training_mode)
    before = listing(tmp_path)
    with pytest.raises(RuntimeError, match="encoder changed"):
        call(linear_eval.main, *argv, *PROTOCOLS[protocol])
    assert listing(tmp_path) == before


def test_both_files_of_a_run_hold_the_same_encoder(run):
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        one, other = (
            linear_eval.load_encoder(run.folder / f"run/{name}.pt")[0](images)
            for name in ("encoder", "checkpoint")
        )
    assert torch.equal(one, other) and one.shape == (4, 512)


@pytest.mark.parametrize("protocol", ["knn", "cached"])
def test_the_untrained_encoder_is_what_random_gives(protocol, argv, run):
    """The run's statistics are those of its data, so it sees what `random` sees."""
    argv[1] = "random"
    table, alone = evaluate(*argv, *PROTOCOLS[protocol], "--stem", "imagenet")
    beside = getattr(run, protocol).figures
    assert beside["untrained_knn_top1"] == alone["knn_top1"]
    assert beside.get("untrained_top1") == alone.get("top1")
    assert not [key for key in alone if "untrained" in key]
    assert (alone["method"], alone["epoch"]) == ("untrained", 0)
    (written,) = Path("runs").glob("*/*toy.json")
    assert json.loads(written.read_text()) == alone
    _, other = evaluate(*argv, *PROTOCOLS["knn"])
    assert other["config"]["stem"] == "small"  # what auto means for 16 pixels


# --------------------------------------------------------------------------------------------------
# What the figures are measured on


@pytest.mark.parametrize("protocol", ["cached", "finetune"])
def test_validation_never_touches_the_test_images(protocol, argv):
    """The same figures whatever the test split holds, and if there is none."""
    data, found = toy(), []
    noise = {"images": 255 - data["test"]["images"], "labels": data["test"]["labels"].flip(0)}
    for test in noise, None:
        torch.save(data | {"test": test}, "toy.pt")
        table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--validation-fraction", "0.25")
        assert figures["split"] == "validation" and "16 validation images" in "\n".join(table)
        found.append([figures.get(key) for key in ("top1", "top5", "knn_top1", "images")])
    assert found[0] == found[1] and found[0][-1] == 16
    assert Path("_".join([figures["protocol"], "cached" * figures["cached"], "validation_toy.json"])
                .replace("__", "_")).exists()  # fmt: skip


def test_held_out_images_are_not_trained_on(argv):
    """In noise the nearest neighbour of an image tells its class only where it is the image."""
    _, figures = evaluate(*argv, *PROTOCOLS["knn"], "--knn-k", "1", "--validation-fraction", "0.25")
    assert figures["knn_top1"] < 0.75


def test_a_separable_problem_is_solved_and_the_last_epoch_counts(argv, monkeypatch):
    """A last step far uphill spoils it; the best epoch, or any before, would show nothing."""
    torch.save(separable(), "toy.pt")
    _, figures = evaluate(*argv, "--cached")
    assert (figures["top1"], figures["top5"]) == (1, 1)
    original = common.learning_rate

    def up_at_the_end(step, total, *rest):
        return original(step, total, *rest) if step < total - 1 else -1e6

    monkeypatch.setattr(common, "learning_rate", up_at_the_end)
    assert evaluate(*argv, "--cached")[1]["top1"] < 0.5


@pytest.mark.parametrize("protocol", ["cached", "finetune"])
def test_few_labels(protocol, argv):
    """A quarter of 64 images, 4 of each class; the result has a name of its own."""
    table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--label-fraction", "0.25")
    assert (figures["label_fraction"], figures["labelled_images"]) == (0.25, 16)
    assert "labels of 16 of 64 training images, 0.25 of each" in table
    assert "16 training images: batches of 2" in table
    name = f"{figures['protocol']}_0.25_{'cached_' * (protocol == 'cached')}toy.json"
    assert Path(name).exists()


def test_one_percent_is_the_same_anywhere():
    split = common.Split(torch.arange(50_000), torch.arange(50_000) % 10)
    few, again, other = (linear_eval.labelled(split, 0.01, 10, seed) for seed in (0, 0, 1))
    assert few.labels.bincount().tolist() == [50] * 10
    assert torch.equal(few.images, again.images) and not torch.equal(few.images, other.images)
    assert few.images[:5].tolist() == SAME_ANYWHERE


def test_a_class_without_images(argv):
    data = toy()
    labels = torch.where(data["train"]["labels"] == 2, 1, data["train"]["labels"])
    torch.save(data | {"train": data["train"] | {"labels": labels}}, "toy.pt")
    line = refused(*argv, *PROTOCOLS["knn"])
    assert "toy: 1 of 4 classes have no training image" in line and line.endswith(": c\n")
    labels = data["test"]["labels"].clamp(max=1)
    torch.save(data | {"test": data["test"] | {"labels": labels}}, "toy.pt")
    table, _ = evaluate(*argv, *PROTOCOLS["knn"])
    assert "toy: 2 of 4 classes have no test image: c, d" in table


# --------------------------------------------------------------------------------------------------
# Seeds


def t_quantile(degrees):
    """Student's t at 97.5 %, from its density."""
    t = torch.linspace(0, 200, 2_000_001, dtype=torch.float64)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    share = torch.cumulative_trapezoid(density, t)
    far = (200 / degrees**0.5) ** -degrees / degrees * degrees**0.5  # the tail, t^-(degrees + 1)
    return float(t[(share < 0.95 * (share[-1] + far)).sum() + 1])


def test_the_interval_over_seeds():
    for n in range(2, 11):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
        mean, half = linear_eval.mean_and_interval(values)
        column = torch.tensor(values, dtype=torch.float64)
        assert mean == pytest.approx(float(column.mean()))
        expected = t_quantile(n - 1) * float(column.std()) / n**0.5
        assert half == pytest.approx(expected, rel=1e-3)
    assert linear_eval.mean_and_interval([0.5]) == (0.5, None)


@pytest.mark.parametrize("protocol", ["cached", "finetune"])
def test_seeds_are_runs_of_their_own(protocol, argv):
    """--seeds 2 at seed 5 has the figures of seed 5 and of seed 6, each alone."""
    flags = [*argv, *PROTOCOLS[protocol], "--label-fraction", "0.5"]
    table, figures = evaluate(*flags, "--seed", "5", "--seeds", "2")
    alone = [evaluate(*flags, "--seed", seed)[1] for seed in ("5", "6")]
    for key in "knn_top1", "top1":
        assert figures[f"{key}_seeds"] == [each[key] for each in alone]
        assert figures[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2)
        half = figures[f"{key}_ci95"]
        assert half == pytest.approx(12.706 * abs(alone[0][key] - alone[1][key]) / 2)
        assert f"top-1 ± {half:.2%} (95 %; 2 evaluations of one encoder)" in "\n".join(table)
    assert alone[0] != alone[1] and "knn_top1_ci95" not in alone[0]


def test_neighbours_vote_alike_for_every_seed(argv):
    """So with all labels theirs has no interval; and k of them vote for k classes at most."""
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--seeds", "2", "--knn-k", "2")
    assert "knn_top1_ci95" not in figures and "top1_ci95" in figures
    assert figures["knn_top5"] is None
    (row,) = (line for line in table if line.startswith("kNN, k = 2"))
    assert row.split()[-1] == "-"


# --------------------------------------------------------------------------------------------------
# Learning rates, recipes, standardisation


@pytest.fixture
def rates(monkeypatch):
    """What the optimisers are given at each step: [(rate, weight decay) of each group]."""
    seen = []

    class Recorded(torch.optim.SGD):
        def step(self, *args):
            seen.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    return seen


def test_finetuning_has_two_rates_in_steps(argv, rates, run, monkeypatch):
    """They fall to a fifth and a tenth after each quarter of the epochs."""
    loaded = []
    monkeypatch.setattr(linear_eval, "load_encoder", remember(loaded))
    flags = "--protocol finetune --epochs 4 --lr 0.1 --batch-size 64".split()
    evaluate(*argv, *flags, "--encoder-lr", "1e-9")
    expected = [[1e-9 * 0.2**i, 0.1 * 0.1**i] for i in range(4)]
    assert [[rate for rate, _ in groups] for groups in rates] == [
        pytest.approx(p) for p in expected
    ]
    before, _ = linear_eval.load_encoder("encoder.pt")  # its own rate, not the classifier's
    assert (loaded[0].conv1.weight - before.conv1.weight).abs().max() < 1e-6
    with mock.patch.object(sys, "argv", ["linear_eval.py", *argv, "--protocol", "finetune"]):
        args = linear_eval.arguments()
    assert (args.epochs, args.batch_size, args.lr, args.encoder_lr) == (20, 256, [0.2], 0.005)


@pytest.mark.slow
def test_finetuning_learns(argv):
    """What a linear classifier on this frozen, untrained encoder does not solve so well."""
    whole = common.load_dataset("shapes")
    parts = ("train", whole.train.spread(1000)), ("test", whole.test.spread(500))
    few = {key: {"images": part.images, "labels": part.labels} for key, part in parts}
    torch.save(few | {"classes": whole.classes}, "few.pt")
    argv = ["--checkpoint", "random", "--stem", "imagenet", "--device", "cpu", "--dataset"]
    argv += ["few.pt", "--crop-min", "0.4", "--batch-size", "64"]
    frozen = evaluate(*argv, "--protocol", "linear", "--cached", "--epochs", "10")[1]
    tuned = evaluate(*argv, "--protocol", "finetune", "--epochs", "6", "--encoder-lr", "0.05")[1]
    assert tuned["top1"] > frozen["top1"] + 0.1


RECIPE_RATES = {"s003": (0.2, 0.002, 0), "s004": (0.5, 0.0005, 1e-4), None: (0.02, 0.0002, 0)}


@pytest.mark.parametrize("recipe", RECIPE_RATES)
def test_recipes(recipe, argv, rates):
    """S003 5.2.5: .2 to .002 by cosine, no decay. S004 A.3: from .5, and as in the released code to
    a thousandth of it with a decay of 1e-4. Both for 100 epochs."""
    _, figures = evaluate(*argv, "--cached", *(["--recipe", recipe] if recipe else []))
    first, last, decay = RECIPE_RATES[recipe]
    assert len(rates) == 100 and rates[0] == [(pytest.approx(first), decay)]
    assert rates[50] == [(pytest.approx((first + last) / 2), decay)]  # half of a cosine
    assert last < rates[99][0][0] < last + first * 1e-3
    assert figures["config"]["standardize"] is (recipe is None)


def test_presets(argv):
    wanted = {
        ("linear", "s001", "toy.pt"): (50, 0.08),
        ("finetune", "s001", "toy.pt"): (50, 0.08),
        ("linear", None, "shapes"): (20, 0.4),
        ("linear", None, "toy.pt"): (100, 0.08),
    }
    for (protocol, recipe, data), expected in wanted.items():
        flags = ["--protocol", protocol, "--dataset", data] + ["--recipe", recipe] * bool(recipe)
        with mock.patch.object(sys, "argv", ["linear_eval.py", *argv, *flags]):
            args = linear_eval.arguments()
        assert (args.epochs, args.crop_min) == expected


def test_features_are_standardised_unless_told_otherwise(argv, monkeypatch):
    seen, original = [], linear_eval.fit_linear

    def note(batches, *rest):
        seen.append(torch.cat([h for h, _ in batches(1)]))
        return original(batches, *rest)

    monkeypatch.setattr(linear_eval, "fit_linear", note)
    for protocol, flag in itertools.product(("cached", "linear"), ([], ["--no-standardize"])):
        evaluate(*argv, *PROTOCOLS[protocol], *flag)
    standard, plain, augmented, plain_augmented = seen
    alive = plain.std(0) > plain.std(0).mean() / 50
    torch.testing.assert_close(standard.mean(0), torch.zeros(512), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0)[alive], torch.ones(int(alive.sum())))
    expected = (plain_augmented - plain.mean(0)) / plain.std(0)  # of images without augmentation
    torch.testing.assert_close(augmented[:, alive], expected[:, alive], rtol=1e-3, atol=1e-3)
    assert (plain >= 0).all()  # what comes after a ReLU


def test_several_rates_do_not_influence_each_other(monkeypatch):
    args = argparse.Namespace(device="cpu", momentum=0.9, weight_decay=1e-3, epochs=2, lr_floor=0.1)
    args.batch_size = 8
    rng = torch.Generator().manual_seed(0)
    h, y = torch.randn(32, 5, generator=rng), torch.arange(32) % 3

    def fitted(rates):
        batches = list(zip(h.split(8), y.split(8), strict=True))
        return linear_eval.fit_linear(lambda epoch: batches, 5, 3, 4, rates, args)

    start = torch.nn.Linear(5, 3)
    monkeypatch.setattr(linear_eval, "new_head", lambda *_: copy.deepcopy(start))
    together = fitted([0.01, 1.0, math.inf])  # the last is soon not finite
    for head, rate in zip(together, (0.01, 1.0), strict=False):
        (alone,) = fitted([rate])
        torch.testing.assert_close(head.weight, alone.weight)
        assert (head.weight - start.weight).abs().max() > 1e-3
    assert not together[2].weight.isfinite().all()
    with pytest.raises(common.InputError, match="not finite"):
        fitted([math.inf])


def test_a_rate_is_chosen_on_held_out_training_images(argv):
    """One rate that learns nothing, one that does, one that diverges: the one that does; whatever
    the test images are; a tenth of each class is held out, and then learnt, too."""
    data, lines = separable(), []
    for labels in data["test"]["labels"], (data["test"]["labels"] + 1) % 4:
        torch.save(data | {"test": data["test"] | {"labels": labels}}, "toy.pt")
        flags = "--cached --epochs 10 --batch-size 16 --lr 1e30 1e-9 0.1".split()
        table, figures = evaluate(*argv, *flags)
        lines += [line for line in table if line.startswith("--lr on 8 held-out")]
        assert figures["top1"] == float(labels is data["test"]["labels"])
        assert figures["config"]["lr"] == [1e30, 1e-9, 0.1] and figures["lr"] == 0.1
        found = figures["lr_validation"]
        assert found.keys() == {"1e+30", "1e-09", "0.1"} and max(found, key=found.get) == "0.1"
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].endswith("taken: 0.1")
    few = refused(*argv, *flags, "--label-fraction", "0.06")
    assert "4 training images are too few to compare several --lr" in few


# --------------------------------------------------------------------------------------------------
# The projector, transfer

PROJECTORS = {
    "simclr": lambda b: SimCLR(b, 12, 6),
    "byol": lambda b: BYOL(b, 12, 6),
    "barlow_twins": lambda b: BarlowTwins(b, 12, 6),
    "vicreg": lambda b: VICReg(b, 12, 6),
    "supcon": lambda b: SupConTCL(b, 3, "supcon", 12, 6),
    "carl": lambda b: CARLCARP(b, 8, None, 12, 6),
    "corinfomax": lambda b: CorInfoMax(b, 12, 6),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_features_of_the_projector(name, monkeypatch):
    torch.manual_seed(0)
    model = PROJECTORS[name](common.resnet("resnet18", "imagenet"))
    after = model.projector if hasattr(model, "projector") else model.head
    after(model.backbone(torch.randn(8, 3, 16, 16)))  # batch-norm statistics that are not trivial
    monkeypatch.setattr(common, "load_file", lambda path: our_checkpoint(model))
    both, info = linear_eval.load_encoder("checkpoint.pt", features="projector")
    model.eval()
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(both(images), after(model.backbone(images)))
    assert both.num_features == 6 and not both.training and "then the projector" in info["found"]


def test_evaluating_the_projector(argv, run):
    argv[1] = "checkpoint.pt"
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--features", "projector", "--pictures")
    assert figures["features"] == "projector" and ", projector, " in "\n".join(table)
    assert json.loads(Path("linear_projector_cached_toy.json").read_text()) == figures
    of_encoder = run.cached.figures
    assert any(of_encoder[key] != figures[key] for key in ("top1", "knn_top1"))


def test_no_projector_is_said(monkeypatch):
    classifier, odd = (SimCLR(common.resnet("resnet18", "imagenet"), 12, 6) for _ in range(2))
    classifier.projector = torch.nn.Linear(512, 4)
    odd.projector[1] = torch.nn.LayerNorm(12)
    weights = below("backbone.", encoder_dict()["state_dict"]) | below("projector.", HEAD)
    for saved, message in (
        (encoder_dict(), "x.pt: no projector"),
        (weights, "no projector"),
        (our_checkpoint(classifier), "no projector"),
        (our_checkpoint(odd), "no projector"),
    ):
        monkeypatch.setattr(common, "load_file", lambda path, saved=saved: saved)
        with pytest.raises(common.InputError, match=message):
            linear_eval.load_encoder("x.pt", features="projector")


def test_images_of_another_size_are_brought_to_the_encoders(argv):
    """Of 24 pixels, more than the encoder's 16, the central 21 (7/8) are resized; of 8, all."""
    for size, cut in (24, "21x21"), (8, "8x8"), (16, None):
        torch.save(toy(size=size), "toy.pt")
        table, figures = evaluate(*argv, *PROTOCOLS["knn"])
        said = [line for line in table if line.startswith(f"toy: {size}x{size} pixels")]
        expected = f"toy: {size}x{size} pixels, of which the central {cut} are resized to the 16"
        assert said == ([f"{expected} of the encoder"] if cut else [])
        assert figures["config"]["image_size"] == 16
    _, figures = evaluate(*argv, *PROTOCOLS["knn"], "--image-size", "32")
    assert figures["config"]["image_size"] == 32


def test_transfer_keeps_the_encoders_statistics(argv, monkeypatch):
    """Images that are brighter by a constant are so for the encoder, too."""
    seen, original = [], common.evaluation_view

    def note(*args):
        seen.append(original(*args))
        return seen[-1]

    torch.save(encoder_dict(), "mine.pt")
    argv[1] = "mine.pt"
    monkeypatch.setattr(common, "evaluation_view", note)
    data = toy()
    dark = {key: data[key] | {"images": data[key]["images"] // 2} for key in ("train", "test")}
    bright = {key: dark[key] | {"images": dark[key]["images"] + 100} for key in dark}
    for some in dark, bright:
        torch.save(data | some, "toy.pt")
        evaluate(*argv, *PROTOCOLS["knn"])
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b - a, torch.full_like(a, 100 / 255 / 0.25))  # by its deviation


# --------------------------------------------------------------------------------------------------
# Pictures: what is in them, by hand


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(n, size=8):
    """n images of one colour each, no two the same."""
    colors = torch.tensor([(3 + 7 * i % 251, 101 + i // 251, 61) for i in range(n)])
    return colors.view(n, 3, 1, 1).expand(n, 3, size, size) / 255


def test_nearest_by_brute_force():
    test, train, labels = random(30, 6), random(50, 6, seed=1), torch.arange(30) % 3
    scale = torch.arange(1, 51)[:, None] ** 2  # the cosine does not see it
    chosen, nearest = linear_eval.nearest_images(test, labels, train * scale, rows=7, count=4)
    assert chosen.shape == (7,) and nearest.shape == (7, 4)
    for i, found in zip(chosen.tolist(), nearest.tolist(), strict=True):
        cosines = torch.nn.functional.cosine_similarity(test[i : i + 1], train)
        assert found == sorted(range(50), key=lambda k, cosines=cosines: -float(cosines[k]))[:4]


@pytest.mark.parametrize("num_classes", [10, 2, 5, 100])
def test_test_images_are_spread_over_classes(num_classes):
    labels = torch.arange(400).mul(7) % num_classes
    chosen, _ = linear_eval.nearest_images(random(400, 3), labels, random(9, 3))
    assert len(set(chosen.tolist())) == 10
    assert labels[chosen].tolist() == [i * num_classes // 10 for i in range(10)]
    chosen, nearest = linear_eval.nearest_images(random(7, 3), labels[:7], random(5, 3))
    assert len(set(chosen.tolist())) == 7 and nearest.shape == (7, 5)


def test_only_the_chosen_images_are_decoded(monkeypatch):
    args = argparse.Namespace(image_size=8, device="cpu", workers=0, seed=0)
    stored, asked = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), []

    def decode(split, items, batch_size, args):
        asked.extend(split.images[i] for i, _ in items)
        yield torch.stack([stored[int(split.images[i])] for i, _ in items])[:, None], split.labels

    monkeypatch.setattr(common, "decode", decode)
    for images in stored, list("012345"):
        split = common.Split(images, torch.arange(6))
        found = linear_eval.images_at(split, torch.tensor([4, 1]), args)
        assert torch.allclose(found, stored[[4, 1]] / 255, atol=1e-6)
    assert asked == ["4", "1"]


def test_principal_components():
    features = random(40, 7) @ random(7, 7, seed=1) + 5
    points, shares = linear_eval.principal_components(features)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(shares, singular[:2] ** 2 / (singular**2).sum())
    for k in 0, 1:
        sign = np.sign(axes[k, np.abs(axes[k]).argmax()])
        assert np.allclose(points[:, k], sign * centred @ axes[k])


def test_map_cells():
    """One point in each cell that has any."""
    points = random(300, 2).double()
    shown = linear_eval.map_cells(points, 20)
    low, high = points.amin(0), points.amax(0)
    places = ((points - low) / (high - low) * 19).round().long().tolist()
    assert shown.keys() == {(x, 19 - y) for x, y in places} and len(shown) < 300
    for (column, row), i in shown.items():
        assert [column, 19 - row] == places[i]
    assert len(linear_eval.map_cells(torch.zeros(99, 2), 12)) == 1


@pytest.mark.parametrize("n", [50, 6, 1])
def test_spectrum_is_that_of_the_covariance(n):
    features = random(n, 9) * torch.arange(1, 10) + 3
    found = linear_eval.spectrum(features)
    wanted = np.linalg.eigvalsh(np.cov(features.double().numpy().T)) if n > 1 else np.zeros(9)
    wanted = wanted[::-1].clip(0) / max(wanted.sum(), 1e-300)
    assert found.dtype == torch.float64 and found.shape == (9,) and found.min() >= 0
    assert np.allclose(found, wanted, atol=1e-9)
    assert int((found > 0).sum()) == min(9, n - 1)  # rounding counts as nothing


def test_effective_dimension():
    """exp of the entropy: as many as there are equal ones."""
    for shares, expected in ([1 / 7] * 7, 7), ([1, 0, 0], 1), ([0.5, 0.5, 0], 2), ([0, 0], 0):
        found = linear_eval.effective_dimension(torch.tensor(shares, dtype=torch.float64))
        assert found == pytest.approx(expected)
    quarter = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert linear_eval.effective_dimension(torch.tensor([0.75, 0.25])) == pytest.approx(quarter)


def test_the_most_confused_classes():
    counts = torch.randint(0, 5, (50, 50), generator=torch.Generator().manual_seed(3))
    counts += torch.diag(torch.arange(50) * 1000)  # right: no matter
    ranked = sorted(range(50), key=lambda k: -sum(
        int(counts[i, k] + counts[k, i]) for i in range(50) if i != k))  # fmt: skip
    assert linear_eval.most_confused(counts).tolist() == sorted(ranked[:20])


@pytest.mark.parametrize("n, perplexity", [(1000, 50), (61, 20)])
def test_tsne_has_the_settings_of_the_thesis(monkeypatch, n, perplexity):
    given = {}

    class TSNE:
        def __init__(self, **settings):
            given.update(settings)

        def fit_transform(self, x):
            return np.asarray(x)[:, :2]

    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=TSNE))
    features = random(n, 4)
    assert torch.equal(linear_eval.tsne(features, 5), features[:, :2])
    wanted = {"early_exaggeration": 12, "init": "random", "random_state": 5}
    assert given == wanted | {"perplexity": perplexity}
    with pytest.raises(common.InputError, match="too few"):
        linear_eval.tsne(features[:3], 0)


# --------------------------------------------------------------------------------------------------
# Pictures: what is drawn


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def words(figure):
    return " ".join(" ".join(texts(figure)).split())


ODD = ["a $1 \\alpha$ bill", "\u72ac \udc80 \x07", "_under", "", "an animal that has four legs"]
KINDS = {
    "ten": (10, 60, [f"class {i}" for i in range(10)]),
    "odd": (5, 30, ODD),
    "thousand": (1000, 1200, [f"n{i:08} a long name, number {i}" for i in range(1000)]),
    "one image": (2, 1, ["cat", "dog"]),
}


def pictures(num_classes, n, classes, title="A heading"):
    """One picture of each kind."""
    labels = torch.arange(n) % num_classes
    features, images = random(n, 12), plain(n)
    chosen, nearest = linear_eval.nearest_images(features, labels, random(n, 12, seed=1))
    some = images[chosen], labels[chosen], images[nearest], labels[nearest]
    yield linear_eval.neighbors_picture(*some, classes, title)
    points, _ = linear_eval.principal_components(features)
    yield linear_eval.map_picture(images, labels, points, classes, title, ("across", "up"))
    shares = linear_eval.spectrum(features)
    curves = {"representation": {"first": shares, "second": shares**2}, "z": {"first": shares}}
    yield linear_eval.spectrum_picture(curves, title)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts.index_put_((labels, labels.flip(0)), torch.ones_like(labels), accumulate=True)
    yield linear_eval.confusion_picture(counts, classes, title)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_legible(kind):
    """All of the heading is there, within the picture, and names do not run into one another."""
    for figure in pictures(*KINDS[kind], "A heading of many words, such as this. " * 4):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = canvas.get_width_height()
        assert 600 <= width <= 2000 and 400 <= height <= 2300
        assert words(figure).count("many words,") == 4
        axes = figure.axes[0]
        shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        ticks = [a.get_ticklabels(which="both") for x in figure.axes for a in (x.xaxis, x.yaxis)]
        ticks = {id(text) for text in itertools.chain(*ticks)} if not axes.texts else ()
        for text in shown:
            box = text.get_window_extent()
            inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
            assert inside or id(text) in ticks, text  # which are cut where an axis ends
            assert text.get_fontsize() >= 7
        names = [text.get_window_extent() for text in axes.texts]
        for a, b in itertools.combinations(names, 2):
            assert not a.overlaps(b)


def test_neighbours_are_framed_and_named():
    images, mine = plain(8), torch.tensor([1, 0])
    train_labels, names = torch.tensor([[1, 0, 1], [1, 0, 2]]), ["ant", "bee", "cat"]
    given = images[:2], mine, images[2:].unflatten(0, (2, 3)), train_labels
    figure = linear_eval.neighbors_picture(*given, names, "Title")
    (axes,) = figure.axes
    labels = [mine[0], *train_labels[0], mine[1], *train_labels[1]]
    order = [images[i] for i in (0, 2, 3, 4, 1, 5, 6, 7)]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    for number, (shown, image, label) in enumerate(zip(axes.images, order, labels, strict=True)):
        assert np.allclose(shown.get_array()[0, 0], image[:, 0, 0], atol=0.01)
        left, right, bottom, top = shown.get_extent()
        inside = [frame for frame in frames if frame.get_x() < left and frame.get_y() < top
                  and frame.get_x() + frame.get_width() > right
                  and frame.get_y() + frame.get_height() > bottom]  # fmt: skip
        row, column = divmod(number, 4)
        assert len(inside) == (column > 0)
        for frame in inside:
            same = bool(label == mine[row])
            color = linear_eval.BLUE if same else linear_eval.ORANGE
            assert to_hex(frame.get_edgecolor()) == color
            assert (frame.get_linestyle() in ("-", "solid")) == same  # not by colour alone
        middle = (left + right) / 2
        below = []
        for text in axes.texts:
            x, y = text.get_position()
            if abs(x - middle) < 0.1 and 0 < y - bottom < 0.2:
                below.append(text.get_text())
        assert below == [names[label]]
    assert len(frames) == 6
    assert "Title" in texts(figure) and "3 of the 6 neighbours, 50%" in words(figure)
    assert {"test image", "neighbour of another class"} <= set(texts(figure))


def test_map_places_and_colors():
    images, labels = plain(5), torch.tensor([0, 1, 2, 1, 0])
    points = torch.tensor([[0.0, 0.0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]])
    names, axes = ["ant", "bee", "cat"], ("across", "up")
    figure = linear_eval.map_picture(images, labels, points, names, "Title", axes)
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    middle = []
    for image, label in zip(images, labels, strict=True):
        there = np.abs(canvas - image[:, 0, 0].numpy()).max(-1) < 0.004
        rows, columns = np.nonzero(there)
        assert there.sum() > 1000 and there[rows.min() : rows.max() + 1].any(1).all()
        middle.append((columns.mean(), rows.mean()))
        frame = canvas[rows.min() - 2, columns.min() : columns.max()]
        assert np.allclose(frame, to_rgb(linear_eval.COLORS[label]), atol=0.01)
    x, y = zip(*middle, strict=True)
    assert x[0] == x[2] < x[4] < x[1] == x[3] and y[0] == y[1] > y[4] > y[2] == y[3]  # up is up
    legend = figure.axes[0].get_legend()
    colors = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert colors == linear_eval.COLORS[:3]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert {"Title", "across", "up"} <= set(texts(figure))
    assert "5 of 5 images are shown" in words(figure) and "Colours: the class." in words(figure)
    many = [f"c{i}" for i in range(21)]
    figure = linear_eval.map_picture(images, labels, points, many, "", ("", ""))
    assert figure.axes[0].get_legend() is None and "21 classes are too many" in words(figure)
    assert len(set(linear_eval.COLORS)) == 20


def test_spectra_are_drawn_to_a_common_scale():
    shares = torch.tensor([10, 1, 0.1], dtype=torch.float64) / 11.1
    low = torch.cat([10.0 ** -torch.arange(31.0).double(), torch.zeros(9).double()])
    curves = {"h": {"x": shares, "y": low}, "z": {"y": shares}}
    figure = linear_eval.spectrum_picture(curves, "Title")
    first, second = figure.axes
    assert first.get_yscale() == "log" and first.get_ylim() == second.get_ylim()
    bottom, top = first.get_ylim()
    assert top == 1 and bottom == pytest.approx(1e-10)  # ten decades at most
    x, y = first.get_lines()[:2]
    assert x.get_xdata().tolist() == [1, 2, 3] and np.allclose(x.get_ydata(), shares)
    assert np.allclose(y.get_ydata(), low.clamp(min=1e-10), atol=0)
    assert (x.get_color(), x.get_linestyle()) != (y.get_color(), y.get_linestyle())
    assert x.get_linestyle() != y.get_linestyle()
    assert second.get_lines()[0].get_color() == y.get_color()  # the same label, the same colour
    assert {"Title", "h", "z", "share of the whole variance"} <= set(texts(figure))
    dimension = math.exp(-sum(float(s) * math.log(s) for s in shares))
    assert f"x: effective dimension {dimension:.1f} of 3" in texts(figure)
    assert "On the lower edge" in words(figure)
    assert "lower edge" not in words(linear_eval.spectrum_picture({"z": {"x": shares}}, ""))


def test_confusion_shows_shares_of_the_true_class():
    counts = torch.tensor([[60, 25, 10, 5], [4, 90, 4, 2], [21, 22, 43, 14], [0, 12, 18, 70]])
    counts[1] *= 10  # of a larger class: shares matter
    figure = linear_eval.confusion_picture(counts, list("abcd"), "Title")
    (axes,) = figure.axes
    share = (counts / counts.sum(1, keepdim=True)).numpy()
    assert np.allclose(axes.images[0].get_array(), share)
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == f"{100 * share[row, column]:.0f}"
        assert (text.get_color() == "white") == (share[row, column] > 0.5)
    assert len(axes.texts) == 15  # none for nothing
    frames = [(frame.get_x(), frame.get_y()) for frame in axes.patches]
    assert frames == [(i - 0.5, i - 0.5) for i in range(4)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list("abcd")
    assert f"Title: {(60 + 900 + 43 + 70) / 1300:.1%} of 1300 images correct" in words(figure)
    assert {"true class", "predicted class"} <= set(texts(figure))
    many = torch.randint(0, 5, (50, 50))
    figure = linear_eval.confusion_picture(many, [f"class_{i}" for i in range(50)], "")
    known = [f"class_{k}" for k in linear_eval.most_confused(many)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == known
    assert "Of 50 classes the 20 most confused" in words(figure)
    nothing = linear_eval.confusion_picture(torch.zeros(3, 3, dtype=torch.int64), list("abc"), "T")
    assert "0.0% of 0 images" in words(nothing)


def test_names_are_no_formulas():
    assert linear_eval.one_line("a\tb\n c") == "a b c"
    assert linear_eval.one_line("x" * 99, 10) == "x" * 9 + "…"
    assert linear_eval.one_line("$a$") == r"\$a\$" and linear_eval.one_line("\udc80") == "?"


def test_pictures_are_whole(run):
    for name in PICTURES:
        with Image.open(run.folder / f"run/{name}.png") as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 400


@pytest.mark.parametrize("protocol", ["knn", "finetune"])
def test_pictures_show_what_was_measured(protocol, argv, run, monkeypatch):
    """The matrix counts what the figure counts; spectra are of the encoder as it was saved, at the
    size and with the statistics that were given, and of the projector in a checkpoint.pt."""
    drawn, argv[1] = {}, "checkpoint.pt"
    monkeypatch.setattr(linear_eval, "confusion_picture", lambda *given: drawn.update(counts=given))
    monkeypatch.setattr(linear_eval, "spectrum_picture", lambda *given: drawn.update(curves=given))
    monkeypatch.setattr(linear_eval, "map_picture", lambda *given: drawn.update(map=given))
    monkeypatch.setattr(linear_eval, "neighbors_picture", lambda *given: drawn.update(near=given))
    monkeypatch.setattr(linear_eval, "write_pictures", lambda pictures, folder: None)
    argv += [*PROTOCOLS[protocol], *"--image-size 24 --mean .1 .2 .3 --std 1 2 3".split()]
    Path("other").mkdir()
    Path("other/encoder.pt").symlink_to(run.folder / "other.pt")
    _, figures = evaluate(*argv, "--pictures", "--compare", "other/encoder.pt")
    counts = drawn["counts"][0]
    assert counts.sum(1).tolist() == [8] * 4
    top1 = figures["knn_top1" if protocol == "knn" else "top1"]
    assert float(counts.diag().sum()) / 32 == pytest.approx(top1)
    of = "simclr, epoch 1, toy" + ", before fine-tuning" * (protocol == "finetune")
    assert drawn["map"][4] == f"{of}: test images by their features"
    assert drawn["near"][5] == f"{of}: nearest neighbours"
    (curves, _), other = drawn["curves"], "m, epoch 7, other/encoder.pt"
    assert list(curves["representations"]) == ["untrained resnet18", "simclr, epoch 1", other]
    assert list(curves["projections"]) == ["simclr, epoch 1"]  # the other has none
    images = common.load_dataset("toy.pt").test.images
    x = common.evaluation_view(images, 24, [0.1, 0.2, 0.3], [1, 2, 3])
    both, _ = linear_eval.load_encoder("checkpoint.pt", features="projector")
    with torch.no_grad():
        for panel, features in ("representations", both.encoder(x)), ("projections", both(x)):
            expected = torch.linalg.eigvalsh(features.T.double().cov()).flip(0)[:8]
            found = curves[panel]["simclr, epoch 1"][:8]
            torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------
# What is an encoder


def same(weights):
    return dict(weights)


def shortcut(weights):
    return {name.replace("downsample", "shortcut"): value for name, value in weights.items()}


def sequential(first):
    """The indices of an nn.Sequential in which layer1 is number `first`."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{i}": first + i - 1 for i in (1, 2, 3, 4)}

    def renamed(weights):
        heads = {name: name.partition(".") for name in weights}
        return {f"{numbers[head]}.{rest}": weights[name] for name, (head, _, rest) in heads.items()}

    return renamed


def below(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def with_copy(original, copy):
    """An encoder under one prefix, and another one, with other values, which is not to be taken."""

    def made(weights):
        other = {name: value * 0.5 for name, value in weights.items()}
        return below(original, weights) | below(copy, other) | below("projector.", HEAD)

    return made


HEAD = {"0.weight": torch.zeros(8, 512), "0.bias": torch.zeros(8), "2.weight": torch.zeros(4, 8)}
STATE = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
LAYOUTS = {  # small stem?, how the tensors are called, what is around them
    "torchvision": (False, same, lambda w: w | {"fc.weight": torch.zeros(5, 512)}),
    "barlow twins": (False, same, lambda w: {"epoch": 9, "optimizer": STATE,
                     "model": below("module.backbone.", w) | below("module.projector.", HEAD)}),
    "lightly, Lightning": (False, sequential(4), lambda w: {"state_dict": below("backbone.", w)
                           | below("projection_head.layers.", HEAD), "hyper_parameters": {}}),
    "lightly, ImageNet": (False, same, lambda w: {
        "state_dict": with_copy("backbone._orig_mod.", "teacher_backbone.")(w)}),
    "lightly, DINO": (False, same, lambda w: {
        "state_dict": with_copy("student_backbone.", "backbone.")(w)}),
    "lightly, CIFAR": (True, lambda w: sequential(2)(shortcut(w)), lambda w: {
        "state_dict": below("backbone.", w)}),
    "solo-learn": (True, same, lambda w: {"epoch": 3, "optimizer_states": [STATE],
                   "state_dict": with_copy("backbone.", "momentum_backbone.")(w)}),
    "SupContrast": (True, shortcut, lambda w: {"opt": argparse.Namespace(lr=0.5), "epoch": 2,
                    "model": below("encoder.module.", w) | below("head.", HEAD)}),
    "Tuned-Contrastive": (True, shortcut, lambda w: {"net": w | below("model.", w)
                          | below("head.", HEAD), "acc": 0.9, "save_epoch": 4}),
    "carp": (False, same, lambda w: {"args": argparse.Namespace(arch="r"),
             "student": below("module.backbone.", w) | below("module.head.", HEAD),
             "teacher": below("module.backbone.", {k: v * 0.5 for k, v in w.items()})}),
    "leftthomas": (True, sequential(3), lambda w: below("f.", w) | below("g.", HEAD)
                   | {"f.total_ops": torch.zeros(1), "f.3.total_ops": torch.zeros(1)}),
    "PyTorch-BYOL": (False, sequential(4), lambda w: {
        "online_network_state_dict": below("encoder.", w) | below("projetion.", HEAD),
        "target_network_state_dict": below("encoder.", {k: v * 0.5 for k, v in w.items()})}),
    "byol-pytorch": (False, same, lambda w: below("net.", w)
                     | with_copy("online_encoder.net.", "target_encoder.net.")(w)),
    "MoCo": (False, same, lambda w: {"arch": "resnet50", "state_dict":
             with_copy("module.encoder_q.", "module.encoder_k.")(w)}),
    "MoCo v3": (False, same, lambda w: {"state_dict":
                with_copy("module.base_encoder.", "module.momentum_encoder.")(w)}),
    "stable-pretraining": (True, same, lambda w: {"state_dict":
                           with_copy("backbone.student.", "backbone.teacher.")(w)}),
    "averages": (True, same, lambda w: with_copy("net.", "average.net.")(w)
                 | below("lagging.", {k: v * 2 for k, v in w.items()})),
    "no counters": (False, same, lambda w: {k: v for k, v in w.items() if "num_b" not in k}),
}  # fmt: skip
NETWORKS = {}


def trained_alike(arch, small):
    """A ResNet of torchvision, its batch-norm statistics not trivial."""
    if (arch, small) not in NETWORKS:
        torch.manual_seed(1)
        network = getattr(torchvision.models, arch)()
        network.fc = torch.nn.Identity()
        if small:
            network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
            network.maxpool = torch.nn.Identity()
        network(torch.rand(8, 3, 16, 16) - 0.5)
        NETWORKS[arch, small] = network.eval()
    return NETWORKS[arch, small]


LARGE = [("torchvision", "resnet50"), ("MoCo", "resnet34")]


@pytest.mark.parametrize("layout, arch", [*((name, "resnet18") for name in LAYOUTS), *LARGE])
def test_public_layouts(layout, arch, monkeypatch):
    small, naming, wrap = LAYOUTS[layout]
    network, images = trained_alike(arch, small), torch.rand(2, 3, 16, 16)
    saved = wrap(naming(network.state_dict()))
    monkeypatch.setattr(common, "load_file", lambda path: saved)
    encoder, info = linear_eval.load_encoder("theirs.pth")
    assert (info["arch"], info["stem"]) == (arch, "small" if small else "imagenet")
    assert info["assumed"] == ["image_size", "mean", "std"]
    said = info["found"].split("ignored: ")[1].partition(";")[0]
    ignored = sum(map(int, re.findall(r" (\d+)(?: more)?(?:,|$)", said)))
    taken = int(re.search(r"all of its (\d+) tensors", info["found"])[1])
    assert taken == len(network.state_dict()) - (20 if layout == "no counters" else 0)
    assert ignored == len(linear_eval.tensors_in(saved)) - taken
    if layout == "lightly, CIFAR":  # three places for convolution, norm and nothing else
        network = copy.deepcopy(network)
        network.relu = torch.nn.Identity()
        assert "no max-pool and no ReLU" in info["found"]
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), network(images), rtol=1e-4, atol=1e-4)
    assert not encoder.training


def test_evaluating_somebody_elses_encoder(argv):
    """What is taken, ignored and assumed is said; flags say it better; the result has its name; a
    Namespace of settings does no harm."""
    network = trained_alike("resnet18", True)
    weights = below("module.backbone.", network.state_dict()) | below("module.projector.", HEAD)
    torch.save({"model": weights, "epoch": 12, "opt": argparse.Namespace(lr=1)}, "theirs.pth")
    argv[1] = "theirs.pth"
    table, figures = evaluate(*argv, "--protocol", "knn")
    assert ("theirs.pth: resnet18, small stem, under 'model.module.backbone.': all of its 120 "
            "tensors; ignored: model.module 3") in table  # fmt: skip
    assert any(line.startswith("assumed: image_size 16, mean (0.5") for line in table)  # the data's
    assert (figures["method"], figures["epoch"]) == ("theirs.pth", 12)
    assert json.loads(Path("knn_toy_theirs.json").read_text()) == figures
    given = "--mean 0.1 0.2 0.3 --std 1 1 1 --image-size 24".split()
    table, other = evaluate(*argv, "--protocol", "knn", *given)
    assert not any(line.startswith("assumed") for line in table)
    assert other["config"]["image_size"] == 24 and other["knn_top1"] != figures["knn_top1"]


def test_several_encoders_need_a_key(monkeypatch):
    weights = trained_alike("resnet18", False).state_dict()
    other = {name: value * 0.5 for name, value in weights.items()}

    def found(saved, **overrides):
        monkeypatch.setattr(common, "load_file", lambda path: saved)
        return linear_eval.load_encoder("two.pth", **overrides)

    two = below("left.", weights) | below("right.", other)
    with pytest.raises(common.InputError, match="several encoders, 'left.', 'right.*--key"):
        found(two)
    for key, expected in ("left", weights), ("right.", other):
        encoder, _ = found(two, key=key)
        assert torch.equal(encoder.conv1.weight, expected["conv1.weight"])
    with pytest.raises(common.InputError, match="--key middle is in none of 'left.', 'right.'"):
        found(two, key="middle")
    bare = weights | below("model.", other)
    for key, prefix in (".", ""), ("model", "model."):
        assert f"under '{prefix}'" in found(bare, key=key)[1]["found"]
    pair = {"student": weights, "teacher": other}
    for key, expected in (None, weights), ("teacher", other), ("student", weights):
        encoder, _ = found(pair, key=key)
        assert torch.equal(encoder.conv1.weight, expected["conv1.weight"])
    assert "'teacher.'" in found({"teacher": weights})[1]["found"]  # if there is nothing else


# --------------------------------------------------------------------------------------------------
# What is refused, each in one line


def changed(**change):
    """encoder.pt with some of the weights replaced, or removed where they are None."""
    saved = encoder_dict()
    weights = saved["state_dict"] | {k.replace("__", "."): v for k, v in change.items()}
    return saved | {"state_dict": {k: v for k, v in weights.items() if v is not None}}


def torchvisions(name):
    return getattr(torchvision.models, name)().state_dict()


class Payload:
    """Code that a file would run."""

    def __reduce__(self):
        return exec, ("open('payload', 'w')",)


NO_ENCODER = {
    "no weights": (lambda: {"state": 1}, "no convolution of three channels"),
    "a tensor": (lambda: torch.zeros(3), "no convolution"),
    "a list": (lambda: [1, 2], "no convolution"),
    "by number": (lambda: encoder_dict(state_dict={0: torch.zeros(2)}), "no convolution"),
    "a weight missing": (lambda: changed(bn1__running_mean=None), "1 tensors .* bn1.running_mean"),
    "a wrong shape": (lambda: changed(bn1__bias=torch.zeros(63)), "1 tensors .* bn1.bias"),
    "no tensor": (lambda: changed(bn1__bias="heavy"), "1 tensors .* bn1.bias"),
    "sparse": (lambda: changed(bn1__bias=torch.zeros(64).to_sparse()), "1 tensors .* bn1.bias"),
    "on meta": (lambda: changed(bn1__bias=torch.zeros(64, device="meta")), "1 tensors .* bn1.bias"),
    "gates": (lambda: changed(layer1__0__se__fc1=torch.zeros(4, 64)), "too many: layer1.0.se.fc1"),
    "biases": (lambda: changed(layer1__0__conv1__bias=torch.zeros(64)), "many: .*conv1.bias"),
    "half": (lambda: dict(list(encoder_dict()["state_dict"].items())[:60]), "50 tensors missing"),
    "152 layers": (lambda: torchvisions("resnet152"), "as a resnet101, .* too many: layer"),
    "wide": (lambda: torchvisions("wide_resnet50_2"), "as a resnet50, .* misshapen"),
    "not a ResNet": (lambda: torchvisions("vgg11"), "no whole encoder: as a resnet18"),
    "another arch": (lambda: encoder_dict(arch="resnet19"), "not 'resnet19'"),
    "arch of a wrong type": (lambda: encoder_dict(arch={}), "resnet18 by its weights, not {}"),
    "stem of a wrong type": (lambda: encoder_dict(stem=3), "stem is imagenet by .*, not 3"),
    "size": (lambda: encoder_dict(image_size="large"), "unusable .* size"),
    "a size without end": (lambda: encoder_dict(image_size=math.inf), "unusable .* size"),
    "half a pixel": (lambda: encoder_dict(image_size=32.5), "unusable .* size"),
    "one channel": (lambda: encoder_dict(mean=[0.5]), "unusable statistics"),
    "std of zero": (lambda: encoder_dict(std=[0.0] * 3), "unusable statistics"),
    "a mean beyond floats": (lambda: encoder_dict(mean=[10**400] * 3), "unusable statistics"),
    "a mean that is none": (lambda: encoder_dict(mean=[math.nan] * 3), "unusable statistics"),
    "a mean of words": (lambda: encoder_dict(mean="abc"), "unusable statistics"),
    "5000 digits": (lambda: {"9" * 5000 + ".weight": torch.zeros(2),
                             "0.weight": torch.zeros(64, 3, 7, 7)}, "no whole encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_ENCODER)
def test_what_is_no_encoder_is_refused(kind, monkeypatch):
    make, message = NO_ENCODER[kind]
    saved = make()
    monkeypatch.setattr(common, "load_file", lambda path: saved)
    with pytest.raises(common.InputError, match=f"^some.pt: .*{message}") as line:
        linear_eval.load_encoder("some.pt")
    assert "\n" not in str(line.value)


REFUSALS = {
    "--checkpoint nowhere.pt": "nowhere.pt: no such file",
    "--checkpoint text.pt": "text.pt",
    "--checkpoint code.pt": "code.pt: ",
    "--checkpoint half.pt": "half.pt: no whole encoder",
    "--checkpoint encoder.pt --arch resnet50": "resnet18 by its weights, not 'resnet50'",
    "--key middle": "--key middle is in none of 'state_dict.'",
    "--features projector": "encoder.pt: no projector",
    "--checkpoint random --features projector": "needs a checkpoint.pt",
    "--features projector --protocol finetune": "not for finetune",
    "--dataset no_test.pt": "no_test has no test split: hold images out",
    "--dataset nowhere": "nowhere",
    "--protocol logistic": "logistic",
    "--protoco knn": "--protoco",
    "--epochs 0": "--epochs",
    "--lr 0.1 -1": "--lr",
    "--crop-min 1.5": "--crop-min",
    "--label-fraction 0": "--label-fraction",
    "--label-fraction 0.02": "--label-fraction 0.02 leaves 4 classes without an image",
    "--validation-fraction 0.01": "--validation-fraction 0.01 leaves a part empty",
    "--validation-fraction 2": "--validation-fraction",
    "--seeds 0": "--seeds",
    "--image-size 4": "--image-size",
    "--protocol finetune --batch-size 1": "in batches of 1 are too few",
    "--cached --protocol knn": "--cached is for --protocol linear",
    "--lr 0.1 0.2 --protocol finetune": "several --lr are for --protocol linear",
    "--recipe s004 --protocol finetune": "--recipe s004 is for linear",
    "--recipe s001 --protocol knn": "--recipe s001 is for linear",
    "--recipe s005": "--recipe",
    "--map tsne": "--map is for --pictures",
    "--compare encoder.pt": "--compare is for --pictures",
    "--pictures --compare nowhere.pt": "nowhere.pt: no such file",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refusals(flags, argv, tmp_path):
    Path("text.pt").write_text("These are no weights.\n")
    torch.save({"model": Payload()}, "code.pt")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "half.pt")
    torch.save({key: value for key, value in toy().items() if key != "test"}, "no_test.pt")
    before = listing(tmp_path)
    assert REFUSALS[flags] in refused(*argv, *flags.split())
    assert listing(tmp_path) == before  # so no payload ran, either


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_what_is_not_installed_is_named_early(module, argv, tmp_path, monkeypatch):
    before, find = listing(tmp_path), linear_eval.importlib.util.find_spec
    absent = lambda name: None if name == module else find(name)  # noqa: E731
    monkeypatch.setattr(linear_eval.importlib.util, "find_spec", absent)
    name = {"sklearn": "scikit-learn"}.get(module, module)
    assert f"pip install {name}" in refused(*argv, "--pictures", "--map", "tsne")
    assert listing(tmp_path) == before
    if module == "matplotlib":  # everything else works without it
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert evaluate(*argv, *PROTOCOLS["knn"])[1]["knn_top1"] >= 0


def test_matplotlib_is_not_touched_outside_pictures():
    """No display, no global state: its object-oriented interface only."""
    assert "matplotlib.pyplot" not in Path(linear_eval.__file__).read_text()
    assert matplotlib.__version__
