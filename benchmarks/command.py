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

    Rows of another machine, other sources or other options are set aside, for ratios hold within
    one run.

    Args:
        where: The machine, of `timing.environment`.
        args: The command's options; ``json`` and ``resume`` are of `add_output_options`.

    Raises:
        ValueError: ``resume`` without ``json``.
    """

    _SAME = ("device", "threads", "capability", "torch", "triton", "sources", "options")

    def __init__(self, where: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
        options = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if value is not None and key not in ("json", "resume", "plot")
        }
        self.where = where | {"options": options}
        self.path: Path | None = args.json
        self.console = console
        self.rows: Rows = []
        if args.resume and self.path is None:
            raise ValueError("--resume goes on with the file that --json names: give --json too")
        if args.resume and self.path.exists():
            self._take(self.path)

    def _take(self, path: Path) -> None:
        found = json.loads(path.read_text())
        there = found["environment"]
        other = [key for key in self._SAME if there.get(key) != self.where[key]]
        if other:
            aside = path.with_suffix(f".{there['date'].replace(':', '')}.json")
            os.replace(path, aside)
            self.console.print(
                f"{path} is of another {' and another '.join(other)}: set aside as {aside.name}, "
                "measuring anew"
            )
            return
        # what failed is tried again
        failed = {row["case"] for row in found["rows"] if row["status"] != "ok"}
        self.where = there
        self.rows = [row for row in found["rows"] if row["case"] not in failed]

    def measure(self, cases: Sequence[Any], measure: Callable[[Any], Rows]) -> None:
        """Measures the cases that have no rows yet, behind a progress bar."""
        done = {row["case"] for row in self.rows}
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                name = str(case)
                progress.update(task, description=name)
                if name not in done:
                    self.rows += [{"case": name, **row} for row in measure(case)]
                    self._write()
                progress.advance(task)

    def report(self, table: Table) -> int:
        """Prints the table; returns the command's exit code, 1 where a comparison failed."""
        self.console.print(table)
        return int(any(row["status"] == "failed" for row in self.rows))

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        text = json.dumps({"environment": self.where, "rows": self.rows}, indent=1)
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)
