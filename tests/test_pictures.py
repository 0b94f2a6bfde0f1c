"""The pictures of linear_eval.py: what they show is what was computed, it is where it belongs, and
every text is within the picture and apart from the others."""

import argparse
import itertools
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import common
import linear_eval
from linear_eval import BLUE, COLORS, INK, ORANGE, PALE


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(n, size=8):
    """n images of one colour each, no two the same, none a colour of the pictures themselves, and
    these colours as bytes."""
    colors = [(3 + 7 * i % 251, 101 + i // 251, 61) for i in range(n)]
    images = torch.tensor(colors).view(n, 3, 1, 1).expand(n, 3, size, size) / 255
    return images, colors


def mask(picture, color):
    """bool [height, width]: where the picture has exactly this colour."""
    color = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) if "#" in color else color
    planes = zip(picture.split(), color, strict=True)
    return np.logical_and.reduce([np.asarray(plane) == value for plane, value in planes])


def box(where):
    """(left, top, right, bottom), all inside, of what is true."""
    rows, columns = np.nonzero(where)
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.fixture
def written(monkeypatch):
    """All texts, as (image, text as shown, size, colour, box of its ink)."""
    original, found = linear_eval.write, []

    def write(image, x, y, text, size=14, align=0.0, width=9999, fill=INK, upright=False):
        original(image, x, y, text, size, align, width, fill, upright)
        larger = Image.new("L", (image.width + 200, image.height + 200))
        original(larger, x + 100, y + 100, text, size, align, width, 255, upright)
        ink = [v - 100 for v in larger.getbbox() or ()]  # right and bottom are outside
        found.append((image, linear_eval.shortened(text, width, size), size, fill, ink))

    monkeypatch.setattr(linear_eval, "write", write)
    return found


def texts(written):
    return [text for _, text, *_ in written]


# --------------------------------------------------------------------------------------------------
# All four

KINDS = {
    "two": (2, 30, ["cat", "an animal that has four legs, or two legs and two wings"]),
    "ten": (10, 100, [f"class {i}" for i in range(10)]),
    "twenty": (20, 100, [f"class {i} with a name that is long" for i in range(20)]),
    "thousand": (1000, 1200, [f"n{i:08} t\u00eate,\n\u7af9 number {i}" for i in range(1000)]),
    "one image": (2, 1, ["cat", "dog"]),
    "no name": (3, 5, ["", " ", "W" * 3000]),
}


def pictures(num_classes, n, classes, title="A heading"):
    """One picture of each kind."""
    labels = torch.arange(n) % num_classes
    features, images = random(n, 12), plain(n)[0]
    chosen, nearest = linear_eval.nearest_images(features, labels, random(n, 12, seed=1))
    some = images[chosen], labels[chosen], images[nearest], labels[nearest]
    yield linear_eval.neighbors_picture(*some, classes, title)
    points, _ = linear_eval.principal_components(features)
    yield linear_eval.map_picture(images, labels, points, classes, title, ("across", "up"))
    values = linear_eval.covariance_spectrum(features)
    curves = {"representation": [("first", values), ("second", values**2)], "z": [("", values)]}
    yield linear_eval.spectrum_picture(curves, title)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts.index_put_((labels, labels.flip(0)), torch.ones_like(labels), accumulate=True)
    yield linear_eval.confusion_picture(counts, classes, title)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_legible(kind, written):
    for picture in pictures(*KINDS[kind], "A heading of many words. " * 8):
        assert picture.mode == "RGB" and 600 <= picture.width <= 2000
        corners = [(0, 0), (picture.width - 1, picture.height - 1)]
        assert all(picture.getpixel(corner) == (255, 255, 255) for corner in corners)
        boxes = [(image, text, ink) for image, text, _, _, ink in written if ink]
        assert min(size for _, _, size, *_ in written) >= 12
        for image, text, (left, top, right, bottom) in boxes:
            assert 0 <= left and right <= image.width, text
            assert 0 <= top and bottom <= image.height, text
        for (image, text, a), (other, text2, b) in itertools.combinations(boxes, 2):
            apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
            assert image is not other or apart, (text, text2)
        assert " ".join(texts(written)).count("many words.") == 8  # none is lost by wrapping
        written.clear()


def test_they_are_the_same_again():
    for first, second in zip(pictures(*KINDS["ten"]), pictures(*KINDS["ten"]), strict=True):
        assert first.tobytes() == second.tobytes()


PLAIN = {"caf\u00e9\tau  lait": "cafe au lait", "\u72ac": "?", "a\x00b": "a?b"}


@pytest.mark.parametrize("text", ["", "cat", "W" * 50, *PLAIN, "x" * 9999])
def test_shortened(text):
    full, font = linear_eval.shortened(text, 10**6), linear_eval.font(14)
    short = linear_eval.shortened(text, 90)
    assert full.isascii() and full.isprintable() and font.getlength(short) <= 90
    assert short == full or (short.endswith("...") and full.startswith(short[:-3].rstrip()))
    assert full == PLAIN.get(text, full)


# --------------------------------------------------------------------------------------------------
# Neighbours


def test_nearest_by_brute_force():
    test, train, labels = random(30, 6), random(50, 6, seed=1), torch.arange(30) % 3
    scale = torch.arange(1, 51)[:, None] ** 2  # the cosine does not see it
    chosen, nearest = linear_eval.nearest_images(test, labels, train * scale, rows=7, count=4)
    assert chosen.shape == (7,) and nearest.shape == (7, 4)
    for i, found in zip(chosen.tolist(), nearest.tolist(), strict=True):
        cosines = []
        for x in train.tolist():
            dot = sum(a * b for a, b in zip(x, test[i].tolist(), strict=True))
            norms = sum(a * a for a in x) * sum(a * a for a in test[i].tolist())
            cosines.append(dot / norms**0.5)
        assert found == sorted(range(50), key=lambda k, cosines=cosines: -cosines[k])[:4]


@pytest.mark.parametrize("num_classes, each", [(10, 1), (2, 5), (5, 2), (100, 1)])
def test_test_images_are_spread_over_classes(num_classes, each):
    labels = torch.arange(400).mul(7) % num_classes
    chosen, _ = linear_eval.nearest_images(random(400, 3), labels, random(9, 3))
    counts = torch.bincount(labels[chosen], minlength=num_classes)
    assert len(set(chosen.tolist())) == 10 and counts.max() == each
    evenly = [i * num_classes // 10 for i in range(10)]
    assert labels[chosen].tolist() == evenly
    for i in chosen.tolist():  # the first of its class, or the second, ...
        assert int((labels[:i] == labels[i]).sum()) < each


def test_a_rare_class_is_shown_and_nothing_twice():
    labels = torch.zeros(40, dtype=torch.int64)
    labels[17] = 3
    chosen, nearest = linear_eval.nearest_images(random(40, 3), labels, random(5, 3))
    assert 17 in chosen and len(set(chosen.tolist())) == 10 and nearest.shape == (10, 5)
    chosen, nearest = linear_eval.nearest_images(random(4, 3), labels[:4], random(5, 3), count=2)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3] and nearest.shape == (4, 2)


def test_frames_and_names_are_at_their_images(written):
    images, colors = plain(8)
    mine, train_labels = torch.tensor([1, 0]), torch.tensor([[1, 0, 1], [1, 0, 2]])
    names, arguments = ["ant", "bee", "cat"], (images[:2], mine, images[2:].unflatten(0, (2, 3)))
    picture = linear_eval.neighbors_picture(*arguments, train_labels, names, "Title")
    blue, orange = mask(picture, BLUE), mask(picture, ORANGE)
    labels = [*mine.tolist(), *train_labels.flatten().tolist()]
    body = written[0][0]
    place = picture.width - 16 - body.width, picture.height - 16 - body.height
    for i, color in enumerate(colors):
        left, top, right, bottom = box(mask(picture, color))
        assert right - left + 1 >= 64 and bottom - top == right - left
        around = np.s_[top - 9 : bottom + 10, left - 9 : right + 10]
        same = None if i < 2 else labels[i] == int(mine[(i - 2) // 3])
        assert (blue[around].any(), orange[around].any()) == (same is True, same is False)
        if same is not None:  # whole or with gaps
            line = (blue if same else orange)[top - 4, left:right]
            assert line.any() and line.all() == same
        below = [text for image, text, _, _, ink in written if image is body
                 and abs((ink[0] + ink[2] + left + right) / 2 - left - right + place[0]) < 3
                 and 0 < ink[1] + place[1] - bottom < 20]  # fmt: skip
        assert below == [names[labels[i]]]
    everything = " ".join(texts(written))
    assert "Title 3 of the 6 neighbours shown, 50%" in everything
    assert "neighbour of another class" in everything and "test image" in everything


def test_only_the_chosen_images_are_decoded(monkeypatch):
    args = argparse.Namespace(image_size=8, device="cpu", workers=0, seed=0)
    stored = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    labels, index, asked = torch.arange(6), torch.tensor([4, 1]), []

    def decode(split, items, batch_size, args):
        asked.extend(split.images[i] for i, _ in items)
        yield torch.stack([stored[int(split.images[i])] for i, _ in items])[:, None], split.labels

    monkeypatch.setattr(common, "decode", decode)
    wanted = stored[index] / 255
    for images in stored, list("012345"):
        found = linear_eval.images_at(common.Split(images, labels), index, args)
        assert torch.allclose(found, wanted, atol=1e-6)
    assert asked == ["4", "1"]


# --------------------------------------------------------------------------------------------------
# Map


def test_principal_components():
    features = random(40, 7) @ random(7, 7, seed=1) + 5
    points, shares = linear_eval.principal_components(features)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(shares, singular[:2] ** 2 / (singular**2).sum())
    assert np.allclose(points.abs().numpy(), np.abs(centred @ axes[:2].T))
    for k in 0, 1:
        sign = np.sign(axes[k, np.abs(axes[k]).argmax()])
        assert np.allclose(points[:, k], sign * centred @ axes[k])
    again, _ = linear_eval.principal_components(features.flip(0))
    assert torch.allclose(again.flip(0), points)
    _, shares = linear_eval.principal_components(features[:, :2])
    assert float(shares.sum()) == pytest.approx(1) and shares[0] > shares[1]


def test_cells():
    points = random(300, 2).double()
    shown = linear_eval.map_cells(points, 20)
    assert len(set(shown.values())) == len(shown) < 300
    low, high = points.amin(0), points.amax(0)
    for (column, row), i in shown.items():
        x, y = ((points[i] - low) / (high - low) * 15 + 2).round().tolist()
        assert max(abs(column - x), abs(19 - row - y)) <= 2 and 0 <= min(column, row)
        assert max(column, row) < 20
    for i in set(range(300)) - set(shown.values()):  # left out only where all is taken
        x, y = ((points[i] - low) / (high - low) * 15 + 2).round().long().tolist()
        near = itertools.product(range(x - 2, x + 3), range(17 - y, 22 - y))
        assert all(cell in shown for cell in near)
    assert len(linear_eval.map_cells(torch.zeros(99, 2), 12)) == 25
    assert list(linear_eval.map_cells(torch.ones(1, 2), 12).values()) == [0]


def test_map_places_and_colors(written):
    images, colors = plain(5)
    points = torch.tensor([[0.0, 0.0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]])
    labels, names, axes = torch.tensor([0, 1, 2, 1, 0]), ["ant", "bee", "cat"], ("across", "up")
    picture = linear_eval.map_picture(images, labels, points, names, "Title", axes)
    boxes = np.array([box(mask(picture, color)) for color in colors])
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert middle[0, 0] == middle[2, 0] < middle[4, 0] < middle[1, 0] == middle[3, 0]
    assert middle[0, 1] == middle[1, 1] > middle[4, 1] > middle[2, 1] == middle[3, 1]  # up is up
    for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
        for x, y in (left - 2, top), (right + 2, top), (left, top - 2), (left, bottom + 2):
            assert mask(picture, COLORS[label])[y, x]
    found = {text: ink for _, text, *_, ink in written}
    assert {"ant", "bee", "cat", "across", "up"} <= found.keys()
    assert any("5 of 5 images" in text for text in found)
    body = next(image for image, text, *_ in written if text == "ant")
    for name, color in zip(names, COLORS, strict=False):  # the legend
        left, top, _, bottom = found[name]
        assert mask(body, color)[(top + bottom) // 2, left - 16]


def test_many_classes_have_no_colors():
    images, labels = plain(40)[0], torch.arange(40) % 21
    names, points = [f"c{i}" for i in range(21)], random(40, 2)
    with_colors = linear_eval.map_picture(images, labels % 20, points, names[:20], "", ("", ""))
    without = linear_eval.map_picture(images, labels, points, names, "", ("", ""))
    colors = [color for color in COLORS if color not in ("#000000", "#a9a9a9")]  # as in texts
    assert all(mask(with_colors, color).sum() > 100 for color in colors)
    assert not any(mask(without, color).any() for color in colors)
    assert len(set(COLORS)) == 20


def test_tsne_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(common.InputError, match="--map tsne needs scikit-learn: pip install"):
        linear_eval.tsne(random(100, 4), 0)


@pytest.mark.parametrize("n, perplexity", [(1000, 50), (151, 50), (61, 20)])
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
# Spectrum


@pytest.mark.parametrize("n", [50, 6, 1])
def test_spectrum_is_that_of_the_covariance(n):
    features = random(n, 9) * torch.arange(1, 10) + 3
    found = linear_eval.covariance_spectrum(features)
    wanted = np.linalg.eigvalsh(np.cov(features.double().numpy().T)) if n > 1 else np.zeros(9)
    assert found.dtype == torch.float64 and found.shape == (9,) and found.min() >= 0
    assert np.allclose(np.sort(found), wanted.clip(0), atol=1e-9)


def test_shares_and_effective_dimension():
    shares = linear_eval.variance_shares(torch.tensor([1.0, 4, 0, 3, 1e-14, -1e-9]))
    assert torch.allclose(shares, torch.tensor([0.5, 0.375, 0.125, 0, 0, 0]).double())
    assert (shares > 0).sum() == 3
    dimension = [linear_eval.effective_dimension(linear_eval.variance_shares(torch.tensor(x)))
                 for x in ([2.0] * 7, [5.0, 0, 0], [3.0, 3, 0], [0.0, 0])]  # fmt: skip
    assert dimension == pytest.approx([7, 1, 2, 0])
    half = np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4))
    shares = linear_eval.variance_shares(torch.tensor([1.0, 3]))
    assert linear_eval.effective_dimension(shares) == pytest.approx(half)


def grid(picture):
    """Where pale lines are: the y of the horizontal ones, the x of the vertical ones."""
    pale = mask(picture, PALE)
    return [np.nonzero(pale.sum(axis) > 60)[0] for axis in (1, 0)]


def test_axis_is_logarithmic(written):
    curve = torch.tensor([0.1, 1, 0.01])  # unsorted
    picture = linear_eval.spectrum_picture({"z": [("x", curve)]}, "Title")
    (rows, columns), line = grid(picture), mask(picture, COLORS[0])
    assert len(columns) == 3 and np.ptp(np.diff(columns)) <= 1
    y = [np.nonzero(line[: rows[-1] + 2, x])[0].mean() for x in columns + [1, 0, -1]]
    decade = np.diff(rows).mean()
    assert np.ptp(np.diff(rows)) <= 1 and np.allclose(np.diff(y), decade, atol=2)
    assert y[0] - rows[0] == pytest.approx(-np.log10(1 / 1.11) * decade, abs=2)  # 10^0 is on top
    exponents = {text: ink[1] for _, text, size, _, ink in written if size == 12}
    names = sorted(exponents, key=exponents.get)
    assert names == ["0", "-1", "-2", "-3"][: len(rows)] and len(rows) == len(names)
    assert {"1", "2", "3"} <= set(texts(written))
    assert any("x: effective dimension 1.4 of 3" in text for text in texts(written))


def test_what_is_nothing_is_on_the_lower_edge(written):
    curve = torch.cat([torch.logspace(0, -30, 31, dtype=torch.float64), torch.zeros(29)])
    picture = linear_eval.spectrum_picture({"z": [("x", curve)]}, "")
    (rows, columns), line = grid(picture), mask(picture, COLORS[0])
    assert 3 <= len(rows) <= 11  # ten decades
    right = np.nonzero(line[: rows[-1] + 2, columns[-1] - 3])[0]
    assert abs(right.mean() - rows[-1]) <= 1
    assert "On the lower edge" in " ".join(texts(written))
    written.clear()
    linear_eval.spectrum_picture({"z": [("x", torch.tensor([1.0, 0.5]))]}, "")
    assert "On the lower edge" not in " ".join(texts(written))


def test_lines_differ_in_colour_and_dashes():
    curves = [(str(i), 10.0 ** torch.linspace(0, -i, 50)) for i in (1, 2, 3, 4)]
    picture = linear_eval.spectrum_picture({"z": curves}, "")
    (rows, columns), gaps = grid(picture), []
    for color in COLORS[:4]:
        there = mask(picture, color)[rows[0] : rows[-1] + 2, columns[0] + 150 : columns[-1]].any(0)
        gaps.append(int((np.diff(there.astype(int)) == 1).sum()))
    assert gaps[0] <= 6 < min(gaps[1:]) and len(set(gaps)) == 4  # the first: where it is crossed


# --------------------------------------------------------------------------------------------------
# Confusion


def test_shading_follows_the_share(written):
    counts = torch.tensor([[60, 25, 10, 5], [4, 90, 4, 2], [21, 22, 43, 14], [1, 11, 18, 70]])
    counts[1] *= 10  # of a larger class: shares matter
    picture = linear_eval.confusion_picture(counts, list("abcd"), "Title")
    pixels, colors = np.asarray(picture), []
    rows, columns = grid(picture)
    left, top, cell = columns[0], rows[0], (columns[-1] - columns[0]) / 4
    for i, j in itertools.product(range(4), range(4)):
        y, x = round(top + i * cell + cell / 6), round(left + j * cell + cell / 6)
        colors.append(int(pixels[y, x].astype(int).sum()))
    share = (counts / counts.sum(1, keepdim=True)).flatten().tolist()
    order = sorted(range(16), key=lambda k: share[k])
    assert all(colors[a] >= colors[b] for a, b in itertools.pairwise(order))
    assert all(colors[a] > colors[b] for a, b in itertools.pairwise(order)
               if share[b] - share[a] > 0.01)  # fmt: skip
    percent = [(text, fill) for _, text, _, fill, _ in written if text.isdigit()]
    assert [text for text, _ in percent] == [f"{100 * value:.0f}" for value in share]
    assert [fill == "white" for _, fill in percent] == [value > 0.5 for value in share]
    black = mask(picture, INK)
    for i, j in itertools.product(range(4), range(4)):  # the diagonal is framed
        x, y = round(left + j * cell + cell / 8), round(top + i * cell)
        assert black[y - 1 : y + 3, x].any() == (i == j or i == j + 1)
    heading = f"Title: {(60 + 900 + 43 + 70) / 1300:.1%} of 1300 images correct"
    assert heading in " ".join(texts(written))
    assert {"true class", "predicted class"} <= set(texts(written))


def test_the_most_confused_classes(written):
    counts = torch.randint(0, 5, (50, 50), generator=torch.Generator().manual_seed(3))
    counts += torch.diag(torch.arange(50) * 1000)  # right: no matter
    ranked = sorted(range(50), key=lambda k: -sum(
        int(counts[i, k] + counts[k, i]) for i in range(50) if i != k))  # fmt: skip
    assert linear_eval.most_confused(counts).tolist() == sorted(ranked[:20])
    names = [f"class_{i}" for i in range(50)]
    linear_eval.confusion_picture(counts, names, "")
    shown = [text for text in texts(written) if text.startswith("class_")]
    assert sorted(set(shown)) == sorted(names[k] for k in ranked[:20]) and len(shown) == 40
    assert "Of 50 classes the 20 most confused" in " ".join(texts(written))


def test_classes_without_images(written):
    counts = torch.zeros(3, 3, dtype=torch.int64)
    linear_eval.confusion_picture(counts, list("abc"), "Title")
    assert "0.0% of 0 images" in " ".join(texts(written))
