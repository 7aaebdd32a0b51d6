"""Temporal channel shift fused with residual addition, GroupNorm and SiLU: operators for video
U-Nets.

>>> from latent_shift_kernels import ShiftSpec, temporal_shift
>>> y = temporal_shift(x, ShiftSpec.latent_shift(320), num_frames=16)
"""

from . import backends
from .dispatch import choose, explain, serving
from .functional import (
    shift_add,
    shift_add_group_norm_silu,
    shift_group_norm_silu_conv2d,
    temporal_shift,
)
from .modules import ShiftGroupNormSiLU, ShiftGroupNormSiLUConv2d, TemporalShift
from .spec import Placement, ShiftSpec

__version__ = "0.1.0"

__all__ = [
    "Placement",
    "ShiftGroupNormSiLU",
    "ShiftGroupNormSiLUConv2d",
    "ShiftSpec",
    "TemporalShift",
    "explain",
    "serving",
    "shift_add",
    "shift_add_group_norm_silu",
    "shift_group_norm_silu_conv2d",
    "temporal_shift",
]

backends.load(choose)
