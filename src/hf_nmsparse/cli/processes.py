# SPDX-License-Identifier: Apache-2.0
"""A verb that `torchrun` or `accelerate launch` has started once for each device: one of them speaks and writes."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes run this verb together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when all processes have come here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
