# SPDX-License-Identifier: Apache-2.0
"""`nmsparse doctor`: what is wrong with this machine, a folder or a repo, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .common import FAILED, OK, verb
from .findings import State
from .options import JsonOption, RevisionOption, TaskOption

PathsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH_OR_REPO",
        help="Folders or Hub repos of masks, models, checkpoints, training runs; without any: this machine.",
    ),
]


def doctor(
    paths: PathsArgument = None,
    revision: RevisionOption = None,
    task: TaskOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what is wrong, and what to do: a line a check, ok, note or problem. Exit code 1 if there is a problem.

    Of this machine: versions, devices, compiler (the C++ kernels are compiled if they were not yet), the kernels that run, Hub and
    caches. Of a folder or repo: what it is, whether it is whole and loads, what it needs, what killed writers have left; of a
    training run the last whole checkpoint, and how to go on. Nothing is repaired, and nothing unpickled.

    Example: nmsparse doctor

    Example: nmsparse doctor my-mask my-packed-model
    """
    with verb(json_output) as answer:
        if not paths and (revision is not None or task is not None):
            raise ConfigError("--revision and --task are of a repo or folder; name it")
        if paths:
            from .doctor_folder import examine

            results = [examine(path, revision, task) for path in paths]
        else:
            from .doctor_machine import examine_machine

            results = examine_machine()
        counts = {state: sum(result.count(state) for result in results) for state in State}
        answer.facts = {
            "problems": counts[State.PROBLEM],
            "notes": counts[State.NOTE],
            "findings": [result.to_dict() for result in results],
        }
        answer.code = FAILED if counts[State.PROBLEM] else OK
        for result in results:
            answer.show(*result.shown())
        answer.show(f"{_number(counts[State.PROBLEM], 'problem')}, {_number(counts[State.NOTE], 'note')}")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
