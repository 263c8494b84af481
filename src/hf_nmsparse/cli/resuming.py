# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of `nmsparse train`: which one a run goes on from, and what of them a failed run leaves."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, FormatError
from ..files import MAX_LIST_BYTES, full_disk_named, read_json
from ..folder_locks import alone_in
from .common import command_line, tell
from .folders import (
    CHECKPOINTS,
    COMMAND_FILE,
    Kind,
    check_output,
    checkpoint_damage,
    checkpoints_in,
    numbered_checkpoints,
)
from .processes import is_first_process

if TYPE_CHECKING:
    from transformers import TrainingArguments

_LAST_FILE = "trainer_state.json"  # the Trainer writes it after all others


def checkpoint_to_go_on_from(
    output: Path, resume: bool, overwrite: bool, arguments: TrainingArguments, model: str, kind: Kind
) -> Path | None:
    """The checkpoint to go on from, after the output folder was found fit; `None` to start at the beginning.

    Raises:
        ConfigError: if the folder is not fit, or there is nothing to go on from.
        FormatError: if the checkpoint is damaged.
    """
    there = checkpoints_in(output)
    asked = Path(arguments.resume_from_checkpoint) if arguments.resume_from_checkpoint else None
    if asked is not None and _is_one_of(asked, there):
        return _complete(asked, there)
    if resume and asked is None:
        if not there:
            raise ConfigError(
                f"--resume: there is no checkpoint in {output / CHECKPOINTS}; leave --resume out to start"
            )
        return _newest(there)
    if there and not overwrite:
        raise ConfigError(
            f"--output {output} holds a training run up to {there[-1].name}; add --resume to go on, or --overwrite to "
            "start again"
        )
    check_output(output, kind, overwrite, [model])
    return None if asked is None else _complete(asked, numbered_checkpoints(asked.parent))


def _is_one_of(checkpoint: Path, all_of_them: list[Path]) -> bool:
    return checkpoint.resolve() in [path.resolve() for path in all_of_them]


def _newest(there: list[Path]) -> Path | None:
    """The newest checkpoint, without those that a kill has cut off; `None` if it has cut off all."""
    whole = [path for path in there if was_finished(path)]
    newest = _complete(whole[-1], there) if whole else None
    if newest != there[-1]:
        goes_on = "starting at the beginning" if newest is None else f"going on from {newest.name}"
        tell(f"{there[-1].name} was cut off while it was written; {goes_on}")
    return newest


def was_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        return read_json(checkpoint / _LAST_FILE, MAX_LIST_BYTES) is not None
    except FormatError:
        return False


def _complete(checkpoint: Path, all_of_them: list[Path]) -> Path:
    """Refuse a checkpoint with files that are missing or cut short."""
    if damage := checkpoint_damage(checkpoint):
        whole = [path for path in all_of_them if path != checkpoint and not checkpoint_damage(path)]
        way_out = f"go on from a whole one with --resume_from_checkpoint {whole[-1]}" if whole else "start again"
        raise FormatError(f"{checkpoint} is incomplete ({', '.join(damage)}); {way_out}")
    return checkpoint


def resume_command() -> str:
    """What was typed, so that it goes on from the newest checkpoint."""
    typed, words = iter(shlex.split(command_line())), []
    for word in typed:
        if word.replace("-", "_") == "__resume_from_checkpoint":
            next(typed, None)
        elif word != "--resume" and not word.replace("-", "_").startswith("__resume_from_checkpoint="):
            words.append(word)
    return shlex.join([*words, "--resume"])


@contextlib.contextmanager
def training_in(output: Path) -> Iterator[None]:
    """The time of a training: no other run works in `output`, and what a failed one leaves there can go on. Of several
    processes the first sees to it.

    Raises:
        ConfigError: if another run works there.
        OSError: naming the output, if the disk is full.
    """
    if is_first_process():
        with alone_in(output / CHECKPOINTS), _checkpoints_kept(output):
            yield
    else:
        yield


@contextlib.contextmanager
def _checkpoints_kept(output: Path) -> Iterator[None]:
    """The time of a training. If it fails, a checkpoint that was cut off goes, and the way on is told.

    Raises:
        OSError: naming the output, if the disk is full.
    """
    try:
        yield
    except BaseException:
        for path in checkpoints_in(output):
            if not was_finished(path):
                _remove(path)
        again = command_line()
        if kept := checkpoints_in(output):
            again = resume_command()
            tell(f"what is done up to {kept[-1].name} is kept; to go on: {again}")
        else:
            (output / CHECKPOINTS / COMMAND_FILE).unlink(missing_ok=True)
        with full_disk_named(output, f"make room, then run: {again}"):
            raise


def remove_checkpoints(output: Path, after: Path | None) -> None:
    """Remove the checkpoints that come after one of them; all, after none or one of another folder."""
    there = checkpoints_in(output)
    known = [path.resolve() for path in there]
    kept = known.index(after.resolve()) + 1 if after is not None and _is_one_of(after, there) else 0
    for path in there[kept:]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, beginning with what would make a part of it count."""
    (checkpoint / _LAST_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
