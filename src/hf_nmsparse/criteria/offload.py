# SPDX-License-Identifier: Apache-2.0
"""Weights that do not fit: models that accelerate keeps on disk or in CPU memory (`device_map=`), pruned block by block.

accelerate loads each layer when it is called and drops it afterwards. A block that is being pruned is called once for each
calibration batch, so it is loaded whole once; what is chosen is put on later, whenever its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from .._compat import hook_of

Change = Callable[[torch.Tensor], None]


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's own weights only while it is called."""
    return _offload_hook(module) is not None


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """For the time of the context all offloaded weights of `module` are loaded, on the device where it is computed."""
    loaded: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for part in module.modules():
            hook = _offload_hook(part)
            if hook is not None and hook.offload:
                hook.pre_forward(part)
                hook.offload = False  # calls neither load it again nor drop it
                loaded.append((part, hook))
        yield
    finally:
        for part, hook in loaded:
            hook.offload = True
            hook.post_forward(part, None)


def change_when_loaded(module: nn.Module, parameter: str, change: Change) -> None:
    """Have `change` work in place on a copy of an offloaded parameter, each time that it is loaded (or saved)."""
    hook = _offload_hook(module)
    if not isinstance(hook.weights_map, _Changed):
        hook.weights_map = _Changed(hook.weights_map)
    hook.weights_map.changes.setdefault(parameter, []).append(change)


class _Changed(Mapping):
    """Weights by name, as accelerate reads them, with changes made on the way."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self.stored = stored
        self.changes: dict[str, list[Change]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.stored[name]
        if name in self.changes:
            value = value.clone()
            for change in self.changes[name]:
                change(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = hook_of(module)
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.weights_map is not None:
            return one
    return None
