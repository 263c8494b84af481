# SPDX-License-Identifier: Apache-2.0
"""W * M on a GPU, M the soft mask of learned logits of candidates, and the gradient of the logits, in Triton.

The formulas are those of candidate_masks.py, the noise is that of philox.py; forward and backward read and write each number
once and keep nothing of the size of the logits. A program works on consecutive groups of one row, and a thread holds all
that belongs to a group: a tensor of `[groups]` for each candidate and each position, so sums over these need no exchange.

Scores are in units of log2: 2^s instead of e^s, so that no constant is multiplied in twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


# --- order of numbers -------------------------------------------------------------------------------------------------
@triton.jit
def to_weights(planes, M: tl.constexpr):
    """M tensors `[groups]`, one a position, as one `[groups * M]` in the order of the weights."""
    LEVELS: tl.constexpr = 1 if M == 2 else (2 if M == 4 else 3)
    for level in tl.static_range(LEVELS):
        paired = ()
        for i in tl.static_range(M >> (level + 1)):
            pair = tl.join(planes[i], planes[i + (M >> (level + 1))])
            paired = paired + (tl.reshape(pair, (pair.shape[0] * 2,)),)
        planes = paired
    return planes[0]


@triton.jit
def to_planes(weights, M: tl.constexpr):
    """The inverse of `to_weights`."""
    LEVELS: tl.constexpr = 1 if M == 2 else (2 if M == 4 else 3)
    planes = (weights,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            first, second = tl.split(tl.reshape(planes[i], (planes[i].shape[0] // 2, 2)))
            even = even + (first,)
            odd = odd + (second,)
        planes = even + odd
    return planes


@triton.jit
def sum_where(values, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Sum of the values whose bits are set, of which there is one at least among the lowest COUNT."""
    total = values[0]
    for i in tl.static_range(COUNT):
        if (BITS >> i) & 1:
            if BITS & ((1 << i) - 1):
                total += values[i]
            else:
                total = values[i]
    return total


# --- noise ------------------------------------------------------------------------------------------------------------
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


# --- distribution -----------------------------------------------------------------------------------------------------
@triton.jit
def probabilities(
    logits,  # of the row, [CANDIDATES, groups]
    group,
    groups,
    row,
    temperature,
    scale,
    step,
    draw,
    seed,
    layer,
    ALLOWED: tl.constexpr,
    TAIL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Of each candidate a tensor like `group`."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    PER_CALL: tl.constexpr = 6  # uniforms of 21 bits, of 128 bits
    inverse_temperature = 1.0 / tl.load(temperature).to(tl.float32)
    slope = tl.load(scale).to(tl.float32) * inverse_temperature * LOG2_E
    step_word = tl.load(step).to(tl.uint32)
    draw_word = tl.load(draw).to(tl.uint32)
    seed_word = seed.to(tl.uint32, bitcast=True)
    layer_word = layer.to(tl.uint32, bitcast=True)
    values = ()
    for c in tl.static_range(CANDIDATES):
        value = tl.load(logits + c * groups.to(tl.int64) + group, group < groups, other=0.0)
        values = values + (value.to(tl.float32),)
    index = row * groups + placed_like(group, values[0], NVIDIA)  # int64, of the whole layer
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)

    scores = ()
    for c in tl.static_range(CANDIDATES):
        if c % PER_CALL == 0:
            words = uniform_bits(low, high, c // PER_CALL, seed_word, layer_word, step_word, draw_word)
        score = values[c] * slope + gumbel_log2(words[c % PER_CALL], NVIDIA) * inverse_temperature
        if TAIL and not (ALLOWED >> c) & 1:
            score = tl.where(group == groups - 1, -1e30, score)
        scores = scores + (score,)

    largest = scores[0]
    for c in tl.static_range(1, CANDIDATES):
        largest = tl.maximum(largest, scores[c])
    powers = ()
    for c in tl.static_range(CANDIDATES):
        powers = powers + (tl.exp2(scores[c] - largest),)
    factor = 1.0 / sum_where(powers, (1 << CANDIDATES) - 1, CANDIDATES)
    result = ()
    for c in tl.static_range(CANDIDATES):
        result = result + (powers[c] * factor,)
    return result


@triton.jit
def soft_mask(chances, KEEPERS: tl.constexpr, M: tl.constexpr, CANDIDATES: tl.constexpr):
    """M, `[groups * M]`."""
    planes = ()
    for j in tl.static_range(M):
        planes = planes + (sum_where(chances, KEEPERS >> j * CANDIDATES, CANDIDATES),)
    return to_weights(planes, M)


# --- kernels ----------------------------------------------------------------------------------------------------------
@triton.jit
def masked_weight(
    weight,  # [rows, in_features]
    logits,  # [rows, CANDIDATES, groups]
    result,  # like weight
    temperature,  # the scalars of SamplingState, one number each
    scale,
    step,
    draw,
    seed,  # of NoiseKey, the 32 bits as a signed number
    layer,
    in_features,
    groups,
    blocks,  # of GROUPS groups, a row
    KEEPERS: tl.constexpr,  # bit j * CANDIDATES + c: whether candidate c keeps position j
    ALLOWED: tl.constexpr,  # bit c: whether the last group, shorter by TAIL, may use candidate c
    TAIL: tl.constexpr,
    M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    group = first + tl.arange(0, GROUPS)
    chances = probabilities(
        logits + row * CANDIDATES * groups, group, groups, row, temperature, scale, step, draw, seed, layer,
        ALLOWED, TAIL, CANDIDATES, NVIDIA,
    )  # fmt: skip
    column = first * M + tl.arange(0, GROUPS * M)
    inside = column < in_features
    at = row * in_features + column
    w = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    product = w * soft_mask(chances, KEEPERS, M, CANDIDATES)
    tl.store(result + at, product.to(result.dtype.element_ty), inside)


@triton.jit
def gradients(
    grad,  # of the result, like weight
    weight,
    logits,
    grad_weight,  # like weight, or any pointer if not FOR_WEIGHT
    grad_logits,  # like logits, or any pointer if not FOR_LOGITS
    temperature,
    scale,
    regularization,
    step,
    draw,
    seed,
    layer,
    in_features,
    groups,
    blocks,
    FOR_WEIGHT: tl.constexpr,
    FOR_LOGITS: tl.constexpr,
    KEPT: tl.constexpr,  # bit c * M + j: the same
    KEEPERS: tl.constexpr,
    ALLOWED: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * GROUPS
    group = first + tl.arange(0, GROUPS)
    chances = probabilities(
        logits + row * CANDIDATES * groups, group, groups, row, temperature, scale, step, draw, seed, layer,
        ALLOWED, TAIL, CANDIDATES, NVIDIA,
    )  # fmt: skip
    column = first * M + tl.arange(0, GROUPS * M)
    inside = column < in_features
    at = row * in_features + column
    mask = soft_mask(chances, KEEPERS, M, CANDIDATES)
    a = tl.load(grad + at, inside, other=0.0).to(tl.float32)
    if FOR_WEIGHT:
        tl.store(grad_weight + at, (a * mask).to(grad_weight.dtype.element_ty), inside)
    if FOR_LOGITS:
        w = tl.load(weight + at, inside, other=0.0).to(tl.float32)
        reward = 2.0 * tl.load(regularization).to(tl.float32)
        grad_mask = to_planes(a * w - w * w * mask * reward, M)
        slopes = ()  # dL/dy of each candidate
        for c in tl.static_range(CANDIDATES):
            slopes = slopes + (sum_where(grad_mask, KEPT >> c * M, M),)
        mean = chances[0] * slopes[0]
        for c in tl.static_range(1, CANDIDATES):
            mean += chances[c] * slopes[c]
        factor = tl.load(scale).to(tl.float32) / tl.load(temperature).to(tl.float32)
        for c in tl.static_range(CANDIDATES):
            there = grad_logits + (row * CANDIDATES + c) * groups + group
            value = (slopes[c] - mean) * chances[c] * factor
            tl.store(there, value.to(grad_logits.dtype.element_ty), group < groups)
