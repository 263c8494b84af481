# SPDX-License-Identifier: Apache-2.0
"""`PackedConfig`: the `quantization_config` of packed models, quant_method "nmsparse"."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, FormatError
from ..pattern import NMPattern
from .modules import MEMORY_MODES
from .weights import PATTERN, check_value_kind

QUANT_METHOD = "nmsparse"
FORMAT_VERSION = 2  # the newest one that is read
_MASK_ATTRIBUTES = ("mask", "revision", "task", "allow_base_mismatch")
_LOADING_ATTRIBUTES = ("dequantize", "memory", "check_digests", *_MASK_ATTRIBUTES)


class PackedConfig(QuantizationConfigMixin):
    """Config of a model whose linear layers are packed 2:4.

    On a dense checkpoint it makes `from_pretrained` put a published mask on it while loading, or prune by magnitude
    without one; on a packed checkpoint its loading attributes take effect. A plain dict
    `{"quant_method": "nmsparse", ...}` does the same on a dense checkpoint.

    Args:
        pattern (`str`, defaults to `"2:4"`): the packed form. Patterns inside it (1:4) pack as 2:4.
        modules_to_not_convert (`list[str]`, *optional*): linear layers that stay dense. For pruning while loading: names,
            prefixes, suffixes or regular expressions, beside output head and tied weights, which always stay dense. In
            a stored config: the full name of each dense linear layer.
        format_version (`int`, *optional*): of the packed tensors (docs/FORMAT.md); it follows from `values`.
        values (`str`, defaults to `"dense"`): how kept weights are stored; "dense": in the dtype of the model; "int8" or
            "int4": whole numbers with a scale for each 128 inputs, to which a dense checkpoint is rounded while loading.
        slorb_block (`int`, *optional*): inputs per block of the SLoRB terms beside the masks; stored where there are any.
        dequantize (`bool`, defaults to `False`): loading attribute, never stored: load as plain dense layers.
        memory (`str`, *optional*): loading attribute: "fast" or "low", see `SparseLinear24`.
        check_digests (`bool`, defaults to `True`): loading attribute: check the packed tensors against the digests in
            their file, before the model is changed.
        mask (`str` or `Path`, *optional*): loading attribute, for a dense checkpoint only: folder or Hub repo of a
            published mask. Its layers are packed with it, the others stay dense.
        revision (`str`, *optional*), task (`str`, *optional*): loading attributes: revision of the mask's repo, and
            subfolder where it holds masks of several tasks.
        allow_base_mismatch (`bool`, defaults to `False`): loading attribute: accept base weights other than those that
            the mask was made for.

    Raises:
        FormatError: if `format_version` is of a later version, or not the one of such values.
        ConfigError: on another wrong value, or an unknown field: a field that may be ignored does not exist.
    """

    def __init__(
        self,
        pattern: str = "2:4",
        modules_to_not_convert: list[str] | None = None,
        format_version: int | None = None,
        values: str = "dense",
        slorb_block: int | None = None,
        *,
        dequantize: bool = False,
        memory: str | None = None,
        check_digests: bool = True,
        mask: str | os.PathLike | None = None,
        revision: str | None = None,
        task: str | None = None,
        allow_base_mismatch: bool = False,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        # First: in a file of a later version every other field may be strange.
        if format_version is not None:
            check_format_version(format_version, "quantization_config")
        if unknown:
            raise ConfigError(
                f"PackedConfig: unknown fields {sorted(unknown)}; check their spelling or upgrade hf-nmsparse"
            )
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"PackedConfig: quant_method={quant_method!r}, expected {QUANT_METHOD!r}")
        check_value_kind(values)
        if format_version not in (None, version_of(values)):
            raise FormatError(
                f"quantization_config: format_version={format_version} with values={values!r}, which are of version "
                f"{version_of(values)}; the file is damaged"
            )
        if str(NMPattern(pattern)) != str(PATTERN):
            raise ConfigError(f"PackedConfig: pattern={pattern!r}; the packed form is '2:4', 1:4 packs as 2:4 too")
        if memory is not None and memory not in MEMORY_MODES:
            raise ConfigError(f"PackedConfig: memory={memory!r}; use one of {MEMORY_MODES} or None")
        if slorb_block is not None and (
            isinstance(slorb_block, bool) or not isinstance(slorb_block, int) or slorb_block < 1
        ):
            raise ConfigError(f"PackedConfig: slorb_block={slorb_block!r}; give the inputs per block, or None")
        if mask is None and (revision is not None or task is not None or allow_base_mismatch):
            raise ConfigError(
                "PackedConfig: revision, task and allow_base_mismatch belong to a mask; name it with mask="
            )
        if mask is not None and modules_to_not_convert is not None:
            raise ConfigError(
                "PackedConfig: the mask says which layers are packed; leave modules_to_not_convert out beside mask="
            )
        self.quant_method = quant_method
        self.pattern = str(PATTERN)
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.format_version = version_of(values)
        self.values = values
        self.slorb_block = slorb_block
        self.dequantize = dequantize
        self.memory = memory
        self.check_digests = check_digests
        self.mask = None if mask is None else os.fspath(mask)
        self.revision = revision
        self.task = task
        self.allow_base_mismatch = allow_base_mismatch

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that a caller of `from_pretrained` may set on an already packed checkpoint."""
        return {name: getattr(self, name) for name in _LOADING_ATTRIBUTES}

    def to_dict(self) -> dict[str, Any]:
        """The stored fields: how a checkpoint is loaded is no property of the checkpoint."""
        stored = {name: value for name, value in super().to_dict().items() if name not in _LOADING_ATTRIBUTES}
        if stored["slorb_block"] is None:  # most models have no SLoRB, and readers before it knew no such field
            del stored["slorb_block"]
        return stored


def version_of(values: str) -> int:
    """The format version of such values: quantised ones came with version 2, all else is as in version 1."""
    return 1 if values == "dense" else 2


def check_format_version(version: object, where: str) -> None:
    """Refuse a version that this code cannot read.

    Raises:
        FormatError: naming `where` it was found.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatError(f"{where}: format_version={version!r} is no version; the file is damaged")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version={version}, this version reads up to {FORMAT_VERSION}; upgrade hf-nmsparse"
        )


def _names(names: list[str] | None) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"PackedConfig: modules_to_not_convert={names!r:.80}; give a list of module names")
    return list(names)
