# SPDX-License-Identifier: Apache-2.0
"""Models that do not fit into memory: which of their blocks stay on disk, to be loaded one at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import Dtype

if TYPE_CHECKING:
    from torch import nn

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model go.

    Args:
        device_map (`dict[str, str]`): module or parameter -> device, or "disk"; for `from_pretrained`.
        blocks (`int`), on_disk (`int`): number of blocks, and of those that stay on disk.
    """

    device_map: dict[str, str]
    blocks: int
    on_disk: int


def memory_size(text: str) -> int:
    """Bytes of a size such as "12GB" or "800 MiB".

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"--max-memory {text!r}: expected a size such as 12GB or 800MiB")
    return int(float(match[1]) * (_BINARY_UNITS if match[3] else _UNITS)[match[2]])


def available_memory(device: str) -> int:
    """Bytes that are free now on a device."""
    import psutil  # required by accelerate
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def weight_bytes(module: nn.Module, dtype: Dtype) -> int:
    """Bytes of the weights of a module, which may be empty, when it is loaded in a dtype; of those shared only once."""
    import torch

    size = None if dtype is Dtype.AUTO else getattr(torch, dtype.value).itemsize
    return sum(
        parameter.numel() * (size if size and parameter.is_floating_point() else parameter.itemsize)
        for parameter in module.parameters()
    )


def placement(model: nn.Module, dtype: Dtype, device: str, limit: int) -> Placement:
    """Keep as many of the first blocks in memory as fit beside everything outside the blocks, and the largest block.

    Args:
        model (`nn.Module`): the model, empty.
        dtype (`Dtype`): that it will be loaded in.
        device (`str`): that computes.
        limit (`int`): bytes of weights to have in memory at any time. What is outside the blocks is always there.
    """
    from ..criteria import find_stacks

    stacks = find_stacks(model)
    sizes = {
        f"{name}.{index}": weight_bytes(block, dtype) for name, stack in stacks for index, block in enumerate(stack)
    }
    free = limit - (weight_bytes(model, dtype) - sum(sizes.values())) - max(sizes.values())
    device_map: dict[str, str] = {}
    for block, size in sizes.items():
        free -= size
        device_map[block] = device if free >= 0 else "disk"
    on_disk = sum(place == "disk" for place in device_map.values())
    tensors = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    outside = {_holder(name, list(sizes)) for name in tensors} - set(sizes)
    return Placement(device_map | dict.fromkeys(sorted(outside), device), len(sizes), on_disk)


def _holder(tensor: str, blocks: list[str]) -> str:
    """The block that holds a tensor, else the outermost module that holds no block, else the tensor itself."""
    parts = tensor.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if path in blocks or not any(block.startswith(f"{path}.") for block in blocks):
            return path
    return tensor
