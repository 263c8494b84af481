# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing one callable, and writing results with their environment."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_nmsparse.files import write_file
from hf_nmsparse.results import environment


def median_milliseconds(run: Callable[[], object], device: str, repetitions: int = 9) -> float:
    """Median wall time of `run`, after two calls that warm it up."""
    times = []
    for repetition in range(repetitions + 2):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        if repetition >= 2:
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def write_results(name: str, device: str, content: dict, path: str | None) -> None:
    """Write to `path`, by default `benchmarks/results/<name>-<device>.json`."""
    target = Path(path) if path else Path(__file__).parent / "results" / f"{name}-{device}.json"
    write_file(target, json.dumps({**content, "device": device, "environment": environment()}, indent=1) + "\n")
    print(f"wrote {target}")
