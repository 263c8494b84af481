# SPDX-License-Identifier: Apache-2.0
"""The Gluon kernels: their Python bodies run on the CPU, and, where there is a GPU, what Triton compiles of them."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks.gluon_emulation import EmulatedKernel, OutOfBounds, Pointer

from hf_nmsparse.codec import dequantize_values, pack_24, quantize_values, unpack_24
from hf_nmsparse.ops.linear24 import INPUT_GRADIENT, Call24, Weight24, nvidia, probe
from hf_nmsparse.ops.linear24.gpu import aligned

SOURCES = Path(nvidia.__file__).parent
_DECODE, _GEMM = SOURCES / "gluon_decode.py", SOURCES / "gluon_gemm.py"
EMULATED = {
    "gluon_decode": SimpleNamespace(
        linear24_decode=EmulatedKernel("linear24_decode", _DECODE),
        sum_of_parts=EmulatedKernel("sum_of_parts", _DECODE),
    ),
    "gluon_gemm": SimpleNamespace(linear24_gemm=EmulatedKernel("linear24_gemm", _DECODE, _GEMM)),
}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: one rounding of the result
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16]


def random_weight(rows: int, columns: int, dtype: torch.dtype, kind: str = "dense") -> Weight24:
    kept = torch.rand(rows, columns // 4, 4).topk(2, -1).indices
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter(-1, kept, True).flatten(1)
    values, ids = pack_24(torch.randn(rows, columns).to(dtype), mask)
    return Weight24(values, ids) if kind == "dense" else Weight24(*_quantized(values, ids, kind))


def _quantized(values: torch.Tensor, ids: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    whole, scale = quantize_values(values, kind)
    return whole, ids, scale


def expected(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in float64, of quantised values without the rounding to their dtype."""
    kept = weight.values if weight.scale is None else dequantize_values(weight.values, weight.scale)
    y = x.double() @ unpack_24(kept.double(), weight.ids).t()
    return y if bias is None else y + bias.double()


@contextlib.contextmanager
def emulation(monkeypatch, host, kernels):
    """The launching code of a module on tensors of the CPU, with these kernels by file; outputs begin as NaN."""
    for file, kernel in kernels.items():
        monkeypatch.setitem(sys.modules, f"{host.__package__}.{file}", kernel)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 4)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(monkeypatch):
    """The launching code of `nvidia` on tensors of the CPU; outputs begin as NaN."""
    with emulation(monkeypatch, nvidia, EMULATED):
        yield


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,columns", [(16, 64), (40, 192), (96, 640)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 64])
def test_decode_multiplies(emulated, tokens, rows, columns, dtype, kind):
    weight, x = random_weight(rows, columns, dtype, kind), torch.randn(tokens, columns).to(dtype)
    shape = nvidia.decode_shape(rows, columns, tokens, kind, multiprocessors=4)
    in_parts = dtype == torch.float16
    bias = torch.randn(rows).to(dtype) if in_parts or tokens > 1 else None
    y = nvidia.decode(x, weight, bias, replace(shape, k_parts=3 if in_parts else 1))
    assert error(y, expected(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens,columns", [(1, 4096), (8, 2048), (40, 1024)])
def test_decode_loops_over_k(emulated, tokens, columns):
    weight, x = random_weight(32, columns, torch.bfloat16), torch.randn(tokens, columns).bfloat16()
    bias = torch.randn(32).bfloat16()
    y = nvidia.decode(x, weight, bias, nvidia.decode_shape(32, columns, tokens, "dense", multiprocessors=1))
    assert error(y, expected(x, weight, bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,rows,columns", [(1, 16, 64), (13, 40, 192), (200, 144, 320)])
@pytest.mark.parametrize("k_parts", [1, 3])
def test_gemm_multiplies(emulated, k_parts, tokens, rows, columns, dtype):
    weight, x = random_weight(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = None if k_parts == 1 and tokens == 1 else torch.randn(rows).to(dtype)
    shape = replace(nvidia.gemm_shape(rows, columns, tokens, multiprocessors=4), k_parts=k_parts)
    assert error(nvidia.gemm(x, weight, bias, shape), expected(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind,dtype", [("int8", torch.bfloat16), ("int8", torch.float16), ("int4", torch.bfloat16)])
def test_every_quantised_value_is_exact(emulated, kind, dtype):
    """One token that is 1 in one column: y is that column of W."""
    values = torch.arange(-128, 128).view(8, 32).char() if kind == "int8" else torch.arange(256).view(16, 16).byte()
    weight = Weight24(
        values, torch.full((len(values), 8), 0x44, dtype=torch.uint8), torch.ones(len(values), 1, dtype=dtype)
    )
    x = torch.eye(64, dtype=dtype)
    y = nvidia.decode(x, weight, None, nvidia.decode_shape(len(values), 64, 64, kind, multiprocessors=4))
    assert torch.equal(y.double(), expected(x, weight, None))


@pytest.mark.parametrize("kernel", [nvidia.DECODE, nvidia.GEMM], ids=lambda kernel: kernel.name)
def test_leading_dimensions_and_memory_that_begins_anywhere(emulated, kernel):
    weight, x = random_weight(16, 64, torch.bfloat16), torch.randn(2, 3, 64).bfloat16()
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert error(kernel.run(shifted, weight, None), expected(x, weight, None)) < TOLERANCE[torch.bfloat16]


def test_input_scale_multiplies_x(emulated):
    plain = random_weight(16, 64, torch.bfloat16, "int8")
    weight = Weight24(plain.values, plain.ids, plain.scale, input_scale=torch.rand(64).bfloat16())
    x = torch.randn(2, 64).bfloat16()
    assert error(nvidia.DECODE.run(x, weight, None), x.double() @ weight.dense().double().t()) < 2e-2


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_pass_the_probe(emulated, monkeypatch, dtype, kind):
    monkeypatch.setattr(probe, "_known", {})
    assert probe.works("decode", nvidia._run_decode, torch.device("cpu"), dtype, kind)
    assert kind != "dense" or probe.works("GEMM", nvidia._run_gemm, torch.device("cpu"), dtype)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
def test_damaged_ids_and_values_touch_no_foreign_memory(emulated, kind):
    weight = random_weight(40, 192, torch.bfloat16, kind)
    ids = torch.randint(0, 256, weight.ids.shape, dtype=torch.uint8)
    values = torch.randint(-128, 128, (weight.values.nbytes,), dtype=torch.int8).view(weight.values.dtype)
    damaged = Weight24(values.view_as(weight.values), ids, weight.scale)
    shape = nvidia.decode_shape(40, 192, 13, kind, multiprocessors=4)
    x = torch.randn(13, 192).bfloat16()
    assert nvidia.decode(x, damaged, None, shape).shape == (13, 40)
    if kind == "dense":
        assert nvidia.gemm(x, damaged, None, nvidia.gemm_shape(40, 192, 13, multiprocessors=4)).shape == (13, 40)


def test_the_emulation_sees_an_access_out_of_bounds():
    memory = Pointer(torch.zeros(4))
    for touch in (
        lambda: (memory + torch.arange(5)).load(),
        lambda: (memory + torch.arange(-1, 2)).store(torch.ones(3)),
    ):
        with pytest.raises(OutOfBounds):
            touch()
    assert (memory + torch.arange(5)).load(torch.arange(5) < 4, 7.0).tolist() == [0, 0, 0, 0, 7]


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("rows,columns", [(1, 64), (576, 1536), (4096, 4096), (1024, 14336), (128256, 4096)])
def test_decode_shapes_cover_the_work(rows, columns, kind):
    for tokens in range(1, nvidia.MOST_DECODE_TOKENS + 1):
        shape = nvidia.decode_shape(rows, columns, tokens, kind, multiprocessors=132)
        assert shape.token_blocks * 8 >= tokens and shape.token_blocks % shape.token_warps == 0
        assert shape.warps <= 16 and shape.programs(rows, tokens) * shape.row_blocks * 16 >= rows
        assert shape.k_parts == 1 or shape.k_parts * shape.programs(rows, tokens) <= 132


@pytest.mark.parametrize("rows,columns", [(1, 64), (576, 1536), (4096, 4096), (14336, 4096)])
def test_gemm_shapes_cover_the_work(rows, columns):
    for tokens in (1, 64, 65, 512, 4097):
        shape = nvidia.gemm_shape(rows, columns, tokens, multiprocessors=132)
        assert shape.steps(columns) * shape.k_parts * 64 >= columns
        assert shape.programs(rows, tokens) * 128 * shape.row_blocks * shape.token_blocks >= rows * tokens
        assert shape.k_parts == 1 or shape.k_parts * shape.programs(rows, tokens) <= 132


CALL = Call24(torch.device("cuda"), torch.bfloat16, "dense", 64, 64, 1)
BOTH = pytest.mark.parametrize("kernel", [nvidia.DECODE, nvidia.GEMM], ids=lambda kernel: kernel.name)


@pytest.fixture
def an_a100(monkeypatch):
    """As far as the choice goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(nvidia, "has_gluon", lambda: True)


@BOTH
def test_calls_that_fit_are_taken(an_a100, kernel):
    assert kernel.accepts(CALL)


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"device": torch.device("cpu")},
        {"in_features": 72},
        {"dtype": torch.float32},
        {"product": INPUT_GRADIENT},
        {"tokens": 0},
        {"out_features": 2**20, "in_features": 2**13, "tokens": 2**11},
    ],
)
def test_other_calls_are_declined(an_a100, kernel, change):
    assert not kernel.accepts(replace(CALL, **change))


def test_what_only_one_of_both_takes(an_a100):
    for change, decodes in (({"tokens": 65}, False), ({"kind": "int4"}, True)):
        assert nvidia.DECODE.accepts(replace(CALL, **change)) is decodes
        assert nvidia.GEMM.accepts(replace(CALL, **change)) is not decodes


@BOTH
def test_gpus_without_sparse_tensor_cores_are_declined(an_a100, monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernel.accepts(CALL)


def test_a_misaligned_tensor_is_copied():
    shifted = torch.arange(65, dtype=torch.int16)[1:].view(1, 64)
    copy = aligned(shifted, "x")
    assert copy.data_ptr() != shifted.data_ptr() and torch.equal(copy, shifted)
    assert aligned(copy, "x") is copy


# --- on a GPU -------------------------------------------------------------------------------------------------------
def _to_gpu(weight: Weight24) -> Weight24:
    scale = None if weight.scale is None else weight.scale.cuda()
    return Weight24(weight.values.cuda(), weight.ids.cuda(), scale)


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows,columns", [(16, 64), (40, 192), (96, 640), (4096, 4096)])
    @pytest.mark.parametrize("tokens", [1, 3, 8, 13, 64])
    def test_decode_multiplies(self, tokens, rows, columns, dtype, kind):
        weight, x = random_weight(rows, columns, dtype, kind), torch.randn(tokens, columns).to(dtype)
        multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
        shape = nvidia.decode_shape(rows, columns, tokens, kind, multiprocessors)
        for k_parts, bias in ((1, None), (3, torch.randn(rows).to(dtype))):
            on_gpu = None if bias is None else bias.cuda()
            y = nvidia.decode(x.cuda(), _to_gpu(weight), on_gpu, replace(shape, k_parts=k_parts))
            assert error(y.cpu(), expected(x, weight, bias)) < TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens,rows,columns", [(1, 16, 64), (13, 40, 192), (200, 144, 320), (300, 4096, 4096)])
    @pytest.mark.parametrize("k_parts", [1, 3])
    def test_gemm_multiplies(self, k_parts, tokens, rows, columns, dtype):
        weight, x = random_weight(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
        bias = torch.randn(rows).to(dtype)
        shape = replace(nvidia.gemm_shape(rows, columns, tokens, multiprocessors=132), k_parts=k_parts)
        y = nvidia.gemm(x.cuda(), _to_gpu(weight), bias.cuda(), shape)
        assert error(y.cpu(), expected(x, weight, bias)) < TOLERANCE[dtype]

    @pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kernels_work(self, dtype, kind):
        call = Call24(torch.device("cuda", 0), dtype, kind, 64, 64, 1)
        assert nvidia.DECODE.accepts(call) and nvidia.DECODE.works(call)
        assert nvidia.GEMM.accepts(call) is (kind == "dense") and nvidia.GEMM.works(replace(call, kind="dense"))

    def test_decode_is_the_same_from_run_to_run(self):
        weight, x = _to_gpu(random_weight(96, 4096, torch.bfloat16)), torch.randn(5, 4096).bfloat16().cuda()
        first = nvidia.DECODE.run(x, weight, None)
        assert all(torch.equal(nvidia.DECODE.run(x, weight, None), first) for _ in range(10))

    def test_decode_can_be_captured_in_a_graph(self):
        weight, x = _to_gpu(random_weight(4096, 4096, torch.bfloat16)), torch.zeros(1, 4096).bfloat16().cuda()
        nvidia.DECODE.run(x, weight, None)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nvidia.DECODE.run(x, weight, None)
        x.copy_(torch.randn(1, 4096))
        graph.replay()
        assert torch.equal(y, nvidia.DECODE.run(x, weight, None))
