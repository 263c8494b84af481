# SPDX-License-Identifier: Apache-2.0
"""What several runs measured of the same thing: the same text, the same items of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from ..results import RunResults
from .measured import NOT_MEASURED, Agreement, Estimate, Task, Text, agreements, held_out, tasks, texts


@dataclass(frozen=True)
class Cell:
    """What one run measured, and its dense model in the same run."""

    this: Estimate
    dense: Estimate = NOT_MEASURED
    difference: Estimate = NOT_MEASURED

    @property
    def ratio(self) -> float | None:
        """This over dense."""
        return self.this.value / self.dense.value if self.this.value and self.dense.value else None


@dataclass(frozen=True)
class Shared:
    """One thing that at least one run measured.

    Args:
        name (`str`): of the text or task.
        note (`str`): tokens, window, items.
        cells (`dict[str, Cell]`): by name of the run; a run that did not measure it is absent.
        chance (`float`, *optional*): what guessing scores.
        higher_is_better (`bool`): direction.
    """

    name: str
    note: str
    cells: dict[str, Cell] = field(default_factory=dict)
    chance: float | None = None
    higher_is_better: bool = True

    @property
    def dense(self) -> Estimate | None:
        """The dense model, where all runs have the same value of it; `None` otherwise."""
        found = [cell.dense for cell in self.cells.values()]
        first = found[0].value
        if first is None or any(other.value is None for other in found):
            return None
        return found[0] if all(math.isclose(first, other.value, rel_tol=1e-3) for other in found) else None

    @property
    def is_share(self) -> bool:
        """Whether the values are shares such as accuracies."""
        chance = [] if self.chance is None else [self.chance]
        return self.higher_is_better and all(0 <= value <= 1 for value in (*self.values, *chance))

    @property
    def values(self) -> list[float]:
        """All values, of the dense models too."""
        both = [value for cell in self.cells.values() for value in (cell.this.value, cell.dense.value)]
        return [value for value in both if value is not None]


def compared_texts(runs: Mapping[str, RunResults]) -> list[Shared]:
    """Perplexities: the held-out text of the runs, then the other texts. The same tokens in the same windows share a row."""

    def of(results: RunResults) -> Iterable[tuple[Text, Cell]]:
        for text in (held_out(results), *texts(results)):
            if text is not None and text.this.value is not None:
                yield text, Cell(text.this, text.dense)

    return _together(
        runs,
        of,
        key=_text_key,
        empty=lambda text: Shared(text.name, text.scored),
    )


def compared_tasks(runs: Mapping[str, RunResults]) -> list[Shared]:
    """Scores on tasks. The same items share a row; where it is not known what they were, each run has its own."""

    def of(results: RunResults) -> Iterable[tuple[Task, Cell]]:
        for task in tasks(results):
            if task.this.value is not None:
                yield task, Cell(task.this, task.dense, task.difference)

    return _together(
        runs,
        of,
        key=lambda task: (task.name, task.sha256, task.measured_by) if task.sha256 else None,
        empty=lambda task: Shared(
            task.name,
            "" if task.items is None else f"{task.items:,} items",
            chance=task.chance,
            higher_is_better=task.higher_is_better,
        ),
    )


def compared_agreements(runs: Mapping[str, RunResults]) -> list[tuple[Shared, Shared]]:
    """(top-1, KL) of each text."""

    def of(part: Callable[[Agreement], Estimate]) -> Callable[[RunResults], Iterable[tuple[Agreement, Cell]]]:
        return lambda results: ((entry, Cell(part(entry))) for entry in agreements(results))

    sides = [
        _together(
            runs,
            of(part),
            key=_text_key,
            empty=lambda entry: Shared(entry.name, entry.scored),
        )
        for part in (lambda entry: entry.top1, lambda entry: entry.kl)
    ]
    return list(zip(*sides, strict=True))


def repeated(rows: Iterable[Shared]) -> bool:
    """Whether one name stands in several rows: measured on other tokens or items."""
    names = [row.name for row in rows]
    return len(set(names)) < len(names)


def _together(
    runs: Mapping[str, RunResults],
    of: Callable[[RunResults], Iterable[tuple[object, Cell]]],
    key: Callable[[object], Hashable | None],
    empty: Callable[[object], Shared],
) -> list[Shared]:
    """Rows in the order in which they are met, those of one name beside each other."""
    rows: dict[Hashable, Shared] = {}
    for name, results in runs.items():
        for entry, cell in of(results):
            # Without a key nothing says that two runs measured the same.
            row = rows.setdefault(key(entry) or (name, len(rows)), empty(entry))
            row.cells[name] = cell
    order = {name: place for place, name in reversed(list(enumerate(row.name for row in rows.values())))}
    return sorted(rows.values(), key=lambda row: order[row.name])


def _text_key(entry: Text | Agreement) -> Hashable | None:
    """The same for the same tokens in the same windows, as far as that is recorded."""
    if not entry.sha256 and entry.tokens is None:
        return None
    return (entry.name, entry.scored, entry.sha256)
