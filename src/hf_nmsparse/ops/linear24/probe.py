# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel works on this machine: run once, on a small case whose result is exact, before it is chosen.

Triton needs a C compiler and an assembler that knows the GPU, and PyTorch has some products for some GPUs only. What is
lacking shows when a kernel runs; then another kernel has to take over, and no call of the user's may fail.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from textwrap import shorten

import torch

from ...codec import SCALE_COLUMNS, pack_nibbles
from .unpacked import UNPACKED
from .weight import Weight24

logger = logging.getLogger(__name__)

_TOKENS, _ROWS, _COLUMNS = 8, 64, 2 * SCALE_COLUMNS  # what every kernel takes
_LONGEST_REASON = 300
ADVICE = (
    "; slower ways take its place. To compile, Triton needs a C compiler (gcc or clang, or the variable CC), the headers of "
    "Python, and to know this GPU"
)
_known: dict[tuple[str, torch.device, torch.dtype, str], bool] = {}


def works(
    name: str, run: Callable, device: torch.device, dtype: torch.dtype, kind: str = "dense", ours: bool = True
) -> bool:
    """Whether a kernel runs and is right on a device, tried once a process for each dtype and kind of values.

    The first answer takes the seconds that Triton needs to compile the kernel. The call itself may want it compiled again,
    for its own number of columns; Triton's cache on disk spares later processes both.

    Nothing is tried while a CUDA graph is captured, since loading code and comparing results would break the capture. What
    has not been tried by then is declined: at worst that graph unpacks weights, which is slow and right, where a kernel that
    fails would end the capture. A call before the capture, which PyTorch asks for anyway, makes the answer known.

    Args:
        name (`str`): of the kernel.
        run (`Callable`): `(x, weight, bias) -> y`, as in `Kernel24`.
        device (`torch.device`), dtype (`torch.dtype`): of x.
        kind (`str`): of the values, one of `VALUE_KINDS`.
        ours (`bool`): whether a failure is news to the user and logged as a warning, else at level DEBUG.
    """
    case = (name, device, dtype, kind)
    if case not in _known:
        level = logging.WARNING if ours else logging.DEBUG
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _say_untried(*case, level)
            return False
        reason = failure(lambda: _is_right(run, *small_case(device, dtype, kind)))
        if reason:
            advice = ADVICE if ours else ""
            logger.log(level, "linear_24: %s is not used on %s for %s, %s values: %s%s", *case, reason, advice)
        _known[case] = reason is None
    return _known[case]


def failure(right: Callable[[], bool]) -> str | None:
    """What is wrong with a kernel, if anything, in one line, from a trial that says whether its result is right."""
    try:
        if right():
            return None
    except torch.OutOfMemoryError:
        raise  # it says nothing about the kernel
    except _failures() as error:
        message = getattr(error, "error_message", None) or str(error)  # Triton's, without the source of the kernel
        return shorten(f"{type(error).__name__}: {message}", _LONGEST_REASON)
    return "its result is wrong, please report that"


def _is_right(run: Callable, x: torch.Tensor, weight: Weight24, bias: torch.Tensor) -> bool:
    with torch.autocast(x.device.type, enabled=False):
        return torch.equal(run(x, weight, bias), UNPACKED.run(x, weight, bias))


def _failures() -> tuple[type[Exception], ...]:
    """What torch and Triton raise where something is lacking, a bug of theirs or ours included.

    RuntimeError: torch, the CUDA driver, and Triton where it finds no compiler; OSError and SubprocessError: a compiler or
    an assembler that does not start, or fails; AssertionError: Triton without libcuda; ImportError and AttributeError: a
    launcher that does not load, or a release in which Gluon, which is experimental, has changed.
    """
    common = (RuntimeError, OSError, subprocess.SubprocessError, AssertionError, ImportError, AttributeError)
    triton = sys.modules.get("triton.errors")  # where it was not imported, nothing of it was raised
    return (*common, triton.TritonError) if triton else common


@lru_cache(maxsize=64)
def _say_untried(name: str, device: torch.device, dtype: torch.dtype, kind: str, level: int) -> None:
    logger.log(
        level,
        "linear_24: %s has not run on %s for %s, %s values yet, so the CUDA graph that is being captured does without it; "
        "call the model once before the capture",
        name,
        device,
        dtype,
        kind,
    )


def small_case(
    device: torch.device, dtype: torch.dtype, kind: str = "dense"
) -> tuple[torch.Tensor, Weight24, torch.Tensor]:
    """x, weight and bias of whole numbers and scales of 1/2 and 1, so small that every sum is exact in any order."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        """Of [low, high), the same on every device."""
        return torch.randint(low, high, shape, generator=generator, device="cpu").to(device)

    patterns = torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE], device=device)  # the pairs of columns of a group
    first, second = patterns[numbers(0, 6, _ROWS, _COLUMNS // 8, 2)].unbind(-1)
    ids = (first | second << 4).to(torch.uint8)
    x, bias = numbers(-1, 2, _TOKENS, _COLUMNS).to(dtype), numbers(-3, 4, _ROWS).to(dtype)
    values = numbers(-2, 2, _ROWS, _COLUMNS // 2).to(torch.int8)
    if kind == "dense":
        return x, Weight24(values.to(dtype), ids), bias
    scale = numbers(1, 3, _ROWS, _COLUMNS // SCALE_COLUMNS).to(dtype) / 2
    return x, Weight24(values if kind == "int8" else pack_nibbles(values), ids, scale), bias
