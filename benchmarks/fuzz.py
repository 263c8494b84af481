# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files against every loader, for as long as asked: what was refused, and what was not.

    python benchmarks/fuzz.py --minutes 60 --seed 0

One sound artefact of each kind (tests/hostile_artefacts.py) is altered at random, also by the alterations that know its format
(tests/hostile.py), and loaded in a process of its own, which is watched: no end within 5 seconds of a core (or a minute by the
clock) and a death of the process are outcomes too. Each kind gets the same time. The number of a case and the seed give its bytes again; those of small
files are kept in the results if the outcome is wrong.
"""

import argparse
import base64
import collections
import logging
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
import transformers
from timing import write_results
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hostile
from hostile_artefacts import artefacts

HANGS = 5.0  # seconds of a core, for one file
WAITS = 60.0  # seconds by the clock, which others share
STARTS = 600.0  # seconds by the clock to import everything and build the artefacts
KEPT_BYTES = 1 << 14  # of an altered file, in the results
KEPT = 5  # wrong outcomes of one kind and error that are kept for each artefact
HANG, DEATH = "NO END", "PROCESS DIED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of loading, for all artefacts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of artefacts, with commas between them")
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = list(artefacts(Path(scratch)))
    if arguments.only:
        names = [name for name in names if name in arguments.only.split(",")]
    seconds = 60 * arguments.minutes / len(names)
    form, pause = "{l_bar}{bar}| {n:.0f} of {total} s of loading{postfix}", 0.2 if sys.stderr.isatty() else 60
    bar = tqdm(total=round(60 * arguments.minutes), bar_format=form, mininterval=pause)
    found = {name: fuzz(name, seconds, arguments.seed, bar) for name in names}
    bar.close()
    total = sum(one["tried"] for one in found.values())
    wrong = sum(one["wrong_outcomes"] for one in found.values())
    print(f"{total} altered files, {wrong} wrong outcomes")
    for name, one in found.items():
        print(
            f"{name}: {one['tried']} tried, {one['outcomes']}, peak {one['peak_mib_above_start']} MiB above the start"
        )
    content = {"seed": arguments.seed, "minutes": arguments.minutes, "altered_files": total, "wrong_outcomes": wrong}
    write_results("fuzz", "cpu", content | {"loaders": found}, arguments.output)


# --- the process that watches -------------------------------------------------------------------------------------------
def fuzz(name: str, seconds: float, seed: int, bar: tqdm) -> dict[str, object]:
    """Alter one artefact for a time; what came of it."""
    outcomes: collections.Counter[str] = collections.Counter()
    mutations: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong, number, peak = [], 0, 0
    spent = 0.0
    while spent < seconds:  # a new process after each that had to be stopped, or died
        for case in cases(name, seed, number):
            number = case["number"] + 1
            outcomes[case["kind"]] += 1
            mutations[case["mutation"].split()[0]] += 1
            peak = max(peak, case["peak_mib"])
            if not case["right"]:
                seen[case["kind"], case["detail"][:40]] += 1
                if seen[case["kind"], case["detail"][:40]] <= KEPT:
                    wrong.append(case)
            bar.set_postfix_str(f"{name}, {sum(seen.values())} wrong", refresh=False)
            bar.update(case["seconds"])
            spent += case["seconds"]
            if spent >= seconds:
                break
    return {
        "tried": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "mutations": dict(mutations),
        "wrong_outcomes": sum(seen.values()),
        "wrong": wrong,
        "peak_mib_above_start": peak,
    }


def cases(name: str, seed: int, number: int) -> Iterator[dict[str, object]]:
    """Cases from `number` on, until one has to be stopped or ends the process."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    with tempfile.TemporaryDirectory() as scratch:
        process = spawning.Process(target=work, args=(theirs, Path(scratch), name, seed, number), daemon=True)
        process.start()
        theirs.close()
        peak, begun = 0, None
        try:
            while True:
                if not in_time(ours, process.pid, STARTS if begun is None else WAITS):
                    yield stopped(HANG, "", begun, Path(scratch, name), peak)
                    return
                message = ours.recv()
                begun = message if "kind" not in message else None
                if begun is None:
                    peak = message["peak_mib"]
                    yield message
        except EOFError:
            process.join()
            yield stopped(DEATH, f"exit code {process.exitcode}", begun, Path(scratch, name), peak)
        finally:
            process.kill()
            process.join()


def in_time(ours: Connection, pid: int, patience: float) -> bool:
    """Wait for the process to say something; whether it did before it had taken too much time."""
    until, busy = time.monotonic() + patience, sum(psutil.Process(pid).cpu_times()[:2])
    while not ours.poll(1):
        over = patience != STARTS and sum(psutil.Process(pid).cpu_times()[:2]) - busy > HANGS
        if over or time.monotonic() > until:
            return False
    return True


def stopped(kind: str, detail: str, begun: dict | None, folder: Path, peak: int) -> dict[str, object]:
    """The outcome of a case that did not come to its end; its bytes are still in place."""
    if begun is None:
        raise RuntimeError(f"{folder.name}: {kind} ({detail}) between two cases; run it alone (--only {folder.name})")
    data = (folder / "work" / begun["file"]).read_bytes()
    wrong = {"kind": kind, "detail": detail, "right": False, "peak_mib": peak, "seconds": HANGS}
    return begun | wrong | {"file_bytes": kept(data)}


def kept(data: bytes) -> str | None:
    """The bytes of a small file as text."""
    return base64.b64encode(data).decode() if len(data) <= KEPT_BYTES else None


# --- the process that loads ---------------------------------------------------------------------------------------------
def work(watcher: Connection, scratch: Path, name: str, seed: int, number: int) -> None:
    """Load altered files, one after the other, telling the watcher before and after."""
    quiet()
    artefact = artefacts(scratch)[name]
    sound = {file: artefact.content(file) for file in artefact.files}
    written = {file: list(hostile.structured(file, data, artefact.keys)) for file, data in sound.items()}
    others = [
        path.read_bytes() for path in scratch.rglob("sound/*") if path.suffix in (".safetensors", ".json", ".npz")
    ]
    start = peak_mib()
    while True:
        chance = random.Random(f"{seed} {name} {number}")
        file = chance.choice(artefact.files)
        if artefact.keys and file.endswith(".json"):  # the rest of it is not ours to check
            mutation, data = chance.choice(written[file])
        else:
            mutation, data = hostile.random_mutation(sound[file], others, written[file], chance)
        case = {"number": number, "file": file, "mutation": mutation}
        watcher.send(case)
        started = time.monotonic()
        outcome = artefact.judge(file, data)
        case |= {
            "kind": outcome.kind,
            "detail": outcome.detail,
            "right": outcome.right,
            "peak_mib": peak_mib() - start,
            "seconds": time.monotonic() - started,
        }
        watcher.send(case if outcome.right else {**case, "file_bytes": kept(data)})
        number += 1


def quiet() -> None:
    """One thread, and no word of the libraries: they would write a line a case."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
