# SPDX-License-Identifier: Apache-2.0
"""One run of `nmsparse train`: read the texts, put the prior mask on, train, measure, publish."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Answer, new_results, table, tell
from .folders import RESULTS_FILE, output_folder, written_line
from .models import fetching, load_model, load_tokenizer, revision_of, stream, window_length
from .options import Dtype
from .pruning_run import described
from .writing import note_mask

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import TrainingArguments

    from .. import NMSparseConfig
    from ..results import RunResults
    from ..training import BranchFit, Distillation, NMSparseTrainer

_CALIBRATION_SAMPLES = 128
_WATCHED_WINDOWS = 4  # of the evaluation text, for nm/hard_eval_loss at each log line
_MASK_FILE = "adapter_model.safetensors"


@dataclass
class TrainingRun:
    """What a run reads, and what is known of it so far.

    Args:
        name (`str`): Hub id or folder of the base model.
        data (`str`), eval_data (`str`, *optional*), calibration (`str`): sources of text.
        eval_tokens (`int`): tokens of the evaluation text to use.
        sequence_length (`int`, *optional*): tokens a window.
        prior (`str`): criterion or published mask to start from.
        distillation (`Distillation`, *optional*): how the dense base teaches, if it does.
        trainer_options (`dict`): further arguments of `NMSparseTrainer`.
    """

    name: str
    data: str
    eval_data: str | None
    calibration: str
    eval_tokens: int
    sequence_length: int | None
    prior: str
    distillation: Distillation | None = None
    trainer_options: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    length: int = 0
    train_windows: torch.Tensor | None = None
    eval_windows: torch.Tensor | None = None
    calibration_windows: torch.Tensor | None = None
    texts: dict[str, str] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    fits: list[BranchFit] = field(default_factory=list)

    def read(self, model: nn.Module) -> None:
        """Read and cut the texts for a model, which may be empty."""
        from ..data import windows

        self.tokenizer = load_tokenizer(self.name)
        self.length = window_length(model, self.sequence_length)
        self.train_windows = windows(stream(self.data, self.tokenizer), self.length)
        self.texts["training"] = described(self.data, self.train_windows)
        if self.eval_data is not None:
            tokens = stream(self.eval_data, self.tokenizer, "test", joined=True)[: self.eval_tokens]
            self.eval_windows = windows(tokens, self.length)
            self.texts["evaluation"] = described(self.eval_data, self.eval_windows)

    def masked_model(self, config: NMSparseConfig, dtype: Dtype, resuming: bool) -> PeftModel:
        """The base model under its prior mask; a resumed run gets its logits from the checkpoint instead."""
        from peft import get_peft_model

        model = load_model(self.name, dtype)
        self.read(model)
        self.measure("dense", model)
        config.revision = revision_of(model)
        masked = get_peft_model(model, config)
        if not resuming:
            self._set_prior(masked, config.seed)
            if config.low_rank is not None or (config.slorb_block is not None and config.slorb_init == "closed_form"):
                self._fit_branch(masked, config.seed)
            self.measure(f"prior ({self.prior})", masked)
        return masked

    def _set_prior(self, model: PeftModel, seed: int) -> None:
        from ..criteria import get_criterion, known_criteria
        from ..training import set_prior

        if self.prior == "magnitude":  # get_peft_model has done that
            return
        if self.prior not in known_criteria():
            with fetching(self.prior):
                set_prior(model, self.prior)
            return
        tokens = None
        if get_criterion(self.prior).needs != "nothing":
            tokens = self._calibration_windows(seed)
        set_prior(model, self.prior, calibration=tokens)

    def _fit_branch(self, model: PeftModel, seed: int) -> None:
        from ..training import fit_side_branch

        self.fits = fit_side_branch(model, self._calibration_windows(seed))
        tell(self._fitted())

    def _calibration_windows(self, seed: int) -> torch.Tensor:
        from ..data import windows

        if self.calibration_windows is None:
            tokens = stream(self.calibration, self.tokenizer)
            self.calibration_windows = windows(tokens, self.length, _CALIBRATION_SAMPLES, seed)
            self.texts["calibration"] = described(self.calibration, self.calibration_windows)
        return self.calibration_windows

    def _fit_errors(self) -> dict[str, float] | None:
        """Mean output error of the layers under the prior, without and with the side branch, if one was fitted."""
        if not self.fits:
            return None
        sums = {
            "without": sum(fit.error_without for fit in self.fits),
            "fitted": sum(fit.error_with for fit in self.fits),
        }
        return {name: total / len(self.fits) for name, total in sums.items()}

    def _fitted(self) -> str:
        errors = self._fit_errors()
        return (
            f"side branch fitted after the prior: output error {errors['without']:.4f} -> {errors['fitted']:.4f} (mean of "
            f"{len(self.fits)} layers)"
        )

    def trainer(self, model: PeftModel, arguments: TrainingArguments) -> NMSparseTrainer:
        """The Trainer of this run."""
        from transformers import default_data_collator

        from ..data import TokenWindows
        from ..training import MaskMetricsCallback, NMSparseTrainer

        held_out = self.eval_windows
        return NMSparseTrainer(
            model=model,
            args=arguments,
            train_dataset=TokenWindows(self.train_windows),
            eval_dataset=TokenWindows(held_out) if held_out is not None else None,
            processing_class=self.tokenizer,
            # Windows have one length. The Trainer's own choice would pad, and many tokenizers (Llama's) cannot.
            data_collator=default_data_collator,
            callbacks=[MaskMetricsCallback(eval_tokens=None if held_out is None else held_out[:_WATCHED_WINDOWS])],
            distillation=self.distillation,
            **self.trainer_options,
        )

    def measure(self, row: str, model: nn.Module) -> None:
        """Perplexity on the evaluation text, if there is one."""
        from ..evaluation import perplexity

        if self.eval_windows is not None:
            self.perplexity[row] = perplexity(model, self.eval_windows, progress=True).value

    def publish(self, answer: Answer, trainer: NMSparseTrainer, output: Path) -> None:
        """Measure the learned mask and write it, with card and results, into `output`."""
        from ..hub import save_mask
        from ..hub.card import write_card
        from ..pattern import NMPattern

        self.measure("learned", trainer.model)
        results = self._results(trainer)
        with output_folder(output) as staging:
            save_mask(trainer.model, staging, results=results)
            size = (staging / _MASK_FILE).stat().st_size
            results.sizes["mask"] = size
            results.mask_bits_per_weight = 8 * size / _masked_weights(trainer.model)
            results.mask_bits_bound = NMPattern(results.pattern).entropy_bits_per_weight
            write_card(staging, results, "mask")  # again, now that the sizes are known
            results.write(staging / RESULTS_FILE)
        answer.facts = {
            "output": str(output),
            "steps": results.steps,
            "perplexity": self.perplexity,
            "terms": results.terms,
            "side_branch_error": self._fit_errors(),
            "mask_bytes": size,
            "bits_per_weight": results.mask_bits_per_weight,
            "last_log": next((entry for entry in reversed(results.history) if "loss" in entry), {}),
        }
        if self.perplexity:
            answer.show(table("perplexity", ("", ""), ((row, f"{v:.3f}") for row, v in self.perplexity.items())))
        if self.fits:
            answer.show(self._fitted())
        answer.show(f"{results.steps} steps, {results.mask_bits_per_weight:.3f} bit a weight", written_line(output))

    def _taught(self) -> str:
        """How the distillation is recorded, after the prior."""
        if self.distillation is None:
            return ""
        term, loss = self.distillation.distillation_weight, self.distillation.loss_weight
        return f", distilled: {term:.3g} KL + {loss:.3g} loss, temperature {self.distillation.temperature:g}"

    def _results(self, trainer: NMSparseTrainer) -> RunResults:
        from ..adapter import linear_and_expert_weights

        config = trainer.model.peft_config["default"]
        results = new_results(
            base_model=self.name,
            base_revision=config.revision,
            method=f"{config.relaxation} (prior {self.prior}{self._taught()})",
            data=self.texts,
            seed=config.seed,
            perplexity=self.perplexity,
            steps=trainer.state.global_step,
            planned_steps=trainer.state.max_steps,
            history=trainer.state.log_history,
            # Named so that a report draws both.
            layers=[
                {
                    "name": fit.name,
                    "relative_error_mask": fit.error_without,
                    "relative_error_mask_and_branch": fit.error_with,
                }
                for fit in self.fits
            ],
        )
        note_mask(results, trainer.model)
        known = linear_and_expert_weights(trainer.model.get_base_model())
        results.dense_layers = [name for name in known if name not in results.sparse_layers]
        if self.eval_windows is not None:
            count, length = self.eval_windows.shape
            results.perplexity_tokens, results.perplexity_sequence_length = count * (length - 1), length
        return results


def _masked_weights(model: nn.Module) -> int:
    from ..adapter import mask_layers

    return sum(layer.in_features * layer.out_features for layer in mask_layers(model).values())
