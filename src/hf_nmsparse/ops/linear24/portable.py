# SPDX-License-Identifier: Apache-2.0
"""The kernel for GPUs without sparse tensor cores, and for what those do not take, which Triton compiles at its first call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from .call import FORWARD, Call24
from .dispatch import Kernel24
from .gpu import Division, bias_or, ceil_div, has_triton, multiprocessors, outputs, scaled
from .probe import works
from .weight import Weight24

_NAME = "Triton"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_TOKENS = 16  # the least that `tl.dot` takes everywhere
_MOST_TILES = 65535  # of the second axis of a grid


@dataclass(frozen=True)
class TileShape(Division):
    """How `triton_portable.linear24_portable` divides its work.

    Args:
        rows (`int`): of W, a program; a power of two from 16 on, as are
        tokens (`int`): a program.
        columns (`int`): of W, a step of its loop; also a divisor of 128.
        warps (`int`): a program.
        stages (`int`): steps whose loads are under way at once.
        k_parts (`int`): programs that share the sum over K; above 1, torch adds their results.
    """

    launch_fields: ClassVar[tuple[str, ...]] = ("warps", "stages", "k_parts")

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    k_parts: int = 1

    def grid(self, out_features: int, tokens: int) -> tuple[int, int, int]:
        """Programs along rows, tokens and K."""
        return ceil_div(out_features, self.rows), ceil_div(tokens, self.tokens), self.k_parts

    def steps(self, in_features: int) -> int:
        """Iterations of the loop over K."""
        return ceil_div(ceil_div(in_features, self.columns), self.k_parts)


@lru_cache(maxsize=1024)
def tile_shape(out_features: int, in_features: int, tokens: int, narrow: bool, multiprocessors: int) -> TileShape:
    """A division of work by rule of thumb; nothing is timed.

    Few tokens: W is what takes time, so narrow tiles of it, long steps, and K split over programs where the rows alone
    occupy less than half of the GPU and each part still has 4 steps. More tokens: the wider the tiles, the less often x and
    W are read and W is expanded. `narrow` asks for steps of half the columns and at most 64 tokens: where products are
    not by tensor cores or elements are loaded one by one, wider ones do not fit in the registers.
    """
    if tokens <= _FEW_TOKENS:
        shape = TileShape(rows=32, tokens=16, columns=128, warps=4, stages=3)
    elif tokens <= 64 or narrow:
        shape = TileShape(rows=64, tokens=32 if tokens <= 32 else 64, columns=64, warps=4, stages=3)
    else:
        shape = TileShape(rows=64, tokens=128, columns=64, warps=8, stages=3)
    if narrow:
        shape = replace(shape, columns=shape.columns // 2, stages=2)
    row_tiles, token_tiles, _ = shape.grid(out_features, tokens)
    idle_parts = multiprocessors // (row_tiles * token_tiles)
    return replace(shape, k_parts=max(1, min(idle_parts, shape.steps(in_features) // 4)))


def multiply(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None, shape: TileShape) -> torch.Tensor:
    """y = x W^T + b for rows of x `[tokens, in]`, work divided as told."""
    from .triton_portable import linear24_portable

    tokens, rows = x.shape[0], weight.out_features
    values, ids = weight.values.contiguous(), weight.ids.contiguous()
    scale = ids if weight.scale is None else weight.scale.contiguous()
    y, parts = outputs(x, rows, shape.k_parts)
    with torch.cuda.device(x.device):
        linear24_portable[shape.grid(rows, tokens)](
            scaled(x, weight).contiguous(),
            values,
            ids,
            scale,
            bias_or(x, bias),
            parts,
            tokens,
            rows,
            weight.in_features,
            values.shape[1],
            ids.shape[1],
            scale.shape[1],
            shape.steps(weight.in_features),
            KIND=weight.kind,
            HAS_BIAS=bias is not None,
            **shape.constants(),
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return y if shape.k_parts == 1 else y.copy_(parts.sum(0))  # a sum whose order is fixed by the shape


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton uses matrix instructions there: on AMD, and on NVIDIA from sm_80 on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _run(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns, flat = weight.out_features, weight.in_features, x.reshape(-1, weight.in_features)
    narrow = x.dtype == torch.float32 or columns % 32 != 0 or not _has_tensor_cores(x.device)
    shape = tile_shape(rows, columns, len(flat), narrow, multiprocessors(x.device))
    return multiply(flat, weight, bias, shape).view(*x.shape[:-1], rows)


def _accepts(call: Call24) -> bool:
    return (
        call.device.type == "cuda"
        and call.product == FORWARD
        and call.dtype in _DTYPES
        and 0 < call.tokens <= _MOST_TILES * _FEW_TOKENS
        and call.out_features > 0
        and call.in_features > 0
        and has_triton()
    )


def _works(call: Call24) -> bool:
    return works(_NAME, _run, call.device, call.dtype, call.kind)


PORTABLE = Kernel24(_NAME, _accepts, _run, lambda call: call.tokens <= _FEW_TOKENS, _works)
