# SPDX-License-Identifier: Apache-2.0
"""`nmsparse export`: a masked or packed model, or a mask, in the formats of others."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import RESULTS_FILE
from .common import tell, verb
from .compress import refuse_mask_options, results_of
from .folders import Kind, check_output, folder_bytes, output_folder, written_line
from .models import copy_tokenizer, load_any, load_model, put_mask
from .options import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaskOption,
    MaskRevisionOption,
    MismatchOption,
    OutputOption,
    OverwriteOption,
    RecordedPatternOption,
    TaskOption,
)
from .writing import finish

if TYPE_CHECKING:
    from torch import nn

    from ..hub import Export
    from ..results import RunResults


class Format(str, Enum):
    """Formats of others."""

    DENSE = "dense"
    NPZ = "npz"
    BITMASK = "bitmask"


_KINDS = {Format.DENSE: Kind.MODEL, Format.NPZ: Kind.NPZ, Format.BITMASK: Kind.BITMASK}

SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Packed or masked model, base of --mask, or a mask that names its base."),
]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="dense: plain weights with zeros; npz: masks as MaskLLM has them; bitmask: sparse-24-bitmask of compressed-tensors.",
    ),
]


def export(
    context: typer.Context,
    source: SourceArgument,
    format: FormatOption,
    output: OutputOption,
    mask: MaskOption = None,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    pattern: RecordedPatternOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Write a packed or masked model, or a mask, for other programs. All is read back before it is put in place.

    dense loads anywhere. npz holds masks only. bitmask is for compressed-tensors up to 0.14: later versions, and Transformers 5,
    load it with random weights. Terms beside the mask (SLoRB, low rank) are merged by dense, and refused by the others.

    Example: nmsparse export my-packed-model --format dense --output my-dense-model
    """
    with verb(json_output) as answer:
        from ..hub import prepare_export

        check_output(output, _KINDS[format], overwrite, [source, *([mask] if mask else [])])
        if mask is None:
            refuse_mask_options(context)
            loaded, base = load_any(source, dtype, "cpu")
        else:
            loaded, base = load_model(source, dtype), source
            loaded = put_mask(loaded, mask, mask_revision, task, allow_base_mismatch)
        results = results_of(loaded, base, mask or source)
        prepared = prepare_export(loaded, format.value, pattern or _recorded_pattern(loaded, results))
        answer.facts = {
            "source": source,
            "mask": mask,
            "format": format.value,
            "pattern": prepared.pattern,
            "layers": prepared.layers,
            "left_dense": prepared.left_dense,
            "side_branches": prepared.side_branches,
            "values": prepared.values,
        }
        answer.show(f"{len(prepared.layers)} layers are {prepared.pattern}")
        if prepared.left_dense:
            answer.show(
                f"{len(prepared.left_dense)} of them are stored dense with zeros, as that format cannot hold them"
            )
        if dry_run:
            answer.facts |= {"dry_run": True, "output": str(output)}
            answer.show(f"would write {output}")
            return
        if format is Format.NPZ and results.kept_weights in ("update", "refit"):
            tell(f"kept weights of {source} have new values, which masks do not hold; dense and bitmask do")
        with output_folder(output) as staging:
            _write(prepared, staging, base, results)
        answer.facts |= {"output": str(output), "bytes": folder_bytes(output)}
        answer.show(written_line(output))


def _recorded_pattern(model: nn.Module, results: RunResults) -> str | None:
    """Of a plain or packed model; a mask on a model says its own."""
    from ..adapter import mask_layers
    from ..pattern import NMPattern

    return None if mask_layers(model) or not isinstance(results.parsed_pattern, NMPattern) else results.pattern


def _write(prepared: Export, staging: Path, base: str, results: RunResults) -> None:
    prepared.write(staging, results)
    if prepared.format == "dense":
        finish(staging, base, results, None)
        return
    if prepared.format == "bitmask":
        copy_tokenizer(base, staging)
    results.sizes[prepared.format] = folder_bytes(staging)
    results.write(staging / RESULTS_FILE)
