# SPDX-License-Identifier: Apache-2.0
"""`learn_blockwise`: the masks of one block after the other, each against what its dense block computes."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..adapter import NMSparseLayer, mask_layers
from ..criteria import find_stacks
from ..criteria.blocks import Sample, evaluating, in_order_of_execution, record_sample
from ..criteria.ledger import identity_of, identity_of_batch
from ..criteria.offload import present
from ..data import calibration_batches
from ..errors import ConfigError, UnsupportedError
from ..hub.masks import active_mask
from .finished_blocks import FinishedBlocks, digests_of
from .one_block import Block, BlockReport, BlockSettings, Stream, masks_off

logger = logging.getLogger(__name__)

Inputs = Literal["pruned", "dense"]

_HELD_OUT = 8  # one of so many batches judges what the others have taught
# What the learned logits depend on beside the arguments.
_CONFIG_FIELDS = (
    *("pattern", "relaxation", "schedule", "temperature", "logit_scale", "magnitude_regularization"),
    *("resample", "seed", "logits_dtype"),
)


@dataclass(frozen=True)
class BlockwiseReport:
    """What `learn_blockwise` did.

    Args:
        blocks (`list[BlockReport]`): in the order in which they were learned.
        tokens (`int`): calibration tokens that enter the first stack of blocks, padding not counted.
        seconds (`float`): wall time in all; of this call, where it went on after another.
    """

    blocks: list[BlockReport]
    tokens: int
    seconds: float


def learn_blockwise(
    model: nn.Module,
    calibration: Any,
    *,
    adapter_name: str | None = None,
    steps: int = 100,
    learning_rate: float = 2e-3,
    batch_size: int = 4,
    inputs: Inputs = "pruned",
    tokenizer: Any = None,
    checkpoint_folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> BlockwiseReport:
    """Learn the masks of each block against the output of the dense block, block after block, in one sweep.

    No gradient passes more than one block. Memory besides the model and its logits: gradients and AdamW states of the
    logits of one block and a copy of them, what one block keeps for its backward pass, and twice the hidden states of all
    calibration tokens at one block. Nothing but logits changes. The last eighth of the batches is held out: a block whose
    hard masks have no lower error there than before gets its old logits back.

    Each step takes the next batch, shuffled, lowers the mean over its tokens of `||y - t||^2 / ||t||^2` by one step of
    AdamW (`MaskAdamW` for logits in bfloat16), and the learning rate falls linearly to a tenth. The schedules of the masks
    run from start to end within each block. The noise is keyed by seed, step and layer, so that the same call gives the
    same masks.

    Args:
        model (`PeftModel` or a model with a mask adapter): the model; its logits hold the masks to start from, see
            `set_prior`.
        calibration: integers `[samples, sequence]`, texts (then give `tokenizer`), or an iterable of model inputs (dicts),
            each of which is a batch.
        adapter_name (`str`, *optional*): which adapter; the active one by default. No other mask may be active.
        steps (`int`): optimizer steps for each block.
        learning_rate (`float`): of the logits, at the first step. Too high a rate can make the model worse although the
            error of each block falls: measure the model afterwards.
        batch_size (`int`): windows a step, for tokens and texts.
        inputs (`str`): what enters a block: outputs of the `"pruned"` blocks before it, with their learned hard masks, so
            that a block makes up for some of what those before it lost; or of the `"dense"` ones.
        tokenizer (*optional*): for texts.
        checkpoint_folder (`str` or `Path`, *optional*): the logits of finished blocks are kept there. The same call again
            goes on after them, with the same result bit for bit. Remove it when you are done.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        `BlockwiseReport`.

    Raises:
        ConfigError: on a value that cannot be used, if the masks cannot be trained as they are (published, merged, frozen,
            without a prior, several active), with fewer than two batches, or a `checkpoint_folder` of another run.
        UnsupportedError: for models that cannot be run block by block, and logits that are sharded or not in memory.
        NMSparseError: naming the block whose loss is NaN or infinite. Blocks before it are learned, the others as they were.
    """
    started = time.perf_counter()
    _check_arguments(steps, learning_rate, batch_size, inputs)
    adapter_name = adapter_name or active_mask(model)
    layers = mask_layers(model, adapter_name)
    _check_masks(layers, adapter_name)
    batches = list(calibration_batches(calibration, tokenizer, batch_size=batch_size))
    if len(batches) < 2:
        raise ConfigError(
            f"calibration gives {len(batches)} batch of batch_size={batch_size}; at least two are needed, one to learn from and "
            "one to judge by: use more text or a smaller batch_size"
        )
    settings = BlockSettings(steps, learning_rate)
    sweep = _Sweep(model, layers, adapter_name, settings, inputs, progress)
    if checkpoint_folder is not None:
        sweep.open_folder(Path(checkpoint_folder), batches)
    with torch.no_grad(), sweep.bar, evaluating(sweep.model):
        sweep.run(batches)
    return BlockwiseReport(sweep.reports, sweep.tokens, time.perf_counter() - started)


class _Sweep:
    """One way through the blocks of a model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, NMSparseLayer],
        adapter_name: str,
        settings: BlockSettings,
        inputs: Inputs,
        progress: bool,
    ) -> None:
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.layers, self.adapter_name = layers, adapter_name
        self.settings, self.inputs = settings, inputs
        self.tokens = 0
        self.reports: list[BlockReport] = []
        self.finished: FinishedBlocks | None = None
        self.stacks = find_stacks(self.model, set(layers.values()))
        self.blocks = {name: self._blocks_of(name, modules) for name, modules in self.stacks}
        held = {layer for blocks in self.blocks.values() for block in blocks for layer in block.layers}
        if outside := [name for name in layers if name not in held]:
            logger.warning("%s (%d such) is outside the blocks and keeps its logits", outside[0], len(outside))
        learned = sum(bool(block.layers) for blocks in self.blocks.values() for block in blocks)
        self.bar = tqdm(total=learned * settings.steps, desc="blocks", unit="step", disable=None if progress else True)

    def _blocks_of(self, stack: str, modules: nn.ModuleList) -> list[Block]:
        """The blocks of a stack, up to the last one that holds masks."""
        owner = {module: index for index, block in enumerate(modules) for module in block.modules()}
        held: dict[int, dict[str, NMSparseLayer]] = {}
        for name, layer in self.layers.items():
            if layer in owner:
                held.setdefault(owner[layer], {})[name] = layer
        return [
            Block(f"{stack}.{index}", modules[index], index, held.get(index, {}), self.adapter_name)
            for index in range(max(held) + 1)
        ]

    def open_folder(self, folder: Path, batches: list[dict[str, Any]]) -> None:
        """Take over what a killed run has left in the checkpoint folder."""
        config = next(iter(self.layers.values())).configs[self.adapter_name]
        logits = {id(layer.nmsparse_logits[self.adapter_name].weight) for layer in self.layers.values()}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in logits]
        run = {
            "method": "learn_blockwise",
            **dataclasses.asdict(self.settings),
            "inputs": self.inputs,
            **{f"config.{name}": getattr(config, name) for name in _CONFIG_FIELDS},
            "dtype": sorted({str(parameter.dtype) for parameter in others}),
            "calibration": [identity_of_batch(batch) for batch in batches],
            "layers": list(self.layers),
            "parameters": identity_of(others),
        }
        self.finished = FinishedBlocks(folder, run)
        for blocks in self.blocks.values():
            for block in blocks:
                self.finished.check(block)

    def run(self, batches: list[dict[str, Any]]) -> None:
        """Stack after stack, as the model runs them."""
        stacks = self.stacks
        if len(stacks) > 1:
            stacks = in_order_of_execution(self.model, stacks, batches[0])
        for name, modules in stacks:
            streams = self._record(name, modules, batches, first=not self.reports)
            self.tokens = self.tokens or sum(stream.dense.tokens() for stream in streams)
            for block in self.blocks[name]:
                with present(block.module):
                    self.visit(block, streams)

    def _record(self, name: str, modules: nn.ModuleList, batches: list[dict[str, Any]], first: bool) -> list[Stream]:
        """What enters a stack. A later one (a decoder) may also see outputs of those before it, dense or masked."""

        def record() -> list[Sample]:
            return [record_sample(self.model, name, modules, batch) for batch in batches]

        with present(modules[0]):
            with masks_off(self.layers.values()):
                dense = record()
            if first or self.inputs == "dense":
                masked = [dataclasses.replace(sample) for sample in dense]
            else:
                masked = record()
        return [Stream(*pair) for pair in zip(dense, masked, strict=True)]

    def visit(self, block: Block, streams: list[Stream]) -> None:
        """Learn the masks of one block, and go past it."""
        block.run_dense(streams)
        if block.layers:
            report = self.finished.take(block) if self.finished is not None else None
            if report is None:
                report = self._learn(block, streams)
            else:
                self.bar.update(self.settings.steps)
            self.reports.append(report)
        for stream in streams:
            stream.masked.hidden = stream.dense.hidden if self.inputs == "dense" else block.run_masked(stream)

    def _learn(self, block: Block, streams: list[Stream]) -> BlockReport:
        start = None if self.finished is None else digests_of(block)

        def on_step(loss: float) -> None:
            self.bar.set_postfix_str(f"{block.name}, loss {loss:.4f}", refresh=False)
            self.bar.update()

        held_out = max(1, len(streams) // _HELD_OUT)
        report = block.learn(streams[:-held_out], streams[-held_out:], self.settings, on_step)
        if not report.improved:
            logger.info(
                "%s: error %.4g before, %.4g after; it keeps its old logits",
                block.name,
                report.error_before,
                report.error_after,
            )
        if self.finished is not None:
            self.finished.add(block, start, report)
        return report


def _check_arguments(steps: object, learning_rate: object, batch_size: object, inputs: object) -> None:
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}; expected an integer of at least 1")
    if not isinstance(learning_rate, (int, float)) or not math.isfinite(learning_rate) or learning_rate <= 0:
        raise ConfigError(f"learning_rate={learning_rate!r}; expected a positive number")
    if inputs not in get_args(Inputs):
        raise ConfigError(f"inputs={inputs!r}; expected one of {', '.join(map(repr, get_args(Inputs)))}")


def _check_masks(layers: Mapping[str, NMSparseLayer], adapter_name: str) -> None:
    """Refuse masks that cannot be trained as they are, before anything is run."""
    if not layers:
        raise ConfigError(f"the model has no mask adapter {adapter_name!r}")
    for name, layer in layers.items():
        where = f"{name}: adapter {adapter_name!r}"
        if layer.configs[adapter_name].mask_format != "logits":
            raise ConfigError(
                f"{where} is a published mask (codes), which is final; start new logits from it with nms.set_prior"
            )
        if layer.configs[adapter_name].trains_weight:
            raise ConfigError(
                f"{where} trains the weight itself (relaxation {layer.configs[adapter_name].relaxation!r}); block by block learns "
                'masks over frozen weights (relaxation="candidates" or "elementwise")'
            )
        if layer.merged:
            raise ConfigError(f"{where} is merged into the weights; unmerge it first (model.unmerge_adapter())")
        if (active := [one for one in layer.active_adapters if one in layer.configs]) != [adapter_name]:
            raise ConfigError(f"{where} must be the only active mask, active are {active}; call model.set_adapter")
        logits = layer.nmsparse_logits[adapter_name].weight
        if not logits.requires_grad:
            raise ConfigError(f"{where} is frozen; load it with is_trainable=True, or call model.set_adapter")
        if type(logits) is not nn.Parameter or logits.is_meta or logits.numel() == 0:
            raise UnsupportedError(
                f"{where}: its logits are sharded or not in memory ({type(logits).__name__}, {logits.device}); learn block by "
                "block in one process, with a model that is in memory"
            )
        layer.check_usable(adapter_name)
