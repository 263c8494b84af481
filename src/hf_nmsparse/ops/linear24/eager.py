# SPDX-License-Identifier: Apache-2.0
"""Whether a call may go past the dispatcher of torch, straight to memory."""

from __future__ import annotations

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
