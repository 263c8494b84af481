# SPDX-License-Identifier: Apache-2.0
"""The command line: whole lines of work, JSON, exit codes, and nothing half written."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import facts, run
from families import FAMILIES
from huggingface_hub import ModelCard
from local_hub import as_the_hub
from safetensors.torch import load_file, save_file
from small_inputs import make_inputs
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.cli.folders import Kind, kind_of
from hf_nmsparse.ops.linear24 import measure
from hf_nmsparse.results import RunResults

SHORT = "--sequence-length 32"
STEPS = f"{SHORT} --max_steps 3 --per_device_train_batch_size 2 --logging_steps 1 --save_steps 2 --learning_rate 0.05"


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """`base`, a tiny Llama with a tokenizer; `train.txt` and `test.txt`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def trained(inputs, tmp_path_factory) -> Path:
    """What `nmsparse train` leaves."""
    output = tmp_path_factory.mktemp("trained") / "run"
    texts = f"--data {inputs}/train.txt --eval-data {inputs}/test.txt"
    run(f"train {inputs}/base {texts} --output {output} --prior wanda {STEPS}")
    return output


# --- the whole line -------------------------------------------------------------------------------------------------
def test_prune_verify_eval(there):
    pruned = facts(f"prune base --criterion wanda --calibration train.txt --samples 4 {SHORT} --output pruned")
    assert (pruned["ok"], pruned["kind"], pruned["tokens"], len(pruned["layers"])) == (True, "model", 128, 14)
    assert all(0 < layer["relative_error"] < 1 for layer in pruned["layers"])
    report = facts("verify pruned")
    assert (report["ok"], report["layers"], report["over"], report["under"]) == (True, 14, 0, 0)
    # Plain transformers reads it, tokenizer included, and the numbers are those of the library.
    model = AutoModelForCausalLM.from_pretrained("pruned")
    assert nms.verify(model).ok and (there / "pruned" / "tokenizer.json").is_file()
    found = facts(f"eval pruned --text test.txt {SHORT} --max-tokens 320")
    tokens = torch.tensor([[int(word[1:]) + 2 for word in Path("test.txt").read_text().split()[:320]]])
    expected = nms.perplexity(model, tokens[0], seq_len=32)
    assert found["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    assert (found["tokens"], found["windows"]) == (310, 10)
    assert facts(f"eval pruned --text test.txt {SHORT} --max-tokens 40")["standard_error"] is None  # one window: NaN
    results = RunResults.read("pruned/results.json")
    assert (results.method, results.pattern, results.base_model) == ("wanda", "2:4", "base")
    assert len(results.sparse_layers) == 14 and results.dense_layers == ["lm_head"]


@pytest.mark.parametrize("kind", ["mask", "packed", "pruned"])
def test_eval_records_each_text_beside_the_dense_model_in_results_and_card(there, kind):
    run("prune base --criterion magnitude --output pruned")
    run("compress pruned --output packed")
    folder = {"mask": "pruned/mask"}.get(kind, kind)
    Path("law").mkdir()
    Path("law/test.txt").write_text(" ".join(Path("test.txt").read_text().split()[40:]))
    readme = Path(folder) / "README.md"
    readme.write_text(readme.read_text().replace("\n---\n", "\nlicense: mit\n---\n", 1) + "\n## My notes\n\nfine\n")
    dense = facts(f"eval base --text test.txt {SHORT}")["perplexity"]
    for text in ("test.txt", "law/test.txt", "test.txt"):  # the second time it takes the place of the first
        found = facts(f"eval {folder} --text {text} {SHORT} --record")
    assert found["dense"] == pytest.approx(dense, rel=1e-6) and found["recorded"] == folder
    evaluations = RunResults.read(f"{folder}/results.json").evaluations
    assert [entry["text"] for entry in evaluations] == ["test.txt", "test.txt"]  # of other tokens
    assert evaluations[0]["tokens"] < evaluations[1]["tokens"]
    assert evaluations[1]["this"] == pytest.approx(found["perplexity"]) and evaluations[1]["dense"] == found["dense"]
    card = ModelCard.load(f"{folder}/README.md")
    assert evaluations[1]["this"] in [result.metric_value for result in card.data.eval_results]
    assert card.text.count("| test.txt |") == 2 and "Evaluated on test.txt, test.txt only" in card.text
    assert card.data.license == "mit" and card.text.endswith("## My notes\n\nfine\n")
    assert nms.verify(folder).ok


def test_bench_records_times_of_a_models_sparse_layers_in_results_and_card(there, monkeypatch):
    monkeypatch.setattr(measure, "measure_roofline", lambda device, dtype: measure.Roofline(1e9, 1e9))
    run("prune base --criterion magnitude --output pruned")
    found = facts("bench pruned/mask --tokens 1 --rounds 3 --record")
    speed = RunResults.read("pruned/mask/results.json").speed
    assert len(speed) == len(found["rows"]) == 2 * 4  # both memory modes of each shape, without the head
    assert {row["ratio"] for row in speed} == {row["speedup"] for row in found["rows"]}
    assert all(row["device"] and row["kernel"] and row["low"] <= row["ratio"] <= row["high"] for row in speed)
    text = ModelCard.load("pruned/mask/README.md").text
    assert "linear 64x32, bfloat16, memory low" in text and nms.verify("pruned/mask").ok
    assert "name its folder" in run("bench --shape 32x32 --tokens 1 --rounds 3 --record", 2).stderr


def test_record_needs_a_folder_with_results_and_then_changes_nothing(there):
    run("prune base --criterion magnitude --output pruned")
    before = {path.name: path.read_bytes() for path in Path("pruned").iterdir() if path.is_file()}
    for line, said in (
        ("base", "has none; prune, train"),
        ("user/mask", "is none; pull it first"),
        ("base --mask pruned/mask", "name the mask itself"),
    ):
        assert said in " ".join(run(f"eval {line} --text test.txt {SHORT} --record", 2).stderr.split())
    run("eval pruned --text nothing.txt --record", 2)
    results = RunResults.read("pruned/results.json")
    for field, value, code, said in (
        ("base_model", None, 2, "does not name the base model"),
        ("base_model", "pruned", 2, "sparse itself"),
        ("evaluations", ["x"], 1, "evaluations must be a list of objects"),
    ):
        dataclasses.replace(results, **{field: value}).write("pruned/results.json")
        assert said in " ".join(run(f"eval pruned --text test.txt {SHORT} --record", code).stderr.split())
    results.write("pruned/results.json")
    assert {path.name: path.read_bytes() for path in Path("pruned").iterdir() if path.is_file()} == before


def test_prune_packed(there):
    assert facts("prune base --criterion magnitude --packed --output packed")["kind"] == "packed model"
    dense = facts("prune base --criterion magnitude --output dense")
    assert facts("verify packed")["groups"] == 4608
    values = [facts(f"eval {name} --text test.txt {SHORT}")["perplexity"] for name in ("packed", "dense")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    shown = facts("inspect packed")
    assert (shown["ratio"], shown["bits_per_weight"], shown["dense_layers"]) == (0.5625, 9.0, ["lm_head"])
    assert shown["file_bytes"] < dense["bytes"]
    assert "nmsparse" in Path("packed/README.md").read_text()


def test_trained_mask_is_published_with_its_results(inputs, trained):
    assert kind_of(trained) is Kind.MASK
    results = RunResults.read(trained / "results.json")
    assert (results.steps, results.planned_steps, results.pattern) == (3, 3, "2:4")
    assert list(results.perplexity) == ["dense", "prior (wanda)", "learned"]
    assert [entry["step"] for entry in results.history if "loss" in entry] == [1, 2, 3]
    assert results.history[-2]["nm/flip_rate"] > 0
    assert set(results.data) == {"training", "evaluation", "calibration"}
    shown = facts(f"inspect {trained}")
    assert (shown["kind"], shown["base"], len(shown["layers"])) == ("mask", f"{inputs}/base", 14)
    assert shown["bits_per_weight"] == pytest.approx(8 * shown["file_bytes"] / 18432)
    assert shown["checkpoints"] == ["checkpoint-2", "checkpoint-3"]
    checkpoint = facts(f"inspect {trained}/checkpoints/checkpoint-3")
    assert (checkpoint["kind"], checkpoint["step"], len(checkpoint["layers"])) == ("training checkpoint", 3, 14)
    assert checkpoint["logits_bytes"] == 4 * 6 * 18432 // 4


def test_trained_weights_are_published_as_a_model(there):
    texts = f"--data train.txt --eval-data test.txt {SHORT} --max_steps 3 --logging_steps 1 --save_steps 2"
    found = facts(f"train base {texts} --relaxation ast --mask-interval 1 --slorb-block 8 --output packed")
    assert (found["kind"], found["steps"], found["terms"]) == ("packed model", 3, {"slorb_block": 8})
    rows = found["perplexity"]
    assert list(rows)[-2:] == ["learned", "learned, without the term beside the mask"]
    again = facts(f"eval packed --text test.txt {SHORT}")["perplexity"]
    assert again == pytest.approx(rows["learned"], rel=1e-2)  # what SLoRB adds is rounded to bfloat16
    assert "given new values by ast" in Path("packed/README.md").read_text()
    assert facts("verify packed")["ok"]
    checkpoint = facts("inspect packed/checkpoints/checkpoint-3")
    assert (checkpoint["kind"], len(checkpoint["layers"])) == ("training checkpoint", 14)
    masked = facts(f"train base {texts} --relaxation pdp --pattern 4:8 --output masked")
    assert masked["kind"] == "model"
    assert facts("verify masked --pattern 4:8")["over"] == 0
    assert (
        "--blockwise-steps"
        in run(f"train base {texts} --relaxation bdwp --blockwise-steps 2 --output other", code=2).stderr
    )


def test_a_recipe_holds_options_and_typed_ones_come_first(inputs, tmp_path):
    recipe = tmp_path / "cheap.yaml"
    recipe.write_text(
        f"data: {inputs}/train.txt\nrelaxation: elementwise\nlogits-dtype: bfloat16\nmask_optimizer_states: 8bit\n"
        "optimizer-in-backward: true\nmax_grad_norm: 0\ntemperature: [1.0, 0.05]\nsequence_length: 32\nmax_steps: 7\n"
        "learning_rate: 1e-2\ndisable_tqdm: true\nprior_strength: 2.0\nlr_scheduler_type: constant\neval_data:\n"
    )
    line = f"train {inputs}/base --recipe {recipe} --output {tmp_path}/out --max_steps 3 --prior-strength 1.5 --logging_steps 1"
    found = facts(line)
    assert found["steps"] == 3 and found["last_log"]["learning_rate"] == 0.01
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["relaxation"], config["logits_dtype"]) == ("elementwise", "bfloat16")
    assert (config["temperature"], config["prior_strength"]) == ([1.0, 0.05], 1.5)


def test_a_mask_is_learned_without_text_block_by_block_and_distilled_twice_from_one_teacher(inputs, tmp_path):
    line = f"train {inputs}/base --self-data 640 --blockwise-steps 4 --distill --distill-top-k 8 --distill-weight 1"
    line += f" --teacher-cache {tmp_path}/teacher --eval-data {inputs}/test.txt --schedule cosine --prior-confidence {STEPS}"
    first = facts(f"{line} --output {tmp_path}/first")
    assert list(first["perplexity"]) == ["dense", "prior (magnitude)", "block by block", "learned"]
    written = (tmp_path / "teacher").stat().st_size
    facts(f"{line} --output {tmp_path}/second")
    assert (tmp_path / "teacher").stat().st_size == written > 1000  # all windows were known
    results = RunResults.read(tmp_path / "first" / "results.json")
    assert "written by the model itself" in results.data["training"]
    assert "block by block 4 steps each, distilled: 1 KL of the 8 likeliest" in results.method
    codes = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second")]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_a_learned_mask_is_stored_as_a_delta_to_its_prior(inputs, trained, tmp_path):
    steps = STEPS.replace("0.05", "0.002")
    line = f"train {inputs}/base --data {inputs}/train.txt --prior {trained} --delta-to {trained} {steps}"
    found = facts(f"{line} --output {trained.parent}/delta")
    assert found["bits_per_weight"] < json.loads((trained / "results.json").read_text())["mask_bits_per_weight"]
    assert facts(f"verify {trained.parent}/delta --base {inputs}/base")["ok"]
    other = run(
        f"train {inputs}/base --data {inputs}/train.txt --pattern 1:4 --delta-to {trained} --output {tmp_path}/x {STEPS}",
        2,
    )
    assert "expected one of 1:4" in other.stderr


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml")), ids=str
)
def test_recipes_of_the_examples_are_understood(inputs, tmp_path, recipe):
    small = "--sequence-length 32 --bf16 false --use_cpu true"  # longer than this model reads; and no GPU
    line = f"train {inputs}/base --recipe {recipe} --data {inputs}/train.txt --output {tmp_path}/out --dry-run {small}"
    assert facts(line)["plan"]["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "expected lines 'option: value'"),
        ("data: {a: 1}\n", "data must be a plain value"),
        ("model: x\n", "name the model on the command line"),
        ("data: 'x\n", "while scanning a quoted scalar"),
        ("data: {inputs}/train.txt\nmax_stepps: 3\n", "--max_stepps"),
    ],
)
def test_wrong_recipes(inputs, tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text.replace("{inputs}", str(inputs)))
    result = run(f"train {inputs}/base --recipe {tmp_path}/recipe.yaml --output {tmp_path}/out", code=2)
    assert said in result.stderr and not (tmp_path / "out").exists()


def test_merge_compress_eval_verify(there, trained):
    merged = facts(f"merge base --mask {trained} --output merged")
    assert (merged["kind"], len(merged["layers"])) == ("model", 14)
    base, masked = load_file("base/model.safetensors"), load_file("merged/model.safetensors")
    for name in merged["layers"]:
        kept = masked[f"{name}.weight"] != 0
        assert torch.equal(masked[f"{name}.weight"][kept], base[f"{name}.weight"][kept])
    assert facts("inspect merged")["masked"] is True
    from_merged = facts("compress merged --output packed")
    from_mask = facts(f"compress base --mask {trained} --output packed2")
    assert from_merged["ratio"] == from_mask["ratio"] == 0.5625
    one, other = (load_file(f"{name}/model.safetensors") for name in ("packed", "packed2"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert facts("verify packed")["ok"]
    sources = ("packed", "merged", str(trained), f"base --mask {trained}", f"{trained}/checkpoints/checkpoint-3")
    values = [facts(f"eval {source} --text test.txt {SHORT}")["perplexity"] for source in sources]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)
    assert RunResults.read("packed2/results.json").method == "candidates (prior wanda)"


def test_compress_rounds_values(there):
    run("prune base --criterion magnitude --output masked")
    results = RunResults.read("masked/results.json")
    results.perplexity = {"dense": 10.0, "magnitude": 20.0}
    results.write("masked/results.json")
    line = f"compress masked --values int4 --calibration train.txt --samples 4 {SHORT}"
    dry = facts(f"{line} --output int4 --dry-run")
    assert dry["dry_run"] and dry["values"] == "int4" and not Path("int4").exists()
    found = facts(f"{line} --output int4")
    assert found["values"] == "int4" and 0 < found["packed_bytes"] < 0.3 * found["dense_bytes"]
    assert facts("verify int4")["ok"] and facts("inspect int4")["values"] == "int4"
    assert any(name.endswith("weight_input_scale") for name in load_file("int4/model.safetensors"))
    results = RunResults.read("int4/results.json")
    assert results.values == "int4" and results.perplexity == {"dense": 10.0}
    assert "train.txt" in results.data["calibration of values"]
    card = Path("int4/README.md").read_text()
    assert "stored as int4" in card and "Kept weights: bit-equal" not in card
    nearest = facts("compress masked --values int4 --output nearest")
    assert not any(name.endswith("input_scale") for name in load_file("nearest/model.safetensors"))
    assert nearest["packed_bytes"] == dry["packed_bytes"] < found["packed_bytes"]


def test_plan_reads_the_config_only(there):
    Path("bare").mkdir()
    shutil.copy("base/config.json", "bare/config.json")
    plan = facts("plan bare --dense-layers down_proj,o_proj")
    assert plan["logits_bytes"] == sum(4 * layer["parameters"] for layer in plan["layers"])
    assert plan["skipped"]["model.layers.0.mlp.down_proj"] == "named in dense_layers"
    assert len(plan["layers"]) == 10
    assert "q_proj" in run("plan bare").stdout


# --- terms, and other layers than linear ones -----------------------------------------------------------------------
@pytest.fixture(scope="session")
def with_terms(inputs, tmp_path_factory) -> Path:
    """What `nmsparse train` leaves of a mask with all terms."""
    output = tmp_path_factory.mktemp("with_terms") / "run"
    texts = f"--data {inputs}/train.txt --eval-data {inputs}/test.txt"
    terms = "--relaxation elementwise --slorb-block 8 --low-rank 2 --delta-rank 1"
    found = facts(f"train {inputs}/base {texts} --output {output} --prior magnitude {terms} {STEPS}")
    assert found["terms"] == {"slorb_block": 8, "low_rank": 2, "delta_rank": 1}
    assert 0 < found["side_branch_error"]["fitted"] < found["side_branch_error"]["without"]
    return output


def test_plan_says_what_each_of_several_devices_holds(there):
    rows = facts("plan base --devices 4")["devices"]
    assert [row["engine"] for row in rows] == ["ddp", "zero2", "fsdp2"] and rows[0]["total"] > rows[2]["total"]
    assert facts("plan base --devices 4 --engine fsdp2")["devices"] == rows[2:]
    assert [row["engine"] for row in facts("plan base --devices 4 --mask-optimizer-states 8bit")["devices"]] == ["ddp"]
    assert "on each of 4 devices" in run("plan base --devices 4").stdout
    for wrong, said in (
        ("--engine ddp", "--devices"),
        ("--devices 4 --engine x", "fsdp2"),
        ("--devices 1", "at least 2"),
    ):
        assert said in run(f"plan base {wrong}", code=2).stderr


def test_plan_counts_terms(there):
    plan = facts("plan base --slorb-block 8 --low-rank 2 --delta-rank 1 --relaxation elementwise")
    plain = facts("plan base --relaxation elementwise")
    assert plan["logits_bytes"] == plain["logits_bytes"] and plain["term_bytes"] == 0
    assert plan["term_bytes"] == 4 * sum(layer["term_parameters"] for layer in plan["layers"]) > 0
    assert "operations" in run("plan base --pattern 2:8 --relaxation bdwp --training-cost").stdout
    cost = facts("plan base --pattern 2:8 --training-cost --tokens 10")["training_cost"]
    assert cost["both n:m"]["total"]["forward"] == cost["dense"]["total"]["forward"] / 4
    assert "terms, float32" in run("plan base --low-rank 2").stdout and "terms" not in run("plan base").stdout


def test_a_side_branch_is_fitted_to_the_prior_and_published(inputs, with_terms):
    results = RunResults.read(with_terms / "results.json")
    assert set(results.data) == {"training", "evaluation", "calibration"}
    assert len(results.layers) == 14 and results.method.startswith("elementwise")
    assert all(row["relative_error_mask_and_branch"] < row["relative_error_mask"] for row in results.layers)
    config = json.loads((with_terms / "adapter_config.json").read_text())
    assert (config["slorb_init"], config["low_rank"], config["relaxation"]) == ("closed_form", 2, "elementwise")
    assert "SLoRB (blocks of 8 inputs) and a low-rank term (rank 2)" in (with_terms / "README.md").read_text()
    shown = facts(f"inspect {with_terms}")
    assert shown["terms"] == results.terms
    planned = facts(f"plan {inputs}/base --slorb-block 8 --low-rank 2 --delta-rank 1 --relaxation elementwise")
    assert shown["terms_bytes"] == planned["term_bytes"] // 2  # bfloat16
    assert shown["file_bytes"] == planned["mask_file_bytes"]
    checkpoint = facts(f"inspect {with_terms}/checkpoints/checkpoint-3")
    assert (len(checkpoint["layers"]), checkpoint["terms_bytes"]) == (14, planned["term_bytes"])
    assert checkpoint["logits_bytes"] == planned["logits_bytes"]


def test_terms_stay_beside_packed_weights_and_make_merged_ones_dense(there, with_terms):
    packed = facts(f"compress base --mask {with_terms} --output packed")
    planned = facts("plan base --slorb-block 8 --low-rank 2 --delta-rank 1")
    assert packed["packed_bytes"] == planned["packed_bytes"]
    shown = facts("inspect packed")
    assert (shown["side_branch"], shown["packed_bytes"]) == ({"slorb_block": 8, "low_rank": 2}, packed["packed_bytes"])
    assert "Beside the packed weights" in Path("packed/README.md").read_text()
    assert facts("verify packed")["ok"] and facts(f"verify {with_terms} --base base")["ok"]
    merged = run(f"merge base --mask {with_terms} --output merged")
    assert "merged weights are dense" in merged.stderr and "UserWarning" not in merged.stderr
    assert RunResults.read("merged/results.json").sparse_layers == []
    assert facts("inspect merged")["masked"] is False
    values = [facts(f"eval {name} --text test.txt {SHORT}")["perplexity"] for name in ("packed", "merged", with_terms)]
    assert values == pytest.approx([values[2]] * 3, rel=2e-2)  # the sum is rounded to bfloat16 in other places


def test_resuming_with_other_terms_is_refused(there, with_terms):
    shutil.copytree(with_terms, "run")
    line = f"train base --data train.txt --output run --resume --relaxation elementwise {STEPS}"
    assert "slorb_block=8" in run(line, 2).stderr
    assert "low_rank=2" in run(f"{line} --slorb-block 8 --slorb-init closed_form", 2).stderr


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_go_the_whole_line(there, family):
    model = FAMILIES[family]()
    model.resize_token_embeddings(128)
    model.to(torch.bfloat16).save_pretrained("other")
    for path in Path("base").glob("tokenizer*"):
        shutil.copyfile(path, Path("other") / path.name)
    planned = facts("plan other --delta-rank 1")
    run(f"train other --data train.txt --output mask --delta-rank 1 {STEPS}")
    experts = [layer["name"] for layer in planned["layers"] if layer["not_packable"] == "fused experts"]
    assert bool(experts) == (family == "mixtral")
    results = RunResults.read("mask/results.json")
    assert results.sparse_layers == sorted(layer["name"] for layer in planned["layers"])
    assert (results.fused_experts, set(results.dense_layers)) == (sorted(experts), set(planned["skipped"]))
    assert ("Fused experts" in Path("mask/README.md").read_text()) == bool(experts)
    shown = facts("inspect mask")
    assert (shown["file_bytes"], shown["fused_experts"]) == (planned["mask_file_bytes"], sorted(experts))
    assert facts("inspect mask/checkpoints/checkpoint-3")["layers"] == results.sparse_layers
    assert facts("verify mask --base other")["ok"]
    assert facts("compress other --mask mask --output packed")["layers"] == len(results.sparse_layers) - len(experts)
    facts("prune other --criterion magnitude --output pruned")
    pruned = RunResults.read("pruned/results.json")
    assert (set(pruned.dense_layers), pruned.fused_experts) == (set(planned["skipped"]), sorted(experts))


# --- training: stop, resume, refuse ---------------------------------------------------------------------------------
def test_ctrl_c_leaves_a_checkpoint_and_resuming_gives_the_same_mask(there, trained, monkeypatch):
    from hf_nmsparse.training import MaskScheduleCallback

    usual = MaskScheduleCallback.on_step_begin

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 0:
            signal.raise_signal(signal.SIGINT)
        return usual(self, args, state, control, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    line = f"train base --data train.txt --eval-data test.txt --output run --prior wanda {STEPS}"
    with monkeypatch.context() as patched:
        patched.setattr(MaskScheduleCallback, "on_step_begin", interrupted)
        stopped = run(line, 130)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 1" in stopped.stderr and "--resume" in stopped.stderr
    assert everything_in(there / "run")[0] == "checkpoints" and kind_of(there / "run") is Kind.RUN
    assert facts("inspect run")["checkpoints"] == ["checkpoint-1"]
    assert "--resume" in run(line, 2).stderr
    assert "temperature" in run(f"{line} --resume --temperature 3 1", 2).stderr
    run(f"{line} --resume")
    once, twice = (load_file(folder / "adapter_model.safetensors") for folder in (trained, there / "run"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_checkpoint_that_is_not_whole_is_named(there, trained):
    shutil.copytree(trained, "run")
    Path("run/checkpoints/checkpoint-3/optimizer.pt").unlink()
    error = run(f"train base --data train.txt --output run --prior wanda --resume {STEPS}", 1).stderr
    assert "checkpoint-3 is incomplete (no optimizer.pt)" in error and "checkpoint-2" in error


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_cut_short_is_named_and_the_one_before_taken_only_when_asked(there, trained, name):
    shutil.copytree(trained, "run")
    path = Path("run/checkpoints/checkpoint-3", name)
    path.write_bytes(path.read_bytes()[:-100])
    line = f"train base --data train.txt --output run --prior wanda {STEPS}"
    error = run(f"{line} --resume", 1).stderr
    assert f"checkpoint-3 is incomplete ({name} is damaged or cut short)" in error
    asked = "--resume_from_checkpoint run/checkpoints/checkpoint-2"
    assert error.strip().endswith(asked)
    if name == "optimizer.pt":
        assert facts(f"{line} {asked}")["steps"] == 3  # and writes checkpoint-3 again
        run(f"{line} --resume")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max_stepz 3", "--max_stepz"),
        ("--max_steps many", "invalid int value"),
        ("--eval_strategy never", "invalid choice"),
        ("--load_best_model_at_end true", "save and eval strategy"),
        ("--output_dir elsewhere", "leave --output_dir out"),
        ("--prior nothing", "unknown criterion"),
        ("--resume", "no checkpoint"),
        ("--dense-layers nothing", "matches no module"),
        ("--dense-layers self_attn,mlp", "leaves no layer to prune"),
        ("--dense-layers q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "no layer to prune"),
        ("--prior-strength -1", "prior_strength"),
        ("--data nothing.txt", "no such file"),
        ("--slorb-init mean", "needs --slorb-block"),
        ("--slorb-block 8 --slorb-init nothing", "slorb_init='nothing'"),
        ("--slorb-block 8 --slorb-init sum --low-rank 2", "--slorb-init sum would be without effect"),
        ("--delta-rank -1", "delta_rank=-1"),
    ],
)
def test_wrong_training_options(there, options, said):
    error = run(f"train base --data train.txt --output run {options}", 2).stderr
    assert said in error and "Traceback" not in error
    assert not Path("run").exists()


# --- exit codes and messages ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan ./nothing", "no such folder"),
        ("plan nobody/nothing", "could not fetch nobody/nothing"),
        ("verify nobody/nothing", "no such folder here"),
        ("verify nobody/nothing --revision v1", "nobody/nothing (revision 'v1')"),
        ("verify base --revision v1", "has no revision 'v1'"),
        ("inspect base --task law", "no subfolder 'law'"),
        ("eval nobody/nothing --text test.txt", "could not fetch"),
        ("merge base --mask nobody/nothing --output x", "could not fetch nobody/nothing"),
        ("inspect train.txt", "is a file"),
        ("inspect .", "inspect takes"),
        ("plan base --pattern 4:2", "0 < n < m"),
        ("plan base --relaxation nothing", "choose one of ast, bdwp, candidates, elementwise"),
        ("plan base --low-rank 0", "low_rank=0 must be a positive integer"),
        ("plan base --slorb-train-projection", "needs slorb_block"),
        ("prune base --criterion nothing --output x", "unknown criterion"),
        ("prune base --criterion wanda --output x", "--calibration"),
        ("prune base --criterion wanda --calibration nothing.txt --output x", "no such file"),
        ("prune base --criterion magnitude --pattern 4:8 --packed --output x", "cannot be packed"),
        ("prune base --criterion magnitude --dense-layers nothing --output x", "matches no module"),
        ("prune base --criterion magnitude --output base", "also an input"),
        ("prune base --criterion magnitude --output train.txt", "is a file"),
        ("compress base --output x", "2:4 sparse"),
        ("compress base --calibration train.txt --output x", "add --values int8 or int4"),
        ("compress base --values int4 --samples 4 --output x", "--samples has no effect without --calibration"),
        ("compress base --device cpu --output x", "--device has no effect without --calibration"),
        ("compress base --allow-base-mismatch --output x", "--allow-base-mismatch has no effect without --mask"),
        ("eval base --text test.txt --sequence-length 4096", "the model takes at most"),
        ("eval base --text test.txt --device cuda:7", "no such device here; there is cpu"),
        ("verify base --base base", "--base is for masks"),
        ("train --max_steps 3 base --data train.txt --output x", "MODEL must come before"),
        ("prune base", "--output"),
        ("eval base", "--text"),
        ("nothing", "No such command"),
    ],
)
def test_wrong_use_is_exit_code_2_and_says_why(there, line, said):
    result = run(line, 2)
    assert said in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert result.stdout == "" and not Path("x").exists()


def test_a_mask_is_no_model(there, trained):
    for line in (
        f"prune {trained} --criterion magnitude --output x",
        f"plan {trained}",
        f"merge {trained} --mask {trained} --output x",
    ):
        assert "name its base model" in run(line, 2).stderr


def test_failed_checks_are_exit_code_1(there, trained):
    assert facts("verify base", 1)["dense_layers"]
    facts("prune base --criterion magnitude --output pruned")
    weights = load_file("pruned/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, :4] = 1
    save_file(weights, "pruned/model.safetensors", metadata={"format": "pt"})
    broken = facts("verify pruned", 1)
    assert (broken["ok"], broken["over"], broken["broken_layers"]) == (False, 1, {"model.layers.1.mlp.up_proj": 1})

    shutil.copytree(trained, "damaged")
    data = bytearray(Path("damaged/adapter_model.safetensors").read_bytes())
    data[-100] ^= 1
    Path("damaged/adapter_model.safetensors").write_bytes(data)
    for line in ("verify damaged", "merge base --mask damaged --output x", "inspect damaged"):
        assert facts(line, 1)["kind"] == "FormatError"

    shutil.copytree("base", "other")
    weights = load_file("other/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, "other/model.safetensors", metadata={"format": "pt"})
    assert facts(f"verify {trained} --base base")["ok"]
    for line in (f"verify {trained} --base other", f"merge other --mask {trained} --output x"):
        assert facts(line, 1)["kind"] == "BaseModelMismatchError"
    assert not Path("x").exists()
    facts(f"merge other --mask {trained} --output x --allow-base-mismatch")


def test_verify_and_inspect_take_a_revision_and_a_task(trained, tmp_path, monkeypatch):
    with as_the_hub(monkeypatch, tmp_path):
        run(f"push {trained} user/masks --task law --revision v1")
        where = "user/masks --revision v1 --task law"
        assert facts(f"verify {where}")["layers"] == len(facts(f"inspect {where}")["layers"]) == 14
        assert "other files" in run("verify user/masks --revision v1", 2).stderr
        assert "no such branch" in run("inspect user/masks --revision v2 --task law", 2).stderr


def test_debug_variable_shows_the_traceback(there, monkeypatch):
    monkeypatch.setenv("NMSPARSE_DEBUG", "1")
    assert "Traceback" in run("plan ./nothing", 2).stderr


# --- output folders -------------------------------------------------------------------------------------------------
def test_dry_runs_write_nothing(there, trained):
    before = everything_in(there)
    for line in (
        "prune base --criterion magnitude --output x",
        f"merge base --mask {trained} --output x",
        f"compress base --mask {trained} --output x",
        f"train base --data train.txt --output x {STEPS}",
    ):
        assert facts(f"{line} --dry-run")["dry_run"] is True
    assert everything_in(there) == before


def test_outputs_of_another_kind_are_not_overwritten_unasked(there, trained):
    prune = "prune base --criterion magnitude --output out"
    shutil.copytree(trained, "out")
    before = everything_in(there / "out")
    assert "(mask)" in run(prune, 2).stderr and everything_in(there / "out") == before
    run(f"{prune} --overwrite")
    # Nothing that made the folder a mask may be left.
    assert kind_of(there / "out") is Kind.MODEL and not Path("out/adapter_model.safetensors").exists()
    assert facts("verify out")["ok"]
    run(prune)  # the same kind, written by the same command
    Path("out/results.json").unlink()
    assert "no command of nmsparse wrote" in run(prune, 2).stderr
    Path("notes").mkdir()
    Path("notes/note.txt").write_text("mine")
    assert "not empty" in run("prune base --criterion magnitude --output notes", 2).stderr
    run("prune base --criterion magnitude --output notes --overwrite")
    assert Path("notes/note.txt").read_text() == "mine"


def test_an_interrupted_write_leaves_nothing(there, monkeypatch):
    before = everything_in(there)

    def disk_full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(RunResults, "write", disk_full)
    assert "No space left" in run("prune base --criterion magnitude --output x", 2).stderr
    assert everything_in(there) == before

    def stop(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunResults, "write", stop)
    assert "stopped" in run("prune base --criterion magnitude --output x", 130).stderr
    assert everything_in(there) == before


# --- the command itself ---------------------------------------------------------------------------------------------
def test_every_verb_has_help_with_an_example():
    for verb in ("plan", "prune", "train", "merge", "compress", "eval", "inspect", "verify", "doctor"):
        text = " ".join(run(f"{verb} --help").stdout.split())
        assert f"Example: nmsparse {verb} " in f"{text} " and "--json" in text, verb
        assert verb in run("--help").stdout


def test_importing_the_command_line_imports_nothing_heavy():
    """The package's own `__init__` aside: a stand-in for it shows what the verbs import by themselves."""
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('hf_nmsparse'); package.__path__ = [sys.argv[1]]; package.__version__ = '0'\n"
        "sys.modules['hf_nmsparse'] = package\n"
        "import hf_nmsparse.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(nms.__file__).parent)], check=True, timeout=60)


@pytest.mark.slow
def test_in_a_process_of_its_own(there):
    environment = {**os.environ, "COLUMNS": "200"}
    script = Path(sys.executable).with_name("nmsparse")
    for command, said in (
        ([sys.executable, "-m", "hf_nmsparse.cli", "--help"], "Exit codes"),
        ([str(script), "--version"], nms.__version__),
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
        assert said in done.stdout
    done = subprocess.run(
        [str(script), "prune", "base", "--criterion", "magnitude", "--output", "x", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout)["ok"]
    # Where bitsandbytes is installed PEFT imports it, and some versions of it print a line then.
    bare = subprocess.run([sys.executable, "-c", "import bitsandbytes"], capture_output=True, text=True, check=False)
    assert set(done.stderr.splitlines()) <= set(bare.stderr.splitlines())
