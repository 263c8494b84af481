# SPDX-License-Identifier: Apache-2.0
"""`fit_side_branch`: the terms beside a mask in closed form, from calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import NMSparseConfig, NMSparseLayer, mask_layers
from ..adapter.terms import block_projection, fit_low_rank, fit_slorb, side_branch
from ..criteria import BlockInputs, Choice, Criterion, InputStatistics
from ..errors import ConfigError
from ..hub.masks import active_mask
from ..pattern import NMPattern
from .prior import targets_of, walk_dense


@dataclass(frozen=True)
class BranchFit:
    """What a side branch gives back to one layer: errors of its output relative to the dense one's energy, `tr(D H D^T) /
    tr(W H W^T)`.

    Args:
        name (`str`): layer name.
        error_without (`float`): of the masked weight alone.
        error_with (`float`): with the fitted branch beside it.
    """

    name: str
    error_without: float
    error_with: float


def fit_side_branch(
    model: nn.Module,
    calibration: Any,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> list[BranchFit]:
    """Fit SLoRB and low-rank terms to the mask as it is now, for the least output error of each layer.

    SLoRB first, then the low-rank term on what SLoRB leaves. Values learned so far are overwritten; masks and a delta stay.
    Call it after `nms.set_prior`, or at the end of mask training. A trained projection is reset to blocks.

    Args:
        model (`PeftModel` or a model with a mask adapter): the model.
        calibration, tokenizer: as in `nms.prune`.
        adapter_name (`str`, *optional*): which adapter; the active one by default.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        `list[BranchFit]`: one for each layer, in the order of the model.

    Raises:
        ConfigError: if the adapter has no side branch, is a published mask, or is merged.
    """
    adapter_name = adapter_name or active_mask(model)
    layers = mask_layers(model, adapter_name)
    if not layers:
        raise ConfigError(f"the model has no mask adapter {adapter_name!r}")
    config = next(iter(layers.values())).configs[adapter_name]
    if not config.has_side_branch:
        raise ConfigError(
            f"adapter {adapter_name!r} has no side branch; create it with NMSparseConfig(low_rank=...) or slorb_block=..."
        )
    if config.mask_format != "logits":
        raise ConfigError(f"adapter {adapter_name!r} is a published mask; its terms are final")
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("the adapter is merged into the weights; unmerge it first (model.unmerge_adapter())")
    fit = _Fit(layers, adapter_name, config)
    targets = [target for name, layer in layers.items() for target in targets_of(name, layer, lambda choice: None)]
    with torch.no_grad():
        walk_dense(model, layers, targets, fit, config.pattern, calibration, tokenizer, progress)
        for name, terms in fit.terms.items():  # only now that all are there
            for container, value in terms.items():
                getattr(layers[name], container)[adapter_name].weight.copy_(value)
    return fit.report


class _Fit(Criterion):
    """Walks as a criterion that chooses the masks there are, and fits terms to them on the way."""

    name = "side branch"
    needs = "hessian"

    def __init__(self, layers: Mapping[str, NMSparseLayer], adapter_name: str, config: NMSparseConfig) -> None:
        self.layers, self.adapter_name, self.config = layers, adapter_name, config
        self.terms: dict[str, dict[str, torch.Tensor]] = {}
        self.report: list[BranchFit] = []

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        raise NotImplementedError("the masks are those of the layers; see choose_block")

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        for name, weight in inputs.weights.items():
            layer, hessian = self.layers[name], inputs.statistics[name].hessian
            residual = layer.hard_weight([self.adapter_name]).float() - weight.float()
            terms = self._fitted(residual, hessian)
            branch = side_branch(terms, self.config).dense(weight.shape[1])
            whole = max(_energy(weight.float(), hessian), torch.finfo(torch.float32).tiny)
            errors = [_energy(rest, hessian) / whole for rest in (residual, residual + branch)]
            self.terms[name] = terms
            self.report.append(BranchFit(name, *errors))
            yield name, Choice(layer.hard_mask(self.adapter_name))

    def _fitted(self, residual: torch.Tensor, hessian: torch.Tensor) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = {}
        if (block := self.config.slorb_block) is not None:
            terms["nmsparse_slorb"] = fit_slorb(residual, hessian, block)
            plain = side_branch(terms, self.config)
            if self.config.slorb_train_projection:
                terms["nmsparse_slorb_projection"] = block_projection(residual.shape[1], block).to(residual)
            residual = residual + plain.dense(residual.shape[1])
        if (rank := self.config.low_rank) is not None:
            terms["nmsparse_low_rank_a"], terms["nmsparse_low_rank_b"] = fit_low_rank(residual, hessian, rank)
        return terms


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((weight @ hessian) * weight).sum())
