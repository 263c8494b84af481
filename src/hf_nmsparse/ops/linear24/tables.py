# SPDX-License-Identifier: Apache-2.0
"""Measured times of the kernels on machines of the kind that this one is: shipped, or made by `nmsparse bench --tune`."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import re
from functools import lru_cache
from pathlib import Path

import torch

from ...errors import FormatError
from ..machine import cache_folder, cpu_name
from ..native_build import native_library
from .call import Call24

logger = logging.getLogger(__name__)

DENSE = "dense"
TABLE_VERSION = 1
_SHIPPED = Path(__file__).parent / "tables"
_LARGEST_SIZE = 1 << 40
_FARTHEST = 2.0  # in doublings of out_features, in_features and tokens together


def tuned_folder() -> Path:
    """Where `nmsparse bench --tune` leaves its tables."""
    return cache_folder() / "tables"


@lru_cache(maxsize=16)
def machine_of(device: torch.device, threads: int) -> dict[str, str | int]:
    """What must agree for times measured elsewhere to hold here.

    For a GPU its name and compute capability, for a CPU its name, what the C++ kernels use of it, and torch's threads.
    """
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return {"device": torch.cuda.get_device_name(device), "capability": capability}
    if device.type == "cpu":
        library = native_library()
        instructions = "none" if library is None else library.nmsparse_instructions().decode()
        return {"device": cpu_name(), "capability": instructions, "threads": threads}
    return {"device": device.type}


def measured_times(call: Call24) -> dict[str, float]:
    """Milliseconds by kernel name in the measured call that is nearest to this one; empty if none is near."""
    machine = machine_of(call.device, torch.get_num_threads())
    same = (_short(call.dtype), call.kind, call.product)
    for tables in _tables():  # tuned ones first
        rows = [row for table in tables if table["machine"] == machine for row in table["rows"]]
        rows = [row for row in rows if (row["dtype"], row["values"], row["product"]) == same]
        nearest = min(rows, key=lambda row: _distance(row, call), default=None)
        if nearest is not None and _distance(nearest, call) <= _FARTHEST:
            return nearest["milliseconds"]
    return {}


def row_key(row: dict) -> tuple:
    """What a row of measured times is about."""
    return (*row["shape"], row["tokens"], row["dtype"], row["values"], row["product"])


def write_tuned(machine: dict, rows: dict[tuple, dict]) -> Path:
    """Put rows into this user's table for a machine, over those of the same calls that it holds; whole or not at all."""
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_") for value in machine.values())
    path = tuned_folder() / f"{name}.json"
    before = _read(path) if path.exists() else None
    kept = {row_key(row): row for row in before["rows"]} if before is not None else {}
    table = {
        "version": TABLE_VERSION,
        "machine": machine,
        "software": software(),
        "rows": [*{**kept, **rows}.values()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.partial")
    beside.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(beside, path)
    return path


def software() -> dict[str, str | None]:
    """Versions that the times were measured with; kept for the reader, not compared."""
    found = {"torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return found


def forget_tables() -> None:
    """Read the tables again at the next question."""
    _tables.cache_clear()


@lru_cache(maxsize=1)
def _tables() -> tuple[list[dict], list[dict]]:
    """Tables that this user tuned, and shipped ones."""
    try:
        tuned = sorted(tuned_folder().glob("*.json"))
    except OSError:  # no home, no tables
        tuned = []
    tuned_tables, shipped = ([_read(path) for path in paths] for paths in (tuned, sorted(_SHIPPED.glob("*.json"))))
    return [t for t in tuned_tables if t is not None], [t for t in shipped if t is not None]


def _read(path: Path) -> dict | None:
    """A table, or `None` with one logged line: a damaged one costs speed, never a result."""
    try:
        table = json.loads(path.read_text())
        check_table(table, str(path))
    except (OSError, ValueError, RecursionError, FormatError) as error:
        logger.warning("the table of measured times %s is left out: %s", path, error)
        return None
    return table


def check_table(table: object, where: str) -> None:
    """Refuse what is no table of measured times.

    Raises:
        FormatError: naming the first thing that is missing or wrong.
    """
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION:
        raise FormatError(
            f"{where}: no table of measured times of version {TABLE_VERSION}; measure again (nmsparse bench --tune)"
        )
    if not isinstance(table.get("machine"), dict) or not isinstance(table.get("rows"), list):
        raise FormatError(f"{where}: needs a machine and rows; measure again (nmsparse bench --tune)")
    for row in table["rows"]:
        shape = row.get("shape") if isinstance(row, dict) else None
        sizes = [row.get("tokens"), *shape] if isinstance(shape, list) else []
        positive = len(sizes) == 3 and all(type(size) is int and 0 < size < _LARGEST_SIZE for size in sizes)
        times = row.get("milliseconds") if positive else None
        named = positive and all(isinstance(row.get(key), str) for key in ("dtype", "values", "product"))
        if not named or not isinstance(times, dict) or not all(_is_time(time) for time in times.values()):
            raise FormatError(f"{where}: {row!r} is no row of measured times; measure again (nmsparse bench --tune)")


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _distance(row: dict, call: Call24) -> float:
    pairs = zip((*row["shape"], row["tokens"]), (call.out_features, call.in_features, call.tokens), strict=True)
    return sum(abs(math.log2(measured / asked)) for measured, asked in pairs) if call.tokens else math.inf


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
