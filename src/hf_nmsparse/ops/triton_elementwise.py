# SPDX-License-Identifier: Apache-2.0
"""The walk of elementwise_masks.py in Triton: the same recursions, a tensor of `[groups]` for each number of a group.

Tuples hold them: D and its derivative by state 0 .. N - 1, R by the number still to keep, 0 .. N, and w by element and
state, element i and state k at i * N + k. Element i can be in or out in the states k < i with k >= N - M + i alone; places
of a tuple that have no meaning repeat some other number, which costs nothing as nobody reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_noise import log2_of


@triton.jit
def reciprocal_of(x, NVIDIA: tl.constexpr):
    """Of x from 1 to 2: one instruction of NVIDIA's, right to one unit in the last place, where a division takes eight."""
    if NVIDIA:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.constexpr_function
def is_open(element, state, n, m):
    """Whether the element can be in or out in that state."""
    return max(0, n - m + element) <= state < element


@triton.jit
def next_ratios(ratios, score, steps, ELEMENT: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """D after an element, from D before it and what `steps` adds to it; the derivatives move in the same way."""
    result = ()
    for k in tl.static_range(N):
        value = ratios[k] if k < ELEMENT else score
        if is_open(ELEMENT, k, N, M):
            value += steps[k]
        if is_open(ELEMENT, k - 1, N, M):
            value -= steps[k - 1]
        result = result + (value,)
    return result


@triton.jit
def conditionals(scores, N: tl.constexpr, M: tl.constexpr, NVIDIA: tl.constexpr):
    """w: the probability that an element is in."""
    w = ()
    ratios = ()
    for i in tl.static_range(M):
        steps = ()
        for k in tl.static_range(N):
            if is_open(i, k, N, M):
                x = scores[i] - ratios[k]
                power = tl.exp2(-tl.abs(x))
                w = w + (tl.where(x >= 0, 1.0, power) * reciprocal_of(1.0 + power, NVIDIA),)
                steps = steps + (tl.maximum(x, 0.0) + log2_of(1.0 + power, NVIDIA),)
            else:
                w = w + (scores[i],)
                steps = steps + (scores[i],)
        ratios = next_ratios(ratios, scores[i], steps, i, N, M)
    return w


@triton.jit
def conditionals_derivative(w, direction, N: tl.constexpr, M: tl.constexpr):
    """Of w, as the scores move by `direction`."""
    dw = ()
    dratios = ()
    for i in tl.static_range(M):
        steps = ()
        for k in tl.static_range(N):
            if is_open(i, k, N, M):
                step = w[i * N + k] * (direction[i] - dratios[k])
                dw = dw + (step - w[i * N + k] * step,)
                steps = steps + (step,)
            else:
                dw = dw + (direction[i],)
                steps = steps + (direction[i],)
        dratios = next_ratios(dratios, direction[i], steps, i, N, M)
    return dw


# --- the walk, from the last element to the first ---------------------------------------------------------------------
@triton.jit
def final_states(example, LAST: tl.constexpr, N: tl.constexpr):
    """R before the last element, when all N are still to keep: LAST there, 0 elsewhere."""
    states = ()
    for k in tl.static_range(N + 1):
        states = states + (tl.full(example.shape, LAST if k == N else 0.0, tl.float32),)
    return states


@triton.jit
def taken_from(states, w, ELEMENT: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Probability to be in a state and take an element."""
    taken = ()
    for k in tl.static_range(N + 1):
        value = states[k]  # with ELEMENT + 1 still to keep it is surely in
        if is_open(ELEMENT, k - 1, N, M):
            value *= w[ELEMENT * N + k - 1]
        taken = taken + (value,)
    return taken


@triton.jit
def states_after(states, taken, ELEMENT: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """R after an element, from R before it."""
    result = ()
    for k in tl.static_range(N + 1):
        value = states[k]
        if is_open(ELEMENT, k - 1, N, M):
            value -= taken[k]
        if k < N:
            # With N - M + ELEMENT, or fewer, to keep nobody is there yet.
            value = taken[k + 1] if k <= N - M + ELEMENT else value + taken[k + 1]
        result = result + (value,)
    return result


@triton.jit
def sum_of(taken, ELEMENT: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Over all states."""
    total = taken[ELEMENT + 1 if ELEMENT < N else N]  # the highest that can be reached
    for k in tl.static_range(1, N):
        if is_open(ELEMENT, k - 1, N, M):
            total += taken[k]
    return total


@triton.jit
def marginals(w, N: tl.constexpr, M: tl.constexpr):
    """P(j in c) of each position j."""
    result = ()
    states = final_states(w[0], 1.0, N)
    for i in tl.static_range(M - 1, -1, -1):
        taken = taken_from(states, w, i, N, M)
        result = (sum_of(taken, i, N, M),) + result
        states = states_after(states, taken, i, N, M)
    return result


@triton.jit
def marginals_derivative(w, direction, N: tl.constexpr, M: tl.constexpr):
    """Of the marginals, as the scores move by `direction`."""
    dw = conditionals_derivative(w, direction, N, M)
    result = ()
    states = final_states(w[0], 1.0, N)
    dstates = final_states(w[0], 0.0, N)
    for i in tl.static_range(M - 1, -1, -1):
        taken = taken_from(states, w, i, N, M)
        dtaken = taken_from(dstates, w, i, N, M)
        moved = ()
        for k in tl.static_range(N + 1):
            value = dtaken[k]
            if is_open(i, k - 1, N, M):
                value += states[k] * dw[i * N + k - 1]
            moved = moved + (value,)
        result = (sum_of(moved, i, N, M),) + result
        states = states_after(states, taken, i, N, M)
        dstates = states_after(dstates, moved, i, N, M)
    return result
