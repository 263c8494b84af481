# SPDX-License-Identifier: Apache-2.0
"""Magnitude, Wanda, and the registry of criteria."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_nmsparse.criteria import (
    Criterion,
    InputStatistics,
    Magnitude,
    Wanda,
    get_criterion,
    known_criteria,
    register_criterion,
)
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.pattern import NMPattern

PATTERNS = [NMPattern("2:4"), NMPattern("1:4"), NMPattern("4:8"), NMPattern("8:16"), NMPattern("3:5")]


def statistics_of(x: torch.Tensor) -> InputStatistics:
    x = x.float()
    return InputStatistics(len(x), x.square().mean(0), x.t() @ x / len(x))


def kept_of_each_group(mask: torch.Tensor, pattern: NMPattern) -> list[set[int]]:
    return [set(chunk.sum(1).tolist()) for chunk in mask.split(pattern.m, dim=1)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("in_features", [80, 81, 83])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_is_the_published_score(pattern, in_features, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(24, in_features).to(dtype), torch.randn(200, in_features) * torch.rand(in_features)
    # Algorithm 1 of the paper: |W| * ||X||_2, then zero the lowest of each group, here one by one.
    score = weight.float().abs() * x.norm(p=2, dim=0)
    expected = torch.ones_like(weight, dtype=torch.bool)
    for row, start in itertools.product(range(24), range(0, in_features, pattern.m)):
        chunk = score[row, start : start + pattern.m]
        for j in sorted(range(len(chunk)), key=lambda j: chunk[j].item())[: max(0, len(chunk) - pattern.n)]:
            expected[row, start + j] = False
    assert torch.equal(Wanda().mask(weight, statistics_of(x), pattern), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_keeps_the_largest_of_each_group_and_of_the_tail(pattern):
    torch.manual_seed(0)
    weight = torch.randn(6, 2 * pattern.m + 1)
    mask = Magnitude().mask(weight, None, pattern)
    assert kept_of_each_group(mask, pattern) == [{pattern.n}, {pattern.n}, {1}]
    groups, kept = weight[:, :-1].unflatten(1, (-1, pattern.m)).abs(), mask[:, :-1].unflatten(1, (-1, pattern.m))
    smallest_kept = groups.masked_fill(~kept, torch.inf).amin(-1)
    assert bool((groups.masked_fill(kept, 0).amax(-1) <= smallest_kept).all())


def test_equal_scores_keep_the_lowest_index():
    pattern = NMPattern("2:4")
    first_two = torch.tensor([[True, True, False, False]]).repeat(3, 2)
    assert torch.equal(Magnitude().mask(torch.full((3, 8), -0.5), None, pattern), first_two)
    assert torch.equal(Wanda().mask(torch.full((3, 8), 0.5), statistics_of(torch.ones(4, 8)), pattern), first_two)
    dead = statistics_of(torch.zeros(4, 8))
    assert torch.equal(Wanda().mask(torch.randn(3, 8), dead, pattern), first_two)


def test_masks_stay_valid_when_a_weight_is_nan():
    weight = torch.randn(4, 8)
    weight[1, 2] = torch.nan
    assert kept_of_each_group(Magnitude().mask(weight, None, NMPattern("2:4")), NMPattern("2:4")) == [{2}, {2}]


class KeepLast(Criterion):
    """Keeps the last n of each group."""

    name = "keep_last"

    def mask(self, weight, statistics, pattern):
        return (torch.arange(weight.shape[1]) % pattern.m >= pattern.m - pattern.n).expand(weight.shape)


@pytest.fixture
def keep_last_registered(monkeypatch):
    monkeypatch.setattr("hf_nmsparse.criteria.base._REGISTRY", {"magnitude": Magnitude})
    register_criterion(KeepLast)


def test_a_criterion_of_the_user_is_found_by_name_by_class_and_as_instance(keep_last_registered):
    instance = KeepLast()
    assert get_criterion(instance) is instance
    assert isinstance(get_criterion(KeepLast), KeepLast)
    assert isinstance(get_criterion("keep_last"), KeepLast)
    assert known_criteria() == ["keep_last", "magnitude"]


def test_a_class_defined_again_replaces_itself_but_never_another(keep_last_registered):
    register_criterion(KeepLast)
    with pytest.raises(ConfigError, match=r"'keep_last' is taken by .*KeepLast"):
        register_criterion(type("Other", (KeepLast,), {}))
    with pytest.raises(ConfigError, match="needs a class attribute `name`"):
        register_criterion(type("Nameless", (Criterion,), {}))


def test_unknown_names_and_other_objects_are_refused_with_the_known_ones_listed():
    with pytest.raises(ConfigError, match=r"unknown criterion 'wandb'; known: .*magnitude.*polish.*wanda"):
        get_criterion("wandb")
    with pytest.raises(ConfigError, match="got 3"):
        get_criterion(3)
    with pytest.raises(ConfigError, match="needs = 'gradients'"):
        get_criterion(type("Greedy", (KeepLast,), {"needs": "gradients"}))
