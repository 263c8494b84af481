# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 itself: its perplexity by other ways, and the same task scores in each form of a model. Fetches 93 MB once."""

from __future__ import annotations

import copy
import json
import math
import os

import pytest
import torch
import yaml
from peft import get_peft_model
from torch.nn import functional as F

import hf_nmsparse as nms
from hf_nmsparse.cli import assets
from hf_nmsparse.data import tokenize
from hf_nmsparse.evaluation import evaluate_tasks, perplexity

pytestmark = pytest.mark.slow
LENGTH = 1024


@pytest.fixture(scope="module")
def source():
    if os.environ.get("HF_NMSPARSE_TEST_NETWORK") != "1":
        pytest.skip("set HF_NMSPARSE_TEST_NETWORK=1 to fetch 93 MB into the cache")
    pytest.importorskip("gguf")
    return assets.smollm2()


@pytest.fixture(scope="module")
def tokenizer(source):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="module")
def dense(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def write_task(folder, name: str, items: list[dict], **config) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    about = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(about))


def test_perplexity_is_that_of_a_straightforward_computation(dense, tokenizer):
    tokens = tokenize(assets.demo_text("test"), tokenizer)[: 4 * LENGTH]
    losses = []
    for window in tokens.split(LENGTH):
        with torch.no_grad():
            logits = dense(input_ids=window[None]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, window[1:]))
    expected = math.exp(torch.stack(losses).mean().item())
    assert perplexity(dense, tokens, seq_len=LENGTH).value == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_that_of_lm_eval_where_the_definitions_agree(dense, tokenizer, tmp_path):
    text = tokenizer.decode(tokenize(assets.demo_text("test"), tokenizer)[:3000])
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(tmp_path, "text", [{"text": text}], metric_list=[{"metric": "byte_perplexity"}], **rolling)
    [score] = evaluate_tasks(dense, tokenizer, ["text"], include_path=tmp_path, max_length=LENGTH)
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])
    ours = perplexity(dense, tokens, seq_len=LENGTH + 1, stride=LENGTH)
    assert ours.per(len(text.encode())) == pytest.approx(score.value, rel=1e-4)


def test_adapter_merged_and_packed_model_score_alike(dense, tokenizer, tmp_path):
    sentences = [s.strip() for s in assets.demo_text("test").split(". ") if 40 < len(s) < 160]
    items = [
        {"text": sentences[3 * k], "options": [f" {sentences[3 * k + 1]}", f" {sentences[3 * k + 30]}"], "gold": 0}
        for k in range(40)
    ]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}.",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
    }
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    write_task(tmp_path, "next", items, metric_list=metrics, target_delimiter="", **choice)
    adapted = get_peft_model(copy.deepcopy(dense), nms.NMSparseConfig(prior="magnitude")).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    forms = [adapted, merged, nms.compress(copy.deepcopy(merged))]
    found = [evaluate_tasks(form, tokenizer, ["next"], include_path=tmp_path) for form in forms]
    base = evaluate_tasks(dense, tokenizer, ["next"], include_path=tmp_path)
    for scores in found:
        assert [score.scores for score in scores] == [score.scores for score in found[0]]
        assert [score.sha256 for score in scores] == [score.sha256 for score in base]
    assert [score.scores for score in base] != [score.scores for score in found[0]]
