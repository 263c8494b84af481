# SPDX-License-Identifier: Apache-2.0
"""N:M sparsity for the Hugging Face stack."""

from .pattern import NMPattern

__all__ = ["NMPattern"]

__version__ = "0.1.0.dev0"
