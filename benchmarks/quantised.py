# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity of SmolLM2-135M-Instruct pruned 2:4 and then rounded to int8 or int4, and of the dense one rounded.

    python benchmarks/quantised.py --threads 2
    python benchmarks/quantised.py --tiny --samples 16 --eval-tokens 4096     # the trained tiny Llama of the tests
    python benchmarks/quantised.py --text code=test.py.txt --text prose=test.txt    # more held-out texts

The model is pruned once; each row rounds the weights of that model, or of the dense one, to the nearest ("nearest") or with
input scales searched on the calibration windows ("AWQ", arXiv 2306.00978). All rows share mask, windows and dtype. Rows of
2:4 run packed; those of the dense model are simulated: its weights are replaced by what they would be rounded to, with one
scale for each 128 inputs and the same functions. Bits a weight count values, column ids and scales of the pruned layers.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import torch
from oneshot import RESULTS, Setting, described, setting
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.criteria import find_weights, rounded_weight, search_input_scales
from hf_nmsparse.ops import SCALE_COLUMNS
from hf_nmsparse.packed import packed_sizes

KINDS = ("int8", "int4")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny trained Llama of the tests")
    parser.add_argument(
        "--criterion", default="sparsegpt", help="how the mask is chosen; kept weights are updated by it"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the model and the scales")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens (--tiny: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each text, in windows of 1024 (--tiny: 256)")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="one more held-out text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    arguments.pattern = "2:4"
    torch.set_num_threads(arguments.threads)
    name = "quantised-tiny" if arguments.tiny else "quantised"
    path = Path(arguments.output) if arguments.output else RESULTS / f"{name}-cpu.json"
    chosen = setting(arguments)
    about = described(arguments) | {"criterion": arguments.criterion, "dtype": arguments.dtype}
    about["model"] = about["model"].replace("float32", arguments.dtype)
    rows: dict[str, dict] = {}
    for row, result in measured(chosen, arguments.criterion, DTYPES[arguments.dtype]):
        rows[row] = result
        print(row, result, flush=True)
        write_results(path.stem, "cpu", {**about, "rows": rows}, str(path))
    write_table(rows, path.with_suffix(".md"))


def measured(chosen: Setting, criterion: str, dtype: torch.dtype):
    """Rows one by one: name, perplexities, bits a weight, seconds."""
    dense = AutoModelForCausalLM.from_pretrained(chosen.source, dtype=dtype).eval()
    yield "dense", {"bits": 8.0 * dtype.itemsize, "perplexity": scores(dense, chosen)}
    pruned = copy.deepcopy(dense)
    calibration = None if criterion == "magnitude" else chosen.calibration
    begun = time.perf_counter()
    nms.prune(pruned, criterion, calibration=calibration)
    seconds = time.perf_counter() - begun
    packed = nms.compress(copy.deepcopy(pruned))
    yield "2:4", {"bits": bits(packed), "seconds": seconds, "perplexity": scores(packed, chosen)}
    del packed
    ways = {"nearest": None, "AWQ": chosen.calibration}
    for kind in KINDS:
        for way, windows in ways.items():
            begun = time.perf_counter()
            model = nms.compress(copy.deepcopy(pruned), values=kind, calibration=windows)
            seconds = time.perf_counter() - begun
            yield (
                f"2:4 + {kind}, {way}",
                {"bits": bits(model), "seconds": seconds, "perplexity": scores(model, chosen)},
            )
    del pruned
    for way, windows in ways.items():
        model, begun = copy.deepcopy(dense), time.perf_counter()
        count = simulate_dense(model, "int4", windows)
        seconds = time.perf_counter() - begun
        yield (
            f"dense + int4, {way} (simulated)",
            {"bits": count, "seconds": seconds, "perplexity": scores(model, chosen)},
        )


@torch.no_grad()
def simulate_dense(model: nn.Module, kind: str, calibration: torch.Tensor | None) -> float:
    """Replace the dense weights of the blocks by their rounded values; returns the bits a weight that they would take."""
    targets = find_weights(model)
    scales = {}
    if calibration is not None:
        scales = search_input_scales(model, targets.values(), kind, calibration)
    stored = weights = 0
    for name, target in targets.items():
        weight = target.dense()
        weight.copy_(rounded_weight(weight, kind, scales.get(name)))
        width = 8 * weight.element_size()
        groups = -(-weight.shape[1] // SCALE_COLUMNS)
        stored += weight.numel() * int(kind.removeprefix("int")) + width * len(weight) * groups
        stored += width * weight.shape[1] * (name in scales)
        weights += weight.numel()
    return stored / weights


def bits(model: nn.Module) -> float:
    sizes = packed_sizes(model)
    return 16 * sizes.packed / sizes.dense_bf16


def scores(model: nn.Module, chosen: Setting) -> dict[str, float]:
    """Perplexity on each text."""
    perplexity = partial(nms.perplexity, model)
    return {name: perplexity(tokens, seq_len=tokens.shape[1]).value for name, tokens in chosen.texts.items()}


def write_table(rows: dict[str, dict], path: Path) -> None:
    names = list(rows["dense"]["perplexity"])
    lines = [f"| | bits a weight | {' | '.join(names)} | seconds |", "|---|" + "---|" * (len(names) + 2)]
    for name, row in rows.items():
        values = " | ".join(f"{row['perplexity'][text]:,.2f}" for text in names)
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
        lines.append(f"| {name} | {row['bits']:.3f} | {values} | {seconds} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
