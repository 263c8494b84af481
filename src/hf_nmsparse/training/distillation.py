# SPDX-License-Identifier: Apache-2.0
"""Distillation from the dense base: the frozen model under the masks is its own teacher.

The loss is AST's (Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
arXiv 2407.20584): `loss_weight * task loss + distillation_weight * T^2 * KL(teacher || student)`, where both softmaxes
are taken at temperature T and the divergence is averaged over the positions that the task loss counts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .._compat import adapter_off
from ..adapter import NMSparseLayer
from ..errors import ConfigError

_IGNORED = -100  # the label of positions that no loss counts
# Logits that are in float32 at a time, of each of four temporary tensors: 32 MiB each.
_CHUNK_LOGITS = 2**23


@dataclass(frozen=True)
class Distillation:
    """How much, and how softly, the sparse model follows its dense base.

    Args:
        loss_weight (`float`): factor on the task loss; AST's GPT-2 recipe. Its LLaMA recipe has 1.
        distillation_weight (`float`): factor on T^2 KL; AST's GPT-2 recipe. Its LLaMA recipe has 0.5.
        temperature (`float`): T, by which both models' logits are divided.

    Raises:
        ConfigError: on a weight that is negative or not finite, `distillation_weight` or `temperature` not above 0.
    """

    loss_weight: float = 1 / 3
    distillation_weight: float = 2 / 3
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name, lowest in (("loss_weight", "at least"), ("distillation_weight", "above"), ("temperature", "above")):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and lowest == "above"):
                raise ConfigError(f"Distillation: {name} must be a finite number {lowest} 0, got {value!r}")


# --- the teacher ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def dense_base(model: nn.Module) -> Iterator[None]:
    """For the time of the context `model` answers as its dense base: no mask, no other adapter, no dropout, no gradient.

    Works in place on a `PeftModel`, a model with adapters from `add_adapter`, and on wrappers of either
    (`DistributedDataParallel`). Masks, LoRA and the like, `modules_to_save` and trained tokens are switched off; which
    parameters train, and which modules are in training mode, is as before afterwards. Parameters of the base itself that
    someone trains (PEFT's `bias="all"`) stay as they are now.

    Raises:
        ConfigError: if an adapter is merged, since the base weights are then not the dense ones.
    """
    modules = list(model.named_modules())
    merged = [name for name, module in modules if isinstance(module, BaseTunerLayer) and module.merged]
    if merged:
        raise ConfigError(
            f"{len(merged)} layers (first: {merged[0]}) have adapters merged into their weights, so the dense base cannot "
            "be run; unmerge first (model.unmerge_adapter())"
        )
    modes = [(module, module.training) for _, module in modules]
    with contextlib.ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
            module.training = False  # not eval(), which a module may override to do more
            if isinstance(module, NMSparseLayer):
                stack.enter_context(module.masks_off())
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                stack.enter_context(adapter_off(module))
        stack.enter_context(torch.no_grad())
        yield


def teacher_logits(model: nn.Module, inputs: Mapping[str, Any], label_key: str) -> torch.Tensor:
    """Logits `[..., classes]` of the dense base of `model` for a training batch."""
    # A second pass through DDP would broadcast buffers between the student's forward and its backward.
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not _is_encoder_decoder(model):  # these may make the decoder's input from the labels; no other model needs them
        inputs = {key: value for key, value in inputs.items() if key != label_key}
    with dense_base(model):
        return logits_of(model(**inputs))


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits in a model's output.

    Raises:
        ConfigError: if there are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ConfigError(
            f"distillation needs the model's logits, but its output has only {found}; a fused loss "
            "(use_liger_kernel=True) never makes them, switch it off, and leave return_dict on"
        )
    return logits


# --- what counts ----------------------------------------------------------------------------------------------------
def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at position i are for the label at i + 1: true of decoder-only language models."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if _is_encoder_decoder(base):
        return False
    by_loss = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return by_loss or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def counted_positions(labels: torch.Tensor, logits: torch.Tensor, next_token: bool) -> torch.Tensor:
    """Positions that the task loss counts, bool, of the shape of `labels`: those whose label is not -100.

    Args:
        labels (`torch.Tensor`): integers, `[...]`.
        logits (`torch.Tensor`): `[..., classes]`.
        next_token (`bool`): position i counts by the label at i + 1.

    Raises:
        ConfigError: if there is not one class label for each row of logits.
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ConfigError(
            f"distillation compares distributions over classes, one for each label, but the labels are "
            f"{labels.dtype} {list(labels.shape)} and the logits {list(logits.shape)}; it does not fit this task"
        )
    counted = labels != _IGNORED
    return F.pad(counted[..., 1:], (0, 1), value=False) if next_token else counted


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# --- the loss -------------------------------------------------------------------------------------------------------
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    keep: torch.Tensor,
    temperature: float,
    denominator: torch.Tensor | float,
) -> torch.Tensor:
    """`T^2 / denominator * sum over kept positions of KL(softmax(teacher / T) || softmax(student / T))`, in float32.

    Computed over the full vocabulary, a chunk of positions at a time, so that only a chunk of the logits is ever in
    float32. The gradient is made together with the loss and **written over `teacher_logits`** (where the dtypes agree):
    beside the two given tensors nothing of their size is allocated, and neither is kept for the backward pass otherwise.
    Positions that are not kept may hold anything, NaN included.

    Args:
        student_logits (`torch.Tensor`): `[..., classes]`; the gradient goes here, in its dtype.
        teacher_logits (`torch.Tensor`): `[..., classes]`; used up.
        keep (`torch.Tensor`): bool `[...]`.
        temperature (`float`): T.
        denominator (`torch.Tensor` or `float`): what the sum is divided by, for example the number of kept positions.

    Raises:
        ConfigError: if the shapes do not agree.
    """
    if student_logits.shape != teacher_logits.shape or keep.shape != student_logits.shape[:-1]:
        raise ConfigError(
            f"the student's logits {list(student_logits.shape)}, the teacher's {list(teacher_logits.shape)} and the kept "
            f"positions {list(keep.shape)} do not agree"
        )
    classes = student_logits.shape[-1]
    total = _SumOfDivergences.apply(
        student_logits.reshape(-1, classes),
        teacher_logits.detach().reshape(-1, classes),
        keep.reshape(-1),
        temperature,
    )
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(total.device)
    return total * (temperature**2) / denominator


class _SumOfDivergences(torch.autograd.Function):
    """Sum over kept rows of `KL(p || q)`, p and q the softmax of teacher / T and student / T; its gradient is (q - p) / T.

    The gradient is kept without weight and denominator: so it lies in [-1/T, 1/T] and survives float16.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """`student`, `teacher` `[rows, classes]`, `keep` bool `[rows]` -> scalar."""
        working = torch.promote_types(student.dtype, torch.float32)
        gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        total = torch.zeros((), dtype=working, device=student.device)
        for rows in keep.nonzero().squeeze(1).split(max(1, _CHUNK_LOGITS // student.shape[1])):
            log_q = torch.log_softmax(student[rows].to(working).div_(temperature), dim=-1)
            log_p = torch.log_softmax(teacher[rows].to(working).div_(temperature), dim=-1)
            p = log_p.exp()
            # Classes that the teacher rules out (logits of -infinity) add 0, not 0 * infinity.
            total += log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()
            if ctx.needs_input_grad[0]:
                gradient[rows] = log_q.exp_().sub_(p).div_(temperature).to(gradient.dtype)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.masked_fill_(~keep[:, None], 0.0))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The kept gradient, scaled in place: a second backward pass through the same graph is refused by autograd."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None, None, None
