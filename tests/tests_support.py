# SPDX-License-Identifier: Apache-2.0
"""Small modules for tests."""

import torch
from torch import nn


class TinyMLP(nn.Module):
    """Two linear layers, `[..., in] -> [..., 4]`."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.second = nn.Linear(hidden, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())
