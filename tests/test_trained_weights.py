# SPDX-License-Identifier: Apache-2.0
"""What trains weights under masks: the operations, the relaxations `ast`, `pdp`, `bdwp`, `transposable`, `straight_through`,
and their way through Trainer, files and packing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, inputs_for
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import NMSparseConv2d, mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, UnsupportedError
from hf_nmsparse.ops import trained_weights
from hf_nmsparse.relaxations import Moment, get_relaxation

TRAINED = ("ast", "pdp", "bdwp", "transposable")
NAMES = (*TRAINED, "straight_through")
PATTERN = NMPattern("2:4")


@pytest.fixture
def windows():
    return torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(11))


def masked(model, relaxation, **changes) -> PeftModel:
    return get_peft_model(model, NMSparseConfig(pattern="2:4", relaxation=relaxation, **changes))


def train(model, folder, windows, trainer_class=nms.NMSparseTrainer, callbacks=None, resume=None, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(**{**values, **changes})
    trainer = trainer_class(model=model, args=arguments, train_dataset=TokenWindows(windows), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def of_adapter(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "nmsparse_" in name}


def of_base(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "nmsparse_" not in name}


# --- operations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_straight_through_goes_to_all_weights(dtype):
    weight = torch.randn(6, 16, requires_grad=True)
    mask = ops.top_n_mask(weight.detach().abs(), PATTERN)
    value = ops.straight_through(weight, mask, dtype)
    assert value.dtype == dtype and torch.equal(value, (weight * mask).to(dtype))
    grad = torch.randn(6, 16).to(dtype)
    value.backward(grad)
    assert torch.equal(weight.grad, grad.float())


def test_the_gradient_of_scores_is_that_of_the_mask():
    weight, scores = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 16, requires_grad=True)
    mask = ops.top_n_mask(scores.detach(), PATTERN)
    value = ops.straight_through_scores(weight.requires_grad_(), scores, mask)
    assert torch.equal(value, torch.where(mask, weight, 0))
    grad = torch.randn(6, 16, dtype=torch.float64)
    value.backward(grad)
    torch.testing.assert_close(scores.grad, (grad * weight).detach().float())
    assert torch.equal(weight.grad, grad * mask)


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 16), ("1:4", 18), ("2:8", 21), ("3:4", 7)])
def test_pdp_masks_are_above_a_half_for_the_n_largest_of_each_group(pattern, columns):
    pattern, weight = NMPattern(pattern), torch.randn(9, columns)
    mask = ops.top_n_mask(weight.abs(), pattern)
    thresholds = ops.pdp_thresholds(weight, mask, pattern)
    soft = ops.pdp_mask(weight, thresholds, pattern.m, 0.1)
    assert torch.equal(soft > 0.5, mask)
    assert thresholds.shape == (9, pattern.num_groups(columns))


def test_pdp_weights_and_their_gradient_agree_with_finite_differences():
    weight = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    mask = ops.top_n_mask(weight.detach().abs(), PATTERN)
    thresholds = ops.pdp_thresholds(weight, mask, PATTERN)  # held fixed, as the method has it
    value = ops.pdp_weight(weight, thresholds, 4, 0.3, torch.float64)
    t = thresholds.repeat_interleave(4, 1)
    torch.testing.assert_close(
        value, weight * torch.exp(weight**2 / 0.3) / (torch.exp(weight**2 / 0.3) + torch.exp(t**2 / 0.3))
    )
    assert torch.autograd.gradcheck(lambda w: ops.pdp_weight(w, thresholds, 4, 0.3, torch.float64), weight)


@pytest.mark.parametrize("columns", [(1, 1), (5, 1)])
def test_pdp_thresholds_of_a_tensor_or_of_rows(columns):
    weight, thresholds = torch.randn(5, 7, dtype=torch.float64), torch.rand(*columns, dtype=torch.float64)
    expected = torch.sigmoid((weight**2 - thresholds**2) / 0.2)
    torch.testing.assert_close(ops.pdp_mask(weight, thresholds, 7, 0.2), expected)


def test_equal_magnitudes_are_kept_lowest_index_first_once_hard():
    relaxation = get_relaxation("pdp")(PATTERN, ops.NoiseKey.for_layer(0, "layer"))
    parameters = {"nmsparse_weight": torch.tensor([[1.0, -1.0, 1.0, 1.0]])}
    state = ops.SamplingState.of(0.1, 1.0)
    hard = relaxation.effective_weight(torch.zeros(1, 4), parameters, state, hard=True)
    assert hard.tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_two_way_products_use_the_other_weight_backward_and_have_a_dense_weight_gradient(shape):
    make = {"dtype": torch.float64}
    x, bias = torch.randn(*shape, **make, requires_grad=True), torch.randn(6, **make, requires_grad=True)
    forward, backward = torch.randn(6, 8, **make, requires_grad=True), torch.randn(6, 8, **make)
    y = ops.two_way_linear(x, forward, backward, bias)
    torch.testing.assert_close(y, F.linear(x, forward, bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ backward)
    torch.testing.assert_close(forward.grad, torch.einsum("...o,...i->oi", grad, x.detach()))
    torch.testing.assert_close(bias.grad, grad.flatten(0, -2).sum(0))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "same", "groups": 2, "bias": False},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": "valid"},
    ],
)
def test_two_way_convolutions_agree_with_autograd(options):
    layer = nn.Conv2d(8, 4, (3, 2), dtype=torch.float64, **options)
    forward, other = layer.weight, torch.randn_like(layer.weight)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    y = ops.two_way_conv2d(x, forward, other, layer)
    torch.testing.assert_close(y, layer(x))
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    expected = torch.autograd.grad(layer(x), list(layer.parameters()), grad)
    through_other = torch.autograd.grad(torch.func.functional_call(layer, {"weight": other}, (x,)), x, grad)
    for ours, theirs in zip(found, (*through_other, *expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_two_way_products_train_under_autocast(kind):
    layer = nn.Linear(8, 4) if kind == "linear" else nn.Conv2d(8, 4, 3, padding=1)
    x = torch.randn(*((3, 8) if kind == "linear" else (2, 8, 5, 5)), requires_grad=True)
    other = torch.randn_like(layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "linear":
            y = ops.two_way_linear(x, layer.weight, other, layer.bias)
        else:
            y = ops.two_way_conv2d(x, layer.weight, other, layer)
        assert torch.equal(y, layer(x))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (x, *layer.parameters()))


@pytest.mark.parametrize(("n", "count"), [(1, 24), (2, 90), (3, 24)])
def test_masks_of_a_block_are_all_those_with_n_in_each_row_and_column(n, count):
    masks = ops.block_masks(n)
    assert len(masks) == len({tuple(mask.flatten().tolist()) for mask in masks}) == count
    assert bool((masks.sum(1) == n).all()) and bool((masks.sum(2) == n).all())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
def test_transposable_masks_are_the_best_of_their_block(seed, n):
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed))
    mask = ops.transposable_mask(scores, NMPattern(n, 4))
    rows = list(itertools.combinations(range(4), n))
    for top, left in itertools.product(range(0, 8, 4), range(0, 12, 4)):
        block, chosen = scores[top : top + 4, left : left + 4], mask[top : top + 4, left : left + 4]
        assert bool((chosen.sum(0) == n).all()) and bool((chosen.sum(1) == n).all())
        best = max(
            sum(float(block[row, column]) for row, columns in enumerate(choice) for column in columns)
            for choice in itertools.product(rows, repeat=4)
            if all(sum(column in columns for columns in choice) == n for column in range(4))
        )
        assert float((block * chosen).sum()) == pytest.approx(best, rel=1e-6)


def test_large_weights_are_solved_in_slices(monkeypatch):
    scores = torch.rand(23, 32)
    whole = ops.transposable_mask(scores, PATTERN)
    monkeypatch.setattr(trained_weights, "_SLICE", 12)
    assert torch.equal(ops.transposable_mask(scores, PATTERN), whole)


def test_rows_beyond_the_last_block_keep_n_of_their_inputs_and_at_most_n_of_their_outputs():
    mask = ops.transposable_mask(torch.rand(6, 8), PATTERN)
    assert bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all()) and bool((mask[4:].sum(0) <= 2).all())
    with pytest.raises(UnsupportedError, match="multiple of 4"):
        ops.transposable_mask(torch.rand(4, 6), PATTERN)
    with pytest.raises(UnsupportedError, match="n:4"):
        ops.transposable_mask(torch.rand(4, 8), NMPattern("2:8"))


# --- the decay of pruned weights --------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 20), st.sampled_from(["ast", "straight_through"]))
def test_decay_shrinks_pruned_weights_and_leaves_kept_ones(seed, step, name):
    generator = torch.Generator().manual_seed(seed)
    config = NMSparseConfig(relaxation=name, srste_decay=0.5, srste_ramp=0.5)
    relaxation = get_relaxation(name)(PATTERN, ops.NoiseKey.for_layer(0, "layer"))
    base = torch.randn(4, 8, generator=generator)
    parameters = relaxation.parameters(base, config) | relaxation.buffers(base, config)
    relaxation.set_prior(parameters, ops.top_n_codes(base.abs(), PATTERN), config)
    trained = parameters[relaxation.container]
    if name == "straight_through":
        trained += torch.rand(4, 8, generator=generator) / 10
    trained.grad = torch.zeros(4, 8)
    relaxation.add_to_gradients(parameters, config, Moment(step, 20))
    mask = ops.codes_to_mask(relaxation.codes(parameters, 8), PATTERN, 8)
    decay = 0.5 * min(1.0, step / 10)
    torch.testing.assert_close(trained.grad, decay * trained.masked_fill(mask, 0))
    after = trained - 0.1 * trained.grad
    assert torch.equal(after[mask], trained[mask]) and bool((after[~mask].abs() <= trained[~mask].abs()).all())


class GradientsBeforeTheStep(TrainerCallback):
    """Stands last, so it sees what the optimizer will."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def test_the_decay_comes_after_clipping(make_llama, windows, tmp_path):
    seen = []
    for decay in (0.0, 1.0):
        model, watch = masked(make_llama(), "ast", srste_decay=decay, srste_ramp=0.0), GradientsBeforeTheStep()
        schedule = nms.MaskScheduleCallback()
        train(model, tmp_path, windows, callbacks=[schedule, watch], max_steps=1, max_grad_norm=1e-3)
        seen.append(watch.seen[0])
    norm = torch.stack([grad.norm() for grad in seen[0].values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)
    base = masked(make_llama(), "ast")
    for name, layer in mask_layers(base).items():
        key = next(key for key in seen[0] if name in key)
        pruned = layer.base_weight.read().masked_fill(layer.hard_mask("default"), 0)
        torch.testing.assert_close(seen[1][key] - seen[0][key], pruned)


# --- through the Trainer ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_training_packing_and_reloading_give_the_same_outputs(make_llama, windows, tmp_path, name):
    model = masked(make_llama(), name, slorb_block=16, prior_strength=0.1, mask_interval=2)
    before = of_base(model)
    trainer = train(model, tmp_path, windows)
    assert all(torch.equal(value, before[key]) for key, value in of_base(model).items())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["nm/flip_rate"] > 0 and "nm/logit_scale" not in lines[-1]
    assert ("nm/temperature" in lines[-1]) == (name == "pdp")
    model.eval()
    expected = model(windows).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert torch.equal(loaded(windows).logits, expected)
    masks = {key: layer.hard_mask("default") for key, layer in mask_layers(loaded).items()}
    merged = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    for layer in mask_layers(merged).values():
        layer.merge(with_side_branch=False)
        assert torch.equal(layer.base_weight.stored != 0, masks[layer.module_name])
        layer.unmerge()
    with merged.disable_adapter():
        assert torch.equal(merged(windows).logits, make_llama()(windows).logits)
    packed = nms.compress(loaded)
    torch.testing.assert_close(packed(windows).logits, expected, rtol=0, atol=1e-5)
    assert isinstance(packed.model.layers[0].mlp.up_proj, nms.SparseLinear24)


@pytest.mark.parametrize("name", ["ast", "bdwp"])
def test_training_lowers_the_loss_of_the_hard_model(make_llama, name, tmp_path):
    windows = torch.arange(16).repeat(32, 1)  # something that can be learned
    model = masked(make_llama(), name)
    start = model(windows, labels=windows).loss.item()
    train(model, tmp_path, windows, max_steps=20)
    model.eval()
    assert model(windows, labels=windows).loss.item() < 0.9 * start


@pytest.mark.parametrize("name", ["ast", "pdp"])
def test_killed_and_resumed_training_is_bit_equal(make_llama, windows, tmp_path, name):
    changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole = masked(make_llama(), name, mask_interval=2)
    train(whole, tmp_path / "whole", windows, **changes)
    resumed = masked(make_llama(), name, mask_interval=2)
    train(resumed, tmp_path / "again", windows, resume=str(tmp_path / "whole" / "checkpoint-3"), **changes)
    expected, found = of_adapter(whole), of_adapter(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_stock_trainer_with_the_callback_is_enough(make_llama, windows, tmp_path):
    found = []
    for trainer_class, callbacks in ((nms.NMSparseTrainer, None), (Trainer, [nms.MaskScheduleCallback()])):
        model = masked(make_llama(), "ast", srste_decay=0.5)
        train(model, tmp_path, windows, trainer_class, callbacks, weight_decay=0.0)
        found.append(of_adapter(model))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_low_precision_weights_get_the_optimizer_that_rounds_stochastically(make_llama, windows, tmp_path):
    model = masked(make_llama(torch.bfloat16), "ast", logits_dtype="bfloat16")
    trainer = train(model, tmp_path, windows)
    assert isinstance(trainer.optimizer.optimizer, nms.MaskAdamW)
    assert all(layer.mask_parameter("default").dtype == torch.bfloat16 for layer in mask_layers(model).values())


def test_decay_and_an_optimizer_in_the_backward_pass_exclude_each_other(make_llama, windows, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_grad_norm=0, report_to="none", use_cpu=True)
    with pytest.raises(ConfigError, match="srste_decay"):
        nms.NMSparseTrainer(
            model=masked(make_llama(), "ast"),
            args=arguments,
            train_dataset=TokenWindows(windows),
            optimizer_in_backward=True,
        )


# --- ast ----------------------------------------------------------------------------------------------------------------
def test_masks_are_renewed_at_their_interval_only(make_llama):
    model = masked(make_llama(), "ast", mask_interval=3).train()
    layer = next(iter(mask_layers(model).values()))
    first = layer.hard_mask("default")
    with torch.no_grad():
        layer.nmsparse_weight["default"].weight.copy_(torch.randn(layer.out_features, layer.in_features))
    renewed = ops.top_n_mask(layer.nmsparse_weight["default"].weight.detach().abs(), PATTERN)
    for step, expected in ((1, first), (2, first), (3, renewed)):
        nms.set_mask_step(model, step, 10)
        assert torch.equal(layer.hard_mask("default"), expected)


def test_wanda_masks_stay_wanda_masks(make_llama, windows):
    model = masked(make_llama(), "ast", prior=None)
    with pytest.raises(ConfigError, match="set_prior"):
        model(windows)
    nms.set_prior(model, "wanda", calibration=windows)
    before = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    model.train()
    nms.set_mask_step(model, 0, 10)
    layers = mask_layers(model)
    assert all(torch.equal(layers[name].hard_mask("default"), mask) for name, mask in before.items())
    magnitude = [ops.top_n_mask(layer.base_weight.read().abs(), PATTERN) for layer in layers.values()]
    assert not all(torch.equal(mask, other) for mask, other in zip(before.values(), magnitude, strict=True))


def test_weights_are_trained_under_a_given_mask(make_llama, windows, tmp_path):
    with pytest.raises(ConfigError, match="mask_interval=None"):
        nms.set_prior(masked(make_llama(), "ast", prior=None), "polish", calibration=windows)
    model = masked(make_llama(), "ast", prior=None, mask_interval=None)
    nms.set_prior(model, "polish", calibration=windows)
    before = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    start = of_adapter(model)
    train(model, tmp_path, windows)
    for name, layer in mask_layers(model).items():
        assert torch.equal(layer.hard_mask("default"), before[name])
    assert any(not torch.equal(value, start[key]) for key, value in of_adapter(model).items() if "weight" in key)


# --- bdwp ---------------------------------------------------------------------------------------------------------------
def test_bdwp_computes_inputs_gradients_with_the_mask_of_the_outputs():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 12, dtype=torch.float64))
    weight = model[0].weight.detach().clone()
    model = get_peft_model(
        model, NMSparseConfig(relaxation="bdwp", target_modules=["0"]), autocast_adapter_dtype=False
    )
    model.train()
    layer = next(iter(mask_layers(model).values()))
    layer.nmsparse_weight["default"].weight.data = weight.clone()  # float64
    nms.set_mask_step(model, 0, 10)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    along_inputs = ops.top_n_mask(weight.abs(), PATTERN)
    along_outputs = ops.top_n_mask(weight.abs().t().contiguous(), PATTERN).t()
    torch.testing.assert_close(y, F.linear(x, weight * along_inputs, layer.base_layer.bias))
    torch.testing.assert_close(x.grad, grad @ (weight * along_outputs))
    torch.testing.assert_close(layer.nmsparse_weight["default"].weight.grad, grad.t() @ x.detach())


@pytest.mark.parametrize("name", ["bdwp", "transposable"])
def test_sparse_weights_are_made_once_a_step(make_llama, windows, monkeypatch, name):
    made = []
    relaxation = get_relaxation(name)
    original = relaxation._mask
    monkeypatch.setattr(relaxation, "_mask", lambda *given: made.append(1) or original(*given))
    model = masked(make_llama(), name).train()
    for step in range(2):
        nms.set_mask_step(model, step, 10)
        made.clear()
        for draw in range(3):
            nms.set_mask_step(model, step, 10, draw, 3)
            model(windows[:2], labels=windows[:2]).loss.backward()
        assert len(made) == 14
        torch.optim.SGD(model.parameters(), 0.1).step()


# --- convolutions -------------------------------------------------------------------------------------------------------
class Pictures(nn.Module):
    """A small convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding="same")
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("name", ["candidates", "elementwise", *NAMES])
def test_groups_of_a_convolution_run_along_its_input_channels(name):
    net, x = Pictures(), torch.randn(3, 1, 6, 6)
    model = get_peft_model(net, NMSparseConfig(pattern="1:4", relaxation=name, target_modules=["second"]))
    assert isinstance(net.second, NMSparseConv2d)
    model.train()
    nms.set_mask_step(model, 0, 10)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if p.requires_grad)
    model.eval()
    expected = model(x)
    plain = model.merge_and_unload()
    kept = plain.second.weight.unflatten(1, (-1, 4)) != 0  # [out, channel groups, 4, height, width]
    assert bool((kept.sum(2) == 1).all())
    torch.testing.assert_close(plain(x), expected)


def test_the_published_mask_of_a_convolution_reloads(tmp_path):
    def config(**changes):
        return NMSparseConfig(pattern="2:4", target_modules=["second", "head"], **changes)

    torch.manual_seed(3)
    net = Pictures()
    state = net.state_dict()
    model = get_peft_model(net, config(init_weights=False))
    x = torch.randn(3, 1, 6, 6)
    expected = model.eval()(x)
    nms.save_mask(model, tmp_path / "mask")
    other = Pictures()
    other.load_state_dict(state)
    torch.testing.assert_close(nms.load_mask(other, tmp_path / "mask").eval()(x), expected)


def test_convolutions_whose_groups_would_straddle_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="first has 1 input channels"):
        get_peft_model(Pictures(), NMSparseConfig(target_modules=["first"]))
    with pytest.raises(UnsupportedError, match="second is a convolution"):
        get_peft_model(Pictures(), NMSparseConfig(target_modules=["second"], low_rank=2))


# --- refusals -----------------------------------------------------------------------------------------------------------
def test_what_does_not_go_with_trained_weights_is_refused(make_llama, tmp_path):
    with pytest.raises(ConfigError, match="delta_rank"):
        NMSparseConfig(relaxation="ast", delta_rank=2)
    with pytest.raises(ConfigError, match="prior='wanda'"):
        NMSparseConfig(relaxation="pdp", prior="wanda")
    with pytest.raises(ConfigError, match="mask_interval"):
        NMSparseConfig(relaxation="ast", mask_interval=0)
    with pytest.raises(ConfigError, match="srste_decay"):
        NMSparseConfig(relaxation="ast", srste_decay=-1.0)
    model = masked(make_llama(), "ast")
    with pytest.raises(ConfigError, match="codes only"):
        nms.save_mask(model, tmp_path / "mask")
    model.add_adapter("other", NMSparseConfig())
    with pytest.raises(UnsupportedError, match="weights of its own"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match="cannot be active together"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="has no prior"):
        nms.set_prior(masked(make_llama(), "bdwp"), "magnitude")


@pytest.mark.parametrize("name", ["ast", "pdp", "transposable"])
def test_experts_are_trained_too_but_not_by_two_way_products(name):
    model = FAMILIES["mixtral"]()
    inputs = inputs_for("mixtral")
    masked_experts = masked(model, name).train()
    nms.set_mask_step(masked_experts, 0, 10)
    masked_experts(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {n: p for n, p in masked_experts.named_parameters() if ".nmsparse_weight." in n and "experts" in n}
    assert found and all(p.grad is not None and bool(p.grad.any()) for p in found.values())
    with pytest.raises(UnsupportedError, match="target_parameters"):
        masked(FAMILIES["mixtral"](), "bdwp")


def test_trained_weights_load_without_a_copy_of_their_own_first(make_llama, windows, tmp_path):
    model = masked(make_llama(), "ast")
    train(model, tmp_path, windows, max_steps=2)
    expected = model.eval()(windows).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(loaded(windows).logits, expected)


def test_a_trained_weight_is_refused_on_another_base(make_llama, windows, tmp_path):
    masked(make_llama(), "ast").save_pretrained(tmp_path / "adapter")
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(BaseModelMismatchError, match="up_proj"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")(windows)
