# SPDX-License-Identifier: Apache-2.0
"""Text that the dense model writes itself: what begins and ends it, where its tokens come from, and what stays untouched."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.training import NMSparseTrainer  # noqa: F401  (the room is imported before its files are asked for)

VOCABULARY = 64
BOS, EOS, PAD = 1, 2, 3
LIKELIEST = 4


class Tokenizer(SimpleNamespace):
    """What `self_data` asks a tokenizer for."""

    def __len__(self) -> int:
        return self.length


def tokenizer(bos: int | None = BOS, eos: int | None = EOS, length: int = VOCABULARY - 4) -> Tokenizer:
    special = [token for token in (bos, eos, PAD) if token is not None]
    return Tokenizer(bos_token_id=bos, eos_token_id=eos, all_special_ids=special, length=length)


@pytest.fixture
def make_llama(make_llama):
    """Weights so large that what comes next depends on what came before."""

    def build(*args, **changes):
        model = make_llama(*args, **{"initializer_range": 0.3, **changes})
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, repetition_penalty=5.0, top_k=1)
        return model

    return build


def write(model, start=None, samples=6, length=16, **changes):
    return nms.self_data(model, start or tokenizer(), samples, length, **{"progress": False, **changes})


# --- where tokens come from -----------------------------------------------------------------------------------------
def test_windows_have_the_wanted_form(llama):
    found = write(llama)
    assert found.dtype == torch.int64 and found.shape == (6, 16) and found.device.type == "cpu"
    assert (found[:, 0] == BOS).all() and found.min() >= 0 and found.max() < VOCABULARY
    assert len(found.unique(dim=0)) == 6


def test_a_text_begins_with_the_start_token_one_drawn_and_the_likeliest(make_llama):
    model = make_llama()
    found = write(model, samples=200, length=2 + LIKELIEST)
    special = torch.tensor([BOS, EOS, PAD])
    assert not torch.isin(found[:, 1], special).any() and found[:, 1].max() < VOCABULARY - 4
    assert len(found[:, 1].unique()) > 45  # of 57
    with torch.no_grad():
        likeliest = model(found).logits[:, :-1].argmax(-1)
    texts = ~torch.isin(found[:, 1:-1], torch.tensor([EOS])).cumsum(1).bool()  # until the first one ends
    assert texts.any() and torch.equal(found[:, 2:][texts], likeliest[:, 1:][texts])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_later_tokens_follow_the_models_distribution(make_llama, temperature):
    model = make_llama(initializer_range=0.08)  # several likely tokens
    model.generation_config.eos_token_id = None
    length = 3 + LIKELIEST
    # One opening, so that all windows have the same text up to the first token that is sampled.
    one_opening = Tokenizer(
        bos_token_id=BOS, eos_token_id=None, all_special_ids=list(range(VOCABULARY - 1)), length=VOCABULARY
    )
    found = write(model, one_opening, samples=4000, length=length, batch_size=4000, temperature=temperature)
    assert len(found[:, :-1].unique(dim=0)) == 1
    with torch.no_grad():
        expected = (model(found[:1, :-1]).logits[0, -1] / temperature).softmax(-1)
    counts = found[:, -1].bincount(minlength=VOCABULARY) / len(found)
    assert (counts - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert (counts - expected).abs().sum() < 0.15


def ending_model(make_llama, ends: int):
    """A model that says `ends` half the time."""
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # Without weights all tokens are alike; a hook makes one of them as likely as all the others together.
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([ends]), float(torch.tensor(63.0).log()))
    )
    return model


def test_after_an_end_the_next_text_begins(make_llama):
    model = ending_model(make_llama, EOS)
    found = write(model, samples=8, length=40)
    ends = found[:, :-1] == EOS
    assert ends.sum() > 20 and (found[:, 1:][ends] == BOS).all()
    begins = found[:, :-1] == BOS
    assert not torch.isin(found[:, 1:][begins], torch.tensor([BOS, EOS, PAD])).any()


def test_a_start_token_that_also_ends_texts_stands_once_between_two(make_llama):
    model = ending_model(make_llama, EOS)
    found = write(model, tokenizer(bos=None), samples=8, length=40)
    assert (found[:, 0] == EOS).all()
    joints = found[:, :-1] == EOS
    assert joints.sum() > 20 and not torch.isin(found[:, 1:][joints], torch.tensor([EOS, PAD])).any()


def test_a_start_token_can_be_given_by_its_id(make_llama):
    found = write(ending_model(make_llama, EOS), 7, samples=8, length=40)
    assert (found[:, 0] == 7).all() and (found[:, 1:][found[:, :-1] == EOS] == 7).all()


# --- what it depends on ---------------------------------------------------------------------------------------------
def test_windows_depend_on_seed_and_index_alone(make_llama):
    model = make_llama(torch.float64)
    whole = write(model, samples=7, batch_size=7, seed=4)
    assert torch.equal(write(model, samples=7, batch_size=2, seed=4), whole)
    assert torch.equal(write(model, samples=3, batch_size=16, seed=4), whole[:3])
    other = write(model, samples=7, batch_size=7, seed=5)
    assert not any(torch.equal(a, b) for a in other for b in whole)


def test_generators_of_torch_stay_as_they_are(make_llama):
    model = make_llama()
    first = write(model)
    before = torch.get_rng_state()
    assert torch.equal(write(model), first)
    assert torch.equal(torch.get_rng_state(), before)


def wrapped(model):
    return get_peft_model(model, nms.NMSparseConfig(modules_to_save=["lm_head"]))


def injected(model):
    model.add_adapter(nms.NMSparseConfig(dense_layers=["q_proj"]))
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "other")
    model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("adapt", [wrapped, injected])
def test_the_dense_model_writes_and_all_is_as_before(make_llama, adapt):
    expected = write(make_llama())
    base = make_llama(attention_dropout=0.5)
    settings, kept = base.generation_config, copy.deepcopy(base.generation_config.to_dict())
    model = adapt(base).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert torch.equal(write(model), expected)  # without mask, dropout and penalties
    assert model.training and base.generation_config is settings and settings.to_dict() == kept
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    masked = make_llama()
    nms.prune(masked, "magnitude", progress=False)
    assert not torch.equal(write(masked), expected)


def test_the_settings_come_back_after_a_failure(make_llama):
    model = make_llama()
    settings = model.generation_config
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(model)
    assert model.generation_config is settings and torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mistral", "opt", "mixtral"])
def test_families_write_what_they_would_read(name):
    """With their caches, the likeliest tokens are those of one pass over the whole window."""
    model = FAMILIES[name]()
    found = write(model, 0, samples=3, length=12)
    with torch.no_grad():
        likeliest = model(found).logits[:, 1 : 1 + LIKELIEST].argmax(-1)
    assert torch.equal(found[:, 2 : 2 + LIKELIEST], likeliest)


def test_bfloat16_writes(make_llama):
    found = write(make_llama(torch.bfloat16), batch_size=3)
    assert found.shape == (6, 16) and len(found.unique(dim=0)) == 6


def test_it_trains_and_calibrates(make_llama):
    model = make_llama()
    found = write(model, samples=4)
    report = nms.prune(model, "wanda", calibration=found, progress=False)
    assert report is not None and (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_models_without_a_text_of_their_own_are_refused(name):
    with pytest.raises(UnsupportedError, match=r"cannot write text|what its encoder reads"):
        write(FAMILIES[name](), 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 0}, "samples=0"),
        ({"length": 1}, "sequence_length=1"),
        ({"length": 65}, "at most 64 tokens"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"start": VOCABULARY}, "expected an id from 0 to 63"),
        ({"start": tokenizer(bos=None, eos=None)}, "neither a bos nor an eos"),
    ],
)
def test_wrong_values_are_refused(llama, changes, said):
    with pytest.raises(ConfigError, match=said):
        write(llama, **changes)


def test_a_vocabulary_of_special_tokens_is_refused(llama):
    special = Tokenizer(bos_token_id=BOS, eos_token_id=EOS, all_special_ids=list(range(VOCABULARY)), length=VOCABULARY)
    with pytest.raises(ConfigError, match="none can begin a text"):
        write(llama, special)


def test_a_model_in_training_with_checkpointing_writes_with_its_cache(make_llama):
    model = make_llama()
    expected = write(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(write(model), expected)


def test_gpt2_learned_positions_bound_the_window():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8))
    with pytest.raises(ConfigError, match="at most 8 tokens"):
        write(model, 5, length=9)
