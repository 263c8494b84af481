# SPDX-License-Identifier: Apache-2.0
"""Training spread over processes (gloo, on the CPU): each engine computes what one process does, and saves the same mask.

Runs of one kind share a launch, which takes most of the time; each process runs tests/training_process.py.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import facts
from command_line import run as run_command
from filelock import FileLock
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from training_process import SEEN, Run, tiny_llama, train
from transformers import TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.cli.resuming import resume_command
from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.training.engines import check_engine, data_process

SAVES = {"save_strategy": "steps", "save_steps": 2}
PHASES = [["layers.0", 2], ["layers.1", 2]]
# Without Adam, which would make noise of the smallest gradients' rounding, where micro-batches are added in another order.
SPLIT = {"config": {"resample": "step"}, "stock": True}
SGD = {"optim": "sgd", "learning_rate": 2.0}
EIGHT_BIT = {"config": {"logits_dtype": "bfloat16"}, "trainer": {"mask_optimizer_states": "8bit"}}
RECOMPUTED = {"activation_checkpointing": True}
ELEMENTWISE = {"relaxation": "elementwise"}
TERMS = {"low_rank": 2, "delta_rank": 2}
AST = {"relaxation": "ast", "mask_interval": 1}


def launch(runs: dict[str, dict], processes: int, folder: Path) -> Path:
    """Do the runs in so many processes; the folder with theirs."""
    plan = folder / "plan.json"
    folder.mkdir(parents=True)
    plan.write_text(json.dumps([{"folder": str(folder / name), **run} for name, run in runs.items()]))
    done = torchrun(processes, str(Path(__file__).with_name("training_process.py")), str(plan))
    errors = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]  # torchrun's own say nothing
    assert done.returncode == 0, "\n".join(errors[-30:]) or done.stderr[-4000:]
    return folder


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess:
    """Run a script, or `-m` a module, in so many processes of the CPU."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*start, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def once(tmp_path_factory, worker_id: str, name: str, make) -> Path:
    """The folder that `make` fills, once for all processes of pytest."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def worker() -> str:
    return os.environ.get("PYTEST_XDIST_WORKER", "master")


@pytest.fixture(scope="session")
def single(tmp_path_factory, worker):
    """One process that accumulates what two would share."""
    runs = {
        "plain": {"arguments": {"gradient_accumulation_steps": 2, **SAVES}},
        "split": {"arguments": {"per_device_train_batch_size": 4, **SGD}, **SPLIT},
        "phases": {"arguments": {"gradient_accumulation_steps": 2}, "phases": PHASES},
        "distilled": {"arguments": {"gradient_accumulation_steps": 2}, "distilled": True},
        "terms": {"arguments": {"gradient_accumulation_steps": 2}, "config": TERMS},
        "elementwise": {"arguments": {"gradient_accumulation_steps": 2, **RECOMPUTED}, "config": ELEMENTWISE},
        "8bit": {"arguments": {"gradient_accumulation_steps": 2}, **EIGHT_BIT},
        "ast": {"arguments": {"gradient_accumulation_steps": 2, **SGD}, "config": AST},
    }

    def make(folder: Path) -> None:
        for name, run in runs.items():
            train(Run(str(folder / name), **run))

    return once(tmp_path_factory, worker, "single", make)


@pytest.fixture(scope="session")
def two(tmp_path_factory, worker, single):
    """Two processes."""
    sgd = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **SGD}
    runs = {"refused-ast": {"engine": "fsdp2", "config": AST}, "ddp-ast": {"arguments": SGD, "config": AST}}
    runs["ddp-8bit"] = EIGHT_BIT
    runs["refused-loading"] = {"engine": "fsdp2-loaded-by-the-first"}
    runs["refused-optimizer"] = {"engine": "fsdp2", "trainer": {"mask_optimizer_states": "8bit"}}
    for engine in ("ddp", "fsdp2"):
        runs |= {
            f"{engine}-plain": {"engine": engine, "arguments": SAVES},
            f"{engine}-split": {"engine": engine, "arguments": sgd, **SPLIT},
            f"{engine}-phases": {"engine": engine, "phases": PHASES},
            f"{engine}-distilled": {"engine": engine, "distilled": True},
            f"{engine}-terms": {"engine": engine, "config": TERMS},
            f"{engine}-elementwise": {"engine": engine, "arguments": RECOMPUTED, "config": ELEMENTWISE},
        }

    def make(folder: Path) -> None:
        for engine, source in (("ddp", folder / "ddp-plain"), ("fsdp2", folder / "fsdp2-plain")):
            runs[f"{engine}-from-two"] = {"engine": engine, "resume": str(source / "checkpoint-2")}
        runs["ddp-from-one"] = {"engine": "ddp", "resume": str(single / "plain" / "checkpoint-2")}
        launch(runs, 2, folder)

    return once(tmp_path_factory, worker, "two", make)


def seen(folder: Path, rank: int = 0) -> dict:
    """What a process of a run has seen."""
    found = torch.load(folder / SEEN.format(rank), weights_only=True)
    assert "error" not in found, found["error"]
    return found


def assert_same_training(first: Path, second: Path) -> None:
    """What was trained, to rounding, and the published masks; `second` is compared with `first`."""
    assert_same_tensors(seen(first)["trained"], seen(second)["trained"])
    assert mask_bytes(first) == mask_bytes(second)


def assert_same_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) >= 14
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def mask_bytes(folder: Path) -> bytes:
    return (folder / "mask" / "adapter_model.safetensors").read_bytes()


# --- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["plain", "split", "phases", "distilled", "terms", "elementwise"])
def test_two_processes_train_and_publish_what_one_does(single, two, engine, kind):
    assert_same_training(single / kind, two / f"{engine}-{kind}")


def test_weights_under_masks_train_alike_under_ddp(single, two):
    assert_same_tensors(seen(single / "ast")["trained"], seen(two / "ddp-ast")["trained"])
    assert seen(single / "ast")["log"][-1]["nm/flip_rate"] > 0.1


def test_the_runs_that_are_compared_change_masks(single, tmp_path):
    nms.save_mask(get_peft_model(tiny_llama(), nms.NMSparseConfig()), tmp_path / "mask")
    for kind in ("plain", "split", "phases", "distilled"):
        changed = sum(a != b for a, b in zip(mask_bytes(single / kind), mask_bytes(tmp_path), strict=True))
        assert changed > 50, f"{kind}: {changed} bytes"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_each_process_draws_masks_of_its_own_and_one_process_draws_them_all(single, two, engine):
    zero, one = (seen(two / f"{engine}-plain", rank)["draws"] for rank in (0, 1))
    assert zero == [(step, 0) for step in range(4)] and one == [(step, 1) for step in range(4)]
    assert sorted(zero + one) == seen(single / "plain")["draws"]


def test_drawn_once_a_step_all_processes_have_the_same_masks(two):
    for engine in ("ddp", "fsdp2"):
        assert {draw for rank in (0, 1) for _, draw in seen(two / f"{engine}-split", rank)["draws"]} == {0}


def test_fsdp2_shards_logits_and_ddp_does_not(two):
    assert len(seen(two / "fsdp2-plain")["sharded"]) == 14
    assert seen(two / "ddp-plain")["sharded"] == []


def test_the_log_is_that_of_one_process(single, two):
    expected = seen(single / "plain")["log"]
    for engine in ("ddp", "fsdp2"):
        for line, other in zip(expected, seen(two / f"{engine}-plain")["log"], strict=True):
            assert line.keys() == other.keys() >= {"nm/flip_rate", "nm/entropy"}
            assert all(other[key] == pytest.approx(line[key], rel=1e-4) for key in line)


def test_processes_that_round_at_random_stay_together(single, two):
    zero, one = (seen(two / "ddp-8bit", rank)["trained"] for rank in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert mask_bytes(single / "8bit") == mask_bytes(two / "ddp-8bit")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes_the_mask(monkeypatch, llama, tmp_path, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    nms.save_mask(get_peft_model(llama, nms.NMSparseConfig()), tmp_path / "mask")
    assert (tmp_path / "mask").exists() == (rank == 0)


# --- checkpoints ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ddp-from-one", "ddp-from-two", "fsdp2-from-two"])
def test_resumed_runs_end_where_the_uninterrupted_one_does(single, two, name):
    assert_same_training(single / "plain", two / name)
    assert [step for step, _ in seen(two / name)["draws"]] == [2, 3]


def test_one_process_goes_on_from_two(single, two, tmp_path):
    arguments = {"gradient_accumulation_steps": 2}
    train(Run(str(tmp_path), arguments=arguments, resume=str(two / "ddp-plain" / "checkpoint-2")))
    assert_same_training(single / "plain", tmp_path)


def test_the_adapter_in_a_checkpoint_is_whole(single, two):
    expected = load_file(single / "plain" / "checkpoint-2" / "adapter_model.safetensors")
    for engine in ("ddp", "fsdp2"):
        stored = load_file(two / f"{engine}-plain" / "checkpoint-2" / "adapter_model.safetensors")
        assert stored.keys() == expected.keys() and len(stored) == 28
        assert all(torch.allclose(stored[name], expected[name], rtol=0, atol=1e-5) for name in stored)


@pytest.mark.slow
def test_fsdp2_goes_on_with_three_processes_where_two_began(tmp_path):
    accumulate = {"per_device_train_batch_size": 1, **SAVES}
    two = {"engine": "fsdp2", "arguments": {"gradient_accumulation_steps": 3, **accumulate}}
    began = launch({"two": two}, 2, tmp_path / "began") / "two"
    three = {"engine": "fsdp2", "arguments": {"gradient_accumulation_steps": 2, **accumulate}}
    ended = launch({"three": {**three, "resume": str(began / "checkpoint-2")}}, 3, tmp_path / "ended") / "three"
    assert_same_training(began, ended)
    assert sorted(draw for rank in (0, 1, 2) for _, draw in seen(ended, rank)["draws"][:2]) == list(range(6))


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("refused-optimizer", "MaskAdamW under sharding"),
        ("refused-ast", "relaxation 'ast' trains a weight"),
        ("refused-loading", "cpu_ram_efficient_loading"),
    ],
)
def test_what_needs_whole_weights_is_refused_under_fsdp2_by_every_process(two, run, reason):
    for rank in (0, 1):
        found = torch.load(two / run / SEEN.format(rank), weights_only=True)
        assert reason in found["error"]


def test_fsdp1_is_refused():
    class Wrapped(FullyShardedDataParallel):  # torch's own wants a process group
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    with pytest.raises(UnsupportedError, match="FSDP1"):
        check_engine(TrainingArguments(report_to="none"), torch.nn.Sequential(Wrapped()), None, phases=False)


def test_processes_that_share_samples_share_draws():
    """Of four processes, pairs that are tensor parallel compute the same samples."""
    shares = [
        data_process(
            SimpleNamespace(
                process_index=index, world_size=4, parallelism_config=SimpleNamespace(non_data_parallel_size=2)
            )
        )
        for index in range(4)
    ]
    assert shares == [(0, 2), (0, 2), (1, 2), (1, 2)]


# --- DeepSpeed ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def zero(tmp_path_factory, worker):
    """Two processes under ZeRO-2, where DeepSpeed is installed; the last run goes on from the first."""
    pytest.importorskip("deepspeed")
    runs = {
        "plain": {"engine": "zero2", "arguments": SAVES},
        "split": {"engine": "zero2", "arguments": SGD, **SPLIT},
        "distilled": {"engine": "zero2", "distilled": True},
        "terms": {"engine": "zero2", "config": TERMS},
        "elementwise": {"engine": "zero2", "arguments": RECOMPUTED, "config": ELEMENTWISE},
        "refused-phases": {"engine": "zero2", "phases": PHASES},
        "refused-ast": {"engine": "zero2", "config": AST},
        "refused-optimizer": {"engine": "zero2", "trainer": {"mask_optimizer_states": "8bit"}},
        "refused-partitioned": {"engine": "zero3"},
        "refused-zero3": {"engine": "zero3", "model_first": True},
    }

    def make(folder: Path) -> None:
        runs["resumed"] = {"engine": "zero2", "resume": str(folder / "plain" / "checkpoint-2")}
        launch(runs, 2, folder)

    return once(tmp_path_factory, worker, "zero", make)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "split", "distilled", "terms", "elementwise"])
def test_zero2_trains_and_publishes_what_one_process_does(single, zero, kind):
    assert_same_training(single / kind, zero / kind)


@pytest.mark.slow
def test_zero2_goes_on_from_its_checkpoint(single, zero):
    assert_same_training(single / "plain", zero / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("refused-phases", "MaskPhaseCallback under DeepSpeed ZeRO-2"),
        ("refused-ast", "relaxation 'ast' trains a weight"),
        ("refused-optimizer", "MaskAdamW under DeepSpeed ZeRO-2"),
        ("refused-partitioned", "DeepSpeed ZeRO-3 has partitioned model.layers.0.self_attn.q_proj.weight"),
        ("refused-zero3", "cannot be trained under DeepSpeed ZeRO-3"),
    ],
)
def test_what_deepspeed_would_do_wrong_is_refused(zero, run, reason):
    for rank in (0, 1):
        assert reason in torch.load(zero / run / SEEN.format(rank), weights_only=True)["error"]


# --- the command line -----------------------------------------------------------------------------------------------
def test_of_several_processes_the_first_answers_and_each_tells_its_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        result = run_command(f"inspect {tmp_path / 'absent'} --json", code=2)
        assert bool(result.stdout) == (rank == "0")
        assert "absent" in result.stderr


def test_the_command_that_goes_on_does_not_forget_that_there_were_several_processes(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["nmsparse", "train", "base", "--resume_from_checkpoint", "a b", "--output", "c d"]
    )
    assert resume_command() == "nmsparse train base --output 'c d' --resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    expected = "LAUNCHER_OF_2_PROCESSES -m hf_nmsparse.cli train base --output 'c d' --resume"
    assert resume_command() == expected


def test_one_process_cannot_keep_the_teacher_of_several(monkeypatch, base_folder, tmp_path):
    monkeypatch.setattr(sys.modules["hf_nmsparse.cli.train"], "process_count", lambda: 2)
    line = (
        f"train {base_folder} --data x.txt --output {tmp_path / 'out'} --distill --distill-top-k 4 --teacher-cache c"
    )
    assert "--teacher-cache is for one process" in run_command(f"{line} --use_cpu true", code=2).stderr


@pytest.mark.slow
def test_nmsparse_train_in_two_processes_writes_once_what_one_process_writes(tmp_path):
    model = Path(__file__).with_name("tiny_llama")
    text = Path(nms.__file__).with_name("cli") / "demo_data" / "test.txt"
    train = [
        *("train", model, "--data", text, "--eval-data", text, "--eval-tokens", 1024, "--sequence-length", 64),
        *("--prior", "wanda", "--max_steps", 4, "--save_steps", 2, "--learning_rate", 0.05, "--report_to", "none"),
        *("--per_device_train_batch_size", 2, "--use_cpu", "true", "--json", "--output"),
    ]
    train = [str(part) for part in train]

    def in_two(folder: Path, *options: str) -> dict:
        done = torchrun(2, "-m", "hf_nmsparse.cli", *train, str(folder), *options)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    one = facts(shlex.join([*train[:-2], "--output", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"]))
    two = in_two(tmp_path / "two")
    assert two["perplexity"] == pytest.approx(one["perplexity"]) and two["steps"] == 4
    published = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert published[0] == published[1]
    (tmp_path / "two" / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-4")
    in_two(tmp_path / "two", "--resume")
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == published[0]
