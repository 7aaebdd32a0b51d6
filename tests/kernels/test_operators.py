"""One matrix: operator x backend x dtype x shape x layout x spec, held to fp64 and to eager
PyTorch's own error."""

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Iterable

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec, ops, reference

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
    "everything": ("residual", "temb", "weight", "bias", "ada_scale", "ada_shift"),
    "adagn": ("ada_scale", "ada_shift"),
}

SPECS = {
    "none": lambda c: None,
    "latent_shift": ShiftSpec.latent_shift,
    "replicate": lambda c: ShiftSpec.latent_shift(c, boundary="replicate", single_frame="shift"),
    "circular": lambda c: ShiftSpec.tsm(max(c, 2), 3, boundary="circular", single_frame="shift"),
    "causal": lambda c: ShiftSpec.causal(c, 2, single_frame="shift"),
}


BACKENDS = ("reference", "cpu", "triton")


def implementations(backend: str) -> dict:
    """Raw functions with the operators' signatures."""
    if backend == "reference":
        return {name: getattr(reference, name) for name in ops.SCHEMAS}
    if backend == "triton":
        pytest.importorskip("triton")
        from latent_shift_kernels.backends.triton import IMPLEMENTATIONS

        return IMPLEMENTATIONS
    if lsk.serving("cpu")["temporal_shift"] != "cpu":
        pytest.skip("the CPU library is not built")
    return {name: getattr(torch.ops.latent_shift, name) for name in ops.SCHEMAS}


def matrix(steps: dict[str, int], *axes: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises a test by every ``steps[backend]``-th case of the product of ``axes``.

    The steps divide no axis, so every value of every axis is met; the interpreter takes seconds
    where a library takes milliseconds.
    """
    product = list(itertools.product(*axes))
    cases = [
        pytest.param(backend, case, id="-".join((backend, *case)))
        for backend, step in steps.items()
        for case in product[::step]
    ]
    return pytest.mark.parametrize(("backend", "case"), cases, indirect=["backend"])


@pytest.fixture(params=BACKENDS)
def backend(request) -> dict:
    return implementations(request.param)


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
    got: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype
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
        limit = max(2 * own, 2 * ulp) + noise
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


@matrix(
    {"reference": 29, "cpu": 11, "triton": 197},
    SHAPES,
    LAYOUTS,
    FLAGS,
    SPECS,
    ("before", "after"),
    DTYPES,
    CLIPS,
)
def test_group_norm_silu(backend, poison, case):
    shape, layout, flags, spec, shift, dtype, clips = case
    check(backend, make_case(shape, layout, flags, spec, shift, DTYPES[dtype], clips))


@matrix(
    {"reference": 5, "cpu": 1, "triton": 13},
    SHAPES,
    LAYOUTS,
    [name for name in SPECS if name != "none"],
    DTYPES,
    CLIPS,
)
def test_shift(backend, poison, case):
    """The shift, the shifted addition and the adjoint: moved values are exact in every dtype."""
    shape, layout, spec, dtype, clips = case
    count, frames, channels, height, width, _ = SHAPES[shape]
    size = (count * frames, channels, height, width)
    x = laid_out(torch.randn(size, dtype=torch.float64).to(DTYPES[dtype]), layout)
    shift, lengths = make_spec(spec, clips, channels), clip_lengths(shape, clips)
    lowered = lower(lengths, shift, channels)
    y = backend["temporal_shift"](x, *lowered)
    assert torch.equal(y, naive.temporal_shift(x, lengths, shift))
    assert y.is_contiguous(memory_format=reference.memory_format(x))

    residual = laid_out(torch.randn(size, dtype=torch.float64).to(DTYPES[dtype]), layout)
    for scale in (1.0, 0.5):
        total = backend["shift_add"](residual, x, scale, *lowered)
        exact = (residual.double() + naive.temporal_shift(x, lengths, shift).double()) * scale
        assert torch.equal(total, exact.to(x.dtype))

    wide = x.detach().double().requires_grad_()
    dy = torch.randn(size, dtype=torch.float64).to(DTYPES[dtype])
    (exact,) = torch.autograd.grad(naive.temporal_shift(wide, lengths, shift), wide, dy.double())
    for grad in (laid_out(dy, layout), laid_out(dy, "strided")):
        assert torch.equal(backend["temporal_shift_backward"](grad, *lowered), exact.to(x.dtype))


def test_expanded_gradient(backend, poison):
    """``y.sum().backward()`` hands over a gradient of stride 0."""
    case = make_case(
        "straddling", "channels_last", "affine", "latent_shift", "before", torch.float32
    )
    case.dy = torch.ones(()).expand(case.x.shape)
    check(backend, case)
    lowered = lower(case.lengths, case.spec, case.x.shape[1])
    dense = backend["temporal_shift_backward"](case.dy.contiguous(), *lowered)
    assert torch.equal(backend["temporal_shift_backward"](case.dy, *lowered), dense)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_survive_a_large_mean(backend, layout):
    """E[x^2] - E[x]^2 in fp32 would lose every digit at a mean of 1000 standard deviations."""
    case = make_case("straddling", layout, "affine", "latent_shift", "after", torch.float32)
    case.x = laid_out(case.x + 2000.0, layout)
    check(backend, case)


def test_zero_variance_and_non_finite_values(backend):
    shift = (None, 1, [8, 0, 0], [0, 0, 0], False, "zeros")
    constant = torch.full((1, 8, 3, 3), 5.0)
    nothing = (None,) * 6
    y, *_ = backend["shift_add_group_norm_silu"](constant, *nothing, 2, 1e-5, *shift)
    assert torch.equal(y, torch.zeros_like(y))
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 8, 3, 3)
        x[0, 1, 2, 2] = value
        y, *_ = backend["shift_add_group_norm_silu"](x, *nothing, 2, 1e-5, *shift)
        eager = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2))
        assert torch.equal(y.isnan(), eager.isnan()), value


@pytest.mark.parametrize("mixed", [torch.float32, torch.float64])
def test_parameters_of_another_dtype(backend, poison, mixed):
    """Affine parameters and tables keep their own dtype, and so do their gradients."""
    case = make_case("straddling", "nchw", "everything", "latent_shift", "before", torch.bfloat16)
    for name in ("weight", "bias", "temb", "ada_scale", "ada_shift"):
        case.tensors[name] = case.tensors[name].to(mixed)
    got = run(backend, case)
    truth = naive.group_norm_silu(case.cast(torch.float64))
    for name in ("weight", "bias", "temb", "ada_scale", "ada_shift"):
        assert got[f"d{name}"].dtype is mixed
        torch.testing.assert_close(got[f"d{name}"].double(), truth[f"d{name}"], rtol=0.02, atol=0.1)


# What only the registered operators have: autograd, compilation, determinism.

native = pytest.mark.skipif(
    lsk.serving("cpu")["temporal_shift"] != "cpu", reason="the CPU library is not built"
)


def functional_call(case: naive.Case, x: Tensor, tensors: dict[str, Tensor]):
    return lsk.shift_add_group_norm_silu(
        x,
        tensors.get("weight"),
        tensors.get("bias"),
        case.num_groups,
        case.eps,
        spec=case.spec,
        shift=case.shift,
        num_frames=case.lengths,
        **{k: v for k, v in tensors.items() if k not in ("weight", "bias")},
    )


@pytest.mark.parametrize("boundary", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("shift", ["before", "after"])
@pytest.mark.parametrize("flags", ["bare", "everything"])
def test_gradcheck(flags, shift, boundary):
    case = make_case("straddling", "channels_last", flags, "latent_shift", shift, torch.float64)
    case.spec = ShiftSpec.latent_shift(20, boundary=boundary)
    x = case.x[:3, :, :1, :2].detach().requires_grad_()
    tensors = {}
    for name, t in case.tensors.items():
        t = (
            t[:3, :, :1, :2]
            if t.dim() == 4
            else t[: 3 if t.shape[0] == 6 else 1]
            if t.dim() == 2
            else t
        )
        tensors[name] = t.detach().clone().requires_grad_()

    def call(x, *values):
        return functional_call(case, x, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(call, (x, *tensors.values()), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x: lsk.shift_add(x.sin(), x, case.spec, 3, scale=0.7), (x,)
    )


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
def test_opcheck(layout, clips):
    case = make_case(
        "straddling", layout, "everything", "latent_shift", "before", torch.float32, clips
    )
    shift = lower(case.lengths, case.spec, 20)
    x = case.x.detach().requires_grad_()
    check_op = torch.library.opcheck
    check_op(torch.ops.latent_shift.temporal_shift.default, (x, *shift))
    check_op(torch.ops.latent_shift.temporal_shift_backward.default, (x.detach(), *shift))
    residual = case.tensors["residual"].requires_grad_()
    check_op(torch.ops.latent_shift.shift_add.default, (residual, x, 0.5, *shift))
    tables = [case.tensors[n] for n in ("temb", "weight", "bias", "ada_scale", "ada_shift")]
    tables[0] = tables[0].t().contiguous().t()  # dense, but its gradient is row-major all the same
    lowered = norm_shift(case)
    check_op(
        torch.ops.latent_shift.shift_add_group_norm_silu.default,
        (x, residual, *tables, 4, 1e-5, *lowered),
    )
    stats = torch.rand(6, 4)
    check_op(
        torch.ops.latent_shift.shift_add_group_norm_silu_backward.default,
        (case.dy, case.dsum, x.detach(), True, *tables, stats, stats + 1, 4, *lowered),
    )


def test_compile_fullgraph_without_recompiling():
    """Once a size is known to vary, neither another batch nor another clip length compiles
    again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    spec = ShiftSpec.latent_shift(20)
    weight = torch.ones(20, requires_grad=True)

    def block(x, residual, num_frames):
        h, total = lsk.shift_add_group_norm_silu(
            x, weight, None, 4, spec=spec, num_frames=num_frames, residual=residual
        )
        return lsk.shift_add(total, h, spec, num_frames)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for frames, clips in ((4, 2), (5, 3), (6, 2), (7, 5), (16, 1)):
        x = torch.randn(frames * clips, 20, 3, 3).to(memory_format=torch.channels_last)
        x.requires_grad_()
        y = compiled(x, x.cos(), frames)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        expected = block(x, x.cos(), frames)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])
    assert counter.frame_count <= 2  # the first sizes, then any


def test_compile_without_recompiling_for_other_clips():
    """Which clips a batch holds is data: other lengths or another number of them compile nothing
    again, and nothing reads them back."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    spec = ShiftSpec.latent_shift(20)

    def block(x, cu_frames):
        h, total = lsk.shift_add_group_norm_silu(
            x, None, None, 4, spec=spec, cu_frames=cu_frames, residual=x
        )
        return lsk.shift_add(total, lsk.temporal_shift(h, spec, cu_frames=cu_frames), spec,
                             cu_frames=cu_frames)  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for lengths in ([3, 2], [1, 0, 4, 2], [2, 3, 3], [9], [1] * 7):
        x = torch.randn(sum(lengths), 20, 3, 3).to(memory_format=torch.channels_last)
        x.requires_grad_()
        cu_frames = prefix_sums(lengths)
        y, expected = compiled(x, cu_frames), block(x, cu_frames)
        assert torch.equal(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("values", [[0, 0], [3, 1, 9], [-5, 2, 2], [7, 7, 7]])
def test_wrong_prefix_sums_stay_in_bounds(backend, values):
    """Nobody reads them on the host, so wrong ones give wrong frames, but frames of the batch."""
    x = torch.arange(1.0, 6.0).repeat_interleave(6 * 4).view(5, 6, 2, 2)
    cu_frames = torch.tensor(values, dtype=torch.int32)
    for boundary in ("zeros", "replicate", "circular"):
        y = backend["temporal_shift"](x, cu_frames, 1, [2, 2, 2], [-1, 0, 1], boundary)
        assert torch.equal(y[:, 2:4], x[:, 2:4])
        assert set(y.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


@native
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bitwise_equal_on_any_number_of_threads(layout, dtype):
    torch.manual_seed(1)
    x = laid_out(torch.randn(8, 320, 16, 16).to(DTYPES[dtype]), layout).requires_grad_()
    weight = torch.randn(320, requires_grad=True)
    temb = torch.randn(2, 320, requires_grad=True)
    spec = ShiftSpec.latent_shift(320)

    def once():
        y, total = lsk.shift_add_group_norm_silu(
            x, weight, None, 32, spec=spec, num_frames=4, residual=x.detach(), temb=temb
        )
        out = lsk.shift_add(total, y, spec, 4)
        return out, *torch.autograd.grad(out.float().square().mean(), (x, weight, temb))

    threads = torch.get_num_threads()
    first = once()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True)), count
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_adjoint_and_truth_for_any_spec_and_shape(data):
    """<shift(x), y> == <x, unshift(y)>, and the operator is the definition, whatever the sizes."""
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any))
        clips, single_frame = {"cu_frames": prefix_sums(lengths)}, "identity"
        frames = sum(lengths)
    else:
        lengths = data.draw(st.integers(1, 5))
        clips = {"num_frames": lengths}
        single_frame = data.draw(st.sampled_from(["identity", "shift"]))
        frames = lengths * data.draw(st.integers(1, 3))
    sizes = data.draw(st.tuples(*[st.integers(0, 9)] * 3).filter(any))
    spec = ShiftSpec(
        *sizes,
        order=data.draw(st.permutations(["prev", "keep", "next"])),
        boundary=data.draw(st.sampled_from(["zeros", "replicate", "circular"])),
        single_frame=single_frame,
    )
    height, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    layout = data.draw(st.sampled_from(LAYOUTS))
    size = (frames, spec.channels, height, width)
    # Small integers: sums are exact, so equality is.
    x = laid_out(torch.randint(-8, 9, size).double(), layout).requires_grad_()
    y = torch.randint(-8, 9, size).double()
    shifted = lsk.temporal_shift(x, spec, **clips)
    assert torch.equal(shifted, naive.temporal_shift(x.detach(), lengths, spec))
    (back,) = torch.autograd.grad(shifted, x, y)
    assert (shifted * y).sum() == (x * back).sum()


def test_equal_frames_change_only_at_the_ends():
    frame = torch.randn(1, 12, 4, 4)
    x = frame.repeat(5, 1, 1, 1)
    y = lsk.temporal_shift(x, ShiftSpec.latent_shift(12), 5)
    assert torch.equal(y[1:-1], x[1:-1])
    assert not torch.equal(y[0], x[0]) and not torch.equal(y[-1], x[-1])


def test_receptive_field_and_clips_never_mix():
    spec = ShiftSpec.latent_shift(12)
    x = torch.randn(2 * 9, 12, 2, 2, requires_grad=True)
    y = x
    for _ in range(3):
        # Channels mix between the shifts as in a convolution, or none would be moved twice.
        y = lsk.temporal_shift(y, spec, 9)
        y = y + y.mean(1, keepdim=True)
    (grad,) = torch.autograd.grad(y[4].square().sum(), x)
    seen = grad.abs().sum((1, 2, 3)).nonzero().flatten().tolist()
    assert seen == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16])
def test_autocast_meets_in_the_wider_dtype(device_dtype):
    spec = ShiftSpec.latent_shift(12)
    wide, narrow = torch.randn(4, 12, 3, 3), torch.randn(4, 12, 3, 3).to(device_dtype)
    with torch.autocast("cpu", dtype=device_dtype):
        assert lsk.shift_add(wide, narrow, spec, 2).dtype is torch.float32
        assert lsk.temporal_shift(narrow, spec, 2).dtype is device_dtype
        weight = torch.ones(12, requires_grad=True)
        y, total = lsk.shift_add_group_norm_silu(
            narrow, weight, None, 3, spec=spec, num_frames=2, residual=wide
        )
        assert y.dtype is total.dtype is torch.float32
        y.sum().backward()
    assert weight.grad.dtype is torch.float32
    with pytest.raises(ValueError, match="cast one of them"):
        lsk.shift_add(wide, narrow, spec, 2)


def test_clips_and_folded_frames_agree():
    spec = ShiftSpec.latent_shift(12)
    clips = torch.randn(2, 12, 5, 3, 4)
    folded = clips.transpose(1, 2).flatten(0, 1)
    expected = lsk.temporal_shift(folded, spec, 5).unflatten(0, (2, 5)).transpose(1, 2)
    assert torch.equal(lsk.temporal_shift(clips, spec), expected)
    y, total = lsk.shift_add_group_norm_silu(clips, None, None, 3, spec=spec, residual=clips)
    assert y.shape == total.shape == clips.shape


def test_modules_are_thin_copyable_and_have_the_norms_parameters():
    spec = ShiftSpec.latent_shift(12)
    module = lsk.ShiftGroupNormSiLU(3, 12, spec=spec, num_frames=2)
    module.load_state_dict(torch.nn.GroupNorm(3, 12).state_dict())
    x = torch.randn(4, 12, 3, 3)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    cu_frames = prefix_sums([1, 3])
    expected = lsk.shift_add_group_norm_silu(
        x, module.weight, module.bias, 3, spec=spec, cu_frames=cu_frames
    )
    assert torch.equal(module(x, cu_frames=cu_frames), expected)
    shift = lsk.TemporalShift(spec, num_frames=2)
    expected = lsk.temporal_shift(x, spec, cu_frames=cu_frames)
    assert torch.equal(shift(x, cu_frames=cu_frames), expected)
    assert not list(shift.parameters()) and not shift.state_dict()
    assert torch.equal(pickle.loads(pickle.dumps(shift))(x), lsk.temporal_shift(x, spec, 2))
    assert "prev=4" in repr(shift)
