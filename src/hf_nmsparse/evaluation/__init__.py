# SPDX-License-Identifier: Apache-2.0
"""Measures of a model. They take any causal language model: dense, masked, PEFT or packed."""

from .perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
