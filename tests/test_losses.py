"""The losses: each against a slow float64 loop over its equation, then its closed forms and its
symmetries, and inputs that break careless arithmetic (half precision, two images, collapse, zeros,
huge values).

LOSSES lists the losses of two stacks of vectors; what holds for all is tested once, over that list.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from simclr import SimCLR, nt_xent_loss


def nt_xent_loop(z1, z2, temperature):
    """The mean over the 2B anchors i of -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)),
    s the cosine, j the other view of i."""
    z = [*z1, *z2]
    total = 0
    for i in range(len(z)):
        j = (i + len(z1)) % len(z)
        likeness = [
            torch.exp(torch.dot(z[i], z[k]) / (z[i].norm() * z[k].norm()) / temperature)
            for k in range(len(z))
        ]
        others = sum(likeness[k] for k in range(len(z)) if k != i)
        total = total - torch.log(likeness[j] / others)
    return total / len(z)


LOSSES = [  # the loss, the loop that it should equal, further arguments of both
    pytest.param(nt_xent_loss, nt_xent_loop, {"temperature": 0.5}, id="nt_xent-0.5"),
    pytest.param(nt_xent_loss, nt_xent_loop, {"temperature": 0.1}, id="nt_xent-0.1"),
]
HALF_TO_SINGLE = [torch.float16, torch.bfloat16, torch.float32]


def two_views(batch, dim, dtype=torch.float32, seed=0):
    """Two stacks [B, D] that resemble each other, of uneven lengths, ready for a gradient."""
    rng = torch.Generator().manual_seed(seed)
    z1 = torch.randn(batch, dim, generator=rng, dtype=torch.float64)
    z2 = z1 + 0.7 * torch.randn(batch, dim, generator=rng, dtype=torch.float64)
    lengths = torch.rand(2, batch, 1, generator=rng, dtype=torch.float64) * 3 + 0.3
    return tuple(
        (z * s).to(dtype).requires_grad_() for z, s in ((z1, lengths[0]), (z2, lengths[1]))
    )


# --------------------------------------------------------------------------------------------------
# What every loss promises


@pytest.mark.parametrize("batch, dim", [(2, 3), (7, 5), (16, 32)])
@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_value_and_gradient_equal_the_loop(loss, loop, options, batch, dim):
    z1, z2 = two_views(batch, dim)
    slow1, slow2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    value, expected = loss(z1, z2, **options), loop(slow1, slow2, **options)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(z1.grad.double(), slow1.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z2.grad.double(), slow2.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_float64_stays_float64(loss, loop, options):
    z1, z2 = two_views(4, 3, torch.float64)
    value = loss(z1, z2, **options)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, loop(z1, z2, **options), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, **options), (z1, z2))


@pytest.mark.parametrize("dtype", HALF_TO_SINGLE, ids=str)
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("case", ["random", "constant", "huge", "zero", "same direction"])
@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_finite_whatever_comes_in(loss, loop, options, case, batch, dtype):
    z1, z2 = (z.detach() for z in two_views(batch, 16))
    z1, z2 = {
        "random": (z1, z2),
        "constant": (torch.full_like(z1, 0.3), torch.full_like(z2, 0.3)),
        "huge": (z1.sign() * 1e4, z2.sign() * 1e4),
        "zero": (torch.zeros_like(z1), torch.zeros_like(z2)),
        "same direction": (z1[:1] * torch.arange(1, batch + 1)[:, None], z1[:1].expand(batch, -1)),
    }[case]
    z1, z2 = (z.to(dtype).clone().requires_grad_() for z in (z1, z2))
    value = loss(z1, z2, **options)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    assert z1.grad.dtype == dtype and z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_one_zero_row_among_others(loss, loop, options):
    z1, z2 = (z.detach() for z in two_views(8, 16))
    z1[0] = 0
    value = loss(z1.requires_grad_(), z2, **options)
    value.backward()
    assert value.isfinite() and z1.grad.isfinite().all()


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_half_precision_inputs_are_rounded_once(loss, loop, options):
    """The value is that of the rounded inputs: all arithmetic after the rounding is in float32."""
    for dtype in torch.float16, torch.bfloat16:
        z1, z2 = (z.detach() for z in two_views(16, 32, dtype))
        expected = loop(z1.double(), z2.double(), **options)
        assert loss(z1, z2, **options).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_autocast_changes_nothing(loss, loop, options):
    z1, z2 = two_views(16, 32)
    plain = loss(z1, z2, **options)
    expected = torch.autograd.grad(plain, (z1, z2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z1, z2, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, (z1, z2)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_order_of_the_images_does_not_matter(loss, loop, options):
    z1, z2 = two_views(9, 6)
    permutation = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = loss(z1, z2, **options)
    torch.testing.assert_close(loss(z1[permutation], z2[permutation], **options), expected)
    broken_pairs = loss(z1[permutation], z2, **options)
    assert (broken_pairs - expected).abs() > 0.1  # which image goes with which does matter


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_inputs_are_left_alone(loss, loop, options):
    z1, z2 = two_views(4, 3)
    before1, before2 = z1.detach().clone(), z2.detach().clone()
    loss(z1, z2, **options).backward()
    assert torch.equal(z1, before1) and torch.equal(z2, before2)


# --------------------------------------------------------------------------------------------------
# SimCLR


def test_nt_xent_by_hand():
    """Image 1 points east in both views, image 2 north and then south: cosine 1 and -1 with the
    partner, 0 with the others."""
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    z2 = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    # -log(e / (e + 1 + 1)) for both anchors of image 1, -log(e^-1 / (e^-1 + 1 + 1)) for image 2
    assert nt_xent_loss(z1, z2, 1.0).item() == pytest.approx((0.551445 + 1.861995) / 2, abs=1e-5)
    at_half = (math.log(1 + 2 * math.exp(-2)) + math.log(1 + 2 * math.exp(2))) / 2
    assert nt_xent_loss(z1, z2, 0.5).item() == pytest.approx(at_half, abs=1e-6)
    assert nt_xent_loss(z1, z2).item() == pytest.approx(at_half, abs=1e-6)  # .5 is the default


@pytest.mark.parametrize("n", [2, 8, 50])
def test_nt_xent_closed_forms(n):
    every = torch.eye(2 * n)
    orthogonal = nt_xent_loss(every[:n], every[n:], 0.3)  # no vector resembles any other: chance
    assert orthogonal.item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)
    perfect = nt_xent_loss(every[:n], every[:n], 0.3)  # the views agree, the images are orthogonal
    assert perfect.item() == pytest.approx(math.log(1 + (2 * n - 2) * math.exp(-1 / 0.3)), rel=1e-5)
    collapsed = nt_xent_loss(torch.ones(n, 4), torch.ones(n, 4), 0.3)
    assert collapsed.item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)


def test_nt_xent_symmetries():
    z1, z2 = two_views(6, 4)
    expected = nt_xent_loss(z1, z2)
    torch.testing.assert_close(nt_xent_loss(z2, z1), expected)
    lengths = torch.logspace(-3, 3, 6)[:, None]
    torch.testing.assert_close(nt_xent_loss(z1 * lengths, z2 / lengths), expected)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(nt_xent_loss(z1 @ rotation, z2 @ rotation), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_simclr_forward(count):
    """The loss is the mean over pairs of views, the information bound log(2B - 1) - loss."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))
    backbone.num_features = 10
    model = SimCLR(backbone, hidden_dim=12, dim=6, temperature=0.3).double()
    views = list(torch.randn(count, 5, 3, 4, 4, dtype=torch.float64))
    loss, terms = model(views, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert terms["mi_bound"].item() == pytest.approx(math.log(9) - loss.item(), abs=1e-12)
    assert not terms["mi_bound"].requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    z = model.projector(model.backbone(torch.cat(views)))
    assert z.shape == (count * 5, 6)
    pairs = list(itertools.combinations(z.view(count, 5, 6), 2))
    expected = sum(nt_xent_loop(z1, z2, 0.3) for z1, z2 in pairs) / len(pairs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
