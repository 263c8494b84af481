# SPDX-License-Identifier: Apache-2.0
"""Masked model <-> packed model, in place, and the bytes that it saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..errors import ConfigError, PatternError, UnsupportedError
from ..ops import SideBranch
from .branch import check_branch, common_slorb_block, slorb_block_of
from .config import QUANT_METHOD, PackedConfig
from .layers import TIED, dense_weight, linear_layers, log_dense, replace_modules, unpackable_layers
from .modules import SparseLinear24
from .quantizer import PackedQuantizer, packed_layers, unpack_layers
from .weights import PACKED_LEAVES, PATTERN, check_input_scale, check_value_kind

logger = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None = None,
    memory: str | None = None,
    branches: Mapping[str, SideBranch] | None = None,
    *,
    values: str = "dense",
    input_scales: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Pack the 2:4 linear layers of a model, in place; `save_pretrained` and `push_to_hub` then store it packed.

    Everything is checked and packed before the first layer is swapped, so the model is untouched on failure. Tied
    weights are never packed. Until the swap both forms are in memory (1.56 times the dense bytes in bfloat16).

    Args:
        model (`nn.Module`): usually a `PreTrainedModel`; merge adapters first.
        masks (`Mapping[str, torch.Tensor]`, *optional*): layer name -> mask `[out, in]` (for a `Conv1D` too), non-zero =
            kept. The model then computes with exactly these masks. Layers whose mask is not inside 2:4, or that cannot
            be packed, stay dense with zeros, are logged and listed in the config. Without `masks` they are read from
            the zeros of the weights, and groups with fewer than two non-zeros are completed lowest index first.
        memory (`str`, *optional*): "fast" or "low", see `SparseLinear24`.
        branches (`Mapping[str, SideBranch]`, *optional*): layer name -> what the layer adds beside its sparse weight,
            kept as a side branch. Where the layer cannot be packed it is folded into the dense weight, and logged.
        values (`str`, defaults to `"dense"`): "int8" or "int4": kept weights are rounded to the nearest, with a scale for
            each 128 inputs in the dtype of the layer; they are frozen.
        input_scales (`Mapping[str, torch.Tensor]`, *optional*): layer name -> `[in]`, for quantised values: a factor of each
            input, by which weights are divided before they are rounded.

    Returns:
        the same model.

    Raises:
        UnsupportedError: if no layer is 2:4, a mask or branch is for a tied weight, SLoRB blocks differ, or the model
            carries an adapter, is quantised otherwise (also packed with other `values`), or is not loaded.
        ConfigError: if a mask or branch names no plain linear layer, a branch a layer without mask, an input scale a layer
            that is not packed, or for other `values`.
        PatternError: if a mask has another shape than the weight, or a branch or an input scale does not fit it.
    """
    _refuse_adapters(model)
    work = _planned(model, masks, branches or {})
    branches, input_scales = work.branches, input_scales or {}
    _check_values(model, work, values, input_scales)
    packed = {
        name: SparseLinear24.from_linear(
            work.layers[name],
            work.masks[name](),
            memory,
            branches.get(name),
            values=values,
            input_scale=input_scales.get(name),
        )
        for name in work.packable
    }
    if masks is not None:
        log_dense(work.left_dense, "dense with zeros", branches)
    else:  # that other layers are not sparse is no news
        log_dense({name: why for name, why in work.left_dense.items() if name in branches}, "dense", branches)
    replace_modules(model, packed)
    for name in work.left_dense:
        _settle_dense(work.layers[name], work.masks[name], branches.get(name), masked=masks is not None)
    if isinstance(model, PreTrainedModel):
        _attach_config(model, work.slorb_block, values)
    logger.info(
        "packed %d linear layers (%s values, %d groups completed), %d stay dense",
        len(packed),
        values,
        sum(work.packable.values()),
        len(linear_layers(model)),
    )
    return model


def check_compress(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None,
    branches: Mapping[str, SideBranch] | None = None,
    values: str = "dense",
) -> list[str]:
    """Raise what `compress` would raise for this model; other adapters on it are not looked at.

    Returns:
        names of the layers that it would pack.
    """
    work = _planned(model, masks, branches or {})
    _check_values(model, work, values, {})
    return list(work.packable)


@dataclass(frozen=True)
class _Planned:
    """What is to be packed.

    Args:
        layers (`Mapping[str, nn.Module]`): linear layers of the model.
        masks (`Mapping[str, Callable]`): functions that return masks.
        branches (`Mapping[str, SideBranch]`): by layer name.
        packable (`Mapping[str, int]`): layers to pack -> groups to complete.
        left_dense (`Mapping[str, str]`): layers that have a mask and cannot be packed -> why.
        slorb_block (`int`, *optional*): of all SLoRB terms.
    """

    layers: Mapping[str, nn.Module]
    masks: Mapping[str, Callable[[], torch.Tensor]]
    branches: Mapping[str, SideBranch]
    packable: Mapping[str, int]
    left_dense: Mapping[str, str]
    slorb_block: int | None


def _planned(
    model: nn.Module, masks: Mapping[str, torch.Tensor] | None, branches: Mapping[str, SideBranch]
) -> _Planned:
    """Every check, before the first change."""
    _check_model(model)
    layers, unpackable = linear_layers(model), unpackable_layers(model)
    given = _zeros_as_masks(layers) if masks is None else _checked_masks(masks, layers, unpackable)
    _check_branches(branches, layers, unpackable, given)
    packable, left_dense = _split(given, layers, unpackable)
    if not packable and not packed_layers(model):
        why = f" ({next(iter(left_dense.items()))})" if masks is not None and left_dense else ""
        raise UnsupportedError(
            f"none of the {len(layers)} linear layers can be packed as {PATTERN} sparse along its input dimension{why}; "
            "prune the model first (hf_nmsparse.prune), give masks, or keep it dense with zeros (merge_and_unload)"
        )
    before = [layer.slorb_block for _, layer in packed_layers(model)]
    slorb_block = common_slorb_block([*before, *(slorb_block_of(branches.get(name)) for name in packable)])
    return _Planned(layers, given, branches, packable, left_dense, slorb_block)


def decompress(model: nn.Module) -> nn.Module:
    """Swap packed layers for the plain ones they were, zeros in place; the inverse of `compress` on a masked model.

    Quantised values stay as they were rounded, in the dtype of their scales. Layers with a side branch become dense, and one
    warning says how many. Also under a PEFT wrapper, where the adapter can be merged afterwards.
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
        packed (`int`): bytes of values, ids and scales, and of side branches.
        dense (`int`): bytes of the same weights dense, in the dtype in which each layer computes.
        dense_bf16 (`int`): the same in bfloat16.
    """

    layers: int
    packed: int
    dense: int
    dense_bf16: int

    @property
    def ratio(self) -> float | None:
        """Packed over dense bytes in the layers' own dtype: 0.5625 for 16-bit values without side branches, about
        0.32 for int8 and 0.2 for int4.

        `None` without packed layers.
        """
        return self.packed / self.dense if self.dense else None


def packed_sizes(model: nn.Module) -> PackedSizes:
    """Sizes of the packed layers of a model, see `PackedSizes`."""
    layers = [layer for _, layer in packed_layers(model)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    return PackedSizes(
        layers=len(layers),
        packed=sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in _packed_tensors(layer)),
        dense=sum(count * layer.weight24.dtype.itemsize for count, layer in zip(weights, layers, strict=True)),
        dense_bf16=2 * sum(weights),
    )


def _packed_tensors(layer: SparseLinear24) -> list[torch.Tensor]:
    tensors = [getattr(layer, leaf) for leaf in PACKED_LEAVES]
    return [tensor for tensor in tensors if tensor is not None]


# --- checks ---------------------------------------------------------------------------------------------------------
def _refuse_adapters(model: nn.Module) -> None:
    from peft import PeftModel  # here: it is slow to import, and only this check needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} carries a PEFT adapter; merge it first (model = model.merge_and_unload()), then "
            "compress the merged model"
        )


def _check_model(model: nn.Module) -> None:
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


def _zeros_as_masks(layers: Mapping[str, nn.Module]) -> dict:
    """Masks as functions, because those of all layers at once would take half of a bfloat16 model."""
    return {name: lambda layer=layer: dense_weight(layer).detach() != 0 for name, layer in layers.items()}


def _checked_masks(
    masks: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], unpackable: Mapping[str, str]
) -> dict:
    for name, mask in masks.items():
        if name not in layers:
            raise ConfigError(f"masks: {name!r} names no plain linear layer of the model; check the name")
        if unpackable.get(name) == TIED:
            raise UnsupportedError(f"masks: {name}: {TIED}, which the mask would prune too; leave this layer out")
        shape = dense_weight(layers[name]).shape
        if mask.shape != shape:
            raise PatternError(f"masks: {name} has shape {list(mask.shape)}, its weight {list(shape)} as [out, in]")
    return {name: lambda name=name, mask=mask: mask.to(layers[name].weight.device) for name, mask in masks.items()}


def _check_values(model: nn.Module, work: _Planned, values: str, input_scales: Mapping[str, torch.Tensor]) -> None:
    check_value_kind(values)
    if others := [name for name, layer in packed_layers(model) if layer.values != values]:
        kind = model.get_submodule(others[0]).values
        raise UnsupportedError(
            f"{others[0]} is packed with {kind} values, and a model stores one kind; call decompress first, or pass "
            f"values={kind!r}"
        )
    for name, input_scale in input_scales.items():
        if name not in work.packable:
            raise ConfigError(f"input_scales: {name!r} names no layer that is packed; check the name")
        check_input_scale(name, input_scale, dense_weight(work.layers[name]).shape, values)


def _check_branches(
    branches: Mapping[str, SideBranch],
    layers: Mapping[str, nn.Module],
    unpackable: Mapping[str, str],
    given: Mapping,
) -> None:
    for name, branch in branches.items():
        if name not in layers:
            raise ConfigError(f"branches: {name!r} names no plain linear layer of the model; check the name")
        if name not in given:
            raise ConfigError(f"branches: {name!r} has a side branch but no mask; give both, or neither")
        if unpackable.get(name) == TIED:
            raise UnsupportedError(f"branches: {name}: {TIED}, to which it would be added too; leave this layer out")
        check_branch(name, branch, *dense_weight(layers[name]).shape)


def _split(
    given: Mapping, layers: Mapping[str, nn.Module], unpackable: Mapping[str, str]
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


@torch.no_grad()
def _settle_dense(layer: nn.Module, mask: Callable[[], torch.Tensor], branch: SideBranch | None, masked: bool) -> None:
    """A layer that cannot be packed: zeros where its mask says so, its branch added to the weight."""
    weight = dense_weight(layer)
    if masked:
        weight.masked_fill_(mask() == 0, 0)
    if branch is not None:
        weight.copy_(branch.added_to(weight))


def _attach_config(model: PreTrainedModel, slorb_block: int | None, values: str) -> None:
    config = PackedConfig(modules_to_not_convert=sorted(linear_layers(model)), values=values, slorb_block=slorb_block)
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
