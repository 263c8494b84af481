# SPDX-License-Identifier: Apache-2.0
"""Masks as MaskLLM publishes them: an .npz of packed bits, one array a weight (docs/FORMAT.md, 10).

The file is foreign: nothing in it is unpickled, and no member is unpacked before the size that it declares was compared
with what the base model needs.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import write_array

from ..errors import FormatError

NPZ_FILE = "mask_compressed.npz"
"""Name under which MaskLLM's own evaluation looks for a mask in a repo."""
_SUFFIX = ".mask"
_MAX_HEADER = 4096
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
_DAMAGED = "{} is no .npz, damaged or cut short ({}); fetch it again"
_OF_ZIPFILE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OverflowError, ValueError)
_MAGIC = b"\x93NUMPY\x01\x00"
# What every numpy writes. To take no other text is simpler than to evaluate it, and nothing can go wrong.
_HEADER = re.compile(rb"\{'descr': '\|u1', 'fortran_order': (?:False|True), 'shape': \((\d{1,15}),\), \}\s*")


def read_npz(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The masks of a file, one at a time, after all names and sizes were checked.

    Args:
        path (`Path`): the file.
        shapes (`Mapping[str, tuple]`): weights that may be masked: name of the parameter -> shape as it is stored.

    Yields:
        name of the parameter, bool mask of its shape.

    Raises:
        FormatError: naming the key, what it holds and what was expected.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name, member in _members(path, archive, shapes).items():
                with archive.open(member) as stream:
                    yield name, _mask(path, name, stream, shapes[name])
    except FormatError:  # a ValueError too
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # which an offset in the file leads to, and no disk
            raise
        raise FormatError(_DAMAGED.format(path, error)) from error
    except _OF_ZIPFILE as error:
        raise FormatError(_DAMAGED.format(path, error)) from error


def _members(
    path: Path, archive: zipfile.ZipFile, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, zipfile.ZipInfo]:
    """Members by name of the parameter. None is unpacked."""
    found: dict[str, zipfile.ZipInfo] = {}
    _check_count(path, len(archive.infolist()))
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        name = key.removesuffix(_SUFFIX)
        if key == member.filename or name == key or name not in shapes:
            raise FormatError(
                f"{path}: key {key!r} names no weight of the model that can be masked; expected the name of a parameter and "
                f"{_SUFFIX}, such as {next(iter(shapes), 'none')}{_SUFFIX}"
            )
        if name in found:
            raise FormatError(f"{path}: key {key!r} is there twice; the file is damaged")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise FormatError(f"{path}: {key!r} is encrypted or packed by another method than deflate; write it again")
        needed = _num_bytes(shapes[name])
        if not needed < member.file_size <= needed + _MAX_HEADER:
            raise FormatError(
                f"{path}: {key!r} would unpack to {member.file_size} bytes, expected {needed} for {list(shapes[name])} bits "
                f"and a header of up to {_MAX_HEADER}; it is for another model, or damaged"
            )
        found[name] = member
    if not found:
        raise FormatError(f"{path} holds no mask")
    return found


def _check_count(path: Path, listed: int) -> None:
    """Compare the members found with how many the end of the archive says: one that hides in a comment would stay dense."""
    with path.open("rb") as stream:
        stream.seek(-22, os.SEEK_END)
        end = stream.read()
    if end[:4] != b"PK\5\6" or int.from_bytes(end[10:12], "little") != min(listed, 0xFFFF):
        raise FormatError(f"{path}: its list of arrays is damaged, or text follows it; fetch it again")


def _mask(path: Path, name: str, stream: zipfile.ZipExtFile, shape: tuple[int, ...]) -> torch.Tensor:
    needed = _num_bytes(shape)
    start = stream.read(10)
    header = stream.read(int.from_bytes(start[8:], "little"))
    found = _HEADER.fullmatch(header)
    if start[:8] != _MAGIC or found is None or int(found[1]) != needed:
        raise FormatError(
            f"{path}: {name}{_SUFFIX} must be an .npy (version 1.0) of uint8 [{needed}], the packed bits of {list(shape)}; it "
            f"begins with {(start[:8] + header[:80])!r}"
        )
    data = stream.read(needed)
    if len(data) != needed or stream.read(1):  # the second read compares checksums
        raise FormatError(f"{path}: {name}{_SUFFIX} holds other than {needed} bytes; the file is damaged")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    count = prod(shape)
    if bits[count:].any():
        raise FormatError(f"{path}: {name}{_SUFFIX} has bits set beyond the {count} of the weight; it is damaged")
    return torch.from_numpy(bits[:count].view(bool)).view(shape)


def write_npz(path: Path, masks: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write masks one at a time; equal masks give equal files.

    Args:
        path (`Path`): the file.
        masks (`Iterable[tuple[str, torch.Tensor]]`): name of the parameter, bool mask of the shape in which it is stored.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, mask in masks:
            member = zipfile.ZipInfo(f"{name}{_SUFFIX}.npy")  # with no time of day
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                write_array(stream, np.packbits(mask.cpu().numpy()), version=(1, 0), allow_pickle=False)


def _num_bytes(shape: tuple[int, ...]) -> int:
    return -(-prod(shape) // 8)
