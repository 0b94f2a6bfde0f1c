"""tests/benchmark.py, whose figures the README quotes: it measures every arm, and what it says."""

import json
from pathlib import Path

import benchmark
import pytest
import torch
from conftest import CPU, fail, noise, store, succeed
from test_training import TINY

import common

pytestmark = pytest.mark.slow


def test_every_arm_is_measured(small):
    store(noise(64), "toy.pt")
    argv = [*TINY, "--dataset", "toy.pt", "--blocks", "2", "--steps", "1", "--json", "out.json"]
    table = succeed("benchmark", *argv, "--groups", "data,ladder,methods")
    found = json.loads(Path("out.json").read_text())
    arms = {"cached", "real", "views", "pil 0", "pil 1", "usual", "plain"}
    assert arms <= found["data"].keys() and len(found["ladder"]) == 5
    assert len(found["methods"]) == 9 and found["torch"] == torch.__version__
    for group, base in ("data", "cached"), ("ladder", "cached"), ("methods", "simclr"):
        assert found[group][base]["percent_over_base"] == 0
        for name, row in found[group].items():
            assert len(row["ms_blocks"]) == 2 and name in table
            assert row["seconds_per_epoch"] == pytest.approx(64 * row["ms"] / 16e3)
            times = benchmark.times(row, found[group][base])
            assert row["percent_over_base"] == pytest.approx(100 * (times - 1))
    assert found["times_real"].keys() == {"pil 0", "usual", "plain"}
    slow, fast = {"ms_blocks": [4, 12, 9]}, {"ms_blocks": [2, 3, 1]}
    assert benchmark.times(slow, fast) == 4  # the median of 2, 4 and 9
    assert "expected some of data" in fail("benchmark", *argv, "--groups", "speed")
    assert "two views" in fail("benchmark", *argv, "--views", "3")


def test_it_compares_what_it_says(folder):
    """Each thing that the ladder takes away is gone, and the rest is there; the rivals' views have
    our statistics."""
    store(noise(512, 24), "toy.pt")
    argv = ["--dataset", "toy.pt", *CPU[:-2], "--precision", "bf16", "--stem", "imagenet"]
    argv += ["--blur", "0.5", "--optimizer", "adam", "--batch-size", "256"]
    model, data, recipes, args = benchmark.build("simclr", argv)
    assert args.optimizer == "adam"
    weight = model.backbone.conv1.weight
    for taken in "", "half precision", "channels_last", "fused", "one pass":
        step = benchmark.Step(model, args, taken)
        copied = step.model.backbone.conv1.weight
        assert step.args.precision == ("fp32" if taken == "half precision" else "bf16")
        last = copied.is_contiguous(memory_format=torch.channels_last)
        assert last == (taken != "channels_last") and torch.equal(copied, weight)
        assert step.optimizer.param_groups[0]["fused"] == (None if taken == "fused" else True)
        assert step.model.concat_views == (taken != "one pass")
    augment = common.Augment(recipes, args.image_size, data.mean, data.std)
    ours = torch.cat(augment(data.pretrain.images, common.generator(0, "augment", 0)))
    transform = benchmark.torchvision_transform(recipes[0], 24, data.mean, data.std)
    theirs = torch.cat(benchmark.pillow_views(data.pretrain.images, transform))
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=0.05)
    assert theirs.std().item() == pytest.approx(ours.std().item(), rel=0.03)
