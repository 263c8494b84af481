# SPDX-License-Identifier: Apache-2.0
"""The items of LLM-KICK: what files may hold, what is drawn, and how rows of the Hub's datasets become items."""

from __future__ import annotations

import json
import sys

import pytest

from hf_nmsparse.errors import ConfigError, FormatError, UnsupportedError
from hf_nmsparse.evaluation import KickTask, fetch_tasks, read_tasks
from hf_nmsparse.evaluation.kick_data import HUB_TASKS

GOOD = {
    "factoid": {"question": "who?", "answers": ["a", "b"]},
    "choice": {"question": "who?", "options": ["a", "b"], "answer": 1, "subject": "law"},
    "retrieval": {"question": "who?", "answers": ["a"], "context": "a text"},
    "summary": {"text": "a story", "summary": "a"},
    "instruction": {"turns": ["do", "and then"]},
}


def write(folder, name: str, *items) -> None:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- files ----------------------------------------------------------------------------------------------------------
def test_files_are_tasks_by_their_names(tmp_path):
    for kind, item in GOOD.items():
        write(tmp_path, kind, {**item, "id": 7, "note": None}, "", item)
    write(tmp_path, "choice-law", {"prompt": "It is ", "options": ["so", "not\u2028so"], "answer": 0})
    write(tmp_path, "choice-law-examples", GOOD["choice"])
    write(tmp_path, "other", "no JSON at all")
    (tmp_path / "factoid.txt").write_text("no JSON either")
    tasks = {task.name: task for task in read_tasks(str(tmp_path))}
    assert sorted(tasks) == sorted([*GOOD, "choice-law"])
    for kind, item in GOOD.items():
        assert tasks[kind].kind == kind and tasks[kind].items == (item, item)  # fields of no meaning are left out
    assert tasks["choice-law"].kind == "choice" and tasks["choice-law"].examples == (GOOD["choice"],)
    assert tasks["choice-law"].items[0]["options"][1] == "not\u2028so"
    assert [task.name for task in read_tasks(tmp_path, (name for name in ("summary", "choice")))] == [
        "choice",
        "summary",
    ]


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "factoid.jsonl").write_text(json.dumps(GOOD["factoid"]), encoding="utf-8-sig")
    assert read_tasks(tmp_path)[0].items == (GOOD["factoid"],)


def changed(kind: str, **fields) -> str:
    item = {**GOOD[kind], **fields}
    return json.dumps({name: value for name, value in item.items() if value != "absent"})


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        ("factoid", "{", "not JSON"),
        ("factoid", '{"question": ', "not JSON"),
        ("factoid", "[" * 100_000, "not JSON"),
        ("factoid", '{"question": ' + "1" * 5000 + "}", "not JSON"),
        ("factoid", b'{"question": "\xff"}', "not JSON .*utf-8"),
        ("factoid", "[]", "expected an object with question, answers, got list"),
        ("factoid", "null", "got NoneType"),
        ("factoid", '"text"', "got str"),
        ("factoid", changed("factoid", question="absent"), "question should be a text that is not empty; got null"),
        ("factoid", changed("factoid", question=" \n"), "question should be a text that is not empty"),
        ("factoid", changed("factoid", question=3), "question should be .* got 3"),
        ("factoid", changed("factoid", question="\ud800"), "question should be"),
        ("factoid", changed("factoid", answers=[]), "answers should be a list of texts that are not empty; got"),
        ("factoid", changed("factoid", answers="a"), 'answers should be .* got "a"'),
        ("factoid", changed("factoid", answers=["a", ""]), "answers should be"),
        ("factoid", changed("factoid", answers=["a", None]), "answers should be"),
        ("factoid", changed("factoid", answers={"a": 1}), "answers should be"),
        ("choice", changed("choice", options=["a"]), "options should be a list of 2 to 26 texts"),
        ("choice", changed("choice", options=[str(n) for n in range(27)]), "options should be a list of 2 to 26"),
        ("choice", changed("choice", options="ab"), "options should be"),
        ("choice", changed("choice", options="absent"), "options should be"),
        ("choice", changed("choice", answer=2), "answer should be the index of an option, from 0; got 2"),
        ("choice", changed("choice", answer=-1), "answer should be"),
        ("choice", changed("choice", answer=True), "answer should be"),
        ("choice", changed("choice", answer=1.0), "answer should be"),
        ("choice", changed("choice", answer=float("nan")), "answer should be"),
        ("choice", changed("choice", answer="b"), "answer should be"),
        ("choice", changed("choice", subject=["law"]), "subject should be"),
        ("choice", changed("choice", question="absent"), "give either a question, or a prompt"),
        ("choice", changed("choice", prompt="and"), "give either a question, or a prompt"),
        ("retrieval", changed("retrieval", context="absent"), "context should be"),
        ("summary", changed("summary", text=""), "text should be"),
        ("summary", changed("summary", summary=4), "summary should be"),
        ("instruction", changed("instruction", turns=[]), "turns should be"),
        ("instruction", changed("instruction", turns=[["a"]]), "turns should be"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_else_raised(tmp_path, kind, line, said):
    path = tmp_path / f"{kind}.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(GOOD[kind]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(FormatError, match=rf"{kind}\.jsonl, line 3: .*{said}") as raised:
        read_tasks(tmp_path)
    assert len(str(raised.value)) < 500


def test_wrong_uses_of_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"absent: no such folder; it should hold factoid\.jsonl, choice\.jsonl"):
        read_tasks(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no task"):
        read_tasks(tmp_path)
    write(tmp_path, "choice-examples", GOOD["choice"])
    with pytest.raises(ConfigError, match="holds no task"):
        read_tasks(tmp_path)
    write(tmp_path, "summary", GOOD["summary"])
    with pytest.raises(ConfigError, match=r"choice-examples\.jsonl: examples .* no such task choice"):
        read_tasks(tmp_path)
    write(tmp_path, "choice", GOOD["choice"])
    with pytest.raises(ConfigError, match="has no task law; it has choice, summary"):
        read_tasks(tmp_path, ["law", "summary"])
    write(tmp_path, "summary-examples", GOOD["summary"])
    with pytest.raises(ConfigError, match="examples are shown before items of multiple choice"):
        read_tasks(tmp_path)
    (tmp_path / "summary-examples.jsonl").unlink()
    (tmp_path / "summary.jsonl").write_text("\n \n")
    with pytest.raises(FormatError, match=r"summary\.jsonl holds no item"):
        read_tasks(tmp_path)


def test_a_limit_draws_the_same_items_each_time_in_their_order():
    items = tuple({"text": f"story {n}"} for n in range(40))
    task = KickTask("summary", "summary", items)
    few = task.limited(10)
    assert few == task.limited(10) and len(few.items) == 10
    places = [items.index(item) for item in few.items]
    assert places == sorted(places) and places != list(range(10))
    assert task.limited(None) is task and task.limited(40) is task and task.limited(99) is task
    with pytest.raises(ConfigError, match="limit=0; expected at least 1 item of summary"):
        task.limited(0)


def test_the_digest_is_of_all_that_is_asked():
    item, other = GOOD["choice"], {**GOOD["choice"], "answer": 0}
    task = KickTask("choice", "choice", (item,))
    assert KickTask("choice-b", "choice", (dict(reversed(item.items())),)).sha256 == task.sha256
    differing = [
        KickTask("choice", "choice", (other,)),
        KickTask("choice", "choice", (item, item)),
        KickTask("choice", "choice", (item,), (other,)),
        KickTask("choice", "choice", (item,), (item,)),
    ]
    assert len({task.sha256, *(one.sha256 for one in differing)}) == 5


# --- the Hub --------------------------------------------------------------------------------------------------------
NAMES = [["Bo", "bo b."], [], ["Ann"]]
FREEBASE = {
    "lists of structs": [{"Answers": [{"AnswersName": names} for names in NAMES]}, {"Answers": []}],
    "structs of lists": {"Answers": [{"AnswersName": NAMES}, {"AnswersName": []}]},
    "structs of structs": {"Answers": {"AnswersName": [NAMES, []]}},
}
PAGES = {
    "lists of structs": ([{"wiki_context": "wiki 1"}, {"wiki_context": ""}], [{"search_context": "search"}]),
    "structs of lists": ({"wiki_context": ["wiki 1", ""], "title": ["x", "y"]}, {"search_context": ["search"]}),
}


@pytest.mark.parametrize("form", FREEBASE)
def test_rows_of_freebase_qa(form):
    row = {"RawQuestion": "who?", "ProcessedQuestion": "who", "Parses": FREEBASE[form]}
    assert HUB_TASKS["factoid"].item(row) == {"question": "who?", "answers": ["Ann", "Bo", "bo b."]}


@pytest.mark.parametrize("form", PAGES)
def test_rows_of_trivia_qa(form):
    wiki, search = PAGES[form]
    answer = {"value": "Bo", "aliases": ["Bo", "B.", ""], "normalized_value": "bo"}
    row = {"question": "who?", "answer": answer, "entity_pages": wiki, "search_results": search}
    expected = {"question": "who?", "answers": ["Bo", "Bo", "B."], "context": "wiki 1\nsearch"}
    assert HUB_TASKS["retrieval"].item(row) == expected


def test_rows_of_the_other_datasets():
    row = {"question": "who?", "subject": "high_school_law", "choices": ["a", "b", "c", "d"], "answer": 2}
    expected = {"question": "who?", "options": ["a", "b", "c", "d"], "answer": 2, "subject": "high school law"}
    assert HUB_TASKS["choice"].item(row) == expected
    row = {"article": "a story", "highlights": "a", "id": "x"}
    assert HUB_TASKS["summary"].item(row) == {"text": "a story", "summary": "a"}
    row = {"category": "writing", "prompt": ["do", "more"], "reference": [], "prompt_id": 1}
    assert HUB_TASKS["instruction"].item(row) == {"turns": ["do", "more"]}


@pytest.fixture
def hub(monkeypatch):
    """`datasets` with rows of one's own, streamed as the real package does; what was asked for."""
    real = pytest.importorskip("datasets")
    asked = []

    def install(**splits):
        def load_dataset(repo, config, *, split, streaming, revision):
            asked.append((repo, config, split, streaming, revision))
            found = splits[split]
            if isinstance(found, BaseException):
                raise found
            return real.Dataset.from_list(found).to_iterable_dataset()

        monkeypatch.setattr(real, "load_dataset", load_dataset)
        return asked

    return install


def mmlu(count: int) -> list[dict]:
    """Sorted by subject, as the real one."""
    return [
        {"question": f"q{n}", "subject": f"subject_{n // 100}", "choices": ["a", "b"], "answer": n % 2}
        for n in range(count)
    ]


def test_items_are_drawn_from_all_subjects_the_same_each_time(hub):
    asked = hub(test=mmlu(6000), dev=mmlu(5))
    [task] = fetch_tasks(["choice"], limit=200)
    assert asked == [("cais/mmlu", "all", "test", True, None), ("cais/mmlu", "all", "dev", True, None)]
    assert (task.name, task.kind, len(task.items), len(task.examples)) == ("choice", "choice", 200, 5)
    subjects = {int(item["subject"].split()[1]) for item in task.items}
    assert len(subjects) > 45 and max(subjects) > 55  # of 60: 200 drawn of all of them leave out two or so
    assert [task] == fetch_tasks(["choice"], limit=200)
    assert len(fetch_tasks(["choice"])[0].items) == 500


def test_rows_that_lack_something_are_left_out_and_counted(hub, caplog):
    parses = [{"Answers": [{"AnswersName": ["Bo"]}]}], [{"Answers": [{"AnswersName": [""]}]}]
    hub(test=[{"RawQuestion": f"q{n}", "Parses": parses[n % 2]} for n in range(6)])
    [task] = fetch_tasks(["factoid"])
    assert sorted(item["question"] for item in task.items) == ["q0", "q2", "q4"]
    assert "KelvinJiang/freebase_qa, test: 3 rows without an answer or a text were left out" in caplog.text
    hub(test=[{"RawQuestion": "q", "Parses": parses[1]}])
    with pytest.raises(ConfigError, match=r"factoid: KelvinJiang/freebase_qa \(default, test\) gave no items"):
        fetch_tasks(["factoid"])


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it\nmore"), ValueError("no split"), FileNotFoundError("gone")]
)
def test_without_network_the_dataset_and_the_way_out_are_named(hub, error):
    hub(train=error)
    said = rf"instruction: could not read HuggingFaceH4/mt_bench_prompts \(default, train\) from the Hub \({str(error).splitlines()[0]}\); check the network, or give a folder"
    with pytest.raises(ConfigError, match=said):
        fetch_tasks(["instruction"])


def test_other_columns_are_one_clear_error(hub):
    hub(test=[{"body": "x"}])
    with pytest.raises(
        ConfigError, match=r"summary: could not read abisee/cnn_dailymail \(3\.0\.0, test\) .*'article'"
    ):
        fetch_tasks(["summary"])


def test_wrong_uses_of_the_hub(monkeypatch):
    with pytest.raises(ConfigError, match="no task law on the Hub; there are factoid, choice, retrieval"):
        fetch_tasks(["choice", "law"])
    with pytest.raises(ConfigError, match="limit=0; expected at least 1"):
        fetch_tasks(["choice"], limit=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[eval\]'"):
        fetch_tasks(["choice"])
