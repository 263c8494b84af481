# SPDX-License-Identifier: Apache-2.0
"""PDP without groups: ratios by one ranking, their ramp, the soft mask, and the plain model that is left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.errors import ConfigError
from hf_nmsparse.training.pdp import SoftMask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, pixels, labels=None):
        logits = self.head(F.relu(self.second(F.relu(self.first(pixels)).mean((2, 3)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Pixels(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixels": torch.randn(2, 5, 5, generator=generator) + index % 3, "labels": torch.tensor(index % 3)}


class Watch(TrainerCallback):
    """The ratios of each step."""

    def __init__(self, pdp: nms.PDPCallback) -> None:
        self.pdp, self.ratios = pdp, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ratios.append({name: mask.ratio for name, mask in self.pdp.masks.items()})


def run(folder, pdp, resume=None, **changes):
    model, watch = Net(), Watch(pdp)
    values = {"max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 0.01, "save_strategy": "no"}
    values |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), **{**values, **changes})
    trainer = Trainer(model=model, args=arguments, train_dataset=Pixels(), callbacks=[pdp, watch])
    trainer.train(resume_from_checkpoint=resume)
    return model, watch.ratios


def test_the_smallest_of_all_layers_are_zero_and_the_model_is_plain_again(tmp_path):
    model, ratios = run(tmp_path, nms.PDPCallback(0.5))
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    weights = [model.first.weight, model.second.weight]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.5, abs=0.01)
    for name, weight in (("first", weights[0]), ("second", weights[1])):
        assert int((weight == 0).sum()) == round(ratios[-1][name] * weight.numel())
    assert bool((model.head.weight != 0).all())


def test_ratios_are_fixed_after_the_warm_up_and_grow_linearly(tmp_path):
    _, ratios = run(tmp_path, nms.PDPCallback(0.5, warmup=0.2, ramp=0.5))
    first = [ratio["first"] for ratio in ratios]
    assert first[:3] == [0.0, 0.0, 0.0] and first[7] == pytest.approx(first[9]) and first[9] > 0
    assert first[4] == pytest.approx(first[9] * 0.4) and first[6] == pytest.approx(first[9] * 0.8)


def test_whole_channels_are_pruned(tmp_path):
    model, _ = run(tmp_path, nms.PDPCallback(0.4, "channel", target_modules=["first", "second"]))
    gone = sum(int((weight.flatten(1) == 0).all(1).sum()) for weight in (model.first.weight, model.second.weight))
    assert gone == pytest.approx(0.4 * 22, abs=1)  # never all of a layer
    assert all(bool(((w.flatten(1) == 0).any(1) == (w.flatten(1) == 0).all(1)).all()) for w in (model.first.weight,))


def test_a_killed_and_resumed_run_ends_alike(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = run(tmp_path / "whole", nms.PDPCallback(0.5), **changes)
    resumed, _ = run(
        tmp_path / "again", nms.PDPCallback(0.5), resume=str(tmp_path / "whole" / "checkpoint-5"), **changes
    )
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_the_soft_mask_and_its_gradient_are_those_of_the_formula(granularity):
    mask = SoftMask(granularity)
    mask.ratio, mask.temperature = 0.5, 0.3
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tau = 0.3 * weight.detach().float().square().mean().double()
    size = weight.abs() if granularity == "weight" else weight.square().mean(1, keepdim=True).sqrt()
    ordered = size.detach().flatten().sort().values
    threshold = (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    expected = weight * torch.sigmoid((size.square() - threshold**2) / tau)
    found = mask(weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(value, weight, grad)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bad_values_are_refused_by_name(tmp_path):
    for given, words in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.5, "granularity": "row"}, "granularity"),
        ({"sparsity": 0.5, "warmup": 0.6, "ramp": 0.6}, "ramp"),
        ({"sparsity": 0.5, "temperature": (1.0, 0.0)}, "temperature"),
        ({"sparsity": 0.5, "target_modules": "first"}, "list of names"),
    ):
        with pytest.raises(ConfigError, match=words):
            nms.PDPCallback(**given)
    with pytest.raises(ConfigError, match="none of the 3 layers"):
        run(tmp_path, nms.PDPCallback(0.5, target_modules=["other"]))
