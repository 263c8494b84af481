# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files at every door: a named error soon, or what was there before; nothing run, written or changed.

A part of what benchmarks/fuzz.py does for as long as one likes, always the same one; and what that has found before.
"""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import hostile
import pytest
import torch
from hostile_artefacts import CONFIG, MASK, MODEL, Artefact, artefacts, masked, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertModel, AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.data import load_text
from hf_nmsparse.errors import ConfigError, FormatError, NMSparseError
from hf_nmsparse.results import RunResults

NAMES = [
    "mask",
    "terms",
    "delta",
    "mask-verify",
    "mask-peft",
    "terms-peft",
    "checkpoint-peft",
    "packed",
    "packed-verify",
    "rounded",
    "npz",
    "bitmask",
    "results",
    "tasks",
    "texts",
]
MOST = 60  # alterations of one file and one sort


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Artefact]:
    return artefacts(tmp_path_factory.mktemp("artefacts"))


def wrong(artefact: Artefact, name: str, mutations) -> list[str]:
    judged = ((told, artefact.judge(name, data)) for told, data in mutations)
    return [f"{name}, {told}: {outcome.kind} {outcome.detail}" for told, outcome in judged if not outcome.right]


def some(mutations) -> list[hostile.Mutation]:
    mutations = list(mutations)
    return mutations if len(mutations) <= MOST else random.Random(0).sample(mutations, MOST)


# --- everything -----------------------------------------------------------------------------------------------------
def test_there_is_a_test_of_every_artefact(found):
    assert list(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_byte_is_refused_or_changes_nothing(found, name):
    artefact = found[name]
    files = [file for file in artefact.files if not (artefact.keys and file.endswith(".json"))]
    for file in files:
        data = artefact.content(file)
        assert wrong(artefact, file, hostile.flips(data, step=max(1, len(data) // MOST))) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_knows_the_format_is_refused_or_changes_nothing(found, name):
    artefact = found[name]
    for file in artefact.files:
        altered = some(hostile.structured(file, artefact.content(file), artefact.keys))
        assert wrong(artefact, file, altered) == []


@pytest.mark.parametrize("name", ["mask", "delta"])
def test_every_byte_of_a_mask_is_refused_or_changes_nothing(found, name):
    assert wrong(found[name], MASK, hostile.flips(found[name].content(MASK), seed=1)) == []


def test_the_judge_finds_what_is_wrong(tmp_path):
    """The harness itself: each wrong outcome is told apart."""

    def writes() -> None:
        (tmp_path / "file").write_text("x")
        raise FormatError("refused too late")

    def foreign() -> None:
        NMSparseConfig(pattern=Unprintable())

    state = []

    def touches() -> None:
        state.append(1)
        raise FormatError("refused too late")

    assert hostile.outcome(lambda: 1, 1).kind == hostile.IDENTICAL
    assert hostile.outcome(lambda: 2, 1).kind == hostile.DIFFERENT
    assert hostile.outcome(foreign, 1).kind == hostile.OTHER_ERROR
    assert hostile.outcome(writes, 1, watched=tmp_path).kind == hostile.WROTE
    assert hostile.outcome(touches, 1, untouched=lambda: len(state)).kind == hostile.CHANGED
    assert hostile.outcome(lambda: sum(range(10**7)) * 0 + 1, 1, seconds=0.001).kind == hostile.SLOW
    assert hostile.outcome(lambda: len(bytearray(b"x") * (300 << 20)) and 1, 1).kind == hostile.HUNGRY


class Unprintable:
    def __repr__(self) -> str:
        raise LookupError("an error of another kind")


# --- found before -----------------------------------------------------------------------------------------------------
def doors(folder: Path) -> dict[str, object]:
    return {
        "nms.load_mask": lambda: nms.load_mask(tiny_llama(), folder),
        "PeftModel": lambda: PeftModel.from_pretrained(tiny_llama(), folder),
    }


@pytest.fixture
def terms(tmp_path) -> Path:
    return nms.save_mask(masked(pattern="1:4", slorb_block=6), tmp_path / "terms")


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
def test_a_digest_of_terms_in_another_dtype_is_refused(terms, door):
    tensors = load_file(terms / MASK)
    name = next(name for name in tensors if name.endswith(".nmsparse_terms"))
    save_file(tensors | {name: tensors[name].view(torch.float8_e4m3fn)}, terms / MASK, {"format": "pt"})
    with pytest.raises(FormatError, match=r"nmsparse_terms|digest"):
        doors(terms)[door]()


@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
@pytest.mark.parametrize("change", [{"pattern": "3:4"}, {"slorb_block": 7}])
def test_a_config_under_which_the_same_codes_or_terms_mean_others_is_refused(terms, door, change):
    rewrite(terms / CONFIG, **change)  # as many candidates as 1:4; as many blocks of 16 inputs as with 6
    with pytest.raises(FormatError, match="checksum"):
        doors(terms)[door]()


def test_a_config_whose_checksum_lost_its_name_is_refused(terms):
    rewrite(terms / CONFIG, pattern="3:4")
    text = (terms / CONFIG).read_text()
    (terms / CONFIG).write_text(text.replace('"checksum"', '"chdcksum"'))
    for load in (lambda: nms.read_mask(terms), lambda: nms.load_mask(tiny_llama(), terms), lambda: nms.verify(terms)):
        with pytest.raises(FormatError, match="chdcksum"):
            load()


@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
def test_a_digest_of_terms_that_lost_its_name_is_refused(terms, door):
    tensors = load_file(terms / MASK)
    name = next(name for name in tensors if name.endswith(".nmsparse_terms"))
    tensors[name.replace("nmsparse", "nmsparqe")] = tensors.pop(name)
    save_file(tensors, terms / MASK, {"format": "pt"})
    with pytest.raises(FormatError, match="nmsparqe"):
        doors(terms)[door]()


@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
def test_a_config_that_names_no_layer_is_refused(terms, door):
    rewrite(terms / CONFIG, target_modules=[])
    with pytest.raises(FormatError, match="target_modules"):
        doors(terms)[door]()


def test_the_checksum_of_a_config_follows_its_fields_through_peft(terms, tmp_path):
    nms.load_mask(tiny_llama(), terms).save_pretrained(tmp_path / "again")
    first, again = (json.loads((folder / CONFIG).read_text())["checksum"] for folder in (terms, tmp_path / "again"))
    assert first == again and len(first) == 16
    assert nms.read_mask(tmp_path / "again").config.slorb_block == 6


@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
def test_a_flipped_bit_in_a_term_is_found(terms, door):
    tensors = load_file(terms / MASK)
    name = next(name for name in tensors if name.endswith("nmsparse_slorb.weight"))
    tensors[name].view(torch.uint8)[3, 1] ^= 1
    save_file(tensors, terms / MASK)
    with pytest.raises(FormatError, match=r"terms beside its mask.*digest"):
        doors(terms)[door]()


def test_packed_slorb_tensors_under_another_block_size_are_refused(tmp_path):
    nms.compress(masked(slorb_block=6)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["slorb_block"] = 7  # as many blocks
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM.from_pretrained, nms.verify):
        with pytest.raises(FormatError, match="slorb_block='6' by the header"):
            load(tmp_path)


def test_a_branch_that_is_gone_from_a_packed_layer_is_missed(found, tmp_path):
    mutations = dict(hostile.header_mutations(found["packed"].content(MODEL)))
    gone = mutations["missing with its bytes model.layers.0.mlp.up_proj.weight_slorb"]
    assert "weight_slorb is missing" in found["packed"].judge(MODEL, gone).detail


def test_packed_tensors_without_their_config_are_refused_by_verify(tmp_path):
    nms.compress(masked()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="packed tensors"):
        nms.verify(tmp_path)


def test_an_array_that_hides_in_the_comment_of_another_is_not_left_out(tmp_path):
    nms.export(masked(), tmp_path / "npz", "npz")
    path = tmp_path / "npz" / "mask_compressed.npz"
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", first + 4)
    struct.pack_into("<H", data, first + 32, data.index(b"PK\5\6") - second)  # length of the comment of the first
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 1
    with pytest.raises(FormatError, match="list of arrays"):
        nms.import_mask(path, tiny_llama(), tmp_path / "out")


def test_a_tensor_that_is_there_twice_is_refused_at_every_door_of_ours(found, tmp_path):
    twice = {"mask": nms.read_mask, "packed": nms.verify, "bitmask": nms.load_bitmask}
    for name, load in twice.items():
        file, folder = found[name].files[1], tmp_path / name
        folder.mkdir()
        for path in (found[name].folder.parent / "sound").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        mutations = dict(hostile.header_mutations(found[name].content(file)))
        label = next(label for label in mutations if label.startswith("twice ") and "otherwise" not in label)
        (folder / file).write_bytes(mutations[label])
        load_file(folder / file)  # safetensors takes it
        with pytest.raises(FormatError, match="duplicate key"):
            load(folder)
    with pytest.raises(FormatError, match="duplicate key"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    "change",
    [
        {"target_parameters": True},
        {"target_parameters": [None]},
        {"dense_layers": 3},
        {"modules_to_save": "../../x"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": []},
        {"trainable_token_indices": "x"},
        {"task_type": "x"},
        {"relaxation": {}},
        {"schedule": []},
        {"prior_strength": 10**400},
        {"low_rank": 10**400},
    ],
    ids=str,
)
@pytest.mark.parametrize("door", ["nms.load_mask", "PeftModel"])
def test_a_field_of_another_type_is_named(found, door, change, tmp_path):
    nms.save_mask(masked(), tmp_path)
    rewrite(tmp_path / CONFIG, **change)
    with pytest.raises(NMSparseError, match=rf"{next(iter(change)).replace('_', '.')}"):
        doors(tmp_path)[door]()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
        {"hidden_size": 0},
        {"hidden_size": 10**12},
        {"architectures": 3},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_model_config_that_makes_no_sense_is_refused_soon(found, change):
    refused = []
    for name in ("bitmask", "packed-verify"):
        content = json.loads(found[name].content("config.json"))
        outcome = found[name].judge("config.json", json.dumps(content | change).encode())
        assert outcome.right, outcome
        refused.append(outcome.kind == hostile.REFUSED)
    assert any(refused)  # to count the groups of packed tensors not every field matters


@pytest.mark.parametrize(
    "change",
    [{"vocab_size_per_layer_input": 262_144}, {"max_window_layers": 70}, {"layer_norm_eps_steps": 5000}],
    ids=str,
)
def test_numbers_with_layers_in_their_name_are_no_layers(found, tmp_path, change):
    """Gemma 3n has the first, a Qwen2 of two layers the second."""
    shutil.copytree(found["packed"].folder.parent / "sound", tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "config.json", **change)
    assert nms.verify(tmp_path).ok


def test_more_layers_than_tensors_are_taken_where_layers_share_weights(tmp_path):
    config = AlbertConfig(
        vocab_size=16,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=40,
        num_attention_heads=1,
        intermediate_size=8,
    )
    AlbertModel(config).save_pretrained(tmp_path)
    assert len(load_file(tmp_path / MODEL)) < 40
    assert nms.verify(tmp_path).kind == "masked model"


def test_a_name_that_is_there_twice_among_many_is_found_soon(tmp_path):
    names = ",".join(f'"a{i}":0' for i in range(100_000))
    (tmp_path / "results.json").write_text("{" + names + ',"a99999":1}')
    started = time.process_time()
    with pytest.raises(FormatError, match="duplicate key 'a99999'"):
        RunResults.read(tmp_path / "results.json")
    assert time.process_time() - started < 5  # minutes, where each is counted among all


@pytest.mark.parametrize("line", [hostile.NESTED, '{"text": ' + "9" * 5000 + "}"], ids=["nested", "digits"])
def test_a_line_of_text_that_python_cannot_parse_is_named(tmp_path, line):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        load_text(tmp_path / "texts.jsonl")


# --- large, deep, slow ------------------------------------------------------------------------------------------------
LARGE = """
import json, pathlib, resource, sys, time
import hf_nmsparse as nms
from hf_nmsparse.errors import NMSparseError
from hf_nmsparse.results import RunResults

loads = {"mask": nms.read_mask, "bitmask": nms.load_bitmask, "model": nms.verify, "results": lambda folder: RunResults.read(folder / "results.json")}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for kind, load in loads.items():
    before, started = peak(), time.process_time()
    try:
        load(pathlib.Path(sys.argv[1], kind))
    except NMSparseError as error:
        print(json.dumps({"kind": kind, "error": str(error), "mib": peak() - before, "seconds": time.process_time() - started}))
"""


def test_fifty_megabytes_of_json_are_refused_in_a_second_and_little_memory(tmp_path):
    """In a process of its own, whose memory nothing else has taken before."""
    text = b'{"peft_type": "NMSPARSE", "schema_version": 1, "layers": [' + b"[]," * 16_600_000 + b"[]]}"
    files = {"mask": CONFIG, "bitmask": "config.json", "model": "config.json", "results": "results.json"}
    for kind, name in files.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(text)
        save_file({"a": torch.zeros(1)}, tmp_path / kind / (MASK if kind == "mask" else MODEL))
    done = subprocess.run([sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["kind"] for one in said] == list(files)
    for one in said:
        assert "over the limit" in one["error"] and one["seconds"] < 1 and one["mib"] < 100, one


def test_a_config_with_a_hundred_thousand_names_is_refused_soon(found):
    content = json.loads(found["mask"].content(CONFIG)) | {"target_modules": [f"a{i}" for i in range(100_000)]}
    outcome = found["mask"].judge(CONFIG, json.dumps(content).encode())
    assert outcome.kind == hostile.REFUSED, outcome


# --- code, paths, links -----------------------------------------------------------------------------------------------
class Writes:
    """Unpickled it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "mask.npz", "mask_compressed.npz"])
def test_no_pickle_is_run(found, tmp_path, name):
    folder, trap = tmp_path / "folder", tmp_path / "trap"
    folder.mkdir()
    for kind, file in (("mask", CONFIG), ("packed", "config.json")):
        (folder / file).write_bytes(found[kind].content(file))
    (folder / name).write_bytes(pickle.dumps(Writes(trap)))
    loads = [
        lambda: nms.read_mask(folder),
        lambda: nms.load_mask(tiny_llama(), folder),
        lambda: nms.verify(folder),
        lambda: nms.load_bitmask(folder),
        lambda: nms.import_mask(folder, tiny_llama(), tmp_path / "out"),
        lambda: nms.import_mask(folder / name, tiny_llama(), tmp_path / "out"),
    ]
    for load in loads:
        with pytest.raises(NMSparseError):
            load()
    for load in (
        lambda: PeftModel.from_pretrained(tiny_llama(), folder),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
    ):
        with pytest.raises(Exception):  # noqa: B017  (of PEFT and Transformers, which look for the file themselves)
            load()
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_an_array_of_objects_in_an_npz_is_not_unpickled(tmp_path):
    nms.export(masked(), tmp_path / "npz", "npz")
    source, path, trap = tmp_path / "npz" / "mask_compressed.npz", tmp_path / "objects.npz", tmp_path / "trap"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (32,), }"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps(Writes(trap))
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, array)
    with pytest.raises(FormatError, match=r"must be an \.npy"):
        nms.import_mask(path, tiny_llama(), tmp_path / "out")
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_writing_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "mask"
    victim.write_text("untouched")
    folder.mkdir()
    for name in (CONFIG, MASK, "README.md", "results.json"):
        (folder / name).symlink_to(victim)
    nms.save_mask(masked(), folder)
    assert victim.read_text() == "untouched" and not (folder / MASK).is_symlink()
    assert RunResults.read(folder / "results.json").pattern == "2:4"


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", ".", "nowhere"])
def test_a_link_to_what_is_no_file_is_refused(found, tmp_path, target):
    for name in (CONFIG, MASK):
        folder = tmp_path / name
        folder.mkdir()
        for other in (CONFIG, MASK):
            (folder / other).write_bytes(found["mask"].content(other))
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(NMSparseError, match=name):
            nms.read_mask(folder)
