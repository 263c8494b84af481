# SPDX-License-Identifier: Apache-2.0
"""Where two published masks differ: in total, by kind of layer, by block, layer by layer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from ..errors import ConfigError
from ..pattern import NMPattern
from .changes import differing_groups
from .mask_file import LayerMask, PublishedMask, read_mask


@dataclass(frozen=True)
class Difference:
    """How two masks differ on some groups.

    Args:
        groups (`int`): groups compared.
        changed (`int`): groups whose candidates differ.
        kept (`int`): weights that each of the two masks keeps.
        common (`int`): weights that both keep.
    """

    groups: int = 0
    changed: int = 0
    kept: int = 0
    common: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.groups + other.groups,
            self.changed + other.changed,
            self.kept + other.kept,
            self.common + other.common,
        )

    @property
    def changed_share(self) -> float:
        """Share of groups that differ."""
        return self.changed / max(self.groups, 1)

    @property
    def overlap(self) -> float:
        """Share of the weights kept by one mask that the other keeps too."""
        return self.common / max(self.kept, 1)

    @property
    def jaccard(self) -> float:
        """Weights kept by both over weights kept by either."""
        return self.common / max(2 * self.kept - self.common, 1)

    def to_dict(self) -> dict[str, float]:
        """Counts and shares."""
        counts = {"groups": self.groups, "changed": self.changed}
        return counts | {name: getattr(self, name) for name in ("changed_share", "overlap", "jaccard")}


@dataclass(frozen=True)
class MaskDiff:
    """What `diff_masks` found.

    Args:
        a (`str`), b (`str`): where the masks came from.
        pattern (`NMPattern`): of both.
        layers (`dict[str, Difference]`): of each layer that both masks have.
        only_in_a (`list[str]`), only_in_b (`list[str]`): layers that the other mask lacks.
        other_base (`list[str]`): compared layers whose masks were made for different base weights.
    """

    a: str
    b: str
    pattern: NMPattern
    layers: dict[str, Difference] = field(default_factory=dict)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    other_base: list[str] = field(default_factory=list)

    @property
    def total(self) -> Difference:
        """All compared layers together."""
        return sum(self.layers.values(), Difference())

    @property
    def by_kind(self) -> dict[str, Difference]:
        """By the last part of the layers' names (q_proj, up_proj, ...)."""
        return self._together(lambda name: name.rpartition(".")[2])

    @property
    def by_block(self) -> dict[str, Difference]:
        """By the block of the model that a layer lies in, in the order of depth; layers outside of blocks by their names."""
        return self._together(lambda name: match[0] if (match := re.match(r".*?\.\d+(?=\.)", name)) else name)

    @property
    def chance(self) -> dict[str, float]:
        """What two masks that are drawn independently, all candidates equally likely, would give on average.

        A share of 1 - 1/C of groups differs, and n/m of the kept weights are common.
        """
        density = self.pattern.density
        return {
            "changed_share": 1 - 1 / self.pattern.num_candidates,
            "overlap": density,
            "jaccard": density / (2 - density),
        }

    def most_changed(self, count: int) -> list[tuple[str, Difference]]:
        """The layers with the largest share of groups that differ."""
        return sorted(self.layers.items(), key=lambda item: -item[1].changed_share)[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts and shares in total, by kind, by block and by layer, and what chance would give."""
        parts = {"kinds": self.by_kind, "blocks": self.by_block, "layers": self.layers}
        return {
            "a": self.a,
            "b": self.b,
            "pattern": str(self.pattern),
            **self.total.to_dict(),
            "chance": self.chance,
            **{
                part: {name: found.to_dict() for name, found in differences.items()}
                for part, differences in parts.items()
            },
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "other_base": self.other_base,
        }

    def _together(self, label: Callable[[str], str]) -> dict[str, Difference]:
        sums: dict[str, Difference] = {}
        for name, difference in self.layers.items():
            sums[label(name)] = sums.get(label(name), Difference()) + difference
        return dict(sorted(sums.items(), key=lambda item: _by_depth(item[0])))


def diff_masks(a: str | os.PathLike | PublishedMask, b: str | os.PathLike | PublishedMask) -> MaskDiff:
    """Compare two published masks, full ones or deltas. No model is needed.

    Args:
        a, b (`str`, `Path` or `PublishedMask`): folder, Hub repo, or what `nms.read_mask` returned.

    Raises:
        ConfigError: if their patterns differ, they share no layer, or a layer has another shape in each.
        FormatError, HubError: as `nms.read_mask`.
    """
    first, second = (mask if isinstance(mask, PublishedMask) else read_mask(mask) for mask in (a, b))
    if first.pattern != second.pattern:
        raise ConfigError(
            f"{first.source} is a {first.pattern} mask and {second.source} a {second.pattern} one; only masks of one pattern "
            "can be compared"
        )
    shared = sorted(set(first.layers) & set(second.layers), key=_by_depth)
    if not shared:
        raise ConfigError(
            f"{first.source} and {second.source} share no layer (they have such as {min(first.layers)} and "
            f"{min(second.layers)}); they are for different models"
        )
    return MaskDiff(
        first.source,
        second.source,
        first.pattern,
        {name: _difference(name, first.layers[name], second.layers[name], first.pattern) for name in shared},
        sorted(set(first.layers) - set(second.layers), key=_by_depth),
        sorted(set(second.layers) - set(first.layers), key=_by_depth),
        [name for name in shared if _other_base(first.layers[name], second.layers[name])],
    )


def _difference(name: str, a: LayerMask, b: LayerMask, pattern: NMPattern) -> Difference:
    if a.packed.shape != b.packed.shape:
        raise ConfigError(
            f"{name}: one mask has packed codes {list(a.packed.shape)}, the other {list(b.packed.shape)}; they are for different "
            "models"
        )
    groups = _groups([a.packed, b.packed], pattern)
    places, new, old = differing_groups(a.packed, b.packed, pattern, name)
    changed, total = len(places), len(a.packed) * groups
    candidates = pattern.candidates()
    both = candidates[new] & candidates[old]
    return Difference(total, changed, total * pattern.n, (total - changed) * pattern.n + int(both.sum()))


def _groups(masks: list[torch.Tensor], pattern: NMPattern) -> int:
    """Groups of a row. Its bytes leave some open, which are told by their zeros: unused places are 0 in all rows of all masks."""
    width = masks[0].shape[1]
    length, size = pattern.packing
    slots, whole = pattern.max_groups(width), (width - 1) // size  # runs before the last one
    last = torch.cat([packed[:, whole * size :] for packed in masks])
    codes = ops.unpack_codes(last, pattern, (slots - whole * length) * pattern.m)
    while slots > 1 and not bool(codes[:, slots - 1 - whole * length].any()):
        fewer = pattern.packed_row_bytes((slots - 1) * pattern.m)
        if fewer != pattern.packed_row_bytes(slots * pattern.m):
            break
        slots -= 1
    return slots


def _other_base(a: LayerMask, b: LayerMask) -> bool:
    return bool(a.base.any()) and bool(b.base.any()) and not torch.equal(a.base, b.base)


def _by_depth(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
