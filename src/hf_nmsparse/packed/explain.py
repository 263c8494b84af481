# SPDX-License-Identifier: Apache-2.0
"""`explain`: which path a linear layer takes, and what it holds in memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import UnsupportedError
from .modules import SparseLinear24


@dataclass(frozen=True)
class Explanation:
    """How a layer computes a call.

    Args:
        kind (`str`): class of the layer.
        backend (`str`): "dense, unpacked once", or the name of a kernel, for example "C++" or "unpacked each call".
        device (`str`), dtype (`str`): of the weight.
        tokens (`int`): rows of input that were asked about.
        resident_bytes (`int`): what the layer holds in memory once such a call has run.
    """

    kind: str
    backend: str
    device: str
    dtype: str
    tokens: int
    resident_bytes: int


def explain(module: nn.Module, tokens: int = 1) -> Explanation:
    """Which path an eager call of `module` on `tokens` rows of input takes, under the present gradient mode.

    Args:
        module (`nn.Module`): a `SparseLinear24`, or a plain `nn.Linear` or `Conv1D`.
        tokens (`int`, defaults to 1): product of the leading dimensions of the input.

    Raises:
        UnsupportedError: for another kind of module.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UnsupportedError(f"explain takes a linear layer, got {type(module).__name__}; pass one of its layers")
    resident = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    backend = "dense"
    if isinstance(module, SparseLinear24):
        weight = module.weight24
        call = ops.Call24(
            module.weight.device, weight.dtype, weight.kind, module.out_features, module.in_features, tokens
        )
        chosen = ops.choose_kernel(call, dense_at_hand=module._may_keep_dense(weight))
        backend = "dense, unpacked once" if chosen is None else chosen.name
        kept = module._kept is not None and module._kept.dense is not None  # by an earlier call on more tokens
        if chosen is None or kept:
            resident += module.in_features * module.out_features * weight.dtype.itemsize
    weight = module.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    return Explanation(type(module).__name__, backend, str(weight.device), dtype, tokens, resident)
