# SPDX-License-Identifier: Apache-2.0
"""The masks of one block, learned against what the dense block computes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter import NMSparseLayer
from ..criteria.blocks import Sample, run_block
from ..errors import NMSparseError, UnsupportedError
from ..relaxations import Moment
from .optimizers import MaskAdamW

# As in mask training seen to work (docs/METHODS.md): a mean of squares that follows the sharpening masks.
_BETAS = (0.9, 0.99)
_LAST_RATE = 0.1  # of the learning rate, at the last step


@dataclass(frozen=True)
class BlockSettings:
    """How the masks of each block are learned; the fields are the arguments of `learn_blockwise` with the same names."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class BlockReport:
    """What was learned in one block.

    The errors are of hard masks, on the held-out batches: mean over tokens of `||y - t||^2 / ||t||^2`, t what leaves the
    dense block, y what leaves the masked one.

    Args:
        name (`str`): of the block.
        error_before (`float`): with the masks it started from.
        error_after (`float`): with the learned ones.
        improved (`bool`): whether that is lower. If not, the block has the logits it started from.
        changed (`float`): share of groups whose learned mask differs from the one they started from.
        seconds (`float`): wall time.
    """

    name: str
    error_before: float
    error_after: float
    improved: bool
    changed: float
    seconds: float


@dataclass
class Stream:
    """One calibration batch on its way through the blocks, twice.

    Args:
        dense (`Sample`): through the dense blocks.
        masked (`Sample`): what enters the block whose masks are learned.
        share (`torch.Tensor`, *optional*): what the squared error of a token at the output of this block is multiplied
            with, float32 `[batch, sequence]`; set by `run_dense`.
    """

    dense: Sample
    masked: Sample
    share: torch.Tensor | None = None

    def error(self, output: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of `||y - t||^2 / ||t||^2`, y `output` and t that of the dense block, once `run_dense` ran."""
        distance = (output.float() - self.dense.hidden.to(output.device).float()).square().sum(-1)
        return (distance * self.share).sum()


class Block:
    """One block of a model, and the mask layers in it.

    Args:
        name (`str`): its name.
        module (`nn.Module`): the block.
        index (`int`): its place in its stack.
        layers (`Mapping[str, NMSparseLayer]`): its mask layers by name; may be empty.
        adapter_name (`str`): whose masks are learned.
    """

    def __init__(
        self, name: str, module: nn.Module, index: int, layers: Mapping[str, NMSparseLayer], adapter_name: str
    ) -> None:
        self.name, self.module, self.index = name, module, index
        self.layers, self.adapter_name = layers, adapter_name

    def logits(self) -> dict[str, nn.Parameter]:
        """The logits of its mask layers by layer."""
        return {name: layer.nmsparse_logits[self.adapter_name].weight for name, layer in self.layers.items()}

    def codes(self) -> list[torch.Tensor]:
        """The hard masks, codes `[out, groups]` of each layer."""
        return [layer.mask_codes(self.adapter_name) for layer in self.layers.values()]

    def run_dense(self, streams: Sequence[Stream]) -> None:
        """Take the dense stream past this block, and weigh its tokens.

        Raises:
            NMSparseError: if the dense block gives NaN or infinity.
        """
        with masks_off(self.layers.values()):
            for stream in streams:
                stream.dense.hidden = run_block(self.module, self.index, stream.dense)
                stream.share = _shares(stream.dense)
                if not bool(stream.dense.hidden.isfinite().all()):
                    raise NMSparseError(
                        f"{self.name}: the dense block gives NaN or infinity on the calibration data, so there is nothing to "
                        "learn from; load the model in bfloat16 or float32, and look at the data"
                    )

    def run_masked(self, stream: Stream) -> torch.Tensor:
        """What leaves the block with its masks as they are now."""
        return run_block(self.module, self.index, stream.masked)

    def hard_error(self, streams: Sequence[Stream]) -> float:
        """The mean error of the block with its hard masks."""
        return sum(float(stream.error(self.run_masked(stream))) for stream in streams) / len(streams)

    def learn(
        self,
        streams: Sequence[Stream],
        judges: Sequence[Stream],
        settings: BlockSettings,
        on_step: Callable[[float], None],
    ) -> BlockReport:
        """Train the logits of the block; without a gain, and on any failure, they are as they were.

        Args:
            streams (`Sequence[Stream]`): one a step, in an order that is shuffled anew each time all were seen.
            judges (`Sequence[Stream]`): held out.
            settings (`BlockSettings`): how.
            on_step (`Callable[[float], None]`): called with the loss of each step.

        Raises:
            NMSparseError: if the loss is NaN or infinite.
            UnsupportedError: if it does not depend on the masks.
        """
        started = time.perf_counter()
        start = [parameter.detach().clone() for parameter in self.logits().values()]
        codes, before = self.codes(), self.hard_error(judges)
        try:
            self._train(streams, settings, on_step)
            learned, after = self.codes(), self.hard_error(judges)
            improved = after < before
            if not improved:
                self.put_back(start)
        except BaseException:  # an interruption too
            self.put_back(start)
            raise
        changed = sum(int((now != then).sum()) for now, then in zip(learned, codes, strict=True))
        share = changed / sum(then.numel() for then in codes)
        return BlockReport(self.name, before, after, improved, share, time.perf_counter() - started)

    def _train(self, streams: Sequence[Stream], settings: BlockSettings, on_step: Callable[[float], None]) -> None:
        optimizer = _optimizer(list(self.logits().values()), settings.learning_rate)
        try:
            with self._sampling():
                for step, number in enumerate(_order(len(streams), settings.steps)):
                    on_step(self._step(streams[number], step, settings, optimizer))
        finally:
            optimizer.zero_grad(set_to_none=True)

    def _step(self, stream: Stream, step: int, settings: BlockSettings, optimizer: torch.optim.Optimizer) -> float:
        for layer in self.layers.values():
            layer.set_moment(self.adapter_name, Moment(step, settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - (1 - _LAST_RATE) * step / max(1, settings.steps - 1))
        logits = list(self.logits().values())
        with torch.enable_grad():
            loss = stream.error(self.run_masked(stream))
        if not loss.requires_grad:
            raise UnsupportedError(
                f"{self.name}: its output does not depend on the logits of its masks. If the adapters are disabled, call "
                "model.enable_adapter_layers(); if these layers are never used, leave them dense"
            )
        value = float(loss)
        if not abs(value) < float("inf"):
            raise NMSparseError(
                f"{self.name}: the loss is {value} at step {step} of {settings.steps}; its logits were put back, those of "
                f"blocks before it are learned. Lower the learning rate ({settings.learning_rate:g}), or load the model in "
                "bfloat16 or float32 if it is in float16"
            )
        # Not backward(): nothing but these logits gets a gradient, whatever else of the model may train.
        gradients = torch.autograd.grad(loss, logits, allow_unused=True)
        for parameter, gradient in zip(logits, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def put_back(self, logits: Sequence[torch.Tensor]) -> None:
        """Make these the logits, in the order of the layers."""
        with torch.no_grad():
            for parameter, value in zip(self.logits().values(), logits, strict=True):
                parameter.copy_(value)

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """For the time of the context the masks of the block are soft and noisy; all else computes as in evaluation."""
        before = [
            (layer, layer.moments.get(self.adapter_name), layer.paused.get(self.adapter_name, False), layer.training)
            for layer in self.layers.values()
        ]
        try:
            for layer in self.layers.values():
                layer.pause(self.adapter_name, False)
                layer.training = True  # the layer alone: train() would wake the dropout of what is inside
            yield
        finally:
            for layer, moment, paused, training in before:
                layer.set_moment(self.adapter_name, moment)
                layer.pause(self.adapter_name, paused)
                layer.training = training


@contextlib.contextmanager
def masks_off(layers: Iterable[NMSparseLayer]) -> Iterator[None]:
    """For the time of the context these layers compute with their dense weights."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.masks_off())
        yield


def _shares(sample: Sample) -> torch.Tensor:
    """`1 / (tokens ||t||^2)` for each token t of a batch, 0 at padding.

    Relative to its own size each token counts alike, also the few with massive activations (Sun et al., arXiv 2402.17762).
    """
    energy = sample.hidden.float().square().sum(-1)
    shares = torch.where(energy > 0, 1 / energy, 0)
    if sample.real is not None and sample.real.shape == shares.shape:
        shares = shares * sample.real.to(shares.device)
    return shares / max(1, sample.tokens())


def _order(count: int, steps: int) -> Iterator[int]:
    """`steps` numbers below `count`, each as often as the others, shuffled; for every block the same."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[step % count]


def _optimizer(logits: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    if any(parameter.dtype == torch.bfloat16 for parameter in logits):
        return MaskAdamW(logits, lr=learning_rate, betas=_BETAS)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in logits)
    return torch.optim.AdamW(logits, lr=learning_rate, betas=_BETAS, weight_decay=0.0, fused=fused)
