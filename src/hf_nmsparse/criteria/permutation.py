# SPDX-License-Identifier: Apache-2.0
"""Channel permutation that a model absorbs: another order of the input channels of a layer.

The inputs of some layers come from layers whose output channels can be brought into the same order, with only elementwise
operations between them. Then the block computes what it did before, up to the order of summation:

- MLP: the inputs of the down projection, with the outputs of the up (and gate) projection; all channels move freely.
- Attention: the inputs of the output projection, with the outputs of the value projection; channels move within their
  head, and alike in all query heads that read the same key-value head.

Left as they are: fused projections (`c_attn`, `qkv_proj`, `gate_up_proj`), fused experts, quantised layers, and inputs that
come from the residual stream. Names only propose a pair; `absorb` runs the block before and after and takes it back unless
it holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .base import InputStatistics

logger = logging.getLogger(__name__)

# Consumer, its producers, named from the module that holds both; and whether channels belong to attention heads.
PAIRS = (
    ("down_proj", ("gate_proj", "up_proj"), False),  # Llama, Qwen, Mistral, Gemma
    ("down_proj", ("up_proj",), False),  # Nemotron
    ("fc2", ("fc1",), False),  # OPT, Phi, ViT
    ("c_proj", ("c_fc",), False),  # GPT-2
    ("dense_4h_to_h", ("dense_h_to_4h",), False),  # GPT-NeoX, Bloom
    ("wo", ("wi_0", "wi_1"), False),  # T5 v1.1
    ("wo", ("wi",), False),  # T5
    ("output.dense", ("intermediate.dense",), False),  # BERT
    ("o_proj", ("v_proj",), True),  # Llama, Qwen, Mistral, Gemma, ViT
    ("out_proj", ("v_proj",), True),  # OPT
    ("dense", ("v_proj",), True),  # Phi
    ("o", ("v",), True),  # T5
    ("output.dense", ("self.value",), True),  # BERT
)
SUMMATION = 1e-5  # relative difference of float32 sums of which kernels may change the order


@dataclass(frozen=True)
class Absorbable:
    """A layer whose input channels may be permuted, and the layers that absorb it.

    The inputs are `[heads, copies, channels]`, the outputs of each producer `[heads, channels]`. Channels move within a
    head, alike in its copies.

    Args:
        consumer (`str`): name of the layer.
        producers (`tuple[str, ...]`): names of the layers whose output channels, bias included, move with its inputs.
        channels (`int`): how many channels may change places with one another.
        heads (`int`): key-value heads; 1 in an MLP.
        copies (`int`): query heads that read one key-value head; 1 in an MLP.
    """

    consumer: str
    producers: tuple[str, ...]
    channels: int
    heads: int = 1
    copies: int = 1

    @property
    def in_features(self) -> int:
        """Inputs of the consumer."""
        return self.heads * self.copies * self.channels

    def producer_order(self, order: torch.Tensor) -> torch.Tensor:
        """The order of the outputs of the producers, int64 `[heads * channels]`, that goes with one of the inputs.

        Raises:
            ConfigError: if the order moves channels as they must not move.
        """
        where = f"{self.consumer}: an order of {self.heads} x {self.copies} x {self.channels} channels"
        if order.dtype != torch.int64 or order.shape != (self.in_features,):
            raise ConfigError(f"{where} is int64 [{self.in_features}], got {order.dtype} {list(order.shape)}")
        start = torch.arange(0, self.in_features, self.channels, device=order.device)
        within = (order.view(-1, self.channels) - start[:, None]).view(self.heads, self.copies, self.channels)
        first = within[:, 0]
        in_order = torch.arange(self.channels, device=order.device).expand(self.heads, -1)
        if not torch.equal(first.sort(dim=1).values, in_order) or bool((within != first[:, None]).any()):
            raise ConfigError(
                f"{where} must permute the channels of each head, alike in its copies; this one does not"
            )
        return (first + start.view(self.heads, self.copies)[:, :1] // self.copies).flatten()


# --- where ----------------------------------------------------------------------------------------------------------------
def find_absorbable(modules: Mapping[str, nn.Module], config: Any) -> list[Absorbable]:
    """The layers whose input channels may be permuted, with their producers.

    Args:
        modules (`Mapping[str, nn.Module]`): layers by full name that may be changed: of a block, or of a model.
        config (`PretrainedConfig`): of the model; gives the number of attention heads.

    Returns:
        those of which all layers are among `modules`, plain `nn.Linear` or `Conv1D`, and of fitting shapes.
    """
    heads = _query_heads(config)
    found: dict[str, Absorbable] = {}
    for name in modules:
        for consumer, names, in_heads in PAIRS:
            producers = tuple(name.removesuffix(consumer) + producer for producer in names)
            layers = [modules.get(layer) for layer in (name, *producers)]
            if name.endswith(f".{consumer}") and all(type(layer) in (nn.Linear, Conv1D) for layer in layers):
                inputs, outputs = matrix(layers[0]).shape[1], [len(matrix(layer)) for layer in layers[1:]]
                pair = _fitted(Absorbable(name, producers, inputs), outputs, heads if in_heads else 1)
                if pair is not None:
                    found.setdefault(name, pair)
    return list(found.values())


def _query_heads(config: Any) -> int | None:
    """Attention heads of the model; `None` if unknown, or if blocks attend to the values of other blocks."""
    if config is None:
        return None
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_kv_shared_layers", 0)  # Gemma 3n, Gemma 4
    return heads if isinstance(heads, int) and not shared else None


def _fitted(pair: Absorbable, outputs: list[int], heads: int | None) -> Absorbable | None:
    """The pair with its numbers filled in, if the outputs of the producers fit the inputs in that many heads."""
    inputs = pair.channels
    if not heads or inputs % heads:
        return None
    channels = inputs // heads
    if len(set(outputs)) > 1 or outputs[0] % channels or inputs % outputs[0]:
        return None
    return replace(pair, channels=channels, heads=outputs[0] // channels, copies=inputs // outputs[0])


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer or `Conv1D` as `[out, in]`, sharing its storage."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


# --- the change ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def permute(pair: Absorbable, modules: Mapping[str, nn.Module], order: torch.Tensor) -> None:
    """Permute the input channels of the consumer, and the output channels of its producers with them, in place.

    `permute(pair, modules, order.argsort())` takes it back, bit for bit.

    Args:
        pair (`Absorbable`): the layers.
        modules (`Mapping[str, nn.Module]`): layers by name, these among them.
        order (`torch.Tensor`): int64 `[in]`: the new channel i is the old channel `order[i]`.

    Raises:
        ConfigError: if the order moves channels as they must not move; nothing is changed then.
    """
    outputs = pair.producer_order(order)
    consumer = matrix(modules[pair.consumer])
    consumer.copy_(consumer[:, order.to(consumer.device)])
    for name in pair.producers:
        weight, bias = matrix(modules[name]), modules[name].bias
        here = outputs.to(weight.device)
        weight.copy_(weight[here])
        if bias is not None:
            bias.copy_(bias[here])


def permute_statistics(statistics: InputStatistics, order: torch.Tensor) -> InputStatistics:
    """The statistics of the inputs with their channels in this order."""
    order = order.to(statistics.squared_norm.device)
    hessian, inputs = statistics.hessian, statistics.inputs
    return InputStatistics(
        statistics.tokens,
        statistics.squared_norm[order],
        None if hessian is None else hessian[order][:, order],
        None if inputs is None else inputs[:, order.to(inputs.device)],
    )


@torch.no_grad()
def absorb(
    pair: Absorbable,
    modules: Mapping[str, nn.Module],
    order: torch.Tensor,
    block: nn.Module,
    run: Callable[[], torch.Tensor],
) -> bool:
    """Permute if the block computes the same afterwards; else leave everything as it was, and log one line.

    On one sample, before and after: the inputs of the consumer must be the permuted ones to a few roundings, which shows
    that nothing mixes or weights channels on their way; the outputs of all other linear layers, and of the block, must be
    the same, which shows that nothing else reads the producers.

    Args:
        pair (`Absorbable`), modules, order: as in `permute`.
        block (`nn.Module`): holds all the layers.
        run (`Callable`): runs the block on a sample, the same each time, and returns its output.

    Returns:
        whether it was permuted.
    """
    before = _observe(pair, modules, block, run)
    permute(pair, modules, order)
    try:
        problem = _difference(before, _observe(pair, modules, block, run), order)
    except BaseException:
        permute(pair, modules, order.argsort())
        raise
    if problem is None:
        return True
    permute(pair, modules, order.argsort())
    logger.warning(
        "%s: its input channels stay in their order; %s does not absorb another (%s)",
        pair.consumer,
        " and ".join(pair.producers),
        problem,
    )
    return False


_Seen = tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]


def _observe(pair: Absorbable, modules: Mapping[str, nn.Module], block: nn.Module, run: Callable[[], Any]) -> _Seen:
    """Inputs of the consumer, and outputs of the block and of its linear layers but the producers, call by call."""
    inputs: list[torch.Tensor] = []
    outputs: dict[str, list[torch.Tensor]] = {}
    producers = {modules[name] for name in pair.producers}
    handles = [modules[pair.consumer].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))]
    for name, layer in block.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and layer not in producers:
            seen = outputs.setdefault(name, [])
            handles.append(layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.clone())))
    try:
        outputs["the block"] = [run().clone()]
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _difference(before: _Seen, after: _Seen, order: torch.Tensor) -> str | None:
    """What is no longer the same, in words."""
    (old_inputs, old_outputs), (new_inputs, new_outputs) = before, after
    if not any(bool(x.any()) for x in old_inputs):
        return "the sample does not reach it"
    expected = [x[..., order.to(x.device)] for x in old_inputs]
    epsilon = torch.finfo(old_inputs[0].dtype).eps
    if (change := _change(expected, new_inputs)) > max(epsilon, SUMMATION):
        return f"its inputs differ from the permuted ones by {change:.1e}"
    for name, old in old_outputs.items():
        # The consumer sums in another order, and what follows may amplify that.
        if (change := _change(old, new_outputs[name])) > epsilon**0.5:
            return f"the output of {name} changes by {change:.1e}"
    return None


def _change(old: list[torch.Tensor], new: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, the largest of all calls; infinite if shapes differ or it is not a number."""
    if [x.shape for x in old] != [x.shape for x in new]:
        return math.inf
    changes = [_relative(a.float(), b.float()) for a, b in zip(old, new, strict=True)]
    return max((math.inf if math.isnan(change) else change for change in changes), default=0.0)


def _relative(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(torch.float32).tiny))
