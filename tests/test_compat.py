# SPDX-License-Identifier: Apache-2.0
"""Private names of other packages are listed in `_compat.SURFACES`, and still are what we take them for."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft.tuners.tuners_utils import BaseTuner
from transformers import core_model_loading

import hf_nmsparse
from hf_nmsparse._compat import SURFACES, Surface

ROOT = Path(hf_nmsparse.__file__).parent
# Private names of torch and of the standard library that we use, which the list is not about.
NOT_LISTED = {
    "_C", "_apply", "_asdict", "_buffers", "_cslt_compress", "_cslt_sparse_mm", "_current_level", "_dynamo", "_functorch",
    "_is_any_autocast_enabled", "_is_tracing", "_len_torch_dispatch_stack", "_parameters", "_modules", "_replace",
    "_replicate_for_data_parallel", "_sparse_semi_structured_addmm", "_sparse_semi_structured_mm", "_version",
}  # fmt: skip


def problem_of(surface: Surface) -> str | None:
    """What has become of a surface, with what of ours depends on it; `None` if it is as we use it."""
    said = None
    try:
        found = reduce(getattr, surface.name.split("."), import_module(surface.module))
    except (ImportError, AttributeError):
        said = "is gone"
    else:
        parameters = inspect.signature(found).parameters if surface.takes else {}
        catches_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        lacking = [name for name in surface.takes.split() if name not in parameters]
        if lacking and not catches_all:
            said = f"takes ({', '.join(parameters)}), without {', '.join(lacking)}"
        source = inspect.getsource(found) if surface.mentions else ""
        if unused := [name for name in surface.mentions.split() if name not in source]:
            said = f"no longer uses {', '.join(unused)}"
    package = surface.module.partition(".")[0]
    return said and (
        f"{package} {version(package)}: {surface.module}.{surface.name} {said}. hf_nmsparse needs it for {surface.used_for}: "
        f"adapt hf_nmsparse/_compat.py to both versions, or bound {package} in pyproject.toml"
    )


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_a_private_surface_is_still_there_and_takes_what_we_pass(surface):
    if find_spec(surface.module.partition(".")[0]) is None:
        pytest.skip(f"{surface.module} is not installed")
    assert (problem := problem_of(surface)) is None, problem


def one(name: str) -> Surface:
    (surface,) = [surface for surface in SURFACES if surface.name == name]
    return surface


def test_what_moved_is_named_with_its_version_and_what_depends_on_it(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_check_merge_allowed")
    monkeypatch.setattr(core_model_loading, "apply_renamings", lambda key, renamings: key)
    monkeypatch.setattr(core_model_loading, "convert_and_load_state_dict_in_model", version)
    assert problem_of(one("BaseTuner._check_merge_allowed")) == (
        f"peft {version('peft')}: peft.tuners.tuners_utils.BaseTuner._check_merge_allowed is gone. hf_nmsparse needs it for "
        "refusing to merge LoRA over a mask: adapt hf_nmsparse/_compat.py to both versions, or bound peft in pyproject.toml"
    )
    assert "takes (key, renamings), without source_key" in problem_of(one("apply_renamings"))
    assert "no longer uses _weight_conversions" in problem_of(one("convert_and_load_state_dict_in_model"))


# --- the list is complete ---------------------------------------------------------------------------------------------
LISTED = {part for s in SURFACES for text in (s.name, s.mentions) for part in re.split(r"[. ]", text)}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_private_names(tree: ast.AST) -> set[str]:
    """Private attributes of other objects than `self`, as attributes and as strings given to getattr and its like."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return {name for name in found if private(name)}


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables, attributes of `self`, slots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        ):
            found.add(node.attr)
    return found


def test_no_other_file_touches_private_names_of_other_packages():
    trees = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py") if path.name != "_compat.py"}
    own = {name for tree in trees.values() for name in own_names(tree)}
    strangers = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees.items()
        for name in foreign_private_names(tree) - own - NOT_LISTED
    }
    assert not strangers, f"{sorted(strangers)}: touch private state in _compat.py only, and list it in SURFACES"
    assert foreign_private_names(ast.parse("config._a; getattr(model, '_b', None); self._c")) == {"_a", "_b"}


def test_all_private_names_that_compat_touches_are_listed():
    tree = ast.parse((ROOT / "_compat.py").read_text())
    enum = {
        "_name_",
        "_value_",
        "_sort_order_",
        "_member_names_",
        "_member_map_",
        "_hashable_values_",
    }  # of Python's Enum
    assert foreign_private_names(tree) - LISTED - enum == set()


def test_all_private_methods_that_our_classes_override_are_listed():
    for module in list(sys.modules):
        if not module.startswith("hf_nmsparse."):
            continue
        for _, ours in inspect.getmembers(sys.modules[module], inspect.isclass):
            if not ours.__module__.startswith("hf_nmsparse"):
                continue
            foreign = [base for base in ours.__mro__ if base.__module__.split(".")[0] in ("peft", "transformers")]
            overridden = {name for name in vars(ours) if private(name) and any(name in vars(base) for base in foreign)}
            assert overridden - {"_abc_impl"} <= LISTED, ours
