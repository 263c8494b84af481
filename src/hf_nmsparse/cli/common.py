# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: the one answer on stdout, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import BaseModelMismatchError, FormatError, NMSparseError
from .processes import is_first_process, process_count

if TYPE_CHECKING:
    from ..results import RunResults

OK, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 130
DEBUG_VARIABLE = "NMSPARSE_DEBUG"


# --- answers --------------------------------------------------------------------------------------------------------
@dataclass
class Answer:
    """What a verb has found.

    Args:
        facts (`dict`): for `--json`.
        shown (`list`): Rich renderables, for people.
        code (`int`): exit code.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    shown: list[RenderableType] = field(default_factory=list)
    code: int = OK

    def show(self, *renderables: RenderableType) -> None:
        """Add something for people to read. Strings are taken literally, without markup."""
        self.shown += [Text(item) if isinstance(item, str) else item for item in renderables]


@contextlib.contextmanager
def verb(json_output: bool, lower: str = "") -> Iterator[Answer]:
    """The frame of every verb: gives the `Answer` to fill, prints it, and turns errors into a line and an exit code. Of
    several processes each tells its errors, and the first answers.

    Inside, stdout goes to stderr, because the Trainer and others print there; only the answer gets to stdout.

    Args:
        json_output (`bool`): print facts as JSON.
        lower (`str`): options that need less memory when they are lower.

    Raises:
        typer.Exit: unless the exit code is 0.
    """
    answer = Answer()
    with contextlib.redirect_stdout(sys.stderr), _calm_libraries():
        try:
            yield answer
        except (NMSparseError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (NMSparseError, OSError)) and not is_out_of_memory(error):
                raise
            line = _no_memory(error, lower) if is_out_of_memory(error) else one_line(error)
            answer = Answer({"ok": False, "error": line, "kind": type(error).__name__}, code=_code(error))
            if os.environ.get(DEBUG_VARIABLE, "0") != "0":
                traceback.print_exc()
            _tell(f"error: {answer.facts['error']}", "bold red")
        except KeyboardInterrupt:
            answer = Answer({"ok": False, "error": "stopped", "kind": "KeyboardInterrupt"}, code=STOPPED)
            tell("stopped", style="bold red")
    if not is_first_process():
        pass
    elif json_output:
        typer.echo(json.dumps(_finite({"ok": answer.code == OK} | answer.facts)))
    else:
        console = Console(highlight=False)
        for item in answer.shown:
            unbroken = isinstance(item, Text) and bool(item.no_wrap)
            console.print(item, soft_wrap=unbroken or not sys.stdout.isatty())
    if answer.code != OK:
        raise typer.Exit(answer.code)


def tell(line: str, style: str | None = None) -> None:
    """Print a line on stderr, of several processes in the first."""
    if is_first_process():
        _tell(line, style or "")


def _tell(line: str, style: str) -> None:
    Console(stderr=True, highlight=False).print(Text(line, style=style), soft_wrap=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A table whose cells are literal text; all columns but the first are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result


def facts_table(title: str, facts: dict[str, object]) -> Table:
    """Facts, one a line."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        result.add_row(name, Text(str(value)))
    return result


def size(count: int | None) -> str:
    """Bytes for people: decimal units, three digits."""
    if count is None:
        return "-"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def command_line() -> str:
    """What was typed, for records. Of a launcher only the number of its processes is known."""
    count = process_count()
    program = ["nmsparse"] if count == 1 else [f"LAUNCHER_OF_{count}_PROCESSES", "-m", "hf_nmsparse.cli"]
    return shlex.join([*program, *sys.argv[1:]])


def new_results(**known: Any) -> RunResults:
    """A `RunResults` with what is known of this process."""
    from ..results import RunResults, environment

    return RunResults(**{"command": command_line(), "environment": environment()} | known)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of a GPU or of the machine."""
    # By name: torch may not be there yet, and takes seconds to import.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _no_memory(error: Exception, lower: str) -> str:
    advice = f"lower {lower}" if lower else "free some, or use a machine that has more"
    said = one_line(error).partition(". ")[0] or "memory"
    return f"out of memory ({said}); what was there before is unchanged: {advice}, then run the command again"


def _code(error: Exception) -> int:
    if isinstance(error, (FormatError, BaseModelMismatchError)) or type(error) is NMSparseError:
        return FAILED
    return WRONG_USE


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _calm_libraries() -> Iterator[None]:
    """No warnings that only developers can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
