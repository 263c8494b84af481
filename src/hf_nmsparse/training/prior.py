# SPDX-License-Identifier: Apache-2.0
"""Starting logits from a mask: a criterion's, a given one, or a published one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .. import ops
from ..adapter import NMSparseConfig, NMSparseLayer, mask_layers, refuse_sharded
from ..criteria import (
    BlockInputs,
    Choice,
    Criterion,
    InputStatistics,
    PruneReport,
    Target,
    WalkOptions,
    confident_criteria,
    expert_view,
    get_criterion,
    known_criteria,
    walk,
)
from ..errors import ConfigError, UnsupportedError
from ..hub.mask_file import read_mask
from ..hub.masks import active_mask, check_fit
from ..pattern import NMPattern
from ..relaxations import get_relaxation, strength_factors

logger = logging.getLogger(__name__)


def set_prior(
    model: nn.Module,
    prior: str | os.PathLike | Criterion | type[Criterion] | Mapping[str, torch.Tensor],
    calibration: Any = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    progress: bool = True,
    revision: str | None = None,
    task: str | None = None,
) -> PruneReport | None:
    """Initialise the logits of a mask adapter from a mask. Logits learned so far are overwritten.

    All masks are computed and checked before the first logit changes. With `NMSparseConfig(prior_confidence=True)` the
    criterion's confidence sets the strength of each group.

    Args:
        model (`PeftModel` or a model with a mask adapter): the model.
        prior: name of a criterion ("magnitude", "wanda", "polish", ...) or a `Criterion`; or masks by layer name,
            `[out, in]`, non-zero = kept, exactly n of m; or folder or Hub repo of a published mask of the same pattern.
        calibration, tokenizer: for a criterion, as in `nms.prune`.
        adapter_name (`str`, *optional*): which adapter; the active one by default.
        progress (`bool`): show a progress bar where there is a terminal.
        revision, task (`str`, *optional*): of a published mask, as in `nms.load_mask`.

    Returns:
        the criterion's `PruneReport`, or `None` for a given mask.

    Raises:
        ConfigError: if the adapter is a published mask, or layers and masks do not match; or `prior_confidence` is set and
            the prior is not a criterion that tells how sure it is.
    """
    adapter_name = adapter_name or active_mask(model)
    layers = mask_layers(model, adapter_name)
    if any(layer.merged for layer in layers.values()):
        raise ConfigError(
            "the mask is merged into the weights, which are pruned now; unmerge it first (model.unmerge_adapter())"
        )
    if not layers:
        raise ConfigError(f"the model has no mask adapter {adapter_name!r}")
    for name, layer in layers.items():
        refuse_sharded(layer, name, "setting a prior")
    config = next(iter(layers.values())).configs[adapter_name]
    if config.mask_format != "logits":
        raise ConfigError(f"adapter {adapter_name!r} is a published mask (codes); it has no logits to initialise")
    if config.prior_confidence:
        _check_confident(prior)
    _check_renewable(prior, config)
    pattern = NMPattern(config.pattern)
    report, factors, norms = None, {}, {}
    if isinstance(prior, Mapping):
        packed, label = _given_codes(prior, layers, pattern), "given masks"
    elif _is_criterion(prior):
        criterion = get_criterion(prior)
        asked = _asked(criterion, config)
        packed, report = _criterion_codes(model, layers, asked, pattern, calibration, tokenizer, progress)
        if isinstance(asked, _Confident):
            factors = asked.of_layers(layers)
        if isinstance(asked, _WithInputNorms):
            norms = asked.norms
        label = criterion.name
    else:
        packed, label = _published_codes(prior, revision, task, layers, pattern), str(prior)
    for name, layer in layers.items():
        codes = ops.unpack_codes(packed[name], pattern, layer.in_features, name).to(layer.base_weight.stored.device)
        layer.set_prior_codes(adapter_name, codes, factors.get(name))
        if adapter_name in layer.nmsparse_input_factors:
            layer.nmsparse_input_factors[adapter_name].copy_(norms.get(name, torch.ones(layer.in_features)))
    for layer in layers.values():  # one config object serves all layers, and another may serve the PeftModel
        layer.configs[adapter_name].prior = label
    if adapter_name in getattr(model, "peft_config", {}):
        model.peft_config[adapter_name].prior = label
    return report


def _is_criterion(prior: object) -> bool:
    """A `Criterion`, or text that is no folder and cannot be a repo: `get_criterion` then names the known ones."""
    if isinstance(prior, Criterion) or (isinstance(prior, type) and issubclass(prior, Criterion)):
        return True
    return isinstance(prior, str) and (prior in known_criteria() or ("/" not in prior and not os.path.exists(prior)))


def _check_confident(prior: object) -> None:
    """Refuse, before anything is computed, a prior of which nobody says how sure it is."""
    criterion = get_criterion(prior) if not isinstance(prior, Mapping) and _is_criterion(prior) else None
    if criterion is None or not criterion.has_confidence:
        what = "a given or published mask" if criterion is None else f"criterion {criterion.name!r}"
        raise ConfigError(
            f"prior_confidence=True scales the prior by how sure its criterion is of each group, and {what} does not tell; take "
            f"one of {', '.join(confident_criteria())}, or leave prior_confidence out"
        )


def _check_renewable(prior: object, config: NMSparseConfig) -> None:
    """Refuse a prior that would not be taken, or be replaced by another kind of mask at the first renewal."""
    if not get_relaxation(config.relaxation).takes_prior:
        raise ConfigError(
            f"relaxation {config.relaxation!r} takes its mask from the magnitudes of the weights and has no prior; to train "
            'under a given mask use relaxation="ast" with mask_interval=None'
        )
    if config.relaxation != "ast" or config.mask_interval is None:
        return
    name = get_criterion(prior).name if not isinstance(prior, Mapping) and _is_criterion(prior) else None
    if name not in ("magnitude", "wanda"):
        raise ConfigError(
            f'relaxation "ast" renews its mask every {config.mask_interval} steps by magnitude or by wanda, which would replace '
            f"this prior ({name or 'a given mask'}) at once; pass mask_interval=None to train under it"
        )


def _asked(criterion: Criterion, config: NMSparseConfig) -> Criterion:
    """The criterion, or what walks as it and notes more."""
    if config.prior_confidence:
        return _Confident(criterion)
    return _WithInputNorms(criterion) if config.relaxation == "ast" and criterion.name == "wanda" else criterion


class _Wrapped(Criterion):
    """Walks as another criterion, and notes something of each weight on the way."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion, self.name, self.needs = criterion, criterion.name, criterion.needs

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        return self.criterion.mask(weight, statistics, pattern)

    def stages(self, names: list[str], block: nn.Module) -> list[list[str]]:
        return self.criterion.stages(names, block)

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        for name, choice in self.criterion.choose_block(inputs):
            self.note(name, choice, inputs)
            yield name, choice

    def note(self, name: str, choice: Choice, inputs: BlockInputs) -> None:
        """Called for each weight with what was chosen."""
        raise NotImplementedError


class _WithInputNorms(_Wrapped):
    """Notes the norms of each layer's inputs, by which wanda multiplies magnitudes: float32 `[in]`."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__(criterion)
        self.norms: dict[str, torch.Tensor] = {}

    def note(self, name: str, choice: Choice, inputs: BlockInputs) -> None:
        self.norms[name] = inputs.statistics[name].squared_norm.sqrt()


class _Confident(_Wrapped):
    """Notes how firmly each group should start: float16 `[out, groups]`."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__(criterion)
        self._factors: dict[str, torch.Tensor] = {}

    def note(self, name: str, choice: Choice, inputs: BlockInputs) -> None:
        confidence = self.criterion.confidence(
            inputs.weights[name], choice.mask, inputs.statistics[name], inputs.pattern
        )
        self._factors[name] = strength_factors(confidence).half()

    def of_layers(self, layers: Mapping[str, NMSparseLayer]) -> dict[str, torch.Tensor]:
        """The factors by layer; those of experts one after the other."""
        targets = {name: targets_of(name, layer, lambda choice: None) for name, layer in layers.items()}
        return {name: torch.cat([self._factors[target.name] for target in of]) for name, of in targets.items()}


# Packed codes of all layers are a small part of what their masks would take.
def _packed(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    return ops.pack_codes(ops.mask_to_codes(mask, pattern), pattern, mask.shape[1])


def _given_codes(
    given: Mapping[str, torch.Tensor], layers: dict[str, NMSparseLayer], pattern: NMPattern
) -> dict[str, torch.Tensor]:
    if missing := sorted(set(layers) - set(given)):
        raise ConfigError(f"no mask given for {len(missing)} layers, first {missing[:5]}")
    if surplus := sorted(set(given) - set(layers)):
        raise ConfigError(
            f"masks given for {len(surplus)} layers that the adapter does not prune, first {surplus[:5]}"
        )
    for name, layer in layers.items():
        expected = (layer.out_features, layer.in_features)
        if tuple(given[name].shape) != expected:
            raise ConfigError(f"{name}: the mask has shape {list(given[name].shape)}, expected {list(expected)}")
    return {name: _packed(given[name], pattern) for name in layers}


def _published_codes(
    source: str | os.PathLike,
    revision: str | None,
    task: str | None,
    layers: dict[str, NMSparseLayer],
    pattern: NMPattern,
) -> dict[str, torch.Tensor]:
    mask = read_mask(source, revision, task)
    if mask.pattern != pattern:
        raise ConfigError(f"{source} is a {mask.pattern} mask, the adapter's pattern is {pattern}")
    if missing := sorted(set(layers) - set(mask.layers)):
        raise ConfigError(f"{source} has no mask for {len(missing)} layers of the adapter, first {missing[:5]}")
    if terms := sorted({container for stored in mask.layers.values() for container in stored.terms}):
        logger.warning("only the mask of %s becomes the prior; its %s are left", source, ", ".join(terms))
    # The mask may prune more layers than the adapter.
    used = replace(mask, layers={name: mask.layers[name] for name in layers})
    check_fit(used, {name: layer.base_weight for name, layer in layers.items()})
    return {name: mask.layers[name].packed for name in layers}


def _criterion_codes(
    model: nn.Module,
    layers: dict[str, NMSparseLayer],
    criterion: Criterion,
    pattern: NMPattern,
    calibration: Any,
    tokenizer: Any,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], PruneReport]:
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    targets = [
        target
        for name, layer in layers.items()
        for target in targets_of(
            name, layer, lambda choice, parts=parts[name]: parts.append(_packed(choice.mask, pattern))
        )
    ]
    report = walk_dense(model, layers, targets, criterion, str(pattern), calibration, tokenizer, progress)
    return {name: torch.cat(rows) for name, rows in parts.items()}, report


def targets_of(name: str, layer: NMSparseLayer, install: Callable[[Choice], None]) -> list[Target]:
    """What the engine prunes for one mask layer: its weight, or those of each of its experts, in their order.

    Raises:
        UnsupportedError: for a parameter of unknown layout.
    """
    base = layer.base_weight
    if base.is_convolution:
        raise UnsupportedError(
            f'{name} is a convolution, whose mask starts by magnitude (prior="magnitude" in the config) or is given: '
            "nms.set_prior(model, masks)"
        )
    if base.backend is not None:
        return [Target(name, base.module, install, computed=base.read)]
    if base.parameter_name == "weight":
        return [Target(name, base.module, install, view=torch.t if base.transposed else torch.Tensor.detach)]
    if not base.is_fused_experts:
        raise UnsupportedError(
            f"{name} is no weight of a linear layer nor of fused experts; give its mask yourself: nms.set_prior(model, masks)"
        )
    return [
        Target(
            f"{name}.{number}",
            base.module,
            install,
            base.parameter_name,
            functools.partial(expert_view, base.module, number),
            expert=number,
        )
        for number in range(base.num_experts)
    ]


def walk_dense(
    model: nn.Module,
    layers: Mapping[str, NMSparseLayer],
    targets: list[Target],
    criterion: Criterion,
    pattern: str,
    calibration: Any,
    tokenizer: Any,
    progress: bool,
) -> PruneReport:
    """`criteria.walk` over the base model: for its time the adapter's layers compute with their dense weights."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.masks_off())
        return walk(plain, targets, criterion, pattern, calibration, tokenizer, WalkOptions(progress=progress))
