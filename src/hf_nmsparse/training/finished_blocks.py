# SPDX-License-Identifier: Apache-2.0
"""What `learn_blockwise` keeps on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..criteria.ledger import open_run_folder
from ..errors import ConfigError, FormatError
from ..files import write_file
from ..fingerprint import digest, to_hex
from .one_block import Block, BlockReport


class FinishedBlocks:
    """Learned blocks in a folder: a file each, with its logits, digests of what they were before, and its report.

    Args:
        folder (`Path`): the folder; made if it is new.
        run (`Mapping[str, object]`): what the logits depend on, see `open_run_folder`.

    Raises:
        ConfigError: if the folder is of another run.
        FormatError: naming a file that is damaged.
    """

    def __init__(self, folder: Path, run: Mapping[str, object]) -> None:
        self.folder = folder
        self._paths = {path.stem: path for path in open_run_folder(folder, run)}

    def check(self, block: Block) -> None:
        """Refuse a block that is in the folder but has other logits now than it had before it was learned, or after."""
        if block.name not in self._paths:
            return
        stored, about = self._read(block)
        for name, now in digests_of(block).items():
            if now not in (about["start"][name], to_hex(digest(stored[name]))):
                raise ConfigError(
                    f"checkpoint_folder {self.folder} is of another run: the logits of {name} were others; start from the same "
                    "prior, name another folder, or remove this one"
                )

    def take(self, block: Block) -> BlockReport | None:
        """Give a block its learned logits, if they are here."""
        if block.name not in self._paths:
            return None
        stored, about = self._read(block)
        block.put_back(list(stored.values()))
        return about["report"]

    def add(self, block: Block, start: Mapping[str, str], report: BlockReport) -> None:
        """Write the logits of a learned block; `start`: `digests_of` it before."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in block.logits().items()}
        about = {"start": json.dumps(start), "report": json.dumps(dataclasses.asdict(report))}
        write_file(self.folder / f"{block.name}.safetensors", save(tensors, metadata=about))

    def _read(self, block: Block) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = self._paths[block.name]
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: json.loads(file.metadata()[key]) for key in ("start", "report")}
                stored = {name: file.get_tensor(name) for name in block.layers}
            about["report"] = BlockReport(**about["report"])
            wrong = [name for name, value in block.logits().items() if stored[name].shape != value.shape]
            if wrong or set(about["start"]) != set(stored):
                raise KeyError(f"shape of {wrong[0]}" if wrong else "start")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged ({error}); remove it, and its block is learned again") from error
        return stored, about


def digests_of(block: Block) -> dict[str, str]:
    """Digests of the logits of a block as they are now, by layer."""
    return {name: to_hex(digest(parameter)) for name, parameter in block.logits().items()}
