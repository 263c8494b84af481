# SPDX-License-Identifier: Apache-2.0
"""What n:m weights could save in a training step: multiply-accumulates and bytes of weights, layer by layer.

    forward     y = x W^T          T out in multiply-accumulates for T tokens; n/m of them with n:m along the inputs
    backward    dx = dy W          as many; n/m of them with n:m along the outputs
    update      dW = dy^T x        as many, dense in every method

so n:m in both products leaves (2 n/m + 1) / 3 of the operations: 1/2 for 2:8 (BDWP, arXiv 2309.13015, section 3), 2/3 for
2:4. n:m in the forward product alone (AST, PDP, learned masks) leaves (n/m + 2) / 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..pattern import NMPattern
from .planned import Plan

# Products whose weight is n:m, by the kind of training.
TRAININGS = {"dense": (False, False), "forward n:m": (True, False), "both n:m": (True, True)}


@dataclass(frozen=True)
class StepCost:
    """The products with one weight, or with all, in one training step.

    Args:
        name (`str`): of the layer.
        forward (`float`), backward (`float`), update (`float`): multiply-accumulates of the three products.
        weight_bytes (`float`): of the weight as it is read forward and backward, and of its gradient as it is written.
    """

    name: str
    forward: float
    backward: float
    update: float
    weight_bytes: float

    @property
    def total(self) -> float:
        """Multiply-accumulates of all three products."""
        return self.forward + self.backward + self.update


def training_cost(planned: Plan, tokens: int, itemsize: int = 2) -> dict[str, list[StepCost]]:
    """Multiply-accumulates and bytes of the products with the pruned weights of a plan, in one training step.

    Ideal ones: an n:m product does n/m of the operations, and reads n/m of the values and log2(m) bits for each kept one's
    place. What the kernels of this package realise of it is in docs/METHODS.md, "What training costs".

    Args:
        planned (`Plan`): of `nms.plan`.
        tokens (`int`): in a step.
        itemsize (`int`): bytes of a weight's value, and of its gradient's.

    Returns:
        for each of `TRAININGS` one `StepCost` a layer, in the order of the plan.

    Raises:
        ConfigError: if `tokens` is below 1.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens={tokens!r}; expected a whole number of at least 1")
    pattern = NMPattern(planned.pattern)
    share = pattern.density
    packed = share * (itemsize + math.log2(pattern.m) / 8) / itemsize  # bytes over dense ones
    found: dict[str, list[StepCost]] = {}
    for name, (forward, backward) in TRAININGS.items():
        found[name] = []
        for layer in planned.layers:
            weights = layer.out_features * layer.in_features
            macs = tokens * weights
            reads = (packed if forward else 1) + (packed if backward else 1)
            cost = macs * (share if forward else 1), macs * (share if backward else 1), macs
            found[name].append(StepCost(layer.name, *cost, weights * itemsize * (reads + 1)))
    return found


def total_cost(costs: list[StepCost]) -> StepCost:
    """The sum over layers."""
    sums = (sum(getattr(cost, part) for cost in costs) for part in ("forward", "backward", "update", "weight_bytes"))
    return StepCost("all", *sums)
