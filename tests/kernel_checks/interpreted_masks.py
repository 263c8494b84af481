# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernels for masks in Triton's interpreter; test_triton_masks.py runs them in a process of their own."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import interpreter
from kernel_checks.mask_cases import PATTERNS, Case, errors
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hf_nmsparse import NMPattern
from hf_nmsparse.ops import NoiseKey, gpu_masks, triton_masks
from hf_nmsparse.ops.linear24 import probe
from hf_nmsparse.ops.philox import philox4x32


def _instruction(self, text, constraints, values, types, is_pure, pack):
    """The assembly of the kernels; logarithms with the largest error that the PTX ISA allows, up or down."""
    x = values[0].data
    if text.startswith("mov.b32"):
        return SimpleNamespace(get_result=lambda index: TensorHandle(x, tl.int32))
    assert text.startswith("lg2.approx.ftz.f32")
    exact = np.log2(x.astype(np.float64))
    scale = np.where((x > 0.5) & (x < 2), 1, np.abs(exact))
    rounded = (exact + scale * np.sign(np.sin(1e4 * x)) * 2.0**-22).astype(np.float32)
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


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_float64(pattern):
    case = Case.random(pattern, 2, 61)
    assert max(errors(computed(case), case)) < 1e-6


@pytest.mark.parametrize("in_features", [1, 3, 1199, 1216])  # less than a group, and several programs a row
def test_agrees_with_float64_where_rows_are_short_or_long(in_features):
    case = Case.random("2:4", 2, in_features)
    assert max(errors(computed(case), case)) < 1e-6


def test_agrees_with_float64_without_instructions_of_nvidia(monkeypatch):
    monkeypatch.setattr(gpu_masks, "_is_nvidia", lambda: False)
    case = Case.random("2:4", 2, 61)
    assert max(errors(computed(case), case)) < 1e-6


@pytest.mark.parametrize("pattern", ["1:4", "2:4"])
def test_agrees_with_float64_where_masks_are_nearly_decided(pattern):
    case = Case.random(pattern, 4, 509, scale=500.0, temperature=0.05)
    assert max(errors(computed(case), case)) < 5e-5


@pytest.mark.parametrize("logit_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_right_to_one_rounding(dtype, logit_dtype):
    case = Case.random("2:4", 3, 1100, dtype=dtype, logit_dtype=logit_dtype)
    # The interpreter rounds to bfloat16 towards zero.
    for found, exact in zip(computed(case), case.exact(), strict=True):
        limit = torch.finfo(found.dtype).eps * exact.abs() + 1e-6 * exact.abs().max()
        assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_makes_only_what_is_wanted(wanted):
    case = Case.random("2:4", 2, 40)
    before = case.weight.clone(), case.logits.clone()
    found, full = computed(case, wanted)[1:], computed(case)[1:]
    for gradient, whole, want in zip(found, full, wanted, strict=True):
        assert torch.equal(gradient, whole) if want else gradient is None
    assert torch.equal(before[0], case.weight) and torch.equal(before[1], case.logits)


def test_tensors_that_are_not_contiguous():
    case = Case.random("2:4", 5, 48)
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
    words = triton_masks.uniform_bits(
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
    tl.store(result + at, triton_masks.gumbel_log2(tl.load(bits + at).to(tl.uint32), NVIDIA))


@pytest.mark.parametrize("nvidia", [True, False])
def test_noise_is_finite_and_right_at_both_ends(nvidia):
    ends = [*range(512), *range(2**21 - 512, 2**21)]
    bits = torch.tensor([*ends, *torch.randint(0, 2**21, (1024,)).tolist()])
    found = torch.empty(2048)
    gumbel_of[(1,)](4 * bits, found, COUNT=2048, NVIDIA=nvidia)
    exact = -torch.log2(-torch.log2((bits.double() + 0.5) * 2.0**-21))
    # The largest, 21.5, to the instruction's relative error and one rounding.
    assert found.isfinite().all() and ((found - exact).abs() < 8e-6).all()


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "7:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_pass_their_trial(pattern, dtype):
    given = torch.device("cpu"), dtype, dtype, NMPattern(pattern)
    assert probe.failure(lambda: gpu_masks._is_right(*given)) is None


@pytest.mark.parametrize("mistake", [{"KEEPERS": (1 << 24) - 1}, {"ALLOWED": 0b010101}])
def test_a_wrong_kernel_is_noticed(mistake, monkeypatch):
    case = Case.random("2:4", 3, 62)
    right = gpu_masks.compile_time
    monkeypatch.setattr(gpu_masks, "compile_time", lambda *given: right(*given) | mistake)
    assert max(errors(computed(case), case)) > 1e-3
