# SPDX-License-Identifier: Apache-2.0
"""Published masks in the form in which `PackedConfig(mask=...)` puts them on a base while it loads."""

from __future__ import annotations

import os

from ..adapter import NMSparseConfig, side_branch
from ..packed import StoredLayerMask, StoredMask
from .mask_file import LayerMask, read_mask


def stored_mask(source: str | os.PathLike, revision: str | None = None, task: str | None = None) -> StoredMask:
    """Read a published mask for packing.

    Args:
        source (`str` or `Path`): folder or Hub repo.
        revision (`str`, *optional*): of the repo.
        task (`str`, *optional*): subfolder, where a repo holds masks of several tasks.

    Raises:
        FormatError, ConfigError: as `read_mask`.
    """
    mask = read_mask(source, revision, task)
    return StoredMask(
        pattern=mask.pattern,
        layers={name: _layer(layer, mask.config) for name, layer in mask.layers.items()},
        source=mask.source,
        base_model=mask.config.base_model_name_or_path,
        base_revision=mask.config.revision,
    )


def _layer(layer: LayerMask, config: NMSparseConfig) -> StoredLayerMask:
    delta_a, delta_b = layer.terms.get("nmsparse_delta_a"), layer.terms.get("nmsparse_delta_b")
    return StoredLayerMask(layer.packed, layer.base, delta_a, delta_b, side_branch(layer.terms, config))
