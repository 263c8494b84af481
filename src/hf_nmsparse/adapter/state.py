# SPDX-License-Identifier: Apache-2.0
"""What a mask layer holds for each adapter, and the checks before it is first used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .. import ops
from .._compat import BufferDict
from ..criteria import score_confidence
from ..errors import BaseModelMismatchError, ConfigError, FormatError, UnsupportedError
from ..fingerprint import FINGERPRINT_BYTES, digest, fingerprint, rounding_hint, to_hex
from ..ops import NoiseKey
from ..ops.shared_sample import SharedSample
from ..pattern import NMPattern
from ..relaxations import RELAXATION_BUFFERS, Moment, Relaxation, get_relaxation, strength_factors
from .base_weight import BaseWeight
from .config import NMSparseConfig
from .terms import TERM_CONTAINERS, block_projection, fresh_terms, slorb_of_residual, with_delta


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


class MaskState(BaseTunerLayer):
    """The tensors and settings of every adapter on one weight, and whether they can be trusted."""

    adapter_layer_names = ("nmsparse_logits", "nmsparse_weight", *TERM_CONTAINERS)
    other_param_names = (
        "nmsparse_packed",
        "nmsparse_base",
        "nmsparse_digest",
        *RELAXATION_BUFFERS,
        "configs",
        "relaxations",
        "moments",
        "states",
        "samples",
        "backward_samples",
        "paused",
        "verified",
        "mismatch_allowed",
    )

    def __init__(self, base_layer: nn.Module, module_name: str, parameter_name: str = "weight") -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.parameter_name = parameter_name
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ModuleDict({}))
        self.nmsparse_packed = BufferDict({}, persistent=True)
        self.nmsparse_base = BufferDict({}, persistent=True)
        self.nmsparse_digest = BufferDict({}, persistent=True)
        for container in RELAXATION_BUFFERS:
            setattr(self, container, BufferDict({}, persistent=True))
        self.configs: dict[str, NMSparseConfig] = {}
        self.relaxations: dict[str, Relaxation] = {}
        self.moments: dict[str, Moment] = {}
        self.states: dict[str, ops.SamplingState] = {}
        self.samples: dict[str, SharedSample] = {}
        self.backward_samples: dict[str, SharedSample] = {}
        self.paused: dict[str, bool] = {}
        self.mismatch_allowed: dict[str, bool] = {}
        self.verified: dict[str, list[tuple[torch.Tensor, int]]] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._before_merge: torch.Tensor | tuple | None = None
        self.out_features, self.in_features = self.base_weight.shape

    @property
    def base_weight(self) -> BaseWeight:
        """The weight under the masks."""
        return BaseWeight(self.get_base_layer(), self.parameter_name, self.quantization_backend)

    # --- bookkeeping ------------------------------------------------------------------------------------------------
    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)  # PEFT looks at trainable containers only, and would miss packed masks

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT casts to the base dtype here. bfloat16 logits lose most updates and flip masks, so only the device changes.
        device = device or self.base_weight.stored.device
        if device.type == "meta":
            return
        for container in self._containers():
            if adapter_name in container:
                item = container[adapter_name]
                tensor = item.weight if isinstance(item, nn.Module) else item
                if not tensor.is_meta:
                    container[adapter_name] = item.to(device)

    def _containers(self) -> list[nn.ModuleDict | BufferDict]:
        buffers = (self.nmsparse_packed, self.nmsparse_base, self.nmsparse_digest, *self._relaxation_buffers())
        return [getattr(self, name) for name in self.adapter_layer_names] + list(buffers)

    def _relaxation_buffers(self) -> list[BufferDict]:
        return [getattr(self, name) for name in RELAXATION_BUFFERS]

    def update_layer(self, adapter_name: str, config: NMSparseConfig) -> None:
        """Add the adapter `adapter_name` to this layer."""
        pattern = NMPattern(config.pattern)
        key = NoiseKey.for_layer(config.seed, self.module_name)
        relaxation = get_relaxation(config.relaxation)(pattern, key)
        weight = self._pristine()  # another adapter may be merged
        parameters = fresh_terms(config, weight, key, self.base_weight.num_experts)
        if config.mask_format == "packed":
            width = pattern.packed_row_bytes(self.in_features)
            self.nmsparse_packed[adapter_name] = torch.zeros(self.out_features, width, dtype=torch.uint8)
            self.nmsparse_digest[adapter_name] = torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8)
            stamp = None  # arrives with the codes
        else:
            self._check_trained_weight(relaxation)
            parameters |= relaxation.parameters(weight, config)
            for container, value in relaxation.buffers(weight, config).items():
                getattr(self, container)[adapter_name] = value
            stamp = None if self.quantization_backend is not None else fingerprint(weight)
        for container, value in parameters.items():
            getattr(self, container)[adapter_name] = MaskParameter(value)
        self.nmsparse_base[adapter_name] = (
            torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8) if stamp is None else stamp
        )
        self.configs[adapter_name] = config
        self.relaxations[adapter_name] = relaxation
        self.verified.pop(adapter_name, None)
        if self._wants_magnitude_prior(adapter_name, weight):
            self._set_magnitude_prior(adapter_name, weight.detach().abs().float())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_trained_weight(self, relaxation: Relaxation) -> None:
        if relaxation.trains_weight and self.quantization_backend is not None:
            raise UnsupportedError(
                f"{self.module_name} is quantised with {self.quantization_backend.backend_name}; relaxation "
                f"{relaxation.name!r} trains the weight itself, so load the model unquantised, or learn the mask alone "
                '(relaxation="candidates")'
            )

    def drop_adapter(self, adapter_name: str) -> None:
        """Forget everything about an adapter."""
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]

    def _wants_magnitude_prior(self, adapter_name: str, weight: torch.Tensor) -> bool:
        config = self.configs[adapter_name]
        parameters = self._tensors_of(adapter_name).values()
        # Not while loading: it costs a pass over the weight, and the logits are about to be replaced.
        loading = config.inference_mode or weight.is_meta or any(value.is_meta for value in parameters)
        return config.mask_format == "logits" and config.init_weights and config.prior == "magnitude" and not loading

    def _set_magnitude_prior(self, adapter_name: str, magnitudes: torch.Tensor) -> None:
        relaxation = self.relaxations[adapter_name]
        pattern = relaxation.pattern
        if not relaxation.takes_prior:
            codes = relaxation.codes(self._tensors_of(adapter_name), self.in_features)
            self._start_slorb(adapter_name, ops.codes_to_mask(codes, pattern, self.in_features))
            return
        codes, factors = ops.top_n_codes(magnitudes, pattern), None
        if self.configs[adapter_name].prior_confidence:
            mask = ops.codes_to_mask(codes, pattern, self.in_features)
            experts = score_confidence(magnitudes, mask, pattern).chunk(self.base_weight.num_experts or 1)
            factors = torch.cat([strength_factors(confidence) for confidence in experts])
        self.set_prior_codes(adapter_name, codes, factors)

    def set_prior_codes(self, adapter_name: str, codes: torch.Tensor, factors: torch.Tensor | None = None) -> None:
        """Start the logits of an adapter from a mask, and SLoRB from what it prunes.

        Args:
            adapter_name (`str`): which adapter.
            codes (`torch.Tensor`): the mask, int64 `[out, groups]`.
            factors (`torch.Tensor`, *optional*): on the prior's strength in each group, float `[out, groups]`.
        """
        relaxation = self.relaxations[adapter_name]
        relaxation.set_prior(self._tensors_of(adapter_name), codes, self.configs[adapter_name], factors)
        self._start_slorb(adapter_name, ops.codes_to_mask(codes, relaxation.pattern, self.in_features))

    def _start_slorb(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Start SLoRB from what a mask prunes."""
        config, parameters = self.configs[adapter_name], self._tensors_of(adapter_name)
        if "nmsparse_slorb" in parameters and config.slorb_init in ("mean", "sum") and config.init_weights:
            weight = self._pristine().detach()
            with torch.no_grad():
                residual = with_delta(weight, parameters).masked_fill(~mask, 0) - weight
                slorb = slorb_of_residual(residual, config.slorb_block, config.slorb_init)
                parameters["nmsparse_slorb"].copy_(slorb)
                if "nmsparse_slorb_projection" in parameters:  # S is for sums over blocks
                    blocks = block_projection(self.in_features, config.slorb_block)
                    parameters["nmsparse_slorb_projection"].copy_(blocks)

    @contextlib.contextmanager
    def masks_off(self) -> Iterator[None]:
        """For the time of the context the layer computes with its dense weight; nothing else changes."""
        before = self._disable_adapters
        self._disable_adapters = True  # not enable_adapters(): that also changes requires_grad
        try:
            yield
        finally:
            self._disable_adapters = before

    def trains(self, adapter_name: str) -> bool:
        """Whether logits or terms of an adapter are trained; those of a published mask are final."""
        if self.configs[adapter_name].mask_format != "logits":
            return False
        return any(value.requires_grad for value in self._tensors_of(adapter_name).values())

    def _tensors_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The trainable tensors of an adapter, and those that its relaxation keeps beside them, by container name."""
        found = {
            container: getattr(self, container)[adapter_name]()
            for container in self.adapter_layer_names
            if adapter_name in getattr(self, container)
        }
        buffers = {container: getattr(self, container) for container in RELAXATION_BUFFERS}
        return found | {container: held[adapter_name] for container, held in buffers.items() if adapter_name in held}

    # --- trust ------------------------------------------------------------------------------------------------------
    def verify(self, adapter_name: str) -> None:
        """Check once, before the first use of loaded tensors, that they are whole and made for this base weight.

        Raises:
            FormatError: if codes are missing, damaged or impossible.
            ConfigError: if logits were never initialised.
            BaseModelMismatchError: if the base weight is another one.
        """
        if torch.compiler.is_compiling():
            if adapter_name not in self.verified:
                self._verify_uncompiled(adapter_name)
            return
        tensors = [self.nmsparse_base[adapter_name]]
        if adapter_name in self.nmsparse_packed:
            tensors += [self.nmsparse_packed[adapter_name], self.nmsparse_digest[adapter_name]]
        # Held with their versions: a tensor that was replaced or written to is checked again.
        mark = [(tensor, -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
        seen = self.verified.get(adapter_name, [])
        if len(seen) == len(mark) and all(a is b and m == n for (a, m), (b, n) in zip(seen, mark, strict=True)):
            return
        if adapter_name in self.nmsparse_packed:
            self._verify_codes(adapter_name)
        elif not self._has_mask(adapter_name):
            prior = self.configs[adapter_name].prior
            raise ConfigError(
                f"{self.module_name}: adapter {adapter_name!r} has no mask yet (its prior is {prior!r}); call "
                f"nms.set_prior(model, {prior or 'polish'!r}, calibration=...) or load a checkpoint that holds this layer"
            )
        self._verify_base(adapter_name)
        self.verified[adapter_name] = mark

    def _has_mask(self, adapter_name: str) -> bool:
        """Whether what the mask is computed from was ever written: the codes beside a trained weight, else logits or weight."""
        tensors = self._tensors_of(adapter_name)
        container = self.relaxations[adapter_name].container
        return bool(tensors.get("nmsparse_current_codes", tensors[container]).any())

    @torch.compiler.disable(
        reason="a mask is checked once before its first use; call the model once before fullgraph=True"
    )
    def _verify_uncompiled(self, adapter_name: str) -> None:
        self.verify(adapter_name)

    def check_usable(self, adapter_name: str) -> None:
        """`verify`, and that every logit and term is finite: the largest of NaNs would be an arbitrary but valid mask.

        Raises:
            ConfigError: with PEFT's own words, on NaN or infinity.
        """
        self.verify(adapter_name)
        for container, value in self._tensors_of(adapter_name).items():
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
                    f"{self.module_name}: {int((~value.isfinite()).sum())} values of {container} are not finite. Go back "
                    "to an earlier checkpoint, and lower the learning rate"
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
        pristine = self._pristine()
        found = None if self.quantization_backend is not None else fingerprint(pristine)
        if (
            self.mismatch_allowed.get(adapter_name)
            or found is None
            or not bool(stored.any())
            or torch.equal(found, stored)
        ):
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

    def _pristine(self) -> torch.Tensor:
        """The base weight as it was before any merge, `[out, in]`."""
        if self._before_merge is None:
            return self.base_weight.read()
        if self.quantization_backend is None:
            return self._before_merge
        merged = self.base_weight.quantised_state()
        self.base_weight.set_quantised_state(self._before_merge)
        try:
            return self.base_weight.read()
        finally:
            self.base_weight.set_quantised_state(merged)
