# SPDX-License-Identifier: Apache-2.0
"""How every plot looks: two themes, one style of axes, bars and curves.

matplotlib is optional and imported on first use; figures are made without pyplot, so no global state is touched.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from ..results import is_finite
from .facts import line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Paint = Callable[["Figure", "Theme"], None]

_WIDTH, _DOTS_PER_INCH = 9.0, 160  # shown 900 px wide, so that 10 points read as about 14 px
_NARROW_WIDTH, _NARROW_DOTS_PER_INCH = 4.2, 180  # shown 360 px wide on a phone: about 12 px
_MARKERS = "os^Dv<>"
# Beyond this ratio of largest to smallest value, an axis from zero hides the small ones.
LOG_RANGE = 10.0
# Where a legend covers no data: over the axes, at their left.
ABOVE = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering. The three roles look alike in every plot; `series` is for what has no role, `runs` for the
    runs of a comparison, in their order. `heat` goes from what is barely there to what is strong."""

    background: str
    ink: str
    muted: str
    grid: str
    dense: str
    one_shot: str
    learned: str
    series: tuple[str, ...]
    runs: tuple[str, ...]
    heat: tuple[str, str, str]

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
    runs=("#1d6fd1", "#c4581a", "#0b7f7d", "#b5478f", "#8a7a00", "#6d5bd0", "#2b93c9", "#7a4a2b"),
    heat=("#eef3fa", "#4a90dd", "#0a2a57"),
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
    runs=("#5aa9f5", "#ef8a5a", "#3fc1c0", "#e07cba", "#d2c14a", "#a698f5", "#9bdcf7", "#c79a7b"),
    heat=("#222a34", "#2f74c0", "#d6eaff"),
)


def png(title: str, height: float, paint: Paint, theme: Theme, narrow: bool = False) -> bytes:
    """One figure as PNG, `height` inches high and wide enough for a page, or only for a phone.

    Raises:
        UnsupportedError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image  # matplotlib needs it, too
    except ImportError as error:
        raise UnsupportedError(
            "a report draws its plots with matplotlib, which is not installed; run: pip install 'hf-nmsparse[report]'"
        ) from error
    width, dots = (_NARROW_WIDTH, _NARROW_DOTS_PER_INCH) if narrow else (_WIDTH, _DOTS_PER_INCH)
    lines = textwrap.wrap(line(title, 150), 42 if narrow else 84)
    size = (width, height + 0.2 * (len(lines) - 1))
    figure = Figure(figsize=size, dpi=dots, layout="constrained", facecolor=theme.background)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
    # Names come from outside: a dollar sign in them is no formula.
    figure.suptitle(
        "\n".join(lines),
        x=0.012,
        ha="left",
        fontsize=11 if narrow else 12,
        fontweight="bold",
        color=theme.ink,
        parse_math=False,
    )
    paint(figure, theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    # Few colours are no loss to a plot, and a third of the bytes of a page that holds four renditions of each.
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is drawn for a phone."""
    return figure.get_figwidth() < _WIDTH


def panels(figure: Figure, count: int, columns: int, narrow_columns: int = 1, **shared: object) -> list[Axes]:
    """`count` axes in rows of `columns`, or `narrow_columns` for a phone; those left over are hidden."""
    columns = min(count, narrow_columns if is_narrow(figure) else columns)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **shared).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    return list(grid[:count])


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
    axes.set_yticks(range(len(names)), [line(name, label_length(axes)) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    style(axes, theme, grid="x")


def log_limits(low: float, high: float, room: float) -> tuple[float, float]:
    """Limits of a log scale with a share `room` of its length added behind the largest value, for a text."""
    return low / 1.1, min(high * min(high / low, 1e30) ** room, 1e300)


def label_x(axes: Axes, words: str) -> None:
    """What an axis shows, on several lines for a phone."""
    axes.set_xlabel(textwrap.fill(words, 36) if is_narrow(axes.figure) else words)


def label_length(axes: Axes) -> int:
    """Characters that a name at the left of bars may take."""
    return 16 if is_narrow(axes.figure) else 30


def curves(
    axes: Axes,
    theme: Theme,
    named: Mapping[str, Sequence[tuple[float, float]]],
    colours: Sequence[str] = (),
) -> None:
    """One line with markers for each name over whole numbers, and a legend above the axes if there are several."""
    from matplotlib.ticker import MaxNLocator

    colours = colours or theme.series
    for position, (name, points) in enumerate(named.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=colours[position % len(colours)],
            linestyle="-" if position < len(colours) else (0, (4, 2)),
            marker=_MARKERS[position % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=line(name, 24) or " ",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if is_narrow(axes.figure) else 10))
    style(axes, theme)
    if len(named) > 1:
        legend_above(axes, theme, [line(name, 24) for name in named])


def legend_above(axes: Axes, theme: Theme, labels: Sequence[str], **more: object) -> None:
    """A legend over the axes, in as many columns as its labels leave room for."""
    beside = axes.get_subplotspec().get_gridspec().ncols
    room = (42 if is_narrow(axes.figure) else 104) // beside
    columns = max(1, min(len(labels), 6, room // (max(map(len, labels), default=0) + 4)))
    legend(axes, theme, **{**ABOVE, "ncols": columns, "columnspacing": 1.2, **more})


def legend(axes: Axes, theme: Theme, **where: object) -> None:
    """A legend without a frame, in the theme's ink; labels are plain text, never formulas."""
    box = axes.legend(frameon=False, fontsize=9.5, labelcolor=theme.ink, handlelength=1.4, **where)
    for text in box.get_texts():
        text.set_parse_math(False)


def run_colours(theme: Theme, names: Iterable[str]) -> dict[str, str]:
    """A colour for each run of a comparison, the same in all plots."""
    return {name: theme.runs[position % len(theme.runs)] for position, name in enumerate(names)}


def plain_log_ticks(axes: Axes, axis: Axis) -> None:
    """Ticks of a log scale as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim() if axis is axes.xaxis else axes.get_ylim()
    crowded = high > (200 if is_narrow(axes.figure) else 2000) * low
    subs = (1,) if crowded else (1, 2, 5)  # labels of a wider range would overlap
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
