"""The methods. Each loss against a slow float64 loop over its equation, values worked out by hand,
inputs that break careless arithmetic, and where it starts. Each model against its networks written
out: who takes gradient, what `after_step` does, the terms for any method. LOSSES and MODELS list
them all; what holds for each is tested once, over these lists.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallEncoder
from torch import nn

import carl_carp
import common
from barlow_twins import BarlowTwins, barlow_twins_loss
from byol import BYOL, byol_loss
from carl_carp import CARLCARP, carl_loss, carp_loss
from common import lower_bound_estimate
from corinfomax import CorInfoMax, CorInfoMaxLoss, ldmi
from simclr import SimCLR, nt_xent_loss
from supcon_tcl import SupConTCL, pull_and_push, supcon_loss, tcl_loss
from vicreg import VICReg, vicreg_loss

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


def anchors(z, y):
    """Of each anchor that has a positive: its cosines, its positives, its negatives."""
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        negatives = [j for j in range(len(z)) if y[j] != y[i]]
        if positives:
            yield torch.stack([cosine(z[i], z_j) for z_j in z]), positives, negatives


def tcl_anchor(c, positives, negatives, temperature, k1, k2):
    """S004 eq. 4.2-4.3."""
    near = torch.exp(c / temperature)
    d = sum(near[p] for p in positives) + k1 * sum(torch.exp(-c[p]) for p in positives)
    d = d + k2 * sum(near[n] for n in negatives)
    return -sum(torch.log(near[p] / d) for p in positives) / len(positives)


def tcl_loop(z, y, temperature=0.1, k1=5000.0, k2=1.0):
    losses = [tcl_anchor(*anchor, temperature, k1, k2) for anchor in anchors(z, y)]
    return sum(losses) / len(losses)


def supcon_loop(z, y, temperature=0.1):
    """S004 eq. 3.1-3.2: the denominator is the plain sum over positives and negatives."""
    return tcl_loop(z, y, temperature, 0, 1)


def byol_loop(z1, z2):
    """Eq. 2.21: both directions; in each, what stands on the target's side is a constant."""
    total = 0
    for a, b in zip(z1, z2, strict=True):
        total = total + 2 - 2 * cosine(a, b.detach()) + 2 - 2 * cosine(b, a.detach())
    return total / len(z1)


def barlow_twins_loop(z1, z2, off_diag_weight):
    (n, dim), scaled, loss = z1.shape, [], 0
    for z in (z1, z2):
        centred = z - sum(z) / n
        scaled.append(centred / torch.sqrt(sum(centred**2) / n + 1e-5))
    for i, j in itertools.product(range(dim), repeat=2):
        c = sum(scaled[0][:, i] * scaled[1][:, j]) / n
        loss = loss + ((1 - c) ** 2 if i == j else off_diag_weight * c**2)
    return loss


def vicreg_loop(z1, z2, sim_weight, var_weight, cov_weight):
    n, dim = z1.shape
    loss = sim_weight * sum(sum((z1 - z2) ** 2)) / (n * dim)
    for z in (z1, z2):
        centred = z - sum(z) / n
        for i, j in itertools.product(range(dim), repeat=2):
            cov = sum(centred[:, i] * centred[:, j]) / (n - 1)
            if i == j:
                loss = loss + var_weight * torch.relu(1 - torch.sqrt(cov + 1e-4)) / dim / 2
            else:
                loss = loss + cov_weight * cov**2 / dim
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


def corinfomax_loop(z1, z2, alpha=250.0, forgetting=0.01, eps=1e-8, state=None):
    """Algorithm 1 with normalised z. state: [(mu, R), (mu, R)], changed in place."""
    n, dim = z1.shape
    eye = torch.eye(dim, dtype=torch.float64)
    state = [(torch.zeros_like(eye[0]), eye)] * 2 if state is None else state
    z = [[row / row.norm() for row in rows] for rows in (z1, z2)]
    loss = alpha * sum((a - b).square().sum() for a, b in zip(*z, strict=True)) / (n * dim)
    for q in (0, 1):
        mu, r = state[q]
        mu = forgetting * mu + (1 - forgetting) * sum(z[q]) / n
        spread = sum(torch.outer(row - mu, row - mu) for row in z[q]) / n
        r = forgetting * r + (1 - forgetting) * spread
        loss = loss - torch.logdet(r + eps * eye) / dim
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
    whole = sum(torch.logdet(r + eps * eye) for r in (r1, r2))
    return (whole - sum(torch.logdet(r + eps * eye) for r in (error1, error2))) / 4


def lower_bound_loop(mu, z, rho):
    """S002: -1/N sum over k of ln sum over l of exp(-rho |z^l - f(v^k)|^2)."""
    total = 0
    for mu_k in mu:
        total = total - torch.log(sum(torch.exp(-rho * (z_l - mu_k).square().sum()) for z_l in z))
    return total / len(mu)


def labelled(loss):
    """A loss of (z, y) as one of (z1, z2): classes of two images, and one view of its own class."""

    def of_two(z1, z2, **options):
        y = (torch.arange(len(z1)) // 2).repeat(2)
        y[-1] = 99
        return loss(torch.cat([z1, z2]), y, **options)

    return of_two


def in_two_blocks(loss):
    """A loss with a partition as one without: prototypes of even number, and of odd."""
    return lambda z1, z2, kl_weight: loss(
        z1, z2, 2, kl_weight, torch.arange(z1.shape[1]).view(-1, 2).T.flatten()
    )


VICREG = {"sim_weight": 30.0, "var_weight": 20.0, "cov_weight": 1.5}
TCL = {"temperature": 0.1, "k1": 5000.0, "k2": 1.2}
LOSSES = [  # the loss, the loop that it should equal, further arguments of both
    pytest.param(nt_xent_loss, nt_xent_loop, {"temperature": 0.1}, id="nt_xent"),
    pytest.param(labelled(supcon_loss), labelled(supcon_loop), {}, id="supcon"),
    pytest.param(labelled(tcl_loss), labelled(tcl_loop), TCL, id="tcl"),
    pytest.param(labelled(tcl_loss), labelled(tcl_loop), {}, id="tcl by default"),
    pytest.param(labelled(tcl_loss), labelled(tcl_loop), TCL | {"k1": 0.0}, id="tcl without k1"),
    pytest.param(labelled(tcl_loss), labelled(tcl_loop), TCL | {"k2": 0.0}, id="tcl without k2"),
    pytest.param(lambda a, b: byol_loss(a, b) + byol_loss(b, a), byol_loop, {}, id="byol"),
    pytest.param(barlow_twins_loss, barlow_twins_loop, {"off_diag_weight": 0.5}, id="barlow"),
    pytest.param(vicreg_loss, vicreg_loop, VICREG, id="vicreg"),
    pytest.param(carl_loss, carl_loop, {"kl_weight": 4.0}, id="carl"),
    pytest.param(in_two_blocks(carp_loss), in_two_blocks(carp_loop), {"kl_weight": 2.0}, id="carp"),
    pytest.param(
        lambda a, b: CorInfoMaxLoss(a.shape[1])(a, b), corinfomax_loop, {}, id="corinfomax"
    ),
    pytest.param(lower_bound_estimate, lower_bound_loop, {"rho": 0.05}, id="lbe"),
]
TOO_STEEP = (vicreg_loop, "huge"), (corinfomax_loop, "one zero row")  # for half precision


def two_views(batch, dim, dtype=torch.float32, seed=0):
    """Two stacks [B, D] that resemble each other, of uneven lengths, ready for a gradient."""
    rng = torch.Generator().manual_seed(seed)
    z1 = torch.randn(batch, dim, generator=rng, dtype=torch.float64)
    z2 = z1 + 0.7 * torch.randn(batch, dim, generator=rng, dtype=torch.float64)
    lengths = torch.rand(2, batch, 1, generator=rng, dtype=torch.float64) * 3 + 0.3
    return [(z * s).to(dtype).requires_grad_() for z, s in zip((z1, z2), lengths, strict=True)]


# --------------------------------------------------------------------------------------------------
# What every loss promises


@pytest.mark.parametrize("batch, dim", [(3, 4), (7, 12)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_value_and_gradient_equal_the_loop(loss, loop, options, dtype, batch, dim):
    """All arithmetic is in float32 at least, under autocast, too: what half precision does to a
    value is to round the inputs once, and their gradients at the end."""
    z1, z2 = two_views(batch, dim, dtype)
    slow1, slow2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
        value, expected = loss(z1, z2, **options), loop(slow1, slow2, **options)
    assert value.shape == ()
    double = loop is corinfomax_loop or dtype == torch.float64
    assert value.dtype == (torch.float64 if double else torch.float32)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    value.backward()
    expected.backward()
    near = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(z1.grad.double(), slow1.grad, **near)
    torch.testing.assert_close(z2.grad.double(), slow2.grad, **near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["constant", "huge", "zero", "one zero row", "same direction"])
@pytest.mark.parametrize("loss, loop, options", LOSSES)
def test_finite_whatever_comes_in(loss, loop, options, case, dtype):
    z1, z2 = (z.detach() for z in two_views(8, 12))
    z1, z2 = {
        "constant": (torch.full_like(z1, 0.3), torch.full_like(z2, 0.3)),
        "huge": (z1.sign() * 1e4, z2.sign() * 1e4),
        "zero": (torch.zeros_like(z1), torch.zeros_like(z2)),
        "one zero row": (z1 * (torch.arange(8) > 0)[:, None], z2),
        "same direction": (z1[:1] * torch.arange(1, 9)[:, None], z1[:1].expand(8, -1)),
    }[case]
    z1, z2 = (z.to(dtype).clone().requires_grad_() for z in (z1, z2))
    value = loss(z1, z2, **options)
    value.backward()
    assert value.isfinite()
    for z in z1, z2:
        # A gradient that half precision cannot hold is inf, for the gradient scaler to see.
        may_be_inf = dtype != torch.float32 and (loop, case) in TOO_STEEP
        assert z.grad.dtype == dtype and not z.grad.isnan().any()
        assert z.grad.isfinite().all() or may_be_inf


# --------------------------------------------------------------------------------------------------
# Values worked out by hand

E, LN = math.e, math.log
EAST_NORTH, EAST_SOUTH = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, -3.0]])  # cosines 1, -1
ALIKE = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1).repeat(1, 3)  # one feature, three times
POINT, ZERO_TEN = torch.ones(6, 4), torch.tensor([[0.0], [10.0]])
ONE_FOR_ALL, AXES = 50 * torch.eye(8)[:1].repeat(8, 1), torch.cat([torch.eye(8), -torch.eye(8)])
ORACLES = [  # a function, its arguments, its value
    # -log(e^2 / (e^2 + 1 + 1)) for the anchors of image 1; of image 2, with e^-2 for e^2
    (nt_xent_loss, (EAST_NORTH, EAST_SOUTH), (LN(1 + 2 / E**2) + LN(1 + 2 * E**2)) / 2),
    # Two views of two images, all orthogonal; then a pair alone: no temperature in the term of k1.
    (tcl_loss, (torch.eye(4), torch.tensor([0, 1, 0, 1]), 0.1, 5.0, 3.0), LN(1 + 5 + 2 * 3)),
    (tcl_loss, (POINT[:2], torch.zeros(2), 0.5, 9.0, 1.0), LN(E**2 + 9 / E) - 2),
    (barlow_twins_loss, (ALIKE, ALIKE), 0.0051 * 6),  # the off-diagonal alone
    (vicreg_loss, (POINT, POINT + 2), 25 * 4 + 25 * (1 - 0.01)),  # collapse
    # Cov_ij = 4/3 for all 6 pairs of 3 features, in both views.
    (vicreg_loss, (ALIKE, ALIKE), 2 * 6 * (4 / 3) ** 2 / 3),
    (carl_loss, (ONE_FOR_ALL, ONE_FOR_ALL), LN(8)),  # consistent, and the KL at its most
    # Unit vectors: the trace of R is 1, the determinant largest where all directions are alike.
    (CorInfoMaxLoss(8, forgetting=0.0), (AXES, AXES), 2 * LN(8)),
    # For each mu a sum over z: both mu are at 0, one z is at 0 and one at 10, rho is .05.
    (lower_bound_estimate, (ZERO_TEN * 0, ZERO_TEN), -LN(1 + E**-5)),
]


@pytest.mark.parametrize("function, arguments, value", ORACLES)
def test_by_hand(function, arguments, value):
    assert function(*arguments).item() == pytest.approx(value, rel=1e-4, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# What one loss alone promises


@pytest.mark.parametrize("loss", [supcon_loss, tcl_loss])
def test_without_positives_or_negatives(loss):
    for labels, learns in (torch.arange(5), False), (torch.zeros(5), True):
        z = two_views(5, 3)[0]
        value = loss(z, labels)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()
        assert bool(value > 0) == bool(z.grad.any()) == learns


@pytest.mark.parametrize("knobs", [(0.1, 0.0, 1.0), (0.2, 5000.0, 1.0), (0.2, 7.0, 3.0)])
def test_pull_and_push_are_gradients(knobs):
    """S004 5.4: of an anchor's loss by its cosines, times tau; the mean over its positives and that
    over its negatives, then over the anchors that have a positive (the last has none)."""
    z, slopes = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double(), []
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 7])
    for c, positives, negatives in anchors(z, y):
        loss = tcl_anchor(c.requires_grad_(), positives, negatives, *knobs)
        slope = knobs[0] * torch.autograd.grad(loss, c)[0].abs()
        slopes.append(torch.stack([slope[positives].mean(), slope[negatives].mean()]))
    torch.testing.assert_close(torch.stack(pull_and_push(z, y, *knobs)), sum(slopes) / 9)


def test_carp_partitions():
    z1, z2 = two_views(7, 12)
    torch.manual_seed(0)
    assert len({carp_loss(z1, z2, 3).item() for _ in range(5)}) > 3  # a new one each time
    with pytest.raises(ValueError, match="12 prototypes .* 5 blocks"):
        carp_loss(z1, z2, 5)


@pytest.mark.parametrize("dataset", carl_carp.PRESETS)
def test_carp_presets_cut_into_blocks(dataset):
    keys = "default", dataset, "carp", f"{dataset} carp"
    preset = {k: v for key in keys for k, v in carl_carp.PRESETS.get(key, {}).items()}
    assert preset["num_prototypes"] % preset["num_blocks"] == 0


def test_lower_bound_estimate_far_from_the_origin():
    """Where |a|^2 + |b|^2 - 2ab would cancel. The rounding is in the sum, not in what is left."""
    far = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0)) + 3000
    torch.testing.assert_close(lower_bound_estimate(*far), lower_bound_estimate(*(far - 3000)))


def test_corinfomax_recursion_equals_the_loop():
    """Four batches in a row, each with a backward pass: the state moves and holds no graph."""
    criterion = CorInfoMaxLoss(5, 100.0, 0.3)
    state = [(torch.zeros(5).double(), torch.eye(5).double()) for _ in range(2)]
    for step in range(4):
        z1, z2 = two_views(6, 5, torch.float64, seed=step)
        value, expected = criterion(z1, z2), corinfomax_loop(z1, z2, 100.0, 0.3, state=state)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        value.backward()
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    expected = {"mu1": state[0][0], "R1": state[0][1], "mu2": state[1][0], "R2": state[1][1]}
    torch.testing.assert_close(before, expected)  # of float64
    criterion.eval()(z1, z2)
    assert all(torch.equal(value, before[key]) for key, value in criterion.state_dict().items())


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_ldmi_is_equation_3_6(eps):
    z1, z2 = (z.detach() for z in two_views(40, 5, torch.float64))
    torch.testing.assert_close(ldmi(z1, z2, eps), ldmi_loop(z1, z2, eps), rtol=1e-6, atol=1e-8)
    assert ldmi(z1[:2], z2[:2]).isfinite()  # fewer images than features


# --------------------------------------------------------------------------------------------------
# What every model promises


MODELS = {
    "simclr": lambda b: SimCLR(b, 12, 6),
    "byol": lambda b: BYOL(b, 12, 6),
    "barlow_twins": lambda b: BarlowTwins(b, 12, 6, loss_scale=0.1),
    "vicreg": lambda b: VICReg(b, 12, 6),
    "supcon": lambda b: SupConTCL(b, 3, "supcon", 12, 6),
    "tcl": lambda b: SupConTCL(b, 3, "tcl", 12, 6, 0.2, 7.0, 3.0),
    "tcl_self_supervised": lambda b: SupConTCL(b, 3, "tcl", 12, 6, self_supervised=True),
    "cross_entropy": lambda b: SupConTCL(b, 3, "cross_entropy", 12, 6),
    "carl": lambda b: CARLCARP(b, 8, None, 12, 6),
    "carp": lambda b: CARLCARP(b, 8, 4, 12, 6),
    "corinfomax": lambda b: CorInfoMax(b, 12, 6),
}
APART = ("byol", "barlow_twins", "vicreg", "corinfomax")  # whose views pass one by one
LABELS = torch.tensor([0, 1, 2, 0, 1])


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name](SmallEncoder()).double().train()


def make_views(count=2, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 5, 3, 8, 8, generator=rng, dtype=dtype))


def through(network, views, together):
    """Batch norm sees all views at once, or one by one. V of [B, D]."""
    if together:
        return network(torch.cat(views)).chunk(len(views))
    return [network(x) for x in views]


def projections(model, views):
    head = model.projector or model.head
    return through(nn.Sequential(model.backbone, head), views, model.concat_views)


def mean_over_pairs(loss, stacks):
    return sum(loss(a, b) for a, b in itertools.combinations(stacks, 2)) / math.comb(len(stacks), 2)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_mean_over_pairs_of_views(name, flipped):
    """SupCon and TCL take all views at once. flipped: --concat-views other than by default."""
    model, images = build(name), make_views(3)
    assert model.concat_views == (name not in APART)
    model.concat_views ^= flipped
    torch.manual_seed(5)
    loss, terms = model(images, LABELS)
    z = projections(model, images)
    stack, y, image = torch.cat(list(z)), LABELS.repeat(3), torch.arange(5).repeat(3)
    torch.manual_seed(5)
    blocks = 4, 4.0, torch.randperm(8)  # carp's, with the weight of the KL

    def scores():
        return through(model.prototypes, z, model.concat_views)

    def byol():
        p = through(model.predictor, z, model.concat_views)
        target = copy.deepcopy(model.target).train()  # which normalises by its own batch
        targets = through(target, images, model.concat_views)
        pairs = itertools.permutations(range(3), 2)
        return sum(byol_loss(p[i], targets[j]) for i, j in pairs) / 3

    expected = {
        "simclr": lambda: mean_over_pairs(nt_xent_loss, z),
        "byol": byol,
        "barlow_twins": lambda: 0.1 * mean_over_pairs(barlow_twins_loss, z),
        "vicreg": lambda: mean_over_pairs(vicreg_loss, z),
        "supcon": lambda: supcon_loss(stack, y),
        "tcl": lambda: tcl_loss(stack, y, 0.2, 7.0, 3.0),
        "tcl_self_supervised": lambda: tcl_loss(stack, image),
        "cross_entropy": lambda: F.cross_entropy(stack, y),
        "carl": lambda: mean_over_pairs(lambda a, b: carl_loss(a, b, 4.0), scores()),
        "carp": lambda: mean_over_pairs(lambda a, b: carp_loss(a, b, *blocks), scores()),
        "corinfomax": lambda: mean_over_pairs(CorInfoMaxLoss(6), z),  # one state, moved by each
    }[name]()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for value in terms.values():  # numbers, or scalars that keep no graph alive
        assert isinstance(value, float) or (value.ndim == 0 and not value.requires_grad)
    if "pull" in terms:
        knobs = {"supcon": (0.1,), "tcl": (0.2, 7.0, 3.0)}.get(name, (0.1, 5000.0, 1.0))
        both = pull_and_push(stack, image if name == "tcl_self_supervised" else y, *knobs)
        torch.testing.assert_close((terms["pull"], terms["push"]), both)
    loss.backward()
    for key, parameter in model.named_parameters():
        learns = parameter.grad is not None and parameter.grad.isfinite().all()
        assert learns == parameter.requires_grad == (not key.startswith("target.")), key


V = (1 / 2 - 1 / (2 * math.pi)) / 3  # variance after batch norm, ReLU and torch's initial weights
STARTS = {  # with default sizes: the loss of 2 x 64 views; c: the mean cosine of two projections
    "simclr": (SimCLR, lambda c: LN(127)),
    "byol": (BYOL, lambda c: 4),
    "barlow_twins": (BarlowTwins, lambda c: 2048 + (2048 + 0.0051 * 2048 * 2047) / 64),
    "vicreg": (VICReg, lambda c: 25 * 2 * V + 25 * (1 - V**0.5)),
    "supcon": (lambda b: SupConTCL(b, 8), lambda c: LN(127)),
    "tcl": (lambda b: SupConTCL(b, 8, "tcl"), lambda c: LN(127 + 5000 * 15 * E ** -(c + 10 * c))),
    "carl": (CARLCARP, lambda c: LN(100)),
    "carp": (lambda b: CARLCARP(b, 256, 4), lambda c: LN(256 / 4)),
    "corinfomax": (CorInfoMax, lambda c: 500 * (1 - c) / 64 - 2 * LN((1.63 - 0.99 * c) / 64)),
}


@pytest.mark.parametrize("name", STARTS)
def test_where_a_loss_starts(name):
    """On an untrained network, as the docstrings say."""
    torch.manual_seed(0)
    build, expected = STARTS[name]
    model, views = build(common.resnet("resnet18", "imagenet")), list(torch.randn(2, 64, 3, 16, 16))
    with torch.no_grad():
        loss, _ = model(views, torch.arange(64) % 8)
        z = F.normalize(torch.cat(list(projections(model, views))))
    c = (len(z) * z.mean(0).square().sum() - 1) / (len(z) - 1)
    assert loss.item() == pytest.approx(expected(float(c)), rel=0.1)


# --------------------------------------------------------------------------------------------------
# What one model alone does: targets, terms that are logged, knobs and ablations


@pytest.mark.parametrize("term", [None, "rc"])
@pytest.mark.parametrize("progress, decay", [(0.0, 0.9), (1 / 3, 0.925), (1.0, 1.0)])
def test_byol_moving_average(progress, decay, term):
    """tau = 1 - (1 - tau_0) (cos(pi t) + 1) / 2; target <- tau target + (1 - tau) online, of which
    it starts as a copy; of a method with a term, too."""
    model = BYOL(SmallEncoder(), 12, 6, 0.9)
    whole = common.MutualInformation(model, term, 1.0, 8) if term else model
    online = [*model.backbone.parameters(), *model.projector.parameters()]
    before = [p.clone() for p in online]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(torch.randn_like(parameter))
    whole.after_step(progress)
    for old, new, source in zip(before, model.target.parameters(), online, strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * source)


def test_byol_without_the_stop_gradient():
    model, views = BYOL(SmallEncoder(), 12, 6, ablate="stop-gradient").double(), make_views()
    z = projections(model, views)
    p = [model.predictor(z_v) for z_v in z]
    expected = 4 - 2 * F.cosine_similarity(p[0], z[1]) - 2 * F.cosine_similarity(p[1], z[0])
    values = model(views)[0], expected.mean()
    weight = model.projector[-1].weight
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, weight) for value in values))


COME_TO = {
    "simclr": lambda t: LN(9) - t["mi_bound"],
    "barlow_twins": lambda t: 0.1 * (t["loss_on_diagonal"] + t["loss_off_diagonal"]),
    "vicreg": lambda t: 25 * t["loss_inv"] + 25 * t["loss_var"] + t["loss_cov"],
    "carl": lambda t: t["loss_consistency"] + t["kl_weight"] * t["kl"],
    "carp": lambda t: t["loss_consistency"] + t["kl_weight"] * t["kl"],
}
PARTS = {
    "loss_on_diagonal": lambda a, b: barlow_twins_loss(a, b, 0.0),
    "loss_inv": lambda a, b: vicreg_loss(a, b, 1.0, 0.0, 0.0),
    "loss_var": lambda a, b: vicreg_loss(a, b, 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("name", COME_TO)
def test_terms_come_to_the_loss(name):
    model, views = build(name), make_views(3)
    loss, terms = model(views)
    getattr(model, "after_step", float)(1.0)  # what was logged does not change afterwards
    assert float(COME_TO[name](terms)) == pytest.approx(loss.item())
    for part in PARTS.keys() & terms.keys():
        expected = mean_over_pairs(PARTS[part], projections(model, views))
        assert terms[part].item() == pytest.approx(expected.item())


def test_corinfomax_terms():
    model, views = build("corinfomax"), make_views()
    _, terms = model(views)
    unit = [F.normalize(z_v, dim=1).detach() for z_v in projections(model, views)]
    spectrum = torch.linalg.eigvalsh(model.criterion.R1)[[0, 1, 2, 3, 5]]  # quantiles, of 6
    expected = (unit[0] - unit[1]).square().mean(), ldmi(*unit), *spectrum
    torch.testing.assert_close([*terms.values()], [*expected])


@pytest.mark.parametrize(
    "decay, ablate, weights",
    [(0.5, None, [4.0, 3.5, 2.75, 1.5, 1.5, 1.5]), (0.0, None, [1.5] * 6), (0.5, "kl", [0.0] * 6)],
)
def test_kl_weight_follows_equation_5_8(decay, ablate, weights):
    """b - (b - a) e / E up to E, then a; here E is a share of the run."""
    model = CARLCARP(SmallEncoder(), 8, None, 12, 6, 4.0, 1.5, decay, ablate)
    seen = [model.kl_weight.item()]
    for progress in 0.1, 0.25, 0.5, 0.75, 1.0:
        model.after_step(progress)
        seen.append(model.kl_weight.item())
    assert seen == pytest.approx(weights)


def test_heads():
    """Linear, batch norm, ReLU by their first letters. S003: batch norm for ImageNet alone."""
    heads = {"tcl": "LRL", "simclr": "LBRL", "corinfomax": "LRLRL", "vicreg": "LBRLBRL"}
    for name, letters in (heads | {"barlow_twins": "LBRLBRL"}).items():
        layers = build(name).projector
        assert "".join(type(layer).__name__[0] for layer in layers) == letters
        assert (layers[0].bias is None) == (name == "barlow_twins")
        assert (layers[-1].bias is None) == (name in ("corinfomax", "vicreg", "barlow_twins"))
    with_norm = CorInfoMax(SmallEncoder(), 12, 6, batch_norm=True).projector
    assert [type(layer).__name__[0] for layer in with_norm] == [*"LBRLBRL"]


# --------------------------------------------------------------------------------------------------
# RC, LBE, IP, MIB


def with_term(name, kind, weight=1.0, size=8):
    """The method with a term, and a copy without, to compute with."""
    torch.manual_seed(0)
    method = MODELS[name](SmallEncoder())
    plain = copy.deepcopy(method)
    return common.MutualInformation(method, kind, weight, size).train(), plain


@pytest.mark.parametrize("kind, size", [("rc", 8), ("ip", 8), ("mib", 8), ("lbe", 8), ("lbe", 128)])
@pytest.mark.parametrize("name", ["simclr", "byol"])  # together, and one by one
def test_terms_by_hand(name, kind, size, monkeypatch):
    """From the representations of the plain backbone; lbe of small images has three depths. What
    is added is differentiable, and has its weight."""
    monkeypatch.setattr(common, "NOISE", 0.0)
    model, plain = with_term(name, kind, weight=3.0, size=size)
    views = [3 * x for x in make_views(2, torch.float32)]  # so that the depths differ
    depths = [nn.Sequential(*list(plain.backbone)[:layers]) for layers in (4, 5)]
    low, high = (torch.cat(list(through(x, views, name not in APART))) for x in depths)
    h = through(plain.backbone, views, name not in APART)
    loss, terms = model(views)
    if kind == "rc":  # mean over pixels, summed over views
        pairs = zip(h, views, strict=True)
        expected = sum((model.decoder(h_v) - x).square().mean() for h_v, x in pairs)
    elif kind == "lbe":
        depths = {1: torch.cat(list(h)), 0.25: low.mean((2, 3)), 0.5: high.mean((2, 3))}
        depths = depths if size == 8 else {1: depths[1]}
        rho = 1 / 20 if size == 8 else 1 / 80
        expected = -sum(share * lower_bound_estimate(x, x, rho) for share, x in depths.items())
    else:  # over images and features
        expected = (h[0] - h[1]).square().sum() / h[0].numel()
    torch.testing.assert_close(terms[f"loss_{kind}"], expected.detach())
    without, own_terms = plain(views)
    pairs = (loss, model), (without + 3 * expected, plain)
    torch.testing.assert_close(*(value for value, _ in pairs))
    slopes = [torch.autograd.grad(value, network.backbone.conv1.weight) for value, network in pairs]
    torch.testing.assert_close(*slopes)
    assert own_terms.keys() <= terms.keys()  # the method's own stand beside it


@pytest.mark.parametrize("kind", ["lbe", "mib", "ip"])
def test_noise_reaches_the_heads_in_training_and_nobody_else(kind):
    """Neither BYOL's target nor an evaluation, and with ip there is none."""
    model, _ = with_term("byol", kind, weight=0.0)
    seen = {"heads": [], "target": []}
    model.method.projector.register_forward_pre_hook(lambda _, h: seen["heads"].append(h[0]))
    model.method.target[0].register_forward_hook(lambda *_: seen["target"].append(_[-1]))
    views = make_views(1, torch.float32) * 2
    model(views)
    difference = (seen["heads"][0] - seen["heads"][1]) / math.sqrt(2)
    assert difference.std().item() == pytest.approx(0 if kind == "ip" else 0.1, abs=0.04)
    assert torch.equal(*seen["target"])
    for grad in True, False:  # fine-tuning needs one
        with torch.set_grad_enabled(grad):
            assert torch.equal(model.eval().backbone(views[0]), model.backbone(views[0]))
    with torch.no_grad():  # nor the collapse figures, which are of a copy in train mode
        assert torch.equal(model.train().backbone(views[0]), model.backbone(views[0]))


@pytest.mark.parametrize("size", [8, 32, 100, 224])
def test_decoder_gives_views(size):
    assert common.Decoder(16, size)(torch.randn(2, 16)).shape == (2, 3, size, size)
    small = [m for m in common.Decoder(512, 32).modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in small] == [(64, 256), (256, 128), (128, 64)]
