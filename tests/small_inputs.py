# SPDX-License-Identifier: Apache-2.0
"""A model, its tokenizer and texts for the command line: small, random, the same each time."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_inputs(folder: Path) -> None:
    """Write `base`, a tiny Llama with a tokenizer of words "w0" to "w99"; `train.txt` and `test.txt`."""
    words = [f"w{index}" for index in range(100)]
    vocabulary = {"<eos>": 0, "<unk>": 1, **{word: index for index, word in enumerate(words, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"}  # no padding token, as Llama's have none
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    choose = random.Random(0)
    (folder / "train.txt").write_text(" ".join(choose.choice(words) for _ in range(1500)))
    (folder / "test.txt").write_text(" ".join(choose.choice(words) for _ in range(500)))
