"""Reads frames of videos with PyAV and of images with Pillow, no more of them than a clip needs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .base import ClipError, ClipFormat, Facts
from .sampling import Draws, Timeline, choose_frames, draw, rate, window

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# A path, or what makes the file again from its start: a video is opened twice.
Opener = Callable[[], str | io.BytesIO]
SQUARE = Fraction(1)


def read_video(
    open_file: Opener, name: str, form: ClipFormat, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Reads the frames that `form` and `generator` choose.

    Returns:
        (T, 3, H, W) uint8 and their rate.

    Raises:
        ClipError: the video is unreadable or too short.
    """
    chance = draw(generator)
    with _damage(name):
        packets = _packets(open_file)
        found = None
        if packets is not None:
            picks = _choose(packets.timeline, name, form, chance)
            found = _decode(open_file, packets, picks)
        if packets is None or found is None:
            # packets without a time or without a picture of their own: the decoder knows better
            packets = _decoded(open_file)
            picks = _choose(packets.timeline, name, form, chance)
            found = _decode(open_file, packets, picks)
        if found is None:
            raise ClipError(name, "unreadable", "frames are missing or damaged")
        arrays = [found[int(packets.stamps[pick])] for pick in picks]
    return fit(arrays, packets.aspect, name, form, chance), rate(packets.timeline, form)


def read_images(
    open_files: Sequence[Opener],
    name: str,
    form: ClipFormat,
    generator: torch.Generator,
    fps: float = 0.0,
) -> tuple[Tensor, float]:
    """As `read_video`, for frames that are images, `fps` of them a second (0: one still image)."""
    chance = draw(generator)
    timeline = _regular(len(open_files), fps)
    picks = _choose(timeline, name, form, chance)
    with _damage(name):
        arrays = [_image(open_files[pick]) for pick in picks]
    return fit(arrays, SQUARE, name, form, chance), rate(timeline, form)


def probe_video(open_file: Opener, name: str, thorough: bool = False) -> Facts:
    """What a video holds, from its packets and its first frame; `thorough` decodes all of it.

    Raises:
        ClipError: the video is unreadable.
    """
    with _damage(name):
        packets = _packets(open_file)
        if thorough or packets is None:
            packets = _decoded(open_file)
        found = _decode(open_file, packets, np.arange(1))
        if found is None:
            raise ClipError(name, "unreadable", "the first frame is missing or damaged")
        ((height, width, _),) = [array.shape for array in found.values()]
    return Facts(len(packets.stamps), packets.timeline.fps, height, width)


def probe_images(
    open_files: Sequence[Opener], name: str, fps: float = 0.0, thorough: bool = False
) -> Facts:
    """As `probe_video`, for frames that are images."""
    with _damage(name):
        shapes = [_image(item).shape for item in (open_files if thorough else open_files[:1])]
    _check_sizes(shapes, name)
    height, width, _ = shapes[0]
    return Facts(len(open_files), fps, height, width)


@dataclass(frozen=True)
class _Packets:
    """Time stamps of a video's frames, ascending; `keys` are those that decoding can begin at."""

    stamps: np.ndarray
    keys: np.ndarray
    timeline: Timeline
    aspect: Fraction


def _timed(
    stamps: list[int], keys: list[int], last: int, stream: VideoStream, aspect: Fraction
) -> _Packets:
    if not stamps:
        raise ValueError("it has no frames")
    base = stream.time_base or Fraction(1, 1000)
    array = np.unique(np.array(stamps, np.int64))
    gap = last or (int(np.median(np.diff(array))) if len(array) > 1 else 0)
    # a video of one frame that says no duration is a still image
    duration = float((int(array[-1]) - int(array[0]) + gap) * base)
    timeline = Timeline((array - array[0]) * float(base), duration)
    return _Packets(array, np.array(sorted(keys), np.int64), timeline, aspect)


def _packets(open_file: Opener) -> _Packets | None:
    """Reads the time stamps without decoding; None where packets do not carry them."""
    stamps, keys, durations = [], [], {}
    with _video(open_file) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end; what an edit list cuts away
                continue
            if packet.is_corrupt:
                raise ValueError("the file ends early")
            if packet.pts is None:
                return None
            stamps.append(packet.pts)
            durations[packet.pts] = packet.duration or 0
            if packet.is_keyframe:
                keys.append(packet.pts)
        last = durations[max(stamps)] if stamps else 0
        return _timed(stamps, keys, last, stream, _aspect(stream))


def _decoded(open_file: Opener) -> _Packets:
    """As `_packets`, from decoding everything."""
    stamps, last = [], 0
    with _video(open_file) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} is damaged")
            stamps.append(_stamp(frame, count, stream))
            last = frame.duration or 0
        return _timed(stamps, [], last, stream, _aspect(stream))


def _stamp(frame: VideoFrame, count: int, stream: VideoStream) -> int:
    if frame.pts is not None:
        return frame.pts
    ticks = 1 / ((stream.average_rate or Fraction(25)) * (stream.time_base or Fraction(1, 1000)))
    return round(count * ticks)


def _decode(
    open_file: Opener, packets: _Packets, picks: np.ndarray
) -> dict[int, np.ndarray] | None:
    """Decodes the picked frames, (H, W, 3) uint8 by time stamp; None if one does not come."""
    wanted = {int(packets.stamps[pick]) for pick in picks}
    earlier = packets.keys[(packets.keys > packets.stamps[0]) & (packets.keys <= min(wanted))]
    if len(earlier):
        try:
            if (found := _collect(open_file, wanted, int(earlier[-1]))) is not None:
                return found
        except av.FFmpegError:
            pass  # files whose index misleads decode from the start
    return _collect(open_file, wanted, None)


def _collect(open_file: Opener, wanted: set[int], key: int | None) -> dict[int, np.ndarray] | None:
    found: dict[int, np.ndarray] = {}
    with _video(open_file) as (container, stream):
        if key is not None:
            container.seek(key, stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                return None
            stamp = _stamp(frame, count, stream)
            if count == 0 and stamp > min(wanted):
                return None
            if stamp in wanted:
                found[stamp] = _upright(frame)
                if len(found) == len(wanted):
                    return found
    return None


def _upright(frame: VideoFrame) -> np.ndarray:
    array = frame.to_ndarray(format="rgb24")
    return np.rot90(array, round(frame.rotation / 90) % 4)  # the angle is counter-clockwise


def _aspect(stream: VideoStream) -> Fraction:
    return stream.sample_aspect_ratio or SQUARE


@contextmanager
def _video(open_file: Opener) -> Iterator[tuple[InputContainer, VideoStream]]:
    # titles and comments of any encoding are none of our business
    with av.open(open_file(), "r", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("no decoder knows its codec")
        # the pool reads several clips at once, and small ones decode faster so
        stream.codec_context.thread_count = 1
        yield container, stream


def _image(open_file: Opener) -> np.ndarray:
    with Image.open(open_file()) as file:
        image: Any = ImageOps.exif_transpose(file)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
        return np.asarray(image.convert("RGB"))


def _regular(count: int, fps: float) -> Timeline:
    if fps <= 0:
        return Timeline(np.zeros(count), 0.0)
    return Timeline(np.arange(count) / fps, count / fps)


def _choose(timeline: Timeline, name: str, form: ClipFormat, chance: Draws) -> np.ndarray:
    picks = choose_frames(timeline, form, chance)
    if picks is None:
        raise ClipError(name, "too short", shortage(len(timeline.grid(form.fps)), form))
    return picks


def shortage(frames: int, form: ClipFormat) -> str:
    at = f" at {form.fps:g} fps" if form.fps else ""
    return f"{form.span} frames{at} are needed, it has {frames}"


def _check_sizes(shapes: Sequence[tuple[int, ...]], name: str) -> None:
    if len(set(shapes)) > 1:
        sizes = ", ".join(sorted({f"{shape[1]}x{shape[0]}" for shape in shapes}))
        raise ClipError(name, "unreadable", f"its frames differ in size: {sizes}")


def fit(
    arrays: Sequence[np.ndarray], aspect: Fraction, name: str, form: ClipFormat, chance: Draws
) -> Tensor:
    """Cuts one window out of all frames and resizes it, antialiased: (T, 3, H, W) uint8."""
    _check_sizes([array.shape for array in arrays], name)
    height, width, _ = arrays[0].shape
    box = window(height, width, aspect, form, chance)
    left, top, right, bottom = box
    size = (form.width, form.height)
    if (right - left, bottom - top) == size:
        rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))
        fitted = [array[rows, columns] for array in arrays]
    else:
        fitted = [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(array)).resize(
                    size, Image.Resampling.BICUBIC, box=box
                )
            )
            for array in arrays
        ]
    stacked = np.stack(fitted)
    if form.flip and chance.flip < 0.5:
        stacked = stacked[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Tells of whatever the decoders raise on a damaged file as a `ClipError`."""
    try:
        yield
    except ClipError:
        raise
    except FileNotFoundError as error:
        raise ClipError(name, "missing file", str(error.filename or "")) from error
    except UnidentifiedImageError as error:
        raise ClipError(name, "unreadable", "not an image that Pillow knows") from error
    except Exception as error:  # whatever the bytes of a damaged file made a decoder do
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClipError(name, "unreadable", " ".join(str(text).split())) from error
