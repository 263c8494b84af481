# SPDX-License-Identifier: Apache-2.0
"""What a plan says: the layers, and the bytes of training their masks in this way or another."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import torch

from ..errors import UnsupportedError
from ..ops import NoiseKey
from ..ops.rounding import BLOCK
from ..pattern import NMPattern
from ..relaxations import RELAXATIONS
from .optimizers import STATES

LOGITS_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that the config prunes.

    Args:
        name (`str`): module name; of fused experts with the name of the parameter.
        block (`str`, *optional*): module name of the block that holds it.
        out_features (`int`), in_features (`int`): its weight is `[out, in]`; fused experts count with the rows of all.
        groups (`int`): groups of m weights, tails included.
        parameters (`int`), logits_bytes (`int`): trainable values of its mask, in the config's `logits_dtype`.
        term_parameters (`int`): trainable values of its terms (SLoRB, low rank, delta), float32.
        kept_bytes (`int`): what autograd keeps of it from forward to backward: the masked weight in the dtype that the
            model computes in, and the weight under the mask where that is no parameter (quantised, changed by a delta), or the
            one of the backward product (`bdwp`).
        mask_bytes (`int`): its packed codes in a published mask.
        dense_bytes (`int`): its weight as it is now, quantised or not.
        packed_bytes (`int`, *optional*): its kept values, their ids and its side branch in a packed model; `None` if it
            cannot be packed.
        not_packable (`str`, *optional*): why it cannot.
    """

    name: str
    block: str | None
    out_features: int
    in_features: int
    groups: int
    parameters: int
    logits_bytes: int
    term_parameters: int
    kept_bytes: int
    mask_bytes: int
    dense_bytes: int
    packed_bytes: int | None
    not_packable: str | None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of its trainable values, each in the dtype of its value."""
        return self.logits_bytes + 4 * self.term_parameters


@dataclass(frozen=True)
class LogitsBytes:
    """Bytes that one way to train the masks of a plan takes, without terms.

    Args:
        relaxation (`str`), logits_dtype (`str`): as in `NMSparseConfig`.
        optimizer_states (`str`), in_backward (`bool`): as in `plan`.
        logits (`int`), gradients (`int`), states (`int`): bytes.
    """

    relaxation: str
    logits_dtype: str
    optimizer_states: str
    in_backward: bool
    logits: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.logits + self.gradients + self.states


@dataclass(frozen=True)
class Plan:
    """What a mask adapter will prune, and the bytes of everything. Activations are not counted.

    Args:
        pattern (`str`): n:m.
        relaxation (`str`): how logits become a mask.
        logits_dtype (`str`): of logits and their gradients; whatever else trains has float32.
        optimizer_states (`str`), in_backward (`bool`), checkpointing (`bool`): as in `plan`.
        resample (`str`): how often masks are drawn; `"step"` keeps the masked weights of all layers until the step.
        candidates (`int`): C(m, n).
        model_parameters (`int`), model_bytes (`int`): of the whole model, tied weights counted once.
        other_trainable (`int`): trainable parameters beside masks and terms (`modules_to_save`, token indices).
        block_bytes (`dict[str, int]`): of the weights of each block, pruned or not.
        edge_bytes (`int`): of the weights of the input embeddings or the output head, whichever are larger.
        layers (`list[PlannedLayer]`): what is pruned.
        skipped (`dict[str, str]`): linear layers and fused experts left dense -> why.
        mask_file_bytes (`int`): of a published mask's safetensors file, terms included.
    """

    pattern: str
    relaxation: str
    logits_dtype: str
    optimizer_states: str
    in_backward: bool
    checkpointing: bool
    resample: str
    candidates: int
    model_parameters: int
    model_bytes: int
    other_trainable: int
    mask_file_bytes: int
    block_bytes: dict[str, int]
    edge_bytes: int
    layers: list[PlannedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def pruned_weights(self) -> int:
        """Weights under a mask."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    # --- training -----------------------------------------------------------------------------------------------------
    @property
    def trainable(self) -> int:
        """Trainable values: those of masks and terms, and what else the config trains."""
        return sum(layer.parameters + layer.term_parameters for layer in self.layers) + self.other_trainable

    @property
    def logits_bytes(self) -> int:
        """Bytes of all trainable mask tensors."""
        return sum(layer.logits_bytes for layer in self.layers)

    @property
    def term_bytes(self) -> int:
        """Bytes of the trainable tensors of all terms, float32."""
        return 4 * sum(layer.term_parameters for layer in self.layers)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of all trainable values."""
        return self.logits_bytes + self.term_bytes + 4 * self.other_trainable

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, each in the dtype of its value: of all trainable values, or of the largest layer where the
        optimizer steps in the backward pass."""
        if self.in_backward:
            return max(4 * self.other_trainable, *(layer.gradient_bytes for layer in self.layers))
        return self.trainable_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's states: of logits as `optimizer_states` says, of whatever else trains in float32."""
        logits = sum(_state_bytes(layer.parameters, self.optimizer_states) for layer in self.layers)
        return logits + 2 * self.term_bytes + 8 * self.other_trainable

    @property
    def masked_weight_bytes(self) -> int:
        """Bytes of masked weights that autograd keeps from forward to backward: of all layers; with checkpointing of the
        largest block, and of layers outside the blocks."""
        return self._lasting_bytes() + max(self._freed_bytes(layers) for layers in self._segments())

    @property
    def backward_bytes(self) -> int:
        """The most that gradients and masked weights take together: while the backward pass goes from the last layer to the
        first it frees masked weights and adds gradients. That of one masked weight comes and goes with each."""
        growing = not self.in_backward
        gradients = 4 * self.other_trainable if growing else 0
        most = self.gradient_bytes
        for layers in reversed(self._segments()):
            held = self._freed_bytes(layers)
            for layer in reversed(layers):
                own, gradient = layer.kept_bytes, layer.gradient_bytes
                # The masked weight is freed when its gradient is there, before that of the logits is made.
                transient = own + gradient if self._lasts(layer) else max(own, gradient)
                most = max(most, self._lasting_bytes() + held + gradients + transient)
                held -= self._freed_bytes([layer])
                gradients += gradient if growing else 0
        return most

    @property
    def training_bytes(self) -> int:
        """Frozen model, trainable values, optimizer states, gradients and masked weights at their peak: what training holds
        beside activations."""
        return self.model_bytes + self.trainable_bytes + self.optimizer_bytes + self.backward_bytes

    @property
    def ways(self) -> list[LogitsBytes]:
        """Every way to train these masks: by logits of candidates (if they take the pattern) or weights, or as planned; dtypes,
        states, with and without gradients."""
        names = sorted({"candidates", "elementwise", self.relaxation})
        choices = itertools.product(names, LOGITS_DTYPES, STATES, (False, True))
        counts = {name: self._values(name) for name in names}
        return [self._way(counts[name], name, *rest) for name, *rest in choices if counts[name] is not None]

    def _way(self, counts: list[int], relaxation: str, dtype: str, states: str, in_backward: bool) -> LogitsBytes:
        logits = [getattr(torch, dtype).itemsize * count for count in counts]
        gradients = max(logits) if in_backward else sum(logits)
        of_states = sum(_state_bytes(count, states) for count in counts)
        return LogitsBytes(relaxation, dtype, states, in_backward, sum(logits), gradients, of_states)

    def _values(self, relaxation: str) -> list[int] | None:
        """Logits of each layer under a relaxation; `None` if it does not take the pattern."""
        kind = RELAXATIONS[relaxation](NMPattern(self.pattern), NoiseKey.for_layer(0, ""))
        try:
            shapes = [kind.values_shape(layer.out_features, layer.in_features) for layer in self.layers]
        except UnsupportedError:
            return None
        return [torch.Size(shape).numel() for shape in shapes]

    def _segments(self) -> list[list[PlannedLayer]]:
        """The layers in pieces whose masked weights are made together in the backward pass: blocks if there is checkpointing,
        else all of them."""
        if not self.checkpointing:
            return [self.layers]
        return [list(layers) for _, layers in itertools.groupby(self.layers, key=lambda layer: layer.block)]

    def _lasts(self, layer: PlannedLayer) -> bool:
        """Whether a masked weight is kept beyond its part of the backward pass, or from before its segment."""
        all_step = self.resample == "step" or RELAXATIONS[self.relaxation].held_weights > 0
        return all_step or (self.checkpointing and layer.block is None)

    def _lasting_bytes(self) -> int:
        return sum(layer.kept_bytes for layer in self.layers if self._lasts(layer))

    def _freed_bytes(self, layers: list[PlannedLayer]) -> int:
        return sum(layer.kept_bytes for layer in layers if not self._lasts(layer))

    # --- results ------------------------------------------------------------------------------------------------------
    @property
    def mask_bits_per_weight(self) -> float:
        """Bits of the published file for each pruned weight."""
        return 8 * self.mask_file_bytes / self.pruned_weights

    @property
    def dense_bytes(self) -> int:
        """Bytes of the pruned layers' weights as they are now."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the pruned layers once packed; layers that cannot be packed count as dense."""
        return sum(layer.dense_bytes if layer.packed_bytes is None else layer.packed_bytes for layer in self.layers)

    @property
    def packed_model_bytes(self) -> int:
        """Bytes of the whole model once packed."""
        return self.model_bytes - self.dense_bytes + self.packed_bytes

    def to_dict(self) -> dict[str, object]:
        """Fields and totals as plain values, for JSON."""
        totals = {name: getattr(self, name) for name, value in vars(Plan).items() if isinstance(value, property)}
        totals["ways"] = [dataclasses.asdict(way) | {"total": way.total} for way in self.ways]
        return dataclasses.asdict(self) | totals


def _state_bytes(values: int, states: str) -> int:
    """Bytes of the states of a tensor: two moments of 4 bytes, or of 1 byte with a scale for each block of each."""
    if states == "float32":
        return 8 * values
    return 2 * -(-values // BLOCK) * (BLOCK + 4)
