# SPDX-License-Identifier: Apache-2.0
"""The dense term beside a sparse weight: what a layer adds to `x (W * M)^T`.

    SLoRB      y += pool(x) S^T         pool(x)_b = sum of x over block b of k consecutive inputs, S `[out, ceil(in/k)]`
    low rank   y += (x A^T) B^T         A `[r, in]`, B `[out, r]`

(SLoRB: AST, arXiv 2407.20584, section 3.3, with its block-indicator projection. With a trained projection P it is the
low-rank term with A = P, B = S.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ..errors import PatternError


@dataclass(frozen=True)
class SideBranch:
    """Tensors of a side branch; at least one of its two forms is there.

    Args:
        slorb (`torch.Tensor`, *optional*): S, `[out, ceil(in / slorb_block)]`.
        slorb_block (`int`, *optional*): k, inputs per block; the last block may be short.
        low_rank_a (`torch.Tensor`, *optional*): A, `[r, in]`.
        low_rank_b (`torch.Tensor`, *optional*): B, `[out, r]`.
    """

    slorb: torch.Tensor | None = None
    slorb_block: int | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the branch adds to the output: `x` `[..., in]` -> `[..., out]`, computed in the dtype of `x`."""
        added = None
        if self.slorb is not None:
            added = F.linear(pool_blocks(x, self.slorb_block), self.slorb.to(x.dtype))
        if self.low_rank_a is not None:
            low_rank = F.linear(F.linear(x, self.low_rank_a.to(x.dtype)), self.low_rank_b.to(x.dtype))
            added = low_rank if added is None else added + low_rank
        return added

    def dense(self, in_features: int) -> torch.Tensor:
        """The branch as one dense weight, `[out, in]`, in the dtype of its tensors."""
        weight = None
        if self.slorb is not None:
            weight = self.slorb.repeat_interleave(self.slorb_block, 1)[:, :in_features]
        if self.low_rank_a is not None:
            with torch.autocast(self.low_rank_a.device.type, enabled=False):
                low_rank = self.low_rank_b @ self.low_rank_a
            weight = low_rank if weight is None else weight + low_rank
        return weight

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (`[out, in]`) plus the branch as a dense weight, added in float32 or wider and rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        added = self.apply(lambda tensor: tensor.to(weight.device, wide)).dense(weight.shape[1])
        return (weight.to(wide) + added).to(weight.dtype)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SideBranch:
        """The same branch with `function` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return SideBranch(**{name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()})

    def __add__(self, other: SideBranch) -> SideBranch:
        """The branch that adds what both add.

        Raises:
            PatternError: if both are SLoRB with different blocks.
        """
        if self.slorb is not None and other.slorb is not None and self.slorb_block != other.slorb_block:
            raise PatternError(
                f"SLoRB terms with blocks of {self.slorb_block} and {other.slorb_block} inputs have no common form"
            )
        return SideBranch(
            slorb=_both(self.slorb, other.slorb, torch.add),
            slorb_block=self.slorb_block or other.slorb_block,
            low_rank_a=_both(self.low_rank_a, other.low_rank_a, lambda a, b: torch.cat([a, b])),
            low_rank_b=_both(self.low_rank_b, other.low_rank_b, lambda a, b: torch.cat([a, b], 1)),
        )


def _both(
    one: torch.Tensor | None,
    other: torch.Tensor | None,
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    return combine(one, other) if one is not None and other is not None else one if one is not None else other


def add_low_rank(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`W + B A`, added in float32 or wider and rounded once to the dtype of `weight`; differentiable.

    Args:
        weight (`torch.Tensor`): W, `[out, in]`; of experts their rows one after the other.
        a (`torch.Tensor`): A, `[r, in]`, or `[experts, r, in]`.
        b (`torch.Tensor`): B, `[out, r]`, or `[experts, out of one, r]`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        added = b.to(weight.device, wide) @ a.to(weight.device, wide)
        return (weight.to(wide) + added.reshape(weight.shape)).to(weight.dtype)


def pool_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over blocks of consecutive inputs: `[..., in]` -> `[..., ceil(in / block)]`; the last block may be short."""
    short = -x.shape[-1] % block
    return F.pad(x, (0, short)).unflatten(-1, (-1, block)).sum(-1)
