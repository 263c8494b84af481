# SPDX-License-Identifier: Apache-2.0
"""`nmsparse doctor`: what it says of machines, folders and repos, sound and not."""

import importlib.metadata
import io
import json
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import facts, run
from local_hub import as_the_hub
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_inputs import make_inputs
from tests_support import rewrite

from hf_nmsparse.cli.findings import Findings
from hf_nmsparse.cli.folders import checkpoint_damage
from hf_nmsparse.cli.resuming import was_finished
from hf_nmsparse.files import staged_folder
from hf_nmsparse.ops.linear24.tables import forget_tables
from hf_nmsparse.ops.native_build import native_library

STEPS = "--sequence-length 32 --max_steps 3 --per_device_train_batch_size 2 --save_steps 2 --learning_rate"
RESUMED = f"train base --data train.txt --output run --prior magnitude {STEPS} 0.05"


def found(line: str, code: int = 0) -> dict[str, dict]:
    """The checks of `nmsparse doctor` by what they looked at; a name that is there twice has the last."""
    report = facts(f"doctor {line}", code)
    checks = [check for finding in report["findings"] for check in finding["checks"]]
    assert report["problems"] == sum(check["state"] == "problem" for check in checks)
    assert report["notes"] == sum(check["state"] == "note" for check in checks)
    return {check["what"]: check for check in checks}


# --- the machine ----------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, while what this process has compiled stays its own."""
    native_library()
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    forget_tables()
    yield tmp_path / "cache"
    forget_tables()


def test_a_sound_machine():
    checks = found("")
    assert checks["torch"]["state"] == "ok" and checks["torch"]["found"].startswith(torch.__version__)
    assert checks["cpu uses"]["found"] in checks["cpu can run"]["found"]
    assert {"CPU", "C++", "token", "cache of kernels and times", "cache of the Hub"} <= checks.keys()
    shown = run("doctor").stdout.splitlines()
    assert "  ok       torch: " in "\n".join(shown) and shown[-1].startswith("0 problems")
    assert max(map(len, shown)) > 80  # in a file a check is one line


def test_narrow_terminals_get_hanging_lines_but_commands_in_one_piece():
    findings = Findings("subject")
    findings.note("what", "found " * 20, "command " * 20)
    console = Console(width=40, file=io.StringIO())
    for item in findings.shown():
        console.print(item, soft_wrap=getattr(item, "no_wrap", False))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 7 and lines[1].startswith("  note     what: found")
    assert all(line.startswith(" " * 11 + "found") and len(line) <= 40 for line in lines[2:-1])
    assert lines[-1].strip() == ("-> " + "command " * 20).strip()


def test_packages_that_are_absent_or_of_another_version(monkeypatch):
    asked = ["torch>=99", "no-such-package", "gguf>=99; extra == 'demo'", "pytest; extra == 'report'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    checks = found("", 1)
    assert (checks["torch"]["state"], checks["torch"]["advice"]) == ("problem", "pip install 'torch>=99'")
    assert (checks["no-such-package"]["state"], checks["no-such-package"]["found"]) == ("problem", "missing")
    assert (checks["[demo]"]["state"], checks["[demo]"]["advice"]) == ("note", "pip install 'hf-nmsparse[demo]'")
    assert checks["[report]"]["state"] == "ok"


@pytest.mark.parametrize(
    ("variables", "state", "said"),
    [
        ({"CXX": "false"}, "problem", "false fails"),
        ({"CXX": "/no/such/compiler"}, "problem", "No such file"),
        ({"PATH": "/nowhere"}, "note", "no compiler"),
        ({"NMSPARSE_NATIVE": "0"}, "note", "NMSPARSE_NATIVE=0"),
    ],
)
def test_compilers_that_are_not_there_or_fail(cache, monkeypatch, variables, state, said):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = found("", int(state == "problem"))["C++"]
    assert check["state"] == state and said in check["found"] and check["advice"]


def test_a_damaged_table_of_times_is_named(cache, monkeypatch):
    monkeypatch.setenv("NMSPARSE_NATIVE", "0")  # nothing is compiled into the empty cache
    (cache / "tables").mkdir(parents=True)
    (cache / "tables" / "cpu.json").write_text('{"version": 1}')
    check = found("", 1)["measured times"]
    assert "cpu.json" in check["found"] and check["advice"].startswith("remove ")


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "file" / "below"))
    check = found("", 1)["cache of kernels and times"]
    assert "cannot be written" in check["found"] and "NMSPARSE_CACHE" in check["advice"]


def test_a_gpu_that_does_not_answer_is_a_problem_and_no_crash(monkeypatch):
    def fail(device):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    checks = found("", 1)
    assert (checks["cuda:0"]["state"], checks["cuda:0"]["found"]) == ("problem", "driver too old")
    assert "cpu uses" in checks and "cuda:0 uses" not in checks


def test_options_of_a_repo_need_one():
    assert "name it" in run("doctor --revision main", 2).stderr


# --- folders and repos ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One of each that the package writes: run (a mask, with its checkpoints), delta, pruned, packed, bitmask, npz."""
    folder = tmp_path_factory.mktemp("made")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for line in (
            RESUMED,
            f"train base --data train.txt --output delta --prior run --delta-to run {STEPS} 0.002",
            "prune base --criterion magnitude --output pruned",
            "compress pruned --output packed",
            "export pruned --format bitmask --output bitmask",
            "export pruned --format npz --output npz",
        ):
            patched.setattr(sys, "argv", ["nmsparse", *shlex.split(line)])  # what is kept as the command
            run(line)
    return folder


@pytest.fixture
def there(made, tmp_path, monkeypatch) -> Path:
    """A working folder with copies of all of them."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def stop(folder: str) -> Path:
    """Make of a run that has ended one that was killed; its newest checkpoint."""
    for path in Path(folder).iterdir():
        if path.is_file():
            path.unlink()
    return Path(folder, "checkpoints", "checkpoint-3")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("folder", "kind", "said"),
    [
        (
            "run",
            "mask",
            {"codes": "2:4 in 14 layers", "base model": "--base base", "training run": "checkpoint-3 is the last"},
        ),
        ("delta", "mask", {"stored as": "../run", "codes": "2:4 in 14 layers"}),
        ("run/checkpoints", "checkpoints", {"training run": "the run has ended"}),
        ("run/checkpoints/checkpoint-2", "training checkpoint", {"files": "step 2 of 3", "use": "no published mask"}),
        (
            "packed",
            "packed model",
            {"weights": "every digest is right", "loading": "loads Llama", "in Python": "UNEXPECTED"},
        ),
        ("bitmask", "sparse bitmask model", {"loading": "nms.load_bitmask", "in Python": "random weights"}),
        ("npz", "masks in an .npz", {"npz": "with the base model"}),
        (
            "pruned",
            "model",
            {"weights": "2:4 in 14 layers", "loading": "loads Llama", "mask beside it": "pruned/mask"},
        ),
        ("base", "model", {"weights": "dense", "loading": "loads Llama"}),
        ("results", "results of a run", {}),
        ("tasks", "law", {}),
    ],
)
def test_what_is_sound_is_named_has_no_problem_and_stays_as_it_is(there, folder, kind, said):
    Path("results").mkdir()
    shutil.copy("run/results.json", "results")
    shutil.copytree("pruned/mask", "tasks/law")
    before = contents(there)
    checks = found(folder)
    assert kind in checks["kind"]["found"]
    assert all(text in checks[what]["found"] for what, text in said.items()), checks
    assert contents(there) == before


@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        (lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].neg_(), "weights", "up_proj.weight"),
        (lambda tensors: tensors.pop("model.norm.weight"), "loading", "1 tensors are missing and would be random"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "loading", "the first other"),
    ],
)
def test_packed_models_that_are_altered(there, change, what, said):
    rewrite(Path("packed"), lambda tensors, metadata: change(tensors))
    check = found("packed", int(what == "weights" or "missing" in said))[what]
    assert said in check["found"]


def test_models_that_are_not_whole(there):
    cut(Path("packed/model.safetensors"))
    cut(Path("bitmask/model.safetensors"))
    config = json.loads(Path("pruned/config.json").read_text())
    Path("pruned/config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    Path("base/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    for folder, what, said in (
        ("packed", "weights", "model.safetensors is no sound"),
        ("bitmask", "loading", "cut short"),
        ("pruned", "loading", "mismatch"),
        ("base", "weights", "the first model-00002.safetensors"),
        ("broken", "kind", "is not JSON"),
    ):
        check = found(folder, 1)[what]
        assert check["state"] == "problem" and said in check["found"], check


def test_a_model_that_breaks_the_pattern_it_says_it_has(there):
    rewrite(Path("pruned"), lambda tensors, metadata: tensors["model.layers.0.mlp.up_proj.weight"][0].fill_(1))
    assert "more weights than 2:4" in found("pruned", 1)["weights"]["found"]


def test_a_mask_that_is_altered_or_whose_base_or_general_mask_is_gone(there):
    path = Path("run/adapter_model.safetensors")
    tensors = load_file(path)
    next(tensors[name] for name in sorted(tensors) if name.endswith("packed"))[0, 0] ^= 1
    save_file(tensors, path)
    assert "digest" in found("run", 1)["codes"]["found"]
    shutil.rmtree("run")
    check = found("delta", 1)["codes"]
    assert "its general mask cannot be read" in check["found"] and str(Path("run").resolve()) in check["found"]
    config = json.loads(Path("pruned/mask/adapter_config.json").read_text())
    Path("pruned/mask/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    checks = found("pruned/mask", 1)
    assert checks["codes"]["state"] == "ok" and "no such folder" in checks["base model"]["found"]
    assert checks["base model"]["advice"].endswith("nmsparse eval BASE --mask pruned/mask")


def test_a_killed_run_is_told_its_last_whole_checkpoint_and_the_command_that_goes_on(there, made, monkeypatch):
    newest = stop("run")
    checks = found("run")
    assert checks["training run"]["advice"] == f"to go on: nmsparse {RESUMED} --resume"
    cut(newest / "optimizer.pt")
    checks = found("run", 1)
    assert checks["checkpoint-3"]["found"] == "optimizer.pt is damaged or cut short"
    assert "checkpoint-2 is the last whole checkpoint, step 2 of 3" in checks["training run"]["found"]
    assert "checkpoint-2" in found("run/checkpoints/checkpoint-3", 1)["files"]["advice"]
    command = checks["training run"]["advice"].removeprefix("to go on: nmsparse ")
    assert command == f"{RESUMED} --resume_from_checkpoint run/checkpoints/checkpoint-2"
    monkeypatch.setattr(sys, "argv", ["nmsparse", *shlex.split(command)])
    run(command)
    assert (
        Path("run/checkpoints/command.txt").read_text() == f"nmsparse {RESUMED} --resume\n"
    )  # from the newest, not that one
    assert "problem" not in {check["state"] for check in found("run").values()}
    learned = [load_file(folder / "run" / "adapter_model.safetensors") for folder in (made, there)]
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())


def test_runs_without_a_whole_checkpoint_or_a_noted_command(there):
    stop("run")
    shutil.copytree("run/checkpoints", "trainer")  # as a Trainer in Python leaves them
    for folder in ("run/checkpoints", "trainer"):
        Path(folder, "command.txt").unlink()
    assert found("run")["training run"]["advice"].endswith("the same nmsparse train command, with --resume")
    assert 'trainer.train(resume_from_checkpoint="trainer/checkpoint-3")' in found("trainer")["training run"]["advice"]
    for checkpoint in Path("run/checkpoints").iterdir():
        (checkpoint / "trainer_state.json").unlink()
    check = found("run", 1)["training run"]
    assert "none of its checkpoints is whole" in check["found"] and "--overwrite" in check["advice"]


def test_damaged_checkpoints_of_a_run_that_has_ended_are_no_problem(there):
    cut(Path("run/checkpoints/checkpoint-3/nmsparse_start.safetensors"))
    assert found("run")["checkpoint-3"]["state"] == "note"


def test_pickles_are_not_read(there):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    Path("foreign").mkdir()
    stop("run")
    for name in ("foreign/adapter_model.bin", "run/checkpoints/checkpoint-3/training_args.bin"):
        Path(name).write_bytes(pickle.dumps(Evil()))
    checks = found("foreign run", 1)
    assert "adapter_model.bin is a pickle" in checks["weights"]["found"]
    assert not Path("executed").exists()
    pickle.loads(Path("foreign/adapter_model.bin").read_bytes())
    assert Path("executed").exists()  # it would have been


def test_leftovers_of_writers_that_were_killed(there):
    writer = staged_folder("out")
    staging = writer.__enter__().resolve()
    (there / "packed" / ".results.json.k2_9xq0a").write_text("{")
    (there / "packed" / ".env.template").write_text("mine")
    (there / ".packed.unfinished").mkdir()
    checks = found("out", 1)
    assert "its writer was killed" in checks["folder"]["found"]
    assert checks["leftover"]["advice"] == f"if killed: rm -r {staging}"
    checks = found("packed")
    assert (
        ".results.json.k2_9xq0a" in checks["leftover"]["found"] and "nmsparse prune" in checks["unfinished"]["found"]
    )
    assert staging.is_dir() and run("doctor packed").stdout.count("note     leftover: ") == 1
    writer.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("source", "what", "said"),
    [
        ("./nowhere", "folder", "no such folder"),
        ("someone/somewhere", "folder", "not in the cache"),
        ("base --revision v1", "folder", "has no revision"),
        ("base/config.json", "folder", "it is a file"),
        ("npz/mask_compressed.npz", "folder", "it is a file"),
        ("empty", "kind", "no files"),
        ("notes", "kind", "nothing that nmsparse reads"),
    ],
)
def test_what_is_not_there_or_not_ours(there, source, what, said):
    Path("empty").mkdir()
    Path("notes").mkdir()
    Path("notes/note.txt").write_text("mine")
    check = found(source, 1)[what]
    assert check["state"] == "problem" and said in check["found"], check


def test_an_adapter_of_another_method_is_named(there):
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "another method" in found("lora")["adapter"]["found"]


def test_several_are_looked_at_even_if_the_first_is_not_there(there):
    report = facts("doctor nowhere base", 1)
    assert [finding["subject"] for finding in report["findings"]] == ["nowhere", "base"]
    assert (report["problems"], report["ok"]) == (1, False)


def test_a_repo_of_the_hub(there, monkeypatch):
    with as_the_hub(monkeypatch, there):
        run("push run user/masks --task law")
        assert "--task" in found("user/masks", 1)["folder"]["found"]
        assert "2:4 in 14 layers" in found("user/masks --task law")["codes"]["found"]
        run("push packed user/packed")
        assert "import hf_nmsparse before" in found("user/packed")["in Python"]["advice"]


def test_a_checkpoint_that_logged_each_of_many_steps_is_whole(tmp_path):
    state = {"global_step": 4, "max_steps": 9, "log_history": [{"loss": "x" * 1000}] * 20_000}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoint_damage(tmp_path, ["trainer_state.json"]) == []
    assert was_finished(tmp_path)
