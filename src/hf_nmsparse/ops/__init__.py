# SPDX-License-Identifier: Apache-2.0
"""Numerical operations. The rooms above call these, never `codec` directly for arrays."""

from ..codec import (
    GroupCounts,
    check_ids_24,
    codes_to_mask,
    columns_of_24,
    complete_mask,
    count_groups,
    mask_to_codes,
    pack_24,
    pack_codes,
    unpack_24,
    unpack_codes,
)
from .reference import top_n_mask

__all__ = [
    "GroupCounts",
    "check_ids_24",
    "codes_to_mask",
    "columns_of_24",
    "complete_mask",
    "count_groups",
    "mask_to_codes",
    "pack_24",
    "pack_codes",
    "top_n_mask",
    "unpack_24",
    "unpack_codes",
]
