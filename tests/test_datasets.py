"""The table of datasets and the layouts in which they are published: small copies of the archives,
written here with other libraries, have to come out with each image in its split and its class; what
is damaged is refused in one line and leaves nothing behind."""

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = Path(__file__).resolve().parent.parent


def tree(folder):
    """Every file below a folder, with what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(name, root):
    """The one line with which a dataset is refused, all files staying what they were."""
    before = tree(root)
    with pytest.raises(common.InputError) as error:
        common.load_dataset(name, root)
    assert tree(root) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    assert (a.name, a.classes, a.size, a.mean, a.std) == (b.name, b.classes, b.size, b.mean, b.std)
    for one, other in (a.train, b.train), (a.test, b.test), (a.pretrain, b.pretrain):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


# --------------------------------------------------------------------------------------------------
# Tiny ImageNet

COLORS = {"n01443537": (200, 30, 30), "n02058221": (30, 200, 30), "n12267677": (30, 30, 200)}
GRAY = "n07734744"  # all its images have one channel
WNIDS = [*COLORS, GRAY]
# Some val images are named before others, and classes come in no order, as in the real file.
VAL = {"val_3": "n12267677", "val_0": GRAY, "val_10": "n01443537", "val_1": "n02058221"}
VAL |= {"val_2": "n01443537"}
WORDS = """n00001740\tentity
n01443537\tgoldfish, Carassius auratus
n02058221\talbatross, mollymawk
n12267677\tacorn
"""


def save_flat(path, wnid, size=(64, 64)):
    """A real JPEG of the class's color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode, color = ("L", 120) if wnid == GRAY else ("RGB", COLORS[wnid])
    Image.new(mode, size, color).save(path, "JPEG")


def write_tiny(root):
    """The unpacked folder, three training images a class."""
    folder = root / "tiny-imagenet-200"
    for wnid in reversed(WNIDS):
        for i in range(3):
            save_flat(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", wnid)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t10\t63\t58\n" for i in range(3))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    for name, wnid in VAL.items():
        save_flat(folder / "val" / "images" / f"{name}.JPEG", wnid)
    rows = [f"{name}.JPEG\t{wnid}\t0\t32\t44\t62\n" for name, wnid in VAL.items()]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    save_flat(folder / "test" / "images" / "test_0.JPEG", GRAY)
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    (folder / "words.txt").write_text(WORDS)
    return folder


def zip_up(folder, method=zipfile.ZIP_DEFLATED):
    """The folder as the zip beside it, which alone stays."""
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", method) as file:
        for path in [folder, *sorted(folder.rglob("*"))]:
            file.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


def color_of(images):
    """[N, 3] of flat images, which JPEG changes by little."""
    assert (images.flatten(2).max(2).values - images.flatten(2).min(2).values).max() <= 6
    return images.float().mean((2, 3))


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet(tmp_path, zipped):
    source = write_tiny(tmp_path)
    source = zip_up(source) if zipped else source
    data = common.load_dataset("tiny_imagenet", tmp_path)
    assert (data.name, data.size) == ("tiny_imagenet", 64)
    assert data.classes == ["goldfish", "albatross", GRAY, "acorn"]  # sorted by wnid
    wnids = sorted(WNIDS)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(data.test.labels.tolist()) == sorted(wnids.index(wnid) for wnid in VAL.values())
    for split in data.train, data.test:
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 64, 64)
        expected = [COLORS.get(wnids[label], (120,) * 3) for label in split.labels]
        difference = color_of(split.images) - torch.tensor(expected)
        assert difference.abs().max() < 6


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet_is_packed_once(tmp_path, zipped):
    source = write_tiny(tmp_path)
    source = zip_up(source) if zipped else source
    first = common.load_dataset("tiny_imagenet", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "tiny_imagenet.pt"}
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    same(first, common.load_dataset("tiny_imagenet", tmp_path))


def test_tiny_imagenet_without_names(tmp_path):
    (write_tiny(tmp_path) / "words.txt").unlink()
    assert common.load_dataset("tiny_imagenet", tmp_path).classes == sorted(WNIDS)


def rewrite(name, old, new):
    """Spoils a text file."""

    def spoil(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new).encode("latin-1"))

    return spoil


SAID = "val/val_annotations.txt"
TRAIN = "train/n01443537/images/n01443537_1.JPEG"
SPOILED = [
    (lambda folder: shutil.rmtree(folder / "train"), "train/CLASS/images"),
    (lambda folder: shutil.rmtree(folder / "val" / "images"), "differ in 5 files"),
    (lambda folder: (folder / SAID).unlink(), "val_annotations.txt: no such file"),
    (lambda folder: (folder / SAID).write_text(""), "val_annotations.txt"),
    (lambda folder: (folder / SAID).write_text("val_0.JPEG\n"), "val_annotations.txt"),
    (rewrite(SAID, "n12267677", "n99999999"), "n99999999"),
    (rewrite(SAID, "val_10.JPEG", "val_77.JPEG"), "differ in 2 files.*val_10.JPEG"),
    (rewrite(SAID, "val_3.JPEG", "../../train/n12267677/images/n12267677_0.JPEG"), "differ in 2"),
    (rewrite(SAID, f"val_0.JPEG\t{GRAY}\t0\t32\t44\t62\n", ""), "differ in 1 .*val_0.JPEG"),
    (rewrite(SAID, "val_0", "val_\xff"), "val_annotations.txt: not a readable text"),
    (rewrite("words.txt", "acorn", "\xff"), "words.txt: not a readable text"),
    (lambda folder: save_flat(folder / TRAIN, "n01443537", (32, 64)), "n01443537_1.JPEG.*64, 32"),
    (lambda folder: save_flat(folder / "val/images/val_0.JPEG", GRAY, (65, 65)), "val_0.JPEG"),
    (lambda folder: (folder / TRAIN).write_bytes(b"no picture"), "n01443537_1.JPEG"),
    (lambda folder: (folder / TRAIN).write_bytes((folder / TRAIN).read_bytes()[:400]), "537_1.JP"),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("spoil, complaint", SPOILED)
def test_spoiled_tiny_imagenet_is_refused(tmp_path, spoil, complaint, zipped):
    folder = write_tiny(tmp_path)
    spoil(folder)
    if zipped:
        zip_up(folder)
    line = refused("tiny_imagenet", tmp_path)
    assert re.search(complaint, line) and str(tmp_path / "tiny-imagenet-200") in line


def flip_a_byte_of_an_image(path):
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"tiny-imagenet-200/{TRAIN}").header_offset
    content = bytearray(path.read_bytes())
    content[start + 500] ^= 255  # past the local header, in the image
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: zip_up(path.parent.joinpath("other")).rename(path),
        flip_a_byte_of_an_image,
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_is_refused(tmp_path, damage, method):
    (tmp_path / "other").mkdir()
    archive = zip_up(write_tiny(tmp_path), method)
    damage(archive)
    assert str(archive) in refused("tiny_imagenet", tmp_path)


def test_where_tiny_imagenet_is_to_be_had(tmp_path):
    line = refused("tiny_imagenet", tmp_path)
    assert "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in line
    assert str(tmp_path / "tiny-imagenet-200.zip") in line


# --------------------------------------------------------------------------------------------------
# ImageNet-100: a list of class folders

SYNSETS = [f"n0{i}" for i in range(1, 7)]


def write_imagenet(root, sizes=((40, 30), (30, 40))):
    """Six classes whose images are as bright as their number says."""
    for split in "train", "val":
        for i, wnid in enumerate(SYNSETS, 1):
            folder = root / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for j, size in enumerate(sizes):
                Image.new("RGB", size, (40 * i,) * 3).save(folder / f"{j}.png")


def brightness(path):
    return Image.open(path).getpixel((0, 0))[0]


def test_imagenet100_is_chosen_from_imagenet(tmp_path):
    write_imagenet(tmp_path)
    lines = "# of CMC", "", "n05 a dog, of some kind", "n02\tcat # tabby", "\tn03  ", "n05", "#n01"
    (tmp_path / "imagenet100.txt").write_text("\n".join(lines))
    data = common.load_dataset("imagenet100", tmp_path)
    assert (data.name, data.classes) == ("imagenet100", ["n02", "n03", "n05"])
    for split, folder in (data.train, "train"), (data.test, "val"):
        assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert [brightness(path) for path in split.images] == [80, 80, 120, 120, 200, 200]
        assert {path.parts[-3] for path in split.images} == {folder}
    assert (data.size, data.mean, data.std) == (224, common.IMAGENET_MEAN, common.IMAGENET_STD)
    assert len(common.load_dataset("imagenet", tmp_path).classes) == 6
    assert not (tmp_path / "imagenet100.pt").exists()  # what is decoded from disk stays there


def test_imagenet100_of_one_size_is_held_in_memory(tmp_path):
    write_imagenet(tmp_path, [(16, 16)])
    (tmp_path / "imagenet100.txt").write_text("n06\nn01\n")
    data = common.load_dataset("imagenet100", tmp_path)
    assert data.train.in_memory and data.name == "imagenet100"
    assert data.train.images[:, 0, 0, 0].tolist() == [40, 240]


def test_own_folder_comes_before_the_list(tmp_path):
    write_imagenet(tmp_path)
    shutil.copytree(tmp_path / "imagenet", tmp_path / "imagenet100")
    (tmp_path / "imagenet100.txt").write_text("n06\n")
    assert common.load_dataset("imagenet100", tmp_path).classes == SYNSETS


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("n01\nn77\n", "1 of 2 .*: n77$"),
        ("n74\nn73\nn72\nn71\nn01\n", r"4 of 5 .*: n71, n72, n73, \.\.\.$"),
        ("..\n", "1 of 1"),
        ("# nothing\n\n", "no class folder"),
        (b"\xff\xfe\n", "not a readable text"),
    ],
)
def test_wrong_list_is_refused(tmp_path, text, complaint):
    write_imagenet(tmp_path)
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "imagenet100.txt").write_bytes(text)
    line = refused("imagenet100", tmp_path)
    assert re.search(complaint, line) and str(tmp_path / "imagenet100.txt") in line


def test_list_without_imagenet_is_refused(tmp_path):
    (tmp_path / "imagenet100.txt").write_text("n01\n")
    assert str(tmp_path / "imagenet") in refused("imagenet100", tmp_path)


def test_where_imagenet100_may_be(tmp_path):
    line = refused("imagenet100", tmp_path)
    assert "imagenet100.txt" in line and "imagenet100/train" in line and "imagenet100.pt" in line


# --------------------------------------------------------------------------------------------------
# ImageNet at 64 x 64

LABELS = {"train_data_batch_10": [5, 1000], "train_data_batch_2": [1, 999, 7], "val_data": [1000]}


def pixels_of(label):
    """Noise [3, 64, 64] that is the same for the same label."""
    noise = np.random.default_rng(label)
    return noise.integers(0, 256, (3, 64, 64), dtype=np.uint8)


def write_imagenet64(root, save=np.savez, **changes):
    """Real npz files, with the mean image that is in the published ones; `changes` replaces arrays
    of the second training file."""
    folder = root / "imagenet64"
    folder.mkdir()
    for name, labels in LABELS.items():
        arrays = {"data": np.stack([pixels_of(label).ravel() for label in labels])}
        arrays |= {"labels": np.array(labels), "mean": arrays["data"].mean(0)}
        if name == "train_data_batch_10":
            arrays |= changes
        arrays = {key: value for key, value in arrays.items() if value is not None}
        save(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_imagenet64(tmp_path, save):
    folder = write_imagenet64(tmp_path, save)
    data = common.load_dataset("imagenet64", tmp_path)
    assert (data.name, data.size) == ("imagenet64", 64)
    assert data.classes == [str(i) for i in range(1, 1001)]
    for split, labels in (data.train, [1, 999, 7, 5, 1000]), (data.test, [1000]):
        assert [data.classes[i] for i in split.labels] == [str(label) for label in labels]
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        expected = np.stack([pixels_of(label) for label in labels])
        np.testing.assert_array_equal(split.images.numpy(), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"imagenet64", "imagenet64.pt"}
    shutil.rmtree(folder)
    same(data, common.load_dataset("imagenet64", tmp_path))


@pytest.mark.parametrize("dtype", ["uint16", ">i4", "int32"])
def test_imagenet64_labels_of_any_integer_type(tmp_path, dtype):
    write_imagenet64(tmp_path, labels=np.array([5, 1000], dtype=dtype))
    data = common.load_dataset("imagenet64", tmp_path)
    assert data.train.labels.tolist() == [0, 998, 6, 4, 999]


def bytes_of(shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"data": None}, "no data"),
        ({"labels": None}, "no labels"),
        ({"data": bytes_of((2, 3072))}, r"data is uint8 \[2, 3072\]"),
        ({"data": bytes_of((2, 3, 64, 64))}, r"data is uint8 \[2, 3, 64, 64\]"),
        ({"data": bytes_of((3, 12288))}, r"data is uint8 \[3, 12288\]"),
        ({"data": bytes_of((2, 12288), np.float32)}, "data is float32"),
        ({"data": bytes_of((2, 12288), np.int8)}, "data is int8"),
        ({"labels": np.array([0, 5])}, "from 0 to 5"),
        ({"labels": np.array([1, 1001])}, "from 1 to 1001"),
        ({"labels": np.array([1.0, 2.0])}, "labels are float64"),
        ({"labels": np.array([[1, 2]])}, r"labels are int64 \[1, 2\]"),
        ({"labels": np.array([], int), "data": bytes_of((0, 12288))}, r"labels are int64 \[0\]"),
        ({"labels": np.array([1, 2], dtype=object)}, "not a readable npz"),
        ({"data": np.array([None, 1], dtype=object)}, "not a readable npz"),
    ],
)
def test_wrong_imagenet64_is_refused(tmp_path, changes, complaint):
    folder = write_imagenet64(tmp_path, **changes)
    line = refused("imagenet64", tmp_path)
    assert re.search(complaint, line) and str(folder / "train_data_batch_10.npz") in line


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train_data_batch_2", "val_data"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: np.save(path.open("wb"), np.zeros(3)),  # an npy file by the name of an npz
        lambda path: np.save(path.open("wb"), np.array([{}]), allow_pickle=True),
        flip_a_byte,
    ],
)
def test_damaged_imagenet64_is_refused(tmp_path, damage, save, name):
    path = write_imagenet64(tmp_path, save) / f"{name}.npz"
    damage(path)
    assert str(path) in refused("imagenet64", tmp_path)


def test_incomplete_imagenet64_is_refused(tmp_path):
    folder = write_imagenet64(tmp_path)
    (folder / "val_data.npz").rename(tmp_path / "val_data.npz")
    assert "val_data.npz: no such file" in refused("imagenet64", tmp_path)
    (tmp_path / "val_data.npz").rename(folder / "val_data.npz")
    for path in folder.glob("train*"):
        path.rename(folder / f"copy of {path.name}")
    assert "no train_data_batch_1.npz" in refused("imagenet64", tmp_path)
    shutil.rmtree(folder)
    assert "val_data.npz" in refused("imagenet64", tmp_path)


# --------------------------------------------------------------------------------------------------
# The table


def packed_like(name, classes=0, side=0, mean=0.0, std=0.0):
    """A packed dataset with what the table says of it, plus these differences. Of three images, one
    is as bright as that takes."""
    known = common.DATASETS[name]
    count, side = known.classes + classes, known.size + side
    centre, deviation = torch.tensor(known.mean) + mean, torch.tensor(known.std) + std
    steps = torch.tensor([2.0, -1, -1])[:, None] / 2**0.5  # mean 0, deviation 1
    colors = (255 * (centre + steps * deviation)).round()
    assert colors.min() >= 0 and colors.max() <= 255
    images = colors.byte()[:, :, None, None].repeat(1, 1, side, side)
    names = [str(i) for i in range(count)]
    return {"train": {"images": images, "labels": torch.arange(3)}, "classes": names}


def said(name, root, capsys, packed):
    """What is printed when a packed file is loaded by its name."""
    torch.save(packed, root / f"{name}.pt")
    capsys.readouterr()
    data = common.load_dataset(name, root)
    own = common.pixel_statistics(data.train.images)
    assert (data.mean, data.std) == own  # whatever the table says
    return capsys.readouterr().out


NAMES = sorted(set(common.DATASETS) - {"shapes"})


@pytest.mark.parametrize("name", NAMES)
def test_no_note_where_a_dataset_is_as_the_table_says(tmp_path, capsys, name):
    assert said(name, tmp_path, capsys, packed_like(name)) == ""
    assert said(name, tmp_path, capsys, packed_like(name, mean=0.02, std=-0.02)) == ""


@pytest.mark.parametrize("name", NAMES)
def test_note_on_classes_and_sides(tmp_path, capsys, name):
    known, path = common.DATASETS[name], tmp_path / f"{name}.pt"
    line = said(name, tmp_path, capsys, packed_like(name, classes=-6))
    few = known.classes - 6
    expected = f"note: {path} has {few} classes, {name} has {known.classes}: is it that dataset?\n"
    assert line == expected
    line = said(name, tmp_path, capsys, packed_like(name, side=2))
    assert line.startswith("note: ") and line.count("\n") == 1
    assert f"side of {known.size + 2}, {name} has {known.size}:" in line and " classes" not in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moved", [{"mean": 0.035}, {"mean": -0.035}, {"std": -0.035}])
def test_note_on_statistics(tmp_path, capsys, name, moved):
    (key,) = moved
    line = said(name, tmp_path, capsys, packed_like(name, **moved))
    if name in ("imagenette", "imagenet100", "imagenet64"):  # theirs are not known
        assert line == ""
    else:
        value = f"{getattr(common.DATASETS[name], key)[0]:.3f}"
        assert re.fullmatch(rf"note: .* a {key} of .*, {name} has {value}/.*\?\n", line)


def test_one_channel_is_enough_for_a_note(tmp_path, capsys):
    packed = packed_like("cifar10")
    packed["train"]["images"][:, 2] += 12
    line = said("cifar10", tmp_path, capsys, packed)
    assert "mean of 0.492/0.482/0.494, cifar10" in line and "std" not in line


def test_all_differences_are_in_one_note(tmp_path, capsys):
    changed = packed_like("stl10", classes=1, side=-32, mean=0.1, std=-0.1)
    line = said("stl10", tmp_path, capsys, changed)
    assert line.startswith("note: ") and line.count("\n") == 1
    for word in "11 classes", "side of 64", "mean of 0.5", "std of 0.1", "10 and 96 and 0.447":
        assert word in line


def test_no_note_on_what_is_no_dataset_of_the_table(tmp_path, capsys):
    torch.save(packed_like("cifar10", classes=1, side=1), tmp_path / "cifar10.pt")
    common.load_dataset(str(tmp_path / "cifar10.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_images_on_disk_have_size_and_statistics_of_the_table(tmp_path, capsys, name):
    write_imagenet(tmp_path)
    if name != "imagenet":
        (tmp_path / "imagenet").rename(tmp_path / name)
    data, known = common.load_dataset(name, tmp_path), common.DATASETS[name]
    assert not data.train.in_memory and data.name == name
    assert (data.size, data.mean, data.std) == (known.size, known.mean, known.std)
    expected = f"note: {tmp_path / name} has 6 classes, {name} has {known.classes}: is it"
    assert capsys.readouterr().out == f"{expected} that dataset?\n"
    unnamed = common.load_dataset(str(tmp_path / name))
    assert (unnamed.size, unnamed.mean) == (224, common.IMAGENET_MEAN)


def test_note_on_what_was_packed_just_now(tmp_path, capsys):
    write_tiny(tmp_path)
    common.load_dataset("tiny_imagenet", tmp_path)
    first = capsys.readouterr().out
    assert first.startswith(f"note: {tmp_path / 'tiny_imagenet.pt'} has 4 classes and a mean of")
    common.load_dataset("tiny_imagenet", tmp_path)
    assert capsys.readouterr().out == first


def test_a_download_that_is_refused_is_not_stored(tmp_path, monkeypatch):
    wrong = packed_like("cifar10") | {"classes": ["one"]}
    monkeypatch.setattr(common, "download", lambda name, root: wrong)
    assert "labels run from 0 to 2" in refused("cifar10", tmp_path)


OWN = [name for name, known in common.DATASETS.items() if not known.nominal]
OWN.remove("imagenet")  # of crops, and decoded from disk


@pytest.mark.parametrize("name", OWN)
def test_statistics_are_those_of_the_dataset(name, capsys):
    """Those that are in data/; `shapes` always is."""
    if name != "shapes" and not (ROOT / "data" / f"{name}.pt").exists():
        pytest.skip("not downloaded")
    data, known = common.load_dataset(name, ROOT / "data"), common.DATASETS[name]
    assert capsys.readouterr().out == ""
    assert (len(data.classes), data.size) == (known.classes, known.size)
    assert tuple(round(value, 4) for value in data.mean) == known.mean
    assert tuple(round(value, 4) for value in data.std) == known.std


def test_table_of_the_readme():
    section = (ROOT / "README.md").read_text().split("\n## Data\n")[1].split("\n## ")[0]
    pattern = r"^\| `(\w+)` \| (\d+) \| (\d+) \| (.+?) \| (.+?) \| .+ \|$"
    rows, found = re.findall(pattern, section, re.M), {}
    for name, classes, side, *statistics in rows:
        nominal = ["*" in text for text in statistics]
        assert nominal[0] == nominal[1]
        mean, std = (tuple(map(float, text.strip("* ").split())) for text in statistics)
        found[name] = common.Known(int(classes), int(side), mean, std, nominal[0])
    assert found == common.DATASETS and [row[0] for row in rows] == list(common.DATASETS)
    assert common.TINY_URL in section
