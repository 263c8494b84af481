# SPDX-License-Identifier: Apache-2.0
"""A run, or several side by side, as one self-contained page and a few plots. The only input are `RunResults`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..files import staged_folder
from ..results import RunResults
from .comparison import render_comparison
from .comparison_figures import MaskOverlap, draw_comparison
from .drawing import Plot
from .figures import draw
from .html import headline, render

__all__ = ["MaskOverlap", "headline", "write_comparison", "write_report"]


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
    return _write(folder, render(results, plots), plots)


def write_comparison(
    runs: Mapping[str, RunResults], folder: str | os.PathLike, overlap: MaskOverlap | None = None
) -> Path:
    """Write `report.html` with several runs side by side, and its plots, as `write_report` does.

    A value stands beside the dense model's of the same text or items only; runs share a row only where they are known to have
    been given the same.

    Args:
        runs (`dict[str, RunResults]`): the runs by name, in the order of the columns.
        folder (`str` or `PathLike`): where to write; made if missing. All files appear together or, on failure, none.
        overlap (`MaskOverlap`, *optional*): of their masks, where these were compared.

    Returns:
        `Path`: the page.

    Raises:
        ConfigError: if there is no run, or the overlap names one that is not there.
        UnsupportedError: if there is something to plot and matplotlib is not installed.
    """
    if not runs:
        raise ConfigError("there is no run to write a page of; give at least one")
    if overlap is not None and (strangers := sorted(set(overlap.names) - set(runs))):
        raise ConfigError(f"the overlap names {strangers}, which are not among the runs {list(runs)}")
    plots = draw_comparison(runs, overlap)
    return _write(folder, render_comparison(runs, plots, overlap), plots)


def _write(folder: str | os.PathLike, page: str, plots: Sequence[Plot]) -> Path:
    with staged_folder(folder) as staging:
        for plot in plots:
            (staging / f"{plot.name}.png").write_bytes(plot.light)
        # Text from outside may hold lone surrogates, which UTF-8 cannot carry.
        (staging / "report.html").write_bytes(page.encode("utf-8", errors="replace"))
    return Path(folder) / "report.html"
