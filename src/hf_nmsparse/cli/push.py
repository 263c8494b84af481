# SPDX-License-Identifier: Apache-2.0
"""`nmsparse push`: a mask or model to the Hub, checked first, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .common import size, table, verb
from .folders import Kind, kind_of
from .models import quiet_unless_watched
from .options import DryRunOption, JsonOption, RecordedPatternOption, TaskOption

FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Local folder of a mask, packed model or masked model.")
]
RepoArgument = Annotated[str, typer.Argument(metavar="REPO_ID", help="USER/NAME; created if it does not exist.")]
BranchOption = Annotated[
    str | None, typer.Option("--revision", metavar="BRANCH", help="Branch, created if it does not exist.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Create the repo as a private one.")]
PullRequestOption = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
MessageOption = Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Title of the commit.")]


def push(
    folder: FolderArgument,
    repo_id: RepoArgument,
    task: TaskOption = None,
    revision: BranchOption = None,
    pattern: RecordedPatternOption = None,
    private: PrivateOption = False,
    create_pr: PullRequestOption = False,
    message: MessageOption = None,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Check a mask, packed or masked model and put it on the Hub, in one commit. Log in first: hf auth login.

    Subfolders, pickles and hidden files are left out. It is safe to repeat after any failure.

    Example: nmsparse push my-mask me/SmolLM2-135M-mask
    """
    with verb(json_output) as answer:
        check_kind(str(folder), folder)
        from huggingface_hub.utils import validate_repo_id

        from ..hub.publish import check_folder, publish
        from ..hub.remote import hub_errors, subfolder

        quiet_unless_watched()
        with hub_errors("push to", repo_id):
            validate_repo_id(repo_id)
        publication = check_folder(folder, pattern)
        answer.facts = {
            "folder": str(folder),
            "repo": repo_id,
            "revision": revision,
            "task": subfolder(task) or None,
            "kind": publication.report.kind,
            "pattern": publication.report.pattern,
            "files": publication.sizes,
            "bytes": sum(publication.sizes.values()),
            "left_out": publication.left_out,
        }
        if publication.left_out:
            answer.show(f"left out: {', '.join(publication.left_out)}")
        if dry_run:
            answer.facts["dry_run"] = True
            rows = [(name, size(count)) for name, count in publication.sizes.items()]
            answer.show(table(f"would push to {repo_id}:", ("file", "size"), rows))
            return
        commit = publish(publication, repo_id, task, revision, private or None, None, message, create_pr)
        answer.facts |= {"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
        what = f"{publication.report.pattern} {publication.report.kind}, {size(answer.facts['bytes'])}"
        answer.show(f"pushed {folder} ({what}): {commit.pr_url or commit.commit_url}")


def check_kind(source: str, folder: Path) -> Kind:
    """What is in a folder to push, or in one that was fetched.

    Raises:
        ConfigError: naming the `source`, if it is nothing that is shared.
    """
    if not folder.is_dir():
        raise ConfigError(f"{source}: no such folder")
    kind = kind_of(folder)
    if kind not in (Kind.MASK, Kind.PACKED, Kind.MODEL):
        raise ConfigError(
            f"{source} ({kind.value}): push and pull take published masks, packed and masked models"
            + ("; where it holds several tasks, name one of its subfolders" if kind is Kind.NOTHING else "")
        )
    return kind
