# SPDX-License-Identifier: MIT
"""What every training script needs and nothing that belongs to one method, from the loop downwards.

 1  The training loop               train
 2  Optimisation                    learning_rate, make_optimizer, LARS
 3  Views                           Augment, Recipe, and the operations that they are made of
 4  Models                          resnet, mlp, forward_views
                                    ... and here a learner may stop
 5  What a representation is worth  encode, knn_scores, collapse_figures
 6  A term for any method           lower_bound_estimate, MutualInformation
                                    ... from here on: a program's plumbing
 7  A run                           Run: its folder, log, saving, going on
 8  Data                            load_dataset: a name, a folder or a packed .pt file
 9  Command line and hardware       base_parser, parse_args, prepare
10  Files, signals, bad input       InputError, run, atomic_write, load_file, generator
11  Several processes               gather, mine, SyncBatchNorm, distributed
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# 1  The training loop


def train(method, model, data, recipes, args):
    """Train `model` on views of data.pretrain and write the run to args.out.

    model: a method, which is a plain nn.Module with
        backbone              the encoder, [B, 3, S, S] -> [B, F]: what is saved and evaluated
        forward(views, y)     -> (loss, terms). views: V of [B, 3, S, S]; y: int64 [B], -1 where
                              there is no label; loss: a scalar; terms: {name: scalar, a tensor or
                              a float}, logged under these names
        after_step(progress)  optional, called after the optimiser with the share of steps done
        concat_views          optional: whether all views pass in one batch, for --concat-views
    method: its name. recipes: a Recipe for each view. data, args: as `prepare` leaves them."""
    model = set_up(model, args)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    part = rank(), world_size()  # which part of a batch is this process's; (0, 1): all of it
    augment = Augment(recipes, args.image_size, data.mean, data.std, args.device, part)
    steps = len(data.pretrain) // args.batch_size  # in an epoch
    run = Run(method, model, optimizer, scaler, data, steps, args)
    step = run.begin(augment)  # steps done: 0, or where a stopped run goes on
    forward = distributed(compiled(model, args))
    if not recipes[0].policy:  # AutoAugment goes image by image
        augment.apply = compiled(augment.apply, args)

    warmup, total = args.warmup_epochs * steps, args.epochs * steps
    final = args.scaled_lr if args.schedule == "constant" else 0.0

    for epoch in range(run.epoch + 1, args.epochs + 1):
        skip = step - (epoch - 1) * steps  # of this epoch, done before a stop
        for images, labels in training_batches(data.pretrain, epoch, args, recipes, skip):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, warmup, args.scaled_lr, final)

            views = augment(images, generator(args.seed, "augment", step, args.device))
            torch.manual_seed(derived_seed(args.seed, "model", step))  # for what the model draws
            with autocast(args):
                loss, terms = forward(views, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            step += 1
            if hasattr(model, "after_step"):
                model.after_step(step / total)
            run.after_step(step, loss, terms)
        run.after_epoch(epoch)
    run.finish()


# --------------------------------------------------------------------------------------------------
# 2  Optimisation


def learning_rate(step, total, warmup, base, final=0.0):
    """Linear warm-up to `base` over `warmup` steps, then half a cosine to `final` at `total`."""
    if step < warmup:
        return base * min(1, (step + 1) / warmup)
    return final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_optimizer(model, args, fused=True):
    """The optimiser that the flags name. Matrices and kernels decay; biases and norms, which have
    one dimension, do not. fused: one launch for a step; None leaves it to torch."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0},
    ]
    if args.optimizer == "lars":
        return LARS(groups, args.scaled_lr, args.momentum)
    if args.optimizer == "sgd":
        # If the scaler skips the first step, fused SGD reads a momentum that nobody wrote.
        fused = fused and args.precision != "fp16"
        return torch.optim.SGD(groups, args.scaled_lr, args.momentum, fused=fused)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return adam(groups, args.scaled_lr, fused=fused)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), the rule of facebookresearch/barlowtwins.

    Tensors of two or more dimensions: u = grad + weight_decay * p, scaled to the length
    trust_coefficient * |p|. Tensors of one (biases, norms): u = grad. Then m = momentum * m + u and
    p = p - lr * m; the learning rate stays outside the momentum."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    p_norm, update_norm = p.norm(), update.norm()
                    ratio = group["trust_coefficient"] * p_norm / update_norm
                    zero = (p_norm == 0) | (update_norm == 0)  # then a plain step
                    update = update * ratio.masked_fill(zero, 1)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum_buffer"], alpha=-group["lr"])


# --------------------------------------------------------------------------------------------------
# 3  Views: torchvision's float operations, for a batch in which each image has its own random draw


class Augment:
    """uint8 images -> V normalised views, each float [B, 3, S, S] in channels_last.

    The views differ in random numbers alone. So they are stacked, and each operation runs once for
    all of them: crop and flip, jitter, grayscale, blur, solarise, normalise, in torchvision's
    order."""

    def __init__(self, recipes, size, mean, std, device="cpu", part=(0, 1)):
        """part: (i, N): this is process i of the N that share a batch, each with B images of it."""
        self.recipes, self.size, self.part = recipes, size, part
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.kernel_size = 2 * max(1, size // 20) + 1  # a tenth of the side: 3 at 32, 23 at 224

    @torch.no_grad()
    def __call__(self, images, rng):
        """images: uint8 [B, 3, H, W], or [B, V, 3, S, S] already cropped; rng on their device. Of
        several processes each draws for the whole batch, and takes its part."""
        index, parts = self.part
        views, pad, n = len(self.recipes), self.recipes[0].pad, len(images) * parts
        if pad:
            images = F.pad(images, (pad,) * 4)
        d = self.draw(n, *images.shape[-2:], rng)
        d = {k: x.unflatten(0, (views, parts, -1))[:, index].flatten(0, 1) for k, x in d.items()}
        if images.ndim == 4:
            return self.apply(images.repeat(views, 1, 1, 1), d).chunk(views)
        whole = {"top": pad, "left": pad, "height": self.size, "width": self.size}
        d |= {key: torch.full_like(d[key], value) for key, value in whole.items()}
        return self.apply(images.transpose(0, 1).flatten(0, 1), d).chunk(views)  # cropped before

    def draw(self, n, height, width, rng) -> dict:
        """Every random number for n images: tensors whose first dimension is V * n, view 1 first.

        top, left, height, width (pixels), flip, gray, solarize (bool), brightness, contrast,
        saturation (factors), hue (turns), order [V * n, 4], sigma (pixels, 0 for no blur); with a
        policy, a seed for it."""
        drawn, how = [], {"device": rng.device, "generator": rng}

        def uniform(low, high):  # `many` numbers, which each turn of the loop sets
            return torch.empty(many, device=rng.device).uniform_(low, high, generator=rng)

        for recipe, alike in itertools.groupby(self.recipes):  # equal ones in a row at once
            many = n * len(list(alike))
            if recipe.pad:
                side = min(height, width) - 2 * recipe.pad
                sides = torch.full((many,), side, device=rng.device)
                rest = height - side, width - side
                crop = *(uniform(0, r + 1).long().clamp(max=r) for r in rest), sides, sides
            else:
                crop = random_resized_crop_params(many, height, width, recipe.scale, **how)
            d = dict(zip(("top", "left", "height", "width"), crop, strict=True))
            d |= {"flip": uniform(0, 1) < 0.5, "gray": uniform(0, 1) < recipe.gray_p}
            plain = uniform(0, 1) >= recipe.jitter_p  # masked_fill: where() copies from the host
            for name, spread in zip(FACTORS, recipe.jitter[:3], strict=True):
                d[name] = uniform(max(0, 1 - spread), 1 + spread).masked_fill(plain, 1)
            d["hue"] = uniform(-recipe.jitter[3], recipe.jitter[3]).masked_fill(plain, 0)
            d["order"] = torch.rand(many, 4, **how).argsort(1)
            sharp = uniform(0, 1) >= recipe.blur_p
            d["sigma"] = uniform(0.1, 2.0).masked_fill(sharp, 0)  # SimCLR's range
            d["solarize"] = uniform(0, 1) < recipe.solarize_p
            if recipe.policy:
                d["policy"] = torch.randint(2**31, (many,), **how)
            drawn.append(d)
        return {key: torch.cat([d[key] for d in drawn]) for key in drawn[0]}

    def apply(self, images, d):
        """images: uint8 [V * B, 3, H, W]; d: what `draw` returned."""
        box = d["top"], d["left"], d["height"], d["width"]
        x = resized_crop(images.float().div_(255), *box, self.size, d["flip"]).clamp_(0, 1)
        if "policy" in d:
            x = auto_augment(x, self.recipes[0].policy, d["policy"])
        if any(r.jitter_p for r in self.recipes):
            x = color_jitter(x, *(d[key] for key in (*FACTORS, "hue", "order")))
        if any(r.gray_p for r in self.recipes):
            gray = d["gray"].view(-1, 1, 1, 1).float()  # where() is slower on a CPU
            grayed = luma(x).mul_(gray)
            x = x.mul_(1 - gray).add_(grayed)
        if any(r.blur_p for r in self.recipes):
            x = gaussian_blur(x, d["sigma"], self.kernel_size)
        if any(r.solarize_p for r in self.recipes):
            x = torch.where(d["solarize"].view(-1, 1, 1, 1), solarize(x), x)
        return self.normalize(x)

    def normalize(self, x):
        return (x - self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one view is drawn. scale: range of the crop's share of the area. jitter: of brightness,
    contrast, saturation, hue. pad: where above 0, the image gets a black border of `pad` pixels and
    is cropped back to its size; `scale` is then only for what is decoded from disk. policy:
    torchvision's name of an AutoAugment policy, or none. All of an Augment share pad and policy."""

    scale: tuple = (0.08, 1.0)
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    solarize_p: float = 0.0
    pad: int = 0
    policy: str = ""


def symmetric(views=2, strength=1.0, crop_min=0.08, blur=0.0):
    """SimCLR's recipe, the same for every view; jitter (.8, .8, .8, .2) * strength
    (google-research/simclr data_util.py; its README has strength .5 and no blur on CIFAR-10)."""
    jitter = tuple(strength * j for j in (0.8, 0.8, 0.8, 0.2))
    return [Recipe((crop_min, 1.0), jitter, blur_p=blur)] * views


def asymmetric(views=2, strength=1.0, crop_min=0.08, blur=1.0):
    """BYOL's recipe; jitter (.4, .4, .2, .1) * strength. Views alternate: blur with p = `blur`,
    then a tenth of it and solarisation with p = .2 (deepmind-research byol/utils/augmentations.py).
    """
    jitter = tuple(strength * j for j in (0.4, 0.4, 0.2, 0.1))
    first = Recipe((crop_min, 1.0), jitter, blur_p=blur)
    second = dataclasses.replace(first, blur_p=blur / 10, solarize_p=0.2)
    return [(first, second)[v % 2] for v in range(views)]


def random_resized_crop_params(
    n, height, width, scale, ratio=(3 / 4, 4 / 3), device=None, generator=None
):
    """torchvision's RandomResizedCrop draw for n images of height x width at once.

    scale: range of the crop's share of the area. ratio: range of width / height, log-uniform. Of
    ten tries the first that fits counts; where none does, the largest central crop within `ratio`.
    Returns top, left, height, width, each int64 [n]."""
    area = torch.empty(n, 10, device=device).uniform_(*scale, generator=generator) * height * width
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.empty(n, 10, device=device).uniform_(*log_ratio, generator=generator).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, some = fits.int().argmax(1, keepdim=True), fits.any(1)
    h = h.gather(1, first)[:, 0].masked_fill(~some, min(height, round(width / ratio[0])))
    w = w.gather(1, first)[:, 0].masked_fill(~some, min(width, round(height * ratio[1])))
    u = torch.rand(2, n, device=device, generator=generator)
    top = (u[0] * (height - h + 1)).long().minimum(height - h)  # u * k can round up to k
    left = (u[1] * (width - w + 1)).long().minimum(width - w)
    top = torch.where(some, top, (height - h) // 2)
    left = torch.where(some, left, (width - w) // 2)
    return top, left, h, w


def resized_crop(x, top, left, height, width, size, flip=None, interpolation="bicubic"):
    """Crop each image, resize the crop, mirror it where `flip`: batched matrix products.

    x: float [B, C, H, W] in [0, 1]. top, left, height, width: [B], pixels. size: int or (h, w).
    flip: bool [B] or None. Returns [B, C, h, w], equal to torchvision's antialiased resized_crop
    (then hflip) of each image by itself; as there, bicubic can leave [0, 1] (Augment clamps)."""
    out_h, out_w = (size, size) if isinstance(size, int) else size
    rows = resampling_matrix(top, height, x.shape[2], out_h, interpolation)
    columns = resampling_matrix(left, width, x.shape[3], out_w, interpolation, flip)
    narrow = x.flatten(1, 2) @ columns.mT.to(x.dtype)  # [B, C H, w]
    narrow = narrow.unflatten(1, x.shape[1:3])
    # rows[:, None] @ narrow would copy the rows for each channel.
    return torch.stack([rows.to(x.dtype) @ channel for channel in narrow.unbind(1)], 1)


def resampling_matrix(start, length, size_in, size_out, interpolation, mirror=None):
    """[B, size_out, size_in]: row o holds the weights with which output pixel o reads its crop;
    where `mirror` (bool [B]), in reverse order.

    The antialiased filters of Pillow and torchvision: triangle (bilinear) or cubic with a = -0.5
    (bicubic), widened by the reduction, cut off at the border of the crop, normalised."""
    length, start = length.float()[:, None, None], start.float()[:, None, None]
    step = length / size_out  # input pixels per output pixel
    reach = step.clamp(min=1)  # of the filter: the unit of centre and t
    place = torch.arange(size_out, device=start.device)[:, None]
    if mirror is not None:
        place = torch.where(mirror[:, None, None], size_out - 1 - place, place)
    centre = (place + 0.5) * step / reach
    pixel = torch.arange(size_in, device=start.device) - start  # counted from the crop's border
    outside = (pixel < 0) | (pixel >= length)  # far away, with weight 0
    t = (((pixel + 0.5) / reach).masked_fill(outside, math.inf) - centre).abs_()
    weight = u = (1 - t).clamp_(min=0)
    if interpolation == "bicubic":  # both pieces of the cubic, u^2 (1 - 2 u) + v^2 (v - 1) / 2
        v = t.neg_().add_(2).clamp_(min=0)
        weight = torch.addcmul(u, u, u, value=-2).mul_(u)
        weight.addcmul_(torch.addcmul(v, v, v, value=-1), v, value=-0.5)
    elif interpolation != "bilinear":
        raise ValueError(f"interpolation {interpolation!r} is neither 'bilinear' nor 'bicubic'")
    return weight.div_(weight.sum(-1, keepdim=True))


def auto_augment(x, policy, seeds):
    """torchvision's AutoAugment (Cubuk et al. 2018) of each image of x [B, 3, H, W] in [0, 1], with
    the random numbers of its seed [B]. policy: "cifar10", "imagenet" or "svhn"."""
    kinds = torchvision.transforms
    transform = kinds.AutoAugment(kinds.AutoAugmentPolicy(policy))
    images = list((x * 255).round().byte())
    with torch.random.fork_rng(devices=[]):  # the transform draws from torch's own generator
        for i, seed in enumerate(seeds.tolist()):
            torch.default_generator.manual_seed(seed)
            images[i] = transform(images[i])
    return torch.stack(images).float() / 255


FACTORS = ("brightness", "contrast", "saturation")


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter with every draw given. x: float [B, 3, H, W] in [0, 1].

    brightness, contrast, saturation: factors [B]; hue: shift [B] in turns; order: [B, 4], for each
    image a permutation of (0 brightness, 1 contrast, 2 saturation, 3 hue).

    Each image has its own order, yet all run the same code: three slots, the hue, three slots. In
    a slot that an image does not use, the factor is 1 and nothing changes."""
    factors = torch.stack([brightness, contrast, saturation, hue], 1).gather(1, order)
    hue_at = order.argmax(1, keepdim=True)  # 3 is the largest
    place = torch.arange(4, device=x.device)
    wanted = torch.cat([place[:3] < hue_at, place[1:] > hue_at], 1)  # [B, 6], as all below
    factor = torch.cat([factors[:, :3], factors[:, 1:]], 1).masked_fill(~wanted, 1)
    kind = torch.cat([order[:, :3], order[:, 1:]], 1)
    # Each slot mixes the image with black (brightness), its mean gray (contrast) or its gray.
    shares = torch.stack([factor, (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)])
    shares = shares.to(x.dtype)[..., None, None, None]

    def blend(x, slot):  # in place, except in slot 0, where x is the caller's
        of_image, of_mean, of_gray = shares[:, :, slot]
        gray = luma(x)
        mean = gray.mean((2, 3), keepdim=True).mul_(of_mean)
        x = x * of_image if slot == 0 else x.mul_(of_image)
        return x.add_(gray.mul_(of_gray).add_(mean)).clamp_(0, 1)

    for slot in 0, 1, 2:
        x = blend(x, slot)
    x = shift_hue(x, hue)
    for slot in 3, 4, 5:
        x = blend(x, slot)
    return x


def shift_hue(x, shift):
    """Turn the hue of x [B, 3, H, W] by shift [B], in turns; HSV's saturation and value stay.

    Let h be the hue in sixths of a turn from cyan, in [-3, 3]: green at -1, blue at 1, red at +-3.
    With the channels scaled so that the largest is 1 and the smallest 0, |h| = 2 + r - g - b, in
    whatever order they are, and h < 0 where g > b. Back: red is clamp(|h| - 1, 0, 1), green
    clamp(2 - |h + 1|, 0, 1), blue clamp(2 - |h - 1|, 0, 1)."""
    r, g, b = x.split(1, 1)
    low = r.minimum(g).minimum(b)
    chroma = r.maximum(g).maximum(b).sub_(low)
    divisor = chroma.clamp(min=torch.finfo(x.dtype).tiny)  # gray has no hue: any will do
    h = (r - g).add_(low - b)  # (r - low) - (g - low) - (b - low)
    h.div_(divisor).add_(2).copysign_(b - g)
    h.add_(6 * shift.to(x.dtype).view(-1, 1, 1, 1))
    h.sub_((h / 6).round_(), alpha=6)
    offset = torch.arange(1, 4, device=x.device, dtype=x.dtype) % 3 - 1  # 0, 1, -1
    y = (h + offset.view(3, 1, 1)).abs_()  # |h|, |h + 1|, |h - 1|
    y[:, :1].sub_(1)
    y[:, 1:].neg_().add_(2)
    return y.clamp_(0, 1).mul_(chroma).add_(low)


def luma(x):
    """[B, 3, H, W] -> [B, 1, H, W], with torchvision's weights."""
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(x):
    """[B, 3, H, W] -> the same shape, three equal channels."""
    return luma(x).expand_as(x)


def gaussian_blur(x, sigma, kernel_size: int):
    """torchvision's gaussian_blur (odd kernel_size, reflected borders), sigma [B] of each image.

    A sigma of 0 changes nothing. Two products with banded matrices, whatever the kernel's size."""
    taps = torch.arange(kernel_size, device=x.device) - kernel_size // 2
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [B, k]

    def band(n):  # [B, 1, n, n]; reflection folds the taps beyond the border back into the image
        pixel = torch.arange(n, device=x.device)
        source = n - 1 - (n - 1 - (pixel[:, None] + taps).abs()).abs()  # [n, k]
        fold = (source[:, :, None] == pixel).to(x.dtype)  # [n, k, n]
        return torch.einsum("bk,okj->boj", kernel.to(x.dtype), fold)[:, None]

    return band(x.shape[2]) @ (x @ band(x.shape[3]).mT)


def solarize(x, threshold=128 / 255):
    """Invert every value at or above the threshold; x in [0, 1]."""
    return torch.where(x >= threshold, 1 - x, x)


# --------------------------------------------------------------------------------------------------
# 4  Models


def resnet(arch="resnet18", stem="small") -> nn.Module:
    """torchvision's ResNet without `fc`: [B, 3, H, W] -> [B, F]; F is `.num_features`, 512 or 2048.
    Its state_dict has torchvision's keys.

    stem "small", for images up to 64 pixels: a 3x3 convolution of stride 1 for the 7x7 of stride 2,
    and no max-pool (SimCLR, appendix B.9). "imagenet": torchvision's."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch!r} is none of {', '.join(ARCHITECTURES)}")
    if stem not in ("small", "imagenet"):
        raise ValueError(f"stem {stem!r} is neither 'small' nor 'imagenet'")
    model = getattr(torchvision.models, arch)(weights=None)
    model.num_features, model.fc = model.fc.in_features, nn.Identity()
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def mlp(*widths, batch_norm=True, bias=True, last_bias=True) -> nn.Sequential:
    """Linear layers, widths[0] to widths[-1]; between them batch norm, if wanted, and ReLU."""
    layers = []
    for d_in, d_out in zip(widths[:-2], widths[1:-1], strict=True):
        norm = [nn.BatchNorm1d(d_out)] if batch_norm else []
        layers += [nn.Linear(d_in, d_out, bias=bias), *norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=last_bias))


def forward_views(network, views, concat):
    """A list of the network's outputs for V views. concat: in one batch, so that batch norm sees
    all views at once, and a GPU has fewer kernels to launch; else each view by itself."""
    if not concat:
        return [network(x) for x in views]
    return list(network(torch.cat(list(views))).chunk(len(views)))


# --------------------------------------------------------------------------------------------------
# Here a learner may stop. Of a training step only its batches, seeds, precision and log follow.
# 5  What a representation is worth: features, nearest neighbours, collapse


@torch.no_grad()
def encode(backbone, split, args, data, batch_size=512) -> Tensor:
    """Features float32 [N, F] of a split, the backbone in eval mode, images not augmented. Each of
    several processes computes a part, and gets all."""
    training, features, part = backbone.training, [], split.part()
    backbone.eval()
    for images, _ in batches_of(part, torch.arange(len(part)), batch_size, args):
        x = evaluation_view(images, args.image_size, data.mean, data.std)
        with autocast(args):
            features.append(backbone(x).float())
    backbone.train(training)
    return gather([torch.cat(features)])[0][: len(split)]


@torch.no_grad()
def projections(model, views, args) -> dict:
    """{"z": projections [V B, D] of the views in train mode, as a training step has them}, or {}
    where the method has no `projector`. The model's batch norm stays as it is."""
    method = getattr(model, "method", model)  # without the term that --increase-mi adds
    if getattr(method, "projector", None) is None:
        return {}
    backbone, projector = copy.deepcopy((method.backbone, method.projector))
    concat = getattr(method, "concat_views", False)
    with autocast(args):
        h = forward_views(backbone, views, concat)
        z = forward_views(projector, h, concat)
    return {"z": gather([torch.cat(z).float()])[0]}


def verdict(entry, baselines):
    """In plain words what an epoch's figures say is wrong, or nothing."""
    if entry.get("z_std", entry["h_std"]) < 0.3:
        return "collapsed to a point: hardly any difference between images"
    if entry["epoch"] <= 2:  # when a healthy run may be there, too
        return ""
    # Where h has few, too, as BYOL's, z may follow it; so may z the classes, with labels.
    few = min(4.5, entry["h_rank"] / 10)
    if entry.get("z_rank", few) < few and not entry.get("labels_used"):
        return "collapsed to a few directions"
    if entry.get("knn_top1", 1) <= next(iter(baselines.values()), 0):
        return "not learning beyond its start"
    return ""


def pixels(args):
    """In the place of an encoder, the baseline without a network: what the encoder would see, of at
    most 32 pixels a side."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(32, args.image_size)), nn.Flatten())


def evaluation_view(images, size, mean, std):
    """uint8 [B, 3, H, W] -> normalised float [B, 3, size, size], nothing random."""
    x = images.float() / 255
    if x.shape[2:] != (size, size):
        box = [torch.full((len(x),), v, device=x.device) for v in centre_box(*x.shape[2:], size)]
        x = resized_crop(x, *box, size).clamp(0, 1)
    return Augment([], size, mean, std, x.device).normalize(x)


def centre_box(height, width, size):
    """top, left, height, width of the square that evaluation sees: 7/8 of the shorter side where
    images are larger than `size` (resize to 256, crop 224), else all of it (S003 B.1.2 enlarges and
    crops these, too: linear_eval.py --recipe s003)."""
    side = min(height, width)
    side = max(size, round(side * 7 / 8)) if side > size else side
    return (height - side) // 2, (width - side) // 2, side, side


def knn_monitor(backbone, data, args):
    """Top-1 accuracy on the test split of the nearest neighbours in the training split, or in
    --knn-bank images of it (50 000 where they have to be decoded)."""
    bank = data.train.spread(args.knn_bank or (0 if data.train.in_memory else 50_000))
    bank, test = (Split(encode(backbone, x, args, data), x.labels) for x in (bank, data.test))
    return top_accuracies(knn_votes(bank, test, len(data.classes), args)[0], test.labels)[0]


def knn_votes(bank, test, num_classes, args):
    """knn_scores and their k: --knn-k, but at most half of the bank's smallest class, beyond which
    others outvote it. bank, test: Splits of features."""
    labels = bank.labels.to(bank.images.device)
    counts = labels.bincount()
    k = max(1, min(args.knn_k, int(counts[counts > 0].min()) // 2))
    return knn_scores(bank.images, labels, test.images, num_classes, k, args.knn_temperature), k


def knn_scores(bank, bank_labels, queries, num_classes, k=200, temperature=0.1) -> Tensor:
    """Scores [N, num_classes] of the weighted nearest-neighbour classifier (Wu et al. 2018,
    arXiv:1805.01978): of the training features `bank` [M, F] the k nearest to a query [N, F] by
    cosine vote for their classes, each with the weight exp(cosine / temperature)."""
    bank, k, scores = F.normalize(bank), min(k, len(bank)), []
    for query in F.normalize(queries).split(512):
        similarity, nearest = (query @ bank.T).topk(k)
        votes = torch.zeros(len(query), num_classes, device=bank.device)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest weighs 1
        scores.append(votes.scatter_add_(1, bank_labels[nearest], weight))
    return torch.cat(scores)


def top_accuracies(scores, labels):
    """The shares of rows whose label has the best score, and one of the five best."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels.to(scores.device)[:, None]
    return int(hits[:, 0].sum()) / len(hits), int(hits.any(1).sum()) / len(hits)


def collapse_figures(features):
    """std: deviation over images of the L2-normalised features, mean over features, times sqrt(F):
    1 where they fill the sphere evenly, 0 at collapse (SimSiam, section 4.1). rank: exp of the
    entropy of the centred features' normalised singular values (Roy & Vetterli 2007): how many
    directions are in use."""
    features = features.float().cpu()  # where there is float64, which Apple's GPUs lack
    unit, centred = F.normalize(features), (features - features.mean(0)).double()
    centred = centred.T if len(centred) < centred.shape[1] else centred  # the smaller of two grams
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    share = (singular / singular.sum().clamp(min=1e-12)).clamp(min=1e-12)
    rank = torch.exp(-(share * share.log()).sum())
    std = unit.std(0).mean() * unit.shape[1] ** 0.5
    return {"std": float(std), "rank": float(rank)}


# --------------------------------------------------------------------------------------------------
# 6  A term for any method: more, or less, of the image in the representation

MI_WEIGHTS = {"rc": 1.0, "lbe": 1.0, "ip": 5e-4, "mib": 5e-4}  # InfoCL with SimCLR; its BYOL: .1
NOISE = 0.1  # S002: sigma, the deviation of the noise on the representation


def lower_bound_estimate(mu: Tensor, z: Tensor, rho: float = 0.05) -> Tensor:
    """I_NCE~(z, v), up to constants a lower bound of the information in z about its image (S002):
    -mean_k log sum_l exp(-rho |z_l - mu_k|^2), to be maximised.

    mu: [N, F] representations f(v); z: [N, F] the same with noise, mu + sigma * noise; rho: scale.
    Returns a scalar in nats, in float32 at least, from -log N (all in one place) to about 0 (all
    far apart). Sums over z for each mu, as S002's text; its code (Haoqing-Wang/InfoCL
    mi_estimators.py) over mu for each z. The values hardly differ."""
    with torch.autocast(mu.device.type, enabled=False):
        dtype = torch.promote_types(mu.dtype, torch.float32)
        # Differences, not |a|^2 + |b|^2 - 2ab, which cancels where points are close.
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(mu.to(dtype), z.to(dtype), compute_mode=exact)  # [N, N], k by l
        return -(-rho * distance.square()).logsumexp(1).mean()


class MutualInformation(nn.Module):
    """A method plus weight * a term on its representations h, one for each view (S002).

    rc   add the error of reconstructing each view from its h: mean over pixels, summed over views
    lbe  subtract lower_bound_estimate over all views together, with noise on h
    ip   add the squared distance of the two views' h: drops what the views do not share
    mib  the same with noise on h, which the heads get, too
    Here: as InfoCL's code. One decoder and a mean over pixels (S002: a decoder for each view, and a
    sum, 3072 times this term on CIFAR); ip and mib are means over features, too; lbe is a weighted
    sum over three depths, rho 1/20, for images of at most 64 pixels, and of larger ones the last
    depth alone, rho 1/80. The noise comes in train mode alone; without a term (S002 4.0.2) it is
    mib with the weight 0."""

    def __init__(self, method, kind, weight, image_size):
        super().__init__()
        self.method, self.kind, self.weight = method, kind, weight
        if kind == "rc":
            self.decoder = Decoder(method.backbone.num_features, image_size)
        self.depths, self.rho, self.kept = {"": 1.0}, 1 / 80, {}  # "": the backbone's output
        if image_size <= 64:
            self.rho = 1 / 20
            self.depths |= {"layer2": 0.25, "layer3": 0.5} if kind == "lbe" else {}
        for name in self.depths:
            part = method.backbone.get_submodule(name)
            part.register_forward_hook(lambda _, __, h, name=name: self.keep(name, h))

    @property
    def backbone(self):
        return self.method.backbone

    def forward(self, views, y=None):
        self.kept, self.batch = {}, len(views[0])
        loss, terms = self.method(views, y)
        kept = {name: map(torch.cat, zip(*some, strict=True)) for name, some in self.kept.items()}
        kept = {name: tuple(pair) for name, pair in kept.items()}
        self.kept = {}
        mu, _ = kept[""]  # [VB, F], view 1 first
        if self.kind == "rc":
            pairs = zip(mu.chunk(len(views)), views, strict=True)
            term = sum((full_precision(self.decoder(h)) - x).square().mean() for h, x in pairs)
        elif self.kind == "lbe":
            estimates = {k: lower_bound_estimate(*gather(p), self.rho) for k, p in kept.items()}
            term = -sum(weight * estimates[name] for name, weight in self.depths.items())
        else:
            pairs = list(itertools.combinations(mu.chunk(len(views)), 2))
            term = sum((h1 - h2).square().mean() for h1, h2 in pairs) / len(pairs)
        return loss + self.weight * term, {**terms, f"loss_{self.kind}": term.detach()}

    def keep(self, name, h):
        """Note h and h with the noise, which is what the method's heads get."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        mu = full_precision(h)
        mu = mu.mean((2, 3)) if mu.ndim == 4 else mu
        z = mu
        if self.kind in ("lbe", "mib"):  # drawn for the whole batch, also where others have a part
            whole = len(mu) // self.batch, self.batch * world_size(), mu.shape[1]
            z = mu + NOISE * mine(torch.randn(whole, device=mu.device), 1).flatten(0, 1)
        self.kept.setdefault(name, []).append((mu, z))
        return None if name else z.to(h.dtype)

    def after_step(self, progress):
        if hasattr(self.method, "after_step"):
            self.method.after_step(progress)


class Decoder(nn.Module):
    """Representation [B, F] -> view [B, 3, S, S]: from a small square, a transposed convolution for
    each doubling of the side (InfoCL recons.py: 4x4 to 32x32 through 256, 128 and 64 channels)."""

    def __init__(self, features, size):
        super().__init__()
        doublings = max(0, int(math.log2(size / 4)))
        self.size, side = size, math.ceil(size / 2**doublings)
        layers = [nn.Linear(features, 64 * side**2, bias=False), nn.BatchNorm1d(64 * side**2)]
        layers += [nn.ReLU(inplace=True), nn.Unflatten(1, (64, side, side))]
        widths = [64, *(min(256, 64 * 2**i) for i in reversed(range(doublings)))]
        how = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": False}
        for width, wider in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(width, wider, **how), nn.BatchNorm2d(wider)]
            layers += [nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, h):
        return self.layers(h)[..., : self.size, : self.size]


# --------------------------------------------------------------------------------------------------
# From here on: what makes a program of it.
# 7  A run: its folder, log, saving, going on

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("Python 3.10 or newer is needed; this is " + sys.version.split()[0])

BEGINNING = {".lock", "config.json", "views.png"}  # what comes before a checkpoint
MACHINE = "resume out device workers compile scaled_lr".split()  # each start's own
FREE = MACHINE + "init dataset data_dir small_maps save_every".split()
FREE += "knn_every knn_bank knn_k knn_temperature".split()


class Run:
    """What goes on around the steps of a training. Until `finish`, a signal is noted, and ends the
    run after its step, saved. In args all but FREE has to stay when a run goes on."""

    def __init__(self, method, model, optimizer, scaler, data, steps, args):
        self.method, self.model, self.optimizer, self.scaler = method, model, optimizer, scaler
        self.data, self.steps, self.args, self.folder = data, steps, args, Path(args.out)
        self.epoch = self.step = 0  # what is done
        self.sums = {}  # of loss and terms over the steps of the epoch, on the device
        self.log, self.baselines, self.saved_at = [], {}, time.time()
        self.with_knn = args.knn_every > 0 and data.test is not None and len(data.classes) > 1
        self.identity = on_first(lambda: recognition(method, data, args))
        self.progress, self.stop = Progress(args.epochs, steps, args.batch_size), StopSignals()

    def begin(self, augment):
        """Make the folder, or go on from what was saved in it. Returns the steps that are done."""
        self.augment = copy.copy(augment)  # which stays uncompiled
        there = on_first(lambda: {path.name for path in self.folder.glob("*")})
        fresh = {name for name in there if not name.endswith(".tmp")} <= BEGINNING
        free = fresh or self.args.resume
        check(free, f"{self.folder} holds a run or other files: add --resume, or another --out")
        on_first(self.lock)
        self.announce()
        if fresh:
            if self.args.init:
                load_initial(self.model, self.args)
            if self.args.resume:
                print(f"{self.folder} has no checkpoint yet: from the beginning")
            on_first(lambda: write_json(describe(self.args), self.folder / "config.json"))
            on_first(lambda: save_views(self.data, augment, self.args, self.folder / "views.png"))
            start = "encoder of --init" if self.args.init else "untrained encoder"
            networks = {start: self.model.backbone, "pixels": pixels(self.args)}
            for name, network in networks.items() if self.with_knn else ():
                self.baselines[name] = knn_monitor(network, self.data, self.args)
        else:
            self.restore()
            print(f"resumed from step {self.step} (epoch {self.epoch})")
            on_first(self.write_log)  # without what came after the checkpoint
            on_first(self.save_encoder)  # a kill may have left an older one
        self.progress.begin(self.epoch + 1, self.step - self.epoch * self.steps)
        return self.step

    def lock(self):
        """Make the folder and keep other processes out of it, as long as this one lives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locked = open(self.folder / ".lock", "a")
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # of others: a file system without locks
                wrong = f"{self.folder}: another process trains in it; give another --out"
                check(error.errno not in (errno.EAGAIN, errno.EACCES), wrong)

    def announce(self):
        """What will happen, in words. config.json has every setting."""
        args = self.args
        weights = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        steps = f"{args.epochs} epochs of {self.steps} steps of {args.batch_size} images"
        decay = f"weight decay {args.weight_decay:g}, {args.warmup_epochs:g} epochs of warm-up"
        device = f"{describe(args)['device']}, {args.precision}" + ", compiled" * args.compile
        print(*self.data.found, sep="\n")
        print(f"{self.method}: {args.arch}, {args.stem} stem, {weights:.1f} M parameters")
        print(f"{steps}, {args.views} views of each, {args.image_size} pixels a side")
        print(f"{args.optimizer}, lr up to {args.scaled_lr:.4g}, {decay}")
        print(f"{device}, processes: {world_size()}")

    def after_step(self, step, loss, terms):
        """Add up loss and terms. Where a signal came, save and exit."""
        self.step, zero = step, torch.zeros((), device=self.args.device)
        for name, value in {"loss": loss, **terms}.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, zero) + value  # read later, not to wait for it
        stopping = agreed(self.stop.number)
        if stopping:  # before anything is printed: the terminal may be gone
            self.save()
            self.leave(stopping)
        if self.progress.update(step - self.epoch * self.steps, self.sums["loss"]):
            self.means(self.sums)

    def after_epoch(self, epoch):
        """The epoch's line: mean loss and terms, collapse figures, perhaps kNN. Saved at the first
        and the last epoch, for --save-every, and where the last time is a minute ago."""
        args = self.args
        entry = {"epoch": epoch, "step": self.step, **self.means(mean_terms(self.sums))}
        entry["lr"] = self.optimizer.param_groups[0]["lr"]
        entry["images_per_second"] = round(self.progress.rate(self.steps), 1)
        entry |= self.collapse()
        if self.with_knn and (epoch == args.epochs or epoch % args.knn_every == 0):
            entry["knn_top1"] = knn_monitor(self.model.backbone, self.data, args)
        self.log.append(entry)
        self.epoch, self.sums = epoch, {}

        stopping = agreed(self.stop.number)
        due = epoch in (1, args.epochs) or self.keeps_encoder() or time.time() - self.saved_at > 60
        if due or stopping:
            self.save()
        on_first(self.write_log)
        figures = [f"{name} {value:.4g}" for name, value in list(entry.items())[2:]]
        self.progress.show("  ".join([*figures, verdict(entry, self.baselines)]).rstrip())
        if stopping and epoch < args.epochs:  # a whole run ends as one
            self.leave(stopping)
        self.progress.begin(epoch + 1)

    def collapse(self):
        """The collapse figures of h in eval mode, and of z in train mode, as a step has it."""
        data, args = self.data, self.args
        features = {"h": encode(self.model.backbone, data.train.spread(1024), args, data)}
        some = data.train.spread(min(512, 8 * args.batch_size)).part()
        views = random_views(some, self.augment, args)
        features |= projections(self.model, views, args)
        for name, value in features.items():
            wrong = f"step {self.step}: {name} is not finite; try a lower --lr and another --out"
            check(value.isfinite().all(), wrong)
        pairs = {name: collapse_figures(value).items() for name, value in features.items()}
        return {f"{name}_{key}": v for name, figures in pairs.items() for key, v in figures}

    def finish(self):
        """The result, where it is, and the command that evaluates the encoder."""
        args, data, last = self.args, self.data, self.log[-1].get("knn_top1")
        self.stop.restore()
        if last is not None:
            beside = self.baselines | {"chance": 1 / len(data.classes)}
            print(f"kNN top-1 {last:.1%} ({', '.join(f'{k} {v:.1%}' for k, v in beside.items())})")
        print(f"{self.folder}: encoder.pt, checkpoint.pt, log.jsonl, config.json, views.png")
        print(shlex.join(["python", "linear_eval.py", "--curves", str(self.folder)]))
        if len(data.classes) < 2:
            return
        words = ["--checkpoint", str(self.folder / "encoder.pt"), "--dataset", args.dataset]
        words += ["--data-dir", args.data_dir] if args.data_dir != "data" else []
        # On shapes whole images give the best figure; elsewhere crops would take a CPU hours.
        words += ["--cached"] if args.device == "cpu" or args.dataset == "shapes" else []
        words += ["--validation-fraction", "0.1"] if data.test is None else []
        print(shlex.join(["python", "linear_eval.py", *words]))

    def restore(self):
        """Go on from checkpoint.pt, or from the one before it where that is damaged or missing."""
        path, previous = self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"
        try:
            self.load(path)
        except InputError as error:
            with contextlib.suppress(InputError):
                self.load(previous)
                print(f"{error}; going on from {previous}", file=sys.stderr)
                return on_first(lambda: os.replace(previous, path))  # never keep a damaged one
            raise

    def load(self, path):
        """What `save` wrote; InputError where it is of another run, or of none."""
        saved = on_first(lambda: load_whole(path))
        with readable(path, "does not fit"):
            for what, then in saved["identity"].items():
                now = self.identity.get(what)
                wrong = f"{path} was made with {what} {str(then)[:200]}, not {str(now)[:200]}"
                more = ": --resume needs the same"
                if what == "--epochs":
                    more = ", at whose end the learning rate is 0: for more, a new run with --init"
                check(now == then, wrong + more)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.epoch, self.step = int(saved["epoch"]), int(saved["step"])
            self.log, self.baselines = list(saved["log"]), dict(saved["baselines"])
            sums = saved["sums"].items()
            self.sums = {name: torch.tensor(v, device=self.args.device) for name, v in sums}

    def save(self):
        """checkpoint.pt has what is needed to go on, encoder.pt what is needed to use it. What is
        not finite is not saved."""
        sums = {name: float(total) for name, total in mean_terms(self.sums).items()}
        self.means(sums)
        weights = self.model.state_dict()
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        saved = [value for value in (*weights.values(), *moments) if value is not None]
        finite = all(value.isfinite().all() for value in saved)
        check(finite, f"step {self.step}: weights are not finite; try a lower --lr, another --out")
        if rank():
            return
        state = {"model": weights, "optimizer": self.optimizer.state_dict(), "sums": sums}
        state |= {"scaler": self.scaler.state_dict(), "log": self.log, "baselines": self.baselines}
        state["identity"] = self.identity
        previous = self.folder / "checkpoint.previous.pt"
        with atomic_write(self.folder / "checkpoint.pt", previous) as file:
            torch.save(state | self.about(), file)
        self.save_encoder()
        self.saved_at = time.time()

    def save_encoder(self):
        """encoder.pt, and at the end of an epoch that --save-every names encoder_EPOCH.pt, too."""
        weights = self.model.backbone.state_dict()
        weights = {name: value.cpu().contiguous() for name, value in weights.items()}
        for name in ["encoder.pt"] + [f"encoder_{self.epoch:05}.pt"] * self.keeps_encoder():
            with atomic_write(self.folder / name) as file:
                torch.save(self.about() | {"state_dict": weights}, file)

    def keeps_encoder(self):
        every = self.args.save_every
        return every > 0 and self.epoch % every == 0 and self.step == self.epoch * self.steps

    def about(self):
        args, data = self.args, self.data
        about = {"method": self.method, "epoch": self.epoch, "step": self.step}
        about |= {"arch": args.arch, "stem": args.stem, "image_size": args.image_size}
        about |= {"dataset": data.name, "mean": list(data.mean), "std": list(data.std)}
        return about | {"config": vars(args)}

    def write_log(self):
        with atomic_write(self.folder / "log.jsonl") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in self.log).encode())

    def means(self, sums):
        """Means over the steps of the epoch; a loss or term that is not finite ends the run."""
        steps = max(1, self.step - self.epoch * self.steps)
        means = {name: float(total) / steps for name, total in sums.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        what = "a term" if math.isfinite(means.get("loss", 0.0)) else "the loss"
        wrong = f"step {self.step}: {what} is not finite; means of this epoch: {means}, learning "
        wrong += f"rate {rate:.3g}; try a lower --lr and another --out"
        check(all(map(math.isfinite, means.values())), wrong)
        return means

    def leave(self, number):
        """After a signal and a save: how to go on, and the exit status of that signal."""
        again = describe(self.args)["command"].replace(" --resume", "") + " --resume"
        with contextlib.suppress(OSError):  # where the terminal is gone
            print(f"stopped; to go on: {again}", flush=True)
        agreed(0)  # nobody leaves while the first process saves: torchrun would end it
        sys.exit(128 + number)


class Progress:
    """Where an epoch is: a line that changes on a terminal, a line a minute in a file. Reading a
    loss waits for the device: here it is done twice a second at most."""

    def __init__(self, epochs, steps, batch_size):
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.terminal = sys.stdout.isatty()

    def begin(self, epoch, done=0):
        self.epoch, self.first = epoch, done
        self.start = self.last = time.time()

    def rate(self, done):
        """Images per second in this epoch, in the first with what compiling takes."""
        return (done - self.first) * self.batch_size / max(time.time() - self.start, 1e-9)

    def update(self, done, loss_sum):
        """Show how far the epoch is, if it is time. Returns whether it was."""
        if time.time() - self.last < (0.5 if self.terminal else 60):
            return False
        self.last, rate = time.time(), self.rate(done)
        todo = (self.epochs - self.epoch + 1) * self.steps - done  # in the whole run
        left = f"{rate:.0f} img/s, {todo * self.batch_size / rate / 60:.1f} min left"
        self.show(f"step {done}/{self.steps}  loss {float(loss_sum) / done:.4f}, {left}", end="")
        return True

    def show(self, text, end="\n"):
        before, end = ("\r", "\033[K" + end) if self.terminal else ("", "\n")
        print(f"{before}epoch {self.epoch}/{self.epochs}  {text}", end=end, flush=True)


def recognition(method, data, args):
    """What has to be the same where a run goes on: method, settings, and the data, wherever it
    lies: number, classes, some of the images."""
    some = data.pretrain.spread(64).images
    parts = [x.read_bytes() if isinstance(x, Path) else x.cpu().numpy().tobytes() for x in some]
    content = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    names = sorted(vars(args).keys() - set(FREE))
    same = {"method": method} | {f"--{n.replace('_', '-')}": getattr(args, n) for n in names}
    return same | {"images": len(data.pretrain), "classes": data.classes, "content": content}


def random_views(split, augment, args):
    """Views of each image of a split, the same at every call: V of [N, 3, S, S]."""
    index, first = torch.arange(len(split)), rank() * len(split)
    images, _ = next(batches_of(split, index, len(split), args, augment.recipes, first))
    return augment(images, generator(args.seed, "views", 0, args.device))


def save_views(data, augment, args, path):
    """A picture of what the network sees: in each row an image, then its views."""
    split, size = data.pretrain.spread(8), augment.size
    views = [view * augment.std + augment.mean for view in random_views(split, augment, args)]
    whole = split.images if not split.in_memory else map(TF.to_pil_image, split.images.cpu())
    whole = [read_image(image) if isinstance(image, Path) else image for image in whole]
    whole = [TF.to_tensor(ImageOps.pad(image, (size, size), color="white")) for image in whole]
    cells = torch.stack([torch.stack(whole).to(args.device), *views], 1).flatten(0, 1)
    cells = F.interpolate(cells, scale_factor=max(1, 96 // size))
    grid = torchvision.utils.make_grid(cells, nrow=1 + len(views), padding=4, pad_value=1)
    picture = ImageOps.expand(TF.to_pil_image(grid.clamp(0, 1).cpu()), (0, 14, 0, 0), "white")
    for column in range(1 + len(views)):
        place = 4 + column * (cells.shape[3] + 4), 2
        heading = f"view {column}" if column else "image"
        ImageDraw.Draw(picture).text(place, heading, fill="black")
    with atomic_write(path) as file:
        picture.save(file, "png")


# --------------------------------------------------------------------------------------------------
# 8  Data

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = "cifar10 cifar100 stl10 fashion_mnist imagenette tiny_imagenet".split()
DATASETS += "imagenet100 imagenet imagenet64 shapes".split()
TINY, TINY_URL = "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ANNOTATIONS = "val_annotations.txt"
TESTS = ("test", "val", "valid", "validation")  # folders of test images
EIGHT_BITS = "1 L P RGB RGBA CMYK YCbCr LAB HSV LA PA La RGBa RGBX".split()  # Pillow's modes
MEMORY_LIMIT = 4 * 2**30  # bytes of pixels up to which a folder of equal-sized images is held


@dataclasses.dataclass
class Split:
    """images: uint8 [N, 3, H, W], or N paths that are decoded when needed, or features [N, F] of
    them. labels: int64 [N], -1 where there is none."""

    images: Tensor | list
    labels: Tensor

    def __len__(self):
        return len(self.images)

    def spread(self, count):
        """`count` images evenly spread over the split, which may be sorted by class; 0: all."""
        if not 0 < count < len(self):
            return self
        return self.take(torch.arange(count) * len(self) // count)

    def take(self, index):
        at = index.tolist()
        images = self.images[index] if self.in_memory else [self.images[i] for i in at]
        return Split(images, self.labels[index])

    def part(self):
        """This process's part: one after the other, of equal size, the last image repeated."""
        size = math.ceil(len(self) / world_size()) * world_size()
        index = torch.arange(size).clamp(max=len(self) - 1)
        return self.take(mine(index)) if world_size() > 1 else self

    @property
    def in_memory(self):
        return isinstance(self.images, Tensor)

    def to(self, device):  # what workers decode stays with them, labels and all
        return Split(self.images.to(device), self.labels.to(device)) if self.in_memory else self


@dataclasses.dataclass
class Dataset:
    """pretrain: what methods see, train and any unlabeled images. train, test: with labels, but
    for images without classes, where `classes` is empty."""

    name: str
    classes: list
    train: Split
    test: Split | None
    pretrain: Split
    size: int  # shorter side of the images, or 224, where they stay on disk
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    found: list = dataclasses.field(default_factory=list)  # in words, lines

    def to(self, device):
        test, pretrain = self.test and self.test.to(device), self.pretrain.to(device)
        n = len(self.train)
        train = Split(pretrain.images[:n], pretrain.labels[:n])  # the same memory
        return dataclasses.replace(self, train=train, test=test, pretrain=pretrain)


def load_dataset(name: str, data_dir="data") -> Dataset:
    """A dataset by its name, a folder of images, or a packed .pt file."""
    path, names = Path(name), ", ".join(DATASETS)
    if name == "shapes":
        packed = {"train": shapes(4000, "train"), "test": shapes(1000, "test"), "classes": SHAPES}
        return from_packed(name, packed)
    if name in DATASETS:
        return load_known(name, Path(data_dir))
    if path.suffix == ".pt":
        return from_packed(path.stem, load_file(path), path)
    check(path.is_dir(), f"dataset {name!r} is none of {names}, nor a folder, nor a .pt file")
    return load_folder(path.name, path)


def load_known(name, root) -> Dataset:
    """A dataset by its name: packed, in folders, or packed now from what is published."""
    path, folder = root / f"{name}.pt", root / name
    if name == "tiny_imagenet" and (root / TINY).is_dir():
        folder = root / TINY
    if path.is_file():
        return from_packed(name, load_file(path), path)
    if (folder / "train").is_dir():
        return load_folder(name, folder)
    npz = name == "imagenet64" and folder.is_dir()
    packed = pack_imagenet64(folder) if npz else download(name, root)
    data = from_packed(name, packed, path)  # what it refuses is not stored
    root.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(packed, file)
    return data


def from_packed(name, packed, path=None) -> Dataset:
    """A Dataset from {"train": {"images": uint8 [N, C, H, W], "labels": int64 [N]}, "test": ...,
    "classes": [names]}, perhaps with "unlabeled"; InputError if it is anything else."""
    where = path or name
    right = isinstance(packed, dict) and isinstance(packed.get("train"), dict)
    check(right, f"{where}: not a packed dataset: expected a dict with train and classes")
    classes = packed.get("classes")
    check(isinstance(classes, list), f"{where}: classes should be a list of names")
    keys = [key for key in ("train", "test", "unlabeled") if packed.get(key) is not None]
    splits = {key: packed_split(f"{where}: {key}", packed[key], len(classes)) for key in keys}
    sizes = sorted({tuple(split.images.shape[2:]) for split in splits.values()})
    check(len(sizes) == 1, f"{where}: the splits hold images of different sizes: {sizes}")
    train, more = splits["train"], splits.get("unlabeled")
    pretrain = train
    if more:
        images = torch.cat([train.images, more.images])
        pretrain = Split(images, torch.cat([train.labels, more.labels]))
    height, width = sizes[0]
    statistics = pixel_statistics(train.images)
    data = Dataset(name, classes, train, splits.get("test"), pretrain, min(sizes[0]), *statistics)
    data.found = [f"{in_words(data)}, {width}x{height} pixels, in memory"]
    return data


def packed_split(what, split, num_classes) -> Split:
    split = split if isinstance(split, dict) else {}
    images, labels = split.get("images"), split.get("labels")
    right = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
    right = right and images.shape[1] in (1, 3) and images.numel() > 0
    check(right, f"{what} images should be a uint8 tensor [N, 1 or 3, H, W], N > 0")
    images = images.expand(-1, 3, -1, -1).contiguous()
    if what.endswith("unlabeled") or num_classes == 0:
        return Split(images, torch.full((len(images),), -1))
    right = isinstance(labels, Tensor) and labels.dtype == torch.int64
    right = right and labels.shape == images.shape[:1]
    check(right, f"{what} labels should be an int64 tensor [N], N = {len(images)}")
    low, high = int(labels.min()), int(labels.max())
    wrong = f"{what} labels run from {low} to {high}, but there are {num_classes} classes"
    check(0 <= low and high < num_classes, wrong)
    return Split(images, labels)


def in_words(data):
    """What was found, for the lines at the start of a run."""
    classes = f"{len(data.classes)} classes" if data.classes else "no labels"
    test = f"{len(data.test)} test images" if data.test is not None else "no test images"
    return f"{data.name}: {len(data.pretrain)} training images, {classes}, {test}"


def pixel_statistics(images: Tensor):
    """Mean and deviation of each channel of uint8 [N, 3, H, W] over 255, from exact counts."""
    counts = [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    share = torch.stack(counts).double() / counts[0].sum()  # [3, 256]
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())  # also of one value


def download(name, root) -> dict:
    """A named dataset through torchvision's own download, as a packed dict."""
    sets, val, packed = torchvision.datasets, {"train": "train", "test": "val"}, {}
    fetch = {
        "cifar10": lambda split: sets.CIFAR10(root, split == "train", download=True),
        "cifar100": lambda split: sets.CIFAR100(root, split == "train", download=True),
        "fashion_mnist": lambda split: sets.FashionMNIST(root, split == "train", download=True),
        "stl10": lambda split: sets.STL10(root, split, download=True),
        "imagenette": lambda split: sets.Imagenette(root, val[split], "160px", download=True),
    }
    how = f"unpack it as {root}/{name}/train/CLASS/* or put the packed file at {root}/{name}.pt"
    if name == "tiny_imagenet":
        how = f"unpack {TINY_URL} as {root}/{TINY}"
    elif name == "imagenet64":
        how = f"put its train_data_batch_1.npz, ... and val_data.npz in {root}/{name}"
    check(name in fetch, f"{name}: torchvision cannot download it; {how}")
    for split in ("train", "test", "unlabeled") if name == "stl10" else ("train", "test"):
        try:
            source = fetch[name](split)
        except Exception as error:  # URLError, RuntimeError, OSError: whatever the network does
            reason = " ".join(str(error).split())
            raise InputError(f"{name}: the download failed ({reason}); without it, {how}") from None
        images, labels = [], []
        for image, label in source:
            pixels = TF.pil_to_tensor(image.convert("RGB"))
            images.append(TF.center_crop(pixels, 160) if name == "imagenette" else pixels)
            labels.append(int(label))
        packed[split] = {"images": torch.stack(images), "labels": torch.tensor(labels)}
    names = [c if isinstance(c, str) else c[0] for c in source.classes]  # Imagenette has synonyms
    return {**packed, "classes": names}


def pack_imagenet64(folder) -> dict:
    """ImageNet at 64 x 64 pixels from its own files, of which some may do for training."""
    train = sorted(folder.glob("train_data_batch_*.npz"), key=lambda file: (len(file.name), file))
    check(train, f"{folder}: no train_data_batch_1.npz, train_data_batch_2.npz, ...")
    packed = {"classes": [str(i + 1) for i in range(1000)]}
    for split, files in {"train": train, "test": [folder / "val_data.npz"]}.items():
        images, labels = [], []
        for file in files:
            with readable(file, "not a readable file of ImageNet64"):
                arrays = np.load(file, allow_pickle=False)
                images.append(torch.from_numpy(arrays["data"]).view(-1, 3, 64, 64))
                labels.append(torch.from_numpy(arrays["labels"].astype(np.int64)) - 1)
        packed[split] = {"images": torch.cat(images), "labels": torch.cat(labels)}
    return packed


def load_folder(name, root: Path) -> Dataset:
    """train/CLASS/** with test/, val/, valid/ or validation/ of the same classes; CLASS/** alone;
    or images without classes. Images of one size are held in memory where they fit; all others are
    decoded by workers, anew in every epoch."""
    left_out = collections.Counter()
    classes, splits = splits_of(root, left_out)
    side, why = one_size(root, [file for split in splits.values() for file in split.images])
    if side:
        packed = {key: hold_in_memory(split, *side) for key, split in splits.items()}
        data = from_packed(name, packed | {"classes": classes}, root)
    else:
        data = Dataset(name, classes, splits["train"], splits.get("test"), splits["train"], 224)
        why += ", and so decoded from disk; --image-size and --stem say how large"
        data.found = [in_words(data), why]
    if left_out:
        left = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5))
        data.found.append(f"left out: {left}")
    return data


def splits_of(root, left_out):
    """The classes, and {"train" and, where there is one, "test": Split of files}."""
    train = root / "train" if (root / "train").is_dir() else root
    classes = folders_in(train)
    alone = train != root or not set(TESTS) & set(classes)
    check(alone, f"{root}: no folder train/ beside {', '.join(classes)}")
    splits = {"train": images_in(train, classes, left_out)}
    for test in [root / name for name in TESTS] if train != root else []:
        here = folders_in(test)
        if (test / ANNOTATIONS).is_file():
            return classes, splits | {"test": annotated_images(test, classes)}
        if set(here) & set(classes):
            more = sorted(set(here) - set(classes))
            wrong = f"{test} has {len(more)} classes that train/ has not: {', '.join(more[:3])}"
            check(not more, wrong)
            return classes, splits | {"test": images_in(test, classes, left_out)}
    return classes, splits


def one_size(root, files):
    """(height, width) of all images, or None where they differ or do not fit, and why. A few of
    another size are refused, as they would make it another network."""
    sizes = {file: size_of(file) for file in files[:: len(files) // 100_000 + 1]}
    (width, height), _ = collections.Counter(sizes.values()).most_common()[0]
    odd = [file for file, size in sizes.items() if size != (width, height)]
    if 3 * width * height * len(files) > MEMORY_LIMIT:
        return None, f"most of {width}x{height} pixels, too many for memory"
    wrong = f"{root}: {len(odd)} of {len(sizes)} images are not {width}x{height} pixels large, as "
    wrong += f"{', '.join(map(str, odd[:3]))}: take them out, or resize them"
    check(not odd or len(odd) > len(sizes) / 100, wrong)
    return (None, "of several sizes") if odd else ((height, width), "")


def folders_in(folder):
    return sorted(x.name for x in folder.glob("*") if x.is_dir() and seen(x.name))


def seen(name):
    """Whether a name is not one of those that systems leave behind."""
    return not re.match(r"\.|__|thumbs\.db$|desktop\.ini$", name, re.IGNORECASE)


def images_in(folder, classes, left_out) -> Split:
    """The images at any depth below the classes' folders, or in `folder` where there is no class.
    What is no image by its ending, or of no class, is counted in left_out."""
    images, labels, endings = [], [], Image.registered_extensions()
    number = {name: i for i, name in enumerate(classes)}
    walk = os.walk(folder, followlinks=True)  # classes may be links
    for file in sorted(Path(place, name) for place, _, names in walk for name in names):
        parts = file.relative_to(folder).parts
        if not all(map(seen, parts)):
            continue
        if file.suffix.lower() not in endings:
            left_out[file.suffix.lower() or file.name] += 1
        elif classes and parts[0] not in number:
            left_out["images outside the folders of classes"] += 1
        else:
            images.append(file)
            labels.append(number.get(parts[0], -1))
    check(images, f"{folder}: no images here, or in folders of classes")
    return Split(images, torch.tensor(labels))


def annotated_images(folder, classes) -> Split:
    """Tiny ImageNet's val/: images/, and a table of file, class and more, separated by tabs."""
    table, files, labels = folder / ANNOTATIONS, [], []
    with readable(table, "not a readable table of images and classes"):
        for line in table.read_text("utf-8").splitlines():
            file, name, *_ = line.split("\t")
            files.append(folder / "images" / file)
            labels.append(classes.index(name))
    odd = sorted(set(files) ^ set(images_in(folder, [], collections.Counter()).images))
    check(not odd, f"{table}: it and images/ differ in {len(odd)} files, as {odd[:1]}")
    return Split(files, torch.tensor(labels))


def size_of(path):
    with readable(path, "not a readable image"), Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF: by a quarter
        return image.size[::-1] if turned else image.size


def hold_in_memory(split, height, width):
    """The split decoded, as it is packed."""
    images = torch.empty(len(split), 3, height, width, dtype=torch.uint8)
    for image, path in zip(images, split.images, strict=True):
        pixels = TF.pil_to_tensor(read_image(path))
        check(pixels.shape == image.shape, f"{path}: not {width}x{height} pixels, as the others")
        image.copy_(pixels)
    return {"images": images, "labels": split.labels}


def read_image(path) -> Image.Image:
    """RGB, turned as EXIF says, what is transparent on white. Of more than 8 bits a channel Pillow
    would make white or black: refused."""
    with readable(path, "not a readable image"), Image.open(path) as image:
        right = image.mode in EIGHT_BITS and ";16" not in str(image.tile)
        check(right, f"{path}: mode {image.mode}, not 8 bits a channel: convert it to 8-bit RGB")
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


FIGURES = "disc|bar|two dots|four dots|cross".split("|")
SHAPES = [f"{figure}, {top} on top" for top in ("light", "dark") for figure in FIGURES]


def shapes(count: int, split: str, size: int = 32) -> dict:
    """`count` images of ten classes, drawn: rows of copies of one of five figures, each with a
    light half on top and a dark one below, or the other way round. The same images for the same
    count and split, everywhere.

    Where the copies are differs from image to image, so that no pixel means the same in two of
    them. Light and dark exchanged leaves amplitude spectrum and histogram as they are, so these can
    tell figures at most, half of the answer. Whatever else differs does so from copy to copy: a
    crop has several, and what it shares with another crop of the image is little but the class.
    Returns {"images": uint8 [N, 3, size, size], "labels": int64 [N]}."""
    rng = generator(0, f"shapes {split}", count)
    labels = torch.randperm(count, generator=rng) % len(SHAPES)
    images = [draw_shapes(part, size, rng) for part in labels.split(500)]  # to spare memory
    return {"images": torch.cat(images), "labels": labels}


def draw_shapes(labels, size, rng):
    count, cells = len(labels), 6  # places for 6 rows of 6 copies, of which some three are seen

    def uniform(low, high, *shape):
        return torch.rand(count, *(shape or (1, 1)), generator=rng) * (high - low) + low

    def turned(x, y, angle):
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    axis = (torch.arange(2 * size) + 0.5) / (2 * size) - 0.5  # at twice the size, then averaged
    x, y = turned(axis[None, None, :], axis[None, :, None], uniform(-0.25, 0.25))
    copies = uniform(2.7, 3.2)  # in a row
    x, y = x * copies + uniform(2, 3), y * copies + uniform(2, 3)  # [N, 2 size, 2 size]
    row = y.long()
    shift = uniform(0, 1, cells)  # of the rows
    x = x + shift.gather(1, row.flatten(1)).view_as(x)
    copy = (row * cells + x.long()).flatten(1)  # that each point belongs to

    def each(low, high):  # a value for each copy
        return uniform(low, high, cells * cells).gather(1, copy).view_as(x)

    u, v = x.frac() - 0.5 - each(-0.12, 0.12), y.frac() - 0.5 - each(-0.12, 0.12)
    u, v = turned(u, v, each(-0.4, 0.4))  # in the copy's frame
    radius = each(0.4, 0.48)
    u, v = u / radius, v / radius
    a, b = u.abs(), v.abs()
    inside = [torch.hypot(u, v) < 0.82, b.maximum(2.8 * a) < 0.95]
    inside += [torch.hypot(a - 0.52, v) < 0.5, torch.hypot(a - 0.5, b - 0.5) < 0.42]
    inside += [a.maximum(4 * b).minimum(b.maximum(4 * a)) < 1]
    inside = torch.stack(inside)[labels % 5, torch.arange(count)]

    light_on_top = torch.where(labels < 5, 1, -1)[:, None, None]
    half = -v.sign() * light_on_top * each(0.2, 0.45)  # light or dark, by the copy's contrast
    tint = torch.stack([each(-0.06, 0.06) for _ in range(3)], 1)
    image = 0.5 + inside[:, None] * (half[:, None] + tint)
    image = F.avg_pool2d(image, 2) + 0.1 * torch.randn(count, 3, size, size, generator=rng)
    return (image.clamp(0, 1) * 255).round().byte()


def training_batches(split, epoch, args, recipes, skip=0):
    """This process's part of the batches of an epoch after the first `skip`, as from batches_of.
    The order depends on seed and epoch alone; a short last batch is dropped."""
    order = torch.randperm(len(split), generator=generator(args.seed, "order", epoch))
    steps, size = len(split) // args.batch_size, args.batch_size // world_size()
    order = order[: steps * args.batch_size].view(steps, args.batch_size)[skip:]
    order = mine(order, 1).flatten()
    return batches_of(split, order, size, args, recipes, epoch * len(split))


def batches_of(split, index, size, args, recipes=(), first=0):
    """Batches (images, labels [B]) of a split in the order of `index`, on the device. In memory:
    uint8 [B, 3, H, W]. From disk, decoded ahead by workers: as from `decoded`, where crops depend
    on `first` plus an image's index, so that each epoch has others."""
    if split.in_memory:
        index = index.to(split.images.device)
        for some in [index[i : i + size] for i in range(0, len(index), size)]:
            yield split.images[some], split.labels[some]
        return
    decode = functools.partial(decoded, split, recipes, first, args)
    pinned = torch.device(args.device).type == "cuda"
    for images, labels in torch.utils.data.DataLoader(
        index.tolist(), size, collate_fn=decode, num_workers=args.workers, pin_memory=pinned,
        worker_init_fn=leave_signals_to_the_parent,
    ):  # fmt: skip
        yield images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)


def decoded(split, recipes, first, args, index):
    """uint8 [B, V, 3, S, S], a random crop for each recipe, or without recipes the centre crop,
    [B, 3, S, S]; and labels [B]. index: ints, which images of the split."""
    size, images = args.image_size, []
    for i in index:
        image = read_image(split.images[i])
        boxes = [centre_box(image.height, image.width, size)]
        if recipes:
            rng, frame = generator(args.seed, "crop", first + i), (1, image.height, image.width)
            draw = random_resized_crop_params
            boxes = [draw(*frame, recipe.scale, generator=rng) for recipe in recipes]
        how = [size, size], TF.InterpolationMode.BICUBIC
        crops = [TF.resized_crop(image, *map(int, box), *how) for box in boxes]
        crops = torch.stack(list(map(TF.pil_to_tensor, crops)))
        images.append(crops if recipes else crops[0])
    return torch.stack(images), split.labels[index]


# --------------------------------------------------------------------------------------------------
# 9  Command line and hardware

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
STEMS, PRECISIONS = ("auto", "small", "imagenet"), ("bf16", "fp16", "fp32")
OPTIMIZERS, SCALINGS = ("sgd", "lars", "adam", "adamw"), ("linear", "sqrt", "none")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)": those texts say what follows
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags in groups; those of the script itself come last."""

    def __init__(self, description, title="options"):
        how = {"allow_abbrev": False, "formatter_class": Help, "usage": "%(prog)s [flags]"}
        super().__init__(description=description, **how)
        names = "most used", "data", "training", "saving", "hardware", "nearest neighbours"
        self.groups = {name: self.add_argument_group(name) for name in names}
        self._optionals.title = title
        self._action_groups.append(self._action_groups.pop(1))

    def error(self, message):
        raise InputError(message)  # one line, without the usage


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            span = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected a number {span}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


whole, count = number(int, 0, 2**31), number(int, 1, 2**31)
fraction, positive = number(float, 0, 1), number(float, 1e-9)


# fmt: off
def shared_arguments(p):
    """The flags that training and evaluation have in common."""
    g = p.groups["most used"]
    g.add_argument("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}; a folder; a .pt")
    g.add_argument("--arch", choices=ARCHITECTURES, default="resnet18", help="torchvision's name")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    g.add_argument("--seed", type=whole, default=0, help="the only source of randomness")
    g = p.groups["data"]
    g.add_argument("--data-dir", default="data", help="where named datasets are kept, packed")
    g.add_argument("--image-size", type=number(int, 8), help="side of the views (default: by data)")
    g.add_argument("--stem", choices=STEMS, default="auto", help="auto: small up to 64 pixels")
    g = p.groups["hardware"]
    g.add_argument("--workers", type=whole, help="processes that decode images (default: by cores)")
    g.add_argument("--precision", choices=PRECISIONS, help="default: bf16 where it is fast")
    g = p.groups["nearest neighbours"]
    g.add_argument("--knn-k", type=count, default=200, help="neighbours; fewer on small sets")
    g.add_argument("--knn-temperature", type=positive, default=0.1, help="of the neighbours' votes")
    g.add_argument("--knn-bank", type=whole, default=0, help="N of the training images; 0: all")


def base_parser(description):
    """The flags of every training script. --batch-size, --optimizer, --lr and --weight-decay have
    no default here: a method's presets have to say them."""
    p = Parser(description.strip().splitlines()[0], "method")
    yes_or_no = argparse.BooleanOptionalAction
    shared_arguments(p)
    g = p.groups["most used"]
    g.add_argument("--epochs", type=count, default=200, help="passes over the training images")
    g.add_argument("--batch-size", type=number(int, 2), help="images (not views)")
    g.add_argument("--lr", type=positive, help="learning rate, for a batch of 256 if scaled")
    g.add_argument("--out", help="folder of the run (default: runs/METHOD_DATASET_ARCH)")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    g.add_argument("--init", help="an encoder.pt to start from")
    g = p.groups["data"]
    g.add_argument("--views", type=number(int, 2), default=2, help="views of each image")
    g.add_argument("--color-strength", type=number(float, 0, 4), default=1.0, help="of the jitter")
    g.add_argument("--crop-min", type=number(float, 1e-3, 1), default=0.08, help="share of area")
    g.add_argument("--blur", type=fraction, default=0.0, help="probability of Gaussian blur")
    g = p.groups["training"]
    g.add_argument("--optimizer", choices=OPTIMIZERS, help="update rule")
    g.add_argument("--lr-scaling", choices=SCALINGS, default="linear", help="of lr with the batch")
    g.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of lr")
    g.add_argument("--momentum", type=fraction, default=0.9, help="of sgd and lars")
    g.add_argument("--weight-decay", type=number(float, 0), help="not on 1-D tensors")
    g.add_argument("--warmup-epochs", type=number(float, 0), default=10.0,
                   help="if not given: at most a tenth of the epochs")
    g.add_argument("--increase-mi", choices=tuple(MI_WEIGHTS), help="ip, mib decrease it (S002)")
    g.add_argument("--mi-weight", type=number(float, 0), help="default: 1 rc, lbe; 5e-4 ip, mib")
    g.add_argument("--concat-views", action=yes_or_no, help="pass all at once (default: by method)")
    g = p.groups["hardware"]
    g.add_argument("--compile", action=yes_or_no, help="default: on a GPU, from 2000 steps on")
    g = p.groups["saving"]
    g.add_argument("--save-every", type=whole, default=0, help="epochs between encoder_EPOCH.pt")
    g = p.groups["nearest neighbours"]
    g.add_argument("--knn-every", type=whole, default=10, help="epochs between kNN figures; 0 none")
    return p
# fmt: on


def parse_args(parser, presets, *variants, argv=None):
    """What the command line says; else, with --resume, what the run in --out was begun with; else
    the presets; else the parser's default. Of the presets count "default", then the dataset's, then
    those named by a variant, then "DATASET VARIANT"; a variant is the value of a flag named in
    `variants`, or the flag's own name where it is a switch."""
    words = sys.argv[1:] if argv is None else argv
    given = {word.split("=")[0] for word in words}
    known = parser.parse_args([word for word in words if word not in ("-h", "--help")])
    dataset = Path(known.dataset)
    name = dataset.stem if dataset.suffix == ".pt" else str(dataset)
    picked = [flag if getattr(known, flag) is True else getattr(known, flag) for flag in variants]
    keys = ["default", name, *picked, *(f"{name} {word}" for word in picked)]
    keys = [key for key in keys if key in presets]
    for key in keys:
        parser.set_defaults(**presets[key])
    args = parser.parse_args(words)
    source = f"preset {' + '.join(keys)}"
    if "warmup_epochs" in vars(args) and "--warmup-epochs" not in given:  # meant for a long run
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    if getattr(args, "resume", False) and args.out:
        settings = Path(args.out) / "config.json"
        wrong = f"{args.out}: nothing to go on with; a run to begin needs --dataset"
        check(settings.is_file() or "--dataset" in given, wrong)
        if settings.is_file():
            parser.set_defaults(**begun_with(settings))
            args, source = parser.parse_args(words), f"those of {settings}"
    print(f"settings: {source}; given: {shlex.join(words) or 'nothing'}"[:120])
    return args


def begun_with(settings):
    """What a run's config.json says, but for what is for each start to say."""
    with readable(settings, "not readable settings"):
        saved = json.loads(settings.read_text("utf-8"))
        config, command = saved["config"], shlex.split(saved["command"])
    script = Path(sys.argv[0]).name
    here = script in [Path(word).name for word in command]
    check(here, f"{settings} is not of {script}, but of: {shlex.join(command)}")
    return {name: value for name, value in config.items() if name not in MACHINE}


def only_for(condition, what, *flags):
    """InputError where `condition` is false and the command line has one of `flags`, which nothing
    would read then."""
    given = {word.split("=")[0] for word in sys.argv}
    for flag in flags:
        check(condition or flag not in given, f"{flag} is for {what} alone: leave it out")


def prepare(args, method, labels=False) -> Dataset:
    """The dataset, on the device; fills in the arguments that follow from it and the machine.
    labels: whether the method needs them, so that unlabeled images stay out."""
    only_for(args.increase_mi, "--increase-mi", "--mi-weight")
    only_for(args.optimizer in ("sgd", "lars"), "--optimizer sgd or lars", "--momentum")
    vars(args).setdefault("small_maps", args.precision != "fp32")  # a run that goes on has it
    resolve_hardware(args)
    data = load_once(args)
    if labels:
        wrong = f"{data.name}: {method} needs labels, of two classes at least; others need none"
        check(len(data.classes) > 1, wrong)
        data = dataclasses.replace(data, pretrain=data.train)
    batch, n = args.batch_size, len(data.pretrain)
    kind = "labelled" if labels else "training"
    check(batch <= n, f"--batch-size {batch} exceeds the {n} {kind} images")
    uneven = f"--batch-size {batch} is not a multiple of the {world_size()} processes"
    check(batch % world_size() == 0, uneven)
    check(agreed(n) == n, f"{data.name} has {n} training images here, and more elsewhere")
    longer = f"--warmup-epochs {args.warmup_epochs:g} exceeds --epochs {args.epochs}"
    check(args.warmup_epochs <= args.epochs, longer)
    if args.mi_weight is None:
        args.mi_weight = MI_WEIGHTS.get(args.increase_mi)
    args.image_size = args.image_size or max(8, data.size)
    if args.stem == "auto":
        args.stem = "small" if args.image_size <= 64 else "imagenet"
    args.out = args.out or f"runs/{method}_{data.name}_{args.arch}"
    scale = {"linear": batch / 256, "sqrt": (batch / 256) ** 0.5, "none": 1}[args.lr_scaling]
    args.scaled_lr = args.lr * scale
    resolve_compile(args, n // batch * args.epochs)
    torch.manual_seed(args.seed)  # the initial weights
    return data.to(args.device)


def load_once(args) -> Dataset:
    """load_dataset, on each machine by its first process before the others, which find what it has
    downloaded and packed."""
    first = launched("LOCAL_RANK") == 0
    data = load_dataset(args.dataset, args.data_dir) if first else None
    agreed(0)  # the others wait here
    return data or load_dataset(args.dataset, args.data_dir)


def resolve_hardware(args):
    """Fill in device, precision and workers from what the machine has, and meet the processes."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    join_processes(args)  # before anything is on a GPU: each has its own
    try:
        torch.Generator(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device} cannot be used here: {reason}") from None
    kind = torch.device(args.device).type
    if args.precision is None:
        fast = kind == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        if kind == "cuda":
            fast = torch.cuda.get_device_capability(args.device)[0] >= 8  # Ampere and later
        args.precision = "bf16" if fast else "fp16" if kind == "cuda" else "fp32"
    if args.workers is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
        cores = len(affinity(0)) // launched("LOCAL_WORLD_SIZE", 1)
        args.workers = min(16, cores - 1) if cores > 2 else 0
    if kind == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, not to give large blocks back to the kernel: a step on a CPU
    would wait for page faults to get again the memory that it had a moment before."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


class Conv3x3(nn.Conv2d):
    """A plain 3x3 convolution with padding 1, [B, C, H, W], for CPUs. Of maps of 2 pixels a side or
    1, which layer3 and layer4 have of 32 pixels behind the ImageNet stem, each output pixel sees
    the whole input: one matrix product does the same, and a step takes less than half of the time.
    It rounds differently: with --precision fp32 convolutions stay torch's own."""

    def forward(self, x):
        side = x.shape[-1]
        if x.shape[2:] not in [(1, 1), (2, 2)]:
            return super().forward(x)
        # An output pixel at `place` sees `side` rows, or columns, of the kernel from 1 - place on.
        first = [1 - place for place in range(0, side, self.stride[0])]
        spans = [slice(start, start + side) for start in first]
        parts = [self.weight[:, :, rows, columns] for rows in spans for columns in spans]
        matrix = torch.stack(parts).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix)  # [B, pixels * C_out]
        return y.unflatten(1, (len(spans), len(spans), -1)).permute(0, 3, 1, 2)


def set_up(model, args):
    """The method on its device, with what the flags that all methods share change in it."""
    if args.concat_views is not None:
        has = hasattr(model, "concat_views")
        check(has, "--concat-views: this method has one way to pass its views, leave the flag out")
        model.concat_views = args.concat_views
    args.concat_views = getattr(model, "concat_views", None)
    if args.increase_mi:
        model = MutualInformation(model, args.increase_mi, args.mi_weight, args.image_size)
    model = synchronized(model, args)
    if torch.device(args.device).type == "cpu" and args.small_maps:
        plain = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        same = "kernel_size", "padding", "padding_mode", "dilation", "groups", "bias"
        for module in model.modules():
            alike = type(module) is nn.Conv2d and module.stride in [(1, 1), (2, 2)]
            if alike and all(getattr(module, x) == getattr(plain, x) for x in same):
                module.__class__ = Conv3x3
    return model.to(args.device, memory_format=torch.channels_last).train()


def load_initial(model, args):
    """The weights of --init for the backbone, and for a target that is a copy of it."""
    saved, before = load_file(args.init), copy.deepcopy(model.backbone.state_dict())
    conv1, maxpool = model.backbone.conv1, model.backbone.maxpool
    here = {"stem_padding": conv1.padding[0], "stem_relu": True}
    here["stem_max_pool"] = isinstance(maxpool, nn.MaxPool2d)
    with readable(args.init, f"not an encoder.pt of a {args.arch} with the {args.stem} stem"):
        for name, value in here.items():  # which weights do not show
            wrong = f"{args.init} has {name} {saved.get(name)}, which is {value} here"
            check(saved.get(name, value) == value, wrong)
        for module in model.modules():
            now = module.state_dict()
            if now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now):
                module.load_state_dict(saved["state_dict"])


def resolve_compile(args, steps):
    """torch.compile by default on a GPU, where Triton and a C compiler are there, in a run that is
    not short. Not with several processes, whose gathering cuts the graph in pieces."""
    check(not args.compile or world_size() == 1, "--compile is for one process, not for several")
    if args.compile is None:
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
        cuda = torch.device(args.device).type == "cuda" and world_size() == 1
        args.compile = bool(cuda and compiler and importlib.util.find_spec("triton"))
        args.compile = args.compile and steps >= 2000


def compiled(function, args):
    """`function` as one graph for one set of shapes, or as it is with --no-compile."""
    if not args.compile:
        return function
    torch._inductor.config.fallback_random = True  # it draws what it would draw uncompiled
    return torch.compile(function, fullgraph=True, dynamic=False)


def autocast(args):
    """The context in which networks run. Losses leave it again, for full precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


def describe(args) -> dict:
    """What a figure needs to be repeated: command, commit, versions, machine, settings."""
    git, commit = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = f"cpu, {torch.get_num_threads()} threads"
    if torch.device(args.device).type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    here = launched("LOCAL_WORLD_SIZE", 1)  # processes on this machine
    program = ["python"] if here == 1 else ["torchrun", f"--nproc-per-node={here}"]
    about = {"command": shlex.join([*program, *sys.argv]), "commit": commit or "unknown"}
    about |= {"torch": torch.__version__, "device": device, "processes": world_size()}
    return about | {"config": vars(args)}


# --------------------------------------------------------------------------------------------------
# 10  Files, signals, bad input, random numbers


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, what is right."""


def check(condition, message):
    if not condition:
        raise InputError(message)


def run(main) -> None:
    """Call `main()`; bad input and failing files end in one line on stderr and exit status 2. Of
    several processes the first alone prints."""
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        result = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return result
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read what is printed has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        message = known_failure(error)
    if rank() and "another process ended" not in message:
        time.sleep(5)  # the first process says what is wrong with all, and torchrun ends this one
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


FAILURES = {  # what an error's name and text are known by, and what helps
    "TorchDynamoException": "torch.compile failed; --no-compile does without it",
    r"shared memory|Bus error|/torch_\d": "/dev/shm is full; --workers 0 does without it",
    "Too many open files|ancdata": "too many open files; raise `ulimit -n`, or take --workers 0",
    r"DataLoader worker \(pid": "a decoding worker was killed, for want of memory? fewer --workers",
    "DistError|DistBackendError|gloo": "another process ended, or was silent for long",
    "MemoryError|alloc": "out of memory; a smaller --batch-size may fit",
}


def known_failure(error):
    """The line for an error of the user's, the machine's, or another process's; else raises it."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, InputError):  # a DataLoader worker's is a traceback, our line its last
        return lines[-1].removeprefix("common.InputError: ")
    said = getattr(error, "strerror", None) or str(error)  # without the name of a file
    text = " ".join([kind.__name__ for kind in type(error).__mro__] + [said])
    for known, line in FAILURES.items():
        if re.search(known, text):
            return f"{line} ({lines[0]})"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or lines[-1]}"
    raise error


class StopSignals:
    """Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, noted in `.number`, for a run to end after its step. What
    is ignored, as behind nohup or a shell's &, stays so."""

    number = None

    def __init__(self):
        self.before = {}
        for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1":
            number = getattr(signal, name, None)  # Windows has two of them
            with contextlib.suppress(ValueError, TypeError):  # not in the main thread
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.number is None and rank() == 0:
            with contextlib.suppress(OSError):  # print could fail where the terminal is gone
                os.write(2, b"\nstopping after the step and saving; Ctrl-C again: at once\n")
        if self.number == number == signal.SIGINT and time.monotonic() - self.at > 1:
            raise KeyboardInterrupt  # pressed again, where a step or an evaluation takes long
        self.number, self.at = number, time.monotonic()


def leave_signals_to_the_parent(worker):
    """A worker gets no signal that is meant for the run; it ends with its parent."""
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1":
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """A binary file that takes its name when it is whole: written beside, flushed, renamed. What
    had the name before gets the name `previous`, where that is given."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and Path(path).exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except RuntimeError as error:  # how torch.save reports a full disk
        raise InputError(f"{path}: could not be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value, path) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def load_file(path):
    """torch.load with weights_only=True, so that no file can run code; InputError if it fails."""
    check(Path(path).is_file(), f"{path}: no such file")
    odd = "no file of plain values, as torch.save(model.state_dict(), FILE) writes"
    with readable(path, odd), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever torch finds odd is refused or not used
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def readable(path, problem):
    """InputError for all that a damaged or strange file lets a reader raise. problem: what is
    wrong with the file then, as "not a readable image"."""
    try:
        yield
    except (InputError, PermissionError, MemoryError):  # the last say nothing of what is in it
        raise
    except Exception as error:  # torch, zipfile, Pillow and numpy raise many kinds
        code = re.search(r"GLOBAL (\S+)", str(error))  # which torch.load refuses to run
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"it holds {code[1]}, which is no plain value; nothing was run" if code else reason
        reason = re.sub(r"\x1b\[\d*m|.*[Ww]eights.only.*", "", reason) or "or damaged"
        raise InputError(f"{path}: {problem} ({reason})") from None


def load_whole(path):
    """load_file of what torch.save wrote, with the checksums that torch.load does not look at."""
    value = load_file(path)
    with readable(path, "not a readable checkpoint"), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    check(damaged is None, f"{path}: damaged ({damaged})")
    return value


def derived_seed(seed, purpose, number) -> int:
    """A seed from the user's seed, what it is for, and its step (epoch, image) alone: a resumed run
    draws what an uninterrupted one would, and processes that share a batch each draw for all."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:7], "big")


def generator(seed, purpose, number, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, number))


# --------------------------------------------------------------------------------------------------
# 11  Several processes, which torchrun starts: N of them train the network that one would. Each
# holds the data and the model, and has B / N images of every batch. Random numbers are drawn for
# the whole batch by all, and each takes its part; projections are gathered, so that every process
# computes the loss of the whole batch; batch norm has the statistics of the whole batch.


def launched(name, default=0):
    """A number that torchrun gives to what it starts: RANK, WORLD_SIZE, ..."""
    return int(os.environ.get(name, default)) if dist.is_torchelastic_launched() else default


def rank():
    """The number of this process, 0 for the first one, which alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else launched("RANK")


def world_size():
    """How many processes there are, N."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args):
    """Where torchrun started this process, meet the others. They speak by NCCL about what is on
    GPUs, one for each process, and by gloo about the rest."""
    alone = dist.is_torchelastic_launched() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1
    wrong = "srun started several processes that do not know each other: srun --ntasks-per-node=1 "
    check(alone, wrong + "torchrun --nproc-per-node=N SCRIPT ...")
    if launched("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        return
    here, gpus = launched("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    gpu = args.device == "cuda"
    wrong = (
        f"--device {args.device}: {here} processes take cpu, or cuda with a GPU each, not {gpus}"
    )
    check(gpu and here <= gpus or args.device == "cpu", wrong)
    if gpu:
        torch.cuda.set_device(launched("LOCAL_RANK"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


class Gather(torch.autograd.Function):
    """[B / N, ...] of each process -> [B, ...] of all. Every process has a loss of its own that
    depends on this one's rows, so their gradient is the sum of what all processes say (dist's
    all_gather passes none)."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return mine(grad)


def full_precision(x):
    """x as float32, or as float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather(tensors):
    """A list of the tensors [B / N, ...], each with the rows of all N processes: [B, ...], with
    gradient. Every process has to come here with as many rows. Floats come out as float32 at
    least. The mean over processes of the gradients that follow is that of one process with B."""
    if world_size() == 1:
        return list(tensors)
    whole = [full_precision(x) if x.is_floating_point() else x for x in tensors]
    return [Gather.apply(x.contiguous()) for x in whole]


def mine(x, dim=0):
    """This process's part of what is there for the whole batch."""
    return x.chunk(world_size(), dim)[rank()] if world_size() > 1 else x


def mean_terms(terms):
    """A dict of scalars, each the mean over the processes, on all of them."""
    return {name: gather([v.detach().float()[None]])[0].mean(0) for name, v in terms.items()}


def agreed(number):
    """The largest of the processes' numbers, on all of them. It waits for no GPU."""
    return int(gather([torch.tensor([number or 0])])[0].max())


def on_first(function):
    """What `function` returns, or raises, where the first process calls it, and it alone."""
    box = [None]
    if rank() == 0:
        try:
            box = [function()]
        except (InputError, OSError) as error:
            box = [error]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all processes, on CPUs, which torch's SyncBatchNorm refuses."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        (whole,) = gather([x])
        whole = super().forward(whole.to(x.dtype))
        return mine(whole).clone()  # no view, which a ReLU in place could not change

    def _check_input_dim(self, x):
        pass


def synchronized(model, args):
    """The model with batch norm over all processes; its parameters and keys stay the same."""
    if world_size() == 1:
        return model
    if torch.device(args.device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


def distributed(model):
    """The model, its gradients averaged over the processes in the backward pass."""
    if world_size() == 1:
        return model
    model = nn.parallel.DistributedDataParallel(model)
    model.broadcast_buffers = False  # every process computes the same
    return model
