# SPDX-License-Identifier: Apache-2.0
"""Published masks and packed models: writing, reading, checking."""

from .deploy import compress, decompress
from .diff import Difference, MaskDiff, diff_masks
from .mask_file import PublishedMask, mask_summary, read_mask
from .masks import check_fit, load_mask, save_mask
from .publish import push_folder, push_mask
from .verify import VerifyReport, verify

__all__ = [
    "Difference",
    "MaskDiff",
    "PublishedMask",
    "VerifyReport",
    "check_fit",
    "compress",
    "decompress",
    "diff_masks",
    "load_mask",
    "mask_summary",
    "push_folder",
    "push_mask",
    "read_mask",
    "save_mask",
    "verify",
]
