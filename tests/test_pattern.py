# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from hf_nmsparse import NMPattern
from hf_nmsparse.errors import PatternError

ALL_PATTERNS = [(n, m) for m in range(2, 17) for n in range(1, m) if (m <= 8 or n in (1, m // 2, m - 1))]


def test_text_and_numbers_give_the_same_pattern():
    assert NMPattern("2:4") == NMPattern(2, 4) == NMPattern(NMPattern(" 2 : 4 "))
    assert str(NMPattern(2, 4)) == "2:4"


@pytest.mark.parametrize("bad", ["", "2", "2:4:8", "a:b", "4:4", "0:4", "5:4", "-1:4", "8:17", 2, None, True])
def test_malformed_patterns_are_refused(bad):
    with pytest.raises(PatternError):
        NMPattern(bad)


def test_candidates_of_2_4_are_in_the_order_of_combinations():
    expected = ["1100", "1010", "1001", "0110", "0101", "0011"]
    rows = ["".join(map(str, row)) for row in NMPattern("2:4").candidates(dtype=torch.int64).tolist()]
    assert rows == expected


@pytest.mark.parametrize(("n", "m"), ALL_PATTERNS)
def test_rank_and_unrank_are_inverse(n, m):
    pattern = NMPattern(n, m)
    combinations = list(itertools.islice(itertools.combinations(range(m), n), 200))
    for code, kept in enumerate(combinations):
        assert pattern.rank(kept) == code
        assert pattern.unrank(code) == kept
    assert pattern.num_candidates == len(pattern.candidates())


def test_rank_refuses_what_is_no_candidate():
    for bad in [(0,), (1, 0), (0, 4), (0, 0)]:
        with pytest.raises(PatternError):
            NMPattern("2:4").rank(bad)
    with pytest.raises(PatternError):
        NMPattern("2:4").unrank(6)


@pytest.mark.parametrize(
    ("pattern", "packing"),
    [
        ("2:4", (3, 1)),
        ("1:4", (4, 1)),
        ("3:4", (4, 1)),
        ("4:8", (9, 7)),
        ("8:16", (4, 7)),
        ("2:8", (13, 8)),
        ("1:2", (8, 1)),
    ],
)
def test_packing_is_the_densest_in_at_most_eight_bytes(pattern, packing):
    assert NMPattern(pattern).packing == packing


@pytest.mark.parametrize(("n", "m"), ALL_PATTERNS)
def test_packing_rule_holds_by_brute_force(n, m):
    pattern = NMPattern(n, m)
    k, b = pattern.packing
    assert pattern.num_candidates**k <= 256**b
    for other_b in range(1, 9):
        other_k = 0
        while pattern.num_candidates ** (other_k + 1) <= 256**other_b:
            other_k += 1
        assert other_k * b < k * other_b or (other_k * b == k * other_b and other_b >= b)


@pytest.mark.parametrize("row_bytes", [1, 5, 8, 9, 17])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:8", "8:16"])
def test_max_groups_is_the_inverse_of_row_bytes(pattern, row_bytes):
    pattern = NMPattern(pattern)
    groups = pattern.max_groups(row_bytes)
    assert pattern.packed_row_bytes(groups * pattern.m) <= row_bytes
    assert pattern.packed_row_bytes((groups + 1) * pattern.m) > row_bytes


def test_tails_keep_what_fits():
    pattern = NMPattern("2:4")
    assert pattern.num_groups(10) == 3 and pattern.tail(10) == 2 and pattern.kept_per_row(10) == 6
    assert pattern.tail_candidates(10).tolist() == [True] + [False] * 5  # 1100 alone keeps no padded position
    assert pattern.tail_candidates(9).tolist() == [True] + [False] * 5  # one weight: it is kept, code 0 stands for it
    assert pattern.tail_candidates(11).sum() == 3  # 1100, 1010, 0110
    assert pattern.tail_candidates(12).all()


def test_tables_are_real_even_if_first_needed_under_the_meta_device():
    with torch.device("meta"):
        pattern = NMPattern(5, 13)
        assert pattern.candidates().sum() == 5 * pattern.num_candidates
        assert pattern.tail_candidates(14).any()
