"""What data sets of captioned clips have in common: the clip, the format of a run, the error."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Reason = Literal[
    "no caption", "empty caption", "missing file", "unreadable", "too short", "damaged row"
]
REASONS: tuple[str, ...] = get_args(Reason)


class ClipError(Exception):
    """A clip that cannot be used; training skips it, counts it under `reason` and logs it.

    Attributes:
        name: the clip's name in its source.
        reason: one of `REASONS`.
        detail: what was found, for the reader of the log.
    """

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        self.name, self.reason, self.detail = name, reason, detail
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))


@dataclass(frozen=True)
class ClipFormat:
    """What every clip of a run looks like.

    Attributes:
        num_frames: frames in a clip; 1 takes one frame of a video, or an image.
        height, width: in pixels.
        fps: resample the video to this rate before frames are taken; None: as stored.
        stride: take every `stride`-th frame after that.
        crop: the largest window of the format's proportions, in the middle or anywhere.
        flip: mirror half of the clips sideways; off, for captions speak of left and right.
        start: the frames taken lie in the middle of the video, or anywhere in it.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None = None
    stride: int = 1
    crop: Literal["center", "random"] = "random"
    flip: bool = False
    start: Literal["middle", "random"] = "random"

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps must be > 0, or None for the rate as stored, got {self.fps!r}")
        for name, choices in (("crop", ("center", "random")), ("start", ("middle", "random"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def span(self) -> int:
        """Frames, at the format's rate, from the first one taken to the last."""
        return (self.num_frames - 1) * self.stride + 1

    def augmentations(self) -> list[str]:
        """The settings by which two readings of one clip differ, as words for a message."""
        values = {"crop='random'": self.crop, "start='random'": self.start, "flip=True": self.flip}
        return [words for words, value in values.items() if value in ("random", True)]


@dataclass(frozen=True)
class Clip:
    """A captioned clip: `frames` (T, 3, H, W) uint8; `fps` is 0 for a still image."""

    frames: Tensor
    caption: str
    name: str
    fps: float


@dataclass(frozen=True)
class Facts:
    """What a clip is before anything is taken from it; `fps` is 0 for a still image."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class Row:
    """One clip as training takes it: pixels, or what a cache holds instead; shapes as in `Batch`
    without the first dimension.
    """

    caption: str
    pixels: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None


class ClipSource(ABC):
    """A list of captioned clips that are read by number; `kind` and `where` are for readers."""

    kind: str
    where: str
    form: ClipFormat | None = None  # where only one can be read
    unmatched: Sequence[str] = ()  # captions that belong to no clip

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, form: ClipFormat, generator: torch.Generator) -> Clip:
        """Reads clip `index` in `form`; start, crop and flip are functions of `generator` alone.

        Raises:
            ClipError: the clip is unreadable or too short, or has no caption.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Names a clip for readers of the log."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Raises `ClipError` if there is none."""

    @abstractmethod
    def facts(self, index: int, thorough: bool = False) -> Facts:
        """Looks at a clip without taking frames from it; `thorough` decodes all of it.

        Raises:
            ClipError: the clip is unreadable.
        """

    @abstractmethod
    def digest(self, index: int) -> bytes:
        """Changes when the clip or its caption does."""

    def check(self, form: ClipFormat) -> None:  # noqa: B027 (most sources have every format)
        """Raises `ValueError` if no clip of this source can be read in `form`, whatever it is."""

    def row(self, index: int, form: ClipFormat, generator: torch.Generator) -> Row:
        clip = self.read(index, form, generator)
        return Row(clip.caption, pixels=clip.frames.float().div_(127.5).sub_(1.0))


def seeded(*key: Any) -> torch.Generator:
    """A generator that is a function of `key` alone, the same on every machine and version."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    # 32 bits are what the Mersenne twister's seeding takes of a seed
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
