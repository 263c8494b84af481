# SPDX-License-Identifier: Apache-2.0
"""What happens to single tensors while Transformers loads a checkpoint: pruned and packed, or unpacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ..ops import SideBranch, Weight24
from .branch import BRANCH_LEAVES, branch_tensors
from .layers import is_conv1d
from .modules import SparseLinear24
from .stored_mask import MaskOnLoad
from .weights import WEIGHT_LEAVES, pack_masked, pack_pruned, weight_tensors


class PruneAndPack(ConversionOps):
    """Dense weight -> packed tensors of its magnitude 2:4 mask. Sees the weight in the dtype of the model."""

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
        converted = {}
        for name, weight in _single_tensors(input_dict):
            layer = _layer_of(model, name)
            if isinstance(layer, SparseLinear24):
                rows = _as_rows(weight, layer)
                converted |= _packed(name, pack_pruned(rows, layer.values))
            else:
                converted[name] = weight
        return converted


class MaskAndPack(ConversionOps):
    """Dense weight -> packed tensors and side branch by a published mask; dense with zeros where it cannot be packed."""

    def __init__(self, mask_on_load: MaskOnLoad) -> None:
        self.mask_on_load = mask_on_load

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
        converted = {}
        for name, weight in _single_tensors(input_dict):
            converted.update(self._converted(name, weight, _layer_of(model, name)))
        return converted

    def _converted(self, name: str, weight: torch.Tensor, layer: nn.Module) -> dict[str, torch.Tensor]:
        path = name.rpartition(".")[0]
        packable = isinstance(layer, SparseLinear24)
        if not packable and path not in self.mask_on_load.dense:
            return {name: weight}
        rows, keep = self.mask_on_load.weight_and_mask(path, _as_rows(weight, layer))
        branch = self.mask_on_load.mask.layers[path].branch
        if not packable:
            masked = rows.masked_fill(~keep, 0)
            return {name: _as_stored(masked if branch is None else branch.added_to(masked), layer)}
        beside = {f"{path}.{leaf}": tensor.to(rows).contiguous() for leaf, tensor in branch_tensors(branch).items()}
        return _packed(name, pack_masked(rows, keep, layer.values)) | beside


class Unpack(ConversionOps):
    """Packed tensors -> dense weight; every tensor called `weight` passes here, most without ids."""

    # It does not keep the quantizer: an operation that has one gets its floats uncast, and would miss keep_in_fp32.
    def __init__(self, quantizer: HfQuantizer) -> None:
        self.slorb_block = quantizer.quantization_config.slorb_block

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        found = dict(_single_tensors(input_dict))
        if "weight_idx" not in found:
            return {full_layer_name: found["weight"]}
        weight = Weight24(*(found.get(leaf) for leaf in WEIGHT_LEAVES)).dense()
        if any(leaf in found for leaf in BRANCH_LEAVES):
            slorb, low_rank_a, low_rank_b = (found.get(leaf) for leaf in BRANCH_LEAVES)
            weight = SideBranch(slorb, self.slorb_block, low_rank_a, low_rank_b).added_to(weight)
        return {full_layer_name: _as_stored(weight, _layer_of(model, full_layer_name))}


def _packed(name: str, weight: Weight24) -> dict[str, torch.Tensor]:
    """The packed tensors of the weight `name`, by their names in the model."""
    return {name.removesuffix("weight") + leaf: tensor for leaf, tensor in weight_tensors(weight).items()}


def _single_tensors(input_dict: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Transformers hands over tensors or lists of one, depending on what came before."""
    return [(name, found[0] if isinstance(found, list) else found) for name, found in input_dict.items()]


def _layer_of(model: PreTrainedModel, weight_name: str) -> nn.Module:
    return model.get_submodule(weight_name.rpartition(".")[0])


def _as_rows(weight: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A weight as the checkpoint of `layer` holds it -> `[out, in]`."""
    transposed = layer.conv1d if isinstance(layer, SparseLinear24) else is_conv1d(layer)
    return weight.t() if transposed else weight


def _as_stored(weight: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`[out, in]` -> as the plain `layer` holds it."""
    return weight.t().contiguous() if is_conv1d(layer) else weight
