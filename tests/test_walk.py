# SPDX-License-Identifier: Apache-2.0
"""Ways to walk: unstructured, some blocks only, updated weights, dense inputs, stages, resumed, offloaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.criteria import Choice, Criterion, Polish, Wanda, find_weights, get_criterion, polish_mask, prune
from hf_nmsparse.criteria.polish import POWER
from hf_nmsparse.criteria.solve import hessian_power
from hf_nmsparse.errors import ConfigError, FormatError, PatternError, UnsupportedError
from hf_nmsparse.fingerprint import fingerprint
from hf_nmsparse.pattern import NMPattern, Unstructured, parse_pattern


class Doubling(Wanda):
    """Wanda that doubles what it keeps, and notes for which layers it was asked."""

    name, updates_weights = "doubling", True

    def __init__(self, fails_at: str | None = None) -> None:
        self._asked: list[str] = []
        self._fails_at = fails_at

    def choose_block(self, inputs):
        for name, weight in inputs.weights.items():
            if name == self._fails_at:
                raise RuntimeError("killed")
            self._asked.append(name)
            yield name, Choice(self.mask(weight, inputs.statistics[name], inputs.pattern), 2 * weight.float())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: target.dense().clone() for name, target in find_weights(model).items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    second = second.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.state_dict().items())


# --- patterns -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "share"), [("60%", 0.6), ("7.5%", 0.075), (Unstructured(0.9), 0.9)])
def test_unstructured_sparsity_prunes_its_share_of_each_layer(llama, tokens, criterion, pattern, share):
    report = prune(llama, criterion, pattern, tokens, progress=False, weights="keep")
    assert report.codes == {} and len(report.layers) == 14
    for name, weight in weights_of(llama).items():
        assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.04), name


def test_wanda_compares_unstructured_within_rows_and_magnitude_within_layers(make_llama, tokens):
    model = make_llama()
    prune(model, "wanda", "50%", tokens, progress=False)
    assert all(bool(((weight == 0).sum(1) == weight.shape[1] // 2).all()) for weight in weights_of(model).values())
    model = make_llama()
    dense = weights_of(model)
    prune(model, "magnitude", "50%", progress=False)
    for name, weight in weights_of(model).items():
        kept = weight != 0
        assert dense[name][kept].abs().min() >= dense[name][~kept].abs().max()


def test_criteria_for_groups_refuse_unstructured_sparsity_and_name_those_that_take_it(llama, tokens):
    with pytest.raises(ConfigError, match=r"'polish' is for n:m patterns, got 60%.*magnitude, ria, sparsegpt.*wanda"):
        prune(llama, "polish", "60%", tokens, progress=False)


@pytest.mark.parametrize("given", ["0%", "100%", "-5%", "150%", "half%"])
def test_impossible_shares_are_refused(given):
    with pytest.raises(PatternError, match=r"sparsity|expected a share"):
        parse_pattern(given)


def test_patterns_are_told_apart():
    assert parse_pattern("2:4") == NMPattern("2:4") and parse_pattern(" 62.5 % ") == Unstructured(0.625)
    assert str(Unstructured(0.7)) == "70%" and Unstructured(0.7).num_pruned(10) == 7


def test_a_mask_that_prunes_another_share_is_refused(llama, tokens):
    class Half(Wanda):
        name = "half"

        def mask(self, weight, statistics, pattern):
            return super().mask(weight, statistics, Unstructured(0.5))

    with pytest.raises(PatternError, match=r"'half', layer model.layers.0.*prunes 50.0% of the weights, expected 70%"):
        prune(llama, Half(), "70%", tokens, progress=False)


# --- which blocks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "blocks"), [("0:50%", {0, 1}), ("50%:", {2, 3}), (":1", {0}), ("1:3", {1, 2}), ("25%:3", {1, 2})]
)
def test_a_range_of_blocks_is_pruned(make_llama, tokens, given, blocks):
    model = make_llama(num_hidden_layers=4)
    report = prune(model, "wanda", "2:4", tokens, layers=given, progress=False)
    assert {int(layer.name.split(".")[2]) for layer in report.layers} == blocks
    assert {int(n.split(".")[2]) for n, w in weights_of(model).items() if (w == 0).any()} == blocks


@pytest.mark.parametrize("given", ["half", "1-3", "2:2", "9:", "%:2"])
def test_ranges_that_cannot_be_read_or_leave_nothing_are_refused(llama, tokens, given):
    with pytest.raises(ConfigError, match=r"^layers "):
        prune(llama, "wanda", "2:4", tokens, layers=given, progress=False)


# --- kept weights ---------------------------------------------------------------------------------------------------
def test_kept_weights_are_updated_kept_or_refitted(make_llama, tokens):
    dense = weights_of(make_llama())
    seen = {}
    for weights in ("update", "keep", "refit"):
        model = make_llama()
        report = prune(model, Doubling(), "2:4", tokens, weights=weights, inputs="dense", progress=False)
        assert report.weights == weights
        seen[weights] = weights_of(model)
    for name, weight in dense.items():
        kept = seen["keep"][name] != 0
        assert torch.equal(seen["keep"][name][kept], weight[kept])
        assert torch.equal(seen["update"][name], 2 * seen["keep"][name])
        assert torch.equal(seen["refit"][name] != 0, kept) and not torch.equal(seen["refit"][name], seen["keep"][name])


def test_refitted_layers_have_less_output_error_than_kept_ones(make_llama, tokens):
    errors = {
        weights: [x.relative_error for x in prune(make_llama(), "polish", "2:4", tokens, weights=weights).layers]
        for weights in ("keep", "refit")
    }
    first = slice(0, 3)  # the inputs of the first block's first layers are the same in both
    assert all(a < b for a, b in zip(errors["refit"][first], errors["keep"][first], strict=True))


def test_the_report_says_what_really_happened_to_the_weights(make_llama, tokens):
    assert prune(make_llama(), "wanda", "2:4", tokens, progress=False).weights == "keep"
    assert prune(make_llama(), "magnitude", "2:4", tokens, weights="refit", progress=False).error_form == "hessian"


def test_a_prior_never_changes_the_base(llama, tokens):
    before = weights_of(llama)
    model = get_peft_model(llama, nms.NMSparseConfig())
    report = nms.set_prior(model, Doubling(), calibration=tokens, progress=False)
    assert report.weights == "keep"
    model.unload()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(llama).items())


@pytest.mark.parametrize(("option", "value"), [("weights", "new"), ("inputs", "sparse")])
def test_unknown_options_are_refused(llama, tokens, option, value):
    with pytest.raises(ConfigError, match=f"^{option}='{value}'; expected one of "):
        prune(llama, "wanda", "2:4", tokens, progress=False, **{option: value})


# --- inputs, stages -------------------------------------------------------------------------------------------------
def runs_of_blocks(model: nn.Module) -> Counter:
    runs: Counter = Counter()
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: runs.update([index]))
    return runs


def test_dense_inputs_take_one_run_of_each_block_and_give_the_masks_of_the_dense_model(make_llama, tokens):
    model, dense = make_llama(), make_llama()
    runs = runs_of_blocks(model)
    prune(model, "wanda", "2:4", tokens, inputs="dense", progress=False)
    assert runs == {0: 2, 1: 1}  # block 0 once more while arguments are recorded
    seen: dict[str, torch.Tensor] = {}
    for name, target in find_weights(dense).items():
        target.module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].detach()))
    with torch.no_grad():
        dense(tokens)
    for name, weight in weights_of(dense).items():
        square = seen[name].flatten(0, 1).square().mean(0)
        score = (weight.abs() * square.sqrt()).unflatten(1, (-1, 4))
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(2).indices, True).flatten(1)
        assert torch.equal(weights_of(model)[name] != 0, kept), name


def test_inputs_of_a_later_stage_are_measured_with_the_earlier_one_pruned(make_llama, tokens):
    class Staged(Wanda):
        name = "staged"

        def __init__(self):
            self._seen = {}

        def stages(self, names, block):
            return [[name for name in names if "attn" in name], [name for name in names if "mlp" in name]]

        def choose_block(self, inputs):
            self._seen.update(inputs.statistics)
            yield from super().choose_block(inputs)

    staged, plain = Staged(), Staged()
    prune(make_llama(), staged, "2:4", tokens, progress=False)
    plain.stages = lambda names, block: [names]
    prune(make_llama(), plain, "2:4", tokens, progress=False)
    first, up = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"
    assert torch.equal(staged._seen[first].squared_norm, plain._seen[first].squared_norm)
    half_pruned = make_llama()
    prune(half_pruned, "wanda", "2:4", tokens, layers="0:1", dense_layers=["mlp"], progress=False)
    taken = []
    half_pruned.get_submodule(up).register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    with torch.no_grad():
        half_pruned(tokens)
    expected = taken[0].flatten(0, 1).square().mean(0)
    torch.testing.assert_close(staged._seen[up].squared_norm, expected)
    assert not torch.allclose(plain._seen[up].squared_norm, expected)


# --- resumed --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["update", "keep"])
def test_a_killed_run_goes_on_after_its_last_finished_block(make_llama, tokens, tmp_path, caplog, weights):
    folder, options = tmp_path / "unfinished", {"weights": weights, "progress": False}
    whole, model = make_llama(num_hidden_layers=3), make_llama(num_hidden_layers=3)
    expected = prune(whole, Doubling(), "2:4", tokens, **options)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="killed"):
        prune(model, Doubling("model.layers.2.mlp.up_proj"), "2:4", tokens, checkpoint_folder=folder, **options)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    resumed = Doubling()
    with caplog.at_level(logging.INFO, logger="hf_nmsparse"):
        report = prune(model, resumed, "2:4", tokens, checkpoint_folder=folder, **options)
    assert "2 blocks are finished" in caplog.text
    assert {name.split(".")[2] for name in resumed._asked} == {"2"}
    assert same(model, whole)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert [layer.relative_error for layer in report.layers] == [layer.relative_error for layer in expected.layers]
    assert all(torch.equal(codes.packed, expected.codes[name].packed) for name, codes in report.codes.items())


def test_the_folder_of_another_run_is_refused_and_left_alone(make_llama, tokens, tmp_path):
    prune(make_llama(), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for change, key in (
        ({"criterion": "polish"}, "criterion"),
        ({"pattern": "1:4"}, "pattern"),
        ({"calibration": tokens.flip(0)}, "calibration"),
        ({"dense_layers": ["down_proj"]}, "layers"),
        ({"weights": "refit"}, "weights"),
    ):
        options = {"criterion": "wanda", "pattern": "2:4", "calibration": tokens, **change}
        with pytest.raises(ConfigError, match=rf"is of another run: its {key} (is|are|differ)"):
            prune(make_llama(), **options, checkpoint_folder=tmp_path / "a", progress=False)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        prune(make_llama(), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "b", progress=False)


def test_a_run_with_other_masks_of_padding_or_another_dtype_is_another_run(make_llama, tokens, tmp_path):
    mask = torch.ones_like(tokens)
    prune(
        make_llama(), "wanda", "2:4", {"input_ids": tokens, "attention_mask": mask}, checkpoint_folder=tmp_path / "a"
    )
    shorter = mask.clone()
    shorter[0, -3:] = 0
    with pytest.raises(ConfigError, match="its calibration differ at number 0"):
        batch = {"input_ids": tokens, "attention_mask": shorter}
        prune(make_llama(), "wanda", "2:4", batch, checkpoint_folder=tmp_path / "a")
    with pytest.raises(ConfigError, match="its dtype differ"):
        batch = {"input_ids": tokens, "attention_mask": mask}
        prune(make_llama(torch.bfloat16), "wanda", "2:4", batch, checkpoint_folder=tmp_path / "a")
    model = make_llama()
    model.model.norm.weight.data[3] = 2
    with pytest.raises(ConfigError, match="its parameters is"):
        prune(model, "wanda", "2:4", {"input_ids": tokens, "attention_mask": mask}, checkpoint_folder=tmp_path / "a")


def test_the_report_of_a_resumed_run_is_in_the_order_of_the_model(make_llama, tokens, tmp_path):
    small = {"num_hidden_layers": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    reports = [
        prune(make_llama(**small), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)
        for _ in range(2)
    ]
    assert [layer.name for layer in reports[0].layers] == [layer.name for layer in reports[1].layers]


def test_other_weights_are_another_run(make_llama, tokens, tmp_path):
    prune(make_llama(), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)  # does not show in the inputs of the first block
    with pytest.raises(ConfigError, match="its parameters is"):
        prune(model, "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)


def test_a_damaged_block_is_named(make_llama, tokens, tmp_path):
    prune(make_llama(), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)
    block = next((tmp_path / "a").glob("*.safetensors"))
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(FormatError, match=rf"{block.name} is damaged .*; remove it"):
        prune(make_llama(), "wanda", "2:4", tokens, checkpoint_folder=tmp_path / "a", progress=False)


# --- offloaded ------------------------------------------------------------------------------------------------------
def offloaded(folder, tmp_path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    blocks = {f"transformer.h.{i}": "disk" for i in range(2)}
    rest = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    if config["model_type"] != "gpt2":
        blocks = {f"model.layers.{i}": "disk" for i in range(2)}
        rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={**blocks, **rest}, offload_folder=tmp_path / "offload"
    )


@pytest.mark.parametrize("weights", ["keep", "update"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_on_disk_is_pruned_as_in_memory(family, weights, tmp_path):
    dense, tokens = FAMILIES[family](), inputs_for(family)["input_ids"]
    dense.save_pretrained(tmp_path / "base")
    stored = {file: hashlib.sha256(file.read_bytes()).digest() for file in (tmp_path / "base").iterdir()}
    model = offloaded(tmp_path / "base", tmp_path)
    expected = prune(dense, Doubling(), "2:4", tokens, weights=weights, progress=False)
    folder = tmp_path / "unfinished" if weights == "update" else None
    report = prune(model, Doubling(), "2:4", tokens, weights=weights, checkpoint_folder=folder, progress=False)
    assert all(p.is_meta for name, p in model.named_parameters() if ".0." in name or ".1." in name)
    assert expected.codes.keys() == report.codes.keys() and len(report.codes)
    for name, codes in report.codes.items():
        assert torch.equal(codes.packed, expected.codes[name].packed)
        assert torch.equal(codes.base, expected.codes[name].base)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, dense(tokens).logits)
    model.save_pretrained(tmp_path / "pruned")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), dense)
    assert stored == {file: hashlib.sha256(file.read_bytes()).digest() for file in stored}


def test_each_block_is_loaded_a_few_times_whatever_the_number_of_batches(base_folder, tmp_path):
    model = offloaded(base_folder, tmp_path)
    loads: Counter = Counter()
    up = model.model.layers[1].mlp.up_proj
    original = up._hf_hook.weights_map

    class Counted(dict):
        def __getitem__(self, name):
            loads.update([name])
            return original[name]

    up._hf_hook.weights_map = Counted()
    tokens = torch.randint(0, 64, (64, 16))  # 8 batches
    prune(model, "wanda", "2:4", tokens, progress=False)
    assert loads["weight"] == 1


def test_a_failure_leaves_a_model_on_disk_as_it_was(base_folder, tmp_path, tokens, make_llama):
    model = offloaded(base_folder, tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        prune(model, Doubling("model.layers.1.mlp.up_proj"), "2:4", tokens, progress=False)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, make_llama()(tokens).logits)
    assert all(p.is_meta for p in model.model.layers.parameters())


def test_other_weights_on_disk_are_another_run(base_folder, make_llama, tmp_path, tokens):
    folder = tmp_path / "unfinished"
    prune(offloaded(base_folder, tmp_path), "wanda", "2:4", tokens, checkpoint_folder=folder, progress=False)
    other = make_llama()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj.*other weights"):
        prune(
            offloaded(tmp_path / "other", tmp_path), "wanda", "2:4", tokens, checkpoint_folder=folder, progress=False
        )


def test_a_model_without_weights_is_refused(make_llama, tokens):
    with pytest.raises(UnsupportedError, match=r"^model\.layers\.0\.self_attn\.q_proj: its weight is on the meta"):
        prune(make_llama().to("meta"), "magnitude", progress=False)


# --- masks as codes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_report_holds_the_masks_with_the_fingerprints_of_the_dense_weights(family):
    model, dense = FAMILIES[family](), FAMILIES[family]()
    report = prune(model, "wanda", "2:4", inputs_for(family)["input_ids"], progress=False)
    for name, target in find_weights(dense).items():
        codes, pruned = report.codes[target.weight_name], find_weights(model)[name].dense()
        rows = slice((target.expert or 0) * len(pruned), ((target.expert or 0) + 1) * len(pruned))
        unpacked = nms.ops.unpack_codes(codes.packed[rows], NMPattern("2:4"), pruned.shape[1])
        assert torch.equal(nms.ops.codes_to_mask(unpacked, NMPattern("2:4"), pruned.shape[1]), pruned != 0)
        assert torch.equal(codes.base, fingerprint(target.whole()))
        assert codes.shape == (len(codes.packed), pruned.shape[1]) and codes.fused_experts == (
            target.expert is not None
        )


def test_criteria_of_the_registry_are_known_by_name():
    assert {"magnitude", "wanda", "ria", "sparsegpt", "sparsellm", "polish"} <= set(nms.criteria.known_criteria())
    assert isinstance(get_criterion("polish"), Criterion)


# --- permuted channels ----------------------------------------------------------------------------------------------
def test_permuted_channels_keep_more_and_the_dense_model_is_the_same_function(make_llama, tokens):
    plain, model = make_llama(), make_llama()
    expected = prune(plain, "ria", "2:4", tokens, inputs="dense", progress=False)
    report = prune(model, "ria", "2:4", tokens, inputs="dense", permute_channels=True, progress=False)
    assert report.codes == {} and sorted(report.permuted) == sorted(
        f"model.layers.{block}.{layer}" for block in (0, 1) for layer in ("mlp.down_proj", "self_attn.o_proj")
    )
    errors, before = ({layer.name: layer.relative_error for layer in one.layers} for one in (report, expected))
    assert sum(errors[name] for name in report.permuted) < 0.95 * sum(before[name] for name in report.permuted)


def test_channels_are_back_in_place_after_a_failure(make_llama, tokens):
    model, dense = make_llama(), make_llama()
    with pytest.raises(RuntimeError, match="killed"):
        prune(model, Doubling("model.layers.1.mlp.up_proj"), "2:4", tokens, permute_channels=True, progress=False)
    assert same(model, dense)


def test_a_killed_run_with_permuted_channels_goes_on(make_llama, tokens, tmp_path):
    whole, model = make_llama(), make_llama()
    options = {"permute_channels": True, "progress": False}
    expected = prune(whole, Doubling(), "2:4", tokens, **options)
    with pytest.raises(RuntimeError, match="killed"):
        prune(
            model, Doubling("model.layers.1.mlp.up_proj"), "2:4", tokens, checkpoint_folder=tmp_path / "a", **options
        )
    report = prune(model, Doubling(), "2:4", tokens, checkpoint_folder=tmp_path / "a", **options)
    assert same(model, whole) and sorted(report.permuted) == sorted(expected.permuted)


def test_channels_of_frozen_offloaded_or_ungrouped_weights_are_not_permuted(llama, tokens, base_folder, tmp_path):
    with pytest.raises(ConfigError, match="60% has no groups"):
        prune(llama, "wanda", "60%", tokens, permute_channels=True, progress=False)
    with pytest.raises(UnsupportedError, match="is offloaded; permute_channels needs all weights in memory"):
        prune(offloaded(base_folder, tmp_path), "wanda", "2:4", tokens, permute_channels=True, progress=False)


# --- every criterion, at the edges ----------------------------------------------------------------------------------
EVERY = ["magnitude", "wanda", "ria", "sparsegpt", "sparsellm", "polish"]
CALIBRATED = EVERY[1:]


def finite_and_sparse(model: nn.Module, pattern: str = "2:4") -> bool:
    counts = [nms.ops.count_groups(weight, NMPattern(pattern)) for weight in weights_of(model).values()]
    finite = all(bool(weight.isfinite().all()) for weight in weights_of(model).values())
    return finite and all(count.over == 0 for count in counts)


@pytest.mark.parametrize("weights", ["update", "refit"])
@pytest.mark.parametrize("criterion", EVERY)
def test_one_token_is_enough(make_llama, criterion, weights):
    model = make_llama()
    report = prune(model, criterion, "2:4", torch.tensor([[5]]), weights=weights, progress=False)
    assert finite_and_sparse(model)
    assert report.tokens == (0 if criterion == "magnitude" and weights == "update" else 1)


@pytest.mark.parametrize("weights", ["update", "refit"])
@pytest.mark.parametrize("criterion", EVERY)
def test_channels_that_are_always_zero_do_no_harm(make_llama, tokens, criterion, weights):
    model = make_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:6] = 0  # a whole group, and half of the next one
            layer.mlp.up_proj.weight[3] = 0
    prune(model, criterion, "2:4", tokens, weights=weights, progress=False)
    assert finite_and_sparse(model)
    if criterion not in ("magnitude", "polish") and weights == "update":  # polish sets errors off against each other
        kept = model.model.layers[0].self_attn.q_proj.weight != 0
        assert bool((kept[:, 4:8].sum(1) == 2).all()) and bool(kept[:, 6:8].all())


@pytest.mark.parametrize("pattern", ["3:7", "2:5"])
@pytest.mark.parametrize("criterion", EVERY)
def test_a_width_that_is_no_multiple_of_the_group_keeps_what_the_tail_can(make_llama, tokens, criterion, pattern):
    model = make_llama()
    report = prune(model, criterion, pattern, tokens, progress=False)
    assert finite_and_sparse(model, pattern)
    for name, weight in weights_of(model).items():
        kept = int((weight != 0).sum())
        assert kept == len(weight) * NMPattern(pattern).kept_per_row(weight.shape[1]), name
    assert len(report.codes) == 14


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_calibration_that_is_missing_empty_or_not_finite_changes_nothing(make_llama, tokens, criterion):
    model, dense = make_llama(), make_llama()
    with pytest.raises(ConfigError, match="needs calibration data"):
        prune(model, criterion, progress=False)
    with pytest.raises(ConfigError):
        prune(model, criterion, "2:4", tokens[:0], progress=False)
    model.model.layers[1].mlp.act_fn = nn.Identity()
    model.model.layers[1].mlp.act_fn.forward = lambda x: x * float("nan")
    with pytest.raises(nms.errors.NMSparseError, match=r"model\.layers\.1\.mlp\.down_proj"):
        prune(model, criterion, "2:4", tokens, progress=False)
    assert same(model, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", EVERY)
def test_half_precision_models_keep_their_dtype(make_llama, tokens, criterion, dtype):
    model = make_llama(dtype)
    prune(model, criterion, "2:4", tokens, progress=False)
    assert finite_and_sparse(model) and {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("criterion", ["sparsegpt", "sparsellm"])
def test_the_mask_alone_leaves_kept_weights_bit_equal(make_llama, tokens, criterion):
    model, dense = make_llama(), weights_of(make_llama())
    prune(model, criterion, "2:4", tokens, weights="keep", progress=False)
    for name, weight in weights_of(model).items():
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept]) and int(kept.sum()) == kept.numel() // 2


# --- several stacks, routers, starts --------------------------------------------------------------------------------
def test_with_dense_inputs_a_decoder_sees_the_dense_encoder():
    def error_of(**options) -> float:
        report = prune(FAMILIES["t5"](), "wanda", "2:4", inputs_for("t5"), progress=False, **options)
        errors = {layer.name: layer.relative_error for layer in report.layers}
        return errors["decoder.block.0.layer.1.EncDecAttention.k"]

    assert error_of(inputs="dense") == error_of(inputs="dense", dense_layers=["encoder"]) != error_of()


def test_linear_parts_of_routers_stay_dense(make_llama, tokens):
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4)

    model = make_llama()
    for name, module in (
        ("router", nn.Sequential(nn.Linear(32, 4))),
        ("choose", Router()),
        ("router_gate", nn.Linear(8, 8)),
    ):
        model.model.layers[0].mlp.add_module(name, module)
    assert len(find_weights(model)) == 14
    assert set(nms.adapter.mask_layers(get_peft_model(model, nms.NMSparseConfig()))) == {
        f"model.layers.{block}.{layer}"
        for block in (0, 1)
        for layer in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }


def test_layers_that_share_a_weight_are_named(llama, caplog):
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    assert len(find_weights(llama)) == 12
    assert "model.layers.0.mlp.up_proj (2 such) shares its weight" in caplog.text


@pytest.mark.parametrize("start", ["sparsellm", "sparsegpt", "ria"])
def test_polish_starts_from_what_the_criterion_chooses_for_the_block(make_llama, tokens, start):
    started, polished = make_llama(), make_llama()
    before = prune(started, start, "1:4", tokens, weights="keep", inputs="dense", progress=False)
    after = prune(polished, Polish(start), "1:4", tokens, inputs="dense", progress=False)
    if start != "ria":  # whose errors are those of the diagonal
        assert all(b.relative_error <= a.relative_error for a, b in zip(before.layers, after.layers, strict=True))
    masks = {name: weight != 0 for name, weight in weights_of(started).items()}
    expected = {
        name: polish_mask(weight, masks[name], hessian, NMPattern("1:4"), objective=hessian_power(hessian, POWER))
        for name, (weight, hessian) in dense_statistics(make_llama(), tokens).items()
    }
    same_masks = [torch.equal(weights_of(polished)[name] != 0, mask) for name, mask in expected.items()]
    assert all(same_masks)


def dense_statistics(model: nn.Module, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    class Seeing(Wanda):
        name, needs = "seeing", "hessian"

        def __init__(self) -> None:
            self._seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def choose_block(self, inputs):
            for name, weight in inputs.weights.items():
                self._seen[name] = (weight.clone(), inputs.statistics[name].hessian)
            yield from super().choose_block(inputs)

    seeing = Seeing()
    prune(model, seeing, "1:4", tokens, inputs="dense", progress=False)
    return seeing._seen


def test_what_experts_share_is_looked_at_once(monkeypatch):
    seen = Counter()
    monkeypatch.setattr(
        "hf_nmsparse.criteria.engine.fingerprint", lambda weight: seen.update([weight.shape]) or fingerprint(weight)
    )
    prune(FAMILIES["mixtral"](), "magnitude", progress=False)
    assert sum(seen.values()) == 2 * (4 + 2)  # q, k, v, o and two parameters of experts a block
