# SPDX-License-Identifier: Apache-2.0
"""`nmsparse pull`: a mask or model from the Hub into a folder, checked on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, FormatError
from .common import verb
from .folders import Kind, check_output, folder_bytes, kind_of, output_folder, written_line
from .models import quiet_unless_watched
from .options import JsonOption, OutputOption, OverwriteOption, RecordedPatternOption, RevisionOption, TaskOption
from .push import check_kind

RepoArgument = Annotated[str, typer.Argument(metavar="REPO_ID", help="Hub id of a mask, packed or masked model.")]


def pull(
    repo_id: RepoArgument,
    output: OutputOption,
    revision: RevisionOption = None,
    task: TaskOption = None,
    pattern: RecordedPatternOption = None,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Fetch a mask, packed or masked model from the Hub, check it, and put it into a folder.

    An earlier mask or packed model in that folder is replaced. Loading by Hub id needs no pull. A mask that is a delta is
    fetched as one; its general mask stays in the cache.

    Example: nmsparse pull me/SmolLM2-135M-mask --output my-mask
    """
    with verb(json_output) as answer:
        from ..hub import verify
        from ..hub.delta import reference_in, write_reference
        from ..hub.remote import fetch, is_publishable, subfolder

        quiet_unless_watched()
        if Path(repo_id).exists():
            raise ConfigError(f"{repo_id} is a local folder; pull fetches from the Hub")
        snapshot = fetch(repo_id, revision, task)
        source = snapshot / subfolder(task)
        kind = check_kind(f"{repo_id}{f', task {task}' if task else ''}", source)
        # Only we write masks and packed models; a plain model in the folder may be anyone's.
        same = kind is not Kind.MODEL and output.is_dir() and kind_of(output) is kind
        check_output(output, kind, overwrite or same)
        with output_folder(output) as staging:
            for path in sorted(source.iterdir()):
                if path.is_file() and is_publishable(path.name):
                    shutil.copyfile(path, staging / path.name)
            general = reference_in(source)
            if general is not None and general.is_path:  # from now on it lies elsewhere
                write_reference(staging, general.in_repo(repo_id, snapshot.name, task))
            report = verify(staging, pattern)
            if not report.ok:
                raise FormatError(
                    f"{repo_id} is no {report.pattern} {report.kind}: {report.over} groups have too many weights, "
                    f"{len(report.layers)} layers are sparse; nothing was written"
                )
        answer.facts = {
            "repo": repo_id,
            "revision": revision,
            "commit": snapshot.name,
            "task": subfolder(task) or None,
            "output": str(output),
            "kind": kind.value,
            "pattern": report.pattern,
            "layers": len(report.layers),
            "delta_to": None if general is None else str(general),
            "bytes": folder_bytes(output),
        }
        answer.show(written_line(output))
