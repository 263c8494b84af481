# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: a frozen weight seen through learnable or published masks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .. import ops
from ..errors import ScheduleError, UnsupportedError
from ..ops.shared_sample import SharedSample
from ..relaxations import Moment, sampling_state
from .sharding import refuse_sharded, whole_tensors
from .state import MaskState
from .terms import side_branch, with_delta


class NMSparseLayer(MaskState):
    """Arithmetic of the masks on one weight, and its merging. Several active masks act as their intersection.

    W~ = (W + sum of deltas) * M1 * M2 ...          y = x W~^T + side branches(x) + bias
    """

    # --- arithmetic -------------------------------------------------------------------------------------------------
    def mask_codes(self, adapter_name: str) -> torch.Tensor:
        """The hard mask of an adapter as codes, int64 `[out, groups]`, after `check_usable`. Where weights are sharded all
        processes have to ask."""
        with whole_tensors(self), torch.no_grad():
            self.check_usable(adapter_name)
            if adapter_name in self.nmsparse_packed:
                return self._verified_codes(adapter_name)
            return self.relaxations[adapter_name].codes(self._tensors_of(adapter_name), self.in_features)

    def _verified_codes(self, adapter_name: str) -> torch.Tensor:
        """The codes of a published mask after `verify`, which has looked at every value."""
        packed, pattern = self.nmsparse_packed[adapter_name], self.relaxations[adapter_name].pattern
        return ops.unpack_codes(packed, pattern, self.in_features, name=self.module_name, check=False)

    def hard_mask(self, adapter_name: str) -> torch.Tensor:
        """The hard mask of an adapter, bool `[out, in]`."""
        pattern = self.relaxations[adapter_name].pattern
        return ops.codes_to_mask(self.mask_codes(adapter_name), pattern, self.in_features)

    def set_moment(self, adapter_name: str, moment: Moment | None) -> None:
        """Tell an adapter where training stands; `None` forgets it."""
        if moment is not None and self._same_all_step(adapter_name):
            moment = replace(moment, draw=0)
        before = self.moments.get(adapter_name)
        if moment != before:
            self.samples.pop(adapter_name, None)
            self.backward_samples.pop(adapter_name, None)
            if moment is not None and self._may_share_samples(adapter_name):
                self.samples[adapter_name], self.backward_samples[adapter_name] = SharedSample(), SharedSample()
        if moment is not None and self.is_sampling(adapter_name) and (before is None or moment.step != before.step):
            with torch.no_grad():
                config = self.configs[adapter_name]
                self.relaxations[adapter_name].begin_step(self._tensors_of(adapter_name), config, moment)
        if moment is None:
            self.moments.pop(adapter_name, None)
            self.states.pop(adapter_name, None)
        else:
            self.moments[adapter_name] = moment
            # Made here and not in forward: torch.compile would take its numbers for constants.
            device = self.base_weight.stored.device
            self.states[adapter_name] = sampling_state(self.configs[adapter_name], moment, device)

    def _state(self, adapter_name: str, training: bool) -> ops.SamplingState:
        if training and adapter_name not in self.moments:
            raise ScheduleError(
                f"{self.module_name}: adapter {adapter_name!r} is training but does not know the optimizer step, which "
                "its schedule and its noise depend on; add callbacks=[nms.MaskScheduleCallback()] to the Trainer, or in "
                "your own loop call nms.set_mask_step(model, step, max_steps) before each forward pass"
            )
        device = self.base_weight.stored.device
        state = self.states.get(adapter_name)
        if state is None or state.step.device != device:
            state = sampling_state(self.configs[adapter_name], self.moments.get(adapter_name), device)
            self.states[adapter_name] = state
        return state

    def pause(self, adapter_name: str, paused: bool = True) -> None:
        """Let the mask of an adapter wait in training: it computes with its hard mask, and its logits get no gradient.

        Terms beside the mask go on. `requires_grad` stays as it is, for PEFT switches it too. `paused=False`: it learns again.
        """
        if paused == self.paused.get(adapter_name, False):
            return
        self.paused[adapter_name] = paused
        if paused:
            self.forget_samples()

    def is_sampling(self, adapter_name: str) -> bool:
        """Whether the adapter's mask is that of training now (soft and noisy, for most): its logits or weights are trained."""
        # Not torch.is_grad_enabled(): reentrant checkpointing runs its first forward without gradients.
        trained = self.mask_parameter(adapter_name)
        if not self.training or trained is None or self.paused.get(adapter_name, False):
            return False
        return trained.requires_grad

    def mask_parameter(self, adapter_name: str) -> nn.Parameter | None:
        """The trainable tensor that the mask is computed from, logits or weight; `None` of a published mask."""
        container = getattr(self, self.relaxations[adapter_name].container)
        return container[adapter_name].weight if adapter_name in container else None

    @torch.no_grad()
    def add_to_gradients(self, adapter_name: str) -> None:
        """What the relaxation adds to its gradients before the optimizer steps."""
        if adapter_name in self.moments and self.is_sampling(adapter_name):
            config, moment = self.configs[adapter_name], self.moments[adapter_name]
            self.relaxations[adapter_name].add_to_gradients(self._tensors_of(adapter_name), config, moment)

    def _same_all_step(self, adapter_name: str) -> bool:
        """Whether all passes of an optimizer step compute with the same weight."""
        return self.configs[adapter_name].resample == "step" or self.relaxations[adapter_name].trains_weight

    def _may_share_samples(self, adapter_name: str) -> bool:
        """Whether one sample serves all passes of a step; asked between steps."""
        if not self._same_all_step(adapter_name) or self.quantization_backend is not None:
            return False
        # Base weights that are sharded, offloaded or quantised save memory, which samples kept at full size would undo.
        stored = self.base_weight.stored
        whole = type(stored) is nn.Parameter and stored.numel() == self.out_features * self.in_features
        return whole and not stored.is_meta

    def _shared_sample(
        self, adapter_name: str, parameters: dict[str, torch.Tensor], samples: dict[str, SharedSample]
    ) -> SharedSample | None:
        """Where of `samples` to take the sample of the base weight from, or to leave it."""
        if torch.compiler.is_compiling() or adapter_name not in samples:
            return None
        sample, config = samples[adapter_name], self.configs[adapter_name]
        moment = self.moments[adapter_name], config.schedule, config.temperature, config.logit_scale
        tensors = [self.base_weight.stored, *parameters.values()]
        return sample if sample.serves(tensors, moment) else None

    def forget_samples(self) -> None:
        """Free the sampled weights that are kept for further passes of this optimizer step (`resample="step"`)."""
        for sample in (*self.samples.values(), *self.backward_samples.values()):
            sample.forget()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.forget_samples()
        super().enable_adapters(enabled)

    def _masked(
        self, weight: torch.Tensor, adapter_name: str, parameters: dict[str, torch.Tensor], is_base: bool
    ) -> torch.Tensor:
        self.verify(adapter_name)
        if adapter_name in self.nmsparse_packed:
            pattern = self.relaxations[adapter_name].pattern
            mask = ops.codes_to_mask(self._verified_codes(adapter_name), pattern, self.in_features)
            return torch.where(mask, weight, weight.new_zeros(()))
        sampling = self.is_sampling(adapter_name)
        state = self._state(adapter_name, sampling)
        shared = self._shared_sample(adapter_name, parameters, self.samples) if sampling and is_base else None
        if self.paused.get(adapter_name, False):
            parameters = {container: value.detach() for container, value in parameters.items()}
        relaxation = self.relaxations[adapter_name]
        return relaxation.effective_weight(weight, parameters, state, hard=not sampling, shared=shared)

    def effective_weight(self, adapter_names: list[str], weight: torch.Tensor | None = None) -> torch.Tensor:
        """The base weight under deltas and masks, `[out, in]`: soft while masks train, else exactly n:m.

        Args:
            adapter_names (`list[str]`): which adapters.
            weight (`torch.Tensor`, *optional*): taken instead of the base weight.
        """
        base = self.base_weight.read() if weight is None else None
        weight = base if weight is None else weight
        self._check_alone(adapter_names)
        parameters = {name: self._tensors_of(name) for name in adapter_names}
        for name in adapter_names:  # all deltas before the first mask, so that none writes on pruned positions
            weight = with_delta(weight, parameters[name])
        for name in adapter_names:
            weight = self._masked(weight, name, parameters[name], is_base=weight is base)
        return weight

    def backward_weight(self, adapter_names: list[str]) -> torch.Tensor | None:
        """The weight `[out, in]` that the gradient of the input is computed with, if it is not the effective one."""
        if len(adapter_names) != 1 or not self.is_sampling(adapter_names[0]):
            return None
        name = adapter_names[0]
        parameters = self._tensors_of(name)
        shared = self._shared_sample(name, parameters, self.backward_samples)
        with torch.no_grad():
            return self.relaxations[name].backward_weight(self.base_weight.read(), parameters, shared)

    def _check_alone(self, adapter_names: list[str]) -> None:
        trained = [name for name in adapter_names if self.relaxations[name].trains_weight]
        if trained and len(adapter_names) > 1:
            raise UnsupportedError(
                f"{self.module_name}: adapter {trained[0]!r} has weights of its own and cannot be active together with others "
                f"({', '.join(adapter_names)}); choose one with model.set_adapter(name)"
            )

    def side_branch(self, adapter_names: list[str]) -> ops.SideBranch | None:
        """What the adapters add beside the masked weight, if anything."""
        branch = None
        for name in adapter_names:
            if self.configs[name].has_side_branch:
                own = side_branch(self._tensors_of(name), self.configs[name])
                branch = own if branch is None else branch + own
        return branch

    def hard_weight(self, adapter_names: list[str]) -> torch.Tensor:
        """The weight that is left of the unmerged base weight under deltas and hard masks, exactly n:m, `[out, in]`."""
        self._check_alone(adapter_names)
        refuse_sharded(self, self.module_name, "merging or compressing a mask")
        weight = self._pristine()
        for name in adapter_names:
            weight = with_delta(self._own_weight(name, weight), self._tensors_of(name))
        for name in adapter_names:
            weight = torch.where(self.hard_mask(name), weight, weight.new_zeros(()))
        return weight

    def _own_weight(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight that an adapter trained in the place of `weight`, in its dtype; `weight` if it trains none."""
        if not self.relaxations[adapter_name].trains_weight:
            return weight
        return self.nmsparse_weight[adapter_name].weight.detach().to(weight.dtype)

    def adapters_in_use(self) -> list[str]:
        """The merged adapters, else the active ones, of those this layer carries."""
        return [name for name in self.merged_adapters or self.active_adapters if name in self.configs]

    # --- merge ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, with_side_branch: bool = True
    ) -> None:
        """Write the hard masks into the base weight: kept weights stay bit-equal, pruned ones become +0.

        Deltas and side branches are written too; with a side branch the weight is dense afterwards.

        Args:
            safe_merge (`bool`): refuse weights that are not finite; logits that are not are always refused.
            adapter_names (`list[str]`, *optional*): adapters to merge; the active ones by default.
            with_side_branch (`bool`): False leaves the side branch out, for callers that keep it elsewhere.

        Raises:
            ValueError: with PEFT's own message, on NaN or infinity.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not adapter_names:
            return
        merged = self.merged_weight(adapter_names, with_side_branch)
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[0]} seems to be broken")
        self.forget_samples()
        self._write(merged)
        self.merged_adapters.extend(adapter_names)

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str], with_side_branch: bool = True) -> torch.Tensor:
        """The base weight once these adapters are merged too, beside those that are, `[out, in]`."""
        names = list(dict.fromkeys([*self.merged_adapters, *adapter_names]))
        merged = self.hard_weight(names)
        if with_side_branch and (branch := self.side_branch(names)) is not None:
            merged = branch.added_to(merged)
        return merged

    def _write(self, weight: torch.Tensor) -> None:
        """Make `weight` (`[out, in]`) the base weight, and keep what was there before the first merge."""
        base = self.base_weight
        if self.quantization_backend is not None:
            if self._before_merge is None:
                self._before_merge = base.quantised_state()  # quantising again would not give the same bytes
            self.set_base_weight(weight)
            return
        if self._before_merge is None:
            self._before_merge = base.read().detach()
        base.stored.data = base.restore(weight).contiguous()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # PEFT unmerges all adapters of a layer at once, so the weight before the first merge is the right one.
        base = self.base_weight
        if self.quantization_backend is not None:
            base.set_quantised_state(self._before_merge)
        else:
            # The model may have been moved or cast meanwhile.
            base.stored.data = base.restore(self._before_merge).contiguous().to(base.stored)
        self._before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A mask is no low-rank update."""
        return False
