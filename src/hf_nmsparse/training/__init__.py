# SPDX-License-Identifier: Apache-2.0
"""Learning masks with the Hugging Face Trainer."""

from .blockwise import BlockwiseReport, learn_blockwise
from .callbacks import MaskMetricsCallback, MaskScheduleCallback, add_mask_decay
from .distillation import Distillation
from .one_block import BlockReport
from .optimizers import MaskAdamW
from .pdp import PDPCallback
from .phases import MaskPhaseCallback
from .plan import Plan, plan
from .prior import set_prior
from .self_data import self_data
from .side_branch import BranchFit, fit_side_branch
from .teacher_cache import TeacherCache
from .trainer import NMSparseTrainer

__all__ = [
    "BlockReport",
    "BlockwiseReport",
    "BranchFit",
    "Distillation",
    "MaskAdamW",
    "MaskMetricsCallback",
    "MaskPhaseCallback",
    "MaskScheduleCallback",
    "NMSparseTrainer",
    "PDPCallback",
    "Plan",
    "TeacherCache",
    "add_mask_decay",
    "fit_side_branch",
    "learn_blockwise",
    "plan",
    "self_data",
    "set_prior",
]
