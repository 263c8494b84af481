# SPDX-License-Identifier: Apache-2.0
"""Layers with learned masks, and what their masked weight and its gradients are in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_nmsparse import ops
from hf_nmsparse.ops import NoiseKey, SamplingState
from hf_nmsparse.pattern import NMPattern

CANDIDATES = ["1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "6:8", "7:8"]
WEIGHTS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "6:8", "7:8", "8:16"]
KINDS = [(pattern, False) for pattern in CANDIDATES] + [(pattern, True) for pattern in WEIGHTS]  # a logit a weight?
REGULARIZATION = 0.03


@dataclass(frozen=True)
class Case:
    """What `masked_weight` takes, and a gradient of its result."""

    weight: torch.Tensor
    logits: torch.Tensor
    grad: torch.Tensor
    pattern: NMPattern
    key: NoiseKey
    state: SamplingState

    @classmethod
    def random(
        cls,
        pattern: str,
        rows: int,
        in_features: int,
        per_weight: bool = False,
        scale: float = 100.0,
        temperature: float = 4.0,
        dtype: torch.dtype = torch.float32,
        logit_dtype: torch.dtype = torch.float32,
        step: int = 12,
        draw: int = 3,
        key: NoiseKey = NoiseKey(0xDEADBEEF, 0x12345678),  # noqa: B008
        device: str = "cpu",
    ) -> Case:
        nm = NMPattern(pattern)
        weight, grad = (torch.randn(rows, in_features).to(device, dtype) for _ in range(2))
        shape = (rows, in_features) if per_weight else (rows, nm.num_candidates, nm.num_groups(in_features))
        logits = torch.randn(shape).mul(0.02).to(device, logit_dtype)
        state = SamplingState.of(temperature, scale, REGULARIZATION, step, draw, device)
        return cls(weight, logits, grad, nm, key, state)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W * M, dW and dlogits, float64 on the CPU: plain torch from the same uniforms."""
        weight, logits = (t.detach().cpu().double().requires_grad_() for t in (self.weight, self.logits))
        state = self.state.to(torch.device("cpu"))
        result = ops.masked_weight(weight, logits, self.pattern, self.key, state)
        result.backward(self.grad.cpu().double())
        return result.detach(), weight.grad, logits.grad


def errors(found: tuple[torch.Tensor, ...], case: Case) -> list[float]:
    """Of the norm, one for each of `Case.exact`; where that is 0, as for a group that must be kept, the norm itself."""
    pairs = zip(found, case.exact(), strict=True)
    return [float((x.cpu().double() - y).norm() / (y.norm() or 1)) for x, y in pairs]
