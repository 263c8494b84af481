# SPDX-License-Identifier: Apache-2.0
"""LLM-KICK (Jaiswal et al., "Compressing LLMs: The Truth is Rarely Pure and Never Simple", arXiv 2310.01382): what a model
knows, finds in a text, summarises and answers; judged without a paid judge.

What differs from the authors' code, on purpose: an answer is looked for in what the model wrote and not in the prompt as
well; sums are divided by the number of items; options are judged by their likelihoods and not by the last character of one
token; texts are written greedily, so that they can be repeated. Summaries and instructions, which the authors have judged by
GPT-4, are compared with the dense model's own text: by how likely it is, and by ROUGE.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigError
from .answers import exact_match, f1, names_an_answer, repetition, rouge_l
from .continuations import Likelihood, log_likelihoods, write_greedily
from .kick_data import KickTask
from .scores import TaskScore, mean_score

CONTEXT_CHARACTERS = 3072  # of the pages in open-book QA, as in the paper
_SHOTS = 5
_NEW_TOKENS = {"factoid": 16, "retrieval": 32, "summary": 200, "instruction": 200}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class KickAnswers:
    """What one model made of the tasks.

    Args:
        scores (`list[TaskScore]`): metrics in the order of the tasks. "acc": the right letter is the likeliest; "acc_text":
            the right option is the likeliest text, a byte; "hit": an alias is in the answer; "exact_match", "f1": of
            TriviaQA; "log_likelihood": of the right answer, in nats; "text_log_likelihood": of the dense model's own text,
            nats a token; "rouge_dense", "rouge_reference": ROUGE-L; "repetition": share of repeated runs of four tokens.
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
) -> KickAnswers:
    """Give the tasks to a model.

    Args:
        model (`nn.Module`): a causal language model in any form.
        tokenizer: its tokenizer; where it has a chat template, summaries and instructions are asked by that.
        tasks (`Iterable[KickTask]`): see `read_tasks`.
        dense (`KickAnswers`, *optional*): of the dense model, whose texts those of this model are compared with.
        new_tokens (`int`, *optional*): at most so many tokens a summary or answer; by default 200.
        progress (`bool`): show progress bars, if standard error is a terminal.

    Raises:
        ConfigError: if a task is unknown to `dense`.
        UnsupportedError: if texts are to be compared and rouge-score is not installed.
    """
    tasks, found = list(tasks), KickAnswers()
    for task in tasks:  # before hours of work
        if dense is not None and task.kind in ("summary", "instruction"):
            rouge_l("", "")
            if task.name not in dense.texts:
                raise ConfigError(f"{task.name}: the dense model was not given this task")
    for task in tasks:
        run = _Run(model, tokenizer, task, new_tokens, progress)
        if task.kind == "factoid":
            found.scores += run.factoid(found.texts)
        elif task.kind == "choice":
            found.scores += run.choice()
        elif task.kind == "retrieval":
            found.scores += run.retrieval(found.texts)
        else:
            found.scores += run.writing(found.texts, None if dense is None else dense.texts[task.name])
    return found


class _Run:
    """One model on one task."""

    def __init__(self, model: nn.Module, tokenizer: Any, task: KickTask, new_tokens: int | None, progress: bool):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.new_tokens = _NEW_TOKENS.get(task.kind, 0)
        if new_tokens is not None and task.kind in ("summary", "instruction"):
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
            listed = [_listed_question(item, examples) for item, examples in zip(items, shots, strict=True)]
            letters = self._options(
                listed, [[f" {letter}" for letter in _LETTERS[: len(i["options"])]] for i in items]
            )
            scores.append(self._score("acc", _hits([[f.value for f in row] for row in letters], items), **facts))
        asked = [_plain_question(item, examples) for item, examples in zip(items, shots, strict=True)]
        texts = self._options(asked, [[f" {option}" for option in item["options"]] for item in items])
        by_byte = [
            [found.value / len(option.encode()) for found, option in zip(row, item["options"], strict=True)]
            for row, item in zip(texts, items, strict=True)
        ]
        right = [row[item["answer"]].value for row, item in zip(texts, items, strict=True)]
        return [
            *scores,
            self._score("acc_text", _hits(by_byte, items), **facts),
            self._score("log_likelihood", right, shots=facts["shots"]),
        ]

    def retrieval(self, texts: dict[str, list[list[str]]]) -> list[TaskScore]:
        scores = []
        for book in ("closed", "open"):
            name = f"{self.task.name}_{book}"
            prompts = [_retrieval_prompt(item, book == "open") for item in self.task.items]
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
            [_SUMMARISE.format(text=item["text"])] if self.task.kind == "summary" else item["turns"]
            for item in self.task.items
        ]
        written: list[list[str]] = [[] for _ in turns]
        repeated: list[list[float]] = [[] for _ in turns]
        for turn in range(max(map(len, turns))):
            active = [index for index, asked in enumerate(turns) if turn < len(asked)]
            prompts = [_chat(self.tokenizer, turns[index][: turn + 1], written[index]) for index in active]
            tokens = write_greedily(self.model, self.tokenizer, prompts, self.new_tokens, self._bar())
            for index, ids in zip(active, tokens, strict=True):
                written[index].append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
                repeated[index].append(repetition(ids))
        texts[self.task.name] = written
        scores = [self._score("repetition", [_mean(values) for values in repeated], higher_is_better=False)]
        if any("summary" in item for item in self.task.items):
            pairs = [
                (w[0], item["summary"]) for w, item in zip(written, self.task.items, strict=True) if "summary" in item
            ]
            scores.append(self._score("rouge_reference", [rouge_l(*pair) for pair in pairs]))
        reference = written if dense is None else dense
        scores.append(self._likelihood_of_texts(turns, reference))
        if dense is not None:
            pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(written, dense, strict=True)]
            scores.append(self._score("rouge_dense", [_mean([rouge_l(*pair) for pair in row]) for row in pairs]))
        return scores

    # --- what they share --------------------------------------------------------------------------------------------
    def _likelihood_of_texts(self, turns: list[list[str]], texts: list[list[str]]) -> TaskScore:
        """Nats a token of the dense model's own texts, in its own conversations."""
        pairs, owners = [], []
        for index, (asked, answers) in enumerate(zip(turns, texts, strict=True)):
            for turn, answer in enumerate(answers):
                if answer:
                    pairs.append((_chat(self.tokenizer, asked[: turn + 1], answers[:turn]), answer))
                    owners.append(index)
        found = log_likelihoods(self.model, self.tokenizer, pairs, self._bar())
        by_item = {}
        for index, likelihood in zip(owners, found, strict=True):
            by_item.setdefault(index, []).append(likelihood.value / likelihood.tokens)
        if not by_item:
            raise ConfigError(f"{self.task.name}: the dense model wrote nothing")
        return self._score("text_log_likelihood", [_mean(values) for values in by_item.values()])

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
        """Solved items of the same subject."""
        same = [other for other in self.task.examples if other.get("subject") == item.get("subject")]
        return [other for other in same if "question" in other][:_SHOTS]

    def _bar(self) -> str | None:
        return self.task.name if self.progress else None

    def _score(
        self,
        metric: str,
        values: Sequence[float],
        name: str | None = None,
        chance: float | None = None,
        shots: int = 0,
        higher_is_better: bool = True,
    ) -> TaskScore:
        return mean_score(
            name or self.task.name,
            metric,
            values,
            shots=shots,
            measured_by="hf-nmsparse",
            sha256=self.task.sha256,
            higher_is_better=higher_is_better,
            chance=chance,
        )


# --- prompts --------------------------------------------------------------------------------------------------------
_SUMMARISE = (
    "Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency and relevance.\n\n"
    "{text}"
)


def _listed_question(item: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """MMLU's prompt (arXiv 2009.03300): options with letters, to be answered by a letter."""
    subject = f" about {item['subject']}" if item.get("subject") else ""
    head = f"The following are multiple choice questions (with answers){subject}.\n\n"
    solved = [f"{_with_letters(example)} {_LETTERS[example['answer']]}\n\n" for example in examples]
    return head + "".join(solved) + _with_letters(item)


def _with_letters(item: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(_LETTERS, item["options"], strict=False))
    return f"{item['question'].strip()}\n{options}Answer:"


def _plain_question(item: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """The question without its options, to be answered by the text of one; or a prompt as it stands."""
    if "prompt" in item:
        return item["prompt"].rstrip()
    solved = [f"Question: {e['question'].strip()}\nAnswer: {e['options'][e['answer']]}\n\n" for e in examples]
    return "".join(solved) + f"Question: {item['question'].strip()}\nAnswer:"


def _retrieval_prompt(item: dict[str, Any], with_book: bool) -> str:
    book = f"{item['context'][:CONTEXT_CHARACTERS].strip()}\n\n" if with_book else ""
    return f"{book}Question: {item['question'].strip()}\nAnswer:"


def _chat(tokenizer: Any, asked: Sequence[str], answered: Sequence[str]) -> str:
    """A conversation that the model is to go on with."""
    if not tokenizer.chat_template:
        turns = "".join(f"### Human: {q}\n### Assistant: {a}\n" for q, a in zip(asked, answered, strict=False))
        return f"{turns}### Human: {asked[-1]}\n### Assistant: "
    messages = [{"role": "user", "content": asked[0]}]
    for answer, question in zip(answered, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _hits(values: Sequence[Sequence[float]], items: Sequence[dict[str, Any]]) -> list[float]:
    """1 where the right option has the largest value. Of equal ones the first counts, so a model cannot win by ties."""
    return [
        float(max(range(len(row)), key=row.__getitem__) == item["answer"])
        for row, item in zip(values, items, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
