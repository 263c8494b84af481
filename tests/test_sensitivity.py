# SPDX-License-Identifier: Apache-2.0
"""Sensitivity equals pruning one layer by hand; the knapsack equals trying every subset; the model is left alone."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from families import FAMILIES, inputs_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.criteria import Criterion, Magnitude, Wanda, find_weights, keep_highest, prune
from hf_nmsparse.criteria.knapsack import most_valuable
from hf_nmsparse.criteria.sensitivity import LayerSensitivity, SensitivityReport, sensitivity
from hf_nmsparse.criteria.sparsegpt import SparseGPT
from hf_nmsparse.data import windows
from hf_nmsparse.errors import ConfigError, NMSparseError, UnsupportedError
from hf_nmsparse.pattern import NMPattern

TINY = Path(__file__).parent / "tiny_llama"


def bloom() -> nn.Module:
    torch.manual_seed(11)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config).eval()


BUILD = {**FAMILIES, "bloom": bloom}  # the blocks of Bloom return tuples
CAUSAL = ["llama", "opt", "gemma3", "gpt2", "bloom", "mixtral"]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def naive_loss(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Token by token, the whole model, one sequence at a time."""
    losses = []
    for batch in batches:
        logits = model(**batch).logits
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row in range(len(logits)):
            for position in range(logits.shape[1] - 1):
                if real[row, position] and real[row, position + 1]:
                    wanted = batch["input_ids"][row, position + 1]
                    losses.append(-logits[row, position].double().log_softmax(0)[wanted])
    return float(torch.stack(losses).mean())


@torch.no_grad()
def naive_masks(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Wanda 2:4 of every layer from its inputs in the dense model."""
    squares: dict[str, torch.Tensor] = {}

    def see(name):
        def hook(module, args, output):
            squares[name] = squares.get(name, 0) + args[0].detach().double().square().flatten(0, -2).sum(0)

        return hook

    targets = find_weights(model)
    handles = [target.module.register_forward_hook(see(name)) for name, target in targets.items()]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {
        name: keep_highest(target.dense().abs().double() * squares[name].sqrt(), NMPattern("2:4"))
        for name, target in targets.items()
    }


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "gpt2", "bloom"])
def test_the_loss_increase_is_that_of_the_whole_model_with_one_layer_pruned(name):
    model = BUILD[name]()
    before = state_of(model)
    batches = [inputs_for(name, seed=seed) for seed in (5, 6)]
    report = sensitivity(model, batches)
    assert same(model, before)
    assert report.dense_loss == pytest.approx(naive_loss(model, batches), abs=1e-6)
    assert (report.criterion, report.pattern, report.tokens) == ("wanda", "2:4", 96)
    masks, targets = naive_masks(model, batches), find_weights(model)
    assert [layer.name for layer in report.layers] == list(targets)
    for layer in report.layers:
        weight, mask = targets[layer.name].dense(), masks[layer.name]
        dense = weight.clone()
        weight.masked_fill_(~mask, 0)
        increase = naive_loss(model, batches) - report.dense_loss
        weight.copy_(dense)
        assert layer.loss_increase == pytest.approx(increase, abs=2e-6), layer.name
        assert layer.bytes == dense.numel() * 4
        assert layer.kept_energy == pytest.approx(
            float((dense * mask).square().sum() / dense.square().sum()), abs=1e-5
        )
    assert max(abs(layer.loss_increase) for layer in report.layers) > 1e-3  # there was something to see


def test_experts_are_pruned_one_by_one():
    model = BUILD["mixtral"]()
    before = state_of(model)
    batches = [inputs_for("mixtral", batch=8)]
    report = sensitivity(model, batches)
    assert same(model, before)
    name = "model.layers.0.mlp.experts.down_proj.3"
    [layer] = [layer for layer in report.layers if layer.name == name]
    target = find_weights(model)[name]
    masked = BUILD["mixtral"]()
    only = [other for other in find_weights(model) if other != name]
    prune(masked, "wanda", calibration=batches, inputs="dense", dense_layers=only)
    assert not torch.equal(find_weights(masked)[name].dense(), target.dense())
    assert layer.loss_increase == pytest.approx(naive_loss(masked, batches) - report.dense_loss, abs=2e-6)
    assert layer.bytes == target.dense().numel() * 4


def test_names_of_single_experts_can_be_left_dense():
    report = sensitivity(BUILD["mixtral"](), inputs_for("mixtral"))
    names = report.keep_dense(0.3)
    assert any(".experts." in name for name in names)
    model = BUILD["mixtral"]()
    pruned = {
        layer.name for layer in prune(model, "wanda", calibration=inputs_for("mixtral"), dense_layers=names).layers
    }
    assert pruned == {layer.name for layer in report.layers} - set(names)


def test_output_errors_are_those_of_prune_with_dense_inputs():
    calibration = inputs_for("llama")
    report = sensitivity(BUILD["llama"](), calibration, SparseGPT, measure_loss=False)
    pruned = prune(BUILD["llama"](), SparseGPT, calibration=calibration, inputs="dense", weights="keep")
    for layer, other in zip(report.layers, pruned.layers, strict=True):
        assert (layer.name, layer.loss_increase) == (other.name, None)
        assert layer.relative_error == pytest.approx(other.relative_error, rel=1e-5)
        assert layer.kept_energy == pytest.approx(other.kept_energy, rel=1e-6)
    assert report.dense_loss is None


def test_the_output_error_has_the_whole_hessian_whatever_the_criterion_reads():
    model, calibration = BUILD["llama"](), inputs_for("llama")
    seen = []
    name = "model.layers.1.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**calibration)
    handle.remove()
    [layer] = [
        layer
        for layer in sensitivity(model, calibration, "magnitude", measure_loss=False).layers
        if layer.name == name
    ]
    weight, x = find_weights(model)[name].dense().double(), seen[0].detach().flatten(0, 1).double()
    removed = weight * ~keep_highest(weight.abs(), NMPattern("2:4"))
    expected = (x @ removed.T).square().sum() / (x @ weight.T).square().sum()
    assert layer.relative_error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("pattern", "m"), [("2:4", 4), ("4:8", 8), ("5:9", 9), ("50%", 1)])
def test_differing_groups_are_counted_one_by_one(pattern, m):
    calibration = inputs_for("llama")
    report = sensitivity(
        BUILD["llama"](), calibration, "wanda", pattern, compare=("magnitude", SparseGPT), measure_loss=False
    )
    masks = {}
    for criterion in (Wanda, Magnitude, SparseGPT):
        model = BUILD["llama"]()
        prune(model, criterion, pattern, calibration, inputs="dense", weights="keep")
        masks[criterion.name] = {name: target.dense() != 0 for name, target in find_weights(model).items()}
    for layer in report.layers:
        assert list(layer.differing_groups) == ["magnitude", "sparsegpt"]
        for other, share in layer.differing_groups.items():
            first, second = masks["wanda"][layer.name], masks[other][layer.name]
            groups = [
                bool((first[row, start : start + m] != second[row, start : start + m]).any())
                for row in range(len(first))
                for start in range(0, first.shape[1], m)
            ]
            assert share == pytest.approx(sum(groups) / len(groups), abs=1e-6)
    assert any(layer.differing_groups["magnitude"] > 0.05 for layer in report.layers)


def test_blocks_before_the_pruned_layer_are_not_run_again():
    model = BUILD["llama"]()
    runs = [0, 0]
    for index in range(2):

        def count(*_, index=index):
            runs[index] += 1

        model.model.layers[index].register_forward_pre_hook(count)
    sensitivity(model, inputs_for("llama"))
    # Passed through by the model's forward: to record, and once for each of 15 losses.
    assert runs[0] - 16 == 1 + 1 + 7  # statistics, dense loss, its own seven layers
    assert runs[1] - 16 == 1 + 1 + 14


def test_blocks_that_are_on_disk_give_the_same(tmp_path):
    calibration = inputs_for("llama")
    wanted = sensitivity(BUILD["llama"](), calibration)
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = accelerate.dispatch_model(
        BUILD["llama"](), {**places, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    found = sensitivity(model, calibration)
    assert next(model.model.layers[0].parameters()).is_meta
    assert found.dense_loss == pytest.approx(wanted.dense_loss, abs=1e-6)
    for first, second in zip(found.layers, wanted.layers, strict=True):
        assert (first.name, first.bytes) == (second.name, second.bytes)
        assert first.loss_increase == pytest.approx(second.loss_increase, abs=1e-6)


def test_padding_is_not_counted():
    model = BUILD["llama"]()
    padded = inputs_for("llama")
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, 8:] = 0
    padded["attention_mask"][1, :3] = 0
    report = sensitivity(model, [padded])
    assert report.tokens == 48 - 4 - 3
    assert report.dense_loss == pytest.approx(naive_loss(model, [padded]), abs=1e-6)
    padded["input_ids"][0, 8:] = 7
    padded["input_ids"][1, :3] = 7
    again = sensitivity(model, [padded])
    for first, second in zip(report.layers, again.layers, strict=True):
        assert first.loss_increase == pytest.approx(second.loss_increase, abs=1e-6)


def test_labels_say_what_is_to_be_predicted():
    model, batch = BUILD["llama"](), inputs_for("llama")
    labels = batch["input_ids"].clone()
    labels[:, :9] = -100
    report = sensitivity(model, [{**batch, "labels": labels}], layers="0:1")
    assert report.dense_loss == pytest.approx(model(**batch, labels=labels).loss.item(), abs=1e-6)
    with pytest.raises(ConfigError, match="no input_ids"):
        sensitivity(model, [{"inputs_embeds": torch.randn(2, 6, 32)}])
    with pytest.raises(NMSparseError, match="loss of the dense model is nan"):
        sensitivity(model, [{**batch, "labels": torch.full_like(labels, -100)}])


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_models_without_a_next_token_loss_are_refused_and_measured_without_it(name):
    model, calibration = BUILD[name](), inputs_for(name)
    with pytest.raises(UnsupportedError, match=rf"{type(model).__name__}.*measure_loss=False"):
        sensitivity(model, calibration)
    report = sensitivity(model, calibration, measure_loss=False)
    assert {layer.name for layer in report.layers} == set(find_weights(model))
    assert all(0 < layer.relative_error < 1 for layer in report.layers)
    assert report.keep_dense(1, by="relative_error") == [layer.name for layer in report.layers]
    with pytest.raises(ConfigError, match="measure_loss=True"):
        report.keep_dense(0.1)


class FailsInTheSecondBlock(Criterion):
    name = "fails_in_the_second_block"
    needs = "norms"

    def __init__(self):
        self.calls = 0

    def mask(self, weight, statistics, pattern):
        self.calls += 1
        if self.calls > 9:
            raise RuntimeError("out of luck")
        return keep_highest(weight.abs(), pattern)


@pytest.mark.parametrize("where", ["criterion", "compare", "model"])
def test_a_failure_leaves_the_model_as_it_was(where, monkeypatch):
    model, calibration = BUILD["llama"](), inputs_for("llama")
    model.train()
    before = state_of(model)
    if where == "model":  # in the middle of a loss, while a layer is pruned
        forward, calls = model.lm_head.forward, itertools.count()

        def fails(x):
            if next(calls) == 4:
                assert not same(model, before)
                raise RuntimeError("out of luck")
            return forward(x)

        monkeypatch.setattr(model.lm_head, "forward", fails)
    arguments = {
        "criterion": {"criterion": FailsInTheSecondBlock},
        "compare": {"compare": [FailsInTheSecondBlock()]},
        "model": {},
    }[where]
    with pytest.raises(RuntimeError, match="out of luck"):
        sensitivity(model, calibration, **arguments)
    assert same(model, before)
    assert model.training
    assert "forward" not in vars(model.model.layers[0])


def test_what_is_not_to_be_looked_at_is_left_out():
    model, calibration = BUILD["llama"](), inputs_for("llama")
    report = sensitivity(model, calibration, dense_layers=["down_proj"], layers="1:2")
    assert len(report.layers) == 6
    assert all(".1." in layer.name and "down_proj" not in layer.name for layer in report.layers)


def test_wrong_use_is_refused_before_any_work():
    model, calibration = BUILD["llama"](), inputs_for("llama")
    with pytest.raises(ConfigError, match="'wanda' is there more than once"):
        sensitivity(model, calibration, compare=["wanda", Wanda()])
    with pytest.raises(ConfigError, match="unknown criterion 'wonder'"):
        sensitivity(model, calibration, compare="wonder")
    with pytest.raises(ConfigError, match="unstructured"):
        sensitivity(model, calibration, FailsInTheSecondBlock, pattern="50%")
    with pytest.raises(ConfigError, match="calibration"):
        sensitivity(model, None)


# --- which layers to keep dense ---------------------------------------------------------------------------------------
def report_of(increases: list[float | None], sizes: list[int]) -> SensitivityReport:
    layers = [
        LayerSensitivity(f"layer.{index}", size, 0.1 * (index + 1), 0.5, {}, increase)
        for index, (increase, size) in enumerate(zip(increases, sizes, strict=True))
    ]
    return SensitivityReport("wanda", "2:4", 1, 1.0, 1.0, layers)


def best_of_all_subsets(values: list[float], sizes: list[int], capacity: int) -> float:
    return max(
        sum(values[index] for index in subset)
        for count in range(len(values) + 1)
        for subset in itertools.combinations(range(len(values)), count)
        if sum(sizes[index] for index in subset) <= capacity
    )


ITEMS = st.lists(st.tuples(st.integers(-20, 100), st.integers(1, 30)), min_size=1, max_size=9)


@settings(deadline=None)
@given(ITEMS, st.integers(0, 120), st.sampled_from([1, 6, 1024]))
def test_the_knapsack_is_as_good_as_the_best_subset(items, capacity, scale):
    values, sizes = [value / 8 for value, _ in items], [size * scale for _, size in items]
    chosen = most_valuable(values, sizes, capacity * scale)
    assert chosen == sorted(set(chosen))
    assert sum(sizes[index] for index in chosen) <= capacity * scale
    assert all(values[index] > 0 for index in chosen)
    assert sum(values[index] for index in chosen) == best_of_all_subsets(values, sizes, capacity * scale)


@settings(deadline=None)
@given(ITEMS, st.integers(0, 120), st.integers(1, 60))
def test_coarse_units_never_exceed_the_capacity(items, capacity, max_cells):
    values, sizes = [value for value, _ in items], [size for _, size in items]
    chosen = most_valuable(values, sizes, capacity, max_cells)
    assert sum(sizes[index] for index in chosen) <= capacity
    # Rounded up by less than a unit each, what fits into the capacity without those units is still found.
    slack = len(items) * math.ceil(capacity * len(items) / max_cells)
    assert sum(values[index] for index in chosen) >= best_of_all_subsets(values, sizes, max(capacity - 2 * slack, 0))


def test_a_large_model_with_odd_sizes_takes_moderate_time_and_memory():
    generator = np.random.default_rng(0)
    sizes = [int(size) for size in generator.integers(10**6, 10**8, 400)]
    values = generator.random(400).tolist()
    capacity = sum(sizes) // 10
    chosen = most_valuable(values, sizes, capacity)
    assert capacity * 0.99 < sum(sizes[index] for index in chosen) <= capacity
    by_rate = sorted(range(400), key=lambda index: -values[index] / sizes[index])
    filled, greedy = 0, 0.0
    for index in by_rate:
        if filled + sizes[index] <= capacity:
            filled, greedy = filled + sizes[index], greedy + values[index]
    assert sum(values[index] for index in chosen) > 0.995 * greedy


def test_the_budget_is_a_share_of_the_bytes():
    report = report_of([0.5, 0.3, 0.3, -0.1, 0.0], [60, 30, 30, 10, 10])
    assert report.keep_dense(0) == []
    assert report.keep_dense(1) == ["layer.0", "layer.1", "layer.2"]  # pruning the others does no harm
    assert report.keep_dense(60 / 140) == ["layer.1", "layer.2"]  # together worth more than the first
    assert report.keep_dense(0.3) == ["layer.1"]  # of equal ones the first by name
    report.layers.reverse()
    assert report.keep_dense(0.3) == ["layer.1"]
    assert report.keep_dense(1) == ["layer.2", "layer.1", "layer.0"]
    for budget in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="budget"):
            report.keep_dense(budget)
    with pytest.raises(ConfigError, match="by='size'"):
        report.keep_dense(0.1, by="size")


def test_a_share_that_no_float_holds_is_not_rounded_down():
    assert report_of([0.5, 0.1], [29, 71]).keep_dense(0.29) == ["layer.0"]


def test_an_unmeasured_loss_can_be_replaced_by_the_output_error():
    report = report_of([None, None, None], [40, 10, 30])  # errors 0.1, 0.2, 0.3
    assert report.keep_dense(0.5, by="relative_error") == ["layer.1", "layer.2"]
    assert report.keep_dense(0.4, by="relative_error") == ["layer.2"]


@pytest.mark.slow
def test_on_a_trained_model_the_measured_choice_beats_random_ones_of_the_same_size():
    def load():
        return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    def tokens_of(split):
        return torch.from_numpy(np.load(TINY / f"{split}_tokens.npy").astype(np.int64))

    calibration, held_out = windows(tokens_of("train"), 256, samples=16, seed=0), tokens_of("test")[:4096]
    report = sensitivity(load(), calibration)

    def perplexity(dense_layers):
        model = load()
        prune(model, "wanda", calibration=calibration, dense_layers=dense_layers)
        return nms.perplexity(model, held_out, seq_len=256).value

    sizes = {layer.name: layer.bytes for layer in report.layers}
    budget = sum(sizes.values()) // 10
    chosen = report.keep_dense(0.1)
    assert 0.8 * budget < sum(sizes[name] for name in chosen) <= budget
    random_choices = []
    for seed in range(4):
        names, left = [], budget
        for name in random.Random(seed).sample(list(sizes), len(sizes)):
            if sizes[name] <= left:
                names.append(name)
                left -= sizes[name]
        random_choices.append(perplexity(names))
    assert perplexity(chosen) < 0.98 * sum(random_choices) / len(random_choices)
