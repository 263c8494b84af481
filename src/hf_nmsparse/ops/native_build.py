# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels: compiled for this machine when first needed, kept in the user's cache, reached through `ctypes`.

No header of torch is needed, so compiling takes seconds and the result fits every version of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from .machine import cache_folder, processor_flags

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "native"
# Without the second line no loop with a condition on floating point numbers becomes vectors. Results are the same.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fopenmp")
_FLAGS += ("-fno-trapping-math", "-fno-math-errno")
_TIMEOUT_SECONDS = 300
_POINTER, _INTEGER, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The kernels, or `None` where they cannot be had, with one logged line that says why."""
    if os.environ.get("NMSPARSE_NATIVE") == "0":
        logger.warning("NMSPARSE_NATIVE=0: masks, optimizer, pruning and packed layers on the CPU run in plain torch")
        return None
    try:
        return load(build("-march=native"))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            "no compiled CPU kernels (%s): masks, optimizer, pruning and packed layers on the CPU run in plain torch, several "
            "times slower. A C++ compiler (g++ or clang++) in PATH, or named by CXX, is all they need",
            detail[-1] if detail else type(error).__name__,
        )
        return None


def find_compiler() -> str | None:
    """The C++ compiler that is used: what CXX names, else the first in PATH of those that are known."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def build(*architecture: str) -> Path:
    """Compile the kernels, unless that was done before, and return the library.

    Args:
        architecture (`str`): flags that say what instructions to use.

    Raises:
        OSError: if there is no compiler or the cache cannot be written.
        subprocess.SubprocessError: if the compiler fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler found")
    sources = sorted([*SOURCE_FOLDER.glob("*.cpp"), *SOURCE_FOLDER.glob("*.inc")])
    flags = (*_FLAGS, *architecture)
    runtime = _runtime(compiler)
    key = hashlib.sha256(repr((flags, runtime, compiler, platform.machine(), processor_flags())).encode())
    for source in sources:
        key.update(source.read_bytes())
    library = cache_folder() / "native" / f"kernels-{key.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(compiler, flags, runtime, library)
    return library


def _runtime(compiler: str) -> tuple[str, ...]:
    """What to link for OpenMP. Torch has a runtime loaded; a second one beside it would have its own, competing threads."""
    wanted = "__kmpc_fork_call" if "clang" in Path(compiler).name else "GOMP_parallel"
    return () if hasattr(ctypes.CDLL(None), wanted) else ("-fopenmp",)


def _compile(compiler: str, flags: tuple[str, ...], runtime: tuple[str, ...], library: Path) -> None:
    logger.info("compiling the CPU kernels, once: %s", library)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        objects = {source: Path(folder) / f"{source.stem}.o" for source in sorted(SOURCE_FOLDER.glob("*.cpp"))}
        compile_all = [[compiler, *flags, "-c", str(source), "-o", str(out)] for source, out in objects.items()]
        link = [compiler, "-shared", *map(str, objects.values()), *runtime, "-o", str(made)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, compile_all))
        _run(link)
        os.replace(made, library)  # whole or not at all, also when two processes compile at once


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)


def load(library: Path) -> ctypes.CDLL:
    """Load a library that `build` made.

    Raises:
        OSError: if it does not load on this machine.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.nmsparse_instructions.restype = ctypes.c_char_p
    loaded.nmsparse_linear24.argtypes = [*[_POINTER] * 4, _LONG, _INTEGER]
    loaded.nmsparse_unpack24.argtypes = [_POINTER, _POINTER, _INTEGER]
    loaded.nmsparse_masked_weight.argtypes = [_POINTER]
    loaded.nmsparse_adamw.argtypes = [_POINTER]
    loaded.nmsparse_packing.argtypes = [_POINTER]
    return loaded
