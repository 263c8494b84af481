# SPDX-License-Identifier: Apache-2.0
"""The only file that touches private state of peft or transformers: each piece names its version and when it can go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# --- peft 0.21: methods can only be registered for members of the PeftType enum ---------------------------------------
# Can go when PEFT offers a hook for methods outside its tree (asked for in huggingface/peft#2273).
from peft.tuners._buffer_dict import BufferDict as BufferDict
from peft.utils.peft_types import PeftType
from torch import nn


def register_peft_type(name: str) -> PeftType:
    """Add a real member to the `PeftType` enum, so that look-ups, pickles, JSON and iteration all work. Idempotent."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # past EnumMeta.__setattr__, which refuses new members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 and later
    if hashable_values is not None and name not in hashable_values:
        hashable_values.append(name)
    return member


def register_peft_method_once(name: str, config_cls: type, model_cls: type) -> PeftType:
    """Register a tuner under `name` (lower case) unless it is registered already (a reload, or PEFT ships it)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import register_peft_method

    peft_type = register_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    return peft_type


# --- peft 0.21: what other methods do for themselves, and no public function does --------------------------------------
# Each can go when PEFT offers what its first line says.
def check_before_merging(check) -> None:
    """Have `check(tuner)` called before any PEFT method, stock LoRA included, merges its adapters. Idempotent."""
    from peft.tuners.tuners_utils import BaseTuner

    allowed = BaseTuner._check_merge_allowed
    if getattr(allowed, "nmsparse_check", False):
        return

    def _check_merge_allowed(self):
        check(self)
        return allowed(self)

    _check_merge_allowed.nmsparse_check = True
    BaseTuner._check_merge_allowed = _check_merge_allowed


def modules_taking_adapter_names(model: nn.Module, layer_cls: type):
    """`(module, whether it is in an encoder, its adapters)` of every module that takes `adapter_names` in its forward."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = getattr(model, "config", None)
    encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    for module in model.modules():
        if isinstance(module, (layer_cls, AuxiliaryTrainingWrapper)):
            yield module, module in in_encoder, module._get_available_adapters()


# --- transformers 5.23: no public way to say that injected adapters are gone once their layers were merged ------------
# Can go when PreTrainedModel offers one (delete_adapter needs the layers to be still there).
def forget_injected_adapters(model: nn.Module) -> None:
    """Drop the adapter configs that transformers' `add_adapter` and `load_adapter` keep on a model."""
    if getattr(model, "_hf_peft_config_loaded", False):
        del model.peft_config
        model._hf_peft_config_loaded = False


# --- transformers 5.23: a quantization method outside its tree --------------------------------------------------------
# Each can go when transformers offers what its first line says.
def allow_loading_attributes(config_cls: type) -> None:
    """Let `from_pretrained(packed_repo, quantization_config=...)` override run-time options. Idempotent.

    The list of config classes that may do so is a closed tuple; without this the options would be ignored silently.
    """
    from transformers.quantizers import auto

    if config_cls not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, config_cls)


def is_registered_quantization(name: str, config_cls: type) -> bool:
    """Whether `name` is registered with this very config class (registering again raises)."""
    from transformers.quantizers import auto

    return auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(name) is config_cls


def names_in_model(model, names) -> dict[str, str]:
    """Names that checkpoint tensors get in `model`: what the loader of Transformers does to each name.

    Leaves called `weight_...` (`weight_idx`) are treated as tensors of every module that has a `weight`, packed or not yet.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = dict(model.state_dict())
    beside = {leaf for name in names if (leaf := name.rpartition(".")[2]).startswith("weight_")}
    weights = [(name, tensor) for name, tensor in known.items() if name.endswith(".weight")]
    known.update({name.removesuffix("weight") + leaf: tensor for name, tensor in weights for leaf in beside})
    found = {}
    for name in sorted(names, key=dot_natural_key):  # in the loader's order, because some renamings keep state
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
        found[name] = renamed
    return found


def names_on_disk(model, names) -> dict[str, str | None]:
    """Names under which `save_pretrained` stores tensors of `model`; `None` where it fuses or splits the tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        apply_converters,
        apply_renamings,
        dot_natural_key,
    )

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)
        ]
    backward = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [entry for entry in backward if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in backward if isinstance(entry, WeightConverter)]
    found: dict[str, str | None] = {}
    for name in sorted(names, key=dot_natural_key):
        fused = apply_converters(name, converters)[1] is not None
        found[name] = None if fused else apply_renamings(name, renamings)
    return found


def forget_conversions(model, operation_cls: type) -> None:
    """Forget the load-time conversions that used `operation_cls`, so that `save_pretrained` does not revert them."""
    kept = [
        c for c in model._weight_conversions if not any(type(o) is operation_cls for o in getattr(c, "operations", ()))
    ]
    model._weight_conversions = kept


def whole_tensor(model, name: str, tensor):
    """The values of a state dict entry, fetched where it is offloaded to disk or sharded over processes."""
    from torch.distributed.tensor import DTensor
    from transformers.integrations.accelerate import load_offloaded_parameter

    if tensor.is_meta:
        return load_offloaded_parameter(model, name)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- peft 0.21: adapters can only be switched off together with requires_grad -----------------------------------------
# Can go when `enable_adapters` of tuner layers and auxiliary wrappers leaves requires_grad alone on request.
@contextlib.contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """For the time of the context a tuner layer or an auxiliary wrapper answers as what it wraps."""
    before = module._disable_adapters
    module._disable_adapters = True
    try:
        yield
    finally:
        module._disable_adapters = before


# --- bitsandbytes 0.50: 4-bit layers rearrange their weight on CPUs with AVX512-BF16 ----------------------------------
# Can go when PEFT's `get_base_weight` reads rearranged weights.
def keep_quantised_layout(module: nn.Module) -> None:
    """Have a quantised layer keep its weight as it was stored.

    In its first dense forward pass in eval mode on such a CPU a `Linear4bit` puts its weight into another order and rounds
    its scales to bfloat16, in place. PEFT would go on reading the old order: a wrong weight without an error.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False
        module.state_dict()  # puts a weight that was rearranged before back in order


# --- transformers 5.23: from_pretrained draws normal numbers into every weight of an nn.Linear that is offloaded to disk ---
# Can go when offloaded parameters count as initialised, or its init functions leave integers alone.
def keep_from_initialising(parameter: nn.Parameter) -> None:
    """Have `from_pretrained` take a parameter as initialised: integers have no normal distribution, and it would raise."""
    parameter._is_hf_initialized = True
