# SPDX-License-Identifier: Apache-2.0
"""The Transformers quantizer of packed models: `from_pretrained`, `save_pretrained`, `dequantize` and training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
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

from .. import _compat
from ..errors import ConfigError, UnsupportedError
from .branch import common_slorb_block, rank_of, slorb_block_of
from .checkpoint import SLORB_KEY, StoredLayer, check_packed_files, check_slorb_block, check_values, header_of
from .config import QUANT_METHOD, PackedConfig
from .conversions import MaskAndPack, PruneAndPack, Unpack
from .layers import (
    TIED,
    expert_rows,
    is_linear,
    linear_layers,
    log_dense,
    replace_modules,
    rows_of_weights,
    set_expert_rows,
    unpackable_layers,
)
from .modules import SparseLinear24
from .stored_mask import MaskOnLoad, MaskReader, check_fits, read_stored_mask, set_mask_reader
from .tensor_parallel import prepare_tensor_parallel
from .weights import PACKED_LEAVES, SCALE_LEAVES

logger = logging.getLogger(__name__)


class PackedQuantizer(HfQuantizer):
    """Loads packed checkpoints, packs dense ones while loading (by a published mask or by magnitude), and saves.

    Fused expert weights of mixture models are not packed: they stay dense, with zeros where a mask covers them. With a quantizer Transformers ignores
    `save_pretrained(state_dict=...)`: gather sharded models before saving.
    """

    requires_calibration = False
    # The plan of tensor parallelism for `weight` holds for `weight_idx` too; with scales or side branches there is none.
    serialized_names = {"weight": list(PACKED_LEAVES)}  # noqa: RUF012 (so in the base class)

    quantization_config: PackedConfig
    _mask: MaskOnLoad | None = None

    # --- flags of the method ----------------------------------------------------------------------------------------
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # dense values train like any parameter, the mask stays

    @property
    def is_compileable(self) -> bool:
        return True

    # --- before loading ---------------------------------------------------------------------------------------------
    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the caller's device map, and again with the resolved one."""
        config = self.quantization_config
        if self.pre_quantized:
            if config.mask is not None:
                raise ConfigError(
                    f"PackedConfig(mask={config.mask!r}) on a packed checkpoint: its mask is part of it. Load it without "
                    "mask, or load the dense base of the mask"
                )
            return
        if config.dequantize:
            raise ConfigError(
                "PackedConfig(dequantize=True) on a dense checkpoint: there is nothing to dequantize; leave it out to prune "
                "while loading, or leave out the quantization_config to load it dense"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "pruning while loading cannot offload to disk: the offloaded file would stay dense. Prune on the CPU, "
                "save_pretrained, then load the packed folder with this device_map"
            )
        if config.mask is not None and self._mask is None:  # here: before weights are fetched for nothing
            self._mask = MaskOnLoad(read_stored_mask(config.mask, config.revision, config.task))

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            config.slorb_block = None  # the branches that come with a mask say it
        if (config.dequantize or not self.pre_quantized) and _is_distributed(model):
            raise UnsupportedError(
                "neither pruning nor dequantizing while loading works with a distributed_config: each process would see a "
                "slice of another shape. Prune or dequantize in one process and save_pretrained first"
            )
        if config.values != "dense" and _is_distributed(model):
            raise UnsupportedError(
                f"values={config.values!r} with a distributed_config: no plan of tensor parallelism shards their scales. Load "
                "without it, or load with PackedConfig(dequantize=True) in one process and save the dense model"
            )
        if self.pre_quantized:
            packed = self._stored_layers(model, checkpoint_files)
        elif self._mask is not None:
            packed = self._layers_of_mask(model)
        else:
            packed = self._layers_to_prune(model, checkpoint_files)
        if not self.pre_quantized:
            config.modules_to_not_convert = sorted(linear_layers(model).keys() - packed.keys())
        if not config.dequantize:
            prepare_tensor_parallel(model, packed)
            replace_modules(model, packed)

    def _stored_layers(self, model: PreTrainedModel, files: list[str] | None) -> dict[str, SparseLinear24]:
        """Empty layers for what the checkpoint holds packed, after its tensors were found sound."""
        if files is None:
            return self._listed_layers(model)
        config = self.quantization_config
        stored = check_packed_files(files, config.check_digests)
        check_slorb_block(stored, config.slorb_block)
        check_values(stored, config.values)
        linear = linear_layers(model)
        targets = _targets(model, stored)
        # A layer that the model lacks is reported by Transformers, as unexpected tensors.
        found = {target: stored[name] for name, target in targets.items() if target in linear}
        branches = [name for name, layer in found.items() if layer.has_branch]
        if branches and _is_distributed(model):
            raise UnsupportedError(
                f"{branches[0]} and {len(branches) - 1} more layers carry a side branch, whose factors no plan of tensor "
                "parallelism shards. Load without distributed_config, or load with PackedConfig(dequantize=True) in one "
                "process and save the dense model"
            )
        if config.dequantize:
            _warn_of_dense(len(branches))
        blocks = {name: config.slorb_block if layer.slorb_width else None for name, layer in found.items()}
        return {
            name: self._empty(
                linear[name], slorb_block=blocks[name], low_rank=layer.low_rank, input_scale=layer.has_input_scale
            )
            for name, layer in found.items()
        }

    def _listed_layers(self, model: PreTrainedModel) -> dict[str, SparseLinear24]:
        """Without files to look into (accelerate's own loading) only the config can say what is packed."""
        config = self.quantization_config
        if config.slorb_block is not None:
            raise UnsupportedError(
                "the config says that layers have SLoRB terms, and only the checkpoint files say which; load the model with "
                "from_pretrained"
            )
        if config.values != "dense":
            raise UnsupportedError(
                f"the config says values={config.values!r}, and only the checkpoint files say which layers have input "
                "scales; load the model with from_pretrained"
            )
        logger.info(
            "no checkpoint files to look into: packed layers are found by modules_to_not_convert, unchecked and without "
            "low-rank terms"
        )
        skipped, unpackable = config.modules_to_not_convert or [], unpackable_layers(model)
        return {
            name: self._empty(layer)
            for name, layer in linear_layers(model).items()
            if name not in unpackable and should_convert_module(name, skipped)
        }

    def _layers_of_mask(self, model: PreTrainedModel) -> dict[str, SparseLinear24]:
        """Empty layers for those of the mask that can be packed; the others are noted, to become dense with zeros."""
        linear, mask = linear_layers(model), self._mask.mask
        check_fits(mask, rows_of_weights(model))
        self._mask.experts = [name for name in mask.layers if name not in linear]
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for name in mask.layers:
            if f"{name}.weight" in tied:
                raise UnsupportedError(f"{mask.source}: {name}: {TIED}, which the mask would prune too")
        unpackable = unpackable_layers(model)
        self._mask.dense = {name: unpackable[name] for name in mask.layers if name in unpackable}
        folded = {name for name in self._mask.dense if mask.layers[name].branch is not None}
        log_dense(self._mask.dense | dict.fromkeys(self._mask.experts, "fused experts"), "dense with zeros", folded)
        left = {*unpackable, *self._mask.experts}
        branches = {name: layer.branch for name, layer in mask.layers.items() if name not in left}
        self.quantization_config.slorb_block = common_slorb_block(map(slorb_block_of, branches.values()))
        return {
            name: self._empty(linear[name], slorb_block=slorb_block_of(branch), low_rank=rank_of(branch))
            for name, branch in branches.items()
        }

    def _layers_to_prune(self, model: PreTrainedModel, files: list[str] | None) -> dict[str, SparseLinear24]:
        wanted = self.get_modules_to_not_convert(
            model,
            self.quantization_config.modules_to_not_convert,
            _compat.modules_kept_in_float32(model),
            add_default_skips=True,
        )
        linear, unpackable = linear_layers(model), unpackable_layers(model)
        names = [name for name in linear if should_convert_module(name, wanted)]
        log_dense({name: unpackable[name] for name in names if name in unpackable}, "dense, unpruned")
        names = [name for name in names if name not in unpackable]
        if files is None:
            raise UnsupportedError(
                "pruning while loading reads checkpoint files; load from a folder or repo, or build the dense model and "
                "mask it, then call compress"
            )
        # A layer that the checkpoint lacks is a new head: a random weight is not worth pruning.
        stored = {name for path in files for name in load_state_dict(path, map_location="meta")}
        in_model = set(_compat.names_in_model(model, stored).values())
        missing = [name for name in names if f"{name}.weight" not in in_model]
        log_dense(dict.fromkeys(missing, "not in the checkpoint"), "dense, newly initialised")
        return {name: self._empty(linear[name]) for name in names if name not in missing}

    def _empty(self, linear: nn.Module, **parts: Any) -> SparseLinear24:
        """An empty layer; `parts` as for `SparseLinear24.empty_like`."""
        config, device = self.quantization_config, linear.weight.device
        layer = SparseLinear24.empty_like(linear, config.memory, device, values=config.values, **parts)
        if not layer.weight.is_floating_point():
            _compat.keep_from_initialising(layer.weight)
        return layer

    # --- while loading ----------------------------------------------------------------------------------------------
    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        module, leaf = get_module_from_name(model, param_name)
        if leaf != "weight":
            return False
        # Dense layers under a mask may come out of a fused tensor, of which only the first part is asked about.
        masked_dense = self._mask is not None and bool(self._mask.dense)
        return isinstance(module, SparseLinear24) or (masked_dense and is_linear(module))

    def get_quantize_ops(self) -> ConversionOps:
        return PruneAndPack() if self._mask is None else MaskAndPack(self._mask)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """The model's own converters stay as they are: what they fuse (experts) is never packed."""
        return weight_conversions + self.get_weight_conversions()

    # --- after loading ----------------------------------------------------------------------------------------------
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._mask is not None:
            mask, self._mask = self._mask, None  # the codes of a whole model are not worth keeping
            for name in mask.experts:
                rows, keep = mask.weight_and_mask(name, expert_rows(model, name))
                set_expert_rows(model, name, rows.masked_fill(~keep, 0))
            mask.settle(self.quantization_config.allow_base_mismatch)
        for _, layer in packed_layers(model):
            for leaf in SCALE_LEAVES:  # the loader lets every float train
                if (scale := getattr(layer, leaf)) is not None:
                    scale.requires_grad_(False)
        if self.quantization_config.dequantize:
            _compat.forget_conversions(model, Unpack)  # the model is a plain dense one now
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        # Transformers passes config.dtype when the caller names none; layers kept in float32 must then stay so.
        wanted = None if dtype == model.config.dtype else dtype
        return unpack_layers(model, wanted)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Format version and digests, for the header of each safetensors file."""
        if _compat.has_injected_adapters(model):  # save_pretrained writes the adapter alone
            return None, {}
        state = model.state_dict()
        names = [name for layer, _ in packed_layers(model) for name in _packed_names(layer, state)]
        on_disk = _compat.names_on_disk(model, names)
        header: dict[str, str] = {}
        for name in names:
            tensor = _compat.whole_tensor(model, name, state[name])
            # Under both names: save_original_format=False and offloaded models may keep those of the model.
            places = {name, on_disk[name]} - {None}
            header.update(header_of(dict.fromkeys(places, tensor), self.quantization_config.values))
        if self.quantization_config.slorb_block is not None:
            header[SLORB_KEY] = str(self.quantization_config.slorb_block)
        return None, header


def packed_layers(model: nn.Module) -> list[tuple[str, SparseLinear24]]:
    """Packed layers of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear24)]


def unpack_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Swap every packed layer for a plain linear one, in place."""
    layers = packed_layers(model)
    _warn_of_dense(sum(layer.branch is not None for _, layer in layers))
    replace_modules(model, {name: layer.to_linear(dtype) for name, layer in layers})
    return model


def _warn_of_dense(count: int) -> None:
    if count:
        logger.warning("%d layers carried a side branch: their weights are dense now", count)


def _packed_names(layer: str, state: Iterable[str]) -> list[str]:
    """Names of the packed tensors of a layer, of those in a state dict."""
    names = [f"{layer}.{leaf}" for leaf in PACKED_LEAVES]
    return [name for name in names if name in state]


def _targets(model: PreTrainedModel, stored: dict[str, StoredLayer]) -> dict[str, str]:
    """Names of stored layers in the model.

    Raises:
        UnsupportedError: if the tensors of a layer would not stay together.
    """
    in_model = _compat.names_in_model(model, [f"{n}.{leaf}" for n, layer in stored.items() for leaf in layer.leaves])
    targets = {}
    for name, layer in stored.items():
        target = in_model[f"{name}.weight"].removesuffix(".weight")
        for leaf in layer.leaves:
            if in_model[f"{name}.{leaf}"] != f"{target}.{leaf}":
                raise UnsupportedError(
                    f"{name}.weight becomes {target}.weight in {type(model).__name__}, but {leaf} becomes "
                    f"{in_model[f'{name}.{leaf}']}; load this checkpoint with the model class that it was saved from"
                )
        targets[name] = target
    return targets


def _is_distributed(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distributed_config", None) is not None


def register(mask_reader: MaskReader | None = None) -> None:
    """Make `from_pretrained` know packed models, in this process. Idempotent.

    Args:
        mask_reader (`Callable`, *optional*): how `PackedConfig(mask=...)` reads masks, see `set_mask_reader`.
    """
    if mask_reader is not None:
        set_mask_reader(mask_reader)
    if not _compat.is_registered_quantization(QUANT_METHOD, PackedConfig):
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(PackedQuantizer)
    _compat.allow_loading_attributes(PackedConfig)
