"""Images and folders of other people: read as they were meant, or refused in one line."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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


def palette(colour):
    image = Image.new("P", (8, 8), 0)
    image.putpalette(colour)
    return image


def gray(value):
    return (value, value, value)


@pytest.mark.parametrize(
    "name, image, options, expected",
    [
        ("rgb.png", Image.new("RGB", (8, 8), RED), {}, RED),
        ("gray.png", Image.new("L", (8, 8), 90), {}, gray(90)),
        ("bit.png", Image.new("1", (8, 8), 1), {}, WHITE),
        ("palette.png", palette(RED), {}, RED),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 100}, RED),
        ("rgba.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {}, WHITE),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), {}, gray(127)),
        ("la.png", Image.new("LA", (8, 8), (0, 0)), {}, WHITE),
        ("index.png", palette(RED), {"transparency": 0}, WHITE),
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


def fill(root, *paths, size=8):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if (root / path).suffix.lower() in (".png", ".jpg"):
            tone = len(list(root.rglob("*"))) % 256
            Image.new("RGB", (size, size), gray(tone)).save(root / path)
        else:
            (root / path).write_text("")
    return root


@pytest.mark.parametrize(
    "paths, sizes, classes",
    [
        (["train/a/1.png", "train/b/2.png", "test/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "valid/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "validation/a/3.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/3.png", "val/a/4.png"], (2, 1), ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/3.png"], (2, None), ["a", "b"]),
        (["a/1.png", "b/2.png", "b/3.png"], (3, None), ["a", "b"]),
        (["1.png", "2.png"], (2, None), []),
        (["train/1.png", "train/2.png"], (2, None), []),
        (["train/a/x/y/1.PNG", "train/a/2.JpG", "train/b/2.png"], (3, None), ["a", "b"]),
        (["a/1.png", "b/2.png", "__MACOSX/a/._1.png", ".git/3.png"], (2, None), ["a", "b"]),
        (["a/1.png", "a/.2.png", "a/Thumbs.db", "b/desktop.ini", "b/3.png"], (2, None), ["a", "b"]),
    ],
)
def test_layouts_of_folders(tmp_path, paths, sizes, classes):
    data = common.load_dataset(str(fill(tmp_path / "mine", *paths)))
    assert (len(data.train), data.test and len(data.test)) == sizes
    assert data.classes == classes
    assert "left out" not in " ".join(data.found)
    assert (data.train.labels == -1).all() == (not classes)


@pytest.mark.parametrize("folder", ["val/images", "val/n1"])
def test_tiny_imagenet_as_published_and_in_class_folders(tmp_path, folder):
    root = tmp_path / common.TINY
    paths = "train/n1/images/1.png", "train/n2/images/2.png", "test/images/3.png"
    fill(root, *paths, f"{folder}/4.png")
    if folder == "val/images":
        (root / "val" / common.ANNOTATIONS).write_text("4.png\tn1\t0\t0\t8\t8\n")
    data = common.load_dataset("tiny_imagenet", tmp_path)
    assert (len(data.train), data.test.labels.tolist()) == (2, [0])


def test_what_was_found_is_said(tmp_path):
    paths = "train/a/1.png", "train/b/2.png", "train/a/notes.txt", "train/3.png", "test/a/4.png"
    data = common.load_dataset(str(fill(tmp_path / "mine", *paths, "test/a/x.txt")))
    first, second = data.found
    assert first == "mine: 2 training images, 2 classes, 1 test images, 8x8 pixels, in memory"
    assert second == "left out: 2 .txt, 1 images outside the folders of classes"


def test_a_few_odd_images_are_refused_and_many_are_decoded(tmp_path):
    root = fill(tmp_path / "mine", *(f"a/{i}.png" for i in range(200)))
    fill(root, "b/odd.png", size=9)
    with pytest.raises(common.InputError, match="1 of 201 images are not 8x8 .*odd.png: take"):
        common.load_dataset(str(root))
    fill(root, *(f"b/{i}.png" for i in range(9)), size=10)
    data = common.load_dataset(str(root))
    assert not data.train.in_memory and data.size == 224
    assert re.search("several sizes.* decoded from disk; --image-size and --stem", data.found[1])


def test_the_data_of_a_run_is_known_by_its_images(tmp_path):
    paths = [f"{name}/{i}.png" for name in "ab" for i in range(3)]
    one = common.load_dataset(str(fill(tmp_path / "one", *paths)))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = common.load_dataset(str(tmp_path / "two"))
    assert common.recognition(moved) == common.recognition(one)
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    other = common.recognition(common.load_dataset(str(tmp_path / "two")))
    assert other["classes"] == ["b", "c"]
    Image.new("RGB", (8, 8), RED).save(tmp_path / "two" / "b" / "0.png")
    assert common.recognition(common.load_dataset(str(tmp_path / "two")))["content"] not in (
        other["content"],
        common.recognition(one)["content"],
    )


@pytest.mark.parametrize("smallest, neighbours", [(6, 3), (1, 1)])
def test_no_more_neighbours_than_half_of_the_smallest_class(smallest, neighbours):
    labels = torch.tensor([0] * 90 + [1] * smallest)
    split = common.Split(torch.randn(len(labels), 4), labels)
    args = type("Args", (), {"knn_k": 200, "knn_temperature": 0.1})
    assert common.knn_votes(split, split, 2, args)[1] == neighbours
