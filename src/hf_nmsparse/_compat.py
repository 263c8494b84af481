# SPDX-License-Identifier: Apache-2.0
"""The only file that touches private state of peft or transformers: each piece names its version and when it can go.

`SURFACES` lists what of other packages may move without notice; tests/test_compat.py looks at each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners._buffer_dict import BufferDict as BufferDict
from peft.utils.peft_types import PeftType
from torch import nn


@dataclass(frozen=True)
class Surface:
    """A private or undocumented name of another package that ours depends on.

    Attributes:
        module (`str`): where it is; its first part is the package.
        name (`str`): dotted, within the module.
        used_for (`str`): what of ours breaks without it.
        until (`str`): what the package would have to offer for us to let go of it.
        takes (`str`): parameters that we pass or are passed, separated by blanks.
        mentions (`str`): attributes of instances that its source sets or reads, separated by blanks.
    """

    module: str
    name: str
    used_for: str
    until: str
    takes: str = ""
    mentions: str = ""


# --- what may move --------------------------------------------------------------------------------------------------
_TUNERS = "peft.tuners.tuners_utils"
_OUTSIDE = "a documented way to write a PEFT method outside its tree (huggingface/peft#2273)"
_SWITCH = "switching adapters off without touching requires_grad"
_LOADING = "public names for its weight conversions"
_NAMES = "names of packed tensors"
_QUANTIZER = "documented hooks of HfQuantizer"
# fmt: off
SURFACES: tuple[Surface, ...] = (
    Surface("peft.utils.peft_types", "PeftType._value2member_map_", "the NMSPARSE adapter type", _OUTSIDE),
    Surface("peft.utils.peft_types", "register_peft_method", "the NMSPARSE adapter type", _OUTSIDE, "name config_cls model_cls"),
    Surface("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", "registering once only", _OUTSIDE),
    Surface("peft.tuners._buffer_dict", "BufferDict", "codes and fingerprints of each adapter", "a public BufferDict"),
    Surface(_TUNERS, "BaseTuner._check_merge_allowed", "refusing to merge LoRA over a mask", "a hook before merging"),
    Surface(_TUNERS, "BaseTuner._create_and_replace", "putting masks on layers and experts", _OUTSIDE,
            "peft_config adapter_name target target_name parent current_key parameter_name"),
    Surface(_TUNERS, "BaseTuner._check_target_module_exists", "choosing the layers", _OUTSIDE, "peft_config key"),
    Surface(_TUNERS, "BaseTuner._replace_module", "masks on experts", _OUTSIDE, "parent child_name new_module child"),
    Surface(_TUNERS, "BaseTuner._cast_adapter_dtype", "logits in float32", _OUTSIDE, "adapter_name autocast_adapter_dtype"),
    Surface(_TUNERS, "BaseTuner._remap_adapter_state_dict_for_load", "refusing incomplete adapter files", _OUTSIDE,
            "model config adapter_name state_dict"),
    Surface("peft", "PeftModel._enable_peft_forward_hooks", "mixed batches (adapter_names)", _OUTSIDE),
    Surface(_TUNERS, "BaseTunerLayer._get_available_adapters", "mixed batches (adapter_names)", _OUTSIDE),
    Surface(_TUNERS, "BaseTunerLayer._move_adapter_to_device_of_base_layer", "masks on their layer's device", _OUTSIDE,
            "adapter_name device"),
    Surface(_TUNERS, "BaseTunerLayer.enable_adapters", "the dense teacher", _SWITCH, mentions="_disable_adapters"),
    Surface("peft.utils", "AuxiliaryTrainingWrapper", "the dense teacher, mixed batches", _SWITCH,
            mentions="_disable_adapters _get_available_adapters"),
    Surface("transformers", "PreTrainedModel.add_adapter", "compress and merge after load_adapter",
            "forgetting adapters whose layers are merged", mentions="_hf_peft_config_loaded"),
    Surface("transformers", "PreTrainedModel._keep_in_fp32_modules", "pruning while loading", _QUANTIZER),
    Surface("transformers", "PreTrainedConfig", "the base's revision in cards and masks", "a model that says its commit",
            mentions="_commit_hash"),
    Surface("transformers.quantizers.auto", "LOADING_ATTRIBUTES_CONFIG_TYPES", "PackedConfig for a packed checkpoint",
            "a class attribute instead of a closed tuple"),
    Surface("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING", "registering once only",
            "registering twice without an error"),
    Surface("transformers", "quantizers.base.HfQuantizer._process_model_before_weight_loading", "packed layers", _QUANTIZER,
            "model"),
    Surface("transformers", "quantizers.base.HfQuantizer._process_model_after_weight_loading", "packed layers", _QUANTIZER,
            "model"),
    Surface("transformers", "quantizers.base.HfQuantizer._dequantize", "model.dequantize()", _QUANTIZER, "model dtype"),
    Surface("transformers.distributed.tensor_parallel", "ColwiseParallel.should_use_local_tensors",
            "packed layers under tensor parallelism", "a sharding strategy of our linear operator",
            mentions="_hf_quantized_needs_local_tp"),
    Surface("transformers.conversion_mapping", "get_model_conversion_mapping", _NAMES, _LOADING, "model add_legacy"),
    Surface("transformers.core_model_loading", "rename_source_key", _NAMES, _LOADING,
            "source_key weight_renamings weight_converters base_model_prefix meta_state_dict"),
    Surface("transformers.core_model_loading", "apply_converters", _NAMES, _LOADING, "source_key weight_converters"),
    Surface("transformers.core_model_loading", "apply_renamings", _NAMES, _LOADING, "source_key weight_renamings"),
    Surface("transformers.core_model_loading", "dot_natural_key", _NAMES, _LOADING),
    Surface("transformers.core_model_loading", "PrefixChange.reverse_transform", _NAMES, _LOADING),
    Surface("transformers.core_model_loading", "WeightRenaming.reverse_transform", _NAMES, _LOADING),
    Surface("transformers.core_model_loading", "WeightConverter.reverse_transform", _NAMES, _LOADING),
    Surface("transformers.core_model_loading", "ConversionOps.convert", "packing while loading", _LOADING,
            "input_dict full_layer_name model"),
    Surface("transformers.core_model_loading", "convert_and_load_state_dict_in_model", "saving what was unpacked", _LOADING,
            mentions="_weight_conversions"),
    Surface("transformers.integrations.accelerate", "load_offloaded_parameter", "saving packed models that are on disk",
            "a state dict without meta tensors", "model param_name"),
    Surface("transformers.initialization", "normal_", "packed layers on disk", "leaving integers alone when initialising",
            mentions="_is_hf_initialized"),
    Surface("accelerate.hooks", "add_hook_to_module", "pruning of offloaded models", "a public look at offloaded weights",
            mentions="_hf_hook"),
    Surface("bitsandbytes.nn", "Linear4bit", "masks on 4-bit bases", "PEFT reading rearranged weights",
            mentions="support_avx512bf16_for_cpu"),
)
# fmt: on


# --- peft 0.21: methods can only be registered for members of the PeftType enum ---------------------------------------
# Can go when PEFT offers a hook for methods outside its tree (asked for in huggingface/peft#2273).
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
def has_injected_adapters(model: nn.Module) -> bool:
    """Whether a model carries adapters by transformers' own `add_adapter` or `load_adapter`."""
    return getattr(model, "_hf_peft_config_loaded", False)


def forget_injected_adapters(model: nn.Module) -> None:
    """Drop the adapter configs that transformers' `add_adapter` and `load_adapter` keep on a model."""
    if has_injected_adapters(model):
        del model.peft_config
        model._hf_peft_config_loaded = False


# --- transformers 5.23: a loaded model does not say which commit it is of ---------------------------------------------
# Can go when a model or its config says so (`config._commit_hash` did in earlier versions, which drop it when saving too).
def note_source(model: nn.Module, name: str, commit: str | None) -> None:
    """Note where a model was loaded from: a Hub id or folder, and the commit of a repo."""
    model.config.name_or_path = name
    model.config._commit_hash = commit


def loaded_from(model: nn.Module) -> tuple[str | None, str | None]:
    """Hub id or folder that a model was loaded from, and the commit if `note_source` noted it."""
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or None, getattr(config, "_commit_hash", None)


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


def modules_kept_in_float32(model) -> list[str] | set[str] | None:
    """Modules that a model keeps in float32 whatever dtype is asked for, as `get_modules_to_not_convert` takes them."""
    return model._keep_in_fp32_modules


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


# --- accelerate 1.15: no public way to see that a module's weights are offloaded --------------------------------------
# Can go when accelerate offers one.
def hook_of(module: nn.Module):
    """The accelerate hook on a module, `None` if there is none."""
    return getattr(module, "_hf_hook", None)


# --- transformers 5.23: operators that know no DTensors ----------------------------------------------------------------
# Can go when our linear operator has a sharding strategy of its own.
def compute_on_shards(module: nn.Module) -> None:
    """Have tensor parallelism call a module with local tensors, with gradients as without."""
    module._hf_quantized_needs_local_tp = True
