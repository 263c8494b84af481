# SPDX-License-Identifier: Apache-2.0
"""Nothing half done, nothing hidden: refusals in the middle of merging, packing and adding, and states in between."""

import logging

import pytest
import torch
import transformers
from families import FAMILIES, inputs_for
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.criteria import find_weights
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, UnsupportedError


def masked(model: nn.Module, **config):
    return get_peft_model(model, NMSparseConfig(init_weights=False, **config)).eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    equal = (torch.allclose(now[name], value, rtol=0, atol=0, equal_nan=True) for name, value in state.items())
    return now.keys() == state.keys() and all(equal)


# --- packing ----------------------------------------------------------------------------------------------------------
def test_a_refused_compress_leaves_adapter_and_base(make_llama, tokens):
    model = masked(make_llama(hidden_size=36, intermediate_size=44, num_attention_heads=2))
    before, expected = state_of(model), model(tokens).logits
    with pytest.raises(UnsupportedError, match="no multiple of 8"):
        nms.compress(model)
    assert same(model, before) and torch.equal(model(tokens).logits, expected)


def test_slorb_blocks_that_differ_from_packed_ones_are_refused_before_anything(make_llama, tokens):
    half = nms.compress(masked(make_llama(), slorb_block=8, layers_to_transform=[0]))
    model = masked(half, slorb_block=4, layers_to_transform=[1], target_modules=["up_proj", "down_proj"])
    before, expected = state_of(model), model(tokens).logits
    with pytest.raises(UnsupportedError, match="blocks of 4, 8"):
        nms.compress(model)
    assert same(model, before) and torch.equal(model(tokens).logits, expected)


def test_compress_takes_the_memory_mode(make_llama):
    assert nms.compress(masked(make_llama()), memory="low").model.layers[0].mlp.up_proj.memory == "low"


# --- merging ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_broken_inactive_adapter_is_found_before_the_first_layer_is_merged(make_llama, merge):
    model = masked(make_llama())
    model.add_adapter("broken", NMSparseConfig(init_weights=False, seed=1))
    with torch.no_grad():
        list(mask_layers(model).values())[-1].nmsparse_logits["broken"].weight[0, 0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        getattr(model, merge)(adapter_names=["broken"])
    assert same(model, before) and not any(layer.merged for layer in mask_layers(model).values())


def test_safe_merge_finds_an_overflow_before_the_first_layer_is_merged(make_llama):
    model = masked(make_llama(torch.float16), delta_rank=1)
    with torch.no_grad():
        last = list(mask_layers(model).values())[-1]
        last.nmsparse_delta_a["default"].weight.fill_(1e3)
        last.nmsparse_delta_b["default"].weight.fill_(1e3)
    before = state_of(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert same(model, before)


def test_a_model_cast_while_merged_unmerges_in_the_new_dtype(make_llama, tokens):
    model = masked(make_llama())
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    expected = make_llama().to(torch.bfloat16).model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, expected)
    assert model(tokens).logits.isfinite().all()


# --- adding -------------------------------------------------------------------------------------------------------------
def test_an_adapter_added_over_a_merged_one_starts_from_the_base(make_llama, tokens):
    alone = get_peft_model(make_llama(), NMSparseConfig(slorb_block=8)).eval()
    model = masked(make_llama())
    model.merge_adapter()
    model.add_adapter("later", NMSparseConfig(slorb_block=8))
    model.unmerge_adapter()
    model.set_adapter("later")
    assert torch.equal(model(tokens).logits, alone(tokens).logits)


def test_a_mask_is_not_put_on_merged_weights(make_llama, tmp_path):
    nms.save_mask(masked(make_llama()), tmp_path)
    model = masked(make_llama(), seed=3)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge it first"):
        nms.load_mask(model, tmp_path, adapter_name="other")


def test_allowing_one_mask_another_base_allows_no_other_mask(make_llama, tokens, tmp_path):
    stranger = make_llama()
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(1.5)
    nms.save_mask(masked(stranger), tmp_path)
    model = nms.load_mask(make_llama(), tmp_path, adapter_name="allowed", allow_base_mismatch=True)
    model(tokens)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    with pytest.raises(BaseModelMismatchError):
        model(tokens)
    model.delete_adapter("allowed")
    model.load_adapter(tmp_path, "allowed")
    model.set_adapter("allowed")
    with pytest.raises(BaseModelMismatchError):
        model(tokens)


def test_a_mask_loaded_in_inference_mode_works(make_llama, tokens, tmp_path):
    nms.save_mask(masked(make_llama()), tmp_path)
    expected = nms.load_mask(make_llama(), tmp_path)(tokens).logits
    with torch.inference_mode():
        assert torch.equal(nms.load_mask(make_llama(), tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_no_target_parameters(make_llama, tied):
    with pytest.raises(UnsupportedError, match="embedding"):
        masked(make_llama(tie_word_embeddings=tied), target_parameters=["embed_tokens.weight"])


def test_experts_that_share_their_weight_are_refused():
    model = FAMILIES["mixtral"]()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts\.down_proj shares its weight"):
        masked(model)


def test_logits_that_cancel_out_are_no_mask(make_llama):
    model = masked(make_llama())
    model.add_adapter("same", NMSparseConfig(init_weights=False))
    with pytest.raises(ConfigError, match="cancel out"):
        model.add_weighted_adapter(["default", "same"], [1.0, -1.0], "none")
    assert "none" not in model.peft_config


# --- one rule -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapter_and_prune_take_the_same_layers(family):
    names = (name.rpartition(".") for name in find_weights(FAMILIES[family]()))
    pruned = {head if tail.isdigit() else f"{head}.{tail}" for head, _, tail in names}  # experts are counted
    assert set(mask_layers(get_peft_model(FAMILIES[family](), NMSparseConfig()))) == pruned


def test_gates_of_shared_experts_stay_dense():
    config = transformers.Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    assert any("shared_expert_gate" in name for name, _ in model.named_modules())
    assert not [name for name in find_weights(model) if "shared_expert_gate" in name]
    assert not [name for name in mask_layers(get_peft_model(model, NMSparseConfig())) if "shared_expert_gate" in name]


# --- checking -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("packed", [False, True])
def test_verify_counts_experts_in_memory_and_on_disk(family, packed, tmp_path):
    if family == "gpt_oss":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
        plain = transformers.GptOssForCausalLM(transformers.GptOssConfig(vocab_size=64, **sizes, **heads))
    else:
        plain = FAMILIES[family]()
    model = masked(plain)
    model = nms.compress(model) if packed else model.merge_and_unload()
    model.save_pretrained(tmp_path / "sound")
    assert nms.verify(model).ok and nms.verify(tmp_path / "sound").ok
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts.down_proj
        experts[0].fill_(1.0)  # of four experts, so that the layer is no dense one
    model.save_pretrained(tmp_path / "broken")
    assert not nms.verify(model).ok
    report = nms.verify(tmp_path / "broken")
    # Where experts are stored one by one, a whole one that is dense counts as a layer left dense.
    assert not report.ok or any("experts" in name for name in report.dense_layers)


# --- priors and training ------------------------------------------------------------------------------------------------
def test_a_new_prior_renews_a_trained_projection(make_llama, tokens):
    model = get_peft_model(make_llama(), NMSparseConfig(slorb_block=8, slorb_train_projection=True)).eval()
    expected = model(tokens).logits
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    with torch.no_grad():
        for layer in mask_layers(model).values():
            layer.nmsparse_slorb_projection["default"].weight.mul_(3.0)
    nms.set_prior(model, masks)
    assert torch.equal(model(tokens).logits, expected)


def test_terms_of_a_published_prior_are_not_dropped_silently(make_llama, tmp_path, caplog):
    nms.save_mask(masked(make_llama(), delta_rank=2), tmp_path)
    model = get_peft_model(make_llama(), NMSparseConfig(prior=None))
    with caplog.at_level(logging.WARNING):
        nms.set_prior(model, tmp_path)
    assert "nmsparse_delta_a" in caplog.text


def arguments(folder):
    return TrainingArguments(str(folder), max_steps=2, report_to="none", save_strategy="no", use_cpu=True)


@pytest.mark.parametrize("trainer", ["ours", "stock"])
def test_logits_in_bfloat16_are_trained_in_float32_by_both_trainers(make_llama, tokens, tmp_path, trainer):
    model = get_peft_model(make_llama(), NMSparseConfig())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if trainer == "ours":
        nms.NMSparseTrainer(model, arguments(tmp_path), train_dataset=TokenWindows(tokens))
    else:
        callbacks = [nms.MaskScheduleCallback()]
        Trainer(model, arguments(tmp_path), train_dataset=TokenWindows(tokens), callbacks=callbacks)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".nmsparse_logits." in name)


def test_terms_train_beside_a_mask_that_is_kept(make_llama, tokens, tmp_path):
    model = get_peft_model(make_llama(), NMSparseConfig(low_rank=2))
    for name, parameter in model.named_parameters():
        if ".nmsparse_logits." in name:
            parameter.requires_grad_(False)
    before = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    nms.NMSparseTrainer(model, arguments(tmp_path), train_dataset=TokenWindows(tokens)).train()
    for name, layer in mask_layers(model).items():
        assert torch.equal(layer.hard_mask("default"), before[name])
        assert layer.nmsparse_low_rank_b["default"].weight.any()


def test_a_flipped_expert_code_is_refused(tmp_path):
    nms.save_mask(masked(FAMILIES["mixtral"]()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("experts.base_layer.nmsparse_packed"))
    tensors[key][0, 0] ^= 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="digest"):
        nms.load_mask(FAMILIES["mixtral"](), tmp_path)(**inputs_for("mixtral"))
