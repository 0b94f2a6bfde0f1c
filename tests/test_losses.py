"""The losses: each against a slow float64 loop over its equation, then its closed forms and its
symmetries, and inputs that break careless arithmetic (half precision, two images, collapse, zeros,
huge values).

LOSSES lists the losses of two stacks of vectors; what holds for all is tested once, over that list.
"""

import math

import pytest
import torch

from barlow_twins import barlow_twins_loss
from byol import byol_loss
from carl_carp import carl_loss, carp_loss
from common import lower_bound_estimate
from corinfomax import CorInfoMaxLoss, ldmi
from simclr import nt_xent_loss
from supcon_tcl import supcon_loss, tcl_loss
from vicreg import vicreg_loss

# --------------------------------------------------------------------------------------------------
# The equations, slowly


def cosine(a, b):
    return torch.dot(a, b) / (a.norm() * b.norm())


def nt_xent_loop(z1, z2, temperature):
    """The mean over the 2B anchors i of -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)),
    s the cosine, j the other view of i."""
    z = [*z1, *z2]
    total = 0
    for i in range(len(z)):
        j = (i + len(z1)) % len(z)
        likeness = [torch.exp(cosine(z[i], z[k]) / temperature) for k in range(len(z))]
        others = sum(likeness[k] for k in range(len(z)) if k != i)
        total = total - torch.log(likeness[j] / others)
    return total / len(z)


def tcl_loop(z, y, temperature, k1, k2):
    """S004 eq. 4.2-4.3 for each anchor that has a positive, then the mean over these."""
    anchors = []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        negatives = [j for j in range(len(z)) if y[j] != y[i]]
        if positives:
            d = sum(torch.exp(cosine(z[i], z[p]) / temperature) for p in positives)
            d = d + k1 * sum(torch.exp(-cosine(z[i], z[p])) for p in positives)
            d = d + k2 * sum(torch.exp(cosine(z[i], z[n]) / temperature) for n in negatives)
            logs = [torch.log(torch.exp(cosine(z[i], z[p]) / temperature) / d) for p in positives]
            anchors.append(-sum(logs) / len(positives))
    return sum(anchors) / len(anchors)


def supcon_loop(z, y, temperature):
    """S004 eq. 3.2: the denominator is the sum over all views but the anchor itself."""
    anchors = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if y[j] == y[i]]
        if positives:
            total = sum(torch.exp(cosine(z[i], z[a]) / temperature) for a in others)
            terms = [torch.exp(cosine(z[i], z[p]) / temperature) / total for p in positives]
            anchors.append(-sum(map(torch.log, terms)) / len(positives))
    return sum(anchors) / len(anchors)


def byol_loop(z1, z2):
    """Eq. 2.21: both directions; in each, what stands on the target's side is a constant."""
    rows = [
        2 - 2 * cosine(a, b.detach()) + 2 - 2 * cosine(b, a.detach())
        for a, b in zip(z1, z2, strict=True)
    ]
    return sum(rows) / len(rows)


def barlow_twins_loop(z1, z2, off_diag_weight):
    n, dim = z1.shape

    def standardized(z, d):
        mean = sum(z[:, d]) / n
        variance = sum((value - mean) ** 2 for value in z[:, d]) / n
        return [(value - mean) / torch.sqrt(variance + 1e-5) for value in z[:, d]]

    first, second = ([standardized(z, d) for d in range(dim)] for z in (z1, z2))
    loss = 0
    for i in range(dim):
        for j in range(dim):
            c = sum(a * b for a, b in zip(first[i], second[j], strict=True)) / n
            loss = loss + ((1 - c) ** 2 if i == j else off_diag_weight * c**2)
    return loss


def vicreg_loop(z1, z2, sim_weight, var_weight, cov_weight):
    n, dim = z1.shape
    s = sum((z1[b, d] - z2[b, d]) ** 2 for b in range(n) for d in range(dim)) / (n * dim)
    loss = sim_weight * s
    for z in (z1, z2):
        mean = [sum(z[:, d]) / n for d in range(dim)]

        def cov(i, j, z=z, mean=mean):
            return sum((z[b, i] - mean[i]) * (z[b, j] - mean[j]) for b in range(n)) / (n - 1)

        hinge = [torch.relu(1 - torch.sqrt(cov(d, d) + 1e-4)) for d in range(dim)]
        loss = loss + var_weight * sum(hinge) / dim / 2
        off = sum(cov(i, j) ** 2 for i in range(dim) for j in range(dim) if i != j)
        loss = loss + cov_weight * off / dim
    return loss


def carl_loop(logits1, logits2, kl_weight):
    """S001 eq. 5.4 + kl_weight * eq. 5.5, with the mean (5.6) over both views."""
    n, k = logits1.shape

    def probabilities(row):
        return [torch.exp(x) / sum(torch.exp(other) for other in row) for x in row]

    q1, q2 = [probabilities(r) for r in logits1], [probabilities(r) for r in logits2]
    agree = [sum(a * b for a, b in zip(*rows, strict=True)) for rows in zip(q1, q2, strict=True)]
    consistency = -sum(map(torch.log, agree)) / n
    mean = [sum(row[c] for row in q1 + q2) / (2 * n) for c in range(k)]
    return consistency + kl_weight * (math.log(k) + sum(p * torch.log(p) for p in mean))


def carp_loop(logits1, logits2, num_blocks, kl_weight, permutation):
    """CARL by itself in every block, then the mean over the blocks."""
    size = len(permutation) // num_blocks
    blocks = [permutation[j * size : (j + 1) * size] for j in range(num_blocks)]
    losses = [carl_loop(logits1[:, block], logits2[:, block], kl_weight) for block in blocks]
    return sum(losses) / num_blocks


def corinfomax_loop(z1, z2, alpha, forgetting, eps, state=None):
    """Algorithm 1 with normalised z. state: [(mu, R), (mu, R)], changed in place."""
    n, dim = z1.shape
    state = (
        state if state is not None else [(torch.zeros(dim).double(), torch.eye(dim).double())] * 2
    )
    z = [[row / row.norm() for row in rows] for rows in (z1, z2)]
    loss = alpha * sum((a - b).square().sum() for a, b in zip(*z, strict=True)) / (n * dim)
    for q in (0, 1):
        mu, r = state[q]
        mu = forgetting * mu + (1 - forgetting) * sum(z[q]) / n
        spread = sum(torch.outer(row - mu, row - mu) for row in z[q]) / n
        r = forgetting * r + (1 - forgetting) * spread
        loss = loss - torch.logdet(r + eps * torch.eye(dim).double()) / dim
        state[q] = mu.detach(), r.detach()
    return loss


def ldmi_loop(z1, z2, eps):
    """S003 eq. 3.6 as it is printed, with the two error covariances."""
    n, eye = len(z1), torch.eye(z1.shape[1], dtype=torch.float64)
    m1, m2 = sum(z1) / n, sum(z2) / n
    r1 = sum(torch.outer(a - m1, a - m1) for a in z1) / n
    r2 = sum(torch.outer(b - m2, b - m2) for b in z2) / n
    r12 = sum(torch.outer(a - m1, b - m2) for a, b in zip(z1, z2, strict=True)) / n
    error1 = r1 - r12 @ torch.linalg.inv(r2 + eps * eye) @ r12.T
    error2 = r2 - r12.T @ torch.linalg.inv(r1 + eps * eye) @ r12
    plus, minus = (r1, r2), (error1, error2)
    total = sum(torch.logdet(r + eps * eye) for r in plus)
    return (total - sum(torch.logdet(r + eps * eye) for r in minus)) / 4


def lower_bound_loop(mu, z, rho):
    """S002: -1/N sum over k of ln sum over l of exp(-rho |z^l - f(v^k)|^2)."""
    total = 0
    for k in range(len(mu)):
        total = total - torch.log(sum(torch.exp(-rho * (z_l - mu[k]).square().sum()) for z_l in z))
    return total / len(mu)


# The losses that do not take two stacks, as functions of two.


def image_labels(z1):
    return torch.arange(len(z1)).repeat(2)


def supcon_pair(z1, z2, temperature):
    return supcon_loss(torch.cat([z1, z2]), image_labels(z1), temperature)


def supcon_pair_loop(z1, z2, temperature):
    return supcon_loop(torch.cat([z1, z2]), image_labels(z1), temperature)


def tcl_pair(z1, z2, **options):
    return tcl_loss(torch.cat([z1, z2]), image_labels(z1), **options)


def tcl_pair_loop(z1, z2, **options):
    return tcl_loop(torch.cat([z1, z2]), image_labels(z1), **options)


def byol_both_ways(p1, p2):
    return byol_loss(p1, p2) + byol_loss(p2, p1)


def carp_of_any(z1, z2, kl_weight):
    """With a fixed permutation that fits the width: blocks of one, or of whatever divides it."""
    k = z1.shape[1]
    blocks = next(n for n in (4, 3, 5) if k % n == 0)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    return carp_loss(z1, z2, blocks, kl_weight, order)


def carp_of_any_loop(z1, z2, kl_weight):
    k = z1.shape[1]
    blocks = next(n for n in (4, 3, 5) if k % n == 0)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    return carp_loop(z1, z2, blocks, kl_weight, order)


def corinfomax_once(z1, z2, alpha, forgetting, eps):
    return CorInfoMaxLoss(z1.shape[1], alpha, forgetting, eps)(z1, z2)


VICREG = {"sim_weight": 25.0, "var_weight": 25.0, "cov_weight": 1.0}
TCL = {"temperature": 0.1, "k1": 5000.0, "k2": 1.2}
CORINFOMAX = {"alpha": 250.0, "forgetting": 0.01, "eps": 1e-8}
LOSSES = [  # the loss, the loop that it should equal, further arguments of both
    pytest.param(nt_xent_loss, nt_xent_loop, {"temperature": 0.5}, id="nt_xent-0.5"),
    pytest.param(nt_xent_loss, nt_xent_loop, {"temperature": 0.1}, id="nt_xent-0.1"),
    pytest.param(supcon_pair, supcon_pair_loop, {"temperature": 0.1}, id="supcon"),
    pytest.param(tcl_pair, tcl_pair_loop, TCL, id="tcl"),
    pytest.param(byol_both_ways, byol_loop, {}, id="byol"),
    pytest.param(barlow_twins_loss, barlow_twins_loop, {"off_diag_weight": 0.0051}, id="barlow"),
    pytest.param(barlow_twins_loss, barlow_twins_loop, {"off_diag_weight": 1.0}, id="barlow-1"),
    pytest.param(vicreg_loss, vicreg_loop, VICREG, id="vicreg"),
    pytest.param(carl_loss, carl_loop, {"kl_weight": 1.0}, id="carl"),
    pytest.param(carl_loss, carl_loop, {"kl_weight": 4.0}, id="carl-4"),
    pytest.param(carp_of_any, carp_of_any_loop, {"kl_weight": 2.0}, id="carp"),
    pytest.param(corinfomax_once, corinfomax_loop, CORINFOMAX, id="corinfomax"),
    pytest.param(lower_bound_estimate, lower_bound_loop, {"rho": 0.05}, id="lbe"),
]
DOUBLE = (corinfomax_once,)  # these are float64 throughout
ONE_SIDED = (byol_both_ways,)  # whose gradient is, on purpose, not that of their value
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
    assert value.shape == ()
    assert value.dtype == (torch.float64 if loss in DOUBLE else torch.float32)
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
    if loss not in ONE_SIDED:
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
    assert value.dtype == (torch.float64 if loss in DOUBLE else torch.float32)
    assert value.isfinite()
    single = [z.detach().float().requires_grad_() for z in (z1, z2)]
    loss(*single, **options).backward()
    for z, same in zip((z1, z2), single, strict=True):
        assert z.grad.dtype == dtype and same.grad.isfinite().all()
        # A gradient that half precision cannot hold is inf, for the gradient scaler to see.
        too_large = same.grad.abs() > torch.finfo(dtype).max
        assert (z.grad.isfinite() | too_large).all()
        assert not too_large.any() or (loss is vicreg_loss and case == "huge")


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
        assert loss(z1, z2, **options).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_autocast_changes_nothing(loss, loop, options):
    z1, z2 = two_views(16, 32)
    plain = loss(z1, z2, **options)
    expected = torch.autograd.grad(plain, (z1, z2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z1, z2, **options)
    assert value.dtype == plain.dtype
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, (z1, z2)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_order_of_the_images_does_not_matter(loss, loop, options):
    z1, z2 = two_views(9, 6)
    permutation = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = loss(z1, z2, **options)
    torch.testing.assert_close(loss(z1[permutation], z2[permutation], **options), expected)
    broken_pairs = loss(z1[permutation], z2, **options)
    if loss is not lower_bound_estimate:  # a sum over all against all
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


# --------------------------------------------------------------------------------------------------
# SupCon and TCL


def labelled(seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(10, 4, generator=rng)
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 7])  # the last has no positive
    return z, y


def test_with_labels_equal_the_loops():
    z, y = labelled()
    expected = supcon_loop(z.double(), y, 0.1).item()
    assert supcon_loss(z, y).item() == pytest.approx(expected, rel=1e-6)  # .1 is the default
    for k1, k2 in (5000.0, 1.0), (1.0, 1.5), (0.0, 3.0), (7.0, 0.0):
        expected = tcl_loop(z.double(), y, 0.2, k1, k2).item()
        assert tcl_loss(z, y, 0.2, k1, k2).item() == pytest.approx(expected, rel=1e-6)
    expected = tcl_loop(z.double(), y, 0.1, 5000.0, 1.0).item()
    assert tcl_loss(z, y).item() == pytest.approx(expected, rel=1e-6)


def test_supcon_with_image_labels_is_nt_xent_and_tcl_without_its_knobs():
    z1, z2 = two_views(9, 6, torch.float64)
    expected = nt_xent_loss(z1, z2, 0.3)
    torch.testing.assert_close(supcon_pair(z1, z2, 0.3), expected, rtol=1e-12, atol=0)
    plain = tcl_pair(z1, z2, temperature=0.3, k1=0.0, k2=1.0)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=0)
    z, y = labelled()
    torch.testing.assert_close(tcl_loss(z, y, 0.3, 0.0, 1.0), supcon_loss(z, y, 0.3))


def test_supcon_is_l_out():
    """The log is inside the sum over positives; L_in of the same batch is another number."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    y = torch.tensor([0, 0, 0, 1])
    # With t = 1. Anchor 0: cosines 1, 0 to positives, -1 to the negative; anchor 1 the same;
    # anchor 2: 0 to both positives and to the negative. Anchor 3 has no positive.
    d0, d2 = math.e + 1 + 1 / math.e, 3.0
    l_out = (2 * -(math.log(math.e / d0) + math.log(1 / d0)) / 2 + math.log(d2)) / 3
    assert supcon_loss(z, y, 1.0).item() == pytest.approx(l_out, abs=1e-6)


def test_tcl_by_hand():
    """Two views of each of two images, all orthogonal: D = 1 + k1 + 2 k2."""
    z = torch.eye(4)
    y = torch.tensor([0, 1, 0, 1])
    assert tcl_loss(z, y, 0.1, 5.0, 3.0).item() == pytest.approx(math.log(1 + 5 + 6), abs=1e-6)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # one pair alone, cosine 1: no temperature in k1
    expected = math.log(math.exp(2) + 9 * math.exp(-1)) - 2
    assert tcl_loss(z, torch.zeros(2), 0.5, 9.0, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [supcon_loss, tcl_loss])
def test_anchors_without_positives_are_left_out(loss):
    z, y = labelled()
    z.requires_grad_()
    value = loss(z, y)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    assert z.grad[-1].norm() > 0  # it is still a negative of the others
    with_double = loss(torch.cat([z, z[-1:]]), torch.cat([y, y[-1:]]))
    assert with_double.item() != pytest.approx(value.item(), abs=1e-4)
    z, alone = torch.randn(5, 3).requires_grad_(), torch.arange(5)
    value = loss(z, alone)  # nobody has one
    value.backward()
    assert value.item() == 0 and (z.grad == 0).all()
    value = loss(z, torch.zeros(5))  # nobody has a negative
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------
# BYOL


@pytest.mark.parametrize("angle, value", [(0, 0), (90, 4), (180, 8), (60, 4 - 2)])
def test_byol_oracles(angle, value):
    radians = math.radians(angle)
    p = torch.tensor([[3.0, 0.0]]).repeat(5, 1)
    z = torch.tensor([[math.cos(radians), math.sin(radians)]]).repeat(5, 1) * 0.2
    assert byol_both_ways(p, z).item() == pytest.approx(value, abs=1e-6)
    assert byol_loss(p, z).item() == pytest.approx(value / 2, abs=1e-6)


def test_byol_gradient_goes_to_the_prediction_alone():
    p, z = two_views(6, 4)
    byol_loss(p, z).backward()
    assert p.grad.norm() > 0 and z.grad is None


# --------------------------------------------------------------------------------------------------
# Barlow Twins


def test_barlow_twins_oracles():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # uncorrelated
    assert barlow_twins_loss(signs * 3 + 5, signs * 0.5).item() == pytest.approx(0, abs=1e-6)
    same = signs[:, :1].repeat(1, 7)  # all features equal: only the off-diagonal counts
    assert barlow_twins_loss(same, same, 0.5).item() == pytest.approx(0.5 * 7 * 6, rel=1e-4)
    opposite = barlow_twins_loss(signs, -signs, 0.0).item()  # C_ii = -1
    assert opposite == pytest.approx(2 * 4, rel=1e-4)
    rng = torch.Generator().manual_seed(0)  # nothing in common: about D
    z1, z2 = torch.randn(2, 20000, 16, generator=rng)
    assert barlow_twins_loss(z1, z2).item() == pytest.approx(16, rel=0.02)
    assert barlow_twins_loss(torch.ones(4, 16), torch.ones(4, 16)).item() == pytest.approx(16)


def test_barlow_twins_symmetries():
    z1, z2 = two_views(8, 5)
    expected = barlow_twins_loss(z1, z2)
    torch.testing.assert_close(barlow_twins_loss(z2, z1), expected)
    scale, shift = torch.tensor([3.0, 0.5, 8.0, 1.0, 2.0]), torch.arange(5.0)
    torch.testing.assert_close(
        barlow_twins_loss(z1 * scale + shift, z2), expected, rtol=1e-3, atol=1e-4
    )


# --------------------------------------------------------------------------------------------------
# VICReg


def test_vicreg_oracles():
    point = torch.ones(6, 4)
    assert vicreg_loss(point, point).item() == pytest.approx(25 * (1 - 0.01), abs=1e-5)
    assert vicreg_loss(point, point + 2, 25, 0, 0).item() == pytest.approx(25 * 4)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert vicreg_loss(signs, signs).item() == 0  # deviation above 1, uncorrelated, equal
    half = signs * 0.5  # variance 1/4 * 4/3 with the unbiased estimate, in one view of two
    expected = 25 * 0.25 + 12.5 * (1 - math.sqrt(1 / 3 + 1e-4))
    assert vicreg_loss(signs, half).item() == pytest.approx(expected, rel=1e-6)
    line = signs[:, :1].repeat(1, 3)  # Cov_ij = 4/3 for all pairs: 6 pairs / 3, for both views
    expected = 2 * 6 * (4 / 3) ** 2 / 3
    assert vicreg_loss(line, line).item() == pytest.approx(expected, rel=1e-5)


def test_vicreg_weights_are_apart():
    z1, z2 = two_views(8, 5)
    parts = [vicreg_loss(z1, z2, *(float(i == j) for j in range(3))) for i in range(3)]
    expected = 3 * parts[0] + 5 * parts[1] + 7 * parts[2]
    torch.testing.assert_close(vicreg_loss(z1, z2, 3, 5, 7), expected)
    torch.testing.assert_close(vicreg_loss(z2, z1, 3, 5, 7), expected)


# --------------------------------------------------------------------------------------------------
# CARL and CARP


def test_carl_oracles():
    k = 8
    certain = 50 * torch.eye(k)  # image i belongs to prototype i, in both views
    assert carl_loss(certain, certain, 1.0).item() == pytest.approx(0, abs=1e-5)
    one = 50 * torch.eye(k)[:1].repeat(k, 1)  # one prototype takes all: consistent, but KL = log K
    assert carl_loss(one, one, 1.0).item() == pytest.approx(math.log(k), abs=1e-5)
    undecided = torch.zeros(k, k)  # uniform for every image: KL = 0, consistency log K
    assert carl_loss(undecided, undecided, 1.0).item() == pytest.approx(math.log(k), abs=1e-6)
    assert carl_loss(undecided, undecided, 0.0).item() == pytest.approx(math.log(k), abs=1e-6)
    apart = carl_loss(1e4 * torch.eye(k), 1e4 * torch.eye(k).roll(1, 0))  # <q1, q2> = exp(-1e4)
    assert apart.item() == pytest.approx(1e4, rel=1e-4)


def test_carl_starts_at_a_saddle():
    """Undecided about every image: no gradient, yet neither a minimum nor a maximum."""
    zeros = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    (carl_loss(zeros, zeros, 1.0) + carp_loss(zeros, zeros, 2, 1.0)).backward()
    assert zeros.grad.abs().max() < 1e-12
    logits = 0.1 * torch.eye(8, dtype=torch.float64)
    for kl_weight in 0.0, 1.0:
        assert carl_loss(logits, logits, kl_weight).item() < math.log(8)  # views that agree
        assert carl_loss(logits, -logits, kl_weight).item() > math.log(8)  # views that do not


def test_carl_kl_keeps_the_prototypes_in_use():
    """The sign that S001's listing 2 has wrong: a step down the KL spreads the assignments."""
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(4, 1).requires_grad_()
    (carl_loss(logits, logits, 1.0) - carl_loss(logits, logits, 0.0)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_carp_with_one_block_is_carl():
    z1, z2 = two_views(7, 12)
    torch.testing.assert_close(carp_loss(z1, z2, 1, 3.0), carl_loss(z1, z2, 3.0))


def test_carp_oracles():
    order = torch.arange(12)
    zeros = torch.zeros(5, 12)  # undecided in blocks of 4: consistency log 4, KL 0
    assert carp_loss(zeros, zeros, 3, 9.0, order).item() == pytest.approx(math.log(4), abs=1e-6)
    favourite = torch.zeros(5, 12)
    favourite[:, [0, 4, 8]] = 60.0  # the first of each block takes all: KL log 4 each
    assert carp_loss(favourite, favourite, 3, 2.0, order).item() == pytest.approx(2 * math.log(4))
    alone = carp_loss(zeros, zeros, 12, 1.0)  # blocks of one prototype have nothing to decide
    assert alone.item() == pytest.approx(0, abs=1e-6)


def test_carp_partitions():
    z1, z2 = two_views(7, 12, torch.float64)
    torch.manual_seed(0)
    values = {carp_loss(z1, z2, 3).item() for _ in range(5)}
    assert len(values) > 3  # a new partition each time (two may agree by chance)
    order = torch.randperm(12)
    expected = carp_loss(z1, z2, 3, 1.0, order)
    torch.testing.assert_close(
        carp_loss(z1[:, order], z2[:, order], 3, 1.0, torch.arange(12)), expected
    )
    within = order.view(3, 4).flip(1).flatten()  # the order inside a block does not matter
    torch.testing.assert_close(carp_loss(z1, z2, 3, 1.0, within), expected)
    with pytest.raises(ValueError, match="12 prototypes .* 5 blocks"):
        carp_loss(z1, z2, 5)


# --------------------------------------------------------------------------------------------------
# CorInfoMax


def test_corinfomax_recursion_equals_the_loop():
    """Four batches in a row, each with a backward pass: the state moves and holds no graph."""
    criterion = CorInfoMaxLoss(5, 250.0, 0.3)
    state = [(torch.zeros(5).double(), torch.eye(5).double()) for _ in range(2)]
    for step in range(4):
        z1, z2 = two_views(6, 5, torch.float64, seed=step)
        slow1, slow2 = (z.detach().clone().requires_grad_() for z in (z1, z2))
        value = criterion(z1, z2)
        expected = corinfomax_loop(slow1, slow2, 250.0, 0.3, 1e-8, state)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        value.backward()
        expected.backward()
        torch.testing.assert_close(z1.grad, slow1.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(z2.grad, slow2.grad, rtol=1e-8, atol=1e-10)
        for q, name in enumerate("12"):
            torch.testing.assert_close(getattr(criterion, f"mu{name}"), state[q][0])
            torch.testing.assert_close(getattr(criterion, f"R{name}"), state[q][1])
    assert {b.dtype for b in criterion.buffers()} == {torch.float64}
    assert not any(b.requires_grad for b in criterion.buffers())
    assert set(criterion.state_dict()) == {"mu1", "mu2", "R1", "R2"}


def test_corinfomax_start_and_evaluation():
    criterion = CorInfoMaxLoss(3)
    assert (criterion.alpha, criterion.forgetting, criterion.eps) == (250.0, 0.01, 1e-8)
    assert torch.equal(criterion.R1, torch.eye(3).double()) and (criterion.mu2 == 0).all()
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    criterion.eval()(*two_views(6, 3))
    assert all(torch.equal(value, before[key]) for key, value in criterion.state_dict().items())


@pytest.mark.parametrize("dim", [8, 64])
def test_corinfomax_floor(dim):
    """Unit vectors: trace R <= 1, so the determinants cost at least 2 log D, and just that where
    the views agree and all directions are used alike."""
    axes = torch.cat([torch.eye(dim), -torch.eye(dim)])
    value = CorInfoMaxLoss(dim, forgetting=0.0)(axes, axes)
    assert value.item() == pytest.approx(2 * math.log(dim), abs=1e-4)
    for seed in range(5):
        z1, z2 = two_views(4 * dim, dim, seed=seed)
        assert CorInfoMaxLoss(dim, 0.0, 0.0)(z1, z2).item() >= 2 * math.log(dim)


def test_corinfomax_expansion():
    """S003 A.1, (1 - lambda) / N (R + eps I)^-1 (z_n - mu), is half the gradient of the determinant
    for a fixed mu, which it is here: z and -z have the mean 0, whatever moves. What points along z
    is lost in its normalisation."""
    half = torch.nn.functional.normalize(two_views(6, 4, torch.float64)[0].detach(), dim=1)
    z1, past, eps = torch.cat([half, -half]).requires_grad_(), 0.3, 1e-3
    CorInfoMaxLoss(4, 0.0, past, eps)(z1, z1.detach()).backward()
    eye = torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        covariance = past * eye + (1 - past) * z1.T @ z1 / 12
        printed = (1 - past) / 12 * z1 @ torch.linalg.inv(covariance + eps * eye)
        tangent = printed - (printed * z1).sum(1, keepdim=True) * z1
    torch.testing.assert_close(z1.grad, -2 * tangent / 4)  # minus the determinant, over D


def test_corinfomax_attraction():
    """D * mse = |Z1 - Z2|^2 / n; without the determinants nothing else is left."""
    z1, z2 = two_views(6, 4, torch.float64)
    unit1, unit2 = z1 / z1.norm(dim=1, keepdim=True), z2 / z2.norm(dim=1, keepdim=True)
    expected = 10 * (unit1 - unit2).square().sum() / 6 / 4
    torch.testing.assert_close(CorInfoMaxLoss(4, 10.0, logdet=False)(z1, z2), expected)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_ldmi_is_equation_3_6(eps):
    z1, z2 = (z.detach() for z in two_views(40, 5, torch.float64))
    torch.testing.assert_close(ldmi(z1, z2, eps), ldmi_loop(z1, z2, eps), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ldmi(z2, z1, eps), ldmi(z1, z2, eps))
    torch.testing.assert_close(ldmi(z1 + 3, z2 - 2, eps), ldmi(z1, z2, eps))
    assert ldmi(z1.float(), z2.float()).dtype == torch.float64


def test_ldmi_oracles():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert ldmi(signs[:, :1], signs[:, 1:]).item() == pytest.approx(0, abs=1e-6)  # uncorrelated
    # equal, variance 1, eps e: 1/2 [2 log(1 + e) - log((1 + e)^2 - 1)]
    for eps in (1e-2, 1e-8):
        expected = (2 * math.log(1 + eps) - math.log(eps * (2 + eps))) / 2
        assert ldmi(signs[:, :1], signs[:, :1], eps).item() == pytest.approx(expected, rel=1e-6)
    few = torch.randn(3, 8)  # fewer images than features
    assert ldmi(few, few).isfinite()
    rng = torch.Generator().manual_seed(0)
    many = torch.randn(2, 20000, 4, generator=rng)  # independent
    assert 0 <= ldmi(*many).item() < 0.01


# --------------------------------------------------------------------------------------------------
# LBE


def test_lower_bound_estimate_oracles():
    n = 12
    point = torch.ones(n, 4)
    assert lower_bound_estimate(point, point).item() == pytest.approx(-math.log(n), abs=1e-6)
    far = 1000 * torch.eye(n)
    assert lower_bound_estimate(far, far).item() == pytest.approx(0, abs=1e-6)
    two = torch.tensor([[0.0], [10.0]])  # rho = .05: exp(-5) for the pair
    expected = -math.log(1 + math.exp(-5))
    assert lower_bound_estimate(two, two).item() == pytest.approx(expected, abs=1e-6)


def test_lower_bound_estimate_sums_over_the_noisy_ones():
    """The text's axis: for each mu, a sum over z."""
    mu, z = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [10.0]])
    by_mu = -math.log(1 + math.exp(-5))  # the same for both mu
    by_z = -(math.log(2) + math.log(2 * math.exp(-5))) / 2
    assert abs(by_mu - by_z) > 1
    assert lower_bound_estimate(mu, z).item() == pytest.approx(by_mu, abs=1e-6)
