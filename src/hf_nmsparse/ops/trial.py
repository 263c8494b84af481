# SPDX-License-Identifier: Apache-2.0
"""Whether fused kernels work on a GPU: tried once a process for each case, before they are chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from .linear24.probe import ADVICE, failure

logger = logging.getLogger(__name__)


class Trials:
    """What is known of some kernels.

    Args:
        kernels (`str`): what they are, for messages.
        hint (`str`): what to do where a CUDA graph is being captured before they ran.
    """

    def __init__(self, kernels: str, hint: str) -> None:
        self.kernels, self.hint = kernels, hint
        self._known: dict[Hashable, bool] = {}
        self._said: set[Hashable] = set()

    def works(self, device: torch.device, case: tuple, is_right: Callable[[], bool]) -> bool:
        """Whether a case compiles on a device and is right; never tried while a CUDA graph is captured.

        Args:
            device (`torch.device`): a GPU.
            case (`tuple`): what the kernels are compiled for; its parts are named in messages.
            is_right (`Callable`): runs them on a small case and compares.
        """
        key = (device, *case)
        if key in self._known:
            return self._known[key]
        what = f"{self.kernels} on {device} for {', '.join(str(part).removeprefix('torch.') for part in case)}"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if key not in self._said:
                self._said.add(key)
                logger.warning(
                    "%s have not run yet, so the CUDA graph that is being captured does without them; %s",
                    what,
                    self.hint,
                )
            return False
        reason = failure(is_right)
        if reason:
            logger.warning("%s are not used: %s%s", what, reason, ADVICE)
        self._known[key] = reason is None
        return self._known[key]
