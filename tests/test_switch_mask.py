# SPDX-License-Identifier: Apache-2.0
"""`switch_mask`: another task's mask on a packed model, exactly as if the base had been loaded with it, or not at all."""

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig, PackedConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, FormatError, UnsupportedError

UP = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


def load_base(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_packed(folder, mask, dtype=torch.float32, **config):
    return load_base(folder, dtype=dtype, quantization_config=PackedConfig(mask=mask, **config))


def publish(base_folder, folder, seed, **config):
    model = get_peft_model(load_base(base_folder), NMSparseConfig(init_weights=False, seed=seed, **config)).eval()
    return nms.save_mask(model, folder)


@pytest.fixture
def masks(base_folder, tmp_path):
    return [publish(base_folder, tmp_path / name, seed) for seed, name in enumerate(("law", "code"))]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_loading_the_base_with_the_mask(base_folder, masks, tokens, dtype):
    law, code = (load_packed(base_folder, mask, dtype) for mask in masks)
    assert not torch.equal(law(tokens).logits, code(tokens).logits)
    base = load_base(base_folder, dtype=dtype)
    before = state_of(law)
    assert nms.switch_mask(law, base, masks[1]) is law
    assert_equal(law, state_of(code))
    assert torch.equal(law(tokens).logits, code(tokens).logits)
    assert_equal(nms.switch_mask(law, base, masks[0]), before)


def test_tensors_keep_their_place_and_a_kept_dense_weight_is_renewed(base_folder, masks, tokens):
    model = load_packed(base_folder, masks[0], memory="fast")
    with torch.no_grad():
        model(tokens), model(tokens)
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        nms.switch_mask(model, load_base(base_folder), masks[1])
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
        assert torch.equal(model(tokens).logits, load_packed(base_folder, masks[1])(tokens).logits)


def test_a_delta_switches_like_its_full_mask(base_folder, masks, tmp_path):
    model = get_peft_model(load_base(base_folder), NMSparseConfig())
    nms.set_prior(model, masks[0])
    layer = mask_layers(model)[UP]
    codes = layer.mask_codes("default")
    layer.set_prior_codes("default", torch.where(torch.arange(codes.shape[1]) == 2, (codes + 1) % 6, codes))
    full = nms.save_mask(model, tmp_path / "full")
    delta = nms.save_mask(model, tmp_path / "delta", delta_to=masks[0])
    switched = nms.switch_mask(load_packed(base_folder, masks[1]), load_base(base_folder), delta)
    assert_equal(switched, state_of(load_packed(base_folder, full)))


@pytest.mark.parametrize(
    "terms", [{"slorb_block": 8}, {"low_rank": 2}, {"delta_rank": 2}, {"slorb_block": 8, "low_rank": 2}]
)
def test_terms_come_and_go_with_their_mask(base_folder, masks, tmp_path, tokens, terms):
    with_terms = publish(base_folder, tmp_path / "terms", 7, **terms)
    model, base = load_packed(base_folder, masks[0]), load_base(base_folder)
    before = state_of(model)
    expected = load_packed(base_folder, with_terms)
    assert_equal(nms.switch_mask(model, base, with_terms), state_of(expected))
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert model.config.quantization_config.slorb_block == terms.get("slorb_block")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_base(tmp_path / "saved")(tokens).logits, expected(tokens).logits)
    assert_equal(nms.switch_mask(model, base, masks[0]), before)
    assert model.config.quantization_config.slorb_block is None


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_transposed_layers_and_fused_experts_switch_too(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    one, other = (publish(tmp_path / "base", tmp_path / str(seed), seed) for seed in (1, 2))
    model = nms.switch_mask(load_packed(tmp_path / "base", one), load_base(tmp_path / "base"), other)
    assert_equal(model, state_of(load_packed(tmp_path / "base", other)))


def test_layers_that_cannot_be_packed_switch_dense_with_zeros(make_llama, tmp_path):
    make_llama(intermediate_size=44).save_pretrained(tmp_path / "base")
    one, other = (publish(tmp_path / "base", tmp_path / str(seed), seed, slorb_block=4) for seed in (1, 2))
    model = nms.switch_mask(load_packed(tmp_path / "base", one), load_base(tmp_path / "base"), other)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear
    assert_equal(model, state_of(load_packed(tmp_path / "base", other)))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rounded_values_are_rounded_anew(base_folder, masks, values):
    model = load_packed(base_folder, masks[0], values=values)
    nms.switch_mask(model, load_base(base_folder), masks[1])
    assert_equal(model, state_of(load_packed(base_folder, masks[1], values=values)))


# --- refusals -------------------------------------------------------------------------------------------------------
def refused(error, match, model, *args):
    before = state_of(model)
    with pytest.raises(error, match=match):
        nms.switch_mask(model, *args)
    assert_equal(model, before)


def test_another_base_is_refused_unless_allowed(base_folder, masks):
    model, base = load_packed(base_folder, masks[0]), load_base(base_folder)
    with torch.no_grad():
        base.get_submodule(UP).weight.mul_(1.1)
    refused(BaseModelMismatchError, UP, model, base, masks[1])
    switched = nms.switch_mask(model, base, masks[1], allow_base_mismatch=True)
    kept = switched.get_submodule(UP).dequantize()
    assert torch.equal(kept, torch.where(kept != 0, base.get_submodule(UP).weight, 0)) and nms.verify(switched).ok


def test_masks_of_other_layers_are_refused(base_folder, masks, tmp_path):
    fewer = publish(base_folder, tmp_path / "fewer", 3, target_modules=["up_proj"])
    base = load_base(base_folder)
    refused(ConfigError, "has no mask for .* packed layers", load_packed(base_folder, masks[0]), base, fewer)
    other = publish(base_folder, tmp_path / "other", 3, target_modules=["up_proj", "down_proj"])
    switched = nms.switch_mask(load_packed(base_folder, fewer), base, other)  # down_proj becomes dense with zeros
    down = switched.get_submodule("model.layers.0.mlp.down_proj").weight
    assert torch.equal(
        down, load_packed(base_folder, other).get_submodule("model.layers.0.mlp.down_proj").dequantize()
    )
    model = load_packed(base_folder, fewer)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight[:, ::2] = 0
    refused(ConfigError, r"layers\.0\.mlp\.down_proj: the mask leaves this layer", model, base, fewer)


def test_what_is_not_packed_or_of_another_model_is_refused(base_folder, masks, make_llama, tmp_path):
    base = load_base(base_folder)
    refused(ConfigError, "has no packed layer", load_base(base_folder), base, masks[0])
    refused(
        FormatError,
        "of another layer",
        load_packed(base_folder, masks[0]),
        make_llama(intermediate_size=64),
        masks[1],
    )
    refused(
        UnsupportedError,
        "4:8",
        load_packed(base_folder, masks[0]),
        base,
        publish(base_folder, tmp_path / "m", 1, pattern="4:8"),
    )


def test_models_with_adapters_offloaded_or_of_inference_mode_are_refused(base_folder, masks):
    base = load_base(base_folder)
    refused(
        ConfigError,
        "base carries adapters",
        load_packed(base_folder, masks[0]),
        nms.load_mask(load_base(base_folder), masks[0]),
        masks[1],
    )
    offloaded = load_base(base_folder)
    offloaded.lm_head.weight = torch.nn.Parameter(offloaded.lm_head.weight.to("meta"))
    refused(UnsupportedError, "of the base is offloaded", load_packed(base_folder, masks[0]), offloaded, masks[1])
    with torch.inference_mode():
        model = load_packed(base_folder, masks[0])
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="made in inference mode"):
        nms.switch_mask(model, base, masks[1])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    with torch.inference_mode():
        nms.switch_mask(model, base, masks[1])
    assert_equal(model, state_of(load_packed(base_folder, masks[1])))


def test_a_damaged_mask_changes_nothing(base_folder, masks):
    file = masks[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{UP}.nmsparse_packed"][3, 1] ^= 1
    save_file(tensors, file)
    refused(FormatError, "up_proj", load_packed(base_folder, masks[0]), load_base(base_folder), masks[1])


def test_values_that_were_rounded_with_input_scales_are_refused(base_folder, masks, tokens):
    model = nms.load_mask(load_base(base_folder), masks[0])
    packed = nms.compress(model, values="int8", calibration=tokens, progress=False)
    if not any(getattr(layer, "weight_input_scale", None) is not None for layer in packed.modules()):
        pytest.skip("no input scale was worth it")
    refused(UnsupportedError, "input scales", packed, load_base(base_folder), masks[1])
