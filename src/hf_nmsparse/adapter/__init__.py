# SPDX-License-Identifier: Apache-2.0
"""The PEFT method: learnable n:m masks on a frozen model."""

from .._compat import check_before_merging, register_peft_method_once
from .base_weight import BaseWeight, base_weights, linear_and_expert_weights
from .config import NMSparseConfig
from .layer import NMSparseLayer
from .linear import NMSparseConv2d, NMSparseLinear, ParamWrapper
from .model import NMSparseModel, mask_layers, refuse_to_merge_over_a_mask, set_mask_step
from .sharding import is_sharded, is_writer, refuse_sharded, whole_tensors
from .terms import TERM_CONTAINERS, TERMS_DIGEST, check_terms, side_branch, term_shapes


def register() -> None:
    """Make `NMSPARSE` a PEFT method. Safe to call again."""
    register_peft_method_once("nmsparse", NMSparseConfig, NMSparseModel)
    check_before_merging(refuse_to_merge_over_a_mask)


__all__ = [
    "TERMS_DIGEST",
    "TERM_CONTAINERS",
    "BaseWeight",
    "NMSparseConfig",
    "NMSparseConv2d",
    "NMSparseLayer",
    "NMSparseLinear",
    "NMSparseModel",
    "ParamWrapper",
    "base_weights",
    "check_terms",
    "is_sharded",
    "is_writer",
    "linear_and_expert_weights",
    "mask_layers",
    "refuse_sharded",
    "register",
    "set_mask_step",
    "side_branch",
    "term_shapes",
    "whole_tensors",
]
