# SPDX-License-Identifier: Apache-2.0
"""A model run block by block: note what it passes to the blocks of a stack, then run them one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError
from .targets import is_encoder_decoder, name_matches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and fused experts one by one, so that their inputs can be seen; afterwards all is as it was."""
    training = {module: module.training for module in model.modules()}
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    experts = [(part, part.get_experts_implementation()) for part in parts]
    try:
        model.eval()
        for part in parts:
            part.set_experts_implementation("eager")
        yield
    finally:
        for part, implementation in experts:
            part.set_experts_implementation(implementation)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For the time of the context `module` computes `forward`."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own


@dataclass
class Sample:
    """One calibration batch on its way through the blocks of one stack.

    Args:
        hidden (`torch.Tensor`): what enters the next block, `[batch, sequence, hidden]`.
        calls (`list`): for each block the other arguments that the model passes to it: positional, by keyword.
            Tensors are shared between blocks.
        real (`torch.Tensor`, *optional*): bool `[batch, sequence]`, false at padding; `None` without padding.
        context_real (`torch.Tensor`, *optional*): the same for what the blocks attend to besides: in a decoder that has
            an encoder, the tokens of the encoder.
    """

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    real: torch.Tensor | None = None
    context_real: torch.Tensor | None = None

    def real_tokens(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of `x`, the input of some layer of block `index`, are no padding; `None`: all."""
        args, kwargs = self.calls[index]
        is_context = x is not self.hidden and any(x is other for other in (*args, *kwargs.values()))
        return self.context_real if is_context else self.real

    def tokens(self) -> int:
        """Tokens that enter the stack, padding not counted."""
        whole = self.hidden.shape[:-1]
        return int(self.real.sum()) if self.real is not None and self.real.shape == whole else whole.numel()


class _StopForwardError(Exception):
    """Raised inside the model's forward when the last block has been reached."""


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What to pass to the forward of the model: the batch on its device, no cache where there could be one.

    An encoder-decoder model that gets `input_ids` and nothing for its decoder gets the same tokens there.

    Raises:
        ConfigError: if the model takes something else than tokens and gets nothing but tokens.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids" and set(batch) == {"input_ids"}:
        raise ConfigError(
            f"{type(model).__name__} takes {main}, and the calibration is tokens; pass an iterable of model inputs: "
            f"[{{{main!r}: ...}}, ...]"
        )
    # Inputs of offloaded parts are moved by accelerate.
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    for_decoder = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
    if is_encoder_decoder(model) and "input_ids" in inputs and for_decoder.isdisjoint(inputs):
        inputs["decoder_input_ids"] = inputs["input_ids"]
        inputs.setdefault("decoder_attention_mask", inputs.get("attention_mask"))
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def record_sample(model: nn.Module, name: str, blocks: nn.ModuleList, batch: Mapping[str, Any]) -> Sample:
    """Run what comes before the blocks, and note what the model passes to each. No block computes but the first.

    The arguments are recorded for each block by itself because some models alternate attention masks or position
    embeddings between blocks (Gemma 3, Qwen 2 with sliding windows). What the first block returns beside hidden states
    is handed to the others (the position bias of T5).

    Raises:
        ConfigError: see `model_inputs`.
        UnsupportedError: if the blocks are not called once each, in order, hidden states first, each with what the one
            before returned.
    """
    inputs = model_inputs(model, batch)
    real = context_real = _real_tokens(inputs.get("attention_mask"))
    if is_encoder_decoder(model) and name_matches(name, "decoder"):
        real = _real_tokens(inputs.get("decoder_attention_mask"))
    sample = Sample(torch.empty(0), real=real, context_real=context_real)
    with _pass_through(name, blocks, sample), suppress(_StopForwardError):
        model(**inputs)
    if len(sample.calls) != len(blocks):
        raise UnsupportedError(
            f"{type(model).__name__}: its forward called {len(sample.calls)} of {len(blocks)} blocks of {name!r}; "
            "only models that run their blocks once each, in order, can be pruned block by block"
        )
    return sample


@contextmanager
def _pass_through(name: str, blocks: nn.ModuleList, sample: Sample) -> Iterator[None]:
    """For the time of the context the blocks record their arguments and hand the hidden states on unchanged."""
    extra: list[tuple[Any, ...] | None] = [None]  # what a block returns beside hidden states; None: a bare tensor

    def recorder(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(sample.calls) != index:
                raise UnsupportedError(f"block {name}.{index} was called out of order; it can't be run by itself")
            args, kwargs, hidden = _split_hidden(name, args, kwargs)
            sample.calls.append((args, kwargs))
            if index == 0:
                sample.hidden = hidden
            elif hidden is not sample.hidden:
                raise UnsupportedError(
                    f"the model changes the hidden states before block {name}.{index}; it can't be run block by block"
                )
            if index == len(blocks) - 1:
                raise _StopForwardError
            if index == 0:
                output = original(hidden, *args, **kwargs)
                extra[0] = output[1:] if isinstance(output, tuple) else None
            return hidden if extra[0] is None else (hidden, *extra[0])

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, recorder(index, block.forward)))
        yield


def _split_hidden(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states", None)
    if not isinstance(hidden, torch.Tensor):
        raise UnsupportedError(f"the blocks {name!r} don't take hidden states as their first argument")
    return args[1:], kwargs, hidden


def _real_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def in_order_of_execution(
    model: nn.Module, stacks: list[tuple[str, nn.ModuleList]], batch: Mapping[str, Any]
) -> list[tuple[str, nn.ModuleList]]:
    """The stacks in the order in which a forward of the model enters them.

    Raises:
        UnsupportedError: naming a stack that is not run.
    """
    entered: list[str] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda *_, name=name: entered.append(name)) for name, blocks in stacks
    ]
    try:
        model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name, _ in stacks if name not in entered]:
        raise UnsupportedError(
            f"the blocks {missing[0]!r} were never called during calibration; leave them dense or give the model the "
            "inputs that reach them"
        )
    return sorted(stacks, key=lambda stack: entered.index(stack[0]))


def run_block(block: nn.Module, index: int, sample: Sample) -> torch.Tensor:
    """The hidden states that leave block `index`."""
    args, kwargs = sample.calls[index]
    output = block(sample.hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
