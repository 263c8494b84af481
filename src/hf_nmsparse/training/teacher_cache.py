# SPDX-License-Identifier: Apache-2.0
"""`TeacherCache`: what the dense base says of each row of a batch, kept, so that it runs once and not once an epoch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..adapter import linear_and_expert_weights
from ..errors import BaseModelMismatchError, ConfigError, FormatError
from ..files import write_file
from .distillation import Distillation, is_encoder_decoder
from .divergence import TopClasses

_KEY_BYTES = 16
_FORMAT = "nmsparse-teacher-1"


class TeacherCache:
    """The dense base's likeliest classes for every row of tokens that a Trainer has shown it.

    A row is known by its contents (all model inputs but the labels, without padding at its end, and the positions that
    count), so neither shuffling, nor the batch it comes in, nor the collator matters. A batch of known rows needs no pass
    of the teacher: epochs after the first, and runs with other seeds on the same rows, cost what training without
    distillation does. It lies in CPU memory, 8 k + 4 bytes a counted position: 0.5 GB for a million positions at k = 64.
    Inputs that are new each time (words masked at random, crops of images) are never found again; then it only grows.

    Args:
        distillation (`Distillation`): whose `top_k` and `temperature` the kept distributions have.

    Raises:
        ConfigError: if it has no `top_k`, or hidden states that the dense base would have to be run for.
    """

    def __init__(self, distillation: Distillation) -> None:
        if distillation.top_k is None or distillation.hidden_weight:
            raise ConfigError(
                "a teacher can be kept as its likeliest classes alone: set Distillation(top_k=..., hidden_weight=0), got "
                f"top_k={distillation.top_k}, hidden_weight={distillation.hidden_weight:g}"
            )
        self.top_k, self.temperature = distillation.top_k, distillation.temperature
        self.base: str | None = None  # identity of the teacher, once there is one
        self.rows: dict[bytes, TopClasses] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, model: nn.Module, distillation: Distillation | None) -> None:
        """Refuse to serve another teacher, or another distillation, than those that the kept rows are of.

        Raises:
            ConfigError: on another `top_k` or `temperature`, or hidden states.
            BaseModelMismatchError: on other base weights.
        """
        wanted = distillation and (distillation.top_k, distillation.temperature, distillation.hidden_weight)
        if wanted != (self.top_k, self.temperature, 0.0):
            raise ConfigError(
                f"the teacher cache is for Distillation(top_k={self.top_k}, temperature={self.temperature:g}, "
                f"hidden_weight=0), got {distillation}; start a new TeacherCache(distillation)"
            )
        if is_encoder_decoder(model):
            raise ConfigError(
                "a teacher cache keeps one distribution for each position of the input, but this model is an "
                "encoder-decoder; leave teacher_cache out"
            )
        base = _identity(model)
        if self.base not in (None, base):
            raise BaseModelMismatchError(
                f"the teacher cache was filled by other base weights (identity {self.base}, here {base}); load the base that "
                "filled it, or start a new TeacherCache"
            )
        self.base = base

    # --- rows -------------------------------------------------------------------------------------------------------
    def find(self, keys: Sequence[bytes], device: torch.device) -> TopClasses | None:
        """What is kept of a batch of rows, joined in their order; `None` unless all are there."""
        if any(key not in self.rows for key in keys):
            return None
        found = [self.rows[key] for key in keys]
        return TopClasses(*(torch.cat(parts).to(device) for parts in zip(*found, strict=True)))

    def add(self, keys: Sequence[bytes], keep: torch.Tensor, top: TopClasses) -> None:
        """Keep a batch of rows: `top` holds a position for each one kept in `keep`, bool `[rows, positions]`."""
        counts = keep.reshape(len(keep), -1).sum(1).tolist()
        parts = zip(*(tensor.cpu().split(counts) for tensor in top), strict=True)
        for key, (indices, log_probabilities) in zip(keys, parts, strict=True):
            self.rows[key] = TopClasses(indices.clone(), log_probabilities.float().clone())

    # --- files ------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike) -> Path:
        """Write all rows to a safetensors file, for other runs."""
        indices, log_probabilities = zip(*self.rows.values(), strict=True) if self.rows else ((), ())
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8).view(-1, _KEY_BYTES)
            if self.rows
            else torch.empty(0, _KEY_BYTES, dtype=torch.uint8),
            "positions": torch.tensor([len(part) for part in indices], dtype=torch.int64),
            "indices": torch.cat(indices) if indices else torch.empty(0, self.top_k, dtype=torch.int32),
            "log_probabilities": torch.cat(log_probabilities) if indices else torch.empty(0, self.top_k + 1),
        }
        about = {"top_k": self.top_k, "temperature": self.temperature, "base": self.base}
        return write_file(path, save(tensors, {"format": _FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> TeacherCache:
        """Read what `save` wrote.

        Raises:
            FormatError: if the file is not one, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise FormatError(f"{path} is not a teacher cache of this version ({_FORMAT}); fill a new one")
                about = json.loads(metadata["about"])
                names = ("keys", "positions", "indices", "log_probabilities")
                keys, positions, indices, log_probabilities = map(handle.get_tensor, names)
        except SafetensorError as error:
            raise FormatError(f"{path} is not a teacher cache ({error}); fill a new one") from error
        cache = cls(Distillation(top_k=about["top_k"], temperature=about["temperature"]))
        cache.base = about["base"]
        counts = positions.tolist()
        if len(keys) != len(counts) or not sum(counts) == len(indices) == len(log_probabilities):
            raise FormatError(f"{path}: its tensors do not fit one another; fill a new cache")
        parts = zip(indices.split(counts), log_probabilities.split(counts), strict=True) if counts else ()
        for key, part in zip(keys.numpy(), parts, strict=True):
            cache.rows[key.tobytes()] = TopClasses(*part)
        return cache


def row_keys(inputs: Mapping[str, Any], keep: torch.Tensor, label_key: str) -> list[bytes]:
    """What identifies each row of a batch: a digest of its inputs and counted positions.

    Padding at the end of a row changes nothing that counts, and depends on the batch: it is left out.
    """
    left_out = (label_key, "shift_labels")
    columns = {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    columns = {name: columns[name] for name in sorted(columns) if name not in left_out}
    mask = columns.get("attention_mask")
    positions = keep.reshape(len(keep), -1).cpu()
    keys = []
    for row in range(len(positions)):
        end = None
        if mask is not None and mask.dim() == 2 and mask[row].any():
            end = int(mask[row].nonzero()[-1]) + 1
        hasher = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"nmsparse-row")
        for name, column in columns.items():
            value = column[row] if column.dim() and len(column) == len(positions) else column
            if end is not None and column.dim() > 1 and column.shape[1] == mask.shape[1]:
                value = value[:end]
            _update(hasher, name, value)
        _update(hasher, "keep", positions[row].nonzero())
        keys.append(hasher.digest())
    return keys


def _update(hasher: Any, name: str, value: torch.Tensor) -> None:
    value = value.contiguous()
    hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
    hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)


def _identity(model: nn.Module) -> str:
    """Digest of the fingerprints of all linear layers of a model's base; quantised ones count by their names alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hasher = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"nmsparse-model")
    for name, weight in linear_and_expert_weights(base).items():
        if ".modules_to_save." in name:  # a trained copy beside the base's own
            continue
        found = weight.fingerprint()
        hasher.update(
            name.replace(".original_module", "").encode() + (b"" if found is None else bytes(found.tolist()))
        )
    return hasher.hexdigest()
