# SPDX-License-Identifier: Apache-2.0
"""Each family by what users type, from a prior to `from_pretrained` in a fresh process, and by the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command_line import facts, run
from families import FAMILIES, inputs_for
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from small_tokenizers import letters
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers

AUTO = {
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "gemma3_vision": "AutoModelForImageTextToText",
}
REFUSED = ["bert", "t5", "vit", "whisper"]
PROGRAM = """
import sys, torch, transformers, hf_nmsparse
from pathlib import Path
from safetensors.torch import load_file, save_file
for line in sys.argv[1:]:
    auto, folder = line.split("=", 1)
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(Path(folder) / "inputs.safetensors")).logits
    save_file({"logits": logits.contiguous()}, Path(folder) / "fresh.safetensors")
"""


def auto_of(family: str) -> str:
    return AUTO.get(family, "AutoModelForCausalLM")


def examples(family: str) -> list[dict[str, torch.Tensor]]:
    inputs = inputs_for(family)
    if family == "vit":
        inputs["labels"] = torch.tensor([0, 1, 2, 0])
    else:
        inputs["labels"] = inputs.pop("decoder_input_ids", inputs.get("input_ids")).clone()
    return [{name: value[row] for name, value in inputs.items()} for row in range(4)]


def trained(model: nn.Module, family: str, folder: Path) -> nn.Module:
    """The model after two steps of the stock Trainer."""
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
    arguments = TrainingArguments(str(folder), **options, **quiet)
    callbacks = [nms.MaskScheduleCallback()]
    Trainer(model, arguments, train_dataset=examples(family), callbacks=callbacks).train()
    return model.eval()


def packed_by_the_whole_line(family: str, folder: Path) -> tuple[Path, torch.Tensor]:
    """Prior, training, publishing, loading on a fresh base, packing and saving: the packed folder and its logits."""
    base, mask, packed = (folder / f"{family}-{part}" for part in ("base", "mask", "packed"))
    FAMILIES[family]().save_pretrained(base)
    model = get_peft_model(FAMILIES[family](), nms.NMSparseConfig(pattern="2:4", prior="wanda"))
    nms.set_prior(model, "wanda", calibration=[inputs_for(family)], progress=False)
    before = [layer.mask_codes("default") for layer in mask_layers(model).values()]
    trained(model, family, folder / "run")
    after = [layer.mask_codes("default") for layer in mask_layers(model).values()]
    assert not all(map(torch.equal, before, after)), family
    nms.save_mask(model, mask)
    fresh = nms.load_mask(getattr(transformers, auto_of(family)).from_pretrained(base), mask)
    inputs = inputs_for(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(fresh(**inputs).logits, expected), family
        sparse = nms.compress(fresh)
        logits = sparse(**inputs).logits
    assert torch.allclose(logits, expected, atol=1e-5), family
    sparse.save_pretrained(packed)
    assert nms.verify(packed).ok, family
    save_file(inputs, packed / "inputs.safetensors")
    return packed, logits


@pytest.mark.slow
def test_every_family_goes_the_whole_line_and_loads_in_a_fresh_process(tmp_path):
    done = {family: packed_by_the_whole_line(family, tmp_path) for family in FAMILIES}
    lines = [f"{auto_of(family)}={folder}" for family, (folder, _) in done.items()]
    finished = subprocess.run([sys.executable, "-c", PROGRAM, *lines], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for family, (folder, logits) in done.items():
        assert torch.equal(load_file(folder / "fresh.safetensors")["logits"], logits), family


# --- the commands -----------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return tmp_path


def written(family: str) -> None:
    FAMILIES[family]().save_pretrained("base")
    letters().save_pretrained("base")


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_the_commands_take_causal_language_models_the_whole_line(folder, family):
    written(family)
    window = "--sequence-length 16"
    run(f"prune base --criterion wanda --calibration text.txt --samples 4 {window} --output pruned")
    run(f"train base --data text.txt {window} --output learned --max_steps 2 --report_to none")
    run("compress base --mask learned --output packed")
    for made in ("pruned", "pruned/mask", "learned", "packed"):
        assert facts(f"verify {made}")["ok"], made
        assert facts(f"inspect {made}"), made
    scores = [
        facts(f"eval {made} --text text.txt {window} --max-tokens 64")["perplexity"] for made in ("learned", "packed")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_the_commands_refuse_other_models_in_one_line_and_say_what_to_do(folder, family):
    written(family)
    name = type(FAMILIES[family]()).__name__
    for command in (
        "prune base --criterion magnitude --output x",
        "prune base --criterion magnitude --packed --output x",
        "train base --data text.txt --output x --max_steps 2",
        "compress base --output x",
        "eval base --text text.txt",
        "plan base",
    ):
        said = run(command, 2).stderr
        assert (
            f"base is a {name}, and the commands work on causal language models only. In Python all models go" in said
        )
        assert not Path("x").exists()


@pytest.mark.parametrize("family", REFUSED)
def test_verify_and_inspect_take_every_family(folder, family):
    model = FAMILIES[family]()
    report = nms.prune(model, "magnitude", "2:4", progress=False)
    nms.save_mask(model, "mask", report=report)
    nms.compress(model).save_pretrained("packed")
    for made in ("mask", "packed"):
        assert facts(f"verify {made}")["ok"] and facts(f"inspect {made}")


# --- the docs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_families_in_the_docs_says_how_each_is_loaded_and_whether_the_commands_take_it(family):
    methods = (Path(__file__).parent.parent / "docs" / "METHODS.md").read_text()
    taken = "no" if family in REFUSED else "yes"
    assert f"| {type(FAMILIES[family]()).__name__} | {auto_of(family)} | {taken} |" in methods
