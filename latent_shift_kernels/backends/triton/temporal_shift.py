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

from ...ops import check_shift
from ._common import (
    Layout,
    accumulator,
    cdiv,
    gather_of,
    launch,
    load_adjoint,
    load_gathered,
    pick_tile,
    rounded,
    slices,
    tile_offsets,
)


@triton.jit
def temporal_shift_kernel(
    x_ptr,
    y_ptr,
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
    gather = gather_of(
        i_c, i_n % T, T, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
    )
    if ADD_ENDS:
        b_y = load_adjoint(x_ptr, o_tile, m_tile, gather, True, STRADDLES, ACC)
        b_y = rounded(b_y, y_ptr.dtype.element_ty)
    else:
        b_y = load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES)
    tl.store(y_ptr + o_tile, b_y, mask=m_tile)


def temporal_shift(
    x: Tensor, num_frames: int, sizes: list[int], offsets: list[int], boundary: str
) -> Tensor:
    """``torch.ops.latent_shift.temporal_shift``."""
    check_shift(x, num_frames, sizes, offsets, boundary)
    return _shift(x, num_frames, sizes, offsets, boundary, add_ends=False)


def temporal_shift_backward(
    dy: Tensor, num_frames: int, sizes: list[int], offsets: list[int], boundary: str
) -> Tensor:
    """``torch.ops.latent_shift.temporal_shift_backward``."""
    check_shift(dy, num_frames, sizes, offsets, boundary)
    add_ends = boundary == "replicate"
    back = [-offset for offset in offsets]
    return _shift(dy, num_frames, sizes, back, "zeros" if add_ends else boundary, add_ends)


def _shift(
    x: Tensor,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
    add_ends: bool,
) -> Tensor:
    frames, channels, height, width = x.shape
    layout = Layout.of(x)
    x = layout.dense(x)
    y = layout.like(x)
    if x.numel() == 0:
        return y
    pixels = height * width
    tile = pick_tile(channels, pixels, x.element_size(), layout.channels_last)
    launch(
        temporal_shift_kernel,
        frames * cdiv(channels, tile.block_c) * cdiv(pixels, tile.block_p),
        x,
        tile.num_warps,
        x_ptr=x,
        y_ptr=y,
        T=num_frames,
        P=pixels,
        C=channels,
        BOUNDARY=boundary,
        ADD_ENDS=add_ends,
        CHANNELS_LAST=layout.channels_last,
        BLOCK_P=tile.block_p,
        BLOCK_C=tile.block_c,
        ACC=accumulator(x),
        **slices(sizes, offsets, layout.vec),
    )
    return y
