# SPDX-License-Identifier: Apache-2.0
"""What methods compute that train the weight itself: straight-through gradients, PDP's soft mask, two-way products, masks of
4x4 blocks that are n:m both ways."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import UnsupportedError
from ..pattern import NMPattern
from .eager import autocast
from .packing import top_n_mask

_BLOCK = 4
_SLICE = 1 << 17  # blocks at a time: 47 MB of sums for 2:4


# --- straight through ---------------------------------------------------------------------------------------------------
def straight_through(weight: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`W * M` in `dtype`; its gradient goes to all of W, pruned weights too (Bengio et al., arXiv 1308.3432).

    Args:
        weight (`torch.Tensor`): `[out, in]`.
        mask (`torch.Tensor`): bool, of the same shape.
        dtype (`torch.dtype`): of the result.
    """
    with torch.no_grad():
        value = torch.where(mask, weight, weight.new_zeros(())).to(dtype)
    return take_through(weight, value)


def take_through(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, which was computed from W without a gradient; its gradient goes to W as it is.

    Args:
        weight (`torch.Tensor`): W.
        value (`torch.Tensor`): of the same shape, in any dtype; it must not be written to.
    """
    return _TakeThrough.apply(weight, value)


class _TakeThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.to(ctx.dtype), None


def straight_through_scores(weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`W * M` of a frozen weight; the gradient of the scores that M was taken from is that of M: `dL/dW~ * W`.

    Args:
        weight (`torch.Tensor`): `[out, in]`.
        scores (`torch.Tensor`): `[out, in]`, trainable.
        mask (`torch.Tensor`): bool, of the same shape.
    """
    return _StraightThroughScores.apply(weight, scores, mask)


class _StraightThroughScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.dtype = scores.dtype
        return torch.where(mask, weight, weight.new_zeros(()))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weight, mask = ctx.saved_tensors
        grad_weight = torch.where(mask, grad, grad.new_zeros(())) if ctx.needs_input_grad[0] else None
        grad_scores = grad.to(ctx.dtype) * weight.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_weight, grad_scores, None


# --- PDP ----------------------------------------------------------------------------------------------------------------
def pdp_thresholds(weight: torch.Tensor, mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """t of each group: the middle between its smallest kept and its largest pruned magnitude, `[out, groups]`.

    (PDP, arXiv 2305.11203, for n:m.) A group of which nothing is pruned has 0.

    Args:
        weight (`torch.Tensor`): `[out, in]`.
        mask (`torch.Tensor`): its n:m mask by magnitude, bool.
        pattern (`NMPattern`): n:m.
    """
    magnitudes, padding = weight.detach().abs(), -weight.shape[1] % pattern.m
    kept = F.pad(magnitudes.masked_fill(~mask, float("inf")), (0, padding), value=float("inf"))
    pruned = F.pad(magnitudes.masked_fill(mask, -1.0), (0, padding), value=-1.0)
    smallest = kept.unflatten(1, (-1, pattern.m)).amin(2)
    largest = pruned.unflatten(1, (-1, pattern.m)).amax(2)
    return torch.where(largest < 0, 0.0, (smallest + largest) / 2)


def pdp_weight(
    weight: torch.Tensor, thresholds: torch.Tensor, group: int, temperature: torch.Tensor | float, dtype: torch.dtype
) -> torch.Tensor:
    """`m(w) w` with `m(w) = sigmoid((w^2 - t^2) / tau)`, in `dtype`.

    The gradient is `m (1 + (1 - m) 2 w^2 / tau)`, t held fixed: around the threshold it is larger than 1, so weights that are
    about to be pruned move most.

    Args:
        weight (`torch.Tensor`): `[out, in]`.
        thresholds (`torch.Tensor`): t, of each group, `[out, groups]`; or one, `[1, 1]`; or of each row, `[out, 1]`.
        group (`int`): weights that share a threshold.
        temperature (`torch.Tensor` or `float`): tau, on the scale of w^2.
    """
    return _PDPWeight.apply(weight, thresholds, group, temperature, dtype)


def pdp_mask(
    weight: torch.Tensor, thresholds: torch.Tensor, group: int, temperature: torch.Tensor | float
) -> torch.Tensor:
    """m(w) alone, `[out, in]`."""
    t = thresholds.repeat_interleave(group, 1)[:, : weight.shape[1]] if thresholds.shape[1] > 1 else thresholds
    return torch.sigmoid((weight.square() - t.square()) / temperature)


class _PDPWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, thresholds: torch.Tensor, group: int, temperature, dtype) -> torch.Tensor:
        ctx.save_for_backward(weight, thresholds)  # the mask is computed again: it has the size of the weight
        ctx.group, ctx.temperature = group, temperature
        return (pdp_mask(weight, thresholds, group, temperature) * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weight, thresholds = ctx.saved_tensors
        mask = pdp_mask(weight, thresholds, ctx.group, ctx.temperature)
        slope = mask * (1 + (1 - mask) * 2 * weight.square() / ctx.temperature)
        return grad.to(weight.dtype) * slope, None, None, None, None


# --- two-way products -----------------------------------------------------------------------------------------------------
def two_way_linear(
    x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x W_F^T + b`, whose input gradient is `dy W_B` of another weight, and whose weight gradient is `dy^T x`, dense.

    (BDWP, arXiv 2309.13015.)

    Args:
        x (`torch.Tensor`): `[..., in]`.
        weight (`torch.Tensor`): W_F, `[out, in]`; it gets the gradient.
        backward_weight (`torch.Tensor`): W_B, `[out, in]`.
        bias (`torch.Tensor`, *optional*): `[out]`.
    """
    x, weight, backward_weight, bias = _as_autocast(x, weight, backward_weight, bias)
    return _TwoWayLinear.apply(x, weight, backward_weight, bias)


def _as_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The operands as autocast would have them: it does not reach into the backward pass of a Function."""
    return [tensor if tensor is None else autocast(tensor) for tensor in tensors]


class _TwoWayLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, bias: torch.Tensor | None):
        ctx.save_for_backward(x, backward_weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, backward_weight = ctx.saved_tensors
        rows = grad.flatten(0, -2) if grad.dim() != 2 else grad
        to_x = grad @ backward_weight if ctx.needs_input_grad[0] else None
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        to_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return to_x, to_weight, None, to_bias


def two_way_conv2d(
    x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, layer: torch.nn.Conv2d
) -> torch.Tensor:
    """As `two_way_linear`, for a convolution with the bias, stride, padding, dilation and groups of a layer.

    Args:
        x (`torch.Tensor`): `[batch, in, height, width]`.
        weight (`torch.Tensor`), backward_weight (`torch.Tensor`): W_F and W_B, in the shape of the layer's weight.
        layer (`torch.nn.Conv2d`): the layer.
    """
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, _padded_sides(layer), mode), (0, 0)
    tensors = _as_autocast(x, weight, backward_weight, layer.bias)
    return _TwoWayConv2d.apply(*tensors, layer.stride, padding, layer.dilation, layer.groups)


def _padded_sides(layer: torch.nn.Conv2d) -> list[int]:
    """What `F.pad` adds: left, right, top, bottom. "same" adds the odd one at the end."""
    sides: list[int] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
    return sides


class _TwoWayConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, backward_weight, bias, *geometry):
        ctx.save_for_backward(x, backward_weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, backward_weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        # The gradient of the weight depends on the shape of the weight alone.
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            grad, x, backward_weight, [len(backward_weight)], stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return to_x, to_weight, None, to_bias, None, None, None, None


# --- transposable masks ---------------------------------------------------------------------------------------------------
def transposable_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The mask that keeps exactly n of m along rows and at most n of m along columns, with the largest sum of scores.

    Solved exactly for m = 4, by trying all masks of a 4x4 block (90 for 2:4; Hubara et al., arXiv 2102.08124, solve it as a
    flow). Where the rows end within a block the columns there keep fewer. Equal sums: the first mask in the order of its rows'
    codes.

    Args:
        scores (`torch.Tensor`): `[out, in]`, at least 0.
        pattern (`NMPattern`): with m = 4.

    Returns:
        bool `[out, in]`.

    Raises:
        UnsupportedError: for other m, or if `in` is no multiple of 4.
    """
    rows, columns = scores.shape
    if pattern.m != _BLOCK or columns % _BLOCK:
        raise UnsupportedError(
            f"transposable masks are solved for n:4 and inputs that are a multiple of 4, got {pattern} and {columns} inputs"
        )
    masks = block_masks(pattern.n).to(scores.device)  # [count, 4, 4]
    padded = F.pad(scores.detach().float(), (0, 0, 0, -rows % _BLOCK))
    blocks = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK)).transpose(1, 2)  # [R, C, 4, 4]
    table = masks.flatten(1).float().t()
    # In slices: a sum for each mask of each block of the whole would be huge.
    slices = blocks.split(max(1, _SLICE // blocks.shape[1]))
    chosen = masks[torch.cat([(part.flatten(2) @ table).argmax(2) for part in slices])]
    return chosen.transpose(1, 2).reshape(padded.shape)[:rows]


@lru_cache(maxsize=4)
def block_masks(n: int) -> torch.Tensor:
    """All masks of a 4x4 block with n in each row and column, bool `[count, 4, 4]`: 24, 90, 24 for n = 1, 2, 3."""
    rows = NMPattern(n, _BLOCK).candidates()
    found = [torch.stack(choice) for choice in itertools.product(rows, repeat=_BLOCK)]
    return torch.stack([block for block in found if bool((block.sum(0) == n).all())]).bool()


def column_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The n:m mask along the output dimension: the n highest scores of each m rows, bool `[out, in]`."""
    return top_n_mask(scores.t().contiguous(), pattern).t()
