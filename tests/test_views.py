"""The views: each operation against torchvision's, image by image; the random numbers, of
which none tells another; whole views against torchvision's; what evaluation sees."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from test_common import MEAN, STD, close, noise_bytes, rng

import carl_carp
import common
from common import Recipe


def uniform(low, high, *shape, seed=0):
    return torch.rand(*shape, generator=rng(seed)) * (high - low) + low


def noise(n, height, width=None):
    """Float images of independent pixels, in which a misplaced or smoothed one is seen."""
    return uniform(0, 1, n, 3, height, width or height)


def image_by_image(operation, x, *parameters):
    """operation(image, its parameters) for each image, stacked."""
    return torch.stack([operation(*row) for row in zip(x, *parameters, strict=True)])


# --------------------------------------------------------------------------------------------------
# The operations, every image with its own parameters

FILTERS = {name: TF.InterpolationMode(name) for name in ("bilinear", "bicubic")}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape, size", [((96, 96), (32, 32)), ((50, 30), (24, 40))])
def test_resized_crop(shape, size, interpolation):
    """Any box inside the image, the whole image and a single pixel included."""
    h, w = (torch.randint(1, side + 1, (24,), generator=rng()) for side in shape)
    h[0], w[0], h[1], w[1] = *shape, 1, 1
    top = (uniform(0, 1, 24, seed=1) * (shape[0] - h + 1)).long()
    left = (uniform(0, 1, 24, seed=2) * (shape[1] - w + 1)).long()
    x, boxes, flip = noise(24, *shape), (top, left, h, w), uniform(0, 1, 24) < 0.5

    def crop(image, *box):
        box = [int(value) for value in box]
        return TF.resized_crop(image, *box, list(size), FILTERS[interpolation], antialias=True)

    expected = image_by_image(crop, x, *boxes)
    close(common.resized_crop(x, *boxes, size, interpolation=interpolation), expected)
    expected[flip] = expected[flip].flip(-1)
    close(common.resized_crop(x, *boxes, size, flip, interpolation), expected)
    with pytest.raises(ValueError, match="nearest"):
        common.resized_crop(x, *boxes, size, interpolation="nearest")


JITTER = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


def torchvision_jitter(image, factors, order):
    for operation in order:
        image = JITTER[int(operation)](image, float(factors[operation]))
    return image


def test_color_jitter_in_all_24_orders():
    order = torch.tensor(list(itertools.permutations(range(4))))
    x = noise(24, 12, 9)
    factors = torch.cat([uniform(0, 2, 3, 24), uniform(-0.5, 0.5, 1, 24, seed=1)])
    before = x.clone()
    expected = image_by_image(torchvision_jitter, x, factors.T, order)
    close(common.color_jitter(x, *factors, order), expected)
    assert torch.equal(x, before)


def test_hue_where_channels_are_equal_or_nearly_so():
    """Every colour of three levels; the same with a contrast of a few units in the last place."""
    colours = torch.tensor([*itertools.product([0.0, 0.5, 1.0], repeat=3)])  # [27, 3]
    x, shift = colours.T[None, :, :, None].repeat(13, 1, 1, 1), torch.linspace(-0.5, 0.5, 13)
    draws = *torch.ones(3, 13), shift, torch.arange(4).repeat(13, 1)
    turned = common.color_jitter(x, *draws)
    close(turned, image_by_image(TF.adjust_hue, x, shift.tolist()))
    faint = common.color_jitter(0.625 + 2**-22 * x, *draws)
    close((faint - 0.625) * 2**22, turned, atol=0.25)  # half a unit in the last place is .125
    half = common.color_jitter(x.half(), *draws)
    assert half.dtype == torch.float16
    close(half.float(), turned, atol=1e-2)


def test_blur_grayscale_and_solarize():
    x, sigma = noise(12, 24, 31), uniform(0.1, 2.0, 12)
    sigma[::4] = 0  # no blur at all
    for kernel in 3, 23:
        blurred = common.gaussian_blur(x, sigma, kernel)
        assert torch.equal(blurred[::4], x[::4])
        for i in sigma.nonzero()[:, 0]:
            close(blurred[i], TF.gaussian_blur(x[i], kernel, float(sigma[i])))
    close(common.grayscale(x), TF.rgb_to_grayscale(x, num_output_channels=3), atol=1e-6)
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    expected = torch.where(levels >= 128, 255 - levels, levels) / 255  # as on bytes
    close(common.solarize(levels / 255), expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The random numbers


def kolmogorov_smirnov(a, b):
    """The largest distance between the two empirical distribution functions."""
    a, b = (np.sort(np.asarray(x, float)) for x in (a, b))
    below = (np.searchsorted(x, np.union1d(a, b), side="right") / len(x) for x in (a, b))
    return np.abs(np.subtract(*below)).max()


def torchvision_boxes(n, height, width, scale):
    """n draws of torchvision's RandomResizedCrop as an array [4, n]: top, left, height, width."""
    image = torch.empty(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    return np.array([draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]).T


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1)), (75, 100, (0.2, 1))])
def test_crop_boxes_have_the_distribution_of_torchvision(height, width, scale):
    n = 6000
    theirs = torchvision_boxes(n, height, width, scale)
    ours = common.random_resized_crop_params(5 * n, height, width, scale, generator=rng())
    assert min(map(torch.min, ours[:2])) >= 0 and min(map(torch.min, ours[2:])) > 0
    assert (ours[0] + ours[2]).max() <= height and (ours[1] + ours[3]).max() <= width
    for name, a, b in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        # Two samples of one distribution come this far apart with probability 1e-6; 5 %: .019.
        assert kolmogorov_smirnov(a, b) < 0.038, name
    assert kolmogorov_smirnov(ours[2] * ours[3], theirs[2] * theirs[3]) < 0.038, "area"


# Too wide: the central 4:3. Too high. Nothing that large fits: the whole image.
@pytest.mark.parametrize("height, width, area", [(200, 500, 0.6), (500, 200, 0.6), (30, 36, 2)])
def test_box_where_no_try_fits(height, width, area):
    scale = area, area + 1
    boxes = common.random_resized_crop_params(50, height, width, scale, generator=rng())
    theirs = torchvision_boxes(1, height, width, scale)
    assert torch.stack(boxes).unique(dim=1).tolist() == theirs.tolist()


FIRST = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.6)
SECOND = Recipe(scale=(0.1, 0.5), jitter=(1.2, 0, 0, 0.5), jitter_p=1, gray_p=0.5, solarize_p=0.4)


def test_draws_follow_the_recipes():
    n, recipes = 6000, [FIRST, FIRST, SECOND, FIRST]  # equal neighbours may be drawn together
    d = common.Augment(recipes, 32, MEAN, STD).draw(n, 40, 48, rng())
    for i, recipe in enumerate(recipes):
        view = {key: value[i * n : (i + 1) * n] for key, value in d.items()}
        jittered, blurred = view["hue"] != 0, view["sigma"] > 0
        drawn = torch.stack([view["flip"], view["gray"], view["solarize"], blurred, jittered])
        shares = [0.5, recipe.gray_p, recipe.solarize_p, recipe.blur_p, recipe.jitter_p]
        assert drawn.double().mean(1).tolist() == pytest.approx(shares, abs=0.03)
        ranges = {"hue": (-recipe.jitter[3], recipe.jitter[3])}
        for name, spread in zip(common.FACTORS, recipe.jitter[:3], strict=True):
            ranges[name] = max(0, 1 - spread), 1 + spread
        for name, (low, high) in ranges.items():
            drawn = view[name][jittered]
            assert [drawn.min(), drawn.max()] == pytest.approx([low, high], abs=0.02)
            assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.05)
            assert (view[name][~jittered] == (name != "hue")).all()
        if recipe.blur_p:
            sigma = view["sigma"][blurred]
            assert [sigma.min(), sigma.max()] == pytest.approx([0.1, 2], abs=0.05)
        orders, counts = view["order"].unique(dim=0, return_counts=True)
        assert len(orders) == 24 and (orders.sort(1).values == torch.arange(4)).all()
        assert counts.min() > 0.6 * n / 24 and counts.max() < 1.4 * n / 24
        area = view["height"] * view["width"] / (40 * 48)
        assert recipe.scale[0] * 0.9 < area.min() and area.max() < recipe.scale[1] * 1.1


def test_no_draw_tells_another():
    """Of the image, its other view, the next image or the next step: none serves twice."""
    n, augment, rows = 8000, common.Augment([FIRST, FIRST], 32, MEAN, STD), []
    for step in 0, 1:
        d = augment.draw(n, 64, 64, rng(step))
        rows += [d[key] for key in ("flip", "gray", "sigma", *common.FACTORS, "hue")]
        rows += [d["hue"] != 0, d["order"][:, 0]]
        rows += [d["height"] * d["width"], d["width"] / d["height"]]
        for start, extent in ("top", "height"), ("left", "width"):
            rows.append((d[start] + 0.5) / (64 - d[extent] + 1))  # not correlated with the extent
    now, later = torch.stack([row.double() for row in rows]).view(2, -1, n)
    rows = torch.cat([now, later, now.roll(1, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.06  # of 3003 pairs; the deviation of one is .011


def test_recipes_of_methods():
    """SimCLR section A (jitter .8, .8, .8, .2 times strength), BYOL table 6, S001 listing 3."""
    expected = Recipe((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur_p=0.5, solarize_p=0)
    assert common.symmetric(2, strength=0.5, crop_min=0.2, blur=0.5) == [expected] * 2
    one, two, three = common.asymmetric(3)
    assert one == three == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1, solarize_p=0)
    assert two == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, blur_p=0.1, solarize_p=0.2)
    args = SimpleNamespace(method="carl", views=3, color_strength=1.0, crop_min=0.15, blur=1.0)
    assert carl_carp.make_recipes(args) == common.symmetric(3, crop_min=0.15, blur=1.0)
    args.method = "carp"
    one, two, three = carl_carp.make_recipes(args)
    assert one == three == Recipe((0.15, 0.925), (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, blur_p=1.0)
    assert two == Recipe((0.15, 0.925), (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, blur_p=0.1, solarize_p=0.2)


# --------------------------------------------------------------------------------------------------
# Whole views, and what evaluation sees


def torchvision_view(image, d, i, size, kernel_size):
    """Row i of the draws, applied to one uint8 image by torchvision's operations."""
    box = [int(d[key][i]) for key in ("top", "left", "height", "width")]
    x = TF.resized_crop(image / 255, *box, [size, size], FILTERS["bicubic"], antialias=True)
    x = TF.hflip(x.clamp(0, 1)) if d["flip"][i] else x.clamp(0, 1)
    factors = [d[key][i] for key in ("brightness", "contrast", "saturation", "hue")]
    x = torchvision_jitter(x, factors, d["order"][i])
    x = TF.rgb_to_grayscale(x, 3) if d["gray"][i] else x
    x = TF.gaussian_blur(x, kernel_size, float(d["sigma"][i])) if d["sigma"][i] > 0 else x
    x = TF.solarize(x, 128 / 255) if d["solarize"][i] else x
    return TF.normalize(x, MEAN, STD)


@pytest.mark.parametrize("shape, size, kernel_size", [((40, 48), 32, 3), ((70, 60), 64, 7)])
def test_augment_equals_torchvision_with_the_same_draws(shape, size, kernel_size):
    n, images = 12, noise_bytes(12, *shape)
    augment = common.Augment([FIRST, SECOND], size, MEAN, STD)
    views, d = augment(images, rng(3)), augment.draw(n, *shape, rng(3))
    assert all(view.shape == (n, 3, size, size) and view.dtype == torch.float32 for view in views)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    expected = [torchvision_view(images[i % n], d, i, size, kernel_size) for i in range(2 * n)]
    # Solarisation jumps at its threshold: a value or two may be rounded to its other side.
    differs = (torch.cat(views) - torch.stack(expected)).abs() > 1e-4 / min(STD)
    assert differs.double().mean() < 1e-4
    assert d["solarize"].any() and d["sigma"].any() and d["gray"].any()


@pytest.mark.parametrize("policy", ["", "cifar10"])
def test_padded_crops(policy):
    """torchvision's RandomCrop(32, padding=4), flip and, with a policy, its AutoAugment, seeded for
    the image, which leaves torch's numbers where they were. All places are as likely."""
    images = noise_bytes(30, 32) // 2 + 20  # not spread over all values, for what spreads them
    recipe = Recipe(jitter_p=0, gray_p=0, pad=4, policy=policy)
    augment, state = common.Augment([recipe] * 2, 32, MEAN, STD), torch.get_rng_state()
    views, d = torch.cat(augment(images, rng(2))), augment.draw(30, 40, 40, rng(2))
    assert torch.equal(torch.get_rng_state(), state)
    padded = torch.nn.functional.pad(images, (4,) * 4).repeat(2, 1, 1, 1)
    for i in range(60):
        top, left = int(d["top"][i]), int(d["left"][i])
        crop = padded[i, :, top : top + 32, left : left + 32]
        crop = TF.hflip(crop) if d["flip"][i] else crop
        if policy:
            torch.manual_seed(int(d["policy"][i]))
            auto = torchvision.transforms.AutoAugmentPolicy(policy)
            crop = torchvision.transforms.AutoAugment(auto)(crop)
        close(views[i], TF.normalize(crop / 255, MEAN, STD), 1e-5)
    d = augment.draw(900, 40, 40, rng(3))
    for name in "top", "left":
        counts = d[name].bincount(minlength=9)
        assert len(counts) == 9 and counts.min() > 140  # of 1800, 200 each
    assert not policy or len(d["policy"].unique()) == 1800


@pytest.mark.parametrize("pad", [0, 2])
def test_images_that_workers_have_cropped_keep_their_crops(pad):
    """[B, V, 3, S, S]: view v of image b is crop v of image b, mirrored or not."""
    crops = noise_bytes(6 * 3, 16).view(6, 3, 3, 16, 16)
    augment = common.Augment([Recipe(jitter_p=0, gray_p=0, pad=pad)] * 3, 16, MEAN, STD)
    flip = augment.draw(6, 16 + 2 * pad, 16 + 2 * pad, rng())["flip"].view(3, 6)
    for v, view in enumerate(augment(crops, rng())):
        for b, crop in enumerate(crops[:, v]):
            crop = TF.hflip(crop) if flip[v, b] else crop
            close(view[b], TF.normalize(crop / 255, MEAN, STD), 1e-5)


@pytest.mark.gpu
def test_views_on_cuda_equal_those_on_the_cpu():
    images, cpu, cuda = noise_bytes(64, 40), torch.device("cpu"), torch.device("cuda")
    here, there = (common.Augment([FIRST, SECOND], 32, MEAN, STD, x) for x in (cpu, cuda))
    d = here.draw(32, 40, 40, rng())
    on_gpu = there.apply(images.to(cuda), {key: x.to(cuda) for key, x in d.items()})
    differs = (on_gpu.cpu() - here.apply(images, d)).abs() > 1e-3
    assert differs.double().mean() < 1e-4  # solarisation jumps at its threshold


# The central 7/8 of the shorter side (of 300: 262.5); all of it where the image is no larger.
BOXES = [(256, 256, 224, (16, 16, 224, 224)), (300, 400, 224, (19, 69, 262, 262))]
BOXES += [(32, 32, 32, (0, 0, 32, 32)), (20, 30, 32, (0, 5, 20, 20))]


@pytest.mark.parametrize("height, width, size, box", BOXES)
def test_evaluation_view(height, width, size, box):
    assert common.centre_box(height, width, size) == box
    images = noise_bytes(2, height, width)
    x = TF.resized_crop(images / 255, *box, [size, size], FILTERS["bicubic"], antialias=True)
    view = common.evaluation_view(images, size, MEAN, STD)
    close(view, TF.normalize(x.clamp(0, 1), MEAN, STD), 1e-4)
    assert view.is_contiguous(memory_format=torch.channels_last)
