# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from hf_nmsparse import NMPattern, ops
from hf_nmsparse.ops import NoiseKey, SamplingState
from hf_nmsparse.ops import mask_sampling as mask_sampling_module
from hf_nmsparse.ops.philox import gumbel_noise, philox4x32

KEY = NoiseKey.for_layer(3, "model.layers.0.mlp.up_proj")


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


def scalar_philox(key: tuple[int, int], counter: list[int], rounds: int) -> list[int]:
    """The published algorithm in Python integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # known answers of Random123's kat_vectors for philox4x32 with 10 rounds
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(key, counter, expected):
    result = philox4x32(NoiseKey(*key), words(*counter), rounds=10)
    assert tuple(int(word) for word in result) == expected


def test_seven_rounds_equal_plain_integer_arithmetic():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (50, 4), generator=generator)
    result = philox4x32(NoiseKey(123456789, 3987654321), tuple(counters.unbind(1)))
    for row, counter in zip(torch.stack(result, 1).tolist(), counters.tolist(), strict=True):
        assert row == scalar_philox((123456789, 3987654321), counter, 7)


def test_golden_noise_of_contract_10():
    """Frozen: kernels and restarted runs must see these numbers."""
    groups = torch.tensor([[0, 1], [2**32 + 5, 7]])
    noise = gumbel_noise(groups, 7, NoiseKey(1, 2), torch.tensor(3), torch.tensor(4), torch.float64)
    for row in range(2):
        for column in range(2):
            group = int(groups[row, column])
            bits = []
            for block in range(2):
                a, b, c, d = scalar_philox((1, 2), [group % 2**32, block + (group >> 32 << 16), 3, 4], 7)
                bits += [a >> 11, b >> 11, c >> 11, d >> 11]
                bits += [a & 0x7FF | (b & 0x3FF) << 11, c & 0x7FF | (d & 0x3FF) << 11]
            for candidate in range(7):
                uniform = (bits[candidate] + 0.5) / 2**21
                assert noise[row, candidate, column] == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_noise_is_gumbel_distributed_and_finite():
    groups = torch.arange(40_000).view(1, -1)
    noise = gumbel_noise(groups, 6, KEY, torch.tensor(0), torch.tensor(0))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    correlation = torch.corrcoef(noise[0])
    assert (correlation - torch.eye(6)).abs().max() < 0.03


def test_noise_differs_by_seed_layer_step_and_draw_only():
    groups = torch.arange(64).view(2, 32)

    def draw(seed=0, layer="a", step=0, draw=0):
        return gumbel_noise(groups, 6, NoiseKey.for_layer(seed, layer), torch.tensor(step), torch.tensor(draw))

    reference = draw()
    torch.randn(10)  # the default generator has no say
    assert torch.equal(draw(), reference)
    for other in (draw(seed=1), draw(layer="b"), draw(step=1), draw(draw=1)):
        assert not torch.equal(other, reference)


def naive(weight, logits, pattern, state, noise, regularization=True):
    """The formulas of the paper, through autograd, with everything materialised."""
    scores = (logits * state.logit_scale + noise) / state.temperature
    if pattern.tail(weight.shape[1]):
        scores = scores.clone()
        scores[:, ~pattern.tail_candidates(weight.shape[1]), -1] = float("-inf")
    probabilities = scores.softmax(1)
    mask = torch.einsum("rcg,cm->rgm", probabilities, pattern.candidates(dtype=weight.dtype)).flatten(1)
    masked = weight * mask[:, : weight.shape[1]]
    return masked, -state.regularization.to(weight.dtype) * masked.square().sum()


CASES = [
    ("2:4", (3, 12)),
    ("2:4", (5, 10)),
    ("1:4", (2, 7)),
    ("3:4", (4, 9)),
    ("2:3", (3, 3)),
    ("2:8", (2, 19)),
    ("4:8", (3, 10)),
]


@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_forward_and_backward_match_autograd_in_float64(pattern, shape, monkeypatch):
    pattern = NMPattern(pattern)
    monkeypatch.setattr(mask_sampling_module, "_CPU_GROUPS", 2 * pattern.num_groups(shape[1]))  # several slices
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    groups = pattern.num_groups(shape[1])
    logits = (0.05 * torch.randn(shape[0], pattern.num_candidates, groups, dtype=torch.float64)).requires_grad_()
    state = SamplingState.of(temperature=0.7, logit_scale=20.0, regularization=0.3, step=4, draw=2)
    index = torch.arange(shape[0] * groups).view(shape[0], groups)
    noise = gumbel_noise(index, pattern.num_candidates, KEY, state.step, state.draw, torch.float64)
    outgoing = torch.randn(shape, dtype=torch.float64)

    expected, penalty = naive(weight.detach(), logits, pattern, state, noise)
    (expected_grad,) = torch.autograd.grad((expected * outgoing).sum() + penalty, logits)
    result = ops.masked_weight(weight, logits, pattern, KEY, state)
    grad_weight, grad_logits = torch.autograd.grad((result * outgoing).sum(), (weight, logits))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)  # 0-dim scalars are float32
    torch.testing.assert_close(grad_logits, expected_grad, rtol=1e-6, atol=1e-9)
    soft = ops.soft_mask(logits.detach(), pattern, shape[1], KEY, state)
    torch.testing.assert_close(grad_weight, outgoing * soft)


@pytest.mark.parametrize(("pattern", "shape"), CASES[:5])  # the wider ones are checked against autograd
def test_gradients_match_finite_differences(pattern, shape):
    pattern = NMPattern(pattern)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    logits = 0.1 * torch.randn(shape[0], pattern.num_candidates, pattern.num_groups(shape[1]), dtype=torch.float64)
    state = SamplingState.of(2.0, 3.0, 0.0, step=5, draw=1)
    assert torch.autograd.gradcheck(
        lambda w, theta: ops.masked_weight(w, theta, pattern, KEY, state), (weight, logits.requires_grad_())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_agree_with_float64(dtype):
    pattern, shape = NMPattern("2:4"), (9, 50)
    weight = torch.randn(shape).to(dtype)
    logits = 0.01 * torch.randn(9, 6, 13)
    outgoing = torch.randn(shape).to(dtype)
    state = SamplingState.of(2.0, 200.0, 1e-3, step=1)
    results = []
    for w, theta, g in ((weight, logits, outgoing), (weight.double(), logits.double(), outgoing.double())):
        theta = theta.clone().requires_grad_()
        masked = ops.masked_weight(w, theta, pattern, KEY, state)
        masked.backward(g)
        results.append((masked.detach().double(), theta.grad.double()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2 * eps, atol=1e-4 * eps + 2e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=2e-4)


def test_hard_masks_are_exact_and_carry_the_noise_free_gradient():
    pattern = NMPattern("2:4")
    weight = torch.randn(6, 22, dtype=torch.float64)
    logits = (0.05 * torch.randn(6, 6, 6, dtype=torch.float64)).requires_grad_()
    state = SamplingState.of(1.0, 30.0, 0.5)
    hard = ops.masked_weight(weight, logits, pattern, KEY, state, hard=True)
    counts = ops.count_groups(hard.detach() != 0, pattern)
    assert counts.over == counts.under == 0
    assert torch.equal(hard[hard != 0], weight[hard != 0])
    outgoing = torch.randn_like(weight)
    (grad,) = torch.autograd.grad((hard * outgoing).sum(), logits)
    soft, _ = naive(weight, logits, pattern, state, torch.zeros_like(logits))
    (expected,) = torch.autograd.grad((soft * outgoing).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_equal_logits_choose_the_lowest_code_everywhere():
    pattern = NMPattern("2:4")
    assert ops.hard_codes(torch.zeros(3, 6, 4), pattern, 16).eq(0).all()
    logits = torch.zeros(1, 6, 2)
    logits[0, 3:, 0] = 1.0
    assert ops.hard_codes(logits, pattern, 8).tolist() == [[3, 0]]
    logits = torch.zeros(1, 6, 2)
    logits[0, 5, 1] = 1.0  # would keep a padded position of the tail of three
    logits[0, 1, 1] = logits[0, 3, 1] = 0.5
    assert ops.hard_codes(logits, pattern, 7).tolist() == [[0, 1]]


def test_infinite_base_weights_stay_finite_where_pruned():
    weight = torch.full((1, 4), float("inf"))
    logits = torch.zeros(1, 6, 1)
    hard = ops.masked_weight(weight, logits, NMPattern("2:4"), KEY, SamplingState.of(1.0, 1.0), hard=True)
    assert hard.tolist() == [[float("inf"), float("inf"), 0.0, 0.0]]


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_and_slicing_do_not_change_the_numbers(hard, monkeypatch):
    weight, outgoing = torch.randn(64, 48), torch.randn(64, 48)
    logits = 0.05 * torch.randn(64, 6, 12)
    state = SamplingState.of(1.0, 100.0, 1e-3, step=1)
    results = []
    for groups, autocast in ((1 << 16, False), (64, False), (64, True)):
        monkeypatch.setattr(mask_sampling_module, "_CPU_GROUPS", groups)
        theta = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            masked = ops.masked_weight(weight, theta, NMPattern("2:4"), KEY, state, hard)
            masked.backward(outgoing)
        results.append((masked.detach(), theta.grad))
    for masked, grad in results[1:]:
        torch.testing.assert_close(masked, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_nothing_of_candidate_size_is_saved_for_backward():
    weight = torch.randn(64, 64)
    logits = torch.zeros(64, 6, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        ops.masked_weight(weight, logits, NMPattern("2:4"), KEY, SamplingState.of(4.0, 100.0))
    kept = {tensor.data_ptr() for tensor in saved if tensor.numel() > 1}
    assert kept == {weight.data_ptr(), logits.data_ptr()}


def test_annealed_logits_stay_finite_at_the_end_of_the_schedule():
    logits = (3 * torch.randn(8, 6, 8)).requires_grad_()
    weight = torch.randn(8, 32)
    masked = ops.masked_weight(weight, logits, NMPattern("2:4"), KEY, SamplingState.of(0.05, 500.0, 1e-5))
    masked.sum().backward()
    assert masked.isfinite().all() and logits.grad.isfinite().all()


def test_top_n_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0, 5.0, 5.0, 5.0]])
    assert ops.top_n_mask(scores, NMPattern("2:4")).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "8:16"])
def test_top_n_matches_a_stable_sort(pattern):
    pattern = NMPattern(pattern)
    scores = torch.randint(0, 4, (50, 3 * pattern.m + 1)).float()
    padded = F.pad(scores, (0, -scores.shape[1] % pattern.m), value=float("-inf")).unflatten(1, (-1, pattern.m))
    order = padded.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.n]
    expected = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, order, True).flatten(1)[:, : scores.shape[1]]
    assert torch.equal(ops.top_n_mask(scores, pattern), expected)
