# SPDX-License-Identifier: Apache-2.0
"""Distillation beyond the full divergence: the likeliest classes with one for the rest, hidden states, the kept teacher."""

import copy
import weakref

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import get_peft_model
from test_distillation import (
    BERT,
    NO_DROPOUT,
    Batches,
    assert_same_gradients,
    gradients,
    masked,
    reference,
    trainer_for,
    without_loss_arguments,
)
from transformers import BertConfig, BertForSequenceClassification

import hf_nmsparse as nms
from hf_nmsparse import Distillation
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import BaseModelMismatchError, ConfigError, FormatError
from hf_nmsparse.training import distilling, divergence
from hf_nmsparse.training.distillation import hidden_states_of
from hf_nmsparse.training.divergence import TopClasses, hidden_loss, top_classes, top_distillation_loss
from hf_nmsparse.training.teacher_cache import row_keys

CLASSES = 41
LENGTH = 12
TOP = Distillation(top_k=5)
HIDDEN = Distillation(hidden_weight=1.0)
HIDDEN_ALONE = Distillation(loss_weight=0.0, distillation_weight=0.0, hidden_weight=2.0)


@pytest.fixture
def make_llama(make_llama):
    def build(*args, **changes):
        return make_llama(*args, **{"num_hidden_layers": 2, "initializer_range": 0.2, **changes})

    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (8, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def padded(tokens) -> Batches:
    """Rows of very different lengths, padded at their end; and labels that leave out more than the padding."""
    lengths = torch.tensor([12, 3, 7, 12, 4, 9, 2, 11])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = tokens.masked_fill((mask == 0) | (torch.arange(LENGTH) == 1), -100)
    return Batches(input_ids=tokens * mask, attention_mask=mask, labels=labels)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(3, 7, CLASSES, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(3, 7, generator=generator) > 0.4


# --- the likeliest classes ------------------------------------------------------------------------------------------
def joined(student, teacher, keep, top_k, temperature):
    """The loss of one whole batch by autograd in float64: distributions are joined first, and then compared."""
    # Autograd gives NaN for the logsumexp of -infinity alone.
    student, teacher = (value.detach().double().clamp(min=-1e4) for value in (student, teacher))
    student.requires_grad_()
    p, log_q = (teacher / temperature).softmax(-1)[keep], (student / temperature).log_softmax(-1)[keep]
    top = p.topk(min(top_k, p.shape[-1]), -1).indices
    rest = torch.ones_like(p, dtype=torch.bool).scatter_(1, top, False)
    p_joined = torch.cat([p.gather(1, top), (p * rest).sum(1, keepdim=True)], 1)
    log_q_rest = log_q.masked_fill(~rest, -torch.inf).logsumexp(1, keepdim=True)
    log_q_joined = torch.cat([log_q.gather(1, top), log_q_rest], 1)
    there = p_joined > 0
    terms = torch.where(
        there, p_joined * (p_joined.clamp(min=1e-300).log() - log_q_joined.masked_fill(~there, 0)), 0.0
    )
    loss = terms.sum() * temperature**2
    loss.backward()
    return loss.detach(), student.grad


def top_loss(student, teacher, keep, top_k, temperature, denominator=1):
    top = top_classes(teacher, keep, top_k, temperature)
    return top_distillation_loss(student, top, keep, temperature, denominator)


def tied(logits):
    """Logits of which many are alike, within and across the border of the likeliest."""
    return logits.round()


def with_holes(logits):
    """The same classes ruled out for teacher and student."""
    ruled_out = torch.arange(CLASSES) % 3 == 0
    return logits.masked_fill(ruled_out, -torch.inf)


@pytest.mark.parametrize("chunk", [1, CLASSES * 4, 2**23])
@pytest.mark.parametrize("top_k", [1, 6, 30, CLASSES, 10 * CLASSES])
@pytest.mark.parametrize("make", [lambda x: x, tied, with_holes], ids=["plain", "tied", "ruled out"])
def test_the_joined_divergence_and_its_gradient_are_those_of_autograd(logits, monkeypatch, chunk, top_k, make):
    monkeypatch.setattr(divergence, "_CHUNK", chunk)
    student, teacher = (make(value.double()) for value in logits[:2])
    keep = logits[2]
    expected, gradient = joined(student, teacher, keep, top_k, 2.0)
    student[~keep] = teacher[~keep] = torch.nan
    student.requires_grad_()
    loss = top_loss(student, teacher, keep, top_k, 2.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(student.grad, gradient.nan_to_num(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_joining_classes_gives_a_lower_bound_that_grows_to_the_full_divergence(logits, temperature):
    student, teacher, keep = logits[0].double(), logits[1].double(), logits[2]
    full, _ = reference(student, teacher, keep, temperature, 1)
    bounds = torch.stack([top_loss(student, teacher, keep, k, temperature) for k in range(1, CLASSES + 1)])
    assert (bounds >= 0).all() and (bounds.diff() >= -1e-12).all() and bounds[0] < 0.9 * full
    torch.testing.assert_close(bounds[-1], full)
    torch.testing.assert_close(bounds[-2], full)  # a rest of one class is that class
    assert top_loss(teacher, teacher, keep, 3, temperature).abs() < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_costs_only_rounding(logits, dtype, tolerance):
    student, teacher, keep = logits[0].to(dtype).requires_grad_(), logits[1].to(dtype), logits[2]
    expected, gradient = joined(student, teacher, keep, 6, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = top_loss(student, teacher, keep, 6, 2.0)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), gradient, rtol=tolerance, atol=tolerance * 1e-2)


def test_a_student_that_is_sure_gives_finite_numbers():
    student, teacher = torch.zeros(1, CLASSES), torch.zeros(1, CLASSES)
    student[:, :3], teacher[:, :3] = 300.0, 300.0
    student.requires_grad_()
    loss = top_loss(student, teacher, torch.ones(1, dtype=torch.bool), 3, 1.0)
    loss.backward()
    assert loss.abs() < 1e-5 and student.grad.isfinite().all()


def test_no_kept_position_gives_zero(logits):
    student, teacher, keep = logits[0].requires_grad_(), logits[1], torch.zeros_like(logits[2])
    loss = top_loss(student, teacher, keep, 4, 2.0)
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_classes_of_other_positions_are_refused(logits):
    student, teacher, keep = logits
    top = top_classes(teacher, keep, 4, 2.0)
    with pytest.raises(ConfigError, match="a row for each of"):
        top_distillation_loss(student, TopClasses(top.indices[1:], top.log_probabilities[1:]), keep, 2.0, 1)


# --- hidden states --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 100, 2**23])
def test_the_hidden_loss_is_the_mean_relative_error(monkeypatch, chunk):
    monkeypatch.setattr(divergence, "_CHUNK", chunk)
    student, teacher = torch.randn(2, 3, 5, 16, dtype=torch.float64).unbind(0)
    keep = torch.rand(3, 5) > 0.3
    student[~keep] = teacher[~keep] = torch.nan
    student.requires_grad_()
    loss = hidden_loss(student, teacher, keep, keep.sum())
    loss.backward()
    found, student.grad = student.grad, None
    expected = ((student[keep] - teacher[keep]).square().mean(-1) / (teacher[keep].square().mean(-1) + 1e-6)).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, student.grad.nan_to_num())
    with pytest.raises(ConfigError, match="do not agree"):
        hidden_loss(student, teacher[:2], keep, 1)


@pytest.mark.parametrize("make", [torch.Tensor.half, torch.Tensor.bfloat16], ids=["float16", "bfloat16"])
def test_positions_with_huge_states_count_no_more_than_others(make):
    teacher = torch.randn(4, 64)
    teacher[0] *= 1000
    student = make(teacher * 1.5).requires_grad_()
    loss = hidden_loss(student, make(teacher), torch.ones(4, dtype=torch.bool), 4)
    loss.backward()
    assert loss.item() == pytest.approx(0.25, rel=0.02)
    assert student.grad.isfinite().all() and student.grad.ne(0).float().mean() > 0.9


def mean_relative_errors(model, base, columns):
    """What `nm/hidden_loss` should say of a batch."""
    model.train()
    nms.set_mask_step(model, 0, 1)
    inputs = {name: value for name, value in columns.items() if name != "labels"}
    with torch.no_grad():
        student, teacher = (hidden_states_of(m(**inputs, output_hidden_states=True)) for m in (model, base))
    keep = columns["attention_mask"].bool()
    pairs = [(s[keep], t[keep]) for s, t in zip(student, teacher, strict=True)]
    assert len(pairs) == 2  # the blocks, without the embeddings
    return sum((((s - t).square().mean(-1)) / (t.square().mean(-1) + 1e-6)).mean().item() for s, t in pairs)


@pytest.mark.parametrize("distil", [HIDDEN, HIDDEN_ALONE])
def test_the_hidden_term_is_the_sum_over_blocks_without_padding(make_llama, padded, tmp_path, distil):
    model = masked(make_llama())
    trainer = trainer_for(
        model, tmp_path, padded, distil, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8
    )
    trainer.train()
    line = trainer.state.log_history[0]
    expected = mean_relative_errors(model, make_llama(), padded.columns)
    assert expected > 0.01 and line["nm/hidden_loss"] == pytest.approx(expected, rel=2e-3)
    assert ("nm/distillation_loss" in line) == (distil is HIDDEN)
    if distil is HIDDEN_ALONE:
        assert line["loss"] == pytest.approx(2 * expected, rel=2e-3)


@pytest.mark.parametrize("distil", [TOP, HIDDEN, HIDDEN_ALONE], ids=["top", "hidden", "hidden alone"])
def test_accumulated_gradients_equal_those_of_one_batch(make_llama, padded, tmp_path, distil):
    whole = gradients(make_llama(), tmp_path, padded, 8, 1, distil=distil)
    parts = gradients(make_llama(), tmp_path, padded, 1, 8, distil=distil)
    assert_same_gradients(parts, whole)


def test_accumulated_gradients_of_a_model_without_loss_arguments(make_llama, tokens, tmp_path):
    data = TokenWindows(tokens)
    whole = gradients(without_loss_arguments(make_llama()), tmp_path, data, 8, 1, distil=HIDDEN)
    parts = gradients(without_loss_arguments(make_llama()), tmp_path, data, 1, 8, distil=HIDDEN)
    assert_same_gradients(parts, whole)


@pytest.mark.parametrize("distil", [TOP, HIDDEN], ids=["top", "hidden"])
def test_gradient_checkpointing_changes_no_gradient(make_llama, padded, tmp_path, distil):
    plain = gradients(make_llama(), tmp_path, padded, 4, 1, distil=distil)
    checkpointed = gradients(make_llama(), tmp_path, padded, 4, 1, distil=distil, gradient_checkpointing=True)
    assert_same_gradients(checkpointed, plain)


def test_the_weighted_terms_add_up_to_the_loss_over_accumulated_steps(make_llama, padded, tmp_path):
    distil = Distillation(loss_weight=0.25, distillation_weight=0.5, top_k=5, hidden_weight=0.125)
    lines = {}
    for key, value in (("all", distil), ("plain", None)):
        changes = {"learning_rate": 0.0, "logging_steps": 2, "gradient_accumulation_steps": 2}
        trainer = trainer_for(masked(make_llama()), tmp_path, padded, value, **changes)
        trainer.train()
        lines[key] = next(line for line in trainer.state.log_history if "loss" in line)
    line = lines["all"]
    terms = 0.5 * line["nm/distillation_loss"] + 0.125 * line["nm/hidden_loss"]
    assert line["loss"] == pytest.approx(0.25 * lines["plain"]["loss"] + terms, rel=1e-5)


def test_matching_hidden_states_alone_brings_the_masked_model_towards_its_base(make_llama, tokens, tmp_path):
    model = masked(make_llama(), prior_strength=1.0, temperature=(1.0, 0.1))
    changes = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 5}
    trainer = trainer_for(model, tmp_path, TokenWindows(tokens), HIDDEN_ALONE, **changes)
    trainer.train()
    terms = [line["nm/hidden_loss"] for line in trainer.state.log_history if "nm/hidden_loss" in line]
    assert len(terms) == 4 and terms[-1] < 0.8 * terms[0]


def test_the_teachers_states_are_freed_block_by_block(make_llama, padded, tmp_path, monkeypatch):
    found, alive = [], []
    read, compare = distilling.hidden_states_of, distilling.hidden_loss

    def reading(outputs):
        states = read(outputs)
        if not states[0].requires_grad:
            found.extend(weakref.ref(state) for state in states)
        return states

    def comparing(*args):
        alive.append(sum(reference() is not None for reference in found))
        return compare(*args)

    monkeypatch.setattr(distilling, "hidden_states_of", reading)
    monkeypatch.setattr(distilling, "hidden_loss", comparing)
    trainer_for(masked(make_llama()), tmp_path, padded, HIDDEN, max_steps=1).train()
    assert alive == [2, 1]


def test_inputs_without_tokens_count_all_positions(tmp_path):
    base = FAMILIES["vit"]()
    pictures = inputs_for("vit", batch=8)["pixel_values"]
    data = Batches(pixel_values=pictures, labels=torch.arange(8) % 3)
    found = [gradients(copy.deepcopy(base), tmp_path, data, batch, 8 // batch, distil=HIDDEN) for batch in (8, 2)]
    assert_same_gradients(*found)


def test_a_classifier_matches_hidden_states_of_all_its_tokens(padded, tmp_path):
    base = BertForSequenceClassification(BertConfig(**{**BERT, "num_hidden_layers": 2}, **NO_DROPOUT)).eval()
    expected_teacher = copy.deepcopy(base)
    model = masked(base, target_modules=["query", "value", "dense"], exclude_modules=["pooler.dense"])
    data = Batches(**{**padded.columns, "labels": torch.arange(8) % 2})
    trainer = trainer_for(model, tmp_path, data, HIDDEN, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    expected = mean_relative_errors(model, expected_teacher, data.columns)
    assert trainer.state.log_history[0]["nm/hidden_loss"] == pytest.approx(expected, rel=2e-3)


def test_hidden_states_that_cannot_be_compared_are_refused(padded, tmp_path):
    with pytest.raises(ConfigError, match="encoder-decoder"):
        trainer_for(masked(FAMILIES["t5"](), target_modules=["q", "v"]), tmp_path, padded, HIDDEN)
    with pytest.raises(ConfigError, match="output has only"):
        hidden_states_of({"logits": torch.zeros(1)})
    with pytest.raises(ConfigError, match="this model's are"):
        hidden_states_of({"hidden_states": (torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 2, 8))})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"hidden_weight": float("nan")}, "hidden_weight"),
        ({"distillation_weight": -0.5, "hidden_weight": 1.0}, "distillation_weight"),
        ({"distillation_weight": 0.0}, "teach nothing"),
        ({"distillation_weight": 0.0, "hidden_weight": 1.0, "top_k": 4}, "without effect"),
    ],
)
def test_wrong_values_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        Distillation(**values)


# --- the kept teacher -----------------------------------------------------------------------------------------------
@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of each pass of the teacher."""
    rows, run = [], distilling.teacher_outputs

    def counted(model, inputs, *args, **changes):
        rows.append(len(inputs["input_ids"]))
        return run(model, inputs, *args, **changes)

    monkeypatch.setattr(distilling, "teacher_outputs", counted)
    return rows


def learned(model):
    return {name: p.detach() for name, p in model.named_parameters() if ".nmsparse_logits." in name}


def test_a_kept_teacher_runs_for_one_epoch_and_changes_nothing(make_llama, padded, tmp_path, passes):
    plain, kept = masked(make_llama()), masked(make_llama())
    changes = {"max_steps": -1, "num_train_epochs": 3}
    trainer_for(plain, tmp_path, padded, TOP, **changes).train()
    assert sum(passes) == 24
    passes.clear()
    cache = nms.TeacherCache(TOP)
    trainer = trainer_for(kept, tmp_path, padded, TOP, teacher_cache=cache, **changes)
    trainer.train()
    assert sum(passes) == 8 and len(cache) == 8  # rows are shuffled into other batches in each epoch
    assert trainer.state.log_history[-2]["nm/distillation_loss"] > 0
    for name, value in learned(plain).items():
        torch.testing.assert_close(learned(kept)[name], value, rtol=1e-5, atol=1e-6)


def test_a_file_of_it_serves_runs_with_other_seeds(make_llama, padded, tmp_path, passes):
    cache = nms.TeacherCache(TOP)
    trainer_for(masked(make_llama()), tmp_path, padded, TOP, teacher_cache=cache, max_steps=4).train()
    read = nms.TeacherCache.load(cache.save(tmp_path / "teacher.safetensors"))
    assert read.rows.keys() == cache.rows.keys() and len(read) == 8
    for key, top in cache.rows.items():
        assert all(torch.equal(found, value) for found, value in zip(read.rows[key], top, strict=True))
    passes.clear()
    other = masked(make_llama(), seed=3, low_rank=2)
    trainer_for(other, tmp_path, padded, TOP, teacher_cache=read, max_steps=4, seed=9).train()
    assert not passes


def test_an_empty_cache_can_be_written(tmp_path):
    assert not len(nms.TeacherCache.load(nms.TeacherCache(TOP).save(tmp_path / "teacher.safetensors")))


def test_rows_are_known_by_their_contents_whatever_the_padding():
    ids, keep = torch.tensor([[1, 2, 3], [1, 2, 0]]), torch.ones(2, 3, dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    keep[1, 2] = False
    long, short = row_keys({"input_ids": ids, "attention_mask": mask, "labels": ids}, keep, "labels")
    cut = {"input_ids": ids[1:, :2], "attention_mask": mask[1:, :2], "labels": ids[:1, 1:]}
    assert row_keys(cut, keep[1:, :2], "labels") == [short] and short != long
    for changed in (
        {**cut, "input_ids": torch.tensor([[1, 3]])},
        {**cut, "position_ids": torch.tensor([[4, 5]])},
        {**cut, "attention_mask": torch.tensor([[0, 1]])},
    ):
        assert row_keys(changed, keep[1:, :2], "labels") != [short]
    assert row_keys(cut, torch.tensor([[True, False]]), "labels") != [short]


def test_another_teacher_or_distillation_is_refused(make_llama, padded, tmp_path):
    cache = nms.TeacherCache(TOP)
    model = masked(make_llama(), modules_to_save=["lm_head"])
    trainer_for(model, tmp_path, padded, TOP, teacher_cache=cache)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    trainer_for(model, tmp_path, padded, TOP, teacher_cache=cache)  # the copy beside the head is not the teacher's
    trainer_for(masked(make_llama(), relaxation="elementwise"), tmp_path, padded, TOP, teacher_cache=cache)
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseModelMismatchError, match="other base weights"):
        trainer_for(masked(other), tmp_path, padded, TOP, teacher_cache=cache)
    for distil in (Distillation(top_k=6), Distillation(top_k=5, temperature=1.0), HIDDEN, None):
        with pytest.raises(ConfigError, match=r"is for Distillation\(top_k=5"):
            trainer_for(masked(make_llama()), tmp_path, padded, distil, teacher_cache=cache)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        trainer_for(masked(FAMILIES["t5"](), target_modules=["q"]), tmp_path, padded, TOP, teacher_cache=cache)


def test_a_teacher_that_cannot_be_kept_and_files_that_are_none_are_refused(make_llama, tmp_path):
    for distil in (Distillation(), Distillation(top_k=4, hidden_weight=1.0)):
        with pytest.raises(ConfigError, match="likeliest classes alone"):
            nms.TeacherCache(distil)
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a teacher cache"):
        nms.TeacherCache.load(path)
    get_peft_model(make_llama(), nms.NMSparseConfig()).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="not a teacher cache of this version"):
        nms.TeacherCache.load(tmp_path / "adapter_model.safetensors")
