# SPDX-License-Identifier: Apache-2.0
"""Run the Python body of the Hopper kernel on the CPU, its assembly text an instruction at a time.

Shared memory is an array of bytes with Triton's swizzle, and `wgmma` finds its operand there by the descriptor that the text
computes. The order of events is checked too, as far as one thread can see it: copies are waited for, then a barrier, then
the fence between the ways to shared memory, then products; a stage that products have read is filled after a barrier only.

A warp's part of `wgmma.mma_async.sp.m64nNk32` is `mma.sp.m16n8k32` for each 8 tokens: PTX ISA, "Register Fragments for
wgmma.mma_async.m64nNk32", and CUTLASS (`ELayout_64x32`), which `test_wgmma_kernel.py` compares.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable

import torch

from .gluon_emulation import EmulatedKernel, Pointer, _AsyncCopies, _language, sparse_mma


class Hazard(Exception):
    """A kernel uses shared memory or registers at a time when it must not."""


class SharedMemory:
    """The shared memory of a program, in words of 8 bytes, and what happened to it since the last wait for copies.

    Args:
        words (`int`): its size.
    """

    def __init__(self, words: int):
        self.words = torch.full((words,), -1, dtype=torch.int64)
        self.ready: list[str] = []  # of "copies", "barrier", "fence": in this order, the products may read
        self.read_since_barrier: set[int] = set()

    def wait(self) -> None:
        self.ready = ["copies"]

    def barrier(self) -> None:
        self.ready = ["copies", "barrier"] if self.ready else []
        self.read_since_barrier.clear()

    def fence(self) -> None:
        if self.ready == ["copies", "barrier"]:
            self.ready.append("fence")


class Tiles:
    """`[stages, tokens, 16]` words of 8 bytes as `NVMMASharedLayout(128, 64)` places them from the start of shared memory."""

    def __init__(self, shape: list[int]):
        self.stages, self.tokens, units = shape
        assert units == 16
        self.memory = SharedMemory(self.stages * self.tokens * units)

    def index(self, stage: int) -> types.SimpleNamespace:
        assert 0 <= stage < self.stages
        return types.SimpleNamespace(data=Tile(self.memory, swizzled_words(self.tokens) + stage * self.tokens * 16))


class Tile:
    """One stage; what `_AsyncCopies` needs of a tensor."""

    def __init__(self, memory: SharedMemory, places: torch.Tensor):
        self.memory, self.places, self.dtype = memory, places, torch.int64

    def fill_(self, value: int) -> None:
        if not self.memory.read_since_barrier.isdisjoint(self.places.flatten().tolist()):
            raise Hazard("a stage is filled while another warpgroup may still read it")
        self.memory.words[self.places] = value

    def copy_(self, data: torch.Tensor) -> None:
        self.memory.words[self.places] = data


def swizzled_words(tokens: int) -> torch.Tensor:
    """Where word `[token, i]` of a tile lies: pairs of words, 16 bytes, exchanged by the token modulo 8."""
    token, word = torch.arange(tokens)[:, None], torch.arange(16)
    return token * 16 + (word ^ (token % 8 * 2))


class Copies(_AsyncCopies):
    """`cp.async` into `memory`."""

    def __init__(self):
        super().__init__()
        self.memory: SharedMemory | None = None

    def wait_group(self, outstanding: int) -> None:
        super().wait_group(outstanding)
        self.memory.wait()


def _described_tile(memory: SharedMemory, descriptor: int, tokens: int) -> torch.Tensor:
    """int32 `[tokens, 16 words of two columns]`: what a matrix descriptor of the PTX ISA describes, K-major."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise NotImplementedError(f"a descriptor other than of a 128-byte swizzle without an offset: {descriptor:#x}")
    token, word = torch.arange(tokens)[:, None], torch.arange(8)
    address = start + token // 8 * stride + token % 8 * 128 + word * 8
    address = address ^ ((address >> 7 & 7) << 4)
    memory.read_since_barrier.update((address // 8).flatten().tolist())
    return memory.words[address // 8].contiguous().view(torch.int32)


class ProductText:
    """Executes one assembly text for all warps of a program.

    Args:
        memory (`SharedMemory`): where `global_smem` is 0.
        operands (`list`): tensors in one shape `[warp, .., lane, register]`, all of the lane's registers side by side.
    """

    def __init__(self, memory: SharedMemory, text: str, constraints: str, operands: list, pack: int):
        acc = operands[0]
        flat = [self._by_lane(operand, acc.shape, pack) for operand in operands]
        expected = ["=f"] * pack + [str(i) for i in range(pack)] + ["r"] * (pack * (len(operands) - 1))
        if constraints.split(",") != expected:
            raise ValueError(f"constraints do not fit the operands: {constraints}")
        self.memory, self.shape, self.pack, self.text = memory, acc.shape, pack, text
        self.sums = flat[0].clone()
        self.operands = [flat[0], *flat]  # results, which are tied to the first operand, then operands
        self.scalars: dict[str, int] = {"global_smem": 0}
        self.state = ""

    @staticmethod
    def _by_lane(operand, shape: torch.Size, pack: int) -> torch.Tensor:
        """`[warp, lane, register]` in the order of the layout: registers fastest, then the dimensions before the lane."""
        full = torch.as_tensor(operand).expand(shape).movedim(-2, 1).flatten(2)
        assert full.shape[-1] == pack
        return full

    def register(self, name: str) -> torch.Tensor:
        """`[warp, lane]` of `$i`."""
        group, element = divmod(int(name[1:]), self.pack)
        return self.operands[group][:, :, element]

    def scalar(self, name: str) -> int:
        if name.startswith("$"):
            register = self.register(name)
            assert (register == register[0, 0]).all(), "a descriptor differs between lanes"
            return int(register[0, 0])
        return self.scalars[name] if name in self.scalars else int(name)

    def run(self) -> torch.Tensor:
        for instruction in filter(None, (part.strip() for part in re.split(r";|^{|}$", self.text.strip()))):
            opcode, _, rest = instruction.partition(" ")
            if opcode.startswith("wgmma."):
                self._wgmma(opcode, rest)
            elif opcode != ".reg":
                target, *sources = rest.split(", ")
                self.scalars[target] = self._integer(opcode, [self.scalar(source) for source in sources])
        if self.state != "waited":
            raise Hazard("the text ends before its products do")
        return self.sums.view(self.shape[0], 32, *self.shape[1:-2], self.shape[-1]).movedim(1, -2)

    @staticmethod
    def _integer(opcode: str, sources: list[int]) -> int:
        operation = {
            "setp.eq.u32": lambda a, b: int(a == b),
            "mov.u32": lambda a: a,
            "cvt.u64.u32": lambda a: a,
            "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
            "and.b32": lambda a, b: a & b,
            "shr.u32": lambda a, b: a >> b,
            "or.b64": lambda a, b: a | b,
            "add.u64": lambda a, b: a + b,
        }[opcode]
        return operation(*sources)

    def _wgmma(self, opcode: str, rest: str) -> None:
        before = {
            "fence": ("",),
            "mma_async": ("fenced", "issued"),
            "commit_group": ("issued",),
            "wait_group": ("done",),
        }
        after = {"fence": "fenced", "mma_async": "issued", "commit_group": "done", "wait_group": "waited"}
        name = opcode.split(".")[1]
        if self.state not in before[name] or (name == "wait_group" and rest != "0"):
            raise Hazard(f"{opcode} {rest} after {self.state!r}")
        self.state = after[name]
        if name == "mma_async":
            self._multiply(opcode, rest)

    def _multiply(self, opcode: str, rest: str) -> None:
        shape = re.fullmatch(r"wgmma.mma_async.sp.sync.aligned.m64n(\d+)k32.f32.(b?f16).\2", opcode)
        form = re.fullmatch(r"\{(.*)\}, \{(.*)\}, (\w+), (\$\d+), ([01]), (\w+), 1, 1, 0", rest)
        assert shape and form, f"{opcode} {rest}"
        assert form[1].split(", ") == [f"${i}" for i in range(self.pack)] and int(shape[1]) == 2 * self.pack
        if self.memory.ready != ["copies", "barrier", "fence"]:
            raise Hazard(f"products read shared memory after {self.memory.ready} only")
        tokens, selector, dtype = int(shape[1]), int(form[5]), {"bf16": torch.bfloat16, "f16": torch.float16}[shape[2]]
        assert self.scalar(form[6]) == 1, "the accumulators would be overwritten"
        a = torch.stack([self.register(name) for name in form[2].split(", ")], -1)  # [warp, lane, register]
        b = _described_tile(self.memory, self.scalar(form[3]), tokens)
        b = b.view(-1, 8, 4, 4).transpose(2, 3).flatten(1, 2)  # [token block, lane, register]: word t + 4 r of token q
        sums = self.sums.unflatten(-1, (-1, 4)).transpose(1, 2)  # [warp, token block, lane, register]
        metadata = self.register(form[4])[:, None, :, None]
        sums = sparse_mma(a[:, None], b, sums, metadata, selector, dtype)
        self.sums = sums.transpose(1, 2).flatten(2)


def _wgmma_language(program: tuple[int, ...], copies: Copies) -> types.SimpleNamespace:
    """The namespace `gl` of one program."""
    language = _language(program)

    def allocate(dtype, shape, layout) -> Tiles:
        assert dtype == torch.int64 and copies.memory is None, "the tiles must be the only shared memory"
        tiles = Tiles(shape)
        copies.memory = tiles.memory
        return tiles

    language.allocate_shared_memory = allocate
    language.NVMMASharedLayout = lambda *args, **kwargs: None
    language.barrier = lambda: copies.memory.barrier()
    language.inline_asm_elementwise = lambda text, constraints, operands, dtype, is_pure, pack: ProductText(
        copies.memory, text, constraints, operands, pack
    ).run()
    return language


class EmulatedWgmmaKernel(EmulatedKernel):
    """`EmulatedKernel` for the Hopper kernel; a launch returns what the host asks about the compiled kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., types.SimpleNamespace]:
        def launch(*arguments, num_warps: int, maxnreg: int, **constants) -> types.SimpleNamespace:
            pointers = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in itertools.product(*map(range, (*grid, 1, 1)[:3])):
                copies = Copies()
                namespace = {"__name__": "emulated", "gl": _wgmma_language(program, copies), "async_copy": copies}
                namespace["hopper"] = types.SimpleNamespace(fence_async_shared=lambda: copies.memory.fence())  # noqa: B023
                exec(self.code, namespace)
                namespace[self.name](*pointers, **constants)
                shared = copies.memory.words.nbytes
            return types.SimpleNamespace(metadata=types.SimpleNamespace(shared=shared))

        return launch
