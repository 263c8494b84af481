# SPDX-License-Identifier: Apache-2.0
"""`SparseLinear24`, a linear layer that holds its 2:4 weight packed, with or without a side branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import ConfigError, PatternError
from ..ops import SideBranch
from .branch import branch_tensors, check_branch, num_blocks, rank_of, slorb_block_of
from .layers import dense_weight, is_conv1d
from .weights import PATTERN, check_input_scale, check_value_kind, num_scales, pack_masked, weight_tensors

MEMORY_MODES = ("fast", "low")
_WEIGHT_LEAVES = ("weight", "weight_idx", "weight_scale", "weight_input_scale")  # as `Weight24` takes them
_FIRST_TWO_OF_EACH_GROUP = 0b01_00_01_00


class SparseLinear24(nn.Linear):
    """`nn.Linear` with a packed 2:4 weight, 0.5625 of the bytes of a dense bfloat16 one.

    A subclass of `nn.Linear`, so that PEFT and Transformers treat it as one; but `weight` is `[out, in/2]`.
    All tensors are parameters, because offloading and sharding tools look after parameters only.

    It computes `y = x W^T + b + branch(x)`, W the 2:4 weight and branch the optional side branch (SLoRB, low rank).

    Which kernel computes a call is chosen by device, dtype, shape and tokens (docs/KERNELS.md); `hf_nmsparse.explain` says
    which. All read the packed tensors as they are. With `memory="low"` nothing else is held. With `memory="fast"` the dense
    product of torch is a candidate too: the first time it is the faster one, the weight is unpacked and kept beside the
    packed one. The copy is no part of the state dict, of copies or of pickles, and is made anew when the packed tensors are
    replaced or changed in place. Only a write through `.data` cannot be seen; set `memory` again after one. It is not used
    while `weight` needs a gradient or under `torch.compile`, and is made from the second call on the same tensors, so that
    layers whose tensors are brought in for each call (offloading) do not pile up dense copies.

    Args:
        in_features (`int`): a multiple of 8.
        out_features (`int`): rows of the weight.
        bias (`bool`, defaults to `True`): whether there is a bias `[out]`.
        device, dtype: as for `nn.Linear`.
        memory (`str`, *optional*): "fast" or "low", see above; `None`: "fast" on the CPU, "low" elsewhere.
        slorb_block (`int`, *optional*): k, inputs per block of a SLoRB term beside the weight.
        low_rank (`int`, *optional*): r, rank of a low-rank term beside the weight.
        values (`str`, defaults to `"dense"`): how kept weights are held: "dense", "int8" or "int4".
        input_scale (`bool`, defaults to `False`): whether quantised values come with a factor of each input.
        conv1d (`bool`, defaults to `False`): whether its dense form is a `Conv1D` of Transformers.

    Attributes:
        weight: kept values, `[out, in/2]`, dtype of the layer; int8 `[out, in/2]`, or two of 4 bits a byte, uint8
            `[out, in/4]`, without gradients.
        weight_idx: uint8 `[out, in/8]`, four 2-bit column ids a byte, low bits first, ascending in a group; no gradient.
            (`module.requires_grad_(True)` on a whole model fails on it: loop over the floating point parameters.)
        weight_scale: of quantised values, `[out, ceil(in/128)]`, dtype of the layer; no gradient. Else `None`.
        weight_input_scale: a factor of each input, `[in]`, or `None`; no gradient.
        weight_slorb: `[out, ceil(in/k)]` or `None`.
        weight_low_rank_a, weight_low_rank_b: `[r, in]` and `[out, r]`, or `None`.
        bias: `[out]` or `None`.

    Raises:
        PatternError: if in_features is no multiple of 8.
        ConfigError: for another kind of `values` or `memory`, or an input scale of values that are not quantised.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: str | None = None,
        *,
        slorb_block: int | None = None,
        low_rank: int | None = None,
        values: str = "dense",
        input_scale: bool = False,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        check_value_kind(values)
        if input_scale and values == "dense":
            raise ConfigError("input_scale=True serves quantised values; pass values='int8' or 'int4'")
        if in_features % 8:
            raise PatternError(f"in_features={in_features} is no multiple of 8; such a layer cannot be packed")

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def frozen(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.in_features, self.out_features = in_features, out_features
        self.slorb_block, self.low_rank, self.conv1d, self.values = slorb_block, low_rank, conv1d, values
        if values == "dense":
            self.weight = empty(out_features, in_features // 2)
        elif values == "int8":
            self.weight = frozen(out_features, in_features // 2, dtype=torch.int8)
        else:
            self.weight = frozen(out_features, in_features // 4, dtype=torch.uint8)
        self.weight_idx = frozen(out_features, in_features // 8, dtype=torch.uint8)
        scale = None if values == "dense" else frozen(out_features, num_scales(in_features))
        self.register_parameter("weight_scale", scale)
        self.register_parameter("weight_input_scale", frozen(in_features) if input_scale else None)
        blocks = None if slorb_block is None else num_blocks(in_features, slorb_block)
        self.register_parameter("weight_slorb", None if blocks is None else empty(out_features, blocks))
        self.register_parameter("weight_low_rank_a", None if low_rank is None else empty(low_rank, in_features))
        self.register_parameter("weight_low_rank_b", None if low_rank is None else empty(out_features, low_rank))
        self.register_parameter("bias", empty(out_features) if bias else None)
        self.memory = memory
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` on the kept values; the first two of each group are kept, and the side branch adds nothing."""
        with torch.no_grad():
            self.weight_idx.fill_(_FIRST_TWO_OF_EACH_GROUP)
            for leaf in ("weight_slorb", "weight_low_rank_b"):
                if getattr(self, leaf) is not None:
                    getattr(self, leaf).zero_()
        if self.weight_low_rank_a is not None:
            nn.init.kaiming_uniform_(self.weight_low_rank_a, a=5**0.5)  # as the weight; zero too, it would never train
        bound = (self.in_features // 2) ** -0.5
        if self.values == "dense":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            self._reset_quantised(bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def _reset_quantised(self, bound: float) -> None:
        kept = self.weight_scale.new_empty(self.out_features, self.in_features // 2).uniform_(-bound, bound)
        values, scale = ops.quantize_values(kept, self.values)
        self.weight.copy_(values)
        self.weight_scale.copy_(scale)
        if self.weight_input_scale is not None:
            self.weight_input_scale.fill_(1)

    # --- conversion -------------------------------------------------------------------------------------------------
    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        mask: torch.Tensor,
        memory: str | None = None,
        branch: SideBranch | None = None,
        *,
        values: str = "dense",
        input_scale: torch.Tensor | None = None,
    ) -> SparseLinear24:
        """Pack the weight of `linear` where `mask` keeps it; dtype, device, bias and flags stay.

        Args:
            linear (`nn.Linear` or `Conv1D`): weight `[out, in]`, or `[in, out]` in a `Conv1D`.
            mask (`torch.Tensor`): `[out, in]`, non-zero = kept, at most 2 of each 4. Groups that keep fewer are
                completed lowest index first, with zeros.
            memory (`str`, *optional*): see the class.
            branch (`SideBranch`, *optional*): beside the weight; it gets the dtype, device and flags of the weight.
            values (`str`, defaults to `"dense"`): "int8" or "int4" round kept weights to the nearest, and freeze them.
            input_scale (`torch.Tensor`, *optional*): `[in]`, a factor of each input, by which weights are divided before
                they are rounded.

        Raises:
            PatternError: if in_features is no multiple of 8, a group keeps more than two, or the branch or the input scale
                does not fit.
        """
        weight = dense_weight(linear).detach()
        keep = mask.to(weight.device) != 0
        if keep.shape != weight.shape:
            raise PatternError(f"mask of shape {list(keep.shape)} for a weight of shape {list(weight.shape)}")
        if branch is not None:
            check_branch(type(linear).__name__, branch, *weight.shape)
        if input_scale is not None:
            check_input_scale(type(linear).__name__, input_scale, weight.shape, values)
        packed = cls.empty_like(
            linear,
            memory,
            "meta",
            slorb_block_of(branch),
            rank_of(branch),
            values=values,
            input_scale=input_scale is not None,
        )
        tensors = weight_tensors(pack_masked(weight, keep, values, input_scale))
        tensors |= {leaf: tensor.detach().to(weight, copy=True) for leaf, tensor in branch_tensors(branch).items()}
        for leaf, tensor in tensors.items():
            trains = linear.weight.requires_grad and getattr(packed, leaf).requires_grad
            setattr(packed, leaf, nn.Parameter(tensor.contiguous(), requires_grad=trains))
        packed.bias = linear.bias
        return packed.train(linear.training)

    @classmethod
    def empty_like(
        cls,
        linear: nn.Linear | Conv1D,
        memory: str | None = None,
        device: torch.device | str | None = None,
        slorb_block: int | None = None,
        low_rank: int | None = None,
        *,
        values: str = "dense",
        input_scale: bool = False,
    ) -> SparseLinear24:
        """A fresh packed layer of the sizes and dtype of `linear`."""
        out_features, in_features = dense_weight(linear).shape
        return cls(
            in_features,
            out_features,
            linear.bias is not None,
            device=device,
            dtype=linear.weight.dtype,
            memory=memory,
            slorb_block=slorb_block,
            low_rank=low_rank,
            values=values,
            input_scale=input_scale,
            conv1d=is_conv1d(linear),
        )

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        """The plain layer it was, in `dtype` (default: as it is): zeros in place, or dense with a side branch."""
        weight = self.dequantize()
        weight = weight.to(dtype or weight.dtype)
        with torch.device("meta"):
            if self.conv1d:
                linear, weight = Conv1D(self.out_features, self.in_features), weight.t().contiguous()
            else:
                linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        if self.bias is not None and dtype not in (None, self.bias.dtype):
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def dequantize(self) -> torch.Tensor:
        """The dense weight `[out, in]` that the layer computes with, side branch and all; differentiable."""
        branch = self.branch
        return self.sparse_weight() if branch is None else branch.added_to(self.sparse_weight())

    def sparse_weight(self) -> torch.Tensor:
        """The 2:4 part of the weight, `[out, in]`, pruned positions +0; differentiable in `weight`."""
        return self.weight24.dense()

    @property
    def weight24(self) -> ops.Weight24:
        """The tensors of the 2:4 weight, as the kernels take them."""
        tensors = self._parameters
        try:
            weight = ops.Weight24(*[tensors[leaf] for leaf in _WEIGHT_LEAVES])
        except KeyError:  # parametrized, or a replica: torch keeps them elsewhere
            return ops.Weight24(*[getattr(self, leaf, None) for leaf in _WEIGHT_LEAVES])
        if torch.compiler.is_compiling():
            return weight
        if self._memo is None or not self._memo.is_of(weight):
            # Only of plain parameters: wrapped ones have no address, and others come and go with each call.
            plain = all(tensor is None or type(tensor) is nn.Parameter for tensor in weight.tensors)
            self._memo = ops.Memo24(weight) if plain else None
        weight.memo = self._memo
        return weight

    @property
    def branch(self) -> SideBranch | None:
        """The side branch, if there is one."""
        if self.slorb_block is None and self.low_rank is None:  # not the tensors: each call asks, and they cost more
            return None
        return SideBranch(self.weight_slorb, self.slorb_block, self.weight_low_rank_a, self.weight_low_rank_b)

    # --- forward ----------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._sparse_forward(x)
        branch = self.branch
        return y if branch is None else y + branch(x)

    def _sparse_forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, kernel = self.weight24, None
        memo = weight.memo
        if memo is not None and (self._memory or _default_memory(memo.device_type)) == "fast":
            if torch.is_grad_enabled() and weight.values.requires_grad:
                self._kept = None  # some optimizers write through `.data`, which no version counter sees
            # With a gradient to x the backward pass would unpack the weight.
            trains = torch.is_grad_enabled() and x.requires_grad
            x = ops.autocast(x)
            kernel = None if trains else ops.choose_for(x, weight, dense_at_hand=True)
            if kernel is None:
                dense = self._dense_for(weight, also_once=not trains)
                if dense is not None:
                    return F.linear(x, dense, self.bias)
        return ops.linear_24(x, weight, self.bias, kernel)

    @property
    def memory(self) -> str:
        """The mode in force: what was set, else "fast" on the CPU and "low" elsewhere."""
        return self._memory or _default_memory(self.weight_idx.device.type)

    @memory.setter
    def memory(self, mode: str | None) -> None:
        if mode is not None and mode not in MEMORY_MODES:
            raise ConfigError(
                f"memory={mode!r}; use one of {', '.join(map(repr, MEMORY_MODES))}, or None for the default"
            )
        self._memory = mode
        self._kept: _KeptDense | None = None
        self._memo: ops.Memo24 | None = None

    def _may_keep_dense(self, weight: ops.Weight24) -> bool:
        """Whether a call may use a kept dense weight: not where the weight is being trained."""
        if self.memory != "fast" or weight.memo is None:
            return False
        if weight.values.requires_grad and torch.is_grad_enabled():
            return False
        # Inference tensors have no state that tells a later change.
        return not any(tensor is not None and tensor.is_inference() for tensor in weight.tensors)

    def _dense_for(self, weight: ops.Weight24, also_once: bool) -> torch.Tensor | None:
        """The 2:4 weight, unpacked and kept from the second call on these tensors on; `None` where none may be kept.

        Args:
            weight (`Weight24`): the tensors.
            also_once (`bool`): unpack at the first call too, for this call alone, so that all calls give the same numbers.
        """
        kept = self._kept
        if kept is not None and kept.dense is not None and kept.is_of(weight):
            return kept.dense
        if not self._may_keep_dense(weight):
            return None
        if kept is None or not kept.is_of(weight):
            self._kept = _KeptDense(weight)
            return ops.unpack_weight(weight) if also_once else None
        # Made in inference mode it could not take part in training of what lies before or beside this layer.
        with torch.inference_mode(False):
            kept.dense = ops.unpack_weight(weight)
        return kept.dense

    def _apply(self, fn, recurse=True):
        self._kept = self._memo = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None, "_memo": None}

    def _replicate_for_data_parallel(self) -> SparseLinear24:
        replica = super()._replicate_for_data_parallel()
        replica._kept = replica._memo = None
        return replica

    def extra_repr(self) -> str:
        extra = f"{super().extra_repr()}, sparsity={PATTERN}, memory={self.memory}"
        facts = {"slorb_block": self.slorb_block, "low_rank": self.low_rank, "conv1d": self.conv1d or None}
        facts["values"] = None if self.values == "dense" else self.values
        return ", ".join([extra, *(f"{name}={value}" for name, value in facts.items() if value is not None)])


def _default_memory(device_type: str) -> str:
    return "fast" if device_type == "cpu" else "low"


class _KeptDense:
    """A dense weight, and the state of the packed tensors that it was unpacked from."""

    def __init__(self, weight: ops.Weight24) -> None:
        self._memo, self._versions = weight.memo, self._versions_of(weight)
        self.dense: torch.Tensor | None = None

    @staticmethod
    def _versions_of(weight: ops.Weight24) -> tuple[int, ...]:
        return tuple(0 if tensor is None else tensor._version for tensor in weight.tensors)

    def is_of(self, weight: ops.Weight24) -> bool:
        return self._memo is weight.memo and self._versions == self._versions_of(weight)
