# SPDX-License-Identifier: Apache-2.0
"""The config.json of a model that someone else wrote, before Transformers makes a model of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..errors import FormatError
from ..files import open_tensors, read_json

# What Transformers raises while it makes a model from a config that makes no sense, or loads weights that do not fit it.
OF_TRANSFORMERS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_MOST = 1 << 31  # no size comes near it
_FEW_LAYERS = 1024  # built in seconds, whatever the files hold: layers may share weights, and some counts build none


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint, empty where there is none.

    Raises:
        FormatError: if it is no JSON object, or names sizes that would take an hour, or all memory, to build: a number from
            2^31, or over a thousand layers and more than there are tensors in the files.
    """
    content = read_json(folder / "config.json") or {}
    num_tensors = 0
    for path in folder.glob("*.safetensors"):
        with open_tensors(path) as file:
            num_tensors += len(file.keys())
    for key, value in _whole_numbers(content):
        most = max(num_tensors, _FEW_LAYERS) if _counts_layers(key) else _MOST
        if abs(value) > most:
            raise FormatError(
                f"{folder / 'config.json'}: {key}={value!r:.40} is over {most}"
                f"{f', with {num_tensors} tensors in the files' if most != _MOST else ''}; the config is damaged, fetch it again"
            )
    return content


def _counts_layers(key: str) -> bool:
    """Whether a field says how many layers there are (num_hidden_layers, n_layer), not what is of a layer (..._per_layer_input)."""
    return key.endswith(("layer", "layers")) and "per_layer" not in key


def _whole_numbers(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value)
        elif isinstance(value, int):
            yield key, value
