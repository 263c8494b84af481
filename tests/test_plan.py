# SPDX-License-Identifier: Apache-2.0
"""A plan made from shapes equals what the real thing weighs."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
from families import FAMILIES
from live_bytes import peak_live_bytes
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ConfigError, UnsupportedError
from hf_nmsparse.packed import packed_sizes
from hf_nmsparse.packed.stored_mask import inside_24
from hf_nmsparse.training.cost import total_cost, training_cost
from hf_nmsparse.training.devices import device_bytes

ALL_TERMS = {"slorb_block": 5, "low_rank": 3, "delta_rank": 2}
PROJECTION = {"slorb_block": 8, "slorb_train_projection": True, "low_rank": 2}


def trainable(model, part: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and part in name)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("relaxation", ["candidates", "elementwise", "straight_through"])
def test_logits_are_those_of_the_adapter_and_the_mask_file_is_as_large(make_llama, tmp_path, pattern, relaxation):
    config = NMSparseConfig(pattern=pattern, relaxation=relaxation)
    plan = nms.plan(make_llama(), config)
    model = get_peft_model(make_llama(), config)
    assert {layer.name for layer in plan.layers} == set(mask_layers(model))
    assert plan.logits_bytes == 4 * trainable(model, ".nmsparse_logits.") and plan.term_bytes == 0
    assert plan.trainable == trainable(model, "")
    assert (plan.gradient_bytes, plan.optimizer_bytes) == (4 * plan.trainable, 8 * plan.trainable)
    nms.save_mask(model, tmp_path)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert plan.mask_file_bytes == written
    assert plan.mask_bits_per_weight == 8 * written / plan.pruned_weights


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ALL_TERMS),
        ("llama", PROJECTION),
        ("gpt2", ALL_TERMS),
        ("gpt2", {}),
        ("t5", {"delta_rank": 1}),
        ("mixtral", {"delta_rank": 2}),
        ("qwen3_moe", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "mask",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_number_is_that_of_the_real_thing(family, options, dtype, tmp_path):
    config = NMSparseConfig(**options)
    plan = nms.plan(FAMILIES[family]().to(dtype), config)
    model = get_peft_model(FAMILIES[family]().to(dtype), config)
    layers = mask_layers(model)
    assert [layer.name for layer in plan.layers] == list(layers)
    for layer in plan.layers:
        base = layers[layer.name].base_weight
        assert ((layer.out_features, layer.in_features), layer.dense_bytes) == (base.shape, base.stored.nbytes)
    assert plan.logits_bytes == 4 * trainable(model, ".nmsparse_logits.")
    assert plan.term_bytes == 4 * trainable(model, ".nmsparse_") - plan.logits_bytes
    assert (plan.trainable, plan.other_trainable) == (trainable(model, ""), 0)
    nms.save_mask(model, tmp_path)
    assert plan.mask_file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    packed = nms.compress(model)
    sizes = packed_sizes(packed)
    packable = [layer for layer in plan.layers if layer.packed_bytes is not None]
    assert (len(packable), sum(layer.packed_bytes for layer in packable)) == (sizes.layers, sizes.packed)
    assert plan.packed_model_bytes == sum(parameter.nbytes for parameter in packed.parameters())
    left = {layer.not_packable for layer in plan.layers} - {None}
    assert left == ({"fused experts"} if family in ("mixtral", "qwen3_moe") else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_are_those_of_the_packed_model(make_llama, dtype):
    plan = nms.plan(make_llama(dtype), NMSparseConfig())
    model = nms.compress(get_peft_model(make_llama(dtype), NMSparseConfig()))
    sizes = packed_sizes(model)
    assert (plan.packed_bytes, plan.dense_bytes) == (sizes.packed, sizes.dense)
    assert plan.packed_model_bytes == sum(p.nbytes for p in model.parameters())


def test_a_quantised_base_keeps_its_bytes_and_cannot_be_packed(make_llama, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = bitsandbytes.nn.Linear4bit(32, 32, bias=False, compute_dtype=torch.float32).to("cpu")
    config = NMSparseConfig(target_modules=["q_proj"], delta_rank=2)
    plan = nms.plan(model, config)
    quantised, plain = plan.layers
    assert quantised.dense_bytes == attention.q_proj.weight.nbytes < plain.dense_bytes // 4
    assert "quantised with" in quantised.not_packable and plain.not_packable is None
    assert plan.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.model_parameters == sum(parameter.numel() for parameter in make_llama().parameters())
    adapted = get_peft_model(model, config)
    assert plan.trainable == trainable(adapted, "")
    nms.save_mask(adapted, tmp_path)
    assert plan.mask_file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_terms_that_a_layer_cannot_have_are_refused_as_by_the_adapter():
    with pytest.raises(UnsupportedError, match="delta_rank"):
        nms.plan(FAMILIES["mixtral"](), NMSparseConfig(low_rank=2))


def test_a_model_on_the_meta_device_gives_the_same_plan(make_llama):
    config = make_llama().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert nms.plan(empty, NMSparseConfig()) == nms.plan(make_llama(), NMSparseConfig())


def test_model_and_config_stay_as_they_are(llama):
    config = NMSparseConfig()
    before, state = copy.deepcopy(config), {name: value.clone() for name, value in llama.state_dict().items()}
    names = [name for name, _ in llama.named_modules()]
    nms.plan(llama, config)
    assert config == before
    assert [name for name, _ in llama.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_skipped_layers_have_their_reason(make_llama):
    config = NMSparseConfig(dense_layers=["1.mlp.up_proj"], exclude_modules=["k_proj"], layers_to_transform=[1])
    plan = nms.plan(make_llama(), config)
    assert plan.skipped["lm_head"] == "output head"
    assert plan.skipped["model.layers.1.mlp.up_proj"] == "named in dense_layers"
    assert plan.skipped["model.layers.1.self_attn.k_proj"] == "named in exclude_modules"
    assert plan.skipped["model.layers.0.mlp.down_proj"] == "not in layers_to_transform"
    model = make_llama()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer.name for layer in plan.layers} | set(plan.skipped) == linears
    assert {layer.name for layer in plan.layers} == set(mask_layers(get_peft_model(model, config)))
    only_query = nms.plan(make_llama(), NMSparseConfig(target_modules=["q_proj"]))
    assert only_query.skipped["model.layers.0.self_attn.v_proj"] == "not in target_modules"
    twice = NMSparseConfig(dense_layers=["layers.0"], layers_to_transform=[1])
    assert nms.plan(make_llama(), twice).skipped["model.layers.0.mlp.down_proj"] == "named in dense_layers"


def test_skipped_layers_of_every_kind_are_named():
    plan = nms.plan(FAMILIES["gpt2"](), NMSparseConfig(dense_layers=["c_attn"]))
    assert plan.skipped["transformer.h.1.attn.c_attn"] == "named in dense_layers"
    assert plan.skipped["lm_head"] == "output head" and not any("wte" in name for name in plan.skipped)
    experts = "model.layers.{}.mlp.experts.gate_up_proj"
    for config, reason in (
        (NMSparseConfig(target_modules=["q_proj"]), "not in target_parameters"),
        (NMSparseConfig(target_parameters=[]), "not in target_parameters"),
        (NMSparseConfig(dense_layers=["experts"]), "named in dense_layers"),
        (NMSparseConfig(layers_to_transform=[1]), "not in layers_to_transform"),
    ):
        plan = nms.plan(FAMILIES["mixtral"](), config)
        assert plan.skipped[experts.format(0)] == reason
        pruned = mask_layers(get_peft_model(FAMILIES["mixtral"](), config))
        assert {layer.name for layer in plan.layers} == set(pruned) and not set(plan.skipped) & set(pruned)


def test_layers_that_cannot_be_packed_are_masked_and_say_why(make_llama):
    plan = nms.plan(make_llama(intermediate_size=44), NMSparseConfig())
    odd = [layer for layer in plan.layers if layer.packed_bytes is None]
    assert {layer.name.rsplit(".")[-1] for layer in odd} == {"down_proj"}
    assert "44" in odd[0].not_packable and "multiple of 8" in odd[0].not_packable
    assert plan.packed_bytes > sum(layer.packed_bytes or 0 for layer in plan.layers)
    loose = nms.plan(make_llama(), NMSparseConfig(pattern="4:8"))
    assert all(layer.packed_bytes is None and "4:8" in layer.not_packable for layer in loose.layers)


def test_tied_weights_count_once_and_their_head_stays_dense(make_llama):
    plan = nms.plan(make_llama(tie_word_embeddings=True), NMSparseConfig())
    model = make_llama(tie_word_embeddings=True)
    assert plan.model_bytes == sum(p.nbytes for p in model.parameters())
    assert plan.skipped["lm_head"] == "output head"


def test_other_trained_modules_are_counted(make_llama):
    plan = nms.plan(make_llama(), NMSparseConfig(modules_to_save=["lm_head"]))
    assert plan.other_trainable == make_llama().lm_head.weight.numel()


def test_refusals(make_llama):
    with pytest.raises(UnsupportedError, match="base model"):
        nms.plan(get_peft_model(make_llama(), NMSparseConfig()), NMSparseConfig())
    with pytest.raises(ConfigError, match="no layer to prune"):
        nms.plan(make_llama(), NMSparseConfig(target_modules=["nothing_of_this_name"]))


def test_which_patterns_lie_inside_2_of_4():
    def every_mask_does(pattern: NMPattern) -> bool:
        groups = math.lcm(4, pattern.m) // pattern.m
        rows = itertools.product(pattern.candidates(dtype=torch.int64), repeat=groups)
        return all(torch.cat(row).view(-1, 4).sum(1).max() <= 2 for row in rows)

    found = {}
    for given in ("1:2", "1:3", "2:3", "1:4", "2:4", "3:4", "2:6", "1:8", "2:8", "4:8", "2:12", "3:12", "1:16"):
        pattern = NMPattern(given)
        found[given] = inside_24(pattern)
        assert found[given] is every_mask_does(pattern), given
    assert True in found.values() and False in found.values()


# --- bytes of training ----------------------------------------------------------------------------------------------
BIG = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_key_value_heads": 4}
TOKENS = torch.arange(8)[None]
CHEAP = {"relaxation": "elementwise", "logits_dtype": "bfloat16"}


def measured_peak(make_model, config: dict, optimizer_of, in_backward=False, checkpointing=False) -> int:
    """Most bytes of live tensors during a training step on so few tokens that activations hardly count."""

    def build():
        model = get_peft_model(make_model(), NMSparseConfig(**config)).train()
        optimizer = optimizer_of([parameter for parameter in model.parameters() if parameter.requires_grad])
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def step():
            nms.set_mask_step(model, 1, 10)
            with optimizer.step_in_backward() if in_backward else contextlib.nullcontext():
                model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return peak_live_bytes(build)


@pytest.mark.parametrize(
    ("dtype", "config", "states", "in_backward", "checkpointing"),
    [
        (torch.float32, {}, "float32", False, False),
        (torch.bfloat16, CHEAP, "8bit", False, False),
        (torch.bfloat16, CHEAP, "8bit", False, True),
        (torch.bfloat16, CHEAP, "8bit", True, False),
        (torch.bfloat16, CHEAP, "8bit", True, True),
        (torch.bfloat16, {**CHEAP, "resample": "step"}, "8bit", False, True),
        *(
            (torch.bfloat16, {"relaxation": name}, "float32", False, False)
            for name in ("ast", "pdp", "bdwp", "transposable")
        ),
        (torch.bfloat16, {"relaxation": "bdwp"}, "float32", False, True),
    ],
    ids=[
        "candidates",
        "cheap",
        "cheap-checkpointing",
        "in-backward",
        "in-backward-checkpointing",
        "one-sample-a-step",
        *("ast", "pdp", "bdwp", "transposable", "bdwp-checkpointing"),
    ],
)
def test_training_takes_the_planned_bytes(make_llama, dtype, config, states, in_backward, checkpointing):
    def optimizer(parameters):
        if states == "8bit":
            return nms.MaskAdamW(parameters, states=states)
        return torch.optim.AdamW(parameters, fused=True)  # as the Trainer has it

    def build():
        return make_llama(dtype, **BIG)

    plan = nms.plan(build(), NMSparseConfig(**config), states, in_backward, checkpointing)
    peak = measured_peak(build, config, optimizer, in_backward, checkpointing)
    assert peak == pytest.approx(plan.training_bytes, rel=0.05)


def test_the_bytes_of_every_way_are_those_of_its_plan(make_llama):
    for pattern, relaxations in (("2:4", ["candidates", "elementwise"]), ("8:16", ["elementwise"])):
        ways = nms.plan(make_llama(), NMSparseConfig(pattern=pattern, relaxation="elementwise")).ways
        assert len(ways) == 8 * len(relaxations) and {way.relaxation for way in ways} == set(relaxations)
        for way in ways:
            config = NMSparseConfig(pattern=pattern, relaxation=way.relaxation, logits_dtype=way.logits_dtype)
            plan = nms.plan(make_llama(), config, way.optimizer_states, way.in_backward)
            parts = plan.logits_bytes, plan.gradient_bytes, plan.optimizer_bytes
            assert (way.logits, way.gradients, way.states) == parts and way.total == sum(parts)


def test_states_of_a_plan_are_those_of_the_optimizer(make_llama):
    config = NMSparseConfig(slorb_block=5)
    plan = nms.plan(make_llama(), config, optimizer_states="8bit")
    model = get_peft_model(make_llama(), config).train()
    logits = [p for name, p in model.named_parameters() if p.requires_grad and ".nmsparse_logits." in name]
    optimizer = nms.MaskAdamW(logits, states="8bit")
    for parameter in logits:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert plan.optimizer_bytes - 2 * plan.term_bytes == sum(value.nbytes for value in tensors)


def test_kept_masked_weights_are_in_the_dtype_of_the_model_and_fewer_with_checkpointing(make_llama):
    plain = nms.plan(make_llama(torch.bfloat16), NMSparseConfig())
    assert plain.masked_weight_bytes == 2 * plain.pruned_weights
    assert {layer.block for layer in plain.layers} == {"model.layers.0", "model.layers.1"}
    assert nms.plan(make_llama(torch.bfloat16), NMSparseConfig(), checkpointing=True).masked_weight_bytes == (
        plain.masked_weight_bytes // 2
    )
    changed = nms.plan(make_llama(torch.bfloat16), NMSparseConfig(delta_rank=2))
    assert changed.masked_weight_bytes == 4 * plain.pruned_weights  # the changed weight under the mask is kept too
    once = nms.plan(make_llama(torch.bfloat16), NMSparseConfig(resample="step"), checkpointing=True)
    assert once.masked_weight_bytes == plain.masked_weight_bytes


def test_a_plan_refuses_unknown_states(make_llama):
    with pytest.raises(ConfigError, match="optimizer_states='4bit'"):
        nms.plan(make_llama(), NMSparseConfig(), optimizer_states="4bit")


# --- what a training step costs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "forward", "both"), [("2:8", 0.75, 0.5), ("2:4", 5 / 6, 2 / 3), ("1:4", 0.75, 0.5)]
)
def test_training_with_sparse_weights_leaves_the_papers_share_of_the_operations(llama, pattern, forward, both):
    planned = nms.plan(llama, NMSparseConfig(pattern=pattern, relaxation="bdwp"))
    costs = {kind: total_cost(layers) for kind, layers in training_cost(planned, 100).items()}
    weights = sum(layer.out_features * layer.in_features for layer in planned.layers)
    assert costs["dense"].total == 3 * 100 * weights and costs["dense"].weight_bytes == 3 * 2 * weights
    assert costs["forward n:m"].total == pytest.approx(forward * costs["dense"].total)
    assert costs["both n:m"].total == pytest.approx(both * costs["dense"].total)
    n, m = map(int, pattern.split(":"))
    read = n / m * (2 + math.log2(m) / 8)
    assert costs["both n:m"].weight_bytes == pytest.approx((2 * read + 2) * weights)
    with pytest.raises(ConfigError, match="tokens=0"):
        training_cost(planned, 0)


# --- several devices ------------------------------------------------------------------------------------------------
def test_blocks_and_edges_weigh_what_they_weigh(make_llama):
    model = make_llama(torch.bfloat16, tie_word_embeddings=True)
    plan = nms.plan(model, NMSparseConfig(dense_layers=["q_proj"]))
    blocks = {
        f"model.layers.{i}": sum(p.nbytes for p in block.parameters()) for i, block in enumerate(model.model.layers)
    }
    assert plan.block_bytes == blocks and plan.edge_bytes == model.lm_head.weight.nbytes


def test_fsdp2_holds_a_share_of_everything_and_two_whole_blocks(make_llama):
    plan = nms.plan(make_llama(), NMSparseConfig(low_rank=2), checkpointing=True)
    model = get_peft_model(make_llama(), NMSparseConfig(low_rank=2))
    three = device_bytes(plan, 3, "fsdp2")
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters()) - trained
    assert (three.model, three.trainable, three.optimizer) == tuple(
        -(-whole // 3) for whole in (frozen, trained, 2 * trained)
    )
    blocks = [list(block.parameters()) for block in model.base_model.model.model.layers]
    assert three.communication == sum(p.nbytes for block in blocks for p in block)  # it has two
    of_block = sum(p.nbytes for p in blocks[0] if p.requires_grad)
    assert three.backward == -(-trained // 3) + 2 * of_block + plan.masked_weight_bytes


def test_what_is_shared_out_shrinks_with_devices_and_what_is_not_stays(make_llama):
    plan = nms.plan(make_llama(num_hidden_layers=8), NMSparseConfig())
    few, many = ({engine: device_bytes(plan, n, engine) for engine in ("ddp", "zero2", "fsdp2")} for n in (2, 64))
    assert few["ddp"].total == many["ddp"].total == plan.training_bytes + plan.trainable_bytes
    assert (few["zero2"].model, few["zero2"].optimizer) == (plan.model_bytes, plan.optimizer_bytes // 2)
    assert many["fsdp2"].total < few["fsdp2"].total < few["zero2"].total < few["ddp"].total
    assert many["fsdp2"].total > plan.masked_weight_bytes  # each device masks all weights for its own samples


@pytest.mark.parametrize(
    ("options", "devices", "engine", "said"),
    [
        ({}, 2, "zero3", "ddp"),
        ({}, 1, "ddp", "at least 2"),
        ({"optimizer_states": "8bit"}, 2, "fsdp2", "MaskAdamW"),
        ({"in_backward": True}, 2, "ddp", "other devices"),
    ],
)
def test_what_no_engine_does_is_not_planned(make_llama, options, devices, engine, said):
    plan = nms.plan(make_llama(), NMSparseConfig(), **options)
    with pytest.raises(ConfigError, match=said):
        device_bytes(plan, devices, engine)
