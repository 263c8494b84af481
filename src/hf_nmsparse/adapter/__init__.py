# SPDX-License-Identifier: Apache-2.0
"""The PEFT method: learnable n:m masks on a frozen model."""

from .._compat import register_peft_method_once
from .config import NMSparseConfig
from .layer import NMSparseLayer, NMSparseLinear
from .model import NMSparseModel, mask_layers, set_mask_step


def register() -> None:
    """Make `NMSPARSE` a PEFT method. Safe to call again."""
    register_peft_method_once("nmsparse", NMSparseConfig, NMSparseModel)


__all__ = [
    "NMSparseConfig",
    "NMSparseLayer",
    "NMSparseLinear",
    "NMSparseModel",
    "mask_layers",
    "register",
    "set_mask_step",
]
