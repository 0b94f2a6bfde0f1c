"""Each method's forward pass and the views on a GPU that is only pretended. It is torch's device
"meta", whose tensors have a shape and a type and no values: whatever has to know one raises
(.item(), bool(), a shape that depends on it), as it would make a CPU wait for its GPU. No operation
may mix its tensors with the CPU's, or bring one back. Left out is what cannot be pretended:
generators (draws are handed in), autocast, backward; and AutoAugment, which runs on the CPU. The
last test needs a GPU, and uses it."""

import contextlib
import itertools

import pytest
import torch
from conftest import SmallEncoder
from test_losses import MODELS
from test_views import FIRST, MEAN, SECOND, STD, noise_bytes, rng
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import common

B, SIDE, GPU = 4, 24, "meta"


def devices(values, least=0):
    tensors = [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
    return {x.device.type for x in tensors if x.ndim >= least}


class Apart(TorchDispatchMode):
    """Tensors there and here meet in copies from here alone, and where one here is a scalar."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if GPU in devices((args, kwargs)):
            mixed = devices((args, kwargs), 1) == {GPU, "cpu"}
            assert not mixed or "copy" in str(function), f"{function} mixes devices"
            assert "cpu" not in devices(results), f"{function} brings a tensor back"
        return results


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with Apart():
        yield


HERE = torch.zeros(3)
MISTAKES = {
    "a tensor here": lambda x: x + HERE,
    "an index here": lambda x: x[torch.tensor([0, 1])] + 1,
    "read": lambda x: float(x.sum()),
    "brought back": lambda x: x.cpu(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, pretending):
    with pytest.raises((RuntimeError, AssertionError)):
        MISTAKES[mistake](torch.rand(3, device=GPU))


STEPS = [(name, None) for name in MODELS]
STEPS += itertools.product(("simclr", "byol"), ("rc", "lbe", "ip", "mib"))


@pytest.mark.parametrize("name, term", STEPS)
def test_forward(name, term, pretending):
    model = MODELS[name](common.resnet() if name == "simclr" else SmallEncoder())
    model = common.MutualInformation(model, term, 0.1, 8) if term else model
    model.to(GPU)
    views = list(torch.rand(3, B, 3, 8, 8, device=GPU))
    loss, terms = model(views, torch.arange(B, device=GPU))
    getattr(model, "after_step", lambda progress: None)(0.5)
    assert loss.shape == () and devices((loss, terms)) == {GPU}
    assert devices(model.state_dict()) == {GPU}


@pytest.mark.parametrize("recipes", [[FIRST, SECOND], [common.Recipe(pad=2, jitter_p=0)] * 2])
def test_views(recipes, pretending):
    draws = common.Augment(recipes, SIDE, MEAN, STD).draw(B, 20, 24, rng())
    augment = common.Augment(recipes, SIDE, MEAN, STD, GPU)
    images = noise_bytes(2 * B, 20, 24).to(GPU)
    x = augment.apply(images, {key: value.to(GPU) for key, value in draws.items()})
    assert x.shape == (2 * B, 3, SIDE, SIDE) and devices(x) == {GPU}


@pytest.mark.parametrize("side", [SIDE, 20])
def test_evaluation(side, pretending):
    x = common.evaluation_view(noise_bytes(B, side).to(GPU), SIDE, MEAN, STD)
    bank, queries = torch.rand(30, 8, device=GPU), torch.rand(B, 8, device=GPU)
    scores = common.knn_scores(bank, torch.arange(30, device=GPU) % 3, queries, 3, k=5)
    assert x.shape == (B, 3, SIDE, SIDE) and scores.shape == (B, 3)
    assert devices((x, scores)) == {GPU}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_one_bf16_step_on_cuda_is_finite(name):
    torch.manual_seed(0)
    model = MODELS[name](common.resnet()).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _ = model(list(torch.rand(2, 16, 3, 32, 32).cuda()), torch.arange(16).cuda() % 3)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
