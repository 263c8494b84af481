# SPDX-License-Identifier: Apache-2.0
"""What LLM-KICK's tasks ask, word for word. Pure functions of items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_CHARACTERS = 3072  # of the pages in open-book QA, as in the paper
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

SUMMARISE = (
    "Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency and relevance.\n\n"
    "{text}"
)


def listed_question(item: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """MMLU's prompt (arXiv 2009.03300): options with letters, to be answered by a letter."""
    subject = f" about {item['subject']}" if item.get("subject") else ""
    head = f"The following are multiple choice questions (with answers){subject}.\n\n"
    solved = [f"{_with_letters(example)} {LETTERS[example['answer']]}\n\n" for example in examples]
    return head + "".join(solved) + _with_letters(item)


def _with_letters(item: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, item["options"], strict=False))
    return f"{item['question'].strip()}\n{options}Answer:"


def plain_question(item: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """The question without its options, to be answered by the text of one; or a prompt as it stands."""
    if "prompt" in item:
        return item["prompt"].rstrip()
    solved = [f"Question: {e['question'].strip()}\nAnswer: {e['options'][e['answer']]}\n\n" for e in examples]
    return "".join(solved) + f"Question: {item['question'].strip()}\nAnswer:"


def retrieval_prompt(item: dict[str, Any], with_book: bool) -> str:
    book = f"{item['context'][:CONTEXT_CHARACTERS].strip()}\n\n" if with_book else ""
    return f"{book}Question: {item['question'].strip()}\nAnswer:"


def chat(tokenizer: Any, asked: Sequence[str], answered: Sequence[str]) -> str:
    """A conversation that the model is to go on with."""
    if not tokenizer.chat_template:
        turns = "".join(f"### Human: {q}\n### Assistant: {a}\n" for q, a in zip(asked, answered, strict=False))
        return f"{turns}### Human: {asked[-1]}\n### Assistant:"  # a space would be half of the token that follows
    messages = [{"role": "user", "content": asked[0]}]
    for answer, question in zip(answered, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def as_continuation(tokenizer: Any, answer: str) -> str:
    """An answer as it stands behind the conversation."""
    return answer if tokenizer.chat_template else f" {answer}"


def own_turn(tokenizer: Any, text: str) -> str:
    """An answer as it was written, without what the model has the human ask next, where no template ends its turn."""
    return (text if tokenizer.chat_template else text.split("### Human:")[0]).strip()


def conversation(asked: Sequence[str], answered: Sequence[str]) -> str:
    """What a judge is shown as asked: the last question, and what came before it."""
    if not answered:
        return asked[0]
    turns = "".join(f"User: {q}\n\nAssistant: {a}\n\n" for q, a in zip(asked, answered, strict=False))
    return f"{turns}User: {asked[-1]}"
