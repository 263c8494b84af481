# SPDX-License-Identifier: Apache-2.0
"""What a distribution over masks must offer so that `mask_sampling` can run it forward and backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..pattern import NMPattern
from .philox import NoiseKey, gumbel_noise

Distribution = TypeVar("Distribution")


@dataclass(frozen=True)
class SamplingState:
    """The moment of training, as 0-dim tensors so that changing it needs no device sync and no recompilation.

    Args:
        temperature, logit_scale, regularization (`torch.Tensor`): float32 scalars tau, kappa, lambda.
        step, draw (`torch.Tensor`): int64 scalars of the noise's counter.
    """

    temperature: torch.Tensor
    logit_scale: torch.Tensor
    regularization: torch.Tensor
    step: torch.Tensor
    draw: torch.Tensor

    @classmethod
    def of(
        cls,
        temperature: float,
        logit_scale: float,
        regularization: float = 0.0,
        step: int = 0,
        draw: int = 0,
        device: torch.device | str | None = None,
    ) -> SamplingState:
        """From Python numbers."""
        floats = [torch.full((), value, device=device) for value in (temperature, logit_scale, regularization)]
        integers = [torch.full((), value, dtype=torch.int64, device=device) for value in (step, draw)]
        return cls(*floats, *integers)

    def to(self, device: torch.device) -> SamplingState:
        """The same moment on another device."""
        if self.step.device == device:
            return self
        return SamplingState(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All five, in the order of the fields."""
        return self.temperature, self.logit_scale, self.regularization, self.step, self.draw


class Sampler(ABC, Generic[Distribution]):
    """The distribution over the masks of a layer, for any slice of its rows.

    It is computed from the logits each time it is asked for. `Distribution` is whatever a parametrisation keeps of it
    from one method to the next.

    Args:
        logits (`torch.Tensor`): `[out, ...]`, the rest as the parametrisation has it.
        pattern (`NMPattern`): the pattern.
        in_features (`int`): of the layer.
        key (`NoiseKey`): identity of the noise.
        state (`SamplingState`): temperature, scale, step, draw.
        noise (`bool`): whether the logits are perturbed.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        pattern: NMPattern,
        in_features: int,
        key: NoiseKey,
        state: SamplingState,
        noise: bool,
    ) -> None:
        self.logits, self.pattern, self.in_features = logits, pattern, in_features
        self.key, self.state, self.noise = key, state, noise
        self.groups = pattern.num_groups(in_features)
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        temperature = state.temperature.to(self.dtype)
        self.slope = state.logit_scale.to(self.dtype) / temperature
        self.inverse_temperature = temperature.reciprocal()

    def scaled_noise(self, rows: slice, per_group: int) -> torch.Tensor:
        """`g / tau`, `[rows, per_group, groups]`."""
        index = torch.arange(rows.start * self.groups, rows.stop * self.groups, device=self.logits.device)
        index = index.view(-1, self.groups)
        noise = gumbel_noise(index, per_group, self.key, self.state.step, self.state.draw, self.dtype)
        return noise.mul_(self.inverse_temperature)

    @staticmethod
    @abstractmethod
    def values_per_group(pattern: NMPattern) -> int:
        """Numbers held for each group of a slice; slices are cut so that about as many fit a cache for every pattern."""

    @staticmethod
    @abstractmethod
    def hard_codes(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        """Codes of the most probable masks without noise, int64 `[out, groups]`."""

    @staticmethod
    @abstractmethod
    def hard_mask(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        """The most probable masks without noise, bool `[out, in]`."""

    @abstractmethod
    def distribution(self, rows: slice) -> Distribution:
        """The distribution of the masks of some rows."""

    @abstractmethod
    def mask(self, distribution: Distribution) -> torch.Tensor:
        """Its mean, the soft mask, `[rows, in]`."""

    @abstractmethod
    def gradient(self, distribution: Distribution, grad_mask: torch.Tensor) -> torch.Tensor:
        """`dL/dlogits / slope`, shaped as the logits of these rows, from `dL/dM` `[rows, in]`."""

    @abstractmethod
    def certainty(self, distribution: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over groups of the largest probability of a mask and of the entropy in nats, both 0-dim."""
