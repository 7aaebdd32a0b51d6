"""The operators that are made of others: what serves them where no single kernel does it all.

``operators`` is whatever offers the parts by name, ``torch.ops.latent_shift`` as a rule: then the
kernels of any backend serve the composition with nothing more to register.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_conv2d
from .reference import accumulate_dtype, memory_format


def implementations(operators: Any) -> dict[str, Callable[..., Any]]:
    """Operator name -> the composition of the parts in ``operators``."""
    return {
        name: partial(composition, operators)
        for name, composition in (
            ("shift_group_norm_silu_conv2d", _conv2d),
            ("shift_group_norm_silu_conv2d_backward", _conv2d_backward),
        )
    }


def _conv2d(
    operators: Any,
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
    norm = (temb, weight, bias, ada_scale, ada_shift)
    shift = (cu_frames, num_frames, sizes, offsets)
    check_conv2d(
        x, skip, norm, num_groups, filter, filter_bias, out_temb, residual,
        shift, out_sizes, out_offsets, boundary,
    )  # fmt: skip
    layout = memory_format(x)
    y, _, mean, rstd = operators.shift_add_group_norm_silu(
        _joined(x, skip), None, *norm, num_groups, eps, *shift, shift_after, boundary
    )
    if y.numel():
        # One pass adds both where there are two, and none where the convolution can.
        own_bias = filter_bias.to(x.dtype) if filter_bias is not None and out_temb is None else None
        out = F.conv2d(y, filter, own_bias, padding=1)
        if out_temb is not None:
            table = out_temb if filter_bias is None else out_temb + filter_bias
            clips = out.unflatten(0, (table.shape[0], -1))  # [R, N/R, Cout, H, W]
            clips += table[:, None, :, None, None]
    else:
        out = x.new_empty(x.shape[0], filter.shape[0], *x.shape[2:])
    del y
    out = out.contiguous(memory_format=layout)
    out_shift = (cu_frames, num_frames, out_sizes, out_offsets, boundary)
    if residual is not None:
        out = operators.shift_add(residual, out, scale, *out_shift)
    else:
        if any(out_offsets):
            out = operators.temporal_shift(out, *out_shift)
        if scale != 1.0:
            out *= scale
    return out, mean, rstd, channel_sums(out) if emit_sums else mean.new_empty(0)


@torch.no_grad()
def _conv2d_backward(
    operators: Any,
    dout: Tensor,
    x: Tensor,
    skip: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    filter: Tensor,
    filter_bias: Tensor | None,
    out_temb: Tensor | None,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    shift_after: bool,
    out_sizes: list[int],
    out_offsets: list[int],
    boundary: str,
    needs_input: bool,
    needs_filter: bool,
) -> tuple[Tensor, ...]:
    norm = (temb, weight, bias, ada_scale, ada_shift)
    shift = (cu_frames, num_frames, sizes, offsets)
    check_conv2d(
        x, skip, norm, num_groups, filter, filter_bias, out_temb, dout,
        shift, out_sizes, out_offsets, boundary,
    )  # fmt: skip
    layout = memory_format(x)
    dc = dout
    if any(out_offsets):
        dc = operators.temporal_shift_backward(
            dout, cu_frames, num_frames, out_sizes, out_offsets, boundary
        )
    dfilter_bias = dout_temb = dx = dskip = None
    dfilter: Tensor | None = None
    tables: list[Tensor | None] = [None] * 5
    if filter_bias is not None or out_temb is not None:
        per_frame = dc.sum((2, 3), dtype=accumulate_dtype(x.dtype))
        if filter_bias is not None:
            dfilter_bias = per_frame.sum(0).to(filter_bias.dtype)
        if out_temb is not None:
            dout_temb = out_temb.new_zeros(out_temb.shape)
            if dout_temb.numel():
                per_row = per_frame.view(out_temb.shape[0], -1, out_temb.shape[1])
                dout_temb.copy_(per_row.sum(1))
    if needs_input or needs_filter:
        u = _joined(x, skip)
        if x.numel():
            # The activation is computed again, nothing of its size was saved; the gradient of the
            # convolution's input asks for its shape alone.
            y = u
            if needs_filter:
                y, *_ = operators.shift_add_group_norm_silu(
                    u, None, *norm, num_groups, eps, *shift, shift_after, boundary
                )
            dy, dfilter, _ = torch.ops.aten.convolution_backward(
                dc, y, filter, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
                (needs_input, needs_filter, False),
            )  # fmt: skip
            del y
        else:
            dy, dfilter = torch.empty_like(u), torch.zeros_like(filter) if needs_filter else None
        if needs_input:
            du, _, *tables = operators.shift_add_group_norm_silu_backward(
                dy, None, u, False, *norm, mean, rstd, num_groups, *shift, shift_after, boundary
            )
            dx = du
            if skip is not None:
                dx, dskip = (
                    part.contiguous(memory_format=layout)
                    for part in du.split((x.shape[1], skip.shape[1]), 1)
                )
        if dfilter is not None:
            dfilter = dfilter.contiguous(memory_format=memory_format(filter))
    grads = (dx, dskip, *tables, dfilter, dfilter_bias, dout_temb)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def channel_sums(x: Tensor) -> Tensor:
    """The sum, and the sum of squared deviations from the mean, of every channel of every frame of
    ``x`` (N, C, H, W), as (N, C, 2)."""
    wide = x.to(accumulate_dtype(x.dtype))
    total = wide.sum((2, 3))
    mean = total / (x.shape[2] * x.shape[3])
    return torch.stack((total, (wide - mean[..., None, None]).square().sum((2, 3))), -1)


def _joined(x: Tensor, skip: Tensor | None) -> Tensor:
    """The channels of ``x`` followed by those of ``skip``, in the layout of ``x``."""
    if skip is None:
        return x
    return torch.cat((x, skip), 1).contiguous(memory_format=memory_format(x))
