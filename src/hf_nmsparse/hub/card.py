# SPDX-License-Identifier: Apache-2.0
"""The model card of a published mask, a packed or a masked model, filled from a `RunResults`. It claims nothing that they do not hold.

Everything from the results is treated as foreign text: it is escaped for Markdown and HTML, kept on one line, and never
rendered as a template.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ConfigError
from ..files import write_file
from ..pattern import NMPattern
from ..results import RunResults, is_finite
from .card_body import KINDS, Kind, card_body, is_hub_id
from .markdown import one_line

if TYPE_CHECKING:
    from ..adapter import NMSparseConfig


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
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} of a model card; expected 'mask', 'packed' or 'masked'")
    template = importlib.resources.files(__package__).joinpath("MODEL_CARD_TEMPLATE.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(results, kind, license, language, repo_id),
        template_str=template,
        **card_body(results, kind, repo_id),
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
    fresh = dict(_SECTION.findall(new.text))
    card.text = _SECTION.sub(
        lambda found: found[1] + (fresh.get(found[1], found[2]) if found[1] in _MEASURED else found[2]), card.text
    )
    order = list(fresh)
    for place, title in reversed(list(enumerate(order))):
        if title in _MEASURED and not _has_section(card.text, title):
            after = next((later for later in order[place + 1 :] if _has_section(card.text, later)), None)
            at = len(card.text) if after is None else card.text.index(f"\n## {after}\n") + 1
            card.text = f"{card.text[:at]}## {title}{fresh[title]}{card.text[at:]}"
    return write_file(path, str(card))


def _has_section(text: str, title: str) -> bool:
    return f"\n## {title}\n" in text


_MEASURED = ("Held-out perplexity", "Tasks", "Agreement with the dense model", "Speed", "Limits")
_SECTION = re.compile(r"(?<=^## )(.+?)(\n.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)  # its title, and the rest


def terms_of(config: NMSparseConfig) -> dict[str, int]:
    """What a mask adapter trains besides its mask, as `RunResults.terms` has it."""
    names = ("slorb_block", "slorb_train_projection", "low_rank", "delta_rank")
    return {name: int(value) for name in names if (value := getattr(config, name))}


# --- metadata -------------------------------------------------------------------------------------------------------
def _metadata(
    results: RunResults, kind: Kind, license: str | None, language: str | Sequence[str] | None, repo_id: str | None
) -> ModelCardData:
    base = results.base_model if is_hub_id(results.base_model) else None
    pattern = results.parsed_pattern
    nm = isinstance(pattern, NMPattern)
    tags = ["nmsparse", "mask" if kind == "mask" else None, str(pattern) if nm else None, "sparsity", "pruned"]
    if not results.pattern or nm:
        tags.append("semi-structured-sparsity")
    evaluations = _evaluations(results, kind)
    languages = [language] if isinstance(language, str) else [*(language or ())]
    return ModelCardData(
        base_model=base,
        base_model_relation=KINDS[kind][1] if base else None,
        library_name=KINDS[kind][2],
        pipeline_tag="text-generation",
        tags=[tag for tag in tags if tag],
        license=one_line(license) if license else None,
        language=[one_line(code) for code in languages] or None,
        metrics=list(dict.fromkeys(result.metric_type for result in evaluations)) or None,
        eval_results=evaluations or None,
        model_name=_model_name(results, kind, repo_id) if evaluations else None,
    )


def _evaluations(results: RunResults, kind: Kind) -> list[EvalResult]:
    """The perplexities and task scores of what the repository holds, as far as the results say which those are."""
    papers = (entry for entry in results.evaluations if entry.get("stride") is None)  # others are another measure
    found = {one_line(entry.get("text")): entry.get("this") for entry in papers}
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
    ] + [
        EvalResult(
            task_type="text-generation",
            dataset_type=one_line(entry.get("task")),
            dataset_name=one_line(entry.get("task")),
            metric_type=one_line(entry.get("metric")),
            metric_value=entry["this"],
        )
        for entry in results.tasks
        if is_finite(entry.get("this")) and entry.get("task") and entry.get("metric") and _is_score(entry)
    ]


def _is_score(entry: dict[str, Any]) -> bool:
    """Whether the Hub knows such a metric; log-likelihoods and comparisons with the dense model mean nothing without it."""
    return is_finite(entry.get("chance")) or str(entry.get("measured_by")).startswith("lm-eval")


def _own_perplexity(results: RunResults, kind: Kind) -> float | None:
    """`None` when the results do not say which row is that of the repository."""
    rows = {name: value for name, value in results.perplexity.items() if is_finite(value)}
    masks = [name for name in rows if name.strip().lower() != "dense"]
    wanted = [*(["packed"] if kind == "packed" else []), "learned", results.method]
    row = next((name for name in wanted if name in masks), masks[0] if len(masks) == 1 else None)
    return None if row is None else rows[row]


def _model_name(results: RunResults, kind: Kind, repo_id: str | None) -> str:
    if repo_id:
        return one_line(repo_id).rsplit("/", 1)[-1]
    base = re.split(r"[/\\]", one_line(results.base_model or "model").rstrip("/\\"))[-1]
    pattern = results.parsed_pattern
    return f"{base}-{pattern}-{kind}" if isinstance(pattern, NMPattern) else f"{base}-{kind}"
