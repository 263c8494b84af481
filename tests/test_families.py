# SPDX-License-Identifier: Apache-2.0
"""Every family of models walks the whole line: config, training, checkpoint, published mask, merge, packed model."""

import pytest
import torch
from families import FAMILIES, inputs_for
from peft import PeftModel, get_peft_model

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig, SparseLinear24, ops
from hf_nmsparse.adapter import NMSparseLinear, ParamWrapper, base_weights, mask_layers

# Linear weights of one block that get a mask, and fused expert weights.
EXPECTED = {
    "llama": (14, 0),
    "qwen3": (14, 0),
    "gemma3": (14, 0),
    "mistral": (14, 0),
    "opt": (12, 0),
    "gpt2": (8, 0),
    "bert": (12, 0),
    "vit": (12, 0),
    "t5": (2 * 7 + 2 * 11, 0),
    "whisper": (2 * 6 + 2 * 10, 0),
    "gemma3_vision": (14, 0),  # of the text; the vision tower stays dense
    "mixtral": (8, 4),
    "qwen3_moe": (8, 4),
}


def logits_of(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(family)).logits


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(family: str, **config) -> PeftModel:
    """A model whose masks have left their prior."""
    model = get_peft_model(FAMILIES[family](), NMSparseConfig(**config))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    torch.manual_seed(2)  # dropout
    model.train()
    for step in range(2):
        nms.set_mask_step(model, step, 2)
        model(**inputs_for(family)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


def test_masks_go_on_the_linear_layers_and_experts_of_the_blocks(family):
    layers = mask_layers(get_peft_model(FAMILIES[family](), NMSparseConfig()))
    linear = [layer for layer in layers.values() if isinstance(layer, NMSparseLinear)]
    experts = [layer for layer in layers.values() if isinstance(layer, ParamWrapper)]
    assert (len(linear), len(experts)) == EXPECTED[family]


def test_training_leaves_the_base_bit_equal_and_moves_masks(family):
    before = state_of(FAMILIES[family]())
    prior = get_peft_model(FAMILIES[family](), NMSparseConfig())
    model = trained(family)
    after = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    pairs = zip(mask_layers(prior).values(), mask_layers(model).values(), strict=True)
    assert any(not torch.equal(a.mask_codes("default"), b.mask_codes("default")) for a, b in pairs)


def test_a_checkpoint_reloads_to_the_same_output(family, tmp_path):
    model = trained(family)
    model.save_pretrained(tmp_path)
    expected = logits_of(model, family)
    again = PeftModel.from_pretrained(FAMILIES[family](), tmp_path).eval()
    assert torch.equal(logits_of(again, family), expected)
    low = PeftModel.from_pretrained(FAMILIES[family](), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits_of(low, family), expected)


def test_a_published_mask_reloads_to_the_same_output(family, tmp_path):
    model = trained(family)
    nms.save_mask(model, tmp_path)
    expected = logits_of(model, family)
    assert torch.equal(logits_of(nms.load_mask(FAMILIES[family](), tmp_path), family), expected)
    assert torch.equal(logits_of(PeftModel.from_pretrained(FAMILIES[family](), tmp_path), family), expected)


def test_merging_keeps_n_of_m_along_the_inputs_and_the_output(family):
    model = trained(family)
    names = list(mask_layers(model))
    expected = logits_of(model, family)
    base = base_weights(FAMILIES[family]())
    merged = model.merge_and_unload()
    assert torch.allclose(logits_of(merged, family), expected, atol=1e-5)
    weights = base_weights(merged)
    for name in names:
        weight = weights[name].read()
        counts = ops.count_groups(weight, NMPattern("2:4"))
        assert counts.over == 0 and counts.under == 0, name
        kept = weight != 0
        assert torch.equal(weight[kept], base[name].read()[kept])


def test_verify_counts_merged_models_in_memory_and_on_disk_along_the_inputs(family, tmp_path):
    model = trained(family)
    linear = [name for name, layer in mask_layers(model).items() if isinstance(layer, NMSparseLinear)]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    report, on_disk = nms.verify(merged), nms.verify(tmp_path)
    assert report.ok and set(linear) <= set(report.layers)
    assert on_disk.ok and len(on_disk.layers) >= len(linear)  # some architectures use other names on disk


def test_unmerging_restores_the_base_bit_for_bit(family):
    before = state_of(FAMILIES[family]())
    model = trained(family)
    expected = logits_of(model, family)
    model.merge_adapter()
    model.unmerge_adapter()
    after = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits_of(model, family), expected)


def test_unloading_gives_the_base_back(family):
    before = state_of(FAMILIES[family]())
    after = trained(family).unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_packed_model_reloads_to_the_same_output(family, tmp_path):
    model = trained(family)
    expected = logits_of(model, family)
    linear = {name for name, layer in mask_layers(model).items() if isinstance(layer, NMSparseLinear)}
    packed = nms.compress(model)
    assert {name for name, module in packed.named_modules() if isinstance(module, SparseLinear24)} == linear
    assert torch.allclose(logits_of(packed, family), expected, atol=1e-5)
    packed.save_pretrained(tmp_path)
    again = type(packed).from_pretrained(tmp_path).eval()
    assert {name for name, module in again.named_modules() if isinstance(module, SparseLinear24)} == linear
    assert torch.equal(logits_of(again, family), logits_of(packed, family))


def test_decompressing_gives_the_merged_weights(family):
    merged = trained(family).merge_and_unload().state_dict()
    plain = nms.decompress(nms.compress(trained(family))).state_dict()
    assert plain.keys() == merged.keys()
    assert all(torch.equal(plain[name], value) for name, value in merged.items())


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "polish"])
def test_priors_of_every_criterion(family, criterion):
    model = get_peft_model(FAMILIES[family](), NMSparseConfig(prior=None))
    nms.set_prior(model, criterion, calibration=[inputs_for(family)], progress=False)
    pruned = FAMILIES[family]()
    nms.prune(pruned, criterion, calibration=[inputs_for(family)], progress=False)
    weights = base_weights(pruned)
    for name, layer in mask_layers(model).items():
        assert torch.equal(layer.hard_weight(["default"]), weights[name].read()), name


def through_load_mask(family, base, mask):
    return nms.compress(nms.load_mask(type(FAMILIES[family]()).from_pretrained(base), mask))


def through_peft(family, base, mask):
    return nms.compress(PeftModel.from_pretrained(type(FAMILIES[family]()).from_pretrained(base), mask))


def through_load_adapter(family, base, mask):
    model = type(FAMILIES[family]()).from_pretrained(base)
    model.load_adapter(mask)
    return nms.compress(model)


def through_packed_config(family, base, mask):
    config = nms.PackedConfig(mask=str(mask))
    return type(FAMILIES[family]()).from_pretrained(base, quantization_config=config)


@pytest.mark.parametrize("terms", [{}, {"slorb_block": 8, "low_rank": 2, "delta_rank": 2}, {"delta_rank": 2}])
def test_every_door_leads_to_the_same_packed_weights_and_logits(family, tmp_path, terms):
    if "slorb_block" in terms and EXPECTED[family][1]:
        terms = {**terms, "target_parameters": []}  # experts take no side branch
    base, mask = tmp_path / "base", tmp_path / "mask"
    FAMILIES[family]().save_pretrained(base)
    model = trained(family, **terms)
    nms.save_mask(model, mask)
    first = through_load_mask(family, base, mask)
    expected, state = logits_of(first, family), first.state_dict()
    assert torch.allclose(logits_of(nms.load_mask(FAMILIES[family](), mask), family), expected, atol=1e-5)
    for door in (through_peft, through_load_adapter, through_packed_config):
        model = door(family, base, mask).eval()
        other = model.state_dict()
        assert other.keys() == state.keys(), door.__name__
        assert all(torch.equal(other[name], value) for name, value in state.items()), door.__name__
        assert torch.equal(logits_of(model, family), expected), door.__name__
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits_of(again, family), expected)
