# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder, and output folders that never mix two artefacts or end up half written."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

from ..errors import ConfigError, FormatError
from ..files import MAX_LIST_BYTES, RESULTS_FILE, read_json, staged_folder
from ..folder_locks import LOCK_FILE
from .common import size

CHECKPOINTS = "checkpoints"
COMMAND_FILE = "command.txt"  # beside the checkpoints: what goes on from the newest
NPZ_FILE = "mask_compressed.npz"  # as hub/npz_masks.py writes it
# What a training run needs to go on.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_OPTIMIZER = "optimizer.pt"
_OTHER_OPTIMIZERS = ("optimizer.bin", "latest")  # of FSDP2, and DeepSpeed's pointer to its own
TRAINER_FILES = (_OPTIMIZER, "scheduler.pt", "trainer_state.json")
MASK_FOLDER = "mask"  # the mask of a pruned model, inside its folder

# Files that say what a folder holds. Left over from an artefact that was replaced, they would make it another one.
_TELLING = (
    "*.safetensors",
    "*.safetensors.index.json",
    NPZ_FILE,
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    RESULTS_FILE,
)


class Kind(str, Enum):
    """What a folder can hold."""

    MASK = "mask"
    CHECKPOINT = "training checkpoint"
    ADAPTER = "adapter of another method"
    PACKED = "packed model"
    BITMASK = "sparse bitmask model of compressed-tensors"
    NPZ = "masks in an .npz"
    MODEL = "model"
    RUN = "unfinished training run"
    NOTHING = "other files"


def kind_of(folder: Path) -> Kind:
    """What a local folder holds, by its configs alone.

    Raises:
        FormatError: if a config is not JSON.
    """
    adapter = read_json(folder / "adapter_config.json")
    if adapter is not None:
        if adapter.get("peft_type") != "NMSPARSE":
            return Kind.ADAPTER
        return Kind.MASK if adapter.get("mask_format") in ("packed", "delta") else Kind.CHECKPOINT
    model = read_json(folder / "config.json")
    if model is not None:
        from ..hub.bitmask import compressed_format  # here: it is slow to import

        if compressed_format(model):
            return Kind.BITMASK
        quantization = model.get("quantization_config")
        packed = isinstance(quantization, dict) and quantization.get("quant_method") == "nmsparse"
        return Kind.PACKED if packed else Kind.MODEL
    if checkpoints_in(folder):
        return Kind.RUN
    return Kind.NPZ if (folder / NPZ_FILE).is_file() else Kind.NOTHING


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints that a training run has left in its output folder, oldest first."""
    return numbered_checkpoints(folder / CHECKPOINTS)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a Trainer has left in a folder, oldest first."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir())
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_damage(checkpoint: Path, needed: Iterable[str] = (*ADAPTER_FILES, *TRAINER_FILES)) -> list[str]:
    """What is wrong with the files of a checkpoint, empty if it is whole. Looks at their ends and headers; unpickles nothing.

    Args:
        checkpoint (`Path`): its folder.
        needed (`Iterable[str]`): files that must be there; by default all that a run needs to go on.
    """
    if any((checkpoint / name).is_file() for name in _OTHER_OPTIMIZERS):
        needed = [name for name in needed if name != _OPTIMIZER]
    damage = []
    there = sorted(path.name for path in checkpoint.glob("*") if path.suffix in (".pt", ".pth", ".safetensors"))
    for name in dict.fromkeys([*needed, *there]):
        if not (checkpoint / name).is_file():
            damage.append(f"no {name}")
        elif not _is_whole(checkpoint / name):
            damage.append(f"{name} is damaged or cut short")
    return damage


def _is_whole(path: Path) -> bool:
    """Whether a file has the end that its kind has. (`torch.save` writes a zip archive, whose directory is its end.)"""
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    try:
        if path.suffix == ".json":
            read_json(path, MAX_LIST_BYTES)
        else:
            stored_tensors(path.parent, path.name)
    except FormatError:
        return False
    return True


def stored_tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape), from the headers of the safetensors files of a folder.

    Raises:
        FormatError: if a file is damaged, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                    part = file.get_slice(name)
                    found[name] = (part.get_dtype(), part.get_shape())
        except SafetensorError as error:
            raise FormatError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    if not found:
        raise FormatError(f"{folder} holds no safetensors file; it is incomplete, fetch or write it again")
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights or masks of a folder."""
    return sum(path.stat().st_size for pattern in ("*.safetensors", NPZ_FILE) for path in folder.glob(pattern))


def check_output(folder: Path, kind: Kind, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Refuse an output folder that holds something else than an earlier result of this kind.

    Args:
        folder (`Path`): where to write.
        kind (`Kind`): what will be written.
        overwrite (`bool`): accept a folder that holds something else.
        inputs (`Iterable[str]`): what the verb reads; never to be overwritten.

    Raises:
        ConfigError: with what the folder holds.
        NotADirectoryError: if it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write into")
    for name in inputs:
        place = Path(name).resolve()
        if place.exists() and (place == folder.resolve() or (place.is_file() and place.parent == folder.resolve())):
            raise ConfigError(f"--output {folder} is also an input of this command; name another folder")
    if overwrite or not holds_files(folder):
        return
    there = kind_of(folder)
    if there != kind:
        raise ConfigError(f"--output {folder} is not empty ({there.value}); name another folder, or add --overwrite")
    if not (folder / RESULTS_FILE).is_file():
        raise ConfigError(
            f"--output {folder} holds a {there.value} that no command of nmsparse wrote (no {RESULTS_FILE}); name another "
            "folder, or add --overwrite"
        )


def holds_files(folder: Path) -> bool:
    """Whether there is any file in a folder or below. What a run that left no checkpoint has noted is none to keep."""
    noted = [folder / CHECKPOINTS / name for name in (COMMAND_FILE, LOCK_FILE)]
    return any(path.is_file() and path not in noted for path in folder.rglob("*"))


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; its files come to `folder` when the body succeeds, and replace the artefact there.

    Files of `folder` that tell nothing of what it holds (notes, checkpoints) stay; the mask of an earlier model does not.
    Call `check_output` first.
    """
    with staged_folder(folder, _tells) as staging:
        yield staging


def _tells(entry: Path) -> bool:
    """Whether an entry of an output folder belongs to the artefact in it."""
    if entry.name == MASK_FOLDER:
        return (entry / "adapter_config.json").is_file()
    return any(entry.match(pattern) for pattern in _TELLING)


def written_line(folder: Path) -> str:
    """What to tell people about a folder that was written."""
    return f"wrote {folder} ({kind_of(folder).value}, {size(folder_bytes(folder))})"
