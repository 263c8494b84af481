# SPDX-License-Identifier: Apache-2.0
"""Compile a Gluon kernel for a GPU that is not there, and count what the machine code holds."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Args:
        registers (`int`): a thread.
        shared (`int`): bytes of shared memory.
        local (`int`): bytes of local memory and stack a thread.
        opcodes (`Counter`): SASS instructions by full name.
        product_layouts (`list[set[str]]`): for each `mma.sp` op in TTGIR, the layouts of its operands and its result.
        sass (`str`): the disassembly.
    """

    registers: int
    shared: int
    local: int
    opcodes: Counter
    product_layouts: list[set[str]]
    sass: str

    def count(self, *parts: str) -> int:
        """Instructions whose name starts with the first of `parts` and contains the others."""
        return sum(
            n for name, n in self.opcodes.items() if name.startswith(parts[0]) and all(p in name for p in parts)
        )

    @property
    def spills(self) -> int:
        return self.count("LDL") + self.count("STL")


def compile_kernel(
    kernel, signature: dict[str, str], constants: dict, capability: int, warps: int, folder: Path, **options: int
) -> Compiled:
    """Compile for sm_`capability`.

    Args:
        kernel: a `gluon.jit` function.
        signature (`dict`): type of each run-time argument, e.g. "*i32" or "i32". Pointers are taken to be aligned, and
            `rows` to be divisible, by 16.
        constants (`dict`): value of each constexpr argument.
        folder (`Path`): for the machine code while it is taken apart.
        options: more of Triton's own.
    """
    names = list(kernel.arg_names)
    types = {name: signature.get(name, "constexpr") for name in names}
    divisible = [n for n, t in types.items() if t.startswith("*") or (n == "rows" and t == "i32")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = GluonASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    sass = _run("nvdisasm", "-c", cubin)
    return Compiled(
        registers,
        built.metadata.shared,
        stack + local,
        Counter(OPCODE.findall(sass)),
        _layouts(built.asm["ttgir"]),
        sass,
    )


def _run(tool: str, *arguments) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _layouts(ttgir: str) -> list[set[str]]:
    named = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)", ttgir, re.MULTILINE))
    products = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line and "mma.sp" in line]
    return [{named.get(name, name) for name in re.findall(r"tensor<[^,>]*, (#\w+)", line)} for line in products]
