# SPDX-License-Identifier: Apache-2.0
"""Processes that write one folder at a time, and folders that change in one step.

Locks are those of the system on an open file or folder: they end with the process, however it ends. Where there are none (Windows,
some network file systems) nothing is locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"  # a kill leaves it, and it locks nothing then
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


# --- locks ------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that a run works in, for the time of the context. It is made if it is new, and goes
    if it is empty at the end.

    The lock is that of a file in it, which stays the same when a folder around it is exchanged, and leaves others free to be
    written inside.

    Raises:
        ConfigError: if another process is in it.
    """
    new = [place for place in (folder, folder.parent) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK_FILE
    handle = _opened_file(lock)
    if handle is None or (handle >= 0 and not _is_still(lock, handle)):
        release(handle)
        raise ConfigError(f"{folder} is in use by another process; wait until it has ended, or name another folder")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            lock.unlink(missing_ok=True)
            for place in new:
                place.rmdir()
        release(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, and hold it for the time of the context, which should be short."""
    handle = _opened(folder, wait=True)
    try:
        yield
    finally:
        release(handle)


@contextlib.contextmanager
def staging_in(home: Path, name: str) -> Iterator[Path]:
    """An empty hidden folder in `home`, to become one that is called `name` there; what is left of it goes afterwards.

    It lies where `name` will, so that relative paths in it hold. Those that killed processes have left for this name go too: a
    locked file beside a hidden folder says that its process lives. It is not the folder's own lock, as others may be wanted in it.
    """
    prefix = f".{name}.new-"
    with locked(home):
        for name in {path.name.removesuffix(LOCK_FILE) for path in home.glob(f"{glob.escape(prefix)}*")}:
            handle = _opened_file(home / (name + LOCK_FILE))
            if handle is not None and handle >= 0:
                _remove_staging(home / name)
            release(handle)
        staging = Path(tempfile.mkdtemp(dir=home, prefix=prefix))
        handle = _opened_file(home / (staging.name + LOCK_FILE))
    try:
        # What mkdtemp makes is for its owner alone.
        staging.chmod(stat.S_IMODE(staging.stat().st_mode) | (0o777 & ~umask()))
        yield staging
    finally:
        _remove_staging(staging)
        release(handle)


def _remove_staging(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):
        staging.with_name(staging.name + LOCK_FILE).unlink()


def release(handle: int | None) -> None:
    """Let go of a lock."""
    if handle is not None and handle >= 0:
        os.close(handle)


def _opened(path: Path, wait: bool, flags: int = os.O_RDONLY) -> int | None:
    """A handle that holds the lock of a folder or file; `None` if another process has it or has just removed it, -1 where there
    are no locks."""
    if fcntl is None:
        return -1
    handle = None
    try:
        handle = os.open(path, flags, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        release(handle)
        return None
    except OSError:  # the file system has no locks
        release(handle)
        return -1
    return handle


def _opened_file(path: Path) -> int | None:
    return _opened(path, wait=False, flags=os.O_RDONLY | os.O_CREAT)


def _is_still(path: Path, handle: int) -> bool:
    """Whether a file is the one that was opened: a process that has just ended may have removed that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


# --- one step ---------------------------------------------------------------------------------------------------------
def exchange_folders(new: Path, folder: Path, dropped: Callable[[Path], bool]) -> None:
    """Put `new` in the place of `folder`, and `folder` in that of `new`, in one step.

    Entries of `folder` that `new` lacks are linked into it first, and once more afterwards, should a process have added some.

    Args:
        new (`Path`): in the same file system.
        folder (`Path`): what is there.
        dropped (`Callable[[Path], bool]`): entries that are not taken over.

    Raises:
        OSError: if the system or the file system cannot do it, or `folder` is another user's; it is as it was then.
    """
    if not hasattr(_library(), "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(folder))
    _link_rest(folder, new, dropped)
    shutil.copystat(folder, new)
    os.chown(new, folder.stat().st_uid, folder.stat().st_gid)  # refused for another user's, who would lose it
    paths = [os.fsencode(path) for path in (new, folder)]
    if _library().renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
    with contextlib.suppress(OSError):  # the folder is in place: nothing may be said to have failed
        _link_rest(new, folder, dropped)


def umask() -> int:
    """What the process takes away of the permissions of new files."""
    value = os.umask(0)
    os.umask(value)
    return value


def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _link_rest(folder: Path, into: Path, dropped: Callable[[Path], bool] = lambda entry: False) -> None:
    for entry in folder.iterdir():
        target = into / entry.name
        if dropped(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not target.exists():
                target.mkdir()
                shutil.copystat(entry, target)
            _link_rest(entry, target)
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(entry))
        elif not os.path.lexists(target):
            os.link(entry, target, follow_symlinks=False)


def remove_entry(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
