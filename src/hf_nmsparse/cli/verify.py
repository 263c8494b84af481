# SPDX-License-Identifier: Apache-2.0
"""`nmsparse verify`: does a mask or model hold what it says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import FAILED, facts_table, table, verb
from .folders import Kind, kind_of
from .models import load_model, locate
from .options import JsonOption, RecordedPatternOption, RevisionOption, TaskOption

if TYPE_CHECKING:
    from ..hub import PublishedMask

PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="Folder or Hub repo of a mask or model.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Also check that a mask fits this base model.")
]
_BROKEN_SHOWN = 10


def verify(
    path: PathArgument,
    base: BaseOption = None,
    pattern: RecordedPatternOption = None,
    revision: RevisionOption = None,
    task: TaskOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check every group of a mask, masked or packed model: digests, codes, counts. Exit code 1 if it does not hold.

    Example: nmsparse verify my-packed-model
    """
    with verb(json_output) as answer:
        from ..hub import read_mask
        from ..hub import verify as check

        folder = locate(path, True, revision, task)
        kind = kind_of(folder)
        if kind not in (Kind.MASK, Kind.MODEL, Kind.PACKED):
            raise ConfigError(f"{path} ({kind.value}): verify takes published masks, masked and packed models")
        if base is not None and kind is not Kind.MASK:
            raise ConfigError(f"--base is for masks; {path} is a {kind.value}")
        report = check(path, pattern, revision, task)
        if base is not None:
            _check_fit(read_mask(path, revision, task), base)
        broken = {name: counts.over for name, counts in report.layers.items() if counts.over}
        answer.facts = {
            "path": path,
            "revision": revision,
            "task": task,
            "kind": report.kind,
            "pattern": report.pattern,
            "layers": len(report.layers),
            "dense_layers": report.dense_layers,
            "groups": report.groups,
            "over": report.over,
            "under": report.under,
            "broken_layers": broken,
            "base": base,
        }
        answer.code = 0 if report.ok else FAILED
        rows = {
            "sparse layers": f"{len(report.layers)} ({report.groups} groups)",
            "dense layers": len(report.dense_layers),
            f"groups over {report.pattern}": report.over,
            f"groups under {report.pattern}": report.under,
        }
        if base is not None:
            rows["base"] = f"{base} is the one it was made for"
        verdict = "ok" if report.ok else "BROKEN" if report.layers else f"no layer follows {report.pattern}"
        answer.show(facts_table(f"{path}: {report.kind}, {verdict}", rows))
        if broken:
            worst = sorted(broken.items(), key=lambda item: -item[1])[:_BROKEN_SHOWN]
            answer.show(table("broken layers", ("layer", "groups over"), worst))


def _check_fit(mask: PublishedMask, base: str) -> None:
    """Raise unless the mask was made for the weights of the base."""
    from ..adapter import base_weights
    from ..hub import check_fit

    check_fit(mask, base_weights(load_model(base)))
