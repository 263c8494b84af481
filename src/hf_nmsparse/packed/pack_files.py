# SPDX-License-Identifier: Apache-2.0
"""A masked checkpoint made into a packed one file by file: no more than one of its files is in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .. import _compat, ops
from ..errors import UnsupportedError
from .checkpoint import header_of
from .compress import PackedSizes
from .config import PackedConfig
from .layers import is_conv1d, linear_layers, log_dense, unpackable_layers
from .stored_mask import StoredMask
from .weights import PATTERN, pack_masked, weight_tensors


def packable_layers(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the pruned `layers` of a model (which may be empty, on the meta device) that can be packed.

    Raises:
        UnsupportedError: if there is none.
    """
    linear, unpackable = linear_layers(model), unpackable_layers(model)
    layers = list(layers)
    found = [name for name in layers if name in linear and name not in unpackable]
    if not found:
        reasons = {unpackable.get(name, "fused experts") for name in layers}
        raise UnsupportedError(
            f"none of the {len(layers)} pruned layers can be packed as {PATTERN} ({'; '.join(sorted(reasons))}); write the "
            "model dense with zeros"
        )
    return found


def pack_files(
    source: Path, target: Path, model: nn.Module, layers: Iterable[str], mask: StoredMask | None = None
) -> PackedSizes:
    """Pack the pruned layers of a checkpoint that `save_pretrained` wrote, as `compress` and saving would.

    Args:
        source (`Path`): folder of a masked model, with its config.
        target (`Path`): folder to write into; what is no weight is copied.
        model (`nn.Module`): the dense model of that config, loaded or not: which layers there are, and their names.
        layers (`Iterable[str]`): the pruned layers. Those that cannot be packed stay dense with zeros, and are logged.
        mask (`StoredMask`, *optional*): their masks; by default non-zero weights are kept.

    Raises:
        UnsupportedError: if none of them can be packed.
    """
    layers = list(layers)
    packable = packable_layers(model, layers)
    unpackable = unpackable_layers(model)
    log_dense(
        {name: unpackable.get(name, "fused experts") for name in set(layers) - set(packable)}, "dense with zeros"
    )
    on_disk = _compat.names_on_disk(model, [f"{name}.weight" for name in packable])
    owners = {on_disk[f"{name}.weight"]: name for name in packable}
    linear, where = linear_layers(model), {}
    packed_bytes = dense_bytes = weights = 0
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        header = header_of({})
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                tensor = file.get_tensor(key)
                if key not in owners:
                    tensors[key] = tensor
                    continue
                rows = tensor.t() if is_conv1d(linear[owners[key]]) else tensor
                weight = pack_masked(rows, _kept(rows, owners[key], mask))
                layer = key.removesuffix("weight")
                packed = {layer + leaf: part for leaf, part in weight_tensors(weight).items()}
                header |= header_of(packed)
                tensors |= packed
                packed_bytes += sum(part.nbytes for part in packed.values())
                dense_bytes += tensor.nbytes
                weights += tensor.numel()
        save_file(tensors, target / path.name, metadata={"format": "pt", **header})
        where |= {name: (path.name, tensor.nbytes) for name, tensor in tensors.items()}
    config = PackedConfig(modules_to_not_convert=sorted(linear.keys() - set(packable)))
    _copy_others(source, target, where, config)
    return PackedSizes(len(packable), packed_bytes, dense_bytes, 2 * weights)


def _kept(rows: torch.Tensor, name: str, mask: StoredMask | None) -> torch.Tensor:
    if mask is None:
        return rows != 0
    codes = ops.unpack_codes(mask.layers[name].packed, mask.pattern, rows.shape[1], name=name)
    return ops.codes_to_mask(codes, mask.pattern, rows.shape[1])


def _copy_others(source: Path, target: Path, where: dict[str, tuple[str, int]], config: PackedConfig) -> None:
    """Everything but weights, with the config and the index of files as they are now."""
    for path in source.iterdir():
        if path.name in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == CONFIG_NAME:
                content["quantization_config"] = config.to_dict()
            else:
                content["weight_map"] = {name: file for name, (file, _) in where.items()}
                content["metadata"]["total_size"] = sum(size for _, size in where.values())
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (target / path.name).write_text(text, encoding="utf-8")
        elif path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
