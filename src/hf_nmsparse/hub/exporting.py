# SPDX-License-Identifier: Apache-2.0
"""Masked and packed models in the formats of others: dense with zeros, MaskLLM's .npz, compressed-tensors' bitmask.

Whatever is written is read back and compared before it counts as written.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .. import ops, packed
from ..adapter import BaseWeight, NMSparseLayer, mask_layers
from ..errors import ConfigError, FormatError, UnsupportedError
from ..files import staged_folder, write_file
from ..packed import SparseLinear24
from ..packed.layers import linear_layers, unpackable_layers
from ..packed.quantizer import PackedQuantizer, packed_layers
from ..pattern import NMPattern
from ..results import RunResults
from .bitmask import BITMASK, bitmask_config, load_bitmask, pack_bitmask
from .card import write_card
from .deploy import base_layers_in_place, refuse_stacked, unload_masked
from .importing import load_plain, maskable, parameter_name, stored_shape, zeros_as_mask
from .markdown import fenced, prose
from .npz_masks import NPZ_FILE, read_npz, write_npz
from .semi_structured import dense_of, from_semi_structured

logger = logging.getLogger(__name__)

FORMATS = ("dense", "npz", "bitmask")
_PATTERN = NMPattern(2, 4)
_SHARD = "2GB"
_FILLED_SHARE = 0.25  # of the groups; with more zeros among kept values they are no accident


@dataclass(frozen=True)
class WeightMask:
    """The mask of one weight.

    Args:
        layer (`str`): name of the layer.
        shape (`tuple[int, ...]`): in which a plain model holds the weight.
        is_linear (`bool`): whether it is that of a `torch.nn.Linear`.
        mask (`Callable`): computes the bool mask of that shape.
    """

    layer: str
    shape: tuple[int, ...]
    is_linear: bool
    mask: Callable[[], torch.Tensor]


@dataclass
class Export:
    """A model that was checked for a format, and can be written in it.

    Args:
        model (`nn.Module`): the model. Writing it dense or as bitmask turns it into the plain one, in place.
        format (`str`): one of `FORMATS`.
        pattern (`str`): of its masks.
        masks (`dict[str, WeightMask]`): by name of the parameter.
        left_dense (`dict[str, str]`): masked layers that the format stores dense with zeros -> why.
        side_branches (`int`): layers with a term beside the mask, which is added to their weights.
        values (`str`, *optional*): "int8" or "int4", where kept weights were rounded to such numbers.
    """

    model: nn.Module
    format: str
    pattern: str
    masks: dict[str, WeightMask]
    left_dense: dict[str, str] = field(default_factory=dict)
    side_branches: int = 0
    values: str | None = None

    @property
    def layers(self) -> list[str]:
        """Layers with a mask."""
        return sorted(stored.layer for stored in self.masks.values())

    def write(self, folder: Path, results: RunResults | None = None) -> None:
        """Write weights or masks, config and README into a folder, and read them back.

        Args:
            folder (`Path`): empty, and put in its place by the caller.
            results (`RunResults`, *optional*): for the README. What no longer holds is taken out of it.

        Raises:
            FormatError: if what was read back is not what was written.
        """
        results = RunResults() if results is None else results
        self._note(results)
        {"dense": self._write_dense, "npz": self._write_npz, "bitmask": self._write_bitmask}[self.format](folder)
        if self.format == "dense":
            write_card(folder, results, "masked")
        else:
            write_file(folder / "README.md", (_npz_readme if self.format == "npz" else _bitmask_readme)(results))

    def _note(self, results: RunResults) -> None:
        results.pattern = results.pattern or self.pattern
        results.sparse_layers = self.layers
        results.packed_ratio, results.reload_bit_equal, results.sizes, results.speed = None, None, {}, []
        if self.side_branches:  # merged, they fill the zeros
            results.dense_layers = sorted({*results.dense_layers, *results.sparse_layers})
            results.sparse_layers = []
        if self.values is not None:
            results.values = results.kept_weights = None
            results.data = {**results.data, "kept weights": f"rounded to {self.values} before, stored as floats here"}

    def _write_dense(self, folder: Path) -> None:
        plain = self._plain()
        plain.save_pretrained(folder, max_shard_size=_SHARD)
        _compare(load_plain(type(plain), folder, str(folder)), plain)

    def _write_npz(self, folder: Path) -> None:
        path = folder / NPZ_FILE
        write_npz(path, ((key, stored.mask()) for key, stored in self.masks.items()))
        found = 0
        for key, mask in read_npz(path, {key: stored.shape for key, stored in self.masks.items()}):
            found += torch.equal(mask, self.masks[key].mask().cpu())
        if found != len(self.masks):
            raise FormatError(f"{path}: {len(self.masks) - found} masks read back differ; the disk may be damaged")

    def _write_bitmask(self, folder: Path) -> None:
        bits = {
            key: ops.pack_bits(_completed(stored.mask()))
            for key, stored in self.masks.items()
            if stored.layer not in self.left_dense
        }
        plain = self._plain()
        state = plain.state_dict()
        zeros = sum(int((parameter == 0).sum()) for parameter in plain.parameters())
        weights = sum(parameter.numel() for parameter in plain.parameters())
        for key, packed_bits in bits.items():
            weight, layer = state.pop(key), key.removesuffix(".weight")
            parts = pack_bitmask(weight, ops.unpack_bits(packed_bits, weight.shape[1]))
            state |= {f"{layer}.{leaf}": tensor for leaf, tensor in parts.items()}
        plain.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
        whole = [name for name in linear_layers(plain) if f"{name}.weight" not in bits]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = bitmask_config(sorted(whole), zeros / weights)
        write_file(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        _compare(load_bitmask(folder, model_class=type(plain)), plain)

    def _plain(self) -> PreTrainedModel:
        """The model without adapters and packed layers, its weights dense with zeros."""
        layers = _in_use(self.model)
        if layers:
            if self.side_branches:
                logger.warning("%d layers had a term beside the mask: their weights are dense now", self.side_branches)
            return unload_masked(self.model, layers, with_side_branch=True)
        return packed.decompress(from_semi_structured(self.model))


def export(
    model: nn.Module,
    folder: str | os.PathLike,
    format: str = "dense",
    *,
    pattern: str | NMPattern | None = None,
    results: RunResults | None = None,
) -> Export:
    """Write a model with masks, a packed or a masked one in a format of others, whole or not at all.

    Args:
        model (`nn.Module`): as `nms.compress` takes it, or packed. Unless only its masks are written (npz) it is turned into
            the plain model, in place.
        folder (`str` or `Path`): other files in it stay.
        format (`str`): "dense": plain weights with zeros, which load anywhere; a term beside the mask (SLoRB, low rank) is added
            to them. "npz": the masks as MaskLLM has them. "bitmask": a `sparse-24-bitmask` checkpoint for compressed-tensors up
            to 0.14; quantised values are written as the floats that they stand for.
        pattern (`str`, *optional*): n:m that the masks follow; by default that of the adapter, else 2:4.
        results (`RunResults`, *optional*): what is known, for the README.

    Returns:
        what was written.

    Raises:
        ConfigError: for another format.
        UnsupportedError: if there is no mask, or the format cannot hold what the model computes.
        FormatError: if a layer follows the pattern only in part, or what was read back differs.
    """
    prepared = prepare_export(model, format, pattern)
    with staged_folder(folder) as staging:
        prepared.write(staging, copy.deepcopy(results))
    return prepared


def prepare_export(model: nn.Module, format: str, pattern: str | NMPattern | None = None) -> Export:
    """Every check of `export`, with nothing changed or written."""
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: choose one of {', '.join(FORMATS)}")
    refuse_stacked(model)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if format != "npz" and not isinstance(plain, PreTrainedModel):
        raise UnsupportedError(f"{format} is a checkpoint of Transformers, and this is a {type(plain).__name__}")
    quantizer = getattr(model, "hf_quantizer", None)
    if format != "npz" and quantizer is not None and not isinstance(quantizer, PackedQuantizer):
        raise UnsupportedError(
            f"the base is quantised with {quantizer.quantization_config.quant_method}; load it unquantised, with the mask on it"
        )
    layers, asked = _in_use(model), None if pattern is None else NMPattern(pattern)
    if mask_layers(model) and not layers:
        raise ConfigError("no mask adapter is active; choose one with model.set_adapter(name)")
    pattern = asked or NMPattern("2:4")
    for layer in list(layers.values())[:1]:
        pattern = layer.relaxations[layer.adapters_in_use()[0]].pattern
        if asked not in (None, pattern):
            raise ConfigError(f"pattern={str(asked)!r}, and the mask on the model is {pattern}; leave it out")
    packed_ones = dict(packed_layers(model))
    branches = sum(layer.side_branch(layer.adapters_in_use()) is not None for layer in layers.values())
    branches += sum(layer.branch is not None for layer in packed_ones.values())
    _refuse_what_is_lost(format, branches, layers)
    masks = _masks(model, layers, packed_ones, pattern)
    if not masks:
        raise UnsupportedError(
            f"no layer of the model has a mask, or the zeros of {pattern}; prune it first (nms.prune)"
        )
    values = {layer.values for layer in packed_ones.values()} - {"dense"}
    prepared = Export(model, format, str(pattern), masks, {}, branches, next(iter(values), None))
    if format == "bitmask":
        prepared.left_dense = _not_for_bitmask(model, layers, masks)
        if len(prepared.left_dense) == len(masks):
            raise UnsupportedError(
                f"no layer can be stored as {BITMASK} ({next(iter(prepared.left_dense.items()))}); use format='dense'"
            )
    return prepared


def _refuse_what_is_lost(format: str, branches: int, layers: Mapping[str, NMSparseLayer]) -> None:
    if format == "dense":
        return
    if branches:
        raise UnsupportedError(
            f"{branches} layers compute a term beside the mask (SLoRB, low rank), which {format} cannot hold: what it held "
            "would be another model. Use format='dense' (--format dense), which adds the term to the weights, or keep the "
            "model packed (nms.compress)"
        )
    if format == "bitmask":
        return
    configs = [layer.configs[name] for layer in layers.values() for name in layer.adapters_in_use()]
    if any(config.delta_rank or config.trains_weight for config in configs):
        raise UnsupportedError(
            "kept weights were trained under the mask, and npz holds masks only; use format='dense' or 'bitmask'"
        )


# --- masks ----------------------------------------------------------------------------------------------------------
def _in_use(model: nn.Module) -> dict[str, NMSparseLayer]:
    return {name: layer for name, layer in mask_layers(model).items() if layer.adapters_in_use()}


def _masks(
    model: nn.Module,
    layers: Mapping[str, NMSparseLayer],
    packed_ones: Mapping[str, SparseLinear24],
    pattern: NMPattern,
) -> dict[str, WeightMask]:
    """Masks by name of the parameter: from codes or ids where there are any, else from zeros."""
    found = {}
    for name, layer in layers.items():
        base = layer.base_weight
        is_linear = isinstance(base.module, nn.Linear)
        mask = partial(_mask_of_adapters, layer)
        found[parameter_name(name, base)] = WeightMask(name, stored_shape(base), is_linear, mask)
    if layers:
        return found
    for name, layer in packed_ones.items():
        _check_packed(name, layer, pattern)
        shape = (layer.out_features, layer.in_features)
        shape = shape[::-1] if layer.conv1d else shape
        found[f"{name}.weight"] = WeightMask(name, shape, not layer.conv1d, partial(_mask_of_packed, layer, pattern))
    for name, base in maskable(model).items():
        if zeros_as_mask(name, dense_of(base.read().detach()), pattern) is not None:
            is_linear = isinstance(base.module, nn.Linear)
            mask = partial(_mask_of_zeros, base)
            found[parameter_name(name, base)] = WeightMask(name, stored_shape(base), is_linear, mask)
    return found


def _check_packed(name: str, layer: SparseLinear24, pattern: NMPattern) -> None:
    weight = layer.sparse_weight().detach()
    counts = ops.count_groups(weight != 0, pattern)
    if counts.over:
        raise FormatError(
            f"{name} keeps more than {pattern.n} of {pattern.m} in {counts.over} of {counts.groups} groups; it has another pattern "
            "(--pattern)"
        )
    if pattern == _PATTERN and layer.values == "dense" and counts.under > _FILLED_SHARE * counts.groups:
        raise FormatError(
            f"{name}: in {counts.under} of {counts.groups} groups a value that is kept is 0, so its mask was filled up to 2:4 from "
            "another pattern; name that one (--pattern 1:4)"
        )


def _mask_of_adapters(layer: NMSparseLayer) -> torch.Tensor:
    masks = [layer.hard_mask(name) for name in layer.adapters_in_use()]
    return layer.base_weight.restore(torch.stack(masks).all(0))


def _mask_of_packed(layer: SparseLinear24, pattern: NMPattern) -> torch.Tensor:
    """By its ids; of a pattern that packing filled up to 2:4, what is not zero."""
    ids = layer.weight_idx.detach()
    kept = ids.new_ones(ids.shape[0], 4 * ids.shape[1])
    mask = (ops.unpack_24(kept, ids) if pattern == _PATTERN else layer.sparse_weight().detach()) != 0
    return mask.t() if layer.conv1d else mask


def _mask_of_zeros(base: BaseWeight) -> torch.Tensor:
    """Not filled up where groups keep fewer than n: on the base, the weights that came back would make it another model."""
    return base.restore(dense_of(base.read().detach()) != 0)


def _completed(mask: torch.Tensor) -> torch.Tensor:
    return ops.complete_mask(mask, _PATTERN)[0]


def _not_for_bitmask(
    model: nn.Module, layers: Mapping[str, NMSparseLayer], masks: Mapping[str, WeightMask]
) -> dict[str, str]:
    """Layers under a mask that are stored dense with zeros -> why."""
    linear = {stored.layer for stored in masks.values() if stored.is_linear}
    with base_layers_in_place(model, {name: layer for name, layer in layers.items() if name in linear}) as plain:
        unpackable = unpackable_layers(plain)
    reasons = {}
    for stored in masks.values():
        if stored.layer not in linear:
            reasons[stored.layer] = "it is no torch.nn.Linear"
        elif stored.layer in unpackable:
            reasons[stored.layer] = unpackable[stored.layer]
        elif not ops.count_groups(stored.mask(), _PATTERN).follows:
            reasons[stored.layer] = f"it keeps more than {_PATTERN}"
    return reasons


# --- what is written ------------------------------------------------------------------------------------------------
def _compare(found: nn.Module, written: nn.Module) -> None:
    """Refuse a model that was read back with other weights."""
    one, other = found.state_dict(), written.state_dict()
    same = [name for name in one if name in other and torch.equal(one[name], other[name].to(one[name]))]
    different = {*one, *other}.difference(same)
    if different:
        raise FormatError(
            f"{len(different)} weights read back differ from those that were written, first {min(different)}; nothing was put "
            "in place"
        )


def _npz_readme(results: RunResults) -> str:
    changed = results.kept_weights in ("update", "refit")
    base = json.dumps(str(results.base_model or "<the base model>"))
    return _readme(
        results,
        "Mask",
        f"`{NPZ_FILE}` says which weights of the base model are kept. It holds an array for each masked weight, called by the name "
        "of its parameter and `.mask`: the bits of the mask in the order of the stored weight, eight a byte, highest bit first "
        "(`numpy.packbits`). This is the form in which MaskLLM (arXiv 2409.17481) publishes masks."
        + (" The new values that pruning gave to kept weights are not in it." if changed else ""),
        fenced(
            "import numpy as np, torch\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({base})\n"
            "with torch.no_grad():\n"
            f'    for key, bits in np.load("{NPZ_FILE}").items():\n'
            '        weight = model.get_parameter(key.removesuffix(".mask"))\n'
            "        mask = np.unpackbits(bits)[: weight.numel()].reshape(weight.shape)\n"
            "        weight *= torch.from_numpy(mask)",
            "python",
        ),
    )


def _bitmask_readme(results: RunResults) -> str:
    return _readme(
        results,
        "2:4 model",
        f"The weights of its pruned layers are stored as `{BITMASK}` of compressed-tensors, which versions up to 0.14 read and "
        "write. **Later versions, and Transformers 5, load it with random weights and no error.** With those, load it like this "
        "(`pip install hf-nmsparse`):",
        fenced('import hf_nmsparse as nms\n\nmodel = nms.load_bitmask("<this repository>")', "python"),
    )


def _readme(results: RunResults, what: str, text: str, code: str) -> str:
    base = prose(results.base_model) if results.base_model else "its base model"
    facts = {"Pattern": results.pattern, "Method": results.method, **results.data}
    listed = [f"- {name[:1].upper()}{name[1:]}: {prose(value)}" for name, value in facts.items() if value]
    return "\n".join([f"# {what} of {base}", "", text, "", code, "", *listed]) + "\n"
