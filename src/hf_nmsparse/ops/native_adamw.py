# SPDX-License-Identifier: Apache-2.0
"""A step of `MaskAdamW` in C++ on the CPU: `native/adamw.cpp`, which reads and writes each number once."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from .eager import is_plain_eager
from .native_build import native_library
from .philox import NoiseKey

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTERS = ("values", "grad", "mean", "root", "mean_scale", "root_scale")


class _AdamW(ctypes.Structure):
    """`AdamW` of native/adamw.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("count", ctypes.c_int64),
        ("type", ctypes.c_int),
        *(
            (name, ctypes.c_float)
            for name in ("decay", "mean_weight", "root_weight", "root_factor", "rate", "epsilon")
        ),
        *((name, ctypes.c_uint32) for name in ("seed", "layer", "step")),
        ("threads", ctypes.c_int),
    )


def takes(values: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> bool:
    """Whether the C++ kernel updates these; `state` is that of `MaskAdamW`."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return (
        values.device.type == "cpu"
        and values.dtype in _TYPES
        and grad.dtype == values.dtype
        and values.is_contiguous()
        and values.numel() > 0
        and grad.layout == torch.strided
        and all(tensor.device == values.device and tensor.is_contiguous() for tensor in tensors)
        and is_plain_eager(values, grad)
        and native_library() is not None
    )


def update(
    values: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: NoiseKey,
) -> None:
    """One step on a parameter that `takes` accepts; `state` is that of `MaskAdamW`, its step already counted."""
    step, (beta_1, beta_2) = state["step"], betas
    tensors = {"values": values, "grad": grad.contiguous(), **{name: state.get(name) for name in _POINTERS[2:]}}
    adamw = _AdamW(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        count=values.numel(),
        type=_TYPES[values.dtype],
        decay=1 - lr * weight_decay,
        mean_weight=1 - beta_1,
        root_weight=1 - beta_2,
        root_factor=(1 - beta_2**step) ** -0.5,
        rate=lr / (1 - beta_1**step),
        epsilon=eps,
        seed=key.seed,
        layer=key.layer,
        step=step,
        threads=torch.get_num_threads(),
    )
    native_library().nmsparse_adamw(ctypes.byref(adamw))
    torch.autograd.graph.increment_version(values)  # written to behind the back of autograd
