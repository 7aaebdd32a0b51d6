"""Captioned clips in files, for tests of what reads them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from latent_shift.data import MovingShapes
from latent_shift.data.clips import ClipFormat

FRAMES, SIZE, FPS = 10, 32, 8.0
WHOLE = ClipFormat(FRAMES, SIZE, SIZE, crop="center", start="middle")


def shapes(count: int, size: int = SIZE) -> list[tuple[np.ndarray, str]]:
    """Frames (T, H, W, 3) uint8 and captions."""
    data = MovingShapes(0, num_frames=FRAMES, size=size)
    drawn = [data.sample(index) for index in range(count)]
    return [
        ((clip.frames.permute(0, 2, 3, 1) * 255).round().byte().numpy(), clip.prompt.text)
        for clip in drawn
    ]


def clock(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    """A clip whose frame `t` is of gray level `8 * t`."""
    levels = np.arange(frames, dtype=np.uint8) * 8
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def told(frames: torch.Tensor) -> list[int]:
    """The frame numbers that a clip of `clock` shows."""
    return (frames.float().mean((1, 2, 3)) / 8).round().int().tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    *,
    stamps: list[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    keys_every: int = 250,
) -> Path:
    """Writes a video of 8 frames a second, or of frames at `stamps` eighths of a second."""
    with av.open(str(path), "w") as container:
        tick = Fraction(1, int(FPS))
        stream = container.add_stream(codec, rate=int(FPS), options={"g": str(keys_every)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", tick
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = stamps[index] if stamps else index
            frame.time_base = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def middle(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
