# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel: run on the CPU with `wgmma.sp` emulated, compiled for sm_90a, and, where there is such a GPU, run."""

import contextlib
import itertools
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks.gluon_emulation import EmulatedKernel, sparse_mma
from kernel_checks.wgmma_emulation import EmulatedWgmmaKernel, Hazard, swizzled_words
from test_gluon_kernels import emulation

from hf_nmsparse.codec import pack_24, unpack_24
from hf_nmsparse.ops.linear24 import INPUT_GRADIENT, Call24, Weight24, hopper, nvidia, probe
from hf_nmsparse.ops.linear24.hopper import _LARGE, _MIDDLE, _SMALL, WGMMA, wgmma, wgmma_shape

FOLDER = Path(hopper.__file__).parent
SOURCES = [FOLDER / f"gluon_{name}.py" for name in ("decode", "gemm", "wgmma")]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: one rounding of the result
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = {"large": _LARGE, "middle": _MIDDLE, "small": _SMALL}
on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def random_weight(rows: int, columns: int, dtype: torch.dtype) -> Weight24:
    kept = torch.rand(rows, columns // 4, 4).topk(2, -1).indices
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter(-1, kept, True).flatten(1)
    return Weight24(*pack_24(torch.randn(rows, columns).to(dtype), mask))


def error(y: torch.Tensor, x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> float:
    """Distance from the product in float64, relative to its norm."""
    expected = x.double() @ unpack_24(weight.values.double(), weight.ids).t()
    expected = expected if bias is None else expected + bias.double()
    return float((y.double() - expected).norm() / expected.norm())


# --- emulated -------------------------------------------------------------------------------------------------------
@pytest.fixture
def emulated(monkeypatch):
    """The launching code of `hopper` on tensors of the CPU; outputs begin as NaN."""
    kernels = {
        "gluon_wgmma": SimpleNamespace(linear24_wgmma=EmulatedWgmmaKernel("linear24_wgmma", *SOURCES)),
        "gluon_decode": SimpleNamespace(sum_of_parts=EmulatedKernel("sum_of_parts", SOURCES[0])),
    }
    with emulation(monkeypatch, hopper, kernels):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens,rows,columns,size", [(1, 1, 64, "small"), (13, 40, 192, "middle"), (200, 300, 576, "large")]
)
@pytest.mark.parametrize("k_parts", [1, 4])
def test_it_multiplies(emulated, k_parts, tokens, rows, columns, size, dtype):
    weight, x = random_weight(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = None if tokens == 1 else torch.randn(rows).to(dtype)
    y = wgmma(x, weight, bias, replace(SHAPES[size], k_parts=k_parts))
    assert error(y, x, weight, bias) < TOLERANCE[dtype]


def test_leading_dimensions_and_memory_that_begins_anywhere(emulated):
    weight, x = random_weight(16, 64, torch.bfloat16), torch.randn(2, 3, 64).bfloat16()
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    y = WGMMA.run(shifted, weight, None)
    assert y.shape == (2, 3, 16) and error(y.view(6, 16), x.view(6, 64), weight, None) < 4e-3


def test_damaged_ids_and_values_touch_no_foreign_memory(emulated):
    ids = torch.randint(0, 256, (40, 24), dtype=torch.uint8)
    values = torch.randint(-(2**15), 2**15, (40, 96), dtype=torch.int16).view(torch.bfloat16)
    assert wgmma(torch.randn(13, 192).bfloat16(), Weight24(values, ids), None, _SMALL).shape == (13, 40)


def test_more_programs_than_tiles_are_grouped(emulated):
    """Nine row tiles: a group of eight, and one that is short."""
    weight, x = random_weight(1030, 64, torch.bfloat16), torch.randn(70, 64).bfloat16()
    assert error(wgmma(x, weight, None, _SMALL), x, weight, None) < 4e-3


def test_it_passes_the_probe(emulated, monkeypatch):
    monkeypatch.setattr(probe, "_known", {})
    assert probe.works("wgmma", hopper._run_repeated, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("wrong", [(0, 0), (-1, -1), (130, 5), (3, 257), None])
def test_the_probe_sees_a_single_wrong_number(monkeypatch, wrong):
    def almost_right(x, weight, bias, shape):
        y = torch.nn.functional.linear(x, weight.dense(), bias)
        if wrong is not None and shape.k_parts == 1:
            y[wrong] += 1
        return y

    monkeypatch.setattr(probe, "_known", {})
    monkeypatch.setattr(hopper, "wgmma", almost_right)
    assert probe.works("wgmma", hopper._run_repeated, torch.device("cpu"), torch.float16) is (wrong is None)


def test_other_data_in_shared_memory_is_refused(emulated, monkeypatch):
    monkeypatch.setattr(hopper.WgmmaShape, "shared_bytes", 1024)
    with pytest.raises(RuntimeError, match="32768 bytes of shared memory instead of 1024"):
        wgmma(torch.randn(1, 64).bfloat16(), random_weight(8, 64, torch.bfloat16), None, _SMALL)


@pytest.mark.parametrize(
    "before,after",
    [
        ("        barrier()  # the copies", "        pass  # the copies"),
        ("        hopper.fence_async_shared()", "        pass"),
        ("    async_copy.wait_group(STAGES - 2)", "    async_copy.wait_group(STAGES - 1)"),
        ("step + STAGES - 1, steps", "step + STAGES - 2, steps"),
        ('"wgmma.wait_group.sync.aligned 0;"', '"wgmma.wait_group.sync.aligned 1;"'),
        ('        "wgmma.fence.sync.aligned;",\n', ""),
        ("place % 4 * 4 + place // 4", "place"),
        ("{_TOKEN_BYTES // 2 >> _UNIT_BITS}", "2"),
        ("step % STAGES * TILE_BYTES", "0"),
        ("4 * (register % 2) + 2 * product + register // 2", "4 * (register // 2) + 2 * product + register % 2"),
        ("${3 * lane}, {product}", "${3 * lane}, {1 - product}"),
    ],
)
def test_the_emulation_sees(before, after, emulated, monkeypatch, tmp_path):
    source = SOURCES[2].read_text()
    assert source.count(before) == 1
    (tmp_path / "changed.py").write_text(source.replace(before, after))
    kernel = EmulatedWgmmaKernel("linear24_wgmma", *SOURCES[:2], tmp_path / "changed.py")
    monkeypatch.setattr(sys.modules[f"{hopper.__package__}.gluon_wgmma"], "linear24_wgmma", kernel)
    weight, x = random_weight(16, 640, torch.bfloat16), torch.randn(8, 640).bfloat16()
    with contextlib.suppress(Hazard):
        assert not error(wgmma(x, weight, None, _SMALL), x, weight, None) < 0.1


def test_metadata_lies_as_in_cutlass():
    """`ELayout_64x32` of CUTLASS gives each bit of a lane's word the row and column, as row + 64 column, that it is of.

    Its shape is (2, 2, 8, 4), bits of the lane and the warp, then (16, 2), bits of the word; one nibble is of 4 columns.
    """
    strides = (1024, 0, 1, 64, 8)
    for pair, selector, q, bit, half in itertools.product((0, 1), (0, 1), range(8), range(0, 16, 4), (0, 1)):
        place = sum(i * stride for i, stride in zip((pair, selector, q, bit, half), strides, strict=True))
        row, column = place % 64, place // 64
        kept = torch.zeros(16, 16, dtype=torch.bfloat16)
        kept[row, column // 2] = 1  # the only value; this nibble moves it two columns on
        metadata = torch.full((32, 1), 0x44444444, dtype=torch.int32)
        metadata[4 * q + 2 * selector + pair] ^= (0x4 ^ 0xE) << (16 * half + bit)
        a = kept.view(torch.int32).view(2, 8, 2, 4).permute(1, 3, 2, 0).reshape(32, 4)
        numbered = torch.arange(32).bfloat16().expand(8, 32).contiguous()  # 8 tokens that tell the column
        b = numbered.view(torch.int32).view(8, 4, 4).transpose(1, 2).reshape(32, 4)
        product = sparse_mma(a, b, torch.zeros(32, 4), metadata, selector, torch.bfloat16)
        assert product.sum() == 8 * (column + 2)


# --- the division of work, and which calls are taken ----------------------------------------------------------------
@pytest.mark.parametrize("rows,columns", [(1, 64), (576, 1536), (4096, 4096), (14336, 4096), (128256, 4096)])
@pytest.mark.parametrize("tokens", [1, 64, 65, 512, 4097])
def test_shapes_cover_the_work(rows, columns, tokens):
    shape = wgmma_shape(rows, columns, tokens, multiprocessors=132)
    assert shape.steps(columns) * shape.k_parts * 64 >= columns
    assert shape.programs(rows, tokens) * 512 * shape.warpgroups * shape.token_blocks >= rows * tokens
    assert shape.k_parts == 1 or shape.k_parts * shape.programs(rows, tokens) <= 132
    assert shape.shared_bytes <= 227 * 1024 and shape.warps * 32 * hopper.REGISTERS <= 65536


def test_large_tiles_where_they_fill_the_gpu():
    assert wgmma_shape(4096, 4096, 4096, 132) == _LARGE
    assert wgmma_shape(4096, 4096, 512, 132) == replace(_SMALL, k_parts=1)
    assert wgmma_shape(512, 4096, 64, 132).k_parts == 8


CALL = Call24(torch.device("cuda"), torch.bfloat16, "dense", 64, 64, 1)


@pytest.mark.parametrize(
    "change,capability,taken",
    [
        ({}, (9, 0), True),
        ({"tokens": 5000}, (9, 0), True),
        ({}, (8, 9), False),
        ({}, (10, 0), False),
        ({"in_features": 96}, (9, 0), False),
        ({"kind": "int8"}, (9, 0), False),
        ({"product": INPUT_GRADIENT}, (9, 0), False),
        ({"tokens": 2**25}, (9, 0), False),
    ],
)
def test_which_calls_are_taken(monkeypatch, change, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(nvidia, "has_gluon", lambda: True)
    call = replace(CALL, **change)
    assert WGMMA.accepts(call) is taken and not WGMMA.prefers(call)


@pytest.mark.parametrize("works", [True, False])
def test_it_is_tried_on_several_tiles(monkeypatch, works):
    tried = []
    monkeypatch.setattr(hopper, "works", lambda *case: tried.append(case) or works)
    assert WGMMA.works(CALL) is works
    assert tried == [(WGMMA.name, hopper._run_repeated, CALL.device, CALL.dtype)]


# --- compiled -------------------------------------------------------------------------------------------------------
@pytest.fixture
def built(monkeypatch):
    """What Triton has compiled in a test."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.experimental.gluon")
    kept, compile_ = [], triton.compile

    def compile_and_keep(*args, **kwargs):
        kept.append(compile_(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(triton, "compile", compile_and_keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        yield kept


def compiled(shape, dtype, folder, columns=4096, **numbers):
    from kernel_checks.compile_check import compile_kernel

    from hf_nmsparse.ops.linear24.gluon_wgmma import linear24_wgmma

    signature = {"x": "*i64", "values": "*i32", "ids": "*i64", "bias": f"*{dtype}"}
    signature["y"] = f"*{dtype}" if shape.k_parts == 1 else "*fp32"
    signature |= {name: "i32" for name in ("tokens", "rows", "steps") if name not in numbers}
    constants = {"K": columns, "FP16": dtype == "fp16", "HAS_BIAS": True, **numbers, **shape.constants()}
    return compile_kernel(linear24_wgmma, signature, constants, 90, shape.warps, folder, maxnreg=hopper.REGISTERS)


@pytest.mark.parametrize(
    "shape,dtype", [(_LARGE, "bf16"), (replace(_MIDDLE, k_parts=2), "bf16"), (_SMALL, "fp16")], ids=str
)
def test_w_goes_from_memory_to_registers_to_tensor_cores(built, shape, dtype, tmp_path):
    kernel = compiled(shape, dtype, tmp_path)
    assert kernel.spills == 0 and kernel.local == 0 and kernel.registers <= hopper.REGISTERS
    # What the tiles of x take and no byte more, so they begin where shared memory does.
    assert kernel.shared == shape.shared_bytes
    products = f"HGMMA.SP.64x{8 * shape.token_blocks}x32.F32{'.BF16' if dtype == 'bf16' else ' '}"
    assert kernel.sass.count(products) == kernel.count("HGMMA") == 2
    # Rows q and q+8 of values and ids, before the loop and in it; the bias is 16 bits an element.
    assert kernel.count("LDG.E.128") == kernel.count("LDG.E.64") == 4
    copies = shape.stages * 4 * shape.token_blocks // shape.warps  # of x, 8 bytes a lane, before the loop and in it
    assert kernel.count("LDGSTS") == kernel.count("LDGSTS.E.64") == copies
    assert kernel.count("STG") == kernel.count("STG.E.128") > 0
    assert kernel.count("WARPGROUP.ARRIVE") == 1  # products are not made to wait for each other


def test_the_machine_code_keeps_the_order(built, tmp_path):
    """Copies waited for, barrier, fence, products; loads of the next step before them, and all waits in the loop."""
    from kernel_checks.compile_check import OPCODE

    order = OPCODE.findall(compiled(_LARGE, "bf16", tmp_path).sass)
    first = next(i for i, name in enumerate(order) if name.startswith("HGMMA"))
    waited = max(i for i, name in enumerate(order[:first]) if name == "DEPBAR.LE")
    barrier = max(i for i, name in enumerate(order[:first]) if name.startswith("BAR"))
    fence = max(i for i, name in enumerate(order[:first]) if name.startswith("FENCE.VIEW.ASYNC"))
    assert waited < barrier < fence < first
    body = order[waited : order.index("BRA", first)]
    assert sum(name.startswith("LDG.E") for name in order[:barrier]) >= 8
    assert not any(name.startswith("LDG.E") for name in order[barrier : first + len(body)])
    assert order.index("WARPGROUP.DEPBAR.LE") > max(i for i, name in enumerate(order) if name.startswith("HGMMA"))
    assert sum(name.startswith("BAR") for name in body) == 1


def test_operands_of_the_assembly_lie_as_it_needs_them(built, tmp_path):
    compiled(_LARGE, "bf16", tmp_path)
    ttgir, ptx = built[-1].asm["ttgir"], built[-1].asm["ptx"]
    lanes = "sizePerThread = [1, 8, 2, 1, 4], threadsPerWarp = [1, 1, 1, 32, 1], warpsPerCTA = [16, 1, 1, 1, 1]"
    layout = next(line.split(" = ")[0] for line in ttgir.splitlines() if line.startswith("#") and lanes in line)
    (product,) = (line for line in ttgir.splitlines() if "elementwise_inline_asm" in line)
    assert product.count("tensor<16x8x2x32x4x") == product.count(f", {layout}>") == 5
    # Swizzle of 128 bytes and 1024 bytes from 8 tokens to the next: what Triton's own dense products have on Hopper.
    assert f"or.b64 first, first, {1 << 62 | 64 << 32};" in ptx and "mov.u32 address, global_smem;" in ptx


def test_triton_swizzles_as_the_emulation_does(built, tmp_path):
    from kernel_checks.compile_check import compile_kernel
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    if not hasattr(async_copy, "async_load"):
        pytest.skip("Triton 3.6 ends the process when it is asked for this layout")

    @gluon.jit
    def swizzle(EXPECTED: gl.constexpr):
        FOUND: gl.constexpr = gl.to_linear_layout(gl.NVMMASharedLayout(128, 64, rank=2), [16, 16])
        gl.static_assert(FOUND == EXPECTED)

    places = swizzled_words(16)
    bases = [(places == 1 << bit).nonzero()[0].tolist() for bit in range(8)]
    compile_kernel(swizzle, {}, {"EXPECTED": gl.SharedLinearLayout(bases, alignment=1024)}, 90, 4, tmp_path)


def test_numbers_that_are_one_compile(built, tmp_path):
    """Triton takes an argument of 1 for a constant. The number of columns leaves ids without 16-byte rows."""
    kernel = compiled(_SMALL, "bf16", tmp_path, columns=576, tokens=1, rows=1, steps=1)
    assert kernel.spills == 0 and kernel.shared == _SMALL.shared_bytes


# --- on a GPU -------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper, reason="needs a GPU of compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens,rows,columns", [(1, 1, 64), (13, 40, 192), (200, 300, 576), (300, 4096, 4096)])
    @pytest.mark.parametrize("size", SHAPES)
    def test_it_multiplies(self, size, tokens, rows, columns, dtype):
        weight, x = random_weight(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
        on_gpu = Weight24(weight.values.cuda(), weight.ids.cuda())
        for k_parts, bias in ((1, None), (1, torch.randn(rows).to(dtype)), (3, torch.randn(rows).to(dtype))):
            y = wgmma(x.cuda(), on_gpu, None if bias is None else bias.cuda(), replace(SHAPES[size], k_parts=k_parts))
            assert error(y.cpu(), x, weight, bias) < TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_calls_are_taken(self, dtype):
        call = Call24(torch.device("cuda", 0), dtype, "dense", 4096, 4096, 4096)
        assert WGMMA.accepts(call) and WGMMA.works(call)

    def test_it_is_the_same_from_run_to_run(self):
        weight, x = random_weight(4096, 4096, torch.bfloat16), torch.randn(2048, 4096).bfloat16().cuda()
        weight = Weight24(weight.values.cuda(), weight.ids.cuda())
        first = WGMMA.run(x, weight, None)
        assert all(torch.equal(WGMMA.run(x, weight, None), first) for _ in range(20))
