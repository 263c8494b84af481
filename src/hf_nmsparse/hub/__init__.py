# SPDX-License-Identifier: Apache-2.0
"""Published masks and packed models: writing, reading, checking."""

from .deploy import compress, decompress
from .masks import PublishedMask, load_mask, read_mask, save_mask
from .verify import VerifyReport, verify

__all__ = [
    "PublishedMask",
    "VerifyReport",
    "compress",
    "decompress",
    "load_mask",
    "read_mask",
    "save_mask",
    "verify",
]
