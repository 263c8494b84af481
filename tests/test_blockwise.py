# SPDX-License-Identifier: Apache-2.0
"""Masks learned block by block: better than their prior, nothing but logits changed, resumed to the bit."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, inputs_for
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import windows
from hf_nmsparse.errors import ConfigError, FormatError, NMSparseError, UnsupportedError
from hf_nmsparse.training import one_block
from hf_nmsparse.training.callbacks import hard_mask_loss

TINY = Path(__file__).parent / "tiny_llama"


def masked(model, **config):
    return get_peft_model(model, nms.NMSparseConfig(**config)).eval()


@pytest.fixture
def make_llama(make_llama):
    """As elsewhere, but its weights are so large that each block changes much."""
    return partial(make_llama, initializer_range=0.2)


@pytest.fixture
def llama(make_llama):
    return make_llama()


def learn(model, tokens, **options):
    options = {"steps": 8, "batch_size": 2, "learning_rate": 6e-3, "progress": False, **options}
    return nms.learn_blockwise(model, tokens, **options)


def logits_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".nmsparse_logits." in name}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def block_of(logits: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in logits.items() if f"layers.{index}." in name}


@contextmanager
def nothing_else_changes(model):
    """Whatever happens inside: only logits may differ, and every setting is as it was."""

    def settings() -> dict[str, object]:
        layers = mask_layers(model).values()
        return {
            "training": [module.training for module in model.modules()],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            "forwards": ["forward" in vars(module) for module in model.modules()],
            "moments": [dict(layer.moments) for layer in layers],
            "configs": [{name: id(config) for name, config in layer.configs.items()} for layer in layers],
            "disabled": [layer.disable_adapters for layer in layers],
            "gradients": [parameter.grad is None for parameter in model.parameters()],
        }

    def others() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items() if ".nmsparse_logits." not in name}

    before, tensors = settings(), others()
    try:
        yield
    finally:
        assert settings() == before
        assert equal(others(), tensors)


@contextmanager
def raising_at(step: int, error: BaseException, monkeypatch):
    """The given step, counted over all blocks, raises after the optimizer has stepped."""
    original, done = one_block.Block._step, []

    def failing(*args, **kwargs):
        loss = original(*args, **kwargs)
        done.append(loss)
        if len(done) == step + 1:
            raise error
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(one_block.Block, "_step", failing)
        yield


# --- what it is for -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_the_model_is_better_than_under_its_magnitude_prior(inputs):
    model = masked(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32))
    train, test = (
        torch.from_numpy(np.load(TINY / f"{part}_tokens.npy").astype(np.int64)) for part in ("train", "test")
    )
    held_out = windows(test, 128)[:24]
    before = hard_mask_loss(model, held_out)
    calibration = windows(train, 128, samples=16)
    with nothing_else_changes(model):
        report = learn(model, calibration, steps=16, batch_size=2, learning_rate=8e-3, inputs=inputs)
    after = hard_mask_loss(model, held_out)
    with model.disable_adapter():
        dense = hard_mask_loss(model, held_out)
    assert dense < after < before - 0.1 * (before - dense)
    assert [block.name for block in report.blocks] == [f"model.layers.{index}" for index in range(4)]
    assert all(block.improved and block.error_after < block.error_before for block in report.blocks)
    assert all(0 < block.changed < 0.5 for block in report.blocks)
    assert report.tokens == 16 * 128


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_and_keeps_all_but_its_logits(name):
    batches = [inputs_for(name, seed=seed) for seed in range(6)]
    model = masked(FAMILIES[name](), relaxation="elementwise")
    before = logits_of(model)
    with nothing_else_changes(model):
        report = learn(model, batches, steps=12)
    assert len(report.blocks) == (4 if name in ("t5", "whisper") else 2)
    after = logits_of(model)
    for block in report.blocks:
        mine = [key for key in after if f".{block.name}." in key]
        assert mine
        assert any(not torch.equal(after[key], before[key]) for key in mine) == block.improved
    assert any(block.improved for block in report.blocks)


@pytest.mark.parametrize("config", [{"logits_dtype": "bfloat16"}, {"resample": "step"}, {"pattern": "1:4"}])
def test_it_learns_other_logits_too_and_bfloat16_models(make_llama, tokens, config):
    model = masked(make_llama(dtype=torch.bfloat16), **config)
    before = logits_of(model)
    with nothing_else_changes(model):
        report = learn(model, tokens)
    assert any(block.improved for block in report.blocks)
    after = logits_of(model)
    assert not equal(before, after)
    assert all(value.dtype == before[name].dtype for name, value in after.items())


def test_the_second_block_learns_to_give_the_dense_output_from_what_the_first_masked_one_gives(
    make_llama, tokens, monkeypatch
):
    seen = {}

    def note(self, streams, judges, settings, on_step):
        seen[self.index] = [(stream.masked.hidden, stream.dense.hidden) for stream in streams]
        return original(self, streams, judges, settings, on_step)

    original = one_block.Block.learn
    monkeypatch.setattr(one_block.Block, "learn", note)
    for inputs in ("pruned", "dense"):
        model = masked(make_llama())
        learn(model, tokens, inputs=inputs)
        first = torch.cat([hidden for hidden, _ in seen[1]])
        target = torch.cat([hidden for _, hidden in seen[1]])
        with torch.no_grad(), model.disable_adapter():
            dense = model(tokens, output_hidden_states=True).hidden_states
        with torch.no_grad():
            pruned = model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(first, (pruned if inputs == "pruned" else dense)[1][: len(first)])
        # The last hidden states of Transformers are behind the norm.
        with torch.no_grad():
            torch.testing.assert_close(model.get_base_model().model.norm(target), dense[2][: len(target)])


def test_padding_has_no_part_in_what_is_learned(make_llama, tokens):
    mask = torch.ones_like(tokens)
    mask[:, 12:] = 0
    found = []
    for filler in (1, 2):
        model = masked(make_llama())
        padded = torch.where(mask.bool(), tokens, filler)
        report = learn(
            model,
            [
                {"input_ids": ids, "attention_mask": real}
                for ids, real in zip(padded.split(2), mask.split(2), strict=True)
            ],
        )
        assert report.tokens == int(mask.sum())
        found.append(logits_of(model))
    assert equal(*found)


# --- safeguards -----------------------------------------------------------------------------------------------------
def test_a_block_that_does_not_improve_has_its_old_logits(llama, tokens, monkeypatch):
    errors = iter([0.5, 0.4, 0.3, 0.3])
    monkeypatch.setattr(one_block.Block, "hard_error", lambda self, judges: next(errors))
    model = masked(llama)
    before = logits_of(model)
    report = learn(model, tokens)
    assert [block.improved for block in report.blocks] == [True, False]
    assert [(block.error_before, block.error_after) for block in report.blocks] == [(0.5, 0.4), (0.3, 0.3)]
    after = logits_of(model)
    assert not equal(block_of(before, 0), block_of(after, 0))
    assert equal(block_of(before, 1), block_of(after, 1))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_after_a_failure_finished_blocks_are_learned_and_the_others_as_they_were(llama, tokens, monkeypatch, error):
    model = masked(llama)
    before = logits_of(model)
    with nothing_else_changes(model), pytest.raises(type(error)), raising_at(10, error, monkeypatch):
        learn(model, tokens)
    after = logits_of(model)
    assert not equal(block_of(before, 0), block_of(after, 0))
    assert equal(block_of(before, 1), block_of(after, 1))


def test_a_loss_that_is_not_finite_stops_it_naming_the_block(llama, tokens, monkeypatch):
    model = masked(llama)
    before = logits_of(model)
    original = one_block.Stream.error
    broken = lambda self, output: original(self, output) * (torch.nan if output.requires_grad else 1)  # noqa: E731
    monkeypatch.setattr(one_block.Stream, "error", broken)
    with (
        nothing_else_changes(model),
        pytest.raises(NMSparseError, match=r"model.layers.0: the loss is nan at step 0 of 8"),
    ):
        learn(model, tokens)
    assert equal(before, logits_of(model))


def test_a_dense_block_that_overflows_is_named(llama, tokens):
    model = masked(llama)
    with torch.no_grad():
        model.get_base_model().model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(NMSparseError, match=r"model.layers.1: the dense block gives NaN or infinity"):
        learn(model, tokens)


def test_only_masks_that_can_be_trained_are_taken(make_llama, tokens):
    with pytest.raises(ConfigError, match="expected one active mask adapter, found none"):
        learn(make_llama(), tokens)
    with pytest.raises(ConfigError, match="has no mask yet"):
        learn(masked(make_llama(), prior="wanda"), tokens)
    with pytest.raises(ConfigError, match="trains the weight itself"):
        learn(masked(make_llama(), relaxation="ast"), tokens)
    merged = masked(make_llama())
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="is merged into the weights"):
        learn(merged, tokens)
    frozen = masked(make_llama())
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="is frozen"):
        learn(frozen, tokens)
    several = masked(make_llama())
    several.add_adapter("other", nms.NMSparseConfig())
    with pytest.raises(ConfigError, match="must be the only active mask"):
        learn(several, tokens, adapter_name="other")
    disabled = masked(make_llama())
    disabled.base_model.disable_adapter_layers()
    for parameter in (p for name, p in disabled.named_parameters() if ".nmsparse_" in name):
        parameter.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="does not depend on the logits"):
        learn(disabled, tokens)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"inputs": "sparse"}, "inputs='sparse'"),
        ({"batch_size": 8}, "gives 1 batch of batch_size=8"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(llama, tokens, option, words):
    with pytest.raises(ConfigError, match=words):
        learn(masked(llama), tokens, **option)


# --- the same again -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [{}, {"logits_dtype": "bfloat16", "relaxation": "elementwise"}])
def test_a_killed_run_goes_on_to_the_bit(make_llama, tokens, tmp_path, monkeypatch, config):
    whole = masked(make_llama(), **config)
    expected = learn(whole, tokens)
    killed = masked(make_llama(), **config)
    with pytest.raises(KeyboardInterrupt), raising_at(12, KeyboardInterrupt(), monkeypatch):
        learn(killed, tokens, checkpoint_folder=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.layers.0.safetensors", "run.json"]
    original, steps = one_block.Block._step, []
    monkeypatch.setattr(one_block.Block, "_step", lambda *args: steps.append(args[0].index) or original(*args))
    for model in (masked(make_llama(), **config), killed):  # a new process, or the same one again
        torch.manual_seed(model is killed)
        report = learn(model, tokens, checkpoint_folder=tmp_path / "run")
        assert equal(logits_of(model), logits_of(whole))
        for found, wanted in zip(report.blocks, expected.blocks, strict=True):
            assert dataclasses.replace(found, seconds=0) == dataclasses.replace(wanted, seconds=0)
    assert steps == [1] * 8  # the new process did the second block, the other one found both


def test_a_folder_of_another_run_is_refused_and_a_damaged_one_named(make_llama, tokens, tmp_path):
    folder = tmp_path / "run"
    learn(masked(make_llama()), tokens, checkpoint_folder=folder)
    for options, words in (
        ({"steps": 5}, "its steps is 8, now 5"),
        ({"learning_rate": 0.1}, "its learning_rate"),
        ({"inputs": "dense"}, "its inputs"),
        ({"batch_size": 4}, "its calibration"),
    ):
        with pytest.raises(ConfigError, match=words):
            learn(masked(make_llama()), tokens, checkpoint_folder=folder, **options)
    with pytest.raises(ConfigError, match="its calibration"):
        learn(masked(make_llama()), tokens.flip(0), checkpoint_folder=folder)
    with pytest.raises(ConfigError, match=r"its config\.seed is 0, now 1"):
        learn(masked(make_llama(), seed=1), tokens, checkpoint_folder=folder)
    with pytest.raises(ConfigError, match="its parameters"):
        learn(masked(make_llama(initializer_range=0.5)), tokens, checkpoint_folder=folder)
    other = masked(make_llama(), prior_strength=2.0)
    before = logits_of(other)
    with pytest.raises(ConfigError, match=r"the logits of model\.layers\.0\..* were others"):
        learn(other, tokens, checkpoint_folder=folder)
    assert equal(before, logits_of(other))
    path = folder / "model.layers.1.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    model = masked(make_llama())
    before = logits_of(model)
    with pytest.raises(FormatError, match=r"model.layers.1.safetensors is damaged .*; remove it"):
        learn(model, tokens, checkpoint_folder=folder)
    assert equal(before, logits_of(model))


def test_layers_outside_the_blocks_and_blocks_without_masks_are_passed_over(make_llama, tokens, caplog):
    model = masked(
        make_llama(num_hidden_layers=4, tie_word_embeddings=False),
        target_modules=["lm_head", "q_proj"],
        layers_to_transform=None,
    )
    with caplog.at_level("WARNING"):
        report = learn(model, tokens)
    assert len(report.blocks) == 4 and "lm_head (1 such) is outside the blocks" in caplog.text
    only_two = masked(make_llama(num_hidden_layers=4), layers_to_transform=[0, 2])
    assert [block.name for block in learn(only_two, tokens).blocks] == ["model.layers.0", "model.layers.2"]
