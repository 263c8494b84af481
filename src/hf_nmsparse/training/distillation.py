# SPDX-License-Identifier: Apache-2.0
"""Distillation from the dense base: the frozen model under the masks is its own teacher.

The loss is AST's (Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
arXiv 2407.20584): `loss_weight * task loss + distillation_weight * T^2 * KL(teacher || student)`, where both softmaxes
are taken at temperature T and the divergence is averaged over the positions that the task loss counts. To it hidden
states can be added (SquareHead; Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .._compat import adapter_off
from ..adapter import NMSparseLayer
from ..errors import ConfigError

_IGNORED = -100  # the label of positions that no loss counts


@dataclass(frozen=True)
class Distillation:
    """How much, and how softly, the sparse model follows its dense base.

    Args:
        loss_weight (`float`): factor on the task loss; AST's GPT-2 recipe. Its LLaMA recipe has 1.
        distillation_weight (`float`): factor on T^2 KL; AST's GPT-2 recipe. Its LLaMA recipe has 0.5.
        temperature (`float`): T, by which both models' logits are divided.
        top_k (`int`, *optional*): join all classes but the teacher's likeliest into one before the divergence is taken.
        hidden_weight (`float`): factor on the relative error of hidden states, summed over the model's blocks; SquareHead's
            recipe has 1. Not for encoder-decoders.

    Raises:
        ConfigError: on a weight that is negative or not finite, a `temperature` not above 0, `top_k` below 1; if the dense
            base would teach nothing (neither `distillation_weight` nor `hidden_weight` is above 0), or `top_k` be without
            effect.
    """

    loss_weight: float = 1 / 3
    distillation_weight: float = 2 / 3
    temperature: float = 2.0
    top_k: int | None = None
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss_weight", "distillation_weight", "temperature", "hidden_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name == "temperature"):
                lowest = "above" if name == "temperature" else "at least"
                raise ConfigError(f"Distillation: {name} must be a finite number {lowest} 0, got {value!r}")
        if not self.distillation_weight and not self.hidden_weight:
            raise ConfigError(
                "Distillation: distillation_weight and hidden_weight are both 0, so the dense base would teach nothing; raise "
                "one of them, or leave the distillation out"
            )
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
                raise ConfigError(
                    f"Distillation: top_k must be a whole number of at least 1, or None; got {self.top_k!r}"
                )
            if not self.distillation_weight:
                raise ConfigError(f"Distillation: top_k={self.top_k} is without effect at distillation_weight=0")


# --- the teacher ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def dense_base(model: nn.Module) -> Iterator[None]:
    """For the time of the context `model` answers as its dense base: no mask, no other adapter, no dropout, no gradient.

    Works in place on a `PeftModel`, a model with adapters from `add_adapter`, and on wrappers of either
    (`DistributedDataParallel`). Masks, LoRA and the like, `modules_to_save` and trained tokens are switched off; which
    parameters train, and which modules are in training mode, is as before afterwards. Parameters of the base itself that
    someone trains (PEFT's `bias="all"`) stay as they are now.

    Raises:
        ConfigError: if an adapter is merged, since the base weights are then not the dense ones.
    """
    modules = list(model.named_modules())
    merged = [name for name, module in modules if isinstance(module, BaseTunerLayer) and module.merged]
    if merged:
        raise ConfigError(
            f"{len(merged)} layers (first: {merged[0]}) have adapters merged into their weights, so the dense base cannot "
            "be run; unmerge first (model.unmerge_adapter())"
        )
    modes = [(module, module.training) for _, module in modules]
    with contextlib.ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
            module.training = False  # not eval(), which a module may override to do more
            if isinstance(module, NMSparseLayer):
                stack.enter_context(module.masks_off())
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                stack.enter_context(adapter_off(module))
        stack.enter_context(torch.no_grad())
        yield


def teacher_outputs(
    model: nn.Module, inputs: Mapping[str, Any], label_key: str, hidden_states: bool = False
) -> Mapping[str, Any]:
    """What the dense base of `model` gives for a training batch: `logits` `[..., classes]`, and `hidden_states` if wanted."""
    # A second pass through DDP would broadcast buffers between the student's forward and its backward.
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not is_encoder_decoder(model):  # these may make the decoder's input from the labels; no other model needs them
        inputs = {key: value for key, value in inputs.items() if key != label_key}
    if hidden_states:
        inputs = {**inputs, "output_hidden_states": True}
    with dense_base(model):
        return model(**inputs)


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits in a model's output.

    Raises:
        ConfigError: if there are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ConfigError(
            f"distillation needs the model's logits, but its output has only {found}; a fused loss "
            "(use_liger_kernel=True) never makes them, switch it off, and leave return_dict on"
        )
    return logits


def hidden_states_of(outputs: Any) -> list[torch.Tensor]:
    """What each block gives, `[batch, positions, features]`, from a model's output; the embeddings are left out.

    Raises:
        ConfigError: if they are not there, or of another form.
    """
    states = outputs.get("hidden_states") if isinstance(outputs, Mapping) else None
    if not states:
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ConfigError(
            f"hidden_weight needs the model's hidden states, but its output has only {found}; the model does not know "
            "output_hidden_states=True, set hidden_weight=0"
        )
    shapes = {tuple(state.shape[:-1]) for state in states}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ConfigError(
            f"hidden_weight compares hidden states [batch, positions, features] of blocks, but this model's are "
            f"{sorted({tuple(state.shape) for state in states})}; set hidden_weight=0"
        )
    return list(states[1:])


# --- what counts ----------------------------------------------------------------------------------------------------
def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at position i are for the label at i + 1: true of decoder-only language models."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_encoder_decoder(base):
        return False
    by_loss = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return by_loss or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def counted_positions(labels: torch.Tensor, logits: torch.Tensor, next_token: bool) -> torch.Tensor:
    """Positions that the task loss counts, bool, of the shape of `labels`: those whose label is not -100.

    Args:
        labels (`torch.Tensor`): integers, `[...]`.
        logits (`torch.Tensor`): `[..., classes]`.
        next_token (`bool`): position i counts by the label at i + 1.

    Raises:
        ConfigError: if there is not one class label for each row of logits.
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ConfigError(
            f"distillation compares distributions over classes, one for each label, but the labels are "
            f"{labels.dtype} {list(labels.shape)} and the logits {list(logits.shape)}; it does not fit this task"
        )
    counted = labels != _IGNORED
    return F.pad(counted[..., 1:], (0, 1), value=False) if next_token else counted


def attended_positions(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Positions of a batch that are not padding, bool `[batch, positions]`; `None` if its inputs do not say how many."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads with one stack of blocks and writes with another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
