# SPDX-License-Identifier: Apache-2.0
"""The one record of a run that cards, reports and benchmarks read and write. What was not measured is absent."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import FormatError, PatternError
from .files import load_json, write_file
from .pattern import Pattern, parse_pattern

SCHEMA_VERSION = 1
MISSING = "not measured"


@dataclass
class RunResults:
    """Everything that is known about one pruned model or mask. A field that is `None` or empty was not measured; only of
    terms, fused experts and permuted layers there are often none.

    Args:
        base_model (`str`, *optional*): Hub id or name of the dense model.
        base_revision (`str`, *optional*): its commit.
        delta_to (`str`, *optional*): the general mask, where only the groups that differ from it are stored.
        pattern (`str`, *optional*): for example `"2:4"`; or the share of weights that is pruned wherever they are, `"60%"`.
        method (`str`, *optional*): criterion or relaxation that gave the mask, for example `"candidates (prior polish)"`.
        kept_weights (`str`, *optional*): what was done with them: `"keep"`: nothing, `"update"`: the method gave them new
            values, `"refit"`: they were fitted anew under the mask.
        permuted_layers (`list[str]`): pruned layers whose input channels were put into another order first.
        sparse_layers (`list[str]`): names of the pruned layers.
        dense_layers (`list[str]`): linear layers left unpruned.
        dense_budget (`float`, *optional*): share of the bytes of prunable layers that the most sensitive of them were
            allowed to stay dense with.
        terms (`dict[str, int]`): what was trained besides the mask -> its size: "slorb_block" (inputs of a block) and
            "slorb_train_projection" (1), "low_rank" and "delta_rank" (ranks).
        fused_experts (`list[str]`): pruned weights that hold the experts of a block.
        data (`dict[str, str]`): role ("calibration", "training", "evaluation") -> what text, with token counts.
        seed (`int`, *optional*): seed of the run.
        perplexity (`dict[str, float]`): row ("dense", "magnitude", ..., "learned") -> held-out token perplexity.
        perplexity_tokens (`int`, *optional*): tokens scored for each row.
        perplexity_sequence_length (`int`, *optional*): window length.
        evaluations (`list[dict]`): what `nmsparse eval --record` measured on other texts, each beside the dense model in the same
            run ("text", "dense", "this", "standard_error" of the loss, "tokens", "sequence_length", "sha256" of the tokens).
        tasks (`list[dict]`): what `nmsparse eval` measured on tasks, as `evaluation.task_entry` has it: "task", "metric", "suite",
            "this", "dense" (the dense model on the same items in the same run), their standard errors, "items", "lost", "won" ...
        agreement (`list[dict]`): how far it says what the dense model says, as `evaluation.Agreement.to_dict` has it: "text",
            "tokens", "top1" (share of tokens whose likeliest successor is the same), "kl" (nats a token), "layers" ...
        samples (`list[dict]`): greedy text side by side: {"prompt": ..., "dense": ..., "this" or another name: ...}.
        mask_bits_per_weight (`float`, *optional*): size of the mask file in bits over pruned weights.
        mask_bits_bound (`float`, *optional*): log2 C(m, n) / m.
        values (`str`, *optional*): "int8" or "int4", where the packed values are rounded to such numbers.
        packed_ratio (`float`, *optional*): packed bytes of the pruned layers over their dense bfloat16 bytes.
        sizes (`dict[str, int]`): bytes, for example {"mask": ..., "packed_model": ..., "dense_model": ...}.
        reload_bit_equal (`bool`, *optional*): reloaded packed weights, decompressed, equal the merged ones.
        base_unchanged (`bool`, *optional*): base state dict bit-equal before and after training.
        steps (`int`, *optional*), planned_steps (`int`, *optional*): optimizer steps run, and meant to be run.
        seconds (`float`, *optional*): wall time; `seconds_by_stage` splits it.
        history (`list[dict]`): log lines of training ("step", "loss", "nm/flip_rate", "nm/max_prob", ...).
        layers (`list[dict]`): one dict a pruned layer ("name", "relative_error", "kept_energy", "flip_rate", ...).
        speed (`list[dict]`): measured kernels ("name", "tokens", "milliseconds", "ratio", "device").
        command (`str`, *optional*): what to type to get the same.
        environment (`dict[str, str]`): versions and machine, see `environment()`.
    """

    base_model: str | None = None
    base_revision: str | None = None
    delta_to: str | None = None
    pattern: str | None = None
    method: str | None = None
    kept_weights: str | None = None
    permuted_layers: list[str] = field(default_factory=list)
    sparse_layers: list[str] = field(default_factory=list)
    dense_layers: list[str] = field(default_factory=list)
    dense_budget: float | None = None
    terms: dict[str, int] = field(default_factory=dict)
    fused_experts: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    perplexity_tokens: int | None = None
    perplexity_sequence_length: int | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    mask_bits_per_weight: float | None = None
    mask_bits_bound: float | None = None
    values: str | None = None
    packed_ratio: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    reload_bit_equal: bool | None = None
    base_unchanged: bool | None = None
    steps: int | None = None
    planned_steps: int | None = None
    seconds: float | None = None
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def parsed_pattern(self) -> Pattern | None:
        """The pattern, or `None` when the results name none that can be read."""
        if self.pattern is None:
            return None
        try:
            return parse_pattern(self.pattern)
        except PatternError:
            return None

    @property
    def side_branch(self) -> str | None:
        """The terms beside the mask in words, `None` without any."""
        words = []
        if self.terms.get("slorb_block"):
            projection = ", projection trained" if self.terms.get("slorb_train_projection") else ""
            words.append(f"SLoRB (blocks of {self.terms['slorb_block']} inputs{projection})")
        if self.terms.get("low_rank"):
            words.append(f"a low-rank term (rank {self.terms['low_rank']})")
        return " and ".join(words) or None

    def write(self, path: str | os.PathLike) -> Path:
        """Write as JSON, whole or not at all."""
        return write_file(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> RunResults:
        """Read what `write` wrote.

        Raises:
            FormatError: if the file is not JSON, of a newer schema, or a field holds something else than it should.
        """
        content = load_json(Path(path))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"{path}: results schema version {version!r}, this hf_nmsparse reads {SCHEMA_VERSION}; upgrade hf-nmsparse "
                "or run the command again"
            )
        known = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.name in content}
        for name, kind in known.items():
            if (expected := _misfit(content[name], kind)) is not None:
                raise FormatError(
                    f"{path}: {name} must be {expected}, got {_short(content[name])}; the file is damaged"
                )
        return cls(**{name: content[name] for name in known})


def _misfit(value: Any, kind: str) -> str | None:
    """What a field of this annotation must be, if `value` is something else. Single numbers are checked where they are used."""
    if kind.startswith("list[dict"):
        fits = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        return None if fits else "a list of objects"
    if kind.startswith("list"):
        return None if isinstance(value, list) else "a list"
    if kind.startswith("dict"):
        return None if isinstance(value, dict) else "an object"
    if kind.startswith("str"):
        return None if value is None or isinstance(value, str) else "a text"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that can be plotted and compared."""
    limit = sys.float_info.max  # whole numbers may be larger, which nothing can plot
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -limit <= value <= limit


def number(value: Any) -> str:
    """A value as people read it: numbers with four significant digits and thousands separated, all else as its text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if is_finite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def one_line(text: Any) -> str:
    """`text` on one line, without characters that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def environment() -> dict[str, str]:
    """Versions and machine of this process. Does not initialise a GPU that is not already in use."""
    packages = ("hf-nmsparse", "torch", "transformers", "peft", "accelerate", "huggingface-hub", "triton")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["python"] = sys.version.split()[0]
    found["platform"] = platform.platform()
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
    return found
