# SPDX-License-Identifier: Apache-2.0
"""`nmsparse prune`: one-shot pruning of a model by a criterion."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .common import verb
from .folders import Kind, check_output
from .options import (
    CalibrationOption,
    DenseLayersOption,
    DeviceOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    listed,
)
from .pruning_options import PruningOptions
from .pruning_run import PruningRun
from .unfinished import Unfinished


class Weights(str, Enum):
    """What becomes of kept weights."""

    UPDATE = "update"
    KEEP = "keep"
    REFIT = "refit"


class Inputs(str, Enum):
    """What enters a block during calibration."""

    PRUNED = "pruned"
    DENSE = "dense"


CriterionOption = Annotated[
    str, typer.Option("--criterion", help="magnitude, wanda, ria, sparsegpt, sparsellm, polish.")
]
StartOption = Annotated[
    str | None, typer.Option("--start", metavar="CRITERION", help="Whose mask polish starts from; by default wanda's.")
]
PatternOption = Annotated[
    str, typer.Option("--pattern", metavar="N:M", help="N weights kept of each M; or a share to prune, such as 60%.")
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="Kept weights: update, new values from criteria that have them (sparsegpt, sparsellm); keep, unchanged; "
        "refit, fitted to the dense outputs after the mask is chosen.",
    ),
]
InputsOption = Annotated[
    Inputs,
    typer.Option(
        "--inputs", help="What enters a block: outputs of the pruned blocks before it, or of the dense ones (faster)."
    ),
]
BlocksOption = Annotated[
    str | None,
    typer.Option("--layers", metavar="RANGE", help="Prune these blocks only: FIRST:LAST without LAST, such as 0:50%."),
]
PermuteOption = Annotated[
    bool,
    typer.Option(
        "--permute-channels",
        help="First reorder channels so that important weights compete less, where that is exact.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--dense-budget",
        metavar="SHARE",
        help="Measure what pruning each layer does, and leave the worst dense, up to this share of the bytes: 10%.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Weights to have in memory, such as 12GB; other blocks stay on disk and are loaded one at a time. By default "
        "half of the free memory.",
    ),
]
PackedOption = Annotated[
    bool, typer.Option("--packed/--dense", help="Write packed 2:4 layers, or dense ones with zeros.")
]


def prune(
    model: ModelArgument,
    output: OutputOption,
    criterion: CriterionOption = "wanda",
    start: StartOption = None,
    pattern: PatternOption = "2:4",
    weights: WeightsOption = Weights.UPDATE,
    inputs: InputsOption = Inputs.PRUNED,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    sequence_length: LengthOption = None,
    seed: SeedOption = 0,
    dense_layers: DenseLayersOption = None,
    dense_budget: BudgetOption = None,
    layers: BlocksOption = None,
    permute_channels: PermuteOption = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    max_memory: MemoryOption = None,
    packed: PackedOption = False,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Prune a model in one shot. DIR gets the model, its tokenizer, card and results.json, and in DIR/mask its mask.

    The mask belongs to the model as it was: it goes on there with load_mask, PEFT, merge or compress. There is none of a
    share such as 60%, and none after --permute-channels.

    A model larger than the memory stays on disk, and its blocks are loaded one at a time. Finished blocks are kept in
    .DIR.unfinished beside DIR until DIR is written: after a kill the same command goes on there. With other options, text
    or weights it is refused, and --overwrite starts anew. Measuring for --dense-budget is not resumed.

    Example: nmsparse prune HuggingFaceTB/SmolLM2-135M --criterion wanda --calibration
    Salesforce/wikitext:wikitext-2-raw-v1 --output smollm2-wanda

    Example: nmsparse prune Qwen/Qwen3-8B --criterion polish --start sparsegpt --weights refit --dense-budget 10%
    --calibration text.txt --max-memory 12GB --packed --output qwen3-packed
    """
    with verb(json_output, lower="--samples, --sequence-length or --max-memory") as answer:
        kind = Kind.PACKED if packed else Kind.MODEL
        check_output(output, kind, overwrite, [model])
        options = PruningOptions(
            model=model,
            criterion=criterion,
            start=start,
            pattern=pattern,
            weights=weights.value,
            inputs=inputs.value,
            layers=layers,
            permute_channels=permute_channels,
            dense_layers=listed(dense_layers),
            dense_budget=dense_budget,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            packed=packed,
        )
        options.check()
        run = PruningRun.prepared(options)
        unfinished = Unfinished(output, run.settings())
        unfinished.check(overwrite)
        if dry_run:
            run.say_dry(answer, output, kind)
            return
        run.go(answer, output, unfinished)
