# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a model can be packed, and putting other modules in their place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import _compat

logger = logging.getLogger(__name__)

TIED = "its weight is tied to another one"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: `nn.Linear`, or GPT-2's `Conv1D`, which holds its weight as `[in, out]`.

    Subclasses are none: their owners may read the weight past the layer.
    """
    return type(module) in (nn.Linear, Conv1D)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a plain `Conv1D`."""
    return type(module) is Conv1D


def dense_weight(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight of a plain linear layer as `[out, in]`, whichever way the layer holds it; a view."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Plain linear layers by name, see `is_linear`."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Fused weights of experts by name, `[experts, out, in]`, or `[experts, in, out]` where `is_transposed` says so."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(getattr(module, "is_transposed", None), bool)  # set by Transformers on modules of experts
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point() and parameter.itemsize > 1
    }


def expert_rows(model: nn.Module, name: str) -> torch.Tensor:
    """The rows of all experts of a fused weight one after the other, `[experts * out, in]`."""
    path, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = getattr(module, parameter_name)
    return (parameter.mT if module.is_transposed else parameter).flatten(0, 1)


def rows_of_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a mask can be on, linear layers and fused experts, `[out, in]` by name."""
    weights = {name: dense_weight(layer) for name, layer in linear_layers(model).items()}
    return weights | {name: expert_rows(model, name) for name in expert_weights(model)}


def set_expert_rows(model: nn.Module, name: str, rows: torch.Tensor) -> None:
    """Write what `expert_rows` returned back, changed, in place."""
    path, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = getattr(module, parameter_name)
    experts = rows.unflatten(0, (len(parameter), -1))
    with torch.no_grad():
        parameter.copy_(experts.mT if module.is_transposed else experts)


def unpackable_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers that cannot be packed -> why."""
    layers = linear_layers(model)
    tied = _tied_layers(model)
    fused = _fused_layers(model, layers)
    reasons = {}
    for name, layer in layers.items():
        if name in tied:
            reasons[name] = TIED
        elif (in_features := dense_weight(layer).shape[1]) % 8:
            reasons[name] = f"in_features={in_features} is no multiple of 8"
        elif name in fused:
            reasons[name] = "checkpoints of this architecture store its weight fused with others"
    return reasons


def _tied_layers(model: nn.Module) -> set[str]:
    """Layers that share a weight. (Not tied yet while loading; there the default skips of Transformers name them.)"""
    modules = list(model.named_modules(remove_duplicate=False))
    owners = Counter(
        id(weight) for _, module in modules for weight in module._parameters.values() if weight is not None
    )
    return {name for name, module in modules if is_linear(module) and owners[id(module.weight)] > 1}


def _fused_layers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Layers whose values and ids would not come to lie side by side in a checkpoint."""
    if not isinstance(model, PreTrainedModel):
        return set()
    on_disk = _compat.names_on_disk(model, [f"{name}.{leaf}" for name in names for leaf in ("weight", "weight_idx")])
    return {
        name
        for name in names
        if on_disk[f"{name}.weight"] is None or on_disk[f"{name}.weight_idx"] != f"{on_disk[f'{name}.weight']}_idx"
    }


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place that its name says."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def log_dense(reasons: Mapping[str, str], what: str, folded: Collection[str] = ()) -> None:
    """One line for the layers that stay dense although they were to be packed; `folded`: with their side branch."""
    if reasons:
        folds = {name: ", and its side branch is folded in" if name in folded else "" for name in reasons}
        listed = "; ".join(f"{name}: {reason}{folds[name]}" for name, reason in reasons.items())
        logger.warning("%d layers stay %s: %s", len(reasons), what, listed)
