"""Reads MovingShapes clips by analysis of synthesis, and scores them against captions.

No network is involved. In every frame the background is the median of the border, the object is
what differs from it, and its shape is the one whose rendering at the found centre and area fits the
found mask best. What a clip shows is the reading of most of its frames; the direction comes from a
line fitted to the centres.

On real clips every reading is right in at least 99 of 100 (tests/model/test_scorer.py).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_shift.data.moving_shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    TRAVEL,
    ClipTruth,
    MovingShapes,
    ObjectPrompt,
    Prompt,
    caption,
    combinations,
    signed_distance,
)

OF_OBJECTS = ("colour", "shape", "size", "direction")
VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
    "direction": tuple(DIRECTIONS),
}
ATTRIBUTES = tuple(VALUES)
_VISIBLE = 0.12  # distance in RGB from the background below which nothing is there
_STILL = 0.5 * TRAVEL[0]  # half the shortest travel of a moving object
_SIZE_EDGE = math.sqrt(SIZES["small"] * SIZES["large"])


@dataclass(frozen=True)
class ObjectReading:
    """What one object of a clip looks like.

    Attributes:
        colour, shape, size, direction: the clip's reading, names as in the data; None where nothing
            was seen.
        colours, shapes: the reading of every frame.
        track: (T, 2) centres (x, y) in frame units; NaN where nothing was seen.
    """

    colour: str | None
    shape: str | None
    size: str | None
    direction: str | None
    colours: tuple[str | None, ...]
    shapes: tuple[str | None, ...]
    track: Tensor

    @property
    def colour_constant(self) -> bool:
        return self.colour is not None and len(set(self.colours)) == 1

    @property
    def shape_constant(self) -> bool:
        return self.shape is not None and len(set(self.shapes)) == 1

    @property
    def jerk(self) -> float:
        """Mean second difference of the track, in frame widths per frame squared."""
        seen = self.track[~self.track.isnan().any(1)]
        if len(seen) < 3:
            return math.nan
        return float((seen[2:] - 2.0 * seen[1:-1] + seen[:-2]).norm(dim=1).mean())


@dataclass(frozen=True)
class ClipReading:
    """What a clip shows: its objects and the name of its background."""

    objects: tuple[ObjectReading, ...]
    background: str | None


def read_clip(frames: Tensor, num_objects: int = 1) -> ClipReading:
    """Reads a clip.

    Args:
        frames: (T, 3, H, W) in [0, 1], H == W.
        num_objects: how many objects to look for.

    Returns:
        The reading; with one frame every direction is None.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"frames must be (T, 3, H, W) with H == W, got {tuple(frames.shape)}")
    frames = frames.float().cpu()
    ground = _border_median(frames)  # [T, 3]
    background = _mode([_nearest(rgb, BACKGROUNDS) for rgb in ground])
    if num_objects == 1:
        readings = [_read_mask(*_soft_mask(frames, ground), frames.shape[-1])]
    else:
        parts = _split(frames, ground, num_objects)
        readings = [
            _read_mask(*_soft_mask(frames, ground, keep), frames.shape[-1]) for keep in parts
        ]
    return ClipReading(tuple(_summary(*reading) for reading in readings), background)


def score_prompts(clips: Sequence[Tensor], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Scores clips against what their captions ask for.

    Args:
        clips: one (T, 3, H, W) tensor in [0, 1] for each caption.
        prompts: the captions; what one does not name is not scored on its clip.

    Returns:
        Shares of clips in [0, 1]: "colour", "shape", "size", "background", "direction",
        "colour_constant", "shape_constant", "everything" (all that the caption names is right and
        both are constant); and "jerk", a mean over clips. A key nobody asked for is missing.
    """
    votes: dict[str, list[float]] = {}
    for frames, prompt in zip(clips, prompts, strict=True):
        for key, value in score_clip(frames, prompt).items():
            votes.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in votes.items()}


def score_truths(clips: Sequence[Tensor], truths: Sequence[ClipTruth]) -> dict[str, float]:
    """Scores clips against complete ground truth; arguments and result as in `score_prompts`."""
    prompts = [
        Prompt(
            "",
            tuple(
                ObjectPrompt(item.shape, item.colour, item.size, item.direction)
                for item in truth.objects
            ),
            truth.background,
        )
        for truth in truths
    ]
    return score_prompts(clips, prompts)


def held_out_prompts(
    number: int, seed: int = 0, *, split: str = "held_out", image: bool = False
) -> list[Prompt]:
    """Captions of one object each, going round the combinations of a split."""
    data = MovingShapes(seed, split=split)
    triples = combinations(split)
    random.Random(seed).shuffle(triples)
    found: list[Prompt] = []
    for index, wanted in zip(range(number), itertools.cycle(triples)):
        # redraw until the combination comes up: 1 in 32 or 1 in 184
        for attempt in itertools.count():
            truth = data.truth(index * 100_000 + attempt)
            item = truth.objects[0]
            if (item.colour, item.shape, item.direction) == wanted:
                found.append(caption(truth, random.Random(f"{seed}/{index}"), image=image))
                break
    return found


def score_clip(frames: Tensor, prompt: Prompt) -> dict[str, float]:
    """Scores one clip (T, 3, H, W) in [0, 1]: 1 or 0 for every key of `score_prompts` that the
    caption asks for, and "jerk".
    """
    reading = read_clip(frames, len(prompt.objects))
    # readings come in no particular order; the assignment that agrees best is the one meant
    pairs = max(
        (
            list(zip(order, prompt.objects, strict=True))
            for order in itertools.permutations(reading.objects)
        ),
        key=lambda pairs: sum(_agreement(seen, wanted) for seen, wanted in pairs),
    )
    scores = {
        "colour": all(seen.colour == wanted.colour for seen, wanted in pairs),
        "shape": all(seen.shape == wanted.shape for seen, wanted in pairs),
    }
    if all(wanted.size for _, wanted in pairs):
        scores["size"] = all(seen.size == wanted.size for seen, wanted in pairs)
    scores["background"] = reading.background == prompt.background
    if len(frames) > 1:
        if all(wanted.direction for _, wanted in pairs):
            scores["direction"] = all(seen.direction == wanted.direction for seen, wanted in pairs)
        scores["colour_constant"] = all(seen.colour_constant for seen, _ in pairs)
        scores["shape_constant"] = all(seen.shape_constant for seen, _ in pairs)
    scores["everything"] = all(scores.values())
    values = {key: float(value) for key, value in scores.items()}
    jerks = [seen.jerk for seen, _ in pairs if not math.isnan(seen.jerk)]
    if jerks:
        values["jerk"] = sum(jerks) / len(jerks)
    return values


def _agreement(seen: ObjectReading, wanted: ObjectPrompt) -> int:
    return (
        2 * (seen.colour == wanted.colour)
        + (seen.shape == wanted.shape)
        + (seen.direction == wanted.direction)
    )


def _border_median(frames: Tensor) -> Tensor:
    border = torch.cat(
        (frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]), dim=-1
    )
    return border.median(dim=-1).values


def _nearest(rgb: Tensor, palette: dict[str, tuple[float, float, float]]) -> str:
    names = list(palette)
    return names[int((torch.tensor([palette[name] for name in names]) - rgb).norm(dim=1).argmin())]


def _mode(values: Sequence[str | None]) -> str | None:
    seen = [value for value in values if value is not None]
    return max(dict.fromkeys(seen), key=seen.count) if seen else None


def _soft_mask(
    frames: Tensor, ground: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coverage (T, H, W) in [0, 1], the object's colour (T, 3), and whether it is there (T,)."""
    difference = frames - ground[..., None, None]  # [T, 3, H, W]
    if keep is not None:
        difference = difference * keep.unsqueeze(1)
    strength = difference.norm(dim=1)  # [T, H, W]
    # the colour of the pixels that differ most is free of the edge's mixture
    level = (
        strength.flatten(1)
        .topk(max(8, strength[0].numel() // 128), dim=1)
        .values.median(dim=1)
        .values
    )
    core = (strength >= 0.85 * level[:, None, None]).float().unsqueeze(1)
    colour = (frames * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1.0)
    axis = colour - ground
    coverage = (difference * axis[..., None, None]).sum(1) / axis.square().sum(1).clamp(min=1e-6)[
        :, None, None
    ]
    coverage = coverage.clamp(0.0, 1.0)
    # two pixels around what is surely covered: the faint noise of a whole frame outweighs a small
    # object
    near = F.max_pool2d((coverage > 0.4).float().unsqueeze(1), 5, stride=1, padding=2)[:, 0]
    return coverage * near, colour, level > _VISIBLE


def _split(frames: Tensor, ground: Tensor, number: int) -> list[Tensor]:
    """For each object the pixels that belong to it in every frame, (T, H, W) float."""
    strength = (frames - ground[..., None, None]).norm(dim=1)
    labels = _components(strength > _VISIBLE)
    size = frames.shape[-1]
    position = (torch.arange(size) + 0.5) / size
    masks = [torch.zeros_like(strength) for _ in range(number)]
    last: list[Tensor | None] = [None] * number
    for t, plane in enumerate(labels):
        names, counts = plane[plane > 0].unique(return_counts=True)
        parts = {}
        for name in names[counts.argsort(descending=True)[:number]].tolist():
            mask = (plane == name).float()
            centre = torch.stack(((mask.sum(0) @ position), (mask.sum(1) @ position))) / mask.sum()
            parts[name] = (mask, centre)
        for slot in range(number):
            if not parts:
                break
            before = last[slot]
            nearest = min(
                parts,
                key=lambda name: 0.0 if before is None else float((parts[name][1] - before).norm()),
            )
            masks[slot][t], last[slot] = parts.pop(nearest)
    return masks


def _components(mask: Tensor) -> Tensor:
    """Labels 4-connected components of bool (T, H, W): a positive number for each, 0 outside."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float64).view(mask.shape) * mask
    while True:
        wide = F.max_pool2d(labels.unsqueeze(1), (3, 1), stride=1, padding=(1, 0))
        tall = F.max_pool2d(labels.unsqueeze(1), (1, 3), stride=1, padding=(0, 1))
        spread = torch.maximum(wide, tall)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _read_mask(coverage: Tensor, colour: Tensor, there: Tensor, size: int) -> tuple:
    centre = (torch.arange(size) + 0.5) / size
    mass = coverage.sum((1, 2))  # [T] pixels
    there = there & (mass > 4.0)
    weight = coverage / mass.clamp(min=1e-6)[:, None, None]
    x = (weight.sum(1) * centre).sum(1)
    y = (weight.sum(2) * centre).sum(1)
    radius = (mass / math.pi).sqrt() / size
    dx = centre[None, None, :] - x[:, None, None]
    dy = centre[None, :, None] - y[:, None, None]
    fits = []
    for shape in SHAPES:
        model = (0.5 - size * signed_distance(shape, dx, dy, radius[:, None, None])).clamp(0.0, 1.0)
        fits.append((model - coverage).abs().sum((1, 2)))
    best = torch.stack(fits, dim=1).argmin(dim=1).tolist()
    present = there.tolist()
    colours = tuple(
        _nearest(rgb, COLOURS) if seen else None for rgb, seen in zip(colour, present, strict=True)
    )
    shapes = tuple(SHAPES[k] if seen else None for k, seen in zip(best, present, strict=True))
    track = torch.stack((x, y), dim=1)
    track[~there] = math.nan
    return colours, shapes, track, radius[there]


def _summary(colours: tuple, shapes: tuple, track: Tensor, radius: Tensor) -> ObjectReading:
    size = None
    if len(radius):
        size = "large" if float(radius.median()) > _SIZE_EDGE else "small"
    return ObjectReading(
        _mode(colours), _mode(shapes), size, _direction(track), colours, shapes, track
    )


def _direction(track: Tensor) -> str | None:
    """Direction of the line fitted to a track (T, 2); None with fewer than two centres."""
    time = torch.arange(len(track), dtype=torch.float32)
    known = ~track.isnan().any(1)
    if int(known.sum()) < 2:
        return None
    time, track = time[known], track[known]
    time = time - time.mean()
    slope = (time[:, None] * track).sum(0) / time.square().sum()
    travel = slope * (len(known) - 1)
    if float(travel.norm()) < _STILL:
        return "still"
    return max(
        (name for name in DIRECTIONS if name != "still"),
        key=lambda name: float(travel @ torch.tensor(DIRECTIONS[name])),
    )


def value_of(truth: ClipTruth, attribute: str, slot: int = 0) -> str:
    """One of `ATTRIBUTES` of a clip: of its background, or of object `slot`."""
    if attribute == "background":
        return truth.background
    return getattr(truth.objects[slot], attribute)


def with_attribute(truth: ClipTruth, attribute: str, value: str, slot: int = 0) -> ClipTruth:
    """The truth of a clip with another name for an attribute of its background or of object `slot`:
    for captions, no pixel follows."""
    if attribute == "background":
        return replace(truth, background=value)
    change: dict[str, Any] = {attribute: value}
    objects = list(truth.objects)
    objects[slot] = replace(objects[slot], **change)
    return replace(truth, objects=tuple(objects))


def altered(truth: ClipTruth, rng: random.Random, attribute: str | None = None) -> ClipTruth:
    """A clip's truth with one attribute changed: what its caption must not say."""
    attribute = attribute or rng.choice(tuple(VALUES))
    slot = rng.randrange(len(truth.objects))
    now = value_of(truth, attribute, slot)
    others = [value for value in VALUES[attribute] if value != now]
    return with_attribute(truth, attribute, rng.choice(others), slot)


def describes(prompt: Prompt, truth: ClipTruth) -> bool:
    """Whether everything that a caption says is true of a clip."""
    if prompt.background != truth.background or len(prompt.objects) != len(truth.objects):
        return False
    return any(
        all(
            getattr(wanted, name) in (None, getattr(item, name))
            for wanted, item in zip(prompt.objects, order, strict=True)
            for name in OF_OBJECTS
        )
        for order in itertools.permutations(truth.objects)
    )


def full_caption(truth: ClipTruth) -> str:
    """A caption that names every attribute."""
    for wording in itertools.count():
        prompt = caption(truth, random.Random(wording))
        if all(item.size and item.direction for item in prompt.objects):
            return prompt.text
    raise AssertionError("captions name everything now and then")
