# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from ..parameter import ModelWeightParameter
from .quantization.base_config import QuantizeMethodBase

WEIGHT_LOADER_V2_SUPPORTED = ["UnquantizedLinearMethod"]


def register_weight_loader_v2_supported_method(cls):
    WEIGHT_LOADER_V2_SUPPORTED.append(cls.__name__)
    return cls


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, inputs, output_sizes, input_size, output_size, params_dtype, weight_loader):
        data = torch.empty(sum(output_sizes), inputs, dtype=params_dtype)
        layer.weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """Its weights are loaded by their rows, part by part where several layers are fused."""

    def __init__(self, input_size, output_sizes, bias, params_dtype, quant_config, prefix):
        super().__init__()
        self.parts = output_sizes
        self.quant_method = quant_config.get_quant_method(self, prefix)
        if type(self.quant_method).__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
            raise NotImplementedError("only methods that are registered for loaders of version 2 are imitated")
        sizes = list(output_sizes.values())
        rows = sum(sizes)
        self.quant_method.create_weights(
            self, input_size, sizes, input_size, rows, params_dtype, weight_loader=self._load
        )
        self.bias = nn.Parameter(torch.zeros(rows, dtype=params_dtype)) if bias else None
        if bias:
            self.bias.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)

    def _load(self, parameter, loaded, part=None):
        first = 0
        for name, rows in self.parts.items():
            if name == part:
                parameter.data[first : first + rows].copy_(loaded)
            first += rows

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class QKVParallelLinear(LinearBase):
    def __init__(self, hidden, head, heads, kv_heads, bias, params_dtype, quant_config, prefix):
        parts = {"q": head * heads, "k": head * kv_heads, "v": head * kv_heads}
        super().__init__(hidden, parts, bias, params_dtype, quant_config, prefix)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias, params_dtype, quant_config, prefix):
        super().__init__(input_size, {None: output_size}, bias, params_dtype, quant_config, prefix)
