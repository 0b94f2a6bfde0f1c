# SPDX-License-Identifier: MIT
"""Evaluate a saved encoder: a classifier on its frozen features, nearest neighbours, fine-tuning.

linear   The encoder stays frozen, in eval mode: its tensors are compared bit for bit before and
         after. A linear layer is trained on its output with SGD, momentum .9, no weight decay,
         batches of 256, 100 epochs, random resized crops and flips (S003 5.2.5 and B.1.2), cosine
         from lr .02 to .0002. Unlike there, features are standardised, for which held-out training
         images of CIFAR-10 preferred .02 to S003's .2. With --cached features are computed once,
         without augmentation: minutes, not hours, on a CPU. On shapes, 20 epochs, crops from .4.
knn      Weighted nearest neighbours by cosine (Wu et al. 2018); the others report them as well.
finetune Encoder and classifier are trained together, 20 epochs, the encoder with a rate of its own,
         --encoder-lr .005, in steps (S003 B.2.5, whose rates 20 and 30 of the classifier are for
         features that are not standardised; here .2).

--label-fraction .01 or .1 lets all of them use the labels of that share of each class alone;
--seeds 3 repeats all but the encoder's training, for a confidence interval; of several --lr the
best on a tenth of the training images, held out, is taken.

--recipe s003  linear: lr .2 to .002, features not standardised (for ImageNet-1K S003 has others)
         s004  linear: lr .5 (S004 A.3), not standardised; weight decay 1e-4 and the last rate, a
               thousandth, from A.1 and the released code; crops as above, of which A.3 says nothing
         s001  50 epochs, linear on another dataset or finetune (S001 5.7.2-4; it gives no rates)

Another --dataset than the encoder's is transfer: images are brought to the encoder's size and
normalised with its statistics, as in its training (InfoCL takes the new dataset's). The accuracy
is the last epoch's, on the test images, which nothing is chosen on. To choose anything, take
--validation-fraction, which measures on training images that it holds out.

Run: python linear_eval.py --checkpoint runs/simclr_cifar10_resnet18/encoder.pt --dataset cifar10

--checkpoint takes what the training scripts save, any other file with a whole ResNet, or: random.
Chapters: protocols, what a table says, pictures, whose encoder a file holds, command line.
"""

import argparse
import collections
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import textwrap
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import check

# --------------------------------------------------------------------------------------------------
# Protocols. Each gives scores [N, C] of the classes for the test images.


def measure(encoder, original, data, train, test, images, args):
    """{"knn" and the protocol: scores [N, C] of the test images}, and k and the rates taken. train,
    test: Splits with features [N, F] for images; images: those of test."""
    torch.manual_seed(args.seed)
    finite = train.images.isfinite().all() and test.images.isfinite().all()
    check(finite, f"{args.checkpoint}: its features are not finite")
    votes, k = common.knn_votes(train.spread(args.knn_bank), test, len(data.classes), args)
    scores, how = {"knn": votes}, {"knn_k": k}
    if args.protocol == "linear":
        scores["linear"], rates = linear_protocol(encoder, data, train, test, args)
        how |= rates
    if not all(torch.equal(v, original[key]) for key, v in encoder.state_dict().items()):
        raise RuntimeError("the encoder changed while it was evaluated")
    if args.protocol == "finetune":
        scores["finetune"] = finetune_protocol(encoder, data, train, images, args)
    return scores, how


def linear_protocol(encoder, data, train, test, args):
    """Scores of a linear classifier on the frozen encoder, and its learning rate."""
    several = len(args.lr) > 1
    rates = compared_rates(encoder, data, train, args) if several else {"lr": args.lr[0]}
    (classifier,) = linear_classifiers(encoder, data, train, [rates["lr"]], args)
    with torch.no_grad():
        return classifier(test.images), rates


def compared_rates(encoder, data, train, args):
    """The best --lr, and {rate: accuracy} of each, on a tenth of the training images, held out."""
    held, rest = drawn(data.train, 0.1, len(data.classes), args.seed, "learning rate")
    check(len(held), f"{len(data.train)} training images are too few to compare several --lr")
    part, args = dataclasses.replace(data, train=data.train.take(rest)), copy.copy(args)
    classifiers = linear_classifiers(encoder, part, train.take(rest), sorted(args.lr), args)
    held, found = train.take(held), {}
    with torch.no_grad():
        for rate, classifier in zip(sorted(args.lr), classifiers, strict=True):
            scores = classifier(held.images)
            accuracy, _ = common.top_accuracies(scores, held.labels)
            found[rate] = accuracy if scores.isfinite().all() else 0.0
    text = ", ".join(f"{rate:g} {accuracy:.2%}" for rate, accuracy in found.items())
    rate = min(found, key=lambda rate: (-found[rate], rate))  # the best, of equals the lowest
    print(f"--lr on {len(held)} held-out training images: {text}; taken: {rate:g}")
    return {"lr": rate, "lr_validation": found}


def linear_classifiers(encoder, data, train, rates, args):
    """For each rate a function from features of the frozen encoder to scores. train: features, with
    whose mean and deviation all are standardised, so that a rate fits encoders of any scale."""
    (mean, std), steps = standardisation(train.images), steps_of(data, args)
    if not args.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    cached = common.Split((train.images - mean) / std, train.labels)

    def batches(epoch):
        if args.cached:
            yield from common.training_batches(cached, epoch, args, [])
            return
        for x, labels in augmented(data, epoch, steps, args):
            with torch.no_grad(), common.autocast(args):
                h = encoder(x)
            yield (h.float() - mean) / std, labels

    heads = fit_linear(batches, train.images.shape[1], len(data.classes), steps, rates, args)
    return [lambda h, head=head: head((h - mean) / std) for head in heads]


def fit_linear(batches, num_features, num_classes, steps, rates, args):
    """A linear layer for each rate, all trained on the same batches(epoch), [B, F] and [B]."""
    heads = [new_head(num_features, num_classes, args) for _ in rates]
    pairs = zip(heads, rates, strict=True)
    groups = [{"params": head.parameters(), "base": rate} for head, rate in pairs]
    optimizer = torch.optim.SGD(groups, 0.1, args.momentum, 0, args.weight_decay, foreach=True)
    bar = common.Progress(args.epochs, steps, args.batch_size)
    for epoch in range(1, args.epochs + 1):
        bar.begin(epoch)
        total = 0.0
        for i, batch in enumerate(batches(epoch), 1):
            h, y = common.gather(batch)  # from all processes: each trains the same heads
            step = (epoch - 1) * steps + i - 1
            share = common.learning_rate(step, steps * args.epochs, 0, 1, args.lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * share
            losses = torch.stack([F.cross_entropy(head(h), y) for head in heads])
            losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total = total + losses.detach()
            bar.update(i, total.min())
        total = float(total.nan_to_num(math.inf).min())  # of the rates that get on
        check(math.isfinite(total), f"loss not finite in epoch {epoch}: try a lower --lr")
        if epoch % max(1, args.epochs // 5) == 0:
            bar.show(f"loss {total / steps:.4f}")
    return heads


def finetune_protocol(encoder, data, train, test, args):
    """Scores after encoder and classifier were trained together, in train mode, with rates that are
    a fifth and a tenth after each quarter of the epochs (S003 B.2.5). test: the images."""
    head, steps = new_head(encoder.num_features, len(data.classes), args), steps_of(data, args)
    model = Classifier(encoder.requires_grad_(True), head, *standardisation(train.images), args)
    model = common.synchronized(model, args).train()
    forward = common.distributed(model)
    groups = [{"params": encoder.parameters(), "lr": args.encoder_lr, "falls": 0.2}]
    groups += [{"params": head.parameters(), "lr": args.lr[0], "falls": 0.1}]
    optimizer = torch.optim.SGD(groups, 0.1, args.momentum, 0, args.weight_decay, foreach=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    bar = common.Progress(args.epochs, steps, args.batch_size)
    for epoch in range(1, args.epochs + 1):
        bar.begin(epoch)
        total = 0.0
        for i, (x, labels) in enumerate(augmented(data, epoch, steps, args), 1):
            loss = F.cross_entropy(forward(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total = total + loss.detach()
            bar.update(i, total)
        total = float(common.mean_over_processes(total))
        check(math.isfinite(total), f"loss not finite in epoch {epoch}: try lower rates")
        bar.show(f"loss {total / steps:.4f}")
        if epoch * 4 // args.epochs > (epoch - 1) * 4 // args.epochs:
            for group in optimizer.param_groups:
                group["lr"] *= group["falls"]
    model.eval()
    with torch.no_grad():
        return head(model.norm(common.encode(encoder, test, args, data)))


class Classifier(nn.Module):
    """Encoder, batch norm without parameters, which brings features of any scale to one, and a
    linear layer: [B, 3, S, S] -> scores [B, C]."""

    def __init__(self, encoder, head, mean, std, args):
        super().__init__()
        self.encoder, self.head, self.args = encoder, head, args
        self.norm = nn.BatchNorm1d(encoder.num_features, affine=False, device=args.device)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(std.square())

    def forward(self, x):
        with common.autocast(self.args):
            h = self.encoder(x)
        return self.head(self.norm(h.float()))


def new_head(num_features, num_classes, args):
    head = nn.Linear(num_features, num_classes).to(args.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def standardisation(features):
    """Mean and deviation [F] of features [N, F]; an all but dead feature stays small."""
    mean, std = features.mean(0), features.std(0)
    return mean, std.maximum(std.mean() / 100).clamp(min=1e-6)


def augmented(data, epoch, steps, args):
    """The batches of an epoch, cropped and mirrored at random: (views, labels)."""
    recipes = [common.Recipe((args.crop_min, 1.0), jitter_p=0, gray_p=0)]
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
    for i, (images, labels) in enumerate(common.training_batches(data.train, epoch, args, recipes)):
        rng = common.generator(args.seed, "linear", epoch * steps + i, args.device)
        yield *augment(images, rng), labels


def steps_of(data, args):
    """Steps in an epoch, for which --batch-size is made to fit the images and the processes. Of a
    few labels there are eight steps, or a rate meant for many would hardly move anything."""
    processes, most = common.world_size(), len(data.train)
    least = 2 * processes if args.protocol == "finetune" else processes  # for its batch norm
    size = min(args.batch_size, max(most // 8, least) if args.label_fraction < 1 else most)
    size -= size % processes
    few = f"{most} training images in batches of {size} are too few for --protocol {args.protocol}"
    check(least <= size <= most, f"{few}, which takes {least} at a time at least")
    if size < args.batch_size:
        print(f"{most} training images: batches of {size}")
    args.batch_size = size
    return most // size


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


def every_seed(encoder, data, test, args):
    """What the seeds measure on the images `test`: accuracies, {"knn" and the protocol: [(top-1,
    top-5) of each]}; how, [k and rates of each]; and the first one's scores and features."""
    original, found = copy.deepcopy(encoder.state_dict()), None
    queries, few = features_of(encoder, test, args, data), args.label_fraction < 1
    for seed in range(args.seed, args.seed + args.seeds):
        encoder.load_state_dict(original)  # fine-tuning changes it
        now = argparse.Namespace(**vars(args) | {"seed": seed})
        some = labelled(data.train, args.label_fraction, len(data.classes), seed)
        part = dataclasses.replace(data, train=some)
        train = features_of(encoder, some, args, data) if few or not found else found.train
        scores, how = measure(encoder, original, part, train, queries, test, now)
        if found is None:
            found = argparse.Namespace(scores=scores, train=train, test=queries, how=[])
            found.accuracies = {name: [] for name in scores}
        found.how.append(how)
        for name, value in scores.items():
            top1, top5 = common.top_accuracies(value, queries.labels)
            voters = how["knn_k"] if name == "knn" else math.inf
            top5 = top5 if voters >= min(5, len(data.classes)) else None  # k vote for k at most
            if name != "knn" or few or not found.accuracies[name]:  # the same for every seed
                found.accuracies[name].append((top1, top5))
    return found


def features_of(encoder, split, args, data):
    """The split with its features [N, F] for images."""
    return common.Split(common.encode(encoder, split, args, data), split.labels.to(args.device))


def labelled(split, fraction, num_classes, seed):
    """The images whose labels may be used, `fraction` of each class: 500 of CIFAR-10 for .01."""
    if fraction == 1:
        return split
    split = split.take(drawn(split, fraction, num_classes, seed, "labels")[0])
    missing = num_classes - len(split.labels.unique())
    check(not missing, f"--label-fraction {fraction} leaves {missing} classes without an image")
    return split


def random_encoder(args, data):
    """An untrained encoder for comparison: resnet18, or what the flags say."""
    size, arch = args.image_size or data.size, args.arch or "resnet18"
    stem = args.stem if args.stem != "auto" else "small" if size <= 64 else "imagenet"
    torch.manual_seed(args.seed)
    info = {"arch": arch, "stem": stem, "image_size": size, "mean": data.mean, "std": data.std}
    info |= {"method": "untrained", "epoch": 0, "dataset": None}
    return common.resnet(arch, stem).eval(), info


def untrained(data, test, args):
    """The accuracies of an untrained encoder of the same kind, a linear classifier's --cached."""
    print(f"an untrained {args.arch}, for comparison")
    like = {"cached": args.protocol == "linear", "seeds": 1, "checkpoint": "untrained"}
    args = argparse.Namespace(**vars(args) | like)
    encoder = random_encoder(args, data)[0].to(args.device, memory_format=torch.channels_last)
    return every_seed(encoder.requires_grad_(False), data, test, args).accuracies


def mean_and_interval(values):
    """The mean of n values and half the width of its 95 % confidence interval, None for one."""
    if None in values:
        return None, None
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    half = T95[n - 2] * float(values.std()) / n**0.5 if n > 1 else None
    return float(values.mean()), half


def table(measured, plain, data, args):
    """Prints the table; returns the same for the JSON object. plain: of an untrained encoder."""
    k, rows, result = measured.how[0]["knn_k"], [], {}
    before = ", before" * (args.protocol == "finetune")
    names = {"knn": f"kNN, k = {k}{before}", "finetune": "finetuned"}
    names["linear"] = "linear" + ", cached" * args.cached
    for what, found in measured.accuracies.items():
        pre = "knn_" if what == "knn" else ""
        (top1, half), (top5, _) = (mean_and_interval(column) for column in zip(*found, strict=True))
        result |= {f"{pre}top1": top1, f"{pre}top5": top5}
        remark = ""
        if half is not None:
            result |= {f"{pre}top1_ci95": half, f"{pre}top1_seeds": [top1 for top1, _ in found]}
            remark = f"top-1 ± {half:.2%} (95 %; {len(found)} evaluations of one encoder)"
        rows.append((names[what], top1, top5, remark))
    result |= measured.how[0] if args.seeds == 1 else {"knn_k": k, "each_seed": measured.how}
    names["linear"] = "linear, cached"
    for what, ((top1, top5),) in plain.items():
        result["untrained_" + ("knn_" if what == "knn" else "") + "top1"] = top1
        rows.append((f"untrained: {names[what]}", top1, top5, ""))
    rows.append(("chance", 1 / len(data.classes), min(1, 5 / len(data.classes)), ""))
    width = max(18, *(len(row[0]) for row in rows)) + 1
    print(f"{'':{width}}{'top-1':>8}{'top-5':>8}")
    for name, *accuracies, remark in rows:
        cells = [f"{'-':>8}" if x is None else f"{x:8.2%}" for x in accuracies]
        print(f"{name:{width}}{''.join(cells)}  {remark}".rstrip())
    return result


# --------------------------------------------------------------------------------------------------
# Pictures: what is in them, computed from features; then matplotlib's figures, which alone need it

INK, PALE, BLUE, ORANGE = "#222222", "#d8d8d8", "#005ab5", "#dc5f00"
COLORS = """#4363d8 #e6194b #3cb44b #f58231 #911eb4 #42d4f4 #f032e6 #9a6324 #000000 #bfef45
    #469990 #fabed4 #808000 #800000 #ffe119 #000075 #a9a9a9 #dcbeff #aaffc3 #ffd8b1""".split()
DASHES = "-", "--", ":", "-."
FRAMES = {True: {"ec": BLUE, "ls": "-"}, False: {"ec": ORANGE, "ls": (0, (2, 1))}}
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "handlelength": 1.2}


def draw_pictures(info, data, test, measured, args):
    """The four pictures, by name. data.train: the images that measured.train has features of."""
    of, classes = f"{named(info, args)}, {data.name}", [str(name) for name in data.classes]
    frozen = of + ", before fine-tuning" * (args.protocol == "finetune")
    labels, queries = test.labels.cpu(), measured.test.images
    chosen, nearest = nearest_images(queries, labels, measured.train.images)
    images = images_at(test, chosen, args)
    theirs = images_at(data.train, nearest.flatten(), args).unflatten(0, nearest.shape)
    known = labels[chosen], theirs, data.train.labels.cpu()[nearest]
    yield "neighbors", neighbors_picture(images, *known, classes, f"{frozen}: nearest neighbours")

    some = torch.arange(min(len(test), 1500)) * len(test) // min(len(test), 1500)
    features, name = queries[some.to(queries.device)], f"{frozen}: test images by their features"
    if args.map == "tsne":
        points, axes = tsne(features, args.seed), ("t-SNE, first coordinate", "second coordinate")
    else:
        points, shares = principal_components(features)
        axes = [f"principal component, {x:.0%} of the variance" for x in shares.tolist()]
    yield "map", map_picture(images_at(test, some, args), labels[some], points, classes, name, axes)

    curves = spectra(info, data, test, args)
    yield "spectrum", spectrum_picture(curves, f"{data.name}: spectrum of the covariance")

    pairs = labels * len(classes) + measured.scores[args.protocol].argmax(1).cpu()
    counts = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1)
    how = {"knn": "kNN", "linear": "linear", "finetune": "finetuned"}[args.protocol]
    yield "confusion", confusion_picture(counts, classes, f"{of}, {how}")


def named(info, args=None):
    """The encoder, for headings; or with args what is evaluated of it."""
    epoch = "" if info["epoch"] is None else f", epoch {info['epoch']}"
    projector = args is not None and args.features == "projector"
    return f"{info['method']}{epoch}{', projector' * projector}"


def images_at(split, index, args):
    """Images of a split as the encoder sees them, but in [0, 1]: float [n, 3, S, S] for [n]."""
    split = split.take(index)
    images = split.images
    if not split.in_memory:
        stream = common.decode(split, [(i, None) for i in range(len(split))], 256, args)
        images = torch.cat([crops[:, 0] for crops, _ in stream])
    return common.evaluation_view(images, args.image_size, (0, 0, 0), (1, 1, 1))


def nearest_images(test_features, test_labels, train_features, rows=10, count=8):
    """Test images, int64 [rows], evenly spaced among all as sorted by class, and for each the
    training images nearest by cosine, the nearest first, [rows, count]."""
    order, rows = test_labels.cpu().argsort(stable=True), min(rows, len(test_labels))
    chosen = order[torch.arange(rows) * len(order) // rows]
    queries = F.normalize(test_features[chosen.to(test_features.device)])
    cosine = queries @ F.normalize(train_features).T
    return chosen, cosine.topk(min(count, cosine.shape[1])).indices.cpu()


def principal_components(features):
    """The two coordinates [N, 2] in which features [N, F] vary most, and shares of variance [2]."""
    centred = features.double() - features.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    weights = vectors[:, -2:].flip(1)  # [F, 2]
    weights = weights * weights.gather(0, weights.abs().argmax(0, keepdim=True)).sign()
    shares = values.clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300)
    return (centred @ weights).cpu(), shares[-2:].flip(0).cpu()


def tsne(features, seed):
    """t-SNE's float32 [N, 2] of features [N, F]: S003 5.6's settings (but in two dimensions)."""
    from sklearn.manifold import TSNE

    check(len(features) > 3, f"--map tsne: {len(features)} images are too few")
    settings = {"perplexity": min(50, (len(features) - 1) / 3), "early_exaggeration": 12}
    points = TSNE(**settings, init="random", random_state=seed)
    return torch.from_numpy(points.fit_transform(features.cpu().numpy()))


def map_cells(points, cells):
    """{(column, row from above) in a grid, which they fill: index of one of the points [N, 2]}."""
    low, high = points.amin(0), points.amax(0)
    place = ((points - low) / (high - low).clamp(min=1e-12) * (cells - 1)).round().long()
    shown = {}
    for i in torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist():
        shown.setdefault((int(place[i, 0]), cells - 1 - int(place[i, 1])), i)
    return shown


def spectra(info, data, test, args):
    """{panel: {label: spectrum [F]}} of the test images by an untrained encoder, the evaluated one
    as it was saved, and those in --compare; projections where the run's checkpoint.pt is there."""
    panels = {"representations": {}, "projections": {}}
    for path in dict.fromkeys(["random", args.checkpoint, *args.compare]):
        if path == "random":
            encoder, its = random_encoder(args, data)
            label = f"untrained {args.arch}"
        else:
            mine = path == args.checkpoint
            encoder, its = load_encoder(path, **vars(args) | {"features": None} if mine else {})
            its |= {name: info[name] for name in its["assumed"]}
            label = named(its) if mine else f"{named(its)}, {path}"
        projector = its.get("projector") or projector_beside(path, encoder)
        encoder = encoder.to(args.device, memory_format=torch.channels_last)
        how = argparse.Namespace(**vars(args) | {"image_size": its["image_size"]})
        h = common.encode(
            encoder, test, how, dataclasses.replace(data, mean=its["mean"], std=its["std"])
        )
        panels["representations"][label] = spectrum(h)
        if projector is not None:
            with torch.no_grad():
                panels["projections"][label] = spectrum(projector.to(args.device)(h))
    return {panel: lines for panel, lines in panels.items() if lines}


def projector_beside(path, encoder):
    """The projector in the checkpoint.pt beside an encoder.pt, if the encoder there is the same."""
    beside = Path(path).with_name("checkpoint.pt") if Path(path).name == "encoder.pt" else None
    if beside is None or not beside.is_file():
        return None
    other, its = load_encoder(beside)
    pairs = zip(other.state_dict().values(), encoder.state_dict().values(), strict=True)
    return its["projector"] if all(itertools.starmap(torch.equal, pairs)) else None


def spectrum(features):
    """Eigenvalues [F] of the covariance of features [N, F], the largest first, as shares of their
    sum; what is rounding is 0."""
    covariance = features.double().T.cov(correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0).cpu()
    values = values.where(values > 1e-12 * values[0], 0)
    return values / values.sum().clamp(min=1e-300)


def effective_dimension(shares):
    """exp of the entropy of shares [F]: F where all are equal, 1 where one is all, 0 for no sum."""
    return float(torch.special.entr(shares).sum().exp()) if shares.sum() > 0 else 0.0


def most_confused(counts, limit=20):
    """The `limit` classes, sorted, that take part in the most mistakes of counts [C, C]."""
    wrong = counts - counts.diag().diag()
    return (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:limit].sort().values


def new_figure(width, height, title, caption, panels=1, dpi=100):
    """A figure of so many inches with a title above and a caption below its panels; and these."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=dpi, layout="constrained", facecolor="white")
    title = textwrap.fill(one_line(title), int(8 * width))
    caption = textwrap.fill(one_line(caption), int(12 * width))
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=10)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def one_line(text, most=400):
    """The text in one line, without its end where it is longer, and no formula to matplotlib."""
    text = " ".join(text.encode(errors="replace").decode().split())
    text = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def neighbors_picture(images, labels, train_images, train_labels, classes, title):
    """Test images, float [R, 3, S, S] in [0, 1], each in a row with its K nearest training images,
    [R, K, 3, S, S], in frames that tell whether their class, of labels [R, K], is the same."""
    from matplotlib.patches import Rectangle

    (rows, count), same = train_labels.shape, train_labels == labels[:, None]
    caption = f"{int(same.sum())} of the {same.numel()} neighbours, {same.double().mean():.0%}, "
    caption += "are of the test image's class. Nearest: by the cosine of features."
    figure, (axes,) = new_figure(max(7, count + 1.5), max(4, 1.2 * rows + 1.6), title, caption)
    axes.axis("off")
    tiles = torch.cat([images[:, None], train_images], 1).clamp(0, 1)
    numbers = torch.cat([labels[:, None], train_labels], 1)
    for row, column in itertools.product(range(rows), range(count + 1)):
        x, y = column + 0.3 * (column > 0), 1.2 * row
        pixels = tiles[row, column].permute(1, 2, 0).cpu().numpy()
        axes.imshow(pixels, extent=(x, x + 0.8, y + 0.8, y))
        name = one_line(classes[numbers[row, column]], 13)
        axes.text(x + 0.4, y + 0.88, name, fontsize=8, color=INK, ha="center", va="top")
        if column:
            frame = FRAMES[bool(same[row, column - 1])]
            axes.add_patch(Rectangle((x - 0.04, y - 0.04), 0.88, 0.88, lw=3, fill=False, **frame))
    axes.text(0.4, -0.1, "test image", fontsize=10, ha="center")
    axes.text(1.3, -0.1, "its nearest training images, the nearest first", fontsize=10)
    axes.set(xlim=(-0.2, max(count + 1.3, 6)), ylim=(1.2 * rows, -0.4))
    handles = [Rectangle((0, 0), 1, 1, lw=3, fill=False, **frame) for frame in FRAMES.values()]
    names = "neighbour of the test image's class", "neighbour of another class"
    axes.legend(handles, names, ncols=2, **ABOVE)
    return figure


def map_picture(images, labels, points, classes, title, coordinates):
    """Images, float [N, 3, S, S] in [0, 1], where their points [N, 2] are, framed by class."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    cells = max(12, min(52, math.ceil(1.65 * len(points) ** 0.5)))
    shown, tile, colored = map_cells(points, cells), 1664 // cells, len(classes) <= len(COLORS)
    size, edge = tile - 2, 3 if colored else 1
    small = F.interpolate(images.float(), 2 * [size - 2 * edge], mode="bicubic", antialias=True)
    canvas = torch.ones(3, cells * tile, cells * tile)
    for (column, row), i in shown.items():
        color = torch.tensor(to_rgb(COLORS[labels[i]] if colored else PALE))
        place = canvas[:, row * tile : row * tile + size, column * tile : column * tile + size]
        place[:] = color[:, None, None]
        place[:, edge:-edge, edge:-edge] = small[i].clamp(0, 1)
    caption = f"{len(shown)} of {len(points)} images are shown, one at each place, scaled to fit. "
    many = f"{len(classes)} classes are too many for colours."
    caption += "Colours: the class." if colored else many
    figure, (axes,) = new_figure(12, 14, title, caption, dpi=150)
    axes.imshow(canvas.permute(1, 2, 0).numpy())
    axes.set(xlabel=coordinates[0], ylabel=coordinates[1], xticks=[], yticks=[])
    if colored:
        handles = [Patch(color=color) for color in COLORS[: len(classes)]]
        axes.legend(handles, [one_line(name, 24) for name in classes], ncols=5, **ABOVE)
    return figure


def spectrum_picture(curves, title):
    """{panel: {label: spectrum [F]}} side by side, of the same look for the same label."""
    labels = list(dict.fromkeys(itertools.chain(*curves.values())))
    shares = torch.cat([x for lines in curves.values() for x in lines.values()])
    least = min(shares[shares > 0].tolist(), default=1)
    bottom = 10.0 ** min(-1, max(-10, math.floor(math.log10(least))))
    caption = "Shares of eigenvalues of the covariance. Effective dimension: exp of their entropy."
    if shares.min() < bottom:
        caption += " On the lower edge: what is less, or zero."
    size = 7 * len(curves), 5.5 + 0.3 * len(labels)
    figure, panels = new_figure(*size, title, caption, len(curves))
    for axes, (panel, lines) in zip(panels, curves.items(), strict=True):
        for label, values in lines.items():
            text = f": effective dimension {effective_dimension(values):.1f} of {len(values)}"
            number = labels.index(label)
            how = {"color": COLORS[number % 9], "linestyle": DASHES[number % 4]}
            ranks, values = range(1, len(values) + 1), values.clamp(min=bottom)
            axes.plot(ranks, values, label=one_line(label, 50) + text, **how)
        axes.set(yscale="log", ylim=(bottom, 1), title=panel)
        axes.set(xlabel="rank of the eigenvalue", ylabel="share of the whole variance")
        axes.grid(color=PALE)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False, handlelength=4)
    return figure


def confusion_picture(counts, classes, title):
    """counts int64 [C, C] of images by true and predicted class; the 20 most confused of more."""
    from matplotlib.patches import Rectangle

    total, right, known = int(counts.sum()), int(counts.diag().sum()), most_confused(counts)
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1))[known][:, known]
    names, n = [one_line(classes[k], 24) for k in known.tolist()], len(known)
    title += f": {right / max(1, total):.1%} of {total} images correct"
    caption = "Percent of the images of a true class (blank: under 0.5). Black frames: correct."
    few = f" Of {len(counts)} classes the {n} most confused, so rows need not add up to 100."
    side = max(7, 3 + 0.45 * n)
    figure, (axes,) = new_figure(side, side + 0.6, title, caption + few * (n < len(counts)))
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, j in itertools.product(range(n), range(n)):
        value = float(share[i, j])
        if value >= 0.005 or i == j:
            ink = "white" if value > 0.5 else INK
            axes.text(j, i, f"{100 * value:.0f}", color=ink, ha="center", va="center")
        if i == j:
            axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, edgecolor=INK, lw=2, fill=False))
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.xaxis.set(ticks_position="top", label_position="top")
    return figure


def write_pictures(pictures, folder):
    for name, figure in pictures:
        with common.atomic_write(folder / f"{name}.png") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a letter that its font has not
            figure.savefig(file, format="png")
        print(f"{folder / name}.png")


# --------------------------------------------------------------------------------------------------
# Whose encoder a file holds: a ResNet found by its structure, whatever it is wrapped in

OURS = ("encoder.pt", "checkpoint.pt")
ABOUT = ("arch", "stem", "image_size", "mean", "std")  # what an encoder needs beside its weights
# The place of layer1 in an nn.Sequential tells what is before it: ReLU and max-pool have places of
# their own, so at 3 there is no max-pool, and at 2 no ReLU either. None: layers with names.
PLACES = {
    n: {"0": "conv1", "1": "bn1"} | {str(n + i): f"layer{i + 1}" for i in range(4)}
    for n in (4, 3, 2)
}
COPIES = set("momentum k ema key teacher target average lagging".split())


def load_encoder(path, **overrides):
    """(encoder, info): the ResNet in a checkpoint, ours or anybody's, from [B, 3, S, S] to [B, F],
    in eval mode, and what is known of it.

    overrides: arch, stem (have to agree with the weights), image_size, mean, std; key, a part of
    the prefix where there are several; features="projector", for encoder and projector of a
    checkpoint.pt of ours. info: these and method, dataset, epoch; "found", what was taken and
    ignored; "projector", or None; "assumed", which of image_size, mean and std nobody says (then
    224, or 32 with the small stem, and ImageNet's). InputError, one line, for anything else."""
    saved = common.load_file(path)
    tensors = tensors_in(saved)
    chosen = choose(tensors, path, overrides.get("key"))
    saved = saved if isinstance(saved, dict) else {}
    ours = all(name in saved for name in ABOUT)
    said = {name: saved[name] for name in ABOUT if ours}
    said |= {name: overrides[name] for name in ABOUT if overrides.get(name) not in (None, "auto")}
    info = completed(said, chosen, path)
    for name, kind in ("method", str), ("dataset", str), ("epoch", int):
        info[name] = saved[name] if isinstance(saved.get(name), kind) else None
    if not ours:
        info |= {"method": Path(path).name, "dataset": None}
    info["found"] = described(chosen, tensors)
    encoder = common.resnet(chosen.arch, chosen.stem).eval()
    weights = {name: tensors[old] for name, old in chosen.names.items()}
    encoder.load_state_dict(encoder.state_dict() | weights)
    if chosen.first in (2, 3):
        encoder.maxpool = nn.Identity()
    if chosen.first == 2:
        encoder.relu = nn.Identity()
    info["projector"] = layers = projector_of(chosen, tensors) if ours else None
    if overrides.get("features") == "projector":
        check(layers, f"{path}: no projector; --features projector takes a checkpoint.pt of ours")
        info["found"] += f"; then the projector, {len(layers)} layers"
        encoder = nn.Sequential(collections.OrderedDict(encoder=encoder, projector=layers)).eval()
        encoder.num_features = layers[-1].out_features
    return encoder, info


def tensors_in(saved):
    """Every tensor in dicts in dicts, by its keys joined with dots, in alphabetical order."""
    found, todo = {}, [("", saved)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.is_cpu and not value.is_quantized:
                found[name] = value
        elif isinstance(value, dict):
            parts = ((key, part) for key, part in value.items() if isinstance(key, str))
            todo += [(f"{name}.{key}" if name else key, part) for key, part in parts]
    return dict(sorted(found.items()))


def choose(tensors, path, key):
    """The one whole encoder, by its name the original and not a moving average of it."""
    found = list(candidates_in(tensors))
    check(found, f"{path}: no whole encoder: no convolution of three channels, named conv1 or 0")
    if key is not None:
        known = ", ".join(repr(one.prefix) for one in found)
        exact = [one for one in found if one.prefix.strip(".") == key.strip(".")]
        found = exact or [one for one in found if key.strip(".") in one.prefix]
        check(found, f"{path}: --key {key} is in none of {known}")
    best = min(found, key=lambda one: len(one.wrong))
    text = f"{path}: no whole encoder: as a {best.arch}, what is under {best.prefix!r} has "
    text += f"{len(best.wrong)} tensors missing, misshapen or too many: {', '.join(best.wrong[:3])}"
    check(not best.wrong, text)
    whole = [one for one in found if not one.wrong]
    words = {one.prefix: set(re.split(r"[._]", one.prefix.lower())) for one in whole}
    whole = [one for one in whole if not words[one.prefix] & COPIES] or whole
    whole = [one for one in whole if "student" in words[one.prefix]] or whole
    first, *others = sorted(whole, key=lambda one: len(one.prefix))
    others = [one for one in others if differ(one, first, tensors)]
    names = ", ".join(repr(one.prefix) for one in (first, *others))
    check(not others, f"{path}: several encoders, {names}: choose with --key")
    return first


def differ(one, other, tensors):
    pairs = [(old, one.names.get(name)) for name, old in other.names.items()]
    return not all(b and torch.equal(tensors[a], tensors[b]) for a, b in pairs)


# The ResNet that the tensors below a prefix fit best. first: layer1's number, if any. names: those
# in the file by torchvision's. wrong: of what is missing, misshapen, or where no ResNet has any.
Candidate = collections.namedtuple("Candidate", "prefix first arch stem names wrong")


def candidates_in(tensors):
    """A Candidate for each place that has a first convolution, of three channels."""
    for first, value in tensors.items():
        start = re.fullmatch(r"(|.*\.)(conv1|0)\.weight", first, re.DOTALL)
        if not start or value.ndim != 4 or value.shape[1] != 3:
            continue
        for place in [None] if start[2] == "conv1" else PLACES:
            names = {}
            for name in tensors:
                if name.startswith(start[1]) and "total_" not in name:  # thop counts operations
                    rest = name.removeprefix(start[1]).replace("shortcut.", "downsample.")
                    head, dot, rest = rest.partition(".")
                    names[PLACES.get(place, {}).get(head, head) + dot + rest] = name
            yield fitted(start[1], place, names, tensors)


def fitted(prefix, first, names, tensors):
    """The Candidate of the architecture of which the least is wrong."""
    shapes = {name: tensors[old].shape for name, old in names.items()}
    stem, found = "small" if shapes["conv1.weight"][2] == 3 else "imagenet", []
    inside = [name for name in names if re.match(r"(conv1|bn1|layer\d)\.", name)]
    for arch in common.ARCHITECTURES:
        expected = shapes_of(arch, stem)
        wrong = [name for name in inside if shapes[name] != expected.get(name)]
        wrong += [name for name in expected if name not in names]
        right = {name: names[name] for name in expected if name in names and name not in wrong}
        wrong = [name for name in wrong if "num_batches" not in name]  # a counter of no use
        found.append(Candidate(prefix, first, arch, stem, right, wrong))
    return min(found, key=lambda one: len(one.wrong))


@functools.cache
def shapes_of(arch, stem):
    """{name: shape} of the tensors of a ResNet."""
    with torch.device("meta"):
        return {name: x.shape for name, x in common.resnet(arch, stem).state_dict().items()}


def completed(said, chosen, path):
    """What file and flags say of an encoder, checked, and where they say nothing, assumed."""
    info = {"arch": chosen.arch, "stem": chosen.stem} | said
    for name, seen in ("arch", chosen.arch), ("stem", chosen.stem):
        text = f"{path}: {name} is {seen} by its weights, not {info[name]!r}: --{name}"
        check(info[name] == seen, text)
    default = {"image_size": 32 if chosen.stem == "small" else 224}
    default |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD}
    info["assumed"] = [name for name in default if info.get(name) is None]
    info |= {name: default[name] for name in info["assumed"]}
    try:
        values = torch.tensor([info["mean"], info["std"]], dtype=torch.float64)
        right = values.shape == (2, 3) and values.isfinite().all() and min(values[1]) > 0
    except (ValueError, TypeError, OverflowError, RuntimeError):
        right = False
    right = right and type(info["image_size"]) is int and 8 <= info["image_size"] <= 4096
    check(right, f"{path}: unusable statistics or size: --mean, --std, --image-size replace them")
    info["mean"], info["std"] = values.tolist()
    return info


def described(chosen, tensors):
    """What was taken of a file, and what was left."""
    rest = sorted(tensors.keys() - chosen.names.values())
    ignored = collections.Counter(".".join(name.split(".")[:2]) for name in rest).most_common()
    text = f"{chosen.arch}, {chosen.stem} stem, under {chosen.prefix!r}: all of its "
    text += f"{len(chosen.names)} tensors; ignored: "
    text += ", ".join(f"{name} {count}" for name, count in ignored) or "nothing"
    if chosen.first in (2, 3):
        text += f"; numbered: no max-pool{' and no ReLU' * (chosen.first == 2)} before layer 1"
    return text


def projector_of(chosen, tensors):
    """Our own projector from its numbered tensors: a matrix is a Linear, a vector batch norm, a
    number without tensors a ReLU. None where there is none like that."""
    parent = chosen.prefix.removesuffix("backbone.")
    starts = [f"{parent}{word}." for word in ("projector", "head")]
    start = next((start for start in starts if f"{start}0.weight" in tensors), None)
    if start is None:
        return None
    parts = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    numbers = [int(name.split(".")[0]) for name in parts if re.match(r"\d{1,2}\.", name)]
    layers = nn.Sequential(*(nn.ReLU() for _ in range(max(numbers) + 1)))
    for i in set(numbers):
        weight = parts.get(f"{i}.weight", torch.zeros(()))
        if weight.ndim == 2:
            layers[i] = nn.Linear(*weight.T.shape, bias=f"{i}.bias" in parts)
        elif weight.ndim == 1:
            layers[i] = nn.BatchNorm1d(len(weight))
    try:
        layers.load_state_dict(parts)
    except RuntimeError:  # what is left, or of other shapes
        return None
    return layers.eval() if isinstance(layers[-1], nn.Linear) else None


# --------------------------------------------------------------------------------------------------
# Command line

PRESETS = {
    "default": {"epochs": 100, "batch_size": 256, "lr": [0.02], "lr_floor": 0.01}
    | {"weight_decay": 0.0, "standardize": True, "crop_min": 0.08},
    "shapes": {"epochs": 20, "crop_min": 0.4},
    "finetune": {"epochs": 20, "lr": [0.2]},  # S003 B.2.5
    "s001": {"epochs": 50},
    "s003": {"epochs": 100, "lr": [0.2], "standardize": False},
    "s004": {"epochs": 100, "lr": [0.5], "standardize": False}
    | {"lr_floor": 1e-3, "weight_decay": 1e-4},
}


# fmt: off
def parser():
    p, switch = common.Parser(__doc__.splitlines()[0], "evaluation"), argparse.BooleanOptionalAction
    p.add_argument("--checkpoint", required=True, help="encoder.pt, checkpoint.pt, or: random")
    p.add_argument("--key", help="a part of the encoder's prefix, where a file holds several")
    p.add_argument("--mean", type=float, nargs=3, help="of the channels; default: as for --std")
    p.add_argument("--std", type=common.positive, nargs=3, help="default: the file's, else assumed")
    p.add_argument("--features", choices=("encoder", "projector"), default="encoder",
                   help="what is evaluated; the projector is in our own checkpoint.pt")
    p.add_argument("--protocol", choices=("linear", "knn", "finetune"), default="linear",
                   help="frozen features, neighbours, or all trained together")
    p.add_argument("--recipe", choices=("s001", "s003", "s004"), help="settings of a thesis")
    common.shared_arguments(p)
    p.set_defaults(arch=None)  # the checkpoint knows
    p.add_argument("--cached", action="store_true", help="compute features once, no augmentation")
    p.add_argument("--label-fraction", type=common.number(float, 1e-6, 1), default=1.0,
                   help="of the training images of each class, for every protocol")
    p.add_argument("--seeds", type=common.number(int, 1, 10), default=1,
                   help="repeat with --seed, --seed + 1, ...: mean and 95 %% confidence interval")
    p.add_argument("--epochs", type=common.count, help="of the classifier")
    p.add_argument("--batch-size", type=common.count, help="of the classifier")
    p.add_argument("--lr", type=common.positive, nargs="+", help="initial; of several the best")
    p.add_argument("--lr-floor", type=common.fraction, help="last rate / first, for linear")
    p.add_argument("--encoder-lr", type=common.positive, default=0.005, help="for finetune, S003")
    p.add_argument("--momentum", type=common.fraction, default=0.9, help="of SGD")
    p.add_argument("--weight-decay", type=common.number(float, 0), help="of SGD")
    p.add_argument("--standardize", action=switch, help="features, for the linear classifier")
    p.add_argument("--crop-min", type=common.number(float, 1e-3, 1), help="share of the area")
    p.add_argument("--validation-fraction", type=common.fraction, default=0.0,
                   help="measure on this share of the training images, held out, instead of test")
    p.add_argument("--untrained", action=switch, default=True, help="measure one, to compare with")
    p.add_argument("--pictures", action="store_true", help="draw four; needs matplotlib")
    p.add_argument("--map", choices=("pca", "tsne"), default="pca", help="tsne: needs scikit-learn")
    p.add_argument("--compare", nargs="+", default=[], help="more checkpoints for spectrum.png")
    return p
# fmt: on


def arguments():
    args = common.parse_args(parser(), PRESETS, "protocol", "recipe")
    linear = args.protocol == "linear"
    check(not args.cached or linear, "--cached is for --protocol linear")
    check(len(args.lr) == 1 or linear, "several --lr are for --protocol linear")
    tuned = args.protocol == "finetune"
    fits = args.recipe is None or linear or tuned and args.recipe == "s001"
    check(fits, f"--recipe {args.recipe} is for linear; finetune without one is S003's, or s001")
    check(args.features == "encoder" or not tuned, "--features projector is not for finetune")
    check(args.pictures or args.map == "pca", "--map is for --pictures")
    check(args.pictures or not args.compare, "--compare is for --pictures")
    needed = {"matplotlib": "matplotlib"} if args.pictures else {}
    needed |= {"sklearn": "scikit-learn"} if args.map == "tsne" else {}
    for module, name in needed.items():  # hours later would be a bad time to find it missing
        check(importlib.util.find_spec(module), f"--pictures needs {name}: pip install {name}")
    for path in args.compare:
        load_encoder(path)
    common.resolve_hardware(args)
    return args


def the_encoder(args):
    """(encoder, info, data) of --checkpoint and --dataset. Fills in args.arch, stem, image_size."""
    untrained = args.checkpoint == "random"
    if not untrained:  # before the data: the cheaper thing to be wrong about
        encoder, info = load_encoder(args.checkpoint, **vars(args))
        print(f"{args.checkpoint}: {info['found']}")
    data = common.load_once(args)
    if untrained:
        check(args.features == "encoder", "--features projector needs a checkpoint.pt")
        encoder, info = random_encoder(args, data)
    elif info["assumed"]:
        if info["stem"] == "small":  # trained on images such as these, most likely
            like = {"image_size": data.size, "mean": data.mean, "std": data.std}
            info |= {name: like[name] for name in info["assumed"]}
        print("assumed:", ", ".join(f"{name} {info[name]}" for name in info["assumed"]))
    args.image_size, args.arch, args.stem = info["image_size"], info["arch"], info["stem"]
    if data.train.in_memory and data.size != args.image_size:
        height, width = data.train.images.shape[2:]
        cut = "x".join(map(str, common.centre_box(height, width, args.image_size)[2:]))
        text = f"{data.name}: {width}x{height} pixels, of which the central {cut} are resized "
        print(text + f"to the {args.image_size} of the encoder")
    data = dataclasses.replace(data.to(args.device), mean=info["mean"], std=info["std"])
    encoder = encoder.to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    return encoder, info, data


def the_images(data, args):
    """(data, kind): with what is held out, and what data.test, which the figures are of, is."""
    fraction, count, kind = args.validation_fraction, len(data.classes), "test"
    if fraction > 0:
        held, rest = drawn(data.train, fraction, count, args.seed, "validation")
        check(len(held) and len(rest), f"--validation-fraction {fraction} leaves a part empty")
        train, test, kind = data.train.take(rest), data.train.take(held), "validation"
        data = dataclasses.replace(data, train=train, test=test)
    none = f"{data.name} has no test split: hold images out with --validation-fraction 0.1"
    check(data.test is not None, none)
    for name, split in ("training", data.train), (kind, data.test):
        missing = (split.labels.bincount(minlength=count) == 0).nonzero()[:, 0].tolist()
        some = ", ".join(str(data.classes[i]) for i in missing[:3]) + ", ..." * (len(missing) > 3)
        text = f"{data.name}: {len(missing)} of {count} classes have no {name} image: {some}"
        check(name == kind or not missing, text)
        if missing:
            print(text)
    return data, kind


def the_file(data, args):
    """Where the figures go: beside the checkpoint, or in a folder of its own."""
    path = Path(args.checkpoint)
    if args.checkpoint == "random":
        path = Path(f"runs/random_{data.name}_{args.arch}") / OURS[0]
    words = [args.protocol, args.recipe, "projector" * (args.features == "projector")]
    words += [f"{args.seeds}-seeds" * (args.seeds > 1)]
    words += [f"{args.label_fraction:g}" * (args.label_fraction < 1), "cached" * args.cached]
    words += ["validation" * (args.validation_fraction > 0), data.name]
    words += [path.stem * (path.name not in OURS)]
    common.on_first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    check(os.access(path.parent, os.W_OK), f"{path.parent}: no permission to write")
    return path.with_name("_".join(filter(None, words)) + ".json")


def main():
    args = arguments()
    encoder, info, data = the_encoder(args)
    data, kind = the_images(data, args)
    test, whole = data.test, len(data.train)
    some = labelled(data.train, args.label_fraction, len(data.classes), args.seed)
    part, file = dataclasses.replace(data, train=some), the_file(data, args)
    if len(some) < whole:
        print(f"labels of {len(some)} of {whole} training images, {args.label_fraction:g} of each")
    if args.protocol != "knn":  # before the features, for what is wrong with the batches
        steps_of(part, args)
    start = time.time()
    measured = every_seed(encoder, data, test, args)
    seconds = round(time.time() - start, 1)
    plain = untrained(data, test, args) if args.untrained and info["method"] != "untrained" else {}
    what = f"{named(info, args)}, {args.arch}, {args.stem} stem"
    print(f"\n{what}: {data.name}, {len(test)} {kind} images of {args.image_size} pixels")
    figures = table(measured, plain, data, args)
    result = {"protocol": args.protocol, "dataset": data.name, "split": kind}
    result |= {"features": args.features, "cached": args.cached, "seeds": args.seeds}
    result |= {"label_fraction": args.label_fraction, "labelled_images": len(some), **figures}
    result |= {"images": len(test), "seconds": seconds}
    result |= {"method": info["method"], "epoch": info["epoch"], **common.describe(args)}
    result |= {key: info[key] for key in ("found", "assumed") if key in info}
    common.on_first(lambda: common.write_json(result, file))
    if args.pictures:
        pictures = list(draw_pictures(info, part, test, measured, args))
        common.on_first(lambda: write_pictures(pictures, file.parent))
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
