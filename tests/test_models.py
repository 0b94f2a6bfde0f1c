"""The models: each forward pass against its loss and its network written out, who takes gradient
and who does not, what `after_step` does step by step, and the terms that any method can add."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from barlow_twins import BarlowTwins, barlow_twins_loss
from byol import BYOL, byol_loss
from carl_carp import CARLCARP, carl_loss, carp_loss
from corinfomax import CorInfoMax, CorInfoMaxLoss, ldmi
from simclr import SimCLR, nt_xent_loss
from supcon_tcl import SupConTCL, supcon_loss, tcl_loss
from vicreg import VICReg, vicreg_loss


class Backbone(nn.Module):
    """A small stand-in that remembers the sizes of the batches that it was given."""

    num_features = 10

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.sizes = nn.Linear(3 * 8 * 8, 10), nn.BatchNorm1d(10), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.norm(self.layer(x.flatten(1)))


MODELS = {
    "simclr": lambda b: SimCLR(b, 12, 6),
    "byol": lambda b: BYOL(b, 12, 6),
    "barlow_twins": lambda b: BarlowTwins(b, 12, 6),
    "vicreg": lambda b: VICReg(b, 12, 6),
    "supcon": lambda b: SupConTCL(b, 3, "supcon", 12, 6),
    "tcl": lambda b: SupConTCL(b, 3, "tcl", 12, 6),
    "tcl_self_supervised": lambda b: SupConTCL(b, 3, "tcl", 12, 6, self_supervised=True),
    "cross_entropy": lambda b: SupConTCL(b, 3, "cross_entropy", 12, 6),
    "carl": lambda b: CARLCARP(b, 8, None, 12, 6),
    "carp": lambda b: CARLCARP(b, 8, 4, 12, 6),
    "corinfomax": lambda b: CorInfoMax(b, 12, 6),
}
TOGETHER = ("simclr", "supcon", "tcl", "tcl_self_supervised", "cross_entropy", "carl", "carp")
LABELS = torch.tensor([0, 1, 2, 0, 1])


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name](Backbone()).double().train()


def make_views(count, batch=5):
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(count, batch, 3, 8, 8, generator=rng, dtype=torch.float64))


def network(model, views, together):
    """What backbone and first head make of the views: V of [B, D]."""
    head = next(getattr(model, name) for name in ("projector", "head") if hasattr(model, name))
    if together:
        return head(model.backbone(torch.cat(views))).chunk(len(views))
    return [head(model.backbone(x)) for x in views]


def mean_over_pairs(loss, stacks):
    values = [loss(a, b) for a, b in itertools.combinations(stacks, 2)]
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------
# What every model promises


class Stages(nn.Module):
    """A backbone with a ResNet's names, and without state that Python keeps."""

    num_features = 10

    def __init__(self):
        super().__init__()
        self.layer2, self.layer3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 3)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x):
        return self.norm(self.layer3(self.layer2(x).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    "name, term",
    [(name, None) for name in MODELS]
    + list(itertools.product(("simclr", "byol"), common.MI_WEIGHTS)),
)
def test_one_graph_for_all_steps(name, term, monkeypatch):
    """fullgraph, and nothing that changes from step to step (EMA decay, KL weight, partition) makes
    torch.compile start again; what it captured gives the loss of the model as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    losses, counters = {}, torch._dynamo.utils.counters
    for mode in "off", "default":
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = MODELS[name](Stages()).train()
        if term:
            model = common.MutualInformation(model, term, 0.1, 8)
        forward = common.compiled(model, SimpleNamespace(compile=mode))
        optimizer, losses[mode] = torch.optim.SGD(model.parameters(), 0.01), []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(4):
                torch.manual_seed(step)
                loss, _ = forward([x.float() for x in make_views(2)], LABELS)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if hasattr(model, "after_step"):
                    model.after_step((step + 1) / 4)
                losses[mode].append(loss.item())
        assert counters["stats"]["unique_graphs"] == (0 if mode == "off" else 1)
    assert losses["default"] == losses["off"] and len(set(losses["off"])) == 4


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_views_pass_together_or_apart(name, together):
    """concat_views: batch norm sees ten images at once, or five of each view."""
    model = build(name)
    assert model.concat_views == (name in TOGETHER)
    model.concat_views = together
    loss, _ = model(make_views(2), LABELS)
    assert model.backbone.sizes == ([10] if together else [5, 5])
    if name == "byol":
        assert model.target[0].sizes == model.backbone.sizes
    other = build(name)
    other.concat_views = not together
    assert loss != other(make_views(2), LABELS)[0]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_mean_over_pairs_of_views(name, views):
    """With two views: the loss itself. SupCon and TCL take all views at once."""
    model, images = build(name), make_views(views)
    torch.manual_seed(5)
    loss, terms = model(images, LABELS)
    z = network(model, images, name in TOGETHER)
    together, images_as_labels = torch.cat(list(z)), torch.arange(5).repeat(views)
    if name == "byol":
        p = [model.predictor(z_v) for z_v in z]
        targets = [model.target(x) for x in images]
        pairs = itertools.combinations(range(views), 2)
        both = [byol_loss(p[i], targets[j]) + byol_loss(p[j], targets[i]) for i, j in pairs]
        expected = sum(both) / len(both)
    elif name in ("carl", "carp"):
        scores = model.prototypes(together).chunk(views)
        torch.manual_seed(5)
        partition = torch.randperm(8)
        if name == "carl":
            expected = mean_over_pairs(lambda a, b: carl_loss(a, b, 4.0), scores)
        else:
            expected = mean_over_pairs(lambda a, b: carp_loss(a, b, 4, 4.0, partition), scores)
    elif name == "corinfomax":
        expected = mean_over_pairs(CorInfoMaxLoss(6), z)  # one state, moved by each pair in turn
    else:
        expected = {
            "simclr": lambda: mean_over_pairs(nt_xent_loss, z),
            "barlow_twins": lambda: mean_over_pairs(barlow_twins_loss, z),
            "vicreg": lambda: mean_over_pairs(vicreg_loss, z),
            "supcon": lambda: supcon_loss(together, LABELS.repeat(views)),
            "tcl": lambda: tcl_loss(together, LABELS.repeat(views)),
            "tcl_self_supervised": lambda: tcl_loss(together, images_as_labels),
            "cross_entropy": lambda: F.cross_entropy(together, LABELS.repeat(views)),
        }[name]()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert all(value.ndim == 0 and not value.requires_grad for value in terms.values())


@pytest.mark.parametrize("name", MODELS)
def test_views_pass_together_or_one_by_one(name):
    model = build(name)
    model(make_views(3), LABELS)
    assert model.backbone.sizes == ([15] if name in TOGETHER else [5, 5, 5])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_that_should_learn_gets_a_gradient(name):
    model = build(name)
    loss, _ = model(make_views(2), LABELS)
    loss.backward()
    for key, parameter in model.named_parameters():
        if key.startswith("target."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_read_only_where_they_should_be(name):
    supervised = name in ("supcon", "tcl", "cross_entropy")
    values = []
    for labels in (LABELS, LABELS.flip(0) * 0 + torch.tensor([0, 0, 1, 1, 2])):
        model = build(name)
        torch.manual_seed(5)
        values.append(model(make_views(2), labels)[0].item())
    assert (values[0] != values[1]) == supervised
    if not supervised:
        torch.manual_seed(5)
        assert build(name)(make_views(2), None)[0].isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_holds_everything(name):
    """A model that is loaded goes on as the one that was saved."""
    first, second = build(name, seed=0), build(name, seed=1)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (first, second)]
    for step in range(4):
        if step == 2:
            second.load_state_dict(first.state_dict())
        values = []
        for model, optimizer in zip((first, second), optimizers, strict=True):
            torch.manual_seed(step)
            loss, _ = model(make_views(2), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hasattr(model, "after_step"):
                model.after_step((step + 1) / 4)
            values.append(loss.item())
        assert (values[0] == values[1]) == (step >= 2)


# --------------------------------------------------------------------------------------------------
# BYOL


def test_byol_target_starts_as_a_copy_and_has_no_predictor():
    model = build("byol")
    online = [*model.backbone.parameters(), *model.projector.parameters()]
    target = list(model.target.parameters())
    assert len(online) == len(target)
    for a, b in zip(online, target, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("progress, decay", [(0.0, 0.9), (0.5, 0.95), (1.0, 1.0), (0.25, None)])
def test_byol_moving_average(progress, decay):
    """tau = 1 - (1 - tau_0) (cos(pi t) + 1) / 2; target <- tau target + (1 - tau) online."""
    model = build("byol")
    model.ema_decay = 0.9
    if decay is None:
        decay = 1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2
    with torch.no_grad():
        for parameter in [*model.backbone.parameters(), *model.projector.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    before = [p.clone() for p in model.target.parameters()]
    online = [p.clone() for p in [*model.backbone.parameters(), *model.projector.parameters()]]
    model.after_step(progress)
    for old, new, source in zip(before, model.target.parameters(), online, strict=True):
        torch.testing.assert_close(new.detach(), decay * old + (1 - decay) * source)
    for now, then in zip([*model.backbone.parameters()], online, strict=False):
        assert torch.equal(now, then)


def test_byol_with_no_decay_the_target_is_the_online_network():
    model = build("byol")
    model.ema_decay = 0.0
    with torch.no_grad():
        model.backbone.layer.weight.add_(1.0)
    model.after_step(0.0)
    torch.testing.assert_close(model.target[0].layer.weight, model.backbone.layer.weight)


def test_byol_target_normalises_by_its_own_batch():
    """In train mode, as the online network is; its running statistics come from its own forwards
    and the moving average leaves them alone."""
    model = build("byol")
    assert all(module.training for module in model.target.modules())
    norm = model.target[0].norm
    before = norm.running_mean.clone()
    model(make_views(2))
    moved = norm.running_mean.clone()
    assert not torch.equal(moved, before)
    model.after_step(0.0)
    assert torch.equal(norm.running_mean, moved)
    with torch.no_grad():
        norm.running_mean.fill_(100.0)
        norm.running_var.fill_(100.0)
    torch.manual_seed(0)
    one = model(make_views(2))[0]
    assert one.item() == pytest.approx(build("byol")(make_views(2))[0].item(), rel=1e-9)


def test_byol_ablations():
    views = make_views(2)
    torch.manual_seed(0)
    model = BYOL(Backbone(), 12, 6, ablate="predictor").double()
    assert not list(model.predictor.parameters())
    torch.manual_seed(0)
    model = BYOL(Backbone(), 12, 6, ablate="stop-gradient").double()
    loss, _ = model(views)
    z = network(model, views, False)
    p = [model.predictor(z_v) for z_v in z]
    cosines = F.cosine_similarity(p[0], z[1]) + F.cosine_similarity(p[1], z[0])
    torch.testing.assert_close(loss, (4 - 2 * cosines).mean())
    both = torch.autograd.grad(loss, model.projector[-1].weight)[0]
    by_hand = torch.autograd.grad((4 - 2 * cosines).mean(), model.projector[-1].weight)[0]
    torch.testing.assert_close(both, by_hand)


# --------------------------------------------------------------------------------------------------
# The others


def test_barlow_twins_scale_and_terms():
    torch.manual_seed(0)
    model = BarlowTwins(Backbone(), 12, 6, loss_scale=0.1).double()
    scaled, terms = model(make_views(2))
    torch.testing.assert_close(scaled, 0.1 * build("barlow_twins")(make_views(2))[0])
    torch.testing.assert_close(sum(terms.values()), 10 * scaled.detach())


def test_vicreg_terms_are_before_their_weights():
    model, views = build("vicreg"), make_views(3)
    loss, terms = model(views)
    total = 25 * terms["loss_inv"] + 25 * terms["loss_var"] + terms["loss_cov"]
    torch.testing.assert_close(total, loss.detach())
    z = network(model, views, False)
    covariance = mean_over_pairs(lambda a, b: vicreg_loss(a, b, 0.0, 0.0, 1.0), z)
    torch.testing.assert_close(terms["loss_cov"], covariance.detach())
    torch.manual_seed(0)
    ablated = VICReg(Backbone(), 12, 6, ablate="variance").double()
    loss, terms = ablated(views)
    torch.testing.assert_close(loss.detach(), 25 * terms["loss_inv"] + terms["loss_cov"])


def test_kl_weight_follows_equation_5_8():
    """b - (b - a) e / E up to E, then a; here E is a share of the run."""
    model = CARLCARP(Backbone(), 8, None, 12, 6, kl_start=4.0, kl_end=1.5, kl_decay=0.5)
    seen = [model.kl_weight.item()]
    for progress in 0.1, 0.25, 0.5, 0.75, 1.0:
        model.after_step(progress)
        seen.append(model.kl_weight.item())
    assert seen == pytest.approx([4.0, 3.5, 2.75, 1.5, 1.5, 1.5])
    at_once = CARLCARP(Backbone(), 8, None, 12, 6, kl_start=4.0, kl_end=1.5, kl_decay=0.0)
    assert at_once.kl_weight.item() == 1.5
    ablated = CARLCARP(Backbone(), 8, None, 12, 6, ablate="kl")
    ablated.after_step(0.3)
    assert ablated.kl_weight.item() == 0


@pytest.mark.parametrize("name", ["carl", "carp"])
def test_carl_and_carp_terms(name):
    model = build(name)
    torch.manual_seed(5)
    loss, terms = model(make_views(2))
    total = terms["loss_consistency"] + terms["kl_weight"] * terms["kl"]
    torch.testing.assert_close(total, loss.detach())
    assert 0 <= terms["kl"] <= math.log(8 if name == "carl" else 2)
    before = terms["kl_weight"].clone()
    model.after_step(1.0)
    assert terms["kl_weight"] == before  # what was logged does not change afterwards


def test_carp_draws_a_partition_at_every_step():
    model = build("carp")
    values = {model(make_views(2))[0].item() for _ in range(6)}
    assert len(values) > 3
    carl = build("carl")
    assert len({carl(make_views(2))[0].item() for _ in range(6)}) == 1


def test_corinfomax_terms():
    model, views = build("corinfomax"), make_views(2)
    loss, terms = model(views)
    unit = [F.normalize(z_v, dim=1) for z_v in network(model, views, False)]
    torch.testing.assert_close(terms["ldmi"], ldmi(*unit).detach())
    torch.testing.assert_close(terms["loss_inv"], (unit[0] - unit[1]).square().mean().detach())
    spectrum = torch.linalg.eigvalsh(model.criterion.R1)
    assert terms["eig_min"] == spectrum[0] and terms["eig_max"] == spectrum[-1]
    quantiles = [terms[f"eig_{q}"].item() for q in ("min", "25", "50", "75", "max")]
    assert quantiles == sorted(quantiles)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.projector)
    with_norm = CorInfoMax(Backbone(), 12, 6, batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in with_norm.projector) == 2
    ablated = CorInfoMax(Backbone(), 12, 6, ablate="logdet").double()
    loss, terms = ablated(views)
    torch.testing.assert_close(loss.detach(), 250 * terms["loss_inv"])


def test_supcon_heads():
    linear = SupConTCL(Backbone(), 3, "cross_entropy").head
    assert isinstance(linear, nn.Linear) and linear.out_features == 3
    head = SupConTCL(Backbone(), 3, "tcl", 12, 6).head
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Linear"]


# --------------------------------------------------------------------------------------------------
# RC, LBE, IP, MIB


def with_term(name, kind, weight=1.0, size=8, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name](common.resnet("resnet18", "small"))
    return common.MutualInformation(model, kind, weight, size).train()


@pytest.mark.parametrize("kind", ["rc", "lbe", "ip", "mib"])
@pytest.mark.parametrize("name", MODELS)
def test_the_term_is_added_with_its_weight(name, kind):
    views, values = [x.float() for x in make_views(2)], {}
    for weight in 0.0, 1.0, 10.0:
        model = with_term(name, kind, weight)
        torch.manual_seed(7)
        loss, terms = model(views, LABELS)
        values[weight] = loss.item()
        term = terms[f"loss_{kind}"].item()
    assert values[1.0] - values[0.0] == pytest.approx(term, rel=1e-3, abs=1e-3)
    assert values[10.0] - values[0.0] == pytest.approx(10 * term, rel=1e-3, abs=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize("name", ["simclr", "byol"])  # together, and one by one
def test_terms_by_hand(name):
    """Each term from the representations that the backbone gives in the same mode."""
    views = [x.float() for x in make_views(2)]

    def representations(model):
        backbone = model.method.backbone
        backbone._forward_hooks.clear()
        if name in TOGETHER:
            return backbone(torch.cat(views)).chunk(2)
        return [backbone(x) for x in views]

    model = with_term(name, "rc")
    _, terms = model(views)
    h = representations(model)
    errors = [(model.decoder(h_v) - x).square().mean() for h_v, x in zip(h, views, strict=True)]
    torch.testing.assert_close(terms["loss_rc"], sum(errors).detach(), rtol=1e-4, atol=1e-5)

    model = with_term(name, "ip")
    _, terms = model(views)
    h = representations(model)
    expected = sum((h[0] - h[1]).flatten() ** 2) / h[0].numel()  # over images and features
    torch.testing.assert_close(terms["loss_ip"], expected.detach(), rtol=1e-4, atol=1e-5)

    model = with_term(name, "lbe", size=128)  # large images: one depth
    torch.manual_seed(7)
    _, terms = model(views)
    mu = torch.cat(list(representations(model)))
    clean = common.lower_bound_estimate(mu, mu, 1 / 80)
    assert terms["loss_lbe"].item() == pytest.approx(-clean.item(), abs=0.3)
    assert terms["loss_lbe"].item() != -clean.item()


def test_lbe_weighs_three_depths_of_small_images():
    model, views = with_term("simclr", "lbe"), [x.float() for x in make_views(2)]
    kept = {}
    original = common.lower_bound_estimate

    def spy(mu, z, rho):
        assert rho == 0.05
        kept[mu.shape[1]] = original(mu, z)
        noise = z - mu
        assert len(mu) == 10 and 0.08 < noise.std() < 0.12  # both views, sigma .1
        return kept[mu.shape[1]]

    common.lower_bound_estimate = spy
    try:
        _, terms = model(views)
    finally:
        common.lower_bound_estimate = original
    expected = 0.25 * kept[128] + 0.5 * kept[256] + kept[512]  # of layer2, layer3, the output
    torch.testing.assert_close(terms["loss_lbe"], -expected.detach())


@pytest.mark.parametrize("kind", ["lbe", "mib"])
def test_noise_reaches_the_heads_in_training_and_nobody_else(kind):
    views, losses = [x.float() for x in make_views(2)], []
    model = with_term("simclr", kind, weight=0.0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(model(views)[0].item())
    assert losses[0] != losses[1]
    model.eval()
    with torch.no_grad():
        first, second = model.backbone(views[0]), model.backbone(views[0])
    assert torch.equal(first, second) and not model.kept
    silent = with_term("simclr", "ip", weight=0.0)
    assert silent(views)[0].item() == silent(views)[0].item()


def test_noise_is_on_the_online_side_of_byol_alone():
    model = with_term("byol", "lbe")
    assert model.method.backbone._forward_hooks and not model.method.target[0]._forward_hooks


@pytest.mark.parametrize("size", [8, 32, 64, 96, 100, 160, 224])
def test_decoder_gives_views(size):
    decoder = common.Decoder(16, size)
    assert decoder(torch.randn(2, 16)).shape == (2, 3, size, size)
    small = [m for m in common.Decoder(512, 32).layers if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in small] == [(64, 256), (256, 128), (128, 64)]


def test_the_wrapped_method_is_trained_and_stepped():
    model = with_term("byol", "rc")
    keys = model.state_dict().keys()
    assert any(k.startswith("decoder.") for k in keys) and model.backbone is model.method.backbone
    model.method.ema_decay = 0.0
    with torch.no_grad():
        model.backbone.conv1.weight.add_(1.0)
    model.after_step(0.0)
    torch.testing.assert_close(model.method.target[0].conv1.weight, model.backbone.conv1.weight)
    with_term("simclr", "rc").after_step(0.5)  # a method without after_step
