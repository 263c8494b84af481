# SPDX-License-Identifier: Apache-2.0
"""As much of vLLM's interface to quantization plugins as the tests need, for machines without vLLM; one process, on the CPU."""
