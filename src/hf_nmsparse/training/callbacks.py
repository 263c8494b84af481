# SPDX-License-Identifier: Apache-2.0
"""Callbacks that drive and watch mask training. They need nothing but the stock Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter import NMSparseConfig, NMSparseLayer, mask_layers, set_mask_step, whole_tensors
from ..errors import ConfigError
from ..files import write_file
from ..relaxations import sampling_state
from .engines import check_engine, data_process, refuse_empty_weights, refuse_zero3
from .optimizers import rounds_stochastically

logger = logging.getLogger(__name__)

# Rows of each layer on which probabilities are measured; flips are counted on all of them.
_PROBABILITY_ROWS = 16
_START_FILE = "nmsparse_start.safetensors"


def trained_layers(model: nn.Module) -> Iterator[tuple[str, NMSparseLayer, str]]:
    """`(key, layer, adapter name)` of every mask of `model` that is trained, by its logits or by a weight."""
    for name, layer in mask_layers(model).items():
        for adapter_name in layer.configs:
            trained = layer.mask_parameter(adapter_name)
            if trained is not None and trained.requires_grad:
                yield f"{name}.{adapter_name}", layer, adapter_name


def trained_logits(model: nn.Module) -> Iterator[tuple[str, NMSparseLayer, str]]:
    """Those of `trained_layers` that have logits."""
    return ((key, layer, name) for key, layer, name in trained_layers(model) if name in layer.nmsparse_logits)


def _as_wanted(logits: torch.Tensor, config: NMSparseConfig) -> bool:
    return logits.dtype == getattr(torch, config.logits_dtype)


def add_mask_decay(model: nn.Module) -> None:
    """Add the decay of pruned weights (SR-STE) to the gradients of the masks that have one. `MaskScheduleCallback` does this
    under a Trainer; in your own loop call it between clipping and the step of the optimizer."""
    for _, layer, name in trained_layers(model):
        layer.add_to_gradients(name)


class MaskScheduleCallback(TrainerCallback):
    """Tells the masks of a model the optimizer step and the draw, on which schedules and noise depend, and adds the decay of
    pruned weights to the gradients of methods that have it.

    The schedules span `max_steps` of the run. Every mask adapter of the model is served. Before training it refuses what the
    engine that spreads it over processes would do wrong.
    """

    trains_in_phases = False

    def __init__(self) -> None:
        self._micro_step = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        refuse_zero3(args)
        refuse_empty_weights()
        # trl casts what trains over a quantised base to bfloat16. The optimizer does not exist yet, so this is in time.
        given = {id(layer.mask_parameter(name)): layer.configs[name] for _, layer, name in trained_layers(model)}
        low = [p for name, p in model.named_parameters() if ".nmsparse_" in name and p.requires_grad]
        low = [p for p in low if p.dtype.itemsize < 4 and not (id(p) in given and _as_wanted(p, given[id(p)]))]
        for parameter in low:
            parameter.data = parameter.data.float()
        if low:
            logger.warning("%d tensors of masks were in less than float32, and are trained in float32 again", len(low))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs,
    ) -> None:
        for layer in mask_layers(model).values():  # a run that failed within a phase may have left some waiting
            for adapter_name in layer.configs:
                layer.pause(adapter_name, False)
        check_engine(args, model, optimizer, self.trains_in_phases)
        layers = list(trained_layers(model))
        # Terms may train beside a mask that stays as it is.
        if not any(layer.trains(name) for layer in mask_layers(model).values() for name in layer.configs):
            raise ConfigError(
                "MaskScheduleCallback found no trainable mask on the model; wrap it with "
                "get_peft_model(model, NMSparseConfig(...)) before training"
            )
        low = [key for key, layer, name in layers if layer.mask_parameter(name).dtype.itemsize < 4]
        if low and not rounds_stochastically(optimizer):
            logger.warning(
                "%d masks have logits or weights in less than float32 (first: %s), and small updates will be lost to rounding, "
                "because the optimizer does not round stochastically. Use nms.MaskAdamW, which NMSparseTrainer takes for "
                'logits_dtype="bfloat16" where optim is left at its default; or cast them with .float()',
                len(low),
                low[0],
            )
        self._tell(args, state, model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self._micro_step = 0
        self._tell(args, state, model)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self._micro_step += 1
        self._tell(args, state, model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        add_mask_decay(model)

    def _tell(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        set_mask_step(model, state.global_step, state.max_steps, self._draw(args), args.gradient_accumulation_steps)

    def _draw(self, args: TrainingArguments) -> int:
        """Number of this pass among those of an optimizer step, over all processes."""
        rank, processes = data_process(args)
        return self._micro_step * processes + rank


class MaskMetricsCallback(TrainerCallback):
    """Adds to every log line how far the masks have moved and how decided they are.

    The lines are those of `trainer.state.log_history`. Callbacks that report elsewhere see the metrics if they come later
    in the Trainer's list; `NMSparseTrainer` puts this one first.

    Keys: `nm/flip_rate` (share of groups whose hard choice differs from the start of training), `nm/flip_rate_last`
    (from the last log), of masks that are sampled `nm/max_prob` (probability of a group's most probable mask without noise, the
    mean over groups) and `nm/entropy` (mean, in bits), `nm/temperature`, `nm/logit_scale` and, with `eval_tokens`, `nm/hard_eval_loss`.

    Args:
        eval_tokens (`torch.Tensor`, *optional*): int64 `[windows, sequence]`; at each log the loss of the hard-mask model
            on them is measured, in nats a token.
        eval_batch_size (`int`): windows per forward pass.
    """

    def __init__(self, eval_tokens: torch.Tensor | None = None, eval_batch_size: int = 4) -> None:
        self.eval_tokens = eval_tokens
        self.eval_batch_size = eval_batch_size
        self.start_codes: dict[str, torch.Tensor] = {}
        self.last_codes: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self.last_codes = {key: _small_codes(layer, name) for key, layer, name in trained_layers(model)}
        self.start_codes = self.last_codes
        if state.global_step == 0:
            return
        saved = Path(args.output_dir, f"checkpoint-{state.global_step}", _START_FILE)
        if not saved.is_file():  # killed before `on_save`; all checkpoints of a run hold the same
            saved = next(Path(args.output_dir).glob(f"checkpoint-*/{_START_FILE}"), saved)
        if saved.is_file():
            self.start_codes = load_file(saved)
        else:
            logger.warning("%s is missing: nm/flip_rate counts from the resumed step, not from the start", saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_file(folder / _START_FILE, save(self.start_codes))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if logs is None or "loss" not in logs:  # evaluation and the summary at the end log too
            return
        if not any(trained_layers(model)):
            return
        metrics = self.measure(model)
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The metrics at this moment; also moves the mark that `nm/flip_rate_last` counts from."""
        codes, probability, entropy, groups = {}, 0.0, 0.0, 0
        metrics: dict[str, float] = {}
        for key, layer, name in trained_layers(model):
            codes[key] = _small_codes(layer, name)
            if layer.relaxations[name].has_distribution:
                largest, bits, counted = _certainty(layer, name)
                probability, entropy, groups = probability + largest, entropy + bits, groups + counted
            scheduled = layer.relaxations[name].scheduled
            if scheduled and "nm/temperature" not in metrics and not layer.paused.get(name, False):
                state = sampling_state(layer.configs[name], layer.moments.get(name))
                values = {"temperature": (state.temperature, 4), "logit_scale": (state.logit_scale, 2)}
                metrics |= {f"nm/{key}": round(float(values[key][0]), values[key][1]) for key in scheduled}
        metrics["nm/flip_rate"] = flip_rate(self.start_codes, codes)
        metrics["nm/flip_rate_last"] = flip_rate(self.last_codes, codes)
        if groups:
            metrics["nm/max_prob"] = probability / groups
            metrics["nm/entropy"] = entropy / groups
        self.last_codes = codes
        if self.eval_tokens is not None:
            metrics["nm/hard_eval_loss"] = hard_mask_loss(model, self.eval_tokens, self.eval_batch_size)
        return metrics


def flip_rate(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of groups whose code differs between two snapshots of the same layers."""
    flipped = sum(int((before[key] != after[key]).sum()) for key in after)
    return flipped / sum(codes.numel() for codes in after.values())


@torch.no_grad()
def hard_mask_loss(model: nn.Module, tokens: torch.Tensor, batch_size: int = 4) -> float:
    """Mean next-token loss in nats of the model with its hard masks, on `tokens` `[windows, sequence]`."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in tokens.split(batch_size):
        batch = batch.to(device)
        total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    model.train(was_training)
    return total / len(tokens)


def _small_codes(layer: NMSparseLayer, adapter_name: str) -> torch.Tensor:
    codes = layer.mask_codes(adapter_name)
    dtype = torch.uint8 if layer.relaxations[adapter_name].pattern.num_candidates <= 256 else torch.int16
    return codes.to("cpu", dtype)


@torch.no_grad()
def _certainty(layer: NMSparseLayer, adapter_name: str) -> tuple[float, float, int]:
    """(sum of largest probabilities, sum of entropies in bits, groups) on evenly spaced rows, without noise."""
    with whole_tensors(layer.nmsparse_logits[adapter_name]):
        logits = layer.nmsparse_logits[adapter_name].weight
        logits = logits[:: max(1, len(logits) // _PROBABILITY_ROWS)].clone()
    state = sampling_state(layer.configs[adapter_name], layer.moments.get(adapter_name), logits.device)
    parameters = {"nmsparse_logits": logits}
    return layer.relaxations[adapter_name].certainty(parameters, layer.in_features, state)
