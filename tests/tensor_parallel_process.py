# SPDX-License-Identifier: Apache-2.0
"""What each process of tests/test_tensor_parallel.py does: loads its part of a packed model, computes, saves; and tries to put a
mask on its part of the dense one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_nmsparse as nms
from hf_nmsparse.errors import UnsupportedError
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


def masks_refused(folder: str) -> str:
    """What is said of a mask on the dense model."""
    try:
        get_peft_model(load(folder), nms.NMSparseConfig())
    except UnsupportedError as error:
        return str(error)
    return ""


def load(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))


def main(packed: str, dense: str, target: str) -> None:
    model = load(packed)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear24)}
    shards = {name: list(layer.weight.to_local().shape) for name, layer in layers.items()}
    seen = {"answers": answers(model), "shards": shards, "refused": masks_refused(dense)}
    torch.save(seen, Path(target, f"process-{torch.distributed.get_rank()}.pt"))
    model.save_pretrained(Path(target, "saved"))


if __name__ == "__main__":
    main(*sys.argv[1:])
