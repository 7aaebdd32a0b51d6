"""shift_add_group_norm_silu and its backward, :mod:`latent_shift_kernels.ops` has the formula.

Shapes: x, residual, y (N, C, H, W) with N = B * num_frames, NCHW or channels_last; mean and rstd
(N, G).

Parallelism: one program per (frame, span of whole groups) does everything in one launch: it takes
the moments of its slab, merges them into groups, and normalises the slab, which it kept in
registers ("resident") or reads again ("streamed"). A slab too large for that to come from L2, or
too few programs to fill a device, goes in two launches over chunks of pixels: "moments", and
"apply", which merges them first. A shift of x is the frame index of its load, a shift of y that of
its store; the backward has them the other way round.

Bytes an element in 16 bits; of a second read L2 may serve part, these counts do not rely on it:

    forward     4 resident, 6 otherwise; with a residual 8 and 10
    backward    6 resident, 10 otherwise; dsum adds 2, a dresidual other than dx adds 2, and dx
                after a shift with the replicate boundary 4, by a launch of its own

Parameter gradients come from sums per (frame, chunk, channel), 8 to 12 bytes each in fp32, which a
last launch reduces.

Numerics: fp32 (fp64) throughout; moments are centred (two passes over a resident slab, else
Welford's update per lane) and merged by Chan's rule. No atomics: every order of summation is fixed.
"""

# ruff: noqa: SIM102  (constexpr and device conditions do not share an `if`)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import check_norm, check_norm_gradients, check_same, check_shift
from ._common import (
    UNSPECIALIZED,
    Layout,
    accumulator,
    cdiv,
    clip_of,
    dense,
    fit,
    gather_of,
    launch,
    load_adjoint,
    load_gathered,
    load_row,
    next_power_of_2,
    rounded,
    scatter_of,
    shift_arguments,
    store_scattered,
    tile_offsets,
)
from .temporal_shift import temporal_shift_backward

# Device code, forward.


@triton.jit
def _load_sum(
    x_ptr,
    residual_ptr,
    b_temb,
    o_tile,
    m_tile,
    gather,
    MOVED: tl.constexpr,
    STRADDLES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The (shifted) input, plus a residual, plus the time embedding."""  # [BLOCK_P, BLOCK_C]
    if MOVED:
        b_x = load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES).to(ACC)
    else:
        b_x = tl.load(x_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    if residual_ptr is not None:
        b_x += tl.load(residual_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    return b_x + b_temb[None, :]


@triton.jit
def _store_sum(sum_ptr, b_x, o_tile, m_tile, ACC: tl.constexpr):
    """Stores the sum, if it is wanted; the statistics are those of what was stored."""
    if sum_ptr is not None:
        b_sum = rounded(b_x, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + o_tile, b_sum, mask=m_tile)
        b_x = b_sum.to(ACC)
    return b_x


@triton.jit
def channel_moments(
    x_ptr,
    residual_ptr,
    sum_ptr,
    b_temb,
    i_p,
    pixels,
    P,
    o_c,
    m_c,
    gather,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MOVED: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and sum of squared deviations over ``pixels`` pixels from ``i_p``, per channel."""
    o_lane = tl.arange(0, BLOCK_P)
    b_mean = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_m2 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    seen = tl.full((), 0.0, ACC)
    for i_block in range(0, tl.cdiv(pixels, BLOCK_P)):
        o_p = i_block * BLOCK_P + o_lane
        m_p = o_p < pixels
        m_tile = m_p[:, None] & m_c[None, :]
        o_tile = tile_offsets(i_p + o_p, o_c, P, C, CHANNELS_LAST)
        b_x = _load_sum(x_ptr, residual_ptr, b_temb, o_tile, m_tile, gather, MOVED, STRADDLES, ACC)
        b_x = _store_sum(sum_ptr, b_x, o_tile, m_tile, ACC)
        seen += 1.0
        b_delta = tl.where(m_p[:, None], b_x - b_mean, 0.0)
        b_mean += b_delta * (1.0 / seen)
        b_m2 += b_delta * (b_x - b_mean)
    # a lane saw every BLOCK_P-th pixel
    b_count = ((pixels - o_lane + BLOCK_P - 1) // BLOCK_P).to(ACC)
    b_mean_c = tl.sum(b_mean * b_count[:, None], 0) / tl.cast(pixels, ACC)
    b_off = b_mean - b_mean_c[None, :]
    return b_mean_c, tl.sum(b_m2 + b_count[:, None] * b_off * b_off, 0)


@triton.jit
def _merge_moments(b_n, b_mean, b_m2, b_mean_c, b_m2_c, m_member, P, ACC: tl.constexpr):
    """Adds channels of P pixels to the pixel count, mean and squared deviations of groups."""
    b_channels = tl.sum(m_member.to(ACC), 1)
    b_mean_new = tl.sum(tl.where(m_member, b_mean_c[None, :], 0.0), 1) / tl.maximum(b_channels, 1.0)
    b_off = b_mean_c[None, :] - b_mean_new[:, None]
    pixels = tl.cast(P, ACC)
    b_m2_new = tl.sum(tl.where(m_member, b_m2_c[None, :] + pixels * b_off * b_off, 0.0), 1)
    b_n_new = b_channels * pixels
    b_total = b_n + b_n_new
    b_share = b_n_new / tl.maximum(b_total, 1.0)
    b_delta = b_mean_new - b_mean
    b_m2 += b_m2_new + b_delta * b_delta * b_n * b_share
    return b_total, b_mean + b_delta * b_share, b_m2


@triton.jit
def _spread(b_group, m_member):
    """A value per group as a value per channel."""  # [BLOCK_C]
    return tl.sum(tl.where(m_member, b_group[:, None], 0.0), 0)


@triton.jit
def inverse_std(b_variance, EPS: tl.constexpr, ACC: tl.constexpr):
    """``1 / sqrt(variance + eps)``."""
    # the approximate rsqrt would be the largest error of the operator in fp32
    if tl.float64 == ACC:
        return 1.0 / tl.sqrt(b_variance + EPS)
    else:
        return tl.div_rn(tl.full(b_variance.shape, 1.0, ACC), tl.sqrt_rn(b_variance + EPS))


@triton.jit
def affine(
    weight_ptr,
    bias_ptr,
    ada_scale_ptr,
    ada_shift_ptr,
    i_n,
    N,
    R_SCALE,
    R_SHIFT,
    o_c,
    m_c,
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """``(xhat * weight + bias) * (1 + ada_scale) + ada_shift`` as one factor and one term."""
    b_scale = load_row(ada_scale_ptr, i_n, N, R_SCALE, o_c, m_c, C, 0.0, ACC) + 1.0
    b_factor = load_row(weight_ptr, i_n, N, 0, o_c, m_c, C, 1.0, ACC) * b_scale
    b_term = load_row(bias_ptr, i_n, N, 0, o_c, m_c, C, 0.0, ACC) * b_scale
    return b_factor, b_term + load_row(ada_shift_ptr, i_n, N, R_SHIFT, o_c, m_c, C, 0.0, ACC)


@triton.jit
def _store_activation(
    y_ptr,
    b_x,
    b_mean_c,
    b_factor,
    b_term,
    o_tile,
    m_tile,
    scatter,
    MOVED: tl.constexpr,
    BOUNDARY: tl.constexpr,
    STRADDLES: tl.constexpr,
):
    b_z = (b_x - b_mean_c[None, :]) * b_factor[None, :] + b_term[None, :]
    b_y = rounded(b_z * tl.sigmoid(b_z), y_ptr.dtype.element_ty)
    if MOVED:
        store_scattered(y_ptr, b_y, o_tile, m_tile, scatter, BOUNDARY, STRADDLES)
    else:
        tl.store(y_ptr + o_tile, b_y, mask=m_tile)


@triton.jit
def _channels(
    i_span,
    i_block,
    C: tl.constexpr,
    CG: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A block of a span's channels: the first, all, which exist, and which belong to which group of
    the span."""
    o_local = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    i_c = i_span * (SPAN * CG) + i_block * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = (o_local < SPAN * CG) & (o_c < C)
    m_member = (o_local[None, :] // CG == tl.arange(0, BLOCK_G)[:, None]) & m_c[None, :]
    return i_c, o_c, m_c, m_member


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shift_add_group_norm_silu_fwd_kernel(
    x_ptr,
    residual_ptr,
    temb_ptr,
    weight_ptr,
    bias_ptr,
    ada_scale_ptr,
    ada_shift_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    moments_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    P,
    CHUNK,
    R_TEMB,
    R_SCALE,
    R_SHIFT,
    begin1,
    begin2,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    SHIFT: tl.constexpr,
    BOUNDARY: tl.constexpr,
    STRADDLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    STAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One span of groups of one frame, over one chunk of its pixels.

    SHIFT is "none", "before" or "after". STAGE is "resident" or "streamed" where the chunk is the
    frame, else "moments", which leaves (2, N, chunks, G) means and squared deviations, and "apply",
    which merges them.
    """
    CG: tl.constexpr = C // G
    SPANS: tl.constexpr = (G + SPAN - 1) // SPAN
    BLOCKS: tl.constexpr = (SPAN * CG + BLOCK_C - 1) // BLOCK_C
    GATHERED: tl.constexpr = SHIFT == "before"
    SCATTERED: tl.constexpr = SHIFT == "after"
    SCATTER: tl.constexpr = "circular" if BOUNDARY == "circular" else "zeros"
    chunks = tl.cdiv(P, CHUNK)
    i_span = tl.program_id(0) % SPANS
    i_chunk = tl.program_id(0) // SPANS % chunks
    i_n = tl.program_id(0) // SPANS // chunks
    clip = clip_of(cu_frames_ptr, CLIPS, i_n, N, T)
    i_p = i_chunk * CHUNK
    pixels = tl.minimum(P - i_p, CHUNK)
    frame_size = tl.cast(P, tl.int64) * C
    o_frame = i_n.to(tl.int64) * frame_size
    x_ptr += o_frame
    y_ptr += o_frame
    if residual_ptr is not None:
        residual_ptr += o_frame
        sum_ptr += o_frame
    o_g = i_span * SPAN + tl.arange(0, BLOCK_G)
    m_g = (tl.arange(0, BLOCK_G) < SPAN) & (o_g < G)
    o_stat = i_n.to(tl.int64) * G + o_g

    b_n = tl.zeros([BLOCK_G], ACC)
    b_mean = tl.zeros([BLOCK_G], ACC)
    b_m2 = tl.zeros([BLOCK_G], ACC)
    if STAGE == "resident":
        i_c, o_c, m_c, m_member = _channels(i_span, 0, C, CG, SPAN, BLOCK_C, BLOCK_G)
        b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
        gather = gather_of(
            i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
        )  # fmt: skip
        o_p = tl.arange(0, BLOCK_P)
        m_tile = (o_p < P)[:, None] & m_c[None, :]
        o_tile = tile_offsets(o_p, o_c, P, C, CHANNELS_LAST)
        b_x = _load_sum(
            x_ptr, residual_ptr, b_temb, o_tile, m_tile, gather, GATHERED, STRADDLES, ACC
        )  # fmt: skip
        b_x = _store_sum(sum_ptr, b_x, o_tile, m_tile, ACC)
        b_mean_c = tl.sum(tl.where(m_tile, b_x, 0.0), 0) / tl.cast(P, ACC)
        b_off = tl.where(m_tile, b_x - b_mean_c[None, :], 0.0)
        b_m2_c = tl.sum(b_off * b_off, 0)
        b_n, b_mean, b_m2 = _merge_moments(b_n, b_mean, b_m2, b_mean_c, b_m2_c, m_member, P, ACC)
    elif STAGE != "apply":
        for i_block in range(0, BLOCKS):
            i_c, o_c, m_c, m_member = _channels(i_span, i_block, C, CG, SPAN, BLOCK_C, BLOCK_G)
            b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
            gather = gather_of(
                i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
            )  # fmt: skip
            b_mean_c, b_m2_c = channel_moments(
                x_ptr, residual_ptr, sum_ptr, b_temb, i_p, pixels, P, o_c, m_c, gather,
                C, CHANNELS_LAST, GATHERED, STRADDLES, BLOCK_P, BLOCK_C, ACC,
            )  # fmt: skip
            b_n, b_mean, b_m2 = _merge_moments(
                b_n, b_mean, b_m2, b_mean_c, b_m2_c, m_member, pixels, ACC
            )

    if STAGE == "moments":
        o_moment = (i_n.to(tl.int64) * chunks + i_chunk) * G + o_g
        tl.store(moments_ptr + o_moment, b_mean, mask=m_g)
        tl.store(moments_ptr + tl.cast(N, tl.int64) * chunks * G + o_moment, b_m2, mask=m_g)
    else:
        if STAGE == "apply":
            o_k = tl.arange(0, BLOCK_K)
            o_moment = (i_n.to(tl.int64) * chunks + o_k)[:, None] * G + o_g[None, :]
            m_moment = (o_k < chunks)[:, None] & m_g[None, :]
            b_means = tl.load(moments_ptr + o_moment, mask=m_moment, other=0.0)
            moments_ptr += tl.cast(N, tl.int64) * chunks * G
            b_m2s = tl.load(moments_ptr + o_moment, mask=m_moment, other=0.0)
            b_count = tl.maximum(tl.minimum(P - o_k * CHUNK, CHUNK), 0).to(ACC)
            b_mean = tl.sum(b_means * b_count[:, None], 0) / tl.cast(P, ACC)
            b_off = b_means - b_mean[None, :]
            b_m2 = tl.sum(b_m2s + b_count[:, None] * CG * b_off * b_off, 0)
        b_rstd = inverse_std(b_m2 / (tl.cast(P, ACC) * CG), EPS, ACC)
        if i_chunk == 0:
            tl.store(mean_ptr + o_stat, b_mean, mask=m_g)
            tl.store(rstd_ptr + o_stat, b_rstd, mask=m_g)

    if STAGE == "resident":
        b_factor, b_term = affine(
            weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
            o_c, m_c, C, ACC,
        )  # fmt: skip
        b_factor *= _spread(b_rstd, m_member)
        scatter = scatter_of(
            i_c, clip, frame_size, begin1, begin2, -D0, -D1, -D2, SCATTER, VEC, BLOCK_C
        )  # fmt: skip
        _store_activation(
            y_ptr, b_x, _spread(b_mean, m_member), b_factor, b_term, o_tile, m_tile, scatter,
            SCATTERED, BOUNDARY, STRADDLES,
        )  # fmt: skip
    elif STAGE != "moments":
        if STAGE == "streamed" and sum_ptr is not None:
            # other threads read the sum back than wrote it
            tl.debug_barrier()
        for i_block in range(0, BLOCKS):
            i_c, o_c, m_c, m_member = _channels(i_span, i_block, C, CG, SPAN, BLOCK_C, BLOCK_G)
            b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
            gather = gather_of(
                i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
            )  # fmt: skip
            scatter = scatter_of(
                i_c, clip, frame_size, begin1, begin2, -D0, -D1, -D2, SCATTER, VEC, BLOCK_C
            )  # fmt: skip
            b_mean_c = _spread(b_mean, m_member)
            b_factor, b_term = affine(
                weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
                o_c, m_c, C, ACC,
            )  # fmt: skip
            b_factor *= _spread(b_rstd, m_member)
            for i_tile in range(0, tl.cdiv(pixels, BLOCK_P)):
                o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
                m_tile = (o_p < pixels)[:, None] & m_c[None, :]
                o_tile = tile_offsets(i_p + o_p, o_c, P, C, CHANNELS_LAST)
                if sum_ptr is not None:
                    b_x = tl.load(sum_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
                else:
                    b_x = _load_sum(
                        x_ptr, None, b_temb, o_tile, m_tile, gather, GATHERED, STRADDLES, ACC
                    )  # fmt: skip
                _store_activation(
                    y_ptr, b_x, b_mean_c, b_factor, b_term, o_tile, m_tile, scatter,
                    SCATTERED, BOUNDARY, STRADDLES,
                )  # fmt: skip


# Device code, backward.


@triton.jit
def _load_dz(
    dy_ptr,
    x_ptr,
    b_mean_c,
    b_factor,
    b_term,
    o_tile,
    m_tile,
    gather,
    back,
    MOVED_X: tl.constexpr,
    MOVED_DY: tl.constexpr,
    ADD_ENDS: tl.constexpr,
    STRADDLES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The centred input, and the gradient before SiLU."""  # [BLOCK_P, BLOCK_C] each
    if MOVED_X:
        b_x = load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES).to(ACC)
    else:
        b_x = tl.load(x_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    if MOVED_DY:
        b_dy = load_adjoint(dy_ptr, o_tile, m_tile, back, ADD_ENDS, STRADDLES, ACC)
    else:
        b_dy = tl.load(dy_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    b_off = b_x - b_mean_c[None, :]
    b_z = b_off * b_factor[None, :] + b_term[None, :]
    b_gate = tl.sigmoid(b_z)
    return b_off, b_dy * b_gate * (1.0 + b_z * (1.0 - b_gate))


@triton.jit
def _store_ds(
    dsum_ptr,
    own_ptr,
    moved_ptr,
    b_off,
    b_dz,
    b_factor,
    b_mean_dz,
    b_slope,
    o_tile,
    m_tile,
    scatter,
    SCATTER: tl.constexpr,
    STRADDLES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Stores the gradient of the sum, in its own frame and where the shift took it from, and
    returns it."""
    b_ds = b_dz * b_factor[None, :] - b_mean_dz[None, :] - b_off * b_slope[None, :]
    if dsum_ptr is not None:
        b_ds += tl.load(dsum_ptr + o_tile, mask=m_tile, other=0.0).to(ACC)
    if own_ptr is not None:
        tl.store(own_ptr + o_tile, rounded(b_ds, own_ptr.dtype.element_ty), mask=m_tile)
    if moved_ptr is not None:
        b_moved = rounded(b_ds, moved_ptr.dtype.element_ty)
        store_scattered(moved_ptr, b_moved, o_tile, m_tile, scatter, SCATTER, STRADDLES)
    return tl.where(m_tile, b_ds, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shift_add_group_norm_silu_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    temb_ptr,
    weight_ptr,
    bias_ptr,
    ada_scale_ptr,
    ada_shift_ptr,
    mean_ptr,
    rstd_ptr,
    own_ptr,
    moved_ptr,
    channel_sums_ptr,
    ds_sums_ptr,
    group_sums_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    P,
    CHUNK,
    R_TEMB,
    R_SCALE,
    R_SHIFT,
    begin1,
    begin2,
    C: tl.constexpr,
    G: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    MOVED_X: tl.constexpr,
    MOVED_DY: tl.constexpr,
    BOUNDARY: tl.constexpr,
    STRADDLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    STAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One span of groups of one frame, over one chunk of its pixels; stages as in the forward.

    Leaves sums of dz and dz * xhat over pixels in ``channel_sums`` (2, N, chunks, C), those of ds
    in ``ds_sums`` (N, chunks, C), and between the stages "moments" and "apply" those over groups in
    ``group_sums`` (2, N, chunks, G).
    """
    CG: tl.constexpr = C // G
    SPANS: tl.constexpr = (G + SPAN - 1) // SPAN
    BLOCKS: tl.constexpr = (SPAN * CG + BLOCK_C - 1) // BLOCK_C
    REVERSE: tl.constexpr = "circular" if BOUNDARY == "circular" else "zeros"
    ADD_ENDS: tl.constexpr = BOUNDARY == "replicate"
    chunks = tl.cdiv(P, CHUNK)
    i_span = tl.program_id(0) % SPANS
    i_chunk = tl.program_id(0) // SPANS % chunks
    i_n = tl.program_id(0) // SPANS // chunks
    clip = clip_of(cu_frames_ptr, CLIPS, i_n, N, T)
    i_p = i_chunk * CHUNK
    pixels = tl.minimum(P - i_p, CHUNK)
    frame_size = tl.cast(P, tl.int64) * C
    o_frame = i_n.to(tl.int64) * frame_size
    x_ptr += o_frame
    dy_ptr += o_frame
    if dsum_ptr is not None:
        dsum_ptr += o_frame
    if own_ptr is not None:
        own_ptr += o_frame
    if moved_ptr is not None:
        moved_ptr += o_frame
    i_row = i_n.to(tl.int64) * chunks + i_chunk
    rows = tl.cast(N, tl.int64) * chunks
    o_g = i_span * SPAN + tl.arange(0, BLOCK_G)
    m_g = (tl.arange(0, BLOCK_G) < SPAN) & (o_g < G)
    o_stat = i_n.to(tl.int64) * G + o_g
    b_mean = tl.load(mean_ptr + o_stat, mask=m_g, other=0.0)
    b_rstd = tl.load(rstd_ptr + o_stat, mask=m_g, other=0.0)
    scale = 1.0 / (tl.cast(P, ACC) * CG)

    # sums over each group of weighted dz and dz * xhat, whose means are taken off
    b_dz_g = tl.zeros([BLOCK_G], ACC)
    b_dzx_g = tl.zeros([BLOCK_G], ACC)
    if STAGE == "resident":
        i_c, o_c, m_c, m_member = _channels(i_span, 0, C, CG, SPAN, BLOCK_C, BLOCK_G)
        b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
        gather = gather_of(
            i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
        )  # fmt: skip
        back = gather_of(
            i_c, clip, frame_size, begin1, begin2, -D0, -D1, -D2, REVERSE, VEC, BLOCK_C
        )  # fmt: skip
        scatter = scatter_of(
            i_c, clip, frame_size, begin1, begin2, D0, D1, D2, REVERSE, VEC, BLOCK_C
        )  # fmt: skip
        b_factor, b_term = affine(
            weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
            o_c, m_c, C, ACC,
        )  # fmt: skip
        b_mean_c = _spread(b_mean, m_member) - b_temb
        b_rstd_c = _spread(b_rstd, m_member)
        b_factor *= b_rstd_c
        o_p = tl.arange(0, BLOCK_P)
        m_tile = (o_p < P)[:, None] & m_c[None, :]
        o_tile = tile_offsets(o_p, o_c, P, C, CHANNELS_LAST)
        b_off, b_dz = _load_dz(
            dy_ptr, x_ptr, b_mean_c, b_factor, b_term, o_tile, m_tile,
            gather, back, MOVED_X, MOVED_DY, ADD_ENDS, STRADDLES, ACC,
        )  # fmt: skip
        b_dz_c = tl.sum(b_dz, 0)
        b_dzx_c = tl.sum(b_dz * b_off, 0) * b_rstd_c
        if channel_sums_ptr is not None:
            tl.store(channel_sums_ptr + i_row * C + o_c, b_dz_c, mask=m_c)
            tl.store(channel_sums_ptr + (rows + i_row) * C + o_c, b_dzx_c, mask=m_c)
        b_dz_g = tl.sum(tl.where(m_member, (b_dz_c * b_factor)[None, :], 0.0), 1)
        b_dzx_g = tl.sum(tl.where(m_member, (b_dzx_c * b_factor)[None, :], 0.0), 1)
        b_ds = _store_ds(
            dsum_ptr, own_ptr, moved_ptr, b_off, b_dz, b_factor,
            _spread(b_dz_g * scale, m_member), _spread(b_dzx_g * scale, m_member) * b_rstd_c,
            o_tile, m_tile, scatter, REVERSE, STRADDLES, ACC,
        )  # fmt: skip
        if ds_sums_ptr is not None:
            tl.store(ds_sums_ptr + i_row * C + o_c, tl.sum(b_ds, 0), mask=m_c)

    if STAGE == "streamed" or STAGE == "moments":
        for i_block in range(0, BLOCKS):
            i_c, o_c, m_c, m_member = _channels(i_span, i_block, C, CG, SPAN, BLOCK_C, BLOCK_G)
            b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
            gather = gather_of(
                i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
            )  # fmt: skip
            back = gather_of(
                i_c, clip, frame_size, begin1, begin2, -D0, -D1, -D2, REVERSE, VEC, BLOCK_C
            )  # fmt: skip
            b_factor, b_term = affine(
                weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
                o_c, m_c, C, ACC,
            )  # fmt: skip
            b_mean_c = _spread(b_mean, m_member) - b_temb
            b_rstd_c = _spread(b_rstd, m_member)
            b_factor *= b_rstd_c
            b_dz_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            b_dzx_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            for i_tile in range(0, tl.cdiv(pixels, BLOCK_P)):
                o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
                m_tile = (o_p < pixels)[:, None] & m_c[None, :]
                o_tile = tile_offsets(i_p + o_p, o_c, P, C, CHANNELS_LAST)
                b_off, b_dz = _load_dz(
                    dy_ptr, x_ptr, b_mean_c, b_factor, b_term, o_tile, m_tile,
                    gather, back, MOVED_X, MOVED_DY, ADD_ENDS, STRADDLES, ACC,
                )  # fmt: skip
                b_dz_sum += b_dz
                b_dzx_sum += b_dz * b_off
            b_dz_c = tl.sum(b_dz_sum, 0)
            b_dzx_c = tl.sum(b_dzx_sum, 0) * b_rstd_c
            if channel_sums_ptr is not None:
                tl.store(channel_sums_ptr + i_row * C + o_c, b_dz_c, mask=m_c)
                tl.store(channel_sums_ptr + (rows + i_row) * C + o_c, b_dzx_c, mask=m_c)
            b_dz_g += tl.sum(tl.where(m_member, (b_dz_c * b_factor)[None, :], 0.0), 1)
            b_dzx_g += tl.sum(tl.where(m_member, (b_dzx_c * b_factor)[None, :], 0.0), 1)

    if STAGE == "moments":
        tl.store(group_sums_ptr + i_row * G + o_g, b_dz_g, mask=m_g)
        tl.store(group_sums_ptr + (rows + i_row) * G + o_g, b_dzx_g, mask=m_g)
    if STAGE == "apply":
        o_k = tl.arange(0, BLOCK_K)
        o_part = (i_n.to(tl.int64) * chunks + o_k)[:, None] * G + o_g[None, :]
        m_part = (o_k < chunks)[:, None] & m_g[None, :]
        b_dz_g = tl.sum(tl.load(group_sums_ptr + o_part, mask=m_part, other=0.0), 0)
        b_dzx_g = tl.sum(tl.load(group_sums_ptr + rows * G + o_part, mask=m_part, other=0.0), 0)

    if STAGE == "streamed" or STAGE == "apply":
        for i_block in range(0, BLOCKS):
            i_c, o_c, m_c, m_member = _channels(i_span, i_block, C, CG, SPAN, BLOCK_C, BLOCK_G)
            b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, ACC)
            gather = gather_of(
                i_c, clip, frame_size, begin1, begin2, D0, D1, D2, BOUNDARY, VEC, BLOCK_C
            )  # fmt: skip
            back = gather_of(
                i_c, clip, frame_size, begin1, begin2, -D0, -D1, -D2, REVERSE, VEC, BLOCK_C
            )  # fmt: skip
            scatter = scatter_of(
                i_c, clip, frame_size, begin1, begin2, D0, D1, D2, REVERSE, VEC, BLOCK_C
            )  # fmt: skip
            b_factor, b_term = affine(
                weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
                o_c, m_c, C, ACC,
            )  # fmt: skip
            b_mean_c = _spread(b_mean, m_member) - b_temb
            b_rstd_c = _spread(b_rstd, m_member)
            b_factor *= b_rstd_c
            b_mean_dz = _spread(b_dz_g * scale, m_member)
            b_slope = _spread(b_dzx_g * scale, m_member) * b_rstd_c
            b_ds_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            for i_tile in range(0, tl.cdiv(pixels, BLOCK_P)):
                o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
                m_tile = (o_p < pixels)[:, None] & m_c[None, :]
                o_tile = tile_offsets(i_p + o_p, o_c, P, C, CHANNELS_LAST)
                b_off, b_dz = _load_dz(
                    dy_ptr, x_ptr, b_mean_c, b_factor, b_term, o_tile, m_tile,
                    gather, back, MOVED_X, MOVED_DY, ADD_ENDS, STRADDLES, ACC,
                )  # fmt: skip
                b_ds_sum += _store_ds(
                    dsum_ptr, own_ptr, moved_ptr, b_off, b_dz, b_factor,
                    b_mean_dz, b_slope, o_tile, m_tile, scatter, REVERSE, STRADDLES, ACC,
                )  # fmt: skip
            if ds_sums_ptr is not None:
                tl.store(ds_sums_ptr + i_row * C + o_c, tl.sum(b_ds_sum, 0), mask=m_c)


@triton.jit
def _sum_rows(
    sums_ptr,
    i_row,
    rows,
    o_c,
    m_c,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for i_block in range(0, tl.cdiv(rows, BLOCK_R)):
        o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = (o_r < rows)[:, None] & m_c[None, :]
        b_sum += tl.load(sums_ptr + (i_row + o_r)[:, None] * C + o_c[None, :], mask=m_r, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def shift_add_group_norm_silu_bwd_parameters_kernel(
    channel_sums_ptr,
    ds_sums_ptr,
    weight_ptr,
    bias_ptr,
    ada_scale_ptr,
    dtemb_ptr,
    dweight_ptr,
    dbias_ptr,
    dada_scale_ptr,
    dada_shift_ptr,
    N,
    CHUNKS,
    R_TEMB,
    R_SCALE,
    R_SHIFT,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of channels of dweight and dbias (row 0), or of one row of dtemb, dada_scale or
    dada_shift.

    R_TEMB, R_SCALE and R_SHIFT are 0 for gradients that nobody wants.
    """
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_out = tl.program_id(0) // TILES_C
    o_c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    rows = tl.cast(N, tl.int64) * CHUNKS
    products_ptr = channel_sums_ptr
    if channel_sums_ptr is not None:
        products_ptr += rows * C
    if dweight_ptr is not None or dbias_ptr is not None:
        if i_out == 0:
            b_dweight = tl.zeros([BLOCK_R, BLOCK_C], ACC)
            b_dbias = tl.zeros([BLOCK_R, BLOCK_C], ACC)
            for i_block in range(0, tl.cdiv(rows, BLOCK_R)):
                o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
                m_r = (o_r < rows)[:, None] & m_c[None, :]
                o_sum = o_r.to(tl.int64)[:, None] * C + o_c[None, :]
                b_dz = tl.load(channel_sums_ptr + o_sum, mask=m_r, other=0.0)
                b_dzx = tl.load(products_ptr + o_sum, mask=m_r, other=0.0)
                if ada_scale_ptr is not None:
                    o_table = (o_r // CHUNKS).to(tl.int64) * R_SCALE // N
                    o_scale = o_table[:, None] * C + o_c[None, :]
                    b_scale = 1.0 + tl.load(ada_scale_ptr + o_scale, mask=m_r, other=0.0).to(ACC)
                    b_dz *= b_scale
                    b_dzx *= b_scale
                b_dbias += b_dz
                b_dweight += b_dzx
            if dweight_ptr is not None:
                b_out = rounded(tl.sum(b_dweight, 0), dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + o_c, b_out, mask=m_c)
            if dbias_ptr is not None:
                b_out = rounded(tl.sum(b_dbias, 0), dbias_ptr.dtype.element_ty)
                tl.store(dbias_ptr + o_c, b_out, mask=m_c)
    i_out -= 1
    if dtemb_ptr is not None:
        if (i_out >= 0) & (i_out < R_TEMB):
            i_row = rows // R_TEMB * i_out
            b_out = _sum_rows(
                ds_sums_ptr, i_row, rows // R_TEMB, o_c, m_c, C, BLOCK_R, BLOCK_C, ACC
            )
            b_out = rounded(b_out, dtemb_ptr.dtype.element_ty)
            tl.store(dtemb_ptr + i_out.to(tl.int64) * C + o_c, b_out, mask=m_c)
    i_out -= R_TEMB
    if dada_scale_ptr is not None:
        if (i_out >= 0) & (i_out < R_SCALE):
            i_row = rows // R_SCALE * i_out
            count = rows // R_SCALE
            b_weight = load_row(weight_ptr, i_out, 1, 0, o_c, m_c, C, 1.0, ACC)
            b_bias = load_row(bias_ptr, i_out, 1, 0, o_c, m_c, C, 0.0, ACC)
            b_out = b_weight * _sum_rows(
                products_ptr, i_row, count, o_c, m_c, C, BLOCK_R, BLOCK_C, ACC
            )
            b_out += b_bias * _sum_rows(
                channel_sums_ptr, i_row, count, o_c, m_c, C, BLOCK_R, BLOCK_C, ACC
            )
            b_out = rounded(b_out, dada_scale_ptr.dtype.element_ty)
            tl.store(dada_scale_ptr + i_out.to(tl.int64) * C + o_c, b_out, mask=m_c)
    i_out -= R_SCALE
    if dada_shift_ptr is not None:
        if (i_out >= 0) & (i_out < R_SHIFT):
            i_row = rows // R_SHIFT * i_out
            b_out = _sum_rows(
                channel_sums_ptr, i_row, rows // R_SHIFT, o_c, m_c, C, BLOCK_R, BLOCK_C, ACC
            )
            b_out = rounded(b_out, dada_shift_ptr.dtype.element_ty)
            tl.store(dada_shift_ptr + i_out.to(tl.int64) * C + o_c, b_out, mask=m_c)


# Configurations.


@dataclass(frozen=True)
class NormConfig:
    """How a frame is cut up: groups a program owns, pixels it takes, and its tile."""

    span: int
    chunk: int
    block_p: int
    block_c: int
    num_warps: int
    resident: bool

    @property
    def max_registers(self) -> int:
        """Registers of a thread with two programs a multiprocessor: unless told that it may take
        these, the assembler spills for a third."""
        return min(65536 // (2 * 32 * self.num_warps), 255)

    def stages(self, pixels: int) -> list[str]:
        """The launches."""
        if self.resident:
            return ["resident"]
        return ["streamed"] if self.chunk >= pixels else ["moments", "apply"]


# A streamed slab that is read twice should come from L2 the second time: 132 to 264 of them share
# 40 to 50 MB.
_MAX_STREAMED_BYTES = 256 * 1024
# Below this a slab takes one program no longer than a second launch costs.
_MIN_CHUNKED_BYTES = 64 * 1024
# Two programs for each of 132 multiprocessors, rounded down to what 32 frames of 8 spans give.
_ENOUGH_PROGRAMS = 256
_MAX_CHUNKS = 128


@cache
def pick_config(
    frames: int,
    channels: int,
    num_groups: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    vec: int,
    streams: int,
    backward: bool,
) -> NormConfig:
    """The configuration for a shape; ``streams`` tensors of it are read by each pass."""
    group = channels // num_groups
    span = _pick_span(frames, group, num_groups, pixels, itemsize, channels_last, vec)
    width = span * group
    spans = cdiv(num_groups, span)
    block_p, block_c = next_power_of_2(pixels), next_power_of_2(width)
    if block_p * block_c * streams <= 16384 // max(itemsize // 4, 1):
        return NormConfig(span, pixels, block_p, block_c, _warps(block_p * block_c * streams), True)
    # 8 elements a thread leave the backward two programs a multiprocessor, the forward takes 16
    elements = (2048 if backward else 4096) // max(itemsize // 4, 1)
    if channels_last:
        block_c = next_power_of_2(width) if width <= 256 else fit(width, 64, 256)
        block_p = min(next_power_of_2(pixels), max(elements // block_c, 1))
    else:
        block_p = fit(pixels, 64, 2048)
        block_c = fit(width, 1, max(elements // block_p, 1))
    config = NormConfig(span, pixels, block_p, block_c, _warps(block_p * block_c * 2), False)
    slab = width * pixels * itemsize * streams
    few = frames * spans < _ENOUGH_PROGRAMS // 2 and slab > _MIN_CHUNKED_BYTES
    if slab > _MAX_STREAMED_BYTES or few:
        chunks = min(cdiv(4 * _ENOUGH_PROGRAMS, frames * spans), _MAX_CHUNKS)
        chunk = cdiv(cdiv(pixels, chunks), block_p) * block_p
        config = NormConfig(span, chunk, block_p, block_c, config.num_warps, False)
    return config


def _pick_span(
    frames: int,
    group: int,
    num_groups: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    vec: int,
) -> int:
    """Groups a program owns."""
    if not channels_last:
        # a group is contiguous; small ones are bundled until there is a tile of 1024 elements
        return min(max(1024 // (group * pixels), 1), num_groups)
    # spans begin at whole vectors, and at whole 32-byte sectors if that leaves programs enough
    unit = vec // gcd(group, vec)
    sector = _multiple_of(unit, group * itemsize, 32)
    for step in (sector, unit):
        span = min(step * max(cdiv(64, step * group * itemsize), 1), num_groups)
        if frames * cdiv(num_groups, span) >= _ENOUGH_PROGRAMS:
            return span
    return min(span, num_groups)


def _multiple_of(unit: int, stride: int, size: int) -> int:
    """The least multiple of ``unit`` that times ``stride`` is a multiple of ``size``."""
    return unit * (size // gcd(unit * stride, size))


def _warps(elements: int) -> int:
    return 4 if elements <= 2048 else 8 if elements <= 8192 else 16


# Host code.


def shift_add_group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
    num_groups: int,
    eps: float,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    shift_after: bool,
    boundary: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.latent_shift.shift_add_group_norm_silu``."""
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    if residual is not None:
        check_same(x, residual, "residual")
    check_norm(x, temb, weight, bias, ada_scale, ada_shift, num_groups)
    frames, channels, height, width = x.shape
    layout = Layout.of(x)
    x, residual = layout.dense(x), layout.dense(residual)
    y = layout.like(x)
    total = None if residual is None else layout.like(x)
    stats = (frames, num_groups)
    mean, rstd = (x.new_empty(stats, dtype=_stats_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        # a frame without pixels has no statistics
        mean.fill_(torch.nan), rstd.fill_(torch.nan)
        return y, x.new_empty(0) if total is None else total, mean, rstd
    pixels = height * width
    config = pick_config(
        frames,
        channels,
        num_groups,
        pixels,
        x.element_size(),
        layout.channels_last,
        layout.vec,
        streams=1 if residual is None else 2,
        backward=False,
    )
    stages = config.stages(pixels)
    chunks = cdiv(pixels, config.chunk)
    moments = None if len(stages) == 1 else mean.new_empty(2, frames, chunks, num_groups)
    tables = (temb, weight, bias, ada_scale, ada_shift)
    temb, weight, bias, ada_scale, ada_shift = (dense(table) for table in tables)
    for stage in stages:
        launch(
            shift_add_group_norm_silu_fwd_kernel,
            frames * chunks * cdiv(num_groups, config.span),
            x,
            config.num_warps,
            maxnreg=config.max_registers,
            x_ptr=x,
            residual_ptr=residual,
            temb_ptr=temb,
            weight_ptr=weight,
            bias_ptr=bias,
            ada_scale_ptr=ada_scale,
            ada_shift_ptr=ada_shift,
            y_ptr=y,
            sum_ptr=total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            moments_ptr=moments,
            EPS=float(eps),
            SHIFT="none" if not any(offsets) else "after" if shift_after else "before",
            **_norm_arguments(num_groups, pixels, config, stage, temb, ada_scale, ada_shift),
            **shift_arguments(x, layout, cu_frames, num_frames, sizes, offsets, boundary),
        )
    return y, x.new_empty(0) if total is None else total, mean, rstd


def shift_add_group_norm_silu_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    is_sum: bool,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    shift_after: bool,
    boundary: str,
) -> tuple[Tensor, ...]:
    """``torch.ops.latent_shift.shift_add_group_norm_silu_backward``."""
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    check_norm_gradients(x, dy, dsum, mean, rstd, num_groups)
    check_norm(x, temb, weight, bias, ada_scale, ada_shift, num_groups)
    frames, channels, height, width = x.shape
    layout = Layout.of(x)
    x, dy, dsum = layout.dense(x), layout.dense(dy), layout.dense(dsum)
    tables = [dense(table) for table in (temb, weight, bias, ada_scale, ada_shift)]
    temb, weight, bias, ada_scale, ada_shift = tables
    mean, rstd = dense(mean), dense(rstd)
    grads = [x.new_empty(0) if table is None else torch.empty_like(table) for table in tables]
    shift_before = not shift_after and any(offsets)
    dx = layout.like(x)
    dresidual = layout.like(x) if is_sum and shift_before else x.new_empty(0)
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        return dx, dresidual, *grads
    # an end frame that was replicated gathers from two, so its gradient waits for all of ds
    deferred = shift_before and boundary == "replicate"
    own: Tensor | None
    moved: Tensor | None
    if not shift_before:
        own, moved = dx, None
    elif deferred:
        own, moved = (dresidual if is_sum else torch.empty_like(dx)), None
    else:
        own, moved = (dresidual if is_sum else None), dx

    pixels = height * width
    config = pick_config(
        frames,
        channels,
        num_groups,
        pixels,
        x.element_size(),
        layout.channels_last,
        layout.vec,
        streams=2 if dsum is None else 3,
        backward=True,
    )
    stages = config.stages(pixels)
    chunks = cdiv(pixels, config.chunk)
    summed = any(table is not None for table in tables[1:])
    workspace = mean.new_empty
    channel_sums = workspace(2, frames, chunks, channels) if summed else None
    ds_sums = None if temb is None else workspace(frames, chunks, channels)
    group_sums = None if len(stages) == 1 else workspace(2, frames, chunks, num_groups)
    for stage in stages:
        launch(
            shift_add_group_norm_silu_bwd_kernel,
            frames * chunks * cdiv(num_groups, config.span),
            x,
            config.num_warps,
            maxnreg=config.max_registers,
            dy_ptr=dy,
            dsum_ptr=dsum,
            x_ptr=x,
            temb_ptr=None if is_sum else temb,
            weight_ptr=weight,
            bias_ptr=bias,
            ada_scale_ptr=ada_scale,
            ada_shift_ptr=ada_shift,
            mean_ptr=mean,
            rstd_ptr=rstd,
            own_ptr=own,
            moved_ptr=moved,
            channel_sums_ptr=channel_sums,
            ds_sums_ptr=ds_sums,
            group_sums_ptr=group_sums,
            MOVED_X=shift_before and not is_sum,
            MOVED_DY=shift_after and any(offsets),
            **_norm_arguments(num_groups, pixels, config, stage, temb, ada_scale, ada_shift),
            **shift_arguments(x, layout, cu_frames, num_frames, sizes, offsets, boundary),
        )
    if deferred and own is not None:
        dx = temporal_shift_backward(own, cu_frames, num_frames, sizes, offsets, boundary)
    if summed or temb is not None:
        rows = [_rows(table) for table in (temb, ada_scale, ada_shift)]
        launch(
            shift_add_group_norm_silu_bwd_parameters_kernel,
            (1 + sum(rows)) * cdiv(channels, 64),
            x,
            4,
            channel_sums_ptr=channel_sums,
            ds_sums_ptr=ds_sums,
            weight_ptr=weight,
            bias_ptr=bias,
            ada_scale_ptr=ada_scale,
            **{
                f"d{name}_ptr": None if table is None else grad
                for name, table, grad in zip(_PARAMETERS, tables, grads, strict=True)
            },
            N=frames,
            CHUNKS=chunks,
            R_TEMB=rows[0],
            R_SCALE=rows[1],
            R_SHIFT=rows[2],
            C=channels,
            BLOCK_R=16,
            BLOCK_C=64,
            ACC=accumulator(x),
        )
    return dx, dresidual, *grads


_PARAMETERS = ("temb", "weight", "bias", "ada_scale", "ada_shift")


def _norm_arguments(
    num_groups: int,
    pixels: int,
    config: NormConfig,
    stage: str,
    temb: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
) -> dict[str, Any]:
    """The arguments that both directions have, beyond those of the shift."""
    return {
        "CHUNK": config.chunk,
        "R_TEMB": _rows(temb),
        "R_SCALE": _rows(ada_scale),
        "R_SHIFT": _rows(ada_shift),
        "G": num_groups,
        "STAGE": stage,
        "SPAN": config.span,
        "BLOCK_P": config.block_p,
        "BLOCK_C": config.block_c,
        "BLOCK_G": next_power_of_2(config.span),
        "BLOCK_K": next_power_of_2(cdiv(pixels, config.chunk)),
    }


def _rows(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[0]


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
