# SPDX-License-Identifier: Apache-2.0
"""What a model card says: the words and tables of its sections, all of it from a `RunResults`."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..packed.stored_mask import inside_24
from ..pattern import NMPattern, Pattern
from ..results import MISSING, RunResults, is_finite
from .markdown import fenced, layer_counts, megabytes, number, one_line, prose, ratio

Kind = Literal["mask", "packed", "masked"]

_INSTALL = "pip install hf-nmsparse"
_IMPORT_FIRST = "The import of `hf_nmsparse` has to come first: it registers the format."
_WITHOUT_IMPORT = {
    "packed": "Without the import the load fails, as it must: transformers warns that the quantization type `nmsparse` is "
    "unknown and stops with a `RuntimeError` about mismatched sizes. Do not pass `ignore_mismatched_sizes=True`: that "
    "would load a model with random weights.",
    "mask": "Without the import the load fails, as it must: PEFT stops with `KeyError: 'NMSPARSE'`.",
}
_ONLY_OURS = (
    "PEFT's and Transformers' own loaders refuse it, because they cannot put a delta together. If the general mask has moved, "
    "name its place: `nms.load_mask(model, ..., general=...)`."
)
KINDS = {  # -> how a title begins, the relation to the base on the Hub, the library
    "mask": ("Mask for", "adapter", "hf_nmsparse"),
    "packed": ("Packed sparse model made from", "quantized", "transformers"),
    "masked": ("Masked model made from", None, "transformers"),  # the Hub has no word for it
}


def card_body(results: RunResults, kind: Kind, repo_id: str | None) -> dict[str, Any]:
    """What MODEL_CARD_TEMPLATE.md is filled with; all of it can be put into Markdown as it is."""
    pattern = results.parsed_pattern
    base = prose(results.base_model)
    dense_rows = [name for name in results.perplexity if name.strip().lower() == "dense"]
    dense = results.perplexity[dense_rows[0]] if dense_rows else None
    return {
        "missing": MISSING,
        "title": f"{KINDS[kind][0]} {base if results.base_model else 'a base model'}",
        "summary": _summary(results, kind, pattern),
        "load": _load(results, kind, repo_id),
        "base_model": base if is_hub_id(results.base_model) or not results.base_model else f"{base} (not a Hub id)",
        "base_revision": prose(results.base_revision),
        "pattern": _kept(results, pattern),
        "method": prose(results.method),
        "sparse": layer_counts(results.sparse_layers),
        "dense": layer_counts(results.dense_layers),
        "besides": _besides(results, kind),
        "data": [
            (prose(role), prose(text))
            for role, text in ({"calibration": None, "training": None, "evaluation": None} | results.data).items()
        ],
        "seed": prose(results.seed),
        "steps": _steps(results),
        "base_unchanged": number(results.base_unchanged),
        "reload_bit_equal": number(results.reload_bit_equal),
        "command": fenced("\n".join(map(one_line, str(results.command).splitlines())), "bash")
        if results.command
        else MISSING,
        "perplexity": [
            (prose(name), number(results.perplexity[name]), ratio(results.perplexity[name], dense))
            for name in [*dense_rows, *(name for name in results.perplexity if name not in dense_rows)]
        ],
        "evaluations": [
            [_text_name(entry), *(number(entry.get(key)) for key in ("dense", "this"))]
            + [
                ratio(entry.get("this"), entry.get("dense")),
                number(entry.get("tokens")),
                number(entry.get("sequence_length")),
            ]
            for entry in results.evaluations
        ],
        "tasks": [_task_row(entry) for entry in results.tasks],
        "measured_by": prose(", ".join(sorted({one_line(entry.get("measured_by")) for entry in results.tasks}))),
        "agreement": [
            [prose(entry.get("text")), _percent(entry.get("top1"), entry.get("top1_standard_error"))]
            + [_with_error(entry.get("kl"), entry.get("kl_standard_error")), number(entry.get("tokens"))]
            for entry in results.agreement
        ],
        "evaluation": prose(results.data.get("evaluation")),
        "tokens": number(results.perplexity_tokens),
        "window": number(results.perplexity_sequence_length),
        "bounds": [
            (
                f"{'mask and terms' if results.terms else 'mask'}, bits per pruned weight",
                number(results.mask_bits_per_weight),
                number(results.mask_bits_bound),
            ),
            ("packed bytes over dense bfloat16 bytes, pruned layers", number(results.packed_ratio), ""),
        ],
        "sizes": [(prose(name), megabytes(value), number(value)) for name, value in results.sizes.items()],
        "speed": [
            [prose(entry.get(key)) if key in ("name", "device") else number(entry.get(key)) for key in _SPEED_COLUMNS]
            for entry in results.speed
        ],
        "limits": _limits(results, kind),
        "environment": [(prose(name), prose(version)) for name, version in results.environment.items()],
    }


def _text_name(entry: dict[str, Any]) -> str:
    """A perplexity over a sliding window must not be taken for one of the papers' protocol."""
    return prose(entry.get("text")) + (f" (stride {number(entry['stride'])})" if entry.get("stride") else "")


def _task_row(entry: dict[str, Any]) -> list[str]:
    """Task, metric, dense, this, difference with the standard error of paired items, lost and won, items, chance."""
    this, dense = entry.get("this"), entry.get("dense")
    difference = ""
    if is_finite(this) and is_finite(dense):
        difference = _with_error(this - dense, entry.get("difference_standard_error"), "+")
    flips = [entry.get("lost"), entry.get("won")]
    return [
        prose(entry.get("task")),
        prose(entry.get("metric")),
        _with_error(dense, entry.get("dense_standard_error")),
        _with_error(this, entry.get("standard_error")),
        difference or MISSING,
        " / ".join(map(number, flips)) if all(map(is_finite, flips)) else "",
        number(entry.get("items")),
        number(entry["chance"]) if is_finite(entry.get("chance")) else "",
    ]


def _with_error(value: Any, error: Any, sign: str = "") -> str:
    """A number, with its standard error where that is known."""
    if not is_finite(value):
        return number(value)
    return f"{value:{sign}.4g}" + (f" ± {error:.2g}" if is_finite(error) else "")


def _percent(share: Any, error: Any) -> str:
    if not is_finite(share):
        return number(share)
    return f"{100 * share:.1f} %" + (f" ± {100 * error:.1f}" if is_finite(error) else "")


_SPEED_COLUMNS = ("name", "device", "tokens", "milliseconds", "ratio")


def _kept(results: RunResults, pattern: Pattern | None) -> str:
    if isinstance(pattern, NMPattern):
        return f"{pattern}, {pattern.n} kept of {pattern.m}"
    return prose(results.pattern) if pattern is None else f"none, {pattern} of the weights of each layer pruned"


def _summary(results: RunResults, kind: Kind, pattern: Pattern | None) -> str:
    base = prose(results.base_model) if results.base_model else "its base model"
    if kind == "masked":
        return _masked_summary(results, base, pattern)
    nm = isinstance(pattern, NMPattern)
    rule = f"{pattern.n} of every {pattern.m} consecutive weights" if nm else "n of every m consecutive weights"
    if kind == "mask":
        return (
            f"This is an N:M sparsity mask for {base}: it says which {rule} of each pruned linear layer are kept. The "
            "repository does not hold the base model: that is loaded first."
            + (
                f" It is stored as a delta to {prose(results.delta_to)}: only the groups that differ from that general mask, "
                "which is read with it."
                if results.delta_to
                else ""
            )
        )
    return (
        f"This is {base} with N:M sparse linear layers: of each pruned layer {rule} are kept. Only the kept values and "
        "their positions are stored, and plain `from_pretrained` loads them once `hf_nmsparse` is imported."
    )


def _masked_summary(results: RunResults, base: str, pattern: Pattern | None) -> str:
    if results.side_branch:
        return (
            f"This is {base} with a mask and the terms beside it merged into plain weights. These are dense: the terms "
            "fill the places that the mask prunes."
        )
    if isinstance(pattern, NMPattern):
        rule = f"of each pruned linear layer {pattern.n} of every {pattern.m} consecutive weights are kept, the others"
    elif pattern is not None:
        rule = f"{pattern} of the weights of each pruned linear layer"
    else:
        rule = "the pruned weights"
    return (
        f"This is {base}, pruned: {rule} are zero. The zeros are stored and multiplied like all other weights: the model "
        "has the size and the speed of the dense one."
    )


def _besides(results: RunResults, kind: Kind) -> list[str]:
    """What else than a mask on linear layers the repository holds; one line each."""
    lines, branch, delta = [], prose(results.side_branch), prose(results.terms.get("delta_rank"))
    if kind != "mask":
        lines += _changes(results)
    if results.side_branch and kind == "masked":
        lines.append(f"Merged into the weights: {branch}.")
    elif results.side_branch:
        lines.append(
            f"Beside the mask: {branch}, part of what the model computes. Merging it with the mask gives dense weights; "
            "`nms.compress` keeps it beside the packed ones."
            if kind == "mask"
            else f"Beside the packed weights: {branch}, part of what the model computes. `nms.decompress` adds it to the "
            "weights, which are dense then."
        )
    if results.terms.get("delta_rank"):
        pattern = "" if results.side_branch else "Merging it keeps the pattern. "
        lines.append(
            f"Under the mask: a trained change of the kept weights (rank {delta}). {pattern}Once it is merged, the kept "
            "weights are no longer those of the base."
            if kind == "mask"
            else f"The kept weights are not those of the base: a trained change (rank {delta}) is merged into them."
        )
    if results.fused_experts:
        lines.append(
            f"Fused experts under the mask: {layer_counts(results.fused_experts)}. They cannot be packed, and stay dense with zeros."
            if kind == "mask"
            else f"Fused experts: {layer_counts(results.fused_experts)}. They follow the pattern too, but are stored dense with zeros."
        )
    return lines


def _changes(results: RunResults) -> list[str]:
    """What pruning did to the weights that are kept."""
    method = prose(results.method) if results.method else "the method"
    lines = {
        "keep": ["Kept weights: bit-equal to those of the base."],
        "update": [f"Kept weights: given new values by {method}."],
        "refit": [
            "Kept weights: fitted anew under the mask, to the outputs of the dense layers on the calibration text."
        ],
    }.get(results.kept_weights, [])
    if results.values:
        lines = [] if results.kept_weights == "keep" else lines
        lines.append(
            f"Kept weights are stored as {prose(results.values)}: rounded to the nearest, with a scale for each 128 inputs of a row."
        )
    if results.permuted_layers:
        lines.append(
            f"Channels put into another order before pruning, which the model absorbs: {layer_counts(results.permuted_layers)}. "
            "Their weights are compared with the base's in that order."
        )
    if results.dense_budget is not None:
        lines.append(
            f"The layers that pruning hurts most were left dense, up to {number(100 * results.dense_budget)} % of the bytes."
        )
    return lines


def _load(results: RunResults, kind: Kind, repo_id: str | None) -> str:
    repo = json.dumps(repo_id or "<this repository>")
    plain = f"from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({repo})"
    if kind == "masked":
        parts = ["Nothing but Transformers is needed.", fenced(plain, "python"), _packing(results, plain)]
        return "\n\n".join(part for part in parts if part)
    if kind == "packed":
        code = fenced(f"import hf_nmsparse\n{plain}", "python")
    else:
        code = _mask_code(results, repo)
    unregistered = _ONLY_OURS if results.delta_to and kind == "mask" else _WITHOUT_IMPORT[kind]
    return "\n\n".join([_IMPORT_FIRST, fenced(_INSTALL, "bash"), code, unregistered])


def _packing(results: RunResults, plain: str) -> str:
    """How to get a smaller model out of a masked one."""
    pattern = results.parsed_pattern
    if results.side_branch:
        return "To get a smaller model, compress the base model with its mask (`nmsparse compress BASE --mask MASK`)."
    if pattern is None:
        return ""
    if not isinstance(pattern, NMPattern) or not inside_24(pattern):
        return f"It cannot be packed: that takes a pattern that keeps at most 2 of 4 weights, and this is {pattern}."
    code = fenced(f"import hf_nmsparse as nms\n{plain}\nmodel = nms.compress(model)", "python")
    return (
        "To store only the kept values and their positions, pack it, here or with `nmsparse compress`:\n\n"
        f"{fenced(_INSTALL, 'bash')}\n\n{code}"
    )


def _mask_code(results: RunResults, repo: str) -> str:
    revision = f", revision={json.dumps(str(results.base_revision))}" if results.base_revision else ""
    base = json.dumps(str(results.base_model or "<the base model>")) + revision
    head = "import hf_nmsparse as nms\n"
    model = f"from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({base})\n"
    with_peft = fenced(
        f"{head}from peft import PeftModel\n{model}model = PeftModel.from_pretrained(model, {repo})", "python"
    )
    with_nms = fenced(f"{head}{model}model = nms.load_mask(model, {repo})", "python")
    if results.delta_to:
        return with_nms
    return f"{with_peft}\n\nor, without PEFT's own entry point,\n\n{with_nms}"


def _limits(results: RunResults, kind: Kind) -> list[str]:
    text = results.data.get("evaluation")
    texts = [prose(text) if text else "the text of the table above"] if results.perplexity else []
    texts += [prose(entry.get("text")) for entry in results.evaluations]
    tasks = list(dict.fromkeys(prose(entry.get("task")) for entry in results.tasks))
    measured = [", ".join(texts)] if texts else []
    measured += [f"the tasks {', '.join(tasks)}"] if tasks else []
    others = "other text and other tasks" if tasks else "other text, and tasks,"
    limits = [
        f"Evaluated on {' and '.join(measured)} only; {others} were {MISSING}."
        if measured
        else f"Its quality was {MISSING}.",
    ]
    if kind == "masked":
        return limits + ["As it is stored it saves neither memory nor time."]
    limits.append(
        "Speed depends on the device, the shapes and the number of tokens; a sparse layer can be slower than a dense one."
    )
    if kind == "mask":
        limits.append("It fits only the exact base weights it was made for; other weights are refused.")
    else:
        limits.append("It loads only with hf_nmsparse installed and imported.")
    return limits


def _steps(results: RunResults) -> str:
    if results.steps is None:
        return MISSING
    planned = f" of {number(results.planned_steps)} planned" if results.planned_steps is not None else ""
    return number(results.steps) + planned


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be a repository on the Hub: of that form, and no folder here."""
    if not isinstance(name, str) or not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)
