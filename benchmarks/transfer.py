# SPDX-License-Identifier: Apache-2.0
"""A mask for a task's domain: learned from scratch, or from a general mask; and what it costs to store.

    for text in wiki prose pydocs code; do head -c 2300000 $text/train.txt; done > mixed.txt
    python benchmarks/learned.py --threads 1 --steps 200 --data mixed.txt --rows learned --masks masks
    python benchmarks/transfer.py --general masks/learned --train code/train.txt --test code/test.txt \
        --other wiki=wiki/test.txt --steps 150

SmolLM2-135M-Instruct, 2:4, weights frozen. "from scratch" starts from polish on the task's own text, "from general" from the
published general mask; both learn on the same windows of the task's text for the same steps, and each row is a process of its own,
kept in --output and not run again. The delta is the file that `nms.save_mask(..., delta_to=)` writes. Compared rows are
bootstrapped over windows as in learned.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from learned import LEARNED, LENGTH, Recipe, Setting, bootstrap, learn, scores
from timing import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import smollm2
from hf_nmsparse.data import tokenize, windows
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.ops.machine import keep_freed_memory

ROWS = ("dense", "general as is", "from scratch", "from general")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, required=True, help="folder of a published mask")
    parser.add_argument("--train", required=True, help="text of the task to learn on")
    parser.add_argument("--test", required=True, help="held-out text of the task")
    parser.add_argument(
        "--other", action="append", default=[], metavar="NAME=FILE", help="held-out text of other domains"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--distil", action="store_true", help="the dense base teaches")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each text, in windows of 1024")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--masks", type=Path, default=Path("runs/transfer"), help="where the masks of rows are published"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        keep_freed_memory()
        print(json.dumps(measure(arguments.row, arguments)))
        return
    path = Path(arguments.output) if arguments.output else Path(__file__).parent / "results" / "transfer-cpu.json"
    about = {
        key: str(value) for key, value in vars(arguments).items() if key not in ("rows", "row", "output", "masks")
    }
    about |= {key: os.path.basename(about[key]) for key in ("general", "train", "test")} | {
        "other": len(arguments.other)
    }
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = before["rows"] if all(before.get(key) == value for key, value in about.items()) else {}
    for name in arguments.rows:
        if name not in rows:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(answer.stdout.splitlines()[-1])
        print(name, rows[name]["perplexity"], rows[name].get("delta_bits_per_weight", ""), flush=True)
        write_results(path.stem, "cpu", {**about, "rows": rows, "comparisons": comparisons(rows)}, str(path))


def measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = setting(arguments)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16, attn_implementation="eager").eval()
    result: dict[str, Any] = {}
    if row == "general as is":
        model = nms.load_mask(model, arguments.general)
    elif row in ("from scratch", "from general"):
        model, result = task_mask(row, model, chosen, arguments)
    return result | scores(model, chosen.texts)


def setting(arguments: argparse.Namespace) -> Setting:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    files = {"task": arguments.test, **dict(text.split("=", 1) for text in arguments.other)}
    cut = {name: windows(tokenize([Path(file).read_text()], tokenizer), 1024) for name, file in files.items()}
    train = tokenize([Path(arguments.train).read_text()], tokenizer)
    return Setting(train, {name: given[: arguments.eval_tokens // 1024] for name, given in cut.items()})


def task_mask(row: str, base, chosen: Setting, arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Learn it, publish it in full and as a delta."""
    recipe = LEARNED["learned, distilled" if arguments.distil else "learned"]
    if row == "from general":
        recipe = Recipe(prior=str(arguments.general), trainer=recipe.trainer)
    calibration = windows(chosen.train, LENGTH, samples=64, seed=arguments.seed)
    model, result = learn(recipe, base, chosen, calibration, arguments)
    nms.save_mask(model, folder_of(row, arguments))
    layers = mask_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    with tempfile.TemporaryDirectory() as folder:
        try:
            nms.save_mask(model, folder, delta_to=arguments.general)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
            result["delta_bits_per_weight"] = round(8 * size / weights, 4)
        except ConfigError as error:
            result["delta"] = str(error)
    general = nms.read_mask(arguments.general)
    result["differs_from_general"] = nms.diff_masks(
        general, nms.read_mask(folder_of(row, arguments))
    ).total.changed_share
    return model, result


def folder_of(row: str, arguments: argparse.Namespace) -> Path:
    return arguments.masks / row.replace(" ", "-")


def comparisons(rows: dict[str, dict]) -> dict[str, dict[str, Any]]:
    pairs = [("from general", "from scratch"), ("from general", "general as is"), ("from general", "dense")]
    return {
        f"{mine} against {other}": {
            text: bootstrap(losses, rows[other]["window_losses"][text])
            for text, losses in rows[mine]["window_losses"].items()
        }
        for mine, other in pairs
        if mine in rows and other in rows
    }


if __name__ == "__main__":
    main()
