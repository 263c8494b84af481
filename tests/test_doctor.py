# SPDX-License-Identifier: Apache-2.0
"""`nmsparse doctor`: what it says of machines, folders and repos, sound and not."""

import importlib.metadata

import pytest
import torch
from command_line import facts, run

from hf_nmsparse.ops.linear24.tables import forget_tables
from hf_nmsparse.ops.native_build import native_library


def found(line: str, code: int = 0) -> dict[str, dict]:
    """The checks of `nmsparse doctor` by what they looked at; a name that is there twice has the last."""
    report = facts(f"doctor {line}", code)
    checks = [check for finding in report["findings"] for check in finding["checks"]]
    assert report["problems"] == sum(check["state"] == "problem" for check in checks)
    assert report["notes"] == sum(check["state"] == "note" for check in checks)
    return {check["what"]: check for check in checks}


# --- the machine ----------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, while what this process has compiled stays its own."""
    native_library()
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "cache"))
    forget_tables()
    yield tmp_path / "cache"
    forget_tables()


def test_a_sound_machine():
    checks = found("")
    assert checks["torch"]["state"] == "ok" and checks["torch"]["found"].startswith(torch.__version__)
    assert checks["cpu uses"]["found"] in checks["cpu can run"]["found"]
    assert {"CPU", "C++", "token", "cache of kernels and times", "cache of the Hub"} <= checks.keys()
    shown = run("doctor").stdout.splitlines()
    assert "  ok       torch: " in "\n".join(shown) and shown[-1].startswith("0 problems")
    assert max(map(len, shown)) > 80  # in a file a check is one line


def test_packages_that_are_absent_or_of_another_version(monkeypatch):
    asked = ["torch>=99", "no-such-package", "gguf>=99; extra == 'demo'", "pytest; extra == 'report'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    checks = found("", 1)
    assert (checks["torch"]["state"], checks["torch"]["advice"]) == ("problem", "pip install 'torch>=99'")
    assert (checks["no-such-package"]["state"], checks["no-such-package"]["found"]) == ("problem", "missing")
    assert (checks["[demo]"]["state"], checks["[demo]"]["advice"]) == ("note", "pip install 'hf-nmsparse[demo]'")
    assert checks["[report]"]["state"] == "ok"


@pytest.mark.parametrize(
    ("variables", "state", "said"),
    [
        ({"CXX": "false"}, "problem", "false fails"),
        ({"CXX": "/no/such/compiler"}, "problem", "No such file"),
        ({"PATH": "/nowhere"}, "note", "no compiler"),
        ({"NMSPARSE_NATIVE": "0"}, "note", "NMSPARSE_NATIVE=0"),
    ],
)
def test_compilers_that_are_not_there_or_fail(cache, monkeypatch, variables, state, said):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = found("", int(state == "problem"))["C++"]
    assert check["state"] == state and said in check["found"] and check["advice"]


def test_a_damaged_table_of_times_is_named(cache, monkeypatch):
    monkeypatch.setenv("NMSPARSE_NATIVE", "0")  # nothing is compiled into the empty cache
    (cache / "tables").mkdir(parents=True)
    (cache / "tables" / "cpu.json").write_text('{"version": 1}')
    check = found("", 1)["measured times"]
    assert "cpu.json" in check["found"] and check["advice"].startswith("remove ")


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "file" / "below"))
    check = found("", 1)["cache of kernels and times"]
    assert "cannot be written" in check["found"] and "NMSPARSE_CACHE" in check["advice"]


def test_a_gpu_that_does_not_answer_is_a_problem_and_no_crash(monkeypatch):
    def fail(device):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    checks = found("", 1)
    assert (checks["cuda:0"]["state"], checks["cuda:0"]["found"]) == ("problem", "driver too old")
    assert "cpu uses" in checks and "cuda:0 uses" not in checks
