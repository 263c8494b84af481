# SPDX-License-Identifier: Apache-2.0
"""One run of `nmsparse train`: read the texts, put the prior mask on, train, measure, publish."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import RESULTS_FILE
from .common import Answer, new_results, table, tell
from .folders import Kind, output_folder, written_line
from .models import fetching, load_model, load_tokenizer, revision_of, stream, window_length
from .options import Dtype
from .processes import is_first_process
from .pruning_run import described
from .writing import note_mask, write_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import TrainingArguments

    from .. import NMSparseConfig
    from ..results import RunResults
    from ..training import BranchFit, Distillation, NMSparseTrainer, TeacherCache

_CALIBRATION_SAMPLES = 128
_WATCHED_WINDOWS = 4  # of the evaluation text, for nm/hard_eval_loss at each log line


@dataclass
class TrainingRun:
    """What a run reads, and what is known of it so far.

    Args:
        name (`str`): Hub id or folder of the base model.
        prior (`str`): criterion or published mask to start from.
        eval_tokens (`int`): tokens of the evaluation text to use.
        seed (`int`): of what is drawn.
        data (`str`, *optional*): source of the text to learn from.
        self_tokens (`int`, *optional*): tokens that the dense model writes instead.
        eval_data (`str`, *optional*): source of the held-out text.
        calibration (`str`, *optional*): source of the text for the prior; by default the text to learn from.
        sequence_length (`int`, *optional*): tokens a window.
        blockwise_steps (`int`, *optional*): steps of a sweep block by block, before the Trainer's.
        distillation (`Distillation`, *optional*): how the dense base teaches, if it does.
        teacher_file (`Path`, *optional*): where what it says is kept.
        general_mask (`str`, *optional*): published mask that the learned one is stored as a delta to.
        trainer_options (`dict`): further arguments of `NMSparseTrainer`.
    """

    name: str
    prior: str
    eval_tokens: int
    seed: int
    data: str | None = None
    self_tokens: int | None = None
    eval_data: str | None = None
    calibration: str | None = None
    sequence_length: int | None = None
    blockwise_steps: int | None = None
    distillation: Distillation | None = None
    teacher_file: Path | None = None
    general_mask: str | None = None
    trainer_options: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherCache | None = None
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
        if self.data is not None:
            self.train_windows = windows(stream(self.data, self.tokenizer), self.length)
            self.texts["training"] = described(self.data, self.train_windows)
        else:
            self.texts["training"] = f"{self.self_tokens} tokens, written by the model itself"
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
        if self.self_tokens is not None:
            self._write_own(model)
        config.revision = revision_of(model)
        masked = get_peft_model(model, config)
        if not resuming:
            self._set_prior(masked)
            if config.low_rank is not None or (config.slorb_block is not None and config.slorb_init == "closed_form"):
                self._fit_branch(masked)
            self.measure(f"prior ({self.prior})", masked)
            if self.blockwise_steps is not None:
                self._learn_blockwise(masked)
        return masked

    def _set_prior(self, model: PeftModel) -> None:
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
            tokens = self._calibration_windows()
        set_prior(model, self.prior, calibration=tokens)

    def _fit_branch(self, model: PeftModel) -> None:
        from ..training import fit_side_branch

        self.fits = fit_side_branch(model, self._calibration_windows())
        tell(self._fitted())

    def _write_own(self, model: nn.Module) -> None:
        """Have the dense model write the text to learn from."""
        from ..training import self_data

        count = max(1, self.self_tokens // self.length)
        tell(f"writing {count} windows of {self.length} tokens")
        self.train_windows = self_data(model, self.tokenizer, count, self.length, seed=self.seed)

    def _learn_blockwise(self, model: PeftModel) -> None:
        from ..adapter import mask_layers
        from ..training import learn_blockwise

        report = learn_blockwise(model, self._calibration_windows(), steps=self.blockwise_steps)
        for layer in mask_layers(model).values():  # as a prior: the schedules begin again
            layer.set_prior_codes("default", layer.mask_codes("default"))
        before, after = (
            sum(getattr(block, name) for block in report.blocks) / len(report.blocks)
            for name in ("error_before", "error_after")
        )
        tell(f"block by block: mean error of a block's output {before:.4f} -> {after:.4f} on held-out windows")
        self.measure("block by block", model)

    def _calibration_windows(self) -> torch.Tensor:
        from ..data import windows

        if self.calibration_windows is None and self.calibration is None and self.self_tokens is not None:
            self.calibration_windows = self.train_windows[:_CALIBRATION_SAMPLES]
            self.texts["calibration"] = f"{self.calibration_windows.numel()} of these tokens"
        elif self.calibration_windows is None:
            source = self.calibration or self.data
            tokens = stream(source, self.tokenizer)
            self.calibration_windows = windows(tokens, self.length, _CALIBRATION_SAMPLES, self.seed)
            self.texts["calibration"] = described(source, self.calibration_windows)
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
        from ..training import MaskMetricsCallback, NMSparseTrainer, TeacherCache

        if self.teacher_file is not None:
            there = self.teacher_file.exists()
            self.teacher = TeacherCache.load(self.teacher_file) if there else TeacherCache(self.distillation)

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
            teacher_cache=self.teacher,
            **self.trainer_options,
        )

    def measure(self, row: str, model: nn.Module) -> None:
        """Perplexity on the evaluation text, if there is one."""
        from ..evaluation import perplexity

        if self.eval_windows is not None:
            self.perplexity[row] = perplexity(model, self.eval_windows, progress=is_first_process()).value

    def publish(self, answer: Answer, trainer: NMSparseTrainer, output: Path) -> None:
        """Measure the learned mask and write it, with card and results, into `output`; of several processes the first."""
        from ..results import RunResults

        self.measure("learned", trainer.model)
        if trainer.model.peft_config["default"].has_side_branch:
            self._measure_without_branch(trainer.model)
        results = self._results(trainer)
        if self.teacher is not None:
            self.teacher.save(self.teacher_file)
        if not is_first_process():
            if not trainer.model.peft_config["default"].trains_weight:
                self._save(
                    trainer.model, output, results
                )  # writes nothing; where logits are sharded it takes all to gather them
            return
        if trainer.model.peft_config["default"].trains_weight:
            self._publish_model(answer, trainer, results, output)
            return
        with output_folder(output) as staging:
            self._save(trainer.model, staging, results)
            results = RunResults.read(staging / RESULTS_FILE)
        mask = {"mask_bytes": results.sizes["mask"], "bits_per_weight": results.mask_bits_per_weight}
        self._tell_of(answer, results, {"output": str(output), **mask})
        answer.show(f"{results.steps} steps, {results.mask_bits_per_weight:.3f} bit a weight", written_line(output))

    def _publish_model(self, answer: Answer, trainer: NMSparseTrainer, results: RunResults, output: Path) -> None:
        """Write the trained sparse model: packed, with terms beside it, where the pattern allows; else dense with zeros."""
        from ..hub import compress
        from ..packed.quantizer import packed_layers

        config = trainer.model.peft_config["default"]
        packed = result_kind(config) is Kind.PACKED
        if packed:
            sparse = compress(trainer.model)
            results.sparse_layers = [name for name, _ in packed_layers(sparse)]
        else:
            sparse = trainer.model.merge_and_unload()
            if config.has_side_branch:  # which no zeros survive
                results.dense_layers = sorted({*results.dense_layers, *results.sparse_layers})
                results.sparse_layers = []
        results.kept_weights = "update"
        written = write_model(sparse, output, self.name, results, packed)
        self._tell_of(answer, results, written)
        answer.show(f"{results.steps} steps", written_line(output))

    def _measure_without_branch(self, model: PeftModel) -> None:
        """Perplexity of what is left where nothing can be kept beside the masked weights."""
        from ..adapter import is_sharded, mask_layers

        layers = mask_layers(model).values()
        if self.eval_windows is None or any(is_sharded(p) for layer in layers for p in layer.parameters()):
            return
        for layer in layers:
            layer.merge(with_side_branch=False)
        self.measure("learned, without the term beside the mask", model)
        for layer in layers:
            layer.unmerge()

    def _tell_of(self, answer: Answer, results: RunResults, written: dict[str, Any]) -> None:
        answer.facts = {
            **written,
            "steps": results.steps,
            "perplexity": self.perplexity,
            "terms": results.terms,
            "side_branch_error": self._fit_errors(),
            "last_log": next((entry for entry in reversed(results.history) if "loss" in entry), {}),
        }
        if self.perplexity:
            answer.show(table("perplexity", ("", ""), ((row, f"{v:.3f}") for row, v in self.perplexity.items())))
        if self.fits:
            answer.show(self._fitted())

    def _save(self, model: PeftModel, folder: Path, results: RunResults) -> None:
        from ..hub import save_mask

        if self.general_mask is not None:
            try:
                save_mask(model, folder, results=results, delta_to=self.general_mask)
                return
            except ConfigError as error:  # what has been learned is not lost because it differs too much
                tell(f"--delta-to: {error}. Saved in full")
        save_mask(model, folder, results=results)

    def check_general_mask(self, config: NMSparseConfig) -> None:
        """Refuse, before anything is trained, a general mask that no delta of this pattern can be of."""
        from ..hub import read_mask

        if self.general_mask is not None:
            with fetching(self.general_mask):
                mask = read_mask(self.general_mask)
            if mask.config.pattern != config.pattern:
                raise ConfigError(
                    f"--delta-to {self.general_mask} is a {mask.config.pattern} mask; expected one of {config.pattern}"
                )

    def _taught(self) -> str:
        """How block-wise learning and distillation are recorded, after the prior."""
        said = "" if self.blockwise_steps is None else f", block by block {self.blockwise_steps} steps each"
        if self.distillation is None:
            return said
        given = self.distillation
        classes = "" if given.top_k is None else f" of the {given.top_k} likeliest"
        terms = [
            (given.distillation_weight, f"KL{classes}"),
            (given.hidden_weight, "hidden states"),
            (given.loss_weight, "loss"),
        ]
        shown = " + ".join(f"{weight:.3g} {term}" for weight, term in terms if weight)
        return f"{said}, distilled: {shown}, temperature {given.temperature:g}"

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


def result_kind(config: NMSparseConfig) -> Kind:
    """What a run that trains weights leaves: a packed model where the pattern allows."""
    from ..packed.stored_mask import inside_24
    from ..pattern import NMPattern

    return Kind.PACKED if inside_24(NMPattern(config.pattern)) else Kind.MODEL
