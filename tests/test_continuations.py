# SPDX-License-Identifier: Apache-2.0
"""Likelihoods and greedy texts in padded batches: those of one text at a time, token by token."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from small_tokenizers import letters
from transformers import GenerationConfig

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.evaluation import continuations
from hf_nmsparse.evaluation.continuations import log_likelihoods, write_greedily

MERGES = [("a", "b"), ("ab", "c"), (" ", "d"), ("e", " d"), ("o", "x"), ("t", "h"), ("th", "e")]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
# Unlike in length, and in what merges where the two meet: "ab" + "c", "e" + " d", "t" + "he".
PAIRS = [
    ("the fox ab", "c and so on"),
    ("q", "z"),
    ("we dine", " door"),
    ("a long question that goes on and on. is it", " long?"),
    ("t", "he"),
    ("", "the fox"),
    ("ab ", "d"),
]
KINDS = [{}, {"starts": True}, {"ends": True}, {"starts": True, "ends": True}, {"bos": False}]


@pytest.fixture
def model(make_llama):
    """Likelihoods far from uniform; only the tokenizer's eos ends a text."""
    return make_llama(initializer_range=0.3, eos_token_id=None)


def one_by_one(model, start: list[int], further: list[int]) -> float:
    """A forward pass a token, without padding."""
    total = 0.0
    for count, token in enumerate(further):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + further[:count]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


def split(tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """What stands before, and what is scored: from the first token that the prompt alone does not have."""

    def bare(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    whole, alone = bare(prompt + continuation), bare(prompt)
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(map(len, (whole, alone)))
    )
    starts = tokenizer("q").input_ids[0] == tokenizer.bos_token_id
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [*([first] if starts or shared == 0 else []), *whole[:shared]], whole[shared:]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(kind) or "plain")
def test_likelihoods_are_those_of_one_text_at_a_time(model, kind):
    tokenizer = letters(MERGES, **kind)
    merged = [
        tokenizer(p + c, add_special_tokens=False).input_ids
        != tokenizer(p, add_special_tokens=False).input_ids + tokenizer(c, add_special_tokens=False).input_ids
        for p, c in PAIRS
    ]
    assert 3 <= sum(merged) < len(PAIRS)  # the boundary matters in this test
    found = log_likelihoods(model, tokenizer, PAIRS)
    for pair, likelihood in zip(PAIRS, found, strict=True):
        before, scored = split(tokenizer, *pair)
        assert likelihood.tokens == len(scored)
        assert likelihood.value == pytest.approx(one_by_one(model, before, scored), rel=1e-4)
        assert likelihood.value < -2


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 100000])
def test_neither_order_nor_batches_matter(model, monkeypatch, tokens_per_batch):
    tokenizer = letters(MERGES)
    expected = log_likelihoods(model, tokenizer, PAIRS)
    monkeypatch.setattr(continuations, "_TOKENS_PER_BATCH", tokens_per_batch)
    found = log_likelihoods(model, tokenizer, PAIRS[::-1])[::-1]
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert [f.value for f in found] == pytest.approx([e.value for e in expected], rel=1e-4)
    assert log_likelihoods(model, tokenizer, []) == []


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_continuation_too(model):
    tokenizer = letters(starts=True)
    prompt, continuation = "the quick fox. " * 6, "jumps over"
    [found] = log_likelihoods(model, tokenizer, [(prompt, continuation)])
    whole = tokenizer(prompt + continuation, add_special_tokens=False).input_ids[-64:]
    assert found.tokens == len(continuation)
    assert found.value == pytest.approx(one_by_one(model, whole[:-10], whole[-10:]), rel=1e-4)
    [shorter] = log_likelihoods(model, tokenizer, [(prompt[15:], continuation)])
    assert shorter == found
    [found] = log_likelihoods(model, tokenizer, [("why?", prompt)])
    assert found.tokens == 63
    assert found.value == pytest.approx(
        one_by_one(model, whole := tokenizer(prompt).input_ids[-64:-63], tokenizer(prompt).input_ids[-63:]), rel=1e-4
    )


def test_a_continuation_without_tokens_and_nothing_at_all_are_refused(model):
    with pytest.raises(ConfigError, match=r"continuation '' of 'the fox' has no token"):
        log_likelihoods(model, letters(ends=True), [("the fox", "")])
    bare = letters(bos=False)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="neither a bos nor an eos token, and the prompt is empty"):
        log_likelihoods(model, bare, [("", "fox")])
    with pytest.raises(ConfigError, match="neither a bos nor an eos token"):
        write_greedily(model, bare, [""], 3)


def test_a_tokenizer_of_another_model_is_refused(make_llama):
    small = make_llama(vocab_size=10)
    for call in (
        lambda: log_likelihoods(small, letters(), PAIRS),
        lambda: write_greedily(small, letters(), ["fox"], 3),
    ):
        with pytest.raises(ConfigError, match="embeddings for 0 to 9; tokenise the text with this model's tokenizer"):
            call()


def test_bfloat16_logits_are_summed_in_float32(make_llama):
    model, tokenizer = make_llama(torch.bfloat16, initializer_range=0.3), letters()
    pair = ("a fox", " that goes on and on and on")
    [found] = log_likelihoods(model, tokenizer, [pair])
    ids = torch.tensor([tokenizer("".join(pair)).input_ids])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    expected = sum(logs[place - 1, ids[0, place]].item() for place in range(5, ids.shape[1]))
    assert found.value == pytest.approx(expected, rel=1e-6)


# --- writing --------------------------------------------------------------------------------------------------------
PROMPTS = ["the fox", "q", "a long question that goes on and on", "we dine"]


def likeliest(model, ids: list[int], count: int, ends: tuple[int, ...] = (1,)) -> list[int]:
    """The likeliest token again and again: a whole forward pass each time, without padding or cache."""
    ids = list(ids)
    written = []
    while len(written) < count:
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in ends:
            break
        ids.append(token)
        written.append(token)
    return written


def likeliest_for(model, tokenizer, prompts=PROMPTS, count=12, **options) -> list[list[int]]:
    return [likeliest(model, tokenizer(prompt).input_ids, count, **options) for prompt in prompts]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "opt", "gpt2", "mixtral"])
def test_texts_and_likelihoods_of_a_family_are_those_of_one_prompt_at_a_time(name):
    """Learned and rotary positions, sliding windows, experts: each with padding, of which it must see nothing."""
    model, tokenizer = FAMILIES[name](), letters()
    model.generation_config.eos_token_id = None
    assert write_greedily(model, tokenizer, PROMPTS, 12) == likeliest_for(model, tokenizer)
    found = log_likelihoods(model, tokenizer, PAIRS[:5])
    for pair, likelihood in zip(PAIRS, found, strict=False):
        assert likelihood.value == pytest.approx(one_by_one(model, *split(tokenizer, *pair)), rel=1e-4)


def test_texts_are_those_of_generate(model):
    tokenizer = letters()
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=9, do_sample=False, eos_token_id=1, pad_token_id=1)
        expected.append([token for token in out[0, ids.input_ids.shape[1] :].tolist() if token != 1])
    assert write_greedily(model, tokenizer, PROMPTS, 9) == expected == likeliest_for(model, tokenizer, count=9)
    assert len({tuple(text) for text in expected}) > 1


def test_a_text_ends_before_any_of_the_models_ends(model):
    tokenizer = letters()
    free = likeliest_for(model, tokenizer, ends=())
    ends = {free[0][5], free[2][7]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = likeliest_for(model, tokenizer, ends=(*ends, 1))
    found = write_greedily(model, tokenizer, PROMPTS, 12)
    assert found == expected and len({len(text) for text in found}) > 1
    model.generation_config.eos_token_id = None
    own = next(token for token in free[0][1:] if token < len(tokenizer))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(own)  # that of the tokenizer is always one
    assert write_greedily(model, tokenizer, PROMPTS, 12) == likeliest_for(model, tokenizer, ends=(own,))


def test_many_prompts_in_any_order_and_an_empty_one(model, monkeypatch):
    tokenizer = letters()
    expected = write_greedily(model, tokenizer, PROMPTS, 6)
    monkeypatch.setattr(continuations, "_PROMPTS_PER_BATCH", 3)
    assert write_greedily(model, tokenizer, PROMPTS[::-1] * 2, 6) == expected[::-1] * 2
    assert write_greedily(model, tokenizer, ["", *PROMPTS], 6) == [likeliest(model, [0], 6), *expected]
    assert write_greedily(model, tokenizer, [], 6) == []


def test_a_prompt_to_write_after_loses_its_beginning(model):
    tokenizer = letters()
    prompt = "the quick fox. " * 8
    ids = tokenizer(prompt).input_ids
    assert write_greedily(model, tokenizer, [prompt, "q"], 12)[0] == likeliest(model, ids[-52:], 12)
    for count in (64, 0):
        with pytest.raises(ConfigError, match=rf"max_new_tokens={count}, the model has 64 positions"):
            write_greedily(model, tokenizer, [prompt], count)


def test_the_generation_config_of_a_model_is_not_used_and_not_changed(model):
    tokenizer = letters()
    expected = write_greedily(model, tokenizer, PROMPTS, 12)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, num_beams=3, num_return_sequences=2, repetition_penalty=9.0, min_new_tokens=4,
        no_repeat_ngram_size=1, suppress_tokens=expected[0][:2], max_length=4, eos_token_id=1,
    )  # fmt: skip
    adapted = get_peft_model(copy.deepcopy(model), nms.NMSparseConfig(pattern="2:4")).eval()
    for one in (model, adapted):
        inner = one.get_base_model() if one is adapted else one
        before = write_greedily(one, tokenizer, PROMPTS, 12)
        inner.generation_config = own
        state = torch.get_rng_state()
        assert write_greedily(one, tokenizer, PROMPTS, 12) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert inner.generation_config is own and own.repetition_penalty == 9.0 and own.num_beams == 3
        with pytest.raises(ConfigError):
            write_greedily(one, tokenizer, PROMPTS, 64)
        assert inner.generation_config is own


@pytest.mark.parametrize("ends", [False, True])
def test_a_templated_prompt_gets_no_second_bos_and_no_eos(model, ends, monkeypatch):
    tokenizer = letters(starts=True, ends=ends, template=TEMPLATE)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids[0] == 0 and ids[1] != 0 and ids[-1] == 1
    assert write_greedily(model, tokenizer, [prompt], 8) == [likeliest(model, ids, 8)]
    [found] = log_likelihoods(model, tokenizer, [(prompt, "runs")])
    assert found.value == pytest.approx(
        one_by_one(model, ids, tokenizer("runs", add_special_tokens=False).input_ids), rel=1e-4
    )
    plain = tokenizer("the fox", add_special_tokens=False).input_ids  # the others do get theirs
    assert write_greedily(model, tokenizer, ["the fox"], 8) == [likeliest(model, [0, *plain], 8)]


def test_every_form_of_a_model_gives_the_same(model):
    tokenizer = letters()
    adapted = get_peft_model(copy.deepcopy(model), nms.NMSparseConfig(pattern="2:4"))
    nms.set_prior(adapted, "magnitude")
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    texts = likeliest_for(merged, tokenizer)
    values = [one_by_one(merged, *split(tokenizer, *pair)) for pair in PAIRS]
    assert texts != likeliest_for(model, tokenizer)  # pruning shows
    for form in (adapted, merged, nms.compress(copy.deepcopy(merged))):
        assert write_greedily(form, tokenizer, PROMPTS, 12) == texts
        assert [found.value for found in log_likelihoods(form, tokenizer, PAIRS)] == pytest.approx(values, rel=1e-3)
    with adapted.disable_adapter():
        assert write_greedily(adapted, tokenizer, PROMPTS, 12) == likeliest_for(model, tokenizer)


def test_dropout_is_off_and_modes_are_as_before_even_after_an_error(make_llama):
    model, tokenizer = make_llama(initializer_range=0.3, attention_dropout=0.5, eos_token_id=None), letters()
    expected = write_greedily(model, tokenizer, PROMPTS, 6), log_likelihoods(model, tokenizer, PAIRS)
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert (write_greedily(model, tokenizer, PROMPTS, 6), log_likelihoods(model, tokenizer, PAIRS)) == expected
    failing = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    for call in (
        lambda: write_greedily(model, tokenizer, PROMPTS, 6),
        lambda: log_likelihoods(model, tokenizer, PAIRS),
    ):
        with pytest.raises(RuntimeError, match="broken"):
            call()
    failing.remove()
    assert [module.training for module in model.modules()] == before


def test_long_prompts_give_no_warning_of_the_tokenizer(model, caplog):
    tokenizer = letters()
    tokenizer.model_max_length = 4
    with caplog.at_level(logging.WARNING):
        write_greedily(model, tokenizer, PROMPTS, 2)
        log_likelihoods(model, tokenizer, PAIRS)
    assert not [record for record in caplog.records if "longer" in record.message]


def test_a_likelihood_of_a_uniform_model_is_known(make_llama):
    model, tokenizer = make_llama(), letters()
    torch.nn.init.zeros_(model.lm_head.weight)
    [found] = log_likelihoods(model, tokenizer, [("fox", " runs")])
    assert (found.value, found.tokens) == (pytest.approx(-5 * math.log(64)), 5)
