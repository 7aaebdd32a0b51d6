"""Captioned clips for training: `open_source` finds them, `Batches` serves them by step.

Example:
    >>> source = open_source("moving-shapes:clips=100")
    >>> form = ClipFormat(num_frames=8, height=32, width=32)
    >>> batches = Batches(source, form, batch_size=2, seed=0)
    >>> batches[7].pixels.shape
    torch.Size([2, 8, 3, 32, 32])
"""

from .base import REASONS, Clip, ClipError, ClipFormat, ClipSource
from .batches import Batch, Batches
from .sources import fingerprint, open_source

__all__ = [
    "REASONS",
    "Batch",
    "Batches",
    "Clip",
    "ClipError",
    "ClipFormat",
    "ClipSource",
    "fingerprint",
    "open_source",
]
