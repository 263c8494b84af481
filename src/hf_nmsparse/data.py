# SPDX-License-Identifier: Apache-2.0
"""From texts to token tensors: files or `datasets` -> list of texts -> one stream of tokens -> windows -> batches."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .errors import ConfigError

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
_DATASET_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
_KINDS = (
    "a text file (.txt, .text, .md, .rst), a .jsonl file with a 'text' field, a folder or glob of .txt files, "
    "or a dataset as 'owner/name' or 'owner/name:config'"
)


def load_text(source: str | Path, split: str = "train") -> list[str]:
    """Read texts from files or from the `datasets` library.

    Args:
        source (`str` or `Path`): a text file (one document), a folder or glob of .txt files (one document each, sorted
            by name), a .jsonl file with a "text" field (one document a line), or a dataset with a "text" column, as
            `"Salesforce/wikitext:wikitext-2-raw-v1"`. What exists on disk is never looked up as a dataset.
        split (`str`): split of the dataset, `datasets` slices as `"train[:1000]"` included. Files have no splits.

    Returns:
        `list[str]`, at least one of them not blank. Rows of a dataset come as they are, empty ones included, because
        the WikiText protocol joins all of them: `tokenize("\\n\\n".join(load_text(...)), tokenizer)`.

    Raises:
        ConfigError: if nothing is found, the kind is unknown, or there is no text in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        texts = [_read_text(file) for file in files]
    elif path.is_file():
        texts = _read_file(path)
    elif glob.has_magic(str(path)):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
        texts = [text for file in files if file.is_file() for text in _read_file(file)]
    else:
        texts = _read_dataset(source, split)
    if not texts:
        raise ConfigError(f"{source}: no text files found; expected {_KINDS}")
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{source}: holds no text ({len(texts)} blank documents); name a source with text in it")
    return texts


def tokenize(texts: str | Iterable[str], tokenizer: Any) -> torch.Tensor:
    """Tokenise each document once and join them into one stream.

    Between two documents stands the tokenizer's eos, if it has one. A single string is one document and is tokenised
    as one string, whatever its length: perplexity on WikiText wants the rows joined first, because tokens merge across
    joints and because special tokens (bos) then come only at the very start.

    Args:
        texts (`str` or iterable of `str`): documents; empty ones are left out.
        tokenizer: a Transformers tokenizer; its default special tokens are added to each document.

    Returns:
        int64 `[tokens]`.

    Raises:
        ConfigError: if there are no tokens, or a document is not a `str`.
    """
    ids: list[int] = []
    for text in [texts] if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise ConfigError(f"cannot tokenise a {type(text).__name__}; expected str or an iterable of str")
        if not text:
            continue
        if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        # verbose=False: a text longer than the model's context is the normal case here, windows are cut later.
        ids.extend(tokenizer(text, verbose=False)["input_ids"])
    if not ids:
        raise ConfigError("the texts gave no tokens; pass at least one document that is not empty")
    return torch.tensor(ids, dtype=torch.long)


def windows(
    tokens: torch.Tensor, sequence_length: int, samples: int | None = None, seed: int | None = None
) -> torch.Tensor:
    """Cut a token stream into windows: all that follow one another, or a random sample.

    Args:
        tokens (`torch.Tensor`): integers `[tokens]`.
        sequence_length (`int`): tokens a window.
        samples (`int`, *optional*): draw so many windows at random starts, which may overlap, as the calibration of
            SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695) does. Without it: consecutive windows that do
            not overlap, the tail dropped.
        seed (`int`, *optional*): seed of the starts, drawn from a generator of their own; `None` is 0.

    Returns:
        int64 `[samples, sequence_length]`.

    Raises:
        ConfigError: if the stream is shorter than one window or not a 1-D integer tensor.
    """
    check_tokens(tokens, dimensions=1)
    for name, value in (("sequence_length", sequence_length), ("samples", samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}; expected at least 1")
    if tokens.numel() < sequence_length:
        raise ConfigError(
            f"too few tokens for one window: got {tokens.numel()}, expected at least sequence_length={sequence_length}; "
            "use more text or a shorter sequence_length"
        )
    tokens = tokens.long()
    if samples is None:
        count = tokens.numel() // sequence_length
        return tokens[: count * sequence_length].view(count, sequence_length)
    generator = torch.Generator().manual_seed(seed or 0)
    starts = torch.randint(tokens.numel() - sequence_length + 1, (samples, 1), generator=generator)
    return tokens[starts.to(tokens.device) + torch.arange(sequence_length, device=tokens.device)]


class TokenWindows(Dataset):
    """Windows of tokens as a dataset for the Transformers `Trainer`; each item is {"input_ids", "labels"}, both `[sequence]`.

    Args:
        tokens (`torch.Tensor`): integers `[samples, sequence]`, as `windows` gives.
    """

    def __init__(self, tokens: torch.Tensor):
        check_tokens(tokens, dimensions=2)
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index].long()
        return {"input_ids": window, "labels": window}


def calibration_batches(
    calibration: torch.Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Iterable[str],
    tokenizer: Any = None,
    sequence_length: int = 512,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Give model inputs from any form of calibration data. Wrong input is refused at the call, not at the first batch.

    Args:
        calibration: integers `[samples, sequence]`, model inputs (a dict, as processors and tokenizers give) or an
            iterable of them, passed on as they are, or texts.
        tokenizer (*optional*): needed for texts, which become windows of `sequence_length` that follow one another.
        sequence_length (`int`): tokens a window; for texts only.
        batch_size (`int`): windows a batch; for tokens and texts only.

    Returns:
        Iterator of dicts, to be passed to the model by name.

    Raises:
        ConfigError: if there is nothing to calibrate on, or it is of another kind.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected at least 1")
    if isinstance(calibration, (str, Mapping)):
        calibration = [calibration]
    if not isinstance(calibration, torch.Tensor):
        if not isinstance(calibration, Iterable):
            raise ConfigError(f"calibration is {_kind(calibration)}; {_CALIBRATION}")
        items = iter(calibration)
        first = next(items, None)
        if first is None:
            raise ConfigError(f"calibration is empty; {_CALIBRATION}")
        items = itertools.chain([first], items)
        if isinstance(first, Mapping):
            return map(_model_inputs, items)
        if not isinstance(first, str):
            raise ConfigError(f"calibration holds items of type {_kind(first)}; {_CALIBRATION}")
        if tokenizer is None:
            raise ConfigError("calibration holds texts; pass tokenizer= as well")
        calibration = windows(tokenize(items, tokenizer), sequence_length)
    check_tokens(calibration, dimensions=2)
    return ({"input_ids": batch.long()} for batch in calibration.split(batch_size))


def check_tokens(tokens: torch.Tensor, *, dimensions: int) -> None:
    """Raise `ConfigError` unless `tokens` is a non-empty integer tensor with that many dimensions."""
    shape = {1: "[tokens]", 2: "[samples, sequence]"}[dimensions]
    if not isinstance(tokens, torch.Tensor):
        raise ConfigError(f"tokens are {_kind(tokens)}; expected an integer tensor {shape}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ConfigError(f"tokens are {tokens.dtype}; expected integers: token ids, not embeddings or masks")
    if tokens.dim() != dimensions:
        fix = "cut them with hf_nmsparse.data.windows" if dimensions == 2 else "pass one stream of tokens"
        raise ConfigError(f"tokens have shape {list(tokens.shape)}; expected {shape}: {fix}")
    if tokens.numel() == 0:
        raise ConfigError(f"tokens are empty (shape {list(tokens.shape)}); expected {shape} with at least one token")


_CALIBRATION = (
    "expected an integer tensor [samples, sequence], an iterable of model inputs (dicts), or texts with tokenizer="
)


def _model_inputs(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ConfigError(f"calibration mixes dicts with {_kind(item)}; {_CALIBRATION}")
    return dict(item)


def _kind(value: Any) -> str:
    return type(value).__name__


def _read_file(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix in _TEXT_SUFFIXES:
        return [_read_text(path)]
    raise ConfigError(f"{path}: cannot read a {path.suffix or 'suffixless'} file; expected {_KINDS}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of too many digits, and nested without end, too
            raise ConfigError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ConfigError(f"{path}, line {number}: no string field 'text'; rename the field that holds the text")
        texts.append(record["text"])
    return texts


def _read_dataset(source: str | Path, split: str) -> list[str]:
    """`source` is nothing on disk: load it as a dataset if it looks like one, else say what is missing."""
    match = None if isinstance(source, Path) else _DATASET_NAME.fullmatch(source)
    looks_like_name = match is not None and ("/" in source or ":" in source)
    if not looks_like_name or source.endswith((*_TEXT_SUFFIXES, ".jsonl")):
        raise ConfigError(f"{source}: no such file or folder; expected {_KINDS}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{source}: no such file or folder, and reading it as a dataset needs the `datasets` package: "
            "pip install hf-nmsparse[datasets]"
        ) from error
    try:
        dataset = load_dataset(match["name"], match["config"], split=split)
    except (OSError, ValueError) as error:
        # What `datasets` raises for an unknown name, config or split, and for no network.
        raise ConfigError(
            f"{source}: no such file or folder, and `datasets` could not load its split {split!r}: {error}"
        ) from error
    if "text" not in dataset.column_names:
        raise ConfigError(f"{source}: columns {dataset.column_names}; expected one named 'text'")
    return list(dataset["text"])
