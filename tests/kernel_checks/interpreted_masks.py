# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernels for masks in Triton's interpreter; test_triton_masks.py runs them in a process of their own."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import interpreter, only_ops  # noqa: F401
from kernel_checks.mask_cases import KINDS, Case, errors
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hf_nmsparse.ops import NoiseKey, gpu_masks, triton_noise
from hf_nmsparse.ops.linear24 import probe
from hf_nmsparse.ops.philox import philox4x32
from hf_nmsparse.pattern import NMPattern


def _instruction(self, text, constraints, values, types, is_pure, pack):
    """The assembly of the kernels; logarithms and reciprocals with the largest error that the PTX ISA allows, up or down."""
    x = values[0].data
    side = np.sign(np.sin(1e4 * x))
    if text.startswith("mov.b32"):
        return SimpleNamespace(get_result=lambda index: TensorHandle(x, tl.int32))
    if text.startswith("rcp.approx.ftz.f32"):
        exact = 1 / x.astype(np.float64)
        found = exact * (1 + side * 2.0**-23)
    else:
        assert text.startswith("lg2.approx.ftz.f32")
        exact = np.log2(x.astype(np.float64))
        found = exact + np.where((x > 0.5) & (x < 2), 1, np.abs(exact)) * side * 2.0**-22
    rounded = found.astype(np.float32)
    return SimpleNamespace(get_result=lambda index: TensorHandle(rounded, tl.float32))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The launching code on tensors of the CPU; outputs begin as NaN."""
    interpreter.close_gaps()
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", _instruction)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)
    interpreter.open_gaps()


def computed(case: Case, wanted=(True, True)) -> tuple[torch.Tensor | None, ...]:
    """W * M, dW and dlogits by the kernels."""
    rest = (case.weight, case.logits, case.pattern, case.key, case.state)
    return gpu_masks.masked_weight(*rest), *gpu_masks.gradients(case.grad, *rest, wanted)


@pytest.mark.parametrize("pattern,per_weight", KINDS)
def test_agrees_with_float64(pattern, per_weight):
    case = Case.random(pattern, 2 if pattern.endswith("4") else 1, 61, per_weight)
    assert max(errors(computed(case), case)) < 2e-6


# Less than a group, and several tiles and programs a row.
@pytest.mark.parametrize(
    "in_features,per_weight", [(1, False), (3, False), (1, True), (3, True), (1199, True), (1216, True)]
)
def test_agrees_with_float64_where_rows_are_short_or_long(in_features, per_weight, monkeypatch):
    monkeypatch.setattr(gpu_masks, "_TILES", 2)
    case = Case.random("2:4", 2, in_features, per_weight)
    assert max(errors(computed(case), case)) < 2e-6


@pytest.mark.parametrize("pattern,per_weight", [("2:4", False), ("3:8", True)])
def test_agrees_with_float64_without_instructions_of_nvidia(pattern, per_weight, monkeypatch):
    monkeypatch.setattr(gpu_masks, "_is_nvidia", lambda: False)
    case = Case.random(pattern, 2, 61, per_weight)
    assert max(errors(computed(case), case)) < 1e-6


@pytest.mark.parametrize(
    "pattern,rows,in_features,per_weight", [("1:4", 4, 509, False), ("2:4", 4, 509, True), ("4:8", 2, 1021, True)]
)
def test_agrees_with_float64_where_masks_are_nearly_decided(pattern, rows, in_features, per_weight):
    case = Case.random(pattern, rows, in_features, per_weight, scale=500.0, temperature=0.05)
    assert max(errors(computed(case), case)) < 5e-5


@pytest.mark.parametrize(
    "pattern,per_weight,dtype,logit_dtype",
    [
        ("2:4", False, torch.float16, torch.float32),
        ("2:4", False, torch.bfloat16, torch.bfloat16),
        ("2:4", True, torch.bfloat16, torch.float32),
        ("2:4", True, torch.float32, torch.bfloat16),
        ("4:8", True, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_is_right_to_one_rounding(pattern, per_weight, dtype, logit_dtype):
    case = Case.random(pattern, 1, 302, per_weight, dtype=dtype, logit_dtype=logit_dtype)
    # The interpreter rounds to bfloat16 towards zero.
    for found, exact in zip(computed(case), case.exact(), strict=True):
        limit = torch.finfo(found.dtype).eps * exact.abs() + 1e-6 * exact.abs().max()
        assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("per_weight", [False, True])
def test_makes_only_what_is_wanted(per_weight):
    case = Case.random("2:4", 2, 40, per_weight)
    before, whole = (case.weight.clone(), case.logits.clone()), computed(case)[1:]
    for wanted in (True, False), (False, True):
        for gradient, full, want in zip(computed(case, wanted)[1:], whole, wanted, strict=True):
            assert torch.equal(gradient, full) if want else gradient is None
    assert torch.equal(before[0], case.weight) and torch.equal(before[1], case.logits)


@pytest.mark.parametrize("per_weight", [False, True])
def test_tensors_that_are_not_contiguous(per_weight):
    case = Case.random("2:4", 2, 48, per_weight)
    apart = Case(
        *(t.transpose(0, -1).contiguous().transpose(0, -1) for t in (case.weight, case.logits, case.grad)),
        *(case.pattern, case.key, case.state),
    )
    assert not apart.weight.is_contiguous()
    for found, expected in zip(computed(apart), computed(case), strict=True):
        assert torch.equal(found, expected) and found.is_contiguous()


@pytest.mark.parametrize("step,draw,seed,layer", [(0, 0, 0, 0), (2**32 - 1,) * 4, (2**31, 1, 2**31 - 1, 2**31)])
def test_every_word_of_key_and_moment_counts(step, draw, seed, layer):
    case = Case.random("2:4", 2, 32, step=step, draw=draw, key=NoiseKey(seed, layer))
    assert max(errors(computed(case), case)) < 1e-6


@triton.jit
def bits_of(groups, moment, result, seed, layer, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, COUNT)
    index = tl.load(groups + at)
    step, draw = tl.load(moment).to(tl.uint32), tl.load(moment + 1).to(tl.uint32)
    words = triton_noise.uniform_bits(
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        BLOCK,
        seed.to(tl.uint32, bitcast=True),
        layer.to(tl.uint32, bitcast=True),
        step,
        draw,
    )
    for i in tl.static_range(6):
        tl.store(result + i * COUNT + at, words[i].to(tl.int64))


@pytest.mark.parametrize("block", [0, 4])
def test_uniforms_are_those_of_philox_bit_for_bit(block):
    groups = torch.cat([torch.arange(32), torch.randint(0, 2**40, (32,))])
    step, draw, seed, layer = torch.randint(0, 2**32, (4,)).tolist()
    found = torch.empty(6, 64, dtype=torch.int64)
    words = gpu_masks._signed(seed), gpu_masks._signed(layer)
    bits_of[(1,)](groups, torch.tensor([step, draw]), found, *words, COUNT=64, BLOCK=block)
    counter = (groups & 0xFFFFFFFF, block + (groups >> 32 << 16), *(torch.full_like(groups, n) for n in (step, draw)))
    a, b, c, d = philox4x32(NoiseKey(seed, layer), counter)
    mixed = (a & 0x7FF | (b & 0x3FF) << 11, c & 0x7FF | (d & 0x3FF) << 11)
    assert torch.equal(found, 4 * torch.stack([*(word >> 11 for word in (a, b, c, d)), *mixed]))


@triton.jit
def gumbel_of(bits, result, COUNT: tl.constexpr, NVIDIA: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(result + at, triton_noise.gumbel_log2(tl.load(bits + at).to(tl.uint32), NVIDIA))


@pytest.mark.parametrize("nvidia", [True, False])
def test_noise_is_finite_and_right_at_both_ends(nvidia):
    ends = [*range(512), *range(2**21 - 512, 2**21)]
    bits = torch.tensor([*ends, *torch.randint(0, 2**21, (1024,)).tolist()])
    found = torch.empty(2048)
    gumbel_of[(1,)](4 * bits, found, COUNT=2048, NVIDIA=nvidia)
    exact = -torch.log2(-torch.log2((bits.double() + 0.5) * 2.0**-21))
    # The largest, 21.5, to the instruction's relative error and one rounding.
    assert found.isfinite().all() and ((found - exact).abs() < 8e-6).all()


@pytest.mark.parametrize(
    "pattern,method,dtype", [("2:4", "candidates", torch.bfloat16), ("2:4", "sums", torch.float32)]
)
def test_the_kernels_pass_their_trial(pattern, method, dtype):
    case = (torch.device("cpu"), dtype, dtype, NMPattern(pattern), method)
    assert probe.failure(lambda: gpu_masks._is_right(*case)) is None


@pytest.mark.parametrize(
    "per_weight,mistake",
    [
        (False, {"KEEPERS": (1 << 24) - 1}),
        (False, {"ALLOWED": 0b010101}),
        (True, {"KEPT": 0b1010_0101_1100_0011_0110_1001}),
        (True, {"TAIL": 0}),
        (True, {"METHOD": "walk", "N": 1}),
    ],
    ids=str,
)
def test_a_wrong_kernel_is_noticed(per_weight, mistake, monkeypatch):
    case = Case.random("2:4", 3, 62, per_weight)
    right = gpu_masks.compile_time
    monkeypatch.setattr(gpu_masks, "compile_time", lambda *given: right(*given) | mistake)
    assert max(errors(computed(case), case)) > 1e-3


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4"])
def test_the_walk_is_right_where_sums_over_candidates_are_taken(pattern, monkeypatch):
    case = Case.random(pattern, 2, 61, per_weight=True)
    monkeypatch.setattr(gpu_masks, "_MOST_SUMS", 0)
    assert gpu_masks.method(case.logits, case.pattern) == "walk"
    assert max(errors(computed(case), case)) < 1e-6
