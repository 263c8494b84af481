# SPDX-License-Identifier: Apache-2.0
"""`nmsparse inspect`: what a folder or repo holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, FormatError
from ..files import MAX_LIST_BYTES, RESULTS_FILE, read_json
from .common import facts_table, size, verb
from .folders import Kind, checkpoints_in, folder_bytes, kind_of, stored_tensors
from .models import locate
from .options import JsonOption, RevisionOption, TaskOption

if TYPE_CHECKING:
    from ..pattern import NMPattern

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder or Hub repo of a mask, checkpoint, masked or packed model.")
]

_NOISE = ("auto_mapping", "peft_version", "target_modules")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def inspect(
    path: PathArgument,
    revision: RevisionOption = None,
    task: TaskOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what a folder or repo holds: kind, pattern, layers, terms, sizes, base model, bits a weight.

    Example: nmsparse inspect my-mask
    """
    with verb(json_output) as answer:
        folder = locate(path, True, revision, task)
        kind = kind_of(folder)
        describe = {
            Kind.MASK: lambda folder: _mask(folder, path, revision, task),
            Kind.CHECKPOINT: _checkpoint,
            Kind.PACKED: _packed,
            Kind.BITMASK: _bitmask,
            Kind.MODEL: _model,
            Kind.RUN: _run,
        }.get(kind)
        if describe is None:
            raise ConfigError(f"{path} ({kind.value}): inspect takes masks, training checkpoints and models")
        answer.facts = {"path": path, "revision": revision, "task": task, "kind": kind.value, **describe(folder)}
        shown = {
            name.replace("_", " "): size(value) if name.endswith("bytes") else _short(value)
            for name, value in answer.facts.items()
            if value not in (None, [], {}) and name not in ("path", "kind")
        }
        answer.show(facts_table(f"{path}: {kind.value}", shown))


def _mask(folder: Path, path: str, revision: str | None, task: str | None) -> dict[str, Any]:
    from ..hub import mask_summary, read_mask
    from ..hub.card import terms_of

    mask = read_mask(path, revision, task)
    summary = mask_summary(mask)
    config = {key: getattr(value, "value", value) for key, value in summary["config"].items() if key not in _NOISE}
    recorded = (read_json(folder / RESULTS_FILE) or {}).get("mask_bits_per_weight")
    groups = sum(
        stored.packed.shape[0] * mask.pattern.max_groups(stored.packed.shape[1]) for stored in mask.layers.values()
    )
    delta = {}
    if mask.general is not None:
        delta = {"delta_to": str(mask.general), "changed_share": summary["changed_groups"] / groups}
    return {
        "pattern": config["pattern"],
        "base": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "layers": sorted(mask.layers),
        "fused_experts": sorted(mask.config.target_parameters or ()),
        **delta,
        "terms": terms_of(mask.config),
        "terms_bytes": sum(value.nbytes for stored in mask.layers.values() for value in stored.terms.values()) or None,
        "file_bytes": mask.file_bytes,
        # True widths are the model's to tell. Without them: as many groups as fit into the rows.
        "bits_per_weight": recorded or 8 * mask.file_bytes / (groups * mask.pattern.m),
        "bits_bound": _bits_bound(mask.pattern, delta.get("changed_share")),
        "config": config,
        "checkpoints": [checkpoint.name for checkpoint in checkpoints_in(folder)],
    }


def _bits_bound(pattern: NMPattern, changed: float | None) -> float:
    """Bits a weight that masks need if all are equally likely; of a delta, those in which this share of groups is changed."""
    if changed is None:
        return pattern.entropy_bits_per_weight
    where = -sum(share * math.log2(share) for share in (changed, 1 - changed) if share > 0)
    return (where + changed * math.log2(max(pattern.num_candidates - 1, 1))) / pattern.m


def _checkpoint(folder: Path) -> dict[str, Any]:
    from ..adapter import TERM_CONTAINERS
    from ..hub.mask_file import PREFIX, stored_paths

    config = read_json(folder / "adapter_config.json") or {}
    state = read_json(folder / "trainer_state.json", MAX_LIST_BYTES) or {}
    tensors = stored_tensors(folder)
    parts = {name: name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".") for name in tensors}
    trained = {
        place: name for name, (place, _, part) in parts.items() if part in ("nmsparse_logits", "nmsparse_weight")
    }
    terms = [name for name, (_, _, part) in parts.items() if part in TERM_CONTAINERS]
    experts = {place: name for name, place in stored_paths((), config.get("target_parameters") or ()).items()}
    return {
        "pattern": config.get("pattern"),
        "base": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "step": state.get("global_step"),
        "planned_steps": state.get("max_steps"),
        "layers": sorted(experts.get(place, place) for place in trained),
        "logits_bytes": sum(_bytes(tensors[name]) for name in trained.values()),
        "terms_bytes": sum(_bytes(tensors[name]) for name in terms) or None,
        "config": {key: value for key, value in config.items() if value is not None and key not in _NOISE},
    }


def _packed(folder: Path) -> dict[str, Any]:
    from ..packed.branch import BRANCH_LEAVES
    from ..packed.weights import WEIGHT_LEAVES

    config = read_json(folder / "config.json") or {}
    tensors = stored_tensors(folder)
    layers = sorted(name.removesuffix(".weight_idx") for name in tensors if name.endswith(".weight_idx"))
    for name in layers:
        if f"{name}.weight" not in tensors:
            raise FormatError(f"{folder}: {name}.weight is missing though {name}.weight_idx is there; fetch it again")
    stored = [tensors[key] for name in layers for leaf in WEIGHT_LEAVES if (key := f"{name}.{leaf}") in tensors]
    packed = sum(map(_bytes, stored))
    branch = [tensors[key] for name in layers for leaf in BRANCH_LEAVES if (key := f"{name}.{leaf}") in tensors]
    branch_bytes = sum(map(_bytes, branch))
    packed += branch_bytes
    ranks = {tensors[key][1][0] for name in layers if (key := f"{name}.weight_low_rank_a") in tensors}
    terms = {"slorb_block": config["quantization_config"].get("slorb_block"), "low_rank": max(ranks, default=None)}
    # A byte of ids is of 8 weights, each of which would be stored dense as values or their scales are.
    weights_of = {name: 8 * math.prod(tensors[f"{name}.weight_idx"][1]) for name in layers}
    floats = {name: tensors.get(f"{name}.weight_scale", tensors[f"{name}.weight"])[0] for name in layers}
    dense = sum(_bytes((floats[name], [count])) for name, count in weights_of.items())
    weights = sum(weights_of.values())
    values = config["quantization_config"].get("values", "dense")
    return {
        "pattern": "2:4",
        **_recorded(folder),
        "architecture": (config.get("architectures") or [None])[0],
        "layers": layers,
        "dense_layers": config["quantization_config"].get("modules_to_not_convert"),
        "values": None if values == "dense" else values,
        "side_branch": {name: value for name, value in terms.items() if value is not None},
        "side_branch_bytes": branch_bytes or None,
        "file_bytes": folder_bytes(folder),
        "packed_bytes": packed,
        "dense_bytes": dense,
        "ratio": packed / dense if dense else None,
        "bits_per_weight": 8 * packed / weights if weights else None,
        "config": config["quantization_config"],
    }


def _bitmask(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") or {}
    return {
        "pattern": config["quantization_config"]["sparsity_config"].get("sparsity_structure"),
        **_recorded(folder),
        "architecture": (config.get("architectures") or [None])[0],
        "layers": sorted(
            name.removesuffix(".bitmask") for name in stored_tensors(folder) if name.endswith(".bitmask")
        ),
        "file_bytes": folder_bytes(folder),
        "config": config["quantization_config"],
    }


def _model(folder: Path) -> dict[str, Any]:
    from ..hub import verify

    config = read_json(folder / "config.json") or {}
    recorded = _recorded(folder)
    report = verify(folder)
    sparse = report.ok
    return {
        "masked": sparse,
        **recorded,
        "pattern": report.pattern if sparse else None,
        "architecture": (config.get("architectures") or [None])[0],
        "layers": sorted(report.layers) if sparse else [],
        "dense_layers": report.dense_layers,
        "file_bytes": folder_bytes(folder),
    }


def _run(folder: Path) -> dict[str, Any]:
    checkpoints = checkpoints_in(folder)
    newest = _checkpoint(checkpoints[-1])
    return {"checkpoints": [checkpoint.name for checkpoint in checkpoints], **newest}


def _recorded(folder: Path) -> dict[str, Any]:
    """What the results file beside a model says of where it comes from."""
    results = read_json(folder / RESULTS_FILE) or {}
    names = {"base": "base_model", "base_revision": "base_revision", "method": "method", "pattern": "pattern"}
    return {name: results[key] for name, key in names.items() if results.get(key) is not None}


def _bytes(info: tuple[str, list[int]]) -> int:
    dtype, shape = info
    if dtype not in _DTYPE_BYTES:
        raise FormatError(f"tensor of dtype {dtype}; expected one of {', '.join(_DTYPE_BYTES)}")
    return math.prod(shape) * _DTYPE_BYTES[dtype]


def _short(value: Any) -> str:
    """Long lists by number and ends, numbers short."""
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value[:2]))}{', ...' if len(value) > 2 else ''}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
