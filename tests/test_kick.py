# SPDX-License-Identifier: Apache-2.0
"""LLM-KICK's tasks: each score is that of its definition, computed one item at a time from the prompts as they are written here."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys

import pytest
import torch
from peft import get_peft_model
from small_tokenizers import letters

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.evaluation import KickTask, read_tasks, run_kick, sample_entries, task_entries
from hf_nmsparse.evaluation.answers import exact_match, f1
from hf_nmsparse.evaluation.continuations import write_greedily

kick = importlib.import_module("hf_nmsparse.evaluation.kick")

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
QUESTIONS = [
    {"question": f"who is {name}?", "options": ["a fox", "the dog", f"a {name}", "some cat"][: 2 + n], "answer": n % 2}
    for n, name in enumerate(("bo", "ann", "zoe"))
]
STORIES = [{"text": "a fox ran.", "summary": "fox ran"}, {"text": "the dog ate a long dinner.", "summary": "dog ate"}]
TALKS = [{"turns": ["say a", "and b?"]}, {"turns": ["hi"]}, {"turns": ["who?", "why?", "ok?"]}]


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.fixture
def dense(make_llama):
    return make_llama(initializer_range=0.3, max_position_embeddings=512, eos_token_id=None)


@pytest.fixture
def pruned(dense):
    model = copy.deepcopy(dense)
    nms.prune(model, "magnitude", "2:4")
    return model


def likelihood(model, tokenizer, prompt: str, continuation: str) -> float:
    """One text, without padding. Nothing merges in this tokenizer."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([before + tokenizer(continuation, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logs[place - 1, ids[0, place]].item() for place in range(len(before), ids.shape[1]))


def written(model, tokenizer, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def scores_of(found) -> dict:
    return {(score.task, score.metric): score for score in found.scores}


def ask(model, tokenizer, *tasks, dense=None, **options) -> dict:
    return scores_of(run_kick(model, tokenizer, tasks, dense, **options))


# --- knowledge ------------------------------------------------------------------------------------------------------
def test_factoid_hits_are_looked_for_in_what_was_written_only(dense, tokenizer):
    def prompt(question):
        return f"Please give answer to this question: {question}\nThe answer is"

    first = written(dense, tokenizer, prompt("who is bo?"), 16)
    items = (
        {"question": "who is bo?", "answers": ["nothing like it", first[3:9].upper()]},
        {"question": "is it zebra?", "answers": ["zebra"]},  # the prompt has it; the answer must not count for that
    )
    assert "zebra" not in written(dense, tokenizer, prompt("is it zebra?"), 16)
    found = run_kick(dense, tokenizer, [KickTask("factoid", "factoid", items)])
    hit, right = found.scores
    assert (hit.metric, hit.scores, hit.chance, hit.value) == ("hit", (1.0, 0.0), 0.0, 0.5)
    assert found.texts["factoid"][0] == [first]
    expected = [likelihood(dense, tokenizer, prompt(i["question"]), f" {i['answers'][0]}") for i in items]
    assert (right.metric, right.scores) == ("log_likelihood", pytest.approx(expected, rel=1e-4))


def test_choices_are_judged_by_letters_and_by_texts(dense, tokenizer):
    scores = ask(dense, tokenizer, KickTask("choice", "choice", tuple(QUESTIONS)))
    by_letter, by_byte, right = [], [], []
    for item in QUESTIONS:
        listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", item["options"], strict=False))
        head = "The following are multiple choice questions (with answers).\n\n"
        prompt = f"{head}{item['question']}\n{listed}Answer:"
        letter_values = [likelihood(dense, tokenizer, prompt, f" {x}") for x in "ABCD"[: len(item["options"])]]
        by_letter.append(float(letter_values.index(max(letter_values)) == item["answer"]))
        prompt = f"Question: {item['question']}\nAnswer:"
        values = [likelihood(dense, tokenizer, prompt, f" {option}") for option in item["options"]]
        each = [value / len(option) for value, option in zip(values, item["options"], strict=True)]
        by_byte.append(float(each.index(max(each)) == item["answer"]))
        right.append(values[item["answer"]])
    assert scores["choice", "acc"].scores == tuple(by_letter)
    assert scores["choice", "acc_text"].scores == tuple(by_byte)
    assert by_letter != by_byte
    assert scores["choice", "log_likelihood"].scores == pytest.approx(right, rel=1e-4)
    assert (
        scores["choice", "acc"].chance
        == scores["choice", "acc_text"].chance
        == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    )
    assert scores["choice", "acc"].shots == 0


def test_examples_are_of_the_same_subject_and_at_most_five(dense, tokenizer):
    items = tuple({**item, "subject": subject} for item, subject in zip(QUESTIONS, ("law", "art", "law"), strict=True))
    examples = [
        {"question": f"law {n}?", "options": ["no", "yes"], "answer": n % 2, "subject": "law"} for n in range(7)
    ]
    examples += [{"question": "art?", "options": ["no", "yes"], "answer": 1, "subject": "art"}]
    scores = ask(dense, tokenizer, KickTask("choice", "choice", items, tuple(examples)))
    law = "".join(f"Question: law {n}?\nAnswer: {('no', 'yes')[n % 2]}\n\n" for n in range(5))
    before = {"law": law, "art": "Question: art?\nAnswer: yes\n\n"}
    expected = [
        likelihood(
            dense,
            tokenizer,
            f"{before[i['subject']]}Question: {i['question']}\nAnswer:",
            f" {i['options'][i['answer']]}",
        )
        for i in items
    ]
    assert scores["choice", "log_likelihood"].scores == pytest.approx(expected, rel=1e-4)
    assert {score.shots for score in scores.values()} == {5}
    last = items[1]
    prompt = (
        "The following are multiple choice questions (with answers) about art.\n\nart?\nA. no\nB. yes\nAnswer: B\n\n"
        f"{last['question']}\nA. a fox\nB. the dog\nC. a ann\nAnswer:"
    )
    values = [likelihood(dense, tokenizer, prompt, f" {letter}") for letter in "ABC"]
    assert scores["choice", "acc"].scores[1] == float(values.index(max(values)) == last["answer"])


def test_a_prompt_stands_as_it_is_and_is_asked_for_texts_only(dense, tokenizer):
    items = ({"prompt": "the fox ran to the ", "options": ["dog", "den", "sea"], "answer": 2},)
    scores = ask(dense, tokenizer, KickTask("choice-a", "choice", items, (QUESTIONS[0],)))
    assert [metric for _, metric in scores] == ["acc_text", "log_likelihood"]
    assert {score.shots for score in scores.values()} == {0}
    expected = likelihood(dense, tokenizer, "the fox ran to the", " sea")
    assert scores["choice-a", "log_likelihood"].value == pytest.approx(expected, rel=1e-4)


def test_equal_options_are_equally_right_and_bytes_are_those_of_utf8(dense, tokenizer):
    one = {"question": "who?", "options": ["a fox", "a fox"], "answer": 1}
    same = ask(dense, tokenizer, KickTask("choice", "choice", (one,)))
    assert same["choice", "acc_text"].value == 1.0
    # Of the same tokens but for their count of bytes: <unk> each.
    item = {"question": "who?", "options": ["é" * 3, "x" * 3], "answer": 0}
    values = [likelihood(dense, tokenizer, "Question: who?\nAnswer:", f" {option}") for option in item["options"]]
    each = [values[0] / 6, values[1] / 3]
    found = ask(dense, tokenizer, KickTask("choice", "choice", (item,)))
    assert found["choice", "acc_text"].value == float(each[0] > each[1])
    assert found["choice", "log_likelihood"].value == pytest.approx(values[0], rel=1e-4)


def test_a_broken_model_is_never_right(dense, tokenizer):
    torch.nn.init.constant_(dense.lm_head.weight, math.nan)
    scores = ask(dense, tokenizer, KickTask("choice", "choice", tuple(QUESTIONS)))
    assert scores["choice", "acc"].value == scores["choice", "acc_text"].value == 0.0
    assert math.isnan(scores["choice", "log_likelihood"].value)


def test_retrieval_with_closed_and_open_book(dense, tokenizer):
    long = "so it goes on. " * 10 + "x" * 3100
    items = (
        {"question": "who ran?", "answers": ["a fox", "fox"], "context": "a fox ran."},
        {"question": "who ate?", "answers": ["the dog"], "context": long},
    )
    dense.config.max_position_embeddings = 2**13  # rotary: it can
    found = run_kick(dense, tokenizer, [KickTask("retrieval", "retrieval", items)])
    scores = scores_of(found)
    books = {"closed": ["", ""], "open": ["a fox ran.\n\n", long[:3072] + "\n\n"]}
    for book, before in books.items():
        prompts = [f"{b}Question: {i['question']}\nAnswer:" for b, i in zip(before, items, strict=True)]
        texts = [written(dense, tokenizer, prompt, 32) for prompt in prompts]
        assert found.texts[f"retrieval_{book}"] == [[text] for text in texts]
        lines = [text.strip().split("\n")[0] for text in texts]
        for metric, measure in (("exact_match", exact_match), ("f1", f1)):
            expected = [measure(line, i["answers"]) for line, i in zip(lines, items, strict=True)]
            assert scores[f"retrieval_{book}", metric].scores == tuple(expected)
        right = [likelihood(dense, tokenizer, p, f" {i['answers'][0]}") for p, i in zip(prompts, items, strict=True)]
        assert scores[f"retrieval_{book}", "log_likelihood"].scores == pytest.approx(right, rel=1e-3)


# --- writing --------------------------------------------------------------------------------------------------------
def test_a_model_against_itself_and_a_pruned_one(dense, pruned, tokenizer):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    task = KickTask("summary", "summary", tuple(STORIES))
    first = run_kick(dense, tokenizer, [task], new_tokens=24)
    alone = scores_of(first)
    assert ("summary", "rouge_dense") not in alone
    again = ask(dense, tokenizer, task, dense=first, new_tokens=24)
    assert again["summary", "rouge_dense"].scores == (1.0, 1.0)
    assert again["summary", "text_log_likelihood"] == alone["summary", "text_log_likelihood"]
    other = run_kick(pruned, tokenizer, [task], first, new_tokens=24)
    scores = scores_of(other)
    rouge = [
        scorer.score(theirs, mine)["rougeL"].fmeasure
        for [mine], [theirs] in zip(other.texts["summary"], first.texts["summary"], strict=True)
    ]
    assert scores["summary", "rouge_dense"].scores == pytest.approx(rouge) and max(rouge) < 1
    reference = [
        scorer.score(i["summary"], text)["rougeL"].fmeasure
        for i, [text] in zip(STORIES, other.texts["summary"], strict=True)
    ]
    assert scores["summary", "rouge_reference"].scores == pytest.approx(reference)
    rows = task_entries(other.scores, first.scores, "kick")
    assert all(row["dense"] is not None for row in rows if row["metric"] != "rouge_dense")
    samples = sample_entries([task], other, first)
    assert [row["prompt"] for row in samples] == [story["text"] for story in STORIES]


def test_each_turn_follows_the_models_own_answers_and_likelihoods_those_of_the_dense_one(dense, pruned, make_llama):
    tokenizer = letters(template=TEMPLATE)
    task = KickTask("instruction", "instruction", tuple(TALKS))
    first = run_kick(dense, tokenizer, [task], new_tokens=9)
    found = run_kick(pruned, tokenizer, [task], first, new_tokens=9)
    for model, answers in ((dense, first), (pruned, found)):
        for item, texts in zip(TALKS, answers.texts["instruction"], strict=True):
            prompt = ""
            for asked, text in zip(item["turns"], texts, strict=True):
                prompt += f"<s>user {asked}</s>"
                assert text == written(model, tokenizer, prompt, 9).strip()
                prompt += f"<s>assistant {text}</s>"
    assert found.texts != first.texts
    for model, answers in ((dense, first), (pruned, found)):
        expected = []
        for item, texts in zip(TALKS, first.texts["instruction"], strict=True):
            values, prompt = [], ""
            for asked, text in zip(item["turns"], texts, strict=True):
                prompt += f"<s>user {asked}</s>"
                if text:
                    tokens = len(tokenizer(text).input_ids)
                    values.append(likelihood(model, tokenizer, prompt, text) / tokens)
                prompt += f"<s>assistant {text}</s>"
            expected.append(sum(values) / len(values))
        score = scores_of(answers)["instruction", "text_log_likelihood"]
        assert score.scores == pytest.approx(expected, rel=1e-4)


def test_without_a_template_an_answer_ends_where_the_model_plays_the_human(dense, tokenizer, monkeypatch):
    said = iter([" a b", " so\n### Human: why?\n### Assistant: so", " c"])
    prompts = []

    def write(model, tokenizer, asked, *_):
        prompts.extend(asked)
        return [tokenizer(next(said), add_special_tokens=False).input_ids for _ in asked]

    monkeypatch.setattr(kick, "write_greedily", write)
    found = run_kick(dense, tokenizer, [KickTask("instruction", "instruction", (TALKS[2],))])
    assert found.texts["instruction"] == [["a b", "so", "c"]]
    turns = [
        "### Human: who?\n### Assistant:",
        " a b\n### Human: why?\n### Assistant:",
        " so\n### Human: ok?\n### Assistant:",
    ]
    assert prompts == ["".join(turns[: count + 1]) for count in range(3)]
    expected = [
        likelihood(dense, tokenizer, prompt, text) / len(text)
        for prompt, text in zip(prompts, (" a b", " so", " c"), strict=True)
    ]
    assert scores_of(found)["instruction", "text_log_likelihood"].value == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_repetition_is_of_what_was_written(dense, tokenizer):
    task = KickTask("summary", "summary", ({"text": "a fox ran."},))
    for parameter in dense.lm_head.parameters():  # always the same letter
        torch.nn.init.zeros_(parameter)
    dense.lm_head.bias = torch.nn.Parameter(torch.arange(64.0) * 0)
    dense.lm_head.bias.data[20] = 9.0
    score = ask(dense, tokenizer, task, new_tokens=13)["summary", "repetition"]
    assert score.value == pytest.approx(0.9) and not score.higher_is_better


def test_a_model_that_writes_nothing_is_scored_all_the_same(dense, tokenizer, caplog):
    task = KickTask("summary", "summary", tuple(STORIES))
    first = run_kick(dense, tokenizer, [task], new_tokens=8)
    mute = copy.deepcopy(dense)
    mute.generation_config.eos_token_id = list(range(64))
    scores = ask(mute, tokenizer, task, dense=first, new_tokens=8)
    assert scores["summary", "rouge_dense"].value == scores["summary", "repetition"].value == 0.0
    assert scores["summary", "text_log_likelihood"] == scores_of(first)["summary", "text_log_likelihood"]
    alone = ask(mute, tokenizer, task, new_tokens=8)
    assert ("summary", "text_log_likelihood") not in alone and "no text was written" in caplog.text


def test_a_story_that_is_too_long_loses_its_end_not_the_request(dense, tokenizer, monkeypatch):
    dense.config.max_position_embeddings = 220
    story, prompts = "a fox ran. " * 40, []
    task = KickTask("summary", "summary", ({"text": story}, {"text": story[:30]}))
    monkeypatch.setattr(kick, "write_greedily", lambda *given: prompts.extend(given[2]) or write_greedily(*given))
    run_kick(dense, tokenizer, [task], new_tokens=20)
    request = "Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency and relevance."
    for prompt in prompts:
        asked, kept = prompt.split("\n\n")
        assert asked == f"### Human: {request}"
        shown, end = kept.split("\n")
        assert end == "### Assistant:" and len(shown) >= 20 and story.startswith(shown)
    assert len(tokenizer(prompts[0]).input_ids) == 200 and prompts[1].count(story[:30]) == 1
    dense.config.max_position_embeddings = 100
    with pytest.raises(ConfigError, match="summary: the model has 80 positions besides the 20 new tokens"):
        run_kick(dense, tokenizer, [task], new_tokens=20)


# --- forms, and wrong use -------------------------------------------------------------------------------------------
def every_kind() -> list[KickTask]:
    return [
        KickTask("factoid", "factoid", ({"question": "who ran?", "answers": ["a fox"]},)),
        KickTask("choice", "choice", tuple(QUESTIONS)),
        KickTask("retrieval", "retrieval", ({"question": "who?", "answers": ["a fox"], "context": "a fox ran."},)),
        KickTask("summary", "summary", tuple(STORIES)),
        KickTask("instruction", "instruction", tuple(TALKS)),
    ]


def test_every_form_of_a_model_scores_the_same(dense, tokenizer):
    adapted = get_peft_model(copy.deepcopy(dense), nms.NMSparseConfig(pattern="2:4"))
    nms.set_prior(adapted, "magnitude")
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    tasks = every_kind()
    first = run_kick(dense, tokenizer, tasks, new_tokens=6)
    expected = run_kick(merged, tokenizer, tasks, first, new_tokens=6)
    values = [score.value for score in expected.scores]
    for form in (adapted, nms.compress(copy.deepcopy(merged))):
        found = run_kick(form, tokenizer, tasks, first, new_tokens=6)
        assert found.texts == expected.texts
        assert [(s.task, s.metric, s.sha256) for s in found.scores] == [
            (s.task, s.metric, s.sha256) for s in expected.scores
        ]
        assert [score.value for score in found.scores] == pytest.approx(values, rel=1e-3)
    with adapted.disable_adapter():
        assert run_kick(adapted, tokenizer, tasks, new_tokens=6) == first
    assert values != [score.value for score in first.scores]


def test_what_cannot_be_asked_is_refused_before_work(dense, tokenizer, monkeypatch):
    summary, talks = every_kind()[3:]
    first = run_kick(dense, tokenizer, [summary, talks], new_tokens=3)
    monkeypatch.setattr(type(dense), "forward", lambda *_, **__: pytest.fail("it was asked"))
    fewer = KickTask("summary", "summary", summary.items[:1])
    for tasks, answers, said in (
        ([KickTask("choice", "choice", ())], None, "choice has no items"),
        (
            [KickTask("summary-b", "summary", summary.items)],
            first,
            "summary-b: the dense model was not given this task",
        ),
        ([talks, fewer], first, "2 texts for 2 items, this one is asked for 1 for 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_kick(dense, tokenizer, tasks, answers)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for tasks, answers in (([summary], None), ([talks], first)):  # the first has summaries to be compared with
        with pytest.raises(UnsupportedError, match="rouge-score"):
            run_kick(dense, tokenizer, tasks, answers)


def test_from_files_to_rows(dense, pruned, tokenizer, tmp_path):
    for task in every_kind():
        (tmp_path / f"{task.name}.jsonl").write_text("\n".join(map(json.dumps, task.items)))
    tasks = read_tasks(tmp_path)
    assert sorted(task.sha256 for task in tasks) == sorted(task.sha256 for task in every_kind())
    first = run_kick(dense, tokenizer, tasks, new_tokens=4)
    rows = task_entries(run_kick(pruned, tokenizer, tasks, first, new_tokens=4).scores, first.scores, "kick")
    assert {row["task"] for row in rows} == {
        "choice",
        "factoid",
        "instruction",
        "retrieval_closed",
        "retrieval_open",
        "summary",
    }
    assert all(row["measured_by"] == "hf-nmsparse" and row["suite"] == "kick" for row in rows)
    [acc] = [row for row in rows if row["metric"] == "acc"]
    assert acc["items"] == 3 and acc["lost"] + acc["won"] <= 3 and "difference_standard_error" in acc
