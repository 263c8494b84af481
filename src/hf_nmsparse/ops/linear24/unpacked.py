# SPDX-License-Identifier: Apache-2.0
"""The kernel that is always right: unpack the weight, then the dense product of torch. The oracle of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .call import FORWARD, INPUT_GRADIENT
from .dispatch import Kernel24
from .weight import Weight24


def _forward(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.dense().to(x.dtype), bias)


def _input_gradient(grad: torch.Tensor, weight: Weight24, bias: None = None) -> torch.Tensor:
    return grad @ weight.dense().to(grad.dtype)


NAME = "unpacked each call"
UNPACKED = Kernel24(NAME, lambda call: call.product == FORWARD, _forward, prefers=lambda call: False, unpacks=True)
UNPACKED_INPUT_GRADIENT = Kernel24(
    NAME, lambda call: call.product == INPUT_GRADIENT, _input_gradient, prefers=lambda call: False, unpacks=True
)
