# SPDX-License-Identifier: Apache-2.0
"""The mask layers that stand in a model: around a linear layer, a convolution, and a module of fused experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import UnsupportedError
from ..pattern import NMPattern
from ..relaxations import Relaxation, get_relaxation
from .base_weight import BaseWeight
from .config import NMSparseConfig
from .layer import NMSparseLayer

BASE = "__base__"  # PEFT's name, in mixed batches, for no adapter at all


class _MaskModule(nn.Module):
    """What a mask layer does as a module: its samples outlive neither training mode nor a move of its tensors."""

    def train(self, mode: bool = True) -> _MaskModule:
        if not mode:
            self.forget_samples()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _MaskModule:
        self.forget_samples()
        return super()._apply(fn, recurse)


class _AroundOneWeight(_MaskModule, NMSparseLayer):
    """A mask layer in the place of a module that has one weight."""

    def __init__(self, base: BaseWeight, module_name: str, adapter_name: str, config: NMSparseConfig) -> None:
        super().__init__()
        self.quantization_backend = base.backend
        NMSparseLayer.__init__(self, base.module, module_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        # A new module starts in training mode; added to a model in eval mode it would sample masks there.
        self.train(base.module.training)

    def __repr__(self) -> str:
        return "nmsparse." + super().__repr__()


class NMSparseLinear(_AroundOneWeight):
    """A linear layer under masks. ("Linear" in the name: PEFT's `all-linear` finds tuner layers by class name.)"""

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        """`x` `[..., in]` -> `[..., out]`.

        Args:
            adapter_names (`list[str]`, *optional*): an adapter for each sample of the batch, "__base__" for none.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names)
        active = [name for name in self.active_adapters if name in self.configs]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None and torch.is_grad_enabled():
            # Else autograd would keep the dequantised weight of every layer until the backward pass.
            return checkpoint(self._under_masks, x, active, use_reentrant=False, preserve_rng_state=False)
        return self._under_masks(x, active)

    def _under_masks(self, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        weight = self.effective_weight(list(adapter_names))
        given = x.dtype
        if self.quantization_backend is None:
            x = self._cast_input_dtype(x, weight.dtype)
        weight, bias = weight.to(x.dtype), self.base_layer.bias
        bias = bias if bias is None else bias.to(x.dtype)
        backward = self.backward_weight(list(adapter_names))
        y = (
            F.linear(x, weight, bias)
            if backward is None
            else ops.two_way_linear(x, weight, backward.to(x.dtype), bias)
        )
        if (branch := self.side_branch(list(adapter_names))) is not None:
            y = y + branch(x)
        return y if self.quantization_backend is None else y.to(given)

    def _mixed_batch(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if self.merged:
            raise UnsupportedError(
                f"{self.module_name}: a mask is merged into the weight, so samples of one batch cannot use others; call "
                "model.unmerge_adapter() first"
            )
        if len(adapter_names) != len(x):
            raise UnsupportedError(
                f"{self.module_name}: {len(adapter_names)} adapter names for {len(x)} samples; give one a sample, and "
                "num_beams and num_return_sequences as arguments of generate"
            )
        y = None
        for name in dict.fromkeys(adapter_names):
            rows = [index for index, other in enumerate(adapter_names) if other == name]
            part = self.base_layer(x[rows]) if name == BASE else self._under_masks(x[rows], [name])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[rows] = part.to(y.dtype)
        return y


class NMSparseConv2d(_AroundOneWeight):
    """A convolution under masks, whose groups run along the input channels."""

    def update_layer(self, adapter_name: str, config: NMSparseConfig) -> None:
        convolution, m = self.get_base_layer(), NMPattern(config.pattern).m
        channels = convolution.in_channels // convolution.groups
        if channels % m:
            raise UnsupportedError(
                f"{self.module_name} has {channels} input channels in each of its {convolution.groups} groups, which is no multiple "
                f"of {m}; a group of weights would go over two places of the kernel. Leave it out with exclude_modules"
            )
        if config.has_side_branch:
            raise UnsupportedError(
                f"{self.module_name} is a convolution; slorb_block and low_rank go beside linear layers only"
            )
        super().update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        """`x` `[batch, in, height, width]`, as the convolution itself."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            raise UnsupportedError(
                f"{self.module_name}: a convolution computes a batch under one mask; run one batch for each adapter"
            )
        active = [name for name in self.active_adapters if name in self.configs]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        weight = self.base_weight.restore(self.effective_weight(active))
        x = self._cast_input_dtype(x, weight.dtype)
        if (backward := self.backward_weight(active)) is not None:
            return ops.two_way_conv2d(x, weight, self.base_weight.restore(backward), self.base_layer)
        return functional_call(self.base_layer, {"weight": weight}, (x,))


class ParamWrapper(_MaskModule, NMSparseLayer):
    """A parameter under masks that is not the weight of a linear layer: the fused weights of experts.

    One wrapper serves one parameter; wrappers of a module nest. (PEFT finds them by this class name.)
    """

    def __init__(self, base_layer: nn.Module, base: BaseWeight, module_name: str, adapter_name: str, config) -> None:
        super().__init__()
        NMSparseLayer.__init__(self, base_layer, module_name, base.parameter_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        self.train(base.module.training)

    def update_layer(self, adapter_name: str, config: NMSparseConfig) -> None:
        if get_relaxation(config.relaxation).backward_weight is not Relaxation.backward_weight:
            raise UnsupportedError(
                f"{self.module_name}: relaxation {config.relaxation!r} has another weight for the backward product, which the code of "
                "fused experts does not take; leave the experts out with target_parameters=[], or use another relaxation"
            )
        if config.has_side_branch:
            raise UnsupportedError(
                f"{self.module_name}: slorb_block and low_rank add to the output of a linear layer, and fused experts have "
                "no such output; use delta_rank, which changes the weights themselves, or leave the experts out with "
                "target_parameters=[]"
            )
        super().update_layer(adapter_name, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        """The wrapped module's forward, computed with the masked parameter."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            raise UnsupportedError(
                f"{self.module_name}: experts mix the tokens of all samples, so a batch cannot use several masks; run one "
                "batch for each adapter"
            )
        active = [name for name in self.active_adapters if name in self.configs]
        if self.merged or not active:
            return self.base_layer(*args, **kwargs)
        base = self.base_weight
        masked = base.restore(self.effective_weight(active))
        path = "base_layer." * self._depth() + self.parameter_name
        return functional_call(self.base_layer, {path: masked}, args, kwargs, tie_weights=False)

    def _depth(self) -> int:
        """How many wrappers lie between this one and the module that holds the parameter."""
        depth, module = 0, self.base_layer
        while isinstance(module, ParamWrapper):
            depth, module = depth + 1, module.base_layer
        return depth

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        """The plain module, from under all wrappers (PEFT calls this on the outermost one)."""
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module

    def __repr__(self) -> str:
        return f"nmsparse.{self.parameter_name}:" + super().__repr__()
