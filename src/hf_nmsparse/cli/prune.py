# SPDX-License-Identifier: Apache-2.0
"""`nmsparse prune`: one-shot pruning of a model by a criterion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import Answer, new_results, size, table, verb
from .folders import Kind, check_output, written_line
from .models import empty_model, load_model, load_tokenizer, revision_of, stream, window_length
from .options import (
    TEXT_HELP,
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
    PatternOption,
    listed,
)
from .writing import write_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..criteria import PruneReport
    from ..results import RunResults

CriterionOption = Annotated[str, typer.Option("--criterion", help="magnitude, wanda, polish, ...")]
CalibrationOption = Annotated[
    str | None,
    typer.Option("--calibration", metavar="TEXT", help=TEXT_HELP),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the choice of windows.")]
PackedOption = Annotated[
    bool, typer.Option("--packed/--dense", help="Write packed 2:4 layers, or dense ones with zeros.")
]


def prune(
    model: ModelArgument,
    output: OutputOption,
    criterion: CriterionOption = "wanda",
    pattern: PatternOption = "2:4",
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    sequence_length: LengthOption = None,
    seed: SeedOption = 0,
    dense_layers: DenseLayersOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    packed: PackedOption = False,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Prune a model in one shot, and write it with its tokenizer and what was measured.

    Example: nmsparse prune HuggingFaceTB/SmolLM2-135M --criterion wanda --calibration
    Salesforce/wikitext:wikitext-2-raw-v1 --output smollm2-wanda
    """
    with verb(json_output) as answer:
        from ..criteria import find_weights, get_criterion, prune

        kind = Kind.PACKED if packed else Kind.MODEL
        check_output(output, kind, overwrite, [model])
        needs_text = get_criterion(criterion).needs != "nothing"
        check_pattern(pattern, packed)
        if needs_text and calibration is None:
            raise ConfigError(f"criterion {criterion!r} needs calibration text; add --calibration")
        if dry_run:
            linears = find_weights(empty_model(model), listed(dense_layers))
            _say_dry(answer, output, kind, {name: layer.weight for name, layer in linears.items()})
            return
        loaded = load_model(model, dtype, device)
        tokens, about = None, {}
        if needs_text:
            tokens = calibration_tokens(calibration, model, loaded, samples, sequence_length, seed)
            about = {"calibration": described(calibration, tokens)}
        report = prune(loaded, criterion, pattern, tokens, dense_layers=listed(dense_layers))
        results = _results(model, loaded, report, about, seed if needs_text else None)
        facts = write_model(loaded, output, model, results, packed)
        answer.facts = {**facts, "criterion": criterion, "pattern": report.pattern, "tokens": report.tokens}
        answer.facts["layers"] = results.layers
        _show(answer, output, report)


def check_pattern(pattern: str, packed: bool) -> None:
    """Refuse a malformed pattern, or to pack one whose masks can keep more than 2 of 4, before anything is loaded."""
    from ..packed.stored_mask import inside_24
    from ..pattern import NMPattern

    if packed and not inside_24(NMPattern(pattern)):
        raise ConfigError(
            f"--packed: {pattern} can keep more than 2 of 4 weights and cannot be packed; write it --dense"
        )
    NMPattern(pattern)


def calibration_tokens(
    source: str, tokenizer_source: str, model: nn.Module, samples: int, sequence_length: int | None, seed: int
) -> torch.Tensor:
    """Random windows of a text, int64 `[samples, sequence]`."""
    from ..data import windows

    tokens = stream(source, load_tokenizer(tokenizer_source))
    return windows(tokens, window_length(model, sequence_length), samples, seed)


def described(source: str, tokens: torch.Tensor) -> str:
    """A text and how much of it was used, for records."""
    return f"{source}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens"


def _results(name: str, model: nn.Module, report: PruneReport, data: dict[str, str], seed: int | None) -> RunResults:
    from ..adapter import linear_and_expert_weights

    pruned, prunable = [layer.name for layer in report.layers], linear_and_expert_weights(model)
    # Each of a module's fused experts is a layer of the report: its weight's name with a number.
    sparse = {name for layer in pruned for name in (layer, layer.rpartition(".")[0])}
    return new_results(
        base_model=name,
        base_revision=revision_of(model),
        pattern=report.pattern,
        method=report.criterion,
        sparse_layers=pruned,
        fused_experts=sorted(name for name, base in prunable.items() if base.is_fused_experts and name in sparse),
        dense_layers=[name for name in prunable if name not in sparse],
        data=data,
        seed=seed,
        seconds=report.seconds,
        layers=[dataclasses.asdict(layer) for layer in report.layers],
    )


def _say_dry(answer: Answer, output: Path, kind: Kind, weights: dict[str, torch.Tensor]) -> None:
    pruned = sum(weight.nbytes for weight in weights.values())
    answer.facts = {
        "dry_run": True,
        "output": str(output),
        "kind": kind.value,
        "layers": list(weights),
        "bytes": pruned,
    }
    answer.show(f"would prune {len(weights)} layers ({size(pruned)}) and write a {kind.value} to {output}")


def _show(answer: Answer, output: Path, report: PruneReport) -> None:
    """Layers of one kind (q_proj, up_proj, ...) in one row."""
    kinds: dict[str, list] = {}
    for layer in report.layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)

    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.4f}" if known else "-"

    rows = (
        (name, len(group), mean([x.kept_energy for x in group]), mean([x.relative_error for x in group]))
        for name, group in kinds.items()
    )
    title = f"{report.criterion} {report.pattern}: {len(report.layers)} layers in {report.seconds:.1f} s"
    answer.show(table(title, ("layer", "count", "kept energy", "output error"), rows), written_line(output))
