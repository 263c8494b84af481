# SPDX-License-Identifier: Apache-2.0
"""The model card of a published mask, a packed or a masked model, filled from a `RunResults`. It claims nothing that they do not hold.

Everything from the results is treated as foreign text: it is escaped for Markdown and HTML, kept on one line, and never
rendered as a template.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError
from ..files import write_file
from ..packed.stored_mask import inside_24
from ..pattern import NMPattern, Pattern
from ..results import MISSING, RunResults, is_finite
from .markdown import fenced, layer_counts, megabytes, number, one_line, prose, ratio

if TYPE_CHECKING:
    from ..adapter import NMSparseConfig

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
_KINDS = {  # -> how a title begins, the relation to the base on the Hub, the library
    "mask": ("Mask for", "adapter", "hf_nmsparse"),
    "packed": ("Packed sparse model made from", "quantized", "transformers"),
    "masked": ("Masked model made from", None, "transformers"),  # the Hub has no word for it
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
        kind (`str`): `"mask"` for a repository with mask codes only, `"packed"` for one with a packed model, `"masked"` for
            one with a plain model whose pruned weights are zero.
        license (`str`, *optional*): licence of the artefact, usually the base model's. Left out if unknown.
        language (`str` or `list[str]`, *optional*): ISO 639 codes.
        repo_id (`str`, *optional*): where it will be published; used in the code that loads it.

    Raises:
        ConfigError: for another `kind`.
    """
    if kind not in _KINDS:
        raise ConfigError(f"kind {kind!r} of a model card; expected 'mask', 'packed' or 'masked'")
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


def update_card(folder: str | os.PathLike, results: RunResults, kind: Kind) -> Path:
    """Renew what the card in a folder says of quality, and leave the rest of it: license, names, what people added.

    Args:
        folder (`str` or `Path`): holds the card; without one it is written whole.
        results (`RunResults`), kind (`str`): as in `card_text`.

    Returns:
        the path of the card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return write_card(folder, results, kind)
    card, new = ModelCard.load(path), ModelCard(card_text(results, kind))
    card.data.metrics, card.data.eval_results = new.data.metrics, new.data.eval_results
    if card.data.model_name is None:
        card.data.model_name = new.data.model_name
    text, fresh = card.text, dict(_SECTION.findall(new.text))
    for title in ("Held-out perplexity", "Limits"):
        text = _SECTION.sub(
            lambda found, title=title: f"{title}{fresh[title]}" if found[1] == title else found[0], text
        )
    card.text = text
    return write_file(path, str(card))


_SECTION = re.compile(r"(?<=^## )(.+?)(\n.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)  # its title, and the rest


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
    nm = isinstance(pattern, NMPattern)
    tags = ["nmsparse", "mask" if kind == "mask" else None, str(pattern) if nm else None, "sparsity", "pruned"]
    if not results.pattern or nm:
        tags.append("semi-structured-sparsity")
    evaluations = _evaluations(results, kind)
    languages = [language] if isinstance(language, str) else [*(language or ())]
    return ModelCardData(
        base_model=base,
        base_model_relation=_KINDS[kind][1] if base else None,
        library_name=_KINDS[kind][2],
        pipeline_tag="text-generation",
        tags=[tag for tag in tags if tag],
        license=one_line(license) if license else None,
        language=[one_line(code) for code in languages] or None,
        metrics=["perplexity"] if evaluations else None,
        eval_results=evaluations or None,
        model_name=_model_name(results, kind, repo_id) if evaluations else None,
    )


def _evaluations(results: RunResults, kind: Kind) -> list[EvalResult]:
    """The perplexities of what the repository holds, as far as the results say which those are."""
    found = {one_line(entry.get("text")): entry.get("this") for entry in results.evaluations}
    own = _own_perplexity(results, kind)
    if own is not None:
        found = {one_line(results.data.get("evaluation") or "held-out text"): own} | found
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=text,
            dataset_config=text,  # by which the Hub tells texts apart, and not by their names
            metric_type="perplexity",
            metric_name="held-out token perplexity",
            metric_value=value,
        )
        for text, value in found.items()
        if is_finite(value)
    ]


def _own_perplexity(results: RunResults, kind: Kind) -> float | None:
    """`None` when the results do not say which row is that of the repository."""
    rows = {name: value for name, value in results.perplexity.items() if is_finite(value)}
    masks = [name for name in rows if name.strip().lower() != "dense"]
    wanted = [*(["packed"] if kind == "packed" else []), "learned", results.method]
    row = next((name for name in wanted if name in masks), masks[0] if len(masks) == 1 else None)
    return None if row is None else rows[row]


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
        return one_line(repo_id).rsplit("/", 1)[-1]
    base = re.split(r"[/\\]", one_line(results.base_model or "model").rstrip("/\\"))[-1]
    pattern = results.parsed_pattern
    return f"{base}-{pattern}-{kind}" if isinstance(pattern, NMPattern) else f"{base}-{kind}"


# --- body -----------------------------------------------------------------------------------------------------------
def _body(results: RunResults, kind: Kind, repo_id: str | None) -> dict[str, Any]:
    pattern = results.parsed_pattern
    base = prose(results.base_model)
    dense_rows = [name for name in results.perplexity if name.strip().lower() == "dense"]
    dense = results.perplexity[dense_rows[0]] if dense_rows else None
    return {
        "missing": MISSING,
        "title": f"{_KINDS[kind][0]} {base if results.base_model else 'a base model'}",
        "summary": _summary(results, kind, pattern),
        "load": _load(results, kind, repo_id),
        "base_model": base if _is_hub_id(results.base_model) or not results.base_model else f"{base} (not a Hub id)",
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
            [prose(entry.get("text")), *(number(entry.get(key)) for key in ("dense", "this"))]
            + [
                ratio(entry.get("this"), entry.get("dense")),
                number(entry.get("tokens")),
                number(entry.get("sequence_length")),
            ]
            for entry in results.evaluations
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
    limits = [
        f"Evaluated on {', '.join(texts)} only; other text, and tasks, were {MISSING}."
        if texts
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
