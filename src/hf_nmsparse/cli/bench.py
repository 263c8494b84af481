# SPDX-License-Identifier: Apache-2.0
"""`nmsparse bench`: how fast packed layers are here, and times for the dispatcher to choose kernels by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import STOPPED, WRONG_USE, Answer, is_out_of_memory, size, table, tell, verb
from .folders import Kind, kind_of
from .models import base_of, chosen_device, empty_model
from .options import DeviceOption, Dtype, JsonOption, listed
from .recording import check_file, record_of
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
    record: Annotated[
        bool,
        typer.Option("--record", help="Write the times into results.json and the card of the local folder MODEL too."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Time packed 2:4 layers against dense ones, in turn, on weights that no cache holds.

    With `--tune` every kernel is timed too, and the times are kept for this user (NMSPARSE_CACHE, by default
    ~/.cache/hf_nmsparse): packed layers then take the fastest. Measure on an idle machine.

    Example: nmsparse bench --shape 4096x4096 --tokens 1,8,64 --values dense,int8 --tune

    Example: nmsparse bench my-packed-model --tokens 1,64 --record
    """
    with verb(json_output) as answer:
        from ..results import environment

        if output is not None:
            check_file(output)
        if record and model is None:
            raise ConfigError("--record writes beside a model; name its folder as MODEL")
        recorder = record_of(model, None, True, None) if record else None
        sparse_layers = []
        if recorder is not None:  # what the card is about: its own layers, as they are stored
            sparse_layers = recorder.results.sparse_layers
            values = values or ([recorder.results.values] if recorder.results.values else None)
        calls = _calls(model, sparse_layers, shapes, tokens, values, dtype, _device(device))
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
                if recorder is not None:
                    recorder.add(speed=[_speed_entry(row, calls[0].device)])
        except (ConfigError, KeyboardInterrupt) as error:
            if not rows:
                raise
            facts |= {"error": str(error) or "stopped", "kind": type(error).__name__}
            answer.code = STOPPED if isinstance(error, KeyboardInterrupt) else WRONG_USE
            tell(f"error: {facts['error']}; what was measured before is kept", style="bold red")
        answer.facts = facts
        _show(answer, rows)


# --- checks before anything is measured -----------------------------------------------------------------------------
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
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
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
    layers: list[str],
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
    sizes = _shapes_of(model, layers) if model is not None else [_shape(text) for text in listed(shapes) or _SHAPES]
    counts = [_count(text) for text in listed(tokens) or _TOKENS]
    number_type = torch.bfloat16 if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    return [
        forward_call(device, number_type, kind, shape, count) for kind in kinds for shape in sizes for count in counts
    ]


def _shapes_of(model: str, layers: list[str]) -> list[tuple[int, int]]:
    """Shapes of these layers of a model, without any of all that can be packed."""
    from ..packed.layers import dense_weight, linear_layers, unpackable_layers

    folder = Path(model)
    if folder.is_dir() and kind_of(folder) is Kind.MASK:
        model = base_of(folder)
    empty = empty_model(model)
    left_out = unpackable_layers(empty)
    found = {name: module for name, module in linear_layers(empty).items() if name not in left_out}
    shapes = {tuple(dense_weight(module).shape) for name, module in found.items() if not layers or name in layers}
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


def _speed_entry(row: LayerSpeed, device: torch.device) -> dict[str, object]:
    """A row of `RunResults.speed`."""
    import torch

    from ..ops.machine import cpu_name

    values = "" if row.values == "dense" else f", {row.values} values"
    return {
        "name": f"linear {row.shape[0]}x{row.shape[1]}, {row.dtype}{values}, memory {row.memory}",
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "tokens": row.tokens,
        "milliseconds": row.milliseconds,
        "dense_milliseconds": row.dense_milliseconds,
        "ratio": row.speedup,
        "low": row.speedup_low,
        "high": row.speedup_high,
        "kernel": row.kernel,
    }


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
