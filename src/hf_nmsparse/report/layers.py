# SPDX-License-Identifier: Apache-2.0
"""Per-layer numbers arranged for plotting: `model.layers.3.mlp.down_proj` is block 3, part "mlp", type "down"."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..results import is_finite

Points = list[tuple[int, float]]  # (block, mean value), blocks ascending

_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_ERROR = "relative_error"
# More panels side by side than this cannot be read at the width of the page.
_MAX_PANELS = 3


def place(name: str) -> tuple[int, str, str] | None:
    """(block, part, type) of a layer's name, or `None` if no component of it is a number."""
    *parents, last = name.split(".")
    block = next((int(part) for part in parents if part.isdecimal()), None)
    if block is None:
        return None
    part = next(part for part in [*reversed(parents), ""] if not part.isdecimal())
    return block, part, last.removesuffix("_proj")


def type_curves(layers: Sequence[dict[str, Any]], field: str, factor: float = 1.0) -> dict[str, dict[str, Points]]:
    """{part: {type: points}} of one field times `factor`; with many parts, or one, everything is in the part ""."""
    placed = [(place(str(layer.get("name", ""))), layer.get(field)) for layer in layers]
    found = [(*where, value * factor) for where, value in placed if where is not None and is_finite(value)]
    parts = {part for _, part, _, _ in found}
    panels: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for block, part, kind, value in sorted(found, key=lambda item: _position(item[2])):
        panels[part if 1 < len(parts) <= _MAX_PANELS else ""][kind][block].append(value)
    return {panel: {kind: _means(blocks) for kind, blocks in kinds.items()} for panel, kinds in panels.items()}


def criteria_curves(layers: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """{criterion: points} of the relative error, averaged over each block.

    A criterion is named by the layer's "criterion", or by what is added to the field: "relative_error_wanda".
    """
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        where = place(str(layer.get("name", "")))
        if where is None:
            continue
        for field, value in layer.items():
            if _ERROR in field and is_finite(value):
                added = field.replace(_ERROR, "").strip("_/.:- ")
                values[added or str(layer.get("criterion", ""))][where[0]].append(value)
    return {criterion: _means(blocks) for criterion, blocks in values.items()}


@dataclass(frozen=True)
class LayerGrid:
    """Means of one field by kind of layer (rows) and block (columns); NaN where there is no such layer."""

    kinds: list[str]
    blocks: list[int]
    values: list[list[float]]


def layer_grid(layers: Sequence[dict[str, Any]], field: str, factor: float = 1.0) -> LayerGrid | None:
    """One field times `factor` as a matrix, or `None` if no layer that has it lies in a block."""
    panels = type_curves(layers, field, factor)
    rows = [(part, kind, dict(points)) for part, kinds in panels.items() for kind, points in kinds.items()]
    if not rows:
        return None
    blocks = sorted({block for _, _, points in rows for block in points})
    every = [kind for _, kind, _ in rows]
    kinds = [f"{part}.{kind}" if every.count(kind) > 1 else kind for part, kind, _ in rows]
    return LayerGrid(kinds, blocks, [[points.get(block, math.nan) for block in blocks] for _, _, points in rows])


def error_field(layers: Sequence[dict[str, Any]]) -> str:
    """The field of the relative error, when it is that of one criterion only."""
    return next((field for layer in layers for field in layer if _ERROR in field), _ERROR)


def _means(blocks: dict[int, list[float]]) -> Points:
    return [(block, sum(found) / len(found)) for block, found in sorted(blocks.items())]


def _position(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)
