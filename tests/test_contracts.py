# SPDX-License-Identifier: Apache-2.0
"""The promises of the design, one test each on the whole line; the details are tested in each room."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError
from hf_nmsparse.files import staged_folder, write_file
from hf_nmsparse.ops import NoiseKey, SamplingState


def learn(model, tokens, folder, **changes):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.03,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )
    nms.NMSparseTrainer(model=model, args=arguments, train_dataset=TokenWindows(tokens)).train()
    return model.eval()


@pytest.fixture
def learned(make_llama, tokens, tmp_path):
    return learn(get_peft_model(make_llama(), NMSparseConfig()), tokens, tmp_path / "run")


def test_1_frozen_means_frozen(make_llama, learned):
    trained = {n.replace(".base_layer", ""): t for n, t in learned.get_base_model().state_dict().items()}
    for name, value in make_llama().state_dict().items():
        assert torch.equal(trained[name], value)


@pytest.mark.parametrize("terms", [{"slorb_block": 8}, {"low_rank": 2}])
def test_2_a_term_beside_the_mask_merges_dense_with_a_warning_and_packs_live(make_llama, tokens, tmp_path, terms):
    model = learn(get_peft_model(make_llama(), NMSparseConfig(**terms)), tokens, tmp_path)
    expected = model(tokens).logits
    packed = nms.compress(copy.deepcopy(model))
    assert isinstance(packed.model.layers[0].mlp.up_proj, nms.SparseLinear24)
    assert torch.allclose(packed(tokens).logits, expected, atol=1e-6)
    with pytest.warns(UserWarning, match="merged weights are dense"):
        merged = model.merge_and_unload()
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert ops.count_groups(weight, NMPattern("2:4")).over > 0
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)


def test_2_a_change_of_kept_weights_merges_to_n_of_m(make_llama, tokens, tmp_path):
    model = learn(get_peft_model(make_llama(), NMSparseConfig(delta_rank=2)), tokens, tmp_path)
    expected = model(tokens).logits
    merged, base = model.merge_and_unload(), make_llama()
    assert torch.equal(merged(tokens).logits, expected)
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert ops.count_groups(weight, NMPattern("2:4")).over == 0
    assert not torch.equal(weight[weight != 0], base.model.layers[0].mlp.up_proj.weight[weight != 0])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_2_merge_is_exact(make_llama, tokens, tmp_path, pattern):
    model = learn(get_peft_model(make_llama(), NMSparseConfig(pattern=pattern)), tokens, tmp_path)
    names = list(mask_layers(model))
    merged, base = model.merge_and_unload(), make_llama()
    for name in names:
        weight, original = merged.get_submodule(name).weight, base.get_submodule(name).weight
        kept = weight != 0
        assert type(merged.get_submodule(name)) is torch.nn.Linear
        assert torch.equal(weight[kept], original[kept])
        assert ops.count_groups(weight, NMPattern(pattern)).over == 0
        assert not torch.signbit(weight[~kept]).any()  # pruned weights are +0
    if pattern != "4:8":
        before = {name: merged.get_submodule(name).weight.clone() for name in names}
        restored = nms.decompress(nms.compress(merged))
        assert all(torch.equal(restored.get_submodule(name).weight, before[name]) for name in names)


def test_3_a_mask_comes_from_logits_and_never_from_zeros(make_llama):
    base = make_llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model = get_peft_model(base, NMSparseConfig(init_weights=False))
    layer = mask_layers(model)["model.layers.0.mlp.up_proj"]
    expected = ops.codes_to_mask(
        ops.hard_codes(layer.nmsparse_logits["default"].weight, NMPattern("2:4"), 32), NMPattern("2:4"), 32
    )
    assert torch.equal(layer.hard_mask("default"), expected)
    packed = nms.compress(model).get_submodule("model.layers.0.mlp.up_proj")
    kept = torch.zeros_like(expected).scatter_(1, ops.columns_of_24(packed.weight_idx), True)
    assert torch.equal(kept, expected)


def test_4_checkpoints_and_published_masks_are_never_confused(learned, base_folder, tmp_path):
    learned.save_pretrained(tmp_path / "checkpoint")
    nms.save_mask(learned, tmp_path / "mask")
    with pytest.raises(ConfigError, match="training checkpoint"):
        nms.load_mask(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="contains codes, not logits"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "mask", is_trainable=True
        )


def test_5_the_wrong_base_is_refused_before_any_output(learned, make_llama, tokens, tmp_path):
    nms.save_mask(learned, tmp_path)
    stranger = make_llama()
    with torch.no_grad():
        stranger.model.layers[1].self_attn.v_proj.weight += 0.01
    model = PeftModel.from_pretrained(stranger, tmp_path)
    with pytest.raises(BaseModelMismatchError, match="v_proj"):
        model(tokens)
    with pytest.raises(BaseModelMismatchError, match="v_proj"):
        model.merge_and_unload()


def test_6_nothing_is_half_done(make_llama, tokens, tmp_path):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    poisoned = copy.deepcopy(model)
    with torch.no_grad():
        poisoned.model.layers[1].input_layernorm.weight[0] = float("nan")
    untouched = copy.deepcopy(poisoned.state_dict())
    with pytest.raises(nms.errors.NMSparseError, match=r"layers\.1"):
        nms.prune(poisoned, "wanda", calibration=tokens, progress=False)
    for name, value in poisoned.state_dict().items():
        assert torch.equal(value.nan_to_num(), untouched[name].nan_to_num())
    with pytest.raises(TypeError):
        nms.compress(model)  # nothing in it is 2:4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    (tmp_path / "kept.txt").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path) as staging:
        (staging / "kept.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "kept.txt").read_text() == "old"
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_7_terms_on_disk_are_the_documented_ones(make_llama, tokens, tmp_path):
    from safetensors.torch import load_file

    config = NMSparseConfig(slorb_block=20, low_rank=3, delta_rank=2, relaxation="elementwise")
    model = learn(get_peft_model(make_llama(), config), tokens, tmp_path / "run")
    nms.save_mask(model, tmp_path / "mask")
    model.save_pretrained(tmp_path / "checkpoint")
    nms.compress(model).save_pretrained(tmp_path / "packed")
    layer, out, width = "model.layers.0.mlp.down_proj", 32, 48
    shapes = {
        "nmsparse_slorb": (out, 3),
        "nmsparse_low_rank_a": (3, width),
        "nmsparse_low_rank_b": (out, 3),
        "nmsparse_delta_a": (2, width),
        "nmsparse_delta_b": (out, 2),
    }
    mask = load_file(tmp_path / "mask" / "adapter_model.safetensors")
    checkpoint = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    for stored in (mask, checkpoint):
        found = {name: stored[f"base_model.model.{layer}.{name}.weight"].shape for name in shapes}
        assert found == shapes
    assert checkpoint[f"base_model.model.{layer}.nmsparse_logits.weight"].shape == (out, width)
    assert packed[f"{layer}.weight_slorb"].shape == (out, 3)
    assert packed[f"{layer}.weight_low_rank_a"].shape == (3, width)
    assert packed[f"{layer}.weight_low_rank_b"].shape == (out, 3)
    assert not [name for name in packed if "delta" in name]


def test_7_formats_on_disk_are_the_documented_ones(learned, tmp_path):
    from safetensors.torch import load_file

    nms.save_mask(learned, tmp_path / "mask")
    learned.save_pretrained(tmp_path / "checkpoint")
    nms.compress(learned).save_pretrained(tmp_path / "packed")
    layer, out, width = "model.layers.0.mlp.down_proj", 32, 48
    mask = load_file(tmp_path / "mask" / "adapter_model.safetensors")
    logits = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    assert mask[f"base_model.model.{layer}.nmsparse_packed"].shape == (out, width // 12)
    assert logits[f"base_model.model.{layer}.nmsparse_logits.weight"].shape == (out, 6, width // 4)
    assert packed[f"{layer}.weight"].shape == (out, width // 2)
    assert packed[f"{layer}.weight_idx"].shape == (out, width // 8)
    assert packed[f"{layer}.weight_idx"].dtype == torch.uint8


def test_8_which_path_runs_can_be_asked(learned, tokens):
    packed = nms.compress(learned)
    layer = packed.model.layers[0].mlp.up_proj
    layer.memory = "low"
    low = nms.explain(layer, tokens=128)
    layer.memory = "fast"
    fast = nms.explain(layer, tokens=128)
    assert low.backend != fast.backend and low.resident_bytes < fast.resident_bytes


def test_9_everything_runs_without_accelerators():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as on macOS and Windows
        "import torch, hf_nmsparse as nms\n"
        "from torch import nn\n"
        "layer = nn.Linear(16, 8)\n"
        "layer.weight.data *= nms.ops.top_n_mask(layer.weight.data.abs(), nms.NMPattern('2:4'))\n"
        "packed = nms.SparseLinear24.from_linear(layer, layer.weight.data != 0)\n"
        "x = torch.randn(2, 16)\n"
        "assert torch.allclose(packed(x), layer(x), atol=1e-6)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 0, finished.stderr


def test_10_noise_depends_on_its_key_alone():
    pattern, key = NMPattern("2:4"), NoiseKey.for_layer(1, "layer")
    logits = torch.zeros(6, 6, 8)
    state = SamplingState.of(1.0, 100.0, step=7, draw=2)
    whole = ops.soft_mask(logits, pattern, 32, key, state)
    torch.manual_seed(99)
    torch.randn(5)
    assert torch.equal(ops.soft_mask(logits, pattern, 32, key, state), whole)
    # Frozen with format version 1: runs that are resumed, and every backend, must see these numbers.
    golden = torch.tensor([0.625987, 0.133371, 0.324974, 0.915669])
    torch.testing.assert_close(whole[0, :4], golden, rtol=1e-5, atol=1e-6)
