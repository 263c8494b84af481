# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse doctor` has found: one line a check, with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..errors import NMSparseError
from .common import one_line


class State(str, Enum):
    """How a check came out: all is well, something to know, or something that will fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


_STYLES = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "bold red"}
_MARGIN = len(State.PROBLEM.value) + 4


@dataclass(frozen=True)
class Finding:
    """One check.

    Args:
        state (`State`): how it came out.
        what (`str`): what was looked at.
        found (`str`): what was found there.
        advice (`str`, *optional*): what to do.
    """

    state: State
    what: str
    found: str
    advice: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line; in a terminal that is too narrow for it the rest hangs below its begin."""
        mark = Text(f"  {self.state.value}".ljust(_MARGIN), style=_STYLES[self.state])
        text = Text(f"{self.what}: {self.found}")
        if options.no_wrap:  # in a file, where lines are to be found by grep
            yield mark + text
        else:
            grid = Table.grid()
            grid.add_column(width=_MARGIN, no_wrap=True)
            grid.add_column(ratio=1, overflow="fold")
            grid.add_row(mark, text)
            yield grid


@dataclass
class Findings:
    """All checks of one subject.

    Args:
        subject (`str`): the folder, the repo, or the part of the machine.
        checks (`list[Finding]`): in the order in which they were made.
    """

    subject: str
    checks: list[Finding] = field(default_factory=list)

    def ok(self, what: str, found: str) -> None:
        """Add what is well."""
        self.checks.append(Finding(State.OK, what, found))

    def note(self, what: str, found: str, advice: str | None = None) -> None:
        """Add what is good to know and keeps nothing from working."""
        self.checks.append(Finding(State.NOTE, what, found, advice))

    def problem(self, what: str, found: str, advice: str | None = None) -> None:
        """Add what will fail, or already has."""
        self.checks.append(Finding(State.PROBLEM, what, found, advice))

    @contextlib.contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """Make an error that the body raises on purpose, or one of the system, a problem: the next check goes on."""
        try:
            yield
        except (NMSparseError, OSError) as error:
            self.problem(what, one_line(error))

    def count(self, state: State) -> int:
        """How many checks came out so."""
        return sum(check.state is state for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "checks": [asdict(check) | {"state": check.state.value} for check in self.checks],
        }

    def shown(self) -> Iterator[Text | Finding]:
        """For people: a line a check, and below it what to do, which may be a command to copy and is not broken into lines."""
        yield Text(self.subject, style="bold")
        for check in self.checks:
            yield check
            if check.advice:
                yield Text(f"{' ' * _MARGIN}-> {check.advice}", no_wrap=True)
