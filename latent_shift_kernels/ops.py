"""The operators: schema, fake, autograd and autocast rule of everything under
``torch.ops.latent_shift``.

The torch dispatcher is the backend registry. This module defines each operator once and gives it
the plain PyTorch implementation of :mod:`latent_shift_kernels.reference`; native code attaches by
dispatch key (:mod:`latent_shift_kernels.backends`) and takes over with no branch at call time.
Backwards are operators too, save only inputs and statistics, and recompute the activation.

Vocabulary (all operators): frames are folded into the batch, ``x`` (N, C, H, W) with N = B *
num_frames; ``sizes`` and ``offsets`` describe the slices of channels in channel order (three each;
output frame t of a slice reads frame t + offset, offset in {-1, 0, 1}); ``boundary`` is "zeros",
"replicate" or "circular". Where clips differ in length ``cu_frames`` says where they begin: int32
prefix sums (clips + 1,) on the device of ``x``, from 0 to N. ``num_frames`` is then ignored (pass
1), and a clip of one frame is not shifted. Nothing synchronises to read it: wrong values give wrong
frames, never a read out of bounds. Tensors are returned in the layout of ``x`` (channels_last or
NCHW). Tables are (R, C) with N % R == 0: frame n reads row ``n * R // N``, so R = B is a table per
clip and R = N one per frame. Affine parameters and tables may have any floating dtype; statistics
and sums are fp32 (fp64 for fp64 inputs).

``temporal_shift``
    ``y[t, slice] = x[t + offset, slice]``
``temporal_shift_backward``
    its adjoint
``shift_add``
    ``(residual + temporal_shift(h)) * scale``
``shift_add_group_norm_silu``
    ``sum = [residual +] shift(x) [+ temb]`` and
    ``y = silu(group_norm(sum) * (1 + ada_scale) + ada_shift)``, with the shift on ``y`` instead of
    ``x`` if ``shift_after``; returns (y, sum, mean, rstd), ``sum`` empty (0,) without a residual
``shift_add_group_norm_silu_backward``
    its gradients; ``x`` is the sum itself where ``is_sum``; returns (dx, dresidual, dtemb, dweight,
    dbias, dada_scale, dada_shift), empty (0,) for what was absent, and for dresidual where it
    equals dx (no shift on ``x``)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import reference
from .spec import BOUNDARIES

_SHIFT = "Tensor? cu_frames, SymInt num_frames, int[] sizes, int[] offsets, str boundary"
_TABLES = "Tensor? temb, Tensor? weight, Tensor? bias, Tensor? ada_scale, Tensor? ada_shift"
_NORM_SHIFT = (
    "Tensor? cu_frames, SymInt num_frames, int[] sizes, int[] offsets, bool shift_after,"
    " str boundary"
)

SCHEMAS = {
    "temporal_shift": f"(Tensor x, {_SHIFT}) -> Tensor",
    "temporal_shift_backward": f"(Tensor dy, {_SHIFT}) -> Tensor",
    "shift_add": f"(Tensor residual, Tensor h, float scale, {_SHIFT}) -> Tensor",
    "shift_add_group_norm_silu": (
        f"(Tensor x, Tensor? residual, {_TABLES}, int num_groups, float eps, {_NORM_SHIFT})"
        " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)"
    ),
    "shift_add_group_norm_silu_backward": (
        f"(Tensor dy, Tensor? dsum, Tensor x, bool is_sum, {_TABLES}, Tensor mean, Tensor rstd,"
        f" int num_groups, {_NORM_SHIFT})"
        " -> (Tensor dx, Tensor dresidual, Tensor dtemb, Tensor dweight, Tensor dbias,"
        " Tensor dada_scale, Tensor dada_shift)"
    ),
}

_lib = Library("latent_shift", "DEF")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.needs_exact_strides,))
    _lib.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# Fakes. They hold the checks of every backend that runs under torch.compile; native code repeats
# them.


def check_shift(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> None:
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
    torch._check(
        sum(sizes) == x.shape[1] and min(sizes) >= 0,
        lambda: f"the slices {sizes} hold {sum(sizes)} channels, the tensor has {x.shape[1]}",
    )
    torch._check(
        len(sizes) == len(offsets) == 3 and all(offset in (-1, 0, 1) for offset in offsets),
        lambda: f"expected three slices with offsets in -1, 0, 1, got {sizes} and {offsets}",
    )
    torch._check(boundary in BOUNDARIES, lambda: f"unknown boundary {boundary!r}")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


def _like_or_empty(x: Tensor, present: Tensor | None) -> Tensor:
    return x.new_empty(0) if present is None else present.new_empty(present.shape)


@register_fake("latent_shift::temporal_shift")
@register_fake("latent_shift::temporal_shift_backward")
def _(
    x: Tensor,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    return _like(x)


@register_fake("latent_shift::shift_add")
def _(
    residual: Tensor,
    h: Tensor,
    scale: float,
    cu_frames: Tensor | None,
    num_frames: int,
    sizes: list[int],
    offsets: list[int],
    boundary: str,
) -> Tensor:
    check_shift(h, cu_frames, num_frames, sizes, offsets, boundary)
    check_same(h, residual, "residual")
    return _like(h)


@register_fake("latent_shift::shift_add_group_norm_silu")
def _(
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
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    if residual is not None:
        check_same(x, residual, "residual")
    check_norm(x, temb, weight, bias, ada_scale, ada_shift, num_groups)
    stats = x.new_empty((x.shape[0], num_groups), dtype=reference.accumulate_dtype(x.dtype))
    total = x.new_empty(0) if residual is None else _like(x)
    return _like(x), total, stats, torch.empty_like(stats)


@register_fake("latent_shift::shift_add_group_norm_silu_backward")
def _(
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
    check_shift(x, cu_frames, num_frames, sizes, offsets, boundary)
    check_norm_gradients(x, dy, dsum, mean, rstd, num_groups)
    check_norm(x, temb, weight, bias, ada_scale, ada_shift, num_groups)
    separate = is_sum and not shift_after and any(offsets)
    return (
        _like(x),
        _like(x) if separate else x.new_empty(0),
        _like_or_empty(x, temb),
        _like_or_empty(x, weight),
        _like_or_empty(x, bias),
        _like_or_empty(x, ada_scale),
        _like_or_empty(x, ada_shift),
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
) -> None:
    frames, channels = x.shape[:2]
    torch._check(
        num_groups > 0 and channels % num_groups == 0,
        lambda: f"num_groups = {num_groups} does not divide {channels} channels",
    )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            torch._check(
                parameter.shape == (channels,) and parameter.device == x.device,
                _mismatch(name, f"({channels},) on {x.device}", parameter),
            )
    for name, table in (("temb", temb), ("ada_scale", ada_scale), ("ada_shift", ada_shift)):
        if table is not None:
            torch._check(
                table.dim() == 2
                and table.shape[1] == channels
                and table.device == x.device
                and (table.shape[0] == frames or frames % max(table.shape[0], 1) == 0),
                _mismatch(name, f"(R, {channels}) on {x.device}, R dividing {frames}", table),
            )


def _mismatch(name: str, expected: str, got: Tensor) -> Callable[[], str]:
    return lambda: f"{name} must be {expected}, got {tuple(got.shape)} {got.dtype} on {got.device}"


# Autograd.


def _save_shift(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cu_frames, *ctx.shift = inputs
    ctx.save_for_backward(cu_frames)


def _temporal_shift_grad(ctx: Any, dy: Tensor) -> tuple:
    (cu_frames,) = ctx.saved_tensors
    dx = torch.ops.latent_shift.temporal_shift_backward(dy, cu_frames, *ctx.shift)
    return dx, *([None] * 5)


def _save_shift_add(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.scale, cu_frames, *ctx.shift = inputs
    ctx.save_for_backward(cu_frames)


def _shift_add_grad(ctx: Any, dy: Tensor) -> tuple:
    (cu_frames,) = ctx.saved_tensors
    if ctx.scale != 1.0:
        dy = dy * ctx.scale
    dh = torch.ops.latent_shift.temporal_shift_backward(dy, cu_frames, *ctx.shift)
    return dy, dh, *([None] * 6)


def _save_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, *tables, ctx.num_groups, _, cu_frames = inputs[:10]
    _, total, mean, rstd = output
    ctx.is_sum, ctx.shift = residual is not None, inputs[10:]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.is_sum else x, *tables, mean, rstd, cu_frames)


def _norm_grad(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple:
    x, *tables, mean, rstd, cu_frames = ctx.saved_tensors
    if not ctx.is_sum:
        dsum = None
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dresidual, *rest = torch.ops.latent_shift.shift_add_group_norm_silu_backward(
        dy, dsum, x, ctx.is_sum, *tables, mean, rstd, ctx.num_groups, cu_frames, *ctx.shift
    )
    if ctx.is_sum and dresidual.numel() == 0:
        dresidual = dx
    given = [None if table is None else grad for table, grad in zip(tables, rest, strict=True)]
    return dx, dresidual if ctx.is_sum else None, *given, *([None] * 8)


register_autograd(
    "latent_shift::temporal_shift", _temporal_shift_grad, setup_context=_save_shift, lib=_lib
)
register_autograd(
    "latent_shift::shift_add", _shift_add_grad, setup_context=_save_shift_add, lib=_lib
)
register_autograd(
    "latent_shift::shift_add_group_norm_silu", _norm_grad, setup_context=_save_norm, lib=_lib
)


# Autocast. The operators keep fp32 statistics inside, so unlike torch's GroupNorm nothing is cast
# up; tensors of different dtypes meet in the wider one, as in torch's own addition.


def _promoting(name: str, count: int) -> Callable:
    operator = getattr(torch.ops.latent_shift, name)

    def autocast(*args: Any) -> Any:
        tensors = [t for t in args[:count] if t is not None]
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        cast = [None if t is None else t.to(dtype) for t in args[:count]]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return operator(*cast, *args[count:])

    return autocast


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(
    torch._C.DispatchKey.AutocastCUDA
)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _lib.impl("shift_add", _promoting("shift_add", 2), _key)
    _lib.impl("shift_add_group_norm_silu", _promoting("shift_add_group_norm_silu", 2), _key)
