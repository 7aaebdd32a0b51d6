"""The two sets of clips that a score compares: stored clips, and what a model makes of captions."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latent_shift.data.base import Clip, ClipError, ClipFormat, ClipSource, seeded
from latent_shift.data.items import ItemSource
from latent_shift.data.moving_shapes import Prompt
from latent_shift.data.sources import fingerprint

_log = logging.getLogger("latent_shift.evaluation")


@dataclass(frozen=True)
class Drawn:
    """Some clips of a set: their numbers, `clips` (B, T, 3, H, W), uint8 or in [0, 1], captions."""

    indices: list[int]
    clips: Tensor
    captions: list[str]

    def uint8(self) -> Tensor:
        if self.clips.dtype == torch.uint8:
            return self.clips
        return (self.clips * 255).round().clamp(0, 255).byte()


class ClipSet(ABC):
    """A set of `count` clips that can be gone through once, batch by batch, by several processes.

    Attributes:
        count: clips meant to be drawn; those that cannot be read are missing from `batches`.
        num_frames: frames of each.
        prompts: the captions' truth, where it is known.
    """

    count: int
    num_frames: int
    prompts: Sequence[Prompt] | None = None

    def batches(
        self, size: int, rank: int = 0, world: int = 1, *, captions: bool = False
    ) -> Iterator[Drawn]:
        """This process's share; the batches are the same for any number of processes.

        Args:
            captions: whether clips without a caption are of no use.
        """
        chunks = [range(i, min(i + size, self.count)) for i in range(0, self.count, size)]
        for chunk in chunks[rank::world]:
            drawn = self.draw(chunk, captions)
            if drawn.indices:
                yield drawn

    @abstractmethod
    def draw(self, indices: range, captions: bool) -> Drawn:
        """Reads or makes clips; `captions` as in `batches`."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What the clips are a function of."""


class StoredClips(ClipSet):
    """Clips of a data set, centred in space and time.

    Args:
        source: from `latent_shift.data.clips.open_source`.
        form: frames, size and rate; crop and start are centred whatever it says.
        count: how many, drawn without replacement; all if None.
        seed: chooses which.
    """

    def __init__(
        self, source: ClipSource, form: ClipFormat, count: int | None = None, seed: int = 0
    ) -> None:
        source.check(form)
        self.source = source
        self.form = ClipFormat(
            form.num_frames,
            form.height,
            form.width,
            form.fps,
            form.stride,
            crop="center",
            start="middle",
        )
        self.seed = seed
        self.count = len(source) if count is None else min(count, len(source))
        self.num_frames = form.num_frames
        self._chosen = _order(source, seed)[: self.count]
        self._fingerprint: str | None = None
        self.skipped: Counter[str] = Counter()

    def draw(self, indices: range, captions: bool) -> Drawn:
        found: list[int] = []
        clips: list[Clip] = []
        for index in indices:
            try:
                clips.append(self._read(self._chosen[index], captions))
                found.append(index)
            except ClipError as error:
                _log.warning("left out %s", error)
                self.skipped[error.reason] += 1
        frames = torch.stack([clip.frames for clip in clips]) if clips else torch.empty(0)
        return Drawn(found, frames, [clip.caption for clip in clips])

    def _read(self, index: int, captions: bool) -> Clip:
        generator = seeded("evaluation", self.seed, index)
        if captions or not isinstance(self.source, ItemSource):
            return self.source.read(index, self.form, generator)
        item = self.source.item(index)
        frames, fps = item.found().read(item.name, self.form, generator)
        return Clip(frames, "", item.name, fps)

    def protocol(self) -> dict[str, Any]:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.source)
        return {
            "clips": self.source.kind,
            "fingerprint": self._fingerprint,
            "count": self.count,
            "of": len(self.source),
            "seed": self.seed,
            **asdict(self.form),
        }


class GeneratedClips(ClipSet):
    """What a model makes of captions.

    Args:
        generate: a `LatentShiftPipeline`, or anything called the same way.
        prompts: one caption a clip; as `Prompt` they can be scored against their truth.
        num_frames: frames a clip.
        seed: clip i is made from its own noise, a function of (seed, i).
        about: what the protocol is to say of the model.
        call: passed on to the model.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        prompts: Sequence[Prompt] | Sequence[str],
        num_frames: int,
        *,
        seed: int = 0,
        about: dict[str, Any] | None = None,
        **call: Any,
    ) -> None:
        self.count, self.num_frames = len(prompts), num_frames
        self.prompts = [prompt for prompt in prompts if isinstance(prompt, Prompt)] or None
        self._texts = [p.text if isinstance(p, Prompt) else p for p in prompts]
        self._generate, self._call = generate, call
        self._seed, self._about = seed, about or {}

    def draw(self, indices: range, captions: bool) -> Drawn:
        texts = [self._texts[index] for index in indices]
        noise = [torch.Generator().manual_seed(self._seed * 1_000_003 + i) for i in indices]
        result = self._generate(
            texts, num_frames=self.num_frames, generator=noise, output_type="pt", **self._call
        )
        frames = result.frames if hasattr(result, "frames") else result
        return Drawn(list(indices), torch.as_tensor(frames).float().cpu(), texts)

    def protocol(self) -> dict[str, Any]:
        return {
            "clips": "generated",
            "count": self.count,
            "captions": hashlib.sha256(json.dumps(self._texts).encode()).hexdigest(),
            "num_frames": self.num_frames,
            "seed": self._seed,
            **self._about,
            **self._call,
        }


def captions(source: ClipSource, count: int, seed: int = 0) -> list[str]:
    """Captions of the clips that `StoredClips` draws with the same seed; unusable ones are left out
    and logged.
    """
    found: list[str] = []
    for index in _order(source, seed):
        if len(found) == count:
            break
        try:
            if isinstance(source, ItemSource):
                found.append(source.item(index).text())
            else:
                found.append(source.read(index, ClipFormat(1, 8, 8), seeded(seed, index)).caption)
        except ClipError as error:
            _log.warning("left out %s", error)
    return found


def _order(source: ClipSource, seed: int) -> list[int]:
    return torch.randperm(len(source), generator=seeded("evaluation", seed)).tolist()
