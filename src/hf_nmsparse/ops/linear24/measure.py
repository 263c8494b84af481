# SPDX-License-Identifier: Apache-2.0
"""How long kernels take here: interleaved with the dense product, on weights that no cache holds.

A layer of a model finds its weight in memory, not in a cache: between two of its calls all other layers ran. So each call
here takes the next of several copies, together larger than the cache, and dense and packed calls alternate, so that what
else the machine does meets both.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from ...codec import quantize_values
from ..packing import prune_24
from .call import FORWARD, Call24
from .dispatch import Kernel24, forget_choices, kernels_for
from .tables import DENSE, forget_tables, machine_of, row_key, write_tuned
from .unpacked import UNPACKED
from .weight import Memo24, Weight24

_SAMPLE_SECONDS = 2e-3  # shorter calls are timed several at a time
_LARGEST_COPIES = 4 << 30  # bytes
_MOST_COPIES = 4096


@dataclass(frozen=True)
class Roofline:
    """What this device does at its best, measured.

    Args:
        bytes_per_second (`float`): read from memory.
        flop_per_second (`float`): of a large dense product in the dtype of the calls.
    """

    bytes_per_second: float
    flop_per_second: float

    def milliseconds(self, num_bytes: int, flop: int) -> float:
        """The least time for so many bytes and operations."""
        return 1000 * max(num_bytes / self.bytes_per_second, flop / self.flop_per_second)


@dataclass(frozen=True)
class Measurement:
    """Times of one call by kernel name, the dense product under `DENSE`.

    Args:
        call (`Call24`): what was computed.
        milliseconds (`dict[str, list[float]]`): kernel -> time of each round; round i of all kernels ran side by side.
    """

    call: Call24
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, kernel: str) -> float:
        return statistics.median(self.milliseconds[kernel])

    def speedup(self, kernel: str) -> tuple[float, float, float]:
        """Dense time over that of `kernel`: of the medians, and the ends of its 95 % interval."""
        return ratio_interval(self.milliseconds[DENSE], self.milliseconds[kernel])

    def row(self) -> dict:
        """As in a table of measured times."""
        return {
            "shape": [self.call.out_features, self.call.in_features],
            "tokens": self.call.tokens,
            "dtype": str(self.call.dtype).removeprefix("torch."),
            "values": self.call.kind,
            "product": self.call.product,
            "milliseconds": {name: round(self.median(name), 6) for name in self.milliseconds},
        }


def measure_kernels(call: Call24, rounds: int = 30) -> Measurement:
    """Time every kernel that can take `call`, and the dense product.

    Args:
        call (`Call24`): a forward product.
        rounds (`int`): times each is timed.
    """
    copies = copies_of(call)
    x = torch.randn(call.tokens, call.in_features, device=call.device).to(call.dtype)
    runs: dict[str, Callable[[int], object]] = {DENSE: lambda i: F.linear(x, copies.dense[i % len(copies)])}
    for kernel in _worth_timing(call):
        runs[kernel.name] = lambda i, kernel=kernel: kernel.run(x, copies.packed[i % len(copies)], None)
    with torch.inference_mode():
        return Measurement(call, interleave(runs, rounds, call.device))


def _worth_timing(call: Call24) -> list[Kernel24]:
    """All but the reference where another kernel unpacks: it takes tens of times longer and never wins."""
    kernels = kernels_for(call)
    unpacking = [kernel for kernel in kernels if kernel.unpacks]
    return [kernel for kernel in kernels if kernel is not UNPACKED or len(unpacking) == 1]


class Copies:
    """Random 2:4 weights for a call, dense and packed, enough of them that no cache holds them."""

    def __init__(self, call: Call24) -> None:
        generator = torch.Generator(call.device).manual_seed(0)
        shape = (call.out_features, call.in_features)
        dense = torch.randn(shape, generator=generator, device=call.device).to(call.dtype)
        values, ids, _ = prune_24(dense)
        scale = None
        if call.kind != "dense":
            values, scale = quantize_values(values, call.kind)
        weight = Weight24(values, ids, scale)
        smallest = sum(tensor.nbytes for tensor in weight.tensors if tensor is not None)
        wanted = 1 + round(1.5 * cache_bytes(call.device)) // smallest
        count = max(2, min(wanted, _MOST_COPIES, _LARGEST_COPIES // (smallest + dense.nbytes)))
        self.dense = [dense.to(call.device, copy=True) for _ in range(count)]
        self.packed = [
            Weight24(*(None if tensor is None else tensor.to(call.device, copy=True) for tensor in weight.tensors))
            for _ in range(count)
        ]
        for packed in self.packed:
            packed.memo = Memo24(packed)

    def __len__(self) -> int:
        return len(self.dense)


@lru_cache(maxsize=1)  # calls on one weight with several token counts follow each other
def _copies(one_token: Call24) -> Copies:
    return Copies(one_token)


def copies_of(call: Call24) -> Copies:
    """`Copies` for a call, the last ones again if they fit."""
    return _copies(replace(call, tokens=1))


def interleave(
    runs: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one call of each of `runs`, `rounds` times, in turn.

    Args:
        runs (`Mapping[str, Callable]`): name -> function of a counter that says which copy of the weight to take.
        rounds (`int`): samples of each.
        device (`torch.device`): where they run. On CUDA a sample is one replay of a graph where they can be captured.
    """
    repeats = _repeats(runs, device)
    timers = {name: _timer(run, repeats, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    counter = 0
    shuffle = random.Random(0).shuffle
    order = list(timers.items())
    for round_number in range(rounds + 1):
        shuffle(order)  # what ran just before leaves its mark on caches and clocks
        for name, timer in order:
            milliseconds = timer(counter)
            counter += repeats
            if round_number:  # the first one warms up
                times[name].append(milliseconds)
    return times


def _repeats(runs: Mapping[str, Callable[[int], object]], device: torch.device) -> int:
    longest = 0.0
    for run in runs.values():
        run(0)
        _wait(device)
        begun = time.perf_counter()
        run(1)
        _wait(device)
        longest = max(longest, time.perf_counter() - begun)
    return max(1, min(200, round(_SAMPLE_SECONDS / longest)))


def _timer(run: Callable[[int], object], repeats: int, device: torch.device) -> Callable[[int], float]:
    if device.type != "cuda":
        return lambda counter: _time_on_host(run, repeats, counter, device)
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i)
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        for i in range(repeats):
            run(i)
    return lambda counter: _time_graph(graph, repeats)


def _time_on_host(run: Callable[[int], object], repeats: int, counter: int, device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    for i in range(repeats):
        run(counter + i)
    _wait(device)
    return 1000 * (time.perf_counter() - begun) / repeats


def _time_graph(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_interval(
    numerators: list[float], denominators: list[float], resamples: int = 1000
) -> tuple[float, float, float]:
    """Ratio of the medians of paired samples, and the ends of its 95 % bootstrap interval (pairs are drawn together)."""
    draw = random.Random(0)
    indices = range(len(numerators))

    def ratio(chosen: list[int] | range) -> float:
        return statistics.median(numerators[i] for i in chosen) / statistics.median(denominators[i] for i in chosen)

    ratios = sorted(ratio(draw.choices(indices, k=len(indices))) for _ in range(resamples))
    return ratio(indices), ratios[round(0.025 * resamples)], ratios[round(0.975 * resamples) - 1]


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"), 32 << 20)
    except (ValueError, OSError, AttributeError):
        return 64 << 20


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Best of several runs over memory far larger than the cache, and of a product of 2048 x 4096 x 4096."""
    count = max(4 * cache_bytes(device), 1 << 28) // 4
    memory = torch.ones(count, device=device)
    a = torch.randn(2048, 4096, device=device).to(dtype)
    b = torch.randn(4096, 4096, device=device).to(dtype)
    seconds = {}
    for name, run in (("read", memory.sum), ("product", lambda: F.linear(a, b))):
        run()
        seconds[name] = min(_time_on_host(lambda _, run=run: run(), 1, 0, device) for _ in range(7)) / 1000
    return Roofline(memory.nbytes / seconds["read"], 2 * 2048 * 4096 * 4096 / seconds["product"])


def bytes_of(call: Call24, kernel: str) -> int:
    """Bytes that a call must move: the weight once, dense or packed, the input and the output."""
    weights = call.out_features * call.in_features
    width = call.dtype.itemsize
    bits = {"dense": 4 * width, "int8": 4, "int4": 2}[call.kind] + 1 + (0 if call.kind == "dense" else width * 8 / 128)
    weight = weights * width if kernel == DENSE else weights * bits / 8
    return round(weight + width * call.tokens * (call.in_features + call.out_features))


def flop_of(call: Call24) -> int:
    """Operations of the dense product."""
    return 2 * call.tokens * call.out_features * call.in_features


def tune(calls: Iterable[Call24], rounds: int = 30, progress: Callable[[Measurement], None] | None = None) -> Path:
    """Measure the kernels for `calls` and leave the times where the dispatcher of this machine finds them.

    Args:
        calls (`Iterable[Call24]`): all on one device.
        rounds (`int`): times each kernel is timed.
        progress (`Callable`, *optional*): gets each measurement.

    Returns:
        the table's path; rows of other calls that it held stay.
    """
    rows: dict[tuple, dict] = {}
    machine = path = None
    try:
        for call in calls:
            machine = machine or machine_of(call.device, torch.get_num_threads())
            measurement = measure_kernels(call, rounds)
            row = measurement.row()
            rows[row_key(row)] = row
            path = write_tuned(machine, rows)  # after each: whoever stops keeps what was measured
            if progress is not None:
                progress(measurement)
    finally:
        forget_tables()
        forget_choices()
    return path


def forward_call(device: torch.device, dtype: torch.dtype, kind: str, shape: tuple[int, int], tokens: int) -> Call24:
    """The forward product of a weight of `shape` (`(out, in)`) with `tokens` rows of input."""
    return Call24(device, dtype, kind, *shape, tokens, FORWARD)
