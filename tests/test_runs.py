"""What becomes of a run: gone on with, moved, locked, stopped, on a machine that fails or lacks
something. What a run computes is for test_training.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import simclr

ROOT = Path(__file__).resolve().parent.parent
CPU = "--device cpu --workers 0 --precision fp32"
SMALL = f"--epochs 2 --batch-size 16 --stem imagenet --optimizer sgd --lr 0.1 {CPU}"


def train(monkeypatch, words):
    """simclr.py with these words, in this process."""
    monkeypatch.setattr(sys, "argv", ["simclr.py", *words.split()])
    common.run(simclr.main)


def script(words, **more):
    """simclr.py in a process of its own: (exit status, stdout, stderr)."""
    command = [sys.executable, "simclr.py", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **more)
    return done.returncode, done.stdout, done.stderr


def stopped_run(monkeypatch, data, out, after=5):
    """A run of simclr.py on `data` that SIGTERM stopped after so many of its eight steps."""
    whole = common.Run.after_step

    def after_step(run, step, loss, terms):
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(run, step, loss, terms)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common.Run, "after_step", after_step)
        train(patch, f"--dataset {data} --out {out} {SMALL}")
    assert stop.value.code == 128 + signal.SIGTERM
    return out


def test_the_folder_is_enough_to_go_on(tiny_run, toy_file, tmp_path, monkeypatch, capsys):
    data = shutil.copy(toy_file, tmp_path / "data.pt")
    out = stopped_run(monkeypatch, data, tmp_path / "run")
    moved = shutil.move(data, tmp_path / "moved.pt")
    (tmp_path / "run").rename(tmp_path / "renamed")
    train(monkeypatch, f"--resume --out {tmp_path}/renamed --dataset {moved} --device cpu")
    assert "resumed from step 5 (epoch 1)" in capsys.readouterr().out
    ours, theirs = (
        common.load_file(p / "encoder.pt") for p in (tmp_path / "renamed", tiny_run.out)
    )
    assert all(torch.equal(v, theirs["state_dict"][k]) for k, v in ours["state_dict"].items())
    assert not out.exists()
    train(monkeypatch, f"--resume --out {tmp_path}/renamed --dataset {moved} --device cpu")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seed 1", "--seed 0, not 1: --resume needs the same"),
        ("--epochs 3", "--epochs 2, not 3, at whose end the learning rate is 0: .*--init"),
        ("--dataset {few}", "was made with other data: images 64, not 48"),
        ("--dataset {other}", "was made with other data: content .*, not "),
        ("--dataset {named}", r"was made with other data: classes \['a', .*, not \['x'"),
        ("--batch-size 17", "--batch-size 16, not 17"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(toy, tiny_run, tmp_path, capsys, words, message):
    other = toy()
    other["train"] = {**other["train"], "images": 255 - other["train"]["images"]}
    named = {**toy(), "classes": ["x", "b", "c", "d"]}
    for name, packed in {"few": toy(48), "other": other, "named": named}.items():
        torch.save(packed, tmp_path / f"{name}.pt")
    words = words.format(**{name: tmp_path / f"{name}.pt" for name in ("few", "other", "named")})
    before = {path.name: path.stat().st_mtime_ns for path in tiny_run.out.iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        train(patch, f"--resume --out {tiny_run.out} {CPU} {words}")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert common.re.search(message, error)
    assert {path.name: path.stat().st_mtime_ns for path in tiny_run.out.iterdir()} == before


def test_where_nothing_was_saved(toy_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train(monkeypatch, f"--resume --out {tmp_path}/none")
    assert "nothing to go on with; a run to begin needs --dataset" in capsys.readouterr().err
    words = f"--resume --out {tmp_path}/none --dataset {toy_file} {SMALL}"
    train(monkeypatch, words)
    assert "has no checkpoint yet: from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_a_run_starts_from_an_encoder(method, toy_file, tiny_run, tmp_path, monkeypatch):
    seen = {}
    module = __import__(method)
    monkeypatch.setattr(common.Run, "begin", lambda run, augment: seen.update(model=run.model) or 8)
    monkeypatch.setattr(common.Run, "after_epoch", lambda run, epoch: None)
    monkeypatch.setattr(common.Run, "finish", lambda run: None)
    words = f"--dataset {toy_file} --out {tmp_path} {SMALL} --init {tiny_run.out}/encoder.pt"
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *words.split()])
    module.main()
    wanted = common.load_file(tiny_run.out / "encoder.pt")["state_dict"]
    model = seen["model"]
    for network in [model.backbone, model.target[0] if method == "byol" else model.backbone]:
        assert all(torch.equal(v, wanted[k]) for k, v in network.state_dict().items())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stem", "small"])
    with pytest.raises(common.InputError, match="encoder.pt: not an encoder.pt of a resnet18 with"):
        module.main()


def test_one_folder_is_for_one_run(toy_file, tmp_path):
    words = f"--dataset {toy_file} --out {tmp_path} {SMALL}".replace("--epochs 2", "--epochs 900")
    command = [sys.executable, "simclr.py", *words.split()]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "checkpoint.pt").exists():
            time.sleep(0.1)
            assert first.poll() is None
        status, _, error = script(words + " --resume")
        assert (status, error.count("\n")) == (2, 1)
        assert f"{tmp_path}: another process trains in it" in error
    finally:
        first.kill()
        first.wait()
    assert script(f"--out {tmp_path} --resume --seed 5 {CPU}")[2].count("--seed 0, not 5") == 1


def test_srun_without_torchrun_is_refused(toy_file, tmp_path):
    environment = os.environ | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
    words = f"--dataset {toy_file} --out {tmp_path}/run {SMALL}"
    status, _, error = script(words, env=environment)
    assert status == 2 and "torchrun --nproc-per-node=N" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_end_a_run_after_its_step(name):
    stop, number = common.StopSignals(), getattr(signal, name)
    os.kill(os.getpid(), number)
    stop.restore()
    assert stop.number == number


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


def test_a_closed_pipe_ends_quietly(toy_file, tmp_path):
    words = f"{sys.executable} -u simclr.py --dataset {toy_file} --out {tmp_path}/run {SMALL}"
    piped = f"set -o pipefail; {words} | head -n 1"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_nothing_is_called_that_windows_lacks(toy_file, tmp_path, monkeypatch, capsys):
    for name in "SIGHUP", "SIGUSR1":
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "setpgid")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    train(monkeypatch, f"--dataset {toy_file} --out {tmp_path}/run {SMALL}")
    common.leave_signals_to_the_parent(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert "kNN top-1" in capsys.readouterr().out


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


def test_help_is_in_groups_and_fits_two_screens():
    done = subprocess.run(
        [sys.executable, "simclr.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    groups = [line for line in done.stdout.splitlines() if line and line[0] != " "][2:]
    assert groups[0] == "most used:" and groups[-1] == "method:"
    assert len(done.stdout.splitlines()) <= 2 * 50


def test_settings_are_plain_json(tiny_run):
    config = json.loads((tiny_run.out / "config.json").read_text())["config"]
    assert {"epochs", "seed", "scaled_lr", "stem"} <= config.keys()
