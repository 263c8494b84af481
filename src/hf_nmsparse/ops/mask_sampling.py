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

# Groups per slice. On the CPU about 0.5 MB a temporary, measured fastest of 8k to 256k with 2 MB of L2 a core; one slice a
# thread instead of one slice on all of them was slower, because the operations are then too short for their dispatch.
_CPU_GROUPS = 1 << 16
_GPU_GROUPS = 1 << 24


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
    if pattern.tail(in_features):
        allowed = pattern.tail_candidates(in_features, logits.device)
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
    sampler = _Sampler(logits, pattern, in_features, key, state.tensors(), noise)
    parts = [sampler.mask(sampler.probabilities(rows)) for rows in sampler.slices]
    return torch.cat(parts)


def candidate_probabilities(
    logits: torch.Tensor, pattern: NMPattern, in_features: int, key: NoiseKey, state: SamplingState, noise: bool = True
) -> Iterator[torch.Tensor]:
    """Softmax over candidates, `[rows, C, groups]` slice by slice, so that no full copy need exist."""
    sampler = _Sampler(logits, pattern, in_features, key, state.tensors(), noise)
    return (sampler.probabilities(rows) for rows in sampler.slices)


def _row_slices(logits: torch.Tensor) -> list[slice]:
    """Slices of the rows of logits `[out, C, groups]`."""
    rows, num_candidates, groups = logits.shape
    budget = _CPU_GROUPS if logits.device.type == "cpu" else _GPU_GROUPS  # for the six candidates of 2:4
    step = max(1, 6 * budget // (num_candidates * groups))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Sampler:
    """Probabilities and masks of a layer, for any slice of its rows."""

    def __init__(
        self,
        logits: torch.Tensor,
        pattern: NMPattern,
        in_features: int,
        key: NoiseKey,
        scalars: tuple[torch.Tensor, ...],
        noise: bool,
    ) -> None:
        temperature, logit_scale, _, self.step, self.draw = scalars
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.logits, self.key, self.noise, self.in_features = logits, key, noise, in_features
        self.slope = logit_scale.to(self.dtype) / temperature.to(self.dtype)
        self.inverse_temperature = temperature.to(self.dtype).reciprocal()
        self.candidates = pattern.candidates(logits.device, self.dtype)
        has_tail = pattern.tail(in_features) > 0
        self.barred_in_tail = ~pattern.tail_candidates(in_features, logits.device) if has_tail else None
        self.slices = _row_slices(logits)

    def probabilities(self, rows: slice) -> torch.Tensor:
        """`[rows, C, groups]`."""
        _, num_candidates, groups = self.logits.shape
        scores = self.logits[rows].to(self.dtype) * self.slope
        if self.noise:
            index = torch.arange(rows.start * groups, rows.stop * groups, device=scores.device).view(-1, groups)
            noise = gumbel_noise(index, num_candidates, self.key, self.step, self.draw, self.dtype)
            scores += noise.mul_(self.inverse_temperature)
        if self.barred_in_tail is not None:
            scores[:, :, -1].masked_fill_(self.barred_in_tail, float("-inf"))
        return scores.softmax(1)

    def mask(self, probabilities: torch.Tensor) -> torch.Tensor:
        """`[rows, C, groups]` -> `[rows, in]`."""
        return (probabilities.transpose(1, 2) @ self.candidates).flatten(1)[:, : self.in_features]


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, logits, temperature, logit_scale, regularization, step, draw, pattern, key, hard):
        ctx.save_for_backward(weight, logits, temperature, logit_scale, regularization, step, draw)
        ctx.pattern, ctx.key, ctx.hard = pattern, key, hard
        in_features = weight.shape[1]
        result = torch.empty_like(weight)
        with torch.autocast(weight.device.type, enabled=False):  # it would multiply the masks in low precision
            if hard:
                for rows in _row_slices(logits):
                    mask = _hard_mask(logits[rows], pattern, in_features)
                    torch.where(mask, weight[rows], weight.new_zeros(()), out=result[rows])
                return result
            scalars = (temperature, logit_scale, regularization, step, draw)
            sampler = _Sampler(logits, pattern, in_features, key, scalars, noise=True)
            for rows in sampler.slices:
                torch.mul(weight[rows], sampler.mask(sampler.probabilities(rows)), out=result[rows])
        return result

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return _MaskedWeight._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx, grad):
        weight, logits, *scalars = ctx.saved_tensors
        pattern, hard, in_features = ctx.pattern, ctx.hard, weight.shape[1]
        sampler = _Sampler(logits, pattern, in_features, ctx.key, scalars, noise=not hard)
        temperature, logit_scale, regularization = (scalar.to(sampler.dtype) for scalar in scalars[:3])
        slope, reward = logit_scale / temperature, 2 * regularization
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        grad_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        padding = -in_features % pattern.m

        for rows in sampler.slices:
            y = sampler.probabilities(rows)
            w, a = weight[rows].to(y.dtype), grad[rows].to(y.dtype)
            mask = _hard_mask(logits[rows], pattern, in_features) if hard else sampler.mask(y)
            if grad_weight is not None:
                grad_weight[rows] = a * mask
            if grad_logits is None:
                continue
            grad_mask = a * w  # not in place: where dtypes agree these are the caller's own tensors
            if not hard:
                grad_mask -= w.square().mul_(mask).mul_(reward)
            grouped = F.pad(grad_mask, (0, padding)).unflatten(1, (-1, pattern.m))  # [rows, groups, m]
            grad_y = sampler.candidates @ grouped.transpose(1, 2)  # [rows, C, groups]
            grad_y -= (y * grad_y).sum(1, keepdim=True)
            torch.mul(grad_y.mul_(y), slope, out=grad_logits[rows])
        return grad_weight, grad_logits, *[None] * 8


def _hard_mask(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    codes = hard_codes(logits, pattern, in_features)
    return pattern.candidates(logits.device)[codes].flatten(1)[:, :in_features]
