# SPDX-License-Identifier: Apache-2.0
"""What lm-eval reports, as rows of scores: each item's score, which items they were, and what guessing gives."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

from .scores import TaskScore

# Metrics that hold 1 for the item if one choice is the right one, so that guessing scores one over the number of options.
_ONE_OF_THE_OPTIONS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


def scores_of(name: str, tasks: Sequence[str], results: dict[str, Any], measured_by: str) -> list[TaskScore]:
    """The rows of what was asked for by one name: of a group with an aggregate that row, else of each task.

    Args:
        name (`str`): task, tag or group.
        tasks (`Sequence[str]`): its tasks, itself if it is one.
        results (`dict`): what `lm_eval.evaluate` returned for it, with samples.
        measured_by (`str`): for the rows.
    """
    rows = [row for task in tasks for row in _task_scores(task, results, measured_by)]
    aggregate = results.get("groups", {}).get(name)
    # Of examples in number unlike each other there is no one number to give.
    if aggregate is None or len({row.shots for row in rows}) != 1:
        return rows
    return [_group_score(name, key, aggregate, rows) for key, _, _ in _metrics(aggregate)]


def _task_scores(task: str, results: dict[str, Any], measured_by: str) -> Iterator[TaskScore]:
    metrics, samples = results["results"][task], results["samples"][task]
    sha256 = _digest(samples)
    for key, metric, filter_name in _metrics(metrics):
        asked = [sample for sample in samples if sample["filter"] == filter_name and metric in sample["metrics"]]
        value = float(metrics[key])
        yield TaskScore(
            task=task,
            metric=_label(metric, filter_name),
            value=value,
            standard_error=_standard_error(metrics, metric, filter_name),
            items=len(asked),
            shots=results["n-shot"][task],
            measured_by=measured_by,
            sha256=sha256,
            higher_is_better=results["higher_is_better"][task].get(metric) is not False,
            chance=_chance(metric, asked, results["configs"][task]),
            scores=_if_their_mean(value, [sample[metric] for sample in asked]),
        )


def _group_score(name: str, key: str, aggregate: dict[str, Any], rows: Sequence[TaskScore]) -> TaskScore:
    metric, _, filter_name = key.partition(",")
    label = _label(metric, filter_name)
    members = [row for row in rows if row.metric == label]
    value = float(aggregate[key])
    # Empty where the group is the mean over its tasks rather than over items; guessing then is not known either.
    scores = _if_their_mean(value, [score for row in members for score in row.scores])
    chances = [row.chance * row.items for row in members if row.chance is not None]
    items = sum(row.items for row in members)
    return TaskScore(
        task=name,
        metric=label,
        value=value,
        standard_error=_standard_error(aggregate, metric, filter_name),
        items=items,
        shots=members[0].shots,
        measured_by=members[0].measured_by,
        sha256=hashlib.sha256("".join(row.sha256 for row in members).encode()).hexdigest(),
        higher_is_better=members[0].higher_is_better,
        chance=math.fsum(chances) / items if scores and len(chances) == len(members) else None,
        scores=scores,
    )


def _metrics(metrics: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, metric and filter of each score among what lm-eval has of a task: "acc,none", "acc_stderr,none", "alias" ..."""
    for key in metrics:
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield key, metric, filter_name


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _standard_error(metrics: dict[str, Any], metric: str, filter_name: str) -> float | None:
    error = metrics.get(f"{metric}_stderr,{filter_name}", "N/A")
    return None if error == "N/A" else float(error)


def _if_their_mean(value: float, each: Sequence[Any]) -> tuple[float, ...]:
    """The scores of items, if that is what they are: some metrics keep more of an item than a number, or are no mean."""
    if not each or not all(isinstance(score, Real) for score in each):
        return ()
    mean = math.fsum(each) / len(each)
    return tuple(float(score) for score in each) if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else ()


def _chance(metric: str, samples: Sequence[dict[str, Any]], config: dict[str, Any]) -> float | None:
    """Mean over items of one over the number of options, where the metric says whether one right option was taken."""
    if config["output_type"] != "multiple_choice" or metric not in _ONE_OF_THE_OPTIONS or "process_results" in config:
        return None
    if not samples or any(isinstance(sample["target"], list) for sample in samples):
        return None
    # For mutual information lm-eval asks each option twice, with the question and without.
    asked_twice = any("acc_mutual_info" in sample["metrics"] for sample in samples)
    options = [len(sample["arguments"]) // (2 if asked_twice else 1) for sample in samples]
    return math.fsum(1 / count for count in options) / len(options)


def _digest(samples: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the items as they were asked: the documents, and every text that the model was given or had to score."""
    digest = hashlib.sha256()
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue  # the same items once more, read in another way
        item = [sample["doc_hash"], sample["target_hash"], sample["arguments"]]
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()
