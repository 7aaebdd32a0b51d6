"""The operators as functions of tensors and a :class:`ShiftSpec`: no modules, no model, no state.

Every function takes frames folded into the batch, (B*T, C, H, W) with ``num_frames`` = T,
channels_last preferred and NCHW served as well, or clips (B, C, T, H, W) from which T is read; it
returns what it was given. Clips of different lengths in one batch (N, C, H, W) are told apart by
``cu_frames`` in place of ``num_frames``: int32 prefix sums (clips + 1,) of their lengths on the
device of ``x``, from 0 to N. Its values are not looked at on the host.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import ops  # noqa: F401  defines torch.ops.latent_shift
from .spec import ShiftSpec


def temporal_shift(
    x: Tensor,
    spec: ShiftSpec,
    num_frames: int | None = None,
    *,
    cu_frames: Tensor | None = None,
) -> Tensor:
    """Takes some channels of every frame from the previous frame and some from the next.

    ``y[t] = concat(x[t-1, prev], x[t, keep], x[t+1, next])`` in the order of ``spec``
    (Latent-Shift, arXiv 2304.08477; TSM, arXiv 1811.08383). Moves 2 bytes in and 2 bytes out per
    bf16 element.

    Args:
        x: (B*T, C, H, W), or (B, C, T, H, W); fp32, bf16, fp16 or fp64.
        spec: What moves where; ``spec.channels`` must be C.
        num_frames: T, needed where frames are folded into the batch.
        cu_frames: In place of it for clips of different lengths: int32 (clips + 1,).

    Returns:
        The shape, dtype and layout of ``x``.

    Raises:
        ValueError: If the rank is neither 4 nor 5, T does not divide the batch, C is not
            ``spec.channels``, or ``cu_frames`` does not fit or meets
            ``spec.single_frame="shift"``.

    Example:
        >>> x = torch.randn(2 * 16, 320, 32, 32)
        >>> y = temporal_shift(x, ShiftSpec.latent_shift(320), num_frames=16)
        >>> cu_frames = torch.tensor([0, 20, 32], dtype=torch.int32)  # 20 frames and 12
        >>> y = temporal_shift(x, ShiftSpec.latent_shift(320), cu_frames=cu_frames)
    """
    frames, num_frames = _fold_frames(x, num_frames, "x", cu_frames)
    lowered = _lower(spec, frames.shape[1], num_frames, cu_frames)
    y = torch.ops.latent_shift.temporal_shift(frames, cu_frames, num_frames, *lowered)
    return _unfold_frames(y, x, num_frames)


def shift_add(
    residual: Tensor,
    h: Tensor,
    spec: ShiftSpec,
    num_frames: int | None = None,
    *,
    scale: float = 1.0,
    cu_frames: Tensor | None = None,
) -> Tensor:
    """``(residual + temporal_shift(h)) * scale``: the end of a residual block in one pass.

    Args:
        residual: The shape, dtype and device of ``h``.
        h: The branch, (B*T, C, H, W) or (B, C, T, H, W).
        spec: What moves where; ``spec.channels`` must be C.
        num_frames: T, needed where frames are folded into the batch.
        scale: The block's output scale factor, inverted.
        cu_frames: In place of ``num_frames`` for clips of different lengths: int32 (clips + 1,).

    Returns:
        The shape, dtype and layout of ``h``.

    Raises:
        ValueError: As :func:`temporal_shift`, or if ``residual`` does not match ``h``.
    """
    frames, num_frames = _fold_frames(h, num_frames, "h", cu_frames)
    _check_match(h, residual, "residual")
    skip, _ = _fold_frames(residual, num_frames, "residual")
    lowered = _lower(spec, frames.shape[1], num_frames, cu_frames)
    y = torch.ops.latent_shift.shift_add(skip, frames, scale, cu_frames, num_frames, *lowered)
    return _unfold_frames(y, h, num_frames)


def shift_add_group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    *,
    spec: ShiftSpec | None = None,
    shift: Literal["before", "after"] = "before",
    num_frames: int | None = None,
    cu_frames: Tensor | None = None,
    residual: Tensor | None = None,
    temb: Tensor | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Residual addition, time embedding, GroupNorm and SiLU, with the temporal shift before or
    after, as one pass.

    ``s = [residual +] shift(x) [+ temb]`` and ``y = silu(group_norm(s) * (1 + ada_scale) +
    ada_shift)``; with ``shift="after"`` the shift is applied to ``y`` instead. A zero frame shifted
    in *before* the norm comes out as ``silu(bias)``, one shifted in *after* it as 0: two different
    models.

    Args:
        x: (B*T, C, H, W) or (B, C, T, H, W); fp32, bf16, fp16 or fp64.
        weight, bias: The norm's affine parameters (C,), any floating dtype, or None.
        num_groups: Groups of the norm; must divide C. Statistics are per frame.
        eps: Added to the variance.
        spec: What moves where, or None for no shift.
        shift: Whether the shift is on the way in or on the way out.
        num_frames: T, needed where frames are folded into the batch and ``spec`` is given.
        cu_frames: In place of it for clips of different lengths: int32 (clips + 1,).
        residual: Added after the shift; the shape, dtype and device of ``x``.
        temb: Per-channel addition (R, C), R dividing B*T: one row a clip, or one a frame.
        ada_scale, ada_shift: Adaptive affine (R, C) of AdaGN (arXiv 2105.05233, section 3).

    Returns:
        ``y``, or ``(y, s)`` where a residual was given; shape, dtype and layout of ``x``.

    Raises:
        ValueError: As :func:`temporal_shift`; if ``num_groups`` does not divide C, or a tensor does
            not fit.
    """
    if shift not in ("before", "after"):
        raise ValueError(f'shift must be "before" or "after", got {shift!r}')
    if spec is None and num_frames is None and cu_frames is None:
        num_frames = 1 if x.dim() == 4 else None
    frames, num_frames = _fold_frames(x, num_frames, "x", cu_frames)
    channels = frames.shape[1]
    _check_norm(x, frames.shape[0], channels, weight, bias, num_groups, temb, ada_scale, ada_shift)
    skip = None
    if residual is not None:
        _check_match(x, residual, "residual")
        skip, _ = _fold_frames(residual, num_frames, "residual")
    sizes, offsets, boundary = _lower_or_none(spec, channels, num_frames, cu_frames)
    y, total, _, _ = torch.ops.latent_shift.shift_add_group_norm_silu(
        frames,
        skip,
        temb,
        weight,
        bias,
        ada_scale,
        ada_shift,
        num_groups,
        eps,
        cu_frames,
        num_frames,
        sizes,
        offsets,
        shift == "after",
        boundary,
    )
    y = _unfold_frames(y, x, num_frames)
    return y if residual is None else (y, _unfold_frames(total, x, num_frames))


def shift_group_norm_silu_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    filter: Tensor,
    filter_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    spec: ShiftSpec | None = None,
    shift: Literal["before", "after"] = "before",
    out_spec: ShiftSpec | None = None,
    num_frames: int | None = None,
    cu_frames: Tensor | None = None,
    temb: Tensor | None = None,
    ada_scale: Tensor | None = None,
    ada_shift: Tensor | None = None,
    out_temb: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    return_sums: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Half a ResNet block: :func:`shift_add_group_norm_silu`, then a 3x3 convolution with what
    follows it, time embedding, shift and residual addition.

    ``a = shift_add_group_norm_silu(cat(x, skip), ...)``, ``c = conv2d(a, filter, filter_bias,
    padding=1) + out_temb`` and ``out = (residual + shift_out(c)) * scale``. Backward saves ``x``,
    ``skip`` and the statistics, and computes the activation again.

    Args:
        x: (B*T, C, H, W) or (B, C, T, H, W); fp32, bf16, fp16 or fp64.
        weight, bias: The norm's affine parameters (Cin,) with Cin = C, plus the channels of
            ``skip``.
        num_groups: Groups of the norm; must divide Cin.
        filter: (Cout, Cin, 3, 3) in the dtype of ``x``, channels_last preferred.
        filter_bias: (Cout,), any floating dtype.
        eps: Added to the variance.
        skip: Channels that join those of ``x``; its shape but for their number.
        spec: What moves where in the Cin channels, or None for no shift.
        shift: Whether that is before the norm or after the activation.
        out_spec: What moves where in the Cout channels of the convolution; the same boundary.
        num_frames: T, needed where frames are folded into the batch and there is a shift.
        cu_frames: In place of it for clips of different lengths: int32 (clips + 1,).
        temb, ada_scale, ada_shift: Tables (R, Cin) as of :func:`shift_add_group_norm_silu`.
        out_temb: Added to the convolution, (R, Cout), R dividing B*T.
        residual: Added to the shifted convolution; the shape of the result, the dtype of ``x``.
        scale: The block's output scale factor, inverted.
        return_sums: Whether to return the sums and centred sums of squares (B*T, Cout, 2) of the
            result's channels too; not differentiable.

    Returns:
        ``out`` (B*T, Cout, H, W), in the dtype and layout of ``x``, or ``(out, sums)``.

    Raises:
        ValueError: As :func:`shift_add_group_norm_silu`, or if the boundaries of the two shifts
            differ.
    """
    if shift not in ("before", "after"):
        raise ValueError(f'shift must be "before" or "after", got {shift!r}')
    if spec is None and out_spec is None and num_frames is None and cu_frames is None:
        num_frames = 1 if x.dim() == 4 else None
    frames, num_frames = _fold_frames(x, num_frames, "x", cu_frames)
    batch, channels, *pixels = frames.shape
    joined = None
    if skip is not None:
        expected = f"{tuple(x.shape)} but for its channels"
        _check(skip.dim() == x.dim(), "skip", expected, skip)
        joined, _ = _fold_frames(skip, num_frames, "skip")
        _check((joined.shape[0], *joined.shape[2:]) == (batch, *pixels), "skip", expected, skip)
        _check_dtype(x, skip, "skip")
        channels += joined.shape[1]
    _check_norm(x, batch, channels, weight, bias, num_groups, temb, ada_scale, ada_shift)
    _check(
        filter.dim() == 4 and filter.shape[1:] == (channels, 3, 3),
        "filter",
        f"(Cout, {channels}, 3, 3)",
        filter,
    )
    _check_dtype(x, filter, "filter")
    out_channels = filter.shape[0]
    _check_parameter(x, filter_bias, "filter_bias", out_channels)
    _check_table(x, out_temb, "out_temb", batch, out_channels)
    added = None
    if residual is not None:
        added, _ = _fold_frames(residual, num_frames, "residual")
        shape = (batch, out_channels, *pixels)
        _check(added.shape == shape, "residual", f"{shape} with its frames folded", residual)
        _check_dtype(x, residual, "residual")
    if spec is not None and out_spec is not None and spec.boundary != out_spec.boundary:
        raise ValueError(
            f"both shifts need one boundary, got {spec.boundary!r} and {out_spec.boundary!r}"
        )
    sizes, offsets, boundary = _lower_or_none(spec, channels, num_frames, cu_frames)
    out_sizes, out_offsets, out_boundary = _lower_or_none(
        out_spec, out_channels, num_frames, cu_frames
    )
    out, _, _, sums = torch.ops.latent_shift.shift_group_norm_silu_conv2d(
        frames,
        joined,
        temb,
        weight,
        bias,
        ada_scale,
        ada_shift,
        num_groups,
        eps,
        filter,
        filter_bias,
        out_temb,
        added,
        scale,
        cu_frames,
        num_frames,
        sizes,
        offsets,
        shift == "after",
        out_sizes,
        out_offsets,
        boundary if spec is not None else out_boundary,
        return_sums,
    )
    out = _unfold_frames(out, x, num_frames)
    return (out, sums) if return_sums else out


def _lower_or_none(
    spec: ShiftSpec | None, channels: int, num_frames: int, cu_frames: Tensor | None
) -> tuple[list[int], list[int], str]:
    if spec is None:
        return [channels, 0, 0], [0, 0, 0], "zeros"
    return _lower(spec, channels, num_frames, cu_frames)


def _lower(
    spec: ShiftSpec, channels: int, num_frames: int, cu_frames: Tensor | None
) -> tuple[list[int], list[int], str]:
    if spec.channels != channels:
        raise ValueError(
            f"the shift is for {spec.channels} channels (prev {spec.prev}, keep {spec.keep}, next "
            f"{spec.next}), the tensor has {channels}: build the spec for this channel count"
        )
    if cu_frames is None:
        return spec.sizes, spec.offsets(num_frames), spec.boundary
    if spec.single_frame != "identity":
        raise ValueError(
            "among clips of different lengths one of a single frame is never shifted: with "
            f'cu_frames the spec must have single_frame="identity", got {spec.single_frame!r}'
        )
    return spec.sizes, spec.offsets(None), spec.boundary


def _fold_frames(
    x: Tensor, num_frames: int | None, name: str, cu_frames: Tensor | None = None
) -> tuple[Tensor, int]:
    """(B, C, T, H, W) to (B*T, C, H, W); four dimensions pass through with their frame count
    checked. With ``cu_frames`` the frame count is 1, which fits every batch."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be fp32, bf16, fp16 or fp64, got {x.dtype}")
    if cu_frames is not None:
        _check_cu_frames(x, num_frames, name, cu_frames)
        return x, 1
    if x.dim() == 5:
        if num_frames is not None and num_frames != x.shape[2]:
            raise ValueError(
                f"{name} (B, C, T, H, W) = {tuple(x.shape)} has {x.shape[2]} frames, "
                f"num_frames says {num_frames}: leave num_frames out"
            )
        return x.transpose(1, 2).flatten(0, 1), x.shape[2]
    if x.dim() != 4:
        raise ValueError(f"{name} must be (B*T, C, H, W) or (B, C, T, H, W), got {tuple(x.shape)}")
    if num_frames is None:
        raise ValueError(f"{name} has its frames folded into the batch: pass num_frames")
    if num_frames < 1 or x.shape[0] % num_frames:
        raise ValueError(
            f"{name} has a batch of {x.shape[0]} frames, which does not split into clips of "
            f"num_frames = {num_frames}"
        )
    return x, num_frames


def _check_cu_frames(x: Tensor, num_frames: int | None, name: str, cu_frames: Tensor) -> None:
    if num_frames is not None:
        raise ValueError(
            f"clips are {num_frames} frames long or as cu_frames says: pass one of the two"
        )
    if x.dim() != 4:
        raise ValueError(f"with cu_frames {name} must be (N, C, H, W), got {tuple(x.shape)}")
    fits = cu_frames.dtype == torch.int32 and cu_frames.dim() == 1 and cu_frames.shape[0] >= 2
    if not (fits and cu_frames.is_contiguous()):
        raise ValueError(
            "cu_frames must be contiguous int32 (clips + 1,), the prefix sums of the lengths of at "
            f"least one clip, got {cu_frames.dtype} {tuple(cu_frames.shape)}"
        )
    _check_device(x, cu_frames, "cu_frames")


def _unfold_frames(y: Tensor, like: Tensor, num_frames: int) -> Tensor:
    return y if like.dim() == 4 else y.unflatten(0, (-1, num_frames)).transpose(1, 2)


def _check(fits: bool, name: str, expected: str, got: Tensor) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {tuple(got.shape)}")


def _check_norm(
    x: Tensor,
    batch: int,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    temb: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
) -> None:
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check_parameter(x, parameter, name, channels)
    for name, table in (("temb", temb), ("ada_scale", ada_scale), ("ada_shift", ada_shift)):
        _check_table(x, table, name, batch, channels)


def _check_parameter(x: Tensor, parameter: Tensor | None, name: str, channels: int) -> None:
    if parameter is not None:
        _check(parameter.shape == (channels,), name, f"({channels},)", parameter)
        _check_device(x, parameter, name)


def _check_table(x: Tensor, table: Tensor | None, name: str, batch: int, channels: int) -> None:
    if table is not None:
        rows = table.shape[0] if table.dim() == 2 else -1
        fits = rows == batch or (rows > 0 and batch % rows == 0)
        expected = f"(R, {channels}) with R dividing {batch} frames"
        _check(fits and table.shape[1] == channels, name, expected, table)
        _check_device(x, table, name)


def _check_device(x: Tensor, other: Tensor, name: str) -> None:
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}, x on {x.device}: move it there")


def _check_match(x: Tensor, other: Tensor, name: str) -> None:
    _check(other.shape == x.shape, name, f"{tuple(x.shape)}", other)
    _check_dtype(x, other, name)


def _check_dtype(x: Tensor, other: Tensor, name: str) -> None:
    """Device and dtype; dtypes may differ under autocast only, where the operator casts."""
    _check_device(x, other, name)
    if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{name} is {other.dtype}, expected {x.dtype}: cast one of them, or use torch.autocast"
        )
