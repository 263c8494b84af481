# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, each drawn once for light and once for dark pages, and only if its numbers exist."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results import RunResults, is_finite
from .canvas import ABOVE, DARK, LIGHT, Paint, Theme, bars, curves, legend, png, style
from .facts import best_mask, duration, line, number, perplexity_rows, size, times
from .layers import criteria_curves, error_field, type_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this ratio of largest to smallest value, bars from zero hide the small ones.
_LOG_RANGE = 10.0


@dataclass(frozen=True)
class Plot:
    """One plot.

    Args:
        name (`str`): file name without `.png`.
        title (`str`): what the plot shows, in words.
        light (`bytes`), dark (`bytes`): PNG for pages of either kind.
    """

    name: str
    title: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class _Drawing:
    """A plot before it is rendered: `height` in inches, `paint(figure, theme)` draws it."""

    name: str
    title: str
    height: float
    paint: Paint


def draw(results: RunResults) -> list[Plot]:
    """All plots that the results have numbers for, in reading order.

    Raises:
        UnsupportedError: if there is one and matplotlib is not installed.
    """
    kinds = (_perplexity, _loss, _mask, _layer_errors, _layer_flips, _sizes, _time)
    drawings = [drawing for kind in kinds if (drawing := kind(results)) is not None]
    return [
        Plot(d.name, d.title, png(d.title, d.height, d.paint, LIGHT), png(d.title, d.height, d.paint, DARK))
        for d in drawings
    ]


def _perplexity(results: RunResults) -> _Drawing | None:
    rows = perplexity_rows(results)
    finite = [row.value for row in rows if is_finite(row.value) and row.value > 0]
    if not finite:
        return None
    best, worst = min(finite), max(finite)
    dense = next((row for row in rows if row.role == "dense" and row.value in finite), None)
    logarithmic = worst > _LOG_RANGE * best

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        if logarithmic:
            axes.set_xscale("log")
            # From the dense value a bar has a meaning on a log scale: its length is the loss added per token.
            start = dense.value if dense else best / 2
            axes.set_xlim(min(best, start) / 1.1, worst * (worst / best) ** 0.3)
        else:
            start = 0.0
            axes.set_xlim(0, worst * 1.3)
        texts = [
            ("  " if r is dense else "")
            + number(r.value)
            + (f"   {times(r.ratio)} dense" if r.ratio and r is not dense else "")
            for r in rows
        ]
        bars(
            axes,
            theme,
            [r.name for r in rows],
            [r.value for r in rows],
            texts,
            [theme.role(r.role) for r in rows],
            start,
        )
        if dense:
            axes.axvline(dense.value, color=theme.dense, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
        scale = f", log scale{'; bars start at dense' if dense else ''}" if logarithmic else ""
        axes.set_xlabel(f"perplexity of held-out text (lower is better{scale})")
        if logarithmic:
            _plain_log_ticks(axes)
        if logarithmic and dense:  # its bar has no length
            axes.plot(dense.value, rows.index(dense), "o", color=theme.dense, markersize=7)
        _role_legend(axes, theme, [row.role for row in rows])

    told = [f"{line(row.name, 30)} {number(row.value)}" for row in (best_mask(rows), dense) if row]
    return _Drawing("perplexity", "Held-out perplexity: " + " against ".join(told), 1.5 + 0.36 * len(rows), paint)


def _loss(results: RunResults) -> _Drawing | None:
    hard = _series(results.history, "nm/hard_eval_loss") or _series(results.history, "eval_loss")
    found = {"training loss": _series(results.history, "loss"), "hard-mask evaluation loss": hard}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for name, points in found.items():
            training = name == "training loss"
            axes.plot(
                *zip(*points, strict=True),
                color=theme.muted if training else theme.learned,
                linewidth=1.3 if training else 2.0,
                marker=None if training and len(points) > 1 else "o",
                markersize=5,
                label=name,
            )
        axes.set_ylabel("loss (nats per token)")
        style(axes, theme)
        _step_axis(axes)
        legend(axes, theme, loc="upper right")

    told = "; ".join(f"{name} {_change(points)}" for name, points in found.items())
    return _Drawing("training", told[0].upper() + told[1:], 3.4, paint)


# key in the history, title of the panel, factor
_MASK_PANELS = (
    ("nm/flip_rate", "Groups changed since the start (%)", 100.0),
    ("nm/max_prob", "Largest probability, mean", 1.0),
    ("nm/entropy", "Entropy, mean (bits)", 1.0),
    ("nm/distillation_loss", "Distance to the dense model, T² KL", 1.0),
    ("nm/hidden_loss", "Error of hidden states", 1.0),
    ("nm/temperature", "Temperature (schedule)", 1.0),
    ("nm/logit_scale", "Logit scale (schedule)", 1.0),
)
_SCHEDULED = ("nm/temperature", "nm/logit_scale")


def _mask(results: RunResults) -> _Drawing | None:
    panels = [(key, title, _series(results.history, key, factor)) for key, title, factor in _MASK_PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)

    def paint(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (key, title, points) in zip(grid, panels, strict=False):
            axes.plot(
                *zip(*points, strict=True),
                color=theme.muted if key in _SCHEDULED else theme.learned,
                linewidth=1.8,
                marker="o" if len(points) == 1 else None,
            )
            axes.set_title(title, fontsize=10, loc="left", color=theme.ink)
            axes.set_ylim(bottom=0)
            style(axes, theme)
            _step_axis(axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)

    flips = _series(results.history, "nm/flip_rate", 100.0)
    title = "How the mask settles" + (f": {_change(flips)} % of the groups changed since the start" if flips else "")
    return _Drawing("mask", title, 0.6 + 2.0 * rows, paint)


def _layer_errors(results: RunResults) -> _Drawing | None:
    by_criterion = criteria_curves(results.layers)
    if len(by_criterion) < 2:
        subject = "Relative error of the pruned layers"
        return _by_type(results, error_field(results.layers), "layer_error", subject, "relative error", 1.0)

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        curves(axes, theme, by_criterion)
        axes.set(xlabel="block (depth)", ylabel="relative error, mean of a block")
        axes.set_ylim(bottom=0)

    means = {name: sum(value for _, value in points) / len(points) for name, points in by_criterion.items()}
    best = min(means, key=means.__getitem__)
    title = (
        f"Relative error of the pruned layers by criterion: least with {line(best, 24)}, mean {number(means[best])}"
    )
    return _Drawing("layer_error", title, 3.6, paint)


def _layer_flips(results: RunResults) -> _Drawing | None:
    return _by_type(
        results, "flip_rate", "layer_flips", "Flip rate of the pruned layers", "flip rate (% of groups)", 100.0
    )


def _by_type(results: RunResults, field: str, name: str, subject: str, label: str, factor: float) -> _Drawing | None:
    panels = type_curves(results.layers, field, factor)
    if not panels:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True).ravel()
        for axes, (part, lines) in zip(grid, panels.items(), strict=True):
            curves(axes, theme, lines)
            axes.set_xlabel(f"block (depth){', ' if part else ''}{line(part, 30)}", parse_math=False)
        grid[0].set_ylabel(label)
        grid[0].set_ylim(bottom=0)

    value, block, kind = max(
        (value, block, kind) for lines in panels.values() for kind, points in lines.items() for block, value in points
    )
    unit = " %" if "%" in label else ""
    title = f"{subject} over depth: largest {number(value)}{unit}, {line(kind, 20)} of block {block}"
    return _Drawing(name, title, 3.6, paint)


def _sizes(results: RunResults) -> _Drawing | None:
    sizes = {name.replace("_", " "): value for name, value in results.sizes.items() if is_finite(value)}
    if not sizes:
        return None
    colours = ["dense" if "dense" in name.lower() else "learned" for name in sizes]
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
    scale, unit = next((pair for pair in units if max(sizes.values()) >= pair[0]), units[-1])

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        values = [value / scale for value in sizes.values()]
        axes.set_xlim(0, max(values) * 1.15 or 1)
        bars(axes, theme, list(sizes), values, [size(v) for v in sizes.values()], [theme.role(c) for c in colours])
        axes.set_xlabel(f"size ({unit})")

    told = ", ".join(f"{line(name, 24)} {size(value)}" for name, value in list(sizes.items())[:3])
    return _Drawing("sizes", f"Sizes: {told}", 1.2 + 0.36 * len(sizes), paint)


def _time(results: RunResults) -> _Drawing | None:
    stages = {name: value for name, value in results.seconds_by_stage.items() if is_finite(value)}
    if not stages:
        return None
    longest = max(stages, key=stages.__getitem__)
    scale, unit = (
        (3600, "hours") if stages[longest] >= 7200 else (60, "minutes") if stages[longest] > 99.5 else (1, "seconds")
    )

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        values = [value / scale for value in stages.values()]
        axes.set_xlim(0, max(values) * 1.15 or 1)
        texts = [duration(value) for value in stages.values()]
        bars(axes, theme, list(stages), values, texts, [theme.series[0]] * len(stages))
        axes.set_xlabel(f"wall time ({unit})")

    total = duration(float(sum(stages.values())))
    title = f"Time by stage: {line(longest, 30)} takes {duration(stages[longest])} of {total}"
    return _Drawing("time", title, 1.2 + 0.36 * len(stages), paint)


def _series(history: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) of each log line that holds both as numbers."""
    return [(r["step"], r[key] * factor) for r in history if is_finite(r.get("step")) and is_finite(r.get(key))]


def _change(points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    return number(last) if len(points) == 1 else f"{number(first)} → {number(last)}"


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("optimizer step")


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high < 2000 * low else (1,)  # labels of a wider range would overlap
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _role_legend(axes: Axes, theme: Theme, roles: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    present = [role for role in ("dense", "learned", "one-shot") if role in roles]
    words = {"dense": "dense model", "learned": "learned mask", "one-shot": "one-shot mask"}
    handles = [Patch(color=theme.role(role), label=words[role]) for role in present]
    legend(axes, theme, handles=handles, **ABOVE, ncols=3)
