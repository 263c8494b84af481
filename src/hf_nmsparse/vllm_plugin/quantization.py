# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of a quantization method, for packed models: their config, and the linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..errors import FormatError, UnsupportedError
from ..packed.config import QUANT_METHOD, PackedConfig

_AS_DENSE = "write it dense with zeros (nmsparse export MODEL --format dense --output DIR) and serve that"
_NOT_LOADED = 0xFF  # as ids: column 3 twice in each group, which no packed weight has


class VLLMPackedConfig(QuantizationConfig):
    """The `quantization_config` of a packed model.

    Args:
        dense_layers (`list[str]`): full names of the linear layers that are not packed, by the names of the checkpoint.
    """

    def __init__(self, dense_layers: list[str]) -> None:
        super().__init__()
        self.dense_layers = dense_layers

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; below sm_80 no kernel of ours runs, and the weight is unpacked for each call."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it lies in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMPackedConfig:
        """Of what config.json holds.

        Raises:
            FormatError, ConfigError: as `PackedConfig`.
            UnsupportedError: for quantised values, and SLoRB terms beside the mask.
        """
        stored = PackedConfig(**config)
        if stored.values != "dense":
            raise UnsupportedError(f"packed models with {stored.values} values are not served by vLLM; {_AS_DENSE}")
        if stored.slorb_block is not None:
            raise UnsupportedError(f"packed models with SLoRB terms are not served by vLLM; {_AS_DENSE}")
        return cls(list(stored.modules_to_not_convert or []))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """From names of the checkpoint to those of vLLM's model."""
        self.dense_layers = hf_to_vllm_mapper.apply_list(self.dense_layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear layer; `None` for all others, which vLLM computes as ever.

        Raises:
            UnsupportedError: if vLLM fuses packed layers with dense ones.
        """
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(name, [name])]
        dense = [part for part in parts if part in self.dense_layers]
        if dense and len(dense) < len(parts):
            raise UnsupportedError(
                f"{prefix}: vLLM computes {', '.join(parts)} as one, of which only {', '.join(dense)} stay dense; {_AS_DENSE}"
            )
        return UnquantizedLinearMethod() if dense else PackedLinearMethod(prefix)


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """`y = x W^T + b` with W packed 2:4, by the kernel that is chosen for each call as in `SparseLinear24`.

    Rows and, in whole groups of eight inputs, columns of packed tensors can be sharded like those of dense ones.

    Args:
        prefix (`str`): name of the layer, for errors.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `weight` `[out, in/2]` and `weight_idx` uint8 `[out, in/8]`.

        Raises:
            UnsupportedError: if the inputs of a rank are no multiple of 8.
        """
        if input_size_per_partition % 8:
            raise UnsupportedError(
                f"{self.prefix}: {input_size_per_partition} inputs a rank (of {input_size}) are no multiple of 8; use fewer ranks of "
                f"tensor parallelism, or {_AS_DENSE}"
            )
        rows = sum(output_partition_sizes)
        loader = extra_weight_attrs.pop("weight_loader")
        tensors = {
            "weight": torch.empty(rows, input_size_per_partition // 2, dtype=params_dtype),
            "weight_idx": torch.full((rows, input_size_per_partition // 8), _NOT_LOADED, dtype=torch.uint8),
        }
        for name, tensor in tensors.items():
            parameter = ModelWeightParameter(data=tensor, input_dim=1, output_dim=0, weight_loader=loader)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that ids were loaded, and leave plain parameters, as the kernels take them.

        Raises:
            FormatError: if the checkpoint holds no ids for all of the layer, or some that no packed weight has.
        """
        ids = layer.weight_idx.data
        first, second = ids & 0b0011_0011, (ids >> 2) & 0b0011_0011
        ascending = ((first & 0b11) < (second & 0b11)) & ((first >> 4) < (second >> 4))
        if not bool(ascending.all()):
            raise FormatError(
                f"{self.prefix}: {int((~ascending).sum())} of {ids.numel()} bytes of column ids are missing in the checkpoint or "
                "damaged; fetch the model again"
            )
        for name in ("weight", "weight_idx"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).data, requires_grad=False))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[..., in]` -> `[..., out]`."""
        return ops.linear_24(x, ops.Weight24(layer.weight, layer.weight_idx), bias)
