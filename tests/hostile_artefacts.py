# SPDX-License-Identifier: Apache-2.0
"""A tiny sound artefact of each kind that is read, its loader, and what of it must survive damage. Used by tests and benchmarks/fuzz.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hostile import Outcome, outcome
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig, SparseLinear24
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import load_text
from hf_nmsparse.evaluation.kick_data import read_tasks
from hf_nmsparse.fingerprint import digest, to_hex
from hf_nmsparse.results import RunResults

MASK, CONFIG, MODEL = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
LAYERS = ["up_proj", "down_proj"]
State = dict[str, object]


@dataclass
class Artefact:
    """Files of one kind, and the way through which they are read.

    Args:
        name (`str`): of kind and way.
        folder (`Path`): a copy of the files, to alter.
        files (`tuple[str, ...]`): those to alter.
        load (`Callable`): reads the folder; returns what must survive.
        untouched (`Callable`): what a refusal must leave alone.
        keys (`tuple[str, ...]`): the fields of its JSON that are ours; by default all of them.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    load: Callable[[Path], object]
    untouched: Callable[[], object] = lambda: None
    keys: tuple[str, ...] = ()
    expected: object = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.expected = self.load(self.folder)

    def content(self, name: str) -> bytes:
        """The bytes of a file as they were."""
        return (self.folder.parent / "sound" / name).read_bytes()

    def alter(self, name: str, data: bytes) -> None:
        """Put other bytes into one file of the copy."""
        (self.folder / name).write_bytes(data)

    def judge(self, name: str, data: bytes) -> Outcome:
        """What the loader makes of other bytes in one file, which is put back as it was."""
        self.alter(name, data)
        try:
            return outcome(
                lambda: self.load(self.folder),
                self.expected,
                untouched=self.untouched,
                watched=self.folder.parent,
                file_bytes=len(data),
            )
        finally:
            self.alter(name, self.content(name))


# --- what must survive --------------------------------------------------------------------------------------------------
def state_of(model: nn.Module) -> State:
    """Digests of all tensors."""
    return {name: to_hex(digest(value)) for name, value in model.state_dict().items()}


def masks_of(model: nn.Module) -> State:
    """The mask of each layer and what is added beside it, after the checks before its first use."""
    found: State = {}
    for name, layer in mask_layers(model).items():
        layer.check_usable("default")
        found[name] = to_hex(digest(layer.hard_mask("default")))
        found[f"{name} adds"] = to_hex(digest(layer(torch.eye(layer.in_features))))
    return found


def packed_of(model: nn.Module) -> State:
    """Every tensor of the packed layers. The others have no digest, as in any Transformers checkpoint."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear24)}
    found: State = {name: state_of(module) for name, module in layers.items()}
    return found | {
        f"{name} gives": to_hex(digest(layer(torch.eye(layer.in_features)))) for name, layer in layers.items()
    }


def shapes_of(model: nn.Module) -> State:
    """Shapes alone: a bitmask has no digests, so that other values cannot be noticed."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# --- building ---------------------------------------------------------------------------------------------------------
def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def masked(seed: int = 0, **config) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(
        tiny_llama(), NMSparseConfig(**{"target_modules": LAYERS, "init_weights": False, **config})
    ).eval()


class Doors:
    """Ways to load, over one base model that a refusal must leave as it was."""

    def __init__(self) -> None:
        self.base = tiny_llama()

    def untouched(self) -> object:
        return state_of(self.base), len(mask_layers(self.base)), hasattr(self.base, "peft_config")

    def load_mask(self, folder: Path) -> State:
        model = nms.load_mask(self.base, folder)
        self.base = tiny_llama()  # before it is used: what fails now fails on a model that is masked already
        return masks_of(model)

    def peft(self, folder: Path) -> State:
        base, self.base = self.base, tiny_llama()  # PEFT puts its layers in before it reads the tensors
        return masks_of(PeftModel.from_pretrained(base, folder))

    def peft_shapes(self, folder: Path) -> State:
        """Of a training checkpoint, whose logits have no digest: its layers alone."""
        return dict.fromkeys(self.peft(folder))

    def import_mask(self, folder: Path) -> State:
        out = folder.parent / "out"
        try:
            nms.import_mask(folder / "mask_compressed.npz", self.base, out)
            return {name: to_hex(digest(layer.packed)) for name, layer in nms.read_mask(out).layers.items()}
        finally:
            if (out / MASK).is_file():
                shutil.rmtree(out)


def verified(folder: Path) -> State:
    report = nms.verify(folder)
    return {"ok": report.ok, **{name: counts.groups for name, counts in report.layers.items()}}


def auto_model(folder: Path) -> State:
    return packed_of(AutoModelForCausalLM.from_pretrained(folder))


def results_read(folder: Path) -> bool:
    results = RunResults.read(folder / "results.json")
    return isinstance(results, RunResults)


def tasks_read(folder: Path) -> int:
    return len(read_tasks(folder)) and 1


def texts_read(folder: Path) -> bool:
    return bool(load_text(folder / "texts.jsonl"))


def artefacts(root: Path) -> dict[str, Artefact]:
    """One of each kind and way, below `root`."""
    doors = Doors()
    mask = nms.save_mask(masked(), root / "masks" / "mask")
    terms = nms.save_mask(masked(pattern="1:4", slorb_block=6), root / "masks" / "terms")
    near = masked()
    with torch.no_grad():
        layer = next(iter(mask_layers(near).values()))
        layer.nmsparse_logits["default"].weight[0].neg_()
    nms.save_mask(near, root / "masks" / "delta", delta_to=mask)
    masked(relaxation="elementwise").save_pretrained(root / "checkpoint")
    packed, rounded = nms.compress(masked(slorb_block=6)), nms.compress(masked(), values="int4")
    packed.save_pretrained(root / "packed")
    rounded.save_pretrained(root / "rounded")
    nms.export(masked(), root / "npz", "npz")
    shutil.copytree(Path(__file__).with_name("bitmask_llama"), root / "bitmask")
    (root / "results").mkdir()
    RunResults(pattern="2:4", perplexity={"dense": 3.0}, layers=[{"name": "a", "kept_energy": 0.5}]).write(
        root / "results" / "results.json"
    )
    (root / "tasks").mkdir()
    item = {"question": "q", "options": ["a", "b"], "answer": 1}
    (root / "tasks" / "choice.jsonl").write_text("\n".join([json.dumps(item)] * 3) + "\n")

    (root / "texts").mkdir()
    (root / "texts" / "texts.jsonl").write_text('{"text": "a b c"}\n{"text": "d e f"}\n')

    def of(name: str, source: Path, files: tuple[str, ...], load: Callable[[Path], object], **more) -> Artefact:
        place = root / name
        shutil.copytree(source, place / "sound")
        shutil.copytree(source, place / "work")
        if source.name == "delta":
            shutil.copytree(mask, place / "mask")
        return Artefact(name, place / "work", files, load, **more)

    of_mask = {"files": (CONFIG, MASK), "untouched": doors.untouched}
    of_model = {"files": ("config.json", MODEL)}
    of_transformers = {
        **of_model,
        "keys": ("quantization_config",),
    }  # all else in config.json is read by Transformers alone
    found = [
        of("mask", mask, load=doors.load_mask, **of_mask),
        of("terms", terms, load=doors.load_mask, **of_mask),
        of("delta", root / "masks" / "delta", load=doors.load_mask, **of_mask),
        of("mask-verify", mask, load=verified, **of_mask),
        of("mask-peft", mask, load=doors.peft, files=(CONFIG, MASK)),
        of("terms-peft", terms, load=doors.peft, files=(MASK,)),
        of("checkpoint-peft", root / "checkpoint", load=doors.peft_shapes, files=(MASK,)),
        of("packed", root / "packed", load=auto_model, **of_transformers),
        of("packed-verify", root / "packed", load=verified, **of_model),
        of("rounded", root / "rounded", load=auto_model, **of_transformers),
        of("npz", root / "npz", ("mask_compressed.npz",), doors.import_mask, untouched=doors.untouched),
        of("bitmask", root / "bitmask", load=lambda folder: shapes_of(nms.load_bitmask(folder)), **of_model),
        of("results", root / "results", ("results.json",), results_read),
        of("tasks", root / "tasks", ("choice.jsonl",), tasks_read),
        of("texts", root / "texts", ("texts.jsonl",), texts_read),
    ]
    return {artefact.name: artefact for artefact in found}
