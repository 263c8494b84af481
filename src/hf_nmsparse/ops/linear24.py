# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b with W packed as 2:4 values and column ids: one operator, any number of backends behind it.

The operator is `torch.ops.nmsparse.linear_24`, opaque to `torch.compile`. Call `linear_24`, which also honours autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..codec import columns_of_24, unpack_24


@dataclass(frozen=True)
class Linear24Backend:
    """One way to compute the 2:4 linear forward.

    Args:
        name (`str`): what `explain` reports.
        accepts (`Callable`): `(values, tokens) -> bool`, whether it can, and should, take such a call.
        run (`Callable`): `(x, values, ids, bias) -> y`, on checked operands.
    """

    name: str
    accepts: Callable[[torch.Tensor, int], bool]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _run_reference(
    x: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, unpack_24(values, ids), bias)


REFERENCE = Linear24Backend("reference", accepts=lambda values, tokens: True, run=_run_reference)
_backends: list[Linear24Backend] = [REFERENCE]


def register_linear_24_backend(backend: Linear24Backend) -> None:
    """Put a backend before those registered so far; the first that accepts a call takes it."""
    _backends.insert(0, backend)


def linear_24_backend(values: torch.Tensor, tokens: int) -> Linear24Backend:
    """The backend that takes a call with `tokens` rows of input on packed `values` (`[out, in/2]`)."""
    return next(backend for backend in _backends if backend.accepts(values, tokens))


def linear_24(
    x: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer with a packed 2:4 weight; differentiable in `x`, `values` and `bias`.

    Args:
        x (`torch.Tensor`): `[..., in]`, float16, bfloat16, float32 or float64.
        values (`torch.Tensor`): kept weights `[out, in/2]`, dtype of `x` (unless autocast casts both).
        ids (`torch.Tensor`): uint8 `[out, in/8]`, four 2-bit column ids a byte, low bits first, ascending in a group.
        bias (`torch.Tensor`, *optional*): `[out]`.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        RuntimeError: if dtypes or shapes do not fit, as `torch.nn.functional.linear` does.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = _autocast(x, dtype), _autocast(values, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    return _linear_24(x, values, ids, bias)


def _autocast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast does to an operand of a linear layer: float64 is left alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


@torch.library.custom_op(
    "nmsparse::linear_24", mutates_args=(), schema="(Tensor x, Tensor values, Tensor ids, Tensor? bias=None) -> Tensor"
)
def _linear_24(x, values, ids, bias=None):
    _check_operands(x, values, ids, bias)
    tokens = x.numel() // x.shape[-1]
    return linear_24_backend(values, tokens).run(x, values, ids, bias).contiguous()


@_linear_24.register_fake
def _(x, values, ids, bias=None):
    _check_operands(x, values, ids, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _check_operands(x: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> None:
    """RuntimeError, not one of our own: callers that catch what `nn.Linear` raises must catch this too."""
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        given = "" if bias is None else f", bias {bias.dtype}"
        raise RuntimeError(
            f"linear_24: x, values and bias must have the same dtype, got x {x.dtype}, values {values.dtype}{given}; "
            "cast the input or the module, or use autocast"
        )
    if values.dim() != 2 or ids.dim() != 2 or ids.dtype != torch.uint8 or values.shape[1] != 4 * ids.shape[1]:
        raise RuntimeError(
            f"linear_24: need values [out, in/2] and uint8 ids [out, in/8], got values {list(values.shape)} and "
            f"{ids.dtype} ids {list(ids.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != 2 * values.shape[1] or x.shape[-1] == 0:
        raise RuntimeError(
            f"linear_24: x of shape {list(x.shape)} does not fit a weight of shape "
            f"[{values.shape[0]}, {2 * values.shape[1]}]; its last dimension must be in_features={2 * values.shape[1]}"
        )


def _setup_context(ctx, inputs, output) -> None:
    x, values, ids = inputs[:3]
    # x is kept only for the gradient of the values: on a frozen weight it would be dead memory, one copy a layer.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, ids)


def _backward(ctx, grad):
    """dX = dY W;  dValues = (dY^T X) gathered at the kept columns;  dBias = sum of dY over the tokens."""
    x, values, ids = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
    if ctx.needs_input_grad[0]:
        grad_x = grad @ unpack_24(values, ids)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
        grad_values = grad_weight.gather(1, columns_of_24(ids))
    if any(ctx.needs_input_grad[3:]):  # torch leaves out an argument that equals its default
        grad_bias = rows.sum(0)
    return grad_x, grad_values, None, grad_bias


_linear_24.register_autograd(_backward, setup_context=_setup_context)
