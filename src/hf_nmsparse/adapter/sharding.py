# SPDX-License-Identifier: Apache-2.0
"""Parameters that several processes share out among themselves, and how to see them whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UnsupportedError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a part of a tensor: a DTensor (FSDP2, tensor parallelism), or one that ZeRO-3 has
    partitioned."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has taken the values of a parameter away; it is empty until it is gathered."""
    return hasattr(tensor, "ds_shape") and tensor.shape != tensor.ds_shape


@contextlib.contextmanager
def whole_tensors(module: nn.Module) -> Iterator[None]:
    """For the time of the context the DTensors of adapters in `module` are whole, and only to be read; base layers, which are
    large, stay as they are.

    Where there are any, all processes have to enter it, in the same order. Where there are none it does nothing.
    """
    sharded = [
        (owner, name, parameter)
        for place, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if "base_layer" not in place.split(".") and hasattr(parameter, "full_tensor")
    ]
    try:
        for owner, name, parameter in sharded:
            whole = parameter.detach().full_tensor()
            owner._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


def refuse_sharded(module: nn.Module, name: str, what: str) -> None:
    """Refuse what writes weights, or reads them without all processes.

    Raises:
        UnsupportedError: if a parameter of `module`, which is called `name`, is sharded; `what` is not done then.
    """
    for part, parameter in module.named_parameters():
        if is_partitioned(parameter):
            raise UnsupportedError(
                f"{what} needs whole weights, but DeepSpeed ZeRO-3 has partitioned {name}.{part} ({list(parameter.ds_shape)}). "
                "Masks train under DDP, FSDP2 and ZeRO-2"
            )
        if is_sharded(parameter):
            raise UnsupportedError(
                f"{what} needs whole weights, but {name}.{part} ({list(parameter.shape)}) is sharded over processes. Do it "
                "before the Trainer shards the model; or after training call nms.save_mask(trainer.model, folder) in every "
                "process, and go on in one process with the base model and nms.load_mask"
            )


def is_writer() -> bool:
    """Whether this process writes files that all of them would write alike: the first of several, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
