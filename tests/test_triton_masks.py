# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for masks: interpreted on the CPU, compiled for GPUs that are not there, and run on one that is."""

import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernel_checks.interpreter_run import failures_in_interpreter
from kernel_checks.mask_cases import KINDS, Case, errors
from test_gluon_kernels import needs_gpu

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import gpu_masks
from hf_nmsparse.ops.trial import Trials

TESTS = Path(__file__).parent
CUDA = torch.device("cuda", 0)


def test_the_kernels_are_right_in_the_interpreter():
    assert not failures_in_interpreter("interpreted_masks.py")


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


def taken(pattern: str, device=OnGpu, **changes) -> bool:
    case = Case.random(pattern, 2, 20, **changes)
    return gpu_masks.takes(*(t.as_subclass(device) for t in (case.weight, case.logits)), case.pattern)


def test_logits_on_a_gpu_are_taken(a_gpu):
    rest = {"dtype": torch.float16, "logit_dtype": torch.bfloat16}
    assert all(taken(pattern, per_weight=per_weight, **rest) for pattern, per_weight in KINDS)


@pytest.mark.parametrize("pattern,per_weight", [("4:8", False), ("2:16", False), ("2:3", False), ("2:5", True)])
def test_patterns_beyond_the_kernels_are_declined(a_gpu, pattern, per_weight):
    assert not taken(pattern, per_weight=per_weight)


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


@pytest.mark.parametrize("trial", [RuntimeError("Failed to find C compiler"), False, True])
def test_kernels_are_tried_once_for_each_case(monkeypatch, caplog, trial):
    tried = []

    def is_right(*case):
        tried.append(case)
        if isinstance(trial, Exception):
            raise trial
        return trial

    monkeypatch.setattr(gpu_masks, "_trials", Trials("the fused mask kernels", "take a step"))
    monkeypatch.setattr(gpu_masks, "_is_right", is_right)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cases = [(CUDA, torch.bfloat16, torch.float32, NMPattern("2:4"), method) for method in ("candidates", "sums")]
    with caplog.at_level(logging.WARNING):
        found = [gpu_masks._works(*case) for case in cases * 2]
    assert tried == cases and found == [trial is True] * 4
    assert len(caplog.messages) == (0 if trial is True else 2) and all("2:4" in text for text in caplog.messages)


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    capturing = True
    monkeypatch.setattr(gpu_masks, "_trials", Trials("the fused mask kernels", "take a step"))
    monkeypatch.setattr(gpu_masks, "_is_right", lambda *case: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    case = (CUDA, torch.bfloat16, torch.float32, NMPattern("2:4"), "sums")
    assert not gpu_masks._works(*case)
    capturing = False
    assert gpu_masks._works(*case)
    capturing = True
    assert gpu_masks._works(*case)


# --- what Triton compiles -------------------------------------------------------------------------------------------
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    **dict.fromkeys(("temperature", "scale", "regularization"), "*fp32"),
    **{"step": "*i64", "draw": "*i64"},
}
INTEGERS = dict.fromkeys(("seed", "layer", "in_features", "groups", "blocks"), "i32")


def compile_for(target, name: str, pattern: str, method: str, dtype: str, logits: str, tail: int = 0):
    """What Triton makes of a kernel, and the groups of a thread; `in_features` is divisible by 16 but for a tail."""
    import triton

    from hf_nmsparse.ops import triton_masks

    kernel, nm = getattr(triton_masks, name), NMPattern(pattern)
    types = dict.fromkeys(("weight", "result", "grad", "grad_weight"), f"*{dtype}")
    types |= dict.fromkeys(("logits", "grad_logits"), f"*{logits}") | POINTERS | INTEGERS
    names = list(kernel.arg_names)
    divisible = () if tail else ("in_features", "groups")
    aligned = [n for n in names if types.get(n, "").startswith("*") or n in divisible]
    constants = gpu_masks.compile_time(method, nm, tail, NUMBERS[dtype], NUMBERS[logits])
    constants |= {"NVIDIA": target.backend == "cuda", "FOR_WEIGHT": False, "FOR_LOGITS": True}
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


@dataclass(frozen=True)
class MachineCode:
    """Instructions by name, those of the loop over tiles, registers, and the bytes of local memory and stack a thread."""

    opcodes: Counter
    loop: int
    registers: int
    local: int

    @classmethod
    def of(cls, built, folder: Path) -> "MachineCode":
        check = pytest.importorskip("kernel_checks.compile_check")
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = check._run("cuobjdump", "--dump-resource-usage", cubin)
        sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        sass = check._run("nvdisasm", "-c", cubin)
        labels = {label[1]: label.start() for label in re.finditer(r"^(\.L_x_\d+):", sass, re.MULTILINE)}
        jumps = [(labels[jump[1]], jump.start()) for jump in re.finditer(r"BRA `\((\.L_x_\d+)\)", sass)]
        loop = max(len(check.OPCODE.findall(sass[begin:end])) for begin, end in jumps if begin < end)
        return cls(Counter(check.OPCODE.findall(sass)), loop, sizes["REG"], sizes["STACK"] + sizes["LOCAL"])

    def count(self, start: str, end: str = "") -> int:
        """Instructions whose name starts and ends so."""
        return sum(n for op, n in self.opcodes.items() if op.startswith(start) and op.endswith(end))


CODE = [  # kernel, pattern, METHOD, weights, logits, most registers, most instructions a group, capability of a quick test
    ("masked_weight", "2:4", "candidates", "bf16", "fp32", 48, 230, 90),
    ("gradients", "2:4", "candidates", "bf16", "fp32", 56, 290, 80),
    ("masked_weight", "2:4", "sums", "bf16", "bf16", 40, 200, 80),
    ("gradients", "2:4", "sums", "bf16", "fp32", 40, 260, 90),
    ("gradients", "4:8", "walk", "bf16", "bf16", 72, 720, None),
    ("gradients", "1:8", "candidates", "bf16", "bf16", 56, 520, None),
    ("gradients", "2:8", "candidates", "bf16", "bf16", 96, 1400, None),
]


@pytest.mark.parametrize(
    "name,pattern,method,dtype,logits,registers,instructions,capability",
    [
        pytest.param(*case[:7], capability, marks=[] if capability == case[7] else pytest.mark.slow)
        for case in CODE
        for capability in (80, 90)
    ],
)
def test_a_thread_holds_its_groups_in_registers_and_exchanges_nothing(
    name, pattern, method, dtype, logits, registers, instructions, capability, tmp_path
):
    compiler = pytest.importorskip("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", capability, 32)
    built, groups = compile_for(target, name, pattern, method, dtype, logits)
    code = MachineCode.of(built, tmp_path)
    assert code.registers <= registers and code.local == 0 and not code.count("LDL") + code.count("STL")
    assert built.metadata.shared == 0 and not any(code.count(op) for op in ("LDS", "STS", "BAR", "SHFL"))
    assert code.loop <= instructions * groups

    if method == "candidates":  # by 16 bytes a thread; logits by what belongs to the groups of the thread
        assert code.count("LDG", ".128") == (1 if name == "masked_weight" else 2)
        assert code.count("STG", ".128") == (1 if name == "masked_weight" else 0)
        if pattern == "2:4":
            assert code.count("LDG", ".64") == 6 and code.count("STG", ".64") == (0 if name == "masked_weight" else 6)
    else:  # what is widest by 16 bytes, what is half as wide by 8
        halves = {"masked_weight": 1, "gradients": 2}[name] if dtype != logits else 0
        assert code.count("LDG", ".64") == halves and code.count("STG", ".128") == 1
        assert code.count("LDG", ".128") + halves == (2 if name == "masked_weight" else 3)
    nm = NMPattern(pattern)
    noisy = nm.num_candidates if method == "candidates" else nm.m
    branches = nm.n * (nm.m - nm.n) if method == "walk" else nm.num_candidates
    assert code.opcodes["MUFU.EX2"] == branches * groups
    # The steps of the last element lead nowhere.
    steps = branches - min(nm.n, nm.m - nm.n, 1) if method == "walk" else 0
    assert code.opcodes["MUFU.LG2"] == (2 * noisy + steps) * groups


@pytest.mark.slow
@pytest.mark.parametrize("pattern,per_weight", KINDS)
@pytest.mark.parametrize("dtype,logits,tail", [("fp32", "fp32", 0), ("fp16", "bf16", 1)])
@pytest.mark.parametrize("name", ["masked_weight", "gradients"])
def test_nothing_spills(name, dtype, logits, tail, pattern, per_weight, tmp_path):
    compiler = pytest.importorskip("triton.backends.compiler")
    method = gpu_masks.method(torch.empty((1, 1) if per_weight else (1, 1, 1)), NMPattern(pattern))
    built, _ = compile_for(compiler.GPUTarget("cuda", 80, 32), name, pattern, method, dtype, logits, tail)
    code = MachineCode.of(built, tmp_path)
    assert code.local == 0 and (code.registers <= 128 or pattern == "8:16")


@pytest.mark.parametrize(
    "name,pattern,method",
    [
        ("gradients", "2:4", "candidates"),
        pytest.param("gradients", "2:4", "walk", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_amd(name, pattern, method):
    compiler = pytest.importorskip("triton.backends.compiler")
    pytest.importorskip("triton.backends.amd")
    built, _ = compile_for(compiler.GPUTarget("hip", "gfx942", 64), name, pattern, method, "bf16", "fp32")
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", built.asm["amdgcn"]) == ["0"]


# --- on a GPU -------------------------------------------------------------------------------------------------------
class TestOnGpu:
    pytestmark = needs_gpu

    # Of three groups that are nearly decided no gradient is left to compare with.
    @pytest.mark.parametrize(
        "rows,in_features,scale,temperature,limit",
        [(3, 3, 100.0, 4.0, 5e-6), (37, 509, 100.0, 4.0, 5e-6), (128, 4096, 100.0, 4.0, 5e-6)]
        + [(37, 509, 500.0, 0.05, 5e-5), (65, 1199, 500.0, 0.05, 5e-5)],
    )
    @pytest.mark.parametrize("pattern,per_weight", KINDS)
    def test_agrees_with_float64(self, pattern, per_weight, rows, in_features, scale, temperature, limit):
        case = Case.random(pattern, rows, in_features, per_weight, scale, temperature, device="cuda")
        weight, logits = (t.clone().requires_grad_() for t in (case.weight, case.logits))
        assert gpu_masks.takes(weight, logits, case.pattern)
        result = ops.masked_weight(weight, logits, case.pattern, case.key, case.state)
        result.backward(case.grad)
        assert max(errors((result.detach(), weight.grad, logits.grad), case)) < limit

    @pytest.mark.parametrize("per_weight", [False, True])
    def test_agrees_with_plain_torch_in_float32(self, per_weight, monkeypatch):
        case = Case.random("2:4", 65, 1199, per_weight, device="cuda")
        found = []
        for fused in True, False:
            monkeypatch.setattr(gpu_masks, "takes", lambda *given, fused=fused: fused)
            weight, logits = (t.clone().requires_grad_() for t in (case.weight, case.logits))
            result = ops.masked_weight(weight, logits, case.pattern, case.key, case.state)
            result.backward(case.grad)
            found.append((result.detach(), weight.grad, logits.grad))
        for ours, theirs in zip(*found, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 2e-6

    @pytest.mark.parametrize("pattern,per_weight", [("2:4", False), ("2:4", True), ("4:8", True)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_right_to_one_rounding(self, dtype, pattern, per_weight):
        half = {"dtype": dtype, "logit_dtype": torch.bfloat16}
        case = Case.random(pattern, 33, 1030, per_weight, device="cuda", **half)
        rest = (case.weight, case.logits, case.pattern, case.key, case.state)
        found = gpu_masks.masked_weight(*rest), *gpu_masks.gradients(case.grad, *rest, (True, True))
        for value, exact in zip(found, case.exact(), strict=True):
            limit = torch.finfo(value.dtype).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
            assert ((value.cpu().double() - exact).abs() <= limit).all()
