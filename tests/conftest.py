"""What all tests share: the repository on the path, one thread, no GPU tests without a GPU, slow
tests by -m alone, and one small finished run for all that only read what a run leaves.

    python -m pytest                         all but the tests that are marked slow
    python -m pytest -m slow                 these alone
    python -m pytest -m "slow or not slow"   all
"""

import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # networks as small as these only wait for a second one
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


def noise(n=64, size=16, test=32):
    """A packed dataset of noise, four classes; always the same."""

    def split(n, seed):
        rng = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)
        return {"images": images, "labels": torch.arange(n) % 4}

    return {"train": split(n, 0), "test": split(test, 1), "classes": ["a", "b", "c", "d"]}


@pytest.fixture(scope="session")
def toy():
    return noise


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """Packed, not to be written to."""
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    torch.save(noise(), path)
    return path


@pytest.fixture(scope="session")
def tiny_run(toy_file, tmp_path_factory):
    """.out: a run of simclr.py on toy_file, two epochs, both saved; not to be written to."""
    import simclr

    out = tmp_path_factory.mktemp("tiny_run") / "run"
    argv = f"simclr.py --dataset {toy_file} --out {out} --epochs 2 --batch-size 16 --lr 0.1"
    argv += " --stem imagenet --optimizer sgd --knn-every 1 --save-every 1"
    argv += " --device cpu --workers 0 --precision fp32"
    with mock.patch.object(sys, "argv", argv.split()):
        simclr.main()
    yield SimpleNamespace(out=out)
    shutil.rmtree(out)  # pytest keeps the folders of three sessions, and checkpoints are large
