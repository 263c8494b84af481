# SPDX-License-Identifier: Apache-2.0
"""Training the masks of some layers at a time."""

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
from hf_nmsparse.relaxations import Moment
from hf_nmsparse.training.callbacks import trained_layers

PHASES = [("0:1", 3), (["1:2", "layers.0.mlp.down_proj"], 3)]
EVERY_OTHER_BLOCK = [("0:50%", 2), ("50%:", 2), ("0:1", 2)]


@pytest.fixture
def windows():
    return torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(11))


def arguments(folder, **changes) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **changes})


def logits(model) -> dict[str, torch.Tensor]:
    return {key: layer.nmsparse_logits[name].weight for key, layer, name in trained_layers(model)}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in logits(model).items()}


def moved(before, after) -> set[str]:
    return {key.removesuffix(".default") for key, value in after.items() if not torch.equal(before[key], value)}


class Recorder(nms.MaskPhaseCallback):
    """Notes after each step the logits, which of them have gradients or states, and the moments."""

    def __init__(self, phases):
        super().__init__(phases)
        self.logits, self.gradients, self.states, self.moments = [], [], [], []

    def on_train_begin(self, args, state, control, model, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model, optimizer, **kwargs)
        self.logits.append(snapshot(model))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({key for key, value in logits(model).items() if value.grad is not None})
        self.moments.append({key: layer.moments[name] for key, layer, name in trained_layers(model)})

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.logits.append(snapshot(model))
        self.states.append({key for key, value in logits(model).items() if value in optimizer.state})


def run(model, folder, windows, phases, trainer_class=nms.NMSparseTrainer, resume=None, options=None, **changes):
    recorder = phases if isinstance(phases, nms.MaskPhaseCallback) else Recorder(phases)
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=TokenWindows(windows),
        callbacks=[recorder],
        **(options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


@pytest.mark.parametrize("trainer_class", [nms.NMSparseTrainer, Trainer])
def test_only_the_masks_of_the_phase_learn_and_the_others_hold_nothing(llama, windows, tmp_path, trainer_class):
    model = get_peft_model(llama, NMSparseConfig())
    _, seen = run(model, tmp_path, windows, PHASES, trainer_class)
    names = set(mask_layers(model))
    first = {name for name in names if ".layers.0." in name}
    second = (names - first) | {"model.layers.0.mlp.down_proj"}
    for step, (before, after) in enumerate(zip(seen.logits, seen.logits[1:], strict=False)):
        learning = first if step < 3 else second
        assert moved(before, after) == learning
        with_default = {f"{name}.default" for name in learning}
        assert seen.gradients[step] == with_default
        assert seen.states[step] == with_default  # those of the first phase are freed where the second begins


def test_a_waiting_mask_is_hard_and_what_is_before_it_gets_its_gradient(make_llama, tokens):
    model = get_peft_model(make_llama(), NMSparseConfig()).train()
    layers = mask_layers(model)
    later = [layer for name, layer in layers.items() if ".layers.1." in name]
    nms.set_mask_step(model, 0, 10)
    for layer in later:
        layer.pause("default")
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for name, layer in layers.items():
        parameter = layer.nmsparse_logits["default"].weight
        assert parameter.requires_grad and (parameter.grad is None) == (".layers.1." in name)
        assert layer.is_sampling("default") == (".layers.1." not in name)
    weight = later[0].effective_weight(["default"])
    assert torch.equal(weight, later[0].hard_weight(["default"])) and not weight.requires_grad
    for layer in later:
        layer.pause("default", False)
        assert layer.is_sampling("default")


def test_schedules_run_within_each_phase_and_noise_by_the_step_of_the_run(llama, windows, tmp_path):
    model = get_peft_model(llama, NMSparseConfig())
    _, seen = run(model, tmp_path, windows, PHASES, gradient_accumulation_steps=2)
    early, late = "model.layers.0.mlp.up_proj.default", "model.layers.1.mlp.up_proj.default"
    assert [moments[early] for moments in seen.moments[:3]] == [Moment(step, 3, 1, 2, 0) for step in range(3)]
    assert [moments[late] for moments in seen.moments[3:]] == [Moment(step, 6, 1, 2, 3) for step in range(3, 6)]
    assert seen.moments[4][early].progress == 1 and seen.moments[2][late].progress == 0  # while they wait


def test_the_log_has_the_temperature_of_the_masks_that_learn_and_the_flips_of_all(llama, windows, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(temperature=(4.0, 1.0)))
    trainer, _ = run(model, tmp_path, windows, PHASES)
    lines = [line for line in trainer.state.log_history if "nm/flip_rate" in line]
    assert [line["nm/temperature"] for line in lines] == [4.0, 3.0, 2.0, 4.0, 3.0, 2.0]
    assert lines[-1]["nm/flip_rate"] >= lines[2]["nm/flip_rate"] > 0


@pytest.mark.parametrize(("resample", "checkpoints"), [("micro", [1, 2, 5]), ("step", [3])])
def test_resuming_within_a_phase_or_between_two_is_bit_equal(make_llama, windows, tmp_path, resample, checkpoints):
    changes = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    config = {"relaxation": "elementwise", "logits_dtype": "bfloat16", "resample": resample}
    options = {"mask_optimizer_states": "8bit"}
    whole = get_peft_model(make_llama(), NMSparseConfig(**config))
    run(whole, tmp_path, windows, EVERY_OTHER_BLOCK, options=options, **changes)
    changes["save_strategy"] = "no"
    for step in checkpoints:
        resumed = get_peft_model(make_llama(), NMSparseConfig(**config))
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        _, seen = run(resumed, tmp_path, windows, EVERY_OTHER_BLOCK, resume=checkpoint, options=options, **changes)
        assert len(seen.moments) == 6 - step
        assert not moved(snapshot(whole), snapshot(resumed))
        assert all(".layers.0." in key for key in seen.states[-1])


def test_the_optimizer_may_step_in_the_backward_pass(make_llama, windows, tmp_path):
    found = []
    for in_backward in (False, True):
        model = get_peft_model(make_llama(), NMSparseConfig())
        options = {"optimizer_in_backward": in_backward, "mask_optimizer_states": "float32"}
        run(model, tmp_path, windows, nms.MaskPhaseCallback(PHASES), options=options, max_grad_norm=0)
        found.append(snapshot(model))
    assert not moved(*found)


def test_after_training_everything_is_as_it_was(llama, windows, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(slorb_block=8))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    slorb = {name: value.clone() for name, value in model.state_dict().items() if "slorb" in name}
    run(model, tmp_path, windows, [("0:1", 6)])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any(layer.paused.get("default") for layer in mask_layers(model).values())
    state = model.state_dict()
    assert all(not torch.equal(value, state[name]) for name, value in slorb.items())  # terms train all the time


def test_a_run_that_failed_within_a_phase_leaves_no_mask_waiting_in_the_next(make_llama, windows, tmp_path):
    class Fails(nms.MaskPhaseCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = get_peft_model(make_llama(), NMSparseConfig())
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, windows, Fails(PHASES))
    before = snapshot(model)
    trainer = nms.NMSparseTrainer(
        model=model, args=arguments(tmp_path, max_steps=1), train_dataset=TokenWindows(windows)
    )
    trainer.train()
    assert moved(before, snapshot(model)) == set(mask_layers(model))


def test_a_phase_too_short_to_change_a_mask_is_warned_about(llama, windows, tmp_path, caplog):
    model = get_peft_model(llama, NMSparseConfig())
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        run(model, tmp_path, windows, [("0:1", 5), ("1:2", 1)], lr_scheduler_type="constant")
    assert "over 1 steps" in caplog.text


@pytest.mark.parametrize(
    "phases",
    [[], [("0:1",)], [("0:1", 0)], [("0:1", True)], [([], 3)], [(3, 3)], ["0:1"], [(["a", 2], 3)]],
)
def test_a_phase_of_another_form_is_refused(phases):
    with pytest.raises(ConfigError, match=r"phase is \(layers, steps\)|at least one phase"):
        nms.MaskPhaseCallback(phases)


@pytest.mark.parametrize(
    ("phases", "match"),
    [
        ([("0:1", 5)], "phases have 5 steps, the run has 6"),
        ([("nothing", 6)], "'nothing' means none of the 14 masks"),
        ([("7:9", 6)], "'7:9' means none"),
        ([("a:b", 6)], "expected a range of blocks"),
        ([("embed_tokens", 6)], "means none"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(llama, windows, tmp_path, phases, match):
    model = get_peft_model(llama, NMSparseConfig())
    with pytest.raises(ConfigError, match=match):
        run(model, tmp_path, windows, phases)
    assert not any(layer.paused.get("default") for layer in mask_layers(model).values())


def test_a_model_without_masks_is_refused(llama, windows, tmp_path):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    for phases in ([("0:1", 6)], [("q_proj", 6)]):
        with pytest.raises(ConfigError, match="no mask in training"):
            run(model, tmp_path, windows, phases, Trainer)
