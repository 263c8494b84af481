# SPDX-License-Identifier: Apache-2.0
"""`--recipe FILE`: options of a verb from a YAML file; what is typed beside it comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import tell

_REMAINING = "hf_nmsparse.recipe"


def remaining_options(context: typer.Context) -> list[str]:
    """The recipe's options that are not the verb's own, as one would type them."""
    return context.meta.get(_REMAINING, [])


def read_recipe(file: Path) -> dict[str, Any]:
    """The options of a recipe by name, with underscores.

    Raises:
        ConfigError: if the file is not a YAML mapping of names to plain values.
    """
    import yaml

    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--recipe {file}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise ConfigError(f"--recipe {file}: expected lines 'option: value', got {type(recipe).__name__}")
    for name, value in recipe.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)):
            raise ConfigError(f"--recipe {file}: {name} must be a plain value or a list of them, got {value!r}")
    return {name.replace("-", "_"): value for name, value in recipe.items() if value is not None}


def _take(context: typer.Context, parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    if file is None:
        return None
    own = {
        option.lstrip("-").replace("-", "_"): given.name
        for given in context.command.params
        if given.param_type_name == "option" and given is not parameter
        for option in given.opts
    }
    try:
        recipe = read_recipe(file)
        if "model" in recipe:
            raise ConfigError(f"--recipe {file}: name the model on the command line, not in the recipe")
    except ConfigError as error:  # before the frame of the verb, which makes a line of errors
        tell(f"error: {error}", style="bold red")
        raise typer.Exit(2) from error
    context.default_map = {own[name]: value for name, value in recipe.items() if name in own}
    context.meta[_REMAINING] = [
        word
        for name, value in recipe.items()
        if name not in own
        for word in (f"--{name}", *map(_typed, value if isinstance(value, list) else [value]))
    ]
    return file


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        is_eager=True,
        callback=_take,
        help="YAML file of options, this verb's and the Trainer's; those that are typed beside it come first.",
    ),
]
