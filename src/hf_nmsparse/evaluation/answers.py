# SPDX-License-Identifier: Apache-2.0
"""Whether an answer is right, and how much of a text repeats itself or another one. Pure functions of texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ..errors import UnsupportedError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def names_an_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer occurs in a text, case and spaces apart: factoid QA of LLM-KICK (arXiv 2310.01382, section 3.1).

    `text` is what the model wrote, without the prompt: an answer that the question names would be a hit for any model.
    """
    flat = _flat(text)
    return any(_flat(answer) in flat for answer in answers if _flat(answer))


def _flat(text: str) -> str:
    return "".join(text.split()).lower()


# --- TriviaQA -------------------------------------------------------------------------------------------------------
def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces: as TriviaQA (arXiv 1705.03551) compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().replace("_", " ").translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the answer equals any of the right ones, normalised; else 0."""
    return float(any(_compared(text) == _compared(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words of the answer, against the right one that fits best."""
    return max((_f1(_compared(text).split(), _compared(answer).split()) for answer in answers), default=0.0)


def _compared(text: str) -> str:
    """Normalised; but of "The The" or "A" nothing would be left, and then whoever writes nothing would be right."""
    return normalized(text) or " ".join(text.lower().split())


def _f1(words: list[str], right: list[str]) -> float:
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right)) if common else 0.0


# --- texts ----------------------------------------------------------------------------------------------------------
def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """Share of the runs of `length` tokens that occurred before in the same text: 0 none, towards 1 a loop."""
    runs = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004) of two texts, by the package rouge-score; equal texts have 1.

    The package sees words of ASCII letters and digits only: it is of no use for texts in other scripts.

    Raises:
        UnsupportedError: if it is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UnsupportedError("ROUGE needs the package rouge-score: pip install 'hf-nmsparse[eval]'") from error
    if text == reference:  # which the package finds unlike where neither has a word that it sees
        return 1.0
    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].fmeasure
