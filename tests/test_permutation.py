# SPDX-License-Identifier: Apache-2.0
"""Channel permutation: the model absorbs it, it can be taken back, and the order that is chosen retains more."""

from __future__ import annotations

import copy
import itertools
import logging
import sys

import pytest
import torch
import transformers
from families import FAMILIES, inputs_for
from torch import nn

from hf_nmsparse.criteria.base import InputStatistics
from hf_nmsparse.criteria.channel_order import best_order
from hf_nmsparse.criteria.permutation import (
    Absorbable,
    absorb,
    find_absorbable,
    matrix,
    permute,
    permute_statistics,
)
from hf_nmsparse.criteria.ria import relative_importance
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.pattern import NMPattern

PER_BLOCK = {
    "llama": 2,
    "qwen3": 2,
    "gemma3": 2,
    "mistral": 2,
    "opt": 2,
    "gpt2": 1,  # c_attn is fused
    "bert": 2,
    "vit": 2,
    "mixtral": 1,  # experts are fused
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the family with biases and norms that are not all zeros and ones."""
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=48)
        model = transformers.GPTNeoXForCausalLM(config)
    elif family == "phi":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, intermediate_size=48))
    elif family == "nemotron":
        config = transformers.NemotronConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
        model = transformers.NemotronForCausalLM(config)
    else:
        model = FAMILIES[family]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def named(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def outputs_of(model: nn.Module, family: str) -> torch.Tensor:
    inputs = inputs_for(family)
    if family == "vit":
        inputs = {name: value.to(next(model.parameters()).dtype) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**inputs).logits


def random_order(pair: Absorbable, seed: int = 0) -> torch.Tensor:
    """Any order that the pair allows."""
    generator = torch.Generator().manual_seed(seed)
    order = []
    for head in range(pair.heads):
        moved = torch.randperm(pair.channels, generator=generator)
        order += [moved + (head * pair.copies + c) * pair.channels for c in range(pair.copies)]
    return torch.cat(order)


def retained(scores: torch.Tensor, pattern: NMPattern) -> float:
    """Sum of what the pattern keeps, group by group."""
    chunks = scores.double().split(pattern.m, dim=1)
    return sum(float(chunk.sort(dim=1, descending=True).values[:, : pattern.n].sum()) for chunk in chunks)


def dealt(scores: torch.Tensor, m: int) -> torch.Tensor:
    """Channels from strong to weak, dealt to the groups in turn, to and fro."""
    strong_first = sorted(range(scores.shape[1]), key=lambda j: -float(scores[:, j].double().sum()))
    groups = scores.shape[1] // m
    hands = [[] for _ in range(groups)]
    for turn, channel in enumerate(strong_first):
        step, seat = divmod(turn, groups)
        hands[seat if step % 2 == 0 else groups - 1 - seat].append(channel)
    return torch.tensor([channel for hand in hands for channel in hand])


def mlp(channels: int) -> Absorbable:
    return Absorbable("block.down_proj", ("block.up_proj",), channels)


# --- the model absorbs it -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [*PER_BLOCK, "t5", "gpt_neox", "phi", "nemotron"])
def test_outputs_stay_weights_move_and_undoing_is_bit_exact(family):
    model = build(family)
    modules = named(model)
    before, state = outputs_of(model, family), copy.deepcopy(model.state_dict())
    pairs = find_absorbable(modules, model.config)
    assert len(pairs) == {"t5": 2 * 2 + 2 * 3, "gpt_neox": 2, "phi": 4, "nemotron": 4}.get(
        family, 2 * PER_BLOCK.get(family, 0)
    )
    for seed, pair in enumerate(pairs):
        permute(pair, modules, random_order(pair, seed))
        for name in (pair.consumer, *pair.producers):
            assert not torch.equal(modules[name].weight, state[f"{name}.weight"])
    torch.testing.assert_close(outputs_of(model, family), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for seed, pair in enumerate(pairs):
        permute(pair, modules, random_order(pair, seed).argsort())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_heads_and_copies_are_those_of_the_model():
    model = build("llama")
    pairs = {pair.consumer: pair for pair in find_absorbable(named(model), model.config)}
    folder = "model.layers.0"
    assert pairs[f"{folder}.self_attn.o_proj"] == Absorbable(
        f"{folder}.self_attn.o_proj", (f"{folder}.self_attn.v_proj",), channels=8, heads=2, copies=2
    )
    producers = (f"{folder}.mlp.gate_proj", f"{folder}.mlp.up_proj")
    assert pairs[f"{folder}.mlp.down_proj"] == Absorbable(f"{folder}.mlp.down_proj", producers, channels=48)


def test_a_channel_of_a_kv_head_moves_in_all_its_query_heads():
    pair = Absorbable("block.o_proj", ("block.v_proj",), channels=2, heads=2, copies=2)
    order = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7])
    assert pair.producer_order(order).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ([1, 0, 2, 3, 4, 5, 6, 7], "copies differ"),
        ([4, 5, 6, 7, 0, 1, 2, 3], "heads change places"),
        ([0, 0, 2, 2, 4, 5, 6, 7], "a channel twice"),
        ([0, 1, 2, 3], "too short"),
    ],
)
def test_an_order_that_moves_what_must_stay_is_refused_before_anything_changes(order, why):
    modules = {"b.o_proj": nn.Linear(8, 3), "b.v_proj": nn.Linear(3, 4)}
    state = {name: module.weight.clone() for name, module in modules.items()}
    pair = Absorbable("b.o_proj", ("b.v_proj",), channels=2, heads=2, copies=2)
    with pytest.raises(ConfigError, match=r"b\.o_proj"):
        permute(pair, modules, torch.tensor(order))
    assert all(torch.equal(modules[name].weight, state[name]) for name in modules), why


def test_layers_that_are_no_plain_linear_or_do_not_fit_are_left_out():
    model = build("llama")
    modules = named(model)
    folder = "model.layers.0"

    class Quantised(nn.Linear):
        pass

    modules[f"{folder}.mlp.up_proj"] = Quantised(32, 48)
    modules[f"{folder}.self_attn.v_proj"] = nn.Linear(32, 12)  # no whole number of heads
    del modules["model.layers.1.self_attn.v_proj"]  # may not be changed
    found = find_absorbable(modules, model.config)
    assert [pair.consumer for pair in found] == ["model.layers.1.mlp.down_proj"]


def test_blocks_that_attend_to_the_values_of_others_are_left_out():
    model = build("llama")
    model.config.num_kv_shared_layers = 1
    assert {pair.consumer.split(".")[-1] for pair in find_absorbable(named(model), model.config)} == {"down_proj"}


# --- the numeric check ----------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """`fc2(between(fc1(x)))`, and a second reader of fc1 if there is one; a large residual around it."""

    def __init__(self, between: nn.Module, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.between, self.reader = nn.Linear(16, 24), nn.Linear(24, 16), between, reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.fc1(x)
        output = 1000 * x + self.fc2(self.between(inner))
        return output if self.reader is None else output + self.reader(inner)


class Gate(nn.Module):
    """Channels weighted by numbers that fc1 does not make."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linspace(0.9, 1.1, x.shape[-1], dtype=x.dtype)


class Mix(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.roll(1, dims=-1)


def nearly_one_layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(24)
    nn.init.uniform_(norm.weight, 0.9, 1.1)
    return norm


def tried(block: nn.Module, dtype: torch.dtype, x: torch.Tensor | None = None) -> tuple[bool, bool]:
    """Whether the pair was permuted, and whether the weights are bit-equal to those before."""
    block = block.to(dtype)
    modules = {f"block.{name}": module for name, module in block.named_modules() if name}
    (pair,) = find_absorbable(modules, None)
    state = copy.deepcopy(block.state_dict())
    x = torch.randn(2, 10, 16, dtype=dtype) if x is None else x.to(dtype)
    done = absorb(pair, modules, random_order(pair), block, lambda: block(x))
    after = block.state_dict()
    return done, all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("between", [nn.GELU(), nn.ReLU(), nn.LayerNorm(24, elementwise_affine=False), nn.Softmax(-1)])
def test_what_treats_channels_alike_is_absorbed(between, dtype):
    assert tried(Block(between), dtype) == (True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("between", [nearly_one_layer_norm(), Gate(), Mix(), nn.Linear(24, 24)])
def test_what_weights_or_mixes_channels_is_refused_and_taken_back(between, dtype, caplog):
    with caplog.at_level(logging.WARNING):
        assert tried(Block(copy.deepcopy(between)), dtype) == (False, True)
    assert len(caplog.records) == 1
    assert "block.fc2" in caplog.text and "block.fc1" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_producers_with_a_second_reader_are_refused_even_under_a_large_residual(dtype, caplog):
    assert tried(Block(nn.ReLU(), nn.Linear(24, 16)), dtype) == (False, True)
    assert "reader" in caplog.text


def test_a_sample_that_does_not_reach_the_layer_proves_nothing(caplog):
    block = Block(nn.ReLU())
    nn.init.constant_(block.fc1.bias, -100.0)
    assert tried(block, torch.float32) == (False, True)
    assert "does not reach" in caplog.text


def test_a_failing_run_leaves_the_weights_as_they_were():
    block = Block(nn.ReLU())
    modules = {f"block.{name}": module for name, module in block.named_modules() if name}
    (pair,) = find_absorbable(modules, None)
    state, runs = copy.deepcopy(block.state_dict()), itertools.count()

    def run() -> torch.Tensor:
        if next(runs) == 1:
            raise RuntimeError("out of memory")
        return block(torch.ones(1, 16))

    with pytest.raises(RuntimeError):
        absorb(pair, modules, random_order(pair), block, run)
    assert all(torch.equal(block.state_dict()[name], value) for name, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*PER_BLOCK, "t5", "gpt_neox", "phi", "nemotron"])
def test_every_pair_of_the_families_passes_the_check(family, dtype):
    model = build(family, dtype)
    for pair in find_absorbable(named(model), model.config):
        assert absorb(pair, named(model), random_order(pair), model, lambda: outputs_of(model, family))


def test_a_wrong_number_of_heads_is_refused(caplog):
    model = build("opt")
    pairs = find_absorbable(named(model), transformers.OPTConfig(num_attention_heads=2))
    pair = next(pair for pair in pairs if pair.consumer.endswith("0.self_attn.out_proj"))
    assert not absorb(pair, named(model), random_order(pair), model, lambda: outputs_of(model, "opt"))


# --- which order ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "8:16"])
@pytest.mark.parametrize("seed", range(3))
def test_retains_at_least_as_much_as_now_and_as_the_deal(pattern, seed):
    pattern = NMPattern(pattern)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, 64, generator=generator) * (2 * torch.randn(64, generator=generator)).exp()
    order = best_order(scores, pattern, mlp(64))
    assert order.sort().values.tolist() == list(range(64))
    reached = retained(scores[:, order], pattern)
    # 1e-6: they are sums of float32 numbers
    assert reached >= retained(scores, pattern) * (1 - 1e-6)
    assert reached > retained(scores[:, dealt(scores, pattern.m)], pattern)


def test_assignment_finds_the_best_order_of_a_small_layer_or_nearly():
    pattern = NMPattern("1:2")
    scores = torch.rand(5, 6, generator=torch.Generator().manual_seed(2))
    best = max(retained(scores[:, list(order)], pattern) for order in itertools.permutations(range(6)))
    order = best_order(scores, pattern, mlp(6), sweeps=10)
    assert retained(scores, pattern) < retained(scores[:, order], pattern)
    assert retained(scores[:, order], pattern) > 0.99 * best


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_in_the_end_no_exchange_between_groups_at_one_position_helps(pattern):
    pattern = NMPattern(pattern)
    scores = torch.rand(7, 16, generator=torch.Generator().manual_seed(3)) ** 3
    groups = best_order(scores, pattern, mlp(16), sweeps=20).view(-1, pattern.m)
    reached = retained(scores[:, groups.flatten()], pattern)
    for position, order in itertools.product(range(pattern.m), itertools.permutations(range(len(groups)))):
        other = groups.clone()
        other[:, position] = groups[list(order), position]
        assert retained(scores[:, other.flatten()], pattern) <= reached * 1.0002  # sweeps end when they gain 1e-4


def test_starts_from_the_deal():
    scores = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)) ** 4
    scores[:, :16] *= 100
    assert best_order(scores, NMPattern("2:4"), mlp(64), sweeps=0).tolist() == dealt(scores, 4).tolist()


def test_more_sweeps_never_retain_less():
    scores = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)) ** 4
    pattern = NMPattern("2:4")
    reached = [retained(scores[:, best_order(scores, pattern, mlp(64), sweeps=s)], pattern) for s in (0, 1, 2, 4)]
    assert reached == sorted(reached) and reached[0] < reached[1]


def test_an_order_that_is_best_already_stays():
    scores = torch.tensor([[3.0, 2.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0]])
    order = best_order(scores, NMPattern("2:4"), mlp(8))
    assert order.tolist() == list(range(8))


def test_salient_channels_that_share_groups_are_spread():
    generator = torch.Generator().manual_seed(0)
    weight, squared_norm = torch.randn(32, 64, generator=generator), torch.ones(64)
    squared_norm[:16] = 1e4  # the first four groups hold all that matters
    scores = relative_importance(weight, squared_norm)
    order = best_order(scores, NMPattern("2:4"), mlp(64))
    before, after = retained(scores, NMPattern("2:4")), retained(scores[:, order], NMPattern("2:4"))
    assert after > 1.2 * before
    assert (order.view(-1, 4) < 16).sum(1).max() <= 2


def test_heads_keep_their_channels_and_copies_count():
    pattern, pair = NMPattern("2:4"), Absorbable("b.o_proj", ("b.v_proj",), channels=8, heads=2, copies=2)
    scores = torch.zeros(1, 32)
    scores[0, [0, 1, 2, 3]] = 1.0  # of the first copy of head 0: they crowd one group
    scores[0, [8 + 4, 8 + 5]] = 10.0  # of the second copy of head 0
    scores[0, 16:] = torch.rand(16)
    order = best_order(scores, pattern, pair)
    pair.producer_order(order)  # is allowed
    assert retained(scores[:, order], pattern) > retained(scores, pattern)
    assert retained(scores[:, order][:, :16], pattern) == 24.0  # nothing of head 0 is lost
    assert set(order[:8].tolist()) == set(range(8))


def test_the_channels_of_a_tail_stay_in_it():
    scores = torch.rand(6, 23, generator=torch.Generator().manual_seed(0)) ** 4
    pattern = NMPattern("2:4")
    order = best_order(scores, pattern, mlp(23))
    assert order[20:].tolist() == [20, 21, 22]
    assert retained(scores[:, order], pattern) > retained(scores, pattern)
    heads = Absorbable("b.o_proj", ("b.v_proj",), channels=6, heads=4)
    assert best_order(torch.rand(6, 24), pattern, heads).tolist() == list(range(24))
    assert best_order(torch.rand(6, 3), pattern, mlp(3)).tolist() == list(range(3))


def test_says_what_to_install_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-nmsparse\[permute\]'"):
        best_order(torch.rand(4, 8), NMPattern("2:4"), mlp(8))


# --- statistics -------------------------------------------------------------------------------------------------------------
def test_statistics_are_those_of_the_permuted_layer():
    model = build("llama")
    modules = named(model)
    pair = next(pair for pair in find_absorbable(modules, model.config) if "mlp" in pair.consumer)
    order = random_order(pair)

    def gather() -> InputStatistics:
        seen = []
        handle = modules[pair.consumer].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        outputs_of(model, "llama")
        handle.remove()
        x = seen[0]
        return InputStatistics(len(x), x.square().mean(0), x.t() @ x / len(x), x)

    before = gather()
    weight = matrix(modules[pair.consumer]).clone()
    permute(pair, modules, order)
    expected, found = gather(), permute_statistics(before, order)
    assert found.tokens == expected.tokens
    for name in ("squared_norm", "hessian", "inputs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(
        relative_importance(matrix(modules[pair.consumer]), found.squared_norm),
        relative_importance(weight, before.squared_norm)[:, order],
    )
    bare = permute_statistics(InputStatistics(before.tokens, before.squared_norm), order)
    assert bare.hessian is None and bare.inputs is None
