# SPDX-License-Identifier: Apache-2.0
"""The kernels for NVIDIA GPUs with sparse tensor cores (sm_80 and later), which Triton compiles at their first call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .call import FORWARD, Call24
from .dispatch import Kernel24
from .gpu import Division, aligned, bias_or, ceil_div, has_gluon, multiply, multiprocessors, scaled
from .probe import works
from .weight import Weight24

MOST_DECODE_TOKENS = 64
_DECODE, _GEMM = "mma.sp decode", "mma.sp GEMM"
GEMM_REGISTERS = 128  # a thread, so that two programs of 128 x 128 share a multiprocessor


@dataclass(frozen=True)
class MmaShape(Division):
    """What the divisions of both kernels have in common.

    Args:
        row_blocks (`int`): blocks of 16 rows of W a program.
        token_blocks (`int`): blocks of 8 tokens a program, a power of two.
        token_warps (`int`): warps of a program that share the token blocks.
        k_parts (`int`): programs that share the sum over K; above 1, a second kernel adds their results.
    """

    row_blocks: int
    token_blocks: int
    token_warps: int
    k_parts: int

    def programs(self, out_features: int, tokens: int) -> int:
        """Tiles of y."""
        return ceil_div(out_features, 16 * self.row_blocks) * ceil_div(tokens, 8 * self.token_blocks)


@dataclass(frozen=True)
class DecodeShape(MmaShape):
    """How `gluon_decode.linear24_decode` divides its work; one program takes all tokens.

    Args:
        unroll (`int`): neighbouring chunks of K that a warp loads before it multiplies.
        k_warps (`int`): warps of a program that share the sum over K.
    """

    unroll: int
    k_warps: int

    @property
    def warps(self) -> int:
        return self.k_warps * self.token_warps

    def steps(self, in_features: int, kind: str) -> int:
        """Iterations of the loop over K."""
        return ceil_div(in_features, (64 if kind == "dense" else 128) * self.unroll * self.k_warps * self.k_parts)


@dataclass(frozen=True)
class GemmShape(MmaShape):
    """How `gluon_gemm.linear24_gemm` divides its work.

    Args:
        row_warps (`int`): warps of a program that share the row blocks.
        stages (`int`): steps whose copies are under way at once; with 3, two programs of 128 x 128 share the 164 KB of an
            A100.
        group (`int`): tiles of rows whose programs run together.
    """

    row_warps: int
    stages: int = 3
    group: int = 8

    @property
    def warps(self) -> int:
        return self.row_warps * self.token_warps

    def steps(self, in_features: int) -> int:
        """Iterations of the loop over K, 64 columns each."""
        return ceil_div(in_features, 64 * self.k_parts)


def _power_of_two_from(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1024)
def decode_shape(out_features: int, in_features: int, tokens: int, kind: str, multiprocessors: int) -> DecodeShape:
    """A division of work by rule of thumb; nothing is timed.

    Up to 4 tokens the kernel only streams W: two programs of 8 warps fit on a multiprocessor, with 4 (16-bit values) or 2
    loads of 16 bytes a lane one step ahead. That is 16 to 32 KB under way where the memory needs about 23 (Little's law:
    4.3 TB/s x 0.7 us / 132). From 5 tokens on, x costs as much traffic as W, so two row blocks share it if enough
    programs are left to fill the GPU. More than 16 tokens are split over warps, which keeps all in registers.
    K is split over programs only where the rows alone occupy less than half of the GPU and each part still has 4 steps:
    the second kernel costs about as much as reading a megabyte.
    """
    dense = kind == "dense"
    chunks = ceil_div(in_features, 64 if dense else 128)
    token_blocks = _power_of_two_from(ceil_div(tokens, 8))
    shares_x = dense and (token_blocks == 2 or (4 < tokens <= 8 and out_features >= 32 * multiprocessors))
    token_warps = max(1, token_blocks // 2)
    k_warps = 4 if token_warps == 4 else 8
    unroll = 2 if dense and token_blocks == 1 and not shares_x and chunks > k_warps else 1
    shape = DecodeShape(
        row_blocks=2 if shares_x else 1,
        token_blocks=token_blocks,
        token_warps=token_warps,
        k_parts=1,
        unroll=unroll,
        k_warps=k_warps,
    )
    idle_parts = multiprocessors // shape.programs(out_features, tokens)
    return replace(shape, k_parts=max(1, min(idle_parts, shape.steps(in_features, kind) // 4)))


@lru_cache(maxsize=1024)
def gemm_shape(out_features: int, in_features: int, tokens: int, multiprocessors: int) -> GemmShape:
    """A division of work by rule of thumb; nothing is timed.

    Tiles of 128 x 128 read least for each product; where they leave multiprocessors without work, tiles of 64 tokens, and
    then K split so that each part still has 8 steps, more than the pipeline is deep.
    """
    shape = GemmShape(row_blocks=8, token_blocks=16, token_warps=2, k_parts=1, row_warps=4)
    if tokens <= 64 or shape.programs(out_features, tokens) < multiprocessors:
        shape = replace(shape, token_blocks=8)
    idle_parts = multiprocessors // shape.programs(out_features, tokens)
    return replace(shape, k_parts=max(1, min(idle_parts, in_features // 64 // 8)))


def decode_operands(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """x, values, ids, scale and bias as the decode kernel takes them."""
    x = aligned(scaled(x, weight), "x")
    return (
        x.view(torch.int64),
        aligned(weight.values, "values").view(torch.int32),
        aligned(weight.ids, "ids").view(torch.int64),
        x if weight.scale is None else weight.scale.contiguous(),
        bias_or(x, bias),
    )


def gemm_operands(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """x, values, ids and bias as the GEMM kernel takes them."""
    x = aligned(x, "x")
    return (
        x.view(torch.int32),
        aligned(weight.values, "values").view(torch.int32),
        aligned(weight.ids, "ids").view(torch.int16),
        bias_or(x, bias),
    )


def decode(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None, shape: DecodeShape) -> torch.Tensor:
    """y = x W^T + b for up to `MOST_DECODE_TOKENS` rows of x `[tokens, in]`, work divided as told."""
    from .gluon_decode import linear24_decode

    steps = shape.steps(weight.in_features, weight.kind)
    operands = decode_operands(x, weight, bias)
    y, _ = multiply(linear24_decode, operands, weight, bias, shape, steps, x, KIND=weight.kind)
    return y


def gemm(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None, shape: GemmShape) -> torch.Tensor:
    """y = x W^T + b for any number of rows of x `[tokens, in]`, 16-bit values, work divided as told."""
    from .gluon_gemm import linear24_gemm

    steps = shape.steps(weight.in_features)
    operands = gemm_operands(x, weight, bias)
    y, _ = multiply(linear24_gemm, operands, weight, bias, shape, steps, x, maxnreg=GEMM_REGISTERS)
    return y


def _run_decode(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns, flat = weight.out_features, weight.in_features, x.reshape(-1, weight.in_features)
    shape = decode_shape(rows, columns, len(flat), weight.kind, multiprocessors(x.device))
    return decode(flat, weight, bias, shape).view(*x.shape[:-1], rows)


def _run_gemm(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns, flat = weight.out_features, weight.in_features, x.reshape(-1, weight.in_features)
    shape = gemm_shape(rows, columns, len(flat), multiprocessors(x.device))
    return gemm(flat, weight, bias, shape).view(*x.shape[:-1], rows)


def _fits(call: Call24) -> bool:
    """Whether a call is of the kind that both kernels take."""
    return (
        call.device.type == "cuda"
        and call.product == FORWARD
        and call.dtype in (torch.bfloat16, torch.float16)
        and call.tokens > 0
        and call.in_features % 64 == 0
        and call.in_features > 0
        and call.out_features > 0
        and call.out_features * call.in_features // 4 < 2**31  # the kernels count in 32 bits
        and torch.version.hip is None
        and torch.cuda.get_device_capability(call.device) >= (8, 0)
        and has_gluon()
    )


def _accepts_decode(call: Call24) -> bool:
    return call.tokens <= MOST_DECODE_TOKENS and _fits(call)


def _decode_works(call: Call24) -> bool:
    return works(_DECODE, _run_decode, call.device, call.dtype, call.kind)


def _accepts_gemm(call: Call24) -> bool:
    few_enough = call.tokens * max(call.in_features, call.out_features) < 2**31  # the kernel counts in 32 bits
    return call.kind == "dense" and few_enough and _fits(call)


def _gemm_works(call: Call24) -> bool:
    return works(_GEMM, _run_gemm, call.device, call.dtype)


def _prefers_decode(call: Call24) -> bool:
    """From 17 tokens on, the decode kernel reads x more often than the GEMM, which shares it among 128 rows."""
    return call.tokens <= 16 or call.kind != "dense"


def _prefers_gemm(call: Call24) -> bool:
    """While W is what takes time; beyond, only where the dense product has no faster tensor core instructions than this.

    On Hopper it has (`wgmma`): the `mma.sp` kernels of CUTLASS were reported there at 0.62 of its speed
    (NVIDIA/cutlass, thread 1335).
    """
    return call.tokens > 16 and (call.tokens <= 256 or torch.cuda.get_device_capability(call.device) < (9, 0))


DECODE = Kernel24(_DECODE, _accepts_decode, _run_decode, _prefers_decode, _decode_works)
GEMM = Kernel24(_GEMM, _accepts_gemm, _run_gemm, _prefers_gemm, _gemm_works)
