# SPDX-License-Identifier: Apache-2.0
"""Writing so that nothing is ever half done: beside the target first, then renamed into place. And reading JSON."""

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

from .errors import FormatError

RESULTS_FILE = "results.json"  # what is known of a mask or model, beside it


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


def read_json(path: Path) -> dict | None:
    """A JSON object, or `None` where there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise FormatError(f"{path} is not JSON ({error}); fetch or write it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a JSON {type(content).__name__}, expected an object; fetch or write it again")
    return content


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
