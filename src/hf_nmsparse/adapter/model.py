# SPDX-License-Identifier: Apache-2.0
"""The tuner: puts mask layers around the linear layers of a model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from peft.functional import cast_adapter_dtype
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import nn

from .._compat import loaded_from
from ..errors import ConfigError, FormatError, UnsupportedError
from ..relaxations import RELAXATION_BUFFERS, Moment
from .base_weight import BaseWeight, expert_base_weight, module_base_weight
from .combine import combined_adapter
from .config import NMSparseConfig
from .layer import NMSparseLayer
from .linear import NMSparseConv2d, NMSparseLinear, ParamWrapper
from .mixed_batch import adapter_for_each_sample
from .sharding import refuse_sharded
from .targets import is_target, resolve_targets
from .terms import TERM_CONTAINERS, TERMS_DIGEST, check_terms

logger = logging.getLogger(__name__)


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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, but checked first, and a refusal half-way leaves the model as it was."""
        # PEFT's own hooks run for the first adapter only; this runs for every one.
        config = self.peft_config[adapter_name]
        self._check_config(model, config, adapter_name)
        resolve_targets(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # an interruption too
            for name, module in reversed(list(model.named_modules())):
                if isinstance(module, NMSparseLayer) and adapter_name in module.configs:
                    module.drop_adapter(adapter_name)
                    if not module.configs:
                        model.set_submodule(name, module.base_layer)
            raise
        layers = mask_layers(model, adapter_name)
        if config.mask_format == "packed":  # PEFT shortens long lists; a published mask names its layers in full
            config.target_modules = {name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}
        _compare_base_names(model, config, adapter_name, layers)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["nmsparse", config.pattern])

    def _check_config(self, model: nn.Module, config: NMSparseConfig, adapter_name: str) -> None:
        if config.mask_format == "packed" and not config.inference_mode:
            raise ConfigError(
                f"adapter {adapter_name!r} is a published mask: it contains codes, not logits, and cannot be trained. Load "
                "it with is_trainable=False, or start new logits from it: get_peft_model(model, NMSparseConfig(prior=None)) "
                "and nms.set_prior(model, <the mask's folder or repo>)"
            )
        self._owners: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append(f"{path}.{name}".replace(".base_layer", ""))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT, which makes everything in low precision float32; but logits keep the dtype of their config."""
        for layer in self.model.modules():  # one by one: never all logits in float32
            if isinstance(layer, BaseTunerLayer):
                cast_adapter_dtype(layer, adapter_name, autocast_adapter_dtype)
            carries = isinstance(layer, NMSparseLayer) and adapter_name in layer.configs
            if carries and (trained := layer.mask_parameter(adapter_name)) is not None:
                trained.data = trained.data.to(getattr(torch, layer.configs[adapter_name].logits_dtype))

    # --- merging ----------------------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, but every layer is checked before the first is merged."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As in PEFT, but every layer is checked before the first is merged."""
        self._check_mergeable(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        dense = set()
        for layer in mask_layers(self.model).values():
            names = [name for name in adapter_names or layer.active_adapters if name in layer.configs]
            for name in names:
                layer.check_usable(name)
                if layer.configs[name].has_side_branch and name not in layer.merged_adapters:
                    dense.add(name)
            if safe_merge and names and not bool(layer.merged_weight(names).isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        if dense:
            warnings.warn(
                f"adapter {', '.join(sorted(dense))} has a term beside its mask (slorb_block, low_rank): merged weights are "
                "dense. nms.compress(model) keeps the term beside packed 2:4 weights",
                stacklevel=3,
            )

    @staticmethod
    def _check_target_module_exists(peft_config: NMSparseConfig, key: str):
        return is_target(peft_config, key)

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
        if isinstance(target, NMSparseLayer) and parameter_name in (None, target.parameter_name):
            refuse_sharded(target, current_key, "putting a mask on")
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer) and not isinstance(target, ParamWrapper):
            raise UnsupportedError(
                f"{current_key} already carries a {type(target).__name__} adapter; add the mask first and the other "
                "adapter on top, or merge the other adapter into the base"
            )
        refuse_sharded(target, current_key, "putting a mask on")
        if parameter_name is not None:
            module = target.get_base_layer() if isinstance(target, ParamWrapper) else target
            base = expert_base_weight(module, parameter_name, current_key)
            self._refuse_shared(base, current_key, current_key)
            new_module = ParamWrapper(target, base, current_key, adapter_name, peft_config)
        else:
            base = module_base_weight(target, current_key, **get_quantization_kwargs(self))
            self._refuse_shared(base, current_key, f"{current_key}.weight")
            kind = NMSparseConv2d if base.is_convolution else NMSparseLinear
            new_module = kind(base, current_key, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _refuse_shared(self, base: BaseWeight, name: str, parameter: str) -> None:
        if shared := [other for other in self._owners.get(id(base.stored), ()) if other != parameter]:
            raise UnsupportedError(
                f"{name} shares its weight with {shared[0].removesuffix('.weight')}; a mask on it would prune both. Leave it "
                "out with exclude_modules, or untie the two"
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version also moves tensors to the device of `child.weight`, which experts lack; layers of ours are
        # on the right device already.
        setattr(parent, child_name, new_module)

    # --- several adapters -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names` of a mixed batch, one for each sample, to every layer."""
        names = kwargs.get("adapter_names")
        with contextlib.nullcontext() if names is None else adapter_for_each_sample(self.model, names, kwargs):
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Literal["logits", "votes"] = "logits",
    ) -> None:
        """Add an adapter that combines masks of this model.

        Args:
            adapters (`Sequence[str]`): names of mask adapters of one pattern, on the same layers, without other terms.
            weights (`Sequence[float]`): one for each.
            adapter_name (`str`): of the new adapter; it is not made active.
            combination_type (`str`): `"logits"`, the weighted sum of their logits (a mask that can be trained on); or
                `"votes"`: each group keeps the n weights with the largest sum of weights of the masks that keep them, equal
                ones lowest index first (works on published masks; the result is one).

        Raises:
            ConfigError: if the adapters do not fit together, before anything is added.
        """
        config, tensors = combined_adapter(self, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            for name, layer in mask_layers(self.model, adapter_name).items():
                for container, value in tensors[name].items():
                    item = getattr(layer, container)[adapter_name]
                    (item.weight if isinstance(item, nn.Module) else item).copy_(value)

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
        state_dict = _checked_terms(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, NMSparseLayer)}
        expected = {key: name for name, layer in layers.items() for key in _keys_of(name, layer, adapter_name)}
        # A published mask holds nothing else: what is not called so has a damaged name.
        given = {key for key in remapped if config.mask_format == "packed" or ".nmsparse_" in key}
        if missing := sorted(set(expected) - given):
            lacking = {expected[key] for key in missing}
            raise FormatError(
                f"the adapter file lacks {len(lacking)} of {len(layers)} layers, first {missing[0]}; it is incomplete or for "
                "another model"
            )
        if surplus := sorted(given - set(expected)):
            raise FormatError(
                f"the adapter file holds {len(surplus)} tensors that this model or config has no place for, first "
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
                layer.set_moment(name, Moment(step, max_steps, draw, accumulation))


def refuse_to_merge_over_a_mask(tuner: BaseTuner) -> None:
    """Called before any PEFT method merges: another adapter above a mask would write below it and drop it.

    Raises:
        UnsupportedError: naming the layer, with the way out.
    """
    for name, module in tuner.model.named_modules():
        over = isinstance(module, BaseTunerLayer) and not isinstance(module, NMSparseLayer)
        if over and isinstance(getattr(module, "base_layer", None), NMSparseLayer):
            raise UnsupportedError(
                f"{name}: merging this {type(module).__name__} adapter would write it into the weight below the mask and drop "
                "the mask: the result would be dense. Keep it unmerged; or save it, call unload(), merge or compress the "
                "mask, and load it again on the sparse model; or train with NMSparseConfig(delta_rank=...), whose merge "
                "stays n:m"
            )


def _checked_terms(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a mask file without the digests of terms, which are compared here, before PEFT casts what it loads."""
    kept = {key: value for key, value in state_dict.items() if not key.endswith(f".{TERMS_DIGEST}")}
    for key in state_dict.keys() - kept.keys():
        layer = key.removesuffix(TERMS_DIGEST)
        found = {part: kept.get(f"{layer}{part}.weight") for part in TERM_CONTAINERS}
        terms = {part: value for part, value in found.items() if value is not None}
        if not terms:
            raise FormatError(f"{key} is there without the terms that it is the digest of; the file is incomplete")
        check_terms(terms, state_dict[key], layer[:-1])
    return kept


def _keys_of(name: str, layer: NMSparseLayer, adapter_name: str) -> list[str]:
    """State dict keys of what a file must hold for one layer of an adapter."""
    keys = [
        f"{name}.{container}.{adapter_name}.weight"
        for container in layer.adapter_layer_names
        if adapter_name in getattr(layer, container)
    ]
    buffers = ("nmsparse_packed", "nmsparse_digest", "nmsparse_base", *RELAXATION_BUFFERS)
    return keys + [f"{name}.{part}.{adapter_name}" for part in buffers if adapter_name in getattr(layer, part)]


def _compare_base_names(
    model: nn.Module, config: NMSparseConfig, adapter_name: str, layers: dict[str, NMSparseLayer]
) -> None:
    """Where base weights have no fingerprint (quantised), their names are all there is to compare."""
    quantised = [name for name, layer in layers.items() if layer.quantization_backend is not None]
    here, _ = loaded_from(model)
    made_for = config.base_model_name_or_path
    if not quantised or not here or not made_for:
        return
    level = logging.INFO if here == made_for else logging.WARNING
    logger.log(
        level,
        "the base weights of %d layers are quantised and cannot be compared with those that mask %r was made for: %r, "
        "revision %r; this base is %r",
        len(quantised),
        adapter_name,
        made_for,
        config.revision,
        here,
    )
