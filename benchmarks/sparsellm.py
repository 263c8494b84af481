# SPDX-License-Identifier: Apache-2.0
"""SparseGPT against SparseLLM: perplexity of small trained models at 70 % unstructured and at 1:4 (one kept of four).

    OMP_NUM_THREADS=1 python benchmarks/sparsellm.py          # about fifteen minutes of one core

The models have a million weights: the Llama of tests/tiny_llama, and an OPT-like one that is trained here by the same
recipe on the tokens stored there. A seed picks the calibration windows. Perplexity is of test text that neither training
nor calibration has seen. Beside the two criteria stand the steps between them: SparseGPT with the inputs of FFNs measured
behind pruned attention; SparseLLM with one epoch, which fits the last layer of each FFN to what the pruned ones before it
give, and nothing else; both with kept weights refitted. "first half" is the protocol of the paper: the other half of the
blocks stays dense.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.criteria.sparsegpt import SparseGPT
from hf_nmsparse.criteria.sparsellm import SparseLLM
from hf_nmsparse.data import windows

TESTS = Path(__file__).parents[1] / "tests"
sys.path.append(str(TESTS))
from train_tiny_llama import SEQUENCE, build_opt, train  # noqa: E402

PATTERNS = ("70%", "1:4")
LEARNING_RATE = 1.5e-2


class BehindAttention(SparseGPT):
    """SparseGPT with SparseLLM's stages."""

    name = "sparsegpt behind attention"
    stages = SparseLLM.stages


VARIANTS = {
    "sparsegpt": (SparseGPT(), {}),
    "sparsegpt behind pruned attention": (BehindAttention(), {}),
    "sparsellm, 1 epoch": (SparseLLM(epochs=1), {}),
    "sparsellm": (SparseLLM(), {}),
    "sparsegpt, refit": (SparseGPT(), {"weights": "refit"}),
    "sparsellm, refit": (SparseLLM(refit=True), {}),
    "sparsegpt, first half": (SparseGPT(), {"layers": "0:50%"}),
    "sparsellm, first half": (SparseLLM(), {"layers": "0:50%"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of training the OPT, 2,048 tokens each")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 256 tokens")
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    train_tokens, test_tokens = (
        torch.from_numpy(np.load(TESTS / "tiny_llama" / f"{split}_tokens.npy").astype(np.int64))
        for split in ("train", "test")
    )
    held_out = windows(test_tokens, SEQUENCE)[: arguments.eval_windows]
    llama = AutoModelForCausalLM.from_pretrained(TESTS / "tiny_llama", dtype=torch.float32).eval()
    models = {"llama": llama, "opt": trained_opt(train_tokens, arguments.steps)}
    perplexities = {}
    for family, model in models.items():
        runs = []
        for seed in range(arguments.seeds):
            calibration = windows(train_tokens, SEQUENCE, samples=arguments.samples, seed=seed)
            runs.append(measure(model, calibration, held_out))
            print(family, seed, runs[-1], flush=True)
        perplexities[family] = {"runs": runs, "median": median(runs)}
    about = {
        "opt_training_steps": arguments.steps,
        "calibration_tokens": arguments.samples * SEQUENCE,
        "eval_tokens": held_out.numel(),
        "threads": arguments.threads,
        "seeds": arguments.seeds,
    }
    write_results("sparsellm", "cpu", {**about, "perplexity": perplexities}, arguments.output)


def trained_opt(tokens: torch.Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = build_opt(eos=0)
    train(model, tokens, steps, LEARNING_RATE)
    return model.eval()


def measure(model: nn.Module, calibration: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Perplexities by "pattern, variant", and at the end the CPU seconds of pruning."""
    found, seconds = {"dense": perplexity(model, held_out)}, {}
    for pattern in PATTERNS:
        for name, (criterion, options) in VARIANTS.items():
            pruned = copy.deepcopy(model)
            begun = time.process_time()
            nms.prune(pruned, criterion, pattern, calibration, progress=False, **options)
            seconds[f"CPU seconds: {pattern}, {name}"] = round(time.process_time() - begun, 1)
            found[f"{pattern}, {name}"] = perplexity(pruned, held_out)
    return found | seconds


def perplexity(model: nn.Module, held_out: torch.Tensor) -> float:
    return round(nms.perplexity(model, held_out, seq_len=SEQUENCE).value, 2)


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
