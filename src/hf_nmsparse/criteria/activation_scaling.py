# SPDX-License-Identifier: Apache-2.0
"""Activation-aware scaling (AWQ, Lin et al., arXiv 2306.00978, section 3.2) of weights that are to be rounded.

Few inputs of a layer are much larger than the others, and rounding hurts most in their columns. Columns are multiplied by
`s = mean|x|^alpha` before they are rounded and divided by s afterwards, which makes the steps finer where inputs are large.
alpha is searched for each layer by the error of its outputs on calibration data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import ops
from ..data import calibration_batches
from .base import InputStatistics
from .blocks import Sample, evaluating, in_order_of_execution, record_sample, run_block
from .statistics import StatisticsRecorder
from .targets import Target, find_stacks

logger = logging.getLogger(__name__)

GRID = 20
_LEAST = 1e-4  # of the largest mean |x|: an input that is never used would get an infinite scale


@dataclass(frozen=True)
class ScalingReport:
    """What the search for the input scale of one layer has found.

    Args:
        alpha (`float`): the best exponent; 0: scaling the inputs does not help.
        error (`float`): output error with the best one over the energy of the outputs, `tr(E H E^T) / tr(W H W^T)`.
        nearest_error (`float`): the same of plain rounding to the nearest.
    """

    alpha: float
    error: float
    nearest_error: float


@torch.no_grad()
def search_input_scale(
    weight: torch.Tensor, statistics: InputStatistics, kind: str
) -> tuple[torch.Tensor | None, ScalingReport]:
    """The input scale `1 / s` with which rounding a weight does least harm, of `alpha` = 0, 1/20 ... 19/20.

    `alpha = 0` is plain rounding, so that the calibration error is never above that of it.

    Args:
        weight (`torch.Tensor`): `[out, in]`, zero where pruned (such weights stay zero); a dense one will do as well.
        statistics (`InputStatistics`): of its inputs, with a Hessian.
        kind (`str`): "int8" or "int4".

    Returns:
        the scale, `[in]` in the dtype of the weight, or `None` where plain rounding is best; and a `ScalingReport`.
    """
    with torch.autocast(weight.device.type, enabled=False):  # bfloat16 is too coarse for a Hessian
        whole, exact = _energy(weight.float(), statistics.hessian), weight.float()
        importance = statistics.magnitude / statistics.magnitude.max().clamp(min=torch.finfo(torch.float32).tiny)
        importance = importance.clamp(min=_LEAST)
        found: list[tuple[float, float, torch.Tensor | None]] = []
        for step in range(GRID):
            scale = None if step == 0 else _input_scale(importance, step / GRID, weight.dtype)
            error = _energy(rounded_weight(weight, kind, scale) - exact, statistics.hessian)
            found.append((error, step / GRID, scale))
    error, alpha, scale = min(found, key=lambda entry: entry[:2])
    unit = whole if whole > 0 else 1.0
    return scale, ScalingReport(alpha, error / unit, found[0][0] / unit)


def rounded_weight(weight: torch.Tensor, kind: str, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """What a layer computes with once its weight (`[out, in]`) is stored as `kind`, float32: as the codec rounds it."""
    scaled = weight.float()
    if input_scale is not None:
        scaled = scaled / input_scale.float()
    rounded, scale = ops.round_in_groups(scaled, kind, ops.SCALE_COLUMNS, weight.dtype)
    rounded *= scale.float().repeat_interleave(ops.SCALE_COLUMNS, 1)[:, : weight.shape[1]]
    return rounded if input_scale is None else rounded * input_scale.float()


def _input_scale(importance: torch.Tensor, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """`1 / s`, where the largest and the smallest s multiply to one; rounded to the dtype in which it is stored."""
    s = importance.pow(alpha)
    s = s / (s.max() * s.min()).sqrt()
    return (1 / s).to(dtype)


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """`tr(W H W^T)`."""
    return float(((weight @ hessian) * weight).sum())


# --- the walk over a model ------------------------------------------------------------------------------------------
@torch.no_grad()
def search_input_scales(
    model: nn.Module,
    targets: Iterable[Target],
    kind: str,
    calibration: Any,
    tokenizer: Any = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Input scales of the layers of a model, from one pass of it over calibration data, block by block.

    The model is not changed. Memory besides it: hidden states of all calibration tokens at one block, the Hessians of one
    block, and with `masks` a copy of the weights of one block (for an encoder-decoder model also of its encoder).

    Args:
        model (`nn.Module`): runs in eval mode, its experts one by one.
        targets (`Iterable[Target]`): the layers. Of those that no token reaches, or that are outside the blocks, a line
            is logged, and they get no scale.
        kind (`str`): "int8" or "int4".
        calibration, tokenizer: as in `prune`.
        masks (`Mapping[str, torch.Tensor]`, *optional*): of layers that are not masked yet, `[out, in]`, non-zero = kept.
            The model computes with them, and their weights are rounded under them.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        layer name -> scale, see `search_input_scale`; layers that are best rounded without one are left out.

    Raises:
        ConfigError, UnsupportedError, NMSparseError: as `prune`, about the calibration data and the blocks.
    """
    if not (targets := list(targets)):
        return {}
    one = _Search(targets, kind, masks or {}, progress)
    with one.bar, evaluating(model):
        one.visit(model, calibration_batches(calibration, tokenizer))
    one.log()
    return one.scales


class _Search:
    def __init__(self, targets: list[Target], kind: str, masks: Mapping[str, torch.Tensor], progress: bool) -> None:
        self.targets, self.kind, self.masks = targets, kind, masks
        self.scales: dict[str, torch.Tensor] = {}
        self.reports: list[ScalingReport] = []
        self.left = {target.name for target in targets}
        shown = None if progress else True
        self.bar = tqdm(total=len(targets), desc=f"input scales for {kind}", unit="layer", disable=shown)

    def visit(self, model: nn.Module, batches: Iterator[dict[str, Any]]) -> None:
        """Stack after stack, as the model runs them."""
        stacks = find_stacks(model, {target.module for target in self.targets})
        if len(stacks) > 1:
            batches = list(batches)
            stacks = in_order_of_execution(model, stacks, batches[0])
        batches, done = list(batches), []
        for name, blocks in stacks:
            with self._masked(done):
                samples = [record_sample(model, name, blocks, batch) for batch in batches]
            owner = {module: index for index, block in enumerate(blocks) for module in block.modules()}
            inside = [target for target in self.targets if target.module in owner]
            for index, block in enumerate(blocks[: max(owner[target.module] for target in inside) + 1]):
                self._visit_block(block, index, [t for t in inside if owner[t.module] == index], samples)
            done += inside

    def _visit_block(self, block: nn.Module, index: int, targets: list[Target], samples: list[Sample]) -> None:
        with self._masked(targets), StatisticsRecorder(targets, "hessian") as recorder:
            for sample in samples:
                recorder.real_tokens = partial(sample.real_tokens, index)
                sample.hidden = run_block(block, index, sample)
            recorder.drop_unreached()
            statistics = recorder.finish()
        for target in targets:
            if (seen := statistics.pop(target.name, None)) is None:
                continue
            scale, report = search_input_scale(self._weight(target), seen, self.kind)
            if scale is not None:
                self.scales[target.name] = scale
            self.reports.append(report)
            self.left.discard(target.name)
            self.bar.set_postfix_str(f"{target.name}, alpha {report.alpha:.2f}", refresh=False)
            self.bar.update()

    def _weight(self, target: Target) -> torch.Tensor:
        weight = target.dense()
        mask = self.masks.get(target.name)
        return weight if mask is None else weight.masked_fill(mask.to(weight.device) == 0, 0)

    @contextmanager
    def _masked(self, targets: list[Target]) -> Iterator[None]:
        """For the time of the context these targets compute under their masks."""
        with ExitStack() as stack:
            for target in targets:
                if target.name in self.masks:
                    stack.enter_context(target.computing_with(self._weight(target), target.dense()))
            yield

    def log(self) -> None:
        """What was found, in a line; and one for the layers of which nothing is known."""
        if self.left:
            logger.warning(
                "%d layers were not reached by the calibration data; they are rounded to the nearest: %s",
                len(self.left),
                ", ".join(sorted(self.left)),
            )
        if self.reports:
            count = len(self.reports)
            logger.info(
                "%s values: mean relative output error %.5f with input scales, %.5f without (%d layers)",
                self.kind,
                sum(report.error for report in self.reports) / count,
                sum(report.nearest_error for report in self.reports) / count,
                count,
            )
