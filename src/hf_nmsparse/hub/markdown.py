# SPDX-License-Identifier: Apache-2.0
"""Values and foreign text as Markdown: escaped for Markdown and HTML, on one line."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .. import results
from ..results import MISSING, is_finite, one_line


def number(value: Any) -> str:
    """A number as people read it; what is no number as `prose`."""
    return (
        results.number(value) if value is None or isinstance(value, (bool, int)) or is_finite(value) else prose(value)
    )


def ratio(value: Any, dense: Any) -> str:
    """`value / dense`, where both are numbers."""
    return f"{value / dense:.2f}" if is_finite(value) and is_finite(dense) and dense else MISSING


def megabytes(value: Any) -> str:
    """Bytes in MB."""
    return f"{value / 1e6:,.2f} MB" if is_finite(value) else number(value)


def layer_counts(names: Sequence[str]) -> str:
    """Layers counted by the last part of their name; few of them are named in full."""
    if not names:
        return MISSING
    if len(names) <= 4:
        return ", ".join(prose(name) for name in names)
    kinds = Counter(str(name).rsplit(".", 1)[-1] for name in names)
    return f"{len(names):,} (" + ", ".join(f"{prose(kind)} × {n:,}" for kind, n in kinds.items()) + ")"


def prose(text: Any) -> str:
    """Foreign text in Markdown: one line, no HTML, no markup, no table cell's end."""
    if text is None or text == "":
        return MISSING
    escaped = re.sub(r"([\\`*\[\]|~#])", r"\\\1", html.escape(one_line(text), quote=False))
    # An underscore inside a word is no emphasis; q_proj stays readable.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
