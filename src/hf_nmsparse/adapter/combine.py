# SPDX-License-Identifier: Apache-2.0
"""Combining masks: `add_weighted_adapter`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch

from .. import ops
from ..errors import ConfigError, UnsupportedError
from ..fingerprint import digest
from .config import NMSparseConfig
from .layer import NMSparseLayer

COMBINATIONS = ("logits", "votes")


def combined_adapter(
    tuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> tuple[NMSparseConfig, dict[str, dict[str, torch.Tensor]]]:
    """Config of the combination, and for each layer its tensors by container; nothing is changed.

    Raises:
        ConfigError, UnsupportedError: if the adapters do not fit together.
    """
    _check_arguments(tuner.peft_config, adapters, weights, adapter_name, combination_type)
    configs = [tuner.peft_config[name] for name in adapters]
    layers = {m.module_name: m for m in tuner.model.modules() if isinstance(m, NMSparseLayer)}
    carried = [{name for name, layer in layers.items() if adapter in layer.configs} for adapter in adapters]
    for adapter, config, names in zip(adapters, configs, carried, strict=True):
        _check_alike(adapters[0], configs[0], adapter, config, combination_type)
        if names != carried[0]:
            raise ConfigError(
                f"adapters {adapters[0]!r} and {adapter!r} are on different layers, first at "
                f"{sorted(names ^ carried[0])[0]}; only masks on the same layers can be combined"
            )
    config = copy.deepcopy(configs[0])
    if combination_type == "votes":
        config.mask_format, config.inference_mode = "packed", True
    combine = _votes if combination_type == "votes" else _sum_of_logits
    return config, {name: combine(layers[name], adapters, weights) for name in sorted(carried[0])}


def _check_arguments(
    known: dict, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    if combination_type not in COMBINATIONS:
        raise ConfigError(
            f"combination_type={combination_type!r} has no meaning for masks; choose 'logits' (the weighted sum of logits) "
            "or 'votes' (the weights that most masks keep)"
        )
    if adapter_name in known:
        raise ConfigError(f"the model already has an adapter {adapter_name!r}; choose another name or delete it first")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"got {len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter")
    if missing := [name for name in adapters if name not in known]:
        raise ConfigError(f"the model has no adapter {missing[0]!r}; it has {', '.join(sorted(known))}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"weight {weight!r} is not a finite number")


def _check_alike(
    first_name: str, first: NMSparseConfig, name: str, config: NMSparseConfig, combination_type: str
) -> None:
    same = ("pattern", "relaxation") if combination_type == "logits" else ("pattern",)
    for field in same:
        if getattr(config, field) != getattr(first, field):
            raise ConfigError(
                f"adapters {first_name!r} and {name!r} differ in {field}: {getattr(first, field)!r} and "
                f"{getattr(config, field)!r}; only masks with the same can be combined"
            )
    if combination_type == "logits" and config.mask_format != "logits":
        raise ConfigError(f"adapter {name!r} is a published mask and has no logits; use combination_type='votes'")
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field):
            raise UnsupportedError(
                f"adapter {name!r} trains more than its mask ({field}), which a combination would lose; combine masks without "
                "it"
            )
    if config.trains_weight:
        raise UnsupportedError(
            f"adapter {name!r} has weights of its own (relaxation {config.relaxation!r}), which a combination of masks would lose; "
            "combine adapters that learn masks alone"
        )
    if config.has_side_branch or config.delta_rank is not None:
        raise UnsupportedError(
            f"adapter {name!r} has terms beside its mask (slorb_block, low_rank, delta_rank), which fit that one mask only; "
            "combine masks without such terms"
        )


def _sum_of_logits(layer: NMSparseLayer, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    logits = [layer.nmsparse_logits[name].weight.detach().float() for name in adapters]
    total = sum(weight * value for weight, value in zip(weights, logits, strict=True))
    if not bool(total.any()):
        raise ConfigError(
            f"{layer.module_name}: the weighted logits cancel out, which leaves no mask; use other weights"
        )
    return {"nmsparse_logits": total, "nmsparse_base": layer.nmsparse_base[adapters[0]]}


def _votes(layer: NMSparseLayer, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    pattern = layer.relaxations[adapters[0]].pattern
    votes = sum(weight * layer.hard_mask(name).float() for weight, name in zip(weights, adapters, strict=True))
    codes = ops.top_n_codes(votes, pattern)
    packed = ops.pack_codes(codes, pattern, layer.in_features)
    return {
        "nmsparse_packed": packed,
        "nmsparse_digest": digest(packed),
        "nmsparse_base": layer.nmsparse_base[adapters[0]],
    }
