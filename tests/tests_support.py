# SPDX-License-Identifier: Apache-2.0
"""Small modules for tests, a comparison, a file altered, and a model walked the slow way."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_nmsparse.criteria import find_weights


class TinyMLP(nn.Module):
    """Two linear layers, `[..., in] -> [..., 4]`."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.second = nn.Linear(hidden, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def assert_equal_but_for_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """For outputs of a packed and a dense layer or model: kernels for few tokens add up in an order of their own.

    In bfloat16 and float16 a layer rounds its sum to a few digits, which the next ones carry on: up to 2 % of the largest.
    """
    halves = expected.dtype in (torch.bfloat16, torch.float16)
    close = {"rtol": 0.02, "atol": 0.02 * expected.abs().max().item()} if halves else {}
    torch.testing.assert_close(found, expected, **close)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Alter a saved model: `change` gets its tensors by name and the metadata of its header, and changes them in place."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def walk_naively(
    model: nn.Module, num_blocks: int, calibration: torch.Tensor
) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
    """Each linear layer with its inputs `[tokens, in]`, by whole forwards for each block, all activations kept.

    What is done to the layers of a block before the next one is asked for shows in the inputs of the next.
    """
    linears = {name: target.module for name, target in find_weights(model).items()}
    for index in range(num_blocks):
        block = {name: linear for name, linear in linears.items() if f".{index}." in name}
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in block}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, into=seen[name]: into.append(args[0].detach()))
            for name, linear in block.items()
        ]
        with torch.no_grad():
            model(calibration)
        for hook in hooks:
            hook.remove()
        for name, linear in block.items():
            yield linear, torch.cat(seen[name]).flatten(0, -2)
