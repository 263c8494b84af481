# SPDX-License-Identifier: Apache-2.0
"""Packed models through `save_pretrained` and `from_pretrained`: round trips, pruning and dequantizing at load, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests_support import assert_equal_but_for_rounding
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    RobertaConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

import hf_nmsparse as nms
from hf_nmsparse import ops
from hf_nmsparse.errors import ConfigError, FormatError, UnsupportedError
from hf_nmsparse.fingerprint import digest, to_hex
from hf_nmsparse.packed import PackedConfig, PackedQuantizer, SparseLinear24, compress, decompress, register
from hf_nmsparse.pattern import NMPattern

TOKENS = torch.arange(12).reshape(2, 6)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`", "ignore:Attempting to save a model")


def tiny_model(config_cls=LlamaConfig, masked=True, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = config_cls(**{**SIZES, **kwargs})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, layer in model.named_modules():
        if masked and type(layer) is nn.Linear and name != "lm_head":
            layer.weight.data.mul_(ops.top_n_mask(layer.weight.abs(), NMPattern(2, 4)))
    return model


def load(folder, cls=AutoModelForCausalLM, **kwargs):
    options = {key: kwargs.pop(key) for key in ("dequantize", "memory", "check_digests") if key in kwargs}
    if options:
        kwargs["quantization_config"] = PackedConfig(**options)
    return cls.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def num_packed(model):
    return sum(isinstance(module, SparseLinear24) for module in model.modules())


def dense_names(model):
    return sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)


def stored_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def packed_folder(tmp_path):
    compress(tiny_model()).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def dense_folder(tmp_path):
    tiny_model(masked=False).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def rewrite(folder, change):
    """Let `change(tensors, metadata)` alter the one safetensors file of a folder."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


# --- round trips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(tmp_path, dtype, tied, shard):
    model = compress(tiny_model(dtype=dtype, tie_word_embeddings=tied, attention_bias=True))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = load(tmp_path)
    assert num_packed(loaded) == 14 and loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for _ in range(2):
        assert torch.equal(logits(loaded), logits(model))


def test_stored_form_is_the_documented_one(packed_folder):
    config = json.loads((packed_folder / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "nmsparse",
        "pattern": "2:4",
        "format_version": 1,
        "values": "dense",
        "modules_to_not_convert": ["lm_head"],
    }
    tensors = stored_tensors(packed_folder)
    name = "model.layers.0.mlp.down_proj.weight"
    assert tensors[name].shape == (32, 32) and tensors[name + "_idx"].shape == (32, 8)
    assert not any("kept" in key for key in tensors)
    with safe_open(packed_folder / "model.safetensors", framework="pt") as handle:
        header = handle.metadata()
    assert header["nmsparse.format_version"] == "1"
    digests = {key: value for key, value in header.items() if key.startswith("nmsparse.digest.")}
    assert len(digests) == 28
    assert all(
        value == to_hex(digest(tensors[key.removeprefix("nmsparse.digest.")])) for key, value in digests.items()
    )


def test_saving_a_loaded_model_writes_the_same_tensors(packed_folder, tmp_path):
    model = load(packed_folder)
    logits(model), logits(model)
    model.save_pretrained(tmp_path / "again")
    first, second = stored_tensors(packed_folder), stored_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert num_packed(load(tmp_path / "again")) == 14


def test_exactly_the_packed_layers_of_the_file_are_packed_whatever_the_skip_list_says(packed_folder):
    rewrite_config(packed_folder, modules_to_not_convert=["model.layers.0"])
    assert num_packed(load(packed_folder)) == 14


def test_loads_into_the_base_model_class(packed_folder):
    base = load(packed_folder, AutoModel)
    assert num_packed(base) == 14
    with torch.no_grad():
        hidden = base(TOKENS).last_hidden_state
        expected = tiny_model().model(TOKENS).last_hidden_state
    assert_equal_but_for_rounding(hidden, expected)


def test_mixtral_keeps_its_experts_dense_and_saves_again(tmp_path):
    model = compress(tiny_model(MixtralConfig, num_key_value_heads=2, num_local_experts=4))
    expected = logits(model)
    assert num_packed(model) == 8
    model.save_pretrained(tmp_path / "1")
    first = load(tmp_path / "1")
    assert num_packed(first) == 8 and torch.equal(logits(first), expected)
    first.save_pretrained(tmp_path / "2")
    assert stored_tensors(tmp_path / "1").keys() == stored_tensors(tmp_path / "2").keys()
    assert torch.equal(logits(load(tmp_path / "2")), expected)
    dense = load(tmp_path / "1", dequantize=True)
    assert num_packed(dense) == 0
    plain = tiny_model(MixtralConfig, num_key_value_heads=2, num_local_experts=4)
    assert torch.equal(logits(dense), logits(plain))
    assert_equal_but_for_rounding(logits(dense), expected)
    dense.save_pretrained(tmp_path / "3")
    assert torch.equal(logits(load(tmp_path / "3")), logits(plain))


def test_weights_that_checkpoints_store_fused_stay_dense(tmp_path, caplog):
    model = tiny_model(HrmTextConfig)
    expected = model.state_dict()
    compress(model).save_pretrained(tmp_path)
    assert num_packed(model) > 0
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith(("q_proj", "up_proj")))
    loaded = load(tmp_path)
    assert num_packed(loaded) == num_packed(model)
    for name, tensor in decompress(loaded).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_generate_and_flags(packed_folder):
    model, dense = load(packed_folder), tiny_model()
    found = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, dense.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0))
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, PackedQuantizer) and quantizer.is_serializable()
    assert quantizer.is_trainable and quantizer.is_qat_trainable and quantizer.is_compileable


def test_adapter_saved_from_a_packed_model_reloads(packed_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(packed_folder)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as handle:
        assert not any(key.startswith("nmsparse") for key in handle.metadata())
    again = load(packed_folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load(packed_folder)))


# --- devices --------------------------------------------------------------------------------------------------------
def test_device_map_auto(packed_folder):
    found = logits(load(packed_folder, device_map="auto"))
    assert torch.equal(found, logits(load(packed_folder)))
    assert_equal_but_for_rounding(found, logits(tiny_model()))


def test_disk_offload_of_a_packed_model_and_saving_it_from_there(packed_folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map.update({"lm_head": "cpu", "model.rotary_emb": "cpu"})
    model = load(packed_folder, device_map=device_map, offload_folder=tmp_path / "offload")
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta and layer.weight_idx.is_meta
    expected, many = logits(tiny_model()), torch.arange(128).reshape(8, 16)
    for _ in range(3):
        assert_equal_but_for_rounding(logits(model), expected)
        with torch.no_grad():
            model(many)
    assert layer._kept is None or layer._kept.dense is None
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(packed_folder)))


def test_accelerate_finds_the_packed_layers_by_the_skip_list(packed_folder):
    config = AutoConfig.from_pretrained(packed_folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    quantizer = auto.AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(model)
    model = load_checkpoint_and_dispatch(model, packed_folder, device_map={"": "cpu"}).eval()
    assert num_packed(model) == 14
    assert_equal_but_for_rounding(logits(model), logits(tiny_model()))


# --- pruning while loading ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [PackedConfig(), {"quant_method": "nmsparse"}])
def test_pruning_while_loading_equals_compressing_by_magnitude(dense_folder, tmp_path, config, dtype):
    dense = load(dense_folder, dtype=dtype)
    masks = {
        name: ops.top_n_mask(layer.weight.abs(), NMPattern(2, 4))
        for name, layer in dense.named_modules()
        if type(layer) is nn.Linear and name != "lm_head"
    }
    expected = compress(dense, masks)
    pruned = load(dense_folder, quantization_config=config, dtype=dtype)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], tensor), name
    assert pruned.config.quantization_config.modules_to_not_convert == ["lm_head"]
    pruned.save_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(load(tmp_path / "pruned")), logits(expected))


def test_pruning_honours_and_stores_the_skip_list_and_lists_odd_layers(tmp_path, caplog):
    tiny_model(masked=False, intermediate_size=36).save_pretrained(tmp_path / "dense")
    config = PackedConfig(modules_to_not_convert=["model.layers.0.self_attn", "o_proj"])
    pruned = load(tmp_path / "dense", quantization_config=config)
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    names += ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    names += ["model.layers.1.self_attn.o_proj"]
    assert dense_names(pruned) == sorted(names)
    assert pruned.config.quantization_config.modules_to_not_convert == sorted(names)
    assert "in_features=36 is no multiple of 8" in caplog.text
    pruned.save_pretrained(tmp_path / "pruned")
    assert dense_names(load(tmp_path / "pruned")) == sorted(names)


def test_a_new_head_is_not_pruned(tmp_path, caplog):
    torch.manual_seed(0)
    base = AutoModel.from_config(RobertaConfig(**SIZES))
    base.save_pretrained(tmp_path)
    model = load(tmp_path, AutoModelForSequenceClassification, quantization_config=PackedConfig())
    assert num_packed(model) == 12
    assert type(model.classifier.dense) is nn.Linear
    assert "classifier.dense: not in the checkpoint" in caplog.text
    assert torch.isfinite(logits(model)).all()


def test_pruning_while_loading_refuses_disk_offload_dequantize_and_processes(dense_folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ConfigError, match="offload to disk"):
        load(dense_folder, quantization_config=PackedConfig(), device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ConfigError, match="nothing to dequantize"):
        load(dense_folder, dequantize=True)
    model = tiny_model()
    model.config.distributed_config = object()
    files = [str(dense_folder / "model.safetensors")]
    with pytest.raises(UnsupportedError, match="distributed_config"):
        PackedQuantizer(PackedConfig(), pre_quantized=False).preprocess_model(model, checkpoint_files=files)
    with pytest.raises(UnsupportedError, match="checkpoint files"):
        LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig(**SIZES), state_dict=tiny_model().state_dict(), quantization_config=PackedConfig()
        )


# --- Conv1D ---------------------------------------------------------------------------------------------------------
def tiny_gpt2(masked=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32), dtype=dtype
    ).eval()
    for layer in model.modules():
        if masked and type(layer) is Conv1D:
            layer.weight.data.mul_(ops.top_n_mask(layer.weight.t().abs(), NMPattern(2, 4)).t())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_round_trips_and_is_pruned_and_dequantized_while_loading(tmp_path, dtype):
    reference = tiny_gpt2(dtype=dtype)
    packed = compress(tiny_gpt2(dtype=dtype))
    packed.save_pretrained(tmp_path / "packed")
    assert stored_tensors(tmp_path / "packed")["transformer.h.0.mlp.c_fc.weight"].shape == (128, 16)
    tiny_gpt2(masked=False, dtype=dtype).save_pretrained(tmp_path / "dense")
    expected = logits(packed)
    for loaded in (load(tmp_path / "packed"), load(tmp_path / "dense", quantization_config=PackedConfig())):
        assert num_packed(loaded) == 8 and loaded.config.quantization_config.modules_to_not_convert == ["lm_head"]
        assert torch.equal(logits(loaded), expected)
        for name, tensor in decompress(loaded).state_dict().items():
            assert torch.equal(tensor, reference.state_dict()[name]), name
    dense = load(tmp_path / "packed", dequantize=True)
    assert type(dense.transformer.h[0].attn.c_attn) is Conv1D
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]) and tensor.is_contiguous(), name
    assert torch.equal(logits(dense), logits(reference))


def test_packed_gpt2_loads_into_the_base_model_class(tmp_path):
    compress(tiny_gpt2()).save_pretrained(tmp_path)
    assert num_packed(load(tmp_path, AutoModel)) == 8


# --- dequantizing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["while loading", "after loading", "decompress"])
def test_dequantized_models_are_plain_dense_ones(tmp_path, way, dtype):
    reference = tiny_model(dtype=dtype)
    compress(tiny_model(dtype=dtype)).save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed", dequantize=way == "while loading")
    if way == "after loading":
        model.dequantize()
    if way == "decompress":
        decompress(model)
    assert num_packed(model) == 0
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert stored_tensors(tmp_path / "dense").keys() == reference.state_dict().keys()
    assert torch.equal(logits(load(tmp_path / "dense")), logits(reference))
    compress(model).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert num_packed(again) == 14
    assert_equal_but_for_rounding(logits(again), logits(reference))


def test_dequantize_to_another_dtype(packed_folder):
    model = load(packed_folder)
    model.dequantize(dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_memory_is_a_loading_attribute(packed_folder):
    model = load(packed_folder, memory="low")
    assert {m.memory for m in model.modules() if isinstance(m, SparseLinear24)} == {"low"}
    assert {m.memory for m in load(packed_folder).modules() if isinstance(m, SparseLinear24)} == {"fast"}


# --- refusals -------------------------------------------------------------------------------------------------------
VALUES = "model.layers.1.mlp.up_proj.weight"
IDS = VALUES + "_idx"


def flip(name):
    def change(tensors, metadata):
        tensors[name].view(torch.uint8).view(-1)[3] ^= 1

    return change


def move_id(tensors, metadata):
    tensors[IDS][0, 0] = 0x44 if tensors[IDS][0, 0] != 0x44 else 0xEE


DAMAGES = {
    "values": (flip(VALUES), f"{VALUES}: digest"),
    "ids": (move_id, f"{IDS}: digest"),
    "no digest of values": (lambda t, m: m.pop("nmsparse.digest." + VALUES), f"{VALUES}: .* no digest"),
    "no digest of ids": (lambda t, m: m.pop("nmsparse.digest." + IDS), f"{IDS}: .* no digest"),
}


@pytest.mark.parametrize("options", [{}, {"dequantize": True}])
@pytest.mark.parametrize("damage", DAMAGES)
def test_altered_tensors_are_refused_by_digest(packed_folder, damage, options):
    change, message = DAMAGES[damage]
    rewrite(packed_folder, change)
    with pytest.raises(FormatError, match=message):
        load(packed_folder, **options)
    assert load(packed_folder, check_digests=False, **options) is not None


WRONG = {
    "values missing": (lambda t, m: t.pop(VALUES), f"{VALUES} is missing"),
    "ids of another shape": (lambda t, m: t.update({IDS: t[IDS][:, :2].clone()}), f"{IDS}: U8"),
    "ids of another dtype": (lambda t, m: t.update({IDS: t[IDS].to(torch.int8)}), f"{IDS}: I8"),
    "integer values": (lambda t, m: t.update({VALUES: t[VALUES].to(torch.int32)}), f"{VALUES}: dtype I32"),
    "ids that are none": (lambda t, m: t[IDS].fill_(0), f"{IDS}: byte 0 of row 0"),
    "a later version": (lambda t, m: m.update({"nmsparse.format_version": "3"}), "upgrade hf-nmsparse"),
    "no version": (lambda t, m: m.update({"nmsparse.format_version": "x"}), "is no version"),
    "ids missing": (lambda t, m: [t.pop(n) for n in list(t) if n.endswith("_idx")], "no packed tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_refused_even_without_digests(packed_folder, wrong):
    change, message = WRONG[wrong]
    rewrite(packed_folder, change)
    with pytest.raises(FormatError, match=message):
        load(packed_folder, check_digests=False)


def test_damaged_file_and_later_config_are_refused(packed_folder):
    rewrite_config(packed_folder, format_version=3, novelty=True)
    with pytest.raises(FormatError, match="upgrade hf-nmsparse"):
        load(packed_folder)
    rewrite_config(packed_folder, format_version=1)
    with pytest.raises(ConfigError, match="novelty"):
        load(packed_folder)
    path = packed_folder / "model.safetensors"
    quantizer = PackedQuantizer(PackedConfig(), pre_quantized=True)
    path.write_bytes(path.read_bytes()[:1000])
    model = tiny_model()
    with pytest.raises(FormatError, match="no sound safetensors"):
        quantizer.preprocess_model(model, checkpoint_files=[str(path)])
    with pytest.raises(FormatError, match="stored as safetensors"):
        quantizer.preprocess_model(model, checkpoint_files=["pytorch_model.bin"])
    assert num_packed(model) == 0


# --- registration ---------------------------------------------------------------------------------------------------
def test_registering_twice_changes_nothing():
    before = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register()
    register()
    assert before == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert before.count(PackedConfig) == 1
    assert auto.AUTO_QUANTIZER_MAPPING["nmsparse"] is PackedQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["nmsparse"] is PackedConfig


def test_without_the_plugin_loading_fails_and_gives_no_random_model(packed_folder, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "nmsparse")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "nmsparse")
    with pytest.raises(RuntimeError, match="mismatch"):
        load(packed_folder)


@pytest.mark.slow
def test_a_process_that_does_not_import_the_package_fails(packed_folder):
    code = (
        "from transformers import AutoModelForCausalLM; import sys; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code, packed_folder], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "Unknown quantization type, got nmsparse" in done.stderr + done.stdout


@pytest.mark.slow
def test_whole_model_compiles_without_graph_breaks(packed_folder):
    model = load(packed_folder)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(TOKENS).logits
    torch.testing.assert_close(compiled, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trainer_fine_tunes_a_loaded_packed_model(packed_folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = load(packed_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "tuned")
    tuned = load(tmp_path / "tuned")
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(before[name], tensor) == name.endswith("weight_idx"), name
    assert torch.equal(logits(tuned), logits(model.eval()))


def test_without_the_import_neither_a_packed_model_nor_a_mask_loads_silently(make_llama, tmp_path):
    """What someone sees who forgets it: an error that names the method, never random weights."""
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    mask = nms.save_mask(get_peft_model(make_llama(), nms.NMSparseConfig()), tmp_path / "mask")
    nms.prune(base, "magnitude", progress=False)
    nms.compress(base).save_pretrained(tmp_path / "packed")
    program = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, packed, mask = sys.argv[1:]
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(packed),
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), mask),
):
    try:
        load()
    except (RuntimeError, KeyError, ValueError) as error:
        print("refused", type(error).__name__, str(error)[:200].replace(chr(10), " "))
print("hf_nmsparse" in sys.modules)
"""
    folders = [str(folder) for folder in (tmp_path / "base", tmp_path / "packed", mask)]
    run = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True)
    first, second, imported = run.stdout.splitlines()
    assert imported == "False"
    assert first.startswith("refused RuntimeError") and "Unknown quantization type, got nmsparse" in run.stderr
    assert second.startswith("refused") and "NMSPARSE" in second
