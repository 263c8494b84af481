# SPDX-License-Identifier: Apache-2.0
"""Token perplexity by the protocol of the pruning papers (SparseGPT, Wanda, MaskLLM)."""

from __future__ import annotations

import itertools
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
from .running import check_vocabulary, each_batch, evaluating, input_device

logger = logging.getLogger(__name__)

# float32 logits of one chunk: 16 MiB. Larger blocks glibc hands back to the system at each free, which costs page faults.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Perplexity:
    """Token perplexity of a model on a text.

    Args:
        value (`float`): exp(loss).
        loss (`float`): mean negative log-likelihood, nats a scored token.
        standard_error (`float`): of `loss`, from its spread over windows; NaN with a single window. Two models on the
            same windows differ by less noise than this, because their errors are correlated: compare `window_losses`.
        tokens (`int`): scored tokens: `windows x (seq_len - 1)`, or with a stride all but the first.
        windows (`int`): windows.
        seq_len (`int`): tokens a window.
        window_losses (`tuple[float, ...]`): mean negative log-likelihood of each window, in their order.
        stride (`int`, *optional*): `None`: windows without overlap, the protocol of the papers; else a sliding window. The
            two must not be compared with each other.
    """

    value: float
    loss: float
    standard_error: float
    tokens: int
    windows: int
    seq_len: int
    window_losses: tuple[float, ...]
    stride: int | None = None

    def per(self, units: int) -> float:
        """Perplexity a unit of text instead of a token: exp(total negative log-likelihood / units).

        For word perplexity, `units` are the words of the whole text, `len(text.split())`, and the text was measured with a
        stride, so that each of its tokens was scored.

        Raises:
            ConfigError: if it was measured without a stride, which leaves out tokens, or `units` is not positive.
        """
        if self.stride is None:
            raise ConfigError(
                "windows without overlap leave out tokens of the text; measure with a stride for units of it"
            )
        if units < 1:
            raise ConfigError(f"units={units}; expected at least 1")
        return _exp(self.loss * self.tokens / units)


def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    seq_len: int = 2048,
    batch_size: int | None = None,
    progress: bool = False,
    stride: int | None = None,
) -> Perplexity:
    """Measure token perplexity: exp of the mean over windows of the mean cross-entropy of a window's L-1 targets.

    The windows follow one another without overlap, the tail is dropped, no bos is put before a window: the protocol of
    GPTQ, SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695) and MaskLLM (arXiv 2409.17481). It depends on the window
    length and the tokenizer, so compare only equal ones; for WikiText join the rows by a blank line first and tokenise
    them as one string.

    With a stride the window slides: every token but the first is scored exactly once, after at least `seq_len - stride`
    others (the first ones of the text after fewer). That is another measure, lower than the papers'. With
    `stride = seq_len - 1` it is the rolling likelihood of lm-evaluation-harness, on tokens that begin with its prefix token.

    Args:
        model (`nn.Module`): a causal language model whose output has `.logits` (`[batch, sequence, vocabulary]`, in any
            dtype; the loss is taken in float32, a chunk of the sequence at a time).
        tokens (`torch.Tensor`): integers `[tokens]`, cut here, or `[windows, sequence]`, taken as they are.
        seq_len (`int`): tokens a window; only for tokens that are not cut yet.
        batch_size (`int`, *optional*): windows a forward pass; by default as many as make 2048 tokens (16384 on a GPU), at
            least one, and fewer where memory runs out.
        progress (`bool`): show a progress bar, if standard error is a terminal.
        stride (`int`, *optional*): tokens that each further window scores, from 1 to seq_len - 1.

    Returns:
        `Perplexity`. If the loss is not finite a warning says in how many windows.

    Raises:
        ConfigError: if the text is shorter than one window, or a token is not in the model's vocabulary.
    """
    cut, scored = (cut_windows(tokens, seq_len), None) if stride is None else _sliding(tokens, seq_len, stride)
    count, seq_len = cut.shape
    check_vocabulary(model, cut)

    def losses_of(ids: torch.Tensor) -> torch.Tensor:
        return token_losses(model(input_ids=ids, use_cache=False).logits, ids).double().cpu()

    losses = []
    with evaluating(model), torch.no_grad():
        bar = tqdm(total=count, desc="perplexity", unit="window", disable=None if progress else True)
        with bar:
            for found in each_batch(losses_of, cut, batch_size, input_device(model)):
                losses.append(found)
                bar.update(len(found))
    return _summary(torch.cat(losses), scored, seq_len, stride)


def cut_windows(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Windows `[windows, sequence]` of at least two tokens each, one after the other.

    Raises:
        ConfigError: if the text is shorter than one window.
    """
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


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token but the first, in nats.

    Args:
        logits (`torch.Tensor`): `[batch, sequence, vocabulary]`, any float dtype.
        ids (`torch.Tensor`): int64 `[batch, sequence]`.

    Returns:
        float32 `[batch, sequence - 1]`.
    """
    rows, seq_len, vocabulary = logits.shape
    targets = ids[:, 1:].to(logits.device)
    losses = torch.empty(rows, seq_len - 1, device=logits.device)
    for part in chunks(seq_len - 1, rows * vocabulary):
        chunk = logits[:, part].flatten(0, 1).float()  # (rows * part, vocabulary)
        losses[:, part] = F.cross_entropy(chunk, targets[:, part].flatten(), reduction="none").view(rows, -1)
    return losses


def chunks(positions: int, elements: int) -> Iterator[slice]:
    """Positions in parts whose logits, `elements` a position, are small enough to be taken in float32 at once."""
    step = max(1, CHUNK_ELEMENTS // elements)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def _sliding(tokens: torch.Tensor, seq_len: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that overlap, `[windows, sequence]`, and which of their targets each scores, bool `[windows, sequence - 1]`."""
    check_tokens(tokens, dimensions=1)
    count = tokens.numel()
    if count < 2:
        raise ConfigError(f"a text of {count} token has nothing to predict; expected at least 2")
    seq_len = min(seq_len, count)
    if not 1 <= stride < seq_len:
        raise ConfigError(
            f"stride={stride}; expected 1 to {seq_len - 1}, one less than the window (seq_len, or the text if that is shorter)"
        )
    ends = [*range(seq_len, count, stride), count]
    cut = torch.stack([tokens[end - seq_len : end] for end in ends]).long()
    new = torch.tensor([seq_len - 1, *(end - before for before, end in itertools.pairwise(ends))])
    return cut, torch.arange(seq_len - 1) >= seq_len - 1 - new[:, None]


def _summary(losses: torch.Tensor, scored: torch.Tensor | None, seq_len: int, stride: int | None) -> Perplexity:
    """`losses`: float64 `[windows, sequence - 1]`; `scored`: which of them count, `None`: all."""
    counts = torch.full((len(losses),), float(losses.shape[1]), dtype=torch.float64)
    if scored is not None:
        losses, counts = losses.where(scored, 0.0), scored.sum(dim=1).double()
    by_window = losses.sum(dim=1) / counts
    count, total = len(losses), counts.sum()
    loss = ((counts * by_window).sum() / total).item()
    if not math.isfinite(loss):
        bad = (~by_window.isfinite()).nonzero().flatten().tolist()
        logger.warning(
            "the loss is %s: not finite in %d of %d windows, the first is window %d; look for NaN or infinity in the "
            "weights, or evaluate in float32",
            loss,
            len(bad),
            count,
            bad[0],
        )
    spread = ((counts * (by_window - loss)).square().sum() * count / (count - 1)).sqrt() / total if count > 1 else None
    return Perplexity(
        value=_exp(loss),
        loss=loss,
        standard_error=math.nan if spread is None else spread.item(),
        tokens=int(total),
        windows=count,
        seq_len=seq_len,
        window_losses=tuple(by_window.tolist()),
        stride=stride,
    )


def _exp(loss: float) -> float:
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where math.exp would raise
