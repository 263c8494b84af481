# SPDX-License-Identifier: Apache-2.0
"""The page that puts several runs side by side. What a run did not measure is called so; nothing is filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..results import MISSING, RunResults, is_finite, number
from .comparison_figures import MaskOverlap
from .drawing import Plot
from .facts import duration, percent, size, speed_ratio, times
from .html import settings
from .measured import Estimate, change_with_error, with_error
from .page import Cell as Entry
from .page import TableRow, fill, table_row
from .shared import Cell, Shared, compared_agreements, compared_tasks, compared_texts, repeated


def render_comparison(
    runs: Mapping[str, RunResults],
    plots: Sequence[Plot],
    overlap: MaskOverlap | None = None,
) -> str:
    """The page as one HTML document. Everything from the runs and their names is escaped."""
    texts, tasks, agreement = compared_texts(runs), compared_tasks(runs), compared_agreements(runs)
    return fill(
        "comparison.html.jinja",
        plots,
        title=f"{len(runs)} runs side by side",
        summary=_summary(runs),
        names=list(runs),
        perplexities=[_measured(runs, row, _perplexity, share=False) for row in texts],
        tasks=[_measured(runs, row, _score, row.is_share) for row in tasks],
        agreement=_agreement(runs, agreement),
        repeated=repeated(tasks),
        own_dense=any(row.dense is None for row in texts),
        sizes=_sizes(runs),
        speed=_speed(runs),
        overlap=overlap,
        expected=None if overlap is None or overlap.chance is None else percent(overlap.chance),
        samples=_samples(runs),
        settings=_settings(runs),
        commands=[(name, results.command) for name, results in runs.items()],
    )


def _summary(runs: Mapping[str, RunResults]) -> str:
    bases = {str(results.base_model) for results in runs.values() if results.base_model}
    patterns = {str(results.pattern) for results in runs.values() if results.pattern}
    words = []
    if len(bases) == 1:
        words.append(f"All are of {bases.pop()}." if all(r.base_model for r in runs.values()) else "")
    elif bases:
        words.append(f"They are of {len(bases)} base models, so that only ratios to dense can be compared.")
    if len(patterns) == 1:
        words.append(f"Pattern {patterns.pop()}." if all(r.pattern for r in runs.values()) else "")
    return " ".join(filter(None, words))


# --- measurements ---------------------------------------------------------------------------------------------------
def _measured(
    runs: Mapping[str, RunResults],
    row: Shared,
    entry: Callable[[Shared, Cell], Entry],
    share: bool,
) -> TableRow:
    """Dense first, then each run."""
    dense = row.dense
    if dense is not None:
        first = (with_error(dense, share), "")
    else:
        known = any(cell.dense.value is not None for cell in row.cells.values())
        first = ("of each run", "") if known else (MISSING, "")
    cells = [entry(row, row.cells[name]) if name in row.cells else (MISSING, "") for name in runs]
    return (row.name, row.note, [first, *cells], False)


def _perplexity(row: Shared, cell: Cell) -> Entry:
    if cell.ratio is None:
        return (with_error(cell.this), "")
    own = "" if row.dense is not None else f" of {number(cell.dense.value)}"
    return (with_error(cell.this), f"{times(cell.ratio)}{own or ' dense'}")


def _score(row: Shared, cell: Cell) -> Entry:
    share = row.is_share
    if cell.difference.value is None:
        return (with_error(cell.this, share), "")
    change = change_with_error(cell.difference, share)
    own = "" if row.dense is not None else f" from {with_error(Estimate(cell.dense.value), share)}"
    return (with_error(cell.this, share), f"{change}{own}")


def _agreement(runs: Mapping[str, RunResults], pairs: Sequence[tuple[Shared, Shared]]) -> list[TableRow]:
    def cells(row: Shared, share: bool) -> list[Entry]:
        return [(with_error(row.cells[name].this, share) if name in row.cells else MISSING, "") for name in runs]

    rows = []
    for top1, kl in pairs:
        for measure, row in (("same likeliest token", top1), ("KL, nats a token", kl)):
            note = f"{measure}; {row.note}" if row.note else measure
            rows.append((row.name, note, cells(row, row is top1), False))
    return rows


# --- sizes, speed, settings -----------------------------------------------------------------------------------------
def _sizes(runs: Mapping[str, RunResults]) -> list[TableRow]:
    kinds = list(dict.fromkeys(name for results in runs.values() for name in results.sizes))
    columns: list[tuple[str, Callable[[RunResults], str]]] = [
        ("Mask, bits per pruned weight", lambda results: number(results.mask_bits_per_weight)),
        ("Packed layers, of dense bfloat16", lambda results: percent(results.packed_ratio)),
        *((kind.replace("_", " "), lambda results, kind=kind: size(results.sizes.get(kind))) for kind in kinds),
        ("Sparse layers", lambda results: number(len(results.sparse_layers) or None)),
        ("Wall time", lambda results: duration(results.seconds)),
    ]
    return [table_row(name, "", [value(results) for results in runs.values()]) for name, value in columns]


def _speed(runs: Mapping[str, RunResults]) -> list[TableRow]:
    """Milliseconds and ratio to dense; the same kernel on the same device with the same tokens shares a row."""
    rows: dict[tuple[str, str], dict[str, Entry]] = {}
    for name, results in runs.items():
        for entry in results.speed:
            tokens = number(entry.get("tokens"))
            places = [f"{tokens} token{'' if tokens == '1' else 's'}", entry.get("device"), entry.get("kernel")]
            key = (str(entry.get("name", MISSING)), ", ".join(str(place) for place in places if place is not None))
            milliseconds = entry.get("milliseconds")
            text = f"{number(milliseconds)} ms" if is_finite(milliseconds) else number(milliseconds)
            ratio = speed_ratio(entry, "× dense speed") if is_finite(entry.get("ratio")) else ""
            rows.setdefault(key, {})[name] = (text, ratio)
    return [
        (what, place, [cells.get(name, (MISSING, "")) for name in runs], False)
        for (what, place), cells in rows.items()
    ]


def _settings(runs: Mapping[str, RunResults]) -> list[TableRow]:
    found = {name: dict(settings(results)) for name, results in runs.items()}
    names = list(dict.fromkeys(setting for pairs in found.values() for setting in pairs))
    rows = [(setting, [str(pairs.get(setting, "none")) for pairs in found.values()]) for setting in names]
    return [(setting, "", [(cell, "") for cell in cells], len(set(cells)) == 1) for setting, cells in rows]


# --- samples --------------------------------------------------------------------------------------------------------
def _samples(runs: Mapping[str, RunResults]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """(prompt, [(whose, text)]): the dense text once where all runs have the same, else beside each run."""
    prompts: dict[str | None, list[tuple[str, dict[str, Any]]]] = {}
    for name, results in runs.items():
        for sample in results.samples:
            prompt = sample.get("prompt")
            prompts.setdefault(None if prompt is None else str(prompt), []).append((name, sample))
    return [(prompt, _side_by_side(samples)) for prompt, samples in prompts.items()]


def _side_by_side(samples: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    dense = [str(sample["dense"]) for _, sample in samples if "dense" in sample]
    once = len(set(dense)) == 1
    texts = [("dense", dense[0])] if once else []
    for name, sample in samples:
        others = {role: str(text) for role, text in sample.items() if role not in ("prompt", "dense")}
        if not once and "dense" in sample:
            texts.append((f"dense of {name}", str(sample["dense"])))
        texts += [(name if len(others) == 1 else f"{name}, {role}", text) for role, text in others.items()]
    return texts
