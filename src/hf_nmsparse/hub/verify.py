# SPDX-License-Identifier: Apache-2.0
"""Does a model, mask or packed folder hold what it says? Counts groups with too many and too few weights separately."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..adapter import linear_and_expert_weights, mask_layers
from ..errors import ConfigError, FormatError
from ..files import RESULTS_FILE, open_tensors
from ..packed import PackedConfig, SparseLinear24
from ..packed.checkpoint import check_packed_files, check_slorb_block, check_values
from ..pattern import NMPattern, Pattern, parse_pattern
from ..results import RunResults
from .mask_file import PublishedMask, read_mask
from .model_config import OF_TRANSFORMERS, read_model_config
from .remote import local_folder

logger = logging.getLogger(__name__)


@dataclass
class VerifyReport:
    """What `verify` found.

    Args:
        kind (`str`): "mask", "packed model", "masked model" or "model with mask adapters".
        pattern (`str`): the pattern counted against.
        layers (`dict[str, GroupCounts]`): of each sparse layer.
        dense_layers (`list[str]`): linear layers left dense: most of their groups have more non-zeros than the pattern
            keeps. A layer with only some such groups is counted as a broken sparse one.
    """

    kind: str
    pattern: str
    layers: dict[str, ops.GroupCounts] = field(default_factory=dict)
    dense_layers: list[str] = field(default_factory=list)

    @property
    def groups(self) -> int:
        """Groups of the sparse layers."""
        return sum(counts.groups for counts in self.layers.values())

    @property
    def over(self) -> int:
        """Groups with more than n non-zeros."""
        return sum(counts.over for counts in self.layers.values())

    @property
    def under(self) -> int:
        """Groups with fewer than n non-zeros."""
        return sum(counts.under for counts in self.layers.values())

    @property
    def ok(self) -> bool:
        """Whether at least one layer follows the pattern and none of those counted breaks it."""
        return bool(self.layers) and self.over == 0


def verify(
    model_or_path: nn.Module | str | os.PathLike,
    pattern: str | Pattern | None = None,
    revision: str | None = None,
    task: str | None = None,
) -> VerifyReport:
    """Check a model in memory, a folder, or a Hub repo.

    Published masks and packed models are read strictly (digests, codes, ids) and refused with the name of the damaged
    tensor. In masked models each linear weight is counted group by group.

    Args:
        model_or_path (`nn.Module`, `str` or `Path`): what to check.
        pattern (`str`, `NMPattern` or `Unstructured`, *optional*): for masked plain models; by default the one that a
            results file beside the model names, else 2:4. Of a share such as `"60%"` each layer is one group; one with
            fewer zeros counts as dense.
        revision (`str`, *optional*): branch, tag or commit of a repo.
        task (`str`, *optional*): subfolder of a folder or repo.

    Raises:
        FormatError: if a file is damaged.
        HubError: if the repo cannot be fetched.
        ConfigError: if a revision or task is given for a model in memory, or a revision for a local folder.
    """
    if isinstance(model_or_path, nn.Module):
        if revision is not None or task is not None:
            raise ConfigError("revision and task are for repos and folders; leave them out for a model in memory")
        return _verify_model(model_or_path, parse_pattern(pattern or "2:4"))
    folder = local_folder(model_or_path, revision, task, ("*.json", "*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        return _verify_mask(read_mask(model_or_path, revision, task))
    config = folder / "config.json"
    if not config.is_file():
        raise FormatError(
            f"{folder} holds neither adapter_config.json nor config.json; it is no mask and no model, or one of several "
            "tasks: then name the subfolder with task="
        )
    files = sorted(str(path) for path in folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder} holds no safetensors file; only safetensors is read")
    content = read_model_config(folder)
    quantization = content.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FormatError(f"{config}: quantization_config must be an object, got {quantization!r:.80}; fetch it again")
    layouts = _layouts(config, content)
    if quantization.get("quant_method") == "nmsparse":
        return _verify_packed(files, PackedConfig(**quantization), layouts)
    for path in files:
        with open_tensors(path) as file:
            if stray := [name for name in file.keys() if name.endswith(".weight_idx")]:  # noqa: SIM118
                raise FormatError(
                    f"{path} holds packed tensors, first {stray[0]}, but the quantization_config of {config} is not that of a packed "
                    "model; fetch it again"
                )
    pattern = parse_pattern(pattern or _recorded_pattern(folder) or "2:4")
    return _counted(VerifyReport("masked model", str(pattern)), _weights(files, layouts), pattern)


def _recorded_pattern(folder: Path) -> Pattern | None:
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        return RunResults.read(path).parsed_pattern
    except FormatError as error:  # many programs call a file so
        logger.info("%s; its pattern is not taken from it", error)
        return None


def _verify_mask(mask: PublishedMask) -> VerifyReport:
    report = VerifyReport("mask", str(mask.pattern))
    for name, stored in mask.layers.items():
        # A code keeps exactly n by construction, so decoding it is the check. The layer's true width is the model's
        # to tell; the count is of the groups that fit the stored rows.
        groups = mask.pattern.max_groups(stored.packed.shape[1])
        codes = ops.unpack_codes(stored.packed, mask.pattern, groups * mask.pattern.m, name=name)
        report.layers[name] = ops.GroupCounts(codes.numel(), 0, 0)
    return report


def _verify_packed(files: list[str], config: PackedConfig, layouts: Mapping[str, bool]) -> VerifyReport:
    packed = check_packed_files(files)
    check_slorb_block(packed, config.slorb_block)
    check_values(packed, config.values)
    # What is not packed may be masked all the same: fused experts, and layers whose width is no multiple of 8.
    others = ((name, weight) for name, weight in _weights(files, layouts) if name not in packed)
    report = _counted(VerifyReport("packed model", "2:4"), others, NMPattern(2, 4))
    for name, values in _weights(files, {}):
        if name in packed:
            if packed[name].values == "int4":
                values = ops.unpack_nibbles(values)
            groups = values.numel() // 2
            under = int((values.view(values.shape[0], -1, 2) == 0).any(-1).sum())
            report.layers[name] = ops.GroupCounts(groups, 0, under)
    return report


def _verify_model(model: nn.Module, pattern: Pattern) -> VerifyReport:
    if layers := mask_layers(model):
        report = VerifyReport("model with mask adapters", str(pattern))
        for name, layer in layers.items():
            for adapter_name in layer.active_adapters:
                if adapter_name in layer.configs:
                    counted_as = layer.relaxations[adapter_name].pattern
                    report.pattern = str(counted_as)
                    report.layers[name] = ops.count_groups(layer.hard_mask(adapter_name), counted_as)
        return report
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear24)]
    kind, pattern = ("packed model", NMPattern(2, 4)) if packed else ("masked model", pattern)
    weights = [(name, module.sparse_weight) for name, module in packed]
    weights += [(name, base.read) for name, base in linear_and_expert_weights(model).items()]
    return _counted(VerifyReport(kind, str(pattern)), ((name, read().detach()) for name, read in weights), pattern)


def _counted(report: VerifyReport, weights: Iterator[tuple[str, torch.Tensor]], pattern: Pattern) -> VerifyReport:
    for name, weight in weights:
        counts = _count(weight, pattern)
        if 2 * counts.over > counts.groups:
            report.dense_layers.append(name)
        else:
            report.layers[name] = counts
    return report


def _count(weight: torch.Tensor, pattern: Pattern) -> ops.GroupCounts:
    if isinstance(pattern, NMPattern):
        return ops.count_groups(weight, pattern)
    allowed = weight.numel() * pattern.density + len(weight)  # the zeros of each row are rounded down
    return ops.GroupCounts(1, int(int(torch.count_nonzero(weight)) > allowed), 0)


def _weights(files: list[str], layouts: Mapping[str, bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Float weights of safetensors files as `[out, in]` by name, one at a time: matrices, and fused experts.

    Args:
        files (`list[str]`): the files.
        layouts (`Mapping[str, bool]`): see `_layouts`; fused experts that are not named there are left out.
    """
    for path in files:
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                dims, leaf = len(file.get_slice(key).get_shape()), f".{key}".rpartition(".")[2]
                name = key.removesuffix(".weight")
                if dims == 2 and leaf == "weight":
                    weight = file.get_tensor(key)
                    yield name, weight.t() if layouts.get(name.rpartition(".")[2]) else weight
                elif dims == 3 and leaf in layouts:
                    weight = file.get_tensor(key)
                    yield key, (weight.mT if layouts[leaf] else weight).flatten(0, 1)


def _layouts(path: Path, config: dict) -> dict[str, bool]:
    """Last parts of the names of `Conv1D` layers and fused expert weights -> whether they are stored `[..., in, out]`.

    Found in the architecture that a config.json names, if Transformers has it.

    Raises:
        FormatError: if no model can be made from the config.
    """
    architectures = config.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        model_class = getattr(transformers, str(architecture), None)
        if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
            continue
        try:
            with torch.device("meta"):
                model = model_class(model_class.config_class.from_dict(config))
        except OF_TRANSFORMERS as error:
            raise FormatError(f"{path}: no {architecture} can be made from it ({error}); fetch it again") from error
        weights = linear_and_expert_weights(model).items()
        return {
            name.rpartition(".")[2]: base.transposed
            for name, base in weights
            if base.transposed or base.is_fused_experts
        }
    return {}
