# SPDX-License-Identifier: MIT
"""What a training step costs, and what of it is data and augmentation. Run by hand, not a test.

    python tests/benchmark.py --dataset cifar10 --batch-size 256 --json benchmark.json

The arms take turns in one process, in blocks of a few steps, so that a machine that slows down or
speeds up does so for all of them; a figure is the median over blocks, with the quartiles beside it.

data     cached   SimCLR's step (forward, loss, backward, optimiser) on views that are there already
         real     the same step fed by the training pipeline: gather, draw, augment, normalise
         views    the pipeline alone
         pil N    the same step fed by torchvision's transforms on PIL images, N worker processes
         usual    the same step as it is usually written, in the same precision: NCHW, a forward for
                  each view, an optimiser that is not fused, loss.item() at every step, fed like pil
         plain    the same in fp32
         lightly, kornia   the cached step fed by their transforms, where they are installed
ladder   the cached step with one thing taken away: half precision, channels_last, one pass for all
         views, the fused optimiser, the compiler
methods  the cached step of each method, with its preset for the dataset and this batch size
accuracy (not by default) kNN after SimCLR has trained on views of ours and of torchvision's, with
         several seeds: what is fast should not be worse

Beside them, from the same run: what the machine reaches in matrix products and in copying, and what
a kNN figure costs.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import barlow_twins  # noqa: E402
import byol  # noqa: E402
import carl_carp  # noqa: E402
import common  # noqa: E402
import corinfomax  # noqa: E402
import simclr  # noqa: E402
import supcon_tcl  # noqa: E402
import vicreg  # noqa: E402

METHODS = {
    "simclr": (simclr, []),
    "byol": (byol, []),
    "barlow_twins": (barlow_twins, []),
    "vicreg": (vicreg, []),
    "supcon": (supcon_tcl, []),
    "tcl": (supcon_tcl, ["--loss", "tcl"]),
    "carl": (carl_carp, []),
    "carp": (carl_carp, ["--method", "carp"]),
    "corinfomax": (corinfomax, []),
}


def build(name, argv):
    """(model, data, recipes, args) as METHOD.py makes them: its main, stopped before training."""
    module, flags = METHODS[name]
    made, train, old = [], common.train, sys.argv
    try:
        common.train, sys.argv = lambda *what: made.append(what), [f"{name}.py", *argv, *flags]
        with contextlib.redirect_stdout(io.StringIO()):
            module.main()
    finally:
        common.train, sys.argv = train, old
    return made[0][1:]


class Step:
    """A training step of a method; each flag takes one thing away from it."""

    def __init__(self, model, args, half=True, layout=torch.channels_last, fused=True, item=False):
        self.args = argparse.Namespace(**vars(args))
        if not half:
            self.args.precision = "fp32"
        self.layout, self.item = layout, item
        self.model = copy.deepcopy(model).to(args.device, memory_format=layout).train()
        self.optimizer = common.make_optimizer(self.model, args)
        if not fused:
            for group in self.optimizer.param_groups:
                group.update(fused=False, foreach=False)
        self.forward = common.compiled(self.model, self.args)
        self.labels = torch.arange(args.batch_size, device=args.device) % 10
        self.scaler = torch.amp.GradScaler(
            torch.device(args.device).type, enabled=self.args.precision == "fp16"
        )

    def __call__(self, views):
        how = {"memory_format": self.layout, "non_blocking": True}
        views = [x.to(self.args.device, **how) for x in views]
        torch.compiler.cudagraph_mark_step_begin()
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


class PillowViews(torch.utils.data.Dataset):
    """Two views the usual way: one PIL image at a time, in worker processes."""

    def __init__(self, data, transform):
        self.images, self.transform = data.train.images.cpu(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = T.functional.to_pil_image(self.images[index])
        views = self.transform(image)
        return views if isinstance(views, list) else [views, self.transform(image)]


def torchvision_transform(recipe, size, data):
    crop = T.RandomResizedCrop(size, recipe.scale, interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(*recipe.jitter)], recipe.jitter_p)
    final = [T.RandomGrayscale(recipe.gray_p), T.ToTensor(), T.Normalize(data.mean, data.std)]
    return T.Compose([crop, T.RandomHorizontalFlip(), jitter, *final])


def lightly_transform(recipe, size, data):
    from lightly.transforms import SimCLRTransform

    strength = recipe.jitter[0] / 0.8
    return SimCLRTransform(
        size, cj_strength=strength, min_scale=recipe.scale[0], gaussian_blur=0.0,
        normalize={"mean": data.mean, "std": data.std},
    )  # fmt: skip


def kornia_views(recipe, size, data, batches):
    """A function that makes two views of the next batch with kornia, on the batch's device."""
    import kornia.augmentation as K

    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    augment = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), recipe.scale, resample="bicubic"),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*recipe.jitter, p=recipe.jitter_p),
        K.RandomGrayscale(p=recipe.gray_p),
        K.Normalize(mean, std),
    )

    def views():
        x = next(batches)[0].float() / 255
        return [augment(x), augment(x)]

    return views


def without_compiler(args):
    return argparse.Namespace(**vars(args) | {"compile": "off"})


def forever(make):
    while True:
        yield from make()


def fed_by_loader(step, data, transform, args, workers):
    """An arm whose views come from a DataLoader. `ready`: batches that the workers prefetch between
    its turns, which are thrown away so that it does not get them for nothing."""
    source = torch.utils.data.DataLoader(
        PillowViews(data, transform), batch_size=args.batch_size, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=args.device != "cpu",
    )  # fmt: skip
    batches = forever(lambda: source)

    def arm():
        step(next(batches))

    arm.ready, arm.batches = 2 * workers, batches
    return arm


def data_arms(model, data, recipes, args):
    augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
    augment.apply = common.compiled(augment.apply, args)
    source = forever(lambda: common.training_batches(data.pretrain, 1, args, recipes))
    counter, step, recipe = iter(range(10**9)), Step(model, args), recipes[0]

    def views():
        images, _ = next(source)
        return augment(images, common.generator(0, "augment", next(counter), args.device))

    still = [x.clone() for x in views()]
    arms = {"cached": lambda: step(still), "real": lambda: step(views()), "views": views}
    pil = torchvision_transform(recipe, args.image_size, data)
    most = args.workers or (len(os.sched_getaffinity(0)) - 1)
    for workers in sorted({0, 1, most // 4, most // 2, most}):
        arms[f"pil {workers}"] = fed_by_loader(step, data, pil, args, workers)
    nchw = {"layout": torch.contiguous_format, "fused": False, "item": True}
    for name, half in ("usual", True), ("plain", False):
        separate, eager = copy.deepcopy(model), without_compiler(args)
        separate.concat_views = False
        other, workers = Step(separate, eager, half, **nchw), most if most > 2 else 0
        arms[name] = fed_by_loader(other, data, pil, args, workers)
    with contextlib.suppress(ImportError):
        lightly = lightly_transform(recipe, args.image_size, data)
        arms["lightly"] = fed_by_loader(step, data, lightly, args, most if most > 2 else 0)
    with contextlib.suppress(ImportError):
        kornia = kornia_views(recipe, args.image_size, data, source)
        arms["kornia"] = lambda: step(kornia())
    return arms


def ladder_arms(model, views, args):
    separate = copy.deepcopy(model)
    separate.concat_views = False
    steps = {"cached": Step(model, args), "- half precision": Step(model, args, half=False)}
    steps["- channels_last"] = Step(model, args, layout=torch.contiguous_format)
    steps["- one pass"] = Step(separate, args)
    steps["- fused"] = Step(model, args, fused=False)
    if args.compile != "off":
        steps["- compile"] = Step(model, without_compiler(args))
    return {name: functools.partial(step, views) for name, step in steps.items()}


def method_arms(argv, views):
    arms = {}
    for name in METHODS:
        model, _, _, args = build(name, argv)
        arms[name] = functools.partial(Step(model, args), views)
    return arms


def accuracy(argv, seeds):
    """{pipeline: [kNN accuracy for each seed]} of SimCLR after --epochs, fed by either pipeline."""
    found = {"ours": [], "torchvision": []}
    for seed, (name, values) in itertools.product(range(seeds), found.items()):
        model, data, recipes, args = build("simclr", [*argv, "--seed", str(seed)])
        step, steps = Step(model, args), len(data.pretrain) // args.batch_size
        augment = common.Augment(recipes, args.image_size, data.mean, data.std, args.device)
        transform = torchvision_transform(recipes[0], args.image_size, data)
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(
            PillowViews(data, transform), batch_size=args.batch_size, shuffle=True, drop_last=True,
            num_workers=args.workers,
        )  # fmt: skip
        done, total, warmup = 0, steps * args.epochs, args.warmup_epochs * steps
        for epoch in range(1, args.epochs + 1):
            ours = common.training_batches(data.pretrain, epoch, args, recipes)
            for batch in ours if name == "ours" else loader:
                rng = common.generator(seed, "augment", done, args.device)
                for group in step.optimizer.param_groups:
                    group["lr"] = common.learning_rate(done, total, warmup, args.scaled_lr)
                step(augment(batch[0], rng) if name == "ours" else batch)
                done += 1
        values.append(common.knn_monitor(step.model.backbone, data, args))
        print(f"seed {seed}, {name}: kNN {values[-1]:.1%}", flush=True)
    for name, values in found.items():
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        print(f"{name}: {statistics.mean(values):.1%}, deviation {spread:.1%}")
    return found


def measure(arms, args):
    """{name: milliseconds of a step in each block}; the first block warms up and is left out."""
    times = {name: [] for name in arms}
    for block in range(args.blocks + 1):
        for name, arm in arms.items():
            repeats = args.steps * (10 if name == "views" else 1)
            for _ in range(getattr(arm, "ready", 0)):
                next(arm.batches)
            synchronize(args)
            start = time.perf_counter()
            for _ in range(repeats):
                arm()
            synchronize(args)
            seconds = time.perf_counter() - start
            if getattr(arm, "ready", 0):
                time.sleep(1)  # its workers prefetch; the next arm should not feel it
            if block:
                times[name].append(1e3 * seconds / repeats)
    return times


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def ceilings(args):
    """What this machine reaches: TFLOP/s of a large matrix product, GB/s of a large copy."""
    cuda = args.device.startswith("cuda")
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    n, megabytes = (8192, 1024) if cuda else (2048, 256)
    a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    arms = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    many = argparse.Namespace(**vars(args) | {"blocks": 5, "steps": 5})
    ms = {name: min(times) for name, times in measure(arms, many).items()}
    return {"matmul_tflops": 2 * n**3 / ms["matmul"] / 1e9,
            "copy_gb_per_s": 2 * source.numel() / ms["copy"] / 1e6}  # fmt: skip


def flops(model, size):
    """Of forward and backward, for an image with two views."""
    model, views = copy.deepcopy(model).cpu(), [torch.randn(2, 3, size, size) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        model(views, torch.arange(2))[0].backward()
    return counter.get_total_flops() / 2


def table(times, args, images, base, per_image=None, ceiling=None):
    """Print a table of arms; return it for the JSON."""
    rows, reference = {}, statistics.median(times[base])
    print(f"\n{'arm':18}{'ms/step':>9}{'quartiles':>17}{'img/s':>8}{'s/epoch':>9}{'/' + base:>9}"
          f"{'TFLOP/s':>9}{'of max':>8}")  # fmt: skip
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4)
        rate = 1e3 * args.batch_size / median
        row = {"ms": median, "ms_quartiles": [low, high], "images_per_second": rate}
        row |= {"seconds_per_epoch": images / rate, "relative": median / reference}
        text = f"{name:18}{median:9.1f}{low:8.1f}-{high:8.1f}{rate:8.0f}{images / rate:9.1f}"
        text += f"{median / reference:9.3f}"
        if per_image and name != "views":
            tflops = per_image * rate / 1e12
            row |= {"tflops": tflops, "of_ceiling": tflops / ceiling}
            text += f"{tflops:9.2f}{tflops / ceiling:8.1%}"
        rows[name] = row
        print(text)
    return rows


OWN = "blocks", "steps", "groups", "seeds", "json"


def main():
    parser = common.base_parser(__doc__)
    parser.set_defaults(batch_size=256)
    parser.add_argument("--blocks", type=common.number(int, 2), default=7, help="of each arm")
    parser.add_argument("--steps", type=common.count, default=2, help="in a block")
    parser.add_argument("--groups", default="data,ladder,methods", help="also: accuracy")
    parser.add_argument("--seeds", type=common.count, default=3, help="of the accuracy")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    wanted, known = args.groups.split(","), ("data", "ladder", "methods", "accuracy")
    common.check(set(wanted) <= set(known), f"--groups {args.groups}: takes {', '.join(known)}")
    argv = ["--batch-size", str(args.batch_size)]  # what a method's script gets, with its presets
    for name, value in vars(args).items():
        if name not in OWN and value != parser.get_default(name):
            flag, switch = name.replace("_", "-"), isinstance(value, bool)
            argv += [f"--{'' if value else 'no-'}{flag}"] if switch else [f"--{flag}", str(value)]
    model, data, recipes, run = build("simclr", argv)
    run.blocks, run.steps = args.blocks, args.steps
    augment = common.Augment(recipes, run.image_size, data.mean, data.std, run.device)
    images = data.pretrain.images[: run.batch_size]
    views = [x.clone() for x in augment(images, common.generator(0, "augment", 0, run.device))]
    result = {"ceilings": ceilings(run), "flops_per_image": flops(model, run.image_size)}
    counted = result["flops_per_image"], result["ceilings"]["matmul_tflops"]
    print(result)
    groups = {"data": lambda: data_arms(model, data, recipes, run),
              "ladder": lambda: ladder_arms(model, views, run),
              "methods": lambda: method_arms(argv, views)}  # fmt: skip
    if "accuracy" in wanted:
        result["accuracy"] = accuracy(argv, args.seeds)
    for group in [name for name in groups if name in wanted]:
        times, total = measure(groups[group](), run), len(data.pretrain)
        if group == "methods":  # whose sums are not counted
            result[group] = table(times, run, total, "simclr")
        else:
            result[group] = table(times, run, total, "cached", *counted)
    start = time.perf_counter()
    common.knn_monitor(model.to(run.device).backbone, data, run)
    synchronize(run)
    result["knn_seconds"] = time.perf_counter() - start
    many = f"{len(data.train)} + {len(data.test)} images"
    print(f"\nkNN figure, {many}: {result['knn_seconds']:.1f} s")
    if run.device.startswith("cuda"):
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if args.json:
        common.write_json(result | common.describe(run), args.json)


if __name__ == "__main__":
    common.run(main)
