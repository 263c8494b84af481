# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: another adapter for each sample, by PEFT's `adapter_names`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .. import _compat
from ..errors import ConfigError
from .layer import NMSparseLayer
from .linear import BASE


@contextlib.contextmanager
def adapter_for_each_sample(model: nn.Module, names: Sequence[str], arguments: Mapping[str, Any]) -> Iterator[None]:
    """For the time of the context every layer of `model` is told the adapter of each sample.

    Args:
        model (`nn.Module`): carries the adapters.
        names (`Sequence[str]`): an adapter for each sample, "__base__" for none.
        arguments (`Mapping[str, Any]`): of `forward` or `generate`.

    Raises:
        ConfigError: in training mode, or for a name that no layer carries.
    """
    if model.training:
        raise ConfigError("adapter_names works in eval mode only; call model.eval(), or train one adapter at a time")
    layers = [module for module in model.modules() if isinstance(module, NMSparseLayer)]
    known = {name for layer in layers for name in layer.configs} | {BASE}
    if unknown := sorted(set(names) - known):
        raise ConfigError(f"adapter_names: {', '.join(unknown)} on no layer; the model has {', '.join(sorted(known))}")
    copies = _copies_of_a_sample(arguments)
    with contextlib.ExitStack() as hooks:
        for module, in_encoder, carried in _compat.modules_taking_adapter_names(model, NMSparseLayer):
            # Beam search repeats every sample, but not in the encoder of an encoder-decoder model.
            repeats = 1 if in_encoder else copies
            own = [name if name in carried else BASE for name in names for _ in range(repeats)]
            handle = module.register_forward_pre_hook(_AddAdapterNames(own), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _copies_of_a_sample(generation: Mapping[str, Any]) -> int:
    """How often `generate`, called with these arguments, repeats each sample of the batch; 1 for `forward`."""
    config = generation.get("generation_config")
    given = [
        generation.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    ]
    return max(given)


class _AddAdapterNames:
    """A forward pre-hook that passes `adapter_names` on."""

    def __init__(self, adapter_names: list[str]) -> None:
        self.adapter_names = adapter_names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.adapter_names}
