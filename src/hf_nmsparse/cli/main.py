# SPDX-License-Identifier: Apache-2.0
"""The `nmsparse` command: its verbs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .compress import compress
from .demo import demo
from .diff import diff
from .doctor import doctor
from .eval import evaluate
from .export import export
from .import_mask import import_mask
from .inspect import inspect
from .merge import merge
from .plan import plan
from .prune import prune
from .pull import pull
from .push import push
from .report import report
from .train import TRAIN_CONTEXT, train
from .verify import verify

app = typer.Typer(
    name="nmsparse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_nmsparse {__version__}")
        raise typer.Exit


@app.callback()
def _nmsparse(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """N:M sparsity for the Hugging Face stack: learn a 2:4 mask on a frozen model, share it, pack it, load it.

    Exit codes: 0 ok, 1 a check failed (broken groups, wrong base, damaged file), 2 wrong use, 130 stopped by Ctrl-C.
    """


def _add(name: str, verb: Callable[..., None], **settings: object) -> None:
    app.command(name, no_args_is_help=True, **settings)(verb)


# In the order in which one uses them; the demo goes through all of it.
app.command("demo")(demo)
_add("plan", plan)
_add("prune", prune)
_add("train", train, context_settings=TRAIN_CONTEXT)
_add("merge", merge)
_add("compress", compress)
_add("export", export)
_add("eval", evaluate)
_add("report", report)
app.command("bench")(bench)
_add("push", push)
_add("pull", pull)
_add("inspect", inspect)
_add("import-mask", import_mask)
_add("diff", diff)
_add("verify", verify)
app.command("doctor")(doctor)  # without arguments: of this machine


def main() -> None:
    """Run `nmsparse` with the arguments of this process."""
    app()
