# SPDX-License-Identifier: Apache-2.0
"""Measures of a model. They take any causal language model: dense, masked, PEFT or packed."""

from .agreement import Agreement, agreement
from .perplexity import Perplexity, perplexity
from .scores import TaskScore, mean_score, task_entry

__all__ = ["Agreement", "Perplexity", "TaskScore", "agreement", "mean_score", "perplexity", "task_entry"]
