# SPDX-License-Identifier: Apache-2.0
"""Writing a model with its tokenizer, card and results, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import RESULTS_FILE, folder_bytes, kind_of, output_folder
from .models import copy_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from ..results import RunResults


def write_model(
    model: nn.Module, output: Path, tokenizer_source: str, results: RunResults, packed: bool
) -> dict[str, Any]:
    """Write a pruned model; `results` gets its sizes. A model is packed first if that is wanted and not done yet.

    Returns:
        facts for the answer: output, kind, bytes.
    """
    from ..hub.card import write_card
    from ..packed import compress, packed_sizes

    if packed and not packed_sizes(model).layers:
        model = compress(model)
    with output_folder(output) as staging:
        model.save_pretrained(staging)
        copy_tokenizer(tokenizer_source, staging)
        results.sizes["packed_model" if packed else "masked_model"] = folder_bytes(staging)
        if packed:
            sizes = packed_sizes(model)
            results.packed_ratio = sizes.packed / sizes.dense_bf16
        if packed:  # a card has no words for plain models with zeros in them
            write_card(staging, results, "packed")
        results.write(staging / RESULTS_FILE)
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
