# SPDX-License-Identifier: Apache-2.0
"""Time of pruning, packing and unpacking, against a copy of the dense weight into memory that is there.

All are timed in turn, again and again, so that whatever else the machine does meets them alike; numbers are medians. Results
of the operations are new tensors, as callers get them, which on a CPU costs the system's handing out of memory too. On a GPU
the bytes that an operation must read and write give its bandwidth.

    python benchmarks/packing.py [--device cuda] [--threads 2] [--rounds 15] [--output FILE]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import write_results

from hf_nmsparse import NMPattern, ops

SHAPES = [(4096, 4096), (1536, 576)]
DTYPES = [torch.float32, torch.bfloat16]
PATTERN = NMPattern("2:4")


def operations(weight: torch.Tensor) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, and the bytes that it must read and write for each weight."""
    size, columns = weight.element_size(), weight.shape[1]
    copy, scores = torch.empty_like(weight), torch.rand(weight.shape, device=weight.device)
    mask = ops.top_n_mask(weight.abs(), PATTERN)
    codes = ops.mask_to_codes(mask, PATTERN)
    packed = ops.pack_codes(codes, PATTERN, columns)
    values, ids, _ = ops.prune_24(weight)
    pruned = 1.5 * size + 1 / 8 + 1 / 4
    return {
        "copy": (lambda: copy.copy_(weight), 2 * size),
        "prune_24 by magnitude": (lambda: ops.prune_24(weight), pruned),
        "prune_24 by float32 scores": (lambda: ops.prune_24(weight, scores), pruned + 4),
        "pack_24": (lambda: ops.pack_24(weight, mask), 1.5 * size + 1 + 1 / 8),
        "unpack_24": (lambda: ops.unpack_24(values, ids), 1.5 * size + 1 / 8),
        **{
            f"top_n_mask {name}": (lambda name=name: ops.top_n_mask(weight, NMPattern(name)), size + 1)
            for name in ("2:4", "4:8", "8:16")
        },
        "top_n_codes 2:4": (lambda: ops.top_n_codes(weight, PATTERN), size + 2),
        "mask_to_codes 2:4": (lambda: ops.mask_to_codes(mask, PATTERN), 3),
        "codes_to_mask 2:4": (lambda: ops.codes_to_mask(codes, PATTERN, columns), 3),
        "pack_codes 2:4": (lambda: ops.pack_codes(codes, PATTERN, columns), 2 + 1 / 12),
        "unpack_codes 2:4": (lambda: ops.unpack_codes(packed, PATTERN, columns), 2 + 1 / 12),
        "complete_mask 2:4": (lambda: ops.complete_mask(mask, PATTERN), 2),
    }


def seconds_of(run: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
        begun = time.perf_counter()
        result = run()
        taken = time.perf_counter() - begun
        del result  # giving memory back is no part of it
        return taken
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def measure(shape: tuple[int, int], dtype: torch.dtype, device: str, rounds: int) -> dict:
    weight = torch.randn(shape, device=device).to(dtype)
    work = operations(weight)
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 2):
        for name, (run, _) in work.items():
            taken = seconds_of(run, device)
            if round_ >= 2:
                times[name].append(taken)
    copy = statistics.median(times["copy"])
    rows = {}
    for name, (_, bytes_per_weight) in work.items():
        median = statistics.median(times[name])
        rows[name] = {
            "milliseconds": 1000 * median,
            "over_copy": median / copy,
            "gigabytes_per_second": bytes_per_weight * weight.numel() / median / 1e9,
        }
        print(f"{list(shape)} {dtype} {name}: {1000 * median:.3f} ms, {median / copy:.2f} x copy")
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "operations": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(shape, dtype, arguments.device, arguments.rounds) for shape in SHAPES for dtype in DTYPES]
    content = {"threads": arguments.threads, "rounds": arguments.rounds, "rows": rows}
    write_results("packing", arguments.device, content, arguments.output)


if __name__ == "__main__":
    main()
