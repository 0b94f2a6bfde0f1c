"""Datasets: packed files, images and folders of other people, and the layouts in which datasets are
published, written here with other libraries. They are read as they were meant, or refused in one
line; and the batches that come of them."""

import functools
import itertools
import multiprocessing
import os
import re
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import SIGNALS, noise, store
from PIL import Image
from test_common import MEAN, STD, close, hardware, noise_bytes, tree
from torch import nn

import common

RED = (254, 0, 0)  # as JPEG gives it back, too
WHITE = (255, 255, 255)


def png_of_16_bits(path):
    """A red PNG of three channels of 16 bits, which Pillow cannot write."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">HHH", 65535, 0, 0) * 8) * 8
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


PALETTE = Image.new("P", (8, 8), 0)
PALETTE.putpalette(RED)


@pytest.mark.parametrize(
    "name, image, options, expected",
    [
        ("rgb.png", Image.new("RGB", (8, 8), RED), {}, RED),
        ("gray.png", Image.new("L", (8, 8), 90), {}, (90, 90, 90)),
        ("bit.png", Image.new("1", (8, 8), 1), {}, WHITE),
        ("palette.png", PALETTE, {}, RED),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 100}, RED),
        ("rgba.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {}, WHITE),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), {}, (127, 127, 127)),
        ("la.png", Image.new("LA", (8, 8), (0, 0)), {}, WHITE),
        ("index.png", PALETTE, {"transparency": 0}, WHITE),
        ("colour.png", Image.new("RGB", (8, 8), RED), {"transparency": RED}, WHITE),
        ("tone.png", Image.new("L", (8, 8), 90), {"transparency": 90}, WHITE),
        ("16.png", Image.fromarray(np.full((8, 8), 40000, np.uint16)), {}, "mode I;16"),
        ("12.tif", Image.fromarray(np.full((8, 8), 4095, np.uint16)), {}, "mode I;16"),
        ("int.tif", Image.fromarray(np.full((8, 8), 70000, np.int32)), {}, "mode I,"),
        ("float.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)), {}, "mode F"),
        ("rgb16.png", png_of_16_bits, {}, "mode RGB, not 8 bits a channel: convert"),
    ],
)
def test_pixels_are_converted_or_refused(tmp_path, name, image, options, expected):
    path = tmp_path / name
    image(path) if callable(image) else image.save(path, **options)
    if isinstance(expected, str):
        with pytest.raises(common.InputError, match=f"{name}: {expected}"):
            common.read_image(path)
        return
    red = np.array(common.read_image(path))[4, 4]
    assert np.abs(red.astype(int) - expected).max() <= 1


def test_images_are_turned_as_exif_says(tmp_path):
    image, exif = Image.new("RGB", (16, 8), RED), Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter of a turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert common.read_image(tmp_path / "turned.jpg").size == (8, 16)


# --------------------------------------------------------------------------------------------------
# Folders


def pixels_of(path, height, width):
    """Noise [3, H, W], of which each path has its own."""
    return noise_bytes(1, height, width, seed=zlib.crc32(str(path).encode()))[0]


def fill(root, *paths, sizes=((6, 8),)):
    """Files below `root`: images, whose sizes take turns, and empty ones of another ending."""
    for path, (height, width) in zip(paths, itertools.cycle(sizes)):  # noqa: B905
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".png", ".jpg"):
            TF.to_pil_image(pixels_of(path, height, width)).save(file)
        else:
            file.write_text("")
    return root


def save_pets(root, sizes, splits=("train", "test")):
    """An image of each size in each of two classes in each split."""
    root = Path(root)
    names = itertools.product(splits, ("cat", "dog"), range(len(sizes)))
    return fill(root, *(f"{split}/{name}/{i}.png" for split, name, i in names), sizes=sizes)


MIXED = [(40, 60), (50, 50), (64, 40)]  # sizes of images that stay on disk


@pytest.mark.parametrize(
    "paths, sizes, classes",
    [
        (["train/a/1.png", "train/b/2.png", "test/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "valid/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "validation/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/3.png", "val/a/4.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/3.png"], (2, None), ["a", "b"]),
        (["train/a/1.png", "val/a/2.png", "val/a/3.png", "test/a/4.png"], (1, 1), ["a"]),
        (["a/1.png", "b/2.png", "b/3.png"], (3, None), ["a", "b"]),
        (["1.png", "2.png"], (2, None), []),
        (["train/1.png", "train/2.png"], (2, None), []),
        (["train/a/x/y/1.PNG", "train/a/2.JpG", "train/b/2.png"], (3, None), ["a", "b"]),
        (["a/1.png", "b/2.png", "__MACOSX/a/._1.png", ".git/3.png"], (2, None), ["a", "b"]),
        (["a/1.png", "a/.2.png", "a/Thumbs.db", "b/desktop.ini", "b/3.png"], (2, None), ["a", "b"]),
    ],
)
def test_layouts_of_folders(tmp_path, paths, sizes, classes):
    data = common.load_dataset(str(fill(tmp_path / "mine", *paths))).to("cpu")
    assert (len(data.train), data.test and len(data.test)) == sizes
    assert (data.name, data.classes, data.size) == ("mine", classes, 6)
    assert "left out" not in " ".join(data.found)
    assert (data.train.labels == -1).all() == (not classes)
    pictures = [path for path in paths if path.lower().endswith(("png", "jpg"))]
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        [path] = [path for path in pictures if as_saved(image, tmp_path / "mine" / path)]
        assert "test" not in path and (not classes or classes[label] in path.split("/"))


def as_saved(image, path):
    return torch.equal(image, TF.pil_to_tensor(Image.open(path).convert("RGB")))


# Some val images are named before others, and classes come in no order, as in the real file.
VAL = {"val_3.png": "n02", "val_0.png": "n03", "val_10.png": "n01", "val_1.png": "n03"}


def save_tiny(root, folder="val/images"):
    """tiny-imagenet-200 as it is unpacked, but small."""
    root = root / common.TINY
    fill(root, *(f"train/{name}/images/1.png" for name in VAL.values()), "test/images/3.png")
    Image.new("L", (8, 6), 90).save(root / "train/n02/images/gray.png")
    fill(root, *(f"{folder.format(name)}/{file}" for file, name in VAL.items()))
    table = root / "val" / common.ANNOTATIONS
    if folder == "val/images":
        table.write_text("".join(f"{file}\t{name}\t0\t0\t8\t6\n" for file, name in VAL.items()))
    return table


@pytest.mark.parametrize("folder", ["val/images", "val/{}"])
def test_tiny_imagenet_as_published_and_in_class_folders(tmp_path, folder):
    save_tiny(tmp_path, folder)
    data = common.load_dataset("tiny_imagenet", tmp_path)
    assert (data.name, data.classes) == ("tiny_imagenet", ["n01", "n02", "n03"])
    assert data.train.labels.tolist() == [0, 1, 1, 2]
    assert data.train.images[2].unique().tolist() == [90]
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        name = data.classes[label]
        here = [tmp_path / common.TINY / folder.format(name) / x for x in VAL if VAL[x] == name]
        assert any(as_saved(image, path) for path in here)
    assert [path.name for path in tmp_path.iterdir()] == [common.TINY]  # it is not packed


def test_what_was_found_is_said(tmp_path):
    paths = "train/a/1.png", "train/b/2.png", "train/a/notes.txt", "train/3.png", "test/a/4.png"
    fill(tmp_path / "imagenet100", *paths, "test/a/x.txt")
    data = common.load_dataset("imagenet100", tmp_path)
    first, second = data.found
    assert first.startswith("imagenet100: 2 training images, 2 classes, 1 test images, 8x6 pix")
    assert second == "left out: 2 .txt, 1 images outside the folders of classes"


def test_a_few_odd_images_are_refused_and_many_are_decoded(tmp_path):
    root = fill(tmp_path / "mine", *(f"a/{i}.png" for i in range(200)))
    fill(root, "b/odd.png", sizes=[(9, 9)])
    with pytest.raises(common.InputError, match="1 of 201 images are not 8x6 .*odd.png: take"):
        common.load_dataset(str(root))
    fill(root, *(f"b/{i}.png" for i in range(9)), sizes=[(10, 10)])
    data = common.load_dataset(str(root))
    assert not data.train.in_memory and data.size == 224
    assert re.search("several sizes.* decoded from disk; --image-size and --stem", data.found[1])


def test_only_so_many_bytes_are_held_in_memory(tmp_path, monkeypatch):
    root = save_pets(tmp_path / "pets", [(10, 10)] * 3)
    for limit, held in (12 * 300, True), (12 * 300 - 1, False):  # of both splits together
        monkeypatch.setattr(common, "MEMORY_LIMIT", limit)
        assert common.load_dataset(str(root)).train.in_memory == held


known = functools.partial(common.recognition, "a method", args=SimpleNamespace(seed=0))


def test_the_data_of_a_run_is_known_by_its_images(tmp_path):
    paths = [f"{name}/{i}.png" for name in "ab" for i in range(3)]
    one = common.load_dataset(str(fill(tmp_path / "one", *paths)))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = common.load_dataset(str(tmp_path / "two"))
    assert known(moved) == known(one)
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    other = known(common.load_dataset(str(tmp_path / "two")))
    assert other["classes"] == ["b", "c"]
    Image.new("RGB", (8, 6), RED).save(tmp_path / "two" / "b" / "0.png")
    assert known(common.load_dataset(str(tmp_path / "two")))["content"] not in (
        other["content"],
        known(one)["content"],
    )


# --------------------------------------------------------------------------------------------------
# Packed files, and the layouts in which datasets are published


def test_without_unlabeled_images_all_are_labelled(tmp_path):
    data = common.load_dataset(str(store(noise(), tmp_path / "mine.pt")))
    assert torch.equal(data.pretrain.images, data.train.images)
    assert torch.equal(data.pretrain.labels, data.train.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_packed_file(tmp_path, channels):
    """Its images without labels are for pretraining alone."""
    saved = noise() | {"unlabeled": {"images": noise_bytes(7, 16)}}
    saved["train"]["images"][:, 2] = 0  # a black channel, whose deviation would divide by 0
    for key in "train", "test", "unlabeled":
        saved[key]["images"] = saved[key]["images"][:, :channels].clone()
    loaded = common.load_dataset(str(store(saved, tmp_path / "mine.pt")))
    assert (loaded.name, loaded.classes, loaded.size) == ("mine", list("abcd"), 16)
    for data in loaded, loaded.to("cpu"):
        labelled, rest = data.pretrain.take(torch.arange(64)), data.pretrain.images[64:]
        for split, key in (data.train, "train"), (data.test, "test"), (labelled, "train"):
            assert torch.equal(split.labels, saved[key]["labels"])
            assert torch.equal(split.images, saved[key]["images"].expand(-1, 3, -1, -1))
        assert torch.equal(rest, saved["unlabeled"]["images"].expand(-1, 3, -1, -1))
        assert data.pretrain.labels[64:].tolist() == [-1] * 7
    values = loaded.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(loaded.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, values.std((0, 2, 3)).clip(1 / 255), rtol=1e-12)


@pytest.mark.parametrize("images", [torch.arange(40), [f"{i}.png" for i in range(40)]])
def test_spread_takes_every_class_of_a_sorted_split(images):
    split = common.Split(images, torch.arange(40) // 4)
    some = split.spread(10)
    assert list(some.images) == list(images[::4]) and some.labels.tolist() == list(range(10))
    assert [len(split.spread(count)) for count in (7, 0, 40, 99)] == [7, 40, 40, 40]


LABELS = {"train_data_batch_10": [5, 1000], "train_data_batch_2": [1, 999, 7], "val_data": [1000]}


def pictures_of(labels):
    return torch.stack([pixels_of(label, 64, 64) for label in labels])


def save_imagenet64(root):
    folder = root / "imagenet64"
    folder.mkdir()
    for name, labels in LABELS.items():
        arrays = {"data": pictures_of(labels).flatten(1).numpy(), "labels": np.array(labels, ">i4")}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def test_imagenet64(tmp_path):
    save_imagenet64(tmp_path)
    data = common.load_dataset("imagenet64", tmp_path)
    assert (data.name, data.size, len(data.classes)) == ("imagenet64", 64, 1000)
    for split, labels in (data.train, [1, 999, 7, 5, 1000]), (data.test, [1000]):
        assert [data.classes[i] for i in split.labels] == [str(label) for label in labels]
        assert torch.equal(split.images, pictures_of(labels))


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


PUBLISHED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
PUBLISHED |= {"stl10": "STL10", "imagenette": "Imagenette"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_download_is_packed_once(tmp_path, monkeypatch, name):
    source = type("Source", (Pictures,), {"mode": "L" if name == "fashion_mnist" else "RGB"})
    crop = slice(None)
    if name == "imagenette":  # which has synonyms; of its 170 pixels the central 160
        source.side, source.classes, crop = 170, [("cat", "tom"), ("dog",)], slice(5, 165)
    monkeypatch.setattr(torchvision.datasets, PUBLISHED[name], source)
    first = common.load_dataset(name, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{name}.pt"]
    monkeypatch.setattr(torchvision.datasets, PUBLISHED[name], None)
    again = common.load_dataset(name, tmp_path / "data")  # read, not downloaded
    for data, key in itertools.product((first, again), ("train", "test")):
        pictures = source("root", split=key, download=True)
        pixels = [TF.pil_to_tensor(picture.convert("RGB")) for picture, _ in pictures]
        assert torch.equal(getattr(data, key).images, torch.stack(pixels)[..., crop, crop])
        assert getattr(data, key).labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert data.classes == ["cat", "dog"]
        assert len(data.pretrain) == (14 if name == "stl10" else 7)


NO_ROUTE = mock.Mock(side_effect=OSError("no\nroute"))
WRONG = type("Wrong", (Pictures,), {"classes": ["cat"]})


@pytest.mark.parametrize("source, message", [(NO_ROUTE, "no route"), (WRONG, "run from 0 to 1")])
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, source, message):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    with pytest.raises(common.InputError, match=message):
        common.load_dataset("cifar10", tmp_path)
    assert tree(tmp_path) == {}


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
    return common.load_dataset(str(save_pets(tmp_path / "pets", MIXED))).train


def test_a_worker_outlives_what_ends_a_run(streamed):
    """Its run takes a step more, saves, and stops the workers itself."""
    args = hardware(image_size=32, workers=1)
    batches = common.batches_of(streamed, torch.arange(6).repeat(4), 1, args)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in SIGNALS:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 23


def test_decode_for_evaluation(streamed):
    """One centre crop of every image in order: [B, 3, S, S]; what is encoded."""
    batches = list(common.batches_of(streamed, torch.arange(6), 4, hardware(image_size=32)))
    assert [images.shape for images, _ in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat([images for images, _ in batches])
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
# What is refused: in one line that says what is wrong, no file changed


class Payload:
    """Unpickling one runs code: it makes a file, as it could delete the user's."""

    def __reduce__(self):
        return open, ("payload_ran", "w")


def packed(split, key, change):
    """A packed file of whose images or labels `change` makes others."""
    value = noise()
    value[split][key] = change(value[split][key])
    return store(value, "mine.pt")


def pets(change):
    """A folder of eight images of one size; `change` gets its path."""
    folder = save_pets("pets", [(9, 9)] * 2)
    change(folder)
    return folder


def tiny(old, new):
    """Tiny ImageNet with something else in its table."""
    table = save_tiny(Path())
    table.write_text(table.read_text().replace(old, new))
    return "tiny_imagenet"


def npz(change):
    """ImageNet64 with other arrays in its second training file."""
    path = save_imagenet64(Path()) / "train_data_batch_10.npz"
    np.savez(path, **dict(np.load(path)) | change)
    return "imagenet64"


of, mine = functools.partial, functools.partial(store, path="mine.pt")
REFUSED = [
    (of(mine, {"a": Payload()}), "mine.pt: .* holds .*open, which is no plain value; nothing was"),
    ("nothing.pt", "nothing.pt: no such file"),
    ("cifar11", "'cifar11' is none of cifar10, cifar100, .* nor a folder, nor a .pt file"),
    (of(mine, {"train": None}), "mine.pt: not a packed dataset: expected a dict"),
    (of(mine, {"train": {}}), "mine.pt: classes should be a list"),
    (of(packed, "train", "images", torch.Tensor.float), "train images should be a uint8"),
    (of(packed, "train", "images", lambda x: x[:, :2]), r"train images .* \[N, 1 or 3, H, W\]"),
    (of(packed, "train", "images", lambda x: x[:0]), "train images .* N > 0"),
    (of(packed, "train", "labels", torch.Tensor.int), "train labels should be an int64"),
    (of(packed, "test", "labels", lambda y: y[:31]), "test labels should be .* N = 32"),
    (of(packed, "train", "labels", lambda y: y + 1), "train labels run from 1 to 4, .* 4 classes"),
    (of(packed, "test", "images", lambda x: x[..., 1:]), r"different sizes: \[\(16, 15\), \(16"),
    (of(pets, lambda f: shutil.rmtree(f / "train")), "pets: no folder train/ beside test$"),
    (of(pets, lambda f: os.truncate(f / "train/dog/1.png", 99)), "dog/1.png: not a readable image"),
    (of(pets, lambda f: (f / "test/dog").rename(f / "test/cow")), "test has 1 .*: cow$"),
    ("tiny_imagenet", "unpack http://cs231n.stanford.edu/.* as .*/tiny-imagenet-200$"),
    (of(tiny, "n02", "n99"), "val_annotations.txt: not a readable table .*n99"),
    (of(tiny, "val_10.png", "val_77.png"), "annotations.txt: .* differ in 2 files.*val_10.png"),
    ("imagenet64", "put its train_data_batch_1.npz, .* and val_data.npz in .*/imagenet64$"),
    (lambda: Path("imagenet64").mkdir() or "imagenet64", "no train_data_batch_1.npz"),
    (of(npz, {"data": np.zeros((2, 12288))}), "imagenet64.pt: train images should be a uint8"),
    (of(npz, {"labels": np.array([0, 5])}), "train labels run from -1 to 998, but .* 1000 classes"),
    (of(npz, {"labels": np.array([1, None])}), "batch_10.npz: .*pickle"),  # which could run code
    ("imagenet100", "unpack it as .*/imagenet100/train/CLASS/.* at .*/imagenet100.pt$"),
]


@pytest.mark.parametrize("spoiled, message", REFUSED)
def test_refused(tmp_path, monkeypatch, spoiled, message):
    monkeypatch.chdir(tmp_path)
    name = str(spoiled()) if callable(spoiled) else spoiled
    before = tree(tmp_path)
    with pytest.raises(common.InputError) as error:
        common.load_dataset(name, tmp_path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert tree(tmp_path) == before  # nothing was written, nor run
