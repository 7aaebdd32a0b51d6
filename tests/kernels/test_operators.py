"""One matrix: operator x backend x dtype x shape x layout x spec, held to fp64 and to eager
PyTorch's own error.

``LATENT_SHIFT_TEST_DEVICE=cuda`` runs all of it on a GPU: "native" is then the CUDA library.
"""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec, reference

from . import naive
from .cases import (
    BACKENDS,
    CLIPS,
    CONV_FLAGS,
    DEVICE,
    DTYPES,
    FLAGS,
    LAYOUTS,
    SHAPES,
    SPECS,
    assert_as_good_as_eager,
    check,
    clip_lengths,
    conv_arguments,
    conv_shift,
    conv_tables,
    implementations,
    laid_out,
    lower,
    make_case,
    make_conv_case,
    make_spec,
    matrix,
    norm_shift,
    prefix_sums,
    run,
    run_conv,
)


@pytest.fixture(autouse=True)
def device():
    """Tensors are born on the device under test, where fp32 convolutions are fp32."""
    if DEVICE == "cpu":
        yield
        return
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(params=BACKENDS)
def backend(request) -> dict:
    return implementations(request.param)


@matrix(
    {"reference": 29, "native": 11, "triton": 197},
    SHAPES,
    LAYOUTS,
    FLAGS,
    SPECS,
    ("before", "after"),
    DTYPES,
    CLIPS,
    on_device={"triton": 37},
)
def test_group_norm_silu(backend, poison, case):
    shape, layout, flags, spec, shift, dtype, clips = case
    check(backend, make_case(shape, layout, flags, spec, shift, DTYPES[dtype], clips))


@matrix(
    {"reference": 401, "native": 211, "triton": 4801},
    SHAPES,
    LAYOUTS,
    CONV_FLAGS,
    SPECS,
    ("before", "after"),
    ("still", "moved", "both"),
    DTYPES,
    CLIPS,
    on_device={"native": 53, "triton": 401},
)
def test_group_norm_silu_conv2d(backend, poison, case):
    shape, layout, flags, spec, shift, out, dtype, clips = case
    case = make_conv_case(shape, layout, flags, spec, shift, out, DTYPES[dtype], clips)
    got = run_conv(backend, case)
    truth = naive.group_norm_silu_conv2d(case.cast(torch.float64))
    truth.pop("dresidual", None)
    eager = naive.group_norm_silu_conv2d(case)
    # Sums of what a convolution's gradient left, in another order: 2 would be a lottery again.
    assert_as_good_as_eager(got, truth, eager, DTYPES[dtype], factor=4.0)
    layout = reference.memory_format(case.x)
    for name in ("out", "dx", "dskip"):
        if name in got:
            assert got[name].is_contiguous(memory_format=layout), name


@matrix(
    {"triton": 1201},
    ("straddling", "prime", "one_frame", "one_channel_groups"),
    ("channels_last", "channels_last_strided"),
    CONV_FLAGS,
    SPECS,
    ("before", "after"),
    ("still", "moved", "both"),
    ("fp32", "bf16", "fp16"),
    CLIPS,
    on_device={"triton": 101},
)
def test_conv2d_in_one_kernel(backend, poison, case):
    shape, layout, flags, spec, shift, out, dtype, clips = case
    case = make_conv_case(shape, layout, flags, spec, shift, out, DTYPES[dtype], clips)
    fused = backend["shift_group_norm_silu_conv2d_fused"]
    got = run_conv({**backend, "shift_group_norm_silu_conv2d": fused}, case)
    truth = naive.group_norm_silu_conv2d(case.cast(torch.float64))
    truth.pop("dresidual", None)
    eager = naive.group_norm_silu_conv2d(case)
    assert_as_good_as_eager(got, truth, eager, DTYPES[dtype], factor=4.0)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)


def test_the_kernel_that_holds_the_convolution_serves_when_asked():
    """In a process of its own: what serves is settled at import."""
    pytest.importorskip("triton")
    script = """
import torch
import latent_shift_kernels as lsk
x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
conv = lsk.ShiftGroupNormSiLUConv2d(torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 4, 3, padding=1))
norm = torch.nn.functional.group_norm(x, 2)
with torch.no_grad():
    torch.testing.assert_close(conv(x), conv.conv(torch.nn.functional.silu(norm)))
    torch.testing.assert_close(conv(x.contiguous()), conv(x))
print(lsk.explain("shift_group_norm_silu_conv2d", x))
print(lsk.explain("shift_group_norm_silu_conv2d", x.contiguous()))
"""
    told = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for asked, serves, hint in (
        (
            "triton,fused",
            "Triton, LATENT_SHIFT_BACKEND asks",
            "its convolution takes channels_last",
        ),
        ("triton", "composed of", "LATENT_SHIFT_BACKEND=auto,fused chooses"),
    ):
        environment = {**os.environ, **told, "LATENT_SHIFT_BACKEND": asked}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert f"(2, 4, 3, 3): {serves}" in result.stdout.splitlines()[0]
        assert hint in result.stdout


@matrix(
    {"reference": 5, "native": 1, "triton": 13},
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

cpu_library = pytest.mark.skipif(
    DEVICE != "cpu" or lsk.serving("cpu")["temporal_shift"] != "cpu",
    reason="needs CPU tensors and the library for them",
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


@pytest.mark.parametrize("shift", ["before", "after"])
@pytest.mark.parametrize("flags", ["bare", "everything"])
def test_gradcheck_conv2d(flags, shift):
    case = make_conv_case(
        "prime", "channels_last", flags, "latent_shift", shift, "both", torch.float64
    )
    leaves = {
        name: t[..., :2, :2] if name in ("skip", "residual") else t
        for name, t in {"x": case.x[..., :2, :2], **case.tensors}.items()
    }
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}

    def call(*values):
        return lsk.shift_group_norm_silu_conv2d(
            num_groups=case.num_groups,
            spec=case.spec,
            shift=shift,
            out_spec=case.out_spec,
            num_frames=case.lengths,
            scale=case.scale,
            **{"weight": None, "bias": None, **dict(zip(leaves, values, strict=True))},
        )

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("flags", ["bare", "everything"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
def test_opcheck_conv2d(layout, flags, clips):
    case = make_conv_case(
        "straddling", layout, flags, "latent_shift", "before", "both", torch.float32, clips
    )
    case.x.requires_grad_()
    case.tensors["filter"].requires_grad_()
    arguments = conv_arguments(case, flags == "bare")
    operator = torch.ops.latent_shift.shift_group_norm_silu_conv2d
    torch.library.opcheck(operator.default, arguments)
    case.x = case.x.detach()
    case.tensors["filter"] = case.tensors["filter"].detach()
    given, stats = case.tensors, torch.rand(6, 4)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.latent_shift.shift_group_norm_silu_conv2d_backward.default,
            (
                case.dy, case.x, given.get("skip"), *conv_tables(case), stats, stats + 1, 4, 1e-5,
                given["filter"], given.get("filter_bias"), given.get("out_temb"),
                *conv_shift(case), *needs,
            ),
        )  # fmt: skip


def test_conv2d_saves_inputs_and_statistics_only():
    """The activation is computed again, compiled as well: nothing of its size is kept."""
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    norm, conv = torch.nn.GroupNorm(4, 32), torch.nn.Conv2d(32, 64, 3, padding=1)
    module = lsk.ShiftGroupNormSiLUConv2d(norm, conv, spec=ShiftSpec.latent_shift(32), num_frames=2)
    kept = []

    def keep(t):
        kept.append(t)
        return t

    inputs = {t.data_ptr() for t in (x, *module.parameters())}
    torch._dynamo.reset()
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = call(x)
        saved = [t for t in kept if t.data_ptr() not in inputs]
        assert sum(t.numel() for t in saved) <= 2 * 4 * 4  # mean and rstd
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert torch.isfinite(grad).all()


def test_conv2d_under_autocast_is_a_convolution():
    x = torch.randn(4, 12, 3, 3, requires_grad=True)
    module = lsk.ShiftGroupNormSiLUConv2d(
        torch.nn.GroupNorm(3, 12), torch.nn.Conv2d(12, 12, 3, padding=1)
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = module(x, residual=x)
        assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype is module.conv.weight.grad.dtype is torch.float32


def test_conv2d_module_and_frozen_parameters():
    spec, out_spec = ShiftSpec.latent_shift(12), ShiftSpec.latent_shift(5)
    norm, conv = torch.nn.GroupNorm(3, 12), torch.nn.Conv2d(12, 5, 3, padding=1)
    module = lsk.ShiftGroupNormSiLUConv2d(norm, conv, spec=spec, out_spec=out_spec, num_frames=2)
    x = torch.randn(4, 12, 3, 3, requires_grad=True)
    out, sums = module(x, return_sums=True)
    activation = lsk.shift_add_group_norm_silu(
        x, norm.weight, norm.bias, 3, spec=spec, num_frames=2
    )
    expected = lsk.temporal_shift(conv(activation), out_spec, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(sums[..., 0], out.sum((2, 3)))
    clips = x.detach().unflatten(0, (2, 2)).transpose(1, 2)
    torch.testing.assert_close(module(clips).transpose(1, 2).flatten(0, 1), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (x, conv.weight), retain_graph=True)
    module.requires_grad_(False)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted[0])
    conv.weight.requires_grad_()
    (grad,) = torch.autograd.grad(module(x.detach()).square().sum(), conv.weight)
    torch.testing.assert_close(grad, wanted[1])


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


@cpu_library
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
    with torch.autocast(DEVICE, dtype=device_dtype):
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
