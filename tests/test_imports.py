# SPDX-License-Identifier: Apache-2.0
"""The rule of direction: no room imports one above it, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_nmsparse

ROOT = Path(hf_nmsparse.__file__).parent
FOUNDATION = {"errors", "pattern", "fingerprint", "data", "results", "files", "_compat"}
# Each room and what it may import of the package.
RULES: dict[str, set[str]] = {
    "errors": set(),
    "_compat": {"errors"},
    "pattern": {"errors"},
    "fingerprint": {"errors"},
    "data": {"errors"},
    "files": {"errors"},
    "results": {"errors", "files", "pattern"},
    "codec": {"errors", "pattern"},
    "ops": {"errors", "pattern", "codec"},
    "criteria": FOUNDATION | {"ops"},
    "relaxations": FOUNDATION | {"ops"},
    "adapter": FOUNDATION | {"ops", "relaxations", "criteria"},
    "packed": FOUNDATION | {"ops"},
    "evaluation": FOUNDATION,
    "report": FOUNDATION,
    "hub": FOUNDATION | {"ops", "relaxations", "criteria", "adapter", "packed"},
    "training": FOUNDATION | {"ops", "relaxations", "criteria", "adapter", "packed", "hub"},
}


def package_imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, whether at its top or inside a function."""
    package = ("hf_nmsparse", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            else:
                base = (node.module or "").split(".")
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "hf_nmsparse" and len(name) > 1}
    return found


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_no_room_imports_one_above_it():
    breaches = []
    for path in sorted(ROOT.rglob("*.py")):
        room = room_of(path)
        if room in ("cli", "__init__"):
            continue
        for imported in package_imports(path) - RULES[room] - {room}:
            breaches.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not breaches


def test_every_room_has_a_rule():
    rooms = {room_of(path) for path in ROOT.rglob("*.py")}
    assert rooms - {"cli", "__init__"} == set(RULES)


def test_the_test_sees_relative_imports():
    assert "ops" in package_imports(ROOT / "hub" / "masks.py")
    assert "fingerprint" in package_imports(ROOT / "adapter" / "state.py")


def test_only_the_op_files_of_accelerators_import_triton_and_only_compat_touches_private_modules():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                top, *rest = module.split(".")
                assert top != "triton", f"{path} imports triton"
                private = top in ("peft", "transformers") and any(part.startswith("_") for part in rest)
                assert not private or path.name == "_compat.py", f"{path} imports private {module}"


def test_import_starts_no_cuda_loads_no_heavy_extras_and_registers_once():
    code = (
        "import sys, torch, hf_nmsparse, importlib\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'matplotlib', 'datasets', 'gguf', 'triton', 'rich', 'typer', 'transformers.trainer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "importlib.reload(hf_nmsparse)\n"
        "from peft import PeftType\n"
        "assert list(PeftType).count('NMSPARSE') == 1\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_the_public_names_exist():
    for name in hf_nmsparse.__all__:
        assert getattr(hf_nmsparse, name) is not None
    assert set(hf_nmsparse.__all__) <= set(dir(hf_nmsparse))
