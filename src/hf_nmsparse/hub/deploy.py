# SPDX-License-Identifier: Apache-2.0
"""From a masked model, or a model with a mask adapter, to packed 2:4 layers and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .. import ops, packed
from .._compat import forget_injected_adapters
from ..adapter import NMSparseLayer, mask_layers
from ..errors import ConfigError, UnsupportedError
from ..pattern import NMPattern


def compress(model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Replace the pruned linear layers of a model by `SparseLinear24`, in place.

    Args:
        model (`PeftModel`, a model with a mask adapter, or a masked plain model): with an adapter, its active masks
            decide what is kept; else `masks`, else the zeros of the weights (groups with fewer than two non-zeros are
            completed, lowest index first).
        masks (`Mapping[str, torch.Tensor]`, *optional*): bool `[out, in]` by module name, for a plain model.

    Returns:
        the plain, unwrapped model, ready for `save_pretrained`.

    Raises:
        UnsupportedError: if a mask keeps more than 2 of 4, a layer cannot be packed, or other adapters are stacked on it.
        ConfigError: if `masks` are given for a model that has adapters.
    """
    layers = mask_layers(model)
    if not layers:
        return packed.compress(model, masks)
    if masks is not None:
        raise ConfigError("the model carries mask adapters, whose masks are used; do not pass masks as well")
    _refuse_stacked(model)
    active = {name: mask for name, layer in layers.items() if (mask := _active_mask(layer)) is not None}
    if not active:
        raise ConfigError("no mask adapter is active; choose one with model.set_adapter(name)")
    for name, mask in active.items():
        if ops.count_groups(mask, NMPattern(2, 4)).over:
            raise UnsupportedError(
                f"{name}: its mask keeps more than 2 of 4 weights; only patterns inside 2:4 can be packed"
            )
    plain = model.merge_and_unload() if isinstance(model, PeftModel) else _unload(model)
    return packed.compress(plain, active)


def decompress(model: nn.Module) -> nn.Module:
    """Turn the packed layers of a model back into plain `nn.Linear`s with zeros, in place."""
    return packed.decompress(model)


def _active_mask(layer: NMSparseLayer) -> torch.Tensor | None:
    """The intersection of the active masks of a layer, bool `[out, in]`."""
    mask = None
    for name in layer.merged_adapters or layer.active_adapters:
        if name in layer.configs:
            mask = layer.hard_mask(name) if mask is None else mask & layer.hard_mask(name)
    return mask


def _unload(model: nn.Module) -> nn.Module:
    """Merge masks that were injected without a `PeftModel` (transformers' `add_adapter` and `load_adapter`)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NMSparseLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    forget_injected_adapters(model)
    return model


def _refuse_stacked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, NMSparseLayer):
            raise UnsupportedError(
                f"{name} carries a {type(module).__module__}.{type(module).__name__} adapter as well; packing would lose it. "
                "Save that adapter, delete it, compress, and load it again on the packed model"
            )
