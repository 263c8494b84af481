# SPDX-License-Identifier: Apache-2.0
"""What each device holds while masks train under DDP, ZeRO-2 and FSDP2: the plan against memory, and the plan at paper scale.

Memory is measured in two processes on the CPU (gloo): the largest resident set of the first during the last of four steps, above
what it was before the model. One sample of 8 tokens, so that activations are nothing. The plan at 7B and 70B is computed from the
shapes of Llama-2, without weights. ZeRO-2 needs DeepSpeed and is left out without it.

    python benchmarks/devices.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import get_peft_model
from timing import write_results
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.training.devices import ENGINES, device_bytes

sys.path.append(str(Path(__file__).parent.parent / "tests"))

# Llama-2 (arXiv 2307.09288): hidden, intermediate, layers, heads, key-value heads.
SCALES = {"7B": (4096, 11008, 32, 32, 32), "70B": (8192, 28672, 80, 64, 8)}
GIGABYTE = 1e9
# Freed memory goes back to the system at once, so that the resident set is what lives.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments)
        return
    measured = [row for engine in ENGINES for row in rows_of(engine)]
    for row in measured:
        print(f"{row['engine']:6} checkpointing {row['checkpointing']!s:5} planned over measured {row['ratio']:.3f}")
    scale = [row for name in SCALES for row in planned_at(name)]
    print(markdown(scale))
    write_results("devices", "cpu", {"measured": measured, "scale": scale}, arguments.output)


# --- against memory -------------------------------------------------------------------------------------------------
def rows_of(engine: str) -> list[dict]:
    """Two processes, with and without gradient checkpointing."""
    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        print("zero2: DeepSpeed is not installed, not measured")
        return []
    rows = []
    for checkpointing in ([], ["--checkpointing"]):
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command = [*torchrun, __file__, *sys.argv[1:], *checkpointing, "--measure", engine, str(found)]
            subprocess.run(command, env={**os.environ, **ALLOCATOR, "DS_ACCELERATOR": "cpu"}, check=True)
            rows.append(json.loads(found.read_text()))
    return rows


def measure(engine: str, file: str, arguments: argparse.Namespace) -> None:
    """In each of two processes: train four steps and note the resident set."""
    from training_process import use_engine

    torch.set_num_threads(1)
    config = nms.NMSparseConfig()
    plan = nms.plan(llama(arguments), config, checkpointing=arguments.checkpointing)
    before = resident_bytes()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=1,
            optim="adamw_torch",
            gradient_checkpointing=arguments.checkpointing,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **use_engine(engine),
        )
        model, data = get_peft_model(llama(arguments), config), TokenWindows(torch.randint(0, 512, (16, 8)))
        nms.NMSparseTrainer(model, training, train_dataset=data, callbacks=[watch]).train()
    planned, measured = device_bytes(plan, 2, engine), watch.stop() - before
    row = {"checkpointing": arguments.checkpointing, "measured": measured, "ratio": planned.total / measured}
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(planned.to_dict() | row))


def llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Random float32 weights; the shape of a block is Llama's."""
    torch.manual_seed(0)  # the same in both processes
    hidden = arguments.hidden
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 27 // 10, "num_hidden_layers": arguments.layers}
    config = LlamaConfig(**sizes, vocab_size=2048, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64)
    return LlamaForCausalLM._from_config(config, dtype=torch.float32)


class Watch(TrainerCallback):
    """The largest resident set since the last step began."""

    def __init__(self) -> None:
        self._largest, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.is_set():
            self._largest = max(self._largest, resident_bytes())
            time.sleep(0.001)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._largest = 0

    def stop(self) -> int:
        """End, and give the bytes."""
        self._stopped.set()
        self._thread.join()
        return self._largest


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- at paper scale -------------------------------------------------------------------------------------------------
def planned_at(name: str) -> list[dict]:
    """Bytes on each of 8 and 64 devices, in bfloat16 with gradient checkpointing, for each engine and relaxation."""
    hidden, intermediate, layers, heads, key_value_heads = SCALES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=key_value_heads)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    rows = []
    for relaxation in ("candidates", "elementwise"):
        plan = nms.plan(model, nms.NMSparseConfig(relaxation=relaxation), checkpointing=True)
        for engine in ENGINES:
            for devices in (8, 64):
                held = device_bytes(plan, devices, engine).to_dict()
                rows.append({"scale": name, "relaxation": relaxation, **held})
    return rows


def markdown(rows: list[dict]) -> str:
    """GB on each device."""
    lines = ["| model | relaxation | engine | 8 devices | 64 devices |", "|---|---|---|---|---|"]
    cases = dict.fromkeys((row["scale"], row["relaxation"], row["engine"]) for row in rows)
    for case in cases:
        of_case = {row["devices"]: row for row in rows if (row["scale"], row["relaxation"], row["engine"]) == case}
        lines.append(
            f"| {' | '.join(case)} | " + " | ".join(f"{of_case[n]['total'] / GIGABYTE:,.0f}" for n in (8, 64)) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
