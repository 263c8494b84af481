# SPDX-License-Identifier: Apache-2.0
"""Several runs on one page: what they share, what they do not, and what none of them measured."""

import math
import sys
from dataclasses import replace

import pytest
from report_samples import HOSTILE, sample_results, words

from hf_nmsparse import NMPattern
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.report import MaskOverlap, write_comparison
from hf_nmsparse.report.comparison import render_comparison
from hf_nmsparse.report.comparison_figures import draw_comparison
from hf_nmsparse.report.shared import compared_agreements, compared_tasks, compared_texts
from hf_nmsparse.results import MISSING, RunResults

TASK = {"task": "arc_easy", "metric": "acc", "this": 0.47, "dense": 0.58, "items": 500, "sha256": "a" * 64}
TEXT = {"text": "law.txt", "dense": 12.5, "this": 20.0, "tokens": 4096, "sequence_length": 512, "sha256": "l" * 64}


def of_task(**changes) -> RunResults:
    return RunResults(tasks=[TASK | changes])


def page_of(runs: dict[str, RunResults], **more) -> str:
    return words(render_comparison(runs, [], **more))


@pytest.fixture
def two_runs() -> dict[str, RunResults]:
    other = replace(
        sample_results(),
        method="wanda",
        perplexity={"dense": 24.45, "wanda": 216.9},
        packed_ratio=None,
        tasks=[],
        history=[],
    )
    other.samples = [{"prompt": "The capital of France is", "dense": " Paris.", "this": " the the the"}]
    return {"learned": sample_results(), "one-shot": other}


# --- what stands in one row -----------------------------------------------------------------------------------------
def test_the_same_items_share_a_row_and_one_dense_score():
    (row,) = compared_tasks({"a": of_task(), "b": of_task(this=0.5)})
    assert {name: cell.this.value for name, cell in row.cells.items()} == {"a": 0.47, "b": 0.5}
    assert row.dense.value == 0.58 and row.is_share


@pytest.mark.parametrize(
    "changes", [{"sha256": "b" * 64}, {"sha256": None}, {"metric": "acc_norm"}, {"shots": 5}, {"measured_by": "other"}]
)
def test_other_items_stand_in_rows_of_their_own(changes):
    rows = compared_tasks({"a": of_task(), "b": of_task(**changes)})
    assert [list(row.cells) for row in rows] == [["a"], ["b"]]


def test_items_that_are_not_known_are_not_taken_for_the_same():
    assert len(compared_tasks({"a": of_task(sha256=None), "b": of_task(sha256=None)})) == 2
    unknown = {**TEXT, "sha256": None, "tokens": None}
    assert len(compared_texts({name: RunResults(evaluations=[unknown]) for name in "ab"})) == 2


def test_dense_models_that_differ_stay_beside_their_runs():
    runs = {"a": of_task(), "b": of_task(dense=0.7)}
    (row,) = compared_tasks(runs)
    assert row.dense is None
    text = page_of(runs)
    assert "of each run" in text and "−11.0 from 58.0 %" in text and "−23.0 from 70.0 %" in text


def test_rows_of_one_task_stay_together():
    first = RunResults(tasks=[TASK, TASK | {"task": "piqa"}])
    rows = compared_tasks({"a": first, "b": of_task(sha256="b" * 64)})
    assert [row.name for row in rows] == ["arc_easy, acc", "arc_easy, acc", "piqa, acc"]
    assert "in several rows" in page_of({"a": first, "b": of_task(sha256="b" * 64)})
    assert "in several rows" not in page_of({"a": first, "b": first})


def test_the_held_out_text_comes_first_with_the_best_mask(two_runs):
    rows = compared_texts(two_runs)
    assert [row.name for row in rows] == ["wiki test", "law.txt"]
    assert [round(cell.ratio, 2) for cell in rows[0].cells.values()] == [2.34, 8.87]
    shorter = {name: replace(results, perplexity_tokens=512 + len(name)) for name, results in two_runs.items()}
    assert [row.name for row in compared_texts(shorter)] == ["wiki test", "wiki test", "law.txt"]


def test_agreement_is_of_the_same_text():
    entry = sample_results().agreement[0]
    ((top1, kl),) = compared_agreements(
        {"a": RunResults(agreement=[entry]), "b": RunResults(agreement=[entry | {"kl": 0.9}])}
    )
    assert [cell.this.value for cell in top1.cells.values()] == [0.713, 0.713]
    assert [cell.this.value for cell in kl.cells.values()] == [0.42, 0.9]


# --- the page -------------------------------------------------------------------------------------------------------
def test_the_page_holds_the_numbers_of_all_runs(two_runs):
    text = page_of(two_runs, overlap=MaskOverlap(list(two_runs), [[1, 0.812], [0.812, 1]], NMPattern("2:4")))
    for said in ("2 runs side by side", "All are of HuggingFaceTB/SmolLM2-135M-Instruct. Pattern 2:4.", "57.3", "2.34× dense",
                 "216.9", "8.87× dense", "47.1 ± 1.0 %", "−11.3 ± 0.9", "71.3 ± 0.4 %", "56.3 %", "0.0312 ms", "1.31× dense speed",
                 "1 token, some CPU", "16.7 %", "the the the", "candidates (prior polish)", "wanda", "193 of 300"):  # fmt: skip
        assert said in text, said
    assert text.count(" Paris. ") == 1  # the dense text once
    assert text.count("nmsparse demo --pattern 2:4") == 2


def test_what_a_run_did_not_measure_is_called_so(two_runs):
    gone = page_of({"learned": two_runs["learned"], "other": RunResults()})
    assert gone.count(MISSING) > 15
    assert page_of({"a": RunResults(), "b": RunResults()}).count(MISSING) >= 9


def test_other_base_models_are_said():
    runs = {name: RunResults(base_model=name, pattern="2:4") for name in "ab"}
    assert "They are of 2 base models" in page_of(runs)


def test_samples_of_one_prompt_stand_together_and_dense_texts_that_differ_are_told_apart():
    runs = {
        name: RunResults(samples=[{"prompt": "p", "dense": f"dense {name}", "this": f"text {name}"}]) for name in "ab"
    }
    assert "prompt p dense of a dense a a text a dense of b dense b b text b" in page_of(runs)
    both = {"a": RunResults(samples=[{"prompt": "p", "packed": "x", "merged": "y"}])}
    assert "a, packed x a, merged y" in page_of(both)


def test_names_and_texts_of_runs_are_escaped():
    rows = {
        "tasks": [TASK | {"task": HOSTILE, "dense": HOSTILE}],
        "agreement": [{"text": HOSTILE, "kl": 0.1, "tokens": 1}],
    }
    hostile = RunResults(
        base_model=HOSTILE, pattern=HOSTILE, command=HOSTILE, data={"evaluation": HOSTILE}, perplexity={"learned": 3.0, "dense": 2.0},
        samples=[{"prompt": HOSTILE, HOSTILE: HOSTILE}], sizes={HOSTILE: 3}, speed=[{"name": HOSTILE, "tokens": HOSTILE}],
        evaluations=[{"text": HOSTILE, "this": 3.0, "tokens": HOSTILE}], history=[{"step": 1, "nm/hard_eval_loss": 2.0}], **rows,
    )  # fmt: skip
    runs = {HOSTILE: hostile, "b": hostile}
    overlap = MaskOverlap(list(runs), [[1.0, 0.5], [0.5, 1.0]])
    page = render_comparison(runs, draw_comparison(runs, overlap), overlap)
    assert "<script" not in page and "alert('x')" not in page and "&lt;script&gt;" in page


def test_values_that_are_no_numbers_are_not_plotted():
    bad = RunResults(
        tasks=[{}, TASK | {"this": math.nan}], evaluations=[{}, TEXT | {"this": "x"}], agreement=[{"text": "t", "kl": "x"}],
        perplexity={"learned": math.inf}, history=[{"step": "x", "nm/hard_eval_loss": 1.0}], speed=[{"ratio": "x"}],
    )  # fmt: skip
    assert draw_comparison({"a": bad, "b": RunResults()}) == []
    assert "inf" not in page_of({"a": bad, "b": RunResults()})


# --- plots and files ------------------------------------------------------------------------------------------------
def test_page_and_plots_are_written_together(tmp_path, two_runs):
    overlap = MaskOverlap(list(two_runs), [[1, 0.9], [0.9, 1]], NMPattern("2:4"))
    path = write_comparison(two_runs, tmp_path / "new", overlap)
    plots = ["agreement", "overlap", "perplexity", "tasks", "training"]
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*(f"{name}.png" for name in plots), "report.html"])
    assert path.read_text(encoding="utf-8").count("data:image/png;base64,") == 4 * len(plots)


def test_many_runs_and_long_names_are_drawn():
    runs = {f"{place} {'long ' * 20}": of_task(this=place / 20) for place in range(12)}
    assert [plot.name for plot in draw_comparison(runs)] == ["tasks"]


def test_an_overlap_of_strangers_and_no_runs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\['x'\].*not among the runs"):
        write_comparison({"a": RunResults()}, tmp_path / "out", MaskOverlap(["x"], [[1.0]]))
    with pytest.raises(ConfigError, match="no run"):
        write_comparison({}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        write_comparison({"a": of_task(), "b": of_task()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
