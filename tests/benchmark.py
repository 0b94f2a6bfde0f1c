# SPDX-License-Identifier: MIT
"""What a training step costs, and what of it is data and augmentation. Run by hand, not a test.

    python tests/benchmark.py --dataset cifar10 --batch-size 256 --json benchmark.json

The arms take turns in one process, in blocks of a few steps, so that a machine that slows down or
speeds up does so for all of them; a figure is the median over blocks, with the quartiles beside it.

    cached   the step (forward, loss, backward, optimiser) on views that are there already
    real     the same step fed by the training pipeline: gather, draw, augment, normalise
    views    the pipeline alone
    pillow   the same step fed by torchvision's transforms on PIL images in a DataLoader
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import simclr  # noqa: E402


class TwoPillowViews(torch.utils.data.Dataset):
    """SimCLR's CIFAR recipe the usual way: one PIL image at a time, in worker processes."""

    def __init__(self, data, size, strength):
        self.images, s = data.train.images, strength
        jitter = T.RandomApply([T.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8)
        crop = T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)
        final = [T.ToTensor(), T.Normalize(data.mean, data.std)]
        self.transform = T.Compose(
            [T.ToPILImage(), crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), *final]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.transform(self.images[index]), index


def forever(make):
    while True:
        yield from make()


def main():
    parser = common.base_parser(__doc__)
    parser.set_defaults(color_strength=0.5, batch_size=256)
    parser.add_argument("--blocks", type=common.count, default=7, help="blocks of each arm")
    parser.add_argument("--steps", type=common.count, default=2, help="steps in a block")
    parser.add_argument("--json", help="file to write the figures to")
    args = common.parse_args(parser, {"default": {}})
    data = common.prepare(args, "benchmark")
    model = simclr.SimCLR(common.resnet(args.arch, args.stem))
    model = model.to(args.device, memory_format=torch.channels_last).train()
    optimizer = common.make_optimizer(model, args)
    recipes = common.symmetric(args.views, args.color_strength, args.crop_min, args.blur)
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
    source = forever(lambda: common.training_batches(data.pretrain, 1, args, recipes))
    pillow = torch.utils.data.DataLoader(
        TwoPillowViews(data, args.image_size, args.color_strength),
        batch_size=args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers,
    )  # fmt: skip
    pillow_source, counter = forever(lambda: pillow), iter(range(10**9))

    def make_views():
        images, _ = next(source)
        return augment(images, common.generator(0, "augment", next(counter), args.device))

    def step(views):
        with common.autocast(args):
            loss, _ = model(views, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def pillow_step():
        x1, x2, _ = next(pillow_source)
        layout = torch.channels_last
        step([x.to(args.device, memory_format=layout, non_blocking=True) for x in (x1, x2)])

    cached = [view.clone() for view in make_views()]
    arms = {
        "cached": lambda: step(cached),
        "real": lambda: step(make_views()),
        "views": make_views,
        "pillow": pillow_step,
    }
    seconds = {name: [] for name in arms}
    for block in range(args.blocks + 1):  # the first warms up
        for name, arm in arms.items():
            repeats = args.steps * (10 if name == "views" else 1)
            start = time.perf_counter()
            for _ in range(repeats):
                arm()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if block:
                seconds[name].append((time.perf_counter() - start) / repeats)
    rows = {}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        rate = args.batch_size / median
        rows[name] = {"ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high]}
        rows[name] |= {"images_per_second": rate, "seconds_per_epoch": len(data.pretrain) / rate}
    base = rows["cached"]["ms"]
    print(f"{'arm':8}{'ms/step':>10}{'quartiles':>18}{'img/s':>9}{'s/epoch':>9}{'/cached':>9}")
    for name, row in rows.items():
        low, high = row["ms_quartiles"]
        print(f"{name:8}{row['ms']:10.1f}{low:9.1f}{high:9.1f}{row['images_per_second']:9.0f}"
              f"{row['seconds_per_epoch']:9.1f}{row['ms'] / base:9.3f}")  # fmt: skip
    if args.json:
        common.write_json({"arms": rows, **common.describe(args)}, args.json)


if __name__ == "__main__":
    common.run(main)
