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
METHOD_FILES = sorted(set(ROOT.glob("*.py")) - {ROOT / "common.py", ROOT / "linear_eval.py"})
METHOD_NAMES = {path.stem for path in METHOD_FILES}
METHOD_NAMES |= {"barlow", "supcon", "tcl", "carl", "carp"}
VECTORS = "z z1 z2 p1 z2_target logits1 logits2"
SAMPLE = {name: torch.randn(4, 6) for name in VECTORS.split()}  # by the name of the argument
SAMPLE |= {"y": torch.tensor([0, 0, 1, 1]), "num_blocks": 2, "dim": 6}


def definitions(path):
    """name -> node of the functions and classes at a file's top level."""
    kinds = ast.FunctionDef, ast.ClassDef
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, kinds)}


def losses(path):
    """The functions called ..._loss, the classes called ...Loss, and what is logged beside them."""
    wanted = "loss", "ldmi", "pull_and_push"
    return [name for name in definitions(path) if name.lower().endswith(wanted)]


def cut_out(path, name):
    """A namespace with `name`, the functions of the same file that it calls, and torch."""
    defined, wanted, todo = definitions(path), [], [name]
    while todo:
        wanted.append(todo.pop())
        used = {n.id for n in ast.walk(defined[wanted[-1]]) if isinstance(n, ast.Name)}
        todo += [n for n in used if n in defined and n not in wanted + todo]
    namespace = {"torch": torch, "F": F}
    for key, node in defined.items():
        if key in wanted:
            exec(ast.unparse(node), namespace)
    return namespace


def global_names(code):
    """The names from outside that a code object, or one inside it, looks up."""
    loads = [x for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {load.argval for load in loads}.union(*map(global_names, inner))
    return names - set(dir(builtins))


def call(function):
    """Call with a sample for every argument that has no default."""
    parameters = inspect.signature(function).parameters.items()
    needed = [name for name, p in parameters if p.default is inspect.Parameter.empty]
    return function(**{name: SAMPLE[name] for name in needed})


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_losses_need_only_torch(path):
    assert losses(path)
    for name in losses(path):
        namespace = cut_out(path, name)
        loss = namespace[name]
        members = vars(loss).values() if isinstance(loss, type) else [loss]
        for function in filter(inspect.isfunction, members):
            missing = global_names(function.__code__) - namespace.keys()
            assert not missing, f"{name} needs {sorted(missing)}"
        value = call(call(loss).forward) if isinstance(loss, type) else call(loss)
        for scalar in value if isinstance(value, tuple) else [value]:
            assert scalar.shape == () and scalar.isfinite()


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_method_file_imports_only_torch_the_standard_library_and_common(path):
    assert set(imported_modules(path)) <= {"torch", "common", *sys.stdlib_module_names}


def test_common_knows_no_method():
    """It imports none, and no string and no identifier in it is a method's name, so no condition
    can be about one (docstrings and comments may mention them)."""
    assert METHOD_FILES
    assert not set(imported_modules(ROOT / "common.py")) & METHOD_NAMES
    words, keys = set(), ("value", "id", "attr", "arg", "name")
    for node in ast.walk(ast.parse((ROOT / "common.py").read_text())):
        words |= {str(getattr(node, key, "")).lower() for key in keys}
    assert "lars" in words  # a name that is there is found
    assert words & METHOD_NAMES == set()
