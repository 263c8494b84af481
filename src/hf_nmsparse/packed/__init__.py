# SPDX-License-Identifier: Apache-2.0
"""Packed 2:4 models: the layer, masked <-> packed, and the Transformers quantizer."""

from .compress import PackedSizes, check_compress, compress, decompress, packed_sizes
from .config import PackedConfig
from .explain import Explanation, explain
from .modules import SparseLinear24
from .pack_files import pack_files, packable_layers
from .quantizer import PackedQuantizer, register
from .stored_mask import StoredLayerMask, StoredMask
from .switch import switch_mask

__all__ = [
    "Explanation",
    "PackedConfig",
    "PackedQuantizer",
    "PackedSizes",
    "SparseLinear24",
    "StoredLayerMask",
    "StoredMask",
    "check_compress",
    "compress",
    "decompress",
    "explain",
    "pack_files",
    "packable_layers",
    "packed_sizes",
    "register",
    "switch_mask",
]
