"""Data sets that are WebDataset tars: members of one name are one clip and its caption."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .items import File, Item, ItemSource, Media, utf8
from .tables import CAPTIONS


def tar_source(
    tars: Sequence[Path], where: str, *, caption_column: str, images_as_clips: bool
) -> ItemSource:
    """Indexes the tars once; clips are then read from their places in them, in any order.

    The caption is the member `.txt`, or the entry `caption_column` of the member `.json`.

    Raises:
        ValueError: a tar is compressed, so that nothing in it has a place.
    """
    items: list[Item] = []
    for tar in tars:
        members, problem = _members(tar)
        groups: dict[str, dict[str, File]] = {}
        for member in members:
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")  # as WebDataset: up to the first dot
            if stem:
                file = File(tar, member.offset_data, member.size)
                groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})["." + suffix.lower()] = file
        for key, files in groups.items():
            item = _item(f"{tar.name}/{key}", files, caption_column, images_as_clips)
            if item is not None:
                items.append(item)
        if problem:
            items.append(Item(f"{tar.name} (end)", None, None, ("unreadable", problem)))
    return ItemSource("webdataset", where, items, [])


def _members(tar: Path) -> tuple[list[tarfile.TarInfo], str]:
    """The regular files of a tar that lie in it whole, and what is wrong with the rest of it."""
    size = tar.stat().st_size
    members: list[tarfile.TarInfo] = []
    problem = ""
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                members.append(member)
    except tarfile.ReadError as error:
        if not members:
            raise ValueError(
                f"{tar} is not an uncompressed tar ({error}); compressed ones have no index, "
                "uncompress them"
            ) from error
        problem = f"the tar is damaged: {error}"
    regular = [member for member in members if member.isreg()]
    whole = [member for member in regular if member.offset_data + member.size <= size]
    if len(whole) < len(regular):
        problem = problem or "the tar ends early"
    return whole, problem


def _item(
    name: str, files: dict[str, File], caption_column: str, images_as_clips: bool
) -> Item | None:
    caption: object = None
    if ".txt" in files:
        caption = partial(utf8, files[".txt"])
    elif ".json" in files:
        caption = partial(_entry, files[".json"], caption_column)
    for suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        if suffix in files:
            media = Media.of(files[suffix], suffix)
            keep = images_as_clips or media.kind == "video"
            return Item(name, media, caption) if keep else None
    if caption is None:
        return None
    problem = f"the tar holds only {', '.join(sorted(files))} of it"
    return Item(name, None, caption, ("missing file", problem))


def _entry(file: File, column: str) -> object:
    content = json.loads(utf8(file))
    if not isinstance(content, dict):
        return None
    names = CAPTIONS if column == CAPTIONS[0] else (column,)
    return next((content[name] for name in names if name in content), None)
