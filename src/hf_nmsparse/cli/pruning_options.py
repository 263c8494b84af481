# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse prune` is asked for, checked as far as it can be without the model."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import Dtype
from .streaming import memory_size

if TYPE_CHECKING:
    from ..criteria import Criterion
    from ..pattern import Pattern

# Where it computes and how it is written may differ when a run is resumed.
_WITHOUT_EFFECT_ON_THE_RESULT = ("device", "max_memory", "packed")


@dataclass(frozen=True)
class PruningOptions:
    """The options of the command line, by their names there."""

    model: str
    criterion: str = "wanda"
    start: str | None = None
    pattern: str = "2:4"
    weights: str = "update"
    inputs: str = "pruned"
    calibration: str | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    dense_layers: list[str] = dataclasses.field(default_factory=list)
    dense_budget: str | None = None
    layers: str | None = None
    permute_channels: bool = False
    dtype: Dtype = Dtype.AUTO
    device: str | None = None
    max_memory: str | None = None
    packed: bool = False

    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if name not in _WITHOUT_EFFECT_ON_THE_RESULT}

    def check(self) -> None:
        """Hold the options against each other.

        Raises:
            ConfigError, PatternError, UnsupportedError: saying what does not fit.
        """
        from ..criteria.base import check_takes
        from ..packed.stored_mask import inside_24
        from ..pattern import NMPattern, parse_pattern

        pattern = parse_pattern(self.pattern)
        check_takes(self.chosen_criterion, pattern)
        if self.packed and not (isinstance(pattern, NMPattern) and inside_24(pattern)):
            raise ConfigError(
                f"--packed: {pattern} can keep more than 2 of 4 weights and cannot be packed; write it --dense"
            )
        if self.permute_channels:
            self._check_permuting(pattern)
        if self.calibration is None and (reasons := self._reasons_for_text()):
            raise ConfigError(f"{reasons[0]} needs calibration text; add --calibration")
        if self.max_memory is not None:
            memory_size(self.max_memory)

    def _check_permuting(self, pattern: Pattern) -> None:
        from ..criteria.channel_order import assignment_solver
        from ..pattern import NMPattern

        if not isinstance(pattern, NMPattern):
            raise ConfigError(f"--permute-channels changes which weights share a group; {pattern} has no groups")
        if self.max_memory is not None:
            raise ConfigError("--permute-channels needs the whole model in memory; leave --max-memory out")
        assignment_solver()  # raises where scipy is not installed

    @cached_property
    def chosen_criterion(self) -> Criterion:
        """The criterion, with its start."""
        from ..criteria import Polish, get_criterion

        criterion = get_criterion(self.criterion)
        if self.start is None:
            return criterion
        if not isinstance(criterion, Polish):
            raise ConfigError(f"--start is the criterion that polish starts from; {self.criterion} has no start")
        return Polish(start=self.start)

    @cached_property
    def budget(self) -> float | None:
        """The share of the bytes that may stay dense."""
        if self.dense_budget is None:
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", self.dense_budget)
        if match is None or not 0 < float(match[1]) < 100:
            raise ConfigError(f"--dense-budget {self.dense_budget!r}: expected more than 0 % and less than 100 %: 10%")
        return float(match[1]) / 100

    @property
    def runs_the_model(self) -> bool:
        """Whether pruning runs the model block by block, which is what can be resumed."""
        return self.chosen_criterion.needs != "nothing" or self.weights == "refit" or self.permute_channels

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed."""
        return bool(self._reasons_for_text())

    def _reasons_for_text(self) -> list[str]:
        reasons = {
            f"criterion {self.criterion!r}": self.chosen_criterion.needs != "nothing",
            "--weights refit": self.weights == "refit",
            "--permute-channels": self.permute_channels,
            "--dense-budget": self.budget is not None,
        }
        return [reason for reason, applies in reasons.items() if applies]

    @property
    def method(self) -> str:
        """The criterion for records."""
        return self.criterion if self.start is None else f"{self.criterion} (start {self.start})"
