# SPDX-License-Identifier: Apache-2.0
"""Pruning to n:m and packing 2:4 on a GPU, in Triton: each number is read and written once.

Numbers come as integers of their bits, int16 or int32, so that values stay as they are and NaN has its place in the order. A
thread holds WEIGHTS consecutive weights, whole groups, as one tensor `[threads]` for each, and loads them VECTOR, 16 bytes, at
a time; what it writes is consecutive too. So nothing is exchanged between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_masks import to_planes, to_weights


@triton.jit
def planes_of(pointer, first, inside, LIMIT, WEIGHTS: tl.constexpr, VECTOR: tl.constexpr):
    """WEIGHTS tensors `[threads]` of what is at `first` and after it; 0 beyond LIMIT.

    Args:
        first: position of the first number of each thread, `[threads]`.
        inside: whether a thread has any, `[threads]`; or None, if LIMIT, for the first position beyond the end, decides.
    """
    planes = ()
    for part in tl.static_range(WEIGHTS // VECTOR):
        at = first[:, None] + (part * VECTOR + tl.arange(0, VECTOR)[None, :])
        there = at < LIMIT if inside is None else tl.broadcast_to(inside[:, None], at.shape)
        numbers = tl.load(pointer + at, there, other=0)
        planes = planes + to_planes(tl.reshape(numbers, (at.shape[0] * VECTOR,)), VECTOR)
    return planes


@triton.jit
def keys_of(bits, LIMIT, first, INF: tl.constexpr, MAGNITUDES: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr):
    """int32 in the order of the numbers: -0 equals 0, every NaN is alike and above infinity, and last what is not there.

    Args:
        bits: COUNT tensors `[threads]`.
        LIMIT: the number of columns, or None if all are there.
        first: column of the first of each thread.

    Those of 16 bits leave room for the position in the group, so that no two are equal.
    """
    HIGHEST: tl.constexpr = 0x7FFF if INF < 0x10000 else 0x7FFFFFFF
    keys = ()
    for i in tl.static_range(COUNT):
        wide = bits[i].to(tl.int32)
        magnitude = wide & HIGHEST
        if MAGNITUDES:
            key = tl.minimum(magnitude, INF + 1)
        else:
            key = tl.where(magnitude > INF, INF + 1, tl.where(wide < 0, -magnitude, magnitude))
        if LIMIT is not None:
            key = tl.where(first + i < LIMIT, key, -HIGHEST)
        if INF < 0x10000:
            key = key * M + (M - 1 - i % M)
        keys = keys + (key,)
    return keys


@triton.jit
def kept_of(keys, N: tl.constexpr, M: tl.constexpr, UNIQUE: tl.constexpr, COUNT: tl.constexpr):
    """Whether each of COUNT keys is among the N highest of its group of M; of equal ones the first."""
    kept = ()
    if UNIQUE and M <= 4:
        for g in tl.static_range(COUNT // M):
            high = tl.maximum(keys[g * M], keys[g * M + 1])
            least = high  # the lowest that is kept
            if M == 4:
                low = tl.minimum(keys[4 * g], keys[4 * g + 1])
                other_high = tl.maximum(keys[4 * g + 2], keys[4 * g + 3])
                other_low = tl.minimum(keys[4 * g + 2], keys[4 * g + 3])
                if N == 1:
                    least = tl.maximum(high, other_high)
                elif N == 2:
                    least = tl.maximum(tl.minimum(high, other_high), tl.maximum(low, other_low))
                else:
                    least = tl.minimum(tl.maximum(low, other_low), tl.minimum(high, other_high))
            for j in tl.static_range(M):
                kept = kept + (keys[g * M + j] >= least,)
    else:
        for i in tl.static_range(COUNT):
            beaten = tl.zeros_like(keys[0])
            for j in tl.static_range(M):
                if j < i % M:
                    beaten += (keys[i // M * M + j] >= keys[i]).to(tl.int32)
                if j > i % M:
                    beaten += (keys[i // M * M + j] > keys[i]).to(tl.int32)
            kept = kept + (beaten < N,)
    return kept


@triton.jit
def store_planes(pointer, first, planes, inside, COUNT: tl.constexpr):
    """COUNT tensors `[threads]` to consecutive places from `first`, that of the first thread, on."""
    threads: tl.constexpr = planes[0].shape[0]
    if COUNT == 1:
        tl.store(pointer + first + tl.arange(0, threads), planes[0], inside)
    else:
        at = tl.arange(0, threads)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        numbers = tl.reshape(to_weights(planes, COUNT), (threads, COUNT))
        tl.store(pointer + first + at, numbers, tl.broadcast_to(inside[:, None], (threads, COUNT)))


# --- kernels ----------------------------------------------------------------------------------------------------------
@triton.jit
def top_n(
    scores,  # [rows, in_features]
    mask,  # int8, like scores; or any pointer if FOR_CODES
    codes,  # int64 [rows, groups]; or any pointer if not FOR_CODES
    code_of_word,  # int32 [2^M]
    in_features,
    groups,
    blocks,  # of THREADS * WEIGHTS weights, a row
    FOR_CODES: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    INF: tl.constexpr,  # the bits of infinity
    WEIGHTS: tl.constexpr,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
):
    GROUPS: tl.constexpr = WEIGHTS // M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * (THREADS * WEIGHTS)
    first = start + tl.arange(0, THREADS) * WEIGHTS
    bits = planes_of(scores + row * in_features, first, None, in_features, WEIGHTS, VECTOR)
    keys = keys_of(bits, in_features, first, INF, False, M, WEIGHTS)
    kept = kept_of(keys, N, M, INF < 0x10000, WEIGHTS)
    if FOR_CODES:
        found = ()
        for g in tl.static_range(GROUPS):
            word = tl.zeros_like(keys[0])
            for j in tl.static_range(M):
                word |= kept[g * M + j].to(tl.int32) << j
            found = found + (tl.load(code_of_word + word).to(tl.int64),)
        at = start // M + tl.arange(0, THREADS * GROUPS)
        if GROUPS == 1:
            tl.store(codes + row * groups + at, found[0], at < groups)
        else:
            tl.store(codes + row * groups + at, to_weights(found, GROUPS), at < groups)
    else:
        bytes_of = ()
        for i in tl.static_range(WEIGHTS):
            bytes_of = bytes_of + (kept[i].to(tl.int8),)
        column = start + tl.arange(0, THREADS * WEIGHTS)
        tl.store(mask + row * in_features + column, to_weights(bytes_of, WEIGHTS), column < in_features)


@triton.jit
def prune_24(
    weight,  # [threads * WEIGHTS], whole rows one after the other
    scores,  # like weight; or any pointer if MAGNITUDES
    values,  # half as many
    ids,  # uint8, an eighth
    codes,  # uint8, a quarter
    threads,
    MAGNITUDES: tl.constexpr,  # whether the scores are those of the weight
    INF: tl.constexpr,  # the bits of infinity of the scores
    WEIGHTS: tl.constexpr,
    VECTOR: tl.constexpr,  # of weights
    SCORE_VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
):
    HALF: tl.constexpr = WEIGHTS // 2
    GROUPS: tl.constexpr = WEIGHTS // 4
    begin = tl.program_id(0).to(tl.int64) * THREADS
    thread = tl.arange(0, THREADS)
    inside = begin + thread < threads
    w = planes_of(weight + begin * WEIGHTS, thread * WEIGHTS, inside, 0, WEIGHTS, VECTOR)
    s = w
    if not MAGNITUDES:
        s = planes_of(scores + begin * WEIGHTS, thread * WEIGHTS, inside, 0, WEIGHTS, SCORE_VECTOR)
    keys = keys_of(s, None, thread, INF, MAGNITUDES, 4, WEIGHTS)
    kept = kept_of(keys, 2, 4, INF < 0x10000, WEIGHTS)
    kept_weights = ()
    nibbles = ()
    ranks = ()
    for g in tl.static_range(GROUPS):
        k0 = kept[4 * g]
        k1 = kept[4 * g + 1]
        k2 = kept[4 * g + 2]
        k3 = kept[4 * g + 3]
        p0 = tl.where(k0, 0, tl.where(k1, 1, 2))
        p1 = tl.where(k3, 3, tl.where(k2, 2, 1))
        v0 = tl.where(k0, w[4 * g], tl.where(k1, w[4 * g + 1], w[4 * g + 2]))
        v1 = tl.where(k3, w[4 * g + 3], tl.where(k2, w[4 * g + 2], w[4 * g + 1]))
        kept_weights = kept_weights + (v0, v1)
        nibbles = nibbles + (p0 | p1 << 2,)
        ranks = ranks + ((p0 + p1 - k0.to(tl.int32)).to(tl.uint8),)
    bytes_of = ()
    for e in tl.static_range(GROUPS // 2):
        bytes_of = bytes_of + ((nibbles[2 * e] | nibbles[2 * e + 1] << 4).to(tl.uint8),)
    store_planes(values, begin * HALF, kept_weights, inside, HALF)
    store_planes(ids, begin * (GROUPS // 2), bytes_of, inside, GROUPS // 2)
    store_planes(codes, begin * GROUPS, ranks, inside, GROUPS)


@triton.jit
def unpack_24(
    values,  # [threads * WEIGHTS / 2]
    ids,  # uint8
    dense,  # [threads * WEIGHTS]
    threads,
    WEIGHTS: tl.constexpr,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
):
    HALF: tl.constexpr = WEIGHTS // 2
    EIGHTHS: tl.constexpr = WEIGHTS // 8
    begin = tl.program_id(0).to(tl.int64) * THREADS
    thread = tl.arange(0, THREADS)
    inside = begin + thread < threads
    v = planes_of(values + begin * HALF, thread * HALF, inside, 0, HALF, HALF)
    columns = ()
    for e in tl.static_range(EIGHTHS):
        byte = tl.load(ids + begin * EIGHTHS + thread * EIGHTHS + e, inside, other=0).to(tl.int32)
        for g in tl.static_range(2):
            p0 = (byte >> (4 * g)) & 3
            p1 = (byte >> (4 * g + 2)) & 3
            v0 = v[4 * e + 2 * g]
            v1 = v[4 * e + 2 * g + 1]
            for j in tl.static_range(4):
                columns = columns + (tl.where(p1 == j, v1, tl.where(p0 == j, v0, 0)).to(v0.dtype),)
    for part in tl.static_range(WEIGHTS // VECTOR):
        planes = ()
        for i in tl.static_range(VECTOR):
            planes = planes + (columns[part * VECTOR + i],)
        row = tl.reshape(to_weights(planes, VECTOR), (THREADS, VECTOR))
        at = thread[:, None] * WEIGHTS + (part * VECTOR + tl.arange(0, VECTOR)[None, :])
        tl.store(dense + begin * WEIGHTS + at, row, tl.broadcast_to(inside[:, None], at.shape))
