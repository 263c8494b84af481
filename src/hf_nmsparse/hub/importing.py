# SPDX-License-Identifier: Apache-2.0
"""Masks made elsewhere, as published masks of ours: from MaskLLM's .npz, and from any checkpoint with zeros in its weights."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..adapter import BaseWeight, base_weights, mask_layers
from ..criteria import LayerCodes, LayerReport, PruneReport
from ..criteria.report import kept_energy
from ..errors import BaseModelMismatchError, ConfigError, FormatError, UnsupportedError
from ..files import read_json
from ..fingerprint import FINGERPRINT_BYTES
from ..packed.quantizer import packed_layers
from ..pattern import NMPattern
from ..results import RunResults
from .bitmask import BITMASK, compressed_format, load_bitmask, plain_config
from .masks import save_mask
from .model_config import OF_TRANSFORMERS
from .npz_masks import read_npz
from .remote import local_folder
from .semi_structured import dense_of

Source = str | os.PathLike | nn.Module

_SPARSE_SHARE = 0.5  # of the zeros that a pattern asks for; with fewer a layer counts as dense


@dataclass(frozen=True)
class ImportedMask:
    """What was found in a source, and how it relates to the base model.

    Args:
        source (`str`): where it came from.
        kind (`str`): "npz", "sparse-24-bitmask", "dense" (a checkpoint with zeros) or "model" (one in memory).
        report (`PruneReport`): the masks, as `save_mask` takes them.
        completed (`dict[str, int]`): layer -> groups that kept fewer than n, filled up lowest index first.
        dense_layers (`list[str]`): linear layers and fused experts without a mask.
        updated (`list[str]`): weights whose values are not those of the base; only with `mask_only`, which leaves them.
    """

    source: str
    kind: str
    report: PruneReport
    completed: dict[str, int] = field(default_factory=dict)
    dense_layers: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)

    @property
    def groups_completed(self) -> int:
        """Groups that were filled up, in all."""
        return sum(self.completed.values())

    @property
    def description(self) -> str:
        """The source and what was done, in one line for the card."""
        parts = [f"{self.source} ({self.kind})"]
        if self.groups_completed:
            parts.append(f"{self.groups_completed} groups filled up to {self.report.pattern}, lowest index first")
        if self.updated:
            parts.append(f"without the new values that {len(self.updated)} weights have there")
        return "; ".join(parts)


def import_mask(
    source: Source,
    model: nn.Module,
    folder: str | os.PathLike,
    pattern: str | NMPattern = "2:4",
    *,
    mask_only: bool = False,
    revision: str | None = None,
    results: RunResults | None = None,
) -> ImportedMask:
    """Publish a mask that was made elsewhere into a folder, for `nms.load_mask`, PEFT, merging and packing.

    Args:
        source (`str`, `Path` or `nn.Module`): an .npz of MaskLLM; a folder or Hub repo with one; a folder or repo of a
            safetensors model with zeros in its weights (AST, ProxSparse, SparseGPT), also in the `sparse-24-bitmask` format of
            compressed-tensors; or such a model in memory, its weights semi-structured tensors or plain. A model that is read is
            in memory beside the base; of an .npz one mask at a time.
        model (`nn.Module`): the base model, dense.
        folder (`str` or `Path`): written whole or not at all.
        pattern (`str`): n:m.
        mask_only (`bool`): take the mask of a model whose kept weights were updated too, and leave the new values.
        revision (`str`, *optional*): of a repo.
        results (`RunResults`, *optional*): what else is known, for the card.

    Returns:
        what was found.

    Raises:
        FormatError: if a file is damaged, a mask is for another model, or a layer follows the pattern only in part.
        BaseModelMismatchError: if weights are not those of the base.
        ConfigError, UnsupportedError: if the source or the model is none of these.
        HubError: if a repo cannot be fetched.
    """
    found = find_mask(source, model, pattern, mask_only=mask_only, revision=revision)
    results = RunResults() if results is None else copy.deepcopy(results)
    results.data = {**results.data, "imported mask": found.description}
    results.dense_layers = results.dense_layers or found.dense_layers
    results.method = results.method or f"imported ({found.kind})"
    save_mask(model, folder, report=found.report, results=results)
    return found


def find_mask(
    source: Source,
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    *,
    mask_only: bool = False,
    revision: str | None = None,
) -> ImportedMask:
    """`import_mask` without writing: everything is read and checked."""
    pattern = NMPattern(pattern)
    if mask_layers(model) or packed_layers(model):
        raise ConfigError("the base model carries masks or is packed; load the dense base to import a mask for it")
    if isinstance(source, nn.Module):
        if source is model:
            raise ConfigError("the model cannot be its own base; load the dense base beside it")
        if mask_layers(source) or packed_layers(source):
            raise ConfigError(
                "the source carries masks already (nms.save_mask publishes them), or is packed (nms.decompress)"
            )
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is of a repo, and the source is a model in memory; leave it out")
        return _of_model(source, model, pattern, f"a {type(source).__name__} in memory", "model", mask_only)
    path = _locate(source, revision)
    if path.is_file():
        return _of_npz(path, str(source), model, pattern)
    content = read_json(path / "config.json") or {}
    kind = BITMASK if compressed_format(content) else "dense"
    other = _load_like(model, path, str(source), content)
    return _of_model(other, model, pattern, str(source), kind, mask_only)


# --- where it lies --------------------------------------------------------------------------------------------------
def _locate(source: str | os.PathLike, revision: str | None) -> Path:
    """The .npz, or the folder of a checkpoint."""
    path = Path(source)
    if path.is_file() and revision is None:
        if path.suffix != ".npz":
            raise ConfigError(
                f"{source} is no .npz; give the folder of a model, or a mask in an .npz (pickles are not read)"
            )
        return path
    if path.suffix == ".npz" and not path.exists():
        raise ConfigError(f"{source}: there is no such folder or file")
    folder = local_folder(source, revision, None, ("*.json", "*.npz"))
    found = sorted(folder.glob("*.npz"))
    if len(found) > 1:
        raise ConfigError(
            f"{source} holds {len(found)} .npz files ({', '.join(p.name for p in found)}); name one of them"
        )
    if found:
        return found[0]
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{source} holds an adapter; published masks are used as they are, others are merged first")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{source} holds neither an .npz nor a model (config.json)")
    return local_folder(source, revision, None, ("*.json", "*.safetensors"))


def _load_like(model: nn.Module, folder: Path, source: str, content: Mapping) -> PreTrainedModel:
    """The model of a checkpoint, by the class of the base."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"a checkpoint is compared with a Transformers model, not with a {type(model).__name__}"
        )
    own = model.config.model_type
    if content.get("model_type") != own:
        raise BaseModelMismatchError(
            f"{source} is a model of type {content.get('model_type')!r}, the base of type {own!r}; give its own base"
        )
    if compressed_format(content):
        return load_bitmask(folder, model_class=type(model))
    quantization = content.get("quantization_config")
    if quantization and not _is_plain(quantization):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{source} is quantised or packed ({method}); masks are read from plain weights with zeros. Of a packed model "
            "of ours: nmsparse export --format dense first"
        )
    return load_plain(type(model), folder, source)


def _is_plain(quantization: object) -> bool:
    """Whether compressed-tensors only notes that the weights, stored as they are, have zeros."""
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    return dense and not quantization.get("config_groups")


def load_plain(model_class: type[PreTrainedModel], folder: Path, source: str) -> PreTrainedModel:
    """A checkpoint in the dtype in which it is stored, on the CPU, with all of its weights, whatever its config says of
    quantisation.

    Raises:
        FormatError: if weights are missing, of other sizes than the config says, or the files are damaged.
    """
    config = plain_config(folder)
    try:
        loaded, info = model_class.from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True, device_map="cpu", output_loading_info=True
        )
    except OF_TRANSFORMERS as error:
        raise FormatError(f"{source}: {' '.join(str(error).split())}") from error
    if info["missing_keys"]:
        raise FormatError(f"{source} lacks weights: {sorted(info['missing_keys'])[:3]}; it is incomplete")
    return loaded.eval()


# --- what is in it --------------------------------------------------------------------------------------------------
def _of_npz(path: Path, source: str, model: nn.Module, pattern: NMPattern) -> ImportedMask:
    started = time.perf_counter()
    weights = maskable(model)
    by_key = {parameter_name(name, base): name for name, base in weights.items()}
    found = _Found(pattern, weights)
    for key, mask in read_npz(path, {key: stored_shape(weights[name]) for key, name in by_key.items()}):
        name = by_key[key]
        rows = weights[name].as_rows(mask)
        counts = ops.count_groups(rows, pattern)
        if counts.over:
            raise FormatError(
                f"{source}: {key}.mask keeps more than {pattern.n} of {pattern.m} in {counts.over} of {counts.groups} groups; "
                "the mask has another pattern, or is for another model"
            )
        found.add(name, rows)
    return found.imported(source, "npz", time.perf_counter() - started)


def _of_model(
    other: nn.Module, model: nn.Module, pattern: NMPattern, source: str, kind: str, mask_only: bool
) -> ImportedMask:
    started = time.perf_counter()
    weights, theirs = maskable(model), maskable(other)
    found, updated = _Found(pattern, weights), []
    for name, base in weights.items():
        if name not in theirs or theirs[name].shape != base.shape:
            has = list(theirs[name].shape) if name in theirs else "no such layer"
            raise BaseModelMismatchError(
                f"{source}: {name} is {list(base.shape)} in the base, there {has}; give the base it was made from"
            )
        weight = dense_of(theirs[name].read().detach())
        kept = zeros_as_mask(f"{source}: {name}", weight, pattern)
        if kept is None:
            continue
        expected = base.read().detach().to(weight)
        if bool(((weight != expected) & kept).any()):
            updated.append(name)
        found.add(name, kept)
    updated += _other_changes(other, model, {parameter_name(name, weights[name]) for name in found.codes}, source)
    if not found.codes:
        raise FormatError(
            f"{source}: none of {len(weights)} layers has the zeros of {pattern}; there is no mask in it"
        )
    if updated and not mask_only:
        raise BaseModelMismatchError(
            f"{source}: {len(updated)} weights hold other values than the base, first {updated[0]}: it has another base, or "
            "kept weights were updated. To keep the new values pack it whole (nmsparse compress, nms.compress); to take the "
            "mask without them pass --mask-only (mask_only=True)"
        )
    return found.imported(source, kind, time.perf_counter() - started, updated)


def _other_changes(other: nn.Module, model: nn.Module, masked: set[str], source: str) -> list[str]:
    """Parameters without a mask that differ: those of the base would take their place."""
    theirs, ours = (dict(of.named_parameters(remove_duplicate=False)) for of in (other, model))
    if unknown := sorted(set(theirs) - set(ours)):
        raise BaseModelMismatchError(
            f"{source} has {len(unknown)} parameters that the base lacks, first {unknown[0]}; give the base it was made from"
        )
    changed = []
    for name, parameter in ours.items():
        if name in masked:
            continue
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise BaseModelMismatchError(
                f"{source}: {name} is missing or of another shape; give the base it was made from"
            )
        value = dense_of(theirs[name].detach())
        if not torch.equal(value, parameter.detach().to(value)):
            changed.append(name)
    return changed


def zeros_as_mask(name: str, weight: torch.Tensor, pattern: NMPattern) -> torch.Tensor | None:
    """The non-zeros of a weight that follows the pattern, bool `[out, in]`; `None` of one that is dense.

    Raises:
        FormatError: naming the layer, if it has the zeros of the pattern but not in each group.
    """
    kept = weight != 0
    counts = ops.count_groups(kept, pattern)
    if counts.follows:
        return kept
    zeros = 1 - int(torch.count_nonzero(kept)) / kept.numel()
    if zeros < _SPARSE_SHARE * (1 - pattern.n / pattern.m):
        return None
    raise FormatError(
        f"{name} has {100 * zeros:.1f} % zeros, but keeps more than {pattern.n} of {pattern.m} in {counts.over} of {counts.groups} "
        "groups; it has another pattern (--pattern), or none"
    )


class _Found:
    """Masks of a source as they are found, packed one by one."""

    def __init__(self, pattern: NMPattern, weights: Mapping[str, BaseWeight]) -> None:
        self.pattern, self.weights = pattern, weights
        self.codes: dict[str, LayerCodes] = {}
        self.layers: dict[str, LayerReport] = {}
        self.completed: dict[str, int] = {}

    def add(self, name: str, mask: torch.Tensor) -> None:
        started, base = time.perf_counter(), self.weights[name]
        mask, completed = ops.complete_mask(mask, self.pattern)
        if completed:
            self.completed[name] = completed
        codes = ops.mask_to_codes(mask, self.pattern)
        packed = ops.pack_codes(codes, self.pattern, base.shape[1]).cpu()
        fingerprint = base.fingerprint()
        if fingerprint is None:
            fingerprint = torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8)
        self.codes[name] = LayerCodes(packed, fingerprint, base.shape, base.is_fused_experts)
        energy = kept_energy(base.read().detach(), mask.to(base.stored.device))
        self.layers[name] = LayerReport(name, codes.numel(), None, energy, time.perf_counter() - started)

    def imported(self, source: str, kind: str, seconds: float, updated: list[str] | None = None) -> ImportedMask:
        names = [name for name in self.weights if name in self.codes]  # in the order of the model
        layers = [self.layers[name] for name in names]
        codes = {name: self.codes[name] for name in names}
        report = PruneReport("imported", str(self.pattern), 0, seconds, None, layers, codes=codes)
        prunable = [name for name, base in self.weights.items() if not base.is_convolution]
        return ImportedMask(
            source, kind, report, self.completed, [name for name in prunable if name not in codes], updated or []
        )


# --- weights by the names of their parameters -------------------------------------------------------------------------
def maskable(model: nn.Module) -> dict[str, BaseWeight]:
    """Linear layers, convolutions and fused experts of a model by layer name."""
    return {name: base for name, base in base_weights(model).items() if base.is_fused_experts or _is_layer(name, base)}


def _is_layer(name: str, base: BaseWeight) -> bool:
    return not name.endswith(f".{base.parameter_name}") and name != base.parameter_name


def parameter_name(name: str, base: BaseWeight) -> str:
    """Name of the parameter that holds a weight: "…q_proj.weight", "…experts.gate_up_proj"."""
    return f"{name}.{base.parameter_name}" if _is_layer(name, base) else name


def stored_shape(base: BaseWeight) -> tuple[int, ...]:
    """Shape in which a module holds its weight; a quantised one as it was before, `[out, in]`."""
    return base.shape if base.backend is not None else tuple(base.stored.shape)
