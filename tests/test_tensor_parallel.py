# SPDX-License-Identifier: Apache-2.0
"""Packed models under Transformers' own plan of tensor parallelism, in two processes (gloo, on the CPU)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import llama_config
from peft import get_peft_model
from safetensors.torch import load_file
from tensor_parallel_process import answers
from test_processes import torchrun
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_nmsparse as nms
from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.packed.quantizer import packed_layers
from hf_nmsparse.packed.tensor_parallel import prepare_tensor_parallel


def packed_llama(**changes) -> LlamaForCausalLM:
    dense = LlamaForCausalLM._from_config(llama_config(**changes), dtype=torch.float32).eval()
    return nms.compress(get_peft_model(dense, nms.NMSparseConfig()))


def test_two_processes_compute_and_save_what_one_does(tmp_path, base_folder):
    packed_llama(attention_bias=True).save_pretrained(tmp_path / "packed")
    script = Path(__file__).with_name("tensor_parallel_process.py")
    done = torchrun(2, str(script), str(tmp_path / "packed"), str(base_folder), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    expected = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"process-{rank}.pt", weights_only=True)
        assert seen["answers"].keys() == expected.keys() and len(expected) > 20
        for name, value in seen["answers"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert "putting a mask on needs whole weights, but model.layers.0.self_attn.q_proj.weight" in seen["refused"]
        assert seen["shards"]["model.layers.0.self_attn.q_proj"] == [16, 16]  # half the rows
        assert seen["shards"]["model.layers.0.mlp.down_proj"] == [32, 12]  # half the inputs
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("processes", "refused"), [(2, True), (3, False)])
def test_a_plan_that_cuts_the_ids_of_8_inputs_is_refused(processes, refused):
    model = packed_llama(intermediate_size=24, hidden_size=48)
    model.config.distributed_config = SimpleNamespace(tp_size=processes, tp_plan="auto")
    if not refused:
        prepare_tensor_parallel(model, dict(packed_layers(model)))
        return
    with pytest.raises(UnsupportedError, match=r"down_proj has 24 inputs.*expected a multiple of 16"):
        prepare_tensor_parallel(model, dict(packed_layers(model)))
