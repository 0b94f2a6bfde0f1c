"""Method files can be taken one by one: a loss runs with nothing but torch beside it, no method
file imports another, and common.py does not know which methods there are."""

import ast
import builtins
import copy
import dis
import inspect
import itertools
import math
import sys
import types
from unittest import mock

import pytest
import test_losses
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import common

METHOD_FILES = sorted(set(ROOT.glob("*.py")) - {ROOT / "common.py", ROOT / "linear_eval.py"})
METHOD_NAMES = {path.stem for path in METHOD_FILES}
METHOD_NAMES |= {"barlow", "supcon", "tcl", "carl", "carp"}


def definitions(path):
    """name -> node of the functions and classes at a file's top level."""
    kinds = ast.FunctionDef, ast.ClassDef
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, kinds)}


def global_names(code):
    """The names from outside that a code object, or one inside it, looks up."""
    loads = [x for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {load.argval for load in loads}.union(*map(global_names, inner))
    return names - set(dir(builtins))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_what_a_method_file_needs(path):
    """It imports torch, the standard library and common alone. Its losses need only torch, and
    functions of the same file that do not need more. What they compute: test_losses.py."""
    assert set(imported_modules(path)) <= {"torch", "common", *sys.stdlib_module_names}
    defined, endings = definitions(path), ("loss", "ldmi", "pull_and_push")
    todo = [name for name in defined if name.lower().endswith(endings)]
    assert todo
    for name in todo:  # which grows
        names = global_names(compile(ast.unparse(defined[name]), name, "exec")) - {name}
        todo += [other for other in names & defined.keys() if other not in todo]
        missing = {x for x in names - defined.keys() if not x.startswith("__")} - {"torch", "F"}
        assert not missing, f"{name} needs {sorted(missing)}"


@pytest.mark.parametrize("name", test_losses.MODELS)
def test_a_model_can_be_cut_out(name):
    """With what its file defines, forward_views and mlp; gather() is as in one process."""
    model, views = test_losses.build(name), test_losses.make_views()
    modules = {"torch": torch, "F": F, "nn": nn, "copy": copy, "itertools": itertools, "math": math}
    pieces = dict(modules)
    for piece in common.mlp, common.forward_views:
        exec(inspect.getsource(piece), pieces)
    cut = modules | {"common": types.SimpleNamespace(**pieces, gather=list)}
    for node in definitions(ROOT / f"{type(model).__module__}.py").values():
        exec(ast.unparse(node), cut)
    with mock.patch.dict(vars(test_losses), cut):
        copied = test_losses.build(name)
    assert type(copied) is cut[type(model).__name__] is not type(model)
    found = []
    for either in copied, model:
        torch.manual_seed(0)  # of CARP's partition
        found.append(either(views, test_losses.LABELS))
    torch.testing.assert_close(*found, rtol=0, atol=0)


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
