# SPDX-License-Identifier: Apache-2.0
"""What follows from a `RunResults`, and how its numbers are written: shared by the page and the plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..pattern import NMPattern
from ..results import RunResults, is_finite, number, one_line

Role = Literal["dense", "one-shot", "learned"]

# Rows that measure the finished model again rather than another way to choose the mask.
_FINISHED_ROWS = ("packed", "merged")


@dataclass(frozen=True)
class Row:
    """One measured perplexity, its role in the comparison, and its ratio to the dense model (`None` without one)."""

    name: str
    value: float
    role: Role
    ratio: float | None


@dataclass(frozen=True)
class Gap:
    """How much of the perplexity gap between the best one-shot mask and the dense model the learned mask closes."""

    dense: float
    one_shot: Row
    learned: Row

    @property
    def closed(self) -> float:
        """(one-shot - learned) / (one-shot - dense): 1 reaches the dense model, below 0 is worse than one-shot."""
        return (self.one_shot.value - self.learned.value) / (self.one_shot.value - self.dense)


def perplexity_rows(results: RunResults) -> list[Row]:
    """All rows that hold a number, best first; NaN and infinity last."""
    measured = {name: value for name, value in results.perplexity.items() if isinstance(value, (int, float))}
    dense = next((value for name, value in measured.items() if _plain(name) == "dense" and is_finite(value)), None)
    any_learned = any(_plain(name).startswith("learned") for name in measured)
    rows = [
        Row(name, value, _role(name, any_learned), value / dense if dense and is_finite(value) else None)
        for name, value in measured.items()
    ]
    return sorted(rows, key=lambda row: (not is_finite(row.value), row.value if is_finite(row.value) else 0.0))


def best_mask(rows: list[Row]) -> Row | None:
    """The learned mask's row; without one, the best of the other masks."""
    finite = [row for row in rows if row.role != "dense" and is_finite(row.value)]
    learned = [row for row in finite if row.role == "learned"]
    exact = [row for row in learned if _plain(row.name) == "learned"]
    return next(iter(exact or learned or finite), None)


def gap(rows: list[Row]) -> Gap | None:
    """The comparison of dense, best one-shot and learned, if all three were measured and one-shot is worse than dense."""
    dense = next((row for row in rows if row.role == "dense" and is_finite(row.value)), None)
    learned = best_mask(rows)
    others = [
        row
        for row in rows
        if row.role == "one-shot" and is_finite(row.value) and _plain(row.name) not in _FINISHED_ROWS
    ]
    if dense is None or learned is None or learned.role != "learned" or not others:
        return None
    best = min(others, key=lambda row: row.value)
    return Gap(dense.value, best, learned) if best.value > dense.value else None


def packed_bound(pattern: NMPattern) -> float:
    """Least share of the dense bfloat16 bytes that any packed form needs: kept values, and log2 C(m, n) / m bits of mask."""
    return pattern.density + pattern.entropy_bits_per_weight / 16


def times(ratio: float) -> str:
    """A ratio to the dense model."""
    return f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×"


def speed_ratio(row: Mapping[str, Any], unit: str = "") -> str:
    """How many times as fast as dense a row of `RunResults.speed` is, with the range that was measured."""
    ratio, low, high = row.get("ratio"), row.get("low"), row.get("high")
    known = is_finite(ratio) and is_finite(low) and is_finite(high)
    return f"{number(ratio)}{unit}" + (f" ({low:.3g}–{high:.3g})" if known else "")


def percent(share: Any) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %" if is_finite(share) else number(share)


def size(value: Any) -> str:
    """Bytes in decimal units, 1 MB = 10^6 bytes."""
    if not is_finite(value):
        return number(value)
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} bytes"


def duration(value: Any) -> str:
    """Seconds as seconds, minutes or hours."""
    if not is_finite(value):
        return number(value)
    if value < 99.5:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def line(text: Any, limit: int = 60) -> str:
    """`text` on one line, without characters that cannot be drawn, shortened to `limit` characters."""
    flat = one_line(text)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _plain(name: str) -> str:
    return name.strip().lower()


def _role(name: str, any_learned: bool) -> Role:
    if _plain(name) == "dense":
        return "dense"
    finished = any_learned and _plain(name) in _FINISHED_ROWS
    return "learned" if finished or _plain(name).startswith("learned") else "one-shot"
