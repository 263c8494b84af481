# SPDX-License-Identifier: Apache-2.0
"""Texts to tokens to windows to batches."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch.utils.data import DataLoader

from hf_nmsparse.data import TokenWindows, calibration_batches, load_text, tokenize, windows
from hf_nmsparse.errors import ConfigError


class LetterTokenizer:
    """One token a letter, a = 0. Remembers what it was given, and refuses to be asked for warnings."""

    def __init__(self, eos_token_id: int | None = 99):
        self.eos_token_id = eos_token_id
        self.seen: list[str] = []

    def __call__(self, text, verbose=True):
        assert not verbose
        self.seen.append(text)
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class TestLoadText:
    def test_a_text_file_is_one_document(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
        assert load_text(tmp_path / "a.txt") == ["one\n\ntwo é\n"]
        assert load_text(str(tmp_path / "a.txt")) == ["one\n\ntwo é\n"]

    def test_a_folder_and_a_glob_give_their_files_in_order_of_name(self, tmp_path):
        for name in ("b.txt", "a.txt", "c.jpg"):
            (tmp_path / name).write_text(name)
        assert load_text(tmp_path) == ["a.txt", "b.txt"]
        assert load_text(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]

    def test_jsonl_gives_one_document_a_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        # U+2028 ends a line for str.splitlines, not in JSON lines.
        path.write_text('{"text": "one\u2028more"}\n\n{"text": "two", "id": 2}\n', encoding="utf-8")
        assert load_text(path) == ["one\u2028more", "two"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [("{", "line 2: not JSON"), ('{"body": "x"}', "line 2: no string field 'text'"), ("[]", "line 2: no string")],
    )
    def test_a_bad_jsonl_line_is_named(self, tmp_path, line, message):
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
        with pytest.raises(ConfigError, match=message):
            load_text(tmp_path / "a.jsonl")

    def test_what_cannot_be_read_is_refused_with_what_can(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        (tmp_path / "bad.txt").write_bytes(b"ab\xff")
        (tmp_path / "blank.txt").write_text(" \n")
        (tmp_path / "empty").mkdir()
        cases = {
            "a.parquet": "cannot read a .parquet file; expected a text file",
            "bad.txt": "not UTF-8 text .* at byte 2",
            "blank.txt": "holds no text",
            "empty": "no text files found",
            "*.md": "no text files found",
            "missing.txt": "no such file or folder",
            "missing": "no such file or folder",
        }
        for name, message in cases.items():
            with pytest.raises(ConfigError, match=message):
                load_text(tmp_path / name)

    @pytest.mark.parametrize("source", ["corpus", "data/missing.txt", "owner/name/extra", "a b/c"])
    def test_what_is_neither_file_nor_dataset_name_says_so(self, source):
        with pytest.raises(ConfigError, match="no such file or folder; expected"):
            load_text(source)


class TestDatasets:
    """`datasets` itself is replaced: what matters is what it is asked for, and what becomes of its answers."""

    @pytest.fixture
    def fake(self, monkeypatch):
        def install(load_dataset):
            module = types.ModuleType("datasets")
            module.load_dataset = load_dataset
            monkeypatch.setitem(sys.modules, "datasets", module)

        return install

    def test_name_config_and_split_are_passed_and_rows_come_raw(self, fake):
        asked = []

        class Rows(dict):
            column_names = ("text",)

        fake(lambda *names, split: asked.append((*names, split)) or Rows(text=["", " = A = \n", "b"]))
        assert load_text("Salesforce/wikitext:wikitext-2-raw-v1", split="test") == ["", " = A = \n", "b"]
        load_text("owner/name")
        assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ("owner/name", None, "train")]

    @pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError, ValueError])
    def test_an_unknown_name_no_network_and_a_wrong_split_are_one_clear_error(self, fake, error):
        def load_dataset(*names, split):
            raise error("because of this")

        fake(load_dataset)
        with pytest.raises(ConfigError, match=r"owner/name: no such file or folder, .* 'train': because of this"):
            load_text("owner/name")

    def test_without_a_text_column_the_columns_are_named(self, fake):
        fake(lambda *names, split: types.SimpleNamespace(column_names=["body"]))
        with pytest.raises(ConfigError, match=r"columns \['body'\]; expected one named 'text'"):
            load_text("owner/name")

    def test_a_missing_package_is_said_with_the_install_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigError, match=r"pip install hf-nmsparse\[datasets\]"):
            load_text("owner/name")

    def test_the_real_package_reads_what_it_is_given(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        folder = tmp_path / "owner" / "name"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "two")))
        monkeypatch.chdir(tmp_path)
        # A folder is ours to read, so the colon form is used to reach `datasets` with a local one.
        assert load_text("owner/name:default", split="train[1:]") == ["", "two"]


class TestTokenize:
    def test_documents_are_joined_by_eos_and_empty_ones_left_out(self):
        tokens = tokenize(["ab", "", "c"], LetterTokenizer())
        assert tokens.dtype == torch.long
        assert tokens.tolist() == [0, 1, 99, 2]

    def test_without_eos_documents_follow_directly(self):
        assert tokenize(["ab", "c"], LetterTokenizer(eos_token_id=None)).tolist() == [0, 1, 2]

    def test_an_eos_the_tokenizer_added_itself_is_not_doubled(self):
        assert tokenize(["ab", "c"], LetterTokenizer(eos_token_id=1)).tolist() == [0, 1, 2]

    def test_a_single_string_is_one_document(self):
        tokenizer = LetterTokenizer()
        tokenize("abc", tokenizer)
        assert tokenizer.seen == ["abc"]

    def test_a_long_text_gives_no_warning_about_the_models_length(self, caplog):
        tokenizer = _real_tokenizer()
        tokenizer.model_max_length = 4
        with caplog.at_level("WARNING"):
            assert tokenize(["a b c d e f g h"], tokenizer).numel() == 8
        assert not caplog.records

    @pytest.mark.parametrize("texts", [[], [""], "", [b"bytes"], [["nested"]]])
    def test_nothing_to_tokenise_is_refused(self, texts):
        with pytest.raises(ConfigError, match=r"no tokens|cannot tokenise"):
            tokenize(texts, LetterTokenizer())


def _real_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh?")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


class TestWindows:
    def test_consecutive_windows_drop_the_tail(self):
        assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_random_windows_are_contiguous_seeded_and_reach_both_ends(self):
        tokens = torch.arange(10, dtype=torch.int32)
        drawn = windows(tokens, 4, samples=200, seed=3)
        assert drawn.shape == (200, 4) and drawn.dtype == torch.long
        assert torch.equal(drawn - drawn[:, :1], torch.arange(4).expand(200, 4))
        assert drawn.min() == 0 and drawn.max() == 9
        assert torch.equal(drawn, windows(tokens, 4, samples=200, seed=3))
        assert not torch.equal(drawn, windows(tokens, 4, samples=200, seed=4))

    def test_the_default_generator_is_neither_read_nor_moved(self):
        tokens = torch.arange(50)
        torch.manual_seed(1)
        first, state = windows(tokens, 4, samples=5), torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(first, windows(tokens, 4, samples=5))
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state())

    def test_one_window_of_the_whole_text_is_possible(self):
        assert windows(torch.arange(4), 4, samples=2).tolist() == [[0, 1, 2, 3]] * 2

    @pytest.mark.parametrize("samples", [None, 2])
    def test_too_few_tokens_says_got_and_expected(self, samples):
        with pytest.raises(ConfigError, match="got 3, expected at least sequence_length=4"):
            windows(torch.arange(3), 4, samples=samples)

    @pytest.mark.parametrize(
        ("tokens", "arguments", "message"),
        [
            (torch.rand(8), (4,), "float32; expected integers"),
            (torch.ones(8, dtype=torch.bool), (4,), "bool; expected integers"),
            (torch.ones(2, 8, dtype=torch.long), (4,), r"shape \[2, 8\]; expected \[tokens\]"),
            ([1, 2, 3], (2,), "tokens are list"),
            (torch.arange(8), (0,), "sequence_length=0"),
            (torch.arange(8), (4, 0), "samples=0"),
            (torch.arange(0), (4,), "tokens are empty"),
        ],
    )
    def test_bad_arguments_are_refused(self, tokens, arguments, message):
        with pytest.raises(ConfigError, match=message):
            windows(tokens, *arguments)


def test_token_windows_feed_a_trainer():
    dataset = TokenWindows(windows(torch.arange(8, dtype=torch.uint8), 4))
    assert len(dataset) == 2
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch["labels"].dtype == torch.long
    with pytest.raises(ConfigError, match=r"expected \[samples, sequence\]"):
        TokenWindows(torch.arange(8))


class TestCalibrationBatches:
    def test_tokens_are_batched(self):
        batches = list(calibration_batches(torch.arange(12, dtype=torch.int32).view(3, 4), batch_size=2))
        assert [batch["input_ids"].tolist() for batch in batches] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]]]
        assert all(batch.keys() == {"input_ids"} and batch["input_ids"].dtype == torch.long for batch in batches)

    def test_model_inputs_pass_through_from_any_iterable(self):
        inputs = [
            {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)},
            {"inputs_embeds": torch.ones(1)},
        ]
        assert list(calibration_batches(inputs)) == inputs
        assert list(calibration_batches(item for item in inputs)) == inputs

    def test_texts_are_joined_and_cut(self):
        batches = list(calibration_batches(["abc", "de"], tokenizer=LetterTokenizer(), sequence_length=3))
        assert [batch["input_ids"].tolist() for batch in batches] == [[[0, 1, 2], [99, 3, 4]]]
        single = list(calibration_batches("abcde", tokenizer=LetterTokenizer(), sequence_length=3))
        assert single[0]["input_ids"].tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize(
        ("calibration", "message"),
        [
            ([], "calibration is empty"),
            (iter(()), "calibration is empty"),
            (torch.zeros(0, 4, dtype=torch.long), "tokens are empty"),
            (torch.rand(2, 4), "float32; expected integers"),
            (torch.arange(8), r"shape \[8\]; expected \[samples, sequence\]"),
            (["abc"], "pass tokenizer="),
            ([torch.arange(4)], "items of type Tensor"),
            (None, "calibration is NoneType"),
        ],
    )
    def test_wrong_input_is_refused_at_the_call(self, calibration, message):
        with pytest.raises(ConfigError, match=message):
            calibration_batches(calibration)

    def test_a_batch_size_below_one_is_refused(self):
        with pytest.raises(ConfigError, match="batch_size=0"):
            calibration_batches(torch.ones(2, 4, dtype=torch.long), batch_size=0)

    def test_mixed_items_are_refused_where_they_come(self):
        batches = calibration_batches([{"input_ids": torch.ones(1, 2)}, "text"])
        next(batches)
        with pytest.raises(ConfigError, match="mixes dicts with str"):
            next(batches)
