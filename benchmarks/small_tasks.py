# SPDX-License-Identifier: Apache-2.0
"""Weights trained under masks on tasks of two other kinds of models: pictures, and the classes of sentences.

    pip install scikit-learn                        # ships the handwritten digits (UCI, 1,797 pictures of 8x8)
    python benchmarks/small_tasks.py digits
    pip download vaderSentiment==0.5 --no-deps --no-binary :all:        # ships 10,605 snippets of film reviews
    python benchmarks/small_tasks.py reviews --data movieReviewSnippets_GroundTruth.txt

A small convolutional net, or a small BERT from scratch (snippets of Hutto and Gilbert, ICWSM 2014, rated above or below 0), is
trained dense; then each method goes on from it for the same steps, at 1:4 and 2:4 on all layers whose inputs allow it. Dense for
as many more steps is given too. Accuracy is of held-out examples, of the hard model, over seeds that give other data splits,
initial weights and orders. Its standard error is that of the difference to "magnitude, fixed mask" over the seeds.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from timing import write_results
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_nmsparse as nms

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "magnitude, not trained": {"relaxation": "ast"},
    "magnitude, fixed mask": {"relaxation": "ast", "mask_interval": None},
    "ast": {"relaxation": "ast"},
    "pdp": {"relaxation": "pdp"},
    "bdwp": {"relaxation": "bdwp"},
    "transposable": {"relaxation": "transposable"},
    "candidates": {"relaxation": "candidates", "temperature": (2.0, 0.05)},
}


@dataclass(frozen=True)
class Task:
    """Examples as keyword arguments of the model, split, and what to train on them."""

    train: list[dict[str, torch.Tensor]]
    test: list[dict[str, torch.Tensor]]
    model: nn.Module
    targets: list[str]
    dense_steps: int
    steps: int
    batch: int
    dense_rate: float
    rate: float


class Pictures(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(pixels))))))
        logits = self.head(x.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def digits(seed: int, _: str | None) -> Task:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    examples = [{"pixels": x, "labels": torch.tensor(y)} for x, y in zip(pixels, labels, strict=True)]
    train, test = split(examples, 600, seed)
    return Task(train, test, Pictures(), ["second", "third", "head"], 600, 300, 64, 3e-3, 1e-3)


def reviews(seed: int, data: str | None) -> Task:
    if data is None:
        raise SystemExit("reviews needs --data movieReviewSnippets_GroundTruth.txt, see --help")
    lines = [line.split("\t") for line in Path(data).read_text(encoding="latin-1").splitlines()]
    rated = [(text.lower().split(), float(rating)) for _, rating, text in lines if float(rating)]
    counts: dict[str, int] = {}
    for words, _ in rated:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    known = {word: index + 2 for index, word in enumerate(sorted(w for w, count in counts.items() if count > 2))}
    examples = []
    for words, rating in rated:
        ids = [1, *(known.get(word, 1) for word in words)][:32]
        padded = torch.tensor(ids + [0] * (32 - len(ids)))
        examples.append(
            {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": torch.tensor(int(rating > 0))}
        )
    train, test = split(examples, 2000, seed)
    config = BertConfig(
        vocab_size=len(known) + 2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=32,
    )
    return Task(train, test, BertForSequenceClassification(config), "all-linear", 600, 200, 32, 1e-3, 3e-4)


def split(examples: list, held_out: int, seed: int) -> tuple[list, list]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]


class Examples(Dataset):
    def __init__(self, examples: list[dict[str, torch.Tensor]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


def fit(task: Task, model: nn.Module, steps: int, rate: float, seed: int, masked: bool) -> None:
    arguments = TrainingArguments(
        "runs/small_tasks",
        max_steps=steps,
        per_device_train_batch_size=task.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
    )
    (nms.NMSparseTrainer if masked else Trainer)(
        model=model, args=arguments, train_dataset=Examples(task.train)
    ).train()


@torch.no_grad()
def accuracy(task: Task, model: nn.Module) -> float:
    model.eval()
    batch = {key: torch.stack([example[key] for example in task.test]) for key in task.test[0]}
    return float((model(**batch)["logits"].argmax(1) == batch["labels"]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "reviews"])
    parser.add_argument("--data", help="file of the reviews")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        task = {"digits": digits, "reviews": reviews}[arguments.task](seed, arguments.data)
        fit(task, task.model, task.dense_steps, task.dense_rate, seed, masked=False)
        rows.setdefault("dense, to begin with", []).append(accuracy(task, task.model))
        for pattern in arguments.patterns:
            for name, config in METHODS.items():
                row = name if config is None else f"{pattern} {name}"
                if config is None and pattern != arguments.patterns[0]:
                    continue
                rows.setdefault(row, []).append(measure(task, config, pattern, seed, "not trained" in name))
        print({name: round(values[-1], 4) for name, values in rows.items()}, flush=True)
    facts = {"task": arguments.task, "seeds": arguments.seeds, "accuracy": rows}
    write_results(f"small-tasks-{arguments.task}", "cpu", facts, arguments.output)
    print(table(rows))


def measure(task: Task, config: dict[str, Any] | None, pattern: str, seed: int, untrained: bool) -> float:
    model = copy.deepcopy(task.model)
    torch.manual_seed(seed)
    if config is None:
        fit(task, model, task.steps, task.rate, seed, masked=False)
        return accuracy(task, model)
    config = nms.NMSparseConfig(pattern=pattern, target_modules=task.targets, seed=seed, **config)
    model = get_peft_model(model, config)
    if not untrained:
        fit(task, model, task.steps, task.rate, seed, masked=True)
    return accuracy(task, model)


def table(rows: dict[str, list[float]]) -> str:
    lines = ["| | accuracy | against the fixed mask |", "|---|---|---|"]
    for name, values in rows.items():
        fixed = rows.get(f"{name.partition(' ')[0]} magnitude, fixed mask")
        against = ""
        if fixed is not None and fixed is not values and len(values) > 1:
            differences = [a - b for a, b in zip(values, fixed, strict=True)]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            against = f"{statistics.mean(differences):+.2%} (standard error {error:.2%})"
        lines.append(f"| {name} | {statistics.mean(values):.2%} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
