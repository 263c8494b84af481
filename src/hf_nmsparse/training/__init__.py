# SPDX-License-Identifier: Apache-2.0
"""Learning masks with the Hugging Face Trainer."""

from .callbacks import MaskMetricsCallback, MaskScheduleCallback
from .plan import Plan, plan
from .prior import set_prior
from .trainer import NMSparseTrainer

__all__ = ["MaskMetricsCallback", "MaskScheduleCallback", "NMSparseTrainer", "Plan", "plan", "set_prior"]
