# SPDX-License-Identifier: Apache-2.0
"""Schedules by name: where temperature and logit scale are at each moment."""

import json
import math

import pytest
from peft import PeftModel, get_peft_model

from hf_nmsparse import NMSparseConfig, set_mask_step
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.relaxations import SCHEDULES, Moment, get_schedule, sampling_state

RANGES = {"temperature": (4.0, 0.25), "logit_scale": (100.0, 400.0), "magnitude_regularization": 1e-3}


def values(schedule: str, step: int, first: int = 0) -> tuple[float, float, float]:
    config = NMSparseConfig(schedule=schedule, **RANGES)
    state = sampling_state(config, Moment(step=first + step, max_steps=first + 4, first_step=first))
    return float(state.temperature), float(state.logit_scale), float(state.regularization)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_starts_at_the_start_and_all_but_constant_end_at_the_end(schedule):
    assert values(schedule, 0) == pytest.approx((4.0, 100.0, 1e-3))
    end = (4.0, 100.0) if schedule == "constant" else (0.25, 400.0)
    assert values(schedule, 4) == values(schedule, 9) == pytest.approx((*end, 0.0))


def test_linear_is_the_default_and_goes_evenly():
    assert NMSparseConfig().schedule == "linear"
    assert values("linear", 1) == pytest.approx((4.0 - 3.75 / 4, 175.0, 0.75e-3))


def test_cosine_is_slow_at_both_ends_and_half_way_in_the_middle():
    assert values("cosine", 2)[:2] == pytest.approx((2.125, 250.0))
    share = (1 - math.cos(math.pi / 4)) / 2
    assert values("cosine", 1)[:2] == pytest.approx((4.0 - 3.75 * share, 100.0 + 300.0 * share))


def test_exponential_has_the_same_ratio_each_step():
    assert [values("exponential", step)[0] for step in range(5)] == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])
    assert values("exponential", 2)[1] == pytest.approx(200.0)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_regulariser_always_decays_linearly(schedule):
    assert values(schedule, 1)[2] == pytest.approx(0.75e-3)


def test_a_schedule_may_begin_later():
    assert values("cosine", 1, first=100) == values("cosine", 1)
    before = sampling_state(NMSparseConfig(**RANGES), Moment(step=3, max_steps=20, first_step=10))
    assert (float(before.temperature), int(before.step)) == (4.0, 3)  # the noise goes by the step of the run


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'polynomial' is not known.*constant, cosine, exponential, linear"):
        NMSparseConfig(schedule="polynomial")
    with pytest.raises(ConfigError, match="not known"):
        get_schedule("Linear")


def test_the_schedule_is_part_of_a_checkpoint_and_older_ones_are_linear(make_llama, tmp_path):
    get_peft_model(make_llama(), NMSparseConfig(schedule="exponential")).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    set_mask_step(loaded, 5, 10)
    layer = next(iter(mask_layers(loaded).values()))
    assert float(layer.states["default"].temperature) == pytest.approx(math.sqrt(4.0 * 0.05))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["schedule"], config["prior_confidence"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert NMSparseConfig.from_pretrained(tmp_path).schedule == "linear"
