"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds spent in named parts; costs nothing while it is off.

    Attributes:
        seconds: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] | None = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.seconds is None:
            yield
            return
        begin = self.now()
        yield
        self.seconds[part] += self.now() - begin  # type: ignore[assignment]

    def now(self) -> float:
        """Returns the time, when all work on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
