# SPDX-License-Identifier: Apache-2.0
"""A packed 2:4 weight as every kernel reads it: the tensors of docs/FORMAT.md, in their order on disk."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...codec import SCALE_COLUMNS, dequantize_values, unpack_24

VALUE_KINDS = ("dense", "int8", "int4")


class Weight24:
    """W `[out, in]`, two of each four consecutive inputs kept.

    W = spread(dequantised values * scale) * input_scale

    Args:
        values (`torch.Tensor`): kept weights. Floating point `[out, in/2]`; int8 `[out, in/2]`; or 4 bits each, uint8
            `[out, in/4]`, low nibble first, nibble = value + 8.
        ids (`torch.Tensor`): uint8 `[out, in/8]`, four 2-bit column ids a byte, low bits first, ascending in a group.
        scale (`torch.Tensor`, *optional*): of quantised values, `[out, ceil(in/128)]`, one for 128 columns of W.
        input_scale (`torch.Tensor`, *optional*): `[in]`, a factor of each column (AWQ, arXiv 2306.00978, section 3.2).
        memo (`Memo24`, *optional*): what earlier calls on these tensors left, see there.
    """

    __slots__ = ("ids", "input_scale", "memo", "scale", "values")

    def __init__(
        self,
        values: torch.Tensor,
        ids: torch.Tensor,
        scale: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        memo: Memo24 | None = None,
    ) -> None:
        self.values, self.ids, self.scale, self.input_scale, self.memo = values, ids, scale, input_scale, memo

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Values, ids, scale and input scale."""
        return self.values, self.ids, self.scale, self.input_scale

    @property
    def out_features(self) -> int:
        return self.ids.shape[0]

    @property
    def in_features(self) -> int:
        return 8 * self.ids.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def kind(self) -> str:
        """One of `VALUE_KINDS`."""
        if self.scale is None:
            return "dense"
        return "int8" if self.values.dtype == torch.int8 else "int4"

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in: that of the values, or of their scales."""
        return (self.values if self.scale is None else self.scale).dtype

    def dense(self) -> torch.Tensor:
        """W in `dtype`, rounded once where values are quantised; differentiable in floating point values."""
        if self.scale is None:
            return unpack_24(self.values, self.ids)
        kept = dequantize_values(self.values, self.scale)
        weight = unpack_24(kept, self.ids)
        if self.input_scale is not None:
            weight = weight * self.input_scale.to(weight.dtype)
        return weight.to(self.dtype)

    def check(self) -> None:
        """Refuse tensors whose shapes do not belong together: kernels rely on them for every address they read.

        Raises:
            RuntimeError: naming the tensor; not one of our own, so that callers that catch what `nn.Linear` raises catch it.
        """
        values, ids = self.values, self.ids
        per_id_byte = 2 if self.kind == "int4" else 4
        if (
            values.dim() != 2
            or ids.dim() != 2
            or ids.dtype != torch.uint8
            or values.shape[1] != per_id_byte * ids.shape[1]
        ):
            raise RuntimeError(
                f"linear_24: need values [out, in/2] ([out, in/4] for int4) and uint8 ids [out, in/8], got {values.dtype} "
                f"values {list(values.shape)} and {ids.dtype} ids {list(ids.shape)}"
            )
        out_features, in_features = self.out_features, self.in_features
        expected = {
            "values": (values, (out_features, values.shape[1])),
            "scale": (self.scale, (out_features, -(-in_features // SCALE_COLUMNS))),
            "input_scale": (self.input_scale, (in_features,)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and (tensor.shape != shape or tensor.device != ids.device):
                raise RuntimeError(
                    f"linear_24: {name} of shape {list(tensor.shape)} on {tensor.device}, expected {list(shape)} on {ids.device}"
                )
        if self.scale is None and self.input_scale is not None:
            raise RuntimeError("linear_24: an input_scale without scale; only quantised values have one")
        floats = [tensor for tensor in (self.scale, self.input_scale) if tensor is not None]
        whole = (torch.int8, torch.uint8) if self.scale is not None else (self.dtype,)
        if not self.dtype.is_floating_point or values.dtype not in whole or any(t.dtype != self.dtype for t in floats):
            raise RuntimeError(
                f"linear_24: values {values.dtype} with scales {[str(t.dtype) for t in floats]}; floating point values have "
                "none, int8 and uint8 (4 bits each) values have floating point ones of one dtype"
            )


class Memo24:
    """What calls on one packed weight found out, kept from call to call by the layer that holds the weight.

    It holds no tensor alive, and `is_of` tells whether it still speaks of the tensors at hand. Their values may change.

    Args:
        weight (`Weight24`): plain tensors, found sound here.

    Raises:
        RuntimeError: as `Weight24.check`.
    """

    __slots__ = (
        "_seen",
        "choices",
        "device",
        "device_type",
        "dtype",
        "in_features",
        "kind",
        "out_features",
        "prepared",
    )

    def __init__(self, weight: Weight24) -> None:
        weight.check()
        self._seen = tuple(_Seen(tensor) for tensor in weight.tensors)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.kind, self.dtype, self.device = weight.kind, weight.dtype, weight.device
        self.device_type = self.device.type  # torch makes the string anew each time
        self.choices: dict[tuple, Any] = {}  # what the dispatcher chose, by what decides it
        self.prepared: Any = None  # what a kernel makes of the tensors' addresses

    def is_of(self, weight: Weight24) -> bool:
        """Whether these are the very tensors, with the same shapes, at the same addresses."""
        values, ids, scale, input_scale = self._seen
        return (
            values.is_still(weight.values)
            and ids.is_still(weight.ids)
            and scale.is_still(weight.scale)
            and input_scale.is_still(weight.input_scale)
        )


class _Seen:
    """Which tensor this was, if any, and how its numbers lay in memory. Asked at each call."""

    __slots__ = ("address", "contiguous", "dtype", "reference", "shape")

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.reference = None if tensor is None else weakref.ref(tensor)
        if tensor is not None:
            self.address, self.shape, self.dtype = tensor.data_ptr(), tensor.shape, tensor.dtype
            self.contiguous = tensor.is_contiguous()

    def is_still(self, tensor: torch.Tensor | None) -> bool:
        if tensor is None or self.reference is None:
            return tensor is None and self.reference is None
        return (
            tensor is self.reference()
            and tensor.data_ptr() == self.address
            and tensor.shape == self.shape
            and tensor.dtype is self.dtype
            and tensor.is_contiguous() == self.contiguous
        )
