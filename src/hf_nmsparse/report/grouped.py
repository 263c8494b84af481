# SPDX-License-Identifier: Apache-2.0
"""Bars of several models beside each other, with error bars; and matrices as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .canvas import Theme, is_narrow, label_length, style
from .facts import line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.image import AxesImage

_GAP = 0.7  # between groups, in bars
ROW = 0.21  # inches of one bar


@dataclass(frozen=True)
class Bar:
    """One bar: whose it is, its length, the standard error on either side of its end, what is written there, its colour."""

    label: str
    value: float
    error: float | None
    text: str
    colour: str


@dataclass(frozen=True)
class Group:
    """Bars of one thing that was measured. `mark` is a value to compare them with; they begin at `start`."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None
    start: float = 0.0


def grouped_height(groups: Sequence[Group], titled: bool) -> float:
    """Inches that the bars of `grouped_bars` take, with or without titles above them."""
    return ROW * sum(len(group.bars) + _GAP + titled for group in groups)


def grouped_bars(axes: Axes, theme: Theme, groups: Sequence[Group], titled: bool, labelled: bool = True) -> None:
    """Horizontal bars in groups. Set the limits of x first.

    Args:
        axes (`Axes`), theme (`Theme`): where to draw.
        groups (`list[Group]`): from top to bottom.
        titled (`bool`): write the title of a group above its bars and the label of each bar at its left; otherwise only the
            title, at the left of the group, or for a phone above it, where a legend tells the bars apart.
        labelled (`bool`): write titles and labels at all; without, the axes at the left have the same.
    """
    ticks: list[tuple[float, str]] = []
    top, length, narrow = 0.0, label_length(axes), is_narrow(axes.figure)
    for group in groups:
        if titled or narrow:
            if labelled:
                _title(axes, theme, line(group.title, 46 if narrow else 100), top)
            top += 1
        first = top
        for bar in group.bars:
            _bar(axes, theme, bar, top, group.start)
            if titled:
                ticks.append((top, line(bar.label, length)))
            top += 1
        if not titled and not narrow:
            ticks.append(((first + top - 1) / 2, line(group.title, length)))
        if group.mark is not None:
            axes.vlines(
                group.mark, first - 0.5, top - 0.5, color=theme.ink, linewidth=1.3, linestyle=(0, (2, 1.5)), zorder=3
            )
        top += _GAP
    ticks = ticks if labelled else []
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], parse_math=False)
    axes.set_ylim(top - _GAP - 0.3, -0.7)
    style(axes, theme, grid="x")


def _title(axes: Axes, theme: Theme, text: str, place: float) -> None:
    """The title of a group, from the left edge of the figure on; the axes make no room for it."""
    axes.annotate(
        text,
        (0.014, place),
        xycoords=("figure fraction", "data"),
        va="center",
        fontsize=9.5,
        fontweight="bold",
        color=theme.ink,
        parse_math=False,
        annotation_clip=False,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 0.8},
    ).set_in_layout(False)


def _bar(axes: Axes, theme: Theme, bar: Bar, place: float, start: float) -> None:
    error = bar.error or 0.0
    axes.barh(place, bar.value - start, left=start, height=0.78, color=bar.colour, zorder=2)
    if bar.value == start != 0:  # it has no length
        axes.plot(bar.value, place, "o", color=bar.colour, markersize=6, zorder=2)
    if error:
        # Beyond the bar the line lies on the page, inside it on the bar; ink is seen on both.
        axes.errorbar(bar.value, place, xerr=error, color=theme.ink, elinewidth=1.2, capsize=2, capthick=1.2, zorder=4)
    axes.annotate(
        bar.text,
        (max(bar.value + error, start, axes.get_xlim()[0]), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=theme.ink,
        parse_math=False,
        bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 0.8},
        zorder=5,
    ).set_in_layout(False)  # the limits of x have left room for it


# --- heat maps ------------------------------------------------------------------------------------------------------
def heat_map(
    axes: Axes,
    theme: Theme,
    values: Sequence[Sequence[float]],
    limits: tuple[float, float],
    low_is_strong: bool = False,
) -> AxesImage:
    """A matrix as coloured cells, the first row on top; NaN leaves a cell empty."""
    image = axes.imshow(values, aspect="auto", cmap=_colours(theme, low_is_strong), vmin=limits[0], vmax=limits[1])
    style(axes, theme)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def colour_bar(axes: Axes, theme: Theme, image: AxesImage) -> None:
    """The scale of a heat map, at its right."""
    from matplotlib.ticker import MaxNLocator

    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=12)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=8.5, length=0)


def write_cells(axes: Axes, theme: Theme, image: AxesImage, texts: Sequence[Sequence[str]], size: float) -> None:
    """A text in each cell, dark or light, whichever is read better on its colour."""
    values = image.get_array()
    for row, line_of_texts in enumerate(texts):
        for column, text in enumerate(line_of_texts):
            if not text:
                continue
            red, green, blue, _ = image.cmap(image.norm(values[row][column]))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            ink = "#111827" if bright else "#f9fafb"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)


def _colours(theme: Theme, reverse: bool) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("heat", theme.heat[::-1] if reverse else theme.heat)
    return colours.with_extremes(bad=theme.background)
