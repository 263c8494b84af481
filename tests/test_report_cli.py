# SPDX-License-Identifier: Apache-2.0
"""`nmsparse report`: which results it finds, what it calls them, and which masks it compares."""

import json
from pathlib import Path

import pytest
import torch
from command_line import facts, run
from local_hub import as_the_hub
from peft import get_peft_model
from report_samples import words
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.cli.report import named
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.results import RunResults


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make_mask(base_folder):
    """Publishes a mask that its seed decides, with results beside it."""

    def build(folder: str, seed: int, pattern: str = "2:4", **config) -> None:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        model = get_peft_model(model, NMSparseConfig(pattern=pattern, init_weights=False, **config))
        nms.save_mask(model, folder)
        RunResults(pattern=pattern, command=f"make {seed}").write(Path(folder) / "results.json")

    return build


def results(path: str, **known) -> None:
    RunResults(**{"perplexity": {"dense": 10.0, "learned": 15.0}} | known).write(path)


def error(line: str, code: int = 2) -> str:
    return " ".join(run(f"report {line}", code).stderr.split())


# --- one run --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["run", "run/results.json"])
def test_one_run_becomes_a_page_and_plots(there, path):
    results("run/results.json", pattern="2:4")
    found = facts(f"report {path} --output page")
    assert found["runs"] == {"run": path} and found["overlap"] is None and found["no_overlap_because"] is None
    assert found["plots"] == ["page/perplexity.png"] and all(Path(plot).is_file() for plot in found["plots"])
    page = Path(found["report"]).read_text()
    assert "Model at 2:4 sparsity" in page and "1.50×" in words(page)


def test_the_terminal_shows_what_matters_and_what_was_written(there):
    results("run/results.json", pattern="2:4")
    shown = run("report run --output page").stdout
    assert "1.50×" in shown and "wrote page/report.html and 1 plot\n" in shown


def test_a_demo_folder_is_read_by_its_own_file(there):
    results("demo/demo.json", base_model="tiny")
    found = facts("report demo --output demo")  # beside what the demo wrote
    assert found["runs"] == {"demo": "demo"} and "tiny at n:m sparsity" in Path("demo/report.html").read_text()


# --- several --------------------------------------------------------------------------------------------------------
def test_several_runs_become_one_page(there):
    results("a/results.json", perplexity={"dense": 10.0, "learned": 11.0})
    results("b/run.json")
    found = facts("report general=a b/run.json --output page")
    assert found["runs"] == {"general": "a", "run": "b/run.json"}
    assert found["no_overlap_because"] == "general, run: no mask there"
    text = words(Path("page/report.html").read_text())
    assert "2 runs side by side" in text and "1.10×" in text and "1.50×" in text


def test_masks_of_one_base_are_compared(there, make_mask):
    for seed in (1, 2, 3):
        make_mask(f"mask{seed}", seed)
    results("pruned/results.json")
    Path("mask3").rename("pruned/mask")  # as prune leaves it
    found = facts("report mask1 mask2 pruned --output page")["overlap"]
    assert found["names"] == ["mask1", "mask2", "pruned"]
    expected = 1 - nms.hub.diff_masks("mask1", "pruned/mask").total.changed_share
    assert found["shares"][0][2] == found["shares"][2][0] == pytest.approx(expected)
    assert [found["shares"][place][place] for place in range(3)] == [1.0, 1.0, 1.0]
    assert "16.7 % of the groups" in words(Path("page/report.html").read_text())


def test_masks_that_cannot_be_compared_say_why(there, make_mask):
    make_mask("a", 1)
    make_mask("other", 2, pattern="1:4")
    make_mask("fewer", 3, target_modules=["q_proj"])
    results("none/results.json")
    for other, why in (
        ("other", "other is a 1:4 mask, a a 2:4 one"),
        ("fewer", "fewer and a are not masks of the same layers"),
        ("none", "none: no mask there"),
    ):
        assert facts(f"report a {other} --output page")["no_overlap_because"] == why
    assert f"masks not compared: {why}" in run("report a none --output page").stdout


def test_a_damaged_mask_is_no_missing_one(there, make_mask):
    make_mask("a", 1)
    make_mask("b", 2)
    file = Path("b/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert "damaged or cut short" in error("a b --output page", 1)
    assert not Path("page").exists()


def test_of_a_repo_only_the_results_are_fetched_and_the_mask_where_it_is_compared(there, make_mask, monkeypatch):
    make_mask("a", 1)
    make_mask("b", 2)
    with as_the_hub(monkeypatch, there / "home") as hub:
        run("push b user/b")
        fetched = []
        hub.intercept = lambda method, path: (
            fetched.append(path) if "/resolve/" in path or "/objects/" in path else None
        )
        found = facts("report user/b --output one")
        assert found["runs"] == {"b": "user/b"} and "make 2" in Path("one/report.html").read_text()
        assert not [path for path in fetched if "safetensors" in path or "/objects/" in path]
        both = facts("report a user/b --output both")["overlap"]
        assert both["shares"][0][1] == pytest.approx(1 - nms.hub.diff_masks("a", "b").total.changed_share)
        assert "no such repo" in error("user/nothing --output page")


# --- names ----------------------------------------------------------------------------------------------------------
def test_names_are_as_short_as_they_can_be(there):
    for path in ("x/mask/results.json", "y/mask/results.json", "z/law.json", "a=b/results.json"):
        results(path)
    assert named(["x/mask", "z/law.json"]) == {"mask": "x/mask", "law": "z/law.json"}
    assert named(["x/mask", "y/mask/results.json"]) == {"x/mask": "x/mask", "y/mask": "y/mask/results.json"}
    assert named(["me/mask", "you/mask"]) == {"me/mask": "me/mask", "you/mask": "you/mask"}  # repos
    assert named(["a=b", "c=z/law.json"]) == {"a=b": "a=b", "c": "z/law.json"}  # a folder of that name is one


@pytest.mark.parametrize(
    ("paths", "said"),
    [(["m=a", "m=b"], "two runs are called 'm'"), (["a", "a"], "a is given twice"), (["=a"], "is no NAME=PATH"),
     (["m="], "is no NAME=PATH"), (["b=a", "b"], "two runs are called 'b'")],
)  # fmt: skip
def test_names_that_clash_are_refused(there, paths, said):
    with pytest.raises(ConfigError, match=said):
        named(paths)


# --- wrong use ------------------------------------------------------------------------------------------------------
def test_what_holds_no_results_says_who_writes_them(there):
    Path("empty").mkdir()
    said = error("empty --output page")
    assert (
        "empty holds no results.json" in said
        and "prune, train, merge, compress, import-mask and demo write it" in said
    )
    assert "no such folder here" in error("./nothing --output page")


def test_an_output_that_is_a_file_is_refused(there):
    results("run/results.json")
    Path("page").write_text("mine")
    assert "page is a file; name a folder" in error("run --output page") and Path("page").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [("nonsense", "is not JSON"), ("[]", "schema version None"), (json.dumps({"schema_version": 1, "tasks": [1]}), "tasks must be")],
)  # fmt: skip
def test_a_damaged_results_file_is_named_and_nothing_is_written(there, content, said):
    Path("run.json").write_text(content)
    assert said in error("run.json --output page", 1) and not Path("page").exists()
