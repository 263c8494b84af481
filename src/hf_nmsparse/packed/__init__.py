# SPDX-License-Identifier: Apache-2.0
"""Packed 2:4 models: the layer, masked <-> packed, and the Transformers quantizer."""

from .compress import PackedSizes, compress, decompress, packed_sizes
from .config import PackedConfig
from .modules import Explanation, SparseLinear24, explain
from .quantizer import PackedQuantizer, register

__all__ = [
    "Explanation",
    "PackedConfig",
    "PackedQuantizer",
    "PackedSizes",
    "SparseLinear24",
    "compress",
    "decompress",
    "explain",
    "packed_sizes",
    "register",
]
