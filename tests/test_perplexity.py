# SPDX-License-Identifier: Apache-2.0
"""Perplexity: the papers' protocol, in bounded memory, loud about NaN."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_nmsparse.errors import ConfigError
from hf_nmsparse.evaluation import perplexity

module = importlib.import_module("hf_nmsparse.evaluation.perplexity")
VOCABULARY = 128


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from the uniform distribution, where a wrong protocol would go unseen
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (107,), generator=torch.Generator().manual_seed(1))


def paper_perplexity(model, tokens, seq_len):
    """Written as the papers' scripts are: one window at a time, the loss of Transformers, times L, over n L."""
    count = tokens.numel() // seq_len
    with torch.no_grad():
        nlls = [
            model(input_ids=window[None], labels=window[None]).loss.double() * seq_len
            for window in tokens[: count * seq_len].split(seq_len)
        ]
    return math.exp(sum(nlls) / (count * seq_len))


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_equals_the_protocol_of_the_papers(model, tokens, batch_size):
    result = perplexity(model, tokens, seq_len=20, batch_size=batch_size)
    assert result.value == pytest.approx(paper_perplexity(model, tokens, 20), rel=1e-5)
    assert result.value == pytest.approx(math.exp(result.loss))
    assert (result.windows, result.seq_len, result.tokens) == (5, 20, 95)


def test_windows_cut_before_are_taken_as_they_are(model, tokens):
    cut = tokens[:100].view(5, 20)
    assert perplexity(model, cut) == perplexity(model, tokens, seq_len=20)
    assert perplexity(model, cut[:, :7].int()).seq_len == 7


def test_standard_error_is_of_the_loss_over_windows(model, tokens):
    each = [perplexity(model, window[None]).loss for window in tokens[:100].view(5, 20)]
    result = perplexity(model, tokens, seq_len=20)
    assert result.loss == pytest.approx(np.mean(each), rel=1e-6)
    assert result.standard_error == pytest.approx(np.std(each, ddof=1) / math.sqrt(5), rel=1e-4)
    assert math.isnan(perplexity(model, tokens[:20], seq_len=20).standard_error)


def test_small_chunks_give_the_same_number(model, tokens, monkeypatch):
    whole = perplexity(model, tokens, seq_len=20)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    assert perplexity(model, tokens, seq_len=20).value == pytest.approx(whole.value, rel=1e-6)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert perplexity(model, tokens, seq_len=20).value == pytest.approx(whole.value, rel=1e-6)


class LargestFloat32(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


def test_float32_logits_never_exist_whole(model, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    logits = torch.randn(1, 64, VOCABULARY, dtype=torch.bfloat16)
    batch = torch.randint(VOCABULARY, (1, 64))
    with LargestFloat32() as largest:
        losses = module.token_losses(logits, batch).mean(dim=1)
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:])
    assert losses.item() == pytest.approx(expected.item(), rel=1e-6)
    assert 0 < largest.elements <= 4 * VOCABULARY


def test_modes_of_all_modules_are_restored_and_dropout_is_off(model, tokens):
    dropped = LlamaForCausalLM(model.config)
    dropped.load_state_dict(model.state_dict())
    dropped.train()
    dropped.model.layers[0].eval()
    for layer in dropped.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert perplexity(dropped, tokens, seq_len=20).value == pytest.approx(
        perplexity(model, tokens, 20).value, rel=1e-6
    )
    assert dropped.training and dropped.model.layers[1].training and not dropped.model.layers[0].training


def test_modes_are_restored_after_an_error(model, tokens, monkeypatch):
    class Broken(RuntimeError):
        pass

    def fail(*args, **kwargs):
        raise Broken

    monkeypatch.setattr(model, "forward", fail)
    model.train()
    with pytest.raises(Broken):
        perplexity(model, tokens, seq_len=20)
    assert model.training
    model.eval()


def test_no_graph_and_no_cache_are_kept(model, tokens, monkeypatch):
    forward, seen = model.forward, []

    def spy(**kwargs):
        out = forward(**kwargs)
        seen.append((kwargs["use_cache"], out.past_key_values, out.logits.requires_grad))
        return out

    monkeypatch.setattr(model, "forward", spy)
    perplexity(model, tokens, seq_len=20)
    assert seen == [(False, None, False)]


def test_bfloat16_models_are_measured(model, tokens):
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert perplexity(half, tokens, 20).value == pytest.approx(perplexity(model, tokens, 20).value, rel=0.05)


def test_a_peft_model_is_measured(model, tokens):
    peft = pytest.importorskip("peft")
    expected = perplexity(model, tokens, 20)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    adapted = peft.get_peft_model(copy, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert perplexity(adapted, tokens, 20) == expected  # LoRA starts as the identity


def test_nan_is_returned_and_named(model, tokens, caplog):
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokens[45]] = math.nan
    bad = {int(i) // 20 for i in (tokens[:100] == tokens[45]).nonzero()}
    with caplog.at_level("WARNING"):
        result = perplexity(broken, tokens, seq_len=20)
    assert math.isnan(result.value) and math.isnan(result.loss)
    assert f"nan: not finite in {len(bad)} of 5 windows, the first is window {min(bad)}" in caplog.text


def test_a_hopeless_model_is_infinitely_perplexed_not_an_error(model, tokens):
    lost = LlamaForCausalLM(model.config)
    lost.load_state_dict(model.state_dict())
    with torch.no_grad():
        lost.lm_head.weight.mul_(1e4)
    result = perplexity(lost, tokens, seq_len=20)
    assert result.value == math.inf and math.isfinite(result.loss)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda t: t[:30], {"seq_len": 40}, "30 tokens, one window takes seq_len=40; lower seq_len"),
        (lambda t: t[:30], {}, "seq_len=2048; lower seq_len"),
        (lambda t: t, {"seq_len": 1}, "expected at least 2"),
        (lambda t: t, {"seq_len": 0}, "sequence_length=0"),
        (lambda t: t, {"seq_len": 20, "batch_size": 0}, "batch_size=0"),
        (lambda t: t.float(), {"seq_len": 20}, "expected integers"),
        (lambda t: t.view(1, 1, -1), {}, r"expected \[tokens\]"),
        (lambda t: t + 100, {"seq_len": 20}, "embeddings for 0 to 127"),
        (lambda t: t - 100, {"seq_len": 20}, "embeddings for 0 to 127"),
    ],
)
def test_bad_input_is_refused(model, tokens, make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(model, make(tokens), **arguments)


def test_windows_beyond_the_models_positions_are_warned_of(model, tokens, caplog):
    with caplog.at_level("WARNING"):
        perplexity(model, tokens, seq_len=65)
    assert "longer than the model's 64 positions" in caplog.text


def test_progress_is_quiet_when_not_a_terminal(model, tokens, capfd):
    perplexity(model, tokens, seq_len=20, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_trained_model_is_trained_and_pruning_it_costs():
    """The fixture of other tests: a real gap between dense and magnitude-pruned is what makes it of use."""
    from hf_nmsparse import NMPattern
    from hf_nmsparse.ops.reference import top_n_mask

    folder = Path(__file__).parent / "tiny_llama"
    tiny = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    test = torch.from_numpy(np.load(folder / "test_tokens.npy").astype(np.int64))[:8192]
    dense = perplexity(tiny, test, seq_len=256)
    with torch.no_grad():
        for layer in tiny.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(top_n_mask(layer.weight.abs(), NMPattern("2:4")))
    pruned = perplexity(tiny, test, seq_len=256)
    assert dense.value < 70
    assert pruned.loss - dense.loss > 0.2


# --- sliding windows ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 7, 19])
@pytest.mark.parametrize("count", [12, 20, 21, 58, 107])
def test_a_sliding_window_scores_each_token_once_after_the_most_context(model, tokens, stride, count):
    text = tokens[:count]
    length = min(20, count)
    if stride >= length:
        pytest.skip("a stride as long as the text")
    total, end = 0.0, 1  # written anew: one window at a time
    while end < count:
        stop = length if end == 1 else min(end + stride, count)
        window = text[stop - length : stop]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
        new = stop - end
        total -= logits.gather(1, window[1:, None])[-new:].double().sum().item()
        end = stop
    found = perplexity(model, text, seq_len=20, stride=stride, batch_size=3)
    assert found.tokens == count - 1 and found.stride == stride
    assert found.loss == pytest.approx(total / (count - 1), rel=1e-5)
    assert found.per(5) == pytest.approx(math.exp(total / 5), rel=1e-5)


def test_perplexity_per_word_is_refused_where_tokens_were_left_out(model, tokens):
    with pytest.raises(ConfigError, match="measure with a stride"):
        perplexity(model, tokens, seq_len=20).per(9)
    with pytest.raises(ConfigError, match="units=0"):
        perplexity(model, tokens, seq_len=20, stride=4).per(0)
    with pytest.raises(ConfigError, match="stride=20; expected 1 to 19"):
        perplexity(model, tokens, seq_len=20, stride=20)


def test_fewer_windows_a_pass_are_tried_where_memory_runs_out(model, tokens, monkeypatch, caplog):
    expected = perplexity(model, tokens, seq_len=10)
    forward, seen = model.forward, []

    def small_memory(input_ids, **kwargs):
        seen.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("no memory")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small_memory)
    found = perplexity(model, tokens, seq_len=10)
    assert found.value == pytest.approx(expected.value, rel=1e-6) and found.windows == expected.windows
    assert max(seen[-3:]) <= 3 and "memory ran out; going on with" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):  # a size that was asked for is kept
        perplexity(model, tokens, seq_len=10, batch_size=5)
