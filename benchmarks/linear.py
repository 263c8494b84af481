# SPDX-License-Identifier: Apache-2.0
"""Packed 2:4 linear layers against dense ones of torch: shapes of real models, both memory modes, all kinds of values.

    python benchmarks/linear.py                         # on the CPU, 20 minutes on 2 cores
    python benchmarks/linear.py --device cuda           # needs a GPU
    python benchmarks/linear.py --quick                 # a few shapes

Packed and dense calls alternate; each takes the next of several copies of the weight, together larger than the cache. The
speed-up is the dense time over the packed time, with the 95 % bootstrap interval of paired samples. `memory="low"` holds the
packed weight alone, `memory="fast"` may hold the dense one too. Writes JSON, Markdown and a plot.
"""

import argparse
import os
from pathlib import Path

import torch
from timing import write_results

from hf_nmsparse.files import write_file
from hf_nmsparse.ops.linear24.measure import forward_call, measure_roofline, tune
from hf_nmsparse.packed.bench import LayerSpeed, measure_layer

SMOLLM2 = [(192, 576), (576, 576), (1536, 576), (576, 1536)]
LARGE = [(4096, 4096), (11008, 4096), (14336, 4096)]
TOKENS = [1, 8, 64, 512, 4096]
RESULTS = Path(__file__).parent / "results"


def calls_of(arguments: argparse.Namespace) -> list:
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    shapes = [(1536, 576), (4096, 4096)] if arguments.quick else SMOLLM2 + LARGE
    most = min(arguments.most_tokens, 64 if arguments.quick else 4096)
    return [
        forward_call(device, dtype, kind, shape, count)
        for kind in arguments.values
        for shape in shapes
        for count in TOKENS
        if count <= (most if kind == "dense" else min(most, 512))  # quantised values serve few tokens
    ]


def markdown(rows: list[LayerSpeed]) -> str:
    lines = [
        "| shape | values | tokens | memory | kernel | dense ms | packed ms | speed-up | 95 % | of the limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.shape[0]}x{row.shape[1]} | {row.values} | {row.tokens} | {row.memory} | {row.kernel} | "
        f"{row.dense_milliseconds:.3f} | {row.milliseconds:.3f} | {row.speedup:.2f} | {row.speedup_low:.2f} - "
        f"{row.speedup_high:.2f} | {row.roofline_share:.0%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[LayerSpeed], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shapes = sorted({row.shape for row in rows}, key=lambda shape: shape[0] * shape[1])
    kinds = [kind for kind in ("dense", "int8", "int4") if any(row.values == kind for row in rows)]
    names = {"dense": "16-bit values", "int8": "int8 values", "int4": "int4 values"}
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.4 * len(kinds), 4), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for index, shape in enumerate(shapes):
            mine = [row for row in rows if (row.shape, row.values, row.memory) == (shape, kind, "fast")]
            if not mine:
                continue
            tokens = [row.tokens for row in mine]
            colour = pyplot.get_cmap("viridis")(index / max(1, len(shapes) - 1))
            axis.plot(tokens, [row.speedup for row in mine], "o-", color=colour, label=f"{shape[0]}x{shape[1]}")
            low, high = [row.speedup_low for row in mine], [row.speedup_high for row in mine]
            axis.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=names[kind])
        axis.set_xticks(sorted({row.tokens for row in rows}), [str(t) for t in sorted({row.tokens for row in rows})])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("dense time / packed time")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f'Packed 2:4 layers on {device}, memory="fast"; bands: 95 % intervals', fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--values", nargs="+", default=["dense", "int8", "int4"], choices=["dense", "int8", "int4"])
    parser.add_argument("--most-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tune", action="store_true", help="time every kernel first, and choose by these times")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file; Markdown and plot go beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    calls = calls_of(arguments)
    if arguments.tune:
        print("times for this machine:", tune(calls, min(arguments.rounds, 12), lambda m: print(m.row(), flush=True)))
    roofline = measure_roofline(calls[0].device, calls[0].dtype)
    rows: list[LayerSpeed] = []
    for call in calls:
        for row in measure_layer(call, roofline, arguments.rounds):
            rows.append(row)
            print(markdown([row]).splitlines()[-1], flush=True)
    target = arguments.output or RESULTS / f"linear-{arguments.device}.json"
    content = {
        "rows": [row.to_dict() for row in rows],
        "roofline": {"bytes_per_second": roofline.bytes_per_second, "flop_per_second": roofline.flop_per_second},
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    write_results("linear", arguments.device, content, str(target))
    write_file(target.with_suffix(".md"), markdown(rows))
    plot(rows, arguments.device, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
