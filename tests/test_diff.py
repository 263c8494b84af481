# SPDX-License-Identifier: Apache-2.0
"""Comparing masks, and what the command line says of deltas."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import facts, run
from local_hub import as_the_hub
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMPattern, NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.hub import Difference

LAYER = "model.layers.1.mlp.down_proj"


def changed(model, share: float, layers=None, seed: int = 3):
    """Other candidates in a share of the whole groups."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in mask_layers(model).items():
        if layers is None or name in layers:
            pattern, codes = layer.relaxations["default"].pattern, layer.mask_codes("default")
            where = torch.rand(codes.shape, generator=generator) < share
            where[:, layer.in_features // pattern.m :] = False
            others = torch.randint(1, pattern.num_candidates, codes.shape, generator=generator)
            layer.set_prior_codes("default", torch.where(where, (codes + others) % pattern.num_candidates, codes))
    return model


@pytest.fixture
def make_masked(base_folder):
    def build(share: float = 0.0, layers=None, **config):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        return changed(get_peft_model(base, NMSparseConfig(**config)), share, layers)

    return build


def masks_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}


# --- diff_masks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
def test_counts_are_those_of_the_masks_themselves(make_masked, tmp_path, pattern):
    models = {"a": make_masked(pattern=pattern), "b": make_masked(0.2, pattern=pattern)}
    folders = {name: nms.save_mask(model, tmp_path / name) for name, model in models.items()}
    found = nms.diff_masks(folders["a"], folders["b"])
    one, other = (masks_of(model) for model in models.values())
    m = NMPattern(pattern).m
    assert list(found.layers) == sorted(one) and len(found.layers) == 14
    for name, difference in found.layers.items():
        a, b = one[name], other[name]
        assert difference.groups == a.numel() // m
        assert difference.changed == int((a != b).unflatten(1, (-1, m)).any(-1).sum())
        assert (difference.kept, difference.common) == (int(a.sum()), int((a & b).sum()))
        assert difference.jaccard == pytest.approx(int((a & b).sum()) / int((a | b).sum()))
    assert 0.15 < found.total.changed_share < 0.25
    assert found.total == sum(found.by_kind.values(), Difference())
    assert found.total == sum(found.by_block.values(), Difference())


def test_it_says_where_by_kind_block_and_layer(make_masked, tmp_path):
    folders = [nms.save_mask(make_masked(0.3, layers), tmp_path / str(len(layers))) for layers in ([], [LAYER])]
    found = nms.diff_masks(*folders)
    assert {name for name, part in found.by_kind.items() if part.changed} == {"down_proj"}
    assert list(found.by_block) == ["model.layers.0", "model.layers.1"]
    assert [part.changed > 0 for part in found.by_block.values()] == [False, True]
    assert found.most_changed(1)[0][0] == LAYER
    assert found.by_block["model.layers.0"].overlap == found.by_block["model.layers.0"].jaccard == 1


def test_independent_masks_differ_as_chance_says(llama, make_llama, tmp_path):
    folders = []
    for seed in (1, 2):
        model = get_peft_model(make_llama(hidden_size=64), NMSparseConfig(init_weights=False, seed=seed))
        folders.append(nms.save_mask(model, tmp_path / str(seed)))
    found = nms.diff_masks(*folders)
    assert found.chance == {"changed_share": 5 / 6, "overlap": 0.5, "jaccard": 1 / 3}
    for name, expected in found.chance.items():
        assert getattr(found.total, name) == pytest.approx(expected, rel=0.05)


def test_blocks_are_in_the_order_of_depth(make_llama, tmp_path):
    config = NMSparseConfig(target_modules=["q_proj"])
    mask = nms.read_mask(nms.save_mask(get_peft_model(make_llama(num_hidden_layers=12), config), tmp_path))
    assert list(nms.diff_masks(mask, mask).by_block) == [f"model.layers.{block}" for block in range(12)]


def test_deltas_and_full_masks_are_compared_alike(make_masked, tmp_path):
    general = nms.save_mask(make_masked(), tmp_path / "general")
    model = make_masked(0.05)
    delta = nms.save_mask(model, tmp_path / "delta", delta_to=general)
    full = nms.save_mask(model, tmp_path / "full")
    assert nms.diff_masks(delta, full).total.changed == 0
    assert nms.diff_masks(general, delta).layers == nms.diff_masks(general, full).layers
    stored = sum(layer.changed for layer in nms.read_mask(delta).layers.values())
    assert stored == nms.diff_masks(general, delta).total.changed > 0


def test_what_cannot_be_compared_is_refused_or_listed(make_masked, make_llama, tmp_path):
    mask = nms.read_mask(nms.save_mask(make_masked(), tmp_path / "mask"))
    other = nms.read_mask(nms.save_mask(make_masked(pattern="1:4"), tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"is a 2:4 mask and .* a 1:4 one"):
        nms.diff_masks(mask, other)
    fewer = nms.read_mask(nms.save_mask(make_masked(dense_layers=["down_proj"]), tmp_path / "fewer"))
    found = nms.diff_masks(fewer, mask)
    assert (len(found.layers), found.only_in_a, found.only_in_b) == (12, [], [LAYER.replace("1", "0"), LAYER])
    only = {name: layer for name, layer in mask.layers.items() if "down_proj" in name}
    with pytest.raises(ConfigError, match="share no layer"):
        nms.diff_masks(fewer, replace(mask, layers=only))
    wide = get_peft_model(make_llama(intermediate_size=96), NMSparseConfig())
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj: one mask has packed codes"):
        nms.diff_masks(mask, nms.save_mask(wide, tmp_path / "wide"))
    layer = replace(mask.layers[LAYER], base=mask.layers[LAYER].base ^ 1)
    assert nms.diff_masks(mask, replace(mask, layers={**mask.layers, LAYER: layer})).other_base == [LAYER]


# --- command line ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folders(make_masked, tmp_path, monkeypatch):
    """A general mask, a delta to it and a mask of another pattern, in the working folder."""
    monkeypatch.chdir(tmp_path)
    nms.save_mask(make_masked(), "general")
    nms.save_mask(make_masked(0.05), "law", delta_to="general")
    nms.save_mask(make_masked(pattern="1:4"), "other")
    return tmp_path


def test_diff_on_the_command_line(folders):
    found = facts("diff general law")
    expected = nms.diff_masks("general", "law").to_dict()
    assert found["ok"] and {name: found[name] for name in expected} == expected
    assert set(found["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    text = run("diff general law --top 3").stdout
    for said in ("all layers", "by chance", "83.33%", "up_proj", "model.layers.1", "most changed layers", "Jaccard"):
        assert said in text
    assert facts("diff general general")["changed"] == 0  # exit code 0 either way
    assert "can be compared" in run("diff general other", 2).stderr
    assert run("diff general nothing", 2).stderr
    Path("law/adapter_model.safetensors").write_bytes(b"x")
    run("diff general law", 1)
    help_text = " ".join(run("diff --help").stdout.split())
    assert "Example: nmsparse diff " in help_text and "diff" in run("--help").stdout


def test_inspect_and_verify_understand_deltas(folders, base_folder):
    shown = facts("inspect law")
    size = Path("law/adapter_model.safetensors").stat().st_size
    assert (shown["kind"], shown["delta_to"], shown["pattern"], shown["file_bytes"]) == (
        "mask",
        "../general",
        "2:4",
        size,
    )
    assert 0.03 < shown["changed_share"] < 0.07
    assert 0.06 < shown["bits_bound"] < 0.14 and shown["bits_per_weight"] > shown["bits_bound"]
    assert "../general" in run("inspect law").stdout
    assert "delta_to" not in facts("inspect general")
    assert facts(f"verify law --base {base_folder}")["kind"] == "mask"
    Path("general").rename("moved")
    assert "general mask cannot be read" in run("verify law", 1).stderr
    assert "general mask cannot be read" in run("inspect law", 1).stderr


def test_a_delta_is_pushed_and_pulled_with_the_place_of_its_general_mask(folders, monkeypatch, tmp_path_factory):
    with as_the_hub(monkeypatch, tmp_path_factory.mktemp("hf_home")) as hub:
        assert "push that one first" in " ".join(run("push law user/masks --task law", 2).stderr.split())
        run("push general user/masks --task general")
        run("push law user/masks --task law")
        found = facts("diff user/masks user/masks --task general --other-task law")
        assert found["changed"] == facts("diff general law")["changed"]
        assert facts("verify user/masks --task law")["ok"]
        assert facts("inspect user/masks --task law")["delta_to"] == "../general"
        pulled = facts("pull user/masks --task law --output far/away/law")
        assert (pulled["kind"], pulled["delta_to"]) == ("mask", "../general")
        general = nms.read_mask("far/away/law").general
        assert (general.source, general.task) == ("user/masks", "general")
        assert general.revision == pulled["commit"] == hub.repos["user/masks"].branches["main"]
        assert nms.diff_masks("far/away/law", "law").total.changed == 0
