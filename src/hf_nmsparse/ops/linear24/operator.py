# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + b with W packed 2:4: one operator, whatever kernel computes it.

The operator is `torch.ops.nmsparse.linear_24`, opaque to `torch.compile`. Call `linear_24`, which also honours autocast.
"""

from __future__ import annotations

import torch

from ...codec import columns_of_24
from ..eager import autocast, is_autocast, is_plain_eager
from .call import FORWARD, INPUT_GRADIENT
from .dispatch import Kernel24, choose_for
from .weight import Weight24


def linear_24(
    x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None = None, kernel: Kernel24 | None = None
) -> torch.Tensor:
    """Linear layer with a packed 2:4 weight; differentiable in `x`, floating point `weight.values` and `bias`.

    Args:
        x (`torch.Tensor`): `[..., in]`, float16, bfloat16, float32 or float64.
        weight (`Weight24`): its dtype is that of `x` (unless autocast casts both).
        bias (`torch.Tensor`, *optional*): `[out]`.
        kernel (`Kernel24`, *optional*): what `choose_for` chose for this very call, after autocast, to save asking again.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        RuntimeError: if dtypes or shapes do not fit, as `torch.nn.functional.linear` does.
    """
    if is_autocast(x):
        x, bias, *tensors = (None if tensor is None else autocast(tensor) for tensor in (x, bias, *weight.tensors))
        weight = Weight24(*tensors)
    if not _needs_gradient(x, weight.values, bias) and is_plain_eager(
        x, bias, *(() if weight.memo else weight.tensors)
    ):  # a memo is of plain ones
        # Nothing for the dispatcher of torch to do, and going through it costs more than a small layer.
        _check_operands(x, weight, bias)
        return _run(x, weight, bias, FORWARD, kernel)
    return _linear_24(x, weight.values, weight.ids, bias, weight.scale, weight.input_scale)


def _needs_gradient(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )


@torch.library.custom_op(
    "nmsparse::linear_24",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor ids, Tensor? bias=None, Tensor? scale=None, Tensor? input_scale=None) -> Tensor",
)
def _linear_24(x, values, ids, bias=None, scale=None, input_scale=None):
    weight = Weight24(values, ids, scale, input_scale)
    _check_operands(x, weight, bias)
    return _run(x, weight, bias, FORWARD)


@_linear_24.register_fake
def _(x, values, ids, bias=None, scale=None, input_scale=None):
    _check_operands(x, Weight24(values, ids, scale, input_scale), bias)
    return x.new_empty(*x.shape[:-1], ids.shape[0])


def _run(
    x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None, product: str, kernel: Kernel24 | None = None
) -> torch.Tensor:
    """`x` `[..., n]` -> `[..., m]`, by the kernel chosen for the call."""
    kernel = kernel or choose_for(x, weight, product)
    return kernel.run(x if x.is_contiguous() else x.contiguous(), weight, bias)


def _check_operands(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> None:
    """RuntimeError, not one of our own: callers that catch what `nn.Linear` raises must catch this too."""
    memo = weight.memo
    if memo is None:
        weight.check()
    known = memo or weight
    dtype, in_features = known.dtype, known.in_features
    if x.dtype != dtype or (bias is not None and bias.dtype != dtype):
        given = "" if bias is None else f", bias {bias.dtype}"
        raise RuntimeError(
            f"linear_24: x, weight and bias must have the same dtype, got x {x.dtype}, weight {dtype}{given}; "
            "cast the input or the module, or use autocast"
        )
    if x.dim() == 0 or x.shape[-1] != in_features or in_features == 0:
        raise RuntimeError(
            f"linear_24: x of shape {list(x.shape)} does not fit a weight of shape [{weight.out_features}, {in_features}]; "
            f"its last dimension must be in_features={in_features}"
        )
    if x.device != known.device:
        raise RuntimeError(f"linear_24: x is on {x.device}, the weight on {known.device}; move one of them")
    if bias is not None and bias.shape != (known.out_features,):
        raise RuntimeError(f"linear_24: bias of shape {list(bias.shape)}, expected [{weight.out_features}]")


def _setup_context(ctx, inputs, output) -> None:
    x, values, ids, _, scale, input_scale = (*inputs, None, None, None)[:6]
    # x is kept only for the gradient of the values: on a frozen weight it would be dead memory, one copy a layer.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, ids, scale, input_scale)


def _backward(ctx, grad):
    """dX = dY W;  dValues = (dY^T X) gathered at the kept columns;  dBias = sum of dY over the tokens."""
    x, *tensors = ctx.saved_tensors
    weight = Weight24(*tensors)
    grad_x = grad_values = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
    if ctx.needs_input_grad[0]:
        grad_x = _input_gradient(grad, weight)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
        grad_values = grad_weight.gather(1, columns_of_24(weight.ids))
    if any(ctx.needs_input_grad[3:4]):  # torch leaves out an argument that equals its default
        grad_bias = rows.sum(0)
    return grad_x, grad_values, None, grad_bias, None, None


def _input_gradient(grad: torch.Tensor, weight: Weight24) -> torch.Tensor:
    if type(grad) is not torch.Tensor or _needs_gradient(grad, weight.values, None):
        return grad @ weight.dense().to(grad.dtype)  # what tracing and second derivatives can follow
    return _run(grad, weight, None, INPUT_GRADIENT)


_linear_24.register_autograd(_backward, setup_context=_setup_context)
