# SPDX-License-Identifier: Apache-2.0
"""Side branches (SLoRB, low rank) of packed layers: computing, packing beside the weight, storing, loading, refusals."""

import copy
import json
import logging
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests_support import assert_equal_but_for_rounding, rewrite
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from hf_nmsparse import ops
from hf_nmsparse.errors import ConfigError, FormatError, PatternError, UnsupportedError
from hf_nmsparse.fingerprint import digest, to_hex
from hf_nmsparse.ops import SideBranch
from hf_nmsparse.packed import (
    PackedConfig,
    PackedQuantizer,
    SparseLinear24,
    compress,
    decompress,
    explain,
    packed_sizes,
)
from hf_nmsparse.pattern import NMPattern

TOKENS = torch.arange(12).reshape(2, 6)
BLOCK = 12  # does not divide the layers' 32 and 64 inputs: the last block is short
UP, DOWN, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`", "ignore:Attempting to save a model")


def random_branch(out_features, in_features, kinds="slorb low_rank", block=BLOCK, rank=3, dtype=torch.float32):
    branch = {}
    if "slorb" in kinds:
        branch |= {"slorb": torch.randn(out_features, -(-in_features // block)) / 4, "slorb_block": block}
    if "low_rank" in kinds:
        branch |= {
            "low_rank_a": torch.randn(rank, in_features) / 4,
            "low_rank_b": torch.randn(out_features, rank) / 4,
        }
    return SideBranch(**branch).apply(lambda tensor: tensor.to(dtype))


def magnitude_mask(weight):
    return ops.top_n_mask(weight.detach().abs(), NMPattern(2, 4))


def layer_pair(kinds="slorb low_rank", dtype=torch.float32, **kwargs):
    """A masked dense layer, its branch, and both packed; frozen."""
    torch.manual_seed(0)
    dense = nn.Linear(32, 8, dtype=dtype).requires_grad_(False)
    mask = magnitude_mask(dense.weight)
    dense.weight.mul_(mask)
    branch = random_branch(8, 32, kinds, dtype=dtype)
    return dense, branch, SparseLinear24.from_linear(dense, mask, branch=branch, **kwargs)


def tiny_llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **kwargs})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and name != "lm_head":
            layer.weight.data.mul_(magnitude_mask(layer.weight))
    return model


def branches_of(model):
    """One layer of each kind; all other layers have none."""
    torch.manual_seed(1)
    kinds = {UP: "slorb", DOWN: "low_rank", QUERY: "slorb low_rank"}
    return {name: random_branch(*model.get_submodule(name).weight.shape, kind) for name, kind in kinds.items()}


def packed_llama(**kwargs):
    model = tiny_llama(**kwargs)
    return compress(model, branches=branches_of(model))


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def load(folder, **options):
    config = {"quantization_config": PackedConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, **config)


@pytest.fixture
def packed_folder(tmp_path):
    packed_llama().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def assert_same_state(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- the layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kinds", ["slorb", "low_rank", "slorb low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_layer_adds_its_branch_to_the_sparse_output(kinds, dtype, memory):
    dense, branch, packed = layer_pair(kinds, dtype, memory=memory)
    few, many = torch.randn(3, 32).to(dtype), torch.randn(600, 32).to(dtype)
    for _ in range(3):
        for x in (few, many):
            assert_equal_but_for_rounding(packed(x), dense(x) + branch(x))
    if memory == "fast":
        assert torch.equal(packed._kept.dense, dense.weight)
        assert torch.equal(packed(many), dense(many) + branch(many))
    leaves = [
        *(["weight_slorb"] if "slorb" in kinds else []),
        *(["weight_low_rank_a", "weight_low_rank_b"] if "low_rank" in kinds else []),
    ]
    assert list(packed.state_dict()) == ["weight", "weight_idx", *leaves, "bias"]
    assert all(getattr(packed, leaf).dtype == dtype for leaf in leaves)


def test_dense_form_holds_the_branch_rounded_once():
    dense, branch, packed = layer_pair(dtype=torch.bfloat16)
    whole = (dense.weight.float() + branch.apply(torch.Tensor.float).dense(32)).bfloat16()
    assert torch.equal(packed.dequantize(), whole)
    assert torch.equal(packed.sparse_weight(), dense.weight)
    back = packed.to_linear()
    assert type(back) is nn.Linear and torch.equal(back.weight, whole) and back.bias is dense.bias
    x = torch.randn(3, 32).bfloat16()
    torch.testing.assert_close(back(x), packed(x), rtol=0.05, atol=0.05)


def test_branch_follows_the_dtype_and_flags_of_the_layer():
    dense = nn.Linear(32, 8, dtype=torch.bfloat16)
    packed = SparseLinear24.from_linear(dense, magnitude_mask(dense.weight), branch=random_branch(8, 32))
    assert packed.weight_slorb.dtype == torch.bfloat16 and packed.weight_slorb.requires_grad
    assert packed.float()(torch.randn(2, 32)).dtype == torch.float32
    _, branch, frozen = layer_pair()
    assert frozen.weight_slorb.data_ptr() != branch.slorb.data_ptr()  # two layers may get the same one
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_fresh_layer_with_a_branch_adds_nothing_and_can_learn():
    layer = SparseLinear24(16, 4, slorb_block=6, low_rank=2)
    assert layer.weight_slorb.shape == (4, 3)
    assert layer.weight_low_rank_a.shape == (2, 16) and layer.weight_low_rank_b.shape == (4, 2)
    assert torch.equal(layer.dequantize(), layer.sparse_weight())
    layer(torch.randn(3, 16)).square().sum().backward()
    assert layer.weight_slorb.grad.any() and layer.weight_low_rank_b.grad.any()
    assert "slorb_block=6, low_rank=2" in repr(layer) and "conv1d" not in repr(layer)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_carry_the_branch(copy_of):
    _, _, packed = layer_pair()
    x = torch.randn(3, 32)
    assert torch.equal(copy_of(packed)(x), packed(x))


@pytest.mark.parametrize("rows", [3, 128])
def test_branch_trains_beside_a_frozen_weight_on_both_paths(rows):
    dense, branch, packed = layer_pair()
    x = torch.randn(rows, 32)
    expected = branch.apply(lambda tensor: tensor.clone().requires_grad_())
    (dense(x) + expected(x)).square().sum().backward()
    for leaf in ("weight_slorb", "weight_low_rank_a", "weight_low_rank_b"):
        getattr(packed, leaf).requires_grad_()
    for memory in ("fast", "low"):
        packed.memory = memory
        for _ in range(2):
            packed.zero_grad()
            packed(x).square().sum().backward()
        torch.testing.assert_close(packed.weight_slorb.grad, expected.slorb.grad)
        torch.testing.assert_close(packed.weight_low_rank_a.grad, expected.low_rank_a.grad)
        torch.testing.assert_close(packed.weight_low_rank_b.grad, expected.low_rank_b.grad)


def test_autocast_and_compile_as_without_a_branch():
    dense, branch, packed = layer_pair()
    x, many = torch.randn(3, 32), torch.randn(128, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert packed(x).dtype == torch.bfloat16
            assert_equal_but_for_rounding(packed(x), dense(x) + branch(x))
            assert packed(many).dtype == torch.bfloat16
            assert torch.equal(packed(many), dense(many) + branch(many))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), packed(x))


def test_sizes_and_explain_count_the_branch():
    _, _, packed = layer_pair(dtype=torch.bfloat16, memory="low")
    weight, branch, bias = 8 * 16 * 2 + 8 * 4, (8 * 3 + 3 * 32 + 8 * 3) * 2, 8 * 2
    assert explain(packed).resident_bytes == weight + branch + bias
    assert packed_sizes(packed).packed == weight + branch


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (SideBranch(slorb=torch.zeros(8, 2), slorb_block=12), r"slorb of its side branch has shape \[8, 2\]"),
        (SideBranch(slorb=torch.zeros(8, 3)), "slorb_block=None"),
        (SideBranch(low_rank_a=torch.zeros(2, 32)), "both low_rank_a and low_rank_b"),
        (SideBranch(low_rank_a=torch.zeros(2, 16), low_rank_b=torch.zeros(8, 2)), "low_rank_a of its side branch"),
        (SideBranch(low_rank_a=torch.zeros(2, 32), low_rank_b=torch.zeros(8, 3)), "low_rank_b of its side branch"),
        (SideBranch(), "needs slorb"),
    ],
)
def test_branches_that_do_not_fit_are_refused(branch, message):
    dense = nn.Linear(32, 8)
    with pytest.raises(PatternError, match=message):
        SparseLinear24.from_linear(dense, magnitude_mask(dense.weight), branch=branch)


# --- compress and decompress ----------------------------------------------------------------------------------------
def test_compress_keeps_branches_beside_the_packed_weights():
    reference, model = tiny_llama(), tiny_llama()
    branches = branches_of(model)
    for name, branch in branches.items():
        reference.get_submodule(name).register_forward_hook(lambda _, x, y, branch=branch: y + branch(x[0]))
    compress(model, branches=branches)
    with_branch = {n for n, m in model.named_modules() if isinstance(m, SparseLinear24) and m.branch is not None}
    assert with_branch == {UP, DOWN, QUERY}
    assert model.config.quantization_config.slorb_block == BLOCK
    assert model.get_submodule(UP).weight_low_rank_a is None and model.get_submodule(DOWN).weight_slorb is None
    for _ in range(2):
        assert_equal_but_for_rounding(logits(model), logits(reference))


def test_decompress_folds_the_branches_and_says_so_once(caplog):
    model = packed_llama()
    expected = {name: model.get_submodule(name).dequantize() for name in (UP, DOWN, QUERY)}
    before = logits(model)
    with caplog.at_level(logging.WARNING):
        decompress(model)
    warnings = [record.getMessage() for record in caplog.records if "side branch" in record.getMessage()]
    assert warnings == ["3 layers carried a side branch: their weights are dense now"]
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    caplog.clear()
    decompress(compress(tiny_llama()))
    assert "side branch" not in caplog.text


def test_branches_of_layers_that_cannot_be_packed_are_folded_and_logged(caplog):
    model = tiny_llama(intermediate_size=36)  # in_features of down_proj is no multiple of 8
    branches = branches_of(model)
    weight = model.get_submodule(DOWN).weight.clone()
    compress(model, branches=branches)
    assert torch.equal(model.get_submodule(DOWN).weight, weight + branches[DOWN].dense(36))
    assert f"{DOWN}: in_features=36 is no multiple of 8, and its side branch is folded in" in caplog.text
    assert DOWN in model.config.quantization_config.modules_to_not_convert
    assert model.get_submodule(UP).branch is not None

    masked = tiny_llama(intermediate_size=36)
    mask = torch.zeros(32, 36)
    mask[:, :8] = magnitude_mask(masked.get_submodule(DOWN).weight)[:, :8]
    up = {UP: magnitude_mask(masked.get_submodule(UP).weight)}
    compress(masked, {DOWN: mask, **up}, branches={DOWN: branches[DOWN]})
    assert torch.equal(masked.get_submodule(DOWN).weight, weight * mask + branches[DOWN].dense(36))


def bad_branches():
    def blocks(model):
        return {UP: random_branch(64, 32, block=8)}

    def wide(model):
        return {UP: random_branch(64, 64)}

    def unknown(model):
        return {"model.layers.7.mlp.up_proj": random_branch(64, 32)}

    def tied(model):
        return {"lm_head": random_branch(128, 32)}

    return [
        (blocks, UnsupportedError, "blocks of 8, 12 inputs"),
        (wide, PatternError, f"{UP}: slorb"),
        (unknown, ConfigError, "layers.7.mlp.up_proj"),
        (tied, UnsupportedError, "lm_head.*tied"),
    ]


@pytest.mark.parametrize(("change", "error", "message"), bad_branches())
def test_bad_branches_leave_the_model_untouched(change, error, message):
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        compress(model, branches={**branches_of(model), **change(model)})
    assert_same_state(model, before)
    masks = {UP: magnitude_mask(model.get_submodule(UP).weight)}
    with pytest.raises(ConfigError, match="no mask"):
        compress(model, masks, branches=branches_of(model))
    assert_same_state(model, before)


def test_a_second_compress_keeps_to_the_first_block_size():
    model = tiny_llama()
    up = {UP: magnitude_mask(model.get_submodule(UP).weight)}
    compress(model, up, branches={UP: random_branch(64, 32)})
    query = {QUERY: magnitude_mask(model.get_submodule(QUERY).weight)}
    with pytest.raises(UnsupportedError, match="blocks of 8, 12 inputs"):
        compress(model, query, branches={QUERY: random_branch(32, 32, block=8)})
    compress(model, query)
    assert model.config.quantization_config.slorb_block == BLOCK


# --- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, dtype, shard):
    model = packed_llama(dtype=dtype)
    model.save_pretrained(tmp_path / "1", max_shard_size=shard)
    loaded = load(tmp_path / "1")
    assert_same_state(loaded, model.state_dict())
    for _ in range(2):
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "2")
    assert_same_state(load(tmp_path / "2"), model.state_dict())


def test_stored_form_is_the_documented_one(packed_folder):
    config = json.loads((packed_folder / "config.json").read_text())["quantization_config"]
    assert config["slorb_block"] == BLOCK
    tensors = load_file(packed_folder / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if name.startswith(UP)} == {
        "weight",
        "weight_idx",
        "weight_slorb",
    }
    assert tensors[f"{UP}.weight_slorb"].shape == (64, 3)
    assert tensors[f"{DOWN}.weight_low_rank_a"].shape == (3, 64)
    assert tensors[f"{DOWN}.weight_low_rank_b"].shape == (32, 3)
    with safe_open(packed_folder / "model.safetensors", framework="pt") as handle:
        header = handle.metadata()
    for name in (f"{UP}.weight_slorb", f"{DOWN}.weight_low_rank_a", f"{QUERY}.weight_low_rank_b"):
        assert header[f"nmsparse.digest.{name}"] == to_hex(digest(tensors[name]))


@pytest.mark.parametrize("way", ["while loading", "after loading"])
def test_dequantizing_folds_the_branches(packed_folder, tmp_path, way, caplog):
    expected = decompress(packed_llama()).state_dict()
    caplog.clear()
    model = load(packed_folder, dequantize=True) if way == "while loading" else load(packed_folder)
    if way == "after loading":
        model.dequantize()
    assert caplog.text.count("3 layers carried a side branch: their weights are dense now") == 1
    assert_same_state(model, expected)
    model.save_pretrained(tmp_path / "dense")
    assert_same_state(load(tmp_path / "dense"), expected)


def test_disk_offload_reaches_the_branch(packed_folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map.update({"lm_head": "cpu", "model.rotary_emb": "cpu"})
    model = AutoModelForCausalLM.from_pretrained(packed_folder, device_map=device_map, offload_folder=tmp_path / "off")
    assert model.get_submodule(UP).weight_slorb.is_meta
    assert torch.equal(logits(model), logits(packed_llama()))
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), packed_llama().state_dict())


def test_conv1d_with_a_branch(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    masks = {n: magnitude_mask(m.weight.t()) for n, m in model.named_modules() if type(m) is Conv1D}
    name = "transformer.h.0.attn.c_attn"
    branch = random_branch(96, 32)
    expected = (model.get_submodule(name).weight.t() * masks[name] + branch.dense(32)).t()
    compress(model, masks, branches={name: branch})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    for dense in (load(tmp_path, dequantize=True), decompress(model)):
        torch.testing.assert_close(dense.get_submodule(name).weight, expected, rtol=0, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------
SLORB, A, B = f"{UP}.weight_slorb", f"{DOWN}.weight_low_rank_a", f"{DOWN}.weight_low_rank_b"
DAMAGES = {
    "altered SLoRB": (lambda t, m: t[SLORB].add_(1), f"{SLORB}: digest"),
    "altered low rank": (lambda t, m: t[B].add_(1), f"{B}: digest"),
    "no digest": (lambda t, m: m.pop(f"nmsparse.digest.{A}"), f"{A}: .* no digest"),
}
WRONG = {
    "half a low-rank term": (lambda t, m: t.pop(B), f"{B} is missing though {A}"),
    "another rank": (lambda t, m: t.update({B: t[B][:, :2].clone()}), f"{B}: shape"),
    "another width": (lambda t, m: t.update({A: t[A][:, :8].clone()}), f"{A}: shape"),
    "other rows": (lambda t, m: t.update({SLORB: t[SLORB][:8].clone()}), f"{SLORB}: shape"),
    "integers": (lambda t, m: t.update({SLORB: t[SLORB].to(torch.int8)}), f"{SLORB}: dtype I8"),
    "another block": (lambda t, m: t.update({SLORB: t[SLORB][:, :2].clone()}), f"{SLORB} has 2 columns.*makes 3"),
    "a stray branch": (
        lambda t, m: t.update({"lm_head.weight_slorb": t[SLORB].clone()}),
        "lm_head.weight_slorb lies beside",
    ),
}


@pytest.mark.parametrize("options", [{}, {"dequantize": True}])
@pytest.mark.parametrize("damage", DAMAGES)
def test_altered_branches_are_refused_by_digest(packed_folder, damage, options):
    change, message = DAMAGES[damage]
    rewrite(packed_folder, change)
    with pytest.raises(FormatError, match=message):
        load(packed_folder, **options)
    assert load(packed_folder, check_digests=False, **options) is not None


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_branches_are_refused_even_without_digests(packed_folder, wrong):
    change, message = WRONG[wrong]
    rewrite(packed_folder, change)
    with pytest.raises(FormatError, match=message):
        load(packed_folder, check_digests=False)


@pytest.mark.parametrize(("block", "message"), [(8, f"{UP}.*slorb_block=8 makes 4"), (None, "has no slorb_block")])
def test_a_block_size_that_does_not_fit_is_refused(packed_folder, block, message):
    path = packed_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["slorb_block"] = block
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        load(packed_folder)


def test_tensor_parallelism_and_loading_without_files_are_refused(packed_folder):
    model = tiny_llama()
    quantizer = PackedQuantizer(PackedConfig(slorb_block=BLOCK), pre_quantized=True)
    with pytest.raises(UnsupportedError, match="only the checkpoint files say which"):
        quantizer.preprocess_model(model)
    model.config.distributed_config = object()
    with pytest.raises(UnsupportedError, match="2 more layers carry a side branch"):
        quantizer.preprocess_model(model, checkpoint_files=[str(packed_folder / "model.safetensors")])
    assert not any(isinstance(module, SparseLinear24) for module in model.modules())
