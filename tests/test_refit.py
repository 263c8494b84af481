# SPDX-License-Identifier: Apache-2.0
"""Refit: the closed-form best values of kept weights, and never a worse row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.criteria import InputStatistics, Magnitude, keep_highest
from hf_nmsparse.criteria import refit as module
from hf_nmsparse.criteria.error import row_error_change
from hf_nmsparse.criteria.refit import refit_weights
from hf_nmsparse.criteria.sparsegpt import SparseGPT
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.pattern import NMPattern, parse_pattern


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    lower = (x.float().t() @ x.float() / len(x)).tril()
    return lower + lower.tril(-1).t()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return random(tokens, width, seed=seed) @ (random(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))


def errors(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    difference = pruned.double() - weight.double()
    return ((difference @ hessian.double()) * difference).sum(1)


def exact(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Row by row, in float64: `v_S = w_S + (H_SS + lambda)^-1 (w_P H)_S`."""
    weight, hessian = weight.double(), hessian.double()
    diagonal = hessian.diagonal()
    pull = damping * diagonal[diagonal != 0].mean()
    refitted = torch.zeros_like(weight)
    for row, kept, new in zip(weight, mask, refitted, strict=True):
        inner = hessian[kept][:, kept] + pull * torch.eye(int(kept.sum()))
        new[kept] = row[kept] + torch.linalg.solve(inner, (torch.where(kept, 0, row) @ hessian)[kept])
    return refitted


def ill_conditioned(width: int) -> dict[str, torch.Tensor]:
    """Inputs `[tokens, width]`."""
    basis = torch.linalg.qr(random(width, width, seed=3))[0]
    massive = correlated(3 * width, width)
    massive[::64, ::29] += 1000  # as the first token of a text in a few channels
    return {
        "correlated": correlated(3 * width, width),
        "condition number 1e6": random(3 * width, width) * 10 ** (-3 * torch.arange(width) / width) @ basis,
        "massive tokens": massive,
        "channels of all sizes": correlated(3 * width, width) * 10 ** random(width, seed=4),
        "fewer tokens than channels": correlated(width // 4, width),
    }


@pytest.mark.parametrize("pattern", ["2:4", "3:7", "70%"])
@pytest.mark.parametrize("case", ill_conditioned(2))
def test_reaches_the_exact_minimum(case, pattern):
    hessian, weight = hessian_of(ill_conditioned(190)[case]), random(12, 190, seed=5)
    mask = keep_highest(weight.abs() * hessian.diagonal().sqrt(), parse_pattern(pattern))
    best = exact(weight, mask, hessian, 0.01)
    refitted = refit_weights(weight, mask, hessian)
    assert refitted.dtype == torch.float32 and not refitted[~mask].any()
    # Of what can be gained at most one part in a thousand is left.
    masked = errors(weight, torch.where(mask, weight, 0), hessian)
    gained, gain = masked - errors(weight, refitted, hessian), masked - errors(weight, best, hessian)
    assert bool((gained > 0.999 * gain).all()) and bool((gain > 0).all())


def test_with_time_it_gives_the_exact_weights():
    hessian, weight = hessian_of(correlated(300, 90)), random(12, 90, seed=5)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    for damping in (0.003, 0.1):
        refitted = refit_weights(weight, mask, hessian, damping, iterations=300, tolerance=1e-6)
        torch.testing.assert_close(refitted, exact(weight, mask, hessian, damping).float(), atol=1e-4, rtol=1e-4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.sampled_from(["2:4", "1:4", "3:7", "8:16", "50%", "90%"]),
    st.sampled_from([1, 3, 100]),
    st.sampled_from([0, 1e-6, 0.01, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 10),
    st.integers(0, 2**20),
)
def test_never_raises_the_error_of_any_row(width, pattern, tokens, damping, dtype, dead, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) * 10 ** (spread * torch.rand(width, generator=generator) - 5)
    x = x * (torch.rand(width, generator=generator) >= dead) + x[:, :1]
    weight = torch.randn(5, width, generator=generator).to(dtype)
    mask = Magnitude().mask(weight, None, parse_pattern(pattern))
    hessian = hessian_of(x)
    refitted = refit_weights(weight, mask, hessian, damping)
    assert bool(refitted.isfinite().all()) and not refitted[~mask].any()
    assert torch.equal(refitted, refitted.to(dtype).float())
    masked = torch.where(mask, weight, 0)
    changed = (refitted != masked.float()).any(1)
    assert bool((errors(weight, refitted, hessian) <= errors(weight, masked, hessian))[changed].all())


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_tiny_and_huge_values_are_refitted_as_well(scale):
    x, weight = correlated(300, 48), random(8, 48, seed=5)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    expected = refit_weights(weight, mask, hessian_of(x))
    for refitted in (
        refit_weights(weight * scale, mask, hessian_of(x)) / scale,
        refit_weights(weight, mask, hessian_of(x) * scale),
    ):
        torch.testing.assert_close(refitted, expected, atol=1e-4, rtol=1e-4)


def test_dead_channels_change_nothing():
    x, weight = correlated(300, 48), random(8, 48, seed=5)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    alone = refit_weights(weight, mask, hessian_of(x))
    channels = torch.arange(60) % 5 != 2  # 48 of 60 are live
    wide, wide_mask, wide_x = torch.full((8, 60), 100.0), torch.ones(8, 60, dtype=torch.bool), torch.zeros(300, 60)
    wide[:, channels], wide_mask[:, channels], wide_x[:, channels] = weight, mask, x
    wide_mask[:, 2] = False
    refitted = refit_weights(wide, wide_mask, hessian_of(wide_x))
    torch.testing.assert_close(refitted[:, channels], alone, atol=1e-4, rtol=1e-4)
    assert bool((refitted[:, 7::5] == 100).all()) and not refitted[:, 2].any()
    assert torch.equal(refit_weights(weight, mask, torch.zeros(48, 48)), torch.where(mask, weight, 0))


def test_a_full_mask_gives_the_dense_weight_and_an_empty_one_zeros():
    hessian, weight = hessian_of(correlated(99, 48)), random(8, 48)
    mask = torch.ones(8, 48, dtype=torch.bool)
    assert torch.equal(refit_weights(weight, mask, hessian), weight)
    assert torch.equal(refit_weights(weight, ~mask, hessian), torch.zeros(8, 48))


def test_the_pull_is_to_the_dense_weight():
    hessian, weight = hessian_of(correlated(99, 48)), random(8, 48)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    masked = torch.where(mask, weight, 0)
    moved = [float((refit_weights(weight, mask, hessian, d) - masked).norm()) for d in (0.01, 1.0, 100.0, 1e4)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-3 * moved[0]


def test_bfloat16_weights_are_rounded_before_they_are_judged():
    hessian, weight = hessian_of(correlated(300, 96)), random(16, 96).bfloat16()
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    refitted = refit_weights(weight, mask, hessian)
    assert refitted.dtype == torch.float32 and torch.equal(refitted, refitted.bfloat16().float())
    masked = torch.where(mask, weight, 0)
    assert errors(weight, refitted, hessian).sum() < 0.8 * errors(weight, masked, hessian).sum()


def test_rows_that_do_not_gain_stay_masked(monkeypatch):
    hessian, weight = hessian_of(correlated(99, 48)), random(8, 48)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    good = refit_weights(weight, mask, hessian)
    solve = module._conjugate_gradients

    def spoilt(*args):
        change = solve(*args)
        change[2] *= -5
        change[5] = torch.nan
        return change

    monkeypatch.setattr(module, "_conjugate_gradients", spoilt)
    refitted = refit_weights(weight, mask, hessian)
    untouched = torch.tensor([0, 1, 3, 4, 6, 7])
    assert torch.equal(refitted[untouched], good[untouched])
    assert torch.equal(refitted[[2, 5]], torch.where(mask, weight, 0)[[2, 5]])


def test_lots_of_rows_give_the_same_as_all_at_once(monkeypatch):
    hessian, weight = hessian_of(correlated(99, 48)), random(11, 48)
    mask = Magnitude().mask(weight, None, NMPattern("2:4"))
    before = weight.clone(), hessian.clone()
    whole = refit_weights(weight, mask, hessian, tolerance=1e-6)
    monkeypatch.setattr(module, "ROWS", 4)
    torch.testing.assert_close(refit_weights(weight, mask, hessian, tolerance=1e-6), whole)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_it_is_better_than_the_update_of_sparsegpt_on_the_same_mask():
    hessian, weight = hessian_of(correlated(600, 192)), random(32, 192)
    statistics = InputStatistics(600, hessian.diagonal(), hessian)
    choice = SparseGPT().choose(weight, statistics, NMPattern("2:4"))
    refitted = refit_weights(weight, choice.mask, hessian)
    updated = errors(weight, choice.masked(weight), hessian)
    assert errors(weight, refitted, hessian).sum() < 0.95 * updated.sum()


def test_negative_damping_is_refused():
    with pytest.raises(ConfigError, match=r"^refit: damping=-0\.1, expected 0 or more"):
        refit_weights(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.eye(4), damping=-0.1)


def test_the_error_change_of_a_row_is_that_of_its_outputs(monkeypatch):
    monkeypatch.setattr("hf_nmsparse.criteria.error.EXACT_COLUMNS", 20)
    x = correlated(300, 48).double()
    weight, before, after = (random(7, 48, seed=seed) for seed in range(3))
    old, new = ((x @ (pruned.double() - weight.double()).t()).square().mean(0) for pruned in (before, after))
    torch.testing.assert_close(row_error_change(weight, before, after, x.t() @ x / len(x)), new - old)
