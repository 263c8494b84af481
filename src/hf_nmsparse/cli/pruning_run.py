# SPDX-License-Identifier: Apache-2.0
"""One run of `nmsparse prune`: check everything without weights, load, find what stays dense, prune, write."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Answer, new_results, size, table, tell
from .folders import Kind, written_line
from .models import (
    chosen_device,
    empty_model,
    load_model,
    load_tokenizer,
    revision_of,
    stream,
    text_name,
    window_length,
)
from .pruning_options import PruningOptions
from .streaming import Placement, available_memory, memory_size, placement, weight_bytes
from .unfinished import Unfinished
from .writing import write_pruned

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..criteria import PruneReport, Target
    from ..results import RunResults

_FREE_SHARE = 0.5  # of the free memory is for weights; statistics and hidden states need room too


@dataclass
class PruningRun:
    """One run, and what is known of it so far.

    Args:
        options (`PruningOptions`): what was asked for, checked.
        empty (`nn.Module`): the model without weights.
        tokens (`torch.Tensor`, *optional*): calibration windows, int64 `[samples, sequence]`.
        placed (`Placement`, *optional*): where weights go, if they do not all go into memory.
        kept_dense (`list[str]`): layers that were found to stay dense.
    """

    options: PruningOptions
    empty: nn.Module
    tokens: torch.Tensor | None = None
    placed: Placement | None = None
    kept_dense: list[str] = field(default_factory=list)

    # --- before the weights are loaded ----------------------------------------------------------------------------------
    @classmethod
    def prepared(cls, options: PruningOptions) -> PruningRun:
        """Hold the options against the model, read the text, and decide where weights go.

        Raises:
            ConfigError, UnsupportedError: saying what does not fit.
        """
        run = cls(options, empty_model(options.model))
        targets = run.targets(run.empty)
        if options.packed:
            from ..packed import packable_layers

            packable_layers(run.empty, dict.fromkeys(target.weight_name for target in targets.values()))
        if options.needs_text:
            run.tokens = run._calibration_tokens()
        run.placed = run._placement()
        return run

    def targets(self, model: nn.Module) -> dict[str, Target]:
        """The weights that the options mean."""
        from ..criteria import find_weights

        return find_weights(model, self.options.dense_layers, self.options.layers)

    def settings(self) -> dict[str, Any]:
        """What the result depends on: the options, and what the names among them stand for."""
        from ..fingerprint import digest, to_hex

        folder = Path(self.options.model)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return self.options.settings() | {
            "calibration tokens": None if self.tokens is None else to_hex(digest(self.tokens)),
            "model revision": revision_of(self.empty),
            "model files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        }

    def _calibration_tokens(self) -> torch.Tensor:
        """Random windows of the text, int64 `[samples, sequence]`."""
        from ..data import windows

        tokens = stream(self.options.calibration, load_tokenizer(self.options.model))
        return windows(
            tokens, window_length(self.empty, self.options.sequence_length), self.options.samples, self.options.seed
        )

    def _placement(self) -> Placement | None:
        """Where weights go if they do not all go into memory."""
        if self.options.permute_channels:
            return None
        device, needed = chosen_device(self.options.device), weight_bytes(self.empty, self.options.dtype)
        if self.options.max_memory is not None:
            limit = memory_size(self.options.max_memory)
        else:
            limit = int(_FREE_SHARE * available_memory(device))
        return None if needed <= limit else placement(self.empty, self.options.dtype, device, limit)

    def streaming_line(self) -> str:
        """What stays on disk, for people."""
        needed = size(weight_bytes(self.empty, self.options.dtype))
        return (
            f"streaming: {self.placed.on_disk} of {self.placed.blocks} blocks stay on disk and are loaded one at a time, the "
            f"model needs {needed}"
            + ("" if self.options.max_memory else "; --max-memory sets how much of it is kept in memory")
        )

    def say_dry(self, answer: Answer, output: Path, kind: Kind) -> None:
        """What would be done."""
        targets = self.targets(self.empty)
        count = sum(target.dense().nbytes for target in targets.values())
        answer.facts = {
            "dry_run": True,
            "output": str(output),
            "kind": kind.value,
            "method": self.options.method,
            "layers": list(targets),
            "bytes": count,
            "streaming": self.placed is not None,
            "calibration": None if self.tokens is None else described(self.options.calibration, self.tokens),
        }
        answer.show(f"would prune {len(targets)} layers ({size(count)}) and write a {kind.value} to {output}")
        if self.placed is not None:
            answer.show(self.streaming_line())

    # --- the run --------------------------------------------------------------------------------------------------------
    def go(self, answer: Answer, output: Path, unfinished: Unfinished) -> None:
        """Do all of it, and fill the answer."""
        if self.placed is not None:
            tell(self.streaming_line())
        with unfinished.opened():
            loaded = load_model(
                self.options.model,
                self.options.dtype,
                self.options.device,
                self.placed and self.placed.device_map,
                unfinished.offloaded,
            )
            if self.options.budget is not None:
                self._find_dense_layers(loaded, unfinished)
            report = self._pruned(loaded, unfinished)
            results = self._results(loaded, report)
            facts = write_pruned(
                loaded, output, self.options.model, results, self.options.packed, report, unfinished.masked
            )
            del loaded  # it may read from the folder that goes now
        self._answer(answer, facts, results, report)
        answer.show(_table(report, self.options.method), *self._lines(report, results, facts), written_line(output))

    def _find_dense_layers(self, model: nn.Module, unfinished: Unfinished) -> None:
        from ..criteria import sensitivity

        if unfinished.dense_layers is None:
            found = sensitivity(
                model,
                self.tokens,
                self.options.chosen_criterion,
                self.options.pattern,
                compare=(),
                dense_layers=self.options.dense_layers,
                layers=self.options.layers,
            )
            unfinished.note_dense_layers(found.keep_dense(self.options.budget))
        self.kept_dense = unfinished.dense_layers

    def _pruned(self, model: nn.Module, unfinished: Unfinished) -> PruneReport:
        from ..criteria import prune

        resumable = self.options.runs_the_model
        if resumable and (done := unfinished.layers_done()):
            count = len(self.targets(model)) - len(self.kept_dense)
            tell(f"resuming: {done} of {count} layers are done")
        return prune(
            model,
            self.options.chosen_criterion,
            self.options.pattern,
            self.tokens,
            dense_layers=[*self.options.dense_layers, *self.kept_dense],
            layers=self.options.layers,
            weights=self.options.weights,
            inputs=self.options.inputs,
            permute_channels=self.options.permute_channels,
            checkpoint_folder=unfinished.blocks if resumable else None,
        )

    def _results(self, model: nn.Module, report: PruneReport) -> RunResults:
        from ..adapter import linear_and_expert_weights

        pruned, prunable = [layer.name for layer in report.layers], linear_and_expert_weights(model)
        # Each of a module's fused experts is a layer of the report: its weight's name with a number.
        sparse = {name for layer in pruned for name in (layer, layer.rpartition(".")[0])}
        about = {} if self.tokens is None else {"calibration": described(self.options.calibration, self.tokens)}
        return new_results(
            base_model=self.options.model,
            base_revision=revision_of(model),
            pattern=report.pattern,
            method=self.options.method,
            kept_weights=report.weights,
            permuted_layers=report.permuted,
            sparse_layers=pruned,
            fused_experts=sorted(name for name, base in prunable.items() if base.is_fused_experts and name in sparse),
            dense_layers=[name for name in prunable if name not in sparse],
            dense_budget=self.options.budget,
            data=about,
            seed=None if self.tokens is None else self.options.seed,
            seconds=report.seconds,
            layers=[dataclasses.asdict(layer) for layer in report.layers],
        )

    def _answer(self, answer: Answer, facts: dict[str, Any], results: RunResults, report: PruneReport) -> None:
        answer.facts = {
            **facts,
            "criterion": self.options.criterion,
            "method": self.options.method,
            "pattern": report.pattern,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "weights": report.weights,
            "permuted": report.permuted,
            "dense_layers": results.dense_layers,
            "kept_dense": self.kept_dense,
            "streaming": self.placed is not None,
            "peak_memory": peak_memory(),
            "layers": results.layers,
        }

    def _lines(self, report: PruneReport, results: RunResults, facts: dict[str, Any]) -> list[str]:
        """What was done, after the table of layers."""
        lines = []
        if self.kept_dense:
            lines.append(
                f"left dense, most sensitive ({self.options.dense_budget} of the bytes): {', '.join(self.kept_dense)}"
            )
        elif self.options.budget is not None:
            lines.append(
                f"no layer fits into {self.options.dense_budget} of the bytes, or pruning none of them does damage"
            )
        if report.permuted:
            lines.append(f"input channels of {len(report.permuted)} layers were permuted")
        lines.append(_mask_line(report, results, facts))
        return lines


def _mask_line(report: PruneReport, results: RunResults, facts: dict[str, Any]) -> str:
    from ..hub.masks import why_no_mask

    if not report.codes:
        return f"no mask was written: {why_no_mask(report)}"
    line = f"mask: {size(facts['mask_bytes'])}, {facts['bits_per_weight']:.3f} bit a weight, in {facts['mask']}"
    names = {layer.name for layer in report.layers} - set(report.codes)
    left_out = sorted(name for name in names if name.rpartition(".")[0] not in report.codes)
    if left_out:
        line += f"; without {len(left_out)} experts of blocks where others are dense, first {left_out[0]}"
    if report.weights != "keep":
        line += "; it goes with the base's own weights, not with the new values in the model"
    return line


def described(source: str, tokens: torch.Tensor) -> str:
    """A text and how much of it was used, for records."""
    return f"{text_name(source)}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens"


def peak_memory() -> int | None:
    """Most bytes of main memory that this process has had; `None` where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _table(report: PruneReport, method: str) -> Any:
    """Layers of one kind (q_proj, up_proj, ...) in one row; experts of one parameter too."""
    kinds: dict[str, list] = {}
    for layer in report.layers:
        parts = layer.name.split(".")
        kinds.setdefault(parts[-2] if parts[-1].isdigit() else parts[-1], []).append(layer)

    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.4f}" if known else "-"

    rows = (
        (name, len(group), mean([x.kept_energy for x in group]), mean([x.relative_error for x in group]))
        for name, group in kinds.items()
    )
    changed = {"keep": "kept weights unchanged", "update": "kept weights updated", "refit": "kept weights refitted"}
    what = f"{method} {report.pattern}, {changed[report.weights]}"
    title = f"{what}: {len(report.layers)} layers in {report.seconds:.1f} s"
    return table(title, ("layer", "count", "kept energy", "output error"), rows)
