# SPDX-License-Identifier: Apache-2.0
"""Every entry point of PEFT that has a meaning for a mask; those that have none say so."""

from __future__ import annotations

import copy
import logging
import pickle

import peft
import pytest
import torch
from families import FAMILIES, inputs_for
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from tests_support import TinyMLP
from transformers import (
    AutoModel,
    GenerationConfig,
    LlamaForSequenceClassification,
)

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, UnsupportedError

TERMS = {"slorb_block": 8, "low_rank": 2, "delta_rank": 2}
EXPERTS = {"delta_rank": 2}


def masked(model, **config) -> PeftModel:
    return get_peft_model(model, NMSparseConfig(**config))


def randomised(model, seed: int = 5):
    """Arbitrary values in every trainable tensor of every adapter, so that no test can pass on a prior or a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def model_of(family: str, **config) -> PeftModel:
    return randomised(masked(FAMILIES[family](), **config))


def train(model, steps: int = 3, **inputs):
    """A few steps by hand; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    losses = []
    for step in range(steps):
        nms.set_mask_step(model, step, steps)
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_tensors(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def alone(model, name: str, call):
    """What `call(model)` gives with one adapter for the whole batch; "__base__" for none."""
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    return call(model)


@pytest.fixture
def several(make_llama, tmp_path) -> PeftModel:
    """A Llama with "default" (logits), "terms" (1:4, all terms) and "published" (codes)."""
    donor = randomised(masked(make_llama()), seed=9)
    folder = nms.save_mask(donor, tmp_path / "published")
    model = masked(make_llama())
    model.add_adapter("terms", NMSparseConfig(pattern="1:4", **TERMS))
    model.load_adapter(folder, "published")
    return randomised(model)


MIX = ["default", "terms", "__base__", "published", "terms", "__base__", "default", "published"]


# --- mixed batches ------------------------------------------------------------------------------------------------------
def test_each_row_of_a_mixed_batch_is_computed_by_its_own_mask(several, tokens):
    mixed = several(input_ids=tokens, adapter_names=MIX).logits
    outputs = {name: alone(several, name, lambda m: m(input_ids=tokens).logits) for name in sorted(set(MIX))}
    for row, name in enumerate(MIX):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-5, atol=1e-6)
        others = [other for other in outputs if other != name]
        assert all(not torch.allclose(mixed[row], outputs[other][row], atol=1e-3) for other in others)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="greedy", marks=pytest.mark.slow),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param(
            {"generation_config": GenerationConfig(num_beams=3, max_new_tokens=4, eos_token_id=None, pad_token_id=0)},
            id="beams in a config",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_of_a_mixed_batch_equals_that_of_each_mask(family, how):
    base = FAMILIES[family]()
    if family == "t5":
        with torch.no_grad():
            base.shared.weight.mul_(0.05)  # else the last token decides the next one alone
    model = masked(base)
    model.add_adapter("terms", NMSparseConfig(pattern="1:4", slorb_block=8))
    randomised(model)
    names = ["default", "terms", "__base__", "default"]
    inputs = {"input_ids": inputs_for(family)["input_ids"]}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}

    mixed = model.generate(**inputs, **options, adapter_names=names)
    outputs = {name: alone(model, name, lambda m: m.generate(**inputs, **options)) for name in sorted(set(names))}
    for row, name in enumerate(names):
        assert mixed[row].tolist() == outputs[name][row].tolist()
    assert outputs["default"].tolist() != outputs["terms"].tolist()


def test_several_sequences_a_sample_keep_the_mask_of_their_sample(make_llama, tokens):
    model = masked(make_llama())
    model.add_adapter("other", NMSparseConfig(pattern="1:4"))
    randomised(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "pad_token_id": 0}
    mixed = model.generate(input_ids=tokens[:2], **options, adapter_names=["default", "other"])
    for row, name in enumerate(["default", "other"]):
        expected = alone(model, name, lambda m: m.generate(input_ids=tokens[:2], **options))
        assert mixed[2 * row : 2 * row + 2].tolist() == expected[2 * row : 2 * row + 2].tolist()
    sampled = model.generate(
        input_ids=tokens[:2],
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=3,
        pad_token_id=0,
        adapter_names=["default", "other"],
    )
    assert len(sampled) == 6


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"] * 7 + ["stranger"], "stranger on no layer; the model has"),
        (["default"] * 7, "7 adapter names for 8 samples"),
    ],
)
def test_wrong_names_of_a_mixed_batch_are_refused_and_leave_no_trace(several, tokens, names, message):
    expected = several(input_ids=tokens).logits
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        several(input_ids=tokens, adapter_names=names)
    assert torch.equal(several(input_ids=tokens).logits, expected)


def test_a_mixed_batch_is_refused_in_training(several, tokens):
    several.train()
    nms.set_mask_step(several, 0, 10)
    with pytest.raises(ConfigError, match=r"eval mode only; call model\.eval"):
        several(input_ids=tokens, adapter_names=MIX)


def test_a_mixed_batch_is_refused_while_a_mask_is_merged(several, tokens):
    several.merge_adapter(["default"])
    with pytest.raises(UnsupportedError, match=r"call model\.unmerge_adapter\(\) first"):
        several(input_ids=tokens, adapter_names=MIX)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixed_batch_is_refused_where_experts_are_masked(family):
    model = model_of(family)
    inputs = inputs_for(family)
    with pytest.raises(UnsupportedError, match="experts mix the tokens of all samples"):
        model(**inputs, adapter_names=["default", "__base__", "default", "__base__"])
    model = model_of(family, target_parameters=[])  # attention alone is no obstacle
    mixed = model(**inputs, adapter_names=["default", "__base__", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[0::2], model(**inputs).logits[0::2], rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_uses_the_saved_modules_of_each_adapter(make_llama, tokens):
    model = masked(make_llama(), modules_to_save=["lm_head"])
    model.add_adapter("head too", NMSparseConfig(modules_to_save=["lm_head"]))
    model.add_adapter("mask only", NMSparseConfig())
    randomised(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.head too" in name:
                parameter.mul_(1.5)
    names = ["default", "head too", "mask only", "__base__"] * 2
    mixed = model(input_ids=tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, name, lambda m: m(input_ids=tokens).logits)
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-6)


# --- combining masks ----------------------------------------------------------------------------------------------------
@pytest.fixture
def pair(make_llama) -> PeftModel:
    model = masked(make_llama())
    model.add_adapter("other", NMSparseConfig())
    return randomised(model)


def test_combined_logits_are_the_weighted_sum_and_train_on(pair, tokens):
    before = tensors_of(pair)
    pair.add_weighted_adapter(["default", "other"], [0.25, -2.0], "mix")
    for name, layer in mask_layers(pair).items():
        one, two = (before[f"base_model.model.{name}.nmsparse_logits.{a}.weight"] for a in ("default", "other"))
        torch.testing.assert_close(layer.nmsparse_logits["mix"].weight, 0.25 * one - 2.0 * two)
    assert pair.active_adapters == ["default"]
    assert not any(p.requires_grad for n, p in pair.named_parameters() if ".mix." in n)
    pair.set_adapter("mix")
    start = mask_layers(pair)["model.layers.0.mlp.up_proj"].nmsparse_logits["mix"].weight.clone()
    train(pair, input_ids=tokens, labels=tokens)
    assert not torch.equal(mask_layers(pair)["model.layers.0.mlp.up_proj"].nmsparse_logits["mix"].weight, start)
    after = tensors_of(pair)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_combined_votes_keep_what_most_masks_keep(make_llama, tmp_path):
    model = masked(make_llama())
    for seed in (1, 2):
        donor = randomised(masked(make_llama()), seed)
        model.load_adapter(nms.save_mask(donor, tmp_path / f"{seed}"), f"published {seed}")
    randomised(model)
    names, weights = ["published 1", "default", "published 2"], [1.0, 0.9, 0.5]
    model.add_weighted_adapter(names, weights, "mix", combination_type="votes")
    for layer in mask_layers(model).values():
        masks = torch.stack([layer.hard_mask(name) for name in names]).float()
        votes = (masks * torch.tensor(weights).view(3, 1, 1)).sum(0).unflatten(1, (-1, 4))
        # Lower positions first where votes are equal: a stable descending sort.
        order = votes.sort(dim=2, descending=True, stable=True).indices[..., :2]
        expected = torch.zeros_like(votes, dtype=torch.bool).scatter_(2, order, True).flatten(1)
        assert torch.equal(layer.hard_mask("mix"), expected)
    assert model.peft_config["mix"].mask_format == "packed"


@pytest.mark.parametrize("combination", ["logits", "votes"])
def test_a_combined_mask_is_saved_published_merged_and_deleted(pair, make_llama, tokens, tmp_path, combination):
    pair.add_weighted_adapter(["default", "other"], [1.0, 0.5], "mix", combination_type=combination)
    pair.set_adapter("mix")
    expected = pair(input_ids=tokens).logits
    pair.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "mix")
    assert torch.equal(again(input_ids=tokens).logits, expected)
    published = nms.save_mask(pair, tmp_path / "published", adapter_name="mix")
    assert torch.equal(nms.load_mask(make_llama(), published)(input_ids=tokens).logits, expected)
    merged = copy.deepcopy(pair).merge_and_unload()
    assert torch.equal(merged(input_ids=tokens).logits, expected)
    pair.delete_adapter("mix")
    assert not any(".mix" in name for name in pair.state_dict())


REFUSED = [
    ({"combination_type": "linear"}, ConfigError, "combination_type='linear' has no meaning for masks"),
    ({"adapters": ["default", "quarter"]}, ConfigError, "differ in pattern: '2:4' and '1:4'"),
    ({"adapters": ["default", "terms"]}, UnsupportedError, "terms beside its mask"),
    ({"adapters": ["default", "few"]}, ConfigError, "are on different layers, first at"),
    ({"adapters": ["default", "head"]}, UnsupportedError, r"more than its mask \(modules_to_save\)"),
    ({"adapters": ["default", "missing"]}, ConfigError, "no adapter 'missing'"),
    ({"adapters": ["default", "published"]}, ConfigError, "use combination_type='votes'"),
    ({"adapter_name": "other"}, ConfigError, "already has an adapter 'other'"),
    ({"weights": [1.0]}, ConfigError, "2 adapters and 1 weights"),
    ({"weights": [1.0, float("nan")]}, ConfigError, "weight nan is not a finite number"),
]


def test_masks_that_do_not_combine_are_refused_and_the_model_stays(pair, make_llama, tmp_path):
    pair.add_adapter("quarter", NMSparseConfig(pattern="1:4"))
    pair.add_adapter("terms", NMSparseConfig(**TERMS))
    pair.add_adapter("few", NMSparseConfig(dense_layers=["down_proj"]))
    pair.add_adapter("head", NMSparseConfig(modules_to_save=["lm_head"]))
    pair.load_adapter(nms.save_mask(randomised(masked(make_llama())), tmp_path / "published"), "published")
    before, names = tensors_of(pair), set(pair.peft_config)
    call = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "mix"}
    for change, error, message in REFUSED:
        with pytest.raises(error, match=message):
            pair.add_weighted_adapter(**{**call, **change})
        assert_same_tensors(pair, before)
        assert set(pair.peft_config) == names and pair.active_adapters == ["default"]


# --- adapters come and go -----------------------------------------------------------------------------------------------
def test_adapters_are_deleted_one_by_one_down_to_the_base(several, make_llama, tokens):
    outputs = {name: alone(several, name, lambda m: m(input_ids=tokens).logits) for name in ("default", "terms")}
    several.set_adapter("default")
    several.delete_adapter("published")  # inactive
    assert torch.equal(several(input_ids=tokens).logits, outputs["default"])
    several.delete_adapter("default")  # active: another one takes over
    assert several.active_adapters == ["terms"]
    assert torch.equal(several(input_ids=tokens).logits, outputs["terms"])
    several.delete_adapter("terms")
    # (Not through the PeftModel: PEFT itself looks for the config of the adapter that is gone, LoRA or not.)
    assert torch.equal(several.base_model(input_ids=tokens).logits, make_llama()(input_ids=tokens).logits)
    assert not any(".nmsparse_" in name for name in several.state_dict())
    several.add_adapter("again", NMSparseConfig(init_weights=False))
    several.set_adapter("again")
    assert not torch.equal(several.eval()(input_ids=tokens).logits, make_llama()(input_ids=tokens).logits)


def test_transformers_adds_switches_disables_and_deletes_masks(make_llama, tokens):
    model = make_llama()
    dense = model(input_ids=tokens).logits
    model.add_adapter(NMSparseConfig(init_weights=False), "one")
    model.add_adapter(NMSparseConfig(init_weights=False, seed=1, **TERMS), "two")
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        outputs[name] = model(input_ids=tokens).logits
    assert not torch.equal(outputs["one"], outputs["two"])
    model.disable_adapters()
    assert torch.equal(model(input_ids=tokens).logits, dense)
    model.enable_adapters()
    assert torch.equal(model(input_ids=tokens).logits, outputs["two"])
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(model(input_ids=tokens).logits, outputs["one"])
    model.delete_adapter("one")
    assert torch.equal(model(input_ids=tokens).logits, dense)


def trainable_after(config_of) -> list[set[str]]:
    """Names of the adapters that train, after each step of a life with several adapters."""
    with torch.random.fork_rng():
        model = get_peft_model(FAMILIES["llama"](), config_of())
    names = ("default", "frozen", "other")

    def training() -> set[str]:
        found = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(any(f".{adapter}." in name for adapter in names) for name in found)
        return {adapter for adapter in names if any(f".{adapter}." in name for name in found)}

    seen = [training()]
    model.add_adapter("frozen", config_of(inference_mode=True))
    seen.append(training())
    model.add_adapter("other", config_of())
    seen.append(training())
    for name in ("frozen", "other", "default"):
        model.set_adapter(name)
        seen.append(training())
    model.set_adapter("other", inference_mode=True)
    seen.append(training())
    model.set_requires_grad("other")
    seen.append(training())
    model.set_requires_grad(["default", "other"], False)
    seen.append(training())
    model.set_adapter("default")
    with model.disable_adapter():
        seen.append(training())
    seen.append(training())
    model.base_model.set_adapter(["default", "other"])
    seen.append(training())
    model.delete_adapter("default")
    seen.append(training())
    return seen


@pytest.mark.parametrize("terms", [{}, TERMS], ids=["mask", "terms"])
def test_the_same_adapters_train_as_with_lora(terms):
    lora = trainable_after(lambda **options: LoraConfig(target_modules=["q_proj", "up_proj"], **options))
    mask = trainable_after(lambda **options: NMSparseConfig(**terms, **options))
    assert mask == lora
    assert mask[0] == {"default"} and {"other"} in mask


@pytest.mark.parametrize(("family", "terms"), [("llama", TERMS), ("mixtral", EXPERTS)])
def test_copies_and_pickles_with_terms_and_experts_compute_the_same(family, terms, tmp_path):
    model, inputs = model_of(family, **terms), inputs_for(family)
    expected = model(**inputs).logits
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(**inputs).logits, expected)
    train(copies[0], **inputs, labels=inputs["input_ids"])  # a copy is no alias
    assert not torch.equal(copies[0](**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(copies[1](**inputs).logits, expected)


@pytest.mark.filterwarnings("ignore:adapter default has a term")
@pytest.mark.parametrize(("family", "terms"), [("llama", TERMS), ("qwen3_moe", EXPERTS)])
def test_disabling_a_merged_mask_gives_the_base_and_enabling_it_the_mask(family, terms):
    model, inputs = model_of(family, **terms), inputs_for(family)
    dense, expected = FAMILIES[family]()(**inputs).logits, model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(model(**inputs).logits, expected)


# --- precision ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("relaxation", ["candidates", pytest.param("elementwise", marks=pytest.mark.slow)])
def test_autocast_does_not_change_a_mask(make_llama, tokens, dtype, training, relaxation):
    model = randomised(masked(make_llama(dtype), relaxation=relaxation, **TERMS)).train(training)
    nms.set_mask_step(model, 3, 10)
    weights, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            weights.append({n: layer.effective_weight(["default"]) for n, layer in mask_layers(model).items()})
            model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, weight in weights[0].items():
        assert weights[1][name].dtype == dtype and torch.equal(weights[1][name], weight)
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        similarity = torch.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_stay_in_float32_without_autocast_adapter_dtype(make_llama, tokens, dtype):
    model = get_peft_model(make_llama(dtype), NMSparseConfig(**TERMS), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.eval()(input_ids=tokens).logits.dtype == dtype


def test_adapters_that_were_cast_to_bfloat16_train_and_evaluate(make_llama, tokens):
    model = randomised(masked(make_llama(torch.bfloat16), **TERMS)).to(torch.bfloat16)  # as trl does for QLoRA
    before = tensors_of(model)
    train(model, input_ids=tokens, labels=tokens)
    changed = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert any(".nmsparse_logits." in name for name in changed) and any(".nmsparse_slorb." in name for name in changed)
    for layer in mask_layers(model).values():
        counts = ops.count_groups(layer.effective_weight(["default"]).detach(), NMPattern("2:4"))
        assert counts.over == 0


# --- what trains beside the mask ----------------------------------------------------------------------------------------
BESIDE = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("kind", sorted(BESIDE))
def test_what_trains_beside_the_mask_is_saved_merged_and_packed(make_llama, tokens, tmp_path, kind):
    model = masked(make_llama(), init_weights=False, **BESIDE[kind])
    before = tensors_of(model)
    train(model, input_ids=tokens, labels=tokens)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert any(".nmsparse_logits." in n for n in changed)
    beside = {n for n in changed if ".nmsparse_" not in n}
    assert beside and all("modules_to_save.default" in n or "token_adapter" in n for n in beside)

    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, expected)
    if kind == "trainable_token_indices":
        with pytest.raises(UnsupportedError, match="embed_tokens has trained tokens"):
            nms.compress(again)
        packed = nms.compress(again.merge_and_unload())
    else:
        packed = nms.compress(again)
    torch.testing.assert_close(packed(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.equal(merged(input_ids=tokens).logits, expected)
    assert not any("modules_to_save" in n or "token_adapter" in n for n in merged.state_dict())
    base = make_llama().state_dict()
    name = "lm_head.weight" if kind == "modules_to_save" else "model.embed_tokens.weight"
    assert not torch.equal(merged.state_dict()[name], base[name])


# --- which layers -------------------------------------------------------------------------------------------------------
def test_layers_pattern_names_the_list_of_blocks():
    names = set(mask_layers(model_of("t5", layers_to_transform=[1], layers_pattern="block", target_modules=["wo"])))
    assert names == {"encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, {0: ["down"], 1: ["down"]}),
        (
            {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "down_proj"]},
            {0: ["down"], 1: ["gate_up", "down"]},
        ),
        ({"layers_to_transform": 1}, {1: ["gate_up", "down"]}),
        ({"exclude_modules": ["down_proj"]}, {0: ["gate_up"], 1: ["gate_up"]}),
        ({"dense_layers": ["layers.0.mlp"]}, {1: ["gate_up", "down"]}),
        ({"dense_layers": ["experts.gate_up_proj"]}, {0: ["down"], 1: ["down"]}),
        ({"target_parameters": []}, {}),
    ],
)
def test_which_experts_are_masked(config, expected):
    masks = {name for name in mask_layers(model_of("qwen3_moe", **config)) if ".experts." in name}
    assert masks == {f"model.layers.{i}.mlp.experts.{kind}_proj" for i, kinds in expected.items() for kind in kinds}


def test_all_linear_on_experts_warns_that_they_stay_dense(caplog):
    with caplog.at_level(logging.WARNING):
        model = model_of("mixtral", target_modules="all-linear")
    assert not any(".experts." in name for name in mask_layers(model))
    assert "4 fused expert weights stay dense" in caplog.text and "target_parameters" in caplog.text


def test_target_parameters_that_match_nothing_are_named():
    with pytest.raises(ConfigError, match=r"target_parameters: 'experts\.up_proj' matches no parameter of Mixtral"):
        model_of("mixtral", target_parameters=["experts.gate_up_proj", "experts.up_proj"])


# --- loading by every class ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "auto", "task"),
    [
        ("llama", peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
        ("t5", peft.AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
        ("qwen3_moe", peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
    ],
)
def test_auto_peft_classes_find_base_and_mask(tmp_path, family, auto, task):
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    base = type(FAMILIES[family]()).from_pretrained(tmp_path / "base")
    model = randomised(masked(base, task_type=task, delta_rank=2))
    expected = model(**inputs_for(family)).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**inputs_for(family)).logits, expected)


def test_sequence_classification_trains_and_loads_its_head(make_llama, tokens, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    options = {"num_labels": 3, "pad_token_id": 0}
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    model = masked(base, task_type="SEQ_CLS")
    assert any("score" in name and p.requires_grad for name, p in model.named_parameters())
    train(model, input_ids=tokens, labels=torch.arange(8) % 3)
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", **options)
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    assert torch.equal(loaded.merge_and_unload()(input_ids=tokens).logits, expected)


def test_feature_extraction_and_automodel_find_base_and_mask(make_llama, tokens, tmp_path):
    make_llama().model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    model = randomised(masked(base, task_type="FEATURE_EXTRACTION", slorb_block=8))
    expected = model(input_ids=tokens).last_hidden_state
    model.save_pretrained(tmp_path / "adapter")
    for loader in (peft.AutoPeftModelForFeatureExtraction, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=tokens).last_hidden_state, expected)


@pytest.mark.parametrize(("family", "terms"), [("llama", TERMS), ("mixtral", EXPERTS)])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_checkpoint_loads_beside_another_adapter(family, terms, low_cpu_mem_usage, tmp_path):
    donor, inputs = model_of(family, **terms), inputs_for(family)
    expected = donor(**inputs).logits
    donor.save_pretrained(tmp_path)
    model = masked(FAMILIES[family](), **terms).eval()
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not torch.equal(model(**inputs).logits, expected)
    model.set_adapter("second")
    assert torch.equal(model(**inputs).logits, expected)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_chosen_adapters_are_saved_into_subfolders(several, make_llama, tokens, tmp_path):
    outputs = {name: alone(several, name, lambda m: m(input_ids=tokens).logits) for name in ("default", "published")}
    several.save_pretrained(tmp_path, selected_adapters=["default", "published"])
    assert not (tmp_path / "terms").exists()
    model = PeftModel.from_pretrained(make_llama(), tmp_path)
    model.load_adapter(tmp_path, "published", subfolder="published")
    for name, expected in outputs.items():
        assert torch.equal(alone(model, name, lambda m: m(input_ids=tokens).logits), expected)


def test_a_state_dict_is_read_and_set_in_place(make_llama, tokens):
    donor = randomised(masked(make_llama(), **TERMS))
    state = peft.get_peft_model_state_dict(donor)
    assert all(".nmsparse_" in name and ".default" not in name for name in state)
    model = masked(make_llama(), **TERMS).eval()
    before = {id(p) for p in model.parameters()}
    model(input_ids=tokens)
    peft.set_peft_model_state_dict(model, state)
    assert {id(p) for p in model.parameters()} == before
    assert torch.equal(model(input_ids=tokens).logits, donor(input_ids=tokens).logits)


def test_a_published_mask_is_replaced_in_place(make_llama, tokens, tmp_path):
    models = []
    for seed in (1, 2):
        donor = randomised(masked(make_llama()), seed)
        folder = nms.save_mask(donor, tmp_path / f"{seed}")
        models.append(PeftModel.from_pretrained(make_llama(), folder))
    first, second = (model(input_ids=tokens).logits for model in models)
    peft.set_peft_model_state_dict(models[0], peft.get_peft_model_state_dict(models[1]))
    assert torch.equal(models[0](input_ids=tokens).logits, second) and not torch.equal(first, second)


def test_injection_without_a_peft_model(make_llama, tokens):
    donor = randomised(masked(make_llama(), **TERMS))
    model = inject_adapter_in_model(NMSparseConfig(**TERMS), make_llama())
    assert type(model) is type(make_llama())
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(donor))
    assert torch.equal(model.eval()(input_ids=tokens).logits, donor(input_ids=tokens).logits)
    assert peft.get_peft_model_state_dict(model).keys() == {
        name.removeprefix("base_model.model.") for name in peft.get_peft_model_state_dict(donor)
    }


# --- status -------------------------------------------------------------------------------------------------------------
def test_status_counts_and_repr(several):
    status = peft.get_model_status(several)
    assert status.available_adapters == ["default", "published", "terms"] and status.active_adapters == ["default"]
    assert status.enabled and status.merged_adapters == [] and status.num_adapter_layers == 14
    layers = peft.get_layer_status(several)
    assert len(layers) == 14 and all(layer.available_adapters == ["default", "published", "terms"] for layer in layers)
    trainable, total = several.get_nb_trainable_parameters()
    logits = [p for n, p in several.named_parameters() if ".nmsparse_logits.default." in n]
    assert trainable == sum(p.numel() for p in logits) and total > trainable
    text = repr(several)
    assert "nmsparse.NMSparseLinear" in text and "MaskParameter" in text
    several.merge_adapter(["published"])
    assert peft.get_model_status(several).merged_adapters == ["published"]


# --- what has no meaning ------------------------------------------------------------------------------------------------
def test_mixing_with_other_methods_is_refused_by_peft(make_llama):
    with pytest.raises(ValueError, match="NMSPARSE"):
        get_peft_model(make_llama(), NMSparseConfig(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        masked(make_llama()).add_adapter("other", LoraConfig(target_modules=["q_proj"]))


def test_hotswap_is_refused_and_changes_nothing(several, make_llama, tokens, tmp_path):
    randomised(masked(make_llama()), seed=8).save_pretrained(tmp_path)
    before = tensors_of(several)
    with pytest.raises(ValueError, match="only supports LORA but NMSPARSE"):
        hotswap_adapter(several, str(tmp_path), "default")
    assert_same_tensors(several, before)
    model = make_llama()
    model.load_adapter(tmp_path)
    before = tensors_of(model)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(tmp_path, "default", hotswap=True)
    assert_same_tensors(model, before)


def test_conversion_to_lora_is_refused(several):
    with pytest.raises((ValueError, TypeError), match="LoRA"):
        peft.convert_to_lora(several, rank=4)


# --- running ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "terms"), [("llama", TERMS), ("mixtral", EXPERTS)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_terms_and_experts(family, terms, reentrant):
    inputs = inputs_for(family)
    gradients = []
    for checkpointing in (False, True):
        model = model_of(family, **terms).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        nms.set_mask_step(model, 2, 10, draw=3)
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("family", "terms"), [("llama", TERMS), ("qwen3_moe", EXPERTS)])
def test_generation_with_cache_equals_generation_without(family, terms):
    model, inputs = model_of(family, **terms), inputs_for(family)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**inputs, **options))


@pytest.mark.parametrize("terms", [{}, {"slorb_block": 4}, {"low_rank": 2}, {"delta_rank": 2}])
def test_a_plain_module_whose_inputs_m_does_not_divide(terms, tmp_path):
    torch.manual_seed(1)
    base, x = TinyMLP(10, 7), torch.randn(5, 10)
    model = masked(copy.deepcopy(base), target_modules=["first", "second"], **terms)
    before, start = tensors_of(model), model.eval()(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for step in range(3):
        nms.set_mask_step(model, step, 3)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(x)
    if terms:
        assert not torch.equal(expected, start)
    trained = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert trained and all(".nmsparse_" in name for name in trained)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected)
    for layer in mask_layers(model).values():
        mask = layer.hard_mask("default")
        whole = layer.in_features // 4 * 4
        assert (mask[:, :whole].unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert (mask[:, whole:].sum(1) == min(2, layer.in_features - whole)).all()
    if "slorb_block" in terms or "low_rank" in terms:
        with pytest.warns(UserWarning, match="merged weights are dense"):
            merged = model.merge_and_unload()
    else:
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)


# --- torch.compile ------------------------------------------------------------------------------------------------------
# Warnings of the compiler about itself: cached functions are traced, and constants.
quiet = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")


class CountingBackend:
    """`aot_eager`, counting the graphs it is given: a graph break or a recompilation makes it more than one."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list) -> object:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def compiled(model) -> tuple[object, CountingBackend]:
    backend = CountingBackend()
    return torch.compile(model, fullgraph=True, backend=backend), backend


def tiny(**config) -> tuple[PeftModel, torch.Tensor]:
    torch.manual_seed(1)
    model = randomised(masked(TinyMLP(18, 8), target_modules=["first"], **config))
    return model, torch.randn(5, 18)


COMPILED = [
    pytest.param({}, id="candidates"),
    pytest.param({"relaxation": "elementwise"}, id="elementwise", marks=pytest.mark.slow),
    pytest.param(TERMS, id="terms", marks=pytest.mark.slow),
]


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("config", COMPILED)
def test_evaluation_compiles_to_one_graph(config):
    model, x = tiny(**config)
    expected = model(x)
    fast, backend = compiled(model)
    for _ in range(2):
        torch.testing.assert_close(fast(x), expected)
    assert backend.graphs == 1


@pytest.mark.slow
@quiet
def test_a_published_mask_compiles_after_its_check_and_is_checked_without_fullgraph(tmp_path):
    donor, x = tiny()
    expected = donor(x)
    folder = nms.save_mask(donor, tmp_path)
    model = nms.load_mask(copy.deepcopy(donor).unload(), folder)
    fast, _ = compiled(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call the model once before fullgraph=True"):
        fast(x)
    backend = CountingBackend()
    broken = torch.compile(model, backend=backend)  # breaks the graph for the check, and computes
    torch.testing.assert_close(broken(x), expected)
    assert all(layer.verified for layer in mask_layers(model).values())
    fast, backend = compiled(model)
    torch.testing.assert_close(fast(x), expected)
    assert backend.graphs == 1

    model = PeftModel.from_pretrained(TinyMLP(18, 8), folder)  # another base
    with pytest.raises(BaseModelMismatchError):
        torch.compile(model, backend=CountingBackend())(x)


@quiet
@pytest.mark.parametrize("config", COMPILED)
def test_training_compiles_to_one_graph_over_all_steps(config):
    gradients, outputs = [], []
    for compiling in (False, True):
        model, x = tiny(**config)
        model.train()
        nms.set_mask_step(model, 0, 10)
        model(x)  # the check of a mask before its first use
        runner, backend = compiled(model) if compiling else (model, None)
        for step in range(4):
            nms.set_mask_step(model, step, 10, draw=step % 2)
            output = runner(x)
            output.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        outputs.append(output.detach())
    assert backend.graphs == 1
    torch.testing.assert_close(outputs[1], outputs[0])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-6 * float(plain.abs().max()))


@pytest.mark.slow
@quiet
def test_switching_adapters_after_compiling_recompiles_once():
    model, x = tiny()
    model.add_adapter("other", NMSparseConfig(target_modules=["first"], pattern="1:4"))
    randomised(model)
    expected = {name: alone(model, name, lambda m: m(x)) for name in ("default", "other")}
    assert not torch.allclose(expected["default"], expected["other"])
    fast, backend = compiled(model)
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        torch.testing.assert_close(fast(x), expected[name])
    assert backend.graphs == 2
