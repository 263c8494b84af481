# SPDX-License-Identifier: Apache-2.0
"""Callbacks and trainer: schedules, noise under accumulation and resume, metrics, the optimizer group, the prior."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.relaxations import Moment, sampling_state

LENGTH = 16


@pytest.fixture
def windows():
    return torch.randint(0, 64, (32, LENGTH), generator=torch.Generator().manual_seed(11))


def arguments(folder, **changes) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **changes})


def all_logits(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".nmsparse_logits." in n}


def train(model, folder, windows, trainer_class=nms.NMSparseTrainer, callbacks=None, resume=None, **changes):
    trainer = trainer_class(
        model=model, args=arguments(folder, **changes), train_dataset=TokenWindows(windows), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- schedules ------------------------------------------------------------------------------------------------------
def test_schedules_are_linear_and_the_regulariser_is_shared_by_micro_steps():
    config = NMSparseConfig(temperature=(4.0, 0.05), logit_scale=(100.0, 500.0), magnitude_regularization=1e-3)
    start = sampling_state(config, None)
    assert [float(v) for v in start.tensors()] == pytest.approx([4.0, 100.0, 1e-3, 0, 0])
    half = sampling_state(config, Moment(step=50, max_steps=100, draw=3, accumulation=4))
    assert [float(v) for v in half.tensors()] == pytest.approx([2.025, 300.0, 1e-3 / 2 / 4, 50, 3])
    end = sampling_state(config, Moment(step=120, max_steps=100))
    assert [float(v) for v in end.tensors()] == pytest.approx([0.05, 500.0, 0.0, 120, 0])


def test_the_stock_trainer_with_the_callback_follows_max_steps(llama, windows, tmp_path):
    seen = []

    class Spy(nms.MaskScheduleCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            super().on_substep_end(args, state, control, model, **kwargs)
            seen.append(next(iter(mask_layers(model).values())).moments["default"])

        def on_step_begin(self, args, state, control, model, **kwargs):
            super().on_step_begin(args, state, control, model, **kwargs)
            seen.append(next(iter(mask_layers(model).values())).moments["default"])

    model = get_peft_model(llama, NMSparseConfig())
    before = all_logits(model)
    train(model, tmp_path, windows, Trainer, [Spy()], max_steps=2, gradient_accumulation_steps=3)
    assert seen == [Moment(step, 2, draw, 3) for step in range(2) for draw in range(3)]
    assert any(not torch.equal(before[name], value) for name, value in all_logits(model).items())


def test_the_callback_refuses_a_model_without_masks(llama, windows, tmp_path):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="found no trainable mask"):
        train(model, tmp_path, windows, Trainer, [nms.MaskScheduleCallback()], max_steps=1)


def test_logits_in_low_precision_are_warned_about(llama, windows, tmp_path, caplog):
    model = get_peft_model(llama, NMSparseConfig())
    for layer in mask_layers(model).values():
        layer.nmsparse_logits.bfloat16()
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        train(model, tmp_path, windows, max_steps=1)
    assert "less than float32" in caplog.text


# --- frozen, resumable ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_no_base_weight(make_llama, windows, tmp_path, dtype):
    model = get_peft_model(make_llama(dtype), NMSparseConfig())
    before = {n: t.clone() for n, t in model.state_dict().items() if ".nmsparse_" not in n}
    train(model, tmp_path, windows, weight_decay=0.1)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_and_resumed_training_gives_bit_equal_logits(make_llama, windows, tmp_path, accumulation):
    class Killed(Exception):
        pass

    class KillAfter(nms.MaskScheduleCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    changes = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": accumulation}
    whole = get_peft_model(make_llama(), NMSparseConfig())
    train(whole, tmp_path / "whole", windows, **changes)
    with pytest.raises(Killed):
        train(
            get_peft_model(make_llama(), NMSparseConfig()),
            tmp_path / "cut",
            windows,
            callbacks=[KillAfter()],
            **changes,
        )
    resumed = get_peft_model(make_llama(), NMSparseConfig())
    trainer = train(resumed, tmp_path / "cut", windows, resume=True, **changes)
    assert trainer.state.global_step == 6
    expected = all_logits(whole)
    assert all(torch.equal(expected[name], value) for name, value in all_logits(resumed).items())


def test_flip_rate_counts_from_the_start_after_a_resume(make_llama, windows, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    whole = train(get_peft_model(make_llama(), NMSparseConfig()), tmp_path, windows, **changes)
    resumed = train(
        get_peft_model(make_llama(), NMSparseConfig()),
        tmp_path,
        windows,
        resume=str(tmp_path / "checkpoint-4"),
        **changes,
    )
    last = [[line for line in t.state.log_history if "nm/flip_rate" in line][-1] for t in (whole, resumed)]
    assert last[0]["step"] == last[1]["step"] == 6
    assert last[0]["nm/flip_rate"] == last[1]["nm/flip_rate"] > 0


def test_resuming_from_a_published_mask_is_refused(make_llama, windows, tmp_path):
    model = get_peft_model(make_llama(), NMSparseConfig())
    train(model, tmp_path / "run", windows, save_strategy="steps", save_steps=2, max_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    nms.save_mask(model, checkpoint)  # codes over the logits, trainer state still beside them
    fresh = get_peft_model(make_llama(), NMSparseConfig())
    before = all_logits(fresh)
    with pytest.raises(ConfigError, match="contains codes, not logits"):
        train(fresh, tmp_path / "again", windows, resume=str(checkpoint))
    assert all(torch.equal(before[name], value) for name, value in all_logits(fresh).items())


# --- metrics --------------------------------------------------------------------------------------------------------
def test_metrics_are_logged_and_true(llama, windows, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(seed=2))
    start = {name: layer.mask_codes("default") for name, layer in mask_layers(model).items()}
    trainer = train(model, tmp_path, windows, callbacks=[nms.MaskMetricsCallback(eval_tokens=windows[:4])])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    end = {name: layer.mask_codes("default") for name, layer in mask_layers(model).items()}
    flipped = sum(int((start[name] != end[name]).sum()) for name in start) / sum(c.numel() for c in start.values())
    assert lines[-1]["nm/flip_rate"] == pytest.approx(flipped)
    assert flipped > 0
    assert lines[0]["nm/flip_rate"] == lines[0]["nm/flip_rate_last"]
    assert 1 / 6 < lines[0]["nm/max_prob"] <= 1 and 0 <= lines[0]["nm/entropy"] < 2.585
    assert lines[0]["nm/temperature"] > lines[-1]["nm/temperature"]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=windows[:4], labels=windows[:4]).loss.item()
    assert lines[-1]["nm/hard_eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert model.training is False


# --- the trainer's own ----------------------------------------------------------------------------------------------
def test_logits_have_their_own_group_without_weight_decay(llama, windows, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(modules_to_save=["lm_head"]))
    trainer = nms.NMSparseTrainer(
        model=model,
        args=arguments(tmp_path, weight_decay=0.1),
        train_dataset=TokenWindows(windows),
        mask_learning_rate=0.5,
    )
    groups = trainer.create_optimizer().param_groups
    masks = {id(p) for n, p in model.named_parameters() if ".nmsparse_logits." in n}
    owners = [g for g in groups if any(id(p) in masks for p in g["params"])]
    assert len(owners) == 1 and owners[0]["weight_decay"] == 0.0 and owners[0]["lr"] == 0.5
    assert {id(p) for p in owners[0]["params"]} == masks
    assert sum(len(g["params"]) for g in groups) == len(masks) + 1
    assert any(g["weight_decay"] == 0.1 and len(g["params"]) == 1 for g in groups)


@pytest.mark.parametrize(("config", "counts"), [({}, [0, 0, 14]), ({"low_rank": 2}, [28, 0, 14])])
def test_the_optimizer_has_the_groups_of_earlier_checkpoints(llama, windows, tmp_path, config, counts):
    """Torch resumes with as many groups only, and a scheduler takes the rates of a checkpoint by their places."""
    model = get_peft_model(llama, NMSparseConfig(**config))
    trainer = nms.NMSparseTrainer(model=model, args=arguments(tmp_path), train_dataset=TokenWindows(windows))
    assert [len(group["params"]) for group in trainer.create_optimizer().param_groups] == counts


@pytest.mark.parametrize(("learning_rate", "warned"), [(1e-3, True), (1e-2, False)])
def test_a_run_too_short_to_change_any_mask_is_warned_about(llama, windows, tmp_path, caplog, learning_rate, warned):
    model = get_peft_model(llama, NMSparseConfig(prior_strength=3.0))
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        train(model, tmp_path, windows, learning_rate=learning_rate)
    assert ("hardly any mask will change" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "changes", "warned"),
    [
        ({}, {"lr_scheduler_type": "constant", "learning_rate": 0.006}, False),  # 0.036 over 6 steps, the gap is 0.03
        ({}, {"lr_scheduler_type": "linear", "learning_rate": 0.006}, True),  # a little more than half of that
        ({}, {"lr_scheduler_type": "cosine", "learning_rate": 0.011}, False),
        ({}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6, "learning_rate": 0.011}, True),
        ({"prior_confidence": True}, {"lr_scheduler_type": "constant", "learning_rate": 0.0014}, False),  # of 0.0075
        ({"prior_confidence": True}, {"lr_scheduler_type": "constant", "learning_rate": 0.0012}, True),
        ({"prior_strength": 10}, {"lr_scheduler_type": "constant", "learning_rate": 0.006}, True),
        ({}, {"lr_scheduler_type": "linear", "learning_rate": 0.0}, True),
    ],
)
def test_the_warning_goes_by_the_sum_of_the_learning_rates(llama, windows, tmp_path, caplog, options, changes, warned):
    trainer = nms.NMSparseTrainer(
        model=get_peft_model(llama, NMSparseConfig(**options)),
        args=arguments(tmp_path, **changes),
        train_dataset=TokenWindows(windows),
    )
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        trainer.create_optimizer_and_scheduler(6)
    assert ("hardly any mask will change" in caplog.text) == warned


def test_the_warning_knows_a_scheduler_of_the_user_by_its_first_rate(llama, windows, tmp_path, caplog):
    model = get_peft_model(llama, NMSparseConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.006)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = nms.NMSparseTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=1e-5),
        train_dataset=TokenWindows(windows),
        optimizers=(optimizer, scheduler),
    )
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        trainer.create_optimizer_and_scheduler(6)
        assert not caplog.text
        trainer.warn_if_masks_cannot_move(4)
    assert "learning rates of up to 0.006 over 4 steps" in caplog.text


def test_an_optimizer_can_be_created_again_with_other_options(llama, windows, tmp_path):
    trainer = nms.NMSparseTrainer(
        model=get_peft_model(llama, NMSparseConfig(logits_dtype="bfloat16")),
        args=arguments(tmp_path),
        train_dataset=TokenWindows(windows),
        mask_optimizer_states="8bit",
    )
    trainer.create_optimizer()
    assert trainer.optimizer_cls_and_kwargs is None
    trainer.optimizer, trainer.args.learning_rate, trainer.args.adam_beta1 = None, 0.5, 0.7
    again = trainer.create_optimizer()
    assert isinstance(again, nms.MaskAdamW)
    assert {(group["lr"], group["betas"][0], group["states"]) for group in again.param_groups if group["params"]} == {
        (0.5, 0.7, "8bit")
    }


def test_wrong_states_are_refused_before_the_trainer_does_anything(tmp_path):
    def never() -> None:
        raise AssertionError("the model was made")

    with pytest.raises(ConfigError, match="mask_optimizer_states='4bit'"):
        nms.NMSparseTrainer(model_init=never, args=arguments(tmp_path), mask_optimizer_states="4bit")


def test_given_callbacks_are_not_doubled(llama, windows, tmp_path):
    given = [nms.MaskScheduleCallback(), nms.MaskMetricsCallback()]
    trainer = nms.NMSparseTrainer(
        model=get_peft_model(llama, NMSparseConfig()),
        args=arguments(tmp_path),
        train_dataset=TokenWindows(windows),
        callbacks=given,
    )
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(nms.MaskScheduleCallback) == kinds.count(nms.MaskMetricsCallback) == 1
    assert kinds[0] is nms.MaskMetricsCallback


# --- priors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
def test_a_prior_equals_the_one_shot_mask_everywhere(make_llama, windows, criterion):
    pruned = make_llama()
    nms.prune(pruned, criterion, calibration=windows, progress=False)
    model = get_peft_model(make_llama(), NMSparseConfig(prior=criterion))
    before = {n: t.clone() for n, t in model.state_dict().items() if ".nmsparse_" not in n}
    report = nms.set_prior(model, criterion, calibration=windows, progress=False)
    assert len(report.layers) == 14 and model.peft_config["default"].prior == criterion
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.eval()
    assert torch.equal(model(windows).logits, pruned(windows).logits)


def test_prior_logits_are_centred_and_noise_free(make_llama):
    for pattern in ("2:4", "1:4", "2:8"):
        model = get_peft_model(make_llama(), NMSparseConfig(pattern=pattern, prior_strength=3.0))
        logits = mask_layers(model)["model.layers.0.mlp.up_proj"].nmsparse_logits["default"].weight
        torch.testing.assert_close(logits.mean(1), torch.zeros_like(logits[:, 0]), atol=1e-6, rtol=0)
    model = get_peft_model(make_llama(), NMSparseConfig())
    logits = mask_layers(model)["model.layers.0.mlp.up_proj"].nmsparse_logits["default"].weight
    assert {round(v, 4) for v in logits.unique().tolist()} == {-0.03, 0.0, 0.03}  # MaskLLM's shift for 2:4


def test_given_masks_and_published_masks_are_priors_too(make_llama, windows, tmp_path):
    first = get_peft_model(make_llama(), NMSparseConfig(init_weights=False))
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(first).items()}
    nms.save_mask(first, tmp_path / "mask")
    for prior in (masks, tmp_path / "mask", str(tmp_path / "mask")):
        model = get_peft_model(make_llama(), NMSparseConfig(prior=None))
        nms.set_prior(model, prior)
        for name, layer in mask_layers(model).items():
            assert torch.equal(layer.hard_mask("default"), masks[name])


def test_wrong_priors_are_refused_and_change_nothing(make_llama, windows, tmp_path):
    model = get_peft_model(make_llama(), NMSparseConfig())
    before = all_logits(model)
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}
    name = next(iter(masks))
    nms.save_mask(get_peft_model(make_llama(), NMSparseConfig(pattern="1:4")), tmp_path / "other")
    for wrong in (
        {k: v for k, v in masks.items() if k != name},
        {**masks, "nowhere": masks[name]},
        {**masks, name: masks[name][:, :4]},
        {**masks, name: torch.ones_like(masks[name])},
        tmp_path / "other",
    ):
        with pytest.raises(ValueError, match=r"."):
            nms.set_prior(model, wrong)
    with pytest.raises(ConfigError, match="calibration"):
        nms.set_prior(model, "wanda")
    assert all(torch.equal(before[n], value) for n, value in all_logits(model).items())


def test_a_mistyped_criterion_is_named_and_a_merged_mask_is_not_overwritten(make_llama, windows):
    model = get_peft_model(make_llama(), NMSparseConfig())
    with pytest.raises(ConfigError, match="polsh"):
        nms.set_prior(model, "polsh", calibration=windows)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        nms.set_prior(model, "magnitude")


@pytest.mark.parametrize("prior", ["polish", None])
def test_a_prior_may_cover_more_layers_than_the_adapter(make_llama, tmp_path, prior):
    full = get_peft_model(make_llama(), NMSparseConfig(init_weights=False))
    nms.save_mask(full, tmp_path)
    model = get_peft_model(make_llama(), NMSparseConfig(prior=prior, dense_layers=["layers.0"]))
    nms.set_prior(model, tmp_path)
    for name, layer in mask_layers(model).items():
        assert torch.equal(layer.hard_mask("default"), mask_layers(full)[name].hard_mask("default"))


@pytest.mark.slow
def test_a_learned_mask_lowers_the_loss_on_its_training_text(make_llama, tmp_path):
    text = torch.randint(0, 8, (4, LENGTH), generator=torch.Generator().manual_seed(1)).repeat(8, 1)
    model = get_peft_model(make_llama(), NMSparseConfig(temperature=(1.0, 0.1)))
    trainer = train(
        model,
        tmp_path,
        text,
        max_steps=60,
        logging_steps=10,
        callbacks=[nms.MaskMetricsCallback(eval_tokens=text[:4])],
    )
    losses = [line["nm/hard_eval_loss"] for line in trainer.state.log_history if "nm/hard_eval_loss" in line]
    assert losses[-1] < losses[0]
