# SPDX-License-Identifier: Apache-2.0
"""What `nmsparse doctor` looks at on a machine: packages, processors, kernels, the Hub and the caches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError
from .common import one_line, size
from .findings import Findings

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

_PACKAGE = "hf-nmsparse"
_EXTRAS = {
    "triton": "GPU kernels",
    "demo": "nmsparse demo",
    "report": "figures of nmsparse report",
    "datasets": "texts named as owner/name:config",
    "eval": "nmsparse eval --tasks and --suite",
    "permute": "nmsparse prune --permute-channels",
}
_FIRST_SPARSE_GPU = (8, 0)  # Ampere, the first with 2:4 tensor cores
_SHAPE, _TOKENS = (4096, 4096), (1, 64)  # of a layer of a language model: one token at a time, and a prompt
_LITTLE_DISK = 5 * 10**9


def examine_machine() -> list[Findings]:
    """All checks that need no folder."""
    devices = Findings("devices")
    usable = [*_gpus(devices), _cpu(devices)]
    return [_software(), devices, _kernels(usable), _hub()]


# --- packages -------------------------------------------------------------------------------------------------------
def _software() -> Findings:
    """Versions against what the metadata of the installed package asks for."""
    from packaging.requirements import Requirement

    findings = Findings("software")
    findings.ok("python", platform.python_version())
    try:
        findings.ok(_PACKAGE, importlib.metadata.version(_PACKAGE))
        required = [Requirement(text) for text in importlib.metadata.requires(_PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        findings.problem(_PACKAGE, "not installed, so versions cannot be compared", "pip install hf-nmsparse")
        return findings
    for requirement in required:
        if _applies(requirement, ""):
            _check(findings, requirement)
    for extra, use in _EXTRAS.items():
        wanted = [one for one in required if _applies(one, extra) and not _applies(one, "")]
        lacking = [one.name for one in wanted if not _fits(one)]
        if lacking:
            findings.note(f"[{extra}]", f"for {use}: no {', '.join(lacking)}", f"pip install 'hf-nmsparse[{extra}]'")
        elif wanted:
            findings.ok(f"[{extra}]", f"for {use}: {', '.join(f'{one.name} {_version(one)}' for one in wanted)}")
    return findings


def _check(findings: Findings, requirement: Requirement) -> None:
    """Of packages of which any version will do, only an absent one is worth a line."""
    found, advice = _version(requirement), f"pip install '{requirement.name}{requirement.specifier}'"
    if found is None:
        findings.problem(requirement.name, "missing", advice)
    elif not _fits(requirement):
        findings.problem(requirement.name, f"{found}, supported is {requirement.specifier}", advice)
    elif requirement.specifier:
        findings.ok(requirement.name, f"{found} (supported: {requirement.specifier})")


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(requirement: Requirement) -> str | None:
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement) -> bool:
    found = _version(requirement)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


# --- processors -----------------------------------------------------------------------------------------------------
def _cpu(findings: Findings) -> torch.device:
    import psutil
    import torch

    from ..ops.machine import cpu_name

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, memory = torch.get_num_threads(), psutil.virtual_memory()
    described = f"{cpu_name()}, {usable} processors, torch threads: {threads}, "
    described += f"{size(memory.available)} of {size(memory.total)} free"
    if threads > usable:
        findings.note("CPU", described, f"more threads than processors slow each other down: OMP_NUM_THREADS={usable}")
    else:
        findings.ok("CPU", described)
    return torch.device("cpu")


def _gpus(findings: Findings) -> list[torch.device]:
    """Those that answer."""
    import torch

    if torch.backends.mps.is_available():
        findings.note("MPS", "packed layers are unpacked for each call on it")
    elif torch.cuda.device_count() == 0:
        _no_gpu(findings)
    usable = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            _gpu(findings, device)
            usable.append(device)
        except RuntimeError as error:  # of the driver
            findings.problem(str(device), one_line(error), "look at nvidia-smi, and whether driver and torch fit")
    return usable


def _gpu(findings: Findings, device: torch.device) -> None:
    import torch

    capability, (free, total) = torch.cuda.get_device_capability(device), torch.cuda.mem_get_info(device)
    described = f"{torch.cuda.get_device_name(device)}, capability {'.'.join(map(str, capability))}, "
    described += f"{size(free)} of {size(total)} free"
    if torch.version.hip is None and capability < _FIRST_SPARSE_GPU:
        findings.note(str(device), f"{described}; without 2:4 tensor cores (8.0 and later) packing saves memory only")
    else:
        findings.ok(str(device), described)


def _no_gpu(findings: Findings) -> None:
    import torch

    if not Path("/proc/driver/nvidia/version").is_file():
        findings.ok("GPU", "none, everything runs on the CPU")
    elif torch.version.cuda is None:
        findings.note(
            "GPU", "there is an NVIDIA driver, but torch is a build without CUDA", "see pytorch.org for one with"
        )
    else:
        findings.note(
            "GPU", "there is an NVIDIA driver, but torch finds none", "look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        )


# --- kernels --------------------------------------------------------------------------------------------------------
def _kernels(devices: list[torch.device]) -> Findings:
    findings = Findings("kernels of packed layers")
    _native(findings)
    for device in devices:
        with findings.checking(str(device)):
            _choices(findings, device)
            _times(findings, device)
    _damaged_tables(findings)
    return findings


def _native(findings: Findings) -> None:
    """Whether our C++ compiles and loads; compiles it if that was not yet done."""
    from ..ops.native_build import build, find_compiler, load

    slower = "masks, optimizer, pruning and packed layers on the CPU run in plain torch, several times slower"
    compiler = find_compiler()
    if os.environ.get("NMSPARSE_NATIVE") == "0":
        findings.note("C++", f"switched off (NMSPARSE_NATIVE=0): {slower}", "unset NMSPARSE_NATIVE")
    elif compiler is None:
        findings.note("C++", f"no compiler: {slower}", "install g++ or clang++, or name one with CXX")
    else:
        try:
            library = load(build("-march=native"))
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            findings.problem(
                "C++", f"{compiler} fails ({said[-1] if said else error}): {slower}", "try another with CXX"
            )
        except OSError as error:
            findings.problem("C++", f"{one_line(error)}: {slower}", "look at CXX, and at the cache folder below")
        else:
            findings.ok("C++", f"compiled by {compiler}, for {library.nmsparse_instructions().decode()}")


def _choices(findings: Findings, device: torch.device) -> None:
    """Which kernels typical calls take, and which others would do."""
    import torch

    from ..ops import VALUE_KINDS, choose_kernel
    from ..ops.linear24 import PORTABLE, kernels_for
    from ..ops.linear24.measure import forward_call
    from ..ops.linear24.unpacked import UNPACKED

    calls = {
        f"{tokens} x {kind}": forward_call(device, torch.bfloat16, kind, _SHAPE, tokens)
        for tokens in _TOKENS
        for kind in VALUE_KINDS
    }
    chosen: dict[str, list[str]] = {}
    for case, call in calls.items():
        chosen.setdefault(choose_kernel(call).name, []).append(case)
    found = next(iter(chosen))
    if len(chosen) > 1:
        found = "; ".join(f"{name} for {', '.join(cases)}" for name, cases in chosen.items())
        found += f" (tokens x values, of a {_SHAPE[0]}x{_SHAPE[1]} layer in bfloat16)"
    if UNPACKED.name in chosen or (device.type == "cuda" and PORTABLE.name in chosen):
        findings.note(f"{device} uses", found, "no fast kernel takes all of these here; see docs/KERNELS.md")
    else:
        findings.ok(f"{device} uses", found)
    findings.ok(f"{device} can run", ", ".join(kernel.name for kernel in kernels_for(next(iter(calls.values())))))


def _times(findings: Findings, device: torch.device) -> None:
    """Whether there are measured times to choose kernels by."""
    import torch

    from ..ops import measured_times
    from ..ops.linear24.measure import forward_call

    here = f"with {torch.get_num_threads()} torch thread(s)" if device.type == "cpu" else "on such a GPU"
    if measured_times(forward_call(device, torch.bfloat16, "dense", _SHAPE, _TOKENS[0])):
        findings.ok(f"{device} times", f"kernels are chosen by times measured {here}")
    else:
        findings.note(
            f"{device} times",
            f"none of a {_SHAPE[0]}x{_SHAPE[1]} layer {here}: kernels are chosen in a fixed order",
            "to choose by speed: nmsparse bench --tune, on an idle machine",
        )


def _damaged_tables(findings: Findings) -> None:
    from ..files import read_json
    from ..ops.linear24.tables import check_table, tuned_folder

    with findings.checking("measured times"):
        for path in sorted(tuned_folder().glob("*.json")):
            try:
                check_table(read_json(path), str(path))
            except FormatError as error:
                findings.problem("measured times", f"{one_line(error)}: it is left out", f"remove {path}")


# --- Hub and caches -------------------------------------------------------------------------------------------------
def _hub() -> Findings:
    from huggingface_hub import constants, get_token, is_offline_mode

    from ..ops.machine import cache_folder
    from .assets import cache_folder as assets_folder

    findings = Findings("Hub and caches")
    if is_offline_mode():
        findings.note(
            "Hub", "switched off (HF_HUB_OFFLINE): only what is in the cache can be used", "unset HF_HUB_OFFLINE"
        )
    else:
        findings.ok("Hub", f"{constants.ENDPOINT} may be asked (whether it answers was not tried)")
    if get_token():
        findings.ok("token", "there is one (hf auth whoami says whose)")
    else:
        findings.note("token", "none: no private or gated repos, and no push", "hf auth login")
    with findings.checking("cache of kernels and times"):
        _writable(findings, "cache of kernels and times", cache_folder(), "name another with NMSPARSE_CACHE")
    _writable(findings, "cache of the Hub", Path(constants.HF_HUB_CACHE), "name another with HF_HOME")
    _writable(findings, "cache of the demo", assets_folder(), "name another with HF_NMSPARSE_CACHE")
    return findings


def _writable(findings: Findings, what: str, folder: Path, advice: str) -> None:
    """Whether a folder, or where it would be made, can be written, and has room. Leaves nothing there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        findings.problem(what, f"{folder} cannot be written ({one_line(error)})", advice)
        return
    described = f"{folder}{'' if there == folder.absolute() else ' (not made yet)'}, {size(free)} free"
    if free < _LITTLE_DISK:
        findings.note(what, f"{described}, which is little for models", advice)
    else:
        findings.ok(what, described)
