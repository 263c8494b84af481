# SPDX-License-Identifier: Apache-2.0
"""From a masked model, or a model with a mask adapter, to packed 2:4 layers and back."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops, packed
from .._compat import forget_injected_adapters
from ..adapter import NMSparseLayer, NMSparseLinear, mask_layers
from ..criteria import Target, in_place, search_input_scales
from ..errors import ConfigError, PatternError, UnsupportedError
from ..pattern import NMPattern
from .semi_structured import plain_weights

logger = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None = None,
    memory: str | None = None,
    *,
    values: str = "dense",
    calibration: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the pruned linear layers of a model by `SparseLinear24`, in place. On failure the model is as it was.

    Args:
        model (`PeftModel`, a model with a mask adapter, or a masked plain model): with an adapter, its active masks
            decide what is kept, and terms beside them (SLoRB, low rank) stay live beside the packed weight; else
            `masks`, else the zeros of the weights (groups with fewer than two non-zeros are completed, lowest index
            first). Those of a plain model may be `torch.sparse.SparseSemiStructuredTensor`s.
        masks (`Mapping[str, torch.Tensor]`, *optional*): bool `[out, in]` by module name, for a plain model.
        memory (`str`, *optional*): "fast" or "low", see `SparseLinear24`.
        values (`str`, defaults to `"dense"`): "int8" or "int4" round kept weights to the nearest, with a scale for each 128
            inputs. They are frozen, and `decompress` gives them back as rounded.
        calibration (*optional*), tokenizer (*optional*): as in `nms.prune`; for quantised values: inputs of each layer get the
            factors with which rounding changes its outputs least, see `criteria.search_input_scales`. The masked model runs
            once over this data. The largest thing that it holds besides is a float32 `[in, in]` for each input of a block.
        progress (`bool`, defaults to `True`): show a progress bar of that where there is a terminal.

    Returns:
        the plain, unwrapped model, ready for `save_pretrained`.

    Raises:
        UnsupportedError: if a mask keeps more than 2 of 4, a layer cannot be packed, or other adapters are stacked on it.
        ConfigError: if `masks` are given for a model that has adapters, or calibration data for values that are not quantised.
    """
    if calibration is not None and values == "dense":
        raise ConfigError("calibration serves quantised values; pass values='int8' or 'int4', or no calibration")
    search = partial(search_input_scales, kind=values, calibration=calibration, tokenizer=tokenizer, progress=progress)
    layers = mask_layers(model)
    if not layers:
        with plain_weights(model):
            scales = None if calibration is None else _scales_of_plain(model, masks, values, search)
            return packed.compress(model, masks, memory, values=values, input_scales=scales)
    if masks is not None:
        raise ConfigError("the model carries mask adapters, whose masks are used; do not pass masks as well")
    refuse_stacked(model)
    active = {name: layer for name, layer in layers.items() if layer.adapters_in_use()}
    linear = {name: layer for name, layer in active.items() if isinstance(layer, NMSparseLinear)}
    if not active:
        raise ConfigError("no mask adapter is active; choose one with model.set_adapter(name)")
    if not linear:
        raise UnsupportedError(
            "only fused experts or convolutions are under a mask, and those cannot be packed; use model.merge_and_unload(), which "
            "leaves them dense with zeros"
        )
    kept = {name: _checked_mask(name, layer) for name, layer in linear.items()}
    branches = {name: branch for name, layer in linear.items() if (branch := _detached_branch(layer)) is not None}
    with base_layers_in_place(model, linear) as plain:
        packable = packed.check_compress(plain, kept, branches, values)
    scales = None
    if calibration is not None:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        scales = search(plain, [_observed(name, linear[name]) for name in packable])
    if others := sorted(set(active) - set(linear)):
        logger.warning("%d expert or convolution weights stay dense with zeros, first %s", len(others), others[0])
    plain = unload_masked(model, active)
    return packed.compress(plain, kept, memory, branches, values=values, input_scales=scales)


def decompress(model: nn.Module) -> nn.Module:
    """Turn the packed layers of a model back into plain `nn.Linear`s with zeros, in place."""
    return packed.decompress(model)


def _scales_of_plain(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None,
    values: str,
    search: Callable[..., dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Input scales of the layers of a model without adapters."""
    refuse_stacked(model)
    packable = packed.check_compress(model, masks, values=values)
    modules = {name: model.get_submodule(name) for name in (packable if masks is None else masks)}
    targets = [
        in_place(name, module, view=torch.t if isinstance(module, Conv1D) else torch.Tensor.detach)
        for name, module in modules.items()
    ]
    # Layers that a mask leaves dense with zeros compute under it too, but get no scale.
    return {name: scale for name, scale in search(model, targets, masks=masks).items() if name in packable}


def _observed(name: str, layer: NMSparseLinear) -> Target:
    """A layer under masks as the search for input scales sees it: it computes with them already, and nothing is chosen."""
    return Target(name, layer, lambda choice: None, computed=lambda: layer.hard_weight(layer.adapters_in_use()))


def _checked_mask(name: str, layer: NMSparseLayer) -> torch.Tensor:
    """The intersection of the masks in use, bool `[out, in]`."""
    if layer.quantization_backend is not None:
        raise UnsupportedError(
            f"{name} is quantised with {layer.quantization_backend.backend_name}; save the mask (nms.save_mask), load the "
            "base unquantised, put the mask on it (nms.load_mask) and compress that"
        )
    mask = None
    for adapter_name in layer.adapters_in_use():
        own = layer.hard_mask(adapter_name)
        mask = own if mask is None else mask & own
    if ops.count_groups(mask, NMPattern(2, 4)).over:
        raise UnsupportedError(
            f"{name}: its mask keeps more than 2 of 4 weights; only patterns inside 2:4 can be packed"
        )
    return mask


def _detached_branch(layer: NMSparseLayer) -> ops.SideBranch | None:
    dtype = layer.base_weight.stored.dtype
    try:
        branch = layer.side_branch(layer.adapters_in_use())
    except PatternError as error:
        raise UnsupportedError(f"{layer.module_name}: {error}; compress with one of the adapters active") from error
    return None if branch is None else branch.apply(lambda tensor: tensor.detach().to(dtype))


@contextlib.contextmanager
def base_layers_in_place(model: nn.Module, layers: Mapping[str, NMSparseLayer]) -> Iterator[nn.Module]:
    """The plain model, for the time of the context with its linear layers in the place of the mask layers."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        for name, layer in layers.items():
            plain.set_submodule(name, layer.get_base_layer())
        yield plain
    finally:
        for name, layer in layers.items():
            plain.set_submodule(name, layer)


def unload_masked(model: nn.Module, layers: Mapping[str, NMSparseLayer], with_side_branch: bool = False) -> nn.Module:
    """The plain model with every weight masked; side branches are left out, or added to the weights, dense then."""
    for layer in layers.values():
        names = layer.adapters_in_use()
        if layer.merged:  # with its side branch, maybe
            layer.unmerge()
        layer.merge(adapter_names=names, with_side_branch=with_side_branch)
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():  # that all is merged already, and dense
            warnings.simplefilter("ignore")
            return model.merge_and_unload()
    # Injected without a `PeftModel`, by transformers' `add_adapter` or `load_adapter`.
    for name, module in list(model.named_modules()):
        if isinstance(module, NMSparseLayer) and ".base_layer" not in name:
            model.set_submodule(name, module.get_base_layer())
    forget_injected_adapters(model)
    return model


def refuse_stacked(model: nn.Module) -> None:
    """Refuse adapters of other methods, which would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, NMSparseLayer):
            if name.endswith(".token_adapter"):
                raise UnsupportedError(
                    f"{name.removesuffix('.token_adapter')} has trained tokens (trainable_token_indices); merge them first: "
                    "nms.compress(model.merge_and_unload())"
                )
            raise UnsupportedError(
                f"{name} carries a {type(module).__module__}.{type(module).__name__} adapter as well; packing would lose it. "
                "Save that adapter, delete it, compress, and load it again on the packed model"
            )
