# SPDX-License-Identifier: Apache-2.0
"""How fast packed layers are on this machine, beside dense ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..ops import DENSE, Call24, Weight24
from ..ops.linear24 import measure
from .explain import explain
from .modules import MEMORY_MODES, SparseLinear24

_BYTES_TO_MAKE_A_WEIGHT = 20  # while it is drawn, pruned and packed; the finished copies of large weights take less


@dataclass(frozen=True)
class LayerSpeed:
    """Time of one packed layer, and of the dense one beside it.

    Args:
        shape (`tuple[int, int]`): out_features, in_features.
        tokens (`int`): rows of input.
        dtype (`str`), values (`str`): of the layer, and how its kept weights are stored.
        memory (`str`): mode of the packed layer.
        kernel (`str`): what computed it.
        milliseconds (`float`), dense_milliseconds (`float`): medians.
        speedup (`float`): dense time over packed time; `speedup_low`, `speedup_high`: its 95 % bootstrap interval.
        bytes (`int`), flop (`int`): what the packed call must read and write, and the operations of the dense product.
        roofline_share (`float`): the least time that this device needs for them, over the time taken.
    """

    shape: tuple[int, int]
    tokens: int
    dtype: str
    values: str
    memory: str
    kernel: str
    milliseconds: float
    dense_milliseconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    bytes: int
    flop: int
    roofline_share: float

    def to_dict(self) -> dict:
        """As JSON has it."""
        return {**asdict(self), "shape": list(self.shape)}


def measure_layer(call: Call24, roofline: measure.Roofline, rounds: int = 30) -> Iterator[LayerSpeed]:
    """Time `SparseLinear24` in both memory modes against `nn.Linear`, in turn, on weights that no cache holds.

    Args:
        call (`Call24`): a forward product.
        roofline (`Roofline`): of the device.
        rounds (`int`): times each is timed.
    """
    copies = measure.copies_of(call)
    x = torch.randn(call.tokens, call.in_features, device=call.device).to(call.dtype)
    layers = {DENSE: [_dense_layer(weight) for weight in copies.dense]}
    for memory in MEMORY_MODES:
        layers[memory] = _packed_layers(copies.packed, memory)
    runs = {name: lambda i, modules=modules: modules[i % len(modules)](x) for name, modules in layers.items()}
    with torch.inference_mode():
        for modules in layers.values():
            for module in modules:  # twice: the second call of a layer may unpack its weight
                module(x)
                module(x)
        measured = measure.Measurement(call, measure.interleave(runs, rounds, call.device))
    for memory in MEMORY_MODES:
        speedup, low, high = measured.speedup(memory)
        kernel = explain(layers[memory][0], call.tokens).backend
        num_bytes = measure.bytes_of(call, DENSE if kernel.startswith("dense") else kernel)
        least = roofline.milliseconds(num_bytes, measure.flop_of(call))
        yield LayerSpeed(
            (call.out_features, call.in_features),
            call.tokens,
            str(call.dtype).removeprefix("torch."),
            call.kind,
            memory,
            kernel,
            measured.median(memory),
            measured.median(DENSE),
            speedup,
            low,
            high,
            num_bytes,
            measure.flop_of(call),
            least / measured.median(memory),
        )


def least_memory(call: Call24) -> int:
    """Bytes that `measure_layer` needs at least: for one weight while it is made, the input as it is drawn, and the output."""
    weight = _BYTES_TO_MAKE_A_WEIGHT * call.out_features * call.in_features
    return weight + call.tokens * (4 * call.in_features + call.dtype.itemsize * call.out_features)


def _dense_layer(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _packed_layers(weights: list[Weight24], memory: str) -> list[SparseLinear24]:
    first = weights[0]
    empty = SparseLinear24(
        first.in_features,
        first.out_features,
        bias=False,
        device="meta",
        dtype=first.dtype,
        memory=memory,
        values=first.kind,
    )
    layers = []
    for weight in weights:
        layer = copy.deepcopy(empty)  # far faster than making one, and there may be thousands
        names = ("weight", "weight_idx", "weight_scale")
        for name, tensor in zip(names, (weight.values, weight.ids, weight.scale), strict=True):
            if tensor is not None:
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layers.append(layer)
    return layers
