# SPDX-License-Identifier: Apache-2.0
"""One sample a step: what is shared, that sharing changes no number, that no stale sample is used and none is left over."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.ops import mask_sampling, shared_sample
from hf_nmsparse.training import Distillation

ACCUMULATION = 4
STORE = "model.layers.1.mlp.up_proj"  # the layer that single ones are tried on
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["plain", "reentrant", "non-reentrant"])


@pytest.fixture
def sampled(monkeypatch) -> list[torch.Tensor]:
    """The logits that weights were sampled from, one entry a sample."""
    found = []
    compute = mask_sampling._sampled
    monkeypatch.setattr(
        mask_sampling, "_sampled", lambda w, logits, *rest: found.append(logits) or compute(w, logits, *rest)
    )
    return found


@pytest.fixture
def sharing(monkeypatch):
    """Switches sharing off and on."""
    serves = shared_sample.SharedSample.serves

    def switch(on: bool) -> None:
        monkeypatch.setattr(shared_sample.SharedSample, "serves", serves if on else lambda *given: False)

    return switch


def masked(base, **config):
    model = get_peft_model(base, NMSparseConfig(**{"resample": "step", **config}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def held(model) -> int:
    """How many sampled weights are kept."""
    return sum(sample.held is not None for layer in mask_layers(model).values() for sample in layer.samples.values())


def with_checkpointing(model, options):
    if options is not None:
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    return model


def accumulate(model, tokens, step, draws=range(ACCUMULATION)):
    for draw in draws:
        nms.set_mask_step(model, step, 10, draw, ACCUMULATION)
        (model(input_ids=tokens[2 * draw : 2 * draw + 2], labels=tokens[2 * draw : 2 * draw + 2]).loss / 4).backward()


# --- how often ------------------------------------------------------------------------------------------------------
@checkpointing
@pytest.mark.parametrize(
    ("kernels", "relaxation"), [("fused", "candidates"), ("fused", "elementwise"), ("torch", "candidates")]
)
def test_each_layer_is_sampled_once_a_step(
    make_llama, tokens, sampled, checkpointing, relaxation, kernels, monkeypatch
):
    if kernels == "torch":
        monkeypatch.setattr(mask_sampling.native_masks, "takes", lambda *given: False)
    for resample in ("step", "micro"):
        model = with_checkpointing(masked(make_llama(), resample=resample, relaxation=relaxation), checkpointing)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        for step in range(2):
            sampled.clear()
            accumulate(model, tokens, step)
            times = 1 if resample == "step" else ACCUMULATION * (1 if checkpointing is None else 2)
            assert sorted(Counter(map(id, sampled)).values()) == [times] * 14
            optimizer.step()
            optimizer.zero_grad()


def test_a_step_of_the_trainer_samples_once_and_keeps_nothing(make_llama, tokens, sampled, tmp_path):
    class Watch(nms.MaskScheduleCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            assert held(model) == 0
            counts.append(len(sampled))
            sampled.clear()

    counts = []
    model = masked(make_llama())
    options = {"gradient_accumulation_steps": ACCUMULATION, "gradient_checkpointing": True, "max_steps": 3}
    train(model, tmp_path, tokens, [Watch()], distillation=Distillation(), **options)
    assert counts == [14, 14, 14]


def train(model, folder, tokens, callbacks=(), distillation=None, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    options = {"distillation": distillation} if distillation else {}
    trainer = (nms.NMSparseTrainer if distillation else Trainer)(
        model=model,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=TokenWindows(tokens.repeat(4, 1)),
        callbacks=[*callbacks] or [nms.MaskScheduleCallback()],
        **options,
    )
    trainer.train()
    return trainer


# --- the same numbers -----------------------------------------------------------------------------------------------
@checkpointing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_after_some_steps_are_bit_equal(make_llama, tokens, sharing, checkpointing, dtype):
    found = []
    for on in (True, False):
        sharing(on)
        model = with_checkpointing(masked(make_llama(dtype), slorb_block=8), checkpointing)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01, fused=True)
        for step in range(2):
            accumulate(model, tokens, step)
            torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.detach() for parameter in trained(model)])
    assert all(torch.equal(shared, anew) for shared, anew in zip(*found, strict=True))


@pytest.mark.parametrize("relaxation", ["candidates", pytest.param("elementwise", marks=pytest.mark.slow)])
def test_a_run_of_the_trainer_is_bit_equal(make_llama, tokens, sharing, tmp_path, relaxation):
    found = []
    for on in (True, False):
        sharing(on)
        model = masked(make_llama(), relaxation=relaxation)
        options = {"gradient_accumulation_steps": ACCUMULATION, "gradient_checkpointing": True, "max_steps": 3}
        trainer = train(model, tmp_path, tokens, **options)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append([torch.tensor(losses), *(parameter.detach() for parameter in trained(model))])
    assert all(torch.equal(shared, anew) for shared, anew in zip(*found, strict=True))


def test_each_pass_has_a_node_of_its_own(make_llama, sharing):
    model, gradients = masked(make_llama()), []
    nms.set_mask_step(model, 1, 10)
    layer = mask_layers(model)[STORE]
    for on in (True, False):
        sharing(on)
        first, second = layer.effective_weight(["default"]), layer.effective_weight(["default"])
        assert (first.data_ptr() == second.data_ptr()) == on
        (first.sum() + 3 * second.square().sum()).backward()
        logits = layer.nmsparse_logits["default"].weight
        gradients.append(logits.grad)
        logits.grad = None
    assert torch.equal(*gradients)
    assert not layer.samples["default"].held.requires_grad


def test_micro_batches_and_one_large_batch_see_the_same_masks(make_llama, tokens, tmp_path):
    found = []
    for accumulation, batch in ((4, 2), (1, 8)):
        model = masked(make_llama())
        batches = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch, "max_steps": 3}
        train(model, tmp_path, tokens, **batches, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")
        found.append(torch.cat([parameter.detach().flatten() for parameter in trained(model)]))
    start = torch.cat([parameter.detach().flatten() for parameter in trained(masked(make_llama()))])
    assert (found[0] - start).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])  # transposed weights, and fused experts
def test_transposed_weights_and_experts_share_too(family, sampled, sharing):
    inputs, gradients = inputs_for(family), []
    for on in (True, False):
        sharing(on)
        model = with_checkpointing(masked(FAMILIES[family]()), {"use_reentrant": True})
        nms.set_mask_step(model, 1, 10)
        sampled.clear()
        torch.manual_seed(0)  # of dropout
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert len(sampled) == len(mask_layers(model)) * (1 if on else 4)
        gradients.append([parameter.grad for parameter in trained(model)])
    assert all(torch.equal(shared, anew) for shared, anew in zip(*gradients, strict=True))


def test_under_a_delta_nothing_is_shared_and_of_two_masks_the_first(make_llama, tokens, sampled):
    delta = masked(make_llama(), delta_rank=2)
    for model, times in ((delta, 2), (masked(make_llama()), 3)):
        if model is not delta:
            model.add_adapter("other", NMSparseConfig(resample="step", pattern="1:4"))
            model.base_model.set_adapter(["default", "other"])
            model.train()
        nms.set_mask_step(model, 0, 10)
        sampled.clear()
        for _ in range(2):
            model(tokens)
        assert len(sampled) == times * 14


# --- never stale ----------------------------------------------------------------------------------------------------
def own_optimizer(model) -> None:
    """One that writes through `.data`, as some do."""

    class Plain(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data += 0.1 * torch.randn(parameter.shape)

    Plain(trained(model), {}).step()


def step_of(kind, **options):
    return lambda model, layer, tokens: kind(trained(model), lr=0.1, **options).step()


def reloaded(assign: bool):
    def load(model, layer, tokens):
        state = {n: v.flip(0) for n, v in model.state_dict().items() if ".nmsparse_logits." in n}
        model.load_state_dict(state, strict=False, assign=assign)

    return load


def replaced_data(model, layer, tokens):
    logits = layer.nmsparse_logits["default"].weight
    logits.data = logits.data.flip(0).clone()


def scaled_base(model, layer, tokens):
    with torch.no_grad():
        layer.base_weight.stored.mul_(2)


def replaced_base(model, layer, tokens):
    layer.get_base_layer().weight = torch.nn.Parameter(layer.base_weight.stored.detach() * 2, requires_grad=False)


def reused_memory(model, layer, tokens):
    old = layer.base_weight.stored
    old.data.mul_(2)
    new = torch.nn.Parameter(old.data, requires_grad=False)
    while new._version < old._version:
        torch.autograd.graph.increment_version(new)
    layer.get_base_layer().weight = new


def other_prior(model, layer, tokens):
    nms.set_prior(model, {name: other.hard_mask("default").flip(0) for name, other in mask_layers(model).items()})


def other_schedule(model, layer, tokens):
    for other in mask_layers(model).values():
        other.configs["default"].temperature = (0.5, 0.1)
    nms.set_mask_step(model, 1, 10)


def written_alias(model, layer, tokens):
    with torch.no_grad():
        layer.effective_weight(["default"]).zero_()


CHANGES = {
    "the next step": lambda model, layer, tokens: nms.set_mask_step(model, 2, 10),
    "another schedule": lambda model, layer, tokens: nms.set_mask_step(model, 1, 3),
    "another temperature": other_schedule,
    "AdamW, fused": step_of(torch.optim.AdamW, fused=True),
    "AdamW, foreach": step_of(torch.optim.AdamW, foreach=True),
    "an optimizer that writes through .data": lambda model, layer, tokens: own_optimizer(model),
    "a state dict": reloaded(assign=False),
    "a state dict, assigned": reloaded(assign=True),
    "other data": replaced_data,
    "a prior": other_prior,
    "the base, in place": scaled_base,
    "another base": replaced_base,
    "another base at the same address": reused_memory,
    "rounded and back": lambda model, layer, tokens: model.to(torch.bfloat16).float(),
    "in double precision": lambda model, layer, tokens: model.double(),
    "an alias written to": written_alias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_sample_is_used(make_llama, tokens, sharing, change):
    model = masked(make_llama())
    layer = mask_layers(model)[STORE]
    nms.set_mask_step(model, 1, 10)
    first = model(input_ids=tokens, labels=tokens)
    first.loss.backward()
    assert torch.equal(model(tokens).logits, first.logits)
    CHANGES[change](model, layer, tokens)
    for other in mask_layers(model).values():
        other.mismatch_allowed["default"] = True  # the base was changed on purpose
    shared = model(tokens).logits
    sharing(False)
    assert torch.equal(shared, model(tokens).logits)
    # What the change calls for is another result, or a stale one would pass.
    assert change == "an alias written to" or not torch.equal(shared.double(), first.logits.double())


def test_another_dtype_at_the_same_address_is_seen(make_llama):
    model = masked(make_llama(torch.bfloat16))
    nms.set_mask_step(model, 1, 10)
    layer = mask_layers(model)[STORE]
    layer.mismatch_allowed["default"] = True
    layer.effective_weight(["default"])
    stored = layer.base_weight.stored
    stored.data = stored.data.view(torch.float16)
    assert layer.effective_weight(["default"]).dtype == torch.float16


# --- nothing left over ----------------------------------------------------------------------------------------------
def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda model: torch.optim.SGD(trained(model)).step(), id="optimizer"),
        pytest.param(lambda model: nms.set_mask_step(model, 2, 10), id="next step"),
        pytest.param(lambda model: model.eval(), id="eval"),
        pytest.param(lambda model: model.to(torch.float64), id="to"),
        pytest.param(lambda model: model.base_model.disable_adapter_layers(), id="disable"),
        pytest.param(merge_and_back, id="merge"),
        pytest.param(lambda model: model.delete_adapter("default"), id="delete"),
    ],
)
def test_the_memory_is_given_back(make_llama, tokens, end):
    model = masked(make_llama())
    model.add_adapter("other", NMSparseConfig())
    nms.set_mask_step(model, 1, 10)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert held(model) == 14
    weights = [weakref.ref(layer.samples["default"].held) for layer in mask_layers(model).values()]
    end(model)
    gc.collect()
    assert held(model) == 0 and not any(weight() is not None for weight in weights)


def test_a_deleted_model_leaves_no_sample_behind(make_llama, tokens):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    model(tokens)
    weight = weakref.ref(mask_layers(model)[STORE].samples["default"].held)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_samples_are_neither_copied_nor_saved(make_llama, tokens, copy_of):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    names, expected = set(model.state_dict()), model(tokens).logits.detach()
    assert set(model.state_dict()) == names
    other = copy_of(model)
    assert held(model) == 14 and held(other) == 0
    assert torch.equal(other(tokens).logits, expected) and held(other) == 14
    with torch.no_grad():
        trained(other)[0].add_(1)
    assert not torch.equal(other(tokens).logits, expected) and torch.equal(model(tokens).logits, expected)


# --- where nothing is shared ----------------------------------------------------------------------------------------
def test_the_teacher_and_evaluation_use_no_sample(make_llama, tokens, sampled):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    model(tokens)
    assert held(model) == 14
    sampled.clear()
    exact = model.eval()(tokens).logits
    model.train()(tokens)
    assert torch.equal(model.eval()(tokens).logits, exact)
    assert len(sampled) == 14 and held(model) == 0


def test_a_pass_in_inference_mode_leaves_nothing_for_training(make_llama, tokens):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    with torch.inference_mode():
        model(tokens)
    assert held(model) == 0
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_replicas_do_not_touch_the_samples_of_the_model(make_llama):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    layer = mask_layers(model)[STORE]
    kept = layer.effective_weight(["default"])
    sample = layer.samples["default"].held
    replica = layer._replicate_for_data_parallel()
    for container, name in (("nmsparse_logits", "default"), ("base_layer", None)):
        # as torch.nn.parallel.replicate does: copies of modules, and plain tensors in place of parameters
        inner = getattr(layer, container)
        twin = inner._replicate_for_data_parallel()
        holder = twin if name is None else inner[name]._replicate_for_data_parallel()
        holder.weight = 2 * (inner if name is None else inner[name]).weight.detach().clone().requires_grad_()
        if name is not None:
            twin._modules[name] = holder
        replica._modules[container] = twin
    assert not torch.equal(replica.effective_weight(["default"]), kept)
    assert torch.equal(layer.effective_weight(["default"]), kept)
    assert layer.samples["default"].held is sample


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_gathered_for_each_pass_are_not_kept_as_samples(make_llama, tokens, whole):
    """Sharded and offloaded weights are away between the steps."""
    model = masked(make_llama())
    layer = mask_layers(model)[STORE]
    weight = layer.base_weight.stored
    gathered = weight.data
    if not whole:
        weight.data = weight.data[:0]
    nms.set_mask_step(model, 1, 10)
    weight.data = gathered
    nms.set_mask_step(model, 1, 10, draw=1)  # a later micro-batch, before they are away again
    model(tokens)
    assert held(model) == (14 if whole else 13)


def test_over_a_quantised_base_nothing_is_kept(make_llama, tokens, tmp_path):
    """A sample has four times the bytes of a 4-bit weight."""
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = masked(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu"))
    nms.set_mask_step(model, 1, 10)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert held(model) == 0


def test_fake_tensors_and_transforms_see_the_operators(make_llama, sampled):
    model = masked(make_llama())
    nms.set_mask_step(model, 1, 10)
    layer = mask_layers(model)[STORE]
    kept = layer.effective_weight(["default"])
    logits = layer.nmsparse_logits["default"].weight
    sampled.clear()
    functional = torch.func.functional_call(layer, {"nmsparse_logits.default.weight": 2 * logits}, (torch.eye(32),))
    assert len(sampled) == 1 and not torch.allclose(functional.t(), kept)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.effective_weight(["default"])
    assert type(layer.samples["default"].held) is torch.Tensor
    assert torch.equal(layer.effective_weight(["default"]), kept)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_compiled_training_samples_in_its_graph_and_agrees(make_llama, tokens):
    model = masked(make_llama(num_hidden_layers=1))
    layer = mask_layers(model)["model.layers.0.mlp.up_proj"]
    nms.set_mask_step(model, 0, 10)
    x = torch.randn(3, layer.in_features)
    layer(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend=backend)
    for step in range(3):
        nms.set_mask_step(model, step, 10)
        for _ in range(2):
            torch.testing.assert_close(fast(x), layer(x))
    assert len(graphs) == 1
