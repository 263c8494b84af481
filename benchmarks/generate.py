# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of `generate` on a packed model beside its dense form, and how often both choose the same token.

    python benchmarks/generate.py                                   # SmolLM2-135M-Instruct on the CPU, 5 minutes on 2 cores
    python benchmarks/generate.py --device cuda --random-llama 8b   # a random model of Llama-3-8B's shapes, static cache

Runs of the models alternate. Masks are Wanda's (magnitude's for a random model). "Agreement" is the share of held-out tokens
for which the packed model and the same model unpacked choose the same next token, given the same text before it, one token
at a time through the cache, so that the kernels for few tokens are the ones compared. In bfloat16 the order of a sum decides
between near-equal logits, so beside it stands how often the unpacked model agrees with itself when it reads the text in one
piece, and the agreement of both in float32.
"""

import argparse
import copy
import statistics
import time

import torch
from timing import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import tokenize, windows
from hf_nmsparse.ops.linear24.measure import ratio_interval

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def models_of(
    arguments: argparse.Namespace,
) -> tuple[dict[str, torch.nn.Module], torch.nn.Module, torch.Tensor]:
    """Dense model and packed ones by kind of values; the masked model; the token ids of a held-out text, `[1, n]`."""
    if arguments.random_llama:
        torch.manual_seed(0)
        with torch.device(arguments.device):
            masked = LlamaForCausalLM._from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16).eval()
        ids = torch.randint(0, LLAMA_8B["vocab_size"], (1, 1024), device=arguments.device)
    else:
        folder = smollm2()
        masked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenize(demo_text("test"), tokenizer)[None, :1024].to(arguments.device)
        calibration = windows(tokenize(demo_text("train"), tokenizer), 512, samples=8)
    dense = copy.deepcopy(masked)
    if arguments.random_llama:
        nms.prune(masked, "magnitude", progress=False)
    else:
        nms.prune(masked, "wanda", calibration=calibration, progress=False)
    packed = {
        kind: nms.compress(copy.deepcopy(masked), values=kind, memory=arguments.memory) for kind in arguments.values
    }
    return {"dense model": dense, **packed}, masked, ids


def agreement(packed: torch.nn.Module, masked: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """How often a packed model chooses as the masked model does that it was made from."""
    expected = chosen_tokens(masked, ids)
    with torch.inference_mode():
        in_one_piece = masked(ids).logits[0].argmax(-1)
    exact = copy.deepcopy(masked).float()
    exact_choice = chosen_tokens(exact, ids)

    def share(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one == other).float().mean().item()

    return {
        "agreement": share(chosen_tokens(packed, ids), expected),
        "agreement_of_unpacked_with_itself": share(in_one_piece, expected),
        "agreement_float32": share(chosen_tokens(nms.compress(exact), ids), exact_choice),
    }


@torch.inference_mode()
def tokens_per_second(model: torch.nn.Module, prompt: torch.Tensor, count: int, static: bool) -> float:
    begun = time.perf_counter()
    model.generate(
        prompt,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static" if static else None,
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begun)


@torch.inference_mode()
def chosen_tokens(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The token that the model would choose after each of `ids` `[1, n]`, fed one at a time; `[n]`."""
    cache, chosen = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chosen.append(out.logits[0, -1].argmax())
    return torch.stack(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random-llama", choices=["8b"])
    parser.add_argument("--values", nargs="+", default=["dense", "int8", "int4"], choices=["dense", "int8", "int4"])
    parser.add_argument("--memory", choices=["fast", "low"])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--agreement-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    models, masked, ids = models_of(arguments)
    prompt = ids[:, : arguments.prompt_tokens]
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(arguments.rounds + 1):
        for name, model in models.items():
            speed = tokens_per_second(model, prompt, arguments.new_tokens, static=arguments.device != "cpu")
            if round_number:  # the first one warms up
                speeds[name].append(speed)
    rows = []
    for name, model in models.items():
        ratio, low, high = ratio_interval(speeds[name], speeds["dense model"])
        row = {"model": name, "tokens_per_second": statistics.median(speeds[name])}
        if name != "dense model":
            row |= {"speedup": ratio, "speedup_low": low, "speedup_high": high}
            if name == "dense" and arguments.agreement_tokens:
                row |= agreement(model, masked, ids[:, : arguments.agreement_tokens])
        rows.append(row)
        print(row, flush=True)
    content = {"rows": rows, "arguments": {k: v for k, v in vars(arguments).items() if k != "output"}}
    write_results("generate", arguments.device, content, arguments.output)


if __name__ == "__main__":
    main()
