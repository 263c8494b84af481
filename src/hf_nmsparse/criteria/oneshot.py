# SPDX-License-Identifier: Apache-2.0
"""`prune`: a criterion, a pattern and calibration data, and the model has zeros."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..pattern import Pattern
from .base import Criterion
from .engine import Inputs, WalkOptions, Weights, walk
from .report import PruneReport
from .targets import find_weights


def prune(
    model: nn.Module,
    criterion: str | Criterion | type[Criterion] = "magnitude",
    pattern: str | Pattern = "2:4",
    calibration: Any = None,
    tokenizer: Any = None,
    dense_layers: Iterable[str] = (),
    layers: str | None = None,
    weights: Weights = "update",
    inputs: Inputs = "pruned",
    permute_channels: bool = False,
    checkpoint_folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> PruneReport:
    """Prune the weights of all blocks in one shot, in place. Pruned weights become +0.

    These are linear layers, `Conv1D` and each expert of fused ones, see `find_weights`; groups run along the inputs.
    A model whose weights accelerate keeps on disk or in CPU memory (`from_pretrained(..., device_map=...)`) is pruned too:
    the weights of one block are loaded at a time, and what was chosen is put on whenever weights are loaded or saved.

    Args:
        model (`nn.Module`): a Transformers model: decoder, encoder (BERT, ViT) or both (T5).
        criterion (`str` or `Criterion`): `"magnitude"` needs no calibration, the others do.
        pattern (`str` or `NMPattern` or `Unstructured`): n kept of m as `"2:4"`, or the share of weights that is pruned as
            `"60%"`, which magnitude, wanda, ria, sparsegpt and sparsellm take.
        calibration: integers `[samples, sequence]`, model inputs or an iterable of them (dicts, as with `pixel_values`), or
            texts (then give `tokenizer`). An encoder-decoder model that gets `input_ids` only decodes the same tokens.
        tokenizer (*optional*): for texts.
        dense_layers (`Iterable[str]`): names of layers to leave dense, see `find_weights`.
        layers (`str`, *optional*): prune these blocks only, as `"first:last"` with `last` left out, in numbers or percent of
            the blocks: `"0:50%"` is the first half.
        weights (`str`): `"update"`: kept weights get the new values that the criterion has for them (sparsegpt, sparsellm;
            the others have none); `"keep"`: they stay, bit for bit; `"refit"`: after the mask is chosen they are fitted to
            the dense layer's outputs in closed form, see `refit_weights`.
        inputs (`str`): what enters a block during calibration: outputs of the `"pruned"` blocks before it, or of the
            `"dense"` ones. The latter takes one run of each block instead of two, and pruned models are worse.
        permute_channels (`bool`): first bring channels into an order in which fewer important weights share a group, where
            the model absorbs that exactly; the dense weights change with it, see `Reordering`. n:m only.
        checkpoint_folder (`str` or `Path`, *optional*): finished blocks are kept there. The same call again goes on after
            them. Remove it when you are done; while a model is offloaded and its kept weights changed, it is still read.
        progress (`bool`): show a progress bar where there is a terminal.

    Returns:
        `PruneReport`.

    Raises:
        ConfigError: on an unknown criterion or option, an entry of `dense_layers` that matches nothing, missing calibration,
            a pattern that the criterion does not take, or a `checkpoint_folder` of another run.
        UnsupportedError: naming layers that are packed, quantised or wrapped, or a model without blocks.
    """
    options = WalkOptions(weights, inputs, permute_channels, checkpoint_folder, progress)
    targets = list(find_weights(model, dense_layers, layers).values())
    return walk(model, targets, criterion, pattern, calibration, tokenizer, options)
