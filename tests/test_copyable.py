"""Method files can be taken one by one: a loss runs with nothing but torch beside it, no method
file imports another, and common.py does not know which methods there are."""

import ast
import builtins
import dis
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
METHOD_FILES = sorted(
    path for path in ROOT.glob("*.py") if path.name not in ("common.py", "linear_eval.py")
)
METHOD_NAMES = {path.stem for path in METHOD_FILES}
METHOD_NAMES |= {
    "simclr",
    "byol",
    "barlow_twins",
    "barlow",
    "vicreg",
    "supcon_tcl",
    "supcon",
    "tcl",
}
METHOD_NAMES |= {"carl_carp", "carl", "carp", "corinfomax"}
DEFINITION = (ast.FunctionDef, ast.ClassDef)

SAMPLE = {  # what a loss may ask for, by the name of the argument
    **{
        name: torch.randn(4, 6)
        for name in ("z", "z1", "z2", "p1", "z2_target", "logits1", "logits2")
    },
    "y": torch.tensor([0, 0, 1, 1]),
    "num_blocks": 2,
    "dim": 6,
}


def losses(path):
    """(file, name) of the top-level functions called ..._loss and classes called ...Loss."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, DEFINITION) and node.name.lower().endswith("loss"):
            yield path, node.name


def cut_out(path, name):
    """A namespace with `name`, the functions of the same file that it calls, and torch."""
    source = path.read_text()
    defined = {node.name: node for node in ast.parse(source).body if isinstance(node, DEFINITION)}
    wanted, todo = [], [name]
    while todo:
        wanted.append(todo.pop())
        used = {n.id for n in ast.walk(defined[wanted[-1]]) if isinstance(n, ast.Name)}
        todo += [n for n in used if n in defined and n not in wanted + todo]
    namespace = {"torch": torch, "F": F}
    for node in defined.values():
        if node.name in wanted:
            exec(ast.get_source_segment(source, node), namespace)
    return namespace


def global_names(code):
    """The global names that a code object and those inside it look up."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(global_names, inner))


def call(function):
    """Call with a sample for every argument that has no default."""
    needed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    return function(**{name: SAMPLE[name] for name in needed})


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def test_every_method_file_has_a_loss():
    assert METHOD_FILES
    assert [path.name for path in METHOD_FILES if not list(losses(path))] == []


@pytest.mark.parametrize(
    "path, name",
    [pytest.param(*loss, id=loss[1]) for path in METHOD_FILES for loss in losses(path)],
)
def test_loss_needs_only_torch(path, name):
    namespace = cut_out(path, name)
    loss = namespace[name]
    members = vars(loss).values() if isinstance(loss, type) else [loss]
    for function in filter(inspect.isfunction, members):
        missing = global_names(function.__code__) - namespace.keys() - set(dir(builtins))
        assert not missing, f"{path.name}: {name} needs {sorted(missing)}"
    value = call(call(loss).forward) if isinstance(loss, type) else call(loss)
    assert value.shape == () and value.isfinite()


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_method_file_imports_only_torch_the_standard_library_and_common(path):
    allowed = {"torch", "common"} | set(sys.stdlib_module_names)
    assert set(imported_modules(path)) <= allowed


def test_common_imports_no_method():
    assert not set(imported_modules(ROOT / "common.py")) & {path.stem for path in METHOD_FILES}


def test_common_never_asks_for_a_method():
    """No string and no identifier in common.py is a method's name, so no condition can be about one
    (docstrings and comments may mention them)."""
    words = set()
    for node in ast.walk(ast.parse((ROOT / "common.py").read_text())):
        words |= {
            str(getattr(node, key, "")).lower() for key in ("value", "id", "attr", "arg", "name")
        }
    assert "lars" in words  # a name that is there is found
    assert words & METHOD_NAMES == set()
