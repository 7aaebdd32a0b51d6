"""What the benchmarks' commands have in common: choosing by name, a progress bar, rows that outlive
a run that is cut off."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
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


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where the rows go; see :class:`Results`."""
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write environment and rows, case by case"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the rows that --json's file has"
    )


class Results:
    """The rows of a run, written after every case: a run that is cut off leaves what it has, and
    the same command with ``--resume`` goes on there.

    Args:
        where: The machine, of `timing.environment`.
        args: The command's options; ``json`` and ``resume`` are of `add_output_options`.

    Raises:
        ValueError: The file's rows are of another machine, commit or choice of options.
    """

    # Ratios between rows hold only where all of this is the same.
    _SAME = ("device", "threads", "capability", "torch", "triton", "commit", "options")

    def __init__(self, where: dict[str, Any], args: argparse.Namespace) -> None:
        elsewhere = ("json", "resume", "plot", "peers")
        options = {key: value for key, value in vars(args).items() if value is not None}
        self.where = where | {
            "options": {key: value for key, value in options.items() if key not in elsewhere}
        }
        self.path: Path | None = args.json
        self.rows: Rows = []
        if args.resume and self.path is None:
            raise ValueError("--resume goes on with the file that --json names: give --json too")
        if args.resume and self.path.exists():
            found = json.loads(self.path.read_text())
            for key in self._SAME:
                there, here = found["environment"].get(key), self.where[key]
                if there != here:
                    raise ValueError(
                        f"--resume: {self.path} was measured with {key} {there}, and this is "
                        f"{here}: leave --resume out to measure anew"
                    )
            self.where, self.rows = found["environment"], found["rows"]

    def measure(
        self, cases: Sequence[Any], measure: Callable[[Any], Rows], console: Console
    ) -> None:
        """Measures the cases that have no rows yet, behind a progress bar."""
        done = {row["case"] for row in self.rows}
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                name = str(case)
                progress.update(task, description=name)
                if name not in done:
                    self.rows += [{"case": name, **row} for row in measure(case)]
                    self._write()
                progress.advance(task)

    def report(self, table: Table, console: Console) -> int:
        """Prints the table; returns the command's exit code, 1 where a comparison failed."""
        console.print(table)
        return int(any(row["status"] == "failed" for row in self.rows))

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        text = json.dumps({"environment": self.where, "rows": self.rows}, indent=1)
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)
