# SPDX-License-Identifier: Apache-2.0
"""The rule of direction: no room imports one above it, and importing the package stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import hf_nmsparse

ROOT = Path(hf_nmsparse.__file__).parent
FOUNDATION = {"errors", "pattern", "fingerprint", "data", "results", "files", "folder_locks", "_compat"}
# Each room and what it may import of the package.
RULES: dict[str, set[str]] = {
    "errors": set(),
    "_compat": {"errors"},
    "pattern": {"errors"},
    "fingerprint": {"errors"},
    "data": {"errors"},
    "folder_locks": {"errors"},
    "files": {"errors", "folder_locks"},
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
    "vllm_plugin": {"errors", "ops", "packed"},
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


def foreign_imports(path: Path) -> set[str]:
    """Modules of other packages, and names taken from them, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_only_compat_touches_private_modules():
    for path in ROOT.rglob("*.py"):
        for module in foreign_imports(path):
            top, *rest = module.split(".")
            private = top in ("peft", "transformers") and any(part.startswith("_") for part in rest)
            assert not private or path.name == "_compat.py", f"{path} imports private {module}"


def test_only_the_files_of_its_kernels_import_triton():
    found = {path for path in ROOT.rglob("*.py") if any(m.split(".")[0] == "triton" for m in foreign_imports(path))}
    kernels = {path for kind in ("gluon", "triton") for path in (ROOT / "ops").rglob(f"{kind}_*.py")}
    assert found and found <= kernels


def test_import_starts_no_cuda_loads_no_heavy_extras_or_kernels_and_registers_once():
    code = (
        "import sys, torch, hf_nmsparse, hf_nmsparse.evaluation, importlib\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'matplotlib', 'datasets', 'lm_eval', 'gguf', 'rich', 'typer', 'transformers.trainer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # Triton itself may be there: torch._dynamo, which PEFT imports, loads it where it is installed.
        "kernels = [name for name in sys.modules if name.startswith('hf_nmsparse') and ('gluon' in name or 'triton' in name)]\n"
        "assert not kernels, kernels\n"
        "importlib.reload(hf_nmsparse)\n"
        "from peft import PeftType\n"
        "assert list(PeftType).count('NMSPARSE') == 1\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_import_compiles_nothing(tmp_path):
    code = (
        "import hf_nmsparse\n"
        "from hf_nmsparse.ops.native_build import native_library\n"
        "assert native_library.cache_info().currsize == 0\n"
    )
    environment = {
        **os.environ,
        "NMSPARSE_CACHE": str(tmp_path / "cache"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.iterdir())


def test_the_public_names_exist():
    for name in hf_nmsparse.__all__:
        assert getattr(hf_nmsparse, name) is not None
    assert set(hf_nmsparse.__all__) <= set(dir(hf_nmsparse))
