# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for masks: interpreted on the CPU, compiled for GPUs that are not there, and run on one that is."""

import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_checks.interpreter_run import run_in_interpreter
from kernel_checks.mask_cases import PATTERNS, Case, errors
from test_gluon_kernels import needs_gpu

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import gpu_masks

TESTS = Path(__file__).parent
CUDA = torch.device("cuda", 0)


def test_the_kernels_are_right_in_the_interpreter():
    run_in_interpreter("interpreted_masks.py")


# --- the choice -----------------------------------------------------------------------------------------------------
class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    device = CUDA


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as the choice goes."""
    monkeypatch.setattr(gpu_masks, "has_triton", lambda: True)
    monkeypatch.setattr(gpu_masks, "is_plain_eager", lambda *tensors: True)
    monkeypatch.setattr(gpu_masks, "_works", lambda *case: True)
    monkeypatch.setattr(gpu_masks, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu_masks._say_untried.cache_clear()


def taken(pattern: str, device=OnGpu, **changes) -> bool:
    case = Case.random(pattern, 2, 20, **changes)
    return gpu_masks.takes(*(t.as_subclass(device) for t in (case.weight, case.logits)), case.pattern)


def test_candidates_on_a_gpu_are_taken(a_gpu):
    assert all(taken(pattern, dtype=torch.float16, logit_dtype=torch.bfloat16) for pattern in PATTERNS)


@pytest.mark.parametrize("pattern", ["4:8", "2:5", "2:3", "1:16"])
def test_patterns_beyond_the_kernels_are_declined(a_gpu, pattern):
    assert not taken(pattern)


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float64}, {"logit_dtype": torch.float16}, {"device": torch.Tensor}]
)
def test_other_tensors_are_declined(a_gpu, change):
    assert taken("2:4") and not taken("2:4", **change)


def test_without_triton_or_inside_of_transforms_they_are_declined(a_gpu, monkeypatch):
    monkeypatch.setattr(gpu_masks, "has_triton", lambda: False)
    assert not taken("2:4")
    monkeypatch.setattr(gpu_masks, "has_triton", lambda: True)
    monkeypatch.setattr(gpu_masks, "is_plain_eager", ops.is_plain_eager)
    assert not taken("2:4")  # a subclass


GIVEN = (CUDA, torch.bfloat16, torch.float32, NMPattern("2:4"))


@pytest.mark.parametrize("trial", [RuntimeError("Failed to find C compiler"), False])
def test_kernels_that_do_not_work_are_declined_with_one_warning(monkeypatch, caplog, trial):
    def is_right(*case):
        if isinstance(trial, Exception):
            raise trial
        return trial

    monkeypatch.setattr(gpu_masks, "_known", {})
    monkeypatch.setattr(gpu_masks, "_is_right", is_right)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert not gpu_masks._works(*GIVEN) and not gpu_masks._works(*GIVEN)
    (message,) = caplog.messages
    assert "2:4" in message and ("C compiler" in message if trial else "result is wrong" in message)


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch, caplog):
    capturing = True
    monkeypatch.setattr(gpu_masks, "_known", {})
    monkeypatch.setattr(gpu_masks, "_is_right", lambda *case: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpu_masks._say_untried.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not gpu_masks._works(*GIVEN) and not gpu_masks._works(*GIVEN)
    assert len(caplog.messages) == 1
    capturing = False
    assert gpu_masks._works(*GIVEN)
    capturing = True
    assert gpu_masks._works(*GIVEN)


# --- what Triton compiles -------------------------------------------------------------------------------------------
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    **dict.fromkeys(("temperature", "scale", "regularization"), "*fp32"),
    **{"step": "*i64", "draw": "*i64"},
}
INTEGERS = dict.fromkeys(("seed", "layer", "in_features", "groups", "blocks"), "i32")


def compile_for(target, name: str, pattern: str, dtype: str, logits: str, tail: int = 0):
    """What Triton makes of a kernel, and the groups of a thread; `in_features` is divisible by 16 but for a tail."""
    import triton

    from hf_nmsparse.ops import triton_masks

    kernel, nm = getattr(triton_masks, name), NMPattern(pattern)
    types = dict.fromkeys(("weight", "result", "grad", "grad_weight"), f"*{dtype}")
    types |= dict.fromkeys(("logits", "grad_logits"), f"*{logits}") | POINTERS | INTEGERS
    names = list(kernel.arg_names)
    divisible = () if tail else ("in_features", "groups")
    aligned = [n for n in names if types.get(n, "").startswith("*") or n in divisible]
    constants = gpu_masks.compile_time(nm, tail, NUMBERS[dtype]) | {"NVIDIA": target.backend == "cuda"}
    constants |= {"KEPT": gpu_masks._bits(nm, by_position=False), "FOR_WEIGHT": False, "FOR_LOGITS": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        built = triton.compile(
            triton.compiler.ASTSource(
                fn=kernel,
                signature={n: types.get(n, "constexpr") for n in names},
                constexprs={n: value for n, value in constants.items() if n in names},
                attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
            ),
            target=target,
            options={"num_warps": gpu_masks.WARPS},
        )
    return built, constants["GROUPS"] // (32 * gpu_masks.WARPS)


def machine_code(built, folder: Path) -> tuple[Counter, int, int]:
    """Instructions by name, registers, and the bytes of local memory and stack a thread."""
    check = pytest.importorskip("kernel_checks.compile_check")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = check._run("cuobjdump", "--dump-resource-usage", cubin)
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(check.OPCODE.findall(check._run("nvdisasm", "-c", cubin)))
    return opcodes, sizes["REG"], sizes["STACK"] + sizes["LOCAL"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name,pattern,dtype,logits,registers,instructions",
    [
        ("masked_weight", "2:4", "bf16", "fp32", 40, 280),
        ("gradients", "2:4", "bf16", "fp32", 48, 350),
        ("gradients", "1:8", "bf16", "bf16", 56, 520),
        pytest.param("gradients", "2:8", "bf16", "bf16", 96, 1400, marks=pytest.mark.slow),
    ],
)
def test_a_thread_holds_its_groups_in_registers_and_exchanges_nothing(
    name, pattern, dtype, logits, registers, instructions, capability, tmp_path
):
    compiler = pytest.importorskip("triton.backends.compiler")
    built, groups = compile_for(compiler.GPUTarget("cuda", capability, 32), name, pattern, dtype, logits)
    opcodes, used, local = machine_code(built, tmp_path)
    assert used <= registers and local == 0 and not {"LDL", "STL"} & {op.split(".")[0] for op in opcodes}
    assert built.metadata.shared == 0 and not any(op.startswith(("LDS", "STS", "BAR", "SHFL")) for op in opcodes)
    assert sum(opcodes.values()) - opcodes["NOP"] <= instructions * groups

    def count(start: str, end: str) -> int:
        return sum(n for op, n in opcodes.items() if op.startswith(start) and op.endswith(end))

    # Weights, gradients and results by 16 bytes a thread; logits by what belongs to the groups of the thread.
    assert count("LDG", ".128") == (1 if name == "masked_weight" else 2)
    assert count("STG", ".128") == (1 if name == "masked_weight" else 0)
    if pattern == "2:4":
        assert count("LDG", ".64") == 6 and count("STG", ".64") == (0 if name == "masked_weight" else 6)
    logarithms = 2 * NMPattern(pattern).num_candidates * groups
    assert opcodes["MUFU.LG2"] == logarithms and opcodes["MUFU.EX2"] == logarithms // 2


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype,logits,tail", [("fp32", "fp32", 0), ("fp16", "bf16", 1)])
@pytest.mark.parametrize("name", ["masked_weight", "gradients"])
def test_nothing_spills(name, dtype, logits, tail, pattern, tmp_path):
    compiler = pytest.importorskip("triton.backends.compiler")
    built, _ = compile_for(compiler.GPUTarget("cuda", 80, 32), name, pattern, dtype, logits, tail)
    _, registers, local = machine_code(built, tmp_path)
    assert local == 0 and registers <= 128


@pytest.mark.parametrize("name", ["masked_weight", "gradients"])
def test_compiles_for_amd(name):
    compiler = pytest.importorskip("triton.backends.compiler")
    pytest.importorskip("triton.backends.amd")
    built, _ = compile_for(compiler.GPUTarget("hip", "gfx942", 64), name, "2:4", "bf16", "fp32")
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", built.asm["amdgcn"]) == ["0"]


# --- on a GPU -------------------------------------------------------------------------------------------------------
class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("scale,temperature,limit", [(100.0, 4.0, 1e-6), (500.0, 0.05, 5e-5)])
    @pytest.mark.parametrize("rows,in_features", [(3, 3), (37, 509), (65, 1199), (128, 4096)])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_agrees_with_float64(self, pattern, rows, in_features, scale, temperature, limit):
        case = Case.random(pattern, rows, in_features, scale, temperature, device="cuda")
        weight, logits = (t.clone().requires_grad_() for t in (case.weight, case.logits))
        assert gpu_masks.takes(weight, logits, case.pattern)
        result = ops.masked_weight(weight, logits, case.pattern, case.key, case.state)
        result.backward(case.grad)
        assert max(errors((result.detach(), weight.grad, logits.grad), case)) < limit

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_right_to_one_rounding(self, dtype):
        case = Case.random("2:4", 33, 1030, dtype=dtype, logit_dtype=torch.bfloat16, device="cuda")
        rest = (case.weight, case.logits, case.pattern, case.key, case.state)
        found = gpu_masks.masked_weight(*rest), *gpu_masks.gradients(case.grad, *rest, (True, True))
        for value, exact in zip(found, case.exact(), strict=True):
            limit = torch.finfo(value.dtype).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
            assert ((value.cpu().double() - exact).abs() <= limit).all()
