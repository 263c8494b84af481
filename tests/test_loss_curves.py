# SPDX-License-Identifier: Apache-2.0
"""A whole training with the C++ kernels follows the loss of one with plain torch, on real text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.data import windows
from hf_nmsparse.ops import native_build, native_masks

TINY = Path(__file__).parent / "tiny_llama"
STEPS, LENGTH = 300, 64


def losses(relaxation: str, batches: torch.Tensor) -> torch.Tensor:
    """The loss of each step, float64; batch size 1."""
    config = nms.NMSparseConfig(relaxation=relaxation, temperature=(2.0, 0.5), target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), config).train()
    # Not Adam: it divides the size of a gradient out, and with it a wrong factor.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for step, batch in enumerate(batches.split(1)):
        nms.set_mask_step(model, step, len(batches))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("relaxation", ["candidates", "elementwise"])
def test_training_has_the_same_loss_curve_with_kernels_and_without(relaxation, monkeypatch):
    """Bounds are some ten times what rounding gives; a gradient that is 1 % too large breaks all three."""
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    tokens = torch.from_numpy(np.load(TINY / "train_tokens.npy").astype(np.int64))
    batches = windows(tokens, LENGTH, samples=STEPS, seed=1)
    gradients, calls = native_masks.gradients, []
    monkeypatch.setattr(native_masks, "gradients", lambda *given: calls.append(1) or gradients(*given))
    fused = losses(relaxation, batches)
    assert len(calls) == STEPS * 8
    monkeypatch.setattr(native_masks, "takes", lambda *given: False)
    plain = losses(relaxation, batches)
    assert len(calls) == STEPS * 8

    apart = (fused - plain).abs() / plain
    assert apart[:100].max() < 1e-5
    assert apart.max() < 1e-3  # small differences grow from step to step
    assert apart[100:].mean() < 1e-4
    assert plain[-50:].mean() < plain[:50].mean() - 0.1  # it learns, so the gradients have a say
