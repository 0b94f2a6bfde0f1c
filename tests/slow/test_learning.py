"""That the methods learn: a few epochs on the drawn dataset; that they do not without what keeps
them from collapse; and that a collapsed encoder is worth nothing there."""

import functools
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_training import folder, load, read_log, store, succeed  # noqa: F401

import common

pytestmark = pytest.mark.slow
SHAPES = "--dataset shapes --knn-bank 2000 --device cpu --out run --epochs".split()
# Epochs, with a margin for other roundings. TCL and cross-entropy are SupCon's loop with another
# loss, which has tests of its own.
LEARN = {"simclr": 3, "byol": 8, "barlow_twins": 7, "vicreg": 4, "supcon_tcl": 3, "corinfomax": 6}
LEARN |= {"carl_carp": 7, "carl_carp --method carp": 6}
LEARN |= {"supcon_tcl --loss tcl --self-supervised": 3}
ABLATIONS = {  # what is taken out, and how the log shows that all projections are alike
    "byol --ablate predictor": lambda entry: entry["cosine"] > 0.95,
    "byol --ablate stop-gradient": lambda entry: entry["cosine"] > 0.95,
    "vicreg --ablate variance": lambda entry: entry["loss_var"] > 0.9,
    "carl_carp --ablate kl": lambda entry: entry["kl"] > 0.95 * math.log(100),
    "carl_carp --method carp --ablate kl": lambda entry: entry["kl"] > 0.6 * math.log(64),
    "corinfomax --ablate logdet": lambda entry: entry["eig_max"] < 1e-3,
}


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """Draw the shapes once, and use two threads: these train for long."""
    torch.set_num_threads(2)
    with mock.patch.object(common, "shapes", functools.cache(common.shapes)):
        yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", LEARN)
def test_shapes_are_learned(method, folder):  # noqa: F811
    """A few epochs of the preset, well above what an untrained encoder gives."""
    printed = succeed(method, *SHAPES, LEARN[method])
    untrained = load("run/checkpoint.pt")["baselines"]["untrained encoder"]
    entry = read_log("run")[-1]
    learned = entry["knn_top1"]
    assert learned > untrained + 0.25
    for ablation, collapsed in ABLATIONS.items():
        if ablation.split(" --ablate")[0] == method:
            assert not collapsed(entry)
    assert f"kNN top-1 {learned:.1%} (untrained encoder {untrained:.1%}, chance 10.0%)" in printed


@pytest.mark.parametrize("method", ABLATIONS)
def test_without_what_prevents_it_a_method_collapses(method, folder):  # noqa: F811
    succeed(method, *SHAPES, "2")
    untrained = load("run/checkpoint.pt")["baselines"]["untrained encoder"]
    entry = read_log("run")[-1]
    assert ABLATIONS[method](entry), entry
    if "carp" not in method.split():  # whose changing partitions teach the encoder all the same
        assert entry["knn_top1"] < untrained + 0.1  # far less than the whole method gains above


def test_a_collapsed_encoder_scores_at_chance(folder):  # noqa: F811
    network = common.resnet(stem="imagenet").state_dict()
    about = {"arch": "resnet18", "stem": "imagenet", "image_size": 32}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    weights = {key: torch.zeros_like(value) for key, value in network.items()}
    store(about | {"state_dict": weights}, Path("encoder.pt"))
    argv = "--checkpoint encoder.pt --dataset shapes --device cpu --cached --epochs 1"
    figures = json.loads(succeed("linear_eval", *argv.split()).splitlines()[-1])
    assert abs(figures["knn_top1"] - 0.1) < 0.03 and abs(figures["top1"] - 0.1) < 0.03
