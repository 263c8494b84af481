# SPDX-License-Identifier: Apache-2.0
"""The Trainer's loss with a teacher: what the dense base says is added to the task loss, scaled as the Trainer scales it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..errors import ConfigError
from .distillation import (
    Distillation,
    attended_positions,
    counted_positions,
    hidden_states_of,
    is_encoder_decoder,
    logits_of,
    predicts_next_token,
    teacher_outputs,
)
from .divergence import TopClasses, distillation_loss, hidden_loss, top_classes, top_distillation_loss
from .teacher_cache import TeacherCache, row_keys


class DistillingTrainer(Trainer):
    """`transformers.Trainer` with a `Distillation` beside the task loss; see `NMSparseTrainer`.

    Args:
        distillation (`Distillation`, *optional*): follow the dense base too; `None` trains on the task loss alone.
        teacher_cache (`TeacherCache`, *optional*): look up there what the dense base says, and add what is not there yet.

    Raises:
        ConfigError: if it is wanted under `nn.DataParallel`, or hidden states of an encoder-decoder; or if the cache is for
            another distillation.
        BaseModelMismatchError: if the cache was filled by another base.
    """

    def __init__(
        self,
        *args: Any,
        distillation: Distillation | None = None,
        teacher_cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self.teacher_cache = teacher_cache
        if teacher_cache is not None:
            teacher_cache.check(self.model, distillation)
        if distillation is not None:
            self._check_distillation(distillation)
        self._attended_in_step: torch.Tensor | None = None  # positions that are not padding
        self._terms: dict[str, torch.Tensor] = {}  # their sums since the last log line
        self._terms_since = 0  # the step before it

    def _check_distillation(self, distillation: Distillation) -> None:
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"distillation does not work with nn.DataParallel, which one process with {self.args.n_gpu} GPUs means to "
                "the Trainer; start one process per GPU (torchrun), or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        if distillation.hidden_weight and is_encoder_decoder(self.model):
            raise ConfigError(
                "hidden_weight compares the hidden states of one stack of blocks, but this model is an encoder-decoder with "
                "two; set hidden_weight=0"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The Trainer's loss; in training with `distillation`, weighted and with the teacher's terms."""
        distillation = self.distillation
        if distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out
        if distillation.hidden_weight:
            inputs = {**inputs, "output_hidden_states": True}
        # The student first: its loss has freed its temporaries when the teacher's logits come.
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = self._distillation_terms(model, given, outputs, num_items_in_batch)
        loss = distillation.loss_weight * loss
        for weight, term in terms:
            loss = loss + weight * term.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _distillation_terms(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Any, num_items_in_batch: torch.Tensor | int | None
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """Each term that has a weight, with it."""
        distillation, label_key = self.distillation, self._label_key(inputs)
        student = logits_of(outputs)
        keep = self._counted(inputs, label_key, student) if distillation.distillation_weight else None
        if self.teacher_cache is None:
            teacher, hidden_states = self._taught(model, inputs, label_key, keep)
        else:
            teacher, hidden_states = self._looked_up(model, inputs, label_key, keep), []
        if hidden_states:
            term = self._hidden_term(inputs, hidden_states_of(outputs), hidden_states, num_items_in_batch)
            yield distillation.hidden_weight, term
        if keep is not None:
            yield distillation.distillation_weight, self._divergence_term(student, teacher, keep, num_items_in_batch)

    def _taught(
        self, model: nn.Module, inputs: dict[str, Any], label_key: str, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor | TopClasses | None, list[torch.Tensor]]:
        """What the dense base says of kept positions, and its hidden states. Nothing else of its pass is held any longer."""
        distillation = self.distillation
        outputs = teacher_outputs(model, inputs, label_key, hidden_states=bool(distillation.hidden_weight))
        hidden_states = hidden_states_of(outputs) if distillation.hidden_weight else []
        if keep is None:
            return None, hidden_states
        logits = logits_of(outputs)
        if distillation.top_k is None:
            return logits, hidden_states
        return top_classes(logits, keep, distillation.top_k, distillation.temperature), hidden_states

    def _looked_up(self, model: nn.Module, inputs: dict[str, Any], label_key: str, keep: torch.Tensor) -> TopClasses:
        """What the dense base says of kept positions, without running it if each row was seen before."""
        keys = row_keys(inputs, keep, label_key)
        found = self.teacher_cache.find(keys, keep.device)
        if found is None:
            found, _ = self._taught(model, inputs, label_key, keep)
            self.teacher_cache.add(keys, keep, found)
        return found

    def _divergence_term(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | TopClasses,
        keep: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """T^2 KL, scaled as the Trainer's own loss is: over the items of the whole step where the Trainer counts them.

        Where it does not (models that take no loss arguments), the mean of the batch, which the Trainer then divides by
        the accumulation steps together with the task loss.
        """
        denominator, factor = self._scale(keep, num_items_in_batch, num_items_in_batch)
        loss = distillation_loss if isinstance(teacher, torch.Tensor) else top_distillation_loss
        term = loss(student, teacher, keep, self.distillation.temperature, denominator)
        return self._noted("nm/distillation_loss", term * factor, num_items_in_batch)

    def _hidden_term(
        self,
        inputs: dict[str, Any],
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Relative errors of hidden states, summed over blocks: a mean over the positions of the step that are not padding.

        Where the batch does not say which those are (images), the mean over all positions of the batch.
        """
        keep, total = attended_positions(inputs), self._attended_in_step
        if keep is None or keep.shape != student[0].shape[:-1]:
            keep, total = torch.ones(student[0].shape[:-1], dtype=torch.bool, device=student[0].device), None
        denominator, factor = self._scale(keep, total, num_items_in_batch)
        term = torch.zeros((), device=keep.device)
        for states in student:
            # Blocks may lie on several devices; what the teacher gave is dropped block by block.
            error = hidden_loss(states, teacher.pop(0).to(states.device), keep.to(states.device), denominator)
            term = term + error.to(term.device)
        return self._noted("nm/hidden_loss", term * factor, num_items_in_batch)

    # --- what counts, and how much --------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The Trainer's batches of a step; here too their positions that are not padding are counted."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distillation is not None and self.distillation.hidden_weight:
            self._attended_in_step = self._attended(batches, device)
        return batches, items

    def _attended(self, batches: list[Mapping[str, Any]], device: torch.device) -> torch.Tensor | None:
        masks = [attended_positions(batch) for batch in batches]
        if not masks or any(mask is None for mask in masks):
            return None
        total = torch.stack([mask.sum().to(device) for mask in masks]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        # Devices that share a batch would count it again, as the Trainer's own count knows.
        return total.clamp(min=1) / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _counted(self, inputs: dict[str, Any], label_key: str, logits: torch.Tensor) -> torch.Tensor:
        """Positions that the task loss counts, bool."""
        if "shift_labels" in inputs:  # of collators that shift; the Trainer counts by them too
            return counted_positions(inputs["shift_labels"], logits, next_token=False)
        return counted_positions(inputs[label_key], logits, predicts_next_token(self.model))

    def _scale(
        self, keep: torch.Tensor, in_step: torch.Tensor | int | None, num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor | int, int]:
        """What the sum over kept positions is divided by, and multiplied with, to be scaled as the task loss is.

        Args:
            keep (`torch.Tensor`): bool, the kept positions of the batch.
            in_step (`torch.Tensor` or `int`, *optional*): how many there are in the whole step, if that is known.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): the Trainer's own count for the task loss.
        """
        if not self._loss_is_scaled(num_items_in_batch):
            return keep.sum().clamp(min=1), 1
        if in_step is None:
            return keep.sum().clamp(min=1) * self.current_gradient_accumulation_steps, 1
        if self.args.average_tokens_across_devices:
            # The items are those of all processes, and their gradients are averaged.
            return in_step, self.accelerator.num_processes // self.get_tp_size()
        return in_step, 1

    def _loss_is_scaled(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `training_step` takes the loss as it is: its own rule, since it divides the sum of all terms."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def _label_key(self, inputs: dict[str, Any]) -> str:
        for key in ("labels", *self.label_names):
            if inputs.get(key) is not None:
                return key
        raise ConfigError(
            f"distillation needs labels to know which positions count, but the batch has only {sorted(inputs)}; "
            "name the labels' key in TrainingArguments(label_names=[...])"
        )

    # --- log lines ------------------------------------------------------------------------------------------------------
    def _noted(self, name: str, term: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """The term, after it was added to what the next log line says."""
        if not self._terms:
            self._terms_since = self.state.global_step
        steps = 1 if self._loss_is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
        now = term.detach() / steps
        self._terms[name] = self._terms[name] + now if name in self._terms else now
        return term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each of the teacher's terms since the last log line beside the mean loss."""
        if "loss" in logs and self._terms:
            for name, total in self._terms.items():
                mean = self.accelerator.gather(total).mean().item()  # of all processes, without a sync each step
                logs[name] = mean / (self.state.global_step - self._terms_since)
            self._terms = {}
        super().log(logs, start_time)
