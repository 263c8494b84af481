# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel works on this machine: what a failure does to the choice, what is logged, and the case it is tried on."""

import logging
import subprocess
from functools import partial

import pytest
import torch
from test_gluon_kernels import expected

from hf_nmsparse.codec import unpack_nibbles
from hf_nmsparse.ops.linear24 import Call24, Weight24, choose_kernel, dispatch, nvidia, portable, probe
from hf_nmsparse.ops.linear24.unpacked import UNPACKED

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KINDS = ["dense", "int8", "int4"]
OURS = [
    (nvidia, "_run_decode", nvidia.DECODE),
    (nvidia, "_run_gemm", nvidia.GEMM),
    (portable, "_run", portable.PORTABLE),
]
EACH_OF_OURS = pytest.mark.parametrize("module,run,kernel", OURS, ids=lambda given: getattr(given, "name", ""))


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.setattr(probe, "_known", {})
    probe._say_untried.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as the choice goes: an A100 with Triton, on which kernels get the small case in memory of the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nvidia, "has_gluon", lambda: True)
    monkeypatch.setattr(portable, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "measured_times", lambda call: {})
    case = probe.small_case
    monkeypatch.setattr(probe, "small_case", lambda device, dtype, kind: case(CPU, dtype, kind))


class Trial:
    """Stands in for a kernel: right unless told to raise; counts its calls."""

    def __init__(self, error: Exception | None = None, mistake: float = 0):
        self.error, self.mistake, self.calls = error, mistake, 0

    def __call__(self, x, weight, bias):
        self.calls += 1
        if self.error:
            raise self.error
        return UNPACKED.run(x, weight, bias) + self.mistake


def call(kind="dense", dtype=torch.bfloat16, tokens=4) -> Call24:
    return Call24(CUDA, dtype, kind, 64, 256, tokens)


def failures() -> list[Exception]:
    """What torch and Triton raised where something was lacking."""
    errors = [
        RuntimeError("Failed to find C compiler.\nat file"),
        NotImplementedError("no such operation"),
        FileNotFoundError(2, "No such file or directory", "/nonexistent/cc"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        AssertionError("libcuda.so cannot found!"),
        ImportError("undefined symbol"),
        AttributeError("module 'gluon' has no attribute 'jit'"),
    ]
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return errors
    return [
        *errors,
        PTXASError("ptxas fatal : Value 'sm_123' is not defined"),
        OutOfResources(200, 100, "shared memory"),
        CompilationError("def kernel():\n" + "    pass\n" * 20, None, "NameError: no such name"),
    ]


# --- what a failure does --------------------------------------------------------------------------------------------
@EACH_OF_OURS
@pytest.mark.parametrize("trial", [*map(Trial, failures()), Trial(mistake=1)], ids=lambda t: type(t.error).__name__)
def test_a_kernel_that_does_not_work_is_declined_and_said_once(a_gpu, monkeypatch, caplog, module, run, kernel, trial):
    trial.calls = 0
    monkeypatch.setattr(module, run, trial)
    assert not kernel.works(call()) and not kernel.works(call(tokens=3))
    assert trial.calls == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    assert all(word in record.message for word in (kernel.name, "cuda:0", "bfloat16", "C compiler"))
    reason = type(trial.error).__name__ if trial.error else "its result is wrong"
    assert reason in record.message and "pass" not in record.message


@pytest.mark.parametrize("error", failures(), ids=lambda error: type(error).__name__)
def test_the_line_tells_what_was_raised(caplog, error):
    assert not probe.works("name", Trial(error), CPU, torch.bfloat16)
    assert (getattr(error, "error_message", None) or str(error)).split()[0] in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_where_none_of_ours_works_the_weight_is_unpacked(a_gpu, monkeypatch, caplog, kind, tokens):
    for module, run, _ in OURS:
        monkeypatch.setattr(module, run, Trial(RuntimeError("Failed to find C compiler")))
    assert choose_kernel(call(kind, tokens=tokens)) is UNPACKED
    lines = [record.message for record in caplog.records]
    assert lines and len(set(lines)) == len(lines)
    assert choose_kernel(call(kind, tokens=tokens), dense_at_hand=True) is None


def test_where_one_does_not_work_the_next_is_chosen(a_gpu, monkeypatch):
    for module, run, _ in OURS:
        monkeypatch.setattr(module, run, Trial())
    assert choose_kernel(call()) is nvidia.DECODE
    monkeypatch.setattr(probe, "_known", {})
    monkeypatch.setattr(nvidia, "_run_decode", Trial(mistake=1))
    assert choose_kernel(call()) is portable.PORTABLE


def test_only_kernels_that_would_be_chosen_are_tried(a_gpu, monkeypatch):
    trials = {}
    for module, run, kernel in OURS:
        monkeypatch.setattr(module, run, trials.setdefault(kernel.name, Trial()))
    assert choose_kernel(call()) is nvidia.DECODE
    assert {name: trial.calls for name, trial in trials.items()} == {"mma.sp decode": 1, "mma.sp GEMM": 0, "Triton": 0}
    assert choose_kernel(call("int8", tokens=4000), dense_at_hand=True) is None
    assert sum(trial.calls for trial in trials.values()) == 1


def test_the_next_best_of_a_table_takes_over_where_the_best_does_not_work(a_gpu, monkeypatch):
    for module, run, _ in OURS:
        monkeypatch.setattr(module, run, Trial())
    monkeypatch.setattr(nvidia, "_run_decode", broken := Trial(mistake=1))
    times = {"mma.sp decode": 1.0, "Triton": 2.0, "mma.sp GEMM": 3.0, "dense": 2.5}
    monkeypatch.setattr(dispatch, "measured_times", lambda call: times)
    assert choose_kernel(call(), dense_at_hand=True) is portable.PORTABLE and broken.calls == 1
    times["dense"] = 1.5  # beats what is left
    assert choose_kernel(call(), dense_at_hand=True) is None


def test_each_dtype_kind_and_device_is_tried():
    trial = Trial()
    for kind, dtype in [("dense", torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float16)] * 2:
        assert probe.works("name", trial, CPU, dtype, kind)
    assert trial.calls == 3


def test_the_trial_is_of_its_dtype_whatever_autocast_says():
    with torch.autocast("cpu", torch.bfloat16):
        assert probe.works("name", Trial(), CPU, torch.float32)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("bug")])
def test_errors_that_say_nothing_about_the_machine_are_raised_and_not_remembered(error):
    with pytest.raises(type(error)):
        probe.works("name", Trial(error), CPU, torch.bfloat16)
    assert probe.works("name", Trial(), CPU, torch.bfloat16)


# --- while a CUDA graph is captured ---------------------------------------------------------------------------------
@EACH_OF_OURS
def test_nothing_is_tried_while_a_graph_is_captured(a_gpu, monkeypatch, caplog, module, run, kernel):
    monkeypatch.setattr(module, run, trial := Trial())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernel.works(call()) and not kernel.works(call())
    assert trial.calls == 0 and len(caplog.records) == 1 and "before the capture" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernel.works(call())  # it was not held to be broken
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernel.works(call()) and trial.calls == 1


def test_a_graph_captured_without_a_call_before_unpacks(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_kernel(call()) is UNPACKED


# --- the small case -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_small_case_is_exact(dtype, kind):
    x, weight, bias = probe.small_case(CPU, dtype, kind)
    weight.check()
    assert (weight.kind, weight.dtype, x.dtype, bias.dtype) == (kind, dtype, dtype, dtype)
    assert torch.equal(UNPACKED.run(x, weight, bias).double(), expected(x, weight, bias))
    most = x.abs().double() @ weight.dense().abs().double().t() + bias.abs()
    assert 2 * most.max() <= 2**8  # halves, and bfloat16 has 8 bits: each partial sum is exact too, in any order


MISTAKES = {
    "ids of another row": lambda w: Weight24(w.values, w.ids.flip(0), w.scale),
    "ids of another group": lambda w: Weight24(w.values, w.ids.roll(1, 1), w.scale),
    "nibbles exchanged": lambda w: Weight24(w.values, w.ids >> 4 | w.ids << 4, w.scale),
    "values of another row": lambda w: Weight24(w.values.roll(8, 0), w.ids, w.scale),
    "values of another group": lambda w: Weight24(w.values.roll(2, 1), w.ids, w.scale),
    "one value": lambda w: Weight24(w.values.index_fill(1, torch.tensor([77 % w.values.shape[1]]), 1), w.ids, w.scale),
    "scales of another row": lambda w: Weight24(w.values, w.ids, w.scale.roll(8, 0)),
    "scales of another group": lambda w: Weight24(w.values, w.ids, w.scale.flip(1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_small_case_is_no_easy_one(kind, mistake):
    if kind == "dense" and "scales" in mistake:
        pytest.skip("has none")

    def run(x, weight, bias):
        return UNPACKED.run(x, MISTAKES[mistake](weight), bias)

    assert not probe.works("name", run, CPU, torch.bfloat16, kind)


@pytest.mark.parametrize("mistake", [partial(torch.roll, shifts=1, dims=0), partial(torch.roll, shifts=8, dims=1)])
def test_tokens_and_rows_in_another_order_are_seen(mistake):
    assert not probe.works("name", lambda *case: mistake(UNPACKED.run(*case)), CPU, torch.bfloat16)


def test_values_of_four_bits_are_those_of_eight():
    weight = probe.small_case(CPU, torch.float16, "int8")[1]
    assert torch.equal(unpack_nibbles(probe.small_case(CPU, torch.float16, "int4")[1].values), weight.values)
