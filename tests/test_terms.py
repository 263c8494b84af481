# SPDX-License-Identifier: Apache-2.0
"""Terms beside the mask (SLoRB, low rank) and under it (delta): values, merging, files, packing."""

import warnings

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, SparseLinear24, ops
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.adapter.terms import DAMPING, fit_low_rank, fit_slorb, slorb_of_residual
from hf_nmsparse.errors import ConfigError, FormatError, UnsupportedError

TERMS = {
    "slorb": {"slorb_block": 5},
    "slorb sum": {"slorb_block": 8, "slorb_init": "sum"},
    "slorb closed form": {"slorb_block": 8, "slorb_init": "closed_form"},
    "slorb projection": {"slorb_block": 8, "slorb_train_projection": True},
    "low rank": {"low_rank": 3},
    "delta": {"delta_rank": 3},
    "all": {"slorb_block": 8, "low_rank": 2, "delta_rank": 2},
}
SIDE = sorted(set(TERMS) - {"delta"})


@pytest.fixture(params=sorted(TERMS))
def terms(request) -> dict:
    return TERMS[request.param]


def randomised(model) -> PeftModel:
    """Arbitrary values in every tensor of the adapter, so that no term is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nmsparse_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def with_terms(model, **config) -> PeftModel:
    return randomised(get_peft_model(model, NMSparseConfig(**config)))


def layer_problem(out_features=12, in_features=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(200, in_features, generator=generator) @ torch.randn(in_features, in_features, generator=generator)
    mask = ops.top_n_mask(weight.abs(), NMPattern("2:4"))
    return weight, torch.where(mask, 0, -weight), (x.t() @ x / len(x))


def error(residual: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((residual.double() @ hessian.double()) * residual.double()).sum())


# --- values at the start ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["low rank", "delta", "slorb closed form"])
def test_a_fresh_term_changes_nothing(make_llama, tokens, name):
    plain = get_peft_model(make_llama(), NMSparseConfig()).eval()
    model = get_peft_model(make_llama(), NMSparseConfig(**TERMS[name])).eval()
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_mean_is_the_least_squares_slorb_also_in_a_short_last_block():
    _, residual, _ = layer_problem()
    white = torch.eye(residual.shape[1])
    mean = slorb_of_residual(residual, 5, "mean")
    best = fit_slorb(residual, white, 5)
    assert mean.shape == (12, 5)
    assert torch.allclose(mean, best, atol=10 * DAMPING)
    total = slorb_of_residual(residual, 5, "sum")
    assert torch.allclose(total[:, :4], 5 * mean[:, :4], atol=1e-6) and torch.allclose(total[:, 4], 2 * mean[:, 4])


def test_slorb_starts_from_what_the_prior_prunes_and_follows_a_new_prior(llama, tokens):
    model = get_peft_model(llama, NMSparseConfig(slorb_block=8))

    def check():
        for layer in mask_layers(model).values():
            removed = layer.base_weight.read().masked_fill(layer.hard_mask("default"), 0)
            expected = removed.unflatten(1, (-1, 8)).mean(2)
            assert torch.allclose(layer.nmsparse_slorb["default"].weight, expected, atol=1e-6)

    check()
    before = mask_layers(model)["model.layers.0.mlp.up_proj"].nmsparse_slorb["default"].weight.clone()
    nms.set_prior(model, "wanda", calibration=tokens, progress=False)
    check()
    assert not torch.equal(mask_layers(model)["model.layers.0.mlp.up_proj"].nmsparse_slorb["default"].weight, before)


# --- closed forms -------------------------------------------------------------------------------------------------------
def test_the_closed_form_slorb_has_the_least_output_error():
    _, residual, hessian = layer_problem()
    best = fit_slorb(residual, hessian, 5)

    def error_of(slorb):
        return error(residual + ops.SideBranch(slorb=slorb, slorb_block=5).dense(residual.shape[1]), hessian)

    least = error_of(best)
    assert least < 0.95 * error(residual, hessian)
    assert least < error_of(slorb_of_residual(residual, 5, "mean"))
    for seed in range(5):
        step = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))
        assert error_of(best + 0.05 * step) > least


@pytest.mark.parametrize("rank", [1, 4, 12, 30])
def test_the_closed_form_low_rank_term_has_the_least_output_error(rank):
    _, residual, hessian = layer_problem()
    a, b = fit_low_rank(residual, hessian, rank)
    assert a.shape == (rank, 22) and b.shape == (12, rank)
    # Eckart-Young: what is left are the smallest eigenvalues of D H D^T.
    eigenvalues = torch.linalg.eigvalsh(residual.double() @ hessian.double() @ residual.double().t())
    left = float(eigenvalues[: max(0, 12 - rank)].sum())
    assert error(residual + b @ a, hessian) == pytest.approx(left, rel=1e-4, abs=1e-3)


def test_a_rank_deficient_hessian_gives_finite_terms():
    _, residual, hessian = layer_problem()
    hessian[:, 5:15] = 0
    hessian[5:15] = 0
    assert fit_slorb(residual, hessian, 5).isfinite().all()
    assert fit_slorb(residual, torch.zeros_like(hessian), 5).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in fit_low_rank(torch.zeros_like(residual), hessian, 3))


@pytest.mark.parametrize("name", SIDE)
def test_fitting_lowers_the_error_of_every_layer_and_of_the_logits(make_llama, tokens, name):
    dense = make_llama()(tokens).logits
    config = NMSparseConfig(**{**TERMS[name], "prior": None, "delta_rank": None})
    model = get_peft_model(make_llama(), config).eval()
    nms.set_prior(model, "polish", calibration=tokens, progress=False)
    masks = {key: layer.hard_mask("default") for key, layer in mask_layers(model).items()}
    without = get_peft_model(make_llama(), NMSparseConfig(prior=None)).eval()
    nms.set_prior(without, masks)
    report = nms.fit_side_branch(model, calibration=tokens, progress=False)
    assert [fit.name for fit in report] == list(masks)
    assert all(fit.error_with < fit.error_without for fit in report)
    for key, layer in mask_layers(model).items():
        assert torch.equal(layer.hard_mask("default"), masks[key])
    assert (model(tokens).logits - dense).square().mean() < (without(tokens).logits - dense).square().mean()


def test_fitting_needs_a_side_branch_that_can_change(llama, tokens, tmp_path):
    model = get_peft_model(llama, NMSparseConfig(delta_rank=2))
    with pytest.raises(ConfigError, match="no side branch"):
        nms.fit_side_branch(model, calibration=tokens)
    model = get_peft_model(model.unload(), NMSparseConfig(low_rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        nms.fit_side_branch(model, calibration=tokens)


# --- training ------------------------------------------------------------------------------------------------------------
def test_every_term_trains_beside_the_mask_and_the_base_stays(make_llama, tokens, terms):
    base = make_llama().state_dict()
    model = get_peft_model(make_llama(), NMSparseConfig(**terms))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(2):  # the first step moves B, the second A
        nms.set_mask_step(model, step, 2)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unmoved = [name for name, p in model.named_parameters() if name in before and torch.equal(before[name], p)]
    assert not unmoved
    after = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in base.items())


# --- merging -------------------------------------------------------------------------------------------------------------
def test_a_delta_merges_to_exactly_n_of_m(make_llama, tokens):
    model = with_terms(make_llama(), delta_rank=4)
    expected = model(tokens).logits
    layers = mask_layers(model)
    masks = {name: layer.hard_mask("default") for name, layer in layers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert torch.equal(merged(tokens).logits, expected)
    for name, mask in masks.items():
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight[mask], make_llama().get_submodule(name).weight[mask])


@pytest.mark.parametrize("name", SIDE)
def test_merging_a_side_branch_gives_the_function_dense_and_one_warning(make_llama, tokens, name):
    model = with_terms(make_llama(), **TERMS[name])
    expected = model(tokens).logits
    with pytest.warns(UserWarning, match="merged weights are dense") as caught:
        merged = model.merge_and_unload()
    assert len([one for one in caught if "dense" in str(one.message)]) == 1
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)
    assert all(type(merged.get_submodule(layer)) is torch.nn.Linear for layer in ["model.layers.0.mlp.up_proj"])
    assert (merged.model.layers[0].mlp.up_proj.weight != 0).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore:adapter default has a term")
def test_unmerging_restores_base_and_output(make_llama, tokens, terms):
    base = make_llama().state_dict()
    model = with_terms(make_llama(), **terms)
    expected = model(tokens).logits
    model.merge_adapter()
    model.unmerge_adapter()
    after = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:adapter .* a term")
def test_several_adapters_compute_masks_before_branches_and_merge_as_they_compute(make_llama, tokens):
    model = get_peft_model(make_llama(), NMSparseConfig(slorb_block=8, delta_rank=2))
    model.add_adapter("other", NMSparseConfig(low_rank=2, delta_rank=3, slorb_block=8, seed=3))
    randomised(model)
    model.base_model.set_adapter(["default", "other"])
    expected = model(tokens).logits
    layer = mask_layers(model)["model.layers.0.mlp.up_proj"]
    base = layer.base_weight.read()
    deltas = [
        layer.nmsparse_delta_b[name].weight @ layer.nmsparse_delta_a[name].weight for name in ("default", "other")
    ]
    both = layer.hard_mask("default") & layer.hard_mask("other")
    branch = layer.side_branch(["default", "other"]).dense(layer.in_features)
    x = torch.randn(3, layer.in_features)
    by_hand = x @ ((base + deltas[0] + deltas[1]) * both + branch).t()
    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)


def test_safe_merge_refuses_broken_terms_before_anything_is_merged(llama, tokens):
    model = with_terms(llama, slorb_block=8)
    base = {name: layer.base_weight.read().clone() for name, layer in mask_layers(model).items()}
    last = list(mask_layers(model).values())[-1]
    with torch.no_grad():
        last.nmsparse_slorb["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(layer.base_weight.read(), base[name]) for name, layer in mask_layers(model).items())


def test_stock_lora_over_a_mask_computes_and_is_refused_at_merge(make_llama, tokens):
    masked = inject_adapter_in_model(NMSparseConfig(init_weights=False), make_llama(), "mask")
    model = get_peft_model(masked, LoraConfig(target_modules=["up_proj"], init_lora_weights=False), "lora").eval()
    expected = model(tokens).logits
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError, match=r"up_proj: merging this Linear.*below the mask.*delta_rank"):
            merge()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens).logits, expected)


def test_stock_lora_alone_still_merges(make_llama, tokens):
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["up_proj"], init_lora_weights=False)).eval()
    expected = model(tokens).logits
    assert torch.allclose(model.merge_and_unload()(tokens).logits, expected, atol=1e-5)


# --- files -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_and_a_published_mask_hold_the_terms(make_llama, tokens, terms, dtype, tmp_path):
    model = with_terms(make_llama(dtype), **terms)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "checkpoint")
    again = PeftModel.from_pretrained(make_llama(dtype), tmp_path / "checkpoint").eval()
    assert torch.equal(again(tokens).logits, expected)
    nms.save_mask(model, tmp_path / "mask")
    stored = load_file(tmp_path / "mask" / "adapter_model.safetensors")
    assert all(value.dtype in (torch.uint8, dtype) for value in stored.values())
    through_load_mask = nms.load_mask(make_llama(dtype), tmp_path / "mask")(tokens).logits
    through_peft = PeftModel.from_pretrained(make_llama(dtype), tmp_path / "mask")(tokens).logits
    plain = make_llama(dtype)
    plain.load_adapter(tmp_path / "mask")
    assert torch.equal(through_load_mask, through_peft) and torch.equal(plain(tokens).logits, through_peft)
    if (
        dtype == torch.float32 or "delta_rank" not in terms
    ):  # else stored factors are rounded before they are multiplied
        assert torch.equal(through_peft, expected)


def test_damaged_terms_are_refused(make_llama, tokens, tmp_path):
    nms.save_mask(with_terms(make_llama(), slorb_block=8), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    sound = load_file(path)
    key = next(name for name in sound if name.endswith("nmsparse_slorb.weight"))
    for change, message in (
        ({key: sound[key][:, :1].clone()}, "shape"),
        ({key: sound[key] * float("nan")}, "finite"),
        ({key: torch.zeros(sound[key].shape, dtype=torch.int32)}, "finite floats"),
        ({"base_model.model.model.layers.0.mlp.up_proj.nmsparse_low_rank_a.weight": sound[key].clone()}, "unexpected"),
    ):
        save_file({**sound, **change}, path)
        with pytest.raises(FormatError, match=message):
            nms.load_mask(make_llama(), tmp_path)
    save_file({name: value for name, value in sound.items() if name != key}, path)
    with pytest.raises(FormatError, match="nothing"):
        nms.load_mask(make_llama(), tmp_path)


# --- packing -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_keeps_the_side_branch_live(make_llama, tokens, terms, dtype, tmp_path):
    terms = {**terms, "slorb_block": 8} if "slorb_block" in terms else terms
    model = with_terms(make_llama(dtype), **terms)
    expected = model(tokens).logits
    packed = nms.compress(model)
    layer = packed.model.layers[0].mlp.up_proj
    assert isinstance(layer, SparseLinear24)
    assert torch.equal(packed(tokens).logits, expected)
    packed.save_pretrained(tmp_path)
    again = type(packed).from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:adapter default has a term")
def test_compressing_after_merging_still_separates_the_branch(make_llama, tokens):
    model = with_terms(make_llama(), slorb_block=8, delta_rank=2)
    expected = model(tokens).logits
    model.merge_adapter()
    packed = nms.compress(model)
    assert torch.allclose(packed(tokens).logits, expected, atol=1e-6)
    assert isinstance(packed.model.layers[0].mlp.up_proj, SparseLinear24)


def test_decompressing_folds_the_branch_in(make_llama, tokens):
    model = with_terms(make_llama(), low_rank=2)
    expected = model(tokens).logits
    plain = nms.decompress(nms.compress(model))
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.allclose(plain(tokens).logits, expected, atol=1e-5)


# --- experts ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_take_a_delta_each_and_no_side_branch(family, tmp_path):
    model = with_terms(FAMILIES[family](), delta_rank=2)
    expected = model(**inputs_for(family)).logits
    layer = next(layer for name, layer in mask_layers(model).items() if name.endswith("gate_up_proj"))
    assert layer.nmsparse_delta_a["default"].weight.shape == (4, 2, 32)
    nms.save_mask(model, tmp_path)
    assert torch.equal(nms.load_mask(FAMILIES[family](), tmp_path)(**inputs_for(family)).logits, expected)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(**inputs_for(family)).logits, expected, atol=1e-5)
    experts = merged.model.layers[0].mlp.experts
    assert ops.count_groups(experts.gate_up_proj.flatten(0, 1), NMPattern("2:4")).follows
    plain = FAMILIES[family]()
    before = set(dict(plain.named_modules()))
    with pytest.raises(UnsupportedError, match=r"target_parameters=\[\]"):
        get_peft_model(plain, NMSparseConfig(low_rank=2))
    assert set(dict(plain.named_modules())) == before
    get_peft_model(plain, NMSparseConfig(low_rank=2, target_parameters=[]))


# --- config -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slorb_block": 0}, "slorb_block=0"),
        ({"low_rank": True}, "low_rank=True"),
        ({"delta_rank": 2.0}, "delta_rank=2.0"),
        ({"slorb_init": "random"}, "slorb_init='random'"),
        ({"slorb_train_projection": True}, "needs slorb_block"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list"),
    ],
)
def test_bad_fields_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        NMSparseConfig(**change)
