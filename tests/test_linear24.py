# SPDX-License-Identifier: Apache-2.0
"""The 2:4 linear operator: values, gradients, dtypes, compilation, and room for other backends."""

import pytest
import torch
import torch.nn.functional as F

from hf_nmsparse import ops
from hf_nmsparse.ops import linear24
from hf_nmsparse.pattern import NMPattern

PATTERN = NMPattern(2, 4)
OP = torch.ops.nmsparse.linear_24.default


def packed_weight(out_features, in_features, dtype=torch.float32):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = ops.top_n_mask(weight.abs(), PATTERN)
    return weight * mask, mask, ops.Weight24(*ops.pack_24(weight, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_equals_the_dense_linear_for_every_dtype_and_leading_shape(dtype, leading):
    weight, _, packed = packed_weight(12, 24, dtype)
    x, bias = torch.randn(*leading, 24).to(dtype), torch.randn(12).to(dtype)
    assert torch.equal(ops.linear_24(x, packed, bias), F.linear(x, weight, bias))
    assert torch.equal(ops.linear_24(x, packed), F.linear(x, weight))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_equal_those_of_the_masked_dense_linear(with_bias):
    weight, mask, packed = packed_weight(8, 16, torch.float64)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True) if with_bias else None
    values.requires_grad_()
    weight.requires_grad_()
    leaves = [t for t in (x, bias) if t is not None]
    grad = torch.randn(2, 3, 8, dtype=torch.float64)
    found = torch.autograd.grad(ops.linear_24(x, packed, bias), [values, *leaves], grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), [weight, *leaves], grad)
    torch.testing.assert_close(found[0], expected[0][mask].reshape(8, 8))
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_second_order_gradients():
    _, _, packed = packed_weight(4, 8, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, v: ops.linear_24(x, v, ids), (x, values.requires_grad_()))


def test_input_is_kept_for_backward_only_where_the_values_train():
    _, _, packed = packed_weight(4, 8)
    x = torch.randn(3, 8, requires_grad=True)
    for trains in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.linear_24(x, values.detach().requires_grad_(trains), ids)
        assert any(t.shape == x.shape for t in kept) == trains


@pytest.mark.parametrize("case", ["all", "frozen", "transposed", "vector", "empty"])
def test_opcheck(case):
    _, _, packed = packed_weight(6, 16)
    x, bias = torch.randn(2, 3, 16), torch.randn(6)
    arguments = {
        "all": (x.requires_grad_(), values.clone().requires_grad_(), ids, bias.requires_grad_()),
        "frozen": (x, values, ids),
        "transposed": (x.detach().transpose(0, 1), values, ids),
        "vector": (torch.randn(16), values, ids),
        "empty": (torch.randn(0, 16), values, ids),
    }[case]
    assert set(torch.library.opcheck(OP, arguments).values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks_forward_and_backward():
    _, _, packed = packed_weight(8, 16)
    values.requires_grad_()
    x = torch.randn(4, 16, requires_grad=True)

    def loss(x, values):
        return F.silu(ops.linear_24(x, packed)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, values), [x, values])
    for mine, theirs in zip(torch.autograd.grad(compiled(x, values), [x, values]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_mixed_dtypes_raise_as_in_a_dense_linear():
    weight, _, packed = packed_weight(4, 8, torch.bfloat16)
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError):
        F.linear(x, weight)
    with pytest.raises(RuntimeError, match=r"same dtype.*float32.*bfloat16"):
        ops.linear_24(x, packed)
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.linear_24(x.bfloat16(), values, ids, torch.zeros(4))


def test_autocast_casts_as_for_a_dense_linear():
    weight, _, packed = packed_weight(4, 8)
    x, bias = torch.randn(2, 8), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ops.linear_24(x, packed, bias), F.linear(x, weight, bias)
        exact = ops.linear_24(x.double(), values.double(), ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert exact.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, i: (x[..., :8], v, i), "in_features=16"),
        (lambda x, v, i: (x, v[:, :4], i), r"values \[out, in/2\]"),
        (lambda x, v, i: (x, v, i.long()), "uint8 ids"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    _, _, packed = packed_weight(4, 16)
    with pytest.raises(RuntimeError, match=message):
        ops.linear_24(*change(torch.randn(2, 16), values, ids))


def test_ids_have_the_bytes_of_the_format():
    # Groups of one row: kept (0,1), (2,3), then (0,3), (1,2): ids low bits first.
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0]])
    _, ids = ops.pack_24(torch.arange(16.0).reshape(1, 16), mask)
    assert ids.tolist() == [[0b11_10_01_00, 0b10_01_11_00]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ids_viewed_as_int16_are_the_metadata_of_cutlass(dtype):
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight, _, packed = packed_weight(64, 128, dtype)
    their_values, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    raw = ids.view(torch.int16)
    offsets = conversions._calculate_meta_reordering_scatter_offsets(*raw.shape, torch.int16, raw.device)
    mine = torch.empty_like(raw).view(-1).scatter_(0, offsets, raw.reshape(-1)).view_as(raw)
    assert torch.equal(mine, reordered)
    assert torch.equal(values, their_values)


def test_a_registered_backend_takes_the_calls_it_accepts(monkeypatch):
    _, _, packed = packed_weight(4, 8)
    monkeypatch.setattr(linear24, "_backends", list(linear24._backends))
    zeros = ops.Linear24Backend("zeros", lambda v, tokens: tokens < 3, lambda x, v, i, b: x.new_zeros(len(x), len(v)))
    ops.register_linear_24_backend(zeros)
    assert ops.linear_24_backend(values, 2).name == "zeros"
    assert ops.linear_24_backend(values, 3).name == "reference"
    assert not ops.linear_24(torch.ones(2, 8), values, ids).any()
    assert ops.linear_24(torch.ones(3, 8), values, ids).any()


@pytest.mark.slow
def test_compiles_with_inductor():
    _, _, packed = packed_weight(8, 16)
    x = torch.randn(4, 16)
    compiled = torch.compile(lambda x: F.silu(ops.linear_24(x, packed)), fullgraph=True)
    torch.testing.assert_close(compiled(x), F.silu(ops.linear_24(x, packed)))
