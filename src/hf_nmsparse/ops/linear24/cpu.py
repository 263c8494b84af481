# SPDX-License-Identifier: Apache-2.0
"""The kernels for the CPU: products with the packed weight in C++, and unpacking in C++."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from ..eager import is_plain_eager
from ..native_build import native_library
from .call import FORWARD, INPUT_GRADIENT, Call24
from .dispatch import Kernel24
from .unpacked import dense_weight
from .weight import VALUE_KINDS, Weight24

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {kind: number for number, kind in enumerate(VALUE_KINDS)}


def _accepts(call: Call24) -> bool:
    return call.device.type == "cpu" and call.dtype in _TYPES and native_library() is not None


def _has_tiles(call: Call24) -> bool:
    return call.dtype == torch.bfloat16 and native_library().nmsparse_instructions() == b"amx"


def _accepts_product(call: Call24) -> bool:
    # Without tiles each token costs as much as the first, and unpacking wins soon.
    return call.product == FORWARD and _accepts(call) and (call.tokens <= 32 or _has_tiles(call))


def _prefers(call: Call24) -> bool:
    """Whether the packed product is taken to beat the dense one: measured on one kind of processor (docs/KERNELS.md)."""
    return call.tokens <= (512 if _has_tiles(call) else 4 if call.dtype == torch.float32 else 2)


class _Prepared(ctypes.Structure):
    """`Weight` of native/linear24.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "ids", "scale", "input_scale")),
        *((name, ctypes.c_int64) for name in ("out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("type", "kind")),
    )


def _prepare(weight: Weight24) -> tuple[_Prepared, object, tuple[torch.Tensor | None, ...]]:
    """The weight for C++, a pointer to it, and the tensors that must outlive the call."""
    memo = weight.memo
    if memo is not None and memo.prepared is not None:
        return memo.prepared
    tensors = tuple(None if tensor is None else tensor.contiguous() for tensor in weight.tensors)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (weight.out_features, weight.in_features, _TYPES[weight.dtype], _KINDS[weight.kind])
    prepared = _Prepared(*addresses, *sizes)
    copies = tuple(made for made, given in zip(tensors, weight.tensors, strict=True) if made is not given)
    result = (prepared, ctypes.byref(prepared), copies)
    if memo is not None and not copies:  # a memo keeps no tensor alive
        memo.prepared = result
    return result


def _linear(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    prepared, pointer, _copies = _prepare(weight)
    out_features = prepared.out_features
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    if bias is not None:
        bias = bias.contiguous()
    failed = native_library().nmsparse_linear24(
        pointer,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.numel() // out_features,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"linear_24: no memory for x of shape {list(x.shape)}")
    return y


def unpack_on_cpu(weight: Weight24) -> torch.Tensor:
    """`weight.dense()` by the C++ kernel, in the dtype of the weight."""
    _prepared, pointer, _copies = _prepare(weight)
    dense = weight.ids.new_empty(weight.out_features, weight.in_features, dtype=weight.dtype)
    native_library().nmsparse_unpack24(pointer, dense.data_ptr(), torch.get_num_threads())
    return dense


@torch.no_grad()
def unpack_weight(weight: Weight24) -> torch.Tensor:
    """`weight.dense()` without gradients, by a kernel where one can be had."""
    in_reach = weight.device.type == "cpu" and weight.dtype in _TYPES and is_plain_eager(*weight.tensors)
    return unpack_on_cpu(weight) if in_reach and native_library() is not None else dense_weight(weight)


def _linear_unpacked(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, unpack_on_cpu(weight), bias)


def _input_gradient_unpacked(grad: torch.Tensor, weight: Weight24, bias: None = None) -> torch.Tensor:
    return grad @ unpack_on_cpu(weight)


def _accepts_gradient(call: Call24) -> bool:
    return call.product == INPUT_GRADIENT and _accepts(call)


def _accepts_forward(call: Call24) -> bool:
    return call.product == FORWARD and _accepts(call)


NATIVE = Kernel24("C++", _accepts_product, _linear, _prefers)
_UNPACKED = "unpacked each call in C++"
NATIVE_UNPACKED = Kernel24(_UNPACKED, _accepts_forward, _linear_unpacked, prefers=lambda call: False, unpacks=True)
NATIVE_UNPACKED_INPUT_GRADIENT = Kernel24(
    _UNPACKED, _accepts_gradient, _input_gradient_unpacked, prefers=lambda call: False, unpacks=True
)
