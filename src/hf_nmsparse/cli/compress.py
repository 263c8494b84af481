# SPDX-License-Identifier: Apache-2.0
"""`nmsparse compress`: a masked model, or a base model and its mask, packed."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import size, verb
from .folders import Kind, check_output, written_line
from .merge import mask_results
from .models import (
    continued_results,
    load_any,
    load_model,
    load_tokenizer,
    put_mask,
    revision_of,
    stream,
    window_length,
)
from .options import (
    CalibrationOption,
    DeviceOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    MaskOption,
    MaskRevisionOption,
    MismatchOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    TaskOption,
)
from .pruning_run import described
from .writing import write_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..results import RunResults


_OF_CALIBRATION = ("samples", "sequence_length", "seed", "device")
_OF_MASKS = ("mask_revision", "task", "allow_base_mismatch")


class Values(str, Enum):
    """How kept weights are stored."""

    DENSE = "dense"
    INT8 = "int8"
    INT4 = "int4"


ValuesOption = Annotated[
    Values,
    typer.Option(
        "--values",
        help="Store kept weights as they are (dense), or rounded to int8 or int4 with a scale for each 128 inputs.",
    ),
]


def compress(
    context: typer.Context,
    model: ModelArgument,
    output: OutputOption,
    mask: MaskOption = None,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    values: ValuesOption = Values.DENSE,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    sequence_length: LengthOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Pack a masked 2:4 model, or a base model under a mask: 0.5625 of the bytes of its pruned 16-bit layers.

    Checkpoints that compressed-tensors stored as sparse-24-bitmask are taken too; their weights stay bit-equal.

    Terms beside the mask (SLoRB, low rank) stay beside the packed weights. Fused experts stay dense with zeros.

    --values int8 or int4 takes 0.32 or 0.195 of the bytes. With --calibration inputs are scaled so that rounding changes the
    outputs of each layer least (AWQ); that runs the model over the text, by default on a GPU if there is one.

    Example: nmsparse compress HuggingFaceTB/SmolLM2-135M --mask my-mask --output smollm2-packed

    Example: nmsparse compress smollm2-wanda --values int4 --calibration Salesforce/wikitext:wikitext-2-raw-v1 --output
    smollm2-int4
    """
    with verb(json_output, lower="--samples or --sequence-length") as answer:
        from ..hub import compress as pack
        from ..packed import packed_sizes

        check_output(output, Kind.PACKED, overwrite, [model, *([mask] if mask else [])])
        if calibration is not None and values is Values.DENSE:
            raise ConfigError("--calibration serves quantised values; add --values int8 or int4, or leave it out")
        if calibration is None:
            _refuse_given(context, _OF_CALIBRATION, "--calibration")
        if mask is None:
            refuse_mask_options(context)
        place = "cpu" if calibration is None else device
        if mask is None:
            loaded, tokenizer_source = load_any(model, dtype, place)
        else:
            loaded = put_mask(load_model(model, dtype, place), mask, mask_revision, task, allow_base_mismatch)
            tokenizer_source = model
        if packed_sizes(loaded).layers:
            raise ConfigError(f"{model} is packed already")
        results = results_of(loaded, tokenizer_source, mask or model)
        tokens = None
        if calibration is not None:
            tokens = _windows(calibration, loaded, tokenizer_source, sequence_length, samples, seed)
            results.data["calibration of values"] = described(calibration, tokens)
        # A dry run packs in memory, without the search, which changes only the scales.
        packed = pack(loaded, values=values.value, calibration=None if dry_run else tokens)
        _note_values(results, values)
        sizes = packed_sizes(packed)
        facts = {"model": model, "mask": mask, "values": values.value, "calibration": calibration}
        facts |= {"layers": sizes.layers, "packed_bytes": sizes.packed}
        facts |= {"dense_bytes": sizes.dense, "ratio": sizes.ratio}
        answer.show(
            f"{sizes.layers} layers, {values.value} values: {size(sizes.dense)} -> {size(sizes.packed)} ({sizes.ratio:.4f})"
        )
        if dry_run:
            answer.facts = {**facts, "dry_run": True, "output": str(output)}
            answer.show(f"would write {output}")
            return
        results.sparse_layers = _packed_names(packed)
        answer.facts = facts | write_model(packed, output, tokenizer_source, results, packed=True)
        answer.show(written_line(output))


def refuse_mask_options(context: typer.Context) -> None:
    """Refuse options of a mask where no --mask is given."""
    _refuse_given(context, _OF_MASKS, "--mask")


def _refuse_given(context: typer.Context, names: tuple[str, ...], needed: str) -> None:
    """Refuse options that were given but have no effect without another one."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} has no effect without {needed}; add {needed}, or leave {option} out")


def results_of(model: nn.Module, base: str, source: str) -> RunResults:
    """What is known of a masked model, or of a base under a mask, by the results that lie beside its source."""
    from ..adapter import mask_layers

    if mask_layers(model):
        return mask_results(model, base, source)
    results = continued_results(source)
    results.pattern = results.pattern or "2:4"
    if results.base_model is None:
        results.base_model, results.base_revision = base, revision_of(model)
    return results


def _windows(
    calibration: str, model: nn.Module, tokenizer_source: str, length: int | None, samples: int, seed: int
) -> torch.Tensor:
    """Random windows of the text, int64 `[samples, sequence]`."""
    from ..data import windows

    tokens = stream(calibration, load_tokenizer(tokenizer_source))
    return windows(tokens, window_length(model, length), samples, seed)


def _note_values(results: RunResults, values: Values) -> None:
    """Record that values are rounded; what was measured with others is left out."""
    if values is Values.DENSE:
        return
    results.values = values.value
    results.perplexity = {name: value for name, value in results.perplexity.items() if name == "dense"}
    results.evaluations, results.tasks, results.agreement, results.samples, results.speed = [], [], [], [], []
    results.reload_bit_equal = None


def _packed_names(model: nn.Module) -> list[str]:
    from ..packed import SparseLinear24

    return sorted(name for name, module in model.named_modules() if isinstance(module, SparseLinear24))
