# SPDX-License-Identifier: Apache-2.0
"""Fetching from the Hub, and one clear error for all that can go wrong between here and there."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ConfigError, HubError, NMSparseError

# Reading these can run code.
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_LOG_IN = "log in with `hf auth login`"
_BY_STATUS = {
    401: f"the token is missing or not valid; {_LOG_IN}",
    403: "the token may not do this; use one with write access to this namespace, or open a pull request (create_pr)",
    409: "someone else is writing to it; nothing was changed, look at what is there and try again",
    412: "someone else has committed since this push began; nothing was changed, look at what is there and push again",
}


def local_folder(
    source: str | os.PathLike,
    revision: str | None = None,
    task: str | None = None,
    patterns: Sequence[str] = ("*",),
) -> Path:
    """The folder of a local artefact, or of one on the Hub, fetched into the cache: all files of one commit.

    Args:
        source (`str` or `Path`): a local folder, if it exists, else the id of a repo.
        revision (`str`, *optional*): branch, tag or commit of the repo.
        task (`str`, *optional*): subfolder.
        patterns (`list[str]`): names of the files to fetch.

    Raises:
        ConfigError: if a revision is asked of a local folder, or `task` names no subfolder.
        NotADirectoryError: if `source` is a local file.
        HubError: if the repo cannot be fetched.
    """
    folder = subfolder(task)
    if Path(source).exists():
        if revision is not None:
            raise ConfigError(f"{source} is a local folder, which has no revision {revision!r}; leave revision out")
        if not Path(source).is_dir():
            raise NotADirectoryError(f"{source} is a file; name the folder that holds it")
        return Path(source, folder)
    return Path(fetch(str(source), revision, task, patterns), folder)


def fetch(repo_id: str, revision: str | None, task: str | None, patterns: Sequence[str] = ("*",)) -> Path:
    """Fetch files of one folder of a repo into the cache. The name of the folder that is returned is their commit.

    Args:
        repo_id (`str`): the repo.
        revision (`str`, *optional*): branch, tag or commit.
        task (`str`, *optional*): the subfolder; by default the root.
        patterns (`list[str]`): names of the files. Pickles and what lies in folders below are never fetched.

    Raises:
        HubError: if the repo cannot be fetched.
    """
    inside = f"{glob.escape(subfolder(task))}/" if task else ""
    with hub_errors("fetch", repo_id, revision):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[inside + pattern for pattern in patterns],
            # In these patterns a * matches slashes too.
            ignore_patterns=[f"{inside}*/*", *(f"*{suffix}" for suffix in sorted(_PICKLES))],
        )
    return Path(snapshot)


def is_publishable(name: str) -> bool:
    """Whether a file of this name is published and pulled: no hidden files, no pickles."""
    return not name.startswith(".") and Path(name).suffix not in _PICKLES


def subfolder(task: str | None) -> str:
    """The folder of a task inside a repo, without slashes at its ends; empty for the root.

    Raises:
        ConfigError: if `task` names no subfolder.
    """
    if task is None:
        return ""
    path = PurePosixPath(task)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in task or ":" in task:
        raise ConfigError(f"task={task!r} names no subfolder; use a plain name such as 'law' or 'law/german'")
    return str(path)


@contextlib.contextmanager
def hub_errors(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one `HubError`: what could not be done, where, why, and what to do.

    Args:
        doing (`str`): "fetch" or "push to".
        repo_id (`str`): the repo, or what the caller took for one.
        revision (`str`, *optional*): of the repo.

    Raises:
        HubError: from the error of huggingface_hub.
    """
    try:
        yield
    except NMSparseError:
        raise
    # RuntimeError: huggingface_hub's threads wrap in it what happened to a file.
    except (OSError, HTTPError, EntryNotFoundError, ValueError, RuntimeError) as error:
        where = repo_id if revision is None else f"{repo_id} (revision {revision!r})"
        raise HubError(f"could not {doing} {where}: {_reason(error, doing, repo_id)}") from error


def _reason(error: Exception, doing: str, repo_id: str) -> str:
    no_folder = "there is no such folder here, and " if doing == "fetch" else ""
    if isinstance(error, HFValidationError):
        return f"{no_folder}{repo_id!r} is no valid repo id; expected the form 'user/name'"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return f"the repo is gated; ask for access on its page, and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{no_folder}the Hub has no such repo, or a private one; check the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit; see its page for those it has"
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return _unreachable(error, no_folder)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _BY_STATUS.get(status) or f"the Hub answered {status}, {_first_line(error)}; try again later"
    if isinstance(error, HTTPError):
        return f"no connection to the Hub ({_first_line(error)}); check the network and try again"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, (OSError, HTTPError)):
        return f"{_first_line(error)} {_reason(error.__cause__, doing, repo_id)}"
    return _first_line(error)


def _unreachable(error: Exception, no_folder: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub may not be contacted (HF_HUB_OFFLINE is set); unset it"
    cause = error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{no_folder}it is not in the cache, and the Hub may not be contacted; unset HF_HUB_OFFLINE"
    if isinstance(cause, HfHubHTTPError):  # what is in the cache would have done
        return _reason(cause, "fetch", "")
    reason = _first_line(cause or error)
    return f"{no_folder}it is not in the cache, and the Hub is out of reach ({reason}); check the network"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
