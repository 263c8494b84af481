# SPDX-License-Identifier: Apache-2.0
"""Time of the masked weight, forward and backward, against the linear layer it feeds; and of packing codes.

Shapes are SmolLM2-135M's by default. Ratios are measured in one run, medians of several repetitions.

    python benchmarks/masks.py [--device cuda] [--tokens 1024] [--output FILE]
"""

import argparse
import json

import torch
import torch.nn.functional as F
from timing import median_milliseconds, write_results

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import NoiseKey, SamplingState

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]


def measure(shape: tuple[int, int], tokens: int, device: str) -> dict:
    pattern = NMPattern("2:4")
    weight = torch.randn(shape, device=device).bfloat16()
    logits = (0.01 * torch.randn(shape[0], 6, shape[1] // 4, device=device)).requires_grad_()
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    state = SamplingState.of(1.0, 100.0, 1e-5, step=1, device=device)
    key = NoiseKey.for_layer(0, "layer")
    outgoing = torch.randn_like(weight)

    def forward_and_backward() -> None:
        logits.grad = None
        ops.masked_weight(weight, logits, pattern, key, state).backward(outgoing)

    def dense_step() -> None:  # forward, input gradient and weight gradient of the layer: three products
        y = F.linear(x, weight)
        torch.mm(y, weight)
        torch.mm(y.T, x)

    codes = ops.hard_codes(logits.detach(), pattern, shape[1])
    packed = ops.pack_codes(codes, pattern, shape[1])
    times = {
        "masked_weight_forward": median_milliseconds(
            lambda: ops.masked_weight(weight, logits.detach(), pattern, key, state), device
        ),
        "masked_weight_both": median_milliseconds(forward_and_backward, device),
        "dense_step": median_milliseconds(dense_step, device),
        "hard_codes": median_milliseconds(lambda: ops.hard_codes(logits.detach(), pattern, shape[1]), device),
        "pack_codes": median_milliseconds(lambda: ops.pack_codes(codes, pattern, shape[1]), device),
        "unpack_codes": median_milliseconds(lambda: ops.unpack_codes(packed, pattern, shape[1]), device),
    }
    return {
        "shape": list(shape),
        "milliseconds": times,
        "mask_over_dense_step": times["masked_weight_both"] / times["dense_step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    rows = [measure(shape, arguments.tokens, arguments.device) for shape in SHAPES]
    print(json.dumps(rows, indent=1))
    write_results("masks", arguments.device, {"tokens": arguments.tokens, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
