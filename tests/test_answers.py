# SPDX-License-Identifier: Apache-2.0
"""Whether an answer is right: the definitions of LLM-KICK and TriviaQA, and what would deceive them."""

from __future__ import annotations

import re
import string
import sys
from collections import Counter

import pytest

from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.evaluation.answers import exact_match, f1, names_an_answer, normalized, repetition, rouge_l


@pytest.mark.parametrize(
    ("text", "answers", "named"),
    [
        (" It was William Shakespeare, in 1599.", ["william  shakespeare"], True),
        ("WILLIAMSHAKESPEARE", ["William Shakespeare"], True),
        ("new\nyork", ["Boston", "New York"], True),
        (" It was Marlowe.", ["William Shakespeare"], False),
        ("", ["Paris"], False),
        ("anything", [" ", ""], False),  # else nothing would be in everything
        (" Zürich", ["ZÜRICH"], True),
    ],
)
def test_an_answer_is_named_whatever_its_case_and_spaces(text, answers, named):
    assert names_an_answer(text, answers) is named


def official_normalization(text: str) -> str:
    """As evaluation/triviaqa_evaluation.py of TriviaQA has it, step by step."""
    text = text.replace("_", " ").lower()
    marks = set(string.punctuation) | {"‘", "’", "´", "`"}
    text = "".join(" " if letter in marks else letter for letter in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).strip()


CASES = [
    "The Beatles",
    "an apple, a day",
    "U.S.A.",
    "rock_and_roll",
    "Hard Day’s Night",
    "`Theatre´ ‘of’ the absurd",
    "  Two\twords\n",
    "Antananarivo",
    "the-a-an",
    "Émile Zola!",
    "",
]


@pytest.mark.parametrize("text", CASES)
def test_answers_are_normalised_as_triviaqa_does(text):
    assert normalized(text) == official_normalization(text)


def test_exact_match_and_f1_are_those_of_triviaqa():
    def official_f1(text: str, answer: str) -> float:
        words, right = official_normalization(text).split(), official_normalization(answer).split()
        common = sum((Counter(words) & Counter(right)).values())
        if common == 0:
            return 0.0
        precision, recall = common / len(words), common / len(right)
        return 2 * precision * recall / (precision + recall)

    rights = ["The Beatles", "Beatles, The band of Liverpool"]
    for text in ("beatles", "The band", "a band of the Beatles", "Liverpool Liverpool", "Oasis", ""):
        assert f1(text, rights) == pytest.approx(max(official_f1(text, right) for right in rights))
        same = [official_normalization(text) == official_normalization(right) for right in rights]
        assert exact_match(text, rights) == float(any(same))
    assert f1("band of Liverpool", rights) == pytest.approx(2 * 3 / (3 + 4))


def test_nothing_is_no_answer_even_where_the_answer_normalises_to_nothing():
    assert normalized("The The") == ""
    assert exact_match("", ["The The"]) == f1("", ["The The"]) == 0.0
    assert exact_match(" the  THE", ["The The"]) == f1("the the", ["The The"]) == 1.0
    assert exact_match("A", ["!"]) == 0.0


def test_repetition_is_the_share_of_runs_that_were_there_before():
    assert repetition(range(20)) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)  # one run is new, nine repeat it
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2, 1, 2], length=2) == pytest.approx(1 / 3)
    assert repetition([1, 1, 1]) == repetition([]) == 0.0


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [
        ("the cat sat on a mat", "cats were sitting on the mat"),
        ("one two three", "three two one"),
        ("nothing alike", "wholly other words"),
        ("", "words"),
        ("Zoë's café", "Zoë in a café"),
    ]
    for text, reference in pairs:
        expected = scorer.score(reference, text)["rougeL"].fmeasure
        assert rouge_l(text, reference) == expected == pytest.approx(rouge_l(reference, text))
    assert 0 < rouge_l(*pairs[0]) < 1


@pytest.mark.parametrize("text", ["", "東京タワー", "the same"])
def test_a_text_is_wholly_like_itself(text):
    pytest.importorskip("rouge_score")
    assert rouge_l(text, text) == 1.0


def test_a_missing_package_is_said_with_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[eval\]'"):
        rouge_l("a", "a")
