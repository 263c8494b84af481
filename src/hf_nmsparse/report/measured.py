# SPDX-License-Identifier: Apache-2.0
"""Rows of a `RunResults` that hold a measurement, typed. They come from files: what is no number counts as not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..results import MISSING, RunResults, is_finite, number, one_line
from .facts import best_mask, percent, perplexity_rows


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; `None` is not measured."""

    value: float | None = None
    error: float | None = None


NOT_MEASURED = Estimate()


@dataclass(frozen=True)
class Text:
    """Perplexity on one text beside the dense model's; where it was measured with a stride, that of a word too."""

    name: str
    this: Estimate
    dense: Estimate
    tokens: int | None
    sequence_length: int | None
    sha256: str
    stride: int | None = None
    this_word: float | None = None
    dense_word: float | None = None

    @property
    def scored(self) -> str:
        """Tokens and window in words."""
        return _scored(self.tokens, self.sequence_length, self.stride)

    @property
    def ratio(self) -> float | None:
        """To the dense model."""
        return self.this.value / self.dense.value if self.this.value and self.dense.value else None


@dataclass(frozen=True)
class Task:
    """One score beside the dense model's."""

    task: str
    metric: str
    this: Estimate
    dense: Estimate
    difference_error: float | None
    lost: int | None
    won: int | None
    items: int | None
    shots: int | None
    chance: float | None
    higher_is_better: bool
    sha256: str
    measured_by: str

    @property
    def name(self) -> str:
        """Task and measure in words."""
        return f"{self.task}, {self.measure}"

    @property
    def measure(self) -> str:
        """Metric and shots in words."""
        shots = f", {self.shots}-shot" if self.shots else ""
        return f"{self.metric}{shots}{'' if self.higher_is_better else ' (lower is better)'}"

    @property
    def difference(self) -> Estimate:
        """This minus dense, with the standard error of paired items."""
        if self.this.value is None or self.dense.value is None:
            return NOT_MEASURED
        return Estimate(self.this.value - self.dense.value, self.difference_error)

    @property
    def is_share(self) -> bool:
        """Whether the scores are shares such as an accuracy, which bars from 0 to 1 can show."""
        known = [value for value in (self.this.value, self.dense.value, self.chance) if value is not None]
        return self.higher_is_better and self.this.value is not None and all(0 <= value <= 1 for value in known)

    @property
    def is_worse(self) -> bool | None:
        """Whether it is worse than the dense model by more than two standard errors; `None` if that cannot be told."""
        change, error = self.difference.value, self.difference.error
        if change is None or error is None:
            return None
        return (-change if self.higher_is_better else change) > 2 * error


@dataclass(frozen=True)
class Agreement:
    """How far a model says what the dense one says on a text."""

    name: str
    top1: Estimate
    kl: Estimate
    tokens: int | None
    sequence_length: int | None
    sha256: str
    layers: list[dict[str, Any]] = field(default_factory=list)  # "name", "output_error"

    @property
    def scored(self) -> str:
        """Tokens and window in words."""
        return _scored(self.tokens, self.sequence_length)


def texts(results: RunResults) -> list[Text]:
    """What was evaluated besides the held-out text of the run."""
    return [
        Text(
            _name(row, "text"),
            _of_loss(_positive(row.get("this")), _error(row, "standard_error")),
            Estimate(_positive(row.get("dense"))),
            _count(row, "tokens"),
            _count(row, "sequence_length"),
            _sha(row),
            _count(row, "stride"),
            _positive(row.get("word_perplexity")),
            _positive(row.get("dense_word_perplexity")),
        )
        for row in results.evaluations
    ]


def held_out(results: RunResults) -> Text | None:
    """The held-out text of the run with the perplexity of its best mask, if one was measured."""
    rows = perplexity_rows(results)
    mask = best_mask(rows)
    if mask is None:
        return None
    dense = next((row.value for row in rows if row.role == "dense" and is_finite(row.value)), None)
    if _positive(mask.value) is None:
        return None
    tokens, length = results.perplexity_tokens, results.perplexity_sequence_length
    name = one_line(results.data.get("evaluation") or "held-out text")
    return Text(name, Estimate(mask.value), Estimate(_positive(dense)), _whole(tokens), _whole(length), "")


def tasks(results: RunResults) -> list[Task]:
    """Scores on tasks."""
    return [
        Task(
            _name(row, "task"),
            _name(row, "metric"),
            Estimate(_number(row, "this"), _error(row, "standard_error")),
            Estimate(_number(row, "dense"), _error(row, "dense_standard_error")),
            _error(row, "difference_standard_error"),
            _count(row, "lost"),
            _count(row, "won"),
            _count(row, "items"),
            _count(row, "shots"),
            _number(row, "chance"),
            row.get("higher_is_better") is not False,
            _sha(row),
            one_line(row.get("measured_by") or ""),
        )
        for row in results.tasks
    ]


def agreements(results: RunResults) -> list[Agreement]:
    """Agreement with the dense model, text by text."""
    return [
        Agreement(
            _name(row, "text"),
            Estimate(_share(row.get("top1")), _error(row, "top1_standard_error")),
            Estimate(_number(row, "kl"), _error(row, "kl_standard_error")),
            _count(row, "tokens"),
            _count(row, "sequence_length"),
            _sha(row),
            _layers(row.get("layers")),
        )
        for row in results.agreement
    ]


def with_error(estimate: Estimate, share: bool = False) -> str:
    """An estimate as people read it: "57.3 ± 0.4", shares in percent."""
    value, error = estimate.value, estimate.error
    if value is None:
        return MISSING
    if share:
        return percent(value) if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
    return number(value) if error is None else f"{number(value)} ± {error:.2g}"


def change_with_error(change: Estimate, share: bool = False) -> str:
    """A difference with its sign; that of two shares in percentage points, which have no unit of their own."""
    value, error = change.value, change.error
    if value is None:
        return MISSING
    sign = "−" if value < 0 else "+"
    if share:
        return f"{sign}{100 * abs(value):.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    return f"{sign}{number(abs(value))}" + ("" if error is None else f" ± {error:.2g}")


def _scored(tokens: int | None, sequence_length: int | None, stride: int | None = None) -> str:
    known = (("{:,} tokens", tokens), ("window {:,}", sequence_length), ("stride {:,}", stride))
    return ", ".join(words.format(count) for words, count in known if count is not None)


def _of_loss(value: float | None, error: float | None) -> Estimate:
    """Perplexity from the standard error of its logarithm."""
    return Estimate(value, None if value is None or error is None else value * error)


def _layers(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, Mapping):
        return []
    return [{"name": str(name), "output_error": value} for name, value in found.items() if is_finite(value)]


def _name(row: Mapping[str, Any], key: str) -> str:
    return MISSING if row.get(key) is None else one_line(row[key])


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if is_finite(value) else None


def _positive(value: Any) -> float | None:
    return value if is_finite(value) and value > 0 else None


def _share(value: Any) -> float | None:
    return value if is_finite(value) and 0 <= value <= 1 else None


def _error(row: Mapping[str, Any], key: str) -> float | None:
    value = _number(row, key)
    return value if value is not None and value >= 0 else None


def _count(row: Mapping[str, Any], key: str) -> int | None:
    return _whole(row.get(key))


def _whole(value: Any) -> int | None:
    return int(value) if is_finite(value) else None


def _sha(row: Mapping[str, Any]) -> str:
    return row["sha256"] if isinstance(row.get("sha256"), str) else ""


def hard_losses(history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, loss of the hard mask on held-out text) of each log line that holds both."""
    return series(history, "nm/hard_eval_loss") or series(history, "eval_loss")


def hard_perplexities(history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, perplexity of the hard mask), without losses so high that nothing was learned."""
    return [(step, math.exp(loss)) for step, loss in hard_losses(history) if loss < 30]


def series(history: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) of each log line that holds both as numbers."""
    return [(r["step"], r[key] * factor) for r in history if is_finite(r.get("step")) and is_finite(r.get(key))]
