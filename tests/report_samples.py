# SPDX-License-Identifier: Apache-2.0
"""Results of a run that was measured in every way, hostile text, and what a reader sees of a page."""

from __future__ import annotations

import html
import math
import re

from hf_nmsparse.results import RunResults

HOSTILE = "$\\x{$ <script>alert('x')</script> & \"q\" {{ 7*7 }} {% if %} $\\frac{$ \n---\n\x00 | ```"


def sample_results() -> RunResults:
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    names = [f"model.layers.{i}.{part}.{kind}" for i in range(6) for part, kinds in parts.items() for kind in kinds]
    history = [
        {"step": s, "loss": 4 + 3.6 * math.exp(-s / 12), "nm/flip_rate": s / 4000, "nm/max_prob": 0.6 + s / 500,
         "nm/entropy": 1.5 - s / 100, "nm/temperature": 4 - s / 30, "nm/logit_scale": 100 + 4 * s}
        for s in range(1, 101, 5)
    ]  # fmt: skip
    return RunResults(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        base_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        pattern="2:4",
        method="candidates (prior polish)",
        sparse_layers=names,
        dense_layers=["lm_head"],
        data={"calibration": "wiki train, 32,768 tokens", "training": "wiki train", "evaluation": "wiki test"},
        seed=1234,
        perplexity={
            "dense": 24.45,
            "magnitude": 1920.3,
            "wanda": 216.9,
            "polish": 147.1,
            "learned": 57.3,
            "packed": 57.3,
        },
        perplexity_tokens=32768,
        perplexity_sequence_length=1024,
        mask_bits_per_weight=0.6684,
        mask_bits_bound=0.64624,
        packed_ratio=0.5627,
        sizes={"mask": 8_873_216, "packed_model": 176_400_112, "dense_model": 269_060_552},
        reload_bit_equal=True,
        base_unchanged=True,
        steps=193,
        planned_steps=300,
        seconds=2391.0,
        seconds_by_stage={"load": 9.2, "training": 1860.0, "evaluation": 240.0},
        history=[*history, {"step": 50, "nm/hard_eval_loss": 4.37}, {"step": 100, "nm/hard_eval_loss": 4.05}],
        layers=[{"name": n, "relative_error": 0.05 + 0.001 * k, "flip_rate": 0.002 * k} for k, n in enumerate(names)],
        evaluations=[
            {
                "text": "law.txt",
                "dense": 12.5,
                "this": 20.0,
                "standard_error": 0.02,
                "tokens": 4096,
                "sequence_length": 512,
                "sha256": "l" * 64,
            },
        ],
        tasks=[
            {
                "task": "arc_easy",
                "metric": "acc",
                "suite": "small",
                "this": 0.471,
                "standard_error": 0.0102,
                "items": 2376,
                "shots": 0,
                "chance": 0.25,
                "higher_is_better": True,
                "measured_by": "x 1.0",
                "sha256": "a" * 64,
                "dense": 0.584,
                "dense_standard_error": 0.0101,
                "difference_standard_error": 0.009,
                "lost": 387,
                "won": 118,
            },
            {
                "task": "cloze",
                "metric": "word_perplexity",
                "this": 45.79,
                "dense": 24.1,
                "items": 62,
                "shots": 5,
                "higher_is_better": False,
                "sha256": "c" * 64,
            },
        ],
        agreement=[
            {
                "text": "law.txt",
                "tokens": 4096,
                "sequence_length": 512,
                "sha256": "l" * 64,
                "top1": 0.713,
                "kl": 0.42,
                "top1_standard_error": 0.004,
                "kl_standard_error": 0.011,
                "layers": {n: 0.01 * k for k, n in enumerate(names)},
            },
        ],
        samples=[
            {"prompt": "The capital of France is", "dense": " Paris.", "packed": " Paris, of course."},
            {"prompt": "1, 2, 3,", "dense": " 4, 5", "this": " 4, 4"},
        ],
        speed=[{"name": "linear 576x1536", "tokens": 1, "milliseconds": 0.0312, "ratio": 1.31, "device": "some CPU"}],
        command="nmsparse demo --pattern 2:4",
        environment={"torch": "2.13.0", "python": "3.11.2"},
    )


def words(page: str) -> str:
    """What a reader sees: text without tags, pictures and style."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
