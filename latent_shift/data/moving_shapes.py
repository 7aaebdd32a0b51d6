"""MovingShapes: captioned clips of coloured shapes in motion, with their exact ground truth.

A clip is fully described by its `ClipTruth` (objects, background, tracks); pixels are rendered from
it with antialiased signed distances, so nothing is stored and any size can be rendered.
`MovingShapes.sample(index)` is a pure function of `(seed, index)`.

Geometry is in units of the frame: x to the right, y downwards, both in [0, 1]. All shapes of one
size have the same area, so size is read from the area and shape from the outline alone. Every
object stays inside the frame for the whole clip.

Captions follow this grammar (`[]` optional, `|` alternatives, words of `SYNONYMS` where
listed):

    clip    := [medium] scene
    scene   := objects [ground] | ground "," objects
    objects := object ["and" object]
    object  := ("a" | "the") [size] colour shape motion
    image   := the same without any motion
    ground  := ("on" | "against" | "over") "a" background "background" | ("on" | "over") background

What is usual goes without saying: the background of a caption that names none is black. About half
of the captions leave size out; it is free then, and not scored. "a red circle moving right" is the
plainest form.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.14),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (1.00, 0.90, 0.10),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.30, 0.95),
    "purple": (0.55, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.75),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.97, 0.97, 0.97),
    "navy": (0.08, 0.10, 0.32),
}
USUAL = "black"  # the background of two clips in five, and of captions that name none
# radius of the circle with the object's area
SIZES: dict[str, float] = {"small": 0.125, "large": 0.19}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down-right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down": (0.0, 1.0),
    "down-left": (-math.sqrt(0.5), math.sqrt(0.5)),
    "left": (-1.0, 0.0),
    "up-left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "up": (0.0, -1.0),
    "up-right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "still": (0.0, 0.0),
}
OPPOSITE: dict[str, str] = {
    name: min(
        DIRECTIONS,
        key=lambda other: sum(abs(a + b) for a, b in zip(DIRECTIONS[other], step, strict=True)),
    )
    for name, step in DIRECTIONS.items()
}
TRAVEL = (0.28, 0.42)  # distance covered by a moving object in one clip

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "gray": ("gray", "grey"),
    "navy": ("navy", "dark blue"),
}
_VERBS = ("moving", "sliding", "going", "drifting", "that moves")
_DIAGONAL = ("{v} and {h}", "{v} and to the {h}", "diagonally {v} and {h}", "to the {upper} {h}")
STILL = ("standing still", "not moving", "staying still", "at rest")
_MEDIA = {"clip": ("a video of", "a clip of"), "image": ("a picture of", "an image of")}


def half_extents(shape: str, radius: float) -> tuple[float, float, float]:
    """How far `shape` of area pi * radius**2 reaches from its centre: (sideways, up, down)."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        half = 0.5 * math.sqrt(math.pi) * radius
        return half, half, half
    circumradius = triangle_circumradius(radius)
    return 0.5 * math.sqrt(3.0) * circumradius, circumradius, 0.5 * circumradius


def triangle_circumradius(radius: float) -> float:
    """Returns the circumradius of the equilateral triangle of area `pi * radius**2`."""
    return radius * math.sqrt(4.0 * math.pi / (3.0 * math.sqrt(3.0)))


@dataclass(frozen=True)
class ObjectTruth:
    """One object of a clip.

    Attributes:
        shape, colour, size, direction: names from `SHAPES`, `COLOURS`, `SIZES`, `DIRECTIONS`.
        radius: radius of the circle of the same area, in frame units.
        rgb: the rendered colour (the palette's, slightly varied).
        track: centre of area (x, y) in every frame, frame units.
    """

    shape: str
    colour: str
    size: str
    direction: str
    radius: float
    rgb: tuple[float, float, float]
    track: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ClipTruth:
    """A clip's ground truth; the first of `objects` lies deepest."""

    objects: tuple[ObjectTruth, ...]
    background: str
    background_rgb: tuple[float, float, float]

    @property
    def num_frames(self) -> int:
        return len(self.objects[0].track)

    def reversed(self) -> ClipTruth:
        """Returns the truth of the clip played backwards."""
        objects = tuple(
            replace(item, direction=OPPOSITE[item.direction], track=item.track[::-1])
            for item in self.objects
        )
        return replace(self, objects=objects)


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for."""

    text: str
    objects: tuple[ObjectPrompt, ...]
    background: str


@dataclass(frozen=True)
class ObjectPrompt:
    """What a caption says of one object; None where it is silent."""

    shape: str
    colour: str
    size: str | None
    direction: str | None


@dataclass(frozen=True)
class Clip:
    """A rendered clip: `frames` (T, 3, H, W) float32 in [0, 1], caption and ground truth."""

    frames: Tensor
    prompt: Prompt
    truth: ClipTruth


def is_held_out(colour: str, shape: str, direction: str, percent: int = 15) -> bool:
    """Whether the combination is held out, as about `percent` percent of them are."""
    digest = hashlib.sha256(f"{colour}/{shape}/{direction}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def combinations(split: str = "all") -> list[tuple[str, str, str]]:
    """The (colour, shape, direction) combinations of "train", "held_out" or "all"."""
    if split not in ("train", "held_out", "all"):
        raise ValueError(f'split must be "train", "held_out" or "all", got {split!r}')
    every = [(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]
    return [item for item in every if split == "all" or is_held_out(*item) == (split == "held_out")]


class MovingShapes:
    """The data set: an endless, seeded sequence of captioned clips.

    Args:
        seed: chooses the sequence.
        num_frames: frames in a clip.
        size: height and width of a frame in pixels.
        split: "train", "held_out" or "all" combinations of colour, shape and direction.
        two_object_share: share of the clips with two objects.

    Example:
        >>> clip = MovingShapes(seed=0).sample(7)
        >>> clip.frames.shape
        torch.Size([16, 3, 64, 64])
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        num_frames: int = 16,
        size: int = 64,
        split: str = "train",
        two_object_share: float = 0.0,
    ) -> None:
        if num_frames < 1 or size < 8:
            raise ValueError(f"need num_frames >= 1 and size >= 8, got {num_frames} and {size}")
        if not 0.0 <= two_object_share <= 1.0:
            raise ValueError(f"two_object_share must lie in [0, 1], got {two_object_share}")
        self.seed = seed
        self.num_frames = num_frames
        self.size = size
        self.split = split
        self.two_object_share = two_object_share
        self._combinations = combinations(split)

    def truth(self, index: int) -> ClipTruth:
        """Returns the ground truth of clip `index`, without rendering it."""
        rng = random.Random(f"{self.seed}/{index}/truth")
        background = _pick(rng, (USUAL, *BACKGROUNDS))
        count = 2 if rng.random() < self.two_object_share else 1
        while True:
            objects = tuple(self._object(rng, count) for _ in range(count))
            if count == 1 or _apart(*objects):
                return ClipTruth(objects, background, _vary(rng, BACKGROUNDS[background], 0.02))

    def prompt(
        self, index: int, *, wording: int = 0, image: bool = False, backwards: bool = False
    ) -> Prompt:
        """Returns a caption of clip `index`; `wording` chooses among its many wordings.

        Args:
            image: words the caption for a single frame, with no motion in it.
            backwards: words it for the clip played backwards.
        """
        truth = self.truth(index)
        rng = random.Random(f"{self.seed}/{index}/{wording}/prompt")
        return caption(truth.reversed() if backwards else truth, rng, image=image)

    def sample(self, index: int) -> Clip:
        """Returns clip `index`: a pure function of `(seed, index)`."""
        truth = self.truth(index)
        return Clip(render([truth], self.size)[0], self.prompt(index), truth)

    def _object(self, rng: random.Random, count: int) -> ObjectTruth:
        colour, shape, direction = _pick(rng, self._combinations)
        # two large objects would often leave each other no room
        size = "small" if count == 2 else _pick(rng, tuple(SIZES))
        radius = SIZES[size] * rng.uniform(0.93, 1.07)
        travel = rng.uniform(*TRAVEL)
        dx, dy = (travel * step for step in DIRECTIONS[direction])
        side, up, down = half_extents(shape, radius)
        margin = 0.01
        x = rng.uniform(margin + side - min(dx, 0.0), 1.0 - margin - side - max(dx, 0.0))
        y = rng.uniform(margin + up - min(dy, 0.0), 1.0 - margin - down - max(dy, 0.0))
        last = max(self.num_frames - 1, 1)
        track = tuple((x + dx * t / last, y + dy * t / last) for t in range(self.num_frames))
        return ObjectTruth(
            shape, colour, size, direction, radius, _vary(rng, COLOURS[colour], 0.03), track
        )


def caption(truth: ClipTruth, rng: random.Random, *, image: bool = False) -> Prompt:
    """Words a caption for `truth` by the module's grammar, drawing all choices from `rng`."""
    say_size, say_ground, ground_first = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.25
    say_ground |= truth.background != USUAL
    article = "a" if rng.random() < 0.85 else "the"
    phrases, wanted = [], []
    for item in truth.objects:
        words = [article]
        if say_size:
            words.append(_word(rng, item.size))
        words += [item.colour, _word(rng, item.shape)]
        if not image:
            words.append(_motion(rng, item.direction))
        phrases.append(_articled(" ".join(words)))
        wanted.append(
            ObjectPrompt(
                item.shape,
                item.colour,
                item.size if say_size else None,
                None if image else item.direction,
            )
        )
    scene = " and ".join(phrases)
    if say_ground:
        name = _word(rng, truth.background)
        long_form = rng.random() < 0.7
        if long_form:
            ground = f"{_pick(rng, ('on', 'on', 'against', 'over'))} a {name} background"
        else:
            ground = f"{_pick(rng, ('on', 'over'))} {name}"
        scene = f"{ground}, {scene}" if ground_first else f"{scene} {ground}"
    if not (say_ground and ground_first) and rng.random() < 0.1:
        scene = f"{_pick(rng, _MEDIA['image' if image else 'clip'])} {scene}"
    return Prompt(scene, tuple(wanted), truth.background)


def render(truths: Sequence[ClipTruth], size: int, frames: Sequence[int] | None = None) -> Tensor:
    """Renders clips of equal length.

    Args:
        truths: N clips.
        size: height and width in pixels.
        frames: which frames to render, in this order; default all.

    Returns:
        (N, T, 3, size, size) float32 in [0, 1].
    """
    centre = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    num = len(truths)
    out = torch.tensor([clip.background_rgb for clip in truths]).view(num, 1, 3, 1, 1)
    for slot in range(max(len(clip.objects) for clip in truths)):
        rows = [row for row, clip in enumerate(truths) if slot < len(clip.objects)]
        items = [truths[row].objects[slot] for row in rows]
        track = torch.tensor([item.track for item in items], dtype=torch.float32)
        if frames is not None:
            track = track[:, list(frames)]
        radius = torch.tensor([item.radius for item in items]).view(-1, 1, 1, 1)
        distance = torch.empty(len(rows), track.shape[1], size, size)
        for shape in SHAPES:
            mask = torch.tensor([item.shape == shape for item in items])
            if mask.any():
                dx = x - track[mask][..., 0, None, None]
                dy = y - track[mask][..., 1, None, None]
                distance[mask] = signed_distance(shape, dx, dy, radius[mask])
        alpha = (0.5 - distance * size).clamp_(0.0, 1.0).unsqueeze(2)  # one pixel wide edge
        rgb = torch.tensor([item.rgb for item in items]).view(-1, 1, 3, 1, 1)
        out = out.expand(num, track.shape[1], 3, size, size)
        if len(rows) == num:
            out = torch.lerp(out, rgb.expand_as(out), alpha)
        else:
            out = out.clone()
            out[rows] = torch.lerp(out[rows], rgb.expand(len(rows), *out.shape[1:]), alpha)
    return out


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance, negative inside, to `shape` of area pi * radius**2 at the origin.

    Args:
        dx, dy: coordinates relative to the centre of area, y downwards; any broadcastable shapes.
        radius: radius of the circle of the same area.
    """
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.5 * math.sqrt(math.pi) * radius
    if shape == "triangle":
        inradius = 0.5 * radius * triangle_circumradius(1.0)
        return torch.maximum(dy, 0.5 * math.sqrt(3.0) * dx.abs() - 0.5 * dy) - inradius
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def vocabulary() -> list[str]:
    """Returns every word that a caption can contain, sorted."""
    words: set[str] = set()
    for seed in range(2):
        data = MovingShapes(seed, num_frames=2, split="all", two_object_share=0.2)
        for index in range(1500):
            for image in (False, True):
                words.update(data.prompt(index, image=image).text.replace(",", " ,").split())
    return sorted(words)


def _pick(rng: random.Random, options: Sequence):
    # not rng.choice: its draws are not promised to stay the same over Python versions, random() is
    return options[int(rng.random() * len(options))]


def _word(rng: random.Random, name: str) -> str:
    words = SYNONYMS.get(name, (name,))
    return name if rng.random() < 0.75 else _pick(rng, words)


def _motion(rng: random.Random, direction: str) -> str:
    if direction == "still":
        return _pick(rng, STILL)
    verb = "moving" if rng.random() < 0.6 else _pick(rng, _VERBS)
    if "-" in direction:
        v, h = direction.split("-")
        form = _DIAGONAL[0] if rng.random() < 0.6 else _pick(rng, _DIAGONAL)
        return f"{verb} {form.format(v=v, h=h, upper='upper' if v == 'up' else 'lower')}"
    if direction in ("left", "right") and rng.random() < 0.3:
        return f"{verb} to the {direction}"
    return f"{verb} {direction}"


def _articled(phrase: str) -> str:
    return f"an{phrase[1:]}" if phrase.startswith("a ") and phrase[2] in "aeiou" else phrase


def _vary(
    rng: random.Random, rgb: tuple[float, float, float], amount: float
) -> tuple[float, float, float]:
    red, green, blue = (min(max(v + rng.uniform(-amount, amount), 0.0), 1.0) for v in rgb)
    return red, green, blue


def _apart(first: ObjectTruth, second: ObjectTruth) -> bool:
    reach = sum(max(half_extents(item.shape, item.radius)) for item in (first, second)) + 0.05
    return all(math.dist(a, b) >= reach for a, b in zip(first.track, second.track, strict=True))
