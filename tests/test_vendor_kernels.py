# SPDX-License-Identifier: Apache-2.0
"""The products of CUTLASS and cuSPARSELt: what is converted for them, when they are asked, and, on a GPU, their results."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_gluon_kernels import error, expected, needs_gpu, random_weight

from hf_nmsparse.ops.linear24 import INPUT_GRADIENT, Call24, Weight24, probe, vendor

KERNELS = pytest.mark.parametrize("kernel", [vendor.CUTLASS, vendor.CUSPARSELT], ids=lambda kernel: kernel.name)
CALL = Call24(torch.device("cuda"), torch.bfloat16, "dense", 64, 128, 256)
conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.setattr(probe, "_known", {})


@pytest.fixture
def stand_ins(monkeypatch):
    """The operations on the CPU, by what PyTorch says of their operands."""

    def mm(values, metadata, x, bias=None):
        weight = conversions.sparse_semi_structured_to_dense_cutlass(values, metadata)
        return (x.t() @ weight.t() if bias is None else F.linear(x.t(), weight, bias)).t().contiguous()

    def cslt_mm(compressed, x, bias, transpose_result):
        assert transpose_result and x.shape[1] % 8 == 0
        return F.linear(x.t(), compressed, bias)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, v, meta, x: mm(v, meta, x, bias))
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt_mm)


@pytest.mark.parametrize("rows,columns", [(32, 64), (64, 128), (96, 320), (128, 64), (32, 1024)])
def test_metadata_are_those_of_torch(rows, columns):
    weight = random_weight(rows, columns, torch.bfloat16)
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight.dense())
    assert torch.equal(vendor.cutlass_metadata(weight.ids), metadata) and torch.equal(weight.values, values)


@KERNELS
@pytest.mark.parametrize("with_bias", [False, True])
def test_operands_and_padding(stand_ins, kernel, with_bias):
    weight, x = random_weight(96, 192, torch.float16), torch.randn(3, 7, 192).half()
    bias = torch.randn(96).half() if with_bias else None
    y = kernel.run(x, weight, bias)
    assert y.shape == (3, 7, 96) and y.is_contiguous() and error(y, expected(x, weight, bias)) < 1e-3


@pytest.mark.parametrize("run", [vendor._run_cutlass, vendor._run_cusparselt])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_is_right_works(stand_ins, run, dtype):
    assert probe.works("name", run, torch.device("cpu"), dtype)


@KERNELS
def test_a_product_that_this_torch_does_not_have_is_declined_and_said_to_developers_alone(monkeypatch, kernel, caplog):
    """The operations as they are, which the CPU does not have."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case = probe.small_case
    monkeypatch.setattr(probe, "small_case", lambda device, dtype, kind: case(torch.device("cpu"), dtype, kind))
    with caplog.at_level(logging.DEBUG, logger=probe.__name__):
        assert not kernel.works(CALL) and not kernel.works(CALL)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and kernel.name in record.message and "Error" in record.message


@KERNELS
def test_calls_are_declined_on_the_cpu(kernel):
    assert not kernel.accepts(replace(CALL, device=torch.device("cpu")))


@KERNELS
@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 255},
        {"kind": "int8"},
        {"dtype": torch.float32},
        {"in_features": 72},
        {"out_features": 24},
        {"product": INPUT_GRADIENT},
    ],
)
def test_calls_that_do_not_fit_are_declined_and_others_taken(monkeypatch, kernel, change):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernel.accepts(CALL) and not kernel.prefers(CALL)
    assert not kernel.accepts(replace(CALL, **change))


@KERNELS
def test_no_call_is_taken_while_a_graph_is_captured(monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernel.accepts(CALL)


class TestOnGpu:
    pytestmark = needs_gpu

    @KERNELS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("tokens,rows,columns", [(256, 64, 128), (300, 96, 640), (1027, 4096, 4096)])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_multiplies(self, kernel, tokens, rows, columns, dtype, with_bias):
        weight, x = random_weight(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
        there = Weight24(weight.values.cuda(), weight.ids.cuda())
        if not kernel.accepts(Call24.of(x.cuda(), there)):
            pytest.skip(f"{kernel.name} does not work on this GPU")
        bias = torch.randn(rows).to(dtype) if with_bias else None
        y = kernel.run(x.cuda(), there, None if bias is None else bias.cuda())
        assert error(y.cpu(), expected(x, weight, bias)) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
