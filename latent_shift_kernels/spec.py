"""What a temporal channel shift is: which channels come from which frame, and what enters at the
ends.

:class:`ShiftSpec` is the only description of a shift in this project; operators take it lowered to
plain lists (``sizes``, ``offsets``, ``boundary``), everything else passes it around whole.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["prev", "keep", "next"]
Boundary = Literal["zeros", "replicate", "circular"]
SingleFrame = Literal["identity", "shift"]

BOUNDARIES: tuple[str, ...] = get_args(Boundary)
_SINGLE_FRAME: tuple[str, ...] = get_args(SingleFrame)
# Output frame t of a slice reads input frame t + offset.
_OFFSETS: dict[str, int] = {"prev": -1, "keep": 0, "next": 1}


class Placement(enum.StrEnum):
    """Where in a two-convolution ResNet block the shift sits.

    The paper (arXiv 2304.08477) draws it last in the residual branch, before the addition
    (``BRANCH_OUTPUT``); the drawing shows one stage of a two-stage block, so the other readings can
    be chosen: between conv1 and norm2 (``CONV1_OUTPUT``), between SiLU and conv1 (``CONV1_INPUT``,
    the position TSM calls "blockres"), and before norm1 inside the branch only (``BLOCK_INPUT``).
    """

    BRANCH_OUTPUT = "branch_output"
    CONV1_OUTPUT = "conv1_output"
    CONV1_INPUT = "conv1_input"
    BLOCK_INPUT = "block_input"


@dataclass(frozen=True)
class ShiftSpec:
    """A shift by one frame of some channels of a clip, in either direction.

    With ``order=("prev", "keep", "next")`` and frames ``t = 0 .. T-1`` the channels split into
    three slices and ``y[t] = concat(x[t-1, :prev], x[t, prev:prev+keep], x[t+1, prev+keep:])``.

    Args:
        prev: Channels taken from the previous frame.
        keep: Channels left where they are.
        next: Channels taken from the next frame.
        order: The order of the three slices along the channel axis.
        boundary: What enters where no neighbour exists: ``"zeros"`` (the paper), ``"replicate"``
            (the clip's own end frame) or ``"circular"`` (the other end of the clip).
        single_frame: A clip of one frame is left alone (``"identity"``) or follows ``boundary``
            (``"shift"``), which for zeros wipes every moved channel.

    Raises:
        ValueError: On negative counts, no channels at all, or unknown names.
    """

    prev: int
    keep: int
    next: int
    order: tuple[Direction, Direction, Direction] = ("prev", "keep", "next")
    boundary: Boundary = "zeros"
    single_frame: SingleFrame = "identity"

    def __post_init__(self) -> None:
        counts = {"prev": self.prev, "keep": self.keep, "next": self.next}
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"ShiftSpec.{name} must be a channel count >= 0, got {count!r}")
        if sum(counts.values()) == 0:
            raise ValueError("ShiftSpec needs at least one channel, got prev = keep = next = 0")
        object.__setattr__(self, "order", tuple(self.order))
        if sorted(self.order) != ["keep", "next", "prev"]:
            raise ValueError(
                f"ShiftSpec.order must name prev, keep and next once each, got {self.order!r}"
            )
        if self.boundary not in BOUNDARIES:
            raise ValueError(
                f"ShiftSpec.boundary must be one of {', '.join(BOUNDARIES)}, got {self.boundary!r}"
            )
        if self.single_frame not in _SINGLE_FRAME:
            raise ValueError(
                f"ShiftSpec.single_frame must be one of {', '.join(_SINGLE_FRAME)}, "
                f"got {self.single_frame!r}"
            )

    @classmethod
    def latent_shift(
        cls,
        channels: int,
        *,
        boundary: Boundary = "zeros",
        single_frame: SingleFrame = "identity",
    ) -> ShiftSpec:
        """Latent-Shift's thirds (arXiv 2304.08477, shift figure): previous, keep, next.

        Where 3 does not divide ``channels`` the remainder is kept in place (our decision; the paper
        is silent): 320 channels split 106 / 108 / 106.
        """
        fold = _fold(channels, 3)
        return cls(fold, channels - 2 * fold, fold, boundary=boundary, single_frame=single_frame)

    @classmethod
    def tsm(
        cls,
        channels: int,
        fold_div: int = 8,
        *,
        boundary: Boundary = "zeros",
        single_frame: SingleFrame = "identity",
    ) -> ShiftSpec:
        """TSM's eighths (arXiv 1811.08383): next, previous, keep. The opposite order of the
        paper's."""
        fold = _fold(channels, fold_div, least=2)
        return cls(
            fold,
            channels - 2 * fold,
            fold,
            order=("next", "prev", "keep"),
            boundary=boundary,
            single_frame=single_frame,
        )

    @classmethod
    def causal(
        cls,
        channels: int,
        fold_div: int = 8,
        *,
        boundary: Boundary = "zeros",
        single_frame: SingleFrame = "identity",
    ) -> ShiftSpec:
        """TSM's online form (arXiv 1811.08383): the first slice from the previous frame, none from
        the next."""
        fold = _fold(channels, fold_div)
        return cls(fold, channels - fold, 0, boundary=boundary, single_frame=single_frame)

    @property
    def channels(self) -> int:
        """Channels of the tensor this spec describes."""
        return self.prev + self.keep + self.next

    @property
    def sizes(self) -> list[int]:
        """Channels of each slice, in channel order."""
        return [getattr(self, direction) for direction in self.order]

    def offsets(self, num_frames: int | None) -> list[int]:
        """Frame offset of each slice in channel order; all zero where a clip of ``num_frames``
        stays as it is. None is for clips of any length, told apart by the operator."""
        if num_frames == 1 and self.single_frame == "identity":
            return [0, 0, 0]
        return [_OFFSETS[direction] for direction in self.order]


def _fold(channels: int, fold_div: int, least: int = 1) -> int:
    if channels < 1:
        raise ValueError(f"channels must be >= 1, got {channels}")
    if fold_div < least:
        raise ValueError(
            f"fold_div must be >= {least} (each way moves channels // fold_div), got {fold_div}"
        )
    return channels // fold_div
