# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of a few dozen tokens, built offline."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
CHARACTERS = "\n .?:#ABCDHQ" + string.ascii_lowercase  # of others only <unk> is left


def letters(
    merges: Sequence[tuple[str, str]] = (),
    starts: bool = False,
    ends: bool = False,
    bos: bool = True,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A token a letter: <s> 0, </s> 1, <unk> 2, then `CHARACTERS`, then what is merged, over spaces too.

    Args:
        merges (`Sequence[tuple[str, str]]`): tokens that become one, the first ones first.
        starts (`bool`), ends (`bool`): put bos before, eos after each text.
        bos (`bool`): have a bos token.
        template (`str`, *optional*): chat template.
    """
    tokens = [BOS, EOS, "<unk>", *CHARACTERS, *("".join(pair) for pair in merges)]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, list(merges), unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    if starts or ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS + ' ' if starts else ''}$A{' ' + EOS if ends else ''}",
            special_tokens=[(BOS, 0), (EOS, 1)],
        )
    names = {"eos_token": EOS, "unk_token": "<unk>", **({"bos_token": BOS} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)
