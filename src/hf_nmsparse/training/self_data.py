# SPDX-License-Identifier: Apache-2.0
"""`self_data`: the dense model writes the text that its masks are learned or calibrated on, where there is no other.

The recipe is LLM-QAT's hybrid one (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
arXiv 2305.17888, section 2.1): a first token drawn from the vocabulary for variety, a few likeliest ones after it so that
the text gets a footing, and from then on tokens sampled from the model's own distribution.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import ConfigError, UnsupportedError
from .distillation import dense_base, is_encoder_decoder

_LIKELIEST = 4  # tokens after the first one; LLM-QAT takes 3 to 5


def self_data(
    model: nn.Module,
    start: Any,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 16,
    progress: bool = True,
) -> torch.Tensor:
    """Have the dense model write windows of text, each with texts one after the other.

    Masks and other adapters are off while it writes; it is as before afterwards. A text begins with the start token, a
    token drawn from the vocabulary and the four likeliest after it; all others are sampled at `temperature` from the whole
    distribution (no top-k, no penalties, whatever the model's generation config says). After an end-of-text token the next
    text begins.

    What is drawn depends on `seed` and a window's index, not on `batch_size` or `samples`, and torch's own generators are
    left alone. The model rounds a little differently in another batch or on another machine, which once in a long while
    turns a token, and with it the rest of its window.

    Args:
        model (`nn.Module`): a decoder-only language model of Transformers, with or without adapters.
        start (tokenizer or `int`): the tokenizer, whose bos (else eos) token begins a text, and whose special tokens are
            not drawn; or the id of the start token.
        samples (`int`): windows to write.
        sequence_length (`int`): tokens a window, start token included.
        seed (`int`): seed of what is drawn.
        temperature (`float`): by which logits are divided where tokens are sampled.
        batch_size (`int`): windows written at a time.
        progress (`bool`): show a progress bar, if standard error is a terminal.

    Returns:
        int64 `[samples, sequence_length]`, on the CPU.

    Raises:
        ConfigError: on a number out of range, windows longer than the model's context, or without a start token.
        UnsupportedError: if the model cannot write text (encoders, encoder-decoders, other tasks).
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_model(model)
    for name, value, lowest in (
        ("samples", samples, 1),
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
    ):
        if value < lowest:
            raise ConfigError(f"self_data: {name}={value}; expected at least {lowest}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ConfigError(f"self_data: temperature={temperature}; expected a finite number above 0")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ConfigError(
            f"self_data: sequence_length={sequence_length}, but the model reads at most {context} tokens"
        )
    first, ends, openings = _vocabulary(model, start)

    # A generator for each window, with seeds that windows of other `seed`s do not share.
    seeds = torch.randint(2**63 - 1, (samples,), generator=torch.Generator().manual_seed(seed))
    bar = tqdm(
        total=samples * (sequence_length - 1),
        desc="self-written text",
        unit="token",
        disable=None if progress else True,
    )
    written = []
    with bar, dense_base(model), _plain_generation(model):
        for batch in seeds.split(batch_size):
            draws = torch.stack(
                [
                    torch.rand(2, sequence_length, dtype=torch.float64, generator=torch.Generator().manual_seed(own))
                    for own in batch.tolist()
                ]
            )
            writer = _Writer(draws.to(model.device), first, ends, openings, temperature, bar.update)
            prompt = torch.full((len(batch), 1), first, device=model.device)
            written.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    logits_processor=LogitsProcessorList([writer]),
                    max_length=sequence_length,
                ).cpu()
            )
    return torch.cat(written)


class _Writer(LogitsProcessor):
    """Chooses each next token, and leaves it as the only one possible.

    Args:
        draws (`torch.Tensor`): uniform numbers, float64 `[rows, 2, sequence]`: for sampling, and for tokens that begin texts.
        first (`int`): the start token.
        ends (`torch.Tensor`): ids of tokens that end a text, int64 `[any]`.
        openings (`torch.Tensor`): ids of tokens that may come after the start token, int64 `[any]`.
        temperature (`float`): of sampling.
        wrote (`Callable[[int], object]`): called with the number of tokens chosen.
    """

    def __init__(
        self,
        draws: torch.Tensor,
        first: int,
        ends: torch.Tensor,
        openings: torch.Tensor,
        temperature: float,
        wrote: Callable[[int], object],
    ) -> None:
        self.draws, self.first, self.temperature, self.wrote = draws, first, temperature, wrote
        self.ends, self.openings = ends.to(draws.device), openings.to(draws.device)
        self.starts_at_end = first in ends.tolist()
        self.age = torch.zeros(len(draws), dtype=torch.int64, device=draws.device)  # tokens since the start token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` `[rows, tokens]`, `scores` `[rows, vocabulary]` -> of the same shape, -infinity but for one a row."""
        sampling, opening = self.draws[:, :, input_ids.shape[1]].unbind(1)
        ended = torch.isin(input_ids[:, -1], self.ends) & (self.age > 0)
        self.age.masked_fill_(ended, 0 if self.starts_at_end else -1)
        chosen = torch.where(self.age <= _LIKELIEST, scores.argmax(-1), self._sample(scores, sampling))
        chosen = torch.where(self.age == 0, self.openings[(opening * len(self.openings)).long()], chosen)
        chosen = torch.where(self.age == -1, self.first, chosen)
        self.age += 1
        self.wrote(len(chosen))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _sample(self, scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """The token at which the cumulative distribution passes a uniform number."""
        cumulative = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(-1)
        found = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)
        return found.squeeze(1).clamp_(max=scores.shape[1] - 1)


def _check_model(model: nn.Module) -> None:
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise UnsupportedError(
            f"self_data: a {type(model).__name__} cannot write text; it takes a causal language model of Transformers"
        )
    if is_encoder_decoder(model):
        raise UnsupportedError(
            f"self_data: a {type(model).__name__} writes answers to what its encoder reads, so it has no text of its own; "
            "it takes a decoder-only language model"
        )


def _vocabulary(model: nn.Module, start: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The start token, the tokens that end a text, and those that may follow the start token."""
    vocabulary = model.config.get_text_config().vocab_size
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    if isinstance(start, int):
        first, special = start, {start, getattr(model.generation_config, "pad_token_id", None)}
    else:
        first = start.bos_token_id if start.bos_token_id is not None else start.eos_token_id
        if first is None:
            raise ConfigError(
                "self_data: the tokenizer has neither a bos nor an eos token to begin a text with; pass the id of another "
                "token in its place"
            )
        ends.add(start.eos_token_id)
        special = set(start.all_special_ids)
        vocabulary = min(vocabulary, len(start))  # rows beyond it fill the embedding up
    if not 0 <= first < vocabulary:
        raise ConfigError(f"self_data: start token {first}; expected an id from 0 to {vocabulary - 1}")
    ends.discard(None)
    openings = [token for token in range(vocabulary) if token not in special | ends]
    if not openings:
        raise ConfigError(f"self_data: all {vocabulary} tokens are special ones, so none can begin a text")
    return first, torch.tensor(sorted(ends), dtype=torch.int64), torch.tensor(openings)


@contextlib.contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """For the time of the context `generate` stops at no token, and changes no logits but by what it is given."""
    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True)
    try:
        yield
    finally:
        model.generation_config = before
