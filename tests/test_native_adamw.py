# SPDX-License-Identifier: Apache-2.0
"""A step of `MaskAdamW` in C++: against the plain torch one, which rounds with the same random bits."""

from unittest import mock

import pytest
import torch
from kernel_checks.native_builds import BUILDS, put_in_place

from hf_nmsparse.errors import ConfigError
from hf_nmsparse.ops import native_adamw, native_build
from hf_nmsparse.training import MaskAdamW


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The kernel compiled for one instruction set takes the place of that of this machine."""
    put_in_place(request.param, monkeypatch, native_adamw)


def trained(dtype, states, shape, native, steps=5):
    """The parameter and its state after some steps, and whether the kernel took them."""
    draw = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=draw).mul(0.03).to(dtype))
    optimizer = MaskAdamW([parameter], lr=1e-3, weight_decay=0.1, states=states, seed=3)
    taken = []
    update = native_adamw.update

    def noted(*given, **options):
        taken.append(given)
        update(*given, **options)

    takes = native_adamw.takes if native else lambda *given: False
    with mock.patch.object(native_adamw, "takes", takes), mock.patch.object(native_adamw, "update", noted):
        for step in range(steps):
            parameter.grad = torch.randn(shape, generator=draw).mul(10.0 ** -(step % 3)).to(dtype)
            optimizer.step()
    return parameter.detach(), optimizer.state[parameter], len(taken)


@pytest.mark.parametrize("shape", [(7, 403), (300, 16), (5,)], ids=str)
@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_plain_torch(build, dtype, states, shape):
    mine, my_state, taken = trained(dtype, states, shape, native=True)
    plain, state, _ = trained(dtype, states, shape, native=False)
    assert taken == 5
    # A number may fall on the other side of a random threshold, and is then one step of what stores it off.
    thresholds = (states == "8bit") + (dtype == torch.bfloat16)
    assert ((mine.float() - plain.float()).abs() > 1e-7).float().mean() <= 2e-3 * thresholds
    torch.testing.assert_close(mine, plain, rtol=2**-7 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)
    for name, value in state.items():
        if name == "step" or value.is_floating_point():
            torch.testing.assert_close(my_state[name], value, rtol=1e-5, atol=1e-7)
        else:
            assert (my_state[name] != value).float().mean() <= 2e-3
            assert (my_state[name].int() - value.int()).abs().max() <= 1


def test_results_do_not_depend_on_threads():
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(trained(torch.bfloat16, "8bit", (33, 300), native=True)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_no_numbers_stay_no_numbers_and_alone():
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.ones(3, 256, dtype=dtype))
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[1, 7] = float("nan")
        MaskAdamW([parameter], lr=0.1).step()
        assert parameter.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("native", [True, False])
def test_a_gradient_that_is_no_number_shows_in_states_of_one_byte(native):
    if native_build.native_library() is None:
        pytest.skip("no compiler")
    parameter = torch.nn.Parameter(torch.ones(3, 256))
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[1, 7] = float("nan")
    optimizer = MaskAdamW([parameter], states="8bit")
    with mock.patch.object(native_adamw, "takes", native_adamw.takes if native else lambda *given: False):
        optimizer.step()
    for name in ("mean_scale", "root_scale"):
        assert optimizer.state[parameter][name].isnan().tolist() == [False, True, False]


def test_a_step_is_seen_by_who_watches_versions():
    parameter = torch.nn.Parameter(torch.ones(3, 256))
    parameter.grad = torch.ones_like(parameter)
    before = parameter._version
    MaskAdamW([parameter]).step()
    assert parameter._version > before


def test_states_of_other_parameters_options_or_optimizers_are_refused():
    def stepped(size, cls=MaskAdamW, **options):
        parameter = torch.nn.Parameter(torch.ones(size))
        parameter.grad = torch.ones_like(parameter)
        optimizer = cls([parameter], **options)
        optimizer.step()
        return optimizer

    target = stepped(1000)
    before = target.state_dict()["state"][0]["mean"].clone()
    for saved, message in (
        (stepped(100), "parameter 0 do not fit"),
        (stepped(1000, states="8bit"), "states='8bit', this one states='float32'"),
        (stepped(1000, torch.optim.AdamW), "not a MaskAdamW"),
    ):
        with pytest.raises(ConfigError, match=message):
            target.load_state_dict(saved.state_dict())
    assert torch.equal(target.state_dict()["state"][0]["mean"], before)
    with pytest.raises(ConfigError, match="betas must be"):
        MaskAdamW([torch.nn.Parameter(torch.ones(3))], betas=(0.9, 1.0))
