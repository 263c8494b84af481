# SPDX-License-Identifier: Apache-2.0
"""What a criterion is: one-shot importance, a weight and statistics of its inputs -> a mask. And the one registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..ops import top_n_mask
from ..pattern import NMPattern, Pattern

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
        magnitude (`torch.Tensor`, *optional*): mean over tokens of `|x_j|`, float32 `[in]`; beside a Hessian.
    """

    tokens: int
    squared_norm: torch.Tensor
    hessian: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What becomes of one weight.

    Args:
        mask (`torch.Tensor`): bool `[out, in]`, true where kept.
        weight (`torch.Tensor`, *optional*): new values of the kept weights, float `[out, in]`, read only where kept;
            `None`: they stay as they are.
    """

    mask: torch.Tensor
    weight: torch.Tensor | None = None

    def masked(self, weight: torch.Tensor) -> torch.Tensor:
        """The pruned weight that this choice makes of the dense one, in its dtype; pruned weights are +0."""
        kept = weight if self.weight is None else self.weight.to(weight.dtype)
        return torch.where(self.mask, kept, 0)


@dataclass(frozen=True)
class BlockInputs:
    """What a criterion sees of one block, or of one stage of it.

    Args:
        modules (`dict[str, nn.Module]`): the layers by name, in the order in which they are to be chosen.
        weights (`dict[str, torch.Tensor]`): their dense weights `[out, in]`; must not be changed.
        statistics (`dict[str, InputStatistics | None]`): of their inputs; the same object for layers with the same input.
        pattern (`NMPattern` or `Unstructured`): what to keep.
        block (`nn.Module`): the block that holds them.
    """

    modules: Mapping[str, nn.Module]
    weights: Mapping[str, torch.Tensor]
    statistics: Mapping[str, InputStatistics | None]
    pattern: Pattern
    block: nn.Module


class Criterion(ABC):
    """One way to choose which weights of a layer to keep. Subclass it and hand the class or an instance to `prune`.

    Attributes:
        name (`str`): how it is called in the registry, on the command line and in reports.
        needs (`str`): what of `InputStatistics` is read; each level includes those before it. `"nothing"`: statistics
            are `None`, no calibration text is needed and layers are chosen module by module; `"norms"`: `squared_norm`; `"hessian"`: `hessian`;
            `"inputs"`: `inputs` (keeps the inputs of all layers of one block in memory).
        unstructured (`bool`): whether it also takes `Unstructured` patterns.
        updates_weights (`bool`): whether `choose` gives new values to kept weights.
        has_confidence (`bool`): whether it has `confidence`.
    """

    name: ClassVar[str]
    needs: Needs = "nothing"
    unstructured: bool = False
    updates_weights: bool = False
    has_confidence: bool = False

    @abstractmethod
    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        """Choose the weights to keep.

        Args:
            weight (`torch.Tensor`): dense, any float dtype, `[out, in]`; must not be changed.
            statistics (`InputStatistics`, *optional*): of the inputs of the layer, on its device.
            pattern (`NMPattern` or `Unstructured`): n:m: exactly n of each m consecutive weights of a row are kept, of a
                tail of r: min(n, r).

        Returns:
            bool `[out, in]`, true where kept.
        """

    def choose(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> Choice:
        """As `mask`, with new values of the kept weights where the criterion updates them."""
        return Choice(self.mask(weight, statistics, pattern))

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        """Yield (name, choice) of each layer. Override it to choose those of a block jointly."""
        for name, weight in inputs.weights.items():
            yield name, self.choose(weight, inputs.statistics[name], inputs.pattern)

    def confidence(
        self, weight: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern
    ) -> torch.Tensor:
        """How sure this criterion is of a mask that it has just chosen: how much worse the next best choice of each group is.

        Only the order within one weight matters; the unit is the criterion's own.

        Args:
            weight, statistics, pattern: as for `mask`.
            mask (`torch.Tensor`): bool `[out, in]`.

        Returns:
            float32 `[out, groups]`, 0 where another choice is as good; infinite where there is no other (a tail that keeps
            all it has).

        Raises:
            UnsupportedError: if the criterion does not know (`has_confidence` is False).
        """
        raise UnsupportedError(
            f"criterion {self.name!r} does not tell how sure it is of a group; these do: {', '.join(confident_criteria())}"
        )

    def stages(self, names: list[str], block: nn.Module) -> list[list[str]]:
        """Split the layers of a block into stages: inputs of a later one are measured with the earlier ones pruned."""
        return [names]


def keep_highest(scores: torch.Tensor, pattern: Pattern, whole_layer: bool = False) -> torch.Tensor:
    """The mask of the weights with the highest scores; among equal ones those of lowest index.

    Args:
        scores (`torch.Tensor`): `[out, in]`, any float dtype.
        pattern (`NMPattern` or `Unstructured`): n:m: compared within groups; unstructured: within rows.
        whole_layer (`bool`): unstructured: compare all weights of the layer with one another instead.

    Returns:
        bool `[out, in]`.
    """
    if isinstance(pattern, NMPattern):
        return top_n_mask(scores, pattern)
    compared = scores.reshape(1, -1) if whole_layer else scores
    order = compared.argsort(dim=1, descending=True, stable=True)
    kept = compared.shape[1] - pattern.num_pruned(compared.shape[1])
    mask = torch.zeros_like(compared, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    return mask.view(scores.shape)


def score_confidence(scores: torch.Tensor, mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`Criterion.confidence` of a mask of the highest scores: the lowest kept score less the highest pruned one of each
    group, relative to their mean.

    Args:
        scores (`torch.Tensor`): at least 0, `[out, in]`.
        mask (`torch.Tensor`): bool `[out, in]`, follows `pattern`.
        pattern (`NMPattern`): n kept of m.

    Returns:
        float32 `[out, groups]`, from 0 to 2; 0 where both are 0; infinite in tails of which nothing is pruned.
    """
    padding = (0, -scores.shape[1] % pattern.m)
    pruned = F.pad(~mask, padding)  # what is beyond the end is neither kept nor pruned
    kept = F.pad(mask, padding)
    scores = F.pad(scores.float(), padding)
    lowest = scores.masked_fill(~kept, torch.inf).unflatten(1, (-1, pattern.m)).amin(-1)
    highest = scores.masked_fill(~pruned, -torch.inf).unflatten(1, (-1, pattern.m)).amax(-1)
    relative = 2 * (lowest - highest) / (lowest + highest)
    return relative.where(lowest + highest > 0, 0).where(highest >= 0, torch.inf)


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


def confident_criteria() -> list[str]:
    """Names of the registered criteria that tell how sure they are of each group, sorted."""
    return sorted(name for name, criterion in _REGISTRY.items() if criterion.has_confidence)


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


def check_takes(criterion: Criterion, pattern: Pattern) -> None:
    """Refuse an unstructured pattern where the criterion is for n:m only.

    Raises:
        ConfigError: naming the criteria that take it.
    """
    if not isinstance(pattern, NMPattern) and not criterion.unstructured:
        able = ", ".join(name for name in known_criteria() if _REGISTRY[name].unstructured)
        raise ConfigError(
            f"criterion {criterion.name!r} is for n:m patterns, got {pattern}; unstructured sparsity is what these do: {able}"
        )
