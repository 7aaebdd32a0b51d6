"""What is measured on the clips that a run makes on its way."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from latent_shift.pipeline import LatentShiftPipelineOutput

_STILL = 0.25  # of the training clips' difference
_FLICKER = 3.0  # times their second difference
_VISIBLE = 1 / 255


def motion(clips: Tensor) -> dict[str, float]:
    """Returns how much clips move, and how unevenly.

    Args:
        clips: (B, T, 3, H, W) in [0, 1].

    Returns:
        "difference", the mean of |x[t+1] - x[t]| over time, channels and pixels, and
        "second_difference", that of |x[t+1] - 2 x[t] + x[t-1]|; 0 where there are too few frames.
    """
    first = clips.diff(dim=1)
    second = first.diff(dim=1) if first.shape[1] else first
    return {
        "difference": float(first.abs().mean()) if first.numel() else 0.0,
        "second_difference": float(second.abs().mean()) if second.numel() else 0.0,
    }


def say_collapse(found: dict[str, float], truth: dict[str, float]) -> list[str]:
    """Returns warnings where made clips stand still or flicker, measured by the training clips.

    Args:
        found, truth: from `motion`, of made clips and of training clips.
    """
    lines = []
    before, now = truth["difference"], found["difference"]
    if before > _VISIBLE and now < _STILL * before:
        lines.append(
            f"the clips stand still: from frame to frame they change by {now:.4f}, training clips "
            f"by {before:.4f}"
        )
    before, now = truth["second_difference"], found["second_difference"]
    if now > _FLICKER * max(before, _VISIBLE):
        lines.append(
            f"the clips flicker: their second difference is {now:.4f}, that of training clips "
            f"{before:.4f}"
        )
    return lines


def write_clips(made: LatentShiftPipelineOutput, folder: Path, index: int) -> None:
    """Writes a GIF whose comment says what made it."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder / f"{index:02d}.gif")
