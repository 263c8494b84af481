# SPDX-License-Identifier: Apache-2.0
"""The FFNs of a block that are of a known form: which layers, which activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

FORMS = (("fc1", "fc2"), ("gate_proj", "up_proj", "down_proj"))  # the last layer is last
ACTIVATION_NAMES = ("act_fn", "activation_fn", "activation", "act")


@dataclass(frozen=True)
class FeedForward:
    """One FFN of a known form.

    Args:
        name (`str`): of the module that holds it.
        layers (`tuple[str, ...]`): full names: the first layers (fc1; gate_proj and up_proj), and the last.
        activation (callable): elementwise.
    """

    name: str
    layers: tuple[str, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def gated(self) -> bool:
        return len(self.layers) == 3

    def hidden(self, before: list[torch.Tensor]) -> torch.Tensor:
        """What the last layer gets, of the outputs of the first ones."""
        activated = self.activation(before[0])
        return activated * before[1] if self.gated else activated


def find_ffns(names: Iterable[str], block: nn.Module) -> list[FeedForward]:
    """The FFNs whose layers are all among `names`, with the activation that their module or the block holds.

    A plain one must have a ReLU: for it alone `z` has the closed form.
    """
    names = dict.fromkeys(names)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = []
    for parent in parents:
        for form in FORMS:
            layers = tuple(f"{parent}.{leaf}".lstrip(".") for leaf in form)
            if not all(layer in names for layer in layers):
                continue
            activation = _activation(parent, form, block)
            is_relu = isinstance(activation, nn.ReLU) or activation in (F.relu, torch.relu)
            if activation is not None and (len(form) == 3 or is_relu):
                found.append(FeedForward(parent, layers, activation))
    return found


def _activation(parent: str, form: tuple[str, ...], block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation of the FFN called `parent` in the model: the name's end is that of its module in the block."""
    parts = parent.split(".")
    inside = dict(block.named_modules())
    paths = [".".join(parts[start:]) for start in range(len(parts) + 1)]  # the last is the block itself
    holders = [inside[path] for path in paths if path in inside and all(hasattr(inside[path], leaf) for leaf in form)]
    attributes = (getattr(holder, name, None) for holder in (*holders[:1], block) for name in ACTIVATION_NAMES)
    return next((attribute for attribute in attributes if callable(attribute)), None)
