# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels compiled for several instruction sets, and calls of them beside memory that nothing may touch."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_nmsparse.ops import machine, native_build

BUILDS = {"native": ("-march=native",), "avx2": ("-march=haswell",), "plain": ("-march=x86-64",)}
WITHOUT_TILES = {"without tiles": ("-march=native", "-mno-amx-tile")}
_ALL = BUILDS | WITHOUT_TILES
_PAGE, _areas = mmap.PAGESIZE, []


def built(name: str) -> Path:
    """The library for an instruction set by name; skips the test where it cannot be compiled or run."""
    if name == "avx2" and "avx2" not in machine.processor_flags():
        pytest.skip("this processor has no AVX2")
    try:
        return native_build.build(*_ALL[name])
    except (OSError, subprocess.SubprocessError):
        pytest.skip(f"no compiler for {_ALL[name]}")


def put_in_place(name: str, monkeypatch: pytest.MonkeyPatch, *modules: object) -> None:
    """The kernels for an instruction set take the place of those of this machine in `modules`."""
    library = native_build.load(built(name))
    for module in modules:
        monkeypatch.setattr(module, "native_library", lambda: library)


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where a page begins that nothing may read or write. (Linux)"""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // _PAGE) + 1
    area = mmap.mmap(-1, pages * _PAGE)
    _areas.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + (pages - 1) * _PAGE), _PAGE, 0) == 0
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=(pages - 1) * _PAGE - size)
    return copy.view(tensor.shape).copy_(tensor)


def run_beside_forbidden_pages(script: str, name: str) -> subprocess.CompletedProcess:
    """Run `script` in a process of its own, which a wrong access ends, with the library of an instruction set in its argv."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, str(built(name))]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
