# SPDX-License-Identifier: Apache-2.0
"""How far a student is from its teacher: divergences of their distributions, and errors of their hidden states.

Each loss is computed a chunk of positions at a time, so that only a chunk is ever in float32, and its gradient is made
together with it: nothing else is kept for the backward pass. Positions that do not count may hold anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..errors import ConfigError

# Numbers that are in float32 at a time, of each of a few temporary tensors: 32 MiB each.
_CHUNK = 2**23
# In the mean square of a hidden state, so that a position of zeros gives no infinity.
_EPSILON = 1e-6


class TopClasses(NamedTuple):
    """A teacher's likeliest classes at some positions, and what it leaves to all the others.

    Args:
        indices (`torch.Tensor`): int32 `[positions, k]`.
        log_probabilities (`torch.Tensor`): `[positions, k + 1]`, float32 or float64; the last one is of all other classes.
    """

    indices: torch.Tensor
    log_probabilities: torch.Tensor


# --- all classes ----------------------------------------------------------------------------------------------------
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    keep: torch.Tensor,
    temperature: float,
    denominator: torch.Tensor | float,
) -> torch.Tensor:
    """`T^2 / denominator * sum over kept positions of KL(softmax(teacher / T) || softmax(student / T))`, in float32.

    Over all classes. The gradient is **written over `teacher_logits`** (where the dtypes agree): beside the two given
    tensors nothing of their size is allocated.

    Args:
        student_logits (`torch.Tensor`): `[..., classes]`; the gradient goes here, in its dtype.
        teacher_logits (`torch.Tensor`): `[..., classes]`; used up.
        keep (`torch.Tensor`): bool `[...]`.
        temperature (`float`): T.
        denominator (`torch.Tensor` or `float`): what the sum is divided by, for example the number of kept positions.

    Raises:
        ConfigError: if the shapes do not agree.
    """
    _check_shapes(student_logits, teacher_logits, keep)
    classes = student_logits.shape[-1]
    total = _SumOfDivergences.apply(
        student_logits.reshape(-1, classes),
        teacher_logits.detach().reshape(-1, classes),
        keep.reshape(-1),
        temperature,
    )
    return _scaled(total, temperature**2, denominator)


class _SumOfDivergences(torch.autograd.Function):
    """Sum over kept rows of `KL(p || q)`, p and q the softmax of teacher / T and student / T; its gradient is (q - p) / T.

    The gradient is kept without weight and denominator: so it lies in [-1/T, 1/T] and survives float16.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """`student`, `teacher` `[rows, classes]`, `keep` bool `[rows]` -> scalar."""
        working = _working(student)
        gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        total = torch.zeros((), dtype=working, device=student.device)
        for rows in _chunks(keep, student.shape[1]):
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


# --- the likeliest classes, and one for the rest --------------------------------------------------------------------
def top_classes(teacher_logits: torch.Tensor, keep: torch.Tensor, top_k: int, temperature: float) -> TopClasses:
    """The teacher's `top_k` likeliest classes at each kept position, of `softmax(teacher / T)` over all classes.

    Args:
        teacher_logits (`torch.Tensor`): `[..., classes]`.
        keep (`torch.Tensor`): bool `[...]`.
        top_k (`int`): classes to keep; all of them if there are fewer.
        temperature (`float`): T.
    """
    classes = teacher_logits.shape[-1]
    logits, working = teacher_logits.detach().reshape(-1, classes), _working(teacher_logits)
    chosen, found = [], []
    for rows in _chunks(keep.reshape(-1), classes):
        log_p = torch.log_softmax(logits[rows].to(working).div_(temperature), dim=-1)
        top, indices = log_p.topk(min(top_k, classes), dim=-1)
        # Not 1 minus their sum, of which rounding would leave little.
        rest = log_p.scatter_(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        chosen.append(indices.int())
        found.append(torch.cat([top, rest], dim=-1))
    if not chosen:
        empty = logits.new_empty(0, min(top_k, classes) + 1, dtype=working)
        return TopClasses(empty[:, 1:].int(), empty)
    return TopClasses(torch.cat(chosen), torch.cat(found))


def top_distillation_loss(
    student_logits: torch.Tensor,
    teacher: TopClasses,
    keep: torch.Tensor,
    temperature: float,
    denominator: torch.Tensor | float,
) -> torch.Tensor:
    """`distillation_loss` after all classes but the teacher's likeliest were joined into one, in both distributions.

    Of distributions over `k + 1` classes, so never below 0; never above the divergence over all classes (joining classes
    cannot tell distributions better apart), and equal to it if nothing is joined. Its gradient is (q - p) / T too, where
    p gives each joined class the student's share of the teacher's rest: among them the student is left as it is.

    Args:
        student_logits (`torch.Tensor`): `[..., classes]`; the gradient goes here, in its dtype.
        teacher (`TopClasses`): one row for each kept position, in their order, at the same temperature.
        keep (`torch.Tensor`): bool `[...]`.
        temperature (`float`): T.
        denominator (`torch.Tensor` or `float`): what the sum is divided by.

    Raises:
        ConfigError: if the shapes do not agree.
    """
    _check_shapes(student_logits, student_logits, keep)
    classes, kept = student_logits.shape[-1], int(keep.sum())
    if len(teacher.indices) != kept or teacher.indices.shape[1] > classes:
        raise ConfigError(
            f"the teacher's classes are {list(teacher.indices.shape)}, expected a row for each of {kept} kept positions and "
            f"at most {classes} classes"
        )
    total = _SumOfTopDivergences.apply(student_logits.reshape(-1, classes), *teacher, keep.reshape(-1), temperature)
    return _scaled(total, temperature**2, denominator)


class _SumOfTopDivergences(torch.autograd.Function):
    """Sum over kept rows of `sum over top classes of p log(p / q) + P log(P / Q)`, P and Q what is left to the others."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        indices: torch.Tensor,
        log_probabilities: torch.Tensor,
        keep: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """`student` `[rows, classes]`, `keep` bool `[rows]`, the teacher's for kept rows alone -> scalar."""
        working = _working(student)
        total = torch.zeros((), dtype=working, device=student.device)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        done = 0
        for rows in _chunks(keep, student.shape[1]):
            here = slice(done, done := done + len(rows))
            top, log_p = indices[here].long(), log_probabilities[here].to(working)
            log_q = torch.log_softmax(student[rows].to(working).div_(temperature), dim=-1)
            top_log_q = log_q.gather(-1, top)
            rest_log_q = log_q.scatter_(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
            p = log_p.exp()
            joined = torch.cat([top_log_q, rest_log_q], dim=-1)
            total += (log_p - joined).mul_(p).masked_fill_(p == 0, 0.0).sum()
            if gradient is not None:
                # The teacher's rest, spread as the student spreads its own; in logarithms, since q may be 0 in float32.
                shift = log_p[:, -1:] - rest_log_q
                shift = shift.masked_fill(log_p[:, -1:].isneginf() | rest_log_q.isneginf(), -torch.inf)
                spread = (log_q + shift).exp_()
                difference = log_q.exp_().sub_(spread)
                difference.scatter_(-1, top, top_log_q.exp_().sub_(p[:, :-1]))
                gradient[rows] = difference.div_(temperature).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """The kept gradient, scaled in place."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None, None, None, None


# --- hidden states --------------------------------------------------------------------------------------------------
def hidden_loss(
    student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, denominator: torch.Tensor | float
) -> torch.Tensor:
    """`1 / denominator * sum over kept positions of |s - t|^2 / (|t|^2 + epsilon)`: the relative error of hidden states.

    The term of one layer of SquareHead (Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language
    Models", arXiv 2310.06927), but each position is divided by its own |t|^2 and not by the mean of the batch. So the
    sum over batches does not depend on how they are cut; and the few positions whose states are a thousand times larger
    than all others (often the first) do not drown the rest.

    Args:
        student (`torch.Tensor`): `[..., features]`; the gradient goes here, in its dtype.
        teacher (`torch.Tensor`): `[..., features]`.
        keep (`torch.Tensor`): bool `[...]`.
        denominator (`torch.Tensor` or `float`): what the sum is divided by, for example the number of kept positions.

    Raises:
        ConfigError: if the shapes do not agree.
    """
    _check_shapes(student, teacher, keep)
    features = student.shape[-1]
    total = _SumOfRelativeErrors.apply(
        student.reshape(-1, features), teacher.detach().reshape(-1, features), keep.reshape(-1)
    )
    return _scaled(total, 2 / features, denominator)


class _SumOfRelativeErrors(torch.autograd.Function):
    """Sum over kept rows of `|s - t|^2 / 2 / (mean t^2 + epsilon)`; its gradient is (s - t) / (mean t^2 + epsilon)."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`student`, `teacher` `[rows, features]`, `keep` bool `[rows]` -> scalar."""
        working = _working(student)
        total = torch.zeros((), dtype=working, device=student.device)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for rows in _chunks(keep, student.shape[1]):
            dense = teacher[rows].to(working)
            energy = dense.square().mean(-1, keepdim=True).add_(_EPSILON)
            difference = student[rows].to(working) - dense
            total += difference.square().sum(-1, keepdim=True).div_(energy).sum() / 2
            if gradient is not None:
                gradient[rows] = difference.div_(energy).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The kept gradient, scaled in place."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None, None


# --- shared ---------------------------------------------------------------------------------------------------------
def _check_shapes(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor) -> None:
    if student.shape != teacher.shape or keep.shape != student.shape[:-1]:
        raise ConfigError(
            f"what the student gives {list(student.shape)}, what the teacher gives {list(teacher.shape)} and the kept "
            f"positions {list(keep.shape)} do not agree"
        )


def _working(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(keep: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Indices of kept rows, int64, a chunk at a time."""
    rows = keep.nonzero().squeeze(1)
    return iter(rows.split(max(1, _CHUNK // width)) if len(rows) else ())


def _scaled(total: torch.Tensor, factor: float, denominator: torch.Tensor | float) -> torch.Tensor:
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(total.device)
    return total * factor / denominator
