# SPDX-License-Identifier: Apache-2.0
"""RIA: relative importance and activations."""

from __future__ import annotations

import math

import pytest
import torch

from hf_nmsparse.criteria.base import InputStatistics, get_criterion
from hf_nmsparse.criteria.ria import RIA, relative_importance
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.pattern import NMPattern, Unstructured


def layer(out_features: int = 12, in_features: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs whose channels differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight = weight * torch.rand(in_features, generator=generator) * torch.rand(out_features, 1, generator=generator)
    return weight, torch.randn(50, in_features, generator=generator) * 10 * torch.rand(
        in_features, generator=generator
    )


def statistics_of(x: torch.Tensor) -> InputStatistics:
    return InputStatistics(len(x), x.float().square().mean(0))


def scores_by_the_formula(weight: torch.Tensor, x: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """Entry by entry, in float64, with the norm over all tokens as in the paper."""
    size = weight.double().abs().tolist()
    norms = x.double().norm(dim=0).tolist()
    columns, rows = [sum(column) for column in zip(*size, strict=True)], [sum(row) for row in size]
    share = [
        [(w / columns[j] if w else 0.0) + (w / rows[i] if w else 0.0) for j, w in enumerate(row)]
        for i, row in enumerate(size)
    ]
    return torch.tensor([[s * norms[j] ** power for j, s in enumerate(row)] for row in share], dtype=torch.float64)


def mask_by_the_formula(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, len(row), m):
            group = range(start, min(start + m, len(row)))
            for j in sorted(group, key=lambda j: -row[j])[:n]:
                kept[i, j] = True
    return kept


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_follow_the_formula_up_to_one_factor(power, dtype):
    weight, x = layer()
    weight = weight.to(dtype)
    scores = relative_importance(weight, statistics_of(x).squared_norm, power)
    assert scores.dtype == torch.float32
    # The norm is a mean over tokens here and a sum there.
    expected = scores_by_the_formula(weight, x, power) / len(x) ** (power / 2)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16"])
@pytest.mark.parametrize("in_features", [32, 31, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_highest_of_each_group_and_leaves_the_weight(pattern, in_features, dtype):
    weight, x = layer(in_features=in_features)
    weight = weight.to(dtype)
    before, pattern = weight.clone(), NMPattern(pattern)
    mask = RIA().mask(weight, statistics_of(x), pattern)
    assert torch.equal(mask, mask_by_the_formula(scores_by_the_formula(weight, x), pattern.n, pattern.m))
    assert torch.equal(weight, before)


def test_rows_and_columns_of_zeros_score_zero_and_dead_channels_are_pruned_first():
    weight, x = layer()
    weight[:, 5] = 0
    weight[3] = 0
    x[:, 9] = 0
    scores = relative_importance(weight, statistics_of(x).squared_norm)
    assert bool(scores.isfinite().all())
    assert not scores[:, [5, 9]].any() and not scores[3].any()
    mask = RIA().mask(weight, statistics_of(x), NMPattern("2:4"))
    assert not mask[weight.any(dim=1)][:, [5, 9]].any()
    assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_unstructured_compares_all_weights_of_the_layer():
    weight, x = layer()
    mask = RIA().mask(weight, statistics_of(x), Unstructured(0.6))
    scores = scores_by_the_formula(weight, x)
    assert int((~mask).sum()) == int(0.6 * weight.numel() + 1e-6)
    assert scores[mask].min() > scores[~mask].max()
    assert len(mask.sum(1).unique()) > 1  # rows may differ


def test_a_channel_of_small_weights_keeps_some_where_magnitude_keeps_none():
    weight = torch.randn(16, 16).exp()
    weight[:, 0] *= 1e-3
    statistics = InputStatistics(1, torch.ones(16))
    assert not get_criterion("magnitude").mask(weight, None, NMPattern("2:4"))[:, 0].any()
    assert RIA().mask(weight, statistics, NMPattern("2:4"))[:, 0].any()


@pytest.mark.parametrize("power", [-0.5, math.nan, math.inf])
def test_refuses_a_power_that_makes_no_sense(power):
    with pytest.raises(ConfigError, match="power"):
        RIA(power=power)


def test_is_registered():
    assert isinstance(get_criterion("ria"), RIA)
    assert get_criterion("ria").unstructured and get_criterion("ria").needs == "norms"
