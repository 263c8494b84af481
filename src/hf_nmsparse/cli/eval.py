# SPDX-License-Identifier: Apache-2.0
"""`nmsparse eval`: held-out perplexity of a dense, masked or packed model."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ..errors import ConfigError
from .common import facts_table, verb
from .models import load_any, load_model, load_tokenizer, put_mask, stream, window_length
from .options import (
    TEXT_HELP,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    MaskOption,
    MaskRevisionOption,
    MismatchOption,
    ModelArgument,
    TaskOption,
)

TextOption = Annotated[str, typer.Option("--text", metavar="TEXT", help=TEXT_HELP)]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a dataset.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Use only the first N tokens.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Windows a forward pass.")]


def evaluate(
    model: ModelArgument,
    text: TextOption,
    mask: MaskOption = None,
    split: SplitOption = "test",
    sequence_length: LengthOption = None,
    max_tokens: MaxTokensOption = None,
    batch_size: BatchOption = None,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure token perplexity of a model, a model under a mask, a mask (on the base it names) or a packed model.

    The protocol of the pruning papers: documents joined by a blank line, windows without overlap.

    Example: nmsparse eval my-packed-model --text Salesforce/wikitext:wikitext-2-raw-v1
    """
    with verb(json_output) as answer:
        from ..evaluation import perplexity

        if mask is None:
            loaded, tokenizer_source = load_any(model, dtype, device)
        else:
            loaded, tokenizer_source = load_model(model, dtype, device), model
            loaded = put_mask(loaded, mask, mask_revision, task, allow_base_mismatch)
        tokens = stream(text, load_tokenizer(tokenizer_source), split, joined=True)[:max_tokens]
        length = window_length(loaded, sequence_length)
        if len(tokens) < length:
            raise ConfigError(f"{text}: {len(tokens)} tokens, one window takes {length}; lower --sequence-length")
        found = perplexity(loaded, tokens, seq_len=length, batch_size=batch_size, progress=True)
        facts = dataclasses.asdict(found)
        del facts["window_losses"]  # of long texts, thousands
        answer.facts = {"model": model, "mask": mask, "text": text, "perplexity": facts.pop("value"), **facts}
        answer.show(
            facts_table(
                f"{model}{f' under {mask}' if mask else ''} on {text}",
                {
                    "perplexity": f"{found.value:.3f}",
                    "loss": f"{found.loss:.4f} +- {found.standard_error:.4f} nats a token",
                    "scored": f"{found.tokens} tokens, {found.windows} windows of {found.seq_len}",
                },
            )
        )
