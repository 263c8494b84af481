# SPDX-License-Identifier: Apache-2.0
"""The output error of the rows of a layer, exact enough to judge a change by."""

from __future__ import annotations

import torch

EXACT_COLUMNS = 1024


def row_error_change(
    weight: torch.Tensor, before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """By how much the output error of each row changes from one pruned weight to another.

    With `d = before - weight` and `d' = after - weight` that is `d' H d'^T - d H d^T = (d' - d) H (d' + d)^T`, where no two
    large numbers are subtracted; in float64.

    Args:
        weight (`torch.Tensor`): dense, `[out, in]`, any float dtype, as the next two.
        before (`torch.Tensor`): a first pruned weight.
        after (`torch.Tensor`): a second one.
        hessian (`torch.Tensor`): mean of `x x^T`, symmetric `[in, in]`.

    Returns:
        float64 `[out]` (on MPS float32), below 0 where `after` is better.
    """
    device = weight.device
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    weight, before, after = (values.to(exact, torch.float64) for values in (weight, before, after))
    difference, total = after - before, after + before - 2 * weight
    change = torch.zeros(len(weight), dtype=torch.float64, device=exact)
    for start in range(0, len(hessian), EXACT_COLUMNS):  # H is never whole in float64
        columns = slice(start, start + EXACT_COLUMNS)
        change += ((difference @ hessian[:, columns].to(exact, torch.float64)) * total[:, columns]).sum(1)
    return change if exact == device else change.float().to(device)
