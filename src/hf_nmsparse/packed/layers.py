# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a model can be packed, and putting other modules in their place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from .. import _compat

logger = logging.getLogger(__name__)

TIED = "its weight is tied to another one"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Plain linear layers by name. Subclasses are left out: their owners may read the weight past the layer."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def unpackable_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers that cannot be packed -> why."""
    layers = linear_layers(model)
    tied = _tied_layers(model)
    fused = _fused_layers(model, layers)
    reasons = {}
    for name, layer in layers.items():
        if name in tied:
            reasons[name] = TIED
        elif layer.in_features % 8:
            reasons[name] = f"in_features={layer.in_features} is no multiple of 8"
        elif name in fused:
            reasons[name] = "checkpoints of this architecture store its weight fused with others"
    return reasons


def _tied_layers(model: nn.Module) -> set[str]:
    """Layers that share a weight. (Not tied yet while loading; there the default skips of Transformers name them.)"""
    modules = list(model.named_modules(remove_duplicate=False))
    owners = Counter(
        id(weight) for _, module in modules for weight in module._parameters.values() if weight is not None
    )
    return {name for name, module in modules if type(module) is nn.Linear and owners[id(module.weight)] > 1}


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


def log_dense(reasons: Mapping[str, str], what: str) -> None:
    """One line for the layers that stay dense although they were to be packed."""
    if reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        logger.warning("%d linear layers stay %s: %s", len(reasons), what, listed)
