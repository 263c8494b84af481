# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning of every family: the right weights, along their inputs, with the statistics they really see."""

from __future__ import annotations

import copy
import logging
import re
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, inputs_for
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_nmsparse.criteria import (
    InputStatistics,
    Polish,
    Target,
    WalkOptions,
    Wanda,
    expert_view,
    find_stacks,
    find_weights,
    prune,
    walk,
)
from hf_nmsparse.data import calibration_batches
from hf_nmsparse.errors import ConfigError, UnsupportedError

STACKS = {
    "opt": ["model.decoder.layers"],
    "gpt2": ["transformer.h"],
    "bert": ["bert.encoder.layer"],
    "vit": ["vit.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "gemma3_vision": ["model.language_model.layers"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"],
}
EXPERTS = ["mixtral", "qwen3_moe"]
QUIET = WalkOptions(progress=False)


def stacks_of(name: str) -> list[str]:
    return STACKS.get(name, ["model.layers"])


def prunable(model: nn.Module, stacks: list[str]) -> dict[str, torch.Tensor]:
    """Weights that are to be pruned, by name, `[out, in]`: found without the code under test."""
    found = {}
    for name, parameter in model.state_dict().items():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if not inside or parameter.dim() < 2 or re.search(r"relative_attention_bias|mlp\.(gate|router)\.|_bias", name):
            continue
        if parameter.dim() == 3:
            transposed = "GptOss" in type(model).__name__
            found.update({f"{name}.{i}": weight.T if transposed else weight for i, weight in enumerate(parameter)})
        else:
            name = name.removesuffix(".weight")
            found[name] = parameter.T if isinstance(model.get_submodule(name), Conv1D) else parameter
    return found


def assert_untouched(model: nn.Module, dense: nn.Module) -> None:
    before = dense.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_restored(model, dense)


def assert_restored(model: nn.Module, dense: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__
    assert [m.training for m in model.modules()] == [m.training for m in dense.modules()]
    assert model.get_experts_implementation() == dense.get_experts_implementation()


class Spy(Wanda):
    """Wanda that keeps the statistics it was given."""

    name, needs = "spy", "hessian"

    def __init__(self) -> None:
        self.seen: dict[str, InputStatistics] = {}

    def choose_block(self, inputs):
        self.seen.update(inputs.statistics)
        yield from super().choose_block(inputs)


def spied(model: nn.Module, batches, **options) -> dict[str, InputStatistics]:
    spy = Spy()
    prune(model, spy, "2:4", batches, progress=False, **options)
    return spy.seen


def assert_statistics(statistics: InputStatistics, x: torch.Tensor) -> None:
    x = x.flatten(0, -2).double()
    assert statistics.tokens == len(x)
    torch.testing.assert_close(statistics.squared_norm.double(), x.square().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def inputs_of(model: nn.Module, names: list[str], batches: list[dict]) -> dict[str, list[tuple]]:
    """Arguments of modules in whole forwards of the model."""
    seen: dict[str, list[tuple]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, into=seen[name]: into.append(args))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def before_block(dense: nn.Module, pruned: nn.Module, name: str, block: str) -> nn.Module:
    """The model as block `block` is pruned: the blocks that run earlier are pruned, it and later ones are dense."""
    mixed = copy.deepcopy(dense)
    order = [f"{stack}.{index}." for stack in stacks_of(name) for index in range(2)]
    earlier = tuple(order[: order.index(block)])
    changed = {key: value for key, value in pruned.state_dict().items() if earlier and key.startswith(earlier)}
    mixed.load_state_dict(changed, strict=False)
    return mixed


# --- every family ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_of_the_blocks_follow_the_pattern_along_their_inputs_and_all_else_stays(name, criterion):
    model, dense = FAMILIES[name](), FAMILIES[name]()
    report = prune(model, criterion, "2:4", [inputs_for(name)], progress=False)
    before, after = prunable(dense, stacks_of(name)), prunable(model, stacks_of(name))
    assert [layer.name for layer in report.layers] == list(after)
    for layer, weight in after.items():
        kept = weight != 0
        assert bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()), layer
        assert torch.equal(weight[kept], before[layer][kept])
    state, pruned = dense.state_dict(), model.state_dict()
    changed = {key for key, value in state.items() if not torch.equal(value, pruned[key])}
    assert changed == {f"{name}.weight" if f"{name}.weight" in state else name.rpartition(".")[0] for name in after}
    assert_restored(model, dense)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_of_what_each_layer_sees_in_the_model_with_earlier_blocks_pruned(name):
    model, dense = FAMILIES[name](), FAMILIES[name]()
    batches = [inputs_for(name), inputs_for(name, batch=2, seed=6)]
    seen = spied(model, batches)
    for block in [f"{stack}.{index}." for stack in stacks_of(name) for index in range(2)]:
        layers = [layer for layer in seen if layer.startswith(block) and ".experts." not in layer]
        inputs = inputs_of(before_block(dense, model, name, block), layers, batches)
        assert layers
        for layer in layers:
            assert_statistics(seen[layer], torch.cat([args[0].flatten(0, -2) for args in inputs[layer]]))


class Compared(Polish):
    """Polish that notes the output errors of its start and of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[tuple[float, float]] = []

    def choose_block(self, inputs):
        starts = dict(self.start.choose_block(inputs))
        for name, choice in super().choose_block(inputs):
            hessian, weight = inputs.statistics[name].hessian.double(), inputs.weights[name]
            lost = [torch.where(mask, 0, weight).double() for mask in (starts[name].mask, choice.mask)]
            self.errors.append(tuple(float(((d @ hessian) * d).sum()) for d in lost))
            yield name, choice


@pytest.mark.parametrize("name", FAMILIES)
def test_polish_never_has_a_larger_error_than_wanda(name):
    model, dense, criterion = FAMILIES[name](), FAMILIES[name](), Compared()
    report = prune(model, criterion, "2:4", [inputs_for(name)], progress=False)
    assert all(polished <= start for start, polished in criterion.errors)
    assert sum(polished < 0.9 * start for start, polished in criterion.errors) > len(report.layers) / 2
    first = spied(dense, [inputs_for(name)])
    layer, weight = report.layers[0], prunable(FAMILIES[name](), stacks_of(name))[report.layers[0].name].double()
    energy = float(((weight @ first[layer.name].hessian.double()) * weight).sum())
    assert layer.relative_error == pytest.approx(criterion.errors[0][1] / energy, rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_failure_at_the_last_weight_leaves_the_model_as_it_was(name):
    model, dense = FAMILIES[name]().train(), FAMILIES[name]().train()
    last = list(find_weights(model))[-1]

    class FailsAtLast(Wanda):
        name = "fails_at_last"

        def choose_block(self, inputs):
            for layer, mask in super().choose_block(inputs):
                if layer == last:
                    raise RuntimeError("late")
                yield layer, mask

    with pytest.raises(RuntimeError, match="late"):
        prune(model, FailsAtLast(), "2:4", [inputs_for(name)], progress=False)
    assert_untouched(model, dense)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_tails_of_transposed_weights_and_of_experts_keep_what_they_can(name):
    model = FAMILIES[name]()
    prune(model, "wanda", "2:5", [inputs_for(name)], progress=False)
    for weight in prunable(model, stacks_of(name)).values():
        for group in weight.split(5, dim=1):
            assert bool(((group != 0).sum(1) == min(2, group.shape[1])).all())


# --- padding --------------------------------------------------------------------------------------------------------
def padded(rows: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    return torch.stack([F.pad(row, (0, length - len(row)), value=1) for row in rows]), mask


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral", "qwen3_moe"])
def test_padding_is_not_counted_in_either_stack_nor_by_experts(name):
    rows = [row[: 4 + 3 * i] for i, row in enumerate(inputs_for(name, batch=3)["input_ids"])]
    alone = [{"input_ids": row[None]} for row in rows]
    ids, mask = padded(rows, 10)
    together = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":  # as long as the encoder's, but padded otherwise
        outputs = list(reversed(rows))
        for batch, row in zip(alone, outputs, strict=True):
            batch["decoder_input_ids"] = row[None]
        together["decoder_input_ids"], together["decoder_attention_mask"] = padded(outputs, 10)
    expected, got = spied(FAMILIES[name](), alone), spied(FAMILIES[name](), together)
    assert len(expected) == len(prunable(FAMILIES[name](), stacks_of(name)))
    for layer, statistics in expected.items():
        assert got[layer].tokens == statistics.tokens
        torch.testing.assert_close(got[layer].hessian, statistics.hessian, rtol=1e-3, atol=1e-4)


# --- two stacks -----------------------------------------------------------------------------------------------------
def test_encoder_and_decoder_are_found_and_either_can_stay_dense():
    assert [stack for stack, _ in find_stacks(FAMILIES["t5"]())] == ["encoder.block", "decoder.block"]
    for dense in ("encoder", "decoder"):
        model = FAMILIES["t5"]()
        report = prune(model, "wanda", "2:4", [inputs_for("t5")], dense_layers=[dense], progress=False)
        assert report.layers and not any(layer.name.startswith(dense) for layer in report.layers)
        assert report.tokens == inputs_for("t5")["input_ids" if dense == "decoder" else "decoder_input_ids"].numel()


def test_a_module_of_ones_own_whose_config_has_a_text_config_needs_no_get_decoder():
    class Plain(torch.nn.Module):
        config = SimpleNamespace(text_config=SimpleNamespace())

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    assert [stack for stack, _ in find_stacks(Plain())] == ["blocks"]


def test_tokens_alone_are_also_what_the_decoder_of_t5_gets():
    tokens, both = inputs_for("llama")["input_ids"], FAMILIES["t5"]()
    alone = FAMILIES["t5"]()
    prune(both, "wanda", "2:4", {"input_ids": tokens, "decoder_input_ids": tokens}, progress=False)
    prune(alone, "wanda", "2:4", tokens, progress=False)
    assert_untouched(alone, both)


def test_a_failure_while_the_encoder_is_masked_leaves_the_model_as_it_was():
    model, dense = FAMILIES["t5"](), FAMILIES["t5"]()
    runs = []

    def fail_when_the_encoder_is_pruned(*_):
        runs.append(bool((model.encoder.block[1].layer[1].DenseReluDense.wo.weight == 0).any()))
        if runs[-1]:
            raise RuntimeError("interrupted")

    handle = model.decoder.block[0].register_forward_pre_hook(fail_when_the_encoder_is_pruned)
    with pytest.raises(RuntimeError, match="interrupted"):
        prune(model, "wanda", "2:4", [inputs_for("t5")], progress=False)
    handle.remove()
    assert runs == [False, True]  # the order of the stacks is looked up with the dense model
    assert_untouched(model, dense)


# --- experts --------------------------------------------------------------------------------------------------------
def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return GptOssForCausalLM(config).eval()


MIXTURES = {**{name: FAMILIES[name] for name in EXPERTS}, "gpt_oss": gpt_oss}


def hidden_in_expert(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What `down_proj` of one expert multiplies, written out."""
    up = x @ expert_view(experts, expert, experts.gate_up_proj).T
    if experts.has_bias:
        up = up + experts.gate_up_proj_bias[expert]
    return experts._apply_gate(up)


@pytest.mark.parametrize("name", MIXTURES)
def test_statistics_of_an_expert_are_of_the_tokens_routed_to_it(name):
    model, dense = MIXTURES[name](), MIXTURES[name]()
    batches = [inputs_for("mixtral"), inputs_for("mixtral", batch=2, seed=6)]
    seen = spied(model, batches)
    module = "model.layers.1.mlp.experts"
    reference = before_block(dense, model, name, "model.layers.1.")
    calls = inputs_of(reference, [module], batches)[module]
    counts = []
    with torch.no_grad():
        for expert in range(4):
            x = torch.cat([hidden[(chosen == expert).any(-1)] for hidden, chosen, _ in calls])
            counts.append(len(x))
            assert_statistics(seen[f"{module}.gate_up_proj.{expert}"], x)
            experts = reference.get_submodule(module)
            assert_statistics(seen[f"{module}.down_proj.{expert}"], hidden_in_expert(experts, expert, x))
    assert sum(counts) == 2 * 6 * 12 and len(set(counts)) > 1


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_no_token_reaches_gets_the_statistics_of_all(name, caplog):
    model, dense = MIXTURES[name](), MIXTURES[name]()
    token = {"input_ids": torch.tensor([[7]])}
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        seen = spied(model, token)
    module = "model.layers.0.mlp.experts"
    assert [record.message for record in caplog.records] == [
        f"{module.replace('0', index)}: calibration reached 2 of 4 experts; the others get the statistics of all tokens"
        for index in "01"
    ]
    ((x, chosen, _),) = inputs_of(dense, [module], [token])[module]
    with torch.no_grad():
        for expert in set(range(4)) - set(chosen.flatten().tolist()):
            assert_statistics(seen[f"{module}.gate_up_proj.{expert}"], x)
            hidden = hidden_in_expert(dense.get_submodule(module), expert, x)
            assert_statistics(seen[f"{module}.down_proj.{expert}"], hidden)
    assert seen["model.layers.0.self_attn.q_proj"].tokens == 1  # the second run adds nothing to other layers


def test_transposed_experts_are_pruned_along_their_inputs():
    model, dense = gpt_oss(), gpt_oss()
    report = prune(model, "wanda", "2:4", [inputs_for("mixtral")], progress=False)
    before, after = prunable(dense, ["model.layers"]), prunable(model, ["model.layers"])
    assert [layer.name for layer in report.layers] == list(after)
    for name, weight in after.items():
        kept = weight != 0
        assert bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()), name
        assert torch.equal(weight[kept], before[name][kept])
    assert torch.equal(model.model.layers[0].mlp.router.weight, dense.model.layers[0].mlp.router.weight)


@pytest.mark.parametrize("name", MIXTURES)
def test_views_of_experts_are_out_by_in_and_share_the_memory_of_the_parameter(name):
    experts = MIXTURES[name]().model.layers[0].mlp.experts
    views = [expert_view(experts, number, experts.down_proj) for number in range(4)]
    inner = expert_view(experts, 0, experts.gate_up_proj).shape[0] // 2
    assert [tuple(view.shape) for view in views] == [(32, inner)] * 4
    views[2].data.zero_()
    assert bool((experts.down_proj[2] == 0).all()) and not bool((experts.down_proj[1] == 0).any())


@pytest.mark.parametrize(
    ("entry", "left"), [("experts", 8), ("experts.gate_up_proj", 16), ("down_proj.3", 22), ("layers.1", 12)]
)
def test_experts_can_be_left_dense_by_module_parameter_and_number(entry, left):
    model, dense = FAMILIES["mixtral"](), FAMILIES["mixtral"]()
    report = prune(model, "wanda", "2:4", [inputs_for("mixtral")], dense_layers=[entry], progress=False)
    assert len(report.layers) == left
    after = prunable(model, ["model.layers"])
    for name, weight in prunable(dense, ["model.layers"]).items():
        assert torch.equal(weight, after[name]) == (f".{entry}." in f".{name}.")


def test_the_weight_of_an_expert_must_be_a_view():
    model = FAMILIES["mixtral"]()
    module = model.model.layers[0].mlp.experts
    target = Target("experts.0", module, print, computed=lambda: module.down_proj[0].clone(), expert=0)
    with pytest.raises(UnsupportedError, match=r"^experts\.0: the weight of an expert is a view of a parameter"):
        walk(model, [target], "wanda", "2:4", [inputs_for("mixtral")], options=QUIET)


def test_experts_of_unknown_layout_are_left_dense_and_named(caplog):
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(4, 8, 8))

    model = FAMILIES["llama"]()
    model.model.layers[1].mine = Mine()
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        assert len(find_weights(model)) == 14
    assert "model.layers.1.mine (Mine, 1 such) has 3-D weights of unknown layout" in caplog.text


# --- calibration data -----------------------------------------------------------------------------------------------
def test_one_dict_is_one_batch():
    inputs = inputs_for("vit")
    for calibration in (inputs, UserDict(inputs)):
        assert list(calibration_batches(calibration)) == [inputs]
    report = prune(FAMILIES["vit"](), "wanda", "2:4", inputs, progress=False)
    assert report.tokens == 4 * (16 + 1)  # patches and the class token


def test_tokens_for_a_model_of_images_are_refused():
    with pytest.raises(
        ConfigError, match="ViTForImageClassification takes pixel_values, and the calibration is tokens"
    ):
        prune(FAMILIES["vit"](), "wanda", "2:4", inputs_for("llama")["input_ids"], progress=False)
