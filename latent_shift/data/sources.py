"""Finds out what kind of data set a path or name is, and opens it."""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from .base import ClipSource

Kind = Literal["auto", "folder", "frames", "table", "webdataset", "huggingface", "moving-shapes"]

_log = logging.getLogger("latent_shift.data")


def open_source(
    where: str | Path,
    *,
    kind: Kind = "auto",
    caption_column: str = "caption",
    path_column: str = "path",
    images_as_clips: bool = True,
    frames_fps: float = 8.0,
) -> ClipSource:
    """Opens a data set of captioned clips; nothing is decoded yet.

    Args:
        where: a folder of clips with captions beside them or of frame folders, a table (`.csv`,
            `.tsv`, `.jsonl`, `.parquet`), a tar, a folder or a `*` pattern of tars, a folder that
            `datasets` saved, a name on the Hugging Face Hub, or `moving-shapes:seed=0,clips=1000`.
        kind: what it is; "auto" finds out.
        caption_column, path_column: of tables and data sets; of the JSON in tars.
        images_as_clips: whether single images count as clips of one frame.
        frames_fps: the rate of frame folders, which do not tell theirs.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: nothing there is a clip, or a table has no such column.
        ImportError: the kind needs a library that is not installed.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not frames_fps > 0:
        raise ValueError(f"frames_fps must be > 0, got {frames_fps}")
    name = str(where)
    kind = _detect(name) if kind == "auto" else kind
    columns = {"path_column": path_column, "caption_column": caption_column}
    if kind == "moving-shapes":
        from .generated import shapes_source

        return shapes_source(name)
    if kind == "huggingface":
        from .hub import hub_source

        return _not_empty(hub_source(name, **columns))
    if kind == "webdataset":
        from .tars import tar_source

        return _not_empty(
            tar_source(
                _tars(name),
                name,
                caption_column=caption_column,
                images_as_clips=images_as_clips,
            )
        )
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"there is no data set {name!r}")
    if kind == "table":
        from .tables import table_source

        table = path if path.is_file() else _table_in(path)
        if table is None:
            raise ValueError(f"{name!r} holds no table named metadata.csv, .jsonl or .parquet")
        return _not_empty(table_source(table, images_as_clips=images_as_clips, **columns))
    if not path.is_dir():
        raise ValueError(f"{name!r} is a file, but a data set of kind {kind!r} is a folder")
    from .folders import folder_source

    source = folder_source(
        path,
        images_as_clips=images_as_clips,
        frames_only=kind == "frames",
        frames_fps=frames_fps,
    )
    if source.unmatched:
        _log.warning(
            "%s: captions that belong to no clip: %d, such as %s",
            name,
            len(source.unmatched),
            source.unmatched[0],
        )
    return _not_empty(source)


def fingerprint(source: ClipSource, progress: Callable[[int], None] | None = None) -> str:
    """Hexadecimal digest of all clips and captions of a source and their order.

    Of a file its size and both ends count, not its time or place: a copied data set keeps its
    fingerprint.

    Args:
        progress: called with 1 after every clip.
    """
    digest = hashlib.sha256(f"{source.kind}/{len(source)}".encode())
    for index in range(len(source)):
        digest.update(source.digest(index))
        if progress:
            progress(1)
    return digest.hexdigest()


def _detect(name: str) -> Kind:
    from .generated import PREFIX
    from .hub import is_saved
    from .tables import TABLE_SUFFIXES

    path = Path(name)
    if name == PREFIX or name.startswith(f"{PREFIX}:"):
        return "moving-shapes"
    if path.is_dir():
        if is_saved(path):
            return "huggingface"
        if any(path.glob("*.tar")):
            return "webdataset"
        return "table" if _table_in(path) else "folder"
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table"
        if path.suffix.lower() == ".tar":
            return "webdataset"
        raise ValueError(
            f"{name!r} is no data set: expected a folder, a table ({', '.join(TABLE_SUFFIXES)}) or "
            "a .tar"
        )
    if "*" in name and name.endswith(".tar"):
        return "webdataset"
    if is_saved(Path(name.rpartition(":")[0])) or re.fullmatch(
        r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:\w+)?", name
    ):
        return "huggingface"
    raise FileNotFoundError(f"there is no data set {name!r}")


def _table_in(folder: Path) -> Path | None:
    from .tables import TABLE_SUFFIXES

    tables = [folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
    return next((table for table in tables if table.is_file()), None)


def _tars(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    found = path.glob("*.tar") if path.is_dir() else map(Path, glob.glob(name))
    tars = sorted(found)
    if not tars:
        raise FileNotFoundError(f"there is no tar {name!r}")
    return tars


def _not_empty(source: ClipSource) -> ClipSource:
    from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    if not len(source):
        raise ValueError(
            f"{source.where!r} holds no clips of kind {source.kind!r}: expected "
            f"{', '.join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))} with their captions"
        )
    return source
