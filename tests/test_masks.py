# SPDX-License-Identifier: Apache-2.0
"""Published masks: writing, reading back through every door, and refusing what is damaged or foreign."""

import json
import logging
import re

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, FormatError
from hf_nmsparse.fingerprint import digest, fingerprint

FILE = "adapter_model.safetensors"
LAYER = "model.layers.1.mlp.down_proj"
KEY = f"base_model.model.{LAYER}"


@pytest.fixture
def published(base_folder, tmp_path, tokens):
    """(folder of a published mask, output of the model it came from)."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, NMSparseConfig(init_weights=False, seed=5)).eval()
    folder = nms.save_mask(model, tmp_path / "mask")
    return folder, model(tokens).logits


def load_base(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder)


def rewrite(folder, change):
    """Apply `change` to the tensors of a mask file."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def through_load_mask(base_folder, folder):
    return nms.load_mask(load_base(base_folder), folder)


def through_peft(base_folder, folder):
    return PeftModel.from_pretrained(load_base(base_folder), folder)


def through_peft_low_memory(base_folder, folder):
    return PeftModel.from_pretrained(load_base(base_folder), folder, low_cpu_mem_usage=True)


def through_auto_peft(base_folder, folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def through_load_adapter(base_folder, folder):
    model = load_base(base_folder)
    model.load_adapter(folder)
    return model


def through_auto_model(base_folder, folder):
    return AutoModelForCausalLM.from_pretrained(folder)


DOORS = [
    through_load_mask,
    through_peft,
    through_peft_low_memory,
    through_auto_peft,
    through_load_adapter,
    through_auto_model,
]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_output(published, base_folder, tokens, door):
    folder, expected = published
    assert torch.equal(door(base_folder, folder)(tokens).logits, expected)


def test_the_folder_holds_codes_config_and_card(published):
    folder, _ = published
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", FILE, "results.json"]
    tensors = load_file(folder / FILE)
    assert len(tensors) == 3 * 14 and {t.dtype for t in tensors.values()} == {torch.uint8}
    codes = tensors[f"{KEY}.nmsparse_packed"]
    assert codes.shape == (32, 4)  # 48 inputs: 12 groups, three to a byte
    assert torch.equal(tensors[f"{KEY}.nmsparse_digest"], digest(codes))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["mask_format"] == "packed" and len(config["target_modules"]) == 14
    assert "import hf_nmsparse" in (folder / "README.md").read_text()


def test_publishing_leaves_the_model_trainable_and_is_repeatable(llama, tmp_path):
    model = get_peft_model(llama, NMSparseConfig())
    nms.save_mask(model, tmp_path / "mask")
    first = (tmp_path / "mask" / FILE).read_bytes()
    nms.save_mask(model, tmp_path / "mask")
    assert (tmp_path / "mask" / FILE).read_bytes() == first
    assert model.peft_config["default"].mask_format == "logits"
    assert any(p.requires_grad for p in model.parameters())


def test_the_size_is_two_thirds_of_a_bit_a_weight(tmp_path, make_llama):
    model = get_peft_model(make_llama(hidden_size=192, intermediate_size=384), NMSparseConfig())
    nms.save_mask(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    codes = sum(t.numel() for n, t in tensors.items() if n.endswith("_packed"))
    weights = sum(layer.weight.numel() for layer in mask_layers(model).values())
    assert codes * 8 / weights == pytest.approx(2 / 3)


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:3", "2:8"])
def test_other_patterns_publish_and_load(base_folder, tmp_path, tokens, pattern):
    model = get_peft_model(load_base(base_folder), NMSparseConfig(pattern=pattern)).eval()
    nms.save_mask(model, tmp_path)
    assert torch.equal(nms.load_mask(load_base(base_folder), tmp_path)(tokens).logits, model(tokens).logits)


def test_several_published_masks_switch_on_one_base(base_folder, tmp_path, tokens):
    outputs = {}
    for name in ("law", "code"):
        model = get_peft_model(load_base(base_folder), NMSparseConfig(init_weights=False, seed=len(name))).eval()
        nms.save_mask(model, tmp_path / "masks" / name)
        outputs[name] = model(tokens).logits
    model = nms.load_mask(load_base(base_folder), tmp_path / "masks", task="law", adapter_name="law")
    model = nms.load_mask(model, tmp_path / "masks", task="code", adapter_name="code")
    for name, expected in outputs.items():
        model.set_adapter(name)
        assert torch.equal(model(tokens).logits, expected)
    with pytest.raises(ConfigError, match="already has an adapter 'law'"):
        nms.load_mask(model, tmp_path / "masks", task="law", adapter_name="law")


def test_a_published_mask_cannot_be_trained_and_says_so(published, base_folder):
    folder, _ = published
    with pytest.raises(ConfigError, match="contains codes, not logits"):
        PeftModel.from_pretrained(load_base(base_folder), folder, is_trainable=True)


def test_a_training_checkpoint_is_no_published_mask(llama, base_folder, tmp_path):
    get_peft_model(llama, NMSparseConfig()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"training checkpoint \(logits\), not a published mask"):
        nms.load_mask(load_base(base_folder), tmp_path)


def test_logits_that_are_not_finite_are_not_published(llama, tmp_path):
    model = get_peft_model(llama, NMSparseConfig())
    with torch.no_grad():
        mask_layers(model)[LAYER].nmsparse_logits["default"].weight[0, 0, :2] = float("nan")
    with pytest.raises(ConfigError, match=f"{re.escape(LAYER)}: 2 values of nmsparse_logits"):
        nms.save_mask(model, tmp_path / "mask")
    assert list(tmp_path.iterdir()) == []


# --- the wrong base -------------------------------------------------------------------------------------------------
@pytest.fixture
def stranger(make_llama, tmp_path):
    """A base of the same shapes with one other weight matrix, saved."""
    model = make_llama()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(1.1)
    model.save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def test_a_mask_loads_without_unpacking_its_codes(published, base_folder, tokens, monkeypatch):
    """So the memory beside the model is that of the packed codes."""
    folder, expected = published
    unpacked = []
    for name in ("unpack_codes", "codes_to_mask"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, real=real, **kwargs: unpacked.append(args) or real(*args, **kwargs)
        )
    model = nms.load_mask(load_base(base_folder), folder)
    assert not unpacked
    assert torch.equal(model(tokens).logits, expected) and unpacked


@pytest.mark.parametrize("door", [through_load_mask, through_peft, through_peft_low_memory, through_load_adapter])
def test_the_wrong_base_is_refused_before_any_output(published, stranger, tokens, door):
    folder, _ = published
    with pytest.raises(BaseModelMismatchError, match=re.escape(LAYER)):
        door(stranger, folder)(tokens)


def test_the_refused_adapter_can_be_deleted(published, stranger, tokens):
    folder, _ = published
    model = through_load_adapter(stranger, folder)
    with pytest.raises(BaseModelMismatchError):
        model(tokens)
    model.delete_adapter("default")
    assert torch.equal(model(tokens).logits, load_base(stranger)(tokens).logits)


def test_load_mask_leaves_a_refusing_model_untouched(published, stranger, tokens):
    folder, _ = published
    model = load_base(stranger)
    before, classes = model(tokens).logits, [type(m) for m in model.modules()]
    with pytest.raises(BaseModelMismatchError):
        nms.load_mask(model, folder)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(tokens).logits, before)


def test_a_mismatch_can_be_overridden_and_is_logged(published, stranger, tokens, caplog):
    folder, _ = published
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        model = nms.load_mask(load_base(stranger), folder, allow_base_mismatch=True)
    assert "allow_base_mismatch=True" in caplog.text
    assert model(tokens).logits.isfinite().all()


def test_the_same_base_in_bfloat16_is_accepted(make_llama, tmp_path, tokens):
    model = get_peft_model(make_llama(torch.bfloat16), NMSparseConfig())
    nms.save_mask(model, tmp_path / "mask")
    base = make_llama(torch.bfloat16)
    assert nms.load_mask(base.float(), tmp_path / "mask")(tokens).logits.isfinite().all()


def test_another_architecture_is_refused_with_names(published, make_llama):
    folder, _ = published
    with pytest.raises(FormatError, match=r"7 layers that the model lacks.*layers\.1"):
        nms.load_mask(make_llama(num_hidden_layers=1), folder)
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.(down|gate|up)_proj"):
        nms.load_mask(make_llama(intermediate_size=64), folder)


# --- damage ---------------------------------------------------------------------------------------------------------
def flip(tensors):
    tensors[f"{KEY}.nmsparse_packed"][3, 1] ^= 1


def impossible_code(tensors):
    tensors[f"{KEY}.nmsparse_packed"][3, 1] = 240
    tensors[f"{KEY}.nmsparse_digest"] = digest(tensors[f"{KEY}.nmsparse_packed"])


def narrow(tensors):
    tensors[f"{KEY}.nmsparse_packed"] = tensors[f"{KEY}.nmsparse_packed"][:, :3].contiguous()
    tensors[f"{KEY}.nmsparse_digest"] = digest(tensors[f"{KEY}.nmsparse_packed"])


def missing_layer(tensors):
    for part in ("packed", "digest", "base"):
        del tensors[f"{KEY}.nmsparse_{part}"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", [flip, impossible_code, narrow, missing_layer])
def test_damaged_masks_are_refused_by_name_before_any_output(published, base_folder, tokens, door, damage):
    folder, _ = published
    rewrite(folder, damage)
    # transformers words a wrong shape itself and names the layer in its report above the error.
    with pytest.raises((FormatError, RuntimeError), match=r"layers\.1\.mlp\.down_proj|ignore_mismatched_sizes"):
        door(base_folder, folder)(tokens)


def test_the_config_and_the_file_must_name_the_same_layers(published, base_folder):
    folder, _ = published
    rewrite(folder, missing_layer)
    with pytest.raises(FormatError, match=re.escape(LAYER)):
        nms.load_mask(load_base(base_folder), folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(published, base_folder, keep):
    folder, _ = published
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:keep])
    with pytest.raises(FormatError, match="damaged or cut short"):
        nms.load_mask(load_base(base_folder), folder)


def test_every_flipped_byte_of_a_mask_file_is_refused_or_harmless(make_llama, tmp_path):
    base = make_llama(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1
    )
    model = get_peft_model(base, NMSparseConfig(target_modules=["up_proj"]))
    nms.save_mask(model, tmp_path)
    expected = nms.read_mask(tmp_path).layers["model.layers.0.mlp.up_proj"]
    data = (tmp_path / FILE).read_bytes()
    refused = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x11
        (tmp_path / FILE).write_bytes(damaged)
        try:
            found = nms.read_mask(tmp_path).layers["model.layers.0.mlp.up_proj"]
        except FormatError:
            refused += 1
            continue
        # Only the free text of the header and the base's fingerprint may change without notice here; the latter is
        # compared with the model when the mask is put on.
        assert torch.equal(found.packed, expected.packed)
    assert refused > len(data) * 0.8


def test_a_pickle_is_not_read(published, base_folder, tmp_path):
    folder, _ = published
    (folder / FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(FormatError, match=f"holds no {FILE}"):
        nms.load_mask(load_base(base_folder), folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "peft_type"),
        ('{"peft_type": "LORA"}', "peft_type"),
        ('{"peft_type": "NMSPARSE", "pattern": "9:4"}', "9:4"),
        ('{"peft_type": "NMSPARSE", "format_version": 7, "mask_format": "packed"}', "upgrade"),
        ("[" * 20000, "not JSON|peft_type"),
        (" " * (1 << 21), "over the limit"),
    ],
)
def test_bad_configs_are_refused(published, base_folder, text, message):
    folder, _ = published
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        nms.load_mask(load_base(base_folder), folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_regular_expression_in_the_config_is_never_run(published, base_folder, tokens, door, field):
    folder, _ = published
    path = folder / "adapter_config.json"
    hostile = {field: "^(([a-z_.0-9])+)+!$", "layers_to_transform": None if field == "target_modules" else [0, 1]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **hostile}))
    with pytest.raises(FormatError, match=field):
        door(base_folder, folder)(tokens)


# --- deploy and verify ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", ["peft", "injected"])
def test_compress_takes_the_mask_of_the_adapter(make_llama, tokens, dtype, wrapped):
    model = make_llama(dtype)
    config = NMSparseConfig(init_weights=False)
    if wrapped == "peft":
        model = get_peft_model(model, config).eval()
    else:
        model.add_adapter(config)
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    with torch.no_grad():  # a kept weight that is zero keeps its place: the mask does not come from the zeros
        for layer in mask_layers(model).values():
            layer.get_base_layer().weight[0] = 0
    expected = model(tokens).logits
    packed = nms.compress(model)
    assert torch.equal(packed(tokens).logits, expected)
    for name, mask in masks.items():
        module = packed.get_submodule(name)
        assert isinstance(module, nms.SparseLinear24)
        columns = ops.columns_of_24(module.weight_idx)
        assert torch.equal(torch.zeros_like(mask).scatter_(1, columns, True), mask)
    assert not mask_layers(packed)
    plain = nms.decompress(packed)
    assert torch.equal(plain(tokens).logits, expected)


def test_compress_refuses_patterns_outside_2_4_and_leaves_the_model(make_llama, tokens):
    model = get_peft_model(make_llama(), NMSparseConfig(pattern="3:4")).eval()
    before = model(tokens).logits
    with pytest.raises(TypeError, match="keeps more than 2 of 4"):
        nms.compress(model)
    assert torch.equal(model(tokens).logits, before)


def test_compress_refuses_a_stacked_adapter(make_llama):
    from peft import LoraConfig

    model = make_llama()
    model.add_adapter(NMSparseConfig(), "mask")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    with pytest.raises(TypeError, match="adapter as well"):
        nms.compress(model)


def test_verify_tells_masks_models_and_packed_models_apart(published, base_folder, make_llama, tmp_path):
    folder, _ = published
    report = nms.verify(folder)
    assert (report.kind, report.pattern, len(report.layers), report.ok) == ("mask", "2:4", 14, True)
    model = nms.load_mask(load_base(base_folder), folder)
    assert nms.verify(model).kind == "model with mask adapters" and nms.verify(model).ok
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for target in (merged, tmp_path / "merged"):
        report = nms.verify(target)
        assert (report.kind, len(report.layers), report.over, report.under) == ("masked model", 14, 0, 0)
        assert "lm_head" in report.dense_layers
    packed = nms.compress(merged)
    packed.save_pretrained(tmp_path / "packed")
    for target in (packed, tmp_path / "packed"):
        report = nms.verify(target)
        assert (report.kind, len(report.layers), report.ok) == ("packed model", 14, True)
    assert not nms.verify(make_llama()).ok


def test_verify_counts_too_many_and_too_few_separately(make_llama):
    model = make_llama()
    nms.prune(model, "magnitude", progress=False)
    with torch.no_grad():
        weight = model.get_submodule(LAYER).weight
        weight[0, :4] = 1.0
        weight[1, :8] = 0.0
    report = nms.verify(model)
    assert (report.over, report.under, report.ok) == (1, 2, False)


def test_verify_names_what_is_no_model(tmp_path):
    with pytest.raises(FormatError, match="no mask and no model"):
        nms.verify(tmp_path)


# --- whole or not at all --------------------------------------------------------------------------------------------
def test_what_a_published_mask_cannot_hold_is_not_dropped_silently(llama, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="modules_to_save"):
        nms.save_mask(model, tmp_path / "mask")
    assert not (tmp_path / "mask").exists()


def test_a_refused_injection_leaves_the_model_as_it_was(make_llama, tokens):
    model = make_llama(tie_word_embeddings=True)
    before, classes = model(tokens).logits, [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="lm_head"):
        get_peft_model(model, NMSparseConfig(target_modules=["q_proj", "lm_head"]))
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(tokens).logits, before)


def test_merging_onto_the_wrong_base_changes_no_layer(published, stranger, tokens):
    folder, _ = published
    model = through_peft(stranger, folder)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(BaseModelMismatchError):
            merge()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, load_base(stranger)(tokens).logits)


def test_a_mask_saved_again_by_peft_reads_back(base_folder, tmp_path, make_llama, tokens):
    base = make_llama(num_hidden_layers=4)  # PEFT shortens lists of twenty and more targets
    model = get_peft_model(base, NMSparseConfig(init_weights=False)).eval()
    nms.save_mask(model, tmp_path / "mask")
    loaded = nms.load_mask(make_llama(num_hidden_layers=4), tmp_path / "mask")
    loaded.save_pretrained(tmp_path / "again")
    again = nms.load_mask(make_llama(num_hidden_layers=4), tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_logits_that_are_not_finite_are_not_packed(llama):
    model = get_peft_model(llama, NMSparseConfig())
    with torch.no_grad():
        mask_layers(model)[LAYER].nmsparse_logits["default"].weight[:] = float("nan")
    with pytest.raises(ConfigError, match=re.escape(LAYER)):
        nms.compress(model)
    assert mask_layers(model)


def test_a_float16_base_is_told_what_to_do(make_llama, tmp_path):
    base = make_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1e-4)  # float16 loses bits of such weights
    nms.save_mask(get_peft_model(base, NMSparseConfig()), tmp_path)
    half = make_llama()
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(1e-4)
    with pytest.raises(BaseModelMismatchError, match="float16, which rounds differently"):
        nms.load_mask(half.half(), tmp_path)


@pytest.mark.parametrize(
    "change", [{"prior_strength": None}, {"temperature": [1, None]}, {"modules_to_save": ["lm_head"]}]
)
def test_configs_with_values_of_another_kind_are_refused(published, base_folder, change):
    folder, _ = published
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((FormatError, ConfigError), match=next(iter(change))):
        nms.load_mask(load_base(base_folder), folder)


# --- masks of one-shot pruning ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "pattern"),
    [("llama", "2:4"), ("llama", "2:3"), ("gpt2", "2:4"), ("mixtral", "2:4"), ("mixtral", "1:4")],
)
def test_the_mask_of_a_report_on_the_base_is_the_pruned_model(tmp_path, family, pattern):
    model, tokens = FAMILIES[family](), inputs_for(family)["input_ids"]
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    report = nms.prune(model, "wanda", pattern, calibration=tokens, progress=False)
    folder = nms.save_mask(model, tmp_path / "mask", report=report)
    expected = model(tokens).logits
    for door in (through_load_mask, through_peft, through_auto_peft, through_load_adapter):
        assert torch.equal(door(tmp_path / "base", folder)(tokens).logits, expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["prior"] == "wanda"
    experts = [name for name, codes in report.codes.items() if codes.fused_experts]
    assert bool(experts) == (family == "mixtral") and (config["target_parameters"] or []) == experts
    assert set(config["target_modules"]) == set(report.codes) - set(experts)
    assert ("Fused experts" in (folder / "README.md").read_text()) == bool(experts)
    if pattern == "2:4":
        assert nms.verify(folder).ok
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=nms.PackedConfig(mask=folder)
        )
        assert torch.equal(nms.decompress(packed)(tokens).logits, expected)


def test_the_mask_of_a_report_belongs_to_the_dense_weights_though_kept_ones_got_new_values(
    base_folder, tmp_path, tokens
):
    base = load_base(base_folder)
    model = load_base(base_folder)
    report = nms.prune(model, "sparsegpt", calibration=tokens, progress=False)
    folder = nms.save_mask(nms.compress(model), tmp_path / "mask", report=report)  # packed by now
    masked = nms.load_mask(load_base(base_folder), folder).merge_and_unload()
    for name in report.codes:
        dense, kept = base.get_submodule(name).weight, masked.get_submodule(name).weight != 0
        assert torch.equal(masked.get_submodule(name).weight, dense * kept)
        assert torch.equal(report.codes[name].base, fingerprint(dense))


def test_a_report_without_codes_is_no_mask(llama, tmp_path, tokens):
    report = nms.prune(llama, "magnitude", "50%", progress=False)
    with pytest.raises(ConfigError, match="holds no mask to publish: 50% has no groups"):
        nms.save_mask(llama, tmp_path / "mask", report=report)
    model = get_peft_model(llama, NMSparseConfig())
    with pytest.raises(ConfigError, match="report= is for a plain pruned model"):
        nms.save_mask(model, tmp_path / "mask", report=report)
    assert not (tmp_path / "mask").exists()
