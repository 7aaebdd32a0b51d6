"""Batches by number: what step 1000 of a run sees depends on nothing but the seed."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ClipError, ClipFormat, ClipSource, Row, seeded

_AHEAD = 2  # steps read ahead of the one asked for

_log = logging.getLogger("latent_shift.data")


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one step: pixels, or latents and text from a cache.

    Attributes:
        pixels: (B, T, 3, H, W) float32 in [-1, 1].
        latents: (B, T, C, h, w) float32, scaled as the U-Net takes them.
        text: (B, L, D) float32, the text encoder's hidden states.
        captions: B texts.
    """

    pixels: Tensor | None
    latents: Tensor | None
    text: Tensor | None
    captions: list[str]


class NoClipsError(RuntimeError):
    """Of all the clips of a source none can be used."""


class Batches:
    """The endless sequence of batches of a run, read by step in any order.

    Row `i` of rank `r` at step `s` is place `(s * world + r) * batch_size + i` of a sequence that
    goes through the source in a new order every epoch. The order is a function of (seed, epoch);
    start, crop and flip are functions of (seed, place). So neither workers nor an interruption
    change a batch, and `world` ranks of `batch_size` see what one of `world * batch_size` does.

    A clip that cannot be read is replaced by the next one in the epoch's order, counted once in
    `skipped` and logged to "latent_shift.data".

    Args:
        source: from `open_source` or `open_cache`.
        form: None for a cache: as it was built.
        batch_size: rows of one rank.
        rank, world: this process among those that share the run.
        workers: threads that read ahead; 0 reads when asked. Decoding leaves Python's lock.

    Attributes:
        skipped: clips left out so far, by reason; with workers, steps ahead included.
    """

    def __init__(
        self,
        source: ClipSource,
        form: ClipFormat | None,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(
                "need batch_size >= 1, workers >= 0 and 0 <= rank < world, got "
                f"{batch_size}, {workers}, {rank} and {world}"
            )
        form = form or source.form
        if form is None:
            raise ValueError("form can be None only for a cache, which has its own")
        if not len(source):
            raise ValueError(f"{source.where!r} holds no clips")
        source.check(form)
        self.source, self.form, self.batch_size, self.seed = source, form, batch_size, seed
        self.rank, self.world = rank, world
        self.skipped: Counter[str] = Counter()
        self._told: set[int] = set()
        self._lock = threading.Lock()
        self._orders: dict[int, Tensor] = {}
        self._pending: dict[int, list[Future[Row]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if workers:
            self._pool = ThreadPoolExecutor(workers, "latent_shift.data")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __getitem__(self, step: int) -> Batch:
        """This rank's rows of `step`.

        Raises:
            NoClipsError: nothing at all in the source can be read.
        """
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}")
        if self._pool is None:
            return _stacked([self._row(place) for place in self._places(step)])
        for other in [s for s in self._pending if not step <= s <= step + _AHEAD]:
            for future in self._pending.pop(other):
                future.cancel()
        for ahead in range(step, step + _AHEAD + 1):
            if ahead not in self._pending:
                self._pending[ahead] = [
                    self._pool.submit(self._row, place) for place in self._places(ahead)
                ]
        return _stacked([future.result() for future in self._pending.pop(step)])

    def epoch(self, step: int) -> float:
        """How often the source has been gone through before `step`."""
        return step * self.world * self.batch_size / len(self.source)

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _places(self, step: int) -> range:
        first = (step * self.world + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def _order(self, epoch: int) -> Tensor:
        with self._lock:
            if epoch not in self._orders:
                generator = seeded(self.seed, "order", epoch)
                # no reader ahead is further away than the next epoch
                self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = torch.randperm(len(self.source), generator=generator)
            return self._orders[epoch]

    def _row(self, place: int) -> Row:
        epoch, first = divmod(place, len(self.source))
        order = self._order(epoch)
        for tries in range(len(order)):
            index = int(order[(first + tries) % len(order)])
            try:
                return self.source.row(index, self.form, seeded(self.seed, "clip", place, tries))
            except ClipError as error:
                self._skip(index, error)
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        message = f"none of the {len(order)} clips of {self.source.where!r} can be used: {reasons}"
        if lonely := self.source.unmatched:
            message += f"; captions that belong to no clip: {len(lonely)}, such as {lonely[0]}"
        raise NoClipsError(f"{message}; `latent-shift data inspect` tells more")

    def _skip(self, index: int, error: ClipError) -> None:
        with self._lock:
            if index in self._told:
                return
            self._told.add(index)
            self.skipped[error.reason] += 1
        _log.warning("skipped %s", error)


def _stacked(rows: list[Row]) -> Batch:
    pixels, latents, text = (
        torch.stack([getattr(row, name) for row in rows])
        if getattr(rows[0], name) is not None
        else None
        for name in ("pixels", "latents", "text")
    )
    return Batch(pixels, latents, text, [row.caption for row in rows])
