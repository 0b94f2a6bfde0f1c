# SPDX-License-Identifier: MIT
"""Evaluate a saved encoder: a linear classifier on its frozen features, or nearest neighbours.

linear   The encoder stays frozen, in eval mode: its parameters and its batch-norm statistics are
         compared bit for bit before and after. A linear layer is trained on its output with SGD,
         momentum .9, cosine from lr .2 to .002, no weight decay, batches of 256, 100 epochs, random
         resized crops and flips (S003 5.2.5 and B.1.2). Unlike there, features are standardised.
         With --cached they are computed once, without augmentation: minutes, not hours, on a CPU.
         On shapes, 20 epochs and crops of at least .4 of the area.
knn      Weighted nearest neighbours by cosine (Wu et al. 2018); `linear` reports them as well.

The accuracy is the last epoch's, on the test images, which nothing is chosen on. To choose
anything, take --validation-fraction: it holds out training images and leaves the test images alone.

Run: python linear_eval.py --checkpoint runs/simclr_cifar10_resnet18/encoder.pt --dataset cifar10
     python linear_eval.py --checkpoint random --dataset cifar10     (an untrained encoder)
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import check

PRESETS = {"default": {"epochs": 100, "crop_min": 0.08}, "shapes": {"epochs": 20, "crop_min": 0.4}}
ABOUT = ("arch", "stem", "image_size", "mean", "std")  # what an encoder needs beside its weights


def load_encoder(path, **overrides):
    """The encoder in an encoder.pt or checkpoint.pt of ours, in eval mode, and what is known of it.

    overrides: arch, stem, image_size, mean, std; they replace what the file says. Returns (encoder,
    info): a ResNet from [B, 3, S, S] to [B, F], and a dict of the five and method, dataset, epoch.
    InputError for anything that is not a whole ResNet encoder."""
    saved, ours = common.load_file(path), "an encoder.pt or checkpoint.pt written by these scripts"
    check(isinstance(saved, dict) and all(key in saved for key in ABOUT), f"{path}: not {ours}")
    info = {k: saved.get(k) for k in (*ABOUT, "method", "dataset", "epoch")} | overrides
    try:
        weights = saved.get("state_dict")
        if weights is None:  # checkpoint.pt: the backbone among the rest of the method
            weights, start = saved["model"], "backbone."
            start = f"method.{start}" if f"method.{start}conv1.weight" in weights else start
            weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        encoder = common.resnet(info["arch"], info["stem"])
        encoder.load_state_dict(weights)
        info["mean"], info["std"] = ([float(x) for x in info[key]] for key in ("mean", "std"))
        right = len(info["mean"]) == len(info["std"]) == 3 and min(info["std"]) > 0
        check(right and 8 <= int(info["image_size"]) <= 4096, "unusable mean, std or image_size")
    except (ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise common.InputError(f"{path}: not {ours}: {reason}") from None
    return encoder.eval(), info


def random_encoder(args, data):
    """An untrained encoder for comparison: resnet18, or what the flags say."""
    size, arch = args.image_size or data.size, args.arch or "resnet18"
    stem = args.stem if args.stem != "auto" else "small" if size <= 64 else "imagenet"
    torch.manual_seed(args.seed)
    info = {"arch": arch, "stem": stem, "image_size": size, "mean": data.mean, "std": data.std}
    return common.resnet(arch, stem).eval(), info | {"method": "untrained", "epoch": 0}


def hold_out(split, fraction, num_classes, seed):
    """Two splits, (rest, held out): `fraction` of the images of each class, drawn from the seed."""
    order = torch.randperm(len(split), generator=common.generator(seed, "validation", 0))
    labels, held = split.labels.cpu()[order], []
    for label in range(num_classes):
        index = order[labels == label]
        held.append(index[: round(fraction * len(index))])
    mask = torch.zeros(len(split), dtype=torch.bool)
    mask[torch.cat(held)] = True

    def part(keep):
        if split.in_memory:
            keep = keep.to(split.labels.device)
            return common.Split(split.images[keep], split.labels[keep])
        paths = [path for path, kept in zip(split.images, keep.tolist(), strict=True) if kept]
        return common.Split(paths, split.labels[keep.to(split.labels.device)])

    check(0 < int(mask.sum()) < len(split), f"--validation-fraction {fraction} leaves a part empty")
    return part(~mask), part(mask)


def fit_linear(epoch_of_batches, num_features, num_classes, steps, args):
    """Train a linear layer on the batches (features [B, F], labels [B]) of each epoch."""
    head = nn.Linear(num_features, num_classes).to(args.device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), args.lr, args.momentum, foreach=True)
    for epoch in range(1, args.epochs + 1):
        bar, total = common.Progress(f"epoch {epoch}/{args.epochs}", steps, args.batch_size), 0.0
        for i, (h, y) in enumerate(epoch_of_batches(epoch), 1):
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
    mean, std = train.images.mean(0), train.images.std(0)
    std = std.maximum(std.mean() / 100).clamp(min=1e-6)  # an all but dead feature stays small
    args.batch_size = min(args.batch_size, len(data.train))  # a small set is one batch
    steps = len(data.train) // args.batch_size
    if args.cached:
        cached = common.Split((train.images - mean) / std, train.labels)

        def batches(epoch):
            return common.training_batches(cached, epoch, args, [])
    else:
        recipes = [common.Recipe((args.crop_min, 1.0), jitter_p=0, gray_p=0)]
        augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)

        def batches(epoch):
            stream = common.training_batches(data.train, epoch, args, recipes)
            for i, (images, labels) in enumerate(stream):
                rng = common.generator(args.seed, "linear", epoch * steps + i, args.device)
                (x,) = augment(images, rng)
                with torch.no_grad(), common.autocast(args):
                    h = encoder(x)
                yield (h.float() - mean) / std, labels

    head = fit_linear(batches, encoder.num_features, len(data.classes), steps, args)
    with torch.no_grad():
        return common.top_accuracies(head((test.images - mean) / std), test.labels)


# fmt: off
def parser():
    p = common.Parser(__doc__.splitlines()[0])
    p.add_argument("--checkpoint", required=True, help="encoder.pt, checkpoint.pt, or: random")
    p.add_argument("--protocol", choices=("linear", "knn"), default="linear", help="see above")
    common.shared_arguments(p)
    p.set_defaults(arch=None)  # the checkpoint knows
    p.add_argument("--cached", action="store_true", help="compute features once, no augmentation")
    p.add_argument("--epochs", type=common.count, default=100, help="of the linear classifier")
    p.add_argument("--batch-size", type=common.count, default=256, help="of the linear classifier")
    p.add_argument("--lr", type=common.positive, default=0.2, help="initial; S003: 0.2 to 0.002")
    p.add_argument("--momentum", type=common.fraction, default=0.9, help="of SGD")
    p.add_argument("--crop-min", type=common.number(float, 1e-3, 1), default=0.08,
                   help="smallest crop, share of the image's area")
    p.add_argument("--validation-fraction", type=common.fraction, default=0.0,
                   help="measure on this share of the training images, held out, instead of test")
    return p
# fmt: on


def main():
    args = common.parse_args(parser(), PRESETS)
    common.resolve_hardware(args)
    untrained, held = args.checkpoint == "random", args.validation_fraction > 0
    if not untrained:  # before the data: the cheaper thing to be wrong about
        given = {"arch": args.arch, "image_size": args.image_size}
        given["stem"] = None if args.stem == "auto" else args.stem
        given = {key: value for key, value in given.items() if value is not None}
        encoder, info = load_encoder(args.checkpoint, **given)
    data = common.load_dataset(args.dataset, args.data_dir)
    if untrained:
        encoder, info = random_encoder(args, data)
    there = data.test is not None or held
    check(there, f"{data.name} has no test split: hold images out with --validation-fraction 0.1")
    args.image_size, args.arch, args.stem = info["image_size"], info["arch"], info["stem"]
    data = dataclasses.replace(data.to(args.device), mean=info["mean"], std=info["std"])
    test, kind = data.test, "validation" if held else "test"
    if held:
        train, test = hold_out(data.train, args.validation_fraction, len(data.classes), args.seed)
        data = dataclasses.replace(data, train=train)
    folder = Path(args.checkpoint).parent
    folder = Path(f"runs/random_{data.name}_{args.arch}") if untrained else folder
    words = [args.protocol, "cached" * args.cached, "validation" * held, data.name]
    file = folder / ("_".join(filter(None, words)) + ".json")
    folder.mkdir(parents=True, exist_ok=True)
    with common.atomic_write(file.with_suffix(".test")):  # hours later would be a bad time to fail
        pass
    file.with_suffix(".test").unlink()

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
    result |= {"knn_top1": knn[0], "knn_top5": knn[1], "knn_k": k}
    rows = [(f"kNN, k = {k}", *knn), ("chance", 1 / classes, min(1, 5 / classes))]
    if args.protocol == "linear":
        top1, top5 = linear_protocol(encoder, data, features, queries, args)
        result |= {"top1": top1, "top5": top5, "cached": args.cached}
        rows.insert(1, ("linear, cached" if args.cached else "linear", top1, top5))
    if not all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()):
        raise RuntimeError("the encoder changed while it was evaluated")
    result |= {"images": len(test), "seconds": round(time.time() - start, 1)}
    result |= {"method": info["method"], "epoch": info["epoch"], **common.describe(args)}

    what = f"{info['method']}, epoch {info['epoch']}, {args.arch}, {args.stem} stem"
    print(f"\n{what}: {data.name}, {len(test)} {kind} images of {args.image_size} pixels")
    print(f"{'':18}{'top-1':>8}{'top-5':>8}")
    for name, top1, top5 in rows:
        print(f"{name:18}{top1:8.2%}{top5:8.2%}")
    common.write_json(result, file)
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
