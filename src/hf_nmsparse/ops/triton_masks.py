# SPDX-License-Identifier: Apache-2.0
"""W * M on a GPU, M the soft mask of learned logits, and the gradient of the logits, in Triton.

The formulas are those of candidate_masks.py and elementwise_masks.py, the noise is that of philox.py; forward and backward
read and write each number once and keep nothing of the size of the logits. A program works on consecutive groups of one row,
and a thread holds all that belongs to a group: a tensor of `[groups]` for each candidate and each position, so sums over these
need no exchange.

METHOD says whose the logits are and how masks follow from them:
    candidates  a logit a candidate, whose softmax are the probabilities
    sums        a logit a weight; the score of a candidate is the sum over the positions it keeps, so all candidates are held
    walk        a logit a weight; the n (m - n) choices of triton_elementwise.py, which are fewer where m is large
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_elementwise import conditionals, marginals, marginals_derivative
from .triton_noise import moment_of, placed_like, scores_of


# --- order of numbers -------------------------------------------------------------------------------------------------
@triton.jit
def to_weights(planes, M: tl.constexpr):
    """M tensors `[groups]`, one a position, as one `[groups * M]` in the order of the weights."""
    LEVELS: tl.constexpr = 1 if M == 2 else (2 if M == 4 else (3 if M == 8 else 4))
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
    LEVELS: tl.constexpr = 1 if M == 2 else (2 if M == 4 else (3 if M == 8 else 4))
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


# --- distribution -----------------------------------------------------------------------------------------------------
@triton.jit
def softmax(scores, CANDIDATES: tl.constexpr):
    """The probabilities of the candidates."""
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
def distribution(
    logits,
    moment,
    row,
    group,
    column,
    in_features,
    groups,
    METHOD: tl.constexpr,
    KEPT: tl.constexpr,
    ALLOWED: tl.constexpr,
    TAIL: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Probabilities of the candidates, or w of the walk: tensors like `group`."""
    if METHOD == "candidates":
        values = ()
        for c in tl.static_range(CANDIDATES):
            there = logits + (row * CANDIDATES + c) * groups + group
            values = values + (tl.load(there, group < groups, other=0.0).to(tl.float32),)
    else:
        there = logits + row * in_features + column
        values = to_planes(tl.load(there, column < in_features, other=0.0).to(tl.float32), M)
    index = row * groups + placed_like(group, values[0], NVIDIA)
    raw = scores_of(values, moment, index, CANDIDATES if METHOD == "candidates" else M, NVIDIA)
    scores = ()
    for i in tl.static_range(CANDIDATES if METHOD == "candidates" else M):
        score = raw[i]
        if METHOD == "candidates":
            if TAIL and not (ALLOWED >> i) & 1:
                score = tl.where(group == groups - 1, -1e30, score)
        elif TAIL and i >= TAIL:
            # The tail keeps min(n, r) weights, the padding its first positions; as _PADDING_SCORE of elementwise_masks.py.
            score = tl.where(group == groups - 1, (i - TAIL + 1) * -1e9, score)
        scores = scores + (score,)
    if METHOD == "walk":
        result = conditionals(scores, N, M, NVIDIA)
    elif METHOD == "sums":
        sums = ()
        for c in tl.static_range(CANDIDATES):
            sums = sums + (sum_where(scores, KEPT >> c * M, M),)
        result = softmax(sums, CANDIDATES)
    else:
        result = softmax(scores, CANDIDATES)
    return result


@triton.jit
def by_position(numbers, KEEPERS: tl.constexpr, M: tl.constexpr, CANDIDATES: tl.constexpr):
    """Of each position the sum over the candidates that keep it."""
    planes = ()
    for j in tl.static_range(M):
        planes = planes + (sum_where(numbers, KEEPERS >> j * CANDIDATES, CANDIDATES),)
    return planes


@triton.jit
def soft_mask(
    chances, METHOD: tl.constexpr, KEEPERS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CANDIDATES: tl.constexpr
):
    """M, `[groups * M]`."""
    if METHOD == "walk":
        return to_weights(marginals(chances, N, M), M)
    else:
        return to_weights(by_position(chances, KEEPERS, M, CANDIDATES), M)


@triton.jit
def grad_scores(chances, grad_mask, KEPT: tl.constexpr, M: tl.constexpr, CANDIDATES: tl.constexpr):
    """dL / d score of each candidate, from dL / dM of each position."""
    slopes = ()  # dL/dy of each candidate
    for c in tl.static_range(CANDIDATES):
        slopes = slopes + (sum_where(grad_mask, KEPT >> c * M, M),)
    mean = chances[0] * slopes[0]
    for c in tl.static_range(1, CANDIDATES):
        mean += chances[c] * slopes[c]
    result = ()
    for c in tl.static_range(CANDIDATES):
        result = result + ((slopes[c] - mean) * chances[c],)
    return result


# --- kernels ----------------------------------------------------------------------------------------------------------
@triton.jit
def masked_weight(
    weight,  # [rows, in_features]
    logits,  # [rows, CANDIDATES, groups], or like weight
    result,  # like weight
    temperature,  # the scalars of SamplingState, one number each
    scale,
    step,
    draw,
    seed,  # of NoiseKey, the 32 bits as a signed number
    layer,
    in_features,
    groups,
    blocks,  # programs a row, each for TILES times GROUPS groups
    METHOD: tl.constexpr,
    KEPT: tl.constexpr,  # bit c * M + j: whether candidate c keeps position j
    KEEPERS: tl.constexpr,  # bit j * CANDIDATES + c: the same
    ALLOWED: tl.constexpr,  # bit c: whether the last group, shorter by TAIL, may use candidate c
    TAIL: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * GROUPS * TILES
    moment = moment_of(temperature, scale, step, draw, seed, layer)
    for first in range(begin, tl.minimum(begin + GROUPS * TILES, groups), GROUPS):
        group = first + tl.arange(0, GROUPS)
        column = first * M + tl.arange(0, GROUPS * M)
        inside = column < in_features
        at = row * in_features + column
        chances = distribution(
            logits, moment, row, group, column, in_features, groups,
            METHOD, KEPT, ALLOWED, TAIL, N, M, CANDIDATES, NVIDIA,
        )  # fmt: skip
        w = tl.load(weight + at, inside, other=0.0).to(tl.float32)
        product = w * soft_mask(chances, METHOD, KEEPERS, N, M, CANDIDATES)
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
    METHOD: tl.constexpr,
    KEPT: tl.constexpr,
    KEEPERS: tl.constexpr,
    ALLOWED: tl.constexpr,
    TAIL: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * GROUPS * TILES
    moment = moment_of(temperature, scale, step, draw, seed, layer)
    reward = 2.0 * tl.load(regularization).to(tl.float32)
    factor = tl.load(scale).to(tl.float32) / tl.load(temperature).to(tl.float32)
    for first in range(begin, tl.minimum(begin + GROUPS * TILES, groups), GROUPS):
        group = first + tl.arange(0, GROUPS)
        column = first * M + tl.arange(0, GROUPS * M)
        inside = column < in_features
        at = row * in_features + column
        chances = distribution(
            logits, moment, row, group, column, in_features, groups,
            METHOD, KEPT, ALLOWED, TAIL, N, M, CANDIDATES, NVIDIA,
        )  # fmt: skip
        mask = soft_mask(chances, METHOD, KEEPERS, N, M, CANDIDATES)
        a = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        if FOR_WEIGHT:
            tl.store(grad_weight + at, (a * mask).to(grad_weight.dtype.element_ty), inside)
        if FOR_LOGITS:
            w = tl.load(weight + at, inside, other=0.0).to(tl.float32)
            grad_mask = to_planes(a * w - w * w * mask * reward, M)
            element = grad_logits.dtype.element_ty
            if METHOD == "candidates":
                found = grad_scores(chances, grad_mask, KEPT, M, CANDIDATES)
                for c in tl.static_range(CANDIDATES):
                    there = grad_logits + (row * CANDIDATES + c) * groups + group
                    tl.store(there, (found[c] * factor).to(element), group < groups)
            else:
                if METHOD == "walk":
                    moved = marginals_derivative(chances, grad_mask, N, M)
                else:
                    moved = by_position(grad_scores(chances, grad_mask, KEPT, M, CANDIDATES), KEEPERS, M, CANDIDATES)
                tl.store(grad_logits + at, (to_weights(moved, M) * factor).to(element), inside)
