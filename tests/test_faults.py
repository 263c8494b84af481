# SPDX-License-Identifier: Apache-2.0
"""Faults: kills at every step of a write, full disks, no memory, two processes at once. What was there before is still there."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import run
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_inputs import make_inputs

import hf_nmsparse as nms
from hf_nmsparse import folder_locks
from hf_nmsparse.cli.unfinished import Unfinished
from hf_nmsparse.criteria import Wanda
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.files import staged_folder, write_file
from hf_nmsparse.folder_locks import alone_in

SHORT = "--sequence-length 32"
STEPS = (
    f"{SHORT} --max_steps 3 --per_device_train_batch_size 2 --save_steps 1 --save_total_limit 5 --learning_rate 0.05"
)
TRAIN = f"train base --data train.txt {STEPS} --output"
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
exchanges = pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged on Linux")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`base`, texts, `mask`, `pruned`, and `trained`, what `nmsparse train` leaves."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    with contextlib.chdir(folder):
        run("prune base --criterion magnitude --output pruned")
        run(f"{TRAIN} trained")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden_beside(folder: Path) -> list[Path]:
    return list(folder.resolve().parent.glob(f".{folder.name}*"))


# --- kills --------------------------------------------------------------------------------------------------------------
STEPS_OF_A_WRITE = ("replace", "rename", "link", "fsync", "mkdir", "unlink", "rmdir")


def killed_at(step: int, work, monkeypatch) -> bool:
    """Do `work` in a process that dies before its `step`-th change to the disk; whether it came so far."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    count = 0

    def counted(usual, *arguments, **options):
        nonlocal count
        count += 1
        if count == step:
            os._exit(9)
        return usual(*arguments, **options)

    for name in STEPS_OF_A_WRITE:
        monkeypatch.setattr(os, name, partial(counted, getattr(os, name)))
    code = 1
    with contextlib.suppress(Exception):
        work()
        code = 0
    os._exit(code)


@forks
@exchanges
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def fill(kind: str) -> None:
        with staged_folder(folder, lambda entry: entry.name.startswith("only-")) as staging:
            for name in ("config.json", f"only-{kind}", "mask/weights"):
                write_file(staging / name, f"{kind} {name}")

    def start() -> dict[str, bytes]:
        shutil.rmtree(folder, ignore_errors=True)
        fill("old")
        write_file(folder / "checkpoints" / "state", "kept")
        write_file(folder / "mask" / "notes", "kept")
        return contents(folder)

    old = start()
    fill("new")
    new = contents(folder)
    assert len(new) == len(old) == 5 and new["mask/notes"] == b"kept" and "only-old" not in new
    seen, step = [], 1
    while start() and killed_at(step, lambda: fill("new"), monkeypatch):
        found = contents(folder)
        assert found in (old, new), step
        seen.append(found == new)
        step += 1
    assert contents(folder) == new and step > 15 and {True, False} == set(seen)
    fill("old")
    assert not hidden_beside(folder)  # what the killed have left


@forks
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_file(path, "old")
    step = 1
    while killed_at(step, lambda: write_file(path, "new" * 9), monkeypatch):
        assert path.read_text() == "old"
        step += 1
    assert path.read_text() == "new" * 9 and step > 2


def test_resuming_passes_over_a_checkpoint_that_a_kill_has_cut_off(there):
    shutil.copytree("trained", "run")
    state = Path("run/checkpoints/checkpoint-3/trainer_state.json")
    state.write_bytes(state.read_bytes()[:100])
    Path("run/checkpoints/checkpoint-3/optimizer.pt").unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors", "results.json"):
        Path("run", name).unlink()
    assert (
        "checkpoint-3 was cut off while it was written; going on from checkpoint-2"
        in run(f"{TRAIN} run --resume").stderr
    )
    for name in ("adapter_model.safetensors", "checkpoints/checkpoint-3/adapter_model.safetensors"):
        one, two = load_file(f"trained/{name}"), load_file(f"run/{name}")
        assert one and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_resuming_starts_anew_where_all_checkpoints_were_cut_off(there):
    Path("run/checkpoints/checkpoint-1").mkdir(parents=True)
    Path("run/checkpoints/checkpoint-1/adapter_config.json").write_text("{")
    assert "add --resume" in run(f"{TRAIN} run", 2).stderr
    assert "starting at the beginning" in run(f"{TRAIN} run --resume").stderr
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_that_died_before_its_first_checkpoint_starts_again_by_the_same_command(there, monkeypatch):
    from hf_nmsparse.training import NMSparseTrainer

    with monkeypatch.context() as patched:
        patched.setattr(NMSparseTrainer, "training_step", lambda *_, **__: no_memory())
        run(f"{TRAIN} run", 2)
    assert not Path("run").exists()  # after an error; a kill leaves this:
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/command.txt").write_text("nmsparse train --resume\n")
    Path("run/checkpoints/.lock").touch()
    assert "leave --resume out to start" in run(f"{TRAIN} run --resume", 2).stderr
    assert "it has no checkpoint yet" in run("doctor run").stdout
    run(f"{TRAIN} run")
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_of_another_folder_goes_on_only_where_a_run_may_start(there):
    checkpoint = "--resume_from_checkpoint trained/checkpoints/checkpoint-2"
    before = contents(Path("base"))
    assert "also an input" in run(f"{TRAIN} base {checkpoint}", 2).stderr
    assert contents(Path("base")) == before
    Path("run/checkpoints/checkpoint-9").mkdir(parents=True)  # of another run
    assert "holds a training run up to checkpoint-9" in run(f"{TRAIN} run {checkpoint}", 2).stderr
    run(f"{TRAIN} run {checkpoint} --overwrite")
    assert [path.name for path in Path("run/checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_that_was_killed_after_its_last_step_makes_no_step_more(there):
    shutil.copytree("trained", "run")
    Path("run/adapter_config.json").unlink()
    assert "3 steps" in run(f"{TRAIN} run --resume").stdout
    assert not Path("run/checkpoints/checkpoint-4").exists()
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_kill_while_the_unfinished_run_is_removed_does_not_stop_the_next(tmp_path, monkeypatch):
    unfinished = Unfinished(tmp_path / "out", {})
    with pytest.raises(SystemExit), monkeypatch.context() as patched, unfinished.opened():
        write_file(unfinished.blocks / "0.safetensors", "")

        def dies(folder, **_):
            if (Path(folder) / "run.json").is_file():
                (Path(folder) / "run.json").unlink()
                raise SystemExit

        patched.setattr(shutil, "rmtree", dies)
    assert not unfinished.folder.exists()
    with Unfinished(tmp_path / "out", {}).opened():
        assert not unfinished.blocks.exists()
    assert not hidden_beside(tmp_path / "out")


# --- full disks -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def full_disk(largest: int = 3000):
    """Files cannot grow beyond so many bytes: what writes them, in whatever language, is told so by the system."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "line",
    [
        "prune base --criterion magnitude --overwrite",
        "prune base --criterion magnitude --packed --overwrite",
        "compress pruned --overwrite",
        "merge base --mask trained --overwrite",
        "export pruned --format dense --overwrite",
        "export pruned --format npz --overwrite",
        "report pruned",
        f"{TRAIN.removesuffix(' --output')} --overwrite",
    ],
)
def test_a_full_disk_leaves_the_output_as_it_was(there, line):
    shutil.copytree("pruned", "out")
    before = contents(Path("out"))
    with full_disk():
        failed = run(f"{line} --output out", 2)
    assert failed.stderr.splitlines()[-1].startswith("error: out: ")
    assert "unchanged: make room, then run" in failed.stderr and "Traceback" not in failed.stderr
    assert contents(Path("out")) == before and not hidden_beside(Path("out"))


def test_a_full_disk_during_training_keeps_whole_checkpoints(there, monkeypatch):
    usual, calls = torch.save, []

    def full_at_the_second_checkpoint(*arguments, **options):
        calls.append(arguments)
        with full_disk() if len(calls) > 4 else contextlib.nullcontext():
            return usual(*arguments, **options)

    monkeypatch.setattr(sys, "argv", ["nmsparse", *f"{TRAIN} run".split()])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_at_the_second_checkpoint)
        failed = run(f"{TRAIN} run", 2).stderr
    assert "error: run: a file could not be written" in failed and "--output run --resume" in failed
    assert [path.name for path in Path("run/checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    run(f"{TRAIN} run --resume")
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_every_librarys_word_for_a_full_disk_is_understood(tmp_path, error):
    write_file(tmp_path / "out" / "file", "old")
    with pytest.raises(OSError, match="make room") as raised, staged_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("new")
        raise error
    assert raised.value.filename == str(tmp_path / "out") and contents(tmp_path / "out") == {"file": b"old"}


def test_a_full_disk_keeps_a_saved_mask_and_results(make_llama, tmp_path):
    model = get_peft_model(make_llama(), nms.NMSparseConfig())
    nms.save_mask(model, tmp_path / "mask")
    before = contents(tmp_path)
    for write in (
        lambda: nms.save_mask(model, tmp_path / "mask"),
        lambda: write_file(tmp_path / "mask/README.md", b"x" * 4000),
    ):
        with full_disk(), pytest.raises(OSError, match="make room"):
            write()
        assert contents(tmp_path) == before and not hidden_beside(tmp_path / "mask")


def test_a_place_that_cannot_be_written_is_named(make_llama, tmp_path):
    model = get_peft_model(make_llama(), nms.NMSparseConfig())
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match=r"cannot be written: '.*file/mask'"):
        nms.save_mask(model, tmp_path / "file" / "mask")
    assert (tmp_path / "file").read_text() == "text"


# --- no memory ------------------------------------------------------------------------------------------------------------
def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less")


def test_no_memory_while_pruning_says_what_to_lower_and_what_is_kept(there, monkeypatch):
    usual = Wanda.choose_block

    def choose_block(self, inputs):
        if any(".layers.1." in name for name in inputs.weights):
            no_memory()
        yield from usual(self, inputs)

    line = f"prune base --calibration train.txt --samples 4 {SHORT} --output"
    with monkeypatch.context() as patched:
        patched.setattr(Wanda, "choose_block", choose_block)
        failed = run(f"{line} out", 2).stderr
    assert "out of memory (CUDA out of memory)" in failed and "lower --samples" in failed
    assert ".out.unfinished" in failed and not Path("out").exists()
    assert "resuming: 7 of 14" in run(f"{line} out").stderr


def test_no_memory_while_training_keeps_the_checkpoints(there, monkeypatch):
    from hf_nmsparse.training import NMSparseTrainer

    usual = NMSparseTrainer.training_step

    def training_step(self, *arguments, **options):
        return no_memory() if self.state.global_step == 2 else usual(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(NMSparseTrainer, "training_step", training_step)
        failed = run(f"{TRAIN} run", 2).stderr
    assert "lower --per_device_train_batch_size" in failed and "checkpoint-2 is kept; to go on" in failed
    run(f"{TRAIN} run --resume")
    one, two = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("trained", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_no_memory_leaves_a_model_as_it_was(make_llama, tokens, monkeypatch):
    model = make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    usual = Wanda.choose_block

    def choose_block(self, inputs):
        if any(".layers.1." in name for name in inputs.weights):
            no_memory()
        yield from usual(self, inputs)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(Wanda, "choose_block", choose_block)
        nms.prune(model, "wanda", calibration=tokens, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- two processes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("line", [f"{TRAIN} out", "prune base --criterion magnitude --output out"])
def test_a_second_run_into_one_output_is_refused(there, line):
    with alone_in(there / ("out/checkpoints" if line.startswith("train") else ".out.unfinished")):
        refused = run(line, 2).stderr
    assert "in use by another process" in refused and not Path("out/results.json").exists()
    with alone_in(there / "elsewhere"):
        run(line)
    assert not Path("elsewhere").exists()


@forks
@exchanges
def test_two_processes_that_write_one_mask_leave_readers_a_whole_one(make_llama, tmp_path):
    model = get_peft_model(make_llama(), nms.NMSparseConfig())
    nms.save_mask(model, tmp_path / "0")
    for layer in nms.adapter.mask_layers(model).values():
        layer.set_prior_codes("default", 5 - layer.mask_codes("default"))
    nms.save_mask(model, tmp_path / "1")
    whole = [contents(tmp_path / name) for name in ("0", "1")]
    folder, writers = tmp_path / "mask", []
    shutil.copytree(tmp_path / "0", folder)
    for name in ("0", "1"):
        writers.append(os.fork())
        if writers[-1] == 0:
            with contextlib.suppress(BaseException):
                for _ in range(60):
                    with staged_folder(folder) as staging:
                        shutil.copytree(tmp_path / name, staging, dirs_exist_ok=True)
                os._exit(0)
            os._exit(1)
    running, reads = set(writers), 0
    while running:
        report = nms.verify(folder)
        assert report.ok and len(report.layers) == 14
        reads += 1
        running -= {process for process in running if os.waitpid(process, os.WNOHANG)[0]}
    assert reads > 3 and contents(folder) in whole and not hidden_beside(folder)


def test_without_an_exchange_files_are_renamed_one_by_one(tmp_path, monkeypatch):
    """As on other systems than Linux."""
    monkeypatch.setattr(folder_locks, "_library", lambda: None)
    write_file(tmp_path / "out" / "config.json", "old")
    write_file(tmp_path / "out" / "notes", "kept")
    write_file(tmp_path / "out" / "only-old", "old")
    with staged_folder(tmp_path / "out", lambda entry: entry.name == "only-old") as staging:
        write_file(staging / "config.json", "new")
    assert contents(tmp_path / "out") == {"config.json": b"new", "notes": b"kept"}


def test_a_link_to_another_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_folder(tmp_path / "out") as staging:
        write_file(staging / "file", "text")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "disk") == {"file": b"text"}


def test_the_working_directory_stays_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with staged_folder(".") as staging:
        write_file(staging / "file", "text")
    assert Path("file").read_text() == "text"


def test_the_folder_of_another_user_stays_theirs(tmp_path, monkeypatch):
    def chown(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    write_file(tmp_path / "out" / "file", "old")
    before = (tmp_path / "out").stat()
    monkeypatch.setattr(os, "chown", chown)
    with staged_folder(tmp_path / "out") as staging:
        write_file(staging / "file", "new")
    assert os.path.samestat((tmp_path / "out").stat(), before) and contents(tmp_path / "out") == {"file": b"new"}


def test_a_folder_that_is_held_twice_is_refused(tmp_path):
    with alone_in(tmp_path / "run"), pytest.raises(ConfigError, match="in use"), alone_in(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@forks
def test_a_folder_that_is_held_is_written_into_and_around_and_stays_held(tmp_path):
    held = tmp_path / "out" / "checkpoints"
    write_file(tmp_path / "out" / "results.json", "old")
    with alone_in(held):
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                signal.alarm(20)  # waiting would be without end
                for folder in (held / "mask", tmp_path / "out"):
                    with staged_folder(folder) as staging:
                        write_file(staging / "results.json", "new")
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        with pytest.raises(ConfigError, match="in use"), alone_in(held):
            pass
    assert set(contents(tmp_path / "out")) == {"results.json", "checkpoints/mask/results.json"}
