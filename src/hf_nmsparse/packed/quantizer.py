# SPDX-License-Identifier: Apache-2.0
"""The Transformers quantizer of packed models: `from_pretrained`, `save_pretrained`, `dequantize` and training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import load_state_dict

# From .auto and .base: the package itself may be half imported when a lazy import hook brings us here.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from .. import _compat, ops
from ..errors import ConfigError, UnsupportedError
from .checkpoint import check_packed_files, header_of
from .config import QUANT_METHOD, PackedConfig
from .layers import linear_layers, log_dense, replace_modules, unpackable_layers
from .modules import PATTERN, SparseLinear24

logger = logging.getLogger(__name__)


class PackedQuantizer(HfQuantizer):
    """Loads packed checkpoints, prunes dense ones by magnitude while loading, and saves packed models.

    3-D expert weights of mixture models and GPT-2's `Conv1D` are no linear layers and stay dense. With a quantizer
    Transformers ignores `save_pretrained(state_dict=...)`: gather sharded models before saving.
    """

    requires_calibration = False
    # The plan of tensor parallelism for `weight` holds for `weight_idx` too.
    serialized_names = {"weight": ["weight", "weight_idx"]}  # noqa: RUF012 (the base class declares it so)

    quantization_config: PackedConfig

    # --- flags of the method ----------------------------------------------------------------------------------------
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # the kept values train like any parameter, the mask stays

    @property
    def is_compileable(self) -> bool:
        return True

    # --- before loading ---------------------------------------------------------------------------------------------
    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the caller's device map, and again with the resolved one."""
        if self.pre_quantized:
            return
        if self.quantization_config.dequantize:
            raise ConfigError(
                "PackedConfig(dequantize=True) on a dense checkpoint: there is nothing to dequantize; leave it out to prune "
                "while loading, or leave out the quantization_config to load it dense"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "pruning while loading cannot offload to disk: the offloaded file would stay dense. Prune on the CPU, "
                "save_pretrained, then load the packed folder with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        names = self._stored_layers(model, checkpoint_files) if self.pre_quantized else self._layers_to_prune(model)
        if not self.pre_quantized:
            names = self._only_in_checkpoint(model, names, checkpoint_files)
            config.modules_to_not_convert = sorted(linear_layers(model).keys() - set(names))
        if (config.dequantize or not self.pre_quantized) and _is_distributed(model):
            raise UnsupportedError(
                "neither pruning nor dequantizing while loading works with a distributed_config: each process would see a "
                "slice of another shape. Prune or dequantize in one process and save_pretrained first"
            )
        if not config.dequantize:
            replace_modules(model, {name: self._empty_packed(model, name) for name in names})

    def _stored_layers(self, model: PreTrainedModel, files: list[str] | None) -> list[str]:
        """Layers of `model` that the checkpoint holds packed, after its tensors were found sound."""
        if files is None:
            logger.info(
                "no checkpoint files to look into: packed layers are found by modules_to_not_convert, unchecked"
            )
            skipped = self.quantization_config.modules_to_not_convert or []
            unpackable = unpackable_layers(model)
            return [n for n in linear_layers(model) if n not in unpackable and should_convert_module(n, skipped)]
        stored = check_packed_files(files, self.quantization_config.check_digests)
        in_model = _compat.names_in_model(
            model, [f"{name}.{leaf}" for name in stored for leaf in ("weight", "weight_idx")]
        )
        linear = linear_layers(model)
        found = []
        for name in stored:
            target = in_model[f"{name}.weight"].removesuffix(".weight")
            if in_model[f"{name}.weight_idx"] != f"{target}.weight_idx":
                raise UnsupportedError(
                    f"{name}.weight becomes {target}.weight in {type(model).__name__}, but its ids become "
                    f"{in_model[f'{name}.weight_idx']}; load this checkpoint with the model class that it was saved from"
                )
            if (
                target in linear
            ):  # else the model has no such layer, and Transformers reports the tensors as unexpected
                found.append(target)
        return found

    def _layers_to_prune(self, model: PreTrainedModel) -> list[str]:
        wanted = self.get_modules_to_not_convert(
            model,
            self.quantization_config.modules_to_not_convert,
            model._keep_in_fp32_modules,
            add_default_skips=True,
        )
        unpackable = unpackable_layers(model)
        names = [name for name in linear_layers(model) if should_convert_module(name, wanted)]
        log_dense({name: unpackable[name] for name in names if name in unpackable}, "dense, unpruned")
        return [name for name in names if name not in unpackable]

    def _only_in_checkpoint(self, model: PreTrainedModel, names: list[str], files: list[str] | None) -> list[str]:
        """Leave out layers that the checkpoint does not hold (a new head): a random weight is not worth pruning."""
        if files is None:
            raise UnsupportedError(
                "pruning while loading reads checkpoint files; load from a folder or repo, or build the dense model and "
                "mask it, then call compress"
            )
        stored = {name for path in files for name in load_state_dict(path, map_location="meta")}
        in_model = set(_compat.names_in_model(model, stored).values())
        missing = [name for name in names if f"{name}.weight" not in in_model]
        log_dense(dict.fromkeys(missing, "not in the checkpoint"), "dense, newly initialised")
        return [name for name in names if name not in missing]

    def _empty_packed(self, model: PreTrainedModel, name: str) -> SparseLinear24:
        linear = model.get_submodule(name)
        return SparseLinear24(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            memory=self.quantization_config.memory,
        )

    # --- while loading ----------------------------------------------------------------------------------------------
    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, SparseLinear24) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return PruneAndPack()

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """The model's own converters stay as they are: what they fuse (experts) is never packed."""
        return weight_conversions + self.get_weight_conversions()

    # --- after loading ----------------------------------------------------------------------------------------------
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            _compat.forget_conversions(model, Unpack)  # the model is a plain dense one now
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        # Transformers passes config.dtype when the caller names none; layers kept in float32 must then stay so.
        wanted = None if dtype == model.config.dtype else dtype
        return unpack_layers(model, wanted)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Format version and digests, for the header of each safetensors file."""
        if getattr(model, "_hf_peft_config_loaded", False):  # save_pretrained writes the adapter alone
            return None, {}
        state = model.state_dict()
        names = [f"{name}.{leaf}" for name, _ in packed_layers(model) for leaf in ("weight", "weight_idx")]
        on_disk = _compat.names_on_disk(model, names)
        header: dict[str, str] = {}
        for name in names:
            tensor = _compat.whole_tensor(model, name, state[name])
            # Under both names: save_original_format=False and offloaded models may keep those of the model.
            header.update(header_of({name: tensor}))
            if on_disk[name] not in (None, name):
                header.update(header_of({on_disk[name]: tensor}))
        return None, header


class PruneAndPack(ConversionOps):
    """Dense weight -> values and ids of its magnitude 2:4 mask. Sees the weight in the dtype of the model."""

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel, **kwargs: Any) -> dict[str, torch.Tensor]:
        converted = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            if isinstance(get_module_from_name(model, name)[0], SparseLinear24):
                mask = ops.top_n_mask(weight.abs(), PATTERN)
                converted[name], converted[f"{name}_idx"] = ops.pack_24(weight, mask)
            else:
                converted[name] = weight
        return converted


class Unpack(ConversionOps):
    """Values and ids -> dense weight; every tensor called `weight` passes here, most without ids."""

    # It does not keep the quantizer: an operation that has one gets its floats uncast, and would miss keep_in_fp32.
    def __init__(self, quantizer: PackedQuantizer) -> None:
        pass

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        (weight,) = input_dict["weight"]
        if "weight_idx" in input_dict:
            weight = ops.unpack_24(weight, input_dict["weight_idx"][0])
        return {full_layer_name: weight}


def packed_layers(model: nn.Module) -> list[tuple[str, SparseLinear24]]:
    """Packed layers of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear24)]


def unpack_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Swap every packed layer for a plain linear one, in place."""
    replace_modules(model, {name: layer.to_linear(dtype) for name, layer in packed_layers(model)})
    return model


def _is_distributed(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distributed_config", None) is not None


def register() -> None:
    """Make `from_pretrained` know packed models, in this process. Idempotent."""
    if not _compat.is_registered_quantization(QUANT_METHOD, PackedConfig):
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(PackedQuantizer)
    _compat.allow_loading_attributes(PackedConfig)
