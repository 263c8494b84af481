# SPDX-License-Identifier: Apache-2.0
"""The plots of one run, each drawn only if its numbers exist: here those of bars, the others beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..results import RunResults, is_finite
from .canvas import LOG_RANGE, Theme, bars, is_narrow, label_x, legend_above, log_limits, plain_log_ticks
from .drawing import Drawing, Plot, rendered
from .facts import best_mask, duration, line, number, perplexity_rows, size, times
from .layer_figures import layer_errors, layer_flips, layer_map, output_errors
from .score_figures import task_scores
from .training_figures import mask_curves, training_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(results: RunResults) -> list[Plot]:
    """All plots that the results have numbers for, in reading order.

    Raises:
        UnsupportedError: if there is one and matplotlib is not installed.
    """
    kinds = (
        _perplexity,
        task_scores,
        output_errors,
        training_loss,
        mask_curves,
        layer_errors,
        layer_flips,
        layer_map,
        _sizes,
        _time,
    )
    return rendered(kind(results) for kind in kinds)


def _perplexity(results: RunResults) -> Drawing | None:
    rows = perplexity_rows(results)
    finite = [row.value for row in rows if is_finite(row.value) and row.value > 0]
    if not finite:
        return None
    best, worst = min(finite), max(finite)
    dense = next((row for row in rows if row.role == "dense" and row.value in finite), None)
    logarithmic = worst > LOG_RANGE * best

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        if logarithmic:
            axes.set_xscale("log")
            # From the dense value a bar has a meaning on a log scale: its length is the loss added per token.
            start = dense.value if dense else best / 2
            axes.set_xlim(*log_limits(min(best, start), worst, 0.8 if is_narrow(figure) else 0.3))
        else:
            start = 0.0
            axes.set_xlim(0, worst * (1.75 if is_narrow(figure) else 1.3))
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
        label_x(axes, f"perplexity of held-out text (lower is better{scale})")
        if logarithmic:
            plain_log_ticks(axes, axes.xaxis)
        if logarithmic and dense:  # its bar has no length
            axes.plot(dense.value, rows.index(dense), "o", color=theme.dense, markersize=7)
        _role_legend(axes, theme, [row.role for row in rows])

    told = [f"{line(row.name, 30)} {number(row.value)}" for row in (best_mask(rows), dense) if row]
    return Drawing("perplexity", "Held-out perplexity: " + " against ".join(told), 1.5 + 0.36 * len(rows), paint)


def _sizes(results: RunResults) -> Drawing | None:
    sizes = {name.replace("_", " "): value for name, value in results.sizes.items() if is_finite(value)}
    if not sizes:
        return None
    colours = ["dense" if "dense" in name.lower() else "learned" for name in sizes]
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
    scale, unit = next((pair for pair in units if max(sizes.values()) >= pair[0]), units[-1])

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        values = [value / scale for value in sizes.values()]
        axes.set_xlim(0, max(values) * (1.45 if is_narrow(figure) else 1.15) or 1)
        bars(axes, theme, list(sizes), values, [size(v) for v in sizes.values()], [theme.role(c) for c in colours])
        axes.set_xlabel(f"size ({unit})")

    told = ", ".join(f"{line(name, 24)} {size(value)}" for name, value in list(sizes.items())[:3])
    return Drawing("sizes", f"Sizes: {told}", 1.2 + 0.36 * len(sizes), paint)


def _time(results: RunResults) -> Drawing | None:
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
        axes.set_xlim(0, max(values) * (1.45 if is_narrow(figure) else 1.15) or 1)
        texts = [duration(value) for value in stages.values()]
        bars(axes, theme, list(stages), values, texts, [theme.series[0]] * len(stages))
        axes.set_xlabel(f"wall time ({unit})")

    total = duration(float(sum(stages.values())))
    title = f"Time by stage: {line(longest, 30)} takes {duration(stages[longest])} of {total}"
    return Drawing("time", title, 1.2 + 0.36 * len(stages), paint)


def _role_legend(axes: Axes, theme: Theme, roles: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    present = [role for role in ("dense", "learned", "one-shot") if role in roles]
    words = {"dense": "dense model", "learned": "learned mask", "one-shot": "one-shot mask"}
    handles = [Patch(color=theme.role(role), label=words[role]) for role in present]
    legend_above(axes, theme, [words[role] for role in present], handles=handles)
