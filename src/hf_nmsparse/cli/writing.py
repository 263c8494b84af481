# SPDX-License-Identifier: Apache-2.0
"""Writing a model with its tokenizer, card and results, whole or not at all."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import RESULTS_FILE
from .folders import MASK_FOLDER, folder_bytes, kind_of, output_folder
from .models import copy_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from ..criteria import PruneReport
    from ..packed import PackedSizes
    from ..results import RunResults

_SHARD = "2GB"  # one of them is in memory while an offloaded model is written; the same for all models, so that their
# files do not depend on the memory that there was


def write_model(
    model: nn.Module, output: Path, tokenizer_source: str, results: RunResults, packed: bool
) -> dict[str, Any]:
    """Write a masked model, or one that is packed already; `results` gets its sizes.

    Returns:
        facts for the answer: output, kind, bytes.
    """
    from ..packed import packed_sizes

    with output_folder(output) as staging:
        model.save_pretrained(staging, max_shard_size=_SHARD)
        finish(staging, tokenizer_source, results, packed_sizes(model) if packed else None)
    return _facts(output)


def write_pruned(
    model: nn.Module,
    output: Path,
    tokenizer_source: str,
    results: RunResults,
    packed: bool,
    report: PruneReport,
    scratch: Path,
) -> dict[str, Any]:
    """Write what one-shot pruning left, dense with zeros or packed, with the mask in a subfolder if it has codes.

    The model may be offloaded: it is written, and packed, file by file, from `scratch`, a folder that is made for it and
    left to the caller to remove. `results` gets the sizes.

    Returns:
        facts for the answer: output, kind, bytes, and of the mask: folder, bytes, bits a weight.
    """
    from ..hub.packing import stored_mask
    from ..packed import pack_files

    mask: dict[str, Any] = {}
    with output_folder(output) as staging:
        if report.codes:
            mask = write_mask(model, staging / MASK_FOLDER, results, report)
        sizes = None
        if packed:
            _save(model, scratch)
            codes = stored_mask(staging / MASK_FOLDER) if report.codes else None
            sizes = pack_files(scratch, staging, model, _weight_names(results), codes)
        else:
            _save(model, staging)
        finish(staging, tokenizer_source, results, sizes)
    if mask:
        mask["mask"] = str(output / MASK_FOLDER)
    return _facts(output) | mask


def write_mask(model: nn.Module, folder: Path, results: RunResults, report: PruneReport) -> dict[str, Any]:
    """The mask with its own card and results; `results` of the model get its size too."""
    from ..hub import save_mask
    from ..results import RunResults

    own = copy.deepcopy(results)
    own.kept_weights = "keep"
    if results.kept_weights != "keep":
        own.layers = []  # their errors are those of the new weights
    save_mask(model, folder, results=own, report=report)
    written = RunResults.read(folder / RESULTS_FILE)
    results.sizes["mask"] = written.sizes["mask"]
    results.mask_bits_per_weight, results.mask_bits_bound = written.mask_bits_per_weight, written.mask_bits_bound
    return {"mask_bytes": written.sizes["mask"], "bits_per_weight": written.mask_bits_per_weight}


def _weight_names(results: RunResults) -> list[str]:
    """The pruned weights: linear layers, and fused experts as one, which `sparse_layers` names one by one."""
    experts = set(results.fused_experts)
    linear = [name for name in results.sparse_layers if name.rpartition(".")[0] not in experts]
    return [*linear, *results.fused_experts]


def _save(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Attempting to save a model with offloaded modules"
        )  # in small shards
        model.save_pretrained(folder, max_shard_size=_SHARD)


def finish(staging: Path, tokenizer_source: str, results: RunResults, packed: PackedSizes | None) -> None:
    """Everything beside the weights."""
    from ..hub.card import write_card

    copy_tokenizer(tokenizer_source, staging)
    results.sizes["masked_model" if packed is None else "packed_model"] = folder_bytes(staging)
    if packed is not None:
        results.packed_ratio = packed.packed / packed.dense_bf16
    write_card(staging, results, "masked" if packed is None else "packed")
    results.write(staging / RESULTS_FILE)


def _facts(output: Path) -> dict[str, Any]:
    return {"output": str(output), "kind": kind_of(output).value, "bytes": folder_bytes(output)}


def note_mask(results: RunResults, model: nn.Module) -> None:
    """Record what the mask layers of a model say of themselves: pattern, names, terms."""
    from ..adapter import mask_layers
    from ..hub.card import terms_of

    layers = mask_layers(model)
    config = next(layer.configs[layer.active_adapters[0]] for layer in layers.values())
    results.pattern, results.sparse_layers, results.terms = config.pattern, sorted(layers), terms_of(config)
    results.fused_experts = sorted(name for name, layer in layers.items() if layer.base_weight.is_fused_experts)
    results.method = results.method or config.relaxation
    results.kept_weights = None if results.terms else "keep"
