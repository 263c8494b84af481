# SPDX-License-Identifier: Apache-2.0
"""The masked weight of a relaxation with logits, forward and backward, in plain torch.

    M   = E[mask | logits, noise]                    the soft mask, by the sampler of the parametrisation
    W~  = W * M

    dM  = dL/dW~ * W - 2 lambda W^2 M                the regulariser -lambda ||W * M||^2 costs no graph of its own
    dlogits = (dM/dlogits)^T dM                      by the sampler

(MaskLLM, arXiv 2409.17481, section 3; the gradient is written out here.) The shape of the logits says whose they are: those
of candidates are `[out, C, groups]`, those of weights `[out, in]`. Nothing of their size is saved between forward and
backward but the logits themselves: the noise is recomputed from its key. Rows are worked through in slices that fit a CPU
cache.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from ..pattern import NMPattern
from . import gpu_masks, native_masks
from .candidate_masks import CandidateSampler
from .eager import is_plain_eager, without_autocast
from .elementwise_masks import ElementwiseSampler
from .philox import NoiseKey
from .sampler import Sampler, SamplingState
from .shared_sample import SharedSample

# Groups per slice, counted for the six values a group of candidates of 2:4. On the CPU about 0.5 MB a temporary, measured
# fastest of 8k to 256k with 2 MB of L2 a core; one slice a thread instead of one slice on all of them was slower, because
# the operations are then too short for their dispatch.
_CPU_GROUPS = 1 << 16
_GPU_GROUPS = 1 << 24


def masked_weight(
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    state: SamplingState,
    hard: bool = False,
    shared: SharedSample | None = None,
) -> torch.Tensor:
    """`W * M` with a soft, sampled mask, or with the hard one (exactly n of m) and the soft one's gradient.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype.
        logits (`torch.Tensor`): `[out, C, groups]` of candidates, or `[out, in]` of weights.
        pattern (`NMPattern`): the pattern.
        key (`NoiseKey`): identity of the noise.
        state (`SamplingState`): temperature, scale, regulariser, step, draw.
        hard (`bool`): exact mask of the largest logits in the forward value; the gradient is that of the noise-free
            soft mask (straight-through), without the regulariser.
        shared (`SharedSample`, *optional*): takes the forward value of a soft mask from there, or leaves it there, for
            calls with the same arguments; the gradient is computed as ever.

    Returns:
        `[out, in]` in the dtype of `weight`.
    """
    return _MaskedWeight.apply(weight, logits, *state.tensors(), pattern, key, hard, shared)


def hard_codes(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
    """Code of the mask of the largest logits of each group, on every device the same.

    Equal logits of candidates go to the lowest code, equal logits of weights to the lowest position.

    Args:
        logits (`torch.Tensor`): `[out, C, groups]` of candidates, or `[out, in]` of weights.

    Returns:
        int64 `[out, groups]`.
    """
    return _sampler_class(logits).hard_codes(logits, pattern, in_features)


def soft_mask(
    logits: torch.Tensor, pattern: NMPattern, in_features: int, key: NoiseKey, state: SamplingState, noise: bool = True
) -> torch.Tensor:
    """The relaxed mask alone, `[out, in]` float32 (float64 for float64 logits); for metrics and tests."""
    sampler = _sampler_class(logits)(logits, pattern, in_features, key, state, noise)
    return torch.cat([sampler.mask(sampler.distribution(rows)) for rows in _row_slices(logits, pattern, in_features)])


def mask_certainty(
    logits: torch.Tensor, pattern: NMPattern, in_features: int, key: NoiseKey, state: SamplingState
) -> tuple[float, float, int]:
    """How decided the noise-free masks are: (sum of largest probabilities, sum of entropies in bits, groups)."""
    sampler = _sampler_class(logits)(logits, pattern, in_features, key, state, noise=False)
    largest = nats = 0.0
    for rows in _row_slices(logits, pattern, in_features):
        parts = sampler.certainty(sampler.distribution(rows))
        largest, nats = largest + float(parts[0]), nats + float(parts[1])
    return largest, nats / math.log(2), logits.shape[0] * pattern.num_groups(in_features)


def _sampler_class(logits: torch.Tensor) -> type[Sampler]:
    return CandidateSampler if logits.dim() == 3 else ElementwiseSampler


def _row_slices(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> list[slice]:
    """Slices of the rows of logits."""
    rows, per_group = logits.shape[0], _sampler_class(logits).values_per_group(pattern)
    budget = _CPU_GROUPS if logits.device.type == "cpu" else _GPU_GROUPS
    step = max(1, 6 * budget // (per_group * pattern.num_groups(in_features)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _fused(weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern) -> ModuleType | None:
    """The module whose kernels do all of it at once, if there is one for these; they draw the same noise.

    Raises:
        RuntimeError: if the logits do not fit the weight: kernels would read beyond their end.
    """
    rows, in_features = weight.shape
    fits = {2: (rows, in_features), 3: (rows, pattern.num_candidates, pattern.num_groups(in_features))}
    if tuple(logits.shape) != fits.get(logits.dim()):
        raise RuntimeError(
            f"masked_weight: logits of shape {list(logits.shape)} do not fit a weight of shape {list(weight.shape)} and "
            f"{pattern}; expected {list(fits[3])} (a logit a candidate) or {list(fits[2])} (a logit a weight)"
        )
    return next((module for module in (native_masks, gpu_masks) if module.takes(weight, logits, pattern)), None)


def _hard_masked(weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    result = torch.empty_like(weight)
    for rows in _row_slices(logits, pattern, weight.shape[1]):
        mask = _sampler_class(logits).hard_mask(logits[rows], pattern, weight.shape[1])
        torch.where(mask, weight[rows], weight.new_zeros(()), out=result[rows])
    return result


def _sampled(
    weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern, key: NoiseKey, state: SamplingState
) -> torch.Tensor:
    if fused := _fused(weight, logits, pattern):
        return fused.masked_weight(weight, logits, pattern, key, state)
    result = torch.empty_like(weight)
    sampler = _sampler_class(logits)(logits, pattern, weight.shape[1], key, state, noise=True)
    for rows in _row_slices(logits, pattern, weight.shape[1]):
        torch.mul(weight[rows], sampler.mask(sampler.distribution(rows)), out=result[rows])
    return result


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, logits, temperature, logit_scale, regularization, step, draw, pattern, key, hard, shared):
        ctx.save_for_backward(weight, logits, temperature, logit_scale, regularization, step, draw)
        ctx.pattern, ctx.key, ctx.hard = pattern, key, hard
        state = SamplingState(temperature, logit_scale, regularization, step, draw)
        with without_autocast(weight):  # it would multiply the masks in low precision
            if hard:
                return _hard_masked(weight, logits, pattern)
            if shared is None:
                return _sampled(weight, logits, pattern, key, state)
            return shared.weight(lambda: _sampled(weight, logits, pattern, key, state))

    @staticmethod
    def backward(ctx, grad):
        with without_autocast(grad):
            return _MaskedWeight._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx, grad):
        weight, logits, *scalars = ctx.saved_tensors
        pattern, hard, in_features = ctx.pattern, ctx.hard, weight.shape[1]
        state = SamplingState(*scalars)
        if not hard and is_plain_eager(grad) and (fused := _fused(weight, logits, pattern)):
            wanted = ctx.needs_input_grad[:2]
            return *fused.gradients(grad, weight, logits, pattern, ctx.key, state, wanted), *[None] * 9
        sampler = _sampler_class(logits)(logits, pattern, in_features, ctx.key, state, noise=not hard)
        reward = 2 * state.regularization.to(sampler.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        grad_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None

        for rows in _row_slices(logits, pattern, in_features):
            distribution = sampler.distribution(rows)
            w, a = weight[rows].to(sampler.dtype), grad[rows].to(sampler.dtype)
            if hard:
                mask = sampler.hard_mask(logits[rows], pattern, in_features)
            else:
                mask = sampler.mask(distribution)
            if grad_weight is not None:
                grad_weight[rows] = a * mask
            if grad_logits is None:
                continue
            grad_mask = a * w  # not in place: where dtypes agree these are the caller's own tensors
            if not hard:
                grad_mask -= w.square().mul_(mask).mul_(reward)
            torch.mul(sampler.gradient(distribution, grad_mask), sampler.slope, out=grad_logits[rows])
        return grad_weight, grad_logits, *[None] * 9
