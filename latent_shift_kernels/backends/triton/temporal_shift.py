"""temporal_shift and its adjoint: ``y[t, slice] = x[t + offset, slice]``.

Shapes: x, y (N, C, H, W) with N = B * num_frames, NCHW or channels_last; three slices of channels.
Parallelism: one program per (frame, tile of pixels x channels); the shift is the frame index of the
load. Bytes: each element is read once and written once, 4 an element in 16 bits; the elements that
leave the clip are not read. The adjoint is the shift with its offsets reversed; with the replicate
boundary an end frame gathers its two readers, which reads 1/T of the moved channels twice.
Numerics: a copy, bit for bit; the adjoint's one addition is in fp32 (fp64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...checks import check_shift
from ._common import (
    UNSPECIALIZED,
    Layout,
    clip_of,
    gather_of,
    launch_tiles,
    load_adjoint,
    load_gathered,
    rounded,
    shift_arguments,
    tile_offsets,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def temporal_shift_kernel(
    x_ptr,
    y_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    P,
    begin1,
    begin2,
    C: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BOUNDARY: tl.constexpr,
    ADD_ENDS: tl.constexpr,
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
    if ADD_ENDS:
        b_y = load_adjoint(x_ptr, o_tile, m_tile, gather, True, STRADDLES, ACC)
        b_y = rounded(b_y, y_ptr.dtype.element_ty)
    else:
        b_y = load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES)
    tl.store(y_ptr + o_tile, b_y, mask=m_tile)


def temporal_shift(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    """``torch.ops.latent_shift.temporal_shift``."""
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    return _shift(x, cu_frames, num_frames, sizes, offsets, boundary)


def temporal_shift_backward(
    dy: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    """``torch.ops.latent_shift.temporal_shift_backward``."""
    check_shift(dy, cu_frames, num_frames, sizes, offsets, boundary)
    back = [-offset for offset in offsets]
    if boundary == "replicate":
        return _shift(dy, cu_frames, num_frames, sizes, back, "zeros", add_ends=True)
    return _shift(dy, cu_frames, num_frames, sizes, back, boundary)


def _shift(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
    add_ends: bool = False,
) -> Tensor:
    layout = Layout.of(x)
    x = layout.dense(x)
    y = layout.like(x)
    if x.numel():
        launch_tiles(
            temporal_shift_kernel,
            x,
            layout,
            x_ptr=x,
            y_ptr=y,
            ADD_ENDS=add_ends,
            **shift_arguments(x, layout, cu_frames, num_frames, sizes, offsets, boundary),
        )
    return y
