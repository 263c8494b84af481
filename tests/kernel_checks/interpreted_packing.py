# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernels that prune and pack in Triton's interpreter; test_triton_packing.py runs them in a process of their own."""

import contextlib

import pytest
import torch
from kernel_checks import interpreter, only_ops  # noqa: F401
from kernel_checks.packing_cases import DTYPES, bits_of, equal_bits, hard_numbers, pruned_bits

from hf_nmsparse import codec
from hf_nmsparse.ops import gpu_packing, reference, triton_packing
from hf_nmsparse.ops.linear24 import probe
from hf_nmsparse.pattern import NMPattern


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The launching code on tensors of the CPU; outputs begin as NaN or the largest integer."""
    interpreter.close_gaps()
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)
    interpreter.open_gaps()


def check_choice(scores, pattern):
    expected = reference.top_n_mask(scores, pattern)
    assert torch.equal(gpu_packing.top_n_mask(scores, pattern), expected)
    assert torch.equal(gpu_packing.top_n_codes(scores, pattern), codec.mask_to_codes(expected, pattern))


FULL, BRAIN, HALF = DTYPES


@pytest.mark.parametrize(
    ("pattern", "dtype", "columns"),
    [
        ("1:2", FULL, 80), ("1:2", BRAIN, 80), ("1:4", HALF, 80), ("2:4", FULL, 80), ("2:4", BRAIN, 80), ("2:4", HALF, 80),
        ("3:4", BRAIN, 80), ("1:8", HALF, 33), ("4:8", FULL, 33), ("4:8", BRAIN, 33), ("8:16", FULL, 33),
    ],
    ids=str,
)  # fmt: skip
def test_the_highest_of_each_group_are_kept(pattern, dtype, columns):
    check_choice(hard_numbers(2, columns, dtype), NMPattern(pattern))


@pytest.mark.parametrize("columns", [3, 1023, 1025])  # less than a group, and several programs a row
def test_short_and_long_rows(columns):
    check_choice(hard_numbers(2, columns, torch.bfloat16), NMPattern("2:4"))


@pytest.mark.parametrize(
    ("dtype", "scored"), [(FULL, None), (BRAIN, None), (HALF, None), (BRAIN, FULL), (FULL, HALF)], ids=str
)
def test_pruned_and_packed_in_one_pass(dtype, scored):
    for rows, columns in ((2, 8), (2, 1040)):  # the second: more than one program, the last one in part
        weight = hard_numbers(rows, columns, dtype)
        scores = None if scored is None else hard_numbers(rows, columns, scored)
        found = gpu_packing.prune_24(weight, scores)
        assert found.values.dtype == dtype and equal_bits(found, pruned_bits(weight, scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked_to_the_bit(dtype):
    for rows, columns in ((2, 8), (2, 1040)):
        values, ids, _ = reference.prune_24(hard_numbers(rows, columns, dtype))
        found = gpu_packing.unpack_24(values, ids)
        assert found.dtype == dtype and torch.equal(bits_of(found), codec.unpack_24(bits_of(values), ids))


def test_damaged_ids_stay_in_their_group():
    values = torch.ones(4, 32)
    dense = gpu_packing.unpack_24(values, torch.arange(32, dtype=torch.uint8).view(4, 8) * 8)
    assert set(dense.view(-1, 4).sum(1).tolist()) <= {1.0, 2.0}


def test_tensors_that_are_not_contiguous():
    weight = hard_numbers(16, 2, torch.bfloat16).t()
    assert not weight.is_contiguous()
    check_choice(weight, NMPattern("2:4"))
    assert equal_bits(gpu_packing.prune_24(weight, weight), pruned_bits(weight, weight))


def test_the_kernels_pass_their_trial():
    given = torch.empty(0, dtype=torch.float16)
    assert probe.failure(lambda: gpu_packing._packs_right(given, given)) is None
    assert probe.failure(lambda: gpu_packing._chooses_right(given, NMPattern("2:4"))) is None


@pytest.mark.parametrize("mistake", [{"N": 1}, {"INF": 0x7F000000}])
def test_a_wrong_choice_fails_the_trial(mistake, monkeypatch):
    right = triton_packing.top_n

    class Wrong:
        def __getitem__(self, grid):
            return lambda *given, **constants: right[grid](*given, **constants | mistake)

    monkeypatch.setattr(triton_packing, "top_n", Wrong())
    assert not gpu_packing._chooses_right(torch.empty(0), NMPattern("2:4"))
