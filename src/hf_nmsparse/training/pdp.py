# SPDX-License-Identifier: Apache-2.0
"""PDP without groups: weights trained towards unstructured or channel sparsity under a soft mask of their own magnitudes.

    m(w) = sigmoid((w^2 - t^2) / tau),     W~ = m(W) W

with t in the middle between the smallest kept and the largest pruned magnitude of a layer at its ratio of the moment (Cho et al.,
"PDP: Parameter-free Differentiable Pruning is All You Need", arXiv 2305.11203). For channels w is the root mean square of the
weights of an output channel. For n:m there is `NMSparseConfig(relaxation="pdp")`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import ops
from ..criteria import name_matches
from ..errors import ConfigError

GRANULARITIES = ("weight", "channel")


class SoftMask(nn.Module):
    """Parametrisation of a weight: `m(W) W` at a ratio and a temperature that are set from outside.

    Attributes:
        final_ratio (`float`): share of the layer to prune in the end; `ratio`, of now; `temperature`: tau over the mean of w^2.
    """

    def __init__(self, granularity: str) -> None:
        super().__init__()
        self.granularity = granularity
        self.register_buffer("final_ratio", torch.tensor(math.nan))  # so that a resumed run goes on with it
        self.ratio, self.temperature = 0.0, 1.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.ratio <= 0:
            return weight
        sizes = self.sizes(weight)
        threshold = _threshold(sizes.detach(), self.ratio)
        tau = self.temperature * weight.detach().float().square().mean()
        if self.granularity == "channel":
            mask = torch.sigmoid((sizes.square() - threshold.square()) / tau)
            return weight * mask.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)
        return ops.pdp_weight(weight, threshold.view(1, 1), weight.shape[-1], tau, weight.dtype)

    def sizes(self, weight: torch.Tensor) -> torch.Tensor:
        """What is compared: magnitudes of weights, or root mean squares of output channels, flat."""
        if self.granularity == "channel":
            return weight.flatten(1).float().square().mean(1).sqrt()
        return weight.flatten().float().abs()

    @torch.no_grad()
    def harden(self, weight: torch.Tensor) -> None:
        """Set to 0 the `final_ratio` of the smallest, equal ones from the end."""
        sizes = self.sizes(weight)
        pruned = sizes.flip(0).sort(stable=True).indices[: _count(sizes, float(self.final_ratio))]
        kept = torch.ones_like(sizes, dtype=torch.bool)
        kept[len(sizes) - 1 - pruned] = False
        kept = kept.view(-1, *[1] * (weight.dim() - 1)) if self.granularity == "channel" else kept.view_as(weight)
        weight.mul_(kept)


class PDPCallback(TrainerCallback):
    """Train the weights of a model towards unstructured or channel sparsity; for any Trainer and any model.

    After `warmup` of the steps one ranking of the magnitudes of all layers fixes the ratio of each; then the ratios grow
    linearly over `ramp` of the steps. At the end of training the pruned weights are set to 0 and the model is a plain one again.
    (The paper: 16 epochs of warm-up, 0.015 of the ratio an epoch: shares of 100 epochs.)

    Args:
        sparsity (`float`): share of the weights, or of the output channels, to prune over all layers.
        granularity (`str`): `"weight"` or `"channel"`.
        target_modules (`Sequence[str]`, *optional*): layers: full names or any run of their parts; by default all linear layers
            and convolutions but the last one of the model.
        warmup (`float`), ramp (`float`): shares of the steps.
        temperature (`tuple[float, float]`): tau over the mean of w^2 of a layer, at the start and the end of training.

    Raises:
        ConfigError: on a value out of range, or if no layer is meant.
    """

    def __init__(
        self,
        sparsity: float,
        granularity: Literal["weight", "channel"] = "weight",
        target_modules: Sequence[str] | None = None,
        warmup: float = 0.16,
        ramp: float = 0.67,
        temperature: tuple[float, float] = (0.25, 0.01),
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ConfigError(f"granularity={granularity!r}: choose one of {', '.join(map(repr, GRANULARITIES))}")
        if not 0 < sparsity < 1:
            raise ConfigError(f"sparsity={sparsity!r} must be a share above 0 and below 1")
        if warmup < 0 or ramp < 0 or warmup + ramp > 1:
            raise ConfigError(f"warmup={warmup!r} and ramp={ramp!r} are shares of the steps, together at most 1")
        if len(temperature) != 2 or not all(value > 0 for value in temperature):
            raise ConfigError(f"temperature={temperature!r} must be two positive numbers, (start, end)")
        if isinstance(target_modules, str):
            raise ConfigError(f"target_modules must be a list of names, got the string {target_modules!r}")
        self.sparsity, self.granularity, self.target_modules = sparsity, granularity, target_modules
        self.warmup, self.ramp, self.temperature = warmup, ramp, temperature
        self.masks: dict[str, SoftMask] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
        wanted = self.target_modules
        meant = [n for n in layers if any(name_matches(n, entry) for entry in wanted)] if wanted else list(layers)[:-1]
        if not meant:
            raise ConfigError(
                f"target_modules={wanted!r} means none of the {len(layers)} layers of {type(model).__name__}"
            )
        for name in meant:
            if parametrize.is_parametrized(layers[name]):
                raise ConfigError(f"{name} has a parametrised weight already; use a model that has none")
        for name in meant:
            self.masks[name] = SoftMask(self.granularity).to(layers[name].weight.device)
            parametrize.register_parametrization(layers[name], "weight", self.masks[name])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        progress = state.global_step / max(1, state.max_steps)
        if progress >= self.warmup and any(bool(mask.final_ratio.isnan()) for mask in self.masks.values()):
            self._rank(model)
        share = (progress - self.warmup) / self.ramp if self.ramp else float(progress >= self.warmup)
        start, end = self.temperature
        for mask in self.masks.values():
            mask.temperature = start + (end - start) * progress
            mask.ratio = float(mask.final_ratio) * min(1.0, share) if share > 0 else 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if any(bool(mask.final_ratio.isnan()) for mask in self.masks.values()):
            self._rank(model)  # stopped within the warm-up
        for name, mask in self.masks.items():
            layer = model.get_submodule(name)
            mask.harden(layer.parametrizations.weight.original)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        self.masks = {}

    @torch.no_grad()
    def _rank(self, model: nn.Module) -> None:
        """The ratio of each layer, by one ranking of all."""
        sizes = {
            name: mask.sizes(model.get_submodule(name).parametrizations.weight.original)
            for name, mask in self.masks.items()
        }
        every = torch.cat([size.cpu() for size in sizes.values()])
        threshold = every.sort().values[min(len(every) - 1, round(self.sparsity * len(every)))]
        for name, mask in self.masks.items():
            mask.final_ratio.fill_(float((sizes[name].cpu() < threshold).double().mean()))


def _count(sizes: torch.Tensor, ratio: float) -> int:
    """How many are pruned; never all."""
    return min(len(sizes) - 1, round(ratio * len(sizes)))


def _threshold(sizes: torch.Tensor, ratio: float) -> torch.Tensor:
    """The middle between the largest pruned and the smallest kept; 0 if nothing is pruned."""
    count = _count(sizes, ratio)
    if count < 1:
        return sizes.new_zeros(())
    return (sizes.kthvalue(count).values + sizes.kthvalue(count + 1).values) / 2
