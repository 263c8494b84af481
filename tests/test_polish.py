# SPDX-License-Identifier: Apache-2.0
"""Polish: coordinate descent on the output error of a layer."""

from __future__ import annotations

import pytest
import torch

from hf_nmsparse.criteria import BlockInputs, InputStatistics, Magnitude, Polish, Wanda, polish_mask
from hf_nmsparse.criteria.solve import hessian_power
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.pattern import NMPattern

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "2:5", "5:10", "8:16"]


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    lower = (x.float().t() @ x.float() / len(x)).tril()
    return lower + lower.tril(-1).t()


def layer(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5 + torch.eye(in_features)
    x = torch.randn(3 * in_features, in_features, generator=generator) @ mix
    return torch.randn(out_features, in_features, generator=generator), hessian_of(x)


def row_errors(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """`d H d^T` of each row, exact: in float64."""
    removed = torch.where(mask, 0, weight.double())
    return ((removed @ hessian.double()) * removed).sum(1)


def follows(mask: torch.Tensor, pattern: NMPattern) -> bool:
    chunks = mask.split(pattern.m, dim=1)
    return all(bool((chunk.sum(1) == min(pattern.n, chunk.shape[1])).all()) for chunk in chunks)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("in_features", [160, 163])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowers_the_error_and_keeps_the_pattern(pattern, in_features, dtype):
    pattern = NMPattern(pattern)
    weight, hessian = layer(24, in_features)
    weight, before = weight.to(dtype), weight.clone().to(dtype)
    statistics = InputStatistics(1, hessian.diagonal().clone(), hessian)
    start, polished = (criterion.mask(weight, statistics, pattern) for criterion in (Wanda(), Polish()))
    assert follows(polished, pattern)
    assert torch.equal(weight, before)
    old, new = row_errors(weight, start, hessian), row_errors(weight, polished, hessian)
    assert bool((new <= old).all())
    assert new.sum() < 0.95 * old.sum()


def nasty_inputs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, generator=generator)
    weight = torch.randn(16, 48, generator=generator)
    scale = 10.0 ** torch.randint(-6, 7, (48,), generator=generator)
    dead = x.clone()
    dead[:, ::3] = 0
    return {
        "wide range of inputs": (weight, hessian_of(x * scale)),
        "one massive input": (weight, hessian_of(torch.cat([x[:, :1] * 1e5, x[:, 1:] + x[:, :1]], 1))),
        "fewer tokens than inputs": (weight, hessian_of(x[:5])),
        "rank one": (weight, hessian_of(x[:1])),
        "equal columns": (weight, hessian_of(x[:, :1].expand(64, 48))),
        "dead columns": (weight, hessian_of(dead)),
        "all dead": (weight, torch.zeros(48, 48)),
        "zero weights": (torch.zeros(16, 48), hessian_of(x)),
        "equal weights": (torch.ones(16, 48), hessian_of(torch.ones(64, 48))),
        "tiny": (weight * 1e-18, hessian_of(x * 1e-3)),
        "cancelling outputs": (weight, hessian_of(torch.cat([x[:, :24], -x[:, :24] + 1e-4 * x[:, 24:]], 1))),
        "float32 overflow": (weight * 1e15, hessian_of(x * 1e15)),
    }


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "3:5"])
@pytest.mark.parametrize("case", nasty_inputs())
def test_never_raises_the_error_of_any_row(case, pattern):
    pattern = NMPattern(pattern)
    weight, hessian = nasty_inputs()[case]
    for start in (Magnitude(), Wanda()):
        mask = start.mask(weight, InputStatistics(1, hessian.diagonal().clone(), hessian), pattern)
        polished = polish_mask(weight, mask, hessian, pattern, sweeps=4)
        assert follows(polished, pattern)
        old, new = row_errors(weight, mask, hessian), row_errors(weight, polished, hessian)
        changed = (polished != mask).any(1)
        assert bool((new <= old)[changed].all())


def test_where_nothing_can_be_gained_the_mask_stays():
    weight, _ = layer(16, 32)
    pattern = NMPattern("2:4")
    start = Magnitude().mask(weight, None, pattern)
    assert torch.equal(polish_mask(weight, start, torch.zeros(32, 32), pattern), start)
    # With white inputs the largest weights are the best choice already.
    assert torch.equal(polish_mask(weight, start, torch.eye(32), pattern), start)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "3:7"])
def test_one_group_gets_the_best_of_all_candidates(pattern):
    pattern = NMPattern(pattern)
    weight, hessian = layer(40, pattern.m)
    candidates = pattern.candidates()
    errors = torch.stack([row_errors(weight, kept.expand_as(weight), hessian) for kept in candidates])
    start = candidates[-1].expand_as(weight)
    assert torch.equal(polish_mask(weight, start, hessian, pattern, sweeps=1), candidates[errors.argmin(0)])


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_when_done_no_single_exchange_improves(pattern):
    pattern = NMPattern(pattern)
    weight, hessian = layer(8, 35)
    mask = polish_mask(weight, Magnitude().mask(weight, None, pattern), hessian, pattern, sweeps=50)
    best = row_errors(weight, mask, hessian)
    for kept, pruned in [(i, j) for i in range(35) for j in range(35) if i != j and i // pattern.m == j // pattern.m]:
        exchanged = mask.clone()
        possible = mask[:, kept] & ~mask[:, pruned]
        exchanged[possible, kept], exchanged[possible, pruned] = False, True
        assert bool((row_errors(weight, exchanged, hessian) >= best * (1 - 1e-5)).all())


def test_more_sweeps_than_needed_stop_by_themselves(monkeypatch):
    import hf_nmsparse.criteria.polish as module

    calls = []
    sweep = module._sweep
    monkeypatch.setattr(module, "_sweep", lambda *args: calls.append(sweep(*args)) or calls[-1])
    weight, hessian = layer(8, 32)
    polish_mask(weight, Magnitude().mask(weight, None, NMPattern("2:4")), hessian, NMPattern("2:4"), sweeps=100)
    assert calls[-1] is False and 2 <= len(calls) < 20


def test_a_row_that_rounding_made_worse_goes_back(monkeypatch):
    import hf_nmsparse.criteria.polish as module

    weight, hessian = layer(8, 32)
    pattern = NMPattern("2:4")
    start = polish_mask(weight, Magnitude().mask(weight, None, pattern), hessian, pattern, sweeps=50)

    def spoil(weight, kept, hessian, pattern):
        kept[:4] = ~kept[:4]  # the first group of every row; here groups run along the first dimension
        return False

    monkeypatch.setattr(module, "_sweep", spoil)
    assert torch.equal(polish_mask(weight, start, hessian, pattern), start)


def test_the_block_width_does_not_change_the_result(monkeypatch):
    weight, hessian = layer(16, 96)
    pattern = NMPattern("2:4")
    start = Magnitude().mask(weight, None, pattern)
    whole = polish_mask(weight, start, hessian, pattern)
    monkeypatch.setattr("hf_nmsparse.criteria.polish.BLOCK_COLUMNS", 12)
    assert torch.equal(polish_mask(weight, start, hessian, pattern), whole)


def test_rows_with_nan_weights_keep_their_mask_and_do_not_disturb_others():
    weight, hessian = layer(8, 32)
    pattern = NMPattern("2:4")
    start = Magnitude().mask(weight, None, pattern)
    clean = polish_mask(weight, start, hessian, pattern)
    weight[3, 5] = torch.nan
    spoiled = polish_mask(weight, start, hessian, pattern)
    others = torch.arange(8) != 3
    assert torch.equal(spoiled[others], clean[others]) and follows(spoiled, pattern)


def test_the_given_mask_is_not_changed_whatever_its_layout():
    weight, hessian = layer(8, 32)
    start = Magnitude().mask(weight, None, NMPattern("2:4"))
    given = start.t().contiguous().t()
    polished = polish_mask(weight, given, hessian, NMPattern("2:4"))
    assert torch.equal(given, start) and not torch.equal(polished, start)


def test_polish_can_start_from_any_criterion():
    weight, hessian = layer(16, 32)
    pattern = NMPattern("2:4")
    statistics = InputStatistics(1, hessian.diagonal().clone(), hessian)
    start = Magnitude().mask(weight, None, pattern)
    for power in (1.0, 0.5):
        expected = polish_mask(weight, start, hessian, pattern, sweeps=1, objective=hessian_power(hessian, power))
        polish = Polish(start="magnitude", sweeps=1, power=power)
        assert torch.equal(polish.mask(weight, statistics, pattern), expected)
    with pytest.raises(ConfigError, match="sweeps=0"):
        Polish(sweeps=0)
    for power in (-1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"power={power}"):
            Polish(power=power)


@pytest.mark.parametrize("power", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["2:4", "3:7", "8:16"])
def test_another_objective_never_raises_the_error_of_a_row_either(pattern, power):
    weight, hessian = layer(24, 64)
    start = Magnitude().mask(weight, None, NMPattern(pattern))
    polished = polish_mask(weight, start, hessian, NMPattern(pattern), objective=hessian_power(hessian, power))
    assert bool((row_errors(weight, polished, hessian) <= row_errors(weight, start, hessian)).all())
    assert not torch.equal(polished, start)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_powers_of_a_hessian_multiply_to_it_and_take_no_harm_from_zeros(power):
    _, hessian = layer(1, 33)
    hessian[4], hessian[:, 4] = 0, 0  # a dead channel
    root, rest = hessian_power(hessian, power), hessian_power(hessian, 1 - power)
    assert torch.equal(root, root.t())
    torch.testing.assert_close(root @ rest, hessian, atol=1e-5, rtol=1e-5)


def test_layers_with_the_same_inputs_get_the_same_mask_in_a_block_as_alone():
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(8, 32, generator=generator) for name in ("q", "k", "o")}
    shared, own = (InputStatistics(1, h.diagonal().clone(), h) for h in (layer(1, 32, seed)[1] for seed in (1, 2)))
    statistics = {"q": shared, "k": shared, "o": own}
    inputs = BlockInputs({}, weights, statistics, NMPattern("2:4"), torch.nn.Module())
    for name, choice in Polish().choose_block(inputs):
        assert torch.equal(choice.mask, Polish().mask(weights[name], statistics[name], NMPattern("2:4")))
