# SPDX-License-Identifier: Apache-2.0
"""The items of LLM-KICK's tasks: from JSONL files of one's own, or from the datasets of the paper on the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, UnsupportedError

logger = logging.getLogger(__name__)

# kind -> its fields: name -> (what it must be, whether it must be there)
KINDS: dict[str, dict[str, tuple[str, bool]]] = {
    "factoid": {"question": ("text", True), "answers": ("texts", True)},
    "choice": {
        "question": ("text", False),
        "prompt": ("text", False),
        "options": ("options", True),
        "answer": ("index", True),
        "subject": ("text", False),
    },
    "retrieval": {"question": ("text", True), "answers": ("texts", True), "context": ("text", True)},
    "summary": {"text": ("text", True), "summary": ("text", False)},
    "instruction": {"turns": ("texts", True)},
}
EXAMPLES = "-examples"  # choice-NAME-examples.jsonl: solved items, shown before each of choice-NAME.jsonl


@dataclass(frozen=True)
class KickTask:
    """One task: items of one kind.

    Args:
        name (`str`): of its file, without the ending: the kind, or the kind and a name of one's own ("choice-law").
        kind (`str`): "factoid", "choice", "retrieval", "summary" or "instruction".
        items (`tuple[dict, ...]`): the items, with the fields of their kind.
        examples (`tuple[dict, ...]`): solved items of multiple choice, shown before each item.
    """

    name: str
    kind: str
    items: tuple[dict[str, Any], ...]
    examples: tuple[dict[str, Any], ...] = ()

    @property
    def writes(self) -> bool:
        """Whether texts are to be written, which have no right answer to be compared with."""
        return self.kind in ("summary", "instruction")

    @property
    def sha256(self) -> str:
        """Of all that is asked."""
        return hashlib.sha256(json.dumps([self.kind, self.items, self.examples], sort_keys=True).encode()).hexdigest()

    def limited(self, limit: int | None) -> KickTask:
        """The same with `limit` of its items, drawn by chance but always the same ones, in their order.

        Raises:
            ConfigError: if the limit is below 1.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"limit={limit}; expected at least 1 item of {self.name}")
        if limit is None or limit >= len(self.items):
            return self
        chosen = sorted(random.Random(0).sample(range(len(self.items)), limit))
        return KickTask(self.name, self.kind, tuple(self.items[index] for index in chosen), self.examples)


def read_tasks(folder: str | Path, names: Iterable[str] | None = None) -> list[KickTask]:
    """The tasks of a folder: one JSONL file each, called as its kind, or `KIND-NAME.jsonl`.

    Args:
        folder (`str` or `Path`): holds the files; others in it are left alone.
        names (`Iterable[str]`, *optional*): only these tasks.

    Raises:
        ConfigError: if there is none, a name is unknown, or examples are of no task of multiple choice.
        FormatError: if a file does not hold what its kind needs, with its line.
    """
    folder, wanted = Path(folder), None if names is None else set(names)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; it should hold {', '.join(f'{kind}.jsonl' for kind in KINDS)}")
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stem.split("-")[0] in KINDS}
    asked = {name: path for name, path in paths.items() if not name.endswith(EXAMPLES)}
    if wanted is not None and (unknown := sorted(wanted - asked.keys())):
        raise ConfigError(f"{folder} has no task {unknown[0]}; it has {', '.join(asked) or 'none'}")
    if not asked:
        raise ConfigError(f"{folder} holds no task; call the files {', '.join(f'{kind}.jsonl' for kind in KINDS)}")
    for name in paths.keys() - asked.keys():
        task = name.removesuffix(EXAMPLES)
        if task not in asked or not task.startswith("choice"):
            raise ConfigError(
                f"{paths[name]}: examples are shown before items of multiple choice, and {folder} has no such task {task}"
            )
    tasks = []
    for name, path in asked.items():
        if wanted is None or name in wanted:
            examples = paths.get(name + EXAMPLES)
            kind = name.split("-")[0]
            tasks.append(KickTask(name, kind, _read(path, kind), _read(examples, kind) if examples else ()))
    return tasks


def _read(path: Path, kind: str) -> tuple[dict[str, Any], ...]:
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
                raise FormatError(f"{path}, line {number}: not JSON ({error}); write one object a line") from error
            items.append(checked_item(item, kind, f"{path}, line {number}"))
    if not items:
        raise FormatError(f"{path} holds no item")
    return tuple(items)


def checked_item(item: Any, kind: str, where: str) -> dict[str, Any]:
    """The fields of an item that its kind knows.

    Raises:
        FormatError: if one is missing or of another type.
    """
    if not isinstance(item, dict):
        raise FormatError(f"{where}: expected an object with {', '.join(KINDS[kind])}, got {type(item).__name__}")
    found = {}
    for name, (form, required) in KINDS[kind].items():
        value = item.get(name)
        if value is None and not required:
            continue
        if not _has_form(value, form, item):
            raise FormatError(f"{where}: {name} should be {_FORMS[form]}; got {json.dumps(value)[:80]}")
        found[name] = value
    if kind == "choice" and ("question" in found) == ("prompt" in found):
        raise FormatError(f"{where}: give either a question, or a prompt that the options go on as it stands")
    return found


_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # which JSON can hold, and no tokenizer takes
_FORMS = {
    "text": "a text that is not empty",
    "texts": "a list of texts that are not empty",
    "options": "a list of 2 to 26 texts that are not empty",
    "index": "the index of an option, from 0",
}


def _has_form(value: Any, form: str, item: dict[str, Any]) -> bool:
    if form == "text":
        return isinstance(value, str) and bool(value.strip()) and not _HALF_A_CHARACTER.search(value)
    if form in ("texts", "options"):
        few, many = (1, len(value) if isinstance(value, list) else 0) if form == "texts" else (2, 26)
        right = isinstance(value, list) and few <= len(value) <= many
        return right and all(_has_form(text, "text", item) for text in value)
    return type(value) is int and 0 <= value < len(item["options"])  # a list: options come before their index


# --- the Hub --------------------------------------------------------------------------------------------------------
def _freebase_qa(row: dict) -> dict:
    """FreebaseQA (Jiang et al. 2019): each question has parses, each of them answers with several names."""
    return {"question": row["RawQuestion"], "answers": sorted(set(_texts(_below(row["Parses"], "AnswersName"))))}


def _mmlu(row: dict) -> dict:
    subject = row["subject"].replace("_", " ")
    return {
        "question": row["question"],
        "options": list(row["choices"]),
        "answer": int(row["answer"]),
        "subject": subject,
    }


def _trivia_qa(row: dict) -> dict:
    """Reading comprehension: pages of Wikipedia first, then of the search, as LLM-KICK joins them."""
    pages = [_below(row["entity_pages"], "wiki_context"), _below(row["search_results"], "search_context")]
    answers = [row["answer"]["value"], *row["answer"]["aliases"]]
    return {"question": row["question"], "answers": _texts(answers), "context": "\n".join(_texts(pages))}


def _cnn_dailymail(row: dict) -> dict:
    return {"text": row["article"], "summary": row["highlights"]}


def _mt_bench(row: dict) -> dict:
    return {"turns": list(row["prompt"])}


def _below(nested: Any, name: str) -> list[Any]:
    """What stands under a name at any depth: `datasets` gives lists of structs, or structs of lists, by its version."""
    if isinstance(nested, dict):
        if name in nested:
            return [nested[name]]
        nested = list(nested.values())
    return [found for part in nested for found in _below(part, name)] if isinstance(nested, list) else []


def _texts(nested: Any) -> list[str]:
    """The texts of lists of lists, without empty ones."""
    if isinstance(nested, str):
        return [nested] if nested.strip() else []
    return [text for part in nested or () for text in _texts(part)]


@dataclass(frozen=True)
class HubTask:
    """Where the items of a task lie on the Hub, and how its rows are read.

    `buffer`: rows among which a limited number is drawn. MMLU is sorted by subject: all of it must be in there.
    """

    kind: str
    repo: str
    config: str | None
    split: str
    item: Callable[[dict], dict]
    revision: str | None = None
    examples: str | None = None  # the split with solved items
    buffer: int = 20_000


HUB_TASKS = {
    "factoid": HubTask("factoid", "KelvinJiang/freebase_qa", None, "test", _freebase_qa, "refs/convert/parquet"),
    "choice": HubTask("choice", "cais/mmlu", "all", "test", _mmlu, examples="dev"),
    "retrieval": HubTask(
        "retrieval", "mandarjoshi/trivia_qa", "rc", "validation", _trivia_qa, buffer=2000
    ),  # 0.1 MB a row
    "summary": HubTask("summary", "abisee/cnn_dailymail", "3.0.0", "test", _cnn_dailymail),
    "instruction": HubTask("instruction", "HuggingFaceH4/mt_bench_prompts", None, "train", _mt_bench),
}
HUB_LIMIT = 500  # items of a task, where no limit is given


def fetch_tasks(names: Iterable[str] | None = None, limit: int | None = None) -> list[KickTask]:
    """The tasks of the paper from the Hub, `limit` items each (500 by default), read as a stream.

    Args:
        names (`Iterable[str]`, *optional*): only these.
        limit (`int`, *optional*): items of each, drawn by chance but always the same ones. Rows that lack an answer or
            a text are left out, and counted in a warning.

    Raises:
        ConfigError: if a name is unknown, the limit is below 1, or a dataset cannot be fetched.
        UnsupportedError: if `datasets` is not installed.
    """
    wanted = list(HUB_TASKS) if names is None else list(names)
    if unknown := [name for name in wanted if name not in HUB_TASKS]:
        raise ConfigError(
            f"no task {unknown[0]} on the Hub; there are {', '.join(HUB_TASKS)}, or tasks in a folder of your own"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}; expected at least 1 item of each task")
    return [_fetch(name, HUB_TASKS[name], HUB_LIMIT if limit is None else limit) for name in wanted]


def _fetch(name: str, task: HubTask, limit: int) -> KickTask:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            "tasks from the Hub need the package datasets: pip install 'hf-nmsparse[eval]'"
        ) from error

    def read(split: str, limit: int | None) -> tuple[dict[str, Any], ...]:
        rows = datasets.load_dataset(task.repo, task.config, split=split, streaming=True, revision=task.revision)
        rows = rows if limit is None else rows.shuffle(seed=0, buffer_size=task.buffer)
        items, left_out = [], 0
        for row in rows:
            try:
                items.append(checked_item(task.item(row), task.kind, place))
            except FormatError:
                left_out += 1
            if len(items) == limit:
                break
        if left_out:
            logger.warning("%s, %s: %d rows without an answer or a text were left out", task.repo, split, left_out)
        return tuple(items)

    place = f"{task.repo} ({task.config or 'default'}, {task.split})"
    try:
        items = read(task.split, limit)
        examples = read(task.examples, None) if task.examples else ()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # what datasets raises without network, or for other columns
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{name}: could not read {place} from the Hub ({reason}); check the network, or give a folder of JSONL files"
        ) from error
    if not items:
        raise ConfigError(f"{name}: {place} gave no items")
    return KickTask(name, task.kind, items, examples)
