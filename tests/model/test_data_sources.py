"""Every layout of captioned clips is read, and what is damaged is told and left out."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_shift.data import MovingShapes
from latent_shift.data.clips import (
    Batches,
    ClipError,
    ClipFormat,
    ClipSource,
    fingerprint,
    open_source,
)
from latent_shift.data.moving_shapes import render
from latent_shift.data.report import inspect
from latent_shift.video import write_clip
from tests.model.clips import FPS, FRAMES, SIZE, WHOLE, clock, middle, shapes, told, write_video

DRAWN = shapes(3)


def videos(folder: Path, suffixes: tuple[str, ...] = (".mp4",) * 3) -> list[Path]:
    paths = [folder / f"clip{index}{suffix}" for index, suffix in enumerate(suffixes)]
    for (frames, _), path in zip(DRAWN, paths, strict=True):
        if path.suffix in (".mp4", ".gif"):
            write_clip(frames, path, fps=FPS)
        else:
            write_video(path, frames, "libvpx-vp9" if path.suffix == ".webm" else "mpeg4")
    return paths


def captioned(paths: list[Path]) -> None:
    for (_, caption), path in zip(DRAWN, paths, strict=True):
        path.with_suffix(".txt").write_text(f"{caption}\n")


def pairs(folder: Path) -> Path:
    captioned(videos(folder))
    return folder


def other_pairs(folder: Path) -> Path:
    (folder / "deep").mkdir()
    captioned(videos(folder / "deep", (".gif", ".webm", ".avi")))
    return folder


def more_pairs(folder: Path) -> Path:
    captioned(videos(folder, (".mkv", ".mov", ".gif")))
    return folder


def comma_table(folder: Path, delimiter: str = ",", suffix: str = ".csv") -> Path:
    with open(folder / f"list{suffix}", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "caption", "path"])
        for path, (_, caption) in zip(videos(folder), DRAWN, strict=True):
            writer.writerow([path.stem, f"{caption}\nin two lines, quoted", path.name])
    return folder / f"list{suffix}"


def tab_table(folder: Path) -> Path:
    return comma_table(folder, "\t", ".tsv")


def json_lines(folder: Path) -> Path:
    rows = [
        json.dumps({"file_name": path.name, "text": caption})
        for path, (_, caption) in zip(videos(folder), DRAWN, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")
    return folder  # found by its name


def parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    columns = {
        "path": [str(path) for path in videos(folder)],
        "caption": [caption for _, caption in DRAWN],
    }
    write_table(Table.from_pydict(columns), folder / "list.parquet")
    return folder / "list.parquet"


def tars(folder: Path) -> Path:
    (source := folder / "source").mkdir()
    (out := folder / "out").mkdir()
    captioned(videos(source))
    (source / "clip1.txt").unlink()
    (source / "clip1.json").write_text(json.dumps({"caption": DRAWN[1][1], "id": 1}))
    for name, stems in (("a", ("clip0", "clip1")), ("b", ("clip2",))):
        with tarfile.open(out / f"{name}.tar", "w") as tar:
            for stem in stems:
                for path in sorted(source.glob(f"{stem}.*")):
                    tar.add(path, arcname=f"./some/{path.name}")
    return out


def frame_folders(folder: Path) -> Path:
    for index, (frames, caption) in enumerate(DRAWN):
        write_clip(frames, folder / f"clip{index}")
        beside = folder / f"clip{index}.txt"
        (folder / f"clip{index}" / "caption.txt" if index else beside).write_text(caption)
    return folder


def hub_paths(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {
        "video": [str(path) for path in videos(folder)],
        "caption": [caption for _, caption in DRAWN],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return folder / "saved"


def hub_bytes(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    columns = {
        "video": [{"bytes": path.read_bytes(), "path": None} for path in videos(folder)],
        "caption": [caption for _, caption in DRAWN],
    }
    data = datasets.Dataset.from_dict(columns)
    data = data.cast_column("video", datasets.Video(decode=False))
    datasets.DatasetDict({"test": data}).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}:test"


LAYOUTS: list[tuple[Callable, str, float]] = [
    (pairs, "folder", 8),
    (other_pairs, "folder", 20),
    (more_pairs, "folder", 20),
    (comma_table, "table", 8),
    (tab_table, "table", 8),
    (json_lines, "table", 8),
    (parquet, "table", 8),
    (tars, "webdataset", 8),
    (frame_folders, "folder", 0),
    (hub_paths, "huggingface", 8),
    (hub_bytes, "huggingface", 8),
]


@pytest.mark.parametrize("write, kind, tolerance", LAYOUTS, ids=[x[0].__name__ for x in LAYOUTS])
def test_a_layout_gives_back_what_was_written(write, kind, tolerance, tmp_path, caplog):
    where = write(tmp_path)
    source = open_source(where)
    assert (source.kind, len(source)) == (kind, 3)
    for index, (frames, caption) in enumerate(DRAWN):
        clip = source.read(index, WHOLE, middle())
        assert clip.caption.split("\n")[0] == caption
        assert clip.fps == pytest.approx(FPS)
        error = np.abs(clip.frames.permute(0, 2, 3, 1).numpy().astype(int) - frames)
        assert error.mean() <= tolerance
    assert len({source.name(index) for index in range(3)}) == 3
    report = inspect(source, WHOLE, thorough=True)
    assert (report.videos, report.captions, report.usable) == (3, 3, 3)
    assert (report.frames, report.widths, report.heights) == (
        (FRAMES,) * 2,
        (SIZE,) * 2,
        (SIZE,) * 2,
    )
    assert fingerprint(source) == fingerprint(open_source(where))
    assert not caplog.records


def test_names_and_titles_of_any_kind(tmp_path, monkeypatch):
    path = write_clip(DRAWN[0][0], tmp_path / "7:30 café.mp4", metadata={"title": "title"})
    path.write_bytes(path.read_bytes().replace(b"title", b"t\xeftle"))  # Latin-1
    path.with_suffix(".txt").write_text("a café", encoding="utf-8")
    clip = open_source(tmp_path).read(0, WHOLE, middle())
    assert (clip.name, clip.caption) == ("7:30 café.mp4", "a café")
    monkeypatch.chdir(tmp_path)  # a path that begins like that of a protocol
    Path("list.csv").write_text(f"path,caption\n{path.name},a café\n", encoding="utf-8")
    assert torch.equal(open_source("list.csv").read(0, WHOLE, middle()).frames, clip.frames)


def test_images_are_clips_of_one_frame(tmp_path):
    for index, (frames, caption) in enumerate(DRAWN):
        path = tmp_path / f"{index}.{'jpg' if index else 'png'}"
        Image.fromarray(frames[0]).save(path)
        path.with_suffix(".txt").write_text(caption)
    source = open_source(tmp_path)
    image = source.read(0, ClipFormat(1, SIZE, SIZE), middle())
    assert image.fps == 0 and np.array_equal(image.frames[0].permute(1, 2, 0), DRAWN[0][0][0])
    assert (inspect(source).images, inspect(source).videos) == (3, 0)
    with pytest.raises(ClipError, match="too short"):
        source.read(0, ClipFormat(2, SIZE, SIZE), middle())
    with pytest.raises(ValueError, match="holds no clips"):
        open_source(tmp_path, images_as_clips=False)
    videos(tmp_path)
    assert len(open_source(tmp_path, images_as_clips=False)) == 3


def test_frame_folders_alone(tmp_path):
    frame_folders(tmp_path)
    write_clip(DRAWN[0][0], tmp_path / "other.mp4")
    source = open_source(tmp_path, kind="frames", frames_fps=4.0)
    assert [source.name(index) for index in range(len(source))] == ["clip0", "clip1", "clip2"]
    clip = source.read(0, ClipFormat(3, SIZE, SIZE, fps=2.0, start="middle"), middle())
    assert clip.fps == 2.0
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1), DRAWN[0][0][[2, 4, 6]])


def test_generated_clips_train_through_the_same_interface():
    source = open_source("moving-shapes: seed=3, clips=7, two_object_share=0.5")
    assert len(source) == 7
    data = MovingShapes(3, two_object_share=0.5)
    form = ClipFormat(16, 24, 24)
    for index in range(7):
        clip = source.read(index, form, middle())
        expected = render([data.truth(index)], 24)[0]
        assert clip.caption == data.prompt(index).text and clip.fps == 8
        assert (clip.frames.float() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6
    image = source.read(0, ClipFormat(1, 24, 16), middle())
    assert image.frames.shape == (1, 3, 24, 16)
    assert image.caption == data.prompt(0, image=True).text
    assert told_shapes(source) == told_shapes(
        open_source("moving-shapes:seed=3,clips=7,two_object_share=0.5")
    )
    assert fingerprint(source) != fingerprint(open_source("moving-shapes:seed=4,clips=7"))
    for wrong in ("seeds=3", "clips=0", "split=test", "fps=x", "clips"):
        with pytest.raises(ValueError):
            open_source(f"moving-shapes:{wrong}")


def told_shapes(source: ClipSource) -> list[str]:
    return [source.caption(index) for index in range(len(source))]


# what is damaged


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def hole(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200:] = bytes(200)
    path.write_bytes(data)


def unknown_codec(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def no_video(path: Path) -> None:
    path.write_bytes(b"this is no video" * 64)


def text(path: Path, content: bytes | None) -> None:
    caption = path.with_suffix(".txt")
    caption.unlink() if content is None else caption.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "ends early": (half, "unreadable"),
    "hole": (hole, "unreadable"),
    "unknown codec": (unknown_codec, "unreadable"),
    "no video": (no_video, "unreadable"),
    "empty": (lambda path: path.write_bytes(b""), "unreadable"),
    "dead link": (lambda path: (path.unlink(), path.symlink_to("nowhere.mp4")), "missing file"),
    "too short": (lambda path: write_video(path, clock(4)), "too short"),
    "no caption": (lambda path: text(path, None), "no caption"),
    "empty caption": (lambda path: text(path, b" \n"), "empty caption"),
    "not UTF-8": (lambda path: text(path, b"caf\xe9"), "no caption"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_clip_is_counted_logged_and_replaced(damage, tmp_path, caplog):
    hurt, reason = DAMAGE[damage]
    pairs(tmp_path)
    before = fingerprint(open_source(tmp_path))
    hurt(tmp_path / "clip1.mp4")
    source = open_source(tmp_path)
    with pytest.raises(ClipError) as caught:
        source.read(1, WHOLE, middle())
    assert (caught.value.name, caught.value.reason) == ("clip1.mp4", reason)
    batches = Batches(source, WHOLE, batch_size=3, seed=0)
    with caplog.at_level(logging.WARNING, "latent_shift.data"):
        seen = [caption for step in range(3) for caption in batches[step].captions]
    assert set(seen) == {DRAWN[0][1], DRAWN[2][1]}
    assert batches.skipped == {reason: 1}
    (record,) = caplog.records
    assert "skipped clip1.mp4: " + reason in record.getMessage()
    report = inspect(source, WHOLE, thorough=True)
    assert (report.damaged + report.refused, report.usable) == ({reason: 1}, 2)
    assert report.reasons[0].startswith("clip1.mp4: " + reason)
    assert fingerprint(source) != before


def test_a_glance_finds_files_that_end_early_and_decoding_finds_holes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3)).astype(np.uint8)
    for name, hurt in (("a.mp4", half), ("b.mp4", hole)):
        write_clip(noise, tmp_path / name)
        hurt(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("noise")
    source = open_source(tmp_path)
    assert inspect(source).damaged == {"unreadable": 1}
    assert inspect(source, thorough=True).damaged == {"unreadable": 2}


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".jpg", ".webp", ".bmp"])
def test_no_damage_does_more_than_make_a_clip_unreadable(suffix, tmp_path):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    write = (
        write_clip if suffix in (".mp4", ".gif") else lambda x, to: Image.fromarray(x[0]).save(to)
    )
    write(DRAWN[0][0], path)
    (tmp_path / "a.txt").write_text("a red circle")
    data, source, form = path.read_bytes(), open_source(tmp_path), ClipFormat(1, 16, 16)
    reasons = set()
    for _ in range(30):
        hurt = bytearray(data)
        hurt[rng.integers(4, len(hurt))] = rng.integers(256)  # anywhere
        hurt[rng.integers(4, 100)] = rng.integers(256)  # where the tables are
        path.write_bytes(hurt if rng.random() < 0.7 else hurt[: rng.integers(len(hurt))])
        try:
            source.read(0, form, middle())
        except ClipError as error:
            reasons.add(error.reason)
    assert reasons == {"unreadable"}


def test_links_that_lead_back_are_walked_once(tmp_path):
    pairs(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(open_source(tmp_path)) == 3


def test_captions_that_belong_to_no_clip_are_told(tmp_path, caplog):
    for index, path in enumerate(videos(tmp_path)):
        path.with_name(f"caption{index}.txt").write_text("a red circle")
    source = open_source(tmp_path)
    assert "captions that belong to no clip: 3, such as caption0.txt" in caplog.text
    assert inspect(source).unmatched == ["caption0.txt", "caption1.txt", "caption2.txt"]
    words = "none of the 3 clips .*can be used: 3 no caption; captions .*: 3, such as caption0.txt"
    with pytest.raises(RuntimeError, match=words):
        Batches(source, WHOLE, batch_size=1, seed=0)[0]


def test_damaged_rows_of_tables(tmp_path):
    name = videos(tmp_path)[0].name
    rows = [
        json.dumps({"path": name, "caption": "a red circle"}),
        '{"path": "clip0.mp4", ',
        "[1]",
        json.dumps({"caption": "no path"}),
        json.dumps({"path": "gone.mp4", "caption": "a"}),
        json.dumps({"path": name}),
        json.dumps({"path": name, "caption": ["two", "captions"]}),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    report = inspect(open_source(tmp_path / "list.jsonl"))
    assert report.clips == 7 and report.usable == 1
    assert report.damaged == {"damaged row": 3, "missing file": 1, "no caption": 2}
    assert any("gone.mp4: missing file" in reason for reason in report.reasons)


def test_damaged_tars(tmp_path):
    folder = tars(tmp_path)
    source = open_source(folder / "a.tar")
    assert [source.name(index) for index in range(2)] == [
        "a.tar/./some/clip0",
        "a.tar/./some/clip1",
    ]
    data = (folder / "a.tar").read_bytes()
    with tarfile.open(folder / "a.tar") as tar:
        last = max(tar.getmembers(), key=lambda member: member.offset_data)
    (folder / "a.tar").write_bytes(data[: last.offset_data + last.size // 2])
    report = inspect(open_source(folder))
    assert report.clips == 4 and report.usable == 2  # of three clips; one entry tells of the end
    assert report.damaged == {"missing file": 1, "unreadable": 1}
    assert any(reason.startswith("a.tar (end): unreadable") for reason in report.reasons)
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        open_source(tmp_path / "c.tar")


def test_damaged_frame_folders(tmp_path):
    frame_folders(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "clip0" / "00004.png")
    half(tmp_path / "clip1" / "00000.png")
    report = inspect(open_source(tmp_path), thorough=True)
    assert report.damaged == {"unreadable": 2}
    assert any("differ in size: 32x32, 8x8" in reason for reason in report.reasons)


# what cannot be opened


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no data set"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no clips"):
        open_source(tmp_path)
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match="is no data set: expected a folder, a table"):
        open_source(tmp_path / "a.doc")
    with pytest.raises(ValueError, match="kind must be one of"):
        open_source(tmp_path, kind="video")
    with pytest.raises(ValueError, match="is a file"):
        open_source(tmp_path / "a.doc", kind="folder")
    with pytest.raises(FileNotFoundError, match="no tar"):
        open_source(str(tmp_path / "*.tar"))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="has no rows"):
        open_source(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes(b"path,caption\ncaf\xe9,b\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        open_source(tmp_path / "a.csv")


def test_columns_of_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("Path,description\na.mp4,b\n")
    with pytest.raises(
        ValueError, match="no column 'path', only 'Path', 'description'; did you mean 'Path'"
    ):
        open_source(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no column 'descriptoin'.*did you mean 'description'"):
        open_source(tmp_path / "a.csv", path_column="Path", caption_column="descriptoin")
    source = open_source(tmp_path / "a.csv", path_column="Path", caption_column="description")
    assert source.caption(0) == "b"


@pytest.mark.parametrize("library, where", [("pyarrow", "a.parquet"), ("datasets", "owner/name")])
def test_what_needs_a_library_names_it(library, where, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    with pytest.raises(ImportError, match=rf"needs {library}: pip install '.*\[data\]'"):
        open_source(where)


def test_a_copied_data_set_keeps_its_fingerprint_and_a_changed_one_does_not(tmp_path):
    import shutil

    (first := tmp_path / "first").mkdir()
    pairs(first)
    before = fingerprint(open_source(first))
    shutil.copytree(first, tmp_path / "second")
    assert fingerprint(open_source(tmp_path / "second")) == before
    (first / "clip0.txt").write_text("something else")
    assert fingerprint(open_source(first)) != before
    hole(tmp_path / "second" / "clip0.mp4")
    assert fingerprint(open_source(tmp_path / "second")) != before


def test_the_clock_reads_the_same_from_everywhere(tmp_path):
    """Frame numbers survive the way through tars, whose videos are read from memory."""
    write_video(tmp_path / "a.mp4", clock(20), keys_every=5)
    (tmp_path / "a.txt").write_text("a clock")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "a.mp4")
        tar.add(tmp_path / "a.txt", "a.txt")
    form = ClipFormat(4, 16, 16, stride=2)
    folder, tar_ = open_source(tmp_path, kind="folder"), open_source(tmp_path)
    for seed in range(6):
        first, second = folder.read(0, form, middle(seed)), tar_.read(0, form, middle(seed))
        assert torch.equal(first.frames, second.frames)
        assert np.diff(told(first.frames)).tolist() == [2, 2, 2]
