# SPDX-License-Identifier: Apache-2.0
"""Packed layers cut by a model's plan of tensor parallelism: kept weights and their ids alike, by rows or by inputs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from .. import _compat
from ..errors import UnsupportedError
from .modules import SparseLinear24


def prepare_tensor_parallel(model: PreTrainedModel, packed: Mapping[str, SparseLinear24]) -> None:
    """Have packed layers compute on their shards, where a `distributed_config` asks for tensor parallelism.

    Args:
        model (`PreTrainedModel`): before its weights are loaded.
        packed (`Mapping[str, SparseLinear24]`): the layers that will be put into it, by name.

    Raises:
        UnsupportedError: if the plan cuts a layer within a byte of its ids, which describes 8 inputs.
    """
    distributed = getattr(model.config, "distributed_config", None)
    processes = getattr(distributed, "tp_size", None) or 1
    if processes == 1:
        return
    changed = distributed.tp_plan if isinstance(distributed.tp_plan, Mapping) else {}
    plan = {**model.tp_plan, **changed}
    for name, layer in packed.items():
        _compat.compute_on_shards(layer)
        styles = [style for place, style in plan.items() if fnmatchcase(name, place)]
        if any("rowwise" in style for style in styles) and layer.in_features % (8 * processes):
            raise UnsupportedError(
                f"{name} has {layer.in_features} inputs, which tensor parallelism over {processes} processes would cut within "
                f"a group of 8; expected a multiple of {8 * processes}. Take fewer processes, or load with "
                "PackedConfig(dequantize=True) in one process and save the dense model"
            )
