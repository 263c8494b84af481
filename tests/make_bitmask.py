# SPDX-License-Identifier: Apache-2.0
"""How tests/bitmask_llama was made: by the last release of compressed-tensors that wrote 2:4 bitmasks.

Needs compressed-tensors 0.14 (`pip install --target DIR --no-deps compressed-tensors==0.14.0 pydantic pydantic-core
annotated-types typing-inspection loguru`), which asks for transformers 4 but works for this with 5:

    PYTHONPATH=DIR python tests/make_bitmask.py write tests/bitmask_llama
    PYTHONPATH=DIR python tests/make_bitmask.py read FOLDER   # by that release: its weights must be those of `masked_llama`

The weights come from arithmetic, so that tests know them without the file: no generator of random numbers, no seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).with_name("bitmask_llama")


def dense_llama() -> LlamaForCausalLM:
    """A tiny Llama in bfloat16."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=36,  # rows of 36 bits end inside a byte
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    start = 1
    with torch.no_grad():
        for parameter in model.parameters():
            index = torch.arange(start, start + parameter.numel(), dtype=torch.int64)
            numbers = (index * 40503 % 65521 % 255 - 127).float() / 256
            parameter.copy_(numbers.view(parameter.shape))
            start += parameter.numel()
        model.model.layers[0].self_attn.o_proj.weight[0, :4] = 0  # a group with nothing to keep
        model.model.layers[0].self_attn.o_proj.weight[1, :4] = torch.tensor([0, 0, 0, 1.0])
    return model


def masked_llama() -> LlamaForCausalLM:
    """The same with two weights of four kept in each linear layer but the head: the largest, of equal ones the first."""
    model = dense_llama()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                groups = module.weight.view(-1, 4)
                order = groups.float().abs().sort(dim=1, descending=True, stable=True).indices
                groups.scatter_(1, order[:, 2:], 0)
    return model


def write(folder: Path) -> None:
    from compressed_tensors import ModelCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    model = masked_llama()
    config = SparsityCompressionConfig.load_from_registry(
        "sparse-24-bitmask", targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5
    )
    compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=config)
    model.save_pretrained(folder, state_dict=compressor.compress(model))
    compressor.update_config(str(folder))


def read(folder: Path) -> None:
    from compressed_tensors import ModelCompressor

    expected = masked_llama().state_dict()
    empty = LlamaForCausalLM(dense_llama().config).to(torch.bfloat16)
    compressor = ModelCompressor.from_pretrained(str(folder))
    compressor.decompress(str(folder), empty)
    found = empty.state_dict()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    compressed = [name for name in expected if name.endswith("proj.weight")]
    different = [name for name in different if name in compressed]
    print(f"{len(compressed) - len(different)} of {len(compressed)} weights read by compressed-tensors are bit-equal")
    sys.exit(bool(different))


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
