# SPDX-License-Identifier: Apache-2.0
"""`nmsparse eval`: what a dense, masked or packed model has lost: perplexity, agreement with the dense model, tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import verb
from .options import (
    TEXT_HELP,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    MaskOption,
    MaskRevisionOption,
    MismatchOption,
    ModelArgument,
    TaskOption,
    listed,
)

TextOption = Annotated[str | None, typer.Option("--text", metavar="TEXT", help=TEXT_HELP)]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a dataset.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Use only the first N tokens.")]
StrideOption = Annotated[
    int | None,
    typer.Option(
        "--stride",
        min=1,
        help="Slide the window by N tokens instead, so that each token is scored once, and give word perplexity too. Not "
        "comparable with the papers' numbers.",
    ),
]
AgreementOption = Annotated[
    bool,
    typer.Option(
        "--agreement", help="On TEXT: how far it predicts what the dense model predicts, and each layer's error."
    ),
]
SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite", metavar="NAMES", help="Tasks of a paper: wanda, ast, maskllm, patch (by lm-eval), kick (LLM-KICK)."
    ),
]
TasksOption = Annotated[
    list[str] | None, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness by name.")
]
IncludeOption = Annotated[
    Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with YAML tasks of your own for --tasks.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Folder of JSONL files for --suite kick; by default its datasets on the Hub."
    ),
]
ShotsOption = Annotated[
    int | None, typer.Option("--shots", min=0, help="Solved examples before each item; by default 0 for suites.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task.")]
NewTokensOption = Annotated[
    int | None, typer.Option("--new-tokens", min=1, help="Tokens of each summary and answer of --suite kick.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible API whose --judge-model rates the texts of --suite kick; its key: OPENAI_API_KEY.",
    ),
]
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="Name of the model at --judge.")
]
DenseOption = Annotated[
    str | None,
    typer.Option(
        "--dense", metavar="MODEL", help="The dense model to compare with; by default the base that is known."
    ),
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Windows or items a forward pass.")]
RecordOption = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Measure the dense base too, and write both into results.json and the card of the local folder MODEL.",
    ),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Results file to write or add to, for `nmsparse report`."),
]


def evaluate(
    model: ModelArgument,
    text: TextOption = None,
    mask: MaskOption = None,
    split: SplitOption = "test",
    sequence_length: LengthOption = None,
    max_tokens: MaxTokensOption = None,
    stride: StrideOption = None,
    agreement: AgreementOption = False,
    suite: SuiteOption = None,
    tasks: TasksOption = None,
    include_path: IncludeOption = None,
    data: DataOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    new_tokens: NewTokensOption = None,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    dense: DenseOption = None,
    batch_size: BatchOption = None,
    mask_revision: MaskRevisionOption = None,
    task: TaskOption = None,
    allow_base_mismatch: MismatchOption = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    record: RecordOption = False,
    output: ResultsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure a model, a model under a mask, a mask (on the base it names) or a packed model: text, agreement, tasks.

    Perplexity follows the pruning papers: documents joined by a blank line, windows without overlap. Agreement and tasks are
    measured of the dense model too, in the same run: the base of a mask, the one that results.json names, or --dense.

    Example: nmsparse eval my-packed-model --text Salesforce/wikitext:wikitext-2-raw-v1

    Example: nmsparse eval my-mask --text law.txt --agreement --record

    Example: nmsparse eval my-packed-model --suite maskllm,kick --data my-items --limit 200 --output eval.json
    """
    with verb(json_output, lower="--batch-size or --sequence-length") as answer:
        from .eval_run import Asked, Source, run

        asked = Asked(
            text=text,
            split=split,
            sequence_length=sequence_length,
            max_tokens=max_tokens,
            stride=stride,
            agreement=agreement,
            suites=listed(suite),
            tasks=listed(tasks),
            include_path=include_path,
            data=data,
            shots=shots,
            limit=limit,
            new_tokens=new_tokens,
            judge_url=judge,
            judge_model=judge_model,
            batch_size=batch_size,
        )
        source = Source(model, mask, mask_revision, task, allow_base_mismatch, dense, dtype, device)
        run(answer, asked, source, record, output)
