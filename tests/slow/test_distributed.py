"""Several processes train the network that one would: torchrun with two on the CPU, by gloo. They
are compared with one in float64: in float32 a ReLU that rounding opens or shuts lets two runs drift
apart within a few steps, as one process with one thread and one with two do."""

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
from benchmark import built
from conftest import ROOT, SmallEncoder, finish, load, noise, start, store, succeed, wait_for
from test_data import save_pets
from test_training import METHODS, NARROW, TINY, equal, read_log
from torch import nn
from torch.utils._pytree import tree_flatten

import common

pytestmark = pytest.mark.slow
CASES = {name: script for script, name in METHODS.items()}
CASES |= {"simclr_rc": "simclr --increase-mi rc", "byol_lbe": "byol --increase-mi lbe"}
CASES |= {"simclr_ip": "simclr --increase-mi ip --mi-weight 1"}
CASES |= {"vicreg_mib": "vicreg --increase-mi mib --mi-weight 1", "views": "simclr --views 3"}
CASES |= {"apart": "simclr --no-concat-views", "together": "byol --concat-views"}
CASES |= {"resnet": "simclr"}  # the others have a small encoder


def train_in_float64(case, where, out):
    """One epoch of three steps."""
    encoder, set_up = common.resnet if case == "resnet" else SmallEncoder, common.set_up

    def in_float64(*given):
        model = set_up(*given).double()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_pre_hook(lambda _, given: given[0].double())
        return model

    with (
        mock.patch.object(common, "resnet", encoder),
        mock.patch.object(common, "set_up", in_float64),
    ):
        argv = ["--dataset", Path(where, "toy.pt"), *TINY, *NARROW, "--optimizer", "sgd"]
        common.train(*built(CASES[case], *argv, "--out", out))


def torchrun(*argv):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A folder with the runs of all cases by two processes."""
    where = tmp_path_factory.mktemp("float64")
    store(noise(48, 32), where / "toy.pt")
    status, _, err = finish(torchrun(__file__, where))
    assert status == 0, err
    yield where
    shutil.rmtree(where)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, computed):
    """Losses, weights, momentum, batch norm's statistics, targets, running covariances."""
    train_in_float64(case, computed, computed / "one")
    one, two = (load(computed / name / "checkpoint.pt") for name in ("one", case))
    shutil.rmtree(computed / "one")
    del one["log"][0]["images_per_second"], two["log"][0]["images_per_second"]
    assert one["log"][0] == pytest.approx(two["log"][0], rel=1e-5, abs=1e-6)  # of float32
    one, two = ([saved["model"], saved["optimizer"]["state"]] for saved in (one, two))
    for part, other in zip(one, two, strict=True):
        ours, theirs = tree_flatten(part)[0], tree_flatten(other)[0]
        # Where the exact gradient is 0, as of a bias before batch norm, rounding is all there is.
        largest = max(float(x.abs().max()) for x in ours)
        for x, y in zip(ours, theirs, strict=True):
            assert (x - y).abs().max() <= 1e-12 * largest


def test_stopped_and_resumed(folder):
    """Two processes, one folder, one voice; SIGTERM to torchrun ends both after the same step, and
    --resume ends bit for bit where a run that was not stopped does."""
    store(noise(160), "toy.pt")
    argv = [ROOT / "byol.py", "--dataset", "toy.pt", *TINY, *NARROW, "--epochs", "3"]
    argv += ["--knn-every", "1"]
    status, out, err = finish(torchrun(*argv, "--out", "whole"))
    assert (status, err) == (0, ""), err
    assert out.count("epoch 3/3") == 1 and out.count("--checkpoint") == 1
    assert json.loads(Path("whole/config.json").read_text())["processes"] == 2

    process = torchrun(*argv, "--out", "run")
    wait_for("run/checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    _, out, err = finish(process)
    assert "stopped; to go on: torchrun --nproc-per-node=2 " in out
    assert err.count("stopping after the step") == 1
    assert load("run/checkpoint.pt")["step"] < 30
    status, out, err = finish(torchrun(*argv, "--out", "run", "--resume"))
    assert status == 0 and out.count("resumed from step") == 1, err
    ours, theirs = load("run/checkpoint.pt"), load("whole/checkpoint.pt")
    assert equal([ours[key] for key in SAME], [theirs[key] for key in SAME])
    for a, b in zip(ours["log"], theirs["log"], strict=True):
        a["images_per_second"] = b["images_per_second"]
        assert a == pytest.approx(b, rel=1e-6)  # the sums so far were saved as their mean

    status, _, err = finish(torchrun(*argv, "--out", "whole"))
    assert status and "whole holds a run or other files: add --resume" in err
    # Its checkpoint is one that a single process goes on from, and its encoder is worth the same.
    assert "resumed from step 30" in succeed("byol", *argv[1:], "--out", "whole", "--resume")
    single = json.loads(succeed("linear_eval", *EVALUATE).splitlines()[-1])
    status, out, err = finish(torchrun(ROOT / "linear_eval.py", *EVALUATE))
    assert status == 0, err
    double = json.loads(out.strip().splitlines()[-1])
    for key in "knn_top1", "top1", "top5":
        assert double[key] == pytest.approx(single[key], abs=0.04), key  # an image of 32


SAME = "model", "optimizer", "scaler", "epoch", "step", "baselines"
# Fine-tuned, so that all of it is used: parts of the images, the labels' share, both gradients.
EVALUATE = ["--checkpoint", "whole/encoder.pt", "--dataset", "toy.pt", "--device", "cpu"]
EVALUATE += ["--precision", "fp32", "--epochs", "2", "--batch-size", "32"]
EVALUATE += ["--protocol", "finetune", "--encoder-lr", "1e-6", "--lr", "0.01"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["simclr", "byol", "corinfomax"])
def test_two_gpus(method, precision, folder):
    """NCCL and torch's SyncBatchNorm, which nothing else here runs."""
    store(noise(64, 32), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, "--knn-every", "1", "--lr", "1e-6", "--device", "cuda"]
    argv += ["--precision", precision]
    status, _, err = finish(torchrun(ROOT / f"{method}.py", *argv, "--out", "two"))
    assert status == 0, err
    succeed(method, *argv, "--out", "one")
    one, two = read_log("one")[0], read_log("two")[0]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3 if precision == "fp32" else 0.05)


def test_images_from_disk(folder):
    """Each process decodes its part, of seven test images four and three."""
    save_pets("pets", [(32, 32), (40, 40)] * 2)
    Path("pets/test/cat/0.png").unlink()
    argv = ["--dataset", "pets", *TINY, "--batch-size", "4", "--image-size", "32"]
    argv += ["--knn-every", "1", "--lr", "1e-6"]
    status, _, err = finish(torchrun(ROOT / "simclr.py", *argv, "--out", "two"))
    assert status == 0, err
    succeed("simclr", *argv, "--out", "one")
    one, two = read_log("one")[0], read_log("two")[0]
    figures = [key for key in one if key.endswith(("_std", "_rank"))]
    for key in "loss", "knn_top1", *figures:
        assert one[key] == pytest.approx(two[key], rel=1e-3), key


def test_a_process_that_dies_ends_the_others(folder):
    """With a line that says why, not with a wait for the timeout."""
    store(noise(320), "toy.pt")
    argv = ["--dataset", "toy.pt", *TINY, *NARROW, "--epochs", "1000", "--out", "run"]
    process = torchrun(ROOT / "simclr.py", *argv)
    wait_for("run/encoder.pt")
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = sorted(map(int, listed.stdout.split()))
    os.kill(workers[0], signal.SIGKILL)  # the first, which else would speak
    begun = time.monotonic()
    status, _, err = finish(process)
    assert status and time.monotonic() - begun < 60
    assert "another process ended" in err and "common.py" not in err, err  # torchrun's traceback
    common.load_whole("run/checkpoint.pt")


def test_bad_input_is_said_once(folder):
    argv = ["--dataset", "toy.pt", *TINY, "--batch-size", "15"]
    status, _, err = finish(torchrun(ROOT / "simclr.py", *argv))
    lines = [line for line in err.splitlines() if line.startswith("simclr.py: error: ")]
    assert status and len(lines) == 1 and "15 is not a multiple of the 2 processes" in lines[0]
    assert {path.name for path in folder.iterdir()} == {"toy.pt"}


def main():
    """A process of the fixture `computed`."""
    for case in CASES:
        train_in_float64(case, sys.argv[1], Path(sys.argv[1], case))


if __name__ == "__main__":
    common.run(main)
