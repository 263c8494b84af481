# SPDX-License-Identifier: Apache-2.0
"""What lm-eval changes in the process that it runs in, put back."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# As `lm_eval.simple_evaluate` sets them by default.
PYTHON_SEED = 0
SEED = 1234


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """Environment variables are the caller's again afterwards, and nothing is written to standard output.

    lm-eval sets a variable as it is imported, prints, and forks a process for each core where it estimates a standard error
    by drawing; the last is switched off here.
    """
    environment = dict(os.environ)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """The same seeds inside, whatever was drawn before; afterwards the generators go on where they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, legacy_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Progress bars of lm-eval and datasets, shown or not. lm-eval has no switch for some of its own, so the name by which its
    modules call tqdm is replaced meanwhile."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import tqdm

    if shown:
        yield
        return
    modules = (tqdm, lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    real = tqdm.tqdm

    def hidden(*arguments: Any, **options: Any) -> tqdm.tqdm:
        return real(*arguments, **{**options, "disable": True})

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = hidden
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = real
        if had_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Only errors of this logger."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
