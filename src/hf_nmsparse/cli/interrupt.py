# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during training: finish the step, save a checkpoint, stop. A second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .common import tell


class StopAtStep(TrainerCallback):
    """A callback, and the context in which it listens to SIGINT.

    Left to itself, Ctrl-C could hit while a checkpoint is being written, and would lose the steps since the last one.
    """

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> StopAtStep:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        tell("stopping after this step; Ctrl-C again stops at once, without a checkpoint")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.wanted:
            control.should_save = True
            control.should_training_stop = True
