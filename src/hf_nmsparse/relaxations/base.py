# SPDX-License-Identifier: Apache-2.0
"""What a relaxation is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, TypeVar

import torch

from ..errors import ConfigError
from ..ops import NoiseKey, SamplingState
from ..ops.shared_sample import SharedSample
from ..pattern import NMPattern


class RelaxationConfig(Protocol):
    """The fields of `NMSparseConfig` that relaxations read."""

    pattern: str
    seed: int
    init_weights: bool
    prior_strength: float
    schedule: str
    temperature: tuple[float, float]
    logit_scale: tuple[float, float]
    magnitude_regularization: float
    logits_dtype: str


class Relaxation(ABC):
    """Turns trainable tensors into an effective weight, and at the end into the codes of a mask.

    One object serves one layer of one adapter. It holds no tensors: the layer owns those that `parameters` declares.

    Args:
        pattern (`NMPattern`): the pattern.
        key (`NoiseKey`): identity of the layer's noise.
    """

    name: ClassVar[str]

    def __init__(self, pattern: NMPattern, key: NoiseKey) -> None:
        self.pattern = pattern
        self.key = key

    @abstractmethod
    def parameters(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        """Fresh trainable tensors for a base weight `[out, in]`, on its device, by container name.

        Container names start with `nmsparse_`. The tensors carry no prior yet: they are zero, or random where
        `config.init_weights` is False.
        """

    @abstractmethod
    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Write a prior mask into the parameters, in place.

        Args:
            parameters (`dict[str, torch.Tensor]`): what `parameters` declared.
            codes (`torch.Tensor`): the mask as codes, int64 `[out, groups]`.
            config (`RelaxationConfig`): has the strength of the prior.
            factors (`torch.Tensor`, *optional*): of that strength, for each group, float `[out, groups]`; by default 1.
        """

    @abstractmethod
    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        """The weight the layer computes with, `[out, in]` in the dtype of `weight`.

        Args:
            weight (`torch.Tensor`): the base weight, `[out, in]`.
            parameters (`dict[str, torch.Tensor]`): what `parameters` declared.
            state (`SamplingState`): temperature, scale, regulariser, step and draw of this moment.
            hard (`bool`): the exact n:m weight (evaluation) instead of the sampled soft one (training).
            shared (`SharedSample`, *optional*): may hold the soft one of an earlier pass with the same arguments, or take
                it for later ones.
        """

    @abstractmethod
    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """The final mask as codes, int64 `[out, groups]`."""

    @abstractmethod
    def certainty(
        self, parameters: dict[str, torch.Tensor], in_features: int, state: SamplingState
    ) -> tuple[float, float, int]:
        """How decided the masks are without noise, over all groups of the given rows.

        Returns:
            sum of the probabilities of each group's most probable mask, sum of the entropies in bits, number of groups.
        """


RELAXATIONS: dict[str, type[Relaxation]] = {}
_R = TypeVar("_R", bound=type[Relaxation])


def register_relaxation(cls: _R) -> _R:
    """Class decorator: make a relaxation available under its `name`."""
    RELAXATIONS[cls.name] = cls
    return cls


def get_relaxation(name: str) -> type[Relaxation]:
    """The relaxation class called `name`.

    Raises:
        ConfigError: if there is none.
    """
    if name not in RELAXATIONS:
        raise ConfigError(f"relaxation {name!r} is not known; choose one of {', '.join(sorted(RELAXATIONS))}")
    return RELAXATIONS[name]
