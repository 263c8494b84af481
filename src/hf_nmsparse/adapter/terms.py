# SPDX-License-Identifier: Apache-2.0
"""Continuous terms of a mask adapter: beside the mask (SLoRB, low rank) and under it (delta).

With W the base weight, M the mask, `D = (W + B_d A_d) * M - W` what pruning does to the weight and H the mean of `x x^T`
over calibration tokens, the side branch should cancel D: with P the 0/1 matrix of blocks,

    SLoRB "mean"          S = mean of -D over each block       the best S for white inputs (AST, arXiv 2407.20584, sec. 3.3)
    SLoRB "closed_form"   S = -D H P^T (P H P^T)^-1            the S with least output error tr((D + S P) H (D + S P)^T)
    low rank              B = U_r, A = -U_r^T D                U_r: leading eigenvectors of D H D^T; least output error of
                                                               all terms of rank r (Eckart-Young in the norm of H)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import FormatError
from ..fingerprint import digest_of_all
from ..ops import NoiseKey, SideBranch, add_low_rank, pool_blocks
from .config import NMSparseConfig

TERM_CONTAINERS = (
    "nmsparse_slorb",
    "nmsparse_slorb_projection",
    "nmsparse_low_rank_a",
    "nmsparse_low_rank_b",
    "nmsparse_delta_a",
    "nmsparse_delta_b",
)
TERMS_DIGEST = "nmsparse_terms"  # in the file of a published mask: digest of a layer's terms
# Ridge on P H P^T, relative to its mean diagonal: blocks of dead inputs would make it singular.
DAMPING = 1e-4


def term_shapes(
    config: NMSparseConfig, out_features: int, in_features: int, num_experts: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of all terms by container name; those of experts have a leading dimension."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.slorb_block is not None:
        blocks = math.ceil(in_features / config.slorb_block)
        shapes["nmsparse_slorb"] = (out_features, blocks)
        if config.slorb_train_projection:
            shapes["nmsparse_slorb_projection"] = (blocks, in_features)
    if config.low_rank is not None:
        shapes["nmsparse_low_rank_a"] = (config.low_rank, in_features)
        shapes["nmsparse_low_rank_b"] = (out_features, config.low_rank)
    if config.delta_rank is not None:
        experts = () if num_experts is None else (num_experts,)
        shapes["nmsparse_delta_a"] = (*experts, config.delta_rank, in_features)
        shapes["nmsparse_delta_b"] = (*experts, out_features // (num_experts or 1), config.delta_rank)
    return shapes


def check_terms(terms: Mapping[str, torch.Tensor], stored: torch.Tensor, name: str) -> None:
    """Compare the terms of a layer, as a file holds them, with their digest beside them.

    Raises:
        FormatError: naming the layer.
    """
    if stored.dtype != torch.uint8 or not torch.equal(digest_of_all(terms), stored.cpu()):
        shapes = ", ".join(f"{container} of shape {list(value.shape)}" for container, value in terms.items())
        raise FormatError(
            f"{name}: the terms beside its mask ({shapes}) do not match their digest; the file is damaged, fetch it again"
        )


def fresh_terms(
    config: NMSparseConfig, weight: torch.Tensor, key: NoiseKey, num_experts: int | None = None
) -> dict[str, torch.Tensor]:
    """Starting values, float32 on the device of `weight`: A random, B and S zero, so that nothing is added yet.

    With `init_weights=False` every tensor is random, for tests.
    """
    terms: dict[str, torch.Tensor] = {}
    generator = key.generator()
    for name, shape in term_shapes(config, *weight.shape, num_experts).items():
        value = torch.zeros(shape, device=weight.device, dtype=torch.float32)
        if not value.is_meta:
            if name == "nmsparse_slorb_projection":
                value.copy_(block_projection(shape[1], config.slorb_block))
            elif name == "nmsparse_slorb" and config.slorb_init == "xavier":
                bound = math.sqrt(6 / sum(shape))  # Glorot and Bengio 2010
                value.copy_(torch.empty(shape).uniform_(-bound, bound, generator=generator))
            elif name.endswith("_a") or not config.init_weights:
                bound = 1 / math.sqrt(shape[-1])  # as LoRA's A
                value.copy_(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        terms[name] = value
    return terms


def side_branch(terms: Mapping[str, torch.Tensor], config: NMSparseConfig) -> SideBranch | None:
    """What the terms add to the output of the layer, if anything."""
    branch = None
    if "nmsparse_slorb_projection" in terms:
        branch = SideBranch(low_rank_a=terms["nmsparse_slorb_projection"], low_rank_b=terms["nmsparse_slorb"])
    elif "nmsparse_slorb" in terms:
        branch = SideBranch(slorb=terms["nmsparse_slorb"], slorb_block=config.slorb_block)
    if "nmsparse_low_rank_a" in terms:
        low_rank = SideBranch(low_rank_a=terms["nmsparse_low_rank_a"], low_rank_b=terms["nmsparse_low_rank_b"])
        branch = low_rank if branch is None else branch + low_rank
    return branch


def with_delta(weight: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`W + B A`, see `ops.add_low_rank`; W itself where there is no delta."""
    if "nmsparse_delta_a" not in terms:
        return weight
    return add_low_rank(weight, terms["nmsparse_delta_a"], terms["nmsparse_delta_b"])


def block_projection(in_features: int, block: int) -> torch.Tensor:
    """P: which block each input is in, float32 `[ceil(in/block), in]`."""
    return pool_blocks(torch.eye(in_features), block).t().contiguous()


# --- closed forms ---------------------------------------------------------------------------------------------------
def slorb_of_residual(residual: torch.Tensor, block: int, kind: str) -> torch.Tensor:
    """S by "mean" or "sum" of the pruned weights of each block, float32 `[out, ceil(in/block)]`.

    Args:
        residual (`torch.Tensor`): D, `[out, in]`.
    """
    sums = pool_blocks(-residual.float(), block)
    if kind == "sum":
        return sums
    return sums / pool_blocks(torch.ones(residual.shape[1], device=residual.device), block)


def fit_slorb(residual: torch.Tensor, hessian: torch.Tensor, block: int) -> torch.Tensor:
    """S with the least output error, float32 `[out, ceil(in/block)]`.

    Args:
        residual (`torch.Tensor`): D, `[out, in]`.
        hessian (`torch.Tensor`): H, `[in, in]`, symmetric.
    """
    hessian = hessian.double()
    pooled = pool_blocks(hessian, block)  # H P^T
    gram = pool_blocks(pooled.t(), block)  # P H P^T
    ridge = DAMPING * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    return -torch.linalg.solve(gram, (residual.double() @ pooled).t()).t().float()


def fit_low_rank(residual: torch.Tensor, hessian: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[r, in]` and B `[out, r]` with the least output error of all terms of their rank, float32.

    Directions that nothing is left for are zero. Each row of A and its column of B have the same norm, so that one
    learning rate fits both.

    Args:
        residual (`torch.Tensor`): D, `[out, in]`.
        hessian (`torch.Tensor`): H, `[in, in]`, symmetric.
        rank (`int`): r.
    """
    residual = residual.double()
    vectors = torch.linalg.eigh(residual @ hessian.double() @ residual.t()).eigenvectors  # ascending
    leading = vectors[:, -rank:].flip(1)
    b = torch.zeros(len(residual), rank, dtype=torch.float64, device=residual.device)
    b[:, : leading.shape[1]] = leading
    a = -(b.t() @ residual)
    norm = a.norm(dim=1).sqrt().clamp_min(1e-12)
    return (a / norm[:, None]).float(), (b * norm).float()
