"""One captioned clip of a data set: where its bytes are, how it is read, what identifies it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from . import decode
from .base import Clip, ClipError, ClipFormat, ClipSource, Facts, Reason

# Bytes at either end of a file that identify it together with its size: a container's own tables
# of contents stand there, and change with everything between.
_END = 1 << 16


@dataclass(frozen=True)
class File:
    """A file, or `size` bytes of it from `offset` on, as in a tar."""

    path: Path
    offset: int = 0
    size: int | None = None

    def open(self) -> str | io.BytesIO:
        """What PyAV and Pillow open."""
        if self.size is None:
            # FFmpeg takes what stands before a colon in a relative name for a protocol
            return os.path.abspath(self.path)
        return io.BytesIO(self.content())

    def content(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(-1 if self.size is None else self.size)
        if self.size is not None and len(data) < self.size:
            raise OSError(f"{self.path} ends early")
        return data

    def digest(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                file.seek(self.offset)
                head = file.read(min(_END, size))
                file.seek(self.offset + max(0, size - _END))
                tail = file.read(min(_END, size))
        except OSError:
            return b"unreadable"
        return hashlib.sha256(b"%d/" % size + head + tail).digest()


@dataclass(frozen=True)
class Blob:
    """Bytes that something else holds."""

    read: Callable[[], bytes]

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.content())

    def content(self) -> bytes:
        return self.read()

    def digest(self) -> bytes:
        return hashlib.sha256(self.content()).digest()


@dataclass(frozen=True)
class Media:
    """A video, a still image, or a video whose frames are images, `fps` of them a second."""

    kind: Literal["video", "image", "frames"]
    files: tuple[File | Blob, ...]
    fps: float = 0.0

    @classmethod
    def of(cls, file: File | Blob, suffix: str) -> Media:
        return cls("image" if suffix.lower() in decode.IMAGE_SUFFIXES else "video", (file,))

    def read(
        self, name: str, form: ClipFormat, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        if self.kind == "video":
            return decode.read_video(self.files[0].open, name, form, generator)
        return decode.read_images([f.open for f in self.files], name, form, generator, self.fps)

    def probe(self, name: str, thorough: bool) -> Facts:
        if self.kind == "video":
            return decode.probe_video(self.files[0].open, name, thorough)
        return decode.probe_images([f.open for f in self.files], name, self.fps, thorough)


@dataclass(frozen=True)
class Item:
    """A clip as its data set lists it.

    Attributes:
        name: the clip's name, unique in its data set.
        media: None where `problem` says why there is none.
        caption: the text, or what fetches it; anything but text counts as none.
        problem: reason and detail by which the clip is known to be unusable.
    """

    name: str
    media: Media | None
    caption: object
    problem: tuple[Reason, str] | None = None

    def text(self) -> str:
        """The caption.

        Raises:
            ClipError: there is none, or it is empty.
        """
        try:
            text = self.caption() if callable(self.caption) else self.caption
        except FileNotFoundError as error:
            raise ClipError(self.name, "no caption", f"there is no {error.filename}") from error
        except (OSError, ValueError) as error:  # not UTF-8, not JSON
            raise ClipError(self.name, "no caption", " ".join(str(error).split())) from error
        if text is None:
            raise ClipError(self.name, "no caption")
        if not isinstance(text, str):
            raise ClipError(self.name, "no caption", f"not a text but {type(text).__name__}")
        if not text.strip():
            raise ClipError(self.name, "empty caption")
        return text.strip()

    def found(self) -> Media:
        """The media.

        Raises:
            ClipError: there is none.
        """
        if self.problem is not None:
            raise ClipError(self.name, *self.problem)
        assert self.media is not None  # without a problem there is media
        return self.media

    def digest(self) -> bytes:
        try:
            text = self.text()
        except ClipError as error:
            text = error.reason
        digests = [f.digest() for f in self.media.files] if self.media else []
        fps = self.media.fps if self.media else 0.0
        return hashlib.sha256(repr((self.name, text, digests, fps)).encode()).digest()


class ItemSource(ClipSource):
    """A data set that is a list of items."""

    def __init__(self, kind: str, where: str, items: list[Item], unmatched: list[str]) -> None:
        self.kind, self.where, self.unmatched = kind, where, unmatched
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        return self._items[index]

    def name(self, index: int) -> str:
        return self.item(index).name

    def caption(self, index: int) -> str:
        return self.item(index).text()

    def facts(self, index: int, thorough: bool = False) -> Facts:
        item = self.item(index)
        return item.found().probe(item.name, thorough)

    def digest(self, index: int) -> bytes:
        return self.item(index).digest()

    def read(self, index: int, form: ClipFormat, generator: torch.Generator) -> Clip:
        item = self.item(index)
        media, caption = item.found(), item.text()
        frames, fps = media.read(item.name, form, generator)
        return Clip(frames, caption, item.name, fps)


def utf8(file: File) -> str:
    return file.content().decode("utf-8-sig")
