# SPDX-License-Identifier: Apache-2.0
"""The report: one self-contained page whose numbers are those of the results, and plots only of what was measured."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys

import matplotlib
import numpy
import pytest
from PIL import Image
from report_samples import HOSTILE, sample_results, words

from hf_nmsparse.errors import FormatError, UnsupportedError
from hf_nmsparse.report import facts, layers, measured, write_report
from hf_nmsparse.report.canvas import DARK, LIGHT
from hf_nmsparse.report.figures import draw
from hf_nmsparse.report.html import render
from hf_nmsparse.results import MISSING, RunResults

ALL_PLOTS = [
    "perplexity", "tasks", "agreement_layers", "training", "mask", "layer_error", "layer_flips", "layer_map", "sizes", "time",
]  # fmt: skip


@pytest.fixture(scope="module")
def plots():
    return draw(sample_results())


@pytest.fixture(scope="module")
def page(plots):
    return render(sample_results(), plots)


# --- the page -------------------------------------------------------------------------------------------------------
def test_page_and_plots_are_written_together(tmp_path):
    results = RunResults(sizes={"mask": 10, "dense_model": 100})
    path = write_report(results, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "sizes.png"]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_page_is_self_contained(page):
    assert not re.search(r"<(script|link|iframe|object)\b", page)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]+", "", page))
    sources = re.findall(r"(?:src|srcset|href)=\"([^\"]{0,30})", page)
    assert len(sources) == 4 * len(ALL_PLOTS)  # light and dark, for a page and for a phone
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_page_holds_the_numbers_of_the_results(page):
    text = words(page)
    for number in ("24.45", "1,920", "216.9", "147.1", "57.3", "0.6684", "0.6462", "56.3 %", "8,873,216", "193 of 300",
                   "39.9 min", "32,768", "1,024", "1234", "0.0312", "1.31"):  # fmt: skip
        assert number in text, number
    assert "2.34×" in text and "78.54×" in text
    assert "73.2 %" in text  # (147.1 - 57.3) / (147.1 - 24.45)
    assert "(147.1 − 57.3) / (147.1 − 24.45)" in text
    assert "54.0 %" in text  # 1/2 + log2(6) / 4 / 16
    for number in ("47.1 ± 1.0 %", "58.4 ± 1.0 %", "−11.3 ± 0.9", "387 / 118", "2,376", "25.0 %", "45.79", "+21.69",  # tasks
                   "71.3 ± 0.4 %", "0.42 ± 0.011", "12.5", "20 ± 0.4", "1.60×", "4,096 tokens, window 512"):  # fmt: skip
        assert number in text, number
    assert "Of 1 task score 1 is worse" in text and "word_perplexity, 5-shot (lower is better)" in text
    assert "Paris, of course." in text and "nmsparse demo --pattern 2:4" in text and "2 of every 4" in text


def test_complete_results_leave_nothing_unmeasured(page):
    assert MISSING not in words(page)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RunResults) if f.name != "schema_version"])
def test_each_missing_field_is_called_not_measured(field):
    empty = getattr(RunResults(), field)
    text = words(render(dataclasses.replace(sample_results(), **{field: empty}), []))
    # Sections of plots only, of which none are passed here; and what a mask need not have.
    without_field = {"seconds_by_stage", "history", "layers", "terms", "fused_experts"}
    # Not of every model; the cards tell them.
    without_field |= {"kept_weights", "permuted_layers", "dense_budget", "values", "delta_to"}
    baseline = words(render(sample_results(), []))
    more = text.count(MISSING) - baseline.count(MISSING)
    assert more > 0 or field in without_field or field == "planned_steps"


def test_terms_and_experts_are_told_where_there_are_any(page):
    assert "eside the mask" not in words(page) and "Fused experts" not in words(page)
    terms = {"slorb_block": 16, "slorb_train_projection": 1, "low_rank": 8, "delta_rank": 4}
    results = dataclasses.replace(sample_results(), terms=terms, fused_experts=["layers.0.mlp.experts.down_proj"])
    text = words(render(results, []))
    for said in ("SLoRB (blocks of 16 inputs, projection trained) and a low-rank term (rank 8)", "a change of rank 4",
                 "layers.0.mlp.experts.down_proj", "The mask and its terms take 0.6684 bit"):  # fmt: skip
        assert said in text, said


def test_empty_results_make_a_page_without_plots_or_claims(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = write_report(RunResults(), tmp_path)
    text = words(path.read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "The results hold no measurement." in text
    assert text.count(MISSING) > 20
    for claim in ("pruned to", "closes", "bit for bit", "took"):
        assert claim not in text


def test_everything_from_results_is_escaped():
    keyed = {HOSTILE: HOSTILE}
    results = RunResults(
        base_model=HOSTILE, base_revision=HOSTILE, pattern=HOSTILE, method=HOSTILE, sparse_layers=[HOSTILE],
        dense_layers=[HOSTILE], data=keyed, perplexity={HOSTILE: 3.0, "dense": 2.0}, sizes={HOSTILE: 3}, samples=[keyed],
        speed=[{"name": HOSTILE, "device": HOSTILE, "tokens": HOSTILE}], command=HOSTILE, environment=keyed,
        terms={"low_rank": HOSTILE, "delta_rank": HOSTILE}, fused_experts=[HOSTILE],
        evaluations=[{"text": HOSTILE, "this": 3.0, "dense": HOSTILE}], agreement=[
            {"text": HOSTILE, "top1": 0.5, "kl": HOSTILE, "layers": {f"a.0.{HOSTILE}.{HOSTILE}": 0.1}},
            {"text": HOSTILE, "layers": [HOSTILE]},
        ],
        tasks=[{"task": HOSTILE, "metric": HOSTILE, "this": 0.5, "dense": HOSTILE, "shots": HOSTILE, "items": HOSTILE}],
        seconds_by_stage={HOSTILE: 1.0}, layers=[{"name": f"a.0.{HOSTILE}.{HOSTILE}", "relative_error": 0.1}],
    )  # fmt: skip
    page = render(results, draw(results))
    assert "<script" not in page and "alert('x')" not in page
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page


def test_lone_surrogates_do_not_stop_the_page(tmp_path):
    assert "a?b" in write_report(RunResults(command="a\ud800b"), tmp_path).read_text(encoding="utf-8")


def test_worse_than_one_shot_is_said():
    results = RunResults(perplexity={"dense": 10.0, "wanda": 20.0, "learned": 25.0})
    text = words(render(results, []))
    assert "closes none of the gap" in text and "-50.0 %" in text


def test_failed_checks_are_said():
    text = words(render(RunResults(reload_bit_equal=False, base_unchanged=False), []))
    assert text.count("NOT equal") == 2


# --- facts ----------------------------------------------------------------------------------------------------------
def test_gap_needs_dense_one_shot_and_learned_and_ignores_remeasured_rows():
    def gap(**rows):
        return facts.gap(facts.perplexity_rows(RunResults(perplexity=rows)))

    assert gap(dense=10.0, learned=12.0) is None
    assert gap(wanda=20.0, learned=12.0) is None
    assert gap(dense=10.0, wanda=20.0) is None
    assert gap(dense=10.0, packed=20.0, learned=12.0) is None
    assert gap(dense=10.0, wanda=9.0, learned=12.0) is None
    assert gap(dense=10.0, wanda=20.0, polish=15.0, packed=12.0, learned=12.0).closed == pytest.approx(0.6)
    assert gap(dense=10.0, wanda=math.nan, polish=math.inf, learned=12.0) is None


def test_numbers_are_written_without_loss_of_magnitude():
    assert [facts.number(v) for v in (None, True, 1234, 24.448, 1920.3, math.inf, math.nan)] == [
        MISSING, "yes", "1,234", "24.45", "1,920", "inf", "nan",
    ]  # fmt: skip
    assert [facts.size(v) for v in (12, 999_900, 8_873_216, 2.5e9)] == ["12 bytes", "999.9 kB", "8.9 MB", "2.5 GB"]
    assert [facts.duration(v) for v in (0.031, 81.0, 2391.0, 36000)] == ["0.031 s", "81 s", "39.9 min", "10.0 h"]


def test_layer_names_are_placed():
    assert layers.place("model.layers.3.mlp.down_proj") == (3, "mlp", "down")
    assert layers.place("model.layers.3.mlp.experts.7.up_proj") == (3, "experts", "up")
    assert layers.place("model.decoder.layers.0.fc1") == (0, "layers", "fc1")
    assert layers.place("lm_head") is None


def test_layer_types_keep_their_order_and_criteria_are_told_apart():
    rows = sample_results().layers
    panels = layers.type_curves(rows[::-1], "flip_rate", 100.0)
    assert {part: list(kinds) for part, kinds in panels.items()} == {
        "self_attn": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"],
    }  # fmt: skip
    assert panels["mlp"]["down"][1] == (1, pytest.approx(100 * 0.002 * 13))
    named = [{"name": "layers.0.q", "relative_error_wanda": 0.2, "relative_error_polish": 0.1}]
    assert layers.criteria_curves(named) == {"wanda": [(0, 0.2)], "polish": [(0, 0.1)]}
    assert set(layers.criteria_curves([{"name": "a.0.q", "criterion": c, "relative_error": 1.0} for c in "xy"])) == {
        *"xy"
    }


# --- plots ----------------------------------------------------------------------------------------------------------
def test_plots_are_pictures_of_page_width_in_both_themes(plots):
    assert [plot.name for plot in plots] == ALL_PLOTS
    for plot in plots:
        pictures = ((plot.light, LIGHT, 1440), (plot.dark, DARK, 1440), (plot.narrow_light, LIGHT, 756))
        for data, theme, width in (*pictures, (plot.narrow_dark, DARK, 756)):
            pixels = numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            background = tuple(int(theme.background[i : i + 2], 16) for i in (1, 3, 5))
            assert pixels.shape[1] == width and pixels.shape[0] > 200
            assert tuple(pixels[0, 0]) == background
            assert 0.01 < (pixels != background).any(axis=2).mean() < 0.6


@pytest.mark.parametrize(
    ("field", "gone"),
    [("perplexity", {"perplexity"}), ("history", {"training", "mask"}), ("layers", {"layer_error", "layer_flips"}),
     ("tasks", {"tasks"}), ("agreement", {"agreement_layers"}), ("sizes", {"sizes"}), ("seconds_by_stage", {"time"})],
)  # fmt: skip
def test_plots_are_drawn_only_from_what_exists(field, gone, monkeypatch):
    monkeypatch.setattr("hf_nmsparse.report.drawing.png", lambda *_: b"")
    results = dataclasses.replace(sample_results(), **{field: getattr(RunResults(), field)})
    assert {plot.name for plot in draw(results)} == set(ALL_PLOTS) - gone


@pytest.mark.parametrize(
    "perplexity",
    [
        {"dense": 10.0, "wanda": 12.0},
        {"wanda": 12.0, "magnitude": 9e9},
        {"dense": 10.0, "magnitude": math.inf},
        {"x": 1.0},
    ],
)
def test_perplexities_of_any_range_are_drawn(perplexity):
    assert [plot.name for plot in draw(RunResults(perplexity=perplexity))] == ["perplexity"]


def test_values_that_are_no_numbers_are_not_plotted():
    results = RunResults(
        perplexity={"a": math.nan}, sizes={"mask": None}, history=[{"loss": 1.0}, {"step": 1, "loss": "x"}],
        layers=[{"name": "a.0.q", "relative_error": None}, {}], seconds_by_stage={"x": math.inf},
        tasks=[{}, {"task": "t", "metric": "m", "this": math.nan, "dense": "x", "items": math.inf, "lost": "a"}],
        agreement=[{}, {"text": "t", "top1": math.nan, "layers": {"a.0.q": math.nan, "b": "x"}}], evaluations=[{}],
        speed=[{}], samples=[{}],
    )  # fmt: skip
    assert draw(results) == []
    page = words(render(results, []))
    assert "nan" in page and "inf" not in page


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("tasks", ["x"], "a list of objects"), ("agreement", {}, "a list of objects"), ("samples", None, "a list of objects"),
     ("sizes", [], "an object"), ("sparse_layers", "q_proj", "a list"), ("pattern", 24, "a text")],
)  # fmt: skip
def test_results_of_another_shape_are_refused(tmp_path, field, value, expected):
    path = dataclasses.replace(RunResults(), **{field: value}).write(tmp_path / "results.json")
    with pytest.raises(FormatError, match=rf"results.json: {field} must be {expected}, got .*damaged"):
        RunResults.read(path)


def test_what_is_lost_on_tasks_needs_a_standard_error_to_be_called_so():
    def said(**more):
        row = {"task": "t", "metric": "acc", "this": 0.4, "dense": 0.5, "difference_standard_error": 0.01} | more
        return words(render(RunResults(tasks=[row]), []))

    assert "1 is worse" in said()
    assert "none is worse" in said(difference_standard_error=0.2) and "none is worse" in said(this=0.6)
    assert "1 is worse" in said(this=0.6, higher_is_better=False)
    assert "task score" not in said(difference_standard_error=None)


def test_hard_mask_perplexity_is_drawn_where_it_was_measured():
    history = sample_results().history
    assert measured.hard_perplexities(history) == [
        (50, pytest.approx(79.04, abs=0.01)),
        (100, pytest.approx(57.4, abs=0.01)),
    ]
    assert (
        measured.hard_perplexities([{"step": 1, "nm/hard_eval_loss": 800.0}, {"step": 2, "nm/hard_eval_loss": "x"}])
        == []
    )


def test_perplexity_of_a_word_stands_below_that_of_a_token():
    row = {"text": "t", "this": 20.0, "dense": 10.0, "tokens": 99, "sequence_length": 64, "stride": 32,
           "word_perplexity": 61.5, "dense_word_perplexity": 30.25}  # fmt: skip
    text = words(render(RunResults(evaluations=[row]), []))
    assert "99 tokens, window 64, stride 32" in text and "10 30.25 a word" in text and "20 61.5 a word" in text


def test_speed_tells_kernel_range_and_dense_time_where_they_were_measured():
    row = {"name": "linear", "tokens": 8, "device": "GPU", "milliseconds": 0.5, "ratio": 1.31, "kernel": "gluon"}
    text = words(render(RunResults(speed=[row | {"dense_milliseconds": 0.655, "low": 1.254, "high": 1.402}, row]), []))
    assert "Kernel" in text and "Dense, milliseconds" in text and "0.655 1.31 (1.25–1.4)" in text
    assert "Kernel" not in words(render(RunResults(speed=[{"name": "linear", "ratio": 1.31}]), []))


def test_long_prompts_are_folded_but_whole():
    prompt = "a word of an article " * 100 + "the end"
    page = render(RunResults(samples=[{"prompt": prompt, "this": "x"}, {"prompt": 5, "this": "y"}]), [])
    assert page.count("<details>") == 1 and f"<pre>{prompt}</pre>" in page


def test_samples_stand_beside_each_other(page):
    told = page[page.index("Sample text") :]
    assert told.count('class="beside"') == 2 and "this model" in told and "packed" in told


def test_a_layer_map_has_a_row_for_each_kind_and_a_column_for_each_block():
    rows = sample_results().layers
    grid = layers.layer_grid(rows[:-1], "flip_rate", 100.0)
    assert grid.kinds == ["q", "k", "v", "o", "gate", "up", "down"] and grid.blocks == list(range(6))
    assert grid.values[2][3] == pytest.approx(100 * 0.002 * 23) and math.isnan(grid.values[-1][-1])
    assert layers.layer_grid(rows, "no_such_field") is None
    both = [{"name": f"l.0.{part}.q_proj", "error": 1.0} for part in ("self_attn", "cross_attn")]
    assert layers.layer_grid(both, "error").kinds == ["self_attn.q", "cross_attn.q"]


def test_missing_matplotlib_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[report\]'"):
        write_report(sample_results(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawing_leaves_global_settings_alone():
    before = dict(matplotlib.rcParams)
    assert draw(RunResults(sizes={"mask": 1}))
    assert dict(matplotlib.rcParams) == before
