# SPDX-License-Identifier: Apache-2.0
"""Another published mask on a packed model: its layers are packed anew from the weights of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError
from ..fingerprint import fingerprint
from .branch import branch_tensors, common_slorb_block, rank_of, slorb_block_of
from .layers import dense_weight, expert_weights, rows_of_weights, set_expert_rows
from .modules import SparseLinear24
from .quantizer import packed_layers
from .stored_mask import MaskOnLoad, StoredMask, check_fits, read_stored_mask
from .weights import PACKED_LEAVES, pack_masked, weight_tensors


@torch.no_grad()
def switch_mask(
    model: nn.Module,
    base: nn.Module,
    mask: str | os.PathLike,
    revision: str | None = None,
    task: str | None = None,
    allow_base_mismatch: bool = False,
) -> nn.Module:
    """Put another published mask on a packed model, in place, as if the base had been loaded with it.

    One dense base, in the memory of the CPU for example, so serves any number of tasks on one packed model. All layers are
    packed before the first one changes: for that time their packed tensors are in memory twice. Tensors that keep their
    shape keep their place too, so that captured CUDA graphs stay valid.

    Args:
        model (`nn.Module`): with layers packed under a mask of the same base and layers.
        base (`nn.Module`): the dense base model, on any device, in any floating point dtype.
        mask (`str` or `Path`): folder or Hub repo of a published mask, full or a delta.
        revision (`str`, *optional*), task (`str`, *optional*): of the repo, and subfolder.
        allow_base_mismatch (`bool`): accept base weights other than those that the mask was made for.

    Returns:
        the same model.

    Raises:
        ConfigError: if the model holds packed layers that the mask lacks or none at all, or dense ones that are not the
            base's.
        UnsupportedError: if the pattern of the mask is not inside 2:4, values were rounded with input scales, or weights are
            offloaded.
        FormatError, PatternError, BaseModelMismatchError: if the mask is damaged, or for another model.
    """
    for which, of in (("model", model), ("base", base)):
        _check_present(which, of)
    stored = read_stored_mask(str(mask), revision, task)
    weights, plain = rows_of_weights(base), rows_of_weights(model)
    check_fits(stored, weights)
    packed = dict(packed_layers(model))
    _check_layers(model, packed, plain, stored, weights)
    slorb_block = common_slorb_block(slorb_block_of(stored.layers[name].branch) for name in packed)
    on_base = MaskOnLoad(stored)
    fresh = {name: _packed_tensors(layer, name, weights[name], on_base) for name, layer in packed.items()}
    dense = {name: _masked(plain[name], name, weights[name], on_base) for name in stored.layers if name not in packed}
    on_base.settle(allow_base_mismatch)
    for name, layer in packed.items():
        for leaf in PACKED_LEAVES:
            _put(layer, leaf, fresh[name].get(leaf))
        branch = stored.layers[name].branch
        layer.slorb_block, layer.low_rank = slorb_block_of(branch), rank_of(branch)
    experts = expert_weights(model)
    for name, weight in dense.items():
        if name in experts:
            set_expert_rows(model, name, weight)
        else:
            dense_weight(model.get_submodule(name)).copy_(weight)
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config.slorb_block = slorb_block
    return model


def _check_present(which: str, model: nn.Module) -> None:
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(f"the {which} carries adapters; pass the plain model, without them")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(f"{name} of the {which} is offloaded; load it whole, on the CPU or a GPU")
        if which == "model" and parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise UnsupportedError(
                f"{name} was made in inference mode, where nothing tells a later change; load the model outside of it, or switch "
                "inside torch.inference_mode()"
            )


def _check_layers(
    model: nn.Module,
    packed: Mapping[str, SparseLinear24],
    plain: Mapping[str, torch.Tensor],
    mask: StoredMask,
    weights: Mapping[str, torch.Tensor],
) -> None:
    if not packed:
        raise ConfigError(
            f"{type(model).__name__} has no packed layer; load its base with quantization_config=PackedConfig(mask=...), or "
            "call compress"
        )
    if without := sorted(set(packed) - set(mask.layers)):
        raise ConfigError(
            f"{mask.source} has no mask for {len(without)} packed layers of the model, first {without[0]}; load the base anew "
            "with PackedConfig(mask=...)"
        )
    for name, layer in packed.items():
        if (layer.out_features, layer.in_features) != tuple(weights[name].shape):
            raise ConfigError(
                f"{name}: the packed layer is {layer.out_features} x {layer.in_features}, that of the base "
                f"{' x '.join(map(str, weights[name].shape))}; give the base that the model was made of"
            )
        if layer.weight_input_scale is not None:
            raise UnsupportedError(
                f"{name}: its values were rounded with input scales, which were searched for its old mask; compress the model "
                "under the new mask with calibration data"
            )
    if absent := sorted(set(mask.layers) - set(packed) - set(plain)):
        raise ConfigError(f"{mask.source}: the model has no layer {absent[0]} that a mask can be put on")
    for name in sorted(set(plain) - set(mask.layers)):
        there = plain[name]
        if name not in weights or not torch.equal(fingerprint(there), fingerprint(weights[name].to(there.dtype))):
            raise ConfigError(
                f"{name}: the mask leaves this layer as it is in the base, and the model has another weight there (it was "
                "pruned or trained); load the base anew with PackedConfig(mask=...)"
            )


def _packed_tensors(
    layer: SparseLinear24, name: str, weight: torch.Tensor, on_base: MaskOnLoad
) -> dict[str, torch.Tensor]:
    dtype = layer.weight24.dtype
    rows, keep = on_base.weight_and_mask(name, weight.detach().to(layer.weight_idx.device, dtype))
    beside = branch_tensors(on_base.mask.layers[name].branch)
    return weight_tensors(pack_masked(rows, keep, layer.values)) | {
        leaf: tensor.to(rows).contiguous() for leaf, tensor in beside.items()
    }


def _masked(there: torch.Tensor, name: str, weight: torch.Tensor, on_base: MaskOnLoad) -> torch.Tensor:
    """For a layer that cannot be packed: dense with zeros, its side branch folded in; device and dtype are those of `there`."""
    rows, keep = on_base.weight_and_mask(name, weight.detach().to(there.device, there.dtype))
    branch = on_base.mask.layers[name].branch
    masked = rows.masked_fill(~keep, 0)
    return masked if branch is None else branch.added_to(masked)


def _put(layer: SparseLinear24, leaf: str, tensor: torch.Tensor | None) -> None:
    """Write a tensor where the old one lies if it has its shape, else in its stead."""
    old = getattr(layer, leaf)
    if tensor is None:
        setattr(layer, leaf, None)
    elif old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
        old.copy_(tensor)
    else:
        setattr(layer, leaf, nn.Parameter(tensor, requires_grad=layer.weight.requires_grad))
