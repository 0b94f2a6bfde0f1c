"""The views: each operation against torchvision's on float images, image by image; the random
numbers, their distributions and that none of them tells another; whole views against torchvision
with the same draws; and what evaluation sees."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF

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


def image_by_image(operation, x, *parameters):
    """operation(image, its parameters) for each image, stacked."""
    return torch.stack([operation(*row) for row in zip(x, *parameters, strict=True)])


# --------------------------------------------------------------------------------------------------
# The operations, every image with its own parameters

FILTERS = {name: TF.InterpolationMode(name) for name in ("bilinear", "bicubic")}


def random_boxes(n, height, width, seed=0):
    """Any box inside the image, the whole image and a single pixel included."""
    r = rng(seed)
    h, w = (torch.randint(1, side + 1, (n,), generator=r) for side in (height, width))
    h[0], w[0], h[1], w[1] = height, width, 1, 1
    top = (torch.rand(n, generator=r) * (height - h + 1)).long()
    left = (torch.rand(n, generator=r) * (width - w + 1)).long()
    return top, left, h, w


@pytest.mark.parametrize("interpolation", FILTERS)
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
def test_resized_crop(shape, size, interpolation):
    x, boxes, flip = noise(24, *shape), random_boxes(24, *shape), uniform(0, 1, 24) < 0.5
    out = [size, size] if isinstance(size, int) else list(size)

    def crop(image, *box):
        box = [int(value) for value in box]
        return TF.resized_crop(image, *box, out, FILTERS[interpolation], antialias=True)

    expected = image_by_image(crop, x, *boxes)
    close(common.resized_crop(x, *boxes, size, interpolation=interpolation), expected)
    expected[flip] = expected[flip].flip(-1)
    close(common.resized_crop(x, *boxes, size, flip, interpolation), expected)


def test_resized_crop_is_bicubic_by_default_and_refuses_other_filters():
    x, boxes = noise(4, 20), random_boxes(4, 20, 20)
    bicubic = common.resized_crop(x, *boxes, 24, interpolation="bicubic")
    assert torch.equal(common.resized_crop(x, *boxes, 24), bicubic)
    with pytest.raises(ValueError, match="nearest"):
        common.resized_crop(x, *boxes, 24, interpolation="nearest")


JITTER = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


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
    before = x.clone()
    expected = image_by_image(torchvision_jitter, x, factors.T, order)
    close(common.color_jitter(x, *factors, order), expected)
    assert torch.equal(x, before)


def one_alone(operation, values):
    """Factors and orders in which the other three change nothing."""
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].repeat(1, len(values))
    factors[operation] = values
    return *factors, torch.rand(len(values), 4, generator=rng(1)).argsort(1)


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation_alone(operation):
    x, values = noise(16, 10), uniform(-0.5, 0.5, 16) if operation == 3 else uniform(0, 2, 16)
    expected = image_by_image(JITTER[operation], x, values.tolist())
    close(common.color_jitter(x, *one_alone(operation, values)), expected)


def test_hue_where_channels_are_equal_or_nearly_so():
    """Every colour of three levels, so two or three channels are equal, and the same with a
    contrast of a few units in the last place."""
    colours = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))  # [27, 3]
    x, shift = colours.T[None, :, :, None].repeat(13, 1, 1, 1), torch.linspace(-0.5, 0.5, 13)
    turned = common.color_jitter(x, *one_alone(3, shift))
    close(turned, image_by_image(TF.adjust_hue, x, shift.tolist()))
    faint = common.color_jitter(0.625 + 2**-22 * x, *one_alone(3, shift))
    close((faint - 0.625) * 2**22, turned, atol=0.25)  # half a unit in the last place is .125


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_color_jitter_takes_images_of_any_float_type(dtype):
    """With factors in float32, as Augment draws them, and with gray pixels, whose hue is 0 / 0."""
    x, order = noise(6, 5), torch.rand(6, 4, generator=rng()).argsort(1)
    x[:3] = x[:3, :1]
    draws = *uniform(0.5, 1.5, 3, 6), uniform(-0.5, 0.5, 6), order
    jittered = common.color_jitter(x.to(dtype), *draws)
    assert jittered.dtype == dtype and jittered.isfinite().all()
    differs = (jittered.float() - common.color_jitter(x, *draws)).abs()
    assert differs.mean() < {torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("kernel_size", [3, 5, 9, 23])
def test_gaussian_blur(kernel_size):
    x, sigma = noise(12, 24, 31), uniform(0.1, 2.0, 12)
    sigma[::4] = 0  # no blur at all
    blurred = common.gaussian_blur(x, sigma, kernel_size)
    assert torch.equal(blurred[::4], x[::4])
    some = sigma > 0
    expected = image_by_image(
        lambda image, s: TF.gaussian_blur(image, kernel_size, float(s)), x[some], sigma[some]
    )
    close(blurred[some], expected)


def test_solarize_and_grayscale():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    expected = torch.where(levels >= 128, 255 - levels, levels) / 255  # as on bytes
    close(common.solarize(levels / 255), expected, atol=1e-6)
    x = noise(5, 16)
    close(common.solarize(x, 0.25), TF.solarize(x, 0.25), atol=1e-6)
    close(common.grayscale(x), TF.rgb_to_grayscale(x, num_output_channels=3), atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The random numbers


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
    theirs = torchvision_boxes(n, height, width, scale)
    ours = common.random_resized_crop_params(5 * n, height, width, scale, generator=rng())
    for name, a, b in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        # Two samples of one distribution come this far apart with probability 1e-6; 5 %: .019.
        assert kolmogorov_smirnov(a, b) < 0.038, name
    assert kolmogorov_smirnov(ours[2] * ours[3], theirs[2] * theirs[3]) < 0.038, "area"


@pytest.mark.parametrize("height, width", [(32, 32), (20, 64), (97, 33)])
def test_crop_boxes_lie_inside_the_image(height, width):
    boxes = common.random_resized_crop_params(4000, height, width, (0.08, 1), generator=rng())
    top, left, h, w = boxes
    assert all(value.shape == (4000,) and value.dtype == torch.int64 for value in boxes)
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    assert int((top + h).max()) == height and int((left + w).max()) == width and not int(top.min())


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
    n, recipes = 6000, [FIRST, FIRST, SECOND, FIRST]  # equal neighbours may be drawn together
    d = common.Augment(recipes, 32, MEAN, STD).draw(n, 40, 48, rng())
    assert all(len(value) == 4 * n for value in d.values())
    for i, recipe in enumerate(recipes):
        view = {key: value[i * n : (i + 1) * n] for key, value in d.items()}
        jittered, blurred = view["hue"] != 0, view["sigma"][view["sigma"] > 0]
        for share, p in (
            (view["flip"], 0.5),
            (view["gray"], recipe.gray_p),
            (view["sigma"] > 0, recipe.blur_p),
            (view["solarize"], recipe.solarize_p),
            (jittered, recipe.jitter_p),
        ):
            assert share.double().mean() == pytest.approx(p, abs=0.03)
        names = ("brightness", "contrast", "saturation", "hue")
        for name, spread in zip(names, recipe.jitter, strict=True):
            middle = 0 if name == "hue" else 1
            low = max(0, 1 - spread) if middle else -spread
            high, drawn = middle + spread, view[name][jittered]
            assert low - 1e-6 <= drawn.min() <= low + 0.02
            assert high - 0.02 <= drawn.max() <= high + 1e-6
            assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low) + 1e-6)
            assert (view[name][~jittered] == middle).all()
        assert not len(blurred) or (0.1 <= blurred.min() < 0.15 and 1.95 < blurred.max() <= 2)
        orders, counts = view["order"].unique(dim=0, return_counts=True)
        assert len(orders) == 24 and (orders.sort(1).values == torch.arange(4)).all()
        assert counts.min() > 0.6 * n / 24 and counts.max() < 1.4 * n / 24
        area = view["height"] * view["width"] / (40 * 48)
        assert recipe.scale[0] * 0.9 < area.min() and area.max() < recipe.scale[1] * 1.1


def numbers(d, n, side):
    """What was drawn for the images of two views as rows of [2 * ..., n], not correlated."""
    rows = [d[key] for key in ("flip", "gray", "sigma", "brightness", "contrast", "hue")]
    rows += [d["saturation"], d["hue"] != 0, d["order"][:, 0]]
    rows += [d["height"] * d["width"], d["width"] / d["height"]]
    rows += [
        (d["top"] + 0.5) / (side - d["height"] + 1),
        (d["left"] + 0.5) / (side - d["width"] + 1),
    ]
    return torch.stack([row.double() for row in rows]).view(-1, n)


def test_no_draw_tells_another():
    """Of one image, of its other view, of the next image or of the next step: else a number would
    serve twice."""
    n, augment = 8000, common.Augment([FIRST, FIRST], 32, MEAN, STD)
    now, later = (numbers(augment.draw(n, 64, 64, rng(seed)), n, 64) for seed in (0, 1))
    rows = torch.cat([now, later, now.roll(1, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.06  # of 3003 pairs; the deviation of one is .011


def test_symmetric_and_asymmetric_recipes():
    """SimCLR section A (jitter .8, .8, .8, .2 times strength) and BYOL table 6."""
    expected = Recipe((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur_p=0.5, solarize_p=0)
    assert common.symmetric(2, strength=0.5, crop_min=0.2, blur=0.5) == [expected] * 2
    one, two, three = common.asymmetric(3)
    assert one == three == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1, solarize_p=0)
    assert two == Recipe((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, blur_p=0.1, solarize_p=0.2)


# --------------------------------------------------------------------------------------------------
# Whole views


def torchvision_view(image, d, i, size, kernel_size, policy):
    """Row i of the draws, applied to one uint8 image by torchvision's operations."""
    box = [int(d[key][i]) for key in ("top", "left", "height", "width")]
    x = TF.resized_crop(image / 255, *box, [size, size], FILTERS["bicubic"], antialias=True)
    x = TF.hflip(x.clamp(0, 1)) if d["flip"][i] else x.clamp(0, 1)
    x = after_policy((x * 255).round().byte(), policy, d, i) / 255 if policy else x
    factors = [d[key][i] for key in ("brightness", "contrast", "saturation", "hue")]
    x = torchvision_jitter(x, factors, d["order"][i])
    x = TF.rgb_to_grayscale(x, 3) if d["gray"][i] else x
    x = TF.gaussian_blur(x, kernel_size, float(d["sigma"][i])) if d["sigma"][i] > 0 else x
    x = TF.solarize(x, 128 / 255) if d["solarize"][i] else x
    return TF.normalize(x, MEAN, STD)


@pytest.mark.parametrize(
    "shape, size, kernel_size, policy",
    [((40, 48), 32, 3, ""), ((70, 60), 64, 7, ""), ((40, 48), 32, 3, "svhn")],
)
def test_augment_equals_torchvision_with_the_same_draws(shape, size, kernel_size, policy):
    n, images = 12, noise_bytes(12, *shape)
    recipes = [dataclasses.replace(recipe, policy=policy) for recipe in (FIRST, SECOND)]
    augment = common.Augment(recipes, size, MEAN, STD)
    views, d = augment(images, rng(3)), augment.draw(n, *shape, rng(3))
    assert all(view.shape == (n, 3, size, size) and view.dtype == torch.float32 for view in views)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    expected = torch.stack(
        [torchvision_view(images[i % n], d, i, size, kernel_size, policy) for i in range(2 * n)]
    )
    # Solarisation jumps at its threshold: a value or two may be rounded to its other side. So does
    # a policy, which takes bytes.
    differs = (torch.cat(views) - expected).abs() > 1e-4 / min(STD)
    assert differs.double().mean() < (1e-2 if policy else 1e-4)
    assert d["solarize"].any() and d["sigma"].any() and d["gray"].any()


@pytest.mark.parametrize("policy", ["", "cifar10", "imagenet"])
def test_padded_crops(policy):
    """torchvision's RandomCrop(32, padding=4), flip and, where there is a policy, its AutoAugment
    after the image's own seed. Each place is as likely."""
    images = noise_bytes(60, 32) // 2 + 20  # not spread over all values, for what spreads them
    recipe = Recipe(jitter_p=0, gray_p=0, pad=4, policy=policy)
    augment = common.Augment([recipe] * 2, 32, MEAN, STD)
    views, d = torch.cat(augment(images, rng(2))), augment.draw(60, 40, 40, rng(2))
    padded = torch.nn.functional.pad(images, (4,) * 4).repeat(2, 1, 1, 1)
    for i in range(120):
        top, left = int(d["top"][i]), int(d["left"][i])
        crop = padded[i, :, top : top + 32, left : left + 32]
        crop = TF.hflip(crop) if d["flip"][i] else crop
        close(views[i], TF.normalize(after_policy(crop, policy, d, i) / 255, MEAN, STD), 1e-5)
    d = augment.draw(900, 40, 40, rng(3))
    for name in "top", "left":
        counts = d[name].bincount(minlength=9)
        assert len(counts) == 9 and counts.min() > 140  # of 1800, 200 each


def after_policy(image, policy, d, i):
    """torchvision's AutoAugment of a uint8 image, with torch's generator at the image's seed."""
    if not policy:
        return image
    with torch.random.fork_rng():
        torch.manual_seed(int(d["policy"][i]))
        policy = torchvision.transforms.AutoAugmentPolicy(policy)
        return torchvision.transforms.AutoAugment(policy)(image)


def test_policy_draws():
    """Each image of a batch has a seed of its own, which the rng decides; what the policy draws
    leaves torch's own numbers where they were."""
    recipe = Recipe(jitter_p=0, gray_p=0, pad=4, policy="cifar10")
    augment = common.Augment([recipe] * 2, 32, MEAN, STD)
    seeds, again, others = (augment.draw(500, 40, 40, rng(s))["policy"] for s in (0, 0, 1))
    assert seeds.shape == (1000,) and seeds.dtype == torch.int64 and len(seeds.unique()) == 1000
    assert torch.equal(seeds, again) and not torch.isin(others, seeds).any()
    d = augment.draw(50, 40, 40, rng())
    d["top"], d["left"], d["flip"] = d["top"] * 0 + 4, d["left"] * 0 + 4, d["flip"] & False
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    same = augment.apply(noise_bytes(1, 40).repeat(100, 1, 1, 1), d)
    assert torch.equal(torch.rand(3), expected)
    assert len(same.flatten(1).unique(dim=0)) > 20  # many are left as they are


@pytest.mark.parametrize("policy", ["", "cifar10"])
def test_images_that_workers_have_cropped_keep_their_crops(policy):
    """[B, V, 3, S, S]: view v of image b is crop v of image b, mirrored or not."""
    crops, pad = noise_bytes(6 * 3, 16).view(6, 3, 3, 16, 16), 2 if policy else 0
    recipe = Recipe(jitter_p=0, gray_p=0, pad=pad, policy=policy)
    augment = common.Augment([recipe] * 3, 16, MEAN, STD)
    d = augment.draw(6, 16 + 2 * pad, 16 + 2 * pad, rng())
    assert 0 < d["flip"].sum() < 18
    for v, view in enumerate(augment(crops, rng())):
        for b in range(6):
            crop = TF.hflip(crops[b, v]) if d["flip"][6 * v + b] else crops[b, v]
            crop = after_policy(crop, policy, d, 6 * v + b)
            close(view[b], TF.normalize(crop / 255, MEAN, STD), 1e-5)


def test_every_image_and_every_view_is_another():
    same = noise_bytes(1, 32).expand(8, -1, -1, -1)
    augment = common.Augment(common.symmetric(2, 1.0, blur=0.5), 32, MEAN, STD)
    views = torch.cat(augment(same, rng()))
    torch.manual_seed(123)  # which nothing depends on
    assert torch.equal(torch.cat(augment(same, rng())), views)
    for a, b in itertools.combinations([*views, *torch.cat(augment(same, rng(1)))], 2):
        assert (a - b).abs().max() > 0.05


@pytest.mark.gpu
def test_views_on_cuda_equal_those_on_the_cpu():
    images, where = noise_bytes(64, 40), "cuda"
    augment = common.Augment([FIRST, SECOND], 32, MEAN, STD)
    draws = augment.draw(32, 40, 40, rng())
    on_cpu = augment.apply(images, draws)
    augment = common.Augment([FIRST, SECOND], 32, MEAN, STD, where)
    on_gpu = augment.apply(images.to(where), {key: x.to(where) for key, x in draws.items()})
    differs = (on_gpu.cpu() - on_cpu).abs() > 1e-3
    assert differs.double().mean() < 1e-4  # solarisation jumps at its threshold
    views = augment(images.to(where), torch.Generator(where).manual_seed(0))
    assert all(view.is_cuda and view.isfinite().all() for view in views)


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
def test_evaluation_view(height, width, size, box):
    assert common.centre_box(height, width, size) == box
    images = noise_bytes(2, height, width)
    x = TF.resized_crop(images / 255, *box, [size, size], FILTERS["bicubic"], antialias=True)
    view = common.evaluation_view(images, size, MEAN, STD)
    close(view, TF.normalize(x.clamp(0, 1), MEAN, STD))
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_normalize():
    x = noise(2, 8)
    close(common.Augment([], 8, MEAN, STD).normalize(x), TF.normalize(x, MEAN, STD), atol=1e-6)
