# SPDX-License-Identifier: Apache-2.0
"""The 2:4 linear operator: values, gradients, dtypes, compilation, and the choice among kernels."""

import pytest
import torch
import torch.nn.functional as F

from hf_nmsparse import ops
from hf_nmsparse.ops.linear24 import dispatch
from hf_nmsparse.pattern import NMPattern

PATTERN = NMPattern(2, 4)
OP = torch.ops.nmsparse.linear_24.default
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
QUANTISED = ["int8", "int4"]
CPU = torch.device("cpu")


def masked_weight(out_features, in_features, dtype=torch.float32):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = ops.top_n_mask(weight.abs(), PATTERN)
    return weight * mask, mask


def packed_weight(out_features, in_features, dtype=torch.float32):
    weight, mask = masked_weight(out_features, in_features, dtype)
    return weight, mask, ops.Weight24(*ops.pack_24(weight, mask))


def weight_of_kind(kind, out_features, in_features, dtype=torch.float32, scaled=True):
    """A packed weight of any kind of values; quantised ones with an input scale."""
    _, _, packed = packed_weight(out_features, in_features, dtype)
    if kind == "dense":
        return packed
    values, scale = ops.quantize_values(packed.values, kind)
    factors = torch.linspace(0.5, 1.5, in_features).to(dtype) if scaled else None
    return ops.Weight24(values, packed.ids, scale.to(dtype), factors)


def assert_sum(found, exact, terms, num_terms):
    """`found` is a sum that is `exact` in float64, as exactly as its dtype lets it be; `terms` are those sums of |terms|.

    Terms may be rounded before they are added and the sum after, in the dtype; between, at most float32 is lost
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2).
    """
    between = torch.finfo(found.dtype if found.dtype == torch.float64 else torch.float32).eps / 2
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= (2 * torch.finfo(found.dtype).eps + num_terms * between) * terms).all()


def assert_right(found, x, packed, bias=None):
    """`found` is x W^T + b."""
    weight = ops.Weight24(
        *(t.double() if t is not None and t.is_floating_point() else t for t in packed.tensors)
    ).dense()
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    assert found.dtype == x.dtype
    assert_sum(found, exact, terms, packed.in_features // 2)


# --- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (33,), (3, 43)])
@pytest.mark.parametrize("kind", ["dense", *QUANTISED])
def test_computes_the_product_for_every_dtype_kind_and_leading_shape(dtype, leading, kind):
    packed = weight_of_kind(kind, 12, 24, dtype)
    x, bias = torch.randn(*leading, 24).to(dtype), torch.randn(12).to(dtype)
    assert_right(ops.linear_24(x, packed, bias), x, packed, bias)
    assert_right(ops.linear_24(x, packed), x, packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 8), (3, 40), (17, 136), (70, 264), (129, 72)])
@pytest.mark.parametrize("kind", ["dense", *QUANTISED])
@pytest.mark.parametrize("tokens", [1, 3, 67])
def test_computes_the_product_for_odd_sizes(dtype, sizes, kind, tokens):
    packed = weight_of_kind(kind, *sizes, dtype, scaled=tokens > 1)
    x, bias = torch.randn(tokens, sizes[1]).to(dtype), torch.randn(sizes[0]).to(dtype)
    assert_right(ops.linear_24(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", *QUANTISED])
@pytest.mark.parametrize("tokens", [1, 67])
def test_every_kernel_that_accepts_a_call_computes_it(dtype, kind, tokens):
    packed = weight_of_kind(kind, 17, 136, dtype)
    x, bias, grad = torch.randn(tokens, 136).to(dtype), torch.randn(17).to(dtype), torch.randn(tokens, 17).to(dtype)
    forward = ops.Call24.of(x, packed)
    names = [kernel.name for kernel in ops.kernels_for(forward)]
    assert "unpacked each call" in names and len(set(names)) == len(names)
    for kernel in ops.kernels_for(forward):
        assert_right(kernel.run(x, packed, bias), x, packed, bias)
    weight = packed.dense().double()
    for kernel in ops.kernels_for(ops.Call24.of(grad, packed, ops.INPUT_GRADIENT)):
        found = kernel.run(grad, packed, None)
        assert found.dtype == dtype
        assert_sum(found, grad.double() @ weight, grad.double().abs() @ weight.abs(), 17)


def test_strided_operands_are_read_right():
    weight, _, packed = packed_weight(6, 16)
    x, bias = torch.randn(16, 3).t(), torch.randn(6, 2)[:, 0]
    strided = ops.Weight24(packed.values.t().contiguous().t(), packed.ids.t().contiguous().t())
    torch.testing.assert_close(ops.linear_24(x, strided, bias), F.linear(x, weight, bias))


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
    raw = packed.ids.view(torch.int16)
    offsets = conversions._calculate_meta_reordering_scatter_offsets(*raw.shape, torch.int16, raw.device)
    mine = torch.empty_like(raw).view(-1).scatter_(0, offsets, raw.reshape(-1)).view_as(raw)
    assert torch.equal(mine, reordered)
    assert torch.equal(packed.values, their_values)


# --- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float64, 2), (torch.float32, 2), (torch.float32, 50)])
def test_gradients_equal_those_of_the_masked_dense_linear(with_bias, dtype, rows):
    weight, mask, packed = packed_weight(8, 16, dtype)
    x = torch.randn(rows, 3, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(8, dtype=dtype, requires_grad=True) if with_bias else None
    packed.values.requires_grad_()
    weight.requires_grad_()
    leaves = [t for t in (x, bias) if t is not None]
    grad = torch.randn(rows, 3, 8, dtype=dtype)
    found = torch.autograd.grad(ops.linear_24(x, packed, bias), [packed.values, *leaves], grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), [weight, *leaves], grad)
    torch.testing.assert_close(found[0], expected[0][mask].reshape(8, 8))
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rows", [2, 100])
def test_gradients_pass_through_quantised_values_to_input_and_bias(kind, scaled, rows):
    packed = weight_of_kind(kind, 10, 136, scaled=scaled)
    x, bias = torch.randn(rows, 136, requires_grad=True), torch.randn(10, requires_grad=True)
    grad = torch.randn(rows, 10)
    found = torch.autograd.grad(ops.linear_24(x, packed, bias), [x, bias], grad)
    expected = torch.autograd.grad(F.linear(x, packed.dense(), bias), [x, bias], grad)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_second_order_gradients():
    _, _, packed = packed_weight(4, 8, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    values = packed.values.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, v: ops.linear_24(x, ops.Weight24(v, packed.ids)), (x, values))


@pytest.mark.parametrize("kind", QUANTISED)
def test_second_order_gradients_of_what_comes_before_quantised_values(kind):
    packed = weight_of_kind(kind, 4, 8, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.linear_24(x.tanh(), packed), (x,))


def test_input_is_kept_for_backward_only_where_the_values_train():
    _, _, packed = packed_weight(4, 8)
    x = torch.randn(3, 8, requires_grad=True)
    for trains in (False, True):
        kept = []
        weight = ops.Weight24(packed.values.detach().requires_grad_(trains), packed.ids)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.linear_24(x, weight)
        assert any(t.shape == x.shape for t in kept) == trains


# --- the operator of torch ------------------------------------------------------------------------------------------
def opcheck_arguments(case):
    _, _, packed = packed_weight(6, 16)
    values, ids = packed.values, packed.ids
    x, bias = torch.randn(2, 3, 16), torch.randn(6)
    if case in QUANTISED:
        quantised = weight_of_kind(case, 6, 16)
        return x.requires_grad_(), quantised.values, ids, bias.requires_grad_(), quantised.scale, quantised.input_scale
    if case == "int8 without input scale":
        quantised = weight_of_kind("int8", 6, 16, scaled=False)
        return x, quantised.values, ids, None, quantised.scale
    return {
        "all": (x.clone().requires_grad_(), values.clone().requires_grad_(), ids, bias.clone().requires_grad_()),
        "frozen": (x, values, ids),
        "transposed": (x.transpose(0, 1), values, ids),
        "vector": (torch.randn(16), values, ids),
        "empty": (torch.randn(0, 16), values, ids),
    }[case]


@pytest.mark.parametrize(
    "case", ["all", "frozen", "transposed", "vector", "empty", *QUANTISED, "int8 without input scale"]
)
def test_opcheck(case):
    assert set(torch.library.opcheck(OP, opcheck_arguments(case)).values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks_forward_and_backward():
    _, _, packed = packed_weight(8, 16)
    values = packed.values.requires_grad_()
    x = torch.randn(4, 16, requires_grad=True)

    def loss(x, values):
        return F.silu(ops.linear_24(x, ops.Weight24(values, packed.ids))).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, values), [x, values])
    for mine, theirs in zip(torch.autograd.grad(compiled(x, values), [x, values]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", QUANTISED)
def test_compiles_with_quantised_values(kind):
    packed = weight_of_kind(kind, 8, 16)
    x = torch.randn(4, 16, requires_grad=True)

    def loss(x, values, ids, scale, input_scale):
        return F.silu(ops.linear_24(x, ops.Weight24(values, ids, scale, input_scale))).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, *packed.tensors), loss(x, *packed.tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", *QUANTISED])
def test_compiles_with_inductor(kind):
    packed = weight_of_kind(kind, 8, 16)
    x = torch.randn(4, 16)
    compiled = torch.compile(lambda x: F.silu(ops.linear_24(x, packed)), fullgraph=True)
    torch.testing.assert_close(compiled(x), F.silu(ops.linear_24(x, packed)))


# --- dtypes and errors ----------------------------------------------------------------------------------------------
def test_mixed_dtypes_raise_as_in_a_dense_linear():
    weight, _, packed = packed_weight(4, 8, torch.bfloat16)
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError):
        F.linear(x, weight)
    with pytest.raises(RuntimeError, match=r"same dtype.*float32.*bfloat16"):
        ops.linear_24(x, packed)
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.linear_24(x.bfloat16(), packed, torch.zeros(4))
    for kind in QUANTISED:
        with pytest.raises(RuntimeError, match=r"same dtype.*float32.*bfloat16"):
            ops.linear_24(x, weight_of_kind(kind, 4, 8, torch.bfloat16))


def test_autocast_casts_as_for_a_dense_linear():
    weight, _, packed = packed_weight(4, 8)
    x, bias = torch.randn(2, 8), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ops.linear_24(x, packed, bias), F.linear(x, weight, bias)
        exact = ops.linear_24(x.double(), ops.Weight24(packed.values.double(), packed.ids))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("kind", QUANTISED)
def test_autocast_leaves_quantised_values_alone(kind):
    packed = weight_of_kind(kind, 4, 8, scaled=False)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.linear_24(x, packed)
    cast = ops.Weight24(packed.values, packed.ids, packed.scale.bfloat16())
    assert_right(found, x.bfloat16(), cast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, i: (x[..., :8], v, i), "in_features=16"),
        (lambda x, v, i: (torch.tensor(1.0), v, i), "in_features=16"),
        (lambda x, v, i: (x, v[:, :4], i), r"values \[out, in/2\]"),
        (lambda x, v, i: (x, v, i.long()), "uint8 ids"),
        (lambda x, v, i: (x, v[:2], i), r"values of shape \[2, 8\].*expected \[4, 8\]"),
        (lambda x, v, i: (x, v, i, torch.zeros(3)), r"bias of shape \[3\], expected \[4\]"),
        (lambda x, v, i: (x, v.to("meta"), i), "values.* on meta, expected .* on cpu"),
        (lambda x, v, i: (x, v, i, None, None, torch.ones(8)), r"input_scale of shape \[8\].*expected \[16\]"),
        (lambda x, v, i: (x, v.to(torch.int8), i, None, torch.ones(4, 2)), r"scale of shape.*expected \[4, 1\]"),
        (lambda x, v, i: (x, v.to(torch.int8), i), "floating point values"),
        (lambda x, v, i: (x, v, i, None, torch.ones(4, 1)), r"need values|int8 and uint8"),
        (lambda x, v, i: (x, v.to(torch.int8), i, None, torch.ones(4, 1).long()), "floating point ones"),
    ],
)
def test_wrong_operands_are_refused(change, message):
    _, _, packed = packed_weight(4, 16)
    arguments = change(torch.randn(2, 16), packed.values, packed.ids)
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments)
    x, values, ids, bias, scale, input_scale = (*arguments, None, None, None)[:6]
    with pytest.raises(RuntimeError, match=message):
        ops.linear_24(x, ops.Weight24(values, ids, scale, input_scale), bias)


def test_operands_on_several_devices_are_refused():
    _, _, packed = packed_weight(4, 16)
    with pytest.raises(RuntimeError, match="x is on meta, the weight on cpu; move one of them"):
        OP(torch.randn(2, 16, device="meta"), packed.values, packed.ids)


# --- the choice of a kernel -----------------------------------------------------------------------------------------
@pytest.fixture
def own_kernels(monkeypatch):
    """What a test registers goes when it ends."""
    monkeypatch.setattr(dispatch, "_kernels", list(dispatch._kernels))
    yield
    ops.forget_choices()


def test_a_registered_kernel_takes_the_calls_it_accepts(own_kernels):
    def run(x, weight, bias):
        return x.new_full((*x.shape[:-1], weight.out_features), 7)

    _, _, packed = packed_weight(4, 8)
    ops.register_kernel(ops.Kernel24("all 7", lambda call: call.product == ops.FORWARD and call.tokens < 3, run))
    assert ops.choose_for(torch.ones(2, 8), packed).name == "all 7"
    assert ops.choose_for(torch.ones(1, 3, 8), packed).name != "all 7"
    assert (ops.linear_24(torch.ones(2, 8), packed) == 7).all()
    assert_right(ops.linear_24(torch.ones(3, 8), packed), torch.ones(3, 8), packed)


def test_a_kernel_may_compute_the_input_gradient_alone(own_kernels):
    def run(grad, weight, bias):
        return grad.new_full((*grad.shape[:-1], weight.in_features), 5)

    _, _, packed = packed_weight(4, 8)
    ops.register_kernel(ops.Kernel24("all 5", lambda call: call.product == ops.INPUT_GRADIENT, run))
    x = torch.ones(2, 8, requires_grad=True)
    y = ops.linear_24(x, packed)
    y.sum().backward()
    assert_right(y.detach(), x.detach(), packed)
    assert (x.grad == 5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_product_is_chosen_for_many_tokens_where_it_is_at_hand(dtype):
    few, many = (ops.Call24(CPU, dtype, "dense", 8, 16, tokens) for tokens in (1, 600))
    assert ops.choose_kernel(many, dense_at_hand=True) is None
    assert ops.choose_kernel(many) is not None and ops.choose_kernel(few) is not None
