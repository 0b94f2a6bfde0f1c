"""That the methods learn: a few epochs on the drawn dataset; that they do not without what keeps
them from collapse; and that a collapsed encoder is worth nothing there."""

import functools
from unittest import mock

import pytest
import torch
from conftest import load, store, succeed
from test_linear_eval import encoder_dict, evaluate
from test_training import read_log

import common

pytestmark = pytest.mark.slow
SHAPES = "--dataset shapes --knn-bank 2000 --device cpu --out run --epochs".split()
# Epochs, with a margin for other roundings. TCL and cross-entropy are SupCon's loop with another
# loss, which has tests of its own.
LEARN = {"simclr": 4, "byol": 14, "barlow_twins": 5, "vicreg": 4, "supcon_tcl": 2, "corinfomax": 6}
LEARN |= {"carl_carp": 4, "carl_carp --method carp": 5}
LEARN |= {"supcon_tcl --loss tcl --self-supervised": 3}
ABLATIONS = {"byol --ablate predictor": 2, "byol --ablate stop-gradient": 2}
ABLATIONS |= {"vicreg --ablate variance": 2, "carl_carp --ablate kl": 2}
ABLATIONS |= {"carl_carp --method carp --ablate kl": 6, "corinfomax --ablate logdet": 2}


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """Draw the shapes once, and use two threads: these train for long."""
    torch.set_num_threads(2)
    with mock.patch.object(common, "shapes", functools.cache(common.shapes)):
        yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", LEARN)
def test_shapes_are_learned(method, folder):
    """A few epochs of the preset, well above what an untrained encoder gives."""
    printed = succeed(method, *SHAPES, LEARN[method])
    untrained = load("run/checkpoint.pt")["baselines"]["untrained encoder"]
    entry = read_log("run")[-1]
    learned = entry["knn_top1"]
    assert learned > untrained + 0.15
    assert "collapsed" not in printed and "not learning" not in printed
    assert f"kNN top-1 {learned:.1%} (untrained encoder {untrained:.1%}, pixels" in printed


@pytest.mark.parametrize("method", ABLATIONS)
def test_without_what_prevents_it_a_method_collapses(method, folder):
    printed = succeed(method, *SHAPES, ABLATIONS[method])
    last = [x for x in printed.splitlines() if x.startswith(f"epoch {ABLATIONS[method]}/")][-1]
    kind = "a few directions" if "carp" in method.split() else "a point"
    assert f"collapsed to {kind}" in last


def test_a_collapsed_encoder_scores_at_chance(folder):
    weights = encoder_dict()["state_dict"]
    zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
    store(encoder_dict(image_size=32, state_dict=zeros), "encoder.pt")
    argv = "--checkpoint encoder.pt --dataset shapes --device cpu --cached --epochs 1"
    _, figures = evaluate(*argv.split())
    assert abs(figures["knn_top1"] - 0.1) < 0.03 and abs(figures["top1"] - 0.1) < 0.03
