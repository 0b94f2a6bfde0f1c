"""README.md and the docstrings against the code: every command parses with the parser of its
script, every file and folder named is there, and every flag that a script declares is read."""

import argparse
import ast
import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCRIPTS = [
    path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/[!t]*.py")])
    if 'if __name__ == "__main__":' in path.read_text().splitlines()
]
SCRIPT_IDS = [path.name for path in SCRIPTS]


class Captured(Exception):
    """Carries a script's parser out of its main."""


@functools.cache
def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parser_of(path):
    """The parser that a script builds, caught when the script would use it."""

    def capture(parser, *args, **kwargs):
        raise Captured(parser)

    module = module_of(path)
    with (
        mock.patch.object(sys, "argv", [path.name]),
        mock.patch.object(common.Parser, "parse_args", capture),
    ):
        try:
            module.main()
        except Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{path.name} reads its flags without common.Parser")


def code_in(markdown):
    """The text of code blocks, then that of inline code."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", markdown, re.M | re.S)
    rest = re.sub(r"^ *```[^\n]*\n.*?^ *```", "", markdown, flags=re.M | re.S)
    return [*blocks, *re.findall(r"`([^`\n]+)`", rest)]


def commands_in(text):
    """(script, its flags) of each `python X.py ...` and `torchrun ... X.py ...`. A remark two
    spaces after a command, with # or in parentheses, is no part of it."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"\b(?:python3?|torchrun) [^\n;&|`]*", text):
        words = shlex.split(re.sub(r"\s{2,}[#(].*", "", line))
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts:
            yield words[scripts[0]], words[scripts[0] + 1 :]


def check_command(script, flags):
    path = ROOT / script
    assert path in SCRIPTS, f"{script} is no script of this repository"
    try:
        parser_of(path).parse_args(flags)
    except common.InputError as error:
        raise AssertionError(f"{script} does not take {shlex.join(flags)}: {error}") from None
    except SystemExit as stop:
        assert stop.code == 0  # --help


def test_commands_are_found():
    """The patterns above, on a text in which all that they should see is known."""
    text = """
```bash
.venv/bin/python a.py --epochs 3 && python tests/b.py --out "my run"  # then
torchrun --nproc-per-node=2 c.py --dataset x \\
    --resume
python -m pytest
```
Then `python d.py` and, unlike python e.py, `OMP_NUM_THREADS=2 python f.py --seed 1`.
"""
    found = [command for code in code_in(text) for command in commands_in(code)]
    assert found == [
        ("a.py", ["--epochs", "3"]),
        ("tests/b.py", ["--out", "my run"]),
        ("c.py", ["--dataset", "x", "--resume"]),
        ("d.py", []),
        ("f.py", ["--seed", "1"]),
    ]


def test_a_wrong_command_is_noticed():
    assert parser_of(ROOT / "simclr.py").parse_args(["--epochs", "3"]).epochs == 3
    for script, flags in ("simclr.py", ["--epocs", "3"]), ("simclr.py", ["--epochs", "x"]):
        with pytest.raises(AssertionError, match="does not take"):
            check_command(script, flags)
    with pytest.raises(AssertionError, match="no script"):
        check_command("simclrr.py", [])


def test_readme_commands_parse():
    commands = [command for code in code_in(README.read_text()) for command in commands_in(code)]
    assert commands
    for script, flags in commands:
        check_command(script, flags)


@pytest.mark.parametrize("path", SCRIPTS, ids=SCRIPT_IDS)
def test_docstring_commands_parse(path):
    """Each script says in its docstring how it is run."""
    commands = list(commands_in(ast.get_docstring(ast.parse(path.read_text()))))
    assert str(path.relative_to(ROOT)) in [script for script, _ in commands]
    for script, flags in commands:
        check_command(script, flags)


def written_by_the_scripts(name):
    """Whether a script gives this name to a file, such as log.jsonl or linear_cifar10.json."""
    protocols = parser_of(ROOT / "linear_eval.py")._option_string_actions["--protocol"].choices
    quoted = any(f'"{name}"' in path.read_text() for path in ROOT.glob("*.py"))
    return quoted or re.fullmatch(rf"({'|'.join(protocols)})_\w+\.json", name)


def test_files_named_in_the_readme_exist():
    text, missing = README.read_text(), []
    for word in " ".join(code_in(text)).split():
        word = word.strip("\"'(),;:")
        path = re.fullmatch(r"[\w./-]+\.(py|txt|jsonl|json)|tests/[\w./-]*", word)
        if path and not word.startswith(("runs/", "data/")) and not (ROOT / word).exists():
            missing += [] if written_by_the_scripts(word) else [word]
    for target in re.findall(r"\]\(([^)#\s]+)", text):  # links and pictures
        if "://" not in target and not (ROOT / target).exists():
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("path", SCRIPTS, ids=SCRIPT_IDS)
def test_every_flag_is_read(path):
    """As args.flag, in the script, in common.py, or in the methods that the benchmark runs."""
    read, methods = set(), [ROOT / "simclr.py"] * (path.name == "benchmark.py")
    for file in path, ROOT / "common.py", *methods:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "id", getattr(node.value, "attr", None))
                if owner in ("args", "a"):  # args, self.args and, in one place, a = self.args
                    read.add(node.attr)
    declared = {action.dest for action in parser_of(path)._actions} - {"help"}
    assert declared - read == set()


def variants_of(path):
    """The words that a preset's name may hold: values of flags with choices, names of switches."""
    words = set()
    for action in parser_of(path)._actions:
        words |= set(action.choices or ()) | ({action.dest} if action.const is True else set())
    return words


@pytest.mark.parametrize("path", SCRIPTS, ids=SCRIPT_IDS)
def test_presets_set_what_the_flags_take(path):
    """The parser checks what is typed, not its defaults, among which the presets are."""
    actions = {action.dest: action for action in parser_of(path)._actions}
    for name, preset in getattr(module_of(path), "PRESETS", {}).items():
        dataset, *variant = name.split() if name.split()[0] in common.DATASETS else ("", name)
        assert name == "default" or len(variant) <= 1 and set(variant) <= variants_of(path), name
        for key, value in preset.items():
            assert key in actions, f"preset {name} sets {key}, which is no flag"
            action, several = actions[key], isinstance(value, list)
            assert several == (actions[key].nargs == "+"), f"preset {name}: {key} {value!r}"
            if isinstance(value, bool):
                assert isinstance(action, argparse.BooleanOptionalAction) or action.const is True
                continue
            for one in value if several else [value]:
                convert = action.type or type(one)
                assert convert(str(one)) == one, f"preset {name}: {key} {value!r}"
                assert action.choices is None or one in action.choices, f"preset {name}: {key}"


def test_every_flag_has_help():
    for path in SCRIPTS:
        missing = [action.dest for action in parser_of(path)._actions if not action.help]
        assert missing == [], path.name
