# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of each family that is supported, and inputs for it. Built offline, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 64
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
# Weights large enough that the router tells tokens apart and blocks change what the next one sees.
SPREAD = {"initializer_range": 0.2}


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    return _model(f"{name}Config", f"{name}ForCausalLM", **{**DECODER, **SPREAD, **options})


def _model(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()

    return build


def _gemma3_vision() -> nn.Module:
    sizes = {**DECODER, **SPREAD, "sliding_window": 4, "query_pre_attn_scalar": 8}
    text = {**sizes, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 0, "boi_token_index": 0, "eoi_token_index": 0}
    options = {"text_config": text, "vision_config": vision, **tokens}
    return _model("Gemma3Config", "Gemma3ForConditionalGeneration", **options)()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama"),
    "qwen3": _decoder("Qwen3"),
    "gemma3": _model(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        **{**DECODER, **SPREAD},
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    ),
    "mistral": _decoder("Mistral", sliding_window=6),
    "opt": _model(
        "OPTConfig", "OPTForCausalLM", **COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "gpt2": _model(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        **SPREAD,
    ),
    "bert": _model(
        "BertConfig", "BertForMaskedLM", **COMMON, **SPREAD, intermediate_size=48, max_position_embeddings=64
    ),
    "vit": _model(
        "ViTConfig",
        "ViTForImageClassification",
        **{name: value for name, value in COMMON.items() if name != "vocab_size"},
        **SPREAD,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
    ),
    "t5": _model(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
    "whisper": _model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    ),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gemma3_vision": _gemma3_vision,
    "qwen3_moe": _decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}


def inputs_for(name: str, batch: int = 4, length: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    """Model inputs of a family, to be passed by name: `input_ids` `[batch, length]`, for ViT `pixel_values`, for Whisper `input_features`."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 8, 16, generator=generator),
            "decoder_input_ids": torch.randint(1, VOCABULARY, (batch, length - 3), generator=generator),
        }
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (batch, length), generator=generator)}
    if name == "gemma3_vision":  # an image of four tokens before the text
        inputs["input_ids"][:, :4] = 0
        inputs["token_type_ids"] = (inputs["input_ids"] == 0).long()
        inputs["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, VOCABULARY, (batch, length - 3), generator=generator)
    return inputs
