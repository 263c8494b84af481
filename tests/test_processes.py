# SPDX-License-Identifier: Apache-2.0
"""Training spread over processes (gloo, on the CPU): each engine computes what one process does, and saves the same mask.

Runs of one kind share a launch, which takes most of the time; each process runs tests/training_process.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from training_process import SEEN, Run, tiny_llama, train
from transformers import TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.training.engines import check_engine, data_process

SAVES = {"save_strategy": "steps", "save_steps": 2}
PHASES = [["layers.0", 2], ["layers.1", 2]]
# Without Adam, which would make noise of the smallest gradients' rounding, where micro-batches are added in another order.
SPLIT = {"config": {"resample": "step"}, "stock": True}
SGD = {"optim": "sgd", "learning_rate": 2.0}
AST = {"relaxation": "ast", "mask_interval": 1}


def launch(runs: dict[str, dict], processes: int, folder: Path) -> Path:
    """Do the runs in so many processes; the folder with theirs."""
    plan = folder / "plan.json"
    folder.mkdir(parents=True)
    plan.write_text(json.dumps([{"folder": str(folder / name), **run} for name, run in runs.items()]))
    script = Path(__file__).with_name("training_process.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*torchrun, script, plan], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]  # torchrun's own say nothing
    assert done.returncode == 0, "\n".join(errors[-30:]) or done.stderr[-4000:]
    return folder


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
    runs["refused-optimizer"] = {"engine": "fsdp2", "trainer": {"mask_optimizer_states": "8bit"}}
    for engine in ("ddp", "fsdp2"):
        runs |= {
            f"{engine}-plain": {"engine": engine, "arguments": SAVES},
            f"{engine}-split": {"engine": engine, "arguments": sgd, **SPLIT},
            f"{engine}-phases": {"engine": engine, "phases": PHASES},
            f"{engine}-distilled": {"engine": engine, "distilled": True},
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
    assert found.keys() == expected.keys() and len(found) == 14
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def mask_bytes(folder: Path) -> bytes:
    return (folder / "mask" / "adapter_model.safetensors").read_bytes()


# --- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["plain", "split", "phases", "distilled"])
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
    [("refused-optimizer", "MaskAdamW under sharding"), ("refused-ast", "relaxation 'ast' trains a weight")],
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
