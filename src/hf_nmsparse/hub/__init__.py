# SPDX-License-Identifier: Apache-2.0
"""Published masks and packed models: writing, reading, checking. And the formats of others."""

from .bitmask import load_bitmask
from .deploy import compress, decompress
from .diff import Difference, MaskDiff, diff_masks
from .exporting import Export, export, prepare_export
from .importing import ImportedMask, find_mask, import_mask
from .mask_file import PublishedMask, mask_summary, read_mask
from .masks import check_fit, load_mask, save_mask
from .publish import push_folder, push_mask
from .semi_structured import from_semi_structured, to_semi_structured
from .verify import VerifyReport, verify

__all__ = [
    "Difference",
    "Export",
    "ImportedMask",
    "MaskDiff",
    "PublishedMask",
    "VerifyReport",
    "check_fit",
    "compress",
    "decompress",
    "diff_masks",
    "export",
    "find_mask",
    "from_semi_structured",
    "import_mask",
    "load_bitmask",
    "load_mask",
    "mask_summary",
    "prepare_export",
    "push_folder",
    "push_mask",
    "read_mask",
    "save_mask",
    "to_semi_structured",
    "verify",
]
