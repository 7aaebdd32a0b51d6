"""What the benchmarks' commands have in common: choosing by name, a progress bar, the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Rows = list[dict[str, Any]]


def choose(
    args: argparse.Namespace,
    option: str,
    choices: Iterable[str],
    default: Iterable[str],
    listed: Iterable[str] | None = None,
) -> list[str]:
    """The choices that an option names, in their own order.

    Args:
        default: Taken where the option was not given.
        listed: What the error offers, if not every choice.

    Raises:
        ValueError: On an unknown name, with the choices.
    """
    given = getattr(args, option)
    given = [given] if isinstance(given, str) else given
    unknown = set(given or ()) - set(choices)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"--{option} {names}: unknown, choose from {', '.join(listed or choices)}")
    return [choice for choice in choices if choice in (given or default)]


def make_console() -> Console:
    """A console that does not break lines in a pipe or a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def progress_bar(console: Console) -> Progress:
    """A bar that disappears when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def machine(where: dict[str, Any]) -> str:
    """One line on the machine of `timing.environment`."""
    return (
        f"{where['device']} ({where['capability']}), {where['threads']} CPU threads, torch "
        f"{where['torch']}, {where['commit'] or 'no commit'}, {where['date']}"
    )


def report(
    rows: Rows, table: Table, where: dict[str, Any], console: Console, path: Path | None
) -> int:
    """Prints the table and writes the rows; returns the command's exit code, 1 where one failed."""
    console.print(table)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    return int(any(row["status"] == "failed" for row in rows))
