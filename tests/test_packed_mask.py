# SPDX-License-Identifier: Apache-2.0
"""`PackedConfig(mask=...)`: from a dense base and a published mask to a packed model in one call."""

import json
import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, HrmTextConfig
from transformers.pytorch_utils import Conv1D

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig, PackedConfig, SparseLinear24, ops, packed
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, FormatError, UnsupportedError
from hf_nmsparse.fingerprint import fingerprint
from hf_nmsparse.ops import SideBranch
from hf_nmsparse.packed import StoredLayerMask, StoredMask, branch, stored_mask
from hf_nmsparse.pattern import NMPattern

UP, DOWN, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`", "ignore:Attempting to save a model")


def publish(base, folder, **config):
    model = get_peft_model(base, NMSparseConfig(init_weights=False, seed=5, **config)).eval()
    return nms.save_mask(model, folder)


@pytest.fixture
def mask_folder(make_llama, tmp_path):
    return publish(make_llama(), tmp_path / "mask")


def load(folder, cls=AutoModelForCausalLM, dtype=None, **config):
    options = {} if dtype is None else {"dtype": dtype}
    return cls.from_pretrained(folder, quantization_config=PackedConfig(**config), **options)


def linear_weights(model):
    """Weights as `[out, in]` by layer name."""
    layers = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    return {name: layer.weight.t() if type(layer) is Conv1D else layer.weight for name, layer in layers.items()}


def stored(model, pattern="2:4", seed=0, layers=None, **terms):
    """A mask with random codes, and the masks `[out, in]` themselves; head and tied weights left out."""
    generator = torch.Generator().manual_seed(seed)
    pattern, weights = NMPattern(pattern), linear_weights(model)
    found, masks = {}, {}
    for name in layers or [name for name in weights if name != "lm_head"]:
        weight = weights[name].detach()
        mask = ops.top_n_mask(torch.rand(weight.shape, generator=generator), pattern)
        codes = ops.mask_to_codes(mask, pattern)
        masks[name] = mask
        found[name] = StoredLayerMask(
            ops.pack_codes(codes, pattern, weight.shape[1]), fingerprint(weight), **terms.get(name, {})
        )
    return StoredMask(pattern, found, "some/mask", "some/base", "abc"), masks


@pytest.fixture
def reader(monkeypatch):
    """Makes `PackedConfig(mask=...)` read a given mask."""

    def use(mask):
        monkeypatch.setattr(stored_mask, "_reader", lambda source, revision, task: mask)

    return use


def assert_same(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    dense = expected.config.quantization_config.modules_to_not_convert
    assert found.config.quantization_config.modules_to_not_convert == dense


def num_packed(model):
    return sum(isinstance(module, SparseLinear24) for module in model.modules())


# --- the same as load_mask and compress -----------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_load_mask_then_compress(make_llama, tmp_path, tokens, dtype, tied):
    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    folder = publish(make_llama(tie_word_embeddings=tied), tmp_path / "mask", dense_layers=["o_proj"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    expected = nms.compress(nms.load_mask(base, folder))
    found = load(tmp_path / "base", dtype=dtype, mask=folder)
    assert num_packed(found) == 12
    assert_same(found, expected)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_saved_it_is_an_ordinary_packed_model(base_folder, mask_folder, tmp_path, tokens):
    model = load(base_folder, mask=str(mask_folder), memory="low")
    assert {m.memory for m in model.modules() if isinstance(m, SparseLinear24)} == {"low"}
    model.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert not {"mask", "revision", "task", "allow_base_mismatch"} & config.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same(again, model)
    assert model.hf_quantizer._mask is None  # the codes are let go


def test_the_reader_gets_revision_and_task(make_llama, base_folder, monkeypatch):
    asked = []
    mask, _ = stored(make_llama())
    monkeypatch.setattr(stored_mask, "_reader", lambda *given: asked.append(given) or mask)
    load(base_folder, mask="user/mask", revision="v1", task="qa")
    assert asked == [("user/mask", "v1", "qa")]


def test_task_names_a_subfolder(make_llama, base_folder, tmp_path):
    publish(make_llama(), tmp_path / "masks" / "qa")
    assert num_packed(load(base_folder, mask=tmp_path / "masks", task="qa")) == 14


def test_a_plain_dict_does_it_too(base_folder, mask_folder):
    config = {"quant_method": "nmsparse", "mask": str(mask_folder)}
    assert num_packed(AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=config)) == 14


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:2"])
def test_patterns_inside_24_are_completed(make_llama, base_folder, reader, pattern):
    mask, masks = stored(make_llama(), pattern)
    reader(mask)
    assert_same(load(base_folder, mask="some/mask"), packed.compress(make_llama(), masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d(tmp_path, reader, dtype):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    mask, masks = stored(base)
    reader(mask)
    found = load(tmp_path, dtype=dtype, mask="some/mask")
    assert num_packed(found) == 8
    assert_same(found, packed.compress(base, masks))


def test_weights_from_other_dtypes_of_the_same_checkpoint_are_recognised(make_llama, tmp_path):
    make_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    folder = publish(make_llama(torch.bfloat16).float(), tmp_path / "mask")
    assert num_packed(load(tmp_path / "base", dtype=torch.float32, mask=folder)) == 14


# --- layers that are not packed -------------------------------------------------------------------------------------
def test_layers_without_mask_stay_dense_and_untouched(make_llama, base_folder, reader):
    mask, masks = stored(make_llama(), layers=[UP])
    reader(mask)
    found = load(base_folder, mask="some/mask")
    assert num_packed(found) == 1
    assert_same(found, packed.compress(make_llama(), masks))


def test_layers_with_odd_inputs_stay_dense_with_zeros(make_llama, tmp_path, reader, caplog):
    base = make_llama(intermediate_size=36)
    base.save_pretrained(tmp_path)
    mask, masks = stored(base)
    reader(mask)
    found = load(tmp_path, mask="some/mask")
    assert "2 layers stay dense with zeros" in caplog.text and f"{DOWN}: in_features=36" in caplog.text
    assert torch.equal(found.get_submodule(DOWN).weight == 0, ~masks[DOWN])
    assert_same(found, packed.compress(base, masks))


@pytest.mark.parametrize("leave_out", [[], ["self_attn.q_proj", "mlp.gate_proj"]])
def test_weights_that_checkpoints_store_fused_stay_dense_with_zeros(tmp_path, reader, caplog, leave_out):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = HrmTextConfig(**sizes, num_attention_heads=4, max_position_embeddings=32)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path)
    names = [n for n in linear_weights(base) if n != "lm_head" and not n.endswith(tuple(leave_out))]
    mask, masks = stored(base, layers=names)
    reader(mask)
    found = load(tmp_path, mask="some/mask")
    assert "store its weight fused" in caplog.text and num_packed(found) > 0
    assert_same(found, packed.compress(base, masks))
    found.save_pretrained(tmp_path / "packed")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), found)


# --- terms that come with a mask ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_goes_under_the_mask_and_the_branch_beside_it(make_llama, tmp_path, reader, caplog, dtype):
    base = make_llama(dtype, intermediate_size=36)
    base.save_pretrained(tmp_path)
    torch.manual_seed(1)
    delta = {"delta_a": torch.randn(2, 32), "delta_b": torch.randn(36, 2)}
    slorb = SideBranch(slorb=torch.randn(36, 4), slorb_block=8)
    low_rank = SideBranch(low_rank_a=torch.randn(2, 36), low_rank_b=torch.randn(32, 2))
    mask, masks = stored(base, **{UP: {**delta, "branch": slorb}, DOWN: {"branch": low_rank}})
    reader(mask)
    found = load(tmp_path, mask="some/mask")
    assert f"{DOWN}: in_features=36 is no multiple of 8, and its side branch is folded in" in caplog.text
    up = base.get_submodule(UP).weight.detach()
    changed = (up.float() + delta["delta_b"] @ delta["delta_a"]).to(dtype)
    base.get_submodule(UP).weight.data.copy_(changed)
    assert_same(found, packed.compress(base, masks, branches={UP: slorb, DOWN: low_rank}))
    assert torch.equal(found.get_submodule(UP).sparse_weight(), changed * masks[UP])
    assert found.config.quantization_config.slorb_block == 8
    assert type(found.get_submodule(DOWN)) is nn.Linear  # in_features=36: folded in
    assert torch.equal(found.get_submodule(UP).weight_slorb, slorb.slorb.to(dtype))


def test_one_block_size_for_all_branches(make_llama, base_folder, reader):
    sizes = {UP: (48, 32, 8), QUERY: (32, 32, 4)}
    branches = {
        name: {"branch": SideBranch(slorb=torch.zeros(rows, branch.num_blocks(columns, block)), slorb_block=block)}
        for name, (rows, columns, block) in sizes.items()
    }
    reader(stored(make_llama(), **branches)[0])
    with pytest.raises(UnsupportedError, match="blocks of 4, 8 inputs"):
        load(base_folder, mask="some/mask")


# --- refusals -------------------------------------------------------------------------------------------------------
def test_other_weights_are_refused(make_llama, base_folder, reader, caplog):
    other = make_llama()
    other.get_submodule(UP).weight.data.add_(1)
    mask, masks = stored(other)
    reader(mask)
    with pytest.raises(
        BaseModelMismatchError, match=f"1 of 14 layers differ, first {UP}.*'some/base', revision 'abc'"
    ):
        load(base_folder, mask="some/mask")
    found = load(base_folder, mask="some/mask", allow_base_mismatch=True)
    assert "loaded all the same" in caplog.text
    assert_same(found, packed.compress(make_llama(), masks))


def test_float16_gets_the_rounding_hint(base_folder, mask_folder):
    with pytest.raises(BaseModelMismatchError, match="These weights are in float16"):
        load(base_folder, dtype=torch.float16, mask=mask_folder)


def test_unknown_fingerprints_are_logged(make_llama, base_folder, reader, caplog):
    mask, _ = stored(make_llama())
    for layer in mask.layers.values():
        layer.base.zero_()
    reader(mask)
    with caplog.at_level(logging.WARNING):
        assert num_packed(load(base_folder, mask="some/mask")) == 14
    assert "14 layers of some/mask could not be checked" in caplog.text


@pytest.mark.parametrize("pattern", ["4:8", "3:4", "2:6"])
def test_patterns_outside_24_are_refused_before_any_file_is_read(make_llama, tmp_path, reader, pattern):
    make_llama().config.save_pretrained(tmp_path)  # no weights at all
    reader(stored(make_llama(), pattern)[0])
    with pytest.raises(UnsupportedError, match=f"is a {pattern} mask"):
        load(tmp_path, mask="some/mask")


def test_masks_for_other_layers_are_refused(make_llama, base_folder, reader):
    deeper = make_llama(num_hidden_layers=3)
    reader(stored(deeper)[0])
    with pytest.raises(FormatError, match=r"masks for 7 layers.*layers\.2"):
        load(base_folder, mask="some/mask")
    wider = make_llama(intermediate_size=64)
    reader(stored(wider)[0])
    with pytest.raises(FormatError, match="mask has 64 rows, the layer 48"):
        load(base_folder, mask="some/mask")
    mask, _ = stored(make_llama())
    mask.layers[UP].packed.fill_(255)
    reader(mask)
    with pytest.raises(FormatError, match=f"{UP}: .*encodes no 2:4 group"):
        load(base_folder, mask="some/mask")


def test_tied_and_missing_weights_are_refused(make_llama, tmp_path, reader):
    base = make_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path)
    reader(stored(base, layers=["lm_head", UP])[0])
    with pytest.raises(UnsupportedError, match="lm_head: its weight is tied"):
        load(tmp_path, mask="some/mask")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=8)
    reader(stored(classifier, layers=["score", UP])[0])
    with pytest.raises(BaseModelMismatchError, match="checkpoint holds none for 1 of 2 layers, first score"):
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=8, quantization_config=PackedConfig(mask="some/mask")
        )


def test_a_packed_checkpoint_takes_no_mask(base_folder, mask_folder, tmp_path):
    load(base_folder, mask=mask_folder).save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="on a packed checkpoint"):
        load(tmp_path / "packed", mask=mask_folder)
    path = tmp_path / "packed" / "config.json"  # nor does a config on disk name one
    config = json.loads(path.read_text())
    config["quantization_config"].update(mask="some/mask", modules_to_not_convert=None)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="on a packed checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_without_a_reader_it_says_what_to_import(base_folder, monkeypatch):
    monkeypatch.setattr(stored_mask, "_reader", None)
    with pytest.raises(ConfigError, match="import hf_nmsparse"):
        load(base_folder, mask="some/mask")


def test_registering_again_keeps_the_reader(monkeypatch):
    monkeypatch.setattr(stored_mask, "_reader", stored_mask._reader)
    before = stored_mask._reader
    packed.register()
    assert stored_mask._reader is before and before is not None


@pytest.mark.parametrize(
    ("pattern", "inside"),
    [("2:4", True), ("1:4", True), ("1:2", True), ("1:3", True), ("2:8", True), ("1:16", True), ("1:6", True)]
    + [("3:4", False), ("4:8", False), ("2:6", False), ("2:3", False), ("3:8", False), ("2:5", False)],
)
def test_inside_24_agrees_with_random_masks(pattern, inside):
    pattern = NMPattern(pattern)
    assert stored_mask.inside_24(pattern) is inside
    # Two groups side by side, in every combination of the first and last candidates' neighbours.
    candidates = pattern.candidates()
    pairs = torch.cat([candidates.repeat_interleave(len(candidates), 0), candidates.repeat(len(candidates), 1)], dim=1)
    shifted = [torch.nn.functional.pad(pairs, (shift, 0)) for shift in range(0, pattern.m * 4, pattern.m)]
    most = max(
        int(torch.nn.functional.pad(p, (0, -p.shape[1] % 4)).unflatten(1, (-1, 4)).sum(-1).max()) for p in shifted
    )
    assert (most <= 2) is inside
