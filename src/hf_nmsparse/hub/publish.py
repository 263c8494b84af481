# SPDX-License-Identifier: Apache-2.0
"""Publishing masks and models on the Hub: checked first, then one commit, safe to repeat after any failure."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..errors import ConfigError, FormatError
from ..results import RunResults
from .delta import MASK_FILES, GeneralMask, reference_in
from .mask_file import read_mask
from .masks import save_mask
from .remote import hub_errors, is_publishable, subfolder
from .verify import VerifyReport, verify

logger = logging.getLogger(__name__)

_NAMELESS = '"<this repository>"'  # what a card says that was written before the repo was known
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Publication:
    """A folder that was checked, and what of it is published.

    Args:
        report (`VerifyReport`): what the check found.
        files (`dict[str, Path]`): by name in the repo.
        left_out (`list[str]`): what is not published: subfolders (checkpoints, other tasks) and pickles. Hidden files
            are not even named.
        general (`GeneralMask`, *optional*): where the general mask of a delta lies.
    """

    report: VerifyReport
    files: dict[str, Path]
    left_out: list[str]
    general: GeneralMask | None = None

    @property
    def is_mask(self) -> bool:
        """Whether it is a mask, and not a model."""
        return self.report.kind == "mask"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: path.stat().st_size for name, path in self.files.items()}


def push_mask(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    task: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    results: RunResults | None = None,
    delta_to: str | None = None,
    delta_to_revision: str | None = None,
    delta_to_task: str | None = None,
) -> CommitInfo:
    """Publish the hard mask of an adapter on the Hub: codes, config and card in one commit. The model stays as it is.

    Args:
        model (`PeftModel` or a model with a mask adapter): the model.
        repo_id (`str`): `user/name`; created if it does not exist.
        adapter_name (`str`, *optional*): which adapter; the active one by default.
        task (`str`, *optional*): subfolder, to keep masks of several tasks in one repo.
        revision (`str`, *optional*): branch, created from the main one if it does not exist; the main one by default.
        private (`bool`, *optional*): visibility of the repo; by default that of the account for a new one.
        token (`str` or `bool`, *optional*): by default the one stored by `hf auth login`.
        commit_message (`str`, *optional*): title of the commit.
        create_pr (`bool`): open a pull request instead.
        results (`RunResults`, *optional*): what was measured, for the card.
        delta_to (`str`, *optional*): repo of a general mask, this one or another: only the groups that differ from it are
            published; see `save_mask`.
        delta_to_revision, delta_to_task (`str`, *optional*): revision of that repo, and subfolder.

    Returns:
        the commit. If the repo holds exactly this mask already: its newest one, which is logged.

    Raises:
        ConfigError: if the model has no such mask, or the target cannot take it (a tag, a model is there, ...), or the
            general mask is a local folder or the target itself.
        HubError: if the Hub cannot be reached or refuses, or someone else has committed meanwhile. Nothing is half
            done then: push again.
    """
    place = subfolder(task)  # a wrong one is refused before the work
    if delta_to is not None and Path(delta_to).exists():
        raise ConfigError(
            f"delta_to={str(delta_to)!r} is a local folder, which others do not have; push it and give its repo id"
        )
    if delta_to == repo_id and subfolder(delta_to_task) == place:
        raise ConfigError(
            f"{repo_id} holds the general mask at this place, and the delta would replace it; use another task"
        )
    with tempfile.TemporaryDirectory() as folder:
        save_mask(model, folder, adapter_name, results, None, delta_to, delta_to_revision, delta_to_task)
        return publish(check_folder(folder), repo_id, task, revision, private, token, commit_message, create_pr)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    pattern: str | None = None,
    task: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a saved mask, packed model or masked model on the Hub, in one commit, after checking it.

    Args:
        folder (`str` or `Path`): the mask or model; see `Publication` for what of it is left out.
        pattern (`str`, *optional*): of a masked model, see `verify`.
        repo_id, task, revision, private, token, commit_message, create_pr: as in `push_mask`.

    Returns:
        the commit, as `push_mask`.

    Raises:
        FormatError: if the folder is damaged, or holds a model that is not sparse.
        ConfigError, HubError: as `push_mask`.
    """
    checked = check_folder(folder, pattern)
    return publish(checked, repo_id, task, revision, private, token, commit_message, create_pr)


def check_folder(folder: str | os.PathLike, pattern: str | None = None) -> Publication:
    """Check a folder as `verify` does, and say what of it would be published.

    Raises:
        FormatError: if it is damaged, or holds a model that is not sparse.
        ConfigError: if it is a training checkpoint, or no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    report = verify(folder, pattern)
    if not report.ok:
        found = (
            f"{report.over} of {report.groups} groups have too many weights" if report.layers else "no layer is sparse"
        )
        raise FormatError(f"{folder} is no {report.pattern} {report.kind}: {found}; it is not published")
    if report.kind == "mask":
        base = read_mask(folder).config.base_model_name_or_path
        if base is None or Path(base).exists():
            named = "no base model" if base is None else f"{base!r} as its base model, which others will not find"
            logger.warning("the mask names %s; put it on a model loaded by its Hub id before publishing", named)
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = {path.name: path for path in paths if path.is_file() and is_publishable(path.name)}
    left_out = [path.name for path in paths if path.name not in files]
    return Publication(report, files, left_out, reference_in(folder))


def publish(
    publication: Publication,
    repo_id: str,
    task: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Commit a checked folder to a repo; see `push_mask`."""
    folder = subfolder(task)
    if create_pr and revision not in (None, DEFAULT_REVISION):
        raise ConfigError(f"a pull request goes to {DEFAULT_REVISION!r}; leave revision {revision!r} out")
    report = publication.report
    message = commit_message or f"Publish {report.pattern} {report.kind}{f' for {folder}' if folder else ''}"
    api = HfApi(token=token)
    with hub_errors("push to", repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.repo_info(repo_id).private is not private:
            raise ConfigError(
                f"{repo_id} exists and is {'public' if private else 'private'}; change that on its settings page first, or "
                "leave private out"
            )
        head = _head(api, repo_id, revision)
        there = _names_there(api, repo_id, head, folder)
        if publication.general is not None and publication.general.is_path:
            _check_general(api, repo_id, head, folder, publication.general)
        operations = _operations(publication, repo_id, folder, there)
        # With its parent fixed, a commit on top of one that was not looked at is refused.
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=head, create_pr=create_pr
        )
    if commit.oid == head:
        logger.warning("%s holds exactly this %s already; no commit was made", repo_id, report.kind)
    return commit


def _head(api: HfApi, repo_id: str, revision: str | None) -> str:
    """Newest commit of a branch, which is created if it does not exist."""
    if revision is not None and revision.startswith("refs/pr/"):
        return api.repo_info(repo_id, revision=revision).sha
    refs = api.list_repo_refs(repo_id)
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    branch = revision or DEFAULT_REVISION
    if branch in heads:
        return heads[branch]
    if branch in {tag.name for tag in refs.tags} or re.fullmatch("[0-9a-f]{40}", branch):
        raise ConfigError(f"{repo_id}: {branch!r} is a tag or commit, to which nothing can be added; name a branch")
    api.create_branch(repo_id, branch=branch, exist_ok=True)
    return api.repo_info(repo_id, revision=branch).sha


def _names_there(api: HfApi, repo_id: str, head: str, folder: str) -> set[str]:
    """Names of the files in the root of a repo, or in the folder of a task."""
    try:
        return {Path(entry.path).name for entry in api.list_repo_tree(repo_id, folder or None, revision=head)}
    except EntryNotFoundError:  # a new task
        return set()


def _check_general(api: HfApi, repo_id: str, head: str, folder: str, general: GeneralMask) -> None:
    """Refuse a delta whose general mask is to lie beside it, but does not."""
    try:
        place = general.in_repo(repo_id, None, folder or None).task or ""
    except FormatError:  # above the repo
        place = None
    if place is None or not set(MASK_FILES) <= _names_there(api, repo_id, head, place):
        raise ConfigError(
            f"the mask is a delta to the one at {general.source!r} from its own folder, and {repo_id} has none there; push that one "
            "first, to the task that lies there, or save the delta to its repo (delta_to=<repo id>)"
        )


def _operations(
    publication: Publication, repo_id: str, folder: str, there: set[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    other = "config.json" if publication.is_mask else "adapter_config.json"
    if other in there:
        holds, sent = ("model", "mask") if publication.is_mask else ("mask or adapter", "model")
        raise ConfigError(
            f"{repo_id} holds a {holds} at this place ({other}); loaders could not tell it from a {sent} beside it. Use "
            "another repo, branch or task"
        )
    prefix = f"{folder}/" if folder else ""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, path in publication.files.items():
        content = _named_card(path, repo_id, folder) if name == "README.md" else str(path)
        operations.append(CommitOperationAdd(prefix + name, content))
    # Weights of a model that was in other shards would be loaded in place of the new ones.
    stale = {name for name in there - set(publication.files) if any(fnmatch(name, weights) for weights in _WEIGHTS)}
    return operations + [CommitOperationDelete(prefix + name) for name in sorted(stale)]


def _named_card(path: Path, repo_id: str, folder: str) -> bytes:
    """The card with its loading code completed: where the files lie is known now."""
    text = path.read_text(encoding="utf-8")
    place = json.dumps(repo_id)
    if folder:
        name = json.dumps(folder, ensure_ascii=False)
        text = re.sub(rf"(from_pretrained\((?:model, )?){_NAMELESS}", rf"\1{place}, subfolder={name}", text)
        text = re.sub(rf"(load_mask\((?:model, )?){_NAMELESS}", rf"\1{place}, task={name}", text)
    return text.replace(_NAMELESS, place).encode()
