# SPDX-License-Identifier: Apache-2.0
"""Loading: models, masks on models, tokenizers and texts, by Hub id or local path."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NMSparseError
from ..files import RESULTS_FILE, read_json
from .common import command_line, new_results
from .folders import Kind, kind_of
from .options import Dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..results import RunResults

logger = logging.getLogger(__name__)

DEFAULT_SEQUENCE_LENGTH = 2048
# Left out, Transformers would ask at a terminal whether to run the code that a repo brings along.
_NO_CODE = {"trust_remote_code": False}


@contextlib.contextmanager
def fetching(source: str) -> Iterator[None]:
    """Turn what libraries raise for a model or mask that is absent or unreadable into one clear error.

    Raises:
        ConfigError: naming the source, the reason and what to do.
    """
    looks_like_path = source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or "\\" in source
    local = Path(source).exists()
    if looks_like_path and not local:
        raise ConfigError(f"{source}: no such folder")
    if local and not Path(source).is_dir():
        raise ConfigError(f"{source} is a file; name the folder that holds it")
    try:
        yield
    except NMSparseError:
        raise
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if local or not isinstance(error, OSError):
            raise ConfigError(f"{source}: {' '.join(' '.join(lines).split())}") from error
        raise ConfigError(
            f"could not fetch {source} ({lines[0].rstrip('.')}); give a local path or check the network"
        ) from error


def locate(source: str, weights: bool = False, revision: str | None = None, task: str | None = None) -> Path:
    """A local folder with the configs of a model or mask, and with its weights if wanted. Repos are fetched.

    Raises:
        HubError: if it is not there and cannot be fetched.
        NotADirectoryError: if it is a local file.
    """
    from ..hub.remote import local_folder

    quiet_unless_watched()
    patterns = ["*.json", *(["*.safetensors"] if weights else [])]
    folder = local_folder(source, revision, task, patterns)
    if not folder.is_dir():  # of a repo none of whose files were wanted, there is none either
        if task is None:
            raise ConfigError(
                f"{source} holds no mask and no model; of a repo with masks of several tasks name one with --task"
            )
        raise ConfigError(f"{source} has no subfolder {task!r}")
    return folder


def empty_model(source: str) -> nn.Module:
    """The dense model of a config, on the meta device: shapes and dtypes, no weights fetched or allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .._compat import note_source

    commit = _commit(source, _model_folder(source))
    with fetching(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, revision=commit or "main", **_NO_CODE)
        model = AutoModelForCausalLM.from_config(config, **_NO_CODE)
    note_source(model, source, commit)
    return model


def load_model(
    source: str,
    dtype: Dtype = Dtype.AUTO,
    device: str | None = "cpu",
    device_map: dict[str, str] | None = None,
    offload_folder: Path | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A causal language model, dense or packed, in eval mode; a bitmask of compressed-tensors becomes dense with zeros.

    Args:
        source (`str`): Hub id or folder.
        dtype (`Dtype`): to load it in.
        device (`str`, *optional*): where to; `None`: a GPU if there is one.
        device_map (`dict[str, str]`, *optional*): instead of `device`, where each part goes, "disk" among them.
        offload_folder (`Path`, *optional*): for what stays on disk and is not stored as the model has it (fused experts).
        revision (`str`, *optional*): of a Hub repo.
    """
    from transformers import AutoModelForCausalLM

    from .._compat import note_source

    quiet_unless_watched()
    folder = _model_folder(source, revision)
    if kind_of(folder) is Kind.BITMASK:  # Transformers would give it random weights
        return _load_bitmask(source, dtype, device, device_map)
    if device_map is not None:  # whoever asked for "disk" knows that parameters are offloaded
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    commit = _commit(source, folder)
    with fetching(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype.value,
            use_safetensors=True,
            device_map=device_map or chosen_device(device),
            offload_folder=offload_folder,
            revision=commit or "main",
            **_NO_CODE,
        )
    note_source(model, source, commit)
    return model.eval()


def chosen_device(device: str | None) -> str:
    """The device that was named, else a GPU if there is one.

    Raises:
        ConfigError: if there is no such device here.
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    present = ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if device is not None and device not in present:
        raise ConfigError(f"--device {device}: no such device here; there is {', '.join(present)}")
    return device or ("cuda" if gpus else "cpu")


def _model_folder(source: str, revision: str | None = None) -> Path:
    """A folder with the config of a plain model; of an adapter, Transformers would load the base with the adapter on it."""
    folder = locate(source, revision=revision)
    kind = kind_of(folder)
    if kind in (Kind.MASK, Kind.CHECKPOINT, Kind.ADAPTER):
        raise ConfigError(f"{source} is no model ({kind.value}); name its base model here")
    _refuse_other_tasks(source, folder)
    return folder


def _refuse_other_tasks(source: str, folder: Path) -> None:
    """`AutoModelForCausalLM` would refuse the model with pages of names, or leave out a part of it without a word."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = read_json(folder / "config.json") or {}
    stored = (config.get("architectures") or [None])[0]
    headless = stored is None or "For" not in stored  # a body alone, of which the model type tells
    fits = config.get("model_type") in CAUSAL if headless else stored in CAUSAL.values()
    known = fits and not config.get("is_encoder_decoder")
    if not config.get("model_type") or "auto_map" in config or known:
        return
    raise ConfigError(
        f"{source} is a {stored or config['model_type']}, and the commands work on causal language models only. In Python all "
        "models go the whole line: load it with its own class, then nms.prune or get_peft_model, nms.save_mask, nms.compress "
        '(docs/METHODS.md, "Which layers")'
    )


def _commit(source: str, folder: Path) -> str | None:
    """The commit of a fetched repo: its folder in the cache is called after it."""
    return None if Path(source).exists() else folder.name


def _load_bitmask(source: str, dtype: Dtype, device: str | None, device_map: dict[str, str] | None) -> nn.Module:
    from ..hub import load_bitmask

    if device_map is not None and "disk" in device_map.values():
        raise ConfigError(
            f"{source} is stored as a bitmask, which cannot be read from disk part by part; write it as a plain model first "
            "(nmsparse export --format dense)"
        )
    with fetching(source):
        return load_bitmask(source, dtype=dtype.value, device=chosen_device(device))


def put_mask(
    model: nn.Module,
    mask: str,
    revision: str | None = None,
    task: str | None = None,
    allow_base_mismatch: bool = False,
) -> nn.Module:
    """The model with a published mask on it."""
    from ..hub import load_mask

    with fetching(mask):
        return load_mask(model, mask, revision=revision, task=task, allow_base_mismatch=allow_base_mismatch)


def base_of(folder: Path) -> str:
    """Hub id or path of the base model that a mask or checkpoint names.

    Raises:
        ConfigError: if it names none.
    """
    base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{folder} does not say which base model it is for; give the base model and pass it as --mask"
        )
    return base


def load_any(source: str, dtype: Dtype, device: str | None) -> tuple[nn.Module, str]:
    """A model, or the base of a mask or checkpoint with it on, and the name under which the tokenizer is found."""
    folder = locate(source)
    kind = kind_of(folder)
    if kind is Kind.ADAPTER:
        raise ConfigError(f"{source} is an adapter of another PEFT method; merge it into its base model first")
    if kind not in (Kind.MASK, Kind.CHECKPOINT):
        return load_model(source, dtype, device), source
    base = base_of(folder)
    model = load_model(base, dtype, device)
    if kind is Kind.MASK:
        return put_mask(model, source), base
    from peft import PeftModel

    with fetching(source):
        return PeftModel.from_pretrained(model, source).eval(), base


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: if there is none.
    """
    from transformers import AutoTokenizer

    with fetching(source):
        return AutoTokenizer.from_pretrained(source, **_NO_CODE)


def copy_tokenizer(source: str, folder: Path) -> None:
    """Save the tokenizer of `source` beside a model; where it has none, that is logged."""
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError as error:
        logger.warning("no tokenizer was written: %s", error)
        return
    tokenizer.save_pretrained(folder)


def window_length(model: nn.Module, wanted: int | None) -> int:
    """Tokens a window: what is wanted, else 2048 or the model's context if that is shorter.

    Raises:
        ConfigError: if more is wanted than the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            f"--sequence-length {wanted}: the model takes at most {context} tokens; give {context} or fewer"
        )
    return wanted if wanted is not None else min(DEFAULT_SEQUENCE_LENGTH, context or DEFAULT_SEQUENCE_LENGTH)


def stream(source: str, tokenizer: Any, split: str = "train", joined: bool = False) -> torch.Tensor:
    """The tokens of a text source, int64 `[tokens]`.

    Args:
        source (`str`): file, folder or dataset, see `hf_nmsparse.data.load_text`.
        tokenizer: the tokenizer.
        split (`str`): of a dataset.
        joined (`bool`): join documents by a blank line and tokenise them as one, as perplexity on WikiText wants.
    """
    from ..data import load_text, tokenize

    texts = load_text(source, split)
    return tokenize("\n\n".join(texts) if joined else texts, tokenizer)


def text_name(source: str) -> str:
    """What to call a text in records that are published: of a local file or folder the name, and not where it lies."""
    return Path(source).name if Path(source).exists() else source


def continued_results(source: str) -> RunResults:
    """What is known of an input by the results file that lies in its local folder, with this command added."""
    from ..results import RunResults

    path = Path(source) / RESULTS_FILE
    results = RunResults.read(path) if path.is_file() else new_results(command=None)
    results.command = "\n".join(filter(None, (results.command, command_line())))
    return results


def revision_of(model: nn.Module) -> str | None:
    """Commit of the repo that a model was loaded from."""
    from .._compat import loaded_from

    return loaded_from(model)[1]


def quiet_unless_watched() -> None:
    """No progress bars of the Hugging Face libraries where standard error is no terminal."""
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
