# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: tiny random models, built offline."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Kernels compiled once for this checkout; and no times that its user has measured.
os.environ["NMSPARSE_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "nmsparse")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # what they measure with, tests measure with too

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_nmsparse  # noqa: F401  (registers the adapter and the quantizer)

VOCABULARY = 64


def llama_config(**changes) -> LlamaConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_llama():
    """Builds the same tiny Llama each time it is called."""

    def build(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return LlamaForCausalLM._from_config(llama_config(**changes), dtype=dtype).eval()

    return build


@pytest.fixture
def llama(make_llama) -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def base_folder(make_llama, tmp_path_factory):
    """A folder with the tiny Llama, saved."""
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    """int64 `[8, 16]`."""
    return torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def there(inputs, tmp_path, monkeypatch) -> Path:
    """An empty working folder beside links to what the `inputs` of a test file holds."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
