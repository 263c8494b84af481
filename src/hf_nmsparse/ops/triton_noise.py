# SPDX-License-Identifier: Apache-2.0
"""The noise of philox.py in Triton, and the scores that logits and noise make.

Scores are in units of log2: 2^s instead of e^s, so that no constant is multiplied in twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log2_of(x, NVIDIA: tl.constexpr):
    """One instruction of NVIDIA's, of absolute error 2^-22 where x is from 1/2 to 2, else the library's, which takes 30."""
    if NVIDIA:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def placed_like(numbers, example, NVIDIA: tl.constexpr):
    """The same int32 numbers, each in the thread that holds its place of `example`.

    Noise depends on nothing that is loaded, so Triton would spread it over the threads by a rule of its own, and exchange it
    through shared memory. No instruction is left of this one, nor does it wait for `example`.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,f", [numbers, example], tl.int32, True, 1)
    else:
        return numbers


@triton.jit
def uniform_bits(low, high, block, seed, layer, step, draw):
    """Six 21-bit numbers of each group, uint32, times 4: the words of `gumbel_noise` of philox.py."""
    # A scalar that is the same for all groups stays one: the first rounds are then computed once a program.
    a, b, c, d = tl.philox_impl(low, block + (high << 16), step, draw, seed, layer, 7)
    fifth = ((a & 0x7FF) << 2) | ((b & 0x3FF) << 13)
    sixth = ((c & 0x7FF) << 2) | ((d & 0x3FF) << 13)
    return ((a >> 9) & 0x7FFFFC, (b >> 9) & 0x7FFFFC, (c >> 9) & 0x7FFFFC, (d >> 9) & 0x7FFFFC, fifth, sixth)


@triton.jit
def gumbel_log2(bits, NVIDIA: tl.constexpr):
    """Gumbel noise in units of log2, but for a constant: -log2(-log2 u), u = (bits / 4 + 1/2) / 2^21."""
    above_1 = (bits | 0x3F800002).to(tl.float32, bitcast=True)  # 1 + u, exact, as are u and 1 - u
    u = above_1 - 1.0
    rest = 2.0 - above_1
    # Near 1 the logarithm must be right relative to its own size, which is that of 1 - u. Relative error 3e-8.
    series = rest * (1.442695 + rest * (0.72136723 + rest * (0.47934103 + rest * 0.3995672)))
    exponential = tl.where(rest < 0.0625, series, -log2_of(u, NVIDIA))
    return -log2_of(exponential, NVIDIA)


@triton.jit
def moment_of(temperature, scale, step, draw, seed, layer):
    """The scalars of SamplingState (pointers) and NoiseKey (32 bits as signed numbers), as `scores_of` needs them."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    inverse_temperature = 1.0 / tl.load(temperature).to(tl.float32)
    slope = tl.load(scale).to(tl.float32) * inverse_temperature * LOG2_E
    key = (seed.to(tl.uint32, bitcast=True), layer.to(tl.uint32, bitcast=True))
    return slope, inverse_temperature, key, (tl.load(step).to(tl.uint32), tl.load(draw).to(tl.uint32))


@triton.jit
def scores_of(values, moment, index, COUNT: tl.constexpr, NVIDIA: tl.constexpr):
    """(kappa theta + g) / tau of the COUNT logits of each group, of which `index` is the number in the whole layer."""
    PER_CALL: tl.constexpr = 6  # uniforms of 21 bits, of 128 bits
    slope, inverse_temperature, key, now = moment
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    scores = ()
    for c in tl.static_range(COUNT):
        if c % PER_CALL == 0:
            words = uniform_bits(low, high, c // PER_CALL, key[0], key[1], now[0], now[1])
        scores = scores + (values[c] * slope + gumbel_log2(words[c % PER_CALL], NVIDIA) * inverse_temperature,)
    return scores
