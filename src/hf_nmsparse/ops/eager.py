# SPDX-License-Identifier: Apache-2.0
"""What the dispatcher of torch would do to a call, asked in Python: most calls may go past it, straight to memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors are what they seem, and nothing watches what is done to them.

    False for subclasses (fake, distributed, quantised ones), while compiling or tracing, inside transforms (`vmap`, `jvp`),
    and under dispatch modes: all of these must see an operator, and some have no memory to read.
    """
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    if not torch._C._is_any_autocast_enabled():  # nearly always; the rest costs several times as much
        return False
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """Switches autocast off for the device of `tensor`, where it is on."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast, if it is on, does to an operand of a linear layer: float64 and integers are left alone."""
    if not is_autocast(tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
