# SPDX-License-Identifier: Apache-2.0
"""Run a plain Triton kernel on the CPU by Triton's own interpreter, with three of its gaps closed.

Its `tl.dot` multiplies the bit patterns of bfloat16 as integers, its conversion of integers to bfloat16 leaves them as bit
patterns, and its loads and stores touch whatever memory they are pointed at. Set TRITON_INTERPRET=1 before Triton is
imported; such a process cannot compile.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_memory: list[tuple[int, int]] = []  # first byte and the one after the last of each tensor of the kernel that runs


class OutOfBounds(Exception):
    """A kernel touched memory outside of its tensors."""


def _as_float32(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _dot(self, a, b, acc, *options):
    return _ORIGINALS["create_dot"](self, _as_float32(a), _as_float32(b), acc, *options)


def _cast(self, source, to_type):
    if to_type.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
        source = _ORIGINALS["cast_impl"](self, source, tl.float32)
    return _ORIGINALS["cast_impl"](self, source, to_type)


def _check(pointers: TensorHandle, mask: TensorHandle) -> None:
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
    size = pointers.get_element_ty().primitive_bitwidth // 8
    inside = np.zeros(addresses.shape, dtype=bool)
    for begin, end in _memory:
        inside |= (addresses >= begin) & (addresses + size <= end)
    if not inside.all():
        raise OutOfBounds(f"{(~inside).sum()} of {inside.size} addresses are outside of the tensors of the kernel")


def _load(self, pointers, mask, *rest):
    _check(pointers, mask)
    return _ORIGINALS["create_masked_load"](self, pointers, mask, *rest)


def _store(self, pointers, value, mask, *rest):
    _check(pointers, mask)
    return _ORIGINALS["create_masked_store"](self, pointers, value, mask, *rest)


def _arguments(self, arguments, named):
    ours, named_ours = _ORIGINALS["_init_args_hst"](self, arguments, named)
    tensors = [t for t in (*ours, *named_ours.values()) if isinstance(t, torch.Tensor)]
    _memory[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    return ours, named_ours


_REPLACEMENTS = {
    "create_dot": (InterpreterBuilder, _dot),
    "cast_impl": (InterpreterBuilder, _cast),
    "create_masked_load": (InterpreterBuilder, _load),
    "create_masked_store": (InterpreterBuilder, _store),
    "_init_args_hst": (GridExecutor, _arguments),
}
_ORIGINALS = {name: getattr(owner, name) for name, (owner, _) in _REPLACEMENTS.items()}


def close_gaps() -> None:
    """Take bfloat16 for numbers; raise on memory outside of the tensors of a kernel, which must be contiguous."""
    for name, (owner, replacement) in _REPLACEMENTS.items():
        setattr(owner, name, replacement)


def open_gaps() -> None:
    """The interpreter as it came."""
    for name, (owner, _) in _REPLACEMENTS.items():
        setattr(owner, name, _ORIGINALS[name])
