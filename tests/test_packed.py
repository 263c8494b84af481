# SPDX-License-Identifier: Apache-2.0
"""`SparseLinear24`, `explain`, `compress` and `decompress`, in memory."""

import copy
import io
import logging
import pickle
from pathlib import Path

import pytest
import torch
from tests_support import assert_equal_but_for_rounding
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from hf_nmsparse import ops
from hf_nmsparse.errors import ConfigError, PatternError, UnsupportedError
from hf_nmsparse.ops import linear24
from hf_nmsparse.packed import PackedConfig, SparseLinear24, compress, decompress, explain, packed_sizes
from hf_nmsparse.pattern import NMPattern

PATTERN = NMPattern(2, 4)
TOKENS = torch.arange(12).reshape(2, 6)
MANY = 600  # rows of x, for which the dense product is the faster one on every CPU


def magnitude_mask(weight, pattern=PATTERN):
    return ops.top_n_mask(weight.detach().abs(), pattern)


def linear_pair(dtype=torch.float32, bias=True, **kwargs):
    """A masked dense layer and the same one packed, frozen as in inference and LoRA."""
    torch.manual_seed(0)
    dense = nn.Linear(16, 8, bias=bias, dtype=dtype).requires_grad_(False)
    mask = magnitude_mask(dense.weight)
    dense.weight.mul_(mask)
    return dense, SparseLinear24.from_linear(dense, mask, **kwargs)


def tiny_llama(masked=True, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            **kwargs,
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if masked:
        for layer in block_layers(model).values():
            layer.weight.data.mul_(magnitude_mask(layer.weight))
    return model


def block_layers(model):
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    found = model.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


# --- the layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_layer_equals_the_masked_dense_layer_and_back(dtype, memory):
    dense, packed = linear_pair(dtype, memory=memory)
    few, many = torch.randn(3, 16).to(dtype), torch.randn(MANY, 16).to(dtype)
    for _ in range(3):
        assert_equal_but_for_rounding(packed(few), dense(few))
        assert_equal_but_for_rounding(packed(many), dense(many))
    if memory == "fast" or dtype in (torch.float32, torch.float64):
        assert torch.equal(packed(many), dense(many))
    assert isinstance(packed, nn.Linear)
    assert packed.weight.shape == (8, 8) and packed.weight.dtype == dtype
    assert packed.weight_idx.shape == (8, 2) and packed.weight_idx.dtype == torch.uint8
    assert list(packed.state_dict()) == ["weight", "weight_idx", "bias"]
    assert torch.equal(packed.dequantize(), dense.weight)
    back = packed.to_linear()
    assert type(back) is nn.Linear and torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)


def test_layer_keeps_flags_bias_and_gradients():
    dense = nn.Linear(8, 4).eval()
    packed = SparseLinear24.from_linear(dense, magnitude_mask(dense.weight))
    assert packed.weight.requires_grad and not packed.weight_idx.requires_grad
    assert packed.bias is dense.bias and not packed.training
    assert packed.to_linear().weight.requires_grad
    assert SparseLinear24.from_linear(nn.Linear(8, 4, bias=False), torch.eye(4, 8)).bias is None
    assert packed.to_linear(torch.bfloat16).bias.dtype == torch.bfloat16


def test_mask_inside_24_is_completed_with_zeros_and_a_wider_one_refused():
    dense = nn.Linear(8, 4)
    one_of_four = magnitude_mask(dense.weight, NMPattern(1, 4))
    packed = SparseLinear24.from_linear(dense, one_of_four)
    assert torch.equal(packed.dequantize(), dense.weight * one_of_four)
    ops.check_ids_24(packed.weight_idx, "ids")
    with pytest.raises(PatternError, match="more than 2 of 4"):
        SparseLinear24.from_linear(dense, torch.ones(4, 8))
    with pytest.raises(PatternError, match="shape"):
        SparseLinear24.from_linear(dense, torch.ones(8, 4))
    with pytest.raises(PatternError, match="multiple of 8"):
        SparseLinear24.from_linear(nn.Linear(12, 4), torch.zeros(4, 12))


def test_a_fresh_layer_is_valid():
    layer = SparseLinear24(16, 4)
    ops.check_ids_24(layer.weight_idx, "ids")
    assert torch.isfinite(layer(torch.randn(2, 16))).all()
    assert "sparsity=2:4, memory=fast" in repr(layer) and "in_features=16" in repr(layer)
    with pytest.raises(ConfigError, match="memory='quick'"):
        layer.memory = "quick"


# --- the kept dense weight ------------------------------------------------------------------------------------------
@pytest.fixture
def unpack_count(monkeypatch):
    """One entry for each time that a weight is unpacked, in Python or in C++."""
    calls = []
    for module, name in ((linear24.weight, "unpack_24"), (linear24.cpu, "unpack_on_cpu")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original: calls.append(1) or original(*a))
    return calls


def test_fast_stops_unpacking_and_low_does_not(unpack_count):
    x = torch.randn(MANY, 16)
    for memory, expected in (("fast", 2), ("low", 5)):
        _, packed = linear_pair(memory=memory)
        unpack_count.clear()
        for _ in range(5):
            packed(x)
        assert len(unpack_count) == expected


CHANGES = {
    "in place": lambda p: p.weight.mul_(2),
    "ids in place": lambda p: p.weight_idx.fill_(0x44),
    "new parameter": lambda p: setattr(p, "weight", nn.Parameter(p.weight * 2, requires_grad=False)),
    "new data": lambda p: setattr(p.weight, "data", p.weight * 2),
    "load_state_dict": lambda p: p.load_state_dict({**p.state_dict(), "weight": p.weight * 2}),
    "dtype": lambda p: p.to(torch.float64),
    "memory": lambda p: setattr(p, "memory", "low"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_weight_is_never_stale(change):
    _, packed = linear_pair()
    few, many = torch.randn(3, 16), torch.randn(MANY, 16)
    packed(few), packed(many), packed(many)
    assert packed._kept.dense is not None
    with torch.no_grad():
        CHANGES[change](packed)
    few, many = few.to(packed.weight.dtype), many.to(packed.weight.dtype)
    for _ in range(3):
        weight = packed.dequantize()
        assert_equal_but_for_rounding(packed(few), nn.functional.linear(few, weight, packed.bias))
        assert torch.equal(packed(many), nn.functional.linear(many, weight, packed.bias))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_copies_and_pickles_leave_the_kept_weight_behind(copy_of):
    dense, packed = linear_pair()
    few, many = torch.randn(3, 16), torch.randn(MANY, 16)
    packed(few), packed(many), packed(many)
    if copy_of is None:
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    else:
        clone = copy_of(packed)
    assert clone._kept is None and packed._kept.dense is not None
    assert_equal_but_for_rounding(clone(few), dense(few))
    assert torch.equal(clone(many), dense(many))
    assert list(packed.state_dict()) == ["weight", "weight_idx", "bias"]


def test_training_the_values_uses_no_kept_weight_and_drops_it():
    _, packed = linear_pair()
    x = torch.randn(MANY, 16)
    packed(x), packed(x)
    assert packed._kept.dense is not None
    packed.weight.requires_grad_()
    packed(x).sum().backward()
    assert packed.weight.grad.shape == packed.weight.shape and packed._kept is None
    with torch.no_grad():
        packed(x), packed(x)
        assert packed._kept.dense is not None


def test_weight_kept_in_inference_mode_still_lets_gradients_through():
    _, packed = linear_pair()
    with torch.inference_mode():
        packed(torch.randn(3, 16)), packed(torch.randn(MANY, 16)), packed(torch.randn(MANY, 16))
    assert packed._kept.dense is not None
    for rows in (3, MANY):
        x = torch.randn(rows, 16, requires_grad=True)
        packed(x).sum().backward()
        torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(rows, 16))


def test_layers_whose_tensors_come_and_go_keep_nothing():
    _, packed = linear_pair()
    for _ in range(3):
        packed.weight = nn.Parameter(packed.weight.clone(), requires_grad=False)
        packed(torch.randn(MANY, 16))
        assert packed._kept.dense is None


def test_autocast_as_for_a_dense_layer():
    dense, packed = linear_pair()
    few, many = torch.randn(3, 16), torch.randn(MANY, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            for x in (few, many):
                assert packed(x).dtype == torch.bfloat16
                assert_equal_but_for_rounding(packed(x), dense(x))
        assert torch.equal(packed(many), dense(many))


def test_mixed_dtypes_raise_on_both_paths():
    _, packed = linear_pair(torch.bfloat16)
    for rows in (3, MANY):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="dtype"):
                packed(torch.randn(rows, 16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layer_follows_changes_of_its_weight(backend):
    _, packed = linear_pair()
    x = torch.randn(MANY, 16)
    packed(x), packed(x)
    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), packed(x))
    with torch.no_grad():
        packed.weight.mul_(2)
    torch.testing.assert_close(compiled(x), packed(x))


def test_explain_names_path_and_bytes():
    dense, packed = linear_pair(torch.bfloat16)
    packed_bytes = 8 * 8 * 2 + 8 * 2 + 8 * 2
    kept = explain(packed, tokens=MANY)
    assert (kept.kind, kept.backend, kept.device) == ("SparseLinear24", "dense, unpacked once", "cpu")
    assert (kept.dtype, kept.tokens, kept.resident_bytes) == ("bfloat16", MANY, packed_bytes + 8 * 16 * 2)
    few = explain(packed, tokens=1)
    if few.backend != kept.backend:  # where there is a C++ compiler
        assert few.resident_bytes == packed_bytes
    packed(torch.ones(MANY, 16).bfloat16()), packed(torch.ones(MANY, 16).bfloat16())
    assert explain(packed, tokens=1).resident_bytes == kept.resident_bytes
    packed.memory = "low"
    for tokens in (1, MANY):
        low = explain(packed, tokens)
        kernel = ops.choose_for(torch.ones(tokens, 16, dtype=torch.bfloat16), packed.weight24)
        assert (low.backend, low.resident_bytes) == (kernel.name, packed_bytes)
    packed.memory = None
    packed.weight.requires_grad_()
    assert explain(packed, MANY).backend == kernel.name
    with torch.no_grad():
        assert explain(packed, MANY).backend == "dense, unpacked once"
    assert explain(dense).backend == "dense"
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        explain(nn.LayerNorm(4))


# --- compress and decompress ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_then_decompress_is_the_identity_on_a_masked_model(dtype, tied):
    model = tiny_llama(dtype=dtype, tie_word_embeddings=tied)
    before, expected = state_of(model), logits(model)
    assert compress(model) is model
    assert sum(isinstance(m, SparseLinear24) for m in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]
    assert model.is_quantized and model.quantization_method == "nmsparse"
    for _ in range(2):
        assert_equal_but_for_rounding(logits(model), expected)
    assert decompress(model) is model
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    assert getattr(model, "hf_quantizer", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight or not tied


def test_compress_with_masks_computes_with_exactly_these_masks(caplog):
    model = tiny_llama(masked=False)
    layers = block_layers(model)
    masks = {name: magnitude_mask(layer.weight) for name, layer in layers.items()}
    masks["model.layers.0.mlp.up_proj"] = magnitude_mask(layers["model.layers.0.mlp.up_proj"].weight, NMPattern(1, 4))
    masks["model.layers.1.mlp.up_proj"] = magnitude_mask(layers["model.layers.1.mlp.up_proj"].weight, NMPattern(4, 8))
    del masks["model.layers.1.mlp.down_proj"]
    reference = copy.deepcopy(model)
    for name, mask in masks.items():
        reference.get_submodule(name).weight.data.mul_(mask)
    compress(model, masks)
    assert_equal_but_for_rounding(logits(model), logits(reference))
    for name, mask in masks.items():
        if name != "model.layers.1.mlp.up_proj":
            assert torch.equal(model.get_submodule(name).dequantize(), layers[name].weight * mask), name
    dense = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert model.config.quantization_config.modules_to_not_convert == dense
    assert "model.layers.1.mlp.up_proj" in caplog.text and "more than 2:4" in caplog.text
    assert "down_proj" not in caplog.text


def test_groups_with_too_few_nonzeros_are_completed_and_counted(caplog):
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    model[0].weight.data = torch.tensor([[0, 0, 0, 5, 1, 0, 2, 0], [0, 0, 0, 0, 0, 3, 4, 0]]).float()
    weight = model[0].weight.clone()
    with caplog.at_level(logging.INFO):
        compress(model)
    assert "2 groups completed" in caplog.text
    # row 0: (0, 3) and (0, 2); row 1: (0, 1) and (1, 2)
    assert model[0].weight_idx.tolist() == [[0b10_00_11_00], [0b10_01_01_00]]
    assert torch.equal(model[0].dequantize(), weight)


def test_layers_that_are_not_24_or_not_packable_stay_dense_and_are_listed():
    model = tiny_llama(intermediate_size=36)  # in_features of down_proj is no multiple of 8
    model.model.layers[0].self_attn.q_proj.weight.data.normal_()
    expected = logits(model)
    compress(model)
    listed = model.config.quantization_config.modules_to_not_convert
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert listed == sorted(["lm_head", "model.layers.0.self_attn.q_proj", *down])
    assert_equal_but_for_rounding(logits(model), expected)


def failing_cases():
    def wrong_shape(model):
        return {"model.layers.0.mlp.up_proj": torch.ones(3, 3)}

    def no_layer(model):
        return {"model.layers.9.mlp.up_proj": torch.ones(64, 32)}

    def tied(model):
        return {"lm_head": magnitude_mask(model.lm_head.weight)}

    return [
        (wrong_shape, PatternError, "up_proj has shape"),
        (no_layer, ConfigError, "layers.9.mlp.up_proj"),
        (tied, UnsupportedError, "lm_head.*tied"),
    ]


@pytest.mark.parametrize(("bad_masks", "error", "message"), failing_cases())
def test_bad_masks_leave_the_model_untouched(bad_masks, error, message):
    model = tiny_llama(masked=False, tie_word_embeddings=True)
    good = {name: magnitude_mask(layer.weight) for name, layer in block_layers(model).items()}
    before = state_of(model)
    with pytest.raises(error, match=message):
        compress(model, {**good, **bad_masks(model)})
    assert_same_state(model, before)
    assert not hasattr(model.config, "quantization_config")


def test_models_that_cannot_be_compressed_say_what_to_do():
    with pytest.raises(UnsupportedError, match=r"none of the 15 linear layers can be packed as 2:4.*prune"):
        compress(tiny_llama(masked=False))
    with torch.device("meta"):
        unloaded = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnsupportedError, match="not loaded"):
        compress(unloaded)
    pruned = nn.Sequential(nn.Linear(8, 8))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(UnsupportedError, match=r"prune\.remove"):
        compress(pruned)


def test_shared_layers_and_subclasses_of_linear_stay_dense():
    class Other(nn.Linear):
        pass

    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.Linear(8, 8), shared, Other(8, 8)])
    for layer in model:
        layer.weight.data.mul_(magnitude_mask(layer.weight))
    compress(model)
    assert [type(m) for m in model] == [nn.Linear, SparseLinear24, nn.Linear, Other]


def test_compress_again_changes_nothing():
    model = compress(tiny_llama())
    before = state_of(model)
    compress(model)
    assert_same_state(model, before)


def test_packed_sizes():
    sizes = packed_sizes(compress(tiny_llama(dtype=torch.bfloat16)))
    assert sizes.layers == 14
    assert (
        sizes.dense
        == sizes.dense_bf16
        == 2 * sum(layer.weight.numel() for layer in block_layers(tiny_llama()).values())
    )
    assert sizes.ratio == sizes.packed / sizes.dense_bf16 == 0.5625
    assert packed_sizes(compress(tiny_llama())).ratio == 0.53125
    assert packed_sizes(nn.Linear(8, 8)).ratio is None


# --- Conv1D ---------------------------------------------------------------------------------------------------------
def conv1d_layers(model):
    return {name: module for name, module in model.named_modules() if type(module) is Conv1D}


def tiny_gpt2(masked=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for layer in conv1d_layers(model).values():
        layer.bias.data.normal_()
        if masked:
            layer.weight.data.mul_(magnitude_mask(layer.weight.t()).t())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_packs_along_its_inputs_and_comes_back_as_conv1d(dtype):
    model = tiny_gpt2(dtype=dtype)
    before, expected = state_of(model), logits(model)
    compress(model)
    packed = model.transformer.h[0].attn.c_attn
    assert isinstance(packed, SparseLinear24) and (packed.in_features, packed.out_features) == (32, 96)
    assert packed.weight.shape == (96, 16) and packed.weight_idx.shape == (96, 4)
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]
    assert "conv1d=True" in repr(packed)
    assert torch.equal(packed.dequantize(), before["transformer.h.0.attn.c_attn.weight"].t())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(logits(model), expected, **tolerance)  # addmm and linear may add up in another order
    decompress(model)
    assert len(conv1d_layers(model)) == 8
    assert_same_state(model, before)
    assert all(layer.weight.is_contiguous() for layer in conv1d_layers(model).values())
    assert torch.equal(logits(model), expected)


def test_masks_of_conv1d_are_out_by_in_and_prune_dense_leftovers_too(caplog):
    model = tiny_gpt2(masked=False)
    layers = conv1d_layers(model)
    masks = {name: magnitude_mask(layer.weight.t()) for name, layer in layers.items()}
    wide = "transformer.h.1.mlp.c_fc"
    masks[wide] = magnitude_mask(layers[wide].weight.t(), NMPattern(4, 8))
    expected = {name: layer.weight.detach().t() * masks[name] for name, layer in layers.items()}
    with pytest.raises(PatternError, match=r"as \[out, in\]"):
        compress(model, {wide: masks[wide].t()})
    compress(model, masks)
    assert f"{wide}: " in caplog.text and model.config.quantization_config.modules_to_not_convert == [
        "lm_head",
        wide,
    ]
    assert torch.equal(model.get_submodule(wide).weight, expected.pop(wide).t())
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).dequantize(), weight), name


def test_explain_takes_a_conv1d():
    assert explain(Conv1D(4, 8)).backend == "dense"


# --- training -------------------------------------------------------------------------------------------------------
def test_full_fine_tuning_changes_values_and_never_ids():
    model = compress(tiny_llama()).train()
    before = state_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = model.state_dict()
    assert losses[-1] < losses[0]
    for name in before:
        assert torch.equal(before[name], after[name]) == name.endswith("weight_idx"), name


def test_lora_trains_on_a_packed_model_and_its_state_round_trips(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = compress(tiny_llama())
    before = state_of(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        compress(model)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(compress(tiny_llama()), tmp_path).eval()
    expected = logits(model)
    logits(again)  # a dense weight is kept from the second call on, as the trained model has since long
    assert torch.equal(logits(again), expected)
    merged = decompress(again).merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(model.unload(), before)


# --- the config -----------------------------------------------------------------------------------------------------
def test_config_stores_what_describes_the_checkpoint_and_nothing_else():
    config = PackedConfig(modules_to_not_convert=["lm_head"], dequantize=True, memory="low", check_digests=False)
    stored = config.to_dict()
    assert stored == {
        "quant_method": "nmsparse",
        "pattern": "2:4",
        "modules_to_not_convert": ["lm_head"],
        "format_version": 1,
        "values": "dense",
    }
    again = PackedConfig.from_dict(stored)
    assert (again.dequantize, again.memory, again.check_digests) == (False, None, True)
    assert config.get_loading_attributes() == {
        "dequantize": True,
        "memory": "low",
        "check_digests": False,
        "mask": None,
        "revision": None,
        "task": None,
        "allow_base_mismatch": False,
    }
    assert PackedConfig(slorb_block=16).to_dict()["slorb_block"] == 16
    assert PackedConfig(mask=Path("mask"), task="qa").to_dict() == PackedConfig().to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 3, "novelty": 1}, "upgrade hf-nmsparse"),
        ({"format_version": "1"}, "no version"),
        ({"values": "int5"}, "int5.*'int4'"),
        ({"values": "int4", "format_version": 1}, "format_version=1 with values='int4'"),
        ({"patern": "2:4"}, "unknown fields.*patern"),
        ({"pattern": "4:8"}, "packed form is '2:4'"),
        ({"memory": "quick"}, "quick"),
        ({"slorb_block": 0}, "slorb_block=0"),
        ({"slorb_block": "16"}, "slorb_block='16'"),
        ({"task": "qa"}, "belong to a mask"),
        ({"allow_base_mismatch": True}, "belong to a mask"),
        ({"mask": "user/mask", "modules_to_not_convert": []}, "mask says which layers"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"modules_to_not_convert": "lm_head"}, "list of module names"),
    ],
)
def test_config_refuses_what_it_cannot_honour(fields, message):
    with pytest.raises(ValueError, match=message):
        PackedConfig(**fields)
