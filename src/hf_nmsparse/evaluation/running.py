# SPDX-License-Identifier: Apache-2.0
"""Running a model over windows of tokens: in evaluation mode, in batches that fit, with its own tokens only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = {"cpu": 2048}
_TOKENS_ON_A_GPU = 16384
Result = TypeVar("Result")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is back in the mode it had (they need not all have had the same)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its tokens."""
    return model.get_input_embeddings().weight.device


def each_batch(
    measure: Callable[[torch.Tensor], Result], cut: torch.Tensor, batch_size: int | None, device: torch.device
) -> Iterator[Result]:
    """What `measure` finds for each batch of windows, in their order.

    Args:
        measure: takes int64 `[batch, sequence]` on `device`.
        cut (`torch.Tensor`): int64 `[windows, sequence]`.
        batch_size (`int`, *optional*): windows a batch; by default as many as make 2048 tokens (16384 on a GPU), at least
            one, and half as many each time that a GPU's memory runs out.

    Raises:
        ConfigError: if the batch size is below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected at least 1")
    size = batch_size or max(1, _TOKENS_PER_BATCH.get(device.type, _TOKENS_ON_A_GPU) // cut.shape[1])
    start = 0
    while start < len(cut):
        try:
            found = measure(cut[start : start + size].to(device))
        except torch.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise
            size //= 2
            logger.warning("memory ran out; going on with %d windows a forward pass", size)
            continue
        yield found
        start += size


def check_vocabulary(model: nn.Module, cut: torch.Tensor) -> None:
    """Refuse tokens outside the vocabulary, which would stop a GPU with an assertion that names nothing; windows longer than
    the model's positions are logged.

    Raises:
        ConfigError: with the ids found and expected.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = (int(value) for value in torch.aminmax(cut))
    if low < 0 or high >= vocabulary:
        raise ConfigError(
            f"token ids go from {low} to {high}, the model has embeddings for 0 to {vocabulary - 1}; tokenise the text "
            "with this model's tokenizer"
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and cut.shape[1] > limit:
        logger.warning(
            "windows of %d tokens are longer than the model's %d positions; lower seq_len", cut.shape[1], limit
        )
