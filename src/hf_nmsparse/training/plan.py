# SPDX-License-Identifier: Apache-2.0
"""What learning a mask will prune, cost and give, from shapes alone: before any weight is read or logit allocated."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from ..adapter import (
    TERMS_DIGEST,
    BaseWeight,
    NMSparseConfig,
    NMSparseLayer,
    NMSparseModel,
    ParamWrapper,
    base_weights,
    linear_and_expert_weights,
    mask_layers,
    term_shapes,
)
from ..criteria import find_stacks
from ..errors import ConfigError, UnsupportedError
from ..fingerprint import FINGERPRINT_BYTES
from ..hub.mask_file import PREFIX, stored_paths
from ..packed.layers import unpackable_layers
from ..packed.stored_mask import inside_24
from ..pattern import NMPattern
from ..relaxations import RELAXATIONS
from .optimizers import STATES
from .planned import Plan, PlannedLayer

_ADAPTER = "default"
_NARROWING_FIELDS = ("dense_layers", "exclude_modules", "layers_to_transform")
# Names of dtypes in a safetensors file, in the order in which it lays tensors down.
_STORED_AS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}


def plan(
    model: nn.Module,
    config: NMSparseConfig,
    optimizer_states: Literal["float32", "8bit"] = "float32",
    in_backward: bool = False,
    checkpointing: bool = False,
) -> Plan:
    """Say what `get_peft_model(model, config)` will prune, what training it takes and what its results weigh.

    The config is applied by PEFT itself to a copy of the model without values, so the layers are those that training
    gets, and refusals are the same. Nothing is computed or allocated; a model on the meta device serves as well.

    Args:
        model (`nn.Module`): the base model, on any device; it stays as it is.
        config (`NMSparseConfig`): the adapter's configuration; it stays as it is.
        optimizer_states (`str`): of the logits in AdamW: `"float32"`, or `"8bit"` as `NMSparseTrainer` has it with
            `mask_optimizer_states="8bit"`.
        in_backward (`bool`): the optimizer steps within the backward pass and frees each gradient
            (`NMSparseTrainer(optimizer_in_backward=True)`).
        checkpointing (`bool`): whether blocks are computed again in the backward pass (gradient checkpointing).

    Returns:
        `Plan`.

    Raises:
        UnsupportedError: if the model carries mask adapters already, or the config targets a layer that takes none.
        ConfigError: if the config leaves no layer to prune, or `optimizer_states` is another.
    """
    if optimizer_states not in STATES:
        raise ConfigError(f"optimizer_states={optimizer_states!r}: choose one of {', '.join(map(repr, STATES))}")
    if mask_layers(model):
        raise UnsupportedError("the model carries mask adapters already; plan on its base model")
    weights = base_weights(model)
    skeleton = _without_values(model, weights)
    prunable = linear_and_expert_weights(skeleton)
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    model_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    unpackable = unpackable_layers(skeleton)
    blocks = _block_bytes(model)
    computes_in = next(
        (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32
    )
    resolved = copy.deepcopy(config)
    try:
        peft_model = get_peft_model(skeleton, resolved, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError as error:
        raise ConfigError(f"the config leaves no layer to prune ({error})") from error
    masked = mask_layers(peft_model, _ADAPTER)
    layers = [
        _planned(name, layer, weights[name], config, unpackable, blocks, computes_in) for name, layer in masked.items()
    ]
    trainable = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    pattern = NMPattern(config.pattern)
    return Plan(
        pattern=str(pattern),
        relaxation=config.relaxation,
        logits_dtype=config.logits_dtype,
        optimizer_states=optimizer_states,
        in_backward=in_backward,
        checkpointing=checkpointing,
        resample=config.resample,
        candidates=pattern.num_candidates,
        model_parameters=model_parameters,
        model_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        other_trainable=max(0, trainable - sum(layer.parameters + layer.term_parameters for layer in layers)),
        mask_file_bytes=_mask_file_bytes(masked, weights, config),
        block_bytes=blocks,
        edge_bytes=_edge_bytes(model),
        layers=layers,
        skipped={
            name: _reason(name, base, base.module is head, resolved)
            for name, base in prunable.items()
            if name not in masked
        },
    )


def _without_values(model: nn.Module, weights: Mapping[str, BaseWeight]) -> nn.Module:
    """A copy of a model whose tensors have shapes and no memory. Ties between parameters are kept.

    Quantised layers become plain ones: without values they could not be read.
    """
    twins: dict[int, object] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = buffer.to("meta")
    for base in weights.values():
        if base.backend is not None:
            out_features, in_features = base.shape
            bias = base.module.bias is not None
            twins[id(base.module)] = nn.Linear(in_features, out_features, bias, device="meta")
    # deepcopy takes what its memo holds for the copy already made.
    return copy.deepcopy(model, twins)


def _block_bytes(model: nn.Module) -> dict[str, int]:
    """Module names of the model's blocks -> bytes of their weights; empty where it has none."""
    try:
        stacks = find_stacks(model)
    except UnsupportedError:
        return {}
    return {
        f"{stack}.{index}": _parameter_bytes(block) for stack, blocks in stacks for index, block in enumerate(blocks)
    }


def _edge_bytes(model: nn.Module) -> int:
    """Bytes of the input embeddings or of the output head, whichever are larger; 0 where there are none."""
    if not isinstance(model, PreTrainedModel):
        return 0
    edges = [model.get_output_embeddings()]
    with contextlib.suppress(NotImplementedError):  # of models that take no tokens
        edges.append(model.get_input_embeddings())
    return max((_parameter_bytes(edge) for edge in edges if edge is not None), default=0)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _planned(
    name: str,
    layer: NMSparseLayer,
    base: BaseWeight,
    config: NMSparseConfig,
    unpackable: Mapping[str, str],
    blocks: Iterable[str],
    computes_in: torch.dtype,
) -> PlannedLayer:
    pattern = NMPattern(config.pattern)
    out_features, in_features = layer.out_features, layer.in_features
    shapes = term_shapes(config, out_features, in_features, base.num_experts)
    terms = {container: math.prod(shape) for container, shape in shapes.items()}
    branch = sum(count for container, count in terms.items() if not container.startswith("nmsparse_delta"))
    reason = _not_packable(layer, base, pattern) or unpackable.get(name)
    itemsize = base.stored.element_size()
    packed = itemsize * (out_features * in_features // 2 + branch) + out_features * in_features // 8
    trained = sum(value.numel() for key, value in layer.named_parameters() if key.startswith(NMSparseModel.prefix))
    parameters = trained - sum(terms.values())
    # Beside the masked weight the weight under the mask, where that is computed: dequantised, changed, or laid out anew.
    relaxation = RELAXATIONS[config.relaxation]
    computed = base.backend is not None or config.delta_rank is not None or (base.transposed and base.is_fused_experts)
    dtype = computes_in if base.backend is not None else base.stored.dtype
    return PlannedLayer(
        name=name,
        block=next((block for block in blocks if name.startswith(f"{block}.")), None),
        out_features=out_features,
        in_features=in_features,
        groups=out_features * pattern.num_groups(in_features),
        parameters=parameters,
        logits_bytes=getattr(torch, config.logits_dtype).itemsize * parameters,
        term_parameters=sum(terms.values()),
        kept_bytes=max(2 if computed else 1, relaxation.held_weights) * dtype.itemsize * out_features * in_features,
        mask_bytes=out_features * pattern.packed_row_bytes(in_features),
        dense_bytes=base.stored.nbytes,
        packed_bytes=None if reason else packed,
        not_packable=reason,
    )


def _not_packable(layer: NMSparseLayer, base: BaseWeight, pattern: NMPattern) -> str | None:
    """Why no layer of this kind can be packed."""
    if isinstance(layer, ParamWrapper):
        return "fused experts" if base.is_fused_experts else "not the weight of a linear layer"
    if base.is_convolution:
        return "a convolution"
    if base.backend is not None:
        return f"quantised with {base.backend.backend_name}; publish the mask, and pack the unquantised base under it"
    return None if inside_24(pattern) else f"the pattern {pattern} can keep more than 2 of 4 weights"


def _reason(name: str, base: BaseWeight, is_head: bool, config: NMSparseConfig) -> str:
    """Why the adapter leaves a weight alone."""
    wide = copy.copy(config)
    for narrowing in _NARROWING_FIELDS:
        setattr(wide, narrowing, None)
    if base.is_fused_experts:  # that only the other fields decide
        wide.target_modules = {name}
    if NMSparseModel._check_target_module_exists(wide, name):
        for narrowing in _NARROWING_FIELDS:
            narrow = copy.copy(wide)
            setattr(narrow, narrowing, getattr(config, narrowing))
            if not NMSparseModel._check_target_module_exists(narrow, name):
                return f"{'not' if narrowing == 'layers_to_transform' else 'named'} in {narrowing}"
    if base.is_fused_experts:
        return "not in target_parameters"
    return "output head" if is_head else "not in target_modules"


def _mask_file_bytes(
    layers: Mapping[str, NMSparseLayer], weights: Mapping[str, BaseWeight], config: NMSparseConfig
) -> int:
    """Size of a published mask: the header as safetensors writes it for `save_mask`, then the tensors."""
    pattern = NMPattern(config.pattern)
    tensors: list[tuple[torch.dtype, str, tuple[int, ...]]] = []
    # As in a file: PEFT nests the wrappers of one module, and the outermost, which a walk meets first, is its last.
    parameters = [name for name, layer in reversed(list(layers.items())) if isinstance(layer, ParamWrapper)]
    for name, place in stored_paths(set(layers) - set(parameters), parameters).items():
        layer, base = layers[name], weights[name]
        packed = (layer.out_features, pattern.packed_row_bytes(layer.in_features))
        codes = {
            "nmsparse_packed": packed,
            "nmsparse_digest": (FINGERPRINT_BYTES,),
            "nmsparse_base": (FINGERPRINT_BYTES,),
        }
        terms = term_shapes(config, layer.out_features, layer.in_features, base.num_experts)
        if terms:
            codes[TERMS_DIGEST] = (FINGERPRINT_BYTES,)
        dtype = base.stored.dtype if base.stored.is_floating_point() else torch.float32
        tensors += [(torch.uint8, f"{PREFIX}{place}.{part}", shape) for part, shape in codes.items()]
        tensors += [(dtype, f"{PREFIX}{place}.{part}.weight", shape) for part, shape in terms.items()]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order, start = list(_STORED_AS), 0
    for dtype, key, shape in sorted(tensors, key=lambda tensor: (order.index(tensor[0]), tensor[1])):
        end = start + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _STORED_AS[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + start
