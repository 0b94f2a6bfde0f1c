# SPDX-License-Identifier: MIT
"""What a training step costs, and what of it is data and augmentation. Run by hand, not a test.

    python tests/benchmark.py --dataset cifar10 --batch-size 256 --json benchmark.json

The arms take turns, each time in another order, in blocks of a few steps, so that a machine that
slows down does so for all. A figure is the median over blocks with its quartiles, a comparison the
median of the blocks' ratios. Flags other than its own go to simclr.py.

data     SimCLR's step on views that are there already (cached) or fed by the training pipeline
         (real); the pipeline alone (views); the step fed by torchvision's transforms on PIL images
         with N worker processes (pil N), and as it is usually written, in the same precision
         (usual) or in fp32 (plain)
ladder   the cached step with one thing taken away
methods  the cached step of each method, with its preset for the dataset and this batch size
accuracy (not by default) kNN after --epochs of SimCLR on views of ours and of torchvision's
"""

import contextlib
import copy
import functools
import importlib
import io
import itertools
import math
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torchvision.transforms as T
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

METHODS = {name: name for name in ("simclr", "byol", "barlow_twins", "vicreg")}
METHODS |= {"supcon": "supcon_tcl", "tcl": "supcon_tcl --loss tcl", "carl": "carl_carp"}
METHODS |= {"carp": "carl_carp --method carp", "corinfomax": "corinfomax"}
GROUPS = "data", "ladder", "methods", "accuracy"


def build(name, argv):
    """(model, data, recipes, args) as METHOD.py makes them: its main, stopped before training."""
    script, *flags = METHODS[name].split()
    made = []
    with (
        mock.patch.object(common, "train", lambda *what: made.extend(what)),
        mock.patch.object(sys, "argv", [f"{script}.py", *argv, *flags]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        importlib.import_module(script).main()
    _, model, data, recipes, args = made
    common.check(data.pretrain.in_memory, f"{args.dataset}: its images do not fit in memory")
    return common.set_up(model, args), data, recipes, args


class Step:
    """A training step of a method on views: forward, loss, backward, optimiser, EMA. Each name in
    `without` takes one thing away from it."""

    def __init__(self, model, args, *without):
        self.args, self.item = copy.copy(args), "no waiting" in without
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
        if self.item:
            loss.item()


def torchvision_transform(recipe, size, data):
    """simclr.py's recipe as torchvision has it."""
    crop = T.RandomResizedCrop(size, recipe.scale, interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(*recipe.jitter)], recipe.jitter_p)
    blur = T.RandomApply([T.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))], recipe.blur_p)
    some = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(recipe.gray_p)]
    some += [blur] if recipe.blur_p else []
    return T.Compose([*some, T.ToTensor(), T.Normalize(data.mean, data.std)])


class PillowViews(torch.utils.data.Dataset):
    """Two views the usual way: one PIL image at a time, in worker processes."""

    def __init__(self, data, transform):
        self.images, self.transform = data.pretrain.images.cpu(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = T.functional.to_pil_image(self.images[index])
        return self.transform(image), self.transform(image)

    def loader(self, args, workers):
        how = {"batch_size": args.batch_size, "num_workers": workers, "drop_last": True}
        how |= {"shuffle": True, "pin_memory": args.device != "cpu"}
        return torch.utils.data.DataLoader(self, **how)


def forever(make):
    while True:
        yield from make()


class FedByLoader:
    """A step whose views come from a DataLoader. Its workers live for its turn alone, so that no
    other arm feels them; what they prefetch before the clock starts is not counted."""

    def __init__(self, step, source, workers):
        self.step, self.workers = step, workers
        self.loader = source.loader(step.args, workers)

    def begin(self):
        self.batches = forever(lambda: self.loader)
        for _ in range(2 * self.workers):
            next(self.batches)

    def __call__(self):
        self.step(next(self.batches))

    def end(self):
        del self.batches


USUAL = "channels_last", "one pass", "fused", "compile", "no waiting"  # what it does without


def data_arms(model, data, recipes, args):
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
    augment.apply = common.compiled(augment.apply, args)
    source = forever(lambda: common.training_batches(data.pretrain, 1, args, recipes))
    counter, step = itertools.count(), Step(model, args)

    def views():
        images, _ = next(source)
        return augment(images, common.generator(0, "augment", next(counter), args.device))

    still = [x.clone() for x in views()]
    arms = {"cached": lambda: step(still), "real": lambda: step(views()), "views": views}
    pil = PillowViews(data, torchvision_transform(recipes[0], args.image_size, data))
    for workers in sorted({0, 1, args.workers}):
        arms[f"pil {workers}"] = FedByLoader(step, pil, workers)
    arms["usual"] = FedByLoader(Step(model, args, *USUAL), pil, args.workers)
    plain = Step(model, args, *USUAL, "half precision")
    return arms | {"plain": FedByLoader(plain, pil, args.workers)}


def ladder_arms(model, views, args):
    taken = ["half precision", "channels_last", "one pass"]
    taken += ["fused"] if args.optimizer != "lars" else []  # ours is always the same
    taken += ["compile"] if args.compile else []
    steps = {"cached": Step(model, args)} | {f"- {x}": Step(model, args, x) for x in taken}
    laid_out = {s.layout: [x.to(memory_format=s.layout) for x in views] for s in steps.values()}
    return {name: functools.partial(step, laid_out[step.layout]) for name, step in steps.items()}


def method_arms(views, argv):
    built = {name: build(name, argv) for name in METHODS}
    steps = {name: Step(model, args) for name, (model, _, _, args) in built.items()}
    return {name: functools.partial(step, views) for name, step in steps.items()}


def accuracy(argv, seeds):
    """{pipeline: [kNN accuracy for each seed]} of SimCLR after --epochs, fed by either pipeline."""
    found = {"ours": [], "torchvision": []}
    for seed, (name, values) in itertools.product(range(seeds), found.items()):
        model, data, recipes, args = build("simclr", [*argv, "--seed", str(seed)])
        step, steps, done = Step(model, args), len(data.pretrain) // args.batch_size, 0
        augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
        theirs = PillowViews(data, torchvision_transform(recipes[0], args.image_size, data))
        torch.manual_seed(seed)
        for epoch in range(1, args.epochs + 1):
            ours = common.training_batches(data.pretrain, epoch, args, recipes)
            for batch in ours if name == "ours" else theirs.loader(args, args.workers):
                total, warmup = args.epochs * steps, args.warmup_epochs * steps
                for group in step.optimizer.param_groups:
                    group["lr"] = common.learning_rate(done, total, warmup, args.scaled_lr)
                rng = common.generator(seed, "augment", done, args.device)
                step(augment(batch[0], rng) if name == "ours" else batch)
                done += 1
        values.append(common.knn_monitor(step.model.backbone, data, args))
        print(f"seed {seed}, {name}: kNN {values[-1]:.1%}", flush=True)
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    error = statistics.stdev(differences) / seeds**0.5 if seeds > 1 else math.nan
    print(f"ours - torchvision: {statistics.mean(differences):+.1%}, standard error {error:.1%}")
    return found


def measure(arms, args):
    """{name: {"ms_blocks": [milliseconds of a step in each block], ...}}. Before the first block
    each arm warms up, with compilation: `warmup_seconds`. `peak_gb`, on a GPU: of its steps alone.
    """
    found = {name: {"ms_blocks": []} for name in arms}
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    wait = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    for block in range(args.blocks + 1):
        for name in random.Random(block).sample(list(arms), len(arms)):
            arm, row = arms[name], found[name]
            repeats = max(args.steps, 4 * getattr(arm, "workers", 0)) if block else 3
            repeats *= 100 if name == "views" else 1  # it is short: the rate that it can keep up
            getattr(arm, "begin", lambda: None)()
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                arm()
            wait()
            seconds = time.perf_counter() - start
            getattr(arm, "end", lambda: None)()
            if cuda:
                row["peak_gb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
            if block:
                row["ms_blocks"].append(1e3 * seconds / repeats)
            else:
                row["warmup_seconds"] = seconds
    return found


def ceilings(args):
    """What this machine reaches: TFLOP/s of a large matrix product, GB/s of a large copy."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    n, megabytes = (8192, 1024) if args.device.startswith("cuda") else (2048, 256)
    a, b = torch.randn(2, n, n, device=args.device).to(dtypes[args.precision])
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    arms = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    found = measure(arms, SimpleNamespace(device=args.device, blocks=5, steps=5))
    product, copied = (min(found[name]["ms_blocks"]) for name in arms)
    rates = {"matmul_tflops": 2 * n**3 / product / 1e9}
    return rates | {"copy_gb_per_s": 2 * source.numel() / copied / 1e6}


def flops(model, size):
    """Of forward and backward, for an image with its two views."""
    model, views = copy.deepcopy(model).cpu(), [torch.randn(2, 3, size, size) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        model(views, torch.arange(2))[0].backward()
    return counter.get_total_flops() / 2


def times(slow, fast):
    """How many times as long an arm takes as another: the median over the blocks."""
    pairs = zip(slow["ms_blocks"], fast["ms_blocks"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(found, base, args, images, per_image=0, ceiling=1):
    """Print the arms of a group and add to each what follows from its blocks."""
    print(f"\n{'arm':17} ms/step       quartiles   img/s s/epoch  over {base:8} TFLOP/s  peak GB")
    for name, row in found.items():
        low, median, high = statistics.quantiles(row["ms_blocks"], n=4)
        rate, over = 1e3 * args.batch_size / median, 100 * (times(row, found[base]) - 1)
        row |= {"ms": median, "images_per_second": rate, "percent_over_base": over}
        row |= {"seconds_per_epoch": images / rate, "tflops": per_image * rate / 1e12}
        row["share_of_ceiling"] = row["tflops"] / ceiling
        text = f"{name:17}{median:8.1f}{low:8.1f}-{high:7.1f}{rate:8.0f}{images / rate:8.1f}"
        text += f"{over:+13.1f}%{row['tflops']:8.2f}" if name != "views" else ""
        print(text + (f"{row['peak_gb']:9.1f}" if "peak_gb" in row else ""))
    return found


def knn_cost(model, data, args, seconds_per_epoch):
    """Seconds of a kNN figure, and the share that it has of a run with one every --knn-every."""
    for _ in range(2 if args.device.startswith("cuda") else 1):  # there the first one is slow
        start = time.perf_counter()
        common.knn_monitor(model.backbone, data, args)  # reads its figure back, so it has waited
        seconds = time.perf_counter() - start
    share = seconds / (max(args.knn_every, 1) * seconds_per_epoch)
    print(f"\na kNN figure: {seconds:.1f} s, {share:.1%} of a run")
    return {"seconds": seconds, "share": share}


def read_arguments():
    """The benchmark's own flags, and the command line that simclr.py gets."""
    parser, own = common.base_parser(__doc__), common.Parser("Its own flags.")
    for p in parser, own:
        p.add_argument("--blocks", type=common.number(int, 2), default=7, help="of each arm")
        p.add_argument("--steps", type=common.count, help="in a block (default: 20 on a GPU or 2)")
        p.add_argument("--groups", default="data,ladder,methods", help=f"of {', '.join(GROUPS)}")
        p.add_argument("--seeds", type=common.count, default=3, help="of the accuracy")
        p.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    wrong = f"--groups {args.groups}: expected some of {', '.join(GROUPS)}"
    common.check(set(args.groups.split(",")) <= set(GROUPS), wrong)
    return args, ["--batch-size", "256", *own.parse_known_args()[1]]


def main():
    args, argv = read_arguments()
    model, data, recipes, run = build("simclr", argv)
    common.check(run.views == 2, f"--views {run.views}: the benchmark is for two views")
    run.blocks, run.steps = args.blocks, args.steps or (20 if run.device.startswith("cuda") else 2)
    about = common.describe(run)  # the commit now, not the one at the end
    augment = common.Augment(recipes, run.image_size, data.mean, data.std, run.device)
    images = data.pretrain.images[: run.batch_size]
    views = [x.clone() for x in augment(images, common.generator(0, "augment", 0, run.device))]
    result = {"ceilings": ceilings(run), "flops_per_image": flops(model, run.image_size)}
    ceiling, per_image = result["ceilings"]["matmul_tflops"], result["flops_per_image"]
    print(f"{ceiling:.2f} TFLOP/s in matrix products, {per_image / 1e9:.2f} GFLOP an image")
    show = functools.partial(table, args=run, images=len(data.pretrain))
    work = {"per_image": per_image, "ceiling": ceiling}
    if "accuracy" in args.groups:
        result["accuracy"] = accuracy(argv, args.seeds)
    if "data" in args.groups:
        found = show(measure(data_arms(model, data, recipes, run), run), "cached", **work)
        names = "pil 0", f"pil {run.workers}", "usual", "plain"
        result["times_real"] = {name: times(found[name], found["real"]) for name in names}
        print("times as long as real:", result["times_real"])
        if data.test is not None:
            result["knn"] = knn_cost(model, data, run, found["real"]["seconds_per_epoch"])
        result["data"] = found
    if "ladder" in args.groups:
        result["ladder"] = show(measure(ladder_arms(model, views, run), run), "cached", **work)
    if "methods" in args.groups:
        result["methods"] = show(measure(method_arms(views, argv), run), "simclr")
    if args.json:
        common.write_json(result | about, args.json)


if __name__ == "__main__":
    common.run(main)
