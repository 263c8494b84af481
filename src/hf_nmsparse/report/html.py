# SPDX-License-Identifier: Apache-2.0
"""The page of a report: words and tables computed from the results, plots embedded, nothing fetched."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Sequence

import jinja2

from ..pattern import NMPattern
from ..results import MISSING, RunResults, is_finite
from .facts import (
    Gap,
    Row,
    best_mask,
    duration,
    gap,
    number,
    packed_bound,
    perplexity_rows,
    size,
    times,
)
from .figures import Plot


def render(results: RunResults, plots: Sequence[Plot]) -> str:
    """The page as one HTML document. Everything from `results` is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    template = importlib.resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows = perplexity_rows(results)
    gap_closed = gap(rows)
    return environment.from_string(template).render(
        missing=MISSING,
        title=f"{results.base_model or 'Model'} at {results.pattern or 'n:m'} sparsity",
        summary=" ".join(_summary(results, rows, gap_closed)),
        key_figures=_key_figures(results, rows, gap_closed),
        perplexity=[
            (row.name, row.role, number(row.value), "" if row.ratio is None else times(row.ratio)) for row in rows
        ],
        scored=_scored(results),
        gap=gap_closed and _gap_formula(gap_closed),
        bounds=_bounds(results),
        files=[(name.replace("_", " "), size(value), number(value)) for name, value in results.sizes.items()],
        plots={plot.name: plot for plot in plots},
        samples=results.samples,
        speed=[
            (
                *(entry.get(key, MISSING) for key in ("name", "device")),
                *(number(entry.get(key)) for key in ("tokens", "milliseconds", "ratio")),
            )
            for entry in results.speed
        ],
        settings=_settings(results),
        environment=results.environment,
        command=results.command,
    )


def _summary(results: RunResults, rows: Sequence[Row], gap_closed: Gap | None) -> list[str]:
    """Sentences about what the results hold; nothing is said about what they do not."""
    sentences = []
    pattern = results.parsed_pattern
    subject = f"{results.base_model} was pruned" if results.base_model else "A model was pruned"
    kept = ""
    if isinstance(pattern, NMPattern):
        kept = f" to {pattern} ({pattern.n} of every {pattern.m} consecutive weights kept)"
    elif pattern is not None:
        kept = f" by {pattern} of the weights of each layer"
    method = f" with {results.method}" if results.method else ""
    if results.base_model or kept or method:
        sentences.append(f"{subject}{kept}{method}.")
    if results.sparse_layers:
        dense = f", {_layers(results.dense_layers)} dense" if results.dense_layers else ""
        sentences.append(f"{_layers(results.sparse_layers)} sparse{dense}.")
    if results.side_branch:
        sentences.append(f"Beside the mask the model computes {results.side_branch}.")
    sentences += _perplexity_sentences(rows, gap_closed)
    if is_finite(results.mask_bits_per_weight):
        bound = f" (bound: {number(results.mask_bits_bound)})" if is_finite(results.mask_bits_bound) else ""
        takes = "The mask and its terms take" if results.terms else "The mask takes"
        sentences.append(f"{takes} {number(results.mask_bits_per_weight)} bit for each pruned weight{bound}.")
    if is_finite(results.packed_ratio):
        sentences.append(
            f"Packed, the pruned layers take {_percent(results.packed_ratio)} of their dense bfloat16 bytes."
        )
    if results.base_unchanged is not None:
        state = "were bit-equal" if results.base_unchanged else "were NOT equal"
        sentences.append(f"The base weights {state} before and after training.")
    if results.reload_bit_equal is not None:
        state = "equal the merged ones bit for bit" if results.reload_bit_equal else "do NOT equal the merged ones"
        sentences.append(f"The packed weights, reloaded, {state}.")
    if is_finite(results.seconds):
        sentences.append(f"The run took {duration(results.seconds)}.")
    return sentences or ["The results hold no measurement."]


def _perplexity_sentences(rows: Sequence[Row], gap_closed: Gap | None) -> list[str]:
    if gap_closed is not None:
        learned, one_shot = gap_closed.learned, gap_closed.one_shot
        closed = gap_closed.closed
        verdict = (
            f"the learned mask closes {_percent(closed)} of the gap"
            if closed > 0
            else "the learned mask closes none of the gap"
        )
        return [
            f"Held-out perplexity is {number(gap_closed.dense)} for the dense model, {number(one_shot.value)} for the "
            f"best one-shot mask ({one_shot.name}) and {number(learned.value)} for the learned mask: {verdict}."
        ]
    finite = [f"{number(row.value)} ({row.name})" for row in rows if is_finite(row.value)]
    return [f"Held-out perplexity: {', '.join(finite)}."] if finite else []


def _key_figures(results: RunResults, rows: Sequence[Row], gap_closed: Gap | None) -> list[tuple[str, str, str]]:
    """(label, value, note) of each tile."""
    mask = best_mask(list(rows))
    ratio = f"{times(mask.ratio)} dense" if mask and mask.ratio else ""
    bits, bound = results.mask_bits_per_weight, results.mask_bits_bound
    packed, planned = _percent(results.packed_ratio), results.planned_steps is not None
    return [
        (f"Perplexity, {mask.name if mask else 'best mask'}", number(mask.value if mask else None), ratio),
        ("Gap closed by learning", _percent(gap_closed.closed if gap_closed else None), "dense – best one-shot"),
        ("Mask, bits per pruned weight", number(bits), f"bound {number(bound)}"),
        ("Packed layers", packed, "of dense bfloat16"),
        ("Base unchanged", number(results.base_unchanged), "bit-equal before and after"),
        ("Reloads bit-equal", number(results.reload_bit_equal), "packed against merged"),
        ("Optimizer steps", number(results.steps), f"of {number(results.planned_steps)} planned" if planned else ""),
        ("Wall time", duration(results.seconds), ""),
    ]


def _scored(results: RunResults) -> str:
    return (
        f"Text: {results.data.get('evaluation') or MISSING}. Tokens scored for each row: "
        f"{number(results.perplexity_tokens)}; window: {number(results.perplexity_sequence_length)}."
    )


def _gap_formula(found: Gap) -> str:
    one_shot, learned, dense = number(found.one_shot.value), number(found.learned.value), number(found.dense)
    return (
        f"({found.one_shot.name} − {found.learned.name}) / ({found.one_shot.name} − dense) = "
        f"({one_shot} − {learned}) / ({one_shot} − {dense}) = {_percent(found.closed)}"
    )


def _bounds(results: RunResults) -> list[tuple[str, str, str]]:
    """(what, this run, least possible)."""
    pattern = results.parsed_pattern
    least = _percent(packed_bound(pattern)) if isinstance(pattern, NMPattern) else MISSING
    return [
        ("Mask, bits per pruned weight", number(results.mask_bits_per_weight), number(results.mask_bits_bound)),
        ("Packed layers, share of their dense bfloat16 bytes", _percent(results.packed_ratio), least),
    ]


def _settings(results: RunResults) -> list[tuple[str, str]]:
    roles = {"calibration": None, "training": None, "evaluation": None} | results.data
    return [
        ("Base model", results.base_model or MISSING),
        ("Base revision", results.base_revision or MISSING),
        ("Pattern", results.pattern or MISSING),
        ("Method", results.method or MISSING),
        ("Sparse layers", number(len(results.sparse_layers) or None)),
        *_besides(results),
        ("Dense layers", ", ".join(map(str, results.dense_layers)) or MISSING),
        *((f"Data, {role}", text or MISSING) for role, text in roles.items()),
        ("Seed", MISSING if results.seed is None else str(results.seed)),
        ("Optimizer steps", _steps(results)),
    ]


def _besides(results: RunResults) -> list[tuple[str, str]]:
    """What else than a mask on linear layers there is."""
    delta = results.terms.get("delta_rank")
    known = {
        "Beside the mask": results.side_branch,
        "Kept weights": f"trained, a change of rank {delta}" if delta else None,
        "Fused experts": ", ".join(map(str, results.fused_experts)),
    }
    return [(name, words) for name, words in known.items() if words]


def _steps(results: RunResults) -> str:
    planned = f" of {number(results.planned_steps)} planned" if results.planned_steps is not None else ""
    return number(results.steps) + (planned if results.steps is not None else "")


def _layers(names: Sequence[str]) -> str:
    return "1 linear layer is" if len(names) == 1 else f"{len(names):,} linear layers are"


def _percent(share: float | None) -> str:
    return f"{100 * share:.1f} %" if is_finite(share) else number(share)
