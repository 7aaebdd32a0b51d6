"""What every operator expects of its arguments, said once: fakes, compositions and Python kernels
call these, native code repeats them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .spec import BOUNDARIES


def check_shift(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
    channels: int | None = None,
) -> None:
    """``channels`` where a tensor is shifted that has more of them than ``x``."""
    torch._check(x.dim() == 4, lambda: f"expected (B*T, C, H, W), got {tuple(x.shape)}")
    if cu_frames is None:
        torch._check(num_frames > 0, lambda: f"num_frames must be >= 1, got {num_frames}")
        torch._check(
            x.shape[0] % num_frames == 0,
            lambda: f"a batch of {x.shape[0]} frames does not split into clips of {num_frames}",
        )
    else:
        torch._check(
            cu_frames.dtype == torch.int32
            and cu_frames.dim() == 1
            and cu_frames.shape[0] >= 2
            and cu_frames.is_contiguous()
            and cu_frames.device == x.device,
            lambda: (
                "cu_frames must be int32 (clips + 1,), at least one clip, contiguous, on "
                f"{x.device}, got {cu_frames.dtype} {tuple(cu_frames.shape)} on {cu_frames.device}"
            ),
        )
    check_slices(x.shape[1] if channels is None else channels, sizes, offsets)
    torch._check(boundary in BOUNDARIES, lambda: f"unknown boundary {boundary!r}")


def check_slices(channels: int, sizes: list[int], offsets: list[int]) -> None:
    torch._check(
        sum(sizes) == channels and min(sizes) >= 0,
        lambda: f"the slices {sizes} hold {sum(sizes)} channels, the tensor has {channels}",
    )
    torch._check(
        len(sizes) == len(offsets) == 3 and all(offset in (-1, 0, 1) for offset in offsets),
        lambda: f"expected three slices with offsets in -1, 0, 1, got {sizes} and {offsets}",
    )


def check_same(x: Tensor, other: Tensor, name: str) -> None:
    torch._check(
        other.shape == x.shape and other.dtype == x.dtype and other.device == x.device,
        lambda: (
            f"{name} must match ({tuple(x.shape)}, {x.dtype}, {x.device}), "
            f"got ({tuple(other.shape)}, {other.dtype}, {other.device})"
        ),
    )


def check_norm_gradients(
    x: Tensor, dy: Tensor, dsum: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int
) -> None:
    check_same(x, dy, "dy")
    if dsum is not None:
        check_same(x, dsum, "dsum")
    shape, dtype = (x.shape[0], num_groups), reference.accumulate_dtype(x.dtype)
    for name, stats in (("mean", mean), ("rstd", rstd)):
        torch._check(
            stats.shape == shape and stats.dtype == dtype and stats.device == x.device,
            _mismatch(name, f"{shape} {dtype} on {x.device}", stats),
        )


def check_norm(
    x: Tensor,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ada_scale: Tensor | None,
    ada_shift: Tensor | None,
    num_groups: int,
    channels: int | None = None,
) -> None:
    channels = x.shape[1] if channels is None else channels
    torch._check(
        num_groups > 0 and channels % num_groups == 0,
        lambda: f"num_groups = {num_groups} does not divide {channels} channels",
    )
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check_parameter(x, parameter, channels, name)
    for name, table in (("temb", temb), ("ada_scale", ada_scale), ("ada_shift", ada_shift)):
        _check_table(x, table, channels, name)


def check_conv2d(
    x: Tensor,
    skip: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    num_groups: int,
    filter: Tensor,
    filter_bias: Tensor | None,
    out_temb: Tensor | None,
    residual: Tensor | None,
    shift: tuple[Tensor | None, int, list[int], list[int]],
    out_sizes: list[int],
    out_offsets: list[int],
    boundary: str,
) -> None:
    """``norm`` is (temb, weight, bias, ada_scale, ada_shift), ``shift`` (cu_frames, num_frames,
    sizes, offsets)."""
    torch._check(x.dim() == 4, lambda: f"expected (B*T, C, H, W), got {tuple(x.shape)}")
    channels = x.shape[1]
    if skip is not None:
        torch._check(
            skip.dim() == 4
            and skip.shape[0] == x.shape[0]
            and skip.shape[2:] == x.shape[2:]
            and skip.dtype == x.dtype
            and skip.device == x.device,
            _mismatch("skip", f"{tuple(x.shape)} but for its channels, {x.dtype}", skip),
        )
        channels += skip.shape[1]
    torch._check(x.shape[1] > 0, lambda: f"expected channels to convolve, got {tuple(x.shape)}")
    check_shift(x, *shift, boundary, channels=channels)
    check_norm(x, *norm, num_groups, channels=channels)
    torch._check(
        filter.dim() == 4
        and filter.shape[1:] == (channels, 3, 3)
        and filter.dtype == x.dtype
        and filter.device == x.device,
        _mismatch("filter", f"(Cout, {channels}, 3, 3) {x.dtype} on {x.device}", filter),
    )
    out_channels = filter.shape[0]
    check_slices(out_channels, out_sizes, out_offsets)
    _check_parameter(x, filter_bias, out_channels, "filter_bias")
    _check_table(x, out_temb, out_channels, "out_temb")
    if residual is not None:
        shape = (x.shape[0], out_channels, *x.shape[2:])
        torch._check(
            residual.shape == shape and residual.dtype == x.dtype and residual.device == x.device,
            _mismatch("residual", f"{shape} {x.dtype} on {x.device}", residual),
        )


def _check_parameter(x: Tensor, parameter: Tensor | None, channels: int, name: str) -> None:
    if parameter is not None:
        torch._check(
            parameter.shape == (channels,) and parameter.device == x.device,
            _mismatch(name, f"({channels},) on {x.device}", parameter),
        )


def _check_table(x: Tensor, table: Tensor | None, channels: int, name: str) -> None:
    if table is not None:
        frames = x.shape[0]
        torch._check(
            table.dim() == 2
            and table.shape[1] == channels
            and table.device == x.device
            and (table.shape[0] == frames or frames % max(table.shape[0], 1) == 0),
            _mismatch(name, f"(R, {channels}) on {x.device}, R dividing {frames}", table),
        )


def _mismatch(name: str, expected: str, got: Tensor) -> Callable[[], str]:
    return lambda: f"{name} must be {expected}, got {tuple(got.shape)} {got.dtype} on {got.device}"
