# SPDX-License-Identifier: Apache-2.0
"""Distillation: the chunked loss, the dense base as teacher, and the Trainer that adds it up."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

import hf_nmsparse as nms
from hf_nmsparse import Distillation, NMSparseConfig
from hf_nmsparse.cli.train import distillation as cli_distillation
from hf_nmsparse.cli.training_run import TrainingRun
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.training import divergence
from hf_nmsparse.training.distillation import (
    counted_positions,
    dense_base,
    predicts_next_token,
    teacher_outputs,
)
from hf_nmsparse.training.divergence import distillation_loss

LENGTH = 12
DEFAULTS = Distillation()
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64, "dropout_rate": 0.0}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Batches(torch.utils.data.Dataset):
    """Rows of tensors by name."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if not self.found:
            named = model.named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.fixture
def make_llama(make_llama):
    """One block, since the Trainer does the same at any depth, of weights so large that a mask matters."""
    return partial(make_llama, num_hidden_layers=1, initializer_range=0.2)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (8, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def uneven(tokens) -> Batches:
    """Rows with very different numbers of labels."""
    labels = tokens.clone()
    for row in range(len(labels)):
        labels[row, : 1 + row * 7 % (LENGTH - 2)] = -100
    return Batches(input_ids=tokens, labels=labels)


def trainer_for(model, folder, data, distil=DEFAULTS, callbacks=None, teacher_cache=None, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return nms.NMSparseTrainer(
        model=model,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=data,
        callbacks=callbacks,
        distillation=distil,
        teacher_cache=teacher_cache,
    )


def masked(model, **changes):
    return get_peft_model(model, NMSparseConfig(**{"resample": "step", **changes}))


# --- the loss -------------------------------------------------------------------------------------------------------
def reference(student, teacher, keep, temperature, denominator):
    """The loss and the student's gradient in float64, all at once."""
    student = student.detach().double().requires_grad_()
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher.double() / temperature, -1)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)
    loss = divergence[keep].sum() * temperature**2 / denominator
    loss.backward()
    return loss.detach(), student.grad


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(3, 7, 41, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(3, 7, generator=generator) > 0.4


@pytest.mark.parametrize("chunk", [1, 41 * 4, 2**23])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_the_chunked_loss_is_the_divergence(logits, monkeypatch, chunk, temperature, dtype, tolerance):
    monkeypatch.setattr(divergence, "_CHUNK", chunk)
    student, teacher, keep = (logits[0].to(dtype).requires_grad_(), logits[1].to(dtype), logits[2])
    expected, gradient = reference(student, teacher, keep, temperature, 11)
    loss = distillation_loss(student, teacher, keep, temperature, 11)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), gradient, rtol=tolerance, atol=tolerance * 1e-3)
    assert not student.grad[~keep].any()


def test_autocast_does_not_touch_the_loss(logits):
    student, teacher, keep = logits
    plain, cast = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = distillation_loss(plain, teacher.clone(), keep, 2.0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(cast, teacher.clone(), keep, 2.0, 5)
    for value in (expected, loss):
        value.backward()
    assert torch.equal(loss, expected) and torch.equal(cast.grad, plain.grad)


def test_the_gradient_takes_the_teachers_memory_and_goes_to_the_student_only(logits):
    student, teacher, keep = logits[0].requires_grad_(), logits[1].requires_grad_(), logits[2]
    loss = distillation_loss(student, teacher, keep, 2.0, 1)
    (saved,) = loss.grad_fn.next_functions[0][0].next_functions[0][0].saved_tensors
    assert saved.data_ptr() == teacher.data_ptr()
    loss.backward(retain_graph=True)
    assert student.grad is not None and teacher.grad is None
    with pytest.raises(RuntimeError, match="inplace"):  # rather than twice the weight
        loss.backward()


def test_other_dtypes_keep_the_teacher_and_positions_left_out_may_hold_nan(logits):
    student, teacher, keep = logits[0].requires_grad_(), logits[1].bfloat16(), logits[2]
    expected, gradient = reference(student, teacher, keep, 2.0, 4)
    teacher[~keep] = torch.nan
    before = teacher.clone()
    with torch.no_grad():
        student[~keep] = torch.nan
    loss = distillation_loss(student, teacher, keep, 2.0, torch.tensor(4))
    loss.backward()
    assert torch.equal(teacher.nan_to_num(), before.nan_to_num())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad.double(), gradient, rtol=1e-5, atol=1e-8)


def test_classes_ruled_out_by_the_model_add_nothing(logits):
    student, teacher, keep = logits
    expected = distillation_loss(student[..., 5:], teacher[..., 5:].clone(), keep, 2.0, 1)
    student[..., :5] = teacher[..., :5] = -torch.inf
    student.requires_grad_()
    loss = distillation_loss(student, teacher, keep, 2.0, 1)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert student.grad.isfinite().all() and not student.grad[..., :5].any()


def test_no_kept_position_gives_zero_and_zero_gradient(logits):
    student, teacher, keep = logits[0].requires_grad_(), logits[1], logits[2]
    loss = distillation_loss(student, teacher, torch.zeros_like(keep), 2.0, 1)
    loss.backward()
    assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_weight", -0.1),
        ("loss_weight", float("nan")),
        ("distillation_weight", 0.0),
        ("distillation_weight", float("inf")),
        ("temperature", 0.0),
        ("temperature", -2.0),
    ],
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        Distillation(**{field: value})


def test_shapes_that_do_not_fit_are_refused(logits):
    student, teacher, keep = logits
    with pytest.raises(ConfigError, match="do not agree"):
        distillation_loss(student, teacher[..., 1:], keep, 2.0, 1)
    with pytest.raises(ConfigError, match="one for each label"):  # regression
        counted_positions(torch.zeros(3), torch.zeros(3, 1), next_token=False)
    with pytest.raises(ConfigError, match="one for each label"):
        counted_positions(torch.zeros(3, 6, dtype=torch.int64), student, next_token=True)


# --- the teacher ----------------------------------------------------------------------------------------------------
def state_of(model):
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: getattr(module, "_disable_adapters", None) for name, module in model.named_modules()},
    )


def dropping(make_llama):
    return make_llama(attention_dropout=0.5)


def stacked(make_llama):
    model = dropping(make_llama)
    model.add_adapter(NMSparseConfig(dense_layers=["q_proj"]))
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    model.set_adapter(["default", "lora"])
    return model


def wrapped(make_llama):
    return get_peft_model(dropping(make_llama), NMSparseConfig(modules_to_save=["lm_head", "norm"]))


def with_terms(make_llama):
    """Everything that can stand beside a mask."""
    config = NMSparseConfig(slorb_block=4, slorb_train_projection=True, low_rank=2, delta_rank=2)
    return get_peft_model(dropping(make_llama), config)


def injected(make_llama):
    model = dropping(make_llama)
    model.add_adapter(NMSparseConfig(trainable_token_indices={"embed_tokens": [1, 2]}))
    return model


@pytest.mark.parametrize("make", [wrapped, with_terms, injected, stacked], ids=lambda make: make.__name__)
def test_the_teacher_is_the_base_bit_for_bit_and_all_is_as_before(make_llama, tokens, make):
    expected = make_llama()(tokens).logits
    model = make(make_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.train()
    model.get_submodule("base_model" if hasattr(model, "base_model") else "model").training = False
    nms.set_mask_step(model, 0, 10)
    before = state_of(model)
    assert not torch.equal(model(tokens).logits, expected)
    with dense_base(model):
        assert not model.training and not torch.is_grad_enabled()
        assert torch.equal(model(tokens).logits, expected)
    assert state_of(model) == before and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), dense_base(model):
        raise ZeroDivisionError
    assert state_of(model) == before and torch.is_grad_enabled()


def test_a_merged_model_has_no_dense_base(make_llama, tokens):
    model = masked(make_llama())
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"7 layers .*unmerge"), dense_base(model):
        pass
    model.unmerge_adapter()
    with dense_base(model):
        model(tokens)


def test_ddp_is_unwrapped_so_that_no_buffer_is_broadcast_before_the_backward_pass(make_llama, tokens, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(masked(make_llama()).train())
        nms.set_mask_step(model, 0, 10)
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        loss = model(input_ids=tokens, labels=tokens).loss
        teacher = teacher_outputs(model, {"input_ids": tokens, "labels": tokens}, "labels").logits
        assert len(passes) == 1
        loss.backward()
        assert torch.equal(teacher, make_llama()(tokens).logits)
    finally:
        torch.distributed.destroy_process_group()


def test_which_models_predict_the_next_token(llama):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8))
    bert = BertForMaskedLM(BertConfig(**BERT))
    t5 = T5ForConditionalGeneration(T5Config(**T5))
    found = [predicts_next_token(model) for model in (llama, masked(llama), gpt2, bert, t5)]
    assert found == [True, True, True, False, False]


# --- the trainer ----------------------------------------------------------------------------------------------------
def without_loss_arguments(model):
    model.accepts_loss_kwargs = False
    return model


def gradients(model, folder, data, batch, accumulation, **changes) -> dict[str, torch.Tensor]:
    kept = Gradients()
    trainer_for(
        masked(model),
        folder,
        data,
        callbacks=[kept],
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        **changes,
    ).train()
    return kept.found


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0 and (found[name] - value).norm() < 1e-4 * value.norm(), name


@pytest.mark.parametrize("distil", [Distillation(), Distillation(loss_weight=0.0, temperature=1.0)])
def test_accumulated_gradients_equal_those_of_one_batch_with_uneven_labels(make_llama, uneven, tmp_path, distil):
    whole = gradients(make_llama(), tmp_path, uneven, 4, 1, distil=distil)
    parts = gradients(make_llama(), tmp_path, uneven, 1, 4, distil=distil)
    assert_same_gradients(parts, whole)


def test_accumulated_gradients_of_a_model_without_loss_arguments(make_llama, tokens, tmp_path):
    data = TokenWindows(tokens)
    whole = gradients(without_loss_arguments(make_llama()), tmp_path, data, 4, 1)
    parts = gradients(without_loss_arguments(make_llama()), tmp_path, data, 1, 4)
    assert_same_gradients(parts, whole)


@pytest.mark.parametrize("accepts", [True, False])
def test_the_logged_terms_add_up_to_the_loss(make_llama, uneven, tmp_path, accepts):
    distil = Distillation(loss_weight=0.25, distillation_weight=0.5, temperature=3.0)
    lines = {}
    for key, value in (("both", distil), ("plain", None)):
        model = make_llama() if accepts else without_loss_arguments(make_llama())
        trainer = trainer_for(
            masked(model),
            tmp_path,
            uneven,
            value,
            learning_rate=0.0,
            logging_steps=2,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        lines[key] = next(line for line in trainer.state.log_history if "loss" in line)
    assert "nm/distillation_loss" not in lines["plain"]
    term = lines["both"]["nm/distillation_loss"]
    assert term > 1e-4
    assert lines["both"]["loss"] == pytest.approx(0.25 * lines["plain"]["loss"] + 0.5 * term, rel=1e-5)


def test_the_term_is_the_mean_over_predicted_positions(make_llama, uneven, tmp_path):
    model = masked(make_llama())
    trainer = trainer_for(model, tmp_path, uneven, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    labels, tokens = uneven.columns["labels"], uneven.columns["input_ids"]
    model.train()
    nms.set_mask_step(model, 0, 1)
    with torch.no_grad():
        student, teacher = model(tokens).logits[:, :-1], make_llama()(tokens).logits[:, :-1]
    keep = labels[:, 1:] != -100
    expected, _ = reference(student, teacher, keep, 2.0, int(keep.sum()))
    assert trainer.state.log_history[0]["nm/distillation_loss"] == pytest.approx(float(expected), rel=2e-3)


def test_distilling_alone_brings_the_masked_model_towards_its_base(make_llama, tokens, tmp_path):
    model = masked(make_llama(), prior_strength=1.0, temperature=(1.0, 0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".nmsparse_" not in name}
    trainer = trainer_for(
        model,
        tmp_path,
        TokenWindows(tokens),
        Distillation(loss_weight=0.0, distillation_weight=1.0),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        logging_steps=5,
    )
    trainer.train()
    terms = [line["nm/distillation_loss"] for line in trainer.state.log_history if "nm/distillation_loss" in line]
    assert len(terms) == 4 and terms[-1] < 0.8 * terms[0]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == pytest.approx(terms)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_evaluation_loss_is_the_task_loss(make_llama, uneven, tmp_path):
    model = masked(make_llama())
    trainer = trainer_for(model, tmp_path, uneven, max_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    found = trainer.evaluate(uneven)["eval_loss"]
    model.eval()
    with torch.no_grad():
        expected = model(**uneven.columns).loss
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(make_llama, uneven, tmp_path):
    changes = {"gradient_checkpointing": True}
    plain = gradients(make_llama(), tmp_path, uneven, 4, 1)
    checkpointed = gradients(make_llama(), tmp_path, uneven, 4, 1, **changes)
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("changes", [{"bf16": True}, {"label_smoothing_factor": 0.1}], ids=["autocast", "smoothing"])
def test_autocast_and_label_smoothing_train(make_llama, uneven, tmp_path, changes):
    kept = gradients(make_llama(), tmp_path, uneven, 4, 1, **changes)
    assert kept and all(value.isfinite().all() for value in kept.values())
    assert any(value.any() for value in kept.values())


def t5():
    config = T5Config(**T5, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"target_modules": ["q", "v", "wi", "wo"]}


def masked_lm():
    return BertForMaskedLM(BertConfig(**BERT, **NO_DROPOUT)), {"target_modules": ["query", "value", "dense"]}


@pytest.mark.parametrize("build", [t5, masked_lm])
def test_labels_that_are_not_shifted(build, uneven, tmp_path):
    base, config = build()
    base.eval()
    expected_teacher = copy.deepcopy(base)
    model = masked(base, **config)
    trainer = trainer_for(
        model, tmp_path, uneven, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8, logging_steps=1
    )
    trainer.train()
    model.train()
    nms.set_mask_step(model, 0, 1)
    with torch.no_grad():
        student, teacher = model(**uneven.columns).logits, expected_teacher(**uneven.columns).logits
    keep = uneven.columns["labels"] != -100
    expected, _ = reference(student, teacher, keep, 2.0, int(keep.sum()))
    assert trainer.state.log_history[0]["nm/distillation_loss"] == pytest.approx(float(expected), rel=2e-3)


def test_classification_has_one_term_a_row(tokens, tmp_path):
    model = masked(
        BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), target_modules=["query", "value", "dense"]
    )
    data = Batches(input_ids=tokens, labels=torch.arange(8) % 3)
    trainer = trainer_for(model, tmp_path, data, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["nm/distillation_loss"] > 0


class RenamedLabels(torch.nn.Module):
    """A model of someone's own: labels under another name, no loss arguments."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, input_ids, targets=None):
        outputs = self.inner(input_ids)
        if targets is not None:
            outputs["loss"] = F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())
        return outputs


def test_labels_of_another_name(make_llama, tokens, tmp_path):
    data = Batches(input_ids=tokens, targets=tokens)
    model = get_peft_model(RenamedLabels(make_llama()), NMSparseConfig(target_modules=["q_proj", "up_proj"]))
    trainer = trainer_for(model, tmp_path, data, max_steps=1, label_names=["targets"])
    trainer.train()
    assert trainer.state.log_history[0]["nm/distillation_loss"] > 0
    named_wrongly = trainer_for(
        model, tmp_path, data, max_steps=1, label_names=["answers"], remove_unused_columns=False
    )
    with pytest.raises(ConfigError, match=r"\['input_ids', 'targets'\].*label_names"):
        named_wrongly.train()


def test_a_model_that_hides_its_logits_is_refused(make_llama, uneven, tmp_path):
    model = make_llama()
    plain = model.forward
    model.forward = lambda *args, **kwargs: {"loss": plain(*args, **kwargs).loss}
    without_loss_arguments(model)
    with pytest.raises(ConfigError, match=r"\['loss'\].*use_liger_kernel"):
        trainer_for(masked(model), tmp_path, uneven, max_steps=1, remove_unused_columns=False).train()


def test_data_parallel_is_refused(make_llama, uneven, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="torchrun"):
        trainer_for(masked(make_llama()), tmp_path, uneven)


def test_modules_to_save_train_and_stay_out_of_the_teacher(make_llama, uneven, tmp_path):
    base = make_llama()
    expected = base(uneven.columns["input_ids"]).logits.detach().clone()
    model = masked(base, modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    trainer_for(model, tmp_path, uneven, learning_rate=0.1).train()
    assert not torch.equal(head, before)
    assert torch.equal(teacher_outputs(model, uneven.columns, "labels").logits, expected)


def test_only_logits_go_into_the_optimizer_group_of_the_masks(make_llama, uneven, tmp_path):
    model = masked(make_llama(), slorb_block=4, slorb_train_projection=True, low_rank=2, delta_rank=2)
    trainer = trainer_for(model, tmp_path, uneven, weight_decay=0.1)
    trainer.mask_learning_rate = 0.5
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(settings) == len(trained) == 7 * 7
    for name, parameter in trained.items():
        assert settings[id(parameter)] == ((0.5, 0.0) if ".nmsparse_logits." in name else (0.02, 0.1)), name


# --- the command line -----------------------------------------------------------------------------------------------
def test_the_options_of_train_mean_a_distillation():
    nothing = dict.fromkeys(("weight", "temperature", "top_k", "hidden"))
    assert cli_distillation(False, **nothing) is None
    assert cli_distillation(True, **nothing) == Distillation()
    given = {"weight": 0.75, "temperature": 3.0, "top_k": 8, "hidden": 0.5}
    assert cli_distillation(True, **given) == Distillation(0.25, 0.75, 3.0, top_k=8, hidden_weight=0.5)
    for wanted, options, said in (
        *((False, {name: value}, "need --distill") for name, value in given.items()),
        (True, {"weight": 0.0}, "--distill-weight"),
        (True, {"weight": 1.5}, "--distill-weight"),
        (True, {"temperature": 0.0}, "temperature"),
        (True, {"top_k": 0}, "top_k"),
        (True, {"hidden": -1.0}, "hidden_weight"),
    ):
        with pytest.raises(ConfigError, match=said):
            cli_distillation(wanted, **nothing | options)


def test_a_run_of_train_hands_it_to_the_trainer_and_records_it(make_llama, tokens, tmp_path):
    run = TrainingRun("base", "polish", 16, seed=0, data="text", distillation=Distillation(0.25, 0.75))
    run.train_windows = tokens
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    trainer = run.trainer(masked(make_llama()), arguments)
    assert trainer.distillation == Distillation(0.25, 0.75)
    assert run._results(trainer).method == "candidates (prior polish, distilled: 0.75 KL + 0.25 loss, temperature 2)"
