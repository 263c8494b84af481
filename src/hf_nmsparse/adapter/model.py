# SPDX-License-Identifier: Apache-2.0
"""The tuner: puts mask layers around the linear layers of a model."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from ..criteria import name_matches
from ..errors import ConfigError, FormatError, UnsupportedError
from ..relaxations import Moment
from .config import NMSparseConfig
from .layer import NMSparseLayer, NMSparseLinear


class NMSparseModel(BaseTuner):
    """Learnable n:m masks over a frozen model.

    Args:
        model (`nn.Module`): the base model.
        config (`NMSparseConfig`): the adapter's configuration.
        adapter_name (`str`): its name.
    """

    prefix: str = "nmsparse_"
    tuner_layer_cls = NMSparseLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: NMSparseConfig, model_config: dict) -> NMSparseConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, but checked first, and a refusal half-way leaves the model as it was."""
        # PEFT's own hooks run for the first adapter only; this runs for every one.
        config = self.peft_config[adapter_name]
        self._check_config(model, config, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for name, module in list(model.named_modules()):
                if isinstance(module, NMSparseLayer) and adapter_name in module.configs:
                    module.drop_adapter(adapter_name)
                    if not module.configs:
                        model.set_submodule(name, module.base_layer)
            raise
        if config.mask_format == "packed":  # PEFT shortens long lists; a published mask names its layers in full
            config.target_modules = set(mask_layers(model, adapter_name))
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["nmsparse", config.pattern])

    def _check_config(self, model: nn.Module, config: NMSparseConfig, adapter_name: str) -> None:
        if config.mask_format == "packed" and not config.inference_mode:
            raise ConfigError(
                f"adapter {adapter_name!r} is a published mask: it contains codes, not logits, and cannot be trained. Load "
                "it with is_trainable=False, or start new logits from it: get_peft_model(model, NMSparseConfig(prior=None)) "
                "and nms.set_prior(model, <the mask's folder or repo>)"
            )
        names = [name for name, _ in model.named_modules()]
        for entry in config.dense_layers or ():
            if not any(name_matches(name, entry) for name in names):
                raise ConfigError(f"dense_layers: {entry!r} matches no module of {type(model).__name__}")
        self._weight_owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            if (weight := module._parameters.get("weight")) is not None:
                self._weight_owners.setdefault(id(weight), []).append(name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # Every layer before the first is merged, so that nothing is half merged.
        for layer in mask_layers(self.model).values():
            for name in layer.active_adapters:
                if name in layer.configs:
                    layer.check_usable(name)

    @staticmethod
    def _check_target_module_exists(peft_config: NMSparseConfig, key: str):
        if any(name_matches(key, entry) for entry in peft_config.dense_layers or ()):
            return False
        found = check_target_module_exists(peft_config, key)
        # PEFT ignores layers_to_transform for names that match exactly, which is what "all-linear" resolves to on models
        # with few linear layers.
        targets = peft_config.target_modules
        if found and peft_config.layers_to_transform is not None and not isinstance(targets, str) and key in targets:
            return _block_index(key, peft_config.layers_pattern) in _as_list(peft_config.layers_to_transform)
        return found

    def _create_and_replace(
        self,
        peft_config: NMSparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, NMSparseLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise UnsupportedError(
                f"{current_key} already carries a {type(target).__name__} adapter; add the mask first and the other "
                "adapter on top, or merge the other adapter into the base"
            )
        if type(target) is not nn.Linear:
            raise UnsupportedError(
                f"{current_key} is a {type(target).__module__}.{type(target).__name__}; masks go on torch.nn.Linear. "
                "Leave it out with exclude_modules, or decompress the model first if it is packed"
            )
        if shared := [name for name in self._weight_owners.get(id(target.weight), ()) if name != current_key]:
            raise UnsupportedError(
                f"{current_key} shares its weight with {shared[0]}; a mask on it would prune both. Leave it out with "
                "exclude_modules, or untie the two"
            )
        new_module = NMSparseLinear(target, current_key, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NMSparseConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuse a file of the other kind or an incomplete one before a tensor is set; PEFT would only warn."""
        if config.mask_format == "logits" and any(key.endswith(".nmsparse_packed") for key in state_dict):
            raise ConfigError(
                "this is a published mask: it contains codes, not logits, and training cannot resume from it. Resume from "
                "a training checkpoint, or start new logits from it with nms.set_prior(model, <the mask's folder or repo>)"
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, NMSparseLayer)}
        container = "nmsparse_packed" if config.mask_format == "packed" else "nmsparse_logits"
        suffix = f".{container}.{adapter_name}" + ("" if config.mask_format == "packed" else ".weight")
        expected = {name + suffix for name, module in layers.items() if adapter_name in getattr(module, container)}
        given = {key for key in remapped if f".{container}." in key}
        if missing := sorted(expected - given):
            raise FormatError(
                f"the adapter file lacks {len(missing)} of {len(expected)} layers, first {missing[0].removesuffix(suffix)}; "
                "it is incomplete or for another model"
            )
        if surplus := sorted(given - expected):
            raise FormatError(
                f"the adapter file holds {len(surplus)} layers that this model or config does not prune, first "
                f"{surplus[0]}; it is for another model"
            )
        return remapped


def mask_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, NMSparseLayer]:
    """Mask layers of a model by the module name of their base layer.

    Args:
        model (`nn.Module`): any model, wrapped by PEFT or not.
        adapter_name (`str`, *optional*): only layers that carry this adapter.
    """
    layers = (module for module in model.modules() if isinstance(module, NMSparseLayer))
    return {layer.module_name: layer for layer in layers if adapter_name is None or adapter_name in layer.configs}


def set_mask_step(model: nn.Module, step: int, max_steps: int, draw: int = 0, accumulation: int = 1) -> None:
    """Tell every mask of `model` where training stands. `MaskScheduleCallback` does this under a Trainer.

    Args:
        model (`nn.Module`): the model in training.
        step (`int`): optimizer steps done so far.
        max_steps (`int`): optimizer steps planned; the schedules end there.
        draw (`int`): number of the sample within this step (`micro_step * world_size + rank`); it is taken as 0 for
            adapters with `resample="step"`.
        accumulation (`int`): micro-steps per optimizer step.
    """
    for layer in mask_layers(model).values():
        for name, config in layer.configs.items():
            if config.mask_format == "logits":
                layer.set_moment(
                    name, Moment(step, max_steps, draw if config.resample == "micro" else 0, accumulation)
                )


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _block_index(key: str, layers_pattern: str | list[str] | None) -> int | None:
    """First block index in a module path: `model.layers.3.mlp.up_proj` -> 3."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    for name in names:
        if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", key):
            return int(match[1])
    return None
