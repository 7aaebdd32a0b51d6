"""The ``latent-shift`` command.

Heavy libraries are imported inside the commands, so that ``--help`` and mistakes in the arguments
answer at once. Everything that can be checked is checked before a model is loaded. Errors are one
line on stderr: exit status 2 for wrong usage, 1 for the rest; ``LATENT_SHIFT_DEBUG=1`` shows the
traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import data, evaluate, generate, train
from .common import CommandError

_INTERRUPTED = 130

app = typer.Typer(
    name="latent-shift",
    help="Text to video by Latent-Shift: an image diffusion model, a channel shift, and no new "
    "parameters.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"latent-shift {__version__}")
        raise typer.Exit


@app.command()
def info() -> None:
    """Shows which kernels were built, and which serve on this machine."""
    from latent_shift_kernels.__main__ import info as kernels

    typer.echo(f"latent_shift {__version__}\n{kernels()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(arguments, prog_name="latent-shift", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:  # whatever it is, the user gets one line and no traceback
        if os.environ.get("LATENT_SHIFT_DEBUG"):
            raise
        if hasattr(error, "format_message"):  # typer's own, which older versions take from click
            return _fail(error.format_message(), 2)
        if isinstance(error, CommandError):
            return _fail(str(error), 1)
        kind = type(error).__name__
        return _fail(f"{kind}: {error} (LATENT_SHIFT_DEBUG=1 shows where)", 1)
    if status == _INTERRUPTED:  # typer's answer to Ctrl-C
        return _fail("interrupted", status)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"latent-shift: {' '.join(message.split())}", file=sys.stderr)
    return status
