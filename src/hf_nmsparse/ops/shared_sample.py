# SPDX-License-Identifier: Apache-2.0
"""One sampled weight for all forward passes that would compute the same: micro-batches of a step, recomputed blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .eager import is_plain_eager


class SharedSample:
    """The sampled weight `W~` of one mask, kept until the optimizer steps; each pass has its own node in the graph.

    It never outlives what it was made from: a tensor that was replaced, moved, cast or written to is seen, and so is every
    step of every optimizer. (Only a write through `.data` by anything but an optimizer is not.) It is used for plain
    parameters only: what is gathered or copied for each pass, is compiled, traced or watched, is sampled each time.
    Copies and pickles start empty.

    Attributes:
        held (`torch.Tensor`, *optional*): the weight, `[out, in]`, if there is one now.
    """

    def __init__(self) -> None:
        self.forget()
        _samples.add(self)
        _watch_optimizers()

    def __reduce__(self) -> tuple[type[SharedSample], tuple[()]]:
        return SharedSample, ()

    def forget(self) -> None:
        """Free the weight."""
        self.held: torch.Tensor | None = None
        self._version = 0
        self._moment: object = None
        self._sources: list[tuple[weakref.ref[torch.Tensor], tuple]] = []

    def serves(self, tensors: Sequence[torch.Tensor], moment: object) -> bool:
        """Whether it may be used for a pass; what it holds for another one is freed.

        Args:
            tensors (`Sequence[torch.Tensor]`): all that the weight is made from.
            moment: anything else that it depends on, compared by `==`.
        """
        if not _are_lasting(tensors):
            return False
        if not self._is_of(tensors, moment):
            self.forget()
            self._moment = moment
            self._sources = [(weakref.ref(tensor), _state(tensor)) for tensor in tensors]
        return True

    def weight(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """An alias of the weight, made by `make` if there is none. It must not be written to."""
        if self.held is None:
            self.held = make()
            self._version = self.held._version
        return self.held.detach()  # not the tensor itself, to which autograd would attach the node of this pass

    def _is_of(self, tensors: Sequence[torch.Tensor], moment: object) -> bool:
        if self._moment != moment or len(self._sources) != len(tensors):
            return False
        if self.held is not None and self.held._version != self._version:  # someone wrote to an alias
            return False
        pairs = zip(self._sources, tensors, strict=True)
        return all(source() is tensor and state == _state(tensor) for (source, state), tensor in pairs)


def _state(tensor: torch.Tensor) -> tuple:
    """Changes with every visible change of a tensor."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device


def _are_lasting(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether these are parameters whose changes can be seen, in a pass that is nothing but computed."""
    if any(type(tensor) is not torch.nn.Parameter or tensor.is_inference() for tensor in tensors):
        return False
    if torch.is_inference_mode_enabled() or not is_plain_eager(*tensors):
        return False
    # A captured graph would find the weight gone when it is replayed.
    return not any(tensor.is_cuda for tensor in tensors) or not torch.cuda.is_current_stream_capturing()


# --- optimizers -------------------------------------------------------------------------------------------------------
_samples: weakref.WeakSet[SharedSample] = weakref.WeakSet()


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """Empty all samples whenever an optimizer has stepped.

    Their memory is not needed any longer; and fused optimizers, as others that write through `.data`, do not change the
    version of a parameter.
    """

    def forget_all(*_: object) -> None:
        for sample in tuple(_samples):
            sample.forget()

    register_optimizer_step_post_hook(forget_all)
