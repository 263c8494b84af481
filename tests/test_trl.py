# SPDX-License-Identifier: Apache-2.0
"""The stock trainers of trl train masks: `peft_config=` and the schedule callback are all that is needed."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ScheduleError

WORDS = [f"w{index}" for index in range(60)]
TERMS = {"slorb_block": 8, "delta_rank": 2}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<pad>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def sentence(start: int, length: int = 8) -> str:
    return " ".join(WORDS[(start + 3 * index) % len(WORDS)] for index in range(length))


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_dict({"text": [sentence(index) for index in range(16)]})


@pytest.fixture
def preferences() -> Dataset:
    rows = range(16)
    return Dataset.from_dict(
        {
            "prompt": [sentence(row, 4) for row in rows],
            "chosen": [" " + sentence(row + 12, 4) for row in rows],
            "rejected": [" " + sentence(row + 31, 4) for row in rows],
        }
    )


class Watch(TrainerCallback):
    """Notes, before each step and between the micro-steps, the moment that every adapter of the model was told."""

    def __init__(self) -> None:
        self.moments: list[dict[str, tuple[int, int]]] = []

    def _note(self, model) -> None:
        layer = next(iter(mask_layers(model).values()))
        self.moments.append({name: (moment.step, moment.draw) for name, moment in layer.moments.items()})

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        self._note(model)

    def on_substep_end(self, args, state, control, model, **kwargs) -> None:
        self._note(model)


def options(folder, **changes) -> dict:
    common = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return {**common, **changes}


def sft(model, tokenizer, texts, folder, callbacks=None, peft_config=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model,
        args=SFTConfig(max_length=16, **options(folder, **changes)),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def dpo(model, tokenizer, preferences, folder, callbacks=None, peft_config=None, **changes) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=DPOConfig(max_length=16, **options(folder, **changes)),
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def logits_of(model, adapter: str) -> dict[str, torch.Tensor]:
    part = f".nmsparse_logits.{adapter}."
    return {name.replace(part, "."): p.detach().clone() for name, p in model.named_parameters() if part in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- SFTTrainer ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "terms", [pytest.param({}, id="mask", marks=pytest.mark.slow), pytest.param(TERMS, id="terms")]
)
def test_sft_trains_saves_and_reloads_a_mask(base_folder, tokenizer, texts, tokens, tmp_path, terms):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch()
    config = NMSparseConfig(init_weights=False, task_type="CAUSAL_LM", **terms)
    callbacks = [nms.MaskScheduleCallback(), watch]
    trainer = sft(
        model, tokenizer, texts, tmp_path, callbacks, config, gradient_accumulation_steps=2, save_strategy="steps"
    )
    start = logits_of(trainer.model, "default")
    trainer.train()
    assert not same(logits_of(trainer.model, "default"), start)
    assert watch.moments == [{"default": (step, draw)} for step in range(3) for draw in range(2)]
    for name, value in trainer.model.get_base_model().state_dict().items():
        if ".nmsparse_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])

    expected = trainer.model.eval()(input_ids=tokens).logits
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "adapter")
    assert torch.equal(again(input_ids=tokens).logits, expected)
    published = nms.save_mask(trainer.model, tmp_path / "mask")
    loaded = nms.load_mask(AutoModelForCausalLM.from_pretrained(base_folder), published)
    assert torch.equal(loaded(input_ids=tokens).logits, expected)


@pytest.mark.slow
def test_sft_resumes_from_its_checkpoint_with_the_same_numbers(make_llama, tokenizer, texts, tmp_path):
    def trainer(folder, **changes):
        config = NMSparseConfig(init_weights=False)
        callbacks = [nms.MaskScheduleCallback()]
        return sft(make_llama(), tokenizer, texts, folder, callbacks, config, max_steps=4, **changes)

    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(logits_of(resumed.model, "default"), logits_of(whole.model, "default"))


def test_sft_without_the_callback_says_what_to_add(llama, tokenizer, texts, tmp_path):
    trainer = sft(llama, tokenizer, texts, tmp_path, peft_config=NMSparseConfig())
    with pytest.raises(ScheduleError, match=r"add callbacks=\[nms\.MaskScheduleCallback\(\)\] to the Trainer"):
        trainer.train()


@pytest.mark.slow
def test_sft_checkpointing_gives_the_same_losses(make_llama, tokenizer, texts, tmp_path):
    losses = []
    for checkpointing in (False, True):
        config, callbacks = NMSparseConfig(init_weights=False), [nms.MaskScheduleCallback()]
        trainer = sft(
            make_llama(), tokenizer, texts, tmp_path, callbacks, config, gradient_checkpointing=checkpointing
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) > 1


def test_masks_over_a_quantised_base_train_in_float32(make_llama, tokenizer, texts, tmp_path, caplog):
    """trl casts everything that trains over a quantised base to bfloat16, in which most updates of logits are lost."""
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        trainer = sft(base, tokenizer, texts, tmp_path, [nms.MaskScheduleCallback()], NMSparseConfig(**TERMS))
    assert "trained in float32 again" in caplog.text
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    start = logits_of(trainer.model, "default")
    trainer.train()
    assert not same(logits_of(trainer.model, "default"), start)


# --- DPOTrainer ---------------------------------------------------------------------------------------------------------
def test_dpo_with_a_fresh_mask_refers_to_the_dense_model(make_llama, tokenizer, preferences, tokens, tmp_path):
    config = NMSparseConfig(init_weights=False)
    trainer = dpo(make_llama(), tokenizer, preferences, tmp_path, [nms.MaskScheduleCallback()], config)
    assert set(trainer.model.peft_config) == {"default"}
    start = logits_of(trainer.model, "default")
    trainer.train()
    assert not same(logits_of(trainer.model, "default"), start)
    with use_adapter(trainer.model, None):  # what trl does for the reference
        reference = trainer.model.eval()(input_ids=tokens).logits
    assert torch.equal(reference, make_llama()(input_ids=tokens).logits)


@pytest.fixture
def learned(make_llama) -> PeftModel:
    """A mask (and terms) that were trained before: far from its prior, every tensor arbitrary."""
    model = get_peft_model(make_llama(), NMSparseConfig(**TERMS))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_reference_of_dpo_is_a_frozen_copy_of_the_learned_mask(learned, tokenizer, preferences, tokens, tmp_path):
    expected = learned.eval()(input_ids=tokens).logits
    watch = Watch()
    callbacks = [nms.MaskScheduleCallback(), watch]
    trainer = dpo(learned, tokenizer, preferences, tmp_path, callbacks, gradient_accumulation_steps=2)
    model = trainer.model
    assert set(model.peft_config) == {"default", "ref"}
    start = logits_of(model, "default")
    assert start and same(logits_of(model, "ref"), start)
    with use_adapter(model, "ref"):
        assert torch.equal(model.eval()(input_ids=tokens).logits, expected)

    trainer.train()
    assert watch.moments == [{"default": (step, draw), "ref": (step, draw)} for step in range(3) for draw in range(2)]
    assert same(logits_of(model, "ref"), start) and not same(logits_of(model, "default"), start)
    with use_adapter(model, "ref"):
        assert torch.equal(model.eval()(input_ids=tokens).logits, expected)
    assert not torch.equal(model(input_ids=tokens).logits, expected)
    assert model.active_adapters == ["default"]
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training and all(".default." in name for name in training)


def test_before_the_first_step_policy_and_reference_of_dpo_agree(learned, tokenizer, preferences, tmp_path):
    """Both draw the same noise at the same step, so that the reward margin is 0 and not that of two samples."""
    trainer = dpo(learned, tokenizer, preferences, tmp_path, [nms.MaskScheduleCallback()], max_steps=1)
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)


def test_adapters_from_one_config_object_share_no_state(learned, tokenizer, preferences, tmp_path):
    trainer = dpo(learned, tokenizer, preferences, tmp_path, [nms.MaskScheduleCallback()], max_steps=1)
    for layer in mask_layers(trainer.model).values():
        for container in (layer.nmsparse_logits, layer.nmsparse_slorb, layer.nmsparse_delta_a):
            assert container["default"].weight.data_ptr() != container["ref"].weight.data_ptr()
        assert layer.relaxations["default"] is not layer.relaxations["ref"]
    nms.set_mask_step(trainer.model, 1, 4)
    layer = mask_layers(trainer.model)["model.layers.0.mlp.up_proj"]
    layer.set_moment("ref", None)
    assert "ref" not in layer.moments and layer.moments["default"].step == 1


def test_a_published_mask_is_no_policy_to_train(learned, make_llama, tokenizer, preferences, tmp_path):
    model = nms.load_mask(make_llama(), nms.save_mask(learned, tmp_path / "mask"))
    with pytest.raises(ValueError, match="no trainable mask"):
        dpo(model, tokenizer, preferences, tmp_path, [nms.MaskScheduleCallback()]).train()
