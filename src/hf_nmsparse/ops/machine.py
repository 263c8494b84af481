# SPDX-License-Identifier: Apache-2.0
"""The processor, and the folder where this user's measured times and compiled kernels lie."""

from __future__ import annotations

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
