# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse doctor` looks at in a folder or repo: what it is, whether it is whole and loads, and how to go on."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, FormatError
from ..files import MAX_LIST_BYTES, RESULTS_FILE, leftovers, read_json
from .common import one_line, size
from .findings import Findings
from .folders import (
    ADAPTER_FILES,
    CHECKPOINTS,
    COMMAND_FILE,
    MASK_FOLDER,
    NPZ_FILE,
    TRAINER_FILES,
    Kind,
    checkpoint_damage,
    checkpoints_in,
    folder_bytes,
    holds_files,
    kind_of,
    numbered_checkpoints,
)
from .models import base_of, fetching, locate
from .streaming import available_memory

if TYPE_CHECKING:
    from ..hub import VerifyReport

_TASK_FILES = ("adapter_config.json", "config.json")
_ROOM = 2  # times the files of a model, to load it


def examine(source: str, revision: str | None = None, task: str | None = None) -> Findings:
    """All checks of a local folder, or of a repo of the Hub, which is fetched."""
    findings = Findings(f"{source}, {task}" if task else source)
    place = Path(source, task or "")
    left = leftovers(place)
    if place.is_file():
        advice = "nmsparse import-mask takes it" if place.suffix == ".npz" else "name the folder that holds it"
        findings.problem("folder", "it is a file", advice)
    elif left and not place.exists():
        findings.problem("folder", "not there: its writer was killed, or has not come to its end")
    else:
        with findings.checking("folder"):
            folder = locate(source, True, revision, task)
            with findings.checking("kind"):
                _examine(findings, folder, source, revision, task)
    for path in left:
        findings.note(
            "leftover", f"{path} of a writer that was killed, or still writes", f"if killed: rm -r {_quote(path)}"
        )
    unfinished = place.resolve().parent / f".{place.resolve().name}.unfinished"
    if unfinished.is_dir():
        findings.note(
            "unfinished", f"{unfinished} of nmsparse prune", "to go on: that command once more, with the same options"
        )
    return findings


def _examine(findings: Findings, folder: Path, source: str, revision: str | None, task: str | None) -> None:
    kind = kind_of(folder)
    if kind is Kind.NOTHING:
        _other_files(findings, folder)
        return
    stored = folder_bytes(folder)
    findings.ok("kind", f"{kind.value}, {size(stored)}" if stored else kind.value)
    if _only_pickles(findings, folder):
        return
    if kind is Kind.MASK:
        _mask(findings, folder, source, revision, task)
    elif kind is Kind.CHECKPOINT:
        _checkpoint(findings, folder)
    elif kind is Kind.ADAPTER:
        findings.note("adapter", "of another method of PEFT; it is not read", "merge it into its base model first")
    elif kind is Kind.NPZ:
        _npz(findings, folder / NPZ_FILE)
    elif kind is not Kind.RUN:
        _model(findings, folder, kind)
    if checkpoints := checkpoints_in(folder):
        _run(findings, checkpoints, finished=kind is not Kind.RUN)
    _results(findings, folder)


# --- masks ----------------------------------------------------------------------------------------------------------
def _mask(findings: Findings, folder: Path, source: str, revision: str | None, task: str | None) -> None:
    from ..hub import verify
    from ..hub.delta import reference_in

    with findings.checking("codes"):
        if general := reference_in(folder):
            findings.ok("stored as", f"delta to the general mask {general}, which has to be there too")
        found = _counted(verify(source, None, revision, task))
        findings.ok("codes", f"{found}; every digest and code is right")
    if base := _base(findings, folder, source):
        compare = f"nmsparse verify {_quote(source)} --base {_quote(base)}"
        findings.ok("base model", f"{base} (to compare its weights: {compare})")


def _base(findings: Findings, folder: Path, source: str) -> str | None:
    """The base model that a mask or checkpoint names, unless that is a folder which is not there. Nothing is fetched."""
    try:
        base = base_of(folder)
        with fetching(base):  # looks at the name alone
            return base
    except ConfigError as error:
        advice = f"name it yourself, as in: nmsparse eval BASE --mask {_quote(source)}"
        findings.problem("base model", one_line(error), advice)
        return None


def _npz(findings: Findings, path: Path) -> None:
    if zipfile.is_zipfile(path):
        findings.note(
            "npz",
            "the end of the file is there; only with the base model can the masks be checked",
            f"nmsparse import-mask {_quote(path)} --base BASE --output DIR",
        )
    else:
        findings.problem("npz", f"{path.name} is no .npz, damaged or cut short", "fetch it again")


# --- models ---------------------------------------------------------------------------------------------------------
def _model(findings: Findings, folder: Path, kind: Kind) -> None:
    with findings.checking("weights"):
        if missing := _missing_shards(folder):
            raise FormatError(f"{len(missing)} files are missing, the first {missing[0]}; fetch or write it again")
        if kind is not Kind.BITMASK:  # which are checked while they are loaded
            _weights(findings, folder, kind)
        with findings.checking("loading"):
            _loads(findings, folder, kind)
    if kind is Kind.PACKED:
        findings.note(
            "in Python",
            "without `import hf_nmsparse` from_pretrained reports UNEXPECTED and MISMATCH keys, and fails (with "
            "ignore_mismatched_sizes=True: random weights)",
            "import hf_nmsparse before from_pretrained",
        )
    elif kind is Kind.BITMASK:
        findings.note(
            "in Python",
            "from_pretrained of Transformers 5 gives it random weights, with no error",
            "load it with nms.load_bitmask, or pack it: nmsparse compress",
        )


def _weights(findings: Findings, folder: Path, kind: Kind) -> None:
    from ..hub import verify

    report = verify(folder)
    if report.ok:
        digests = "; every digest is right" if kind is Kind.PACKED else ""
        findings.ok("weights", f"{_counted(report)}{digests}")
    elif report.layers and (folder / RESULTS_FILE).is_file():  # one of ours, which says that it is sparse
        findings.problem(
            "weights",
            f"{report.over} of {report.groups} groups have more weights than {report.pattern} keeps",
            f"nmsparse verify {_quote(folder)} names the layers; write it again",
        )
    else:
        findings.ok("weights", f"dense: no layer is {report.pattern} throughout")


def _missing_shards(folder: Path) -> list[str]:
    """Files that the index of a model in several files names and the folder lacks.

    Raises:
        FormatError: if an index is no JSON object with file names.
    """
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        shards = (read_json(index, MAX_LIST_BYTES) or {}).get("weight_map")
        if not isinstance(shards, dict):
            raise FormatError(f"{index} has no weight_map; fetch it again")
        named |= set(map(str, shards.values()))
    return sorted(name for name in named if not (folder / name).is_file())


def _loads(findings: Findings, folder: Path, kind: Kind) -> None:
    """Load a model as `from_pretrained` does, if there is room."""
    from ..hub import load_bitmask

    needed, free = _ROOM * folder_bytes(folder), available_memory("cpu")
    if needed > free:
        findings.note("loading", f"not tried: it takes about {size(needed)} of memory, {size(free)} is free")
    elif kind is Kind.BITMASK:
        load_bitmask(folder)
        findings.ok("loading", "nms.load_bitmask loads it")
    else:
        _load_plain(findings, folder)


def _load_plain(findings: Findings, folder: Path) -> None:
    import transformers

    architecture = next(iter((read_json(folder / "config.json") or {}).get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None:
        findings.note("loading", f"not tried: Transformers has no architecture {architecture!r}")
        return
    try:
        with fetching(str(folder.resolve())):
            _, info = model_class.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except RuntimeError as error:  # sizes other than those of the config
        findings.problem("loading", one_line(error), "config.json and the weights do not belong together")
        return
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        findings.problem("loading", f"{len(missing)} tensors are missing and would be random, the first {missing[0]}")
    else:
        findings.ok("loading", f"from_pretrained loads {architecture}")
    if unexpected:
        findings.note("loading", f"{len(unexpected)} tensors are not of this model, the first {unexpected[0]}")


# --- training -------------------------------------------------------------------------------------------------------
def _checkpoint(findings: Findings, folder: Path) -> None:
    """One of a trainer, or what `save_pretrained` leaves, with which no run can go on."""
    of_trainer = folder.name.startswith("checkpoint-") or any((folder / name).exists() for name in TRAINER_FILES)
    damage = checkpoint_damage(folder) if of_trainer else checkpoint_damage(folder, ADAPTER_FILES)
    if damage:
        whole = [path for path in numbered_checkpoints(folder.resolve().parent) if not checkpoint_damage(path)]
        findings.problem("files", ", ".join(damage), f"the last whole one is {whole[-1]}" if whole else "train again")
    else:
        findings.ok("files", f"whole{_step(folder)}")
    findings.note("use", "it holds what is trained, and is no published mask", "to publish: nms.save_mask")
    if base := _base(findings, folder, str(folder)):
        findings.ok("base model", base)


def _run(findings: Findings, checkpoints: list[Path], finished: bool) -> None:
    """The last whole checkpoint. Once its result is written, a run does not need them any more."""
    whole = []
    for checkpoint in checkpoints:
        if damage := checkpoint_damage(checkpoint):
            (findings.note if finished else findings.problem)(checkpoint.name, ", ".join(damage))
        else:
            whole.append(checkpoint)
    if not whole:
        advice = None if finished else "start the run again, with --overwrite"
        (findings.note if finished else findings.problem)("training run", "none of its checkpoints is whole", advice)
        return
    last = f"{whole[-1].name} is the last whole checkpoint{_step(whole[-1])}"
    if finished:
        findings.ok("training run", f"{last}; the run has ended, its result needs none")
    else:
        findings.note("training run", f"no result is written; {last}", f"to go on: {_command(whole[-1], checkpoints)}")


def _step(checkpoint: Path) -> str:
    state = read_json(checkpoint / "trainer_state.json", MAX_LIST_BYTES)
    return f", step {state.get('global_step')} of {state.get('max_steps')}" if state else ""


def _command(last: Path, checkpoints: list[Path]) -> str:
    """What goes on from a checkpoint; as it was typed, if `nmsparse train` has noted that."""
    noted = last.parent / COMMAND_FILE
    if noted.is_file():
        command = noted.read_text(encoding="utf-8").strip()
        if last == checkpoints[-1]:
            return command
        return f"{command.removesuffix(' --resume')} --resume_from_checkpoint {_quote(last)}"
    if last.parent.name == CHECKPOINTS:
        return "the same nmsparse train command, with " + (
            "--resume" if last == checkpoints[-1] else f"--resume_from_checkpoint {_quote(last)}"
        )
    return f'trainer.train(resume_from_checkpoint="{last}")'


# --- all of them ----------------------------------------------------------------------------------------------------
def _other_files(findings: Findings, folder: Path) -> None:
    if checkpoints := numbered_checkpoints(folder):  # of a Trainer in Python, or the inner folder of ours
        findings.ok("kind", "checkpoints of a training run")
        finished = folder.name == CHECKPOINTS and kind_of(folder.resolve().parent) not in (Kind.RUN, Kind.NOTHING)
        _run(findings, checkpoints, finished)
        return
    tasks = [path.name for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in _TASK_FILES)]
    if tasks:
        findings.note("kind", f"a folder of others: {', '.join(tasks)}", "name one of them; of a repo, with --task")
    elif (folder / RESULTS_FILE).is_file():
        findings.note("kind", "results of a run, without its mask or model", f"nmsparse report {_quote(folder)}")
    elif (noted := folder / CHECKPOINTS / COMMAND_FILE).is_file() and not holds_files(folder):
        command = noted.read_text(encoding="utf-8").strip().removesuffix(" --resume")
        findings.note("training run", "it has no checkpoint yet", f"if it does not run any more: {command}")
    elif not _only_pickles(findings, folder):
        found = "nothing that nmsparse reads" if holds_files(folder) else "no files"
        wanted = f"a mask has adapter_config.json, a model config.json, masks for others {NPZ_FILE}"
        findings.problem("kind", found, wanted)
    _results(findings, folder)


def _only_pickles(findings: Findings, folder: Path) -> bool:
    """Whether weights are there as pickles only. (`training_args.bin` is no weight.)"""
    pickles = [path.name for path in sorted(folder.glob("*.bin")) if path.name != "training_args.bin"]
    if not pickles or any(folder.glob("*.safetensors")):
        return False
    advice = "if you trust it, load it and save it again, as safetensors"
    findings.problem("weights", f"{pickles[0]} is a pickle, which can run code, and is not read", advice)
    return True


def _results(findings: Findings, folder: Path) -> None:
    from ..results import RunResults

    if (folder / RESULTS_FILE).is_file():
        try:
            RunResults.read(folder / RESULTS_FILE)
        except FormatError as error:
            findings.note(RESULTS_FILE, one_line(error), "reports and cards leave it out")
    if (folder / MASK_FOLDER / "adapter_config.json").is_file():
        findings.ok("mask beside it", f"nmsparse doctor {_quote(folder / MASK_FOLDER)}")


def _counted(report: VerifyReport) -> str:
    under = f", {report.under} with fewer" if report.under else ""
    dense = f", {len(report.dense_layers)} dense" if report.dense_layers else ""
    return f"{report.pattern} in {len(report.layers)} layers{dense}, {report.groups} groups{under}"


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
