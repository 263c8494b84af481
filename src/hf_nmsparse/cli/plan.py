# SPDX-License-Identifier: Apache-2.0
"""`nmsparse plan`: what learning a mask will take, before anything is downloaded or allocated."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import Answer, facts_table, size, table, verb
from .models import empty_model
from .options import (
    DeltaOption,
    DenseLayersOption,
    InBackwardOption,
    JsonOption,
    LogitsDtypeOption,
    LowRankOption,
    ModelArgument,
    OptimizerStatesOption,
    PatternOption,
    ProjectionOption,
    RelaxationOption,
    SlorbOption,
    listed,
)

if TYPE_CHECKING:
    from ..training import Plan


CheckpointingOption = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Blocks are computed again in the backward pass, so less is held."),
]


TrainingCostOption = Annotated[
    bool,
    typer.Option(
        "--training-cost", help="Count the operations and bytes of a training step: dense, and with n:m weights."
    ),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices", metavar="N", help="Also say what each of N devices holds that train the masks together."
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help="With --devices: ddp, zero2 or fsdp2; left out, those that can do it side by side."),
]
TokensOption = Annotated[
    int, typer.Option("--tokens", metavar="T", min=1, help="Tokens of that step: batch times sequence length.")
]


def plan(
    model: ModelArgument,
    pattern: PatternOption = "2:4",
    relaxation: RelaxationOption = "candidates",
    logits_dtype: LogitsDtypeOption = "float32",
    mask_optimizer_states: OptimizerStatesOption = None,
    optimizer_in_backward: InBackwardOption = False,
    gradient_checkpointing: CheckpointingOption = False,
    slorb_block: SlorbOption = None,
    slorb_train_projection: ProjectionOption = False,
    low_rank: LowRankOption = None,
    delta_rank: DeltaOption = None,
    dense_layers: DenseLayersOption = None,
    devices: DevicesOption = None,
    engine: EngineOption = None,
    training_cost: TrainingCostOption = False,
    tokens: TokensOption = 2048,
    json_output: JsonOption = False,
) -> None:
    """Say what a mask would prune, and the bytes of its logits, terms, gradients, optimizer state and results.

    Reads the model's config only: no weights are fetched.

    Example: nmsparse plan HuggingFaceTB/SmolLM2-135M --pattern 2:4 --low-rank 8

    Example: nmsparse plan HuggingFaceTB/SmolLM2-135M --pattern 2:8 --training-cost

    Example: nmsparse plan HuggingFaceTB/SmolLM2-135M --gradient-checkpointing --devices 8 --engine fsdp2
    """
    with verb(json_output) as answer:
        from .. import NMSparseConfig
        from ..training import plan as make_plan

        if engine is not None and devices is None:
            raise ConfigError(f"--engine {engine} is for several devices; say how many with --devices")
        config = NMSparseConfig(
            pattern=pattern,
            relaxation=relaxation,
            logits_dtype=logits_dtype,
            slorb_block=slorb_block,
            slorb_train_projection=slorb_train_projection,
            low_rank=low_rank,
            delta_rank=delta_rank,
            dense_layers=listed(dense_layers) or None,
        )
        states = mask_optimizer_states or "float32"
        planned = make_plan(empty_model(model), config, states, optimizer_in_backward, gradient_checkpointing)
        answer.facts = {"model": model, **planned.to_dict()}
        show_plan(answer, model, planned)
        show_ways(answer, planned)
        if devices is not None:
            show_devices(answer, planned, devices, engine)
        if training_cost:
            show_training_cost(answer, planned, tokens)


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
            size(sum(layer.logits_bytes for layer in layers)),
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
                f"AdamW states, logits' {planned.optimizer_states}": size(planned.optimizer_bytes),
                f"gradients{', of the largest layer' if planned.in_backward else ''}": size(planned.gradient_bytes),
                f"masked weights{', of the largest block' if planned.checkpointing else ''}": size(
                    planned.masked_weight_bytes
                ),
                "gradients and masked weights, at most": size(planned.backward_bytes),
                "training, without activations": size(planned.training_bytes),
                "published mask": f"{size(planned.mask_file_bytes)} ({planned.mask_bits_per_weight:.3f} bit a weight)",
                "pruned layers, dense -> packed": f"{size(planned.dense_bytes)} -> {size(planned.packed_bytes)}",
                "model, dense -> packed": f"{size(planned.model_bytes)} -> {size(planned.packed_model_bytes)}",
            },
        )
    )


def show_ways(answer: Answer, planned: Plan) -> None:
    """Add the table of all ways to train the masks to an answer; the chosen one is marked."""
    chosen = planned.relaxation, planned.logits_dtype, planned.optimizer_states, planned.in_backward
    rows = (
        (
            way.relaxation,
            way.logits_dtype,
            way.optimizer_states,
            "yes" if way.in_backward else "no",
            *(f"{part / planned.pruned_weights:.2f}" for part in (way.logits, way.gradients, way.states, way.total)),
            "<" if chosen == (way.relaxation, way.logits_dtype, way.optimizer_states, way.in_backward) else "",
        )
        for way in planned.ways
    )
    columns = ("relaxation", "dtype", "AdamW", "in backward", "logits", "grads", "states", "sum", "")
    answer.show(table("bytes a masked weight, of its logits alone", columns, rows))


def show_devices(answer: Answer, planned: Plan, devices: int, engine: str | None) -> None:
    """Add to an answer what each device holds under an engine, or under each that can train what was planned."""
    from ..training.devices import ENGINES, device_bytes, engines_for

    found = [
        device_bytes(planned, devices, name) for name in ([engine] if engine else engines_for(planned) or ENGINES)
    ]
    answer.facts["devices"] = [device.to_dict() for device in found]
    columns = ("engine", "frozen", "trained", "AdamW", "backward", "engine's own", "sum")
    parts = ("model", "trainable", "optimizer", "backward", "communication", "total")
    rows = ((device.engine, *(size(getattr(device, part)) for part in parts)) for device in found)
    answer.show(table(f"on each of {devices} devices, without activations", columns, rows))


def show_training_cost(answer: Answer, planned: Plan, tokens: int) -> None:
    """Add to an answer what a training step costs, dense and with n:m weights, by kind of layer and in all."""
    from ..training.cost import total_cost
    from ..training.cost import training_cost as cost_of

    costs = cost_of(planned, tokens)
    answer.facts["training_cost"] = {
        kind: {"layers": [asdict(cost) for cost in layers], "total": asdict(total_cost(layers))}
        for kind, layers in costs.items()
    }
    dense = {}
    rows = []
    for kind, layers in costs.items():
        groups: dict[str, list] = {}
        for cost in layers:
            groups.setdefault(cost.name.rpartition(".")[2], []).append(cost)
        for name, members in {**groups, "all": layers}.items():
            cost = total_cost(members)
            dense.setdefault(name, cost)
            parts = (f"{part / 1e9:,.1f}" for part in (cost.forward, cost.backward, cost.update))
            shares = cost.total / dense[name].total, cost.weight_bytes / dense[name].weight_bytes
            rows.append((kind, name, *parts, *(f"{share:.1%}" for share in shares)))
    columns = ("weights", "layer", "forward", "backward", "update", "operations", "bytes")
    answer.show(table(f"10^9 multiply-accumulates of a step of {tokens} tokens, at best", columns, rows))


def _grouped(skipped: dict[str, str]) -> list[tuple[str, str]]:
    """Layers of one name and reason in one row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault((name.rsplit(".", 1)[-1], reason), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{last} ({len(names)} layers)", why)
        for (last, why), names in groups.items()
    ]
