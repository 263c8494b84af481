# SPDX-License-Identifier: Apache-2.0
"""What a language model thinks of given continuations of a prompt, and which it writes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..errors import ConfigError
from .perplexity import token_losses
from .running import check_vocabulary, evaluating, input_device

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
    would be in text; a prompt that is too long for the model loses its beginning. What an eos token that the tokenizer puts
    after each text would add is left out.

    Args:
        model (`nn.Module`): a causal language model.
        tokenizer: its tokenizer.
        pairs (`Sequence[tuple[str, str]]`): prompt and continuation.
        progress (`str`, *optional*): show a progress bar of this name, if standard error is a terminal.

    Raises:
        ConfigError: if a continuation is empty, or the tokenizer has tokens that the model has not.
    """
    encoded = [_encode(tokenizer, prompt, continuation) for prompt, continuation in pairs]
    _check_tokens(model, [ids for ids, _ in encoded])
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

    Raises:
        ConfigError: if `max_new_tokens` leaves no position for a prompt, or the tokenizer has tokens that the model has not.
    """
    limit = prompt_room(model, max_new_tokens)
    ends = _ends(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    encoded = [(_tokens(tokenizer, prompt) or [_start(tokenizer)])[-limit:] for prompt in prompts]
    _check_tokens(model, encoded)
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    device = input_device(model)
    with evaluating(model), _nothing_of_its_own(model), torch.no_grad(), _bar(len(prompts), progress) as bar:
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


def prompt_room(model: nn.Module, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, if so many are to be written after it.

    Raises:
        ConfigError: if there is room for none.
    """
    positions = _positions(model)
    if max_new_tokens < 1 or max_new_tokens >= positions:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, the model has {positions} positions; expected at least 1, and one position "
            "left for a prompt"
        )
    return positions - max_new_tokens


def prompt_length(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt."""
    return len(_tokens(tokenizer, prompt))


def _encode(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both, and how many of them are the continuation's."""
    special = not _is_templated(tokenizer, prompt)
    whole, before = _tokens(tokenizer, prompt + continuation, special), _tokens(tokenizer, prompt, special)
    if len(whole) <= len(before) and whole == before[: len(whole)]:
        raise ConfigError(f"the continuation {continuation!r} of {prompt[-40:]!r} has no token")
    while before != whole[: len(before)]:  # the last of them may merge with what follows
        before.pop()
    if not before:  # nothing stands before the first token, so something must
        before = [_start(tokenizer)]
        whole = [*before, *whole]
    return whole, len(whole) - len(before)


def _tokens(tokenizer: Any, text: str, special: bool | None = None) -> list[int]:
    """The tokens of a text that is to go on: without the eos token that some tokenizers put after each text.

    Args:
        special (`bool`, *optional*): add special tokens; by default if the text does not begin with one.
    """
    special = not _is_templated(tokenizer, text) if special is None else special
    ids = tokenizer(
        text, add_special_tokens=special, verbose=False
    ).input_ids  # verbose: its length is dealt with here
    eos = tokenizer.eos_token
    if special and eos and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids = ids[:-1]
    return ids


def _start(tokenizer: Any) -> int:
    """The token that stands before a text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ConfigError("the tokenizer has neither a bos nor an eos token, and the prompt is empty; give a prompt")
    return start


def _check_tokens(model: nn.Module, texts: Sequence[Sequence[int]]) -> None:
    if ids := [token for text in texts for token in text]:
        check_vocabulary(model, torch.tensor(ids)[:, None])


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


@contextlib.contextmanager
def _nothing_of_its_own(model: nn.Module) -> Iterator[None]:
    """The model's own generation config set aside: of it `generate` takes all that is not given, a repetition penalty, beams."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


def _bar(total: int, name: str | None) -> tqdm:
    return tqdm(total=total, desc=name, disable=None if name else True)
