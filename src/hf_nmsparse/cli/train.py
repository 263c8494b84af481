# SPDX-License-Identifier: Apache-2.0
"""`nmsparse train`: learn a mask on a frozen model, or weights under one, with the Hugging Face Trainer; publish it into a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..files import read_json, write_file
from .common import STOPPED, tell, verb
from .folders import CHECKPOINTS, COMMAND_FILE, Kind
from .models import empty_model
from .options import (
    TEXT_HELP,
    DeltaOption,
    DenseLayersOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    InBackwardOption,
    JsonOption,
    LengthOption,
    LogitsDtypeOption,
    LowRankOption,
    ModelArgument,
    OptimizerStatesOption,
    OutputOption,
    OverwriteOption,
    PatternOption,
    PriorConfidenceOption,
    ProjectionOption,
    RelaxationOption,
    ScheduleOption,
    SlorbOption,
    listed,
)
from .plan import show_plan
from .processes import is_first_process, process_count, wait_for_all
from .recipe import RecipeOption, remaining_options
from .resuming import checkpoint_to_go_on_from, remove_checkpoints, resume_command, training_in
from .training_run import TrainingRun, result_kind

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .. import NMSparseConfig
    from ..training import Distillation, NMSparseTrainer

TRAIN_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

# Masks want a larger step than weights do (MaskLLM, arXiv 2409.17481, uses 5e-4 to 1e-3); runs want their logs.
_DEFAULTS = {"learning_rate": 1e-3, "logging_steps": 10, "save_steps": 100, "save_total_limit": 2}
# Fields that a resumed run must share with its checkpoint; the others may follow a new machine or taste.
_FIXED_FIELDS = (
    *("pattern", "relaxation", "prior_strength", "temperature", "logit_scale", "seed", "dense_layers"),
    *("prior_confidence", "schedule", "resample", "logits_dtype", "mask_interval", "srste_decay", "srste_ramp"),
    *("slorb_block", "slorb_init", "slorb_train_projection", "low_rank", "delta_rank"),
)

DataOption = Annotated[str | None, typer.Option("--data", metavar="TEXT", help=TEXT_HELP)]
SelfDataOption = Annotated[
    int | None,
    typer.Option(
        "--self-data",
        metavar="TOKENS",
        min=2,
        help="Instead of --data: so many tokens that the dense model writes itself.",
    ),
]
EvalDataOption = Annotated[
    str | None, typer.Option("--eval-data", metavar="TEXT", help="Held-out text; of a dataset, the test split.")
]
EvalTokensOption = Annotated[int, typer.Option("--eval-tokens", min=2, help="Use only so many tokens of it.")]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="TEXT", help="Text for the prior and the side branch; by default the training text."
    ),
]
PriorOption = Annotated[
    str,
    typer.Option("--prior", help="Mask to start from: a criterion (polish, wanda, magnitude), or a published mask."),
]
StrengthOption = Annotated[
    float, typer.Option("--prior-strength", help="How firmly to start from it (MaskLLM's alpha).")
]
TemperatureOption = Annotated[
    tuple[float, float] | None,
    typer.Option(
        "--temperature",
        metavar="START END",
        help="Of the Gumbel-softmax, by default 4 0.05; of pdp, relative to the mean of w^2, by default 0.25 0.01.",
    ),
]
IntervalOption = Annotated[
    int,
    typer.Option(
        "--mask-interval", metavar="N", min=0, help="ast: steps from one mask to the next; 0 keeps the prior."
    ),
]
DecayOption = Annotated[
    float, typer.Option("--srste-decay", metavar="L", help="ast, straight_through: decay of pruned weights (SR-STE).")
]
RampOption = Annotated[
    float, typer.Option("--srste-ramp", metavar="SHARE", help="Share of the steps over which that decay grows.")
]
ScaleOption = Annotated[
    tuple[float, float], typer.Option("--logit-scale", metavar="START END", help="Factor on the logits.")
]
ResampleOption = Annotated[
    str,
    typer.Option(
        "--resample",
        metavar="WHEN",
        help="How often masks are drawn: micro, for each micro-batch; or step, once a step.",
    ),
]
SlorbInitOption = Annotated[
    str | None,
    typer.Option(
        "--slorb-init",
        metavar="HOW",
        help="How SLoRB starts: mean or sum of the weights that a block loses, xavier, or closed_form, fitted to the "
        "calibration text. By default mean; with --low-rank closed_form.",
    ),
]
DistillOption = Annotated[
    bool,
    typer.Option("--distill", help="Follow the dense base too: its predictions teach, for one more forward pass."),
]
DistillWeightOption = Annotated[
    float | None,
    typer.Option(
        "--distill-weight",
        metavar="W",
        help="Share of the distillation term, up to 1; the text's own loss has 1 - W. By default 2/3.",
    ),
]
DistillTemperatureOption = Annotated[
    float | None,
    typer.Option("--distill-temperature", metavar="T", help="How soft the compared predictions are; by default 2."),
]
DistillTopOption = Annotated[
    int | None,
    typer.Option("--distill-top-k", metavar="K", help="Compare the K likeliest tokens, and all others as one."),
]
DistillHiddenOption = Annotated[
    float | None,
    typer.Option("--distill-hidden", metavar="C", help="Compare hidden states too, with this weight; 1/3 was tried."),
]
TeacherCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--teacher-cache",
        metavar="FILE",
        help="Keep there what the dense base says, so that it runs once for each window; needs --distill-top-k.",
    ),
]
BlockwiseOption = Annotated[
    int | None,
    typer.Option(
        "--blockwise-steps",
        metavar="N",
        min=1,
        help="First learn each block against the dense block's output on the calibration text, N steps each.",
    ),
]
DeltaToOption = Annotated[
    str | None,
    typer.Option("--delta-to", metavar="MASK", help="Store the mask as what it changes of this general mask."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest whole checkpoint in DIR/checkpoints.")
]


def train(
    context: typer.Context,
    model: ModelArgument,
    output: OutputOption,
    data: DataOption = None,
    self_data: SelfDataOption = None,
    recipe: RecipeOption = None,
    pattern: PatternOption = "2:4",
    prior: PriorOption = "magnitude",
    calibration: CalibrationOption = None,
    relaxation: RelaxationOption = "candidates",
    prior_strength: StrengthOption = 3.0,
    temperature: TemperatureOption = None,
    prior_confidence: PriorConfidenceOption = False,
    logit_scale: ScaleOption = (100.0, 500.0),
    schedule: ScheduleOption = "linear",
    mask_interval: IntervalOption = 10,
    srste_decay: DecayOption = 1e-4,
    srste_ramp: RampOption = 0.25,
    blockwise_steps: BlockwiseOption = None,
    resample: ResampleOption = "micro",
    logits_dtype: LogitsDtypeOption = "float32",
    mask_optimizer_states: OptimizerStatesOption = None,
    optimizer_in_backward: InBackwardOption = False,
    slorb_block: SlorbOption = None,
    slorb_init: SlorbInitOption = None,
    slorb_train_projection: ProjectionOption = False,
    low_rank: LowRankOption = None,
    delta_rank: DeltaOption = None,
    distill: DistillOption = False,
    distill_weight: DistillWeightOption = None,
    distill_temperature: DistillTemperatureOption = None,
    distill_top_k: DistillTopOption = None,
    distill_hidden: DistillHiddenOption = None,
    teacher_cache: TeacherCacheOption = None,
    delta_to: DeltaToOption = None,
    dense_layers: DenseLayersOption = None,
    sequence_length: LengthOption = None,
    eval_data: EvalDataOption = None,
    eval_tokens: EvalTokensOption = 65_536,
    dtype: DtypeOption = Dtype.AUTO,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Learn a mask on a frozen model. DIR gets the mask, its card, results.json and the checkpoints.

    Every field of transformers' TrainingArguments is an option too, written after MODEL: --max_steps 300
    --learning_rate 1e-3 --per_device_train_batch_size 2 --bf16 true ... Defaults that differ: learning_rate 1e-3,
    logging_steps 10, save_steps 100, save_total_limit 2. Ctrl-C stops after the current step with a checkpoint; under
    torchrun or accelerate launch (-m hf_nmsparse.cli train ...) at once.
    After a kill the same command with --resume goes on, bit for bit.

    --relaxation ast, pdp, bdwp and transposable train the weights under the mask (they want a learning rate of 1e-5 to 1e-4).
    DIR then gets the model: packed where the pattern allows, else dense with zeros.

    Terms can be trained with the mask: SLoRB or a low-rank term beside it, which compress keeps beside the packed weights,
    or a change of the kept weights. A low-rank term, and SLoRB in closed form, are fitted right after the prior.

    Example: nmsparse train HuggingFaceTB/SmolLM2-135M --data train.txt --output my-mask --prior polish --max_steps 300
    """
    with verb(json_output, lower="--per_device_train_batch_size or --sequence-length") as answer:
        from .. import NMSparseConfig
        from ..training import plan

        arguments = training_arguments(model, [*remaining_options(context), *context.args], output)
        config = NMSparseConfig(
            pattern=pattern,
            relaxation=relaxation,
            prior=prior,
            prior_strength=prior_strength,
            temperature=temperature,
            logit_scale=logit_scale,
            prior_confidence=prior_confidence,
            schedule=schedule,
            resample=resample,
            logits_dtype=logits_dtype,
            mask_interval=mask_interval or None,
            srste_decay=srste_decay,
            srste_ramp=srste_ramp,
            slorb_block=slorb_block,
            slorb_init=slorb_start(slorb_block, slorb_init, low_rank),
            slorb_train_projection=slorb_train_projection,
            low_rank=low_rank,
            delta_rank=delta_rank,
            dense_layers=listed(dense_layers) or None,
            seed=arguments.seed,
        )
        kind = result_kind(config) if config.trains_weight else Kind.MASK
        checkpoint = checkpoint_to_go_on_from(output, resume, overwrite, arguments, model, kind)
        if checkpoint is not None:
            _check_same(config, checkpoint)
        check_prior(prior)
        _check_trained_weights(config, blockwise_steps, delta_to)
        if (data is None) == (self_data is None):
            raise ConfigError(
                "give the text to learn from, --data TEXT, or --self-data TOKENS to have the model write it"
            )
        taught = distillation(distill, distill_weight, distill_temperature, distill_top_k, distill_hidden)
        _check_teacher_cache(teacher_cache, distill_top_k)
        run = TrainingRun(
            name=model,
            data=data,
            self_tokens=self_data,
            eval_data=eval_data,
            calibration=calibration,
            eval_tokens=eval_tokens,
            sequence_length=sequence_length,
            prior=prior,
            seed=arguments.seed,
            blockwise_steps=blockwise_steps,
            distillation=taught,
            teacher_file=teacher_cache,
            general_mask=delta_to,
            trainer_options={
                "mask_optimizer_states": mask_optimizer_states,
                "optimizer_in_backward": optimizer_in_backward,
            },
        )
        empty = empty_model(model)
        states = mask_optimizer_states or "float32"
        planned = plan(empty, config, states, optimizer_in_backward, arguments.activation_checkpointing)
        if dry_run:
            run.read(empty)
            answer.facts = {"dry_run": True, "model": model, "data": run.texts, "plan": planned.to_dict()}
            show_plan(answer, model, planned)
            answer.show(*(f"{role}: {text}" for role, text in run.texts.items()))
            return
        run.check_general_mask(config)
        with training_in(output):
            masked = run.masked_model(config, dtype, resuming=checkpoint is not None)
            wait_for_all()  # until each has looked into the folder
            if is_first_process():
                remove_checkpoints(output, after=checkpoint)  # of another run with --overwrite, or cut off
                write_file(output / CHECKPOINTS / COMMAND_FILE, resume_command() + "\n")  # for `nmsparse doctor`
            trainer = run.trainer(masked, arguments)
            if not _train(trainer, checkpoint):
                step, again = trainer.state.global_step, resume_command()
                answer.facts, answer.code = {"error": "stopped", "step": step, "resume": again}, STOPPED
                tell(f"stopped after step {step}, with a checkpoint; to go on: {again}")
                return
            run.publish(answer, trainer, output)


def _check_teacher_cache(teacher_cache: Path | None, distill_top_k: int | None) -> None:
    """Refuse a kept teacher that would have nothing to keep, or only a part."""
    if teacher_cache is not None and distill_top_k is None:
        raise ConfigError("--teacher-cache keeps the likeliest tokens; it needs --distill --distill-top-k K")
    if teacher_cache is not None and process_count() > 1:
        raise ConfigError("--teacher-cache is for one process; of several each would see another part of the text")


def _check_trained_weights(config: NMSparseConfig, blockwise_steps: int | None, delta_to: str | None) -> None:
    """Refuse what is for masks over frozen weights only."""
    if config.trains_weight:
        for name, value in (("--blockwise-steps", blockwise_steps), ("--delta-to", delta_to)):
            if value is not None:
                raise ConfigError(
                    f"{name} is for masks over frozen weights; --relaxation {config.relaxation} trains the weights"
                )


def training_arguments(model: str, given: list[str], output: Path) -> TrainingArguments:
    """`TrainingArguments` from the options that are not this verb's own.

    Raises:
        ConfigError: with the parser's message.
    """
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    if model.startswith("-"):
        raise ConfigError(f"MODEL must come before the options of the Trainer, got {model!r} in its place")

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise ConfigError(f"{message}; see nmsparse train --help")

    parser = Parser(TrainingArguments, allow_abbrev=False, add_help=False)
    parser.set_defaults(
        **_DEFAULTS,
        output_dir=str(output / CHECKPOINTS),
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if any(option.partition("=")[0].replace("-", "_") == "__output_dir" for option in given):
        raise ConfigError(f"checkpoints go to {output / CHECKPOINTS}; leave --output_dir out")
    try:
        (arguments,) = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # from TrainingArguments: values that do not go together, or here
        raise ConfigError(" ".join(str(error).split())) from error
    return arguments


def distillation(
    wanted: bool, weight: float | None, temperature: float | None, top_k: int | None, hidden: float | None
) -> Distillation | None:
    """The `Distillation` that the options mean; those left out take its defaults.

    Raises:
        ConfigError: on a value out of range, or one that would be without effect.
    """
    from ..training import Distillation

    if not wanted:
        if any(value is not None for value in (weight, temperature, top_k, hidden)):
            raise ConfigError("--distill-weight, -temperature, -top-k and -hidden need --distill")
        return None
    given = {"temperature": temperature, "top_k": top_k, "hidden_weight": hidden}
    values = {name: value for name, value in given.items() if value is not None}
    if weight is not None:
        if not 0 < weight <= 1:
            raise ConfigError(f"--distill-weight must be above 0 and at most 1, got {weight}")
        values |= {"loss_weight": 1 - weight, "distillation_weight": weight}
    return Distillation(**values)


def slorb_start(block: int | None, init: str | None, low_rank: int | None) -> str:
    """How SLoRB starts, by the options. A low-rank term is fitted to what SLoRB leaves, so SLoRB is fitted first.

    Raises:
        ConfigError: on a value that would be without effect.
    """
    if block is None:
        if init is not None:
            raise ConfigError("--slorb-init needs --slorb-block, the number of inputs in a block")
        return "mean"
    if low_rank is None:
        return init or "mean"
    if init in ("mean", "sum", "xavier"):
        raise ConfigError(f"--low-rank fits SLoRB too, so --slorb-init {init} would be without effect; leave it out")
    return init or "closed_form"


def check_prior(prior: str) -> None:
    """Refuse, before anything is loaded, a prior that is neither a criterion nor can be a mask."""
    from ..criteria import get_criterion, known_criteria

    if prior not in known_criteria() and "/" not in prior and not Path(prior).exists():
        get_criterion(prior)  # raises, and names the known ones


# --- resuming -------------------------------------------------------------------------------------------------------
def _check_same(config: NMSparseConfig, checkpoint: Path) -> None:
    """Refuse to go on with other settings of the mask than those the run was started with."""
    stored = read_json(checkpoint / "adapter_config.json") or {}
    for name in _FIXED_FIELDS:
        now, then = getattr(config, name), stored.get(name)
        then = tuple(then) if isinstance(now, tuple) and isinstance(then, list) else then
        if now != then:
            raise ConfigError(f"{checkpoint} was trained with {name}={then!r}, now it is {now!r}; repeat the options")


# --- the run --------------------------------------------------------------------------------------------------------
def _train(trainer: NMSparseTrainer, checkpoint: Path | None) -> bool:
    """Train to the end; `False` if Ctrl-C stopped it, after a checkpoint was saved.

    Several processes stop at once: Ctrl-C reaches each at another step, and they could not agree on one.
    """
    from ..ops.machine import keep_freed_memory
    from .interrupt import StopAtStep

    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    start = str(checkpoint) if checkpoint else None
    if process_count() > 1:
        trainer.train(resume_from_checkpoint=start)
        return True
    with StopAtStep() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=start)
    return not stop.wanted
