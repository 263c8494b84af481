# SPDX-License-Identifier: Apache-2.0
"""`MaskPhaseCallback`: train the masks of some layers at a time, while the others wait with their hard masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..adapter import NMSparseLayer, mask_layers
from ..criteria import find_stacks, modules_in_range, name_matches
from ..errors import ConfigError
from ..relaxations import Moment
from .callbacks import MaskScheduleCallback, trained_layers

Span = tuple[int, int]  # first step, and the step after the last


class MaskPhaseCallback(MaskScheduleCallback):
    """Trains the masks of some layers at a time. It takes the place of `MaskScheduleCallback`.

    Masks outside the phase wait: they compute with their hard mask, without noise, and have neither gradients nor
    optimizer states, which are freed when their phase ends (a layer that comes again starts with fresh ones). Terms
    beside the masks, and what else trains, train all the time. Temperature, logit scale and regulariser go from start to
    end within each phase; the learning rate is the Trainer's, over the whole run. A run that is resumed goes on within its
    phase, bit for bit. `requires_grad` is not touched; after training no mask waits.

    Args:
        phases: `(layers, steps)` each: `layers` (`str` or `list[str]`) are names of layers or any run of their parts
            ("down_proj", "layers.0"), or ranges of blocks ("0:10", "50%:"); `steps` (`int`) are optimizer steps, whose sum
            has to be `max_steps` of the run.

    Raises:
        ConfigError: here if a phase is of another form; at the beginning of training if an entry means no mask in training,
            or the steps do not add up.
    """

    trains_in_phases = True

    def __init__(self, phases: Sequence[tuple[str | Sequence[str], int]]) -> None:
        super().__init__()
        self.phases = [_checked(phase) for phase in phases]
        if not self.phases:
            raise ConfigError("MaskPhaseCallback needs at least one phase, (layers, steps)")
        self._spans: dict[tuple[str, str], list[Span]] = {}
        self._entered: Span | None = None

    @property
    def spans(self) -> list[Span]:
        """First step of each phase, and the step after its last."""
        ends = [sum(steps for _, steps in self.phases[: count + 1]) for count in range(len(self.phases))]
        return list(zip([0, *ends], ends, strict=False))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs,
    ) -> None:
        steps = self.spans[-1][1]
        if steps != state.max_steps:
            raise ConfigError(
                f"the phases have {steps} steps, the run has {state.max_steps}; set max_steps={steps}, or change the phases"
            )
        self._spans, self._entered = self._spans_of_masks(model), None
        super().on_train_begin(args, state, control, model, optimizer, **kwargs)
        self._enter(state, model, optimizer)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs,
    ) -> None:
        self._enter(state, model, optimizer)
        super().on_step_begin(args, state, control, model, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        for layer in mask_layers(model).values():
            for adapter_name in layer.configs:
                layer.pause(adapter_name, False)

    def _spans_of_masks(self, model: nn.Module) -> dict[tuple[str, str], list[Span]]:
        """When each mask learns, by layer and adapter."""
        masks = [(layer, adapter_name) for _, layer, adapter_name in trained_layers(model)]
        if not masks:
            raise ConfigError("MaskPhaseCallback found no mask in training on the model, so no phase means any")
        found: dict[tuple[str, str], list[Span]] = {}
        for (entries, _), span in zip(self.phases, self.spans, strict=True):
            meant = {key for entry in entries for key in _meant(entry, masks, model)}
            for key in sorted(meant):
                found.setdefault(key, []).append(span)
        return found

    def _enter(self, state: TrainerState, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Where a phase begins: let its masks learn and the others wait, and free what those held."""
        span = next((span for span in self.spans if span[0] <= state.global_step < span[1]), None)
        if span is None or span == self._entered:
            return
        self._entered = span
        for _, layer, adapter_name in trained_layers(model):
            waits = span not in self._spans.get((layer.module_name, adapter_name), [])
            layer.pause(adapter_name, waits)
            if waits:
                trained = layer.mask_parameter(adapter_name)
                trained.grad = None
                if optimizer is not None:
                    optimizer.state.pop(trained, None)

    def _tell(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        for layer in mask_layers(model).values():
            for adapter_name, config in layer.configs.items():
                if config.mask_format == "logits":
                    spans = self._spans.get((layer.module_name, adapter_name), [(0, state.max_steps)])
                    # Of a waiting mask: the phase it has been through, else its first, whose schedules are at the start.
                    first, end = max((span for span in spans if span[0] <= state.global_step), default=spans[0])
                    steps = state.global_step, end, self._draw(args), args.gradient_accumulation_steps, first
                    layer.set_moment(adapter_name, Moment(*steps))


def _checked(phase: object) -> tuple[list[str], int]:
    """A phase as (entries, steps)."""
    if isinstance(phase, (tuple, list)) and len(phase) == 2:
        layers, steps = phase
        entries = [layers] if isinstance(layers, str) else layers
        names = isinstance(entries, (list, tuple)) and entries and all(isinstance(entry, str) for entry in entries)
        if names and isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
            return list(entries), steps
    raise ConfigError(
        f'a phase is (layers, steps), for example ("0:10", 500) or (["down_proj", "10:20"], 500); got {phase!r}'
    )


def _meant(entry: str, masks: list[tuple[NMSparseLayer, str]], model: nn.Module) -> list[tuple[str, str]]:
    """The masks, by layer and adapter, that an entry means.

    Raises:
        ConfigError: if there is none.
    """
    if ":" in entry:
        inside = modules_in_range(find_stacks(model, {layer for layer, _ in masks}), entry)
        found = [(layer.module_name, name) for layer, name in masks if layer in inside]
    else:
        found = [(layer.module_name, name) for layer, name in masks if name_matches(layer.module_name, entry)]
    if not found:
        raise ConfigError(
            f"phases: {entry!r} means none of the {len(masks)} masks in training, whose layers are called like "
            f"{masks[0][0].module_name!r}"
        )
    return found
