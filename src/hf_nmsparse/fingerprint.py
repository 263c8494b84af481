# SPDX-License-Identifier: Apache-2.0
"""Identity of base weights, and digests of stored tensors (docs/FORMAT.md, sections 4 and 5)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

FINGERPRINT_BYTES = 16
_SAMPLES = 4096


def fingerprint(weight: torch.Tensor) -> torch.Tensor | None:
    """Fingerprint of a base weight: BLAKE2b over its shape and a strided sample of it, rounded to bfloat16.

    The rounding makes a bfloat16 checkpoint and its float32 copy agree. At most 4096 evenly spaced elements are read.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype and device.

    Returns:
        uint8 tensor `[16]` on the CPU, or `None` where the values cannot be read (meta, quantised, sharded).
    """
    sharded = hasattr(weight, "full_tensor") or weight.numel() == 0  # a DTensor, or what ZeRO-3 has partitioned
    if weight.is_meta or not weight.is_floating_point() or sharded:
        return None
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    sample = flat[::stride][:_SAMPLES].to(torch.bfloat16).cpu().contiguous()
    hasher = hashlib.blake2b(digest_size=FINGERPRINT_BYTES, person=b"nmsparse-base")
    hasher.update("x".join(str(size) for size in weight.shape).encode())
    hasher.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
    return torch.frombuffer(bytearray(hasher.digest()), dtype=torch.uint8)


def rounding_hint(weight: torch.Tensor) -> str:
    """What to add to a mismatch message: float16 cannot hold all that bfloat16 and float32 hold."""
    if weight.dtype != torch.float16:
        return ""
    return (
        ". These weights are in float16, which rounds differently: load the base with dtype='auto' or bfloat16, and cast it "
        "after the mask is on and was used once"
    )


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Digest of a tensor's dtype, shape and bytes: BLAKE2b, uint8 `[16]` on the CPU."""
    data = tensor.detach().cpu().contiguous()
    hasher = hashlib.blake2b(digest_size=FINGERPRINT_BYTES, person=b"nmsparse-data")
    hasher.update(f"{str(data.dtype).removeprefix('torch.')}:{'x'.join(str(size) for size in data.shape)}".encode())
    hasher.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(hasher.digest()), dtype=torch.uint8)


def digest_of_all(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Digest of several tensors: that of their digests, in the order of their names; uint8 `[16]` on the CPU."""
    return digest(torch.cat([digest(tensors[name]) for name in sorted(tensors)]))


def to_hex(value: torch.Tensor) -> str:
    """Hexadecimal text of a uint8 tensor, for messages and file headers."""
    return bytes(value.detach().cpu().tolist()).hex()
