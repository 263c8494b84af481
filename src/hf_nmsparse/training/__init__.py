# SPDX-License-Identifier: Apache-2.0
"""Learning masks with the Hugging Face Trainer."""

from .callbacks import MaskMetricsCallback, MaskScheduleCallback
from .distillation import Distillation
from .optimizers import MaskAdamW
from .plan import Plan, plan
from .prior import set_prior
from .side_branch import BranchFit, fit_side_branch
from .trainer import NMSparseTrainer

__all__ = [
    "BranchFit",
    "Distillation",
    "MaskAdamW",
    "MaskMetricsCallback",
    "MaskScheduleCallback",
    "NMSparseTrainer",
    "Plan",
    "fit_side_branch",
    "plan",
    "set_prior",
]
