# SPDX-License-Identifier: Apache-2.0
"""What the relaxations share that train a weight: one trainable tensor, `nmsparse_weight`, which starts as the base weight."""

from __future__ import annotations

import torch

from .. import ops
from ..errors import UnsupportedError
from .base import Relaxation, RelaxationConfig


class TrainedWeightRelaxation(Relaxation):
    """A weight of the adapter's own in the place of the base weight, and a mask computed from it.

    Parameters: `nmsparse_weight` `[out, in]`, in `config.logits_dtype`.
    """

    container = "nmsparse_weight"
    trains_weight = True
    takes_prior = False

    def parameters(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        return {"nmsparse_weight": weight.detach().to(getattr(torch, config.logits_dtype), copy=True)}

    def values_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return out_features, in_features

    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Refused: the weights alone say which mask.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"relaxation {self.name!r} takes its mask from the magnitudes of the weights at every step; to train under a given mask "
            'use relaxation="ast" with mask_interval=None'
        )

    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return ops.top_n_codes(parameters["nmsparse_weight"].detach().abs(), self.pattern)

    def _mask(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mask of this moment, bool `[out, in]`."""
        weight = parameters["nmsparse_weight"]
        return ops.codes_to_mask(self.codes(parameters, weight.shape[1]), self.pattern, weight.shape[1])
