# SPDX-License-Identifier: Apache-2.0
"""`nmsparse eval`: what it says, keeps and refuses. The numbers are those of the library, which has tests of its own."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer
from command_line import facts, run
from small_inputs import make_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.evaluation import agreement, perplexity, read_tasks, run_kick, task_entries
from hf_nmsparse.results import RunResults

SHORT = "--sequence-length 32"
KICK = "--suite kick --data items --new-tokens 6"
ITEMS = {
    "choice": [{"question": f"w{n} w9", "options": ["w1 w2", "w3", "w4"], "answer": n % 3} for n in range(5)],
    "factoid": [{"question": "w5 w6", "answers": ["w7"]}, {"question": "w8", "answers": ["w1", "w2"]}],
    "instruction": [{"turns": ["w1 w2", "w3"]}, {"turns": ["w4"]}],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`base`, `test.txt`, `items` of LLM-KICK, and `pruned`, `pruned/mask` and `packed`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "items").mkdir()
    for name, items in ITEMS.items():
        (folder / "items" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    run(f"prune {folder}/base --criterion magnitude --output {folder}/pruned")
    run(f"compress {folder}/pruned --output {folder}/packed")
    return folder


@pytest.fixture
def own(there):
    """Copies of what is recorded into, because the inputs are of all tests."""
    for name in ("pruned", "packed"):
        (there / name).unlink()
        shutil.copytree((there / "base").resolve().parent / name, there / name)
    return there


def said(line: str, code: int = 2) -> str:
    return " ".join(run(line, code).stderr.split())


def scores_of_the_library(model: str, dense: str | None, folder: str = "items") -> list[dict]:
    tokenizer, tasks = AutoTokenizer.from_pretrained("base"), read_tasks(folder)
    load = AutoModelForCausalLM.from_pretrained
    first = None if dense is None else run_kick(load(dense), tokenizer, tasks, new_tokens=6)
    found = run_kick(load(model), tokenizer, tasks, first, new_tokens=6)
    return task_entries(found.scores, None if first is None else first.scores, "kick")


# --- tasks ----------------------------------------------------------------------------------------------------------
def test_tasks_are_measured_beside_the_base_that_the_results_name(there):
    found = facts(f"eval pruned {KICK}")
    expected = scores_of_the_library("pruned", "base")
    assert [(row["task"], row["metric"]) for row in found["tasks"]] == [(e["task"], e["metric"]) for e in expected]
    for row, entry in zip(found["tasks"], expected, strict=True):
        assert row["this"] == pytest.approx(entry["this"], rel=1e-2, abs=1e-6)
        assert {**row, "this": 0, "dense": 0}.keys() == {**entry, "dense": 0}.keys()
        assert (row["sha256"], row["items"], row["suite"]) == (entry["sha256"], entry["items"], "kick")
    assert found["ok"] and found["model"] == "pruned" and "perplexity" not in found and "recorded" not in found
    shown = run(f"eval pruned {KICK} --limit 1").stdout
    assert "pruned on tasks" in shown and "acc_text" in shown and "instruction" in shown


def test_without_a_dense_model_it_says_so_and_measures_the_model_alone(there):
    result = run(f"eval base {KICK} --json")
    rows = json.loads(result.stdout)["tasks"]
    assert "no dense model is known; name it with --dense" in result.stderr
    assert rows and not any("dense" in row for row in rows)
    assert "rouge_dense" not in [row["metric"] for row in rows]


def test_a_mask_a_masked_and_a_packed_model_score_the_same(there):
    values = [
        [row["this"] for row in facts(f"eval {model} {KICK}")["tasks"]]
        for model in ("pruned", "pruned/mask", "packed", "base --mask pruned/mask")
    ]
    assert all(other == pytest.approx(values[0], rel=1e-2, abs=1e-2) for other in values[1:])
    assert values[0] != [row["this"] for row in facts(f"eval base --dense base {KICK}")["tasks"]]


def test_a_dense_model_is_named(there):
    rows = facts(f"eval base --dense base {KICK}")["tasks"]
    assert all(row["this"] == row["dense"] for row in rows if row["metric"] != "rouge_dense")
    assert "--dense pruned is sparse itself; there is no dense one to compare with" in said(
        f"eval base --dense pruned {KICK}"
    )


def test_tasks_of_ones_own_for_the_harness(there):
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS["choice"])))
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path("items.jsonl").absolute())}, "cache_dir": "cache"},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    Path("tasks/mine.yaml").write_text(yaml.safe_dump(config))
    [row] = facts("eval pruned --tasks mine --include-path tasks --limit 4 --output eval.json")["tasks"]
    assert (row["task"], row["metric"], row["items"], row["suite"]) == ("mine", "acc", 4, None)
    assert 0 <= row["this"] <= 1 and row["dense"] is not None and row["measured_by"].startswith("lm-eval")
    assert RunResults.read("eval.json").tasks == [row]


# --- records --------------------------------------------------------------------------------------------------------
def test_a_second_run_adds_its_rows_and_renews_those_of_the_same_thing(there):
    run(f"eval pruned {KICK} --output out/eval.json")
    first = RunResults.read("out/eval.json")
    assert (
        Path(first.base_model).name == "base"
        and len(first.samples) == 2
        and first.evaluations == first.agreement == []
    )
    text = f"--text test.txt {SHORT} --max-tokens 160"
    found = facts(f"eval pruned {text} --agreement --output out/eval.json")
    assert found["recorded"] == "out/eval.json"
    run(f"eval pruned {text} --stride 8 --output out/eval.json")
    run(f"eval pruned {KICK} --limit 2 --output out/eval.json")  # of other items
    run(f"eval pruned {KICK} {text} --agreement --output out/eval.json")
    results = RunResults.read("out/eval.json")
    assert len(results.agreement) == 1 and [entry.get("stride") for entry in results.evaluations] == [8, None]
    keys = [(row["task"], row["metric"], row["sha256"]) for row in results.tasks]
    assert len(set(keys)) == len(keys)
    limited = [row for row in results.tasks if row["task"] == "choice" and row["items"] == 2]
    assert len(limited) == 3 and len(results.tasks) == len(first.tasks) + len(
        limited
    )  # the others have 2 items anyway
    assert {row["prompt"] for row in results.samples} == {"w1 w2", "w4"}
    assert results.command.count("\n") >= 4  # each of them


def test_text_agreement_and_stride_are_those_of_the_library(there):
    found = facts(f"eval packed --text test.txt {SHORT} --max-tokens 160 --agreement --stride 8 --output eval.json")
    pruned, base = (AutoModelForCausalLM.from_pretrained(name) for name in ("pruned", "base"))
    ids = AutoTokenizer.from_pretrained("base")(Path("test.txt").read_text(), return_tensors="pt").input_ids[0][:160]
    expected = perplexity(pruned, ids, seq_len=32, stride=8)
    assert found["perplexity"] == pytest.approx(expected.value, rel=1e-2) and found["tokens"] == 159
    assert found["word_perplexity"] == pytest.approx(found["perplexity"] ** (159 / 160), rel=1e-6)  # a word a token
    assert found["dense"] == pytest.approx(perplexity(base, ids, seq_len=32, stride=8).value, rel=1e-2)
    compared = agreement(pruned, ids, base, seq_len=32)
    assert found["agreement"]["kl"] == pytest.approx(compared.kl, rel=0.1)
    assert found["agreement"]["tokens"] == compared.tokens == 155
    results = RunResults.read("eval.json")
    assert results.agreement[0]["top1"] == found["agreement"]["top1"]
    assert results.evaluations[0]["word_perplexity"] == found["word_perplexity"]


@pytest.mark.parametrize("folder", ["pruned", "pruned/mask", "packed"])
def test_recording_renews_results_and_card(own, folder):
    before = RunResults.read(f"{folder}/results.json")
    assert before.tasks == []
    for _ in range(2):
        found = facts(f"eval {folder} {KICK} --record")
    assert found["recorded"] == folder
    results = RunResults.read(f"{folder}/results.json")
    assert results.tasks == found["tasks"] and all("dense" in row for row in results.tasks if row["metric"] == "acc")
    assert [set(row) for row in results.samples[-2:]] == [{"prompt", "dense", "this"}] * 2
    assert (results.pattern, results.sparse_layers) == (before.pattern, before.sparse_layers)
    assert nms.verify(folder).ok


def test_whoever_stops_between_tasks_keeps_what_was_measured(there, monkeypatch):
    eval_run = importlib.import_module("hf_nmsparse.cli.eval_run")
    asked = []

    def stopping(model, tokenizer, tasks, *rest, **options):
        asked.append(tasks[0].name)
        if tasks[0].name != "choice":
            raise KeyboardInterrupt
        return run_kick(model, tokenizer, tasks, *rest, **options)

    monkeypatch.setattr(eval_run, "run_kick", stopping)
    found = facts(f"eval pruned {KICK} --output eval.json", 130)
    assert found == {"ok": False, "error": "stopped", "kind": "KeyboardInterrupt"}
    assert asked == ["choice", "choice", "factoid"]
    rows = RunResults.read("eval.json").tasks
    assert {row["task"] for row in rows} == {"choice"} and all(row["dense"] is not None for row in rows)


# --- a judge --------------------------------------------------------------------------------------------------------
def test_a_judge_rates_both_models_and_its_key_is_written_nowhere(own, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = ChatServer()
    try:
        line = f"eval packed {KICK} --judge {server.url} --judge-model gpt-x --record --json"
        monkeypatch.setattr("sys.argv", ["nmsparse", *line.split()])
        result = run(line)
    finally:
        server.close()
    rows = [row for row in json.loads(result.stdout)["tasks"] if row["metric"] == "judge"]
    [row] = rows
    assert (row["task"], row["this"], row["dense"]) == ("instruction", 7.0, 7.0)
    assert row["measured_by"] == "hf-nmsparse, judge gpt-x"
    assert {asked["key"] for asked in server.seen} == {"Bearer sk-secret"}
    assert len(server.seen) == 2 * (1 + 3)  # of each model: the check, and three texts
    written = [path.read_text() for path in Path("packed").iterdir() if path.suffix in (".json", ".md")]
    assert any("--judge-model gpt-x" in text for text in written)
    assert "sk-secret" not in result.stdout + result.stderr + "".join(written)


# --- wrong use ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base", "nothing to measure; give --text, --suite or --tasks"),
        ("base --suite nothing", "--suite nothing: use one of wanda, ast, maskllm, patch, kick, or name --tasks"),
        ("base --suite kick --agreement --data items", "--agreement goes with --text"),
        ("base --suite kick --stride 4 --data items", "--stride goes with --text"),
        ("base --suite kick --max-tokens 4 --data items", "--max-tokens goes with --text"),
        ("base --suite kick --sequence-length 4 --data items", "--sequence-length goes with --text"),
        ("base --text test.txt --data items", "--data goes with --suite kick"),
        ("base --text test.txt --new-tokens 4", "--new-tokens goes with --suite kick"),
        ("base --text test.txt --limit 4", "--limit goes with --suite or --tasks"),
        ("base --text test.txt --include-path items", "--include-path goes with --tasks"),
        ("base --suite kick --data items --shots 2", "--shots goes with --tasks or a suite of lm-eval"),
        ("base --text test.txt --judge http://h/v1 --judge-model m", "--judge goes with --suite kick"),
        ("base --suite kick --data items --judge http://h/v1", "--judge goes with --judge-model"),
        ("base --suite kick --data items --judge-model m", "--judge-model goes with --judge"),
        ("base --suite kick --data items --judge ftp://h/v1 --judge-model m", "that of an OpenAI-compatible API"),
        ("base --suite kick --data none", "none: no such folder; it should hold factoid.jsonl"),
        ("base --suite kick --data items --limit 0", "--limit"),
        ("base --text test.txt --agreement", "--agreement needs a dense model to compare with, and none is known"),
        ("base --suite kick --data items --output items", "--output items is a folder; name a file to write"),
        ("base --suite kick --data items --output test.txt/x.json", "test.txt is a file; name a file in a folder"),
        ("base --suite kick --data items --record", "has none; prune, train"),
        ("base --suite kick --data items", "max_new_tokens=200, the model has 64 positions"),  # by default
    ],
)
def test_wrong_uses_say_what_to_do(there, line, message):
    assert message in said(f"eval {line}")


def test_a_judge_needs_texts_and_a_damaged_line_is_a_failed_check(there):
    Path("few").mkdir()
    shutil.copyfile("items/choice.jsonl", "few/choice.jsonl")
    line = "eval base --suite kick --data few"
    assert "few has none; leave it out" in said(f"{line} --judge http://h/v1 --judge-model m")
    Path("few/choice.jsonl").write_text('{"question": "w1"}\n')
    assert "choice.jsonl, line 1: options should be a list of 2 to 26 texts" in said(line, 1)
    assert facts(line, 1)["kind"] == "FormatError"
    Path("eval.json").write_text("{")
    assert "is not JSON" in said(f"eval base {KICK} --output eval.json", 1)
    assert Path("eval.json").read_text() == "{"
