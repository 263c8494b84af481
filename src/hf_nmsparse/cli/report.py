# SPDX-License-Identifier: Apache-2.0
"""`nmsparse report`: one run as a page, or several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..files import staged_folder
from .common import facts_table, table, verb
from .folders import MASK_FOLDER, RESULTS_FILE, Kind, kind_of
from .models import quiet_unless_watched
from .options import JsonOption, OutputOption

if TYPE_CHECKING:
    from ..hub import PublishedMask
    from ..report import MaskOverlap
    from ..results import RunResults

DEMO_FILE = "demo.json"  # what the demo calls its results
_RESULTS_FILES = (RESULTS_FILE, DEMO_FILE)

PathsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]PATH...",
        help="A results.json, or a folder or Hub repo that holds one: a mask, a masked or packed model, a demo.",
    ),
]


@dataclass(frozen=True)
class _Run:
    """Where the results of a run lie.

    Args:
        path (`str`): as it was given.
        results_file (`Path`): its results, on this machine.
        mask (`str`, *optional*): folder or Hub repo of its mask, if it holds one.
        revision (`str`, *optional*): of that repo.
    """

    path: str
    results_file: Path
    mask: str | None
    revision: str | None = None


def report(paths: PathsArgument, output: OutputOption, json_output: JsonOption = False) -> None:
    """Write what was measured of a run, or of several side by side, as one page: report.html, and its plots as PNG files.

    The page needs no other file and no network. Of several masks of one base model it shows where they agree.

    Example: nmsparse report my-mask --output report

    Example: nmsparse report general=my-mask law=law-mask me/other-mask --output compared
    """
    with verb(json_output) as answer:
        if output.exists() and not output.is_dir():
            raise NotADirectoryError(f"{output} is a file; name a folder to write into")
        runs = {name: _find(path) for name, path in named(paths).items()}

        from ..report import write_comparison, write_report
        from ..results import RunResults

        results = {name: RunResults.read(run.results_file) for name, run in runs.items()}
        overlap, why_none = _overlap(runs) if len(runs) > 1 else (None, None)
        with staged_folder(output) as staging:
            if len(runs) == 1:
                write_report(*results.values(), staging)
            else:
                write_comparison(results, staging, overlap)
            plots = sorted(path.name for path in staging.glob("*.png"))
        answer.facts = {
            "output": str(output),
            "report": str(output / "report.html"),
            "plots": [str(output / name) for name in plots],
            "runs": {name: run.path for name, run in runs.items()},
            "overlap": None if overlap is None else {"names": overlap.names, "shares": overlap.shares},
            "no_overlap_because": why_none,
        }
        answer.show(_shown(results))
        if overlap is None and why_none is not None:
            answer.show(f"masks not compared: {why_none}")
        answer.show(f"wrote {output / 'report.html'} and {len(plots)} plot{'' if len(plots) == 1 else 's'}")


# --- names ----------------------------------------------------------------------------------------------------------
def named(paths: Iterable[str]) -> dict[str, str]:
    """Paths by name: the one given as NAME=, else the last parts of the path, as many as tell it from the others.

    Raises:
        ConfigError: if a name is empty or used twice, or a path is given twice.
    """
    given = [_split(path) for path in paths]
    if repeated := [path for path, count in Counter(path for _, path in given).items() if count > 1]:
        raise ConfigError(f"{repeated[0]} is given twice; a run is compared with others, not with itself")
    own = _unique([path for name, path in given if name is None])
    names = [own[path] if name is None else name for name, path in given]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two runs are called {repeated[0]!r}; give each its own name, as in NAME=PATH")
    return {name: path for name, (_, path) in zip(names, given, strict=True)}


def _split(argument: str) -> tuple[str | None, str]:
    """(name, path): a path that exists may hold an equals sign itself."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, argument
    if not name.strip() or not path:
        raise ConfigError(f"{argument!r} is no NAME=PATH; write a name before the sign and a path after it")
    return name.strip(), path


def _unique(paths: list[str]) -> dict[str, str]:
    """A name for each path, by as few of its last parts as tell it from all others."""
    parts = {path: _telling_parts(path) for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        count = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        names[path] = "/".join(own[-count:])
    return names


def _telling_parts(path: str) -> tuple[str, ...]:
    """The parts of a path that say what it is; that its file is called results.json does not."""
    if not Path(path).exists():
        return tuple(path.split("/"))
    place = Path(path).resolve()
    if place.is_file():
        place = place.parent if place.name in _RESULTS_FILES else place.with_suffix("")
    return place.parts[1:] or place.parts


# --- results and masks ----------------------------------------------------------------------------------------------
def _find(path: str) -> _Run:
    """The results of a file, folder or repo.

    Raises:
        ConfigError: if there are none.
        HubError: if there is no such folder, and no such repo can be fetched.
    """
    place = Path(path)
    if place.is_file():
        return _Run(path, place, _mask_in(place.parent) if place.name in _RESULTS_FILES else None)
    if place.is_dir():
        return _Run(path, _results_in(place, path), _mask_in(place))

    from ..hub.remote import fetch

    quiet_unless_watched()
    folder = fetch(path, None, None, (RESULTS_FILE, "adapter_config.json"))
    is_mask = kind_of(folder) is Kind.MASK
    return _Run(path, _results_in(folder, path), path if is_mask else None, folder.name if is_mask else None)


def _results_in(folder: Path, path: str) -> Path:
    found = next((folder / name for name in _RESULTS_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"{path} holds no {RESULTS_FILE}, so nothing is known of its run; prune, train, merge, compress, import-mask and "
            "demo write it, and eval --output FILE writes one of any model"
        )
    return found


def _mask_in(folder: Path) -> str | None:
    """A mask, or that of a pruned model inside its folder."""
    return next((str(place) for place in (folder, folder / MASK_FOLDER) if kind_of(place) is Kind.MASK), None)


def _overlap(runs: Mapping[str, _Run]) -> tuple[MaskOverlap | None, str | None]:
    """Where the masks agree; or why they cannot be compared."""
    if without := [name for name, run in runs.items() if run.mask is None]:
        return None, f"{', '.join(without)}: no mask there"

    from ..hub import diff_masks, read_mask
    from ..report import MaskOverlap

    masks = {name: read_mask(run.mask, run.revision) for name, run in runs.items()}
    names = list(masks)
    first = masks[names[0]]
    for name, mask in masks.items():
        if mask.pattern != first.pattern:
            return None, f"{name} is a {mask.pattern} mask, {names[0]} a {first.pattern} one"
        if _shapes(mask) != _shapes(first):
            return None, f"{name} and {names[0]} are not masks of the same layers"
    shares = [[1.0] * len(names) for _ in names]
    for row, name in enumerate(names):
        for column, other in enumerate(names[:row]):
            found = diff_masks(masks[name], masks[other])
            if found.other_base:
                return None, f"{name} and {other} were made for different base weights"
            shares[row][column] = shares[column][row] = 1 - found.total.changed_share
    return MaskOverlap(names, shares, first.pattern), None


def _shapes(mask: PublishedMask) -> dict[str, list[int]]:
    return {name: list(stored.packed.shape) for name, stored in mask.layers.items()}


# --- the terminal ---------------------------------------------------------------------------------------------------
def _shown(runs: Mapping[str, RunResults]) -> object:
    from ..report import headline

    found = {name: headline(results) for name, results in runs.items()}
    if len(found) == 1:
        return facts_table(*found, *found.values())
    columns = list(next(iter(found.values())))
    return table("", ("", *columns), ((name, *facts.values()) for name, facts in found.items()))
