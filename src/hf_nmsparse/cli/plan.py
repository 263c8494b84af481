# SPDX-License-Identifier: Apache-2.0
"""`nmsparse plan`: what learning a mask will take, before anything is downloaded or allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common import Answer, facts_table, size, table, verb
from .models import empty_model
from .options import (
    DeltaOption,
    DenseLayersOption,
    JsonOption,
    LowRankOption,
    ModelArgument,
    PatternOption,
    ProjectionOption,
    RelaxationOption,
    SlorbOption,
    listed,
)

if TYPE_CHECKING:
    from ..training import Plan


def plan(
    model: ModelArgument,
    pattern: PatternOption = "2:4",
    relaxation: RelaxationOption = "candidates",
    slorb_block: SlorbOption = None,
    slorb_train_projection: ProjectionOption = False,
    low_rank: LowRankOption = None,
    delta_rank: DeltaOption = None,
    dense_layers: DenseLayersOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what a mask would prune, and the bytes of its logits, terms, gradients, optimizer state and results.

    Reads the model's config only: no weights are fetched.

    Example: nmsparse plan HuggingFaceTB/SmolLM2-135M --pattern 2:4 --low-rank 8
    """
    with verb(json_output) as answer:
        from .. import NMSparseConfig
        from ..training import plan as make_plan

        config = NMSparseConfig(
            pattern=pattern,
            relaxation=relaxation,
            slorb_block=slorb_block,
            slorb_train_projection=slorb_train_projection,
            low_rank=low_rank,
            delta_rank=delta_rank,
            dense_layers=listed(dense_layers) or None,
        )
        planned = make_plan(empty_model(model), config)
        answer.facts = {"model": model, **planned.to_dict()}
        show_plan(answer, model, planned)


def show_plan(answer: Answer, model: str, planned: Plan) -> None:
    """Add a plan's tables to an answer."""
    kinds: dict[tuple, list] = {}
    for layer in planned.layers:
        key = (layer.name.rsplit(".", 1)[-1], layer.out_features, layer.in_features, layer.not_packable)
        kinds.setdefault(key, []).append(layer)
    rows = (
        (
            name,
            len(layers),
            f"{rows} x {columns}",
            size(4 * sum(layer.parameters for layer in layers)),
            size(4 * sum(layer.term_parameters for layer in layers)) if planned.term_bytes else None,
            size(sum(layer.mask_bytes for layer in layers)),
            reason or size(sum(layer.packed_bytes for layer in layers)),
        )
        for (name, rows, columns, reason), layers in kinds.items()
    )
    answer.show(
        table(
            f"{model}: {len(planned.layers)} layers to prune {planned.pattern}",
            ("layer", "count", "out x in", "logits", *(["terms"] if planned.term_bytes else []), "mask", "packed"),
            ([cell for cell in row if cell is not None] for row in rows),
        )
    )
    if planned.skipped:
        answer.show(
            table("layers left dense", ("layer", "why"), _grouped(planned.skipped)),
        )
    answer.show(
        facts_table(
            "bytes",
            {
                "model as it is": size(planned.model_bytes),
                f"logits, {planned.logits_dtype}": size(planned.logits_bytes),
                **({"terms, float32": size(planned.term_bytes)} if planned.term_bytes else {}),
                "gradients": size(planned.gradient_bytes),
                "AdamW state": size(planned.optimizer_bytes),
                "training, without activations": size(planned.training_bytes),
                "published mask": f"{size(planned.mask_file_bytes)} ({planned.mask_bits_per_weight:.3f} bit a weight)",
                "pruned layers, dense -> packed": f"{size(planned.dense_bytes)} -> {size(planned.packed_bytes)}",
                "model, dense -> packed": f"{size(planned.model_bytes)} -> {size(planned.packed_model_bytes)}",
            },
        )
    )


def _grouped(skipped: dict[str, str]) -> list[tuple[str, str]]:
    """Layers of one name and reason in one row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault((name.rsplit(".", 1)[-1], reason), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{last} ({len(names)} layers)", why)
        for (last, why), names in groups.items()
    ]
