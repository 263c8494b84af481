# SPDX-License-Identifier: Apache-2.0
"""The masked weight in C++: against the plain torch code in float64, which draws the same uniforms."""

import pytest
import torch
from kernel_checks.native_builds import BUILDS, put_in_place
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import NoiseKey, SamplingState, native_build, native_masks

KEY = NoiseKey(0xFFFFFFFF, 0x80000001)
GENTLE, SHARP = (100.0, 4.0), (500.0, 0.05)  # logit scale and temperature, at the start and the end of a training
TOLERANCE = {GENTLE: 1e-6, SHARP: 5e-5}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The kernels compiled for one instruction set take the place of those of this machine."""
    put_in_place(request.param, monkeypatch, native_masks)


@pytest.fixture
def native(monkeypatch):
    """The kernels of this machine; remembers which calls they took."""
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    taken = []
    run = native_masks._run
    monkeypatch.setattr(native_masks, "_run", lambda *given, **others: taken.append(others) or run(*given, **others))
    return taken


def state_of(moment, step=5, draw=2):
    scale, temperature = moment
    return SamplingState.of(temperature, scale, 1e-3, step=step, draw=draw)


def tensors(kind, pattern, out_features, in_features, dtype=torch.float32, logit_dtype=torch.float32):
    """Weight, logits and the gradient of the masked weight."""
    shape = (out_features, pattern.num_candidates, pattern.num_groups(in_features))
    logits = 0.01 * torch.randn(shape if kind == "candidates" else (out_features, in_features))
    weight, grad = torch.randn(2, out_features, in_features).to(dtype)
    return weight, logits.to(logit_dtype), grad


def forward_and_backward(weight, logits, grad, pattern, state):
    weight, logits = weight.detach().clone().requires_grad_(), logits.detach().clone().requires_grad_()
    result = ops.masked_weight(weight, logits, pattern, KEY, state)
    result.backward(grad)
    return result.detach(), weight.grad, logits.grad


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


CASES = [
    (kind, pattern)
    for pattern in ("2:4", "1:4", "1:2", "2:8", "3:5", "4:8", "8:16", "5:16")
    for kind in ("candidates", "elementwise")
    if kind == "elementwise" or NMPattern(pattern).num_candidates <= 28
]


@pytest.mark.parametrize("moment", [GENTLE, SHARP], ids=["gentle", "sharp"])
@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_forward_and_backward_agree_with_autograd_in_float64(build, kind, pattern, moment):
    pattern = NMPattern(pattern)
    for out_features, in_features in ((9, 16 * 17), (7, 403), (300, 2 * pattern.m + 1)):
        weight, logits, grad = tensors(kind, pattern, out_features, in_features)
        state = state_of(moment, step=0xFFFFFFFF, draw=7)
        expected = forward_and_backward(weight.double(), logits.double(), grad.double(), pattern, state)
        found = forward_and_backward(weight, logits, grad, pattern, state)
        assert native_masks.takes(weight, logits, pattern)
        errors = [relative_error(*both) for both in zip(found, expected, strict=True)]
        assert max(errors) <= TOLERANCE[moment], (errors, out_features, in_features)


@pytest.mark.parametrize("logit_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["candidates", "elementwise"])
def test_16_bit_results_are_those_of_float32_rounded(build, kind, dtype, logit_dtype):
    pattern, state = NMPattern("2:4"), state_of(GENTLE)
    weight, logits, grad = tensors(kind, pattern, 6, 200, dtype, logit_dtype)
    exact = forward_and_backward(weight.float(), logits.float(), grad.float(), pattern, state)
    for mine, full, one in zip(
        forward_and_backward(weight, logits, grad, pattern, state), exact, (dtype, dtype, logit_dtype), strict=True
    ):
        assert mine.dtype == one
        rounding = max(torch.finfo(one).eps, 2e-6)  # the order of sums may be another one
        torch.testing.assert_close(mine.float(), full.to(one).float(), rtol=rounding, atol=2e-6)


def test_transposed_weights_and_gradients_are_taken(native):
    pattern, state = NMPattern("2:4"), state_of(GENTLE)
    weight, logits, grad = tensors("candidates", pattern, 8, 24)
    plain = forward_and_backward(weight, logits, grad, pattern, state)
    turned = (tensor.t().contiguous().t() for tensor in (weight, grad))
    weight, grad = turned
    assert all(map(torch.equal, forward_and_backward(weight, logits, grad, pattern, state), plain))
    assert len(native) == 4


@pytest.mark.parametrize("kind", ["candidates", "elementwise"])
def test_results_do_not_depend_on_threads(native, kind):
    pattern, before = NMPattern("2:4"), torch.get_num_threads()
    weight, logits, grad = tensors(kind, pattern, 33, 300)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_and_backward(weight, logits, grad, pattern, state_of(GENTLE)))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_only_the_gradients_that_are_wanted_are_made(native):
    pattern = NMPattern("2:4")
    weight, logits, grad = tensors("candidates", pattern, 4, 16)
    logits.requires_grad_()
    ops.masked_weight(weight, logits, pattern, KEY, state_of(GENTLE)).backward(grad)
    assert native[-1]["grad_weight"] is None and native[-1]["grad_logits"] is not None


def test_candidates_are_drawn_as_often_as_their_logits_say(native):
    """Chi-square over candidates: the largest of logits with Gumbel noise is a draw from their softmax."""
    pattern, rows, groups = NMPattern("2:4"), 100, 500
    logits = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 0.2])[:, None].expand(rows, 6, groups).contiguous()
    masks = ops.masked_weight(torch.ones(rows, 4 * groups), logits, pattern, KEY, SamplingState.of(0.001, 1.0, step=1))
    codes = ops.mask_to_codes(masks > 0.5, pattern)
    assert native
    expected = rows * groups * logits[0, :, 0].softmax(0)
    counts = torch.bincount(codes.flatten(), minlength=6)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < 20.5  # 0.1 % of samples with 5 degrees of freedom are beyond
    # and neighbouring groups are independent: pairs of codes too
    pairs = torch.bincount((codes[:, :-1:2] * 6 + codes[:, 1::2]).flatten(), minlength=36).double()
    joint = torch.outer(expected, expected).flatten() / (rows * groups) ** 2 * pairs.sum()
    assert ((pairs - joint) ** 2 / joint).sum().item() < 66.6  # 35 degrees of freedom


def test_another_step_draw_seed_or_layer_is_another_mask(native):
    pattern = NMPattern("2:4")
    weight, logits, _ = tensors("candidates", pattern, 4, 64)

    def mask(key=KEY, **moment):
        return ops.masked_weight(weight, logits, pattern, key, state_of(GENTLE, **moment))

    first = mask()
    assert torch.equal(mask(), first)
    others = [mask(step=6), mask(draw=3), mask(NoiseKey(1, KEY.layer)), mask(NoiseKey(KEY.seed, 1))]
    assert not any(torch.equal(other, first) for other in others)


def test_what_the_kernel_does_not_take_goes_through_torch(native):
    pattern = NMPattern("2:4")
    weight, logits, _ = tensors("candidates", pattern, 4, 16)
    for given in [
        (weight.double(), logits, pattern),
        (weight, logits.double(), pattern),
        (weight.to("meta"), logits.to("meta"), pattern),
        (torch.ones(2, 8), torch.zeros(2, 70, 1), NMPattern("4:8")),
        (torch.ones(0, 8), torch.zeros(0, 8), pattern),
    ]:
        assert not native_masks.takes(*given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.masked_weight(
            mode.from_tensor(weight), mode.from_tensor(logits), pattern, KEY, SamplingState.of(4.0, 100.0)
        )
    assert fake.shape == weight.shape
    assert not native


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 4, 4), (3, 6, 4), (4, 12), (16,), (4, 6, 4, 1)])
def test_logits_of_another_shape_are_refused_before_anything_is_read(shape, native):
    with pytest.raises(RuntimeError, match=r"do not fit a weight of shape \[4, 16\] and 2:4; expected \[4, 6, 4\]"):
        ops.masked_weight(torch.ones(4, 16), torch.zeros(shape), NMPattern("2:4"), KEY, state_of(GENTLE))
    assert not native


def test_without_a_compiler_torch_computes_the_same(monkeypatch):
    pattern = NMPattern("2:4")
    given = (*tensors("candidates", pattern, 5, 40), pattern, state_of(GENTLE))
    found = forward_and_backward(*given)
    monkeypatch.setattr(native_masks, "native_library", lambda: None)
    for mine, eager in zip(found, forward_and_backward(*given), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def test_values_that_are_no_numbers_stay_in_their_group(native):
    pattern = NMPattern("2:4")
    weight, logits, _ = tensors("candidates", pattern, 2, 400)
    logits[0, 3, 50] = float("nan")
    spoiled = ops.masked_weight(weight, logits, pattern, KEY, state_of(GENTLE)).isnan().nonzero()
    assert spoiled[:, 0].unique().tolist() == [0] and set(spoiled[:, 1].tolist()) == set(range(200, 204))
