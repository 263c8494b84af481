# SPDX-License-Identifier: Apache-2.0
"""`nmsparse diff`: where two masks differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from .common import table, verb
from .models import quiet_unless_watched
from .options import JsonOption, RevisionOption, TaskOption

if TYPE_CHECKING:
    from ..hub import Difference

FirstArgument = Annotated[str, typer.Argument(metavar="A", help="Folder or Hub repo of a mask, full or a delta.")]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help="The mask to compare it with.")]
OtherRevisionOption = Annotated[str | None, typer.Option("--other-revision", help="Revision of the repo of B.")]
OtherTaskOption = Annotated[str | None, typer.Option("--other-task", help="Subfolder of B.")]
TopOption = Annotated[int, typer.Option("--top", min=0, help="How many of the most changed layers to show.")]


def diff(
    first: FirstArgument,
    second: SecondArgument,
    revision: RevisionOption = None,
    task: TaskOption = None,
    other_revision: OtherRevisionOption = None,
    other_task: OtherTaskOption = None,
    top: TopOption = 10,
    json_output: JsonOption = False,
) -> None:
    """Say where two masks differ: groups changed and kept weights in common, by kind of layer, by block and by layer.

    `--revision` and `--task` are those of A. Exit code 0 whether the masks differ or not.

    Example: nmsparse diff general-mask law-mask
    """
    with verb(json_output) as answer:
        from ..hub import diff_masks, read_mask

        quiet_unless_watched()
        found = diff_masks(read_mask(first, revision, task), read_mask(second, other_revision, other_task))
        places = {"revision": revision, "task": task, "other_revision": other_revision, "other_task": other_task}
        answer.facts = found.to_dict() | places
        share = [f"{found.chance[name]:.2%}" for name in ("changed_share", "overlap", "jaccard")]
        rows = [("all layers", *_shown(found.total)), ("by chance", "", *share)]
        answer.show(table(f"{first} and {second}, {found.pattern}", ("", *_COLUMNS), rows))
        for title, parts in (("kind", found.by_kind.items()), ("block", found.by_block.items())):
            answer.show(_differences(title, parts))
        if top:
            answer.show(_differences("most changed layers", found.most_changed(top)))
        for where, names in ((first, found.only_in_a), (second, found.only_in_b)):
            if names:
                answer.show(f"only in {where}: {len(names)} layers, first {names[0]}")
        if found.other_base:
            answer.show(
                f"made for different base weights: {len(found.other_base)} layers, first {found.other_base[0]}"
            )


_COLUMNS = ("groups", "changed", "kept in common", "Jaccard")


def _differences(title: str, parts: Iterable[tuple[str, Difference]]) -> object:
    return table("", (title, *_COLUMNS), ((name, *_shown(found)) for name, found in parts))


def _shown(found: Difference) -> tuple[str, str, str, str]:
    return f"{found.groups:,}", f"{found.changed_share:.2%}", f"{found.overlap:.2%}", f"{found.jaccard:.2%}"
