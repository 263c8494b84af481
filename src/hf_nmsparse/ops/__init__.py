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
    pack_bits,
    pack_codes,
    unpack_24,
    unpack_bits,
    unpack_codes,
)
from .linear24 import Linear24Backend, linear_24, linear_24_backend, register_linear_24_backend
from .mask_sampling import hard_codes, mask_certainty, masked_weight, soft_mask
from .philox import NoiseKey
from .reference import top_n_mask
from .sampler import SamplingState
from .side_branch import SideBranch, add_low_rank, pool_blocks

__all__ = [
    "GroupCounts",
    "Linear24Backend",
    "NoiseKey",
    "SamplingState",
    "SideBranch",
    "add_low_rank",
    "check_ids_24",
    "codes_to_mask",
    "columns_of_24",
    "complete_mask",
    "count_groups",
    "hard_codes",
    "linear_24",
    "linear_24_backend",
    "mask_certainty",
    "mask_to_codes",
    "masked_weight",
    "pack_24",
    "pack_bits",
    "pack_codes",
    "pool_blocks",
    "register_linear_24_backend",
    "soft_mask",
    "top_n_mask",
    "unpack_24",
    "unpack_bits",
    "unpack_codes",
]
