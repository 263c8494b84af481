# SPDX-License-Identifier: Apache-2.0
"""Masks stored as a delta to a general mask: small, exact through every reader, and refused when anything does not fit."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, inputs_for
from huggingface_hub import constants
from local_hub import as_the_hub
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, FormatError, HubError
from hf_nmsparse.fingerprint import digest
from hf_nmsparse.hub.changes import decode_changes, encode_changes

FILE = "adapter_model.safetensors"
LAYER = "model.layers.1.mlp.down_proj"
KEY = f"base_model.model.{LAYER}"
PATTERNS = ["1:2", "2:4", "1:4", "3:4", "2:3", "4:8", "2:8", "8:16"]


def with_changes(codes: torch.Tensor, share: float, num_candidates: int, allowed=None, seed: int = 3) -> torch.Tensor:
    """Other codes in a share of the groups."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(1, num_candidates, codes.shape, generator=generator)
    changed = torch.rand(codes.shape, generator=generator) < share
    return torch.where(changed, (codes + others) % num_candidates, codes)


def nearby(model, share: float, layers=None) -> None:
    """Change the mask of a model in a share of its groups, of some layers or all. Their tails stay."""
    for name, layer in mask_layers(model).items():
        if layers is None or name in layers:
            pattern = layer.relaxations["default"].pattern
            codes = layer.mask_codes("default")
            whole = layer.in_features // pattern.m
            codes[:, :whole] = with_changes(codes[:, :whole], share, pattern.num_candidates)
            layer.set_prior_codes("default", codes)


@pytest.fixture
def make_masked(base_folder):
    def build(share: float = 0.0, layers=None, **config) -> PeftModel:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), NMSparseConfig(**config)).eval()
        nearby(model, share, layers)
        return model

    return build


@pytest.fixture
def published(make_masked, tmp_path, tokens):
    """(folder of a general mask, folder of a delta to it, output of the model of the latter)."""
    general = nms.save_mask(make_masked(), tmp_path / "general")
    model = make_masked(0.05)
    return general, nms.save_mask(model, tmp_path / "law", delta_to=general), model(tokens).logits


def load_base(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- bytes ----------------------------------------------------------------------------------------------------------
def encode_slowly(codes: list[int], general: list[int], num_candidates: int, parameter: int) -> bytes:
    """docs/FORMAT.md, section 9, word by word."""
    low, high, ranks, last = "", "", [], -1
    for place, (new, old) in enumerate(zip(codes, general, strict=True)):
        if new != old:
            gap, last = place - last - 1, place
            low += "".join(str(gap >> bit & 1) for bit in range(parameter))
            high += "0" * (gap >> parameter) + "1"
            ranks.append(new - (old < new))  # among the others
    base, packed = num_candidates - 1, b""
    if base > 1:
        best = max(((int_log(256**b, base), b) for b in range(1, 9)), key=lambda kb: (kb[0] / kb[1], -kb[1]))
        for run in (ranks[start : start + best[0]] for start in range(0, len(ranks), best[0])):
            size = best[1] if len(run) == best[0] else ((base ** len(run) - 1).bit_length() + 7) // 8
            packed += sum(digit * base**place for place, digit in enumerate(run)).to_bytes(size, "little")
    return len(ranks).to_bytes(8, "little") + bytes([parameter]) + as_bytes(low) + packed + as_bytes(high)


def packed_bytes(codes: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    return ops.pack_codes(codes, pattern, codes.shape[1] * pattern.m)


def all_codes(packed: torch.Tensor, pattern: NMPattern) -> list[int]:
    """Also of the places that a row leaves open."""
    slots = pattern.max_groups(packed.shape[1])
    return ops.unpack_codes(packed, pattern, slots * pattern.m).flatten().tolist()


def int_log(value: int, base: int) -> int:
    power = 0
    while base ** (power + 1) <= value:
        power += 1
    return power


def as_bytes(bits: str) -> bytes:
    return bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.5, 1])
def test_changes_are_what_the_format_says_and_decode_to_the_codes(pattern, share):
    pattern = NMPattern(pattern)
    for rows, groups in ((1, 1), (7, 13), (31, 48)):
        general = torch.randint(0, pattern.num_candidates, (rows, groups))
        codes = with_changes(general, share, pattern.num_candidates)
        codes, general = packed_bytes(codes, pattern), packed_bytes(general, pattern)
        stream = encode_changes(codes, general, pattern, "layer")
        lists = all_codes(codes, pattern), all_codes(general, pattern)
        choices = [encode_slowly(*lists, pattern.num_candidates, parameter) for parameter in range(12)]
        assert bytes(stream.tolist()) == choices[stream[8]] and len(stream) <= min(map(len, choices))
        assert torch.equal(decode_changes(stream, general, pattern, "layer"), codes)


def test_any_parameter_decodes():
    pattern = NMPattern("2:4")
    codes = torch.randint(0, 6, (9, 40))
    general, codes = packed_bytes(codes, pattern), packed_bytes(with_changes(codes, 0.1, 6), pattern)
    for parameter in range(41):
        slow = encode_slowly(all_codes(codes, pattern), all_codes(general, pattern), 6, parameter)
        stream = torch.tensor(list(slow), dtype=torch.uint8)
        assert torch.equal(decode_changes(stream, general, pattern, "layer"), codes)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "8:16"])
def test_no_bytes_crash_the_decoder_or_decode_to_what_is_written_otherwise(pattern):
    pattern, chance = NMPattern(pattern), random.Random(0)
    codes = torch.randint(0, pattern.num_candidates, (8, 30))
    general = packed_bytes(codes, pattern)
    changed = packed_bytes(with_changes(codes, 0.1, pattern.num_candidates), pattern)
    stream = bytes(encode_changes(changed, general, pattern, "layer").tolist())
    refused = 0
    for _ in range(400):
        damaged = bytearray(stream)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            damaged = damaged[: chance.randrange(len(damaged))] + bytes(chance.randrange(3))
        given = torch.tensor(list(damaged), dtype=torch.uint8)
        try:
            codes = decode_changes(given, general, pattern, "layer")
        except FormatError:
            refused += 1
            continue
        lists = all_codes(codes, pattern), all_codes(general, pattern)
        assert encode_slowly(*lists, pattern.num_candidates, damaged[8]) == bytes(damaged)
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s[:8], "no count"),
        (lambda s: s[:-1], "cannot hold|do not fit"),
        (lambda s: torch.cat([s, s.new_zeros(40)]), "cannot hold"),
        (lambda s: torch.cat([s, s.new_zeros(1)]), "no writer sets"),
        (lambda s: torch.cat([s.new_full((8,), 255), s[8:]]), "no count"),
        (lambda s: torch.cat([s[:8], s.new_full((1,), 63), s[9:]]), "no count"),
        (lambda s: torch.cat([s[:8], s.new_full((1,), 40), s[9:]]), "cannot hold"),
        (lambda s: torch.cat([s[:-1], s.new_zeros(1)]), "do not fit"),
        (lambda s: torch.cat([s[:9], s.new_full((len(s) - 9,), 255)]), "do not fit|no writer sets"),
    ],
)
def test_damaged_changes_are_refused_by_name(change, said):
    pattern = NMPattern("2:4")
    codes = torch.randint(0, 6, (8, 30))
    general = packed_bytes(codes, pattern)
    stream = encode_changes(packed_bytes(with_changes(codes, 0.1, 6), pattern), general, pattern, "q_proj")
    with pytest.raises(FormatError, match=f"q_proj: .*({said})"):
        decode_changes(change(stream), general, pattern, "q_proj")


def test_a_gap_beyond_the_layer_and_a_digit_beyond_the_candidates_are_refused():
    pattern = NMPattern("2:4")
    general = packed_bytes(
        torch.zeros(4, 4, dtype=torch.int64), pattern
    )  # two bytes a row, and so room for six groups
    stream = torch.tensor(list(encode_slowly([0] * 7 + [3] + [0] * 16, [0] * 24, 6, 5)), dtype=torch.uint8)
    assert all_codes(decode_changes(stream, general, pattern, "layer"), pattern)[7] == 3
    far = stream.clone()
    far[9] = 24
    with pytest.raises(FormatError, match="do not fit into the 24 groups"):
        decode_changes(far, general, pattern, "layer")
    digit = stream.clone()
    digit[10] = 5  # one digit of base 5
    with pytest.raises(FormatError, match="no writer sets"):
        decode_changes(digit, general, pattern, "layer")


# --- size -----------------------------------------------------------------------------------------------------------
def test_five_percent_of_the_groups_take_under_an_eighth_of_a_bit_a_weight(make_llama, tmp_path):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = get_peft_model(make_llama(num_hidden_layers=1, **sizes), NMSparseConfig())
    general = nms.save_mask(model, tmp_path / "general")
    weights = sum(layer.in_features * layer.out_features for layer in mask_layers(model).values())
    nearby(model, 0.05)
    delta = nms.save_mask(model, tmp_path / "law", delta_to=general)
    bits = {folder.name: 8 * (folder / FILE).stat().st_size / weights for folder in (general, delta)}
    print(bits)
    assert bits["law"] < 0.12 and bits["general"] > 0.66
    with safe_open(delta / FILE, framework="pt") as file:
        largest = file.get_tensor("base_model.model.model.layers.0.mlp.up_proj.nmsparse_changes")
    assert 8 * largest.numel() / (1536 * 576) < 0.104  # the entropy is 0.1006
    read = nms.read_mask(delta)
    assert all(torch.equal(read.layers[name].packed, packed) for name, packed in packed_codes(model).items())


def packed_codes(model) -> dict[str, torch.Tensor]:
    layers = mask_layers(model).items()
    return {
        name: ops.pack_codes(layer.mask_codes("default"), layer.relaxations["default"].pattern, layer.in_features)
        for name, layer in layers
    }


def test_unchanged_layers_have_no_changes_in_the_file(make_masked, published, base_folder, tmp_path, tokens):
    general, _, _ = published
    model = make_masked(0.3, [LAYER])
    folder = nms.save_mask(model, tmp_path / "one", delta_to=general)
    names = [name for name in load_file(folder / FILE) if name.endswith("nmsparse_changes")]
    assert names == [f"{KEY}.nmsparse_changes"]
    assert torch.equal(nms.load_mask(load_base(base_folder), folder)(tokens).logits, model(tokens).logits)
    same = nms.save_mask(make_masked(), tmp_path / "same", delta_to=general)
    assert not [name for name in load_file(same / FILE) if name.endswith("nmsparse_changes")]
    assert nms.verify(same).ok


def test_a_mask_that_shares_little_is_to_be_saved_in_full(make_masked, published, tmp_path):
    general, _, _ = published
    with pytest.raises(ConfigError, match=r"delta takes \d+ bytes and the full codes \d+; save it without delta_to="):
        nms.save_mask(make_masked(0.95), tmp_path / "far", delta_to=general)
    assert not (tmp_path / "far").exists()


# --- readers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:3", "8:16"])
def test_a_delta_gives_the_output_of_its_mask(make_masked, base_folder, tmp_path, tokens, pattern):
    options = {"pattern": pattern, "relaxation": "elementwise" if pattern == "8:16" else "candidates"}
    general = nms.save_mask(make_masked(**options), tmp_path / "general")
    model = make_masked(0.1, **options)
    folder = nms.save_mask(model, tmp_path / "law", delta_to=general)
    full = nms.read_mask(nms.save_mask(model, tmp_path / "full"))
    read = nms.read_mask(folder)
    for name, layer in full.layers.items():
        assert torch.equal(read.layers[name].packed, layer.packed) and torch.equal(read.layers[name].base, layer.base)
    assert torch.equal(nms.load_mask(load_base(base_folder), folder)(tokens).logits, model(tokens).logits)
    assert (nms.verify(folder).kind, nms.verify(folder).pattern, nms.verify(folder).ok) == ("mask", pattern, True)


def test_terms_are_stored_as_in_a_full_mask(make_masked, base_folder, tmp_path, tokens, published):
    general, _, plain = published
    model = make_masked(0.05, slorb_block=8, low_rank=2, delta_rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_" in name and "logits" not in name:
                parameter.normal_(std=0.1)
    folder = nms.save_mask(model, tmp_path / "terms", delta_to=general)
    output = nms.load_mask(load_base(base_folder), folder)(tokens).logits
    assert torch.equal(output, model(tokens).logits) and not torch.allclose(output, plain)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_deltas_of_transposed_layers_and_fused_experts(family, tmp_path):
    inputs = inputs_for(family)["input_ids"]
    base = FAMILIES[family]()
    general = nms.save_mask(get_peft_model(base, NMSparseConfig()), tmp_path / "general")
    model = get_peft_model(FAMILIES[family](), NMSparseConfig()).eval()
    nearby(model, 0.05)
    folder = nms.save_mask(model, tmp_path / "law", delta_to=general)
    assert torch.equal(nms.load_mask(FAMILIES[family](), folder)(inputs).logits, model(inputs).logits)


def test_a_delta_of_a_one_shot_mask(base_folder, tmp_path, tokens):
    folders = {}
    for name, calibration in (("general", tokens), ("law", tokens[:4])):
        model = load_base(base_folder)
        report = nms.prune(model, "wanda", calibration=calibration, progress=False)
        to = folders.get("general")
        folders[name] = nms.save_mask(model, tmp_path / name, report=report, delta_to=to)
    loaded = nms.load_mask(load_base(base_folder), folders["law"])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_prior_and_a_packed_model_come_from_a_delta(published, base_folder, tokens):
    _, folder, expected = published
    model = get_peft_model(load_base(base_folder), NMSparseConfig(prior=None))
    nms.set_prior(model, folder)
    assert torch.equal(model.eval()(tokens).logits, expected)
    packed = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=nms.PackedConfig(mask=folder))
    assert torch.equal(nms.decompress(packed)(tokens).logits, expected)


def through_peft(base_folder, folder):
    return PeftModel.from_pretrained(load_base(base_folder), folder)


def through_load_adapter(base_folder, folder):
    model = load_base(base_folder)
    model.load_adapter(folder)
    return model


@pytest.mark.parametrize(
    "door",
    [
        through_peft,
        through_load_adapter,
        lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
        lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    ],
    ids=["peft", "load_adapter", "auto_peft", "auto_model"],
)
def test_loaders_that_cannot_put_a_delta_together_say_which_one_can(published, base_folder, door):
    _, folder, _ = published
    with pytest.raises(ConfigError, match=r"stored as a delta .*nms\.load_mask\(model"):
        door(base_folder, folder)


def test_the_card_names_the_general_mask_and_only_what_loads(published):
    _, folder, _ = published
    card = (folder / "README.md").read_text()
    assert "stored as a delta to ../general" in card and "nms.load_mask(model, " in card
    assert "PeftModel" not in card and "KeyError" not in card


def test_saving_over_a_delta_in_full_leaves_nothing_of_it(published, make_masked, tmp_path):
    _, folder, _ = published
    nms.save_mask(make_masked(0.05), folder)
    assert nms.read_mask(folder).general is None
    assert "delta" not in (folder / "README.md").read_text()


# --- where the general mask lies ------------------------------------------------------------------------------------
def test_both_folders_can_move_together_and_either_alone_with_its_place(published, base_folder, tmp_path, tokens):
    general, folder, expected = published
    assert json.loads((folder / "adapter_config.json").read_text())["general_mask"]["source"] == "../general"
    shutil.copytree(tmp_path / "law", tmp_path / "new" / "law")
    shutil.copytree(tmp_path / "general", tmp_path / "new" / "general")
    assert torch.equal(nms.load_mask(load_base(base_folder), tmp_path / "new", task="law")(tokens).logits, expected)
    alone = shutil.copytree(folder, tmp_path / "elsewhere" / "law")
    with pytest.raises(FormatError, match=r"general mask cannot be read.*pass its place as general="):
        nms.load_mask(load_base(base_folder), alone)
    for place in (general, str(general), nms.read_mask(general)):
        assert torch.equal(nms.load_mask(load_base(base_folder), alone, general=place)(tokens).logits, expected)
    with pytest.raises(ConfigError, match="is no delta"):
        nms.load_mask(load_base(base_folder), general, general=general)


def test_a_new_folder_and_a_relative_one_refer_to_the_general_mask(published, make_masked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = nms.save_mask(make_masked(0.05), Path("new/deep/law"), delta_to="general")
    assert nms.read_mask(folder).general.source == "../../../general"
    inside = nms.save_mask(make_masked(0.05), "general/law", delta_to="general")
    assert nms.read_mask(inside).general.source == ".."
    assert nms.read_mask("general", task="law").layers.keys() == nms.read_mask("general").layers.keys()


def test_a_delta_does_not_go_where_its_general_mask_is_nor_round_in_a_circle(published, make_masked, tmp_path):
    general, folder, _ = published
    with pytest.raises(ConfigError, match="is the general mask itself"):
        nms.save_mask(make_masked(0.05), general, delta_to=general)
    assert nms.read_mask(general).general is None
    change_config(folder, general_mask={"source": "."})
    with pytest.raises(
        FormatError, match=r"general mask cannot be read: .* more than 8 deltas to deltas, or of a circle"
    ):
        nms.read_mask(folder)


def test_deltas_to_deltas_are_followed_to_the_full_mask_and_no_link_may_change(
    published, make_masked, base_folder, tmp_path
):
    general, law, _ = published
    model = make_masked(0.05)
    nearby(model, 0.01)
    german = nms.save_mask(model, tmp_path / "german", delta_to=law)
    size = {folder: (folder / FILE).stat().st_size for folder in (general, law, german)}
    assert size[german] < size[law] < size[general]
    read = nms.read_mask(german)
    assert all(torch.equal(read.layers[name].packed, packed) for name, packed in packed_codes(model).items())
    tokens = torch.arange(12)[None]
    assert torch.equal(nms.load_mask(load_base(base_folder), german)(tokens).logits, model(tokens).logits)
    shutil.move(law, tmp_path / "moved")
    with pytest.raises(FormatError, match="german is a delta, and its general mask cannot be read"):
        nms.read_mask(german)
    assert nms.read_mask(german, general=tmp_path / "moved").layers.keys() == read.layers.keys()
    nms.save_mask(make_masked(0.02), tmp_path / "law", delta_to=general)  # another one in its place
    with pytest.raises(FormatError, match=r"is not the general mask that \S*german\S* is a delta to"):
        nms.read_mask(german)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "1:4"}, "the pattern is 2:4, that of the general mask .* 1:4"),
        ({"dense_layers": ["down_proj"]}, "layers .* differ in 2: .*down_proj is in the delta only"),
    ],
)
def test_a_general_mask_of_another_pattern_or_other_layers_is_refused(make_masked, published, tmp_path, options, said):
    _, folder, _ = published
    other = nms.save_mask(make_masked(**options), tmp_path / "other")
    with pytest.raises(ConfigError, match=said):
        nms.save_mask(make_masked(), tmp_path / "x", delta_to=other)
    with pytest.raises(FormatError, match=said):
        nms.read_mask(folder, general=other)


def test_the_wrong_general_mask_is_refused_and_the_model_untouched(
    published, make_masked, base_folder, tmp_path, tokens
):
    _, folder, _ = published
    wrong = nms.save_mask(make_masked(0.02), tmp_path / "wrong")
    model = load_base(base_folder)
    before, classes = model(tokens).logits, [type(module) for module in model.modules()]
    with pytest.raises(
        FormatError, match=r"wrong is not the general mask that .*law.* is a delta to: its codes of model\."
    ):
        nms.load_mask(model, folder, general=wrong)
    assert [type(module) for module in model.modules()] == classes and torch.equal(model(tokens).logits, before)


# --- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content",
    [
        None,
        "general",
        {},
        {"source": 3},
        {"source": ""},
        {"source": "a/b/c"},
        {"source": "/etc"},
        {"source": "user/x", "task": "../y"},
        {"source": "../general", "task": "x"},
        {"source": "..\\general"},
        {"source": "user/x", "else": "y"},
        {"source": "user/x", "revision": ["main"]},
    ],
)
def test_what_names_no_general_mask_is_refused(published, content):
    _, folder, _ = published
    change_config(folder, general_mask=content)
    with pytest.raises(FormatError, match="general_mask"):
        nms.read_mask(folder)


def drop(part):
    return lambda tensors: tensors.pop(f"{KEY}.{part}")


def put(part, value):
    return lambda tensors: tensors.update({f"{KEY}.{part}": value})


@pytest.mark.parametrize(
    "damage",
    [
        drop("nmsparse_changes"),
        drop("nmsparse_digest"),
        drop("nmsparse_base"),
        put("nmsparse_digest", torch.zeros(16, dtype=torch.uint8)),
        put("nmsparse_changes", torch.zeros(3, 3, dtype=torch.uint8)),
        put("nmsparse_changes", torch.zeros(20, dtype=torch.int8)),
        put("nmsparse_changes", torch.zeros(0, dtype=torch.uint8)),
        put("nmsparse_changes", torch.tensor([255] * 8 + [0] * 30, dtype=torch.uint8)),
        put("nmsparse_packed", torch.zeros(32, 4, dtype=torch.uint8)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(published, base_folder, damage):
    _, folder, _ = published
    rewrite(folder, damage)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.down_proj"):
        nms.load_mask(load_base(base_folder), folder)


def test_a_valid_code_that_a_tail_may_not_use_is_refused_with_the_model(make_masked, base_folder, tmp_path):
    general = nms.save_mask(make_masked(pattern="2:3"), tmp_path / "general")
    folder = nms.save_mask(make_masked(0.05, pattern="2:3"), tmp_path / "law", delta_to=general)
    name = "model.layers.0.mlp.up_proj"  # 32 inputs: a tail of two
    packed, pattern = nms.read_mask(general).layers[name].packed, NMPattern("2:3")
    slots = pattern.max_groups(packed.shape[1])
    codes = ops.unpack_codes(packed, pattern, slots * 3)
    codes[5, 10] = 2
    wrong = ops.pack_codes(codes, pattern, slots * 3)

    def change(tensors):
        key = f"base_model.model.{name}"
        tensors[f"{key}.nmsparse_changes"] = encode_changes(wrong, packed, pattern, name)
        tensors[f"{key}.nmsparse_digest"][0] = digest(wrong)

    rewrite(folder, change)
    with pytest.raises(FormatError, match=f"{name}.*row 5"):
        nms.load_mask(load_base(base_folder), folder)


def test_every_flipped_byte_of_the_tensors_of_a_delta_is_refused(make_llama, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}

    def base():
        return make_llama(num_hidden_layers=1, **sizes)

    config = NMSparseConfig(target_modules=["up_proj"])
    model = get_peft_model(base(), config)
    general = nms.save_mask(model, tmp_path / "general")
    nearby(model, 0.1)
    folder = nms.save_mask(model, tmp_path / "law", delta_to=general)
    loader, shared = base(), nms.read_mask(general)
    data = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (folder / FILE).write_bytes(damaged)
        with pytest.raises((FormatError, BaseModelMismatchError)):
            nms.load_mask(loader, folder, general=shared)
    assert len(data) - header > 60 and not mask_layers(loader)


@pytest.mark.parametrize("keep", [0, 8, 200, -1])
def test_truncated_deltas_are_refused(published, keep):
    _, folder, _ = published
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:keep])
    with pytest.raises(FormatError, match="damaged or cut short"):
        nms.read_mask(folder)


# --- on the Hub -----------------------------------------------------------------------------------------------------
@pytest.fixture
def local_hub(monkeypatch, tmp_path_factory):
    with as_the_hub(monkeypatch, tmp_path_factory.mktemp("hf_home")) as hub:
        yield hub


def test_a_pushed_delta_is_pinned_to_a_commit_of_its_general_mask(local_hub, make_masked, base_folder, tokens):
    commit = nms.push_mask(make_masked(), "user/general").oid
    model = make_masked(0.05)
    nms.push_mask(model, "user/law", delta_to="user/general")
    assert nms.read_mask("user/law").general.revision == commit
    nms.push_mask(make_masked(0.5), "user/general")
    loaded = nms.load_mask(load_base(base_folder), "user/law")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(FormatError, match=r"general mask that .* is a delta to"):
        nms.read_mask("user/law", general="user/general")
    nms.read_mask("user/law", general=nms.read_mask("user/general", revision=commit))
    card = local_hub.repos["user/law"].files()["README.md"].decode()
    assert f"user/general (revision {commit})" in card and 'nms.load_mask(model, "user/law")' in card
    local_hub.repos.pop("user/general")
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(HubError, match=r"user/law is a delta, and its general mask cannot be read: .*user/general"):
        nms.read_mask("user/law")


def test_tasks_of_one_repo_share_its_general_mask(local_hub, make_masked, base_folder, tokens):
    nms.push_mask(make_masked(), "user/masks")
    models = {"law": make_masked(0.05), "code/python": make_masked(0.1)}
    for task, model in models.items():
        nms.push_mask(model, "user/masks", task=task, delta_to="user/masks")
    for task, model in models.items():
        general = nms.read_mask("user/masks", task=task).general
        assert general.task is None and general.revision in local_hub.repos["user/masks"].commits
        assert torch.equal(
            nms.load_mask(load_base(base_folder), "user/masks", task=task)(tokens).logits, model(tokens).logits
        )
        assert nms.verify("user/masks", task=task).ok
    with pytest.raises(ConfigError, match="would replace it; use another task"):
        nms.push_mask(models["law"], "user/masks", delta_to="user/masks")


def test_folders_pushed_beside_each_other_keep_finding_each_other(local_hub, published, base_folder, tokens):
    general, folder, expected = published
    with pytest.raises(ConfigError, match="user/masks has none there; push that one first"):
        nms.push_folder(folder, "user/masks", task="law")
    nms.push_folder(general, "user/masks", task="general")
    for task in (None, "deep/law"):
        with pytest.raises(ConfigError, match="has none there"):
            nms.push_folder(folder, "user/masks", task=task)
    commit = nms.push_folder(folder, "user/masks", task="law").oid
    nms.push_folder(
        nms.save_mask(through_load(base_folder, folder), general.parent / "z"), "user/masks", task="general"
    )
    for revision in (commit, None):
        if revision is None:  # by now another general mask lies there
            with pytest.raises(FormatError, match="not the general mask"):
                nms.read_mask("user/masks", task="law")
        else:
            loaded = nms.load_mask(load_base(base_folder), "user/masks", revision=revision, task="law")
            assert torch.equal(loaded(tokens).logits, expected)


def through_load(base_folder, folder):
    return nms.load_mask(load_base(base_folder), folder)


def test_a_delta_is_not_pushed_to_a_general_mask_that_only_this_machine_has(local_hub, published, make_masked):
    general, _, _ = published
    with pytest.raises(ConfigError, match="is a local folder, which others do not have"):
        nms.push_mask(make_masked(0.05), "user/law", delta_to=general)
    with pytest.raises(HubError, match="could not fetch user/nothing"):
        nms.push_mask(make_masked(0.05), "user/law", delta_to="user/nothing")
    assert not local_hub.repos


# --- several tasks in memory ----------------------------------------------------------------------------------------
def test_tasks_switch_on_one_base_and_take_their_packed_codes_only(
    published, make_masked, base_folder, tmp_path, tokens
):
    general, folder, expected = published
    model = nms.load_mask(load_base(base_folder), folder, adapter_name="law")
    before = memory(model)
    other = make_masked(0.2)
    nms.save_mask(other, tmp_path / "code", delta_to=general)
    model = nms.load_mask(model, tmp_path / "code", adapter_name="code")
    layers = nms.read_mask(folder).layers.values()
    assert memory(model) - before == sum(layer.packed.numel() + 16 + 16 for layer in layers)
    outputs = {"law": expected, "code": other(tokens).logits}
    assert not torch.equal(*outputs.values())
    for name in ("law", "code", "law"):
        model.set_adapter(name)
        assert torch.equal(model(tokens).logits, outputs[name])
    model.base_model.add_weighted_adapter(["law", "code"], [1.0, 0.5], "both", "votes")
    model.set_adapter("both")
    assert torch.equal(model(tokens).logits, expected)  # the heavier vote decides


def memory(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def test_loading_a_delta_logs_nothing(published, base_folder, caplog):
    _, folder, _ = published
    with caplog.at_level(logging.INFO, logger="hf_nmsparse"):
        nms.load_mask(load_base(base_folder), folder)
    assert not caplog.records
