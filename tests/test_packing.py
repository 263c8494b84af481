# SPDX-License-Identifier: Apache-2.0
"""Pruning and packing: the C++ kernels, each instruction set of them, against the reference, bit for bit."""

import sys

import pytest
import torch
from kernel_checks.native_builds import BUILDS, put_in_place, run_beside_forbidden_pages
from kernel_checks.packing_cases import DTYPES, bits_of, equal_bits, hard_numbers, pruned_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_nmsparse import NMPattern, codec, ops
from hf_nmsparse.errors import FormatError, PatternError
from hf_nmsparse.ops import native_build, native_packing, packing, reference
from hf_nmsparse.ops.linear24 import cpu

PATTERNS = ["1:2", "2:3", "1:4", "2:4", "3:4", "3:5", "4:8", "7:13", "1:16", "8:16", "15:16"]
SHAPES = [(1, 1), (3, 3), (2, 403), (5, 1040), (70, 1000)]  # less than a group, tails, several blocks, several threads


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The kernels compiled for one instruction set take the place of those of this machine."""
    put_in_place(request.param, monkeypatch, native_packing, cpu)


@pytest.fixture
def native(monkeypatch):
    """The kernels of this machine; remembers which calls they took."""
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    taken, run = [], native_packing._run
    monkeypatch.setattr(native_packing, "_run", lambda *given, **others: taken.append(others) or run(*given, **others))
    return taken


@pytest.fixture
def torch_alone(monkeypatch):
    monkeypatch.setattr(native_packing, "native_library", lambda: None)


# --- against the reference --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_highest_of_each_group_are_kept(build, pattern, dtype):
    pattern = NMPattern(pattern)
    for shape in SHAPES:
        scores = hard_numbers(*shape, dtype)
        expected = reference.top_n_mask(scores, pattern)
        assert torch.equal(ops.top_n_mask(scores, pattern), expected)
        assert torch.equal(ops.top_n_codes(scores, pattern), codec.mask_to_codes(expected, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_codes_and_bytes_are_those_of_the_reference(build, pattern):
    pattern = NMPattern(pattern)
    for rows, columns in SHAPES:
        mask = reference.top_n_mask(torch.randn(rows, columns), pattern)
        codes = codec.mask_to_codes(mask, pattern)
        packed = codec.pack_codes(codes, pattern, columns)
        assert torch.equal(ops.mask_to_codes(mask, pattern), codes)
        assert torch.equal(ops.mask_to_codes(2.5 * mask, pattern), codes)  # non-zero is kept
        assert torch.equal(ops.codes_to_mask(codes, pattern, columns), mask)
        assert torch.equal(ops.pack_codes(codes, pattern, columns), packed)
        assert torch.equal(ops.unpack_codes(packed, pattern, columns), codes)
        ops.check_codes(packed, pattern, columns)
        holes = mask & (torch.rand(rows, columns) < 0.8)
        assert ops.count_groups(holes, pattern) == codec.count_groups(holes, pattern)
        assert ops.count_groups(~mask, pattern) == codec.count_groups(~mask, pattern)
        completed, filled = ops.complete_mask(holes, pattern)
        expected = codec.complete_mask(holes, pattern)
        assert filled == expected[1] and torch.equal(completed, expected[0])


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_every_candidate_has_its_code(build, pattern):
    pattern = NMPattern(pattern)
    codes = torch.arange(pattern.num_candidates).expand(3, -1).contiguous()
    mask = pattern.candidates().flatten().expand(3, -1)
    assert torch.equal(ops.codes_to_mask(codes.to(torch.uint8), pattern, mask.shape[1]), mask)
    assert torch.equal(ops.mask_to_codes(mask, pattern), codes)


@pytest.mark.parametrize("scored", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_and_packed_in_one_pass(build, dtype, scored):
    for rows, columns in ((1, 8), (3, 24), (5, 1048), (70, 1000)):
        weight = hard_numbers(rows, columns, dtype)
        scores = None if scored is None else hard_numbers(rows, columns, scored)
        found, expected = ops.prune_24(weight, scores), pruned_bits(weight, scores)
        assert found.values.dtype == dtype and equal_bits(found, expected)
        mask = codec.codes_to_mask(expected[2], NMPattern("2:4"), columns)
        assert equal_bits(ops.pack_24(weight, mask), expected[:2])
        dense = ops.unpack_24(found.values, found.ids)
        assert dense.dtype == dtype and torch.equal(bits_of(dense), codec.unpack_24(*expected[:2]))


def test_what_is_no_number_counts_as_the_highest_and_ties_go_to_the_first(torch_alone):
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[1, nan, inf, nan], [-0.0, 0.0, -1, 0.0], [nan, nan, nan, 5], [-inf, 2, -inf, -inf]])
    expected = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(ops.top_n_mask(scores, NMPattern("2:4")), expected)
    assert torch.equal(ops.top_n_mask(scores.double(), NMPattern("2:4")), expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "5:16"])
def test_each_group_keeps_exactly_n_whatever_the_scores(torch_alone, pattern):
    pattern = NMPattern(pattern)
    mask = ops.top_n_mask(hard_numbers(50, 331, torch.float32), pattern)
    assert (mask.sum(1) == pattern.kept_per_row(331)).all()


def test_results_do_not_depend_on_threads(native):
    weight, before = hard_numbers(67, 2000, torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mask = ops.top_n_mask(weight, NMPattern("3:7"))
            results.append((*ops.prune_24(weight), mask, ops.mask_to_codes(mask, NMPattern("3:7"))))
    finally:
        torch.set_num_threads(before)
    assert all(equal_bits(result, results[0]) for result in results)


# --- what is refused --------------------------------------------------------------------------------------------------
def test_errors_are_those_of_the_reference(native):
    pattern, mask = NMPattern("2:4"), torch.zeros(3, 16, dtype=torch.bool)
    mask[:, ::2] = True
    codes = codec.mask_to_codes(mask, pattern)
    packed = codec.pack_codes(codes, pattern, 16)
    mask[1, 5] = True
    with pytest.raises(PatternError, match="row 1, group 1 keeps 3 weights"):
        ops.mask_to_codes(mask, pattern)
    with pytest.raises(PatternError, match="row 1, group 1 keeps 3 weights"):
        ops.pack_24(torch.randn(3, 16), mask)
    with pytest.raises(PatternError, match="1 of 12 groups keep more than 2 of 4"):
        ops.complete_mask(mask, pattern)
    with pytest.raises(PatternError, match="no multiple of 8"):
        ops.prune_24(torch.randn(3, 12))
    with pytest.raises(IndexError):
        ops.codes_to_mask(codes + 5, pattern, 16)
    packed[2, 0] = 216
    with pytest.raises(FormatError, match=r"layer\.x: row 2"):
        ops.unpack_codes(packed, pattern, 16, name="layer.x")
    with pytest.raises(FormatError, match=r"layer\.x: row \d"):
        ops.check_codes(packed, pattern, 16, name="layer.x")
    assert torch.equal(
        ops.unpack_codes(packed, pattern, 16, check=False), codec.unpack_codes(packed, pattern, 16, check=False)
    )
    with pytest.raises(FormatError, match="beyond in_features=14"):
        ops.unpack_codes(codec.pack_codes(codes + 4, pattern, 16), pattern, 14)
    assert len(native) >= 6


def test_tensors_that_do_not_belong_together_never_reach_a_kernel(native):
    weight, pattern = torch.randn(4, 16), NMPattern("2:4")
    for call in (
        lambda: ops.prune_24(weight, torch.randn(4, 8)),
        lambda: ops.pack_24(weight[:, :8], torch.ones(4, 16).bool()),
        lambda: ops.unpack_codes(torch.zeros(2, 3, dtype=torch.uint8), pattern, 16),
    ):
        with pytest.raises((RuntimeError, PatternError, FormatError)):
            call()
    # What the reference makes of them: a mask that is narrower, and rows of zeros.
    assert ops.codes_to_mask(torch.zeros(2, 3, dtype=torch.int64), pattern, 40).shape == (2, 12)
    assert ops.unpack_24(torch.ones(4, 8), torch.full((3, 2), 0x44, dtype=torch.uint8)).sum(1).tolist() == [8, 8, 8, 0]
    assert not native


def test_what_the_kernels_do_not_take_goes_through_torch(native):
    pattern, weight = NMPattern("2:4"), torch.randn(4, 16)
    values, ids, codes = reference.prune_24(weight)
    assert torch.equal(ops.prune_24(weight.double()).ids, ids)
    assert ops.top_n_mask(weight.to("meta"), pattern).shape == weight.shape
    assert ops.top_n_mask(torch.empty(0, 16), pattern).shape == (0, 16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.top_n_mask(mode.from_tensor(weight), pattern).shape == (4, 16)
        assert ops.unpack_24(mode.from_tensor(values), mode.from_tensor(ids)).shape == (4, 16)
    compiled = torch.compile(lambda given: ops.unpack_24(given, ids), backend="eager", fullgraph=True)
    assert torch.equal(compiled(values), codec.unpack_24(values, ids))
    assert not native
    with torch.device("meta"):  # speaks of new tensors alone
        assert torch.equal(ops.prune_24(weight).codes, codes)
    assert len(native) == 1


def test_gradients_flow_to_the_weight_and_the_values(native):
    weight = torch.randn(4, 16, requires_grad=True)
    values, ids, _ = ops.prune_24(weight)
    assert ops.unpack_24(values, ids).requires_grad
    ops.unpack_24(values, ids).sum().backward()
    assert int(weight.grad.sum()) == weight.numel() // 2
    assert not native
    with torch.no_grad():
        assert not ops.prune_24(weight).values.requires_grad
    assert native


def test_tensors_that_are_not_contiguous_are_taken(native):
    weight, pattern = torch.randn(16, 24).t(), NMPattern("2:4")
    assert equal_bits(ops.prune_24(weight, weight), pruned_bits(weight, weight))
    mask = reference.top_n_mask(weight, pattern)
    apart = mask.t().contiguous().t()
    assert torch.equal(ops.mask_to_codes(apart, pattern), codec.mask_to_codes(mask, pattern))
    assert torch.equal(ops.top_n_mask(weight[:, 1:], pattern), reference.top_n_mask(weight[:, 1:], pattern))
    assert len(native) == 3


def test_without_a_compiler_torch_computes_the_same(torch_alone):
    weight, pattern = hard_numbers(5, 40, torch.bfloat16), NMPattern("2:4")
    mask = packing.top_n_mask(weight, pattern)
    assert torch.equal(packing.top_n_codes(weight, pattern), codec.mask_to_codes(mask, pattern))
    assert torch.equal(packing.prune_24(weight, weight).codes.long(), codec.mask_to_codes(mask, pattern))


# --- memory -----------------------------------------------------------------------------------------------------------
GUARDED = """
import sys
from pathlib import Path
import torch
from kernel_checks.native_builds import at_the_edge
from hf_nmsparse import NMPattern
from hf_nmsparse.ops import native_build, native_packing

def byte(*shape):
    return at_the_edge(torch.randint(0, 256, shape, dtype=torch.uint8))

def calls(dtype, pattern, rows, columns):
    shape, groups = (rows, columns), pattern.num_groups(columns)
    run = lambda **tensors: native_packing._run(pattern, shape, **tensors)
    scores, mask = at_the_edge(torch.randn(shape).to(dtype)), byte(rows, columns)
    codes = at_the_edge(torch.randint(-5, 2 * pattern.num_candidates, (rows, groups)))
    packed = byte(rows, pattern.packed_row_bytes(columns))
    run(scores=scores, to_mask=mask)
    for read in ({"scores": scores}, {"mask": byte(rows, columns)}, {"packed": packed}, {"codes": codes}):
        run(**read, to_codes=at_the_edge(torch.zeros(rows, groups, dtype=torch.int64)))
    run(mask=byte(rows, columns), complete=True, to_mask=mask)
    run(codes=codes, to_mask=mask)
    run(codes=codes, to_packed=packed)
    if str(pattern) == "2:4" and columns % 8 == 0:
        made = {"values": at_the_edge(torch.zeros(rows, columns // 2).to(dtype)), "ids": byte(rows, columns // 8)}
        run(mask=byte(rows, columns), weight=scores, **made)  # masks of any count
        run(scores=scores, weight=scores, small_codes=byte(rows, columns // 4), magnitudes=True, **made)

torch.manual_seed(0)
library = native_build.load(Path(sys.argv[1]))
native_packing.native_library = lambda: library
for dtype in (torch.float32, torch.bfloat16):
    for pattern in ("1:2", "2:4", "3:5", "4:8", "2:8", "8:16"):
        for rows, columns in ((1, 1), (3, 72), (2, 67), (5, 1032)):
            calls(dtype, NMPattern(pattern), rows, columns)
print("survived", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
@pytest.mark.parametrize("name", BUILDS)
def test_damaged_numbers_and_odd_sizes_never_reach_beyond_a_tensor(name):
    finished = run_beside_forbidden_pages(GUARDED, name)
    assert "survived" in finished.stdout, finished.stderr[-2000:]
