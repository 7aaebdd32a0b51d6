"""A cache holds what encoding gives, goes on after any interruption, and is never mistaken."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_shift.data.cache import CacheError, CacheReport, build_cache, open_cache, share
from latent_shift.data.clips import Batches, ClipFormat, open_source
from latent_shift.data.encode import encode_frames, encode_text, model_digest, tokenizer_digest
from latent_shift.video import write_clip
from tests.model import tiny
from tests.model.clips import middle, shapes

FORM = ClipFormat(5, 16, 16, crop="center", start="middle", stride=2)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    pipe = tiny.image_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.25)
    return pipe.vae, pipe.text_encoder, pipe.tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven clips; the third has no caption, the fourth ends early."""
    folder = tmp_path_factory.mktemp("clips")
    for index, (frames, caption) in enumerate(shapes(7)):
        write_clip(frames, folder / f"{index}.mp4")
        if index != 2:
            (folder / f"{index}.txt").write_text("a red circle" if index % 2 else caption)
    data = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(data[: len(data) // 2])
    return open_source(folder)


def build(source, models, folder: Path, form: ClipFormat = FORM, **options) -> CacheReport:
    return build_cache(
        source, form, *models, folder, **{"shard_clips": 2, "dtype": "float32", **options}
    )


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        for name in first
    )


@pytest.fixture(scope="module")
def built(source, models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    report = build(source, models, folder)
    assert (report.written, report.found, report.clips) == (4, 0, 5)
    assert report.skipped == {"no caption": 1, "unreadable": 1}
    assert report.cut_captions == 3  # the wordy ones; the tiny text encoder takes 16 tokens
    return folder


def test_a_cache_gives_what_encoding_gives(source, models, built):
    vae, text_encoder, tokenizer = models
    cache = open_cache(built)
    assert len(cache) == 5 and cache.skipped == {"no caption": 1, "unreadable": 1}
    kept = [0, 1, 4, 5, 6]
    assert [cache.name(row) for row in range(5)] == [f"{index}.mp4" for index in kept]
    with torch.no_grad():
        for row, index in enumerate(kept):
            pixels = source.row(index, FORM, middle()).pixels
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=middle(7))
            latents = (posterior.mean + posterior.std * noise) * 0.25
            got = cache.row(row, FORM, middle(7))
            assert got.caption == source.caption(index) and got.pixels is None
            torch.testing.assert_close(got.latents, latents, rtol=1e-5, atol=1e-6)
            text = encode_text(text_encoder, tokenizer, [got.caption])[0]
            torch.testing.assert_close(got.text, text, rtol=1e-5, atol=1e-6)
            other = cache.row(row, FORM, middle(8))
            assert not torch.equal(other.latents, got.latents)
            assert torch.equal(cache.row(row, FORM, middle(7)).latents, got.latents)
    torch.testing.assert_close(cache.null_text, encode_text(text_encoder, tokenizer, [""])[0])


def test_text_is_what_the_pipeline_encodes(models):
    pipe = tiny.image_pipeline()
    expected, _ = pipe.encode_prompt(["a red circle", ""], "cpu", 1, False)
    torch.testing.assert_close(
        encode_text(pipe.text_encoder, pipe.tokenizer, ["a red circle", ""]), expected
    )


def test_frames_are_encoded_in_chunks_alike(models):
    pixels = torch.rand(2, 5, 3, 16, 16) * 2 - 1
    whole, parts = (encode_frames(models[0], pixels, chunk) for chunk in (16, 3))
    for first, second in zip(whole, parts, strict=True):
        assert first.shape == (2, 5, 4, 8, 8)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_batches_of_a_cache(built):
    cache = open_cache(built)
    plain, ahead = (Batches(cache, None, batch_size=2, seed=3, workers=n) for n in (0, 2))
    for step in (0, 4, 1):
        first, second = plain[step], ahead[step]
        assert first.pixels is None
        assert first.latents.shape == (2, 5, 4, 8, 8) and first.text.shape == (2, 16, 32)
        assert first.latents.dtype == first.text.dtype == torch.float32
        assert torch.equal(first.latents, second.latents) and torch.equal(first.text, second.text)
        assert first.captions == second.captions
    ahead.close()
    with pytest.raises(TypeError, match="holds latents, not frames"):
        cache.read(0, FORM, middle())


def test_the_mean_alone_and_half_precision(source, models, built, tmp_path):
    build(source, models, tmp_path, posterior="mean", dtype="float16")
    cache, exact = open_cache(tmp_path), load_file(built / "shard-00000.safetensors")
    state = load_file(tmp_path / "shard-00000.safetensors")
    assert state.keys() == {"mean", "text"} and state["mean"].dtype == torch.float16
    torch.testing.assert_close(state["mean"], exact["mean"].half())
    one, two = (cache.row(0, FORM, middle(seed)).latents for seed in (0, 1))
    assert torch.equal(one, two) and torch.equal(one, state["mean"][0].float() * 0.25)


def test_readers_ahead_change_nothing(source, models, built, tmp_path):
    build(source, models, tmp_path, workers=2)
    assert equal(shards(tmp_path), shards(built))


# interruptions and several processes


def killed(source, models, folder: Path, after: int, **options) -> int:
    """Builds in a process that is killed when `after` clips are done; its exit code."""

    def run() -> None:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if done >= after:
                os.kill(os.getpid(), signal.SIGKILL)

        build(source, models, folder, progress=progress, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_killed_build_goes_on(source, models, built, tmp_path):
    assert killed(source, models, tmp_path, after=4) == -signal.SIGKILL
    left = {path.name for path in tmp_path.glob("shard-*")}
    assert left == {"shard-00000.safetensors"}  # the second was about to be written
    with pytest.raises(CacheError, match=r"incomplete: 3 of 5 files are missing, shard-00001"):
        open_cache(tmp_path)
    (tmp_path / ".shard-00001.safetensors.x.part").touch()  # killed while writing
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    steps: list[int] = []
    report = build(source, models, tmp_path, progress=steps.append)
    assert (report.written, report.found) == (3, 1) and sum(steps) == len(source)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert equal(shards(tmp_path), shards(built))
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_shard_is_named_and_made_again(source, models, built, tmp_path):
    build(source, models, tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CacheError, match="shard-00002.safetensors is damaged .*build again"):
        open_cache(tmp_path)
    assert build(source, models, tmp_path).written == 1
    assert equal(shards(tmp_path), shards(built))


def test_several_processes_share_the_work(source, models, built, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=build, args=(source, models, tmp_path), kwargs={"rank": rank, "world": 3}
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert equal(shards(tmp_path), shards(built))
    assert len(open_cache(tmp_path)) == 5


def test_a_rank_writes_its_own_shards_alone_and_another_world_finishes(
    source, models, built, tmp_path
):
    build(source, models, tmp_path, rank=1, world=2)
    names = {path.name for path in tmp_path.glob("shard-*")}
    assert names == {"shard-00001.safetensors", "shard-00003.safetensors"}
    assert [share(7, 2, rank, 2) for rank in range(2)] == [4, 3]
    report = build(source, models, tmp_path)
    assert (report.found, report.written, report.clips) == (2, 2, 5)
    assert report.skipped.total() == 2
    assert equal(shards(tmp_path), shards(built))


def test_a_shard_of_nothing_readable(models, tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"{index}.mp4").touch()
        (tmp_path / "in" / f"{index}.txt").write_text("a circle")
    write_clip(shapes(1)[0][0], tmp_path / "in" / "9.mp4")
    (tmp_path / "in" / "9.txt").write_text("a red circle")
    build(open_source(tmp_path / "in"), models, tmp_path / "out")
    cache = open_cache(tmp_path / "out")
    assert len(cache) == 1 and cache.skipped == {"unreadable": 3}


# what is refused


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crop": "random"}, "crop='random'"),
        ({"start": "random"}, "start='random'"),
        ({"flip": True}, "flip=True"),
    ],
)
def test_augmentation_that_a_cache_cannot_hold(change, words, source, models, built, tmp_path):
    form = ClipFormat(**{**vars(FORM), **change})
    for refused in (
        lambda: build(source, models, tmp_path / "new", form),
        lambda: open_cache(built, form=form),
        lambda: Batches(open_cache(built), form, batch_size=1, seed=0),
    ):
        with pytest.raises(ValueError, match=f"cannot hold {words}: set crop='center'"):
            refused()
    assert not (tmp_path / "new").exists()


def test_what_differs_is_named(source, models, built, tmp_path):
    vae, text_encoder, tokenizer = models
    same = open_cache(
        built, form=FORM, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, source=source
    )
    assert len(same) == 5
    torch.manual_seed(5)
    other = tiny.image_pipeline(seed=1)
    words = tiny.tokenizer()
    words.model_max_length = 12
    form = ClipFormat(**{**vars(FORM), "height": 32, "fps": 4.0})
    for given, message in (
        (
            {"form": form},
            r"another height \(cache: 16, now: 32\), another fps \(cache: None, now: 4",
        ),
        ({"vae": other.vae}, r"another vae \(cache: \w{12}, now: \w{12}\): build"),
        ({"text_encoder": other.text_encoder}, "another text_encoder"),
        ({"tokenizer": words}, "another tokenizer"),
        ({"source": open_source("moving-shapes:clips=7")}, "another source"),
    ):
        with pytest.raises(CacheError, match=message):
            open_cache(built, **given)
    before = shards(built)
    for arguments, options, message in (
        ((source, models), {"posterior": "mean"}, "another posterior .cache: sample, now: mean"),
        ((source, models), {"dtype": "bfloat16"}, "another dtype"),
        ((source, models), {"form": form}, "another height"),
        ((source, (other.vae, text_encoder, tokenizer)), {}, "another vae"),
        ((open_source("moving-shapes:clips=7"), models), {}, "another source"),
    ):
        with pytest.raises(CacheError, match=message):
            build(*arguments, built, **options)
    assert equal(shards(built), before)


def test_a_cache_of_older_code_is_refused(built, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_shift.data.cache._CODE", 2)
    with pytest.raises(CacheError, match=r"another code \(cache: 1, now: 2\)"):
        open_cache(built)


def test_what_is_no_cache(built, source, models, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no cache: it has no manifest.json"):
        open_cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"clips": 3')
    with pytest.raises(CacheError, match="manifest.json is damaged"):
        open_cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"clips": 3}')
    with pytest.raises(CacheError, match="entries are missing"):
        open_cache(tmp_path)
    for wrong in ({"rank": 1}, {"shard_clips": 0}, {"dtype": "int8"}, {"posterior": "mode"}):
        with pytest.raises(ValueError):
            build(source, models, tmp_path / "new", **wrong)


def test_digests_know_weights_and_words_and_nothing_else(models, tmp_path):
    vae, _, tokenizer = models
    before = model_digest(vae)
    vae.save_pretrained(tmp_path / "vae")
    again = type(vae).from_pretrained(tmp_path / "vae")
    assert model_digest(again) == before  # wherever it was loaded from
    again.encoder.conv_in.bias.data[0] += 1e-6
    assert model_digest(again) != before
    again = type(vae).from_pretrained(tmp_path / "vae")
    again.register_to_config(scaling_factor=0.5)
    assert model_digest(again) != before
    assert model_digest(type(vae).from_pretrained(tmp_path / "vae").half()) != before

    words = tokenizer_digest(tokenizer)
    tokenizer(["a red circle"], padding="max_length", truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == words
    tokenizer.save_pretrained(tmp_path / "words")
    loaded = type(tokenizer).from_pretrained(tmp_path / "words")
    assert tokenizer_digest(loaded) == words
    loaded.add_tokens(["magenta"])
    assert tokenizer_digest(loaded) != words
    manifest = json.dumps(words)
    assert str(tmp_path) not in manifest
