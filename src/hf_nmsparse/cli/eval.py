# SPDX-License-Identifier: Apache-2.0
"""`nmsparse eval`: held-out perplexity of a dense, masked or packed model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, FormatError
from .common import command_line, facts_table, verb
from .folders import RESULTS_FILE, Kind, kind_of
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

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..evaluation import Perplexity
    from ..results import RunResults

TextOption = Annotated[str, typer.Option("--text", metavar="TEXT", help=TEXT_HELP)]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a dataset.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Use only the first N tokens.")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Windows a forward pass.")]
RecordOption = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Measure the dense base too, and write both into results.json and the card of the local folder MODEL.",
    ),
]

_CARDS = {Kind.MASK: "mask", Kind.PACKED: "packed", Kind.MODEL: "masked"}


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
    record: RecordOption = False,
    json_output: JsonOption = False,
) -> None:
    """Measure token perplexity of a model, a model under a mask, a mask (on the base it names) or a packed model.

    The protocol of the pruning papers: documents joined by a blank line, windows without overlap.

    Example: nmsparse eval my-packed-model --text Salesforce/wikitext:wikitext-2-raw-v1

    Example: nmsparse eval my-mask --text law.txt --record
    """
    with verb(json_output) as answer:
        from ..evaluation import perplexity

        results = _recorded(model, mask) if record else None
        if mask is None:
            loaded, tokenizer_source = load_any(model, dtype, device)
        else:
            loaded, tokenizer_source = load_model(model, dtype, device), model
            loaded = put_mask(loaded, mask, mask_revision, task, allow_base_mismatch)
        tokens = stream(text, load_tokenizer(tokenizer_source), split, joined=True)[:max_tokens]
        length = window_length(loaded, sequence_length)
        if len(tokens) < length:
            raise ConfigError(f"{text}: {len(tokens)} tokens, one window takes {length}; lower --sequence-length")
        measure = partial(perplexity, tokens=tokens, seq_len=length, batch_size=batch_size, progress=True)
        found = measure(loaded)
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
        if results is not None:
            dense = _of_dense(loaded, results, measure, dtype, device)
            label = Path(text).name if Path(text).exists() else f"{text} ({split})"
            _record(Path(model), results, label, tokens, found, dense)
            answer.facts |= {"dense": dense.value, "recorded": model}
            answer.show(f"dense: {dense.value:.3f}; recorded in {model} ({RESULTS_FILE}, README.md)")


# --- what is recorded -----------------------------------------------------------------------------------------------
def _recorded(model: str, mask: str | None) -> RunResults:
    """The results beside a model or mask, which can be added to.

    Raises:
        ConfigError: if it is not a local folder that holds some, or nothing to compare with is named.
        FormatError: if they are damaged.
    """
    from ..results import RunResults

    folder = Path(model)
    if mask is not None:
        raise ConfigError("--record writes beside what it evaluates: name the mask itself, without --mask")
    if not folder.is_dir():
        raise ConfigError(f"--record writes into a local folder, and {model} is none; pull it first (nmsparse pull)")
    kind = kind_of(folder)
    if kind not in _CARDS:
        raise ConfigError(
            f"--record is for a mask, a masked or a packed model, and {model} holds another kind ({kind.value})"
        )
    if not (folder / RESULTS_FILE).is_file():
        raise ConfigError(
            f"--record adds to {RESULTS_FILE}, and {model} has none; prune, train, merge, compress and import-mask write it"
        )
    results = RunResults.read(folder / RESULTS_FILE)
    if not isinstance(results.evaluations, list) or not all(isinstance(entry, dict) for entry in results.evaluations):
        raise FormatError(f"{folder / RESULTS_FILE}: evaluations must be a list of objects; the file is damaged")
    if kind is not Kind.MASK and not results.base_model:
        raise ConfigError(f"{folder / RESULTS_FILE} does not name the base model, so there is nothing to compare with")
    return results


def _of_dense(
    loaded: nn.Module,
    results: RunResults,
    measure: Callable[[nn.Module], Perplexity],
    dtype: Dtype,
    device: str | None,
) -> Perplexity:
    """The dense base on the same text."""
    from peft import PeftModel

    from ..hub import verify

    if isinstance(loaded, PeftModel):
        with loaded.disable_adapter():
            return measure(loaded)
    base = load_model(results.base_model, dtype, device, revision=results.base_revision)
    if verify(base, results.pattern if results.parsed_pattern else None).layers:
        raise ConfigError(
            f"{RESULTS_FILE} names {results.base_model} as the base model, which is sparse itself; there is no dense one to "
            "compare with"
        )
    return measure(base)


def _record(
    folder: Path, results: RunResults, label: str, scored: torch.Tensor, found: Perplexity, dense: Perplexity
) -> None:
    """Add what was measured to the results and the card; the same tokens in the same windows once only."""
    from ..hub.card import update_card

    entry = {
        "text": label,
        "dense": dense.value,
        "this": found.value,
        "standard_error": found.standard_error if math.isfinite(found.standard_error) else None,
        "tokens": found.tokens,
        "sequence_length": found.seq_len,
        "sha256": hashlib.sha256(scored.numpy().tobytes()).hexdigest(),
    }
    same = ("sha256", "sequence_length")
    others = [other for other in results.evaluations if any(other.get(key) != entry[key] for key in same)]
    results.evaluations = [*others, entry]
    results.command = "\n".join(filter(None, (results.command, command_line())))
    results.write(folder / RESULTS_FILE)
    update_card(folder, results, _CARDS[kind_of(folder)])
