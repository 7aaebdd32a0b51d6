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
``shift_group_norm_silu_conv2d``
    ``y`` of the above for ``x`` and ``skip`` joined along their channels, then
    ``c = conv2d(y, filter, padding=1) + filter_bias + out_temb`` with a ``filter`` (Cout, Cin, 3,
    3) in the dtype of ``x``, and ``out = (residual + shift(c)) * scale`` with a shift of its own,
    ``out_sizes`` and ``out_offsets``; returns (out, mean, rstd, sums), ``sums`` the (N, Cout, 2)
    sums and centred sums of squares of the channels of ``out``, empty (0,) unless ``emit_sums``
``shift_group_norm_silu_conv2d_backward``
    its gradients for a ``dout`` that holds ``scale``; returns (dx, dskip, dtemb, dweight, dbias,
    dada_scale, dada_shift, dfilter, dfilter_bias, dout_temb), empty (0,) for what was absent, for
    all up to dada_shift unless ``needs_input``, and for dfilter unless ``needs_filter``

``shift_group_norm_silu_conv2d`` is composed of the others and a convolution
(:mod:`latent_shift_kernels.composed`). A kernel that does all of it in one stands under
``shift_group_norm_silu_conv2d_fused`` (:mod:`latent_shift_kernels.backends` says when it serves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from . import composed, reference
from .checks import check_conv2d, check_norm, check_norm_gradients, check_same, check_shift

_SHIFT = "Tensor? cu_frames, SymInt num_frames, int[] sizes, int[] offsets, str boundary"
_TABLES = "Tensor? temb, Tensor? weight, Tensor? bias, Tensor? ada_scale, Tensor? ada_shift"
_NORM_SHIFT = (
    "Tensor? cu_frames, SymInt num_frames, int[] sizes, int[] offsets, bool shift_after,"
    " str boundary"
)

_CONV2D = (
    f"Tensor x, Tensor? skip, {_TABLES}, int num_groups, float eps, Tensor filter,"
    " Tensor? filter_bias, Tensor? out_temb, Tensor? residual, float scale, Tensor? cu_frames,"
    " SymInt num_frames, int[] sizes, int[] offsets, bool shift_after, int[] out_sizes,"
    " int[] out_offsets, str boundary, bool emit_sums"
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
    "shift_group_norm_silu_conv2d": (
        f"({_CONV2D}) -> (Tensor out, Tensor mean, Tensor rstd, Tensor sums)"
    ),
    "shift_group_norm_silu_conv2d_backward": (
        f"(Tensor dout, Tensor x, Tensor? skip, {_TABLES}, Tensor mean, Tensor rstd,"
        " int num_groups, float eps, Tensor filter, Tensor? filter_bias, Tensor? out_temb,"
        " Tensor? cu_frames, SymInt num_frames, int[] sizes, int[] offsets, bool shift_after,"
        " int[] out_sizes, int[] out_offsets, str boundary, bool needs_input, bool needs_filter)"
        " -> (Tensor dx, Tensor dskip, Tensor dtemb, Tensor dweight, Tensor dbias,"
        " Tensor dada_scale, Tensor dada_shift, Tensor dfilter, Tensor dfilter_bias,"
        " Tensor dout_temb)"
    ),
}
# Operators that kernels may offer and nobody has to: those above call them where they serve.
OPTIONAL_SCHEMAS = {
    "shift_group_norm_silu_conv2d_fused": SCHEMAS["shift_group_norm_silu_conv2d"],
}
COMPOSED = composed.implementations(torch.ops.latent_shift)

_lib = Library("latent_shift", "DEF")
for _name, _schema in {**SCHEMAS, **OPTIONAL_SCHEMAS}.items():
    _lib.define(_name + _schema, tags=(torch.Tag.needs_exact_strides,))
for _name in SCHEMAS:
    _implementation = COMPOSED.get(_name) or getattr(reference, _name)
    _lib.impl(_name, _implementation, "CompositeExplicitAutograd")


# Fakes, with the checks of every backend that runs under torch.compile.


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


@register_fake("latent_shift::shift_group_norm_silu_conv2d")
def _(
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
    frames, out_channels = x.shape[0], filter.shape[0]
    out = torch.empty(
        (frames, out_channels, *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=reference.memory_format(x),
    )
    stats = x.new_empty((frames, num_groups), dtype=reference.accumulate_dtype(x.dtype))
    sums = stats.new_empty((frames, out_channels, 2) if emit_sums else 0)
    return out, stats, torch.empty_like(stats), sums


@register_fake("latent_shift::shift_group_norm_silu_conv2d_backward")
def _(
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

    def grad(like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return x.new_empty(0)
        if like.dim() != 4:
            return like.new_empty(like.shape)
        layout = reference.memory_format(filter if like is filter else x)
        return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=layout)

    return (
        *(grad(t, needs_input) for t in (x, skip, *norm)),
        grad(filter, needs_filter),
        grad(filter_bias, True),
        grad(out_temb, True),
    )


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


def _save_conv2d(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, skip, *norm, ctx.num_groups, ctx.eps, filter, filter_bias, out_temb = inputs[:12]
    _, ctx.scale, cu_frames = inputs[12:15]
    ctx.shift = inputs[15:-1]
    _, mean, rstd, sums = output
    ctx.mark_non_differentiable(mean, rstd, sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, skip, *norm, mean, rstd, filter, filter_bias, out_temb, cu_frames)


def _conv2d_grad(ctx: Any, dout: Tensor | None, *_: None) -> tuple:
    if dout is None:
        return (None,) * 23
    x, skip, *norm, mean, rstd, filter, filter_bias, out_temb, cu_frames = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if ctx.scale != 1.0:
        dout = dout * ctx.scale
    # Without its like a gradient is not computed.
    wanted = (filter_bias if needs[10] else None, out_temb if needs[11] else None)
    grads = torch.ops.latent_shift.shift_group_norm_silu_conv2d_backward(
        dout, x, skip, *norm, mean, rstd, ctx.num_groups, ctx.eps, filter, *wanted,
        cu_frames, *ctx.shift, any(needs[:7]), needs[9],
    )  # fmt: skip
    inputs = (x, skip, *norm, filter, filter_bias, out_temb)
    of_input = (*needs[:7], *needs[9:12])
    given = [
        grad if like is not None and need else None
        for like, need, grad in zip(inputs, of_input, grads, strict=True)
    ]
    return *given[:7], None, None, *given[7:], dout if needs[12] else None, *([None] * 10)


def _differentiable(name: str, save: Callable, gradient: Callable) -> None:
    """As ``torch.library.register_autograd``, which walks the schema again in every call: with
    this many arguments that is about half of the host's time of a call that records gradients."""
    operator = getattr(torch.ops.latent_shift, name).default

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def recorded(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        return below(*inputs)

    _lib.impl(name, recorded, "Autograd")


_differentiable("temporal_shift", _save_shift, _temporal_shift_grad)
_differentiable("shift_add", _save_shift_add, _shift_add_grad)
_differentiable("shift_add_group_norm_silu", _save_norm, _norm_grad)
_differentiable("shift_group_norm_silu_conv2d", _save_conv2d, _conv2d_grad)


# Autocast. The operators keep fp32 statistics inside, so unlike torch's GroupNorm nothing is cast
# up; tensors of different dtypes meet in the wider one, as in torch's own addition. With a
# convolution inside, everything of an image's size enters in autocast's dtype, as for torch's own.


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


def _autocast_conv2d(x: Tensor, *args: Any) -> Any:
    dtype = torch.get_autocast_dtype(x.device.type)

    def lowered(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t

    arguments = [x, *args]
    for index in (0, 1, 9, 12):  # x, skip, filter, residual
        arguments[index] = lowered(arguments[index])
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return torch.ops.latent_shift.shift_group_norm_silu_conv2d(*arguments)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(
    torch._C.DispatchKey.AutocastCUDA
)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _lib.impl("shift_add", _promoting("shift_add", 2), _key)
    _lib.impl("shift_add_group_norm_silu", _promoting("shift_add_group_norm_silu", 2), _key)
    _lib.impl("shift_group_norm_silu_conv2d", _autocast_conv2d, _key)
