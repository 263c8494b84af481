# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels that run under its interpreter, in a process of their own: where it interprets, it cannot compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent


def failures_in_interpreter(file: str) -> str:
    """Run the tests of a file of this folder; returns what they print if one fails, else nothing."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-x",
        str(CHECKS / file),
    ]
    path = os.pathsep.join([str(CHECKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "" if ran.returncode == 0 else ran.stdout[-4000:] + ran.stderr[-2000:]
