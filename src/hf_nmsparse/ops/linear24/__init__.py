# SPDX-License-Identifier: Apache-2.0
"""The linear layer with a packed 2:4 weight: the operator, its kernels, and the choice among them."""

from .call import FORWARD, INPUT_GRADIENT, Call24
from .cpu import NATIVE, NATIVE_UNPACKED, NATIVE_UNPACKED_INPUT_GRADIENT
from .dispatch import Kernel24, choose_for, choose_kernel, forget_choices, kernels_for, register_kernel
from .nvidia import DECODE, GEMM
from .operator import linear_24
from .tables import DENSE
from .unpacked import UNPACKED, UNPACKED_INPUT_GRADIENT
from .weight import VALUE_KINDS, Memo24, Weight24

# Where nothing was measured, the first that prefers a call takes it; else the first that can. Last registered, first asked.
for _kernel in (
    GEMM,
    UNPACKED,
    UNPACKED_INPUT_GRADIENT,
    NATIVE_UNPACKED,
    NATIVE_UNPACKED_INPUT_GRADIENT,
    NATIVE,
    DECODE,
):
    register_kernel(_kernel)

__all__ = [
    "DENSE",
    "FORWARD",
    "INPUT_GRADIENT",
    "VALUE_KINDS",
    "Call24",
    "Kernel24",
    "Memo24",
    "Weight24",
    "choose_for",
    "choose_kernel",
    "forget_choices",
    "kernels_for",
    "linear_24",
    "register_kernel",
]
