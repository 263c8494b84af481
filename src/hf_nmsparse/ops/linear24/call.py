# SPDX-License-Identifier: Apache-2.0
"""A product with a packed weight, as far as the choice of a kernel goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .weight import Weight24

FORWARD, INPUT_GRADIENT = "forward", "input gradient"


@dataclass(frozen=True)
class Call24:
    """What decides which kernel fits.

    Args:
        device (`torch.device`): where x and the weight are.
        dtype (`torch.dtype`): of x.
        kind (`str`): how the values are stored, one of `VALUE_KINDS`.
        out_features (`int`), in_features (`int`): of the weight.
        tokens (`int`): rows of x.
        product (`str`): `FORWARD` (y = x W^T) or `INPUT_GRADIENT` (dx = dy W).
    """

    device: torch.device
    dtype: torch.dtype
    kind: str
    out_features: int
    in_features: int
    tokens: int
    product: str = FORWARD

    @classmethod
    def of(cls, x: torch.Tensor, weight: Weight24, product: str = FORWARD) -> Call24:
        """The call that multiplies `x` (`[..., in]`, or `[..., out]` of a gradient) by `weight`."""
        tokens = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
        return cls(x.device, x.dtype, weight.kind, weight.out_features, weight.in_features, tokens, product)
