# SPDX-License-Identifier: Apache-2.0
"""What pruning does to each layer, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .base import InputStatistics


@dataclass
class LayerReport:
    """What was done to one layer.

    Args:
        name (`str`): full module name.
        groups (`int`): groups of m weights; unstructured: rows.
        relative_error (`float`, *optional*): `tr(D H D^T) / tr(W H W^T)`, D the change of the weight W; `None` without
            calibration.
        kept_energy (`float`): sum of squares of the weights that are kept, as they were, over that of all.
        seconds (`float`): time to choose.
    """

    name: str
    groups: int
    relative_error: float | None
    kept_energy: float
    seconds: float


@dataclass(frozen=True)
class LayerCodes:
    """The n:m mask of one weight as it is published, and of which weight.

    Args:
        packed (`torch.Tensor`): packed codes, uint8 `[out, bytes]`; of fused experts the rows of all, one after the other.
        base (`torch.Tensor`): fingerprint of the dense weight, uint8 `[16]`.
        shape (`tuple[int, int]`): of the weight, (out, in).
        fused_experts (`bool`): whether this is a parameter that holds experts.
    """

    packed: torch.Tensor
    base: torch.Tensor
    shape: tuple[int, int]
    fused_experts: bool


@dataclass
class PruneReport:
    """What was pruned, and how well.

    Args:
        criterion (`str`): name of the criterion.
        pattern (`str`): for example `"2:4"` or `"60%"`.
        tokens (`int`): calibration tokens that enter the first stack of blocks, padding not counted; 0 if none were needed.
        seconds (`float`): wall time in all.
        error_form (`str`, *optional*): what H is in `relative_error`: `"hessian"`, the mean of `x x^T`, or `"diagonal"`,
            only its diagonal, where no more than norms were gathered; `None` without calibration.
        layers (`list[LayerReport]`): in the order of pruning.
        weights (`str`): what was done with kept weights: `"keep"`, `"update"` or `"refit"`.
        permuted (`list[str]`): layers whose input channels were permuted.
        codes (`dict[str, LayerCodes]`): the masks for the base model as it was, by the names under which they are published;
            empty where the pattern has no codes, or channels were permuted.
    """

    criterion: str
    pattern: str
    tokens: int
    seconds: float
    error_form: str | None
    layers: list[LayerReport] = field(default_factory=list)
    weights: str = "keep"
    permuted: list[str] = field(default_factory=list)
    codes: dict[str, LayerCodes] = field(default_factory=dict, repr=False)


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, statistics: InputStatistics | None) -> float | None:
    """Error of the outputs of a layer over their energy, `tr(D H D^T) / tr(W H W^T)` with `D = pruned - weight`.

    Without a Hessian its diagonal is taken, without statistics there is none.
    """
    if statistics is None:
        return None

    def output_energy(weight: torch.Tensor) -> float:
        if statistics.hessian is None:
            return float((weight.square() @ statistics.squared_norm).sum())
        return float(((weight @ statistics.hessian) * weight).sum())

    weight = weight.float()
    whole = output_energy(weight)
    return output_energy(pruned.float() - weight) / whole if whole > 0 else 0.0


def kept_energy(weight: torch.Tensor, mask: torch.Tensor) -> float:
    """Sum of squares of the kept weights over that of all; 1 for a weight of zeros."""
    squares = weight.float().square()
    whole = float(squares.sum())
    return float(torch.where(mask, squares, 0).sum()) / whole if whole > 0 else 1.0
