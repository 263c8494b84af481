# SPDX-License-Identifier: Apache-2.0
"""`nmsparse compress`: a masked model, or a base model and its mask, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from .common import size, verb
from .folders import Kind, check_output, written_line
from .merge import mask_results
from .models import continued_results, load_any, load_model, put_mask, revision_of
from .options import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaskOption,
    MaskRevisionOption,
    MismatchOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    TaskOption,
)
from .writing import write_model

if TYPE_CHECKING:
    from torch import nn

    from ..results import RunResults


def compress(
    model: ModelArgument,
    output: OutputOption,
    mask: MaskOption = None,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    dtype: DtypeOption = Dtype.AUTO,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Pack a masked 2:4 model, or a base model under a mask: 0.5625 of the bytes of its pruned 16-bit layers.

    Terms beside the mask (SLoRB, low rank) stay beside the packed weights. Fused experts stay dense with zeros.

    Example: nmsparse compress HuggingFaceTB/SmolLM2-135M --mask my-mask --output smollm2-packed
    """
    with verb(json_output) as answer:
        from ..hub import compress as pack
        from ..packed import packed_sizes

        check_output(output, Kind.PACKED, overwrite, [model, *([mask] if mask else [])])
        if mask is None:
            loaded, tokenizer_source = load_any(model, dtype, "cpu")
        else:
            loaded = put_mask(load_model(model, dtype), mask, mask_revision, task, allow_base_mismatch)
            tokenizer_source = model
        if packed_sizes(loaded).layers:
            raise ConfigError(f"{model} is packed already")
        results = _results(loaded, tokenizer_source, mask or model)
        packed = pack(loaded)
        sizes = packed_sizes(packed)
        facts = {"model": model, "mask": mask, "layers": sizes.layers, "packed_bytes": sizes.packed}
        facts |= {"dense_bytes": sizes.dense, "ratio": sizes.ratio}
        answer.show(f"{sizes.layers} layers: {size(sizes.dense)} -> {size(sizes.packed)} ({sizes.ratio:.4f})")
        if dry_run:
            answer.facts = {**facts, "dry_run": True, "output": str(output)}
            answer.show(f"would write {output}")
            return
        results.sparse_layers = _packed_names(packed)
        answer.facts = facts | write_model(packed, output, tokenizer_source, results, packed=True)
        answer.show(written_line(output))


def _results(model: nn.Module, base: str, source: str) -> RunResults:
    from ..adapter import mask_layers

    if mask_layers(model):
        return mask_results(model, base, source)
    results = continued_results(source)
    results.pattern = results.pattern or "2:4"
    if results.base_model is None:
        results.base_model, results.base_revision = base, revision_of(model)
    return results


def _packed_names(model: nn.Module) -> list[str]:
    from ..packed import SparseLinear24

    return sorted(name for name, module in model.named_modules() if isinstance(module, SparseLinear24))
