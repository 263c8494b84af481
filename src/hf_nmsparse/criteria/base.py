# SPDX-License-Identifier: Apache-2.0
"""What a criterion is: one-shot importance, a weight and statistics of its inputs -> a mask. And the one registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch

from ..errors import ConfigError
from ..pattern import NMPattern

Needs = Literal["nothing", "norms", "hessian", "inputs"]
NEEDS: tuple[Needs, ...] = ("nothing", "norms", "hessian", "inputs")


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw at the input `x` of one linear layer. Padding is not counted.

    Args:
        tokens (`int`): number of input vectors.
        squared_norm (`torch.Tensor`): mean over tokens of `x_j^2`, float32 `[in]`.
        hessian (`torch.Tensor`, *optional*): mean over tokens of `x x^T`, float32 `[in, in]`, exactly symmetric.
        inputs (`torch.Tensor`, *optional*): the inputs themselves, `[tokens, in]` in the dtype of the model.
    """

    tokens: int
    squared_norm: torch.Tensor
    hessian: torch.Tensor | None = None
    inputs: torch.Tensor | None = None


class Criterion(ABC):
    """One way to choose which weights of a layer to keep. Subclass it and hand the class or an instance to `prune`.

    Attributes:
        name (`str`): how it is called in the registry, on the command line and in reports.
        needs (`str`): what of `InputStatistics` is read; each level includes those before it. `"nothing"`: statistics
            are `None` and no calibration text is needed; `"norms"`: `squared_norm`; `"hessian"`: `hessian`;
            `"inputs"`: `inputs` (keeps the inputs of all layers of one block in memory).
    """

    name: ClassVar[str]
    needs: Needs = "nothing"

    @abstractmethod
    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        """Choose the weights to keep.

        Args:
            weight (`torch.Tensor`): dense, any float dtype, `[out, in]`; must not be changed.
            statistics (`InputStatistics`, *optional*): of the inputs of the layer, on its device.
            pattern (`NMPattern`): exactly n of each m consecutive weights of a row are kept, of a tail of r: min(n, r).

        Returns:
            bool `[out, in]`, true where kept.
        """

    def block_masks(
        self,
        weights: Mapping[str, torch.Tensor],
        statistics: Mapping[str, InputStatistics | None],
        pattern: NMPattern,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, mask) of each layer of one decoder block. Override it to choose masks of a block jointly."""
        for name, weight in weights.items():
            yield name, self.mask(weight, statistics[name], pattern)


_REGISTRY: dict[str, type[Criterion]] = {}
CriterionType = TypeVar("CriterionType", bound=type[Criterion])


def register_criterion(criterion: CriterionType) -> CriterionType:
    """Class decorator: make a criterion known under its `name`. It must be constructible without arguments.

    Raises:
        ConfigError: if the class lacks a name, asks for unknown statistics, or its name is taken by another class.
    """
    name = getattr(criterion, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{criterion.__qualname__} needs a class attribute `name`, for example name = 'mine'")
    taken = _REGISTRY.get(name)
    # The same class defined again (a notebook cell run twice) replaces its former self.
    if taken is not None and (taken.__module__, taken.__qualname__) != (criterion.__module__, criterion.__qualname__):
        raise ConfigError(
            f"criterion name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another"
        )
    _REGISTRY[name] = criterion
    return criterion


def known_criteria() -> list[str]:
    """Names of all registered criteria, sorted."""
    return sorted(_REGISTRY)


def get_criterion(criterion: str | Criterion | type[Criterion]) -> Criterion:
    """The criterion of a registered name, of a class, or the instance itself.

    Raises:
        ConfigError: for an unknown name (the known ones are listed), something else than a criterion, or unknown `needs`.
    """
    if isinstance(criterion, str):
        if criterion not in _REGISTRY:
            raise ConfigError(
                f"unknown criterion {criterion!r}; known: {', '.join(known_criteria())}. "
                "To use your own, subclass hf_nmsparse.criteria.Criterion and pass the class"
            )
        criterion = _REGISTRY[criterion]
    if isinstance(criterion, type) and issubclass(criterion, Criterion):
        criterion = criterion()
    if not isinstance(criterion, Criterion):
        raise ConfigError(
            f"a criterion is a name ({', '.join(known_criteria())}), a subclass of hf_nmsparse.criteria.Criterion or "
            f"an instance of one, got {criterion!r}"
        )
    if criterion.needs not in NEEDS:
        raise ConfigError(f"criterion {criterion.name!r}: needs = {criterion.needs!r}, expected one of {NEEDS}")
    return criterion
