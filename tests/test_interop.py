# SPDX-License-Identifier: Apache-2.0
"""Masks and models of other programs: read bit for bit, refused when they are not what they say, written so that they read them."""

import copy
import io
import json
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import facts, run
from families import FAMILIES
from huggingface_hub import HfApi
from local_hub import as_the_hub
from make_bitmask import FOLDER as BITMASK_FOLDER
from make_bitmask import dense_llama, masked_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_nmsparse as nms
from hf_nmsparse.cli.folders import Kind, kind_of
from hf_nmsparse.codec import ids_of_24, unpack_bits
from hf_nmsparse.errors import (
    BaseModelMismatchError,
    ConfigError,
    FormatError,
    HubError,
    UnsupportedError,
)
from hf_nmsparse.hub import find_mask
from hf_nmsparse.hub.semi_structured import dense_of
from hf_nmsparse.ops.linear24.vendor import cutlass_metadata, ids_of_metadata

CLI_FORMATS = {"dense": Kind.MODEL, "npz": Kind.NPZ, "bitmask": Kind.BITMASK}


# --- helpers --------------------------------------------------------------------------------------------------------
def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of the blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "head" not in name
    }


def random_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer name -> a random 2:4 mask `[out, in]`."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, module in prunable(model).items():
        rows, columns = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        noise = torch.rand(rows, columns // 4, 4, generator=generator)
        masks[name] = torch.zeros_like(noise, dtype=torch.bool).scatter(2, noise.topk(2).indices, True).flatten(1)
    return masks


@torch.no_grad()
def masked(model: nn.Module, masks: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The model with pruned weights +0."""
    for name, mask in (random_masks(model) if masks is None else masks).items():
        module = model.get_submodule(name)
        module.weight.masked_fill_(~(mask.T if isinstance(module, Conv1D) else mask), 0)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_as_maskllm(path: Path, model: nn.Module, masks: dict[str, torch.Tensor], **changes) -> Path:
    """The file of MaskLLM's tools: numpy.packbits of each stored mask, in one numpy.savez_compressed."""
    arrays = {}
    for name, mask in masks.items():
        stored = mask.T if isinstance(model.get_submodule(name), Conv1D) else mask
        arrays[f"{name}.weight.mask"] = np.packbits(stored.numpy().astype(bool))
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def apply_as_maskllm(model: nn.Module, path: Path) -> nn.Module:
    """What MaskLLM's evaluation does with such a file."""
    state = model.state_dict()
    for key, bits in np.load(path).items():
        weight = state[key.removesuffix(".mask")]
        weight *= torch.from_numpy(np.unpackbits(bits)[: weight.numel()]).view(weight.shape)
    return model


def merged(base: nn.Module, folder: Path) -> nn.Module:
    return nms.load_mask(base, folder).merge_and_unload()


@pytest.fixture
def npz(llama, tmp_path) -> Path:
    return write_as_maskllm(tmp_path / "mask.npz", llama, random_masks(llama))


# --- .npz of MaskLLM --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_maskllm_becomes_a_published_one(family, tmp_path):
    base = FAMILIES[family]()
    path = write_as_maskllm(tmp_path / "mask.npz", base, random_masks(base))
    found = nms.import_mask(path, base, tmp_path / "mask")
    assert (found.kind, found.groups_completed, len(found.report.codes)) == ("npz", 0, len(prunable(base)))
    assert "lm_head" in found.dense_layers
    assert same_weights(merged(FAMILIES[family](), tmp_path / "mask"), apply_as_maskllm(FAMILIES[family](), path))
    assert "imported mask" in (tmp_path / "mask" / "README.md").read_text()
    assert nms.verify(tmp_path / "mask").ok


def test_a_mask_of_maskllm_on_a_bfloat16_base_is_compressed(make_llama, tmp_path):
    base = make_llama(torch.bfloat16)
    path = write_as_maskllm(tmp_path / "mask.npz", base, random_masks(base))
    nms.import_mask(path, base, tmp_path / "mask")
    packed = nms.compress(nms.load_mask(base, tmp_path / "mask"))
    assert same_weights(nms.decompress(packed), masked(make_llama(torch.bfloat16)))


def test_the_base_is_part_of_an_imported_mask(llama, npz, tmp_path):
    nms.import_mask(npz, llama, tmp_path / "mask")
    torch.manual_seed(5)
    with pytest.raises(BaseModelMismatchError):
        nms.load_mask(type(llama)(llama.config), tmp_path / "mask")


def test_groups_with_too_few_are_filled_up_and_counted(llama, tmp_path):
    masks = random_masks(llama)
    name = next(iter(masks))
    masks[name][0, :4], masks[name][1, :4] = False, torch.tensor([False, False, False, True])
    found = nms.import_mask(write_as_maskllm(tmp_path / "m.npz", llama, masks), llama, tmp_path / "mask")
    assert found.completed == {name: 2}
    mask = next(
        iter(nms.load_mask(llama, tmp_path / "mask").base_model.model.get_submodule(name).hard_mask("default")[None])
    )
    assert mask[0, :4].tolist() == [True, True, False, False] and mask[1, :4].tolist() == [True, False, False, True]
    assert "2 groups filled up" in (tmp_path / "mask" / "README.md").read_text()


def test_groups_with_too_many_are_refused_by_name(llama, tmp_path):
    masks = random_masks(llama)
    name = list(masks)[3]
    masks[name][2, 4:8] = True
    with pytest.raises(FormatError, match=rf"{name}.weight.mask keeps more than 2 of 4 in 1 of"):
        find_mask(write_as_maskllm(tmp_path / "m.npz", llama, masks), llama)
    masks[name] |= True
    assert (
        len(find_mask(write_as_maskllm(tmp_path / "m.npz", llama, random_masks(llama)), llama, "4:8").report.codes)
        == 14
    )


KEY = "model.layers.0.self_attn.q_proj.weight.mask"


def _member(path: Path, name: str, data: bytes) -> Path:
    """A file of one member, whatever it is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return path


def _npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def _bomb(path: Path) -> Path:
    return _member(path, f"{KEY}.npy", _npy(np.zeros(1 << 26, np.uint8)))


def _lying_bomb(path: Path) -> Path:
    """Declares the size that is needed, and holds far more."""
    honest = _bomb(path).read_bytes()
    size = (len(_npy(np.zeros(1 << 26, np.uint8)))).to_bytes(4, "little")
    path.write_bytes(honest.replace(size, len(_npy(np.zeros(128, np.uint8))).to_bytes(4, "little")))
    return path


def _pickle(path: Path) -> Path:
    return _member(path, f"{KEY}.npy", _npy(np.array([{}] * 4, dtype=object), allow_pickle=True))


def _duplicate(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr(f"{KEY}.npy", _npy(np.full(128, 0b10100101, np.uint8)))
    return path


def _altered(path: Path) -> Path:
    """One byte of the data, not of the checksum."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{KEY}.npy", _npy(np.full(128, 0b10100101, np.uint8)))
    data = bytearray(path.read_bytes())
    data[data.index(b"\xa5" * 128)] = 0b01011010
    path.write_bytes(data)
    return path


def _encrypted(path: Path) -> Path:
    _member(path, f"{KEY}.npy", _npy(np.full(128, 0b10100101, np.uint8)))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_bomb, "would unpack to 67108992 bytes, expected 128"),
        (_lying_bomb, "q_proj|damaged"),
        (_pickle, r"must be an .npy .version 1.0. of uint8"),
        (_duplicate, "is there twice"),
        (_altered, "damaged or cut short"),
        (_encrypted, "encrypted"),
        (lambda path: _member(path, "model.norm.weight.mask.npy", b"x"), "names no weight of the model"),
        (lambda path: _member(path, "model.embed_tokens.weight.mask.npy", b"x"), "names no weight of the model"),
        (lambda path: _member(path, KEY.replace(".mask", ".npy"), b"x"), "names no weight of the model"),
        (lambda path: _member(path, f"../../{KEY}.npy", b"x"), "names no weight of the model"),
        (lambda path: _member(path, KEY, b"x"), "names no weight of the model"),
        (lambda path: _member(path, f"{KEY}.npy", b"x" * 200), "must be an .npy"),
        (lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros(128, np.uint8), version=(2, 0))), "must be an .npy"),
        (
            lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros(127, np.uint8))),
            r"of uint8 \[128\].*\(127,\)",
        ),
        (lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros((2, 64), np.uint8))), r"\(2, 64\)"),
        (lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros(128, np.int8))), "i1"),
        (lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros(128, np.uint8))[:-1]), "holds other than 128"),
        (lambda path: _member(path, f"{KEY}.npy", _npy(np.zeros(128, np.uint8)) + b"x"), "holds other than 128"),
        (lambda path: path.write_bytes(b"PK no zip") and path, "is no .npz"),
        (lambda path: zipfile.ZipFile(path, "w").close() or path, "holds no mask"),
    ],
)
def test_hostile_npz_files_are_refused(llama, tmp_path, write, said):
    path = write(tmp_path / "hostile.npz")
    with pytest.raises(FormatError, match=said):
        nms.import_mask(path, llama, tmp_path / "mask")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.npz"]


def test_an_npz_that_is_cut_short_is_refused_wherever_it_ends(llama, npz, tmp_path):
    data = npz.read_bytes()
    for end in range(0, len(data), 997):
        (tmp_path / "cut.npz").write_bytes(data[:end])
        with pytest.raises(FormatError):
            find_mask(tmp_path / "cut.npz", llama)


def test_an_npz_with_any_byte_altered_is_refused_or_read(llama, npz, tmp_path):
    """No other error than our own, whatever is in the file."""
    data, choose, refused = npz.read_bytes(), random.Random(0), 0
    for _ in range(300):
        altered = bytearray(data)
        place = choose.randrange(len(data)) if choose.random() < 0.3 else len(data) - choose.randrange(1500)
        altered[min(place, len(data) - 1)] = choose.randrange(256)
        (tmp_path / "altered.npz").write_bytes(altered)
        try:
            find_mask(tmp_path / "altered.npz", llama)
        except FormatError:
            refused += 1
    assert refused > 100


def test_bits_beyond_the_weight_are_refused(tmp_path):
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    bits = {"0.weight.mask": np.array([0b11001010, 0b10100000], np.uint8)}
    np.savez_compressed(tmp_path / "m.npz", **bits)
    assert list(find_mask(tmp_path / "m.npz", base).report.codes) == ["0"]
    bits["0.weight.mask"][1] |= 1
    np.savez_compressed(tmp_path / "m.npz", **bits)
    with pytest.raises(FormatError, match="bits set beyond the 12"):
        find_mask(tmp_path / "m.npz", base)


def test_where_a_source_may_lie(llama, npz, tmp_path):
    (tmp_path / "repo").mkdir()
    shutil.copy(npz, tmp_path / "repo" / "mask_compressed.npz")
    assert find_mask(tmp_path / "repo", llama).kind == "npz"
    shutil.copy(npz, tmp_path / "repo" / "other.npz")
    with pytest.raises(ConfigError, match="holds 2 "):
        find_mask(tmp_path / "repo", llama)
    (tmp_path / "mask.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickles are not read"):
        find_mask(tmp_path / "mask.pt", llama)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither an"):
        find_mask(tmp_path / "empty", llama)
    with pytest.raises(HubError):
        find_mask("nobody/nothing", llama)
    nms.import_mask(npz, llama, tmp_path / "mask")
    with pytest.raises(ConfigError, match="holds an adapter"):
        find_mask(tmp_path / "mask", llama)
    with pytest.raises(ConfigError, match=r"nothing\.npz: there is no such folder or file"):
        find_mask(tmp_path / "nothing.npz", llama)


def test_sources_on_the_hub(llama, make_llama, npz, tmp_path, monkeypatch):
    (tmp_path / "npz").mkdir()
    shutil.copy(npz, tmp_path / "npz" / "mask_compressed.npz")
    masked(make_llama()).save_pretrained(tmp_path / "sparse")
    with as_the_hub(monkeypatch, tmp_path / "home"):
        commits = {}
        for name, folder in {"npz": tmp_path / "npz", "sparse": tmp_path / "sparse", "old": BITMASK_FOLDER}.items():
            HfApi().create_repo(f"user/{name}")
            commits[name] = HfApi().upload_folder(repo_id=f"user/{name}", folder_path=folder).oid
        assert len(find_mask("user/npz", llama, revision=commits["npz"]).report.codes) == 14
        assert find_mask("user/sparse", llama).kind == "dense"
        assert find_mask("user/old", dense_llama()).kind == "sparse-24-bitmask"
        old = nms.load_bitmask("user/old")
        assert same_weights(old, masked_llama()) and old.config._commit_hash == commits["old"]
        assert facts(f"compress user/old --output {tmp_path}/packed")["layers"] == 6
        assert json.loads((tmp_path / "packed" / "results.json").read_text())["base_revision"] == commits["old"]
        facts(f"prune user/sparse --criterion magnitude --output {tmp_path}/pruned")
        for written in ("pruned", "pruned/mask"):
            recorded = json.loads((tmp_path / written / "results.json").read_text())
            assert (recorded["base_model"], recorded["base_revision"]) == ("user/sparse", commits["sparse"])
        with pytest.raises(HubError, match="no such branch"):
            find_mask("user/npz", llama, revision="elsewhere")


# --- checkpoints with zeros -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_checkpoint_with_zeros_becomes_a_mask(family, tmp_path):
    masked(FAMILIES[family]()).save_pretrained(tmp_path / "sparse")
    found = nms.import_mask(tmp_path / "sparse", FAMILIES[family](), tmp_path / "mask")
    assert (found.kind, found.updated, len(found.report.codes)) == ("dense", [], len(prunable(FAMILIES[family]())))
    assert "lm_head" in found.dense_layers
    assert same_weights(merged(FAMILIES[family](), tmp_path / "mask"), masked(FAMILIES[family]()))


def test_fused_experts_become_a_mask(tmp_path):
    sparse = FAMILIES["mixtral"]()
    nms.prune(sparse, "magnitude")
    sparse.save_pretrained(tmp_path / "sparse")
    found = nms.import_mask(tmp_path / "sparse", FAMILIES["mixtral"](), tmp_path / "mask")
    assert sum(codes.fused_experts for codes in found.report.codes.values()) == 4
    assert same_weights(merged(FAMILIES["mixtral"](), tmp_path / "mask"), sparse)
    nms.export(nms.load_mask(FAMILIES["mixtral"](), tmp_path / "mask"), tmp_path / "npz", "npz")
    again = find_mask(tmp_path / "npz", FAMILIES["mixtral"]())
    assert {n: c.packed.tolist() for n, c in again.report.codes.items()} == {
        n: c.packed.tolist() for n, c in found.report.codes.items()
    }


def test_what_compressed_tensors_notes_of_zeros_does_not_matter(make_llama, tmp_path):
    masked(make_llama()).save_pretrained(tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    note = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "version": "0.9.0"}
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({**config, "quantization_config": note}))
    assert len(find_mask(tmp_path / "sparse", make_llama()).report.codes) == 14
    note["config_groups"] = {"group_0": {}}
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({**config, "quantization_config": note}))
    with pytest.raises(UnsupportedError, match="quantised or packed"):
        find_mask(tmp_path / "sparse", make_llama())


def test_a_checkpoint_in_another_dtype_is_compared_as_rounded(make_llama, tmp_path):
    masked(make_llama()).to(torch.float16).save_pretrained(tmp_path / "sparse")
    found = find_mask(tmp_path / "sparse", make_llama())
    assert not found.updated and len(found.report.codes) == 14


def test_zeros_of_a_checkpoint_are_completed_and_a_layer_without_them_is_left_out(make_llama, tmp_path):
    sparse, names = masked(make_llama()), list(prunable(make_llama()))
    with torch.no_grad():
        sparse.get_submodule(names[0]).weight[3, 8:12] = 0
        dense = make_llama().get_submodule(names[1]).weight
        sparse.get_submodule(names[1]).weight.copy_(dense)
    sparse.save_pretrained(tmp_path / "sparse")
    found = find_mask(tmp_path / "sparse", make_llama())
    assert found.completed == {names[0]: 1} and names[1] in found.dense_layers and names[1] not in found.report.codes


def test_a_layer_that_follows_the_pattern_in_part_is_refused_by_name(make_llama, tmp_path):
    sparse, name = masked(make_llama()), list(prunable(make_llama()))[2]
    with torch.no_grad():
        sparse.get_submodule(name).weight[0, :8] = 1
    sparse.save_pretrained(tmp_path / "sparse")
    with pytest.raises(FormatError, match=rf"{name} has 4.*more than 2 of 4 in 2 of"):
        find_mask(tmp_path / "sparse", make_llama())
    masked(make_llama()).save_pretrained(tmp_path / "sparse")
    with pytest.raises(FormatError, match="more than 1 of 4"):
        find_mask(tmp_path / "sparse", make_llama(), "1:4")
    make_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match="there is no mask in it"):
        find_mask(tmp_path / "dense", make_llama())


def test_updated_weights_are_refused_unless_only_the_mask_is_wanted(make_llama, tmp_path):
    sparse, names = masked(make_llama()), list(prunable(make_llama()))
    with torch.no_grad():
        sparse.get_submodule(names[0]).weight.mul_(2)
        sparse.model.norm.weight.mul_(2)
    sparse.save_pretrained(tmp_path / "sparse")
    with pytest.raises(BaseModelMismatchError, match=r"2 weights hold other values.*nmsparse compress.*--mask-only"):
        nms.import_mask(tmp_path / "sparse", make_llama(), tmp_path / "mask")
    assert not (tmp_path / "mask").exists()
    found = nms.import_mask(tmp_path / "sparse", make_llama(), tmp_path / "mask", mask_only=True)
    assert found.updated == [names[0], "model.norm.weight"]
    assert same_weights(merged(make_llama(), tmp_path / "mask"), masked(make_llama()))
    assert "new values that 2 weights have" in (tmp_path / "mask" / "README.md").read_text()


def test_another_base_is_refused(make_llama, tmp_path):
    masked(make_llama(hidden_size=64)).save_pretrained(tmp_path / "wide")
    with pytest.raises(BaseModelMismatchError, match=r"q_proj is \[32, 32\] in the base, there \[64, 64\]"):
        find_mask(tmp_path / "wide", make_llama())
    masked(FAMILIES["opt"]()).save_pretrained(tmp_path / "opt")
    with pytest.raises(BaseModelMismatchError, match="of type 'opt', the base of type 'llama'"):
        find_mask(tmp_path / "opt", make_llama())
    masked(make_llama()).save_pretrained(tmp_path / "sparse")
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "sparse" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks weights.*up_proj"):
        find_mask(tmp_path / "sparse", make_llama())
    nms.compress(masked(make_llama())).save_pretrained(tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="nmsparse export --format dense"):
        find_mask(tmp_path / "packed", make_llama())
    with pytest.raises(ConfigError, match="carries masks already"):
        find_mask(nms.compress(masked(make_llama())), make_llama())
    with pytest.raises(ConfigError, match="load the dense base"):
        find_mask(tmp_path / "sparse", nms.compress(masked(make_llama())))


# --- bitmasks of compressed-tensors -----------------------------------------------------------------------------------
def test_a_bitmask_of_compressed_tensors_is_read_bit_for_bit():
    """The folder was written by compressed-tensors 0.14 itself, see make_bitmask.py."""
    model = nms.load_bitmask(BITMASK_FOLDER)
    assert model.dtype is torch.bfloat16 and same_weights(model, masked_llama())
    assert getattr(model.config, "quantization_config", None) is None and not model.training


def test_a_bitmask_becomes_a_mask_and_a_packed_model(tmp_path):
    found = nms.import_mask(BITMASK_FOLDER, dense_llama(), tmp_path / "mask")
    assert (found.kind, found.completed) == ("sparse-24-bitmask", {"model.layers.0.self_attn.o_proj": 2})
    assert same_weights(merged(dense_llama(), tmp_path / "mask"), masked_llama())
    packed = facts(f"compress {BITMASK_FOLDER} --output {tmp_path}/packed")
    assert packed["layers"] == 6  # rows of 36 cannot be packed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert same_weights(nms.decompress(again), masked_llama())
    assert facts(f"export {tmp_path}/packed --format bitmask --output {tmp_path}/old")["left_dense"] == {
        "model.layers.0.mlp.down_proj": "in_features=36 is no multiple of 8"
    }
    assert same_weights(nms.load_bitmask(tmp_path / "old"), masked_llama())
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (BITMASK_FOLDER, tmp_path / "old"))
    shared = [name for name in theirs if "o_proj" not in name and "down_proj" not in name]
    assert all(torch.equal(theirs[name], ours[name]) for name in shared)
    configs = [
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (BITMASK_FOLDER, tmp_path / "old")
    ]
    for config in configs:
        assert "model.layers.0.mlp.down_proj" in config["sparsity_config"].pop("ignore") or config is configs[0]
        assert 0.2 < config["sparsity_config"].pop("global_sparsity") <= 0.5
    assert configs[0] == configs[1]


def test_the_command_line_never_loads_a_bitmask_as_random_weights(tmp_path):
    from hf_nmsparse.cli.models import load_model

    assert same_weights(load_model(str(BITMASK_FOLDER)), masked_llama())
    assert facts(f"inspect {BITMASK_FOLDER}")["kind"] == "sparse bitmask model of compressed-tensors"
    found = facts(f"export {BITMASK_FOLDER} --format dense --output {tmp_path}/dense")
    assert len(found["layers"]) == 7 and kind_of(tmp_path / "dense") is Kind.MODEL
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), masked_llama())
    folder = shutil.copytree(BITMASK_FOLDER, tmp_path / "unstructured")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = "sparse-bitmask"
    (folder / "config.json").write_text(json.dumps(config))
    assert "sparse without a pattern" in run(f"compress {folder} --output {tmp_path}/x", 2).stderr


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{O_PROJ}.shape"), "o_proj.shape is missing"),
        (lambda t: t.update({f"{O_PROJ}.shape": torch.tensor([32, 36])}), "must be .*32, 18"),
        (lambda t: t.update({f"{O_PROJ}.shape": torch.tensor([32, 32, 1])}), "two positive int64"),
        (lambda t: t.update({f"{O_PROJ}.shape": torch.tensor([-32, -32])}), "two positive int64"),
        (lambda t: t.update({f"{O_PROJ}.shape": torch.tensor([32.0, 32.0])}), "two positive int64"),
        (lambda t: t[f"{O_PROJ}.bitmask"][0].fill_(7), "does not keep two of each four weights in 4 of 128"),
        (lambda t: t.update({f"{O_PROJ}.bitmask": t[f"{O_PROJ}.bitmask"].to(torch.int32)}), "o_proj.bitmask must be"),
        (
            lambda t: t.update({f"{O_PROJ}.compressed": t[f"{O_PROJ}.compressed"][:, :8].clone()}),
            r"got torch.bfloat16",
        ),
        (lambda t: t["model.layers.0.mlp.down_proj.bitmask"][0, 4].fill_(0x1F), "beyond column 36"),
        (lambda t: t.update({f"{O_PROJ}.weight": torch.zeros(32, 32)}), "both dense and compressed"),
        (lambda t: t.pop("model.norm.weight"), "missing keys"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected keys"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), "model.norm.weight|mismatch"),
        (lambda t: [t.pop(name) for name in list(t) if name.endswith("bitmask")], r"no tensor \*.bitmask"),
    ],
)
def test_damaged_bitmasks_are_refused(tmp_path, change, said):
    folder = shutil.copytree(BITMASK_FOLDER, tmp_path / "old")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=said):
        nms.load_bitmask(folder)
    run(f"compress {folder} --output {tmp_path}/out", 1)
    assert not (tmp_path / "out").exists()


def test_other_ways_of_being_no_bitmask(tmp_path, base_folder):
    with pytest.raises(ConfigError, match="load it with from_pretrained"):
        nms.load_bitmask(base_folder)
    folder = shutil.copytree(BITMASK_FOLDER, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantised by compressed-tensors"):
        nms.load_bitmask(folder)
    tensors = load_file(BITMASK_FOLDER / "model.safetensors")
    tensors[f"{O_PROJ}.compressed"] = tensors[f"{O_PROJ}.compressed"].to(torch.float8_e4m3fn)
    folder = shutil.copytree(BITMASK_FOLDER, tmp_path / "fp8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="quantised too"):
        nms.load_bitmask(folder)
    config = json.loads((BITMASK_FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no such type"}))
    with pytest.raises(FormatError, match="no such type"):
        nms.load_bitmask(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(UnsupportedError, match="NoSuchModel"):
        nms.load_bitmask(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((BITMASK_FOLDER / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(FormatError, match="damaged or cut short"):
        nms.load_bitmask(folder)


# --- semi-structured tensors ------------------------------------------------------------------------------------------
def semi_structured(weight: torch.Tensor) -> nn.Parameter:
    """A 2:4 weight in CUTLASS's layout, put together on the CPU."""
    kept = weight != 0
    if weight.dtype == torch.float32:  # one of two, as two halves each
        ids = ids_of_24(kept.repeat_interleave(2, dim=1))
    else:
        ids = ids_of_24(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, PyTorch says
        held = torch.sparse.SparseSemiStructuredTensorCUTLASS(
            weight.shape,
            packed=weight[kept].view(len(weight), -1),
            meta=cutlass_metadata(ids),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
        return nn.Parameter(held, requires_grad=False)


@pytest.fixture
def semi_structured_llama(make_llama):
    """A masked model whose linear layers but the head are held so, and the same with plain weights."""
    model, plain = (masked(make_llama(torch.bfloat16, hidden_size=64, intermediate_size=128)) for _ in range(2))
    for module in prunable(model).values():
        module.weight = semi_structured(module.weight.detach())
    return model, plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_semi_structured_weights_become_plain(dtype):
    weight = torch.randn(64, 128).to(dtype)
    keep = 2 if dtype != torch.float32 else 1
    groups = weight.view(-1, 2 * keep)
    groups.scatter_(1, groups.abs().topk(keep, largest=False).indices, 0)
    assert torch.equal(dense_of(semi_structured(weight)), weight)
    assert dense_of(weight) is weight


def test_metadata_of_cutlass_goes_back_to_ids():
    ids = torch.randint(0, 256, (96, 24), dtype=torch.uint8)
    assert torch.equal(ids_of_metadata(cutlass_metadata(ids)), ids)


def test_a_model_of_semi_structured_weights(semi_structured_llama, make_llama, tmp_path):
    model, plain = semi_structured_llama
    base = make_llama(torch.bfloat16, hidden_size=64, intermediate_size=128)
    found = nms.import_mask(model, base, tmp_path / "mask")
    assert (found.kind, len(found.report.codes), found.updated) == ("model", 14, [])
    assert same_weights(merged(base, tmp_path / "mask"), plain)
    nms.export(model, tmp_path / "npz", "npz")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, torch.sparse.SparseSemiStructuredTensor)
    packed = nms.compress(model)
    assert isinstance(packed.model.layers[0].mlp.up_proj, nms.SparseLinear24)
    assert same_weights(nms.decompress(packed), plain)


def test_from_semi_structured(semi_structured_llama):
    model, plain = semi_structured_llama
    assert nms.from_semi_structured(model) is model
    assert same_weights(model, plain) and same_weights(nms.from_semi_structured(plain), model)


def test_a_failed_compress_leaves_semi_structured_weights(semi_structured_llama):
    model, _ = semi_structured_llama
    before = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError):
        nms.compress(model, masks={"nothing": torch.ones(1, 1)})
    assert model.model.layers[0].mlp.up_proj.weight is before


def test_semi_structured_needs_a_gpu(make_llama):
    with pytest.raises(UnsupportedError, match="on a CUDA device"):
        nms.to_semi_structured(masked(make_llama(torch.bfloat16, hidden_size=64, intermediate_size=128)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cutlass", [True, False])
def test_semi_structured_and_back_on_a_gpu(make_llama, monkeypatch, cutlass):
    if cutlass and torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("PyTorch's CUTLASS product runs on sm_8x only")
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    model, plain = (masked(make_llama(torch.bfloat16, hidden_size=64, intermediate_size=128)).cuda() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nms.to_semi_structured(model)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, torch.sparse.SparseSemiStructuredTensor)
    assert same_weights(nms.from_semi_structured(model), plain)


# --- exports ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["adapter", "packed", "masked"])
@pytest.mark.parametrize("format", CLI_FORMATS)
def test_what_is_exported_comes_back(make_llama, npz, tmp_path, form, format):
    expected = apply_as_maskllm(make_llama(), npz)
    nms.import_mask(npz, make_llama(), tmp_path / "mask")
    model = nms.load_mask(make_llama(), tmp_path / "mask")
    if form == "packed":
        model = nms.compress(model)
    elif form == "masked":
        model = model.merge_and_unload()
    exported = nms.export(model, tmp_path / "out", format)
    assert (len(exported.layers), exported.left_dense) == (14, {})
    again = find_mask(tmp_path / "out", make_llama())
    assert (again.groups_completed, len(again.report.codes), again.updated) == (0, 14, [])
    published = nms.read_mask(tmp_path / "mask")
    assert all(torch.equal(codes.packed, published.layers[name].packed) for name, codes in again.report.codes.items())
    if format == "dense":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert same_weights(loaded, expected) and not hasattr(loaded.config, "quantization_config")
    elif format == "npz":
        assert same_weights(apply_as_maskllm(make_llama(), tmp_path / "out" / "mask_compressed.npz"), expected)
    else:
        assert same_weights(nms.load_bitmask(tmp_path / "out"), expected)
    if format != "npz":
        assert same_weights(model if form != "adapter" else exported.model.base_model.model, expected)


def test_exported_masks_keep_weights_that_are_zero(make_llama, tmp_path):
    """From codes and ids, not from zeros: what a mask keeps is kept though its value is 0."""
    base = make_llama()
    name = next(iter(prunable(base)))
    with torch.no_grad():
        base.get_submodule(name).weight[0, :4] = 0
    masks = random_masks(base)
    masks[name][0, :4] = torch.tensor([False, True, False, True])
    nms.import_mask(write_as_maskllm(tmp_path / "m.npz", base, masks), base, tmp_path / "mask")
    packed = nms.compress(nms.load_mask(base, tmp_path / "mask"))
    nms.export(packed, tmp_path / "npz", "npz")
    bits = np.unpackbits(np.load(tmp_path / "npz" / "mask_compressed.npz")[f"{name}.weight.mask"])
    assert bits[:4].tolist() == [0, 1, 0, 1]
    nms.export(packed, tmp_path / "bitmask", "bitmask")
    stored = load_file(tmp_path / "bitmask" / "model.safetensors")[f"{name}.bitmask"]
    assert unpack_bits(stored, 32)[0, :4].tolist() == [False, True, False, True]


@pytest.mark.parametrize("form", ["packed", "masked"])
def test_a_mask_inside_24_is_exported_as_narrow_as_it_is(make_llama, tmp_path, form):
    base = make_llama()
    model = get_peft_model(base, nms.NMSparseConfig(pattern="1:4", init_weights=False))
    model = nms.compress(model) if form == "packed" else model.merge_and_unload()
    expected = nms.decompress(copy.deepcopy(model))
    if form == "packed":
        with pytest.raises(FormatError, match="filled up to 2:4 from another pattern"):
            nms.export(model, tmp_path / "x", "npz")
        with pytest.raises(FormatError, match=r"keeps more than 1 of 8"):
            nms.export(model, tmp_path / "x", "npz", pattern="1:8")
    nms.export(model, tmp_path / "npz", "npz", pattern="1:4")
    file = tmp_path / "npz" / "mask_compressed.npz"
    assert same_weights(apply_as_maskllm(make_llama(), file), expected)
    assert find_mask(file, make_llama(), "1:4").groups_completed == 0 and not (tmp_path / "x").exists()


def test_another_pattern_than_that_of_the_mask_is_refused(llama, npz, tmp_path):
    nms.import_mask(npz, llama, tmp_path / "mask")
    with pytest.raises(ConfigError, match="the mask on the model is 2:4"):
        nms.export(nms.load_mask(llama, tmp_path / "mask"), tmp_path / "x", "npz", pattern="1:4")


def test_parameters_that_the_base_lacks_are_refused(make_llama, tmp_path):
    masked(make_llama(attention_bias=True)).save_pretrained(tmp_path / "biased")
    with pytest.raises(BaseModelMismatchError, match=r"8 parameters that the base lacks, first .*bias"):
        find_mask(tmp_path / "biased", make_llama())


def test_other_arrays_and_the_source_itself_survive_a_second_run(make_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("base")
    masked(make_llama()).save_pretrained("sparse")
    run("import-mask sparse --base base --output out")
    np.savez("out/activations.npz", a=np.ones(3))
    run("import-mask sparse --base base --output out")
    assert Path("out/activations.npz").is_file()
    run("export sparse --format npz --output theirs")
    source = "theirs/mask_compressed.npz"
    assert "also an input" in run(f"import-mask {source} --base base --output theirs --overwrite", 2).stderr
    assert Path(source).is_file()


@pytest.mark.parametrize("format", CLI_FORMATS)
def test_conv1d_weights_are_exported(tmp_path, format):
    expected, model = (masked(FAMILIES["gpt2"]()) for _ in range(2))
    packed = nms.compress(model)
    if format == "bitmask":
        with pytest.raises(UnsupportedError, match=r"it is no torch.nn.Linear"):
            nms.export(packed, tmp_path / "out", format)
        assert not (tmp_path / "out").exists() and nms.verify(packed).kind == "packed model"
        return
    nms.export(packed, tmp_path / "out", format)
    if format == "npz":
        assert same_weights(apply_as_maskllm(FAMILIES["gpt2"](), tmp_path / "out" / "mask_compressed.npz"), expected)
    else:
        assert same_weights(type(expected).from_pretrained(tmp_path / "out"), expected)
    nms.import_mask(tmp_path / "out", FAMILIES["gpt2"](), tmp_path / "mask")
    assert same_weights(merged(FAMILIES["gpt2"](), tmp_path / "mask"), expected)


def with_terms(make_llama, **terms):
    config = nms.NMSparseConfig(**terms)
    from peft import get_peft_model

    model = get_peft_model(make_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("slorb", "low_rank", "delta")):
                parameter.normal_(std=0.01)
    return model.eval()


def test_a_side_branch_is_merged_by_dense_and_refused_by_the_others(make_llama, tokens, tmp_path, caplog):
    model = with_terms(make_llama, slorb_block=8, low_rank=2)
    expected = model(tokens).logits
    for format in ("npz", "bitmask"):
        with pytest.raises(UnsupportedError, match=r"14 layers compute a term beside the mask.*format='dense'"):
            nms.export(model, tmp_path / "out", format)
    assert not (tmp_path / "out").exists() and torch.equal(model(tokens).logits, expected)
    packed = nms.compress(with_terms(make_llama, slorb_block=8))
    with pytest.raises(UnsupportedError, match="a term beside the mask"):
        nms.export(packed, tmp_path / "out", "npz")
    exported = nms.export(model, tmp_path / "out", "dense")
    assert exported.side_branches == 14
    assert sum("their weights are dense now" in record.message for record in caplog.records) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_trained_kept_weights_are_no_part_of_a_mask(make_llama, tmp_path):
    with pytest.raises(UnsupportedError, match="kept weights were trained"):
        nms.export(with_terms(make_llama, delta_rank=1), tmp_path / "out", "npz")
    model = with_terms(make_llama, delta_rank=1)
    nms.export(model, tmp_path / "out", "bitmask")
    with pytest.raises(BaseModelMismatchError):
        find_mask(tmp_path / "out", make_llama())
    assert nms.verify(nms.load_bitmask(tmp_path / "out")).ok


@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_quantised_values_are_exported_as_the_floats_they_stand_for(make_llama, tmp_path, format):
    model = nms.compress(masked(make_llama()), values="int4")
    exported = nms.export(model, tmp_path / "out", format)
    assert exported.values == "int4"
    expected = nms.decompress(nms.compress(masked(make_llama()), values="int4"))
    loaded = (
        nms.load_bitmask(tmp_path / "out") if format == "bitmask" else type(expected).from_pretrained(tmp_path / "out")
    )
    assert same_weights(loaded, expected)
    assert "rounded to int4" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported(make_llama, tmp_path):
    with pytest.raises(ConfigError, match="choose one of dense, npz, bitmask"):
        nms.export(masked(make_llama()), tmp_path / "out", "gguf")
    with pytest.raises(UnsupportedError, match="prune it first"):
        nms.export(make_llama(), tmp_path / "out", "npz")
    other = nms.prune(model := make_llama(), "magnitude", "4:8").pattern
    with pytest.raises(UnsupportedError, match="no layer can be stored as sparse-24-bitmask"):
        nms.export(model, tmp_path / "out", "bitmask", pattern=other)
    nms.export(model, tmp_path / "out", "npz", pattern=other)
    assert len(find_mask(tmp_path / "out", make_llama(), "4:8").report.codes) == 14


def test_a_write_that_reads_back_wrong_puts_nothing_in_place(make_llama, tmp_path, monkeypatch):
    from hf_nmsparse.hub import exporting

    def careless(path, masks):
        exporting_write(path, ((name, ~mask) for name, mask in masks))

    exporting_write = exporting.write_npz
    monkeypatch.setattr(exporting, "write_npz", careless)
    with pytest.raises(FormatError, match="masks read back differ"):
        nms.export(masked(make_llama()), tmp_path / "out", "npz")
    monkeypatch.setattr(
        exporting,
        "pack_bitmask",
        lambda weight, mask: {
            "compressed": torch.zeros(len(weight), weight.shape[1] // 2),
            "bitmask": torch.full((len(weight), weight.shape[1] // 8), 0x33, dtype=torch.uint8),
            "shape": torch.tensor(weight.shape),
        },
    )
    with pytest.raises(FormatError, match="weights read back differ"):
        nms.export(masked(make_llama()), tmp_path / "out", "bitmask")
    assert list(tmp_path.iterdir()) == []


def test_equal_masks_give_equal_files(make_llama, tmp_path):
    for name in ("one", "other"):
        nms.export(masked(make_llama()), tmp_path / name, "npz")
    assert (tmp_path / "one" / "mask_compressed.npz").read_bytes() == (
        tmp_path / "other" / "mask_compressed.npz"
    ).read_bytes()


# --- the command line -------------------------------------------------------------------------------------------------
@pytest.fixture
def there(base_folder, npz, tmp_path, monkeypatch) -> Path:
    (tmp_path / "base").symlink_to(base_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_line_of_import_and_export(there, make_llama):
    expected = apply_as_maskllm(make_llama(), there / "mask.npz")
    dry = facts("import-mask mask.npz --base base --output mask --dry-run")
    assert (
        dry["dry_run"] and dry["groups"] == 14 * 0 + sum(m.numel() for m in random_masks(make_llama()).values()) // 4
    )
    assert not Path("mask").exists()
    found = facts("import-mask mask.npz --base base --output mask")
    assert (found["kind"], found["groups_completed"], len(found["layers"])) == ("npz", 0, 14)
    assert found["layers"] == dry["layers"] and found["dense_layers"] == ["lm_head"] and found["mask_bytes"] > 0
    assert kind_of(there / "mask") is Kind.MASK
    results = json.loads(Path("mask/results.json").read_text())
    assert (results["method"], results["base_model"]) == ("imported (npz)", "base")
    assert "imported (npz)" in Path("mask/README.md").read_text()
    assert facts("verify mask --base base")["ok"]
    run("merge base --mask mask --output merged")
    assert same_weights(AutoModelForCausalLM.from_pretrained("merged"), expected)
    run("compress base --mask mask --output packed")
    ways = (
        ("mask", "npz"),
        ("packed", "bitmask"),
        ("packed", "npz"),
        ("merged", "dense"),
        ("base --mask mask", "dense"),
    )
    for source, format in ways:
        output = f"{source.split()[0]}-{format}"
        assert facts(f"export {source} --format {format} --output {output} --dry-run")["dry_run"]
        assert not Path(output).exists()
        written = facts(f"export {source} --format {format} --output {output}")
        assert len(written["layers"]) == 14 and written["bytes"] > 0
        assert kind_of(there / output) is CLI_FORMATS[format] and Path(output, "results.json").is_file()
        again = facts(f"import-mask {output} --base base --output again")  # each time over the last one
        assert len(again["layers"]) == 14 and not again["updated_weights"]
        assert same_weights(merged(make_llama(), Path("again")), expected)
    assert "Transformers 5, load it with random weights" in Path("packed-bitmask/README.md").read_text()
    assert "wrote" in run("export packed --format npz --output packed-npz").stdout


def test_masks_with_updated_weights_on_the_command_line(there, make_llama):
    sparse = masked(make_llama())
    with torch.no_grad():
        sparse.model.layers[0].mlp.up_proj.weight.mul_(2)
    sparse.save_pretrained("updated")
    assert "nmsparse compress" in run("import-mask updated --base base --output mask", 1).stderr
    assert not Path("mask").exists()
    found = facts("import-mask updated --base base --output mask --mask-only")
    assert found["updated_weights"] == ["model.layers.0.mlp.up_proj"]
    data = json.loads(Path("mask/results.json").read_text())["data"]
    assert "without the new values that 1 weights have there" in data["imported mask"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("import-mask nothing.npz --base base --output out", 2, "there is no such folder"),
        ("import-mask base --base base --output out", 1, "there is no mask in it"),
        ("import-mask base/config.json --base base --output out", 2, "is no .npz"),
        ("import-mask mask.npz --base base --output out --pattern 2:x", 2, "2:x"),
        ("import-mask mask.npz --base base --output out --pattern 1:4", 1, "keeps more than 1 of 4"),
        ("import-mask mask.npz --base base --output out --revision main", 2, "main"),
        ("import-mask mask.npz --base base --output base", 2, "also an input"),
        ("import-mask mask.npz --base mask.npz --output out", 2, "mask.npz"),
        ("export base --format dense --output out", 2, "prune it first"),
        ("export base --format gguf --output out", 2, "gguf"),
        ("export base --format npz --output out --task law", 2, "--task has no effect without --mask"),
        ("export nowhere/at/all --format npz --output out", 2, "nowhere/at/all"),
    ],
)
def test_wrong_use(there, line, code, said):
    stderr = run(line, code).stderr
    assert said in " ".join(stderr.split()) or said in stderr
    assert (
        not Path("out").exists() and json.loads(run(f"{line} --json", code).stdout or '{"ok": false}')["ok"] is False
    )


def test_outputs_of_another_kind_are_not_overwritten_unasked(there, make_llama):
    masked(make_llama()).save_pretrained("sparse")
    run("export sparse --format npz --output out")
    assert "--overwrite" in run("export sparse --format bitmask --output out", 2).stderr
    run("export sparse --format bitmask --output out --overwrite")
    assert kind_of(there / "out") is Kind.BITMASK and not list(Path("out").glob("*.npz"))
    run("export sparse --format bitmask --output out")


@pytest.mark.parametrize("verb", ["import-mask", "export"])
def test_help_has_an_example(verb):
    text = " ".join(run(f"{verb} --help").stdout.split())
    assert f"Example: nmsparse {verb} " in text and "--json" in text and "--dry-run" in text
    assert verb in run("--help").stdout
