# SPDX-License-Identifier: MIT
"""Evaluate a saved encoder: a classifier on its frozen features, nearest neighbours, fine-tuning.

linear   The encoder stays frozen, in eval mode: its parameters and its batch-norm statistics are
         compared bit for bit before and after. A linear layer is trained on its output with SGD,
         momentum .9, cosine from lr .2 to .002, no weight decay, batches of 256, 100 epochs, random
         resized crops and flips (S003 5.2.5 and B.1.2). Unlike there, features are standardised.
         With --cached they are computed once, without augmentation: minutes, not hours, on a CPU.
         On shapes, 20 epochs and crops of at least .4 of the area.
knn      Weighted nearest neighbours by cosine (Wu et al. 2018); the others report them as well.
finetune Encoder and classifier are trained together, 20 epochs, the encoder with a rate of its own,
         --encoder-lr .005, in steps (S003 B.2.5, whose rates 20 and 30 of the classifier are for
         features that are not standardised; here .2). --epochs 50 as in S001 5.8.

With --label-fraction .01 or .1 all of them use the labels of that share of each class alone.

--checkpoint takes what the training scripts save and any other file with a whole ResNet in it.

The accuracy is the last epoch's, on the test images, which nothing is chosen on. To choose
anything, take --validation-fraction: it holds out training images and leaves the test images alone.

Run: python linear_eval.py --checkpoint runs/simclr_cifar10_resnet18/encoder.pt --dataset cifar10
     python linear_eval.py --checkpoint random --dataset cifar10     (an untrained encoder)
"""

import bisect
import collections
import dataclasses
import itertools
import json
import math
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import check

PROTOCOLS = ("linear", "knn", "finetune")
PRESETS = {
    "default": {"epochs": 100, "crop_min": 0.08},
    "shapes": {"epochs": 20, "crop_min": 0.4},
    "finetune": {"epochs": 20, "batch_size": 256},  # S003 B.2.5; S001 table 5.3: 50 epochs
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
    std, and key, a part of the prefix where there are several.

    Returns (encoder, info): a ResNet from [B, 3, S, S] to [B, F], and a dict with arch, stem,
    image_size, mean, std, method, dataset, epoch; "found", a line that says what was taken and what
    was ignored; "assumed", which of image_size, mean and std neither file nor overrides say (then
    224 pixels, or 32 with the small stem, and ImageNet's statistics). InputError, one line, for
    anything else: a part of an encoder, several, none, a file that would run code."""
    saved = common.load_file(path)
    tensors = tensors_in(saved)
    chosen = choose(list(candidates_in(tensors)), path, overrides)
    overrides = {k: v for k, v in overrides.items() if v is not None and k != "key"}
    ours = isinstance(saved, dict) and all(name in saved for name in ABOUT)
    info = {name: saved[name] for name in ABOUT} | overrides if ours else overrides
    for name in "arch", "stem":
        value = getattr(chosen, name)
        given = info.get(name, value)
        check(given == value, f"{path}: {name} is {value} by its weights, not {given!r}: --{name}")
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
    return chosen.encoder(), info


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
    return common.resnet(arch, stem).eval(), info | {"method": "untrained", "epoch": 0}


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


def new_head(num_features, num_classes, args):
    head = nn.Linear(num_features, num_classes).to(args.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def standardisation(features):
    """Mean and deviation [F] of features [N, F] over the images."""
    mean, std = features.mean(0), features.std(0)
    return mean, std.maximum(std.mean() / 100).clamp(
        min=1e-6
    )  # an all but dead feature stays small


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
    check(min(most, args.batch_size) >= least, f"{few} {args.protocol} in {processes} processes")
    share = max(most // 8, least) if args.label_fraction < 1 else most
    if args.batch_size > share:
        print(f"{most} training images: batches of {share - share % processes}")
    args.batch_size = min(args.batch_size, share - share % processes)
    return most // args.batch_size


def fit_linear(epoch_of_batches, num_features, num_classes, steps, args):
    """Train a linear layer on the batches (features [B, F], labels [B]) of each epoch."""
    head = new_head(num_features, num_classes, args)
    optimizer = torch.optim.SGD(head.parameters(), args.lr, args.momentum, foreach=True)
    for epoch in range(1, args.epochs + 1):
        bar, total = common.Progress(f"epoch {epoch}/{args.epochs}", steps, args.batch_size), 0.0
        for i, batch in enumerate(epoch_of_batches(epoch), 1):
            h, y = common.gather(batch)  # from all processes: each trains the same head
            step = (epoch - 1) * steps + i - 1
            lr = common.learning_rate(step, steps * args.epochs, 0, args.lr, args.lr / 100)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = F.cross_entropy(head(h), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total = total + loss.detach()
            bar.update(i, total)
        finite = math.isfinite(float(total))
        check(finite, f"the classifier's loss is not finite in epoch {epoch}: try a lower --lr")
        if epoch % max(1, args.epochs // 5) == 0:
            bar.show(f"{bar.label}  loss {float(total) / steps:.4f}")
    return head


def linear_protocol(encoder, data, train, test, args):
    """Top-1 and top-5 accuracy of a linear classifier on the frozen encoder. train, test: features.

    Features are standardised with the mean and deviation of the training images' features: the
    classifier is linear all the same, and one learning rate fits encoders of any scale."""
    (mean, std), steps = standardisation(train.images), steps_of(data, args)
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

    head = fit_linear(batches, encoder.num_features, len(data.classes), steps, args)
    with torch.no_grad():
        return common.top_accuracies(head((test.images - mean) / std), test.labels)


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
    """Top-1 and top-5 accuracy after encoder and classifier were trained together, with learning
    rates of their own, both by steps: after each quarter of the epochs a fifth and a tenth of what
    they were (S003 B.2.5). The encoder is in train mode. train: features; test: the images."""
    head, steps = new_head(encoder.num_features, len(data.classes), args), steps_of(data, args)
    model = Classifier(encoder.requires_grad_(True), head, *standardisation(train.images), args)
    model = common.synchronized(model, args).train()
    forward = common.distributed(model)
    groups = [{"params": encoder.parameters(), "lr": args.encoder_lr, "falls": 0.2}]
    groups += [{"params": head.parameters(), "lr": args.lr, "falls": 0.1}]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, foreach=True)
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
        h = common.encode(encoder, test, args, data)
        return common.top_accuracies(head(model.norm(h)), test.labels)


# fmt: off
def parser():
    p = common.Parser(__doc__.splitlines()[0])
    p.add_argument("--checkpoint", required=True, help="encoder.pt, checkpoint.pt, or: random")
    p.add_argument("--key", help="a part of the encoder's prefix, where a file holds several")
    p.add_argument("--mean", type=float, nargs=3, help="of the channels (default: see below)")
    p.add_argument("--std", type=common.positive, nargs=3, help="default: what the file says, else "
                   "those of the dataset with the small stem, of ImageNet with the other")
    p.add_argument("--protocol", choices=PROTOCOLS, default="linear", help="see above")
    common.shared_arguments(p)
    p.set_defaults(arch=None)  # the checkpoint knows
    p.add_argument("--cached", action="store_true", help="compute features once, no augmentation")
    p.add_argument("--label-fraction", type=common.number(float, 1e-6, 1), default=1.0,
                   help="of the training images of each class, for every protocol")
    p.add_argument("--epochs", type=common.count, default=100, help="of the classifier")
    p.add_argument("--batch-size", type=common.count, default=256, help="of the classifier")
    p.add_argument("--lr", type=common.positive, default=0.2, help="initial; S003: 0.2 to 0.002")
    p.add_argument("--encoder-lr", type=common.positive, default=0.005, help="for finetune, S003")
    p.add_argument("--momentum", type=common.fraction, default=0.9, help="of SGD")
    p.add_argument("--crop-min", type=common.number(float, 1e-3, 1), default=0.08,
                   help="smallest crop, share of the image's area")
    p.add_argument("--validation-fraction", type=common.fraction, default=0.0,
                   help="measure on this share of the training images, held out, instead of test")
    return p
# fmt: on


def main():
    args = common.parse_args(parser(), PRESETS, "protocol")
    check(not args.cached or args.protocol == "linear", "--cached is for --protocol linear")
    common.resolve_hardware(args)
    untrained, held = args.checkpoint == "random", args.validation_fraction > 0
    if not untrained:  # before the data: the cheaper thing to be wrong about
        given = {"arch": args.arch, "image_size": args.image_size, "mean": args.mean}
        given |= {"std": args.std, "key": args.key}
        given["stem"] = None if args.stem == "auto" else args.stem
        encoder, info = load_encoder(args.checkpoint, **given)
        print(f"{args.checkpoint}: {info['found']}")
    data = common.load_once(args)
    if untrained:
        encoder, info = random_encoder(args, data)
    elif info["assumed"]:
        if info["stem"] == "small":  # trained on images such as these, most likely
            like = {"image_size": data.size, "mean": data.mean, "std": data.std}
            info |= {name: like[name] for name in info["assumed"]}
        print("assumed:", ", ".join(f"{name} {info[name]}" for name in info["assumed"]))
    there = data.test is not None or held
    check(there, f"{data.name} has no test split: hold images out with --validation-fraction 0.1")
    args.image_size, args.arch, args.stem = info["image_size"], info["arch"], info["stem"]
    data = dataclasses.replace(data.to(args.device), mean=info["mean"], std=info["std"])
    test, kind = data.test, "validation" if held else "test"
    if held:
        train, test = hold_out(data.train, args.validation_fraction, len(data.classes), args.seed)
        data = dataclasses.replace(data, train=train)
    whole = len(data.train)
    train = labelled(data.train, args.label_fraction, len(data.classes), args.seed)
    data, few = dataclasses.replace(data, train=train), len(train) < whole
    if few:
        print(f"labels of {len(train)} of {whole} training images, {args.label_fraction:g} of each")
    folder = Path(args.checkpoint).parent
    folder = Path(f"runs/random_{data.name}_{args.arch}") if untrained else folder
    words = [
        args.protocol,
        f"{args.label_fraction:g}" * few,
        "cached" * args.cached,
        "validation" * held,
        data.name,
    ]
    words += [] if untrained or Path(args.checkpoint).name in OURS else [Path(args.checkpoint).stem]
    file = folder / ("_".join(filter(None, words)) + ".json")

    def try_to_write():  # hours later would be a bad time to fail
        folder.mkdir(parents=True, exist_ok=True)
        with common.atomic_write(file.with_suffix(".test")):
            pass
        file.with_suffix(".test").unlink()

    common.on_first(try_to_write)
    if args.protocol != "knn":
        steps_of(data, args)  # before the features, for what is wrong with the batches

    encoder = encoder.to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    torch.manual_seed(args.seed)
    start, classes = time.time(), len(data.classes)
    features, queries = (
        common.Split(common.encode(encoder, split, args, data), split.labels.to(args.device))
        for split in (data.train, test)
    )
    finite = features.images.isfinite().all() and queries.images.isfinite().all()
    check(finite, f"{args.checkpoint}: its features are not finite")
    *knn, k = common.knn_accuracies(features.spread(args.knn_bank), queries, classes, args)
    result = {"protocol": args.protocol, "dataset": data.name, "split": kind}
    result |= {"label_fraction": args.label_fraction, "labelled_images": len(data.train)}
    result |= {"knn_top1": knn[0], "knn_top5": knn[1], "knn_k": k}
    rows = [(f"kNN, k = {k}", *knn), ("chance", 1 / classes, min(1, 5 / classes))]
    if args.protocol == "linear":
        top1, top5 = linear_protocol(encoder, data, features, queries, args)
        result |= {"top1": top1, "top5": top5, "cached": args.cached}
        rows.insert(1, ("linear, cached" if args.cached else "linear", top1, top5))
    if not all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()):
        raise RuntimeError("the encoder changed while it was evaluated")
    if args.protocol == "finetune":
        top1, top5 = finetune_protocol(encoder, data, features, test, args)
        result |= {"top1": top1, "top5": top5}
        rows.insert(1, ("finetuned", top1, top5))
        rows[0] = (rows[0][0] + ", before", *rows[0][1:])
    result |= {"images": len(test), "seconds": round(time.time() - start, 1)}
    result |= {"method": info["method"], "epoch": info["epoch"], **common.describe(args)}
    result |= {key: info[key] for key in ("found", "assumed") if key in info}

    epoch = "" if info["epoch"] is None else f", epoch {info['epoch']}"
    what = f"{info['method']}{epoch}, {args.arch}, {args.stem} stem"
    print(f"\n{what}: {data.name}, {len(test)} {kind} images of {args.image_size} pixels")
    print(f"{'':18}{'top-1':>8}{'top-5':>8}")
    for name, top1, top5 in rows:
        print(f"{name:18}{top1:8.2%}{top5:8.2%}")
    common.on_first(lambda: common.write_json(result, file))
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
