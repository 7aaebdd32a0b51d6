"""Batches are functions of (seed, step, rank), whatever reads them and in whatever order."""

from __future__ import annotations

import gc
import threading
from collections import Counter

import pytest
import torch

from latent_shift.data.base import Clip, ClipError, ClipSource, Facts
from latent_shift.data.clips import Batch, Batches, ClipFormat, open_source

FORM = ClipFormat(4, 16, 16)
SHAPES = "moving-shapes:clips=7,seed=1"


def same(first: Batch, second: Batch) -> bool:
    assert first.pixels is not None and second.pixels is not None
    return torch.equal(first.pixels, second.pixels) and first.captions == second.captions


def batches(where: str = SHAPES, form: ClipFormat = FORM, **options) -> Batches:
    return Batches(open_source(where), form, **{"batch_size": 2, "seed": 0, **options})


class Flaky(ClipSource):
    """Clips whose pixels tell their number and what chance drew; those in `bad` fail."""

    kind, where = "flaky", "flaky"

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int, form: ClipFormat, generator: torch.Generator) -> Clip:
        if index in self.bad:
            raise ClipError(self.name(index), "unreadable")
        drawn = int(torch.randint(256, (), generator=generator))
        frames = torch.full((form.num_frames, 3, form.height, form.width), drawn).byte()
        return Clip(frames, str(index), str(index), 8.0)

    def caption(self, index: int) -> str:
        return str(index)

    def facts(self, index: int, thorough: bool = False) -> Facts:
        raise AssertionError("batches need none")

    digest = facts


def numbers(source: ClipSource, places: range, **options) -> list[int]:
    read = Batches(source, FORM, batch_size=1, **{"seed": 0, **options})
    return [int(read[place].captions[0]) for place in places]


def test_pixels_are_scaled_and_shaped():
    batch = batches()[3]
    assert batch.pixels is not None and batch.pixels.dtype == torch.float32
    assert batch.pixels.shape == (2, 4, 3, 16, 16) and len(batch.captions) == 2
    assert batch.latents is None and batch.text is None
    clip = open_source(SHAPES).read(0, FORM, torch.Generator().manual_seed(0))
    row = open_source(SHAPES).row(0, FORM, torch.Generator().manual_seed(0))
    expected = clip.frames.double() / 127.5 - 1
    torch.testing.assert_close(row.pixels.double(), expected, rtol=0, atol=1e-7)
    assert row.pixels.min() >= -1 and row.pixels.max() <= 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_of_reading_and_workers_change_nothing(workers):
    plain = batches()
    expected = {step: plain[step] for step in (0, 1, 2, 3, 9)}
    read = batches(workers=workers)
    for step in (2, 3, 0, 9, 1, 1):
        assert same(read[step], expected[step])
    read.close()
    again = batches(workers=workers)  # as after an interruption
    assert same(again[9], expected[9])
    assert not same(expected[0], expected[1])


def test_ranks_share_what_one_process_reads():
    together = batches(batch_size=4)
    for step in (0, 5):
        parts = [batches(rank=rank, world=2)[step] for rank in range(2)]
        pixels = torch.cat([part.pixels for part in parts if part.pixels is not None])
        captions = [caption for part in parts for caption in part.captions]
        assert same(Batch(pixels, None, None, captions), together[step])


def test_every_epoch_takes_every_clip_once_in_an_order_of_its_own():
    source = Flaky(9)
    epochs = [numbers(source, range(9 * epoch, 9 * epoch + 9)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(source, range(9), seed=1) != epochs[0]
    assert Batches(source, FORM, batch_size=3, seed=0, world=2).epoch(3) == 2.0


def test_the_sequence_of_a_seed_stays_what_it_was():
    """A change here makes runs that were interrupted go on with other data."""
    read = Batches(Flaky(5), FORM, batch_size=5, seed=7)
    batch = read[0]
    assert batch.captions == ["3", "2", "1", "0", "4"]
    drawn = ((batch.pixels[:, 0, 0, 0, 0] + 1) * 127.5).round().int()
    assert drawn.tolist() == [231, 124, 117, 29, 123]


def test_a_clip_gets_other_draws_in_every_epoch():
    read = Batches(Flaky(1), FORM, batch_size=8, seed=0)
    assert read[0].pixels is not None
    assert len(set(read[0].pixels[:, 0, 0, 0, 0].tolist())) > 4


def test_a_bad_clip_is_replaced_by_the_next_of_the_order(caplog):
    whole = numbers(Flaky(6), range(12))
    bad = (whole[2], whole[3])
    expected = [whole[4] if place in (2, 3) else whole[place] for place in range(6)]
    assert numbers(Flaky(6, bad), range(6)) == expected
    read = Batches(Flaky(6, bad), FORM, batch_size=6, seed=0, workers=2)
    for step in range(4):
        assert not {int(caption) for caption in read[step].captions} & set(bad)
    assert read.skipped == Counter(unreadable=2)
    read.close()
    told = [record.getMessage() for record in caplog.records]
    assert sorted(told[-2:]) == sorted(f"skipped {index}: unreadable" for index in bad)


def test_nothing_readable_ends_the_run_and_says_why():
    read = Batches(Flaky(3, (0, 1, 2)), FORM, batch_size=1, seed=0, workers=1)
    with pytest.raises(RuntimeError, match="none of the 3 clips of 'flaky' can be used: 3 unread"):
        read[0]


def test_dropped_batches_end_their_workers():
    read = batches(workers=2)
    read[0]
    before = {thread for thread in threading.enumerate() if "latent_shift" in thread.name}
    assert before
    del read
    gc.collect()
    for thread in before:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": -1}, {"rank": 2, "world": 2}, {"rank": -1}]
)
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match="need batch_size >= 1"):
        batches(**options)
    with pytest.raises(ValueError, match="form can be None only for a cache"):
        batches(form=None)
    with pytest.raises(IndexError):
        batches()[-1]
