# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, asked of a model that is already loaded: dense, masked, PEFT, merged or packed."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError, HubError, UnsupportedError
from .harness_process import SEED, kept_environment, kept_random_state, progress_bars, quiet_logger
from .harness_scores import scores_of
from .running import evaluating, input_device
from .scores import TaskScore

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_WANDA = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_MASKLLM = ("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# The zero-shot sets that papers report; ask them with shots=0.
SUITES: dict[str, tuple[str, ...]] = {
    "wanda": _WANDA,  # Wanda, arXiv 2306.11695
    "ast": _WANDA,  # AST, arXiv 2407.20584
    "maskllm": _MASKLLM,  # MaskLLM, arXiv 2409.17481
    "patch": (*_MASKLLM, "mmlu"),  # PATCH: MaskLLM's and MMLU
}
_ITEMS_PER_BATCH = 8
# Draws for the standard error of metrics that have no formula for it. lm-eval's 100,000 take minutes on one core.
_BOOTSTRAP_DRAWS = 1000


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizer | PreTrainedTokenizerFast,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    include_path: str | Path | None = None,
    progress: bool = False,
) -> list[TaskScore]:
    """Ask a model the tasks of lm-evaluation-harness.

    The model is left as it was, and so are the tokenizer and the state of the random number generators. Each task is asked by
    itself from the same seeds: its scores do not depend on the tasks beside it. Two models are compared by asking one after
    the other; `task_entry` then checks that they were given the same items. Log-probabilities are taken in float32, where
    lm-eval by default keeps the dtype of the model: in bfloat16 a sum near -50 would be rounded to quarters.

    Args:
        model (`nn.Module`): a causal language model, in the mode, and with the adapter on or off, that is to be measured.
        tokenizer: its tokenizer, with an eos token.
        tasks (`Sequence[str]`): names of tasks, tags or groups, of lm-eval's own or of the YAML files below `include_path`,
            for example `SUITES["wanda"]`. A group with an aggregate of its own, as "mmlu", gives one row for each metric of
            that; other groups, and tags, the rows of their tasks.
        shots (`int`, *optional*): solved examples before each item; by default as the task has it, mostly none. A task that
            fixes them at 0 keeps 0, which is logged.
        limit (`int` or `float`, *optional*): only the first items of each task (of each in a group), or this share of them.
        batch_size (`int`, *optional*): texts a forward pass, 8 by default.
        max_length (`int`, *optional*): tokens of the longest text, by default the model's context; longer ones lose their
            beginning, which lm-eval logs, and texts scored as a whole are cut into windows of it.
        include_path (`str` or `Path`, *optional*): folder with tasks of your own as YAML files, as lm-eval reads them; they
            go before lm-eval's of the same name. Such files can run the Python code that they name: only take those you
            trust.
        progress (`bool`): show progress bars, if standard error is a terminal.

    Returns:
        `list[TaskScore]`: one a task and metric, in the order of `tasks`. Metrics have lm-eval's names; a filter other than
        "none" is added, as in `"exact_match (strict-match)"`.

    Raises:
        UnsupportedError: without lm-eval, or if a task runs code that the model writes, or needs images or sound.
        ConfigError: if an argument is out of range, a task unknown or not what lm-eval expects of one.
        HubError: if the data of a task cannot be fetched.
    """
    _check(tasks, shots, limit, batch_size, max_length)
    _check_model(model, tokenizer)
    with kept_environment():
        lm_eval = _lm_eval()
        with progress_bars(progress and sys.stderr.isatty()), evaluating(model):
            index = _index(tasks, include_path)
            # All of them first: a data set that is out of reach should be known before hours of measuring.
            loaded = {name: _load(index, name, shots) for name in tasks}
            asked = _wrapped(model, tokenizer, batch_size, max_length)
            for found in loaded.values():
                _check_lengths(found["tasks"].values(), asked.max_length)
            scores = []
            for name, found in loaded.items():
                with kept_random_state():
                    results = lm_eval.evaluate(
                        lm=asked, task_dict=found, limit=limit, bootstrap_iters=_BOOTSTRAP_DRAWS, log_samples=True
                    )
                scores += scores_of(name, list(found["tasks"]), results, f"lm-eval {lm_eval.__version__}")
    return scores


def _check(
    tasks: Sequence[str],
    shots: int | None,
    limit: int | float | None,
    batch_size: int | None,
    max_length: int | None,
) -> None:
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise ConfigError(f"tasks={tasks!r}; expected a list of names, for example ['arc_easy'] or SUITES['wanda']")
    if shots is not None and not _is_count(shots, at_least=0):
        raise ConfigError(f"shots={shots!r}; expected an integer, 0 or more, or None for what each task has")
    if limit is not None and not _is_count(limit) and not (isinstance(limit, float) and 0 < limit < 1):
        # lm-eval takes 0 for all items and 1.0 for one item.
        raise ConfigError(f"limit={limit!r}; expected a number of items, a share of them between 0 and 1, or None")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and not _is_count(value):
            raise ConfigError(f"{name}={value!r}; expected an integer, 1 or more, or None")


def _is_count(value: Any, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _check_model(model: nn.Module, tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder; tasks are asked of causal language models"
        )
    if not isinstance(tokenizer, (PreTrainedTokenizer, PreTrainedTokenizerFast)):
        raise UnsupportedError(
            f"the tokenizer is a {type(tokenizer).__name__}; lm-eval takes those that AutoTokenizer.from_pretrained gives"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos token, with which lm-eval ends what is generated, pads, and (without a bos token) begins "
            "a text; set tokenizer.eos_token to a token that the model knows"
        )


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise UnsupportedError(
            f"tasks need lm-evaluation-harness, which cannot be imported here ({error}): pip install 'hf-nmsparse[eval]'"
        ) from error
    return lm_eval


@functools.cache
def _own_tasks_of_lm_eval() -> TaskManager:
    """Once a process: reading 14,000 YAML files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _index(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """Where the tasks are described: `include_path` alone if that suffices, which saves reading lm-eval's own files.

    Raises:
        ConfigError: if a task is in neither, or there is no such folder.
    """
    if include_path is None:
        index = _own_tasks_of_lm_eval()
    else:
        from lm_eval.tasks import TaskManager

        if not Path(include_path).is_dir():
            raise ConfigError(f"include_path={str(include_path)!r}: no such folder; name one with YAML files of tasks")
        index = TaskManager(include_path=str(include_path), include_defaults=False)
        if _missing(tasks, index):
            index = TaskManager(include_path=str(include_path))
    for name in tasks:
        if name not in index.task_index:
            close = difflib.get_close_matches(name, index.all_tasks, n=3)
            raise ConfigError(
                f"there is no task {name!r}"
                + (f"; did you mean {', '.join(close)}?" if close else "")
                + " Tasks are lm-eval's own (`lm_eval ls tasks` lists them) and those in YAML files below include_path, of "
                "which lm-eval leaves out, without a word, any that it cannot read"
            )
    return index


def _missing(names: Sequence[str], index: TaskManager) -> list[str]:
    """Names that the index lacks, among them and the members of those that are groups."""
    missing = []
    for name in names:
        if name not in index.task_index:
            missing.append(name)
        elif name in index.all_groups:
            members = index.task_index[name].cfg.get("task")
            members = members if isinstance(members, list) else []
            missing += _missing([m if isinstance(m, str) else m.get("group", m.get("task")) for m in members], index)
    return missing


def _load(index: TaskManager, name: str, shots: int | None) -> dict[str, Any]:
    """A task, or the tasks of a group, with their data: lm-eval's {"tasks": ..., "groups": ...}."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    entry = index.task_index[name]
    config = entry.cfg or {}
    try:
        # What it has to say of a task is for its author: which defaults it takes.
        with kept_random_state(), quiet_logger("lm_eval.api.task"):
            loaded = index.load(name)
    except OSError as error:
        # Of a group only the error tells: all that the Hub raises is of a class of its own.
        if "data_files" in (config.get("dataset_kwargs") or {}) or type(error) is FileNotFoundError:
            raise ConfigError(
                f"task {name!r}: the data that {entry.yaml_path} names cannot be read ({error})"
            ) from error
        data = f"data set {config['dataset_path']}" if "dataset_path" in config else "data"
        raise HubError(
            f"task {name!r}: its {data} comes from the Hub and could not be fetched ({error}); run once with network, after "
            "which it is in the cache, or give a task of your own: a YAML file below include_path with local data_files"
        ) from error
    except (DatasetsError, TemplateError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"task {name!r}: lm-eval cannot build it from {entry.yaml_path} ({type(error).__name__}: {error})"
        ) from error
    for task in loaded["tasks"].values():
        _refuse_unfit(task)
        _set_shots(task, shots)
    return loaded


def _refuse_unfit(task: Task) -> None:
    """lm-eval sets these two only on tasks that they are true of."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UnsupportedError(
            f"task {task.task_name!r} runs code that the model writes; use lm-eval itself, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UnsupportedError(f"task {task.task_name!r} needs images or sound; only tasks of text are asked here")


def _set_shots(task: Task, shots: int | None) -> None:
    """As `lm_eval.simple_evaluate` does, which is not used because it runs git, pip and nvidia-smi to describe the machine."""
    from lm_eval.api.task import ConfigurableTask

    fixed = task.get_config("num_fewshot")
    if fixed == 0 and shots:
        logger.warning("task %s fixes its examples at 0; shots=%d is not followed", task.task_name, shots)
    elif shots is not None or fixed is None:
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(SEED)
    wanted = task.get_config("num_fewshot")
    if not wanted or not isinstance(task, ConfigurableTask):
        return
    config = task.config
    if not (config.training_split or config.validation_split or task.fewshot_cfg.split or task.fewshot_cfg.samples):
        # lm-eval would draw them from the items, and not leave out the item that is asked.
        raise ConfigError(
            f"task {task.task_name!r} has no examples but its own items, so it can only be asked with shots=0"
        )
    examples = len(task.sampler.fewshot_docs())
    among_items = task.fewshot_cfg.split == config.test_split  # then lm-eval draws one more, and leaves the item out
    if wanted + among_items > examples:
        raise ConfigError(
            f"shots={wanted}: task {task.task_name!r} has {examples - among_items} examples; lower shots"
        )


def _check_lengths(tasks: Iterable[Task], max_length: int) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until":
            continue
        new = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]
        if new >= max_length:
            raise ConfigError(
                f"task {task.task_name!r} generates up to {new} tokens, which leaves none of max_length={max_length} for the "
                "question; set max_gen_toks in its generation_kwargs, or take a model with a longer context"
            )


class _Face:
    """What lm-eval is shown of a model: it can ask, but not change its mode, tie its weights or count its parameters.

    Args:
        model (`nn.Module`): a causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.config = model.config
        # `model.device` is that of the first parameter, which offloading leaves on the meta device.
        self.device = input_device(model)

    def __call__(self, tokens: torch.Tensor) -> Any:
        return self._model(input_ids=tokens, use_cache=False)

    def generate(self, **arguments: Any) -> torch.Tensor:
        return self._model.generate(**arguments)


def _wrapped(model: nn.Module, tokenizer: Any, batch_size: int | None, max_length: int | None) -> HFLM:
    from lm_eval.models.huggingface import HFLM

    with quiet_logger("lm_eval.models.huggingface"):  # it warns of arguments that are ignored for a loaded model
        return HFLM(
            pretrained=_Face(model),
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            batch_size=batch_size or _ITEMS_PER_BATCH,
            max_length=max_length,
            softmax_dtype="float32",
        )
