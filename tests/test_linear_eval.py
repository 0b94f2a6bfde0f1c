"""linear_eval.py: what it prints and writes, that the encoder comes out as it went in, that nothing
is chosen on the test images, which files it takes for an encoder, and a problem that it must solve.
"""

import json
from pathlib import Path

import pytest
import torch
from test_scripts import CPU, Payload, call, fail, folder, listing, load, store, succeed, toy

import common
import linear_eval

__all__ = ["folder"]  # a fixture
PROTOCOLS = {
    "linear": ["--protocol", "linear", "--epochs", "2"],
    "cached": ["--protocol", "linear", "--epochs", "2", "--cached"],
    "knn": ["--protocol", "knn"],
}


def encoder_dict(arch="resnet18", **change):
    """What a training script saves, of an encoder whose batch-norm statistics are not trivial."""
    torch.manual_seed(0)
    encoder = common.resnet(arch, "imagenet")
    encoder(torch.rand(8, 3, 16, 16) - 0.5)
    about = {"arch": arch, "stem": "imagenet", "image_size": 16, "method": "m", "dataset": "toy"}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3, "epoch": 7, "config": {}}
    return {"state_dict": encoder.state_dict()} | about | change


@pytest.fixture
def argv(folder):
    """Flags for an encoder and a dataset that are all right, in an empty folder."""
    store(encoder_dict(), "encoder.pt")
    store(toy(), "toy.pt")
    return ["--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU]


def evaluate(*argv):
    """The table and the figures that are printed."""
    *table, last = succeed("linear_eval", *argv).splitlines()
    return table, json.loads(last)


# --------------------------------------------------------------------------------------------------
# What it prints and writes


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_output(protocol, argv, folder):
    before = listing(folder)
    table, figures = evaluate(*argv, *PROTOCOLS[protocol])
    name = "knn" if protocol == "knn" else "linear"
    assert (figures["protocol"], figures["dataset"], figures["split"]) == (name, "toy", "test")
    assert (figures["method"], figures["epoch"], figures["images"]) == ("m", 7, 32)
    measured = {"knn_top1"} if protocol == "knn" else {"knn_top1", "top1", "top5"}
    assert measured <= figures.keys() and all(0 <= figures[key] <= 1 for key in measured)
    assert figures["knn_top5"] >= figures["knn_top1"]
    assert protocol == "knn" or figures["top5"] >= figures["top1"]
    rows = {line.split()[0].strip(","): line.split()[-2:] for line in table[-4:]}
    assert rows["top-1"] == ["top-1", "top-5"] and rows["chance"] == ["25.00%", "100.00%"]
    assert rows["kNN"][0] == f"{figures['knn_top1']:.2%}"
    assert protocol == "knn" or rows["linear"][0] == f"{figures['top1']:.2%}"
    written = folder / f"{name}_{'cached_' if protocol == 'cached' else ''}toy.json"
    assert json.loads(written.read_text()) == figures
    assert listing(folder).keys() - before.keys() == {written}


def test_an_untrained_encoder(argv, folder):
    argv[argv.index("encoder.pt")] = "random"
    first, second, other = (
        evaluate(*argv, "--protocol", "knn", "--stem", stem)[1]
        for stem in ("imagenet", "imagenet", "auto")
    )
    assert (first["method"], first["epoch"]) == ("untrained", 0)
    assert first["knn_top1"] == second["knn_top1"]
    assert other["config"]["stem"] == "small"  # what auto means for 16 pixels
    (written,) = folder.glob("runs/*/knn_toy.json")
    assert json.loads(written.read_text()) == other


def test_another_image_size(argv):
    table, figures = evaluate(*argv, *PROTOCOLS["linear"], "--image-size", "32")
    assert "32 pixels" in "\n".join(table) and figures["config"]["image_size"] == 32
    _, at_16 = evaluate(*argv, *PROTOCOLS["linear"])
    assert at_16["config"]["image_size"] == 16


# --------------------------------------------------------------------------------------------------
# That the encoder comes out as it went in


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_encoder_is_not_changed(protocol, argv, folder, monkeypatch):
    loaded = []

    def remember(*args, **kwargs):
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", remember)
    before = Path("encoder.pt").read_bytes()
    evaluate(*argv, *PROTOCOLS[protocol])
    assert Path("encoder.pt").read_bytes() == before
    ((encoder, _),) = loaded
    expected = encoder_dict()["state_dict"]
    assert encoder.state_dict().keys() == expected.keys()
    for key, value in encoder.state_dict().items():  # parameters and batch-norm statistics
        assert torch.equal(value, expected[key]), key
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_encoder_left_in_training_mode_is_noticed(protocol, argv, folder, monkeypatch):
    def in_training_mode(*args, **kwargs):
        encoder, info = original(*args, **kwargs)
        encoder.train()
        encoder.train = lambda mode=True: encoder  # and eval() calls train(False)
        return encoder, info

    original = linear_eval.load_encoder
    monkeypatch.setattr(linear_eval, "load_encoder", in_training_mode)
    before = listing(folder)
    with pytest.raises(RuntimeError, match="encoder changed"):
        call("linear_eval", *argv, *PROTOCOLS[protocol])
    assert listing(folder) == before


# --------------------------------------------------------------------------------------------------
# What the figures are measured on


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_validation_never_touches_the_test_images(protocol, argv, folder):
    """The same figures whatever the test split holds, and if there is none."""
    data, found = toy(), []
    noise = {"images": 255 - data["test"]["images"], "labels": data["test"]["labels"].flip(0)}
    for test in data["test"], noise, None:
        store(data | {"test": test}, "toy.pt")
        table, figures = evaluate(*argv, *PROTOCOLS[protocol], "--validation-fraction", "0.25")
        assert figures["split"] == "validation" and "16 validation images" in "\n".join(table)
        found.append({key: figures.get(key) for key in ("top1", "top5", "knn_top1", "images")})
    assert found[0] == found[1] == found[2] and found[0]["images"] == 16


def test_held_out_images_are_not_trained_on(argv):
    """In noise the nearest neighbour of an image tells its class only where it is the image."""
    _, figures = evaluate(*argv, *PROTOCOLS["knn"], "--knn-k", "1", "--validation-fraction", "0.25")
    assert figures["knn_top1"] < 0.75


def separable():
    """Four classes of plain images, each with a brightness of its own."""
    data, rng = toy(), torch.Generator().manual_seed(0)
    for key in ("train", "test"):
        labels = data[key]["labels"]
        level = 20 + 70 * labels + torch.randint(-5, 6, labels.shape, generator=rng)
        data[key]["images"] = level.byte()[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return data


def test_a_separable_problem_is_solved(argv):
    store(separable(), "toy.pt")
    _, figures = evaluate(*argv, "--cached")
    assert (figures["top1"], figures["top5"]) == (1, 1)


def test_the_figure_is_the_last_epochs(argv, monkeypatch):
    """A last step far uphill spoils it; the best epoch, or any before, would show nothing."""
    store(separable(), "toy.pt")
    original = common.learning_rate

    def up_at_the_end(step, total, *rest):
        return original(step, total, *rest) if step < total - 1 else -1e6

    monkeypatch.setattr(common, "learning_rate", up_at_the_end)
    _, figures = evaluate(*argv, "--cached")
    assert figures["top1"] < 0.5


def test_figures_need_a_test_split(argv, folder):
    store({key: value for key, value in toy().items() if key != "test"}, "toy.pt")
    before = listing(folder)
    assert "no test split" in fail("linear_eval", *argv)
    assert listing(folder) == before


# --------------------------------------------------------------------------------------------------
# What is an encoder


def test_load_encoder_takes_both_files_of_a_run(folder):
    argv = ["--dataset", store(toy(), "toy.pt"), *CPU, "--stem", "imagenet", "--knn-every", "0"]
    succeed("simclr", *argv, "--epochs", "1", "--batch-size", "64", "--out", "run")
    images = torch.rand(4, 3, 16, 16)
    pairs = [linear_eval.load_encoder(f"run/{name}.pt") for name in ("encoder", "checkpoint")]
    (encoder, info), (other, other_info) = pairs
    assert not encoder.training and not other.training
    with torch.no_grad():
        assert torch.equal(encoder(images), other(images))
        assert encoder(images).shape == (4, 512)
    assert info == other_info
    known = {"arch": "resnet18", "stem": "imagenet", "image_size": 16, "epoch": 1}
    known |= {"method": "simclr", "dataset": "toy"}
    assert {key: info[key] for key in known} == known
    assert info["mean"] == load("run/encoder.pt")["mean"] and len(info["std"]) == 3


def test_overrides_win(folder):
    store(encoder_dict(stem="small", mean=[0.1] * 3), "encoder.pt")
    with pytest.raises(common.InputError):
        linear_eval.load_encoder("encoder.pt")
    given = {"stem": "imagenet", "mean": [0.2] * 3, "image_size": 24}
    encoder, info = linear_eval.load_encoder("encoder.pt", **given)
    assert {key: info[key] for key in given} == given and info["std"] == [0.25] * 3
    assert encoder.conv1.kernel_size == (7, 7)


def without(key):
    saved = encoder_dict()
    del saved[key]
    return saved


def other_weights(**change):
    """encoder.pt with some of the weights replaced, or removed where they are None."""
    saved = encoder_dict()
    for key, value in change.items():
        saved["state_dict"][key.replace("__", ".")] = value
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if v is not None}
    return saved


NO_ENCODER = {
    "text": lambda: b"These are no weights.\n",
    "nothing": lambda: b"",
    "code": lambda: encoder_dict() | {"config": Payload()},
    "no arch": lambda: without("arch"),
    "no weights": lambda: without("state_dict"),
    "a weight missing": lambda: other_weights(bn1__running_mean=None),
    "a weight too many": lambda: other_weights(fc__weight=torch.zeros(4, 512)),
    "a wrong shape": lambda: other_weights(conv1__weight=torch.zeros(64, 3, 3, 3)),
    "a weight that is none": lambda: other_weights(conv1__weight="heavy"),
    "weights by number": lambda: encoder_dict(state_dict={0: torch.zeros(2)}),
    "model by number": lambda: without("state_dict") | {"model": {0: torch.zeros(2)}},
    "another architecture's": lambda: encoder_dict(arch="resnet34") | {"arch": "resnet18"},
    "unknown architecture": lambda: encoder_dict() | {"arch": "resnet19"},
    "arch of a wrong type": lambda: encoder_dict() | {"arch": {}},
    "stem of a wrong type": lambda: encoder_dict() | {"stem": 3},
    "image size of a wrong type": lambda: encoder_dict() | {"image_size": "large"},
    "mean of one channel": lambda: encoder_dict() | {"mean": [0.5]},
    "std of zero": lambda: encoder_dict() | {"std": [0.0] * 3},
    "a plain dict": lambda: {"state": 1},
    "a bare state_dict": lambda: encoder_dict()["state_dict"],
    "a tensor": lambda: torch.zeros(3),
    "a list": lambda: [1, 2],
}


@pytest.mark.parametrize("kind", NO_ENCODER)
def test_what_is_no_encoder_is_refused(kind, folder):
    store(toy(), "toy.pt")
    value = NO_ENCODER[kind]()
    if isinstance(value, bytes):
        Path("encoder.pt").write_bytes(value)
    else:
        store(value, "encoder.pt")
    before = listing(folder)
    line = fail("linear_eval", "--checkpoint", "encoder.pt", "--dataset", "toy.pt", *CPU)
    assert "encoder.pt" in line
    with pytest.raises(common.InputError, match="encoder.pt"):
        linear_eval.load_encoder("encoder.pt")
    assert listing(folder) == before  # so no payload ran, either


BAD_FLAGS = {
    "--checkpoint nowhere.pt": "nowhere.pt: no such file",
    "--protocol logistic": "logistic",
    "--protoco knn": "--protoco",
    "--epochs 0": "--epochs",
    "--lr -1": "--lr",
    "--crop-min 1.5": "--crop-min",
    "--validation-fraction 1": "--validation-fraction",
    "--validation-fraction 0.01": "--validation-fraction",
    "--validation-fraction 2": "--validation-fraction",
    "--image-size 4": "--image-size",
    "--dataset nowhere": "nowhere",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, argv, folder):
    before = listing(folder)
    assert BAD_FLAGS[flags] in fail("linear_eval", *argv, *flags.split())
    assert listing(folder) == before
