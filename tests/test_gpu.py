# SPDX-License-Identifier: Apache-2.0
"""The same numbers on a GPU as on the CPU. `make gpu-check` runs these."""

import pytest
import torch

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.ops import NoiseKey, SamplingState

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KEY = NoiseKey.for_layer(3, "layer")


@pytest.mark.parametrize("shape", [(16, 64), (33, 50), (192, 576)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_masked_weight_agrees_with_the_cpu(pattern, shape):
    pattern = NMPattern(pattern)
    weight, outgoing = torch.randn(shape), torch.randn(shape)
    logits = 0.01 * torch.randn(shape[0], pattern.num_candidates, pattern.num_groups(shape[1]))
    results = []
    for device in ("cpu", "cuda"):
        theta = logits.detach().to(device).requires_grad_()
        state = SamplingState.of(1.0, 150.0, 1e-3, step=5, draw=2, device=device)
        masked = ops.masked_weight(weight.to(device), theta, pattern, KEY, state)
        masked.backward(outgoing.to(device))
        results.append((masked.detach().cpu(), theta.grad.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


def test_codes_ties_and_packing_are_bit_equal():
    pattern = NMPattern("2:4")
    scores = torch.randint(0, 3, (64, 200)).float()
    mask = ops.top_n_mask(scores, pattern)
    assert torch.equal(ops.top_n_mask(scores.cuda(), pattern).cpu(), mask)
    codes = ops.mask_to_codes(mask, pattern)
    packed = ops.pack_codes(codes, pattern, 200)
    assert torch.equal(ops.pack_codes(codes.cuda(), pattern, 200).cpu(), packed)
    assert torch.equal(ops.unpack_codes(packed.cuda(), pattern, 200).cpu(), codes)
    logits = torch.randint(0, 3, (64, 6, 50)).float()
    assert torch.equal(ops.hard_codes(logits.cuda(), pattern, 200).cpu(), ops.hard_codes(logits, pattern, 200))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_layers_agree_with_dense_ones(dtype, memory):
    linear = torch.nn.Linear(128, 96, device="cuda", dtype=dtype)
    mask = ops.top_n_mask(linear.weight.detach().float().abs(), NMPattern("2:4"))
    with torch.no_grad():
        linear.weight.masked_fill_(~mask, 0)
    packed = nms.SparseLinear24.from_linear(linear, mask, memory=memory)
    x = torch.randn(5, 128, device="cuda", dtype=dtype)
    torch.testing.assert_close(packed(x), linear(x))


def test_the_whole_line_runs_on_a_gpu(make_llama, tokens):
    from peft import get_peft_model

    model = get_peft_model(make_llama(torch.bfloat16).cuda(), NMSparseConfig())
    tokens = tokens.cuda()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(3):
        nms.set_mask_step(model, step, 3)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = model(tokens).logits
    packed = nms.compress(model)
    torch.testing.assert_close(packed(tokens).logits, expected, rtol=2e-2, atol=2e-2)
    assert nms.verify(packed).ok
