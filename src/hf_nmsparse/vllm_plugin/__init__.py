# SPDX-License-Identifier: Apache-2.0
"""vLLM plugin: packed models as a quantization method of vLLM, "nmsparse". vLLM finds it by the entry point `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes. Idempotent."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from ..packed.config import QUANT_METHOD

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from .quantization import VLLMPackedConfig  # here: it derives from classes of vLLM

        register_quantization_config(QUANT_METHOD)(VLLMPackedConfig)
