# SPDX-License-Identifier: Apache-2.0
"""LLM-KICK's own finding put to the test: SmolLM2-135M-Instruct rounded and pruned in many ways, on tasks, agreement and text.

    python benchmarks/kick_data.py --output kick-data
    python benchmarks/kick.py --data kick-data --mask learned=my-mask --threads 2
    nmsparse report benchmarks/results/kick-cpu/*.json --output kick-report

Each variant is measured beside the dense model, on the same items and the same windows, and gets a results file of its own in
the folder --output; variants that are there already are not measured again. A learned mask comes from `nmsparse train` or
benchmarks/learned.py; without --mask its rows are left out. bfloat16; items are drawn with a fixed seed.

Which accuracies count was fixed before anything was measured (COUNTED): of those with at least 200 items the ones where the
dense model is above chance by two standard errors.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from oneshot import RESULTS
from peft import get_peft_model
from quantised import simulate_dense
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import SMOLLM2_NAME, demo_text, smollm2
from hf_nmsparse.cli.common import new_results
from hf_nmsparse.data import tokenize, windows
from hf_nmsparse.evaluation import (
    KickAnswers,
    KickTask,
    agreement,
    agreement_entry,
    perplexity,
    perplexity_entry,
    read_tasks,
    run_kick,
    sample_entries,
    task_entries,
)
from hf_nmsparse.results import RunResults

COUNTED = [  # task, metric: all accuracies that are measured
    ("choice-cities", "acc"),
    ("choice-cities", "acc_text"),
    ("choice-continuation", "acc_text"),
    ("factoid", "hit"),
    ("retrieval_closed", "exact_match"),
    ("retrieval_open", "exact_match"),
]
LIKELIHOODS = ["choice-cities", "choice-continuation", "factoid", "retrieval_closed", "retrieval_open"]
LEAST_ITEMS = 200
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JSONL files, see benchmarks/kick_data.py")
    parser.add_argument("--mask", action="append", default=[], metavar="NAME=FOLDER", help="a published 2:4 mask")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="held-out text")
    parser.add_argument("--calibration", help="text for Wanda and SLoRB; by default that of the demo")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each held-out text, in windows of 1024")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--new-tokens", type=int, default=100, help="of each summary and answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="folder; by default benchmarks/results/kick-cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output) if arguments.output else RESULTS / "kick-cpu"
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    dense = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    tasks = [task.limited(arguments.limit) for task in read_tasks(arguments.data)]
    files = dict(text.split("=", 1) for text in arguments.text)
    texts = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()} or {
        "wiki": demo_text("test")
    }
    held_out = {
        name: windows(tokenize([text], tokenizer), LENGTH)[: arguments.eval_tokens // LENGTH]
        for name, text in texts.items()
    }
    calibration_text = Path(arguments.calibration).read_text() if arguments.calibration else demo_text("train")
    calibration = windows(tokenize([calibration_text], tokenizer), 512, samples=arguments.samples, seed=0)
    measure = Measure(dense, tokenizer, tasks, held_out, arguments.new_tokens)
    masks = dict(mask.split("=", 1) for mask in arguments.mask)
    for name, facts, make in variants(calibration, masks):
        path = folder / f"{name.replace(' ', '-').replace(':', '-').replace('%', '')}.json"
        if not path.is_file():
            results = measure(make(copy.deepcopy(dense)), name, facts)
            path.parent.mkdir(parents=True, exist_ok=True)
            results.write(path)
        print(f"{name}: {path}", flush=True)
    write_table(folder)


# --- variants -------------------------------------------------------------------------------------------------------
Variant = tuple[str, dict, Callable[[nn.Module], nn.Module]]


def variants(calibration: torch.Tensor, masks: dict[str, str]) -> Iterator[Variant]:
    """Name, what is known of it, and how it is made of a copy of the dense model."""
    for kind in ("int8", "int4"):
        yield f"dense {kind}", {"method": f"{kind}, rounded to the nearest, simulated"}, partial(rounded, kind=kind)
    for share in ("10%", "25%", "50%"):
        yield (
            f"magnitude {share}",
            {"pattern": share, "method": "magnitude"},
            partial(pruned, "magnitude", share, None),
        )
    yield "2:4 wanda", {"pattern": "2:4", "method": "wanda"}, partial(pruned, "wanda", "2:4", calibration)
    for name, folder in masks.items():
        yield f"2:4 {name}", {"pattern": "2:4", "method": f"mask {name}"}, partial(masked, folder)
    for name, prior in {"wanda": "wanda", **masks}.items():
        facts = {"pattern": "2:4", "method": f"{name}, SLoRB in closed form", "terms": {"slorb_block": 16}}
        yield f"2:4 {name} SLoRB", facts, partial(with_slorb, prior, calibration)


def rounded(model: nn.Module, kind: str) -> nn.Module:
    simulate_dense(model, kind, None)
    return model


def pruned(criterion: str, pattern: str, calibration: torch.Tensor | None, model: nn.Module) -> nn.Module:
    nms.prune(model, criterion, pattern, calibration=calibration)
    return model


def masked(folder: str, model: nn.Module) -> nn.Module:
    return nms.compress(nms.load_mask(model, folder))


def with_slorb(prior: str, calibration: torch.Tensor, model: nn.Module) -> nn.Module:
    model = get_peft_model(model, nms.NMSparseConfig(pattern="2:4", slorb_block=16, prior=None, init_weights=True))
    nms.set_prior(model, prior, calibration=calibration if prior == "wanda" else None)
    nms.fit_side_branch(model, calibration)
    return nms.compress(model)


# --- measures -------------------------------------------------------------------------------------------------------
class Measure:
    """Everything about a variant; what is measured of the dense model is measured once."""

    def __init__(
        self,
        dense: nn.Module,
        tokenizer,
        tasks: list[KickTask],
        texts: dict[str, torch.Tensor],
        new_tokens: int,
    ):
        self.dense, self.tokenizer, self.tasks, self.texts, self.new_tokens = (
            dense,
            tokenizer,
            tasks,
            texts,
            new_tokens,
        )
        self._answers: KickAnswers | None = None
        self._perplexities = {}

    def __call__(self, model: nn.Module, name: str, facts: dict) -> RunResults:
        if self._answers is None:
            self._answers = run_kick(self.dense, self.tokenizer, self.tasks, None, self.new_tokens)
            self._perplexities = {text: perplexity(self.dense, tokens) for text, tokens in self.texts.items()}
        command = " ".join(["python", "benchmarks/kick.py", *sys.argv[1:]])
        results = new_results(base_model=SMOLLM2_NAME, seed=0, command=command, **facts)
        for text, tokens in self.texts.items():
            found = perplexity(model, tokens)
            results.evaluations.append(perplexity_entry(text, tokens, found, self._perplexities[text]))
            results.agreement.append(agreement_entry(text, tokens, agreement(model, tokens, self.dense)))
        answers = run_kick(model, self.tokenizer, self.tasks, self._answers, self.new_tokens)
        results.tasks = task_entries(answers.scores, self._answers.scores, "kick")
        results.samples = sample_entries(self.tasks, answers, self._answers)
        for entry in results.evaluations + results.agreement + results.tasks:
            print(name, {key: value for key, value in entry.items() if key not in ("layers", "sha256")}, flush=True)
        return results


# --- the table ------------------------------------------------------------------------------------------------------
def write_table(folder: Path) -> None:
    """One row a variant, and what the damage that was done on purpose shows."""
    rows = {path.stem: RunResults.read(path) for path in sorted(folder.glob("*.json"))}
    any_run = next(iter(rows.values()))
    dense = {(entry["task"], entry["metric"]): entry for entry in any_run.tasks}
    counted = [key for key in COUNTED if key in dense and counts(dense[key])]
    texts = [entry["text"] for entry in any_run.evaluations]
    heads = (
        [f"perplexity {text}" for text in texts]
        + [f"KL {text}" for text in texts]
        + [f"top-1 {text}" for text in texts]
    )
    heads += [f"{task} log-likelihood" for task in LIKELIHOODS] + [f"{task} {metric}" for task, metric in counted]
    heads += ["repetition (instruction)"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    keys = [(task, "log_likelihood") for task in LIKELIHOODS] + counted + [("instruction", "repetition")]
    first = [entry["dense"] for entry in any_run.evaluations] + [0.0] * len(texts) + [1.0] * len(texts)
    lines.append(table_line("dense", [*first, *(dense[key]["dense"] for key in keys)]))
    for name, run in rows.items():
        tasks = {(entry["task"], entry["metric"]): entry["this"] for entry in run.tasks}
        values = [entry["this"] for entry in run.evaluations]
        values += [entry["kl"] for entry in run.agreement] + [entry["top1"] for entry in run.agreement]
        lines.append(table_line(name, [*values, *(tasks[key] for key in keys)]))
    left_out = [f"{task} {metric}" for task, metric in COUNTED if (task, metric) not in counted]
    lines += [
        "",
        f"Accuracies that do not count, because dense is not above chance or items are few: {', '.join(left_out)}.",
    ]
    lines += ordered(rows)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def counts(entry: dict) -> bool:
    """Whether the dense model is above chance by two standard errors on enough items."""
    above = entry["dense"] - (entry["chance"] or 0.0) > 2 * (entry["dense_standard_error"] or 0.0)
    return above and entry["items"] >= LEAST_ITEMS


def ordered(rows: dict[str, RunResults]) -> list[str]:
    """Whether models that were made worse on purpose are seen as worse, in order."""
    damaged = [rows[f"magnitude-{share}"] for share in ("10", "25", "50") if f"magnitude-{share}" in rows]
    if len(damaged) < 3:
        return []
    series = {
        f"KL {e['text']}": [run.agreement[i]["kl"] for run in damaged] for i, e in enumerate(damaged[0].agreement)
    }
    series |= {
        f"top-1 {e['text']}": [-run.agreement[i]["top1"] for run in damaged]
        for i, e in enumerate(damaged[0].agreement)
    }
    for task in LIKELIHOODS:
        found = [
            e["this"] for run in damaged for e in run.tasks if (e["task"], e["metric"]) == (task, "log_likelihood")
        ]
        series[f"{task} log-likelihood"] = [-value for value in found]
    return ["", "Magnitude 10 %, 25 %, 50 %, seen as ever worse:", ""] + [
        f"- {name}: {'yes' if values == sorted(values) and len(set(values)) == 3 else 'NO'} "
        f"({', '.join(f'{abs(value):.4g}' for value in values)})"
        for name, values in series.items()
    ]


def table_line(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.4g}" for value in values) + " |"


if __name__ == "__main__":
    main()
