# SPDX-License-Identifier: Apache-2.0
"""Masks learned block by block (`nms.learn_blockwise`): perplexity before and after, and what it costs.

    python benchmarks/blockwise.py --tiny                    # the trained one-million-weight Llama of the tests
    python benchmarks/blockwise.py --blocks 5 --steps 40     # the first blocks of SmolLM2-135M-Instruct, the others dense

2:4, float32, calibrated on the packaged Wikipedia sample (tiny: the tokens of the tests); perplexity is of held-out text.
CPU time is that of `learn_blockwise` alone.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from timing import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import tokenize, windows

ROWS = [("wanda", "pruned"), ("wanda", "dense"), ("magnitude", "pruned"), ("polish", "pruned")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny trained Llama of the tests")
    parser.add_argument("--blocks", type=int, help="mask only the first blocks; by default all")
    parser.add_argument("--steps", type=int, default=100, help="for each block")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=128, help="windows of 256 tokens to learn from")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="which of the rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source, train, held_out = texts(arguments.tiny)
    rows = []
    for prior, inputs in (ROWS[number] for number in arguments.rows):
        rows.append({"prior": prior, "inputs": inputs, **measure(source, train, held_out, prior, inputs, arguments)})
        print(rows[-1], flush=True)
        about = {name: value for name, value in vars(arguments).items() if name not in ("output", "rows")}
        about["eval_tokens"] = held_out.numel()
        name = "blockwise-tiny" if arguments.tiny else "blockwise"
        write_results(name, "cpu", {**about, "rows": rows}, arguments.output)


def texts(tiny: bool) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The model's folder, training tokens, held-out windows."""
    if tiny:
        source = Path(__file__).parents[1] / "tests" / "tiny_llama"
        train, test = (
            torch.from_numpy(np.load(source / f"{part}_tokens.npy").astype(np.int64)) for part in ("train", "test")
        )
        return source, train, windows(test, 256)[:64]
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, test = (tokenize([demo_text(part)], tokenizer) for part in ("train", "test"))
    return source, train, windows(test, 1024)[:4]


def measure(source: Path, train: torch.Tensor, held_out: torch.Tensor, prior: str, inputs: str, arguments) -> dict:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    dense = perplexity(model, held_out)
    blocks = None if arguments.blocks is None else list(range(arguments.blocks))
    config = nms.NMSparseConfig(prior=prior, layers_to_transform=blocks, seed=arguments.seed)
    model = get_peft_model(model, config).eval()
    if prior != "magnitude":
        nms.set_prior(model, prior, windows(train, 256, samples=64, seed=arguments.seed))
    before = perplexity(model, held_out)
    begun, cpu = time.perf_counter(), time.process_time()
    report = nms.learn_blockwise(
        model,
        windows(train, 256, samples=arguments.samples, seed=arguments.seed + 1),
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        inputs=inputs,
    )
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "dense": round(dense, 2),
        "perplexity_before": round(before, 2),
        "perplexity_after": round(perplexity(model, held_out), 2),
        "blocks": [
            [block.name, round(block.error_before, 4), round(block.error_after, 4), round(block.changed, 4)]
            for block in report.blocks
        ],
    }


def perplexity(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    return nms.perplexity(model, held_out, seq_len=held_out.shape[1]).value


if __name__ == "__main__":
    main()
