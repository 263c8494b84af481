# SPDX-License-Identifier: Apache-2.0
"""A judge behind a server of one's own: what it is asked, how it is understood, and that the key goes nowhere else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch
from chat_server import ChatServer
from small_tokenizers import letters

from hf_nmsparse.errors import ConfigError, JudgeError, UnratedError
from hf_nmsparse.evaluation import Judge, KickTask, run_kick, task_entries

KEY = "sk-very-secret-123"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr("hf_nmsparse.evaluation.judge.time.sleep", found.append)
    return found


def test_a_judge_is_asked_at_temperature_zero_and_its_rating_read(server):
    judge = Judge(server.url + "/", "some-model", KEY)
    assert judge.rate("what is a fox?", "an animal") == 7.0
    [asked] = server.seen
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (asked["model"], asked["temperature"]) == ("some-model", 0)
    rules, shown = (message["content"] for message in asked["messages"])
    assert "1 to 10" in rules and "[[5]]" in rules and "reference" not in rules
    assert "what is a fox?" in shown and "an animal" in shown and "Reference" not in shown
    judge.rate("q", "a", "a fox is an animal")
    rules, shown = (message["content"] for message in server.seen[1]["messages"])
    assert "a fox is an animal" in shown and "reference" in rules


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("Rating: [[10]]", 10.0),
        ("good\n\nRating: [[ 7.5 ]].", 7.5),
        ("[[3]]", 3.0),
        ('It demands "Rating: [[10]]", which is no help. Rating: [[2]]', 2.0),
    ],
)
def test_ratings_that_are_read(server, said, rating):
    server.reply = lambda asked: said
    assert Judge(server.url, "m").rate("q", "a") == rating
    assert server.seen[0]["key"] is None  # there is no key, so none is sent


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("I would give it a 7.", "m gave no rating; expected 'Rating: .*give it a 7"),
        ("", "no rating"),
        ("Rating: [[11]]", "the rating 11; expected .* N from 1 to 10"),
        ("Rating: [[0]]", "the rating 0"),
        ("Rating: [[-3]]", "the rating -3"),
        ("Rating: [[7", "no rating"),
        ((200, {"choices": [{"message": {"content": None}}]}, {}), "no rating"),
    ],
)
def test_an_answer_without_a_rating_is_an_error_of_its_own(server, said, message):
    server.reply = lambda asked: said
    with pytest.raises(UnratedError, match=message):
        Judge(server.url, "m").rate("q", "a")
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again_after_longer_and_longer_pauses(server, pauses, status):
    judge = Judge(server.url, "m", retries=3)
    server.reply = lambda asked: "Rating: [[4]]" if len(server.seen) == 4 else (status, "wait", {})
    assert judge.rate("q", "a") == 4.0 and pauses == [1, 2, 4]
    server.reply = lambda asked: (status, "still busy", {})
    with pytest.raises(JudgeError, match=rf"HTTP {status}: still busy, 4 times; check"):
        judge.rate("q", "a")
    assert len(server.seen) == 8 and pauses == [1, 2, 4] * 2


def test_the_pause_that_a_server_wishes_is_kept_within_reason(server, pauses):
    wishes = iter(["7", "9999", "Wed, 21 Oct 2026 07:28:00 GMT"])
    server.reply = lambda asked: (429, "", {"Retry-After": next(wishes)}) if len(server.seen) < 4 else "[[1]]"
    assert Judge(server.url, "m").rate("q", "a") == 1.0
    assert pauses == [7, 60, 4]


def test_no_connection_is_said_with_the_address(server, pauses):
    server.close()
    with pytest.raises(JudgeError, match=rf"{server.url}/chat/completions: no answer \(.*refused\), 2 times; check"):
        Judge(server.url, "m", retries=1).rate("q", "a")
    assert pauses == [1]


def test_a_server_that_is_silent_is_given_up(server, pauses):
    go_on = threading.Event()
    server.reply = lambda asked: str(go_on.wait(20))
    with pytest.raises(JudgeError, match="timed out"):
        Judge(server.url, "m", timeout=0.2, retries=0).rate("q", "a")
    go_on.set()


@pytest.mark.parametrize("status", [400, 404])
def test_a_refusal_is_told_at_once_in_the_words_of_the_server(server, pauses, status):
    server.reply = lambda asked: (status, {"error": {"message": f"no model m for {KEY}"}}, {})
    with pytest.raises(JudgeError, match=rf"refused: HTTP {status}: .*no model m for \*\*\*"):
        Judge(server.url, "m", KEY).rate("q", "a")
    assert len(server.seen) == 1 and pauses == []


@pytest.mark.parametrize("body", ["", "<html>", "[]", {"choices": []}, {"error": "x"}, "\xff"])
def test_what_is_no_chat_completion_is_said_so_at_once(server, pauses, body):
    server.reply = lambda asked: (200, body, {})
    with pytest.raises(JudgeError, match="sent no chat completion; check that the URL"):
        Judge(server.url, "m").rate("q", "a")
    assert pauses == []


# --- the key --------------------------------------------------------------------------------------------------------
def test_the_key_comes_from_the_environment_and_shows_nowhere(server, monkeypatch, caplog, pauses):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    judge = Judge(server.url, "m", retries=1)
    shown = [repr(judge)]
    replies = [
        (401, f"Incorrect API key {KEY}", {}),
        (403, KEY, {}),
        (500, f"the key {KEY} broke it", {}),
        (400, KEY, {}),
        (307, "", {"Location": f"{server.url}/other"}),
        f"no rating but {KEY}",
    ]
    with caplog.at_level(logging.DEBUG):
        for reply in replies:
            server.reply = lambda asked, reply=reply: reply
            with pytest.raises(JudgeError) as raised:
                judge.rate("q", "a")
            shown.append(str(raised.value))
    assert all(one["key"] == f"Bearer {KEY}" for one in server.seen)
    assert "the key was not accepted; set OPENAI_API_KEY" in shown[1] and "***" in shown[3]
    assert KEY not in "".join(shown) + caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_is_not_sent_on_to_another_address(server, status):
    server.reply = lambda asked: (status, "", {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(JudgeError, match=rf"HTTP {status}, sent on to .*/elsewhere; give that address"):
        Judge(server.url, "m", KEY).rate("q", "a")
    assert [one["path"] for one in server.seen] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "file:///etc/passwd", "http://", "http://me:secret@host/v1", "https://host/v1?key=secret",
     "http://[::1", "http://host:port/v1"],
)  # fmt: skip
def test_a_url_that_is_none_or_holds_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match=r"OpenAI-compatible API, as https://.* goes into OPENAI_API_KEY") as raised:
        Judge(url, "m")
    assert "secret" not in str(raised.value)


def test_settings_that_cannot_be_are_refused():
    for options in ({"model": " "}, {"timeout": 0}, {"retries": -1}):
        with pytest.raises(ConfigError, match="a judge needs"):
            Judge(**{"url": "http://host/v1", "model": "m", **options})
    for key in ("sk-\u2013x", "sk-a\nb"):
        with pytest.raises(ConfigError, match="characters that no key has") as raised:
            Judge("http://host/v1", "m", key)
        assert "sk-" not in str(raised.value)


# --- tasks ----------------------------------------------------------------------------------------------------------
SUMMARY = KickTask("summary", "summary", ({"text": "a fox ran.", "summary": "fox ran"}, {"text": "the dog ate."}))
TALK = KickTask("instruction", "instruction", ({"turns": ["say a", "and b?"]}, {"turns": ["hi"]}))


@pytest.fixture
def model(make_llama):
    return make_llama(initializer_range=0.3, max_position_embeddings=512, eos_token_id=None)


def rated_by(ratings: list) -> Callable[[dict], str]:
    """Gives these one after another, after that of the check."""
    left = iter([5, *ratings])
    return lambda asked: f"Rating: [[{value}]]" if (value := next(left)) is not None else "I will not."


def test_ratings_are_means_over_turns_and_items(model, server):
    tokenizer = letters()
    server.reply = rated_by([2, 5, 4, 6, 8])
    found = run_kick(model, tokenizer, [SUMMARY, TALK], new_tokens=6, judge=Judge(server.url, "gpt-x"))
    scores = {(score.task, score.metric): score for score in found.scores}
    assert scores["summary", "judge"].scores == (2.0, 5.0) and scores["summary", "judge"].value == 3.5
    assert scores["instruction", "judge"].scores == (5.0, 8.0)
    for task in ("summary", "instruction"):
        assert (
            scores[task, "judge"].measured_by
            == scores[task, "judge_unrated"].measured_by
            == "hf-nmsparse, judge gpt-x"
        )
        assert scores[task, "judge_unrated"].value == 0.0 and not scores[task, "judge_unrated"].higher_is_better
        assert scores[task, "judge"].higher_is_better and scores[task, "repetition"].measured_by == "hf-nmsparse"
    shown = [asked["messages"][1]["content"] for asked in server.seen[1:]]
    assert (
        "Summarize the given story" in shown[0]
        and "a fox ran." in shown[0]
        and "fox ran" in shown[0].split("[Reference]")[1]
    )
    assert "[Reference]" not in shown[1]
    first, second = found.texts["instruction"][0]
    assert f"User: say a\n\nAssistant: {first}\n\nUser: and b?\n" in shown[3] and f"[Response]\n{second}\n" in shown[3]
    assert found.texts["summary"][0][0] in shown[0]


def test_what_the_judge_does_not_rate_is_counted_beside_the_mean_of_the_others(model, server, caplog):
    tokenizer = letters()
    dense = run_kick(model, tokenizer, [SUMMARY], new_tokens=6, judge=Judge(server.url, "m"))
    server.reply = rated_by([None, 4])
    found = run_kick(model, tokenizer, [SUMMARY], dense, new_tokens=6, judge=Judge(server.url, "m"))
    rows = {row["metric"]: row for row in task_entries(found.scores, dense.scores)}
    assert (rows["judge"]["this"], rows["judge"]["dense"], rows["judge"]["items"]) == (4.0, 7.0, 2)
    assert "difference_standard_error" not in rows["judge"]
    assert (rows["judge_unrated"]["this"], rows["judge_unrated"]["dense"]) == (0.5, 0.0)
    assert (rows["judge_unrated"]["lost"], rows["judge_unrated"]["won"]) == (1, 0)  # less would be better
    assert "summary: m gave no rating" in caplog.text
    server.reply = rated_by([None, None])
    found = run_kick(model, tokenizer, [SUMMARY], new_tokens=6, judge=Judge(server.url, "m"))
    assert "judge" not in [score.metric for score in found.scores]
    assert found.scores[-1].metric == "judge_unrated" and found.scores[-1].value == 1.0


def test_a_judge_that_cannot_judge_is_found_out_before_work_and_asked_for_texts_only(model, server, monkeypatch):
    server.reply = lambda asked: (401, "", {})
    choice = KickTask("choice", "choice", ({"question": "who?", "options": ["a", "b"], "answer": 0},))
    run_kick(model, letters(), [choice], judge=Judge(server.url, "m"))
    assert server.seen == []
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(JudgeError, match="the key was not accepted"):
        run_kick(model, letters(), [SUMMARY], judge=Judge(server.url, "m"))
    assert torch.is_grad_enabled()
