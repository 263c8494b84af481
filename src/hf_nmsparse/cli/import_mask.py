# SPDX-License-Identifier: Apache-2.0
"""`nmsparse import-mask`: a mask that was made elsewhere, published as one of ours."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .common import new_results, tell, verb
from .folders import Kind, check_output, output_folder, written_line
from .models import load_model, revision_of
from .options import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    PatternOption,
    RevisionOption,
)
from .writing import write_mask

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="An .npz of MaskLLM, or the folder or Hub repo of one or of a model with zeros in its weights.",
    ),
]
BaseOption = Annotated[str, typer.Option("--base", metavar="MODEL", help="Hub id or local folder of the dense base.")]
MaskOnlyOption = Annotated[
    bool, typer.Option("--mask-only", help="Take the mask of a model whose kept weights were updated, without those.")
]


def import_mask(
    source: SourceArgument,
    base: BaseOption,
    output: OutputOption,
    pattern: PatternOption = "2:4",
    mask_only: MaskOnlyOption = False,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Turn a mask that was made elsewhere into a published mask, which merge, compress, eval and PEFT take.

    Read are the .npz files of MaskLLM, and models with zeros in their weights (AST, ProxSparse, SparseGPT), also as
    sparse-24-bitmask of compressed-tensors. Each weight is compared with the base. Where kept weights have new values the mask is
    not the whole model: compress keeps them, --mask-only leaves them.

    Example: nmsparse import-mask Vinnnf/LLaMA-2-7B-MaskLLM-C4 --base meta-llama/Llama-2-7b-hf --output my-mask
    """
    with verb(json_output) as answer:
        from ..hub import find_mask

        check_output(output, Kind.MASK, overwrite, [source, base])
        model = load_model(base, dtype)
        found = find_mask(source, model, pattern, mask_only=mask_only, revision=revision)
        report = found.report
        answer.facts = {
            "source": source,
            "kind": found.kind,
            "base": base,
            "pattern": report.pattern,
            "layers": list(report.codes),
            "dense_layers": found.dense_layers,
            "groups": sum(layer.groups for layer in report.layers),
            "groups_completed": found.groups_completed,
            "updated_weights": found.updated,
        }
        answer.show(f"{found.kind}: {len(report.codes)} layers are {report.pattern}, {len(found.dense_layers)} dense")
        if found.groups_completed:
            answer.show(f"{found.groups_completed} groups kept fewer: filled up, lowest index first")
        if found.updated:
            tell(f"{len(found.updated)} weights have other values there, which are left out, first {found.updated[0]}")
        if dry_run:
            answer.facts |= {"dry_run": True, "output": str(output)}
            answer.show(f"would write {output}")
            return
        results = new_results(
            base_model=base,
            base_revision=revision_of(model),
            pattern=report.pattern,
            method=f"imported ({found.kind})",
            kept_weights="keep",
            sparse_layers=list(report.codes),
            dense_layers=found.dense_layers,
            data={"imported mask": found.description},
            layers=[dataclasses.asdict(layer) for layer in report.layers],
        )
        with output_folder(output) as staging:
            written = write_mask(model, staging, results, report)
        answer.facts |= {"output": str(output), **written}
        answer.show(written_line(output))
