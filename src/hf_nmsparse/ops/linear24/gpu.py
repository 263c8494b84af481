# SPDX-License-Identifier: Apache-2.0
"""What the kernels for GPUs have in common around their launches: operands, outputs, the division of work."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from .weight import Weight24

logger = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes a lane loads at once
_SUM_BLOCK = 256


class Division:
    """Base of the frozen dataclasses that say how a kernel divides its work.

    Their fields, in capitals, are compile-time arguments of the kernel; `launch_fields` names those that are not.
    """

    launch_fields: ClassVar[tuple[str, ...]] = ()

    def constants(self) -> dict[str, int]:
        """The compile-time arguments of the kernel."""
        names = [field.name for field in fields(self) if field.name not in self.launch_fields]
        return {name.upper(): getattr(self, name) for name in names}


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed; not whether it can compile here."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def has_gluon() -> bool:
    """Whether a Triton is installed that comes with Gluon."""
    return has_triton() and find_spec("triton.experimental.gluon") is not None


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def aligned(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor, or a copy, where its rows do not lie one after the other from an address that vector loads take."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    logger.debug("linear_24: %s is not contiguous from an address divisible by %d; copied", name, _ALIGNMENT)
    return tensor.clone(memory_format=torch.contiguous_format)


def scaled(x: torch.Tensor, weight: Weight24) -> torch.Tensor:
    """x times the input scale of the weight, which commutes with the product."""
    if weight.scale is None or weight.input_scale is None:
        return x
    return (x.float() * weight.input_scale.float()).to(x.dtype)


def bias_or(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A pointer for the kernels, which do not follow it where there is no bias."""
    return x if bias is None else bias.contiguous()


def outputs(x: torch.Tensor, rows: int, k_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y `[tokens, rows]`, and what the kernel writes: y itself, or float32 `[k_parts, tokens, rows]`."""
    y = x.new_empty(x.shape[0], rows)
    return y, y if k_parts == 1 else x.new_empty(k_parts, x.shape[0], rows, dtype=torch.float32)


def multiply(
    kernel: Any,
    operands: tuple[torch.Tensor, ...],
    weight: Weight24,
    bias: torch.Tensor | None,
    shape: Any,
    steps: int,
    x: torch.Tensor,
    **constants: object,
) -> tuple[torch.Tensor, Any]:
    """y = x W^T + b by a Gluon kernel, for rows of x `[tokens, in]`.

    Args:
        kernel: one of `gluon_decode`, `gluon_gemm`, `gluon_wgmma`.
        operands: the tensors that it takes before its output.
        shape (`Division`): how it divides its work, with `programs`, `warps` and `k_parts`.
        steps (`int`): iterations of its loop over K.
        constants: what else it takes.

    Returns:
        y, and the compiled kernel.
    """
    tokens, rows = x.shape[0], weight.out_features
    y, parts = outputs(x, rows, shape.k_parts)
    with torch.cuda.device(x.device):
        compiled = kernel[(shape.programs(rows, tokens), shape.k_parts)](
            *operands,
            parts,
            tokens,
            rows,
            steps,
            K=weight.in_features,
            FP16=x.dtype == torch.float16,
            HAS_BIAS=bias is not None,
            **constants,
            **shape.constants(),
            num_warps=shape.warps,
        )
        if shape.k_parts > 1:
            add_parts(parts, bias, y)
    return y, compiled


def add_parts(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y = bias + the sum of parts over their first axis, in order. Needs Gluon."""
    from .gluon_decode import sum_of_parts

    sum_of_parts[(ceil_div(y.numel(), _SUM_BLOCK),)](
        parts,
        bias_or(y, bias),
        y,
        y.shape[1],
        y.numel(),
        HAS_BIAS=bias is not None,
        K_PARTS=len(parts),
        BLOCK=_SUM_BLOCK,
        num_warps=_SUM_BLOCK // 32,
    )
