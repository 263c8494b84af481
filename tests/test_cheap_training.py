# SPDX-License-Identifier: Apache-2.0
"""Mask training in few bytes: bfloat16 logits, stochastic rounding, states in one byte, and what a step holds at its peak."""

import copy
import json
import logging
from contextlib import nullcontext

import pytest
import torch
from live_bytes import peak_live_bytes
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.ops.philox import NoiseKey
from hf_nmsparse.ops.rounding import BLOCK, from_codes, random_bits, to_bfloat16, to_codes
from hf_nmsparse.training import optimizers

KEY = NoiseKey(3, 5)
CHEAP = {"relaxation": "elementwise", "logits_dtype": "bfloat16"}


def logits_of(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if ".nmsparse_logits." in n}


def arguments(folder, **changes) -> TrainingArguments:
    values = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    values |= {"logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(**{**values, **changes})


# --- random bits and rounding ---------------------------------------------------------------------------------------
def test_random_bits_depend_on_the_index_alone():
    whole = random_bits(KEY, 7, 0, 4096, "cpu")
    parts = [random_bits(KEY, 7, start, start + 512, "cpu") for start in range(0, 4096, 512)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole[:4].tolist() == random_bits(KEY, 7, 0, 4, "cpu").tolist()
    for other in (random_bits(KEY, 8, 0, 4096, "cpu"), random_bits(NoiseKey(3, 6), 7, 0, 4096, "cpu")):
        assert (whole == other).float().mean() < 0.01
    far = random_bits(KEY, 7, 1 << 36, (1 << 36) + 4096, "cpu")  # indices beyond a word
    assert (whole == far).float().mean() < 0.01
    means = random_bits(KEY, 7, 0, 1 << 18, "cpu").view(-1, 8).double().mean(0)  # each half word of a call
    assert (means / 65536 + 0.5 / 65536).abs().max() < 5 * 0.2887 / (1 << 15) ** 0.5


def test_stochastic_rounding_is_unbiased():
    draws = 1 << 16
    for value in (0.03, -0.03, 1.0001, -3e-5, 1e-40):
        values = torch.full((draws,), value)
        rounded = torch.empty(draws, dtype=torch.bfloat16)
        to_bfloat16(values, random_bits(KEY, 1, 0, draws, "cpu"), rounded)
        below, above = rounded.double().min(), rounded.double().max()
        exact = values[0].double()
        assert below < exact < above and len(rounded.unique()) == 2
        assert abs(rounded.double().mean() - exact) < 4 * (above - below) / 2 / draws**0.5


def test_what_bfloat16_can_hold_is_kept():
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.3895e38, -1e-45 * 2**16]
    held = torch.cat([torch.randn(4089).bfloat16(), torch.tensor(special).bfloat16()]).float()
    held[-3] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN as GPUs write it
    rounded = torch.empty(len(held), dtype=torch.bfloat16)
    to_bfloat16(held, torch.full((len(held),), -1, dtype=torch.int16), rounded)  # the most random bits there are
    assert torch.equal(rounded.float().nan_to_num(7.0), held.nan_to_num(7.0))
    assert rounded[-3].isnan()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_unbiased_fine_near_zero_and_keep_what_they_hold(dtype):
    values = torch.logspace(-5, 0, BLOCK) * 0.02
    if dtype == torch.int8:
        values[::2] *= -1
    draws = 2048
    blocks = values.expand(draws, BLOCK).contiguous()
    codes, scales = torch.empty(draws, BLOCK, dtype=dtype), torch.empty(draws)
    bits = random_bits(KEY, 1, 0, draws * BLOCK, "cpu").view(torch.uint8).view(draws, BLOCK, 2)
    to_codes(blocks, bits[..., 0], codes, scales)
    back = from_codes(codes, scales)
    deviation = back.std(0).double() / draws**0.5
    bias = (back.double().mean(0) - values).abs()
    grid = 0.02 * (2 * codes.float().abs().amax(0) + 1).double() / torch.iinfo(dtype).max ** 2 / 512  # of 8 bits
    assert (bias <= 5 * deviation + grid).all()
    large = values.abs() > 1e-3 * 0.02
    assert (deviation * draws**0.5 / values.abs())[large].max() < 0.3
    again, scales_again = torch.empty_like(codes), torch.empty(draws)
    to_codes(back, bits[..., 1], again, scales_again)
    assert (again == codes).float().mean() > 0.999
    zeros = torch.zeros(2, BLOCK)
    to_codes(zeros, bits[:2, :, 0], codes[:2], scales[:2])
    assert torch.equal(from_codes(codes[:2], scales[:2]), zeros)


# --- the optimizer --------------------------------------------------------------------------------------------------
def run(dtype, states, steps=20, shape=(24, 40), lr=1e-3, optimizer=None, start=0.03):
    draw = torch.Generator().manual_seed(2)
    parameter = torch.nn.Parameter(torch.full(shape, start).to(dtype))
    optimizer = optimizer([parameter]) if optimizer else nms.MaskAdamW([parameter], lr=lr, states=states)
    mean = torch.randn(shape, generator=draw)
    for _ in range(steps):
        parameter.grad = (mean + torch.randn(shape, generator=draw)).to(dtype)
        optimizer.step()
    return parameter.detach(), optimizer


def test_in_float32_it_is_the_adamw_of_torch():
    def reference(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)

    def ours(parameters):
        return nms.MaskAdamW(parameters, lr=1e-3, weight_decay=0.1)

    expected, found = (run(torch.float32, "", optimizer=make, shape=(7, 41))[0] for make in (reference, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_states_of_one_byte_follow_those_of_float32():
    exact, small = (run(torch.float32, states)[0] for states in ("float32", "8bit"))
    assert (exact - 0.03).std() > 5e-3
    assert (exact - small).abs().max() < 0.2 * (exact - 0.03).std()


def test_updates_below_half_a_step_of_bfloat16_add_up():
    lr = 2e-5  # the numbers next to 0.03 are 1.2e-4 away
    exact = run(torch.float32, "float32", lr=lr)[0]
    lost = run(torch.bfloat16, "", optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0))[0]
    assert torch.equal(lost, torch.full_like(lost, 0.03))
    for states in ("float32", "8bit"):
        kept = run(torch.bfloat16, states, lr=lr)[0].float()
        start = float(torch.tensor(0.03).bfloat16())
        moved = exact - torch.tensor(0.03)
        slope = float(((kept - start) * moved).sum() / moved.square().sum())
        assert slope == pytest.approx(1, abs=0.1)


def test_an_update_depends_neither_on_slices_nor_on_the_layout(monkeypatch):
    whole = run(torch.bfloat16, "8bit", steps=3, shape=(40, 36))[0]
    monkeypatch.setattr(optimizers, "_CPU_BLOCKS", 1)
    assert torch.equal(whole, run(torch.bfloat16, "8bit", steps=3, shape=(40, 36))[0])
    turned = torch.nn.Parameter(torch.full((36, 40), 0.03).bfloat16().t())
    straight = torch.nn.Parameter(torch.full((40, 36), 0.03).bfloat16())
    for parameter in (turned, straight):
        optimizer = nms.MaskAdamW([parameter])
        parameter.grad = torch.arange(1440.0).view(40, 36).bfloat16() - 700
        optimizer.step()
    assert torch.equal(turned, straight)


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_a_saved_optimizer_goes_on_bit_for_bit(tmp_path, states):
    original, optimizer = run(torch.bfloat16, states, steps=3)
    parameter = original.clone()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.manual_seed(99)  # the default generator has no say
    copied = torch.nn.Parameter(original.clone())
    other = nms.MaskAdamW([copied], lr=1e-3, states=states)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    grad = torch.randn(parameter.shape).bfloat16()
    for each in (optimizer, other):
        each.param_groups[0]["params"][0].grad = grad
        each.step()
    assert torch.equal(original, copied) and not torch.equal(copied, parameter)
    names = {"mean", "root"} | ({"mean_scale", "root_scale"} if states == "8bit" else set())
    assert {n for n, v in other.state[copied].items() if isinstance(v, torch.Tensor)} == names


def test_wrong_options_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match="states='4bit'"):
        nms.MaskAdamW([parameter], states="4bit")
    with pytest.raises(ConfigError, match="float16"):
        nms.MaskAdamW([torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))])
    with pytest.raises(ConfigError, match="logits_dtype"):
        nms.NMSparseConfig(logits_dtype="float16")


def learned(dtype, make_optimizer, steps=3000, lr=3e-5) -> tuple[float, float]:
    """(Share of the output error of the magnitude mask that is left, share of weights whose place flipped), one layer."""
    draw, pattern = torch.Generator().manual_seed(0), nms.NMPattern("2:4")
    weight = 0.05 * torch.randn(32, 64, generator=draw)
    mix = torch.randn(64, 64, generator=draw) / 8 + 0.3 * torch.eye(64)
    magnitude = ops.top_n_mask(weight.abs(), pattern)
    logits = torch.nn.Parameter((0.03 * (magnitude.float() - 0.5)).to(dtype))
    optimizer = make_optimizer([logits])

    def error(mask: torch.Tensor) -> float:
        return float(((weight * ~mask) @ mix).square().sum())

    for step in range(steps):
        progress, x = step / steps, torch.randn(16, 64, generator=draw) @ mix.t()
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * progress)
        state = ops.SamplingState.of(2 - 1.95 * progress, 100 + 400 * progress, 0.0, step, 0)
        sampled = ops.masked_weight(weight, logits, pattern, KEY, state)
        (x @ (sampled - weight).t()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = ops.codes_to_mask(ops.hard_codes(logits.detach(), pattern, 64), pattern, 64)
    return error(mask) / error(magnitude), float((mask != magnitude).float().mean())


@pytest.mark.slow
def test_a_mask_learned_in_few_bytes_is_as_good_as_one_learned_in_float32():
    def adamw(parameters):
        return torch.optim.AdamW(parameters, weight_decay=0.0)

    exact, _ = learned(torch.float32, adamw)
    cheap, _ = learned(torch.bfloat16, lambda parameters: nms.MaskAdamW(parameters, states="8bit"))
    lost, flipped = learned(torch.bfloat16, adamw)  # rounded to the nearest: no logit moves
    assert exact < 0.8 and abs(cheap - exact) < 0.02
    assert lost == 1 and flipped == 0


# --- logits in bfloat16 ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("relaxation", ["elementwise", "candidates"])
def test_the_dtype_of_logits_survives_prior_saving_and_loading(make_llama, tmp_path, relaxation):
    config = nms.NMSparseConfig(relaxation=relaxation, logits_dtype="bfloat16", slorb_block=8)
    model = get_peft_model(make_llama(), config)
    assert {p.dtype for p in logits_of(model).values()} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if "slorb" in n} == {torch.float32}
    full = mask_layers(get_peft_model(make_llama(), nms.NMSparseConfig(relaxation=relaxation, slorb_block=8)))
    for name, layer in mask_layers(model).items():
        assert torch.equal(layer.mask_codes("default"), full[name].mask_codes("default"))
    nms.set_prior(model, "magnitude")
    with torch.no_grad():
        for parameter in logits_of(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["logits_dtype"] == "bfloat16"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in stored.items() if "nmsparse_logits" in n} == {torch.bfloat16}
    for options in ({"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = logits_of(PeftModel.from_pretrained(make_llama(), tmp_path, **options))
        for name, parameter in logits_of(model).items():
            assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], parameter)
    model.load_adapter(tmp_path, "again")
    assert {p.dtype for p in logits_of(model).values()} == {torch.bfloat16}


def test_a_plan_counts_logits_and_gradients_in_their_dtype(make_llama):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        config = nms.NMSparseConfig(logits_dtype=dtype, relaxation="elementwise", slorb_block=8)
        plan = nms.plan(make_llama(), config)
        model = get_peft_model(make_llama(), copy.deepcopy(config))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert plan.logits_bytes == sum(p.nbytes for p in logits_of(model).values()) == width * plan.pruned_weights
        assert plan.gradient_bytes == sum(p.nbytes for p in trained)
        assert plan.optimizer_bytes == sum(8 * p.numel() for p in trained)


# --- under a Trainer ------------------------------------------------------------------------------------------------
@pytest.fixture
def dataset():
    return TokenWindows(torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(11)))


def test_the_trainer_trains_bfloat16_logits_with_rounding_and_the_rest_in_float32(llama, dataset, tmp_path, caplog):
    model = get_peft_model(llama, nms.NMSparseConfig(slorb_block=8, **CHEAP))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = arguments(tmp_path, weight_decay=0.1, adam_beta2=0.9)
    trainer = nms.NMSparseTrainer(
        model=model, args=args, train_dataset=dataset, mask_learning_rate=0.02, mask_optimizer_states="8bit"
    )
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        trainer.train()
    assert "float32" not in caplog.text
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, nms.MaskAdamW)
    small = [group for group in optimizer.param_groups if group["states"] == "8bit"]
    assert {id(p) for p in small[0]["params"]} == {id(p) for p in logits_of(model).values()}
    assert small[0]["weight_decay"] == 0 and small[0]["initial_lr"] == 0.02 and small[0]["betas"] == (0.9, 0.9)
    assert any(group["weight_decay"] == 0.1 and group["initial_lr"] == 0.01 for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == before[name].dtype and not torch.equal(parameter, before[name])


def test_another_optimizer_is_kept_and_warned_about_once(make_llama, dataset, tmp_path, caplog):
    def warnings_of(trainer_class, **given) -> int:
        model = get_peft_model(make_llama(), nms.NMSparseConfig(**CHEAP))
        optimizer = given.pop("make", None)
        if optimizer is not None:
            given["optimizers"] = (optimizer(logits_of(model).values()), None)
        args = arguments(tmp_path, max_steps=1, **given.pop("changes", {}))
        callbacks = [nms.MaskScheduleCallback()]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_nmsparse.training.callbacks"):
            trainer_class(model=model, args=args, train_dataset=dataset, callbacks=callbacks, **given).train()
        return caplog.text.count("round stochastically")

    assert warnings_of(Trainer) == 1
    assert warnings_of(nms.NMSparseTrainer, changes={"optim": "adafactor"}) == 1
    assert warnings_of(Trainer, make=lambda parameters: nms.MaskAdamW(parameters, states="8bit")) == 0
    assert warnings_of(Trainer, optimizer_cls_and_kwargs=(nms.MaskAdamW, {"lr": 1e-2, "states": "8bit"})) == 0
    assert warnings_of(nms.NMSparseTrainer) == 0
    with pytest.raises(ConfigError, match="mask_optimizer_states"):
        warnings_of(nms.NMSparseTrainer, changes={"optim": "adafactor"}, mask_optimizer_states="8bit")


def test_killed_and_resumed_training_is_bit_equal(make_llama, dataset, tmp_path):
    class Killed(Exception):
        pass

    class KillAfter(nms.MaskScheduleCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    def trainer(folder, callbacks=None):
        args = arguments(
            tmp_path / folder,
            save_strategy="steps",
            save_steps=2,
            bf16=True,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
        )
        model = get_peft_model(make_llama(torch.bfloat16), nms.NMSparseConfig(**CHEAP))
        given = {"model": model, "args": args, "train_dataset": dataset, "callbacks": callbacks}
        return nms.NMSparseTrainer(mask_optimizer_states="8bit", **given)

    whole = trainer("whole")
    whole.train()
    with pytest.raises(Killed):
        trainer("cut", [KillAfter()]).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    expected = logits_of(whole.model)
    found = logits_of(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {p.dtype for p in found.values()} == {torch.bfloat16}
    assert resumed.optimizer.state_dict()["state"][0]["mean"].dtype == torch.int8


def test_an_optimizer_in_the_backward_pass_computes_the_same_and_holds_no_gradient(make_llama, dataset, tmp_path):
    held = []

    class Watch(nms.MaskScheduleCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            held.append(sum(p.grad is not None for p in model.parameters()))

    def trained(name, **given):
        model = get_peft_model(make_llama(torch.bfloat16), nms.NMSparseConfig(slorb_block=8, **CHEAP))
        args = arguments(tmp_path / name, max_grad_norm=0)
        given |= {"train_dataset": dataset, "callbacks": [Watch()]}
        trainer = nms.NMSparseTrainer(model=model, args=args, mask_optimizer_states="8bit", **given)
        trainer.train()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    expected, before = trained("after"), len(held)
    found = trained("in", optimizer_in_backward=True)
    assert min(held[:before]) > 0 and len(held) > before and max(held[before:]) == 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(p._post_accumulate_grad_hooks for p in found.values())


def test_what_an_optimizer_in_the_backward_pass_cannot_do_is_refused(llama, dataset, tmp_path):
    model = get_peft_model(llama, nms.NMSparseConfig(**CHEAP))
    for changes, message in (
        ({}, "max_grad_norm=1.0 needs all gradients"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "adds up gradients"),
        ({"max_grad_norm": 0, "optim": "adafactor"}, "another optimizer"),
    ):
        args = arguments(tmp_path, **changes)
        with pytest.raises(ConfigError, match=message):
            nms.NMSparseTrainer(model=model, args=args, train_dataset=dataset, optimizer_in_backward=True)


# --- memory ---------------------------------------------------------------------------------------------------------
def peak(make_llama, states, in_backward=False) -> int:
    """Bytes at the peak of a step; `states=None`: of a forward and a backward pass of the frozen model."""
    tokens = torch.randint(0, 64, (1, TOKENS))

    def build():
        model = make_llama(torch.bfloat16, **BIG)
        if states is None:
            model.requires_grad_(False)
            model.enable_input_require_grads()
            optimizer = None
        else:
            model = get_peft_model(model, nms.NMSparseConfig(relaxation="elementwise", logits_dtype="bfloat16"))
            model.enable_input_require_grads()
            optimizer = nms.MaskAdamW(logits_of(model).values(), states=states)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

        def step():
            nms.set_mask_step(model, 1, 10)
            with optimizer.step_in_backward() if in_backward else nullcontext():
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return peak_live_bytes(build)


TOKENS = 256
BIG = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 16, "num_key_value_heads": 4}


def test_the_cheapest_setting_takes_at_most_6_bytes_a_weight_above_the_frozen_model(make_llama):
    weights = 16 * (4 * 256**2 + 3 * 256 * 768)
    frozen = peak(make_llama, None)
    assert 2 * weights < frozen < 2.5 * weights  # weights are large against activations
    cheapest = peak(make_llama, "8bit") - frozen
    assert 5 < cheapest / weights <= 6  # and the meter sees logits, gradients and states
    # Beside the logits, which are there before it, a step then makes the states and the gradient of one layer.
    assert 3.5 < (peak(make_llama, "8bit", in_backward=True) - frozen) / weights < 4.5
