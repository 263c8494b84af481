# SPDX-License-Identifier: Apache-2.0
"""A plan made from shapes equals what the real thing weighs."""

import copy
import itertools
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.packed import packed_sizes
from hf_nmsparse.training.plan import inside_24


def logits_bytes(model) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if ".nmsparse_logits." in name)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_logits_are_those_of_the_adapter_and_the_mask_file_is_as_large(make_llama, tmp_path, pattern):
    config = NMSparseConfig(pattern=pattern)
    plan = nms.plan(make_llama(), config)
    model = get_peft_model(make_llama(), config)
    assert {layer.name for layer in plan.layers} == set(mask_layers(model))
    assert plan.logits_bytes == logits_bytes(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.trainable, plan.gradient_bytes, plan.optimizer_bytes) == (trainable, 4 * trainable, 8 * trainable)
    nms.save_mask(model, tmp_path)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert abs(plan.mask_file_bytes - written) <= 0.02 * written
    assert plan.mask_bits_per_weight == pytest.approx(8 * written / plan.pruned_weights, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_are_those_of_the_packed_model(make_llama, dtype):
    plan = nms.plan(make_llama(dtype), NMSparseConfig())
    model = nms.compress(get_peft_model(make_llama(dtype), NMSparseConfig()))
    sizes = packed_sizes(model)
    assert (plan.packed_bytes, plan.dense_bytes) == (sizes.packed, sizes.dense)
    assert plan.packed_model_bytes == sum(p.nbytes for p in model.parameters())


def test_a_model_on_the_meta_device_gives_the_same_plan(make_llama):
    config = make_llama().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert nms.plan(empty, NMSparseConfig()) == nms.plan(make_llama(), NMSparseConfig())


def test_model_and_config_stay_as_they_are(llama):
    config = NMSparseConfig()
    before, state = copy.deepcopy(config), {name: value.clone() for name, value in llama.state_dict().items()}
    names = [name for name, _ in llama.named_modules()]
    nms.plan(llama, config)
    assert config == before
    assert [name for name, _ in llama.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_skipped_layers_have_their_reason(make_llama):
    config = NMSparseConfig(dense_layers=["1.mlp.up_proj"], exclude_modules=["k_proj"], layers_to_transform=[1])
    plan = nms.plan(make_llama(), config)
    assert plan.skipped["lm_head"] == "output head"
    assert plan.skipped["model.layers.1.mlp.up_proj"] == "named in dense_layers"
    assert plan.skipped["model.layers.1.self_attn.k_proj"] == "named in exclude_modules"
    assert plan.skipped["model.layers.0.mlp.down_proj"] == "not in layers_to_transform"
    model = make_llama()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer.name for layer in plan.layers} | set(plan.skipped) == linears
    assert {layer.name for layer in plan.layers} == set(mask_layers(get_peft_model(model, config)))
    only_query = nms.plan(make_llama(), NMSparseConfig(target_modules=["q_proj"]))
    assert only_query.skipped["model.layers.0.self_attn.v_proj"] == "not in target_modules"


def test_layers_that_cannot_be_packed_are_masked_and_say_why(make_llama):
    plan = nms.plan(make_llama(intermediate_size=44), NMSparseConfig())
    odd = [layer for layer in plan.layers if layer.packed_bytes is None]
    assert {layer.name.rsplit(".")[-1] for layer in odd} == {"down_proj"}
    assert "44" in odd[0].not_packable and "multiple of 8" in odd[0].not_packable
    assert plan.packed_bytes > sum(layer.packed_bytes or 0 for layer in plan.layers)
    loose = nms.plan(make_llama(), NMSparseConfig(pattern="4:8"))
    assert all(layer.packed_bytes is None and "4:8" in layer.not_packable for layer in loose.layers)


def test_tied_weights_count_once_and_their_head_stays_dense(make_llama):
    plan = nms.plan(make_llama(tie_word_embeddings=True), NMSparseConfig())
    model = make_llama(tie_word_embeddings=True)
    assert plan.model_bytes == sum(p.nbytes for p in model.parameters())
    assert plan.skipped["lm_head"] == "output head"


def test_other_trained_modules_are_counted(make_llama):
    plan = nms.plan(make_llama(), NMSparseConfig(modules_to_save=["lm_head"]))
    assert plan.other_trainable == make_llama().lm_head.weight.numel()


def test_refusals(make_llama):
    with pytest.raises(UnsupportedError, match="base model"):
        nms.plan(get_peft_model(make_llama(), NMSparseConfig()), NMSparseConfig())
    with pytest.raises(ConfigError, match="no layer to prune"):
        nms.plan(make_llama(), NMSparseConfig(target_modules=["nothing_of_this_name"]))


def test_which_patterns_lie_inside_2_of_4():
    def every_mask_does(pattern: NMPattern) -> bool:
        groups = math.lcm(4, pattern.m) // pattern.m
        rows = itertools.product(pattern.candidates(dtype=torch.int64), repeat=groups)
        return all(torch.cat(row).view(-1, 4).sum(1).max() <= 2 for row in rows)

    found = {}
    for given in ("1:2", "1:3", "2:3", "1:4", "2:4", "3:4", "2:6", "1:8", "2:8", "4:8", "2:12", "3:12", "1:16"):
        pattern = NMPattern(given)
        found[given] = inside_24(pattern)
        assert found[given] is every_mask_does(pattern), given
    assert True in found.values() and False in found.values()
