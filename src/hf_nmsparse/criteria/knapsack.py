# SPDX-License-Identifier: Apache-2.0
"""The 0/1 knapsack: which items are worth most together, if their sizes may not add up to more than so much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_CELLS = 10_000_000  # one byte each, and about as many additions of floats


def most_valuable(
    values: Sequence[float], sizes: Sequence[int], capacity: int, max_cells: int = MAX_CELLS
) -> list[int]:
    """The items of the highest total value whose total size is at most `capacity`, by dynamic programming over sizes.

    `best[c]`, the highest value that fits into c, is kept current item after item:
    `best[c] <- max(best[c], best[c - size] + value)`. Sizes are counted in their greatest common divisor, and the
    result is exact while items times capacity, so counted, is at most `max_cells`. Beyond that they are counted in a
    larger unit and rounded up: the capacity still holds, but a few of its bytes may stay unused.

    Args:
        values (`Sequence[float]`): finite; items that are worth nothing or less are never taken.
        sizes (`Sequence[int]`): over 0, as many as values.
        capacity (`int`): 0 or more.
        max_cells (`int`): limits time and memory.

    Returns:
        indices of the items, ascending. Of two equally good items the one that stands first is taken.
    """
    items = [index for index, value in enumerate(values) if value > 0 and sizes[index] <= capacity]
    if sum(sizes[index] for index in items) <= capacity:
        return items
    unit = math.gcd(*(sizes[index] for index in items))
    unit = max(unit, math.ceil(capacity * len(items) / max_cells))
    room = capacity // unit
    best = np.zeros(room + 1)
    taken = np.zeros((len(items), room + 1), dtype=bool)
    counted = [-(-sizes[index] // unit) for index in items]
    for row, (index, size) in enumerate(zip(items, counted, strict=True)):
        if size > room:  # rounded up it fits no longer
            continue
        with_item = best[: room + 1 - size] + values[index]
        taken[row, size:] = with_item > best[size:]
        best[size:] = np.maximum(best[size:], with_item)
    chosen = []
    for row in reversed(range(len(items))):
        if taken[row, room]:
            chosen.append(items[row])
            room -= counted[row]
    return chosen[::-1]
