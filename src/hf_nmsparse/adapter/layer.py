# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: a frozen linear layer whose weight is seen through a learnable or published mask."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .. import ops
from .._compat import BufferDict
from ..errors import BaseModelMismatchError, ConfigError, FormatError, ScheduleError
from ..fingerprint import FINGERPRINT_BYTES, digest, fingerprint, rounding_hint, to_hex
from ..ops import NoiseKey
from ..pattern import NMPattern
from ..relaxations import Moment, Relaxation, get_relaxation, sampling_state
from .config import NMSparseConfig


class MaskParameter(nn.Module):
    """One trainable tensor, as a module with a `.weight`.

    A module rather than a bare parameter so that its name ends in `.<adapter>.weight` (trl copies reference adapters by
    the text `.default.`) and so that ZeRO-3, FSDP and offload hooks, which run on module calls, reach it.
    """

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self) -> torch.Tensor:
        return self.weight


class NMSparseLayer(BaseTunerLayer):
    """State and arithmetic of the masks on one linear layer. Several active masks act as their intersection."""

    adapter_layer_names = ("nmsparse_logits",)
    other_param_names = (
        "nmsparse_packed",
        "nmsparse_base",
        "nmsparse_digest",
        "configs",
        "relaxations",
        "moments",
        "states",
        "verified",
    )

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.nmsparse_logits = nn.ModuleDict({})
        self.nmsparse_packed = BufferDict({}, persistent=True)
        self.nmsparse_base = BufferDict({}, persistent=True)
        self.nmsparse_digest = BufferDict({}, persistent=True)
        self.configs: dict[str, NMSparseConfig] = {}
        self.relaxations: dict[str, Relaxation] = {}
        self.moments: dict[str, Moment] = {}
        self.states: dict[str, ops.SamplingState] = {}
        self.allow_base_mismatch = False
        self.verified: dict[str, list[tuple[torch.Tensor, int]]] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._weight_before_merge: torch.Tensor | None = None
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    # --- bookkeeping ------------------------------------------------------------------------------------------------
    def _get_available_adapters(
        self,
    ) -> set[str]:  # PEFT looks at trainable containers only, and would miss packed masks
        return set(self.configs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT casts to the base dtype here. bfloat16 logits lose most updates and flip masks, so only the device changes.
        device = device or self.get_base_layer().weight.device
        if device.type == "meta":
            return
        for container in (self.nmsparse_logits, self.nmsparse_packed, self.nmsparse_base, self.nmsparse_digest):
            if adapter_name in container:
                item = container[adapter_name]
                tensor = item.weight if isinstance(item, nn.Module) else item
                if not tensor.is_meta:
                    container[adapter_name] = item.to(device)

    def update_layer(self, adapter_name: str, config: NMSparseConfig) -> None:
        """Add the adapter `adapter_name` to this layer."""
        pattern = NMPattern(config.pattern)
        relaxation = get_relaxation(config.relaxation)(pattern, NoiseKey.for_layer(config.seed, self.module_name))
        weight = self.get_base_layer().weight
        if config.mask_format == "packed":
            width = pattern.packed_row_bytes(self.in_features)
            self.nmsparse_packed[adapter_name] = torch.zeros(self.out_features, width, dtype=torch.uint8)
            self.nmsparse_digest[adapter_name] = torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8)
            base = None  # arrives with the codes
        else:
            parameters = relaxation.parameters(weight, config)
            for container, value in parameters.items():
                getattr(self, container)[adapter_name] = MaskParameter(value)
            base = fingerprint(weight)
        self.nmsparse_base[adapter_name] = torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8) if base is None else base
        self.configs[adapter_name] = config
        self.relaxations[adapter_name] = relaxation
        self.verified.pop(adapter_name, None)
        if self._wants_magnitude_prior(adapter_name):
            mask = ops.top_n_mask(weight.detach().abs().float(), pattern)
            self.set_prior_codes(adapter_name, ops.mask_to_codes(mask, pattern))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def drop_adapter(self, adapter_name: str) -> None:
        """Forget everything about an adapter."""
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]

    def _wants_magnitude_prior(self, adapter_name: str) -> bool:
        config = self.configs[adapter_name]
        loading = config.inference_mode or self.get_base_layer().weight.is_meta
        return config.mask_format == "logits" and config.init_weights and config.prior == "magnitude" and not loading

    def set_prior_codes(self, adapter_name: str, codes: torch.Tensor) -> None:
        """Start the logits of an adapter from a mask, given as codes `[out, groups]`."""
        self.relaxations[adapter_name].set_prior(self._parameters_of(adapter_name), codes, self.configs[adapter_name])

    @contextlib.contextmanager
    def masks_off(self) -> Iterator[None]:
        """For the time of the context the layer computes with its dense weight; nothing else changes."""
        before = self._disable_adapters
        self._disable_adapters = True  # not enable_adapters(): that also changes requires_grad
        try:
            yield
        finally:
            self._disable_adapters = before

    def _parameters_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The trainable tensors of an adapter by container name."""
        return {
            container: getattr(self, container)[adapter_name]()
            for container in self.adapter_layer_names
            if adapter_name in getattr(self, container)
        }

    # --- trust ------------------------------------------------------------------------------------------------------
    def verify(self, adapter_name: str) -> None:
        """Check once, before the first use of loaded tensors, that they are whole and made for this base weight.

        Raises:
            FormatError: if codes are missing, damaged or impossible.
            ConfigError: if logits were never initialised.
            BaseModelMismatchError: if the base weight is another one.
        """
        tensors = [self.nmsparse_base[adapter_name]]
        if adapter_name in self.nmsparse_packed:
            tensors += [self.nmsparse_packed[adapter_name], self.nmsparse_digest[adapter_name]]
        # Held with their versions: a tensor that was replaced or written to is checked again.
        mark = [(tensor, tensor._version) for tensor in tensors]
        seen = self.verified.get(adapter_name, [])
        if len(seen) == len(mark) and all(a is b and m == n for (a, m), (b, n) in zip(seen, mark, strict=True)):
            return
        if adapter_name in self.nmsparse_packed:
            self._verify_codes(adapter_name)
        elif not any(bool(value.any()) for value in self._parameters_of(adapter_name).values()):
            prior = self.configs[adapter_name].prior
            raise ConfigError(
                f"{self.module_name}: adapter {adapter_name!r} has no logits yet (its prior is {prior!r}); call "
                f"nms.set_prior(model, {prior or 'polish'!r}, calibration=...) or load a checkpoint that holds this layer"
            )
        self._verify_base(adapter_name)
        self.verified[adapter_name] = mark

    def check_usable(self, adapter_name: str) -> None:
        """`verify`, and that every logit is finite: the largest of NaNs would be an arbitrary but valid mask.

        Raises:
            ConfigError: with PEFT's own words, on NaN or infinity.
        """
        self.verify(adapter_name)
        for value in self._parameters_of(adapter_name).values():
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
                    f"{self.module_name}: {int((~value.isfinite()).sum())} logits are not finite. Go back to an earlier "
                    "checkpoint, and lower the learning rate"
                )

    def _verify_codes(self, adapter_name: str) -> None:
        packed, stored = self.nmsparse_packed[adapter_name], self.nmsparse_digest[adapter_name]
        if not bool(stored.any()):
            raise FormatError(
                f"{self.module_name}: the mask {adapter_name!r} holds no codes for this layer; the file is incomplete"
            )
        found = digest(packed)
        if not torch.equal(found, stored.cpu()):
            raise FormatError(
                f"{self.module_name}: the codes of mask {adapter_name!r} are damaged (digest {to_hex(found)}, expected "
                f"{to_hex(stored)}); fetch the mask again"
            )
        pattern = self.relaxations[adapter_name].pattern
        ops.unpack_codes(packed, pattern, self.in_features, name=self.module_name)

    def _verify_base(self, adapter_name: str) -> None:
        stored = self.nmsparse_base[adapter_name].cpu()
        pristine = self._weight_before_merge if self._weight_before_merge is not None else self.get_base_layer().weight
        found = fingerprint(pristine)
        if found is None or not bool(stored.any()) or self.allow_base_mismatch or torch.equal(found, stored):
            return
        config = self.configs[adapter_name]
        made_for = f"{config.base_model_name_or_path or 'another model'}" + (
            f" at revision {config.revision}" if config.revision else ""
        )
        raise BaseModelMismatchError(
            f"{self.module_name}: mask {adapter_name!r} was made for other weights ({made_for}, fingerprint "
            f"{to_hex(stored)}) than the ones here (fingerprint {to_hex(found)}); load the base model it names"
            + rounding_hint(pristine)
        )

    # --- arithmetic -------------------------------------------------------------------------------------------------
    def mask_codes(self, adapter_name: str) -> torch.Tensor:
        """The hard mask of an adapter as codes, int64 `[out, groups]`, after `check_usable`."""
        self.check_usable(adapter_name)
        relaxation = self.relaxations[adapter_name]
        if adapter_name in self.nmsparse_packed:
            return ops.unpack_codes(
                self.nmsparse_packed[adapter_name], relaxation.pattern, self.in_features, name=self.module_name
            )
        with torch.no_grad():
            return relaxation.codes(self._parameters_of(adapter_name), self.in_features)

    def hard_mask(self, adapter_name: str) -> torch.Tensor:
        """The hard mask of an adapter, bool `[out, in]`."""
        pattern = self.relaxations[adapter_name].pattern
        return ops.codes_to_mask(self.mask_codes(adapter_name), pattern, self.in_features)

    def set_moment(self, adapter_name: str, moment: Moment | None) -> None:
        """Tell an adapter where training stands; `None` forgets it."""
        self.states.pop(adapter_name, None)
        if moment is None:
            self.moments.pop(adapter_name, None)
        else:
            self.moments[adapter_name] = moment

    def _state(self, adapter_name: str, training: bool) -> ops.SamplingState:
        moment = self.moments.get(adapter_name)
        if training and moment is None:
            raise ScheduleError(
                f"{self.module_name}: adapter {adapter_name!r} is training but does not know the optimizer step, which "
                "its schedule and its noise depend on; add callbacks=[nms.MaskScheduleCallback()] to the Trainer, or in "
                "your own loop call nms.set_mask_step(model, step, max_steps) before each forward pass"
            )
        device = self.get_base_layer().weight.device
        state = self.states.get(adapter_name)
        if state is None or state.step.device != device:
            state = sampling_state(self.configs[adapter_name], moment, device)
            self.states[adapter_name] = state
        return state

    def _masked(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if adapter_name not in self.nmsparse_logits:
            return torch.where(self.hard_mask(adapter_name), weight, weight.new_zeros(()))
        self.verify(adapter_name)
        parameters = self._parameters_of(adapter_name)
        # Not torch.is_grad_enabled(): reentrant checkpointing runs its first forward without gradients.
        training = self.training and any(value.requires_grad for value in parameters.values())
        state = self._state(adapter_name, training)
        return self.relaxations[adapter_name].effective_weight(weight, parameters, state, hard=not training)

    def effective_weight(self, adapter_names: list[str]) -> torch.Tensor:
        """The base weight under the masks of `adapter_names`, `[out, in]`: soft while they train, else exactly n:m."""
        weight = self.get_base_layer().weight
        for adapter_name in adapter_names:
            weight = self._masked(weight, adapter_name)
        return weight

    # --- merge ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the hard masks into the base weight: kept weights stay bit-equal, pruned ones become +0.

        Args:
            safe_merge (`bool`): refuse weights that are not finite; logits that are not are always refused.
            adapter_names (`list[str]`, *optional*): adapters to merge; the active ones by default.

        Raises:
            ValueError: with PEFT's own message, on NaN or infinity.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not adapter_names:
            return
        pristine = self._weight_before_merge if self._weight_before_merge is not None else self.get_base_weight()
        merged = pristine
        for name in [*self.merged_adapters, *adapter_names]:
            merged = torch.where(self.hard_mask(name), merged, merged.new_zeros(()))
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[0]} seems to be broken")
        self._weight_before_merge = pristine
        self.set_base_weight(merged)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # PEFT unmerges all adapters of a layer at once, so the weight before the first merge is the right one.
        self.set_base_weight(self._weight_before_merge.to(self.get_base_layer().weight.device))
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A mask is no low-rank update."""
        return False


class NMSparseLinear(nn.Module, NMSparseLayer):
    """A linear layer under masks. ("Linear" in the name: PEFT's `all-linear` finds tuner layers by class name.)"""

    def __init__(self, base_layer: nn.Linear, module_name: str, adapter_name: str, config: NMSparseConfig) -> None:
        super().__init__()
        NMSparseLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        # A new module starts in training mode; added to a model in eval mode it would sample masks there.
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` `[..., in]` -> `[..., out]`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.configs]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        weight = self.effective_weight(active)
        return F.linear(self._cast_input_dtype(x, weight.dtype), weight, self.base_layer.bias)

    def __repr__(self) -> str:
        return "nmsparse." + super().__repr__()
