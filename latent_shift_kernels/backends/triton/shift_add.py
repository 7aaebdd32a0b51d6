"""shift_add: ``y = (residual + temporal_shift(h)) * scale``.

Shapes: residual, h, y (N, C, H, W) with N = B * num_frames, NCHW or channels_last; three slices of
channels. Parallelism: one program per (frame, tile of pixels x channels); the shift is the frame
index of the load of h. Bytes: two reads and one write, 6 an element in 16 bits. Numerics: sum and
product in fp32 (fp64), one rounding. The backward is that of the shift (:mod:`.temporal_shift`):
the gradient of the residual is dy itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...checks import check_same, check_shift
from ._common import (
    UNSPECIALIZED,
    Layout,
    clip_of,
    gather_of,
    launch_tiles,
    load_gathered,
    rounded,
    shift_arguments,
    tile_offsets,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shift_add_kernel(
    residual_ptr,
    h_ptr,
    y_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    P,
    begin1,
    begin2,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BOUNDARY: tl.constexpr,
    STRADDLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles_p = tl.cdiv(P, BLOCK_P)
    i_tile = tl.program_id(0)
    i_c = i_tile % TILES_C * BLOCK_C
    i_p = i_tile // TILES_C % tiles_p * BLOCK_P
    i_n = i_tile // TILES_C // tiles_p
    o_c = i_c + tl.arange(0, BLOCK_C)
    o_p = i_p + tl.arange(0, BLOCK_P)
    m_tile = (o_p < P)[:, None] & (o_c < C)[None, :]
    frame_size = tl.cast(P, tl.int64) * C
    o_tile = i_n.to(tl.int64) * frame_size + tile_offsets(o_p, o_c, P, C, CHANNELS_LAST)
    clip = clip_of(cu_frames_ptr, CLIPS, i_n, N, T)
    gather = gather_of(i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C)
    b_y = tl.load(residual_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    b_y += load_gathered(h_ptr, o_tile, m_tile, gather, STRADDLES).to(ACC)
    tl.store(y_ptr + o_tile, rounded(b_y * SCALE, y_ptr.dtype.element_ty), mask=m_tile)


def shift_add(
    residual: Tensor,
    h: Tensor,
    scale: float,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    """``torch.ops.latent_shift.shift_add``."""
    check_shift(h, cu_frames, num_frames, sizes, offsets, boundary)
    check_same(h, residual, "residual")
    layout = Layout.of(h)
    residual, h = layout.dense(residual), layout.dense(h)
    y = layout.like(h)
    if h.numel():
        launch_tiles(
            shift_add_kernel,
            h,
            layout,
            residual_ptr=residual,
            h_ptr=h,
            y_ptr=y,
            SCALE=float(scale),
            **shift_arguments(h, layout, cu_frames, num_frames, sizes, offsets, boundary),
        )
    return y
