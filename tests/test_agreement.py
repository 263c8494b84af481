# SPDX-License-Identifier: Apache-2.0
"""Agreement with the dense model: its definitions, its order over damage, the same in every form of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import llama_config
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.evaluation import agreement

LENGTH = 24


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def text(dense):
    return torch.randint(dense.config.vocab_size, (LENGTH * 5 + 3,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pruned(dense):
    model = copy.deepcopy(dense)
    nms.prune(model, "magnitude", "2:4")
    return model


def test_numbers_are_their_definitions(dense, pruned, text):
    found = agreement(pruned, text, dense, seq_len=LENGTH, batch_size=2)
    kl, same = [], []
    for window in text[: LENGTH * 5].split(LENGTH):
        with torch.no_grad():
            p, q = (m(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1) for m in (dense, pruned))
        kl.append((p.exp() * (p - q)).sum(-1).mean())
        same.append((p.argmax(-1) == q.argmax(-1)).double().mean())
    kl, same = torch.stack(kl), torch.stack(same)
    assert (found.tokens, found.windows, found.seq_len) == (5 * (LENGTH - 1), 5, LENGTH)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4) and found.kl > 0.01
    assert found.top1 == pytest.approx(same.mean().item()) and found.top1 < 1
    assert found.kl_standard_error == pytest.approx((kl.std() / 5**0.5).item(), rel=1e-3)
    assert found.top1_standard_error == pytest.approx((same.std() / 5**0.5).item())
    assert agreement(pruned, text, dense, seq_len=len(text)).kl_standard_error is None


def test_errors_of_layers_are_those_of_their_outputs(dense, pruned, text):
    found = agreement(pruned, text, dense, seq_len=LENGTH)
    name = "model.layers.1.mlp.up_proj"
    outputs = []
    for model in (dense, pruned):
        handle = model.get_submodule(name).register_forward_hook(lambda _, __, y: outputs.append(y))
        with torch.no_grad():
            model(input_ids=text[None, :LENGTH])
        handle.remove()
    expected = (outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()
    assert found.layers[name] == pytest.approx(expected.item(), rel=1e-4)
    assert len(found.layers) == 15 and found.layer_tokens == LENGTH  # 14 pruned, and the head
    assert not any(module._forward_hooks for module in [*dense.modules(), *pruned.modules()])
    assert agreement(pruned, text, dense, seq_len=LENGTH, layers=False).layers == {}


def test_a_model_agrees_with_itself(dense, text):
    found = agreement(dense, text, copy.deepcopy(dense), seq_len=LENGTH)
    assert found.top1 == 1 and abs(found.kl) < 1e-6 and max(found.layers.values()) == 0


def test_adapter_merged_and_packed_model_agree_alike(dense, text):
    model = get_peft_model(copy.deepcopy(dense), nms.NMSparseConfig(pattern="2:4", dense_layers=["lm_head"])).eval()
    nms.set_prior(model, "magnitude")
    by_adapter = agreement(model, text, seq_len=LENGTH)
    assert by_adapter == agreement(model, text, dense, seq_len=LENGTH)  # its own adapters off, or the model itself
    merged = copy.deepcopy(model).merge_and_unload()
    by_form = [agreement(m, text, dense, seq_len=LENGTH) for m in (merged, nms.compress(copy.deepcopy(merged)))]
    assert by_adapter.kl > 0.01 and len(by_adapter.layers) == 15
    for found in by_form:
        assert found.kl == pytest.approx(by_adapter.kl, rel=1e-3) and found.top1 == by_adapter.top1
        assert found.layers == pytest.approx(by_adapter.layers, rel=1e-3, abs=1e-9)


def test_more_damage_is_less_agreement(dense, text):
    found = []
    for share in ("10%", "25%", "50%"):
        model = copy.deepcopy(dense)
        nms.prune(model, "magnitude", share)
        found.append(agreement(model, text, dense, seq_len=LENGTH))
    assert found[0].kl < found[1].kl < found[2].kl
    assert found[0].top1 > found[2].top1


def test_modes_and_adapters_are_as_before_even_after_an_error(dense, text, monkeypatch):
    model = get_peft_model(copy.deepcopy(dense), nms.NMSparseConfig(pattern="2:4")).train()
    nms.set_prior(model, "magnitude")
    before = [module.training for module in model.modules()]
    agreement(model, text, seq_len=LENGTH)
    with pytest.raises(ConfigError):
        agreement(model, text + 10**6, seq_len=LENGTH)
    assert [module.training for module in model.modules()] == before
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)


def test_there_must_be_a_dense_model_of_the_same_vocabulary(dense, text):
    with pytest.raises(ConfigError, match="pass the dense model"):
        agreement(dense, text, seq_len=LENGTH)
    other = LlamaForCausalLM(llama_config(vocab_size=dense.config.vocab_size + 8))
    with pytest.raises(ConfigError, match="no common vocabulary"):
        agreement(dense, text, other, seq_len=LENGTH)
