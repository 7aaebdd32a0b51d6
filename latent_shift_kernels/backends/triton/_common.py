"""What the Triton kernels share: tiles, moves between frames, rounding, layouts, launch.

A tile is pixels x channels, [BLOCK_P, BLOCK_C], of one frame in either layout; Triton orders its
threads by the axis that is contiguous. A shift is a gather or a scatter: every channel of a frame
is read from, or written to, another frame. In channels_last a 16-byte vector may lie across two
slices: it is loaded from both their frames, and its channels are stored one by one.
"""

# ruff: noqa: SIM102, SIM300  (constexpr and device conditions share no `if`; DTYPE is no constant)

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import choices, reference

Given = TypeVar("Given", Tensor, Tensor | None)

# Counts that differ from batch to batch: no kernel is compiled for a value of theirs.
UNSPECIALIZED = ["CLIPS"]
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Device code.


@triton.jit
def tile_offsets(o_p, o_c, P, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of pixels x channels inside one frame, int64."""
    if CHANNELS_LAST:
        return o_p.to(tl.int64)[:, None] * C + o_c[None, :]
    else:
        return o_c.to(tl.int64)[None, :] * P + o_p[:, None]


@triton.jit
def _frame_offsets(o_c, begin1, begin2, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return tl.where(o_c < begin1, D0, tl.where(o_c < begin2, D1, D2))


@triton.jit
def clip_of(cu_frames_ptr, clips, i_n, N, T):
    """The clip of frame ``i_n`` of N: (its place in the clip, the clip's length, 1 or 0 for a clip
    that stays as it is).

    With prefix sums a clip begins at the last of them up to ``i_n``, ends at the first after it,
    and lies inside the batch whatever they hold.
    """
    if cu_frames_ptr is None:
        return i_n % T, T, 1
    else:
        begin, end = tl.cast(0, tl.int32), tl.cast(N, tl.int32)
        for i_block in range(0, tl.cdiv(clips + 1, 64)):
            o_bound = i_block * 64 + tl.arange(0, 64)
            b_bound = tl.load(cu_frames_ptr + o_bound, mask=o_bound <= clips, other=0)
            begin = tl.maximum(begin, tl.max(tl.where(b_bound <= i_n, b_bound, 0), 0))
            end = tl.minimum(end, tl.min(tl.where(b_bound > i_n, b_bound, N), 0))
        return i_n - begin, end - begin, (end - begin > 1).to(tl.int32)


@triton.jit
def _target(o_d, i_t, T, BOUNDARY: tl.constexpr):
    """The frame ``o_d`` away from ``i_t`` in the clip, and whether there is one."""
    o_t = i_t + o_d
    if BOUNDARY == "circular":
        o_t = tl.where(o_t < 0, o_t + T, tl.where(o_t >= T, o_t - T, o_t))
    elif BOUNDARY == "replicate":
        o_t = tl.minimum(tl.maximum(o_t, 0), T - 1)
    return o_t, (o_t >= 0) & (o_t < T)


@triton.jit
def sources_of(
    o_c,
    clip,
    begin1,
    begin2,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """How many frames away each of the channels ``o_c`` comes from, and whether it does."""
    i_t, T, moved = clip
    o_t, m_move = _target(_frame_offsets(o_c, begin1, begin2, D0, D1, D2) * moved, i_t, T, BOUNDARY)
    return o_t - i_t, m_move


@triton.jit
def _outside(o_t, T):
    return (o_t < 0) | (o_t >= T)


@triton.jit
def gather_of(
    i_c,
    clip,
    frame_size,
    begin1,
    begin2,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BOUNDARY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where channels ``i_c .. i_c + BLOCK_C`` (``i_c`` a multiple of VEC) come from, D0, D1, D2
    frames away in ``clip`` (of :func:`clip_of`).

    Returns (o_move, m_move) for whole vectors by their first channel; (o_rest, m_rest) by their
    last where that is in another slice, with m_rest_each, the channels of that slice; m_end
    (vectors) and m_end_each, what an end frame of the adjoint is read for once more. No vector may
    hold three slices.
    """
    o_c = i_c + tl.arange(0, BLOCK_C)
    o_first = o_c // VEC * VEC
    o_last = o_first + (VEC - 1)
    i_t, T, moved = clip
    o_d = _frame_offsets(o_first, begin1, begin2, D0, D1, D2) * moved
    o_d_rest = _frame_offsets(o_last, begin1, begin2, D0, D1, D2) * moved
    o_d_each = _frame_offsets(o_c, begin1, begin2, D0, D1, D2) * moved
    o_t, m_move = _target(o_d, i_t, T, BOUNDARY)
    o_t_rest, m_rest = _target(o_d_rest, i_t, T, BOUNDARY)
    return (
        (o_t - i_t).to(tl.int64) * frame_size,
        m_move,
        (o_t_rest - i_t).to(tl.int64) * frame_size,
        m_rest & (o_d != o_d_rest),
        o_d_each != o_d,
        _outside(i_t - o_d, T) | _outside(i_t - o_d_rest, T),
        _outside(i_t - o_d_each, T),
    )


@triton.jit
def load_gathered(x_ptr, o_tile, m_tile, gather, STRADDLES: tl.constexpr):
    """The tile whose channels come from the frames of ``gather``; zero where there is no frame."""
    m_move = m_tile & gather[1][None, :]
    b_x = tl.load(x_ptr + (o_tile + gather[0][None, :]), mask=m_move, other=0.0)
    if STRADDLES:
        m_rest = m_tile & gather[3][None, :]
        b_rest = tl.load(x_ptr + (o_tile + gather[2][None, :]), mask=m_rest, other=0.0)
        b_x = tl.where(gather[4][None, :], b_rest, b_x)
    return b_x


@triton.jit
def load_adjoint(
    dy_ptr,
    o_tile,
    m_tile,
    gather,
    ADD_ENDS: tl.constexpr,
    STRADDLES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The adjoint of a shift, ``gather`` being its reverse; with ADD_ENDS that of the replicate
    boundary."""
    b_dy = load_gathered(dy_ptr, o_tile, m_tile, gather, STRADDLES).to(ACC)
    if ADD_ENDS:
        b_own = tl.load(dy_ptr + o_tile, mask=m_tile & gather[5][None, :], other=0.0).to(ACC)
        b_dy += tl.where(gather[6][None, :], b_own, 0.0)
    return b_dy


@triton.jit
def scatter_of(
    i_c,
    clip,
    frame_size,
    begin1,
    begin2,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BOUNDARY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where channels ``i_c .. i_c + BLOCK_C`` (``i_c`` a multiple of VEC) go, D0, D1, D2 frames
    away.

    Returns (o_move, m_move) for vectors in one slice, (o_each, m_each) for single channels of the
    others, m_end and m_end_each where no frame writes to this one, ``near`` if this block has
    single channels, ``at_end`` if this frame is an end of its clip.
    """
    o_c = i_c + tl.arange(0, BLOCK_C)
    o_first = o_c // VEC * VEC
    o_last = o_first + (VEC - 1)
    i_t, T, moved = clip
    o_d = _frame_offsets(o_first, begin1, begin2, D0, D1, D2) * moved
    m_whole = o_d == _frame_offsets(o_last, begin1, begin2, D0, D1, D2) * moved
    o_d_each = _frame_offsets(o_c, begin1, begin2, D0, D1, D2) * moved
    o_t, m_move = _target(o_d, i_t, T, BOUNDARY)
    o_t_each, m_each = _target(o_d_each, i_t, T, BOUNDARY)
    m_end = _outside(i_t - o_d, T)
    m_end_each = _outside(i_t - o_d_each, T)
    near1 = (begin1 > i_c) & (begin1 < i_c + BLOCK_C) & (begin1 % VEC != 0)
    near2 = (begin2 > i_c) & (begin2 < i_c + BLOCK_C) & (begin2 % VEC != 0)
    return (
        (o_t - i_t).to(tl.int64) * frame_size,
        m_whole & m_move,
        (o_t_each - i_t).to(tl.int64) * frame_size,
        (m_whole == 0) & m_each,
        m_whole & m_end,
        (m_whole == 0) & m_end_each,
        near1 | near2,
        (i_t == 0) | (i_t == T - 1),
    )


@triton.jit
def _store_parts(
    y_ptr, b_y, o_tile, m_tile, o_whole, m_whole, o_each, m_each, near, STRADDLES: tl.constexpr
):
    tl.store(y_ptr + (o_tile + o_whole[None, :]), b_y, mask=m_tile & m_whole[None, :])
    if STRADDLES:
        if near:
            tl.store(y_ptr + (o_tile + o_each[None, :]), b_y, mask=m_tile & m_each[None, :])


@triton.jit
def store_scattered(
    y_ptr, b_y, o_tile, m_tile, scatter, BOUNDARY: tl.constexpr, STRADDLES: tl.constexpr
):
    """Writes the tile to the frames of ``scatter``, and what the boundary asks for where no frame
    writes."""
    _store_parts(
        y_ptr, b_y, o_tile, m_tile, scatter[0], scatter[1], scatter[2], scatter[3], scatter[6],
        STRADDLES,
    )  # fmt: skip
    if BOUNDARY != "circular":
        if scatter[7]:
            b_fill = b_y
            if BOUNDARY == "zeros":
                b_fill = tl.zeros_like(b_y)
            o_own = tl.zeros_like(scatter[0])
            _store_parts(
                y_ptr, b_fill, o_tile, m_tile, o_own, scatter[4], o_own, scatter[5], scatter[6],
                STRADDLES,
            )  # fmt: skip


@triton.jit
def load_row(
    table_ptr, i_n, N, R, o_c, m_c, C: tl.constexpr, DEFAULT: tl.constexpr, ACC: tl.constexpr
):
    """The row of an (R, C) table that belongs to frame ``i_n`` of N, or DEFAULT without a table."""
    # [BLOCK_C]
    if table_ptr is None:
        return tl.full(o_c.shape, DEFAULT, ACC)
    else:
        i_r = i_n.to(tl.int64) * R // N
        return tl.load(table_ptr + i_r * C + o_c, mask=m_c, other=0.0).to(ACC)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """``b_x`` in DTYPE, to nearest even."""
    if b_x.dtype == tl.float64 and DTYPE != tl.float64:
        b_x = b_x.to(tl.float32)
    if INTERPRETED and DTYPE == tl.bfloat16:
        # the interpreter truncates where the device rounds
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_nearest = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_nearest, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return b_x.to(DTYPE)


# Host code.


@dataclass(frozen=True)
class Tile:
    """Pixels x channels of one frame, and the warps that share them."""

    block_p: int
    block_c: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_p}x{self.block_c}x{self.num_warps}"


@cache
def pick_tile(channels: int, pixels: int, itemsize: int, channels_last: bool) -> Tile:
    """A tile of 8 KiB along the contiguous axis: 64 bytes in flight a thread, little masked off."""
    elements = 8192 // itemsize
    if channels_last:
        block_c = fit(channels, 32, 256)
        block_p = min(elements // block_c, next_power_of_2(pixels))
    else:
        block_p = fit(pixels, 64, 1024)
        block_c = min(max(elements // block_p, 1), next_power_of_2(channels))
    return Tile(block_p, block_c, num_warps=4)


@cache
def tiles(channels: int, pixels: int, itemsize: int, channels_last: bool) -> dict[str, Tile]:
    """What may be measured against the tile that :func:`pick_tile` picks, which comes first."""
    picked = pick_tile(channels, pixels, itemsize, channels_last)
    found = [picked, replace(picked, num_warps=8)]
    for block_p in (picked.block_p // 2, picked.block_p * 2):
        if 0 < block_p < 2 * pixels:
            found.append(replace(picked, block_p=block_p))
    return {str(tile): tile for tile in found}


def tile_key(x: Tensor) -> str:
    """What the tables of :mod:`latent_shift_kernels.choices` call the tile of ``x``."""
    return choices.key("triton_tile", x.dtype, tuple(x.shape))


def fit(size: int, low: int, high: int) -> int:
    """The power of two in [low, high], or the one that holds ``size``, whose blocks cover it with
    least waste."""
    candidates = [high >> k for k in range(high.bit_length()) if high >> k >= low]
    fitting = [block for block in candidates if block < 2 * size] or [next_power_of_2(size)]
    return min(fitting, key=lambda block: (-(-size // block) * block, -block))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """How frames of C channels and P pixels lie in memory."""

    channels_last: bool
    vec: int  # channels in 16 bytes, or the power of two of them that divides C
    memory_format: torch.memory_format

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        memory_format = reference.memory_format(x)
        # one pixel a frame is channels_last whatever its strides say, and has longer rows that way
        channels_last = memory_format == torch.channels_last or x.shape[2] * x.shape[3] == 1
        vec = vector_of(x.shape[1], x) if channels_last else 1
        return cls(channels_last, vec, memory_format)

    def dense(self, x: Given) -> Given:
        return None if x is None else x.contiguous(memory_format=self.memory_format)

    def like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=self.memory_format)


def vector_of(channels: int, x: Tensor) -> int:
    """Channels in 16 bytes of the dtype of ``x``, or the power of two of them that divides
    ``channels``."""
    return gcd(channels, 16 // x.element_size())


def shift_arguments(
    x: Tensor,
    layout: Layout,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> dict[str, Any]:
    """What every kernel is told about ``x`` (N, C, H, W), its clips and its slices.

    VEC is the channels that move together, at most a vector of the layout.
    """
    if min(sizes) < 0:
        raise RuntimeError(f"slices hold 0 channels or more, got {sizes}")
    begin1, begin2 = sizes[0], sizes[0] + sizes[1]
    vec, straddles = vectors(layout.vec, begin1, begin2)
    uneven = cu_frames is not None and any(offsets)
    return {
        "cu_frames_ptr": cu_frames if uneven else None,
        "CLIPS": cu_frames.shape[0] - 1 if cu_frames is not None else 0,
        "N": x.shape[0],
        "T": num_frames if cu_frames is None else 1,
        "P": x.shape[2] * x.shape[3],
        "C": x.shape[1],
        "begin1": begin1,
        "begin2": begin2,
        "D0": offsets[0],
        "D1": offsets[1],
        "D2": offsets[2],
        "BOUNDARY": boundary,
        "STRADDLES": any(offsets) and straddles,
        "CHANNELS_LAST": layout.channels_last,
        "VEC": vec,
        "ACC": accumulator(x),
    }


def vectors(vec: int, begin1: int, begin2: int) -> tuple[int, bool]:
    """The channels that move together, at most ``vec``, where slices begin at ``begin1`` and
    ``begin2``, and whether they may lie in two slices."""
    # a slice inside a vector would make three
    while begin1 % vec and begin1 < begin2 and begin2 % vec and begin1 // vec == begin2 // vec:
        vec //= 2
    return vec, begin1 % vec != 0 or begin2 % vec != 0


def dense(table: Given) -> Given:
    """A parameter or table as the kernels read it: rows without gaps."""
    return None if table is None else table.contiguous()


def accumulator(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def launch(kernel: Any, programs: int, x: Tensor, num_warps: int, **arguments: Any) -> None:
    """Runs ``programs`` programs of ``kernel`` on the current stream of the device of ``x``.

    ``arguments`` may hold Triton's ``maxnreg``, the registers of a thread.
    """
    if programs >= 2**31:
        raise RuntimeError(
            f"{tuple(x.shape)} needs {programs} programs, a launch holds fewer than 2**31"
        )
    with torch.cuda.device_of(x):
        kernel[(programs,)](**arguments, num_warps=num_warps, enable_fp_fusion=True)


def launch_tiles(kernel: Any, x: Tensor, layout: Layout, **arguments: Any) -> None:
    """Runs ``kernel`` on every tile of ``x``."""
    frames, channels, height, width = x.shape
    pixels = height * width
    known = tiles(channels, pixels, x.element_size(), layout.channels_last)
    measured = choices.lookup(x.device, tile_key(x))
    tile = known.get(measured[0] if measured else "", next(iter(known.values())))
    launch(
        kernel,
        frames * cdiv(channels, tile.block_c) * cdiv(pixels, tile.block_p),
        x,
        tile.num_warps,
        BLOCK_P=tile.block_p,
        BLOCK_C=tile.block_c,
        **arguments,
    )
