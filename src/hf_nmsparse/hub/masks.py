# SPDX-License-Identifier: Apache-2.0
"""Published masks: a folder or repo with the packed codes of every layer, or what they change (docs/FORMAT.md, 3 and 9)."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import nn

from .. import ops
from .._compat import loaded_from
from ..adapter import (
    TERM_CONTAINERS,
    TERMS_DIGEST,
    BaseWeight,
    NMSparseConfig,
    NMSparseLayer,
    ParamWrapper,
    base_weights,
    is_writer,
    mask_layers,
    term_shapes,
    whole_tensors,
)
from ..criteria import PruneReport
from ..errors import BaseModelMismatchError, ConfigError, FormatError
from ..files import RESULTS_FILE, staged_folder
from ..fingerprint import digest, digest_of_all, rounding_hint, to_hex
from ..pattern import NMPattern, parse_pattern
from ..results import RunResults
from .card import card_text, terms_of
from .delta import as_delta, place_of_general, write_reference
from .mask_file import PREFIX, PublishedMask, read_mask, stored_paths

logger = logging.getLogger(__name__)


# --- writing --------------------------------------------------------------------------------------------------------
def save_mask(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str | None = None,
    results: RunResults | None = None,
    report: PruneReport | None = None,
    delta_to: str | os.PathLike | None = None,
    delta_to_revision: str | None = None,
    delta_to_task: str | None = None,
) -> Path:
    """Publish a mask into a folder: codes, config, results and card. The model stays as it is.

    It is the hard mask of an adapter, with the terms beside it (SLoRB, low rank, delta) in the dtype of the base weight; or,
    with `report`, the one that one-shot pruning chose. That is the mask of the dense model as it was before: new values
    that pruning gave to kept weights are no part of it.

    Of several processes (torchrun, accelerate launch) the first writes. All of them may call this; where weights are
    sharded (FSDP2) all of them have to, and the others go on while the first still writes.

    Args:
        model (`PeftModel` or a model with a mask adapter): the model; with `report` the plain one that was pruned, packed or
            not, of which only class and config are read.
        folder (`str` or `Path`): written whole or not at all; other files in it stay.
        adapter_name (`str`, *optional*): which adapter; the active one by default.
        results (`RunResults`, *optional*): what was measured, for the card and results.json, which get the mask's size too.
            With `report` the base model is the one that they name, if they do.
        report (`PruneReport`, *optional*): what `nms.prune` returned.
        delta_to (`str` or `Path`, *optional*): folder or Hub repo of a general mask of the same pattern and layers: only the
            groups that differ from it are stored, and `nms.load_mask` needs both. A folder is remembered by its path
            relative to this one, a repo at its commit.
        delta_to_revision, delta_to_task (`str`, *optional*): revision of that repo, and subfolder.

    Returns:
        the folder.

    Raises:
        ConfigError: if the model has no such mask adapter, its logits are not finite, the report holds no mask, or the
            mask is no delta to that other one: pattern or layers differ, or so many groups that the full mask is smaller.
        FormatError, HubError: if the general mask cannot be read.
    """
    results = copy.deepcopy(results) if results is not None else RunResults()
    if report is None:
        config, tensors, weights = _of_adapter(model, adapter_name, results)
    elif adapter_name is not None or mask_layers(model):
        raise ConfigError("report= is for a plain pruned model; leave it out to publish the mask of an adapter")
    else:
        config, tensors, weights = _of_report(model, report, results)
    base_class = type(_plain(model))  # AutoPeftModel finds the base's class by this
    config.auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    results.pattern, results.terms = config.pattern, terms_of(config)
    results.base_model = results.base_model or config.base_model_name_or_path
    results.base_revision = results.base_revision or config.revision
    general, results.delta_to = None, None
    if delta_to is not None:
        general = place_of_general(delta_to, delta_to_revision, delta_to_task, folder)
        tensors = _only_changes(tensors, config, read_mask(delta_to, general.revision, delta_to_task))
        results.delta_to = str(general)
    content = save(tensors, metadata={"format": "pt"})
    results.sizes["mask"] = len(content)
    results.mask_bits_per_weight = 8 * len(content) / weights
    results.mask_bits_bound = NMPattern(config.pattern).entropy_bits_per_weight
    if not is_writer():
        return Path(folder)
    with staged_folder(folder) as staging:
        (staging / SAFETENSORS_WEIGHTS_NAME).write_bytes(content)
        config.save_pretrained(str(staging))
        if general is not None:
            write_reference(staging, general)
        results.write(staging / RESULTS_FILE)
        (staging / "README.md").write_text(card_text(results, "mask"), encoding="utf-8")
    return Path(folder)


def _of_adapter(
    model: nn.Module, adapter_name: str | None, results: RunResults
) -> tuple[NMSparseConfig, dict[str, torch.Tensor], int]:
    """Config, tensors and number of weights of an adapter's mask; `results` gets its layers."""
    adapter_name = adapter_name or active_mask(model)
    layers = mask_layers(model, adapter_name)
    if not layers:
        raise ConfigError(f"the model has no mask adapter {adapter_name!r}; it has {_adapter_names(model) or 'none'}")
    stored = next(iter(layers.values())).configs[adapter_name]
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(stored, field):
            raise ConfigError(
                f"adapter {adapter_name!r} trained {field}={getattr(stored, field)!r} beside its mask; a published mask holds "
                "codes only and would lose that. Merge and publish the model instead (nms.compress), or train without it"
            )
    if stored.trains_weight:
        raise ConfigError(
            f"adapter {adapter_name!r} trained weights (relaxation {stored.relaxation!r}), and a published mask holds codes only; "
            "publish the model: nms.compress(model) or model.merge_and_unload(), then push_to_hub"
        )
    linear, parameters = _names_by_kind(layers)
    tensors: dict[str, torch.Tensor] = {}
    for name, place in stored_paths(linear, parameters).items():
        with whole_tensors(layers[name]):
            tensors |= _stored_tensors(place, layers[name], adapter_name)
    results.sparse_layers = sorted(layers)
    results.fused_experts = sorted(name for name in parameters if layers[name].base_weight.is_fused_experts)
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    return published_config(stored, linear, parameters), tensors, weights


def _of_report(
    model: nn.Module, report: PruneReport, results: RunResults
) -> tuple[NMSparseConfig, dict[str, torch.Tensor], int]:
    """Config, tensors and number of weights of the mask that pruning chose; `results` gets its layers."""
    if not report.codes:
        raise ConfigError(f"the report holds no mask to publish: {why_no_mask(report)}")
    linear = [name for name, codes in report.codes.items() if not codes.fused_experts]
    parameters = [name for name, codes in report.codes.items() if codes.fused_experts]
    tensors: dict[str, torch.Tensor] = {}
    for name, place in stored_paths(linear, parameters).items():
        codes = report.codes[name]
        tensors |= _named(place, _codes(codes.packed, codes.base))
    base, revision = loaded_from(model)
    config = NMSparseConfig(
        pattern=report.pattern,
        prior=report.criterion,
        base_model_name_or_path=results.base_model or base,
        revision=results.base_revision or revision,
        target_parameters=parameters or None,
    )
    results.sparse_layers, results.fused_experts = sorted(report.codes), sorted(parameters)
    results.method = results.method or report.criterion
    weights = sum(math.prod(codes.shape) for codes in report.codes.values())
    return published_config(config, linear, parameters), tensors, weights


def why_no_mask(report: PruneReport) -> str:
    """Why a report holds no codes."""
    if report.permuted:
        return "channels were permuted, so it would not be one of the base model as it is"
    if not isinstance(parse_pattern(report.pattern), NMPattern):
        return f"{report.pattern} has no groups, and codes are of groups"
    return "only some of the experts of each block were pruned, and a mask covers all of them or none"


def _names_by_kind(layers: dict[str, NMSparseLayer]) -> tuple[list[str], list[str]]:
    """(linear layers, fused expert weights in the order in which their modules hold them)."""
    linear = sorted(name for name, layer in layers.items() if not isinstance(layer, ParamWrapper))
    # The outer wrapper of a module, which a walk meets first, is that of its last parameter.
    return linear, [name for name, layer in reversed(list(layers.items())) if isinstance(layer, ParamWrapper)]


def _stored_tensors(place: str, layer: NMSparseLayer, adapter_name: str) -> dict[str, torch.Tensor]:
    pattern = layer.relaxations[adapter_name].pattern
    packed = ops.pack_codes(layer.mask_codes(adapter_name), pattern, layer.in_features).cpu()
    values = _codes(packed, layer.nmsparse_base[adapter_name].cpu())
    stored = layer.base_weight.stored
    dtype = stored.dtype if stored.is_floating_point() else torch.float32
    terms = {
        container: getattr(layer, container)[adapter_name].weight.detach().to("cpu", dtype)
        for container in TERM_CONTAINERS
        if adapter_name in getattr(layer, container)
    }
    if terms:
        values |= {f"{container}.weight": value for container, value in terms.items()}
        values[TERMS_DIGEST] = digest_of_all(terms)
    return _named(place, values)


def _codes(packed: torch.Tensor, base: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"nmsparse_packed": packed, "nmsparse_digest": digest(packed), "nmsparse_base": base}


def _only_changes(
    tensors: dict[str, torch.Tensor], config: NMSparseConfig, general: PublishedMask
) -> dict[str, torch.Tensor]:
    """The tensors of a full mask as those of a delta."""
    paths = stored_paths(config.target_modules, config.target_parameters or [])
    places = {name: PREFIX + path for name, path in paths.items()}
    return as_delta(tensors, places, NMPattern(config.pattern), general)


def _named(place: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}{place}.{part}": value.contiguous() for part, value in values.items()}


def published_config(config: NMSparseConfig, linear: list[str], parameters: list[str]) -> NMSparseConfig:
    """The config of a published mask: codes instead of logits, and the pruned layers by their full names."""
    published = copy.deepcopy(config)
    published.mask_format = "packed"
    published.inference_mode = True
    # Resolved: no pattern of names is ever read back from a file.
    published.target_modules = linear
    published.target_parameters = None if config.target_parameters is None else parameters
    published.exclude_modules = published.dense_layers = None
    published.layers_to_transform = published.layers_pattern = None
    return published


# --- loading ---------------------------------------------------------------------------------------------------------
def check_fit(mask: PublishedMask, weights: Mapping[str, BaseWeight], allow_base_mismatch: bool = False) -> None:
    """Check every layer of a mask against the model it is for, one at a time.

    Args:
        mask (`PublishedMask`): the mask.
        weights (`Mapping[str, BaseWeight]`): weights of the model by layer name, as `base_weights(model)` gives them.
        allow_base_mismatch (`bool`): accept other base weights (logged).

    Raises:
        FormatError: if a layer is absent, of another shape, or its codes are impossible.
        BaseModelMismatchError: if the base weights differ.
    """
    if absent := sorted(set(mask.layers) - set(weights)):
        raise FormatError(
            f"{mask.source} holds masks for {len(absent)} layers that the model lacks, first {absent[:5]}; the model has "
            f"layers such as {sorted(weights)[:5]}"
        )
    strangers, unknown = [], []
    for name, stored in mask.layers.items():
        base = weights[name]
        out_features, in_features = base.shape
        if stored.packed.shape[0] != out_features:
            raise FormatError(
                f"{name}: the mask has {stored.packed.shape[0]} rows, the layer {out_features}; it is for another model"
            )
        ops.check_codes(stored.packed, mask.pattern, in_features, name)
        for container, shape in term_shapes(mask.config, out_features, in_features, base.num_experts).items():
            if tuple(stored.terms[container].shape) != shape:
                raise FormatError(
                    f"{name}: {container} has shape {list(stored.terms[container].shape)}, the layer needs {list(shape)}; "
                    "it is for another model"
                )
        found = base.fingerprint()
        if found is None or not bool(stored.base.any()):
            unknown.append(name)
        elif not torch.equal(found, stored.base):
            strangers.append(f"{name} (fingerprint {to_hex(found)}, expected {to_hex(stored.base)})")
    if unknown:
        logger.warning(
            "%d layers of %s could not be checked against their base weights (first %s); the mask names base %r, revision %r",
            len(unknown),
            mask.source,
            unknown[0],
            mask.config.base_model_name_or_path,
            mask.config.revision,
        )
    if strangers:
        message = (
            f"{mask.source} was made for other weights: {len(strangers)} of {len(mask.layers)} layers differ, first "
            f"{strangers[0]}. Its base is {mask.config.base_model_name_or_path!r}, revision {mask.config.revision!r}"
        )
        if not allow_base_mismatch:
            raise BaseModelMismatchError(
                f"{message}; load that model, or pass allow_base_mismatch=True if you are sure"
                + rounding_hint(next(iter(weights.values())).stored)
            )
        logger.warning("%s; loaded all the same because of allow_base_mismatch=True", message)


def load_mask(
    model: nn.Module,
    source: str | os.PathLike,
    revision: str | None = None,
    task: str | None = None,
    adapter_name: str = "default",
    allow_base_mismatch: bool = False,
    general: str | os.PathLike | PublishedMask | None = None,
) -> PeftModel:
    """Put a published mask on a model. Everything is checked before the model is touched.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the base model, or one that carries masks already.
        source (`str` or `Path`): folder or Hub repo of the mask.
        revision (`str`, *optional*): of the repo.
        task (`str`, *optional*): subfolder, where a repo holds masks of several tasks.
        adapter_name (`str`): name the mask gets on the model.
        allow_base_mismatch (`bool`): accept base weights other than those the mask was made for.
        general (`str`, `Path` or `PublishedMask`, *optional*): the general mask of a delta, if it is not where the delta
            says; see `read_mask`.

    Returns:
        the model with the mask active.

    Raises:
        FormatError, BaseModelMismatchError: see `read_mask` and `check_fit`.
        ConfigError: if the adapter name is taken.
    """
    mask = read_mask(source, revision, task, general)
    if adapter_name in _adapter_names(model):
        raise ConfigError(
            f"the model already has an adapter {adapter_name!r}; pass another adapter_name or delete it first"
        )
    if any(layer.merged for layer in mask_layers(model).values()):
        raise ConfigError(
            "a mask is merged into the weights, which are pruned now; unmerge it first (unmerge_adapter())"
        )
    check_fit(mask, base_weights(_plain(model)), allow_base_mismatch)
    parameters = mask.config.target_parameters or []
    config = published_config(mask.config, sorted(set(mask.layers) - set(parameters)), parameters)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    for name, layer in mask_layers(model, adapter_name).items():
        stored = mask.layers[name]
        layer.mismatch_allowed[adapter_name] = allow_base_mismatch
        layer.nmsparse_packed[adapter_name].copy_(stored.packed)
        layer.nmsparse_digest[adapter_name].copy_(digest(stored.packed))
        layer.nmsparse_base[adapter_name].copy_(stored.base)
        with torch.no_grad():
            for container, value in stored.terms.items():
                getattr(layer, container)[adapter_name].weight.copy_(value)
    model.set_adapter(adapter_name)
    model.eval()
    return model


# --- small helpers --------------------------------------------------------------------------------------------------
def active_mask(model: nn.Module) -> str:
    """Name of the one active mask adapter of a model.

    Raises:
        ConfigError: if there is none, or several.
    """
    layers = mask_layers(model)
    names = {name for layer in layers.values() for name in layer.active_adapters if name in layer.configs}
    if len(names) != 1:
        raise ConfigError(
            f"expected one active mask adapter, found {sorted(names) or 'none'}; name it with adapter_name="
        )
    return names.pop()


def _adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in mask_layers(model).values() for name in layer.configs})


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
