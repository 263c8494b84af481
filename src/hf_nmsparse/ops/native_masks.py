# SPDX-License-Identifier: Apache-2.0
"""The masked weight in C++ on the CPU: `native/masks.cpp`, which reads and writes each number once."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from ..pattern import NMPattern
from .eager import is_plain_eager
from .native_build import native_library
from .philox import NoiseKey
from .sampler import SamplingState

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LOGIT_TYPES = (torch.float32, torch.bfloat16)
_MOST_CANDIDATES = 28  # of native/masks.cpp
_WORD = 0xFFFFFFFF


class _Masks(ctypes.Structure):
    """`Masks` of native/masks.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "weight", "grad", "result", "grad_logits", "grad_weight")),
        ("candidates", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "in_features")),
        *((name, ctypes.c_int) for name in ("n", "m", "num_candidates", "elementwise", "weight_type", "logit_type")),
        *((name, ctypes.c_float) for name in ("slope", "inverse_temperature", "reward")),
        *((name, ctypes.c_uint32) for name in ("seed", "layer", "step", "draw")),
        ("threads", ctypes.c_int),
    )


def takes(weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern) -> bool:
    """Whether the C++ kernel computes the masked weight of these."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _TYPES
        and logits.dtype in _LOGIT_TYPES
        and (logits.dim() == 2 or pattern.num_candidates <= _MOST_CANDIDATES)
        and weight.numel() > 0
        and is_plain_eager(weight, logits)
        and native_library() is not None
    )


def masked_weight(
    weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern, key: NoiseKey, state: SamplingState
) -> torch.Tensor:
    """`W * M`, as `mask_sampling.masked_weight` has it, of tensors that `takes` accepts."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _run(weight, logits, pattern, key, state, result=result)
    return result


def gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    state: SamplingState,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the weight and of the logits, where `wanted`, from that of `W * M`."""
    grad_weight, grad_logits = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
        for tensor, want in zip((weight, logits), wanted, strict=True)
    )
    made = {"grad_weight": grad_weight, "grad_logits": grad_logits}
    _run(weight, logits, pattern, key, state, grad=grad.contiguous(), **made)
    return grad_weight, grad_logits


@lru_cache(maxsize=16)
def _candidates(pattern: NMPattern) -> torch.Tensor:
    return pattern.candidates("cpu", torch.uint8).contiguous()


def _run(
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    state: SamplingState,
    **others: torch.Tensor | None,
) -> None:
    temperature, scale, reward = (float(value) for value in state.tensors()[:3])
    tensors = {"weight": weight.contiguous(), "logits": logits.contiguous(), **others}
    if pattern.num_candidates <= _MOST_CANDIDATES:
        tensors["candidates"] = _candidates(pattern)
    masks = _Masks(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        rows=weight.shape[0],
        in_features=weight.shape[1],
        n=pattern.n,
        m=pattern.m,
        num_candidates=pattern.num_candidates,
        elementwise=logits.dim() == 2,
        weight_type=_TYPES[weight.dtype],
        logit_type=_TYPES[logits.dtype],
        slope=scale / temperature,
        inverse_temperature=1 / temperature,
        reward=2 * reward,
        seed=key.seed,
        layer=key.layer,
        step=int(state.step) & _WORD,
        draw=int(state.draw) & _WORD,
        threads=torch.get_num_threads(),
    )
    native_library().nmsparse_masked_weight(ctypes.byref(masks))
