# SPDX-License-Identifier: Apache-2.0
"""The kernel that is always right: unpack the weight, then the dense product of torch. The oracle of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .call import FORWARD, INPUT_GRADIENT
from .dispatch import Kernel24
from .weight import Weight24


def dense_weight(weight: Weight24) -> torch.Tensor:
    """`weight.dense()`, by a kernel where a GPU has one."""
    if weight.device.type != "cuda" or weight.kind != "dense":
        return weight.dense()
    from ..packing import unpack_24  # which needs this room

    return unpack_24(weight.values, weight.ids)


def _forward(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, dense_weight(weight).to(x.dtype), bias)


def _input_gradient(grad: torch.Tensor, weight: Weight24, bias: None = None) -> torch.Tensor:
    return grad @ dense_weight(weight).to(grad.dtype)


NAME = "unpacked each call"
UNPACKED = Kernel24(NAME, lambda call: call.product == FORWARD, _forward, prefers=lambda call: False, unpacks=True)
UNPACKED_INPUT_GRADIENT = Kernel24(
    NAME, lambda call: call.product == INPUT_GRADIENT, _input_gradient, prefers=lambda call: False, unpacks=True
)
