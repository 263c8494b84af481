# SPDX-License-Identifier: Apache-2.0
"""Packed 2:4 layers whose kept values are int8 or int4: codec, layer, files, and activation-aware scaling."""

import copy
import json
import logging
import pickle

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tests_support import rewrite
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig, PackedConfig, SparseLinear24, ops
from hf_nmsparse.cli.inspect import _packed as inspected
from hf_nmsparse.criteria import InputStatistics, find_weights, rounded_weight, search_input_scale, search_input_scales
from hf_nmsparse.errors import ConfigError, FormatError, NMSparseError, PatternError, UnsupportedError
from hf_nmsparse.fingerprint import digest, to_hex
from hf_nmsparse.packed import compress, config, packed_sizes
from hf_nmsparse.pattern import NMPattern

KINDS = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UP = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`", "ignore:Attempting to save a model")


def magnitude_mask(weight):
    return ops.top_n_mask(weight.detach().abs(), NMPattern(2, 4))


def masks_of(model):
    return {name: magnitude_mask(target.dense()) for name, target in find_weights(model).items()}


def masked(model):
    for target in find_weights(model).values():
        weight = target.dense()
        weight.mul_(magnitude_mask(weight))
    return model


def packed_layer(kind, in_features=136, out_features=6, dtype=torch.float32, scaled=True, cls=nn.Linear):
    """A dense layer, its mask, its input scale and the same packed."""
    dense = (cls(in_features, out_features) if cls is nn.Linear else cls(out_features, in_features)).to(dtype)
    weight = dense.weight if cls is nn.Linear else dense.weight.t()
    mask, scale = magnitude_mask(weight), torch.rand(in_features).add(0.5) if scaled else None
    return dense, mask, scale, SparseLinear24.from_linear(dense, mask, "low", values=kind, input_scale=scale)


def packed_llama(make_llama, kind="int4", dtype=torch.float32, scaled=True):
    model = masked(make_llama(dtype))
    scales = {UP: torch.rand(32) + 0.5} if scaled else None
    return compress(model, memory="low", values=kind, input_scales=scales)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def assert_same_tensors(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def load(folder, **options):
    given = PackedConfig(**{"memory": "low", **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)


# --- codec ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("in_features", [8, 16, 120, 128, 136, 200, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codec_rounds_to_the_nearest_within_half_a_step(kind, in_features, dtype):
    kept = torch.randn(5, in_features // 2).to(dtype)
    kept[1, :4] = 0
    values, scale = ops.quantize_values(kept, kind)
    assert scale.shape == (5, -(-in_features // 128)) and scale.dtype == dtype
    assert values.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert values.shape == (5, in_features // (2 if kind == "int8" else 4))
    found = ops.dequantize_values(values, scale)
    step = scale.float().repeat_interleave(64, 1)[:, : in_features // 2]
    assert bool(((found - kept.float()).abs() <= 0.5001 * step).all())
    assert bool((found[1, :4] == 0).all())
    whole = values.int() if kind == "int8" else ops.unpack_nibbles(values).int()
    assert int(whole.abs().max()) == ops.LARGEST[kind]


def test_codec_of_zeros_and_bytes_of_nibbles():
    values, scale = ops.quantize_values(torch.zeros(2, 8), "int4")
    assert values.tolist() == [[0x88] * 4] * 2 and scale.tolist() == [[0.0]] * 2
    assert bool((ops.dequantize_values(values, scale) == 0).all())
    assert ops.pack_nibbles(torch.tensor([[1, -2, 7, -7]], dtype=torch.int8)).tolist() == [[0x69, 0x1F]]


# --- the layer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_computes_with_the_rounded_weight(kind, dtype, scaled, cls):
    dense, mask, scale, packed = packed_layer(kind, dtype=dtype, scaled=scaled, cls=cls)
    rows = (dense.weight if cls is nn.Linear else dense.weight.t()).detach() * mask
    scale = None if scale is None else scale.to(dtype)
    expected = rounded_weight(rows, kind, scale).to(dtype)
    assert torch.equal(packed.dequantize(), expected) and not bool(packed.dequantize()[~mask].any())
    assert (packed.weight_input_scale is not None) == scaled
    x = torch.randn(3, 136).to(dtype)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, expected, dense.bias), rtol=2e-2, atol=2e-2)
    back = packed.to_linear()
    assert type(back) is cls and back.weight.dtype == dtype and back.bias is dense.bias
    assert torch.equal(back.weight, expected if cls is nn.Linear else expected.t())
    assert packed.to_linear(torch.float64).weight.dtype == torch.float64


def test_input_scale_is_a_factor_of_each_column():
    _, _, scale, packed = packed_layer("int8")
    weight = packed.weight24
    spread = ops.unpack_24(ops.dequantize_values(weight.values, weight.scale), weight.ids)
    assert torch.equal(weight.dense(), spread * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_the_layer(kind):
    _, _, _, packed = packed_layer(kind, dtype=torch.bfloat16)
    assert list(packed.state_dict()) == ["weight", "weight_idx", "weight_scale", "weight_input_scale", "bias"]
    assert all(isinstance(tensor, nn.Parameter) for tensor in packed.state_dict(keep_vars=True).values())
    assert [name for name, tensor in packed.named_parameters() if tensor.requires_grad] == ["bias"]
    assert packed.weight.shape == (6, 68 if kind == "int8" else 34)
    assert packed.weight_scale.shape == (6, 2) and packed.weight_scale.dtype == torch.bfloat16
    assert packed.weight_input_scale.shape == (136,) and packed.weight24.kind == kind
    assert f"values={kind}" in repr(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_casting_moves_scales_and_leaves_values(kind):
    _, _, _, packed = packed_layer(kind)
    before = packed.weight.clone()
    for cast in (lambda: packed.to(torch.float16), packed.double, lambda: packed.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(packed.weight, before) and packed.weight.dtype == before.dtype
        dtype = packed.weight_scale.dtype
        assert packed.weight_input_scale.dtype == packed.bias.dtype == packed.dequantize().dtype == dtype
        assert packed(torch.randn(2, 136, dtype=dtype)).dtype == dtype
    assert dtype == torch.bfloat16 and packed.half().weight_scale.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_are_bit_equal(kind):
    _, _, _, packed = packed_layer(kind)
    x = torch.randn(3, 136)
    fresh = SparseLinear24(136, 6, memory="low", values=kind, input_scale=True)
    fresh.load_state_dict(packed.state_dict())
    empty = SparseLinear24(136, 6, device="meta", memory="low", values=kind, input_scale=True)
    empty.load_state_dict(packed.state_dict(), assign=True)
    for clone in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), fresh, empty):
        assert_same_tensors(clone, packed)
        assert torch.equal(clone(x), packed(x))
    with pytest.raises(RuntimeError, match="weight_input_scale"):
        SparseLinear24(136, 6, values=kind).load_state_dict(packed.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_is_valid(kind):
    layer = SparseLinear24(136, 6, values=kind, input_scale=True)
    assert torch.isfinite(layer(torch.randn(2, 136))).all() and bool(layer.dequantize().any())
    assert float(layer.dequantize().abs().max()) <= 68**-0.5 * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_to_the_input(kind):
    _, _, _, packed = packed_layer(kind)
    x = torch.randn(3, 136, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 136))
    assert packed.weight_scale.grad is None and packed.bias.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layer_follows_its_scales(kind):
    _, _, _, packed = packed_layer(kind)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 136)
    torch.testing.assert_close(compiled(x), packed(x))
    with torch.no_grad():
        packed.weight_scale.mul_(2)
    torch.testing.assert_close(compiled(x), packed(x))


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_input_scale"])
def test_a_kept_dense_weight_is_never_stale(leaf):
    _, _, _, packed = packed_layer("int8")
    packed.memory = "fast"
    x = torch.randn(300, 136)
    with torch.no_grad():
        packed(x), packed(x)
        getattr(packed, leaf).mul_(2 if leaf != "weight" else 0)
        for _ in range(3):
            expected = nn.functional.linear(x, packed.dequantize(), packed.bias)
            torch.testing.assert_close(packed(x), expected, rtol=1e-3, atol=1e-3)


def test_wrong_layers_are_refused():
    dense, mask, _, _ = packed_layer("int8")
    with pytest.raises(ConfigError, match="int5"):
        SparseLinear24(8, 4, values="int5")
    with pytest.raises(ConfigError, match="quantised values"):
        SparseLinear24(8, 4, input_scale=True)
    with pytest.raises(ConfigError, match="quantised values"):
        SparseLinear24.from_linear(dense, mask, input_scale=torch.ones(136))
    for wrong in (torch.ones(8), torch.zeros(136), torch.full((136,), torch.inf)):
        with pytest.raises(PatternError, match="input scale"):
            SparseLinear24.from_linear(dense, mask, values="int8", input_scale=wrong)


# --- models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_the_model_is_bit_equal(make_llama, tokens, tmp_path, kind, scaled, dtype):
    model = packed_llama(make_llama, kind, dtype, scaled)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for loaded in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")):
        assert_same_tensors(loaded, model)
        frozen = {name for name, tensor in loaded.named_parameters() if not tensor.requires_grad}
        assert {name for name in frozen if name.startswith(UP)} == {
            name for name in loaded.state_dict() if name.startswith(UP)
        }
    assert torch.equal(logits(load(tmp_path), tokens), logits(model, tokens))
    assert nms.verify(tmp_path).ok and nms.verify(model).ok


@pytest.mark.parametrize("kind", KINDS)
def test_stored_form_is_the_documented_one(make_llama, tmp_path, kind):
    packed_llama(make_llama, kind).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["values"], stored["format_version"]) == (kind, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{UP}.weight"].shape == (48, 16 if kind == "int8" else 8)
    assert tensors[f"{UP}.weight_scale"].shape == (48, 1) and tensors[f"{UP}.weight_input_scale"].shape == (32,)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        header = handle.metadata()
    assert header["nmsparse.format_version"] == "2"
    for leaf in ("weight", "weight_idx", "weight_scale", "weight_input_scale"):
        assert header[f"nmsparse.digest.{UP}.{leaf}"] == to_hex(digest(tensors[f"{UP}.{leaf}"]))


def test_dense_values_are_still_written_as_version_1_and_a_version_1_reader_refuses_quantised_ones(
    make_llama, tmp_path, monkeypatch
):
    compress(masked(make_llama())).save_pretrained(tmp_path / "dense")
    packed_llama(make_llama).save_pretrained(tmp_path / "int4")
    monkeypatch.setattr(config, "FORMAT_VERSION", 1)
    assert load(tmp_path / "dense") is not None
    with pytest.raises(FormatError, match="upgrade hf-nmsparse"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    quantization = json.loads((tmp_path / "int4" / "config.json").read_text())
    quantization["quantization_config"] |= {"format_version": 1, "values": "dense"}  # the files say it too
    (tmp_path / "int4" / "config.json").write_text(json.dumps(quantization))
    with pytest.raises(FormatError, match=r"format_version=2.*upgrade hf-nmsparse"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_models_compute_the_same(make_llama, tokens, tmp_path, kind):
    model = packed_llama(make_llama, kind, torch.bfloat16)
    expected = {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, SparseLinear24)}
    model.save_pretrained(tmp_path)
    assert len(expected) == 14
    for dense in (load(tmp_path, dequantize=True), load(tmp_path).dequantize(), nms.decompress(model)):
        assert not any(isinstance(module, SparseLinear24) for module in dense.modules())
        for name, weight in expected.items():
            assert torch.equal(dense.get_submodule(name).weight, weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_while_loading_equals_compress(make_llama, base_folder, tmp_path, kind):
    loaded = load(base_folder, values=kind)
    assert_same_tensors(loaded, nms.compress(masked(make_llama()), values=kind))
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(load(tmp_path / "again"), loaded)
    model = get_peft_model(make_llama(), NMSparseConfig(init_weights=False, seed=5, slorb_block=8)).eval()
    nms.save_mask(model, tmp_path / "mask")
    by_mask = load(base_folder, values=kind, mask=tmp_path / "mask")
    assert_same_tensors(by_mask, nms.compress(model, values=kind))


def test_accelerate_without_files_to_look_into_is_refused(make_llama, tmp_path):
    packed_llama(make_llama).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(UnsupportedError, match=r"values='int4'.*from_pretrained"):
        loaded.hf_quantizer.preprocess_model(empty)


def test_offloaded_to_disk_it_computes_the_same_and_saves_again(make_llama, tokens, tmp_path):
    model = packed_llama(make_llama)
    model.save_pretrained(tmp_path / "packed")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=places, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(offloaded, tokens), logits(model, tokens))
    assert offloaded.get_submodule(UP).weight_scale.is_meta
    offloaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(load(tmp_path / "again"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_top(make_llama, tokens, kind):
    model = packed_llama(make_llama, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(tokens, labels=tokens).loss.item()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    assert model(tokens, labels=tokens).loss.item() < first
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_sizes_count_bits_a_weight(make_llama, tmp_path):
    for kind, bits in (("int8", 5.125), ("int4", 3.125)):
        model = masked(make_llama(torch.bfloat16, hidden_size=128, intermediate_size=256, num_key_value_heads=4))
        weights = sum(target.dense().numel() for target in find_weights(model).values())
        sizes = packed_sizes(compress(model, values=kind))
        assert 8 * sizes.packed / weights == bits
        assert sizes.dense == sizes.dense_bf16 == 2 * weights and sizes.ratio == bits / 16
        model.save_pretrained(tmp_path / kind)
        facts = inspected(tmp_path / kind)
        assert (facts["values"], facts["bits_per_weight"], facts["ratio"]) == (kind, bits, bits / 16)


def test_a_model_stores_one_kind_of_values(make_llama):
    model = masked(make_llama())
    masks = masks_of(model)
    compress(model, {UP: masks.pop(UP)}, values="int8")
    with pytest.raises(UnsupportedError, match=f"{UP} is packed with int8 values"):
        compress(model, masks, values="int4")
    assert packed_sizes(compress(model, masks, values="int8")).layers == 14
    for options, message in (
        ({"values": "int8", "input_scales": {"lm_head": torch.ones(32)}}, "'lm_head' names no layer"),
        ({"input_scales": {UP: torch.ones(32)}}, "serves quantised values"),
        ({"values": "int3"}, "int3"),
    ):
        fresh = masked(make_llama())
        with pytest.raises(ConfigError, match=message):
            compress(fresh, **options)
        assert packed_sizes(fresh).layers == 0


# --- damaged files --------------------------------------------------------------------------------------------------
SCALE, INPUT_SCALE = f"{UP}.weight_scale", f"{UP}.weight_input_scale"
WRONG = {
    "scale missing": (lambda t, h: t.pop(SCALE), "weight_scale is missing though weight_input_scale"),
    "both scales missing": (lambda t, h: (t.pop(SCALE), t.pop(INPUT_SCALE)), f"{UP}.weight: dtype U8"),
    "scale of another width": (lambda t, h: t.update({SCALE: torch.ones(48, 2)}), r"weight_scale: shape \[48, 2\]"),
    "scale of another dtype": (lambda t, h: t.update({SCALE: t[SCALE].int()}), "weight_scale: dtype I32"),
    "scale not finite": (lambda t, h: t[SCALE].fill_(torch.nan), "weight_scale: a scale is not finite"),
    "negative scale": (lambda t, h: t[SCALE].neg_(), "weight_scale: a scale is not finite, or below 0"),
    "input scale infinite": (lambda t, h: t[INPUT_SCALE].fill_(torch.inf), "weight_input_scale: a scale is not"),
    "input scale of another layer": (lambda t, h: t.update({INPUT_SCALE: torch.ones(48)}), r"shape \[48\]"),
    "floats beside a scale": (lambda t, h: t.update({f"{UP}.weight": torch.ones(48, 16)}), "F32 beside weight_scale"),
    "int8 values in an int4 model": (
        lambda t, h: t.update({f"{UP}.weight": torch.ones(48, 16, dtype=torch.int8)}),
        "holds int8 values, but quantization_config says 'int4'",
    ),
    "values of another width": (
        lambda t, h: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, :4].clone()}),
        r"\[out, in/4\]",
    ),
    "stray scale": (lambda t, h: t.update({"lm_head.weight_scale": torch.ones(64, 1)}), "lies beside no packed layer"),
    "version 1": (lambda t, h: h.update({"nmsparse.format_version": "1"}), "header says format version 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_refused_even_without_digests(make_llama, tmp_path, wrong):
    packed_llama(make_llama).save_pretrained(tmp_path)
    change, message = WRONG[wrong]
    rewrite(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path, check_digests=False)
    with pytest.raises(FormatError):
        nms.verify(tmp_path)


def test_dense_values_of_version_2_are_refused(make_llama, tmp_path):
    compress(masked(make_llama())).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors, header: header.update({"nmsparse.format_version": "2"}))
    with pytest.raises(FormatError, match=r"dense values .* format version 2"):
        load(tmp_path)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_input_scale"])
def test_altered_tensors_are_refused_by_digest(make_llama, tmp_path, leaf):
    packed_llama(make_llama).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors, header: tensors[f"{UP}.{leaf}"].view(torch.uint8).bitwise_xor_(1))
    with pytest.raises(FormatError, match=f"{UP}.{leaf}: digest"):
        load(tmp_path)
    assert load(tmp_path, check_digests=False) is not None


# --- activation-aware scaling ---------------------------------------------------------------------------------------
def statistics_of(x):
    return InputStatistics(len(x), x.square().mean(0), x.T @ x / len(x), magnitude=x.abs().mean(0))


def output_error(weight, rounded, x):
    return float((x @ (rounded - weight).T).square().sum(1).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_never_does_worse_than_rounding_and_better_with_outliers(kind, outliers, dtype):
    weight = torch.randn(24, 136).to(dtype)
    weight *= magnitude_mask(weight)
    x = torch.randn(400, 136)
    x[:, :outliers] *= 40
    scale, report = search_input_scale(weight, statistics_of(x), kind)
    nearest = output_error(weight.float(), rounded_weight(weight, kind), x)
    found = output_error(weight.float(), rounded_weight(weight, kind, scale), x)
    assert found <= nearest * 1.00001 and (scale is None) == (report.alpha == 0)
    energy = float((x @ weight.float().T).square().sum(1).mean())
    assert report.nearest_error == pytest.approx(nearest / energy, rel=1e-3)
    assert report.error == pytest.approx(found / energy, rel=1e-3)
    if outliers:
        assert found < 0.6 * nearest and scale.dtype == dtype and scale[:3].max() < scale[3:].min()


def test_search_takes_inputs_that_are_never_used_and_weights_of_zeros():
    x = torch.randn(50, 16)
    x[:, 3] = 0
    scale, _ = search_input_scale(torch.randn(4, 16), statistics_of(x), "int4")
    assert scale is None or bool((scale.isfinite() & (scale > 0)).all())
    assert search_input_scale(torch.zeros(4, 16), statistics_of(x), "int4")[0] is None
    assert search_input_scale(torch.randn(4, 16), statistics_of(torch.zeros(5, 16)), "int4")[1].error == 0


def outlier_llama(make_llama):
    """A Llama some of whose hidden channels are large everywhere, as in trained ones."""
    model = make_llama()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data[:3] = 30
    return model


def test_compress_with_calibration_lowers_the_output_error(make_llama, tokens, caplog):
    model = outlier_llama(make_llama)
    masks = masks_of(model)
    reference = nms.compress(copy.deepcopy(model), masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nearest = nms.compress(copy.deepcopy(model), masks, values="int4")
    with caplog.at_level(logging.INFO, "hf_nmsparse"):
        scaled = nms.compress(model, masks, values="int4", calibration=tokens)
    assert "int4 values: mean relative output error" in caplog.text
    assert scaled is model and before.keys() != model.state_dict().keys()
    assert sum(layer.weight_input_scale is not None for layer in scaled.modules() if type(layer) is SparseLinear24) > 4
    wanted = logits(reference, tokens)
    assert (logits(scaled, tokens) - wanted).norm() < (logits(nearest, tokens) - wanted).norm()


def test_scales_come_from_the_masked_model_whatever_holds_its_masks(make_llama, tokens):
    dense = outlier_llama(make_llama)
    adapter = get_peft_model(copy.deepcopy(dense), NMSparseConfig(init_weights=False, seed=5)).eval()
    masks = {name: layer.hard_mask("default") for name, layer in nms.adapter.mask_layers(adapter).items()}
    plain = copy.deepcopy(dense)
    for name, mask in masks.items():
        plain.get_submodule(name).weight.data.mul_(mask)
    options = {"values": "int8", "calibration": tokens}
    by_masks = nms.compress(dense, masks, **options)
    assert any(name.endswith("weight_input_scale") for name in by_masks.state_dict())
    assert_same_tensors(nms.compress(adapter, **options), by_masks)
    assert_same_tensors(nms.compress(plain, **options), by_masks)


def test_side_branches_stay_live_beside_scaled_values(make_llama, tokens):
    config = NMSparseConfig(init_weights=False, seed=5, slorb_block=8, low_rank=2)
    adapter = get_peft_model(outlier_llama(make_llama), config).eval()
    expected = logits(adapter, tokens)
    model = nms.compress(adapter, values="int8", calibration=tokens)
    layer = model.get_submodule(UP)
    assert layer.branch is not None and layer.values == "int8" and layer.weight_slorb.dtype == torch.float32
    assert (logits(model, tokens) - expected).norm() < 0.05 * expected.norm()


def test_conv1d_is_scaled_along_its_inputs(tokens):
    model = masked(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval())
    for block in model.transformer.h:
        block.ln_1.weight.data[:3] = 30
    nearest, wanted = nms.compress(copy.deepcopy(model), values="int4"), logits(model, tokens)
    model = nms.compress(model, values="int4", calibration=tokens)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.conv1d and layer.weight_input_scale.shape == (32,)
    assert (logits(model, tokens) - wanted).norm() < (logits(nearest, tokens) - wanted).norm()


def test_layers_without_statistics_are_rounded_and_named(make_llama, tokens, caplog):
    model = make_llama(tie_word_embeddings=False)
    masks = masks_of(model) | {"lm_head": magnitude_mask(model.lm_head.weight)}
    model = nms.compress(model, masks, values="int4", calibration=tokens)
    assert "1 layers were not reached by the calibration data; they are rounded to the nearest: lm_head" in caplog.text
    assert model.lm_head.values == "int4" and model.lm_head.weight_input_scale is None


def test_a_failed_search_leaves_the_model_as_it_was(make_llama, tokens):
    model = masked(make_llama())
    model.model.layers[1].mlp.down_proj.weight.data[:, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="calibration"):
        nms.compress(model, values="int4", calibration=[])
    with pytest.raises(ConfigError, match="serves quantised values"):
        nms.compress(model, calibration=tokens)
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(NMSparseError, match="NaN"):
        nms.compress(model, masks_of(model), values="int4", calibration=tokens)
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert name.startswith(("model.embed", "lm_head")) or torch.equal(
            tensor.nan_to_num(), before[name].nan_to_num()
        )


def test_search_changes_nothing_and_takes_texts_and_padding(make_llama, tokens):
    model = outlier_llama(make_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets, masks = list(find_weights(model).values()), masks_of(model)
    whole = search_input_scales(model, targets, "int4", tokens[:, :12], masks=masks)
    padded = {"input_ids": tokens, "attention_mask": (torch.arange(16) < 12).long().expand(8, 16)}
    cut = search_input_scales(model, targets, "int4", [padded], masks=masks)
    assert whole.keys() == cut.keys() and len(whole) > 4
    for name, scale in whole.items():
        torch.testing.assert_close(cut[name], scale, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
