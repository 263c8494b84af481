# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a 2:4 linear layer: a table of measured times where there is one, else a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .call import FORWARD, Call24
from .tables import DENSE, measured_times
from .weight import Weight24


@dataclass(frozen=True)
class Kernel24:
    """One way to compute a product with a packed weight.

    Args:
        name (`str`): what `explain` reports.
        accepts (`Callable`): `Call24 -> bool`, whether it can take such a call on this device; quick.
        run (`Callable`): `(x, weight, bias) -> y`: x `[..., in]`, contiguous, of the dtype of the call and any leading
            dimensions, maybe 0; y `[..., out]`, contiguous. For the input gradient x is `[..., out]`, y `[..., in]`, bias
            `None`.
        prefers (`Callable`): `Call24 -> bool`, whether it is taken to be faster than the dense product where nothing was
            measured.
        works (`Callable`): `Call24 -> bool`, whether it runs here and is right; may have to try it (`probe.works`), so it is
            asked of accepted calls only, and only where the kernel is about to be chosen.
        unpacks (`bool`): whether it unpacks the weight for the dense product, and so cannot beat a dense weight at hand.
    """

    name: str
    accepts: Callable[[Call24], bool]
    run: Callable[[torch.Tensor, Weight24, torch.Tensor | None], torch.Tensor]
    prefers: Callable[[Call24], bool] = lambda call: True
    works: Callable[[Call24], bool] = lambda call: True
    unpacks: bool = False


_kernels: list[Kernel24] = []
_WORTH_A_COPY = 0.97  # a dense copy is kept for no less than 3 %, about what times are good for
_MOST_CHOICES = 256  # of one weight: prompts come in all lengths
_generation = 0  # of kernels and tables; choices of an earlier one are void


def register_kernel(kernel: Kernel24) -> None:
    """Add a kernel; where nothing was measured, those registered later are asked first."""
    _kernels.insert(0, kernel)
    forget_choices()


def forget_choices() -> None:
    """Choose anew from now on: a table or a kernel has changed."""
    global _generation
    _generation += 1


def kernels_for(call: Call24) -> list[Kernel24]:
    """Every kernel that can take a call and works here, those that prefer it first. Tries those never tried."""
    return [kernel for kernel in _accepting(call) if kernel.works(call)]


def _accepting(call: Call24) -> list[Kernel24]:
    able = [kernel for kernel in _kernels if kernel.accepts(call)]
    return sorted(able, key=lambda kernel: not kernel.prefers(call))


def choose_kernel(call: Call24, dense_at_hand: bool = False) -> Kernel24 | None:
    """The kernel for a call: the fastest in the nearest measured call, else the first that prefers it.

    Args:
        call (`Call24`): what is to be computed.
        dense_at_hand (`bool`): whether the caller holds the dense weight too.

    Returns:
        the kernel; `None`, only with `dense_at_hand`, where the dense product of torch is the better one.
    """
    able = [kernel for kernel in _accepting(call) if not (dense_at_hand and kernel.unpacks)]
    times = measured_times(call)
    if not dense_at_hand or DENSE in times:
        for kernel in sorted(
            (kernel for kernel in able if kernel.name in times), key=lambda kernel: times[kernel.name]
        ):
            if dense_at_hand and times[DENSE] < _WORTH_A_COPY * times[kernel.name]:
                return None
            if kernel.works(call):
                return kernel
    if dense_at_hand:
        able = [kernel for kernel in able if kernel.prefers(call)]
    return next((kernel for kernel in able if kernel.works(call)), None)


def choose_for(
    x: torch.Tensor, weight: Weight24, product: str = FORWARD, dense_at_hand: bool = False
) -> Kernel24 | None:
    """`choose_kernel` for the call that multiplies `x` by `weight`; remembered in the memo of the weight."""
    memo = weight.memo
    if memo is None or x.dim() == 0 or x.shape[-1] != memo.in_features or _is_capturing(memo.device_type):
        return choose_kernel(Call24.of(x, weight, product), dense_at_hand)
    key = (x.numel(), x.dtype, product, dense_at_hand, _generation, torch.get_num_threads())
    if key not in memo.choices:
        if len(memo.choices) >= _MOST_CHOICES:
            memo.choices.clear()
        memo.choices[key] = choose_kernel(Call24.of(x, weight, product), dense_at_hand)
    return memo.choices[key]


def _is_capturing(device_type: str) -> bool:
    """Whether a CUDA graph is being captured: some kernels cannot take part, and what is chosen then is no rule."""
    return device_type == "cuda" and torch.cuda.is_current_stream_capturing()
