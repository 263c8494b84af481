# SPDX-License-Identifier: Apache-2.0
"""`nmsparse doctor`: what is wrong with this machine, and what to do."""

from __future__ import annotations

from .common import FAILED, OK, verb
from .findings import State
from .options import JsonOption


def doctor(
    json_output: JsonOption = False,
) -> None:
    """Say what is wrong, and what to do: a line a check, ok, note or problem. Exit code 1 if there is a problem.

    Of this machine: versions, devices, compiler (the C++ kernels are compiled if they were not yet), the kernels that run, Hub and
    caches.
    Nothing is repaired.

    Example: nmsparse doctor
    """
    with verb(json_output) as answer:
        from .doctor_machine import examine_machine

        results = examine_machine()
        counts = {state: sum(result.count(state) for result in results) for state in State}
        answer.facts = {
            "problems": counts[State.PROBLEM],
            "notes": counts[State.NOTE],
            "findings": [result.to_dict() for result in results],
        }
        answer.code = FAILED if counts[State.PROBLEM] else OK
        answer.show(*results)
        answer.show(f"{_number(counts[State.PROBLEM], 'problem')}, {_number(counts[State.NOTE], 'note')}")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
