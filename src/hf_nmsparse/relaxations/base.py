# SPDX-License-Identifier: Apache-2.0
"""What a relaxation is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch

from ..errors import ConfigError
from ..ops import NoiseKey, SamplingState
from ..ops.shared_sample import SharedSample
from ..pattern import NMPattern

if TYPE_CHECKING:
    from .schedule import Moment


# Containers of the tensors that `Relaxation.buffers` may declare.
RELAXATION_BUFFERS = ("nmsparse_current_codes", "nmsparse_input_factors")


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
    mask_interval: int | None
    srste_decay: float
    srste_ramp: float


class Relaxation(ABC):
    """Turns trainable tensors into an effective weight, and at the end into the codes of a mask.

    One object serves one layer of one adapter. It holds no tensors: the layer owns those that `parameters` and `buffers`
    declare, and hands all of them, by container name, to the other methods as `parameters`.

    Args:
        pattern (`NMPattern`): the pattern.
        key (`NoiseKey`): identity of the layer's noise.
    """

    name: ClassVar[str]
    # The container of the trainable tensor that the mask is computed from.
    container: ClassVar[str] = "nmsparse_logits"
    # Whether that is a weight of the adapter's own, which takes the place of the base weight.
    trains_weight: ClassVar[bool] = False
    # How many weights are held from the first pass of an optimizer step to its end.
    held_weights: ClassVar[int] = 0
    # Whether it starts from a given mask; else its weights alone say which.
    takes_prior: ClassVar[bool] = True
    # Whether the mask of training is drawn from a distribution, of which `certainty` tells.
    has_distribution: ClassVar[bool] = False
    # Which of "temperature" and "logit_scale" it depends on.
    scheduled: ClassVar[tuple[str, ...]] = ()
    # Start and end of `NMSparseConfig.temperature` where the config does not say.
    default_temperature: ClassVar[tuple[float, float]] = (4.0, 0.05)

    def __init__(self, pattern: NMPattern, key: NoiseKey) -> None:
        self.pattern = pattern
        self.key = key

    @abstractmethod
    def parameters(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        """Fresh trainable tensors for a base weight `[out, in]`, on its device, by container name.

        Container names start with `nmsparse_`. The tensors carry no prior yet: they are zero, or random where
        `config.init_weights` is False.
        """

    def buffers(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        """Fresh tensors that are stored beside the parameters and not trained by gradients, by container name."""
        return {}

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

    def backward_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        shared: SharedSample | None = None,
    ) -> torch.Tensor | None:
        """The weight that the gradient of the layer's input is computed with in training, `[out, in]` in the dtype of `weight`;
        `None` if that is the effective one."""
        return None

    def begin_step(self, parameters: dict[str, torch.Tensor], config: RelaxationConfig, moment: Moment) -> None:
        """Called once before the first forward pass of an optimizer step, in training; by default nothing is done."""
        return

    def add_to_gradients(self, parameters: dict[str, torch.Tensor], config: RelaxationConfig, moment: Moment) -> None:
        """Called before the optimizer steps, after gradients were clipped; by default nothing is added."""
        return

    @abstractmethod
    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """The final mask as codes, int64 `[out, groups]`."""

    def certainty(
        self, parameters: dict[str, torch.Tensor], in_features: int, state: SamplingState
    ) -> tuple[float, float, int]:
        """How decided the masks are without noise, over all groups of the given rows; for relaxations with logits.

        Returns:
            sum of the probabilities of each group's most probable mask, sum of the entropies in bits, number of groups.
        """
        raise NotImplementedError(f"{self.name} has no distribution over masks")


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
