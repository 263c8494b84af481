# SPDX-License-Identifier: Apache-2.0
"""Where in the model something is lost: curves over depth, and maps of block by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..results import RunResults
from .canvas import Theme, curves, is_narrow, panels
from .drawing import Drawing
from .facts import line, number
from .grouped import colour_bar, heat_map
from .layers import criteria_curves, error_field, layer_grid, type_curves
from .measured import agreements

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_errors(results: RunResults) -> Drawing | None:
    """Relative error over depth, by criterion if there are several, else by type of layer."""
    by_criterion = criteria_curves(results.layers)
    if len(by_criterion) < 2:
        subject = "Relative error of the pruned layers"
        return _by_type(results.layers, error_field(results.layers), "layer_error", subject, "relative error", 1.0)

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
    return Drawing("layer_error", title, 3.6, paint)


def layer_flips(results: RunResults) -> Drawing | None:
    """Groups changed against the prior, over depth."""
    subject = "Flip rate of the pruned layers"
    return _by_type(results.layers, "flip_rate", "layer_flips", subject, "flip rate (% of groups)", 100.0)


def output_errors(results: RunResults) -> Drawing | None:
    """How far the output of each layer is from the dense model's, over depth, on the first text that it was measured on."""
    found = next((entry for entry in agreements(results) if entry.layers), None)
    if found is None:
        return None
    subject = f"Output error on {line(found.name, 24)}"
    return _by_type(found.layers, "output_error", "agreement_layers", subject, "relative error of the output", 1.0)


def _by_type(
    layers: Sequence[dict[str, Any]], field: str, name: str, subject: str, label: str, factor: float
) -> Drawing | None:
    parts = type_curves(layers, field, factor)
    if not parts:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        grid = panels(figure, len(parts), len(parts), sharey=True)
        for axes, (part, lines) in zip(grid, parts.items(), strict=True):
            curves(axes, theme, lines)
            axes.set_xlabel(f"block (depth){', ' if part else ''}{line(part, 30)}", parse_math=False)
            if is_narrow(figure) or axes is grid[0]:
                axes.set_ylabel(label)
        grid[0].set_ylim(bottom=0)

    value, block, kind = max(
        (value, block, kind) for lines in parts.values() for kind, points in lines.items() for block, value in points
    )
    unit = " %" if "%" in label else ""
    title = f"{subject} over depth: largest {number(value)}{unit}, {line(kind, 20)} of block {block}"
    return Drawing(name, title, 3.6, paint, 0.4 + 2.8 * len(parts))


# --- the map --------------------------------------------------------------------------------------------------------
# field of a layer, title of the panel, factor, whether low values mean that much was changed
_MAP_PANELS = (
    ("relative_error", "Relative error", 1.0, False),
    ("kept_energy", "Kept energy (%)", 100.0, True),
    ("flip_rate", "Flips against the prior (% of groups)", 100.0, False),
    ("output_error", "Relative error of the output", 1.0, False),
)


def layer_map(results: RunResults) -> Drawing | None:
    """Heat maps of block by kind of layer, one for each quantity that there is."""
    measured = next((entry.layers for entry in agreements(results) if entry.layers), [])
    found = []
    for field, title, factor, low_is_strong in _MAP_PANELS:
        field = error_field(results.layers) if field == "relative_error" else field
        grid = layer_grid([*results.layers, *measured], field, factor)
        if grid is not None and not (field.startswith("relative_error") and len(criteria_curves(results.layers)) > 1):
            found.append((grid, title, low_is_strong))
    if not found:
        return None

    def paint(figure: Figure, theme: Theme) -> None:
        for axes, (grid, title, low_is_strong) in zip(panels(figure, len(found), 2), found, strict=True):
            known = [value for row in grid.values for value in row if math.isfinite(value)]
            low = min(known) if low_is_strong else min(0.0, *known)
            limits = (low, max(known) if max(known) > low else low + 1)
            image = heat_map(axes, theme, grid.values, limits, low_is_strong)
            axes.set_title(title, fontsize=10, loc="left", color=theme.ink)
            axes.set_yticks(range(len(grid.kinds)), [line(kind, 14) for kind in grid.kinds], parse_math=False)
            shown = range(0, len(grid.blocks), -(-len(grid.blocks) // 10))
            axes.set_xticks(shown, [str(grid.blocks[place]) for place in shown])
            axes.set_xlabel("block (depth)")
            colour_bar(axes, theme, image)

    tallest = 0.75 + 0.2 * max(len(grid.kinds) for grid, *_ in found)
    title = "Map of the layers: the stronger the colour, the more was changed"
    return Drawing("layer_map", title, 0.4 + tallest * -(-len(found) // 2), paint, 0.4 + tallest * len(found))
