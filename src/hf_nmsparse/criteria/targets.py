# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model can get a mask: linear layers, Conv1D and fused experts inside its stacks of blocks."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, UnsupportedError
from .base import Choice
from .offload import is_offloaded

logger = logging.getLogger(__name__)


def _as_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


@dataclass
class Target:
    """One weight to get a mask: of a layer, or of one expert of a module that holds many.

    Args:
        name (`str`): full name, for reports and errors: of the module, for an expert of the parameter and its number
            (`"model.layers.0.mlp.experts.down_proj.3"`).
        module (`nn.Module`): computes `x W^T` (plus what does not depend on the mask) with the dense weight. Its first
            forward argument is `x`, `[..., in]`; for an expert it is the module that holds all of them.
        apply (`Callable[[Choice], None]`): called once at the end; installs what was chosen.
        parameter (`str`): name of the parameter of `module` that holds the weight.
        view (`Callable[[torch.Tensor], torch.Tensor]`): the parameter -> the weight `[out, in]`, sharing its storage.
        computed (`Callable[[], torch.Tensor]`, *optional*): for a weight that exists only as a computed value (quantised),
            returns it; `parameter` and `view` are not used then. Not for experts.
        expert (`int`, *optional*): number of the expert. The inputs are then observed where the weight is multiplied.
    """

    name: str
    module: nn.Module
    apply: Callable[[Choice], None]
    parameter: str = "weight"
    view: Callable[[torch.Tensor], torch.Tensor] = _as_is
    computed: Callable[[], torch.Tensor] | None = None
    expert: int | None = None

    def dense(self) -> torch.Tensor:
        """The dense weight, `[out, in]`."""
        if self.computed is not None:
            return self.computed().detach()
        return self.view(getattr(self.module, self.parameter).detach())

    @property
    def weight_name(self) -> str:
        """The name under which a mask of this weight is published: of experts that of the parameter that holds all."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    def whole(self) -> torch.Tensor:
        """The dense weight; of an expert those of all, `[experts * out, in]`, as fingerprints see it."""
        if self.expert is None:
            return self.dense()
        parameter = getattr(self.module, self.parameter).detach()
        return (parameter.mT if self.module.is_transposed else parameter).flatten(0, 1)

    @contextmanager
    def computing_with(self, weight: torch.Tensor, dense: torch.Tensor) -> Iterator[None]:
        """For the time of the context the module computes with `weight` instead of the dense one; both `[out, in]`."""
        if self.computed is None:
            saved = dense.clone()
            try:
                dense.copy_(weight)
                yield
            finally:
                dense.copy_(saved)
            return
        removed = dense - weight

        def subtract(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output - F.linear(args[0], removed.to(args[0].dtype))

        handle = self.module.register_forward_hook(subtract)
        try:
            yield
        finally:
            handle.remove()


def find_weights(model: nn.Module, dense_layers: Iterable[str] = (), layers: str | None = None) -> dict[str, Target]:
    """The weights to prune: of every `nn.Linear`, `Conv1D` and expert inside the blocks, in the order of the model.

    What lies outside the blocks (embeddings, `lm_head`, poolers, classifiers), routers, and layers that share their
    weight with another (which logs a line) are left out.

    Args:
        model (`nn.Module`): a Transformers model.
        dense_layers (`Iterable[str]`): names to leave dense: a full name or any run of its parts (`"down_proj"`,
            `"mlp.up_proj"`, `"layers.0"`, `"experts.gate_up_proj"`, `"decoder"`).
        layers (`str`, *optional*): of each stack only these blocks: `"first:last"`, without `last` itself; numbers, or
            percent of the blocks rounded down: `"0:50%"`, `"4:"`, `":12"`.

    Returns:
        `dict[str, Target]`: by name; applying the mask sets the pruned weights to +0 in place.

    Raises:
        ConfigError: if an entry of `dense_layers` matches nothing in the model, `layers` cannot be read, or no weight is
            left.
        UnsupportedError: naming layers that are packed, quantised, or wrapped by PEFT; or without blocks.
    """
    dense_layers = [dense_layers] if isinstance(dense_layers, str) else list(dense_layers)
    stacks = find_stacks(model)
    inside = [pair for prefix, blocks in stacks for pair in without_routers(blocks.named_modules(prefix=prefix))]
    tied = _tied_parameters(model)
    weights = {weight.name: weight for name, module in inside for weight in _weights_of(name, module, tied)}
    names = [*(name for name, _ in model.named_modules()), *weights]
    for entry in dense_layers:
        if not any(name_matches(name, entry) for name in names):
            raise ConfigError(f"dense_layers: {entry!r} matches no module of {type(model).__name__}")

    def is_dense(name: str) -> bool:
        return any(name_matches(name, entry) for entry in dense_layers)

    others = [(name, module) for name, module in inside if not is_dense(name) and not _own_parameters(module)]
    _refuse_foreign(others)
    if unknown := [name for name, module in others if _holds_unknown_experts(module)]:
        kind = type(model.get_submodule(unknown[0])).__name__
        logger.warning(
            "%s (%s, %d such) has 3-D weights of unknown layout; left dense", unknown[0], kind, len(unknown)
        )
    if shared := [name for name, module in inside if any(id(p) in tied for p in _own_parameters(module).values())]:
        logger.warning("%s (%d such) shares its weight with another layer; left dense", shared[0], len(shared))
    found = {name: weight for name, weight in weights.items() if not is_dense(name)}
    if found and layers is not None:
        found = _in_blocks(stacks, found, layers)
    if not found:
        where = ", ".join(repr(prefix) for prefix, _ in stacks)
        raise ConfigError(f"{type(model).__name__}: no weight left to prune inside {where}; check dense_layers")
    return found


def find_stacks(model: nn.Module, holding: Collection[nn.Module] | None = None) -> list[tuple[str, nn.ModuleList]]:
    """Names and lists of blocks, in the order of the model: outermost `nn.ModuleList`s that hold weights.

    Args:
        model (`nn.Module`): the model.
        holding (`Collection[nn.Module]`, *optional*): modules; all lists that hold any of them are returned. By default
            the list that holds most weights, for an encoder-decoder model the two that do; of a model of text and images
            or sound a list of its language model.

    Raises:
        UnsupportedError: if there is none.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inner:
            inner.update(module.modules())
            held = module.modules()
            size = sum(map(_size, held)) if holding is None else sum(child in holding for child in held)
            if size:
                found.append((size, name, module))
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: looked for its blocks, an nn.ModuleList that holds the linear layers, and found none"
        )
    if holding is None:
        text = _text_part(model)
        found = [entry for entry in found if entry[2] in text] or found
        largest = sorted(found, key=lambda entry: -entry[0])[: 2 if is_encoder_decoder(model) else 1]
        found = [entry for entry in found if entry in largest]
    return [(name, blocks) for _, name, blocks in found]


def _text_part(model: nn.Module) -> set[nn.Module]:
    """Modules of the language model, where the config says that it is one part among others."""
    several = getattr(getattr(model, "config", None), "text_config", None) is not None
    decoder = getattr(model, "get_decoder", None) if several else None
    return set((model if decoder is None else decoder()).modules())


def expert_view(module: nn.Module, expert: int, parameter: torch.Tensor) -> torch.Tensor:
    """The weight of one of the fused experts as a matrix.

    Args:
        module (`nn.Module`): an experts module of Transformers, which says by `is_transposed` whether its parameters are
            `[experts, out, in]` or `[experts, in, out]`.
        expert (`int`): its number.
        parameter (`torch.Tensor`): of the module, for example its `gate_up_proj`.

    Returns:
        `[out, in]`, sharing the storage of the parameter.
    """
    return parameter[expert].T if module.is_transposed else parameter[expert]


def name_matches(name: str, entry: str) -> bool:
    """Whether `entry` is the module name `name` or any run of its parts: "down_proj", "mlp.up_proj", "layers.0"."""
    return f".{entry}." in f".{name}."


def without_routers(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules (name and module, parents first) that do not decide where tokens go.

    Routers, with all their parts, are found by name or class, and as a gate with one output (Qwen2-MoE).
    """
    kept, routers = [], []
    for name, module in modules:
        one_gate = name.endswith("gate") and getattr(module, "out_features", None) == 1
        if "router" in f"{name}.{type(module).__name__}".lower() or one_gate:
            routers.append(f"{name}.")
        elif not name.startswith(tuple(routers)):
            kept.append((name, module))
    return kept


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the config of the model says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the module itself that can get masks: `weight` of a layer, 3-D ones of fused experts."""
    if type(module) in (nn.Linear, Conv1D):
        return {"weight": module.weight}
    if isinstance(getattr(module, "is_transposed", None), bool):  # set by transformers' `use_experts_implementation`
        parameters = module.named_parameters(recurse=False)
        return {name: p for name, p in parameters if p.dim() == 3 and p.is_floating_point() and p.itemsize > 1}
    return {}


def _weights_of(name: str, module: nn.Module, tied: set[int]) -> list[Target]:
    own = {key: parameter for key, parameter in _own_parameters(module).items() if id(parameter) not in tied}
    if type(module) in (nn.Linear, Conv1D):
        return [in_place(name, module, key, torch.t if type(module) is Conv1D else _as_is) for key in own]
    return [
        in_place(f"{name}.{key}.{expert}", module, key, partial(expert_view, module, expert), expert)
        for key, parameter in own.items()
        for expert in range(len(parameter))
    ]


def in_place(
    name: str,
    module: nn.Module,
    parameter: str = "weight",
    view: Callable[[torch.Tensor], torch.Tensor] = _as_is,
    expert: int | None = None,
) -> Target:
    """A target whose weight is overwritten by what is chosen; arguments as in `Target`."""

    def apply(choice: Choice) -> None:
        weight = view(getattr(module, parameter).detach())
        weight.copy_(choice.masked(weight))

    return Target(name, module, apply, parameter, view, expert=expert)


def _refuse_foreign(modules: list[tuple[str, nn.Module]]) -> None:
    # Layers of every kind, quantised and wrapped ones too, carry in_features and out_features by convention.
    foreign = [
        (name, type(module).__name__)
        for name, module in modules
        if (hasattr(module, "in_features") and hasattr(module, "out_features")) or hasattr(module, "is_transposed")
    ]
    if foreign:
        name, kind = foreign[0]
        raise UnsupportedError(
            f"{name} is a {kind}, not a plain nn.Linear ({len(foreign)} such layers); merge the adapter, decompress "
            "or dequantise the model first, or name them in dense_layers"
        )


def _holds_unknown_experts(module: nn.Module) -> bool:
    # [1, ...] are tables of positions or tokens.
    return not isinstance(module, nn.Conv1d) and any(
        p.dim() == 3 and len(p) > 1 and p.is_floating_point() for p in module.parameters(recurse=False)
    )


def _size(module: nn.Module) -> int:
    features = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
    return features or sum(parameter.numel() for parameter in _own_parameters(module).values())


def _tied_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def check_targets(targets: list[Target]) -> None:
    """Refuse targets that repeat, and weights that are no float matrices.

    Raises:
        ConfigError: if there is none, or one repeats.
        UnsupportedError: naming a target whose weight cannot be pruned.
    """
    if not targets:
        raise ConfigError("there is no layer to prune")
    counts = Counter(target.name for target in targets)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"targets repeat: {', '.join(sorted(repeated))}")
    for target in targets:
        if target.computed is not None:
            if target.expert is not None:
                raise UnsupportedError(
                    f"{target.name}: the weight of an expert is a view of a parameter, not computed"
                )
            continue  # computed only when its block is reached
        weight = target.dense()
        if weight.dim() != 2 or not weight.is_floating_point() or weight.itemsize < 2:
            raise UnsupportedError(
                f"{target.name}: weight is {weight.dtype} {list(weight.shape)}; expected floats [out, in]"
            )
        if weight.is_meta and not is_offloaded(target.module):
            raise UnsupportedError(f"{target.name}: its weight is on the meta device; load the model with its weights")


def modules_in_range(stacks: list[tuple[str, nn.ModuleList]], blocks: str) -> set[nn.Module]:
    """The modules inside some blocks of each stack.

    Args:
        stacks: as from `find_stacks`.
        blocks (`str`): `"first:last"`, without `last` itself; numbers, or percent of the blocks rounded down.

    Raises:
        ConfigError: if `blocks` cannot be read.
    """
    match = re.fullmatch(r"\s*(?:(\d+)(%?))?\s*:\s*(?:(\d+)(%?))?\s*", blocks)
    if match is None:
        raise ConfigError(f"layers {blocks!r}: expected a range of blocks, for example '0:50%', '4:' or '2:10'")
    inside: set[nn.Module] = set()
    for _, stack in stacks:
        first, last = (
            default if number is None else (int(number) * len(stack) // 100 if percent else int(number))
            for number, percent, default in ((match[1], match[2], 0), (match[3], match[4], len(stack)))
        )
        inside.update(module for block in stack[first:last] for module in block.modules())
    return inside


def _in_blocks(stacks: list[tuple[str, nn.ModuleList]], found: dict[str, Target], blocks: str) -> dict[str, Target]:
    inside = modules_in_range(stacks, blocks)
    left = {name: target for name, target in found.items() if target.module in inside}
    if not left:
        sizes = ", ".join(f"{name!r} has {len(stack)}" for name, stack in stacks)
        raise ConfigError(f"layers {blocks!r} leaves no weight to prune; {sizes} blocks")
    return left
