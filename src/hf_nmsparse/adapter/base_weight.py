# SPDX-License-Identifier: Apache-2.0
"""The weight under a mask, seen as `[out, in]` whatever its module is: linear, GPT-2's Conv1D, convolution, quantised, experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._compat import keep_quantised_layout
from ..errors import UnsupportedError
from ..fingerprint import fingerprint

MASKABLE = (nn.Linear, Conv1D, nn.Conv2d)


@dataclass(frozen=True)
class BaseWeight:
    """One weight that a mask can be put on. Groups of the mask run along its last dimension, the inputs; of a convolution these
    are the input channels at each place of the kernel, one place after the other.

    Args:
        module (`nn.Module`): holds the weight.
        parameter_name (`str`): "weight", or the name of a fused expert parameter.
        backend (`QuantizationBackend`, *optional*): PEFT's view of a quantised layer.
    """

    module: nn.Module
    parameter_name: str = "weight"
    backend: QuantizationBackend | None = None

    @property
    def stored(self) -> nn.Parameter:
        """The parameter as the module holds it."""
        return getattr(self.module, self.parameter_name)

    @property
    def transposed(self) -> bool:
        """Whether inputs are not the last dimension of the parameter."""
        if isinstance(self.module, Conv1D):
            return True
        return self.num_experts is not None and bool(getattr(self.module, "is_transposed", False))

    @property
    def num_experts(self) -> int | None:
        """Number of experts in a fused parameter, `[experts, out, in]`."""
        return self.stored.shape[0] if self.stored.dim() == 3 else None

    @property
    def is_convolution(self) -> bool:
        """Whether it is the kernel of a convolution, `[out, channels, height, width]`."""
        return isinstance(self.module, nn.Conv2d)

    @property
    def is_fused_experts(self) -> bool:
        """Whether transformers says that this holds experts (any other 3-D parameter may be a table or a kernel)."""
        floats = self.stored.is_floating_point() and self.stored.itemsize > 1
        return (
            self.num_experts is not None and floats and isinstance(getattr(self.module, "is_transposed", None), bool)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); the rows of all experts one after the other."""
        if self.backend is not None:  # a quantised weight may be stored as a flat run of bytes
            return self.module.out_features, self.module.in_features
        if self.is_convolution:
            return len(self.stored), self.stored[0].numel()
        *experts, rows, columns = self.stored.shape
        if self.transposed:
            rows, columns = columns, rows
        return (experts[0] if experts else 1) * rows, columns

    def read(self) -> torch.Tensor:
        """The weight, `[out, in]`: a view where the module stores it that way, else a copy."""
        if self.backend is not None:
            keep_quantised_layout(self.module)
            return self.backend.get_base_weight(self.module).detach()
        return self.as_rows(self.stored)

    def as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor in the shape in which the module stores its weight as `[out, in]`; the inverse of `restore`."""
        if self.is_convolution:
            return stored.permute(0, 2, 3, 1).flatten(1)
        weight = stored.mT if self.transposed else stored
        return weight.flatten(0, 1) if weight.dim() == 3 else weight

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out, in]` in the shape in which the module stores it."""
        if self.is_convolution:
            _, channels, *kernel = self.stored.shape
            return weight.unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)
        if self.num_experts is not None:
            weight = weight.unflatten(0, (self.num_experts, -1))
        return weight.mT if self.transposed else weight

    def quantised_state(self) -> tuple[nn.Parameter, object]:
        """What a quantised layer holds: its weight and, for 8-bit bitsandbytes, the scales beside it."""
        return self.module.weight, copy.copy(getattr(self.module, "state", None))

    def set_quantised_state(self, state: tuple[nn.Parameter, object]) -> None:
        """Put back what `quantised_state` returned."""
        self.module.weight = state[0]
        if state[1] is not None:
            self.module.state = copy.copy(state[1])

    def fingerprint(self) -> torch.Tensor | None:
        """Fingerprint of the weight; `None` where its values are not those of a checkpoint (quantised, meta)."""
        return None if self.backend is not None else fingerprint(self.read())


def module_base_weight(module: nn.Module, name: str, **quantization: object) -> BaseWeight:
    """The weight of a linear layer or a convolution.

    Args:
        module (`nn.Module`): the layer.
        name (`str`): its name, for the error.
        quantization: what PEFT's `resolve_quantization_backend` needs.

    Raises:
        UnsupportedError: if no mask can be put on this kind of module.
    """
    backend = resolve_quantization_backend(module, **quantization)
    if backend is not None and not backend.supports_merge:
        raise UnsupportedError(
            f"{name} is quantised with {backend.backend_name}, whose weights cannot be read back; load the model "
            "unquantised or with bitsandbytes"
        )
    if backend is None and type(module) not in MASKABLE:
        raise UnsupportedError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}; masks go on linear layers (torch.nn.Linear, "
            "Conv1D of transformers, bitsandbytes layers) and on torch.nn.Conv2d. Leave it out with exclude_modules, or decompress the model "
            "first if it is packed"
        )
    return BaseWeight(module, backend=backend)


def expert_base_weight(module: nn.Module, parameter_name: str, name: str) -> BaseWeight:
    """The weight of fused experts, or of any other parameter `[out, in]` or `[experts, out, in]`.

    Raises:
        UnsupportedError: if the parameter has other dimensions or is no float.
    """
    parameter = getattr(module, parameter_name)
    if isinstance(module, nn.Embedding):
        raise UnsupportedError(
            f"{name} is an embedding: its rows are looked up, not multiplied, so n:m has no use there"
        )
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
        raise UnsupportedError(
            f"{name}: target_parameters takes float weights [experts, out, in] or [out, in], got {parameter.dtype} "
            f"{list(parameter.shape)}"
        )
    return BaseWeight(module, parameter_name)


def base_weights(model: nn.Module) -> dict[str, BaseWeight]:
    """Every weight of a model that a mask can be put on, by layer name: "…q_proj", "…experts.gate_up_proj".

    Layers that carry adapters already are found by the same names.
    """
    found: dict[str, BaseWeight] = {}
    adapters: set[str] = set()  # where modules of adapters lie
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters.update(f"{path}.{child}" for child, _ in module.named_children() if child != "base_layer")
            continue
        parts = path.split(".")
        if any(".".join(parts[:length]) in adapters for length in range(1, len(parts) + 1)):
            continue
        name = path.replace(".base_layer", "")
        backend = resolve_quantization_backend(module) if isinstance(module, nn.Linear) else None
        if type(module) in MASKABLE or (backend is not None and backend.supports_merge):
            found[name] = BaseWeight(module, backend=backend)
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() in (2, 3) and parameter.is_floating_point():
                found[f"{name}.{parameter_name}"] = BaseWeight(module, parameter_name)
    return found


def linear_and_expert_weights(model: nn.Module) -> dict[str, BaseWeight]:
    """Of `base_weights` those that are usually pruned: of linear layers and fused experts."""
    return {
        name: base
        for name, base in base_weights(model).items()
        if isinstance(base.module, (nn.Linear, Conv1D)) or base.is_fused_experts
    }
