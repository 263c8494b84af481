# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model an adapter's config means."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..criteria import find_stacks, name_matches, without_routers
from ..errors import ConfigError, UnsupportedError
from .base_weight import BaseWeight, base_weights
from .config import NMSparseConfig

logger = logging.getLogger(__name__)


def resolve_targets(model: nn.Module, config: NMSparseConfig) -> None:
    """Put full names in place of defaults: the linear layers of the blocks, and the fused experts.

    Raises:
        ConfigError: if an entry of `dense_layers` or `target_parameters` matches nothing.
    """
    weights = base_weights(model)
    names = [*(name for name, _ in model.named_modules()), *weights]
    for entry in config.dense_layers or ():
        if not any(name_matches(name, entry) for name in names):
            raise ConfigError(f"dense_layers: {entry!r} matches no module of {type(model).__name__}")
    experts = [name for name, base in weights.items() if base.is_fused_experts]
    wanted = config.target_parameters
    if config.target_modules is None:
        config.target_modules = _linear_layers_of_blocks(model) or "all-linear"
        wanted = experts if wanted is None else wanted
    if wanted:
        config.target_parameters = _named_parameters(config, wanted, weights, type(model).__name__)
    elif experts and wanted is None:
        logger.warning(
            "%d fused expert weights stay dense, first %s; add target_parameters=[...] to prune them",
            len(experts),
            experts[0],
        )


def _linear_layers_of_blocks(model: nn.Module) -> set[str]:
    """Those that `nms.prune` takes, in whatever kind of layer they are; none where there are no blocks."""
    try:
        stacks = find_stacks(model)
    except UnsupportedError:
        return set()
    return {
        name.replace(".base_layer", "")
        for prefix, blocks in stacks
        for name, module in without_routers(blocks.named_modules(prefix=prefix))
        if isinstance(module, (nn.Linear, Conv1D))
    }


def _named_parameters(
    config: NMSparseConfig, wanted: list[str], weights: Mapping[str, BaseWeight], model_name: str
) -> list[str]:
    """Full names of `target_parameters`, in the order of the model, without those that other fields leave out."""
    for entry in wanted:
        if not any(f".{name}".endswith(f".{entry}") for name in weights):
            raise ConfigError(
                f"target_parameters: {entry!r} matches no parameter of {model_name}; give the end of its name, such as "
                "'mlp.experts.down_proj' (linear layers belong in target_modules)"
            )
    named = [name for name in weights if any(f".{name}".endswith(f".{entry}") for entry in wanted)]
    alone = copy.copy(config)
    kept = []
    for name in named:
        alone.target_modules = {name}
        if is_target(alone, name):
            kept.append(name)
    return kept


def is_target(config: NMSparseConfig, key: str):
    """Whether the config means the module `key`: PEFT's own answer, narrowed by `dense_layers`."""
    if any(name_matches(key, entry) for entry in config.dense_layers or ()):
        return False
    found = check_target_module_exists(config, key)
    # PEFT ignores layers_to_transform for names that match exactly, which is what "all-linear" resolves to on models
    # with few linear layers.
    targets, blocks = config.target_modules, config.layers_to_transform
    if found and blocks is not None and not isinstance(targets, str) and key in targets:
        return _block_index(key, config.layers_pattern) in ([blocks] if isinstance(blocks, int) else blocks)
    return found


def _block_index(key: str, layers_pattern: str | list[str] | None) -> int | None:
    """First block index in a module path: `model.layers.3.mlp.up_proj` -> 3."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    for name in names:
        if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", key):
            return int(match[1])
    return None
