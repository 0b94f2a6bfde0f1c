"""common.py but for its views: schedule and optimisers against their equations, ResNets against
torchvision's, neighbours and collapse figures against cases worked by hand, datasets written here
with other libraries, files, presets and flags, and what is refused."""

import argparse
import functools
import importlib
import itertools
import math
import os
import re
import shutil
import zlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import common

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
MIXED = [(40, 60), (50, 50), (64, 40)]  # sizes of images that stay on disk
METHODS = "simclr byol barlow_twins vicreg supcon_tcl carl_carp corinfomax".split()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_bytes(n, height, width=None, seed=0):
    shape = n, 3, height, width or height
    return torch.randint(256, shape, generator=rng(seed), dtype=torch.uint8)


def tree(folder):
    """Every file below a folder, with what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def hardware(**options):
    """The resolved arguments that data and evaluation functions read."""
    settings = {"seed": 0, "batch_size": 4, "image_size": 16, "workers": 0}
    settings |= {"device": "cpu", "precision": "fp32"}
    return SimpleNamespace(**settings | options)


# --------------------------------------------------------------------------------------------------
# Schedule and optimisers


@pytest.mark.parametrize(
    "step, warmup, expected",
    [
        (0, 20, 1 / 20),  # the first step of the warm-up is not lost
        (19, 20, 1.0),  # the last
        (2, 2.5, 1.0),  # it need not be whole steps
        (20, 20, 1.0),  # the first of the cosine
        (60, 20, 0.5),
        (99, 20, 0.0003855),  # the last step: sin(pi / 160)^2
        (50, 0, 0.5),
    ],
)
def test_learning_rate(step, warmup, expected):
    assert common.learning_rate(step, 100, warmup, 3.0) == pytest.approx(3 * expected, abs=1e-6)
    if step >= warmup:
        lifted = common.learning_rate(step, 100, warmup, 3.0, final=1.0)
        assert lifted == pytest.approx(1 + 2 * expected, abs=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd", 2 - 0.1 * 0.5 * 2),  # p - lr * decay * p
        ("adamw", 2 - 0.1 * 0.5 * 2),  # the same: the decay is apart from the gradient
        ("adam", 2 - 0.1),  # the decay is the gradient, whose size Adam divides out
        ("lars", 2 - 0.1 * 0.001 * 2),  # so does LARS: p - lr * trust * |p| / |u| * u
    ],
)
def test_optimizers_decay_matrices_alone(name, expected):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    knobs = {"momentum": 0.7, "weight_decay": 0.5, "precision": "fp32"}
    args = SimpleNamespace(optimizer=name, scaled_lr=0.1, **knobs)
    optimizer = common.make_optimizer(model, args)
    assert type(optimizer).__name__.lower() == name
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group.get("momentum", 0.7) == 0.7 for group in optimizer.param_groups)
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in model.parameters():
        close(p.detach(), torch.full_like(p, expected if p.ndim > 1 else 2.0), 1e-6)


def lars_step(p, g, m, lr, weight_decay):
    """u = g + wd p; q = eta |p| / |u|; m = .9 m + q u; p = p - lr m. In one dimension q u is g."""
    u = g
    if p.ndim > 1:
        u = g + weight_decay * p
        if p.norm() > 0 and u.norm() > 0:
            u = 0.01 * p.norm() / u.norm() * u
    m = 0.9 * m + u
    return p - lr * m, m


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_the_rule(weight_decay):
    sizes = [(5, 2, 3, 3), (7,), (2, 2), (3, 3)]
    expected = [torch.randn(*size, generator=rng(), dtype=torch.float64) for size in sizes]
    expected[2].zero_()
    params = [nn.Parameter(p.clone()) for p in expected]
    idle = nn.Parameter(torch.ones(3))  # without a gradient
    knobs = {"weight_decay": weight_decay, "trust_coefficient": 0.01}
    optimizer = common.LARS([*params, idle], 1.0, **knobs)
    buffers = [torch.zeros_like(p) for p in expected]
    for step, lr in enumerate([0.5, 2.0, 0.1]):  # which tells m + q u from m + lr q u
        optimizer.param_groups[0]["lr"] = lr
        gradients = [torch.randn(p.shape, generator=rng(step), dtype=p.dtype) for p in expected]
        gradients[3].zero_()
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            expected[i], buffers[i] = lars_step(expected[i], g, buffers[i], lr, weight_decay)
            close(p.detach(), expected[i], 1e-12)
            assert torch.equal(p.grad, g)


# --------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnet_is_torchvisions(stem):
    """With its weights, another stem put in by hand, and no `fc`."""
    model, reference = common.resnet("resnet18", stem).eval(), torchvision.models.resnet18().eval()
    reference.fc = nn.Identity()
    if stem == "small":
        reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        he = math.sqrt(2 / (64 * 3 * 3))  # fan-out, as torchvision initialises convolutions
        assert model.conv1.weight.std().item() == pytest.approx(he, rel=0.1)
    reference.load_state_dict(model.state_dict(), strict=True)
    x = noise_bytes(2, 32) / 255 - 0.5
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
    assert model.num_features == 512


@pytest.mark.parametrize("words, name", [(("resnet19",), "resnet19"), (("resnet18", "big"), "big")])
def test_unknown_resnet_is_named(words, name):
    with pytest.raises(ValueError, match=name):
        common.resnet(*words)


def test_mlp():
    kinds = [type(layer) for layer in common.mlp(8, 16, 16, 4)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    plain = common.mlp(8, 16, 4, batch_norm=False, bias=False, last_bias=True)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    assert plain[0].bias is None and plain[2].bias is not None
    assert plain(torch.zeros(2, 8)).shape == (2, 4)


def test_views_pass_together_or_one_by_one():
    """Batch norm tells, by what it takes its statistics of."""
    views = [torch.randn(5, 4, generator=rng(i)) * (i + 1) for i in range(3)]
    norm = nn.BatchNorm1d(4, affine=False)
    apart = common.forward_views(norm, views, concat=False)
    together = common.forward_views(norm, views, concat=True)
    assert len(apart) == len(together) == 3
    for y, x in zip(apart, views, strict=True):
        close(y, norm(x))
    close(torch.cat(together), norm(torch.cat(views)))


# --------------------------------------------------------------------------------------------------
# What a representation is worth


@pytest.mark.parametrize("k, temperature", [(5, 0.01), (99, 1.0)])
def test_knn_equals_a_slow_loop(k, temperature):
    """exp(cosine / temperature) for the class of each of the k nearest, or of all there are."""
    bank, queries = torch.randn(60, 8, generator=rng(0)), torch.randn(23, 8, generator=rng(1))
    labels = torch.randint(0, 4, (60,), generator=rng(2))
    bank[0] = queries[0]  # exp(1 / .01) is more than a float32 holds
    expected = torch.zeros(23, 4, dtype=torch.float64)
    for i, q in enumerate(queries.double()):
        cosine = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
        for j in sorted(range(60), key=lambda j, c=cosine: -c[j])[:k]:
            expected[i, labels[j]] += math.exp(cosine[j] / temperature)
    scores = common.knn_scores(bank, labels, queries, 4, k, temperature).double()
    shares = [x / x.sum(1, keepdim=True) for x in (scores, expected)]  # a factor is left open
    torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-6)


def test_top_accuracies_by_hand():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(4, 1)
    assert common.top_accuracies(scores, torch.tensor([0, 1, 4, 5])) == (0.25, 0.75)
    few = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # fewer than five classes
    assert common.top_accuracies(few, torch.tensor([0, 0])) == (0.5, 1.0)


@pytest.mark.parametrize("wanted, size, k", [(200, 1000, 50), (20, 1000, 20), (200, 15, 1)])
def test_neighbours_are_at_most_half_of_one_of_ten_classes(wanted, size, k):
    bank = common.Split(torch.randn(size, 4, generator=rng(0)), torch.arange(size) % 10)
    test = common.Split(torch.randn(30, 4, generator=rng(1)), torch.arange(30) % 10)
    args = SimpleNamespace(knn_k=wanted, knn_temperature=0.1)
    votes, used = common.knn_votes(bank, test, 10, args)
    expected = common.knn_scores(bank.images, bank.labels, test.images, 10, k, 0.1)
    assert used == k and torch.equal(votes, expected)


def test_knn_monitor():
    """Every test image is in the bank; one in ten has another label there."""
    images, labels = noise_bytes(40, 8), torch.arange(40) % 4
    train = common.Split(images, labels)
    test = common.Split(images, torch.where(torch.arange(40) < 4, labels + 1, labels) % 4)
    data = common.Dataset("noise", list("abcd"), train, test, train, 8, MEAN, STD)
    args = hardware(image_size=8, knn_bank=0, knn_k=1, knn_temperature=0.1)
    assert common.knn_monitor(nn.Flatten(), data, args) == 0.9


def test_encode_is_the_backbone_in_eval_mode():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    split, data = common.Split(noise_bytes(10, 16), None), SimpleNamespace(mean=MEAN, std=STD)
    features = common.encode(backbone, split, hardware(), data, batch_size=3)
    assert backbone.training and backbone[1].running_mean.eq(0).all()
    with torch.no_grad():
        close(features, backbone.eval()(TF.normalize(split.images / 255, MEAN, STD)))


def test_collapse_figures_of_collapsed_features():
    for features in torch.full((64, 16), 0.3), torch.zeros(64, 16):
        figures = common.collapse_figures(features)
        assert figures["feature_std"] == pytest.approx(0, abs=1e-5)
        assert figures["effective_rank"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("n, width", [(64, 20), (20, 64)])
def test_collapse_figures_equal_their_definitions(n, width):
    features = torch.randn(n, width, generator=rng(), dtype=torch.float64) + 0.5
    unit = features / features.norm(dim=1, keepdim=True)
    spread = ((unit - unit.mean(0)).square().sum(0) / (n - 1)).sqrt().mean() * math.sqrt(width)
    singular = torch.linalg.svdvals(features - features.mean(0))
    p = singular / singular.sum()
    rank = math.exp(-sum(float(q) * math.log(q) for q in p if q > 1e-9))
    figures = common.collapse_figures(features)
    assert figures["feature_std"] == pytest.approx(float(spread), rel=1e-5)
    assert figures["effective_rank"] == pytest.approx(rank, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Random numbers and files


def test_a_seed_depends_on_all_its_arguments():
    others = (1, "order", 1), (0, "augment", 1), (0, "order", 2)
    seeds = [common.derived_seed(*arguments) for arguments in others]
    seed = common.generator(0, "order", 1).initial_seed()
    assert seed == common.derived_seed(0, "order", 1) and len({seed, *seeds}) == 4


def test_atomic_write(tmp_path, monkeypatch):
    path, previous, order = tmp_path / "file", tmp_path / "previous", []
    for name in "fsync", "replace":
        real = getattr(os, name)
        note = lambda *words, name=name, real=real: (order.append(name), real(*words))  # noqa: E731
        monkeypatch.setattr(os, name, note)
    for content in b"old", b"new":
        with common.atomic_write(path, previous) as file:
            file.write(content)
            assert path.exists() == (content == b"new")  # no half-written file has the name
    assert order == ["fsync", "replace"] * 2 + ["replace"]  # named when all is on disk
    for error, raised in (ZeroDivisionError, ZeroDivisionError), (RuntimeError, common.InputError):
        # RuntimeError is how torch.save says that the disk is full
        with pytest.raises(raised), common.atomic_write(path, previous) as file:
            file.write(b"newer")
            raise error
    assert tree(tmp_path) == {path: b"new", previous: b"old"}


def test_checksums_of_a_checkpoint(tmp_path):
    """torch.load does not look at them: it takes a file of which one byte has changed."""
    path, weights = tmp_path / "checkpoint.pt", torch.full((99,), 1.5)
    torch.save({"weights": weights, "args": argparse.Namespace(lr=0.1)}, path)
    whole = common.load_whole(path)
    assert torch.equal(whole["weights"], weights) and whole["args"].lr == 0.1
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes())] ^= 255
    path.write_bytes(content)
    assert not torch.equal(common.load_file(path)["weights"], weights)
    with pytest.raises(common.InputError, match=r"checkpoint.pt: damaged \(.*data"):
        common.load_whole(path)


# --------------------------------------------------------------------------------------------------
# Datasets: packed files, folders, and the layouts in which they are published


def load(root, name):
    return common.load_dataset(str(root / name))


@pytest.mark.parametrize("channels", [1, 3])
def test_packed_file(tmp_path, toy, channels):
    saved = toy()
    saved["train"]["images"][:, 2] = 0  # a black channel, whose deviation would divide by 0
    for key in "train", "test":
        saved[key]["images"] = saved[key]["images"][:, :channels].clone()
    torch.save(saved, tmp_path / "mine.pt")
    data = load(tmp_path, "mine.pt")
    assert (data.name, data.classes, data.size) == ("mine", list("abcd"), 16)
    for split, key in (data.train, "train"), (data.test, "test"), (data.pretrain, "train"):
        assert torch.equal(split.labels, saved[key]["labels"])
        assert torch.equal(split.images, saved[key]["images"].expand(-1, 3, -1, -1))
    values = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, values.std((0, 2, 3)).clip(1 / 255), rtol=1e-12)


def test_unlabeled_images_are_for_pretraining_only(tmp_path, toy):
    saved = toy() | {"unlabeled": {"images": noise_bytes(7, 16)}}
    torch.save(saved, tmp_path / "more.pt")
    loaded = load(tmp_path, "more.pt")
    both = torch.cat([saved["train"]["images"], saved["unlabeled"]["images"]])
    for data in loaded, loaded.to("cpu"):
        assert torch.equal(data.pretrain.images, both) and torch.equal(data.train.images, both[:64])
        assert data.pretrain.labels[64:].eq(-1).all() and data.train.labels.ge(0).all()


@pytest.mark.parametrize("images", [torch.arange(40), [f"{i}.png" for i in range(40)]])
def test_spread_takes_every_class_of_a_sorted_split(images):
    split = common.Split(images, torch.arange(40) // 4)
    some = split.spread(10)
    assert list(some.images) == list(images[::4]) and some.labels.tolist() == list(range(10))
    assert [len(split.spread(count)) for count in (7, 0, 40, 99)] == [7, 40, 40, 40]


@pytest.mark.parametrize("fewer, larger", [(0, 0), (6, 0), (0, 2)])
def test_note_where_a_dataset_does_not_look_like_itself(tmp_path, capsys, fewer, larger):
    path, classes, side = tmp_path / "cifar10.pt", 10 - fewer, 32 + larger
    (tmp_path / "cifar10" / "train").mkdir(parents=True)  # the packed file comes before a folder
    split = {"images": noise_bytes(3, side), "labels": torch.arange(3)}
    torch.save({"train": split, "classes": [str(i) for i in range(classes)]}, path)
    load(tmp_path, path.name)  # by its path it claims no name
    common.load_dataset("cifar10", tmp_path)
    note = f"note: {path} has {classes} classes and a side of {side}, "
    note += "cifar10 has 10 and 32: is it that dataset?\n"
    assert capsys.readouterr().out == (note if fewer or larger else "")


def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(pixels).save(path)


def save_folder(root, split, sizes, inside=""):
    """PNG images in ImageFolder layout, one per size in each class. Returns their pixels."""
    held = []
    for name, (i, size) in itertools.product(("cat", "dog"), enumerate(sizes)):
        held += noise_bytes(1, *size, seed=zlib.crc32(f"{split} {name} {i}".encode()))
        save_image(root / split / name / inside / f"{i}.png", held[-1])
    (root / split / "cat" / inside / "notes.txt").write_text("not an image")
    return held


def save_pets(root, sizes):
    save_folder(root, "train", sizes)
    save_folder(root, "test", sizes)


@pytest.mark.parametrize(
    "folders, hidden, test",
    [
        (["test"], False, "test"),
        (["val"], False, "val"),
        (["val", "test"], False, "test"),
        (["val"], True, "val"),  # as ImageNet's, whose test labels nobody has
        ([], False, None),
    ],
)
def test_folder_of_equal_sizes_is_held_in_memory(tmp_path, capsys, folders, hidden, test):
    root, sizes = tmp_path / "pets", [(12, 16)] * 3
    held = {name: save_folder(root, name, sizes, inside="a/b") for name in ["train", *folders]}
    if hidden:
        save_image(root / "test" / "0.png", noise_bytes(1, 12)[0])
    data = load(tmp_path, "pets")
    assert (data.name, data.classes, data.size) == ("pets", ["cat", "dog"], 12)
    assert torch.equal(data.train.images, torch.stack(held["train"]))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.test is None) == (test is None) and (data.to("cpu").test is None) == (test is None)
    if test:
        assert torch.equal(data.test.images, torch.stack(held[test]))
    note = f"note: {root}/test has no folders of classes: {root}/val is taken\n"
    assert capsys.readouterr().out == note * hidden


@pytest.mark.parametrize("name, side", [("pets", 224), ("imagenette", 160)])
def test_folder_of_mixed_sizes_is_streamed(tmp_path, capsys, name, side):
    """Of a name of the table it has that size; the classes are compared."""
    save_pets(tmp_path / name, MIXED)
    known = name in common.DATASETS
    data = common.load_dataset(name if known else str(tmp_path / name), tmp_path)
    assert (data.name, data.size, data.classes) == (name, side, ["cat", "dog"])
    assert data.to("cpu").train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in data.train.images] == ["0.png", "1.png", "2.png"] * 2
    assert ("has 2 classes" in capsys.readouterr().out) == known
    assert [path.name for path in tmp_path.iterdir()] == [name]  # it is not packed


def test_only_so_many_bytes_are_held_in_memory(tmp_path, monkeypatch):
    save_pets(tmp_path / "pets", [(10, 10)] * 3)
    for limit, held in (12 * 300, True), (12 * 300 - 1, False):  # of both splits together
        monkeypatch.setattr(common, "MEMORY_LIMIT", limit)
        assert load(tmp_path, "pets").train.in_memory == held


# Some val images are named before others, and classes come in no order, as in the real file.
VAL = {"val_3.png": "n02", "val_0.png": "n03", "val_10.png": "n01", "val_1.png": "n03"}


def save_tiny(root):
    """tiny-imagenet-200 as it is unpacked, but small; class n01 has the gray value 30, n02 60, ...
    Some of its images have one channel."""

    def save(file, wnid, channels=3):
        tone = torch.full((channels, 16, 16), 30 * int(wnid[1:]), dtype=torch.uint8)
        save_image(root / "tiny-imagenet-200" / file, tone)

    for wnid, channels in itertools.product(("n03", "n01", "n02"), (1, 3)):
        save(f"train/{wnid}/images/{channels}.png", wnid, channels)
    for name, wnid in VAL.items():
        save(f"val/images/{name}", wnid)
    save("test/images/test_0.png", "n01")
    table = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    table.write_text("".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in VAL.items()))
    return table


def test_tiny_imagenet(tmp_path):
    save_tiny(tmp_path)
    data = common.load_dataset("tiny_imagenet", tmp_path)
    assert (data.name, data.classes, data.size) == ("tiny_imagenet", ["n01", "n02", "n03"], 16)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(data.test.labels.tolist()) == [0, 1, 2, 2]
    for split in data.train, data.test:
        tones = 30 * (split.labels + 1).view(-1, 1, 1, 1)
        assert torch.equal(split.images.long(), tones.expand(-1, 3, 16, 16))


LABELS = {"train_data_batch_10": [5, 1000], "train_data_batch_2": [1, 999, 7], "val_data": [1000]}


def pixels_of(labels):
    """Noise [N, 3, 64, 64], of which each label has its own."""
    return torch.cat([noise_bytes(1, 64, seed=label) for label in labels])


def save_imagenet64(root):
    folder = root / "imagenet64"
    folder.mkdir()
    for name, labels in LABELS.items():
        arrays = {"data": pixels_of(labels).flatten(1).numpy(), "labels": np.array(labels, ">i4")}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def test_imagenet64(tmp_path):
    save_imagenet64(tmp_path)
    data = common.load_dataset("imagenet64", tmp_path)
    assert (data.name, data.size, len(data.classes)) == ("imagenet64", 64, 1000)
    for split, labels in (data.train, [1, 999, 7, 5, 1000]), (data.test, [1000]):
        assert [data.classes[i] for i in split.labels] == [str(label) for label in labels]
        assert torch.equal(split.images, pixels_of(labels))


class Pictures(list):
    """What torchvision would download: seven pictures of a split and their labels."""

    classes, mode, side = ["cat", "dog"], "RGB", 8

    def __init__(self, root, train=True, *_, split=None, download=False):
        assert download and root
        split = split or train
        seed = {True: 1, "train": 1, False: 2, "test": 2, "val": 2, "unlabeled": 3}[split]
        for i, image in enumerate(noise_bytes(7, self.side, seed=seed)):
            picture = TF.to_pil_image(image).convert(self.mode)
            self.append((picture, -1 if split == "unlabeled" else i % 2))


@pytest.mark.parametrize(
    "name, kind, attributes",
    [
        ("cifar10", "CIFAR10", {}),
        ("cifar100", "CIFAR100", {}),
        ("fashion_mnist", "FashionMNIST", {"mode": "L"}),
        ("stl10", "STL10", {}),
        ("imagenette", "Imagenette", {"side": 170, "classes": [("cat", "tom"), ("dog",)]}),
    ],
)
def test_download_is_packed_once(tmp_path, monkeypatch, name, kind, attributes):
    source = type(kind, (Pictures,), attributes)
    monkeypatch.setattr(torchvision.datasets, kind, source)
    first = common.load_dataset(name, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{name}.pt"]
    monkeypatch.setattr(torchvision.datasets, kind, None)
    again = common.load_dataset(name, tmp_path / "data")  # read, not downloaded
    crop = slice(5, 165) if name == "imagenette" else slice(None)  # the central 160 of 170
    for data, key in itertools.product((first, again), ("train", "test")):
        pictures = source("root", split=key, download=True)
        pixels = [TF.pil_to_tensor(picture.convert("RGB")) for picture, _ in pictures]
        assert torch.equal(getattr(data, key).images, torch.stack(pixels)[..., crop, crop])
        assert getattr(data, key).labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert data.classes == ["cat", "dog"]
        assert len(data.pretrain) == (14 if name == "stl10" else 7)


@pytest.mark.parametrize(
    "download, message",
    [
        (mock.Mock(side_effect=OSError("no\nroute")), r"download failed \(no route\).*cifar10.pt$"),
        (type("Wrong", (Pictures,), {"classes": ["cat"]}), "pt: train labels run from 0 to 1"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, download, message):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    with pytest.raises(common.InputError, match=message):
        common.load_dataset("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shapes():
    """Pictures all different, drawn anew alike. Pixels and mean color say little about their class;
    the amplitude spectrum knows the figure, but not which half of it is light."""
    train, test = common.shapes(510, "train"), common.shapes(200, "test")  # in parts of 500
    assert train["labels"].bincount().tolist() == [51] * 10
    assert torch.equal(test["images"], common.shapes(200, "test")["images"])
    both = torch.cat([train["images"], test["images"]])
    assert both.shape == (710, 3, 32, 32) and both.dtype == torch.uint8
    assert len(both.flatten(1).unique(dim=0)) == 710

    def neighbours(features, known=10):  # the share of the test images whose nearest one is alike
        nearest = torch.cdist(features[510:], features[:510]).argmin(1)
        return (train["labels"][nearest] % known == test["labels"] % known).double().mean()

    spectrum = torch.fft.rfft2(both.double().mean(1)).abs()
    spectrum[:, 0, 0] = 0  # the mean
    assert neighbours(both.float().flatten(1)) < 0.5
    assert neighbours(spectrum.flatten(1)) < 0.6 and neighbours(spectrum.flatten(1), 5) > 0.8
    assert neighbours(both.float().mean((2, 3))) < 0.35


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def streamed(tmp_path):
    save_pets(tmp_path / "pets", MIXED)
    return load(tmp_path, "pets").train


def test_decode_for_evaluation(streamed):
    """One centre crop of every image in order: [B, 1, 3, S, S]; what is encoded."""
    items = [(i, None) for i in range(6)]
    batches = list(common.decode(streamed, items, 4, hardware(image_size=32)))
    assert [images.shape for images, _ in batches] == [(4, 1, 3, 32, 32), (2, 1, 3, 32, 32)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat([images for images, _ in batches])[:, 0]
    for path, image in zip(streamed.images, images, strict=True):
        original = Image.open(path)
        shorter = min(original.size)  # 7/8 of it, but at least what is asked for
        crop = TF.center_crop(original, [max(32, round(shorter * 7 / 8))] * 2)
        bicubic = TF.InterpolationMode.BICUBIC
        crop = TF.pil_to_tensor(TF.resize(crop, [32, 32], bicubic))
        close(image.float(), crop.float(), 1)
    data = SimpleNamespace(mean=MEAN, std=STD)
    features = common.encode(nn.Flatten(), streamed, hardware(image_size=32), data, batch_size=4)
    close(features, TF.normalize(images / 255, MEAN, STD).flatten(1))


def crops_by_image(split, seed, epoch, workers, batch_size=2):
    """The crops of one epoch, sorted by image: each image has another label here, to be told by."""
    split = common.Split(split.images, torch.arange(len(split)))
    args = hardware(seed=seed, workers=workers, batch_size=batch_size)
    batches = list(common.training_batches(split, epoch, args, common.symmetric(2, crop_min=0.2)))
    labels = torch.cat([labels for _, labels in batches])
    return torch.cat([images for images, _ in batches])[labels.argsort()]


def test_streamed_crops_depend_on_seed_epoch_and_image_only(streamed):
    crops = crops_by_image(streamed, seed=0, epoch=1, workers=0)
    torch.manual_seed(99)
    assert torch.equal(crops_by_image(streamed, 0, 1, workers=2, batch_size=3), crops)
    for seed, epoch in (1, 1), (0, 2):
        other = crops_by_image(streamed, seed, epoch, workers=0)
        assert all(not torch.equal(a, b) for a, b in zip(crops, other, strict=True))
    same_image = common.Split(streamed.images[:1] * 4, torch.zeros(4).long())
    crops = crops_by_image(same_image, 0, 1, workers=0)  # drawn for each place and view
    assert len(crops.flatten(2).flatten(0, 1).unique(dim=0)) == 8


def test_training_batches_in_memory():
    """No image twice, the short last batch dropped, the order from seed and epoch alone."""
    split = common.Split(noise_bytes(11, 8), torch.arange(11))

    def labels(epoch, skip=0, **options):
        args = hardware(**options)
        batches = list(common.training_batches(split, epoch, args, common.symmetric(), skip))
        for images, index in batches:
            assert torch.equal(images, split.images[index])
        return [index.tolist() for _, index in batches]

    first = labels(1)
    assert [len(batch) for batch in first] == [4, 4]
    assert len(set(sum(first, []))) == 8
    torch.manual_seed(99)
    assert labels(1) == first
    assert [labels(1, skip) for skip in (1, 2)] == [first[1:], []]  # where a stopped run goes on
    assert labels(2) != first and labels(1, seed=1) != first


@pytest.mark.gpu
def test_streamed_batches_reach_the_gpu(streamed):
    torch.zeros(1).cuda()  # worker processes that are forked now cannot use CUDA themselves
    split, recipes = streamed.to("cuda"), common.symmetric()
    batches = list(common.training_batches(split, 1, hardware(device="cuda", workers=2), recipes))
    assert len(batches) == 1 and batches[0][0].is_cuda and batches[0][1].is_cuda


# --------------------------------------------------------------------------------------------------
# Command line


def flags_of(method):
    """A script's parser, its presets and the names of their variants."""
    module = importlib.import_module(method)
    with mock.patch.object(common, "parse_args", side_effect=SystemExit) as caught:
        with pytest.raises(SystemExit):
            module.main()
    parser, presets, *variants = caught.call_args.args
    return parser, presets, variants


@pytest.mark.parametrize(
    "argv, keys, values",
    [
        ("", "default", (1, 1, 0)),
        ("--dataset pets --method b", "default + pets + b + pets b", (5, 2, 4)),
        ("--dataset x/pets.pt --alone", "default + pets + alone", (1, 4, 3)),
        ("--method=b --alone --lr 9", "default + b + alone", (9, 2, 3)),
        ("--dataset x/pets", "default", (1, 1, 0)),
    ],
)
def test_presets_are_laid_over_each_other(argv, keys, values, capsys):
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
    said = f"settings  preset {keys}; given: {argv or 'nothing'}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("method", METHODS)
def test_presets_say_what_has_no_default_and_name_what_there_is(method):
    parser, presets, variants = flags_of(method)
    needed = {"batch_size", "optimizer", "lr", "weight_decay"}
    assert needed <= presets["default"].keys()
    assert all(parser.get_default(flag) is None for flag in needed)
    flags = {action.dest: action for action in parser._actions}
    words = {word for flag in variants for word in flags[flag].choices or [flag]}
    pairs = {f"{name} {word}" for name in common.DATASETS for word in words}
    assert presets.keys() <= {"default", *common.DATASETS, *words, *pairs}
    assert all(preset.keys() <= flags.keys() for preset in presets.values())


@pytest.mark.parametrize("method", METHODS)
def test_help_prints_what_will_be_used(method, monkeypatch, capsys):
    parser, presets, variants = flags_of(method)
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        common.parse_args(parser, presets, *variants, argv=["--dataset", "shapes", "--help"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.split("\n  --")[1:]}
    for name, value in (presets["default"] | presets["shapes"]).items():
        assert lines[name.replace("_", "-")].rstrip().endswith(f"(default: {value})")


def prepared(toy_file, words=""):
    """The arguments as `prepare` leaves them, for simclr's flags."""
    parser, presets, _ = flags_of("simclr")
    argv = ["--dataset", str(toy_file), "--batch-size", "16", "--device", "cpu", *words.split()]
    args = common.parse_args(parser, presets, argv=argv)
    common.prepare(args, "simclr")
    return args


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {"compile": False, "mi_weight": None, "device": "cpu", "warmup_epochs": 10}),
        ("", {"image_size": 16, "stem": "small", "out": "runs/simclr_toy_resnet18"}),
        ("--arch resnet50 --seed 3", {"out": "runs/simclr_toy_resnet50", "seed": 3}),
        ("--image-size 65", {"image_size": 65, "stem": "imagenet"}),
        ("--lr 0.8", {"scaled_lr": 0.05}),  # times 16 / 256
        ("--lr 0.8 --lr-scaling sqrt", {"scaled_lr": 0.2}),
        ("--lr 0.8 --lr-scaling none", {"scaled_lr": 0.8}),
        ("--increase-mi mib", {"mi_weight": 5e-4}),
        ("--increase-mi mib --mi-weight 0", {"mi_weight": 0}),
        ("--epochs 40", {"warmup_epochs": 4}),  # a warm-up is meant for a long run
        ("--epochs 40 --warmup-epochs 10", {"warmup_epochs": 10}),
    ],
)
def test_prepare_fills_in_what_follows(toy_file, words, expected):
    args = prepared(toy_file, words)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)
    first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=rng(args.seed)))  # the initial weights'


# --------------------------------------------------------------------------------------------------
# What is refused: in one line that says what is wrong, no file changed


class Opens:
    """Unpickling one runs code."""

    def __reduce__(self):
        return open, ("ran", "w")


def given(value, root, toy):
    """A file with this value."""
    torch.save(value, root / "mine.pt")
    return root / "mine.pt"


def packed(split, key, change, root, toy):
    """A packed file of whose images or labels `change` makes others."""
    value = toy()
    value[split][key] = change(value[split][key])
    return given(value, root, toy)


def pets(change, root, toy):
    """A folder of eight images of one size; `change` gets its path."""
    save_pets(root / "pets", [(9, 9)] * 2)
    change(root / "pets")
    return root / "pets"


def tiny(old, new, root, toy):
    """Tiny ImageNet with something else in its table."""
    table = save_tiny(root)
    table.write_text(table.read_text().replace(old, new))
    return "tiny_imagenet"


def npz(change, root, toy):
    """ImageNet64 with other arrays in its second training file."""
    path = save_imagenet64(root) / "train_data_batch_10.npz"
    np.savez(path, **dict(np.load(path)) | change)
    return "imagenet64"


of = functools.partial
REFUSED = [  # what is loaded, or what is typed after simclr.py
    (of(given, {"a": Opens()}), "mine.pt: .* holds .*open, which is no plain value; nothing was"),
    ("nothing.pt", "nothing.pt: no such file"),
    ("cifar11", "'cifar11' is none of cifar10, cifar100, .* nor a folder, nor a .pt file"),
    (of(given, {"train": None}), "mine.pt: not a packed dataset: expected a dict"),
    (of(given, {"train": {}}), "mine.pt: classes should be a list"),
    (of(packed, "train", "images", torch.Tensor.float), "train images should be a uint8"),
    (of(packed, "train", "images", lambda x: x[:, :2]), r"train images .* \[N, 1 or 3, H, W\]"),
    (of(packed, "train", "images", lambda x: x[:0]), "train images .* N > 0"),
    (of(packed, "train", "labels", torch.Tensor.int), "train labels should be an int64"),
    (of(packed, "test", "labels", lambda y: y[:31]), "test labels should be .* N = 32"),
    (of(packed, "train", "labels", lambda y: y + 1), "train labels run from 1 to 4, .* 4 classes"),
    (of(packed, "test", "images", lambda x: x[..., 1:]), r"different sizes: \[\(16, 15\), \(16"),
    (of(pets, lambda f: shutil.rmtree(f / "train")), "pets: no folder train/; expected train/CL"),
    (of(pets, lambda f: os.truncate(f / "train/dog/1.png", 99)), "dog/1.png: not a readable image"),
    (of(pets, lambda f: (f / "test/dog").rename(f / "test/cow")), "test has 1 .*: cow$"),
    (of(pets, lambda f: shutil.rmtree(f / "test") or (f / "test").mkdir()), "pets/test: no images"),
    ("tiny_imagenet", "unpack http://cs231n.stanford.edu/.* as .*/tiny-imagenet-200$"),
    (of(tiny, "n02", "n99"), "val_annotations.txt: not a readable table .*n99"),
    (of(tiny, "val_10.png", "val_77.png"), "annotations.txt: .* differ in 2 files.*val_10.png"),
    ("imagenet64", "put its train_data_batch_1.npz, .* and val_data.npz in .*/imagenet64$"),
    (lambda root, _: (root / "imagenet64").mkdir() or "imagenet64", "no train_data_batch_1.npz"),
    (of(npz, {"data": np.zeros((2, 12288))}), "batch_10.npz: data is float64, not uint8"),
    (of(npz, {"labels": np.array([0, 5])}), "train labels run from -1 to 998, but .* 1000 classes"),
    (of(npz, {"labels": np.array([1, None])}), "batch_10.npz: .*pickle"),  # which could run code
    ("imagenet100", "unpack it as .*/imagenet100/train/CLASS/.* at .*/imagenet100.pt$"),
    ("--epoch 1", "unrecognized arguments: --epoch 1"),  # which could come to mean another flag
    ("--lr nan", "--lr: nan is out of range, expected a number of at least 1e-09"),
    ("--lr inf", "--lr: inf is out of range"),
    ("--momentum 1.1", "--momentum: 1.1 is out of range, expected a number from 0 to 1"),
    ("--batch-size 65", "--batch-size 65 exceeds the 64 training images"),
    ("--warmup-epochs 9 --epochs 8", "--warmup-epochs 9 exceeds --epochs 8"),
    ("--mi-weight 1", "--mi-weight needs --increase-mi"),
    ("--device abacus", "--device abacus cannot be used here: "),
]


@pytest.mark.parametrize("spoiled, message", REFUSED)
def test_refused(tmp_path, monkeypatch, toy, toy_file, spoiled, message):
    monkeypatch.chdir(tmp_path)
    name = str(spoiled(tmp_path, toy)) if callable(spoiled) else spoiled
    before = tree(tmp_path)
    with pytest.raises(common.InputError) as error:
        if name.startswith("--"):
            prepared(toy_file, name)
        else:
            common.load_dataset(name, tmp_path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert tree(tmp_path) == before  # nothing was written, nor run
