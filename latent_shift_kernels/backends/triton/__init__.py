"""The operators in Triton: what serves CUDA tensors where nothing was compiled by nvcc.

``IMPLEMENTATIONS`` maps operator names to functions with the signatures of
:mod:`latent_shift_kernels.ops`. They need Triton, and a GPU or its interpreter
(``TRITON_INTERPRET=1`` before the import), which takes CPU tensors.
"""

from collections.abc import Callable
from typing import Any

from .shift_add import shift_add
from .shift_add_group_norm_silu import (
    shift_add_group_norm_silu,
    shift_add_group_norm_silu_backward,
)
from .shift_group_norm_silu_conv2d import shift_group_norm_silu_conv2d_fused
from .temporal_shift import temporal_shift, temporal_shift_backward

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    implementation.__name__: implementation
    for implementation in (
        temporal_shift,
        temporal_shift_backward,
        shift_add,
        shift_add_group_norm_silu,
        shift_add_group_norm_silu_backward,
        shift_group_norm_silu_conv2d_fused,
    )
}

__all__ = ["IMPLEMENTATIONS"]
