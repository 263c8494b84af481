# SPDX-License-Identifier: Apache-2.0
"""Scores and weights that are hard to put in order."""

from __future__ import annotations

import torch

from hf_nmsparse import codec
from hf_nmsparse.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_HARD = [0.0, -0.0, 1.0, 1.0, -1.0, 2.5, -2.5, float("inf"), float("-inf"), float("nan")]


def hard_numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all sizes, about half of them ties, zeros of both signs, infinities, NaN of both signs, or subnormal."""
    hard = torch.tensor(_HARD)[torch.randint(len(_HARD), (rows, columns))]
    hard = torch.where(torch.rand(rows, columns) < 0.1, -torch.full_like(hard, float("nan")), hard).to(dtype)
    hard[torch.rand(rows, columns) < 0.1] = torch.finfo(dtype).smallest_normal / 8
    numbers = torch.where(torch.rand(rows, columns) < 0.5, hard, torch.randn(rows, columns).to(dtype))
    # A NaN with a payload: values must keep it, and the order must not see it.
    bits = numbers.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[numbers.isnan() & (torch.rand(rows, columns) < 0.5)] -= 1
    return numbers


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers as integers of the same size, for comparing to the bit."""
    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.contiguous().view(sizes.get(tensor.element_size(), torch.uint8))


def pruned_bits(weight: torch.Tensor, scores: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What `prune_24` must return, to the bit: torch's own `gather` may give a NaN another payload."""
    _, ids, codes = reference.prune_24(weight, scores)
    return bits_of(weight).gather(1, codec.columns_of_24(ids)), ids, codes


def equal_bits(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether all tensors are the same to the bit."""
    return all(torch.equal(bits_of(mine), bits_of(theirs)) for mine, theirs in zip(found, expected, strict=True))
