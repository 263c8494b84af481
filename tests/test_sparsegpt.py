# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: equal to a plain implementation of the published algorithm in float64, and safe where inputs are not."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import walk_naively
from torch import nn
from transformers import AutoModelForCausalLM

from hf_nmsparse import perplexity
from hf_nmsparse.criteria import InputStatistics, Magnitude, prune
from hf_nmsparse.criteria import sparsegpt as module
from hf_nmsparse.criteria.base import BlockInputs
from hf_nmsparse.criteria.solve import damped_cholesky, mean_diagonal
from hf_nmsparse.criteria.sparsegpt import SparseGPT, inverse_factor
from hf_nmsparse.data import windows
from hf_nmsparse.errors import ConfigError, NMSparseError
from hf_nmsparse.pattern import NMPattern, Pattern, Unstructured, parse_pattern

TINY = Path(__file__).parent / "tiny_llama"
ALL = ["2:4", "1:4", "4:8", "2:5", "3:7", "8:16", "50%", "70%"]


def statistics_of(x: torch.Tensor) -> InputStatistics:
    lower = (x.float().t() @ x.float() / len(x)).tril()
    return InputStatistics(len(x), x.float().square().mean(0), lower + lower.tril(-1).t())


def layer(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """A random weight, and statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5 + torch.eye(in_features)
    x = torch.randn(3 * in_features, in_features, generator=generator) @ mix
    x *= 0.5 + torch.rand(in_features, generator=generator)
    return torch.randn(out_features, in_features, generator=generator), statistics_of(x)


def published(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of the paper as it stands there, in float64: (mask, pruned weight), both `[out, in]`."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    width = weight.shape[1]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    block = 128 // pattern.m * pattern.m if isinstance(pattern, NMPattern) else 128
    for i in range(0, width, block):
        stop = min(i + block, width)
        errors = torch.zeros(len(weight), stop - i, dtype=torch.float64)
        for j in range(i, stop):
            if isinstance(pattern, NMPattern) and (j - i) % pattern.m == 0:
                end = min(j + pattern.m, width)
                cost = weight[:, j:end] ** 2 / upper.diagonal()[j:end] ** 2
                mask[:, j:end].scatter_(1, cost.topk(min(pattern.n, end - j), dim=1).indices, True)
            if isinstance(pattern, Unstructured) and j == i:
                cost = weight[:, i:stop] ** 2 / upper.diagonal()[i:stop] ** 2
                pruned = int(stop * len(weight) * pattern.sparsity) - int(i * len(weight) * pattern.sparsity)
                mask[:, i:stop] = cost > cost.flatten().sort().values[pruned - 1]
            errors[:, j - i] = torch.where(mask[:, j], 0, weight[:, j]) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - i, None] * upper[j, j:stop]
        weight[:, stop:] -= errors @ upper[i:stop, stop:]
    return mask, torch.where(mask, weight, 0)


def output_error(weight: torch.Tensor, pruned: torch.Tensor, statistics: InputStatistics) -> float:
    difference = pruned.double() - weight.double()
    return float(((difference @ statistics.hessian.double()) * difference).sum())


def assert_follows(mask: torch.Tensor, pattern: Pattern) -> None:
    if isinstance(pattern, Unstructured):
        assert int((~mask).sum()) == int(mask.numel() * pattern.sparsity)
        return
    for chunk in mask.split(pattern.m, dim=1):
        assert bool((chunk.sum(1) == min(pattern.n, chunk.shape[1])).all())


# --- the published algorithm ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ALL)
@pytest.mark.parametrize("shape", [(256, 163), (300, 256), (200, 301)])
def test_agrees_with_the_published_algorithm(shape, pattern):
    pattern = parse_pattern(pattern)
    weight, statistics = layer(*shape)
    mask, updated = published(weight, statistics.hessian, pattern)
    choice = SparseGPT().choose(weight, statistics, pattern)
    assert_follows(choice.mask, pattern)
    assert choice.weight.dtype == torch.float32
    # Where two costs nearly tie float32 may choose the other weight, and the rest of that row follows.
    assert (choice.mask == mask).double().mean() > 0.999
    same = (choice.mask == mask).all(1)
    torch.testing.assert_close(choice.masked(weight)[same], updated[same].float(), atol=2e-4, rtol=2e-4)


def prune_as_published(model: nn.Module, pattern: NMPattern, calibration: torch.Tensor) -> None:
    """Whole forwards for each block, all activations kept."""
    for linear, x in walk_naively(model, len(model.model.layers), calibration):
        x = x.double()
        _, updated = published(linear.weight.detach(), x.t() @ x * (2 / len(x)), pattern)
        linear.weight.data = updated.to(linear.weight.dtype)


def test_a_trained_model_is_pruned_as_well_as_by_the_published_algorithm():
    tokens = {
        name: torch.from_numpy(np.load(TINY / f"{name}_tokens.npy").astype(np.int64)) for name in ("train", "test")
    }
    calibration = windows(tokens["train"], 128, samples=16, seed=0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    reference, kept = copy.deepcopy(model), copy.deepcopy(model)
    prune_as_published(reference, NMPattern("2:4"), calibration)
    prune(model, SparseGPT(), "2:4", calibration, progress=False)
    prune(kept, SparseGPT(), "2:4", calibration, weights="keep", progress=False)
    found, expected, mask_only = (
        perplexity(pruned, tokens["test"][:4096], seq_len=128).value for pruned in (model, reference, kept)
    )
    assert found == pytest.approx(expected, rel=0.01)
    assert found < mask_only


# --- what it gains --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "60%"])
def test_the_update_lowers_the_output_error_and_the_mask_alone_beats_magnitude(pattern):
    pattern = parse_pattern(pattern)
    weight, statistics = layer(64, 192)
    choice = SparseGPT().choose(weight, statistics, pattern)
    by_magnitude = Magnitude().mask(weight, None, pattern)
    updated = output_error(weight, choice.masked(weight), statistics)
    mask_only = output_error(weight, torch.where(choice.mask, weight, 0), statistics)
    magnitude = output_error(weight, torch.where(by_magnitude, weight, 0), statistics)
    assert updated < 0.8 * mask_only and mask_only < 0.95 * magnitude


def test_the_mask_is_the_one_of_the_walk_with_updates():
    weight, statistics = layer(16, 64)
    for pattern in map(parse_pattern, ["2:4", "50%"]):
        assert torch.equal(
            SparseGPT().mask(weight, statistics, pattern), SparseGPT().choose(weight, statistics, pattern).mask
        )


def test_a_wider_block_changes_nothing_for_groups():
    weight, statistics = layer(16, 70)
    first, *others = (SparseGPT(block_columns=n).choose(weight, statistics, NMPattern("3:7")) for n in (1, 30, 4096))
    for other in others:
        assert torch.equal(first.mask, other.mask)
        torch.testing.assert_close(first.masked(weight), other.masked(weight), atol=1e-5, rtol=1e-5)


# --- safe, exact, deterministic -------------------------------------------------------------------------------------
def difficult_inputs() -> dict[str, torch.Tensor]:
    x = torch.randn(96, 46, generator=torch.Generator().manual_seed(1))
    dead = x.clone()
    dead[:, ::3] = 0
    massive = x.clone()
    massive[:, 5] += 1e4
    return {
        "one token": x[:1],
        "dead channels": dead,
        "one live channel": x * (torch.arange(46) == 7),
        "all dead": torch.zeros(4, 46),
        "massive channel": massive,
        "equal channels": x[:, :1].expand(96, 46),
        "tiny": x * 1e-15,
        "huge": x * 1e15,
    }


@pytest.mark.parametrize("pattern", ["2:4", "3:7", "8:16", "35%"])
@pytest.mark.parametrize("case", difficult_inputs())
def test_difficult_inputs_give_finite_weights_and_a_mask_of_the_pattern(case, pattern):
    statistics, pattern = statistics_of(difficult_inputs()[case]), parse_pattern(pattern)
    weight, _ = layer(12, 46)
    choice = SparseGPT().choose(weight, statistics, pattern)
    assert_follows(choice.mask, pattern)
    assert bool(choice.weight.isfinite().all())
    mask_only = output_error(weight, torch.where(choice.mask, weight, 0), statistics)
    # A massive channel swells the damping until nearly nothing is updated; only then rounding is seen.
    assert output_error(weight, choice.masked(weight), statistics) <= 1.001 * mask_only


def test_dead_channels_are_pruned_first_keep_their_values_and_do_not_touch_the_rest():
    weight, _ = layer(12, 40)
    x = torch.randn(99, 40, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 1, 2, 8, 17, 39]] = True
    x[:, dead] = 0
    weight[:, dead] *= 100  # however large they are
    choice = SparseGPT().choose(weight, statistics_of(x), NMPattern("2:4"))
    assert bool(choice.mask[:, 3].all() and choice.mask[:, 0].all())  # 3 of 4 dead: the first one fills the group
    assert not choice.mask[:, dead][:, 1:].any()
    assert torch.equal(choice.weight[:, dead], weight[:, dead])
    # Unstructured with as many pruned besides: the live ones fare as if the dead ones were not there.
    pruned = torch.tensor([12 * 6 + 150, 150]) + 0.5
    whole = SparseGPT().choose(weight, statistics_of(x), Unstructured(float(pruned[0]) / weight.numel()))
    alone = SparseGPT().choose(
        weight[:, ~dead], statistics_of(x[:, ~dead]), Unstructured(float(pruned[1]) / (12 * 34))
    )
    assert torch.equal(whole.mask[:, ~dead], alone.mask) and not whole.mask[:, dead].any()
    torch.testing.assert_close(whole.weight[:, ~dead], alone.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.7, 0.999])
def test_unstructured_prunes_exactly_the_share_and_ties_are_deterministic(sparsity):
    statistics = statistics_of(torch.eye(200))
    for weight in (torch.ones(7, 200), torch.zeros(7, 200), torch.randn(7, 200).round()):
        mask = SparseGPT().mask(weight, statistics, Unstructured(sparsity))
        assert int((~mask).sum()) == int(1400 * sparsity + 1e-6)


def test_equal_costs_are_kept_lowest_index_first():
    weight, statistics = torch.ones(3, 10), statistics_of(torch.eye(10))
    mask = SparseGPT().mask(weight, statistics, NMPattern("2:4"))
    assert torch.equal(mask[0], torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 1, 1]).bool())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    weight, statistics = layer(16, 64)
    weight = weight.to(dtype)
    choice = SparseGPT().choose(weight, statistics, NMPattern("2:4"))
    exact = SparseGPT().choose(weight.float(), statistics, NMPattern("2:4"))
    assert torch.equal(choice.mask, exact.mask) and torch.equal(choice.weight, exact.weight)
    assert choice.masked(weight).dtype == dtype


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_changes_neither_weight_nor_statistics_and_repeats_itself(pattern):
    weight, statistics = layer(16, 50)
    statistics.hessian[:, 3] = statistics.hessian[3] = 0
    given = weight.clone(), statistics.hessian.clone()
    choices = [SparseGPT().choose(weight, statistics, parse_pattern(pattern)) for _ in range(2)]
    assert torch.equal(weight, given[0]) and torch.equal(statistics.hessian, given[1])
    assert torch.equal(choices[0].mask, choices[1].mask) and torch.equal(choices[0].weight, choices[1].weight)


def test_layers_with_the_same_input_share_one_factor(monkeypatch):
    calls = []
    factor = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *args: calls.append(args[-1]) or factor(*args))
    weight, first = layer(16, 64)
    _, second = layer(16, 64, seed=1)
    weights = {"q": weight, "k": weight[:8], "o": weight}
    statistics = {"q": first, "k": first, "o": second}
    inputs = BlockInputs({}, weights, statistics, NMPattern("2:4"), nn.Identity())
    found = dict(SparseGPT().choose_block(inputs))
    assert calls == ["q", "o"]
    for name, choice in found.items():
        alone = SparseGPT().choose(weights[name], statistics[name], NMPattern("2:4"))
        assert torch.equal(choice.mask, alone.mask) and torch.equal(choice.weight, alone.weight)


# --- the factor -----------------------------------------------------------------------------------------------------
def test_the_factor_is_that_of_the_inverse():
    _, statistics = layer(1, 90)
    factor = inverse_factor(statistics.hessian, 0.01)
    damped = statistics.hessian.double() + 0.01 * statistics.hessian.diagonal().mean() * torch.eye(90)
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, atol=1e-5, rtol=1e-4)


def test_more_damping_where_factoring_fails_and_one_line_about_it(caplog):
    hessian = torch.ones(48, 48)
    with caplog.at_level(logging.WARNING):
        lower = damped_cholesky(hessian, 1e-8, "model.layers.0.q_proj")
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(
        "model.layers.0.q_proj: its Hessian is ill-conditioned; damping was raised from"
    )
    used = float(caplog.messages[0].rsplit(" ", 1)[1])
    assert 1e-8 < used <= 1e-4
    torch.testing.assert_close(lower @ lower.t(), hessian + used * torch.eye(48))
    assert torch.equal(hessian, torch.ones(48, 48))


@pytest.mark.parametrize("hessian", [torch.full((4, 4), torch.nan), torch.eye(4) - 5], ids=["NaN", "indefinite"])
def test_a_hessian_that_no_damping_helps_is_an_error_that_names_the_layer(hessian):
    with pytest.raises(NMSparseError, match=r"^the\.layer: its Hessian \[4, 4\] can't be factored.*more tokens"):
        damped_cholesky(hessian, 0.01, "the.layer")


def test_damping_is_relative_to_live_channels():
    assert float(mean_diagonal(torch.diag(torch.tensor([2.0, 0.0, 4.0])))) == 3
    assert float(mean_diagonal(torch.zeros(3, 3))) == 0
    lower = damped_cholesky(torch.diag(torch.tensor([2.0, 0.0, 4.0])), 0.5)
    torch.testing.assert_close(lower.square().sum(1), torch.tensor([3.5, 4.5, 5.5]))


@pytest.mark.parametrize("options", [{"damping": 0}, {"damping": float("nan")}, {"block_columns": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=f"^sparsegpt: {next(iter(options))}="):
        SparseGPT(**options)
