# SPDX-License-Identifier: Apache-2.0
"""A run as one self-contained page and a few plots. The only input is a `RunResults`."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import staged_folder
from ..results import RunResults
from .figures import draw
from .html import render

__all__ = ["write_report"]


def write_report(results: RunResults, folder: str | os.PathLike) -> Path:
    """Write `report.html`, which needs no other file and no network, and its plots as PNG files beside it.

    What the results do not hold is called "not measured" in the page and has no plot. Plots need matplotlib.

    Args:
        results (`RunResults`): the run.
        folder (`str` or `PathLike`): where to write; made if missing. All files appear together or, on failure, none.

    Returns:
        `Path`: the page.

    Raises:
        UnsupportedError: if there is something to plot and matplotlib is not installed.
    """
    plots = draw(results)
    page = render(results, plots)
    with staged_folder(folder) as staging:
        for plot in plots:
            (staging / f"{plot.name}.png").write_bytes(plot.light)
        # Text from outside may hold lone surrogates, which UTF-8 cannot carry.
        (staging / "report.html").write_bytes(page.encode("utf-8", errors="replace"))
    return Path(folder) / "report.html"
