"""``latent-shift data``: what it tells of a data set, and the cache that it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from latent_shift import LatentShiftPipeline
from latent_shift.cli import main
from latent_shift.data.cache import open_cache
from latent_shift.video import write_clip
from tests.cli.test_cli import fails, here
from tests.model import tiny
from tests.model.clips import clock, shapes, write_video

__all__ = ["here"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LatentShiftPipeline.from_t2i(tiny.image_pipeline(), default_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture
def clips(here) -> Path:
    """Three clips, a short one, an image, one that ends early, one without caption, one caption
    without clip.
    """
    (folder := here / "clips").mkdir()
    for index, (frames, caption) in enumerate(shapes(5)):
        write_clip(frames, folder / f"{index}.mp4")
        (folder / f"{index}.txt").write_text(caption)
    half = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(half[: len(half) // 2])
    (folder / "4.txt").rename(folder / "four.txt")
    write_video(folder / "short.mp4", clock(4))
    (folder / "short.txt").write_text("a clock")
    Image.new("RGB", (40, 24)).save(folder / "image.png")
    (folder / "image.txt").write_text("a black picture")
    return folder


def test_inspect_tells_what_there_is_and_what_is_not(clips, capsys):
    assert main(["data", "inspect", str(clips), "--sheet", "sheet.png"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0] == f"{clips}: 7 clips, kind folder"
    for line in (
        "readable  5 videos, 1 still image",
        "frames    1 to 10",
        "fps       8; 0.5 to 1.25 seconds",
        "width     16 to 40; height 16 to 32",
        "damaged   2: 1 unreadable, 1 no caption",
        "  3.mp4: unreadable (the file ends early)",
        "unmatched 1 caption belongs to no clip, such as four.txt",
        "usable    5 of 7",
        "wrote sheet.png",
    ):
        assert line in lines, told.out
    assert "captions  6, of 2 to " in told.out and repr(shapes(1)[0][1]) in told.out
    width, height = Image.open("sheet.png").size
    assert width >= 8 * 96 and height >= 5 * 96


def test_inspect_tells_what_a_format_would_leave_out(clips, capsys):
    call = ["data", "inspect", str(clips), "--decode", "--frames", "6", "--fps", "4"]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert "6 frames at 4 fps leave out 5: 5 too short" in out and "usable    0 of 7" in out
    assert "0.mp4: too short (6 frames are needed, it has 5)" in out
    assert main([*call[:-1], "8", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["usable"] == 3 and content["refused"] == {"too short": 2}
    assert content["damaged"] == {"unreadable": 1, "no caption": 1}
    assert content["unmatched"] == ["four.txt"] and content["frames"] == [1, 10]


def test_inspect_of_generated_clips(here, capsys):
    assert main(["data", "inspect", "moving-shapes:clips=3", "--sheet", "s.png"]) == 0
    assert "usable    3 of 3" in capsys.readouterr().out


def test_cache(clips, model, capsys):
    call = ["data", "cache", str(clips), "-m", str(model), "-o", "cache"]
    call += ["--frames", "4", "--stride", "2", "--shard-clips", "3"]
    assert main([*call, "--rank", "1", "--world", "2"]) == 0
    assert "cache: 0 clips in 1 new shard\nskipped 3: " in capsys.readouterr().out
    assert main(call) == 0
    told = capsys.readouterr()
    assert "cache: 3 clips in 2 new shards, 1 shard found done" in told.out
    assert "skipped 4: 2 too short, 1 unreadable, 1 no caption" in told.out
    assert "too long for the text encoder, which sees 16 tokens of them" in told.err
    cache = open_cache("cache")
    assert len(cache) == 3
    assert cache.skipped == {"unreadable": 1, "no caption": 1, "too short": 2}
    assert (cache.form.height, cache.form.width, cache.form.num_frames) == (16, 16, 4)
    assert main(call) == 0
    assert "3 clips in 0 new shards, 3 shards found done" in capsys.readouterr().out
    status = main([*call, "--fps", "4"])
    assert status == 1
    assert "another fps (cache: None, now: 4.0)" in capsys.readouterr().err


def test_torchrun_says_which_part_of_a_cache_to_make(here, model, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    call = ["data", "cache", "moving-shapes:clips=4", "-m", str(model), "-o", "cache"]
    assert main([*call, "--shard-clips", "1", "--frames", "2"]) == 0
    assert [path.name for path in Path("cache").glob("shard-*")] == ["shard-00001.safetensors"]


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["inspect", "nothing"], 1, "there is no data set 'nothing'"),
        (["inspect", "."], 1, "'.' holds no clips of kind 'folder'"),
        (["inspect", ".", "--kind", "foldr"], 2, "did you mean folder?"),
        (["inspect", ".", "--size", "8x8"], 2, "go with --frames"),
        (["inspect", ".", "--frames", "2", "--size", "8"], 2, "is not WIDTHxHEIGHT"),
        (["inspect", ".", "--sheet", "a.gif"], 2, "must end in .png"),
        (["inspect", "a.csv"], 1, "a.csv has no column 'path', only 'x', 'y'. Say which"),
        (["cache", ".", "-o", "a.csv"], 2, "is not a folder"),
        (["cache", ".", "-o", "c", "--posterior", "mode"], 2, "is not one of sample, mean"),
        (["cache", ".", "-o", "c", "--store", "int8"], 2, "is not one of float32"),
        (["cache", ".", "-o", "c", "--rank", "1"], 2, "1 is not below --world 1"),
        (["cache", "moving-shapes:clip=1", "-o", "c"], 1, "is not a setting of moving shapes"),
        (["cache", "moving-shapes:clips=1", "-o", "c", "--size", "9x9"], 2, "must be multiples of"),
    ],
)
def test_mistakes(arguments, status, words, here, capsys):
    Path("a.csv").write_text("x,y\n1,2\n")
    got, line = fails(capsys, "data", *arguments)
    assert got == status and words in line, line
    assert not Path("c").exists()
