# SPDX-License-Identifier: Apache-2.0
"""Run the Python body of a Gluon kernel on the CPU, tensors of torch standing in for those of registers.

Checked here: index arithmetic (a load or store outside of its tensor raises), fragments, metadata, arithmetic. Not
checked: layouts (test_compiled_kernels.py looks at those), barriers, the order of memory operations.

What a masked load without `other` leaves undefined is filled with a NaN pattern, so that it cannot pass unseen.
"""

from __future__ import annotations

import ast
import itertools
import types
from collections.abc import Callable
from pathlib import Path

import torch

UNDEFINED = {torch.int16: 0x7FC0, torch.int32: 0x7FC07FC0, torch.int64: 0x7FC07FC07FC07FC0}


class OutOfBounds(Exception):
    """A kernel touched memory outside of its tensor."""


class Pointer:
    """An address, or a tensor of addresses, in one tensor."""

    def __init__(self, memory: torch.Tensor, offset: int | torch.Tensor = 0):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: int | torch.Tensor) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def _checked(
        self, mask: torch.Tensor | None, shape: torch.Size | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Addresses and mask in one shape; masked-off addresses become 0."""
        offset = torch.as_tensor(self.offset)
        mask = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        shape = torch.broadcast_shapes(offset.shape, mask.shape) if shape is None else shape
        if mask.dim() and torch.broadcast_shapes(offset.shape, mask.shape) != offset.shape:
            raise TypeError("a mask must not be larger than the pointers it guards")
        offset, mask = offset.expand(shape), mask.expand(shape)
        used = offset[mask]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= self.memory.numel()):
            raise OutOfBounds(f"offsets {int(used.min())}..{int(used.max())} of {self.memory.numel()} elements")
        return torch.where(mask, offset, 0), mask

    def load(self, mask: torch.Tensor | None = None, other: float | None = None) -> torch.Tensor:
        offset, mask = self._checked(mask)
        if other is None:
            other = UNDEFINED.get(self.memory.dtype, float("nan"))
        fill = torch.full((), other, dtype=self.memory.dtype)
        return torch.where(mask, self.memory.view(-1)[offset], fill)

    def store(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        offset, mask = self._checked(mask, value.shape)
        self.memory.view(-1)[offset[mask]] = value.to(self.memory.dtype)[mask]


# --- instructions ---------------------------------------------------------------------------------------------------
def _halves(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int32 `[...]` -> `[..., 2]` of a 16-bit type, low half first."""
    return words.contiguous().view(torch.int16).view(dtype).unflatten(-1, (-1, 2))


def _by_lane(fragment: torch.Tensor, rows: int, columns: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """A matrix `[..., rows, columns]` from what the lanes hold, `[..., *row.shape]`."""
    matrix = fragment.new_zeros(*fragment.shape[: fragment.dim() - row.dim()], rows * columns)
    matrix[..., (row * columns + column).flatten()] = fragment.flatten(-row.dim())
    return matrix.unflatten(-1, (rows, columns))


def sparse_mma(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, metadata: torch.Tensor, selector: int, dtype: torch.dtype
) -> torch.Tensor:
    """`mma.sp::ordered_metadata.m16n8k32`, as section "Matrix Fragments for sparse mma.m16n8k32" of the PTX ISA lays it out.

    a, b: int32 `[..., 32 lanes, 4 registers]`, c: float32 of that shape, metadata: int32 of that shape or broadcast.
    """
    a, b, c, metadata = torch.broadcast_tensors(a, b, c, metadata)
    lane = torch.arange(32)[:, None, None]
    register = torch.arange(4)[:, None]
    half = torch.arange(2)
    group, thread = lane // 4, lane % 4
    kept = _by_lane(
        _halves(a, dtype).float(),
        16,
        16,
        group + 8 * (register % 2) + 0 * half,
        2 * thread + half + 8 * (register // 2),
    )
    tokens = _by_lane(
        _halves(b, dtype).float(), 32, 8, 2 * thread + half + 8 * register, group + 0 * (register + half)
    )
    # The word of lane 4q + 2 selector + j: rows q (low half) and q+8, groups 4j .. 4j+3, lowest first.
    words = metadata[..., 0].unflatten(-1, (8, 4))[..., 2 * selector : 2 * selector + 2].long()  # [..., q, j]
    nibbles = (words[..., None, None] >> (16 * torch.arange(2)[:, None] + 4 * torch.arange(4))) & 15
    nibbles = (
        nibbles.permute(*range(nibbles.dim() - 4), -2, -4, -3, -1).flatten(-4, -3).flatten(-2)
    )  # [..., row, group]
    within = torch.stack([nibbles & 3, nibbles >> 2], -1).flatten(-2)  # [..., 16, 16]
    columns = torch.arange(16) // 2 * 4 + within
    weight = kept.new_zeros(*kept.shape[:-1], 32).scatter_add(-1, columns, kept)
    product = weight @ tokens  # [..., 16, 8]
    lane, register = torch.arange(32)[:, None], torch.arange(4)
    return c + product[..., lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2]


def _subtract(minuend: torch.Tensor, subtrahend: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    difference = _halves(minuend, dtype) - _halves(subtrahend, dtype)
    return difference.contiguous().view(torch.int16).view(torch.int32).squeeze(-1)


def inline_assembly(text: str, constraints: str, arguments: list, dtype, is_pure: bool, pack: int) -> torch.Tensor:
    """The instructions that the kernels use; any other text raises."""
    number = torch.bfloat16 if "bf16" in text else torch.float16
    if text.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32") and pack == 4:
        return sparse_mma(*arguments, selector=int(text.rstrip(";").split("0x")[-1], 16), dtype=number)
    if "sub.rn.f16x2 $0, $1, $2" in text or "0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1" in text:
        assert pack == 1
        return _subtract(*torch.broadcast_tensors(*arguments), number)
    raise NotImplementedError(f"no emulation of inline assembly {text!r}")


# --- the namespace `gl` ---------------------------------------------------------------------------------------------
class _SharedMemory:
    def __init__(self, data: torch.Tensor):
        self.data = data

    def index(self, position: int) -> _SharedMemory:
        return _SharedMemory(self.data[position])

    def load(self, layout) -> torch.Tensor:
        return self.data.clone()


class _AsyncCopies:
    """`cp.async`: what is copied is not there, and what was there is lost, until the group of the copy is waited for."""

    def __init__(self):
        self.groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.open: list[tuple[torch.Tensor, torch.Tensor]] = []

    def async_load(
        self, destination: _SharedMemory, pointer: Pointer, mask: bool | torch.Tensor | None = None
    ) -> None:
        self.open.append((destination.data, pointer.load(mask, 0)))  # zeros where the mask is off
        destination.data.fill_(UNDEFINED[destination.data.dtype])

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for destination, data in self.groups.pop(0):
                destination.copy_(data)


def _language(program: tuple[int, ...]) -> types.SimpleNamespace:
    def join(left, right):
        return torch.stack([left, right], -1)

    def load(pointer, mask=None, other=None, cache_modifier="", eviction_policy=""):
        return pointer.load(mask, other)

    def same(value, layout, assert_trivial=False):
        return value

    return types.SimpleNamespace(
        constexpr=lambda value: value,
        **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64", "int32", "int16")},
        BlockedLayout=lambda *args: None,
        SliceLayout=lambda *args: None,
        DistributedLinearLayout=lambda *args: None,
        SwizzledSharedLayout=lambda *args, **kwargs: None,
        program_id=lambda axis: program[axis],
        arange=lambda start, stop, layout=None: torch.arange(start, stop),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full_like=lambda like, value: torch.full_like(like, value),
        expand_dims=lambda value, axis: value.unsqueeze(axis),
        minimum=lambda left, right: left.clamp(max=right) if isinstance(left, torch.Tensor) else min(left, right),
        where=torch.where,
        join=join,
        split=lambda value: (value[..., 0], value[..., 1]),
        sum=lambda value, axis: value.sum(axis),
        convert_layout=same,
        static_range=range,
        load=load,
        store=lambda pointer, value, mask=None: pointer.store(value, mask),
        inline_asm_elementwise=inline_assembly,
        allocate_shared_memory=lambda dtype, shape, layout: _SharedMemory(torch.full(shape, -1, dtype=dtype)),
        barrier=lambda: None,
    )


class EmulatedKernel:
    """Stands in for a `gluon.jit` function: `kernel[grid](*arguments, num_warps=..., **constants)`.

    Args:
        name (`str`): of the function.
        sources (`Path`): files that are read as one. Imports and decorators are dropped; all else runs as it stands.
    """

    def __init__(self, name: str, *sources: Path):
        self.name = name
        tree = ast.parse("from __future__ import annotations\n" + "\n".join(source.read_text() for source in sources))
        tree.body = tree.body[:1] + [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
        self.code = compile(tree, str(sources[-1]), "exec", dont_inherit=True)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments, num_warps: int, maxnreg: int | None = None, **constants) -> None:
            pointers = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in itertools.product(*map(range, (*grid, 1, 1)[:3])):
                namespace = {"__name__": "emulated", "gl": _language(program), "async_copy": _AsyncCopies()}
                exec(self.code, namespace)
                namespace[self.name](*pointers, **constants)

        return launch
