# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding, to bfloat16 and to one byte: the mean of what is stored is the number that was to be stored.

A number x between the neighbours a < b that can be stored becomes b with probability (x - a) / (b - a), else a. Rounding to
the nearest would drop each update of less than half their distance, and so all of them, however many there are.

One byte holds a number of a block with a scale of its own, s = max |x|, on a grid that is finer near zero:

    x = sign(k) (k / K)^2 s        K = 127 for signed codes, 255 for numbers >= 0

(Blocks of optimizer states: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, with a table in
place of the square.)
"""

from __future__ import annotations

import torch

from .philox import NoiseKey, philox4x32

BLOCK = 256  # values that share a scale
_VALUES_PER_CALL = 8  # 128 random bits, 16 a value
_SMALLEST_SCALE = 1e-30  # whose inverse is finite


def random_bits(key: NoiseKey, step: int, start: int, stop: int, device: torch.device | str) -> torch.Tensor:
    """16 random bits for each of the values `start` to `stop` of a tensor, the same on every device.

    Value i takes the (i mod 8)-th half word, low halves first, of the Philox block at counter
    (i // 8 mod 2^32, i // 2^35, step, 0).

    Args:
        key (`NoiseKey`): the run, and which tensor.
        step (`int`): of the optimizer.
        start, stop (`int`): flat indices; `start` is a multiple of 8.

    Returns:
        int16 `[stop - start]`.
    """
    index = torch.arange(start // _VALUES_PER_CALL, -(-stop // _VALUES_PER_CALL), device=device)
    counter = (index & 0xFFFFFFFF, index >> 32, torch.full_like(index, step), torch.zeros_like(index))
    a, b, c, d = philox4x32(key, counter)
    words = torch.stack((a.bitwise_or_(b << 32), c.bitwise_or_(d << 32)), dim=-1)
    return words.view(torch.int16).view(-1)[: stop - start]


def to_bfloat16(values: torch.Tensor, bits: torch.Tensor, out: torch.Tensor) -> None:
    """Write `values` to `out`, rounded stochastically; what bfloat16 can hold, infinities and NaN included, stays.

    Args:
        values (`torch.Tensor`): float32.
        bits (`torch.Tensor`): int16 of the same shape: 16 random bits a value.
        out (`torch.Tensor`): bfloat16 of the same shape.
    """
    # As integers, float32 numbers are sign and magnitude. The carry out of the 16 bits that are cut off rounds away from 0.
    rounded = bits.to(torch.int32).bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(torch.where(values.isnan(), values, rounded.view(torch.float32)))


def to_codes(values: torch.Tensor, bits: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Write `values` to `codes` and `scales`, rounded stochastically.

    Args:
        values (`torch.Tensor`): float32 `[blocks, BLOCK]`.
        bits (`torch.Tensor`): integers of the same shape with values in [0, 256): 8 random bits a value.
        codes (`torch.Tensor`): of the same shape, int8, or uint8 for values that are never negative.
        scales (`torch.Tensor`): float32 `[blocks]`.
    """
    highest = torch.iinfo(codes.dtype).max
    magnitudes = values.abs()
    torch.clamp_min(magnitudes.amax(dim=1), _SMALLEST_SCALE, out=scales)
    squares = magnitudes.mul_((highest**2 / scales)[:, None])  # of the codes
    lower = squares.sqrt().floor_()
    # The squares of the neighbours are 2 k + 1 apart.
    threshold = lower.mul(2).add_(1).mul_(bits.add(0.5).mul_(1 / 256))
    threshold.addcmul_(lower, lower)
    lower.add_(squares > threshold)
    codes.copy_(lower.copysign_(values) if codes.dtype == torch.int8 else lower)


def from_codes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that `to_codes` stored, float32 `[blocks, BLOCK]`."""
    values = codes.float()
    magnitudes = values.abs() if codes.dtype == torch.int8 else values
    return values.mul(magnitudes).mul_((scales / torch.iinfo(codes.dtype).max ** 2)[:, None])
