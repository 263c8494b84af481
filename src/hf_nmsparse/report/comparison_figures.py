# SPDX-License-Identifier: Apache-2.0
"""The plots of several runs side by side, each drawn only if its numbers exist."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..pattern import NMPattern
from ..results import RunResults
from .canvas import Theme, is_narrow, label_x
from .drawing import Drawing, Plot, rendered
from .facts import line, percent
from .grouped import heat_map, write_cells
from .score_figures import compared_agreement, compared_perplexities, compared_task_scores
from .training_figures import compared_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MaskOverlap:
    """Share of groups in which two masks keep the same weights.

    Args:
        names (`list[str]`): the runs, in the order of rows and columns.
        shares (`list[list[float]]`): symmetric, 1 on the diagonal.
        pattern (`NMPattern`, *optional*): of all masks.
    """

    names: Sequence[str]
    shares: Sequence[Sequence[float]]
    pattern: NMPattern | None = None

    @property
    def chance(self) -> float | None:
        """What masks that are drawn independently, all candidates equally likely, share on average: 1 / C(m, n)."""
        return None if self.pattern is None else 1 / self.pattern.num_candidates


def draw_comparison(runs: Mapping[str, RunResults], overlap: MaskOverlap | None = None) -> list[Plot]:
    """All plots that the runs have numbers for, in reading order.

    Raises:
        UnsupportedError: if there is one and matplotlib is not installed.
    """
    return rendered(
        [
            compared_perplexities(runs),
            compared_task_scores(runs),
            compared_agreement(runs),
            compared_training(runs),
            _overlap(overlap) if overlap is not None else None,
        ]
    )


def _overlap(overlap: MaskOverlap) -> Drawing:
    count = len(overlap.names)
    # A mask is the same as itself: without a colour, the differences of the others are seen.
    values = [
        [math.nan if row == column else overlap.shares[row][column] for column in range(count)] for row in range(count)
    ]
    pairs = [(values[row][column], row, column) for row in range(count) for column in range(row)]
    least = min((value for value, *_ in pairs), default=0.0)
    low = min(least, overlap.chance) if overlap.chance is not None else least

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        narrow = is_narrow(figure)
        image = heat_map(axes, theme, values, (low, 1.0))
        write_cells(
            axes,
            theme,
            image,
            [["" if math.isnan(v) else f"{100 * v:.1f}" for v in row] for row in values],
            8 if narrow and count > 5 else 9.5,
        )
        for place in range(count):
            axes.text(place, place, "·", ha="center", va="center", color=theme.muted)
        labels = [f"{place}  {line(name, 14 if narrow else 28)}" for place, name in enumerate(overlap.names, start=1)]
        axes.set_yticks(range(count), labels, parse_math=False)
        axes.set_xticks(range(count), [str(place) for place in range(1, count + 1)])
        axes.xaxis.tick_top()
        label_x(
            axes, f"% of groups{'' if overlap.chance is None else f'; independent masks: {percent(overlap.chance)}'}"
        )

    title = "Groups in which two masks keep the same weights"
    if pairs:
        share, row, column = max(pairs)
        title += f": most, {percent(share)}, in {line(overlap.names[column], 20)} and {line(overlap.names[row], 20)}"
    height = 1.1 + 0.42 * count
    return Drawing("overlap", title, height, paint, height)
