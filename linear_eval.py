# SPDX-License-Identifier: MIT
"""Evaluate a saved encoder: a classifier on its frozen features, nearest neighbours, fine-tuning.

linear   The encoder stays frozen, in eval mode: its parameters and its batch-norm statistics are
         compared bit for bit before and after. A linear layer is trained on its output with SGD,
         momentum .9, no weight decay, batches of 256, 100 epochs, random resized crops and flips
         (S003 5.2.5 and B.1.2), cosine from lr .02 to .0002. Unlike there, features are
         standardised, for which held-out training images of CIFAR-10 preferred .02 to S003's .2.
         With --cached features are computed once, without augmentation: minutes, not hours, on a
         CPU. On shapes, 20 epochs and crops of at least .4 of the area.
knn      Weighted nearest neighbours by cosine (Wu et al. 2018); the others report them as well.
finetune Encoder and classifier are trained together, 20 epochs, the encoder with a rate of its own,
         --encoder-lr .005, in steps (S003 B.2.5, whose rates 20 and 30 of the classifier are for
         features that are not standardised; here .2).

With --label-fraction .01 or .1 all of them use the labels of that share of each class alone; with
--seeds 3 all is repeated (classifier, order, crops, which labels, not the encoder's training), for
a confidence interval. Several --lr are compared on a tenth of the training images, held out.

--recipe s003  linear: lr .2 to .002, features not standardised (not for ImageNet-1K, where S003 has
               lr 25 in steps)
         s004  linear: lr .5, 100 epochs (S004 A.3), not standardised; weight decay 1e-4 and the
               last rate, a thousandth, from A.1 and the released code. A.3 says nothing of crops:
               as above. (With labels, A.1, they are AutoAugment's: not here.)
         s001  50 epochs, for linear on another dataset and for finetune (S001 5.7.2 to 5.7.4; it
               gives no rates)

Another --dataset than the encoder's is transfer: images are brought to the encoder's size and
normalised with its statistics, as in its training (InfoCL takes the new dataset's).

--checkpoint takes what the training scripts save and any other file with a whole ResNet in it.

The accuracy is the last epoch's, on the test images, which nothing is chosen on. To choose
anything, take --validation-fraction: it holds out training images and leaves the test images alone.

Run: python linear_eval.py --checkpoint runs/simclr_cifar10_resnet18/encoder.pt --dataset cifar10
     python linear_eval.py --checkpoint random --dataset cifar10     (an untrained encoder)
"""

import argparse
import bisect
import collections
import copy
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
import textwrap
import time
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import common
from common import check

PROTOCOLS, RECIPES = ("linear", "knn", "finetune"), ("s001", "s003", "s004")
FEATURES, MAPS = ("encoder", "projector"), ("pca", "tsne")
PRESETS = {
    "default": {"epochs": 100, "crop_min": 0.08},
    "shapes": {"epochs": 20, "crop_min": 0.4},
    "finetune": {"epochs": 20, "batch_size": 256, "lr": [0.2]},  # S003 B.2.5
    "s001": {"epochs": 50},
    "s003": {"epochs": 100, "lr": [0.2], "lr_floor": 0.01, "standardize": False},
    "s004": {"epochs": 100, "lr": [0.5], "lr_floor": 1e-3, "weight_decay": 1e-4}
    | {"standardize": False},
}
OURS = ("encoder.pt", "checkpoint.pt")
ABOUT = ("arch", "stem", "image_size", "mean", "std")  # what an encoder needs beside its weights

# --------------------------------------------------------------------------------------------------
# Whose encoder it is: a ResNet found by its structure, whatever it is wrapped in

BLOCKS = {  # bottleneck blocks?, and how many in each of the four layers
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}
# The first layer's place in an nn.Sequential tells what is before it: ReLU and max-pool have places
# of their own, so at 3 there is no max-pool, and at 2 no ReLU either.
PLACES = {
    n: {"0": "conv1", "1": "bn1"} | {str(n + i): f"layer{i + 1}" for i in range(4)}
    for n in (4, 3, 2)
}
COPIES = set("momentum target teacher key k ema avg averaged swa slow".split())
ORIGINALS = {"online", "student"}


class Candidate:
    """The tensors below a prefix, by torchvision's names, as a ResNet.

    names: torchvision's name -> name in the file. first: the place of the first layer, where they
    are numbered. arch: None where it is no ResNet that we have. wrong: what is missing, of another
    shape, or in a block where no ResNet has anything."""

    def __init__(self, prefix, names, tensors, first=None):
        self.prefix, self.first = prefix, first
        self.words = set(re.split(r"[._]", prefix.lower()))
        layers = [{name.split(".")[1] for name in names if name.startswith(f"layer{i}.")}
                  for i in (1, 2, 3, 4)]  # fmt: skip
        kind = "layer1.0.conv3.weight" in names, tuple(map(len, layers))
        self.blocks = f"{', '.join(map(str, kind[1]))} {'bottleneck ' * kind[0]}blocks"
        self.arch, self.wrong = BLOCKS.get(kind), ["all of it"]
        self.stem = "small" if tensors[names["conv1.weight"]].shape[2] == 3 else "imagenet"
        if self.arch:
            with torch.device("meta"):  # shapes alone
                expected = common.resnet(self.arch, self.stem).state_dict()
            shapes = {name: tensors[names[name]].shape for name in expected if name in names}
            self.wrong = [name for name, value in expected.items() if "num_batches" not in name
                          and shapes.get(name) != value.shape]  # fmt: skip
            self.wrong += [
                name
                for name in names
                if re.match(r"(conv1|bn1|layer\d)\.", name)
                and name not in expected
                and "total_" not in name
            ]  # thop's: total_ops
            self.names = {name: names[name] for name in shapes
                          if shapes[name] == expected[name].shape}  # fmt: skip
            self.weights = {name: tensors[old] for name, old in self.names.items()}

    def same_as(self, other):
        pairs = ((value, other.weights[name]) for name, value in self.weights.items())
        return self.arch == other.arch and all(torch.equal(*pair) for pair in pairs)

    def encoder(self):
        encoder = common.resnet(self.arch, self.stem)
        encoder.load_state_dict({**encoder.state_dict(), **self.weights})
        if self.first in (2, 3):
            encoder.maxpool = nn.Identity()
        if self.first == 2:
            encoder.relu = nn.Identity()
        return encoder.eval()


def tensors_in(saved):
    """Every tensor in dicts in dicts, by its keys joined with dots, in alphabetical order."""
    found, seen, todo = {}, set(), [("", saved)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.is_cpu and not value.is_quantized
            if plain and not value.is_complex():
                found[name] = value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            parts = ((key, part) for key, part in value.items() if isinstance(key, str))
            todo += [(f"{name}.{key}" if name else key, part) for key, part in parts]
    return dict(sorted(found.items()))


def candidates_in(tensors):
    """A Candidate for each place that has a first convolution, of three channels."""
    known = list(tensors)  # sorted: what shares a prefix is in one piece
    for first, value in tensors.items():
        if value.ndim != 4 or value.shape[1] != 3:
            continue
        for ending, places in ("conv1.weight", {None: {}}), ("0.weight", PLACES):
            prefix = first.removesuffix(ending)
            if prefix == first or prefix and not prefix.endswith("."):
                continue
            below = itertools.takewhile(
                lambda name, prefix=prefix: name.startswith(prefix),
                itertools.islice(known, bisect.bisect_left(known, prefix), None),
            )
            below = [
                (name[len(prefix) :].replace("shortcut.", "downsample."), name) for name in below
            ]
            for place, heads in places.items():
                parts = ((name.partition("."), old) for name, old in below)
                names = {f"{heads.get(head, head)}.{rest}": old for (head, _, rest), old in parts}
                yield Candidate(prefix, names, tensors, place)


def matching(found, key):
    """The candidates that --key names: by the whole prefix, by whole words of it, by any part."""
    key = key.strip(".")
    for fits in (
        lambda prefix: prefix.strip(".") == key,
        lambda prefix: f".{key}." in f".{prefix}",
        lambda prefix: key in prefix,
    ):
        if some := [candidate for candidate in found if fits(candidate.prefix)]:
            return some
    return []


def choose(found, path, given):
    """The one whole encoder, by its name the original and not a moving average of it."""
    key, known = given.get("key"), ", ".join(repr(candidate.prefix) for candidate in found)
    if key is not None:
        found = matching(found, key)
        check(found, f"{path}: --key {key} is in none of {known or 'the names of no encoder'}")
    for name in "arch", "stem":
        wanted = given.get(name)
        found = [one for one in found if wanted and getattr(one, name) == wanted] or found
    whole = [candidate for candidate in found if not candidate.wrong]
    originals = [
        candidate for candidate in found if candidate.arch and not candidate.words & COPIES
    ]
    whole_originals = [candidate for candidate in originals if not candidate.wrong]
    if not whole or originals and not whole_originals:
        best = min(originals or found, key=lambda candidate: len(candidate.wrong), default=None)
        what = "no convolution of three channels, named conv1 or 0"
        if best:
            what = f"{best.blocks} under {best.prefix!r}, no ResNet-18, 34, 50 or 101"
        if best and best.arch:
            what = f"the {best.arch} under {best.prefix!r} has {len(best.wrong)} tensors missing, "
            what += f"misshapen or too many: {', '.join(best.wrong[:3])}"
        if whole:
            what += f"; --key {whole[0].prefix.strip('.')} takes the copy"
        raise common.InputError(f"{path}: no whole encoder: {what}")
    whole = whole_originals or whole
    whole = [candidate for candidate in whole if candidate.words & ORIGINALS] or whole
    first, *others = sorted(whole, key=lambda candidate: len(candidate.prefix))
    others = [other for other in others if not first.same_as(other)]
    names = ", ".join(repr(candidate.prefix) for candidate in (first, *others))
    check(not others, f"{path}: several encoders, {names}: choose with --key")
    return first


def whole_number(value):
    return isinstance(value, int) and not isinstance(value, bool)


def load_encoder(path, **overrides):
    """The ResNet encoder in a checkpoint, ours or anybody's, in eval mode, and what is known of it.

    It is found by names and shapes, below any prefix, among heads and wrappers, in torchvision's
    naming, with `shortcut` for `downsample`, or by the indices of an nn.Sequential. Every tensor of
    it has to be there. overrides: arch, stem (have to agree with the weights), image_size, mean,
    std; key, a part of the prefix where there are several; features="projector" for an
    nn.Sequential of encoder and projector, from a checkpoint.pt of ours: F is then its width.

    Returns (encoder, info): a ResNet from [B, 3, S, S] to [B, F], and a dict with arch, stem,
    image_size, mean, std, method, dataset, epoch; "found", a line that says what was taken and what
    was ignored; "assumed", which of image_size, mean and std neither file nor overrides say (then
    224 pixels, or 32 with the small stem, and ImageNet's statistics). InputError, one line, for
    anything else: a part of an encoder, several, none, a file that would run code."""
    saved = common.load_file(path)
    tensors = tensors_in(saved)
    chosen = choose(list(candidates_in(tensors)), path, overrides)
    given = {k: overrides[k] for k in ABOUT if overrides.get(k) is not None}
    ours = isinstance(saved, dict) and all(name in saved for name in ABOUT)
    info = {name: saved[name] for name in ABOUT} | given if ours else given
    for name in "arch", "stem":
        value = getattr(chosen, name)
        said = info.get(name, value)
        check(said == value, f"{path}: {name} is {value} by its weights, not {said!r}: --{name}")
        info[name] = value
    default = {"image_size": 32 if chosen.stem == "small" else 224}
    default |= {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD}
    info["assumed"] = [name for name in default if info.get(name) is None]
    info |= {name: default[name] for name in info["assumed"]}
    wrong = f"{path}: unusable statistics or size, which --mean, --std and --image-size replace"
    try:
        info["mean"], info["std"] = ([float(x) for x in info[name]] for name in ("mean", "std"))
    except (ValueError, TypeError, OverflowError):
        raise common.InputError(wrong) from None
    right = len(info["mean"]) == len(info["std"]) == 3 and min(info["std"]) > 0
    right = right and all(map(math.isfinite, info["mean"] + info["std"]))
    check(right and whole_number(info["image_size"]) and 8 <= info["image_size"] <= 4096, wrong)
    about = {"method": str, "dataset": str, "epoch": int}
    saved = saved if isinstance(saved, dict) else {}
    known = {
        k: saved.get(k) if isinstance(saved.get(k), kind) else None for k, kind in about.items()
    }
    info |= known if ours else known | {"method": Path(path).name, "dataset": None}
    info["found"] = describe_choice(chosen, tensors)
    if overrides.get("features") == "projector":
        return with_projector(chosen, tensors if ours else {}, path, info)
    return chosen.encoder(), info


def with_projector(chosen, tensors, path, info):
    """load_encoder's answer for the encoder and the projector after it."""
    layers = projector_beside(chosen, tensors, path)
    check(layers, f"{path}: no projector; --features projector takes a checkpoint.pt of ours")
    info["found"] += f"; then the projector, {len(layers)} layers"
    model = nn.Sequential(collections.OrderedDict(encoder=chosen.encoder(), projector=layers))
    model.num_features = layers[-1].out_features
    return model.eval(), info


def projector_beside(chosen, tensors, path):
    """The projector of our own checkpoint.pt, built again from its numbered tensors: a matrix is a
    Linear, a vector batch norm, and a number without tensors a ReLU. None where there is none."""
    parent = chosen.prefix.removesuffix("backbone.")
    for name in f"{parent}projector.", f"{parent}head.":
        parts = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        numbers = [int(k.split(".")[0]) for k in parts if re.match(r"\d{1,2}\.", k)]
        if not numbers:
            continue
        layers = [nn.ReLU() for _ in range(max(numbers) + 1)]
        for i in set(numbers):
            weight = parts.get(f"{i}.weight", torch.zeros(()))
            if weight.ndim == 2:
                layers[i] = nn.Linear(*weight.T.shape, bias=f"{i}.bias" in parts)
            elif weight.ndim == 1:
                layers[i] = nn.BatchNorm1d(len(weight))
        layers = nn.Sequential(*layers)
        try:
            layers.load_state_dict(parts)
        except RuntimeError:  # what is left, or of other shapes
            message = f"{path}: the projector under {name!r} is none of ours"
            raise common.InputError(message) from None
        return layers if isinstance(layers[-1], nn.Linear) else None
    return None


def describe_choice(chosen, tensors):
    """What was taken of a file, and what was left."""
    taken = set(chosen.names.values())
    rest = (name for name in tensors if name not in taken)
    ignored = collections.Counter(".".join(name.split(".")[:2]) for name in rest)
    shown = ignored.most_common(6)
    left = ", ".join(f"{name} {count}" for name, count in shown) or "nothing"
    more = ignored.total() - sum(count for _, count in shown)
    left += f", and {more} more" if more else ""
    text = f"{chosen.arch}, {chosen.stem} stem, under {chosen.prefix!r}: all of its "
    text += f"{len(taken)} tensors; ignored: {left}"
    if chosen.first in (2, 3):
        text += f"; numbered: no max-pool{' and no ReLU' * (chosen.first == 2)} before layer 1"
    return text


def random_encoder(args, data):
    """An untrained encoder for comparison: resnet18, or what the flags say."""
    size, arch = args.image_size or data.size, args.arch or "resnet18"
    stem = args.stem if args.stem != "auto" else "small" if size <= 64 else "imagenet"
    torch.manual_seed(args.seed)
    info = {"arch": arch, "stem": stem, "image_size": size, "mean": data.mean, "std": data.std}
    info |= {"method": "untrained", "epoch": 0, "dataset": None}
    return common.resnet(arch, stem).eval(), info


def drawn(split, fraction, num_classes, seed, purpose):
    """bool [N], true for `fraction` of the images of each class, drawn from the seed alone: the
    same images on any machine."""
    order = torch.randperm(len(split), generator=common.generator(seed, purpose, 0))
    labels, mask = split.labels.cpu()[order], torch.zeros(len(split), dtype=torch.bool)
    for label in range(num_classes):
        index = order[labels == label]
        mask[index[: round(fraction * len(index))]] = True
    return mask


def hold_out(split, fraction, num_classes, seed):
    """Two splits, (rest, held out): `fraction` of the images of each class are held out."""
    mask = drawn(split, fraction, num_classes, seed, "validation")
    check(0 < int(mask.sum()) < len(split), f"--validation-fraction {fraction} leaves a part empty")
    return tuple(split.take(part.nonzero()[:, 0]) for part in (~mask, mask))


def labelled(split, fraction, num_classes, seed):
    """The images whose labels may be used, `fraction` of each class: 500 of CIFAR-10 for .01."""
    if fraction == 1:
        return split
    mask = drawn(split, fraction, num_classes, seed, "labels")
    missing = num_classes - len(split.labels.cpu()[mask].unique())
    check(not missing, f"--label-fraction {fraction} leaves {missing} classes without an image")
    return split.take(mask.nonzero()[:, 0])


def all_there(data, kind):
    """InputError where a class has no training image; a line where it has no test image."""
    for name, split in ("training", data.train), (kind, data.test):
        count = split.labels.bincount(minlength=len(data.classes))
        missing = [data.classes[i] for i in (count == 0).nonzero()[:, 0].tolist()]
        some = ", ".join(map(str, missing[:3])) + ", ..." * (len(missing) > 3)
        text = f"{data.name}: {len(missing)} of {len(data.classes)} classes have no {name} image"
        check(name == kind or not missing, f"{text}, so nothing can tell them: {some}")
        if missing:
            print(f"{text}: {some}")


# --------------------------------------------------------------------------------------------------
# Protocols. Each gives scores [N, C] of the classes for the test images, or features of them.


def features_of(encoder, split, args, data):
    """The split with its features [N, F] for images."""
    return common.Split(common.encode(encoder, split, args, data), split.labels.to(args.device))


def new_head(num_features, num_classes, args):
    head = nn.Linear(num_features, num_classes).to(args.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def standardisation(features):
    """Mean and deviation [F] of features [N, F] over the images; an all but dead feature stays
    small."""
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
    """Steps in an epoch. A set that is smaller than a batch is one batch; of a few labels there are
    eight steps at least, or a rate meant for many would hardly move anything."""
    processes, most = common.world_size(), len(data.train)
    uneven = f"--batch-size {args.batch_size} is not a multiple of the {processes} processes"
    check(args.batch_size % processes == 0, uneven)
    least = 2 * processes if args.protocol == "finetune" else processes  # for its batch norm
    few = f"{most} training images in batches of {args.batch_size} are too few for --protocol"
    several = f" in {processes} processes" if processes > 1 else ""
    check(min(most, args.batch_size) >= least, f"{few} {args.protocol}{several}")
    share = max(most // 8, least) if args.label_fraction < 1 else most
    if args.batch_size > share:
        print(f"{most} training images: batches of {share - share % processes}")
    args.batch_size = min(args.batch_size, share - share % processes)
    return most // args.batch_size


def fit_linear(epoch_of_batches, num_features, num_classes, steps, rates, args):
    """A linear layer for each of the learning rates, all trained on the same batches (features
    [B, F], labels [B]) of each epoch."""
    heads = [new_head(num_features, num_classes, args) for _ in rates]
    pairs = zip(heads, rates, strict=True)
    groups = [{"params": head.parameters(), "base": rate} for head, rate in pairs]
    optimizer = torch.optim.SGD(groups, 0.1, args.momentum, 0, args.weight_decay, foreach=True)
    for epoch in range(1, args.epochs + 1):
        bar, total = common.Progress(f"epoch {epoch}/{args.epochs}", steps, args.batch_size), 0.0
        for i, batch in enumerate(epoch_of_batches(epoch), 1):
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
        finite = math.isfinite(total)
        check(finite, f"the classifier's loss is not finite in epoch {epoch}: try a lower --lr")
        if epoch % max(1, args.epochs // 5) == 0:
            bar.show(f"{bar.label}  loss {total / steps:.4f}")
    return heads


def linear_classifiers(encoder, data, train, rates, args):
    """For each rate a function from features of the frozen encoder to scores. train: features.

    Features are standardised with the mean and deviation of the training images' features: the
    classifier is linear all the same, and one learning rate fits encoders of any scale."""
    (mean, std), steps = standardisation(train.images), steps_of(data, args)
    if not args.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    if args.cached:
        cached = common.Split((train.images - mean) / std, train.labels)

        def batches(epoch):
            return common.training_batches(cached, epoch, args, [])
    else:

        def batches(epoch):
            for x, labels in augmented(data, epoch, steps, args):
                with torch.no_grad(), common.autocast(args):
                    h = encoder(x)
                yield (h.float() - mean) / std, labels

    heads = fit_linear(batches, train.images.shape[1], len(data.classes), steps, rates, args)
    return [lambda h, head=head: head((h - mean) / std) for head in heads]


def compared_rates(encoder, data, train, args):
    """{rate: accuracy} of each --lr on a tenth of the training images, held out."""
    mask = drawn(data.train, 0.1, len(data.classes), args.seed, "learning rate")
    rest, held = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
    check(len(held), f"{len(mask)} training images are too few to compare several --lr")
    part, args = dataclasses.replace(data, train=data.train.take(rest)), copy.copy(args)
    classifiers = linear_classifiers(encoder, part, train.take(rest), sorted(args.lr), args)
    held, found = train.take(held), {}
    with torch.no_grad():
        for rate, classifier in zip(sorted(args.lr), classifiers, strict=True):
            scores = classifier(held.images)
            accuracy, _ = common.top_accuracies(scores, held.labels)
            found[rate] = accuracy if scores.isfinite().all() else 0.0
    text = ", ".join(f"{rate:g} {accuracy:.2%}" for rate, accuracy in found.items())
    print(f"--lr on {len(held)} held-out training images: {text}; taken: {best(found):g}")
    return found


def best(accuracies):
    """Of {rate: accuracy} the best rate, of equals the lowest."""
    return min(accuracies, key=lambda rate: (-accuracies[rate], rate))


def linear_protocol(encoder, data, train, test, args):
    """Scores of a linear classifier on the frozen encoder, its rate, and {rate: accuracy} of those
    that --lr has it chosen from. train, test: features."""
    found = compared_rates(encoder, data, train, args) if len(args.lr) > 1 else {}
    rate = best(found) if found else args.lr[0]
    (classifier,) = linear_classifiers(encoder, data, train, [rate], args)
    with torch.no_grad():
        return classifier(test.images), rate, found


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


def finetune_protocol(encoder, data, train, test, args):
    """Scores after encoder and classifier were trained together, with learning rates of their own,
    both by steps: after each quarter of the epochs a fifth and a tenth of what they were (S003
    B.2.5). The encoder is in train mode. train: features; test: the images."""
    head, steps = new_head(encoder.num_features, len(data.classes), args), steps_of(data, args)
    model = Classifier(encoder.requires_grad_(True), head, *standardisation(train.images), args)
    model = common.synchronized(model, args).train()
    forward = common.distributed(model)
    groups = [{"params": encoder.parameters(), "lr": args.encoder_lr, "falls": 0.2}]
    groups += [{"params": head.parameters(), "lr": args.lr[0], "falls": 0.1}]
    optimizer = torch.optim.SGD(groups, 0.1, args.momentum, 0, args.weight_decay, foreach=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    for epoch in range(1, args.epochs + 1):
        bar, total = common.Progress(f"epoch {epoch}/{args.epochs}", steps, args.batch_size), 0.0
        for i, (x, labels) in enumerate(augmented(data, epoch, steps, args), 1):
            loss = F.cross_entropy(forward(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total = total + loss.detach()
            bar.update(i, total)
        total = common.mean_over_processes(total)
        finite = math.isfinite(float(total))
        check(finite, f"the loss is not finite in epoch {epoch}: try a lower --lr or --encoder-lr")
        bar.show(f"{bar.label}  loss {float(total) / steps:.4f}")
        if epoch * 4 // args.epochs > (epoch - 1) * 4 // args.epochs:
            for group in optimizer.param_groups:
                group["lr"] *= group["falls"]
    model.eval()
    with torch.no_grad():
        return head(model.norm(common.encode(encoder, test, args, data)))


def measure(encoder, original, data, train, test, images, args):
    """{"knn" and the protocol: scores [N, C] of the test images}, and k and the rates taken, for
    one seed. The encoder is frozen, and compared with its original state; fine-tuning, which
    changes it, comes last. train, test: features; images: those of test."""
    classes = len(data.classes)
    torch.manual_seed(args.seed)
    finite = train.images.isfinite().all() and test.images.isfinite().all()
    check(finite, f"{args.checkpoint}: its features are not finite")
    votes, k = common.knn_votes(train.spread(args.knn_bank), test, classes, args)
    scores, how = {"knn": votes}, {"knn_k": k}
    if args.protocol == "linear":
        scores["linear"], rate, found = linear_protocol(encoder, data, train, test, args)
        how |= {"lr": rate, **({"lr_validation": found} if found else {})}
    if not all(torch.equal(v, original[key]) for key, v in encoder.state_dict().items()):
        raise RuntimeError("the encoder changed while it was evaluated")
    if args.protocol == "finetune":
        scores["finetune"] = finetune_protocol(encoder, data, train, images, args)
    return scores, how


@dataclasses.dataclass
class Measured:
    """accuracies: {"knn" and the protocol: [(top-1, top-5) of each seed]}. how: k and the rates of
    each seed. scores, train, test: of the first seed, the last two features."""

    accuracies: dict
    how: list
    scores: dict
    train: common.Split
    test: common.Split


def every_seed(encoder, data, test, args):
    """What each of the seeds measures on the images `test`."""
    original, found = copy.deepcopy(encoder.state_dict()), None
    queries, few = features_of(encoder, test, args, data), args.label_fraction < 1
    for seed in range(args.seed, args.seed + args.seeds):
        encoder.load_state_dict(original)  # fine-tuning changes it
        now = argparse.Namespace(**vars(args) | {"seed": seed})
        some = labelled(data.train, args.label_fraction, len(data.classes), seed)
        part = dataclasses.replace(data, train=some)
        train = features_of(encoder, some, args, data) if few or not found else found.train
        scores, how = measure(encoder, original, part, train, queries, test, now)
        found = found or Measured({name: [] for name in scores}, [], scores, train, queries)
        found.how.append(how)
        for name, value in scores.items():
            top1, top5 = common.top_accuracies(value, queries.labels)
            voters = how["knn_k"] if name == "knn" else math.inf
            top5 = top5 if voters >= min(5, len(data.classes)) else None  # k vote for k at most
            if name != "knn" or few or not found.accuracies[name]:  # the same for every seed
                found.accuracies[name].append((top1, top5))
    return found


def untrained(data, test, args):
    """The accuracies of an untrained encoder of the same kind by the same protocol, the linear
    classifier on cached features."""
    print(f"an untrained {args.arch}, for comparison")
    like = {"cached": args.protocol == "linear", "seeds": 1, "checkpoint": "untrained"}
    args = argparse.Namespace(**vars(args) | like)
    encoder = random_encoder(args, data)[0].to(args.device, memory_format=torch.channels_last)
    return every_seed(encoder.requires_grad_(False), data, test, args).accuracies


# --------------------------------------------------------------------------------------------------
# What stands beside a figure. What the theses print: (source and setting, protocol, architecture,
# share of the labels, and by dataset and method the accuracy in %: top-1 or (top-1, top-5), None
# where there is none). "a to b" is trained on a and evaluated on b. Left out: S000's BYOL, which is
# accuracy on training batches; S001's 100 epochs on small images; S004's 250 epochs (table A.1).

SOLO = "S003 table B.2, 1000 epochs (IN-100: 400); but for CorInfoMax solo-learn's, on CIFAR of a "
SOLO += "classifier trained meanwhile"
VARIOUS = "S003 table 5.1, from various sources"
TUNED = "S004 table 5.1, 150 epochs with labels"
# fmt: off
PUBLISHED = [
    (SOLO, "linear", "resnet18", 1, {
        "cifar10": {"simclr": (90.74, 99.75), "byol": (92.58, 99.79), "vicreg": (92.07, 99.74),
                    "barlow_twins": (92.10, 99.73), "corinfomax": (93.18, 99.88)},
        "cifar100": {"simclr": (65.78, 89.04), "byol": (70.46, 91.96), "vicreg": (68.54, 90.83),
                     "barlow_twins": (70.90, 91.91), "corinfomax": (71.61, 92.40)},
        "imagenet100": {"simclr": (77.48, 94.02), "byol": (80.32, 94.94), "vicreg": (79.40, 95.06),
                        "barlow_twins": (80.38, 95.28), "corinfomax": (80.48, 95.46)}}),
    (f"{VARIOUS}, the largest of each", "linear", "resnet18", 1,
     {"cifar10": {"simclr": 91.80}, "cifar100": {"simclr": 66.83},
      "imagenet100": {"simclr": 77.04}}),
    (f"{VARIOUS}; CorInfoMax 800 epochs; stem as for ImageNet", "linear", "resnet50", 1,
     {"tiny_imagenet": {"simclr": 48.12, "corinfomax": 54.86}}),
    (f"{VARIOUS}; CorInfoMax 200 epochs", "linear", "resnet50", 1,
     {"imagenet100": {"byol": 78.76, "corinfomax": 82.64}}),
    (f"{VARIOUS}; CorInfoMax 100 epochs", "linear", "resnet50", 1,
     {"imagenet": {"simclr": 66.5, "byol": 69.3, "barlow_twins": 68.7, "vicreg": 68.6,
                   "corinfomax": 69.08}}),
    ("S003 table 5.2, 100 epochs", "finetune", "resnet50", 0.01,
     {"imagenet": {"vicreg": 44.75, "corinfomax": 44.89}}),
    ("S003 table 5.2, 100 epochs", "finetune", "resnet50", 0.1,
     {"imagenet": {"vicreg": 62.16, "corinfomax": 64.36}}),
    (TUNED, "linear", "resnet50", 1, {
        "cifar10": {"cross_entropy": 95.0, "supcon": 96.3, "tcl": 96.4},
        "cifar100": {"cross_entropy": 75.3, "supcon": 79.1, "tcl": 79.8},
        "fashion_mnist": {"cross_entropy": 94.5, "supcon": 95.5, "tcl": 95.7}}),
    (TUNED, "linear", "resnet18", 1,
     {"imagenet100": {"cross_entropy": 84.2, "supcon": 85.9, "tcl": 86.7}}),
    ("S004 table 5.2, with labels, batch 128", "linear", "resnet18", 1,
     {"cifar10": {"tcl": 95.8}, "cifar100": {"tcl": 77.5}}),
    ("S004 table 5.2, 1000 epochs (IN-100: 400)", "linear", "resnet18", 1,
     {"cifar10": {"tcl_self_supervised": 91.8}, "cifar100": {"tcl_self_supervised": 67.2},
      "imagenet100": {"tcl_self_supervised": 78.4}}),
    ("S001 table 5.2, 200 epochs, ImageNet stem by its accuracies", "linear", "resnet18", 1, {
        "cifar10": {"simclr": 75.41, "byol": 76.46, "carl": 78.94},
        "cifar100": {"simclr": 44.94, "byol": 45.68, "carl": 48.85},
        "stl10": {"simclr": 80.57, "byol": 79.64, "carl": 81.95},
        "imagenet64": {"simclr": 30.32, "byol": 30.96, "carl": 31.86}}),
    ("S001 table 5.3, transfer, 50 epochs", "linear", "resnet18", 1, {
        "cifar10 to cifar100": {"simclr": 40.39, "byol": 43.47, "carl": 43.47},
        "cifar100 to cifar10": {"simclr": 67.4, "byol": 67.23, "carl": 67.89}}),
    ("S001 table 5.3, 50 epochs", "finetune", "resnet18", 0.01,
     {"stl10": {"simclr": 53.66, "byol": 36.64, "carl": 52.26}}),
    ("S001 table 5.3, 50 epochs", "finetune", "resnet18", 0.1,
     {"stl10": {"simclr": 73.92, "byol": 65.7, "carl": 74.85}}),
    ("S001 table 5.3, 50 epochs", "finetune", "resnet18", 1,
     {"stl10": {"simclr": 86.97, "byol": 85.72, "carl": 88.15}}),
    ("S001 table 6.1, 200 epochs", "linear", "resnet50", 1,
     {"imagenet": {"simclr": 61.9, "carl": (65.7, 86.7), "carp": (68.6, 88.5)}}),
    ("S001 table 6.1, 300 epochs", "linear", "resnet50", 1, {"imagenet": {"carp": (70.1, 89.4)}}),
    ("S001 table 6.1, 1000 epochs, batch 4096", "linear", "resnet50", 1,
     {"imagenet": {"simclr": (69.3, 89.0), "byol": 74.3}}),
    ("S001 table 6.2, 200 epochs", "finetune", "resnet50", 0.01,
     {"imagenet": {"simclr": (None, 56.5), "carl": (None, 72.6), "carp": (None, 74.5)}}),
    ("S001 table 6.2, 200 epochs", "finetune", "resnet50", 0.1,
     {"imagenet": {"simclr": (None, 82.7), "carl": (None, 83.9), "carp": (None, 85.3)}}),
    ("S001 table 6.2, 1000 epochs (CARP: 300)", "finetune", "resnet50", 0.01,
     {"imagenet": {"simclr": (None, 75.5), "byol": (None, 78.4), "barlow_twins": (None, 79.2),
                   "carp": (None, 77.1)}}),
    ("S001 table 6.2, 1000 epochs (CARP: 300)", "finetune", "resnet50", 0.1,
     {"imagenet": {"simclr": (None, 87.8), "byol": (None, 89.0), "barlow_twins": (None, 89.3),
                   "carp": (None, 86.7)}}),
    ("S002, 30 epochs (with RC 77.31, with LBE 76.74)", "linear", "resnet18", 1,
     {"cifar10": {"simclr": 76.91}}),
    ("S000 table 8, 100 epochs, best of 9, classifier trained meanwhile", "linear", "resnet18", 1,
     {"cifar10": {"simclr": (84.6, 99.4)}}),
    ("S000 table 8, 100 epochs, best, classifier trained meanwhile", "linear", "resnet50", 1,
     {"cifar10": {"simclr": (86.2, 99.7)}}),
]
# fmt: on


def published(info, name, args):
    """[(method, top-1, top-5, setting)], as fractions, for the dataset, architecture, protocol and
    share of the labels: this method's, or every method's where the theses have no such method."""
    key = name if info["dataset"] in (None, name) else f"{info['dataset']} to {name}"
    unknown, found, methods = "" if info["dataset"] else f"trained on {name}; ", [], set()
    for setting, protocol, arch, share, figures in PUBLISHED:
        methods |= {method for some in figures.values() for method in some}
        if (protocol, arch, share) == (args.protocol, args.arch, args.label_fraction):
            for method, accuracy in figures.get(key, {}).items():
                pair = accuracy if isinstance(accuracy, tuple) else (accuracy, None)
                figure = (x and round(x / 100, 4) for x in pair)
                found.append((method, *figure, unknown + setting))
    known = info["method"] in methods
    return [row for row in found if row[0] == info["method"] or not known]


T95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t, 1 to 9 degrees


def mean_and_interval(values):
    """The mean of n values and half the width of its 95 % confidence interval, None for one."""
    if None in values:
        return None, None
    mean, n = statistics.fmean(values), len(values)
    return mean, T95[n - 2] * statistics.stdev(values) / n**0.5 if n > 1 else None


def table(measured, plain, info, data, args):
    """(rows, result): rows of the printed table, (name, top-1, top-5, remark), and what they are
    in the JSON object. plain: the accuracies of an untrained encoder."""
    k, rows, result = measured.how[0]["knn_k"], [], {}
    before = ", before" * (args.protocol == "finetune")
    names = {"knn": f"kNN, k = {k}{before}", "finetune": "finetuned"}
    names["linear"] = "linear, cached" if args.cached else "linear"
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
    whose = "untrained encoder" if args.features == "projector" else "untrained"
    names |= {"linear": "linear, cached"}
    for what, ((top1, top5),) in plain.items():
        result["untrained_" + ("knn_" if what == "knn" else "") + "top1"] = top1
        rows.append((f"{whose}: {names[what]}", top1, top5, ""))
    rows.append(("chance", 1 / len(data.classes), min(1, 5 / len(data.classes)), ""))
    plainly = args.features == "encoder" and args.validation_fraction == 0
    result["published"] = published(info, data.name, args) if plainly else []
    rows += [(f"published: {method}", *rest) for method, *rest in result["published"]]
    return rows, result


# --------------------------------------------------------------------------------------------------
# Pictures: tensors in, a PIL image out

INK, PALE, BLUE, ORANGE = (34, 34, 34), (216, 216, 216), (0, 90, 181), (220, 95, 0)
COLORS = """#4363d8 #e6194b #3cb44b #f58231 #911eb4 #42d4f4 #f032e6 #9a6324 #000000 #bfef45
    #469990 #fabed4 #808000 #800000 #ffe119 #000075 #a9a9a9 #dcbeff #aaffc3 #ffd8b1""".split()
DASHES = (1, 0), (9, 4), (2, 3), (16, 6)  # pixels drawn, pixels left out


@functools.cache
def font(size):
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def shortened(text, width, size=14):
    """The text in one line, in ASCII as the font is; without its end where it is wider than that
    many pixels."""
    text = unicodedata.normalize("NFKD", " ".join(text.split()))[:400]
    text = "".join(c if " " <= c <= "~" else "?" for c in text if not unicodedata.combining(c))
    if font(size).getlength(text) > width:
        while text and font(size).getlength(text + "...") > width:
            text = text[:-1]
        text = text.rstrip() + "..."
    return text


def write(image, x, y, text, size=14, align=0.0, width=9999, fill=INK, upright=False):
    """A line of text with its top at y, from x on (align 0), centred on x (.5) or up to x (1).
    upright: it reads from below to above, with its left at x, from y on."""
    text = shortened(text, width, size)
    length = math.ceil(font(size).getlength(text))
    tile = Image.new("L", (max(1, length), size * 4 // 3))
    ImageDraw.Draw(tile).text((0, 0), text, 255, font(size))
    x, y = (x, y - (1 - align) * length) if upright else (x - align * length, y)
    image.paste(fill, (round(x), round(y)), tile.rotate(90, expand=True) if upright else tile)


def headed(body, title, caption):
    """The picture on a white page, below heading and caption."""
    sizes = max(22, body.width // 60), max(14, body.width // 90)
    lines = [(line, size) for text, size in zip((title, caption), sizes, strict=True)
             for line in textwrap.wrap(text, int(body.width / size / 0.52))]  # fmt: skip
    top = 24 + sum(size + 8 for _, size in lines)
    page, y = Image.new("RGB", (body.width + 32, top + body.height + 16), "white"), 14
    for line, size in lines:
        write(page, 16, y, line, size, width=body.width)
        y += size + 8
    page.paste(body, (16, top))
    return page


def dashed(draw, points, dash, fill, width):
    """A line through the points, by turns drawn over dash[0] pixels and left out over dash[1]."""
    gone = 0.0
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        length = math.dist((x1, y1), (x2, y2))
        steps = max(1, round(length))
        ends = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
        for i, piece in enumerate(itertools.pairwise(ends)):
            if (gone + i * length / steps) % sum(dash) < dash[0]:
                draw.line(piece, fill, width)
        gone += length


def images_at(split, index, args):
    """Images of a split as the encoder sees them, but in [0, 1]: float [n, 3, S, S] for index [n].
    No others are decoded."""
    split = split.take(index)
    images = split.images
    if not split.in_memory:
        stream = common.decode(split, [(i, None) for i in range(len(split))], 256, args)
        images = torch.cat([crops[:, 0] for crops, _ in stream])
    return common.evaluation_view(images, args.image_size, (0, 0, 0), (1, 1, 1))


def thumbnails(images, size):
    """float [N, 3, S, S] in [0, 1] -> N PIL images of size x size pixels."""
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    x = (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
    return [Image.fromarray(image) for image in x.numpy()]


def nearest_images(test_features, test_labels, train_features, rows=10, count=8):
    """Test images, int64 [rows], and for each the training images nearest by cosine, the nearest
    first, [rows, count]; fewer where there are fewer. The test images: the first of each class, of
    classes spread over all; where these are fewer than rows, also the second of each, and so on."""
    order = test_labels.cpu().argsort(stable=True)
    labels = test_labels.cpu()[order]
    turn = torch.arange(len(order)) - torch.searchsorted(labels, labels)  # 0: first of its class
    turns = turn.argsort(stable=True)[: max(rows, len(labels.unique()))]
    rows = min(rows, len(turns))
    chosen = order[turns[torch.arange(rows) * len(turns) // rows].sort().values]
    queries = F.normalize(test_features[chosen.to(test_features.device)])
    cosine = queries @ F.normalize(train_features).T
    return chosen, cosine.topk(min(count, cosine.shape[1])).indices.cpu()


def frame(draw, x, y, size, right):
    """A whole blue frame for right, a dashed orange one for wrong."""
    corners = [(x, y), (x + size, y), (x + size, y + size), (x, y + size), (x, y)]
    dashed(draw, corners, DASHES[0] if right else (8, 5), BLUE if right else ORANGE, 4)


def neighbors_picture(test_images, test_labels, train_images, train_labels, classes, title):
    """Test images, float [R, 3, S, S] in [0, 1], each in a row with its K nearest training images,
    [R, K, 3, S, S], in frames that tell whether their class, of labels [R, K], is the same."""
    (rows, count), size, wide, high, left = train_labels.shape, 72, 100, 112, 130
    body = Image.new("RGB", (max(left + wide * count, 640), 64 + high * rows), "white")
    draw, right = ImageDraw.Draw(body), (train_labels == test_labels[:, None]).tolist()
    for x, same, text in (0, True, "of the test image's class"), (290, False, "of another class"):
        frame(draw, x + 2, 4, 18, same)
        write(body, x + 30, 6, f"neighbour {text}")
    write(body, 50, 36, "test image", align=0.5)
    write(body, left + 10, 36, "its nearest training images, the nearest first")
    draw.line([(115, 36), (115, body.height)], PALE, 2)
    images = torch.cat([test_images[:, None], train_images], 1).flatten(0, 1)
    labels = torch.cat([test_labels[:, None], train_labels], 1).flatten().tolist()
    for i, (image, label) in enumerate(zip(thumbnails(images, size), labels, strict=True)):
        row, column = divmod(i, count + 1)
        x, y = left + wide * (column - 1) if column else 0, 60 + high * row
        if column:
            frame(draw, x + 10, y + 2, size + 7, right[row][column - 1])
        body.paste(image, (x + 14, y + 6))
        write(body, x + wide // 2, y + size + 13, classes[label], align=0.5, width=wide - 6)
    same = sum(map(sum, right))
    caption = f"{same} of the {rows * count} neighbours shown, {same / (rows * count):.0%}, are of "
    caption += "the test image's class. Nearest: by the cosine of the encoder's features."
    return headed(body, title, caption)


def covariance(features):
    """Of features [N, F], float64: their covariance [F, F], with N - 1, and them centred [N, F]."""
    centred = features.double() - features.double().mean(0)
    return centred.T @ centred / max(1, len(features) - 1), centred


def principal_components(features):
    """The two coordinates float64 [N, 2] in which features [N, F] vary most, and their shares [2]
    of the whole variance. The largest weight of each is positive."""
    cov, centred = covariance(features)
    values, vectors = torch.linalg.eigh(cov)
    weights = vectors[:, -2:].flip(1)  # [F, 2]
    weights = weights * weights.gather(0, weights.abs().argmax(0, keepdim=True)).sign()
    shares = values.clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300)
    return (centred @ weights).cpu(), shares[-2:].flip(0).cpu()


def tsne_of_sklearn():
    """scikit-learn's class; InputError where it is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        wrong = "--map tsne needs scikit-learn: pip install scikit-learn, or --map pca"
        raise common.InputError(wrong) from None
    return TSNE


def tsne(features, seed):
    """t-SNE's coordinates float32 [N, 2] of features [N, F]; perplexity, exaggeration and random
    start as in S003 5.6 (its three dimensions are two here, its rate of 208 scikit-learn's own)."""
    check(len(features) > 3, f"--map tsne: {len(features)} images are too few")
    settings = {"perplexity": min(50, (len(features) - 1) / 3), "early_exaggeration": 12}
    points = tsne_of_sklearn()(**settings, init="random", random_state=seed)
    return torch.from_numpy(points.fit_transform(features.cpu().numpy()))


def map_cells(points, cells, reach=2):
    """{(column, row from above) in a grid: index of a point} for points [N, 2], each in its cell or
    the nearest free one, at most `reach` away, or left out. Both axes are scaled to fill the grid.
    """
    low, high = points.amin(0), points.amax(0)
    place = (points - low) / (high - low).clamp(min=1e-12) * (cells - 1 - 2 * reach) + reach
    place, shown = place.round().long().tolist(), {}
    ways = itertools.product(range(-reach, reach + 1), repeat=2)
    ways = sorted(ways, key=lambda way: math.hypot(*way))
    for i in torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist():
        x, y = place[i][0], cells - 1 - place[i][1]
        spots = ((x + dx, y + dy) for dx, dy in ways)
        shown.setdefault(next((spot for spot in spots if spot not in shown), (x, y)), i)
    return shown


def map_picture(images, labels, points, classes, title, axes):
    """Images, float [N, 3, S, S] in [0, 1], where their points [N, 2] are, in frames of their
    classes' colours, up to 20 classes. axes: what the coordinates are, two texts."""
    cells = max(12, min(52, math.ceil(1.65 * len(points) ** 0.5)))
    tile, left, named = 1664 // cells, 28, classes if len(classes) <= len(COLORS) else ()
    across, columns = cells * tile, max(4, min(8, len(named)))
    top = 8 + 26 * math.ceil(len(named) / columns)
    body = Image.new("RGB", (left + across, top + across + 32), "white")
    draw, edge = ImageDraw.Draw(body), 3 if named else 1
    for i, name in enumerate(named):
        x, y = left + i % columns * (across // columns), i // columns * 26
        draw.rectangle((x, y, x + 16, y + 16), COLORS[i])
        write(body, x + 24, y - 1, name, 16, width=across // columns - 36)
    draw.rectangle((left, top, left + across - 1, top + across - 1), "white", PALE)
    pictures, shown = thumbnails(images, tile - 2 - 2 * edge), map_cells(points, cells)
    for (column, row), i in shown.items():
        x, y = left + column * tile + 1, top + row * tile + 1
        color = COLORS[labels[i]] if named else PALE
        draw.rectangle((x, y, x + tile - 3, y + tile - 3), color)
        body.paste(pictures[i], (x + edge, y + edge))
    write(body, left + across // 2, body.height - 26, axes[0], 20, 0.5, across)
    write(body, 0, top + across // 2, axes[1], 20, 0.5, across, upright=True)
    caption = f"{len(shown)} of {len(points)} images are shown, each at its place or the nearest "
    caption += "free one, at most two images away; no room for others. The axes are scaled to fit. "
    many = f"The {len(classes)} classes are too many to be told apart by colours."
    return headed(body, title, caption + ("Colours: the class." if named else many))


def covariance_spectrum(features):
    """Eigenvalues float64 [F] of the covariance of features [N, F], in ascending order."""
    return torch.linalg.eigvalsh(covariance(features)[0]).clamp(min=0).cpu()


def variance_shares(eigenvalues):
    """Each one's share of their sum, float64 [F], the largest first; rounding, which is what is at
    most 1e-12 of the largest, is 0."""
    values = eigenvalues.double().cpu().sort(descending=True).values
    values = values.where(values > 1e-12 * values[0], 0)
    return values / values.sum().clamp(min=1e-300)


def effective_dimension(shares):
    """exp of the entropy of shares [F]: F where all are equal, 1 where one is all, 0 for no sum."""
    return float(torch.special.entr(shares).sum().exp()) if shares.sum() > 0 else 0.0


def spectrum_panel(name, lines, bottom, top):
    """A diagram of lines, [(number, label, shares [F])], over a log axis from 10^bottom to 10^top.
    The number tells colour and dashes."""
    left, up, wide, high = 76, 36, 520, 340
    body = Image.new("RGB", (left + wide + 12, up + high + 76 + 24 * len(lines)), "white")
    draw, ranks = ImageDraw.Draw(body), max(len(shares) for *_, shares in lines)
    write(body, left + wide // 2, 0, name, 18, 0.5, wide)
    write(body, left + wide // 2, up + high + 34, "rank of the eigenvalue, largest first", 16, 0.5)
    write(body, 0, up + high // 2, "share of the whole variance", 16, 0.5, upright=True)
    step = next(n * 10**e for e in range(9) for n in (1, 2, 5) if ranks <= 6 * n * 10**e)
    for rank in {1, *range(step, ranks + 1, step)}:
        x = left + (rank - 1) / max(1, ranks - 1) * wide
        draw.line([(x, up), (x, up + high)], PALE)
        write(body, x, up + high + 8, str(rank), align=0.5)
    for decade in range(bottom, top + 1):
        y = up + (top - decade) / (top - bottom) * high
        draw.line([(left, y), (left + wide, y)], PALE)
        write(body, left - 26, y - 8, "10", align=1)
        write(body, left - 25, y - 14, str(decade), 12)
    for i, (number, label, shares) in enumerate(lines):
        color, dash, y = COLORS[number % 9], DASHES[number % 4], up + high + 70 + 24 * i
        dashed(draw, [(left, y + 8), (left + 60, y + 8)], dash, color, 2)
        text = f": effective dimension {effective_dimension(shares):.1f} of {len(shares)}"
        room = wide - 70 - font(14).getlength(text)
        write(body, left + 70, y, shortened(label, room) + text)
        x = left + torch.arange(len(shares)) / max(1, ranks - 1) * wide
        y = up + (top - shares.log10().clamp(min=bottom)) / (top - bottom) * high
        dashed(draw, torch.stack([x, y], 1).tolist(), dash, color, 2)
    return body


def spectrum_picture(curves, title):
    """Spectra of covariances, {panel: [(label, eigenvalues [F])]}, side by side on one axis; the
    same label has the same colour in all."""
    number = {label: None for lines in curves.values() for label, _ in lines}
    number = {label: i for i, label in enumerate(number)}
    panels = {name: [(number[label], label, variance_shares(values)) for label, values in lines]
              for name, lines in curves.items()}  # fmt: skip
    shares = torch.cat([shares for lines in panels.values() for *_, shares in lines])
    shown = shares[shares > 0].log10().tolist() or [0.0]
    top = math.ceil(max(shown))
    bottom = min(max(math.floor(min(shown)), top - 10), top - 1)
    parts = [spectrum_panel(name, lines, bottom, top) for name, lines in panels.items()]
    size = sum(part.width + 24 for part in parts) - 24, max(part.height for part in parts)
    body, x = Image.new("RGB", size, "white"), 0
    for part in parts:
        body.paste(part, (x, 0))
        x += part.width + 24
    caption = "Eigenvalues of the features' covariance, as shares of their sum. Effective "
    caption += "dimension: exp(entropy of the shares), F where all F are equal, 1 where one is all."
    less = " On the lower edge: what is less, or zero." if shares.min() < 10.0**bottom else ""
    return headed(body, title, caption + less)


def most_confused(counts, limit=20):
    """The `limit` classes, sorted, that take part in the most mistakes of counts [C, C]."""
    wrong = counts - counts.diag().diag()
    return (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:limit].sort().values


def confusion_picture(counts, classes, title):
    """counts int64 [C, C] of images, rows: true class, columns: predicted; of more than 20 classes
    those that are confused most."""
    total, right, known = int(counts.sum()), int(counts.diag().sum()), most_confused(counts)
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1))[known][:, known].tolist()
    names, n = [shortened(classes[k], 150) for k in known.tolist()], len(known)
    side, cell = 40 + round(max(map(font(14).getlength, names))), max(36, min(90, 460 // n))
    body = Image.new("RGB", (max(side + n * cell + 4, 640), side + n * cell + 4), "white")
    draw = ImageDraw.Draw(body)
    write(body, side + n * cell // 2, 0, "predicted class", 16, 0.5)
    write(body, 0, side + n * cell // 2, "true class", 16, 0.5, upright=True)
    for i, j in itertools.product(range(n), range(n)):
        x, y, value = side + j * cell, side + i * cell, share[i][j]
        shade = tuple(round(255 + (dark - 255) * value) for dark in BLUE)
        draw.rectangle((x, y, x + cell, y + cell), shade, PALE)
        if value >= 0.005 or i == j:
            ink, text = "white" if value > 0.5 else INK, f"{100 * value:.0f}"
            write(body, x + cell / 2, y + cell / 2 - 9, text, align=0.5, fill=ink)
    for i, name in enumerate(names):
        at = side + i * cell
        draw.rectangle((at, at, at + cell, at + cell), None, INK, 2)
        write(body, side - 8, at + cell // 2 - 9, name, align=1)
        write(body, at + cell // 2 - 9, side - 8, name, upright=True)
    title += f": {right / max(1, total):.1%} of {total} images correct"
    caption = "How many percent of the images of a true class are taken for each predicted class "
    caption += "(blank: under 0.5). Black frames: correct."
    few = f" Of {len(counts)} classes the {n} most confused, so rows need not add up to 100."
    return headed(body, title, caption + few * (n < len(counts)))


def named(info, args=None):
    """What the figures are of, for headings; the encoder alone without args."""
    epoch = "" if info["epoch"] is None else f", epoch {info['epoch']}"
    projector = args is not None and args.features == "projector"
    return f"{info['method']}{epoch}{', projector' * projector}"


def beside(path, encoder):
    """The projector of the run that an encoder.pt is in, or None. It has to be the same encoder."""
    try:
        path = Path(path).with_name("checkpoint.pt") if Path(path).name in OURS else ""
        both, _ = load_encoder(path, features="projector")
    except common.InputError:
        return None
    weights = encoder.state_dict()
    same = (torch.equal(weights[k].cpu(), v) for k, v in both.encoder.state_dict().items())
    return both.projector if all(same) else None  # else another epoch's


def spectra(label, path, h, encoder, args):
    """(label, spectrum of the representations h, that of the projections or None)."""
    projector = beside(path, encoder)
    if projector is None:
        return label, covariance_spectrum(h), None
    with torch.no_grad():
        return label, covariance_spectrum(h), covariance_spectrum(projector.to(args.device)(h))


def all_spectra(encoder, info, data, test, h, args):
    """spectra of an untrained encoder, of the evaluated one, whose representations of the test
    images are h, and of each in --compare, with what it assumes as for the evaluated one."""
    plain = random_encoder(args, data)[0].to(args.device, memory_format=torch.channels_last)
    features = common.encode(plain, test, args, data)
    found = [spectra(f"untrained {args.arch}", "", features, plain, args)]
    if args.checkpoint != "random":
        found += [spectra(named(info), args.checkpoint, h, encoder, args)]
    for path in args.compare:
        other, its = load_encoder(path)
        its |= {name: info[name] for name in its["assumed"]}
        how = argparse.Namespace(**vars(args) | {"image_size": its["image_size"]})
        seen = dataclasses.replace(data, mean=its["mean"], std=its["std"])
        other = other.to(args.device, memory_format=torch.channels_last)
        label, number = named(its), 2
        while label in [before[0] for before in found]:
            label, number = f"{named(its)} ({number})", number + 1
        found += [spectra(label, path, common.encode(other, test, how, seen), other, args)]
    return found


def draw_pictures(encoder, info, data, test, measured, args):
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
    of_map = queries[some.to(queries.device)]
    if args.map == "tsne":
        points, axes = tsne(of_map, args.seed), ("t-SNE, first coordinate", "second coordinate")
    else:
        points, shares = principal_components(of_map)
        kinds = zip(("first", "second"), shares.tolist(), strict=True)
        axes = [f"{kind} principal component, {x:.0%} of the variance" for kind, x in kinds]
    name = f"{frozen}: test images by their features"
    yield "map", map_picture(images_at(test, some, args), labels[some], points, classes, name, axes)

    other = args.protocol == "finetune" or args.features == "projector"
    if other and args.checkpoint != "random":
        encoder, _ = load_encoder(args.checkpoint, **asked(args) | {"features": None})
        encoder = encoder.to(args.device, memory_format=torch.channels_last)
        queries = common.encode(encoder, test, args, data)
    found = all_spectra(encoder, info, data, test, queries, args)
    panels = {"representations": [(label, h) for label, h, _ in found]}
    if projected := [(label, z) for label, _, z in found if z is not None]:
        panels["projections"] = projected
    yield "spectrum", spectrum_picture(panels, f"{data.name}: spectrum of the covariance")

    pairs = labels * len(classes) + measured.scores[args.protocol].argmax(1).cpu()
    counts = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1)
    how = {"knn": "kNN", "linear": "linear", "finetune": "finetuned"}[args.protocol]
    yield "confusion", confusion_picture(counts, classes, f"{of}, {how}")


def write_pictures(pictures, folder):
    for name, picture in pictures:
        with common.atomic_write(folder / f"{name}.png") as file:
            picture.save(file, "png")
        print(f"{folder / name}.png")


# --------------------------------------------------------------------------------------------------
# Command line, table


# fmt: off
def parser():
    p = common.Parser(__doc__.splitlines()[0])
    p.add_argument("--checkpoint", required=True, help="encoder.pt, checkpoint.pt, or: random")
    p.add_argument("--key", help="a part of the encoder's prefix, where a file holds several")
    p.add_argument("--mean", type=float, nargs=3, help="of the channels (default: see below)")
    p.add_argument("--std", type=common.positive, nargs=3, help="default: what the file says, else "
                   "those of the dataset with the small stem, of ImageNet with the other")
    p.add_argument("--features", choices=FEATURES, default="encoder",
                   help="what is evaluated; the projector is in our own checkpoint.pt")
    p.add_argument("--protocol", choices=PROTOCOLS, default="linear", help="see above")
    p.add_argument("--recipe", choices=RECIPES, help="settings of a thesis, see the file's head")
    common.shared_arguments(p)
    p.set_defaults(arch=None)  # the checkpoint knows
    p.add_argument("--cached", action="store_true", help="compute features once, no augmentation")
    p.add_argument("--label-fraction", type=common.number(float, 1e-6, 1), default=1.0,
                   help="of the training images of each class, for every protocol")
    p.add_argument("--seeds", type=common.number(int, 1, 10), default=1, help="repeat with --seed, "
                   "--seed + 1, ...: the mean and its 95 %% confidence interval")
    p.add_argument("--epochs", type=common.count, default=100, help="of the classifier")
    p.add_argument("--batch-size", type=common.count, default=256, help="of the classifier")
    p.add_argument("--lr", type=common.positive, nargs="+", default=[0.02],
                   help="initial; of several the best on a tenth of the training images, held out")
    p.add_argument("--lr-floor", type=common.fraction, default=0.01,
                   help="the last learning rate, as a share of the first; for linear")
    p.add_argument("--encoder-lr", type=common.positive, default=0.005, help="for finetune, S003")
    p.add_argument("--momentum", type=common.fraction, default=0.9, help="of SGD")
    p.add_argument("--weight-decay", type=common.number(float, 0), default=0.0, help="of SGD")
    p.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=True,
                   help="bring features to mean 0 and deviation 1 for the linear classifier")
    p.add_argument("--crop-min", type=common.number(float, 1e-3, 1), default=0.08,
                   help="smallest crop, share of the image's area")
    p.add_argument("--validation-fraction", type=common.fraction, default=0.0,
                   help="measure on this share of the training images, held out, instead of test")
    p.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True,
                   help="measure an untrained encoder as well, for comparison")
    p.add_argument("--pictures", action="store_true", help="write neighbors.png, map.png, "
                   "spectrum.png and confusion.png beside the checkpoint")
    p.add_argument("--map", choices=MAPS, default="pca", help="how map.png comes to two dimensions;"
                   " tsne needs scikit-learn")
    p.add_argument("--compare", nargs="+", default=[], help="more checkpoints for spectrum.png")
    return p
# fmt: on


def arguments():
    args = common.parse_args(parser(), PRESETS, "protocol", "recipe")
    linear = args.protocol == "linear"
    check(not args.cached or linear, "--cached is for --protocol linear")
    check(len(args.lr) == 1 or linear, "several --lr are for --protocol linear")
    fits = args.recipe is None or linear or (args.recipe, args.protocol) == ("s001", "finetune")
    check(fits, f"--recipe {args.recipe} is for linear; finetune without one is S003's, or s001")
    projector = args.features == "projector"
    check(not projector or args.protocol != "finetune", "--features projector is not for finetune")
    for flag in "map", "compare":
        given = getattr(args, flag) != parser().get_default(flag)
        check(args.pictures or not given, f"--{flag} is for --pictures")
    if args.map == "tsne":
        tsne_of_sklearn()  # hours later would be a bad time to find it missing
    for path in args.compare:
        load_encoder(path)
    common.resolve_hardware(args)
    return args


def asked(args):
    """What the flags tell load_encoder."""
    given = {"arch": args.arch, "stem": None if args.stem == "auto" else args.stem}
    given |= {"image_size": args.image_size, "mean": args.mean, "std": args.std}
    return given | {"key": args.key, "features": args.features}


def the_encoder(args):
    """(encoder, info, data): what --checkpoint and --dataset name, and how images are shown to it.
    Fills in args.arch, stem and image_size."""
    untrained = args.checkpoint == "random"
    if not untrained:  # before the data: the cheaper thing to be wrong about
        encoder, info = load_encoder(args.checkpoint, **asked(args))
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
        shape = data.train.images.shape[2:]
        cut = "x".join(map(str, common.centre_box(*shape, args.image_size)[2:]))
        print(f"{data.name}: {shape[1]}x{shape[0]} pixels, of which the central {cut} are resized "
              f"to the {args.image_size} of the encoder")  # fmt: skip
    data = dataclasses.replace(data.to(args.device), mean=info["mean"], std=info["std"])
    encoder = encoder.to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    return encoder, info, data


def the_images(data, args):
    """(data, test, kind): training images, those the figures are of, and what these are."""
    held = args.validation_fraction > 0
    there = data.test is not None or held
    check(there, f"{data.name} has no test split: hold images out with --validation-fraction 0.1")
    if held:
        train, test = hold_out(data.train, args.validation_fraction, len(data.classes), args.seed)
        data = dataclasses.replace(data, train=train, test=test)
    kind = "validation" if held else "test"
    all_there(data, kind)
    return data, data.test, kind


def the_file(data, args):
    """Where the figures go: beside the checkpoint, or in a folder of its own. It can be written."""
    path, untrained = Path(args.checkpoint), args.checkpoint == "random"
    folder = Path(f"runs/random_{data.name}_{args.arch}") if untrained else path.parent
    words = [args.protocol, args.recipe, "projector" * (args.features == "projector")]
    words += [f"{args.seeds}-seeds" * (args.seeds > 1)]
    words += [f"{args.label_fraction:g}" * (args.label_fraction < 1), "cached" * args.cached]
    words += ["validation" * (args.validation_fraction > 0), data.name]
    words += [] if untrained or path.name in OURS else [path.stem]
    file = folder / ("_".join(filter(None, words)) + ".json")

    def try_to_write():  # hours later would be a bad time to fail
        folder.mkdir(parents=True, exist_ok=True)
        with common.atomic_write(file.with_suffix(".test")):
            pass
        file.with_suffix(".test").unlink()

    common.on_first(try_to_write)
    return file


def main():
    args = arguments()
    encoder, info, data = the_encoder(args)
    data, test, kind = the_images(data, args)
    whole = len(data.train)
    some = labelled(data.train, args.label_fraction, len(data.classes), args.seed)
    part = dataclasses.replace(data, train=some)
    few, file = len(some) < whole, the_file(data, args)
    if few:
        print(f"labels of {len(some)} of {whole} training images, {args.label_fraction:g} of each")
    if args.protocol != "knn":  # before the features, for what is wrong with the batches
        steps_of(part, args)
    start = time.time()
    measured = every_seed(encoder, data, test, args)
    seconds = round(time.time() - start, 1)
    plain = untrained(data, test, args) if args.untrained and info["method"] != "untrained" else {}
    rows, figures = table(measured, plain, info, data, args)
    result = {"protocol": args.protocol, "dataset": data.name, "split": kind}
    result |= {"features": args.features, "cached": args.cached, "seeds": args.seeds}
    result |= {"label_fraction": args.label_fraction, "labelled_images": len(some), **figures}
    result |= {"images": len(test), "seconds": seconds}
    result |= {"method": info["method"], "epoch": info["epoch"], **common.describe(args)}
    result |= {key: info[key] for key in ("found", "assumed") if key in info}

    what = f"{named(info, args)}, {args.arch}, {args.stem} stem"
    print(f"\n{what}: {data.name}, {len(test)} {kind} images of {args.image_size} pixels")
    width = max(18, *(len(row[0]) for row in rows)) + 1
    print(f"{'':{width}}{'top-1':>8}{'top-5':>8}")
    for name, *accuracy, remark in rows:
        cells = (f"{x:8.2%}" if x is not None else f"{'-':>8}" for x in accuracy)
        print(f"{name:{width}}{''.join(cells)}{'  ' * bool(remark)}{remark}")
    common.on_first(lambda: common.write_json(result, file))
    if args.pictures:
        pictures = list(draw_pictures(encoder, info, part, test, measured, args))
        common.on_first(lambda: write_pictures(pictures, file.parent))
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
