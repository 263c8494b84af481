# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin against vLLM's own linear layers where it is installed (0.33 was), else against an imitation of its interface.

PYTHONPATH=<where vllm is> python -m pytest tests/test_vllm_plugin.py
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_nmsparse import NMPattern, PackedConfig, ops
from hf_nmsparse.errors import ConfigError, FormatError, UnsupportedError

REAL = importlib.util.find_spec("vllm") is not None
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def vllm():
    """The classes of vLLM that are needed, with the plugin registered."""
    if not REAL:
        sys.path.insert(0, str(Path(__file__).parent / "vllm_stub"))
    try:
        if REAL:
            import vllm.platforms
            from vllm.platforms.cpu import CpuPlatform

            vllm.platforms._current_platform = CpuPlatform()
        from vllm.model_executor.layers import linear, quantization

        from hf_nmsparse import vllm_plugin

        vllm_plugin.register()
        vllm_plugin.register()
        if REAL:
            with _one_process():
                yield SimpleNamespace(linear=linear, config=quantization.get_quantization_config("nmsparse"))
        else:
            yield SimpleNamespace(linear=linear, config=quantization.get_quantization_config("nmsparse"))
    finally:
        if not REAL:
            sys.path.remove(str(Path(__file__).parent / "vllm_stub"))
            for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
                del sys.modules[name]
            sys.modules.pop("hf_nmsparse.vllm_plugin.quantization", None)


def _one_process():
    from contextlib import contextmanager

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    @contextmanager
    def environment():
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, "tcp://127.0.0.1:29533", 0, backend="gloo")
            initialize_model_parallel(1)
            yield

    return environment()


@pytest.fixture
def config(vllm):
    found = vllm.config.from_config(PackedConfig(modules_to_not_convert=["lm_head", f"{ATTENTION}.o_proj"]).to_dict())
    found.packed_modules_mapping = FUSED
    return found


def packed_weight(rows, columns, dtype):
    weight = torch.randn(rows, columns).to(dtype)
    mask = ops.top_n_mask(weight.abs(), NMPattern("2:4"))
    values, ids = ops.pack_24(weight, mask)
    return weight * mask, {"weight": values, "weight_idx": ids}


def load(layer, tensors, *part):
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *part)


def test_the_entry_point_names_the_plugin():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="nmsparse")
    assert {point.value for point in found} == {"hf_nmsparse.vllm_plugin:register"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_vllm_fuses_compute_what_their_parts_do(vllm, config, dtype):
    layer = vllm.linear.QKVParallelLinear(
        64, 16, 4, 2, bias=False, params_dtype=dtype, quant_config=config, prefix=f"{ATTENTION}.qkv_proj"
    )
    weights = []
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        weight, tensors = packed_weight(rows, 64, dtype)
        weights.append(weight)
        load(layer, tensors, part)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ torch.cat(weights).double().T
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(layer(x)[0].double(), expected, **tolerance)
    assert type(layer.weight) is torch.nn.Parameter and layer.weight.shape == (128, 32)


def test_a_bias_is_added_and_dense_layers_stay_dense(vllm, config):
    options = {"bias": True, "params_dtype": torch.float32, "quant_config": config}
    layer = vllm.linear.RowParallelLinear(64, 48, prefix="model.layers.0.mlp.down_proj", **options)
    weight, tensors = packed_weight(48, 64, torch.float32)
    load(layer, tensors)
    bias = torch.randn(48)
    layer.bias.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x)[0], x @ weight.T + bias, atol=1e-4, rtol=1e-4)
    dense = vllm.linear.RowParallelLinear(64, 48, prefix=f"{ATTENTION}.o_proj", **options)
    assert isinstance(dense.quant_method, vllm.linear.UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None


def test_halves_of_packed_tensors_are_the_packed_halves():
    """So tensor parallelism may shard them like dense ones."""
    weight, tensors = packed_weight(8, 32, torch.float32)
    for half, columns in enumerate((slice(0, 16), slice(16, 32))):
        values, ids = ops.pack_24(weight[:, columns], weight[:, columns] != 0)
        assert torch.equal(tensors["weight"][:, 8 * half : 8 * half + 8], values)
        assert torch.equal(tensors["weight_idx"][:, 2 * half : 2 * half + 2], ids)


def test_ids_that_are_not_in_the_checkpoint_or_damaged_are_refused(vllm, config):
    options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
    layer = vllm.linear.RowParallelLinear(64, 48, prefix="model.layers.0.mlp.down_proj", **options)
    with pytest.raises(FormatError, match=r"mlp\.down_proj: 384 of 384 bytes .* missing"):
        layer.quant_method.process_weights_after_loading(layer)
    _, tensors = packed_weight(48, 64, torch.float32)
    tensors["weight_idx"][3, 5] = 0b0100_0001  # columns 1, 0
    load(layer, tensors)
    with pytest.raises(FormatError, match="1 of 384 bytes"):
        layer.quant_method.process_weights_after_loading(layer)


def test_every_byte_that_packing_writes_is_accepted_and_no_other(vllm, config):
    options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
    pairs = [a | b << 2 for a in range(4) for b in range(a + 1, 4)]
    valid = {low | high << 4 for low in pairs for high in pairs}
    for byte in range(256):
        layer = vllm.linear.RowParallelLinear(8, 1, prefix="model.layers.0.mlp.up_proj", **options)
        load(layer, {"weight": torch.zeros(1, 4), "weight_idx": torch.tensor([[byte]], dtype=torch.uint8)})
        try:
            layer.quant_method.process_weights_after_loading(layer)
        except FormatError:
            assert byte not in valid
        else:
            assert byte in valid


def test_what_cannot_be_served_is_refused_with_the_way_out(vllm, config):
    for fields, said in (({"values": "int4"}, "int4 values"), ({"slorb_block": 16}, "SLoRB")):
        with pytest.raises(UnsupportedError, match=f"{said}.*--format dense"):
            vllm.config.from_config(PackedConfig(**fields).to_dict())
    with pytest.raises((ConfigError, FormatError)):
        vllm.config.from_config({"quant_method": "nmsparse", "format_version": 99})
    config.dense_layers.append(f"{ATTENTION}.k_proj")
    options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
    with pytest.raises(UnsupportedError, match=r"qkv_proj: vLLM computes .* only .*k_proj stay dense"):
        vllm.linear.QKVParallelLinear(64, 16, 4, 2, prefix=f"{ATTENTION}.qkv_proj", **options)
    with pytest.raises(UnsupportedError, match=r"12 inputs a rank .* no multiple of 8"):
        vllm.linear.RowParallelLinear(12, 8, prefix="model.layers.0.mlp.down_proj", **options)
