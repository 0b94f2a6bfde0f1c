"""Several processes train the network that one would: torchrun with two on the CPU, by gloo.

Where they are compared with one, in float64. In float32 they would differ by rounding alone, but a
ReLU that opens or shuts turns a rounding error e into one of about sqrt(e) in the gradient, and two
runs drift apart within a few steps, as one process with one thread and one with two do."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_scripts import (
    METHODS,
    ROOT,
    TINY,
    image_folder,
    load,
    read_log,
    same_tensors,
    store,
    succeed,
    toy,
    without_speed,
)

import common

CASES = {name: script for script, name in METHODS.items()}
CASES |= {"simclr_rc": "simclr --increase-mi rc", "byol_lbe": "byol --increase-mi lbe"}
CASES |= {"simclr_ip": "simclr --increase-mi ip --mi-weight 1"}
CASES |= {"vicreg_mib": "vicreg --increase-mi mib --mi-weight 1", "views": "simclr --views 3"}
CASES |= {"apart": "simclr --no-concat-views", "together": "byol --concat-views"}


def three_steps(case, folder):
    """What `case` computes in three steps of the training loop, in float64: the terms of each, the
    first gradient, and the state after the last."""
    built, (script, *given) = [], CASES[case].split()
    words = [script, *given, "--dataset", str(Path(folder, "toy.pt")), *TINY]
    with (
        mock.patch.object(common, "train", lambda *values: built.extend(values)),
        mock.patch.object(sys, "argv", words),
    ):
        importlib.import_module(script).main()
    _, model, data, recipes, args = built
    model = common.synchronized(common.completed(model, args), args).double().train()
    forward, terms = common.distributed(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, 0.9)
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    for step, batch in enumerate(common.training_batches(data.pretrain, 1, args, recipes)):
        images, labels = batch
        torch.manual_seed(step)  # for what the model draws
        views = augment(images, common.generator(0, "augment", step))
        loss, named = forward([view.double() for view in views], labels)
        loss.backward()
        if not step:
            found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()
                     if p.grad is not None}  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "after_step"):
            model.after_step((step + 1) / 10)
        terms.append(common.mean_terms({"loss": loss.detach(), **named}))
    found |= {f"{name} {step}": v for step, t in enumerate(terms) for name, v in t.items()}
    return found | model.state_dict()


def torchrun(*argv, **how):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([*words, *map(str, argv)], env=environment, **how)


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """three_steps of every case, by two processes."""
    folder = tmp_path_factory.mktemp("three_steps")
    store(toy(48, 32), folder / "toy.pt")
    status, _, err = finish(torchrun(__file__, folder))
    assert status == 0, err
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, computed):
    """Losses, gradients, weights, batch norm's statistics, targets, running covariances."""
    ours, theirs = three_steps(case, computed), load(computed / f"{case}.pt")
    assert ours.keys() == theirs.keys()
    assert {key.split()[1] for key in ours if key.startswith("loss ")} == {"0", "1", "2"}
    for key, value in ours.items():
        scale = value.double().abs().max().item()
        # Where the exact gradient is 0, as of a bias before batch norm, rounding is all there is.
        other = theirs[key].double()
        assert torch.allclose(other, value.double(), rtol=1e-6, atol=1e-6 * scale + 1e-9), key


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


LONGER = ["--epochs", "3", "--knn-every", "1"]


def test_stopped_and_resumed(work):
    """Two processes, one folder, one voice; SIGTERM to torchrun ends both after the same step, and
    --resume ends bit for bit where a run that was not stopped does."""
    store(toy(160), "toy.pt")
    argv = [ROOT / "byol.py", "--dataset", "toy.pt", *TINY, *LONGER]
    status, out, err = finish(torchrun(*argv, "--out", "whole"))
    assert (status, err) == (0, ""), err
    assert out.count("epoch 3/3") == 1 and out.count("linear_eval.py") == 1
    files = {"checkpoint.pt", "checkpoint.previous.pt", "encoder.pt"}
    files |= {"log.jsonl", "views.png", "config.json"}
    assert {path.name for path in Path("whole").iterdir()} == files
    assert json.loads(Path("whole/config.json").read_text())["processes"] == 2

    process = torchrun(*argv, "--out", "run")
    deadline = time.monotonic() + 240
    while not Path("run/checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, out, err = finish(process)
    assert "stopped; to go on: torchrun --nproc-per-node=2 " in out
    assert err.count("stopping after the step") == 1
    assert load("run/checkpoint.pt")["step"] < 30
    status, out, err = finish(torchrun(*argv, "--out", "run", "--resume"))
    assert status == 0 and out.count("resumed from step") == 1, err
    ours, theirs = load("run/checkpoint.pt"), load("whole/checkpoint.pt")
    assert same_tensors(ours["model"], theirs["model"])
    assert without_speed(Path("run")) == without_speed(Path("whole"))

    line = finish(torchrun(*argv, "--out", "whole"))[1:]
    assert sum(text.count("whole holds a run: add --resume") for text in line) == 1
    out = succeed("byol", *argv[1:], "--out", "whole", "--resume")
    assert "made by 2 processes, now 1" in out

    # Its checkpoint is one that a single process reads, and its encoder is worth the same there.
    single = json.loads(succeed("linear_eval", *EVALUATE).splitlines()[-1])
    status, out, err = finish(torchrun(ROOT / "linear_eval.py", *EVALUATE))
    assert status == 0, err
    double = json.loads(out.strip().splitlines()[-1])
    for key in "knn_top1", "knn_top5", "top1", "top5", "images":
        assert double[key] == pytest.approx(single[key], abs=0.04), key  # an image of 32


# Fine-tuned, so that all of it is used: parts of the images, the labels' share, both gradients.
EVALUATE = ["--checkpoint", "whole/encoder.pt", "--dataset", "toy.pt", "--device", "cpu"]
EVALUATE += ["--precision", "fp32", "--epochs", "2", "--batch-size", "32"]
EVALUATE += ["--protocol", "finetune", "--encoder-lr", "1e-6", "--lr", "0.01"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["simclr", "byol", "corinfomax"])
def test_two_gpus(method, precision, work):
    """NCCL and torch's SyncBatchNorm, which nothing else here runs."""
    store(toy(64, 32), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, "--knn-every", "1", "--lr", "1e-6", "--device", "cuda"]
    argv += ["--precision", precision]
    status, _, err = finish(torchrun(ROOT / f"{method}.py", *argv, "--out", "two"))
    assert status == 0, err
    succeed(method, *argv, "--out", "one")
    one, two = (read_log(Path(name))[0] for name in ("one", "two"))
    for key in "loss", "feature_std":
        assert one[key] == pytest.approx(two[key], rel=1e-3 if precision == "fp32" else 0.05), key


def test_images_from_disk(work):
    """Each process decodes its part, of seven test images four and three."""
    image_folder("pets", [32, 40])
    Path("pets/test/cat/0.png").unlink()
    argv = ["--dataset", "pets", *TINY, "--batch-size", "4", "--image-size", "32"]
    argv += ["--knn-every", "1", "--lr", "1e-6"]
    status, _, err = finish(torchrun(ROOT / "simclr.py", *argv, "--out", "two"))
    assert status == 0, err
    succeed("simclr", *argv, "--out", "one")
    one, two = (read_log(Path(name))[0] for name in ("one", "two"))
    for key in "loss", "feature_std", "effective_rank", "knn_top1":
        assert one[key] == pytest.approx(two[key], rel=1e-3), key


def test_a_process_that_dies_ends_the_others(work):
    """With a line that says why, not with a wait for the timeout."""
    store(toy(320), "toy.pt")
    argv = [ROOT / "simclr.py", "--dataset", "toy.pt", *TINY, "--epochs", "1000", "--out", "run"]
    process = torchrun(*argv)
    deadline = time.monotonic() + 240
    while not Path("run/checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = sorted(map(int, listed.stdout.split()))
    os.kill(workers[0], signal.SIGKILL)  # the first, which else would speak
    begun = time.monotonic()
    status, _, err = finish(process)
    assert status and time.monotonic() - begun < 60
    assert "another process ended" in err and "common.py" not in err, err  # torchrun's traceback
    common.load_whole("run/checkpoint.pt")


def test_bad_input_is_said_once(work):
    store(toy(16), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, "--batch-size", "15"]
    status, _, err = finish(torchrun(ROOT / "simclr.py", *argv))
    lines = [line for line in err.splitlines() if line.startswith("simclr.py: error: ")]
    assert status and len(lines) == 1 and "15 is not a multiple of the 2 processes" in lines[0]
    assert {path.name for path in work.iterdir()} == {"toy.pt"}


def main():
    """A process of the fixture `computed`."""
    for case in CASES:
        found = three_steps(case, sys.argv[1])
        if common.rank() == 0:
            store(found, Path(sys.argv[1], f"{case}.pt"))


if __name__ == "__main__":
    common.run(main)
