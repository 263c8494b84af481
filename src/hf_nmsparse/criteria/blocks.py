# SPDX-License-Identifier: Apache-2.0
"""A model seen as a stack of decoder blocks: find them, find their linear layers, run them one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError


def find_blocks(model: nn.Module, holding: Collection[nn.Module] | None = None) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: of the outermost `nn.ModuleList`s the one that holds most.

    Args:
        model (`nn.Module`): the model.
        holding (`Collection[nn.Module]`, *optional*): modules to be held; by default all linear layers, by weights.

    Raises:
        UnsupportedError: if no `nn.ModuleList` holds any.
    """
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inner:
            inner.update(module.modules())
            held = module.modules()
            size = sum(map(_linear_size, held)) if holding is None else sum(child in holding for child in held)
            if size > best[0]:
                best = (size, name, module)
    if best[2] is None:
        raise UnsupportedError(
            f"{type(model).__name__}: looked for its decoder blocks, an nn.ModuleList that holds the linear layers, "
            "and found none"
        )
    return best[1], best[2]


def find_linears(model: nn.Module, dense_layers: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The layers to prune: every `nn.Linear` inside the decoder blocks, by full name, in the order of the model.

    What lies outside the blocks (embeddings, `lm_head`) and layers that share their weight with another are left out.

    Args:
        model (`nn.Module`): a causal language model.
        dense_layers (`Iterable[str]`): names to leave dense: a full module name or any run of its parts
            (`"down_proj"`, `"mlp.up_proj"`, `"layers.0"`).

    Raises:
        ConfigError: if an entry of `dense_layers` matches no module of the model, or no layer is left.
        UnsupportedError: naming layers that are no plain `nn.Linear`: packed, quantised, or wrapped by PEFT.
    """
    dense_layers = [dense_layers] if isinstance(dense_layers, str) else list(dense_layers)
    names = [name for name, _ in model.named_modules()]
    for entry in dense_layers:
        if not any(name_matches(name, entry) for name in names):
            raise ConfigError(f"dense_layers: {entry!r} matches no module of {type(model).__name__}")
    prefix, blocks = find_blocks(model)
    inside = [(f"{prefix}.{name}" if prefix else name, module) for name, module in blocks.named_modules()]
    inside = [
        (name, module) for name, module in inside if not any(name_matches(name, entry) for entry in dense_layers)
    ]
    # Layers of every kind, quantised and wrapped ones too, carry in_features and out_features by convention.
    foreign = [
        name
        for name, module in inside
        if type(module) is not nn.Linear and hasattr(module, "in_features") and hasattr(module, "out_features")
    ]
    if foreign:
        kind = type(model.get_submodule(foreign[0])).__name__
        raise UnsupportedError(
            f"{foreign[0]} is a {kind}, not a plain nn.Linear ({len(foreign)} such layers); merge the adapter, decompress "
            "or dequantise the model first, or name them in dense_layers"
        )
    tied = _tied_weights(model)
    found = {name: module for name, module in inside if type(module) is nn.Linear and id(module.weight) not in tied}
    if not found:
        raise ConfigError(f"{type(model).__name__}: no nn.Linear left to prune inside {prefix!r}; check dense_layers")
    return found


def name_matches(name: str, entry: str) -> bool:
    """Whether `entry` is the module name `name` or any run of its parts: "down_proj", "mlp.up_proj", "layers.0"."""
    return f".{entry}." in f".{name}."


def _linear_size(module: nn.Module) -> int:
    features = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    return features[0] * features[1]


def _tied_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


# --- running block by block -----------------------------------------------------------------------------------------
@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _StopForwardError(Exception):
    """Raised inside the model's forward when the last block has been reached."""


@dataclass
class Sample:
    """One calibration batch on its way through the blocks.

    Args:
        hidden (`torch.Tensor`): what enters the next block, `[batch, sequence, hidden]`.
        calls (`list`): for each block the other arguments that the model passes to it: positional, by keyword.
            Tensors are shared between blocks.
        real (`torch.Tensor`, *optional*): bool `[batch, sequence]`, false at padding; `None` without padding.
    """

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    real: torch.Tensor | None = None


def record_sample(model: nn.Module, blocks: nn.ModuleList, batch: dict[str, torch.Tensor]) -> Sample:
    """Run what comes before the blocks, and note what the model passes to each. No block computes but the first.

    The arguments are recorded for each block by itself because some models alternate attention masks or position
    embeddings between blocks (Gemma 3, Qwen 2 with sliding windows).

    Raises:
        UnsupportedError: if the blocks are not called once each, in order, hidden states first.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    sample = Sample(torch.empty(0), real=_real_tokens(batch))
    with _pass_through(blocks, sample), suppress(_StopForwardError):
        model(**batch, use_cache=False)
    if len(sample.calls) != len(blocks):
        raise UnsupportedError(
            f"{type(model).__name__}: its forward called {len(sample.calls)} of {len(blocks)} blocks; "
            "only models that run their blocks once each, in order, can be pruned block by block"
        )
    return sample


@contextmanager
def _pass_through(blocks: nn.ModuleList, sample: Sample) -> Iterator[None]:
    """For the time of the context the blocks record their arguments and hand the hidden states on unchanged."""
    own = [block.__dict__.get("forward") for block in blocks]
    extra: list[tuple[Any, ...] | None] = [None]  # what a block returns beside hidden states; None: a bare tensor

    def recorder(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(sample.calls) != index:
                raise UnsupportedError(f"block {index} was called out of order; it can't be run by itself")
            args, kwargs, hidden = _split_hidden(args, kwargs)
            sample.calls.append((args, kwargs))
            if index == 0:
                sample.hidden = hidden
            if index == len(blocks) - 1:
                raise _StopForwardError
            if index == 0:
                output = original(hidden, *args, **kwargs)
                extra[0] = output[1:] if isinstance(output, tuple) else None
            return hidden if extra[0] is None else (hidden, *extra[0])

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states", None)
    if not isinstance(hidden, torch.Tensor):
        raise UnsupportedError("the decoder blocks don't take hidden states as their first argument")
    return args[1:], kwargs, hidden


def _real_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def run_block(block: nn.Module, index: int, sample: Sample) -> torch.Tensor:
    """The hidden states that leave block `index`."""
    args, kwargs = sample.calls[index]
    output = block(sample.hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
