# SPDX-License-Identifier: Apache-2.0
"""What a language model thinks of given continuations of a prompt, and which it writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..errors import ConfigError
from .perplexity import token_losses
from .running import evaluating, input_device

_TOKENS_PER_BATCH = 4096  # padding included
_PROMPTS_PER_BATCH = 32  # written to at once


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation after its prompt, in nats, over all its tokens, and how many these are."""

    value: float
    tokens: int


def log_likelihoods(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], progress: str | None = None
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its prompt.

    Prompt and continuation are tokenised as one text and split where the prompt's own tokens end, so that both are as they
    would be in text; a prompt that is too long for the model loses its beginning.

    Args:
        model (`nn.Module`): a causal language model.
        tokenizer: its tokenizer.
        pairs (`Sequence[tuple[str, str]]`): prompt and continuation.
        progress (`str`, *optional*): show a progress bar of this name, if standard error is a terminal.

    Raises:
        ConfigError: if a continuation is empty.
    """
    encoded = [_encode(tokenizer, prompt, continuation) for prompt, continuation in pairs]
    limit = _positions(model)
    encoded = [(ids[-limit:], min(count, limit - 1)) for ids, count in encoded]
    found: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -len(encoded[index][0]))
    device = input_device(model)
    with evaluating(model), torch.no_grad(), _bar(len(pairs), progress) as bar:
        while order:
            size = max(1, _TOKENS_PER_BATCH // len(encoded[order[0]][0]))
            chosen, order = order[:size], order[size:]
            rows = [torch.tensor(encoded[index][0]) for index in chosen]
            ids = pad_sequence(rows, batch_first=True, padding_value=0).to(device)
            attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
            losses = token_losses(model(input_ids=ids, attention_mask=attention, use_cache=False).logits, ids).cpu()
            for index, row, loss in zip(chosen, rows, losses, strict=True):
                count = encoded[index][1]
                found[index] = Likelihood(-loss[len(row) - 1 - count : len(row) - 1].double().sum().item(), count)
            bar.update(len(chosen))
    return found


def write_greedily(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, progress: str | None = None
) -> list[list[int]]:
    """The tokens that follow each prompt if the likeliest one is taken each time, up to and without the end of text.

    Args:
        model (`nn.Module`): a causal language model of Transformers.
        tokenizer: its tokenizer.
        prompts (`Sequence[str]`): texts; those of chat templates hold their special tokens already.
        max_new_tokens (`int`): at most so many.
        progress (`str`, *optional*): show a progress bar of this name, if standard error is a terminal.
    """
    ends = _ends(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    limit = _positions(model) - max_new_tokens
    if limit < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, the model has {_positions(model)} positions: none is left for a prompt"
        )
    encoded = [
        tokenizer(prompt, add_special_tokens=not _is_templated(tokenizer, prompt)).input_ids[-limit:]
        for prompt in prompts
    ]
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    device = input_device(model)
    with evaluating(model), torch.no_grad(), _bar(len(prompts), progress) as bar:
        while order:
            chosen, order = order[:_PROMPTS_PER_BATCH], order[_PROMPTS_PER_BATCH:]
            longest = len(encoded[chosen[0]])
            ids = torch.full((len(chosen), longest), config.pad_token_id)
            attention = torch.zeros_like(ids)
            for row, index in enumerate(chosen):  # padded on the left: all go on at the same position
                length = len(encoded[index])
                ids[row, longest - length :] = torch.tensor(encoded[index])
                attention[row, longest - length :] = 1
            written = model.generate(
                input_ids=ids.to(device), attention_mask=attention.to(device), generation_config=config
            )
            for row, index in enumerate(chosen):
                found[index] = _until(written[row, longest:].tolist(), ends)
            bar.update(len(chosen))
    return found


def _encode(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both, and how many of them are the continuation's."""
    special = not _is_templated(tokenizer, prompt)
    whole = tokenizer(prompt + continuation, add_special_tokens=special).input_ids
    before = tokenizer(prompt, add_special_tokens=special).input_ids
    while before and before != whole[: len(before)]:  # the last of them may merge with what follows
        before.pop()
    if not before:  # nothing stands before the first token, so something must
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError(
                "the tokenizer has neither a bos nor an eos token, and the prompt is empty; give a prompt"
            )
        whole = [start, *whole]
        before = [start]
    if len(whole) == len(before):
        raise ConfigError(f"the continuation {continuation!r} of {prompt[-40:]!r} has no token")
    return whole, len(whole) - len(before)


def _is_templated(tokenizer: Any, prompt: str) -> bool:
    """Whether a text begins with a special token, as chat templates write it; a second one must not be put before it."""
    return any(token and prompt.startswith(token) for token in tokenizer.all_special_tokens)


def _positions(model: nn.Module) -> int:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**31


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return (found | {tokenizer.eos_token_id}) - {None}


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


def _bar(total: int, name: str | None) -> tqdm:
    return tqdm(total=total, desc=name, disable=None if name else True)
