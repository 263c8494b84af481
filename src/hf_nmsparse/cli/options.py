# SPDX-License-Identifier: Apache-2.0
"""Options that more than one verb takes, each declared once."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Dtypes to load a model in; `auto` is the one it is stored in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def listed(names: Iterable[str] | None) -> list[str]:
    """Names given as repeated or comma-separated options, one by one."""
    return [name.strip() for entry in names or () for name in entry.split(",") if name.strip()]


# --- models and folders ---------------------------------------------------------------------------------------------
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder of the model.")]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write, whole or not at all.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Write even into a folder that holds something else.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Dtype to load the model in; auto: as stored.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="For example cuda:1; by default a GPU if there is one."),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the repo.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Subfolder, where a repo holds masks of several tasks.")
]

# --- published masks ------------------------------------------------------------------------------------------------
MaskOption = Annotated[
    str | None, typer.Option("--mask", metavar="MASK", help="Folder or Hub repo of a published mask.")
]
MaskRevisionOption = Annotated[str | None, typer.Option("--mask-revision", help="Revision of the mask's repo.")]
MismatchOption = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept base weights other than those the mask was made for.")
]

# --- what is pruned, and how ----------------------------------------------------------------------------------------
PatternOption = Annotated[str, typer.Option("--pattern", metavar="N:M", help="N weights kept of each M.")]
RecordedPatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern", metavar="N:M", help="Of a masked model; by default what its results.json names, else 2:4."
    ),
]
DenseLayersOption = Annotated[
    list[str] | None,
    typer.Option("--dense-layers", metavar="NAMES", help="Layers to leave unpruned, comma-separated or repeated."),
]
RelaxationOption = Annotated[
    str,
    typer.Option(
        "--relaxation",
        help="How a mask is trained. By logits over frozen weights: candidates, one for each possible mask of a group; "
        "elementwise or straight_through, one for each weight. By training the weights: ast, pdp, bdwp, transposable.",
    ),
]
ScheduleOption = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="How temperature and logit scale go from start to end: linear, cosine, exponential; or constant.",
    ),
]
PriorConfidenceOption = Annotated[
    bool,
    typer.Option(
        "--prior-confidence",
        help="Start each group the more firmly the surer its criterion was (magnitude, wanda, polish).",
    ),
]
LogitsDtypeOption = Annotated[
    str,
    typer.Option("--logits-dtype", help="Of the logits and their gradients: float32, or bfloat16 for half the bytes."),
]
InBackwardOption = Annotated[
    bool,
    typer.Option(
        "--optimizer-in-backward",
        help="Step in the backward pass, so that no gradients are held; trains with --max_grad_norm 0, no accumulation.",
    ),
]
OptimizerStatesOption = Annotated[
    str | None,
    typer.Option(
        "--mask-optimizer-states",
        help="AdamW's states of the logits: float32, 8 bytes a logit; or 8bit, 2 bytes.",
    ),
]
SlorbOption = Annotated[
    int | None,
    typer.Option("--slorb-block", metavar="K", help="Add SLoRB beside the mask: a value a row and K inputs."),
]
ProjectionOption = Annotated[
    bool, typer.Option("--slorb-train-projection", help="Train which inputs SLoRB sums up, too.")
]
LowRankOption = Annotated[
    int | None, typer.Option("--low-rank", metavar="R", help="Add a low-rank term beside the mask.")
]
DeltaOption = Annotated[
    int | None,
    typer.Option("--delta-rank", metavar="R", help="Train the kept weights too, by a low-rank change under the mask."),
]

# --- texts ----------------------------------------------------------------------------------------------------------
TEXT_HELP = "Text file, folder, .jsonl, or dataset as owner/name:config."
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length", min=2, help="Tokens a window; by default 2048, or the model's context if shorter."
    ),
]

CalibrationOption = Annotated[
    str | None,
    typer.Option("--calibration", metavar="TEXT", help=TEXT_HELP),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the choice of windows.")]

# --- answers --------------------------------------------------------------------------------------------------------
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]
