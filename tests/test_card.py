# SPDX-License-Identifier: Apache-2.0
"""Model cards: valid metadata from any results, code that loads, and no claim that was not measured."""

from __future__ import annotations

import ast
import dataclasses
import math
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt

from hf_nmsparse import NMSparseConfig
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.hub.card import card_text, terms_of, update_card, write_card
from hf_nmsparse.results import MISSING, RunResults

HOSTILE = (
    "x: 'a' \"b\"\n---\n# h {{ 7*7 }} {% raw %} <script>alert(1)</script> | ``` *e* [l](u) \x00\x85\u2028 \\ __i__"
)
REPO = "someone/smollm2-2to4"


def sample_results(**changes) -> RunResults:
    results = RunResults(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        base_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        pattern="2:4",
        method="candidates (prior polish)",
        sparse_layers=[f"model.layers.{i}.self_attn.{kind}_proj" for i in range(30) for kind in "qkvo"],
        dense_layers=["lm_head"],
        data={"calibration": "wiki train, 32,768 tokens", "training": "wiki train", "evaluation": "wiki test"},
        seed=1234,
        perplexity={"polish": 147.1, "dense": 24.45, "learned": 57.3, "packed": 57.4},
        perplexity_tokens=32768,
        perplexity_sequence_length=1024,
        mask_bits_per_weight=0.6684,
        mask_bits_bound=0.64624,
        packed_ratio=0.5627,
        sizes={"mask": 8_873_216, "packed_model": 176_400_112},
        reload_bit_equal=True,
        base_unchanged=True,
        steps=193,
        planned_steps=300,
        speed=[{"name": "linear 576x1536", "tokens": 1, "milliseconds": 0.0312, "ratio": 1.31, "device": "some CPU"}],
        command="nmsparse demo --pattern 2:4",
        environment={"torch": "2.13.0", "python": "3.11.2"},
    )
    return dataclasses.replace(results, **changes)


def load(text: str, tmp_path) -> ModelCard:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    card = ModelCard.load(path)
    assert metadata_load(path) == card.data.to_dict()
    return card


def code_blocks(text: str, language: str) -> list[str]:
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == language]


@pytest.mark.parametrize(
    ("kind", "relation", "library", "value"),
    [("packed", "quantized", "transformers", 57.4), ("mask", "adapter", "hf_nmsparse", 57.3)],
)
def test_metadata_round_trips_through_model_card(kind, relation, library, value, tmp_path):
    card = load(card_text(sample_results(), kind, license="apache-2.0", language="en", repo_id=REPO), tmp_path)
    data = card.data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.base_model_relation == relation
    assert data.library_name == library and data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0" and data.language == ["en"] and data.metrics == ["perplexity"]
    assert {"nmsparse", "2:4", "sparsity", "pruned", "semi-structured-sparsity"} <= set(data.tags)
    assert ("mask" in data.tags) == (kind == "mask")
    assert data.model_name == "smollm2-2to4"
    (evaluation,) = data.eval_results
    assert evaluation.metric_type == "perplexity" and evaluation.metric_value == value
    assert evaluation.dataset_name == "wiki test"
    assert str(card) == card_text(sample_results(), kind, license="apache-2.0", language="en", repo_id=REPO)


def test_body_holds_the_numbers_of_the_results():
    text = card_text(sample_results(), "packed", repo_id=REPO)
    for words in ("2 kept of 4", "24.45", "147.1", "57.3", "6.02", "2.34", "0.6684", "0.6462", "0.5627", "8,873,216",
                  "193 of 300 planned", "1234", "32,768", "1,024", "0.0312", "some CPU", "q_proj × 30", "lm_head",
                  "nmsparse demo --pattern 2:4", "12fd25f77366fa6b3b4b768ec3050bf629380bac"):  # fmt: skip
        assert words in text, words
    assert MISSING not in text.replace(f"other text, and tasks, were {MISSING}", "")
    table = [
        line.split("|")[1].strip()
        for line in text.splitlines()
        if re.match(r"\| (dense|polish|learned|packed) \|", line)
    ]
    assert table == ["dense", "polish", "learned", "packed"]


@pytest.mark.parametrize("kind", ["mask", "packed"])
def test_code_imports_the_plugin_first_and_parses(kind):
    text = card_text(sample_results(), kind, repo_id=REPO)
    blocks = code_blocks(text, "python")
    assert len(blocks) == {"mask": 2, "packed": 1}[kind]
    for block in blocks:
        ast.parse(block)
        assert block.startswith("import hf_nmsparse")
        assert f'"{REPO}"' in block
    assert "pip install hf-nmsparse\n" in code_blocks(text, "bash")
    if kind == "mask":
        assert "PeftModel.from_pretrained(model, " in blocks[0] and "nms.load_mask(model, " in blocks[1]
        assert '"HuggingFaceTB/SmolLM2-135M-Instruct", revision="12fd25f7' in blocks[0]
    assert {"mask": "KeyError", "packed": "RuntimeError"}[kind] in text


@pytest.mark.parametrize("kind", ["mask", "packed", "masked"])
def test_empty_results_make_a_valid_card_without_claims(kind, tmp_path):
    text = card_text(RunResults(), kind)
    card = load(text, tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert text.count(MISSING) > 15
    for claim in ("faster", "2:4", "perplexity of", "None", "nan"):
        assert claim not in card.text


@pytest.mark.parametrize(
    "field",
    ["base_model", "base_revision", "pattern", "method", "sparse_layers", "dense_layers", "data", "seed", "perplexity",
     "perplexity_tokens", "perplexity_sequence_length", "mask_bits_per_weight", "mask_bits_bound", "packed_ratio", "sizes",
     "reload_bit_equal", "base_unchanged", "steps", "speed", "command", "environment"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["mask", "packed", "masked"])
def test_each_missing_field_is_called_not_measured(field, kind, tmp_path):
    text = card_text(sample_results(**{field: getattr(RunResults(), field)}), kind)
    load(text, tmp_path)
    assert text.count(MISSING) > card_text(sample_results(), kind).count(MISSING) or field == "perplexity"
    assert field != "perplexity" or ("model-index" not in text and f"Its quality was {MISSING}" in text)


@pytest.mark.parametrize("base", ["/home/someone/base", "./base", "~/base", "C:\\models\\base", "a/b/c", "two words"])
def test_local_paths_never_become_hub_ids(base, tmp_path):
    text = card_text(sample_results(base_model=base), "mask")
    card = load(text, tmp_path)
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert card.data.model_name.split("-")[0] in ("base", "c", "two words")
    assert "(not a Hub id)" in card.text
    ast.parse(code_blocks(text, "python")[0])


def test_folder_that_looks_like_a_hub_id_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load(card_text(sample_results(base_model="runs/base"), "mask"), tmp_path).data.base_model is None


@pytest.mark.parametrize("kind", ["mask", "packed", "masked"])
def test_hostile_text_breaks_neither_metadata_nor_page(kind, tmp_path):
    keyed = {HOSTILE: HOSTILE, "evaluation": HOSTILE}
    results = RunResults(
        base_model=HOSTILE, base_revision=HOSTILE, pattern=HOSTILE, method=HOSTILE, sparse_layers=[HOSTILE],
        dense_layers=[HOSTILE] * 9, data=keyed, perplexity={HOSTILE: 3.0, "dense": 2.0}, sizes={HOSTILE: 3},
        speed=[{"name": HOSTILE, "device": HOSTILE, "tokens": HOSTILE}],
        tasks=[{"task": HOSTILE, "metric": HOSTILE, "this": HOSTILE, "lost": HOSTILE, "chance": HOSTILE, "measured_by": HOSTILE}],
        agreement=[{"text": HOSTILE, "kl": HOSTILE, "top1": HOSTILE}], command=HOSTILE, environment=keyed,
        terms={"slorb_block": HOSTILE, "delta_rank": HOSTILE}, fused_experts=[HOSTILE], delta_to=HOSTILE,
    )  # fmt: skip
    text = card_text(results, kind, license=HOSTILE, language=[HOSTILE], repo_id=HOSTILE)
    card = load(text, tmp_path)
    assert card.data.library_name and card.data.base_model is None
    assert "\n" not in card.data.license and card.data.eval_results[0].metric_value == 3.0
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert "<script" not in page and "<a " not in page and "<em>" not in page and "<strong>" not in page
    assert "{{ 7*7 }}" in page
    assert page.count("<h1>") == 1 and page.count("<hr") == 0
    for block in code_blocks(card.text, "python"):
        ast.parse(block)
    for table in re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL):
        assert len(re.findall(r"<t[dh]", table)) in (2, 3, 4, 5, 8)


TERMS = {"slorb_block": 16, "low_rank": 8, "delta_rank": 4}


def test_terms_are_named_with_what_becomes_of_them():
    plain = card_text(sample_results(), "mask")
    assert "eside the" not in plain and "kept weights" not in plain and "experts" not in plain
    mask, packed = (card_text(sample_results(terms=TERMS), kind) for kind in ("mask", "packed"))
    for text in (mask, packed):
        assert "SLoRB (blocks of 16 inputs) and a low-rank term (rank 8)" in text and "(rank 4)" in text
        assert "| mask and terms, bits per pruned weight |" in text
    assert "Merging it with the mask gives dense weights" in mask and "Merging it keeps the pattern" not in mask
    assert "`nms.decompress` adds it" in packed and "is merged into them" in packed
    only_delta = card_text(sample_results(terms={"delta_rank": 4}), "mask")
    assert "Merging it keeps the pattern" in only_delta and "dense weights" not in only_delta


def test_fused_experts_are_named_and_stay_dense():
    names = [f"model.layers.{i}.mlp.experts.{part}" for i in range(3) for part in ("gate_up_proj", "down_proj")]
    for kind in ("mask", "packed"):
        text = card_text(sample_results(fused_experts=names), kind)
        assert "6 (gate_up_proj × 3, down_proj × 3)" in text and "dense with zeros" in text


def test_the_words_of_a_config_are_those_of_the_card():
    assert terms_of(NMSparseConfig()) == {}
    assert terms_of(NMSparseConfig(**TERMS)) == TERMS
    trained = NMSparseConfig(slorb_block=16, slorb_train_projection=True)
    text = card_text(sample_results(terms=terms_of(trained)), "mask")
    assert "SLoRB (blocks of 16 inputs, projection trained)," in text


def test_only_the_row_of_the_artefact_is_published_as_its_result(tmp_path):
    def published(kind="mask", **changes):
        return load(card_text(sample_results(**changes), kind), tmp_path).data.eval_results

    assert published(perplexity={"dense": 10.0}) is None
    assert published(perplexity={"dense": 10.0, "wanda": 20.0, "magnitude": 30.0}) is None
    assert published(perplexity={"wanda": 20.0, "magnitude": 30.0}, method="wanda")[0].metric_value == 20.0
    assert published(perplexity={"dense": 10.0, "wanda": 20.0})[0].metric_value == 20.0
    assert published(perplexity={"dense": 10.0, "learned": math.nan}) is None


def test_backticks_do_not_end_the_code_block():
    text = card_text(sample_results(command="a\n```\n# title\n`````"), "mask")
    assert "a\n```\n# title\n`````\n" in code_blocks(text, "bash")


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "8:16"])
def test_patterns_stay_strings_in_yaml(pattern, tmp_path):
    assert pattern in load(card_text(sample_results(pattern=pattern), "mask"), tmp_path).data.tags


def test_write_card_replaces_the_readme(tmp_path):
    (tmp_path / "README.md").write_text("old")
    path = write_card(tmp_path, sample_results(command="a\ud800b\r\nc"), "mask", repo_id=REPO)
    assert path == tmp_path / "README.md" and [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert ModelCard.load(path).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="'mask', 'packed' or 'masked'"):
        card_text(RunResults(), "dense")


# --- masked models --------------------------------------------------------------------------------------------------
def test_a_masked_model_loads_without_the_plugin_and_is_told_as_large_as_the_dense_one(tmp_path):
    results = sample_results(kept_weights="keep", perplexity={"dense": 24.45, "masked": 57.3})
    text = card_text(results, "masked", repo_id=REPO)
    card = load(text, tmp_path)
    assert card.data.library_name == "transformers" and card.data.base_model == results.base_model
    assert "base_model_relation" not in card.data and "semi-structured-sparsity" in card.data.tags
    plain, packing = code_blocks(text, "python")
    for block in (plain, packing):
        ast.parse(block)
    assert "hf_nmsparse" not in plain and f'from_pretrained("{REPO}")' in plain
    assert "nms.compress(model)" in packing and "nmsparse compress" in text
    assert "2 of every 4 consecutive weights are kept" in text and "bit-equal to those of the base" in text
    assert "the size and the speed of the dense one" in text and "faster" not in text
    assert "57.3" in text and "import of `hf_nmsparse` has to come first" not in text
    assert card.data.eval_results[0].metric_value == 57.3


def test_what_became_of_kept_weights_is_told_of_models_and_not_of_masks():
    for kind, told in (("masked", True), ("packed", True), ("mask", False)):
        for value, words in (
            ("keep", "bit-equal to those"),
            ("update", "new values by sparsegpt"),
            ("refit", "fitted anew"),
        ):
            assert (words in card_text(sample_results(kept_weights=value, method="sparsegpt"), kind)) == told
        text = card_text(sample_results(permuted_layers=["a.down_proj"], dense_budget=0.1), kind)
        assert ("another order" in text and "a.down_proj" in text and "up to 10 % of the bytes" in text) == told


@pytest.mark.parametrize(
    ("pattern", "packs", "words"),
    [
        ("60%", False, "60% of the weights"),
        ("4:8", False, "4 of every 8"),
        ("1:4", True, "1 of every 4"),
        (None, False, "pruned"),
    ],
)
def test_only_what_can_be_packed_is_told_to_be(pattern, packs, words, tmp_path):
    text = card_text(sample_results(pattern=pattern), "masked")
    data = load(text, tmp_path).data
    assert (
        words in text
        and ("nms.compress" in text) == packs
        and ("cannot be packed" in text) == (not packs and bool(pattern))
    )
    assert ("semi-structured-sparsity" in data.tags) == (pattern != "60%")


def test_a_merged_side_branch_is_told_to_make_dense_weights():
    text = card_text(sample_results(terms=TERMS, sparse_layers=[]), "masked")
    assert "These are dense" in text and "compress the base model with its mask" in text and "are zero" not in text
    assert "nms.compress(model)" not in text


# --- tasks and agreement --------------------------------------------------------------------------------------------
TASKS = [
    {"task": "arc_easy", "metric": "acc", "this": 0.5125, "standard_error": 0.011, "dense": 0.5625, "items": 2376, "chance": 0.25,
     "dense_standard_error": 0.0101, "difference_standard_error": 0.004, "lost": 150, "won": 31, "measured_by": "lm-eval 0.4.13"},
    {"task": "summary", "metric": "rouge_dense", "this": 0.31, "items": 12, "measured_by": "hf-nmsparse"},
]  # fmt: skip
AGREEMENT = [
    {
        "text": "law.txt",
        "top1": 0.731,
        "top1_standard_error": 0.004,
        "kl": 0.512,
        "kl_standard_error": 0.01,
        "tokens": 8184,
    }
]


def test_tasks_and_agreement_are_told_with_their_errors_and_counted_as_measured(tmp_path):
    results = dataclasses.replace(sample_results(), tasks=TASKS, agreement=AGREEMENT)
    card = load(card_text(results, "packed", repo_id=REPO), tmp_path)
    assert "| arc_easy | acc | 0.5625 ± 0.01 | 0.5125 ± 0.011 | -0.05 ± 0.004 | 150 / 31 | 2,376 | 0.25 |" in card.text
    assert "| summary | rouge_dense | not measured | 0.31 | not measured |  | 12 |  |" in card.text
    assert "| law.txt | 73.1 % ± 0.4 | 0.512 ± 0.01 | 8,184 |" in card.text
    assert "Measured by hf-nmsparse, lm-eval 0.4.13." in card.text
    assert "the tasks arc_easy, summary only; other text and other tasks were not measured" in card.text
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found[("arc_easy", "acc")] == 0.5125 and card.data.metrics == ["perplexity", "acc"]  # ROUGE needs dense


def test_a_sliding_window_is_not_given_for_the_papers_perplexity(tmp_path):
    entry = {"text": "law.txt", "dense": 20.0, "this": 31.25, "tokens": 9, "sequence_length": 8, "stride": 4}
    card = load(card_text(RunResults(evaluations=[entry]), "mask"), tmp_path)
    assert card.data.eval_results is None and "law.txt (stride 4)" in card.text


def test_a_card_gains_the_sections_of_what_is_measured_later_and_keeps_the_rest(tmp_path):
    results = sample_results()
    write_card(tmp_path, results, "mask", license="mit")
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Tasks we had in mind\n\nmany\n")
    before = path.read_text()
    update_card(tmp_path, dataclasses.replace(results, agreement=AGREEMENT), "mask")
    for tasks in (TASKS[:1], TASKS):  # the second time in place of the first
        update_card(tmp_path, dataclasses.replace(results, tasks=tasks, agreement=AGREEMENT), "mask")
    text = path.read_text()
    assert text.count("## Tasks\n") == text.count("## Agreement with the dense model\n") == 1
    assert text.index("## Tasks\n") < text.index("## Agreement") < text.index("## Size")
    assert "rouge_dense" in text and "license: mit" in text and text.endswith("## Tasks we had in mind\n\nmany\n")
    update_card(tmp_path, results, "mask")  # of results that know nothing of them
    assert "arc_easy" in path.read_text() and "## Tasks" not in before.replace("## Tasks we", "")
