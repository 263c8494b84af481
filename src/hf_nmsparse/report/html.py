# SPDX-License-Identifier: Apache-2.0
"""The page of a report: words and tables computed from the results, plots embedded, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..pattern import NMPattern
from ..results import MISSING, RunResults, is_finite
from .drawing import Plot
from .facts import (
    Gap,
    Row,
    best_mask,
    duration,
    gap,
    number,
    packed_bound,
    percent,
    perplexity_rows,
    size,
    speed_ratio,
    times,
)
from .measured import (
    Agreement,
    Estimate,
    Task,
    Text,
    agreements,
    change_with_error,
    held_out,
    tasks,
    texts,
    with_error,
)
from .page import TableRow, fill, table_row


def render(results: RunResults, plots: Sequence[Plot]) -> str:
    """The page as one HTML document. Everything from `results` is escaped."""
    rows = perplexity_rows(results)
    gap_closed = gap(rows)
    speed_columns, speed_words, speed = _speed(results)
    return fill(
        "report.html.jinja",
        plots,
        title=f"{results.base_model or 'Model'} at {results.pattern or 'n:m'} sparsity",
        summary=" ".join(_summary(results, rows, gap_closed)),
        key_figures=_key_figures(results, rows, gap_closed),
        perplexity=[
            (row.name, row.role, number(row.value), "" if row.ratio is None else times(row.ratio)) for row in rows
        ],
        scored=_scored(results),
        gap=gap_closed and _gap_formula(gap_closed),
        texts=[_text_row(text) for text in texts(results)],
        tasks=[_task_row(task) for task in tasks(results)],
        agreement=[_agreement_row(entry) for entry in agreements(results)],
        bounds=_bounds(results),
        files=[(name.replace("_", " "), size(value), number(value)) for name, value in results.sizes.items()],
        samples=[_beside(sample) for sample in results.samples],
        speed_columns=speed_columns,
        speed_words=speed_words,
        speed=speed,
        settings=settings(results),
        environment=results.environment,
        command=results.command,
    )


def headline(results: RunResults) -> dict[str, str]:
    """The least that is worth saying of a run in one line."""
    found = held_out(results)
    ratio = None if found is None else found.ratio
    return {
        "pattern": results.pattern or MISSING,
        "perplexity": number(found.this.value if found else None),
        "of dense": MISSING if ratio is None else times(ratio),
        "tasks": number(len(results.tasks) or None),
        "mask bits": number(results.mask_bits_per_weight),
    }


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
    sentences += _lost_sentences(results)
    if is_finite(results.mask_bits_per_weight):
        bound = f" (bound: {number(results.mask_bits_bound)})" if is_finite(results.mask_bits_bound) else ""
        takes = "The mask and its terms take" if results.terms else "The mask takes"
        sentences.append(f"{takes} {number(results.mask_bits_per_weight)} bit for each pruned weight{bound}.")
    if is_finite(results.packed_ratio):
        sentences.append(
            f"Packed, the pruned layers take {percent(results.packed_ratio)} of their dense bfloat16 bytes."
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
            f"the learned mask closes {percent(closed)} of the gap"
            if closed > 0
            else "the learned mask closes none of the gap"
        )
        return [
            f"Held-out perplexity is {number(gap_closed.dense)} for the dense model, {number(one_shot.value)} for the "
            f"best one-shot mask ({one_shot.name}) and {number(learned.value)} for the learned mask: {verdict}."
        ]
    finite = [f"{number(row.value)} ({row.name})" for row in rows if is_finite(row.value)]
    return [f"Held-out perplexity: {', '.join(finite)}."] if finite else []


def _lost_sentences(results: RunResults) -> list[str]:
    """What was lost besides perplexity."""
    sentences = []
    told = [task.is_worse for task in tasks(results) if task.is_worse is not None]
    if told:
        worse = f"{sum(told)} are" if sum(told) != 1 else "1 is"
        sentences.append(
            f"Of {len(told)} task score{'s' if len(told) > 1 else ''} {worse if sum(told) else 'none is'} worse than the dense model's by more than two "
            "standard errors."
        )
    agreement = next((entry for entry in agreements(results) if entry.top1.value is not None), None)
    if agreement is not None:
        sentences.append(
            f"Its likeliest next token is the dense model's for {percent(agreement.top1.value)} of the tokens of "
            f"{agreement.name}."
        )
    return sentences


def _key_figures(results: RunResults, rows: Sequence[Row], gap_closed: Gap | None) -> list[tuple[str, str, str]]:
    """(label, value, note) of each tile."""
    mask = best_mask(list(rows))
    ratio = f"{times(mask.ratio)} dense" if mask and mask.ratio else ""
    bits, bound = results.mask_bits_per_weight, results.mask_bits_bound
    packed, planned = percent(results.packed_ratio), results.planned_steps is not None
    return [
        (f"Perplexity, {mask.name if mask else 'best mask'}", number(mask.value if mask else None), ratio),
        ("Gap closed by learning", percent(gap_closed.closed if gap_closed else None), "dense – best one-shot"),
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
        f"({one_shot} − {learned}) / ({one_shot} − {dense}) = {percent(found.closed)}"
    )


def _bounds(results: RunResults) -> list[tuple[str, str, str]]:
    """(what, this run, least possible)."""
    pattern = results.parsed_pattern
    least = percent(packed_bound(pattern)) if isinstance(pattern, NMPattern) else MISSING
    return [
        ("Mask, bits per pruned weight", number(results.mask_bits_per_weight), number(results.mask_bits_bound)),
        ("Packed layers, share of their dense bfloat16 bytes", percent(results.packed_ratio), least),
    ]


def _text_row(text: Text) -> TableRow:
    ratio = MISSING if text.ratio is None else times(text.ratio)
    cells = [(with_error(text.dense), _a_word(text.dense_word)), (with_error(text.this), _a_word(text.this_word))]
    return (text.name, text.scored, [*cells, (ratio, "")], False)


def _a_word(value: float | None) -> str:
    return "" if value is None else f"{number(value)} a word"


def _task_row(task: Task) -> TableRow:
    share = task.is_share
    cells = [
        with_error(task.dense, share),
        with_error(task.this, share),
        change_with_error(task.difference, share),
        _lost_and_won(task),
        number(task.items),
        "–" if task.chance is None else with_error(Estimate(task.chance), share),  # many tasks have none
    ]
    return table_row(task.task, task.measure, cells)


def _lost_and_won(task: Task) -> str:
    if task.lost is None or task.won is None:
        return MISSING if task.is_share else "–"  # other scores are of no items that are right or wrong
    return f"{task.lost:,} / {task.won:,}"


def _agreement_row(entry: Agreement) -> TableRow:
    return table_row(entry.name, entry.scored, [with_error(entry.top1, share=True), with_error(entry.kl)])


# key of an entry of `speed`, title of the column, whether it is shown where no entry has it
_SPEED_WORDS = (("name", "What", True), ("device", "Device", True), ("kernel", "Kernel", False))
_SPEED_NUMBERS = (
    ("tokens", "Tokens", True),
    ("milliseconds", "Milliseconds", True),
    ("dense_milliseconds", "Dense, milliseconds", False),
    ("ratio", "Ratio", True),
)


def _speed(results: RunResults) -> tuple[list[str], int, list[tuple[str, ...]]]:
    """Titles of the columns, how many of them are words, and the rows."""

    def shown(columns: Sequence[tuple[str, str, bool]]) -> dict[str, str]:
        return {key: title for key, title, always in columns if always or any(key in row for row in results.speed)}

    words, numbers = shown(_SPEED_WORDS), shown(_SPEED_NUMBERS)
    rows = [
        (
            *(str(row.get(key, MISSING)) for key in words),
            *(speed_ratio(row) if key == "ratio" else number(row.get(key)) for key in numbers),
        )
        for row in results.speed
    ]
    return [*words.values(), *numbers.values()], len(words), rows


def _beside(sample: Mapping[str, Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """The prompt, and whose text is which."""
    texts_of = [("this model" if role == "this" else role, text) for role, text in sample.items() if role != "prompt"]
    return sample.get("prompt"), texts_of


def settings(results: RunResults) -> list[tuple[str, str]]:
    """What the run was told to do, by name; shared with the page that compares runs."""
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
