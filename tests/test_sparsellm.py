# SPDX-License-Identifier: Apache-2.0
"""SparseLLM: the layers of an FFN pruned towards its output."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, VOCABULARY
from torch import nn

from hf_nmsparse.criteria import BlockInputs, Choice, InputStatistics, prune
from hf_nmsparse.criteria.feed_forward import find_ffns
from hf_nmsparse.criteria.sparsegpt import SparseGPT
from hf_nmsparse.criteria.sparsellm import Descent, SparseLLM
from hf_nmsparse.criteria.sparsellm_updates import (
    hidden_factor,
    update_gate,
    update_gated,
    update_hidden,
    update_relu,
)
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.pattern import Unstructured, parse_pattern

WIDTH, HIDDEN = 24, 64
PATTERNS = ["1:4", "2:4", "70%"]
FORMS = ["plain", "gated"]


class Plain(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation_fn = activation or nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.act_fn = activation or nn.SiLU()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def block_of(form: str, scale: float = 3.0) -> nn.Module:
    block = Plain() if form == "plain" else Gated()
    for parameter in block.parameters():
        parameter.data.mul_(scale)
    return block


def tokens_of(count: int = 400) -> torch.Tensor:
    mix = torch.randn(WIDTH, WIDTH) / WIDTH**0.5 + torch.eye(WIDTH)
    return torch.randn(count, WIDTH) @ mix


def statistics_of(x: torch.Tensor) -> InputStatistics:
    lower = (x.float().t() @ x.float() / len(x)).tril()
    hessian = lower + lower.tril(-1).t()
    return InputStatistics(len(x), hessian.diagonal().clone(), hessian, x)


@torch.no_grad()
def inputs_of(block: nn.Module, x: torch.Tensor, pattern: str = "70%", prefix: str = "layers.3") -> BlockInputs:
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in modules.items()
    ]
    block(x)
    for handle in handles:
        handle.remove()
    made = {id(value): statistics_of(value) for value in seen.values()}
    full = {name: f"{prefix}.{name}" for name in modules}
    return BlockInputs(
        {full[name]: module for name, module in modules.items()},
        {full[name]: module.weight.detach() for name, module in modules.items()},
        {full[name]: made[id(value)] for name, value in seen.items()},
        parse_pattern(pattern),
        block,
    )


@torch.no_grad()
def output_error(block: nn.Module, inputs: BlockInputs, choices: dict[str, Choice], x: torch.Tensor) -> float:
    """Squared error of the block's output, by running it."""
    pruned = copy.deepcopy(block)
    for name, module in inputs.modules.items():
        leaf = name.rpartition(".")[2]
        pruned.get_submodule(leaf).weight.copy_(choices[name].masked(module.weight))
    return float((pruned(x).double() - block(x).double()).square().sum())


def descent_of(inputs: BlockInputs, **settings) -> Descent:
    (ffn,) = find_ffns(inputs.modules, inputs.block)
    return Descent(ffn, inputs, SparseLLM(**settings))


def follows(mask: torch.Tensor, pattern) -> bool:
    if isinstance(pattern, Unstructured):
        return int((~mask).sum()) == pattern.num_pruned(mask.numel())
    return all(bool((chunk.sum(1) == min(pattern.n, chunk.shape[1])).all()) for chunk in mask.split(pattern.m, dim=1))


# --- each update against brute force ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.1), (100.0, 0.01), (0.01, 5.0)])
def test_hidden_satisfies_its_normal_equations(beta, gamma):
    a, y, weight = torch.randn(7, HIDDEN), torch.randn(7, WIDTH), torch.randn(WIDTH, HIDDEN)
    p = update_hidden(a, y, weight, hidden_factor(weight, beta, gamma), beta, gamma)
    w = weight.double()
    left = p.double() @ (beta * w.t() @ w + gamma * torch.eye(HIDDEN, dtype=torch.float64))
    right = beta * y.double() @ w + gamma * a.double()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.1, 0.1), (5.0, 0.1), (0.01, 1.0)])
def test_z_of_relu_beats_a_grid(alpha, gamma):
    p, m = 2 * torch.randn(500), 2 * torch.randn(500)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return alpha * (z - m) ** 2 + gamma * (p - z.relu()) ** 2

    z = update_relu(p, m, alpha, gamma)
    grid = torch.linspace(-10, 10, 8001)[:, None]
    assert bool((loss(z) <= loss(grid).min(0).values + 1e-6).all())
    # Each candidate must be the one somewhere, also against the sign of m.
    assert bool(((z > 0) & (m < 0)).any()) or alpha > gamma
    assert bool(((z < 0) & (p > 0)).any())
    assert bool((z > 0).any())


@pytest.mark.parametrize(("alpha", "gamma"), [(5.0, 5.0), (0.1, 10.0), (10.0, 0.01)])
def test_gated_z_has_no_gradient_left(alpha, gamma):
    p, m, gate, z = torch.randn(4, 300, dtype=torch.float64)
    z = update_gated(p, m, gate, alpha, gamma).requires_grad_()
    (alpha * (z - m) ** 2 + gamma * (p - gate * z) ** 2).sum().backward()
    assert float(z.grad.abs().max()) < 1e-12 * max(alpha, gamma)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.ReLU(), torch.tanh])
def test_gate_steps_lower_the_loss_and_raise_it_nowhere(activation):
    s, p, z, m = 3 * torch.randn(4, 2000)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return 0.5 * (s - m) ** 2 + 2.0 * (p - activation(s) * z) ** 2

    with torch.no_grad():
        moved = update_gate(s, p, z, m, activation, 0.5, 2.0)
    assert bool((loss(moved) <= loss(s)).all())
    assert loss(moved).sum() < 0.5 * loss(s).sum()
    assert not moved.requires_grad


def objective(descent: Descent, choices: list[Choice]) -> float:
    """All three terms for given weights, at the p that is best for the z and s that are held."""
    *first, last = (choice.masked(weight).double() for choice, weight in zip(choices, descent.dense, strict=True))
    before = [part.double() for part in descent.before]
    hidden, target = descent.ffn.hidden(before), descent.target.double()
    normal = descent.beta * last.t() @ last + descent.gamma * torch.eye(HIDDEN, dtype=torch.float64)
    p = torch.linalg.solve(normal, (descent.beta * target @ last + descent.gamma * hidden).t()).t()
    terms = descent.beta * (target - p @ last.t()).square().sum() + descent.gamma * (p - hidden).square().sum()
    for part, weight, bias in zip(before, first, descent.biases, strict=True):
        output = descent.inputs.double() @ weight.t() + (0 if bias is None else bias.detach().double())
        terms += descent.alpha * (part - output).square().sum()
    return float(terms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [{}, {"alpha": 0.1, "beta": 10.0, "gamma": 1.0}])
def test_the_auxiliary_variables_of_an_epoch_lower_the_objective(form, weights):
    inputs = inputs_of(block_of(form), tokens_of())
    descent = descent_of(inputs, **weights)
    choices = descent.choices()
    before = objective(descent, choices)
    descent._epoch(choices)
    assert objective(descent, choices) < before


# --- the whole -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_block_ends_nearer_to_the_dense_one_than_with_sparsegpt(form, pattern):
    block, x = block_of(form), tokens_of()
    inputs = inputs_of(block, x, pattern)
    weights = {name: weight.clone() for name, weight in inputs.weights.items()}
    hessians = {name: statistics.hessian.clone() for name, statistics in inputs.statistics.items()}
    errors = {
        criterion.name: output_error(block, inputs, dict(criterion.choose_block(inputs)), x)
        for criterion in (SparseGPT(), SparseLLM(epochs=1), SparseLLM())
    }
    assert errors["sparsellm"] < 0.8 * errors["sparsegpt"]
    for name, choice in SparseLLM().choose_block(inputs):
        assert follows(choice.mask, inputs.pattern)
        assert torch.equal(inputs.weights[name], weights[name])
        assert torch.equal(inputs.statistics[name].hessian, hessians[name])


@pytest.mark.parametrize("form", FORMS)
def test_later_epochs_improve_on_the_closing_alone(form):
    block, x = block_of(form), tokens_of(1000)
    inputs = inputs_of(block, x)
    errors = [output_error(block, inputs, dict(SparseLLM(epochs=n).choose_block(inputs)), x) for n in (1, 4)]
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_only_the_ratios_of_the_term_weights_matter(form):
    inputs = inputs_of(block_of(form), tokens_of())
    chosen = [dict(SparseLLM(*[scale] * 3, epochs=2).choose_block(inputs)) for scale in (0.25, 4.0)]
    for name in inputs.weights:
        assert torch.equal(chosen[0][name].mask, chosen[1][name].mask)


@pytest.mark.parametrize("form", FORMS)
def test_refitting_the_kept_weights_improves_further(form):
    block, x = block_of(form), tokens_of(1000)
    inputs = inputs_of(block, x)
    errors = [output_error(block, inputs, dict(SparseLLM(refit=r).choose_block(inputs)), x) for r in (False, True)]
    assert errors[1] < 0.97 * errors[0]


def nasty_tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, WIDTH, generator=generator)
    dead = x.clone()
    dead[:, ::2] = 0
    massive = x.clone()
    massive[0] *= 1e4
    return {
        "one token": x[:1],
        "fewer tokens than inputs": x[:5],
        "dead channels": dead,
        "all dead": torch.zeros_like(x),
        "a massive token": massive,
        "huge": x * 1e6,
        "tiny": x * 1e-15,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["2:4", "70%"])
@pytest.mark.parametrize("case", nasty_tokens())
def test_is_finite_and_never_worse_than_sparsegpt(form, pattern, case):
    x = nasty_tokens()[case]
    block = block_of(form)
    inputs = inputs_of(block, x, pattern)
    chosen = {c.name: dict(c.choose_block(inputs)) for c in (SparseGPT(), SparseLLM())}
    for choice in chosen["sparsellm"].values():
        assert follows(choice.mask, inputs.pattern)
        assert bool(choice.weight[choice.mask].isfinite().all())
    errors = {name: output_error(block, inputs, choices, x) for name, choices in chosen.items()}
    assert errors["sparsellm"] <= errors["sparsegpt"] * (1 + 1e-5)


def test_nan_in_an_epoch_keeps_the_best_before_it(monkeypatch, caplog):
    inputs = inputs_of(block_of("gated"), tokens_of())
    expected = descent_of(inputs, epochs=1).choices()
    descent = descent_of(inputs, epochs=4)
    monkeypatch.setattr(descent, "_update", lambda rows, *_: torch.full((rows.stop - rows.start, HIDDEN), torch.nan))
    descent._rows = lambda: iter([slice(0, 400)])
    with caplog.at_level(logging.WARNING):
        choices = descent.choices()
    assert "layers.3" in caplog.text and "epoch 1" in caplog.text
    for choice, other in zip(choices, expected, strict=True):
        assert torch.equal(choice.weight, other.weight)


def test_works_through_tokens_in_chunks(monkeypatch):
    inputs = inputs_of(block_of("gated"), tokens_of())
    whole = descent_of(inputs).choices()
    monkeypatch.setattr("hf_nmsparse.criteria.sparsellm.CHUNK_ELEMENTS", 70 * HIDDEN)
    error, chunked = (descent_of(inputs).error(choices) for choices in (whole, descent_of(inputs).choices()))
    assert chunked == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    block, x = block_of("gated").to(dtype), tokens_of().to(dtype)
    inputs = inputs_of(block, x)
    errors = [output_error(block, inputs, dict(c.choose_block(inputs)), x) for c in (SparseGPT(), SparseLLM())]
    assert errors[1] < 0.8 * errors[0]


def test_a_weight_alone_is_pruned_as_by_sparsegpt():
    weight, statistics, pattern = torch.randn(16, WIDTH), statistics_of(tokens_of()), parse_pattern("2:4")
    ours, theirs = (c.choose(weight, statistics, pattern) for c in (SparseLLM(), SparseGPT()))
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.weight, theirs.weight)
    assert torch.equal(SparseLLM().mask(weight, statistics, pattern), theirs.mask)


# --- finding FFNs --------------------------------------------------------------------------------------------------------
def opt_like(**changes) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **changes)
    ).eval()


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize(
    ("family", "parent", "layers"),
    [
        ("llama", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("qwen3", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("gemma3", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mistral", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("opt", "", ("fc1", "fc2")),
    ],
)
def test_finds_the_ffn_and_prunes_it_after_attention(family, parent, layers):
    stack, blocks = blocks_of(FAMILIES[family]())
    prefix = f"{stack}.1"
    names = [f"{prefix}.{name}" for name, module in blocks[1].named_modules() if isinstance(module, nn.Linear)]
    (ffn,) = find_ffns(names, blocks[1])
    assert ffn.layers == tuple(".".join(part for part in (prefix, parent, leaf) if part) for leaf in layers)
    first, second = SparseLLM().stages(names, blocks[1])
    assert set(second) == set(ffn.layers)
    assert all("attn" in name for name in first) and set(first) | set(second) == set(names)


def test_an_ffn_with_a_dense_layer_or_without_relu_is_none():
    for model, names in (
        (FAMILIES["llama"](), ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]),
        (opt_like(activation_function="gelu"), ["layers.0.fc1", "layers.0.fc2"]),
    ):
        block = blocks_of(model)[1][0]
        assert find_ffns(names, block) == []
        assert SparseLLM().stages(names, block) == [names]


def test_another_activation_than_the_one_found_is_refused():
    class Misleading(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))

    inputs = inputs_of(Misleading(), tokens_of())
    with pytest.raises(UnsupportedError, match=r"layers\.3\.down_proj.*SiLU.*dense_layers"):
        list(SparseLLM().choose_block(inputs))


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"beta": -1.0}, {"gamma": float("nan")}, {"epochs": 0}, {"damping": 0.0}]
)
def test_refuses_values_that_are_not_positive(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SparseLLM(**settings)


# --- models ----------------------------------------------------------------------------------------------------------------
def pruned(build: Callable[[], nn.Module], criterion, pattern: str, tokens: torch.Tensor) -> nn.Module:
    model = build()
    prune(model, criterion, pattern, tokens, progress=False)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("pattern", ["70%", "1:4"])
def test_prunes_models(family, pattern, tokens):
    model = pruned(FAMILIES[family], SparseLLM(epochs=2), pattern, tokens)
    for name, module in blocks_of(model)[1].named_modules():
        if isinstance(module, nn.Linear):
            assert bool(module.weight.isfinite().all()), name
            assert float((module.weight == 0).float().mean()) == pytest.approx(
                0.7 if "%" in pattern else 0.75, abs=0.01
            )


def test_other_ffns_are_pruned_as_by_sparsegpt_with_a_log_line(tokens, caplog):
    with caplog.at_level(logging.WARNING):
        ours = pruned(FAMILIES["gpt2"], SparseLLM(), "2:4", tokens)
    assert "transformer.h.0.mlp.c_fc (2 such layers in its block)" in caplog.text
    theirs = pruned(FAMILIES["gpt2"], SparseGPT(), "2:4", tokens)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, other), name
