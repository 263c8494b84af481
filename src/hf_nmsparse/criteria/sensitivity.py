# SPDX-License-Identifier: Apache-2.0
"""What pruning each layer alone does, and which layers to leave dense if only so many bytes may stay dense."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data import calibration_batches
from ..errors import ConfigError, NMSparseError, UnsupportedError
from ..pattern import NMPattern, Pattern, parse_pattern
from .base import NEEDS, Criterion, InputStatistics, check_takes, get_criterion
from .blocks import Sample, evaluating, model_inputs, replaced_forward
from .engine import Walk, WalkOptions
from .knapsack import most_valuable
from .report import LayerReport
from .targets import Target, check_targets, find_weights, is_encoder_decoder

IGNORED = -100  # the label of a token that Transformers leaves out of the loss


@dataclass(frozen=True)
class LayerSensitivity:
    """What pruning one layer does while all others stay dense.

    Args:
        name (`str`): full name, as `dense_layers` takes it.
        bytes (`int`): of its dense weight.
        relative_error (`float`): error of its outputs over their energy, `tr(D H D^T) / tr(W H W^T)` with
            `D = W*M - W` and H the mean of `x x^T`.
        kept_energy (`float`): sum of squares of the kept weights over that of all.
        differing_groups (`dict[str, float]`): share of groups (unstructured: of weights) that another criterion masks
            differently, by its name.
        loss_increase (`float`, *optional*): nats a token that the model's loss rises by; below 0 where it falls. `None` if
            it was not measured.
    """

    name: str
    bytes: int
    relative_error: float
    kept_energy: float
    differing_groups: dict[str, float]
    loss_increase: float | None


@dataclass
class SensitivityReport:
    """The sensitivity of each layer.

    Args:
        criterion (`str`): that chose the masks.
        pattern (`str`): for example `"2:4"`.
        tokens (`int`): calibration tokens that enter the first stack of blocks, padding not counted.
        dense_loss (`float`, *optional*): mean cross-entropy of the dense model on them, nats a token.
        seconds (`float`): wall time in all.
        layers (`list[LayerSensitivity]`): in the order of the model.
    """

    criterion: str
    pattern: str
    tokens: int
    dense_loss: float | None
    seconds: float
    layers: list[LayerSensitivity] = field(default_factory=list)

    def keep_dense(self, budget: float, by: Literal["loss_increase", "relative_error"] = "loss_increase") -> list[str]:
        """The layers to leave dense, so that most of the damage is avoided; for `dense_layers=` of `prune`.

        The damage of several layers is taken for the sum of what each does alone. Layers that do none are never kept.

        Args:
            budget (`float`): share of the bytes of all layers of the report that may stay dense, 0 to 1.
            by (`str`): what to avoid: the measured rise of the loss, or where it was not measured the relative error of
                the outputs times the bytes of the layer, a guess that does not know how much the model depends on it.

        Returns:
            names in the order of the model. Of two equally good layers the one whose name sorts first is kept.

        Raises:
            ConfigError: for another budget or `by`, or if the loss was not measured.
        """
        if not 0 <= budget <= 1:
            raise ConfigError(f"budget={budget}: expected the share of bytes that may stay dense, from 0 to 1")
        if by not in ("loss_increase", "relative_error"):
            raise ConfigError(f"by={by!r}: expected 'loss_increase' or 'relative_error'")
        layers = sorted(self.layers, key=lambda layer: layer.name)
        if by == "relative_error":
            damages = [layer.relative_error * layer.bytes for layer in layers]
        elif any(layer.loss_increase is None for layer in layers):
            raise ConfigError(
                "the loss was not measured; call sensitivity with measure_loss=True, or choose by='relative_error'"
            )
        else:
            damages = [layer.loss_increase for layer in layers]
        sizes = [layer.bytes for layer in layers]
        # The nearest float of a share like 0.29 can lie below it, and 29 of 100 must not become 28.
        capacity = int(budget * sum(sizes) + 1e-6)
        kept = {layers[index].name for index in most_valuable(damages, sizes, capacity)}
        return [layer.name for layer in self.layers if layer.name in kept]


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    calibration: Any,
    criterion: str | Criterion | type[Criterion] = "wanda",
    pattern: str | Pattern = "2:4",
    compare: Iterable[str | Criterion | type[Criterion]] = ("magnitude",),
    measure_loss: bool = True,
    tokenizer: Any = None,
    dense_layers: Iterable[str] = (),
    layers: str | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Prune each layer by itself, see what that does, and take it back. The model is not changed.

    Masks are chosen from the inputs that the layers have in the dense model; kept weights stay as they are, whatever the
    criterion does with them elsewhere. The loss of a layer in block b takes a run of the blocks from b on and of the
    output head: all in all about half as many runs of the model as there are layers. Each expert of fused ones is a layer;
    where there are thousands of them, leave them out or the loss unmeasured.

    Memory besides the model: hidden states of all calibration tokens at two blocks, the logits of one calibration batch
    (pass smaller batches where they are too large), Hessians of one block.

    Args:
        model (`nn.Module`): a Transformers model.
        calibration: as in `prune`. The loss is measured on the same tokens, against `labels` where a batch has them.
        criterion (`str` or `Criterion`): chooses the masks.
        pattern (`str`, `NMPattern` or `Unstructured`): `"2:4"`, or `"60%"` of the weights pruned.
        compare (`Iterable[str | Criterion]`): criteria whose masks are to be compared with those.
        measure_loss (`bool`): measure what each layer does to the loss of a causal language model.
        tokenizer (*optional*): for texts.
        dense_layers (`Iterable[str]`): layers that stay dense in any case and are not looked at, see `find_weights`.
        layers (`str`, *optional*): look at these blocks only, as `"0:50%"`, see `prune`.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        `SensitivityReport`; its `keep_dense` picks layers for a budget.

    Raises:
        ConfigError: on an unknown criterion, one that doesn't take the pattern, or a name twice in `compare`; else as in
            `prune`.
        UnsupportedError: if the loss is to be measured of a model that is no causal language model; else as in `prune`.
        NMSparseError: if a loss is not finite.
    """
    started = time.perf_counter()
    pattern = parse_pattern(pattern)
    criterion = get_criterion(criterion)
    others = [get_criterion(other) for other in ([compare] if isinstance(compare, str) else compare)]
    for one in (criterion, *others):
        check_takes(one, pattern)
    if repeated := [name for name, count in Counter(other.name for other in others).items() if count > 1]:
        raise ConfigError(f"compare: {repeated[0]!r} is there more than once; each needs a name of its own")
    if measure_loss:
        _check_is_causal_lm(model)
    targets = list(find_weights(model, dense_layers, layers).values())
    check_targets(targets)
    survey = _Survey(model, targets, criterion, others, pattern, measure_loss, progress)
    with survey.bar, evaluating(model):
        survey.visit_stacks(calibration_batches(calibration, tokenizer))
    seconds = time.perf_counter() - started
    return SensitivityReport(criterion.name, str(pattern), survey.tokens, survey.dense_loss, seconds, survey.layers)


class _Survey(Walk):
    """A walk through the dense model that prunes each layer by itself for a moment, and changes nothing for good."""

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        criterion: Criterion,
        others: list[Criterion],
        pattern: Pattern,
        measure_loss: bool,
        progress: bool,
    ) -> None:
        super().__init__(model, targets, criterion, pattern, WalkOptions(inputs="dense", progress=progress))
        self.bar.set_description(f"sensitivity, {criterion.name} {pattern}")
        self.others = [Walk(model, targets, other, pattern, WalkOptions(progress=False)) for other in others]
        # With norms alone the error of the outputs would be an estimate, and not the same for all criteria.
        self.needs = max("hessian", *(one.needs for one in (criterion, *others)), key=NEEDS.index)
        self.measure_loss = measure_loss
        self.dense_loss: float | None = None
        self.layers: list[LayerSensitivity] = []
        self.batches: list[dict[str, Any]] = []
        self.blocks = nn.ModuleList()

    def visit_stacks(self, batches: Iterable[dict[str, Any]]) -> None:
        self.batches = list(batches)
        super().visit_stacks(self.batches)

    def visit_blocks(self, stack: str, blocks: nn.ModuleList, samples: list[Sample]) -> list[Target]:
        if self.measure_loss:
            self.blocks = blocks
            self.dense_loss = self._loss(0, samples, "the dense model")
        return super().visit_blocks(stack, blocks, samples)

    def visit_block(
        self, key: str, block: nn.Module, index: int, here: list[Target], samples: list[Sample]
    ) -> list[torch.Tensor] | None:
        outputs = super().visit_block(key, block, index, here, samples)
        reports = {report.name: report for report in self.ledger.layers[-len(here) :]}
        for target in here:
            increase = None
            if self.measure_loss:
                with self.pruned([target]):
                    increase = self._loss(index, samples, f"the model with {target.name} pruned") - self.dense_loss
                self.bar.set_postfix_str(f"{target.name}, loss {increase:+.4f}")
            self.layers.append(self._sensitivity(target, reports[target.name], increase))
        return outputs

    def choose_block(
        self, block: nn.Module, targets: list[Target], statistics: dict[str, InputStatistics | None]
    ) -> None:
        super().choose_block(block, targets, statistics)
        by_name = {target.name: target for target in targets}
        for other in self.others:
            for stage in other.criterion.stages(list(by_name), block):
                other.choose_block(block, [by_name[name] for name in stage], statistics)

    def _sensitivity(self, target: Target, report: LayerReport, increase: float | None) -> LayerSensitivity:
        mask = self.ledger.choice(target.name).mask
        differing = {
            other.criterion.name: _share_differing(mask, other.ledger.choice(target.name).mask, self.pattern)
            for other in self.others
        }
        size = target.dense().nbytes
        return LayerSensitivity(target.name, size, report.relative_error, report.kept_energy, differing, increase)

    def _loss(self, first: int, samples: list[Sample], what: str) -> float:
        """Mean cross-entropy a token, the blocks before `first` not run again."""
        losses = []
        for sample, batch in zip(samples, self.batches, strict=True):
            inputs = model_inputs(self.model, batch)
            labels = inputs.pop("labels", inputs.get("input_ids"))
            losses.append(_token_losses(self._logits(first, sample, inputs), labels, sample.real))
        loss = float(torch.cat(losses).mean())
        if not math.isfinite(loss):
            raise NMSparseError(
                f"the loss of {what} is {loss} on the calibration data; the model was not changed. Load it in bfloat16 or "
                "float32, and check that the data has tokens to predict"
            )
        return loss

    def _logits(self, first: int, sample: Sample, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Run the blocks from `first` on, then the model's own forward for what comes after them."""
        hidden: Any = sample.hidden
        for block, (args, kwargs) in zip(self.blocks[first:], sample.calls[first:], strict=True):
            output = block(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(replaced_forward(block, lambda *_, **__: output))
            return self.model(**inputs).logits


def _check_is_causal_lm(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or is_encoder_decoder(model):
        raise UnsupportedError(
            f"{type(model).__name__} is no causal language model, so there is no loss of next tokens to measure; pass "
            "measure_loss=False, and choose layers with keep_dense(budget, by='relative_error')"
        )


def _token_losses(logits: torch.Tensor, labels: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of each token that is real and follows a real one.

    Args:
        logits (`torch.Tensor`): `[batch, sequence, vocabulary]`, any float dtype.
        labels (`torch.Tensor`): int64 `[batch, sequence]`, -100 where nothing is to be predicted.
        real (`torch.Tensor`, *optional*): bool `[batch, sequence]`, false at padding; `None` without padding.

    Returns:
        float64 `[tokens]`, on the CPU.
    """
    if labels is None or labels.shape != logits.shape[:2]:
        got = "no input_ids" if labels is None else f"labels {list(labels.shape)}"
        raise ConfigError(
            f"the logits are {list(logits.shape)}, the calibration has {got}; expected a label a position. Pass `labels` "
            "(-100 where nothing is to be predicted), or measure_loss=False"
        )
    scored = labels[:, 1:] != IGNORED
    if real is not None:
        scored &= real[:, 1:] & real[:, :-1]
    labels, scored = labels.to(logits.device), scored.to(logits.device)
    # One sequence at a time: float32 logits of a whole batch can be larger than the model.
    losses = [
        F.cross_entropy(row[:-1][here].float(), wanted[1:][here], reduction="none")
        for row, wanted, here in zip(logits, labels, scored, strict=True)
    ]
    return torch.cat(losses).cpu().double()


def _share_differing(mask: torch.Tensor, other: torch.Tensor, pattern: Pattern) -> float:
    """The share of groups (unstructured: of weights) in which two masks `[out, in]` differ."""
    differs = mask != other
    if isinstance(pattern, NMPattern):
        padding = -mask.shape[1] % pattern.m
        differs = F.pad(differs, (0, padding)).unflatten(1, (-1, pattern.m)).any(2)
    return int(differs.sum()) / differs.numel()
