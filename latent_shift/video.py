"""Writes clips: GIF, MP4, WebP, a PNG sheet of the frames, or a folder of frames.

A clip is a uint8 array (T, H, W, 3). No writer ever resizes: MP4 pads odd sizes, and ``scale``
repeats pixels. Every file is written under another name in the same folder and renamed when it is
complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".gif", ".mp4", ".webp", ".png")
_ROW = 16  # frames in one row of a sheet; longer clips go in rows of half as many
_GAP = 2  # pixels between the frames of a sheet
_PAPER = (255, 255, 255)
_INK = (32, 32, 32)


def write_clip(
    frames: np.ndarray,
    path: str | os.PathLike[str],
    *,
    fps: float = 8.0,
    scale: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one clip in the format that the suffix of ``path`` names.

    Args:
        frames: uint8 (T, H, W, 3).
        path: ``.gif``, ``.mp4``, ``.webp``; ``.png`` for a sheet of all frames; no suffix for a
            folder of frames ``00000.png``, ``00001.png``, ... Missing parent folders are made.
        fps: Frames a second; of no effect on PNG.
        scale: Shows every pixel as ``scale`` x ``scale`` pixels.
        metadata: Stored as JSON in the file's comment (GIF, MP4, PNG).

    Returns:
        The path written.

    Raises:
        ValueError: On another suffix, shape, dtype, fps or scale.
        FileExistsError: If the folder of frames exists and is not empty.
        OSError: If the path cannot be written.
    """
    path = Path(path)
    write = _writer(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(
            f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}"
        )
    if not fps > 0:
        raise ValueError(f"fps must be > 0, got {fps}")
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number >= 1, got {scale!r}")
    if scale > 1:
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    comment = json.dumps(dict(metadata), ensure_ascii=False) if metadata else ""
    with _complete_or_absent(path) as partial:
        write(np.ascontiguousarray(frames), partial, float(fps), comment)
    return path


def write_sheet(
    clips: Sequence[np.ndarray],
    path: str | os.PathLike[str],
    *,
    captions: Sequence[str] | None = None,
    scale: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one PNG that shows several clips, uint8 (T, H, W, 3) each, one below the other under
    their captions.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a sheet is a .png file, got {path.name!r}")
    parts = []
    for index, clip in enumerate(clips):
        tile = _sheet(np.asarray(clip).repeat(scale, axis=1).repeat(scale, axis=2))
        parts.append(_captioned(tile, captions[index]) if captions else tile)
    width = max(part.shape[1] for part in parts)
    height = sum(part.shape[0] for part in parts) + 4 * _GAP * (len(parts) - 1)
    sheet = np.full((height, width, 3), _PAPER, np.uint8)
    top = 0
    for part in parts:
        sheet[top : top + part.shape[0], : part.shape[1]] = part
        top += part.shape[0] + 4 * _GAP
    comment = json.dumps(dict(metadata), ensure_ascii=False) if metadata else ""
    with _complete_or_absent(path) as partial:
        Image.fromarray(sheet).save(partial, format="PNG", pnginfo=_png_comment(comment))
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks that :func:`write_clip` could write ``path``, and leaves nothing behind.

    Raises:
        ValueError: If no format belongs to the suffix.
        OSError: If the folder cannot be made or written to, or ``path`` is in the way.
    """
    path = Path(path)
    _writer(path)
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        what = "is a folder" if path.suffix else "exists already and is not empty"
        raise FileExistsError(f"{path} {what}: choose another name")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {folder} is not a folder")
    try:
        # permission bits say too little (read-only mounts, root), so a file is really made
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error} ({folder})") from None


def numbered(path: str | os.PathLike[str], index: int, count: int) -> Path:
    """The name of clip ``index`` of ``count`` clips: ``a.mp4`` alone, else ``a-00.mp4``,
    ``a-01.mp4``, ...
    """
    path = Path(path)
    if count == 1:
        return path
    digits = max(2, len(str(count - 1)))
    return path.with_name(f"{path.stem}-{index:0{digits}d}{path.suffix}")


def _writer(path: Path) -> Callable[[np.ndarray, Path, float, str], None]:
    writers = {".gif": _gif, ".mp4": _mp4, ".webp": _webp, ".png": _png, "": _folder}
    try:
        return writers[path.suffix.lower()]
    except KeyError:
        raise ValueError(
            f"cannot write {path.name!r}: the suffix must be one of {', '.join(SUFFIXES)}, "
            "or none for a folder of frames"
        ) from None


@contextlib.contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a name to write to; it becomes ``path`` if the body ends well, and vanishes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        if partial.is_dir() and path.is_dir() and any(path.iterdir()):
            raise FileExistsError(f"{path} exists already and is not empty: choose another name")
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _durations(count: int, fps: float, ticks: int) -> list[int]:
    """Durations in 1/ticks seconds whose running sum stays within half a tick of the true time."""
    ends = [round(ticks * (index + 1) / fps) for index in range(count)]
    return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]


def _gif(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    from PIL import Image

    # one palette for all frames and no dithering: with a palette or a dither pattern per frame a
    # still background flickers
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(
        256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[10 * ticks for ticks in _durations(len(frames), fps, 100)],
        loop=0,
        comment=comment.encode(),
    )


def _webp(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=_durations(len(frames), fps, 1000),
        loop=0,
        lossless=True,
    )


def _mp4(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    try:
        import av
        from av.video.reformatter import ColorRange, Colorspace
    except ImportError:
        raise ImportError("writing .mp4 needs PyAV: pip install av (or write a .gif)") from None

    height, width = frames.shape[1:3]
    # yuv420p has one chroma sample for 2 x 2 pixels
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = 1 / rate
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts = index
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _png(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    from PIL import Image

    Image.fromarray(_sheet(frames)).save(path, format="PNG", pnginfo=_png_comment(comment))


def _folder(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    from PIL import Image

    path.mkdir()
    for index, frame in enumerate(frames):
        name = path / f"{index:05d}.png"
        Image.fromarray(frame).save(name, pnginfo=_png_comment(comment))


def _png_comment(comment: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if comment:
        info.add_itxt("Comment", comment)
    return info


def _sheet(frames: np.ndarray) -> np.ndarray:
    """Lays the frames (T, H, W, 3) out in reading order; (H', W', 3)."""
    count, height, width, _ = frames.shape
    columns = count if count <= _ROW else _ROW // 2
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _PAPER, np.uint8
    )
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _captioned(sheet: np.ndarray, caption: str) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    left, top, right, bottom = font.getbbox(caption)
    strip = Image.new("RGB", (max(sheet.shape[1], int(right) + 8), int(bottom) + 8), _PAPER)
    ImageDraw.Draw(strip).text((4, 4), caption, fill=_INK, font=font)
    body = np.full((sheet.shape[0], strip.width, 3), _PAPER, np.uint8)
    body[:, : sheet.shape[1]] = sheet
    return np.concatenate([np.asarray(strip), body])
