# SPDX-License-Identifier: MIT
"""What a training step costs, and what of it is data and augmentation. Run by hand, not a test.

    python tests/benchmark.py --dataset cifar10 --batch-size 256 --json benchmark.json

What is timed takes turns, each time in another order, in blocks of a few steps, so that a machine
that slows down does so for all. A figure is the median over blocks with its quartiles, a comparison
the median of the blocks' ratios. Flags other than its own go to simclr.py.

data     SimCLR's step on views that are there already (cached) or fed by the training pipeline
         (real); the pipeline alone (views); the step fed by torchvision's transforms on PIL images
         with N worker processes (pil N), and as it is usually written, in the same precision
         (usual) or in fp32 (plain)
ladder   the cached step with one thing taken away
methods  the cached step of each method, with its preset for the dataset and this batch size
"""

import contextlib
import copy
import functools
import importlib
import io
import itertools
import random
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torchvision.transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

METHODS = {name: name for name in ("simclr", "byol", "barlow_twins", "vicreg")}
METHODS |= {"supcon": "supcon_tcl", "tcl": "supcon_tcl --loss tcl", "carl": "carl_carp"}
METHODS |= {"carp": "carl_carp --method carp", "corinfomax": "corinfomax"}
GROUPS = "data", "ladder", "methods"


def built(script, *argv):
    """(method, model, data, recipes, args): what a script hands to common.train."""
    script, *given = script.split()
    with (
        mock.patch.object(common, "train") as train,
        mock.patch.object(sys, "argv", [f"{script}.py", *map(str, argv), *given]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        importlib.import_module(script).main()
    return train.call_args.args


def build(name, argv):
    """(model, data, recipes, args) of a method, the model on its device."""
    _, model, data, recipes, args = built(METHODS[name], *argv)
    common.check(data.pretrain.in_memory, f"{args.dataset}: its images do not fit in memory")
    return common.set_up(model, args), data, recipes, args


class Step:
    """A training step of a method on views: forward, loss, backward, optimiser, EMA. Each name in
    `without` takes one thing away from it."""

    def __init__(self, model, args, *without):
        self.args, self.waits = copy.copy(args), "no waiting" in without
        self.args.precision = "fp32" if "half precision" in without else args.precision
        self.args.compile = args.compile and "compile" not in without
        plain = "channels_last" in without
        self.layout = torch.contiguous_format if plain else torch.channels_last
        self.model = copy.deepcopy(model).to(memory_format=self.layout)
        if "one pass" in without:
            getattr(self.model, "method", self.model).concat_views = False
        self.optimizer = common.make_optimizer(self.model, args, "fused" not in without or None)
        self.forward = common.compiled(self.model, self.args)
        self.labels = torch.arange(args.batch_size, device=args.device) % 10
        scaled = self.args.precision == "fp16"
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=scaled)

    def __call__(self, views):
        how = {"memory_format": self.layout, "non_blocking": True}
        views = [x.to(self.args.device, **how) for x in views]
        with common.autocast(self.args):
            loss, _ = self.forward(views, self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.model, "after_step"):
            self.model.after_step(0.0)
        if self.waits:
            loss.item()


def torchvision_transform(recipe, size, mean, std):
    """simclr.py's recipe as torchvision has it."""
    crop = T.RandomResizedCrop(size, recipe.scale, interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(*recipe.jitter)], recipe.jitter_p)
    blur = T.RandomApply([T.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))], recipe.blur_p)
    on_images = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(recipe.gray_p), blur]
    return T.Compose([*on_images, T.ToTensor(), T.Normalize(mean, std)])


def pillow_views(images, transform):
    """Two views of each the usual way: one PIL image at a time."""
    images = [T.functional.to_pil_image(image) for image in images]
    return [torch.stack([transform(image) for image in images]) for _ in range(2)]


def pipeline(augment, data, recipes, args):
    """The views of an epoch, as training makes them."""
    batches = common.training_batches(data.pretrain, 1, args, recipes)
    for step, (images, _) in enumerate(batches):
        yield augment(images, common.generator(0, "augment", step, args.device))


def arms_of(group, model, data, recipes, args, argv):
    """{name: (what is timed, a function that gives views for it, its workers)}; the first is what
    the others are compared with."""
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
    augment.apply = common.compiled(augment.apply, args)
    real = functools.partial(pipeline, augment, data, recipes, args)
    still = [x.clone() for x in next(real())]

    def cached(step):
        return step, lambda: [still], 0

    if group == "methods":
        models = {name: build(name, argv) for name in METHODS}
        return {name: cached(Step(model, args)) for name, (model, _, _, args) in models.items()}
    step = Step(model, args)
    arms = {"cached": cached(step)}
    if group == "ladder":
        taken = ["half precision", "channels_last", "one pass"]
        taken += ["fused"] if args.optimizer != "lars" else []  # ours is always the same
        taken += ["compile"] if args.compile else []
        return arms | {f"- {name}": cached(Step(model, args, name)) for name in taken}
    arms |= {"real": (step, real, 0), "views": (lambda views: None, real, 0)}
    transform = torchvision_transform(recipes[0], args.image_size, data.mean, data.std)
    how = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True}
    how |= {"collate_fn": functools.partial(pillow_views, transform=transform)}
    how |= {"dataset": data.pretrain.images.cpu(), "pin_memory": args.device != "cpu"}

    def fed_by_loader(step, workers):
        return step, torch.utils.data.DataLoader(num_workers=workers, **how).__iter__, workers

    usual = "channels_last", "one pass", "fused", "compile", "no waiting"  # what it does without
    arms |= {f"pil {n}": fed_by_loader(step, n) for n in sorted({0, 1, args.workers})}
    arms["usual"] = fed_by_loader(Step(model, args, *usual), args.workers)
    arms["plain"] = fed_by_loader(Step(model, args, *usual, "half precision"), args.workers)
    return arms


def measure(arms, args):
    """{name: {"ms_blocks": [milliseconds of a call in each block]}}. A block before the first, in
    which graphs are compiled, is not counted, nor what workers prefetch before the clock starts.
    They live for their arm's turn alone, so that no other is slowed by them."""
    found = {name: {"ms_blocks": []} for name in arms}
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    for block in range(args.blocks + 1):
        for name in random.Random(block).sample(list(arms), len(arms)):
            step, source, workers = arms[name]
            batches = (views for _ in itertools.count() for views in source())
            for _ in range(1 + 2 * workers):
                next(batches)
            repeats = max(args.steps, 4 * workers) if block else 3
            repeats *= 100 if name == "views" else 1  # it is short: the rate that it can keep up
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                step(next(batches))
            wait()
            if block:
                seconds = time.perf_counter() - start
                found[name]["ms_blocks"].append(1e3 * seconds / repeats)
            del batches
    return found


def times(slow, fast):
    """How many times as long one takes as another: the median over the blocks."""
    pairs = zip(slow["ms_blocks"], fast["ms_blocks"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(found, args, images):
    """Print what was measured, and add to it what follows."""
    base, *_ = found.values()
    print(f"\n{'':17} ms/step       quartiles   img/s s/epoch  more than first")
    for name, row in found.items():
        low, median, high = statistics.quantiles(row["ms_blocks"], n=4)
        rate, over = 1e3 * args.batch_size / median, 100 * (times(row, base) - 1)
        row |= {"ms": median, "images_per_second": rate, "percent_over_base": over}
        row["seconds_per_epoch"] = images / rate
        text = f"{name:17}{median:8.1f}{low:8.1f}-{high:7.1f}{rate:8.0f}{images / rate:8.1f}"
        print(text + f"{over:+16.1f}%" * (name != "views"))


def read_arguments():
    """The benchmark's own flags, and the command line that simclr.py gets."""
    parser, own = common.base_parser(__doc__), common.Parser("Its own flags.")
    for p in parser, own:
        p.add_argument("--blocks", type=common.number(int, 2), default=7, help="of each")
        p.add_argument("--steps", type=common.count, help="in a block (default: 20 on a GPU or 2)")
        p.add_argument("--groups", default=",".join(GROUPS), help="some of these")
        p.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    args.groups = args.groups.split(",")
    wrong = f"--groups: expected some of {', '.join(GROUPS)}"
    common.check(set(args.groups) <= set(GROUPS), wrong)
    return args, ["--batch-size", "256", *own.parse_known_args()[1]]


def main():
    args, argv = read_arguments()
    model, data, recipes, run = build("simclr", argv)
    common.check(run.views == 2, f"--views {run.views}: the benchmark is for two views")
    run.blocks, run.steps = args.blocks, args.steps or (20 if run.device.startswith("cuda") else 2)
    result = common.describe(run)  # the commit now, not the one at the end
    for group in args.groups:
        found = measure(arms_of(group, model, data, recipes, run, argv), run)
        table(found, run, len(data.pretrain))
        result[group] = found
        if group == "data":
            names = "pil 0", f"pil {run.workers}", "usual", "plain"
            result["times_real"] = {name: times(found[name], found["real"]) for name in names}
            print("times as long as real:", result["times_real"])
    if args.json:
        common.write_json(result, args.json)


if __name__ == "__main__":
    common.run(main)
