# SPDX-License-Identifier: Apache-2.0
"""Time of a packed 2:4 layer against the dense one, for both memory modes; and of packing and unpacking.

python benchmarks/packed.py [--device cuda] [--output FILE]
"""

import argparse
import json

import torch
from timing import median_milliseconds, write_results
from torch import nn

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, ops

SHAPES = [(1536, 576), (4096, 4096)]
TOKENS = [1, 16, 256]


@torch.no_grad()
def measure(shape: tuple[int, int], tokens: int, device: str) -> dict:
    out_features, in_features = shape
    dense = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
    mask = ops.top_n_mask(dense.weight.float().abs(), NMPattern("2:4"))
    dense.weight.masked_fill_(~mask, 0)
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    dense_ms = median_milliseconds(lambda: dense(x), device)
    row = {"shape": list(shape), "tokens": tokens, "dense_ms": dense_ms}
    for memory in ("fast", "low"):
        packed = nms.SparseLinear24.from_linear(dense, mask, memory=memory)
        milliseconds = median_milliseconds(lambda packed=packed: packed(x), device)
        row[f"{memory}_ms"], row[f"{memory}_over_dense"] = milliseconds, milliseconds / dense_ms
        row[f"{memory}_backend"] = nms.explain(packed, tokens).backend
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    rows = [measure(shape, tokens, arguments.device) for shape in SHAPES for tokens in TOKENS]
    print(json.dumps(rows, indent=1))
    write_results("packed", arguments.device, {"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
