# SPDX-License-Identifier: Apache-2.0
"""The processor, and the folder where this user's measured times and compiled kernels lie."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where tables and compiled kernels of this user lie; NMSPARSE_CACHE moves it.

    Raises:
        OSError: if this user has no home.
    """
    named = os.environ.get("NMSPARSE_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "hf_nmsparse"
    except RuntimeError as error:
        raise OSError(f"{error} name a cache folder with NMSPARSE_CACHE") from error


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform  # slow on some systems, and only where /proc does not say

        return platform.processor() or platform.machine()


def processor_flags() -> str:
    """What this processor can do. (Machines that share a home folder must not share a library.)"""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return cpu_name()


def keep_freed_memory() -> bool:
    """Have the C library keep the memory that this process frees, for its next tensors. (glibc; elsewhere it does nothing.)

    A training step frees and takes memory of the size of all weights and gradients. By default glibc returns it to the
    system, which then has to clear every page again: on a virtual machine that can take as long as computing what is
    written there. It concerns the whole process, so programs call it, not libraries.

    Returns:
        whether the C library has taken note.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(most_mappings, 0))
