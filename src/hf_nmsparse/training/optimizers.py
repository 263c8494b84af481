# SPDX-License-Identifier: Apache-2.0
"""`MaskAdamW`: AdamW for logits in bfloat16, with its states in float32 or in one byte."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from ..errors import ConfigError
from ..ops import native_adamw
from ..ops.philox import NoiseKey
from ..ops.rounding import BLOCK, from_codes, random_bits, to_bfloat16, to_codes

STATES = ("float32", "8bit")

# Blocks that are updated together: on the CPU, of each thread, so that the temporaries of all fit its cache.
_CPU_BLOCKS = 256
_GPU_BLOCKS = 1 << 14


class MaskAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose updates of bfloat16 parameters are rounded stochastically.

    All arithmetic is in float32, slice by slice. States are the mean of the gradients and the root of the mean of their
    squares. The random bits are those of Philox, keyed by the seed, the place of a parameter among all parameters, its step
    and the index of the value: a run that is resumed from a checkpoint goes on bit for bit, and copies of a model that train
    in several processes stay equal.

    Args:
        params: parameters or groups of them, float32 or bfloat16, as for every optimizer of torch.
        lr (`float`): learning rate.
        betas (`tuple[float, float]`): decay of the mean, and of the mean of squares.
        eps (`float`): added to the root.
        weight_decay (`float`): decoupled; it pulls logits towards indecision.
        states (`str`): `"float32"`, 8 bytes a value, or `"8bit"`, 2 bytes and a scale for each 256 values.
        seed (`int`): of the rounding.

    Raises:
        ConfigError: if `states` is another, or a parameter has another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        states: Literal["float32", "8bit"] = "float32",
        seed: int = 0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"MaskAdamW(lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}): betas must be in [0, 1), the "
                "others at least 0"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "states": states, "seed": seed}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["states"] not in STATES:
            raise ConfigError(f"states={group['states']!r}: choose one of {', '.join(map(repr, STATES))}")
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ConfigError(
                    f"MaskAdamW trains float32 and bfloat16 parameters, got {parameter.dtype} of shape "
                    f"{list(parameter.shape)}; cast it, or train it with another optimizer"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states and options of `state_dict()`.

        Raises:
            ConfigError: if they are those of another optimizer, of other states or of other parameters; nothing is changed.
        """
        self._check_loaded(state_dict)
        # torch would cast all states to the dtype of their parameter, codes too.
        super().load_state_dict({**state_dict, "state": {}})
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, number in zip(self._parameters(), saved, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
                    for name, value in state_dict["state"][number].items()
                }

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Kernels trust the shapes of states."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "states" not in saved or "seed" not in saved:
                raise ConfigError(
                    "the saved optimizer is not a MaskAdamW; resume with the optimizer the run began with, or leave the "
                    "optimizer's file (optimizer.pt) out to begin with fresh states"
                )
            if saved["states"] != group["states"]:
                raise ConfigError(
                    f"the saved MaskAdamW has states={saved['states']!r}, this one states={group['states']!r}; resume with "
                    "the option the run began with"
                )
            for parameter, number in zip(group["params"], saved["params"], strict=False):
                if number not in state_dict["state"]:
                    continue
                wanted = {"step": None} | _state_shapes(parameter, group["states"])
                found = {name: _shape_of(value) for name, value in state_dict["state"][number].items()}
                if found != wanted:
                    raise ConfigError(
                        f"the saved states of parameter {number} do not fit one of shape {list(parameter.shape)}: expected "
                        f"{wanted}, got {found}; load the states of the same model and config"
                    )

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = ((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in enumerate(places):
            if parameter.grad is not None:
                self._update(parameter, group, number)
        return loss

    @contextlib.contextmanager
    def step_in_backward(self) -> Iterator[None]:
        """In a backward pass within the context, update each parameter as soon as its gradient is there; then free that.

        So no more than one gradient is held at a time. The updates are those of a backward pass and `step`, which finds
        nothing left to do. It is for steps of one backward pass each: not for gradient accumulation, clipping by the norm
        of all gradients, loss scaling, nor gradients in which other processes have a share.
        """

        def update(which: int, number: int, parameter: torch.nn.Parameter) -> None:
            with torch.no_grad():
                self._update(parameter, self.param_groups[which], number)
            parameter.grad = None

        places = [(which, p) for which, group in enumerate(self.param_groups) for p in group["params"]]
        with contextlib.ExitStack() as stack:
            for number, (which, parameter) in enumerate(places):
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(partial(update, which, number))
                    stack.callback(handle.remove)
            yield

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any], number: int) -> None:
        key = NoiseKey.for_layer(group["seed"], f"rounding of {number}")
        state = self.state[parameter]
        if not state:
            state.update(_fresh_state(parameter, group["states"]))
        state["step"] += 1
        if native_adamw.takes(parameter, parameter.grad, state):
            options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            native_adamw.update(parameter, parameter.grad, state, lr=float(group["lr"]), key=key, **options)
            return
        values, grad = parameter.detach().contiguous().view(-1), parameter.grad.contiguous().view(-1)
        blocks = len(state["mean"])
        together = _CPU_BLOCKS * torch.get_num_threads() if values.device.type == "cpu" else _GPU_BLOCKS
        for first in range(0, blocks, together):
            _update_slice(values, grad, state, slice(first, min(first + together, blocks)), group, key)
        if not parameter.is_contiguous():
            parameter.copy_(values.view_as(parameter))


def rounds_stochastically(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimizer, wrapped by Accelerate or not, rounds its updates of bfloat16 parameters stochastically."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return isinstance(optimizer, MaskAdamW) or getattr(optimizer, "bf16_stochastic_round", False)  # torchao's name


def _state_shapes(parameter: torch.Tensor, states: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of both states in blocks, the last one padded."""
    blocks, small = -(-parameter.numel() // BLOCK), states == "8bit"
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, code in (("mean", torch.int8), ("root", torch.uint8)):
        shapes[name] = (blocks, BLOCK), code if small else torch.float32
        if small:
            shapes[f"{name}_scale"] = (blocks,), torch.float32
    return shapes


def _shape_of(value: object) -> tuple[tuple[int, ...], torch.dtype] | None:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


def _fresh_state(parameter: torch.Tensor, states: str) -> dict[str, Any]:
    shapes = _state_shapes(parameter, states).items()
    zeros = {name: torch.zeros(shape, dtype=dtype, device=parameter.device) for name, (shape, dtype) in shapes}
    return {"step": 0, **zeros}


def _update_slice(
    values: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    blocks: slice,
    group: dict[str, Any],
    key: NoiseKey,
) -> None:
    """One step of AdamW on some blocks: `values` and `grad` are flat and whole, so are the states."""
    step, (beta_1, beta_2), lr = state["step"], group["betas"], float(group["lr"])
    at = slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, values.numel()))
    small, low = group["states"] == "8bit", values.dtype == torch.bfloat16
    new, gradient = _in_blocks(values[at]), _in_blocks(grad[at])
    if small:
        mean = from_codes(state["mean"][blocks], state["mean_scale"][blocks])
        # At least the lowest code: a root of 0 beside a mean that is not would make an enormous update.
        root = from_codes(state["root"][blocks].clamp_min(1), state["root_scale"][blocks])
    else:
        mean, root = state["mean"][blocks], state["root"][blocks]
    mean.lerp_(gradient, 1 - beta_1)
    root.square_().mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2).sqrt_()
    divisor = root.div((1 - beta_2**step) ** 0.5).add_(group["eps"])
    new.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, divisor, value=-lr / (1 - beta_1**step))
    if small or low:
        bits = random_bits(key, step, blocks.start * BLOCK, blocks.stop * BLOCK, values.device)
    if small:
        halves = bits.view(torch.uint8).view(-1, BLOCK, 2)
        to_codes(mean, halves[..., 0], state["mean"][blocks], state["mean_scale"][blocks])
        to_codes(root, halves[..., 1], state["root"][blocks], state["root_scale"][blocks])
    if low:
        count = at.stop - at.start
        to_bfloat16(new.view(-1)[:count], bits[:count], values[at])
    else:
        values[at] = new.view(-1)[: at.stop - at.start]


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """A float32 copy in blocks, the last one padded with zeros."""
    return pad(values.to(torch.float32, copy=True), (0, -len(values) % BLOCK)).view(-1, BLOCK)
