# SPDX-License-Identifier: Apache-2.0
"""`nmsparse bench`: how fast packed layers are here, and times for the dispatcher to choose kernels by."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import STOPPED, WRONG_USE, Answer, size, table, tell, verb
from .models import chosen_device, empty_model
from .options import DeviceOption, Dtype, JsonOption, listed
from .streaming import available_memory

if TYPE_CHECKING:
    import torch

    from ..ops import Call24
    from ..packed.bench import LayerSpeed

_SHAPES = ("4096x4096", "11008x4096", "1536x576")
_TOKENS = ("1", "8", "64", "512")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Hub id or folder: measure the shapes of its linear layers."),
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", metavar="OUTxIN", help="A shape to measure; several are fine.")
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option("--tokens", metavar="N", help="Rows of input; several are fine.")
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--values", help="dense, int8 or int4: how kept weights are stored.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Dtype of the layers; auto: bfloat16.")] = Dtype.AUTO,
    device: DeviceOption = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Times that each is timed.")] = 30,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time every kernel, and let this machine choose by these times from now on."),
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="JSON file to write.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Time packed 2:4 layers against dense ones, in turn, on weights that no cache holds.

    With `--tune` every kernel is timed too, and the times are kept for this user (NMSPARSE_CACHE, by default
    ~/.cache/hf_nmsparse): packed layers then take the fastest. Measure on an idle machine.

    Example: nmsparse bench --shape 4096x4096 --tokens 1,8,64 --values dense,int8 --tune
    """
    with verb(json_output) as answer:
        from ..results import environment

        if output is not None:
            _check_output(output)
        calls = _calls(model, shapes, tokens, values, dtype, _device(device))
        _check_memory(calls)
        rows: list[LayerSpeed] = []
        facts: dict[str, object] = {"rows": [], "environment": environment()}
        if tune:
            facts["table"] = str(_tune(calls, rounds))
            answer.show(f"times for this machine: {facts['table']}")
        try:
            for row in _measure(calls, rounds):
                rows.append(row)
                facts["rows"] = [row.to_dict() for row in rows]
                if output is not None:
                    _write(output, facts)  # after each: whoever stops keeps what was measured
        except (ConfigError, KeyboardInterrupt) as error:
            if not rows:
                raise
            facts |= {"error": str(error) or "stopped", "kind": type(error).__name__}
            answer.code = STOPPED if isinstance(error, KeyboardInterrupt) else WRONG_USE
            tell(f"error: {facts['error']}; what was measured before is kept", style="bold red")
        answer.facts = facts
        _show(answer, rows)


# --- checks before anything is measured -----------------------------------------------------------------------------
def _check_output(path: Path) -> None:
    """Refuse a file that could not be written after minutes of measuring."""
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file to write")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())  # folders below it are made
    if not nearest.is_dir():
        raise ConfigError(f"--output {path}: {nearest} is a file; name a file in a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {path}: no permission to write into {nearest}; name a file elsewhere")


def _device(name: str | None) -> torch.device:
    import torch

    device = torch.device(chosen_device(name))
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: packed layers are timed on CPUs and CUDA GPUs")
    return device


def _check_memory(calls: Iterable[Call24]) -> None:
    """Refuse what cannot fit, at once: Linux would rather kill the process than let an allocation fail."""
    from ..packed.bench import least_memory

    for call in calls:
        if least_memory(call) > available_memory(call.device):
            raise _too_large(call)


@contextlib.contextmanager
def _room_for(call: Call24) -> Iterator[None]:
    """Say in one line that memory ran out all the same."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise _too_large(call) from error
        raise


def _too_large(call: Call24) -> ConfigError:
    from ..packed.bench import least_memory

    return ConfigError(
        f"shape {call.out_features}x{call.in_features} with {call.tokens} tokens does not fit into memory: it needs at least "
        f"{size(least_memory(call))}, {call.device} has {size(available_memory(call.device))} free; measure a smaller shape or "
        "fewer tokens, or on another --device"
    )


# --- what is measured -----------------------------------------------------------------------------------------------
def _calls(
    model: str | None,
    shapes: list[str] | None,
    tokens: list[str] | None,
    values: list[str] | None,
    dtype: Dtype,
    device: torch.device,
) -> list[Call24]:
    import torch

    from ..ops import VALUE_KINDS
    from ..ops.linear24.measure import forward_call

    if model is not None and shapes:
        raise ConfigError("both MODEL and --shape were given; measure the shapes of a model, or shapes of your own")
    kinds = listed(values) or ["dense"]
    if unknown := [kind for kind in kinds if kind not in VALUE_KINDS]:
        raise ConfigError(f"--values {unknown[0]}: use one of {', '.join(VALUE_KINDS)}")
    sizes = _shapes_of(model) if model is not None else [_shape(text) for text in listed(shapes) or _SHAPES]
    counts = [_count(text) for text in listed(tokens) or _TOKENS]
    number_type = torch.bfloat16 if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    return [
        forward_call(device, number_type, kind, shape, count) for kind in kinds for shape in sizes for count in counts
    ]


def _shapes_of(model: str) -> list[tuple[int, int]]:
    from ..packed.layers import dense_weight, linear_layers, unpackable_layers

    empty = empty_model(model)
    left_out = unpackable_layers(empty)
    shapes = {tuple(dense_weight(m).shape) for name, m in linear_layers(empty).items() if name not in left_out}
    if not shapes:
        raise ConfigError(f"{model} has no linear layer that can be packed")
    return sorted(shapes)


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    if not (out_features.isdecimal() and in_features.isdecimal() and int(out_features) > 0 < int(in_features)):
        raise ConfigError(f"--shape {text}: give out_features and in_features, such as 4096x4096")
    if int(in_features) % 8:
        raise ConfigError(f"--shape {text}: in_features must be a multiple of 8 to be packed")
    return int(out_features), int(in_features)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--tokens {text}: give a whole number from 1")
    return int(text)


def _tune(calls: list[Call24], rounds: int) -> Path:
    from tqdm import tqdm

    from ..ops.linear24.measure import tune

    for call in tqdm(calls, desc="kernels", disable=None):
        with _room_for(call):
            path = tune([call], rounds)
    return path


def _measure(calls: list[Call24], rounds: int) -> Iterator[LayerSpeed]:
    from tqdm import tqdm

    from ..ops.linear24.measure import measure_roofline
    from ..packed.bench import measure_layer

    roofline = measure_roofline(calls[0].device, calls[0].dtype)
    tell(
        f"this device reads {roofline.bytes_per_second / 1e9:.0f} GB/s, multiplies {roofline.flop_per_second / 1e12:.2f} TFLOP/s"
    )
    for call in tqdm(calls, desc="layers", disable=None):
        with _room_for(call):
            yield from measure_layer(call, roofline, rounds)


# --- what is said ---------------------------------------------------------------------------------------------------
def _write(path: Path, facts: dict[str, object]) -> None:
    from ..files import write_file

    write_file(path, json.dumps(facts, indent=1) + "\n")


def _show(answer: Answer, rows: list[LayerSpeed]) -> None:
    columns = (
        "shape",
        "values",
        "tokens",
        "memory",
        "kernel",
        "dense ms",
        "packed ms",
        "speed-up",
        "95 %",
        "of the limit",
    )
    cells = (
        (
            f"{row.shape[0]}x{row.shape[1]}",
            row.values,
            row.tokens,
            row.memory,
            row.kernel,
            f"{row.dense_milliseconds:.3f}",
            f"{row.milliseconds:.3f}",
            f"{row.speedup:.2f}",
            f"{row.speedup_low:.2f} - {row.speedup_high:.2f}",
            f"{row.roofline_share:.0%}",
        )
        for row in rows
    )
    answer.show(table("Packed 2:4 layers beside dense ones", columns, cells))
