# SPDX-License-Identifier: Apache-2.0
"""`NMSparseTrainer`: the stock Trainer with mask callbacks and an optimizer group for the logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..relaxations.candidates import LOGIT_STD
from .callbacks import MaskMetricsCallback, MaskScheduleCallback, trained_layers

logger = logging.getLogger(__name__)


class NMSparseTrainer(Trainer):
    """`transformers.Trainer` for masks. `MaskScheduleCallback` and `MaskMetricsCallback` are added if not given.

    Mask logits get an optimizer group of their own: weight decay would pull them towards indecision, so it is 0 there.

    Args:
        mask_learning_rate (`float`, *optional*): learning rate of the logits; `args.learning_rate` by default.
        mask_weight_decay (`float`): weight decay of the logits.
        kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self, *args: Any, mask_learning_rate: float | None = None, mask_weight_decay: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mask_learning_rate = mask_learning_rate
        self.mask_weight_decay = mask_weight_decay
        callbacks = self.callback_handler.callbacks
        metrics = next((c for c in callbacks if isinstance(c, MaskMetricsCallback)), MaskMetricsCallback())
        if metrics in callbacks:
            callbacks.remove(metrics)
        # Before the callbacks that print and report, so that they see the metrics.
        callbacks.insert(0, metrics)
        if not any(isinstance(callback, MaskScheduleCallback) for callback in callbacks):
            self.add_callback(MaskScheduleCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer and move the logits into their own group."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        logits = {
            id(parameter)
            for name, parameter in (model or self.model).named_parameters()
            if ".nmsparse_" in name and parameter.requires_grad
        }
        moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in logits]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in logits]
        if moved:
            learning_rate = self.args.learning_rate if self.mask_learning_rate is None else self.mask_learning_rate
            optimizer.add_param_group({"params": moved, "lr": learning_rate, "weight_decay": self.mask_weight_decay})
        return optimizer

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
