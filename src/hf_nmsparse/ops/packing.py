# SPDX-License-Identifier: Apache-2.0
"""Pruning and packing: each function by the fastest backend that takes its tensors; all give the very same bits.

The functions of `codec.py` and `reference.py` say what is computed, and compute it for every tensor that no kernel takes
(other dtypes, gradients, subclasses, while compiling). They also raise the errors: a kernel that meets a group of which
nothing can be made leaves the call to them.
"""

from __future__ import annotations

import torch

from .. import codec
from ..codec import GroupCounts
from ..pattern import NMPattern
from . import gpu_packing, native_packing, reference
from .reference import Pruned24


# --- choosing what is kept ----------------------------------------------------------------------------------------------
def top_n_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`reference.top_n_mask`: bool `[out, in]`, the n highest scores of each group of m, of equal ones the first."""
    if native_packing.takes_numbers(scores):
        return native_packing.top_n_mask(scores, pattern)
    if gpu_packing.takes_scores(scores, pattern):
        return gpu_packing.top_n_mask(scores, pattern)
    return reference.top_n_mask(scores, pattern)


def top_n_codes(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`reference.top_n_codes`: the codes of `top_n_mask`, int64 `[out, groups]`, without a look at them: nothing waits."""
    if native_packing.takes_numbers(scores):
        return native_packing.top_n_codes(scores, pattern)
    if gpu_packing.takes_scores(scores, pattern):
        return gpu_packing.top_n_codes(scores, pattern)
    return reference.top_n_codes(scores, pattern)


def prune_24(weight: torch.Tensor, scores: torch.Tensor | None = None) -> Pruned24:
    """`reference.prune_24`: values, ids and codes of a weight, of which the highest scores (magnitudes) are kept."""
    given = (weight,) if scores is None else (weight, scores)
    if all(_can_be_packed(tensor) and tensor.shape == weight.shape for tensor in given) and not _differentiated(
        weight
    ):
        if native_packing.takes_numbers(*given):
            return native_packing.prune_24(weight, scores)
        if gpu_packing.takes_packing(*given):
            return gpu_packing.prune_24(weight, scores)
    return reference.prune_24(weight, scores)


# --- packed weights -----------------------------------------------------------------------------------------------------
def pack_24(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`codec.pack_24`: values and ids of a weight under an exactly 2:4 mask."""
    fits = _can_be_packed(weight) and mask.shape == weight.shape and not _differentiated(weight)
    if fits and native_packing.takes_numbers(weight) and native_packing.takes(mask):
        packed = native_packing.pack_24(weight, _as_bool(mask))
        if packed is not None:
            return packed
    return codec.pack_24(weight, mask)


def unpack_24(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`codec.unpack_24`: the dense weight, pruned positions +0."""
    if ids.dtype == torch.uint8 and _belong_together(values, ids) and not _differentiated(values):
        if native_packing.takes_numbers(values) and native_packing.takes(ids):
            return native_packing.unpack_24(values, ids)
        if gpu_packing.takes_packing(values, ids=ids):
            return gpu_packing.unpack_24(values, ids)
    return codec.unpack_24(values, ids)


# --- masks and codes ----------------------------------------------------------------------------------------------------
def mask_to_codes(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`codec.mask_to_codes`: int64 `[out, groups]` of a mask that keeps exactly n of m."""
    codes = native_packing.mask_to_codes(_as_bool(mask), pattern) if native_packing.takes(mask) else None
    return codec.mask_to_codes(mask, pattern) if codes is None else codes


def codes_to_mask(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """`codec.codes_to_mask`: bool `[out, in_features]`."""
    if native_packing.takes(codes) and codes.shape[1] == pattern.num_groups(in_features):
        mask = native_packing.codes_to_mask(codes, pattern, in_features)
        if mask is not None:
            return mask
    return codec.codes_to_mask(codes, pattern, in_features)


def complete_mask(mask: torch.Tensor, pattern: NMPattern) -> tuple[torch.Tensor, int]:
    """`codec.complete_mask`: groups that keep fewer than n filled, lowest index first, and how many were."""
    completed = native_packing.complete_mask(_as_bool(mask), pattern) if native_packing.takes(mask) else None
    return codec.complete_mask(mask, pattern) if completed is None else completed


def count_groups(mask: torch.Tensor, pattern: NMPattern) -> GroupCounts:
    """`codec.count_groups`: how many groups keep too many or too few."""
    if native_packing.takes(mask):
        return native_packing.count_groups(_as_bool(mask), pattern)
    return codec.count_groups(mask, pattern)


def pack_codes(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """`codec.pack_codes`: the bytes of docs/FORMAT.md, uint8 `[out, pattern.packed_row_bytes(in_features)]`."""
    if native_packing.takes(codes) and codes.shape[1] == pattern.num_groups(in_features):
        packed = native_packing.pack_codes(codes, pattern, in_features)
        if packed is not None:
            return packed
    return codec.pack_codes(codes, pattern, in_features)


def unpack_codes(
    packed: torch.Tensor, pattern: NMPattern, in_features: int, name: str = "mask", check: bool = True
) -> torch.Tensor:
    """`codec.unpack_codes`: int64 `[out, groups]`, of bytes that are refused where they are damaged."""
    if _is_packed(packed, pattern, in_features) and native_packing.takes(packed):
        codes = native_packing.unpack_codes(packed, pattern, in_features, check)
        if codes is not None:
            return codes
    return codec.unpack_codes(packed, pattern, in_features, name, check)


def check_codes(packed: torch.Tensor, pattern: NMPattern, in_features: int, name: str = "mask") -> None:
    """Refuse the bytes that `unpack_codes` refuses, without the memory for codes (24 times that of the bytes for 2:4)."""
    native = _is_packed(packed, pattern, in_features) and native_packing.takes(packed)
    if not (native and native_packing.holds_codes(packed, pattern, in_features)):
        codec.unpack_codes(packed, pattern, in_features, name)


# --- what is asked of tensors -------------------------------------------------------------------------------------------
def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and weight.shape[1] % 8 == 0


def _is_packed(packed: torch.Tensor, pattern: NMPattern, in_features: int) -> bool:
    fits = packed.dim() == 2 and packed.shape[1] == pattern.packed_row_bytes(in_features)
    return fits and packed.dtype == torch.uint8


def _belong_together(values: torch.Tensor, ids: torch.Tensor) -> bool:
    return values.dim() == ids.dim() == 2 and values.shape == (ids.shape[0], 4 * ids.shape[1])


def _differentiated(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask != 0
