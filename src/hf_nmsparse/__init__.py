# SPDX-License-Identifier: Apache-2.0
"""N:M sparsity for the Hugging Face stack: learn a mask on a frozen model, share it, pack it, load it.

Importing this package registers the PEFT type "NMSPARSE" and the quantization method "nmsparse", once.
"""

import importlib
from typing import Any

from . import adapter, packed
from .adapter import NMSparseConfig, set_mask_step
from .packed import PackedConfig, SparseLinear24, explain, switch_mask
from .pattern import NMPattern

__version__ = "0.1.0.dev0"


def _read_mask_for_packing(source: str, revision: str | None, task: str | None) -> packed.StoredMask:
    from .hub.packing import stored_mask  # here: the hub is not always used

    return stored_mask(source, revision, task)


adapter.register()
packed.register(mask_reader=_read_mask_for_packing)

# Rooms that need the Trainer or are not always used are imported when first asked for.
_LAZY = {
    "prune": "criteria",
    "sensitivity": "criteria",
    "agreement": "evaluation",
    "perplexity": "evaluation",
    "compress": "hub",
    "decompress": "hub",
    "diff_masks": "hub",
    "export": "hub",
    "from_semi_structured": "hub",
    "import_mask": "hub",
    "load_bitmask": "hub",
    "load_mask": "hub",
    "push_folder": "hub",
    "push_mask": "hub",
    "read_mask": "hub",
    "save_mask": "hub",
    "to_semi_structured": "hub",
    "verify": "hub",
    "add_mask_decay": "training",
    "Distillation": "training",
    "MaskAdamW": "training",
    "MaskMetricsCallback": "training",
    "MaskPhaseCallback": "training",
    "MaskScheduleCallback": "training",
    "NMSparseTrainer": "training",
    "PDPCallback": "training",
    "TeacherCache": "training",
    "fit_side_branch": "training",
    "learn_blockwise": "training",
    "plan": "training",
    "self_data": "training",
    "set_prior": "training",
}

__all__ = [
    "NMPattern",
    "NMSparseConfig",
    "PackedConfig",
    "SparseLinear24",
    "explain",
    "set_mask_step",
    "switch_mask",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
