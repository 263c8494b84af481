# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: ways to alter the bytes of a sound one, and a judgement of what a loader made of them.

Pure helpers; `hostile_artefacts.py` builds sound files and names their loaders. What counts as right:

- refused by an error of ours (`NMSparseError`), before anything was written or the model was touched;
- refused by the library that reads the file before us. PEFT reads adapter_config.json and the tensors itself, Transformers
  config.json; their errors (`JSONDecodeError`, `SafetensorError`, a `KeyError` for an unknown peft_type, ...) are theirs if
  no line of ours ran below the door;
- loaded, and what survives of each weight is the same as before, bit for bit.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

import hf_nmsparse
from hf_nmsparse.errors import NMSparseError

SECONDS = 1.0  # of one core, for any one file
HANGS = 4  # after so many a loader is stopped
_SLACK = 64 << 20  # bytes beside twice the file: allocators round up, libraries import on first use
_OURS = str(Path(hf_nmsparse.__file__).parent)
CATASTROPHIC = r"^(([a-z_.0-9])+)+!$"
NESTED = "[" * 10_000 + "]" * 10_000
Mutation = tuple[str, bytes]

REFUSED, REFUSED_BY_LIBRARY, IDENTICAL = "refused", "refused by the library below", "loaded identically"
RIGHT = (REFUSED, REFUSED_BY_LIBRARY, IDENTICAL)
DIFFERENT, OTHER_ERROR, SLOW = "LOADED DIFFERENTLY", "OTHER ERROR", "TOO SLOW"
CHANGED, WROTE, HUNGRY = "MODEL CHANGED", "WROTE A FILE", "TOO MUCH MEMORY"


@dataclass(frozen=True)
class Outcome:
    """What a loader made of a file: `kind` is one of the constants above, `detail` says more of an error."""

    kind: str
    detail: str = ""

    @property
    def right(self) -> bool:
        return self.kind in RIGHT


class HangError(BaseException):
    """Raised inside of a loader that does not end. No `Exception`, so that nothing takes it for an error of a file."""


def _hangs(*_: object) -> None:
    raise HangError


# --- judging --------------------------------------------------------------------------------------------------------
def outcome(
    load: Callable[[], object],
    expected: object,
    *,
    untouched: Callable[[], object] = lambda: None,
    watched: Path | None = None,
    file_bytes: int = 0,
    seconds: float = SECONDS,
) -> Outcome:
    """Run a loader and judge it.

    Args:
        load (`Callable`): loads; returns what must be equal to `expected`, if it returns.
        expected (`object`): what the sound file gives.
        untouched (`Callable`): state that a refusal must leave as it was, such as the digest of a model.
        watched (`Path`, *optional*): folder in which a refusal must write nothing.
        file_bytes (`int`): size of the altered file: of memory twice as much is allowed.
        seconds (`float`): of processor time that are allowed.
    """
    before, files, peak = untouched(), _listing(watched), _peak_bytes()
    started = time.process_time()
    signal.signal(signal.SIGPROF, _hangs)
    signal.setitimer(signal.ITIMER_PROF, HANGS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load()
    except HangError:
        return Outcome(SLOW, f"over {HANGS} s")
    except Exception as error:
        judged = _judged(error)
        if untouched() != before:
            judged = Outcome(CHANGED, judged.detail)
        elif _listing(watched) != files:
            judged = Outcome(WROTE, judged.detail)
    else:
        judged = Outcome(IDENTICAL) if found == expected else Outcome(DIFFERENT, _first_difference(found, expected))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    spent = time.process_time() - started
    if judged.right and spent > seconds:
        judged = Outcome(SLOW, f"{spent:.2f} s; {judged.kind}")
    if judged.right and _peak_bytes() - peak > 2 * file_bytes + _SLACK:
        judged = Outcome(HUNGRY, f"{_peak_bytes() - peak >> 20} MiB more; {judged.kind}")
    return judged


def _judged(error: Exception) -> Outcome:
    detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, NMSparseError):
        return Outcome(REFUSED, detail)
    if not _ours_ran(error.__traceback__) or isinstance(error, SafetensorError):
        return Outcome(REFUSED_BY_LIBRARY, detail)
    return Outcome(OTHER_ERROR, detail)


def _ours_ran(trace: TracebackType | None) -> bool:
    """Whether the error came out of code of ours, or passed it."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_OURS):
            return True
        trace = trace.tb_next
    return False


def _first_difference(found: object, expected: object) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return f"{len(names)} differ, first {names[0]}" if names else ""
    return ""


def _listing(folder: Path | None) -> set[tuple[str, int]]:
    if folder is None:
        return set()
    return {(str(path), path.lstat().st_size) for path in folder.rglob("*")}


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- bytes ----------------------------------------------------------------------------------------------------------
def flips(data: bytes, *, step: int = 1, start: int = 0, stop: int | None = None, seed: int = 0) -> Iterator[Mutation]:
    """One byte changed at a time, in each `step`-th place: one bit of it, several, or all."""
    chance = random.Random(seed)
    for position in range(start, len(data) if stop is None else min(stop, len(data)), step):
        bits = chance.choice((1 << chance.randrange(8), chance.randrange(1, 256), 0xFF))
        damaged = bytearray(data)
        damaged[position] ^= bits
        yield f"byte {position} ^ {bits:#04x}", bytes(damaged)


def truncations(data: bytes, ends: list[int]) -> Iterator[Mutation]:
    """The file cut at each of `ends` and one byte to either side; and with bytes after its end."""
    for end in sorted(
        {place for middle in ends for place in (middle - 1, middle, middle + 1) if 0 <= place < len(data)}
    ):
        yield f"cut at {end}", data[:end]
    yield "one byte more", data + b"\0"
    yield "a second copy behind", data + data


def random_mutation(data: bytes, others: list[bytes], written: list[Mutation], chance: random.Random) -> Mutation:
    """One alteration drawn at random.

    Args:
        data (`bytes`): of the sound file.
        others (`list[bytes]`): other files, of which a part may be put in.
        written (`list[Mutation]`): structured mutations of the file, of which one may be taken, or taken and altered further.
        chance (`random.Random`): decides.
    """
    kind = chance.choice(("flip", "flips", "run", "cut", "insert", "delete", "splice", "number", "written", "both"))
    if kind in ("written", "both") and written:
        name, data = chance.choice(written)
        if kind == "written" or not data or len(data) > 1 << 16:
            return name, data
        name, altered = random_mutation(data, others, [], chance)
        return f"written, then {name}", altered
    damaged, size = bytearray(data), len(data)
    place = chance.randrange(size)
    length = min(1 + int(chance.expovariate(0.2)), size - place)
    if kind == "cut":
        return f"cut at {place}", data[:place]
    if kind == "splice":
        other = chance.choice(others)
        start = chance.randrange(len(other))
        return f"from {place} another file's from {start}", data[:place] + other[start:]
    if kind == "delete":
        del damaged[place : place + length]
    elif kind == "insert":
        damaged[place:place] = chance.randbytes(length)
    elif kind == "run":
        damaged[place : place + length] = chance.randbytes(length)
    elif kind == "number":
        value = chance.choice(
            (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
        )
        damaged[place : place + 8] = value.to_bytes(8, chance.choice(("little", "big")))[: size - place]
    else:
        for _ in range(1 if kind == "flip" else chance.randrange(2, 9)):
            damaged[place] ^= 1 << chance.randrange(8)
            place = chance.randrange(size)
    return f"{kind} at {place}, length {length}", bytes(damaged)


def structured(name: str, data: bytes, keys: tuple[str, ...] = ()) -> Iterator[Mutation]:
    """The alterations that know the format of a file by its name.

    Args:
        name (`str`): of the file.
        data (`bytes`): its bytes.
        keys (`tuple[str, ...]`): of a JSON file: only of these fields.
    """
    if name.endswith(".safetensors"):
        yield from truncations(data, tensor_ends(data))
        yield from header_mutations(data)
    elif name.endswith(".json"):
        yield from json_mutations(data, keys=keys)
    elif name.endswith(".jsonl"):
        yield from truncations(data, list(range(0, len(data), 16)))
        first = data.split(b"\n")[0]
        yield from ((told, line + data[len(first) :]) for told, line in json_mutations(first))
    else:
        yield from truncations(data, list(range(0, len(data), 16)))


# --- safetensors ------------------------------------------------------------------------------------------------------
def header_end(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def tensor_ends(data: bytes) -> list[int]:
    """0, the ends of the length and of the header, and those of each tensor."""
    header = json.loads(data[8 : header_end(data)])
    offsets = {place for name, about in header.items() if name != "__metadata__" for place in about["data_offsets"]}
    return [0, 7, 8, header_end(data), *(header_end(data) + place for place in offsets)]


def with_header(entries: list[tuple[str, object]], body: bytes, length: int | None = None) -> bytes:
    """A safetensors file with a header written by hand: names may be there twice."""
    text = ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(about)}" for name, about in entries) + "}").encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def header_mutations(data: bytes) -> Iterator[Mutation]:
    """Headers that no writer writes: names twice, lying shapes, dtypes, offsets and lengths, tensors too few and too many."""
    body = data[header_end(data) :]
    entries = list(json.loads(data[8 : header_end(data)]).items())
    tensors = [(name, about) for name, about in entries if name != "__metadata__"]
    for length in (0, 1, len(data), 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1):
        yield f"header length {length}", with_header(entries, body, length)
    for text in (b"", b"[]", b"null", b"{}", b"\xff\xfe", NESTED.encode(), b'{"a":' * 10_000 + b"0" + b"}" * 10_000):
        yield f"header {text[:10]!r}", len(text).to_bytes(8, "little") + text + body
    for name, about in tensors:
        yield f"twice {name}", with_header([*entries, (name, about)], body)
        other = dict(about, data_offsets=tensors[0][1]["data_offsets"], shape=tensors[0][1]["shape"])
        yield (
            f"twice, otherwise {name}",
            with_header([*entries, (name, dict(other, dtype=tensors[0][1]["dtype"]))], body),
        )
        yield f"missing {name}", with_header([entry for entry in entries if entry[0] != name], body)
        start, end = about["data_offsets"]
        rest = body[:start] + body[end:]
        shifted = [(n, _shifted(a, end, end - start)) for n, a in entries if n != name]
        yield f"missing with its bytes {name}", with_header(shifted, rest)
        for change, told in _lies(about):
            yield f"{told} {name}", with_header([(n, change if n == name else a) for n, a in entries], body)
    added = {"dtype": "U8", "shape": [4], "data_offsets": [len(body), len(body) + 4]}
    names = (
        "extra",
        "../x",
        "/etc/x",
        "a\\..\\b",
        "nul\0name",
        "n" * 4096,
        "",
        ".",
        "__class__",
        "é\u202e",
        *_beside(tensors),
    )
    for name in names:
        yield f"added {name[:20]!r}", with_header([*entries, (name, added)], body + b"abcd")
    for metadata in (
        {"a": 1},
        ["a"],
        "text",
        None,
        {"nmsparse.format_version": "99"},
        {"format": "x" * (1 << 20)},
        {},
    ):
        changed = [entry for entry in entries if entry[0] != "__metadata__"]
        yield f"metadata {str(metadata)[:30]}", with_header([("__metadata__", metadata), *changed], body)


def _beside(tensors: list[tuple[str, dict]]) -> list[str]:
    """Names close to those that are there."""
    name = tensors[0][0]
    return [f"{name}.weight", name.rpartition(".")[0], f"{name}\0", name.upper(), name.replace("0", "1", 1)]


def _shifted(about: dict, behind: int, by: int) -> dict:
    if "data_offsets" not in about or about["data_offsets"][0] < behind:
        return about
    return dict(about, data_offsets=[place - by for place in about["data_offsets"]])


def _lies(about: dict) -> Iterator[tuple[dict, str]]:
    shape, (start, end) = about["shape"], about["data_offsets"]
    size = end - start
    shapes = (
        [],
        [size],
        [size, 1],
        [1, *shape],
        shape[::-1],
        [0, *shape],
        [1 << 40, 1 << 40],
        [-1, *shape[1:]],
        [1.5],
        None,
    )
    for other in shapes:
        if other != shape:
            yield dict(about, shape=other), f"shape {other}"
    for dtype in ("BOOL", "I8", "U8", "BF16", "F16", "F32", "I64", "F8_E4M3", "X", None, 3):
        if dtype != about["dtype"]:
            yield dict(about, dtype=dtype), f"dtype {dtype}"
    if size % 2 == 0:
        yield dict(about, dtype="I8", shape=[size]), "bytes as I8"
        yield dict(about, dtype="F16", shape=[size // 2]), "bytes as F16"
    for offsets in ([start, end + 1], [start + 1, end], [end, start], [0, 1 << 60], [-1, end], [start], None, [0, 0]):
        yield dict(about, data_offsets=offsets), f"offsets {offsets}"


# --- JSON -------------------------------------------------------------------------------------------------------------
WRONG_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\0", "../../x", "/etc/passwd", "é\ud800",
    [], [None], [[]], ["x"] * 3, {}, {"a": {"b": []}}, CATASTROPHIC, "99:100", "3:4", "2:4 ",
)  # fmt: skip


def json_mutations(
    data: bytes, values: tuple[object, ...] = WRONG_VALUES, keys: tuple[str, ...] = ()
) -> Iterator[Mutation]:
    """Each key of an object (or each of `keys`) deleted, and its value replaced; keys twice, unknown, path-like; and texts that
    are no object."""
    content = json.loads(data)
    for text in (b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{}", b"{}", data + b"{}", NESTED.encode()):
        yield f"text {text[:10]!r}", text
    for key, value in content.items():
        if keys and key not in keys:
            continue
        yield f"without {key}", _json({name: kept for name, kept in content.items() if name != key})
        for wrong in values:
            if wrong != value:
                yield f"{key}={wrong!r:.40}", _json({**content, key: wrong})
        yield f"{key} nested without end", _json({**content, key: "@"}).replace(b'"@"', NESTED.encode())
        twice = (
            json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps('2:3' if key == 'pattern' else None)}" + "}"
        )
        yield f"{key} twice", twice.encode()
        if isinstance(value, dict):
            for name, inner in json_mutations(_json(value), values[:12]):
                if not name.startswith("text"):
                    yield f"{key}.{name}", _json({**content, key: "@"}).replace(b'"@"', inner)
    for key in (
        () if keys else ("unknown", "__class__", "../x", "a" * 4096, "runtime_config", "auto_map", "trust_remote_code")
    ):
        yield f"added {key[:20]}", _json({**content, key: "x"})


def _json(content: dict) -> bytes:
    return json.dumps(content).encode()
