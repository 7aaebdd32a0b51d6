"""shift_group_norm_silu_conv2d in one pass over its input, :mod:`latent_shift_kernels.ops` has the
formula.

Shapes: x (N, C, H, W) and skip (N, C2, H, W), channels_last, Cin = C + C2; filter (Cout, Cin, 3,
3); out, residual (N, Cout, H, W).

Parallelism: moments of every channel of every frame, one program per (frame, block of channels);
mean, rstd and three coefficients per (frame, channel) that hold the norm, the tables and the shift
of the statistics, one program per (frame, group); then an implicit GEMM, one program per (frame,
tile of pixels x output channels). Its prologue normalises and activates what it loads, the shift
of its input being the frame index of the load; its epilogue adds bias, time embedding and residual,
and stores to the frames of the output's shift.

Bytes an element in 16 bits: 2 of input for the moments, and 2 more per tile of output channels, of
which L2 and L1 serve all but 2; 2 of output. The price is arithmetic: each of the nine taps
normalises and activates again.

Numerics: moments and coefficients in fp32, the activation rounded to the dtype of x before the
product, which accumulates in fp32; fp32 inputs multiply in TF32 where PyTorch's convolutions may.
"""

# ruff: noqa: SIM102  (constexpr and device conditions do not share an `if`)

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import choices
from ...checks import check_conv2d
from ._common import (
    INTERPRETED,
    UNSPECIALIZED,
    Layout,
    cdiv,
    clip_of,
    dense,
    fit,
    gather_of,
    launch,
    load_gathered,
    load_row,
    next_power_of_2,
    rounded,
    scatter_of,
    shift_arguments,
    sources_of,
    tile_offsets,
    vector_of,
    vectors,
)
from .shift_add_group_norm_silu import affine, channel_moments, inverse_std

# Statistics.


@triton.jit
def conv2d_moments_kernel(
    x_ptr,
    moments_ptr,
    N,
    P,
    BEGIN: tl.constexpr,
    C: tl.constexpr,
    CIN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Means and squared deviations (2, N, CIN) of C channels from BEGIN."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = tl.program_id(0) // TILES_C
    o_c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    x_ptr += i_n.to(tl.int64) * P * C
    b_none = tl.zeros([BLOCK_C], tl.float32)
    b_mean, b_m2 = channel_moments(
        x_ptr, None, None, b_none, 0, P, P, o_c, m_c, None,
        C, True, False, False, BLOCK_P, BLOCK_C, tl.float32,
    )  # fmt: skip
    o_moment = i_n.to(tl.int64) * CIN + BEGIN + o_c
    tl.store(moments_ptr + o_moment, b_mean, mask=m_c)
    tl.store(moments_ptr + tl.cast(N, tl.int64) * CIN + o_moment, b_m2, mask=m_c)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv2d_coefficients_kernel(
    moments_ptr,
    temb_ptr,
    weight_ptr,
    bias_ptr,
    ada_scale_ptr,
    ada_shift_ptr,
    mean_ptr,
    rstd_ptr,
    coefficients_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    P,
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
    BOUNDARY: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of a group of a frame, and ``(x - centre) * factor + term`` per channel (3, N, C).

    The moments are those of unshifted channels, so a shift before the norm is a choice of rows.
    """
    CG: tl.constexpr = C // G
    i_n = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    o_c = i_g * CG + tl.arange(0, BLOCK_C)
    m_c = tl.arange(0, BLOCK_C) < CG
    b_temb = load_row(temb_ptr, i_n, N, R_TEMB, o_c, m_c, C, 0.0, tl.float32)
    o_row = i_n.to(tl.int64) * C + o_c
    o_source, m_source = o_row, m_c
    if SHIFT == "before":
        clip = clip_of(cu_frames_ptr, CLIPS, i_n, N, T)
        o_move, m_move = sources_of(o_c, clip, begin1, begin2, D0, D1, D2, BOUNDARY)
        o_source = o_row + o_move.to(tl.int64) * C
        m_source = m_c & m_move
    rows = tl.cast(N, tl.int64) * C
    b_mean_c = tl.load(moments_ptr + o_source, mask=m_source, other=0.0) + b_temb
    b_m2_c = tl.load(moments_ptr + rows + o_source, mask=m_source, other=0.0)
    pixels = tl.cast(P, tl.float32)
    mean = tl.sum(tl.where(m_c, b_mean_c, 0.0), 0) / CG
    b_off = tl.where(m_c, b_mean_c - mean, 0.0)
    b_m2 = tl.full([1], tl.sum(b_m2_c + pixels * b_off * b_off, 0), tl.float32)
    b_rstd = inverse_std(b_m2 / (pixels * CG), EPS, tl.float32)
    o_stat = i_n.to(tl.int64) * G + i_g + tl.arange(0, 1)
    tl.store(mean_ptr + o_stat, tl.full([1], mean, tl.float32))
    tl.store(rstd_ptr + o_stat, b_rstd)
    b_factor, b_term = affine(
        weight_ptr, bias_ptr, ada_scale_ptr, ada_shift_ptr, i_n, N, R_SCALE, R_SHIFT,
        o_c, m_c, C, tl.float32,
    )  # fmt: skip
    tl.store(coefficients_ptr + o_row, mean - b_temb, mask=m_c)
    tl.store(coefficients_ptr + rows + o_row, b_factor * tl.sum(b_rstd, 0), mask=m_c)
    tl.store(coefficients_ptr + 2 * rows + o_row, b_term, mask=m_c)


@triton.jit
def conv2d_sums_kernel(
    parts_ptr,
    sums_ptr,
    N,
    P,
    TILES,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the moments of tiles of BLOCK_P pixels (2, N, TILES, C) into sums (N, C, 2)."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = (tl.program_id(0) // TILES_C).to(tl.int64)
    o_c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    parts = tl.cast(N, tl.int64) * TILES * C
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    for i_tile in range(0, TILES):
        count = tl.minimum(P - i_tile * BLOCK_P, BLOCK_P).to(tl.float32)
        o_part = (i_n * TILES + i_tile) * C + o_c
        b_sum += count * tl.load(parts_ptr + o_part, mask=m_c, other=0.0)
    b_mean = b_sum / tl.cast(P, tl.float32)
    b_m2 = tl.zeros([BLOCK_C], tl.float32)
    for i_tile in range(0, TILES):
        count = tl.minimum(P - i_tile * BLOCK_P, BLOCK_P).to(tl.float32)
        o_part = (i_n * TILES + i_tile) * C + o_c
        b_off = tl.load(parts_ptr + o_part, mask=m_c, other=0.0) - b_mean
        b_m2 += tl.load(parts_ptr + parts + o_part, mask=m_c, other=0.0) + count * b_off * b_off
    o_sum = (i_n * C + o_c) * 2
    tl.store(sums_ptr + o_sum, b_sum, mask=m_c)
    tl.store(sums_ptr + o_sum + 1, b_m2, mask=m_c)


# The convolution.


@triton.jit
def _accumulate(
    b_acc,
    x_ptr,
    filter_ptr,
    coefficients_ptr,
    i_n,
    rows,
    o_p,
    o_o,
    clip,
    H,
    W,
    begin1,
    begin2,
    BEGIN: tl.constexpr,
    C: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    SHIFT: tl.constexpr,
    BOUNDARY: tl.constexpr,
    VEC: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the products of C channels of ``x_ptr``, BEGIN and on among those of the filter."""
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    P = H * W
    frame_size = tl.cast(P, tl.int64) * C
    x_ptr += i_n.to(tl.int64) * frame_size
    o_h, o_w = o_p // W, o_p % W
    m_o = o_o < COUT
    for i_step in range(0, 9 * BLOCKS):
        i_tap = i_step % 9
        i_c = i_step // 9 * BLOCK_K
        o_c = i_c + tl.arange(0, BLOCK_K)
        m_c = o_c < C
        o_coefficient = i_n.to(tl.int64) * CIN + BEGIN + o_c
        m_coefficient = m_c
        if SHIFT == "after":
            # The activation is that of the frame it comes from, and 0 where there is none.
            o_move, m_move = sources_of(
                o_c, clip, begin1 - BEGIN, begin2 - BEGIN, D0, D1, D2, BOUNDARY
            )
            o_coefficient += o_move.to(tl.int64) * CIN
            m_coefficient = m_c & m_move
        b_centre = tl.load(coefficients_ptr + o_coefficient, mask=m_coefficient, other=0.0)
        o_coefficient += rows
        b_factor = tl.load(coefficients_ptr + o_coefficient, mask=m_coefficient, other=0.0)
        o_coefficient += rows
        b_term = tl.load(coefficients_ptr + o_coefficient, mask=m_coefficient, other=0.0)
        o_y, o_x = o_h + (i_tap // 3 - 1), o_w + (i_tap % 3 - 1)
        m_p = (o_p < P) & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
        m_tile = m_p[:, None] & m_c[None, :]
        o_tile = tile_offsets(o_y * W + o_x, o_c, P, C, True)
        if SHIFT == "none":
            b_x = tl.load(x_ptr + o_tile, mask=m_tile, other=0.0)
        else:
            gather = gather_of(
                i_c, clip, frame_size, begin1 - BEGIN, begin2 - BEGIN, D0, D1, D2, BOUNDARY,
                VEC, BLOCK_K,
            )  # fmt: skip
            b_x = load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES)
        b_z = (b_x.to(tl.float32) - b_centre[None, :]) * b_factor[None, :] + b_term[None, :]
        b_a = rounded(tl.where(m_p[:, None], b_z * tl.sigmoid(b_z), 0.0), b_x.dtype)
        o_filter = o_o.to(tl.int64)[None, :] * (9 * CIN) + (i_tap * CIN + BEGIN + o_c)[:, None]
        b_filter = tl.load(filter_ptr + o_filter, mask=m_c[:, None] & m_o[None, :], other=0.0)
        if INTERPRETED:
            # the interpreter multiplies the bits of bf16
            b_acc = tl.dot(b_a.to(tl.float32), b_filter.to(tl.float32), b_acc)
        else:
            b_acc = tl.dot(b_a, b_filter, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def _store_out(
    out_ptr,
    residual_ptr,
    parts_ptr,
    b_c,
    o_tile,
    m_p,
    o_part,
    parts,
    part_size,
    o_frames,
    m_o,
    frame_size,
    SCALE: tl.constexpr,
):
    """Stores a tile for the channels ``m_o``, each in the frame ``o_frames`` away, and the moments
    of what it stored."""
    o_frame = o_frames * frame_size
    m_tile = m_p[:, None] & m_o[None, :]
    if residual_ptr is not None:
        p_residual = (residual_ptr + o_frame)[None, :] + o_tile
        b_c += tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)
    b_out = rounded(b_c * SCALE, out_ptr.dtype.element_ty)
    tl.store((out_ptr + o_frame)[None, :] + o_tile, b_out, mask=m_tile)
    if parts_ptr is not None:
        b_wide = b_out.to(tl.float32)
        count = tl.sum(m_p.to(tl.float32), 0)
        b_mean = tl.sum(tl.where(m_tile, b_wide, 0.0), 0) / count
        b_off = tl.where(m_tile, b_wide - b_mean[None, :], 0.0)
        o_moment = o_part + o_frames * part_size
        tl.store(parts_ptr + o_moment, b_mean, mask=m_o)
        tl.store(parts_ptr + parts + o_moment, tl.sum(b_off * b_off, 0), mask=m_o)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv2d_kernel(
    x_ptr,
    skip_ptr,
    filter_ptr,
    filter_bias_ptr,
    out_temb_ptr,
    residual_ptr,
    coefficients_ptr,
    out_ptr,
    parts_ptr,
    cu_frames_ptr,
    CLIPS,
    N,
    T,
    H,
    W,
    R_OUT,
    begin1,
    begin2,
    out_begin1,
    out_begin2,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    OUT_D0: tl.constexpr,
    OUT_D1: tl.constexpr,
    OUT_D2: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT_SHIFT: tl.constexpr,
    BOUNDARY: tl.constexpr,
    VEC: tl.constexpr,
    STRADDLES: tl.constexpr,
    SKIP_VEC: tl.constexpr,
    SKIP_STRADDLES: tl.constexpr,
    OUT_VEC: tl.constexpr,
    OUT_STRADDLES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of pixels x output channels of one frame.

    SHIFT is "none", "before" the norm or "after" the activation; ``parts`` takes the moments of
    tiles of the output, (2, N, tiles, COUT).
    """
    TILES_O: tl.constexpr = (COUT + BLOCK_O - 1) // BLOCK_O
    P = H * W
    tiles_p = tl.cdiv(P, BLOCK_P)
    i_o = tl.program_id(0) % TILES_O * BLOCK_O
    i_tile = tl.program_id(0) // TILES_O % tiles_p
    i_n = tl.program_id(0) // TILES_O // tiles_p
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o_o = i_o + tl.arange(0, BLOCK_O)
    m_p, m_o = o_p < P, o_o < COUT
    clip = clip_of(cu_frames_ptr, CLIPS, i_n, N, T)
    rows = tl.cast(N, tl.int64) * CIN
    b_acc = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    b_acc = _accumulate(
        b_acc, x_ptr, filter_ptr, coefficients_ptr, i_n, rows, o_p, o_o, clip, H, W,
        begin1, begin2, 0, C, CIN, COUT, D0, D1, D2, SHIFT, BOUNDARY, VEC, STRADDLES,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    if skip_ptr is not None:
        b_acc = _accumulate(
            b_acc, skip_ptr, filter_ptr, coefficients_ptr, i_n, rows, o_p, o_o, clip, H, W,
            begin1, begin2, C, CIN - C, CIN, COUT, D0, D1, D2, SHIFT, BOUNDARY, SKIP_VEC,
            SKIP_STRADDLES, BLOCK_K, PRECISION,
        )  # fmt: skip
    b_term = load_row(filter_bias_ptr, i_n, N, 0, o_o, m_o, COUT, 0.0, tl.float32)
    b_term += load_row(out_temb_ptr, i_n, N, R_OUT, o_o, m_o, COUT, 0.0, tl.float32)
    b_acc += b_term[None, :]

    frame_size = tl.cast(P, tl.int64) * COUT
    part_size = tl.cast(tiles_p, tl.int64) * COUT
    parts = tl.cast(N, tl.int64) * part_size
    out_ptr += i_n.to(tl.int64) * frame_size
    if residual_ptr is not None:
        residual_ptr += i_n.to(tl.int64) * frame_size
    o_tile = o_p[:, None] * COUT + o_o[None, :]  # 32 bits: half the registers
    o_part = (i_n.to(tl.int64) * tiles_p + i_tile) * COUT + o_o
    o_here = tl.zeros([BLOCK_O], tl.int64)
    if OUT_SHIFT:
        SCATTER: tl.constexpr = "circular" if BOUNDARY == "circular" else "zeros"
        to = scatter_of(
            i_o, clip, 1, out_begin1, out_begin2, -OUT_D0, -OUT_D1, -OUT_D2, SCATTER,
            OUT_VEC, BLOCK_O,
        )  # fmt: skip
        _store_out(
            out_ptr, residual_ptr, parts_ptr, b_acc, o_tile, m_p, o_part, parts, part_size,
            to[0], m_o & to[1], frame_size, SCALE,
        )  # fmt: skip
        if OUT_STRADDLES:
            if to[6]:
                _store_out(
                    out_ptr, residual_ptr, parts_ptr, b_acc, o_tile, m_p, o_part, parts,
                    part_size, to[2], m_o & to[3], frame_size, SCALE,
                )  # fmt: skip
        if BOUNDARY != "circular":
            if to[7]:
                b_end = b_acc
                if BOUNDARY == "zeros":
                    b_end = tl.zeros_like(b_acc)
                _store_out(
                    out_ptr, residual_ptr, parts_ptr, b_end, o_tile, m_p, o_part, parts,
                    part_size, o_here, m_o & (to[4] | to[5]), frame_size, SCALE,
                )  # fmt: skip
    else:
        _store_out(
            out_ptr, residual_ptr, parts_ptr, b_acc, o_tile, m_p, o_part, parts, part_size,
            o_here, m_o, frame_size, SCALE,
        )  # fmt: skip


# Configurations.


@dataclass(frozen=True)
class ConvConfig:
    """A tile of the product: pixels x output channels, in steps of input channels."""

    block_p: int
    block_o: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        sizes = (self.block_p, self.block_o, self.block_k, self.num_warps, self.num_stages)
        return "x".join(map(str, sizes))


# Largest first. The first keeps 64 accumulators a thread, which spills where a shift of input or
# output needs registers for where it reads and writes; the others keep 32 or fewer.
CONFIGS = (
    ConvConfig(128, 128, 32, 8, 3),
    ConvConfig(128, 64, 32, 8, 2),
    ConvConfig(64, 64, 32, 8, 3),
    ConvConfig(32, 64, 32, 4, 3),
    ConvConfig(16, 64, 32, 4, 3),
    ConvConfig(16, 32, 32, 2, 3),
    ConvConfig(16, 16, 16, 1, 2),
)
_MULTIPROCESSORS = 132


@cache
def conv_configs(
    frames: int, pixels: int, cin: int, cout: int, itemsize: int, shifted: bool
) -> dict[str, ConvConfig]:
    """The configurations that fit a call; first the largest tile that a frame and the output fill,
    with a program for each multiprocessor if any has, which serves where none was measured."""
    fitting = [
        config
        for config in CONFIGS[1 if shifted else 0 :]
        if config.block_p < 2 * max(pixels, 9)
        and config.block_o < 2 * max(cout, 9)
        and config.block_k < 2 * max(cin, 9)
    ]

    def programs(config: ConvConfig) -> int:
        return frames * cdiv(pixels, config.block_p) * cdiv(cout, config.block_o)

    chosen = next((c for c in fitting if programs(c) >= _MULTIPROCESSORS), fitting[-1])
    ordered = [chosen, *(config for config in fitting if config is not chosen)]
    if itemsize != 2:
        # half the channels a step are as many bytes in fp32
        ordered = [replace(config, block_k=16, num_stages=2) for config in ordered]
    return {str(config): config for config in ordered}


def config_key(x: Tensor, cin: int, cout: int) -> str:
    """What the tables of :mod:`latent_shift_kernels.choices` call the configuration of a call."""
    return choices.key("triton_conv2d", x.dtype, (x.shape[0], cin, *x.shape[2:]), cout)


# Host code.


def _allows_tf32() -> bool:
    """Whether PyTorch's own convolutions may: where nothing is said of them, what holds for cuDNN,
    and then for everything."""
    cudnn: Any = torch.backends.cudnn
    for settings in (cudnn.conv, cudnn, torch.backends):
        if settings.fp32_precision != "none":
            return settings.fp32_precision == "tf32"
    return False


def shift_group_norm_silu_conv2d_fused(
    x: Tensor,
    skip: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
    num_groups: int,
    eps: float,
    filter: Tensor,
    filter_bias: Tensor | None,
    out_temb: Tensor | None,
    residual: Tensor | None,
    scale: float,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    shift_after: bool,
    out_sizes: list[int],
    out_offsets: list[int],
    boundary: str,
    emit_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.latent_shift.shift_group_norm_silu_conv2d_fused``: channels_last, no fp64."""
    norm = (temb, weight, bias, ada_scale, ada_shift)
    shift = (cu_frames, num_frames, sizes, offsets)
    check_conv2d(
        x, skip, norm, num_groups, filter, filter_bias, out_temb, residual,
        shift, out_sizes, out_offsets, boundary,
    )  # fmt: skip
    layout = Layout.of(x)
    if x.dtype == torch.float64 or not layout.channels_last or not x.numel():
        raise RuntimeError(
            f"expected a channels_last x in fp32, bf16 or fp16 with elements, got {x.dtype} "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    frames, channels, height, width = x.shape
    pixels, (cout, cin) = height * width, filter.shape[:2]
    if pixels * cout >= 2**31:
        raise RuntimeError(f"a frame of {cout} x {pixels} elements: fewer than 2**31 fit")
    x, skip, residual = layout.dense(x), layout.dense(skip), layout.dense(residual)
    filter = filter.contiguous(memory_format=torch.channels_last)
    temb, weight, bias, ada_scale, ada_shift = (dense(table) for table in norm)
    mean, rstd = (x.new_empty((frames, num_groups), dtype=torch.float32) for _ in range(2))
    moments, coefficients = mean.new_empty(2, frames, cin), mean.new_empty(3, frames, cin)
    out = torch.empty(
        (frames, cout, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout.memory_format,
    )
    begin = 0
    for part in (x,) if skip is None else (x, skip):
        block_c = fit(part.shape[1], 32, 64)
        launch(
            conv2d_moments_kernel,
            frames * cdiv(part.shape[1], block_c),
            x,
            4,
            x_ptr=part,
            moments_ptr=moments,
            N=frames,
            P=pixels,
            BEGIN=begin,
            C=part.shape[1],
            CIN=cin,
            BLOCK_P=min(32, next_power_of_2(pixels)),
            BLOCK_C=block_c,
        )
        begin += part.shape[1]
    kind = "none" if not any(offsets) else "after" if shift_after else "before"
    told = shift_arguments(x, layout, cu_frames, num_frames, sizes, offsets, boundary)
    slices = {name: told[name] for name in ("begin1", "begin2", "D0", "D1", "D2", "BOUNDARY")}
    shifted = any(offsets) or any(out_offsets)
    uneven = cu_frames is not None and shifted
    clips: dict[str, Any] = {name: told[name] for name in ("CLIPS", "N", "T")}
    clips["cu_frames_ptr"] = cu_frames if uneven else None
    launch(
        conv2d_coefficients_kernel,
        frames * num_groups,
        x,
        1,
        moments_ptr=moments,
        temb_ptr=temb,
        weight_ptr=weight,
        bias_ptr=bias,
        ada_scale_ptr=ada_scale,
        ada_shift_ptr=ada_shift,
        mean_ptr=mean,
        rstd_ptr=rstd,
        coefficients_ptr=coefficients,
        P=pixels,
        R_TEMB=0 if temb is None else temb.shape[0],
        R_SCALE=0 if ada_scale is None else ada_scale.shape[0],
        R_SHIFT=0 if ada_shift is None else ada_shift.shape[0],
        EPS=float(eps),
        C=cin,
        G=num_groups,
        SHIFT=kind,
        BLOCK_C=next_power_of_2(cin // num_groups),
        **clips,
        **slices,
    )
    known = conv_configs(frames, pixels, cin, cout, x.element_size(), shifted)
    measured = choices.lookup(x.device, config_key(x, cin, cout))
    config = known.get(measured[0] if measured else "", next(iter(known.values())))
    tiles = cdiv(pixels, config.block_p)
    parts = mean.new_empty(2, frames, tiles, cout) if emit_sums else None
    # the slices as x sees them, as skip does, and those of the output
    begins, out_begins = ((slices[0], slices[0] + slices[1]) for slices in (sizes, out_sizes))
    vec, straddles = vectors(layout.vec, *begins)
    skip_begins = (begin - channels for begin in begins)
    skip_vec, skip_straddles = vectors(vector_of(cin - channels, x), *skip_begins)
    out_vec, out_straddles = vectors(vector_of(cout, x), *out_begins)
    launch(
        conv2d_kernel,
        frames * tiles * cdiv(cout, config.block_o),
        x,
        config.num_warps,
        num_stages=config.num_stages,
        x_ptr=x,
        skip_ptr=skip,
        filter_ptr=filter,
        filter_bias_ptr=dense(filter_bias),
        out_temb_ptr=dense(out_temb),
        residual_ptr=residual,
        coefficients_ptr=coefficients,
        out_ptr=out,
        parts_ptr=parts,
        H=height,
        W=width,
        R_OUT=0 if out_temb is None else out_temb.shape[0],
        out_begin1=out_begins[0],
        out_begin2=out_begins[1],
        SCALE=float(scale),
        C=channels,
        CIN=cin,
        COUT=cout,
        OUT_D0=out_offsets[0],
        OUT_D1=out_offsets[1],
        OUT_D2=out_offsets[2],
        SHIFT=kind,
        OUT_SHIFT=any(out_offsets),
        VEC=vec,
        STRADDLES=straddles,
        SKIP_VEC=skip_vec,
        SKIP_STRADDLES=skip_straddles,
        OUT_VEC=out_vec,
        OUT_STRADDLES=out_straddles,
        PRECISION="tf32" if x.dtype == torch.float32 and _allows_tf32() else "ieee",
        BLOCK_P=config.block_p,
        BLOCK_O=config.block_o,
        BLOCK_K=config.block_k,
        **clips,
        **slices,
    )
    if parts is None:
        return out, mean, rstd, mean.new_empty(0)
    sums = mean.new_empty(frames, cout, 2)
    launch(
        conv2d_sums_kernel,
        frames * cdiv(cout, 64),
        x,
        2,
        parts_ptr=parts,
        sums_ptr=sums,
        N=frames,
        P=pixels,
        TILES=tiles,
        C=cout,
        BLOCK_P=config.block_p,
        BLOCK_C=64,
    )
    return out, mean, rstd, sums
