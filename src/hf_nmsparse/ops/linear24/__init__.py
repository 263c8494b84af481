# SPDX-License-Identifier: Apache-2.0
"""The linear layer with a packed 2:4 weight: the operator, its kernels, and the choice among them."""

from .call import FORWARD, INPUT_GRADIENT, Call24
from .cpu import NATIVE, NATIVE_UNPACKED, NATIVE_UNPACKED_INPUT_GRADIENT, unpack_weight
from .dispatch import Kernel24, choose_for, choose_kernel, forget_choices, kernels_for, register_kernel
from .hopper import WGMMA
from .nvidia import DECODE, GEMM
from .operator import linear_24
from .portable import PORTABLE
from .tables import DENSE, measured_times
from .unpacked import UNPACKED, UNPACKED_INPUT_GRADIENT
from .vendor import CUSPARSELT, CUTLASS
from .weight import VALUE_KINDS, Memo24, Weight24

# Where nothing was measured, the first that prefers a call takes it; else the first that can. Last registered, first asked.
for _kernel in (
    CUSPARSELT,
    CUTLASS,
    WGMMA,
    GEMM,
    UNPACKED,
    UNPACKED_INPUT_GRADIENT,
    PORTABLE,
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
    "measured_times",
    "register_kernel",
    "unpack_weight",
]
