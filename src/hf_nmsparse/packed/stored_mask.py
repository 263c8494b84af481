# SPDX-License-Identifier: Apache-2.0
"""A published mask as the loader needs it: checked against the model before loading, put on each weight as it comes."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .. import ops
from ..errors import BaseModelMismatchError, ConfigError, FormatError, PatternError, UnsupportedError
from ..fingerprint import fingerprint, rounding_hint, to_hex
from ..ops import SideBranch
from ..pattern import NMPattern
from .branch import check_branch
from .weights import PATTERN

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredLayerMask:
    """The mask of one layer, and the terms that were trained with it.

    Args:
        packed (`torch.Tensor`): packed codes, uint8 `[out, bytes]` (docs/FORMAT.md, section 2).
        base (`torch.Tensor`): fingerprint of the base weight, uint8 `[16]`; zero where it was unknown.
        delta_a (`torch.Tensor`, *optional*), delta_b (`torch.Tensor`, *optional*): A `[r, in]` and B `[out, r]`: the
            weight under the mask is `W + B A`. For fused experts both have a leading dimension, the expert.
        branch (`SideBranch`, *optional*): what the layer adds beside the mask.
    """

    packed: torch.Tensor
    base: torch.Tensor
    delta_a: torch.Tensor | None = None
    delta_b: torch.Tensor | None = None
    branch: SideBranch | None = None


@dataclass(frozen=True)
class StoredMask:
    """A published mask.

    Args:
        pattern (`NMPattern`): of every layer.
        layers (`Mapping[str, StoredLayerMask]`): by name; masks `[out, in]`, for a `Conv1D` too. Fused experts are called
            by their parameter ("…experts.gate_up_proj"), and their rows come one expert after the other.
        source (`str`): where it came from.
        base_model (`str`, *optional*), base_revision (`str`, *optional*): which model it says it was made for.
    """

    pattern: NMPattern
    layers: Mapping[str, StoredLayerMask]
    source: str
    base_model: str | None = None
    base_revision: str | None = None


MaskReader = Callable[[str, str | None, str | None], StoredMask]
_reader: MaskReader | None = None


def set_mask_reader(reader: MaskReader) -> None:
    """Say how masks are read: `(source, revision, task) -> StoredMask`. (The room that knows how is above this one.)"""
    global _reader
    _reader = reader


def read_stored_mask(source: str, revision: str | None, task: str | None) -> StoredMask:
    """Read a mask for packing.

    Raises:
        UnsupportedError: if its pattern is not inside 2:4.
        FormatError: as the reader.
    """
    if _reader is None:
        raise ConfigError("PackedConfig(mask=...): nothing is registered that reads masks; import hf_nmsparse first")
    mask = _reader(source, revision, task)
    if not inside_24(mask.pattern):
        raise UnsupportedError(
            f"{mask.source} is a {mask.pattern} mask; only patterns inside {PATTERN} (such as 1:4) can be packed. Put it on "
            "the dense model (hf_nmsparse.load_mask)"
        )
    return mask


def inside_24(pattern: NMPattern) -> bool:
    """Whether every mask of the pattern keeps at most 2 of each 4 weights: 2:4, 1:4, 2:8, 1:2, but not 4:8."""
    columns = range(math.lcm(4, pattern.m))
    overlaps = Counter((column // 4, column // pattern.m) for column in columns)
    kept: Counter[int] = Counter()
    for (four, _), width in overlaps.items():
        kept[four] += min(pattern.n, width)
    return max(kept.values()) <= PATTERN.n


def check_fits(mask: StoredMask, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a mask that is not for these weights.

    Args:
        mask (`StoredMask`): the mask.
        weights (`Mapping[str, torch.Tensor]`): `[out, in]` by layer name, maybe still on the meta device.

    Raises:
        FormatError: if a layer is absent, has other rows, or its codes are impossible.
        PatternError: if a term does not fit its layer.
    """
    if absent := sorted(set(mask.layers) - set(weights)):
        raise FormatError(
            f"{mask.source} holds masks for {len(absent)} layers that are no linear layers of the model, first "
            f"{absent[:5]}; the model has linear layers such as {sorted(weights)[:5]}"
        )
    for name, stored in mask.layers.items():
        out_features, in_features = weights[name].shape
        if stored.packed.shape[0] != out_features:
            raise FormatError(
                f"{name}: the mask has {stored.packed.shape[0]} rows, the layer {out_features}; it is for another model"
            )
        ops.check_codes(stored.packed, mask.pattern, in_features, name)
        if stored.branch is not None:
            check_branch(name, stored.branch, out_features, in_features)
        if stored.delta_a is not None:
            _check_delta(name, stored.delta_a, stored.delta_b, out_features, in_features)


def _check_delta(name: str, a: torch.Tensor, b: torch.Tensor, out_features: int, in_features: int) -> None:
    if (
        a.shape[-1] != in_features
        or b.shape[:-1].numel() != out_features
        or a.shape[:-1] != (*b.shape[:-2], b.shape[-1])
    ):
        raise PatternError(
            f"{name}: its delta has factors of shape {list(b.shape)} and {list(a.shape)}, the weight {out_features} x "
            f"{in_features}"
        )


@dataclass
class MaskOnLoad:
    """A mask on its way onto a base that is being loaded, and what was found about the weights so far.

    Args:
        mask (`StoredMask`): the mask, found to fit.
        dense (`dict[str, str]`): layers of the mask that cannot be packed and become dense with zeros -> why.
        experts (`list[str]`): fused experts of the mask, which are masked once all weights are there.
    """

    mask: StoredMask
    dense: dict[str, str] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _strangers: list[str] = field(default_factory=list)
    _unknown: list[str] = field(default_factory=list)
    _hint: str = ""

    def weight_and_mask(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight under the mask (`W + B A`, in the dtype of W) and the mask itself, bool, both `[out, in]`.

        The fingerprint of `weight` is compared; `settle` says later whether it was the right one, because Transformers
        turns an error raised here into a report of its own.
        """
        stored = self.mask.layers[name]
        self._seen.add(name)
        found = fingerprint(weight)
        if found is None or not bool(stored.base.any()):
            self._unknown.append(name)
        elif not torch.equal(found, stored.base.cpu()):
            self._strangers.append(f"{name} (fingerprint {to_hex(found)}, expected {to_hex(stored.base)})")
            self._hint = self._hint or rounding_hint(weight)
        codes = ops.unpack_codes(stored.packed.to(weight.device), self.mask.pattern, weight.shape[1], name=name)
        keep = ops.codes_to_mask(codes, self.mask.pattern, weight.shape[1])
        if stored.delta_a is not None:
            weight = ops.add_low_rank(weight, stored.delta_a, stored.delta_b)
        return weight, keep

    def settle(self, allow_base_mismatch: bool) -> None:
        """Say what the fingerprints told, once all weights are loaded.

        Raises:
            BaseModelMismatchError: if the mask was made for other weights, or for some that the checkpoint lacks.
        """
        mask = self.mask
        base = f"Its base is {mask.base_model!r}, revision {mask.base_revision!r}"
        if unseen := sorted(set(mask.layers) - self._seen):
            raise BaseModelMismatchError(
                f"{mask.source} was made for other weights: the checkpoint holds none for {len(unseen)} of "
                f"{len(mask.layers)} layers, first {unseen[0]}. {base}; load that model"
            )
        if self._unknown:
            logger.warning(
                "%d layers of %s could not be checked against their base weights (first %s); the mask names base %r, "
                "revision %r",
                len(self._unknown),
                mask.source,
                self._unknown[0],
                mask.base_model,
                mask.base_revision,
            )
        if not self._strangers:
            return
        message = (
            f"{mask.source} was made for other weights: {len(self._strangers)} of {len(mask.layers)} layers differ, first "
            f"{self._strangers[0]}. {base}"
        )
        if not allow_base_mismatch:
            raise BaseModelMismatchError(
                f"{message}; load that model, or pass allow_base_mismatch=True if you are sure{self._hint}"
            )
        logger.warning("%s; loaded all the same because of allow_base_mismatch=True", message)
