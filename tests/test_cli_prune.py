# SPDX-License-Identifier: Apache-2.0
"""`nmsparse prune`: masks and cards beside the model, resuming, models that stay on disk, options that do not fit."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import everything_in, facts, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_nmsparse as nms
from hf_nmsparse.cli.folders import Kind, kind_of
from hf_nmsparse.cli.options import Dtype
from hf_nmsparse.cli.streaming import memory_size, placement
from hf_nmsparse.criteria import SparseGPT, Wanda
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.results import RunResults

TEXT = "--calibration text.txt --samples 4 --sequence-length 32"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`base`, a tiny Llama of three blocks with a tokenizer; `text.txt`."""
    from conftest import llama_config

    folder = tmp_path_factory.mktemp("inputs")
    words = [f"w{index}" for index in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=3, initializer_range=0.2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    choose = random.Random(0)
    (folder / "text.txt").write_text(" ".join(choose.choice(words) for _ in range(600)))
    return folder


def weights_in(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_files(folder: str, other: str) -> None:
    """Equal weights, headers included, and equal configs."""
    names = [path.name for path in sorted(Path(folder).glob("*.safetensors"))]
    assert names == [path.name for path in sorted(Path(other).glob("*.safetensors"))] and names
    for name in names:
        with safe_open(Path(folder, name), "pt") as one, safe_open(Path(other, name), "pt") as two:
            assert one.metadata() == two.metadata() and set(one.keys()) == set(two.keys())
            assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())  # noqa: SIM118
    for name in ("config.json", "model.safetensors.index.json"):
        if Path(folder, name).exists():
            assert json.loads(Path(folder, name).read_text()) == json.loads(Path(other, name).read_text())


def stop_in_block(monkeypatch, block: int, criterion: type = Wanda) -> None:
    """Have the machine die when a layer of this block is chosen."""
    usual = criterion.choose_block

    def choose_block(self, inputs):
        if any(f".layers.{block}." in name for name in inputs.weights):
            raise KeyboardInterrupt
        yield from usual(self, inputs)

    monkeypatch.setattr(criterion, "choose_block", choose_block)


# --- the mask ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_mask_on_the_base_is_the_masked_model(there, pattern):
    found = facts(f"prune base {TEXT} --pattern {pattern} --output out")
    assert (found["weights"], found["mask"], found["permuted"]) == ("keep", "out/mask", [])
    assert found["mask_bytes"] == Path("out/mask/adapter_model.safetensors").stat().st_size
    assert found["peak_memory"] is None or found["peak_memory"] > 10**7
    assert kind_of(there / "out/mask") is Kind.MASK and facts("verify out/mask --base base")["ok"]
    expected = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    load_base = AutoModelForCausalLM.from_pretrained
    for masked in (
        nms.load_mask(load_base("base"), "out/mask"),
        PeftModel.from_pretrained(load_base("base"), "out/mask"),
    ):
        merged = dict(masked.merge_and_unload().named_parameters())
        assert all(torch.equal(merged[name], weight) for name, weight in expected.items())
    results = RunResults.read("out/mask/results.json")
    assert (results.pattern, results.method, results.base_model) == (pattern, "wanda", "base")
    assert results.mask_bits_per_weight == found["bits_per_weight"] and len(results.sparse_layers) == 21
    assert "nms.load_mask" in Path("out/mask/README.md").read_text()


def test_the_mask_packs_the_base_while_it_loads(there):
    facts(f"prune base {TEXT} --output out")
    packed = AutoModelForCausalLM.from_pretrained("base", quantization_config=nms.PackedConfig(mask="out/mask"))
    expected = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    unpacked = dict(nms.decompress(packed).named_parameters())
    assert all(torch.equal(unpacked[name], weight) for name, weight in expected.items())


def test_new_values_of_kept_weights_are_no_part_of_the_mask(there):
    shown = run(f"prune base {TEXT} --criterion sparsegpt --output out").stdout
    assert "kept weights updated" in shown and "not with the new values in the model" in shown
    layers = RunResults.read("out/results.json").sparse_layers
    base, pruned = weights_in("base"), weights_in("out")
    merged = dict(
        nms.load_mask(AutoModelForCausalLM.from_pretrained("base"), "out/mask").merge_and_unload().named_parameters()
    )
    for name in (f"{layer}.weight" for layer in layers):
        kept = merged[name] != 0
        assert torch.equal(merged[name][kept], base[name][kept]) and not torch.equal(
            pruned[name][kept], base[name][kept]
        )
        assert not pruned[name][~kept].any()
    assert "given new values by sparsegpt" in Path("out/README.md").read_text()
    assert "sparsegpt" in Path("out/mask/README.md").read_text()
    assert RunResults.read("out/mask/results.json").layers == []
    assert facts(f"prune base {TEXT} --criterion sparsegpt --weights keep --output out")["weights"] == "keep"
    assert "bit-equal to those of the base" in Path("out/README.md").read_text()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families(there, family):
    FAMILIES[family]().save_pretrained("other")
    for path in Path("base").glob("tokenizer*"):
        shutil.copyfile(path, Path("other") / path.name)
    found = facts(f"prune other {TEXT} --output out")
    on_disk = facts(f"prune other {TEXT} --output streamed --max-memory 1kB")
    assert on_disk["streaming"] and not found["streaming"]
    assert_same_files("out", "streamed")
    masked = nms.load_mask(AutoModelForCausalLM.from_pretrained("other"), "out/mask").merge_and_unload()
    expected = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in masked.named_parameters())
    facts(f"prune other {TEXT} --output packed --packed")
    facts(f"prune other {TEXT} --output packed2 --packed --max-memory 1kB")
    assert_same_files("packed", "packed2")
    unpacked = nms.decompress(AutoModelForCausalLM.from_pretrained("packed"))
    assert all(torch.equal(weight, expected[name]) for name, weight in unpacked.named_parameters())


def test_packing_by_files_is_what_compress_and_saving_give(there, monkeypatch):
    from hf_nmsparse.cli import writing

    facts(f"prune base {TEXT} --output out")
    facts("compress out --output compressed")
    assert facts(f"prune base {TEXT} --output packed --packed")["kind"] == "packed model"
    assert_same_files("packed", "compressed")
    assert RunResults.read("packed/results.json").packed_ratio == 0.5625
    assert facts("verify packed")["ok"] and facts("verify packed/mask --base base")["ok"]
    assert "import hf_nmsparse" in Path("packed/README.md").read_text()
    monkeypatch.setattr(writing, "_SHARD", "10KB")
    facts(f"prune base {TEXT} --output shards --packed")
    assert len(list(Path("shards").glob("*.safetensors"))) > 3 and facts("verify shards")["ok"]
    one, other = (dict(AutoModelForCausalLM.from_pretrained(name).state_dict()) for name in ("shards", "packed"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


# --- unstructured, some blocks, dense budget --------------------------------------------------------------------------
def test_a_share_is_pruned_without_a_mask(there):
    shown = run(f"prune base {TEXT} --pattern 60% --output out")
    assert "no mask was written: 60% has no groups" in shown.stdout and not Path("out/mask").exists()
    weight = weights_in("out")["model.layers.0.mlp.up_proj.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.02)
    card = Path("out/README.md").read_text()
    assert "60% of the weights" in card and "2 of 4" in card and "nms.compress" not in card
    assert RunResults.read("out/results.json").pattern == "60%"
    verified, inspected = facts("verify out"), facts("inspect out")
    assert verified["ok"] and verified["pattern"] == "60%" and verified["layers"] == len(inspected["layers"]) == 21
    assert run("verify out --pattern 80%", 1).stdout.count("no layer follows 80%") == 1


def test_permuted_channels_leave_no_mask(there):
    found = facts(f"prune base {TEXT} --permute-channels --output out")
    assert "model.layers.0.mlp.down_proj" in found["permuted"] and "mask" not in found
    assert RunResults.read("out/results.json").permuted_layers == found["permuted"]
    assert "another order" in Path("out/README.md").read_text() and facts("verify out")["ok"]
    shown = run(f"prune base {TEXT} --permute-channels --packed --output packed").stdout
    assert "no mask was written: channels were permuted" in shown and facts("verify packed")["layers"] == 21
    unpacked = nms.decompress(AutoModelForCausalLM.from_pretrained("packed"))
    expected = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in unpacked.named_parameters())


def test_the_mask_of_an_earlier_model_goes_with_it(there):
    facts("prune base --criterion magnitude --output out")
    assert Path("out/mask/README.md").is_file()
    facts("prune base --criterion magnitude --pattern 50% --output out")
    assert not Path("out/mask").exists()


def test_only_some_blocks_are_pruned(there):
    found = facts(f"prune base {TEXT} --layers 0:50% --output out")
    assert {layer["name"].split(".")[2] for layer in found["layers"]} == {"0"}
    assert "model.layers.1.mlp.up_proj" in found["dense_layers"]
    assert facts(f"prune base {TEXT} --layers 1: --output out --dry-run")["layers"][0].startswith("model.layers.1.")


def test_the_most_sensitive_layers_stay_dense(there):
    found = facts(f"prune base {TEXT} --criterion polish --start magnitude --dense-budget 20% --output out")
    kept, named = found["kept_dense"], {layer["name"] for layer in found["layers"]}
    assert kept and not set(kept) & named and set(kept) <= set(found["dense_layers"])
    base, pruned = weights_in("base"), weights_in("out")
    assert all(torch.equal(base[f"{name}.weight"], pruned[f"{name}.weight"]) for name in kept)
    sizes = {layer["name"]: base[f"{layer['name']}.weight"].nbytes for layer in found["layers"]}
    sizes |= {name: base[f"{name}.weight"].nbytes for name in kept}
    assert sum(sizes[name] for name in kept) <= 0.2 * sum(sizes.values())
    results = RunResults.read("out/results.json")
    assert (results.method, results.dense_budget, results.kept_weights) == ("polish (start magnitude)", 0.2, "keep")
    assert "left dense" in Path("out/README.md").read_text()


def test_refitted_weights_are_nearer_to_the_dense_outputs(there):
    kept = facts(f"prune base {TEXT} --weights keep --inputs dense --output out")
    refit = facts(f"prune base {TEXT} --weights refit --inputs dense --output out")
    assert (kept["weights"], refit["weights"]) == ("keep", "refit")
    for before, after in zip(kept["layers"], refit["layers"], strict=True):
        assert 0 < after["relative_error"] < before["relative_error"]
    assert "fitted anew" in Path("out/README.md").read_text()


# --- resuming ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.slow), "--max-memory 1kB"])
def test_the_same_command_goes_on_after_a_kill(there, monkeypatch, options):
    line = f"prune base {TEXT} --criterion sparsegpt"
    facts(f"{line} --output whole")
    with monkeypatch.context() as patched:
        stop_in_block(patched, 2, SparseGPT)
        stopped = run(f"{line} --output out {options}", 130)
    assert ".out.unfinished" in stopped.stderr and not Path("out").exists()
    other = run(f"{line} --output out --pattern 1:4", 2).stderr
    assert "pattern '2:4', now it is '1:4'" in other and "--overwrite" in other
    assert Path(".out.unfinished").is_dir()
    resumed = run(f"{line} --output out {options} --overwrite")
    assert "resuming: 14 of 21 layers are done" in resumed.stderr
    assert not Path(".out.unfinished").exists()
    assert_same_files("out", "whole")
    assert_same_files("out/mask", "whole/mask")


def test_overwrite_starts_anew_after_another_run(there, monkeypatch):
    with monkeypatch.context() as patched:
        stop_in_block(patched, 1)
        run(f"prune base {TEXT} --output out", 130)
    started = run(f"prune base {TEXT} --pattern 1:4 --output out --overwrite")
    assert "resuming" not in started.stderr and RunResults.read("out/results.json").pattern == "1:4"
    assert not Path(".out.unfinished").exists()


def test_what_was_found_to_stay_dense_is_not_measured_again(there, monkeypatch):
    line = f"prune base {TEXT} --dense-budget 20% --output out"
    with monkeypatch.context() as patched:
        patched.setattr("hf_nmsparse.criteria.prune", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(line, 130)

    def again(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("hf_nmsparse.criteria.sensitivity", again)
    assert facts(line)["kept_dense"]


def test_a_damaged_block_is_named(there, monkeypatch):
    with monkeypatch.context() as patched:
        stop_in_block(patched, 1)
        run(f"prune base {TEXT} --output out", 130)
    block = next(Path(".out.unfinished/blocks").glob("*.safetensors"))
    block.write_bytes(block.read_bytes()[:50])
    assert f"{block.name} is damaged" in run(f"prune base {TEXT} --output out", 1).stderr
    block.unlink()
    assert facts(f"prune base {TEXT} --output out")["ok"]


def test_a_failure_before_any_block_leaves_nothing(there, monkeypatch):
    before = everything_in(there)
    stop_in_block(monkeypatch, 0)
    run(f"prune base {TEXT} --output out", 130)
    assert everything_in(there) == before


# --- models that stay on disk -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", ["--criterion magnitude", "--criterion sparsegpt --dense-budget 20%"])
def test_a_model_on_disk_gives_the_same_files(there, options):
    inside = facts(f"prune base {TEXT} {options} --output inside")
    on_disk = run(f"prune base {TEXT} {options} --max-memory 45kB --output on-disk")
    assert "2 of 3 blocks stay on disk" in on_disk.stderr
    assert_same_files("inside", "on-disk")
    assert_same_files("inside/mask", "on-disk/mask")
    assert not inside["streaming"] and everything_in(there / "inside") == everything_in(there / "on-disk")
    assert sorted(path.name for path in there.iterdir()) == ["base", "inside", "on-disk", "text.txt"]


def test_too_little_free_memory_is_enough_reason(there, monkeypatch):
    from hf_nmsparse.cli import pruning_run

    monkeypatch.setattr(pruning_run, "available_memory", lambda device: 100_000)
    assert "blocks stay on disk" in run(f"prune base {TEXT} --output out").stderr
    assert facts(f"prune base {TEXT} --output out --dry-run")["streaming"]
    assert not facts(f"prune base {TEXT} --output out --dry-run --max-memory 1GB")["streaming"]


def test_tied_weights_stay_together_on_disk(there, make_llama):
    make_llama(tie_word_embeddings=True, dtype=torch.bfloat16).save_pretrained("tied")
    for path in Path("base").glob("tokenizer*"):
        shutil.copyfile(path, Path("tied") / path.name)
    for name, options in (("inside", ""), ("on-disk", "--max-memory 1kB")):
        assert facts(f"prune tied {TEXT} {options} --output {name}")["ok"]
    assert_same_files("inside", "on-disk")


def test_where_weights_go(make_llama):
    model = make_llama(num_hidden_layers=12).to("meta")
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - 12 * block
    for limit, on_disk in ((outside + 13 * block, 0), (outside + 5 * block, 8), (outside + block, 12), (0, 12)):
        placed = placement(model, Dtype.AUTO, "cpu", limit)
        assert (placed.blocks, placed.on_disk) == (12, on_disk)
        assert set(placed.device_map) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"} | {
            f"model.layers.{index}" for index in range(12)
        }
        assert [placed.device_map[f"model.layers.{index}"] for index in range(12)] == ["cpu"] * (12 - on_disk) + [
            "disk"
        ] * on_disk


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * 10**9), ("1.5 gib", 3 * 2**29), ("800MiB", 800 * 2**20), ("7kb", 7000), ("5B", 5)]
)
def test_sizes(text, size):
    assert memory_size(text) == size


# --- options that do not fit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--pattern 60% --packed", "--packed: 60% can keep more than 2 of 4"),
        ("--pattern 100%", "below 100 %"),
        ("--pattern 60% --permute-channels", "60% has no groups"),
        ("--criterion polish --pattern 60%", "is for n:m patterns"),
        ("--start sparsegpt", "--start is the criterion that polish starts from; wanda has no start"),
        ("--criterion polish --start nothing", "unknown criterion"),
        ("--weights nothing", "'nothing' is not one of"),
        ("--inputs nothing", "'nothing' is not one of"),
        ("--layers first", "expected a range of blocks"),
        ("--layers 5:9", "leaves no weight to prune"),
        ("--dense-budget much", "expected more than 0 %"),
        ("--dense-budget 0.1", "expected more than 0 %"),
        ("--dense-budget 100%", "less than 100 %"),
        ("--max-memory much", "expected a size such as 12GB"),
        ("--max-memory 12", "expected a size such as 12GB"),
        ("--permute-channels --max-memory 12GB", "leave --max-memory out"),
        ("--sequence-length 4096", "the model takes at most 64 tokens"),
    ],
)
def test_options_that_do_not_fit(there, options, said):
    before = everything_in(there)
    result = run(f"prune base {TEXT} {options} --output out --dry-run", 2)
    assert said in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.stderr
    assert everything_in(there) == before


@pytest.mark.parametrize("option", ["--weights refit", "--permute-channels", "--dense-budget 10%"])
def test_what_needs_text_says_so(there, option):
    error = run(f"prune base --criterion magnitude {option} --output out", 2).stderr
    assert f"{option.removesuffix(' 10%')} needs calibration text" in error


def test_a_model_of_fused_experts_alone_is_not_packed_for_nothing(there):
    FAMILIES["mixtral"]().save_pretrained("other")
    line = "prune other --criterion magnitude --dense-layers self_attn --packed --output out"
    assert "none of the 4 pruned layers can be packed" in run(line, 2).stderr


def test_sizes_that_are_none():
    for text in ("", "GB", "-1GB", "1 ib", "1e3GB"):
        with pytest.raises(ConfigError, match="expected a size"):
            memory_size(text)
