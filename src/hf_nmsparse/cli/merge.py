# SPDX-License-Identifier: Apache-2.0
"""`nmsparse merge`: a published mask written into its base model, as plain dense layers with zeros."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from .common import tell, verb
from .folders import Kind, check_output, written_line
from .models import continued_results, load_model, put_mask, revision_of
from .options import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaskRevisionOption,
    MismatchOption,
    OutputOption,
    OverwriteOption,
    TaskOption,
)
from .writing import note_mask, write_model

if TYPE_CHECKING:
    from torch import nn

    from ..results import RunResults

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="Hub id or local folder of the dense base model.")]
MaskOption = Annotated[str, typer.Option("--mask", metavar="MASK", help="Folder or Hub repo of a published mask.")]


def merge(
    base: BaseArgument,
    mask: MaskOption,
    output: OutputOption,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    dtype: DtypeOption = Dtype.AUTO,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Write a mask into its base model: plain dense layers with zeros, which load anywhere.

    Kept weights stay bit-equal to the base, unless the mask came with terms (SLoRB, low rank, delta), which are merged
    too. To get a smaller model use compress.

    Example: nmsparse merge HuggingFaceTB/SmolLM2-135M --mask my-mask --output smollm2-masked
    """
    with verb(json_output) as answer:
        check_output(output, Kind.MODEL, overwrite, [base, mask])
        model = put_mask(load_model(base, dtype), mask, mask_revision, task, allow_base_mismatch)
        results = mask_results(model, base, mask)
        facts = {"base": base, "mask": mask, "pattern": results.pattern, "layers": results.sparse_layers}
        facts["terms"] = results.terms
        if dry_run:
            answer.facts = {**facts, "dry_run": True, "output": str(output)}
            answer.show(f"the mask fits: would merge {len(results.sparse_layers)} layers and write {output}")
            return
        if results.side_branch:
            tell(f"beside the mask is {results.side_branch}: the merged weights are dense; compress keeps them 2:4")
            dense, results.sparse_layers = results.sparse_layers, []
            results.dense_layers = sorted({*results.dense_layers, *dense})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="adapter .* has a term beside its mask")  # just said
            merged = model.merge_and_unload()
        answer.facts = facts | write_model(merged, output, base, results, packed=False)
        answer.show(f"merged {len(facts['layers'])} {results.pattern} layers", written_line(output))


def mask_results(model: nn.Module, base: str, mask: str) -> RunResults:
    """What is known of a masked model: the mask's own results if they lie beside it, and what its layers say."""
    results = continued_results(mask)
    note_mask(results, model)
    results.base_model, results.base_revision = base, revision_of(model)
    return results
