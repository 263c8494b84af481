# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse prune` keeps beside its output until that is written, so that a run that was killed goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..files import read_json, write_file
from ..folder_locks import alone_in
from .common import tell

_RUN_FILE = "run.json"


class Unfinished:
    """The hidden folder `.OUTPUT.unfinished` beside an output folder.

    Args:
        output (`Path`): the output folder.
        settings (`Mapping[str, Any]`): what the result depends on, as JSON. The folder of other settings is not used.

    Raises:
        FormatError: if the record in the folder is damaged.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        output = output.resolve()
        self.folder = output.parent / f".{output.name}.unfinished"
        self.blocks = self.folder / "blocks"  # the engine's own
        self.offloaded = self.folder / "offloaded"
        self.masked = self.folder / "masked"  # a model on its way to being packed
        self._removed = self.folder.with_name(f"{self.folder.name}.removed")
        self.settings = json.loads(json.dumps(settings))
        self._stored = read_json(self.folder / _RUN_FILE) or {}
        if self._stored and not isinstance(self._stored.get("settings"), dict):
            raise FormatError(f"{self.folder / _RUN_FILE} has no settings; remove the folder {self.folder}")

    def check(self, overwrite: bool) -> None:
        """Refuse what another run has left, unless it may be overwritten.

        Raises:
            ConfigError: naming what is different.
        """
        if overwrite or not self._is_of_another_run or not self._has_work:
            return
        then, now = self._stored["settings"], self.settings
        key = next(key for key in (*now, *then) if then.get(key) != now.get(key))
        raise ConfigError(
            f"{self.folder} holds an unfinished run with {key} {then.get(key)!r}, now it is {now.get(key)!r}; repeat the "
            "options of that run to go on, or add --overwrite to start anew"
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """For the time of the context there is the folder. It goes afterwards, unless the body fails with work done.

        Raises:
            ConfigError: if another process is writing the same output.
        """
        if self._is_of_another_run:
            with alone_in(self.folder):
                self._remove()
            self._stored = {}
        with alone_in(self.folder):
            self._remove_scratch()
            self._write()
            try:
                yield
            except BaseException:
                self._remove_scratch()
                if self._has_work:
                    tell(f"what is done is kept in {self.folder}; the same command goes on after it")
                else:
                    self._remove()
                raise
            self._remove()

    def _remove(self) -> None:
        """Remove the folder. It is renamed first: a part of it, left by a kill, would be taken for an unfinished run."""
        os.rename(self.folder, self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)

    @property
    def dense_layers(self) -> list[str] | None:
        """The layers that were found to stay dense, if that was done."""
        return self._stored.get("dense_layers")

    def note_dense_layers(self, names: list[str]) -> None:
        """Keep the layers that were found to stay dense."""
        self._stored["dense_layers"] = names
        self._write()

    def layers_done(self) -> int:
        """How many layers the finished blocks have."""
        from ..criteria import finished_layers

        return finished_layers(self.blocks)

    def _remove_scratch(self) -> None:
        for folder in (self.offloaded, self.masked, self._removed):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _has_work(self) -> bool:
        return self.dense_layers is not None or any(self.blocks.glob("*.safetensors"))

    @property
    def _is_of_another_run(self) -> bool:
        return bool(self._stored) and self._stored["settings"] != self.settings

    def _write(self) -> None:
        self._stored["settings"] = self.settings
        write_file(self.folder / _RUN_FILE, json.dumps(self._stored, indent=1) + "\n")
