# SPDX-License-Identifier: Apache-2.0
"""The masked weight on a GPU: `triton_masks.py`, which reads and writes each number once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..pattern import NMPattern
from .candidate_masks import CandidateSampler
from .eager import is_plain_eager
from .elementwise_masks import ElementwiseSampler
from .linear24.gpu import ceil_div, has_triton
from .philox import NoiseKey
from .sampler import SamplingState
from .trial import Trials

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOGIT_TYPES = (torch.float32, torch.bfloat16)
_POSITIONS = (2, 4, 8, 16)  # m that the kernels can put in order
_MOST_CANDIDATES = 28  # that they can hold in registers
_MOST_SUMS = 8  # candidates beyond which, for logits of weights, the walk takes fewer instructions
WARPS = 4  # a program
_BYTES = 16  # a thread, the widest load
_TILES = 4  # that a program works on one after the other; what all groups need is computed before the first
_trials = Trials("the fused mask kernels", "take one step before the capture")


def takes(weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern) -> bool:
    """Whether the Triton kernels compute the masked weight of these."""
    return (
        weight.device.type == "cuda"
        and logits.device == weight.device
        and weight.dtype in _TYPES
        and logits.dtype in _LOGIT_TYPES
        and pattern.m in _POSITIONS
        and (logits.dim() == 2 or pattern.num_candidates <= _MOST_CANDIDATES)
        and weight.numel() > 0
        and is_plain_eager(weight, logits)
        and has_triton()
        and _works(weight.device, weight.dtype, logits.dtype, pattern, method(logits, pattern))
    )


def method(logits: torch.Tensor, pattern: NMPattern) -> str:
    """How masks follow from these logits, METHOD of `triton_masks.py`."""
    if logits.dim() == 3:
        return "candidates"
    return "sums" if pattern.num_candidates <= _MOST_SUMS else "walk"


def masked_weight(
    weight: torch.Tensor, logits: torch.Tensor, pattern: NMPattern, key: NoiseKey, state: SamplingState
) -> torch.Tensor:
    """`W * M`, as `mask_sampling.masked_weight` has it, of tensors that `takes` accepts."""
    from . import triton_masks

    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    now = state.to(weight.device)
    _launch(
        triton_masks.masked_weight,
        (weight.contiguous(), logits.contiguous(), result),
        (now.temperature, now.logit_scale, now.step, now.draw),
        logits,
        pattern,
        key,
    )
    return result


def gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    state: SamplingState,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the weight and of the logits, where `wanted`, from that of `W * M`."""
    from . import triton_masks

    weight, logits = weight.contiguous(), logits.contiguous()
    for_weight, for_logits = wanted
    grad_weight = torch.empty_like(weight) if for_weight else None
    grad_logits = torch.empty_like(logits) if for_logits else None
    _launch(
        triton_masks.gradients,
        (
            *(grad.contiguous(), weight, logits),
            weight if grad_weight is None else grad_weight,  # not written where it is not wanted
            logits if grad_logits is None else grad_logits,
        ),
        state.to(weight.device).tensors(),
        logits,
        pattern,
        key,
        FOR_WEIGHT=for_weight,
        FOR_LOGITS=for_logits,
    )
    return grad_weight, grad_logits


def _launch(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    scalars: tuple[torch.Tensor, ...],
    logits: torch.Tensor,
    pattern: NMPattern,
    key: NoiseKey,
    **constants: bool,
) -> None:
    """Run a kernel on tensors of which the first is shaped as the weight."""
    first = tensors[0]
    rows, in_features = first.shape
    groups = pattern.num_groups(in_features)
    common = compile_time(method(logits, pattern), pattern, pattern.tail(in_features), first.dtype, logits.dtype)
    blocks = ceil_div(groups, common["GROUPS"] * common["TILES"])
    with torch.cuda.device(first.device):
        kernel[(rows * blocks,)](
            *(*tensors, *scalars, _signed(key.seed), _signed(key.layer), in_features, groups, blocks),
            **constants,
            **common,
            NVIDIA=_is_nvidia(),
            num_warps=WARPS,
        )


def compile_time(
    method: str, pattern: NMPattern, tail: int, dtype: torch.dtype, logit_dtype: torch.dtype
) -> dict[str, int | str]:
    """The compile-time arguments that both kernels have, for rows with `tail` weights in a shorter last group."""
    held = 0 if method == "walk" else pattern.num_candidates
    widest = dtype.itemsize if method == "candidates" else max(dtype.itemsize, logit_dtype.itemsize)
    return {
        "METHOD": method,
        "KEPT": _bits(pattern, by_position=False) if held else 0,
        "KEEPERS": _bits(pattern, by_position=True) if held else 0,
        "ALLOWED": _allowed(pattern, tail) if held else 0,
        "TAIL": tail,
        "N": pattern.n,
        "M": pattern.m,
        "CANDIDATES": held,
        "GROUPS": 32 * WARPS * max(1, _BYTES // (pattern.m * widest)),
        "TILES": _TILES,
    }


def _signed(word: int) -> int:
    """The same 32 bits, so that Triton sees one type of argument and compiles one kernel for all keys."""
    return word - (1 << 32) if word >> 31 else word


def _is_nvidia() -> bool:
    return torch.version.hip is None


@lru_cache(maxsize=64)
def _bits(pattern: NMPattern, by_position: bool) -> int:
    """Which candidates keep which positions, one bit each, those of a candidate together or those of a position."""
    table = pattern.candidates("cpu")
    flat = (table.t() if by_position else table).flatten().tolist()
    return sum(1 << i for i, kept in enumerate(flat) if kept)


@lru_cache(maxsize=64)
def _allowed(pattern: NMPattern, tail: int) -> int:
    """Which candidates the last group of a row may use, one bit each."""
    return sum(1 << c for c, allowed in enumerate(pattern.tail_candidates(tail, "cpu").tolist()) if allowed)


# --- whether they work ------------------------------------------------------------------------------------------------
def _works(device: torch.device, dtype: torch.dtype, logit_dtype: torch.dtype, pattern: NMPattern, how: str) -> bool:
    """Whether the kernels compile there and are right, tried once a process."""
    case = (dtype, logit_dtype, pattern, how)
    return _trials.works(device, case, lambda: _is_right(device, *case))


def _is_right(
    device: torch.device, dtype: torch.dtype, logit_dtype: torch.dtype, pattern: NMPattern, how: str
) -> bool:
    """Whether a small case agrees with the formulas of the sampler to a few roundings."""
    rows, groups = 2, 300  # several tiles
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    per_candidate = how == "candidates"
    weight, grad = (numbers(rows, groups * pattern.m).to(dtype) for _ in range(2))
    logits = numbers(*((rows, pattern.num_candidates, groups) if per_candidate else weight.shape)).to(logit_dtype)
    key, state = NoiseKey(0x9E3779B9, 5), SamplingState.of(2.0, 3.0, 0.01, 7, 1, device)
    result = masked_weight(weight, logits, pattern, key, state)
    found = (result, *gradients(grad, weight, logits, pattern, key, state, (True, True)))

    of_logits = CandidateSampler if per_candidate else ElementwiseSampler
    sampler = of_logits(logits, pattern, weight.shape[1], key, state, noise=True)
    chances = sampler.distribution(slice(0, rows))
    mask, w, a = sampler.mask(chances), weight.float(), grad.float()
    grad_logits = sampler.gradient(chances, a * w - 0.02 * w.square() * mask) * sampler.slope
    pairs = zip(found, (w * mask, a * mask, grad_logits), strict=True)
    return all(bool((x.float() - y).norm() <= 2 * torch.finfo(x.dtype).eps * y.norm() + 1e-5) for x, y in pairs)
