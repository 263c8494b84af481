# SPDX-License-Identifier: Apache-2.0
"""A mask-learning step of a linear layer on a GPU against a step that trains its weight, and the mask kernels alone.

    python benchmarks/training_gpu.py
    python benchmarks/training_gpu.py --layers 4096x4096 --rounds 5 --output FILE

A step is the forward and the backward pass of one layer, with the gradient of its inputs, and AdamW (fused) on what it
trains: `dense` the bfloat16 weight, the others the logits of a 2:4 mask. `eager` masks are computed by plain torch. All
variants run in turn in each round, in an order that changes, and the second-level cache is emptied before each; times are of
CUDA events. `step_ratio` is the median over rounds of a step's time over that of `dense` in the same round.

Of the masks alone: the bytes that forward and backward have to move, as GB/s, and as a share of what a copy reaches here.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from timing import write_results

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import NoiseKey, SamplingState, gpu_masks, native_masks

LAYERS = ["4096x4096", "11008x4096", "4096x11008"]  # out x in, of Llama-2-7B
PATTERN = NMPattern("2:4")
KEY = NoiseKey.for_layer(0, "layer")
# Name: whose the logits are, their dtype, whether plain torch computes the mask.
VARIANTS = {
    "candidates, float32": ("candidates", torch.float32, False),
    "candidates, bfloat16": ("candidates", torch.bfloat16, False),
    "candidates, float32, eager": ("candidates", torch.float32, True),
    "elementwise, float32": ("elementwise", torch.float32, False),
    "elementwise, bfloat16": ("elementwise", torch.bfloat16, False),
    "elementwise, float32, eager": ("elementwise", torch.float32, True),
}


@dataclass
class Step:
    """One way to train a layer."""

    weight: torch.Tensor
    logits: torch.Tensor | None  # of a mask; without, the weight is trained
    eager: bool
    state: SamplingState
    optimizer: torch.optim.Optimizer
    times: dict[str, list[float]] = field(default_factory=dict)

    def effective_weight(self) -> torch.Tensor:
        if self.logits is None:
            return self.weight
        with torch_masks() if self.eager else nullcontext():
            return ops.masked_weight(self.weight, self.logits, PATTERN, KEY, self.state)

    def passes(self, x: torch.Tensor, outgoing: torch.Tensor) -> None:
        x.grad = None
        y = F.linear(x, self.effective_weight())
        with torch_masks() if self.eager else nullcontext():
            y.backward(outgoing)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, x: torch.Tensor, outgoing: torch.Tensor) -> None:
        self.passes(x, outgoing)
        self.update()

    def masks(self, outgoing: torch.Tensor) -> None:
        """Forward and backward of the masked weight alone; `outgoing` is its gradient."""
        self.logits.grad = None
        result = self.effective_weight()
        with torch_masks() if self.eager else nullcontext():
            result.backward(outgoing)


@contextmanager
def torch_masks() -> Iterator[None]:
    """Plain torch computes the masks."""

    def declines(*given: object) -> bool:
        return False

    with mock.patch.object(gpu_masks, "takes", declines), mock.patch.object(native_masks, "takes", declines):
        yield


def milliseconds(run: Callable[[], object], device: str, scratch: torch.Tensor) -> float:
    """Time of one call that finds nothing of its operands in the cache.

    Filling `scratch` keeps a GPU busy while Python launches the call, so that no time of Python's is counted.
    """
    for _ in range(2):
        scratch.zero_()
    if not device.startswith("cuda"):
        begun = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(device: str, size: int, scratch: torch.Tensor) -> float:
    """GB/s read and written by a copy of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [milliseconds(lambda: target.copy_(source), device, scratch) for _ in range(12)]
    return 2 * size / statistics.median(times[2:]) / 1e6


def steps_of(out_features: int, in_features: int, device: str) -> dict[str, Step]:
    """`dense` and all variants, each with tensors of its own."""
    state = SamplingState.of(1.0, 300.0, 1e-5, step=1, device=device)

    def made(logits: torch.Tensor | None, eager: bool) -> Step:
        weight = (0.02 * torch.randn(out_features, in_features, device=device)).bfloat16()
        trained = weight if logits is None else logits
        optimizer = torch.optim.AdamW([trained.requires_grad_()], lr=1e-6, fused=True)
        return Step(weight, logits, eager, state, optimizer)

    steps = {"dense": made(None, False)}
    for name, (whose, dtype, eager) in VARIANTS.items():
        groups = PATTERN.num_groups(in_features)
        shape = (PATTERN.num_candidates, groups) if whose == "candidates" else (in_features,)
        steps[name] = made((0.01 * torch.randn(out_features, *shape, device=device)).to(dtype), eager)
    return steps


def measure(
    out_features: int, in_features: int, tokens: int, rounds: int, device: str, scratch: torch.Tensor, bandwidth: float
) -> dict[str, dict]:
    """One row for each variant of a layer."""
    x = torch.randn(tokens, in_features, device=device).bfloat16().requires_grad_()
    outgoing = torch.randn(tokens, out_features, device=device).bfloat16()
    gradient = torch.randn(out_features, in_features, device=device).bfloat16()
    steps = steps_of(out_features, in_features, device)
    memory = {name: step_memory(step, x, outgoing, device) for name, step in steps.items()}  # warms up, too
    order = list(steps.values())
    shuffle = random.Random(0).shuffle
    for round_number in range(rounds + 1):
        shuffle(order)
        for step in order:
            if round_number == 1:
                step.times.clear()  # the first round warmed up
            calls = {"step": lambda step=step: step.run(x, outgoing)}
            if step.logits is not None:
                calls["masks"] = lambda step=step: step.masks(gradient)
            for part, call in calls.items():
                step.times.setdefault(part, []).append(milliseconds(call, device, scratch))
            if step.logits is not None:
                step.logits.grad = None
    return {name: describe(name, steps, bandwidth) | memory[name] for name in steps}


def describe(name: str, steps: dict[str, Step], bandwidth: float) -> dict:
    step = steps[name]

    def over(other: str, part: str) -> float:
        pairs = zip(step.times[part], steps[other].times[part], strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 3)

    row = {f"{part}_milliseconds": round(statistics.median(times), 4) for part, times in step.times.items()}
    row["step_ratio"] = over("dense", "step")
    if step.logits is None:
        return row
    with torch_masks() if step.eager else nullcontext():
        row["fused"] = any(m.takes(step.weight, step.logits, PATTERN) for m in (gpu_masks, native_masks))
    if f"{name}, eager" in steps:
        row["masks_over_eager"] = over(f"{name}, eager", "masks")
    # W, logits and W * M; then the gradient of W * M, W, logits and their gradient.
    moved = 4 * step.weight.nbytes + 3 * step.logits.nbytes
    row["masks_gb_per_second"] = round(moved / row["masks_milliseconds"] / 1e6, 1)
    row["masks_share_of_copy"] = round(moved / row["masks_milliseconds"] / 1e6 / bandwidth, 3)
    return row


def step_memory(step: Step, x: torch.Tensor, outgoing: torch.Tensor, device: str) -> dict[str, float]:
    """MB that a variant holds between its steps, and MB more at the peak of one."""
    step.run(x, outgoing)
    states = [t for state in step.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    held = [step.weight, *states] if step.logits is None else [step.weight, step.logits, *states]
    result = {"held_mb": round(sum(tensor.nbytes for tensor in held) / 1e6, 1)}
    if device.startswith("cuda"):
        x.grad = None
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run(x, outgoing)
        result["step_peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return result


def run_all(layers: list[str], tokens: int, rounds: int, device: str, scratch_bytes: int = 1 << 30) -> dict:
    """What is written to the results."""
    torch.manual_seed(0)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
    bandwidth = copy_bandwidth(device, scratch_bytes, scratch)
    rows = {}
    for layer in layers:
        out_features, in_features = (int(size) for size in layer.split("x"))
        rows[layer] = measure(out_features, in_features, tokens, rounds, device, scratch, bandwidth)
        for name, row in rows[layer].items():
            print(layer, name, row)
    about = {"pattern": str(PATTERN), "weights": "bfloat16", "optimizer": "AdamW, fused"}
    about |= {"tokens": tokens, "rounds": rounds, "copy_gb_per_second": round(bandwidth, 1)}
    return {**about, "layers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/training_gpu.py needs a CUDA device; on the CPU run benchmarks/training.py")
    write_results(
        "training", "cuda", run_all(arguments.layers, arguments.tokens, arguments.rounds, "cuda"), arguments.output
    )


if __name__ == "__main__":
    main()
