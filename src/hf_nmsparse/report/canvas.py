# SPDX-License-Identifier: Apache-2.0
"""How every plot looks: two themes, one style of axes, bars and curves.

matplotlib is optional and imported on first use; figures are made without pyplot, so no global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from ..results import is_finite
from .facts import line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Paint = Callable[["Figure", "Theme"], None]

_WIDTH = 9.0  # inches; shown 900 px wide, so that 10 points read as about 14 px
_DOTS_PER_INCH = 160
_MARKERS = "os^Dv<>"
# Where a legend covers no data: over the axes, at their left.
ABOVE = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering. The three roles look alike in every plot; `series` is for what has no role."""

    background: str
    ink: str
    muted: str
    grid: str
    dense: str
    one_shot: str
    learned: str
    series: tuple[str, ...]

    def role(self, role: str) -> str:
        """Colour of "dense", "one-shot" or "learned"."""
        return {"dense": self.dense, "one-shot": self.one_shot, "learned": self.learned}[role]


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2937",
    muted="#5b6472",
    grid="#e3e6ea",
    dense="#7b8494",
    one_shot="#d9822b",
    learned="#1d6fd1",
    series=("#0b7f7d", "#b5478f", "#8a7a00", "#6d5bd0"),
)
DARK = Theme(
    background="#171b21",
    ink="#e5e7eb",
    muted="#a7b0bd",
    grid="#2d343e",
    dense="#a3abb8",
    one_shot="#f0a04b",
    learned="#5aa9f5",
    series=("#3fc1c0", "#e07cba", "#d2c14a", "#a698f5"),
)


def png(title: str, height: float, paint: Paint, theme: Theme) -> bytes:
    """One figure, `height` inches high, as PNG.

    Raises:
        UnsupportedError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a report draws its plots with matplotlib, which is not installed; run: pip install 'hf-nmsparse[report]'"
        ) from error
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.background)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
    # Names come from outside: a dollar sign in them is no formula.
    figure.suptitle(
        line(title, 92), x=0.012, ha="left", fontsize=12, fontweight="bold", color=theme.ink, parse_math=False
    )
    paint(figure, theme)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def style(axes: Axes, theme: Theme, grid: str = "y") -> None:
    """Quiet axes: no box, a pale grid along the measured axis only, labels in the theme's colours."""
    axes.set_facecolor(theme.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side == ("left" if grid == "x" else "bottom"))
        spine.set_color(theme.muted)
    axes.tick_params(which="both", colors=theme.muted, labelcolor=theme.ink, labelsize=9.5, length=0)
    axes.xaxis.label.set(color=theme.muted, size=9.5)
    axes.yaxis.label.set(color=theme.muted, size=9.5)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def bars(
    axes: Axes,
    theme: Theme,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    start: float = 0.0,
) -> None:
    """Horizontal bars from `start`, the first on top, each with its text at the end; no bar for NaN and infinity."""
    for position, (value, text, colour) in enumerate(zip(values, texts, colours, strict=True)):
        end = value if is_finite(value) else start
        axes.barh(position, end - start, left=start, height=0.62, color=colour, zorder=2)
        axes.annotate(
            text,
            (max(end, start, axes.get_xlim()[0]), position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=theme.ink,
            parse_math=False,
        )
    axes.set_yticks(range(len(names)), [line(name, 30) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    style(axes, theme, grid="x")


def curves(axes: Axes, theme: Theme, named: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """One line with markers for each name over whole numbers, and a legend above the axes if there are several."""
    from matplotlib.ticker import MaxNLocator

    for position, (name, points) in enumerate(named.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=theme.series[position % len(theme.series)],
            linestyle="-" if position < len(theme.series) else (0, (4, 2)),
            marker=_MARKERS[position % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=line(name, 24) or " ",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    style(axes, theme)
    if len(named) > 1:
        legend(axes, theme, **ABOVE, ncols=min(len(named), 6), columnspacing=1.2)


def legend(axes: Axes, theme: Theme, **where: object) -> None:
    """A legend without a frame, in the theme's ink; labels are plain text, never formulas."""
    box = axes.legend(frameon=False, fontsize=9.5, labelcolor=theme.ink, handlelength=1.4, **where)
    for text in box.get_texts():
        text.set_parse_math(False)
