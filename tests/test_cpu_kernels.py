# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels, each instruction set of them: right against float64, and within their memory."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.native_builds import BUILDS, WITHOUT_TILES, put_in_place, run_beside_forbidden_pages

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import machine, native_build
from hf_nmsparse.ops.linear24 import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of the output, and of the weight where it is dequantised to bfloat16 on its way into the tiles.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=[*BUILDS, *WITHOUT_TILES])
def build(request, monkeypatch):
    """The kernels compiled for one instruction set take the place of those of this machine."""
    put_in_place(request.param, monkeypatch, cpu)
    return request.param


def random_weight(kind, dtype, out_features, in_features, input_scale=False):
    weight = torch.randn(out_features, in_features)
    values, ids = ops.pack_24(weight.to(dtype), ops.top_n_mask(weight.abs(), NMPattern("2:4")))
    if kind == "dense":
        return ops.Weight24(values, ids)
    factors = (torch.rand(in_features) + 0.5).to(dtype) if input_scale else None
    values, scale = ops.quantize_values(values, kind)
    return ops.Weight24(values, ids, scale, factors)


def exact(weight):
    """W in float64, not rounded to the dtype of the layer."""
    kept = weight.values if weight.kind == "dense" else ops.dequantize_values(weight.values, weight.scale)
    dense = ops.unpack_24(kept.double(), weight.ids)
    return dense if weight.input_scale is None else dense * weight.input_scale.double()


def check_product(kind, dtype, out_features, in_features, tokens):
    weight = random_weight(kind, dtype, out_features, in_features, input_scale=tokens % 2 == 0)
    spread = torch.exp(torch.randn(in_features))  # channels of very different size
    x = (torch.randn(tokens, in_features) * spread).to(dtype)
    bias = torch.randn(out_features).to(dtype) if tokens % 3 else None
    expected = F.linear(x.double(), exact(weight), None if bias is None else bias.double())
    found = cpu._linear(x, weight, bias).double()
    scale = x.double().abs() @ exact(weight).abs().T  # size of the sum before anything cancels
    assert ((found - expected).abs() <= TOLERANCE[dtype] * (scale + expected.abs())).all(), (tokens, in_features)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_agree_with_float64_for_odd_shapes_and_token_counts(build, dtype, kind):
    for out_features, in_features in ((1, 8), (5, 24), (33, 200), (40, 1544)):
        for tokens in (1, 2, 3, 8, 17, 33, 70):
            check_product(kind, dtype, out_features, in_features, tokens)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens"),
    [(16, 24, 1100), (150, 2600, 35), (150, 1544, 530), (290, 1032, 64)],  # several panels, column steps, token chunks
)
def test_many_tokens_agree_with_float64(build, kind, out_features, in_features, tokens):
    check_product(kind, torch.bfloat16, out_features, in_features, tokens)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_is_bit_equal_to_the_reference(build, dtype, kind):
    for out_features, in_features in ((1, 8), (7, 520), (3, 1544)):
        for input_scale in (False, True):
            weight = random_weight(kind, dtype, out_features, in_features, input_scale)
            assert torch.equal(cpu.unpack_on_cpu(weight), weight.dense())


def test_leading_dimensions_and_no_tokens(build):
    weight = random_weight("dense", torch.bfloat16, 24, 64)
    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(cpu._linear(x, weight, None), cpu._linear(x.view(6, 64), weight, None).view(2, 3, 24))
    assert cpu._linear(torch.empty(0, 64).bfloat16(), weight, None).shape == (0, 24)


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_results_do_not_depend_on_threads(build, kind):
    weight = random_weight(kind, torch.bfloat16, 200, 1024)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 40, 600):  # with 600, two threads have tokens of their own, and three share the rows
            x = torch.randn(tokens, 1024).bfloat16()
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(cpu._linear(x, weight, None))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads_do_not_disturb_each_other(build):
    weight = random_weight("int4", torch.bfloat16, 64, 512)
    inputs = [torch.randn(tokens, 512).bfloat16() for tokens in (1, 3, 9, 40)]
    expected = [cpu._linear(x, weight, None) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(30):
            if not torch.equal(cpu._linear(inputs[index], weight, None), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_products_of_torch_before_and_after_stay_right():
    """Both use the tile registers."""
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    expected = F.linear(a, b)
    weight = random_weight("dense", torch.bfloat16, 96, 256)
    for _ in range(5):
        ops.linear_24(a, weight)
        assert torch.equal(F.linear(a, b), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["dense", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_inputs_that_are_not_finite_show_in_the_output(build, tokens, kind, bad):
    weight = random_weight(kind, torch.bfloat16, 8, 64)
    x = torch.randn(tokens, 64).bfloat16()
    column = int(ops.columns_of_24(weight.ids)[0, 0])
    x[0, column] = bad
    y = cpu._linear(x, weight, None)
    assert not torch.isfinite(y[0, 0])
    assert torch.isfinite(y[1:]).all()


GUARDED = """
import sys
from pathlib import Path
import torch
from kernel_checks.native_builds import at_the_edge
from hf_nmsparse import ops
from hf_nmsparse.ops import native_build
from hf_nmsparse.ops.linear24 import cpu

def calls(library, dtype, kind, out, inp):
    values = torch.randn(out, inp // 2).to(dtype)
    scale = factors = None
    if kind != "dense":
        values, scale = ops.quantize_values(values, kind)
        factors = at_the_edge(torch.ones(inp).to(dtype))
    ids = torch.randint(0, 256, (out, inp // 8), dtype=torch.uint8)  # any byte, most of them damaged
    values, ids, scale = (None if t is None else at_the_edge(t) for t in (values, ids, scale))
    prepared, pointer, _ = cpu._prepare(ops.Weight24(values, ids, scale, factors))
    bias, dense = at_the_edge(torch.randn(out).to(dtype)), at_the_edge(torch.zeros(out, inp).to(dtype))
    library.nmsparse_unpack24(pointer, dense.data_ptr(), 2)
    assert torch.isfinite(dense).all()
    for tokens in (1, 2, 5, 19, 35):
        x, y = at_the_edge(torch.randn(tokens, inp).to(dtype)), at_the_edge(torch.zeros(tokens, out).to(dtype))
        library.nmsparse_linear24(pointer, x.data_ptr(), bias.data_ptr(), y.data_ptr(), tokens, 2)
        assert torch.isfinite(y).all()

torch.manual_seed(0)
library = native_build.load(Path(sys.argv[1]))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for kind in ("dense", "int8", "int4"):
        for out, inp in ((1, 8), (3, 72), (17, 136), (5, 1032)):
            calls(library, dtype, kind, out, inp)
print("survived", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
@pytest.mark.parametrize("name", [*BUILDS, *WITHOUT_TILES])
def test_damaged_ids_and_odd_sizes_never_reach_beyond_a_tensor(name):
    finished = run_beside_forbidden_pages(GUARDED, name)
    assert "survived" in finished.stdout, finished.stderr[-2000:]


def test_without_a_compiler_layers_are_unpacked_and_one_line_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    native_build.native_library.cache_clear()
    try:
        weight = random_weight("dense", torch.bfloat16, 8, 16)
        x = torch.randn(1, 16).bfloat16()
        assert torch.equal(ops.linear_24(x, weight), F.linear(x, weight.dense()))
        assert ops.choose_for(x, weight).name == "unpacked each call"
        assert [record.levelname for record in caplog.records].count("WARNING") == 1
        assert "no-such-compiler" in caplog.text
    finally:
        native_build.native_library.cache_clear()


def test_a_compiler_that_fails_leaves_nothing_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.SubprocessError):
        native_build.build("-march=native")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(
        native_build, "_compile", lambda *given: compiled.append(given) or Path(given[-1]).write_bytes(b"")
    )
    (machine.cache_folder() / "native").mkdir(parents=True)
    assert native_build.build("-march=native") == native_build.build("-march=native")
    assert len(compiled) == 1


def test_low_memory_holds_the_packed_weight_alone():
    linear = torch.nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16)
    mask = ops.top_n_mask(linear.weight.detach().float().abs(), NMPattern("2:4"))
    packed = nms.SparseLinear24.from_linear(linear, mask, memory="low")
    with torch.inference_mode():
        for tokens in (1, 8, 200):
            packed(torch.randn(tokens, 1024).bfloat16())
    assert packed._kept is None
    assert nms.explain(packed, 1).resident_bytes <= 0.6 * linear.weight.nbytes
