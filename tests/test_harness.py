# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: right, the same for each form of a model, and nothing left changed. All of it offline."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError, HubError, UnsupportedError
from hf_nmsparse.evaluation import perplexity, task_entry
from hf_nmsparse.evaluation.harness import SUITES, evaluate_tasks

harness = importlib.import_module("hf_nmsparse.evaluation.harness")
lm_eval = pytest.importorskip("lm_eval")

TINY = Path(__file__).parent / "tiny_llama"


def items_of_held_out_text(count: int = 24) -> list[dict]:
    """A text, and two to four continuations of unlike length of which one is its own: a small model gets some of them right."""
    tokens = np.load(TINY / "test_tokens.npy").astype(np.int64)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    items = []
    for index in range(count):
        place = 100 * index
        text = tokenizer.decode(tokens[place : place + 10]).rstrip()
        starts = [place + 10, *(place + 40 + 17 * other for other in range(1 + index % 3))]
        options = [
            tokenizer.decode(tokens[start : start + 3 + (start + order) % 5]) for order, start in enumerate(starts)
        ]
        gold = index % len(options)
        options[0], options[gold] = options[gold], options[0]
        items.append({"text": text, "options": [" " + option.strip() for option in options], "gold": gold})
    return items


ITEMS = items_of_held_out_text()
TEXTS = [
    {"text": "The town has a population of about two thousand people. It lies in the north of the county."},
    {"text": "He played for the national team, and was later its coach."},
]
WORDS = (
    "The history of the town goes back to the time of the Roman empire, when a road was built along the river. " * 3
)
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "word_perplexity"}],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def dense():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapted(dense):
    return get_peft_model(copy.deepcopy(dense), nms.NMSparseConfig()).eval()


@pytest.fixture(scope="module")
def merged(adapted):
    return copy.deepcopy(adapted).merge_and_unload().eval()


@pytest.fixture(scope="module")
def packed(adapted):
    return nms.compress(copy.deepcopy(adapted)).eval()


class Tasks:
    """Writes tasks into a folder, as YAML and JSONL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, items: list[dict], **config) -> str:
        files = {}
        for split, rows in {"test": items, "train": config.pop("examples", None)}.items():
            if rows is not None:
                files[split] = str(self.folder / f"{name}-{split}.jsonl")
                Path(files[split]).write_text("\n".join(map(json.dumps, rows)))
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(self.folder / "cache")},
            "test_split": "test",
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}))
        return name

    def group(self, name: str, tasks: list[str], **config) -> str:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": tasks, **config}))
        return name

    def ask(self, model, tokenizer, *names: str, **options):
        scores = evaluate_tasks(model, tokenizer, list(names), include_path=self.folder, **options)
        return {(score.task, score.metric): score for score in scores}


@pytest.fixture
def tasks(tmp_path) -> Tasks:
    return Tasks(tmp_path)


@pytest.fixture(scope="module")
def standing_tasks(tmp_path_factory) -> Tasks:
    tasks = Tasks(tmp_path_factory.mktemp("tasks"))
    tasks.add("choice", ITEMS, tag="some_tag", **MULTIPLE_CHOICE)
    tasks.add("text", TEXTS, **ROLLING)
    return tasks


def option_loglikelihoods(model, tokenizer, item) -> list[float]:
    """One text at a time, the plain way."""
    found = []
    for option in item["options"]:
        start = len(tokenizer(item["text"])["input_ids"])
        ids = torch.tensor(tokenizer(item["text"] + option)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
        found.append(sum(logs[place - 1, ids[place]].item() for place in range(start, len(ids))))
    return found


def right_answers(model, tokenizer) -> tuple[list[float], list[float]]:
    plain, normalised = [], []
    for item in ITEMS:
        logs = option_loglikelihoods(model, tokenizer, item)
        each = [log / len(option) for log, option in zip(logs, item["options"], strict=True)]
        plain.append(float(int(np.argmax(logs)) == item["gold"]))
        normalised.append(float(int(np.argmax(each)) == item["gold"]))
    return plain, normalised


@pytest.mark.parametrize("batch_size", [None, 1])
def test_accuracies_are_those_of_the_log_likelihoods_of_the_options(dense, tokenizer, standing_tasks, batch_size):
    plain, normalised = right_answers(dense, tokenizer)
    assert plain != normalised and {*plain, *normalised} == {0.0, 1.0}  # else this test could not tell them apart
    scores = standing_tasks.ask(dense, tokenizer, "choice", batch_size=batch_size)
    acc, acc_norm = scores["choice", "acc"], scores["choice", "acc_norm"]
    assert list(acc.scores) == plain and list(acc_norm.scores) == normalised
    assert acc.value == pytest.approx(np.mean(plain))
    assert acc.standard_error == pytest.approx(np.std(plain, ddof=1) / math.sqrt(len(ITEMS)))
    assert (acc.items, acc.shots, acc.higher_is_better) == (len(ITEMS), 0, True)
    assert acc.chance == pytest.approx(np.mean([1 / len(item["options"]) for item in ITEMS]))
    assert acc.measured_by == f"lm-eval {lm_eval.__version__}"


def test_every_form_of_a_sparse_model_scores_the_same_and_not_as_the_dense_one(
    dense, adapted, merged, packed, tokenizer, standing_tasks
):
    def ask(model):
        return standing_tasks.ask(model, tokenizer, "choice", "text")

    first, expected = ask(dense), ask(merged)
    for model in (adapted, packed):
        found = ask(model)
        for key, score in expected.items():
            assert found[key].scores == score.scores and found[key].sha256 == score.sha256
            assert found[key].value == pytest.approx(score.value, rel=1e-4)
    assert expected["text", "word_perplexity"].value > 1.1 * first["text", "word_perplexity"].value
    with adapted.disable_adapter():
        assert ask(adapted) == first
    entry = task_entry(expected["choice", "acc"], first["choice", "acc"])
    assert entry["dense"] == first["choice", "acc"].value and entry["lost"] + entry["won"] > 0


def test_a_text_scored_as_a_whole_agrees_with_perplexity(dense, tokenizer, tasks):
    """lm-eval puts a token before the text, so that its first one is predicted too."""
    tasks.add("text", [{"text": WORDS}], **ROLLING)
    score = tasks.ask(dense, tokenizer, "text")["text", "word_perplexity"]
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(WORDS)["input_ids"]])
    ours = perplexity(dense, ids[None])
    assert math.log(score.value) * len(re.split(r"\s+", WORDS)) == pytest.approx(ours.loss * ours.tokens, rel=1e-4)
    assert (score.higher_is_better, score.scores, score.standard_error, score.chance) == (False, (), None, None)


def test_a_long_text_is_cut_into_windows_of_max_length(dense, tokenizer, tasks):
    ids = tokenizer(WORDS)["input_ids"][:64]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    tasks.add("text", [{"text": text}], **ROLLING)
    score = tasks.ask(dense, tokenizer, "text", max_length=32)["text", "word_perplexity"]
    with_prefix = torch.tensor([tokenizer.eos_token_id, *ids])
    ours = perplexity(dense, torch.stack([with_prefix[:33], with_prefix[32:]]))
    assert math.log(score.value) * len(re.split(r"\s+", text)) == pytest.approx(ours.loss * ours.tokens, rel=1e-4)


def test_a_packed_model_generates_its_answers(packed, tokenizer, tasks):
    def continued(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt")
        out = packed.generate(**ids, max_new_tokens=4, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    items = [{"text": item["text"], "answer": continued(item["text"])} for item in ITEMS[:4]]
    items[1]["answer"] = items[2]["answer"] = "something else"
    tasks.add(
        "write",
        items,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="answer",
        generation_kwargs={"max_gen_toks": 4, "until": ["\n\n"], "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[
            {"name": "none", "filter": [{"function": "take_first"}]},
            {
                "name": "strict-match",
                "filter": [{"function": "regex", "regex_pattern": "(qqq)"}, {"function": "take_first"}],
            },
        ],
    )
    scores = tasks.ask(packed, tokenizer, "write")
    assert scores["write", "exact_match"].scores == (1.0, 0.0, 0.0, 1.0)
    strict = scores["write", "exact_match (strict-match)"]
    assert strict.scores == (0.0,) * 4 and strict.items == 4
    assert strict.sha256 == scores["write", "exact_match"].sha256 and strict.chance is None
    with pytest.raises(ConfigError, match="generates up to 4 tokens, which leaves none of max_length=4"):
        tasks.ask(packed, tokenizer, "write", max_length=4)


def test_bfloat16_log_likelihoods_are_summed_in_float32(dense, tokenizer, tasks):
    """In bfloat16 numbers near -60 are a quarter apart."""
    model = copy.deepcopy(dense).to(torch.bfloat16)
    items = [{"text": item["text"], "options": [item["options"][0]]} for item in ITEMS]
    tasks.add(
        "continue",
        items,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{options[0]}}",
        target_delimiter="",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    score = tasks.ask(model, tokenizer, "continue", batch_size=1)["continue", "perplexity"]
    expected = [option_loglikelihoods(model, tokenizer, item)[0] for item in items]
    assert math.log(score.value) == pytest.approx(-np.mean(expected), rel=1e-5)
    assert score.scores == () and score.standard_error > 0 and score.chance is None


def test_limit_takes_the_first_items_or_a_share_of_them(dense, tokenizer, standing_tasks):
    whole = standing_tasks.ask(dense, tokenizer, "choice")["choice", "acc"]
    for limit, items in ((3, 3), (0.3, 8), (100, 24)):
        score = standing_tasks.ask(dense, tokenizer, "choice", limit=limit)["choice", "acc"]
        assert score.items == items and score.scores == whole.scores[:items]
        assert (score.sha256 == whole.sha256) == (items == 24)


def test_shots_are_put_before_each_item_and_change_the_digest(dense, tokenizer, tasks, caplog):
    config = {**MULTIPLE_CHOICE, "training_split": "train", "examples": ITEMS[3:6]}
    tasks.add("with_examples", ITEMS[:3], **config)
    tasks.add("one_by_itself", ITEMS[:3], num_fewshot=1, **config)
    tasks.add("never", ITEMS[:3], num_fewshot=0, **config)
    tasks.add("without_examples", ITEMS[:3], **MULTIPLE_CHOICE)

    def ask(name, shots=None):
        return tasks.ask(dense, tokenizer, name, shots=shots)[name, "acc"]

    none, two = ask("with_examples"), ask("with_examples", shots=2)
    assert (none.shots, two.shots) == (0, 2) and none.sha256 != two.sha256
    assert two == ask("with_examples", shots=2)
    assert ask("one_by_itself").shots == 1 and ask("one_by_itself", shots=0).sha256 == none.sha256
    with caplog.at_level(logging.WARNING):
        assert ask("never", shots=2).shots == 0
    assert "never fixes its examples at 0; shots=2 is not followed" in caplog.text
    with pytest.raises(ConfigError, match=r"shots=4: task 'with_examples' has 3 examples"):
        ask("with_examples", shots=4)
    with pytest.raises(ConfigError, match="no examples but its own items"):
        ask("without_examples", shots=1)


def test_the_digest_is_of_the_items_and_their_prompts(dense, merged, tokenizer, tasks):
    other = [*ITEMS[:-1], {**ITEMS[-1], "gold": 0}]
    assert other != ITEMS
    names = [
        tasks.add("one", ITEMS, **MULTIPLE_CHOICE),
        tasks.add("same", ITEMS, **MULTIPLE_CHOICE),
        tasks.add("other_answer", other, **MULTIPLE_CHOICE),
        tasks.add("other_prompt", ITEMS, **{**MULTIPLE_CHOICE, "doc_to_text": "So: {{text}}"}),
    ]
    digests = [score.sha256 for score in tasks.ask(dense, tokenizer, *names).values()][::2]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert [score.sha256 for score in tasks.ask(merged, tokenizer, *names).values()][::2] == digests


def test_a_group_with_an_aggregate_is_one_row_other_groups_and_tags_their_tasks(dense, tokenizer, tasks):
    tasks.add("first", ITEMS[:8], tag="both", **MULTIPLE_CHOICE)
    tasks.add("second", ITEMS[8:], tag="both", **MULTIPLE_CHOICE)
    over_items = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    over_tasks = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}
    tasks.group("micro", ["first", "second"], **over_items)
    tasks.group("macro", ["first", "second"], **over_tasks)
    tasks.group("loose", ["first", "second"])
    leaves = tasks.ask(dense, tokenizer, "first", "second")
    first, second = leaves["first", "acc"], leaves["second", "acc"]

    found = tasks.ask(dense, tokenizer, "micro", "macro")
    assert list(found) == [("micro", "acc"), ("macro", "acc")]
    micro, macro = found.values()
    assert micro.scores == (*first.scores, *second.scores) and micro.items == len(ITEMS)
    assert micro.value == pytest.approx(np.mean(micro.scores)) and micro.standard_error > 0
    assert micro.chance == pytest.approx((8 * first.chance + 16 * second.chance) / 24)
    assert macro.value == pytest.approx((first.value + second.value) / 2) != micro.value
    assert macro.scores == () and macro.chance is None
    assert micro.sha256 == macro.sha256 != first.sha256
    assert tasks.ask(dense, tokenizer, "loose") == tasks.ask(dense, tokenizer, "both") == leaves


def test_scores_do_not_depend_on_what_was_drawn_before_or_is_asked_beside(dense, tokenizer, tasks, capfd, monkeypatch):
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a process for each core was started"))
    sampled = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": ["\n\n"], "do_sample": True, "temperature": 1.0},
        "metric_list": [{"metric": "chrf"}],  # tells one generated text from another
    }
    tasks.add("drawn", ITEMS[:6], **sampled)
    tasks.add("drawn_too", ITEMS[6:12], **sampled)
    alone = tasks.ask(dense, tokenizer, "drawn")
    torch.rand(3), random.random()
    beside = tasks.ask(dense, tokenizer, "drawn_too", "drawn")
    assert {key: beside[key] for key in alone} == alone
    score = alone["drawn", "chrf"]
    assert score.value > 0 and score.standard_error > 0  # lm-eval prints that it draws for this one
    assert score.scores == () and score.items == 6
    assert capfd.readouterr().out == ""


def state_of_process(model):
    return {
        "modes": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": sorted(vars(model)),
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "levels": {
            name: log.level
            for name, log in logging.root.manager.loggerDict.items()
            if "lm_eval" in name and isinstance(log, logging.Logger)
        },
        "bars": [
            vars(sys.modules[name]).get("tqdm") for name in ("tqdm", "lm_eval.api.task", "lm_eval.models.huggingface")
        ],
    }


def test_a_model_in_training_mode_is_measured_without_dropout(dense, tokenizer, standing_tasks):
    model = copy.deepcopy(dense).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert standing_tasks.ask(model, tokenizer, "text") == standing_tasks.ask(dense, tokenizer, "text")
    assert model.training


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_and_the_process_are_left_as_they_were(
    dense, tokenizer, standing_tasks, monkeypatch, capfd, interrupted
):
    standing_tasks.ask(dense, tokenizer, "choice", limit=1)  # imports what there is to import
    model, tokenizer = copy.deepcopy(dense).train(), copy.deepcopy(tokenizer)
    model.model.layers[1].eval()
    model.tie_weights = lambda *_, **__: pytest.fail("weights that were untied on purpose would be tied again")
    tokenizer.pad_token = None
    if interrupted:
        monkeypatch.setattr(model, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    before = state_of_process(model)
    capfd.readouterr()
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            standing_tasks.ask(model, tokenizer, "choice", "text", progress=True)
    else:
        standing_tasks.ask(model, tokenizer, "choice", "text", progress=True)
    assert state_of_process(model) == before
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_no_cache_and_no_graph_are_kept_while_options_are_scored(dense, tokenizer, standing_tasks, monkeypatch):
    forward, seen = dense.forward, []

    def spy(**kwargs):
        out = forward(**kwargs)
        seen.append((out.past_key_values, out.logits.requires_grad))
        return out

    monkeypatch.setattr(dense, "forward", spy)
    standing_tasks.ask(dense, tokenizer, "choice")
    assert set(seen) == {(None, False)}


FOLDERS = (
    "arc",
    "glue/rte",
    "hellaswag",
    "mmlu/default",
    "openbookqa",
    "piqa",
    "race",
    "super_glue/boolq",
    "winogrande",
)


@pytest.fixture(scope="module")
def stock_index():
    """What the suites take of lm-eval's own tasks: reading them all takes several seconds."""
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[folder / name for name in FOLDERS], include_defaults=False)


@pytest.fixture
def stock_tasks(stock_index, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "_own_tasks_of_lm_eval", lambda: stock_index)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_the_suites_are_known_to_lm_eval_and_each_task_is_one_row(stock_index):
    for name in {name for names in SUITES.values() for name in names}:
        config = stock_index.task_index[name].cfg
        metrics = config.get("aggregate_metric_list") or config["metric_list"]
        assert metrics[0]["metric"] == "acc"
    assert [len(SUITES[name]) for name in ("wanda", "ast", "maskllm", "patch")] == [7, 7, 7, 8]
    assert stock_index.task_index["mmlu"].cfg["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]


@pytest.mark.slow
def test_all_tasks_of_lm_eval_are_found():
    names = harness._own_tasks_of_lm_eval().all_tasks
    assert len(names) > 10_000 and {name for names in SUITES.values() for name in names} <= set(names)


def test_an_unknown_task_is_named_with_those_like_it(dense, tokenizer, stock_tasks):
    with pytest.raises(ConfigError, match=r"no task 'arc_eazy'; did you mean .*arc_easy.* below include_path"):
        evaluate_tasks(dense, tokenizer, ["arc_eazy"])


@pytest.mark.parametrize(("name", "data"), [("arc_easy", "allenai/ai2_arc"), ("mmlu", "cais/mmlu")])
def test_data_that_is_out_of_reach_is_named(dense, tokenizer, stock_tasks, name, data):
    with pytest.raises(HubError, match=rf"task '{name}': its data.* from the Hub .*{data}.*; run once with network"):
        evaluate_tasks(dense, tokenizer, [name])


def test_tasks_that_cannot_be_built_are_named_with_their_file(dense, tokenizer, tasks):
    tasks.add("no_such_split", ITEMS, **{**MULTIPLE_CHOICE, "validation_split": "held_out", "test_split": None})
    tasks.add("no_such_field", ITEMS, **{**MULTIPLE_CHOICE, "doc_to_choice": "{{choices}}"})
    tasks.add("no_data", ITEMS, **MULTIPLE_CHOICE)
    (tasks.folder / "no_data-test.jsonl").unlink()
    tasks.add("code", ITEMS, **MULTIPLE_CHOICE, unsafe_code=True)
    with pytest.raises(ConfigError, match=r"cannot build it from .*no_such_split.yaml \(KeyError: 'held_out'\)"):
        tasks.ask(dense, tokenizer, "no_such_split")
    with pytest.raises(ConfigError, match=r"cannot build it from .*no_such_field.yaml"):
        tasks.ask(dense, tokenizer, "no_such_field")
    tasks.group("its_group", ["no_data"])
    for name in ("no_data", "its_group"):
        with pytest.raises(ConfigError, match=rf"the data that .*{name}.yaml names cannot be read"):
            tasks.ask(dense, tokenizer, name)
    with pytest.raises(UnsupportedError, match="'code' runs code that the model writes"):
        tasks.ask(dense, tokenizer, "code")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "expected a list of names"),
        ({"tasks": "arc_easy"}, "expected a list of names"),
        ({"limit": 0}, "limit=0; expected a number of items"),
        ({"limit": 1.0}, r"limit=1\.0"),
        ({"limit": -0.5}, r"limit=-0\.5"),
        ({"limit": True}, "limit=True"),
        ({"shots": -1}, "shots=-1; expected an integer, 0 or more"),
        ({"shots": 1.5}, r"shots=1\.5"),
        ({"batch_size": 0}, "batch_size=0; expected an integer, 1 or more"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_length": 0}, "max_length=0"),
        ({"include_path": "nowhere"}, "include_path='nowhere': no such folder"),
    ],
)
def test_bad_arguments_are_refused(dense, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks(dense, tokenizer, **{"tasks": ["choice"], **options})


def test_a_tokenizer_without_an_end_is_refused(dense, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no eos token"):
        evaluate_tasks(dense, bare, ["choice"])
    with pytest.raises(UnsupportedError, match="the tokenizer is a str"):
        evaluate_tasks(dense, "tiny", ["choice"])


def test_a_model_with_an_encoder_is_refused(dense, tokenizer):
    class Translator(nn.Module):
        config = copy.deepcopy(dense.config)

    Translator.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedError, match="Translator is an encoder-decoder"):
        evaluate_tasks(Translator(), tokenizer, ["choice"])


def test_without_lm_eval_the_extra_is_named(dense, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[eval\]'"):
        evaluate_tasks(dense, tokenizer, ["choice"])
