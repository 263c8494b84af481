# SPDX-License-Identifier: Apache-2.0
"""Pages from templates: everything is escaped, and what a template names must be there."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2

from ..results import MISSING
from .drawing import Plot

# A cell of a table: its text, and a smaller line below it.
Cell = tuple[str, str]
# What stands in front of a row, a smaller line below it, the cells, and whether they are all the same.
TableRow = tuple[str, str, list[Cell], bool]


def table_row(name: str, note: str, cells: Sequence[str]) -> TableRow:
    """A row of cells that have nothing below them."""
    return (name, note, [(cell, "") for cell in cells], False)


def fill(template: str, plots: Sequence[Plot], **content: Any) -> str:
    """The page of a template as one HTML document with its plots inside.

    Args:
        template (`str`): file beside this one.
        plots (`list[Plot]`): pictures it may show.
        **content: texts and tables of the template.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read),
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    shown = {plot.name: plot for plot in plots}
    return environment.get_template(template).render(missing=MISSING, plots=shown, **content)


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
