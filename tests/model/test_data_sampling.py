"""Which frames, and which part of them, a clip is made of."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_shift.data.clips import ClipError, ClipFormat
from latent_shift.data.decode import probe_video, read_images, read_video
from latent_shift.data.sampling import Draws, Timeline, choose_frames, window
from tests.model.clips import clock, middle, told, write_video

FIXED = partial(ClipFormat, height=16, width=16, crop="center", start="middle")


def read(path: Path, form: ClipFormat, seed: int = 0) -> tuple[torch.Tensor, float]:
    return read_video(lambda: str(path), path.name, form, middle(seed))


@pytest.mark.parametrize(
    "form, numbers, fps",
    [
        (FIXED(20), list(range(20)), 8.0),
        (FIXED(4), [8, 9, 10, 11], 8.0),
        (FIXED(4, stride=3), [5, 8, 11, 14], 8 / 3),
        (FIXED(10, fps=4.0), list(range(0, 20, 2)), 4.0),
        (FIXED(5, fps=4.0, stride=2), [0, 4, 8, 12, 16], 2.0),
        (FIXED(40, fps=16.0), [n // 2 for n in range(40)], 16.0),
        (FIXED(1), [9], 8.0),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi"])
def test_frames_taken_from_a_video(form, numbers, fps, suffix, tmp_path):
    codec = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}[suffix]
    path = write_video(tmp_path / f"a.{suffix}", clock(20), codec)
    frames, rate = read(path, form)
    assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, 16, 16)
    assert told(frames) == numbers
    assert rate == pytest.approx(fps, rel=2e-3)


def test_frames_are_taken_by_the_time_they_are_shown(tmp_path):
    # eighths of a second: five frames, then one that stands for a second, then five
    path = write_video(tmp_path / "a.mkv", clock(10), stamps=[0, 1, 2, 3, 4, 12, 13, 14, 15, 16])
    frames, _ = read(path, FIXED(9, fps=4.0))
    assert told(frames) == [0, 2, 4, 4, 4, 5, 5, 7, 9]


def test_a_start_far_into_a_video_gives_the_frames_of_a_full_decode(tmp_path):
    path = write_video(tmp_path / "a.mp4", clock(30), keys_every=6)
    form = ClipFormat(3, 16, 16, crop="center")
    starts = set()
    for seed in range(24):
        first, second, third = told(read(path, form, seed)[0])
        assert (second, third) == (first + 1, first + 2)
        starts.add(first)
    assert len(starts) > 8 and min(starts) >= 0 and max(starts) <= 27


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    frames=st.integers(1, 20),
    stride=st.integers(1, 4),
    fps=st.sampled_from([None, 3.0, 8.0, 12.5, 30.0]),
    u=st.floats(0, 1, exclude_max=True),
)
def test_every_choice_lies_in_the_video(count, frames, stride, fps, u):
    timeline = Timeline(np.arange(count) / 8, count / 8)
    form = ClipFormat(frames, 8, 8, fps=fps, stride=stride)
    picks = choose_frames(timeline, form, Draws(u, 0, 0, 0))
    length = count if fps is None else max(1, int(count / 8 * fps + 0.5))
    if length < (frames - 1) * stride + 1:
        assert picks is None
    else:
        assert picks is not None and len(picks) == frames
        assert picks.min() >= 0 and picks.max() < count and (np.diff(picks) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    target=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    aspect=st.sampled_from([Fraction(1), Fraction(8, 9), Fraction(4, 3)]),
    crop=st.sampled_from(["center", "random"]),
    u=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
def test_the_window_fills_one_side_and_keeps_proportions(size, target, aspect, crop, u):
    (height, width), form = size, ClipFormat(1, *target, crop=crop)
    left, top, right, bottom = window(height, width, aspect, form, Draws(0, *u, 0))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    shown = (right - left) * float(aspect) / (bottom - top)
    assert shown == pytest.approx(form.width / form.height)


def ramp(tmp_path: Path, height: int = 20, width: int = 60) -> Path:
    """An image whose red is its column and whose green is its row, four levels a pixel."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8) * 4
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1)).save(path := tmp_path / "a.png")
    return path


def image(path: Path, form: ClipFormat, seed: int = 0) -> torch.Tensor:
    frames, fps = read_images([lambda: str(path)], path.name, form, middle(seed))
    assert fps == 0 and len(frames) == 1
    return frames[0]


def test_crops_are_exact_where_nothing_is_resized(tmp_path):
    path = ramp(tmp_path)
    columns = set()
    for seed in range(12):
        frame = image(path, ClipFormat(1, 20, 20), seed)
        first = int(frame[0, 0, 0]) // 4
        columns.add(first)
        assert (frame[0] == (torch.arange(20) + first) * 4).all()
        assert (frame[1] == torch.arange(20)[:, None] * 4).all()
    assert len(columns) > 4
    centred = image(path, ClipFormat(1, 20, 20, crop="center"))
    assert int(centred[0, 0, 0]) == 20 * 4


def test_flips_are_drawn_only_where_asked_for(tmp_path):
    path = ramp(tmp_path)
    for flip, directions in ((False, {True}), (True, {True, False})):
        form = ClipFormat(1, 20, 20, crop="center", flip=flip)
        frames = [image(path, form, seed) for seed in range(16)]
        assert {bool(frame[0, 0, 0] < frame[0, 0, -1]) for frame in frames} == directions


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(path := tmp_path / "a.png")
    frame = image(path, ClipFormat(1, 16, 16))
    assert (frame.int() - 127).abs().max() <= 16  # without a filter: 0 or 255


def test_pixels_that_are_not_square_and_phones_held_upright(tmp_path):
    frames = np.zeros((2, 16, 32, 3), np.uint8)
    frames[:, :, :16] = 255  # the left half
    wide = write_video(tmp_path / "wide.mp4", frames, aspect=Fraction(1, 2))
    # shown 16 x 16: all of it fits
    shown, _ = read(wide, FIXED(2))
    assert shown[..., 2:6].float().mean() > 240 and shown[..., 10:14].float().mean() < 15
    turned = write_video(tmp_path / "turned.mp4", frames, rotation=90)
    assert (
        probe_video(lambda: str(turned), "t").height,
        probe_video(lambda: str(turned), "t").width,
    ) == (32, 16)
    shown, _ = read(turned, ClipFormat(2, 32, 16))
    # a quarter turn counter-clockwise takes the left side to the bottom
    assert shown[..., 20:28, :].float().mean() > 240 and shown[..., 4:12, :].float().mean() < 15


def test_transparency_is_white_and_images_stand_as_the_camera_says(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = (10, 20, 30, 255)
    Image.fromarray(clear).save(path := tmp_path / "a.png")
    frame = image(path, ClipFormat(1, 16, 16))
    assert frame[:, 0, 0].tolist() == [10, 20, 30] and frame[:, -1, -1].tolist() == [255] * 3
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(clear).convert("RGB").save(path := tmp_path / "b.png", exif=exif)
    assert image(path, ClipFormat(1, 16, 16))[:, -1, -1].tolist() == [10, 20, 30]


def test_too_short_says_by_how_much(tmp_path):
    path = write_video(tmp_path / "a.mp4", clock(6))
    with pytest.raises(ClipError, match=r"too short \(7 frames at 4 fps are needed, it has 3\)"):
        read(path, FIXED(4, fps=4.0, stride=2))
    with pytest.raises(ClipError, match=r"too short \(2 frames are needed, it has 1\)"):
        read_images([lambda: str(path)], "a", FIXED(2), middle())


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0},
        {"height": 1.5},
        {"width": True},
        {"stride": 0},
        {"fps": 0.0},
        {"fps": float("nan")},
        {"crop": "left"},
        {"start": "end"},
    ],
)
def test_formats_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipFormat(**{"num_frames": 1, "height": 8, "width": 8, **wrong})
