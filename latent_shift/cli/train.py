"""``latent-shift train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import check_folder

TIME_IS_UP = 3  # exit status


def train(
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a recipe of the package.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="Changes to the recipe."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/ and the recipe's name.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Stop with a checkpoint after this long.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Run only this stage; repeatable.")
    ] = None,
) -> int:
    """Trains a model, going on from whatever the output folder holds. Exit status 3: the time ran
    out first.
    """
    wrong = [item for item in overrides or () if "=" not in item]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form table.key=value")
    output = output or Path("runs") / Path(config).stem
    check_folder(output)
    from ..training import RecipeError, load_recipe
    from ..training import train as run

    try:
        recipe = load_recipe(config, overrides or ())
    except (RecipeError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="CONFIG") from error
    try:
        done = run(recipe, output_dir=output, stages=stage, max_seconds=max_seconds)
    except ValueError as error:
        if not stage:
            raise
        raise typer.BadParameter(str(error), param_hint="--stage") from error
    return 0 if done else TIME_IS_UP
