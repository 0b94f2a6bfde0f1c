"""common.py: the augmentations against torchvision's own float operations image by image, the
ResNets against torchvision's, LARS and the schedule against their equations, neighbours and
collapse figures against cases worked by hand, and everything that reads or writes files."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import common
from common import Recipe


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(low, high, *shape, seed=0):
    return torch.rand(*shape, generator=rng(seed)) * (high - low) + low


def noise(n, height, width=None, seed=0):
    """Float images of independent pixels, in which a misplaced or smoothed one is seen."""
    return torch.rand(n, 3, height, width or height, generator=rng(seed))


def noise_bytes(n, height, width=None, seed=0):
    return (noise(n, height, width, seed) * 256).byte()


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------
# The operations against torchvision's on float tensors, every image with its own parameters

BILINEAR, BICUBIC = (getattr(TF.InterpolationMode, name) for name in ("BILINEAR", "BICUBIC"))


def random_boxes(n, height, width, seed=0):
    """Any box inside the image, the whole image and a single pixel included."""
    r = rng(seed)
    h, w = (torch.randint(1, side + 1, (n,), generator=r) for side in (height, width))
    h[0], w[0], h[1], w[1] = height, width, 1, 1
    top = (torch.rand(n, generator=r) * (height - h + 1)).long()
    left = (torch.rand(n, generator=r) * (width - w + 1)).long()
    return top, left, h, w


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "shape, size",
    [
        ((32, 32), 32),
        ((96, 96), 32),  # shrinks: antialiasing matters
        ((20, 20), 48),
        ((40, 64), 32),
        ((50, 30), (24, 40)),
    ],
)
def test_resized_crop(shape, size, flipped, interpolation):
    n = 24
    x, boxes = noise(n, *shape), random_boxes(n, *shape)
    flip = torch.rand(n, generator=rng(1)) < 0.5 if flipped else None
    expected = []
    for i in range(n):
        top, left, h, w = (int(value[i]) for value in boxes)
        out = (size, size) if isinstance(size, int) else size
        mode = BILINEAR if interpolation == "bilinear" else BICUBIC
        crop = TF.resized_crop(x[i], top, left, h, w, out, mode, antialias=True)
        expected.append(TF.hflip(crop) if flipped and flip[i] else crop)
    close(common.resized_crop(x, *boxes, size, flip, interpolation), torch.stack(expected))


def test_resized_crop_is_bicubic_by_default_and_refuses_other_filters():
    x, boxes = noise(4, 20), random_boxes(4, 20, 20)
    bicubic = common.resized_crop(x, *boxes, 24, interpolation="bicubic")
    assert torch.equal(common.resized_crop(x, *boxes, 24), bicubic)
    with pytest.raises(ValueError, match="nearest"):
        common.resized_crop(x, *boxes, 24, interpolation="nearest")


def test_whole_image_at_its_own_size_is_unchanged():
    x, zero, side = noise(3, 17), torch.zeros(3).long(), torch.full((3,), 17)
    close(common.resized_crop(x, zero, zero, side, side, 17), x, atol=1e-6)


JITTER = {0: TF.adjust_brightness, 1: TF.adjust_contrast, 2: TF.adjust_saturation, 3: TF.adjust_hue}


def torchvision_jitter(image, factors, order):
    for operation in order:
        image = JITTER[int(operation)](image, float(factors[operation]))
    return image


@pytest.mark.parametrize("seed, strength", [(0, 0.4), (1, 0.8), (2, 1.0)])
def test_color_jitter_in_all_24_orders(seed, strength):
    order = torch.tensor(list(itertools.permutations(range(4))))
    x = noise(24, 12, 9, seed)
    x[:, :, 0] = x[:, :1, 0]  # a row of gray, which has no hue
    x[:, :, 1], x[:, :, 2] = 0, 1
    x[:, :, 3] = x[:, :, 3].round()  # a row of pure colours
    factors = uniform(1 - strength, 1 + strength, 3, 24, seed=seed)
    factors = torch.cat([factors, uniform(-0.5, 0.5, 1, 24, seed=seed + 9)])
    expected = [torchvision_jitter(x[i], factors[:, i], order[i]) for i in range(24)]
    before = x.clone()
    close(common.color_jitter(x, *factors, order), torch.stack(expected))
    assert torch.equal(x, before)


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation_alone(operation):
    x, n = noise(16, 10), 16
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].repeat(1, n)  # these change nothing
    factors[operation] = uniform(-0.5, 0.5, n) if operation == 3 else uniform(0, 2, n)
    order = torch.rand(n, 4, generator=rng(1)).argsort(1)
    expected = [
        JITTER[operation](image, float(f)) for image, f in zip(x, factors[operation], strict=True)
    ]
    close(common.color_jitter(x, *factors, order), torch.stack(expected))


def test_hue_where_channels_are_equal_or_nearly_so():
    """Every colour of three levels, so two or three channels are equal, and the same with a
    contrast of a few units in the last place."""
    colours = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))  # [27, 3]
    x, shift = colours.T[None, :, :, None].repeat(13, 1, 1, 1), torch.linspace(-0.5, 0.5, 13)
    expected = [TF.adjust_hue(image, float(s)) for image, s in zip(x, shift, strict=True)]
    turned = common.shift_hue(x, shift)
    close(turned, torch.stack(expected))
    faint = (common.shift_hue(0.625 + 2**-22 * x, shift) - 0.625) * 2**22
    close(faint, turned, atol=0.25)  # half a unit in the last place is .125


@pytest.mark.parametrize("kernel_size", [3, 5, 9, 23])
def test_gaussian_blur(kernel_size):
    x, sigma = noise(12, 24, 31), uniform(0.1, 2.0, 12)
    expected = [
        TF.gaussian_blur(image, kernel_size, float(s)) for image, s in zip(x, sigma, strict=True)
    ]
    close(common.gaussian_blur(x, sigma, kernel_size), torch.stack(expected))


def test_blur_of_sigma_zero_is_the_identity():
    x, sigma = noise(4, 16), torch.tensor([0.0, 1.0, 0.0, 2.0])
    blurred = common.gaussian_blur(x, sigma, 5)
    assert torch.equal(blurred[::2], x[::2])
    assert (blurred[1::2] - x[1::2]).abs().mean() > 0.01


def test_solarize():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    expected = torch.where(levels >= 128, 255 - levels, levels) / 255  # as on bytes
    close(common.solarize(levels / 255), expected, atol=1e-6)
    x = noise(5, 16)
    for threshold in 0.25, 128 / 255:
        close(common.solarize(x, threshold), TF.solarize(x, threshold), atol=1e-6)


def test_grayscale():
    x = noise(5, 16)
    expected = TF.rgb_to_grayscale(x, num_output_channels=3)
    close(common.grayscale(x), expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The random numbers of the augmentation


def kolmogorov_smirnov(a, b):
    """The largest distance between the two empirical distribution functions."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    points = np.union1d(a, b)
    below_a, below_b = (np.searchsorted(x, points, side="right") / len(x) for x in (a, b))
    return np.abs(below_a - below_b).max()


def torchvision_boxes(n, height, width, scale):
    """n draws of torchvision's RandomResizedCrop as an array [4, n]: top, left, height, width."""
    image = torch.empty(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    return np.array([draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]).T


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1)), (75, 100, (0.2, 1))])
def test_crop_boxes_have_the_distribution_of_torchvision(height, width, scale):
    n = 6000
    top, left, h, w = common.random_resized_crop_params(
        5 * n, height, width, scale, generator=rng()
    )
    theirs = torchvision_boxes(n, height, width, scale)
    ours = {"area": h * w, "width": w, "height": h, "top": top, "left": left}
    theirs = dict(zip(("top", "left", "height", "width"), theirs, strict=True))
    theirs["area"] = theirs["height"] * theirs["width"]
    for name in ours:
        # Two samples of one distribution come this far apart with probability 1e-6; 5 %: .019.
        assert kolmogorov_smirnov(ours[name], theirs[name]) < 0.038, name


@pytest.mark.parametrize("height, width", [(32, 32), (20, 64), (97, 33)])
def test_crop_boxes_lie_inside_the_image(height, width):
    boxes = common.random_resized_crop_params(4000, height, width, (0.08, 1), generator=rng())
    top, left, h, w = boxes
    assert all(value.shape == (4000,) and value.dtype == torch.int64 for value in boxes)
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    assert int((top + h).max()) == height and int((left + w).max()) == width and not int(top.min())


def test_mean_area_of_the_crops_is_below_the_mean_of_the_draws():
    """Boxes that stick out are drawn again, so large ones are rarer: .49, not (.08 + 1) / 2."""
    _, _, h, w = common.random_resized_crop_params(20000, 32, 32, (0.08, 1), generator=rng())
    assert (h * w).double().mean() / 32**2 == pytest.approx(0.49, abs=0.01)


@pytest.mark.parametrize(
    "height, width, scale, box",
    [
        (200, 500, (0.6, 1), (0, 116, 200, 267)),  # too wide: the central 4:3
        (500, 200, (0.6, 1), (116, 0, 267, 200)),
        (30, 36, (2, 3), (0, 0, 30, 36)),  # nothing that large fits: the whole image
    ],
)
def test_box_where_no_try_fits(height, width, scale, box):
    boxes = common.random_resized_crop_params(50, height, width, scale, generator=rng())
    assert torch.stack(boxes, 1).unique(dim=0).tolist() == [list(box)]
    assert torchvision_boxes(1, height, width, scale)[:, 0].tolist() == list(box)


FIRST = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.6)
SECOND = Recipe(scale=(0.1, 0.5), jitter=(1.2, 0, 0, 0.5), jitter_p=1, gray_p=0.5, solarize_p=0.4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def test_draws_follow_the_recipes():
    n, recipes = 6000, [FIRST, FIRST, SECOND, FIRST]  # equal neighbours are drawn together
    d = common.Augment(recipes, 32, MEAN, STD).draw(n, 40, 48, rng())
    assert all(len(value) == 4 * n for value in d.values())
    for i, recipe in enumerate(recipes):
        view = {key: value[i * n : (i + 1) * n] for key, value in d.items()}
        jittered = (view["hue"] != 0).double().mean()
        for share, p in (
            (view["flip"], 0.5),
            (view["gray"], recipe.gray_p),
            (view["sigma"] > 0, recipe.blur_p),
            (view["solarize"], recipe.solarize_p),
        ):
            assert share.double().mean() == pytest.approx(p, abs=0.03)
        assert jittered == pytest.approx(recipe.jitter_p, abs=0.03)
        names = ("brightness", "contrast", "saturation", "hue")
        for name, spread in zip(names, recipe.jitter, strict=True):
            low, middle, high = max(0, 1 - spread), 1, 1 + spread
            if name == "hue":
                low, middle, high = -spread, 0, spread
            drawn = view[name][view["hue"] != 0]
            assert (
                low - 1e-6 <= drawn.min() <= low + 0.02
                and high - 0.02 <= drawn.max() <= high + 1e-6
            )
            assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low) + 1e-6)
            assert (view[name][view["hue"] == 0] == middle).all()
        blurred = view["sigma"][view["sigma"] > 0]
        assert not len(blurred) or (0.1 <= blurred.min() < 0.15 and 1.95 < blurred.max() <= 2)
        orders, counts = view["order"].unique(dim=0, return_counts=True)
        assert len(orders) == 24 and (orders.sort(1).values == torch.arange(4)).all()
        assert counts.min() > 0.6 * n / 24 and counts.max() < 1.4 * n / 24
        area = view["height"] * view["width"] / (40 * 48)
        assert recipe.scale[0] * 0.9 < area.min() and area.max() < recipe.scale[1] * 1.1


def test_symmetric_and_asymmetric_recipes():
    """SimCLR section A (jitter .8, .8, .8, .2 times strength) and BYOL table 6."""
    one, two = common.symmetric(2, strength=0.5, crop_min=0.2, blur=0.5)
    assert (
        one == two == Recipe((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur_p=0.5, solarize_p=0)
    )
    one, two = common.asymmetric()
    assert one == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, blur_p=1, solarize_p=0)
    assert two == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, blur_p=0.1, solarize_p=0.2)


def torchvision_view(image, d, i, size, kernel_size, mean, std):
    """Row i of the draws, applied to one uint8 image by torchvision's operations."""
    box = [int(d[key][i]) for key in ("top", "left", "height", "width")]
    x = TF.resized_crop(image / 255, *box, [size, size], BICUBIC, antialias=True).clamp(0, 1)
    x = TF.hflip(x) if d["flip"][i] else x
    factors = [d[key][i] for key in ("brightness", "contrast", "saturation", "hue")]
    x = torchvision_jitter(x, factors, d["order"][i])
    x = TF.rgb_to_grayscale(x, 3) if d["gray"][i] else x
    x = TF.gaussian_blur(x, kernel_size, float(d["sigma"][i])) if d["sigma"][i] > 0 else x
    x = TF.solarize(x, 128 / 255) if d["solarize"][i] else x
    return TF.normalize(x, mean, std)


@pytest.mark.parametrize("shape, size, kernel_size", [((40, 48), 32, 3), ((70, 60), 64, 7)])
def test_augment_equals_torchvision_with_the_same_draws(shape, size, kernel_size):
    n = 12
    images = noise_bytes(n, *shape)
    augment = common.Augment([FIRST, SECOND], size, MEAN, STD)
    views = augment(images, rng(3))
    d = augment.draw(n, *shape, rng(3))
    assert all(view.shape == (n, 3, size, size) and view.dtype == torch.float32 for view in views)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    expected = [
        torchvision_view(images[i % n], d, i, size, kernel_size, MEAN, STD) for i in range(2 * n)
    ]
    # Solarisation jumps at its threshold: a value or two may be rounded to its other side.
    differs = (torch.cat(views) - torch.stack(expected)).abs() > 1e-4 / min(STD)
    assert differs.double().mean() < 1e-4
    assert [bool(d["solarize"].any()), bool((d["sigma"] > 0).any()), bool(d["gray"].any())] == [
        True
    ] * 3


class GivenAutoAugment(torchvision.transforms.AutoAugment):
    """torchvision's own class, with one image's draw in place of its own."""

    def get_params(self, _):
        return self.drawn


@pytest.mark.parametrize("policy", ["cifar10", "imagenet"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 28)])
def test_auto_augment_equals_torchvision_with_the_same_draws(shape, policy):
    """Every sub-policy, each of its operations with and without, both signs: image by image."""
    chosen = torch.arange(25).repeat_interleave(16)
    bits = torch.arange(16).repeat(25)
    chance = torch.stack([bits % 2, bits // 2 % 2], 1) * 0.9999
    sign = torch.stack([bits // 4 % 2, bits // 8 % 2], 1).bool()
    images = noise_bytes(400, *shape)
    images[::3] = images[::3] // 2 + 20  # some that are not spread over all values
    before, mixed = images.clone(), torch.randperm(400, generator=rng())
    given = [x[mixed] for x in (images, chosen, chance, sign)]
    result = torch.empty_like(images)
    result[mixed] = common.auto_augment(given[0], policy, *given[1:])
    assert torch.equal(images, before) and result.dtype == torch.uint8
    reference = GivenAutoAugment(torchvision.transforms.AutoAugmentPolicy(policy))
    for i in range(400):
        reference.drawn = int(chosen[i]), chance[i], 1 - sign[i].int()  # there, 0 is negative
        # The same but for rounding: torchvision has these operations twice, and takes v1's.
        differs = (result[i].int() - reference(images[i]).int()).abs()
        far = (differs > 5).double().mean()  # beyond a threshold, or equalised apart
        assert (differs > 1).double().mean() < 0.1 and far < 2e-3, (chosen[i], bits[i])
    assert (result != images).flatten(1).any(1).double().mean() > 0.4


def test_auto_augment_draws():
    n = 4000
    augment = common.Augment(
        [Recipe(jitter_p=0, gray_p=0, pad=4, policy="cifar10")] * 2, 32, MEAN, STD
    )
    d = augment.draw(n, 40, 40, rng())
    assert all(len(value) == 2 * n for value in d.values())
    assert {d[key].device.type for key in ("chosen", "chance", "sign")} == {"cpu"}
    counts = d["chosen"].bincount()
    assert len(counts) == 25 and 0.7 * n / 12.5 < counts.min() and counts.max() < 1.3 * n / 12.5
    assert 0 <= d["chance"].min() and d["chance"].max() < 1
    assert d["chance"].mean() == pytest.approx(0.5, abs=0.02)
    assert d["sign"].double().mean() == pytest.approx(0.5, abs=0.02)
    again = augment.draw(n, 40, 40, rng())
    assert all(torch.equal(d[key], again[key]) for key in d)
    other = augment.draw(n, 40, 40, rng(1))
    assert not torch.equal(d["chosen"], other["chosen"])
    # They come from another stream than the crops: else the same numbers would serve twice.
    agree = d["flip"][:n] == (d["chance"].flatten()[:n] < 0.5)
    assert agree.double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("policy", ["", "cifar10"])
def test_padded_crops(policy):
    """torchvision's RandomCrop(32, padding=4) and flip, of which each place is as likely."""
    images = noise_bytes(300, 32)
    recipe = Recipe(jitter_p=0, gray_p=0, pad=4, policy=policy)
    augment = common.Augment([recipe] * 2, 32, MEAN, STD)
    views, d = torch.cat(augment(images, rng(2))), augment.draw(300, 40, 40, rng(2))
    padded = torch.nn.functional.pad(images, (4,) * 4).repeat(2, 1, 1, 1)
    reference = GivenAutoAugment(torchvision.transforms.AutoAugmentPolicy.CIFAR10)
    for i in range(0, 600, 7):
        top, left = int(d["top"][i]), int(d["left"][i])
        crop = padded[i, :, top : top + 32, left : left + 32]
        crop = TF.hflip(crop) if d["flip"][i] else crop
        if policy:
            reference.drawn = int(d["chosen"][i]), d["chance"][i], 1 - d["sign"][i].int()
            crop = reference(crop)
        slack = 5 / 255 / min(STD) if policy else 1e-5  # rounding, see above
        close(views[i], TF.normalize(crop / 255, MEAN, STD), atol=slack)
    for name in "top", "left":
        counts = d[name].bincount(minlength=9)
        assert len(counts) == 9 and counts.min() > 30  # of 600, 67 each


def test_policy_on_crops_from_workers():
    crops = noise_bytes(6 * 2, 16).view(6, 2, 3, 16, 16)
    recipe = Recipe(jitter_p=0, gray_p=0, pad=2, policy="cifar10")
    augment = common.Augment([recipe] * 2, 16, MEAN, STD)
    views, d = augment(crops, rng()), augment.draw(6, 20, 20, rng())
    for v, b in itertools.product(range(2), range(6)):
        i = 6 * v + b
        crop = TF.hflip(crops[b, v]) if d["flip"][i] else crops[b, v]
        drawn = [d[key][i : i + 1] for key in ("chosen", "chance", "sign")]
        expected = common.auto_augment(crop[None], "cifar10", *drawn)[0]
        close(views[v][b], TF.normalize(expected / 255, MEAN, STD), atol=1e-5)


def test_images_that_workers_have_cropped_keep_their_crops():
    """[B, V, 3, S, S]: view v of image b is crop v of image b, mirrored or not."""
    crops = noise_bytes(6 * 3, 16).view(6, 3, 3, 16, 16)
    augment = common.Augment([Recipe(jitter_p=0, gray_p=0)] * 3, 16, MEAN, STD)
    mirrored = augment.draw(6, 16, 16, rng())["flip"].view(3, 6)
    assert 0 < mirrored.sum() < 18
    for v, view in enumerate(augment(crops, rng())):
        for b in range(6):
            crop = TF.normalize(crops[b, v] / 255, MEAN, STD)
            close(view[b], TF.hflip(crop) if mirrored[v, b] else crop)


def test_every_image_and_every_view_has_draws_of_its_own():
    same = noise_bytes(1, 32).expand(8, -1, -1, -1)
    augment = common.Augment(common.symmetric(2, 1.0, blur=0.5), 32, MEAN, STD)
    views = torch.cat(augment(same, rng()))
    for a, b in itertools.combinations(range(16), 2):
        assert (views[a] - views[b]).abs().max() > 0.05
    d = augment.draw(500, 32, 32, rng())
    for name in "top", "height", "width", "brightness", "contrast", "saturation", "hue", "sigma":
        assert len(d[name].unique()) > 15, name
        assert (d[name][:500] != d[name][500:]).any(), name


def test_views_depend_on_seed_and_step_alone():
    images = noise_bytes(4, 32)
    augment = common.Augment(common.symmetric(), 32, MEAN, STD)
    views = torch.stack(augment(images, common.generator(5, "augment", 7)))
    torch.manual_seed(123)
    assert torch.equal(torch.stack(augment(images, common.generator(5, "augment", 7))), views)
    for other in (6, "augment", 7), (5, "augment", 8):
        assert not torch.equal(torch.stack(augment(images, common.generator(*other))), views)


def test_restore_undoes_normalize():
    augment, x = common.Augment([], 8, MEAN, STD), noise(2, 8)
    close(augment.normalize(x), TF.normalize(x, MEAN, STD), atol=1e-6)
    close(augment.restore(augment.normalize(x)), x, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What evaluation sees


@pytest.mark.parametrize(
    "height, width, size, box",
    [
        (256, 256, 224, (16, 16, 224, 224)),
        (300, 400, 224, (19, 69, 262, 262)),  # 7/8 of 300 is 262.5
        (240, 240, 224, (8, 8, 224, 224)),  # never smaller than what is asked for
        (32, 32, 32, (0, 0, 32, 32)),
        (20, 30, 32, (0, 5, 20, 20)),  # enlarged: the whole shorter side
    ],
)
def test_centre_box(height, width, size, box):
    assert common.centre_box(height, width, size) == box


def test_evaluation_view():
    images = noise_bytes(2, 256)
    expected = TF.normalize(TF.center_crop(images / 255, 224), MEAN, STD)
    close(common.evaluation_view(images, 224, MEAN, STD), expected)

    small = noise_bytes(2, 32)
    view = common.evaluation_view(small, 32, MEAN, STD)
    close(view, TF.normalize(small / 255, MEAN, STD), atol=1e-6)
    assert view.is_contiguous(memory_format=torch.channels_last)

    wide = noise_bytes(2, 20, 30)
    x = TF.resize(wide[..., 5:25] / 255, [32, 32], BICUBIC, antialias=True).clamp(0, 1)
    close(common.evaluation_view(wide, 32, MEAN, STD), TF.normalize(x, MEAN, STD), atol=1e-3)


# --------------------------------------------------------------------------------------------------
# Models


def torchvision_resnet(arch, stem):
    """torchvision's model without `fc`, its stem exchanged by hand."""
    model = getattr(torchvision.models, arch)()
    model.fc = nn.Identity()
    if stem == "small":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnet_weights_fit_into_torchvision(stem):
    model, reference = (
        common.resnet("resnet18", stem).eval(),
        torchvision_resnet("resnet18", stem).eval(),
    )
    reference.load_state_dict(model.state_dict(), strict=True)
    x = noise(2, 32) - 0.5
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnet_keys_and_shapes(arch, stem):
    with torch.device("meta"):
        model, original = common.resnet(arch, stem), getattr(torchvision.models, arch)()
        keys = [key for key in original.state_dict() if not key.startswith("fc.")]
        assert list(model.state_dict()) == keys
        features = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}[arch]
        assert model.num_features == features
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, features)
        side = {"small": 32, "imagenet": 8}[stem]  # what the first stage sees
        stem_output = model.maxpool(model.relu(model.bn1(model.conv1(torch.empty(2, 3, 32, 32)))))
        assert stem_output.shape == (2, 64, side, side)


@pytest.mark.parametrize(
    "arguments, name", [(("resnet19",), "resnet19"), (("resnet18", "big"), "big")]
)
def test_unknown_resnet_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        common.resnet(*arguments)


def test_mlp():
    kinds = [type(layer) for layer in common.mlp(8, 16, 16, 4)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    plain = common.mlp(8, 16, 4, batch_norm=False, bias=False, last_bias=True)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    assert plain[0].bias is None and plain[2].bias is not None
    assert plain(torch.zeros(2, 8)).shape == (2, 4)


# --------------------------------------------------------------------------------------------------
# Optimisation


def lars_step(p, g, m, lr, momentum, weight_decay, eta):
    """u = g + wd p; q = eta |p| / |u|; m = momentum m + q u; p = p - lr m. In 1-D u = g, q = 1."""
    if p.ndim > 1:
        u = g + weight_decay * p
        norm_p, norm_u = p.norm(), u.norm()
        q = eta * norm_p / norm_u if norm_p > 0 and norm_u > 0 else 1.0
    else:
        u, q = g, 1.0
    m = momentum * m + q * u
    return p - lr * m, m


def parameters(seed=0):
    """A matrix, a kernel, a bias, a matrix of zeros, and a matrix that gets a zero gradient."""
    r = rng(seed)
    shapes = [(4, 3), (5, 2, 3, 3), (7,), (2, 2), (3, 3)]
    tensors = [torch.randn(*shape, generator=r, dtype=torch.float64) for shape in shapes]
    tensors[3].zero_()
    return [nn.Parameter(t) for t in tensors]


def give_gradients(params, seed):
    r = rng(seed)
    for p in params:
        p.grad = torch.randn(*p.shape, generator=r, dtype=p.dtype)
    params[-1].grad.zero_()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_the_rule(weight_decay):
    params = parameters()
    expected = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    optimizer = common.LARS(
        params, 1.0, momentum=0.8, weight_decay=weight_decay, trust_coefficient=0.01
    )
    for step, lr in enumerate(
        [0.5, 0.5, 2.0, 0.1]
    ):  # a changing rate tells m + q u from m + lr q u
        give_gradients(params, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, p in enumerate(params):
            expected[i], buffers[i] = lars_step(
                expected[i], p.grad, buffers[i], lr, 0.8, weight_decay, 0.01
            )
            torch.testing.assert_close(p.detach(), expected[i], rtol=1e-12, atol=1e-12)


def test_lars_defaults_and_one_dimension_by_hand():
    matrix = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = common.LARS([matrix, bias, unused], lr=2.0, weight_decay=0.5)
    for p in matrix, bias:
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    # u = (-1, -1) + .5 (3, 4) = (.5, 1); |p| = 5; p - 2 * .001 * 5 / sqrt(1.25) * u
    q = 0.001 * 5 / math.sqrt(1.25)
    close(matrix.detach(), torch.tensor([[3 - 2 * q * 0.5, 4 - 2 * q]]), atol=1e-6)
    close(bias.detach(), torch.tensor([5.0, 6.0]), atol=1e-6)
    assert torch.equal(unused, torch.ones(2, 2))
    optimizer.step()  # momentum .9
    close(bias.detach(), torch.tensor([5 + 2 * 1.9, 6 + 2 * 1.9]), atol=1e-5)


def test_lars_leaves_gradients_alone_and_resumes():
    params, twins = parameters(), parameters()
    optimizer, twin = (common.LARS(p, 0.3, weight_decay=0.1) for p in (params, twins))
    for step in range(3):
        for group in params, twins:
            give_gradients(group, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
        if step == 1:  # go on from the saved state in a new optimiser
            twin.step()
            state = twin.state_dict()
            twin = common.LARS(twins, 0.3, weight_decay=0.1)
            twin.load_state_dict(state)
        else:
            twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_param_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    decayed, plain = common.param_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    expected = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in expected}


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 20),  # the first step of the warm-up is not lost
        (9, 0.5),
        (19, 1.0),  # the last
        (20, 1.0),  # the first of the cosine
        (60, 0.5),
        (80, 0.1464466),  # (1 + cos(3 pi / 4)) / 2
        (99, 0.0003855),  # the last step: sin(pi / 160)^2
        (100, 0.0),
    ],
)
def test_learning_rate(step, expected):
    assert common.learning_rate(step, 100, 20, 1.0) == pytest.approx(expected, abs=1e-7)
    scaled = common.learning_rate(step, 100, 20, 3.0)
    assert scaled == pytest.approx(3 * expected, abs=1e-6)
    if step >= 20:
        lifted = common.learning_rate(step, 100, 20, 3.0, final=1.0)
        assert lifted == pytest.approx(1 + 2 * expected, abs=1e-6)


def test_learning_rate_without_warmup():
    assert common.learning_rate(0, 10, 0, 0.3) == pytest.approx(0.3)
    assert common.learning_rate(5, 10, 0, 0.3) == pytest.approx(0.15)


@pytest.mark.parametrize("warmup", [0.4, 2.5, 7.9])
def test_learning_rate_never_exceeds_the_base(warmup):
    """The warm-up need not be a whole number of steps."""
    rates = [common.learning_rate(step, 30, warmup, 1.0) for step in range(30)]
    assert max(rates) <= 1.0
    assert rates[int(warmup) + 1 :] == sorted(rates[int(warmup) + 1 :], reverse=True)


# --------------------------------------------------------------------------------------------------
# What a representation is worth


def shares(scores):
    return scores / scores.sum(1, keepdim=True)


def test_knn_by_hand():
    """Around the query: class 0 at 60 degrees, class 1 twice at 90 degrees, class 2 opposite."""
    bank = torch.tensor([[1.0, math.sqrt(3)], [0.0, 5.0], [0.0, -0.1], [-1.0, 0.0]])
    labels, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[7.0, 0.0]])

    def knn(**options):
        return shares(common.knn_scores(bank, labels, query, 3, **options))

    even = math.exp(0.5)  # against 1 + 1: outvoted
    close(knn(k=3, temperature=1.0), torch.tensor([[even, 2, 0]]) / (even + 2), atol=1e-6)
    sharp = math.exp(5)  # nearness counts for more
    close(knn(k=3, temperature=0.1), torch.tensor([[sharp, 2, 0]]) / (sharp + 2), atol=1e-6)
    close(knn(k=1, temperature=1.0), torch.tensor([[1.0, 0, 0]]), atol=1e-6)
    everyone = torch.tensor([[even, 2, math.exp(-1)]])
    close(
        knn(k=200, temperature=1.0), shares(everyone), atol=1e-6
    )  # more neighbours than there are


@pytest.mark.parametrize("k", [1, 5, 17])
def test_knn_equals_a_slow_loop(k):
    bank, queries = torch.randn(60, 8, generator=rng(0)), torch.randn(23, 8, generator=rng(1))
    labels = torch.randint(0, 4, (60,), generator=rng(2))
    expected = torch.zeros(23, 4, dtype=torch.float64)
    for i, q in enumerate(queries.double()):
        cosine = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
        for j in sorted(range(60), key=lambda j, c=cosine: -c[j])[:k]:
            expected[i, labels[j]] += math.exp(cosine[j] / 0.07)
    scores = common.knn_scores(bank, labels, queries, 4, k, temperature=0.07)
    torch.testing.assert_close(shares(scores.double()), shares(expected), rtol=1e-4, atol=1e-6)


def test_knn_scores_are_finite_at_low_temperatures():
    bank, labels = torch.eye(3), torch.arange(3)
    scores = common.knn_scores(bank, labels, bank, 3, k=3, temperature=0.01)
    assert scores.isfinite().all() and (scores.argmax(1) == labels).all()


def test_top_accuracies_by_hand():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(4, 1)
    assert common.top_accuracies(scores, torch.tensor([0, 1, 4, 5])) == (0.25, 0.75)
    few = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # fewer than five classes
    assert common.top_accuracies(few, torch.tensor([0, 0])) == (0.5, 1.0)


@pytest.mark.parametrize(
    "wanted, size, classes, k",
    [
        (200, 4000, 10, 200),
        (200, 1000, 10, 50),  # a class has 100 on average, half of them
        (20, 1000, 10, 20),
        (200, 15, 10, 1),
    ],
)
def test_neighbours_are_at_most_half_of_a_class(wanted, size, classes, k):
    bank = common.Split(torch.randn(size, 4, generator=rng(0)), torch.arange(size) % classes)
    test = common.Split(torch.randn(30, 4, generator=rng(1)), torch.arange(30) % classes)
    args = SimpleNamespace(knn_k=wanted, knn_temperature=0.1)
    votes, used = common.knn_votes(bank, test, classes, args)
    assert used == k
    expected = common.knn_scores(bank.images, bank.labels, test.images, classes, k, 0.1)
    assert torch.equal(votes, expected)


def hardware(**options):
    """The resolved arguments that data and evaluation functions read."""
    defaults = {"seed": 0, "batch_size": 4, "image_size": 16, "workers": 0}
    defaults |= {"device": "cpu", "precision": "fp32"}
    return SimpleNamespace(**{**defaults, **options})


def test_encode_is_the_backbone_in_eval_mode():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).train()
    backbone[1].running_mean.normal_()
    images = noise_bytes(10, 16)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    split, data = common.Split(images, torch.arange(10)), SimpleNamespace(mean=MEAN, std=STD)
    features = common.encode(backbone, split, hardware(), data, batch_size=3)
    assert backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    with torch.no_grad():
        expected = backbone.eval()(TF.normalize(images / 255, MEAN, STD))
    close(features, expected, atol=1e-5)


def test_collapse_figures_of_collapsed_features():
    for features in torch.full((64, 16), 0.3), torch.zeros(64, 16):
        figures = common.collapse_figures(features)
        assert figures["feature_std"] == pytest.approx(0, abs=1e-5)
        assert figures["effective_rank"] == pytest.approx(1, abs=1e-2)


def test_collapse_figures_of_isotropic_features():
    figures = common.collapse_figures(torch.randn(4096, 32, generator=rng()))
    assert figures["feature_std"] == pytest.approx(1, abs=0.02)
    assert 31 < figures["effective_rank"] <= 32


@pytest.mark.parametrize("k", [1, 3, 10])
def test_effective_rank_is_at_most_the_rank(k):
    low = torch.randn(512, k, generator=rng(0)) @ torch.randn(k, 64, generator=rng(1)) + 5
    rank = common.collapse_figures(low)["effective_rank"]
    assert 0.7 * k < rank <= k + 1e-3


def test_effective_rank_by_hand():
    """Singular values 3 to 1: exp of the entropy of (.75, .25). The mean does not count."""
    features = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + torch.tensor([10.0, -4])
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    rank = common.collapse_figures(features)["effective_rank"]
    assert rank == pytest.approx(math.exp(entropy), abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Random numbers and files


def test_generator_depends_on_its_arguments_alone():
    def draw(*arguments):
        return torch.rand(8, generator=common.generator(*arguments)).tolist()

    first = draw(0, "order", 1)
    torch.manual_seed(99)
    assert draw(0, "order", 1) == first
    different = [
        (1, "order", 1),
        (0, "augment", 1),
        (0, "order", 2),
        (1, "order", 0),
        (0, "order", 11),
    ]
    drawn = [first] + [draw(*arguments) for arguments in different]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)


def test_atomic_write(tmp_path):
    path = tmp_path / "file"
    with common.atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()  # no half-written file has the name
    for error, raised in (ZeroDivisionError, ZeroDivisionError), (RuntimeError, OSError):
        # RuntimeError is how torch.save says that the disk is full; it becomes an OSError.
        with pytest.raises(raised), common.atomic_write(path) as file:
            file.write(b"new")
            raise error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with common.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    common.write_json({"a": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"a": [1, 2]}


class Opens:
    """Unpickling one runs code."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_load_file_refuses_what_could_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Opens()}, tmp_path / "bad.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in "bad.pt", "text.pt", "empty.pt", "missing.pt":
        with pytest.raises(common.InputError, match=name) as error:
            common.load_file(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# Data


def packed(n=12, channels=3, side=10, classes=3, seed=0):
    def split(count, seed):
        images = (torch.rand(count, channels, side, side, generator=rng(seed)) * 256).byte()
        return {"images": images, "labels": torch.arange(count) % classes}

    names = [f"class {c}" for c in range(classes)]
    return {"train": split(n, seed), "test": split(n // 2, seed + 1), "classes": names}


def test_packed_file(tmp_path):
    saved = packed()
    torch.save(saved, tmp_path / "mine.pt")
    data = common.load_dataset(str(tmp_path / "mine.pt"))
    assert (data.name, data.classes, data.size) == ("mine", saved["classes"], 10)
    for split, key in (data.train, "train"), (data.test, "test"), (data.pretrain, "train"):
        assert split.in_memory
        assert torch.equal(split.images, saved[key]["images"])
        assert torch.equal(split.labels, saved[key]["labels"])


def test_packed_file_of_a_known_name_is_found_in_the_data_dir(tmp_path):
    torch.save(packed(), tmp_path / "tiny_imagenet.pt")
    assert common.load_dataset("tiny_imagenet", tmp_path).name == "tiny_imagenet"


def test_gray_images_get_three_channels(tmp_path):
    saved = packed(channels=1)
    torch.save(saved, tmp_path / "gray.pt")
    data = common.load_dataset(str(tmp_path / "gray.pt"))
    assert torch.equal(data.train.images, saved["train"]["images"].repeat(1, 3, 1, 1))


@pytest.mark.parametrize("with_labels", [True, False])
def test_unlabeled_images_are_for_pretraining_only(tmp_path, with_labels):
    saved = packed()
    saved["unlabeled"] = {"images": noise_bytes(7, 10)}
    if with_labels:
        saved["unlabeled"]["labels"] = torch.full((7,), -1)
    torch.save(saved, tmp_path / "more.pt")
    data = common.load_dataset(str(tmp_path / "more.pt"))
    assert (len(data.train), len(data.pretrain), len(data.test)) == (12, 19, 6)
    assert torch.equal(data.train.images, saved["train"]["images"])
    assert torch.equal(data.pretrain.images[:12], saved["train"]["images"])
    assert torch.equal(data.pretrain.images[12:], saved["unlabeled"]["images"])
    assert data.pretrain.labels[12:].eq(-1).all() and data.train.labels.ge(0).all()
    moved = data.to("cpu")
    assert (len(moved.train), len(moved.pretrain)) == (12, 19)


def test_pixel_statistics_are_those_of_float64(tmp_path):
    saved = packed(n=9, side=11)
    saved["train"]["images"][:, 1] //= 3  # channels that differ
    torch.save(saved, tmp_path / "mine.pt")
    data = common.load_dataset(str(tmp_path / "mine.pt"))
    values = saved["train"]["images"].numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, values.std((0, 2, 3)), rtol=1e-12)


def without(key):
    return lambda p: p.pop(key)


def replace(split, key, value):
    return lambda p: p[split].update({key: value})


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (without("train"), "train"),
        (without("classes"), "classes"),
        (replace("train", "images", torch.rand(12, 3, 10, 10)), "uint8"),
        (replace("train", "images", noise_bytes(12, 10)[:, 0]), r"\[N, C, H, W\]"),
        (replace("train", "images", noise_bytes(12, 10).repeat(1, 2, 1, 1)), r"\[12, 6, 10, 10\]"),
        (replace("train", "images", noise_bytes(12, 10)[:0]), "N > 0"),
        (replace("train", "labels", torch.arange(11) % 3), "12 images but 11 labels"),
        (replace("train", "labels", torch.zeros(12)), "int64"),
        (replace("train", "labels", torch.arange(12)), "from 0 to 11.* 3 classes"),
        (replace("train", "labels", torch.arange(12) % 3 - 1), "from -1 to 1"),
        (replace("test", "images", noise_bytes(6, 14)), "different sizes"),
        (replace("test", "labels", torch.full((6,), 3)), "from 3 to 3"),
    ],
)
def test_malformed_packed_file_is_refused(tmp_path, spoil, complaint):
    saved = packed()
    spoil(saved)
    torch.save(saved, tmp_path / "mine.pt")
    with pytest.raises(common.InputError, match=complaint) as error:
        common.load_dataset(str(tmp_path / "mine.pt"))
    assert "mine.pt" in str(error.value) and "\n" not in str(error.value)


def test_unknown_dataset_is_named(tmp_path):
    for name in "cifar11", str(tmp_path / "nowhere"), str(tmp_path / "nothing.pt"):
        with pytest.raises(common.InputError, match=name):
            common.load_dataset(name, tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_spread_takes_every_class_of_a_sorted_split(in_memory):
    images = noise_bytes(40, 4) if in_memory else [f"{i}.png" for i in range(40)]
    split = common.Split(images, torch.arange(40) // 4)
    some = split.spread(10)
    assert some.labels.tolist() == list(range(10))
    expected = [images[i] for i in range(0, 40, 4)]
    assert torch.equal(some.images, torch.stack(expected)) if in_memory else some.images == expected
    assert len(split.spread(7)) == 7
    assert all(len(split.spread(count)) == 40 for count in (0, 40, 99))


def save_folder(root, sizes, test="test"):
    """PNG images in ImageFolder layout, one per size in each class: {(split, class): [pixels]}."""
    held = {}
    for split, name in itertools.product(("train", test), ("cat", "dog")):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            pixels = noise_bytes(1, height, width, seed=len(held) * 100 + i)[0]
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
            held.setdefault((split, name), []).append(pixels)
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    return held


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_of_equal_sizes_is_held_in_memory(tmp_path, test):
    held = save_folder(tmp_path / "pets", [(12, 16)] * 3, test)
    data = common.load_dataset(str(tmp_path / "pets"))
    assert (data.name, data.classes, data.size) == ("pets", ["cat", "dog"], 12)
    for split, folder in (data.train, "train"), (data.test, test), (data.pretrain, "train"):
        assert split.in_memory and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert torch.equal(split.images, torch.stack(held[folder, "cat"] + held[folder, "dog"]))
    values = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, values.mean((0, 2, 3)), rtol=1e-12)


def test_folder_of_mixed_sizes_is_streamed(tmp_path):
    save_folder(tmp_path / "pets", [(40, 60), (50, 50), (64, 40)])
    data = common.load_dataset(str(tmp_path / "pets"))
    assert (data.size, data.mean, data.std) == (224, common.IMAGENET_MEAN, common.IMAGENET_STD)
    assert not data.train.in_memory and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in data.train.images] == ["0.png", "1.png", "2.png"] * 2
    assert len(data.to("cpu").pretrain) == 6


def test_folder_without_images_or_train_is_refused(tmp_path):
    with pytest.raises(common.InputError, match="train"):
        common.load_dataset(str(tmp_path))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(common.InputError, match="no images"):
        common.load_dataset(str(tmp_path))
    (tmp_path / "train" / "cat" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(common.InputError, match="broken.png"):
        common.load_dataset(str(tmp_path))


@pytest.fixture
def streamed(tmp_path):
    save_folder(tmp_path / "pets", [(40, 60), (50, 50), (64, 40)])
    return common.load_dataset(str(tmp_path / "pets")).train


def test_decode_for_evaluation(streamed):
    """One centre crop of every image in order: [B, 1, 3, S, S]."""
    items = [(i, None) for i in range(6)]
    batches = list(common.decode(streamed, items, 4, hardware(image_size=32)))
    assert [images.shape for images, _ in batches] == [(4, 1, 3, 32, 32), (2, 1, 3, 32, 32)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat([images for images, _ in batches])[:, 0]
    assert images.dtype == torch.uint8
    for path, image in zip(streamed.images, images, strict=True):
        original = Image.open(path)
        shorter = min(original.size)  # 7/8 of it, but at least what is asked for
        crop = TF.center_crop(original, [max(32, round(shorter * 7 / 8))] * 2)
        crop = TF.pil_to_tensor(TF.resize(crop, [32, 32], BICUBIC))
        close(image.float(), crop.float(), atol=1)


def crops_by_image(split, seed, epoch, workers, batch_size=2):
    """The crops of one epoch, sorted by image: each image has another label here, to be told by."""
    split = common.Split(split.images, torch.arange(len(split)))
    args = hardware(seed=seed, workers=workers, batch_size=batch_size)
    recipes = common.symmetric(2, crop_min=0.2)
    batches = list(common.training_batches(split, epoch, args, recipes))
    assert all(images.shape == (batch_size, 2, 3, 16, 16) for images, _ in batches)
    labels = torch.cat([labels for _, labels in batches])
    return torch.cat([images for images, _ in batches])[labels.argsort()]


def test_streamed_crops_depend_on_seed_epoch_and_image_only(streamed):
    crops = crops_by_image(streamed, seed=0, epoch=1, workers=0)
    assert crops.shape == (6, 2, 3, 16, 16) and crops.dtype == torch.uint8
    torch.manual_seed(99)
    assert torch.equal(crops_by_image(streamed, 0, 1, workers=0, batch_size=3), crops)
    assert torch.equal(crops_by_image(streamed, 0, 1, workers=2), crops)
    for seed, epoch in (1, 1), (0, 2):
        other = crops_by_image(streamed, seed, epoch, workers=0)
        assert all(not torch.equal(a, b) for a, b in zip(crops, other, strict=True))
    assert all(not torch.equal(first, second) for first, second in crops)  # the two views


def test_two_streams_of_one_image_have_different_crops(streamed):
    same = common.Split(streamed.images[:1] * 4, torch.zeros(4).long())
    crops = crops_by_image(same, 0, 1, workers=0)
    assert len(crops.flatten(2).flatten(0, 1).unique(dim=0)) == 8


def test_training_batches_in_memory():
    """No image twice, the short last batch dropped, the order from seed and epoch alone."""
    split = common.Split(noise_bytes(11, 8), torch.arange(11))

    def labels(epoch, **options):
        args = hardware(**options)
        batches = list(common.training_batches(split, epoch, args, common.symmetric()))
        for images, index in batches:
            assert torch.equal(images, split.images[index])
        return [index.tolist() for _, index in batches]

    first = labels(1)
    assert [len(batch) for batch in first] == [4, 4]
    assert len(set(sum(first, []))) == 8
    torch.manual_seed(99)
    assert labels(1) == first
    assert labels(2) != first and labels(1, seed=1) != first
    assert [len(batch) for batch in labels(1, batch_size=11)] == [11]
    assert len(labels(1, batch_size=2)) == 5


class StandIn:
    """In the place of a torchvision dataset: seven pictures, and how often it was made."""

    made, classes, mode, side = 0, ["cat", "dog"], "RGB", 8

    def __init__(self, root, train=True, *_, split=None, download=False):
        assert download and root
        type(self).made += 1
        which = split or train
        self.split = {True: "train", False: "test", "val": "test"}.get(which, which)

    def picture(self, i):
        seed = 10 * ["train", "test", "unlabeled"].index(self.split) + i
        pixels = noise_bytes(1, self.side, seed=seed)[0].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels).convert(self.mode)

    def __iter__(self):
        for i in range(7):
            yield self.picture(i), -1 if self.split == "unlabeled" else i % 2

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return list(self)[i]


STAND_INS = {
    "cifar10": ("CIFAR10", {}),
    "cifar100": ("CIFAR100", {}),
    "fashion_mnist": ("FashionMNIST", {"mode": "L"}),
    "stl10": ("STL10", {}),
    "imagenette": ("Imagenette", {"side": 170, "classes": [("cat", "tom"), ("dog",)]}),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_download_is_packed_once(tmp_path, monkeypatch, name):
    kind, attributes = STAND_INS[name]
    stand_in = type(kind, (StandIn,), attributes)
    monkeypatch.setattr(torchvision.datasets, kind, stand_in)
    data = common.load_dataset(name, tmp_path / "data")
    made = stand_in.made
    assert made == (3 if name == "stl10" else 2)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{name}.pt"]
    again = common.load_dataset(name, tmp_path / "data")
    assert stand_in.made == made  # read, not downloaded
    for key in "train", "test":
        source = stand_in(tmp_path, split=key, download=True)
        pictures = [source.picture(i).convert("RGB") for i in range(7)]
        pixels = torch.stack([TF.pil_to_tensor(picture) for picture in pictures])
        if name == "imagenette":  # the sides of its pictures differ; the central 160 are kept
            pixels = pixels[..., 5:165, 5:165]
        for loaded in getattr(data, key), getattr(again, key):
            assert torch.equal(loaded.images, pixels)
            assert loaded.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert data.classes == again.classes == ["cat", "dog"]
    assert len(data.train) == 7 and len(data.pretrain) == (14 if name == "stl10" else 7)


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(common.InputError, match="no route to host") as error:
        common.load_dataset("cifar100", tmp_path)
    assert "cifar100" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(common.InputError, match="imagenet100/train"):
        common.load_dataset("imagenet100", tmp_path)


def test_shapes():
    train, test = common.shapes(100, "train"), common.shapes(100, "test")
    for split in train, test:
        assert split["images"].shape == (100, 3, 32, 32) and split["images"].dtype == torch.uint8
        assert split["labels"].dtype == torch.int64
        assert split["labels"].bincount().tolist() == [10] * 10
        assert split["images"].float().std((1, 2, 3)).min() > 5  # every image shows something
    again = common.shapes(100, "train")
    assert all(torch.equal(train[key], again[key]) for key in train)
    both = torch.cat([train["images"], test["images"]])
    assert len({image.numpy().tobytes() for image in both}) == 200
    assert not torch.equal(train["labels"], test["labels"])
    assert len(common.SHAPES) == len(set(common.SHAPES)) == 10


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_color_jitter_takes_images_of_any_float_type(dtype):
    """With factors in float32, as Augment draws them, and with gray pixels, whose hue is 0 / 0."""
    x = torch.rand(6, 3, 5, 5, generator=rng())
    x[:3] = x[:3, :1]
    draws = [torch.rand(6, generator=rng()) + 0.5 for _ in range(3)]
    draws += [torch.rand(6, generator=rng()) - 0.5]
    draws += [torch.rand(6, 4, generator=rng()).argsort(1)]
    jittered = common.color_jitter(x.to(dtype), *draws)
    assert jittered.dtype == dtype and jittered.isfinite().all()
    differs = (jittered.float() - common.color_jitter(x, *draws)).abs()
    assert differs.mean() < {torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


def test_share_of_colour_is_that_of_a_regression():
    """All of what is linear in the causes, none of what is not, half of an even mixture."""
    from colour_share import explained

    causes = torch.randn(4000, 2, generator=rng(), dtype=torch.float64)
    other = torch.randn(4000, 2, generator=rng(1), dtype=torch.float64)
    assert explained(3 * causes + 5, causes) == pytest.approx(1, abs=1e-12)
    assert explained(other, causes) == pytest.approx(0, abs=0.01)
    assert explained(causes + other, causes) == pytest.approx(0.5, abs=0.04)


@pytest.mark.gpu
def test_augmentation_on_cuda_equals_that_on_cpu():
    images = noise_bytes(32, 40)
    augment = common.Augment([FIRST, SECOND], 32, MEAN, STD)
    d = augment.draw(32, 40, 40, rng())
    stack = images.repeat(2, 1, 1, 1)
    on_cpu = augment.apply(stack, d)
    augment = common.Augment([FIRST, SECOND], 32, MEAN, STD, "cuda")
    on_cuda = augment.apply(stack.cuda(), {key: value.cuda() for key, value in d.items()})
    assert on_cuda.is_cuda and on_cuda.is_contiguous(memory_format=torch.channels_last)
    differs = (on_cuda.cpu() - on_cpu).abs() > 1e-3
    assert differs.double().mean() < 1e-4  # solarisation jumps at its threshold
    views = augment(images.cuda(), common.generator(0, "augment", 0, "cuda"))
    assert all(view.is_cuda and view.isfinite().all() for view in views)


@pytest.mark.gpu
def test_streamed_batches_reach_the_gpu(streamed):
    torch.zeros(1).cuda()  # worker processes that are forked now cannot use CUDA themselves
    split, recipes = streamed.to("cuda"), common.symmetric()
    batches = list(common.training_batches(split, 1, hardware(device="cuda", workers=2), recipes))
    assert len(batches) == 1 and batches[0][0].is_cuda and batches[0][1].is_cuda


@pytest.mark.gpu
def test_one_bf16_step_on_cuda_is_finite():
    from simclr import SimCLR

    torch.manual_seed(0)
    model = SimCLR(common.resnet()).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(common.param_groups(model, 5e-4), lr=0.1)
    augment = common.Augment(common.symmetric(), 32, MEAN, STD, "cuda")
    views = augment(noise_bytes(64, 32).cuda(), common.generator(0, "augment", 0, "cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, terms = model(views, torch.zeros(64, dtype=torch.int64, device="cuda"))
    loss.backward()
    optimizer.step()
    assert loss.dtype == torch.float32 and loss.isfinite() and terms["mi_bound"].isfinite()
    assert 0 < loss.item() < 2 * math.log(127)
    assert all(p.isfinite().all() for p in model.parameters())
