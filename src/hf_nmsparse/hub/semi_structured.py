# SPDX-License-Identifier: Apache-2.0
"""Weights held as `torch.sparse.SparseSemiStructuredTensor`: to plain ones with zeros, and back.

Such tensors live in memory only: safetensors cannot store them, and the layout of cuSPARSELt changes with its version.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

from .. import ops
from ..errors import UnsupportedError
from ..ops.linear24.vendor import ids_of_metadata
from ..packed.layers import linear_layers
from ..pattern import NMPattern

logger = logging.getLogger(__name__)

_ROWS, _COLUMNS = 32, 64  # multiples that both backends take in 16 bits


def semi_structured(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are held so, by name; tied ones under each."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if isinstance(parameter, SparseSemiStructuredTensor)}


@torch.no_grad()
def dense_of(tensor: torch.Tensor) -> torch.Tensor:
    """Such a tensor as a plain one with zeros; every other tensor as it is.

    CUTLASS's layout is read on any device, bit for bit. cuSPARSELt's can only be read by multiplying with the identity,
    on its GPU.

    Raises:
        UnsupportedError: if it holds other numbers than floats of 16 or 32 bits.
    """
    if not isinstance(tensor, SparseSemiStructuredTensor):
        return tensor
    values, metadata = tensor.packed, tensor.meta
    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS) or values is None or metadata is None:
        return tensor.detach().to_dense()
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(f"a semi-structured tensor of {tensor.dtype}; weights of 16 or 32 bit floats are read")
    # In float32 one of two is kept, stored as if each number were two of 16 bits.
    halves = values.contiguous().view(torch.int16)
    return ops.unpack_24(halves, ids_of_metadata(metadata)).view(tensor.dtype)


def from_semi_structured(model: nn.Module) -> nn.Module:
    """Turn such weights of a model into plain parameters with zeros, in place. Nothing is changed on failure.

    Returns:
        the model.

    Raises:
        UnsupportedError: as `dense_of`.
    """
    held = semi_structured(model)
    plain = {}
    for parameter in held.values():
        if id(parameter) not in plain:
            plain[id(parameter)] = nn.Parameter(dense_of(parameter), requires_grad=parameter.requires_grad)
    for name, parameter in held.items():
        set_parameter(model, name, plain[id(parameter)])
    return model


@contextlib.contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """`from_semi_structured` for what the context does; if that fails, the model is put back as it was."""
    held = semi_structured(model)
    if not held:
        yield
        return
    from_semi_structured(model)
    try:
        yield
    except BaseException:
        for name, parameter in held.items():
            set_parameter(model, name, parameter)
        raise


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Turn the 2:4 weights of linear layers into semi-structured tensors, in place, for PyTorch's own kernels.

    Layers that are dense, of other dtypes than 16-bit floats, or not `[multiple of 32, multiple of 64]` stay as they are. A
    packed model goes through `nms.decompress` first. Which library is behind it is PyTorch's choice.

    Returns:
        the model, which cannot be saved before `from_semi_structured`.

    Raises:
        UnsupportedError: if no layer can be turned.
    """
    pattern, turned = NMPattern(2, 4), {}
    for name, layer in linear_layers(model).items():
        weight = layer.weight
        if not isinstance(layer, nn.Linear) or isinstance(weight, SparseSemiStructuredTensor):
            continue
        fits = weight.shape[0] % _ROWS == 0 and weight.shape[1] % _COLUMNS == 0
        if fits and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
            detached = weight.detach().contiguous()
            if ops.count_groups(detached != 0, pattern).follows:
                turned[name] = nn.Parameter(to_sparse_semi_structured(detached), requires_grad=False)
    if not turned:
        raise UnsupportedError(
            f"no linear layer is 2:4, on a CUDA device, in bfloat16 or float16 and [multiple of {_ROWS}, multiple of "
            f"{_COLUMNS}]; prune the model, decompress it if it is packed, and move it to the GPU first"
        )
    for name, parameter in turned.items():
        set_parameter(model, f"{name}.weight", parameter)
    logger.info("%d of %d linear layers are semi-structured now", len(turned), len(linear_layers(model)))
    return model


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place that its name says."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
