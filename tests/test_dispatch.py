# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs: measured tables, the order without one, what is remembered, and `nmsparse bench`."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, ops
from hf_nmsparse.cli.main import app
from hf_nmsparse.ops.linear24 import dispatch, measure, tables

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    """An empty cache of this test's own, and no shipped tables."""
    monkeypatch.setattr(tables, "tuned_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr(tables, "_SHIPPED", tmp_path / "none")
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 14)  # few copies of small weights
    tables.forget_tables()
    dispatch.forget_choices()
    yield
    tables.forget_tables()
    dispatch.forget_choices()


def call(shape=(64, 64), tokens=4, dtype=torch.float64, kind="dense"):
    return measure.forward_call(CPU, dtype, kind, shape, tokens)


def row(shape, tokens, dtype="float64", values="dense", **milliseconds):
    times = {name.replace("_", " "): time for name, time in milliseconds.items()}
    return {
        "shape": list(shape),
        "tokens": tokens,
        "dtype": dtype,
        "values": values,
        "product": "forward",
        "milliseconds": times,
    }


def write_table(rows, name="table.json", **changes):
    machine = tables.machine_of(CPU, torch.get_num_threads())
    folder = tables.tuned_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"version": 1, "machine": machine, "rows": rows} | changes))
    tables.forget_tables()
    dispatch.forget_choices()


@pytest.fixture
def two_kernels(monkeypatch):
    """Two kernels for float64, which no other kernel of ours takes: one that prefers few tokens, one that never asks."""
    monkeypatch.setattr(dispatch, "_kernels", list(dispatch._kernels))

    def run(x, weight, bias):
        return F.linear(x, weight.dense(), bias)

    def takes(given):
        return given.dtype == torch.float64 and given.product == ops.FORWARD

    ops.register_kernel(ops.Kernel24("second", takes, run, lambda given: False))
    ops.register_kernel(ops.Kernel24("first", takes, run, lambda given: given.tokens <= 8))


def test_without_a_table_the_kernel_that_prefers_the_call_takes_it_and_dense_only_where_none_does(two_kernels):
    assert ops.choose_kernel(call(tokens=8)).name == "first"
    assert ops.choose_kernel(call(tokens=8), dense_at_hand=True).name == "first"
    assert ops.choose_kernel(call(tokens=9), dense_at_hand=True) is None
    assert ops.choose_kernel(call(tokens=9)) is not None


def test_the_fastest_measured_kernel_is_taken_dense_among_them(two_kernels):
    write_table(
        [
            row((64, 64), 1, first=2.0, second=1.0, dense=3.0),
            row((64, 64), 64, first=2.0, second=1.5, dense=1.0),
        ]
    )
    assert ops.choose_kernel(call(tokens=1), dense_at_hand=True).name == "second"
    assert ops.choose_kernel(call(tokens=64), dense_at_hand=True) is None
    assert ops.choose_kernel(call(tokens=64)).name == "second"


def test_a_dense_copy_is_not_kept_for_a_difference_within_the_noise(two_kernels):
    write_table([row((64, 64), 1, first=1.0, dense=0.98)])
    assert ops.choose_kernel(call(tokens=1), dense_at_hand=True).name == "first"


def test_the_nearest_measured_shape_and_token_count_speak_for_others_and_far_ones_do_not(two_kernels):
    write_table([row((64, 64), 4, first=2.0, second=1.0), row((4096, 4096), 4, first=1.0, second=2.0)])
    assert ops.choose_kernel(call((96, 64), 5)).name == "second"
    assert ops.choose_kernel(call((4096, 5120), 3)).name == "first"
    assert tables.measured_times(call((512, 512), 4)) == {}
    assert tables.measured_times(call((64, 64), 100)) == {}


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"kind": "int8"}])
def test_times_of_another_dtype_or_kind_of_values_are_not_used(change):
    write_table([row((64, 64), 4, second=1.0)])
    assert tables.measured_times(call(**change)) == {}


def test_times_of_another_machine_are_not_used():
    machine = {**tables.machine_of(CPU, torch.get_num_threads()), "device": "another processor"}
    write_table([row((64, 64), 4, second=1.0)], machine=machine)
    assert tables.measured_times(call()) == {}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 9, "machine": {}, "rows": []}',
        '{"version": 1, "machine": {}, "rows": [{"shape": [1, 2]}]}',
        '{"version": 1, "machine": {}, "rows": [{"shape": 5}]}',
        "[" * 100_000,
        '{"version": 1, "machine": {}, "rows": [{"shape": [8, 8], "tokens": 1, "dtype": "float64", "values": "dense", '
        '"product": "forward", "milliseconds": {"first": -1}}]}',
    ],
)
def test_a_damaged_table_is_left_out_with_one_line(content, caplog):
    tables.tuned_folder().mkdir()
    (tables.tuned_folder() / "bad.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert tables.measured_times(call()) == {}
    assert len(caplog.records) == 1 and "bad.json" in caplog.text


def test_every_shipped_table_is_sound(monkeypatch):
    monkeypatch.undo()
    for path in tables._SHIPPED.glob("*.json"):
        tables.check_table(json.loads(path.read_text()), str(path))


def test_a_memo_remembers_choices_until_a_table_changes(two_kernels, monkeypatch):
    weight = torch.randn(64, 64, dtype=torch.float64)
    values, ids = ops.pack_24(weight, ops.top_n_mask(weight.abs(), NMPattern("2:4")))
    packed = ops.Weight24(values, ids)
    packed.memo = ops.Memo24(packed)
    x = torch.randn(1, 64, dtype=torch.float64)
    asked = []
    choose = dispatch.choose_kernel
    monkeypatch.setattr(dispatch, "choose_kernel", lambda *given: asked.append(given) or choose(*given))
    assert [ops.choose_for(x, packed).name for _ in range(3)] == ["first"] * 3
    assert len(asked) == 1
    write_table([row((64, 64), 1, first=2.0, second=1.0)])
    assert ops.choose_for(x, packed).name == "second"


def test_a_memo_speaks_of_the_very_tensors_and_keeps_none_alive():
    import weakref

    weight = torch.randn(8, 16)
    tensors = [
        torch.nn.Parameter(t, requires_grad=False)
        for t in ops.pack_24(weight, ops.top_n_mask(weight, NMPattern("2:4")))
    ]
    packed = ops.Weight24(*tensors)
    memo = ops.Memo24(packed)
    ops.linear_24(torch.randn(1, 16), ops.Weight24(*tensors, memo=memo))
    assert memo.is_of(packed)
    assert not memo.is_of(ops.Weight24(tensors[0].detach().clone(), tensors[1]))
    tensors[0].data = tensors[0].data.clone()  # the same parameter, elsewhere
    assert not memo.is_of(packed)
    gone = weakref.ref(tensors[0])
    del tensors, packed, weight
    assert gone() is None


def test_replacing_a_packed_tensor_is_seen_at_the_next_call():
    linear = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    mask = ops.top_n_mask(linear.weight.detach().float().abs(), NMPattern("2:4"))
    packed = nms.SparseLinear24.from_linear(linear, mask)
    x = torch.randn(1, 32).bfloat16()
    with torch.no_grad():
        before = packed(x)
        packed.weight = torch.nn.Parameter(2 * packed.weight)
        torch.testing.assert_close(packed(x), 2 * before, rtol=2e-2, atol=1e-3)
        packed.weight.mul_(2)
        torch.testing.assert_close(packed(x), 4 * before, rtol=2e-2, atol=1e-3)
        packed.weight.data = packed.weight.data / 4
        torch.testing.assert_close(packed(x), before, rtol=2e-2, atol=1e-3)


def test_intervals_are_of_paired_samples():
    assert measure.ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)
    ratio, low, high = measure.ratio_interval([1.0, 3.0, 2.0, 9.0] * 5, [1.0, 1.0, 1.0, 1.0] * 5)
    assert low <= ratio <= high and low < high


def test_tuning_measures_every_kernel_and_the_dispatcher_uses_it_at_once(two_kernels):
    seen = []
    path = measure.tune([call((16, 16), 1)], rounds=3, progress=seen.append)
    table = json.loads(path.read_text())
    assert set(table["rows"][0]["milliseconds"]) >= {"dense", "first", "second"}
    assert tables.measured_times(call((16, 16), 1)) == table["rows"][0]["milliseconds"]
    measure.tune([call((16, 16), 2)], rounds=3)
    assert [entry["tokens"] for entry in json.loads(path.read_text())["rows"]] == [1, 2]


def test_bench_prints_speed_ups_with_the_kernel_that_ran(tmp_path):
    arguments = ["bench", "--shape", "16x32", "--tokens", "1,2", "--values", "dense,int8", "--rounds", "3"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--output", str(tmp_path / "bench.json")])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [(r["values"], r["tokens"], r["memory"]) for r in facts["rows"]] == [
        (kind, tokens, memory) for kind in ("dense", "int8") for tokens in (1, 2) for memory in ("fast", "low")
    ]
    assert all(r["speedup_low"] <= r["speedup"] <= r["speedup_high"] and r["kernel"] for r in facts["rows"])
    assert json.loads((tmp_path / "bench.json").read_text())["environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape 16x31", "multiple of 8"),
        ("--shape big", "4096x4096"),
        ("--tokens 0", "whole number"),
        ("--values int3", "dense, int8, int4"),
        ("--device meta", "no such device here; there is cpu"),
        ("--output .", "is a folder"),
        ("--output file/bench.json", "file is a file"),
        (
            "--shape 16x32,1000000x1000000 --tokens 1",
            "1000000x1000000 with 1 tokens does not fit into memory: it needs",
        ),
        ("--shape 16x32 --tokens 1,1000000000000", "16x32 with 1000000000000 tokens does not fit into memory"),
    ],
)
def test_bench_refuses_in_one_line_what_it_cannot_do_before_it_measures(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(measure, "measure_roofline", None)
    result = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            2,
            "with 2 tokens",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "does not fit into memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_bench_keeps_what_was_measured_before_memory_runs_out_or_ctrl_c(error, code, said, tmp_path, monkeypatch):
    copies_of = measure.copies_of

    def failing(call):
        if call.tokens == 2:
            raise error
        return copies_of(call)

    monkeypatch.setattr(measure, "copies_of", failing)
    line = ["bench", "--shape", "16x32", "--tokens", "1,2", "--rounds", "3", "--json", "--output"]
    result = CliRunner().invoke(app, [*line, str(tmp_path / "new" / "bench.json")])
    assert result.exit_code == code and said in result.stderr and "Traceback" not in result.stderr
    facts = json.loads(result.stdout)
    assert not facts["ok"] and said in facts["error"] and [row["tokens"] for row in facts["rows"]] == [1, 1]
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["rows"] == facts["rows"]
    assert CliRunner().invoke(app, ["bench", "--shape", "16x32", "--tokens", "2", "--tune"]).exit_code == code


def packed_layer(values="dense", input_scale=None, dtype=torch.bfloat16):
    linear = torch.nn.Linear(32, 16, dtype=dtype)
    mask = ops.top_n_mask(linear.weight.detach().float().abs(), NMPattern("2:4"))
    return nms.SparseLinear24.from_linear(linear, mask, values=values, input_scale=input_scale)


def test_fake_tensors_are_never_taken_for_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed, x = packed_layer(), torch.randn(1, 32).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y = packed(x)
    assert type(y) is not torch.Tensor and y.shape == (1, 16)


def test_what_watches_calls_sees_an_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Watch.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    packed, x = packed_layer(), torch.randn(1, 32).bfloat16()
    with Watch(), torch.no_grad():
        watched = packed(x)
    assert "nmsparse.linear_24.default" in Watch.seen
    with torch.no_grad():
        torch.testing.assert_close(watched, packed(x))


def test_quantised_layers_with_input_scales_run_under_autocast():
    packed = packed_layer("int4", torch.rand(32) + 0.5, torch.float32)
    x = torch.randn(3, 32)
    for memory in ("low", "fast"):
        packed.memory = memory
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = packed(x)
        torch.testing.assert_close(y.float(), packed(x), rtol=3e-2, atol=3e-2)


def test_parametrized_and_replicated_layers_compute():
    from torch.nn.utils import parametrize

    packed, x = packed_layer(), torch.randn(2, 32).bfloat16()
    with torch.no_grad():
        expected = packed(x)
        replica = packed._replicate_for_data_parallel()
        for name, parameter in packed._parameters.items():  # as torch.nn.parallel.replicate does
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        torch.testing.assert_close(replica(x), expected)

        class Twice(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        parametrize.register_parametrization(packed, "weight", Twice())
        torch.testing.assert_close(packed(x) - packed.bias, 2 * (expected - packed.bias), rtol=3e-2, atol=3e-2)


def test_a_first_call_without_tokens_and_a_layer_without_rows():
    import threading

    results = []
    packed = packed_layer()

    def call_it():  # a fresh thread has no memory of earlier calls
        with torch.no_grad():
            results.append(packed(torch.empty(0, 32).bfloat16()).shape)

    thread = threading.Thread(target=call_it)
    thread.start()
    thread.join()
    assert results == [(0, 16)]
    empty = ops.Weight24(torch.empty(0, 16).bfloat16(), torch.empty(0, 4, dtype=torch.uint8))
    assert ops.linear_24(torch.ones(2, 32).bfloat16(), empty).shape == (2, 0)


def test_a_memo_notices_another_shape_at_the_same_address():
    packed, x = packed_layer(), torch.randn(1, 32).bfloat16()
    with torch.no_grad():
        packed(x)
        whole = packed(x)
        for parameter in (packed.weight, packed.weight_idx, packed.bias):
            parameter.data = parameter.data[:8]
        packed.out_features = 8
        torch.testing.assert_close(packed(x), whole[:, :8])


def test_a_refused_input_leaves_no_choice_behind(two_kernels):
    weight = torch.randn(64, 64, dtype=torch.float64)
    packed = ops.Weight24(*ops.pack_24(weight, ops.top_n_mask(weight.abs(), NMPattern("2:4"))))
    packed.memo = ops.Memo24(packed)
    with pytest.raises(RuntimeError, match="in_features=64"):
        ops.linear_24(torch.randn(1, 640, dtype=torch.float64), packed)
    assert not packed.memo.choices


@pytest.mark.parametrize("memory", ["low", "fast"])
def test_a_call_under_autocast_is_chosen_for_the_dtype_it_is_computed_in(memory, monkeypatch):
    asked = []
    choose = dispatch.choose_kernel
    monkeypatch.setattr(dispatch, "choose_kernel", lambda call, *rest: asked.append(call.dtype) or choose(call, *rest))
    packed = packed_layer(dtype=torch.float32)
    packed.memory = memory
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        packed(torch.randn(1, 32))
        packed(torch.randn(1, 32))
    assert asked and set(asked) == {torch.bfloat16}
