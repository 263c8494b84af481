# SPDX-License-Identifier: Apache-2.0
"""`NMSparseTrainer`: the stock Trainer with mask callbacks, an optimizer group for the logits, and distillation."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.training_args import OptimizerNames

from ..errors import ConfigError
from ..relaxations import CONFIDENCE_FACTORS, DECAYING, LOGIT_STD
from .callbacks import MaskMetricsCallback, MaskScheduleCallback, trained_layers, trained_logits
from .distillation import Distillation
from .distilling import DistillingTrainer
from .optimizers import STATES, MaskAdamW
from .phases import MaskPhaseCallback
from .teacher_cache import TeacherCache

logger = logging.getLogger(__name__)


class NMSparseTrainer(DistillingTrainer):
    """`transformers.Trainer` for masks. `MaskScheduleCallback` and `MaskMetricsCallback` are added if not given.

    Mask logits get an optimizer group of their own: weight decay would pull them towards indecision, so it is 0 there.
    What else trains (weights under masks, terms beside them, `modules_to_save`) has `args.learning_rate` and
    `args.weight_decay`.

    With `distillation`, the dense base teaches: each training step runs it once more, and `nm/distillation_loss` (T^2 KL)
    and `nm/hidden_loss`, before their weights, join the log lines. The evaluation loss stays the plain task loss.

    bfloat16 logits (`NMSparseConfig(logits_dtype="bfloat16")`) are trained by `MaskAdamW` in place of the AdamW that
    `args.optim` names by default; any other `optim`, `optimizers` and `optimizer_cls_and_kwargs` are taken as given.

    Args:
        mask_learning_rate (`float`, *optional*): learning rate of the logits; `args.learning_rate` by default.
        mask_weight_decay (`float`): weight decay of the logits.
        mask_optimizer_states (`str`, *optional*): `"8bit"` holds the optimizer's states of logits and weights in 2 bytes a value
            instead of 8, `"float32"` does not; either asks for `MaskAdamW`, whatever the dtype of the logits.
        optimizer_in_backward (`bool`): `MaskAdamW` updates each tensor in the backward pass and frees its gradient, so no
            gradients are held. For one process that accumulates and clips nothing.
        distillation (`Distillation`, *optional*): follow the dense base too; `None` trains on the task loss alone.
        teacher_cache (`TeacherCache`, *optional*): look up there what the dense base says, and add what is not there yet.
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
        teacher_cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        if mask_optimizer_states not in (None, *STATES):
            raise ConfigError(f"mask_optimizer_states={mask_optimizer_states!r}: choose one of {STATES}, or None")
        super().__init__(*args, distillation=distillation, teacher_cache=teacher_cache, **kwargs)
        self.mask_learning_rate = mask_learning_rate
        self.mask_weight_decay = mask_weight_decay
        self.mask_optimizer_states = mask_optimizer_states
        if mask_optimizer_states is not None and not self._chooses_optimizer():
            raise ConfigError(
                f"mask_optimizer_states={mask_optimizer_states!r} is for MaskAdamW, but another optimizer is asked for "
                f"(optim={str(self.args.optim)!r}, or optimizers, or optimizer_cls_and_kwargs); leave one of them out"
            )
        self.optimizer_in_backward = optimizer_in_backward
        if optimizer_in_backward:
            self._check_in_backward()
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
        named = [item for item in (model or self.model).named_parameters() if item[1].requires_grad]
        logits, weights = (
            {id(p): p for name, p in named if f".{container}." in name}
            for container in ("nmsparse_logits", "nmsparse_weight")
        )
        low = any(parameter.dtype == torch.bfloat16 for parameter in (*logits.values(), *weights.values()))
        ours = low or self.mask_optimizer_states is not None or self.optimizer_in_backward
        given = self.optimizer_cls_and_kwargs
        if ours and self._chooses_optimizer():
            self.optimizer_cls_and_kwargs = MaskAdamW, self._adamw_options()
        try:
            optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given  # a hyperparameter search asks again, with other options
        rate = self.args.learning_rate
        mask_rate = rate if self.mask_learning_rate is None else self.mask_learning_rate
        _move_to_group(optimizer, logits, mask_rate, self.mask_weight_decay, self.mask_optimizer_states)
        if self.mask_optimizer_states is not None:
            _move_to_group(optimizer, weights, rate, self.args.weight_decay, self.mask_optimizer_states)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # torch resumes FSDP2 with one empty group at most
            # Elsewhere they stay: checkpoints have had them from the beginning, and resume with as many only.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _check_in_backward(self) -> None:
        args = self.args
        obstacles = {
            f"max_grad_norm={args.max_grad_norm} needs all gradients at once; set it to 0": bool(args.max_grad_norm),
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} adds up gradients; set it to 1, and a larger "
            "per_device_train_batch_size": args.gradient_accumulation_steps > 1,
            "fp16 scales the loss; use bf16": args.fp16,
            "srste_decay adds to gradients before the step; set it to 0": any(
                isinstance(layer.relaxations[name], DECAYING) and layer.configs[name].srste_decay
                for _, layer, name in trained_layers(self.model)
            ),
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of the next step; none after the last. A run that is resumed from its last checkpoint, because it was killed
        while its result was written, would make a step more than it has, as the Trainer looks at their number after each."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

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
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.warn_if_masks_cannot_move(num_training_steps)
        return scheduler

    def warn_if_masks_cannot_move(self, num_training_steps: int) -> bool:
        """Whether Adam, which moves a logit by at most about its learning rate a step, hardly crosses the prior's gap.

        The learning rates are summed over the run, of phases over the one with the smallest sum; where the scheduler does not
        tell them beforehand the first stands for all. Where `prior_confidence` scales the gaps the smallest counts: those
        groups are meant to change first.
        """
        rates = self._mask_learning_rates(num_training_steps)
        phases = next((c for c in self.callback_handler.callbacks if isinstance(c, MaskPhaseCallback)), None)
        spans = [(0, num_training_steps)] if phases is None else phases.spans
        travel, (first, end) = min((sum(rates[slice(*span)]), span) for span in spans)
        configs = [layer.configs[name] for _, layer, name in trained_logits(self.model)]
        factors = (CONFIDENCE_FACTORS[0] if config.prior_confidence else 1 for config in configs)
        strengths = [factor * config.prior_strength for factor, config in zip(factors, configs, strict=True)]
        gap = max(strengths, default=0.0) * LOGIT_STD
        if travel >= gap:
            return False
        highest = max(rates[first:end], default=0.0)
        logger.warning(
            "learning rates of up to %g over %d steps move a logit by at most about %.2g, but the prior's gap is %.2g: hardly "
            "any mask will change. Use a learning rate of at least %.2g, more steps, or a smaller prior_strength",
            highest,
            end - first,
            travel,
            gap,
            3 * gap * highest / travel if travel else 3 * gap / max(1, end - first),
        )
        return True

    def _mask_learning_rates(self, steps: int) -> list[float]:
        """The learning rate of the logits at each step, as far as it is known beforehand."""
        scheduler = self.lr_scheduler
        logits = {id(layer.mask_parameter(name)) for _, layer, name in trained_logits(self.model)}
        groups = [] if scheduler is None else scheduler.optimizer.param_groups
        found = [i for i, group in enumerate(groups) if any(id(parameter) in logits for parameter in group["params"])]
        if not found:  # shards stand in the place of the parameters
            return [self.args.learning_rate if self.mask_learning_rate is None else self.mask_learning_rate] * steps
        first = {i: float(groups[i].get("initial_lr", groups[i]["lr"])) for i in found}
        fastest = max(found, key=first.__getitem__)
        if not isinstance(scheduler, LambdaLR):
            return [first[fastest]] * steps
        return [first[fastest] * scheduler.lr_lambdas[fastest](step) for step in range(steps)]


def _move_to_group(
    optimizer: torch.optim.Optimizer,
    parameters: dict[int, nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    states: str | None,
) -> None:
    """Give those of an optimizer's parameters a group of their own.

    Args:
        parameters (`dict[int, nn.Parameter]`): by their ids.
        states (`str`, *optional*): how `MaskAdamW` holds their states.
    """
    moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in parameters]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in parameters]
    if moved:
        group = {"params": moved, "lr": learning_rate, "weight_decay": weight_decay}
        if isinstance(optimizer, MaskAdamW) and states is not None:
            group["states"] = states
        optimizer.add_param_group(group)
