# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse import NMPattern, codec
from hf_nmsparse.errors import FormatError, PatternError

PATTERNS = ["2:4", "1:4", "3:4", "1:2", "2:3", "4:8", "2:8", "8:16", "15:16"]
SHAPES = [(1, 4), (3, 12), (5, 33), (2, 100), (4, 7), (1, 2), (7, 64)]


def random_codes(pattern: NMPattern, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    codes = torch.randint(
        0, pattern.num_candidates, (out_features, pattern.num_groups(in_features)), generator=generator
    )
    allowed = pattern.tail_candidates(in_features).nonzero().flatten()
    codes[:, -1] = allowed[torch.randint(0, len(allowed), (out_features,), generator=generator)]
    return codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_codes_masks_and_bytes_round_trip(pattern, shape):
    pattern = NMPattern(pattern)
    codes = random_codes(pattern, shape)
    mask = codec.codes_to_mask(codes, pattern, shape[1])
    assert mask.shape == shape
    assert (mask.sum(1) == pattern.kept_per_row(shape[1])).all()
    assert torch.equal(codec.mask_to_codes(mask, pattern), codes)
    packed = codec.pack_codes(codes, pattern, shape[1])
    assert packed.shape == (shape[0], pattern.packed_row_bytes(shape[1]))
    assert torch.equal(codec.unpack_codes(packed, pattern, shape[1]), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(2, 16), st.integers(1, 60), st.integers(0, 10_000))
def test_round_trip_for_any_pattern_and_width(n, m, in_features, seed):
    if n >= m:
        return
    pattern = NMPattern(n, m)
    codes = random_codes(pattern, (3, in_features), seed)
    packed = codec.pack_codes(codes, pattern, in_features)
    assert torch.equal(codec.unpack_codes(packed, pattern, in_features), codes)
    assert torch.equal(codec.mask_to_codes(codec.codes_to_mask(codes, pattern, in_features), pattern), codes)


def test_golden_bytes_of_packed_codes():
    # 2:4: three codes to a byte, first code least significant: 1 + 2*6 + 3*36 = 121; then 4 + 5*6 = 34 alone.
    codes = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [5, 5, 5, 5, 5]])
    assert codec.pack_codes(codes, NMPattern("2:4"), 20).tolist() == [[121, 34], [0, 0], [215, 35]]
    # 1:4: four codes to a byte.
    assert codec.pack_codes(torch.tensor([[0, 1, 2, 3]]), NMPattern("1:4"), 16).tolist() == [[0 + 4 + 32 + 192]]
    # 4:8: nine codes of base 70 in seven little-endian bytes.
    digits = [69, 1, 2, 3, 4, 5, 6, 7, 8]
    number = sum(digit * 70**i for i, digit in enumerate(digits))
    assert codec.pack_codes(torch.tensor([digits]), NMPattern("4:8"), 72).tolist() == [
        list(number.to_bytes(7, "little"))
    ]
    # 2:8: thirteen codes of base 28 fill all eight bytes, beyond the range of a signed 64-bit number.
    digits = [27] * 13
    number = sum(digit * 28**i for i, digit in enumerate(digits))
    assert codec.pack_codes(torch.tensor([digits]), NMPattern("2:8"), 104).tolist() == [
        list(number.to_bytes(8, "little"))
    ]


def test_golden_bytes_of_packed_weights():
    weight = torch.arange(1.0, 9.0).reshape(1, 8)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    values, ids = codec.pack_24(weight, mask)
    assert values.tolist() == [[1.0, 4.0, 6.0, 7.0]]
    assert ids.tolist() == [[0 | 3 << 2 | 1 << 4 | 2 << 6]]
    assert codec.unpack_24(values, ids).tolist() == [[1, 0, 0, 4, 0, 6, 7, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packed_weights_round_trip_bit_for_bit(dtype):
    weight = torch.randn(6, 32).to(dtype)
    weight[0, 0] = 0.0  # a kept zero keeps its place
    mask = codec.codes_to_mask(random_codes(NMPattern("2:4"), (6, 32)), NMPattern("2:4"), 32)
    values, ids = codec.pack_24(weight, mask)
    assert values.shape == (6, 16) and ids.shape == (6, 4) and ids.dtype == torch.uint8
    assert torch.equal(codec.unpack_24(values, ids), torch.where(mask, weight, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("byte", range(216, 256))
def test_bytes_that_encode_no_group_are_refused(byte):
    packed = torch.zeros(2, 4, dtype=torch.uint8)
    packed[1, 2] = byte
    with pytest.raises(FormatError, match=r"layer\.x: row 1"):
        codec.unpack_codes(packed, NMPattern("2:4"), 48, name="layer.x")


def test_nonzero_padding_codes_are_refused():
    packed = codec.pack_codes(torch.zeros(1, 4, dtype=torch.int64), NMPattern("2:4"), 16)
    packed[0, 1] += 6  # a second code in the byte of the one group that is left
    with pytest.raises(FormatError):
        codec.unpack_codes(packed, NMPattern("2:4"), 16)


def test_tail_codes_that_keep_padding_are_refused():
    packed = codec.pack_codes(torch.tensor([[0, 5]]), NMPattern("2:4"), 8)
    with pytest.raises(FormatError, match="beyond in_features=6"):
        codec.unpack_codes(packed, NMPattern("2:4"), 6)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 4), torch.zeros(4, dtype=torch.uint8)]
)
def test_wrong_width_or_dtype_is_refused(bad):
    with pytest.raises(FormatError, match=r"must be uint8 \[out, 4\]"):
        codec.unpack_codes(bad, NMPattern("2:4"), 48)


def test_every_flipped_bit_of_packed_codes_is_refused_or_decodes_to_another_mask():
    pattern = NMPattern("2:4")
    codes = random_codes(pattern, (3, 40))
    packed = codec.pack_codes(codes, pattern, 40)
    for position in range(packed.numel()):
        for bit in range(8):
            damaged = packed.clone()
            damaged.view(-1)[position] ^= 1 << bit
            try:
                decoded = codec.unpack_codes(damaged, pattern, 40)
            except FormatError:
                continue
            assert not torch.equal(decoded, codes)


def test_masks_with_another_count_are_refused_with_the_place():
    mask = codec.codes_to_mask(random_codes(NMPattern("2:4"), (3, 16)), NMPattern("2:4"), 16)
    mask[1, 4:8] = True
    with pytest.raises(PatternError, match="row 1, group 1 keeps 4 weights"):
        codec.mask_to_codes(mask, NMPattern("2:4"))


def test_group_counts_tell_too_many_from_too_few():
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]])
    counts = codec.count_groups(mask, NMPattern("2:4"))
    assert (counts.groups, counts.over, counts.under, counts.follows) == (3, 1, 1, False)


def test_completion_fills_lowest_index_first_and_counts():
    mask = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    completed, filled = codec.complete_mask(mask, NMPattern("2:4"))
    assert completed.int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]]
    assert filled == 3
    with pytest.raises(PatternError, match="1 of 2 groups keep more than 2 of 4"):
        codec.complete_mask(torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]]), NMPattern("2:4"))


@pytest.mark.parametrize("byte", range(256))
def test_only_two_ascending_positions_are_valid_ids(byte):
    low, high = (byte & 3, byte >> 2 & 3), (byte >> 4 & 3, byte >> 6 & 3)
    ids = torch.tensor([[byte]], dtype=torch.uint8)
    if low[0] < low[1] and high[0] < high[1]:
        codec.check_ids_24(ids, "x")
    else:
        with pytest.raises(FormatError, match="byte 0 of row 0"):
            codec.check_ids_24(ids, "x")


def test_rows_that_cannot_be_packed_are_refused():
    with pytest.raises(PatternError, match="no multiple of 8"):
        codec.pack_24(torch.randn(2, 12), torch.ones(2, 12, dtype=torch.bool))
