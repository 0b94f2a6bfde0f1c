# SPDX-License-Identifier: MIT
"""Evaluate a saved encoder: a classifier on its frozen features, nearest neighbours, fine-tuning.

linear   The encoder stays frozen, in eval mode: its tensors are compared bit for bit before and
         after. A linear layer is trained on its output with SGD, momentum .9, no weight decay,
         batches of 256, 100 epochs, random resized crops and flips (S003 5.2.5 and B.1.2), cosine
         from lr .02 to .0002. Unlike there, features are standardised; on held-out training images
         of CIFAR-10, .02 then beat S003's .2. With --cached features are computed once, without
         augmentation: minutes, not hours, on a CPU. On shapes, 20 epochs, crops from .4.
knn      Weighted nearest neighbours by cosine (Wu et al. 2018); linear and finetune report it, too.
finetune Encoder and classifier are trained together, 20 epochs, the encoder with a rate of its own,
         --encoder-lr .005, in steps (S003 B.2.5, whose rates 20 and 30 of the classifier are for
         features that are not standardised; here .2).

--recipe takes a thesis's settings, which are below at PRESETS. Images of another dataset than the
encoder's are brought to the encoder's size and statistics (InfoCL takes the new dataset's).
The accuracy is the last epoch's, on the test images. To choose anything, take
--validation-fraction, which measures on held-out training images.

Run: python linear_eval.py --checkpoint runs/simclr_cifar10_resnet18/encoder.pt --dataset cifar10

--checkpoint takes what the training scripts save, any other file with a whole ResNet, or: random.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import check

# --------------------------------------------------------------------------------------------------
# Protocols. Of each, `measure` returns the scores [N, C] of the classes for the test images.


def measure(encoder, original, data, train, test, args):
    """A namespace: scores, {"knn" and the protocol: [N, C] of the test images}; k; the linear
    classifier, or None; and data, train, test, args as given. train, test: Splits whose `images`
    are features [N, F]. original: the encoder's state_dict, to compare."""
    torch.manual_seed(args.seed)
    finite = train.images.isfinite().all() and test.images.isfinite().all()
    check(finite, f"{args.checkpoint}: its features are not finite")
    votes, k = common.knn_votes(train.spread(args.knn_bank), test, len(data.classes), args)
    scores, classifier = {"knn": votes}, None
    if args.protocol == "linear":
        classifier = linear_classifier(encoder, data, train, args)
        h = (test.images - classifier["mean"]) / classifier["std"]
        scores["linear"] = F.linear(h, classifier["weight"], classifier["bias"])
    if not all(torch.equal(v, original[key]) for key, v in encoder.state_dict().items()):
        raise RuntimeError("the encoder changed while it was evaluated")
    if args.protocol == "finetune":
        scores["finetune"] = finetune_protocol(encoder, data, train, args)
    found = {"scores": scores, "k": k, "classifier": classifier}
    return argparse.Namespace(**found, data=data, train=train, test=test, args=args)


def linear_classifier(encoder, data, train, args):
    """weight [C, F] and bias of a layer on features of the frozen encoder, and the mean and std [F]
    of train, by which features are standardised, so that a rate fits encoders of any scale."""
    mean, std = standardisation(train.images)
    if not args.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    cached = common.Split((train.images - mean) / std, train.labels)
    head = new_head(train.images.shape[1], len(data.classes), args)

    def batches(epoch):
        if args.cached:
            yield from common.training_batches(cached, epoch, args, [])
            return
        for x, labels in augmented(data, epoch, args):
            with torch.no_grad(), common.autocast(args):
                h = encoder(x)
            yield (h.float() - mean) / std, labels

    def loss(batch):
        h, y = common.gather(batch)  # from all processes: each trains the same head
        return F.cross_entropy(head(h), y)

    def share(progress, group):
        return common.learning_rate(progress, total=1, warmup=0, base=1, final=args.lr_floor)

    groups = [{"params": head.parameters(), "base": args.lr}]
    fit(loss, batches, groups, share, data, args)
    return head.requires_grad_(False).state_dict() | {"mean": mean, "std": std}


def finetune_protocol(encoder, data, train, args):
    """Scores after encoder and classifier were trained together, in train mode. After each quarter
    of the epochs their rates fall to a fifth (encoder) and a tenth (S003 B.2.5)."""
    head = new_head(encoder.num_features, len(data.classes), args)
    norm = nn.BatchNorm1d(encoder.num_features, affine=False)  # brings any scale to one
    mean, std = standardisation(train.images)
    norm.load_state_dict({"running_mean": mean, "running_var": std.square()}, strict=False)
    model = nn.Sequential(encoder.requires_grad_(True), norm.to(args.device), head)
    model = common.synchronized(model, args).train()
    forward = common.distributed(model)

    def loss(batch):
        x, y = batch
        with common.autocast(args):
            scores = forward(x)
        return F.cross_entropy(scores.float(), y)

    def share(progress, group):
        return group["falls_to"] ** int(4 * progress)

    groups = [{"params": encoder.parameters(), "base": args.encoder_lr, "falls_to": 0.2}]
    groups += [{"params": head.parameters(), "base": args.lr, "falls_to": 0.1}]
    fit(loss, lambda epoch: augmented(data, epoch, args), groups, share, data, args)
    model.eval()
    with torch.no_grad():
        return model[1:](common.encode(encoder, data.test, args, data))


def fit(loss_of, batches, groups, share, data, args):
    """SGD. batches: epoch -> iterator. loss_of: one of these batches -> scalar. The rate of a group
    of parameters: its base, times share(progress, group)."""
    optimizer = torch.optim.SGD(groups, 0.1, args.momentum, 0, args.weight_decay, foreach=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    steps = len(data.train) // args.batch_size
    bar = common.Progress(args.epochs, steps, args.batch_size)
    for epoch in range(1, args.epochs + 1):
        bar.begin(epoch)
        total = 0.0
        for i, batch in enumerate(batches(epoch), 1):
            progress = ((epoch - 1) * steps + i - 1) / (steps * args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * share(progress, group)
            loss = loss_of(batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total = total + loss.detach()
            bar.update(i, total)
        total = float(common.mean_terms({"loss": total})["loss"])
        check(math.isfinite(total), f"loss not finite in epoch {epoch}: try a lower --lr")
        if epoch % max(1, args.epochs // 5) == 0:
            bar.show(f"loss {total / steps:.4f}")


def new_head(num_features, num_classes, args):
    head = nn.Linear(num_features, num_classes).to(args.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def standardisation(features):
    """Mean and deviation [F] of features [N, F]; an all but dead feature stays small."""
    mean, std = features.mean(0), features.std(0)
    return mean, std.maximum(std.mean() / 100).clamp(min=1e-6)


def augmented(data, epoch, args):
    """The batches of an epoch, cropped and mirrored at random: (views, labels)."""
    how = {"jitter_p": 0, "gray_p": 0} | AUGMENTS[args.augment]
    recipe = common.Recipe((args.crop_min, 1.0), **how)
    part = common.rank(), common.world_size()
    augment = common.Augment([recipe], args.image_size, data.mean, data.std, args.device, part)
    done = epoch * (len(data.train) // args.batch_size)
    for i, (images, labels) in enumerate(
        common.training_batches(data.train, epoch, args, [recipe])
    ):
        rng = common.generator(args.seed, "linear", done + i, args.device)
        yield *augment(images, rng), labels


def fitting_batch_size(count, args):
    """--batch-size, or less where `count` images or the processes ask for it. With few labels an
    epoch has eight steps or more: at a rate meant for many, fewer would hardly move anything."""
    processes = common.world_size()
    least = 2 * processes if args.protocol == "finetune" else processes  # for its batch norm
    most = count if args.label_fraction == 1 else max(count // 8, least)
    size = min(args.batch_size, most)
    size -= size % processes
    few = f"{count} training images in batches of {size} are too few for --protocol {args.protocol}"
    check(least <= size <= count, f"{few}, which takes {least} at a time at least")
    if size < args.batch_size:
        print(f"{count} training images: batches of {size}")
    return size


def drawn(split, fraction, num_classes, seed, purpose):
    """Indices of `fraction` of each class, and of the others, in order: the same anywhere."""
    order = torch.randperm(len(split), generator=common.generator(seed, purpose, 0))
    labels, mask = split.labels.cpu()[order], torch.zeros(len(split), dtype=torch.bool)
    for label in range(num_classes):
        index = order[labels == label]
        mask[index[: round(fraction * len(index))]] = True
    return mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]


# Whoever wants to know how an encoder is measured may stop here.
# --------------------------------------------------------------------------------------------------
# What a table says: which images, every seed, an untrained encoder for comparison

T95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t, 1 to 9 degrees


def every_seed(encoder, data, args):
    """What measure returns for the first seed, and of all seeds the accuracies: {"knn" and the
    protocol: [(top-1, top-5, balanced top-1) of each]}."""
    original = copy.deepcopy(encoder.to(args.device).state_dict())
    test = features_of(encoder, data.test, args, data)
    first, accuracies = None, collections.defaultdict(list)
    for seed in range(args.seed, args.seed + args.seeds):
        encoder.load_state_dict(original)  # fine-tuning changes it
        some = labelled(data.train, args.label_fraction, len(data.classes), seed)
        if first is None or args.label_fraction < 1:
            train = features_of(encoder, some, args, data)
        part = dataclasses.replace(data, train=some)
        seeded = argparse.Namespace(**vars(args) | {"seed": seed})
        measured = measure(encoder, original, part, train, test, seeded)
        for name, scores in measured.scores.items():
            top1, top5 = common.top_accuracies(scores, test.labels)
            if name == "knn" and measured.k < min(5, len(data.classes)):
                top5 = None  # k neighbours vote for k classes at most
            accuracies[name].append((top1, top5, balanced(scores, test.labels)))
        first = first or measured
    if args.label_fraction == 1:  # neighbours vote alike for every seed
        del accuracies["knn"][1:]
    first.accuracies = accuracies
    return first


def balanced(scores, labels):
    """The mean over classes of their images' accuracy."""
    right = (scores.argmax(1) == labels).float()  # Apple's GPUs have no float64
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def features_of(encoder, split, args, data):
    """The split with its features [N, F] for images."""
    labels, images = split.labels.to(args.device), split.images
    if args.recipe == "s003" and split.in_memory:
        part = round(min(images.shape[2:]) * 7 / 8)
        if part < args.image_size:  # else it is so anyway
            top, left, *_ = common.centre_box(*images.shape[2:], part)
            split = common.Split(images[..., top : top + part, left : left + part], labels)
    encoder.to(args.device, memory_format=torch.channels_last)
    return common.Split(common.encode(encoder, split, args, data), labels)


def labelled(split, fraction, num_classes, seed):
    """The images whose labels may be used, `fraction` of each class: 500 of CIFAR-10 for .01."""
    if fraction < 1:
        split = split.take(drawn(split, fraction, num_classes, seed, "labels")[0])
    lack = num_classes - len(split.labels.unique())
    check(not lack, f"classes without a training image at --label-fraction {fraction:g}: {lack}")
    return split


def random_encoder(args, data):
    """An untrained encoder for comparison: resnet18, or what the flags say."""
    size, arch = args.image_size or data.size, args.arch or "resnet18"
    stem = args.stem if args.stem != "auto" else "small" if size <= 64 else "imagenet"
    torch.manual_seed(args.seed)
    info = {"arch": arch, "stem": stem, "image_size": size, "method": "untrained", "epoch": 0}
    info |= {"mean": args.mean or data.mean, "std": args.std or data.std}
    info |= {"stem_padding": args.stem_padding, "stem_max_pool": args.stem_max_pool}
    info |= {"assumed": [], "projector": None}
    return network(info), info


def baselines(info, data, args):
    """What pixels themselves, and an untrained encoder of the same kind, measure, of which a linear
    classifier is cached, to be quick. What is evaluated is not its own baseline."""
    quick = argparse.Namespace(**vars(args) | {"cached": args.protocol == "linear", "seeds": 1})
    votes = argparse.Namespace(**vars(quick) | {"protocol": "knn"})
    found = {"pixels": every_seed(common.pixels(args), data, votes)}
    if info["method"] != "untrained":
        encoder, _ = random_encoder(args, data)
        found["untrained"] = every_seed(encoder, data, quick)
    return found


def mean_and_interval(values):
    """The mean of n values and half the width of its 95 % confidence interval, None for one."""
    if None in values:
        return None, None
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    half = T95[n - 2] * float(values.std()) / n**0.5 if n > 1 else None
    return float(values.mean()), half


def table(measured, others, data):
    """Prints the table; returns the same for the JSON object. others: baselines, by name."""
    rank = common.collapse_figures(measured.test.images)["rank"]
    result, rows = {"knn_k": measured.k, "rank": rank}, []
    for whose, one in {"": measured, **others}.items():
        row, prefix = (f"{whose}: ", f"{whose.removesuffix('s')}_") if whose else ("", "")
        before, cached = one.args.protocol == "finetune", one.args.cached
        names = {"knn": f"kNN, k = {one.k}" + ", before" * before}
        names |= {"linear": "linear" + ", cached" * cached, "finetune": "finetuned"}
        for what, found in one.accuracies.items():
            columns = list(zip(*found, strict=True))
            (top1, half), (top5, _), (even, _) = map(mean_and_interval, columns)
            key = prefix + "knn_" * (what == "knn")
            result |= {f"{key}top1": top1, f"{key}top5": top5, f"{key}balanced_top1": even}
            remark = ""
            if half is not None:
                result |= {f"{key}top1_ci95": half, f"{key}top1_seeds": list(columns[0])}
                remark = f"top-1 ± {half:.2%} (95 %; {len(found)} evaluations of one encoder)"
            rows.append((row + names[what], top1, top5, even, remark))
    chance, labels = 1 / len(data.classes), data.test.labels
    result["majority"] = float(labels.bincount().max()) / len(labels)
    rows.append(("majority: the largest class", result["majority"], None, None, ""))
    rows.append(("chance", chance, min(1, 5 * chance), chance, ""))
    width = max(len(row[0]) for row in rows) + 1
    print(f"{'':{width}}{'top-1':>8}{'top-5':>8}{'balanced':>10}  (top-1, mean over classes)")
    for name, top1, top5, even, remark in rows:
        cells = [f"{'-' if x is None else f'{x:.2%}':>8}" for x in (top1, top5, even)]
        print(f"{name:{width}}{cells[0]}{cells[1]}  {cells[2]}  {remark}".rstrip())
    print(f"rank: features use {rank:.1f} of {measured.test.images.shape[1]} directions")
    return result


# --------------------------------------------------------------------------------------------------
# Pictures: what is in them, computed from features; then matplotlib's figures, which alone need it

PALE, BLUE, ORANGE = "#d8d8d8", "#005ab5", "#dc5f00"
DASHES = "-", "--", ":", "-."
BELOW = {"loc": "upper left", "bbox_to_anchor": (0, -0.13), "frameon": False, "handlelength": 4}
CURVES = {"loss": "loss", "knn_top1": "kNN accuracy on test images"}
CURVES |= {"z_std": "z_std: spread of projections", "z_rank": "z_rank: directions in use"}
UNIT = ("simclr", "byol", "supcon", "tcl", "corinfomax")  # their losses normalise projections


def draw_pictures(what, info, measured, args):
    """The four pictures, by name. what: the encoder, for their headings."""
    data, test, train = measured.data, measured.data.test, measured.data.train
    of, classes = f"{what}, {data.name}", [str(name) for name in data.classes]
    frozen = of + ", before fine-tuning" * (args.protocol == "finetune")
    labels, queries = test.labels.cpu(), measured.test.images
    chosen, nearest = nearest_images(queries, labels, measured.train.images)
    images = images_at(test.take(chosen), args, data)
    theirs = images_at(train.take(nearest.flatten()), args, data).unflatten(0, nearest.shape)
    known = labels[chosen], theirs, train.labels.cpu()[nearest]
    yield "neighbors", neighbors_picture(images, *known, classes, f"{frozen}: nearest neighbours")

    few, features = test.spread(400), measured.test.spread(400).images.cpu()
    shown = images_at(few, args, data), few.labels.cpu()
    where = two_dimensions(features, args)
    yield "map", map_picture(*shown, *where, classes, f"{frozen}: test images by features")

    curves = spectra(info, data, args)
    yield "spectrum", spectrum_picture(curves, f"{data.name}: spectrum of the covariance")

    pairs = labels * len(classes) + measured.scores[args.protocol].argmax(1).cpu()
    counts = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1)
    yield "confusion", confusion_picture(counts, classes, f"{of}, {args.protocol}")


def named(info):
    return f"{info['method']}" + ("" if info["epoch"] is None else f", epoch {info['epoch']}")


def images_at(split, args, data):
    """Images of a split as the encoder sees them, but in [0, 1]: float [n, 3, S, S]."""
    plain = dataclasses.replace(data, mean=(0, 0, 0), std=(1, 1, 1))
    return common.encode(nn.Identity(), split, args, plain).clamp(0, 1).cpu()


def nearest_images(test_features, test_labels, train_features, rows=10, count=8):
    """Test images, int64 [rows], evenly spaced among all as sorted by class, and for each the
    training images nearest by cosine, the nearest first, [rows, count]."""
    order, rows = test_labels.cpu().argsort(stable=True), min(rows, len(test_labels))
    chosen = order[torch.arange(rows) * len(order) // rows]
    queries = F.normalize(test_features[chosen.to(test_features.device)])
    cosine = queries @ F.normalize(train_features).T
    return chosen, cosine.topk(min(count, cosine.shape[1])).indices.cpu()


def two_dimensions(features, args):
    """Points [N, 2] for features [N, F], from 0 to 1, and what the two coordinates are."""
    if args.map == "tsne":
        from sklearn.manifold import TSNE

        check(len(features) > 3, f"--map tsne: {len(features)} images are too few")
        perplexity = min(50, (len(features) - 1) / 3)  # S003 5.6
        points = TSNE(perplexity=perplexity, random_state=args.seed).fit_transform(features.numpy())
        points, names = torch.from_numpy(points), ["t-SNE, first", "t-SNE, second"]
    else:
        centred = (features - features.mean(0)).double()
        variances, directions = torch.linalg.eigh(centred.T @ centred)
        points, shares = centred @ directions[:, -2:].flip(1), variances / variances.sum()
        names = [f"principal component, {shares[-i]:.0%} of the variance" for i in (1, 2)]
    low, high = points.amin(0), points.amax(0)
    return (points - low) / (high - low).clamp(min=1e-12), names


def spectra(info, data, args):
    """{panel: {label: spectrum(...)}} of the test images by an untrained encoder, the evaluated one
    as it was saved, and --compare. Projections: of length 1 if the loss is of such (S003 5.5)."""
    panels = collections.defaultdict(dict)
    for path in dict.fromkeys(["random", args.checkpoint, *args.compare]):
        if path == "random":
            (encoder, its), label = random_encoder(args, data), f"untrained {args.arch}"
        elif path == args.checkpoint:
            encoder, its = with_projector(path, **overrides_of(args) | {"features": None})
            label = named(its)
        else:
            encoder, its = with_projector(path)
            label = f"{named(its)}, {path}"
        its |= {name: info[name] for name in its["assumed"]}
        how = argparse.Namespace(**vars(args) | {"image_size": its["image_size"]})
        there = dataclasses.replace(data, mean=its["mean"], std=its["std"])
        h = features_of(encoder, data.test, how, there).images
        panels["representations"][label] = spectrum(h)
        if its["projector"]:
            with torch.no_grad():
                z = its["projector"].to(args.device)(h)
            z = F.normalize(z) if str(its["method"]).startswith(UNIT) else z
            panels["projections"][label] = spectrum(z)
    return panels


def spectrum(features):
    """Eigenvalues [F] of the covariance of features [N, F], the largest first, as shares of their
    sum; what is rounding is 0. And the rank, of the same definition as in a run's log."""
    covariance = features.cpu().double().T.cov(correction=0)  # Apple's GPUs have no float64
    values = torch.linalg.eigvalsh(covariance).flip(0)
    values = values.where(values > 1e-12 * values[0], 0)
    return values / values.sum().clamp(min=1e-300), common.collapse_figures(features)["rank"]


def new_figure(width, height, title, caption, rows=1, columns=1):
    """A figure of so many inches with a title above and a caption below its panels; and these."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(one_line(title), x=0.01, ha="left", fontsize=14, wrap=True)
    figure.supxlabel(one_line(caption), x=0.01, ha="left", fontsize=10, wrap=True)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def one_line(text, most=400, instead=None):
    """The text in one line, without its end where it is longer, and no formula to matplotlib. What
    its font lacks is left out, or makes it `instead`."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font, whole = get_font(findfont(FontProperties())), " ".join(text.split())
    text = "".join(letter for letter in whole if font.get_char_index(ord(letter)))
    if instead and (not text or text != whole):
        return instead
    text = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def short(classes, most):
    """Names for a picture; the number of a class whose name it cannot show."""
    return [one_line(name, most, f"class {k}") for k, name in enumerate(classes)]


def draw_image(axes, image, x, y, side, color=None, style="-"):
    """An image, float [3, S, S] in [0, 1], its lower left corner at (x, y), perhaps framed."""
    from matplotlib.patches import Rectangle

    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + side, y, y + side))
    if color:
        axes.add_patch(Rectangle((x, y), side, side, lw=3, fill=False, ec=color, ls=style))


def neighbors_picture(images, labels, train_images, train_labels, classes, title):
    """Test images, float [R, 3, S, S] in [0, 1], each in a row with its K nearest training images,
    [R, K, 3, S, S], in frames that tell whether their class, of labels [R, K], is the same."""
    (rows, count), same = train_labels.shape, train_labels == labels[:, None]
    caption = "Left: test images. Then their nearest training images by the cosine of features; "
    caption += f"{int(same.sum())} of these {same.numel()}, {same.double().mean():.0%}, are of the "
    caption += "test image's class (blue, solid frames), the others not (orange, dashed)."
    figure, (axes,) = new_figure(max(7, count + 1.5), max(4, 1.2 * rows + 1.6), title, caption)
    axes.axis("off")
    tiles = torch.cat([images[:, None], train_images], 1)
    numbers, names = torch.cat([labels[:, None], train_labels], 1), short(classes, 13)
    for row, column in itertools.product(range(rows), range(count + 1)):
        x, y = column + 0.3 * (column > 0), -1.2 * row
        number, how = numbers[row, column], {"fontsize": 8, "ha": "center", "va": "top"}
        color, style = (BLUE, "-") if number == labels[row] else (ORANGE, (0, (2, 1)))
        draw_image(axes, tiles[row, column], x, y, 0.8, color if column > 0 else None, style)
        axes.text(x + 0.4, y - 0.08, names[number], **how)
    axes.set(xlim=(-0.2, max(count + 1.3, 6)), ylim=(0.8 - 1.2 * rows, 1))
    return figure


def map_picture(images, labels, points, coordinates, classes, title):
    """Of images, float [N, 3, S, S] in [0, 1], those that do not lie on each other, each at its
    point [N, 2] in a frame of its class's colour."""
    from matplotlib.patches import Patch

    colored, side, shown = len(classes) <= 10, 0.05, []  # matplotlib's colours: C0 to C9
    caption = "Images that the network takes for alike lie close together; where one would lie on "
    caption += "another, one is shown. "
    caption += "Frames: the class." if colored else f"{len(classes)} classes: too many for colours."
    figure, (axes,) = new_figure(11, 12, title, caption)
    for i in torch.randperm(len(points), generator=common.generator(0, "map", 0)).tolist():
        x, y = points[i].tolist()
        if all(max(abs(x - a), abs(y - b)) > 1.15 * side for a, b in shown):
            shown.append((x, y))
            draw_image(axes, images[i], x, y, side, f"C{labels[i]}" if colored else PALE)
    axes.set(xlim=(-0.02, 1.07), ylim=(-0.02, 1.07), xticks=[], yticks=[])
    axes.set(xlabel=coordinates[0], ylabel=coordinates[1])
    if colored:
        handles = [Patch(color=f"C{k}") for k in range(len(classes))]
        axes.legend(handles, short(classes, 24), ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def spectrum_picture(curves, title):
    """{panel: {label: (spectrum [F], rank)}}, of the same look for the same label."""
    labels = list(dict.fromkeys(itertools.chain(*curves.values())))
    caption = "Along how many directions do features vary? Each one's share of the variance, the "
    caption += "largest first; on the lower edge what is less, or zero. A fast fall: few "
    caption += "directions carry all. Vertical lines: the rank, which counts those in use."
    width, height = 7 * len(curves), 5.5 + 0.3 * len(labels)
    figure, panels = new_figure(width, height, title, caption, columns=len(curves))
    for axes, (panel, lines) in zip(panels, curves.items(), strict=True):
        for label, (values, rank) in lines.items():
            number = labels.index(label)
            how = {"color": f"C{number}", "linestyle": DASHES[number % 4]}
            label = f"{one_line(label, 50)}: rank {rank:.1f} of {len(values)}"
            axes.plot(range(1, len(values) + 1), values.clamp(min=1e-10), label=label, **how)
            axes.axvline(rank, lw=1, **how)
        axes.set(yscale="log", ylim=(1e-10, 1), title=panel)
        axes.set(xlabel="direction, by its variance", ylabel="share of the whole variance")
        axes.grid(color=PALE)
        axes.legend(**BELOW)
    return figure


def confusion_picture(counts, classes, title):
    """counts int64 [C, C] of images by true and predicted class; the 20 most confused of more."""
    wrong = counts - counts.diag().diag()
    mistakes = wrong.sum(0) + wrong.sum(1)  # in which a class takes part
    known = mistakes.argsort(descending=True, stable=True)[:20].sort().values
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1))[known][:, known]
    names, n = [short(classes, 24)[k] for k in known.tolist()], len(known)
    total = int(counts.sum())
    title += f": {int(counts.diag().sum()) / total:.1%} of {total} images correct"
    caption = "Percent of the images of a true class (blank: under 0.5). Diagonal: correct."
    few = f" Of {len(counts)} classes the {n} most confused, so rows need not add up to 100."
    side = max(7, 3 + 0.45 * n)
    figure, (axes,) = new_figure(side, side + 0.6, title, caption + few * (n < len(counts)))
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, j in itertools.product(range(n), range(n)):
        value = float(share[i, j])
        if value >= 0.005 or i == j:
            ink = "white" if value > 0.5 else "black"
            axes.text(j, i, f"{100 * value:.0f}", color=ink, ha="center", va="center")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.xaxis.set(ticks_position="top", label_position="top")
    return figure


def curves_picture(runs):
    """CURVES by epoch, of folders with a log.jsonl, as far as a log has them."""
    caption = "Losses of different methods do not compare. kNN: higher is better. Where z, the "
    caption += "projections, collapse to a point, z_std falls to 0; to a line, z_rank falls to 1."
    figure, panels = new_figure(11, 9 + 0.15 * len(runs), "Runs by epoch", caption, 2, 2)
    for number, path in enumerate(Path(run, "log.jsonl") for run in runs):
        check(path.is_file(), f"{path}: no such file")
        with common.readable(path, "not a readable log"):
            log = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            lines = [[(x["epoch"], x[key]) for x in log if key in x] for key in CURVES]
        check(log, f"{path} is empty")
        how = {"color": f"C{number}", "linestyle": DASHES[number % 4], "marker": "."}
        how["label"] = one_line(path.resolve().parent.name, 50)
        for axes, points in zip(panels, lines, strict=True):
            axes.plot(*zip(*points, strict=True), **how)
    for axes, title in zip(panels, CURVES.values(), strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=PALE)
    panels[2].legend(*panels[0].get_legend_handles_labels(), ncols=2, **BELOW)
    return figure


def write_pictures(pictures, folder):
    for name, figure in pictures:
        with common.atomic_write(folder / f"{name}.png") as file:
            figure.savefig(file, format="png")
        print(f"{folder / name}.png")


# --------------------------------------------------------------------------------------------------
# Whose encoder a file holds: a ResNet found by its structure, whatever it is wrapped in

OURS = ("encoder.pt", "checkpoint.pt")
ABOUT = ("arch", "stem", "image_size", "mean", "std")  # what an encoder needs beside its weights
STEM = ("stem_padding", "stem_max_pool", "stem_relu")  # what a file says only where it was told
# Parts of names that others have, Hugging Face most of them, and torchvision's.
NAMES = {"embedder.embedder.convolution.": "conv1.", "embedder.embedder.normalization.": "bn1."}
for _i in range(4):
    NAMES[f"encoder.stages.{_i}.layers."] = f"layer{_i + 1}."
    NAMES[f".layer.{_i}.convolution."] = f".conv{_i + 1}."
    NAMES[f".layer.{_i}.normalization."] = f".bn{_i + 1}."
NAMES |= {"shortcut.convolution.": "downsample.0.", "shortcut.normalization.": "downsample.1."}
NAMES |= {"shortcut.": "downsample."}
OVERRIDES = "key", "features", *ABOUT, *STEM
COPIES = set("momentum k ema key teacher target average lagging".split())


def load_encoder(path, **overrides):
    """(encoder, info): the ResNet in a checkpoint, ours or anybody's, from [B, 3, S, S] to [B, F],
    in eval mode, and what is known of it. Of a folder encoder.pt is taken.

    overrides: arch, stem (have to agree with the weights), image_size, mean, std, stem_padding,
    stem_max_pool; key, a part of the prefix where there are several; features="projector", for
    encoder and projector of a checkpoint.pt of ours. info: these and method, dataset, epoch;
    "found", what was taken and ignored; "projector", or None; "assumed", what nobody says (then 224
    pixels, or 32 with the small stem, ImageNet's statistics, a small stem as ours). InputError, one
    line, for anything else."""
    unknown = sorted(overrides.keys() - set(OVERRIDES))
    check(not unknown, f"load_encoder has no {', '.join(unknown)}; it has {', '.join(OVERRIDES)}")
    path = file_of(path)
    saved = read(path)
    tensors = tensors_in(saved)
    sharded = [name for name, value in tensors.items() if hasattr(value, "placements")]
    check(not sharded, f"{path} holds shards, as {sharded[:1]}: save the full state_dict")
    chosen = choose(tensors, path, overrides.get("key"))
    saved = saved if isinstance(saved, dict) else {}
    ours = all(name in saved for name in ABOUT)
    about = saved if ours else {"method": path.name, "epoch": saved.get("epoch")}
    said = {name: about[name] for name in ABOUT + STEM if name in about}
    given = {name: overrides.get(name) for name in ABOUT + STEM}
    said |= {name: value for name, value in given.items() if value not in (None, "auto")}
    info = completed(said, chosen, path, ours)
    for name, kind in ("method", str), ("dataset", str), ("config", dict), ("epoch", int):
        info[name] = about[name] if isinstance(about.get(name), kind) else None
    info["config"] = info["config"] or {}
    taken = set(map(id, chosen.weights.values()))
    rest = [name for name, value in tensors.items() if id(value) not in taken]
    some = f", such as {rest[0]}" if rest else ""
    info["found"] = f"{chosen.arch}, {chosen.stem} stem, under {chosen.prefix!r}: all of its "
    info["found"] += f"{len(chosen.weights)} tensors; ignored: {len(rest)}{some}"
    encoder = network(info)
    encoder.load_state_dict(encoder.state_dict() | chosen.weights)
    info["projector"] = layers = projector_of(chosen, tensors) if ours else None
    if overrides.get("features") == "projector":
        check(layers, f"{path}: no projector; --features projector takes a checkpoint.pt of ours")
        info["found"] += "; then the projector"
        encoder = nn.Sequential(collections.OrderedDict(encoder=encoder, projector=layers)).eval()
        encoder.num_features = layers[-1].out_features
    return encoder, info


def overrides_of(args):
    return {name: value for name, value in vars(args).items() if name in OVERRIDES}


def file_of(path):
    return Path(path, OURS[0]) if Path(path).is_dir() else Path(path)


def network(info):
    """The ResNet that info describes, in eval mode, with random weights."""
    encoder = common.resnet(info["arch"], info["stem"]).eval()
    padding, max_pool, relu = (info.get(name) for name in STEM)
    if padding is not None:
        encoder.conv1.padding = padding, padding
    if max_pool is not None:
        encoder.maxpool = nn.MaxPool2d(3, 2, 1) if max_pool else nn.Identity()
    if relu is False:
        encoder.relu = nn.Identity()
    return encoder


STRANGE = {  # what a file begins with: what it is
    rb"(\xef\xbb\xbf)?\s*<": "a web page: download the file itself",
    rb"version https://git-lfs": "a git-lfs pointer: git lfs pull fetches the file itself",
    rb"\x08.\x12": "an ONNX model: take the PyTorch checkpoint that it was made from",
}


def read(path):
    """What torch.save wrote, of plain values alone; InputError for all else: no code is run."""
    check(path.is_file(), f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(1000)
    for sign, what in STRANGE.items():
        check(not re.match(sign, start, re.DOTALL), f"{path} is {what}")
    inside = []
    with contextlib.suppress(Exception):  # no zip file, or a damaged one, is for load_file to name
        inside = zipfile.ZipFile(path).namelist()
    script = "TorchScript: save the state_dict of the model that it was made from"
    check(not any("/code/" in name for name in inside), f"{path} is {script}")
    with torch.serialization.safe_globals(harmless()):
        return common.load_file(path)


def harmless():
    """What torch.load may call beside its own: it makes values alone. numpy 1 and 2, and pathlib of
    Python 3.13, have other names for the same."""
    found = [argparse.Namespace, list, dict, int, float, str, bool, np.dtype, np.ndarray]
    found.append((lambda *kind: {}, "collections.defaultdict"))
    found += {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + "efd"}
    for value, name in (np.float32(), "scalar"), (np.zeros(0), "_reconstruct"):
        function = value.__reduce__()[0]
        found += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    for module, system in itertools.product(("pathlib", "pathlib._local"), ("Posix", "Windows")):
        found.append((PurePosixPath, f"{module}.{system}Path"))
    return found


def tensors_in(saved):
    """Every tensor in dicts, lists and tuples, by its keys joined with dots, sorted."""
    found, todo = {}, [("", saved)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.is_cpu and not value.is_quantized:
                found[name] = value
        elif isinstance(value, list | tuple | dict):
            parts = value if isinstance(value, dict) else {str(i): x for i, x in enumerate(value)}
            parts = {key: part for key, part in parts.items() if isinstance(key, str)}
            todo += [(f"{name}.{key}" if name else key, part) for key, part in parts.items()]
    return dict(sorted(found.items()))


SIGNS = {  # parts of names that torchvision's ResNets do not have: what they tell
    r"(?<!\d\.)(conv1|stem)\.\d+\.": "a stem that is an nn.Sequential",
    r"\.filt$": "blur-pool",
}


def choose(tensors, path, key):
    """The one whole encoder, by its name the original and not a moving average of it."""
    found = list(candidates_in(tensors))
    check(found, f"{path}: no whole encoder: no convolution of three channels, named conv1 or 0")
    if key is not None:
        known = ", ".join(dict.fromkeys(repr(one.prefix) for one in found))
        exact = [one for one in found if one.prefix.strip(".") == key.strip(".")]
        found = exact or [one for one in found if key.strip(".") in one.prefix]
        check(found, f"{path}: --key {key} is in none of {known}")
    best = min(found, key=lambda one: len(one.wrong))
    text = f"{path}: no whole encoder: as a {best.arch}, what is under {best.prefix!r} has "
    text += f"{len(best.wrong)} tensors missing, misshapen or too many: {', '.join(best.wrong[:3])}"
    for sign, what in SIGNS.items():
        names = [name for name in tensors if re.search(sign, name)]
        text += f"; {names[0]} tells of {what}" if names else ""
    check(not best.wrong, f"{text}; only torchvision's own ResNets are taken")
    whole = [one for one in found if not one.wrong]
    words = {one.prefix: set(re.split(r"[._]", one.prefix.lower())) for one in whole}
    whole = [one for one in whole if not words[one.prefix] & COPIES] or whole
    whole = [one for one in whole if "student" in words[one.prefix]] or whole
    first, *others = sorted(whole, key=lambda one: len(one.prefix))
    others = [one for one in others if differ(one, first)]
    names = ", ".join(repr(one.prefix) for one in (first, *others))
    check(not others, f"{path}: several encoders, {names}: choose with --key")
    return first


def differ(one, other):
    pairs = [(one.weights.get(name), value) for name, value in other.weights.items()]
    return not all(a is not None and torch.equal(a, b) for a, b in pairs)


# A ResNet below a prefix. first: layer1's number, if any. weights: {torchvision's name: tensor}.
# wrong: names of what is missing, misshapen, or where no ResNet has any.
Candidate = collections.namedtuple("Candidate", "prefix first arch stem weights wrong")


def candidates_in(tensors):
    """A Candidate for each architecture at each place that has a first convolution, of three
    channels. The place of layer1 in an nn.Sequential tells what is before it: ReLU and max-pool
    have places of their own, so at 3 there is no max-pool, and at 2 no ReLU either."""
    known = {}
    for name, value in tensors.items():
        if not name.endswith(("total_ops", "total_params")):  # counted by thop
            known[functools.reduce(lambda x, pair: x.replace(*pair), NAMES.items(), name)] = value
    for name, value in known.items():
        start = re.fullmatch(r"(|.*\.)(conv1|0)\.weight", name, re.DOTALL)
        if not start or value.ndim != 4 or value.shape[1] != 3:
            continue
        prefix, stem = start[1], "small" if value.shape[2] == 3 else "imagenet"
        below = {k.removeprefix(prefix): v for k, v in known.items() if k.startswith(prefix)}
        for first in [None] if start[2] == "conv1" else (4, 3, 2):
            found = below if first is None else named_layers(below, first)
            for arch in common.ARCHITECTURES:
                yield Candidate(prefix, first, arch, stem, *fitted(found, shapes_of(arch, stem)))


def named_layers(numbered, first):
    """Tensors of an nn.Sequential with layer1 at number `first`, by torchvision's names."""
    heads = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    parts = {name.partition("."): value for name, value in numbered.items()}
    return {heads.get(head, head) + dot + rest: x for (head, dot, rest), x in parts.items()}


def fitted(found, expected):
    """The tensors whose name and shape are those of a ResNet, and the names of what is wrong."""
    inside = [name for name in found if re.match(r"(conv1|bn1|layer\d)\.|.*\.filt$", name)]
    wrong = [name for name in inside if found[name].shape != expected.get(name)]
    wrong += [name for name in expected if name not in found]
    right = {name: found[name] for name in expected if name in found and name not in wrong}
    return right, [name for name in wrong if "num_batches" not in name]  # a counter of no use


@functools.cache
def shapes_of(arch, stem):
    """{name: shape} of the tensors of a ResNet."""
    with torch.device("meta"):
        return {name: x.shape for name, x in common.resnet(arch, stem).state_dict().items()}


def completed(said, chosen, path, ours):
    """What file and flags say of an encoder, checked, and where they say nothing, assumed."""
    info = {"arch": chosen.arch, "stem": chosen.stem} | said
    for name, seen in ("arch", chosen.arch), ("stem", chosen.stem):
        text = f"{path}: {name} is {seen} by its weights, not {info[name]!r}: --{name}"
        check(info[name] == seen, text)
    small, numbered = chosen.stem == "small", chosen.first in (2, 3)
    default = {"image_size": 32 if small else 224}
    default |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD}
    default |= {"stem_padding": 1 if small else 3, "stem_max_pool": not small and not numbered}
    default |= {"stem_relu": chosen.first != 2}
    unsaid = [name for name in default if info.get(name) is None]
    info |= {name: default[name] for name in unsaid}
    known = STEM if ours or not small else STEM[1:] if numbered else STEM[2:]
    info["assumed"] = [name for name in unsaid if name not in known]
    unusable = "unusable statistics or size; --mean, --std, --image-size replace them"
    with common.readable(path, unusable):
        values = torch.tensor([info["mean"], info["std"]], dtype=torch.float64).view(2, 3)
    right = values.isfinite().all() and min(values[1]) > 0 and info["stem_padding"] in range(10)
    right = right and type(info["image_size"]) is int and 8 <= info["image_size"] <= 4096
    check(right, f"{path}: {unusable}")
    info["mean"], info["std"] = values.tolist()
    return info


def projector_of(chosen, tensors):
    """Our own projector, common.mlp's, or None where there is none like that."""
    start = chosen.prefix.removesuffix("backbone.") + "projector."
    parts = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    matrices = [value for value in parts.values() if value.ndim == 2]
    if not matrices:
        return None
    widths = [matrices[0].shape[1], *map(len, matrices)]
    for batch_norm, bias, last_bias in itertools.product((True, False), repeat=3):
        with torch.device("meta"):  # nothing is drawn
            layers = common.mlp(*widths, batch_norm=batch_norm, bias=bias, last_bias=last_bias)
        with contextlib.suppress(RuntimeError):  # keys or shapes differ
            layers.load_state_dict(parts, assign=True)
            return layers.eval()
    return None


def with_projector(path, **overrides):
    """load_encoder; to encoder.pt the projector of the checkpoint.pt beside it, of the same run."""
    encoder, info = load_encoder(path, **overrides)
    beside = Path(path).with_name(OURS[1])
    if Path(path).name == OURS[0] and beside.is_file():
        other, its = load_encoder(beside)
        if all(map(torch.equal, other.state_dict().values(), encoder.state_dict().values())):
            info["projector"] = its["projector"]
    return encoder, info


# --------------------------------------------------------------------------------------------------
# Command line

S004 = {"lr": 0.5, "standardize": False}  # A.3
S004 |= {"lr_floor": 1e-3, "weight_decay": 1e-4}  # from A.1 and the released code
AUGMENTS = {"crops": {}, "crop_flip": {"pad": 4}}  # as in supcon_tcl.py
AUGMENTS |= {"autoaugment": {"pad": 4, "policy": "cifar10"}}
PRESETS = {
    "default": {"epochs": 100, "batch_size": 256, "lr": 0.02, "lr_floor": 0.01}
    | {"weight_decay": 0.0, "standardize": True, "crop_min": 0.08},
    "shapes": {"epochs": 20, "crop_min": 0.4},
    "finetune": {"epochs": 20, "lr": 0.2},  # S003 B.2.5
    "s001": {"epochs": 50},  # 5.7.2-4: linear on another dataset, or finetune; it gives no rates
    # 5.2.5. Images no larger than the views are enlarged by 8/7 and cropped, B.1.2: features_of.
    "s003": {"epochs": 100, "lr": 0.2, "standardize": False},  # for ImageNet-1K it has others
    "s004": {"epochs": 100, **S004},  # A.3, which says nothing of crops: as above
    # A.1, into which s004 turns for what supcon_tcl.py trained with labels: the contrastive batch
    "s004_labels": {"epochs": 50, "batch_size": 128, "augment": "autoaugment", **S004},
    "cifar100 s004_labels": {"batch_size": 256},
    "imagenet100 s004_labels": {"batch_size": 256},
    "fashion_mnist s004_labels": {"augment": "crop_flip"},
}


# fmt: off
def parser():
    p, switch = common.Parser(__doc__.splitlines()[0], "evaluation"), argparse.BooleanOptionalAction
    g = p.groups["most used"]
    g.add_argument("--checkpoint", help="encoder.pt, checkpoint.pt, or: random")
    g.add_argument("--protocol", choices=("linear", "knn", "finetune"), default="linear",
                   help="frozen features, neighbours, or all trained together")
    g.add_argument("--cached", action="store_true", help="compute features once, no augmentation")
    g.add_argument("--recipe", choices=("s001", "s003", "s004", "s004_labels"), help="of a thesis")
    p.add_argument("--key", help="a part of the encoder's prefix, where a file holds several")
    p.add_argument("--mean", type=float, nargs=3, help="of the channels; default: as for --std")
    p.add_argument("--std", type=common.positive, nargs=3, help="default: the file's, else assumed")
    p.add_argument("--stem-padding", type=common.number(int, 0, 9), help="2 in solo-learn's CIFAR")
    p.add_argument("--stem-max-pool", action=switch, help="behind a 3x3 stem; default: none there")
    p.add_argument("--features", choices=("encoder", "projector"), default="encoder",
                   help="what is evaluated; the projector is in our own checkpoint.pt")
    p.add_argument("--export", metavar="FILE", help="write the encoder as an encoder.pt, no more")
    common.shared_arguments(p)
    p.set_defaults(arch=None)  # the checkpoint knows
    p.add_argument("--label-fraction", type=common.number(float, 1e-6, 1), default=1.0,
                   help="of the training images of each class, for every protocol")
    p.add_argument("--seeds", type=common.number(int, 1, 10), default=1, help="to repeat it with")
    p.add_argument("--epochs", type=common.count, help="of the classifier")
    p.add_argument("--batch-size", type=common.count, help="of the classifier")
    p.add_argument("--lr", type=common.positive, help="initial, of the classifier")
    p.add_argument("--lr-floor", type=common.fraction, help="last rate / first, for linear")
    p.add_argument("--encoder-lr", type=common.positive, default=0.005, help="for finetune, S003")
    p.add_argument("--momentum", type=common.fraction, default=0.9, help="of SGD")
    p.add_argument("--weight-decay", type=common.number(float, 0), help="of SGD")
    p.add_argument("--standardize", action=switch, help="features, for the linear classifier")
    p.add_argument("--crop-min", type=common.number(float, 1e-3, 1), help="share of the area")
    p.add_argument("--augment", choices=AUGMENTS, default="crops", help="images, for a classifier")
    p.add_argument("--validation-fraction", type=common.fraction, default=0.0,
                   help="measure on this share of the training images, held out, instead of test")
    p.add_argument("--untrained", action=switch, default=True, help="measure one, and pixels, too")
    p.add_argument("--pictures", action="store_true", help="draw four; needs matplotlib")
    p.add_argument("--map", choices=("pca", "tsne"), default="pca", help="tsne: needs scikit-learn")
    p.add_argument("--curves", nargs="+", metavar="RUN", help="draw the logs of runs, no more")
    p.add_argument("--compare", nargs="+", default=[], help="more checkpoints for spectrum.png")
    return p
# fmt: on


def arguments():
    args = common.parse_args(parser(), PRESETS, "protocol", "recipe")
    if args.recipe == "s004" and args.checkpoint not in (None, "random"):
        _, info = load_encoder(args.checkpoint, **overrides_of(args))
        if info["config"].get("self_supervised") is False:  # trained with labels
            words = [*sys.argv[1:], "--recipe", "s004_labels"]
            args = common.parse_args(parser(), PRESETS, "protocol", "recipe", argv=words)
    check(args.checkpoint or args.curves, "--checkpoint is required: a file, or random")
    needed = {"matplotlib": args.pictures or args.curves, "scikit-learn": args.map == "tsne"}
    for package in filter(needed.get, needed):  # hours later would be a bad time to miss it
        there = importlib.util.find_spec(package.replace("scikit-", "sk"))
        check(there, f"the pictures need {package}: pip install {package}")
    if args.curves:
        return args
    args.checkpoint = str(file_of(args.checkpoint))
    check(args.key is None or args.checkpoint != "random", "--key is for files, not for random")
    linear, tuned = args.protocol == "linear", args.protocol == "finetune"
    on_features = "--cached", "--lr-floor", "--standardize", "--no-standardize"
    common.only_for(linear, "--protocol linear", *on_features)
    common.only_for(tuned, "--protocol finetune", "--encoder-lr")
    common.only_for(args.pictures, "--pictures", "--compare", "--map")
    if args.cached and args.augment != "crops":
        print(f"--cached: features of images as they are, without --augment {args.augment}")
        args.augment = "crops"
    fits = args.recipe is None or linear or (tuned and args.recipe == "s001")
    check(fits, f"--recipe {args.recipe} is for linear; finetune without one is S003's, or s001")
    plain = args.features == "encoder"
    check(plain or not (tuned or args.export), "--features projector is not for that")
    args.compare = [str(file_of(path)) for path in args.compare]
    for path in args.compare:
        load_encoder(path)
    common.resolve_hardware(args)
    return args


def the_encoder(args):
    """(encoder, info, data) of --checkpoint and --dataset. Fills in what args say of an encoder."""
    untrained = args.checkpoint == "random"
    if not untrained:  # before the data: the cheaper thing to be wrong about
        encoder, info = load_encoder(args.checkpoint, **overrides_of(args))
        print(f"{args.checkpoint}: {info['found']}")
    data = common.load_once(args)
    print(*data.found, sep="\n")
    if untrained:
        check(args.features == "encoder", "--features projector needs a checkpoint.pt")
        encoder, info = random_encoder(args, data)
    elif info["stem"] == "small":  # trained on images such as these, most likely
        like = {"image_size": data.size, "mean": data.mean, "std": data.std}
        info |= {name: like[name] for name in info["assumed"] if name in like}
    say_assumed(info)
    for name in ("image_size", "arch", "stem", *STEM[:2]):
        setattr(args, name, info[name])
    if data.size != args.image_size:
        print(f"{data.name}: {data.size} pixels, seen at the {args.image_size} of the encoder")
    data = dataclasses.replace(data.to(args.device), mean=info["mean"], std=info["std"])
    return encoder.requires_grad_(False), info, data


def say_assumed(info):
    assumed = info["assumed"]
    if assumed:
        print("assumed:", ", ".join(f"{name} {info[name]}" for name in assumed))
    if "stem_padding" in assumed:
        print("solo-learn's CIFAR models need --stem-padding 2")
    if "stem_max_pool" in assumed:
        print("several STL-10 and Tiny ImageNet models need --stem-max-pool")


def export(args):
    """Writes what was found in a checkpoint as an encoder.pt."""
    encoder, info = load_encoder(args.checkpoint, **overrides_of(args))
    check(not Path(args.export).exists(), f"{args.export} is there already")
    say_assumed(info)
    saved = {name: info[name] for name in (*ABOUT, *STEM, "method", "dataset", "epoch", "config")}
    save(saved | {"state_dict": encoder.state_dict()}, Path(args.export))
    print(f"{args.export}: {info['found']}")


def the_images(data, args):
    """(data, kind): with what is held out, and what data.test, which the figures are of, is."""
    fraction, count, kind = args.validation_fraction, len(data.classes), "test"
    for split in filter(None, (data.train, data.test)):
        check(split.labels.min() >= 0, f"{data.name}: evaluation needs a label for every image")
    if fraction > 0:
        held, rest = drawn(data.train, fraction, count, args.seed, "validation")
        check(len(held) and len(rest), f"--validation-fraction {fraction} leaves a part empty")
        train, test, kind = data.train.take(rest), data.train.take(held), "validation"
        data = dataclasses.replace(data, train=train, test=test)
    check(data.test, f"{data.name} has no test split: hold images out by --validation-fraction 0.1")
    check(count > 1, f"{data.name} has a single class: nothing to tell apart")
    return data, kind


def the_file(data, args):
    """Where the figures go: beside the checkpoint, or in a folder of its own."""
    path = Path(args.checkpoint)
    if args.checkpoint == "random":
        path = Path(f"runs/random_{data.name}_{args.arch}") / OURS[0]
    words = [args.protocol, args.recipe, "projector" * (args.features == "projector")]
    words += [re.sub(r"[^\w.-]", "-", args.key or "").strip(".")]
    words += [f"{args.seeds}-seeds" * (args.seeds > 1)]
    words += [f"{args.label_fraction:g}" * (args.label_fraction < 1), "cached" * args.cached]
    words += ["validation" * (args.validation_fraction > 0), data.name]
    words += [path.stem * (path.name not in OURS)]
    common.on_first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    check(os.access(path.parent, os.W_OK), f"{path.parent}: no permission to write")
    return path.with_name("_".join(filter(None, words)) + ".json")


def save(value, path):
    with common.atomic_write(path) as file:
        torch.save(value, file)


def main():
    args = arguments()
    if args.curves:
        pictures = [("curves", curves_picture(args.curves))]
        return common.on_first(lambda: write_pictures(pictures, Path(args.curves[0])))
    if args.export:
        return common.on_first(lambda: export(args))
    encoder, info, data = the_encoder(args)
    data, kind = the_images(data, args)
    some = labelled(data.train, args.label_fraction, len(data.classes), args.seed)
    file, whole = the_file(data, args), len(data.train)
    if len(some) < whole:
        print(f"labels of {len(some)} of {whole} training images, {args.label_fraction:g} of each")
    if args.protocol != "knn":
        args.batch_size = fitting_batch_size(len(some), args)
    start = time.time()
    measured = every_seed(encoder, data, args)
    seconds = round(time.time() - start, 1)
    others = baselines(info, data, args) if args.untrained else {}
    what = named(info) + ", projector" * (args.features == "projector")
    print(f"\n{what}, {args.arch}, {args.stem} stem: ", end="")
    print(f"{data.name}, {len(data.test)} {kind} images of {args.image_size} pixels")
    result = {"protocol": args.protocol, "dataset": data.name, "split": kind}
    result |= {"features": args.features, "cached": args.cached, "seeds": args.seeds}
    result |= {"label_fraction": args.label_fraction, "labelled_images": len(some)}
    result |= table(measured, others, data) | {"images": len(data.test), "seconds": seconds}
    result |= {"method": info["method"], "epoch": info["epoch"], **common.describe(args)}
    result |= {key: info[key] for key in ("found", "assumed") if key in info}
    common.on_first(lambda: common.write_json(result, file))
    if measured.classifier:
        saved = {name: value.cpu() for name, value in measured.classifier.items()}
        saved |= {"classes": [str(name) for name in data.classes]}
        common.on_first(lambda: save(saved, file.with_name(f"{file.stem}_classifier.pt")))
    if args.pictures:
        pictures = list(draw_pictures(what, info, measured, args))
        common.on_first(lambda: write_pictures(pictures, file.parent))
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
