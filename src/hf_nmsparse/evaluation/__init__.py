# SPDX-License-Identifier: Apache-2.0
"""Measures of a model. They take any causal language model: dense, masked, PEFT or packed."""

from .agreement import Agreement, agreement
from .entries import agreement_entry, perplexity_entry, renewed, sample_entries, task_entries
from .harness import SUITES, evaluate_tasks
from .judge import Judge
from .kick import KickAnswers, run_kick
from .kick_data import KickTask, fetch_tasks, read_tasks
from .perplexity import Perplexity, perplexity
from .scores import TaskScore, mean_score, task_entry

__all__ = [
    "SUITES",
    "Agreement",
    "Judge",
    "KickAnswers",
    "KickTask",
    "Perplexity",
    "TaskScore",
    "agreement",
    "agreement_entry",
    "evaluate_tasks",
    "fetch_tasks",
    "mean_score",
    "perplexity",
    "perplexity_entry",
    "read_tasks",
    "renewed",
    "run_kick",
    "sample_entries",
    "task_entries",
    "task_entry",
]
