# SPDX-License-Identifier: Apache-2.0
"""The kernel for Hopper GPUs (H100, H200) that uses their own sparse instruction; Triton compiles it at its first call.

It was written, compiled and emulated without such a GPU, and its speed is unknown: only a measured table chooses it, and it
is tried before on a case of several tiles, as every kernel is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .call import Call24
from .dispatch import Kernel24
from .gpu import Division, aligned, bias_or, ceil_div, multiply, multiprocessors
from .nvidia import GEMM
from .probe import works
from .weight import Weight24

_NAME = "wgmma.sp GEMM"
_HOPPER = (9, 0)  # and no later one: its instructions, sm_90a, were not carried on
REGISTERS = 128  # a thread: what 16 warps can have, and 8 so that two programs share a multiprocessor


@dataclass(frozen=True)
class WgmmaShape(Division):
    """How `gluon_wgmma.linear24_wgmma` divides its work.

    Args:
        warpgroups (`int`): of 64 rows of W a program.
        token_blocks (`int`): blocks of 8 tokens a program, a power of two.
        k_parts (`int`): programs that share the sum over K; above 1, a second kernel adds their results.
        stages (`int`): steps whose copies of x are under way at once.
        group (`int`): tiles of rows whose programs run together.
    """

    warpgroups: int
    token_blocks: int
    k_parts: int
    stages: int = 4
    group: int = 8

    @property
    def warps(self) -> int:
        return 4 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """What the tiles of x take: 128 bytes a token and stage."""
        return self.stages * 8 * self.token_blocks * 128

    def steps(self, in_features: int) -> int:
        """Iterations of the loop over K, 64 columns each."""
        return ceil_div(in_features, 64 * self.k_parts)

    def programs(self, out_features: int, tokens: int) -> int:
        """Tiles of y."""
        return ceil_div(out_features, 64 * self.warpgroups) * ceil_div(tokens, 8 * self.token_blocks)


_LARGE = WgmmaShape(warpgroups=4, token_blocks=16, k_parts=1)
_MIDDLE = WgmmaShape(warpgroups=2, token_blocks=16, k_parts=1)
_SMALL = WgmmaShape(warpgroups=2, token_blocks=8, k_parts=1)


@lru_cache(maxsize=1024)
def wgmma_shape(out_features: int, in_features: int, tokens: int, multiprocessors: int) -> WgmmaShape:
    """A division of work by rule of thumb; nothing is timed.

    For 64 columns a program reads 72 bytes a row (values and ids) and 128 bytes a token, mostly from the L2 cache. With the
    32768 sums that the registers of a multiprocessor hold beside the operands, 256 rows x 128 tokens come closest to the
    least. Smaller tiles serve where those leave multiprocessors without work; then K is split so that each part still has 8
    steps, more than the pipeline is deep.
    """
    shapes = (_SMALL,) if tokens <= 64 else (_LARGE, _MIDDLE, _SMALL)
    enough = (shape for shape in shapes if shape.programs(out_features, tokens) >= multiprocessors)
    shape = next(enough, shapes[-1])
    idle_parts = multiprocessors // shape.programs(out_features, tokens)
    return replace(shape, k_parts=max(1, min(idle_parts, in_features // 64 // 8)))


def wgmma_operands(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """x, values, ids and bias as the kernel takes them."""
    x = aligned(x, "x")
    return (
        x.view(torch.int64),
        aligned(weight.values, "values").view(torch.int32),
        aligned(weight.ids, "ids").view(torch.int64),
        bias_or(x, bias),
    )


def wgmma(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None, shape: WgmmaShape) -> torch.Tensor:
    """y = x W^T + b for any number of rows of x `[tokens, in]`, 16-bit values, work divided as told.

    Raises:
        RuntimeError: if Triton has put anything but the tiles of x into shared memory: the kernel takes them to begin where
            that does.
    """
    from .gluon_wgmma import linear24_wgmma

    steps = shape.steps(weight.in_features)
    operands = wgmma_operands(x, weight, bias)
    y, compiled = multiply(linear24_wgmma, operands, weight, bias, shape, steps, x, maxnreg=REGISTERS)
    if compiled.metadata.shared != shape.shared_bytes:
        raise RuntimeError(
            f"linear_24: {_NAME}: this Triton gives the kernel {compiled.metadata.shared} bytes of shared memory instead "
            f"of {shape.shared_bytes}, so its tiles may lie elsewhere than it reads them; use the release of Triton that "
            "comes with PyTorch, or remove the measured table that chose this kernel"
        )
    return y


def _run(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns, flat = weight.out_features, weight.in_features, x.reshape(-1, weight.in_features)
    shape = wgmma_shape(rows, columns, len(flat), multiprocessors(x.device))
    return wgmma(flat, weight, bias, shape).view(*x.shape[:-1], rows)


def _run_repeated(x: torch.Tensor, weight: Weight24, bias: torch.Tensor) -> torch.Tensor:
    """x W^T + b of a small case from a larger one of several tiles, which goes round all stages; NaN where copies differ.

    Rows and tokens are repeated; columns too, with signs that leave the sums as they are.
    """
    (tokens, columns), rows = x.shape, weight.out_features
    copies = {"rows": 1 + 64 * _LARGE.warpgroups // rows, "tokens": 1 + 8 * _LARGE.token_blocks // tokens}
    turns = 1 + 64 * 2 * _LARGE.stages // columns
    signs = [(-1) ** turn for turn in range(2 * turns - 1)]
    wide = torch.cat([sign * x for sign in signs], 1).repeat(copies["tokens"], 1)
    tall = Weight24(*(part.repeat(copies["rows"], len(signs)) for part in (weight.values, weight.ids)))
    shapes = (_LARGE, replace(_SMALL, k_parts=2))
    results = torch.stack([wgmma(wide, tall, bias.repeat(copies["rows"]), shape) for shape in shapes])
    results = results.view(-1, tokens, copies["rows"], rows)
    first = results[0, :, 0]
    return torch.where((results == first[:, None]).all(2).all(0), first, torch.nan)


def _accepts(call: Call24) -> bool:
    return GEMM.accepts(call) and torch.cuda.get_device_capability(call.device) == _HOPPER


def _works(call: Call24) -> bool:
    return works(_NAME, _run_repeated, call.device, call.dtype)


WGMMA = Kernel24(_NAME, _accepts, _run, prefers=lambda call: False, works=_works)
