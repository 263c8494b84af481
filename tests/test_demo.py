# SPDX-License-Identifier: Apache-2.0
"""A three-step smoke run of the demo on the tiny trained Llama: the whole line, end to end."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text
from hf_nmsparse.cli.demo_run import DemoSettings, run_demo, summary_table
from hf_nmsparse.errors import ConfigError

TINY = Path(__file__).parent / "tiny_llama"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text(demo_text("train")[:60_000])
    settings = DemoSettings(
        folder / "out", str(TINY), str(folder / "text.txt"), steps=3, calibration_samples=4, eval_tokens=1024
    )
    console = Console(file=(folder / "log").open("w"))
    return settings.output, run_demo(settings, console)


def test_the_demo_leaves_what_it_promises(finished):
    output, _ = finished
    facts = json.loads((output / "demo.json").read_text())
    assert list(facts["perplexity"]) == ["dense", "magnitude", "wanda", "polish", "learned"]
    assert all(value > 1 for value in facts["perplexity"].values())
    assert facts["perplexity"]["dense"] < facts["perplexity"]["polish"] < facts["perplexity"]["magnitude"]
    assert facts["reload_bit_equal"] is True and facts["base_unchanged"] is True
    assert facts["steps"] == 3 and facts["seconds"] > 0
    assert 2 / 3 < facts["mask_bits_per_weight"] < 1
    assert facts["packed_ratio"] == 0.5625
    assert {"report.html", "perplexity.png", "mask", "packed"} <= {path.name for path in output.iterdir()}
    assert not (output / "trainer").exists()


def test_its_mask_and_packed_model_load_and_are_sound(finished):
    output, _ = finished
    assert nms.verify(output / "mask").ok and nms.verify(output / "packed").ok
    base = AutoModelForCausalLM.from_pretrained(TINY)
    merged = nms.load_mask(base, output / "mask").merge_and_unload()
    packed = nms.decompress(AutoModelForCausalLM.from_pretrained(output / "packed"))
    for name, value in merged.state_dict().items():
        assert (packed.state_dict()[name].float() == value.float()).all()


def test_its_cards_and_table_show_the_measured_numbers(finished):
    output, results = finished
    for kind in ("mask", "packed"):
        text = (output / kind / "README.md").read_text()
        assert "import hf_nmsparse" in text and f"{results.perplexity['dense']:.2f}" in text
    assert summary_table(results).row_count == 5


def test_it_refuses_a_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        run_demo(DemoSettings(tmp_path, str(TINY)), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
