# SPDX-License-Identifier: Apache-2.0
"""Scores on tasks, perplexities and agreement as bars: of one run beside the dense model, or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..results import RunResults, number
from .canvas import (
    LIGHT,
    LOG_RANGE,
    Theme,
    is_narrow,
    label_x,
    legend_above,
    log_limits,
    panels,
    plain_log_ticks,
    run_colours,
)
from .drawing import Drawing
from .facts import line, percent, times
from .grouped import Bar, Group, grouped_bars, grouped_height
from .measured import Estimate, Task, tasks
from .shared import Shared, compared_agreements, compared_tasks, compared_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DENSE, _THIS = "dense model", "this model"
# Tasks of a run in one picture, with two bars each; the table has all of them.
_MOST_TASKS = 60


def task_scores(results: RunResults) -> Drawing | None:
    """Scores of one run beside the dense model's, for the tasks whose scores are shares."""
    every = [task for task in tasks(results) if task.is_share]
    found = every[:_MOST_TASKS]
    if not found:
        return None

    def groups(theme: Theme) -> list[Group]:
        return [
            Group(
                task.name,
                [
                    _share_bar(name, estimate, colour)
                    for name, estimate, colour in (
                        (_DENSE, task.dense, theme.dense),
                        (_THIS, task.this, theme.learned),
                    )
                    if estimate.value is not None
                ],
                _percents(task.chance),
            )
            for task in found
        ]

    return _share_drawing(f"Task scores{_first(found, every)}: {_told(every)}", groups, titled=False)


def compared_task_scores(runs: Mapping[str, RunResults]) -> Drawing | None:
    """Scores of several runs, task by task."""
    every = [shared for shared in compared_tasks(runs) if shared.is_share]
    found = every[: max(2 * _MOST_TASKS // (len(runs) + 1), 1)]
    if not found:
        return None

    def groups(theme: Theme) -> list[Group]:
        return [
            Group(shared.name, _run_bars(shared, theme, runs, _share_bar), _percents(shared.chance))
            for shared in found
        ]

    return _share_drawing(f"Task scores of the dense model and each run{_first(found, every)}", groups, titled=True)


def compared_perplexities(runs: Mapping[str, RunResults]) -> Drawing | None:
    """Perplexities of several runs, text by text."""
    found = compared_texts(runs)
    values = [value for shared in found for value in shared.values if value > 0]
    if not values:
        return None
    logarithmic = max(values) > LOG_RANGE * min(values)

    def groups(theme: Theme) -> list[Group]:
        # From the dense value a bar has a meaning on a log scale: its length is the loss added per token.
        starts = [
            (shared.dense.value if shared.dense else min(values) / 2) if logarithmic else 0.0 for shared in found
        ]
        return [
            Group(shared.name, _run_bars(shared, theme, runs, _perplexity_bar), start=start)
            for shared, start in zip(found, starts, strict=True)
        ]

    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        drawn = groups(theme)
        narrow = is_narrow(figure)
        if logarithmic:
            axes.set_xscale("log")
            low = min([*values, *(group.start for group in drawn)])
            axes.set_xlim(*log_limits(low, max(values), 0.6 if narrow else 0.25))
        else:
            axes.set_xlim(0, max(values) * (1.6 if narrow else 1.25))
        grouped_bars(axes, theme, drawn, titled=True)
        scale = ", log scale; bars start at dense" if logarithmic else ""
        label_x(axes, f"perplexity, and its ratio to dense (lower is better{scale})")
        if logarithmic:
            plain_log_ticks(axes, axes.xaxis)

    height = 0.9 + grouped_height(groups(LIGHT), titled=True)
    most = max(found, key=lambda shared: len(shared.cells))
    best = min(((cell.ratio, name) for name, cell in most.cells.items() if cell.ratio is not None), default=None)
    told = f": nearest to dense on {line(most.name, 40)} is {line(best[1], 30)}, {times(best[0])}" if best else ""
    return Drawing("perplexity", f"Perplexities{told}", height, paint, height + 0.2)


def compared_agreement(runs: Mapping[str, RunResults]) -> Drawing | None:
    """Top-1 agreement and KL of several runs, text by text."""
    found = compared_agreements(runs)
    sides = (
        ("same likeliest token (%, higher is better)", [shared for shared, _ in found if shared.values], _share_bar),
        (
            "KL from dense (nats a token, lower is better)",
            [shared for _, shared in found if shared.values],
            _plain_bar,
        ),
    )
    sides = tuple(side for side in sides if side[1])
    if not sides:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        narrow = is_narrow(figure)
        labels: list[list[str]] = []
        for axes, (label, shareds, bar) in zip(panels(figure, len(sides), 2), sides, strict=True):
            groups = [Group(shared.name, _run_bars(shared, theme, runs, bar)) for shared in shareds]
            labels.append([text for group in groups for text in (group.title, *(item.label for item in group.bars))])
            room = 1.3 if narrow else 1.25
            if bar is _share_bar:
                _share_axis(axes, groups, room)
            else:
                top = max(item.value + (item.error or 0) for group in groups for item in group.bars)
                axes.set_xlim(0, max(top, 0) * room or 1)
            beside_the_same = not narrow and len(labels) == 2 and labels[0] == labels[1]
            grouped_bars(axes, theme, groups, titled=True, labelled=not beside_the_same)
            label_x(axes, label)

    rows = [sum(len(shared.cells) + 1.7 for shared in shareds) for _, shareds, _ in sides]
    return Drawing(
        "agreement",
        "Agreement with the dense model, with standard errors",
        0.95 + 0.21 * max(rows),
        paint,
        0.4 + sum(0.7 + 0.21 * count for count in rows),
    )


def _share_drawing(title: str, groups: Callable[[Theme], list[Group]], titled: bool) -> Drawing:
    def paint(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        drawn = groups(theme)
        _share_axis(axes, drawn, 1.3 if is_narrow(figure) else 1.2)
        grouped_bars(axes, theme, drawn, titled)
        axes.set_xlabel("score (%), with standard errors")
        _share_legend(axes, theme, drawn, titled)

    drawn = groups(LIGHT)
    narrow_height = 1.45 + grouped_height(drawn, titled=True)
    return Drawing("tasks", title, 1.25 + grouped_height(drawn, titled), paint, narrow_height)


def _share_axis(axes: Axes, groups: Sequence[Group], room: float) -> None:
    """From 0 to the longest bar, with room for its text; no ticks beyond 100 %."""
    from matplotlib.ticker import FixedLocator

    top = max(bar.value + (bar.error or 0) for group in groups for bar in group.bars)
    top = max([top, *(group.mark for group in groups if group.mark is not None)]) or 1
    axes.set_xlim(0, top * room)
    step = next((step for step in (1, 2, 5, 10, 20) if top / step <= 6), 25)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in range(0, 101, step) if tick <= top * room]))


def _share_legend(axes: Axes, theme: Theme, groups: Sequence[Group], titled: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    if not titled:
        present = {bar.label for group in groups for bar in group.bars}
        colours = {_DENSE: theme.dense, _THIS: theme.learned}
        handles += [Patch(color=colour, label=name) for name, colour in colours.items() if name in present]
    if any(group.mark is not None for group in groups):
        handles.append(Line2D([], [], color=theme.ink, linewidth=1.3, linestyle=(0, (2, 1.5)), label="chance"))
    if handles:
        legend_above(axes, theme, [handle.get_label() for handle in handles], handles=handles)


def _run_bars(shared: Shared, theme: Theme, runs: Mapping[str, RunResults], bar: Callable[..., Bar]) -> list[Bar]:
    """Dense first, if it is the same for all runs; otherwise each run's own before the run."""
    colours = run_colours(theme, runs)
    bars = [bar("dense", shared.dense, theme.dense)] if shared.dense else []
    for name, cell in shared.cells.items():
        if not shared.dense and cell.dense.value is not None:
            bars.append(bar(f"dense of {name}", cell.dense, theme.dense))
        if cell.this.value is not None:
            bars.append(bar(name, cell.this, colours[name], cell.ratio))
    return bars


def _share_bar(name: str, estimate: Estimate, colour: str, _: float | None = None) -> Bar:
    error = None if estimate.error is None else 100 * estimate.error
    return Bar(name, 100 * estimate.value, error, percent(estimate.value), colour)


def _plain_bar(name: str, estimate: Estimate, colour: str, _: float | None = None) -> Bar:
    return Bar(name, estimate.value, estimate.error, number(estimate.value), colour)


def _perplexity_bar(name: str, estimate: Estimate, colour: str, ratio: float | None = None) -> Bar:
    text = number(estimate.value) + (f"   {times(ratio)}" if ratio is not None else "")
    return Bar(name, estimate.value, estimate.error, text, colour)


def _percents(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _first(shown: Sequence[object], every: Sequence[object]) -> str:
    return "" if len(shown) == len(every) else f" (the first {len(shown)} of {len(every)} rows)"


def _told(found: Sequence[Task]) -> str:
    compared = [(task.difference.value, task) for task in found if task.difference.value is not None]
    if not compared:
        return ", ".join(f"{line(task.task, 20)} {percent(task.this.value)}" for task in found[:3])
    change, task = min(compared, key=lambda pair: pair[0])
    if change >= 0:
        return f"none of {len(compared)} is lower than the dense model's"
    return f"most is lost on {line(task.name, 30)}, {percent(task.dense.value)} → {percent(task.this.value)}"
