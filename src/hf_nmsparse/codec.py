# SPDX-License-Identifier: Apache-2.0
"""The reference of the on-disk formats (docs/FORMAT.md): pure functions, in pairs.

mask   <-> codes          `mask_to_codes`, `codes_to_mask`
codes  <-> packed bytes   `pack_codes`, `unpack_codes`
digits <-> packed bytes   `pack_digits`, `unpack_digits`
weight <-> (values, ids)  `pack_24`, `unpack_24`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from .errors import FormatError, PatternError
from .pattern import NMPattern, digit_bytes, digit_packing


@dataclass(frozen=True)
class GroupCounts:
    """How the groups of a tensor follow a pattern.

    Args:
        groups (`int`): groups in all.
        over (`int`): groups with more non-zeros than the pattern keeps. Any makes the tensor unusable as n:m.
        under (`int`): groups with fewer. Harmless, but capacity is given away.
    """

    groups: int
    over: int
    under: int

    @property
    def follows(self) -> bool:
        """Whether no group has too many non-zeros."""
        return self.over == 0


def _grouped(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`[out, in]` -> `[out, groups, m]`, the tail padded with zeros."""
    return F.pad(mask, (0, -mask.shape[1] % pattern.m)).unflatten(1, (-1, pattern.m))


def _expected_kept(pattern: NMPattern, in_features: int, device: torch.device) -> torch.Tensor:
    """Weights to keep in each group of a row, int64 `[groups]`."""
    kept = torch.full((pattern.num_groups(in_features),), pattern.n, device=device)
    if tail := pattern.tail(in_features):
        kept[-1] = min(pattern.n, tail)
    return kept


def count_groups(mask: torch.Tensor, pattern: NMPattern) -> GroupCounts:
    """Count the groups of `mask` (`[out, in]`, non-zero = kept) that keep too many or too few weights."""
    kept = _grouped(mask != 0, pattern).sum(-1)
    expected = _expected_kept(pattern, mask.shape[1], mask.device)
    return GroupCounts(kept.numel(), int((kept > expected).sum()), int((kept < expected).sum()))


def complete_mask(mask: torch.Tensor, pattern: NMPattern) -> tuple[torch.Tensor, int]:
    """Fill groups that keep fewer than n weights, lowest index first.

    Args:
        mask (`torch.Tensor`): `[out, in]`, non-zero = kept.
        pattern (`NMPattern`): the pattern to reach.

    Returns:
        the completed bool mask `[out, in]`, and how many groups were filled.

    Raises:
        PatternError: if a group keeps more weights than the pattern.
    """
    counts = count_groups(mask, pattern)
    if counts.over:
        raise PatternError(
            f"{counts.over} of {counts.groups} groups keep more than {pattern.n} of {pattern.m} weights; "
            f"the tensor is not {pattern} sparse along its last dimension"
        )
    in_features = mask.shape[1]
    grouped = _grouped(mask != 0, pattern)
    if counts.under == 0:
        return mask != 0, 0
    missing = _expected_kept(pattern, in_features, mask.device) - grouped.sum(-1)  # [out, groups]
    free = ~grouped
    if tail := pattern.tail(in_features):
        free[:, -1, tail:] = False
    grouped = grouped | (free & (free.cumsum(-1) <= missing.unsqueeze(-1)))
    return grouped.flatten(1)[:, :in_features], counts.under


# --- masks and codes ------------------------------------------------------------------------------------------------
@lru_cache(maxsize=16)
def code_of_word(pattern: NMPattern) -> torch.Tensor:
    """Code of each m-bit word (position p is bit p), -1 where the word does not keep n; int64 `[2^m]`."""
    return torch.full((2**pattern.m,), -1, device="cpu").scatter_(
        0, word_of_code(pattern), torch.arange(pattern.num_candidates, device="cpu")
    )


def word_of_code(pattern: NMPattern) -> torch.Tensor:
    """The inverse of `code_of_word`: the m-bit word of each candidate, int64 `[C]`."""
    return (pattern.candidates("cpu", torch.int64) << torch.arange(pattern.m, device="cpu")).sum(1)


def mask_to_codes(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Codes of a mask that keeps exactly n of m (a tail of r: min(n, r)).

    Args:
        mask (`torch.Tensor`): `[out, in]`, non-zero = kept.

    Returns:
        int64 `[out, groups]`.

    Raises:
        PatternError: naming the first group that keeps another number of weights.
    """
    in_features = mask.shape[1]
    grouped = _grouped(mask != 0, pattern)
    tail = pattern.tail(in_features)
    if 0 < tail < pattern.n:  # all of the tail is kept: code 0 stands for it, see NMPattern.tail_candidates
        grouped[:, -1, tail : pattern.n] = True
    words = (grouped.to(torch.int64) << torch.arange(pattern.m, device=mask.device)).sum(-1)
    codes = code_of_word(pattern).to(mask.device)[words]
    if bool((codes < 0).any()):
        row, group = (codes < 0).nonzero()[0].tolist()
        kept = int(_grouped(mask != 0, pattern)[row, group].sum())
        raise PatternError(
            f"row {row}, group {group} keeps {kept} weights, expected {pattern.n} of {pattern.m}; "
            "complete the mask first (codec.complete_mask) if groups may keep fewer"
        )
    return codes


def codes_to_mask(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """Bool mask `[out, in_features]` of codes `[out, groups]` (any integer dtype)."""
    return pattern.candidates(codes.device)[codes.long()].flatten(1)[:, :in_features]


def pack_codes(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """Pack codes k to b bytes: byte string = little-endian number `sum_i code_i * C^i`. Each row starts on a byte.

    Args:
        codes (`torch.Tensor`): integers `[out, groups]`, each below C(m, n).

    Returns:
        uint8 `[out, pattern.packed_row_bytes(in_features)]`.
    """
    k, b = pattern.packing
    groups = pattern.num_groups(in_features)
    runs = F.pad(codes.long(), (0, -groups % k)).unflatten(1, (-1, k))  # [out, runs, k]
    packed = _bytes_of_digits(runs, pattern.num_candidates, b).flatten(1)
    return packed[:, : pattern.packed_row_bytes(in_features)].contiguous()


def pack_digits(digits: torch.Tensor, base: int) -> torch.Tensor:
    """Pack numbers below `base` as `pack_codes` packs a row of codes; of a base of 1 no byte is needed.

    Args:
        digits (`torch.Tensor`): integers `[count]`.
        base (`int`): at least 1.

    Returns:
        uint8 `[packed_digit_bytes(count, base)]`.
    """
    size = packed_digit_bytes(len(digits), base)
    if size == 0:
        return digits.new_zeros(0, dtype=torch.uint8)
    k, b = digit_packing(base)
    runs = F.pad(digits.long(), (0, -len(digits) % k)).unflatten(0, (-1, k))
    return _bytes_of_digits(runs, base, b).flatten()[:size].contiguous()


def unpack_digits(packed: torch.Tensor, base: int, count: int) -> torch.Tensor:
    """The inverse of `pack_digits`, int64 `[count]`. Bytes that it cannot have written give digits that it packs otherwise.

    Args:
        packed (`torch.Tensor`): uint8 `[packed_digit_bytes(count, base)]`.
    """
    if len(packed) == 0:
        return packed.new_zeros(count, dtype=torch.int64)
    k, b = digit_packing(base)
    runs = F.pad(packed, (0, -len(packed) % b)).unflatten(0, (-1, b))
    return _digits_of_bytes(runs, base, k)[0].flatten()[:count]


def packed_digit_bytes(count: int, base: int) -> int:
    """Bytes of so many digits as `pack_digits` writes them."""
    if base == 1:
        return 0
    k, b = digit_packing(base)
    return count // k * b + digit_bytes(base, count % k)


# Both compute with limbs of 32 bits, so that eight-byte numbers need no unsigned 64-bit arithmetic: a base is below 2^14.
def _bytes_of_digits(runs: torch.Tensor, base: int, b: int) -> torch.Tensor:
    """int64 digits `[..., k]`, first one least significant -> uint8 `[..., b]`, little-endian."""
    limbs = [torch.zeros_like(runs[..., 0]) for _ in range(-(-b // 4))]
    for digit in reversed(runs.unbind(-1)):  # Horner's rule
        carry = digit
        for j in range(len(limbs)):
            carry = carry + limbs[j] * base
            limbs[j] = carry & 0xFFFFFFFF
            carry = carry >> 32
    return torch.stack([limbs[j // 4] >> 8 * (j % 4) & 255 for j in range(b)], dim=-1).to(torch.uint8)


def _digits_of_bytes(runs: torch.Tensor, base: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 `[..., b]` -> int64 digits `[..., k]`, and whether a number is left over that k digits cannot hold, `[...]`."""
    parts = runs.long().unbind(-1)
    limbs = [sum(byte << 8 * j for j, byte in enumerate(parts[i : i + 4])) for i in range(0, len(parts), 4)]
    digits = []
    for _ in range(k):  # long division, most significant limb first
        remainder = torch.zeros_like(limbs[0])
        for j in reversed(range(len(limbs))):
            value = (remainder << 32) + limbs[j]
            limbs[j] = value // base
            remainder = value - limbs[j] * base
        digits.append(remainder)
    return torch.stack(digits, dim=-1), torch.stack(limbs).any(0)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A mask of no pattern, one bit a weight: bool `[out, in]` -> uint8 `[out, ceil(in / 8)]`, lowest bit first."""
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """The mask of `pack_bits`, bool `[out, in]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)[:, :in_features].bool()


def unpack_codes(
    packed: torch.Tensor, pattern: NMPattern, in_features: int, name: str = "mask", check: bool = True
) -> torch.Tensor:
    """Codes int64 `[out, groups]` of packed bytes; refuses every byte string that `pack_codes` cannot have written.

    Args:
        packed (`torch.Tensor`): uint8 `[out, pattern.packed_row_bytes(in_features)]`.
        pattern (`NMPattern`): the pattern.
        in_features (`int`): of the layer.
        name (`str`): of the layer, for errors.
        check (`bool`): False for bytes that were unpacked once before: looking at values waits for the device, and
            torch.compile cannot do it.

    Raises:
        FormatError: on a wrong dtype or width, a number out of range, or a code that its tail group may not use.
    """
    width = pattern.packed_row_bytes(in_features)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width:
        raise FormatError(
            f"{name}: packed {pattern} codes for in_features={in_features} must be uint8 [out, {width}], "
            f"got {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}; the file is damaged or of another layer"
        )
    k, b = pattern.packing
    groups = pattern.num_groups(in_features)
    runs = F.pad(packed, (0, -width % b)).unflatten(1, (-1, b))  # [out, runs, b]
    all_codes, leftover = _digits_of_bytes(runs, pattern.num_candidates, k)
    all_codes = all_codes.flatten(1)
    if not check:
        return all_codes[:, :groups]
    if bool(leftover.any()) or bool(all_codes[:, groups:].any()):
        bad = leftover.any(1) | all_codes[:, groups:].any(1)
        raise FormatError(
            f"{name}: row {int(bad.nonzero()[0])} holds a byte that encodes no {pattern} group; the mask is damaged, "
            "fetch or write it again"
        )
    all_codes = all_codes[:, :groups].contiguous()
    allowed = pattern.tail_candidates(in_features, packed.device)
    if not bool(allowed[all_codes[:, -1]].all()):
        row = int((~allowed[all_codes[:, -1]]).nonzero()[0])
        raise FormatError(f"{name}: row {row} keeps a weight beyond in_features={in_features}; the mask is damaged")
    return all_codes


# --- packed 2:4 weights ---------------------------------------------------------------------------------------------
def ids_of_24(mask: torch.Tensor) -> torch.Tensor:
    """Column ids of an exactly 2:4 mask: uint8 `[out, in/8]`, four 2-bit ids a byte, low bits first, ascending.

    Raises:
        PatternError: if in_features is no multiple of 8 or a group does not keep exactly two.
    """
    out_features, in_features = mask.shape
    if in_features % 8:
        raise PatternError(
            f"in_features={in_features} is no multiple of 8; such a layer cannot be packed, keep it dense"
        )
    codes = mask_to_codes(mask, NMPattern(2, 4))
    ids = NMPattern(2, 4).positions(mask.device)[codes].reshape(out_features, in_features // 8, 4)
    return (ids << torch.tensor([0, 2, 4, 6], device=mask.device)).sum(-1).to(torch.uint8)


def columns_of_24(ids: torch.Tensor) -> torch.Tensor:
    """Column within its row of each packed value: int64 `[out, in/2]` from ids uint8 `[out, in/8]`."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=ids.device)
    within = ((ids.unsqueeze(-1) >> shifts) & 3).flatten(1).long()  # [out, in/2]
    return within + torch.arange(within.shape[1], device=ids.device) // 2 * 4


def pack_24(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of `weight` (`[out, in]`) where `mask` keeps them, `[out, in/2]`, and their ids, uint8 `[out, in/8]`.

    Raises:
        PatternError: as `ids_of_24`, or if the mask has another shape.
    """
    if mask.shape != weight.shape:
        raise PatternError(f"a mask of shape {list(mask.shape)} for a weight of shape {list(weight.shape)}")
    ids = ids_of_24(mask)
    return weight.gather(1, columns_of_24(ids)).contiguous(), ids


def unpack_24(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Dense `[out, in]` of values `[out, in/2]` and ids uint8 `[out, in/8]`. Pruned positions are +0."""
    dense = values.new_zeros(values.shape[0], values.shape[1] * 2)
    return dense.scatter(1, columns_of_24(ids), values)


# --- quantised values of a packed weight ----------------------------------------------------------------------------
SCALE_COLUMNS = 128
"""Columns of the dense weight that share a scale; the last group of a row may be shorter."""
LARGEST = {"int8": 127, "int4": 7}


def round_in_groups(
    weight: torch.Tensor, kind: str, columns: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to the nearest multiple of a scale, symmetrically, one scale for each `columns` of a row.

    The scale is the largest magnitude of its group over 127 or 7, rounded to its dtype before weights are divided by it, so
    that its rounding costs nothing but range.

    Args:
        weight (`torch.Tensor`): `[out, in]`, floating point.
        kind (`str`): "int8" or "int4".
        columns (`int`): of a group; the last one of a row may be shorter.
        dtype (`torch.dtype`, *optional*): of the scale; by default that of the weight.

    Returns:
        whole numbers as float32 `[out, in]`, and the scale, `[out, ceil(in/columns)]`.
    """
    largest = LARGEST[kind]
    padded = F.pad(weight.float(), (0, -weight.shape[1] % columns)).unflatten(1, (-1, columns))
    scale = (padded.abs().amax(-1) / largest).to(dtype or weight.dtype)
    divisor = scale.float().unsqueeze(-1)
    rounded = torch.where(divisor > 0, padded / divisor, 0).round().clamp(-largest, largest)
    return rounded.flatten(1)[:, : weight.shape[1]], scale


def quantize_values(
    kept: torch.Tensor, kind: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round kept weights to the nearest of `kind`, one scale for each 128 columns of the dense weight.

    Args:
        kept (`torch.Tensor`): `[out, in/2]`, floating point.
        kind (`str`): "int8" or "int4".
        dtype (`torch.dtype`, *optional*): of the scale; by default that of `kept`.

    Returns:
        values (int8 `[out, in/2]`; for int4 uint8 `[out, in/4]`, low nibble first, nibble = value + 8), and the scale,
        `[out, ceil(in/128)]`.
    """
    rounded, scale = round_in_groups(kept, kind, SCALE_COLUMNS // 2, dtype)
    values = rounded.to(torch.int8)
    return (values if kind == "int8" else pack_nibbles(values)), scale


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 in [-8, 7], `[out, n]` with n even -> uint8 `[out, n/2]`, low nibble first, nibble = value + 8."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8) - 8


def dequantize_values(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Kept weights, float32 `[out, in/2]`, of what `quantize_values` returned."""
    whole = unpack_nibbles(values) if values.dtype == torch.uint8 else values
    spread = scale.float().repeat_interleave(SCALE_COLUMNS // 2, 1)[:, : whole.shape[1]]
    return whole.float() * spread


def check_ids_24(ids: torch.Tensor, name: str) -> None:
    """Refuse ids that are not two ascending positions a group.

    Raises:
        FormatError: naming the tensor, row and byte.
    """
    valid = _valid_id_bytes().to(ids.device)[ids.long()]
    if not bool(valid.all()):
        row, column = (~valid).nonzero()[0].tolist()
        raise FormatError(
            f"{name}: byte {column} of row {row} is {int(ids[row, column])}, which does not name two ascending positions "
            "in each of two groups; the file is damaged, fetch or write it again"
        )


@lru_cache(maxsize=1)
def _valid_id_bytes() -> torch.Tensor:
    byte = torch.arange(256, device="cpu")
    return ((byte & 3) < (byte >> 2 & 3)) & ((byte >> 4 & 3) < (byte >> 6 & 3))
