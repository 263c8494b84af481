# SPDX-License-Identifier: Apache-2.0
"""Packed tensors in safetensors files: the header that describes them, and the check before they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from .. import ops
from ..errors import FormatError
from ..fingerprint import digest, to_hex
from .config import FORMAT_VERSION, check_format_version

VERSION_KEY = "nmsparse.format_version"
DIGEST_KEY = "nmsparse.digest."
_FLOATS = ("F16", "BF16", "F32", "F64")
_READERS = 4  # hashing releases the GIL; more threads than this wait for the disk


def header_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Safetensors metadata for packed tensors under their names in the file: format version, digest of each."""
    header = {VERSION_KEY: str(FORMAT_VERSION)}
    header.update({DIGEST_KEY + name: to_hex(digest(tensor)) for name, tensor in tensors.items()})
    return header


@dataclass(frozen=True)
class _File:
    path: str
    handle: object
    metadata: dict[str, str]


def check_packed_files(files: Iterable[str], check_digests: bool = True) -> list[str]:
    """Names, as in the files, of the packed layers of a checkpoint, once all of them are found sound.

    Args:
        files (`Iterable[str]`): all safetensors files of the checkpoint.
        check_digests (`bool`): also compare values and ids with the digests in the header, reading both whole.

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
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda layer: _check_layer(layer, where, check_digests), layers))
        return layers


def _open(stack: ExitStack, path: str) -> _File:
    if not str(path).endswith(".safetensors"):
        raise FormatError(f"{path}: packed models are stored as safetensors; save it again with save_pretrained")
    try:
        handle = stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise FormatError(f"{path} is no sound safetensors file ({error}); fetch it again") from error
    metadata = handle.metadata() or {}
    version = metadata.get(VERSION_KEY)
    if version is not None:
        check_format_version(int(version) if version.isdecimal() else version, str(path))
    return _File(str(path), handle, metadata)


def _check_layer(layer: str, where: Mapping[str, _File], check_digests: bool) -> None:
    values_name, ids_name = f"{layer}.weight", f"{layer}.weight_idx"
    if values_name not in where:
        raise FormatError(
            f"{values_name} is missing though {ids_name} is there; fetch all files of the checkpoint again"
        )
    values = where[values_name].handle.get_slice(values_name)
    ids = where[ids_name].handle.get_slice(ids_name)
    shapes = (values.get_shape(), ids.get_shape())
    if ids.get_dtype() != "U8" or len(shapes[1]) != 2 or shapes[0] != [shapes[1][0], 4 * shapes[1][1]]:
        raise FormatError(
            f"{ids_name}: {ids.get_dtype()} {shapes[1]} does not fit {values_name} {shapes[0]}; expected U8 [out, in/8] "
            "beside [out, in/2]"
        )
    if values.get_dtype() not in _FLOATS:
        raise FormatError(f"{values_name}: dtype {values.get_dtype()}, expected one of {', '.join(_FLOATS)}")
    if check_digests:
        for name in (ids_name, values_name):
            _check_digest(name, where[name])
    ops.check_ids_24(where[ids_name].handle.get_tensor(ids_name), ids_name)


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
