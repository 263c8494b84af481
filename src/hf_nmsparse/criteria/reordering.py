# SPDX-License-Identifier: Apache-2.0
"""Channel permutation while a model is walked: block by block, and taken back if the walk fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from ..pattern import NMPattern
from .base import InputStatistics
from .channel_order import assignment_solver, best_order
from .permutation import Absorbable, absorb, find_absorbable, matrix, permute, permute_statistics
from .ria import relative_importance


class Reordering:
    """Brings input channels into an order in which fewer important weights share a group, see `permutation`.

    How important a weight is says RIA's score, whatever criterion chooses the mask.

    Args:
        model (`nn.Module`): the model.

    Raises:
        UnsupportedError: if scipy is not installed.
    """

    def __init__(self, model: nn.Module) -> None:
        assignment_solver()
        self.config = model.config
        self.modules = dict(model.named_modules())
        self._done: list[tuple[Absorbable, torch.Tensor]] = []

    def reorder(
        self,
        block: nn.Module,
        statistics: Mapping[str, InputStatistics],
        pattern: NMPattern,
        fixed: Collection[str],
        run: Callable[[], torch.Tensor],
    ) -> tuple[dict[str, InputStatistics], dict[str, torch.Tensor]]:
        """Permute channels of one block, in place.

        Args:
            block (`nn.Module`): the block.
            statistics (`Mapping[str, InputStatistics]`): of the inputs of the layers that are to be pruned next.
            pattern (`NMPattern`): n kept of m.
            fixed (`Collection[str]`): layers that are pruned already, whose outputs stay in order.
            run (`Callable`): runs the block on a sample and returns its output.

        Returns:
            the statistics, permuted where channels are; and the orders by layer name.
        """
        statistics, orders = dict(statistics), {}
        for pair in self._pairs(block):
            name = pair.consumer
            if name not in statistics or not set(pair.producers).isdisjoint(fixed):
                continue
            module = self.modules[name]
            scores = relative_importance(matrix(module), statistics[name].squared_norm)
            order = best_order(scores, pattern, pair)
            if not torch.equal(order, order.sort().values) and absorb(pair, self.modules, order, block, run):
                self._done.append((pair, order))
                orders[name] = order
                statistics[name] = permute_statistics(statistics[name], order)
        return statistics, orders

    def restore(self, block: nn.Module, orders: Mapping[str, torch.Tensor]) -> None:
        """Permute a block as an earlier walk did."""
        for pair in self._pairs(block):
            if pair.consumer in orders:
                permute(pair, self.modules, orders[pair.consumer])
                self._done.append((pair, orders[pair.consumer]))

    def undo(self) -> None:
        """Bring all channels back, bit for bit."""
        while self._done:
            pair, order = self._done.pop()
            permute(pair, self.modules, order.argsort())

    def _pairs(self, block: nn.Module) -> list[Absorbable]:
        inside = set(block.modules())
        return find_absorbable(
            {name: module for name, module in self.modules.items() if module in inside}, self.config
        )
