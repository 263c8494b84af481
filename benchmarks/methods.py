# SPDX-License-Identifier: Apache-2.0
"""All methods on the same model and tokens: masks over frozen weights, and weights trained under masks.

    python benchmarks/methods.py --tiny --steps 150 --seeds 0 1 2        # the trained one-million-weight Llama of the tests
    python benchmarks/methods.py --steps 100 --seeds 0 --methods "ast, distilled" ...    # SmolLM2-135M-Instruct

Every method is trained by NMSparseTrainer on the same windows for the same steps, 2:4. "two phases" learns a mask over frozen
weights in the first half of them and trains the kept weights under it in the second. Perplexity is of held-out text, of the
hard model; with SLoRB it is given without that term too. CPU seconds are those of training.
"""

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from terms import Setting, polish_masks, smollm2_setting, tiny_setting
from timing import write_results
from torch import nn
from transformers import TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.data import TokenWindows, windows

DISTILLATION = nms.Distillation()


@dataclass(frozen=True)
class Method:
    """How a row is trained: fields of `NMSparseConfig`, teacher, and whether a mask over frozen weights comes first."""

    config: dict[str, Any] = field(default_factory=dict)
    distillation: nms.Distillation | None = None
    prior: str = "magnitude"  # or "polish"
    two_phases: bool = False

    @property
    def trains_weights(self) -> bool:
        return nms.NMSparseConfig(**self.config).trains_weight


METHODS = {
    "candidates": Method(prior="polish"),
    "candidates, distilled": Method(prior="polish", distillation=DISTILLATION),
    "straight_through": Method({"relaxation": "straight_through"}, prior="polish"),
    "fixed mask": Method({"relaxation": "ast", "mask_interval": None}),
    "fixed mask, distilled": Method({"relaxation": "ast", "mask_interval": None}, DISTILLATION),
    "fixed polish mask, distilled": Method({"relaxation": "ast", "mask_interval": None}, DISTILLATION, "polish"),
    "ast": Method({"relaxation": "ast"}),
    "ast, distilled": Method({"relaxation": "ast"}, DISTILLATION),
    "ast, distilled, SLoRB": Method({"relaxation": "ast", "slorb_block": 16}, DISTILLATION),
    "pdp": Method({"relaxation": "pdp"}),
    "pdp, distilled": Method({"relaxation": "pdp"}, DISTILLATION),
    "bdwp": Method({"relaxation": "bdwp"}),
    "transposable": Method({"relaxation": "transposable"}),
    "two phases, distilled": Method({"relaxation": "ast", "mask_interval": None}, DISTILLATION, "polish", True),
    "two phases, distilled, SLoRB": Method(
        {"relaxation": "ast", "mask_interval": None, "slorb_block": 16}, DISTILLATION, "polish", True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny trained Llama of the tests")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, help="of weights; by default 1e-3 (tiny), 5e-5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = tiny_setting() if arguments.tiny else smollm2_setting()
    rate = arguments.learning_rate or (1e-3 if arguments.tiny else 5e-5)
    held_out = windows(setting.test, setting.eval_length)[: arguments.eval_tokens // setting.eval_length]
    about = {
        "model": setting.name,
        "eval_tokens": held_out.numel(),
        "steps": arguments.steps,
        "tokens_per_step": setting.batch * setting.length,
        "weight_learning_rate": rate,
        "threads": arguments.threads,
        "dense": nms.perplexity(setting.base, held_out, seq_len=setting.eval_length).value,
    }
    print(f"dense {about['dense']:.2f}", flush=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        calibration = windows(setting.train, setting.length, samples=64, seed=seed)
        masks = {"polish": polish_masks(setting, calibration)}
        for name in ("magnitude", "polish"):
            model = pruned(setting, None if name == "magnitude" else masks[name])
            value = nms.perplexity(model, held_out, seq_len=setting.eval_length).value
            rows.setdefault(f"{name}, not trained", []).append({"seed": seed, "perplexity": value})
        for name in arguments.methods:
            found = measure(setting, METHODS[name], masks, held_out, seed, rate, arguments.steps)
            rows.setdefault(name, []).append({"seed": seed, **found})
            print(name, rows[name][-1], flush=True)
            path = "methods-tiny" if arguments.tiny else "methods"
            write_results(path, "cpu", {**about, "rows": rows}, arguments.output)
    print(table(rows))


def pruned(setting: Setting, masks: dict[str, torch.Tensor] | None) -> nn.Module:
    """The base under a mask, by magnitude if none is given."""
    model = get_peft_model(copy.deepcopy(setting.base), nms.NMSparseConfig())
    if masks is not None:
        nms.set_prior(model, masks)
    return model.eval()


def measure(
    setting: Setting,
    method: Method,
    masks: dict[str, dict[str, torch.Tensor]],
    held_out: torch.Tensor,
    seed: int,
    rate: float,
    steps: int,
) -> dict[str, float]:
    begun = time.process_time()
    given = masks.get(method.prior)
    if method.two_phases:
        first = masked(setting, Method(prior="polish"), given, seed)
        trained(setting, first, method.distillation, seed, mask_rate(setting, steps // 2), steps // 2)
        given = {name: layer.hard_mask("default") for name, layer in mask_layers(first).items()}
        steps -= steps // 2
    model = masked(setting, method, given, seed)
    before = {name: layer.mask_codes("default") for name, layer in mask_layers(model).items()}
    trained(
        setting, model, method.distillation, seed, rate if method.trains_weights else mask_rate(setting, steps), steps
    )
    seconds = time.process_time() - begun
    layers = mask_layers(model)
    changed = sum(int((layer.mask_codes("default") != before[name]).sum()) for name, layer in layers.items())
    found = {
        "perplexity": nms.perplexity(model.eval(), held_out, seq_len=setting.eval_length).value,
        "groups_changed": changed / sum(codes.numel() for codes in before.values()),
        "cpu_seconds": seconds,
    }
    if method.config.get("slorb_block"):
        for layer in layers.values():
            layer.merge(with_side_branch=False)
        found["without_slorb"] = nms.perplexity(model, held_out, seq_len=setting.eval_length).value
    return found


def masked(setting: Setting, method: Method, given: dict[str, torch.Tensor] | None, seed: int) -> nn.Module:
    recipe = {} if method.trains_weights else setting.recipe
    prior = {"prior": None} if given is not None else {}
    config = nms.NMSparseConfig(seed=seed, **recipe, **prior, **method.config)
    model = get_peft_model(copy.deepcopy(setting.base), config)
    if given is not None:
        nms.set_prior(model, given)
    return model


def mask_rate(setting: Setting, steps: int) -> float:
    """Learning rate of logits."""
    return min(setting.highest_learning_rate, setting.travel / steps)


def trained(
    setting: Setting, model: nn.Module, distillation: nms.Distillation | None, seed: int, rate: float, steps: int
) -> None:
    arguments = TrainingArguments(
        "runs/methods",
        max_steps=steps,
        per_device_train_batch_size=setting.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        adam_beta2=0.99,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
    )
    texts = windows(setting.train, setting.length, samples=steps * setting.batch, seed=seed + 1)
    trainer = nms.NMSparseTrainer(
        model=model, args=arguments, train_dataset=TokenWindows(texts), distillation=distillation
    )
    trainer.train()


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over seeds, with the lowest and the highest."""
    lines = ["| method | perplexity | without SLoRB | groups changed | CPU seconds |", "|---|---|---|---|---|"]
    for name, runs in rows.items():
        values = [run["perplexity"] for run in runs]
        spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
        rest = (
            f"{statistics.mean(run[key] for run in runs):{form}}" if key in runs[0] else ""
            for key, form in (("without_slorb", ".2f"), ("groups_changed", ".1%"), ("cpu_seconds", ".0f"))
        )
        lines.append(f"| {name} | {statistics.mean(values):.2f}{spread} | {' | '.join(rest)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
