# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that prune and pack: interpreted on the CPU, compiled for GPUs that are not there, run on one that is."""

import logging
import re
import warnings
from collections import Counter

import pytest
import torch
from kernel_checks.interpreter_run import failures_in_interpreter
from kernel_checks.packing_cases import DTYPES, equal_bits, hard_numbers, pruned_bits
from test_gluon_kernels import needs_gpu

from hf_nmsparse import NMPattern, codec, ops
from hf_nmsparse.ops import gpu_packing, packing, reference
from hf_nmsparse.ops.trial import Trials

CUDA = torch.device("cuda", 0)
PATTERN = NMPattern("2:4")


def test_the_kernels_are_right_in_the_interpreter():
    assert not failures_in_interpreter("interpreted_packing.py")


# --- the choice -----------------------------------------------------------------------------------------------------
class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    device = CUDA


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as the choice goes; the trials it asks for."""
    asked = []
    monkeypatch.setattr(gpu_packing, "has_triton", lambda: True)
    monkeypatch.setattr(gpu_packing, "is_plain_eager", lambda *tensors: True)
    monkeypatch.setattr(
        gpu_packing._trials, "works", lambda device, case, is_right: asked.append((device, *case)) or True
    )
    return asked


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


def test_scores_and_weights_on_a_gpu_are_taken_and_each_case_is_tried_for_itself(a_gpu):
    for m in (2, 4, 8, 16):
        assert gpu_packing.takes_scores(on_gpu(3, 7), NMPattern(1, m))
    assert gpu_packing.takes_packing(on_gpu(2, 16), on_gpu(2, 16, dtype=torch.float32))
    assert gpu_packing.takes_packing(on_gpu(2, 8), ids=on_gpu(2, 2, dtype=torch.uint8))
    assert len(set(a_gpu)) == 6


def test_what_the_kernels_do_not_know_is_declined(a_gpu, monkeypatch):
    assert not gpu_packing.takes_scores(on_gpu(2, 6), NMPattern("1:3"))
    assert not gpu_packing.takes_scores(on_gpu(2, 8, dtype=torch.float64), PATTERN)
    assert not gpu_packing.takes_scores(torch.zeros(2, 8), PATTERN)
    assert not gpu_packing.takes_scores(on_gpu(0, 8), PATTERN)
    assert not gpu_packing.takes_packing(on_gpu(1, 8))  # half of what a thread takes
    assert not gpu_packing.takes_packing(on_gpu(2, 8), torch.zeros(2, 8))
    monkeypatch.setattr(gpu_packing, "has_triton", lambda: False)
    assert not gpu_packing.takes_scores(on_gpu(2, 8), PATTERN)
    monkeypatch.setattr(gpu_packing, "has_triton", lambda: True)
    monkeypatch.setattr(gpu_packing, "is_plain_eager", ops.is_plain_eager)
    assert not gpu_packing.takes_scores(on_gpu(2, 8), PATTERN)  # a subclass
    assert not a_gpu


@pytest.mark.parametrize("trial", [RuntimeError("Failed to find C compiler"), False])
def test_kernels_that_do_not_work_are_declined_with_one_warning(caplog, trial, monkeypatch):
    def is_right():
        if isinstance(trial, Exception):
            raise trial
        return trial

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    trials = Trials("the kernels", "call first")
    with caplog.at_level(logging.WARNING):
        assert not any(trials.works(CUDA, (torch.bfloat16, PATTERN), is_right) for _ in range(2))
    (message,) = caplog.messages
    assert "cuda:0 for bfloat16, 2:4" in message
    assert "C compiler" in message if trial else "result is wrong" in message


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch, caplog):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    trials = Trials("the kernels", "call first")
    with caplog.at_level(logging.WARNING):
        assert not any(trials.works(CUDA, ("case",), lambda: True) for _ in range(2))
    assert len(caplog.messages) == 1 and "call first" in caplog.text
    capturing = False
    assert trials.works(CUDA, ("case",), lambda: True)
    capturing = True
    assert trials.works(CUDA, ("case",), lambda: False)  # known


# --- what Triton compiles -------------------------------------------------------------------------------------------
NUMBERS = {"i16": torch.bfloat16, "i32": torch.float32}


def compile_for(capability: int, name: str, bits: str, scored: str | None, pattern: str | None, for_codes: bool):
    """What Triton makes of a kernel, and the weights of a thread; rows are divisible by 16."""
    compiler = pytest.importorskip("triton.backends.compiler")
    import triton

    from hf_nmsparse.ops import triton_packing

    kernel, dtype = getattr(triton_packing, name), NUMBERS[bits]
    nm = None if pattern is None else NMPattern(pattern)
    types = dict.fromkeys(("weight", "values", "dense"), f"*{bits}") | {"scores": f"*{scored or bits}"}
    types |= {"ids": "*u8", "codes": "*i64" if nm else "*u8", "mask": "*i8", "code_of_word": "*i32"}
    types |= dict.fromkeys(("in_features", "groups", "blocks", "threads"), "i32")
    names = list(kernel.arg_names)
    aligned = [n for n in names if types.get(n, "").startswith("*") or n in ("in_features", "groups")]
    score_type = NUMBERS[scored or bits]
    constants = gpu_packing.compile_time(dtype, nm) | {"INF": gpu_packing._INFINITY[score_type]}
    constants |= {"SCORE_VECTOR": 16 // score_type.itemsize, "MAGNITUDES": scored is None, "FOR_CODES": for_codes}
    constants |= {"N": nm.n, "M": nm.m} if nm else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces its next defaults
        built = triton.compile(
            triton.compiler.ASTSource(
                fn=kernel,
                signature={n: types.get(n, "constexpr") if n not in constants else "constexpr" for n in names},
                constexprs={n: value for n, value in constants.items() if n in names},
                attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
            ),
            target=compiler.GPUTarget("cuda", capability, 32),
            options={"num_warps": gpu_packing.WARPS},
        )
    return built, constants["WEIGHTS"]


# kernel, bits of the numbers, of the scores, pattern, codes instead of a mask; most registers and instructions a weight, and
# loads and stores of 16 bytes
CASES = {
    "prune": ("prune_24", "i16", None, None, False, 40, 15, 2, 1),
    "prune float32": ("prune_24", "i32", None, None, False, 40, 24, 2, 1),
    "prune by float32 scores": ("prune_24", "i16", "i32", None, False, 48, 28, 6, 1),
    "unpack": ("unpack_24", "i16", None, None, False, 32, 9, 1, 2),
    "unpack float32": ("unpack_24", "i32", None, None, False, 32, 11, 1, 2),
    "mask 2:4": ("top_n", "i16", None, "2:4", False, 32, 24, 1, 0),
    "mask 2:4 float32": ("top_n", "i32", None, "2:4", False, 32, 36, 1, 0),
    "mask 4:8": ("top_n", "i16", None, "4:8", False, 40, 48, 1, 0),
    "mask 4:8 float32": ("top_n", "i32", None, "4:8", False, 40, 42, 2, 0),
    "codes 2:4": ("top_n", "i16", None, "2:4", True, 32, 31, 1, 1),
}


def machine_code(built, folder) -> tuple[Counter, int, int]:
    """Instructions by name, registers, and the bytes of local memory and stack a thread."""
    check = pytest.importorskip("kernel_checks.compile_check")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = check._run("cuobjdump", "--dump-resource-usage", cubin)
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(check.OPCODE.findall(check._run("nvdisasm", "-c", cubin)))
    return opcodes, sizes["REG"], sizes["STACK"] + sizes["LOCAL"]


QUICK = [
    ("prune", 80),
    *((case, 90) for case in ("prune", "prune by float32 scores", "unpack", "mask 2:4", "mask 4:8")),
]
ALL = [(case, capability) for case in CASES for capability in (80, 90)]


@pytest.mark.parametrize(
    ("case", "capability"),
    [pytest.param(*given, marks=[] if given in QUICK else [pytest.mark.slow]) for given in ALL],
)
def test_a_thread_holds_its_groups_and_exchanges_nothing(case, capability, tmp_path):
    *given, registers, instructions, loads, stores = CASES[case]
    built, weights = compile_for(capability, *given)
    opcodes, used, local = machine_code(built, tmp_path)
    names = {op.split(".")[0] for op in opcodes}
    assert local == 0 and not {"LDL", "STL"} & names
    assert built.metadata.shared == 0 and not {"LDS", "STS", "BAR", "SHFL"} & names
    wide = {
        kind: sum(n for op, n in opcodes.items() if op.startswith(kind) and ".128" in op) for kind in ("LDG", "STG")
    }
    count = (sum(opcodes.values()) - opcodes["NOP"]) / weights
    assert used <= registers and count <= instructions
    assert wide == {"LDG": loads, "STG": stores}


# --- on a GPU -------------------------------------------------------------------------------------------------------
class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_results_are_those_of_the_reference(self, dtype):
        for rows, columns in ((2, 8), (33, 1040), (300, 4096)):
            weight, scores = hard_numbers(rows, columns, dtype), hard_numbers(rows, columns, torch.float32)
            for given in (None, scores):
                found = packing.prune_24(weight.cuda(), None if given is None else given.cuda())
                assert equal_bits(tuple(tensor.cpu() for tensor in found), pruned_bits(weight, given))
            values, ids, _ = reference.prune_24(torch.randn(rows, columns).to(dtype))
            assert torch.equal(packing.unpack_24(values.cuda(), ids.cuda()).cpu(), codec.unpack_24(values, ids))
            for pattern in map(NMPattern, ("1:2", "2:4", "4:8", "8:16")):
                expected = reference.top_n_mask(weight[:, :-3], pattern)
                on_device = weight.cuda()[:, :-3]
                assert torch.equal(packing.top_n_mask(on_device, pattern).cpu(), expected)
                codes = packing.top_n_codes(on_device, pattern).cpu()
                assert torch.equal(codes, codec.mask_to_codes(expected, pattern))
        assert all(gpu_packing._trials._known.values())
