# SPDX-License-Identifier: Apache-2.0
"""`NMSparseTrainer`: the stock Trainer with mask callbacks, an optimizer group for the logits, and distillation."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..errors import ConfigError
from ..relaxations.candidates import LOGIT_STD
from .callbacks import MaskMetricsCallback, MaskScheduleCallback, trained_layers
from .distillation import (
    Distillation,
    counted_positions,
    distillation_loss,
    logits_of,
    predicts_next_token,
    teacher_logits,
)
from .optimizers import STATES, MaskAdamW

logger = logging.getLogger(__name__)


class NMSparseTrainer(Trainer):
    """`transformers.Trainer` for masks. `MaskScheduleCallback` and `MaskMetricsCallback` are added if not given.

    Mask logits get an optimizer group of their own: weight decay would pull them towards indecision, so it is 0 there.
    What else trains (terms beside the mask, `modules_to_save`) has `args.learning_rate` and `args.weight_decay`.

    With `distillation`, the dense base teaches: each training step runs it once more, and `nm/distillation_loss` (T^2 KL,
    before its weight) joins the log lines. The evaluation loss stays the plain task loss.

    bfloat16 logits (`NMSparseConfig(logits_dtype="bfloat16")`) are trained by `MaskAdamW` in place of the AdamW that
    `args.optim` names by default; any other `optim`, `optimizers` and `optimizer_cls_and_kwargs` are taken as given.

    Args:
        mask_learning_rate (`float`, *optional*): learning rate of the logits; `args.learning_rate` by default.
        mask_weight_decay (`float`): weight decay of the logits.
        mask_optimizer_states (`str`, *optional*): `"8bit"` holds the optimizer's states of the logits in 2 bytes a logit
            instead of 8, `"float32"` does not; either asks for `MaskAdamW`, whatever the dtype of the logits.
        optimizer_in_backward (`bool`): `MaskAdamW` updates each tensor in the backward pass and frees its gradient, so no
            gradients are held. For one process that accumulates and clips nothing.
        distillation (`Distillation`, *optional*): follow the dense base too; `None` trains on the task loss alone.
        kwargs: as for `transformers.Trainer`.

    Raises:
        ConfigError: if `distillation` is wanted under `nn.DataParallel`; `mask_optimizer_states` or
            `optimizer_in_backward` beside another optimizer; or the latter with what it cannot do.
    """

    def __init__(
        self,
        *args: Any,
        mask_learning_rate: float | None = None,
        mask_weight_decay: float = 0.0,
        mask_optimizer_states: Literal["float32", "8bit"] | None = None,
        optimizer_in_backward: bool = False,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mask_learning_rate = mask_learning_rate
        self.mask_weight_decay = mask_weight_decay
        self.mask_optimizer_states = mask_optimizer_states
        if mask_optimizer_states not in (None, *STATES):
            raise ConfigError(f"mask_optimizer_states={mask_optimizer_states!r}: choose one of {STATES}, or None")
        if mask_optimizer_states is not None and not self._chooses_optimizer():
            raise ConfigError(
                f"mask_optimizer_states={mask_optimizer_states!r} is for MaskAdamW, but another optimizer is asked for "
                f"(optim={str(self.args.optim)!r}, or optimizers, or optimizer_cls_and_kwargs); leave one of them out"
            )
        self.optimizer_in_backward = optimizer_in_backward
        if optimizer_in_backward:
            self._check_in_backward()
        self.distillation = distillation
        if distillation is not None and self.args.n_gpu > 1:
            raise ConfigError(
                f"distillation does not work with nn.DataParallel, which one process with {self.args.n_gpu} GPUs means to "
                "the Trainer; start one process per GPU (torchrun), or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        self._distilled: torch.Tensor | None = None  # sum of the term since the last log line
        self._distilled_since = 0  # the step before it
        callbacks = self.callback_handler.callbacks
        metrics = next((c for c in callbacks if isinstance(c, MaskMetricsCallback)), MaskMetricsCallback())
        if metrics in callbacks:
            callbacks.remove(metrics)
        # Before the callbacks that print and report, so that they see the metrics.
        callbacks.insert(0, metrics)
        if not any(isinstance(callback, MaskScheduleCallback) for callback in callbacks):
            schedule = MaskScheduleCallback()
            self.add_callback(schedule)
            schedule.on_init_end(self.args, self.state, self.control, model=self.model)  # it came too late for it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer and move the logits, and nothing else, into a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        named = (model or self.model).named_parameters()
        logits = {id(p): p for name, p in named if ".nmsparse_logits." in name and p.requires_grad}
        low = any(parameter.dtype == torch.bfloat16 for parameter in logits.values())
        ours = low or self.mask_optimizer_states is not None or self.optimizer_in_backward
        if ours and self._chooses_optimizer():
            self.optimizer_cls_and_kwargs = MaskAdamW, self._adamw_options()
        optimizer = super().create_optimizer(model)
        moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in logits]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in logits]
        if moved:
            learning_rate = self.args.learning_rate if self.mask_learning_rate is None else self.mask_learning_rate
            group = {"params": moved, "lr": learning_rate, "weight_decay": self.mask_weight_decay}
            if isinstance(optimizer, MaskAdamW) and self.mask_optimizer_states is not None:
                group["states"] = self.mask_optimizer_states
            optimizer.add_param_group(group)
        return optimizer

    def _check_in_backward(self) -> None:
        args = self.args
        obstacles = {
            f"max_grad_norm={args.max_grad_norm} needs all gradients at once; set it to 0": bool(args.max_grad_norm),
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} adds up gradients; set it to 1, and a larger "
            "per_device_train_batch_size": args.gradient_accumulation_steps > 1,
            "fp16 scales the loss; use bf16": args.fp16,
            f"{max(args.world_size, args.n_gpu)} devices share gradients; use one": max(args.world_size, args.n_gpu)
            > 1,
            f"another optimizer is asked for (optim={str(args.optim)!r}, or optimizers, or optimizer_cls_and_kwargs)": (
                not self._chooses_optimizer()
            ),
        }
        if found := [obstacle for obstacle, there in obstacles.items() if there]:
            raise ConfigError("optimizer_in_backward=True does not go together with: " + "; ".join(found))

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, with the optimizer's step in it where `optimizer_in_backward`."""
        if not self.optimizer_in_backward:
            return super().training_step(model, *args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        with optimizer.step_in_backward():
            return super().training_step(model, *args, **kwargs)

    def _chooses_optimizer(self) -> bool:
        """Whether the user has left AdamW to the Trainer, so that ours may be it."""
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        return not given and self.args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)

    def _adamw_options(self) -> dict[str, Any]:
        args = self.args
        return {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "seed": args.seed,
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Create the scheduler, and warn if the run is too short to change any mask."""
        self.warn_if_masks_cannot_move(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def warn_if_masks_cannot_move(self, num_training_steps: int) -> bool:
        """Whether Adam, which moves a logit by at most about its learning rate a step, hardly crosses the prior's gap."""
        learning_rate = self.args.learning_rate if self.mask_learning_rate is None else self.mask_learning_rate
        travel = learning_rate * num_training_steps
        strengths = [layer.configs[name].prior_strength for _, layer, name in trained_layers(self.model)]
        gap = max(strengths, default=0.0) * LOGIT_STD
        if travel >= gap:
            return False
        logger.warning(
            "learning rate %g x %d steps moves a logit by at most about %.2g, but the prior's gap is %.2g: hardly any mask "
            "will change. Use a learning rate of at least %.2g, more steps, or a smaller prior_strength",
            learning_rate,
            num_training_steps,
            travel,
            gap,
            3 * gap / max(1, num_training_steps),
        )
        return True

    # --- distillation -----------------------------------------------------------------------------------------------
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The Trainer's loss; in training with `distillation`, weighted and with the distillation term."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out
        # The student first: its loss has freed its temporaries when the teacher's logits come.
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        term = self._distillation_term(model, given, logits_of(outputs), num_items_in_batch).to(loss.device)
        loss = self.distillation.loss_weight * loss + self.distillation.distillation_weight * term
        return (loss, outputs) if return_outputs else loss

    def _distillation_term(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        student: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """T^2 KL, scaled as the Trainer's own loss is: over the items of the whole step where the Trainer counts them.

        Where it does not (models that take no loss arguments), the mean of the batch, which the Trainer then divides by
        the accumulation steps together with the task loss.
        """
        label_key = self._label_key(inputs)
        if "shift_labels" in inputs:  # of collators that shift; the Trainer counts by them too
            keep = counted_positions(inputs["shift_labels"], student, next_token=False)
        else:
            keep = counted_positions(inputs[label_key], student, predicts_next_token(self.model))
        steps = self.current_gradient_accumulation_steps
        divided_later = not self._loss_is_scaled(num_items_in_batch)
        if divided_later or num_items_in_batch is None:
            denominator = keep.sum().clamp(min=1) * (1 if divided_later else steps)
        else:
            denominator = num_items_in_batch
        teacher = teacher_logits(model, inputs, label_key)
        term = distillation_loss(student, teacher, keep, self.distillation.temperature, denominator)
        if denominator is num_items_in_batch and self.args.average_tokens_across_devices:
            # The items are those of all processes, and their gradients are averaged.
            term = term * (self.accelerator.num_processes // self.get_tp_size())
        self._note(term.detach() / (steps if divided_later else 1))
        return term

    def _label_key(self, inputs: dict[str, Any]) -> str:
        for key in ("labels", *self.label_names):
            if inputs.get(key) is not None:
                return key
        raise ConfigError(
            f"distillation needs labels to know which positions count, but the batch has only {sorted(inputs)}; "
            "name the labels' key in TrainingArguments(label_names=[...])"
        )

    def _loss_is_scaled(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `training_step` takes the loss as it is: its own rule, since it divides the sum of both terms."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def _note(self, term: torch.Tensor) -> None:
        if self._distilled is None:
            self._distilled, self._distilled_since = torch.zeros_like(term), self.state.global_step
        self._distilled += term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean distillation term since the last log line beside the mean loss."""
        if "loss" in logs and self._distilled is not None:
            mean = self.accelerator.gather(self._distilled).mean().item()  # of all processes, without a sync each step
            logs["nm/distillation_loss"] = mean / (self.state.global_step - self._distilled_since)
            self._distilled = None
        super().log(logs, start_time)
