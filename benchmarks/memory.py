# SPDX-License-Identifier: Apache-2.0
"""Peak memory of pruning a model that is in memory, and of one whose blocks stay on disk and are loaded one at a time.

A Llama with random bfloat16 weights is written to a temporary folder, block by block, and pruned and saved in processes of
their own.

    python benchmarks/memory.py                                                 # 1.1 billion weights
    python benchmarks/memory.py --hidden 4096 --intermediate 11008 --layers 32  # the shape of Llama-2-7B: 13.5 GB of disk, twice
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import write_results
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_nmsparse as nms

VOCABULARY = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--criteria", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration, in windows of 256")
    parser.add_argument("--in-memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="for the model; by default a temporary one")
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        print(json.dumps(run(*arguments.run, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        weights = write_random_llama(Path(folder) / "model", arguments)
        about = {
            "weights": weights,
            "model_bytes": 2 * weights,
            "tokens": arguments.tokens,
            "threads": arguments.threads,
        }
        rows = []
        for criterion in arguments.criteria:
            for where in ("memory", "disk") if arguments.in_memory else ("disk",):
                command = [sys.executable, __file__, *sys.argv[1:], "--run", folder, criterion, where]
                answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(answer.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    write_results("memory", "cpu", {**about, "rows": rows}, arguments.output)


def write_random_llama(folder: Path, arguments: argparse.Namespace) -> int:
    """Write the model shard by shard, one a block, so that it never is in memory whole; returns its number of weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=arguments.hidden // 128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else (0.02 * torch.randn(shapes[name], generator=generator)).bfloat16()
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(shape.numel() for shape in shapes.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def run(folder: str, criterion: str, where: str, tokens: int) -> dict:
    """Load, prune and save in this process; its peak memory counts what it maps of files, too."""
    source = Path(folder) / "model"
    options = {}
    if where == "disk":
        layers = LlamaConfig.from_pretrained(source).num_hidden_layers
        blocks = {f"model.layers.{index}": "disk" for index in range(layers)}
        rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        options = {"device_map": blocks | rest}
    calibration = torch.randint(VOCABULARY, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options).eval()
    loaded = peak()
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        nms.prune(model, criterion, "2:4", calibration, checkpoint_folder=unfinished, progress=False)
        pruned = peak()
        with tempfile.TemporaryDirectory(dir=folder) as output:
            model.save_pretrained(output, max_shard_size="1GB")
    return {
        "criterion": criterion,
        "weights_in": where,
        "peak_bytes": {"loaded": loaded, "pruned": pruned, "saved": peak()},
        "seconds": time.perf_counter() - begun,
    }


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
