"""The writers: every format holds the frames, time and words it was given, or is not there."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from PIL import Image

from latent_shift import video

WORDS = {"prompt": "a réd circle ○", "seed": 3}


@pytest.fixture
def clip() -> np.ndarray:
    """A red square that moves 4 pixels a frame over navy; 9 frames of 33 x 47, both odd."""
    frames = np.empty((9, 33, 47, 3), np.uint8)
    frames[:] = (20, 20, 80)
    for index, frame in enumerate(frames):
        frame[10:22, 4 * index : 4 * index + 12] = (230, 40, 40)
    return frames


def read(path) -> tuple[np.ndarray, list[int]]:
    """Frames (T, H, W, 3) and durations in milliseconds of an animation."""
    image = Image.open(path)
    frames, durations = [], []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
        durations.append(image.info["duration"])
    return np.stack(frames), durations


def test_mp4(clip, tmp_path):
    path = video.write_clip(clip, tmp_path / "a.mp4", fps=12.5, metadata=WORDS)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12.5 and stream.frames == 9
        assert container.duration / 1e6 == pytest.approx(9 / 12.5, abs=1e-3)
        assert json.loads(container.metadata["comment"]) == WORDS
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    # padded to even, never resized: every pixel is where it was
    assert frames.shape == (9, 34, 48, 3)
    error = np.abs(frames[:, :33, :47].astype(int) - clip)
    assert np.median(error) <= 3 and error.mean() < 6


def test_gif(clip, tmp_path):
    path = video.write_clip(clip, tmp_path / "a.gif", fps=8, metadata=WORDS)
    frames, durations = read(path)
    assert np.array_equal(frames, clip)
    # a GIF counts hundredths: 12.5 of them is 12 and 13 in turns, and no drift
    assert sum(durations) == pytest.approx(1000 * 9 / 8, abs=5)
    assert set(durations) == {120, 130}
    assert json.loads(Image.open(path).info["comment"]) == WORDS
    assert Image.open(path).info["loop"] == 0


def test_webp(clip, tmp_path):
    frames, durations = read(video.write_clip(clip, tmp_path / "a.webp", fps=24))
    assert np.array_equal(frames, clip)
    assert sum(durations) == 375


def test_many_colours_survive_a_gif_nearly(tmp_path):
    ramp = np.arange(64, dtype=np.uint8) * 4
    frame = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), -1)
    frames, _ = read(
        video.write_clip(np.stack([frame, frame[::-1], frame[:, ::-1]]), tmp_path / "a.gif")
    )
    assert np.abs(frames[0].astype(int) - frame).mean() < 8


@pytest.mark.parametrize(("count", "columns", "rows"), [(9, 9, 1), (16, 16, 1), (20, 8, 3)])
def test_sheet_has_every_frame_in_reading_order(count, columns, rows, tmp_path):
    frames = np.empty((count, 6, 10, 3), np.uint8)
    frames[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    path = video.write_clip(frames, tmp_path / "a.png", metadata=WORDS)
    image = Image.open(path)
    sheet = np.asarray(image)
    assert sheet.shape == (rows * 8 - 2, columns * 12 - 2, 3)
    for index in range(count):
        top, left = index // columns * 8, index % columns * 12
        assert (sheet[top : top + 6, left : left + 10] == index).all()
    assert json.loads(image.info["Comment"]) == WORDS


def test_folder_of_frames(clip, tmp_path):
    path = video.write_clip(clip, tmp_path / "frames")
    names = sorted(entry.name for entry in path.iterdir())
    assert names == [f"{index:05d}.png" for index in range(9)]
    assert np.array_equal(np.asarray(Image.open(path / "00004.png")), clip[4])
    with pytest.raises(FileExistsError, match="not empty"):
        video.write_clip(clip, path)
    assert sorted(entry.name for entry in path.iterdir()) == names


def test_scale_repeats_pixels(clip, tmp_path):
    frames, _ = read(video.write_clip(clip, tmp_path / "a.webp", scale=3))
    assert frames.shape == (9, 99, 141, 3)
    assert np.array_equal(frames[:, 1::3, 2::3], clip)


def test_sheet_of_clips_with_captions(clip, tmp_path):
    path = video.write_sheet([clip, clip[:3]], tmp_path / "a.png", captions=["one", "two"])
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 9 * 49 - 2
    assert sheet.shape[0] > 2 * 33
    assert (sheet == (230, 40, 40)).all(-1).sum() == 12 * 12 * 12


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.webp", "a.png", "a"])
def test_a_writer_that_fails_leaves_what_was_there(name, clip, tmp_path, monkeypatch):
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"before")
    writer = video._writer(path)

    def fail(frames, partial, fps, comment):
        writer(frames, partial, fps, comment)
        assert partial.exists() and partial != path
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_writer", lambda _: fail)
    with pytest.raises(OSError, match="No space"):
        video.write_clip(clip, path)
    left = [entry.name for entry in tmp_path.iterdir()]
    assert left == ([name] if path.suffix else [])
    assert not path.suffix or path.read_bytes() == b"before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "a.avi"}, "suffix"),
        ({"fps": 0}, "fps"),
        ({"scale": 0}, "scale"),
        ({"scale": 1.5}, "scale"),
        ({"frames": np.zeros((3, 8, 8), np.uint8)}, "uint8"),
        ({"frames": np.zeros((3, 8, 8, 3))}, "uint8"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, "uint8"),
    ],
)
def test_wrong_arguments_are_named(change, message, clip, tmp_path):
    call = {"frames": clip, "path": "a.gif", **change}
    call["path"] = tmp_path / call["path"]
    with pytest.raises(ValueError, match=message):
        video.write_clip(**call)
    assert not list(tmp_path.iterdir())


def test_check_writable_asks_and_leaves_nothing(tmp_path):
    video.check_writable(tmp_path / "new" / "deeper" / "a.mp4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "b.gif").mkdir()
    with pytest.raises(NotADirectoryError):
        video.check_writable(tmp_path / "file" / "a.gif")
    with pytest.raises(FileExistsError):
        video.check_writable(tmp_path / "b.gif")
    with pytest.raises(FileExistsError):
        video.check_writable(tmp_path)
    with pytest.raises(ValueError, match="suffix"):
        video.check_writable(tmp_path / "a.xyz")
