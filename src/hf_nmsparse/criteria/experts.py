# SPDX-License-Identifier: Apache-2.0
"""Inputs of fused experts: their weights are slices of one parameter, so no module sees what one of them multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .blocks import replaced_forward


class _Products(TorchFunctionMode):
    """Reports `x` of each product `x W` or `x W^T` whose `W` starts where a known weight does in memory."""

    def __init__(self, names: Mapping[tuple[int, int], str], see: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self.names = names
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # F.linear(x, W), x @ W, addmm(bias, x, W): everywhere x stands right before W.
        for x, weight in pairwise((*args, *kwargs.values())):
            if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and weight.dim() == 2:
                name = self.names.get((weight.data_ptr(), weight.numel()))
                if name is not None:
                    self.see(name, x)
        return function(*args, **kwargs)


class ExpertsObserver:
    """Watches one experts module of Transformers, called as `module(hidden_states, expert_indices, expert_weights)`.

    The module must compute its experts one by one (`set_experts_implementation("eager")`).

    Args:
        module (`nn.Module`): holds the weights of all experts.
        weights (`Mapping[str, torch.Tensor]`): name -> `[out, in]`, a view of one expert of a parameter of the module.
        see (`Callable[[str, torch.Tensor], None]`): called with the name and its inputs, `[tokens, in]`, no padding.
        real_tokens (`Callable[[torch.Tensor], torch.Tensor | None]`): bool mask of the tokens of a tensor that are no
            padding.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, torch.Tensor],
        see: Callable[[str, torch.Tensor], None],
        real_tokens: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self.module = module
        self.names = {(weight.data_ptr(), weight.numel()): name for name, weight in weights.items()}
        self.see = see
        self.real_tokens = real_tokens
        self.route_to: Sequence[int] = ()  # if there are any, every token goes to all of these, and to no other

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the context is open, `see` is called. The outputs for padding are zero then."""
        original = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, experts, weights = (*args, *kwargs.values())
            real = self.real_tokens(hidden)
            if real is None or real.numel() != len(hidden):
                real = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            real = real.flatten()
            hidden, experts, weights = hidden[real], experts[real], weights[real]
            if self.route_to:
                experts = torch.tensor(self.route_to, device=experts.device).expand(len(hidden), -1)
                weights = weights.new_zeros(experts.shape)
            with _Products(self.names, self.see):
                computed = original(hidden, experts, weights)
            output = computed.new_zeros(len(real), computed.shape[-1])
            output[real] = computed
            return output

        with replaced_forward(self.module, forward):
            yield
