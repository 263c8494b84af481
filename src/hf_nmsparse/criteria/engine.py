# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning, block by block: the inputs of each block come from the blocks before it, already pruned.

Nothing is changed for good until everything is chosen: what was chosen for a block is put on for the time of one run, to
get the inputs of the next block, and taken off again. On any failure until then the model is as it was. That costs one copy of the
weights of one block, the masks in packed form (2:4: 0.67 bit a weight) and, where they change, the kept weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import calibration_batches
from ..errors import ConfigError, PatternError, UnsupportedError
from ..fingerprint import digest, fingerprint, to_hex
from ..pattern import NMPattern, Pattern, parse_pattern
from .base import NEEDS, BlockInputs, Choice, Criterion, InputStatistics, Needs, check_takes, get_criterion
from .blocks import Sample, evaluating, in_order_of_execution, record_sample, run_block
from .ledger import Ledger, check_mask, identity_of, identity_of_batch
from .offload import change_when_loaded, is_offloaded, present
from .refit import refit_weights
from .reordering import Reordering
from .report import LayerCodes, LayerReport, PruneReport, kept_energy, relative_error
from .statistics import StatisticsRecorder
from .targets import Target, check_targets, find_stacks

Weights = Literal["update", "keep", "refit"]
Inputs = Literal["pruned", "dense"]


@dataclass(frozen=True)
class WalkOptions:
    """How a walk goes; the fields are the arguments of `prune` with the same names."""

    weights: Weights = "keep"
    inputs: Inputs = "pruned"
    permute_channels: bool = False
    checkpoint_folder: str | os.PathLike | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (("weights", ("update", "keep", "refit")), ("inputs", ("pruned", "dense"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, known))}")


@torch.no_grad()
def walk(
    model: nn.Module,
    targets: list[Target],
    criterion: str | Criterion | type[Criterion],
    pattern: str | Pattern,
    calibration: Any = None,
    tokenizer: Any = None,
    options: WalkOptions = WalkOptions(),
) -> PruneReport:
    """Choose for each target, and when all is chosen apply it.

    Memory besides the model: hidden states of all calibration tokens at one block (on the model's device), statistics
    and one copy of the weights of one block, the packed masks, new values of kept weights (unless there is a
    `checkpoint_folder`); while a decoder's inputs are recorded, one copy of the targets in its encoder.

    Args:
        model (`nn.Module`): as in `prune`; runs in eval mode, without cache, its experts one by one.
        targets (`list[Target]`): the layers.
        criterion (`str` or `Criterion`), pattern, calibration, tokenizer: as in `prune`.
        options (`WalkOptions`): by default kept weights stay as they are.

    Raises:
        ConfigError: if the criterion needs calibration and there is none, it is not what the model takes, or targets
            repeat.
        UnsupportedError: naming targets outside the blocks, never called, or without data; or blocks that can't be run
            by themselves.
        PatternError: if the criterion returns something else than a mask of the pattern.
        NMSparseError: naming a layer with NaN or infinite inputs.
    """
    started = time.perf_counter()
    criterion, pattern = get_criterion(criterion), parse_pattern(pattern)
    check_takes(criterion, pattern)
    check_targets(targets)
    one = Walk(model, targets, criterion, pattern, options)
    with one.bar, one.undone_on_failure():
        if one.needs == "nothing":
            one.visit_modules()
        else:
            if calibration is None:
                raise ConfigError(f"criterion {criterion.name!r} needs calibration data; pass calibration=")
            with evaluating(model):
                one.visit_stacks(calibration_batches(calibration, tokenizer))
        one.apply()
    form = {"nothing": None, "norms": "diagonal"}.get(one.needs, "hessian")
    used = options.weights if options.weights != "update" or criterion.updates_weights else "keep"
    seconds = time.perf_counter() - started
    ledger = one.ledger
    return PruneReport(
        criterion.name, str(pattern), one.tokens, seconds, form, ledger.layers, used, ledger.permuted, one.codes()
    )


class Walk:
    """One walk through the blocks of a model, and what it has chosen so far."""

    def __init__(
        self, model: nn.Module, targets: list[Target], criterion: Criterion, pattern: Pattern, options: WalkOptions
    ) -> None:
        self.model = model
        self.targets = targets
        self.criterion = criterion
        self.pattern = pattern
        self.options = options
        self.needs: Needs = criterion.needs
        if options.weights == "refit":
            self.needs = max(criterion.needs, "hessian", key=NEEDS.index)
        self.reordering = Reordering(model) if options.permute_channels else None
        if self.reordering is not None:
            self._check_reordering()
            self.needs = max(self.needs, "norms", key=NEEDS.index)
        folder = options.checkpoint_folder
        self.ledger = Ledger(pattern, None if folder is None else Path(folder))
        self.tokens = 0
        self._batches: list[dict[str, str]] = []
        self.bar = tqdm(
            total=len(targets),
            desc=f"{criterion.name} {pattern}",
            unit="layer",
            disable=None if options.progress else True,
        )

    def _check_reordering(self) -> None:
        if not isinstance(self.pattern, NMPattern):
            raise ConfigError(f"permute_channels changes which weights share a group; {self.pattern} has no groups")
        if any(target.computed is not None for target in self.targets):
            raise ConfigError("permute_channels changes dense weights; those of a frozen base stay as they are")
        if offloaded := [target.name for target in self.targets if is_offloaded(target.module)]:
            raise UnsupportedError(
                f"{offloaded[0]} is offloaded; permute_channels needs all weights in memory (device_map=None)"
            )

    def visit_modules(self) -> None:
        """Choose for each target by its weight alone; nothing is run."""
        by_module: dict[nn.Module, list[Target]] = {}
        for target in self.targets:
            by_module.setdefault(target.module, []).append(target)
        for module, targets in by_module.items():
            with present(module):
                self.note_base(targets)
                self.choose_block(module, targets, {target.name: None for target in targets})

    # --- the way --------------------------------------------------------------------------------------------------------
    def visit_stacks(self, batches: Iterable[dict[str, Any]]) -> None:
        """Stack after stack, as the model runs them; the earlier ones are pruned while a later one is recorded."""
        stacks = find_stacks(self.model, {target.module for target in self.targets})
        inside = {module for _, blocks in stacks for module in blocks.modules()}
        if outside := [target.name for target in self.targets if target.module not in inside]:
            raise UnsupportedError(
                f"{outside[0]} ({len(outside)} such layers) is outside the blocks "
                f"{', '.join(repr(name) for name, _ in stacks)}; calibration runs those only, leave it dense"
            )
        if len(stacks) > 1:
            batches = list(batches)
            stacks = in_order_of_execution(self.model, stacks, batches[0])
        done: list[Target] = []
        for name, blocks in stacks:
            # The first block may have to compute while the others' arguments are recorded.
            with self.pruned(done if self.options.inputs == "pruned" else []), present(blocks[0]):
                samples = [record_sample(self.model, name, blocks, batch) for batch in self._seen(batches)]
            if not done:
                self.tokens = sum(sample.tokens() for sample in samples)
                self._resume()
            done += self.visit_blocks(name, blocks, samples)

    def visit_blocks(self, stack: str, blocks: nn.ModuleList, samples: list[Sample]) -> list[Target]:
        """Choose for the targets inside the blocks, and return those targets."""
        owner = {module: index for index, block in enumerate(blocks) for module in block.modules()}
        targets = [target for target in self.targets if target.module in owner]
        last = max(owner[target.module] for target in targets)
        for index, block in enumerate(blocks[: last + 1]):
            here = [target for target in targets if owner[target.module] == index]
            with present(block):
                outputs = self.visit_block(f"{stack}.{index}", block, index, here, samples)
                if index == last:
                    break
                if outputs is not None:
                    for sample, output in zip(samples, outputs, strict=True):
                        sample.hidden = output
                    continue
                with self.pruned(here if self.options.inputs == "pruned" else []):
                    for sample in samples:
                        sample.hidden = run_block(block, index, sample)
        return targets

    def visit_block(
        self, key: str, block: nn.Module, index: int, here: list[Target], samples: list[Sample]
    ) -> list[torch.Tensor] | None:
        """Choose for the targets of one block; returns its dense outputs if they are what goes on."""
        if not here:
            return None
        self.note_base(here)
        if all(target.name in self.ledger for target in here):
            if self.reordering is not None:
                orders = {target.name: self.ledger.order(target.name) for target in here}
                self.reordering.restore(block, {name: order for name, order in orders.items() if order is not None})
            return None
        by_name = {target.name: target for target in here}
        stages = self.criterion.stages(list(by_name), block)
        pruned_inputs = self.options.inputs == "pruned"
        outputs, before = None, []
        for stage in stages:
            targets = [by_name[name] for name in stage]
            with self.pruned(before if pruned_inputs else []):
                statistics, outputs = self._gather(block, index, samples, targets)
                if self.reordering is not None:
                    statistics = self._reorder(block, index, samples[0], statistics, before)
            self.choose_block(block, targets, statistics)
            del statistics  # not beside those of the next stage
            before += targets
        self.ledger.finish_block(key, list(by_name), {target.weight_name for target in here})
        return None if pruned_inputs else outputs

    def _gather(
        self, block: nn.Module, index: int, samples: list[Sample], targets: list[Target]
    ) -> tuple[dict[str, InputStatistics], list[torch.Tensor] | None]:
        """Statistics of the targets' inputs, and the outputs of the block where they are of use."""
        keep_outputs = self.options.inputs == "dense"
        outputs: list[torch.Tensor] = []
        with StatisticsRecorder(targets, self.needs) as recorder:

            def run() -> None:
                for sample in samples:
                    recorder.real_tokens = partial(sample.real_tokens, index)
                    output = run_block(block, index, sample)
                    if keep_outputs:
                        outputs.append(output)

            run()
            if recorder.route_to_unreached_experts():
                keep_outputs = False
                run()
            return recorder.finish(), outputs or None

    def _reorder(
        self, block: nn.Module, index: int, sample: Sample, statistics: dict[str, InputStatistics], fixed: list[Target]
    ) -> dict[str, InputStatistics]:
        statistics, orders = self.reordering.reorder(
            block, statistics, self.pattern, [target.name for target in fixed], lambda: run_block(block, index, sample)
        )
        for name, order in orders.items():
            self.ledger.add_order(name, order)
        return statistics

    def note_base(self, targets: list[Target]) -> None:
        """Take the fingerprints of the dense weights."""
        for name, target in {target.weight_name: target for target in targets}.items():
            if target.computed is None:
                self.ledger.add_base(name, fingerprint(target.whole()))

    # --- choosing -------------------------------------------------------------------------------------------------------
    def choose_block(
        self, block: nn.Module, targets: list[Target], statistics: dict[str, InputStatistics | None]
    ) -> None:
        """Choose for targets of one block."""
        weights = {target.name: target.dense() for target in targets}
        modules = {target.name: target.module for target in targets}
        missing = set(weights)
        started = time.perf_counter()
        # A criterion computes in the precision it asks for.
        with torch.autocast(next(iter(weights.values())).device.type, enabled=False):
            inputs = BlockInputs(modules, weights, statistics, self.pattern, block)
            for name, choice in self.criterion.choose_block(inputs):
                where = f"criterion {self.criterion.name!r}, layer {name}"
                if name not in weights:
                    raise PatternError(f"{where}: got a mask for a layer that was not asked for")
                self._add(name, weights[name], choice, statistics[name], where, started)
                missing.discard(name)
                started = time.perf_counter()
        if missing:
            raise PatternError(f"criterion {self.criterion.name!r} gave no mask for {sorted(missing)[0]}")

    def _add(
        self,
        name: str,
        weight: torch.Tensor,
        choice: Choice,
        statistics: InputStatistics | None,
        where: str,
        started: float,
    ) -> None:
        check_mask(choice.mask, weight, where)
        if self.options.weights == "keep":
            choice = replace(choice, weight=None)
        elif self.options.weights == "refit":
            choice = Choice(choice.mask, refit_weights(weight, choice.mask, statistics.hessian))
        report = LayerReport(name, self._groups(weight), None, 0.0, 0.0)
        self.ledger.add(name, choice, weight, report, where)
        report.relative_error = relative_error(weight, choice.masked(weight), statistics)
        report.kept_energy = kept_energy(weight, choice.mask)
        report.seconds = time.perf_counter() - started
        error = "" if report.relative_error is None else f", output error {report.relative_error:.4f}"
        self.bar.set_postfix_str(name + error, refresh=False)
        self.bar.update()

    def _groups(self, weight: torch.Tensor) -> int:
        if not isinstance(self.pattern, NMPattern):
            return len(weight)
        return len(weight) * self.pattern.num_groups(weight.shape[1])

    # --- what was chosen ------------------------------------------------------------------------------------------------
    @contextmanager
    def pruned(self, targets: list[Target]) -> Iterator[None]:
        """For the time of the context these targets compute as they were chosen."""
        with ExitStack() as stack:
            for target in targets:
                stack.enter_context(present(target.module))
                dense = target.dense()
                choice = self.ledger.choice(target.name, dense.device)
                stack.enter_context(target.computing_with(choice.masked(dense), dense))
            yield

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Channels go back to where they were if the body fails."""
        try:
            yield
        except BaseException:
            if self.reordering is not None:
                self.reordering.undo()
            raise

    def apply(self) -> None:
        """Change the model. What can fail is looked at first; then each weight is written once."""
        self.ledger.check_readable()
        for target in self.targets:
            if is_offloaded(target.module):
                change_when_loaded(target.module, target.parameter, partial(_overwrite, target, self.ledger))
            else:
                target.apply(self.ledger.choice(target.name, target.dense().device))

    def codes(self) -> dict[str, LayerCodes]:
        """The masks as they are published: of fused experts those of all in one."""
        if not isinstance(self.pattern, NMPattern) or self.ledger.permuted:
            return {}
        parts: dict[str, list[Target]] = {}
        for target in self.targets:
            parts.setdefault(target.weight_name, []).append(target)
        found = {}
        for name, targets in parts.items():
            whole = targets[0].expert is None or len(targets) == len(getattr(targets[0].module, targets[0].parameter))
            base = self.ledger.base(name)
            if base is not None and whole:  # a published mask covers all experts of a block, or none
                packed = torch.cat([self.ledger.packed(target.name) for target in targets])
                width = self.ledger.shape(targets[0].name)[1]
                is_experts = targets[0].expert is not None
                found[name] = LayerCodes(packed, base, (len(packed), width), is_experts)
        return found

    def _seen(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, noting what they are: a run that goes on must have the same."""
        for batch in batches:
            self._batches.append(identity_of_batch(batch))
            yield batch

    def _resume(self) -> None:
        """Take over what a killed walk has left in the checkpoint folder."""
        if self.ledger.folder is None:
            return
        self.ledger.open_folder(
            {
                "criterion": _described(self.criterion),
                "pattern": str(self.pattern),
                "weights": self.options.weights,
                "inputs": self.options.inputs,
                "permute_channels": self.options.permute_channels,
                "dtype": sorted({str(parameter.dtype) for parameter in self.model.parameters()}),
                "calibration": self._batches,
                "layers": [target.name for target in self.targets],
                # Those on disk are compared when their block is reached.
                "parameters": identity_of(self.model.parameters()),
            }
        )
        self.bar.initial = self.bar.n = len(self.ledger.layers)  # so that the time left is that of the others
        self.bar.refresh()


def _overwrite(target: Target, ledger: Ledger, parameter: torch.Tensor) -> None:
    weight = target.view(parameter)
    weight.copy_(ledger.choice(target.name, weight.device).masked(weight))


def _described(value: object) -> str:
    """A criterion or one of its settings, equal for equal ones; private attributes are no settings."""
    if isinstance(value, Criterion):
        settings = {key: _described(part) for key, part in sorted(vars(value).items()) if not key.startswith("_")}
        return f"{type(value).__qualname__}({', '.join(f'{key}={part}' for key, part in settings.items())})"
    if isinstance(value, torch.Tensor):
        return to_hex(digest(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    return getattr(value, "__qualname__", None) or repr(value)
