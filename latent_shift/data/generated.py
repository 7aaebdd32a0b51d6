"""Moving shapes as a data set like any other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import decode
from .base import Clip, ClipError, ClipFormat, ClipSource, Facts
from .moving_shapes import MovingShapes, render
from .sampling import Timeline, choose_frames, draw, rate

PREFIX = "moving-shapes"
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "seed": int,
    "clips": int,
    "split": str,
    "frames": int,
    "fps": float,
    "two_object_share": float,
}


class ShapesSource(ClipSource):
    """`clips` clips of `MovingShapes`, rendered at the format's size.

    A clip has `frames` frames, `fps` a second; for a format of one frame the caption says nothing
    of motion. Arguments as those of `MovingShapes`.
    """

    def __init__(
        self,
        seed: int = 0,
        clips: int = 1000,
        split: str = "train",
        frames: int = 16,
        fps: float = 8.0,
        two_object_share: float = 0.0,
    ) -> None:
        if clips < 1 or not fps > 0:
            raise ValueError(f"need clips >= 1 and fps > 0, got {clips} and {fps}")
        self.kind = PREFIX
        self.where = (
            f"{PREFIX}:seed={seed},clips={clips},split={split},frames={frames},fps={fps:g},"
            f"two_object_share={two_object_share:g}"
        )
        self._count = clips
        self._timeline = Timeline(np.arange(frames) / fps, frames / fps)
        self._shapes = MovingShapes(
            seed, num_frames=frames, split=split, two_object_share=two_object_share
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"shapes {self._shapes.seed}/{index}"

    def caption(self, index: int) -> str:
        return self._shapes.prompt(index).text

    def facts(self, index: int, thorough: bool = False) -> Facts:
        frames = self._shapes.num_frames
        return Facts(frames, self._timeline.fps, self._shapes.size, self._shapes.size)

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(f"{self.where}/{index}".encode()).digest()

    def read(self, index: int, form: ClipFormat, generator: torch.Generator) -> Clip:
        chance = draw(generator)
        picks = choose_frames(self._timeline, form, chance)
        if picks is None:
            need = decode.shortage(len(self._timeline.grid(form.fps)), form)
            raise ClipError(self.name(index), "too short", need)
        size = max(form.height, form.width)
        clip = render([self._shapes.truth(index)], size, picks.tolist())[0]
        arrays = (clip.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        frames = decode.fit(list(arrays), decode.SQUARE, self.name(index), form, chance)
        caption = self._shapes.prompt(index, image=form.num_frames == 1).text
        return Clip(frames, caption, self.name(index), rate(self._timeline, form))


def shapes_source(where: str) -> ShapesSource:
    """Opens `moving-shapes:seed=0,clips=1000,...`; the settings are `ShapesSource`'s arguments.

    Raises:
        ValueError: unknown settings, or values that they cannot have.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, where.removeprefix(PREFIX).removeprefix(":").split(",")):
        key, _, value = (word.strip() for word in part.partition("="))
        try:
            settings[key] = _SETTINGS[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{where!r}: {part!r} is not a setting of moving shapes; they are "
                f"{', '.join(f'{k}={kind.__name__}' for k, kind in _SETTINGS.items())}"
            ) from None
    return ShapesSource(**settings)
