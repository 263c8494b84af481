# SPDX-License-Identifier: Apache-2.0
"""Masked model <-> packed model, in place, and the bytes that it saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..errors import ConfigError, PatternError, UnsupportedError
from .config import QUANT_METHOD, PackedConfig
from .layers import TIED, linear_layers, log_dense, replace_modules, unpackable_layers
from .modules import PATTERN, SparseLinear24
from .quantizer import PackedQuantizer, packed_layers, unpack_layers

logger = logging.getLogger(__name__)


def compress(
    model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None, memory: str | None = None
) -> nn.Module:
    """Pack the 2:4 linear layers of a model, in place; `save_pretrained` and `push_to_hub` then store it packed.

    Everything is checked and packed before the first layer is swapped, so the model is untouched on failure. Tied
    weights are never packed. Until the swap both forms are in memory (1.56 times the dense bytes in bfloat16).

    Args:
        model (`nn.Module`): usually a `PreTrainedModel`; merge adapters first.
        masks (`Mapping[str, torch.Tensor]`, *optional*): layer name -> mask `[out, in]`, non-zero = kept. The model then
            computes with exactly these masks. Layers whose mask is not inside 2:4, or that cannot be packed, stay dense
            with zeros, are logged and listed in the config. Without `masks` they are read from the zeros of the weights,
            and groups with fewer than two non-zeros are completed lowest index first.
        memory (`str`, *optional*): "fast" or "low", see `SparseLinear24`.

    Returns:
        the same model.

    Raises:
        UnsupportedError: if no layer is 2:4, a mask is for a tied weight, or the model carries an adapter, is quantised
            otherwise, or is not loaded.
        ConfigError: if a mask names no plain linear layer.
        PatternError: if a mask has another shape than the weight.
    """
    _check_model(model)
    layers, unpackable = linear_layers(model), unpackable_layers(model)
    given = _zeros_as_masks(layers) if masks is None else _checked_masks(masks, layers, unpackable)
    packable, left_dense = _split(given, layers, unpackable)
    if masks is not None:
        log_dense(left_dense, "dense with zeros")
    if not packable and not packed_layers(model):
        raise UnsupportedError(
            f"none of the {len(layers)} linear layers is {PATTERN} sparse along its input dimension; prune the model first "
            "(hf_nmsparse.prune), merge its adapter (merge_and_unload), or give masks"
        )
    packed = {name: SparseLinear24.from_linear(layers[name], given[name](), memory) for name in packable}
    replace_modules(model, packed)
    if masks is not None:
        with torch.no_grad():
            for name in left_dense:
                layers[name].weight.masked_fill_(given[name]() == 0, 0)
    if isinstance(model, PreTrainedModel):
        _attach_config(model)
    completed = sum(packable.values())
    logger.info(
        "packed %d linear layers (%d groups completed), %d stay dense",
        len(packed),
        completed,
        len(linear_layers(model)),
    )
    return model


def decompress(model: nn.Module) -> nn.Module:
    """Swap packed layers for plain `nn.Linear` with the zeros in place; the inverse of `compress` on a masked model.

    Also under a PEFT wrapper, where the adapter can be merged afterwards.
    """
    unpack_layers(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(getattr(module, "hf_quantizer", None), PackedQuantizer):
            module.hf_quantizer.remove_quantization_config(module)
    return model


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of the packed layers' weights, without biases and without what `memory="fast"` keeps beside them.

    Args:
        layers (`int`): packed layers.
        packed (`int`): bytes of values and ids.
        dense (`int`): bytes of the same weights dense, in the dtype of each layer.
        dense_bf16 (`int`): the same in bfloat16.
    """

    layers: int
    packed: int
    dense: int
    dense_bf16: int

    @property
    def ratio(self) -> float | None:
        """Packed over dense bytes in the layers' own dtype: 0.5625 for 16-bit values. `None` without packed layers."""
        return self.packed / self.dense if self.dense else None


def packed_sizes(model: nn.Module) -> PackedSizes:
    """Sizes of the packed layers of a model, see `PackedSizes`."""
    layers = [layer for _, layer in packed_layers(model)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    return PackedSizes(
        layers=len(layers),
        packed=sum(t.numel() * t.element_size() for layer in layers for t in (layer.weight, layer.weight_idx)),
        dense=sum(count * layer.weight.element_size() for count, layer in zip(weights, layers, strict=True)),
        dense_bf16=2 * sum(weights),
    )


# --- checks ---------------------------------------------------------------------------------------------------------
def _check_model(model: nn.Module) -> None:
    from peft import PeftModel  # here: it is slow to import, and only this check needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} carries a PEFT adapter; merge it first (model = model.merge_and_unload()), then "
            "compress the merged model"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, PackedQuantizer):
        method = quantizer.quantization_config.quant_method
        raise UnsupportedError(
            f"the model is quantised with {method}; load it unquantised, or call model.dequantize()"
        )
    for name, layer in linear_layers(model).items():
        if not isinstance(layer.weight, nn.Parameter) or layer.weight.is_meta:
            raise UnsupportedError(
                f"{name}: its weight is {'not loaded (meta)' if layer.weight.is_meta else 'computed, no parameter'}; load "
                "the model whole on one device, and make pruning permanent (torch.nn.utils.prune.remove), first"
            )


def _zeros_as_masks(layers: Mapping[str, nn.Linear]) -> dict:
    """Masks as functions, because those of all layers at once would take half of a bfloat16 model."""
    return {name: lambda layer=layer: layer.weight.detach() != 0 for name, layer in layers.items()}


def _checked_masks(
    masks: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Linear], unpackable: Mapping[str, str]
) -> dict:
    for name, mask in masks.items():
        if name not in layers:
            raise ConfigError(f"masks: {name!r} names no plain nn.Linear of the model; check the name")
        if unpackable.get(name) == TIED:
            raise UnsupportedError(f"masks: {name}: {TIED}, which the mask would prune too; leave this layer out")
        if mask.shape != layers[name].weight.shape:
            raise PatternError(
                f"masks: {name} has shape {list(mask.shape)}, its weight {list(layers[name].weight.shape)}"
            )
    return {name: lambda name=name, mask=mask: mask.to(layers[name].weight.device) for name, mask in masks.items()}


def _split(
    given: Mapping, layers: Mapping[str, nn.Linear], unpackable: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Layers to pack -> groups to complete; the others -> why they stay dense."""
    packable, left_dense = {}, {}
    for name in layers:
        if name not in given:
            continue
        if name in unpackable:
            left_dense[name] = unpackable[name]
            continue
        counts = ops.count_groups(given[name](), PATTERN)
        if counts.follows:
            packable[name] = counts.under
        else:
            left_dense[name] = f"{counts.over} of {counts.groups} groups keep more than {PATTERN}"
    return packable, left_dense


def _attach_config(model: PreTrainedModel) -> None:
    config = PackedConfig(modules_to_not_convert=sorted(linear_layers(model)))
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
