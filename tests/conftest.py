"""What all tests share: the repository on the path, two threads, no GPU tests without a GPU, slow
tests by -m alone, and one small finished run for all that only read what a run leaves.

    python -m pytest                         all but the tests that are marked slow
    python -m pytest -m slow                 these alone
    python -m pytest -m "slow or not slow"   all
"""

import contextlib
import io
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(2)
# A shell's & lets SIGINT be ignored, and some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


def toy_split(n, size, seed):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)
    return {"images": images, "labels": torch.arange(n) % 4}


@pytest.fixture(scope="session")
def toy():
    """toy(n=64, size=16): a packed dataset of noise, four classes, n training and 32 test images;
    always the same."""

    def make(n=64, size=16):
        splits = {"train": toy_split(n, size, seed=0), "test": toy_split(32, size, seed=1)}
        return {**splits, "classes": ["a", "b", "c", "d"]}

    return make


@pytest.fixture(scope="session")
def toy_file(toy, tmp_path_factory):
    """The path of toy() as a packed file: not to be written to."""
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    torch.save(toy(), path)
    return path


@pytest.fixture(scope="session")
def tiny_run(toy_file, tmp_path_factory):
    """A finished run of simclr.py on toy_file, two epochs of four steps, of which each was saved.
    For tests that only read: what writes to it has to copy the folder first.

    .out is its folder, .argv what was typed after simclr.py but for --out, .stdout what it printed.
    """
    import simclr

    out = tmp_path_factory.mktemp("tiny_run") / "run"
    argv = f"--dataset {toy_file} --epochs 2 --batch-size 16 --stem imagenet --optimizer sgd"
    argv += " --lr 0.1 --knn-every 1 --save-every 1 --device cpu --workers 0 --precision fp32"
    words, stdout = ["simclr.py", *argv.split(), "--out", str(out)], io.StringIO()
    with contextlib.redirect_stdout(stdout), mock.patch.object(sys, "argv", words):
        simclr.main()
    yield SimpleNamespace(out=out, argv=argv.split(), stdout=stdout.getvalue())
    shutil.rmtree(out)  # pytest keeps the folders of three sessions, and checkpoints are large
