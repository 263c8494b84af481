# SPDX-License-Identifier: Apache-2.0
"""2:4 models as compressed-tensors wrote them up to version 0.14, `sparse-24-bitmask` (docs/FORMAT.md, 10).

Later versions, and Transformers 5 with them, load such a checkpoint with random weights and no error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from .. import ops
from .._compat import note_source
from ..errors import ConfigError, FormatError, UnsupportedError
from ..files import open_tensors
from .model_config import OF_TRANSFORMERS, read_model_config
from .remote import local_folder

BITMASK = "sparse-24-bitmask"
_COMPRESSED = (BITMASK, "sparse-bitmask")
_LEAVES = ("compressed", "bitmask", "shape")
_LAST_WRITER = "0.14.0"


def compressed_format(config: Mapping[str, Any] | None) -> str | None:
    """The sparse format of a model by its config.json, if its weights are stored in one of compressed-tensors."""
    quantization = (config or {}).get("quantization_config")
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    found = sparsity.get("format") if isinstance(sparsity, dict) else None
    return found if found in _COMPRESSED else None


def bitmask_config(ignore: list[str], global_sparsity: float) -> dict[str, Any]:
    """The `quantization_config` that version 0.14 writes.

    Args:
        ignore (`list[str]`): linear layers that are stored as they are.
        global_sparsity (`float`): share of zeros in the model.
    """
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": BITMASK,
            "global_sparsity": global_sparsity,
            "ignore": ignore,
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
        "transform_config": {},
        "version": _LAST_WRITER,
    }


# --- one weight -----------------------------------------------------------------------------------------------------
@lru_cache
def _ids_of_bits() -> torch.Tensor:
    """A byte of a bitmask -> the byte of ids (docs/FORMAT.md, 7) for the same eight columns, int16 `[256]`; else -1."""
    table = torch.full((256,), -1, dtype=torch.int16)
    pairs = list(combinations(range(4), 2))
    for (a, b), (c, d) in product(pairs, pairs):
        table[1 << a | 1 << b | 16 << c | 16 << d] = a | b << 2 | c << 4 | d << 6
    return table


@lru_cache
def _bits_of_ids() -> torch.Tensor:
    """The inverse of `_ids_of_bits`, uint8 `[256]`."""
    ids, table = _ids_of_bits(), torch.zeros(256, dtype=torch.uint8)
    valid = (ids >= 0).nonzero().flatten()
    table[ids[valid].long()] = valid.to(torch.uint8)
    return table


def pack_bitmask(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight under an exactly 2:4 mask as its tensors are stored.

    Args:
        weight (`torch.Tensor`): `[out, in]`, in divisible by 8.
        mask (`torch.Tensor`): bool `[out, in]`.

    Returns:
        "compressed": the kept values `[out, in/2]`; "bitmask": uint8 `[out, in/8]`, column 8i + j in bit j of byte i; "shape":
        int64 `[2, 1]`.
    """
    values, ids = ops.pack_24(weight, mask)
    bits = _bits_of_ids().to(ids.device)[ids.int()]
    return {"compressed": values, "bitmask": bits, "shape": torch.tensor([[size] for size in weight.shape])}


def unpack_bitmask(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The dense weight of `pack_bitmask`, pruned positions +0.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): "compressed", "bitmask" and "shape".
        name (`str`): of the layer, for errors.

    Raises:
        FormatError: if they do not belong together, bits beyond a row are set, or a group does not keep two of four.
        UnsupportedError: if the values are quantised.
    """
    values, bits, shape = (tensors[leaf] for leaf in _LEAVES)
    if shape.dtype != torch.int64 or shape.numel() != 2 or bool((shape <= 0).any()):
        raise FormatError(
            f"{name}.shape must be two positive int64, got {shape.dtype} {shape.flatten().tolist()[:4]}; fetch it again"
        )
    rows, columns = shape.flatten().tolist()
    if not values.is_floating_point() or values.itemsize < 2:
        raise UnsupportedError(
            f"{name} is quantised too ({values.dtype} values); only floating point weights are read from {BITMASK}"
        )
    if columns % 4:
        raise FormatError(f"{name} has rows of {columns}, which are no groups of four; it is no 2:4 weight")
    expected = {"compressed": [rows, columns // 2], "bitmask": [rows, -(-columns // 8)]}
    for leaf, sizes in expected.items():
        if list(tensors[leaf].shape) != sizes or (leaf == "bitmask" and bits.dtype != torch.uint8):
            got = f"{tensors[leaf].dtype} {list(tensors[leaf].shape)}"
            raise FormatError(
                f"{name}.{leaf} must be {sizes} for a weight {[rows, columns]}, got {got}; fetch it again"
            )
    if columns % 8:  # groups of the last byte that lie beyond the row: two kept zeros
        if bool((bits[:, -1] >> 4).any()):
            raise FormatError(
                f"{name}.bitmask has bits set beyond column {columns}; the file is damaged, fetch it again"
            )
        bits = torch.cat([bits[:, :-1], bits[:, -1:] | 0x30], dim=1)
        values = F.pad(values, (0, 2))
    ids = _ids_of_bits()[bits.int()]
    if wrong := int((ids < 0).sum()):
        raise FormatError(
            f"{name}.bitmask does not keep two of each four weights in {wrong} of {ids.numel()} bytes; the file is damaged"
        )
    return ops.unpack_24(values.contiguous(), ids.to(torch.uint8))[:, :columns].contiguous()


# --- a model --------------------------------------------------------------------------------------------------------
def read_bitmask(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, each weight dense with zeros.

    Raises:
        FormatError: naming the tensor that is missing or wrong, or the file that is damaged.
        UnsupportedError: if values are quantised.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(open_tensors(path))
            for name in file.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                if name in where:
                    raise FormatError(f"{path}: {name} is in another file of {folder} too; fetch the model again")
                where[name] = file
        layers = {name.rpartition(".")[0] for name in where if name.endswith(".bitmask")}
        if not layers:
            raise FormatError(f"{folder} holds no tensor *.bitmask, though its config says {BITMASK}; fetch it again")
        tensors = {name: file.get_tensor(name) for name, file in where.items() if not _is_part(name, layers)}
        for layer in sorted(layers):
            names = {leaf: f"{layer}.{leaf}" for leaf in _LEAVES}
            if absent := [name for name in names.values() if name not in where]:
                raise FormatError(f"{folder}: {absent[0]} is missing; the checkpoint is incomplete, fetch it again")
            if f"{layer}.weight" in where:
                raise FormatError(f"{folder} holds {layer}.weight both dense and compressed; fetch the model again")
            parts = {leaf: where[name].get_tensor(name) for leaf, name in names.items()}
            tensors[f"{layer}.weight"] = unpack_bitmask(parts, layer)
    return tensors


def _is_part(name: str, layers: set[str]) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf in _LEAVES and layer in layers


def load_bitmask(
    source: str | os.PathLike,
    revision: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Load a `sparse-24-bitmask` checkpoint as a plain model, dense with zeros, weights bit-equal to those stored.

    `nms.compress` packs it from there. The dense model is in memory twice for a moment.

    Args:
        source (`str` or `Path`): folder or Hub repo.
        revision (`str`, *optional*): of the repo.
        dtype (`str` or `torch.dtype`): as in `from_pretrained`.
        device (`str` or `torch.device`): where to.
        model_class (`type`, *optional*): by default the one that the config names.

    Raises:
        FormatError: if the checkpoint is damaged, incomplete, or of another architecture than it says.
        UnsupportedError: if it is quantised as well, or sparse without a pattern.
        HubError: if the repo cannot be fetched.
    """
    folder = local_folder(source, revision, None, ("*.json", "*.safetensors"))
    content = read_model_config(folder)
    found = compressed_format(content)
    if found is None:
        raise ConfigError(f"{source} is no {BITMASK} checkpoint; load it with from_pretrained")
    if found != BITMASK:
        raise UnsupportedError(
            f"{source} is stored as {found}, sparse without a pattern, which is not read here and which Transformers loads with "
            "random weights; compressed-tensors 0.14 reads it"
        )
    if content["quantization_config"].get("config_groups"):
        raise UnsupportedError(
            f"{source} is quantised by compressed-tensors as well (config_groups), which is not read here; "
            "compressed-tensors 0.14 decompresses it"
        )
    config = plain_config(folder)
    model_class = model_class or _class_of(config, source)
    weights = read_bitmask(folder)
    try:
        # Without a name, because with one Transformers takes no tensors; that of the folder is put back below.
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
        )
    except OF_TRANSFORMERS as error:  # sizes that do not fit the config, or make no sense
        raise FormatError(f"{source}: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise FormatError(
                f"{source} does not fit {model_class.__name__}: {what.replace('_', ' ')} {sorted(info[what])[:3]}; fetch it "
                "again"
            )
    note_source(model, str(source), None if Path(source).exists() else folder.name)  # see `fetch`
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def plain_config(folder: Path) -> PretrainedConfig:
    """The config of a model without what it says of quantisation.

    Raises:
        FormatError: if it is no config of a model that Transformers knows.
    """
    read_model_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except OF_TRANSFORMERS as error:
        raise FormatError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _class_of(config: PretrainedConfig, source: str | os.PathLike) -> type[PreTrainedModel]:
    architectures = config.architectures if isinstance(config.architectures, list) else []
    for name in architectures:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UnsupportedError(
        f"{source}: Transformers has no architecture {config.architectures!r:.80}; pass model_class="
    )
