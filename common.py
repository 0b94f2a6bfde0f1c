# SPDX-License-Identifier: MIT
"""What every training script needs and nothing that belongs to one method.

    bad input, files, random numbers    InputError, run, atomic_write, load_file, generator
    several processes                   gather, mine, SyncBatchNorm, distributed
    data                                load_dataset: a name, a folder or a packed .pt file
    views                               random_resized_crop_params, resized_crop, ..., Augment
    models                              resnet, mlp
    optimisation                        LARS, make_optimizer, learning_rate
    what a representation is worth      encode, knn_scores, collapse_figures
    a term for any method               lower_bound_estimate, MutualInformation
    command line                        base_parser, parse_args
    training                            prepare, train

A method is a plain nn.Module with `.backbone`, `forward(views, y) -> (loss, terms)` and, where it
needs one, `after_step(progress)`. Everything here is indifferent to which method that is.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import importlib.util
import inspect
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
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import AutoAugmentPolicy
from torchvision.transforms.v2 import functional as ops

# --------------------------------------------------------------------------------------------------
# Bad input, files, random numbers


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
    except (
        InputError
    ) as error:  # a DataLoader worker wraps it in a traceback: the last line is ours
        message = str(error).strip().splitlines()[-1].removeprefix("common.InputError: ")
    except (RuntimeError, MemoryError) as error:  # torch's allocators raise these, by device
        kinds, reason = [kind.__name__ for kind in type(error).__mro__], str(error).splitlines()
        message = f"out of memory ({reason[0]}); a smaller --batch-size may fit" if reason else ""
        if "TorchDynamoException" in kinds:
            message = f"torch.compile failed ({reason[0]}); --compile off does without it"
        elif "DistError" in kinds or "gloo" in str(error):
            message = f"another process ended, or was silent for --timeout seconds ({reason[0]})"
        elif not reason or "alloc" not in str(error):
            raise
    except OSError as error:
        message = f"{error.filename or 'file system'}: {error.strerror or error}"
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; --resume goes on from a run's last checkpoint.pt", file=sys.stderr)
        sys.exit(130)
    if rank() and "another process" not in message:
        time.sleep(5)  # the first process says what is wrong with all, and torchrun ends this one
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


class StopSignals:
    """Ctrl-C or SIGTERM, noted in `.number`, for a run to end after its step. A second Ctrl-C, a
    second later at least (launchers may send it twice), raises KeyboardInterrupt at once. Where
    SIGINT is ignored, as behind a shell's &, it stays so."""

    number, pause = None, 1.0

    def __enter__(self):
        self.before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: signals come as ever
            for number in signal.SIGINT, signal.SIGTERM:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.number is None:
            self.number, self.at = number, time.monotonic()
            if rank() == 0:
                with contextlib.suppress(OSError):  # print could fail where the terminal is gone
                    os.write(2, b"\nstopping after the step and saving; Ctrl-C again: at once\n")
        elif number == signal.SIGINT and time.monotonic() - self.at >= self.pause:
            raise KeyboardInterrupt


def leave_signals_to_the_parent(worker):
    """A worker process gets no signal of the terminal; it ends with the process that made it.
    SIGTERM in a worker is torch's."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def sync_folder(folder):
    """Flush what was renamed in a folder, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def second_name(path, name):
    """Give a file that is never changed in place another name, which what had it loses."""
    temporary = Path(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """A binary file that takes its name when it is whole: written beside, flushed, renamed. What
    had the name before keeps another one, if `previous` gives it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and Path(path).exists():
            second_name(path, previous)
        os.replace(temporary, path)
        sync_folder(Path(path).parent)
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(errno.EIO, f"could not be written ({error})", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value, path) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def load_file(path):
    """torch.load with weights_only=True, so that no file can run code; InputError if it fails. A
    Namespace is let in, as many keep their settings in one: it only holds values."""
    check(Path(path).is_file(), f"{path}: no such file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # whatever torch finds odd is refused or not used
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):  # says nothing of what is in the file
        raise
    except Exception as error:  # a stranger's file can make torch.load raise anything
        held = re.search(r"GLOBAL (\S+)", str(error))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it holds {held[1]}, which is no plain value; nothing was run" if held else reason
        message = f"{path}: not a file that torch.load(weights_only=True) accepts ({reason})"
        raise InputError(re.sub(r"\x1b\[\d*m", "", message)) from None


def load_whole(path):
    """load_file of what torch.save wrote, with the checksums that torch.load does not look at."""
    check(Path(path).is_file(), f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile can raise anything for a damaged header
        damaged = str(error) or type(error).__name__
    check(damaged is None, f"{path}: damaged ({damaged})")
    return load_file(path)


def derived_seed(seed, purpose, number) -> int:
    """A seed that depends on the user's seed, on what it is for, and on the step (epoch, image)
    it belongs to. Because nothing else enters, a resumed run draws what an uninterrupted one would
    with no state to save, and processes sharing a batch can each draw for all of it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:7], "big")


def generator(seed, purpose, number, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, number))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. By default every large block goes back to the kernel, and a
    step on a CPU waits for page faults to get again the memory that it had a moment before."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# --------------------------------------------------------------------------------------------------
# Several processes, which torchrun starts: N of them train the network that one would. Each holds
# the data and the model, and has B / N images of every batch. Random numbers are drawn for the
# whole batch by all, and each takes its part; projections are gathered, so that every process
# computes the loss of the whole batch; batch norm has the statistics of the whole batch.


def launched(name, default=0):
    """A number that torchrun gives to the processes which it starts: RANK, WORLD_SIZE, ..."""
    by_torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    several = by_torchrun and int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ.get(name, default)) if several else default


def rank():
    """The number of this process, 0 for the first one, which alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else launched("RANK")


def world_size():
    """How many processes there are, N."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args):
    """Where torchrun started this process, meet the others. They speak by NCCL about what is on
    GPUs, one for each process, and by gloo about the rest."""
    if launched("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        return
    gpu = args.device == "cuda"
    wrong = f"--device {args.device}: several processes take cuda or cpu"
    check(gpu or args.device == "cpu", wrong)
    if gpu:
        gpus, need = torch.cuda.device_count(), launched("LOCAL_WORLD_SIZE", 1)
        few = f"{need} processes need as many GPUs, here are {gpus}: --nproc-per-node={gpus}"
        check(need <= gpus, few)
        torch.cuda.set_device(launched("LOCAL_RANK"))
    timeout = datetime.timedelta(seconds=args.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout)


class Gather(torch.autograd.Function):
    """[B / N, ...] of each process -> [B, ...] of all. Every process has a loss of its own that
    depends on this one's rows, so their gradient is the sum of what all processes say. (Much code
    passes the gradient of the own loss alone, 1 / N of it, and dist.all_gather passes none.)"""

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


def mean_over_processes(x):
    """The mean of the processes' x, on all of them, with gradient."""
    return gather([x[None]])[0].mean(0) if world_size() > 1 else x


def mean_terms(terms):
    """A dict of scalars, each the mean over the processes, on all of them."""
    if world_size() == 1:
        return terms
    means = mean_over_processes(torch.stack([v.detach().float() for v in terms.values()]))
    return dict(zip(terms, means.unbind(), strict=True))


def agreed(number):
    """The largest of the processes' numbers, on all of them. It waits for no GPU."""
    if world_size() > 1:
        number = torch.tensor(number or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number or 0)


def on_first(function):
    """What `function` returns, or raises, where the first process calls it, and it alone."""
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except (InputError, OSError) as error:
            box[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all processes, on CPUs, which torch's SyncBatchNorm refuses."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        x, dtype = full_precision(x), x.dtype
        mean = mean_over_processes(x.mean(dims))  # processes have equal shares
        centred = x - mean.view(shape)
        var = mean_over_processes(centred.square().mean(dims))
        n = x.numel() / x.shape[1] * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * (n / (n - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(dtype)

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
    ddp = nn.parallel.DistributedDataParallel
    # Every process computes the same buffers, so none is sent. Newer versions renamed the flag.
    names = inspect.signature(ddp).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return ddp(model, **{flag: False})


# --------------------------------------------------------------------------------------------------
# Data

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a dataset: how many classes, the side of its images (224 where each has its
    own, on disk), mean and deviation of the channels of its training images."""

    classes: int
    size: int
    mean: tuple
    std: tuple
    nominal: bool = False  # mean and deviation are ImageNet's, not its own


# ImageNet's statistics are the usual ones, of 224-pixel crops. Its parts, and its copy at 64
# pixels, have others: what is in memory is normalised with its own, whatever stands here.
DATASETS = {
    "cifar10": Known(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Known(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": Known(10, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "fashion_mnist": Known(10, 28, (0.2860,) * 3, (0.3530,) * 3),
    "imagenette": Known(10, 160, IMAGENET_MEAN, IMAGENET_STD, nominal=True),
    "tiny_imagenet": Known(200, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet100": Known(100, 224, IMAGENET_MEAN, IMAGENET_STD, nominal=True),
    "imagenet": Known(1000, 224, IMAGENET_MEAN, IMAGENET_STD),
    "imagenet64": Known(1000, 64, IMAGENET_MEAN, IMAGENET_STD, nominal=True),
    "shapes": Known(10, 32, (0.5005, 0.5004, 0.5006), (0.2782, 0.2781, 0.2781)),
}
TINY, TINY_URL = "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MEMORY_LIMIT = 4 * 2**30  # bytes of pixels up to which a folder of equal-sized images is held


@dataclasses.dataclass
class Split:
    """images: uint8 [N, 3, H, W], or N paths that are decoded when needed, or features [N, F] of
    them. labels: int64 [N], -1 where there is none."""

    images: Tensor | list
    labels: Tensor

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: slice):
        return Split(self.images[index], self.labels[index])

    def spread(self, count):
        """`count` images evenly spread over the split, which may be sorted by class; 0: all."""
        if not 0 < count < len(self):
            return self
        return self.take(torch.arange(count) * len(self) // count)

    def take(self, index):
        """The images that int64 `index` names."""
        labels = self.labels[index.to(self.labels.device)]
        if self.in_memory:
            return Split(self.images[index.to(self.images.device)], labels)
        return Split([self.images[i] for i in index.tolist()], labels)

    def part(self):
        """This process's part: one after the other, of equal size, the last image repeated."""
        if world_size() == 1:
            return self
        size = math.ceil(len(self) / world_size())
        index = torch.arange(rank() * size, (rank() + 1) * size)
        return self.take(index.clamp(max=len(self) - 1))

    @property
    def in_memory(self):
        return isinstance(self.images, Tensor)

    def to(self, device):  # what workers decode stays with them, labels and all
        return Split(self.images.to(device), self.labels.to(device)) if self.in_memory else self


@dataclasses.dataclass
class Dataset:
    """pretrain: what methods see, train and any unlabeled images. train, test: with labels."""

    name: str
    classes: list
    train: Split
    test: Split | None
    pretrain: Split
    size: int  # shorter side of the images, or the table's, or 224, where they stay on disk
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD

    def to(self, device):
        test, pretrain = self.test and self.test.to(device), self.pretrain.to(device)
        train = pretrain[: len(self.train)]  # the same memory
        return dataclasses.replace(self, train=train, test=test, pretrain=pretrain)


def load_dataset(name: str, data_dir="data") -> Dataset:
    """A dataset of the table, a folder in ImageFolder layout, or a packed .pt file."""
    path, names = Path(name), ", ".join(DATASETS)
    if name in DATASETS:
        return load_known(name, Path(data_dir))
    if path.suffix == ".pt":
        return from_packed(path.stem, load_file(path), path)
    check(path.is_dir(), f"dataset {name!r} is none of {names}, nor a folder, nor a .pt file")
    return load_folder(path)


def load_known(name, root) -> Dataset:
    """A dataset of the table: drawn, packed, in folders, or packed now from what is published."""
    stored, folder, choice = root / f"{name}.pt", root / name, root / f"{name}.txt"
    if name == "shapes":
        packed = {"train": shapes(4000, "train"), "test": shapes(1000, "test"), "classes": SHAPES}
        return from_packed(name, packed)
    if stored.is_file():
        return compared(from_packed(name, load_file(stored), stored), name, stored)
    if (folder / "train").is_dir():
        return compared(load_folder(folder), name, folder)
    if name == "imagenet100" and choice.is_file():
        return compared(load_folder(root / "imagenet", choice), name, choice)
    packed = pack(name, root)
    data = from_packed(name, packed, stored)  # what it refuses is not stored
    root.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as file:
        torch.save(packed, file)
    return compared(data, name, stored)


def compared(data, name, path) -> Dataset:
    """`data` as the dataset `name` of the table, which gives images that stay on disk their size
    and statistics. A note says where what was found at `path` does not look like that dataset."""
    known, differs = DATASETS[name], []  # pairs: what is here, what is known
    if not data.train.in_memory:
        data = dataclasses.replace(data, size=known.size, mean=known.mean, std=known.std)
    if len(data.classes) != known.classes:
        differs.append((f"{len(data.classes)} classes", known.classes))
    if data.size != known.size:
        differs.append((f"a side of {data.size}", known.size))
    for key in () if known.nominal else ("mean", "std"):
        pair = getattr(data, key), getattr(known, key)
        if max(abs(a - b) for a, b in zip(*pair, strict=True)) > 0.03:  # more than crops change
            here, there = ("/".join(f"{value:.3f}" for value in values) for values in pair)
            differs.append((f"a {key} of {here}", there))
    if differs:
        here, there = (" and ".join(map(str, column)) for column in zip(*differs, strict=True))
        print(f"note: {path} has {here}, {name} has {there}: is it that dataset?")
    return dataclasses.replace(data, name=name)


def dense(value, dtype, ndim):
    """Whether a value from a file is a tensor of this kind, which has its numbers with it."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu
    return plain and value.dtype == dtype and value.ndim == ndim


def from_packed(name, packed, path=None) -> Dataset:
    """A Dataset from {"train": {"images": uint8 [N, C, H, W], "labels": int64 [N]}, "test": ...,
    "classes": [names]}, perhaps with "unlabeled"; InputError if it is anything else."""

    def expect(condition, message):
        check(condition, f"{path or name}: {message}")

    expect(isinstance(packed, dict), "not a packed dataset: expected a dict with train and classes")
    classes, splits = packed.get("classes"), {}
    expect(isinstance(classes, list) and classes, "classes should be a list of class names")
    expect("train" in packed, "there is no train split")
    for key in ("train", "test", "unlabeled"):
        split = packed.get(key)
        if split is None and key != "train":
            continue
        expect(isinstance(split, dict), f'{key} should be {{"images": ..., "labels": ...}}')
        images, labels = split.get("images"), split.get("labels")
        expect(dense(images, torch.uint8, 4), f"{key} images should be a uint8 tensor [N, C, H, W]")
        right = images.shape[1] in (1, 3) and images.numel() > 0
        expect(right, f"{key} images are {list(images.shape)}; expected [N, 1 or 3, H, W], N > 0")
        if key == "unlabeled":
            labels = torch.full((len(images),), -1)
        expect(dense(labels, torch.int64, 1), f"{key} labels should be an int64 tensor [N]")
        expect(len(labels) == len(images), f"{key}: {len(images)} images but {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        right = key == "unlabeled" or (low >= 0 and high < len(classes))
        expect(
            right, f"{key} labels run from {low} to {high}, but there are {len(classes)} classes"
        )
        splits[key] = Split(images.expand(-1, 3, -1, -1).contiguous(), labels)
    sizes = sorted({tuple(split.images.shape[2:]) for split in splits.values()})
    expect(len(sizes) == 1, f"the splits hold images of different sizes: {sizes}")
    train = pretrain = splits["train"]
    if "unlabeled" in splits:
        parts = train, splits["unlabeled"]
        pretrain = Split(*(torch.cat([getattr(p, k) for p in parts]) for k in ("images", "labels")))
    statistics = pixel_statistics(train.images)
    return Dataset(name, classes, train, splits.get("test"), pretrain, min(sizes[0]), *statistics)


def pixel_statistics(images: Tensor):
    """Mean and deviation of each channel of uint8 [N, 3, H, W] over 255, from exact counts."""
    value, mean, std = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float(share @ value))
        deviation = float(share @ (value - mean[-1]) ** 2) ** 0.5
        std.append(max(deviation, 1 / 255))  # a constant channel stays finite
    return tuple(mean), tuple(std)


def pack(name, root) -> dict:
    """A dataset of the table as a packed dict: from files in `root` as published, or downloaded."""
    if name == "tiny_imagenet" and any((root / x).exists() for x in (TINY, f"{TINY}.zip")):
        return pack_tiny_imagenet(root)
    if name == "imagenet64" and (root / name).is_dir():
        return pack_imagenet64(root / name)
    return download(name, root)


def download(name, root) -> dict:
    """A named dataset through torchvision's own download, as a packed dict."""
    sets, packed = torchvision.datasets, {}
    fetch = {
        "cifar10": lambda split: sets.CIFAR10(root, train=split == "train", download=True),
        "cifar100": lambda split: sets.CIFAR100(root, train=split == "train", download=True),
        "fashion_mnist": lambda split: sets.FashionMNIST(root, split == "train", download=True),
        "stl10": lambda split: sets.STL10(root, split, download=True),
        "imagenette": lambda split: sets.Imagenette(
            root, split.replace("test", "val"), "160px", download=True
        ),
    }
    how = f"unpack it as {root}/{name}/train/CLASS/* or put the packed file at {root}/{name}.pt"
    if name == "tiny_imagenet":
        how = f"download {TINY_URL} to {root}/{TINY}.zip"
    elif name == "imagenet64":
        how = f"put its train_data_batch_1.npz, ... and val_data.npz in {root}/{name}"
    elif name == "imagenet100":
        how += f", or name its class folders of {root}/imagenet in {root}/{name}.txt"
    check(name in fetch, f"{name}: torchvision cannot download it; {how}")
    for split in ("train", "test", "unlabeled") if name == "stl10" else ("train", "test"):
        try:
            source = fetch[name](split)
        except Exception as error:  # URLError, RuntimeError, OSError: whatever the network does
            raise InputError(f"{name}: the download failed ({error}); without it, {how}") from None
        images, labels = [], []
        for image, label in source:
            image = image.convert("RGB")
            if name == "imagenette":  # sizes differ: we keep the central square
                image = TF.center_crop(image, 160)
            images.append(TF.pil_to_tensor(image))
            labels.append(-1 if label is None else int(label))
        packed[split] = {"images": torch.stack(images), "labels": torch.tensor(labels)}
    names = [c if isinstance(c, str) else c[0] for c in source.classes]  # Imagenette has synonyms
    return {**packed, "classes": names}


@contextlib.contextmanager
def readable(path, what):
    """InputError for all that a damaged file, or one that is no `what`, lets a reader raise."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zipfile, Pillow and numpy raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable {what} ({reason})") from None


def read_image(path) -> Image.Image:
    """path: a pathlib.Path, or a zipfile.Path."""
    with readable(path, "image"), path.open("rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def read_table(path):
    """The tab-separated fields of each line of a text file, which may be in a zip."""
    with readable(path, "text"):
        lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line.strip()]


def tiny_imagenet_files(root):
    """{name: its path} of Tiny ImageNet's files, unpacked or in the zip, and where they are."""
    folder, archive = root / TINY, root / f"{TINY}.zip"
    if folder.is_dir():
        return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}, folder
    with readable(archive, "zip"):
        held = zipfile.ZipFile(archive)
        names = [name for name in held.namelist() if name.startswith(f"{TINY}/")]
        return {name[len(TINY) + 1 :]: zipfile.Path(held, name) for name in names}, archive


def pack_tiny_imagenet(root) -> dict:
    """Tiny ImageNet in its own layout. Its test images have no labels: val is the test split."""
    files, where = tiny_imagenet_files(root)
    found = [re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", name) for name in sorted(files)]
    pairs = {"train": [(match[0], match[1]) for match in found if match]}
    check(pairs["train"], f"{where}: no images train/CLASS/images/*.JPEG")
    number = {wnid: i for i, wnid in enumerate(sorted({wnid for _, wnid in pairs["train"]}))}

    said, annotations = "val/val_annotations.txt", f"{where}/val/val_annotations.txt"
    check(said in files, f"{annotations}: no such file, which says what the val images are")
    rows = read_table(files[said])
    check(rows and min(map(len, rows)) > 1, f"{annotations}: not a file name and a class a line")
    pairs["test"] = [(f"val/images/{row[0]}", row[1]) for row in rows]
    unknown = [wnid for _, wnid in pairs["test"] if wnid not in number]
    check(not unknown, f"{annotations}: {unknown[:1]} has no images in train")
    images = {name for name in files if re.fullmatch(r"val/images/[^/]+\.JPEG", name)}
    odd = sorted(images ^ {name for name, _ in pairs["test"]})
    check(not odd, f"{annotations}: it and val/images differ in {len(odd)} files, as {odd[:1]}")

    size, packed = DATASETS["tiny_imagenet"].size, {}
    for key, some in pairs.items():
        labels = torch.tensor([number[wnid] for _, wnid in some])
        split = Split([files[name] for name, _ in some], labels)
        packed[key] = hold_in_memory(split, (3, size, size), strict=True)
    rows = read_table(files["words.txt"]) if "words.txt" in files else []
    words = {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) > 1}
    return {**packed, "classes": [words.get(wnid) or wnid for wnid in number]}


def pack_imagenet64(folder) -> dict:
    """ImageNet at 64 x 64 pixels from its own files, of which some may do for training."""
    pattern, val = r"train_data_batch_(\d+)\.npz", folder / "val_data.npz"
    found = [re.fullmatch(pattern, file.name) for file in folder.iterdir()]
    train = [folder / match[0] for match in sorted(filter(None, found), key=lambda m: int(m[1]))]
    check(train, f"{folder}: no train_data_batch_1.npz, train_data_batch_2.npz, ...")
    check(val.is_file(), f"{val}: no such file")
    classes = [str(i + 1) for i in range(DATASETS["imagenet64"].classes)]
    return {"train": join_npz(train), "test": join_npz([val]), "classes": classes}


def join_npz(files) -> dict:
    """ImageNet64's files as one split. Labels are read first, so that the images, 15.7 GB in all,
    have their place and are in memory once."""
    known, labels = DATASETS["imagenet64"], [read_npz(file, "labels") for file in files]
    for file, own in zip(files, labels, strict=True):
        right = own.dtype.kind in "iu" and own.ndim == 1 and own.size > 0
        kind = f"{own.dtype} {list(own.shape)}"
        check(right, f"{file}: labels are {kind}, not integers [N], N > 0")
        low, high = own.min(), own.max()
        right = low >= 1 and high <= known.classes
        check(right, f"{file}: labels run from {low} to {high}, not within 1 to {known.classes}")
    counts = [len(own) for own in labels]
    images = torch.empty(sum(counts), 3, known.size, known.size, dtype=torch.uint8)
    for file, part in zip(files, images.split(counts), strict=True):
        data, shape = read_npz(file, "data"), (len(part), part[0].numel())
        kind = f"{data.dtype} {list(data.shape)}"
        right = data.dtype == np.uint8 and data.shape == shape
        check(right, f"{file}: data is {kind}, not uint8 {list(shape)}, an image for each label")
        part.copy_(torch.from_numpy(data).reshape(part.shape))
    labels = torch.cat([torch.from_numpy(own.astype(np.int64)) for own in labels])
    return {"images": images, "labels": labels - 1}


def read_npz(path, key):
    """An array of an npz file; one that would have to be unpickled is refused."""
    with readable(path, "npz file"), np.load(path, allow_pickle=False) as arrays:
        check(key in arrays, f"{path}: it has no {key}")
        return arrays[key]


def load_folder(root: Path, choice=None) -> Dataset:
    """ImageFolder layout: train/CLASS/* and test/ or val/; of the classes, those that the file
    `choice` names, or all. Images of one size are held in memory where they fit; all others are
    decoded from disk by worker processes, anew in every epoch."""
    check((root / "train").is_dir(), f"{root}: no folder train/; expected train/CLASS/*.jpg")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    classes = chosen(choice, classes, root / "train") if choice else classes
    endings, found = set(Image.registered_extensions()), {}
    for key, folder in ("train", "train"), ("test", "val"), ("test", "test"):
        if (root / folder).is_dir():
            inside = {some.name for some in (root / folder).iterdir() if some.is_dir()}
            if key in found and not inside:  # as ImageNet's, whose test images have no labels
                print(f"note: {root / folder} has no folders of classes: {root / 'val'} is taken")
                continue
            more = sorted(inside - set(classes)) if choice is None else []
            extra = f"{len(more)} classes that {root / 'train'} has not: {', '.join(more[:3])}"
            check(not more, f"{root / folder} has {extra}")
            files = [sorted((root / folder / name).glob("*")) for name in classes]
            files = [[file for file in some if file.suffix.lower() in endings] for some in files]
            check(any(files), f"{root / folder}: no images in folders named as the classes")
            labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([*map(len, files)]))
            found[key] = Split(sum(files, []), labels)
    shape = TF.pil_to_tensor(read_image(found["train"].images[0])).shape
    if shape.numel() * sum(map(len, found.values())) <= MEMORY_LIMIT:
        packed = {key: hold_in_memory(split, shape) for key, split in found.items()}
        if all(packed.values()):
            return from_packed(root.name, {**packed, "classes": classes}, root)
    return Dataset(root.name, classes, found["train"], found.get("test"), found["train"], 224)


def chosen(path, classes, where):
    """Those of the class folders that a text file names: the first word of each line, # to the end
    of a line being a comment."""
    words = [" ".join(row).split("#")[0].split() for row in read_table(path)]
    names = sorted({some[0] for some in words if some})
    check(names, f"{path}: it names no class folder")
    missing = [name for name in names if name not in set(classes)]
    some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
    check(not missing, f"{path}: {len(missing)} of {len(names)} are no folders of {where}: {some}")
    return names


def hold_in_memory(split, shape, strict=False):
    """The split decoded, as it is packed; None as soon as an image has another shape, which is
    refused if `strict`."""
    images = torch.empty(len(split), *shape, dtype=torch.uint8)
    for i, path in enumerate(split.images):
        pixels = TF.pil_to_tensor(read_image(path))
        if pixels.shape != shape:
            check(not strict, f"{path}: an image {list(pixels.shape)}, expected {list(shape)}")
            return None
        images[i] = pixels
    return {"images": images, "labels": split.labels}


TEXTURES = "striped checked dotted spoked ringed zigzag gridded blotched bricked plain".split()
FIGURES = "disc square triangle ring cross".split()
SHAPES = [f"{texture} {FIGURES[i % 5]}" for i, texture in enumerate(TEXTURES)]


def shapes(count: int, split: str, size: int = 32) -> dict:
    """`count` images of ten classes, drawn: five figures, each with two textures of its own.

    Place, size, a little rotation, the pitch of the texture, which of its two tones is the light
    one, tints and noise change from image to image. What a method without negatives would learn
    first, because a crop of an image keeps it and other images differ in it, is kept small: its
    mean colors, above all (the plain cross is the exception). Nearest neighbours in pixels do well
    too: the set shows that a method learns, not how well it does.
    The same images for the same count and split, everywhere.
    Returns {"images": uint8 [N, 3, size, size], "labels": int64 [N]}."""
    rng = generator(0, f"shapes {split}", count)
    labels = torch.randperm(count, generator=rng) % len(SHAPES)
    images = [draw_shapes(part, size, rng) for part in labels.split(500)]  # to spare memory
    return {"images": torch.cat(images), "labels": labels}


def draw_shapes(labels, size, rng):
    """uint8 [N, 3, size, size], an image of each class named by labels [N]."""
    count, every, tau = len(labels), torch.arange(len(labels)), 2 * math.pi

    def uniform(low, high, *shape):
        return torch.rand(count, *(shape or (1, 1)), generator=rng) * (high - low) + low

    axis = (torch.arange(2 * size) + 0.5) / size - 1  # drawn at twice the size, then averaged
    radius, pitch = uniform(0.9, 1.2), uniform(9, 13)
    turn, tilt = uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    x = axis[None, None, :] - uniform(-0.2, 0.2)
    y = axis[None, :, None] - uniform(-0.2, 0.2)
    u = (x * turn.cos() + y * turn.sin()) / radius  # [N, 2 size, 2 size], in the figure's frame
    v = (y * turn.cos() - x * turn.sin()) / radius
    rho, far, near = torch.hypot(u, v), u.abs().maximum(v.abs()), u.abs().minimum(v.abs())
    inside = [rho < 0.95, far < 0.85, v.maximum(0.866 * u.abs() - 0.5 * v) < 0.55]
    inside += [(rho - 0.72).abs() < 0.33, (far < 1) & (near < 0.42)]
    inside = torch.stack(inside)[labels % 5, every][:, None]  # [N, 1, 2 size, 2 size]

    s = (x * tilt.cos() + y * tilt.sin()) * pitch  # in the texture's frame
    t = (y * tilt.cos() - x * tilt.sin()) * pitch
    shifted = 0.7 * s + (t / tau).floor() % 2 * math.pi  # every second course of bricks
    light = [s.sin(), s.sin() * t.sin(), s.cos() + t.cos() - 0.7, (8 * torch.atan2(v, u)).sin()]
    light += [(rho * radius * pitch).sin(), (s + 1.6 * t.sin().asin()).sin()]
    light += [s.sin().maximum(t.sin()) - 0.75]
    light += [(0.45 * s).sin() + (0.35 * t + 1).sin() + (0.3 * (s + t)).cos()]
    light += [(t.sin() + 0.8).minimum(shifted.sin() + 0.85), torch.ones_like(s)]
    light = (torch.stack(light)[labels, every] > 0)[:, None]

    sign = uniform(-1, 1, 1, 1, 1, 1).sign()  # which of the texture's two parts is the light one
    tone = 0.5 + 0.25 * torch.cat([sign, -sign, 0 * sign], 1)  # of the two and of the background
    color = 0.9 * tone + 0.1 * uniform(0, 1, 3, 3, 1, 1)
    image = torch.where(light, color[:, 0], color[:, 1])
    image = torch.where(inside, image, color[:, 2])
    image = F.avg_pool2d(image, 2) + 0.25 * torch.randn(count, 3, size, size, generator=rng)
    return (image.clamp(0, 1) * 255).round().byte()


class DecodedViews(torch.utils.data.Dataset):
    """Images from disk, for worker processes. Item (index, number): uint8 [V, 3, S, S] and label;
    V random crops that depend on `number`, or one centre crop where it is None."""

    def __init__(self, split, recipes, size, seed):
        self.split, self.recipes, self.size, self.seed = split, recipes, size, seed

    def __getitem__(self, item):
        index, number = item
        image, crops = read_image(self.split.images[index]), []
        boxes = [centre_box(image.height, image.width, self.size)]
        if number is not None:
            rng, frame = generator(self.seed, "crop", number), (1, image.height, image.width)
            draw = random_resized_crop_params
            boxes = [draw(*frame, recipe.scale, generator=rng) for recipe in self.recipes]
        for box in boxes:
            size, mode = [self.size, self.size], TF.InterpolationMode.BICUBIC
            crops.append(TF.pil_to_tensor(TF.resized_crop(image, *map(int, box), size, mode)))
        return torch.stack(crops), self.split.labels[index]


def decode(split, items, batch_size, args, recipes=()):
    """Batches (uint8 [B, V, 3, S, S], labels [B]) on the device, decoded ahead by the workers."""
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    source = DecodedViews(split, recipes, args.image_size, args.seed)
    pinned = torch.device(args.device).type == "cuda"
    for images, labels in torch.utils.data.DataLoader(
        source, batch_sampler=batches, num_workers=args.workers, pin_memory=pinned,
        worker_init_fn=leave_signals_to_the_parent,
    ):  # fmt: skip
        yield images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)


def training_batches(split, epoch, args, recipes, skip=0):
    """This process's part of the batches of an epoch after the first `skip`: uint8 images
    [B, 3, H, W], or crops [B, V, 3, S, S] from disk, and labels [B], on the device. The order
    depends on seed and epoch alone; a short last batch is dropped."""
    order = torch.randperm(len(split), generator=generator(args.seed, "order", epoch))
    steps, size = len(split) // args.batch_size, args.batch_size // world_size()
    order = order[: steps * args.batch_size].view(steps, args.batch_size)[skip:]
    order = mine(order, 1).flatten()
    if not split.in_memory:
        items = [(i, epoch * len(split) + i) for i in order.tolist()]
        yield from decode(split, items, size, args, recipes)
        return
    for index in order.to(split.images.device).split(size) if len(order) else ():
        yield split.images[index], split.labels[index]


# --------------------------------------------------------------------------------------------------
# Views: torchvision's float operations, for a batch in which each image has its own random draw


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
    fallback_h = min(height, round(width / ratio[0]))
    fallback_w = min(width, round(height * ratio[1]))
    h = h.gather(1, first)[:, 0].masked_fill(~some, fallback_h)
    w = w.gather(1, first)[:, 0].masked_fill(~some, fallback_w)
    u = torch.rand(2, n, device=device, generator=generator)
    top = (u[0] * (height - h + 1)).long().minimum(height - h)  # u * n can round up to n
    left = (u[1] * (width - w + 1)).long().minimum(width - w)
    top = torch.where(some, top, (height - h) // 2)
    left = torch.where(some, left, (width - w) // 2)
    return top, left, h, w


def resampling_matrix(start, length, size_in, size_out, interpolation, mirror=None):
    """[B, size_out, size_in]: row o holds the weights with which output pixel o reads its crop;
    where `mirror` (bool [B]), in reverse order.

    The antialiased filters of Pillow and torchvision: triangle (bilinear) or cubic with a = -0.5
    (bicubic), widened by the reduction, cut off at the border of the crop, normalised."""
    length, start = length.float()[:, None, None], start.float()[:, None, None]
    step = length / size_out  # input pixels per output pixel
    reach = step.clamp(min=1)  # of the filter, the unit of all below
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


def luma(x):
    """[B, 3, H, W] -> [B, 1, H, W], with torchvision's weights."""
    red, green, blue = x.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(x):
    """[B, 3, H, W] -> the same shape, three equal channels."""
    return luma(x).expand_as(x)


def solarize(x, threshold=128 / 255):
    """Invert every value at or above the threshold; x in [0, 1]."""
    return torch.where(x >= threshold, 1 - x, x)


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


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter with every draw given. x: float [B, 3, H, W] in [0, 1].

    brightness, contrast, saturation: factors [B]; hue: shift [B] in turns; order: [B, 4], for each
    image a permutation of (0 brightness, 1 contrast, 2 saturation, 3 hue).

    Without branches: the hue has one slot, with three slots before it and three after for the
    rest; in a slot that an image does not need, the factor is 1 and nothing changes."""
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one view is drawn. jitter: ranges of brightness, contrast, saturation and hue. pad: where
    above 0, the crop is one of the whole image's size after a black border of `pad` pixels, and
    `scale` counts only for what is decoded from disk. policy: torchvision's name of an AutoAugment
    policy, or none. All recipes of an Augment share pad and policy."""

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


def auto_augment(images, policy, chosen, chance, sign):
    """AutoAugment (Cubuk et al. 2018): torchvision's policy and operations, with the draws given.

    images: uint8 [N, 3, H, W]. policy: "cifar10", "imagenet" or "svhn". chosen: [N] sub-policy of
    each image; chance: [N, 2] in [0, 1), an operation is done where chance <= probability; sign:
    bool [N, 2], a negative magnitude; the last three on the CPU, so that the groups are known
    without asking the device. The images that drew the same pass through an operation together."""
    policies = torchvision.transforms.AutoAugment(AutoAugmentPolicy(policy)).policies
    images = images.clone()
    for i, pair in enumerate(policies):
        for stage, (name, probability, level) in enumerate(pair):
            wanted = (chosen == i) & (chance[:, stage] <= probability)
            signs = (False,) if name in UNSIGNED else (False, True)
            for negative in signs:
                same = wanted if len(signs) == 1 else wanted & (sign[:, stage] == negative)
                if same.any():
                    group = same.nonzero()[:, 0].to(images.device, non_blocking=True)
                    strength = (level or 0) / 9 * (-1 if negative else 1)
                    images[group] = apply_operation(images[group], name, strength)
    return images


UNSIGNED = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")


def apply_operation(images, name, strength):
    """One of AutoAugment's operations, its strength from -1 to 1 of torchvision's largest."""
    height, width = images.shape[-2:]
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        adjust = {"Brightness": ops.adjust_brightness, "Color": ops.adjust_saturation}
        adjust |= {"Contrast": ops.adjust_contrast, "Sharpness": ops.adjust_sharpness}
        return adjust[name](images, 1 + 0.9 * strength)
    if name.startswith("Shear"):
        degrees = math.degrees(math.atan(0.3 * strength))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return ops.affine(images, 0.0, [0, 0], 1.0, shear, center=[0, 0])
    if name.startswith("Translate"):
        side = width if name == "TranslateX" else height
        shift = int(150 / 331 * side * strength)
        shift = [shift, 0] if name == "TranslateX" else [0, shift]
        return ops.affine(images, 0.0, shift, 1.0, [0.0, 0.0])
    if name == "Rotate":
        return ops.rotate(images, 30 * strength)
    if name == "Posterize":
        return ops.posterize(images, 8 - round(4 * strength))
    if name == "Solarize":
        return ops.solarize(images, 255 * (1 - strength))
    plain = {"AutoContrast": ops.autocontrast, "Equalize": ops.equalize, "Invert": ops.invert}
    return plain[name](images)


FACTORS = ("brightness", "contrast", "saturation")


class Augment:
    """uint8 images -> V normalised views, each float [B, 3, S, S] in channels_last.

    The views differ in their draws only. So they are stacked, and each operation runs once for all:
    crop and flip, jitter, grayscale, blur, solarise, normalise, in torchvision's order."""

    def __init__(self, recipes, size, mean, std, device="cpu"):
        self.recipes, self.size = recipes, size
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.kernel_size = 2 * (size // 20) + 1  # SimCLR: a tenth of the side. 3 at 32, 23 at 224

    def draw(self, n, height, width, rng) -> dict:
        """Every random number for n images: tensors whose first dimension is V * n, view 1 first.

        top, left, height, width (pixels), flip, gray, solarize (bool), brightness, contrast,
        saturation (factors), hue (turns), order [V * n, 4], sigma (pixels, 0 for no blur); with a
        policy, what auto_augment takes, on the CPU."""

        at, drawn = {"device": rng.device}, []
        how = at | {"generator": rng}

        def uniform(low, high):
            return torch.empty(many, **at).uniform_(low, high, generator=rng)

        for r, alike in itertools.groupby(self.recipes):  # neighbours of one recipe at once
            many = n * len(list(alike))
            if r.pad:
                side = min(height, width) - 2 * r.pad
                box = torch.full((many,), side, **at)
                place = [uniform(0, free + 1).long().clamp(max=free) for free in
                         (height - side, width - side)]  # fmt: skip
                crop = *place, box, box
            else:
                crop = random_resized_crop_params(many, height, width, r.scale, **how)
            d = dict(zip(("top", "left", "height", "width"), crop, strict=True))
            d |= {"flip": uniform(0, 1) < 0.5, "gray": uniform(0, 1) < r.gray_p}
            plain = uniform(0, 1) >= r.jitter_p  # masked_fill: where() would copy from the host
            for name, spread in zip(FACTORS, r.jitter[:3], strict=True):
                d[name] = uniform(max(0, 1 - spread), 1 + spread).masked_fill(plain, 1)
            d["hue"] = uniform(-r.jitter[3], r.jitter[3]).masked_fill(plain, 0)
            d["order"] = torch.rand(many, 4, **how).argsort(1)
            sharp = uniform(0, 1) >= r.blur_p
            d["sigma"] = uniform(0.1, 2.0).masked_fill(sharp, 0)  # SimCLR's range
            d["solarize"] = uniform(0, 1) < r.solarize_p
            drawn.append(d)
        d = {key: torch.cat([d[key] for d in drawn]) for key in drawn[0]}
        if self.recipes[0].policy:
            host = generator(rng.initial_seed(), "policy", 0)  # another stream than rng's own
            size, how = n * len(self.recipes), {"generator": host}
            d["chosen"] = torch.randint(25, (size,), **how)  # every policy has 25 sub-policies
            d |= {"chance": torch.rand(size, 2, **how), "sign": torch.rand(size, 2, **how) < 0.5}
        return d

    @torch.no_grad()
    def __call__(self, images, rng):
        """images: uint8 [B, 3, H, W], or [B, V, 3, S, S] already cropped; rng on their device. Of
        several processes each has B of a batch for which all draw."""
        views, pad, n = len(self.recipes), self.recipes[0].pad, len(images) * world_size()
        if pad:
            images = F.pad(images, (pad,) * 4)
        d = self.draw(n, *images.shape[-2:], rng)
        d = {key: mine(x.unflatten(0, (views, n)), 1).flatten(0, 1) for key, x in d.items()}
        if images.ndim == 5:  # only the flip is left of the crop
            whole = {"top": pad, "left": pad, "height": self.size, "width": self.size}
            d |= {key: torch.full_like(d[key], value) for key, value in whole.items()}
            return self.apply(images.transpose(0, 1).flatten(0, 1), d).chunk(views)
        return self.apply(images.repeat(views, 1, 1, 1), d).chunk(views)

    def apply(self, images, d):
        """images: uint8 [V * B, 3, H, W]; d: what `draw` returned."""
        box = d["top"], d["left"], d["height"], d["width"]
        x = resized_crop(images.float().div_(255), *box, self.size, d["flip"]).clamp_(0, 1)
        if self.recipes[0].policy:
            drawn = [d[key] for key in ("chosen", "chance", "sign")]
            x = auto_augment((x * 255).round().byte(), self.recipes[0].policy, *drawn).float() / 255
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

    def restore(self, x):
        """The inverse of `normalize`, for pictures."""
        return (x * self.std + self.mean).clamp(0, 1)


def centre_box(height, width, size):
    """top, left, height, width of the square that evaluation sees: 7/8 of the shorter side where
    images are larger than `size` (resize to 256, crop 224; S003 B.1.2), else all of it."""
    side = min(height, width)
    side = max(size, round(side * 7 / 8)) if side > size else side
    return (height - side) // 2, (width - side) // 2, side, side


def evaluation_view(images, size, mean, std):
    """uint8 [B, 3, H, W] -> normalised float [B, 3, size, size], nothing random."""
    x = images.float() / 255
    if x.shape[2:] != (size, size):
        box = [torch.full((len(x),), v, device=x.device) for v in centre_box(*x.shape[2:], size)]
        x = resized_crop(x, *box, size).clamp(0, 1)
    return Augment([], size, mean, std, x.device).normalize(x)


# --------------------------------------------------------------------------------------------------
# Models

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
STEMS, PRECISIONS = ("auto", "small", "imagenet"), ("bf16", "fp16", "fp32")
OPTIMIZERS, SCALINGS = ("sgd", "lars", "adam", "adamw"), ("linear", "sqrt", "none")
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune")


def resnet(arch="resnet18", stem="small") -> nn.Module:
    """torchvision's ResNet without `fc`: [B, 3, H, W] -> [B, F]; F is `.num_features`, 512 or 2048.

    stem "small", for images up to 64 pixels: a 3x3 convolution of stride 1 for the 7x7 of stride 2,
    and no max-pool (SimCLR, appendix B.9). "imagenet": torchvision's. The keys are torchvision's.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch!r} is none of {', '.join(ARCHITECTURES)}")
    if stem not in ("small", "imagenet"):
        raise ValueError(f"stem {stem!r} is neither 'small' nor 'imagenet'")
    model = getattr(torchvision.models, arch)(weights=None)
    model.num_features, model.fc = model.fc.in_features, nn.Identity()
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(
            model.conv1.weight, mode="fan_out", nonlinearity="relu"
        )  # as others
        model.maxpool = nn.Identity()
    return model


def mlp(*widths, batch_norm=True, bias=True, last_bias=True) -> nn.Sequential:
    """Linear, batch norm where wanted and ReLU for each width but the last, a Linear alone."""
    layers = []
    for d_in, d_out in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(d_in, d_out, bias=bias)]
        layers += [nn.BatchNorm1d(d_out)] * batch_norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=last_bias))


def each_view(views, together, *networks):
    """Each of the V views passed through all networks in turn: a list of V tensors. together: in
    one pass, in which batch norm sees all views at once and a GPU has half as much to launch."""
    stacked = [torch.cat(list(views))] if together else views
    for network in networks:
        stacked = [network(x) for x in stacked]
    return list(stacked[0].chunk(len(views))) if together else stacked


# --------------------------------------------------------------------------------------------------
# Optimisation


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), the rule of facebookresearch/barlowtwins.

    Tensors of two or more dimensions: u = grad + weight_decay * p, times trust_coefficient * |p| /
    |u|. Tensors of one (biases, norms): u = grad. Then m = momentum * m + u and p = p - lr * m; the
    learning rate stays outside the momentum."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:  # _foreach_: few launches for all tensors
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if p.ndim > 1]
            updates = {p: p.grad for p in params}
            if matrices:
                grads = [p.grad for p in matrices]
                decayed = torch._foreach_add(grads, matrices, alpha=group["weight_decay"])
                p = torch.stack(torch._foreach_norm(matrices))
                u = torch.stack(torch._foreach_norm(decayed))
                ratio = group["trust_coefficient"] * p / u
                ratio = ratio.masked_fill((p == 0) | (u == 0), 1)  # a zero norm: a plain step
                torch._foreach_mul_(decayed, list(ratio.unbind()))
                updates |= zip(matrices, decayed, strict=True)
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if params:
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, list(updates.values()))
                torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def param_groups(model, weight_decay):
    """Two groups: matrices and kernels decay; biases and norms (one dimension) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]


def make_optimizer(model, args, fused=True):
    """fused: one launch for a step, where the optimiser is torch's; None leaves it to torch."""
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        return LARS(groups, args.scaled_lr, args.momentum)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.scaled_lr, args.momentum, fused=fused)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return adam(groups, args.scaled_lr, fused=fused)


def learning_rate(step, total, warmup, base, final=0.0):
    """Linear warm-up to `base` over `warmup` steps, then half a cosine to `final` at `total`."""
    if step < warmup:
        return base * min(1, (step + 1) / warmup)
    return final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


# --------------------------------------------------------------------------------------------------
# What a representation is worth: features, nearest neighbours, collapse


@torch.no_grad()
def encode(backbone, split, args, data, batch_size=512) -> Tensor:
    """Features float32 [N, F] of a split, the backbone in eval mode, images not augmented. Each of
    several processes computes a part, and gets all."""
    training, features, part = backbone.training, [], split.part()
    backbone.eval()
    if split.in_memory:
        batches = part.images.split(batch_size)
    else:
        stream = decode(part, [(i, None) for i in range(len(part))], batch_size, args)
        batches = (crops[:, 0] for crops, _ in stream)
    for images in batches:
        x = evaluation_view(images, args.image_size, data.mean, data.std)
        with autocast(args):
            features.append(backbone(x).float())
    backbone.train(training)
    return gather([torch.cat(features)])[0][: len(split)]


def knn_scores(bank, bank_labels, queries, num_classes, k=200, temperature=0.1) -> Tensor:
    """Scores [N, num_classes] of the weighted nearest-neighbour classifier (Wu et al. 2018,
    arXiv:1805.01978): of the training features `bank` [M, F] the k nearest to a query [N, F] by
    cosine vote for their classes, each with the weight exp(cosine / temperature), up to a factor
    for each query that keeps it from overflowing."""
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
    return float(hits[:, 0].double().mean()), float(hits.any(1).double().mean())


def knn_votes(bank, test, num_classes, args):
    """Scores [N, num_classes] of nearest neighbours, and their k: --knn-k, but at most half of a
    class's mean share of the bank, beyond which others outvote it. bank, test: Splits of features.
    """
    k = max(1, min(args.knn_k, len(bank) // (2 * num_classes)))
    labels = bank.labels.to(bank.images.device)
    return knn_scores(bank.images, labels, test.images, num_classes, k, args.knn_temperature), k


def knn_monitor(backbone, data, args):
    """Top-1 accuracy on the test split of the nearest neighbours in the training split, or in
    --knn-bank images of it (50 000 where they have to be decoded)."""
    bank = data.train.spread(args.knn_bank or (0 if data.train.in_memory else 50_000))
    bank, test = (Split(encode(backbone, x, args, data), x.labels) for x in (bank, data.test))
    return top_accuracies(knn_votes(bank, test, len(data.classes), args)[0], test.labels)[0]


def collapse_figures(features):
    """feature_std: deviation over images of the L2-normalised features, mean over features, times
    sqrt(F): 1 where they fill the sphere evenly, 0 at collapse (SimSiam, section 4.1).
    effective_rank: exp of the entropy of the centred features' normalised singular values (Roy &
    Vetterli 2007): how many directions are in use."""
    unit, centred = F.normalize(features.float()), (features - features.mean(0)).double()
    centred = centred.T if len(centred) < centred.shape[1] else centred  # the smaller of two grams
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    share = (singular / singular.sum().clamp(min=1e-12)).clamp(min=1e-12)
    rank = torch.exp(-(share * share.log()).sum())
    std = unit.std(0).mean() * unit.shape[1] ** 0.5
    return {"feature_std": float(std), "effective_rank": float(rank)}


# --------------------------------------------------------------------------------------------------
# More, or less, of the image in the representation: a term that any method can add

MI_WEIGHTS = {"rc": 1.0, "lbe": 1.0, "ip": 5e-4, "mib": 5e-4}  # InfoCL with SimCLR; its BYOL: .1,
# and its Barlow Twins 1, of a loss that is not scaled by .1
NOISE = 0.1  # S002: sigma, the deviation of the noise on the representation


def lower_bound_estimate(mu: Tensor, z: Tensor, rho: float = 0.05) -> Tensor:
    """I_NCE~(z, v), up to constants a lower bound of the information in z about its image (S002):
    -mean_k log sum_l exp(-rho |z_l - mu_k|^2), to be maximised.

    mu: [N, F] representations f(v); z: [N, F] the same with noise, mu + sigma * noise; rho: scale,
    S002 .05. Returns a scalar in nats, in float32 at least, from -log N (all in one place) to about
    0 (all far apart). The text sums over z for each mu, as here; the code of its authors
    (Haoqing-Wang/InfoCL mi_estimators.py) over mu for each z. The values hardly differ."""
    with torch.autocast(mu.device.type, enabled=False):
        dtype = torch.promote_types(mu.dtype, torch.float32)
        # Differences, not |a|^2 + |b|^2 - 2ab, which cancels where points are close.
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(mu.to(dtype), z.to(dtype), compute_mode=exact)  # [N, N], k by l
        return -(-rho * distance.square()).logsumexp(1).mean()


class Decoder(nn.Module):
    """Representation [B, F] -> view [B, 3, S, S]: from a small square, a transposed convolution for
    each doubling of the side (InfoCL recons.py: 4x4 to 32x32 through 256, 128 and 64 channels)."""

    def __init__(self, features, size):
        super().__init__()
        doublings = max(0, int(math.log2(size / 4)))
        self.size, self.side = size, math.ceil(size / 2**doublings)
        layers = [nn.Linear(features, 64 * self.side**2, bias=False)]
        layers += [nn.BatchNorm1d(64 * self.side**2), nn.ReLU(inplace=True)]
        layers += [nn.Unflatten(1, (64, self.side, self.side))]
        width, how = 64, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        for i in reversed(range(doublings)):
            wider = min(256, 64 * 2**i)
            layers += [nn.ConvTranspose2d(width, wider, bias=False, **how)]
            layers += [nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, h):
        return self.layers(h)[..., : self.size, : self.size]


class MutualInformation(nn.Module):
    """A method plus weight * a term on its representations h, one for each view (S002).

    rc   add the error of reconstructing each view from its h: mean over pixels, summed over views
    lbe  subtract lower_bound_estimate over all views together, with noise on h
    ip   add the squared distance of the two views' h, mean over images and features (S002 sums over
         features; the weight is InfoCL's, for the mean): drops what the views do not share
    mib  the same with noise on h
    S002 has a decoder for each view and sums over pixels, 3072 times this term on CIFAR; here, as
    in InfoCL's code, one decoder and the mean (views there have mean and deviation .5, here those
    of the dataset), and one estimate for lbe over both views. The noise without a term, which S002
    4.0.2 compares with, is mib with the weight 0.
    S002 prints ip and mib alike. The difference is the noise, which the method's heads get too.
    As in InfoCL's code, lbe is a weighted sum over three depths, rho 1/20, for images of at most 64
    pixels; for larger ones it has the last depth alone, rho 1/80.
    Evaluation never sees the noise: it comes in train mode alone."""

    def __init__(self, method, kind, weight, image_size):
        super().__init__()
        self.method, self.kind, self.weight = method, kind, weight
        if kind == "rc":
            self.decoder = Decoder(method.backbone.num_features, image_size)
        self.depths = {"layer2": 0.25, "layer3": 0.5} if kind == "lbe" and image_size <= 64 else {}
        self.depths["backbone"], self.rho = 1.0, 1 / 20 if image_size <= 64 else 1 / 80
        method.backbone.register_forward_hook(self.on_representation)
        for name in list(self.depths)[:-1]:
            method.backbone.get_submodule(name).register_forward_hook(
                lambda _, __, maps, name=name: self.keep(name, full_precision(maps).mean((2, 3)))
            )
        self.kept = {}

    @property
    def backbone(self):
        return self.method.backbone

    def keep(self, name, mu):
        if self.training and torch.is_grad_enabled():
            z = mu + NOISE * self.noise(mu) if self.kind in ("lbe", "mib") else mu
            self.kept.setdefault(name, []).append((mu, z))

    def noise(self, mu):
        """Drawn for the whole batch, of which several processes have a part each."""
        views, batch = len(mu) // self.batch, self.batch * world_size()
        drawn = torch.randn(views, batch, mu.shape[1], device=mu.device)
        return mine(drawn, 1).flatten(0, 1)

    def on_representation(self, backbone, inputs, h):
        if self.training and torch.is_grad_enabled():
            self.keep("backbone", full_precision(h))
            return self.kept["backbone"][-1][1].to(h.dtype)

    def forward(self, views, y=None):
        self.kept, self.batch = {}, len(views[0])
        loss, terms = self.method(views, y)
        kept = {name: [torch.cat(parts) for parts in zip(*pairs, strict=True)]
                for name, pairs in self.kept.items()}  # fmt: skip
        self.kept = {}
        mu, _ = kept["backbone"]  # [VB, F], view 1 first
        if self.kind == "rc":
            errors = [(full_precision(self.decoder(h)) - x).square().mean() for h, x in
                      zip(mu.chunk(len(views)), views, strict=True)]  # fmt: skip
            term = sum(errors)
        elif self.kind == "lbe":
            estimates = {k: lower_bound_estimate(*gather(p), self.rho) for k, p in kept.items()}
            term = -sum(weight * estimates[name] for name, weight in self.depths.items())
        else:
            pairs = list(itertools.combinations(mu.chunk(len(views)), 2))
            term = sum((h1 - h2).square().mean() for h1, h2 in pairs) / len(pairs)
        return loss + self.weight * term, {**terms, f"loss_{self.kind}": term.detach()}

    def after_step(self, progress):
        if hasattr(self.method, "after_step"):
            self.method.after_step(progress)


# --------------------------------------------------------------------------------------------------
# Command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)": those texts say what follows
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help)

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
    p.add_argument("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}; a folder; a .pt")
    p.add_argument("--data-dir", default="data", help="where named datasets are kept, packed")
    p.add_argument("--workers", type=whole, help="processes that decode images (default: by cores)")
    p.add_argument("--seed", type=whole, default=0, help="the only source of randomness")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    p.add_argument("--timeout", type=number(float, 1, 1e7), default=1800.0,
                   help="seconds after which a process that waits for another one gives up")
    p.add_argument("--precision", choices=PRECISIONS, help="default: bf16 where it is fast")
    p.add_argument("--image-size", type=number(int, 8), help="side of the views (default: by data)")
    p.add_argument("--arch", choices=ARCHITECTURES, default="resnet18", help="torchvision's name")
    p.add_argument("--stem", choices=STEMS, default="auto", help="auto: small up to 64 pixels")
    p.add_argument("--knn-k", type=count, default=200, help="neighbours; fewer on small sets")
    p.add_argument("--knn-temperature", type=positive, default=0.1, help="of the neighbours' votes")
    p.add_argument("--knn-bank", type=whole, default=0, help="N of the training images; 0: all")


def base_parser(description):
    """The flags of every training script."""
    p = Parser(description.strip().splitlines()[0])
    shared_arguments(p)
    p.add_argument("--epochs", type=count, default=200, help="passes over the training images")
    p.add_argument("--batch-size", type=number(int, 2), default=512, help="images (not views)")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="update rule")
    p.add_argument("--lr", type=positive, default=0.12, help="learning rate for a batch of 256")
    p.add_argument("--lr-scaling", choices=SCALINGS, default="linear", help="of lr with the batch")
    p.add_argument("--momentum", type=fraction, default=0.9, help="of sgd and lars")
    p.add_argument("--weight-decay", type=number(float, 0), default=5e-4, help="not on 1-D tensors")
    p.add_argument("--warmup-epochs", type=number(float, 0), default=10.0,
                   help="of linear warm-up; unless given here, at most a tenth of the epochs")
    p.add_argument("--views", type=number(int, 2), default=2, help="views of each image")
    p.add_argument("--color-strength", type=number(float, 0, 4), default=1.0, help="of the jitter")
    p.add_argument("--crop-min", type=number(float, 1e-3, 1), default=0.08, help="share of area")
    p.add_argument("--blur", type=fraction, default=0.0, help="probability of Gaussian blur")
    p.add_argument("--increase-mi", choices=tuple(MI_WEIGHTS), help="ip, mib decrease it (S002)")
    p.add_argument("--mi-weight", type=number(float, 0), help="default: 1 rc, lbe; 5e-4 ip, mib")
    p.add_argument("--concat-views", action=argparse.BooleanOptionalAction,
                   help="one forward pass for all views (default: by method, see its file)")
    p.add_argument("--compile", choices=COMPILE_MODES, help="torch.compile's mode (default: "
                   "'default' on a GPU for runs of 2000 steps or more, else off)")
    p.add_argument("--out", help="folder of the run (default: runs/METHOD_DATASET_ARCH)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--save-every", type=whole, default=0, help="epochs between milestones, "
                   "checkpoint_EPOCH.pt, that are kept beside checkpoint.pt; 0: none")
    p.add_argument("--keep", type=count, default=3, help="how many milestones, the newest")
    p.add_argument("--knn-every", type=whole, default=10, help="epochs between kNN figures; 0 none")
    return p
# fmt: on


def parse_args(parser, presets, *variants, argv=None):
    """What the command line says, else the presets, else the parser's default. Of the presets count
    "default", then the dataset's, then those named by a variant, then "DATASET VARIANT"; a variant
    is the value of a flag named in `variants`, or the flag's own name where it is a switch. Says
    which presets there were and what the command line gave."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("dataset", *variants):
        default = parser.get_default(flag)
        how = {"action": "store_true"} if default is False else {"nargs": "?", "default": default}
        first.add_argument(f"--{flag.replace('_', '-')}", **how)
    known, _ = first.parse_known_args(argv)
    dataset = Path(known.dataset or "")
    name = dataset.stem if dataset.suffix == ".pt" else str(dataset)
    words = [flag if getattr(known, flag) is True else getattr(known, flag) for flag in variants]
    keys = ["default", name, *words, *(f"{name} {word}" for word in words)]
    keys = [key for key in keys if key in presets]
    preset = {flag: value for key in keys for flag, value in presets[key].items()}
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is there takes no default
    typed = vars(parser.parse_args(argv, unset)).items()
    given = {key: value for key, value in typed if value is not None}
    print(f"preset {' + '.join(keys)}: {preset}, given: {given or 'nothing'}")
    if "warmup_epochs" in vars(args) and "warmup_epochs" not in given:  # meant for a long run
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    return args


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


def resolve_compile(args, steps):
    """torch.compile by default on a GPU that Triton knows, in a run that is not short. Not with
    several processes, whose batch norm and gathering cut the graph in pieces."""
    alone = world_size() == 1
    check(alone or args.compile in (None, "off"), "--compile is for one process, not for several")
    names = [os.environ.get("CXX", "g++").split()[-1], "clang++"]
    if args.compile is None:
        cuda = torch.device(args.device).type == "cuda"
        known = cuda and alone and torch.cuda.get_device_capability(args.device) >= (7, 0)
        known = known and importlib.util.find_spec("triton") is not None
        names = [os.environ.get("CC", "gcc").split()[-1], "clang"]
        pays = known and steps >= 2000 and any(map(shutil.which, names))
        args.compile = "default" if pays else "off"
    missing = (
        f"--compile {args.compile} needs a compiler ({names[0]}): install it, or --compile off"
    )
    check(args.compile == "off" or any(map(shutil.which, names)), missing)


def compiled(function, args):
    """`function` as one graph for one set of shapes, or as it is with --compile off. It draws the
    random numbers that it would draw uncompiled."""
    if args.compile == "off":
        return function
    torch._inductor.config.fallback_random = True
    mode = None if args.compile == "default" else args.compile
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def begin_step(args):
    """Tell CUDA graphs, where there are any, that what the last step made may be overwritten."""
    if args.compile != "off":
        torch.compiler.cudagraph_mark_step_begin()


def autocast(args):
    """The context in which networks run. Losses leave it again, for full precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


# --------------------------------------------------------------------------------------------------
# Training


def load_once(args) -> Dataset:
    """load_dataset. Where it has to download and pack, the first process does, then the first of
    each other machine, then the others."""
    there = args.dataset not in DATASETS or Path(args.data_dir, f"{args.dataset}.pt").is_file()
    turn, last = 0 if rank() == 0 else 1 if launched("LOCAL_RANK") == 0 else 2, 2
    turn, last = (turn, last) if agreed(not there) else (0, 0)
    for now in range(last + 1):
        if now == turn:
            data = load_dataset(args.dataset, args.data_dir)
        if last:
            agreed(0)  # the next after all of these
    return data


def prepare(args, method) -> Dataset:
    """The dataset, on the device; fills in the arguments that follow from it and the machine."""
    resolve_hardware(args)
    data = load_once(args)
    images = f"the {len(data.pretrain)} training images"
    check(args.batch_size <= len(data.pretrain), f"--batch-size {args.batch_size} exceeds {images}")
    uneven = f"--batch-size {args.batch_size} is not a multiple of the {world_size()} processes"
    check(args.batch_size % world_size() == 0, uneven)
    more = f"{data.name} has {len(data.pretrain)} training images here, and more on another machine"
    check(agreed(len(data.pretrain)) == len(data.pretrain), more)
    args.image_size = args.image_size or data.size
    check(args.image_size >= 8, f"images of {args.image_size} pixels: give an --image-size from 8")
    if args.stem == "auto":
        args.stem = "small" if args.image_size <= 64 else "imagenet"
    args.out = args.out or f"runs/{method}_{data.name}_{args.arch}"
    ratio = args.batch_size / 256
    longer = f"--warmup-epochs {args.warmup_epochs:g} exceeds --epochs {args.epochs}"
    check(args.warmup_epochs <= args.epochs, longer)
    scale = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1}[args.lr_scaling]
    args.scaled_lr = args.lr * scale
    check(args.increase_mi or args.mi_weight is None, "--mi-weight needs --increase-mi")
    if args.increase_mi and args.mi_weight is None:
        args.mi_weight = MI_WEIGHTS[args.increase_mi]
    resolve_compile(args, len(data.pretrain) // args.batch_size * args.epochs)
    torch.manual_seed(args.seed)  # the initial weights
    return data.to(args.device)


def typed(words):
    """The command of these words, for this number of processes on this machine."""
    several = launched("LOCAL_WORLD_SIZE", 1)
    program = ["python"] if several == 1 else ["torchrun", f"--nproc-per-node={several}"]
    return shlex.join([*program, *words])


def describe(args) -> dict:
    """What a figure needs to be repeated: command, commit, versions, machine, settings."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = torch.device(args.device).type == "cuda"
    threads = f"cpu, {torch.get_num_threads()} threads"
    return {
        "command": typed(sys.argv),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(args.device) if cuda else threads,
        "processes": world_size(),
        "config": vars(args),
    }


class Progress:
    """A bar on a terminal, a line a minute in a file. Reading a loss waits for the device: here it
    is done twice a second at most."""

    def __init__(self, label, steps, batch_size, first=0):
        self.label, self.steps, self.batch_size = label, steps, batch_size
        self.terminal, self.start, self.first = sys.stdout.isatty(), time.time(), first
        self.last = self.start

    def leave_out(self, done):
        """Leave out of the rate the steps that are done. Returns the seconds that they took."""
        before, self.start, self.first = self.start, time.time(), done
        self.last = self.start
        return self.start - before

    def rate(self, done):
        """Images per second."""
        return (done - self.first) * self.batch_size / max(time.time() - self.start, 1e-9)

    def update(self, done, loss_sum):
        now = time.time()
        if now - self.last >= (0.5 if self.terminal else 60):
            self.last, rate = now, self.rate(done) / self.batch_size
            bar = f"[{'#' * (20 * done // self.steps):20}]" if self.terminal else f"step {done}"
            text = f"{self.label} {bar} loss {float(loss_sum) / done:.4f}"
            left = f"{rate * self.batch_size:.0f} img/s, {(self.steps - done) / rate:.0f} s left"
            self.show(f"{text}, {left}", end="")

    def show(self, text, end="\n"):
        before, end = ("\r", "\033[K" + end) if self.terminal else ("", "\n")
        print(before + text, end=end, flush=True)


# What a run saves, and what it leaves if it ended before
SAVED_FILES = {"checkpoint.pt", "checkpoint.previous.pt", "encoder.pt"}
OWN_FILES = {"config.json", "log.jsonl", "views.png", "not_finite.pt"}
OWN_FILES |= {f"{name}.tmp" for name in OWN_FILES | SAVED_FILES}


def is_checkpoint(saved, method):
    """Whether what a file holds is what RunFolder.save wrote for this method."""
    kinds = {"epoch": int, "step": int, "log": list, "untrained": (float, type(None))}
    kinds |= dict.fromkeys(["config", "model", "optimizer", "scaler"], dict)
    if not isinstance(saved, dict) or saved.get("method") != method:
        return False
    if not all(key in saved and isinstance(saved[key], kind) for key, kind in kinds.items()):
        return False
    if not isinstance(saved.get("sums", {}), dict) or len(saved["log"]) != saved["epoch"]:
        return False
    entries = [entry.values() if isinstance(entry, dict) else [None] for entry in saved["log"]]
    entries.append(saved["scaler"].values())
    numbers = all(isinstance(value, int | float) for values in entries for value in values)
    return numbers and all(dense(v, torch.float32, 1) for v in saved.get("sums", {}).values())


class RunFolder:
    """The output folder of a training run, and what is saved there."""

    def __init__(self, args, method, data):
        self.args, self.method, self.data, self.path = args, method, data, Path(args.out)
        self.log, self.untrained, self.saved = [], None, time.time()

    def milestones(self):
        """The checkpoints that --save-every keeps, the oldest first."""
        names = [path.name for path in self.path.glob("checkpoint_*.pt")]
        names = [name for name in names if re.fullmatch(r"checkpoint_\d{5,}\.pt", name)]
        return [self.path / name for name in sorted(names, key=lambda name: int(name[11:-3]))]

    def newest(self):
        """The newest checkpoint that is whole, and its path. Damaged ones before it are named."""
        first, errors = self.path / "checkpoint.pt", []
        others = [self.path / "checkpoint.previous.pt", *reversed(self.milestones())]
        for path in [first, *(path for path in others if path.is_file())]:
            try:
                saved = load_whole(path)
            except InputError as error:
                errors.append(error)
                continue
            if errors:
                print(f"{errors[0]}; going on from {path}", file=sys.stderr)
                if first.exists():  # it must not become the previous one
                    os.replace(first, self.path / "checkpoint.damaged.pt")
            return path, saved
        raise errors[0]

    def nothing_saved(self):
        """Whether a run began here that was stopped before it saved a checkpoint."""
        begun = self.path.is_dir() and {file.name for file in self.path.iterdir()} <= OWN_FILES
        if begun:
            print(f"{self.path} has no checkpoint yet: from the beginning")
        return begun

    def make(self):
        """An empty folder, or one whose run ended before it saved a checkpoint."""
        there = any((self.path / name).exists() for name in SAVED_FILES)
        check(not there, f"{self.path} holds a run: add --resume, or choose another --out")
        files = self.path.iterdir() if self.path.exists() else ()
        free = {file.name for file in files} <= OWN_FILES
        check(free, f"{self.path} holds files that are not a run's: choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "not_finite.pt").unlink(missing_ok=True)
        write_json(describe(self.args), self.path / "config.json")

    def open(self, model, optimizer, scaler):
        """Make the folder, or go on from its checkpoint. Returns epochs and steps already done, and
        the sums of the logged terms over the steps of an epoch that was not finished."""
        if not self.args.resume or on_first(self.nothing_saved):
            on_first(self.make)
            return 0, 0, {}
        path, saved = on_first(self.newest)
        check(is_checkpoint(saved, self.method), f"{path}: not a checkpoint of {self.method}")
        free = {"resume", "out", "data_dir", "device", "workers", "compile", "scaled_lr"}
        free |= {"save_every", "keep", "timeout"}
        for key in sorted(vars(self.args)):
            now, then = getattr(self.args, key), saved["config"].get(key)
            what = f"--{key.replace('_', '-')} {then}, not {now}"
            plain = isinstance(then, str | int | float | None)
            same = key in free or key.startswith("knn") or (plain and now == then)
            check(same, f"{path} was made with {what}: --resume needs the same")
        groups = optimizer.param_groups
        options = [{key: group[key] for key in group if key != "params"} for group in groups]
        try:
            for part, name in (model, "model"), (optimizer, "optimizer"), (scaler, "scaler"):
                part.load_state_dict(saved[name])
            for parameter, state in optimizer.state.items():
                shapes = {v.shape for v in state.values() if v is not None}
                if not shapes <= {parameter.shape, torch.Size()}:
                    raise ValueError("an optimizer state of another shape than its parameter's")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} does not fit: {' '.join(str(error).split())[:200]}") from None
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)  # the settings are those of args, which are the same
        sums = {key: value.to(self.args.device) for key, value in saved.get("sums", {}).items()}
        processes = saved.get("processes", 1)
        if processes != world_size():
            print(f"made by {processes} processes, now {world_size()}: the same but for rounding")
        same = processes == world_size()
        sums = {key: value[rank()] if same else value.mean() for key, value in sums.items()}
        self.log, self.untrained = saved["log"], saved["untrained"]
        if not sums and saved["epoch"]:
            self.keep_milestone(path, saved["epoch"])  # a run may have been killed before it did
        self.write_log()  # without what came after the checkpoint
        print(f"resumed from step {saved['step']} (epoch {saved['epoch']})")
        return saved["epoch"], saved["step"], sums

    def write_log(self):
        if rank():
            return
        with atomic_write(self.path / "log.jsonl") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in self.log).encode())

    def about(self, epoch, step):
        a, d = self.args, self.data
        about = {"method": self.method, "epoch": epoch, "step": step, "config": vars(a)}
        about |= {"arch": a.arch, "stem": a.stem, "image_size": a.image_size, "dataset": d.name}
        return about | {"mean": list(d.mean), "std": list(d.std)}

    def save(self, model, optimizer, scaler, epoch, step, sums=None):
        """checkpoint.pt holds what is needed to go on, encoder.pt what is needed to use it. sums:
        of the terms so far, in the middle of an epoch, [N] of N processes."""
        if rank():
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"scaler": scaler.state_dict(), "log": self.log, "untrained": self.untrained}
        state |= {"sums": sums or {}, "processes": world_size()} | self.about(epoch, step)
        checkpoint = self.path / "checkpoint.pt"
        with atomic_write(checkpoint, self.path / "checkpoint.previous.pt") as file:
            torch.save(state, file)
        self.save_encoder(model, epoch, step)
        if not sums:
            self.keep_milestone(checkpoint, epoch)
        self.saved = time.time()

    def at_milestone(self, epoch):
        return self.args.save_every > 0 and epoch % self.args.save_every == 0

    def keep_milestone(self, checkpoint, epoch):
        """Give what was saved at the end of an epoch a name that stays, where it should."""
        if rank() == 0 and self.at_milestone(epoch):
            second_name(checkpoint, self.path / f"checkpoint_{epoch:05}.pt")
            for old in self.milestones()[: -self.args.keep]:
                old.unlink()

    def save_encoder(self, model, epoch, step):
        if rank():
            return
        weights = {k: v.cpu().contiguous() for k, v in model.backbone.state_dict().items()}
        with atomic_write(self.path / "encoder.pt") as file:
            torch.save(self.about(epoch, step) | {"state_dict": weights}, file)

    def wants_saving(self, epoch):
        """At the first and last epoch, at milestones, and where the last save is a minute old."""
        ends = epoch in (1, self.args.epochs)
        return ends or self.at_milestone(epoch) or time.time() - self.saved > 60

    def stop(self, number):
        """After a signal and a last save: how to go on, and the exit status of that signal."""
        words = [word for word in sys.argv if word != "--resume"]
        with contextlib.suppress(OSError):
            print(f"stopped; to go on: {typed([*words, '--resume'])}", flush=True)
        agreed(0)  # nobody leaves while the first process saves: torchrun would end it
        sys.exit(128 + number)

    def check_finite(self, recent, model, optimizer):
        """Stop at the first of the recent steps, [(step, lr, {term: value})], whose loss is not
        finite; the state after the last of them goes to not_finite.pt. What was saved is from
        before. Waits for the device."""
        losses = mean_over_processes(torch.stack([terms["loss"] for _, _, terms in recent]))
        if not losses.isfinite().all():
            step, lr, terms = recent[int(losses.isfinite().logical_not().nonzero()[0])]
            terms = {k: float(v) for k, v in mean_terms(terms).items()}
            path = self.path / "not_finite.pt"
            state = {"step": step, "lr": lr, "terms": terms, "state_step": recent[-1][0]}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            if rank() == 0:
                with contextlib.suppress(OSError), atomic_write(path) as file:  # the line matters
                    torch.save(state, file)
            wrong = f"step {step}: the loss is not finite: {terms}, learning rate {lr:.3g}"
            raise InputError(f"{wrong}; try a lower --lr and another --out (state in {path})")
        recent.clear()


def save_views(data, augment, args, path):
    """A picture of what the network sees: in each row an image in a blue frame and its views."""
    split = data.pretrain.spread(8)
    images = split.images
    if not split.in_memory:
        items = [(i, i) for i in range(len(split))]
        images, _ = next(decode(split, items, len(items), args, augment.recipes))
    rng = generator(args.seed, "views", 0, args.device)
    views = [augment.restore(view) for view in augment(images, rng)]
    images = images[:, 0] if images.ndim == 5 else images
    cells = torch.stack([evaluation_view(images, augment.size, (0, 0, 0), (1, 1, 1)), *views], 1)
    zoom = max(1, 96 // augment.size)
    cells = F.pad(
        cells.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4), (4, 4, 4, 4), value=1
    )
    frame = torch.ones_like(cells[0, 0, :1])
    frame[:, 4:-4, 4:-4] = 0
    blue = torch.tensor([0.1, 0.3, 0.9], device=cells.device).view(3, 1, 1)
    cells[:, 0] = torch.where(frame > 0, blue, cells[:, 0])
    with atomic_write(path) as file:
        torchvision.utils.save_image(
            cells.flatten(0, 1), file, "png", nrow=cells.shape[1], padding=0
        )


def completed(model, args):
    """The method with what the flags that all methods share change in it."""
    if args.concat_views is None:
        args.concat_views = model.concat_views
    model.concat_views = args.concat_views
    if args.increase_mi:
        model = MutualInformation(model, args.increase_mi, args.mi_weight, args.image_size)
    return model


def train(method, model, data, recipes, args):
    """Train `model`, a method, with one view per recipe, and write the run to args.out."""
    with StopSignals() as stop:
        train_until(stop, method, model, data, recipes, args)


def train_until(stop, method, model, data, recipes, args):
    """train, which after a step in which stop.number is set saves and exits."""
    model = synchronized(completed(model, args), args)
    model = model.to(args.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    augment = Augment(recipes, args.image_size, data.mean, data.std, args.device)
    folder, recent = RunFolder(args, method, data), []
    done, step, sums = folder.open(model, optimizer, scaler)
    print(json.dumps(describe(args)))
    steps, state = len(data.pretrain) // args.batch_size, (model, optimizer, scaler)
    total, with_knn = steps * args.epochs, args.knn_every > 0 and data.test is not None
    if not step:
        on_first(lambda: save_views(data, augment, args, folder.path / "views.png"))
        folder.untrained = knn_monitor(model.backbone, data, args) if with_knn else None
    elif done == args.epochs:  # stopped while it saved: the encoder may be older than the rest
        folder.save_encoder(model, done, step)
    check(0 <= step - done * steps <= steps, f"{args.out}: was made with another number of images")
    forward, apart = distributed(compiled(model, args)), {}
    compiling = args.compile != "off"
    if not recipes[0].policy:  # which goes by groups of images, of any size
        augment.apply = compiled(augment.apply, args)
    patience = 1 if torch.device(args.device).type == "cpu" else 64  # steps between two looks
    begun = step

    for epoch in range(done + 1, args.epochs + 1):
        skip = step - (epoch - 1) * steps  # where an epoch was stopped
        bar = Progress(f"epoch {epoch}/{args.epochs}", steps, args.batch_size, skip)
        batches = training_batches(data.pretrain, epoch, args, recipes, skip)
        for i, (images, labels) in enumerate(batches, skip + 1):
            lr = learning_rate(step, total, args.warmup_epochs * steps, args.scaled_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derived_seed(args.seed, "model", step))  # for what the model draws
            begin_step(args)
            views = augment(images, generator(args.seed, "augment", step, args.device))
            with autocast(args):
                loss, terms = forward(views, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if hasattr(model, "after_step"):
                model.after_step(step / total)
            terms = {k: v.detach().float().clone() for k, v in {"loss": loss, **terms}.items()}
            sums = {k: sums.get(k, 0) + v for k, v in terms.items()}  # read later
            recent.append((step, lr, terms))
            if compiling and step == begun + 3:  # three: CUDA graphs record the second
                sums["loss"].item()
                compiling, apart = False, {"compile_seconds": round(bar.leave_out(i), 1)}
            stopping = agreed(stop.number)
            if len(recent) >= patience or i == steps or stopping:
                folder.check_finite(recent, model, optimizer)
            if stopping:
                parts = {key: gather([value[None]])[0] for key, value in sums.items()}
                folder.save(*state, epoch - 1, step, parts)
                folder.stop(stopping)
            bar.update(i, sums["loss"])

        entry = {"epoch": epoch, "step": step}
        entry |= {key: float(value) / steps for key, value in mean_terms(sums).items()}
        lr = learning_rate(step - 1, total, args.warmup_epochs * steps, args.scaled_lr)
        entry |= {"lr": lr, "images_per_second": round(bar.rate(steps), 1)} | apart
        sums, apart = {}, {}
        features = encode(model.backbone, data.train.spread(1024), args, data)
        check(features.isfinite().all(), f"the features are not finite: {entry}; try a lower --lr")
        entry |= collapse_figures(features)
        if with_knn and (epoch == args.epochs or epoch % args.knn_every == 0):
            entry["knn_top1"] = knn_monitor(model.backbone, data, args)
        folder.log.append(entry)
        stopping = agreed(stop.number)
        if folder.wants_saving(epoch) or stopping:
            folder.save(*state, epoch, step)
        folder.write_log()
        shown = "  ".join(f"{key} {value:.4g}" for key, value in list(entry.items())[2:])
        bar.show(f"{bar.label}  {shown}")
        if stopping and epoch < args.epochs:  # a whole run ends as one
            folder.stop(stopping)

    say_what_next(folder, data, args)


def say_what_next(folder, data, args):
    """The result of a finished run, and the command that evaluates its encoder."""
    last, chance = folder.log[-1].get("knn_top1"), 1 / len(data.classes)
    if last is not None:
        text = "" if folder.untrained is None else f"untrained encoder {folder.untrained:.1%}, "
        print(f"kNN top-1 {last:.1%} ({text}chance {chance:.1%})")
    if data.test is None:
        print("no test split, no kNN figure; linear_eval.py takes --validation-fraction 0.1")
    words = ["--checkpoint", str(folder.path / "encoder.pt"), "--dataset", args.dataset]
    words += ["--data-dir", args.data_dir] if args.data_dir != "data" else []
    words += ["--cached"] if args.device == "cpu" and args.dataset != "shapes" else []
    words += ["--validation-fraction", "0.1"] if data.test is None else []
    print(shlex.join(["python", "linear_eval.py", *words]))
