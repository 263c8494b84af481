# SPDX-License-Identifier: Apache-2.0
"""The adapter under PEFT and transformers: every entry point, and the traps that are silent for a mask."""

import copy
import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import NMSparseLinear, mask_layers
from hf_nmsparse.errors import ConfigError, FormatError, ScheduleError, UnsupportedError


def masked(model, **config):
    return get_peft_model(model, NMSparseConfig(**config))


def base_state(model) -> dict[str, torch.Tensor]:
    state = model.get_base_model().state_dict() if isinstance(model, PeftModel) else model.state_dict()
    return {
        name.replace(".base_layer", ""): value.clone() for name, value in state.items() if ".nmsparse_" not in name
    }


def shuffle_logits(model, seed: int = 5):
    """Give every layer its own arbitrary logits, so that a test cannot pass on the prior alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_logits." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def train_steps(model, tokens, steps: int = 3, learning_rate: float = 0.05):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for step in range(steps):
        nms.set_mask_step(model, step, steps)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- registration ---------------------------------------------------------------------------------------------------
def test_the_type_is_a_real_member_of_the_enum():
    assert PeftType("NMSPARSE") is PeftType.NMSPARSE is NMSparseConfig().peft_type
    assert PeftType.NMSPARSE in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType.NMSPARSE)) is PeftType.NMSPARSE
    assert copy.deepcopy(PeftType.NMSPARSE) is PeftType.NMSPARSE
    assert pickle.loads(pickle.dumps(LoraConfig())).peft_type is PeftType.LORA
    assert json.dumps(PeftType.NMSPARSE) == '"NMSPARSE"'


def test_registering_again_changes_nothing():
    from hf_nmsparse import adapter

    before = len(list(PeftType))
    adapter.register()
    assert len(list(PeftType)) == before


# --- config ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "5:4"}, "pattern 5:4"),
        ({"relaxation": "magic"}, "relaxation 'magic' is not known"),
        ({"mask_format": "zip"}, "mask_format='zip'"),
        ({"resample": "never"}, "resample='never'"),
        ({"temperature": (1.0,)}, "temperature"),
        ({"logit_scale": (0.0, 1.0)}, "logit_scale"),
        ({"prior_strength": -1}, "prior_strength"),
        ({"prior_strength": float("nan")}, "prior_strength"),
        ({"seed": -1}, "seed"),
        ({"dense_layers": "down_proj"}, "dense_layers"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "regular expression"),
    ],
)
def test_bad_fields_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        NMSparseConfig(**change)


def test_a_config_of_a_newer_version_is_refused(tmp_path, base_folder, llama):
    masked(llama).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(FormatError, match="upgrade hf-nmsparse"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_saved_config_reads_back_equal(tmp_path):
    config = NMSparseConfig(pattern="1:4", temperature=(2.0, 0.1), dense_layers=["down_proj"], seed=4)
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    for name in ("pattern", "temperature", "logit_scale", "dense_layers", "seed", "prior", "relaxation"):
        assert getattr(read, name) == getattr(config, name)


# --- saving and loading ---------------------------------------------------------------------------------------------
@pytest.fixture
def trained(base_folder, tokens, tmp_path):
    """(folder of a training checkpoint, its logits, its output in eval mode)."""
    model = masked(AutoModelForCausalLM.from_pretrained(base_folder))
    train_steps(shuffle_logits(model), tokens)
    model.eval()
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors"), model(tokens).logits


def test_a_checkpoint_stores_logits_and_fingerprints_only(trained):
    _, tensors, _ = trained
    assert {name.split(".nmsparse_")[1] for name in tensors} == {"logits.weight", "base"}
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.nmsparse_logits.weight"].shape == (48, 6, 8)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_model_from_pretrained_gives_the_same_output(trained, base_folder, tokens, low_cpu_mem_usage):
    folder, _, expected = trained
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model(tokens).logits, expected)


def test_auto_classes_and_load_adapter_give_the_same_output(trained, base_folder, tokens):
    folder, _, expected = trained
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder)(tokens).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, expected)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.load_adapter(folder)
    assert torch.equal(model(tokens).logits, expected)
    model.delete_adapter("default")
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(base_folder)(tokens).logits)


def test_add_adapter_of_transformers_trains_and_saves(base_folder, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(NMSparseConfig())
    train_steps(model, tokens)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(base_folder)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_training_continues_from_a_checkpoint(trained, base_folder):
    folder, tensors, _ = trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder, is_trainable=True)
    logits = {n: p for n, p in model.named_parameters() if ".nmsparse_logits." in n}
    assert logits and all(p.requires_grad for p in logits.values())
    for name, value in logits.items():
        assert torch.equal(value, tensors[name.replace(".default", "")])


def test_an_incomplete_checkpoint_is_refused_not_half_loaded(trained, base_folder):
    from safetensors.torch import save_file

    folder, tensors, _ = trained
    victim = "base_model.model.model.layers.1.mlp.gate_proj.nmsparse_logits.weight"
    save_file({n: t for n, t in tensors.items() if n != victim}, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"lacks 1 of 14 layers, first .*layers\.1\.mlp\.gate_proj"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)


def test_a_prior_that_was_never_set_is_refused_before_any_output(llama, tokens):
    model = masked(llama, prior="wanda")
    for mode in (model.train, model.eval):
        mode()
        nms.set_mask_step(model, 0, 10)
        with pytest.raises(ConfigError, match=r"nms\.set_prior"):
            model(tokens)


# --- training semantics ---------------------------------------------------------------------------------------------
def test_training_without_the_step_raises_with_the_fix(llama, tokens):
    model = masked(llama).train()
    with pytest.raises(ScheduleError, match="MaskScheduleCallback"):
        model(tokens)


def test_only_the_logits_train(llama):
    model = masked(llama)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".nmsparse_logits.default.weight" in n for n in trainable)


def test_layers_added_to_a_model_in_eval_mode_stay_deterministic(llama, tokens):
    llama.eval()
    llama.add_adapter(NMSparseConfig(init_weights=False))  # a fresh module would start in training mode
    assert torch.equal(llama(tokens).logits, llama(tokens).logits)


def test_eval_masks_are_exact_and_differentiable(llama, tokens):
    model = shuffle_logits(masked(llama)).eval()
    for layer in mask_layers(model).values():
        counts = ops.count_groups(layer.effective_weight(["default"]).detach(), NMPattern("2:4"))
        assert counts.over == counts.under == 0
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_masks(make_llama, tokens, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = shuffle_logits(masked(make_llama())).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        nms.set_mask_step(model, 2, 10, draw=3)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)


def test_noise_follows_the_step_and_not_the_default_generator(llama, tokens):
    model = masked(llama).train()

    def loss(step, draw=0):
        torch.randn(3)
        nms.set_mask_step(model, step, 10, draw=draw)
        return model(tokens, labels=tokens).loss.item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(1, draw=1) != loss(1, draw=2)
    model.peft_config["default"].resample = "step"
    for layer in mask_layers(model).values():
        layer.configs["default"].resample = "step"
    assert loss(1) == loss(1, draw=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_keeps_float32_logits(make_llama, tokens, dtype, tmp_path):
    base = make_llama(dtype)
    base.save_pretrained(tmp_path / "base")
    model = shuffle_logits(masked(base))
    logits = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in logits.values()} == {torch.float32}
    if dtype == torch.bfloat16:
        train_steps(model, tokens, steps=1)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    again.load_adapter(tmp_path / "adapter")  # transformers casts what it loads unless the layer prevents it
    for name, layer in mask_layers(again).items():
        assert torch.equal(
            layer.nmsparse_logits["default"].weight, mask_layers(model)[name].nmsparse_logits["default"].weight
        )


def test_in_features_that_m_does_not_divide(tokens):
    from tests_support import TinyMLP

    model = get_peft_model(TinyMLP(10, 7), NMSparseConfig(target_modules=["first", "second"]))
    layer = mask_layers(model)["first"]
    assert layer.nmsparse_logits["default"].weight.shape == (7, 6, 3)
    model.eval()
    assert ops.count_groups(layer.effective_weight(["default"]).detach(), NMPattern("2:4")).over == 0
    model.merge_and_unload()


# --- several adapters -----------------------------------------------------------------------------------------------
def test_several_masks_on_one_base(make_llama, tokens):
    model = shuffle_logits(masked(make_llama()), seed=1).eval()
    first = model(tokens).logits
    model.add_adapter("other", NMSparseConfig(pattern="1:4"))
    assert torch.equal(model(tokens).logits, first)
    model.set_adapter("other")
    other = model(tokens).logits
    assert not torch.equal(other, first)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, make_llama()(tokens).logits)
    assert torch.equal(model(tokens).logits, other)
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    model.delete_adapter("other")
    assert torch.equal(model(tokens).logits, first)
    assert all(layer._get_available_adapters() == {"default"} for layer in mask_layers(model).values())


def test_active_masks_act_as_their_intersection_and_merge_as_they_compute(make_llama, tokens):
    model = shuffle_logits(masked(make_llama()), seed=1).eval()
    model.add_adapter("other", NMSparseConfig(init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = model(tokens).logits
    for layer in mask_layers(model).values():
        both = layer.hard_mask("default") & layer.hard_mask("other")
        assert torch.equal(layer.effective_weight(["default", "other"]) != 0, both & (layer.weight != 0))
    model.merge_adapter()
    assert torch.equal(model(tokens).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, expected)


def test_two_adapters_from_one_config_object_do_not_share_state(llama, tokens):
    config = NMSparseConfig()
    model = get_peft_model(llama, config)
    model.add_adapter("reference", config)
    nms.set_mask_step(model, 3, 10)
    train_steps(model, tokens, steps=1)
    layer = next(iter(mask_layers(model).values()))
    assert not torch.equal(layer.nmsparse_logits["default"].weight, layer.nmsparse_logits["reference"].weight)


def test_parameter_names_hold_the_adapter_name_between_dots(llama):
    """trl's DPO copies its reference adapter by the text `.default.`."""
    names = [n for n, p in masked(llama).named_parameters() if p.requires_grad]
    assert all(".default." in name for name in names)


def test_copies_and_pickles_compute_the_same(llama, tokens, tmp_path):
    model = shuffle_logits(masked(llama)).eval()
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)


# --- merge ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_gives_plain_linears_with_the_same_output(make_llama, tokens, dtype, safe_merge):
    model = shuffle_logits(masked(make_llama(dtype))).eval()
    expected = model(tokens).logits
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(merged(tokens).logits, expected)
    assert not any(isinstance(module, NMSparseLinear) for module in merged.modules())


def test_merge_and_unmerge_are_exact_and_repeatable(make_llama, tokens):
    model = shuffle_logits(masked(make_llama())).eval()
    before, expected = base_state(model), model(tokens).logits
    for _ in range(3):
        model.merge_adapter()
        assert torch.equal(model(tokens).logits, expected)
        model.unmerge_adapter()
        after = base_state(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.unload()(tokens).logits, make_llama()(tokens).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_broken_logits_with_pefts_message(llama, value):
    model = masked(llama)
    before = base_state(model)
    layer = mask_layers(model)["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        layer.nmsparse_logits["default"].weight[0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert all(torch.equal(before[name], value) for name, value in base_state(model).items())


# --- which layers ---------------------------------------------------------------------------------------------------
def test_all_linear_layers_but_the_head_by_default(llama):
    names = set(mask_layers(masked(llama)))
    assert len(names) == 14 and "lm_head" not in names


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_layers_to_transform_holds_for_every_kind_of_target(llama, targets):
    names = set(mask_layers(masked(llama, target_modules=targets, layers_to_transform=[1])))
    assert names and all(name.startswith("model.layers.1.") for name in names)


def test_dense_layers_and_exclude_modules_are_left_alone(llama):
    names = set(mask_layers(masked(llama, dense_layers=["down_proj"], exclude_modules=["model.layers.0.mlp.up_proj"])))
    assert len(names) == 11
    assert not any(name.endswith("down_proj") for name in names) and "model.layers.0.mlp.up_proj" not in names


def test_a_tied_head_is_refused(make_llama):
    with pytest.raises(UnsupportedError, match=r"lm_head shares its weight with model\.embed_tokens"):
        masked(make_llama(tie_word_embeddings=True), target_modules=["lm_head"])


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm"])
def test_other_modules_are_refused_by_name(llama, target):
    with pytest.raises(UnsupportedError, match=target):
        masked(llama, target_modules=[target])


def test_a_mask_on_top_of_lora_is_refused(llama):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="add the mask first"):
        get_peft_model(model.base_model.model, NMSparseConfig(target_modules=["q_proj"]), adapter_name="mask")


def test_a_packed_layer_is_refused(make_llama):
    model = make_llama()
    nms.prune(model, "magnitude", progress=False)
    with pytest.raises(UnsupportedError, match="SparseLinear24"):
        masked(nms.compress(model))


def test_tags_and_parameter_status(llama):
    model = masked(llama)
    assert {"nmsparse", "2:4"} <= set(model.get_base_model().model_tags)
    status = model.get_model_status()
    assert status.adapter_model_type == "NMSparseModel"
    assert status.active_adapters == ["default"] and status.available_adapters == ["default"]
    assert 0 < status.trainable_params < status.total_params
