"""common.py but for its views and data: schedule and optimisers against their equations, ResNets
against torchvision's, neighbours and collapse figures against their definitions, files, presets."""

import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import ROOT, given_to_parse_args
from torch import nn

import common

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
METHODS = "simclr byol barlow_twins vicreg supcon_tcl carl_carp corinfomax".split()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_bytes(n, height, width=None, seed=0):
    shape = n, 3, height, width or height
    return torch.randint(256, shape, generator=rng(seed), dtype=torch.uint8)


def tree(folder):
    """Every file and folder below one, with what is in the files, but for locks."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.name != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def hardware(**options):
    """The resolved arguments that data and evaluation functions read."""
    settings = {"seed": 0, "batch_size": 4, "image_size": 16, "workers": 0}
    settings |= {"device": "cpu", "precision": "fp32"}
    return SimpleNamespace(**settings | options)


# --------------------------------------------------------------------------------------------------
# Schedule and optimisers


RATES = [  # step, steps of warm-up, share of the base rate
    (0, 20, 1 / 20),  # the first step of the warm-up is not lost
    (19, 20, 1.0),  # the last
    (2, 2.5, 1.0),  # it need not be whole steps
    (20, 20, 1.0),  # the first of the cosine
    (60, 20, 0.5),
    (99, 20, 0.0003855),  # the last step: sin(pi / 160)^2
    (50, 0, 0.5),
]


@pytest.mark.parametrize("step, warmup, share", RATES)
def test_learning_rate(step, warmup, share):
    assert common.learning_rate(step, 100, warmup, 3.0) == pytest.approx(3 * share, abs=1e-6)
    if step >= warmup:
        lifted = common.learning_rate(step, 100, warmup, 3.0, final=1.0)
        assert lifted == pytest.approx(1 + 2 * share, abs=1e-6)


DECAYED = {  # what one step makes of a matrix of twos without a gradient, rate .1, decay .5
    "sgd": 2 - 0.1 * 0.5 * 2,  # p - lr * decay * p
    "adamw": 2 - 0.1 * 0.5 * 2,  # the same: the decay is apart from the gradient
    "adam": 2 - 0.1,  # the decay is the gradient, whose size Adam divides out
    "lars": 2 - 0.1 * 0.001 * 2,  # so does LARS: p - lr * trust * |p| / |u| * u
}


@pytest.mark.parametrize("name", DECAYED)
def test_optimizers_decay_matrices_alone(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    knobs = {"momentum": 0.7, "weight_decay": 0.5, "precision": "fp32"}
    args = SimpleNamespace(optimizer=name, scaled_lr=0.1, **knobs)
    optimizer = common.make_optimizer(model, args)
    assert type(optimizer).__name__.lower() == name
    assert all(group.get("momentum", 0.7) == 0.7 for group in optimizer.param_groups)
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in model.parameters():
        close(p.detach(), torch.full_like(p, DECAYED[name] if p.ndim > 1 else 2.0), 1e-6)


def lars_step(p, g, m, lr, weight_decay):
    """u = g + wd p; q = eta |p| / |u|; m = .9 m + q u; p = p - lr m. In one dimension q u is g."""
    u = g
    if p.ndim > 1:
        u = g + weight_decay * p
        if p.norm() > 0 and u.norm() > 0:
            u = 0.01 * p.norm() / u.norm() * u
    m = 0.9 * m + u
    return p - lr * m, m


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_the_rule(weight_decay):
    sizes = [(5, 2, 3, 3), (7,), (2, 2), (3, 3)]
    expected = [torch.randn(*size, generator=rng(), dtype=torch.float64) for size in sizes]
    expected[2].zero_()
    params = [nn.Parameter(p.clone()) for p in expected]
    idle = nn.Parameter(torch.ones(3))  # without a gradient
    knobs = {"weight_decay": weight_decay, "trust_coefficient": 0.01}
    optimizer = common.LARS([*params, idle], 1.0, **knobs)
    buffers = [torch.zeros_like(p) for p in expected]
    for step, lr in enumerate([0.5, 2.0, 0.1]):  # which tells m + q u from m + lr q u
        optimizer.param_groups[0]["lr"] = lr
        gradients = [torch.randn(p.shape, generator=rng(step), dtype=p.dtype) for p in expected]
        gradients[3].zero_()
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            expected[i], buffers[i] = lars_step(expected[i], g, buffers[i], lr, weight_decay)
            close(p.detach(), expected[i], 1e-12)
            assert torch.equal(p.grad, g)


# --------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnet_is_torchvisions(stem):
    """With its weights, another stem put in by hand, and no `fc`."""
    model, reference = common.resnet("resnet18", stem).eval(), torchvision.models.resnet18().eval()
    reference.fc = nn.Identity()
    if stem == "small":
        reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        he = math.sqrt(2 / (64 * 3 * 3))  # fan-out, as torchvision initialises convolutions
        assert model.conv1.weight.std().item() == pytest.approx(he, rel=0.1)
    reference.load_state_dict(model.state_dict(), strict=True)
    x = noise_bytes(2, 32) / 255 - 0.5
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
    assert model.num_features == 512


PLAIN = {"kernel_size": 3, "padding": 1, "bias": False}
SMALL_MAPS = [(1, {}), (2, {}), (2, {"stride": 2}), (4, {}), (2, {"groups": 2})]
SMALL_MAPS += [(2, {"padding_mode": "circular"}), (2, {"dilation": 2, "padding": 2})]


@pytest.mark.parametrize("side, how", SMALL_MAPS)
def test_convolutions_set_up_on_a_cpu_are_the_same(side, how):
    """Values and gradients; and they are one graph."""
    model = nn.Sequential(nn.Conv2d(4, 6, **PLAIN | how)).double()
    x = torch.randn(4, 4, side, side, dtype=torch.float64, requires_grad=True)

    def outcome(network):
        y = network(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, model[0].weight))

    plain = outcome(model)
    common.set_up(model, hardware(concat_views=None, increase_mi=None, small_maps=True))
    assert (type(model[0]) is common.Conv3x3) == (how.keys() <= {"stride"})
    ours = outcome(torch.compile(model, backend="eager", fullgraph=True))
    for a, b in zip(ours, plain, strict=True):
        close(a, b, atol=1e-12)


@pytest.mark.parametrize("cores, workers", [(1, 0), (2, 0), (8, 7), (64, 16)])
def test_workers_leave_a_core_to_the_step(cores, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    args = hardware(workers=None)
    common.resolve_hardware(args)
    assert args.workers == workers


def test_unknown_resnet_is_named():
    for words in ["resnet19"], ["resnet18", "big"]:
        with pytest.raises(ValueError, match=words[-1]):
            common.resnet(*words)


# --------------------------------------------------------------------------------------------------
# What a representation is worth


@pytest.mark.parametrize("k, temperature", [(5, 0.01), (99, 1.0)])
def test_knn_equals_a_slow_loop(k, temperature):
    """exp(cosine / temperature) for the class of each of the k nearest, or of all there are."""
    bank, queries = torch.randn(60, 8, generator=rng(0)), torch.randn(23, 8, generator=rng(1))
    labels = torch.randint(0, 4, (60,), generator=rng(2))
    bank[0] = queries[0]  # exp(1 / .01) is more than a float32 holds
    expected = torch.zeros(23, 4, dtype=torch.float64)
    for i, q in enumerate(queries.double()):
        cosine = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
        for j in sorted(range(60), key=lambda j, c=cosine: -c[j])[:k]:
            expected[i, labels[j]] += math.exp(cosine[j] / temperature)
    scores = common.knn_scores(bank, labels, queries, 4, k, temperature).double()
    shares = [x / x.sum(1, keepdim=True) for x in (scores, expected)]  # a factor is left open
    torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-6)


def test_top_accuracies_by_hand():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(4, 1)
    assert common.top_accuracies(scores, torch.tensor([0, 1, 4, 5])) == (0.25, 0.75)
    few = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # fewer than five classes
    assert common.top_accuracies(few, torch.tensor([0, 0])) == (0.5, 1.0)


NEIGHBOURS = [  # --knn-k, images of each class in the bank, how many vote
    (200, [100] * 10, 50),
    (20, [100] * 10, 20),
    (200, [2] * 5 + [1] * 5, 1),
    (200, [90, 6], 3),
    (200, [0, 90, 6], 3),
]


@pytest.mark.parametrize("wanted, counts, k", NEIGHBOURS)
def test_neighbours_are_at_most_half_of_the_smallest_class(wanted, counts, k):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    bank = common.Split(torch.randn(len(labels), 4, generator=rng(0)), labels)
    test = common.Split(torch.randn(30, 4, generator=rng(1)), None)
    args = SimpleNamespace(knn_k=wanted, knn_temperature=0.1)
    votes, used = common.knn_votes(bank, test, 10, args)
    expected = common.knn_scores(bank.images, labels, test.images, 10, k, 0.1)
    assert used == k and torch.equal(votes, expected)


HEALTHY = {"epoch": 3, "h_std": 0.7, "h_rank": 90.0, "z_std": 0.9, "z_rank": 20.0, "knn_top1": 0.5}


@pytest.mark.parametrize(
    "figures, said",
    [
        ({}, ""),
        ({"epoch": 1, "z_std": 0.2}, "collapsed to a point"),
        ({"z_rank": 4.0}, "collapsed to a few directions"),
        ({"z_rank": 3.0, "epoch": 2}, ""),
        ({"z_rank": 3.0, "h_rank": 12.0}, ""),
        ({"z_rank": 3.0, "labels_used": 1.0}, ""),
        ({"knn_top1": 0.3}, "not learning beyond its start"),
        ({"knn_top1": 0.3, "epoch": 2}, ""),
    ],
)
def test_verdict(figures, said):
    found = common.verdict(HEALTHY | figures, {"untrained encoder": 0.3, "pixels": 0.6})
    assert found.startswith(said) and bool(found) == bool(said)


def test_knn_monitor():
    """Every test image is in the bank; one in ten has another label there."""
    images, labels = noise_bytes(40, 8), torch.arange(40) % 4
    train = common.Split(images, labels)
    test = common.Split(images, torch.where(torch.arange(40) < 4, labels + 1, labels) % 4)
    data = common.Dataset("noise", list("abcd"), train, test, train, 8, MEAN, STD)
    args = hardware(image_size=8, knn_bank=0, knn_k=1, knn_temperature=0.1)
    assert common.knn_monitor(nn.Flatten(), data, args) == 0.9


def test_encode_is_the_backbone_in_eval_mode():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    split, data = common.Split(noise_bytes(10, 16), torch.zeros(10)), hardware(mean=MEAN, std=STD)
    features = common.encode(backbone, split, hardware(), data, batch_size=3)
    assert backbone.training and backbone[1].running_mean.eq(0).all()
    with torch.no_grad():
        close(features, backbone.eval()(TF.normalize(split.images / 255, MEAN, STD)))


@pytest.mark.parametrize("n, width", [(64, 20), (20, 64)])
def test_collapse_figures_equal_their_definitions(n, width):
    features = torch.randn(n, width, generator=rng(), dtype=torch.float64) + 0.5
    unit = features / features.norm(dim=1, keepdim=True)
    spread = ((unit - unit.mean(0)).square().sum(0) / (n - 1)).sqrt().mean() * math.sqrt(width)
    singular = torch.linalg.svdvals(features - features.mean(0))
    p = singular / singular.sum()
    rank = math.exp(-sum(float(q) * math.log(q) for q in p if q > 1e-9))
    figures = common.collapse_figures(features)
    assert figures["std"] == pytest.approx(float(spread), rel=1e-5)
    assert figures["rank"] == pytest.approx(rank, rel=1e-5)
    for value in 0.3, 0.0:  # collapsed to a point
        figures = common.collapse_figures(torch.full((n, width), value))
        assert figures == pytest.approx({"std": 0, "rank": 1}, abs=1e-2)


# --------------------------------------------------------------------------------------------------
# Random numbers and files


def test_a_seed_depends_on_all_its_arguments():
    words = (0, "order", 1), (1, "order", 1), (0, "augment", 1), (0, "order", 2)
    seeds = [common.generator(*some).initial_seed() for some in words]
    assert len(set(seeds)) == 4 and seeds[0] == common.generator(*words[0]).initial_seed()


def test_atomic_write(tmp_path, monkeypatch):
    path, previous, order = tmp_path / "file", tmp_path / "previous", mock.Mock()
    order.fsync.side_effect, order.replace.side_effect = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", order.fsync)
    monkeypatch.setattr(os, "replace", order.replace)
    for content in b"old", b"new":
        with common.atomic_write(path, previous) as file:
            file.write(content)
            assert path.exists() == (content == b"new")  # no half-written file has the name
    names = [call[0] for call in order.mock_calls]
    assert names == ["fsync", "replace"] * 2 + ["replace"]  # named when all is on disk
    with pytest.raises(common.InputError), common.atomic_write(path, previous) as file:
        file.write(b"newer")
        raise RuntimeError  # how torch.save says that the disk is full
    assert tree(tmp_path) == {path: b"new", previous: b"old"}


# --------------------------------------------------------------------------------------------------
# Command line


LAID = [  # what is typed, which presets count, and the --lr, --dim and --k that they give
    ("", "default", (1, 1, 0)),
    ("--dataset pets --method b", "default + pets + b + pets b", (5, 2, 4)),
    ("--dataset x/pets.pt --alone", "default + pets + alone", (1, 4, 3)),
    ("--method=b --alone --lr 9", "default + b + alone", (9, 2, 3)),
    ("--dataset x/pets", "default", (1, 1, 0)),
]


@pytest.mark.parametrize("argv, keys, values", LAID)
def test_presets_are_laid_over_each_other(argv, keys, values, capsys):
    parser = common.Parser("A script.")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--method", default="a")
    parser.add_argument("--alone", action="store_true")
    for flag in "--lr", "--dim", "--k":
        parser.add_argument(flag, type=float, default=0.0)
    presets = {"default": {"lr": 1.0, "dim": 1.0}, "b": {"dim": 2.0}, "alone": {"k": 3.0}}
    presets |= {"pets": {"dim": 4.0, "k": 4.0}, "pets b": {"lr": 5.0}}
    args = common.parse_args(parser, presets, "method", "alone", argv=argv.split())
    assert (args.lr, args.dim, args.k) == values
    assert capsys.readouterr().out == f"settings: preset {keys}; given: {argv or 'nothing'}\n"


@pytest.mark.parametrize("method", METHODS)
def test_help_prints_what_will_be_used(method, monkeypatch, capsys):
    parser, presets, *variants = given_to_parse_args(ROOT / f"{method}.py")
    for name in "batch_size", "optimizer", "lr", "weight_decay":  # each method has to say them
        assert name in presets["default"] and parser.get_default(name) is None
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        common.parse_args(parser, presets, *variants, argv=["--dataset", "shapes", "--help"])
    flags = re.split(r"\n+(?=  -|\S)", capsys.readouterr().out)  # and titles of groups
    titles = [title for title in flags if title.endswith(":")]
    assert titles[0] == "most used:" and titles[-1] == "method:"
    lines = {flag.split()[0]: flag for flag in flags}
    for name, value in (presets["default"] | presets["shapes"]).items():
        flag = lines[f"--{name.replace('_', '-')}"]
        assert flag.rstrip().endswith(f"(default: {value})")
    monkeypatch.setenv("COLUMNS", "80")
    assert len(parser.format_help().splitlines()) <= 2 * 50  # two screens


PREPARED = [  # what is typed for simclr.py on toy.pt in batches of 16; what follows from it
    ("", {"compile": False, "mi_weight": None, "device": "cpu", "warmup_epochs": 10}),
    ("", {"image_size": 16, "stem": "small", "out": "runs/simclr_toy_resnet18"}),
    ("--arch resnet50 --seed 3", {"out": "runs/simclr_toy_resnet50", "seed": 3}),
    ("--image-size 65", {"image_size": 65, "stem": "imagenet"}),
    ("--lr 0.8", {"scaled_lr": 0.05}),  # times 16 / 256
    ("--lr 0.8 --lr-scaling sqrt", {"scaled_lr": 0.2}),
    ("--lr 0.8 --lr-scaling none", {"scaled_lr": 0.8}),
    ("--increase-mi mib", {"mi_weight": 5e-4}),
    ("--increase-mi mib --mi-weight 0", {"mi_weight": 0}),
    ("--epochs 40", {"warmup_epochs": 4}),  # a warm-up is meant for a long run
    ("--epochs 40 --warmup-epochs 10", {"warmup_epochs": 10}),
]


@pytest.mark.parametrize("words, expected", PREPARED)
def test_prepare_fills_in_what_follows(toy_file, words, expected):
    parser, presets, *_ = given_to_parse_args(ROOT / "simclr.py")
    argv = ["--dataset", str(toy_file), "--batch-size", "16", "--device", "cpu", *words.split()]
    args = common.parse_args(parser, presets, argv=argv)
    common.prepare(args, "simclr")
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)
    first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=rng(args.seed)))  # the initial weights'
