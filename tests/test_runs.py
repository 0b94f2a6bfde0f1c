"""What becomes of a run: begun from an encoder, locked, with a damaged image, on a machine that
fails or lacks something. What a run computes, and that it goes on: test_training.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark import built
from conftest import CPU, ROOT, fail, finish, load, start, succeed
from test_data import save_pets
from test_training import NARROW, THREE_EPOCHS, TINY, at_call, equal

import common


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_a_run_starts_from_an_encoder(method, folder, tiny_run):
    """So does BYOL's target; an encoder of another stem is refused."""
    file = tiny_run / "encoder.pt"
    argv = ["--dataset", "toy.pt", *CPU, "--batch-size", "16", "--init", file]
    _, model, _, _, args = built(method, *argv, "--stem", "imagenet")
    common.load_initial(common.set_up(model, args), args)
    for network in [model.backbone, model.target[0] if method == "byol" else model.backbone]:
        assert equal(dict(network.state_dict()), load(file)["state_dict"])
    assert "encoder.pt: not an encoder.pt of a resnet18 with" in fail(method, *argv)


LOCK = "import fcntl, time; file = open('run/.lock', 'a'); "
LOCK += "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print(flush=True); time.sleep(60)"


def test_one_folder_is_for_one_run(small):
    argv, status = [*THREE_EPOCHS, "--out", "run"], []
    with at_call("projections", 2, lambda: status.append(finish(start("-c", LOCK))[0])):
        succeed("simclr", *argv)
    assert status == [1]
    process = start("-c", LOCK)
    process.stdout.readline()
    assert "run: another process trains in it" in fail("simclr", *argv, "--resume")
    process.kill()
    finish(process)
    succeed("simclr", *argv, "--resume")


def test_a_corrupt_image_ends_a_run_from_the_shell(folder):
    """From another folder, without --out. A worker finds it, whose traceback is left out."""
    save_pets("pets", [(16, 16), (20, 20)] * 2, ["train"])
    os.truncate("pets/train/dog/3.png", 100)
    argv = ["--dataset", "pets", *TINY, *NARROW, "--image-size", "32", "--batch-size", "4"]
    status, _, err = finish(start(ROOT / "simclr.py", *argv, "--workers", "1", path=[]))
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("simclr.py: error: pets") and "3.png" in err
    assert not list(Path("runs/simclr_pets_resnet18").glob("*.pt"))


def test_srun_without_torchrun_is_refused(small, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert "torchrun --nproc-per-node=N" in fail("simclr", *THREE_EPOCHS, "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "fewer --workers"),
        (RuntimeError("worker is killed by signal: Bus error. shared memory"), "--workers 0"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left (28)"), "--workers 0"),
        (RuntimeError("unable to allocate shared memory(shm) for file"), "--workers 0"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(28, "No space left on device", "checkpoint.pt"), "checkpoint.pt: No space left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "smaller --batch-size"),
        (RuntimeError("can't allocate memory: you tried to"), "smaller --batch-size"),
        (MemoryError(), "smaller --batch-size"),
    ],
)
def test_failures_of_the_machine_in_one_line(error, line):
    message = common.known_failure(error)
    assert line in message and "\n" not in message
    assert ("--batch-size" in message) == ("--batch-size" in line)


def test_a_fault_of_our_own_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        common.known_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_closed_pipe_ends_quietly(folder):
    words = " ".join([sys.executable, "-u", f"{ROOT}/simclr.py", *THREE_EPOCHS])
    piped = f"set -o pipefail; {words} | head -n 1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_nothing_is_called_that_windows_lacks(small, monkeypatch):
    for name in "SIGHUP", "SIGUSR1":
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "setpgid")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert "kNN top-1" in succeed("simclr", *THREE_EPOCHS)
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # the tests keep theirs
    common.leave_signals_to_the_parent(0)


class Apple(torch.Tensor):
    """A tensor on a device without float64: only its copy on the CPU can have that."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        assert getattr(result, "dtype", None) is not torch.float64, f"float64 from {function}"
        return result


def test_no_float64_on_apple_gpus():
    h, labels = torch.randn(40, 8).as_subclass(Apple), torch.arange(40) % 4
    assert common.collapse_figures(h).keys() == {"std", "rank"}
    scores = common.knn_scores(h, labels.as_subclass(Apple), h, 4)
    assert common.top_accuracies(scores, labels)[1] == 1


def test_older_pythons_are_told():
    code = "import sys, torchvision; sys.version_info = (3, 9); import common"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.startswith("Python 3.10 or newer is needed") and done.returncode == 1
