"""linear_eval.py: what it prints and writes, that the encoder comes out as it went in, that nothing
is chosen on the test images, which files it takes for an encoder, and a problem that it must solve.
"""

import argparse
import copy
import functools
import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from test_scripts import CPU, Payload, call, fail, folder, listing, load, store, succeed, toy

import common
import linear_eval
from barlow_twins import BarlowTwins
from byol import BYOL
from carl_carp import CARLCARP
from common import load_file
from corinfomax import CorInfoMax
from simclr import SimCLR
from supcon_tcl import SupConTCL
from vicreg import VICReg

__all__ = ["folder"]  # a fixture
PROTOCOLS = {
    "linear": ["--protocol", "linear", "--epochs", "2"],
    "cached": ["--protocol", "linear", "--epochs", "2", "--cached"],
    "knn": ["--protocol", "knn"],
    "finetune": ["--protocol", "finetune", "--epochs", "2"],
}
FROZEN = ["linear", "cached", "knn"]
PROJECTORS = {
    "simclr": lambda b: SimCLR(b, 12, 6),
    "byol": lambda b: BYOL(b, 12, 6),
    "barlow_twins": lambda b: BarlowTwins(b, 12, 6),
    "vicreg": lambda b: VICReg(b, 12, 6),
    "supcon": lambda b: SupConTCL(b, 3, "supcon", 12, 6),
    "carl": lambda b: CARLCARP(b, 8, None, 12, 6),
    "corinfomax": lambda b: CorInfoMax(b, 12, 6),
}
PUBLIC_METHODS = {*PROJECTORS, "tcl", "tcl_self_supervised", "cross_entropy", "carp"}
SAME_ANYWHERE = [139, 281, 324, 356, 422]  # of torch's generator, which is the same on all CPUs


def encoder_dict(arch="resnet18", **change):
    """What a training script saves, of an encoder whose batch-norm statistics are not trivial."""
    torch.manual_seed(0)
    encoder = common.resnet(arch, "imagenet")
    encoder(torch.rand(8, 3, 16, 16) - 0.5)
    about = {"arch": arch, "stem": "imagenet", "image_size": 16, "method": "m", "dataset": "toy"}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3, "epoch": 7, "config": {}}
    return {"state_dict": encoder.state_dict()} | about | change


@pytest.fixture
def argv(folder):
    """Flags for an encoder and a dataset that are all right, in an empty folder."""
    store(encoder_dict(), "encoder.pt")
    store(toy(), "toy.pt")
    return ["--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU, "--no-untrained"]


def evaluate(*argv):
    """The table and the figures that are printed."""
    *table, last = succeed("linear_eval", *argv).splitlines()
    return table, json.loads(last)


# --------------------------------------------------------------------------------------------------
# What it prints and writes


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_output(protocol, argv, folder):
    before = listing(folder)
    table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--untrained")
    name = protocol.replace("cached", "linear")
    assert (figures["protocol"], figures["dataset"], figures["split"]) == (name, "toy", "test")
    assert (figures["method"], figures["epoch"], figures["images"]) == ("m", 7, 32)
    measured = {"knn_top1"} if protocol == "knn" else {"knn_top1", "top1", "top5"}
    assert measured <= figures.keys() and all(0 <= figures[key] <= 1 for key in measured)
    assert figures["knn_top5"] >= figures["knn_top1"]
    assert protocol == "knn" or figures["top5"] >= figures["top1"]
    rows = {re.split(r"  |,", line)[0]: line.split()[-2:] for line in table[-6:]}
    assert rows[""] == ["top-1", "top-5"] and rows["chance"] == ["25.00%", "100.00%"]
    assert rows["kNN"][0] == f"{figures['knn_top1']:.2%}"
    row = {"cached": "linear", "finetune": "finetuned"}.get(protocol, protocol)
    assert protocol == "knn" or rows[row][0] == f"{figures['top1']:.2%}"
    assert rows["untrained: kNN"][0] == f"{figures['untrained_knn_top1']:.2%}"
    if name == "linear":
        assert rows["untrained: linear"][0] == f"{figures['untrained_top1']:.2%}"
    written = folder / f"{name}_{'cached_' if protocol == 'cached' else ''}toy.json"
    assert json.loads(written.read_text()) == figures
    assert listing(folder).keys() - before.keys() == {written}


def test_an_untrained_encoder(argv, folder):
    argv[argv.index("encoder.pt")] = "random"
    first, second, other = (
        evaluate(*argv, "--protocol", "knn", "--stem", stem)[1]
        for stem in ("imagenet", "imagenet", "auto")
    )
    assert (first["method"], first["epoch"]) == ("untrained", 0)
    assert first["knn_top1"] == second["knn_top1"]
    assert other["config"]["stem"] == "small"  # what auto means for 16 pixels
    (written,) = folder.glob("runs/*/knn_toy.json")
    assert json.loads(written.read_text()) == other


def test_another_image_size(argv):
    table, figures = evaluate(*argv, *PROTOCOLS["linear"], "--image-size", "32")
    assert "32 pixels" in "\n".join(table) and figures["config"]["image_size"] == 32
    _, at_16 = evaluate(*argv, *PROTOCOLS["linear"])
    assert at_16["config"]["image_size"] == 16


# --------------------------------------------------------------------------------------------------
# That the encoder comes out as it went in


@pytest.mark.parametrize("protocol", FROZEN)
def test_encoder_is_not_changed(protocol, argv, folder, monkeypatch):
    loaded = []

    def remember(*args, **kwargs):
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", remember)
    before = Path("encoder.pt").read_bytes()
    evaluate(*argv, *PROTOCOLS[protocol])
    assert Path("encoder.pt").read_bytes() == before
    ((encoder, _),) = loaded
    expected = encoder_dict()["state_dict"]
    assert encoder.state_dict().keys() == expected.keys()
    for key, value in encoder.state_dict().items():  # parameters and batch-norm statistics
        assert torch.equal(value, expected[key]), key
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("protocol", FROZEN)
def test_an_encoder_left_in_training_mode_is_noticed(protocol, argv, folder, monkeypatch):
    def in_training_mode(*args, **kwargs):
        encoder, info = original(*args, **kwargs)
        encoder.train()
        encoder.train = lambda mode=True: encoder  # and eval() calls train(False)
        return encoder, info

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", in_training_mode)
    before = listing(folder)
    with pytest.raises(RuntimeError, match="encoder changed"):
        call("linear_eval", *argv, *PROTOCOLS[protocol])
    assert listing(folder) == before


def test_finetuning_changes_the_encoder_by_its_own_rate(argv, monkeypatch):
    """SGD with two rates, which fall to a fifth and a tenth after each quarter of the epochs."""
    loaded, rates, original = [], [], linear_eval.load_encoder

    def remember(*args, **kwargs):
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    class Recorded(torch.optim.SGD):
        def step(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args)

    monkeypatch.setattr(linear_eval, "load_encoder", remember)
    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    flags = ["--protocol", "finetune", "--epochs", "8", "--lr", "0.1", "--batch-size", "64"]
    evaluate(*argv, *flags)
    quarters = [[0.005 * 0.2**i, 0.1 * 0.1**i] for i in range(4) for _ in range(2)]
    assert rates == [pytest.approx(pair) for pair in quarters]
    evaluate(*argv, *flags, "--encoder-lr", "1e-9")
    before = encoder_dict()["state_dict"]["conv1.weight"]
    moved, still = [(e.conv1.weight - before).abs().max().item() for e, _ in loaded]
    assert moved > 1e-4 and still < 1e-6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_few_labels(protocol, argv, folder):
    """A quarter of 64 images, 4 of each class; the result has a name of its own."""
    table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--label-fraction", "0.25")
    assert (figures["label_fraction"], figures["labelled_images"]) == (0.25, 16)
    assert "labels of 16 of 64 training images, 0.25 of each" in table
    words = [figures["protocol"], "0.25", "cached" * (protocol == "cached"), "toy.json"]
    assert Path("_".join(filter(None, words))).exists() and len(list(folder.glob("*toy.json"))) == 1
    assert "16 training images: batches of 2" in table or protocol == "knn"
    line = fail("linear_eval", *argv, "--label-fraction", "0.02")
    assert "--label-fraction 0.02 leaves 4 classes without an image" in line


def test_one_percent_is_the_same_anywhere():
    labels = torch.arange(50_000) % 10
    split = common.Split(torch.arange(50_000), labels)
    few, again, other = (linear_eval.labelled(split, 0.01, 10, seed) for seed in (0, 0, 1))
    assert few.labels.bincount().tolist() == [50] * 10
    assert torch.equal(few.images, again.images) and not torch.equal(few.images, other.images)
    assert few.images[:5].tolist() == SAME_ANYWHERE


def test_finetuning_learns(folder):
    """What a linear classifier on this frozen, untrained encoder does not solve so well."""
    whole = common.load_dataset("shapes")
    parts = ("train", whole.train.spread(1000)), ("test", whole.test.spread(500))
    few = {key: {"images": part.images, "labels": part.labels} for key, part in parts}
    argv = ["--checkpoint", "random", "--stem", "imagenet", "--device", "cpu"]
    argv += ["--dataset", store(few | {"classes": whole.classes}, "few.pt"), "--crop-min", "0.4"]
    argv += ["--batch-size", "64"]
    frozen = evaluate(*argv, "--protocol", "linear", "--cached", "--epochs", "10")[1]
    tuned = evaluate(*argv, "--protocol", "finetune", "--epochs", "6", "--encoder-lr", "0.05")[1]
    assert tuned["top1"] > frozen["top1"] + 0.1


# --------------------------------------------------------------------------------------------------
# What the figures are measured on


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_validation_never_touches_the_test_images(protocol, argv, folder):
    """The same figures whatever the test split holds, and if there is none."""
    data, found = toy(), []
    noise = {"images": 255 - data["test"]["images"], "labels": data["test"]["labels"].flip(0)}
    for test in data["test"], noise, None:
        store(data | {"test": test}, "toy.pt")
        table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--validation-fraction", "0.25")
        assert figures["split"] == "validation" and "16 validation images" in "\n".join(table)
        found.append({key: figures.get(key) for key in ("top1", "top5", "knn_top1", "images")})
    assert found[0] == found[1] == found[2] and found[0]["images"] == 16


def test_held_out_images_are_not_trained_on(argv):
    """In noise the nearest neighbour of an image tells its class only where it is the image."""
    _, figures = evaluate(*argv, *PROTOCOLS["knn"], "--knn-k", "1", "--validation-fraction", "0.25")
    assert figures["knn_top1"] < 0.75


def separable():
    """Four classes of plain images, each with a brightness of its own."""
    data, rng = toy(), torch.Generator().manual_seed(0)
    for key in ("train", "test"):
        labels = data[key]["labels"]
        level = 20 + 70 * labels + torch.randint(-5, 6, labels.shape, generator=rng)
        data[key]["images"] = level.byte()[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return data


def test_a_separable_problem_is_solved(argv):
    store(separable(), "toy.pt")
    _, figures = evaluate(*argv, "--cached")
    assert (figures["top1"], figures["top5"]) == (1, 1)


def test_the_figure_is_the_last_epochs(argv, monkeypatch):
    """A last step far uphill spoils it; the best epoch, or any before, would show nothing."""
    store(separable(), "toy.pt")
    original = common.learning_rate

    def up_at_the_end(step, total, *rest):
        return original(step, total, *rest) if step < total - 1 else -1e6

    monkeypatch.setattr(common, "learning_rate", up_at_the_end)
    _, figures = evaluate(*argv, "--cached")
    assert figures["top1"] < 0.5


def test_figures_need_a_test_split(argv, folder):
    store({key: value for key, value in toy().items() if key != "test"}, "toy.pt")
    before = listing(folder)
    assert "no test split" in fail("linear_eval", *argv)
    assert listing(folder) == before


# --------------------------------------------------------------------------------------------------
# What stands beside the figure: an untrained encoder, other seeds, what the theses print


@pytest.mark.parametrize("protocol", ["knn", "cached"])
def test_the_untrained_encoder_is_what_random_gives(protocol, argv):
    """With the statistics of the data for the encoder's own, it sees what `random` sees."""
    data = common.load_dataset("toy.pt")
    store(encoder_dict(mean=list(data.mean), std=list(data.std)), "encoder.pt")
    argv = [*argv, *PROTOCOLS[protocol]]
    table, without = evaluate(*argv)
    assert "untrained_knn_top1" not in without and "untrained:" not in "\n".join(table)
    argv[-1 - len(PROTOCOLS[protocol])] = "--untrained"
    _, figures = evaluate(*argv)
    argv[argv.index("encoder.pt")] = "random"
    _, alone = evaluate(*argv, "--stem", "imagenet")
    assert figures["untrained_knn_top1"] == alone["knn_top1"]
    assert figures.get("untrained_top1") == alone.get("top1")
    assert "untrained_knn_top1" not in alone


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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_seeds_are_runs_of_their_own(protocol, argv, folder):
    """--seeds 2 at seed 5 has the figures of seed 5 and of seed 6, each alone."""
    flags = [*argv, *PROTOCOLS[protocol], "--label-fraction", "0.5"]
    table, figures = evaluate(*flags, "--seed", "5", "--seeds", "2")
    alone = [evaluate(*flags, "--seed", seed)[1] for seed in ("5", "6")]
    for key in {"knn_top1", "top1"} & figures.keys():
        assert figures[f"{key}_seeds"] == [each[key] for each in alone]
        assert figures[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2)
        half = figures[f"{key}_ci95"]
        assert half == pytest.approx(12.706 * abs(alone[0][key] - alone[1][key]) / 2)
        assert f"top-1 ± {half:.2%} (95 %; 2 evaluations of one encoder)" in "\n".join(table)
    assert alone[0] != alone[1] and "knn_top1_ci95" not in alone[0]


def said(method, dataset, trained_on, **flags):
    args = argparse.Namespace(protocol="linear", arch="resnet18", label_fraction=1.0)
    vars(args).update(flags)
    return linear_eval.published({"method": method, "dataset": trained_on}, dataset, args)


FEW, TENTH = ({"protocol": "finetune", "label_fraction": share} for share in (0.01, 0.1))
LARGE = {"arch": "resnet50"}
CELLS = [  # read off the theses' tables once more
    (("corinfomax", "cifar10"), {}, "S003", [(0.9318, 0.9988)]),
    (("vicreg", "cifar100"), {}, "S003", [(0.6854, 0.9083)]),
    (("barlow_twins", "imagenet100"), {}, "S003", [(0.8038, 0.9528)]),
    (("corinfomax", "tiny_imagenet"), LARGE, "S003", [(0.5486, None)]),
    (("corinfomax", "imagenet100"), LARGE, "S003", [(0.8264, None)]),
    (("vicreg", "imagenet"), LARGE, "S003", [(0.686, None)]),
    (("corinfomax", "imagenet"), LARGE | FEW, "S003", [(0.4489, None)]),
    (("vicreg", "imagenet"), LARGE | TENTH, "S003", [(0.6216, None)]),
    (("tcl", "fashion_mnist"), LARGE, "S004", [(0.957, None)]),
    (("supcon", "imagenet100"), {}, "S004", [(0.859, None)]),
    (("tcl", "cifar100"), {}, "S004", [(0.775, None)]),
    (("tcl_self_supervised", "cifar10"), {}, "S004", [(0.918, None)]),
    (("carl", "imagenet64"), {}, "S001", [(0.3186, None)]),
    (("carl", "stl10"), FEW, "S001", [(0.5226, None)]),
    (("byol", "stl10"), TENTH, "S001", [(0.657, None)]),
    (("simclr", "stl10"), {"protocol": "finetune"}, "S001", [(0.8697, None)]),
    (("carp", "imagenet"), LARGE, "S001", [(0.686, 0.885), (0.701, 0.894)]),
    (("byol", "imagenet"), LARGE, "S001", [(0.743, None)]),
    (("carl", "imagenet"), LARGE | FEW, "S001", [(None, 0.726)]),
    (("barlow_twins", "imagenet"), LARGE | TENTH, "S001", [(None, 0.893)]),
    (("carp", "imagenet"), LARGE | FEW, "S001", [(None, 0.745), (None, 0.771)]),
    (("simclr", "cifar10"), {}, "S002", [(0.7691, None)]),
    (("simclr", "cifar10"), {}, "S000", [(0.846, 0.994)]),
    (("simclr", "cifar10"), LARGE, "S000", [(0.862, 0.997)]),
]


@pytest.mark.parametrize("what, flags, source, pairs", CELLS)
def test_published_figures(what, flags, source, pairs):
    """The same dataset, architecture, protocol and share of the labels."""
    method, dataset = what
    rows = [row for row in said(*what, dataset, **flags) if row[3].startswith(source)]
    assert [row[1:3] for row in rows] == pairs and {row[0] for row in rows} == {method}


def test_published_figures_are_for_the_same_setting():
    ((_, top1, top5, setting),) = said("carl", "cifar100", "cifar10")
    assert (top1, top5) == (0.4347, None) and "transfer" in setting
    assert said("carl", "cifar10", "stl10") == said("simclr", "toy", "toy") == []
    assert said("simclr", "cifar10", "cifar10", arch="resnet34") == []
    assert said("carl", "fashion_mnist", "fashion_mnist", **LARGE) == []  # not other methods'
    rows = said("theirs.pth", "cifar10", None)
    assert {"simclr", "byol", "carl", "tcl_self_supervised"} <= {row[0] for row in rows}
    assert all(row[3].startswith("trained on cifar10; ") for row in rows)


def test_the_published_table_is_well_formed():
    for setting, protocol, arch, share, figures in linear_eval.PUBLISHED:
        assert re.match(r"S00\d", setting) and protocol in linear_eval.PROTOCOLS
        assert arch in common.ARCHITECTURES and share in (1, 0.1, 0.01)
        for name, methods in figures.items():
            assert set(name.split(" to ")) <= set(common.DATASETS)
            for method, accuracy in methods.items():
                pair = accuracy if isinstance(accuracy, tuple) else (accuracy, 100)
                assert method in PUBLIC_METHODS and 20 < (pair[0] or 20.1) <= pair[1] <= 100


def test_published_figures_are_printed_with_their_setting(argv):
    store(toy(), "cifar10.pt")
    store(encoder_dict(method="corinfomax", dataset="cifar10"), "encoder.pt")
    argv[argv.index("toy.pt")] = "cifar10.pt"
    table, figures = evaluate(*argv, *PROTOCOLS["cached"])
    (row,) = (line for line in table if line.startswith("published: corinfomax"))
    assert row.split()[2:4] == ["93.18%", "99.88%"] and "1000 epochs" in row
    assert figures["published"][0][:3] == ["corinfomax", 0.9318, 0.9988]
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--validation-fraction", "0.25")
    assert figures["published"] == [] and "published" not in "\n".join(table[:-1])


def test_neighbours_vote_alike_for_every_seed(argv):
    """So with all labels theirs has no interval; and k of them vote for k classes at most."""
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--seeds", "2", "--knn-k", "2")
    assert "knn_top1_ci95" not in figures and "top1_ci95" in figures
    assert figures["knn_top5"] is None
    (row,) = (line for line in table if line.startswith("kNN, k = 2"))
    assert row.split()[-1] == "-"


# --------------------------------------------------------------------------------------------------
# Learning rates and recipes


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


RECIPE_RATES = {"s003": (0.2, 0.002, 0), "s004": (0.5, 0.0005, 1e-4)}


@pytest.mark.parametrize("recipe", RECIPE_RATES)
def test_recipes(recipe, argv, rates):
    """S003 5.2.5: .2 to .002 by cosine, no decay. S004 A.3: from .5, and as in the released code to
    a thousandth of it with a decay of 1e-4. Both for 100 epochs."""
    _, figures = evaluate(*argv, "--cached", "--recipe", recipe)
    first, last, decay = RECIPE_RATES[recipe]
    assert len(rates) == 100 and rates[0] == [(pytest.approx(first), decay)]
    assert rates[50] == [(pytest.approx((first + last) / 2), decay)]  # half of a cosine
    assert last < rates[99][0][0] < last + first * 1e-3
    assert figures["config"]["standardize"] is False


def test_the_recipe_of_fifty_epochs(argv):
    for protocol in "linear", "finetune":
        flags = ["--protocol", protocol, "--recipe", "s001"]
        with mock.patch.object(sys, "argv", ["linear_eval.py", *argv, *flags]):
            assert linear_eval.arguments().epochs == 50


def test_features_are_standardised_unless_told_otherwise(argv, monkeypatch):
    seen = []
    original = linear_eval.fit_linear

    def remember(batches, *rest):
        seen.append(torch.cat([h for h, _ in batches(1)]))
        return original(batches, *rest)

    monkeypatch.setattr(linear_eval, "fit_linear", remember)
    flags = [*argv, *PROTOCOLS["cached"], "--batch-size", "64"]
    for flag in ["--standardize"], [], ["--no-standardize"]:
        evaluate(*flags, *flag)
    standard, default, plain = seen
    assert torch.equal(standard, default)
    alive = plain.std(0) > plain.std(0).mean() / 50
    torch.testing.assert_close(standard.mean(0), torch.zeros(512), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0)[alive], torch.ones(int(alive.sum())))
    assert (plain >= 0).all()  # what comes after a ReLU


def test_several_rates_do_not_influence_each_other(monkeypatch):
    args = argparse.Namespace(device="cpu", momentum=0.9, weight_decay=1e-3, epochs=2, lr_floor=0.1)
    args.batch_size = 8
    rng = torch.Generator().manual_seed(0)
    h, y = torch.randn(32, 5, generator=rng), torch.arange(32) % 3

    def batches(epoch):
        return zip(h.split(8), y.split(8), strict=True)

    def fitted(rates):
        return linear_eval.fit_linear(batches, 5, 3, 4, rates, args)

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


def test_a_rate_is_chosen_on_held_out_training_images(argv, folder):
    """One rate that learns nothing, one that does, one that diverges: the one that does; whatever
    the test images are; a tenth of each class is held out, and then learnt, too."""
    data = separable()
    lines = []
    for labels in data["test"]["labels"], (data["test"]["labels"] + 1) % 4:
        store(data | {"test": data["test"] | {"labels": labels}}, "toy.pt")
        flags = ["--cached", "--epochs", "10", "--batch-size", "16", "--lr", "1e30", "1e-9", "0.1"]
        table, figures = evaluate(*argv, *flags)
        lines += [line for line in table if line.startswith("--lr on 8 held-out")]
        assert figures["top1"] == float(labels is data["test"]["labels"])
        assert figures["config"]["lr"] == [1e30, 1e-9, 0.1] and figures["lr"] == 0.1
        found = figures["lr_validation"]
        assert found.keys() == {"1e+30", "1e-09", "0.1"} and max(found, key=found.get) == "0.1"
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].endswith("taken: 0.1")
    few = fail("linear_eval", *argv, *flags, "--label-fraction", "0.06")
    assert "4 training images are too few to compare several --lr" in few


# --------------------------------------------------------------------------------------------------
# The projector, transfer, odd datasets


def our_checkpoint(model):
    about = {key: value for key, value in encoder_dict().items() if key != "state_dict"}
    return {"model": model.state_dict()} | about


@pytest.mark.parametrize("name", PROJECTORS)
def test_features_of_the_projector(name, folder):
    torch.manual_seed(0)
    model = PROJECTORS[name](common.resnet("resnet18", "imagenet"))
    images = torch.rand(4, 3, 16, 16)
    after = model.projector if hasattr(model, "projector") else model.head
    for _ in range(3):  # batch-norm statistics that are not trivial
        after(model.backbone(torch.randn(8, 3, 16, 16)))
    store(our_checkpoint(model), "checkpoint.pt")
    both, info = linear_eval.load_encoder("checkpoint.pt", features="projector")
    model.eval()
    with torch.no_grad():
        expected = after(model.backbone(images))
        torch.testing.assert_close(both(images), expected)
        encoder, _ = linear_eval.load_encoder("checkpoint.pt")
        torch.testing.assert_close(encoder(images), model.backbone(images))
    assert both.num_features == expected.shape[1] == 6
    assert not both.training and "then the projector" in info["found"]


def test_evaluating_the_projector(argv, folder):
    torch.manual_seed(0)
    model = PROJECTORS["simclr"](common.resnet("resnet18", "imagenet"))
    store(our_checkpoint(model), "checkpoint.pt")
    argv[1] = "checkpoint.pt"
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--features", "projector")
    assert figures["features"] == "projector" and ", projector, " in "\n".join(table)
    assert json.loads((folder / "linear_projector_cached_toy.json").read_text()) == figures
    _, of_encoder = evaluate(*argv, *PROTOCOLS["cached"])
    assert of_encoder["top1"] != figures["top1"] or of_encoder["knn_top1"] != figures["knn_top1"]


def test_no_projector_is_said(argv, folder):
    flag = ["--features", "projector"]
    assert "encoder.pt: no projector" in fail("linear_eval", *argv, *flag)
    network = trained_alike("resnet18", False)
    theirs = below("backbone.", network.state_dict()) | below("projector.", HEAD)
    store(theirs, "theirs.pth")
    assert "no projector" in fail("linear_eval", "--checkpoint", "theirs.pth", *argv[2:], *flag)
    classifier = PROJECTORS["supcon"](common.resnet("resnet18", "imagenet"))
    classifier.head = torch.nn.Linear(512, 4)
    odd = PROJECTORS["simclr"](common.resnet("resnet18", "imagenet"))
    odd.projector[1] = torch.nn.LayerNorm(12)
    for model, message in (classifier, "no projector"), (odd, "is none of ours"):
        store(our_checkpoint(model), "checkpoint.pt")
        argv[1] = "checkpoint.pt"
        assert message in fail("linear_eval", *argv, *flag)
    random = ["--checkpoint", "random", *argv[2:]]
    assert "needs a checkpoint.pt" in fail("linear_eval", *random, *flag)
    assert "not for finetune" in fail("linear_eval", *argv, *flag, "--protocol", "finetune")


def test_images_of_another_size_are_brought_to_the_encoders(argv):
    """Of 24 pixels, more than the encoder's 16, the central 21 (7/8) are resized; of 8, all."""
    for size, cut in (24, "21x21"), (8, "8x8"), (16, None):
        store(toy(size=size), "toy.pt")
        table, _ = evaluate(*argv, *PROTOCOLS["knn"])
        said = [line for line in table if line.startswith(f"toy: {size}x{size} pixels")]
        expected = f"toy: {size}x{size} pixels, of which the central {cut} are resized to the 16"
        assert said == ([f"{expected} of the encoder"] if cut else [])


def test_transfer_keeps_the_encoders_statistics(argv, monkeypatch):
    """Images that are brighter by a constant are so for the encoder, too."""
    seen, original = [], common.evaluation_view

    def remember(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(common, "evaluation_view", remember)
    data = toy()
    dark = {key: data[key] | {"images": data[key]["images"] // 2} for key in ("train", "test")}
    bright = {key: dark[key] | {"images": dark[key]["images"] + 100} for key in dark}
    for some in dark, bright:
        store(data | some, "toy.pt")
        evaluate(*argv, *PROTOCOLS["knn"])
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b - a, torch.full_like(a, 100 / 255 / 0.25))  # by its deviation


def test_a_class_without_images(argv):
    data = toy()
    labels = torch.where(data["train"]["labels"] == 2, 1, data["train"]["labels"])
    store(data | {"train": data["train"] | {"labels": labels}}, "toy.pt")
    line = fail("linear_eval", *argv, *PROTOCOLS["knn"])
    assert "toy: 1 of 4 classes have no training image" in line and line.endswith(": c\n")
    labels = data["test"]["labels"].clamp(max=1)
    store(data | {"test": data["test"] | {"labels": labels}}, "toy.pt")
    table, _ = evaluate(*argv, *PROTOCOLS["knn"])
    assert "toy: 2 of 4 classes have no test image: c, d" in table
    for split, folders in ("train", "ab"), ("val", "abc"):  # as folders
        for name in folders:
            Path("tree", split, name).mkdir(parents=True)
            TF.to_pil_image(data["train"]["images"][0]).save(f"tree/{split}/{name}/0.png")
    argv[argv.index("toy.pt")] = "tree"
    line = fail("linear_eval", *argv, *PROTOCOLS["knn"])
    assert "tree/val has 1 classes that tree/train has not: c" in line


def test_a_test_folder_without_classes(argv):
    """As ImageNet's own: its test images have no labels, val is taken."""
    for split, count in ("train", 8), ("val", 2):
        for i, name in enumerate("ab"):
            Path("tree", split, name).mkdir(parents=True)
            for j in range(count):
                image = toy()["train"]["images"][8 * j + i]
                TF.to_pil_image(image).save(f"tree/{split}/{name}/{j}.png")
    Path("tree/test").mkdir()
    TF.to_pil_image(image).save("tree/test/0.png")
    argv[argv.index("toy.pt")] = "tree"
    table, figures = evaluate(*argv, *PROTOCOLS["knn"])
    assert figures["images"] == 4
    assert "note: tree/test has no folders of classes: tree/val is taken" in table


def test_labels_out_of_range(argv):
    data = toy()
    store(data | {"test": data["test"] | {"labels": data["test"]["labels"] + 1}}, "toy.pt")
    assert "test labels run from 1 to 4, but there are 4 classes" in fail("linear_eval", *argv)


# --------------------------------------------------------------------------------------------------
# Pictures (test_pictures.py has what is in them)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pictures(protocol, argv, folder, monkeypatch):
    """Four whole pictures; the matrix counts what the figure counts; a run's projections come from
    its checkpoint.pt, if that has the same encoder."""
    given = {}

    def remember(original, what, *rest):
        given[original.__name__] = what
        return original(what, *rest)

    for name in "spectrum_picture", "confusion_picture":
        original = getattr(linear_eval, name)
        monkeypatch.setattr(linear_eval, name, functools.partial(remember, original))
    torch.manual_seed(0)
    model = PROJECTORS["simclr"](common.resnet("resnet18", "imagenet"))
    store(our_checkpoint(model), "checkpoint.pt")
    store(encoder_dict(state_dict=model.backbone.state_dict()), "encoder.pt")
    Path("other").mkdir()
    store(encoder_dict(), "other/encoder.pt")
    store(our_checkpoint(model), "other/checkpoint.pt")
    flags = [*argv, *PROTOCOLS[protocol], "--pictures", "--compare", "other/encoder.pt"]
    _, figures = evaluate(*flags)
    for name in "neighbors", "map", "spectrum", "confusion":
        with Image.open(f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 300
    counts = given["confusion_picture"]
    assert counts.sum() == 32 and counts.sum(1).tolist() == [8] * 4
    top1 = figures["knn_top1" if protocol == "knn" else "top1"]
    assert counts.diag().sum() / 32 == pytest.approx(top1)
    panels = given["spectrum_picture"]
    names = [[label.split(",")[0] for label, _ in lines] for lines in panels.values()]
    assert names == [["untrained resnet18", "m", "m"], ["m"]]  # the other has another encoder
    assert [len(values) for _, values in panels["representations"]] == [512] * 3
    ((_, values),) = panels["projections"]
    images = common.load_dataset("toy.pt").test.images
    x = common.evaluation_view(images, 16, [0.5] * 3, [0.25] * 3)
    model.eval()
    with torch.no_grad():
        expected = torch.linalg.eigvalsh(model.projector(model.backbone(x)).T.double().cov())
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-9)


def test_the_spectrum_is_of_what_was_evaluated(argv, folder, monkeypatch):
    """At the size and with the statistics that were given; an untrained encoder can be compared."""
    given = []
    original = linear_eval.spectrum_picture
    monkeypatch.setattr(linear_eval, "spectrum_picture", lambda curves, title: (
        given.append(curves), original(curves, title))[1])  # fmt: skip
    flags = "--image-size 24 --mean 0.1 0.2 0.3 --std 1 2 3 --pictures".split()
    evaluate(*argv, *PROTOCOLS["knn"], *flags)
    images = common.load_dataset("toy.pt").test.images
    x = common.evaluation_view(images, 24, [0.1, 0.2, 0.3], [1, 2, 3])
    encoder, _ = linear_eval.load_encoder("encoder.pt")
    with torch.no_grad():
        expected = torch.linalg.eigvalsh(encoder(x).T.double().cov())[-8:]
    (panels,) = given
    _, (_, values) = panels["representations"]
    torch.testing.assert_close(values[-8:], expected, rtol=1e-3, atol=0)
    argv[argv.index("encoder.pt")] = "random"
    evaluate(
        *argv, *PROTOCOLS["knn"], "--stem", "imagenet", "--pictures", "--compare", "encoder.pt"
    )
    labels = [label for label, _ in given[1]["representations"]]
    assert labels == ["untrained resnet18", "m, epoch 7"]


def test_pictures_of_what_is_not_there(argv, folder, monkeypatch):
    before = listing(folder)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    for flags, message in {
        "--pictures --map tsne": "scikit-learn",
        "--map tsne": "--map is for --pictures",
        "--compare encoder.pt": "--compare is for --pictures",
        "--pictures --compare nowhere.pt": "nowhere.pt: no such file",
    }.items():
        assert message in fail("linear_eval", *argv, *PROTOCOLS["knn"], *flags.split())
    assert listing(folder) == before


# --------------------------------------------------------------------------------------------------
# What is an encoder


def test_load_encoder_takes_both_files_of_a_run(folder):
    argv = ["--dataset", store(toy(), "toy.pt"), *CPU, "--stem", "imagenet", "--knn-every", "0"]
    succeed("simclr", *argv, "--epochs", "1", "--batch-size", "64", "--out", "run")
    images = torch.rand(4, 3, 16, 16)
    pairs = [linear_eval.load_encoder(f"run/{name}.pt") for name in ("encoder", "checkpoint")]
    (encoder, info), (other, other_info) = pairs
    assert not encoder.training and not other.training
    with torch.no_grad():
        assert torch.equal(encoder(images), other(images))
        assert encoder(images).shape == (4, 512)
    for about, where in (info, "state_dict."), (other_info, "model.backbone."):
        assert f"under '{where}': all of its 120 tensors" in about.pop("found")
    assert info == other_info and info["assumed"] == []
    known = {"arch": "resnet18", "stem": "imagenet", "image_size": 16, "epoch": 1}
    known |= {"method": "simclr", "dataset": "toy"}
    assert {key: info[key] for key in known} == known
    assert info["mean"] == load("run/encoder.pt")["mean"] and len(info["std"]) == 3


def test_overrides_win(folder):
    store(encoder_dict(stem="small", mean=[0.1] * 3), "encoder.pt")
    with pytest.raises(common.InputError):
        linear_eval.load_encoder("encoder.pt")
    given = {"stem": "imagenet", "mean": [0.2] * 3, "image_size": 24}
    encoder, info = linear_eval.load_encoder("encoder.pt", **given)
    assert {key: info[key] for key in given} == given and info["std"] == [0.25] * 3
    assert encoder.conv1.kernel_size == (7, 7)


# Layouts of public code, as far as their files can be told apart: what is around the encoder, how
# its tensors are called, and what must not be taken for it.


def torchvision_names(weights):
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


HEAD = {"0.weight": torch.zeros(8, 512), "0.bias": torch.zeros(8), "2.weight": torch.zeros(4, 8)}
STATE = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}


def with_copy(original, copy):
    """An encoder under one prefix, and another one, with other values, which is not to be taken."""

    def made(weights):
        other = {name: value * 0.5 for name, value in weights.items()}
        return below(original, weights) | below(copy, other) | below("projector.", HEAD)

    return made


LAYOUTS = {  # small stem?, how the tensors are called, what is around them
    "torchvision": (False, torchvision_names, lambda w: w | {"fc.weight": torch.zeros(5, 512)}),
    "barlow twins": (False, torchvision_names, lambda w: {"epoch": 9, "optimizer": STATE,
                     "model": below("module.backbone.", w) | below("module.projector.", HEAD)}),
    "lightly, Lightning": (False, sequential(4), lambda w: {"state_dict": below("backbone.", w)
                           | below("projection_head.layers.", HEAD), "hyper_parameters": {}}),
    "lightly, ImageNet": (False, torchvision_names, lambda w: {
        "state_dict": with_copy("backbone._orig_mod.", "teacher_backbone.")(w)}),
    "lightly, DINO": (False, torchvision_names, lambda w: {
        "state_dict": with_copy("student_backbone.", "backbone.")(w)}),
    "lightly, CIFAR": (True, lambda w: sequential(2)(shortcut(w)), lambda w: {"state_dict":
                       below("backbone.", w)}),
    "lightly, tutorial": (False, sequential(4), lambda w: {"resnet18_parameters": w}),
    "solo-learn": (True, torchvision_names, lambda w: {"epoch": 3, "optimizer_states": [STATE],
                   "state_dict": with_copy("backbone.", "momentum_backbone.")(w)}),
    "SupContrast": (True, shortcut, lambda w: {"opt": argparse.Namespace(lr=0.5), "epoch": 2,
                    "model": below("encoder.module.", w) | below("head.", HEAD)}),
    "Tuned-Contrastive": (True, shortcut, lambda w: {"net": w | below("model.", w)
                          | below("head.", HEAD), "acc": 0.9, "save_epoch": 4}),
    "corinfomax": (True, torchvision_names, lambda w: {"model_state_dict": below("backbone.", w),
                   "optimizer_state_dict": STATE, "parameters_dict": {"lr": 1}, "loss": 0.1}),
    "carp": (False, torchvision_names, lambda w: {"args": argparse.Namespace(arch="r"),
             "student": below("module.backbone.", w) | below("module.head.", HEAD),
             "teacher": below("module.backbone.", {k: v * 0.5 for k, v in w.items()})}),
    "leftthomas": (True, sequential(3), lambda w: below("f.", w) | below("g.", HEAD)
                   | {"f.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}),
    "sthalles": (False, torchvision_names, lambda w: {"epoch": 200, "arch": "resnet18",
                 "state_dict": below("backbone.", w) | below("backbone.fc.", HEAD)}),
    "PyTorch-BYOL": (False, sequential(4), lambda w: {
        "online_network_state_dict": below("encoder.", w) | below("projetion.", HEAD),
        "target_network_state_dict": below("encoder.", {k: v * 0.5 for k, v in w.items()})}),
    "byol-pytorch": (False, torchvision_names, lambda w: below("net.", w)
                     | with_copy("online_encoder.net.", "target_encoder.net.")(w)),
    "MoCo": (False, torchvision_names, lambda w: {"arch": "resnet50", "state_dict":
             with_copy("module.encoder_q.", "module.encoder_k.")(w)
             | {"module.queue": torch.zeros(8, 9)}}),
    "MoCo v3": (False, torchvision_names, lambda w: {"state_dict":
                with_copy("module.base_encoder.", "module.momentum_encoder.")(w)}),
    "W-MSE": (True, torchvision_names, lambda w: below("model.module.", w) | below("head.", HEAD)),
    "stable-pretraining": (True, torchvision_names, lambda w: {"state_dict":
                           with_copy("backbone.student.", "backbone.teacher.")(w)}),
}  # fmt: skip


@functools.cache
def trained_alike(arch, small):
    """A ResNet of torchvision, its batch-norm statistics not trivial."""
    torch.manual_seed(1)
    network = getattr(torchvision.models, arch)()
    network.fc = torch.nn.Identity()
    if small:
        network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = torch.nn.Identity()
    network(torch.rand(8, 3, 32, 32) - 0.5)
    return network.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts(layout, arch, folder):
    small, naming, wrap = LAYOUTS[layout]
    network, images = trained_alike(arch, small), torch.rand(2, 3, 32, 32)
    store(wrap(naming(network.state_dict())), "theirs.pth")
    encoder, info = linear_eval.load_encoder("theirs.pth")
    assert (info["arch"], info["stem"]) == (arch, "small" if small else "imagenet")
    assert info["assumed"] == ["image_size", "mean", "std"]
    assert f"all of its {len(network.state_dict())} tensors" in info["found"]
    whole = linear_eval.tensors_in(load_file("theirs.pth"))
    said = info["found"].split("ignored: ")[1].partition(";")[0]
    ignored = sum(map(int, re.findall(r" (\d+)(?: more)?(?:,|$)", said)))
    assert ignored == len(whole) - len(network.state_dict())
    if layout == "lightly, CIFAR":  # three places for convolution, norm and nothing else
        network = copy.deepcopy(network)
        network.relu = torch.nn.Identity()
        assert "no max-pool and no ReLU" in info["found"]
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), network(images), rtol=1e-4, atol=1e-4)
    assert not encoder.training
    Path("theirs.pth").unlink()


def test_evaluating_somebody_elses_encoder(argv, folder):
    """What is taken, ignored and assumed is said; flags say it better; the result has its name."""
    network = trained_alike("resnet18", True)
    weights = below("module.backbone.", network.state_dict()) | below("module.projector.", HEAD)
    store({"model": weights, "epoch": 12}, "theirs.pth")
    argv[argv.index("encoder.pt")] = "theirs.pth"
    table, figures = evaluate(*argv, "--protocol", "knn")
    assert table[1] == ("theirs.pth: resnet18, small stem, under 'model.module.backbone.': all of "
                        "its 120 tensors; ignored: model.module 3")  # fmt: skip
    assert table[2].startswith("assumed: image_size 16, mean (0.5")  # the dataset's
    assert (figures["method"], figures["epoch"]) == ("theirs.pth", 12)
    assert json.loads((folder / "knn_toy_theirs.json").read_text()) == figures
    given = "--mean 0.1 0.2 0.3 --std 1 1 1 --image-size 24".split()
    table, other = evaluate(*argv, "--protocol", "knn", *given)
    assert not any(line.startswith("assumed") for line in table)
    assert other["config"]["image_size"] == 24 and other["knn_top1"] != figures["knn_top1"]


def test_several_encoders_need_a_key(folder):
    weights = trained_alike("resnet18", False).state_dict()
    other = {name: value * 0.5 for name, value in weights.items()}
    store(below("left.", weights) | below("right.", other), "two.pth")
    with pytest.raises(common.InputError, match="several encoders, 'left.', 'right.*--key"):
        linear_eval.load_encoder("two.pth")
    for key, expected in ("left", weights), ("right", other):
        encoder, info = linear_eval.load_encoder("two.pth", key=key)
        assert torch.equal(encoder.state_dict()["conv1.weight"], expected["conv1.weight"])
        assert f"under '{key}.'" in info["found"]
    with pytest.raises(common.InputError, match="--key middle is in none of 'left.', 'right.'"):
        linear_eval.load_encoder("two.pth", key="middle")
    store({"EMA": weights, "student": weights | {"bn1.weight": torch.zeros(3)}}, "half.pth")
    with pytest.raises(common.InputError, match="'student.' has 1 .*--key EMA takes"):
        linear_eval.load_encoder("half.pth")
    assert "under 'EMA.'" in linear_eval.load_encoder("half.pth", key="EMA")[1]["found"]
    store(weights | below("model.", other), "bare.pth")
    for key, prefix in (".", ""), ("model", "model."):
        assert f"under '{prefix}'" in linear_eval.load_encoder("bare.pth", key=key)[1]["found"]
    small = trained_alike("resnet18", True).state_dict()
    store(below("a.", weights) | below("b.", small), "stems.pth")
    assert "under 'b.'" in linear_eval.load_encoder("stems.pth", stem="small")[1]["found"]
    circle = below("encoder.", weights)
    store(circle | {"itself": circle}, "circle.pth")
    linear_eval.load_encoder("circle.pth")
    store({"teacher": weights}, "copy.pth")  # if there is nothing else
    encoder, _ = linear_eval.load_encoder("copy.pth")
    assert torch.equal(encoder.state_dict()["conv1.weight"], weights["conv1.weight"])


def test_refusals_say_what_was_found(folder):
    weights = trained_alike("resnet18", False).state_dict()
    store({"model": {k: v for k, v in weights.items() if "layer4.1.bn2" not in k}}, "part.pth")
    with pytest.raises(common.InputError, match="under 'model.' has 4 tensors missing.*bn2"):
        linear_eval.load_encoder("part.pth")
    store(torchvision.models.resnet152().state_dict(), "deep.pth")
    with pytest.raises(common.InputError, match="3, 8, 36, 3 bottleneck blocks under ''"):
        linear_eval.load_encoder("deep.pth")
    store({"model": weights, "config": Payload()}, "code.pth")
    with pytest.raises(common.InputError, match=r"holds [\w.]+, which is no plain") as line:
        linear_eval.load_encoder("code.pth")
    assert "\x1b" not in str(line.value)
    store(weights, "whole.pth")
    with pytest.raises(common.InputError, match="arch is resnet18 by its weights, not 'resnet50'"):
        linear_eval.load_encoder("whole.pth", arch="resnet50")


def without(key):
    saved = encoder_dict()
    del saved[key]
    return saved


def other_weights(**change):
    """encoder.pt with some of the weights replaced, or removed where they are None."""
    saved = encoder_dict()
    for key, value in change.items():
        saved["state_dict"][key.replace("__", ".")] = value
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if v is not None}
    return saved


NO_ENCODER = {
    "text": lambda: b"These are no weights.\n",
    "nothing": lambda: b"",
    "code": lambda: encoder_dict() | {"config": Payload()},
    "no weights": lambda: without("state_dict"),
    "a weight missing": lambda: other_weights(bn1__running_mean=None),
    "a wrong shape": lambda: other_weights(conv1__weight=torch.zeros(64, 3, 3, 3)),
    "a weight that is none": lambda: other_weights(conv1__weight="heavy"),
    "weights by number": lambda: encoder_dict(state_dict={0: torch.zeros(2)}),
    "model by number": lambda: without("state_dict") | {"model": {0: torch.zeros(2)}},
    "another architecture's": lambda: encoder_dict(arch="resnet34") | {"arch": "resnet18"},
    "unknown architecture": lambda: encoder_dict() | {"arch": "resnet19"},
    "arch of a wrong type": lambda: encoder_dict() | {"arch": {}},
    "stem of a wrong type": lambda: encoder_dict() | {"stem": 3},
    "image size of a wrong type": lambda: encoder_dict() | {"image_size": "large"},
    "mean of one channel": lambda: encoder_dict() | {"mean": [0.5]},
    "std of zero": lambda: encoder_dict() | {"std": [0.0] * 3},
    "a plain dict": lambda: {"state": 1},
    "with gates": lambda: other_weights(layer1__0__se__fc1__weight=torch.zeros(4, 64)),
    "with biases": lambda: other_weights(layer1__0__conv1__bias=torch.zeros(64)),
    "a size without end": lambda: encoder_dict(image_size=float("inf")),
    "a size of half a pixel": lambda: encoder_dict(image_size=32.5),
    "a mean beyond floats": lambda: encoder_dict(mean=[10**400] * 3),
    "a mean that is none": lambda: encoder_dict(mean=[float("nan")] * 3),
    "a number of 5000 digits": lambda: {
        "9" * 5000 + ".weight": torch.zeros(2),
        "0.weight": torch.zeros(64, 3, 7, 7),
    },
    "152 layers": lambda: torchvision.models.resnet152().state_dict(),
    "half an encoder": lambda: dict(list(encoder_dict()["state_dict"].items())[:60]),
    "a wide one": lambda: torchvision.models.wide_resnet50_2().state_dict(),
    "not a ResNet": lambda: torchvision.models.vgg11().state_dict(),
    "a sparse weight": lambda: other_weights(conv1__weight=torch.zeros(64, 3, 7, 7).to_sparse()),
    "a weight without numbers": lambda: other_weights(bn1__weight=torch.zeros(64, device="meta")),
    "a tensor": lambda: torch.zeros(3),
    "a list": lambda: [1, 2],
}


@pytest.mark.parametrize("kind", NO_ENCODER)
def test_what_is_no_encoder_is_refused(kind, folder):
    store(toy(), "toy.pt")
    value = NO_ENCODER[kind]()
    if isinstance(value, bytes):
        Path("encoder.pt").write_bytes(value)
    else:
        store(value, "encoder.pt")
    before = listing(folder)
    line = fail("linear_eval", "--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU)
    assert "encoder.pt" in line
    with pytest.raises(common.InputError, match="encoder.pt"):
        linear_eval.load_encoder("encoder.pt")
    assert listing(folder) == before  # so no payload ran, either


BAD_FLAGS = {
    "--checkpoint nowhere.pt": "nowhere.pt: no such file",
    "--protocol logistic": "logistic",
    "--protoco knn": "--protoco",
    "--epochs 0": "--epochs",
    "--lr -1": "--lr",
    "--crop-min 1.5": "--crop-min",
    "--label-fraction 0": "--label-fraction",
    "--protocol finetune --batch-size 1": "in batches of 1 are too few",
    "--cached --protocol knn": "--cached is for --protocol linear",
    "--recipe s004 --protocol finetune": "--recipe s004 is for linear",
    "--recipe s001 --protocol knn": "--recipe s001 is for linear",
    "--lr 0.1 0.2 --protocol finetune": "several --lr are for --protocol linear",
    "--recipe s005": "--recipe",
    "--seeds 0": "--seeds",
    "--lr 0.1 -1": "--lr",
    "--validation-fraction 1": "--validation-fraction",
    "--validation-fraction 0.01": "--validation-fraction",
    "--validation-fraction 2": "--validation-fraction",
    "--image-size 4": "--image-size",
    "--dataset nowhere": "nowhere",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, argv, folder):
    before = listing(folder)
    assert BAD_FLAGS[flags] in fail("linear_eval", *argv, *flags.split())
    assert listing(folder) == before
