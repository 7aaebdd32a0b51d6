"""Data sets that are folders: clips with a text file of the same name, images, frame folders."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .items import File, Item, ItemSource, Media, utf8

CAPTION = ".txt"
FRAMES_CAPTION = "caption.txt"


def folder_source(
    root: Path, *, images_as_clips: bool, frames_only: bool, frames_fps: float
) -> ItemSource:
    """Finds the clips below `root`, in the order of their names.

    A folder of images, none of which has a caption of its own, is a frame folder: one clip, whose
    caption is `caption.txt` in it or `<folder>.txt` beside it. In the topmost folder images are
    clips, unless there is a `caption.txt`.

    Args:
        images_as_clips: whether images outside frame folders are clips of one frame.
        frames_only: take frame folders alone.
        frames_fps: the rate of frame folders.
    """
    items: list[Item] = []
    texts: set[Path] = set()
    used: set[Path] = set()
    walked: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in walked:  # links can lead back
            subfolders.clear()
            continue
        walked.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(Path(folder, name) for name in names if not name.startswith("."))
        texts.update(file for file in files if file.suffix.lower() == CAPTION)
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        if images and _are_frames(Path(folder), images, root):
            inside = Path(folder, FRAMES_CAPTION)
            beside = Path(folder).with_name(Path(folder).name + CAPTION)
            caption = inside if inside.is_file() else beside
            media = Media("frames", tuple(map(File, images)), frames_fps)
            items.append(_item(Path(folder), root, media, caption))
            used.add(caption)
            images = []
        if frames_only:
            continue
        for file in [*videos, *(images if images_as_clips else [])]:
            caption = file.with_suffix(CAPTION)
            items.append(_item(file, root, Media.of(File(file), file.suffix), caption))
            used.add(caption)
    items.sort(key=lambda item: item.name)
    unmatched = sorted(path.relative_to(root).as_posix() for path in texts - used)
    return ItemSource("frames" if frames_only else "folder", str(root), items, unmatched)


def _item(path: Path, root: Path, media: Media, caption: Path) -> Item:
    name = path.relative_to(root).as_posix() if path != root else path.name
    return Item(name, media, partial(utf8, File(caption)))


def _are_frames(folder: Path, images: list[Path], root: Path) -> bool:
    if (folder / FRAMES_CAPTION).is_file():
        return True
    return folder != root and not any(image.with_suffix(CAPTION).is_file() for image in images)
