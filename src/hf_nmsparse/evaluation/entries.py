# SPDX-License-Identifier: Apache-2.0
"""What was measured, as rows of `RunResults`: each beside the dense model, and known by what was asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .agreement import Agreement
from .kick import KickAnswers
from .kick_data import KickTask
from .perplexity import Perplexity
from .scores import TaskScore, task_entry

_SAMPLES = 3  # of each task that writes


def perplexity_entry(
    text: str, tokens: torch.Tensor, this: Perplexity, dense: Perplexity | None = None, words: int | None = None
) -> dict[str, Any]:
    """A row of `RunResults.evaluations`.

    Args:
        text (`str`): what to call it.
        tokens (`torch.Tensor`): what was scored.
        this (`Perplexity`), dense (`Perplexity`, *optional*): of the two models.
        words (`int`, *optional*): of the text, where it was measured with a stride.
    """
    entry = {
        "text": text,
        "dense": None if dense is None else dense.value,
        "this": this.value,
        "standard_error": this.standard_error if math.isfinite(this.standard_error) else None,
        "tokens": this.tokens,
        "sequence_length": this.seq_len,
        "sha256": digest(tokens),
    }
    if this.stride is not None:
        entry["stride"] = this.stride
    if words is not None:
        entry |= {
            "word_perplexity": this.per(words),
            "dense_word_perplexity": None if dense is None else dense.per(words),
        }
    return entry


def agreement_entry(text: str, tokens: torch.Tensor, found: Agreement) -> dict[str, Any]:
    """A row of `RunResults.agreement`."""
    return {"text": text, **found.to_dict(), "sha256": digest(tokens)}


def task_entries(
    this: Iterable[TaskScore], dense: Iterable[TaskScore] | None = None, suite: str | None = None
) -> list[dict[str, Any]]:
    """Rows of `RunResults.tasks`; each score beside that of the dense model, where it has one of the same task and metric."""
    known = {(score.task, score.metric): score for score in dense or ()}
    return [task_entry(score, known.get((score.task, score.metric)), suite) for score in this]


def sample_entries(tasks: Sequence[KickTask], this: KickAnswers, dense: KickAnswers | None) -> list[dict[str, str]]:
    """Rows of `RunResults.samples`: what both wrote to the first items of each task that has texts of some length."""
    rows = []
    for task in tasks:
        if not task.writes:
            continue
        for index in range(min(_SAMPLES, len(task.items))):
            item = task.items[index]
            row = {"prompt": item["text"] if task.kind == "summary" else item["turns"][0]}
            if dense is not None:
                row["dense"] = dense.texts[task.name][index][0]
            rows.append({**row, "this": this.texts[task.name][index][0]})
    return rows


def renewed(
    rows: Iterable[dict[str, Any]], new: Sequence[dict[str, Any]], same: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows with new ones added, in place of those that are of the same thing: equal in these fields."""
    keys = {tuple(row.get(name) for name in same) for row in new}
    return [*(row for row in rows if tuple(row.get(name) for name in same) not in keys), *new]


def digest(tokens: torch.Tensor) -> str:
    """SHA-256 of tokens."""
    return hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest()
