# SPDX-License-Identifier: Apache-2.0
"""Statistics of layer inputs, gathered by hooks while one block runs. Activations are not kept unless asked for."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import NMSparseError, UnsupportedError
from .base import NEEDS, InputStatistics, Needs
from .experts import ExpertsObserver
from .targets import Target

logger = logging.getLogger(__name__)

HESSIAN_COLUMNS = 512


class _Accumulator:
    """Sums over tokens of the inputs of one or more layers that see the same tensor."""

    def __init__(self, in_features: int, needs: Needs, device: torch.device, first: str) -> None:
        level = NEEDS.index(needs)
        self.first = first
        self.tokens = 0
        self.square = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if level >= 2 else None
        self.magnitude = torch.zeros(in_features, device=device) if level >= 2 else None
        self.inputs: list[torch.Tensor] | None = [] if level >= 3 else None
        self.latest: weakref.ref[torch.Tensor] | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add `x`, `[tokens, in]`."""
        self.tokens += len(x)
        if self.inputs is not None:
            self.inputs.append(x.clone())
        # Under autocast even a product of float32 tensors is done in bfloat16, too coarse for a Hessian.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            self.square += x.square().sum(0)
            if self.hessian is not None:
                self.magnitude += x.abs().sum(0)
                for start in range(0, x.shape[1], HESSIAN_COLUMNS):  # the lower triangle, block-wise
                    columns = x[:, start : start + HESSIAN_COLUMNS]
                    self.hessian[start:, start : start + HESSIAN_COLUMNS].addmm_(x[:, start:].t(), columns)

    def finish(self) -> InputStatistics:
        hessian = magnitude = None
        if self.hessian is not None:
            magnitude = self.magnitude / self.tokens
            lower = self.hessian.tril_().div_(self.tokens)
            hessian = lower.add_(lower.tril(-1).t())
        inputs = torch.cat(self.inputs) if self.inputs is not None else None
        self.inputs = None
        return InputStatistics(self.tokens, self.square / self.tokens, hessian, inputs, magnitude)


class StatisticsRecorder:
    """Context: while it is open, forwards of the targets' modules add to the statistics of their inputs.

    Layers that receive the very same tensor object (q, k and v; gate and up) share one accumulation.

    Args:
        targets (`list[Target]`): whose inputs are observed.
        needs (`str`): what to gather, see `Criterion`.

    Attributes:
        real_tokens (callable): set before each run; gives for an input its bool mask of tokens that are no padding, or
            `None` if all are real.
    """

    def __init__(self, targets: list[Target], needs: Needs) -> None:
        self.targets = {target.name: target for target in targets}
        self.needs = needs
        self.real_tokens: Callable[[torch.Tensor], torch.Tensor | None] = lambda x: None
        self._accumulators: dict[str, _Accumulator] = {}
        self._watched = set(self.targets)
        self._experts: list[ExpertsObserver] = []
        self._open = ExitStack()

    def __enter__(self) -> StatisticsRecorder:
        experts: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for name, target in self.targets.items():
            if target.expert is not None:
                experts.setdefault(target.module, {})[name] = target.dense()
                continue
            handle = target.module.register_forward_pre_hook(partial(self._observe, name))
            self._open.callback(handle.remove)
        for module, weights in experts.items():
            # Asks for `self.real_tokens` anew for each batch.
            self._experts.append(ExpertsObserver(module, weights, self._add, lambda x: self.real_tokens(x)))
            self._open.enter_context(self._experts[-1].watching())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name in self._watched:
            self._add(name, args[0], self.real_tokens(args[0]))

    def _add(self, name: str, x: torch.Tensor, real: torch.Tensor | None = None) -> None:
        accumulator = self._accumulators.get(name)
        if accumulator is None:
            accumulator = next((a for a in self._accumulators.values() if _is_latest(a, x)), None)
            if accumulator is None:
                accumulator = _Accumulator(x.shape[-1], self.needs, x.device, name)
            self._accumulators[name] = accumulator
        if _is_latest(accumulator, x):
            return
        if accumulator.first != name:
            raise UnsupportedError(
                f"{name} had the same input as {accumulator.first} before, but not now; its statistics can't be kept apart"
            )
        accumulator.latest = weakref.ref(x)
        accumulator.add(_without_padding(x, real))

    def route_to_unreached_experts(self) -> bool:
        """From now on only experts that no token has reached are observed, and every token is routed to them.

        Few tokens leave experts without statistics; the best guess of what one would get is what all of them get. Only
        the outputs of the block become meaningless. Returns whether there are such experts, and logs how many.
        """
        self._watched = {name for name, target in self.targets.items() if target.expert is not None}
        self._watched -= set(self._accumulators)
        for observer in self._experts:
            numbers = {name: self.targets[name].expert for name in observer.names.values()}
            observer.route_to = sorted({numbers[name] for name in self._watched & set(numbers)})
            if observer.route_to:
                logger.warning(
                    "%s: calibration reached %d of %d experts; the others get the statistics of all tokens",
                    next(iter(numbers)).rsplit(".", 2)[0],
                    len(set(numbers.values())) - len(observer.route_to),
                    len(set(numbers.values())),
                )
        return bool(self._watched)

    def drop_unreached(self) -> list[str]:
        """Forget the targets that no token has reached; returns their names."""
        reached = {name for name, accumulator in self._accumulators.items() if accumulator.tokens}
        dropped = [name for name in self.targets if name not in reached]
        self.targets = {name: target for name, target in self.targets.items() if name in reached}
        return dropped

    def finish(self) -> dict[str, InputStatistics]:
        """The statistics of each target; shared ones are the same object. The recorder is empty afterwards.

        Raises:
            UnsupportedError: naming a target whose module was never called.
            NMSparseError: naming a target with NaN or infinite inputs.
        """
        for name in self.targets:
            if name not in self._accumulators or self._accumulators[name].tokens == 0:
                raise UnsupportedError(
                    f"{name} was never called during calibration, so nothing is known about its inputs; leave it dense "
                    "or calibrate on text that reaches it"
                )
            if not bool(self._accumulators[name].square.isfinite().all()):
                raise NMSparseError(
                    f"{name}: its inputs hold NaN or infinite values (or overflow when squared) on the calibration data; "
                    "the model was not changed. Calibrate in bfloat16 or float32, and check the model's outputs"
                )
        finished: dict[int, InputStatistics] = {}
        for accumulator in self._accumulators.values():
            if id(accumulator) not in finished:
                finished[id(accumulator)] = accumulator.finish()
        result = {name: finished[id(self._accumulators[name])] for name in self.targets}
        self._accumulators = {}
        return result


def _is_latest(accumulator: _Accumulator, x: torch.Tensor) -> bool:
    return accumulator.latest is not None and accumulator.latest() is x


def _without_padding(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Input vectors `[tokens, in]`. Padding is dropped where `x` has all tokens of the batch in their order."""
    rows = x.detach().flatten(0, -2)
    if real is None or len(rows) != real.numel():
        return rows
    return rows[real.flatten().to(rows.device)]
