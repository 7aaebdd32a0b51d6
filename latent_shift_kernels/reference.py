"""Every operator in plain PyTorch: the truth that kernels are held to, and the path where no kernel
is built.

Signatures are those of ``torch.ops.latent_shift.*`` (:mod:`latent_shift_kernels.ops`). Sizes: N =
B*T frames, C channels, P = H*W pixels, G groups, R rows of a per-clip table with N % R == 0 (frame
n reads row n*R//N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which an operator returns its tensors: channels_last if ``x`` (N, C, H, W) is,
    else NCHW."""
    if x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def temporal_shift(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    """Shifts slices of channels of ``x`` (N, C, H, W): ``y[t, slice] = x[t + offset, slice]``."""
    clips = _clips(x, cu_frames, num_frames)
    parts = []
    for part, offset in zip(x.split(sizes, dim=1), offsets, strict=True):
        if offset:
            source, inside = _source(*clips, offset, boundary)
            part = part.index_select(0, source).masked_fill(~inside[:, None, None, None], 0)
        parts.append(part)
    return torch.cat(parts, dim=1).contiguous(memory_format=memory_format(x))


def temporal_shift_backward(
    dy: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    """The adjoint: ``<temporal_shift(x), dy> == <x, temporal_shift_backward(dy)>``."""
    back = [-offset for offset in offsets]
    if boundary != "replicate":
        return temporal_shift(dy, cu_frames, num_frames, sizes, back, boundary)
    dx = temporal_shift(dy, cu_frames, num_frames, sizes, back, "zeros")
    clips = _clips(dy, cu_frames, num_frames)
    for grad, source, offset in zip(
        dx.split(sizes, dim=1), dy.split(sizes, dim=1), offsets, strict=True
    ):
        if offset:
            # An end frame that had no neighbour to read was read by itself as well.
            _, inside = _source(*clips, offset, "zeros")
            grad += source.masked_fill(inside[:, None, None, None], 0)
    return dx


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
    """``(residual + temporal_shift(h)) * scale``, all (B*T, C, H, W)."""
    acc = accumulate_dtype(h.dtype)
    total = residual.to(acc) + temporal_shift(
        h, cu_frames, num_frames, sizes, offsets, boundary
    ).to(acc)
    return (total * scale).to(h.dtype).contiguous(memory_format=memory_format(h))


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
    """Sum, GroupNorm, SiLU and a shift before or after, see :mod:`latent_shift_kernels.ops`."""
    shift = (cu_frames, num_frames, sizes, offsets, boundary)
    layout = memory_format(x)
    total = x if shift_after else temporal_shift(x, *shift)
    total = _accumulated(total, residual, temb)
    stored = total.to(x.dtype).contiguous(memory_format=layout)
    if residual is not None:
        # The stored sum is what the next block reads, so its rounding belongs in the statistics.
        total = stored.to(total.dtype)
    grouped = total.unflatten(1, (num_groups, -1)).flatten(2)  # [N, G, C/G*P]
    mean = grouped.mean(2)
    rstd = (grouped - mean[..., None]).square().mean(2).add(eps).rsqrt()
    z = _affine(_normalise(total, mean, rstd), weight, bias, ada_scale, ada_shift)
    y = F.silu(z).to(x.dtype)
    if shift_after:
        y = temporal_shift(y, *shift)
    y = y.contiguous(memory_format=layout)
    return y, stored if residual is not None else x.new_empty(0), mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`shift_add_group_norm_silu`, see :mod:`latent_shift_kernels.ops`."""
    shift = (cu_frames, num_frames, sizes, offsets, boundary)
    layout = memory_format(x)
    acc = accumulate_dtype(x.dtype)
    shift_before = not shift_after and any(offsets)
    if is_sum:
        total = x.to(acc)
    else:
        total = _accumulated(temporal_shift(x, *shift) if shift_before else x, None, temb)
    if shift_after:
        dy = temporal_shift_backward(dy, *shift)
    xhat = _normalise(total, mean, rstd)
    normed = _affine(xhat, weight, bias, None, None)
    z = _affine(normed, None, None, ada_scale, ada_shift)
    gate = torch.sigmoid(z)
    dz = dy.to(acc) * gate * (1 + z * (1 - gate))
    dnormed = dz if ada_scale is None else dz * (1 + _rows(ada_scale, dz))
    dxhat = dnormed if weight is None else dnormed * weight.to(acc)[:, None, None]

    def group_mean(t: Tensor) -> Tensor:
        grouped = t.unflatten(1, (num_groups, -1))  # [N, G, C/G, H, W]
        return grouped.mean((2, 3, 4), keepdim=True).expand_as(grouped).flatten(1, 2)

    rstd_c = rstd.repeat_interleave(x.shape[1] // num_groups, 1)[:, :, None, None]
    ds = (dxhat - group_mean(dxhat) - xhat * group_mean(dxhat * xhat)) * rstd_c
    if dsum is not None:
        ds = ds + dsum.to(acc)
    total_grad = ds.to(x.dtype).contiguous(memory_format=layout)
    dx = temporal_shift_backward(total_grad, *shift) if shift_before else total_grad

    def per_channel(t: Tensor, parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return x.new_empty(0)
        return t.sum((0, 2, 3)).to(parameter.dtype)

    def per_row(t: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            return x.new_empty(0)
        rows = t.sum((2, 3)).unflatten(0, (table.shape[0], _frames_per_row(table, t)))
        return rows.sum(1).to(table.dtype)

    return (
        dx,
        total_grad if is_sum and shift_before else x.new_empty(0),
        per_row(ds, temb),
        per_channel(dnormed * xhat, weight),
        per_channel(dnormed, bias),
        per_row(dz * normed, ada_scale),
        per_row(dz, ada_shift),
    )


def _clips(
    x: Tensor, cu_frames: Tensor | None, num_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """For every frame of ``x``: itself, where its clip begins and ends (exclusively), and whether
    it is moved, None for all."""
    frame = torch.arange(x.shape[0], device=x.device)
    if cu_frames is None:
        begin = frame // num_frames * num_frames
        return frame, begin, begin + num_frames, None
    bounds = cu_frames.long().clamp(0, x.shape[0])
    clip = (torch.searchsorted(bounds, frame, right=True) - 1).clamp(0, bounds.shape[0] - 2)
    # Whatever the bounds hold, a clip holds its frame.
    begin = torch.minimum(bounds[clip], frame)
    end = torch.maximum(bounds[clip + 1], frame + 1)
    return frame, begin, end, end - begin > 1


def _source(
    frame: Tensor, begin: Tensor, end: Tensor, moved: Tensor | None, offset: int, boundary: str
) -> tuple[Tensor, Tensor]:
    """The frame that every frame reads at ``offset`` in {-1, 0, 1}, and whether there is one."""
    source = frame + (offset if moved is None else offset * moved)
    inside = (source >= begin) & (source < end)
    if boundary == "circular":
        return torch.where(inside, source, end - 1 if offset < 0 else begin), inside | True
    if boundary == "replicate":
        return torch.where(inside, source, frame), inside | True
    return torch.where(inside, source, frame), inside


def _accumulated(x: Tensor, residual: Tensor | None, temb: Tensor | None) -> Tensor:
    total = x.to(accumulate_dtype(x.dtype))
    if residual is not None:
        total = total + residual
    if temb is not None:
        total = total + _rows(temb, total)
    return total


def _frames_per_row(table: Tensor, like: Tensor) -> int:
    return like.shape[0] // max(table.shape[0], 1)  # an empty batch has an empty table


def _rows(table: Tensor, like: Tensor) -> Tensor:
    """A (R, C) table spread over the frames of ``like`` (N, C, H, W), as (N, C, 1, 1)."""
    rows = table.repeat_interleave(_frames_per_row(table, like), 0)
    return rows.to(like.dtype)[:, :, None, None]


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    repeats = x.shape[1] // mean.shape[1]
    mean, rstd = (t.repeat_interleave(repeats, 1)[:, :, None, None] for t in (mean, rstd))
    return (x - mean) * rstd


def _affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
) -> Tensor:
    if weight is not None:
        x = x * weight.to(x.dtype)[:, None, None]
    if bias is not None:
        x = x + bias.to(x.dtype)[:, None, None]
    if ada_scale is not None:
        x = x * (1 + _rows(ada_scale, x))
    if ada_shift is not None:
        x = x + _rows(ada_shift, x)
    return x
