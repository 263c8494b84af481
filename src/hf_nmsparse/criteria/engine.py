# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning, block by block: the inputs of each block come from the blocks before it, already pruned.

Nothing is changed for good until every mask is known: a block's masks are put on for the time of one run, to get the
inputs of the next block, and taken off again. On any failure the model is as it was. That costs one copy of the
weights of one block, and the masks in packed form (2:4: 0.67 bit a weight).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import ops
from ..data import calibration_batches
from ..errors import ConfigError, PatternError, UnsupportedError
from ..pattern import NMPattern
from .base import Criterion, InputStatistics, get_criterion
from .blocks import Sample, evaluating, in_order_of_execution, record_sample, run_block
from .statistics import StatisticsRecorder
from .targets import Target, find_stacks, find_weights


@dataclass
class LayerReport:
    """What a mask does to one layer.

    Args:
        name (`str`): full module name.
        groups (`int`): groups of m weights.
        relative_error (`float`, *optional*): `tr(D H D^T) / tr(W H W^T)` with `D = W*M - W`; `None` without calibration.
        kept_energy (`float`): sum of squares of the kept weights over that of all.
        seconds (`float`): time to choose the mask.
    """

    name: str
    groups: int
    relative_error: float | None
    kept_energy: float
    seconds: float


@dataclass
class PruneReport:
    """What was pruned, and how well.

    Args:
        criterion (`str`): name of the criterion.
        pattern (`str`): for example `"2:4"`.
        tokens (`int`): calibration tokens that enter the first stack of blocks, padding not counted; 0 if none were needed.
        seconds (`float`): wall time in all.
        error_form (`str`, *optional*): what H is in `relative_error`: `"hessian"`, the mean of `x x^T`, or `"diagonal"`,
            only its diagonal, where the criterion gathers no more than norms; `None` without calibration.
        layers (`list[LayerReport]`): in the order of pruning.
    """

    criterion: str
    pattern: str
    tokens: int
    seconds: float
    error_form: str | None
    layers: list[LayerReport] = field(default_factory=list)


def prune(
    model: nn.Module,
    criterion: str | Criterion | type[Criterion] = "magnitude",
    pattern: str | NMPattern = "2:4",
    calibration: Any = None,
    tokenizer: Any = None,
    dense_layers: Iterable[str] = (),
    progress: bool = True,
) -> PruneReport:
    """Prune the weights of all blocks in one shot, in place. Pruned weights become +0, kept ones stay.

    These are linear layers, `Conv1D` and each expert of fused ones, see `find_weights`; groups run along the inputs.

    Args:
        model (`nn.Module`): a Transformers model: decoder, encoder (BERT, ViT) or both (T5).
        criterion (`str` or `Criterion`): `"magnitude"` needs no calibration, `"wanda"` and `"polish"` do.
        pattern (`str` or `NMPattern`): n kept of m.
        calibration: integers `[samples, sequence]`, model inputs or an iterable of them (dicts, as with `pixel_values`), or
            texts (then give `tokenizer`). An encoder-decoder model that gets `input_ids` only decodes the same tokens.
        tokenizer (*optional*): for texts.
        dense_layers (`Iterable[str]`): names of layers to leave dense, see `find_weights`.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        `PruneReport`.

    Raises:
        ConfigError: on an unknown criterion, an entry of `dense_layers` that matches nothing, missing calibration.
        UnsupportedError: naming layers that are packed, quantised or wrapped, or a model without blocks.
    """
    targets = list(find_weights(model, dense_layers).values())
    return walk(model, targets, criterion, pattern, calibration, tokenizer, progress)


@torch.no_grad()
def walk(
    model: nn.Module,
    targets: list[Target],
    criterion: str | Criterion | type[Criterion],
    pattern: str | NMPattern,
    calibration: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> PruneReport:
    """Choose a mask for each target, and when all are chosen apply them.

    Memory besides the model: hidden states of all calibration tokens at one block (on the model's device), statistics
    and one copy of the weights of one block, the packed masks; while a decoder's inputs are recorded, one copy of the
    targets in its encoder.

    Args:
        model (`nn.Module`): as in `prune`; runs in eval mode, without cache, its experts one by one.
        targets (`list[Target]`): the layers.
        criterion (`str` or `Criterion`), pattern (`str` or `NMPattern`), calibration, tokenizer, progress: as in `prune`.

    Raises:
        ConfigError: if the criterion needs calibration and there is none, it is not what the model takes, or targets
            repeat.
        UnsupportedError: naming targets outside the blocks, never called, or without data; or blocks that can't be run
            by themselves.
        PatternError: if the criterion returns something else than a mask of the pattern.
        NMSparseError: naming a layer with NaN or infinite inputs.
    """
    started = time.perf_counter()
    criterion, pattern = get_criterion(criterion), NMPattern(pattern)
    _check_targets(targets)
    chosen = _Chosen(criterion, pattern)
    with tqdm(
        total=len(targets), desc=f"{criterion.name} {pattern}", unit="layer", disable=None if progress else True
    ) as chosen.bar:
        if criterion.needs == "nothing":
            for target in targets:
                chosen.choose([target], {target.name: target.dense()}, {target.name: None})
        else:
            if calibration is None:
                raise ConfigError(f"criterion {criterion.name!r} needs calibration data; pass calibration=")
            batches = calibration_batches(calibration, tokenizer)
            with evaluating(model):
                _walk_stacks(model, targets, chosen, batches)
    for target in targets:
        target.apply(chosen.mask(target))
    form = {"nothing": None, "norms": "diagonal"}.get(criterion.needs, "hessian")
    seconds = time.perf_counter() - started
    return PruneReport(criterion.name, str(pattern), chosen.tokens, seconds, form, chosen.layers)


def _walk_stacks(model: nn.Module, targets: list[Target], chosen: _Chosen, batches: Iterable[dict[str, Any]]) -> None:
    """Stack after stack, as the model runs them; the earlier ones are masked while a later one is recorded."""
    stacks = find_stacks(model, {target.module for target in targets})
    inside = {module for _, blocks in stacks for module in blocks.modules()}
    if outside := [target.name for target in targets if target.module not in inside]:
        raise UnsupportedError(
            f"{outside[0]} ({len(outside)} such layers) is outside the blocks "
            f"{', '.join(repr(name) for name, _ in stacks)}; calibration runs those only, leave it dense"
        )
    if len(stacks) > 1:
        batches = list(batches)
        stacks = in_order_of_execution(model, stacks, batches[0])
    done: list[Target] = []
    for name, blocks in stacks:
        with ExitStack() as masks_on:
            for target in done:
                masks_on.enter_context(target.masked(target.dense(), chosen.mask(target)))
            samples = [record_sample(model, name, blocks, batch) for batch in batches]
        if not done:
            chosen.tokens = sum(sample.tokens() for sample in samples)
        done += _walk_blocks(blocks, samples, targets, chosen)


def _walk_blocks(blocks: nn.ModuleList, samples: list[Sample], targets: list[Target], chosen: _Chosen) -> list[Target]:
    """Choose masks for the targets inside the blocks, and return those targets."""
    owner = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    targets = [target for target in targets if target.module in owner]
    last = max(owner[target.module] for target in targets)
    for index, block in enumerate(blocks[: last + 1]):
        here = [target for target in targets if owner[target.module] == index]
        with ExitStack() as masks_on:
            if here:
                statistics = _gather(block, index, samples, here, chosen.criterion)
                weights = {target.name: target.dense() for target in here}
                masks = chosen.choose(here, weights, statistics)
                for target in here:
                    masks_on.enter_context(target.masked(weights[target.name], masks[target.name]))
            if index < last:
                for sample in samples:
                    sample.hidden = run_block(block, index, sample)
    return targets


def _gather(
    block: nn.Module, index: int, samples: list[Sample], targets: list[Target], criterion: Criterion
) -> dict[str, InputStatistics]:
    with StatisticsRecorder(targets, criterion.needs) as recorder:

        def run() -> None:
            for sample in samples:
                recorder.real_tokens = partial(sample.real_tokens, index)
                run_block(block, index, sample)

        run()
        if recorder.route_to_unreached_experts():
            run()
        return recorder.finish()


class _Chosen:
    """The masks chosen so far, packed, and their reports."""

    def __init__(self, criterion: Criterion, pattern: NMPattern) -> None:
        self.criterion = criterion
        self.pattern = pattern
        self.tokens = 0
        self.layers: list[LayerReport] = []
        self.bar: Any = None
        self._packed: dict[str, torch.Tensor] = {}
        self._in_features: dict[str, int] = {}

    def choose(
        self,
        targets: list[Target],
        weights: dict[str, torch.Tensor],
        statistics: dict[str, InputStatistics | None],
    ) -> dict[str, torch.Tensor]:
        """Masks of the targets of one block."""
        masks = {}
        started = time.perf_counter()
        device = next(iter(weights.values())).device
        with torch.autocast(device.type, enabled=False):  # a criterion computes in the precision it asks for
            for name, mask in self.criterion.block_masks(weights, statistics, self.pattern):
                weight = weights.get(name)
                self._pack(name, weight, mask)
                error, energy = _relative_error(weight, mask, statistics[name]), _kept_energy(weight, mask)
                groups = len(weight) * self.pattern.num_groups(weight.shape[1])
                self.layers.append(LayerReport(name, groups, error, energy, time.perf_counter() - started))
                masks[name] = mask
                self.bar.update()
                started = time.perf_counter()
        missing = [target.name for target in targets if target.name not in masks]
        if missing:
            raise PatternError(f"criterion {self.criterion.name!r} gave no mask for {missing[0]}")
        return masks

    def _pack(self, name: str, weight: torch.Tensor | None, mask: torch.Tensor) -> None:
        where = f"criterion {self.criterion.name!r}, layer {name}"
        if weight is None:
            raise PatternError(f"{where}: got a mask for a layer that was not asked for")
        if not isinstance(mask, torch.Tensor):
            raise PatternError(f"{where}: got {type(mask).__name__}, expected a mask torch.bool {list(weight.shape)}")
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise PatternError(
                f"{where}: got {mask.dtype} {list(mask.shape)}, expected a mask torch.bool {list(weight.shape)}"
            )
        try:
            codes = ops.mask_to_codes(mask, self.pattern)
        except PatternError as error:
            raise PatternError(f"{where}: {error}") from error
        self._packed[name] = ops.pack_codes(codes, self.pattern, weight.shape[1])
        self._in_features[name] = weight.shape[1]

    def mask(self, target: Target) -> torch.Tensor:
        """The mask of a target, to be applied."""
        width = self._in_features[target.name]
        codes = ops.unpack_codes(self._packed[target.name], self.pattern, width, target.name)
        return ops.codes_to_mask(codes, self.pattern, width)


def _relative_error(weight: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics | None) -> float | None:
    if statistics is None:
        return None

    def output_energy(weight: torch.Tensor) -> float:
        if statistics.hessian is None:
            return float((weight.square() @ statistics.squared_norm).sum())
        return float(((weight @ statistics.hessian) * weight).sum())

    weight = weight.float()
    whole = output_energy(weight)
    return output_energy(torch.where(mask, 0, weight)) / whole if whole > 0 else 0.0


def _kept_energy(weight: torch.Tensor, mask: torch.Tensor) -> float:
    squares = weight.float().square()
    whole = float(squares.sum())
    return float(torch.where(mask, squares, 0).sum()) / whole if whole > 0 else 1.0


def _check_targets(targets: list[Target]) -> None:
    if not targets:
        raise ConfigError("there is no layer to prune")
    counts = Counter(target.name for target in targets)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"targets repeat: {', '.join(sorted(repeated))}")
    for target in targets:
        weight = target.weight
        if not isinstance(weight, torch.Tensor):
            if target.expert is not None:
                raise UnsupportedError(
                    f"{target.name}: the weight of an expert is a view of a parameter, got {type(weight).__name__}"
                )
            continue  # computed only when its block is reached
        if weight.dim() != 2 or not weight.is_floating_point() or weight.itemsize < 2:
            raise UnsupportedError(
                f"{target.name}: weight is {weight.dtype} {list(weight.shape)}; expected floats [out, in]"
            )
        if weight.is_meta:
            raise UnsupportedError(
                f"{target.name}: its weight is on the meta device (offloaded); load the model whole"
            )
