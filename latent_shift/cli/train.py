"""``latent-shift train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import CommandError, check_folder, choice, why

STOPPED = 3  # exit status


def train(
    config: Annotated[
        str,
        typer.Argument(help="A TOML file, or the name of a recipe: embedded, finetune, reproduce."),
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
        list[str] | None,
        typer.Option(help="Of a recipe with stages, run only this one; repeatable."),
    ] = None,
    resume_from: Annotated[
        str,
        typer.Option(
            metavar="latest|previous",
            help="The checkpoint to go on from; previous sets the latest aside.",
        ),
    ] = "latest",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Train three steps, write nothing, and tell what it takes."),
    ] = False,
) -> int:
    """Trains a model, going on from whatever the output folder holds. Exit status 3: stopped before
    the end, with a checkpoint.
    """
    wrong = [item for item in overrides or () if "=" not in item]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form table.key=value")
    call: dict[str, Any] = {}
    if (resume_from := choice(resume_from, ("latest", "previous"), "--resume-from")) != "latest":
        call["resume_from"] = resume_from
    output = output or Path("runs") / Path(config).stem
    if not dry_run:
        check_folder(output)
    from .. import training
    from ..data.batches import NoClipsError
    from ..data.cache import CacheError
    from ..training.finetune_config import Finetune

    try:
        recipe = training.load_recipe(config, overrides or ())
    except (training.RecipeError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="CONFIG") from error
    tuning = isinstance(recipe, Finetune)
    if dry_run and not tuning:
        raise typer.BadParameter(
            "only a finetuning recipe can be tried: the stages of this one need each other's files",
            param_hint="--dry-run",
        )
    if tuning:
        _hush()
    try:
        if dry_run:
            from ..training.dry_run import dry_run as measure

            found = measure(recipe)
            if os.environ.get("RANK", "0") == "0":
                typer.echo(str(found))
            return 0
        done = training.train(
            recipe, output_dir=output, stages=stage, max_seconds=max_seconds, **call
        )
    except (
        CacheError,
        NoClipsError,
        training.TrainingError,
        training.DamagedCheckpointError,
        training.CheckpointWriteError,
        FloatingPointError,
    ) as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError, ImportError) as error:
        if stage:
            raise typer.BadParameter(str(error), param_hint="--stage") from error
        if not tuning or os.environ.get("LATENT_SHIFT_DEBUG"):
            raise
        raise CommandError(why(error)) from error
    return 0 if done else STOPPED


def _hush() -> None:
    """Keeps the libraries' notes on loading and on long captions off the progress bar."""
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
