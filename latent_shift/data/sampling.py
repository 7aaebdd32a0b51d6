"""Which frames of a video, and which window of them, a clip is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from .base import ClipFormat


@dataclass(frozen=True)
class Draws:
    """What chance decides for one clip, each uniform in [0, 1)."""

    start: float
    x: float
    y: float
    flip: float


def draw(generator: torch.Generator) -> Draws:
    """Takes as many numbers from `generator` for every format, so that what follows is the same."""
    return Draws(*torch.rand(4, generator=generator, dtype=torch.float64).tolist())


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        times: (N,) seconds since the first frame, ascending.
        duration: seconds, the last frame's own time included; 0 for a still image.
    """

    times: np.ndarray
    duration: float

    @property
    def fps(self) -> float:
        return len(self.times) / self.duration if self.duration > 0 else 0.0

    def grid(self, fps: float | None) -> np.ndarray:
        """The frame shown at every tick of a clock of `fps`: (M,) numbers of stored frames.

        It is the frame nearest in time, for containers round their time stamps. A rate above the
        stored one repeats frames. None is the stored rate.
        """
        count = len(self.times)
        if fps is None or self.duration <= 0:
            return np.arange(count)
        ticks = np.arange(length(self.duration, fps)) / fps
        middles = (self.times[1:] + self.times[:-1]) / 2
        return np.searchsorted(middles, ticks, side="left")


def length(duration: float, fps: float) -> int:
    """Frames of a video of `duration` seconds at `fps`."""
    return max(1, math.floor(duration * fps + 0.5))


def choose_frames(timeline: Timeline, form: ClipFormat, chance: Draws) -> np.ndarray | None:
    """The stored frames, (T,), that make a clip of `form`; None if the video is too short."""
    grid = timeline.grid(form.fps)
    free = len(grid) - form.span
    if free < 0:
        return None
    start = free // 2 if form.start == "middle" else int(chance.start * (free + 1))
    return grid[start : start + form.span : form.stride]


def rate(timeline: Timeline, form: ClipFormat) -> float:
    """Frames a second of a clip that `choose_frames` chose; 0 for a still image."""
    if timeline.duration <= 0:
        return 0.0
    return (form.fps or timeline.fps) / form.stride


def window(
    height: int, width: int, aspect: Fraction, form: ClipFormat, chance: Draws
) -> tuple[float, float, float, float]:
    """The largest window of the format's proportions in a frame: left, top, right, bottom.

    Args:
        height, width: of the frame in stored pixels.
        aspect: width over height of a stored pixel.
    """
    wide, high = Fraction(width), width * aspect * form.height / form.width
    if high > height:
        wide, high = height * form.width / (form.height * aspect), Fraction(height)
    left, top = (
        math.floor(free / 2) if form.crop == "center" else int(u * (math.floor(free) + 1))
        for free, u in ((width - wide, chance.x), (height - high, chance.y))
    )
    return left, top, float(left + wide), float(top + high)
