# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles of the Gluon kernels for sm_80 and sm_90, seen without a GPU."""

import warnings

import pytest

pytest.importorskip("triton.experimental.gluon")

from kernel_checks.compile_check import Compiled, compile_kernel

from hf_nmsparse.ops.linear24 import nvidia
from hf_nmsparse.ops.linear24.gluon_decode import linear24_decode, sum_of_parts
from hf_nmsparse.ops.linear24.gluon_gemm import linear24_gemm

MULTIPROCESSORS = {80: 108, 90: 132}  # A100, H100 and H200
POINTERS = {"x": "*i64", "values": "*i32", "ids": "*i64", "tokens": "i32", "rows": "i32", "steps": "i32"}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        yield


def compiled_decode(capability, rows, columns, tokens, kind, dtype, folder) -> tuple[Compiled, nvidia.DecodeShape]:
    shape = nvidia.decode_shape(rows, columns, tokens, kind, MULTIPROCESSORS[capability])
    result = f"*{dtype}" if shape.k_parts == 1 else "*fp32"
    signature = POINTERS | {"scale": f"*{dtype}", "bias": f"*{dtype}", "y": result}
    constants = {"K": columns, "KIND": kind, "FP16": dtype == "fp16", "HAS_BIAS": True, **shape.constants()}
    return compile_kernel(linear24_decode, signature, constants, capability, shape.warps, folder), shape


def compiled_gemm(capability, rows, columns, tokens, dtype, folder) -> tuple[Compiled, nvidia.GemmShape]:
    shape = nvidia.gemm_shape(rows, columns, tokens, MULTIPROCESSORS[capability])
    signature = {"x": "*i32", "values": "*i32", "ids": "*i16", "bias": f"*{dtype}", "y": f"*{dtype}"}
    signature |= {"tokens": "i32", "rows": "i32", "steps": "i32"}
    constants = {"K": columns, "FP16": dtype == "fp16", "HAS_BIAS": True, **shape.constants()}
    limit = nvidia.GEMM_REGISTERS
    return compile_kernel(linear24_gemm, signature, constants, capability, shape.warps, folder, maxnreg=limit), shape


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "rows,columns,tokens,kind,dtype",
    [
        (4096, 4096, 1, "dense", "bf16"),
        (4096, 4096, 8, "dense", "fp16"),
        (4096, 4096, 64, "dense", "bf16"),
        (576, 1536, 1, "dense", "bf16"),
        (4096, 4096, 1, "int8", "bf16"),
        (4096, 4096, 1, "int4", "fp16"),
        (4096, 4096, 64, "int8", "bf16"),
    ],
)
def test_decode_feeds_sparse_tensor_cores_from_registers(capability, rows, columns, tokens, kind, dtype, tmp_path):
    kernel, shape = compiled_decode(capability, rows, columns, tokens, kind, dtype, tmp_path)
    assert kernel.spills == 0 and kernel.local == 0
    assert kernel.registers <= 128  # two programs of 8 warps on a multiprocessor
    products = shape.row_blocks * shape.unroll * (shape.token_blocks // shape.token_warps)
    number = "BF16" if dtype == "bf16" else "F32"
    assert kernel.count("HMMA.SP.16832.F32", number) == products * (2 if kind == "dense" else 4)
    loads = 2 * shape.row_blocks * shape.unroll  # of values: rows q and q+8, once before the loop and once in it
    assert kernel.count("LDG.E.EF", "64" if kind == "int4" else "128") == 2 * loads
    before_the_first_product = kernel.sass[: kernel.sass.index("HMMA.SP")]
    assert before_the_first_product.count("LDG.E.EF") >= loads  # the first step is under way as a whole
    assert kernel.count("STS") <= 64  # shared memory serves the sum over warps alone
    lanes = (
        f"sizePerThread = [{shape.row_blocks}, {shape.unroll}, {shape.token_blocks // shape.token_warps}, 1, 4], "
        f"threadsPerWarp = [1, 1, 1, 32, 1], warpsPerCTA = [1, {shape.k_warps}, {shape.token_warps}, 1, 1], "
        "order = [4, 3, 1, 2, 0]"
    )
    assert kernel.product_layouts
    assert all(layouts == {f"#ttg.blocked<{{{lanes}}}>"} for layouts in kernel.product_layouts)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens,dtype", [(4096, "bf16"), (256, "fp16")])
def test_gemm_feeds_sparse_tensor_cores_through_shared_memory(capability, tokens, dtype, tmp_path):
    kernel, shape = compiled_gemm(capability, 4096, 4096, tokens, dtype, tmp_path)
    assert kernel.spills == 0 and kernel.local == 0
    assert kernel.registers <= 128 and 2 * kernel.shared <= 163 * 1024  # two programs on a multiprocessor of an A100
    row_blocks, token_blocks = shape.row_blocks // shape.row_warps, shape.token_blocks // shape.token_warps
    number = "BF16" if dtype == "bf16" else "F32"
    assert kernel.count("HMMA.SP.16832.F32", number) == 2 * row_blocks * token_blocks
    assert kernel.count("LDSM.16.M88.4") >= 2 * (row_blocks + token_blocks)  # fragments, four registers at once
    assert kernel.count("LDGSTS") == kernel.count("LDGSTS", "128") > 0
    assert kernel.count("STG") == kernel.count("STG", "128") > 0
    lanes = (
        f"sizePerThread = [{row_blocks}, {token_blocks}, 1, 4], threadsPerWarp = [1, 1, 32, 1], "
        f"warpsPerCTA = [{shape.row_warps}, {shape.token_warps}, 1, 1], order = [3, 2, 1, 0]"
    )
    assert kernel.product_layouts
    assert all(layouts == {f"#ttg.blocked<{{{lanes}}}>"} for layouts in kernel.product_layouts)


@pytest.mark.parametrize("capability", [80, 90])
def test_sum_of_parts_compiles(capability, tmp_path):
    signature = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "rows": "i32", "elements": "i32"}
    kernel = compile_kernel(
        sum_of_parts, signature, {"HAS_BIAS": True, "K_PARTS": 3, "BLOCK": 256}, capability, 8, tmp_path
    )
    assert kernel.spills == 0 and kernel.registers <= 40


def test_numbers_that_are_one_compile(tmp_path):
    """Triton takes an argument of 1 for a constant."""
    one = {"tokens": 1, "rows": 1, "steps": 1, "K": 64, "FP16": False, "HAS_BIAS": True}
    decode, gemm = nvidia.decode_shape(1, 64, 1, "int4", 132), nvidia.gemm_shape(1, 64, 1, 132)
    pointers = {"x": "*i64", "values": "*i32", "ids": "*i64", "scale": "*bf16", "bias": "*bf16", "y": "*bf16"}
    constants = one | {"KIND": "int4"} | decode.constants()
    assert compile_kernel(linear24_decode, pointers, constants, 90, decode.warps, tmp_path).spills == 0
    pointers = {"x": "*i32", "values": "*i32", "ids": "*i16", "bias": "*bf16", "y": "*bf16"}
    assert compile_kernel(linear24_gemm, pointers, one | gemm.constants(), 90, gemm.warps, tmp_path).spills == 0
