# SPDX-License-Identifier: Apache-2.0
"""The model card of a published mask or packed model, filled from a `RunResults`. It claims nothing that they do not hold.

Everything from the results is treated as foreign text: it is escaped for Markdown and HTML, kept on one line, and never
rendered as a template.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError
from ..files import write_file
from ..pattern import NMPattern
from ..results import MISSING, RunResults, is_finite

if TYPE_CHECKING:
    from ..adapter import NMSparseConfig

Kind = Literal["mask", "packed"]

_INSTALL = "pip install hf-nmsparse"
_WITHOUT_IMPORT = {
    "packed": "Without the import the load fails, as it must: transformers warns that the quantization type `nmsparse` is "
    "unknown and stops with a `RuntimeError` about mismatched sizes. Do not pass `ignore_mismatched_sizes=True`: that "
    "would load a model with random weights.",
    "mask": "Without the import the load fails, as it must: PEFT stops with `KeyError: 'NMSPARSE'`.",
}


def card_text(
    results: RunResults,
    kind: Kind,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    repo_id: str | None = None,
) -> str:
    """The card, YAML metadata and Markdown, as one string.

    Args:
        results (`RunResults`): the run; what it does not hold is called "not measured".
        kind (`str`): `"mask"` for a repository with mask codes only, `"packed"` for one with a packed model.
        license (`str`, *optional*): licence of the artefact, usually the base model's. Left out if unknown.
        language (`str` or `list[str]`, *optional*): ISO 639 codes.
        repo_id (`str`, *optional*): where it will be published; used in the code that loads it.

    Raises:
        ConfigError: for another `kind`.
    """
    if kind not in _WITHOUT_IMPORT:
        raise ConfigError(f"kind {kind!r} of a model card; expected 'mask' or 'packed'")
    template = importlib.resources.files(__package__).joinpath("MODEL_CARD_TEMPLATE.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(results, kind, license, language, repo_id), template_str=template, **_body(results, kind, repo_id)
    )
    # Text from outside may hold lone surrogates, which UTF-8 cannot carry.
    return str(card).rstrip().encode("utf-8", errors="replace").decode("utf-8") + "\n"


def write_card(
    folder: str | os.PathLike,
    results: RunResults,
    kind: Kind,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write `card_text` as `README.md` into `folder`, whole or not at all, over one that may be there."""
    return write_file(Path(folder) / "README.md", card_text(results, kind, license, language, repo_id))


def terms_of(config: NMSparseConfig) -> dict[str, int]:
    """What a mask adapter trains besides its mask, as `RunResults.terms` has it."""
    names = ("slorb_block", "slorb_train_projection", "low_rank", "delta_rank")
    return {name: int(value) for name in names if (value := getattr(config, name))}


# --- metadata -------------------------------------------------------------------------------------------------------
def _metadata(
    results: RunResults, kind: Kind, license: str | None, language: str | Sequence[str] | None, repo_id: str | None
) -> ModelCardData:
    base = results.base_model if _is_hub_id(results.base_model) else None
    pattern = results.parsed_pattern
    tags = ["nmsparse", "mask" if kind == "mask" else None, str(pattern) if pattern else None]
    evaluation = _evaluation(results, kind)
    languages = [language] if isinstance(language, str) else [*(language or ())]
    return ModelCardData(
        base_model=base,
        base_model_relation=({"mask": "adapter", "packed": "quantized"}[kind] if base else None),
        library_name={"mask": "hf_nmsparse", "packed": "transformers"}[kind],
        pipeline_tag="text-generation",
        tags=[tag for tag in (*tags, "sparsity", "pruned", "semi-structured-sparsity") if tag],
        license=_line(license) if license else None,
        language=[_line(code) for code in languages] or None,
        metrics=["perplexity"] if evaluation else None,
        eval_results=[evaluation] if evaluation else None,
        model_name=_model_name(results, kind, repo_id) if evaluation else None,
    )


def _evaluation(results: RunResults, kind: Kind) -> EvalResult | None:
    """The perplexity of what the repository holds; `None` when the results do not say which row that is."""
    rows = {name: value for name, value in results.perplexity.items() if is_finite(value)}
    masks = [name for name in rows if name.strip().lower() != "dense"]
    wanted = [*(["packed"] if kind == "packed" else []), "learned", results.method]
    row = next((name for name in wanted if name in masks), masks[0] if len(masks) == 1 else None)
    if row is None:
        return None
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=_line(results.data.get("evaluation") or "held-out text"),
        metric_type="perplexity",
        metric_name="held-out token perplexity",
        metric_value=rows[row],
    )


def _is_hub_id(name: Any) -> bool:
    """Whether `name` can be a repository on the Hub: of that form, and no folder here."""
    if not isinstance(name, str) or not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _model_name(results: RunResults, kind: Kind, repo_id: str | None) -> str:
    if repo_id:
        return _line(repo_id).rsplit("/", 1)[-1]
    base = re.split(r"[/\\]", _line(results.base_model or "model").rstrip("/\\"))[-1]
    pattern = results.parsed_pattern
    return f"{base}-{pattern}-{kind}" if pattern else f"{base}-{kind}"


# --- body -----------------------------------------------------------------------------------------------------------
def _body(results: RunResults, kind: Kind, repo_id: str | None) -> dict[str, Any]:
    pattern = results.parsed_pattern
    kept = f"{pattern}, {pattern.n} kept of {pattern.m}" if pattern else _prose(results.pattern)
    base = _prose(results.base_model)
    what = {"mask": "Mask for", "packed": "Packed sparse model made from"}[kind]
    dense_rows = [name for name in results.perplexity if name.strip().lower() == "dense"]
    dense = results.perplexity[dense_rows[0]] if dense_rows else None
    return {
        "missing": MISSING,
        "title": f"{what} {base if results.base_model else 'a base model'}",
        "summary": _summary(results, kind, pattern),
        "install": _fenced(_INSTALL, "bash"),
        "load": _load(results, kind, repo_id),
        "without_import": _WITHOUT_IMPORT[kind],
        "base_model": base if _is_hub_id(results.base_model) or not results.base_model else f"{base} (not a Hub id)",
        "base_revision": _prose(results.base_revision),
        "pattern": kept,
        "method": _prose(results.method),
        "sparse": _layers(results.sparse_layers),
        "dense": _layers(results.dense_layers),
        "besides": _besides(results, kind),
        "data": [
            (_prose(role), _prose(text))
            for role, text in ({"calibration": None, "training": None, "evaluation": None} | results.data).items()
        ],
        "seed": _prose(results.seed),
        "steps": _steps(results),
        "base_unchanged": _number(results.base_unchanged),
        "reload_bit_equal": _number(results.reload_bit_equal),
        "command": _fenced("\n".join(map(_line, str(results.command).splitlines())), "bash")
        if results.command
        else MISSING,
        "perplexity": [
            (_prose(name), _number(results.perplexity[name]), _ratio(results.perplexity[name], dense))
            for name in [*dense_rows, *(name for name in results.perplexity if name not in dense_rows)]
        ],
        "evaluation": _prose(results.data.get("evaluation")),
        "tokens": _number(results.perplexity_tokens),
        "window": _number(results.perplexity_sequence_length),
        "bounds": [
            (
                f"{'mask and terms' if results.terms else 'mask'}, bits per pruned weight",
                _number(results.mask_bits_per_weight),
                _number(results.mask_bits_bound),
            ),
            ("packed bytes over dense bfloat16 bytes, pruned layers", _number(results.packed_ratio), ""),
        ],
        "sizes": [(_prose(name), _size(value), _number(value)) for name, value in results.sizes.items()],
        "speed": [
            [
                _prose(entry.get(key)) if key in ("name", "device") else _number(entry.get(key))
                for key in _SPEED_COLUMNS
            ]
            for entry in results.speed
        ],
        "limits": _limits(results, kind),
        "environment": [(_prose(name), _prose(version)) for name, version in results.environment.items()],
    }


_SPEED_COLUMNS = ("name", "device", "tokens", "milliseconds", "ratio")


def _summary(results: RunResults, kind: Kind, pattern: NMPattern | None) -> str:
    base = _prose(results.base_model) if results.base_model else "its base model"
    rule = f"{pattern.n} of every {pattern.m} consecutive weights" if pattern else "n of every m consecutive weights"
    if kind == "mask":
        return (
            f"This is an N:M sparsity mask for {base}: it says which {rule} of each pruned linear layer are kept. The "
            "repository does not hold the base model: that is loaded first."
        )
    return (
        f"This is {base} with N:M sparse linear layers: of each pruned layer {rule} are kept. Only the kept values and "
        "their positions are stored, and plain `from_pretrained` loads them once `hf_nmsparse` is imported."
    )


def _besides(results: RunResults, kind: Kind) -> list[str]:
    """What else than a mask on linear layers the repository holds; one line each."""
    lines, branch, delta = [], _prose(results.side_branch), _prose(results.terms.get("delta_rank"))
    if results.side_branch:
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
            f"Fused experts under the mask: {_layers(results.fused_experts)}. They cannot be packed, and stay dense with zeros."
            if kind == "mask"
            else f"Fused experts: {_layers(results.fused_experts)}. They follow the pattern too, but are stored dense with zeros."
        )
    return lines


def _load(results: RunResults, kind: Kind, repo_id: str | None) -> str:
    repo = json.dumps(repo_id or "<this repository>")
    if kind == "packed":
        return _fenced(
            "import hf_nmsparse\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({repo})",
            "python",
        )
    revision = f", revision={json.dumps(str(results.base_revision))}" if results.base_revision else ""
    base = json.dumps(str(results.base_model or "<the base model>")) + revision
    head = "import hf_nmsparse as nms\n"
    model = f"from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({base})\n"
    with_peft = _fenced(
        f"{head}from peft import PeftModel\n{model}model = PeftModel.from_pretrained(model, {repo})", "python"
    )
    with_nms = _fenced(f"{head}{model}model = nms.load_mask(model, {repo})", "python")
    return f"{with_peft}\n\nor, without PEFT's own entry point,\n\n{with_nms}"


def _limits(results: RunResults, kind: Kind) -> list[str]:
    text = results.data.get("evaluation")
    rows = bool(results.perplexity)
    limits = [
        f"Evaluated on {_prose(text) if text else 'the text of the table above'} only; other text, and tasks, were {MISSING}."
        if rows
        else f"Its quality was {MISSING}.",
        "Speed depends on the device, the shapes and the number of tokens; a sparse layer can be slower than a dense one.",
    ]
    if kind == "mask":
        limits.append("It fits only the exact base weights it was made for; other weights are refused.")
    else:
        limits.append("It loads only with hf_nmsparse installed and imported.")
    return limits


# --- words ----------------------------------------------------------------------------------------------------------
def _number(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if is_finite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return _prose(value)


def _ratio(value: Any, dense: Any) -> str:
    return f"{value / dense:.2f}" if is_finite(value) and is_finite(dense) and dense else MISSING


def _size(value: Any) -> str:
    return f"{value / 1e6:,.2f} MB" if is_finite(value) else _number(value)


def _steps(results: RunResults) -> str:
    if results.steps is None:
        return MISSING
    planned = f" of {_number(results.planned_steps)} planned" if results.planned_steps is not None else ""
    return _number(results.steps) + planned


def _layers(names: Sequence[str]) -> str:
    """Layers counted by the last part of their name; few of them are named in full."""
    if not names:
        return MISSING
    if len(names) <= 4:
        return ", ".join(_prose(name) for name in names)
    kinds = Counter(str(name).rsplit(".", 1)[-1] for name in names)
    return f"{len(names):,} (" + ", ".join(f"{_prose(kind)} × {n:,}" for kind, n in kinds.items()) + ")"


def _line(text: Any) -> str:
    """`text` on one line without control characters: fit for YAML values."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _prose(text: Any) -> str:
    """Foreign text in Markdown: one line, no HTML, no markup, no table cell's end."""
    if text is None or text == "":
        return MISSING
    escaped = re.sub(r"([\\`*\[\]|~#])", r"\\\1", html.escape(_line(text), quote=False))
    # An underscore inside a word is no emphasis; q_proj stays readable.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


def _fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
