# SPDX-License-Identifier: Apache-2.0
"""A plot before and after it is rendered: light and dark, for a page and for a phone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .canvas import DARK, LIGHT, Paint, png


@dataclass(frozen=True)
class Plot:
    """One plot.

    Args:
        name (`str`): file name without `.png`.
        title (`str`): what the plot shows, in words.
        light (`bytes`), dark (`bytes`): PNG for pages of either kind.
        narrow_light (`bytes`), narrow_dark (`bytes`): the same for phones, whose width would make those hard to read.
    """

    name: str
    title: str
    light: bytes
    dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


@dataclass(frozen=True)
class Drawing:
    """A plot before it is rendered: `height` in inches, for phones `narrow_height`; `paint(figure, theme)` draws it."""

    name: str
    title: str
    height: float
    paint: Paint
    narrow_height: float | None = None


def rendered(drawings: Iterable[Drawing | None]) -> list[Plot]:
    """Each drawing that there is, as pictures.

    Raises:
        UnsupportedError: if there is one and matplotlib is not installed.
    """
    return [_plot(drawing) for drawing in drawings if drawing is not None]


def _plot(drawing: Drawing) -> Plot:
    title, paint = drawing.title, drawing.paint
    wide = [png(title, drawing.height, paint, theme) for theme in (LIGHT, DARK)]
    narrow = [png(title, drawing.narrow_height or drawing.height, paint, theme, True) for theme in (LIGHT, DARK)]
    return Plot(drawing.name, title, *wide, *narrow)
