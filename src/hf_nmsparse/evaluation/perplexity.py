# SPDX-License-Identifier: Apache-2.0
"""Token perplexity by the protocol of the pruning papers (SparseGPT, Wanda, MaskLLM)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data import check_tokens, windows
from ..errors import ConfigError

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = 2048
# float32 logits of one chunk: 16 MiB. Larger blocks glibc hands back to the system at each free, which costs page faults.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Perplexity:
    """Token perplexity of a model on a text.

    Args:
        value (`float`): exp(loss).
        loss (`float`): mean negative log-likelihood, nats a scored token.
        standard_error (`float`): of `loss`, from its spread over windows; NaN with a single window. Two models on the
            same windows differ by less noise than this, because their errors are correlated: compare `window_losses`.
        tokens (`int`): scored tokens, `windows x (seq_len - 1)`.
        windows (`int`): windows.
        seq_len (`int`): tokens a window.
        window_losses (`tuple[float, ...]`): mean negative log-likelihood of each window, in their order.
    """

    value: float
    loss: float
    standard_error: float
    tokens: int
    windows: int
    seq_len: int
    window_losses: tuple[float, ...]


def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    seq_len: int = 2048,
    batch_size: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Measure token perplexity: exp of the mean over windows of the mean cross-entropy of a window's L-1 targets.

    The windows follow one another without overlap, the tail is dropped, no bos is put before a window: the protocol of
    GPTQ, SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695) and MaskLLM (arXiv 2409.17481). It depends on the window
    length and the tokenizer, so compare only equal ones; for WikiText join the rows by a blank line first and tokenise
    them as one string.

    Args:
        model (`nn.Module`): a causal language model whose output has `.logits` (`[batch, sequence, vocabulary]`, in any
            dtype; the loss is taken in float32, a chunk of the sequence at a time).
        tokens (`torch.Tensor`): integers `[tokens]`, cut here, or `[windows, sequence]`, taken as they are.
        seq_len (`int`): tokens a window; only for tokens that are not cut yet.
        batch_size (`int`, *optional*): windows a forward pass; by default as many as make 2048 tokens, at least one.
        progress (`bool`): show a progress bar, if standard error is a terminal.

    Returns:
        `Perplexity`. If the loss is not finite a warning says in how many windows.

    Raises:
        ConfigError: if the text is shorter than one window, or a token is not in the model's vocabulary.
    """
    cut = _cut(tokens, seq_len)
    count, seq_len = cut.shape
    _check_fits(model, cut)
    batch_size = max(1, _TOKENS_PER_BATCH // seq_len) if batch_size is None else batch_size
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected at least 1")

    device = model.get_input_embeddings().weight.device
    losses = []
    with _evaluating(model), torch.no_grad():
        bar = tqdm(total=count, desc="perplexity", unit="window", disable=None if progress else True)
        with bar:
            for batch in cut.split(batch_size):
                batch = batch.to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                losses.append(_window_losses(logits, batch).double().cpu())
                bar.update(len(batch))
    return _summary(torch.cat(losses), seq_len)


def _cut(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Windows `[windows, sequence]` of at least two tokens each."""
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        check_tokens(tokens, dimensions=2)
        cut = tokens.long()
    else:
        check_tokens(tokens, dimensions=1)
        if tokens.numel() < seq_len:
            raise ConfigError(
                f"the text has {tokens.numel()} tokens, one window takes seq_len={seq_len}; lower seq_len or use more text"
            )
        cut = windows(tokens, seq_len)
    if cut.shape[1] < 2:
        raise ConfigError(f"windows of {cut.shape[1]} token have nothing to predict; expected at least 2")
    return cut


def _check_fits(model: nn.Module, cut: torch.Tensor) -> None:
    """A token outside the vocabulary would stop a GPU with an assertion that names nothing."""
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


def _window_losses(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each window.

    Args:
        logits (`torch.Tensor`): `[batch, sequence, vocabulary]`, any float dtype.
        batch (`torch.Tensor`): int64 `[batch, sequence]`.

    Returns:
        float32 `[batch]`.
    """
    rows, seq_len, vocabulary = logits.shape
    targets = batch[:, 1:].to(logits.device)
    total = torch.zeros(rows, device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // (rows * vocabulary))
    for start in range(0, seq_len - 1, step):
        stop = min(start + step, seq_len - 1)
        chunk = logits[:, start:stop].flatten(0, 1).float()  # (rows * step, vocabulary)
        losses = F.cross_entropy(chunk, targets[:, start:stop].flatten(), reduction="none")
        total += losses.view(rows, -1).sum(dim=1)
    return total / (seq_len - 1)


def _summary(losses: torch.Tensor, seq_len: int) -> Perplexity:
    """`losses`: float64 `[windows]`."""
    count = losses.numel()
    loss = losses.mean().item()
    if not math.isfinite(loss):
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        logger.warning(
            "the loss is %s: not finite in %d of %d windows, the first is window %d; look for NaN or infinity in the "
            "weights, or evaluate in float32",
            loss,
            len(bad),
            count,
            bad[0],
        )
    return Perplexity(
        value=torch.tensor(loss, dtype=torch.float64).exp().item(),  # inf where math.exp would raise
        loss=loss,
        standard_error=losses.std().item() / math.sqrt(count) if count > 1 else math.nan,
        tokens=count * (seq_len - 1),
        windows=count,
        seq_len=seq_len,
        window_losses=tuple(losses.tolist()),
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is back in the mode it had (they need not all have had the same)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
