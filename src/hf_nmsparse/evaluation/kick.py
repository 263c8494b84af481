# SPDX-License-Identifier: Apache-2.0
"""LLM-KICK (Jaiswal et al., "Compressing LLMs: The Truth is Rarely Pure and Never Simple", arXiv 2310.01382): what a model
knows, finds in a text, summarises and answers; judged without a paid judge.

What differs from the authors' code, on purpose: an answer is looked for in what the model wrote and not in the prompt as
well; sums are divided by the number of items; options are judged by their likelihoods and not by the last character of one
token; texts are written greedily, so that they can be repeated. Summaries and instructions, which the authors have judged by
GPT-4, are compared with the dense model's own text: by how likely it is, and by ROUGE.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import ConfigError, UnratedError
from .answers import exact_match, f1, names_an_answer, repetition, rouge_l
from .continuations import Likelihood, log_likelihoods, prompt_length, prompt_room, write_greedily
from .judge import Judge
from .kick_data import KickTask
from .kick_prompts import (
    LETTERS,
    SUMMARISE,
    as_continuation,
    chat,
    conversation,
    listed_question,
    own_turn,
    plain_question,
    retrieval_prompt,
)
from .scores import TaskScore, mean_score

logger = logging.getLogger(__name__)

_SHOTS = 5
MEASURED_BY = "hf-nmsparse"
_NEW_TOKENS = {"factoid": 16, "retrieval": 32, "summary": 200, "instruction": 200}


@dataclass
class KickAnswers:
    """What one model made of the tasks.

    Args:
        scores (`list[TaskScore]`): metrics in the order of the tasks. "acc": the right letter is the likeliest; "acc_text":
            the right option is the likeliest text, a byte; "hit": an alias is in the answer; "exact_match", "f1": of
            TriviaQA; "log_likelihood": of the right answer, in nats; "text_log_likelihood": of the dense model's own text,
            nats a token; "rouge_dense", "rouge_reference": ROUGE-L; "repetition": share of repeated runs of four tokens; "judge": mean
            rating by a judge, 1 to 10, over the items that it gave one, and "judge_unrated": the share of the others.
        texts (`dict[str, list[list[str]]]`): task -> what was written for each item, a text for each turn.
    """

    scores: list[TaskScore] = field(default_factory=list)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)


def run_kick(
    model: nn.Module,
    tokenizer: Any,
    tasks: Iterable[KickTask],
    dense: KickAnswers | None = None,
    new_tokens: int | None = None,
    progress: bool = False,
    judge: Judge | None = None,
) -> KickAnswers:
    """Give the tasks to a model.

    Args:
        model (`nn.Module`): a causal language model in any form.
        tokenizer: its tokenizer; where it has a chat template, summaries and instructions are asked by that.
        tasks (`Iterable[KickTask]`): see `read_tasks`.
        dense (`KickAnswers`, *optional*): of the dense model, whose texts those of this model are compared with.
        new_tokens (`int`, *optional*): at most so many tokens a summary or answer; by default 200.
        progress (`bool`): show progress bars, if standard error is a terminal.
        judge (`Judge`, *optional*): rates summaries and answers to instructions too.

    Raises:
        JudgeError: if the judge cannot be asked.
        ConfigError: if a task is empty, or `dense` was not given the same one.
        UnsupportedError: if texts are to be compared and rouge-score is not installed.
    """
    tasks, found = list(tasks), KickAnswers()
    for task in tasks:  # before hours of work
        _check(task, dense)
    if judge is not None and any(task.writes for task in tasks):
        judge.check()
    for task in tasks:
        run = _Run(model, tokenizer, task, new_tokens, progress, judge)
        if task.kind == "factoid":
            found.scores += run.factoid(found.texts)
        elif task.kind == "choice":
            found.scores += run.choice()
        elif task.kind == "retrieval":
            found.scores += run.retrieval(found.texts)
        else:
            found.scores += run.writing(found.texts, None if dense is None else dense.texts[task.name])
    return found


def _check(task: KickTask, dense: KickAnswers | None) -> None:
    if not task.items:
        raise ConfigError(f"{task.name} has no items; give at least one")
    if not task.writes:
        return
    if dense is not None or any("summary" in item for item in task.items):
        rouge_l("", "")
    if dense is None:
        return
    if task.name not in dense.texts:
        raise ConfigError(f"{task.name}: the dense model was not given this task; give both models the same ones")
    turns = [len(item.get("turns", [""])) for item in task.items]
    if (given := list(map(len, dense.texts[task.name]))) != turns:
        raise ConfigError(
            f"{task.name}: the dense model has written {sum(given)} texts for {len(given)} items, this one is asked for "
            f"{sum(turns)} for {len(turns)}; give both models the same items"
        )


class _Run:
    """One model on one task."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: KickTask,
        new_tokens: int | None,
        progress: bool,
        judge: Judge | None,
    ):
        self.model, self.tokenizer, self.task, self.judge = model, tokenizer, task, judge
        self.new_tokens = _NEW_TOKENS.get(task.kind, 0)
        if new_tokens is not None and task.writes:
            self.new_tokens = new_tokens
        self.progress = progress

    # --- kinds of tasks ---------------------------------------------------------------------------------------------
    def factoid(self, texts: dict[str, list[list[str]]]) -> list[TaskScore]:
        prompts = [
            f"Please give answer to this question: {item['question']}\nThe answer is" for item in self.task.items
        ]
        written = texts[self.task.name] = self._write(prompts)
        hits = [
            float(names_an_answer(text, item["answers"]))
            for [text], item in zip(written, self.task.items, strict=True)
        ]
        return [self._score("hit", hits, chance=0.0), self._right_answers(prompts)]

    def choice(self) -> list[TaskScore]:
        items, shots = self.task.items, [self._shown(item) for item in self.task.items]
        chance = sum(1 / len(item["options"]) for item in items) / len(items)
        facts = {"chance": chance, "shots": max(map(len, shots))}
        scores = []
        if all("question" in item for item in items):
            listed = [listed_question(item, examples) for item, examples in zip(items, shots, strict=True)]
            letters = self._options(listed, [[f" {letter}" for letter in LETTERS[: len(i["options"])]] for i in items])
            chosen = _likeliest([[found.value for found in row] for row in letters])
            hits = [float(index == item["answer"]) for index, item in zip(chosen, items, strict=True)]
            scores.append(self._score("acc", hits, **facts))
        asked = [plain_question(item, examples) for item, examples in zip(items, shots, strict=True)]
        texts = self._options(asked, [[f" {option}" for option in item["options"]] for item in items])
        by_byte = [
            [found.value / len(option.encode()) for found, option in zip(row, item["options"], strict=True)]
            for row, item in zip(texts, items, strict=True)
        ]
        hits = [
            float(index is not None and item["options"][index] == item["options"][item["answer"]])  # two may be equal
            for index, item in zip(_likeliest(by_byte), items, strict=True)
        ]
        right = [row[item["answer"]].value for row, item in zip(texts, items, strict=True)]
        return [
            *scores,
            self._score("acc_text", hits, **facts),
            self._score("log_likelihood", right, shots=facts["shots"]),
        ]

    def retrieval(self, texts: dict[str, list[list[str]]]) -> list[TaskScore]:
        scores = []
        for book in ("closed", "open"):
            name = f"{self.task.name}_{book}"
            prompts = [retrieval_prompt(item, book == "open") for item in self.task.items]
            written = texts[name] = self._write(prompts)
            lines = [text.strip().split("\n")[0] for [text] in written]
            pairs = [(line, item["answers"]) for line, item in zip(lines, self.task.items, strict=True)]
            scores += [
                self._score("exact_match", [exact_match(*pair) for pair in pairs], name, chance=0.0),
                self._score("f1", [f1(*pair) for pair in pairs], name, chance=0.0),
                self._right_answers(prompts, name),
            ]
        return scores

    def writing(self, texts: dict[str, list[list[str]]], dense: list[list[str]] | None) -> list[TaskScore]:
        """Summaries, and answers to instructions of one turn or more: each turn follows the model's own answers."""
        turns = [
            [self._request(item["text"])] if self.task.kind == "summary" else item["turns"] for item in self.task.items
        ]
        written: list[list[str]] = [[] for _ in turns]
        repeated: list[list[float]] = [[] for _ in turns]
        for turn in range(max(map(len, turns))):
            active = [index for index, asked in enumerate(turns) if turn < len(asked)]
            prompts = [chat(self.tokenizer, turns[index][: turn + 1], written[index]) for index in active]
            tokens = write_greedily(self.model, self.tokenizer, prompts, self.new_tokens, self._bar())
            for index, ids in zip(active, tokens, strict=True):
                written[index].append(own_turn(self.tokenizer, self.tokenizer.decode(ids, skip_special_tokens=True)))
                repeated[index].append(repetition(ids))
        texts[self.task.name] = written
        scores = [self._score("repetition", [_mean(values) for values in repeated], higher_is_better=False)]
        if any("summary" in item for item in self.task.items):
            pairs = [
                (w[0], item["summary"]) for w, item in zip(written, self.task.items, strict=True) if "summary" in item
            ]
            scores.append(self._score("rouge_reference", [rouge_l(*pair) for pair in pairs]))
        reference = written if dense is None else dense
        scores += self._likelihood_of_texts(turns, reference)
        if dense is not None:
            pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(written, dense, strict=True)]
            scores.append(self._score("rouge_dense", [_mean([rouge_l(*pair) for pair in row]) for row in pairs]))
        return scores if self.judge is None else [*scores, *self._judged(self.judge, turns, written)]

    # --- what they share --------------------------------------------------------------------------------------------
    def _request(self, text: str) -> str:
        """What asks for a summary. A text that is too long for the model loses its end; its beginning would be the request's."""
        room = prompt_room(self.model, self.new_tokens)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        kept = len(ids)
        while (
            excess := prompt_length(self.tokenizer, chat(self.tokenizer, [SUMMARISE.format(text=text)], [])) - room
        ) > 0:
            if (kept := kept - excess) < 1:
                raise ConfigError(
                    f"{self.task.name}: the model has {room} positions besides the {self.new_tokens} new tokens, which is "
                    "too few to be asked for a summary; leave the task out, or ask for fewer new tokens"
                )
            text = self.tokenizer.decode(ids[:kept], skip_special_tokens=True)
        return SUMMARISE.format(text=text)

    def _likelihood_of_texts(self, turns: list[list[str]], texts: list[list[str]]) -> list[TaskScore]:
        """Nats a token of the dense model's own texts, in its own conversations; no score if it wrote nothing at all."""
        pairs, owners = [], []
        for index, (asked, answers) in enumerate(zip(turns, texts, strict=True)):
            for turn, answer in enumerate(answers):
                if answer:
                    prompt = chat(self.tokenizer, asked[: turn + 1], answers[:turn])
                    pairs.append((prompt, as_continuation(self.tokenizer, answer)))
                    owners.append(index)
        found = log_likelihoods(self.model, self.tokenizer, pairs, self._bar())
        by_item = {}
        for index, likelihood in zip(owners, found, strict=True):
            by_item.setdefault(index, []).append(likelihood.value / likelihood.tokens)
        if not by_item:
            logger.warning("%s: no text was written, so none has a likelihood", self.task.name)
            return []
        return [self._score("text_log_likelihood", [_mean(values) for values in by_item.values()])]

    def _judged(self, judge: Judge, turns: list[list[str]], texts: list[list[str]]) -> list[TaskScore]:
        """Mean rating over turns and items. An item with a turn that the judge did not rate is counted and left out."""
        ratings, unrated = [], []
        rows = list(zip(self.task.items, turns, texts, strict=True))
        for item, asked, answers in tqdm(rows, desc=self._bar("judge"), disable=None if self.progress else True):
            questions = [conversation(asked[: turn + 1], answers[:turn]) for turn in range(len(answers))]
            try:
                rated = [judge.rate(*pair, item.get("summary")) for pair in zip(questions, answers, strict=True)]
            except UnratedError as error:
                logger.warning("%s: %s", self.task.name, error)
                unrated.append(1.0)
                continue
            ratings.append(_mean(rated))
            unrated.append(0.0)
        by = f"{MEASURED_BY}, judge {judge.model}"
        scores = [self._score("judge_unrated", unrated, higher_is_better=False, measured_by=by)]
        if ratings:
            found = self._score("judge", ratings, measured_by=by)
            # Of all items, because another model may have others rated: then no difference by item can be told.
            scores.insert(0, found if len(ratings) == len(unrated) else replace(found, items=len(unrated), scores=()))
        return scores

    def _right_answers(self, prompts: Sequence[str], name: str | None = None) -> TaskScore:
        pairs = [(prompt, f" {item['answers'][0]}") for prompt, item in zip(prompts, self.task.items, strict=True)]
        found = log_likelihoods(self.model, self.tokenizer, pairs, self._bar())
        return self._score("log_likelihood", [likelihood.value for likelihood in found], name)

    def _options(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        pairs = [(prompt, option) for prompt, row in zip(prompts, options, strict=True) for option in row]
        found = iter(log_likelihoods(self.model, self.tokenizer, pairs, self._bar()))
        return [[next(found) for _ in row] for row in options]

    def _write(self, prompts: Sequence[str]) -> list[list[str]]:
        written = write_greedily(self.model, self.tokenizer, prompts, self.new_tokens, self._bar())
        return [[self.tokenizer.decode(ids, skip_special_tokens=True)] for ids in written]

    def _shown(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Solved items of the same subject; none before a prompt that stands as it is."""
        if "question" not in item:
            return []
        same = [other for other in self.task.examples if other.get("subject") == item.get("subject")]
        return [other for other in same if "question" in other][:_SHOTS]

    def _bar(self, what: str = "") -> str | None:
        return f"{self.task.name} {what}".strip() if self.progress else None

    def _score(
        self,
        metric: str,
        values: Sequence[float],
        name: str | None = None,
        chance: float | None = None,
        shots: int = 0,
        higher_is_better: bool = True,
        measured_by: str = MEASURED_BY,
    ) -> TaskScore:
        return mean_score(
            name or self.task.name,
            metric,
            values,
            shots=shots,
            measured_by=measured_by,
            sha256=self.task.sha256,
            higher_is_better=higher_is_better,
            chance=chance,
        )


def _likeliest(values: Sequence[Sequence[float]]) -> list[int | None]:
    """The option with the largest value; of equal ones the first, so a model cannot win by ties. None where one is no number."""
    return [None if any(map(math.isnan, row)) else max(range(len(row)), key=row.__getitem__) for row in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
