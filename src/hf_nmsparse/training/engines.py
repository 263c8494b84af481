# SPDX-License-Identifier: Apache-2.0
"""What masks need to know of the engine that spreads training over processes: DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments

from ..adapter import NMSparseLayer, is_sharded, mask_layers
from ..errors import UnsupportedError
from ..relaxations import DECAYING
from .optimizers import MaskAdamW


def data_process(args: TrainingArguments) -> tuple[int, int]:
    """(which, of how many) shares of a batch this process computes.

    Processes that work on the same samples (tensor, context and sequence parallelism) are one, so that they see the same
    masks. Accelerate's mesh has them innermost.
    """
    together = getattr(args.parallelism_config, "non_data_parallel_size", 1)
    return args.process_index // together, args.world_size // together


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed trains, by `args.deepspeed` or `accelerate launch`."""
    return getattr(args, "deepspeed_plugin", None) is not None


def refuse_zero3(args: TrainingArguments) -> None:
    """Refuse, before the engine takes the model, what cannot work at all.

    ZeRO-3 gathers the weights of a module when that module is called, and a mask layer reads the weight of its base layer
    without calling it. As a "leaf" of DeepSpeed (0.19) the forward pass has what it needs, the backward pass not.

    Raises:
        UnsupportedError: under ZeRO-3.
    """
    if uses_deepspeed(args) and args.deepspeed_plugin.zero_stage == 3:
        raise UnsupportedError(
            "masks cannot be trained under DeepSpeed ZeRO-3, which gathers weights only for modules that are called; use "
            'FSDP2 (fsdp=True, or accelerate launch with fsdp_version: 2), which shards as much, or ZeRO-2 ("stage": 2)'
        )


def refuse_empty_weights() -> None:
    """Refuse, before FSDP2 takes the model, weights that only the first process has: Accelerate (1.15) hands parameters on to the
    others, and fails on buffers, such as the fingerprint of the base weight that each mask keeps.

    Raises:
        UnsupportedError: with `cpu_ram_efficient_loading`.
    """
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
        raise UnsupportedError(
            "masks cannot be trained under FSDP2 with cpu_ram_efficient_loading=True, which loads weights in the first process "
            "alone and cannot hand on the fingerprints that masks keep of them; set fsdp_cpu_ram_efficient_loading: false in the "
            'file of accelerate launch, or fsdp_config={"cpu_ram_efficient_loading": False}'
        )


def check_engine(
    args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer | None, phases: bool
) -> None:
    """Refuse before the first step what an engine would do wrong.

    Args:
        args (`TrainingArguments`): of the run.
        model (`nn.Module`): as the engine has prepared it.
        optimizer (`torch.optim.Optimizer`, *optional*): likewise.
        phases (`bool`): whether masks wait in turn.

    Raises:
        UnsupportedError: naming the engines that do it.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "masks cannot be trained under FSDP1, which leaves a process with pieces of logits that know no rows; use FSDP2 "
            "(fsdp=True, or accelerate launch with fsdp_version: 2)"
        )
    deepspeed = uses_deepspeed(args)
    engine = f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}" if deepspeed else "sharding of weights (FSDP2)"
    if phases and deepspeed:
        raise UnsupportedError(
            f"MaskPhaseCallback under {engine}: the optimizer's states lie in buffers of all masks together, so masks that "
            "wait would go on moving by their momentum. Use DDP or FSDP2, or train without phases"
        )
    sharded = {key: layer for key, layer in mask_layers(model).items() if any(map(is_sharded, layer.parameters()))}
    if not sharded and not deepspeed:
        return
    if isinstance(getattr(optimizer, "optimizer", optimizer), MaskAdamW):
        raise UnsupportedError(
            f"MaskAdamW under {engine}: it updates whole tensors. Use DDP; or float32 logits (logits_dtype), which the "
            "stock AdamW trains, without mask_optimizer_states"
        )
    for name, layer in mask_layers(model).items() if deepspeed else sharded.items():
        if (obstacle := _between_passes(layer)) is not None:
            raise UnsupportedError(
                f"{name}: {obstacle} between the passes of training, where {engine} does not have them whole. Use DDP; or a "
                'relaxation that learns the mask alone (relaxation="candidates")'
            )


def _between_passes(layer: NMSparseLayer) -> str | None:
    """What a trained mask does to whole weights or gradients outside the forward and backward pass, if anything."""
    for name, config in layer.configs.items():
        relaxation = layer.relaxations[name]
        if not layer.trains(name):
            continue
        if relaxation.trains_weight:
            return f"relaxation {relaxation.name!r} trains a weight and looks at all of it"
        if isinstance(relaxation, DECAYING) and config.srste_decay:
            return f"srste_decay={config.srste_decay} adds to gradients"
    return None
