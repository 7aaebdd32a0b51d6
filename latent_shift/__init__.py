"""Text-to-video by a parameter-free channel shift in a text-to-image diffusion model (arXiv
2304.08477).

>>> from latent_shift import LatentShiftPipeline
>>> pipe = LatentShiftPipeline.from_embedded()
>>> pipe("a red circle moving right", seed=0).save("circle.mp4")

Names are imported on first use, so that ``import latent_shift`` and the command line's ``--help``
stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import LatentShiftPipeline
    from .unet import LatentShiftUNet, ShiftConfig, insert_shift, remove_shift

__version__ = "0.1.0"

__all__ = [
    "LatentShiftPipeline",
    "LatentShiftUNet",
    "ShiftConfig",
    "__version__",
    "insert_shift",
    "remove_shift",
]

_HOME = {
    "LatentShiftPipeline": "pipeline",
    "LatentShiftUNet": "unet",
    "ShiftConfig": "unet",
    "insert_shift": "unet",
    "remove_shift": "unet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
