# SPDX-License-Identifier: Apache-2.0
"""The portable Triton kernel: interpreted on the CPU, compiled for GPUs that are not there, and run on one that is."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_checks.interpreter_run import failures_in_interpreter
from test_gluon_kernels import error, expected, needs_gpu, random_weight

from hf_nmsparse.ops.linear24 import INPUT_GRADIENT, Call24, Weight24, portable

TESTS = Path(__file__).parent
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}  # of the norm: a rounding of the result
CALL = Call24(torch.device("cuda"), torch.bfloat16, "dense", 64, 72, 1)


def test_the_kernel_is_right_in_the_interpreter():
    assert not failures_in_interpreter("interpreted_kernels.py")


# --- the choice -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{}, {"dtype": torch.float32}, {"kind": "int4"}, {"tokens": 5000}])
def test_calls_on_any_gpu_are_taken(monkeypatch, change):
    monkeypatch.setattr(portable, "has_triton", lambda: True)
    assert portable.PORTABLE.accepts(replace(CALL, **change))


@pytest.mark.parametrize(
    "change",
    [{"device": torch.device("cpu")}, {"dtype": torch.float64}, {"product": INPUT_GRADIENT}, {"tokens": 0}],
)
def test_other_calls_are_declined(monkeypatch, change):
    monkeypatch.setattr(portable, "has_triton", lambda: True)
    assert not portable.PORTABLE.accepts(replace(CALL, **change))


def test_without_triton_all_calls_are_declined(monkeypatch):
    monkeypatch.setattr(portable, "has_triton", lambda: False)
    assert not portable.PORTABLE.accepts(CALL)


def test_few_tokens_are_preferred():
    assert portable.PORTABLE.prefers(replace(CALL, tokens=16)) and not portable.PORTABLE.prefers(
        replace(CALL, tokens=17)
    )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows,columns", [(1, 8), (576, 1536), (4096, 4096), (14336, 4096)])
def test_shapes_cover_the_work(rows, columns, narrow):
    for tokens in (1, 16, 17, 33, 65, 4097):
        shape = portable.tile_shape(rows, columns, tokens, narrow, multiprocessors=132)
        row_tiles, token_tiles, parts = shape.grid(rows, tokens)
        assert row_tiles * shape.rows >= rows and token_tiles * shape.tokens >= tokens
        assert shape.steps(columns) * parts * shape.columns >= columns and 128 % shape.columns == 0
        assert parts == 1 or parts * row_tiles * token_tiles <= 132


# --- what Triton compiles -------------------------------------------------------------------------------------------
SIZES = ("rows", "columns", "value_columns", "id_columns", "scale_columns")


def source(kind: str, dtype: str, tokens: int, narrow: bool) -> tuple[dict, dict, portable.TileShape]:
    """Types of the run-time arguments, values of the others."""
    shape = portable.tile_shape(4096, 4096, tokens, narrow, multiprocessors=132)
    values = {"dense": dtype, "int8": "i8", "int4": "u8"}[kind]
    types = {"x": f"*{dtype}", "values": f"*{values}", "ids": "*u8", "scale": f"*{dtype}", "bias": f"*{dtype}"}
    types["y"] = f"*{dtype}" if shape.k_parts == 1 else "*fp32"
    types |= dict.fromkeys(("tokens", *SIZES, "steps"), "i32")
    return types, {"KIND": kind, "HAS_BIAS": True, **shape.constants()}, shape


def compile_for(target, kind: str, dtype: str, tokens: int, narrow: bool = False, divisible: tuple[str, ...] = SIZES):
    """What Triton makes of the kernel for `target`, where the sizes named are divisible by 16."""
    import triton

    from hf_nmsparse.ops.linear24.triton_portable import linear24_portable

    types, constants, shape = source(kind, dtype, tokens, narrow)
    names = list(linear24_portable.arg_names)
    aligned = [name for name, type_ in types.items() if type_.startswith("*") or name in divisible]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        return triton.compile(
            triton.compiler.ASTSource(
                fn=linear24_portable,
                signature={name: types.get(name, "constexpr") for name in names},
                constexprs=constants,
                attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            ),
            target=target,
            options={"num_warps": shape.warps, "num_stages": shape.stages},
        )


def machine_code(built, folder: Path) -> tuple[str, int]:
    """SASS, and the bytes of local memory and stack a thread."""
    check = pytest.importorskip("kernel_checks.compile_check")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = check._run("cuobjdump", "--dump-resource-usage", cubin)
    return check._run("nvdisasm", "-c", cubin), sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.mark.parametrize(
    "capability,kind,dtype,tokens,instruction",
    [
        (80, "dense", "bf16", 1, "HMMA.16816.F32.BF16"),
        (80, "int8", "fp16", 256, "HMMA.16816.F32"),
        (90, "int4", "bf16", 1, "HMMA.16816.F32.BF16"),
        (90, "dense", "bf16", 256, "HGMMA"),
    ],
)
def test_tensor_cores_multiply_what_is_copied_ahead(capability, kind, dtype, tokens, instruction, tmp_path):
    compiler = pytest.importorskip("triton.backends.compiler")
    built = compile_for(compiler.GPUTarget("cuda", capability, 32), kind, dtype, tokens)
    sass, local = machine_code(built, tmp_path)
    assert local == 0 and "LDL" not in sass and "STL" not in sass
    assert instruction in sass and "LDGSTS.E.BYPASS.128" in sass  # x, 16 bytes a lane, a step or more ahead


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize(
    "capability,dtype,tokens,divisible",
    [
        (80, "fp32", 1, SIZES),
        (90, "fp32", 64, SIZES),
        (80, "bf16", 1, ()),
        (80, "bf16", 64, ()),
        (75, "fp32", 1, SIZES),
    ],
)
def test_narrow_tiles_fit_in_the_registers(capability, kind, dtype, tokens, divisible, tmp_path):
    compiler = pytest.importorskip("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", capability, 32)
    _, local = machine_code(compile_for(target, kind, dtype, tokens, narrow=True, divisible=divisible), tmp_path)
    assert local == 0


@pytest.mark.parametrize("kind,dtype,tokens", [("dense", "bf16", 1), ("int4", "fp16", 256)])
def test_compiles_for_amd(kind, dtype, tokens):
    compiler = pytest.importorskip("triton.backends.compiler")
    pytest.importorskip("triton.backends.amd")
    assembly = compile_for(compiler.GPUTarget("hip", "gfx942", 64), kind, dtype, tokens).asm["amdgcn"]
    assert "v_mfma_" in assembly and re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly) == ["0"]


# --- on a GPU -------------------------------------------------------------------------------------------------------
class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("rows,columns", [(8, 72), (200, 264), (96, 640), (4096, 4096)])
    @pytest.mark.parametrize("tokens", [1, 3, 17, 40, 300])
    def test_multiplies(self, tokens, rows, columns, dtype, kind):
        weight, x, bias = random_weight(rows, columns, dtype, kind), torch.randn(tokens, columns), torch.randn(rows)
        x, bias = x.to(dtype), bias.to(dtype)
        there = Weight24(*(None if tensor is None else tensor.cuda() for tensor in weight.tensors))
        y = portable.PORTABLE.run(x.cuda(), there, bias.cuda())
        assert error(y.cpu(), expected(x, weight, bias)) < TOLERANCE[dtype]
        assert torch.equal(y, portable.PORTABLE.run(x.cuda(), there, bias.cuda()))
