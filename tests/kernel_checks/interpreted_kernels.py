# SPDX-License-Identifier: Apache-2.0
"""Tests of the portable kernel in Triton's interpreter; test_triton_kernels.py runs them in a process of their own."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import interpreter
from test_gluon_kernels import error, expected, random_weight

from hf_nmsparse.ops.linear24 import Weight24, portable, probe

# Of the norm: one rounding of the result. The interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 5e-4, torch.float32: 1e-6}
DTYPES = list(TOLERANCE)
KINDS = ["dense", "int8", "int4"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The launching code on tensors of the CPU; outputs begin as NaN."""
    interpreter.close_gaps()
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=16))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)
    interpreter.open_gaps()


@triton.jit
def product(a, b, y):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_the_interpreter_multiplies_bfloat16_only_once_its_gap_is_closed():
    a, b, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    product[(1,)](a, b, y)
    assert error(y, a.double() @ b.double()) < 1e-6
    interpreter.open_gaps()
    product[(1,)](a, b, y)
    assert error(y, a.double() @ b.double()) > 1  # else Triton has mended it and the patch can go


@triton.jit
def converted(x, y):
    at = tl.arange(0, 16)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


def test_the_interpreter_converts_integers_to_bfloat16_only_once_its_gap_is_closed():
    x, y = torch.arange(-8, 8, dtype=torch.int8), torch.empty(16, dtype=torch.bfloat16)
    converted[(1,)](x, y)
    assert torch.equal(y, x.bfloat16())
    interpreter.open_gaps()
    converted[(1,)](x, y)
    assert not torch.equal(y, x.bfloat16())


def test_memory_outside_of_a_tensor_raises():
    x, y = torch.zeros(16, dtype=torch.int8), torch.empty(15, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="1 of 16 addresses are outside"):
        converted[(1,)](x, y)
    with pytest.raises(Exception, match="1 of 16 addresses are outside"):
        converted[(1,)](x[1:], y.new_empty(16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens,rows,columns,narrow",
    [(1, 8, 72, False), (3, 72, 264, True), (17, 33, 200, False), (40, 24, 264, False), (1, 8, 8, True)],
)
def test_multiplies(tokens, rows, columns, narrow, dtype, kind):
    weight, x = random_weight(rows, columns, dtype, kind), torch.randn(tokens, columns).to(dtype)
    bias = None if narrow else torch.randn(rows).to(dtype)
    shape = portable.tile_shape(rows, columns, tokens, narrow, multiprocessors=16)
    assert error(portable.multiply(x, weight, bias, shape), expected(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_multiplies_many_tokens(kind):
    weight, x, bias = random_weight(72, 136, torch.bfloat16, kind), torch.randn(130, 136), torch.randn(72)
    x, bias = x.bfloat16(), bias.bfloat16()
    shape = portable.tile_shape(72, 136, 130, False, multiprocessors=1)
    assert shape.tokens == 128
    assert error(portable.multiply(x, weight, bias, shape), expected(x, weight, bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_k_are_added_with_the_bias_once(kind):
    weight, x, bias = random_weight(24, 1160, torch.float32, kind), torch.randn(3, 1160), torch.randn(24)
    shape = portable.tile_shape(24, 1160, 3, True, multiprocessors=16)
    assert shape.k_parts > 1
    y = portable.multiply(x, weight, bias, shape)
    assert error(y, expected(x, weight, bias)) < TOLERANCE[torch.float32]
    assert torch.equal(y, portable.multiply(x, weight, bias, shape))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_quantised_value_is_exact(kind, dtype):
    """One token that is 1 in one column: y is that column of W."""
    values = torch.arange(-128, 128).view(8, 32).char() if kind == "int8" else torch.arange(256).view(16, 16).byte()
    ids = torch.full((len(values), 8), 0x44, dtype=torch.uint8)
    weight, x = Weight24(values, ids, torch.ones(len(values), 1, dtype=dtype)), torch.eye(64, dtype=dtype)
    y = portable.multiply(x, weight, None, portable.tile_shape(len(values), 64, 64, False, multiprocessors=16))
    assert torch.equal(y.double(), expected(x, weight, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_damaged_ids_touch_no_foreign_memory(kind, tokens):
    weight = random_weight(40, 200, torch.bfloat16, kind)
    ids = torch.randint(0, 256, weight.ids.shape, dtype=torch.uint8)
    damaged = Weight24(weight.values, ids, weight.scale)
    shape = portable.tile_shape(40, 200, tokens, False, multiprocessors=16)
    y = portable.multiply(torch.randn(tokens, 200).bfloat16(), damaged, None, shape)
    assert y.shape == (tokens, 40) and bool(y.isfinite().all())


def test_leading_dimensions_an_input_scale_and_rows_apart():
    plain = random_weight(40, 136, torch.float32, "int8")
    apart = torch.cat([plain.values, plain.values], 1)[:, : plain.values.shape[1]]
    weight = Weight24(apart, plain.ids, plain.scale, input_scale=torch.rand(136))
    x = torch.randn(2, 3, 136)
    y = portable.PORTABLE.run(x, weight, None)
    assert y.shape == (2, 3, 40) and error(y, x.double() @ weight.dense().double().t()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_passes_the_probe(dtype, kind):
    assert probe.works("Triton", portable._run, torch.device("cpu"), dtype, kind)
