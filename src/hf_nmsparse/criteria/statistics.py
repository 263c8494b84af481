# SPDX-License-Identifier: Apache-2.0
"""Statistics of layer inputs, gathered by hooks while one block runs. Activations are not kept unless asked for."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import NMSparseError, UnsupportedError
from .base import NEEDS, InputStatistics, Needs

HESSIAN_COLUMNS = 512


class _Accumulator:
    """Sums over tokens of the inputs of one or more layers that see the same tensor."""

    def __init__(self, in_features: int, needs: Needs, device: torch.device, first: str) -> None:
        level = NEEDS.index(needs)
        self.first = first
        self.tokens = 0
        self.square = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if level >= 2 else None
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
                for start in range(0, x.shape[1], HESSIAN_COLUMNS):  # the lower triangle, block-wise
                    columns = x[:, start : start + HESSIAN_COLUMNS]
                    self.hessian[start:, start : start + HESSIAN_COLUMNS].addmm_(x[:, start:].t(), columns)

    def finish(self) -> InputStatistics:
        hessian = None
        if self.hessian is not None:
            lower = self.hessian.tril_().div_(self.tokens)
            hessian = lower.add_(lower.tril(-1).t())
        inputs = torch.cat(self.inputs) if self.inputs is not None else None
        return InputStatistics(self.tokens, self.square / self.tokens, hessian, inputs)


class StatisticsRecorder:
    """Context: while it is open, forwards of the modules add to the statistics of their inputs.

    Layers that receive the very same tensor object (q, k and v; gate and up) share one accumulation.

    Args:
        modules (`Mapping[str, nn.Module]`): name -> module whose first forward argument is observed, `[..., in]`.
        needs (`str`): what to gather, see `Criterion`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], needs: Needs) -> None:
        self.modules = modules
        self.needs = needs
        self.real: torch.Tensor | None = None
        self._accumulators: dict[str, _Accumulator] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> StatisticsRecorder:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._observe, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
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
        accumulator.add(_without_padding(x, self.real))

    def finish(self) -> dict[str, InputStatistics]:
        """The statistics of each module; shared ones are the same object. The recorder is empty afterwards.

        Raises:
            UnsupportedError: naming a module that was never called.
            NMSparseError: naming a module with NaN or infinite inputs.
        """
        for name in self.modules:
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
        result = {name: finished[id(self._accumulators[name])] for name in self.modules}
        self._accumulators = {}
        return result


def _is_latest(accumulator: _Accumulator, x: torch.Tensor) -> bool:
    return accumulator.latest is not None and accumulator.latest() is x


def _without_padding(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Input vectors `[tokens, in]`. Padding is dropped where `x` has all tokens of the batch in their order."""
    rows = x.detach().flatten(0, -2)
    if real is None or len(rows) != real.numel():
        return rows
    return rows[real.flatten()]
