# SPDX-License-Identifier: Apache-2.0
"""What each process of tests/test_tensor_parallel.py does: loads its part of a packed model, computes, saves."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_nmsparse  # noqa: F401  (registers the quantizer)
from hf_nmsparse.packed import SparseLinear24


def answers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits without and with gradients, and the gradients, whole, by name."""
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = {"logits": model(tokens).logits}
    out = model(tokens, labels=tokens)
    out.loss.backward()
    found["logits with gradients"] = out.logits.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {name: whole(gradient) for name, gradient in gradients.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(source: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(tp_plan="auto"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear24)}
    shards = {name: list(layer.weight.to_local().shape) for name, layer in layers.items()}
    torch.save(
        {"answers": answers(model), "shards": shards}, Path(target, f"process-{torch.distributed.get_rank()}.pt")
    )
    model.save_pretrained(Path(target, "saved"))


if __name__ == "__main__":
    main(*sys.argv[1:])
