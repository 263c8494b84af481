# SPDX-License-Identifier: Apache-2.0
"""What each process of tests/test_processes.py does: trains a tiny Llama under an engine, and leaves what it saw in files."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import llama_config
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import is_sharded, mask_layers, whole_tensors
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import NMSparseError

SEEN = "process-{}.pt"
ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,  # half of the masks change
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@dataclass
class Run:
    """One training run, the same in each process.

    Attributes:
        engine (`str`): "ddp", "fsdp2", "fsdp2-loaded-by-the-first", "zero2" or "zero3"; a single process has none.
        arguments (`dict`): for `TrainingArguments`.
        config (`dict`): for `NMSparseConfig`.
        trainer (`dict`): for `NMSparseTrainer`.
        phases (`list`, *optional*): for `MaskPhaseCallback`.
        distilled (`bool`): the dense base teaches.
        resume (`str`, *optional*): checkpoint.
        model_first (`bool`): made before the arguments, so that no engine has changed how models are made.
        stock (`bool`): the Trainer of transformers with `MaskScheduleCallback`.
    """

    folder: str
    engine: str = "ddp"
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    phases: list[tuple[str, int]] | None = None
    distilled: bool = False
    resume: str | None = None
    model_first: bool = False
    stock: bool = False


class Watch(TrainerCallback):
    """Notes (step, draw) of each pass."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, int]] = []

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        moment = next(iter(mask_layers(model).values())).moments["default"]
        self.draws.append((moment.step, moment.draw))

    on_substep_end = on_step_begin


def use_engine(engine: str) -> dict[str, Any]:
    """Make accelerate forget the engine of an earlier run; what `TrainingArguments` need for this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if engine.startswith("fsdp2"):
        _let_accelerate_shard_on_cpus()
        only_first = engine == "fsdp2-loaded-by-the-first"
        return {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": only_first}}
    if engine.startswith("zero"):
        return {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": int(engine[-1])},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            }
        }
    return {}


def _let_accelerate_shard_on_cpus() -> None:
    """Accelerate 1.15 takes an FSDP plugin on accelerators only, though torch shards over gloo as well."""
    initialise = AcceleratorState.__init__
    if getattr(initialise, "on_cpus", False):
        return

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with_plugin.on_cpus = True
    AcceleratorState.__init__ = with_plugin


def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM._from_config(llama_config(), dtype=torch.float32).eval()


def train(run: Run) -> None:
    """Train, publish the mask, and leave in `folder` what this process has seen: a dict of

    "trained" (logits and weights of masks, whole, by name), "sharded" (names), "draws", "log", or "error" if the package refused.
    """
    folder, rank = Path(run.folder), int(os.environ.get("RANK", 0))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        seen = _train(run, folder)
    except NMSparseError as error:
        seen = {"error": str(error)}
    torch.save(seen, folder / SEEN.format(rank))


def _train(run: Run, folder: Path) -> dict[str, Any]:
    engine = use_engine(run.engine)
    model = tiny_llama() if run.model_first else None
    arguments = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **run.arguments, **engine})
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(11))
    model = get_peft_model(model or tiny_llama(), nms.NMSparseConfig(**run.config))
    watch = Watch()
    schedule = nms.MaskScheduleCallback() if run.phases is None else nms.MaskPhaseCallback(run.phases)
    own = {} if run.stock else {"distillation": nms.Distillation() if run.distilled else None, **run.trainer}
    trainer = (Trainer if run.stock else nms.NMSparseTrainer)(
        model=model, args=arguments, train_dataset=TokenWindows(tokens), callbacks=[schedule, watch], **own
    )
    trainer.train(resume_from_checkpoint=run.resume)
    names = [name for name, p in trainer.model.named_parameters() if ".nmsparse_" in name and p.requires_grad]
    sharded = [name for name in names if is_sharded(trainer.model.get_parameter(name))]
    with whole_tensors(trainer.model):
        trained = {name: trainer.model.get_parameter(name).detach().clone() for name in names}
    if not trainer.model.peft_config["default"].trains_weight:
        nms.save_mask(trainer.model, folder / "mask")
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"trained": trained, "sharded": sharded, "draws": watch.draws, "log": log}


if __name__ == "__main__":
    for options in json.loads(Path(sys.argv[1]).read_text()):
        train(Run(**options))
