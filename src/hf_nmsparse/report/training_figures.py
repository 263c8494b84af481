# SPDX-License-Identifier: Apache-2.0
"""How training went: losses, the perplexity of the hard mask, and how the mask settles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..results import RunResults, number
from .canvas import LOG_RANGE, Theme, curves, legend_above, panels, plain_log_ticks, run_colours, style
from .drawing import Drawing
from .facts import line
from .measured import hard_losses, hard_perplexities, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_SHORT = {"training loss": "training", "hard-mask evaluation loss": "hard mask"}


def training_loss(results: RunResults) -> Drawing | None:
    """Losses over steps and, where the hard mask was evaluated on the way, its perplexity."""
    found = {
        "training loss": series(results.history, "loss"),
        "hard-mask evaluation loss": hard_losses(results.history),
    }
    found = {name: points for name, points in found.items() if points}
    perplexities = hard_perplexities(results.history)
    if not found:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        axes, *others = panels(figure, 2 if perplexities else 1, 2)
        for name, points in found.items():
            training = name == "training loss"
            axes.plot(
                *zip(*points, strict=True),
                color=theme.muted if training else theme.learned,
                linewidth=1.3 if training else 2.0,
                marker=None if training and len(points) > 1 else "o",
                markersize=5,
                label=_SHORT[name],
            )
        axes.set_ylabel("loss (nats per token)")
        style(axes, theme)
        _step_axis(axes)
        legend_above(axes, theme, [_SHORT[name] for name in found])
        for other in others:
            other.plot(*zip(*perplexities, strict=True), color=theme.learned, linewidth=2.0, marker="o", markersize=5)
            _perplexity_axis(other, theme, [perplexities])
            other.set_title("Hard-mask perplexity", fontsize=10, loc="left", color=theme.ink)

    told = "; ".join(f"{name} {_change(points)}" for name, points in found.items())
    return Drawing("training", told[0].upper() + told[1:], 3.4, paint, 6.0 if perplexities else 3.2)


def compared_training(runs: Mapping[str, RunResults]) -> Drawing | None:
    """Perplexity of the hard mask over steps, of all runs that evaluated it on the way."""
    found = {name: points for name, results in runs.items() if (points := hard_perplexities(results.history))}
    if not found:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = run_colours(theme, runs)
        curves(axes, theme, found, [colours[name] for name in found])
        if len(found) == 1:
            legend_above(axes, theme, [line(name, 24) for name in found])
        _perplexity_axis(axes, theme, list(found.values()))
        axes.set_ylabel("hard-mask perplexity, log scale" if axes.get_yscale() == "log" else "hard-mask perplexity")

    name, points = min(found.items(), key=lambda item: item[1][-1][1])
    title = f"Perplexity of the hard mask in training: {line(name, 30)} ends lowest, at {number(points[-1][1])}"
    extra = 0.18 * len(found)
    return Drawing("training", title, 3.6 + extra / 2, paint, 3.4 + extra)


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


def mask_curves(results: RunResults) -> Drawing | None:
    """Flips, probabilities and entropy over steps, and the schedules behind them."""
    found = [(key, title, series(results.history, key, factor)) for key, title, factor in _MASK_PANELS]
    found = [panel for panel in found if panel[2]]
    if not found:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        for axes, (key, title, points) in zip(panels(figure, len(found), 3), found, strict=True):
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

    flips = series(results.history, "nm/flip_rate", 100.0)
    title = "How the mask settles" + (f": {_change(flips)} % of the groups changed since the start" if flips else "")
    return Drawing("mask", title, 0.6 + 2.0 * math.ceil(len(found) / 3), paint, 0.5 + 1.7 * len(found))


def _perplexity_axis(axes: Axes, theme: Theme, curves_of: Sequence[Sequence[tuple[float, float]]]) -> None:
    """From 0; on a log scale where the largest value would hide the others."""
    values = [value for points in curves_of for _, value in points]
    if max(values) > LOG_RANGE * min(values):
        axes.set_yscale("log")
        plain_log_ticks(axes, axes.yaxis)
    else:
        axes.set_ylim(0, 1.08 * max(values))
    style(axes, theme)
    _step_axis(axes)


def _change(points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    return number(last) if len(points) == 1 else f"{number(first)} → {number(last)}"


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("optimizer step")
