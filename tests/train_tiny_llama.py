# SPDX-License-Identifier: Apache-2.0
"""Train the small Llama of tests/tiny_llama: 0.98M parameters, about five minutes of one core. Or an OPT of its size.

    python tests/train_tiny_llama.py --train train.txt --test test.txt --out tests/tiny_llama [--family opt]

The stored one was trained on 2.3 MB of Wikipedia articles, whose beginning is src/hf_nmsparse/cli/demo_data/train.txt;
with that beginning alone it sees each token three times and learns it by heart. A trained model is needed where random
weights would hide a fault: on them every mask is as good as any other. Everything is seeded; another torch version or
thread count still gives slightly other weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_nmsparse import NMPattern
from hf_nmsparse.criteria import find_stacks
from hf_nmsparse.data import load_text, tokenize, windows
from hf_nmsparse.evaluation import perplexity
from hf_nmsparse.ops.reference import top_n_mask

VOCABULARY = 1024
SEQUENCE = 256
BATCH = 8
TRAIN_TOKENS, TEST_TOKENS = 196_608, 32_768  # stored for the tests, two bytes each


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, without an unknown token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def build_model(eos: int) -> LlamaForCausalLM:
    """Every linear layer has in and out features that 2:4 packing accepts (multiples of 8)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return LlamaForCausalLM(config)


def build_opt(eos: int) -> OPTForCausalLM:
    """Of the same width, depth and number of FFN weights as the Llama."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        init_std=0.06,
        dropout=0.0,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return OPTForCausalLM(config)


BUILDERS = {"llama": build_model, "opt": build_opt}


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks."""
    return find_stacks(model)[0][1]


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, rate: float, seed: int = 0) -> None:
    """Muon for the decoder's matrices, AdamW for the rest; 5 % warm-up, then a cosine to a tenth.

    With AdamW alone the same number of steps ends at nearly twice the perplexity.
    """
    matrices = [parameter for parameter in blocks_of(model).parameters() if parameter.dim() == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    warmup = steps // 20

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    batches = windows(tokens, SEQUENCE + 1, samples=steps * BATCH, seed=seed).split(BATCH)
    began = time.time()
    model.train()
    for step, batch in enumerate(batches, start=1):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def magnitude_pruned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose decoder linears keep the two largest of each four weights."""
    pruned = copy.deepcopy(model)
    for module in blocks_of(pruned).modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(top_n_mask(module.weight.abs(), NMPattern("2:4")))
    return pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", default="llama", choices=list(BUILDERS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1.5e-2, help="highest learning rate")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = "\n\n".join(load_text(arguments.train))
    tokenizer = train_tokenizer(text)
    train_tokens, test_tokens = tokenize(text, tokenizer), tokenize(load_text(arguments.test), tokenizer)
    model = BUILDERS[arguments.family](tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train_tokens)} training tokens")
    train(model, train_tokens, arguments.steps, arguments.rate)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    np.save(arguments.out / "train_tokens.npy", train_tokens[:TRAIN_TOKENS].numpy().astype(np.uint16))
    np.save(arguments.out / "test_tokens.npy", test_tokens[:TEST_TOKENS].numpy().astype(np.uint16))

    stored = type(model).from_pretrained(arguments.out, dtype=torch.float32)
    for name, candidate in (("dense", stored), ("magnitude 2:4", magnitude_pruned(stored))):
        print(f"{name}: perplexity {perplexity(candidate, test_tokens[:TEST_TOKENS], SEQUENCE).value:.3f}")


if __name__ == "__main__":
    main()
