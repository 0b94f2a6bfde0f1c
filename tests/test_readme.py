"""Front page, journal and docstrings against the code and each other."""

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, given_to_parse_args
from test_copyable import global_names

import common

PAGES = [ROOT / "README.md", ROOT / "tests/results/README.md"]
FRONT, JOURNAL = (path.read_text() for path in PAGES)
SECTIONS = dict(part.split("\n", 1) for part in JOURNAL.split("\n## ")[1:])
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/[!t]*.py")])
SCRIPTS = [path for path in SCRIPTS if '\nif __name__ == "__main__":\n' in path.read_text()]
every_page = pytest.mark.parametrize("path", PAGES, ids=["front page", "journal"])
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def code_in(markdown):
    """The text of code blocks, then that of inline code."""
    block = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.M | re.S)
    return [*block.findall(markdown), *re.findall(r"`([^`\n]+)`", block.sub("", markdown))]


def commands_in(text):
    """(script, its flags) of each `python X.py ...` and `torchrun ... X.py ...`. A remark two
    spaces after a command, with # or in parentheses, is no part of it."""
    for line in re.findall(r"\b(?:python3?|torchrun) [^\n;&|`]*", text.replace("\\\n", " ")):
        words = shlex.split(re.sub(r"\s{2,}[#(].*", "", line))
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts:
            yield words[scripts[0]], words[scripts[0] + 1 :]


def check_commands(texts):
    """Returns the scripts that are run."""
    commands = [command for text in texts for command in commands_in(text)]
    for script, flags in commands:
        assert ROOT / script in SCRIPTS, f"{script} is no script of this repository"
        try:
            given_to_parse_args(ROOT / script)[0].parse_args(flags)
        except (common.InputError, SystemExit) as error:  # --help exits with 0
            assert str(error) == "0", f"{script} does not take {shlex.join(flags)}: {error}"
    return [script for script, _ in commands]


def tables_in(markdown):
    """The tables, each a list of rows, each a list of cells without links and bold type."""
    markdown = re.sub(r"\[([^]]*)\]\([^)]*\)|\*\*", r"\1", markdown)
    for block in re.findall(r"(?:^ *\|.*\n)+", markdown, re.M):
        yield [re.split(r" *\| *", line.strip(" |")) for line in block.splitlines()]


def table_with(column, markdown=FRONT):
    """The rows below the head of the table that has such a column."""
    return next(table[2:] for table in tables_in(markdown) if column in table[0])


def test_commands_are_found_and_wrong_ones_noticed():
    text = "```bash\n.venv/bin/python a.py --epochs 3 && python tests/b.py 'x y'  # remark\n"
    text += "torchrun --nproc-per-node=2 c.py \\\n --resume\n```\nunlike python e.py, `python d.py`"
    found = [" ".join([script, *flags]) for x in code_in(text) for script, flags in commands_in(x)]
    assert found == ["a.py --epochs 3", "tests/b.py x y", "c.py --resume", "d.py"]
    with pytest.raises(AssertionError, match="does not take"):
        check_commands(["python simclr.py --epocs 3"])


@every_page
def test_what_is_named_exists(path):
    """Commands, files (names such as log.jsonl in a script), links, pictures and headings."""
    text, missing = path.read_text(), []
    assert check_commands(code_in(text))
    written = " ".join(script.read_text() for script in ROOT.glob("*.py"))
    for word in re.findall(r"[\w./-]+\.(?:py|txt|jsonl|json)\b|tests/[\w./-]*", str(code_in(text))):
        if not word.startswith(("runs/", "data/")) and f'"{word}"' not in written:
            missing += [] if (ROOT / word).exists() else [word]
    for target, heading in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        file = path.parent / target if target else path
        titles = re.findall(r"^#+ (.*)", file.read_text(), re.M) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        if not file.exists() or heading and heading not in slugs:
            missing.append(f"{target}#{heading}")
    assert missing == []


@every_script
def test_docstring_and_flags(path):
    """The docstring has a command. Each flag has help, and is read as args.flag by the script, by
    common.py, or by the method that the benchmark runs."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert str(path.relative_to(ROOT)) in check_commands([docstring])
    flags = {flag.dest: flag.help for flag in given_to_parse_args(path)[0]._actions}
    files = path, ROOT / "common.py", *[ROOT / "simclr.py"] * (path.name == "benchmark.py")
    code = " ".join(file.read_text() for file in files)
    read = {"help", *re.findall(r"\b(?:args|a)\.(\w+)\b(?! = )", code)}
    assert flags.keys() - read == set()
    assert all(flags.values()), flags


@every_script
def test_presets_set_what_the_flags_take(path):
    """The parser checks what is typed, not its defaults, among which the presets are."""
    parser, words = given_to_parse_args(path)[0], {"default", *common.DATASETS}
    for action in parser._actions:  # variants: values of flags with choices, names of switches
        words |= set(action.choices or ()) | ({action.dest} if action.const is True else set())
    needed = [x for a in parser._actions if a.required for x in (a.option_strings[0], "x")]
    for name, preset in getattr(importlib.import_module(path.stem), "PRESETS", {}).items():
        assert set(name.split()) <= words, name
        for key, value in preset.items():
            flag = f"--{'no-' * (value is False)}{key.replace('_', '-')}"
            values = value if isinstance(value, list) else [value] * (not isinstance(value, bool))
            args = parser.parse_args([*needed, flag, *map(str, values)])
            assert getattr(args, key) == value, f"preset {name}: {key} {value!r}"


def test_the_front_page_is_short_and_begins_with_a_result():
    head = "\n".join(FRONT.splitlines()[:10])
    assert len(FRONT.split()) <= 1800
    assert list(commands_in(head)) and re.search("CPU cores|GPU", head)
    result = re.findall(r"\*\*(\d+(?= s)|\S+ %)", head)
    [row] = [row for row in table_with("s", SECTIONS["Shapes"]) if "`python simclr.py`" in row]
    assert len(result) == 2 and set(result) <= set(row)


def test_figures_of_shapes_are_those_of_the_logs():
    """The journal's table, and the line Result of each method's file."""
    runs = {}
    for config in (ROOT / "tests/results/shapes_cpu").glob("*/config.json"):
        about = json.loads(config.read_text())
        runs[about["command"].removesuffix(" --dataset shapes")] = config.parent, about["commit"]
    seconds = dict(map(str.split, (config.parents[1] / "seconds.txt").read_text().splitlines()))
    rows = [row for row in table_with("s", SECTIONS["Shapes"]) if row[6].strip("`") in runs]
    assert len(rows) == len(runs)
    for _, _, figure, _, epochs, time, command, commit in rows:
        folder, measured = runs[command.strip("`")]
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        assert figure == f"{last['knn_top1']:.1%}".replace("%", " %")
        assert int(epochs) == last["epoch"]
        assert time == f"{float(seconds[folder.name]):.0f}" and commit == measured
        script = ROOT / command.strip("`").split()[1]
        result = re.search(r"^Result:.*?\n\n", script.read_text(), re.M | re.S)[0]
        assert {figure, f"{time} s", commit} <= set(re.findall(r"[\d.]+ [%s]|[0-9a-f]{7}", result))


def test_the_front_page_quotes_the_journal():
    """The headline's figures and commits beside the same method, the others somewhere."""
    number = r"(?<!Python )\b\d+\.\d+|\b[0-9a-f]{7}\b"
    for method, _, _, shapes, cifar10, commits in table_with("kNN on shapes"):
        quoted = zip(["Shapes", "CIFAR-10"], [shapes, cifar10], commits.split(","), strict=True)
        for section, figure, commit in quoted:
            rows = [row for table in tables_in(SECTIONS[section]) for row in table]
            beside = " ".join(cell for row in rows if row[0] == method for cell in row)
            assert re.search(number, figure), f"{method}: no figure of {section}"
            known, here = re.findall(number, beside), re.findall(number, figure + commit)
            assert set(here) <= set(known), f"{method}, {section}"
    for _, published, *_ in table_with("published"):
        assert all(x in SECTIONS["What others report"] for x in published.split(", ")), published
    assert set(re.findall(number, FRONT)) <= set(re.findall(number, JOURNAL))


@functools.cache
def parts():
    """{name: source} of the functions, classes and constants of all scripts."""
    nodes = [node for path in ROOT.glob("*.py") for node in ast.parse(path.read_text()).body]
    nodes = [x for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef | ast.Assign)]
    names = [getattr(x, "name", None) or ast.unparse(x.targets[0]) for x in nodes]
    return {k: ast.unparse(x).replace("common.", "") for k, x in zip(names, nodes, strict=True)}


def test_what_may_be_copied_is_whole():
    """What a row names needs nothing else; `a_call()` is for the reader to write otherwise."""
    for what, with_it, imports in table_with("imports"):
        known = set(re.findall(r"`(\w+)(?:\(\))?`", what + with_it + imports))
        for name in re.findall(r"`(\w+)`", what + with_it):
            needed = global_names(compile(parts()[name], name, "exec")) - known - {name}
            assert [x for x in needed if not x.startswith("__")] == [], f"{what}: {name}"


def test_what_is_copied_computes_the_same():
    """Augment, LARS and knn_scores, cut out as the front page says, beside common.py's."""
    space = {"torch": torch, "F": F, "Tensor": torch.Tensor, "math": math}
    space |= {"itertools": itertools, "dataclasses": dataclasses}
    named = {what: what + with_it for what, with_it, _ in table_with("imports")}
    wanted = named["`Augment`"] + named["`LARS`"] + named["`knn_scores`"]
    for name in re.findall(r"`(\w+)`", wanted):
        exec(parts()[name], space)
    images = torch.randint(256, (4, 3, 20, 20), dtype=torch.uint8)
    features, labels, found = torch.randn(9, 5), torch.arange(9) % 3, []
    for place in space, vars(common):
        recipes = place["asymmetric"](2)
        augment = place["Augment"](recipes, 16, (0.5,) * 3, (0.2,) * 3)
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.constant_(layer.weight, 0.1)
        layer(features).sum().backward()
        place["LARS"](layer.parameters(), 0.1).step()
        views = augment(images, torch.Generator().manual_seed(0))
        scores = place["knn_scores"](features, labels, features[:2], 3)
        found.append([*views, layer.weight.detach(), scores])
    assert all(torch.equal(copied, ours) for copied, ours in zip(*found, strict=True))
