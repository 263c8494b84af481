# SPDX-License-Identifier: Apache-2.0
"""The masked weight of a relaxation over candidates, forward and backward, in plain torch.

    y   = softmax_c((kappa * pi + g) / tau)          g: Gumbel noise (0 for hard masks)
    M   = y S                                        S: the C candidates as 0/1 rows
    W~  = W * M

    G   = dL/dW~ * W - 2 lambda W^2 M                the regulariser -lambda ||W * M||^2 costs no graph of its own
    dy  = G S^T
    dpi = kappa / tau * y * (dy - sum_c y_c dy_c)

(MaskLLM, arXiv 2409.17481, section 3; the gradient is written out here.) Nothing of candidate size is saved between
forward and backward: the noise is recomputed from its key. Rows are worked through in slices that fit a CPU cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..pattern import NMPattern
from .philox import NoiseKey, gumbel_noise

# Groups per slice on the CPU: about 0.5 MB a temporary, measured fastest on 2 MB of L2 a core.
_CPU_SLICE_GROUPS = 65536
_GPU_SLICE_GROUPS = 1 << 24


@dataclass(frozen=True)
class SamplingState:
    """The moment of training, as 0-dim tensors so that changing it needs no device sync and no recompilation.

    Args:
        temperature, logit_scale, regularization (`torch.Tensor`): float32 scalars tau, kappa, lambda.
        step, draw (`torch.Tensor`): int64 scalars of the noise's counter.
    """

    temperature: torch.Tensor
    logit_scale: torch.Tensor
    regularization: torch.Tensor
    step: torch.Tensor
    draw: torch.Tensor

    @classmethod
    def of(
        cls,
        temperature: float,
        logit_scale: float,
        regularization: float = 0.0,
        step: int = 0,
        draw: int = 0,
        device: torch.device | str | None = None,
    ) -> SamplingState:
        """From Python numbers."""
        floats = [torch.full((), value, device=device) for value in (temperature, logit_scale, regularization)]
        integers = [torch.full((), value, dtype=torch.int64, device=device) for value in (step, draw)]
        return cls(*floats, *integers)

    def to(self, device: torch.device) -> SamplingState:
        """The same moment on another device."""
        if self.step.device == device:
            return self
        return SamplingState(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All five, in the order of the fields."""
        return self.temperature, self.logit_scale, self.regularization, self.step, self.draw


def hard_codes(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """Code of the largest logit of each group; equal logits go to the lowest code, on every device.

    Args:
        logits (`torch.Tensor`): `[out, C, groups]`.

    Returns:
        int64 `[out, groups]`.
    """
    best = logits[:, 0]
    codes = torch.zeros_like(best, dtype=torch.int64)
    for candidate in range(1, logits.shape[1]):
        better = logits[:, candidate] > best
        codes.masked_fill_(better, candidate)
        best = torch.maximum(best, logits[:, candidate])
    allowed = pattern.tail_candidates(in_features).to(logits.device)
    if not bool(allowed.all()):
        tail = logits[:, :, -1].masked_fill(~allowed, float("-inf"))  # [out, C]
        codes[:, -1] = (tail == tail.amax(1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
    return codes


def masked_weight(
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    state: SamplingState,
    hard: bool = False,
) -> torch.Tensor:
    """`W * M` with a soft, sampled mask, or with the hard one (exactly n of m) and the soft one's gradient.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype.
        logits (`torch.Tensor`): `[out, C, groups]`.
        pattern (`NMPattern`): the pattern.
        key (`NoiseKey`): identity of the noise.
        state (`SamplingState`): temperature, scale, regulariser, step, draw.
        hard (`bool`): exact mask of the largest logits in the forward value; the gradient is that of the noise-free
            soft mask (straight-through), without the regulariser.

    Returns:
        `[out, in]` in the dtype of `weight`.
    """
    return _MaskedWeight.apply(weight, logits, *state.tensors(), pattern, key, hard)


def soft_mask(
    logits: torch.Tensor, pattern: NMPattern, in_features: int, key: NoiseKey, state: SamplingState, noise: bool = True
) -> torch.Tensor:
    """The relaxed mask alone, `[out, in]` float32 (float64 for float64 logits); for metrics and tests."""
    parts = [
        (probabilities.transpose(1, 2) @ pattern.candidates(logits.device, probabilities.dtype)).flatten(1)
        for _, probabilities in _sliced_probabilities(logits, pattern, in_features, key, state.tensors(), noise)
    ]
    return torch.cat(parts)[:, :in_features]


def candidate_probabilities(
    logits: torch.Tensor, pattern: NMPattern, in_features: int, key: NoiseKey, state: SamplingState, noise: bool = True
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Softmax over candidates, `(rows, [rows, C, groups])` slice by slice, so that no full copy need exist."""
    return _sliced_probabilities(logits, pattern, in_features, key, state.tensors(), noise)


def _sliced_probabilities(
    logits: torch.Tensor,
    pattern: NMPattern,
    in_features: int,
    key: NoiseKey,
    scalars: tuple[torch.Tensor, ...],
    noise: bool,
) -> Iterator[tuple[slice, torch.Tensor]]:
    temperature, logit_scale, _, step, draw = scalars
    out_features, num_candidates, groups = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    slope, inverse_temperature = logit_scale.to(dtype) / temperature.to(dtype), temperature.to(dtype).reciprocal()
    allowed = pattern.tail_candidates(in_features).to(logits.device)
    restrict_tail = pattern.tail(in_features) > 0
    rows = max(1, (_CPU_SLICE_GROUPS if logits.device.type == "cpu" else _GPU_SLICE_GROUPS) // groups)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        scores = logits[start:stop].to(dtype) * slope
        if noise:
            index = torch.arange(start * groups, stop * groups, device=logits.device).view(-1, groups)
            scores += gumbel_noise(index, num_candidates, key, step, draw, dtype).mul_(inverse_temperature)
        if restrict_tail:
            scores[:, :, -1].masked_fill_(~allowed, float("-inf"))
        yield slice(start, stop), scores.softmax(1)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, logits, temperature, logit_scale, regularization, step, draw, pattern, key, hard):
        ctx.save_for_backward(weight, logits, temperature, logit_scale, regularization, step, draw)
        ctx.pattern, ctx.key, ctx.hard = pattern, key, hard
        in_features = weight.shape[1]
        candidates = pattern.candidates(weight.device)
        if hard:
            codes = hard_codes(logits, pattern, in_features)
            mask = candidates[codes].flatten(1)[:, :in_features]
            return torch.where(mask, weight, weight.new_zeros(()))
        result = torch.empty_like(weight)
        scalars = (temperature, logit_scale, regularization, step, draw)
        for rows, y in _sliced_probabilities(logits, pattern, in_features, key, scalars, noise=True):
            mask = (y.transpose(1, 2) @ candidates.to(y.dtype)).flatten(1)[:, :in_features]
            torch.mul(weight[rows], mask, out=result[rows])
        return result

    @staticmethod
    def backward(ctx, grad):
        weight, logits, *scalars = ctx.saved_tensors
        pattern = ctx.pattern
        in_features = weight.shape[1]
        temperature, logit_scale, regularization, _, _ = scalars
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        grad_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        padding = -in_features % pattern.m
        for rows, y in _sliced_probabilities(logits, pattern, in_features, ctx.key, scalars, noise=not ctx.hard):
            candidates = pattern.candidates(weight.device, y.dtype)
            w, a = weight[rows].to(y.dtype), grad[rows].to(y.dtype)
            if grad_weight is not None or not ctx.hard:
                mask = (y.transpose(1, 2) @ candidates).flatten(1)[:, :in_features]
            if grad_weight is not None:
                kept = mask if not ctx.hard else _hard_mask(logits[rows], pattern, in_features, mask.dtype)
                grad_weight[rows] = (a * kept).to(weight.dtype)
            if grad_logits is None:
                continue
            grad_mask = a * w
            if not ctx.hard:
                grad_mask -= (2 * regularization.to(y.dtype)) * w.square() * mask
            grouped = F.pad(grad_mask, (0, padding)).unflatten(1, (-1, pattern.m))  # [rows, groups, m]
            grad_y = candidates @ grouped.transpose(1, 2)  # [rows, C, groups]
            grad_y -= (y * grad_y).sum(1, keepdim=True)
            slope = logit_scale.to(y.dtype) / temperature.to(y.dtype)
            grad_logits[rows] = (grad_y.mul_(y).mul_(slope)).to(logits.dtype)
        return grad_weight, grad_logits, *[None] * 8


def _hard_mask(logits: torch.Tensor, pattern: NMPattern, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    codes = hard_codes(logits, pattern, in_features)
    return pattern.candidates(logits.device, dtype)[codes].flatten(1)[:, :in_features]
