# SPDX-License-Identifier: Apache-2.0
"""Pruning and packing on a GPU: `triton_packing.py`, which reads and writes each number once.

The functions are those of `packing.py`, of tensors that `takes_scores` or `takes_packing` accepts.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import codec
from ..pattern import NMPattern
from . import reference
from .eager import is_plain_eager
from .linear24.gpu import aligned, ceil_div, has_triton
from .reference import Pruned24
from .trial import Trials

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # their bits
_INTEGERS = {4: torch.int32, 2: torch.int16}
_POSITIONS = (2, 4, 8, 16)  # m that the kernels can put in order
_BYTES = 16  # the widest load
WARPS = 4  # a program
THREADS = 32 * WARPS
_trials = Trials("the kernels that prune and pack", "call the function once before the capture")


def takes_scores(scores: torch.Tensor, pattern: NMPattern) -> bool:
    """Whether the Triton kernels choose by these scores."""
    return (
        pattern.m in _POSITIONS
        and scores.dim() == 2
        and _takes(scores)
        and _trials.works(scores.device, (scores.dtype, pattern), lambda: _chooses_right(scores, pattern))
    )


def takes_packing(*numbers: torch.Tensor, ids: torch.Tensor | None = None) -> bool:
    """Whether the Triton kernels pack these: a weight, maybe with its scores, or, with `ids`, unpack values."""
    shared = numbers if ids is None else (*numbers, ids)
    first = numbers[0]
    dense = first.numel() * (1 if ids is None else 2)
    return (
        _takes(*numbers)
        and all(tensor.device == first.device for tensor in shared)
        and is_plain_eager(*shared)
        and dense % _weights(first.dtype) == 0
        and _trials.works(first.device, tuple(t.dtype for t in shared), lambda: _packs_right(*numbers))
    )


def _takes(*numbers: torch.Tensor) -> bool:
    return (
        all(t.device.type == "cuda" and t.dtype in _INFINITY and t.numel() > 0 for t in numbers)
        and is_plain_eager(*numbers)
        and has_triton()
    )


# --- functions of packing.py ----------------------------------------------------------------------------------------------
def top_n_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    _choose(scores, pattern, mask.view(torch.int8), for_codes=False)
    return mask


def top_n_codes(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    codes = scores.new_empty(scores.shape[0], pattern.num_groups(scores.shape[1]), dtype=torch.int64)
    _choose(scores, pattern, codes, for_codes=True)
    return codes


def prune_24(weight: torch.Tensor, scores: torch.Tensor | None) -> Pruned24:
    from . import triton_packing

    rows, in_features = weight.shape
    ids, codes = (weight.new_empty(rows, in_features // part, dtype=torch.uint8) for part in (8, 4))
    pruned = Pruned24(weight.new_empty(rows, in_features // 2), ids, codes)
    given = weight if scores is None else scores
    threads = weight.numel() // _weights(weight.dtype)
    with torch.cuda.device(weight.device):
        triton_packing.prune_24[(ceil_div(threads, THREADS),)](
            *(_bits(weight, "weight"), _bits(given, "scores"), _bits(pruned.values, "values"), ids, codes, threads),
            MAGNITUDES=scores is None,
            INF=_INFINITY[given.dtype],
            SCORE_VECTOR=_BYTES // given.element_size(),
            **compile_time(weight.dtype),
            num_warps=WARPS,
        )
    return pruned


def unpack_24(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    from . import triton_packing

    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    threads = dense.numel() // _weights(values.dtype)
    with torch.cuda.device(values.device):
        triton_packing.unpack_24[(ceil_div(threads, THREADS),)](
            *(_bits(values, "values"), aligned(ids, "ids"), _bits(dense, "dense"), threads),
            **compile_time(values.dtype),
            num_warps=WARPS,
        )
    return dense


def _choose(scores: torch.Tensor, pattern: NMPattern, result: torch.Tensor, for_codes: bool) -> None:
    from . import triton_packing

    rows, in_features = scores.shape
    constants = compile_time(scores.dtype, pattern)
    blocks = ceil_div(in_features, THREADS * constants["WEIGHTS"])
    with torch.cuda.device(scores.device):
        triton_packing.top_n[(rows * blocks,)](
            *(_bits(scores, "scores"), result, result, _code_of_word(pattern, scores.device)),
            *(in_features, pattern.num_groups(in_features), blocks),
            FOR_CODES=for_codes,
            INF=_INFINITY[scores.dtype],
            N=pattern.n,
            M=pattern.m,
            **constants,
            num_warps=WARPS,
        )


def compile_time(dtype: torch.dtype, pattern: NMPattern | None = None) -> dict[str, int]:
    """How a thread divides its work: two loads of weights to be packed; one of scores, or as many as a group takes."""
    vector = _BYTES // dtype.itemsize
    weights = 2 * vector if pattern is None else max(vector, pattern.m)
    return {"WEIGHTS": weights, "VECTOR": vector, "THREADS": THREADS}


def _weights(dtype: torch.dtype) -> int:
    return compile_time(dtype)["WEIGHTS"]


def _bits(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The same memory as integers, or a copy where it does not lie as vector loads need it."""
    return aligned(tensor.detach(), name).view(_INTEGERS[tensor.element_size()])


@lru_cache(maxsize=64)
def _code_of_word(pattern: NMPattern, device: torch.device) -> torch.Tensor:
    return codec.code_of_word(pattern).to(device, torch.int32)


# --- whether they work ------------------------------------------------------------------------------------------------
def _numbers(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Numbers with ties, zeros of both signs, infinities and NaN, the same on every device."""
    chosen = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 2.5, -2.5, 3.0, float("inf"), float("-inf"), float("nan")])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(chosen), (rows, columns), generator=generator, device="cpu")
    return chosen[picks].to(like.device, like.dtype)


def _chooses_right(scores: torch.Tensor, pattern: NMPattern) -> bool:
    for columns in (16 * pattern.m, 16 * pattern.m + 1):
        numbers = _numbers(scores, 5, columns)
        expected = reference.top_n_mask(numbers, pattern)
        codes = codec.mask_to_codes(expected, pattern)
        found = top_n_mask(numbers, pattern), top_n_codes(numbers, pattern)
        if not (torch.equal(found[0], expected) and torch.equal(found[1], codes)):
            return False
    return True


def _packs_right(weight: torch.Tensor, scores: torch.Tensor | None = None) -> bool:
    weight = _numbers(weight, 6, 48)
    scores = None if scores is None else _numbers(scores, 7, 48)[1:]
    _, ids, codes = reference.prune_24(weight, scores)
    values = _bits(weight, "weight").gather(1, codec.columns_of_24(ids))
    found = prune_24(weight, scores)
    dense = unpack_24(found.values, ids)
    expected = (values, ids, codes, codec.unpack_24(values, ids))
    return all(
        map(torch.equal, (_bits(found.values, "values"), found.ids, found.codes, _bits(dense, "dense")), expected)
    )
