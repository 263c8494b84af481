# SPDX-License-Identifier: Apache-2.0
"""The 2:4 weight of a packed layer: the names of its tensors, and how they are made of a masked weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops
from ..errors import ConfigError, PatternError
from ..ops import VALUE_KINDS, Weight24
from ..pattern import NMPattern
from .branch import BRANCH_LEAVES

PATTERN = NMPattern(2, 4)
SCALE_LEAVES = ("weight_scale", "weight_input_scale")
WEIGHT_LEAVES = ("weight", "weight_idx", *SCALE_LEAVES)
PACKED_LEAVES = (*WEIGHT_LEAVES, *BRANCH_LEAVES)


def weight_tensors(weight: Weight24) -> dict[str, torch.Tensor]:
    """The tensors of a weight under the names that they have in a packed layer."""
    tensors = zip(WEIGHT_LEAVES, (weight.values, weight.ids, weight.scale, weight.input_scale), strict=True)
    return {leaf: tensor for leaf, tensor in tensors if tensor is not None}


def num_scales(in_features: int) -> int:
    """Columns of the scale of quantised values, ceil(in / 128)."""
    return -(-in_features // ops.SCALE_COLUMNS)


def check_value_kind(values: object) -> None:
    """Refuse what is no way to store values.

    Raises:
        ConfigError: naming those there are.
    """
    if values not in VALUE_KINDS:
        raise ConfigError(f"values={values!r}; use one of {', '.join(map(repr, VALUE_KINDS))}")


def check_input_scale(name: str, input_scale: torch.Tensor, shape: Sequence[int], values: str) -> None:
    """Refuse a factor of the inputs that does not fit a weight of `shape` (out, in).

    Raises:
        ConfigError: if values are not quantised, which leaves nothing for it to do.
        PatternError: naming the layer, if it has another shape or is not finite and above 0.
    """
    if values == "dense":
        raise ConfigError(f"{name}: an input scale serves quantised values; pass values='int8' or 'int4', or no scale")
    if input_scale.shape != (shape[1],) or not bool((input_scale.isfinite() & (input_scale > 0)).all()):
        raise PatternError(
            f"{name}: its input scale has shape {list(input_scale.shape)}; expected [{shape[1]}], finite and above 0"
        )


def pack_masked(
    weight: torch.Tensor, keep: torch.Tensor, values: str = "dense", input_scale: torch.Tensor | None = None
) -> Weight24:
    """`weight` (`[out, in]`) packed where the bool mask `keep` keeps it.

    Groups that keep fewer than two are completed lowest index first, with zeros.

    Args:
        weight (`torch.Tensor`), keep (`torch.Tensor`): as above.
        values (`str`): "dense", or "int8" or "int4": rounded to the nearest, with scales in the dtype of the weight.
        input_scale (`torch.Tensor`, *optional*): `[in]`: kept weights are divided by it before they are rounded, and the
            layer multiplies by it.

    Raises:
        PatternError: if in_features is no multiple of 8, or a group keeps more than two.
    """
    completed, filled = ops.complete_mask(keep, PATTERN)
    kept, ids = ops.pack_24(weight.masked_fill(~keep, 0) if filled else weight, completed)
    return _stored(kept, ids, values, input_scale)


def pack_pruned(weight: torch.Tensor, values: str = "dense") -> Weight24:
    """`weight` (`[out, in]`) packed where its magnitude is among the two highest of its group; `values` as above.

    Raises:
        PatternError: if in_features is no multiple of 8.
    """
    kept, ids, _ = ops.prune_24(weight)
    return _stored(kept, ids, values)


def _stored(kept: torch.Tensor, ids: torch.Tensor, values: str, input_scale: torch.Tensor | None = None) -> Weight24:
    if values == "dense":
        return Weight24(kept, ids)
    dtype = kept.dtype
    if input_scale is not None:
        # In the dtype in which it is stored, before anything is divided by it.
        input_scale = input_scale.to(kept.device, dtype)
        kept = kept.float() / input_scale.float()[ops.columns_of_24(ids)]
    quantised, scale = ops.quantize_values(kept, values, dtype)
    return Weight24(quantised, ids, scale, input_scale)
