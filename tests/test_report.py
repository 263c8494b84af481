# SPDX-License-Identifier: Apache-2.0
"""The report: one self-contained page whose numbers are those of the results, and plots only of what was measured."""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
import sys

import matplotlib
import numpy
import pytest
from PIL import Image

from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.report import facts, layers, write_report
from hf_nmsparse.report.canvas import DARK, LIGHT
from hf_nmsparse.report.figures import draw
from hf_nmsparse.report.html import render
from hf_nmsparse.results import MISSING, RunResults

HOSTILE = "$\\x{$ <script>alert('x')</script> & \"q\" {{ 7*7 }} {% if %} $\\frac{$ \n---\n\x00 | ```"


def sample_results() -> RunResults:
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    names = [f"model.layers.{i}.{part}.{kind}" for i in range(6) for part, kinds in parts.items() for kind in kinds]
    history = [
        {"step": s, "loss": 4 + 3.6 * math.exp(-s / 12), "nm/flip_rate": s / 4000, "nm/max_prob": 0.6 + s / 500,
         "nm/entropy": 1.5 - s / 100, "nm/temperature": 4 - s / 30, "nm/logit_scale": 100 + 4 * s}
        for s in range(1, 101, 5)
    ]  # fmt: skip
    return RunResults(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        base_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        pattern="2:4",
        method="candidates (prior polish)",
        sparse_layers=names,
        dense_layers=["lm_head"],
        data={"calibration": "wiki train, 32,768 tokens", "training": "wiki train", "evaluation": "wiki test"},
        seed=1234,
        perplexity={
            "dense": 24.45,
            "magnitude": 1920.3,
            "wanda": 216.9,
            "polish": 147.1,
            "learned": 57.3,
            "packed": 57.3,
        },
        perplexity_tokens=32768,
        perplexity_sequence_length=1024,
        mask_bits_per_weight=0.6684,
        mask_bits_bound=0.64624,
        packed_ratio=0.5627,
        sizes={"mask": 8_873_216, "packed_model": 176_400_112, "dense_model": 269_060_552},
        reload_bit_equal=True,
        base_unchanged=True,
        steps=193,
        planned_steps=300,
        seconds=2391.0,
        seconds_by_stage={"load": 9.2, "training": 1860.0, "evaluation": 240.0},
        history=[*history, {"step": 50, "nm/hard_eval_loss": 4.37}, {"step": 100, "nm/hard_eval_loss": 4.05}],
        layers=[{"name": n, "relative_error": 0.05 + 0.001 * k, "flip_rate": 0.002 * k} for k, n in enumerate(names)],
        samples=[{"prompt": "The capital of France is", "dense": " Paris.", "packed": " Paris, of course."}],
        speed=[{"name": "linear 576x1536", "tokens": 1, "milliseconds": 0.0312, "ratio": 1.31, "device": "some CPU"}],
        command="nmsparse demo --pattern 2:4",
        environment={"torch": "2.13.0", "python": "3.11.2"},
    )


ALL_PLOTS = ["perplexity", "training", "mask", "layer_error", "layer_flips", "sizes", "time"]


@pytest.fixture(scope="module")
def plots():
    return draw(sample_results())


@pytest.fixture(scope="module")
def page(plots):
    return render(sample_results(), plots)


def words(page: str) -> str:
    """What a reader sees: text without tags, pictures and style."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


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
    assert len(sources) == 2 * len(ALL_PLOTS)
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
    assert "Paris, of course." in text and "nmsparse demo --pattern 2:4" in text and "2 of every 4" in text


def test_complete_results_leave_nothing_unmeasured(page):
    assert MISSING not in words(page)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RunResults) if f.name != "schema_version"])
def test_each_missing_field_is_called_not_measured(field):
    empty = getattr(RunResults(), field)
    text = words(render(dataclasses.replace(sample_results(), **{field: empty}), []))
    # Sections of plots only, of which none are passed here; and what a mask need not have.
    without_field = {"seconds_by_stage", "history", "layers", "terms", "fused_experts"}
    without_field |= {
        "kept_weights",
        "permuted_layers",
        "dense_budget",
        "values",
        "delta_to",
        "evaluations",
        "tasks",
        "agreement",
    }  # not of every model; the cards tell them
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
        for data, theme in ((plot.light, LIGHT), (plot.dark, DARK)):
            pixels = numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            background = tuple(int(theme.background[i : i + 2], 16) for i in (1, 3, 5))
            assert pixels.shape[1] == 1440 and pixels.shape[0] > 200
            assert tuple(pixels[0, 0]) == background
            assert 0.01 < (pixels != background).any(axis=2).mean() < 0.6


@pytest.mark.parametrize(
    ("field", "gone"),
    [("perplexity", {"perplexity"}), ("history", {"training", "mask"}), ("layers", {"layer_error", "layer_flips"}),
     ("sizes", {"sizes"}), ("seconds_by_stage", {"time"})],
)  # fmt: skip
def test_plots_are_drawn_only_from_what_exists(field, gone, monkeypatch):
    monkeypatch.setattr("hf_nmsparse.report.figures.png", lambda *_: b"")
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
    )  # fmt: skip
    assert draw(results) == []
    assert "nan" in words(render(results, []))


def test_missing_matplotlib_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[report\]'"):
        write_report(sample_results(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_drawing_leaves_global_settings_alone():
    before = dict(matplotlib.rcParams)
    assert draw(RunResults(sizes={"mask": 1}))
    assert dict(matplotlib.rcParams) == before
