"""Data sets that are tables of paths and captions: CSV, JSON Lines, Parquet."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .items import File, Item, ItemSource, Media

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# What the columns are called in the tables that are about, after the names asked for.
PATHS = ("path", "file_name", "file", "video", "image")
CAPTIONS = ("caption", "text", "prompt")

_Row = dict[str, Any] | str  # a row, or what is wrong with it


def table_source(
    table: Path, *, path_column: str, caption_column: str, images_as_clips: bool
) -> ItemSource:
    """Reads the table's rows, one clip each; paths are relative to the table's folder.

    Raises:
        ValueError: the table cannot be read at all, or has no such columns.
        ImportError: Parquet, and there is no pyarrow.
    """
    rows = list(_rows(table))
    keys = (key for row in rows if isinstance(row, dict) for key in row)
    columns = [key for key in dict.fromkeys(keys) if key]  # a CSV row that is too long has one None
    if not columns:
        raise ValueError(f"{table} has no rows" if not rows else f"{table}: {rows[0]}")
    path_column = column(path_column, PATHS, columns, "path_column", str(table))
    caption_column = column(caption_column, CAPTIONS, columns, "caption_column", str(table))
    items = []
    for number, row in enumerate(rows, 1):
        name = f"{table.name} row {number}"
        if isinstance(row, str):
            items.append(Item(name, None, None, ("damaged row", row)))
            continue
        where = row.get(path_column)
        if not isinstance(where, str) or not where.strip():
            items.append(Item(name, None, None, ("damaged row", f"it has no {path_column}")))
            continue
        path = table.parent / where.strip()
        media = Media.of(File(path), path.suffix)
        if media.kind == "image" and not images_as_clips:
            continue
        items.append(Item(where.strip(), media, row.get(caption_column)))
    return ItemSource("table", str(table), items, [])


def column(
    wanted: str, usual: Sequence[str], columns: Sequence[str], option: str, where: str
) -> str:
    """The column that is meant: the one wanted, or the usual one that there is.

    Raises:
        ValueError: there is no such column, or the wanted one is missing and not the usual.
    """
    if wanted in columns:
        return wanted
    if wanted == usual[0]:
        for name in usual:
            if name in columns:
                return name
    near = difflib.get_close_matches(wanted, columns, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"{where} has no column {wanted!r}, only {', '.join(map(repr, columns))}{hint} "
        f"Say which it is with {option}."
    )


def _rows(table: Path) -> Iterable[_Row]:
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        return _parquet(table)
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: {error}") from error
    if suffix == ".jsonl":
        return [_json(line) for line in text.split("\n") if line.strip()]
    try:
        return list(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
    except csv.Error as error:
        raise ValueError(f"{table} cannot be read: {error}") from error


def _json(line: str) -> _Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _parquet(table: Path) -> Iterable[_Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise ImportError(
            f"reading {table.name} needs pyarrow: pip install 'latent-shift-video[data]'"
        ) from None
    try:
        return read_table(table).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
