# SPDX-License-Identifier: Apache-2.0
"""What learning a mask will prune, cost and give, from shapes alone: before any weight is read or logit allocated."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..adapter import NMSparseConfig, NMSparseLayer, NMSparseModel, mask_layers
from ..errors import ConfigError, UnsupportedError
from ..fingerprint import FINGERPRINT_BYTES
from ..packed.layers import unpackable_layers
from ..pattern import NMPattern

_ADAPTER = "default"
_GRADIENT_BYTES, _ADAMW_BYTES = 4, 8  # of one float32 parameter: its gradient; AdamW's two moments
_NARROWING_FIELDS = ("dense_layers", "exclude_modules", "layers_to_transform")


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that the config prunes.

    Args:
        name (`str`): module name.
        out_features (`int`), in_features (`int`): its weight is `[out, in]`.
        groups (`int`): groups of m weights, tails included.
        parameters (`int`): trainable values of its mask, float32.
        mask_bytes (`int`): its packed codes in a published mask.
        dense_bytes (`int`): its weight as it is now.
        packed_bytes (`int`, *optional*): its kept values and their ids in a packed model; `None` if it cannot be packed.
        not_packable (`str`, *optional*): why it cannot.
    """

    name: str
    out_features: int
    in_features: int
    groups: int
    parameters: int
    mask_bytes: int
    dense_bytes: int
    packed_bytes: int | None
    not_packable: str | None


@dataclass(frozen=True)
class Plan:
    """What a mask adapter will prune, and the bytes of everything. Activations are not counted.

    Args:
        pattern (`str`): n:m.
        relaxation (`str`): how logits become a mask.
        candidates (`int`): C(m, n).
        model_parameters (`int`), model_bytes (`int`): of the whole model, tied weights counted once.
        other_trainable (`int`): trainable parameters beside the masks (`modules_to_save`, token indices).
        layers (`list[PlannedLayer]`): what is pruned.
        skipped (`dict[str, str]`): linear layers left dense -> why.
        mask_file_bytes (`int`): of a published mask's safetensors file.
    """

    pattern: str
    relaxation: str
    candidates: int
    model_parameters: int
    model_bytes: int
    other_trainable: int
    mask_file_bytes: int
    layers: list[PlannedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def pruned_weights(self) -> int:
        """Weights under a mask."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Trainable values: those of the masks, and what else the config trains."""
        return sum(layer.parameters for layer in self.layers) + self.other_trainable

    @property
    def logits_bytes(self) -> int:
        """Bytes of all trainable mask tensors, float32."""
        return 4 * sum(layer.parameters for layer in self.layers)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trainable values."""
        return _GRADIENT_BYTES * self.trainable

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's state."""
        return _ADAMW_BYTES * self.trainable

    @property
    def training_bytes(self) -> int:
        """Frozen model, trainable values, gradients and AdamW state: what training holds beside activations."""
        return self.model_bytes + 4 * self.trainable + self.gradient_bytes + self.optimizer_bytes

    @property
    def mask_bits_per_weight(self) -> float:
        """Bits of the published file for each pruned weight."""
        return 8 * self.mask_file_bytes / self.pruned_weights

    @property
    def dense_bytes(self) -> int:
        """Bytes of the pruned layers' weights as they are now."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the pruned layers once packed; layers that cannot be packed count as dense."""
        return sum(layer.dense_bytes if layer.packed_bytes is None else layer.packed_bytes for layer in self.layers)

    @property
    def packed_model_bytes(self) -> int:
        """Bytes of the whole model once packed."""
        return self.model_bytes - self.dense_bytes + self.packed_bytes

    def to_dict(self) -> dict[str, object]:
        """Fields and totals as plain values, for JSON."""
        totals = {name: getattr(self, name) for name, value in vars(Plan).items() if isinstance(value, property)}
        return dataclasses.asdict(self) | totals


def plan(model: nn.Module, config: NMSparseConfig) -> Plan:
    """Say what `get_peft_model(model, config)` will prune, what training it takes and what its results weigh.

    The config is applied by PEFT itself to a copy of the model without values, so the layers are those that training
    gets, and refusals are the same. Nothing is computed or allocated; a model on the meta device serves as well.

    Args:
        model (`nn.Module`): the base model, on any device; it stays as it is.
        config (`NMSparseConfig`): the adapter's configuration; it stays as it is.

    Returns:
        `Plan`.

    Raises:
        UnsupportedError: if the model carries mask adapters already, or the config targets a layer that takes none.
        ConfigError: if the config leaves no layer to prune.
    """
    if mask_layers(model):
        raise UnsupportedError("the model carries mask adapters already; plan on its base model")
    skeleton = _without_values(model)
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    parameters = list(skeleton.parameters())
    unpackable = unpackable_layers(skeleton)
    resolved = copy.deepcopy(config)
    try:
        peft_model = get_peft_model(skeleton, resolved, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError as error:
        raise ConfigError(f"the config leaves no layer to prune ({error})") from error
    pattern = NMPattern(config.pattern)
    layers = [_planned(name, layer, pattern, unpackable) for name, layer in mask_layers(peft_model, _ADAPTER).items()]
    pruned = {layer.name for layer in layers}
    trainable = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    return Plan(
        pattern=str(pattern),
        relaxation=config.relaxation,
        candidates=pattern.num_candidates,
        model_parameters=sum(parameter.numel() for parameter in parameters),
        model_bytes=sum(parameter.nbytes for parameter in parameters),
        other_trainable=max(0, trainable - sum(layer.parameters for layer in layers)),
        mask_file_bytes=_mask_file_bytes(layers),
        layers=layers,
        skipped={
            name: _reason(name, module is head, resolved) for name, module in linears.items() if name not in pruned
        },
    )


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes and no memory. Ties between parameters are kept."""
    twins: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = buffer.to("meta")
    # deepcopy takes what its memo holds for the copy already made.
    return copy.deepcopy(model, twins)


def _planned(name: str, layer: NMSparseLayer, pattern: NMPattern, unpackable: dict[str, str]) -> PlannedLayer:
    weight = layer.get_base_layer().weight
    out_features, in_features = weight.shape
    reason = unpackable.get(name)
    if reason is None and not inside_24(pattern):
        reason = f"the pattern {pattern} can keep more than 2 of 4 weights"
    packed = weight.nbytes // 2 + out_features * in_features // 8
    return PlannedLayer(
        name=name,
        out_features=out_features,
        in_features=in_features,
        groups=out_features * pattern.num_groups(in_features),
        parameters=sum(
            value.numel() for key, value in layer.named_parameters() if key.startswith(NMSparseModel.prefix)
        ),
        mask_bytes=out_features * pattern.packed_row_bytes(in_features),
        dense_bytes=weight.nbytes,
        packed_bytes=None if reason else packed,
        not_packable=reason,
    )


def inside_24(pattern: NMPattern) -> bool:
    """Whether every mask of the pattern keeps at most 2 of each 4 consecutive weights."""
    n, m = pattern.n, pattern.m
    for start in range(0, math.lcm(4, m), 4):
        groups = range(start // m, (start + 3) // m + 1)
        overlaps = (min(start + 4, (group + 1) * m) - max(start, group * m) for group in groups)
        if sum(min(n, overlap) for overlap in overlaps) > 2:
            return False
    return True


def _reason(name: str, is_head: bool, config: NMSparseConfig) -> str:
    """Why the adapter leaves a linear layer alone: the field without which it would not."""
    for narrowing in _NARROWING_FIELDS:
        if getattr(config, narrowing) is not None:
            wider = copy.copy(config)
            setattr(wider, narrowing, None)
            if NMSparseModel._check_target_module_exists(wider, name):
                return f"{'not' if narrowing == 'layers_to_transform' else 'named'} in {narrowing}"
    return "output head" if is_head else "not in target_modules"


def _mask_file_bytes(layers: list[PlannedLayer]) -> int:
    """Size of a published mask: the safetensors header as `save_mask` makes it, then codes, digest and fingerprint."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for layer in layers:
        shapes = {
            "nmsparse_packed": [layer.out_features, layer.mask_bytes // layer.out_features],
            "nmsparse_digest": [FINGERPRINT_BYTES],
            "nmsparse_base": [FINGERPRINT_BYTES],
        }
        for part, shape in shapes.items():
            end = offset + math.prod(shape)
            header[f"base_model.model.{layer.name}.{part}"] = {
                "dtype": "U8",
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset
