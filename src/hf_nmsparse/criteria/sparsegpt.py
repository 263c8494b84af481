# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: prune column by column, and let the kept weights to the right make up for what is lost ("SparseGPT: Massive
Language Models Can Be Accurately Pruned in One-Shot", Frantar & Alistarh, arXiv 2301.00774, algorithm 1).

With `U` upper triangular and `U^T U = (H + damping)^-1`, pruning `w_j` costs `(w_j / U_jj)^2 / 2` of output error if the
columns right of j may change, and their best change is `-(w_j / U_jj) U_j,j+1:` (optimal brain surgeon on the columns that
are left). Rows are independent; all of them are walked at once, on the transposed weight: there a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import ConfigError
from ..pattern import NMPattern, Pattern, Unstructured
from .base import BlockInputs, Choice, Criterion, InputStatistics, register_criterion
from .solve import damped_cholesky

UNSTRUCTURED_STEP = 16  # columns between two updates from the left; n:m takes a group


@register_criterion
class SparseGPT(Criterion):
    """Keep the weights with the highest `|w_j| / U_jj` of a group, as updated so far, and update those that are left.

    Unstructured patterns compare all rows of a block of columns with one another. The mask alone (`mask`) comes from the
    same walk with updates, because they decide later choices. The Hessian of the paper is `2/n sum x x^T`, ours the mean;
    with damping relative to its diagonal the factor 2 changes nothing.

    Dead channels (inputs always 0) count as weight 0 while choosing. Those that are kept, where a group has too few live
    ones, keep their values, which nothing reads.

    Args:
        damping (`float`): added to the diagonal, relative to its mean over live channels.
        block_columns (`int`): columns between two updates of everything to the right, and the extent of one unstructured
            comparison. For n:m it is rounded down to whole groups, at least one.

    Raises:
        ConfigError: for damping that isn't positive or no columns.
    """

    name = "sparsegpt"
    needs = "hessian"
    unstructured = True
    updates_weights = True

    def __init__(self, damping: float = 0.01, block_columns: int = 128) -> None:
        if not damping > 0:
            raise ConfigError(f"sparsegpt: damping={damping}, expected a positive share of the mean diagonal, as 0.01")
        if block_columns < 1:
            raise ConfigError(f"sparsegpt: block_columns={block_columns}, expected 1 or more; the paper uses 128")
        self.damping = damping
        self.block_columns = block_columns

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        return self.choose(weight, statistics, pattern).mask

    def choose(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> Choice:
        return self._prune(weight, statistics, inverse_factor(statistics.hessian, self.damping), pattern)

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        latest, factor = None, None
        for name, weight in inputs.weights.items():
            statistics = inputs.statistics[name]
            if statistics is not latest:  # layers with the same input follow one another and share the factor
                latest, factor = statistics, None  # two of them are never in memory
                factor = inverse_factor(statistics.hessian, self.damping, name)
            yield name, self._prune(weight, statistics, factor, inputs.pattern)

    def _prune(
        self, weight: torch.Tensor, statistics: InputStatistics, factor: torch.Tensor, pattern: Pattern
    ) -> Choice:
        dead = statistics.hessian.diagonal() == 0
        columns = torch.where(dead, 0, weight.float()).t().contiguous()  # [in, out]; `where` made a copy
        kept = _walk(columns, factor, pattern, self.block_columns)
        return Choice(kept.t().contiguous(), torch.where(dead, weight.float(), columns.t()))


def inverse_factor(hessian: torch.Tensor, damping: float, layer: str = "a layer") -> torch.Tensor:
    """`U`, upper triangular with `U^T U = (H + damping)^-1`, without ever forming that inverse.

    With the order of the channels reversed, `H = L L^T` reads `H = R R^T` with `R` upper triangular, so `U = R^-1`: one
    factorisation and one triangular solve, where the published way factors, inverts, and factors again.

    Args:
        hessian (`torch.Tensor`): symmetric, `[in, in]`; is not changed.
        damping (`float`): see `damped_cholesky`.
        layer (`str`): how messages call the layer.

    Returns:
        float32 `[in, in]`.
    """
    lower = damped_cholesky(hessian.flip(0, 1), damping, layer)
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _walk(weight: torch.Tensor, factor: torch.Tensor, pattern: Pattern, block_columns: int) -> torch.Tensor:
    """Prune and update `weight` (float32 `[in, out]`) in place. Returns the mask, bool `[in, out]`."""
    step = UNSTRUCTURED_STEP
    if isinstance(pattern, NMPattern):
        step = pattern.m
        block_columns = max(block_columns // step, 1) * step
    pruned = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, len(weight), block_columns):
        here = slice(start, start + block_columns)
        block, upper = weight[here], factor[here, here].contiguous()
        if isinstance(pattern, Unstructured):
            before, after = (pattern.num_pruned(n * weight.shape[1]) for n in (start, start + len(block)))
            pruned[here] = _lowest(_costs(block, upper).view(-1, 1), after - before).view_as(block)
        losses = _walk_block(block, pruned[here], upper, pattern, step)
        weight[here.stop :].addmm_(factor[here, here.stop :].t(), losses, alpha=-1)
    return ~pruned


def _walk_block(
    block: torch.Tensor, pruned: torch.Tensor, upper: torch.Tensor, pattern: Pattern, step: int
) -> torch.Tensor:
    """Walk one block (`[columns, out]`) in place, n:m: choose `pruned`. Returns `w_j / U_jj` where pruned, else 0."""
    losses = torch.empty_like(block)
    for first in range(0, len(block), step):
        group = slice(first, first + step)
        weight, inner = block[group], upper[group, group]
        weight.addmm_(upper[:first, group].t(), losses[:first], alpha=-1)
        if isinstance(pattern, NMPattern):
            pruned[group] = _lowest(_costs(weight, inner), max(len(weight) - pattern.n, 0))
        inverse = pruned[group] / inner.diagonal()[:, None]
        rows = zip(weight.unbind(), inverse.unbind(), losses[group].unbind(), strict=True)
        for j, (row, inverse_row, loss) in enumerate(rows, start=1):
            torch.mul(row, inverse_row, out=loss)
            weight[j:].addr_(inner[j - 1, j:], loss, alpha=-1)
    return losses


def _costs(weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """The root of what pruning each weight costs: the same order, and no overflow of its square."""
    return weight.abs() / upper.diagonal()[:, None]


def _lowest(costs: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` lowest of each column are, bool; of equal ones those of the highest index."""
    if count == 0:
        return torch.zeros_like(costs, dtype=torch.bool)
    limit = costs.kthvalue(count, dim=0, keepdim=True).values
    below, equal = costs < limit, costs == limit
    equal_from_here_on = equal.flip(0).cumsum(0).flip(0)
    return below | (equal & (equal_from_here_on <= count - below.sum(0)))
