# SPDX-License-Identifier: Apache-2.0
"""The command line, `nmsparse`: one file a verb. Verbs import torch and transformers when they run, not before."""

from .main import main

__all__ = ["main"]
