# SPDX-License-Identifier: Apache-2.0
"""Reading a published mask from a folder or repo, strictly (docs/FORMAT.md, section 3). No model is needed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..adapter import NMSparseConfig
from ..errors import ConfigError, FormatError
from ..fingerprint import FINGERPRINT_BYTES, digest
from ..pattern import NMPattern

PREFIX = "base_model.model."  # PEFT's name for the wrapped model, so that its own loaders read the file
PARTS = ("nmsparse_packed", "nmsparse_digest", "nmsparse_base")
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer as stored.

    Args:
        packed (`torch.Tensor`): packed codes, uint8 `[out, bytes]`.
        base (`torch.Tensor`): fingerprint of the base weight, uint8 `[16]`; zero where it was unknown.
    """

    packed: torch.Tensor
    base: torch.Tensor


@dataclass(frozen=True)
class PublishedMask:
    """A mask read from a folder or repo, checked as far as it can be without its model.

    Args:
        config (`NMSparseConfig`): its configuration.
        layers (`dict[str, LayerMask]`): by module name.
        source (`str`): where it came from.
        file_bytes (`int`): size of the mask file.
    """

    config: NMSparseConfig
    layers: dict[str, LayerMask]
    source: str
    file_bytes: int

    @property
    def pattern(self) -> NMPattern:
        """The pattern of every layer."""
        return NMPattern(self.config.pattern)


def resolve(source: str | os.PathLike, filename: str, revision: str | None = None, task: str | None = None) -> Path:
    """Local path of a file of a mask folder or Hub repo.

    Raises:
        FormatError: if a local folder lacks the file.
    """
    folder = Path(source)
    if folder.exists():
        path = folder / (task or "") / filename
        if not path.is_file():
            raise FormatError(
                f"{folder / (task or '')} holds no {filename}; it is no mask folder, or an incomplete one"
            )
        return path
    return Path(hf_hub_download(str(source), filename, revision=revision, subfolder=task))


def read_mask(source: str | os.PathLike, revision: str | None = None, task: str | None = None) -> PublishedMask:
    """Read and check a published mask: config, header, shapes, digests, codes. No model is needed.

    Args:
        source (`str` or `Path`): folder or Hub repo.
        revision (`str`, *optional*): of the repo.
        task (`str`, *optional*): subfolder, where a repo holds masks of several tasks.

    Raises:
        FormatError: on anything that `save_mask` cannot have written, naming the tensor.
        ConfigError: if it is a training checkpoint.
    """
    config = _read_config(resolve(source, CONFIG_NAME, revision, task))
    path = resolve(source, SAFETENSORS_WEIGHTS_NAME, revision, task)
    tensors = _read_tensors(path)
    pattern = NMPattern(config.pattern)
    layers: dict[str, LayerMask] = {}
    for key in tensors:
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or part not in PARTS:
            raise FormatError(
                f"{path}: unexpected tensor {key!r}; the file is no published mask of this format version"
            )
        if part == "nmsparse_packed":
            layers[name] = _check_layer(path, name, tensors, pattern)
    if not layers:
        raise FormatError(f"{path} holds no masks")
    if surplus := sorted(set(tensors) - {f"{PREFIX}{name}.{part}" for name in layers for part in PARTS}):
        raise FormatError(f"{path}: tensor {surplus[0]!r} belongs to no layer with codes; the file is damaged")
    if not isinstance(config.target_modules, set) or config.target_modules != set(layers):
        named = set(config.target_modules) if isinstance(config.target_modules, set) else {str(config.target_modules)}
        raise FormatError(
            f"{source}: target_modules of the config and the layers of the file differ, first at "
            f"{sorted(named ^ set(layers))[0]!r}; fetch the mask again"
        )
    return PublishedMask(config, layers, str(source), path.stat().st_size)


def _read_config(path: Path) -> NMSparseConfig:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise FormatError(
            f"{path} is {path.stat().st_size} bytes, over the limit of {_MAX_CONFIG_BYTES}; it is no mask config"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); fetch the mask again") from error
    if not isinstance(content, dict) or content.get("peft_type") != "NMSPARSE":
        raise FormatError(f"{path} is not the config of a mask (peft_type NMSPARSE)")
    known = {key: value for key, value in content.items() if key in NMSparseConfig.__dataclass_fields__}
    try:
        config = NMSparseConfig(**{**known, "peft_type": None})
    except TypeError as error:  # a field of another JSON type than any config has
        raise FormatError(f"{path}: {error}; the config is damaged, fetch the mask again") from error
    if config.modules_to_save or config.trainable_token_indices:
        raise FormatError(
            f"{path}: a published mask holds codes only, yet modules_to_save or trainable_token_indices is set"
        )
    if config.mask_format != "packed":
        raise ConfigError(
            f"{path.parent} is a training checkpoint (logits), not a published mask; load it with PeftModel.from_pretrained, "
            "and publish it with nms.save_mask"
        )
    return config


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged or cut short ({error}); fetch the mask again") from error


def _check_layer(path: Path, name: str, tensors: dict[str, torch.Tensor], pattern: NMPattern) -> LayerMask:
    found = {part: tensors.get(f"{PREFIX}{name}.{part}") for part in PARTS}
    for part, tensor in found.items():
        shape_ok = tensor is not None and (
            tensor.dim() == 2 if part == "nmsparse_packed" else tensor.shape == (FINGERPRINT_BYTES,)
        )
        if not shape_ok or tensor.dtype != torch.uint8:
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            expected = "[out, bytes]" if part == "nmsparse_packed" else f"[{FINGERPRINT_BYTES}]"
            raise FormatError(f"{path}: {name}.{part} must be uint8 {expected}, got {got}; the file is damaged")
    if not torch.equal(digest(found["nmsparse_packed"]), found["nmsparse_digest"]):
        raise FormatError(
            f"{path}: the codes of {name} do not match their digest; the file is damaged, fetch it again"
        )
    return LayerMask(found["nmsparse_packed"], found["nmsparse_base"])


def mask_summary(mask: PublishedMask) -> dict[str, object]:
    """Facts about a published mask, for `inspect`."""
    config = {
        key: value for key, value in asdict(mask.config).items() if value is not None and key != "target_modules"
    }
    return {"source": mask.source, "layers": len(mask.layers), "file_bytes": mask.file_bytes, "config": config}
