# SPDX-License-Identifier: Apache-2.0
"""The elementwise relaxation: its distribution against enumeration, its gradients, and a training run through PEFT."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows
from hf_nmsparse.errors import UnsupportedError
from hf_nmsparse.ops import NoiseKey, SamplingState
from hf_nmsparse.ops import mask_sampling as mask_sampling_module
from hf_nmsparse.ops.philox import gumbel_noise
from hf_nmsparse.relaxations import get_relaxation

KEY = NoiseKey.for_layer(3, "model.layers.0.mlp.up_proj")
CASES = [
    ("2:4", (3, 12)),
    ("2:4", (5, 10)),
    ("1:4", (2, 7)),
    ("3:4", (4, 9)),
    ("2:3", (3, 3)),
    ("3:8", (2, 19)),
    ("4:8", (3, 11)),
    ("4:8", (3, 10)),
    ("1:16", (2, 33)),
    ("15:16", (2, 33)),
    ("8:16", (1, 16)),
]


def state_of(temperature=0.7, logit_scale=20.0, regularization=0.0, step=4, draw=2) -> SamplingState:
    return SamplingState.of(temperature, logit_scale, regularization, step, draw)


def enumerated(theta, pattern, slope, noise=None):
    """Probabilities of all subsets by softmax, `[rows, groups, C]`, and their marginals `[rows, in]`, in float64."""
    rows, in_features = theta.shape
    groups = pattern.num_groups(in_features)
    padded = torch.nn.functional.pad(theta.double(), (0, groups * pattern.m - in_features))
    scores = padded.view(rows, groups, pattern.m) * slope
    if noise is not None:
        scores = scores + noise.transpose(1, 2)
    candidates = pattern.candidates(dtype=torch.float64)
    logits = scores @ candidates.T
    if pattern.tail(in_features):
        barred = torch.zeros_like(logits, dtype=torch.bool)
        barred[:, -1] = ~pattern.tail_candidates(in_features)
        logits = logits.masked_fill(barred, float("-inf"))
    probabilities = logits.softmax(-1)
    return probabilities, (probabilities @ candidates).flatten(1)[:, :in_features]


# --- the distribution -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_forward_and_backward_match_autograd_over_all_subsets(pattern, shape, monkeypatch):
    pattern = NMPattern(pattern)
    monkeypatch.setattr(mask_sampling_module, "_CPU_GROUPS", 1)  # a slice for each row
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theta = (0.05 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    state = state_of(regularization=0.3)
    groups = pattern.num_groups(shape[1])
    index = torch.arange(shape[0] * groups).view(shape[0], groups)
    noise = gumbel_noise(index, pattern.m, KEY, state.step, state.draw, torch.float64) / state.temperature
    outgoing = torch.randn(shape, dtype=torch.float64)

    _, mask = enumerated(theta, pattern, (state.logit_scale / state.temperature).double(), noise)
    expected = weight.detach() * mask
    penalty = -state.regularization.double() * expected.square().sum()
    (expected_grad,) = torch.autograd.grad((expected * outgoing).sum() + penalty, theta)
    result = ops.masked_weight(weight, theta, pattern, KEY, state)
    grad_weight, grad_theta = torch.autograd.grad((result * outgoing).sum(), (weight, theta))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)  # 0-dim scalars are float32
    torch.testing.assert_close(grad_theta, expected_grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_weight, outgoing * mask.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_gradients_match_finite_differences(pattern, shape):
    pattern = NMPattern(pattern)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theta = (0.1 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    state = state_of(2.0, 3.0)
    assert torch.autograd.gradcheck(
        lambda w, t: ops.masked_weight(w, t, pattern, KEY, state), (weight, theta), fast_mode=True
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:8", "8:16"])
@pytest.mark.parametrize("ties", [False, True])
def test_float32_stays_right_at_the_end_of_the_schedule(pattern, ties):
    pattern, slope = NMPattern(pattern), 1e4
    theta = 0.1 * torch.randn(4 if pattern.m == 16 else 100, 2 * pattern.m)
    if ties:
        theta = (theta * 20).round() / 20  # five values or so: most groups are undecided, some with an offset of 1000
    theta.requires_grad_()
    outgoing = torch.randn_like(theta)
    state = state_of(0.05, 500.0)
    soft = ops.soft_mask(theta.detach(), pattern, theta.shape[1], KEY, state, noise=False)
    _, expected = enumerated(theta, pattern, slope)
    # Scores of some thousands are rounded to 2^-13 or so before anything is computed.
    torch.testing.assert_close(soft.double(), expected.detach(), rtol=0, atol=2e-3)
    hard = ops.masked_weight(torch.ones_like(theta), theta, pattern, KEY, state, hard=True)
    (grad,) = torch.autograd.grad((hard * outgoing).sum(), theta)
    (expected_grad,) = torch.autograd.grad((expected * outgoing).sum(), theta)
    torch.testing.assert_close(grad / slope, expected_grad / slope, rtol=0, atol=2e-3)
    sampled = ops.masked_weight(torch.ones_like(theta), theta, pattern, KEY, state)
    (grad,) = torch.autograd.grad((sampled * outgoing).sum(), theta)
    assert sampled.isfinite().all() and grad.isfinite().all()
    assert sampled.min() >= 0 and sampled.max() < 1 + 1e-5


@pytest.mark.parametrize(
    ("pattern", "in_features", "kept"), [("2:4", 9, 1), ("4:8", 11, 3), ("4:8", 14, 4), ("8:16", 21, 5)]
)
def test_tails_keep_exactly_as_many_as_a_hard_mask(pattern, in_features, kept):
    pattern = NMPattern(pattern)
    theta = (0.1 * torch.randn(6, in_features)).requires_grad_()
    state = state_of(regularization=0.5)
    tail = slice(in_features // pattern.m * pattern.m, None)
    mask = ops.masked_weight(torch.ones_like(theta), theta, pattern, KEY, state)
    (grad,) = torch.autograd.grad((mask * torch.randn_like(mask)).sum(), theta)
    torch.testing.assert_close(mask[:, tail].sum(1), torch.full((6,), float(kept)))
    if kept == pattern.tail(in_features):
        assert mask[:, tail].eq(1).all() and grad[:, tail].eq(0).all()
    assert grad[:, : tail.start].ne(0).any()


@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_certainty_is_that_of_the_enumerated_subsets(pattern, shape):
    pattern, state = NMPattern(pattern), state_of(1.0, 30.0)
    theta = 0.1 * torch.randn(shape, dtype=torch.float64)
    probabilities, _ = enumerated(theta, pattern, 30.0)
    largest, bits, groups = ops.mask_certainty(theta, pattern, shape[1], KEY, state)
    assert groups == shape[0] * pattern.num_groups(shape[1])
    assert largest == pytest.approx(float(probabilities.amax(-1).sum()), rel=1e-6)
    assert bits == pytest.approx(float(torch.special.entr(probabilities).sum()) / math.log(2), rel=1e-6)


def test_certainty_of_candidates_is_that_of_their_softmax():
    pattern, logits = NMPattern("2:4"), 0.1 * torch.randn(3, 6, 5, dtype=torch.float64)
    probabilities = (logits * 30).softmax(1)
    largest, bits, groups = ops.mask_certainty(logits, pattern, 20, KEY, state_of(1.0, 30.0))
    assert groups == 15 and largest == pytest.approx(float(probabilities.amax(1).sum()))
    assert bits == pytest.approx(float(-(probabilities * probabilities.log2()).sum()))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_a_prior_gives_the_same_marginals_as_with_candidates(pattern):
    pattern, config = NMPattern(pattern), NMSparseConfig(pattern=pattern, prior_strength=2.5)
    weight = torch.randn(7, 3 * pattern.m + 2)
    codes = ops.mask_to_codes(ops.top_n_mask(weight.abs(), pattern), pattern)
    masks = []
    for name in ("candidates", "elementwise"):
        relaxation = get_relaxation(name)(pattern, KEY)
        parameters = relaxation.parameters(weight, config)
        relaxation.set_prior(parameters, codes, config)
        assert torch.equal(relaxation.codes(parameters, weight.shape[1]), codes)
        logits = parameters["nmsparse_logits"]
        masks.append(ops.soft_mask(logits, pattern, weight.shape[1], KEY, state_of(4.0, 100.0), noise=False))
    assert parameters["nmsparse_logits"].shape == weight.shape
    torch.testing.assert_close(masks[0], masks[1])
    assert masks[0].std() > 0.1


# --- the operation --------------------------------------------------------------------------------------------------
def test_hard_masks_are_exact_and_carry_the_noise_free_gradient():
    pattern = NMPattern("4:8")
    weight = torch.randn(6, 22, dtype=torch.float64)
    theta = (0.05 * torch.randn(6, 22, dtype=torch.float64)).requires_grad_()
    hard = ops.masked_weight(weight, theta, pattern, KEY, state_of(1.0, 30.0, 0.5), hard=True)
    assert torch.equal(hard, weight * ops.top_n_mask(theta.detach(), pattern))
    outgoing = torch.randn_like(weight)
    (grad,) = torch.autograd.grad((hard * outgoing).sum(), theta)
    _, soft = enumerated(theta, pattern, 30.0)
    (expected,) = torch.autograd.grad((weight * soft * outgoing).sum(), theta)
    torch.testing.assert_close(grad, expected)


def test_equal_logits_choose_the_lowest_positions():
    pattern = NMPattern("2:4")
    codes = ops.hard_codes(torch.zeros(2, 10), pattern, 10)
    assert codes.eq(0).all()
    assert ops.hard_codes(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), pattern, 4).tolist() == [[0]]
    assert ops.hard_codes(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), pattern, 4).tolist() == [[pattern.rank([1, 3])]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_agree_with_float64(dtype):
    pattern, shape = NMPattern("4:8"), (9, 50)
    weight, outgoing = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    theta = 0.01 * torch.randn(shape)
    results = []
    for w, t, g in ((weight, theta, outgoing), (weight.double(), theta.double(), outgoing.double())):
        t = t.clone().requires_grad_()
        masked = ops.masked_weight(w, t, pattern, KEY, state_of(2.0, 200.0, 1e-3))
        masked.backward(g)
        results.append((masked.detach().double(), t.grad.double()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2 * eps, atol=1e-4 * eps + 4e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=4e-4)


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_and_slicing_do_not_change_the_numbers(hard, monkeypatch):
    weight, outgoing, theta = torch.randn(64, 48), torch.randn(64, 48), 0.05 * torch.randn(64, 48)
    results = []
    for groups, autocast in ((1 << 16, False), (64, False), (64, True)):
        monkeypatch.setattr(mask_sampling_module, "_CPU_GROUPS", groups)
        logits = theta.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            masked = ops.masked_weight(weight, logits, NMPattern("4:8"), KEY, state_of(1.0, 100.0, 1e-3), hard)
            masked.backward(outgoing)
        results.append((masked.detach(), logits.grad))
    for masked, grad in results[1:]:
        torch.testing.assert_close(masked, results[0][0])
        torch.testing.assert_close(grad, results[0][1], rtol=0, atol=2e-4)  # of 100 |G|: vectorised ends differ


def test_nothing_but_weight_and_logits_is_saved_for_backward():
    weight, theta = torch.randn(64, 64), torch.zeros(64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        ops.masked_weight(weight, theta, NMPattern("8:16"), KEY, state_of())
    assert {tensor.data_ptr() for tensor in saved if tensor.numel() > 1} == {weight.data_ptr(), theta.data_ptr()}


# --- through PEFT and the trainer -----------------------------------------------------------------------------------
def test_patterns_with_too_many_candidates_are_sent_here(llama):
    with pytest.raises(UnsupportedError, match=r'12870.*relaxation="elementwise"'):
        get_peft_model(llama, NMSparseConfig(pattern="8:16"))
    model = get_peft_model(llama, NMSparseConfig(pattern="8:16", relaxation="elementwise"))
    layer = mask_layers(model)["model.layers.0.mlp.up_proj"]
    weight = layer.get_base_layer().weight
    assert torch.equal(layer.hard_mask("default"), ops.top_n_mask(weight.abs(), NMPattern("8:16")))


def test_a_mask_trains_saves_reloads_merges_and_is_published(make_llama, tokens, tmp_path):
    model = get_peft_model(make_llama(), NMSparseConfig(relaxation="elementwise", pattern="4:8"))
    layers = mask_layers(model)
    start = {name: layer.hard_mask("default") for name, layer in layers.items()}
    base = {n: t.clone() for n, t in model.state_dict().items() if ".nmsparse_" not in n}
    trainer = nms.NMSparseTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.02,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=TokenWindows(tokens),
    )
    trainer.train()
    line = next(line for line in reversed(trainer.state.log_history) if "nm/max_prob" in line)
    assert line["nm/flip_rate"] > 0 and 1 / 70 < line["nm/max_prob"] <= 1 and 0 <= line["nm/entropy"] < math.log2(70)
    after = model.state_dict()
    assert all(torch.equal(base[name], after[name]) for name in base)
    masks = {name: layer.hard_mask("default") for name, layer in layers.items()}
    assert any(not torch.equal(start[name], masks[name]) for name in masks)
    for name, layer in layers.items():
        logits = layer.nmsparse_logits["default"].weight
        assert logits.shape == layer.get_base_layer().weight.shape and logits.dtype == torch.float32
        assert torch.equal(masks[name], ops.top_n_mask(logits.detach(), NMPattern("4:8")))

    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.mlp.up_proj.nmsparse_logits.weight"].shape == (48, 32)
    nms.save_mask(model, tmp_path / "mask")
    reloaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    published = nms.load_mask(make_llama(), tmp_path / "mask")
    merged = reloaded.merge_and_unload()
    with torch.no_grad():
        for other in (merged, published):
            assert torch.equal(other.eval()(tokens).logits, expected)
    for name, mask in masks.items():
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight, layers[name].get_base_layer().weight * mask)
        assert torch.equal(
            mask_layers(published)[name].hard_mask(mask_layers(published)[name].active_adapters[0]), mask
        )
