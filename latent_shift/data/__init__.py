"""Data: the generated MovingShapes clips; `clips` reads captioned clips of any layout, `cache`
keeps what the models make of them.
"""

from latent_shift.data.moving_shapes import (
    Clip,
    ClipTruth,
    MovingShapes,
    ObjectTruth,
    Prompt,
    render,
)

__all__ = ["Clip", "ClipTruth", "MovingShapes", "ObjectTruth", "Prompt", "render"]
