# SPDX-License-Identifier: Apache-2.0
"""What training a mask takes of each of several devices, by the engine that spreads it over them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import ConfigError
from .planned import Plan

Engine = Literal["ddp", "zero2", "fsdp2"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "fsdp2")
# Values in DeepSpeed's buffer of gradients that are on their way, by default (reduce_bucket_size).
_ZERO_BUCKET = 500_000_000


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on each device while masks train, beside activations.

    Args:
        engine (`str`), devices (`int`): as in `device_bytes`.
        model (`int`), trainable (`int`), optimizer (`int`): of frozen weights, of masks and terms, and of AdamW's states: of the
            whole, or of a device's share.
        backward (`int`): gradients and masked weights, the most that they take together. Masked weights are whole on each device:
            they belong to its part of the batch.
        communication (`int`): what the engine holds to send and to fetch: buckets of gradients; under FSDP2 the two blocks whose
            weights and logits are whole at a time.
    """

    engine: str
    devices: int
    model: int
    trainable: int
    optimizer: int
    backward: int
    communication: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.model + self.trainable + self.optimizer + self.backward + self.communication

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"total": self.total}


def device_bytes(plan: Plan, devices: int, engine: Engine) -> DeviceBytes:
    """Say what each of several devices holds while the masks of a plan train.

    DDP holds everything on each device; DeepSpeed ZeRO-2 shares out the states and gradients; FSDP2 weights and logits too, and
    fetches one block after the other. The batch is split, so activations are those of a device's own samples.

    Args:
        plan (`Plan`): of `nms.plan`.
        devices (`int`): how many, at least 2.
        engine (`str`): `"ddp"`, `"zero2"` or `"fsdp2"`.

    Returns:
        `DeviceBytes`.

    Raises:
        ConfigError: if there is no such engine or number, or the engine does not train masks in the way that was planned.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: masks train under {', '.join(map(repr, ENGINES))}")
    if devices < 2:
        raise ConfigError(f"devices={devices}: name at least 2; what one device takes is the plan itself")
    if plan.in_backward:
        raise ConfigError(
            "an optimizer that steps in the backward pass cannot wait for the gradients of other devices"
        )
    if engine not in engines_for(plan):
        raise ConfigError(
            f"{engine} with logits in {plan.logits_dtype} and states in {plan.optimizer_states}: these need MaskAdamW, which "
            "updates whole tensors. Plan for ddp, or for float32 logits and states"
        )
    if engine == "fsdp2":
        return _fsdp2(plan, devices)
    if engine == "zero2":
        return _zero2(plan, devices)
    # Every gradient has a place in a bucket, beside its own.
    return DeviceBytes(
        engine=engine,
        devices=devices,
        model=plan.model_bytes,
        trainable=plan.trainable_bytes,
        optimizer=plan.optimizer_bytes,
        backward=plan.backward_bytes,
        communication=plan.trainable_bytes,
    )


def engines_for(plan: Plan) -> tuple[Engine, ...]:
    """The engines that train masks in the way that was planned."""
    if plan.in_backward:
        return ()
    stock_adamw = plan.optimizer_states == plan.logits_dtype == "float32"
    return ENGINES if stock_adamw else ("ddp",)


def _zero2(plan: Plan, devices: int) -> DeviceBytes:
    """Of states, gradients and the float32 copy of what trains a device has its share; the rest it has whole."""
    share = _share(plan.trainable_bytes, devices)
    largest = max(layer.gradient_bytes for layer in plan.layers)
    return DeviceBytes(
        engine="zero2",
        devices=devices,
        model=plan.model_bytes,
        trainable=plan.trainable_bytes + share,
        optimizer=_share(plan.optimizer_bytes, devices),
        backward=share + largest + plan.masked_weight_bytes,
        communication=min(4 * _ZERO_BUCKET, plan.trainable_bytes),
    )


def _fsdp2(plan: Plan, devices: int) -> DeviceBytes:
    """A device has its share of everything, and of the blocks that compute or come next all."""
    whole = dict(plan.block_bytes)
    gradients = dict.fromkeys(whole, 0)
    for layer in plan.layers:
        if layer.block in whole:
            whole[layer.block] += layer.gradient_bytes  # logits and terms are as large as their gradients
            gradients[layer.block] += layer.gradient_bytes
    fetched = sorted([*whole.values(), plan.edge_bytes])[-2:] if whole else [plan.model_bytes + plan.trainable_bytes]
    of_block = max(gradients.values(), default=plan.gradient_bytes)
    return DeviceBytes(
        engine="fsdp2",
        devices=devices,
        model=_share(plan.model_bytes, devices),
        trainable=_share(plan.trainable_bytes, devices),
        optimizer=_share(plan.optimizer_bytes, devices),
        # A block's gradients lie whole, and once more in the buffer in which they are summed.
        backward=_share(plan.gradient_bytes, devices) + 2 * of_block + plan.masked_weight_bytes,
        communication=sum(fetched),
    )


def _share(count: int, devices: int) -> int:
    return -(-count // devices)
