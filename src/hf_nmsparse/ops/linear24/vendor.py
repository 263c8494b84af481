# SPDX-License-Identifier: Apache-2.0
"""The 2:4 products that come with PyTorch, of CUTLASS and cuSPARSELt, on a weight that is converted at each call.

Both read a layout of their own, and no second copy of a weight is kept. Only a measured table chooses them.

CUTLASS takes our values as they are, and our ids in another order: 1/4 of a byte a weight moves, against 9/8 that the
product reads anyway. PyTorch allows it on sm_8x alone (pytorch/pytorch, thread 132928).

cuSPARSELt has a private layout that is made from the dense weight: to compress that moves another 3 1/8 bytes a weight on
top of unpacking. Where its product is 1.2 times as fast as the dense one (8192^3 on an H100: NVIDIA/CUDALibrarySamples,
thread 203), that pays, against unpacking and the dense product, from

    3.125 B / (4.3 TB/s)  =  (1 - 1/1.2) * 2 * tokens / (790 TFLOP/s),   tokens = 1700

(rates of an H200); against a dense weight at hand, which need not be unpacked, only from several times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .call import FORWARD, Call24
from .dispatch import Kernel24
from .probe import works
from .weight import Weight24

_LEAST_TOKENS = 256
_TOKEN_MULTIPLE = 8


def cutlass_metadata(ids: torch.Tensor) -> torch.Tensor:
    """Ids in the order of CUTLASS (`reorder_meta` in its `host_reorder.h`, then `ColumnMajorInterleaved<2>`).

    Args:
        ids (`torch.Tensor`): uint8 `[out, in/8]`; `out` divisible by 32, `in` by 64.

    Returns:
        int16 `[out, in/16]`.
    """
    rows = ids.shape[0]
    # Bits of the row: block of 32, 16, 8, the rest; of the column: pair, and which of it.
    parts = ids.contiguous().view(torch.int16).view(rows // 32, 2, 2, 8, -1, 2)
    return parts.permute(4, 0, 3, 1, 5, 2).reshape(rows, -1)


def ids_of_metadata(metadata: torch.Tensor) -> torch.Tensor:
    """The inverse of `cutlass_metadata`: int16 `[out, in/16]` -> uint8 `[out, in/8]`."""
    rows = metadata.shape[0]
    parts = metadata.contiguous().view(-1, rows // 32, 8, 2, 2, 2)
    return parts.permute(1, 3, 5, 2, 0, 4).reshape(rows, -1).view(torch.uint8)


def _run_cutlass(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    values, metadata, padded = weight.values.contiguous(), cutlass_metadata(weight.ids), _padded(x)
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, metadata, padded.t())
    else:
        y = torch._sparse_semi_structured_addmm(bias.contiguous(), values, metadata, padded.t())
    return _cut(y.t(), x)


def _run_cusparselt(x: torch.Tensor, weight: Weight24, bias: torch.Tensor | None) -> torch.Tensor:
    compressed = torch._cslt_compress(weight.dense())
    bias = None if bias is None else bias.contiguous()
    return _cut(torch._cslt_sparse_mm(compressed, _padded(x).t(), bias, transpose_result=True), x)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """`[tokens, in]` of x `[..., in]`, with rows of zeros up to a number that both kernels take."""
    rows = x.reshape(-1, x.shape[-1])
    return F.pad(rows, (0, 0, 0, -len(rows) % _TOKEN_MULTIPLE))


def _cut(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[..., out]` of y `[padded tokens, out]`."""
    return y[: x.numel() // x.shape[-1]].contiguous().view(*x.shape[:-1], -1)


def _accepts(call: Call24, multiples: tuple[int, int]) -> bool:
    return (
        call.device.type == "cuda"
        and call.product == FORWARD
        and call.kind == "dense"
        and call.dtype in (torch.bfloat16, torch.float16)
        and call.tokens >= _LEAST_TOKENS
        and call.out_features % multiples[0] == 0
        and call.in_features % multiples[1] == 0
        and not torch.cuda.is_current_stream_capturing()  # libraries that may plan and allocate at each call
    )


def _kernel(name: str, run: Callable, multiples: tuple[int, int]) -> Kernel24:
    """A kernel for weights whose rows and columns are divisible by `multiples`."""
    return Kernel24(
        name,
        partial(_accepts, multiples=multiples),
        run,
        prefers=lambda call: False,
        works=lambda call: works(name, run, call.device, call.dtype, ours=False),
    )


CUTLASS = _kernel("CUTLASS", _run_cutlass, (32, 64))
CUSPARSELT = _kernel("cuSPARSELt", _run_cusparselt, (16, 16))
