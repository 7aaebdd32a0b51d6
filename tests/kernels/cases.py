"""What the matrix of the operators is made of: shapes, layouts, specs, calls of raw operators, and
how close they must come.

Needs torch and pytest only; :mod:`tests.host` runs the same cases on the host executor.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec, composed, ops, reference

from . import naive

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# (clips, frames, channels, height, width, groups): C/3 astride groups and vectors, primes, ones, a
# model's width.
SHAPES = {
    "straddling": (2, 3, 20, 5, 7, 4),
    "prime": (1, 2, 37, 3, 3, 1),
    "one_frame": (2, 1, 12, 4, 4, 6),
    "one_pixel": (2, 4, 32, 1, 1, 8),
    "one_channel_groups": (1, 3, 7, 2, 9, 7),
    "site": (1, 2, 320, 8, 8, 32),
    "empty": (0, 3, 8, 4, 4, 2),
}
# Clips as long as each other, or of lengths of their own by their prefix sums.
CLIPS = ("even", "uneven")
LAYOUTS = ("nchw", "channels_last", "strided", "channels_last_strided")
FLAGS = {
    "bare": (),
    "affine": ("weight", "bias"),
    "join": ("residual", "weight", "bias"),
    "temb": ("temb", "weight", "bias"),
    "temb_alone": ("temb",),
    "everything": ("residual", "temb", "weight", "bias", "ada_scale", "ada_shift"),
    "adagn": ("ada_scale", "ada_shift"),
}

CONV_FLAGS = {
    "bare": (),
    "conv1": ("weight", "bias", "filter_bias", "out_temb"),
    "conv2": ("weight", "bias", "filter_bias", "residual"),
    "skip": ("skip", "weight", "bias", "filter_bias"),
    "everything": (
        "skip", "temb", "weight", "bias", "ada_scale", "ada_shift", "filter_bias", "out_temb",
        "residual",
    ),
}  # fmt: skip
SPECS = {
    "none": lambda c: None,
    "latent_shift": ShiftSpec.latent_shift,
    "replicate": lambda c: ShiftSpec.latent_shift(c, boundary="replicate", single_frame="shift"),
    "circular": lambda c: ShiftSpec.tsm(max(c, 2), 3, boundary="circular", single_frame="shift"),
    "causal": lambda c: ShiftSpec.causal(c, 2, single_frame="shift"),
}


BACKENDS = ("reference", "native", "triton")
# The whole matrix runs on the device named here: "cpu", or "cuda".
DEVICE = os.environ.get("LATENT_SHIFT_TEST_DEVICE", "cpu")


def implementations(backend: str) -> dict:
    """Raw functions with the operators' signatures."""
    if backend == "reference":
        return {
            **{name: getattr(reference, name) for name in ops.SCHEMAS if name not in ops.COMPOSED},
            **composed.implementations(reference),
        }
    if backend == "triton":
        pytest.importorskip("triton")
        from latent_shift_kernels.backends.triton import IMPLEMENTATIONS

        return {**composed.implementations(SimpleNamespace(**IMPLEMENTATIONS)), **IMPLEMENTATIONS}
    if lsk.serving(DEVICE)["temporal_shift"] != DEVICE:
        pytest.skip(f"the library for {DEVICE} tensors is not built")
    return {name: getattr(torch.ops.latent_shift, name) for name in ops.SCHEMAS}


def matrix(
    steps: dict[str, int], *axes: Iterable[str], on_device: dict[str, int] | None = None
) -> pytest.MarkDecorator:
    """Parametrises a test by every ``steps[backend]``-th case of the product of ``axes``.

    The steps divide no axis, so every value of every axis is met; the interpreter takes seconds
    where a library takes milliseconds. A GPU, which compiles what the interpreter interprets, takes
    the steps of ``on_device``.
    """
    if DEVICE != "cpu":
        steps = steps | (on_device or {})
    product = list(itertools.product(*axes))
    cases = [
        pytest.param(backend, case, id="-".join((backend, *case)))
        for backend, step in steps.items()
        for case in product[::step]
    ]
    return pytest.mark.parametrize(("backend", "case"), cases, indirect=["backend"])


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in memory of another shape."""
    if layout == "nchw":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    big = t.new_full((t.shape[0], t.shape[1] + 3, t.shape[2], t.shape[3] + 2), float("nan"))
    if layout == "channels_last_strided":
        big = big.contiguous(memory_format=torch.channels_last)
    view = big[:, 1 : 1 + t.shape[1], :, 2:]
    view.copy_(t)
    return view


def uneven(frames: int) -> list[int]:
    """Lengths of clips that make up ``frames``, one frame and none among them."""
    lengths = []
    for length in itertools.cycle((1, 0, 2, 3)):
        lengths.append(min(length, frames - sum(lengths)))
        if sum(lengths) == frames:
            return lengths


def prefix_sums(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def lower(lengths: int | list[int], spec: ShiftSpec | None, channels: int) -> tuple:
    """``cu_frames, num_frames, sizes, offsets, boundary`` of a raw operator."""
    clips = (None, lengths) if isinstance(lengths, int) else (prefix_sums(lengths), 1)
    if spec is None:
        return *clips, [channels, 0, 0], [0, 0, 0], "zeros"
    return *clips, spec.sizes, spec.offsets(lengths if clips[0] is None else None), spec.boundary


def norm_shift(case: naive.Case) -> tuple:
    """The same of the operators that shift before or after."""
    *shift, boundary = lower(case.lengths, case.spec, case.x.shape[1])
    return *shift, case.shift == "after", boundary


def clip_lengths(shape: str, clips: str) -> int | list[int]:
    count, frames, *_ = SHAPES[shape]
    return frames if clips == "even" else uneven(count * frames)


def make_spec(name: str, clips: str, channels: int) -> ShiftSpec | None:
    spec = SPECS[name](channels)
    if spec is None or clips == "even":
        return spec
    return dataclasses.replace(spec, single_frame="identity")


def make_case(
    shape: str,
    layout: str,
    flags: str,
    spec: str,
    shift: str,
    dtype: torch.dtype,
    clips: str = "even",
):
    count, frames, channels, height, width, groups = SHAPES[shape]
    batch = count * frames

    def random(*size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(*size, dtype=torch.float64) * scale + offset

    x = random(batch, channels, height, width, scale=2.0, offset=1.5)
    known = {
        "residual": lambda: random(*x.shape, scale=3.0, offset=-1.0),
        "temb": lambda: random(count, channels),
        "weight": lambda: random(channels, scale=0.3, offset=1.0),
        "bias": lambda: random(channels, scale=0.3),
        "ada_scale": lambda: random(batch, channels, scale=0.2),
        "ada_shift": lambda: random(count, channels, scale=0.2),
    }
    case = naive.Case(
        x,
        groups,
        clip_lengths(shape, clips),
        make_spec(spec, clips, channels),
        shift,
        {name: known[name]() for name in FLAGS[flags]},
        random(*x.shape),
        random(*x.shape) if "residual" in FLAGS[flags] else None,
    ).cast(dtype)
    case.x, case.dy = laid_out(case.x, layout), laid_out(case.dy, layout)
    return case


def make_conv_case(
    shape: str,
    layout: str,
    flags: str,
    spec: str,
    shift: str,
    out: str,
    dtype: torch.dtype,
    clips: str = "even",
) -> naive.ConvCase:
    """``spec`` moves the channels that go in, those that come out ("moved"), or both."""
    count, frames, channels, height, width, groups = SHAPES[shape]
    batch, out_channels = count * frames, channels + 3
    # One channel more a group: the groups lie astride x and skip.
    cin = channels + groups if "skip" in CONV_FLAGS[flags] else channels

    def random(*size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(*size, dtype=torch.float64) * scale + offset

    x = random(batch, channels, height, width, scale=2.0, offset=1.5)
    known = {
        "skip": lambda: random(batch, groups, height, width, offset=-1.0),
        "temb": lambda: random(count, cin),
        "weight": lambda: random(cin, scale=0.3, offset=1.0),
        "bias": lambda: random(cin, scale=0.3),
        "ada_scale": lambda: random(batch, cin, scale=0.2),
        "ada_shift": lambda: random(count, cin, scale=0.2),
        "filter": lambda: random(out_channels, cin, 3, 3, scale=(9 * cin) ** -0.5),
        "filter_bias": lambda: random(out_channels),
        "out_temb": lambda: random(count, out_channels),
        "residual": lambda: random(batch, out_channels, height, width, scale=2.0),
    }
    case = naive.ConvCase(
        x,
        groups,
        clip_lengths(shape, clips),
        make_spec(spec, clips, cin) if out != "moved" else None,
        shift,
        {name: known[name]() for name in (*CONV_FLAGS[flags], "filter")},
        random(batch, out_channels, height, width),
        out_spec=make_spec(spec, clips, out_channels) if out != "still" else None,
        scale=0.5 if flags == "everything" else 1.0,
    ).cast(dtype)
    case.x, case.dy = laid_out(case.x, layout), laid_out(case.dy, layout)
    return case


def conv_tables(case: naive.ConvCase) -> list[Tensor | None]:
    return [case.tensors.get(n) for n in ("temb", "weight", "bias", "ada_scale", "ada_shift")]


def conv_shift(case: naive.ConvCase) -> tuple:
    """``cu_frames`` to ``boundary`` of the convolution's operators."""
    cin, cout = case.tensors["filter"].shape[1], case.tensors["filter"].shape[0]
    *shift, boundary = lower(case.lengths, case.spec, cin)
    _, _, *out_shift, out_boundary = lower(case.lengths, case.out_spec, cout)
    boundary = out_boundary if case.spec is None else boundary
    return *shift, case.shift == "after", *out_shift, boundary


def conv_arguments(case: naive.ConvCase, emit_sums: bool) -> tuple:
    given = case.tensors
    return (
        case.x, given.get("skip"), *conv_tables(case), case.num_groups, case.eps, given["filter"],
        given.get("filter_bias"), given.get("out_temb"), given.get("residual"), case.scale,
        *conv_shift(case), emit_sums,
    )  # fmt: skip


def run_conv(backend: dict, case: naive.ConvCase) -> dict[str, Tensor]:
    """Outputs and gradients of a backend's raw functions, by name."""
    given = case.tensors
    conv2d = backend["shift_group_norm_silu_conv2d"]
    out, mean, rstd, sums = conv2d(*conv_arguments(case, True))
    if out.numel():
        wide = out.double().flatten(2)
        exact = torch.stack((wide.sum(2), wide.var(2, correction=0) * wide.shape[2]), 2)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-3)
    grads = backend["shift_group_norm_silu_conv2d_backward"](
        case.dy * case.scale, case.x, given.get("skip"), *conv_tables(case), mean, rstd,
        case.num_groups, case.eps, given["filter"], given.get("filter_bias"),
        given.get("out_temb"), *conv_shift(case), True, True,
    )  # fmt: skip
    names = (
        "x", "skip", "temb", "weight", "bias", "ada_scale", "ada_shift", "filter", "filter_bias",
        "out_temb",
    )  # fmt: skip
    result = {"out": out}
    for name, grad in zip(names, grads, strict=True):
        if name == "x" or name in given:
            result[f"d{name}"] = grad
        else:
            assert grad.shape == (0,), name
    return result


def run(backend: dict, case: naive.Case) -> dict[str, Tensor]:
    """Outputs and gradients of a backend's raw functions, by name."""
    given = case.tensors
    tables = [given.get(n) for n in ("temb", "weight", "bias", "ada_scale", "ada_shift")]
    shift = norm_shift(case)
    residual = given.get("residual")
    y, total, mean, rstd = backend["shift_add_group_norm_silu"](
        case.x, residual, *tables, case.num_groups, case.eps, *shift
    )
    is_sum = residual is not None
    dx, dresidual, *grads = backend["shift_add_group_norm_silu_backward"](
        case.dy,
        case.dsum,
        total if is_sum else case.x,
        is_sum,
        *tables,
        mean,
        rstd,
        case.num_groups,
        *shift,
    )
    result = {"y": y, "dx": dx}
    if is_sum:
        result["sum"] = total
        result["dresidual"] = dresidual if dresidual.numel() else dx
    for name, grad in zip(("temb", "weight", "bias", "ada_scale", "ada_shift"), grads, strict=True):
        if name in given:
            result[f"d{name}"] = grad
        else:
            assert grad.shape == (0,), name
    return result


def rms(t: Tensor) -> Tensor:
    """Root mean square: the largest of a few dozen errors would be a lottery between two correct
    kernels."""
    return t.square().mean().sqrt()


def assert_as_good_as_eager(
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    eager: dict[str, Tensor],
    dtype: torch.dtype,
    factor: float = 2.0,
) -> None:
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        ours = got[name]
        assert ours.shape == exact.shape and ours.dtype == dtype, name
        if not exact.numel():
            continue
        assert torch.isfinite(ours).all(), f"{name}: not every element was written"
        error = rms(ours.double() - exact)
        # Everything here is of order 1; a gradient that is 0 by symmetry is the sum of such terms.
        ulp = torch.finfo(dtype).eps * exact.abs().max().clamp_min(0.1)
        if dtype is torch.float64:
            # Truth itself is rounded in the same dtype, and a channel of zeros has 1/std = 316.
            assert error <= 1e-11, f"{name}: {error:.3g}"
            continue
        own = rms(eager[name].double() - exact)
        # dtemb may be 0 as the sum of a few dozen terms that are 316 each in a channel of zeros.
        noise = 2000 * torch.finfo(torch.float32).eps if name == "dtemb" else 0.0
        limit = max(factor * own, 2 * ulp) + noise
        assert error <= limit, f"{name}: {error:.3g}, eager PyTorch {own:.3g}"


def check(backend: dict, case: naive.Case) -> None:
    dtype = case.x.dtype
    got = run(backend, case)
    truth = naive.group_norm_silu(case.cast(torch.float64))
    assert_as_good_as_eager(got, truth, naive.group_norm_silu(case), dtype)
    layout = reference.memory_format(case.x)
    for name in ("y", "dx", "sum", "dresidual"):
        if name in got:
            assert got[name].is_contiguous(memory_format=layout), name
