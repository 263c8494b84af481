# SPDX-License-Identifier: Apache-2.0
"""The groups in which one mask differs from another, as bytes (docs/FORMAT.md, section 9): gaps Golomb-Rice coded, codes as digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..errors import FormatError
from ..pattern import NMPattern

_COUNT_BYTES = 8
_HEAD_BYTES = _COUNT_BYTES + 1
_MAX_PARAMETER = 40  # more bits than any gap has


def differing_groups(
    packed: torch.Tensor, general: torch.Tensor, pattern: NMPattern, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where two masks of a layer differ. Only the runs of codes that do are unpacked.

    Args:
        packed (`torch.Tensor`), general (`torch.Tensor`): packed codes, uint8 of one shape `[out, bytes]`.
        pattern (`NMPattern`), name (`str`): of the layer.

    Returns:
        places of the differing groups, ascending, among `out x pattern.max_groups(bytes)`; the codes of `packed` there, and
        those of `general`: int64 `[count]` each.

    Raises:
        FormatError: if one of these runs holds no codes.
    """
    runs, others = _runs(packed, pattern), _runs(general, pattern)
    differing = (runs != others).any(1).nonzero().flatten()
    codes, old = (_codes(rows[differing], pattern, name) for rows in (runs, others))
    where = codes != old
    row, run = differing // _runs_of_row(packed, pattern), differing % _runs_of_row(packed, pattern)
    first = row * pattern.max_groups(packed.shape[1]) + run * codes.shape[1]
    places = first[:, None] + torch.arange(codes.shape[1])
    return places[where], codes[where], old[where]


def encode_changes(packed: torch.Tensor, general: torch.Tensor, pattern: NMPattern, name: str) -> torch.Tensor:
    """What turns the packed codes of a general mask into those of another one.

    A changed group is told by its gap, the unchanged groups since the last changed one, and by the rank of its new code among
    the C - 1 others. A gap is Golomb-Rice coded (Rice 1979, JPL Publication 79-22): r low bits as they are, the rest in unary;
    the r that gives the fewest bytes is taken.

    Args:
        packed (`torch.Tensor`), general (`torch.Tensor`): uint8 of one shape `[out, bytes]`.
        pattern (`NMPattern`), name (`str`): of the layer.

    Returns:
        uint8 `[bytes]`; of 9 bytes if nothing differs.

    Raises:
        FormatError: if one of the two holds bytes that are no codes, where they differ.
    """
    places, new, old = differing_groups(packed, general, pattern, name)
    gaps = places.diff(prepend=places.new_full((1,), -1)) - 1
    ranks = new - (new > old).long()
    longest = int(gaps.max()) if len(gaps) else 0
    parameter = min(range(longest.bit_length() + 1), key=lambda r: _gap_bytes(gaps, r))
    return _stream(gaps, ranks, pattern.num_candidates - 1, parameter)


def decode_changes(stream: torch.Tensor, general: torch.Tensor, pattern: NMPattern, name: str) -> torch.Tensor:
    """The packed codes that `encode_changes` was given. Memory is bounded by the size of the general mask, whatever the bytes claim.

    Args:
        stream (`torch.Tensor`): uint8 `[bytes]`.
        general (`torch.Tensor`): packed codes of the general mask, uint8 `[out, bytes]`.
        pattern (`NMPattern`), name (`str`): of the layer.

    Returns:
        uint8, of the shape of `general`.

    Raises:
        FormatError: if no writer can have made these bytes for a mask of this size.
    """
    base = pattern.num_candidates - 1
    groups = len(general) * pattern.max_groups(general.shape[1])
    count, parameter = _head(stream, groups, name)
    low_bytes, rank_bytes = _bytes_of_bits(count * parameter), ops.packed_digit_bytes(count, base)
    fewest = _bytes_of_bits(count)  # of the unary plane: all gaps below 2^r
    most = _bytes_of_bits(count + (groups >> parameter))
    planes = stream[_HEAD_BYTES:]
    if not fewest <= len(planes) - low_bytes - rank_bytes <= most:
        raise FormatError(
            f"{name}: {len(stream)} bytes cannot hold {count} changed groups of {groups} (parameter {parameter}); the file "
            "is damaged, fetch it again"
        )
    low, packed_ranks, unary = planes.tensor_split([low_bytes, low_bytes + rank_bytes])
    gaps = _gaps(low, unary, count, parameter)
    ranks = ops.unpack_digits(packed_ranks, base, count)
    inside = gaps is not None and not bool((gaps >= groups).any())  # before they are added up, which might overflow
    places = (gaps + 1).cumsum(0) - 1 if inside else None
    if not inside or (count and int(places[-1]) >= groups):
        raise FormatError(
            f"{name}: the gaps of its {count} changed groups do not fit into the {groups} groups of the layer; the file is "
            "damaged, fetch it again"
        )
    if not torch.equal(_stream(gaps, ranks, base, parameter), stream):
        raise FormatError(f"{name}: the changes hold a code or bits that no writer sets; the file is damaged")
    return _changed(general, places, ranks, pattern, name)


def _changed(
    general: torch.Tensor, places: torch.Tensor, ranks: torch.Tensor, pattern: NMPattern, name: str
) -> torch.Tensor:
    """Packed codes with other codes at some places, whose runs only are unpacked."""
    runs = _runs(general, pattern).clone()
    length, slots = pattern.packing[0], pattern.max_groups(general.shape[1])
    run = places // slots * _runs_of_row(general, pattern) + places % slots // length
    touched, of_place = run.unique_consecutive(return_inverse=True)
    codes, within = _codes(runs[touched], pattern, name), places % slots % length
    codes[of_place, within] = ranks + (ranks >= codes[of_place, within]).long()
    runs[touched] = ops.pack_codes(codes, pattern, length * pattern.m)
    return runs.view(len(general), -1)[:, : general.shape[1]].contiguous()


def _runs_of_row(packed: torch.Tensor, pattern: NMPattern) -> int:
    return -(-packed.shape[1] // pattern.packing[1])


def _runs(packed: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The runs of b bytes that hold k codes each, uint8 `[out x runs, b]`; the last one of a row is filled up with zeros."""
    size = pattern.packing[1]
    return F.pad(packed, (0, -packed.shape[1] % size)).view(-1, size)


def _codes(runs: torch.Tensor, pattern: NMPattern, name: str) -> torch.Tensor:
    """int64 `[runs, k]`: the bytes of a run are those of a row of k groups."""
    return ops.unpack_codes(runs, pattern, pattern.packing[0] * pattern.m, name)


def changed_groups(stream: torch.Tensor) -> int:
    """How many groups a stream says it changes."""
    return int.from_bytes(bytes(stream[:_COUNT_BYTES].tolist()), "little")


def _head(stream: torch.Tensor, groups: int, name: str) -> tuple[int, int]:
    count, parameter = (changed_groups(stream), int(stream[_COUNT_BYTES])) if len(stream) >= _HEAD_BYTES else (-1, 0)
    if not 0 <= count <= groups or parameter > _MAX_PARAMETER:
        raise FormatError(
            f"{name}: the changes begin with {stream[:_HEAD_BYTES].tolist()}, which is no count up to {groups} in {_COUNT_BYTES} "
            f"bytes and a parameter up to {_MAX_PARAMETER}; the file is damaged or of another layer"
        )
    return count, parameter


def _stream(gaps: torch.Tensor, ranks: torch.Tensor, base: int, parameter: int) -> torch.Tensor:
    """The bytes: head, low bits of the gaps, ranks of the new codes, high parts of the gaps in unary."""
    head = torch.tensor([*len(gaps).to_bytes(_COUNT_BYTES, "little"), parameter], dtype=torch.uint8)
    bits = gaps[:, None] >> torch.arange(parameter) & 1
    ends = ((gaps >> parameter) + 1).cumsum(0) - 1  # a one ends each run of zeros
    unary = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.bool)
    unary[ends] = True
    return torch.cat([head, _packed(bits.flatten()), ops.pack_digits(ranks, base), _packed(unary)])


def _packed(bits: torch.Tensor) -> torch.Tensor:
    return ops.pack_bits(bits.bool()[None])[0]


def _gaps(low: torch.Tensor, unary: torch.Tensor, count: int, parameter: int) -> torch.Tensor | None:
    """Gaps of their low bits and unary high parts, int64 `[count]`; `None` if these are not so many, or too high to shift."""
    ends = ops.unpack_bits(unary[None], 8 * len(unary))[0].nonzero().flatten()
    high = ends.diff(prepend=ends.new_full((1,), -1)) - 1
    if len(high) != count or bool((high >> (62 - parameter)).any()):
        return None
    gaps = high << parameter
    bits = ops.unpack_bits(low[None], count * parameter)[0].view(count, parameter)
    for place, column in enumerate(bits.unbind(1)):
        gaps |= column.long() << place
    return gaps


def _gap_bytes(gaps: torch.Tensor, parameter: int) -> int:
    high = int((gaps >> parameter).sum())
    return _bytes_of_bits(len(gaps) * parameter) + _bytes_of_bits(high + len(gaps))


def _bytes_of_bits(bits: int) -> int:
    return -(-bits // 8)
