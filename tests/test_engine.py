# SPDX-License-Identifier: Apache-2.0
"""The engine: block by block, equal to a naive reference, nothing half done."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tests_support import walk_naively
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_nmsparse.criteria import (
    Criterion,
    InputStatistics,
    Target,
    WalkOptions,
    Wanda,
    find_weights,
    get_criterion,
    prune,
    walk,
)
from hf_nmsparse.errors import ConfigError, NMSparseError, PatternError, UnsupportedError
from hf_nmsparse.pattern import NMPattern

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
QUIET = WalkOptions(progress=False)


def llama(dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1, **options}
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def qwen2_with_two_kinds_of_attention() -> nn.Module:
    torch.manual_seed(0)
    sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48, initializer_range=0.3, **sliding)
    ).eval()


def gpt_neox() -> nn.Module:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, initializer_range=0.1)).eval()


def opt() -> nn.Module:
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1)).eval()


def bloom_whose_blocks_return_tuples(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=128, hidden_size=32, n_layer=layers, n_head=4, initializer_range=0.1)
    ).eval()


MODELS = {
    "bloom": bloom_whose_blocks_return_tuples,
    "llama": llama,
    "qwen2": qwen2_with_two_kinds_of_attention,
    "gpt_neox": gpt_neox,
    "opt": opt,
}


def tokens(samples: int = 10, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(1))


def same(first: nn.Module, second: nn.Module) -> bool:
    second = second.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.state_dict().items())


class Spy(Wanda):
    """Wanda that keeps the statistics it was given."""

    name = "spy"

    def __init__(self, needs: str = "norms") -> None:
        self.needs = needs
        self.seen: dict[str, InputStatistics] = {}

    def choose_block(self, inputs):
        assert not torch.is_autocast_enabled("cpu")
        self.seen.update(inputs.statistics)
        yield from super().choose_block(inputs)


def naive_prune(model: nn.Module, criterion: str, pattern: NMPattern, calibration: torch.Tensor) -> None:
    """Whole forwards for each block, statistics in one go."""
    for linear, x in walk_naively(model, 2, calibration):
        statistics = InputStatistics(len(x), x.square().mean(0), x.t() @ x / len(x))
        mask = get_criterion(criterion).mask(linear.weight.detach(), statistics, pattern)
        linear.weight.data = torch.where(mask, linear.weight.data, 0)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_naive_reference_on_the_whole_model(kind, criterion):
    model = MODELS[kind]()
    reference = copy.deepcopy(model)
    naive_prune(reference, criterion, NMPattern("2:4"), tokens())
    report = prune(model, criterion, "2:4", tokens(), progress=False)
    assert len(report.layers) == len(find_weights(model))
    assert same(model, reference)


def test_while_arguments_are_recorded_blocks_hand_on_what_the_model_expects():
    model = bloom_whose_blocks_return_tuples(layers=6)
    assert len(prune(model, "wanda", "2:4", tokens(2), progress=False).layers) == 24


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:5"])
def test_other_patterns_and_tails_equal_the_naive_reference(pattern):
    model = llama()
    reference = copy.deepcopy(model)
    naive_prune(reference, "wanda", NMPattern(pattern), tokens())
    prune(model, "wanda", pattern, tokens(), progress=False)
    assert same(model, reference)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
def test_kept_weights_are_bit_equal_and_pruned_ones_are_plus_zero(criterion):
    model = llama(torch.bfloat16)
    dense = copy.deepcopy(model)
    prune(model, criterion, "2:4", tokens(), progress=False)
    for name, target in find_weights(model).items():
        before, after = dense.get_submodule(name).weight, target.dense()
        kept = after != 0
        assert torch.equal(after[kept], before[kept])
        assert not bool(torch.signbit(after[~kept]).any())
        assert bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    others = {name: value for name, value in dense.state_dict().items() if "_proj" not in name}
    assert others and all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


def test_a_batch_with_padding_gives_the_statistics_of_its_texts_alone():
    lengths = [5, 9, 12]
    texts = [tokens(1, length) for length in lengths]
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : text.shape[1]], mask[row, : text.shape[1]] = text, 1
    alone, together = Spy("hessian"), Spy("hessian")
    prune(llama(), alone, "2:4", [{"input_ids": text} for text in texts], progress=False)
    report = prune(llama(), together, "2:4", [{"input_ids": padded, "attention_mask": mask}], progress=False)
    assert report.tokens == sum(lengths)
    for name, expected in alone.seen.items():
        assert together.seen[name].tokens == sum(lengths)
        torch.testing.assert_close(together.seen[name].hessian, expected.hessian, rtol=1e-4, atol=1e-5)


def test_statistics_are_exact_under_autocast_and_layers_of_one_input_share_them():
    spy = Spy("inputs")
    with torch.autocast("cpu", torch.bfloat16):
        prune(llama(intermediate_size=600), spy, "2:4", tokens(), progress=False)
    for statistics in spy.seen.values():
        x = statistics.inputs.double()
        assert x.shape[0] == statistics.tokens == tokens().numel()
        torch.testing.assert_close(statistics.hessian.double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.squared_norm.double(), x.square().mean(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(statistics.hessian, statistics.hessian.t())
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert spy.seen[attention + "q_proj"] is spy.seen[attention + "k_proj"] is spy.seen[attention + "v_proj"]
    assert spy.seen[mlp + "gate_proj"] is spy.seen[mlp + "up_proj"]
    assert spy.seen[mlp + "gate_proj"] is not spy.seen[attention + "q_proj"]


def test_no_more_is_gathered_than_the_criterion_needs():
    spy = Spy("norms")
    prune(llama(), spy, "2:4", tokens(), progress=False)
    assert all(statistics.hessian is None and statistics.inputs is None for statistics in spy.seen.values())


def test_only_the_hidden_states_of_one_block_are_kept():
    alive = []

    class Counting(Spy):
        name = "counting"

        def choose_block(self, inputs):
            shapes = [x.shape for x in gc.get_objects() if type(x) is torch.Tensor]
            alive.append(shapes.count(torch.Size([8, 19, 32])))
            return super().choose_block(inputs)

    prune(llama(num_hidden_layers=3), Counting(), "2:4", tokens(32, 19), progress=False)
    assert alive == [4, 4, 4]  # 32 samples in batches of 8


def test_criteria_that_need_nothing_run_no_forward(monkeypatch):
    model = llama()
    monkeypatch.setattr(type(model), "forward", None)
    report = prune(model, "magnitude", progress=False)
    assert report.tokens == 0 and report.error_form is None
    assert {layer.relative_error for layer in report.layers} == {None}


def test_the_report_holds_the_exact_error_of_each_layer():
    dense, model, spy = llama(), llama(), Spy("hessian")
    report = prune(model, spy, "2:4", tokens(), progress=False)
    assert (report.criterion, report.pattern, report.tokens, report.error_form) == ("spy", "2:4", 160, "hessian")
    assert prune(llama(), "wanda", "2:4", tokens(), progress=False).error_form == "diagonal"
    for layer in report.layers:
        weight = dense.get_submodule(layer.name).weight.detach().double()
        pruned = model.get_submodule(layer.name).weight.detach().double()
        outputs, lost = (w @ spy.seen[layer.name].hessian.double() for w in (weight, pruned - weight))
        assert layer.relative_error == pytest.approx(
            float((lost * (pruned - weight)).sum() / (outputs * weight).sum()), 1e-4
        )
        assert layer.kept_energy == pytest.approx(float(pruned.square().sum() / weight.square().sum()), 1e-5)
        assert layer.groups == weight.numel() // 4


def test_polish_has_a_lower_error_than_wanda_in_every_layer_of_the_first_block():
    errors = {}
    for criterion in (Spy("hessian"), "polish"):
        report = prune(llama(), criterion, "2:4", tokens(), progress=False)
        errors[report.criterion] = [layer.relative_error for layer in report.layers if "layers.0." in layer.name]
    assert all(polished < start for polished, start in zip(errors["polish"], errors["spy"], strict=True))


# --- nothing half done ----------------------------------------------------------------------------------------------
class FailsLate(Wanda):
    name = "fails_late"

    def __init__(self) -> None:
        self.calls = 0

    def mask(self, weight, statistics, pattern):
        self.calls += 1
        if self.calls == 9:
            raise RuntimeError("late")
        return super().mask(weight, statistics, pattern)


def assert_untouched(model: nn.Module, dense: nn.Module) -> None:
    assert same(model, dense)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "forward" not in module.__dict__


def test_a_failure_in_a_later_block_leaves_the_model_as_it_was():
    model = llama()
    dense = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="late"):
        prune(model, FailsLate(), "2:4", tokens(), progress=False)
    assert_untouched(model, dense)


def test_a_failure_while_masks_are_on_leaves_the_model_as_it_was(monkeypatch):
    model = llama()
    dense = copy.deepcopy(model)
    runs = []

    def fail_on_the_pruned_run(module, args):
        runs.append(not torch.equal(module.weight, dense.model.layers[0].mlp.down_proj.weight))
        if runs[-1]:
            raise RuntimeError("interrupted")

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fail_on_the_pruned_run)
    with pytest.raises(RuntimeError, match="interrupted"):
        prune(model, "wanda", "2:4", tokens(), progress=False)
    handle.remove()
    assert runs[-1] and not runs[0]
    assert_untouched(model, dense)


def test_infinite_inputs_are_an_error_that_names_the_layer():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    dense = copy.deepcopy(model)
    with pytest.raises(NMSparseError, match=r"^model\.layers\.1\.self_attn\.q_proj: its inputs hold NaN or infinite"):
        prune(model, "wanda", "2:4", tokens(), progress=False)
    assert_untouched(model, dense)


def test_modes_and_requires_grad_stay():
    model = llama().train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    prune(model, "wanda", "2:4", tokens(), progress=False)
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    model(tokens(1)).logits.sum().backward()


def bad_masks():
    yield "float", lambda mask: mask.float(), r"got torch\.float32 \[32, 32\], expected a mask torch.bool"
    yield "shape", lambda mask: mask[:, :-4], r"got torch\.bool \[32, 28\], expected a mask torch.bool"
    yield "nothing", lambda mask: None, "got NoneType"
    yield "density", lambda mask: torch.ones_like(mask), "row 0, group 0 keeps 4 weights, expected 2 of 4"


@pytest.mark.parametrize(
    ("spoil", "message"), [case[1:] for case in bad_masks()], ids=[case[0] for case in bad_masks()]
)
def test_a_criterion_that_returns_no_mask_of_the_pattern_is_named(spoil, message):
    class Bad(Wanda):
        name = "bad"

        def mask(self, weight, statistics, pattern):
            return spoil(super().mask(weight, statistics, pattern))

    model = llama()
    dense = copy.deepcopy(model)
    with pytest.raises(PatternError, match=rf"criterion 'bad', layer model\.layers\.0\.self_attn\.q_proj: {message}"):
        prune(model, Bad(), "2:4", tokens(), progress=False)
    assert_untouched(model, dense)


# --- which layers ---------------------------------------------------------------------------------------------------
def test_the_linear_layers_of_the_blocks_are_found_and_nothing_else():
    names = list(find_weights(llama()))
    assert len(names) == 14 and "lm_head" not in names
    assert names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("dense_layers", "left"),
    [
        (["down_proj"], 12),
        ("down_proj", 12),
        (["layers.0.mlp.up_proj"], 13),
        (["model.layers.1.self_attn.q_proj", "mlp"], 7),
        (["layers.0"], 7),
        (["lm_head"], 14),
    ],
)
def test_dense_layers_match_full_names_and_parts(dense_layers, left):
    model = llama()
    dense = copy.deepcopy(model)
    report = prune(model, "magnitude", dense_layers=dense_layers, progress=False)
    changed = {name for name, value in dense.named_parameters() if not torch.equal(model.get_parameter(name), value)}
    assert changed == {f"{layer.name}.weight" for layer in report.layers} and len(changed) == left


def test_dense_layers_that_match_nothing_or_everything_are_refused():
    with pytest.raises(ConfigError, match="dense_layers: 'down' matches no module of LlamaForCausalLM"):
        find_weights(llama(), ["q_proj", "down"])
    with pytest.raises(ConfigError, match=r"no weight left to prune"):
        find_weights(llama(), ["mlp", "self_attn"])


def test_layers_that_share_their_weight_are_left_out():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert [name for name in find_weights(llama()) if name not in find_weights(model)] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_wrapped_and_foreign_layers_are_refused_by_name_unless_left_dense():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["v_proj"], r=2))
    name = r"base_model\.model\.model\.layers\.0\.self_attn\.v_proj"
    with pytest.raises(UnsupportedError, match=rf"{name} is a Linear, not a plain nn\.Linear \(2 such layers\)"):
        prune(wrapped, "magnitude", progress=False)
    assert len(find_weights(wrapped, ["v_proj"])) == 12

    class Quantised(nn.Linear):
        pass

    model = llama()
    model.model.layers[0].mlp.up_proj = Quantised(32, 48)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.up_proj is a Quantised"):
        prune(model, "magnitude", progress=False)


def test_models_without_blocks_are_refused():
    with pytest.raises(UnsupportedError, match="looked for its blocks"):
        prune(nn.Sequential(nn.Linear(8, 8)), "magnitude", progress=False)


def test_calibration_is_asked_for():
    with pytest.raises(ConfigError, match="'wanda' needs calibration data"):
        prune(llama(), "wanda", progress=False)


# --- walk: masks for any kind of layer ------------------------------------------------------------------------------
def targets_of(
    model: nn.Module, names: list[str], masks: dict[str, torch.Tensor], getter: bool = False
) -> list[Target]:
    made = []
    for name in names:
        module = model.get_submodule(name)
        computed = (lambda module=module: module.weight.clone()) if getter else None
        made.append(
            Target(name, module, lambda choice, name=name: masks.__setitem__(name, choice.mask), computed=computed)
        )
    return made


@pytest.mark.parametrize("getter", [False, True], ids=["tensor", "computed"])
def test_walk_hands_out_masks_and_changes_nothing_itself(getter):
    model, pruned, masks = llama(), llama(), {}
    names = list(find_weights(model))
    walk(model, targets_of(model, names, masks, getter), "wanda", "2:4", tokens(), options=QUIET)
    assert_untouched(model, llama())
    prune(pruned, "wanda", "2:4", tokens(), progress=False)
    assert all(torch.equal(masks[name], pruned.get_submodule(name).weight != 0) for name in names)


def test_targets_outside_the_blocks_never_called_or_repeated_are_refused_before_anything_is_applied():
    model, masks = llama(), {}
    names = list(find_weights(model))
    with pytest.raises(UnsupportedError, match=r"^lm_head \(1 such layers\) is outside the blocks 'model\.layers'"):
        walk(model, targets_of(model, [*names, "lm_head"], masks), "wanda", "2:4", tokens(), options=QUIET)
    with pytest.raises(ConfigError, match=r"targets repeat: model\.layers\.0\.self_attn\.q_proj"):
        walk(model, targets_of(model, names[:1] * 2, masks), "wanda", "2:4", tokens(), options=QUIET)
    model.model.layers[1].unused = nn.Linear(8, 8)
    with pytest.raises(UnsupportedError, match=r"^model\.layers\.1\.unused was never called during calibration"):
        walk(
            model,
            targets_of(model, [*names, "model.layers.1.unused"], masks),
            "wanda",
            "2:4",
            tokens(),
            options=QUIET,
        )
    assert masks == {}


def test_a_part_of_the_layers_can_be_targets():
    model, masks, spy = llama(num_hidden_layers=3), {}, Spy()
    ran = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    walk(model, targets_of(model, ["model.layers.1.mlp.up_proj"], masks), spy, "2:4", tokens(), options=QUIET)
    assert list(masks) == list(spy.seen) == ["model.layers.1.mlp.up_proj"]
    assert len(ran) == 2  # the last block is only recorded, once a batch; nothing behind the last target is run


def test_a_criterion_can_choose_the_masks_of_a_block_jointly():
    blocks = []

    class Joint(Criterion):
        name, needs = "joint", "inputs"

        def mask(self, weight, statistics, pattern):
            raise AssertionError("not used")

        def choose_block(self, inputs):
            blocks.append(list(inputs.weights))
            for name in reversed(inputs.weights):
                yield name, Wanda().choose(inputs.weights[name], inputs.statistics[name], inputs.pattern)

    model, reference = llama(), llama()
    prune(model, Joint, "2:4", tokens(), progress=False)
    prune(reference, "wanda", "2:4", tokens(), progress=False)
    assert same(model, reference)
    assert [len(block) for block in blocks] == [7, 7]


def test_a_criterion_that_forgets_a_layer_is_named():
    class Forgetful(Wanda):
        name = "forgetful"

        def choose_block(self, inputs):
            yield from list(super().choose_block(inputs))[1:]

    with pytest.raises(PatternError, match=r"'forgetful' gave no mask for model\.layers\.0\.self_attn\.q_proj"):
        prune(llama(), Forgetful(), "2:4", tokens(), progress=False)


def test_models_that_skip_or_repeat_blocks_are_refused():
    model = llama()
    dense = copy.deepcopy(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedError, match="called 1 of 2 blocks"):
        prune(model, "wanda", "2:4", tokens(), progress=False)
    assert_untouched(model, dense)


def test_models_that_change_hidden_states_between_blocks_are_refused():
    model = llama()
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(UnsupportedError, match=r"changes the hidden states before block model\.layers\.1"):
        prune(model, "wanda", "2:4", tokens(), progress=False)
    handle.remove()
    assert_untouched(model, llama())


def test_every_stack_that_holds_targets_is_walked_and_one_that_is_never_run_is_named():
    model = llama()
    model.extra = nn.ModuleList([nn.Linear(32, 32, bias=False)])
    names = ["model.layers.1.mlp.up_proj", "extra.0"]
    with pytest.raises(UnsupportedError, match=r"^the blocks 'extra' were never called during calibration"):
        walk(model, targets_of(model, names, {}), "wanda", "2:4", tokens(), options=QUIET)
    assert "extra.0" not in find_weights(model)  # of a model without an encoder only the largest stack is pruned
