"""linear_eval.py: what it prints, writes and draws, that the encoder comes out as it went in, that
nothing is chosen on the test images, which files it takes for an encoder, what it refuses."""

import argparse
import collections
import copy
import functools
import io
import itertools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import CPU, call, fail, noise, succeed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from test_common import rng
from test_data import fill
from test_losses import MODELS

import common
import linear_eval

PROTOCOLS = {
    "linear": ["--protocol", "linear", "--epochs", "2"],
    "cached": ["--protocol", "linear", "--epochs", "2", "--cached"],
    "knn": ["--protocol", "knn"],
    "finetune": ["--protocol", "finetune", "--epochs", "2"],
}
PICTURES = "neighbors", "map", "spectrum", "confusion"


def evaluate(*argv):
    """The table and the figures that are printed."""
    *table, last = succeed("linear_eval", *argv).splitlines()
    return table, json.loads(last)


def by_brightness(labels, size=16):
    """Plain images from which the label is easily told."""
    level = 60 * labels + torch.arange(len(labels)) % 41
    return level.byte()[:, None, None, None].expand(-1, 3, size, size).clone()


@functools.cache
def trained_alike(arch, small):
    """A ResNet of torchvision, its batch-norm statistics not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = getattr(torchvision.models, arch)()
        network.fc = torch.nn.Identity()
        if small:
            network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
            network.maxpool = torch.nn.Identity()
        network(torch.rand(8, 3, 16, 16) - 0.5)
    return network.eval()


def encoder_dict(**change):
    """What a training script saves, of an encoder whose batch-norm statistics are not trivial."""
    about = {"arch": "resnet18", "stem": "imagenet", "image_size": 16, "method": "m", "epoch": 7}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3, "dataset": "toy", "config": {}}
    return {"state_dict": trained_alike("resnet18", False).state_dict()} | about | change


@pytest.fixture(scope="session")
def run(tiny_run, toy_file, tmp_path_factory):
    """By protocol, what an evaluation of tiny_run's encoder printed and wrote; .folder holds the
    files. Only to be read."""
    folder, found = tmp_path_factory.mktemp("evaluated"), {}
    for name in "encoder.pt", "checkpoint.pt":
        shutil.copy(tiny_run / name, folder)
    flags = ["--checkpoint", folder / "encoder.pt", "--dataset", toy_file, *CPU]
    for protocol, words in PROTOCOLS.items():
        before, drawn = set(folder.rglob("*")), ["--pictures"] * (protocol == "cached")
        table, figures = evaluate(*flags, *words, *drawn)
        new = set(folder.rglob("*")) - before
        found[protocol] = types.SimpleNamespace(table=table, figures=figures, new=new)
    original = (tiny_run / "encoder.pt").read_bytes()
    assert (folder / "encoder.pt").read_bytes() == original
    return types.SimpleNamespace(folder=folder, **found)


@pytest.fixture
def argv(tiny_run, toy_file, tmp_path, monkeypatch):
    """Flags for an encoder and a dataset that are all right, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in "encoder.pt", "checkpoint.pt":
        Path(name).symlink_to(tiny_run / name)
    shutil.copy(toy_file, "toy.pt")
    return ["--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU, "--no-untrained"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_output(protocol, run):
    shown = getattr(run, protocol)
    name, figures = protocol.replace("cached", "linear"), shown.figures
    assert (figures["protocol"], figures["dataset"], figures["split"]) == (name, "toy", "test")
    assert (figures["method"], figures["epoch"], figures["images"]) == ("simclr", 2, 32)
    rows = {re.split(r"  |,|:", line)[0]: re.findall(r"\S+%", line) for line in shown.table}
    assert rows["chance"] == ["25.00%", "100.00%", "25.00%"] and rows["majority"] == ["25.00%"]
    keys = "top1", "top5", "balanced_top1"
    assert rows["kNN"] == [f"{figures[f'knn_{key}']:.2%}" for key in keys]
    row = {"finetune": "finetuned"}.get(name, name)
    assert name == "knn" or rows[row] == [f"{figures[key]:.2%}" for key in keys]
    untrained = [line for line in shown.table if line.startswith("untrained: ")]
    assert f" {figures['untrained_knn_top1']:.2%} " in untrained[0]
    assert name != "linear" or f" {figures['untrained_top1']:.2%} " in untrained[1]
    sizes = "toy: 64 training images, 4 classes, 32 test images, 16x16 pixels, in memory"
    assert sizes in shown.table
    rank = next(line for line in shown.table if line.startswith("rank: "))
    assert f"use {figures['rank']:.1f} of 512 directions" in rank
    assert rows["pixels"][0] == f"{figures['pixel_knn_top1']:.2%}"
    written = run.folder / f"{name}_{'cached_' * (protocol == 'cached')}toy.json"
    assert json.loads(written.read_text()) == figures
    pictures = {run.folder / f"{name}.png" for name in PICTURES if protocol == "cached"}
    classifier = {written.with_name(f"{written.stem}_classifier.pt")} if name == "linear" else set()
    assert shown.new == {written} | pictures | classifier
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 400


def test_baselines_by_hand(run, toy_file):
    """Neighbours among pixels as the encoder sees them, with as many votes as among features; the
    rank of features is that in a run's log."""
    data = common.load_dataset(toy_file)
    encoder, info = linear_eval.load_encoder(run.folder / "encoder.pt")
    sides = [common.evaluation_view(split.images, 16, info["mean"], info["std"])
             for split in (data.train, data.test)]  # fmt: skip
    bank, x = (side.flatten(1) for side in sides)
    scores = common.knn_scores(bank, data.train.labels, x, 4, run.knn.figures["knn_k"])
    right = (scores.argmax(1) == data.test.labels).double().mean()
    with torch.no_grad():
        rank = common.collapse_figures(encoder(sides[1]))["rank"]
    for protocol in PROTOCOLS:
        figures = getattr(run, protocol).figures
        assert figures["pixel_knn_top1"] == pytest.approx(float(right))
        assert figures["rank"] == pytest.approx(rank, rel=1e-3)


STEMS = {
    "as saved": None,
    "small": {"stem": "small"},
    "of others": {"stem": "small", "stem_padding": 2, "stem_max_pool": True, "stem_relu": False},
    "7x7": {"stem": "imagenet", "stem_padding": 2, "stem_max_pool": False},
}


@pytest.mark.parametrize("stem", STEMS)
def test_the_front_page_shows_how_to_use_it(stem, run, tmp_path, monkeypatch, capsys):
    """Its code, as written: features as common.py's, the classifier's predictions as measured."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(run.folder / "encoder.pt", "encoder.pt")
    if STEMS[stem]:
        weights = linear_eval.network({"arch": "resnet18"} | STEMS[stem]).state_dict()
        torch.save(encoder_dict(**STEMS[stem], state_dict=weights), "encoder.pt")
    shutil.copy(run.folder / "linear_cached_toy_classifier.pt", "linear_cifar10_classifier.pt")
    Path("my_images").mkdir()
    test = common.load_dataset(run.cached.figures["config"]["dataset"]).test
    for i, image in enumerate(test.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"my_images/{i:02}.png")
    image = torch.rand(1, 3, 3, 5, generator=common.generator(0, "wide", 0))
    wide = torch.nn.functional.interpolate(image, (24, 40), mode="bicubic")
    wide = (255 * wide.clamp(0, 1)).byte()
    Image.fromarray(wide[0].permute(1, 2, 0).numpy()).save("my_images/wide.png")
    page = (Path(linear_eval.__file__).parent / "README.md").read_text()
    found = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], found)
    encoder, info = linear_eval.load_encoder("encoder.pt")
    with torch.no_grad():
        h = encoder(common.evaluation_view(test.images, 16, info["mean"], info["std"]))
        middle = encoder(common.evaluation_view(wide, 16, info["mean"], info["std"]))[0]
    torch.testing.assert_close(found["h"][:-1], h, rtol=1e-3, atol=1e-3)
    assert (found["h"][-1] - middle).norm() < 0.01 * middle.norm()  # rounded by Pillow
    named = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    right = [name == "abcd"[label] for (_, name), label in zip(named, test.labels, strict=True)]
    assert STEMS[stem] or sum(right) / 32 == pytest.approx(run.cached.figures["top1"])


@pytest.mark.parametrize("protocol", ["linear", "cached", "knn"])
def test_an_encoder_left_in_training_mode_is_noticed(protocol, argv, tmp_path, monkeypatch):
    """So every evaluation that ends has left the encoder as it was, to the bit."""

    def in_training_mode(*args, **kwargs):
        encoder, info = original(*args, **kwargs)
        encoder.train()
        encoder.train = lambda mode=True: encoder  # and eval() calls train(False)
        return encoder, info

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", in_training_mode)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="encoder changed"):
        call("linear_eval", *argv, *PROTOCOLS[protocol])
    assert set(tmp_path.rglob("*")) == before


def test_the_untrained_encoder_is_what_random_gives(argv, run):
    """The run's statistics are those of its data, so it sees what `random` sees."""
    argv[1] = "random"
    _, alone = evaluate(*argv, *PROTOCOLS["cached"], "--stem", "imagenet")
    beside = run.cached.figures
    assert beside["untrained_knn_top1"] == alone["knn_top1"]
    assert beside["untrained_top1"] == alone["top1"]
    assert not [key for key in alone if "untrained" in key]
    assert (alone["method"], alone["epoch"]) == ("untrained", 0)
    (written,) = Path("runs").glob("*/*toy.json")
    assert json.loads(written.read_text()) == alone


def test_validation_never_touches_the_test_images(argv):
    """The same figures whatever the test split holds, and if there is none. In noise the nearest
    neighbour tells a class only where it is the image, so none was both held out and trained on."""
    data, found = noise(), []
    argv += [*PROTOCOLS["cached"], "--validation-fraction", "0.25", "--knn-k", "1"]
    other = {"images": 255 - data["test"]["images"], "labels": data["test"]["labels"].flip(0)}
    for test in other, None:
        torch.save(data | {"test": test}, "toy.pt")
        table, figures = evaluate(*argv)
        assert figures["split"] == "validation" and "16 validation images" in "\n".join(table)
        found.append([figures[key] for key in ("top1", "top5", "knn_top1", "images")])
    assert found[0] == found[1] and found[0][-1] == 16 and figures["knn_top1"] < 0.75
    assert Path("linear_cached_validation_toy.json").exists()


def test_finetuning_learns(argv):
    data = noise()
    for split in data["train"], data["test"]:
        split["images"] = by_brightness(split["labels"])
    torch.save(data, "toy.pt")
    flags = "--protocol finetune --epochs 12 --batch-size 16 --encoder-lr 0.05".split()
    assert evaluate(*argv, *flags)[1]["top1"] > 0.9


def test_few_labels(argv):
    """A quarter of 64 images, 4 of each class; the result has a name of its own."""
    table, figures = evaluate(*argv, *PROTOCOLS["cached"], "--label-fraction", "0.25")
    assert (figures["label_fraction"], figures["labelled_images"]) == (0.25, 16)
    assert "labels of 16 of 64 training images, 0.25 of each" in table
    assert "16 training images: batches of 2" in table
    assert Path("linear_0.25_cached_toy.json").exists()
    split = common.Split(torch.arange(50_000), torch.arange(50_000) % 10)
    few = linear_eval.labelled(split, 0.01, 10, 0)
    assert few.labels.bincount().tolist() == [50] * 10
    assert few.images[:5].tolist() == [139, 281, 324, 356, 422]  # as torch's generator has it


UNEVEN = torch.tensor([0] * 90 + [1] * 7 + [2] * 3)  # for a hundred images


def test_small_classes_count(argv):
    """On separable classes of 90, 7 and 3 % of 600 images: neighbours of the majority alone must
    not outvote the others, and the balanced figure is the mean of the classes'."""
    data = {"classes": list("abc")}
    for split, n in ("train", 600), ("test", 200):
        labels = UNEVEN.repeat(n // 100)
        data[split] = {"images": by_brightness(labels, 8), "labels": labels}
    torch.save(data, "toy.pt")
    table, figures = evaluate(*argv, *PROTOCOLS["knn"], "--image-size", "8")
    assert figures["majority"] == 0.9
    assert re.search(r"majority: the largest class +90.00%", "\n".join(table))
    assert figures["knn_k"] == 9 and figures["knn_balanced_top1"] > 0.8
    scores = torch.eye(3)[torch.tensor([0] * 97 + [2] * 3)]  # the second class never
    assert linear_eval.balanced(scores, UNEVEN) == pytest.approx(2 / 3)


def test_the_interval_over_seeds():
    """Student's t between minus and plus its half width has 95 % of the density."""
    for n in range(2, 11):
        column = torch.randn(n, generator=rng(n), dtype=torch.float64)
        mean, half = linear_eval.mean_and_interval(column.tolist())
        assert mean == pytest.approx(float(column.mean()))
        t, degrees = half * n**0.5 / float(column.std()), n - 1
        x = torch.linspace(-t, t, 100_001, dtype=torch.float64)
        inside = torch.trapezoid((1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)
        whole = (degrees * math.pi) ** 0.5 * math.gamma(degrees / 2) / math.gamma(n / 2)
        assert float(inside) / whole == pytest.approx(0.95, abs=1e-4)
    assert linear_eval.mean_and_interval([0.5]) == (0.5, None)


def test_seeds_are_runs_of_their_own(argv):
    """--seeds 2 at seed 5 has the figures of seed 5 and of seed 6, each alone; with all labels
    neighbours vote alike for every seed; and k of them vote for k classes at most."""
    flags = [*argv, *"--protocol finetune --epochs 1 --label-fraction 0.5".split()]
    table, figures = evaluate(*flags, "--seed", "5", "--seeds", "2")
    alone = [evaluate(*flags, "--seed", seed)[1] for seed in ("5", "6")]
    for key in "knn_top1", "top1":
        assert figures[f"{key}_seeds"] == [each[key] for each in alone]
        assert figures[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2)
        half = figures[f"{key}_ci95"]
        assert half == pytest.approx(12.706 * abs(alone[0][key] - alone[1][key]) / 2)
        assert f"top-1 ± {half:.2%} (95 %; 2 evaluations of one encoder)" in "\n".join(table)
    assert alone[0] != alone[1] and "knn_top1_ci95" not in alone[0]
    _, figures = evaluate(*argv, *PROTOCOLS["cached"], "--seeds", "2", "--knn-k", "2")
    assert "knn_top1_ci95" not in figures and "top1_ci95" in figures
    assert figures["knn_top5"] is None


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


def test_finetuning_has_two_rates_in_steps(argv, rates, monkeypatch):
    """They fall to a fifth and a tenth after each quarter of the epochs."""
    loaded = linear_eval.load_encoder("encoder.pt")
    monkeypatch.setattr(linear_eval, "load_encoder", lambda *_, **overrides: loaded)
    before = loaded[0].conv1.weight.clone()
    flags = "--protocol finetune --epochs 4 --lr 0.1 --batch-size 64".split()
    evaluate(*argv, *flags, "--encoder-lr", "1e-9")
    expected = [[1e-9 * 0.2**i, 0.1 * 0.1**i] for i in range(4)]
    found = [[rate for rate, _ in groups] for groups in rates]
    assert found == [pytest.approx(pair) for pair in expected]
    moved = (loaded[0].conv1.weight - before).abs().max()
    assert 0 < moved < 1e-6  # at its own rate, not the classifier's


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


def test_features_are_standardised_unless_told_otherwise(argv, monkeypatch):
    seen, original = [], linear_eval.fit

    def note(loss, batches, *rest):
        seen.append(torch.cat([h for h, _ in batches(1)]))
        return original(loss, batches, *rest)

    monkeypatch.setattr(linear_eval, "fit", note)
    for protocol, flag in itertools.product(("cached", "linear"), ([], ["--no-standardize"])):
        evaluate(*argv, *PROTOCOLS[protocol], *flag)
    standard, plain, augmented, plain_augmented = seen
    alive = plain.std(0) > plain.std(0).mean() / 50
    torch.testing.assert_close(standard.mean(0), torch.zeros(512), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0)[alive], torch.ones(int(alive.sum())))
    expected = (plain_augmented - plain.mean(0)) / plain.std(0)  # of images without augmentation
    torch.testing.assert_close(augmented[:, alive], expected[:, alive], rtol=1e-3, atol=1e-3)


def test_s003_sees_the_middle_of_small_images(argv, monkeypatch):
    """B.1.2: of 16 pixels as of any other size 7/8, brought to 16; without the recipe, all. The
    spectrum is of the same."""
    seen, original = [], common.evaluation_view
    curves = mock.Mock()
    monkeypatch.setattr(linear_eval, "spectrum_picture", curves)
    monkeypatch.setattr(linear_eval, "write_pictures", lambda pictures, folder: None)
    monkeypatch.setattr(common, "evaluation_view", lambda *a: seen.append(a[0]) or original(*a))
    images = common.load_dataset("toy.pt").test.images
    for flags, expected in ("--recipe s003", images[:, :, 1:15, 1:15]), ("", images):
        _, figures = evaluate(*argv, *PROTOCOLS["cached"], *flags.split(), "--pictures")
        assert any(torch.equal(x, expected) for x in seen)
        _, rank = curves.call_args[0][0]["representations"]["simclr, epoch 2"]
        assert rank == pytest.approx(figures["rank"], rel=1e-4)
        seen.clear()


@pytest.mark.parametrize(
    "flags, method, epochs, batch, lr, crop_min, pad, policy",
    [
        ("--protocol finetune", "m", 20, 256, 0.2, 0.08, 0, ""),
        ("--protocol finetune --recipe s001", "m", 50, 256, 0.2, 0.08, 0, ""),
        ("--recipe s001", "m", 50, 256, 0.02, 0.08, 0, ""),
        ("--dataset shapes", "m", 20, 256, 0.02, 0.4, 0, ""),
        ("", "m", 100, 256, 0.02, 0.08, 0, ""),
        ("--recipe s004", "tcl_self_supervised", 100, 256, 0.5, 0.08, 0, ""),  # A.3
        ("--recipe s004", "tcl", 50, 128, 0.5, 0.08, 4, "cifar10"),  # A.1
        ("--recipe s004 --cached", "tcl", 50, 128, 0.5, 0.08, 0, ""),  # of images as they are
        ("--recipe=s004 --dataset cifar100", "supcon", 50, 256, 0.5, 0.08, 4, "cifar10"),
        ("--recipe s004 --dataset fashion_mnist", "supcon", 50, 128, 0.5, 0.08, 4, ""),
    ],
)
def test_presets(flags, method, epochs, batch, lr, crop_min, pad, policy, argv, capsys):
    other = {name: value * 0.5 for name, value in encoder_dict()["state_dict"].items()}
    about = {"method": method, "config": {"self_supervised": method not in ("tcl", "supcon")}}
    torch.save(encoder_dict(**about, std=[0.0] * 3) | {"other": other}, "mine.pt")
    argv += "--checkpoint mine.pt --key state_dict --std 1 1 1".split()  # without, refused
    with mock.patch.object(sys, "argv", ["linear_eval.py", *argv, *flags.split()]):
        args = linear_eval.arguments()
    said = "--cached: features of images as they are, without --augment autoaugment\n"
    assert (said in capsys.readouterr().out) == args.cached
    assert [args.epochs, args.batch_size, args.lr, args.crop_min] == [epochs, batch, lr, crop_min]
    args.image_size, args.batch_size, data = 16, 8, common.load_dataset("toy.pt")
    with mock.patch.object(common, "Augment", wraps=common.Augment) as augment:
        views, labels = next(linear_eval.augmented(data, 1, args))
    (recipe,) = augment.call_args[0][0]
    assert [recipe.pad, recipe.policy, recipe.jitter_p] == [pad, policy, 0]
    assert views.shape == (8, 3, 16, 16) and recipe.scale == (crop_min, 1.0)


@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "supcon"])
def test_features_of_the_projector(name, monkeypatch):
    """With batch norm, without biases, without batch norm."""
    torch.manual_seed(0)
    model = MODELS[name](common.resnet("resnet18", "imagenet"))
    # So that batch norm's statistics are not trivial:
    model.projector(model.backbone(torch.randn(8, 3, 16, 16)))
    saved = encoder_dict(model=model.state_dict())
    del saved["state_dict"]  # our checkpoint.pt has none
    monkeypatch.setattr(linear_eval, "read", lambda path: saved)
    both, info = linear_eval.load_encoder("checkpoint.pt", features="projector")
    model.eval()
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(both(images), model.projector(model.backbone(images)))
    assert both.num_features == 6 and not both.training and "then the projector" in info["found"]


def test_transfer_keeps_the_encoders_size_and_statistics(argv, monkeypatch):
    seen, original = [], common.evaluation_view
    monkeypatch.setattr(common, "evaluation_view", lambda *a: seen.append(a[1:]) or original(*a))
    torch.save(encoder_dict(), "mine.pt")
    torch.save(noise(size=24), "toy.pt")
    table, _ = evaluate(*argv, *PROTOCOLS["knn"], "--checkpoint", "mine.pt")
    assert "toy: 24 pixels, seen at the 16 of the encoder" in table
    assert seen and all(given == (16, [0.5] * 3, [0.25] * 3) for given in seen)
    seen.clear()
    evaluate(*argv, *PROTOCOLS["knn"], *"--checkpoint random --mean .1 .2 .3 --std 1 2 3".split())
    assert seen and all(given == (24, [0.1, 0.2, 0.3], [1, 2, 3]) for given in seen)


def plain(n, size=8):
    """n images of one colour each, no two the same."""
    colors = torch.tensor([(3 + 7 * i % 251, 101 + i // 251, 61) for i in range(n)])
    return colors.view(n, 3, 1, 1).expand(n, 3, size, size) / 255


def test_nearest_by_brute_force():
    test, train = torch.randn(30, 6, generator=rng()), torch.randn(50, 6, generator=rng(1))
    labels = torch.arange(30) % 3
    scale = torch.arange(1, 51)[:, None] ** 2  # the cosine does not see it
    chosen, nearest = linear_eval.nearest_images(test, labels, train * scale, rows=7, count=4)
    assert chosen.shape == (7,) and nearest.shape == (7, 4)
    for i, found in zip(chosen.tolist(), nearest.tolist(), strict=True):
        cosines = torch.nn.functional.cosine_similarity(test[i : i + 1], train)
        assert found == sorted(range(50), key=lambda k, cosines=cosines: -float(cosines[k]))[:4]
    labels = torch.arange(400).mul(7) % 100  # test images are spread over the classes
    chosen, _ = linear_eval.nearest_images(torch.randn(400, 6, generator=rng()), labels, train)
    assert labels[chosen].tolist() == list(range(0, 100, 10))


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def words(figure):
    return " ".join(" ".join(texts(figure)).split())


ODD = ["a $1 \\alpha$ bill", "\u72ac \udc80 \x07", "_under", "", "an animal that has four legs"]


@pytest.mark.filterwarnings("error:Glyph")
def test_odd_names_are_legible():
    """They are drawn, headings whole and within the picture, and names do not overlap; a class
    whose name the font lacks has its number."""
    images, labels = plain(30), torch.arange(30) % 5
    some = images[:5], labels[:5], images[5:].unflatten(0, (5, 5)), labels[5:].view(5, 5)
    last = ODD, "A heading \u72ac of many words, such as this. " * 4
    for figure in (
        linear_eval.neighbors_picture(*some, *last),
        linear_eval.confusion_picture(torch.eye(5).long(), *last),
        linear_eval.map_picture(images, labels, torch.rand(30, 2), ["x", "y"], *last),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = canvas.get_width_height()
        assert words(figure).count("many words,") == 4
        assert {"class 1", "_under", "class 3"} <= set(texts(figure))
        names = [text.get_window_extent() for text in figure.axes[0].texts]
        for box in itertools.chain(names, (text.get_window_extent() for text in figure.texts)):
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
        assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))
    assert linear_eval.short(["x" * 40, "\u72ac"], 24) == ["x" * 23 + "\u2026", "class 1"]


def test_neighbours_are_framed_and_named():
    images, mine = plain(8), torch.tensor([1, 0])
    train_labels, names = torch.tensor([[1, 0, 1], [1, 0, 2]]), ["ant", "bee", "cat"]
    given = images[:2], mine, images[2:].unflatten(0, (2, 3)), train_labels
    figure = linear_eval.neighbors_picture(*given, names, "Title")
    (axes,) = figure.axes
    for number, i in enumerate((0, 2, 3, 4, 1, 5, 6, 7)):  # each test image before its neighbours
        assert np.allclose(axes.images[number].get_array()[0, 0], images[i, :, 0, 0], atol=0.01)
    labels = [mine[0], *train_labels[0], mine[1], *train_labels[1]]
    assert [text.get_text() for text in axes.texts[:8]] == [names[label] for label in labels]
    for frame, right in zip(axes.patches, [True, False, True, False, True, False], strict=True):
        color = linear_eval.BLUE if right else linear_eval.ORANGE
        assert to_hex(frame.get_edgecolor()) == color
        assert (frame.get_linestyle() in ("-", "solid")) == right  # not by colour alone
    assert "Title" in texts(figure) and "3 of these 6, 50%" in words(figure)


def test_map():
    """Images at their first principal components, none upon another, framed by class."""
    pytest.importorskip("sklearn")
    features = torch.randn(300, 6, generator=rng()) * torch.tensor([9, 5, 1, 1, 1, 1]) + 4
    points, names = linear_eval.two_dimensions(features, argparse.Namespace(map="pca"))
    u, s, _ = np.linalg.svd((features - features.mean(0)).numpy(), full_matrices=False)
    for i in 0, 1:
        assert abs(np.corrcoef(points[:, i], u[:, i])[0, 1]) > 0.9999
        assert names[i].endswith(f" {s[i] ** 2 / (s**2).sum():.0%} of the variance")
    tsne = argparse.Namespace(map="tsne", seed=0)
    for found in points, linear_eval.two_dimensions(features[:50], tsne)[0]:
        assert found.shape[1] == 2 and found.min() == 0 and found.max() == 1
    images, labels = plain(300), torch.arange(300) % 3
    (axes,) = linear_eval.map_picture(images, labels, points, names, list("abc"), "Title").axes
    places = [image.get_extent()[::2] for image in axes.images]
    assert 20 < len(places) < 300
    for image, frame, place in zip(axes.images, axes.patches, places, strict=True):
        (i,) = [i for i, point in enumerate(points.tolist()) if np.allclose(point, place)]
        assert np.allclose(image.get_array()[0, 0], images[i, :, 0, 0], atol=0.01)
        assert to_hex(frame.get_edgecolor()) == to_hex(f"C{labels[i]}")
        assert list(frame.get_xy()) == list(place)
    for (a, b), (x, y) in itertools.combinations(places, 2):
        assert max(abs(a - x), abs(b - y)) > axes.patches[0].get_width()


def test_spectra_are_drawn_to_a_common_scale():
    shares = torch.tensor([10, 1, 0.1], dtype=torch.float64) / 11.1
    low = torch.cat([10.0 ** -torch.arange(31.0).double(), torch.zeros(9).double()])
    curves = {"h": {"x": (shares, 1.5), "y": (low, 2.5)}, "z": {"y": (shares, 3.5)}}
    figure = linear_eval.spectrum_picture(curves, "Title")
    first, second = figure.axes
    assert first.get_yscale() == "log" and first.get_ylim() == second.get_ylim()
    x, x_rank, y, y_rank = first.get_lines()
    assert x.get_xdata().tolist() == [1, 2, 3] and np.allclose(x.get_ydata(), shares)
    assert np.allclose(y.get_ydata(), low.clamp(min=1e-10), atol=0)  # ten decades at most
    assert [*x_rank.get_xdata(), *y_rank.get_xdata()] == [1.5, 1.5, 2.5, 2.5]
    assert x.get_color() != y.get_color() and x.get_linestyle() != y.get_linestyle()
    assert second.get_lines()[0].get_color() == y.get_color()  # the same label, the same colour
    assert {"Title", "h", "z", "x: rank 1.5 of 3"} <= set(texts(figure))
    assert "A fast fall: few directions carry all" in words(figure)


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
    assert len(axes.texts) == 15  # none for nothing
    assert [label.get_text() for label in axes.get_yticklabels()] == list("abcd")
    assert f"Title: {(60 + 900 + 43 + 70) / 1300:.1%} of 1300 images correct" in words(figure)
    counts = torch.diag(torch.arange(50) * 1000)  # of many, the most confused
    for k in range(20, 40):
        counts[k, 0] = counts[1, k] = 3
    figure = linear_eval.confusion_picture(counts, [f"class_{i}" for i in range(50)], "")
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == [f"class_{k}" for k in (0, 1, *range(20, 38))]  # the first of equals
    assert "Of 50 classes the 20 most confused" in words(figure)


def test_curves(tmp_path, monkeypatch):
    """Of what each log has, by epoch, written to the first folder; no dataset is looked for."""
    monkeypatch.chdir(tmp_path)
    logs = {"new": [{"epoch": 1, "loss": 3, "z_std": 0.5, "z_rank": 7}, {"epoch": 2, "loss": -1}]}
    logs["old"] = [{"epoch": 4, "loss": 2, "knn_top1": 0.25}]
    for name, log in logs.items():
        Path(name).mkdir()
        Path(name, "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    assert succeed("linear_eval --curves new old/").splitlines()[-1] == "new/curves.png"
    assert Image.open("new/curves.png").format == "PNG"
    figure = linear_eval.curves_picture(["new", "old/"])
    found = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes]
    assert found == [[[[1, 3], [2, -1]], [[4, 2]]], [[[4, 0.25]]], [[[1, 0.5]]], [[[1, 7]]]]
    assert {"new", "old", "loss", "epoch"} <= set(texts(figure))
    for content, message in ("", " is empty"), ("{", ": not a readable log"):
        Path("old/log.jsonl").write_text(content)
        assert f"old/log.jsonl{message}" in fail("linear_eval --curves new old")
    assert "nowhere/log.jsonl: no such file" in fail("linear_eval --curves nowhere")


def test_pictures_show_what_was_measured(argv, tiny_run, monkeypatch):
    """The matrix counts what the figure counts; spectra are of the encoder as it was saved, at the
    size and with the statistics that were given, and of the same run's projector."""
    drawn = {}
    for kind in "confusion", "spectrum", "neighbors", "map":
        note = lambda *given, kind=kind: drawn.update({kind: given})  # noqa: E731
        monkeypatch.setattr(linear_eval, f"{kind}_picture", note)
    monkeypatch.setattr(linear_eval, "write_pictures", lambda pictures, folder: None)
    argv += [*PROTOCOLS["finetune"], *"--image-size 24 --mean .1 .2 .3 --std 1 2 3".split()]
    Path("other").mkdir()
    torch.save(encoder_dict(), "other/encoder.pt")
    Path("other/checkpoint.pt").symlink_to(Path("checkpoint.pt").resolve())
    Path("again").symlink_to(tiny_run)
    _, figures = evaluate(*argv, "--pictures", "--compare", "other/encoder.pt", "again")
    counts = drawn["confusion"][0]
    assert counts.sum(1).tolist() == [8] * 4
    assert float(counts.diag().sum()) / 32 == pytest.approx(figures["top1"])
    of = "simclr, epoch 2, toy, before fine-tuning"
    assert drawn["neighbors"][-1] == f"{of}: nearest neighbours"
    (curves, _), mine = drawn["spectrum"], "simclr, epoch 2"
    others = ["m, epoch 7, other/encoder.pt", f"{mine}, again/encoder.pt"]
    assert list(curves["representations"]) == ["untrained resnet18", mine, *others]
    assert list(curves["projections"]) == [mine, others[1]]  # beside the other is not its own
    images = common.load_dataset("toy.pt").test.images
    x = common.evaluation_view(images, 24, [0.1, 0.2, 0.3], [1, 2, 3])
    both, _ = linear_eval.load_encoder("checkpoint.pt", features="projector")
    with torch.no_grad():
        z = torch.nn.functional.normalize(both(x))  # SimCLR's loss is of normalised ones
        for panel, features in ("representations", both.encoder(x)), ("projections", z):
            expected = torch.linalg.eigvalsh(features.T.double().cov()).flip(0)
            found, rank = curves[panel]["simclr, epoch 2"]
            torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-3, atol=1e-7)
            assert int((found > 0).sum()) == min(31, len(found))  # of 32 images; rounding is none
            wanted = common.collapse_figures(features)["rank"]
            assert rank == pytest.approx(wanted, rel=1e-3)


def shortcut(name):
    return name.replace("downsample", "shortcut")


def sequential(first):
    """The indices of an nn.Sequential in which layer1 is number `first`."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{i}": first + i - 1 for i in (1, 2, 3, 4)}

    def renamed(name):
        head, _, rest = name.partition(".")
        return f"{numbers[head]}.{rest}"

    return renamed


def hugging_face(name):
    for i in 1, 2, 3, 4:
        name = re.sub(rf"^layer{i}\.(.)", rf"encoder.stages.{i - 1}.layers.\1", name)
        name = re.sub(rf"(\..)\.conv{i}", rf"\1.layer.{i - 1}.convolution", name)
        name = re.sub(rf"(\..)\.bn{i}", rf"\1.layer.{i - 1}.normalization", name)
    name = name.replace("downsample.0", "shortcut.convolution")
    name = name.replace("downsample.1", "shortcut.normalization")
    name = re.sub("^conv1", "embedder.embedder.convolution", name)
    return re.sub("^bn1", "embedder.embedder.normalization", name)


def below(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


HEAD = {"0.weight": torch.zeros(8, 512), "0.bias": torch.zeros(8), "2.weight": torch.zeros(4, 8)}
LAYOUTS = {  # small stem?, how layers are named, the encoder's prefix, those of others: their scale
    "torchvision": (False, str, "", {}),
    "Barlow Twins": (False, str, "module.backbone.", {}),
    "lightly, Lightning": (False, sequential(4), "backbone.", {}),
    "lightly, DINO": (False, str, "student_backbone.", {"backbone.": 0.5}),
    "lightly, CIFAR": (True, lambda name: sequential(2)(shortcut(name)), "backbone.", {}),
    "solo-learn": (True, str, "backbone.", {"momentum_backbone.": 0.5}),
    "SupContrast": (True, shortcut, "encoder.module.", {}),
    "Tuned-Contrastive": (True, shortcut, "", {"model.": 1}),
    "Barlow-Twins-HSIC": (True, sequential(4), "f.", {}),  # without the max-pool of its place
    "leftthomas": (True, sequential(3), "f.", {}),
    "PyTorch-BYOL": (False, sequential(4), "online.encoder.", {"target.encoder.": 0.5}),
    "averages": (True, str, "net.", {"average.net.": 0.5, "lagging.": 2}),
    "Hugging Face": (False, hugging_face, "resnet.", {}),
}
ARCHITECTURES = [*((name, "resnet18") for name in LAYOUTS), ("Hugging Face", "resnet50")]


@pytest.mark.parametrize("layout, arch", ARCHITECTURES)
def test_public_layouts(layout, arch, monkeypatch):
    small, naming, prefix, others = LAYOUTS[layout]
    network, images = trained_alike(arch, small), torch.rand(2, 3, 16, 16)
    weights = {naming(name): value for name, value in network.state_dict().items()}
    if layout == "leftthomas":  # by thop, which leaves its counts of operations
        weights |= {f"{at}total_ops": torch.zeros(1) for at in ("", "3.", "3.0.conv1.")}
    model = below(prefix, weights) | below("projector.", HEAD)
    for other, scale in others.items():
        model |= below(other, {name: value * scale for name, value in weights.items()})
    saved = {"model": model, "epoch": 9, "optimizer": {"state": {0: torch.zeros(3)}}}
    monkeypatch.setattr(linear_eval, "read", lambda path: saved)
    encoder, info = linear_eval.load_encoder("theirs.pth")
    assert (info["arch"], info["stem"]) == (arch, "small" if small else "imagenet")
    numbered = layout in ("lightly, CIFAR", "leftthomas")  # which shows that there is no pool
    stem = ["stem_padding", "stem_max_pool"][: 2 - numbered] if small else []
    assert info["assumed"] == ["image_size", "mean", "std", *stem]
    if layout == "lightly, CIFAR":  # three places for convolution, norm and nothing else
        network = copy.deepcopy(network)
        network.relu = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), network(images), rtol=1e-4, atol=1e-4)
    assert not encoder.training


def test_evaluating_somebody_elses_encoder(argv):
    """What is taken, ignored and assumed is said; flags say it better."""
    network = trained_alike("resnet18", True)
    weights = below("module.backbone.", network.state_dict()) | below("module.projector.", HEAD)
    torch.save({"model": weights, "epoch": 12}, "theirs.pth")
    argv[1] = "theirs.pth"
    table, figures = evaluate(*argv, "--protocol", "knn", "--key", "module.backbone")
    assert ("theirs.pth: resnet18, small stem, under 'model.module.backbone.': all of its 120 "
            "tensors; ignored: 3, such as model.module.projector.0.bias") in table  # fmt: skip
    assert any(line.startswith("assumed: image_size 16, mean (0.5") for line in table)  # the data's
    assert (figures["method"], figures["epoch"]) == ("theirs.pth", 12)
    assert json.loads(Path("knn_module.backbone_toy_theirs.json").read_text()) == figures


def test_several_encoders_need_a_key(monkeypatch):
    weights = trained_alike("resnet18", False).state_dict()
    other = {name: value * 0.5 for name, value in weights.items()}

    def found(saved, **overrides):
        monkeypatch.setattr(linear_eval, "read", lambda path: saved)
        encoder, info = linear_eval.load_encoder("two.pth", **overrides)
        return encoder.conv1.weight, info["found"]

    two = below("left.", weights) | below("right.", other)
    with pytest.raises(common.InputError, match="several encoders, 'left.', 'right.*--key"):
        found(two)
    with pytest.raises(common.InputError, match="--key middle is in none of 'left.', 'right.'"):
        found(two, key="middle")
    for key, expected in ("left", weights), ("right.", other):
        assert torch.equal(found(two, key=key)[0], expected["conv1.weight"])
    bare = weights | below("model.", other)
    for key, prefix in (".", ""), ("model", "model."):
        assert f"under '{prefix}'" in found(bare, key=key)[1]
    assert "'teacher.'" in found({"teacher": weights})[1]  # if there is nothing else


def test_harmless_values_are_taken(tmp_path):
    """Beside weights that lie in lists and tuples, what other programs save with them."""
    weights = trained_alike("resnet18", False).state_dict()
    odd = [np.float64(1), np.int64(2), np.bool_(True), np.random.get_state(), tmp_path, {0: 1}]
    more = {"a": collections.defaultdict(list, b=[1]), "c": collections.OrderedDict(d=2)}
    old = [argparse.Namespace(lr=1), np.arange(3)]
    path = tmp_path / "theirs.pt"
    torch.save([{"epoch": 3}, ({"model": weights}, odd, more, old)], path)
    encoder, info = linear_eval.load_encoder(path)
    assert torch.equal(encoder.conv1.weight, weights["conv1.weight"])
    assert "under '1.0.model.'" in info["found"]


@pytest.mark.parametrize("padding, pool", [(2, False), (1, True), (None, None)])
def test_stems_that_weights_do_not_show(padding, pool, argv):
    """solo-learn's padding of 2, a max-pool behind 3x3: with flags as the original."""
    network, x = copy.deepcopy(trained_alike("resnet18", True)), torch.rand(2, 3, 16, 16)
    network.conv1.padding = padding or 1, padding or 1
    network.maxpool = torch.nn.MaxPool2d(3, 2, 1) if pool else torch.nn.Identity()
    torch.save({"net": network.state_dict()}, "theirs.pth")
    given = {"stem_padding": padding, "stem_max_pool": pool}
    encoder, info = linear_eval.load_encoder("theirs.pth", **given)
    with pytest.raises(common.InputError, match="no stem_pading; it has key"):
        linear_eval.load_encoder("theirs.pth", stem_pading=2)
    assert ("stem_padding" in info["assumed"]) == (padding is None)
    flags = [f"--stem-padding={padding}", f"--{'no-' * (not pool)}stem-max-pool"] * (padding or 0)
    out = succeed("linear_eval --checkpoint theirs.pth", *argv, *flags, "--export", "mine.pt")
    hints = "stem_padding 1", "models need --stem-padding 2\n", "models need --stem-max-pool\n"
    assert [hint in out for hint in hints] == [padding is None] * 3
    exported, known = linear_eval.load_encoder("mine.pt")
    assert known["assumed"] == [] and known["method"] == "theirs.pth"
    with torch.no_grad():
        for found in encoder, exported:
            torch.testing.assert_close(found(x), network(x), rtol=1e-4, atol=1e-4)


def changed(**change):
    """encoder.pt with some of the weights replaced, or removed where they are None."""
    saved = encoder_dict()
    weights = saved["state_dict"] | {k.replace("__", "."): v for k, v in change.items()}
    return saved | {"state_dict": {k: v for k, v in weights.items() if v is not None}}


class Shard(torch.Tensor):
    """As torch.distributed's DTensor."""

    placements = ("Shard(0)",)


class Net(torch.nn.Linear):
    """An object in a file, of a library that is not there."""


def written(save, value):
    file = io.BytesIO()
    save(value, file)
    return file.getvalue()


def script():
    return written(torch.jit.save, torch.jit.script(torch.nn.Linear(300, 300)))


SEVERAL = {"conv1__0__weight": torch.zeros(32, 3, 3, 3)}
SEVERAL |= {"conv1__3__weight": torch.zeros(64, 32, 3, 3), "conv1__weight": None}
NO_ENCODER = {  # what the file holds, its bytes or what is read from it; what is said of it
    "a web page": (lambda: b"\n<!DOCTYPE html>", "a web page: download"),
    "another": (lambda: b"\xef\xbb\xbf<html>", "a web page: download"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x03", "an ONNX model: take"),
    "text": (lambda: b"These are no weights.", "state_dict.*damaged"),
    "TorchScript": (script, "is TorchScript: save the state_dict"),
    "an object": (
        lambda: written(torch.save, Net(2, 2)),
        "state_dict.*it holds .*Net, which is no plain value; nothing was run",
    ),
    "shards": (
        lambda: changed(conv1__weight=torch.zeros(64, 3, 7, 7).as_subclass(Shard)),
        r"holds shards, as \['state_dict.conv1.weight'\]: save the full state_dict",
    ),
    "no weights": (lambda: {"state": 1}, "no convolution of three channels"),
    "a weight missing": (lambda: changed(bn1__running_mean=None), "1 tensors .* bn1.running_mean"),
    "a wrong shape": (lambda: changed(bn1__bias=torch.zeros(63)), "1 tensors .* bn1.bias"),
    "sparse": (lambda: changed(bn1__bias=torch.zeros(64).to_sparse()), "1 tensors .* bn1.bias"),
    "gates": (lambda: changed(layer1__0__se__fc1=torch.zeros(4, 64)), "too many: layer1.0.se.fc1"),
    "a stem of several": (lambda: changed(**SEVERAL), "conv1.0.weight tells of a stem that"),
    "blur-pool": (
        lambda: changed(layer2__0__conv2__1__filt=torch.ones(1)),
        "filt tells of blur-pool",
    ),
    "padding": (lambda: encoder_dict(stem_padding=-1), "unusable"),
    "another arch": (lambda: encoder_dict(arch="resnet19"), "resnet18 by .*, not 'resnet19'"),
    "stem of a wrong type": (lambda: encoder_dict(stem=3), "stem is imagenet by .*, not 3"),
    "std of zero": (lambda: encoder_dict(std=[0.0] * 3), "unusable statistics"),
    "a mean beyond floats": (lambda: encoder_dict(mean=[10**400] * 3), "unusable statistics"),
}


@pytest.mark.parametrize("kind", NO_ENCODER)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_no_encoder_is_refused(kind, tmp_path, monkeypatch):
    make, message = NO_ENCODER[kind]
    saved, path = make(), tmp_path / "some.pt"
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    else:
        monkeypatch.setattr(linear_eval, "read", lambda path: saved)
    with pytest.raises(common.InputError, match=f"some.pt:? .*{message}") as line:
        linear_eval.load_encoder(path)
    assert "\n" not in str(line.value) and "weights_only" not in str(line.value)


REFUSALS = {
    "--checkpoint nowhere.pt": "nowhere.pt: no such file",
    "--checkpoint folder": "folder/encoder.pt: no such file",
    "--dataset single.pt": "single has a single class",
    "--dataset unlabeled": "unlabeled: evaluation needs a label for every image",
    "--dataset lacks.pt": "classes without a training image at --label-fraction 1: 1",
    "--curves --map tsne": "--curves: expected at least one argument",
    "--export toy.pt": "toy.pt is there already",
    "--export new.pt --features projector": "not for that",
    "--checkpoint random --features projector": "needs a checkpoint.pt",
    "--checkpoint random --key left": "--key is for files",
    "--checkpoint alone.pt --features projector": "alone.pt: no projector",
    "--features projector --protocol finetune": "not for that",
    "--dataset no_test.pt": "no_test has no test split: hold images out",
    "--protoco knn": "--protoco",
    "--label-fraction 0.02": "without a training image at --label-fraction 0.02: 4",
    "--validation-fraction 0.01": "--validation-fraction 0.01 leaves a part empty",
    "--image-size 4": "--image-size",
    "--cached --lr 1e38": "loss not finite in epoch",
    "--protocol finetune --batch-size 1": "in batches of 1 are too few",
    "--cached --protocol knn": "--cached is for --protocol linear",
    "--encoder-lr 0.1": "--encoder-lr is for --protocol finetune alone",
    "--recipe s004 --protocol finetune": "--recipe s004 is for linear",
    "--compare encoder.pt": "--compare is for --pictures",
    "--pictures --compare nowhere.pt": "nowhere.pt: no such file",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refusals(flags, argv, tmp_path):
    data = noise()
    Path("folder").mkdir()
    fill(Path("unlabeled"), "1.png", "2.png")
    torch.save({key: value for key, value in data.items() if key != "test"}, "no_test.pt")
    one = {name: {**data[name], "labels": data[name]["labels"] * 0} for name in ("train", "test")}
    torch.save({**one, "classes": ["a"]}, "single.pt")
    torch.save(data | {"classes": list("abcde")}, "lacks.pt")
    torch.save(encoder_dict(), "alone.pt")
    before = set(tmp_path.rglob("*"))
    assert REFUSALS[flags] in fail(f"linear_eval {flags}", *argv)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["matplotlib", "scikit-learn"])
def test_a_missing_package_is_said_early(package, argv, monkeypatch):
    lacks = lambda name: name != package.replace("scikit-", "sk")  # noqa: E731
    monkeypatch.setattr(linear_eval.importlib.util, "find_spec", lacks)
    message = fail("linear_eval --pictures --map tsne", *argv)
    assert f"need {package}: pip install {package}" in message
