# SPDX-License-Identifier: Apache-2.0
"""`SparseLinear24`, a linear layer that holds its 2:4 weight packed, and `explain`, which says how a layer computes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import ConfigError, PatternError, UnsupportedError
from ..pattern import NMPattern

PATTERN = NMPattern(2, 4)
MEMORY_MODES = ("fast", "low")
_FIRST_TWO_OF_EACH_GROUP = 0b01_00_01_00


class SparseLinear24(nn.Linear):
    """`nn.Linear` with a packed 2:4 weight, 0.5625 of the bytes of a dense bfloat16 one.

    A subclass of `nn.Linear`, so that PEFT and Transformers treat it as one; but `weight` is `[out, in/2]`.
    Both packed tensors are parameters, because offloading and sharding tools look after parameters only.

    With `memory="fast"` the dense weight is unpacked once and kept beside the packed one. It is no part of the state
    dict, of copies or of pickles, and is unpacked anew when the packed tensors are replaced or changed in place. Only a
    write through `.data` cannot be seen; set `memory` again after one. The kept copy is not used while `weight` needs a
    gradient or under `torch.compile`, and is made from the second call on the same tensors, so that layers whose
    tensors are brought in for each call (offloading) do not pile up dense copies.

    Args:
        in_features (`int`): a multiple of 8.
        out_features (`int`): rows of the weight.
        bias (`bool`, defaults to `True`): whether there is a bias `[out]`.
        device, dtype: as for `nn.Linear`.
        memory (`str`, *optional*): "fast" or "low" (unpack at each call); `None`: "fast" on the CPU, "low" elsewhere.

    Attributes:
        weight: kept values, `[out, in/2]`, dtype of the layer.
        weight_idx: uint8 `[out, in/8]`, four 2-bit column ids a byte, low bits first, ascending in a group; no gradient.
            (`module.requires_grad_(True)` on a whole model fails on it: loop over the floating point parameters.)
        bias: `[out]` or `None`.

    Raises:
        PatternError: if in_features is no multiple of 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if in_features % 8:
            raise PatternError(f"in_features={in_features} is no multiple of 8; such a layer cannot be packed")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features // 2, device=device, dtype=dtype))
        ids = torch.empty(out_features, in_features // 8, device=device, dtype=torch.uint8)
        self.weight_idx = nn.Parameter(ids, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.memory = memory
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` on the kept values; the first two of each group are kept."""
        with torch.no_grad():
            self.weight_idx.fill_(_FIRST_TWO_OF_EACH_GROUP)
        super().reset_parameters()

    # --- conversion -------------------------------------------------------------------------------------------------
    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, mask: torch.Tensor, memory: str | None = None) -> SparseLinear24:
        """Pack the weight of `linear` where `mask` keeps it; dtype, device, bias and flags stay.

        Args:
            linear (`nn.Linear`): weight `[out, in]`.
            mask (`torch.Tensor`): `[out, in]`, non-zero = kept, at most 2 of each 4. Groups that keep fewer are
                completed lowest index first, with zeros.
            memory (`str`, *optional*): see the class.

        Raises:
            PatternError: if in_features is no multiple of 8, or a group keeps more than two.
        """
        keep = mask.to(linear.weight.device) != 0
        if keep.shape != linear.weight.shape:
            raise PatternError(f"mask of shape {list(keep.shape)} for a weight of shape {list(linear.weight.shape)}")
        completed, _ = ops.complete_mask(keep, PATTERN)
        values, ids = ops.pack_24(linear.weight.detach().masked_fill(~keep, 0), completed)
        packed = cls._empty_like(linear, memory)
        packed.weight = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        packed.weight_idx = nn.Parameter(ids, requires_grad=False)
        packed.bias = linear.bias
        return packed.train(linear.training)

    @classmethod
    def _empty_like(cls, linear: nn.Linear, memory: str | None) -> SparseLinear24:
        has_bias = linear.bias is not None
        weight = linear.weight
        return cls(linear.in_features, linear.out_features, has_bias, device="meta", dtype=weight.dtype, memory=memory)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Plain `nn.Linear` with the zeros in place, in `dtype` (default: as it is)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.dequantize().to(dtype or self.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        if self.bias is not None and dtype not in (None, self.bias.dtype):
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def dequantize(self) -> torch.Tensor:
        """The dense weight `[out, in]`, pruned positions +0; differentiable in `weight`."""
        return ops.unpack_24(self.weight, self.weight_idx)

    # --- forward ----------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._may_keep_dense():
            dense = self._kept_dense()
            if dense is not None:
                return F.linear(x, dense, self.bias)
        return ops.linear_24(x, self.weight, self.weight_idx, self.bias)

    @property
    def memory(self) -> str:
        """The mode in force: what was set, else "fast" on the CPU and "low" elsewhere."""
        if self._memory is not None:
            return self._memory
        return "fast" if self.weight.device.type == "cpu" else "low"

    @memory.setter
    def memory(self, mode: str | None) -> None:
        if mode is not None and mode not in MEMORY_MODES:
            raise ConfigError(
                f"memory={mode!r}; use one of {', '.join(map(repr, MEMORY_MODES))}, or None for the default"
            )
        self._memory = mode
        self._kept: _KeptDense | None = None

    def _may_keep_dense(self) -> bool:
        """Whether a call may use the kept dense weight; drops it where the weight is being trained."""
        if torch.compiler.is_compiling() or self.memory != "fast":
            return False
        if self.weight.requires_grad and torch.is_grad_enabled():
            self._kept = None  # some optimizers write through `.data`, which no version counter sees
            return False
        # DTensors, wrapped and inference tensors have no state that tells a later change.
        tensors = (self.weight, self.weight_idx)
        return all(type(tensor) is nn.Parameter and not tensor.is_inference() for tensor in tensors)

    def _kept_dense(self) -> torch.Tensor | None:
        """The kept dense weight; `None` at the first call on these tensors."""
        if self._kept is None or not self._kept.is_of(self.weight, self.weight_idx):
            self._kept = _KeptDense(self.weight, self.weight_idx)
            return None
        if self._kept.dense is None:
            # Made in inference mode it could not take part in training of what lies before or beside this layer.
            with torch.inference_mode(False), torch.no_grad():
                self._kept.dense = self.dequantize()
        return self._kept.dense

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={PATTERN}, memory={self.memory}"


class _KeptDense:
    """A dense weight, and the state of the packed tensors that it was unpacked from."""

    def __init__(self, values: nn.Parameter, ids: nn.Parameter) -> None:
        self._values, self._ids = weakref.ref(values), weakref.ref(ids)
        self._state = self._state_of(values, ids)
        self.dense: torch.Tensor | None = None

    @staticmethod
    def _state_of(values: nn.Parameter, ids: nn.Parameter) -> tuple[int, int, int, int]:
        return values.data_ptr(), values._version, ids.data_ptr(), ids._version

    def is_of(self, values: nn.Parameter, ids: nn.Parameter) -> bool:
        same = self._values() is values and self._ids() is ids
        return same and self._state == self._state_of(values, ids)


@dataclass(frozen=True)
class Explanation:
    """How a layer computes a call.

    Args:
        kind (`str`): class of the layer.
        backend (`str`): for example "dense, unpacked once" or "reference, unpacked each call".
        device (`str`), dtype (`str`): of the weight.
        tokens (`int`): rows of input that were asked about.
        resident_bytes (`int`): what the layer holds in memory once such a call has run.
    """

    kind: str
    backend: str
    device: str
    dtype: str
    tokens: int
    resident_bytes: int


def explain(module: nn.Module, tokens: int = 1) -> Explanation:
    """Which path an eager call of `module` on `tokens` rows of input takes, under the present gradient mode.

    Args:
        module (`nn.Module`): a `SparseLinear24` or a plain `nn.Linear`.
        tokens (`int`, defaults to 1): product of the leading dimensions of the input.

    Raises:
        UnsupportedError: for another kind of module.
    """
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(f"explain takes a linear layer, got {type(module).__name__}; pass one of its layers")
    resident = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    backend = "dense"
    if isinstance(module, SparseLinear24):
        if module._may_keep_dense():
            backend = "dense, unpacked once"
            resident += module.in_features * module.out_features * module.weight.element_size()
        else:
            chosen = ops.linear_24_backend(module.weight, tokens)
            backend = f"{chosen.name}, unpacked each call" if chosen.name == "reference" else chosen.name
    weight = module.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    return Explanation(type(module).__name__, backend, str(weight.device), dtype, tokens, resident)
