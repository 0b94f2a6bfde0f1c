"""Whoever carries on adds a method as one new file. Here that is done, in a copy of the project: a
file that keeps to the contract in common.train's docstring trains, goes on bit for bit, runs on two
processes, is evaluated and passes the project's own tests, with no other file touched."""

import json
import shutil
import signal

import pytest
from conftest import ROOT, finish, noise, start, store, wait_for
from test_training import TINY, assert_same_run, read_log

pytestmark = pytest.mark.slow
SIMSIAM = '''# SPDX-License-Identifier: MIT
"""SimSiam, by X. Chen and K. He, 2020, arXiv:2011.10566

Run: python simsiam.py --dataset cifar10 --epochs 200
"""

import torch
import torch.nn.functional as F
from torch import nn

import common


def simsiam_loss(p1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    return -F.cosine_similarity(p1.float(), z2.detach().float()).mean()


class SimSiam(nn.Module):
    def __init__(self, backbone, hidden_dim=512, dim=512):
        super().__init__()
        self.backbone = backbone
        self.projector = common.mlp(backbone.num_features, hidden_dim, dim)
        self.predictor = common.mlp(dim, hidden_dim // 4, dim)

    def forward(self, views, y=None):
        z1, z2 = (self.projector(self.backbone(x)) for x in views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = (simsiam_loss(p1, z2) + simsiam_loss(p2, z1)) / 2
        return loss, {"cosine": -loss.detach(), "views": float(len(views))}


PRESETS = {"default": {"optimizer": "sgd", "lr": 0.03, "batch_size": 512, "weight_decay": 5e-4}}


def main():
    parser = common.base_parser(__doc__)
    args = common.parse_args(parser, PRESETS)
    data = common.prepare(args, "simsiam")
    model = SimSiam(common.resnet(args.arch, args.stem))
    recipes = common.symmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("simsiam", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one more file, and toy.pt."""
    copy = tmp_path_factory.mktemp("project") / "copy"
    aside = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "shared")
    shutil.copytree(ROOT, copy, ignore=aside)
    (copy / "simsiam.py").write_text(SIMSIAM)
    store(noise(160), copy / "toy.pt")
    yield copy
    shutil.rmtree(copy)


def run(project, *words):
    """To its end, in the project; what it prints."""
    status, out, err = finish(start(*words, cwd=project, path=[]))
    assert status == 0, out + err
    return out


TRAIN = ["simsiam.py", "--dataset", "toy.pt", *TINY, "--epochs", "3", "--knn-every", "3"]


def test_it_trains_goes_on_and_is_evaluated(project):
    printed = run(project, *TRAIN, "--out", "whole")
    assert "linear_eval.py --checkpoint whole/encoder.pt" in printed.splitlines()[-1]
    entry = read_log(project / "whole")[-1]
    assert (entry["step"], entry["views"]) == (30, 2.0) and -1 <= entry["loss"] == -entry["cosine"]

    process = start(*TRAIN, "--out", "run", cwd=project, path=[])
    wait_for(project / "run/checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    status, out, _ = finish(process)
    assert status == 128 + signal.SIGTERM and "stopped; to go on" in out
    assert "resumed from step" in run(project, *TRAIN, "--out", "run", "--resume")
    assert_same_run(project / "run", project / "whole")

    argv = ["linear_eval.py", "--checkpoint", "whole/encoder.pt", "--dataset", "toy.pt"]
    printed = run(project, *argv, *"--protocol knn --device cpu --precision fp32".split())
    figures = json.loads(printed.splitlines()[-1])
    assert figures["knn_top1"] == pytest.approx(entry["knn_top1"], abs=0.04)


def test_it_runs_on_two_processes(project):
    """At a low rate, at which rounding stays small, with the losses of one process."""
    slow = [*TRAIN, "--lr", "1e-6"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(project, *several, *slow, "--out", "two")
    run(project, *slow, "--out", "one")
    one, two = (read_log(project / name) for name in ("one", "two"))
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-3)


def test_it_passes_the_tests_of_the_project(project):
    """Those that look for method files, which find this one, too."""
    files = sorted(project.glob("tests/test_*.py"))
    files = [path for path in files if 'glob("*.py")' in path.read_text()]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    assert files and " passed" in run(project, *words)
    assert "simsiam" in run(project, *words, "--collect-only")
