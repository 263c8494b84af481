# SPDX-License-Identifier: Apache-2.0
"""`explain`: which path a linear layer takes, and what it holds in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
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
        why (`str`): what the choice rests on: measured times, or the order that holds without them.
        input_gradient (`str`): the kernel of the gradient of the inputs, `dX = dY W`. (That of the values is the dense
            `dY^T X` at the kept columns.)
    """

    kind: str
    backend: str
    device: str
    dtype: str
    tokens: int
    resident_bytes: int
    why: str = ""
    input_gradient: str = "dense"


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
    if not isinstance(module, SparseLinear24):
        return Explanation(
            type(module).__name__, "dense", str(module.weight.device), _short(module.weight.dtype), tokens, resident
        )
    weight = module.weight24
    call = ops.Call24(weight.device, weight.dtype, weight.kind, weight.out_features, weight.in_features, tokens)
    chosen = ops.choose_kernel(call, dense_at_hand=module._may_keep_dense(weight))
    if chosen is None or (module._kept is not None and module._kept.dense is not None):
        resident += module.in_features * module.out_features * weight.dtype.itemsize
    return Explanation(
        type(module).__name__,
        "dense, unpacked once" if chosen is None else chosen.name,
        str(weight.device),
        _short(weight.dtype),
        tokens,
        resident,
        _why(call),
        ops.choose_kernel(replace(call, product=ops.INPUT_GRADIENT)).name,
    )


def _why(call: ops.Call24) -> str:
    times = ops.measured_times(call)
    if not times:
        return "nothing was measured near this call on this machine: fixed order (nmsparse bench --tune measures)"
    listed = ", ".join(f"{name} {time:.3g} ms" for name, time in sorted(times.items(), key=lambda item: item[1]))
    return f"measured near this call: {listed}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
