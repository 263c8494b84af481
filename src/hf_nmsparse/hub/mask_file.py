# SPDX-License-Identifier: Apache-2.0
"""Reading a published mask from a folder or repo, strictly (docs/FORMAT.md, section 3). No model is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..adapter import NMSparseConfig, term_shapes
from ..errors import ConfigError, FormatError
from ..fingerprint import FINGERPRINT_BYTES, digest
from ..pattern import NMPattern
from .remote import local_folder

PREFIX = "base_model.model."  # PEFT's name for the wrapped model, so that its own loaders read the file
PARTS = ("nmsparse_packed", "nmsparse_digest", "nmsparse_base")
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer as stored.

    Args:
        packed (`torch.Tensor`): packed codes, uint8 `[out, bytes]`.
        base (`torch.Tensor`): fingerprint of the base weight, uint8 `[16]`; zero where it was unknown.
        terms (`dict[str, torch.Tensor]`): float tensors of the terms beside the mask, by container name.
    """

    packed: torch.Tensor
    base: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)


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


def read_mask(source: str | os.PathLike, revision: str | None = None, task: str | None = None) -> PublishedMask:
    """Read and check a published mask: config, header, shapes, digests, codes. No model is needed.

    Args:
        source (`str` or `Path`): folder or Hub repo.
        revision (`str`, *optional*): branch, tag or commit of the repo.
        task (`str`, *optional*): subfolder, where a repo holds masks of several tasks.

    Raises:
        FormatError: on anything that `save_mask` cannot have written, naming the tensor.
        ConfigError: if it is a training checkpoint.
        HubError: if the repo cannot be fetched.
    """
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    folder = local_folder(source, revision, task, names)  # both of one commit
    for name in names:
        if not (folder / name).is_file():
            raise FormatError(
                f"{source}{f' (task {task!r})' if task else ''} holds no {name}; it is no mask, an incomplete one, or one "
                "of several tasks: then name the subfolder with task="
            )
    config = _read_config(folder / CONFIG_NAME)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = _read_tensors(path)
    pattern = NMPattern(config.pattern)
    linear, parameters = config.target_modules, config.target_parameters or []
    if not isinstance(linear, set) or not (linear or parameters):
        raise FormatError(f"{source}: target_modules of the config is no list of layer names; fetch the mask again")
    parts = (*PARTS, *(f"{container}.weight" for container in term_shapes(config, 1, 1)))
    paths = stored_paths(linear, parameters)
    places = {f"{PREFIX}{place}.{part}": name for name, place in paths.items() for part in parts}
    if unexpected := sorted(set(tensors) - set(places)):
        raise FormatError(
            f"{path}: unexpected tensor {unexpected[0]!r}; the file is damaged, or its layers and those of the config differ"
        )
    layers = {name: _check_layer(path, place, tensors, pattern, parts) for name, place in paths.items()}
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


def stored_paths(linear: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Where the tensors of each layer lie in the file: module paths of PEFT, which nests the parameters of one module.

    Args:
        linear (`Iterable[str]`): names of linear layers.
        parameters (`Iterable[str]`): names of fused expert weights, in the order in which their module holds them.

    Returns:
        `dict[str, str]`: layer name -> path. The first of two parameters lies one `base_layer` deeper than the last.
    """
    paths = {name: name for name in sorted(linear)}
    modules: dict[str, list[str]] = {}
    for name in parameters:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in modules.items():
        for depth, name in enumerate(reversed(names)):
            paths[name] = module + ".base_layer" * depth
    return paths


def _check_layer(
    path: Path, place: str, tensors: dict[str, torch.Tensor], pattern: NMPattern, parts: tuple[str, ...]
) -> LayerMask:
    found = {part: tensors.get(f"{PREFIX}{place}.{part}") for part in parts}
    for part, tensor in found.items():
        if part == "nmsparse_packed":
            fits, expected = tensor is not None and tensor.dim() == 2, "uint8 [out, bytes]"
        elif part in PARTS:
            fits, expected = (
                tensor is not None and tensor.shape == (FINGERPRINT_BYTES,),
                f"uint8 [{FINGERPRINT_BYTES}]",
            )
        else:
            fits, expected = (
                tensor is not None and tensor.is_floating_point() and tensor.dim() in (2, 3),
                "finite floats",
            )
            fits = fits and bool(tensor.isfinite().all())
        if not fits or (part in PARTS and tensor.dtype != torch.uint8):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"{path}: {place}.{part} must be {expected}, got {got}; the file is damaged")
    if not torch.equal(digest(found["nmsparse_packed"]), found["nmsparse_digest"]):
        raise FormatError(
            f"{path}: the codes of {place} do not match their digest; the file is damaged, fetch it again"
        )
    terms = {part.removesuffix(".weight"): tensor for part, tensor in found.items() if part not in PARTS}
    return LayerMask(found["nmsparse_packed"], found["nmsparse_base"], terms)


def mask_summary(mask: PublishedMask) -> dict[str, object]:
    """Facts about a published mask, for `inspect`."""
    config = {
        key: value for key, value in asdict(mask.config).items() if value is not None and key != "target_modules"
    }
    return {"source": mask.source, "layers": len(mask.layers), "file_bytes": mask.file_bytes, "config": config}
