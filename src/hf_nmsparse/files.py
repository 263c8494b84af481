# SPDX-License-Identifier: Apache-2.0
"""Writing so that nothing is ever half done: beside the target first, then renamed into place. And reading what may be hostile."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import FormatError
from .folder_locks import exchange_folders, locked, remove_entry, staging_in, umask

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"  # what is known of a mask or model, beside it
MAX_JSON_BYTES = 16 << 20
MAX_LIST_BYTES = 1 << 30  # the Trainer's state has an entry for each time it logged, an index one for each tensor
_MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: a hundred thousand tensors


def write_file(path: str | os.PathLike, data: bytes | str) -> Path:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename.

    Raises:
        OSError: naming `path`, which is as it was.
    """
    path = Path(path)
    with full_disk_named(path), _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        _fill(handle, temporary, path, data)
    return path


def _fill(handle: int, temporary: str, path: Path, data: bytes | str) -> None:
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r:.80}")
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
def staged_folder(folder: str | os.PathLike, replaced: Callable[[Path], bool] = lambda entry: False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the body succeeds its files come into `folder`, all at once.

    Files of `folder` that the body does not write stay. If the body fails, or the process is killed at any moment, `folder`
    is as it was. On Linux a folder that is there is exchanged for the new one in one step. Elsewhere, and for the working
    directory, a mount point, another user's folder or a file system that cannot do this, files are renamed into it one by
    one, and a kill between two of them leaves some new.

    Args:
        folder (`str` or `Path`): to write into; made if it is new. A link is followed.
        replaced (`Callable[[Path], bool]`): whether an entry of `folder` goes that the body did not write.

    Raises:
        OSError: naming `folder`, if it cannot be written.
    """
    named, folder = folder, Path(folder).resolve()  # a link may lead to another disk
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{named} is a file; name a folder to write into")
    with contextlib.ExitStack() as stack:
        with _naming(named):
            folder.parent.mkdir(parents=True, exist_ok=True)
            home = folder if folder.exists() and not _can_write_beside(folder) else folder.parent
            staging = stack.enter_context(staging_in(home, folder.name))
        stack.enter_context(full_disk_named(named))
        yield staging
        written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
        for path in written:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        with locked(home):
            _publish(staging, folder, written, replaced)


def _publish(staging: Path, folder: Path, written: list[Path], replaced: Callable[[Path], bool]) -> None:
    """Bring the files of `staging` into `folder`."""
    names = {path.relative_to(staging).parts[0] for path in written}
    if not folder.exists():
        os.rename(staging, folder)
        return
    if staging.parent == folder.parent and not _is_working_directory(folder):
        try:
            exchange_folders(staging, folder, lambda entry: entry.name not in names and replaced(entry))
            return
        except OSError as error:
            logger.debug("%s cannot be exchanged at once: %s", folder, error)
    for source in written:
        target = folder / source.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    for entry in folder.iterdir():
        if entry.name not in names and replaced(entry):
            remove_entry(entry)


def _can_write_beside(folder: Path) -> bool:
    """Whether a folder can be written beside this one, in the same file system."""
    return folder.stat().st_dev == folder.parent.stat().st_dev and os.access(folder.parent, os.W_OK | os.X_OK)


def _is_working_directory(folder: Path) -> bool:
    """Whether this process stands in `folder`: whoever started it would stand in a folder that is gone."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


# --- what a disk says -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def full_disk_named(
    place: str | os.PathLike, rerun: str = "make room, then run the same command again"
) -> Iterator[None]:
    """Turn a full disk, which each library reports in its own way, into one `OSError` that names the place and the way on.

    Args:
        place (`str` or `Path`): what was to be written.
        rerun (`str`): what to do then.

    Raises:
        OSError: from the error of the library.
    """
    try:
        yield
    except Exception as error:
        reason = _full_disk(error)
        if reason is None:
            raise
        number, said = reason
        raise OSError(number, f"{said}; what was there before is unchanged: {rerun}", str(place)) from error


def _full_disk(error: BaseException | None) -> tuple[int, str] | None:
    """Number and text of the full disk, quota or size limit behind an error, if that is its cause."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # the libraries written in Rust
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return number, os.strerror(number)
        if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save does not say why
            return errno.EIO, "a file could not be written, most likely because the disk is full"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _naming(place: str | os.PathLike) -> Iterator[None]:
    """Name what was to be written, not the hidden file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # What making folders says of a file in their way.
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        raise OSError(number, f"{os.strerror(number)}; it cannot be written", str(place)) from error


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """What writers that were killed have left in a folder, or beside it on its way there. One that runs now has them too."""
    folder = Path(folder).resolve()
    inside = [path for path in folder.iterdir() if _is_on_its_way(path)] if folder.is_dir() else []
    beside = folder.parent.glob(f".{glob.escape(folder.name)}.new-*")
    return sorted([*inside, *(path for path in beside if path.is_dir() and _is_on_its_way(path))])


def _is_on_its_way(path: Path) -> bool:
    """Whether a path is called as `staged_folder` and `write_file` call what is not yet in its place."""
    kind = r"\..+\.new-[a-z0-9_]{8}" if path.is_dir() else r"\..+\..+\.[a-z0-9_]{8}"
    return re.fullmatch(kind, path.name) is not None
