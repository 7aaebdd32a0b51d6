"""Data sets of the Hugging Face `datasets` library, on disk or by name, read as bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from .items import Blob, File, Item, ItemSource, Media
from .tables import CAPTIONS, PATHS, column

# Of these images are told from videos where a row's path does not tell.
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"BM")


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def hub_source(where: str, *, path_column: str, caption_column: str) -> ItemSource:
    """Opens a folder that `save_to_disk` wrote, or `owner/name`, either with `:split` behind it.

    Raises:
        ImportError: there is no `datasets`.
        ValueError: it cannot be had, or has no such split or columns.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading {where!r} needs datasets: pip install 'latent-shift-video[data]'"
        ) from None
    name, _, split = where.partition(":") if re.fullmatch(r"[^:]+:\w+", where) else (where, "", "")
    try:
        if Path(name).is_dir():
            data: Any = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name)
    except Exception as error:  # of a dozen libraries
        raise ValueError(f"cannot load the data set {name!r}: {error}") from error
    if isinstance(data, dict):
        split = split or "train"
        if split not in data:
            raise ValueError(f"{name!r} has no split {split!r} but {', '.join(data)}")
        data = data[split]
    path_column = column(path_column, PATHS, data.column_names, "path_column", where)
    caption_column = column(caption_column, CAPTIONS, data.column_names, "caption_column", where)
    feature = type(data.features[path_column])
    if feature.__name__ in ("Video", "Image"):
        data = data.cast_column(path_column, feature(decode=False))
    return _HubSource(where, data, path_column, caption_column)


class _HubSource(ItemSource):
    def __init__(self, where: str, data: Any, path_column: str, caption_column: str) -> None:
        super().__init__("huggingface", where, [], [])
        self._data = data.select_columns([path_column, caption_column])
        self._path, self._caption = path_column, caption_column

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        return f"row {index}"

    def item(self, index: int) -> Item:
        row = self._data[index]
        value, caption = row[self._path], row[self._caption]
        content, path = (
            (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
        )
        name = self.name(index)
        if isinstance(value, bytes):
            content, path = value, None
        if content is not None:
            image = content[:4].startswith(_IMAGE_STARTS) or content[8:12] == b"WEBP"
            media = Media("image" if image else "video", (Blob(lambda: content),))
            return Item(name, media, caption)
        if not path:
            return Item(name, None, caption, ("damaged row", f"it has no {self._path}"))
        return Item(name, Media.of(File(Path(path)), Path(path).suffix), caption)

    def digest(self, index: int) -> bytes:
        # arrow's own fingerprint covers every row
        return hashlib.sha256(f"{self._data._fingerprint}/{index}".encode()).digest()
