# SPDX-License-Identifier: Apache-2.0
"""Masks, codes and packed 2:4 weights in C++ on the CPU: `native/packing.cpp`, which reads and writes each number once.

The functions are those of `packing.py`, of tensors that `takes` accepts. `None` instead of a result: not all groups can be
had, and the reference says which.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from ..codec import GroupCounts, code_of_word, word_of_code
from ..pattern import NMPattern
from .eager import is_plain_eager
from .linear24.cpu import unpack_on_cpu
from .linear24.weight import Weight24
from .native_build import native_library
from .reference import PATTERN_24, Pruned24

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Packing(ctypes.Structure):
    """`Packing` of native/packing.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "mask", "codes", "packed")),
        *((name, ctypes.c_void_p) for name in ("to_mask", "to_codes", "to_packed", "values", "ids", "small_codes")),
        *((name, ctypes.c_void_p) for name in ("weight", "code_of_word", "word_of_code")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "row_bytes", "filled", "refused")),
        *((name, ctypes.c_int) for name in ("n", "m", "candidates", "run", "run_bytes", "score_type", "weight_type")),
        *((name, ctypes.c_int) for name in ("magnitudes", "complete", "check", "threads")),
    )


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the C++ kernels read these, each of two dimensions: scores and weights, masks, codes or packed codes."""
    return (
        all(tensor.device.type == "cpu" and tensor.dim() == 2 and tensor.numel() > 0 for tensor in tensors)
        and is_plain_eager(*tensors)
        and native_library() is not None
    )


def takes_numbers(*tensors: torch.Tensor) -> bool:
    """The same of scores, weights and values, whose gradients the kernels do not compute."""
    return all(tensor.dtype in _TYPES for tensor in tensors) and takes(*tensors)


def top_n_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    _run(pattern, scores.shape, scores=scores, to_mask=mask)
    return mask


def top_n_codes(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    codes = _new_codes(scores, scores.shape, pattern)
    _run(pattern, scores.shape, scores=scores, to_codes=codes)
    return codes


def prune_24(weight: torch.Tensor, scores: torch.Tensor | None) -> Pruned24:
    pruned = _new_pruned(weight)
    made = dict(zip(("values", "ids", "small_codes"), pruned, strict=True))
    given = weight if scores is None else scores
    _run(PATTERN_24, weight.shape, magnitudes=scores is None, scores=given, weight=weight, **made)
    return pruned


def pack_24(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    values, ids, _ = _new_pruned(weight)
    refused, _ = _run(PATTERN_24, weight.shape, mask=mask, weight=weight, values=values, ids=ids)
    return None if refused else (values, ids)


def unpack_24(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return unpack_on_cpu(Weight24(values, ids))


def mask_to_codes(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor | None:
    codes = _new_codes(mask, mask.shape, pattern)
    refused, _ = _run(pattern, mask.shape, mask=mask, to_codes=codes)
    return None if refused else codes


def codes_to_mask(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor | None:
    mask = codes.new_empty(codes.shape[0], in_features, dtype=torch.bool)
    refused, _ = _run(pattern, mask.shape, codes=codes.long(), to_mask=mask)
    return None if refused else mask


def complete_mask(mask: torch.Tensor, pattern: NMPattern) -> tuple[torch.Tensor, int] | None:
    completed = mask.new_empty(mask.shape)
    refused, filled = _run(pattern, mask.shape, complete=True, mask=mask, to_mask=completed)
    return None if refused else (completed, filled)


def count_groups(mask: torch.Tensor, pattern: NMPattern) -> GroupCounts:
    over, under = _run(pattern, mask.shape, complete=True, mask=mask)
    return GroupCounts(mask.shape[0] * pattern.num_groups(mask.shape[1]), over, under)


def pack_codes(codes: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor | None:
    packed = codes.new_empty(codes.shape[0], pattern.packed_row_bytes(in_features), dtype=torch.uint8)
    refused, _ = _run(pattern, (len(codes), in_features), codes=codes.long(), to_packed=packed)
    return None if refused else packed


def unpack_codes(packed: torch.Tensor, pattern: NMPattern, in_features: int, check: bool) -> torch.Tensor | None:
    shape = (len(packed), in_features)
    codes = _new_codes(packed, shape, pattern)
    refused, _ = _run(pattern, shape, check=check, packed=packed, to_codes=codes)
    return None if refused else codes


def holds_codes(packed: torch.Tensor, pattern: NMPattern, in_features: int) -> bool:
    refused, _ = _run(pattern, (len(packed), in_features), packed=packed)
    return not refused


def _new_codes(like: torch.Tensor, shape: tuple[int, ...], pattern: NMPattern) -> torch.Tensor:
    return like.new_empty(shape[0], pattern.num_groups(shape[1]), dtype=torch.int64)


def _new_pruned(weight: torch.Tensor) -> Pruned24:
    rows, in_features = weight.shape
    ids, codes = (weight.new_empty(rows, in_features // part, dtype=torch.uint8) for part in (8, 4))
    return Pruned24(weight.new_empty(rows, in_features // 2), ids, codes)


@lru_cache(maxsize=64)
def _tables(pattern: NMPattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The code of each word, int32, and the word of each code, int16, of which C++ takes the bits."""
    return code_of_word(pattern).int(), word_of_code(pattern).to(torch.int16)


def _run(
    pattern: NMPattern,
    shape: tuple[int, ...],
    magnitudes: bool = False,
    complete: bool = False,
    check: bool = True,
    **tensors: torch.Tensor,
) -> tuple[int, int]:
    """Of a weight of `shape` (out, in), write some of `tensors` from another; groups refused, and groups filled."""
    laid_out = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    laid_out["code_of_word"], laid_out["word_of_code"] = _tables(pattern)
    scores, weight = tensors.get("scores"), tensors.get("weight")
    run, run_bytes = pattern.packing
    packing = _Packing(
        **{name: tensor.data_ptr() for name, tensor in laid_out.items()},
        rows=shape[0],
        in_features=shape[1],
        row_bytes=pattern.packed_row_bytes(shape[1]),
        n=pattern.n,
        m=pattern.m,
        candidates=pattern.num_candidates,
        run=run,
        run_bytes=run_bytes,
        score_type=0 if scores is None else _TYPES[scores.dtype],
        weight_type=0 if weight is None else _TYPES[weight.dtype],
        magnitudes=magnitudes,
        complete=complete,
        check=check,
        threads=torch.get_num_threads(),
    )
    native_library().nmsparse_packing(ctypes.byref(packing))
    return packing.refused, packing.filled
