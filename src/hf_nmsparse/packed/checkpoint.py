# SPDX-License-Identifier: Apache-2.0
"""Packed tensors in safetensors files: the header that describes them, and the check before they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from .. import ops
from ..errors import FormatError
from ..files import open_tensors
from ..fingerprint import digest, to_hex
from .branch import BRANCH_LEAVES, num_blocks
from .config import check_format_version, version_of
from .weights import PACKED_LEAVES, SCALE_LEAVES, num_scales

VERSION_KEY = "nmsparse.format_version"
DIGEST_KEY = "nmsparse.digest."
SLORB_KEY = "nmsparse.slorb_block"
_FLOATS = ("F16", "BF16", "F32", "F64")
_QUANTISED = {"I8": "int8", "U8": "int4"}
_READERS = 4  # hashing releases the GIL; more threads than this wait for the disk


def header_of(tensors: Mapping[str, torch.Tensor], values: str = "dense") -> dict[str, str]:
    """Safetensors metadata for packed tensors under their names in the file: format version, digest of each."""
    header = {VERSION_KEY: str(version_of(values))}
    header.update({DIGEST_KEY + name: to_hex(digest(tensor)) for name, tensor in tensors.items()})
    return header


@dataclass(frozen=True)
class _File:
    path: str
    handle: object
    metadata: dict[str, str]
    version: int | None


@dataclass(frozen=True)
class StoredLayer:
    """A packed layer as it lies in a checkpoint.

    Args:
        in_features (`int`): of its dense weight.
        leaves (`tuple[str, ...]`): its packed tensors: weight, weight_idx, scales and those of its side branch.
        values (`str`): how its kept weights are stored.
        slorb_width (`int`, *optional*): columns of its SLoRB tensor.
        low_rank (`int`, *optional*): rank of its low-rank term.
        slorb_block (`str`, *optional*): inputs per block of SLoRB as the header of its file has it.
    """

    in_features: int
    leaves: tuple[str, ...]
    values: str = "dense"
    slorb_width: int | None = None
    low_rank: int | None = None
    slorb_block: str | None = None

    @property
    def has_branch(self) -> bool:
        """Whether the layer has a side branch."""
        return self.slorb_width is not None or self.low_rank is not None

    @property
    def has_input_scale(self) -> bool:
        """Whether the layer has a factor of each input."""
        return "weight_input_scale" in self.leaves


def check_packed_files(files: Iterable[str], check_digests: bool = True) -> dict[str, StoredLayer]:
    """The packed layers of a checkpoint by their names in the files, once all of them are found sound.

    Args:
        files (`Iterable[str]`): all safetensors files of the checkpoint.
        check_digests (`bool`): also compare packed tensors with the digests in the header, reading them whole.

    Raises:
        FormatError: naming the tensor that is missing, misshapen, altered or without digest, or the file that is damaged
            or of a later version.
    """
    with ExitStack() as stack:
        where: dict[str, _File] = {}
        for path in files:
            file = _open(stack, path)
            where.update(dict.fromkeys(file.handle.keys(), file))
        layers = [name.removesuffix(".weight_idx") for name in where if name.endswith(".weight_idx")]
        if not layers:
            raise FormatError(
                f"no packed tensors (*.weight_idx) in {', '.join(map(str, files))}, though the config says the model is "
                "packed; remove quantization_config from config.json if the weights are dense"
            )
        _refuse_strays(where, layers)
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(
                zip(layers, pool.map(lambda layer: _check_layer(layer, where, check_digests), layers), strict=True)
            )


def check_values(layers: Mapping[str, StoredLayer], values: str) -> None:
    """Compare how values are stored with what the config says.

    Raises:
        FormatError: naming the layer.
    """
    for name, layer in layers.items():
        if layer.values != values:
            raise FormatError(
                f"{name}.weight holds {layer.values} values, but quantization_config says {values!r}; config.json and the "
                "weights do not belong together"
            )


def check_slorb_block(layers: Mapping[str, StoredLayer], slorb_block: int | None) -> None:
    """Compare the SLoRB tensors and their header with the block size of the config: no shape tells it.

    Raises:
        FormatError: naming the layer.
    """
    for name, layer in layers.items():
        if layer.slorb_width is None:
            continue
        if slorb_block is None:
            raise FormatError(f"{name}.weight_slorb is there, but quantization_config has no slorb_block; restore it")
        expected = num_blocks(layer.in_features, slorb_block)
        if layer.slorb_width != expected:
            raise FormatError(
                f"{name}.weight_slorb has {layer.slorb_width} columns; in_features={layer.in_features} in blocks of "
                f"slorb_block={slorb_block} makes {expected}. config.json and the weights do not belong together"
            )
        if layer.slorb_block not in (None, str(slorb_block)):
            raise FormatError(
                f"{name}.weight_slorb is for slorb_block={layer.slorb_block!r:.80} by the header of its file, quantization_config says "
                f"{slorb_block}. config.json and the weights do not belong together"
            )


def _open(stack: ExitStack, path: str) -> _File:
    if not str(path).endswith(".safetensors"):
        raise FormatError(f"{path}: packed models are stored as safetensors; save it again with save_pretrained")
    handle = stack.enter_context(open_tensors(path))
    metadata = handle.metadata() or {}
    version = metadata.get(VERSION_KEY)
    if version is not None:
        version = int(version) if version.isdecimal() else version
        check_format_version(version, str(path))
    return _File(str(path), handle, metadata, version)


def _refuse_strays(where: Mapping[str, _File], layers: Iterable[str]) -> None:
    """A scale or branch tensor beside a dense layer would be left out of the model without an error."""
    leaves = (*SCALE_LEAVES, *BRANCH_LEAVES)
    owners = {f"{layer}.{leaf}" for layer in layers for leaf in leaves}
    for name in where:
        if name.rpartition(".")[2] in leaves and name not in owners:
            raise FormatError(f"{name} lies beside no packed layer; fetch all files of the checkpoint again")


def _check_layer(layer: str, where: Mapping[str, _File], check_digests: bool) -> StoredLayer:
    values_name, ids_name = f"{layer}.weight", f"{layer}.weight_idx"
    if values_name not in where:
        raise FormatError(
            f"{values_name} is missing though {ids_name} is there; fetch all files of the checkpoint again"
        )
    kind, values_shape = _kind_of_values(layer, where)
    if (version := where[values_name].version) not in (None, version_of(kind)):
        raise FormatError(
            f"{values_name}: {kind} values in {where[values_name].path}, whose header says format version {version}; the file "
            "is damaged, fetch it again"
        )
    ids_shape, ids_dtype = _shape_and_dtype(ids_name, where)
    per_byte = 2 if kind == "int4" else 4  # bytes or values of the weight beside a byte of ids
    if ids_dtype != "U8" or len(ids_shape) != 2 or values_shape != [ids_shape[0], per_byte * ids_shape[1]]:
        raise FormatError(
            f"{ids_name}: {ids_dtype} {ids_shape} does not fit {values_name} {values_shape}; expected U8 [out, in/8] "
            f"beside [out, in/{8 // per_byte}]"
        )
    out_features, in_features = ids_shape[0], 8 * ids_shape[1]
    scales = _check_scales(layer, where, kind, out_features, in_features)
    width, rank, branch = _check_branch(layer, where, out_features, in_features)
    block = None if width is None else where[f"{layer}.weight_slorb"].metadata.get(SLORB_KEY)
    stored = StoredLayer(in_features, ("weight", "weight_idx", *scales, *branch), kind, width, rank, block)
    _refuse_lost(layer, where)
    if check_digests:
        for leaf in stored.leaves:
            _check_digest(f"{layer}.{leaf}", where[f"{layer}.{leaf}"])
    ops.check_ids_24(where[ids_name].handle.get_tensor(ids_name), ids_name)
    return stored


def _refuse_lost(layer: str, where: Mapping[str, _File]) -> None:
    """A branch or scale that the header knows and the files lack would be left out without an error."""
    for leaf in PACKED_LEAVES:
        name, file = f"{layer}.{leaf}", where[f"{layer}.weight"]
        if name not in where and DIGEST_KEY + name in file.metadata:
            raise FormatError(
                f"{name} is missing though the header of {file.path} has its digest; fetch all files of the checkpoint again"
            )


def _kind_of_values(layer: str, where: Mapping[str, _File]) -> tuple[str, list[int]]:
    """How the values of a layer are stored, and their shape. Every byte is a value, those that are never written too."""
    name = f"{layer}.weight"
    if f"{layer}.weight_scale" not in where:
        if f"{layer}.weight_input_scale" in where:
            raise FormatError(
                f"{layer}.weight_scale is missing though weight_input_scale is there; fetch all files again"
            )
        return "dense", _floats(name, where)
    shape, dtype = _shape_and_dtype(name, where)
    if dtype not in _QUANTISED:
        raise FormatError(f"{name}: dtype {dtype} beside weight_scale; expected one of {', '.join(_QUANTISED)}")
    return _QUANTISED[dtype], shape


def _check_scales(layer: str, where: Mapping[str, _File], kind: str, out_features: int, in_features: int) -> list[str]:
    """Names of the scales of a layer, all of them read and found finite and not below 0."""
    if kind == "dense":
        return []
    expected = {"weight_scale": (out_features, num_scales(in_features)), "weight_input_scale": (in_features,)}
    found = [leaf for leaf in SCALE_LEAVES if f"{layer}.{leaf}" in where]
    for leaf in found:
        name = f"{layer}.{leaf}"
        _floats(name, where, *expected[leaf])
        scale = where[name].handle.get_tensor(name)
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            raise FormatError(
                f"{name}: a scale is not finite, or below 0; the file is damaged, fetch or write it again"
            )
    return found


def _check_branch(
    layer: str, where: Mapping[str, _File], out_features: int, in_features: int
) -> tuple[int | None, int | None, list[str]]:
    """Columns of the SLoRB tensor, rank of the low-rank term, and names of the branch's tensors."""
    slorb, low_rank_a, low_rank_b = (f"{layer}.{leaf}" for leaf in BRANCH_LEAVES)
    width = rank = None
    if slorb in where:
        width = _floats(slorb, where, out_features, None)[1]
    if (low_rank_a in where) != (low_rank_b in where):
        here, missing = (low_rank_a, low_rank_b) if low_rank_a in where else (low_rank_b, low_rank_a)
        raise FormatError(f"{missing} is missing though {here} is there; fetch all files of the checkpoint again")
    if low_rank_a in where:
        rank = _floats(low_rank_a, where, None, in_features)[0]
        _floats(low_rank_b, where, out_features, rank)
    return width, rank, [leaf for leaf in BRANCH_LEAVES if f"{layer}.{leaf}" in where]


def _shape_and_dtype(name: str, where: Mapping[str, _File]) -> tuple[list[int], str]:
    found = where[name].handle.get_slice(name)
    return found.get_shape(), found.get_dtype()


def _floats(name: str, where: Mapping[str, _File], *expected: int | None) -> list[int]:
    """Shape of a tensor of floats; `None` in `expected` stands for any size from 1."""
    shape, dtype = _shape_and_dtype(name, where)
    fits = len(shape) == len(expected) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(shape, expected, strict=True)
    )
    if expected and not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise FormatError(f"{name}: shape {shape} does not fit its layer; expected [{sizes}]")
    if dtype not in _FLOATS:
        raise FormatError(f"{name}: dtype {dtype}, expected one of {', '.join(_FLOATS)}")
    return shape


def _check_digest(name: str, file: _File) -> None:
    expected = file.metadata.get(DIGEST_KEY + name)
    if expected is None:
        raise FormatError(
            f"{name}: {file.path} holds no digest of it; the header was lost when the file was rewritten. Fetch it again, "
            "or load with PackedConfig(check_digests=False)"
        )
    found = to_hex(digest(file.handle.get_tensor(name)))
    if found != expected:
        raise FormatError(
            f"{name}: digest {found}, but the header of {file.path} says {expected}; the tensor was altered or damaged. "
            "Fetch it again (PackedConfig(check_digests=False) loads it as it is)"
        )
