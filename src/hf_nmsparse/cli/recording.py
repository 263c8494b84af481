# SPDX-License-Identifier: Apache-2.0
"""Adding measurements to the results and the card of a mask or model, and to results files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import RESULTS_FILE, staged_folder
from .common import command_line, new_results
from .folders import Kind, kind_of

if TYPE_CHECKING:
    from ..results import RunResults

_CARDS = {Kind.MASK: "mask", Kind.PACKED: "packed", Kind.MODEL: "masked"}
# Field of the results -> by what its rows are known; a new row takes the place of that of the same thing.
_SAME = {
    "evaluations": ("sha256", "sequence_length", "stride"),
    "agreement": ("sha256", "sequence_length"),
    "tasks": ("task", "metric", "shots", "sha256", "measured_by"),
    "samples": ("prompt",),
    "speed": ("name", "device", "tokens"),
}


class Record:
    """Results that measurements are added to, each written as soon as it is there.

    Args:
        results (`RunResults`): what is known so far.
        folder (`Path`, *optional*): of the mask or model, whose results file and card are renewed.
        output (`Path`, *optional*): results file to write.
    """

    def __init__(self, results: RunResults, folder: Path | None = None, output: Path | None = None):
        self.results, self._folder, self._output = results, folder, output
        self._said = False

    @property
    def places(self) -> list[str]:
        """Where measurements are written."""
        return [str(place) for place in (self._folder, self._output) if place is not None]

    def add(self, **rows: list[dict[str, Any]]) -> None:
        """Add rows to fields of the results, and write."""
        from ..evaluation import renewed
        from ..hub.card import update_card

        if not self.places:
            return
        if not self._said:
            self.results.command = "\n".join(filter(None, (self.results.command, command_line())))
            self._said = True
        for field, new in rows.items():
            setattr(self.results, field, renewed(getattr(self.results, field), new, _SAME[field]))
        if self._output is not None:
            self.results.write(self._output)
        if self._folder is not None:
            card = self._folder / "README.md"
            with staged_folder(self._folder) as staging:  # both, or neither
                self.results.write(staging / RESULTS_FILE)
                if card.is_file():
                    shutil.copyfile(card, staging / card.name)
                update_card(staging, self.results, _CARDS[kind_of(self._folder)])


def record_of(model: str, mask: str | None, into_folder: bool, output: Path | None) -> Record:
    """Where the measurements of a model go.

    Args:
        model (`str`): folder or Hub id; its results are read where it is a local folder that has some.
        mask (`str`, *optional*): mask on it.
        into_folder (`bool`): `--record`.
        output (`Path`, *optional*): `--output`, a results file; rows of one that is there already are kept.

    Raises:
        ConfigError: if the folder cannot be recorded in, or the output is no place for a file.
        FormatError: if a results file is damaged.
    """
    from ..results import RunResults

    folder = Path(model)
    if output is not None:
        check_file(output)
    if into_folder:
        return Record(_recorded(model, mask), folder, output)
    if output is not None and output.is_file():
        return Record(RunResults.read(output), None, output)
    if mask is None and (folder / RESULTS_FILE).is_file():
        return Record(RunResults.read(folder / RESULTS_FILE), None, output)
    if mask is not None and (Path(mask) / RESULTS_FILE).is_file():
        return Record(RunResults.read(Path(mask) / RESULTS_FILE), None, output)
    return Record(new_results(command=None), None, output)


def _recorded(model: str, mask: str | None) -> RunResults:
    """The results beside a model or mask, which can be added to."""
    from ..results import RunResults

    folder = Path(model)
    if mask is not None:
        raise ConfigError("--record writes beside what it evaluates: name the mask itself, without --mask")
    if not folder.is_dir():
        raise ConfigError(f"--record writes into a local folder, and {model} is none; pull it first (nmsparse pull)")
    kind = kind_of(folder)
    if kind not in _CARDS:
        raise ConfigError(
            f"--record is for a mask, a masked or a packed model, and {model} holds another kind ({kind.value})"
        )
    if not (folder / RESULTS_FILE).is_file():
        raise ConfigError(
            f"--record adds to {RESULTS_FILE}, and {model} has none; prune, train, merge, compress and import-mask write it"
        )
    results = RunResults.read(folder / RESULTS_FILE)
    if kind is not Kind.MASK and not results.base_model:
        raise ConfigError(f"{folder / RESULTS_FILE} does not name the base model, so there is nothing to compare with")
    return results


def check_file(path: Path) -> None:
    """Refuse a file that could not be written after minutes of measuring.

    Raises:
        ConfigError: if it is a folder, below a file, or where this user may not write.
    """
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file to write")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())  # folders below it are made
    if not nearest.is_dir():
        raise ConfigError(f"--output {path}: {nearest} is a file; name a file in a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {path}: no permission to write into {nearest}; name a file elsewhere")
