"""What all tests share: the repository on the path, one thread, no GPU tests without a GPU, slow
tests by -m alone; scripts, run here or as a process of their own; images of noise, a folder to work
in, and one small finished run for all that only read what a run leaves.

    python -m pytest                         all but the tests that are marked slow
    python -m pytest -m slow                 these alone
    python -m pytest -m "slow or not slow"   all
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

torch.set_num_threads(1)  # networks as small as these only wait for a second one
# A shell's & lets SIGINT be ignored, and some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
CPU = "--device cpu --workers 0 --precision fp32".split()
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # behind nohup it would stay ignored


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    config.addinivalue_line("markers", 'slow: takes long; only by -m slow or -m "slow or not slow"')


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def call(script, *argv):
    """Run a script, perhaps with flags, or a main, here: (exit status, stdout, stderr)."""
    out, err, name, given, main = io.StringIO(), io.StringIO(), "new_method", [], script
    if isinstance(script, str):
        name, *given = script.split()
        main = importlib.import_module(name).main
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [f"{name}.py", *map(str, argv), *given]),
    ):
        try:
            status = common.run(main) or 0
        except SystemExit as stop:
            status = stop.code
        finally:  # a script that a signal has stopped leaves its own, for the process ends
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def succeed(script, *argv):
    """Run a script that should not fail, and return what it printed."""
    status, out, err = call(script, *argv)
    assert (status, err) == (0, ""), err
    return out


def fail(script, *argv):
    """Run a script that should refuse what it gets, and return the line that says why."""
    status, _, err = call(script, *argv)
    assert status == 2 and err.endswith("\n") and err.count("\n") == 1, (status, err)
    assert ".py: error: " in err and "Traceback" not in err
    return err


def start(*words, cwd=None, path=(ROOT, ROOT / "tests")):
    """A Python process of its own, which finds the modules in `path`."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    how = {"cwd": cwd, "env": os.environ | environment, "text": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, words)], **how)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(path):
    deadline = time.monotonic() + 240
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def given_to_parse_args(path):
    """What a script hands to parse_args: its parser; of most, presets and what chooses of them."""

    def capture(*given, **kwargs):
        raise SystemExit(given)  # carries it out of main

    with (
        mock.patch.object(sys, "argv", [path.name]),
        mock.patch.object(common, "parse_args", capture),
        mock.patch.object(argparse.ArgumentParser, "parse_args", capture),
        pytest.raises(SystemExit) as caught,
    ):
        importlib.import_module(path.stem).main()
    return caught.value.code


class SmallEncoder(nn.Sequential):
    """Stands in for a ResNet where a test is about the run: a hundred times as fast."""

    num_features = 16

    def __init__(self, arch="resnet18", stem="small"):
        layers = {"conv1": nn.Conv2d(3, 8, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(8)}
        layers |= {"relu": nn.ReLU(), "layer2": nn.Conv2d(8, 16, 3, 2, 1)}
        layers |= {"layer3": nn.BatchNorm2d(16), "pool": nn.AdaptiveAvgPool2d(1)}
        super().__init__(OrderedDict(layers | {"flatten": nn.Flatten()}))


def noise(n=64, size=16, test=32):
    """A packed dataset of noise, four classes; always the same."""

    def split(n, seed):
        rng = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)
        return {"images": images, "labels": torch.arange(n) % 4}

    return {"train": split(n, 0), "test": split(test, 1), "classes": ["a", "b", "c", "d"]}


def store(value, path):
    torch.save(value, path)
    return path


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with toy.pt, removed afterwards: checkpoints are large."""
    monkeypatch.chdir(tmp_path)
    store(noise(68), "toy.pt")  # a short fifth batch of 16 is left out
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def small(folder, monkeypatch):
    """The same, and scripts that get SmallEncoder where they ask for a ResNet."""
    monkeypatch.setattr(common, "resnet", SmallEncoder)
    return folder


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """Packed, not to be written to."""
    return store(noise(), tmp_path_factory.mktemp("toy") / "toy.pt")


@pytest.fixture(scope="session")
def tiny_run(toy_file, tmp_path_factory):
    """The folder of a run of simclr.py on toy_file, two epochs, both saved; only to be read."""
    out = tmp_path_factory.mktemp("tiny_run") / "run"
    words = "--epochs 2 --batch-size 16 --lr 0.1 --stem imagenet --optimizer sgd --knn-every 1"
    argv = ["--dataset", toy_file, "--out", out, *CPU, *words.split(), "--save-every", "1"]
    succeed("simclr", *argv)
    yield out
    shutil.rmtree(out)  # pytest keeps the folders of three sessions, and checkpoints are large
