"""Data: the generated MovingShapes clips."""

from latent_shift.data.moving_shapes import (
    Clip,
    ClipTruth,
    MovingShapes,
    ObjectTruth,
    Prompt,
    render,
)

__all__ = ["Clip", "ClipTruth", "MovingShapes", "ObjectTruth", "Prompt", "render"]
