# SPDX-License-Identifier: Apache-2.0
"""What a model scored on a task, and two models beside each other on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Args:
        task (`str`), metric (`str`): for example `"arc_easy"` and `"acc"`.
        value (`float`): the score over all items.
        standard_error (`float`, *optional*): of `value`, over items.
        items (`int`): items scored.
        shots (`int`): solved examples before each item.
        measured_by (`str`): program and version.
        sha256 (`str`): of the items as they were asked; scores are comparable only where it is equal.
        higher_is_better (`bool`): direction.
        chance (`float`, *optional*): what guessing scores.
        scores (`tuple[float, ...]`): the metric of each item, in their order, where it is a mean over items.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: int
    shots: int
    measured_by: str
    sha256: str
    higher_is_better: bool = True
    chance: float | None = None
    scores: tuple[float, ...] = ()


def mean_score(task: str, metric: str, scores: Sequence[float], **facts: Any) -> TaskScore:
    """A score that is the mean of one number an item, with the standard error of that mean."""
    count = len(scores)
    mean = math.fsum(scores) / count
    spread = math.fsum((score - mean) ** 2 for score in scores)
    error = math.sqrt(spread / (count - 1) / count) if count > 1 else None
    return TaskScore(task, metric, mean, error, count, scores=tuple(scores), **facts)


def task_entry(this: TaskScore, dense: TaskScore | None = None, suite: str | None = None) -> dict[str, Any]:
    """One row of `RunResults.tasks`: a score, and that of the dense model on the same items.

    The standard error of the difference is that of paired items, which is far smaller than the two alone suggest; "lost" and
    "won" count the items that only the dense model, and only this one, has right (scores of 0 or 1).

    Raises:
        ConfigError: if the two are not of the same items.
    """
    entry: dict[str, Any] = {
        "task": this.task,
        "metric": this.metric,
        "suite": suite,
        "this": this.value,
        "standard_error": this.standard_error,
        "items": this.items,
        "shots": this.shots,
        "chance": this.chance,
        "higher_is_better": this.higher_is_better,
        "measured_by": this.measured_by,
        "sha256": this.sha256,
    }
    if dense is None:
        return entry
    same = ("task", "metric", "items", "shots", "sha256")
    if differing := [name for name in same if getattr(this, name) != getattr(dense, name)]:
        raise ConfigError(f"{this.task}: the two models were not given the same items ({', '.join(differing)} differ)")
    entry |= {"dense": dense.value, "dense_standard_error": dense.standard_error}
    if len(this.scores) == len(dense.scores) == this.items:
        differences = [a - b for a, b in zip(this.scores, dense.scores, strict=True)]
        entry["difference_standard_error"] = mean_score(
            "", "", differences, shots=0, measured_by="", sha256=""
        ).standard_error
        if {*this.scores, *dense.scores} <= {0.0, 1.0}:
            more, less = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
            lost, won = (less, more) if this.higher_is_better else (more, less)
            entry |= {"lost": lost, "won": won}
    return entry
