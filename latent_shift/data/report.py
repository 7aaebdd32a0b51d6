"""What is in a data set, and what training would leave out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import Clip, ClipError, ClipFormat, ClipSource, Facts, seeded
from .sampling import length

_EXAMPLES = 3
_SHEET_FRAMES = 8
_SHEET_HEIGHT = 96


@dataclass
class Report:
    """What `inspect` found.

    Attributes:
        kind, where: of the source.
        clips: how many the source lists.
        videos, images: how many of them can be read.
        frames, fps, widths, heights, seconds: least and most over those.
        captions: how many there are.
        words: least, mean and most of a caption.
        examples: some captions.
        damaged: clips that no format can use, by reason.
        refused: clips that only the format asked about cannot use, by reason.
        reasons: some of the two, in words.
        unmatched: captions that belong to no clip.
    """

    kind: str
    where: str
    clips: int
    videos: int = 0
    images: int = 0
    frames: tuple[int, int] | None = None
    fps: tuple[float, float] | None = None
    seconds: tuple[float, float] | None = None
    widths: tuple[int, int] | None = None
    heights: tuple[int, int] | None = None
    captions: int = 0
    words: tuple[int, float, int] | None = None
    examples: list[str] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return self.clips - self.damaged.total() - self.refused.total()


def inspect(
    source: ClipSource,
    form: ClipFormat | None = None,
    *,
    thorough: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Looks at every clip and caption.

    Args:
        form: counts what this format cannot use, too.
        thorough: decode every frame; otherwise the packets and the first frame are looked at, which
            misses damage inside pictures.
        progress: called with 1 after every clip.
    """
    report = Report(source.kind, source.where, len(source), unmatched=list(source.unmatched))
    found: list[Facts] = []
    words: list[int] = []
    told: Counter[str] = Counter()
    for index in range(len(source)):
        problem: ClipError | None = None
        refused = False
        try:
            facts = source.facts(index, thorough)
            found.append(facts)
            have = _frames_at(facts, form.fps if form else None)
            if form and have < form.span:
                detail = f"{form.span} frames are needed, it has {have}"
                problem, refused = ClipError(source.name(index), "too short", detail), True
        except ClipError as error:
            problem = error
        try:
            caption = source.caption(index)
            words.append(len(caption.split()))
            if len(report.examples) < _EXAMPLES and caption not in report.examples:
                report.examples.append(caption)
        except ClipError as error:
            # what is wrong with the clip in every format counts before what is wrong in this one
            if problem is None or refused:
                problem, refused = error, False
        if problem is not None:
            (report.refused if refused else report.damaged)[problem.reason] += 1
            told[problem.reason] += 1
            if told[problem.reason] <= _EXAMPLES:
                report.reasons.append(str(problem))
        if progress:
            progress(1)
    _summarize(report, found, words)
    return report


def contact_sheet(
    source: ClipSource, path: Path, number: int, form: ClipFormat | None = None
) -> list[str]:
    """Writes a PNG of clips from all over the source with their captions.

    Args:
        number: clips shown, fewer where fewer can be read.
        form: shows clips as this format takes them; None spreads a few frames over each.

    Returns:
        Names of the clips shown.

    Raises:
        ValueError: none can be read.
        OSError: the file cannot be written.
    """
    from ..video import write_sheet

    shown: list[Clip] = []
    step = max(1, len(source) // number)
    # first those spread evenly, then whatever is between them
    order = [*range(0, len(source), step), *(i for i in range(len(source)) if i % step)]
    for index in order:
        try:
            fitting = form or _overview(source.facts(index))
            shown.append(source.read(index, fitting, seeded("sheet", index)))
        except ClipError:
            continue
        if len(shown) == number:
            break
    if not shown:
        raise ValueError(f"no clip of {source.where!r} can be shown")
    arrays = [clip.frames.permute(0, 2, 3, 1).numpy() for clip in shown]
    write_sheet(arrays, path, captions=[f"{clip.name}: {clip.caption}" for clip in shown])
    return [clip.name for clip in shown]


def _frames_at(facts: Facts, fps: float | None) -> int:
    if fps is None or facts.fps <= 0:
        return facts.frames
    return length(facts.frames / facts.fps, fps)


def _overview(facts: Facts) -> ClipFormat:
    count = min(_SHEET_FRAMES, facts.frames)
    return ClipFormat(
        count,
        _SHEET_HEIGHT,
        max(1, round(_SHEET_HEIGHT * facts.width / facts.height)),
        stride=facts.frames // count,
        crop="center",
        start="middle",
    )


def _summarize(report: Report, found: Sequence[Facts], words: Sequence[int]) -> None:
    videos = [facts for facts in found if facts.fps > 0]
    report.videos, report.images = len(videos), len(found) - len(videos)
    report.frames = _range(facts.frames for facts in found)
    report.widths = _range(facts.width for facts in found)
    report.heights = _range(facts.height for facts in found)
    report.fps = _range(facts.fps for facts in videos)
    report.seconds = _range(facts.frames / facts.fps for facts in videos)
    report.captions = len(words)
    if words:
        report.words = (min(words), sum(words) / len(words), max(words))


def _range(values: Any) -> Any:
    values = list(values)
    return (min(values), max(values)) if values else None
