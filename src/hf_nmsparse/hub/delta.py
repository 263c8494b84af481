# SPDX-License-Identifier: Apache-2.0
"""Masks stored as a delta to a shared general mask: where that one lies, and what of each layer is stored (docs/FORMAT.md, section 9)."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import ConfigError, FormatError
from ..files import read_json, write_file
from ..fingerprint import digest, to_hex
from ..pattern import NMPattern
from .changes import changed_groups, decode_changes, encode_changes
from .remote import fetch, local_folder, subfolder

if TYPE_CHECKING:
    from .mask_file import PublishedMask

FIELD = "general_mask"  # of the config of a delta
MASK_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


@dataclass(frozen=True)
class GeneralMask:
    """Where the general mask of a delta lies.

    Args:
        source (`str`): id of a repo; or a path that starts with a dot, relative to the folder of the delta.
        revision (`str`, *optional*): commit of the repo.
        task (`str`, *optional*): subfolder of the repo.
    """

    source: str
    revision: str | None = None
    task: str | None = None

    @property
    def is_path(self) -> bool:
        """Whether it lies beside the delta, in the same repo or on the same disk."""
        return self.source.startswith(".")

    def __str__(self) -> str:
        details = [f"{name} {value}" for name in ("revision", "task") if (value := getattr(self, name))]
        return f"{self.source} ({', '.join(details)})" if details else self.source

    @classmethod
    def of_json(cls, content: Any, path: Path) -> GeneralMask:
        """Read and check what the config of a delta says.

        Raises:
            FormatError: if it is no reference.
        """
        fields = cls.__dataclass_fields__
        if (
            not isinstance(content, dict)
            or not isinstance(content.get("source"), str)
            or not set(content) <= set(fields)
        ):
            raise FormatError(f"{path}: {FIELD}={content!r} names no general mask; fetch the mask again")
        if any(value is not None and not isinstance(value, str) for value in content.values()):
            raise FormatError(f"{path}: {FIELD}={content!r} must hold text; fetch the mask again")
        general = cls(**content)
        try:
            subfolder(general.task)
            if not general.is_path:
                validate_repo_id(general.source)
        except (ConfigError, HFValidationError) as error:
            raise FormatError(f"{path}: {FIELD}: {error}; fetch the mask again") from error
        if general.is_path and (general.revision or general.task or "\\" in general.source):
            raise FormatError(f"{path}: {FIELD}={content!r}: a path has slashes only, and no revision or task")
        return general

    def in_repo(self, repo_id: str, revision: str | None, task: str | None) -> GeneralMask:
        """The same place told by the repo, for a delta that lies in one: under `task` of `repo_id`.

        Raises:
            FormatError: if its path leads out of the repo.
        """
        if not self.is_path:
            return self
        place = posixpath.normpath(posixpath.join(subfolder(task), self.source))
        if place.split("/")[0] == "..":
            raise FormatError(
                f"{repo_id}{f' (task {task})' if task else ''} is a delta to a mask at {self.source!r}, which is outside of the "
                "repo; pass its place as general="
            )
        return GeneralMask(repo_id, revision, None if place == "." else place)


# --- writing --------------------------------------------------------------------------------------------------------
def place_of_general(
    source: str | os.PathLike, revision: str | None, task: str | None, folder: str | os.PathLike
) -> GeneralMask:
    """How a delta that is written into `folder` refers to its general mask: a relative path, or a repo at a commit.

    Raises:
        ConfigError: if the general mask lies in `folder` itself.
    """
    if not Path(source).exists():
        return GeneralMask(str(source), fetch(str(source), revision, task, MASK_FILES).name, subfolder(task) or None)
    local_folder(source, revision)  # refuses a revision
    path = Path(os.path.relpath(Path(source, subfolder(task)).resolve(), Path(folder).resolve())).as_posix()
    if path == ".":
        raise ConfigError(f"{folder} is the general mask itself, which its delta would replace; name another folder")
    return GeneralMask(path if path.startswith(".") else f"./{path}")


def as_delta(
    tensors: Mapping[str, torch.Tensor], places: Mapping[str, str], pattern: NMPattern, general: PublishedMask
) -> dict[str, torch.Tensor]:
    """The tensors of a mask file with those codes only that differ from a general mask.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): of the full mask file.
        places (`Mapping[str, str]`): layer -> prefix of the names of its tensors.
        pattern (`NMPattern`): of the mask.
        general (`PublishedMask`): the general mask.

    Raises:
        ConfigError: if the two differ in pattern, layers or shapes; or so much that the full mask is smaller.
    """
    _check_alike(set(places), pattern, general)
    stored = dict(tensors)
    before = after = 0
    for name, place in places.items():
        packed, other = stored.pop(f"{place}.nmsparse_packed"), general.layers[name].packed
        if packed.shape != other.shape:
            raise ConfigError(
                f"{name}: the mask has packed codes {list(packed.shape)}, the general mask {general.source} {list(other.shape)}; "
                "they are for different models"
            )
        stored[f"{place}.nmsparse_digest"] = torch.stack([digest(packed), digest(other)])
        before += packed.numel()
        if not torch.equal(packed, other):
            stored[f"{place}.nmsparse_changes"] = encode_changes(packed, other, pattern, name)
            after += stored[f"{place}.nmsparse_changes"].numel()
    if after >= before:
        raise ConfigError(
            f"the mask differs so much from {general.source} that a delta takes {after} bytes and the full codes {before}; save it "
            "without delta_to="
        )
    return stored


def write_reference(folder: Path, general: GeneralMask) -> None:
    """Make the config of a mask in `folder` that of a delta, or change where it says that its general mask lies."""
    path = folder / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8")) | {"mask_format": "delta", FIELD: asdict(general)}
    write_file(path, json.dumps(content, indent=2, sort_keys=True))


def reference_in(folder: Path) -> GeneralMask | None:
    """Where the mask in `folder` says that its general mask lies; `None` if it is no delta, or no mask."""
    content = read_json(folder / CONFIG_NAME) or {}
    return GeneralMask.of_json(content.get(FIELD), folder) if content.get("mask_format") == "delta" else None


# --- reading --------------------------------------------------------------------------------------------------------
def codes_of_delta(
    changes: torch.Tensor | None,
    digests: torch.Tensor,
    general: torch.Tensor,
    pattern: NMPattern,
    name: str,
    sources: tuple[str, str],
) -> tuple[torch.Tensor, int]:
    """Packed codes of a layer that is stored as a delta, and how many groups it changes.

    Args:
        changes (`torch.Tensor`, *optional*): what was stored; `None`: nothing, the layer is that of the general mask.
        digests (`torch.Tensor`): uint8 `[2, 16]`: of the packed codes, and of those of the general mask.
        general (`torch.Tensor`): packed codes of the general mask.
        pattern (`NMPattern`), name (`str`): of the layer.
        sources (`tuple[str, str]`): of the delta and of the general mask, for errors.

    Raises:
        FormatError: if the general mask is another one, or the delta damaged.
    """
    if not torch.equal(digest(general), digests[1]):
        raise FormatError(
            f"{sources[1]} is not the general mask that {sources[0]} is a delta to: its codes of {name} have digest "
            f"{to_hex(digest(general))}, expected {to_hex(digests[1])}; pass the right one as general= (its folder, or "
            "nms.read_mask(repo, revision))"
        )
    if changes is None:
        packed, changed = general, 0
    else:
        packed = decode_changes(changes, general, pattern, name)
        changed = changed_groups(changes)
    if not torch.equal(digest(packed), digests[0]):
        raise FormatError(
            f"{sources[0]}: the codes of {name} do not match their digest; the file is damaged, fetch it again"
        )
    return packed, changed


def check_delta_fits(names: set[str], pattern: NMPattern, general: PublishedMask, source: str) -> None:
    """Refuse a general mask of another pattern or other layers than the delta.

    Raises:
        FormatError: naming both.
    """
    try:
        _check_alike(names, pattern, general)
    except ConfigError as error:
        raise FormatError(f"{source}: {error}; pass the right general mask as general=") from error


def _check_alike(names: set[str], pattern: NMPattern, general: PublishedMask) -> None:
    if general.pattern != pattern:
        raise ConfigError(f"the pattern is {pattern}, that of the general mask {general.source} {general.pattern}")
    if differing := sorted(names ^ set(general.layers)):
        where = "general mask" if differing[0] in general.layers else "delta"
        raise ConfigError(
            f"the layers and those of the general mask {general.source} differ in {len(differing)}: {differing[0]} is in the "
            f"{where} only"
        )
