# SPDX-License-Identifier: Apache-2.0
"""The side branch of a packed layer: the names of its tensors, its checks, and its sum with the sparse weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import PatternError, UnsupportedError
from ..ops import SideBranch

BRANCH_LEAVES = ("weight_slorb", "weight_low_rank_a", "weight_low_rank_b")


def branch_tensors(branch: SideBranch | None) -> dict[str, torch.Tensor]:
    """The tensors of a branch under the names that they have in a packed layer."""
    if branch is None:
        return {}
    tensors = dict(zip(BRANCH_LEAVES, (branch.slorb, branch.low_rank_a, branch.low_rank_b), strict=True))
    return {leaf: tensor for leaf, tensor in tensors.items() if tensor is not None}


def slorb_block_of(branch: SideBranch | None) -> int | None:
    """Inputs per block of the branch's SLoRB term, `None` without one."""
    return branch.slorb_block if branch is not None and branch.slorb is not None else None


def rank_of(branch: SideBranch | None) -> int | None:
    """Rank of the branch's low-rank term, `None` without one."""
    return len(branch.low_rank_a) if branch is not None and branch.low_rank_a is not None else None


def num_blocks(in_features: int, slorb_block: int) -> int:
    """Columns of SLoRB's tensor, ceil(in / k)."""
    return -(-in_features // slorb_block)


def check_branch(name: str, branch: SideBranch, out_features: int, in_features: int) -> None:
    """Refuse a branch whose tensors do not fit a layer.

    Raises:
        PatternError: naming the layer and the tensor.
    """
    tensors = branch_tensors(branch)
    if not tensors or ("weight_low_rank_a" in tensors) != ("weight_low_rank_b" in tensors):
        raise PatternError(
            f"{name}: a side branch needs slorb, or both low_rank_a and low_rank_b; got {list(tensors)}"
        )
    block, rank = slorb_block_of(branch), rank_of(branch)
    if branch.slorb is not None and (block is None or block < 1):
        raise PatternError(f"{name}: its side branch has slorb_block={block!r}; give the inputs per block")
    expected = {"weight_low_rank_a": (rank, in_features), "weight_low_rank_b": (out_features, rank)}
    if block is not None:
        expected["weight_slorb"] = (out_features, num_blocks(in_features, block))
    for leaf, tensor in tensors.items():
        if tensor.shape != expected[leaf]:
            raise PatternError(
                f"{name}: {leaf.removeprefix('weight_')} of its side branch has shape {list(tensor.shape)}, expected "
                f"{list(expected[leaf])}"
            )


def common_slorb_block(blocks: Iterable[int | None]) -> int | None:
    """The one block size of all SLoRB terms of a model: the config stores one for all.

    Raises:
        UnsupportedError: if they differ.
    """
    found = sorted(set(blocks) - {None})
    if len(found) > 1:
        raise UnsupportedError(
            f"SLoRB terms with blocks of {', '.join(map(str, found))} inputs in one model; a packed model stores one block "
            "size. Use one slorb_block for all layers, or merge the adapter (merge_and_unload), which gives dense weights"
        )
    return found[0] if found else None
