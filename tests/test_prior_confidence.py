# SPDX-License-Identifier: Apache-2.0
"""Priors scaled by how sure their criterion was of each group."""

import itertools

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import get_peft_model

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.criteria import (
    InputStatistics,
    Magnitude,
    Polish,
    SparseGPT,
    Wanda,
    confident_criteria,
    score_confidence,
)
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.relaxations import strength_factors


def statistics(in_features: int, tokens: int = 64) -> InputStatistics:
    x = torch.randn(tokens, in_features) * torch.linspace(0.2, 2, in_features)
    return InputStatistics(tokens, x.square().mean(0), x.T @ x / tokens)


# --- what criteria say ----------------------------------------------------------------------------------------------
def test_scores_give_the_gap_between_the_lowest_kept_and_the_highest_pruned():
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0, 7.0, 2.0]])
    pattern = NMPattern("2:4")
    found = score_confidence(scores, ops.top_n_mask(scores, pattern), pattern)
    assert found.tolist() == [[1.0, 0.0, 0.0, torch.inf]]  # 2 (3 - 1) / (3 + 1); ties; zeros; a tail that keeps all
    tail = score_confidence(scores[:, :3], torch.tensor([[True, True, False]]), pattern)
    assert tail.tolist() == [[1.0]]  # what is beyond the end was not pruned


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda()])
def test_score_criteria_are_surest_where_the_next_best_candidate_is_worst(criterion):
    weight, given, pattern = torch.randn(6, 16), statistics(16), NMPattern("2:4")
    mask = criterion.mask(weight, given, pattern)
    scores = weight.abs() * (given.squared_norm.sqrt() if criterion.name == "wanda" else 1)
    found = criterion.confidence(weight, mask, given, pattern)
    sums = scores.unflatten(1, (-1, 4)) @ pattern.candidates(dtype=torch.float32).T  # of each candidate
    best, second = sums.topk(2, dim=-1).values.unbind(-1)
    kept = scores.masked_fill(~mask, torch.inf).unflatten(1, (-1, 4)).amin(-1)
    pruned = scores.masked_fill(mask, 0).unflatten(1, (-1, 4)).amax(-1)
    torch.testing.assert_close(found, (best - second) / ((kept + pruned) / 2))


@pytest.mark.parametrize(("pattern", "in_features"), [("2:4", 18), ("1:4", 16), ("4:8", 24)])
def test_polish_gives_the_rise_of_its_objective_with_the_next_best_candidate(pattern, in_features):
    pattern, weight, given = NMPattern(pattern), torch.randn(3, in_features), statistics(in_features)
    criterion = Polish(power=1)
    mask = criterion.mask(weight, given, pattern)
    found = criterion.confidence(weight, mask, given, pattern)
    hessian, dense = given.hessian.double(), weight.double()

    def error(kept: torch.Tensor) -> torch.Tensor:
        removed = torch.where(kept, 0, dense)
        return ((removed @ hessian) * removed).sum(1)

    for group in range(pattern.num_groups(in_features)):
        here = slice(group * pattern.m, min((group + 1) * pattern.m, in_features))
        width = here.stop - here.start
        rises = []
        for positions in itertools.combinations(range(width), min(pattern.n, width)):
            other = mask.clone()
            other[:, here] = False
            other[:, [here.start + position for position in positions]] = True
            same = (other == mask).all(1)
            rises.append((error(other) - error(mask)).masked_fill(same, torch.inf))
        scale = (hessian.diagonal() * dense.square())[:, here].sum(1)
        expected = torch.stack(rises).amin(0).clamp_min(0) / scale
        torch.testing.assert_close(found[:, group].double(), expected, atol=1e-4, rtol=1e-3)


def test_polish_of_many_candidates_gives_the_best_exchange():
    pattern, weight, given = NMPattern("8:16"), torch.randn(2, 16), statistics(16)
    criterion = Polish(power=1)
    mask = criterion.mask(weight, given, pattern)
    found = criterion.confidence(weight, mask, given, pattern)

    def error(kept: torch.Tensor) -> torch.Tensor:
        removed = torch.where(kept, 0, weight).double()
        return ((removed @ given.hessian.double()) * removed).sum(1)

    for row in range(2):
        kept, pruned = mask[row].nonzero().flatten(), (~mask[row]).nonzero().flatten()
        rises = []
        for out, back in itertools.product(kept, pruned):
            other = mask.clone()
            other[row, out], other[row, back] = False, True
            rises.append((error(other) - error(mask))[row])
        scale = (given.hessian.diagonal() * weight[row].square()).sum()
        assert float(found[row, 0]) == pytest.approx(max(0.0, float(min(rises) / scale)), abs=1e-5)


def test_weights_of_zero_are_no_reason_for_confidence():
    pattern, given = NMPattern("2:4"), statistics(8)
    weight = torch.zeros(2, 8)
    for criterion in (Magnitude(), Wanda(), Polish()):
        mask = criterion.mask(weight, given, pattern)
        assert torch.equal(criterion.confidence(weight, mask, given, pattern), torch.zeros(2, 2)), criterion.name


def test_criteria_that_do_not_know_say_so():
    assert confident_criteria() == ["magnitude", "polish", "wanda"]
    weight, pattern = torch.randn(2, 8), NMPattern("2:4")
    with pytest.raises(UnsupportedError, match=r"'sparsegpt' does not tell.*magnitude, polish, wanda"):
        SparseGPT().confidence(weight, weight > 0, None, pattern)


# --- factors --------------------------------------------------------------------------------------------------------
def test_factors_follow_the_ranks_and_have_mean_1():
    confidence = torch.rand(7, 9) ** 8 * 1000
    factors = strength_factors(confidence)
    assert factors.mean() == pytest.approx(1, abs=1e-6)
    assert torch.equal(confidence.flatten().argsort(), factors.flatten().argsort())
    steps = factors.flatten().sort().values.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 1.5 / 63), atol=1e-6, rtol=0)
    assert 0.25 < factors.min() < 0.27 and 1.73 < factors.max() < 1.75


def test_equal_confidences_have_equal_factors():
    assert strength_factors(torch.zeros(4, 5)).tolist() == [[1.0] * 5] * 4
    assert strength_factors(torch.tensor([[0.0, 0.0, 0.0, 3.0]])).tolist() == [[0.8125, 0.8125, 0.8125, 1.5625]]


def test_groups_without_a_choice_take_no_part():
    factors = strength_factors(torch.tensor([[1.0, 2.0, torch.inf], [3.0, 4.0, torch.inf]]))
    assert factors[:, 2].tolist() == [1.0, 1.0]
    assert torch.equal(factors[:, :2], strength_factors(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    assert strength_factors(torch.full((2, 1), torch.inf)).tolist() == [[1.0], [1.0]]


# --- in a model -----------------------------------------------------------------------------------------------------
def strengths(layer) -> torch.Tensor:
    """How far the prior's logits spread in each group, in units of a plain prior of strength 3."""
    logits = layer.nmsparse_logits["default"].weight.detach().float()
    if logits.dim() == 3:
        return (logits.amax(1) - logits.amin(1)) / 0.06
    m = layer.relaxations["default"].pattern.m
    groups = logits.unflatten(1, (-1, m))
    return (groups.amax(-1) - groups.amin(-1)) / 0.03


@pytest.mark.parametrize("relaxation", ["candidates", "elementwise"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
def test_the_mask_is_that_of_the_plain_prior_and_sure_groups_start_firmer(make_llama, tokens, relaxation, criterion):
    plain = get_peft_model(make_llama(), NMSparseConfig(relaxation=relaxation))
    scaled = get_peft_model(make_llama(), NMSparseConfig(relaxation=relaxation, prior_confidence=True))
    for model in (plain, scaled):
        nms.set_prior(model, criterion, calibration=tokens, progress=False)
    for name, layer in mask_layers(scaled).items():
        assert torch.equal(layer.mask_codes("default"), mask_layers(plain)[name].mask_codes("default"))
        found = strengths(layer)
        assert found.mean() == pytest.approx(1, abs=1e-3)
        assert found.min() < 0.3 and found.max() > 1.7
        if criterion == "magnitude":
            mask, weight = layer.hard_mask("default"), layer.base_weight.read().abs()
            sure = score_confidence(weight, mask, NMPattern("2:4"))
            torch.testing.assert_close(found, strength_factors(sure), atol=2e-3, rtol=0)
    model = scaled.eval()
    assert torch.equal(model(tokens).logits, plain.eval()(tokens).logits)


def test_the_prior_that_is_computed_on_the_spot_is_the_same(make_llama):
    config = {"prior_confidence": True, "logits_dtype": "bfloat16"}
    first = get_peft_model(make_llama(), NMSparseConfig(**config))
    again = get_peft_model(make_llama(), NMSparseConfig(prior=None, **config))
    nms.set_prior(again, "magnitude")
    for name, layer in mask_layers(first).items():
        torch.testing.assert_close(strengths(layer), strengths(mask_layers(again)[name]), atol=0.02, rtol=0.02)


def test_experts_are_ranked_each_by_itself():
    inputs = inputs_for("mixtral")["input_ids"]
    for prior in ("magnitude", "wanda"):
        model = get_peft_model(FAMILIES["mixtral"](), NMSparseConfig(prior_confidence=True))
        nms.set_prior(model, prior, calibration=inputs, progress=False)
        experts = [layer for name, layer in mask_layers(model).items() if "experts" in name]
        assert experts
        for layer in experts:
            for expert in strengths(layer).chunk(4):
                assert expert.mean() == pytest.approx(1, abs=1e-3)


def test_priors_that_do_not_know_are_refused_before_anything_is_computed(make_llama):
    model = get_peft_model(make_llama(), NMSparseConfig(prior_confidence=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    for prior in ("sparsegpt", "ria", masks):
        with pytest.raises(ConfigError, match=r"prior_confidence.*magnitude, polish, wanda"):
            nms.set_prior(model, prior)  # without calibration, which a walk would ask for
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="prior_confidence=1 must be True or False"):
        NMSparseConfig(prior_confidence=1)
