# SPDX-License-Identifier: Apache-2.0
"""Writing so that nothing is ever half done: beside the target first, then renamed into place. And reading what may be hostile."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import FormatError

RESULTS_FILE = "results.json"  # what is known of a mask or model, beside it
MAX_JSON_BYTES = 16 << 20
_MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: a hundred thousand tensors


def write_file(path: str | os.PathLike, data: bytes | str) -> Path:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """A JSON object, or `None` where there is no such file.

    Raises:
        FormatError: see `load_json`, and if it is no object.
    """
    if not path.is_file():
        return None
    content = load_json(path, max_bytes)
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a JSON {type(content).__name__}, expected an object; fetch or write it again")
    return content


def load_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        FormatError: if the file is larger than `max_bytes`, no JSON, nested without end, or has a key twice.
    """
    with path.open("rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FormatError(f"{path} is over the limit of {max_bytes} bytes; it is none of the files that are read here")
    return _parse(data, str(path))


def _parse(data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, or a key twice, too
        raise FormatError(f"{what} is not JSON ({error}); fetch or write it again") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r:.80}")
    return found


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file, open to read tensors of torch; a name that is there twice, which safetensors takes, is refused.

    Raises:
        FormatError: naming the file, also while its tensors are read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(Path(path))
            yield file
    except SafetensorError as error:
        raise FormatError(
            f"{path} is no sound safetensors file, damaged or cut short ({error}); fetch it again"
        ) from error


def _check_header(path: Path) -> None:
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise FormatError(f"{path} has a header of {size} bytes, over the limit of {_MAX_HEADER_BYTES}")
        _parse(stream.read(size), f"the header of {path}")


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the body succeeds its files are renamed into `folder`, one by one.

    Files of `folder` that the body does not write stay. If the body fails, `folder` is as it was. The folder beside it is
    needed because only a rename within one file system is whole.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield staging
        folder.mkdir(exist_ok=True)
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = folder / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """What writers that were killed have left in a folder, or beside it on its way there. One that runs now has them too."""
    folder = Path(folder).resolve()
    inside = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in inside if (name := _target(path)) and (path.is_dir() or "." in name)]
    beside = folder.parent.glob(f".{glob.escape(folder.name)}.*")
    return sorted([*found, *(path for path in beside if path.is_dir() and _target(path) == folder.name)])


def _target(path: Path) -> str | None:
    """The name of what a temporary file or folder was to become, as `tempfile` names it above; `None` for others."""
    match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name)
    return match[1] if match else None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
