# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers, the same on every device and in every order of evaluation.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3; 7 rounds
is their smallest count that passes BigCrush). Words are held in int64 tensors because torch has no unsigned multiply.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

ROUNDS = 7
UNIFORM_BITS = 21
UNIFORMS_PER_CALL = 6  # 128 random bits are cut into six 21-bit numbers
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class NoiseKey:
    """The part of the noise's identity that never changes during training: which run, and which layer.

    Args:
        seed (`int`): low 32 bits of the run's seed.
        layer (`int`): 32-bit hash of the layer's module name.
    """

    seed: int
    layer: int

    @classmethod
    def for_layer(cls, seed: int, module_name: str) -> NoiseKey:
        """Key of the layer `module_name` (its path in the base model, as `named_modules()` gives it)."""
        name_hash = hashlib.blake2b(module_name.encode(), digest_size=4, person=b"nmsparse-noise").digest()
        return cls(seed & _WORD, int.from_bytes(name_hash, "little"))

    def generator(self) -> torch.Generator:
        """A CPU generator of this run and layer, for starting values: the default one belongs to the user's program."""
        # torch's CPU generator looks at the low 32 bits of a seed only, so both parts have to be mixed into them.
        mixed = hashlib.blake2b(f"{self.seed}:{self.layer}".encode(), digest_size=4, person=b"nmsparse-start")
        return torch.Generator().manual_seed(int.from_bytes(mixed.digest(), "little"))


def philox4x32(
    key: NoiseKey, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random 32-bit words per counter.

    Args:
        key (`NoiseKey`): the 64-bit key.
        counter: four int64 tensors of one shape (or broadcastable to it), values in [0, 2^32).
        rounds (`int`): Philox rounds.

    Returns:
        four int64 tensors with values in [0, 2^32).
    """
    k0, k1 = key.seed, key.layer
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # The signed product wraps and its shift is arithmetic, so only the low 32 bits of each term are meaningful;
        # they are masked once, after the xors. Low words (c1, c3) are masked only where they leave the loop.
        c0 = (product_1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (product_0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def gumbel_noise(
    groups: torch.Tensor,
    num_candidates: int,
    key: NoiseKey,
    step: torch.Tensor,
    draw: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard Gumbel noise `g = -log(-log u)` for every candidate of every group.

    Candidate c of a group takes the (c mod 6)-th of the six 21-bit numbers b of Philox block c // 6, at counter
    (group mod 2^32, block + 2^16 * (group // 2^32), step, draw), and `u = (b + 1/2) / 2^21`, which is never 0 or 1.

    Args:
        groups (`torch.Tensor`): global group indices, int64 `[rows, groups]`.
        num_candidates (`int`): C.
        key (`NoiseKey`): run and layer.
        step, draw (`torch.Tensor`): int64 scalars.
        dtype (`torch.dtype`): float32 or float64.

    Returns:
        `[rows, C, groups]`.
    """
    noise = torch.empty(groups.shape[0], num_candidates, groups.shape[1], dtype=dtype, device=groups.device)
    low, high = groups & _WORD, (groups >> 32) << 16
    low_bits = (1 << 32 - UNIFORM_BITS) - 1
    for first in range(0, num_candidates, UNIFORMS_PER_CALL):
        block = high + first // UNIFORMS_PER_CALL
        a, b, c, d = philox4x32(key, (low, block, step.expand_as(low), draw.expand_as(low)))
        # The six numbers are written out lazily: a pattern with four candidates never computes the last two.
        wanted = noise[:, first : first + UNIFORMS_PER_CALL].unbind(1)
        for target, word in zip(wanted[:4], (a, b, c, d), strict=False):
            target.copy_(word >> 32 - UNIFORM_BITS)
        for target, (x, y) in zip(wanted[4:], ((a, b), (c, d)), strict=False):
            target.copy_((x & low_bits).bitwise_or_((y & low_bits >> 1) << 32 - UNIFORM_BITS))
    return noise.add_(0.5).mul_(2.0**-UNIFORM_BITS).log_().neg_().log_().neg_()
