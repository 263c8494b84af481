# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse eval` does: load a model and the dense one, measure what was asked for, say and record it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..evaluation import (
    SUITES,
    Judge,
    KickTask,
    agreement_entry,
    fetch_tasks,
    perplexity_entry,
    read_tasks,
    run_kick,
    sample_entries,
    task_entries,
)
from ..files import RESULTS_FILE
from .common import Answer, facts_table, table, tell
from .models import load_any, load_model, load_tokenizer, put_mask, stream, text_name, window_length
from .options import Dtype
from .recording import Record, record_of

if TYPE_CHECKING:
    import torch
    from torch import nn

KICK = "kick"


@dataclass(frozen=True)
class Asked:
    """What to measure; see the options of `nmsparse eval`."""

    text: str | None
    split: str
    sequence_length: int | None
    max_tokens: int | None
    stride: int | None
    agreement: bool
    suites: list[str]
    tasks: list[str]
    include_path: Path | None
    data: Path | None
    shots: int | None
    limit: int | None
    new_tokens: int | None
    judge_url: str | None
    judge_model: str | None
    batch_size: int | None

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is loaded."""
        if not (self.text or self.suites or self.tasks):
            raise ConfigError("nothing to measure; give --text, --suite or --tasks")
        if unknown := [name for name in self.suites if name not in (*SUITES, KICK)]:
            raise ConfigError(f"--suite {unknown[0]}: use one of {', '.join((*SUITES, KICK))}, or name --tasks")
        needs = [
            ("--agreement", self.agreement, "--text", self.text),
            ("--stride", self.stride, "--text", self.text),
            ("--data", self.data, f"--suite {KICK}", KICK in self.suites),
            ("--new-tokens", self.new_tokens, f"--suite {KICK}", KICK in self.suites),
            ("--judge", self.judge_url, f"--suite {KICK}", KICK in self.suites),
            ("--judge", self.judge_url, "--judge-model", self.judge_model),
            ("--judge-model", self.judge_model, "--judge", self.judge_url),
            ("--limit", self.limit, "--suite or --tasks", self.suites or self.tasks),
            ("--max-tokens", self.max_tokens, "--text", self.text),
            ("--sequence-length", self.sequence_length, "--text", self.text),
            ("--include-path", self.include_path, "--tasks", self.tasks),
            ("--shots", self.shots is not None, "--tasks or a suite of lm-eval", self.harness_tasks),
        ]
        for option, given, other, there in needs:
            if given and not there:
                raise ConfigError(f"{option} goes with {other}")

    @property
    def harness_tasks(self) -> list[tuple[str | None, tuple[str, ...], int | None]]:
        """Suite, tasks and shots of what lm-eval measures."""
        wanted = [(name, SUITES[name], self.shots or 0) for name in self.suites if name != KICK]
        return [*wanted, *([(None, tuple(self.tasks), self.shots)] if self.tasks else [])]


@dataclass(frozen=True)
class Source:
    """The model to measure, and the dense one; see the options of `nmsparse eval`."""

    model: str
    mask: str | None
    mask_revision: str | None
    task: str | None
    allow_base_mismatch: bool
    dense: str | None
    dtype: Dtype
    device: str | None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}{f' under {self.mask}' if self.mask else ''}"

    def load(self) -> tuple[nn.Module, Any]:
        """The model and its tokenizer."""
        if self.mask is None:
            model, tokenizer_source = load_any(self.model, self.dtype, self.device)
            return model, load_tokenizer(tokenizer_source)
        model = load_model(self.model, self.dtype, self.device)
        masked = put_mask(model, self.mask, self.mask_revision, self.task, self.allow_base_mismatch)
        return masked, load_tokenizer(self.model)


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its mask written into the weights meanwhile: a mask beside them is unpacked in every forward pass, which
    takes longer than the few tokens of an item. With terms beside the mask it stays as it is: merging would round them."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or model.active_peft_config.has_side_branch:
        yield model
        return
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()


class Dense:
    """The dense model, loaded when first needed; or the PEFT model itself with its adapters off."""

    def __init__(self, loaded: nn.Module, source: Source, record: Record):
        from peft import PeftModel

        self._loaded = loaded if isinstance(loaded, PeftModel) and source.dense is None else None
        self._results, self._source = record.results, source
        self._model: nn.Module | None = None

    @property
    def known(self) -> bool:
        """Whether there is one to compare with."""
        return bool(self._loaded is not None or self._source.dense or self._results.base_model)

    @property
    def module(self) -> nn.Module | None:
        """For `agreement`: the dense model, `None` for a PEFT model."""
        return None if self._loaded is not None else self._base()

    @contextmanager
    def computing(self) -> Iterator[nn.Module]:
        """The model that computes what the dense one does."""
        if self._loaded is None:
            yield self._base()
            return
        with self._loaded.disable_adapter():
            yield self._loaded

    def _base(self) -> nn.Module:
        if self._model is None:
            revision = None if self._source.dense else self._results.base_revision
            name = self._source.dense or self._results.base_model
            self._model = load_model(name, self._source.dtype, self._source.device, revision=revision)
            self._check(name)
        return self._model

    def _check(self, name: str) -> None:
        from ..hub import verify

        pattern = self._results.pattern if self._results.parsed_pattern else None
        if verify(self._model, pattern).layers:
            said = f"--dense {name}" if self._source.dense else f"{RESULTS_FILE} names {name} as the base model, which"
            raise ConfigError(f"{said} is sparse itself; there is no dense one to compare with")


def run(answer: Answer, asked: Asked, source: Source, into_folder: bool, output: Path | None) -> None:
    """Measure and tell."""
    asked.check()
    record = record_of(source.model, source.mask, into_folder, output)
    kick = _kick_tasks(asked)
    judge = _judge(asked, kick)
    loaded, tokenizer = source.load()
    reference = Dense(loaded, source, record)
    if not reference.known:
        if asked.agreement:
            raise ConfigError(
                "--agreement needs a dense model to compare with, and none is known; name it with --dense"
            )
        if asked.suites or asked.tasks:
            tell("no dense model is known; name it with --dense to compare with it")
    answer.facts = {"model": source.model, "mask": source.mask}
    if asked.text:
        with_dense = into_folder or source.dense is not None or (reference.known and output is not None)
        _measure_text(answer, asked, source.name, loaded, tokenizer, reference, record, with_dense)
    rows = []
    for suite, tasks, shots in asked.harness_tasks:
        rows += _measure_harness(asked, loaded, tokenizer, reference, record, suite, tasks, shots)
    if kick:
        rows += _measure_kick(asked, loaded, tokenizer, reference, record, kick, judge)
    if rows:
        answer.facts["tasks"] = rows
        _show_tasks(answer, source.name, rows)
    if record.places:
        answer.facts["recorded"] = record.places[0]
        answer.show(f"recorded in {', '.join(record.places)}")


# --- text -----------------------------------------------------------------------------------------------------------
def _measure_text(
    answer: Answer,
    asked: Asked,
    name: str,
    loaded: nn.Module,
    tokenizer: Any,
    dense: Dense,
    record: Record,
    with_dense: bool,
) -> None:
    from ..evaluation import agreement, perplexity

    tokens = stream(asked.text, tokenizer, asked.split, joined=True)[: asked.max_tokens]
    length = window_length(loaded, asked.sequence_length)
    if len(tokens) < length and asked.stride is None:
        raise ConfigError(f"{asked.text}: {len(tokens)} tokens, one window takes {length}; lower --sequence-length")
    label = text_name(asked.text) if Path(asked.text).exists() else f"{asked.text} ({asked.split})"
    options = {"seq_len": length, "batch_size": asked.batch_size, "progress": True}
    found = perplexity(loaded, tokens, stride=asked.stride, **options)
    words = None if asked.stride is None else _words(tokens, tokenizer)
    facts = dataclasses.asdict(found)
    del facts["window_losses"]  # of long texts, thousands
    answer.facts |= {"text": asked.text, "perplexity": facts.pop("value"), **facts}
    shown = {
        "perplexity": f"{found.value:.3f}",
        "loss": f"{found.loss:.4f} +- {found.standard_error:.4f} nats a token",
        "scored": f"{found.tokens} tokens, {found.windows} windows of {found.seq_len}",
    }
    if words is not None:
        answer.facts["word_perplexity"] = found.per(words)
        shown |= {"word perplexity": f"{found.per(words):.3f} ({words} words)", "stride": f"{asked.stride} tokens"}
    other = None
    if with_dense:
        with dense.computing() as reference:
            other = perplexity(reference, tokens, stride=asked.stride, **options)
        answer.facts["dense"] = other.value
        shown["dense"] = f"{other.value:.3f}"
    record.add(evaluations=[perplexity_entry(label, tokens, found, other, words)])
    if asked.agreement:
        compared = agreement(loaded, tokens, dense.module, **options)
        entry = agreement_entry(label, tokens, compared)
        record.add(agreement=[entry])
        answer.facts["agreement"] = entry
        worst = max(compared.layers, key=compared.layers.get, default=None)
        shown |= {
            "top-1 agreement": f"{100 * compared.top1:.1f} % of tokens",
            "KL(dense || this)": f"{compared.kl:.4f} nats a token",
        }
        if worst is not None:
            shown["largest layer error"] = f"{compared.layers[worst]:.3f} ({worst})"
    answer.show(facts_table(f"{name} on {asked.text}", shown))


def _words(tokens: torch.Tensor, tokenizer: Any) -> int:
    """Words of what was scored: of the tokens, because --max-tokens may have cut the text."""
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=True).split())


# --- tasks ----------------------------------------------------------------------------------------------------------
def _measure_harness(
    asked: Asked,
    loaded: nn.Module,
    tokenizer: Any,
    dense: Dense,
    record: Record,
    suite: str | None,
    tasks: Sequence[str],
    shots: int | None,
) -> list[dict[str, Any]]:
    from ..evaluation import evaluate_tasks

    options = {
        "shots": shots,
        "limit": asked.limit,
        "batch_size": asked.batch_size,
        "include_path": None if suite else asked.include_path,
        "progress": True,
    }
    with merged(loaded) as model:
        this = evaluate_tasks(model, tokenizer, tasks, **options)
    other = None
    if dense.known:
        with dense.computing() as reference:
            other = evaluate_tasks(reference, tokenizer, tasks, **options)
    rows = task_entries(this, other, suite)
    record.add(tasks=rows)
    return rows


def _kick_tasks(asked: Asked) -> list[KickTask]:
    """Read before models are loaded: a wrong line should be known at once."""
    if KICK not in asked.suites:
        return []
    if asked.data is None:
        return fetch_tasks(limit=asked.limit)
    return [task.limited(asked.limit) for task in read_tasks(asked.data)]


def _judge(asked: Asked, tasks: list[KickTask]) -> Judge | None:
    """Made before models are loaded, too."""
    if asked.judge_url is None:
        return None
    if not any(task.writes for task in tasks):
        raise ConfigError(
            f"--judge rates summaries and instructions, and {asked.data} has none; leave it out, or add such a file"
        )
    return Judge(asked.judge_url, asked.judge_model)


def _measure_kick(
    asked: Asked,
    loaded: nn.Module,
    tokenizer: Any,
    dense: Dense,
    record: Record,
    tasks: list[KickTask],
    judge: Judge | None,
) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:  # one by one: whoever stops keeps what was measured
        other = None
        if dense.known:
            with dense.computing() as reference:
                other = run_kick(reference, tokenizer, [task], None, asked.new_tokens, progress=True, judge=judge)
        with merged(loaded) as model:
            this = run_kick(model, tokenizer, [task], other, asked.new_tokens, progress=True, judge=judge)
        new = task_entries(this.scores, None if other is None else other.scores, KICK)
        record.add(tasks=new, samples=sample_entries([task], this, other))
        rows += new
    return rows


def _show_tasks(answer: Answer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ("task", "metric", "dense", "this", "difference", "lost / won", "items", "chance")
    answer.show(table(f"{name} on tasks", columns, map(_task_cells, rows)))


def _task_cells(row: dict[str, Any]) -> tuple[str, ...]:
    dense, difference = row.get("dense"), ""
    if dense is not None:
        error = row.get("difference_standard_error")
        difference = f"{row['this'] - dense:+.4f}" + (f" +- {error:.4f}" if error is not None else "")
    return (
        row["task"],
        row["metric"],
        "" if dense is None else f"{dense:.4f}",
        f"{row['this']:.4f}",
        difference,
        f"{row['lost']} / {row['won']}" if "lost" in row else "",
        str(row["items"]),
        "" if row["chance"] is None else f"{row['chance']:.3f}",
    )
